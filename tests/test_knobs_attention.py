"The knobs of the attention pages, each broken on purpose: the preflight stops the run. And what must be the same where a knob is at zero."
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from pages import Toy, run_page, small, toy_run

from cvslab import attention, endoscapes, objectives, training
from cvslab.core import seed_all
from cvslab.models import WindowViT, build_model
from cvslab.objectives import LossTerm, Mix, bce, has_mask
from cvslab.training import PreflightError, Recipe, cvs_scores, first_batch, fit, load_trained, predict, preflight

SUPERVISED, REGULARIZED, SCRATCH, HYBRID, WINDOWS = "11_attention_supervision", "12_regularized", "13_window_vit", "14_hybrid", "15_window_attention"

def begun(project, page, **changes):
    "A page's names just before its preflight, the run folder made."
    names = run_page(project, page, {k: v for k, v in small("a", **changes).items() if page != SCRATCH or k != "backbone"}, until="run.start(")
    names["run"].start(names["card"])
    return names

def stops(names, knob, **other):
    "The preflight of a page's model and recipe names `knob` as one that does not turn."
    with pytest.raises(PreflightError, match=knob): preflight(names["model"], names["datasets"]["train"], other.get("recipe", names["recipe"]), names["run"])

def predictions(run): return run.load("predictions.parquet").filter(like="p_").to_numpy()

# 11 ------------------------------------------------------------------------------------------------------------------------

def pair(project, **changes):
    "Predictions of a supervised run and of its control, and what the preflight said of the loss."
    names = run_page(project, SUPERVISED, small(**changes), until="plots.save_figure")
    said = {p["knob"]: p for p in names["run"].load("applied.json")["proofs"]}
    return predictions(names["run"]), predictions(names["run"].part("control")), said.get("loss attention")

def test_weight_zero_is_no_supervision_and_a_weight_is_one(project):
    ours, control, said = pair(project, name="zero", weight=0)
    assert said is None and np.array_equal(ours, control)
    ours, control, said = pair(project, name="one", weight=1., lr_lora=1e-2)
    assert said["turned"] and not np.array_equal(ours, control)

def test_recorded_loss_trains_the_control_whatever_its_weight(project):
    found = [pair(project, name=f"w{w:g}", weight=w, supervision="kl", slips=["gradient"]) for w in (.1, 1.)]
    for ours, control, said in found:
        assert np.array_equal(ours, control) and np.array_equal(ours, found[0][0])
        assert said["slip"] and not said["turned"] and "gradient lora 0, head 0" in said["seen"]

def test_term_of_weight_zero_changes_no_training(tmp_path):
    def history(name, weight):
        seed_all(0)
        model = build_model("demo", lora=dict(rank=2, targets=["q", "k"]), attention=dict(layers=[-1], supervise=True))
        term = {} if weight is None else dict(attention=LossTerm(attention.mass_loss(model), weight, applies=has_mask))
        recipe = Recipe(dict(cvs=LossTerm(bce())) | term, dict(lora=1e-2, head=3e-3), cvs_scores, context=attention.batch_masks(), epochs=2, batch_size=8, device="cpu")
        run = toy_run(tmp_path/name)
        preflight(model, Toy(24, 0), replace(recipe, losses=dict(cvs=LossTerm(bce()))), run)
        return fit(model, Toy(24, 0), Toy(12, 1), recipe, run)
    plain, zero, one = (history(str(w), w) for w in (None, 0., 1.))
    np.testing.assert_allclose(zero["train_loss"], plain["train_loss"], atol=1e-6)
    assert abs(one["val_map"] - plain["val_map"]).max() > 0 or abs(one["train_loss"] - plain["train_loss"]).min() > .1

@pytest.mark.parametrize("kind", ["mass", "kl"])
def test_detached_supervision_stops(project, monkeypatch, kind):
    loss = attention.SUPERVISION[kind]
    monkeypatch.setitem(attention.SUPERVISION, kind, lambda model: lambda outputs, batch: loss(model)(outputs, batch).detach())
    stops(begun(project, SUPERVISED, supervision=kind), "loss attention: .*gradient lora 0")

def test_supervision_without_queries_and_keys_stops(project):
    stops(begun(project, SUPERVISED, targets=["v"]), "attention supervision: .*0 in queries, 0 in keys")

def test_supervision_without_masks_stops(project, monkeypatch):
    names = begun(project, SUPERVISED)
    monkeypatch.setattr(endoscapes.FrameStore, "mask", lambda self, video, frames: np.full((len(frames), 16, 16), 255, np.uint8))
    stops(names, "are there masks in the data")

def test_undeclared_slip_stops(project):
    names = begun(project, SUPERVISED, slips=["gradient"])
    term = names["recipe"].losses["attention"]
    stops(names, "loss attention", recipe=replace(names["recipe"], losses=dict(attention=replace(term, slip=False))))

# 12 ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("masking, knob", [("mask", "attention mask"), ("bias", "attention bias"), ("tokens", "token mask")])
def test_masking_that_does_not_act_stops(project, monkeypatch, masking, knob):
    names = begun(project, REGULARIZED, masking=masking)
    with pytest.raises(RuntimeError, match="mask"):
        preflight(names["model"], names["datasets"]["train"], replace(names["recipe"], context=lambda model, batch: nullcontext()), names["run"])
    with monkeypatch.context() as patch:
        patch.setattr(attention, "token_mask", lambda classes, grid, *a: torch.ones(len(classes), grid[0]*grid[1]*grid[2]))
        stops(names, "are there masks in the data")
    attention.clear_attention(names["model"])
    stops(names, f"{knob}: .*not attached", recipe=replace(names["recipe"], context=lambda model, batch: nullcontext()))

class Still(Mix):
    def __call__(self, batch): return batch

class Unmixed(Mix):
    def __post_init__(self): object.__setattr__(self, "masks", False)

class Sharp(objectives.Augment):
    def __post_init__(self): object.__setattr__(self, "blur", 0.)

@pytest.mark.parametrize("knob, broken", [("mixing", dict(Mix=Still)), ("mixing", dict(Mix=Unmixed)), ("blur", dict(Augment=Sharp)),
                                          ("label targets", dict(bce=lambda pos_weight=None, targets=None: bce(pos_weight))),
                                          ("pos_weight", dict(bce=lambda pos_weight=None, targets=None: bce(None, targets)))])
def test_regularisation_that_does_not_act_stops(project, monkeypatch, knob, broken):
    for name, stub in broken.items(): monkeypatch.setattr(objectives, name, stub)
    with pytest.raises(PreflightError, match=f"(?m)^{knob}: "):
        run_page(project, REGULARIZED, small("a", pos_weight=[1., 5., 1.], blur=.1, erasing=.2), until="training.fit(")

def test_scores_are_those_without_masks(project):
    names = run_page(project, REGULARIZED, small("a", masking="bias", attention_bias=8.), until="diagnostics.before_after")
    run, val, recipe = names["run"], names["datasets"]["val"], names["recipe"]
    model = load_trained(run)
    attention.clear_attention(model)
    y, logits = predict(model, val, recipe)
    np.testing.assert_allclose(predictions(run), 1/(1 + np.exp(-logits)), atol=1e-6)
    assert "oracle" not in run.load("metrics.json") and (run.dir/"oracle.csv").exists()
    given = build_model(**model.spec | dict(attention=model.spec["attention"] | dict(always=True)))
    given.load_state_dict(load_trained(run).state_dict())
    assert abs(predict(given, val, recipe, context=recipe.context)[1] - logits).max() > 1e-5

# 13, 14, 15 ----------------------------------------------------------------------------------------------------------------

def no_time(model): model.backbone.over_time.clear()
def no_drop(model):
    for layer in model.backbone.layers: layer.drop_path = torch.nn.Identity()
def wider(model): model.backbone.layers = WindowViT(size=64, dim=48, layers=4, heads=3, window=4).layers

@pytest.mark.parametrize("knob, broken", [("temporal mixing", no_time), ("drop path", no_drop), ("windows", wider)])
def test_windowed_vit_that_is_another_stops(project, knob, broken):
    names = begun(project, SCRATCH)
    broken(names["model"])
    stops(names, f"(?m)^{knob}: ")

def test_time_that_was_not_asked_for_stops(project):
    names = begun(project, SCRATCH, temporal=0)
    names["model"].backbone = WindowViT(size=64, dim=48, layers=4, heads=3, window=2, drop_path=.05, temporal=2)
    stops(names, "temporal mixing: asked attention over time in 0 of 4 layers; seen 2 layers")

def test_frame_encoder_that_stays_frozen_stops(project):
    names = begun(project, HYBRID)
    names["model"].backbone.frames.requires_grad_(False)
    stops(names, "frame encoder: asked trained; seen 0 of")

def test_second_head_without_a_gradient_stops(project):
    names = begun(project, HYBRID, arm="swincvs", auxiliary=[.8], n_frames=5, clip_norm=5.)     # as published; the LSTM takes an odd number
    preflight(names["model"], names["datasets"]["train"], names["recipe"], names["run"])
    assert names["recipe"].clip_norm == 5
    dead = LossTerm(lambda outputs, batch: bce()(dict(logits=outputs["auxiliary"].detach()), batch), .8)
    stops(names, "loss auxiliary", recipe=replace(names["recipe"], losses=dict(auxiliary=dead)))

def test_second_head_needs_a_token_a_frame(project):
    with pytest.raises(ValueError, match="leave auxiliary out"): begun(project, HYBRID, auxiliary=[.8])

def test_window_that_is_the_grid_stops(project):
    stops(begun(project, WINDOWS, window=[0, 0, 0], shift=False), "attention window: .*32 of 32 keys")

def test_window_that_was_taken_off_stops(project):
    names = begun(project, WINDOWS)
    attention.clear_attention(names["model"])
    stops(names, "attention window: asked in the model; seen not attached")

def test_window_that_does_not_divide_the_grid_is_named(project):
    with pytest.raises(ValueError, match=r"a window of 3 rows does not divide 4: choose from \[1, 2, 4\]"): begun(project, WINDOWS, window=[0, 3, 3])

@pytest.mark.parametrize("page, table, until", [(HYBRID, "attention.csv", "training.compare_with"), (SCRATCH, "pooler.csv", "training.compare_with")])
def test_before_is_the_model_that_was_trained(project, page, table, until):
    values = small("a", lr_backbone=1e-12, lr_head=1e-12, flip=0)
    names = run_page(project, page, {k: v for k, v in values.items() if page != SCRATCH or k != "backbone"}, until=until)
    seen = names["run"].load(table)
    assert len(seen) > 3
    np.testing.assert_allclose(seen["after"], seen["before"], atol=1e-6, rtol=1e-5)

def test_masked_tokens_of_the_windowed_vit_act_in_training_alone(project):
    names = begun(project, SCRATCH, token_mask=True)
    model, recipe, val = names["model"], names["recipe"], names["datasets"]["val"]
    masked = first_batch(names["datasets"]["train"], replace(recipe, losses=dict(mask=LossTerm(None, applies=has_mask))))
    model.eval()
    with torch.no_grad():
        plain = model(masked["video"])["logits"]
        with recipe.context(model, masked): held = model(masked["video"])["logits"]
    told = (masked["mask"] != 255).flatten(1).any(1)
    assert (held - plain)[told].abs().max() > 1e-6 and torch.equal(held[~told], plain[~told])
    np.testing.assert_array_equal(predict(model, val, recipe)[1], predict(model, val, replace(recipe, context=lambda model, batch: nullcontext()))[1])
