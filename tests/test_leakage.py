"What a backbone was trained on: read from its card, compared with what is scored, refused where videos are shared, marked where that is allowed."
import json, shutil

import pytest
from pages import run_page, small

from cvslab import models
from cvslab.batch import read_run
from cvslab.demo import draw_endoscapes
from cvslab.provenance import dataset_called, leakage_of, read_card, shared_table
from cvslab.training import PreflightError

@pytest.mark.parametrize("trained, split, state, says", [
    (["cholec80"], "val", "leak", "Cholec80 66 = Endoscapes 121 (val)"),
    (["CAMMA-public/CholecT50"], "val", "leak", "CholecT50 103 = Endoscapes 127 (val)"),
    (["CholecT50:train"], "val", "leak", "66 = Endoscapes 121"),
    (["CholecT50:test"], "val", "leak", "103 = Endoscapes 127"),                 # the split of 103 is not told, so it counts
    (["cholect45"], "val", "leak", "66 = Endoscapes 121"),
    (["cholec80-cvs:val"], "val", "clean", "checked by two"),                    # 66 is one of its train videos
    (["cholec80-cvs:train"], "val", "leak", "66 = Endoscapes 121"),
    (["m2cai16-tool"], "val", "leak", "one of 11-15"),
    (["M2CAI16-tool:train"], "val", "clean", "as sets"),
    (["cholec80"], "test", "clean", "checked by two"), (["cholect50", "cholec80-cvs"], "test", "clean", "checked by two"),
    (["cholec120"], "test", "leak", "Cholec120 82 = Endoscapes 163 (test)"),
    (["cholec80"], "train", "leak", "67 = Endoscapes 1 (train)"),
    (["kinetics400", "HuggingFaceM4/something_something_v2"], "val", "clean", "counted as unrelated"),
    (["heichole"], "val", "clean", "another hospital"),
    (["autolaparo"], "val", "unverified", "no published analysis"), (["m2cai16-workflow"], "val", "unverified", "Strasbourg"),
    (["SurgeNetXL"], "val", "unverified", "surgical by its name"), (["m2cai16"], "val", "unverified", "M2CAI16-tool"),
    (["imagenet", "cholec80", "sages"], "val", "leak", "Cholec80 66"), (["imagenet", "sages"], "val", "unverified", "sages"),
    ([], "val", "unverified", "no card"), ([], "test", "unverified", "no card"),
    (["endoscapes"], "test", "leak", "itself"), (["Endoscapes2023:train"], "test", "clean", "another split"), (["endoscapes:test"], "test", "leak", "itself")])
def test_verdicts(trained, split, state, says):
    verdict = leakage_of(trained, "Endoscapes", split)
    assert verdict.state == state and says in "; ".join(verdict.reasons)

def test_the_other_way_round():
    assert leakage_of(["endoscapes"], "Cholec80-CVS", "test").state == "clean"
    assert leakage_of(["endoscapes"], "Cholec80-CVS", "val").reasons == ["endoscapes: Endoscapes 1 = Cholec80-CVS 67 (val), Endoscapes 3 = Cholec80-CVS 70 (val)"]
    assert leakage_of(["endoscapes"], "SAGES", "test").state == "unverified"
    assert leakage_of(["imagenet"], "an operating theatre of my own", "test").state == "unverified"
    assert leakage_of(["cholect50"], "Cholec80", "test").state == "leak"          # which of its videos are test ones is not told
    assert leakage_of(["imagenet"], base=["someone/vit"]).state == "unverified"

@pytest.mark.parametrize("trained, split", [(["endoscapes:vali"], "val"), (["imagenet"], "dev")])
def test_a_split_that_is_none(trained, split):
    with pytest.raises(ValueError, match="choose from"): leakage_of(trained, "Endoscapes", split)

def test_the_registry():
    table = shared_table()
    counts = table.groupby("dataset")["video"].nunique()
    assert (counts["Cholec80"], counts["Cholec80-CVS"], counts["CholecT50"], counts["CholecT45"], counts["CholecInstanceSeg"]) == (80, 80, 50, 45, 85)
    cvs = table.query("dataset == 'Cholec80-CVS'").groupby("split").size()
    assert cvs.to_dict() == dict(train=50, val=15, test=15)
    endo = table.query("dataset == 'Endoscapes'")
    assert not endo["group"].duplicated().any() and not table.duplicated(["dataset", "video", "group"]).any()
    public = set(table.query("dataset in ('Cholec80', 'CholecT50')")["group"])
    assert sorted(endo[endo["group"].isin(public)]["video"].astype(int)) == [1, 2, 3, 4, 7, 10, 33, 121, 127]
    assert all(dataset_called(name) == name for name in table["dataset"].unique())

# a run ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def project(scratch):
    draw_endoscapes(scratch/"data/tree", videos=(5, 3, 2), seconds=(20, 24), workers=1)
    return scratch

def weights(project, name, header=None):
    "A copy of the demo backbone with a card that says `header`, as seen from the project."
    folder = project/"weights"/name
    if not folder.exists():
        shutil.copytree(models.DEMO_BACKBONE, folder)
        (folder/"README.md").unlink()
        if header: (folder/"README.md").write_text(f"---\n{header}\n---\n# Weights\n", encoding="utf-8")
    return f"weights/{name}"

LEAKY = "license: cc-by-nc-sa-4.0\ndatasets:\n- imagenet-1k\n- cholec80"
def asked(name, **change): return small(name, data="data/tree", max_clips=16) | change

@pytest.mark.parametrize("page", ["02_baseline", "10_lora", "18_ideas"])
def test_a_backbone_that_saw_the_videos_is_refused(page, project):
    with pytest.raises(PreflightError, match=r"leakage: asked refuse a backbone .*Endoscapes val; seen weights/leaky is leak: cholec80: Cholec80 66 = Endoscapes 121 \(val\).*pass -p leakage allow"):
        run_page(project, page, asked("refused", backbone=weights(project, "leaky", LEAKY)), until="training.fit")

def test_allowed_it_runs_and_is_marked(project):
    run = run_page(project, "02_baseline", asked("allowed", backbone=weights(project, "leaky", LEAKY), leakage="allow"), until="training.compare_with")["run"]
    metrics = run.load("metrics.json")
    [card] = metrics["backbone"]
    assert (card["license"], card["datasets"], card["leakage"]["state"]) == ("cc-by-nc-sa-4.0", ["imagenet-1k", "cholec80"], "leak")
    assert metrics["note"].startswith("leakage allowed: weights/leaky, cholec80: Cholec80 66 = Endoscapes 121")
    row = read_run(run.dir)
    assert row["state"] == "scored" and "leakage allowed" in row["reason"]

def test_what_no_card_tells_is_noted_and_runs(project, capsys):
    run = run_page(project, "02_baseline", asked("unknown", backbone=weights(project, "unknown")), until="training.compare_with")["run"]
    assert "is unverified: no card says" in capsys.readouterr().out
    assert run.load("metrics.json")["note"].startswith("leakage unverified: weights/unknown")

@pytest.mark.parametrize("name, header, split", [("general", "datasets: [kinetics-400]", "val"), ("leaky", LEAKY, "test")])
def test_clean_runs_are_not_marked(name, header, split, project):
    run = run_page(project, "02_baseline", asked(f"clean-{name}", backbone=weights(project, name, header), split=split), until="training.compare_with")["run"]
    metrics = run.load("metrics.json")
    assert metrics["backbone"][0]["leakage"]["state"] == "clean" and "note" not in metrics

def test_both_encoders_of_a_hybrid_are_looked_at(project, monkeypatch):
    monkeypatch.chdir(project)
    cards = models.backbone_cards(dict(kind="hybrid", video=weights(project, "leaky", LEAKY), frames=weights(project, "unknown")))
    assert [c["datasets"] for c in cards] == [["imagenet-1k", "cholec80"], []]
    assert models.backbone_cards(dict(kind="window_vit")) == [] and models.backbone_cards("demo")[0]["license"] == "apache-2.0"

@pytest.mark.parametrize("header, words", [("datasets: [1, 2]", "write a name or a list of names"), ("datasets: {a: b}", "write a name"), ("a: [", "is no YAML"), ("- a", "must hold `name: value` lines")])
def test_a_broken_card(header, words, tmp_path):
    (tmp_path/"README.md").write_text(f"---\n{header}\n---\n")
    with pytest.raises(ValueError, match=words): read_card(tmp_path)

def test_a_card_without_a_header_says_nothing(tmp_path):
    (tmp_path/"README.md").write_text("# Weights\n\nTrained on ---\ncholec80\n---\n")
    (tmp_path/"config.json").write_text(json.dumps(dict(_name_or_path="a/b")))
    assert read_card(tmp_path) == dict(license=None, datasets=[], base_model=[], name_or_path="a/b")
