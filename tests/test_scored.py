"What is scored decides what compares; what a model looks at is said beside it. And AP within each video."

import json
from dataclasses import asdict, fields, replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score
from test_batch import predictions, write
from test_metrics import sample

from cvslab.batch import collect, differences, leaderboard, markdown
from cvslab.core import Run, save
from cvslab.endoscapes import OFFICIAL, RECORDED, Protocol, protocol_of
from cvslab.metrics import (
    CRITERIA,
    check_comparable,
    compare,
    input_differences,
    paired_difference,
    protocol_differences,
    score_cvs,
)
from cvslab.training import compare_with, ensemble

LOOKS = dict(n_frames=5, step=2, geometry="crop", size=384, pad=20)
SCORES = dict(split="test", frames="1fps", window="centred", labels="any", leading="zero", black="drop")


def card(protocol):
    return dict(data="real", protocol=protocol.scored, input=protocol.input)


def test_a_protocol_is_what_is_scored_and_what_is_looked_at():
    assert LOOKS.keys() | SCORES.keys() == {f.name for f in fields(Protocol)}
    for protocol in (OFFICIAL, RECORDED, replace(OFFICIAL, **LOOKS)):
        assert protocol.scored.keys() == SCORES.keys() and protocol.input.keys() == LOOKS.keys()
        assert protocol.scored | protocol.input == asdict(protocol) and protocol_of(card(protocol)) == protocol


@pytest.mark.parametrize("name", LOOKS)
def test_another_input_compares(name):
    other = replace(OFFICIAL, **{name: LOOKS[name]})
    check_comparable(card(OFFICIAL), card(other))
    assert not protocol_differences(card(OFFICIAL), card(other))
    assert input_differences(card(OFFICIAL), card(other)) == {name: [getattr(OFFICIAL, name), LOOKS[name]]}


@pytest.mark.parametrize("name", SCORES)
def test_another_protocol_does_not_compare(name):
    other = replace(OFFICIAL, **{name: SCORES[name]})
    with pytest.raises(
        ValueError, match=f"not comparable \\({name}: '{getattr(OFFICIAL, name)}' against '{SCORES[name]}'"
    ):
        check_comparable(card(OFFICIAL), card(other))
    assert not input_differences(card(OFFICIAL), card(other))


def run_of(outputs, experiment, name, weights, protocol=OFFICIAL, clips=40, **params):
    "A finished run on the demo, opened; all of the same clips and labels."
    folder = write(
        outputs,
        experiment,
        name,
        weights=weights,
        demo=True,
        protocol=protocol.scored,
        looked_at=protocol.input,
        clips=clips,
        seed=0,
        **params,
    )
    labels = predictions(1, clips)[[f"y_{c}" for c in CRITERIA]]
    save(folder / "predictions.parquet", predictions(weights, clips).assign(**labels))
    return Run.open(folder)


FIVE = replace(OFFICIAL, **LOOKS)


def test_a_difference_is_paired_by_clip_whatever_was_looked_at(tmp_path):
    ours, theirs = run_of(tmp_path, "10_lora", "sixteen", 2), run_of(tmp_path, "14_hybrid", "five", 3, FIVE)
    found = compare(ours, theirs)
    assert found["input"]["n_frames"] == [16, 5] and found["n_items"] == 40
    shuffled = theirs.load("predictions.parquet").sample(frac=1, random_state=0)
    assert found["map"] == paired_difference(ours.load("predictions.parquet"), shuffled)["map"]
    assert set(ensemble(ours, [theirs])["clip"]) == set(shuffled["clip"])
    with pytest.raises(ValueError, match="window: 'causal' against 'centred'"):
        compare(ours, run_of(tmp_path, "14_hybrid", "centred", 3, replace(FIVE, window="centred")))
    with pytest.raises(ValueError, match="window"):
        ensemble(ours, [Run.open(tmp_path / "14_hybrid/centred")])
    with pytest.raises(ValueError, match="share 40 of 48 items"):
        compare(ours, run_of(tmp_path, "14_hybrid", "more", 3, FIVE, clips=48))


def test_a_page_takes_the_same_input_first_and_says_what_differs(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    outputs = project / "outputs"
    mine = run_of(outputs, "10_lora", "mine", 2)
    run_of(outputs, "14_hybrid", "centred", 4, replace(FIVE, window="centred"))
    assert compare_with(mine, "14_hybrid") is None and "no finished run of 14_hybrid" in capsys.readouterr().out
    run_of(outputs, "14_hybrid", "five", 3, FIVE)
    assert (
        "14_hybrid/five" in compare_with(mine, "14_hybrid").caption
        and "n_frames 16 against 5" in compare_with(mine, "14_hybrid").caption
    )
    run_of(outputs, "14_hybrid", "sixteen", 5)
    run_of(outputs, "14_hybrid", "newest", 6, FIVE)
    assert (
        "14_hybrid/sixteen, AP" in compare_with(mine, "14_hybrid").caption
        and "inputs differ" not in compare_with(mine, "14_hybrid").caption
    )
    run_of(outputs, "14_hybrid", "sixteen", 5, clips=48)
    assert "14_hybrid/newest" in compare_with(mine, "14_hybrid").caption


def told(run, **data):
    "The run, with other words in the card of its data."
    found = json.loads((run.dir / "params.json").read_text())
    (run.dir / "params.json").write_text(json.dumps(found | dict(data=found["data"] | data)))
    return Run.open(run.dir)


def test_masks_of_ones_own_are_for_training_and_cost_no_comparison(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    outputs = project / "outputs"
    pseudo = told(run_of(outputs, "08_multitask", "pseudo", 2), masks="aaaa00001111")
    run_of(outputs, "02_baseline", "plain", 3)
    assert "02_baseline/plain" in compare_with(pseudo, "02_baseline").caption
    others = told(run_of(outputs, "08_multitask", "other", 4), masks="bbbb00001111")
    assert "08_multitask/other" in compare_with(pseudo, "08_multitask").caption and others.scored_on(pseudo.data)
    told(Run.open(outputs / "02_baseline/plain"), fingerprint="another")
    assert compare_with(pseudo, "02_baseline") is None and "no finished run of 02_baseline" in capsys.readouterr().out


def test_a_board_ranks_runs_of_other_inputs_and_names_them(tmp_path):
    run_of(tmp_path, "10_lora", "sixteen", 2)
    run_of(tmp_path, "14_hybrid", "five", 3, FIVE)
    runs = collect(tmp_path)
    board = leaderboard(runs).set_index("run")
    assert board["board"].nunique() == 1 and sorted(board["rank"]) == [1, 2]
    assert (
        "n_frames 5, step 2, geometry crop" in board.loc["five", "input"] and "n_frames" not in board["board"].iloc[0]
    )
    assert board.loc["five", "by_video"] == pytest.approx(
        100 * Run.open(tmp_path / "14_hybrid/five").load("metrics.json")["map_by_video"]["value"]
    )
    assert "n_frames 5, step 2" in markdown(leaderboard(runs), runs)


def test_differences_take_the_control_of_the_same_input_first(project, monkeypatch):
    monkeypatch.chdir(project)
    outputs = project / "outputs"
    run_of(outputs, "10_lora", "five", 3, FIVE)
    run_of(outputs, "02_baseline", "sixteen", 2)
    row = differences(collect(outputs), ["10_lora"]).iloc[0]
    assert row["control"] == "sixteen" and "n_frames: 5, 16" in row["inputs"] and row["map"]["value"] != 0
    run_of(outputs, "02_baseline", "five", 4, FIVE)
    row = differences(collect(outputs), ["10_lora"]).iloc[0]
    assert row["control"] == "five" and row["inputs"] == ""


# AP by video ---------------------------------------------------------------------------------------------------------------


def within(table, c):
    return np.array(
        [
            average_precision_score(v[f"y_{c}"], v[f"p_{c}"]) if v[f"y_{c}"].any() else np.nan
            for _, v in table.groupby("video")
        ]
    )


@pytest.mark.parametrize("seed, decimals", [(0, 12), (1, 12), (2, 1)])
def test_ap_by_video_is_the_mean_over_videos_with_a_positive(seed, decimals):
    table = sample(12, 20, seed).round({f"p_{c}": decimals for c in CRITERIA})
    scores, each = score_cvs(table, 100), {c: within(table, c) for c in CRITERIA}
    assert any(np.isnan(v).any() for v in each.values()), "a video without a positive belongs to the case"
    for c, ap in each.items():
        assert scores[f"{c}_by_video"]["value"] == pytest.approx(np.nanmean(ap), abs=1e-12)
        prevalence = table.groupby("video")[f"y_{c}"].mean()
        assert scores[f"{c}_by_video"]["chance"] == pytest.approx(prevalence[prevalence > 0].mean())
    assert scores["map_by_video"]["value"] == pytest.approx(np.mean([np.nanmean(ap) for ap in each.values()]))
    assert scores["map_by_video"]["lo"] < scores["map_by_video"]["value"] < scores["map_by_video"]["hi"]


def test_ap_by_video_by_hand():
    "Video 0: the positive is first (AP 1). Video 1: second (AP 1/2). Video 2 has none. Pooled, the order between videos counts too."
    table = pd.DataFrame(
        dict(
            clip=range(6),
            video=[0, 0, 1, 1, 2, 2],
            split="val",
            **{f"y_{c}": [1.0, 0, 0, 1, 0, 0] for c in CRITERIA},
            **{f"p_{c}": [0.2, 0.1, 0.9, 0.8, 0.99, 0.98] for c in CRITERIA},
        )
    )
    scores = score_cvs(table, 50)
    assert scores["c1_by_video"]["value"] == pytest.approx(0.75) and scores["c1_by_video"]["chance"] == 0.5
    assert scores["c1"]["value"] == pytest.approx((1 / 4 + 2 / 5) / 2)
    assert "resamples left out" in score_cvs(table.query("video != 1"), 50)["c1_by_video"]["reason"]
    none = score_cvs(table.assign(y_c2=0.0), 50)
    assert none["c2_by_video"]["value"] is None and none["c2_by_video"]["reason"] == "no positive clip of c2"
    assert none["map_by_video"]["reason"].startswith("mean of c1, c3: no positive clip of c2")


def test_shifting_a_whole_video_moves_the_pooled_ap_alone():
    table = sample(10, 30, seed=3)
    shifted = table.assign(
        **{f"p_{c}": np.where(table["video"] == 4, table[f"p_{c}"] / 1000, table[f"p_{c}"]) for c in CRITERIA}
    )
    difference = paired_difference(table, shifted, 50)
    assert difference["map_by_video"]["value"] == pytest.approx(0, abs=1e-12) and abs(difference["map"]["value"]) > 1e-3
    assert [difference["map_by_video"][k] for k in ("lo", "hi")] == pytest.approx([0, 0], abs=1e-12)
