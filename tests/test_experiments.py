"What the record's experiments really did, run again: a weighting that never was, stages, several tasks."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from pages import Toy, page_file, run_page, small, toy_run

from cvslab.batch import collect, twins
from cvslab.core import seed_all
from cvslab.models import build_model, load_backbone
from cvslab.objectives import Augment, LossTerm, bce, compose, has_mask, random_flip, segmentation
from cvslab.pretraining import Blocks, Pretrainer, following, guided, jepa_loss, random_backbone, skill
from cvslab.training import PreflightError, Recipe, cvs_scores, fit, load_last, predict, preflight

def test_recorded_c2_weighting_is_a_twin_of_the_baseline(project):
    for name, page, file, change in (("plain", "02_baseline", "02.recorded", {}), ("asked", "06_c2_weighted", "06.recorded", {}),
                                     ("weighted", "06_c2_weighted", "06.recorded", dict(slips=[]))):
        run_page(project, page, page_file(file) | small(name) | change, until="training.compare_with")
    found = twins(collect(project/"outputs"))
    assert sorted(found["folder"].str.split("/").str[-1]) == ["asked", "plain"]
    assert set(found["same"]) == {"predictions and history"} and "pos_weight [1.0, 5.0, 1.0]" in found["differs"].str.cat()

# stages and several tasks --------------------------------------------------------------------------------------------------

LOSSES = dict(cvs=LossTerm(bce([1, 3, 1])), seg=LossTerm(segmentation(), weight=.5, applies=has_mask))
HEADS = Recipe(LOSSES, dict(head=3e-3), cvs_scores, transform=compose(random_flip(), Augment(rotation=15, brightness=.3, erasing=.2)),
               epochs=2, batch_size=8, micro_batch=4, warmup_epochs=.5, device="cpu")
UPPER = replace(HEADS, lr=dict(backbone=1e-3, head=1e-3))

def model_of(layers=0):
    seed_all(0)
    return build_model("demo", decoder=True, unfrozen=dict(layers=layers) if layers else None)

def trained(folder, recipe, layers, start=None):
    "Preflight and fit as a page does them, from the weights `start`: history and model."
    model, run = model_of(layers), toy_run(folder)
    if start: model.load_state_dict(start)
    preflight(model, Toy(24, 0), recipe, run)
    return fit(model, Toy(24, 0), Toy(12, 1), recipe, run), model

def staged(folder):
    first, heads = trained(folder/"stage1", HEADS, 0)
    second, model = trained(folder/"stage2", UPPER, 1, heads.state_dict())
    return pd.concat([first, second]), model

def multitask(folder): return trained(folder/"one", UPPER, 2)

def pretrained(folder, epochs=2):
    "Pretraining from random weights as page 17 does it: history, and the model of the last epoch with its target."
    seed_all(0)
    model, run = Pretrainer(load_backbone(str(random_backbone("demo", 0, folder/"start"))), (Blocks(3, .15), Blocks(1, .5))), toy_run(folder/"one")
    recipe = Recipe(dict(jepa=LossTerm(jepa_loss)), dict(backbone=5e-3), skill, monitor="skill", transform=random_flip(), context=guided(.5), after_step=following(.9),
                    epochs=epochs, patience=epochs, batch_size=4, micro_batch=2, warmup_epochs=.5, device="cpu")
    preflight(model, Toy(24, 0), recipe, run)
    history = fit(model, Toy(24, 0), Toy(12, 1), recipe, run)
    load_last(model, run)
    return history, model

@pytest.mark.parametrize("experiment,cuts", [(multitask, (30, 80)), (staged, (40, 70, 90)), (pretrained, (20, 75))], ids=["multitask", "staged", "pretraining"])
def test_cut_and_continued_is_unbroken(experiment, cuts, tmp_path):
    history, model = experiment(tmp_path/"unbroken")
    broken = 0
    for Toy.cut in (*cuts, 10**9):
        try: again, other = experiment(tmp_path/"cut")
        except KeyboardInterrupt: broken += 1
    assert broken == len(cuts), "the cuts must fall inside the training"
    pd.testing.assert_frame_equal(again, history, check_exact=True)
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values()): assert torch.equal(a, b), name

def test_pretraining_predicts_better_than_a_constant(tmp_path):
    history, model = pretrained(tmp_path, epochs=5)
    assert history["constant"].min() > .3 and history["val_skill"].iloc[0] < 0 < history["val_skill"].iloc[-1]
    assert not all(torch.equal(a, b) for a, b in zip(model.target.parameters(), model.backbone.encoder.parameters()))

def test_second_stage_at_rate_zero_is_the_first(tmp_path):
    _, first = trained(tmp_path/"stage1", HEADS, 0)
    second, still = model_of(1), replace(UPPER, lr=dict(backbone=0., head=0.), train_scores="running")
    second.load_state_dict(first.state_dict())
    with pytest.raises(PreflightError, match="train backbone: asked learning rate 0"): preflight(second, Toy(24, 0), still, toy_run(tmp_path/"stage2"))
    with pytest.raises(RuntimeError, match="preflight of .* failed"): fit(second, Toy(24, 0), Toy(12, 1), still, toy_run(tmp_path/"stage2"))
    preflight(second, Toy(24, 0), UPPER, toy_run(tmp_path/"stage2"))
    fit(second, Toy(24, 0), Toy(12, 1), still, toy_run(tmp_path/"stage2"))
    assert np.array_equal(predict(first, Toy(12, 1), HEADS)[1], predict(second, Toy(12, 1), HEADS)[1])
    _, moved = trained(tmp_path/"moved", UPPER, 1, first.state_dict())
    assert not np.array_equal(predict(first, Toy(12, 1), HEADS)[1], predict(moved, Toy(12, 1), HEADS)[1])
