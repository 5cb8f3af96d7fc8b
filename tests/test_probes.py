"V-JEPA 2's official probe as Meta runs it: how it begins, and twenty of them at once, each as if it were alone."

import copy
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from pages import Toy, run_page, small, toy_run
from torch import nn

from cvslab import models, probes, training
from cvslab.core import ParameterError, seed_all
from cvslab.models import build_model, official_proof
from cvslab.objectives import LossTerm, bce
from cvslab.probes import ProbeGrid, grid_recipe, grid_table
from cvslab.training import PreflightError, Recipe, cvs_scores, fit, load_trained, predict, preflight

# how it begins -------------------------------------------------------------------------------------------------------------


def test_it_begins_as_metas_does():
    seed_all(0)
    model = build_model("demo", pooler="official")
    pooler, blocks = model.pooler, list(model.pooler.self_attention_layers)
    scaled = {
        f"{i}.{name}": (layer, 0.02 / math.sqrt(2 * (i + 1)))
        for i, b in enumerate(blocks)
        for name, layer in (("out", b.self_attn.out_proj), ("fc2", b.mlp.fc2))
    }
    scaled["cross.fc2"] = (pooler.cross_attention_layer.mlp.fc2, 0.02 / math.sqrt(6))  # numbered as the last block
    for name, (layer, deviation) in scaled.items():
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.06), name
    plain = [
        m for m in pooler.modules() if isinstance(m, nn.Linear) and all(m is not layer for layer, _ in scaled.values())
    ]
    assert len(blocks) == 3 and len(plain) == 3 * 4 + 4
    for layer in plain:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.06)
    assert {m.eps for m in pooler.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert all(
        (m.bias == 0).all() for m in pooler.modules() if isinstance(m, nn.Linear)
    ) and pooler.query_tokens.std().item() == pytest.approx(0.02, rel=0.3)
    assert [type(m) for m in model.head] == [nn.Linear] and model.head[
        0
    ].bias.abs().max() > 0  # torch's own initialisation


def test_the_head_with_two_layers_is_another_pooler():
    model = build_model("demo", pooler="official_mlp")
    assert [m.out_features for m in model.head if isinstance(m, nn.Linear)] == [512, 3] and {
        m.eps for m in model.pooler.modules() if isinstance(m, nn.LayerNorm)
    } == {1e-6}
    assert not official_proof(model).turned
    with pytest.raises(ValueError, match="one linear layer: leave hidden out, or choose pooler 'official_mlp'"):
        build_model("demo", pooler="official", hidden=512)
    assert (
        build_model("demo", pooler="official", hidden=0).spec["hidden"]
        == build_model("demo", pooler="official").spec["hidden"]
        == 0
        and build_model("demo").spec["hidden"] == 512
    )


def unscaled(model):
    [layer.weight.data.mul_(math.sqrt(2 * i)) for layer, i in models._residual_projections(model.pooler)]


def by_one(model):
    [layer.weight.data.mul_(math.sqrt(2)) for layer, i in models._residual_projections(model.pooler)]


def eps(model):
    [setattr(m, "eps", 1e-6) for m in model.pooler.modules() if isinstance(m, nn.LayerNorm)]


def deeper(model):
    model.head = models.mlp_head(96)


def mean(model):
    model.pooler = models.MeanPooler()


def last_block(model):
    model.pooler.cross_attention_layer.mlp.fc2.weight.data.mul_(math.sqrt(6 / 8))


@pytest.mark.parametrize("broken", [unscaled, by_one, eps, deeper, last_block, mean])
def test_another_beginning_is_seen(broken):
    seed_all(0)
    model = build_model("demo", pooler="official")
    assert official_proof(model).turned
    broken(model)
    assert not official_proof(model).turned


# many at once --------------------------------------------------------------------------------------------------------------

RATES, DECAYS = [3e-3, 1e-3], [0.01, 0.8]
PLAIN = Recipe(
    dict(cvs=LossTerm(bce())),
    dict(head=1e-3),
    cvs_scores,
    epochs=3,
    batch_size=8,
    warmup_epochs=0,
    floor=0.0,
    device="cpu",
)


def grid_of(n=4, seed=0):
    seed_all(seed)
    return ProbeGrid(build_model("demo", pooler="official"), n)


def trained(grid, how, folder):
    run = toy_run(folder)
    preflight(grid, Toy(16, 0), how, run)
    return fit(grid, Toy(16, 0), Toy(12, 1), how, run)


def test_each_probe_of_a_grid_is_what_it_would_be_alone(tmp_path):
    grid, how = grid_of(), grid_recipe(PLAIN, RATES, DECAYS)
    alone = []
    for i, (decay, rate) in enumerate((d, r) for d in DECAYS for r in RATES):
        model = build_model("demo", pooler="official")
        model.pooler, model.head = (copy.deepcopy(m) for m in grid.probes[i])
        recipe, run = (
            replace(PLAIN, lr=dict(head=rate), weight_decay=decay, clip_norm=math.inf, reported="last", patience=3),
            toy_run(tmp_path / f"alone{i}"),
        )
        preflight(model, Toy(16, 0), recipe, run)
        alone.append((fit(model, Toy(16, 0), Toy(12, 1), recipe, run), model))
    history = trained(grid, how, tmp_path / "grid")
    for i, (own, model) in enumerate(alone):
        for name, a in model.pooler.state_dict().items():
            torch.testing.assert_close(grid.probes[i][0].state_dict()[name], a, atol=2e-6, rtol=1e-4)
        np.testing.assert_allclose(history[f"probe{i}"].astype(float), own["val_map"], atol=1e-6)
    best = history[[f"probe{i}" for i in range(4)]].astype(float)
    np.testing.assert_allclose(history["val_map"], best.max(axis=1))
    assert (history["probe"] == best.to_numpy().argmax(1)).all()


def test_a_probe_that_diverges_leaves_the_others_alone(tmp_path):
    plain, wild = grid_of(), grid_of()
    calm = trained(plain, grid_recipe(PLAIN, RATES, DECAYS), tmp_path / "calm")
    how = grid_recipe(PLAIN, RATES, DECAYS)
    with torch.no_grad():
        wild.probes[2][1][0].weight.fill_(float("nan"))
    run = toy_run(tmp_path / "wild")
    run.save("applied.json", dict(proofs=[]))
    history = fit(wild, Toy(16, 0), Toy(12, 1), how, run)
    for i in (0, 1, 3):
        np.testing.assert_allclose(history[f"probe{i}"].astype(float), calm[f"probe{i}"].astype(float))
    assert history["probe2"].isna().all() and (history["probe"] != 2).all() and np.isfinite(history["train_loss"]).all()
    table = grid_table(history, RATES, DECAYS)
    assert not table["chosen"][2] and table["chosen"].sum() == 1 and np.isnan(table["val_map"][2])
    with pytest.raises(ValueError, match="every probe diverged"):
        grid_table(history.assign(**{f"probe{i}": None for i in range(4)}), RATES, DECAYS)


def test_a_grid_that_is_cut_and_continued_is_unbroken(tmp_path):
    history = trained(whole := grid_of(), how := grid_recipe(PLAIN, RATES, DECAYS), tmp_path / "whole")
    for Toy.cut in (70, 10**9):
        try:
            again = trained(other := grid_of(), how, tmp_path / "cut")
        except KeyboardInterrupt:
            assert Toy.cut < 0
    pd.testing.assert_frame_equal(again, history, check_exact=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), other.state_dict().values()))


def test_what_a_grid_cannot_be_is_named():
    with pytest.raises(ValueError, match="a frozen backbone: this one learns"):
        ProbeGrid(build_model("demo", pooler="official", lora=dict(rank=2)), 2)
    with pytest.raises(ValueError, match="choose fp32 or bf16"):
        grid_recipe(replace(PLAIN, precision="fp16"), RATES, DECAYS)


# on the page ---------------------------------------------------------------------------------------------------------------

IDEAS = "18_ideas"
GRID = dict(rank=0, pooler="official", grid_lr=RATES, grid_decay=DECAYS, epochs=2, warmup_epochs=0, floor=0.0)


def one_rate(recipe, lr, decay, make=probes.grid_recipe):
    return replace(make(recipe, lr, decay), lr=dict.fromkeys(make(recipe, lr, decay).lr, 1e-3))


def one_decay(recipe, lr, decay, make=probes.grid_recipe):
    return replace(make(recipe, lr, decay), weight_decay=0.05)


def cut(recipe, lr, decay, make=probes.grid_recipe):
    return replace(make(recipe, lr, decay), clip_norm=1.0)


def one_start(model, made=probes._begun):
    seed_all(5)
    return made(model)


FROM_TRANSFORMERS = models.POOLERS | dict(
    official=lambda dim, heads, classes: models._transformers_probe(dim, heads, layer_norm_eps=1e-5)
)


def floor(optimizer, recipe, steps, schedule=training._schedule):
    return schedule(optimizer, replace(recipe, floor=0.01), steps)


BROKEN = {  # what is broken: where, under which name, by what, and what the preflight says
    "one rate": (
        probes,
        "grid_recipe",
        one_rate,
        "grid: asked 4 probes, rates 0.003 0.001 x decays 0.01 0.8, none cut by another's gradient; seen 4 probes, rates 0.001 x decays 0.01 0.8",
    ),
    "one decay": (probes, "grid_recipe", one_decay, "seen 4 probes, rates 0.003 0.001 x decays 0.05"),
    "cut together": (probes, "grid_recipe", cut, "gradients cut together"),
    "one start": (probes, "_begun", one_start, "1 different starts"),
    "one probe": (
        probes.ProbeGrid,
        "__init__",
        lambda self, model, n, init=probes.ProbeGrid.__init__: init(self, model, 1),
        "grid: asked 4 probes",
    ),
    "another initialisation": (
        probes,
        "POOLERS",
        FROM_TRANSFORMERS,
        "official probe: asked eps 1e-05; residual projections 14.1 14.1 10.0 10.0 8.2 8.2 8.2 thousandths",
    ),
    "a cosine that stops above 0": (
        training,
        "_schedule",
        floor,
        "schedule: asked a warm-up of 0 epochs, a cosine to 0 of the peak",
    ),
}


def begun(project, name, until="training.estimate", **change):
    return run_page(project, IDEAS, small(name) | GRID | change, until=until)


@pytest.mark.parametrize("knob", BROKEN)
def test_a_broken_grid_stops_the_run(knob, scratch, monkeypatch):
    where, name, broken, says = BROKEN[knob]
    monkeypatch.setattr(where, name, broken)
    with pytest.raises(PreflightError) as stopped:
        begun(scratch, knob.replace(" ", "-"))
    assert says in str(stopped.value)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(grid_decay=[]), "grid_lr and grid_decay are the two sides"),
        (dict(grid_lr=[]), "grid_lr and grid_decay are the two sides"),
        (dict(grid_lr=[1e-3, 3e-4, 1e-3]), "has a value twice"),
        (dict(grid_decay=[0.1, 0.1]), "has a value twice"),
        (dict(pooler="attention"), "pass -p pooler official"),
        (dict(pooler="official_mlp"), "pass -p pooler official"),
        (dict(rank=8), "pass -p rank 0"),
        (dict(mirrored=True), "leave out what changes pixels"),
        (dict(grid_lr=[0.0]), "greater than 0"),
    ],
)
def test_a_grid_that_would_turn_nothing_is_an_error(scratch, change, says):
    with pytest.raises(ParameterError, match=says):
        begun(scratch, "inert", **change)


def test_the_best_probe_becomes_the_run(scratch, monkeypatch):
    names = begun(scratch, "best", until="diagnostics.before_after")
    monkeypatch.chdir(scratch)
    run, result, table = names["run"], names["result"], names["run"].load("grid.csv")
    assert (
        len(table) == 4
        and table["chosen"].sum() == 1
        and table.loc[table["chosen"], "val_map"].item()
        == table["val_map"].max()
        == pytest.approx(result["map"]["value"], abs=2e-3)
    )
    assert table[["lr", "weight_decay"]].values.tolist() == [[r, d] for d in DECAYS for r in RATES]
    assert (result["reported"], result["best_epoch"]) == ("last", 2) and run.load("history.csv")["val_map"].iloc[
        -1
    ] == pytest.approx(table["val_map"].max())
    again = load_trained(run)
    y, logits = predict(again, names["datasets"]["val"], names["recipe"])  # of pixels, not of kept tokens
    told = run.load("predictions.parquet")[["p_c1", "p_c2", "p_c3"]].to_numpy()
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), told, atol=2e-3)
