"OCT features, probes and pages: the same numbers from a bucket that fails, flat memory, and every fault that ended in 26.15 % caught."
import json, shutil, sys
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from conftest import ROOT, papermill, run_folders
from s3_server import KEYS, moto, proxy, upload, use

from cvslab import oct_training as oct
from cvslab import training
from cvslab.batch import collect, leaderboard, markdown
from cvslab.core import Ledger, Run, check_parameters, declared
from cvslab.demo import draw_oct
from cvslab.objectives import LossTerm
from cvslab.oct_models import ENCODERS, OctConfig, OctEncoder, build_oct_model
from cvslab.storage import Store, StorageError
from cvslab.volumes import Choice, Preprocess, VolumeSet

PREP = Preprocess(ENCODERS["demo"].shape)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory): return draw_oct(tmp_path_factory.mktemp("oct")/"drawn", scale=0.04, broken=False, device="topcon_maestro2")


@pytest.fixture(scope="module")
def bucket(drawn):
    with moto() as endpoint:
        upload(endpoint, drawn, "eyes", "ai-readi/dataset")
        yield endpoint


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CVSLAB_CACHE", str(tmp_path/"cache"))
    return tmp_path/"cache"


class HereRun(Run):
    "A run in a folder of a test."
    def __init__(self, folder): self.dir, self.experiment, self.name, self.params, self.data = folder, "test", "test", {}, dict(demo=True, fingerprint="x")


def features(place, **how):
    store, cohort = oct.open_oct(str(place), Choice(eye="R"))
    ledger = Ledger(max_share=0)
    found = oct.extract(oct.open_encoder("single_domain_01", "demo", store), cohort.table, store, PREP, ledger, **how)
    ledger.check(len(cohort.table))
    return found


# features

def test_a_failing_bucket_gives_the_features_of_a_folder(drawn, bucket, monkeypatch, tmp_path):
    monkeypatch.setenv("CVSLAB_CACHE", str(tmp_path/"local"))
    here = features(drawn)
    monkeypatch.setenv("CVSLAB_CACHE", str(tmp_path/"remote"))
    with proxy(bucket, fail=0.2, cut=0.05, seed=3) as front:
        use(monkeypatch, front.endpoint)
        cold = features("s3://eyes/ai-readi/dataset")
        assert {"fail", "cut"} <= set(front.faults)
        front.seen.clear()
        warm = features("s3://eyes/ai-readi/dataset")
        assert not [path for _, path, _ in front.seen if ".dcm" in path]
    assert torch.equal(here.x, cold.x) and torch.equal(here.x, warm.x)
    assert (cold.computed, warm.computed) == (len(here.table), 0) and (here.table["participant"] == warm.table["participant"]).all()


def test_a_cut_run_computes_only_what_is_missing_and_a_changed_file_anew(drawn, own_cache, tmp_path):
    tree = Path(shutil.copytree(drawn, tmp_path/"tree"))
    whole = features(tree)
    for path in whole.paths[3:]: path.unlink()
    again = features(tree)
    assert again.computed == len(whole.paths) - 3 and torch.equal(whole.x, again.x)
    assert features(tree, pool="max").computed == len(whole.paths)                        # another pooling is another feature
    first, other = (tree/whole.table["key"][i] for i in (0, 1))
    first.write_bytes(other.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="1 of .* items could not be read"): features(tree)
    first.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match="duplicate of"): features(tree)


def test_memory_stays_flat_while_features_are_computed(own_cache, tmp_path):
    config, rng, process, seen = OctConfig((32, 160, 160), hidden_size=24, num_hidden_layers=1, num_attention_heads=2), np.random.default_rng(0), psutil.Process(), []
    class Watched(OctEncoder):
        def forward(self, volume):
            seen.append(process.memory_info().rss)
            return super().forward(volume)
    for i in range(60): np.save(tmp_path/f"{i}.npy", rng.random((12, 12, 12)))
    table = pd.DataFrame([dict(participant=str(i), split="train", label=i % 4, key=f"{i}.npy", etag=str(i)) for i in range(60)])
    found = oct.extract(Watched(config), table, Store(tmp_path), Preprocess(config.shape), Ledger(max_share=0))
    assert found.x.shape == (60, 24) and len(seen) == 60
    assert max(seen[20:]) - max(seen[:20]) < 40 * np.prod(config.shape) * 4 / 4           # a quarter of what the later 40 would take


def test_a_probe_that_was_cut_ends_with_the_same_answers_and_a_finished_one_is_read(drawn, own_cache, tmp_path, monkeypatch):
    found = features(drawn)
    sets, encoder = oct.feature_sets(found), OctEncoder(ENCODERS["demo"])
    recipe = training.Recipe(dict(status=LossTerm(oct.cross_entropy())), dict(head=1e-2), oct.oct_scores, "balanced_accuracy", epochs=4, batch_size=8, patience=4)
    whole, cut = HereRun(tmp_path/"whole"), HereRun(tmp_path/"cut")
    expected = oct.probe(whole, encoder, sets, recipe, dict(split="val"))
    oct.probe(cut, encoder, sets, recipe, dict(split="val"))
    for name in ("metrics.json", "predictions.parquet", "checkpoint/epoch_0004.pt"): (cut.dir/name).unlink()
    resumed = oct.probe(cut, encoder, sets, recipe, dict(split="val"))
    assert resumed.equals(expected) and pd.read_csv(cut.dir/"history.csv").equals(pd.read_csv(whole.dir/"history.csv"))
    monkeypatch.setattr(oct, "fit", None)
    assert oct.probe(whole, encoder, sets, recipe, dict(split="val")).equals(expected)


# places that cannot be read

@pytest.mark.parametrize("place, keys, kind, words", [
    ("s3://nobody/ai-readi/dataset", {}, "missing", "check the bucket's name"),
    ("s3://eyes/ai-readi/datasets", {}, "missing", "nothing is there: check the name"),
    ("s3://eyes/ai-readi", {}, "missing", "not the dataset's root"),
    ("s3://eyes/ai-readi/dataset", dict(AWS_ACCESS_KEY_ID="AKIA" + "WRONGWRONGWRONG0"), "forbidden", "check its rights|key is unknown")])
def test_what_cannot_be_read_stops(bucket, monkeypatch, own_cache, place, keys, kind, words):
    with proxy(bucket, fail=1.0 if keys else 0.0, statuses=("denied",)) as front:
        use(monkeypatch, front.endpoint, **keys)
        with pytest.raises(StorageError, match=words) as caught: oct.open_oct(place)
        assert caught.value.kind == kind
        assert not any(secret in str(caught.value) for secret in (KEYS | keys).values())


# pages

SMALL = ["-p", "epochs", "3", "-p", "batch_size", "8", "-p", "folds", "0", "-p", "name", "probe"]

def test_the_probe_page_runs_from_a_failing_bucket_and_writes_no_secret(project, drawn, bucket, monkeypatch, tmp_path):
    monkeypatch.setenv("CVSLAB_CACHE", str(tmp_path/"remote"))
    folder = project/"outputs/31_oct_probe/probe"
    with proxy(bucket, fail=0.2, seed=7) as front:
        use(monkeypatch, front.endpoint)
        code, out = papermill(project, "31_oct_probe", "-p", "data", "s3://eyes/ai-readi/dataset", *SMALL)
        assert code == 0, out[-3000:]
        assert "fail" in front.faults
    store, cohort = oct.open_oct(str(drawn))
    manifest = pd.read_csv(folder/"manifest.csv", dtype=str)
    assert sorted(manifest["key"]) == sorted(cohort.table["key"]) and json.loads((folder/"params.json").read_text())["data"]["fingerprint"] == cohort.card["fingerprint"]
    assert {p.name for p in folder.iterdir()} >= {"applied.json", "checkpoint", "class_to_idx.json", "history.csv", "manifest.csv", "metrics.json", "params.json"}
    written = b"".join(p.read_bytes() for place in (project/"outputs", tmp_path/"remote") for p in place.rglob("*") if p.is_file()) + out.encode()
    assert not any(secret.encode() in written for secret in KEYS.values())
    assert json.loads((folder/"metrics.json").read_text())["n_participants"] == (cohort.table["split"] == "val").sum()


def test_the_sweep_finds_the_side_of_the_eye_the_planted_signal_and_nothing_in_shuffled_labels(project):
    code, out = papermill(project, "33_oct_sweep", "-p", "seeds", "1", "-p", "name", "sweep")
    assert code == 0, out[-3000:]
    folder = project/"outputs/33_oct_sweep/sweep"
    holds = {c["knob"]: c["turned"] for c in json.loads((folder/"controls.json").read_text())}
    best = json.loads((folder/"metrics.json").read_text())["best"]
    assert holds["laterality"] and holds["shuffled labels"] and holds[f"{best} above chance"] and best != "multi_domain"
    board = pd.read_csv(folder/"leaderboard.csv")
    assert set(board["row"]) == {"single_domain_01", "single_domain_02", "multi_domain", "random", "shuffled labels", "age and site", "constant"}
    assert (folder/"leaderboard.md").read_text().count("\n| ") == len(board) + 1
    code, out = papermill(project, "33_oct_sweep", "-p", "run", "outputs/33_oct_sweep/sweep")
    assert code == 0 and [p.name for p in run_folders(project, "33_oct_sweep")] == ["sweep"], out[-3000:]


@pytest.mark.parametrize("file", sorted(p.name for p in (ROOT/"params").glob("3[0-9]*.yaml")))
def test_a_parameter_file_is_honoured_by_its_page(file):
    page = next((ROOT/"nbs").glob(f"{file[:2]}_*.ipynb"))
    values, known = yaml.safe_load((ROOT/"params"/file).read_text()), declared(page)
    spaces = {}
    exec("from pydantic import *\nfrom cvslab.core import *\nfrom cvslab.volumes import *\nfrom cvslab.oct_models import *\nfrom cvslab.core import Device, Precision", spaces)
    defaults = {k: eval(d["default"], {}) for k, d in known.items()}
    assert check_parameters(known, defaults | values, set(values) - set(known), spaces)["encoder"] == "vit_b"


# what ended in 26.15 %

def constant(participants, answer=0, split="val"):
    truth = np.repeat(range(4), participants)
    table = pd.DataFrame(dict(participant=[str(1001 + i) for i in range(len(truth))], split=split, y_true=truth, y_pred=answer))
    return table.assign(**{f"logit_{c}": float(c == answer) for c in range(4)})


def test_identical_answers_of_checkpoints_are_not_ranked_and_nothing_is_chosen():
    rows = {name: [constant((17, 17, 20, 11))] for name in ("single_domain_01", "single_domain_02", "multi_domain")}
    board = oct.rank_rows(rows, "val", n_boot=50)
    assert board["rank"].tolist() == ["", "", ""] and board["note"].str.contains("the same answers as").all() and board["note"].str.contains("collapsed").all()
    assert board["accuracy"].tolist() == pytest.approx([17 / 65] * 3)
    with pytest.raises(ValueError, match="there is nothing to choose"): oct.choose_row(rows, list(rows))


def test_a_collapsed_run_is_named_on_the_leaderboard(tmp_path):
    for run, table in (("a", constant((5, 5, 6, 4))), ("b", constant((5, 5, 6, 4)).assign(y_pred=lambda t: t["y_true"], **{f"logit_{c}": np.random.default_rng(c).random(20) for c in range(4)}))):
        folder = tmp_path/"31_oct_probe"/run
        folder.mkdir(parents=True)
        (folder/"params.json").write_text(json.dumps(dict(params=dict(seed=0, pool=run), data=dict(demo=False, fingerprint="f"), code="c")))
        table.to_parquet(folder/"predictions.parquet")
        metrics = dict(experiment="31_oct_probe", run=run, data="real", protocol=dict(split="val"), **oct.OCT.score(table), best_epoch=1, seconds=1.0)
        (folder/"metrics.json").write_text(json.dumps(metrics, default=lambda v: v.item()))
    board = leaderboard(collect(tmp_path)).set_index("run")
    assert board["metric"].unique().tolist() == ["balanced_accuracy"] and board.loc["b", "rank"] == 1 and board.loc["a", "chance"] == 25
    assert "collapsed: the scores are the same on every item" in board.loc["a", "note"] and "collapsed" not in board.loc["b", "note"]
    assert "20 scored" in markdown(board.reset_index(), collect(tmp_path))


# fine-tuning

def test_blocks_wait_for_their_epoch_and_only_they_learn(drawn, own_cache, tmp_path):
    store, cohort = oct.open_oct(str(drawn), Choice(eye="R"))
    backbone = oct.open_encoder("single_domain_01", "demo", store)
    start = {k: v.clone() for k, v in backbone.state_dict().items()}
    model = build_oct_model(backbone, standardise=False)
    oct.unfreeze_blocks(model.backbone, 1)
    sets = {s: VolumeSet(t, store, PREP) for s, t in cohort.table.groupby("split")}
    recipe = training.Recipe(dict(status=LossTerm(oct.cross_entropy([1., 2., 3., 4.]))), dict(head=1e-2, backbone=1e-2), oct.oct_scores, "balanced_accuracy", epochs=2, batch_size=8,
                             micro_batch=4, warmup_epochs=0, begins=dict(backbone=1), transform=oct.Augment3D(flip=0.5, jitter=0.1), checkpointing=True)
    run = HereRun(tmp_path/"run")
    proofs = training.preflight(model, sets["train"], recipe, run, [oct.unfreeze_proof(model.backbone, 1)])
    assert set(proofs["turned"]) == {"yes"} and "begin backbone" in set(proofs["knob"])
    training.fit(model, sets["train"], sets["val"], recipe, run)
    kept = [torch.load(tmp_path/f"run/checkpoint/epoch_000{e}.pt", weights_only=True)["model"] for e in (1, 2)]
    learned = {k.removeprefix("backbone.") for k in kept[0] if k.startswith("backbone.")}
    assert learned == {k for k in start if k.startswith(("blocks.1.", "norm."))}
    assert all(torch.equal(kept[0][f"backbone.{k}"], start[k]) for k in learned) and not any(torch.equal(kept[1][f"backbone.{k}"], start[k]) for k in learned)
    metrics = training.report(run, model, sets, recipe, dict(split="test"), oct.OCT)
    assert metrics["n_participants"] == len(sets["test"]) and metrics["selection"]["n_participants"] == len(sets["val"])
