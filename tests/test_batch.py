"What the leaderboard does with twins, broken runs, other protocols, demo data, no run and many runs."
import time

import numpy as np
import pandas as pd
import pytest
from conftest import papermill, run_folders

from cvslab.batch import PUBLISHED, RECORDED, RECORDED_LATER, collect, differences, leaderboard, markdown, recorded_twins, twins
from cvslab.core import save
from cvslab.metrics import CRITERIA, score_cvs
from cvslab import record

PROTOCOL = dict(split="val", frames="key", window="causal", labels="majority")

def predictions(seed, clips=40):
    rng = np.random.default_rng(seed)
    y = rng.random((clips, 3)) < .4
    table = pd.DataFrame(dict(clip=[f"{i//8}_{25*i}" for i in range(clips)], video=np.arange(clips)//8, frame=25*np.arange(clips), split="val"))
    return table.assign(**{f"y_{c}": y[:, i].astype(float) for i, c in enumerate(CRITERIA)}, **{f"p_{c}": rng.random(clips) for c in CRITERIA})

def write(outputs, experiment, run, weights=0, demo=False, protocol=PROTOCOL, fingerprint="tree", clips=40, n_boot=20, looked_at=None, **params):
    "A run folder as training writes it; runs of the same `weights` have the same predictions and history."
    folder, table = outputs/experiment/run, predictions(weights, clips)
    scores = score_cvs(table, n_boot)
    save(folder/"params.json", dict(experiment=experiment, run=run, params=params, data=dict(demo=demo, fingerprint=fingerprint), code="abc"))
    save(folder/"history.csv", pd.DataFrame(dict(epoch=[1, 2], train_loss=[.7, .6 - weights/1000], val_map=[.3, scores["map"]["value"]])))
    save(folder/"predictions.parquet", table)
    save(folder/"metrics.json", dict(experiment=experiment, run=run, data="demo" if demo else "real", protocol=protocol, input=looked_at or {}, **scores,
                                     best_epoch=2, seconds=90., clips_per_second=10., peak_memory_gb=1.))
    return folder

def test_a_planted_twin_is_found_and_not_ranked(tmp_path):
    write(tmp_path, "02_baseline", "plain", weights=1, seed=0, pos_weight=None)
    write(tmp_path, "06_c2_weighted", "weighted", weights=1, seed=0, pos_weight=[1, 5, 1])
    write(tmp_path, "10_lora", "r16", weights=2, seed=0, rank=16)
    found = twins(collect(tmp_path))
    assert found["folder"].str.split("/").str[-1].tolist() == ["plain", "weighted"]
    assert "pos_weight None" in found["differs"][0] and "pos_weight [1, 5, 1]" in found["differs"][1]
    board = leaderboard(collect(tmp_path)).set_index("run")
    assert board["rank"].isna().to_dict() == dict(plain=True, weighted=True, r16=False)
    assert "same predictions and history" in board.loc["weighted", "note"]

def test_one_changed_digit_is_no_twin(tmp_path):
    write(tmp_path, "02_baseline", "plain", weights=1, seed=0, pos_weight=None)
    other = write(tmp_path, "06_c2_weighted", "weighted", weights=1, seed=0, pos_weight=[1, 5, 1])
    table = pd.read_parquet(other/"predictions.parquet")
    table.loc[0, "p_c2"] = np.nextafter(table.loc[0, "p_c2"], 1)
    save(other/"predictions.parquet", table)
    assert twins(collect(tmp_path))["same"].unique().tolist() == ["history"]
    history = pd.read_csv(other/"history.csv")
    save(other/"history.csv", history.assign(train_loss=history["train_loss"] + 1e-9))
    assert not len(twins(collect(tmp_path)))

def test_repeats_and_row_order_are_no_twins_and_twins(tmp_path):
    write(tmp_path, "02_baseline", "one", weights=1, seed=0, device="cpu", split="val")
    again = write(tmp_path, "02_baseline", "two", weights=1, seed=0, device="cuda", split="test")
    assert not len(twins(collect(tmp_path)))
    shuffled = write(tmp_path, "02_baseline", "three", weights=1, seed=1, device="cpu", split="val")
    save(shuffled/"predictions.parquet", pd.read_parquet(again/"predictions.parquet").sample(frac=1, random_state=0))
    assert twins(collect(tmp_path))["same"].tolist() == ["predictions and history"]*3

@pytest.mark.parametrize("file, content, said", [
    ("metrics.json", '{"data": "real", "protoc', "metrics.json cannot be read (JSONDecodeError"),
    ("metrics.json", '{"data": "real", "map": {}}', "it lacks ['protocol', 'n_clips']"),
    ("metrics.json", '{"data": "real", "protocol": {}, "n_clips": 3, "map": {"value": 49.8, "lo": null, "hi": null, "chance": null}}', "outside 0..1"),
    ("metrics.json", '{"data": "demo", "protocol": {}, "n_clips": 3, "map": {"value": 0.4, "lo": null, "hi": null, "chance": null}}', "params.json says real"),
    ("params.json", "", "params.json cannot be read (JSONDecodeError"),
    ("predictions.parquet", "no parquet", "predictions.parquet: Arrow")])
def test_a_broken_run_is_listed_with_its_reason(tmp_path, file, content, said):
    broken = write(tmp_path, "10_lora", "broken", weights=3, seed=0)
    write(tmp_path, "10_lora", "fine", weights=4, seed=0, rank=8)
    (broken/file).write_text(content)
    runs = collect(tmp_path).set_index("run")
    assert runs["state"].to_dict() == dict(broken="broken", fine="scored")
    assert said in runs.loc["broken", "reason"] and str(tmp_path) not in runs.loc["broken", "reason"]
    runs = collect(tmp_path)
    board = leaderboard(runs)
    assert board["run"].tolist() == ["fine"]
    assert said.split(":")[0] in markdown(board, runs).split("## broken")[1]

def test_an_unfinished_run_is_listed(tmp_path):
    (write(tmp_path, "10_lora", "cut", seed=0)/"metrics.json").unlink()
    (tmp_path/"10_lora/empty").mkdir()
    runs = collect(tmp_path).set_index("run")
    assert runs["state"].to_dict() == dict(cut="unscored", empty="broken")
    assert runs.loc["empty", "reason"].startswith("params.json: FileNotFoundError")

def test_another_protocol_is_refused_or_shown_apart(tmp_path):
    write(tmp_path, "10_lora", "key", weights=1, seed=0, rank=8)
    write(tmp_path, "10_lora", "copied", weights=2, seed=0, rank=8, protocol=PROTOCOL | dict(frames="1fps", window="centred"))
    with pytest.raises(ValueError, match=r"2 boards.*frames: 1fps, key; window: centred, causal"): leaderboard(collect(tmp_path))
    board = leaderboard(collect(tmp_path), apart=True)
    assert board["board"].nunique() == 2 and board["rank"].tolist() == [1, 1]

def test_demo_runs_stand_apart_and_last(tmp_path):
    write(tmp_path, "10_lora", "real", weights=1, seed=0, rank=8)
    write(tmp_path, "10_lora", "drawn", weights=2, seed=0, rank=8, demo=True)
    with pytest.raises(ValueError, match="data: demo, real"): leaderboard(collect(tmp_path))
    board = leaderboard(collect(tmp_path), recorded=True, apart=True)
    assert board["run"].iloc[[0, -1]].tolist() == ["real", "drawn"]
    assert board["board"].iloc[-1].startswith("demo data")

def test_other_data_of_the_same_kind_is_another_board(tmp_path):
    write(tmp_path, "10_lora", "all", weights=1, seed=0, fingerprint="whole")
    write(tmp_path, "10_lora", "part", weights=2, seed=0, fingerprint="half")
    assert leaderboard(collect(tmp_path), apart=True)["board"].nunique() == 2

def test_seeds_become_one_row(tmp_path):
    values = [collect(write(tmp_path, "10_lora", f"s{s}", weights=s, seed=s, rank=8).parents[1])["value"].iloc[-1] for s in range(3)]
    board = leaderboard(collect(tmp_path))
    assert len(board) == 1 and board["seeds"].item() == 3
    assert board["value"].item() == pytest.approx(100*np.mean(values)) and board["seed_sd"].item() == pytest.approx(100*np.std(values, ddof=1))

def test_nothing_in_outputs_leaves_the_record(tmp_path):
    runs = collect(tmp_path)
    assert len(runs) == len(leaderboard(runs)) == len(twins(runs)) == 0
    board = leaderboard(runs, recorded=True, apart=True)
    assert board["board"].unique().tolist() == [RECORDED, RECORDED_LATER, PUBLISHED]
    assert board.query("experiment in ('Exp2', 'Exp6')")["rank"].isna().all()
    assert "| 1 | Exp12 |" in markdown(board, runs)

def test_recorded_twins_are_found_by_their_epochs():
    epochs = record.epochs()
    assert recorded_twins(epochs)[["exp", "twin"]].values.tolist() == [["2", "6"]]
    epochs.loc[(epochs["exp"] == "6") & (epochs["epoch"] == 2), "val_map"] += .01
    assert not len(recorded_twins(epochs))

def test_five_hundred_runs(tmp_path):
    first = write(tmp_path, "10_lora", "r0", weights=0, seed=0, rank=0, clips=12_372)
    card, metrics, table = [(first/name).read_text() for name in ("params.json", "metrics.json", "history.csv")]
    parquet = (first/"predictions.parquet").read_bytes()
    for i in range(1, 500):
        folder = tmp_path/"10_lora"/f"r{i}"
        folder.mkdir()
        (folder/"params.json").write_text(card.replace('"rank": 0', f'"rank": {i}'))
        (folder/"metrics.json").write_text(metrics)
        (folder/"history.csv").write_text(table.replace("0.7", f"0.7{i}"))
        (folder/"predictions.parquet").write_bytes(parquet)
    began = time.process_time()
    runs = collect(tmp_path)
    board = leaderboard(runs, recorded=True, apart=True)
    markdown(board, runs)
    seconds = time.process_time() - began
    print(f"\n500 runs of 12,372 clips read, hashed and ranked in {seconds:.1f} s of CPU time")
    assert (runs["state"] == "scored").sum() == 500 and len(twins(runs)) == 500

def test_the_page_writes_its_tables(project):
    "On a demo run, a broken run and the record: `leaderboard.csv` and `.md`, each kind apart."
    write(project/"outputs", "10_lora", "drawn", weights=1, demo=True, seed=0)
    (write(project/"outputs", "10_lora", "broken", weights=2, seed=0)/"metrics.json").write_text("{")
    code, out = papermill(project, "40_leaderboard")
    assert code == 0, out[-3000:]
    folder, = run_folders(project, "40_leaderboard")
    board, page = pd.read_csv(folder/"leaderboard.csv"), (folder/"leaderboard.md").read_text()
    assert board["board"].str.split(" ").str[0].drop_duplicates().tolist() == ["record:", "record", "published:", "demo"]
    assert "outputs/10_lora/broken | metrics.json: " in page and "JSONDecodeError" in page and str(project) not in page
    assert {p.name for p in (folder/"figures").iterdir()} == {"leaderboard.png", "leaderboard.pdf", "cost.png", "cost.pdf"}

def test_differences_pair_settings_with_the_control(project, monkeypatch):
    monkeypatch.chdir(project)
    outputs, labels, means = project/"outputs", [f"y_{c}" for c in CRITERIA], {}
    def there(experiment, run, weights, **more):
        folder = write(outputs, experiment, run, weights=weights, seed=more.pop("seed", 0), **more)
        table = predictions(weights).assign(**predictions(1)[labels])                  # other scores of the same clips
        save(folder/"predictions.parquet", table)
        means[run] = score_cvs(table, 20)["map"]["value"]
    there("02_baseline", "plain", 1)
    for seed in (0, 1): there("10_lora", f"r8-s{seed}", 2 + seed, seed=seed, rank=8)
    there("10_lora", "r16", 4, rank=16)
    there("08_multitask", "other", 5, protocol=dict(split="val", frames="1fps"))
    table = differences(collect(outputs), ["10_lora", "08_multitask", "15_window_attention"]).set_index("run")
    assert {run: n for run, n in table["seeds"].items() if n > 0} == {"r8-s0, r8-s1": 2, "r16": 1, "other": 1}
    assert table.loc["r8-s0, r8-s1", "map"]["value"] == pytest.approx((means["r8-s0"] + means["r8-s1"])/2 - means["plain"])
    assert table.loc["r16", "map"]["value"] == pytest.approx(means["r16"] - means["plain"])
    assert table.loc["r16", "map"]["lo"] < table.loc["r16", "map"]["value"] < table.loc["r16", "map"]["hi"]
    assert "02_baseline" in table.loc["other", "missing"] and "15_window_attention" in table["missing"].iloc[-1]
    there("11_attention_supervision", "supervised", 6)
    there("11_attention_supervision/supervised", "control", 7)
    for arm in ("hybrid", "swincvs"): there("14_hybrid", arm, 8, arm=arm)
    save(outputs/"14_hybrid/swincvs/predictions.parquet", predictions(9).assign(**predictions(1)[labels]))
    runs = collect(outputs)
    own = differences(runs, ["11_attention_supervision", "10_lora"], part="control").set_index("run")
    assert own.loc["supervised", "map"]["value"] == pytest.approx(means["supervised"] - means["control"]) and own.loc["supervised", "control"] == "supervised/control"
    assert "papermill nbs/10_lora.ipynb" in own.loc["r16", "missing"]
    arms = differences(runs, ["14_hybrid -p arm hybrid"], "14_hybrid -p arm swincvs")
    assert arms["run"].tolist() == ["hybrid"] and arms["control"].tolist() == ["swincvs"] and arms["map"][0]["value"] != 0
    assert differences(runs, ["14_hybrid -p arm other"])["missing"].tolist() == ["papermill nbs/14_hybrid.ipynb outputs/14_hybrid.ipynb -p arm other"]

def test_outputs_are_found_from_any_folder(project, monkeypatch):
    write(project/"outputs", "10_lora", "r16", weights=2, seed=0, rank=16)
    for folder in (project, project/"nbs"):                       # papermill runs in the shell's folder, JupyterLab in the notebook's
        monkeypatch.chdir(folder)
        assert collect("outputs")["run"].tolist() == collect()["run"].tolist() == ["r16"]
