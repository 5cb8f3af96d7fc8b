"Metrics against the libraries that define them, and intervals against a simulation that knows the truth."
import itertools
import time

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torchmetrics.classification import MultilabelAveragePrecision

from cvslab.metrics import CRITERIA, Ranking, ap_per_criterion, estimate, multiplicities, paired_difference, rater_ceiling, score_cvs, score_oct

def sample(videos, clips, seed):
    "Clustered clips: a criterion is met in some videos only, and every video shifts the scores of all its clips."
    rng = np.random.default_rng(seed)
    video = np.repeat(np.arange(videos), clips)
    seen, shift = rng.random((videos, 3)) < .6, rng.normal(size=(videos, 3))
    y = rng.random((len(video), 3)) < .4*seen[video]
    p = 1/(1 + np.exp(-(rng.normal(size=y.shape) + 1.5*y + shift[video])))
    table = pd.DataFrame(dict(clip=np.arange(len(video)), video=video, frame=0, split="val"))
    return table.assign(**{f"y_{c}": y[:, i].astype(float) for i, c in enumerate(CRITERIA)}, **{f"p_{c}": p[:, i] for i, c in enumerate(CRITERIA)})

def targets_and_scores(table): return table[[f"y_{c}" for c in CRITERIA]].to_numpy(), table[[f"p_{c}" for c in CRITERIA]].to_numpy()

@pytest.mark.parametrize("decimals", [12, 1, 0])
def test_ap_is_the_one_of_sklearn_and_torchmetrics(decimals):
    y, p = targets_and_scores(sample(20, 40, seed=decimals))
    p = np.round(p, decimals)
    ours = [ap_per_criterion(y, p)[c] for c in CRITERIA]
    theirs = MultilabelAveragePrecision(num_labels=3, average=None, thresholds=None)(torch.tensor(p), torch.tensor(y).int())
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5)
    scores = score_cvs(sample(20, 40, seed=decimals).assign(**{f"p_{c}": p[:, i] for i, c in enumerate(CRITERIA)}), n_boot=2)
    np.testing.assert_allclose([scores[c]["value"] for c in CRITERIA], ours, rtol=1e-12)

@pytest.mark.parametrize("decimals", [12, 1])
def test_weighted_rankings_are_those_of_sklearn(decimals):
    table = sample(12, 30, seed=5)
    y, p, video = table["y_c2"], table["p_c2"].round(decimals), table["video"]
    weights = multiplicities(12, 50, seed=1)
    weights = weights[weights @ np.bincount(video, y) > 0]
    assert len(weights) > 40
    np.testing.assert_allclose(Ranking(y, p, video).ap(weights), [average_precision_score(y, p, sample_weight=w[video]) for w in weights], rtol=1e-10)
    np.testing.assert_allclose(Ranking(y, p, video).auroc(weights), [roc_auc_score(y, p, sample_weight=w[video]) for w in weights], rtol=1e-10)

def test_drawing_a_video_twice_is_the_same_as_copying_its_clips():
    table = sample(3, 20, seed=2)
    copied = pd.concat([table, table[table["video"] == 2]])
    by_weight = Ranking(table["y_c1"], table["p_c1"], table["video"]).ap(np.array([[1, 1, 2]]))
    np.testing.assert_allclose(by_weight, average_precision_score(copied["y_c1"], copied["p_c1"]))

def test_bootstrap_by_hand():
    "Three videos, all 27 ordered draws written out: values and their shares are those of the resamples."
    y, p, video = np.array([1, 0, 0, 1, 1, 0]), np.array([.9, .8, .7, .6, .5, .4]), np.array([0, 0, 1, 1, 2, 2])
    expected = {}
    for draw in itertools.product(range(3), repeat=3):
        clips = np.concatenate([np.flatnonzero(video == v) for v in draw])
        ap = round(average_precision_score(y[clips], p[clips]), 9)
        expected[ap] = expected.get(ap, 0) + 1/27
    draws = np.round(Ranking(y, p, video).ap(multiplicities(3, 20_000, seed=0))[1:], 9)
    found = {ap: share for ap, share in zip(*np.unique(draws, return_counts=True))}
    assert set(found) == set(expected)
    for ap in expected: assert found[ap]/20_000 == pytest.approx(expected[ap], abs=.012)

def test_coverage_of_resampled_videos_and_of_resampled_frames():
    "95 % intervals over 200 studies of 40 videos: resampling videos covers the truth 90 to 98 % of the time, resampling frames far less."
    truth = np.mean([ap_per_criterion(*targets_and_scores(sample(3000, 30, seed)))["map"] for seed in range(3)])
    inside = lambda score: score["map"]["lo"] <= truth <= score["map"]["hi"]
    studies = [sample(40, 30, seed) for seed in range(1000, 1200)]
    by_video = np.mean([inside(score_cvs(s, 300)) for s in studies])
    by_frame = np.mean([inside(score_cvs(s.assign(video=s["clip"]), 100)) for s in studies[:100]])
    print(f"\ncoverage of the nominal 95 % interval of mAP: {by_video:.1%} by video, {by_frame:.1%} by frame")
    assert .90 <= by_video <= .98
    assert by_frame < .80

def test_two_thousand_resamples_of_the_validation_split():
    table = sample(41, 302, seed=0)
    began = time.process_time()
    score = score_cvs(table, n_boot=2000)
    seconds = time.process_time() - began
    print(f"\n2,000 resamples of {len(table):,} clips from 41 videos, three criteria: {seconds:.2f} s of CPU time")
    assert score["map"]["lo"] < score["map"]["value"] < score["map"]["hi"]

def test_a_paired_difference_is_surer_than_two_intervals():
    table = sample(40, 30, seed=3)
    rng = np.random.default_rng(0)
    worse = table.assign(**{f"p_{c}": .9*table[f"p_{c}"] + .1*rng.random(len(table)) for c in CRITERIA})
    d = paired_difference(table, worse, 500)["map"]
    a, b = score_cvs(table, 500)["map"], score_cvs(worse, 500)["map"]
    assert d["value"] == pytest.approx(a["value"] - b["value"])
    assert a["lo"] < b["value"] < a["hi"] and d["lo"] > 0
    assert paired_difference(worse, table, 500)["map"]["hi"] == pytest.approx(-d["lo"], abs=1e-9)

def test_seeds_are_averaged_within_a_resample():
    one, two = sample(10, 30, seed=4), sample(10, 30, seed=4)
    two["p_c1"] = two["p_c1"]**.5*np.random.default_rng(1).random(len(two))
    both, alone = score_cvs([one, two], 400), [score_cvs(t, 400)["c1"]["value"] for t in (one, two)]
    assert both["c1"]["value"] == pytest.approx(np.mean(alone))
    assert both["c1"]["seed_sd"] == pytest.approx(np.std(alone, ddof=1))
    with pytest.raises(ValueError, match=r"the targets \['y_c1'\] differ"): score_cvs([one, one.assign(y_c1=1 - one["y_c1"])])

def test_what_cannot_be_computed_says_why():
    table = sample(10, 30, seed=6).assign(y_c3=0.)
    scores = score_cvs(table, 100)
    assert scores["c3"] == dict(value=None, lo=None, hi=None, chance=0, reason="no positive clip of c3")
    assert scores["map"]["reason"].startswith("mean of c1, c2")
    one_video = score_cvs(table.assign(video=1), 100)
    assert one_video["c1"]["value"] is not None and one_video["c1"]["lo"] is None and "at least two videos" in one_video["c1"]["reason"]
    only_one = sample(6, 30, seed=7)
    only_one.loc[only_one["video"] != 3, "y_c1"] = 0.
    only_one.loc[only_one.index[-1], "y_c1"] = 0.
    only_one.loc[only_one["video"] == 3, "y_c1"] = 1.
    assert "resamples left out: no positive clip of c1" in score_cvs(only_one, 200)["c1"]["reason"]

def test_a_diverged_model_is_not_scored():
    table = sample(4, 5, seed=0)
    table.loc[3, "p_c1"] = np.nan
    with pytest.raises(ValueError, match="1 of 20 rows"): score_cvs(table)

def test_multiclass_agrees_with_sklearn_and_keeps_absent_classes():
    rng = np.random.default_rng(0)
    y = rng.permutation(np.repeat(range(4), [30, 20, 15, 10]))
    logits = rng.normal(size=(75, 4)) + np.eye(4)[y]
    p = np.exp(logits)/np.exp(logits).sum(axis=1, keepdims=True)
    table = pd.DataFrame(dict(participant=range(75), split="test", y_true=y, y_pred=logits.argmax(axis=1), **{f"logit_{k}": logits[:, k] for k in range(4)}))
    scores = score_oct(table, 300)
    assert scores["auroc"]["value"] == pytest.approx(roc_auc_score(y, p, multi_class="ovr"))
    assert scores["accuracy"]["lo"] < scores["accuracy"]["value"] < scores["accuracy"]["hi"]
    without = score_oct(table[table["y_true"] != 2], 10)
    assert without["f1_2"]["value"] is None and without["balanced_accuracy"]["reason"] == "no participant of class 2"
    never_said = score_oct(table.assign(y_pred=table["y_pred"].replace(2, 0)), 10)
    assert never_said["f1_2"]["value"] == 0

def test_a_perfect_rater_has_the_ceiling_of_one():
    truth = (np.random.default_rng(0).random((60, 3)) < .4).astype(float)
    frames = pd.DataFrame(dict(split="test", video=np.repeat(range(6), 10), **{f"r{k}_{c}": truth[:, i] for k in (1, 2, 3) for i, c in enumerate(CRITERIA)}))
    ceiling = rater_ceiling(frames, n_boot=20)
    assert (ceiling.query("metric == 'f1'")["value"] == 1).all() and (ceiling["agreed"] == 1).all()
    f1 = rater_ceiling(frames.assign(r3_c1=1 - frames["r3_c1"]), n_boot=20).query("criterion == 'c1' and metric == 'f1'").set_index("rater")
    assert f1.loc[3, "value"] == 0
    assert f1.loc[1, ["n_frames", "reason"]].tolist() == [0, "the other two raters never agree"]

def test_the_interval_widens_with_fewer_clusters():
    draws = np.append(.5, np.random.default_rng(0).normal(.5, .1, 4000))
    width = lambda n: np.diff([estimate(draws, n)[k] for k in ("lo", "hi")])[0]
    assert width(5) > width(20) > width(200)
