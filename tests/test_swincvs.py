"SwinCVS: each line of its published recipe broken on purpose, its two stages, its weights, and a run of another page beside it."

import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pages import Toy, run_page, small, toy_run
from transformers import Swinv2Config, Swinv2Model

from cvslab import models, runner, training
from cvslab.core import ParameterError
from cvslab.demo import draw_endoscapes
from cvslab.objectives import LossTerm, bce
from cvslab.training import PreflightError, Recipe, cvs_scores, fit, load_trained, predict, preflight, report

PAGE = "14_hybrid"
PUBLISHED = dict(
    arm="swincvs",
    n_frames=5,
    epochs=8,
    patience=8,
    warmup_epochs=0,
    floor=1.0,
    flip=0.0,
    drop_path=0.2,
    pixels="swincvs",
    geometry="crop",
    reported="last",
    auxiliary=[0.8] * 5 + [0.76, 0.72, 0.68],
    lr_backbone=1e-5,
    lr_auxiliary=1e-5,
    lr_head=1e-3,
    weight_decay=0.02,
    class_weight=[3.2, 4.46, 2.8],
    clip_norm=5.0,
    batch_size=4,
)


def instead(function, **change):
    return lambda *args, **kwargs: function(*args, **kwargs | change)


def one_rate(name, group=models.group_of):
    return "head" if group(name) == "auxiliary" else group(name)


def as_in_the_first(self, epoch, at=Recipe.at):
    return at(self, 1)


def as_imagenet(self, video, forward=models.Normalise.forward):
    return video if video.is_floating_point() else (video.float() - self.mean.flip(0)) / self.std.flip(0)


def unstretched(self, video):
    return video if video.is_floating_point() else (video.float() - self.mean) / self.std


def imagenet_order(self, video):
    if video.is_floating_point():
        return video
    x = as_imagenet(self, video)
    low, high = x.amin((-3, -2, -1), keepdim=True), x.amax((-3, -2, -1), keepdim=True)
    return (x - low) / (high - low)


def by_clip(self, video):
    if video.is_floating_point():
        return video
    x = (video.float() - self.mean) / self.std
    return (x - x.amin()) / (x.amax() - x.amin())


def unseen(self, video, encode=models.VideoClassifier.encode):
    return encode(self, video if video.is_floating_point() else 255 - video)


def cosine(optimizer, recipe, steps, schedule=training._schedule):
    return schedule(optimizer, dataclasses.replace(recipe, floor=0.01), steps)


def warm(optimizer, recipe, steps, schedule=training._schedule):
    return schedule(optimizer, dataclasses.replace(recipe, warmup_epochs=1), steps)


def alike(swin, rate):
    return models.nn.Module.apply(
        swin, lambda m: setattr(m, "drop_path", models.Swinv2DropPath(rate)) if hasattr(m, "drop_path") else None
    )


def never(self, x):
    return x


BROKEN = {  # knob: where it is broken, under which name, by what, and what the preflight says
    "shares stay": (
        Recipe,
        "at",
        as_in_the_first,
        "loss shares: asked own head / LSTM by epoch: 0.80/0.20 0.80/0.20 0.80/0.20 0.80/0.20 0.80/0.20 0.76/0.24 0.72/0.28 0.68/0.32; seen 0.80/0.20",
    ),
    "LSTM counts whole": (
        training,
        "Recipe",
        lambda losses, lr, recipe=Recipe, **kwargs: recipe(
            losses | dict(cvs=dataclasses.replace(losses["cvs"], weight=1.0)), lr, **kwargs
        ),
        "loss shares: ",
    ),
    "own head at the rate of the LSTM": (
        training,
        "Recipe",
        lambda losses, lr, recipe=Recipe, **kwargs: recipe(losses, lr | dict(auxiliary=1e-3), **kwargs),
        "rates: asked backbone 1e-05, auxiliary 1e-05, head 0.001; decay 0.02; seen backbone 1e-05, head 0.001, auxiliary 0.001",
    ),
    "own head in the group of the LSTM": (
        models,
        "group_of",
        one_rate,
        "train auxiliary: asked learning rate 1e-05; seen 0 parameters",
    ),
    "another decay": (
        training,
        "Recipe",
        lambda losses, lr, recipe=Recipe, **kwargs: recipe(losses, lr, **kwargs | dict(weight_decay=0.05)),
        "rates: asked backbone 1e-05, auxiliary 1e-05, head 0.001; decay 0.02; seen",
    ),
    "gradient never cut": (
        training,
        "_cut",
        lambda optimizer, recipe: None,
        "gradient norm: asked at most 5; seen 50 of 50",
    ),
    "gradient cut elsewhere": (
        training,
        "Recipe",
        lambda losses, lr, recipe=Recipe, **kwargs: recipe(losses, lr, **kwargs | dict(clip_norm=1.0)),
        "gradient norm: asked at most 5; seen 1 of 50",
    ),
    "rates fall": (training, "_schedule", cosine, "schedule: asked constant; seen 1 of the peak at first"),
    "rates warm up": (training, "_schedule", warm, "schedule: asked constant; seen 0 of the peak at first"),
    "channels in ImageNet's order": (
        models.Normalise,
        "forward",
        imagenet_order,
        "pixels: asked ",
    ),
    "not from 0 to 1": (models.Normalise, "forward", unstretched, "pixels: asked "),
    "from 0 to 1 a clip": (models.Normalise, "forward", by_clip, "pixels: asked "),
    "pixels that are not those": (models.VideoClassifier, "encode", unseen, "pixels: asked "),
    "the best epoch": (
        training,
        "Recipe",
        instead(Recipe, reported="best"),
        "epoch reported: asked the last, whatever val says; seen the best on val",
    ),
    "stopped early": (
        training,
        "Recipe",
        instead(Recipe, patience=3),
        "epoch reported: asked the last, whatever val says; seen the last, whatever val says; a patience of 3 may stop before epoch 8",
    ),
    "drop path of the file": (
        models,
        "set_drop_path",
        lambda swin, rate: swin,
        "drop path: asked 0 to 0.2; seen 0 to 0.1",
    ),
    "all layers dropped alike": (models, "set_drop_path", alike, "drop path: asked 0 to 0.2; seen 0.2 to 0.2"),
    "drop path that drops nothing": (
        models.Swinv2DropPath,
        "forward",
        never,
        "drop path: asked 0 to 0.2; seen 0 to 0.2 in 5 layers, which training never skips",
    ),
}


def begun(project, **change):
    return run_page(project, PAGE, small("swincvs") | PUBLISHED | change, until="training.estimate")


@pytest.mark.parametrize("knob", BROKEN)
def test_a_broken_line_of_the_recipe_stops_the_run(knob, scratch, monkeypatch):
    where, name, broken, says = BROKEN[knob]
    monkeypatch.setattr(where, name, broken)
    with pytest.raises(PreflightError) as stopped:
        begun(scratch, name="".join(c if c.isalnum() else "-" for c in knob))
    assert says in str(stopped.value)


def test_scaled_half_precision_is_proven_by_value(scratch, monkeypatch):
    proofs = {
        p["knob"]: p
        for p in begun(scratch, name="half", precision="fp16", max_clips=8)["run"].load("applied.json")["proofs"]
    }
    assert proofs["precision"]["seen"] == "logits in float16, the loss is scaled" and all(
        p["turned"] for p in proofs.values()
    )
    monkeypatch.setattr(training, "_scaler", lambda acc, recipe: torch.amp.GradScaler("cpu", enabled=False))
    with pytest.raises(PreflightError, match="precision: asked fp16; seen logits in float16, the loss is not scaled"):
        begun(scratch, name="unscaled", precision="fp16", max_clips=8)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(arm="frames", auxiliary=[]), "n_frames is 5: pass -p n_frames 1"),
        (dict(arm="hybrid"), "leave auxiliary out"),
        (dict(arm="hybrid", auxiliary=[], save_frames="weights/x"), "no whole SwinV2"),
        (dict(train_frames=False, save_frames="weights/x"), "a frozen SwinV2 is the one it was"),
        (dict(frames="weights/x", save_frames="weights/x"), "the folder that frames is read from"),
        (dict(frames="./weights/x", save_frames="weights/x"), "the folder that frames is read from"),
        (dict(pixels="bgr"), "Input should be 'imagenet' or 'swincvs'"),
        (dict(reported="first"), "Input should be 'best' or 'last'"),
        (dict(auxiliary=[1.2]), "less than or equal to 1"),
    ],
)
def test_what_cannot_be_honoured_is_named(scratch, change, says):
    with pytest.raises(ParameterError, match=says):
        begun(scratch, **change)


def test_a_folder_of_something_else_is_not_written_over(scratch, monkeypatch):
    monkeypatch.chdir(scratch)
    (scratch / "notes").mkdir()
    (scratch / "notes/mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="save_frames 'notes' holds mine.txt"):
        begun(scratch, save_frames="notes")
    shutil.copytree(models.DEMO_BACKBONE, scratch / "weights/jepa", ignore=shutil.ignore_patterns("README.md"))
    with pytest.raises(ValueError, match="save_frames 'weights/jepa' holds a model that was not written there by a run"):
        begun(scratch, save_frames="weights/jepa")


def test_runs_of_a_study_that_would_write_one_folder_are_refused():
    file, here = "14.swincvs_frames.yaml", dict(data="demo", frames="demo")
    with pytest.raises(ParameterError, match="-s1 and .*-s0 both write save_frames='weights/swincvs_frames'"):
        runner.plan([file], seeds=(0, 1), values=here)
    assert len(runner.plan([file], seeds=(0,), values=here)) == 1
    assert len(runner.plan([file], seeds=(0, 1), values=here | dict(save_frames=""))) == 2


# the two stages --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stages(scratch):
    "Both stages of the frozen form, in two runs of the page, on a tiny tree."
    draw_endoscapes(scratch / "tree", videos=(5, 2, 2), seconds=(20, 24), workers=1)
    course = PUBLISHED | dict(data="tree", epochs=2, patience=2, max_clips=0)
    first = run_page(
        scratch,
        PAGE,
        small("one")
        | course
        | dict(
            arm="frames",
            n_frames=1,
            auxiliary=[],
            save_frames="weights/frames",
            lr_head=1e-3,
            lr_backbone=1e-3,
            reported="best",
        ),
    )
    second = run_page(
        scratch,
        PAGE,
        small("two") | course | dict(frames="weights/frames", train_frames=False, auxiliary=[]),
        until="diagnostics.before_after",
    )
    return first, second


def test_the_frozen_form_trains_in_two_runs(scratch, stages, monkeypatch):
    monkeypatch.chdir(scratch)
    (first, second), folder = stages, scratch / "weights/frames"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    kept = load_trained(first["run"]).backbone.frames.state_dict()  # of the best epoch
    under = second["model"].backbone.frames
    assert all(torch.equal(t, kept[n]) for n, t in under.state_dict().items()) and not any(
        p.requires_grad for p in under.parameters()
    )
    random = Swinv2Model(Swinv2Config(**models.DEMO_FRAMES))
    assert type(random).from_pretrained(folder).config.pixels == "swincvs"  # an ordinary transformers folder
    result = second["result"]
    assert (result["reported"], result["best_epoch"], result["input"]["n_frames"]) == ("last", 2, 5) and first[
        "result"
    ]["input"]["n_frames"] == 1
    assert result["protocol"] == first["result"]["protocol"]


def test_a_frame_encoder_keeps_the_pixels_it_was_trained_on(scratch, stages, monkeypatch):
    monkeypatch.chdir(scratch)
    for kind in ("swin", "hybrid"):
        with pytest.raises(ValueError, match="was trained on pixels 'swincvs': pass pixels 'swincvs', not 'imagenet'"):
            more = dict(layers=2) if kind == "hybrid" else {}
            models.build_model(dict(kind=kind, frames="weights/frames") | more, pixels="imagenet")
    told = models.build_model(dict(kind="swin", frames="weights/frames"))                # not asked for: as it was trained
    assert told.normalise.stretched
    models.save_frames(told, "weights/again")
    assert models.build_model(dict(kind="swin", frames="weights/again")).normalise.stretched
    hybrid = models.build_model(
        dict(kind="hybrid", frames="weights/frames", layers=2, train_frames=False), pixels="swincvs"
    )
    assert hybrid.backbone.frames.training is False and not hybrid.train().backbone.frames.training
    assert (
        models.build_model(
            dict(kind="swin", frames="weights/frames", train_frames=False, drop_path=0.2), pixels="swincvs"
        )
        .train()
        .backbone.frames.training
    )
    with pytest.raises(ValueError, match="a Hybrid has no whole SwinV2 to save"):
        models.save_frames(hybrid, "weights/other")


def test_lora_against_swincvs_is_a_paired_difference(scratch, stages, capsys):
    "On the same clips, sixteen squeezed frames against five cut ones."
    _, second = stages
    lora = run_page(
        scratch,
        "10_lora",
        dict(data="tree", epochs=1, batch_size=8, n_frames=16, name="lora"),
        until="training.compare_with",
    )
    with pytest.MonkeyPatch.context() as here:
        here.chdir(scratch)
        table = training.compare_with(lora["run"], "14_hybrid", name="two", arm="swincvs")
        found = training.compare(lora["run"], second["run"])
    assert (
        "10_lora/lora minus outputs/14_hybrid/two" in table.caption
        and "n_frames 16 against 5" in table.caption
        and "geometry squash against crop" in table.caption
    )
    assert found["n_items"] == lora["result"]["n_clips"] == second["result"]["n_clips"] and found["n_clusters"] == 2
    assert found["map"]["value"] == pytest.approx(lora["result"]["map"]["value"] - second["result"]["map"]["value"])


# the loop --------------------------------------------------------------------------------------------------------------------


def test_each_epoch_has_its_weights(tmp_path):
    weights = [1.0, 2.0, 4.0]
    one = LossTerm(lambda outputs, batch: 1 + 0 * outputs["logits"].sum(), weights)
    recipe = Recipe(dict(one=one), dict(head=1e-9), cvs_scores, epochs=5, patience=5, batch_size=8, device="cpu")
    model, run = models.build_model("demo"), toy_run(tmp_path / "run")
    run.save("applied.json", dict(proofs=[]))
    history = fit(model, Toy(16, 0), Toy(8, 1), recipe, run)
    assert history["train_loss"].tolist() == pytest.approx([1, 2, 4, 4, 4])
    assert [recipe.at(e).losses["one"].weight for e in (1, 3, 9)] == [1.0, 4.0, 4.0] and LossTerm(one.fn, 0.3).at(
        7
    ).weight == 0.3


@pytest.mark.parametrize("reported", ["best", "last"])
def test_the_epoch_that_was_asked_for_is_kept_and_scored(tmp_path, reported, monkeypatch):
    scores = iter([0.5, 0.9, 0.4, 0.3])
    recipe = Recipe(
        dict(cvs=LossTerm(bce())),
        dict(head=3e-3),
        lambda y, logits: cvs_scores(y, logits) | dict(map=next(scores)),
        epochs=4,
        patience=9,
        batch_size=8,
        device="cpu",
        reported=reported,
        train_scores="running",
    )
    monkeypatch.setattr(training, "_train_scores", lambda *args: dict(map=0.5))
    model, run = models.build_model("demo"), toy_run(tmp_path / "run")
    run.data = dict(demo=True)
    preflight(model, Toy(16, 0), recipe, run)
    fit(model, Toy(16, 0), Toy(8, 1), recipe, run)
    epoch = dict(best=2, last=4)[reported]
    there = torch.load(run.dir / f"checkpoint/epoch_{epoch:04d}.pt", weights_only=True)["model"]
    same = lambda m: all(torch.equal(t, m.state_dict()[n]) for n, t in there.items())
    assert same(model) and same(load_trained(run))
    result = report(run, model, dict(train=Toy(16, 0), val=Toy(8, 1)), recipe, dict(split="val"))
    assert (result["best_epoch"], result["reported"], result["epochs"]) == (epoch, reported, 4)
    assert f"{reported} epoch {epoch}" in training.result_table(result).caption


# its weights -----------------------------------------------------------------------------------------------------------------

WIDE = dict(
    image_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4
)  # a map of 16 x 16, then 8 x 8
TRAINED = [3, 0]  # width of windows in pretraining; 0: the same


def coordinates(window, trained):
    far = torch.arange(-(window - 1), window).float() * 8 / ((trained or window) - 1)
    far = far.sign() * torch.log2(far.abs() + 1) / math.log2(8)
    return torch.stack(torch.meshgrid(far, far, indexing="ij"), -1)[None]


def places(window):
    at = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
    apart = at[:, :, None] - at[:, None] + window - 1
    return apart[0] * (2 * window - 1) + apart[1]


def regions(side, window):
    "(windows, N, N): -100 between places of a shifted window that were not neighbours before."
    line = torch.zeros(side)
    line[-window : -(window // 2)], line[-(window // 2) :] = 1, 2
    cells = cut((3 * line[:, None] + line)[None, :, :, None], window).squeeze(-1)
    return torch.where(cells[:, None] != cells[:, :, None], -100.0, 0.0)


def cut(x, window):
    return x.unflatten(1, (-1, window)).unflatten(3, (-1, window)).transpose(2, 3).flatten(0, 2).flatten(1, 2)


def joined(x, window, side):
    return (
        x.unflatten(0, (-1, side // window, side // window))
        .unflatten(3, (window, window))
        .transpose(2, 3)
        .flatten(1, 2)
        .flatten(2, 3)
    )


def published(whole=True, own=True, seed=0):
    "Random tensors under the names of SwinCVS's files, whose Swin V2 is microsoft's."
    torch.manual_seed(seed)
    w = dict(WIDE)
    state, normal = {}, lambda *shape: 0.3 * torch.randn(*shape)

    def linear(name, out, into, bias=True):
        state.update({f"{name}.weight": normal(out, into)} | ({f"{name}.bias": normal(out)} if bias else {}))

    def norm(name, width):
        state.update({f"{name}.weight": 1 + normal(width), f"{name}.bias": normal(width)})

    state |= {"patch_embed.proj.weight": normal(8, 3, 2, 2), "patch_embed.proj.bias": normal(8)}
    norm("patch_embed.norm", 8)
    for i, (depth, heads) in enumerate(zip(w["depths"], w["num_heads"])):
        width, side = 8 << i, 16 >> i
        for j in range(depth):
            p = f"layers.{i}.blocks.{j}"
            if j % 2:
                state[f"{p}.attn_mask"] = regions(side, 4)
            state |= {
                f"{p}.attn.logit_scale": 2 + normal(heads, 1, 1),
                f"{p}.attn.q_bias": normal(width),
                f"{p}.attn.v_bias": normal(width),
                f"{p}.attn.relative_coords_table": coordinates(4, TRAINED[i]),
                f"{p}.attn.relative_position_index": places(4),
            }
            linear(f"{p}.attn.cpb_mlp.0", 512, 2)
            linear(f"{p}.attn.cpb_mlp.2", heads, 512, bias=False)
            linear(f"{p}.attn.qkv", 3 * width, width, bias=False)
            linear(f"{p}.attn.proj", width, width)
            linear(f"{p}.mlp.fc1", 4 * width, width)
            linear(f"{p}.mlp.fc2", width, 4 * width)
            norm(f"{p}.norm1", width)
            norm(f"{p}.norm2", width)
        if i == 0:
            linear(f"layers.{i}.downsample.reduction", 2 * width, 4 * width, bias=False)
            norm(f"layers.{i}.downsample.norm", 2 * width)
    norm("norm", 16)
    if not whole:
        linear("head", 3, 16)
        return state
    state = {f"swinv2_model.{n}": t for n, t in state.items()}
    lstm = torch.nn.LSTM(16, 256, 2, batch_first=True)
    state |= {f"lstm.{n}": t.detach() for n, t in lstm.state_dict().items()}
    linear("fc_lstm", 3, 256)
    if own:
        linear("fc_swin", 3, 16)
    return state


def swin(s, x):
    "Features (n, 16) of frames (n, 3, 32, 32) by microsoft's Swin V2, written anew from its definition."

    def linear(name, x):
        return F.linear(x, s[f"{name}.weight"], s.get(f"{name}.bias"))

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"])

    x = norm(
        "patch_embed.norm", F.conv2d(x, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], 2).permute(0, 2, 3, 1)
    )
    for i, (depth, heads) in enumerate(zip(WIDE["depths"], WIDE["num_heads"])):
        for j in range(depth):
            p, side, shift = f"layers.{i}.blocks.{j}", x.shape[1], 2 * (j % 2)
            windows = cut(x.roll((-shift, -shift), (1, 2)), 4)
            bias = torch.cat([s[f"{p}.attn.q_bias"], torch.zeros(x.shape[-1]), s[f"{p}.attn.v_bias"]])
            q, k, v = (
                F.linear(windows, s[f"{p}.attn.qkv.weight"], bias).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            )
            scores = (
                F.normalize(q, dim=-1)
                @ F.normalize(k, dim=-1).transpose(-1, -2)
                * s[f"{p}.attn.logit_scale"].clamp(max=math.log(100)).exp()
            )
            table = linear(
                f"{p}.attn.cpb_mlp.2", linear(f"{p}.attn.cpb_mlp.0", coordinates(4, TRAINED[i])).relu()
            ).flatten(0, 2)
            scores = scores + 16 * table[places(4)].permute(2, 0, 1).sigmoid()
            if shift:
                scores = (scores.unflatten(0, (len(x), -1)) + regions(side, 4)[:, None]).flatten(0, 1)
            mixed = joined(linear(f"{p}.attn.proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)), 4, side).roll(
                (shift, shift), (1, 2)
            )
            x = x + norm(f"{p}.norm1", mixed)
            x = x + norm(f"{p}.norm2", linear(f"{p}.mlp.fc2", F.gelu(linear(f"{p}.mlp.fc1", x))))
        if i == 0:
            quarters = torch.cat([x[:, a::2, b::2] for b in (0, 1) for a in (0, 1)], -1)
            x = norm(f"layers.{i}.downsample.norm", linear(f"layers.{i}.downsample.reduction", quarters))
    return norm("norm", x).flatten(1, 2).mean(1)


@pytest.mark.parametrize(
    "whole, own", [(True, True), (True, False), (False, False)], ids=["end to end", "frozen", "frames"]
)
def test_published_weights_give_what_they_gave(tmp_path, whole, own):
    torch.save(state := published(whole, own), tmp_path / "w.pt")
    model = models.load_swincvs(str(tmp_path / "w.pt"))
    bare = {n.removeprefix("swinv2_model."): t for n, t in state.items()}
    video = torch.randint(0, 256, (2, 5 if whole else 1, 3, 32, 32), dtype=torch.uint8)
    x = video.float() / 255
    x = (x - torch.tensor([0.406, 0.456, 0.485])[:, None, None]) / torch.tensor([0.225, 0.224, 0.229])[:, None, None]
    low, high = x.amin((2, 3, 4), keepdim=True), x.amax((2, 3, 4), keepdim=True)
    features = torch.stack([swin(bare, frames) for frames in (x - low) / (high - low)])
    out = model(video)
    torch.testing.assert_close(out["tokens"], features, atol=2e-4, rtol=1e-3)
    if not whole:
        return torch.testing.assert_close(
            out["logits"], F.linear(features[:, 0], state["head.weight"], state["head.bias"]), atol=1e-3, rtol=1e-3
        )
    lstm = torch.nn.LSTM(16, 256, 2, batch_first=True)
    lstm.load_state_dict({n.removeprefix("lstm."): t for n, t in state.items() if n.startswith("lstm.")})
    torch.testing.assert_close(
        out["logits"],
        F.linear(lstm(features)[0][:, -1], state["fc_lstm.weight"], state["fc_lstm.bias"]),
        atol=1e-3,
        rtol=1e-3,
    )
    if own:
        torch.testing.assert_close(
            out["auxiliary"],
            F.linear(features[:, -1], state["fc_swin.weight"], state["fc_swin.bias"]),
            atol=1e-3,
            rtol=1e-3,
        )
    assert ("auxiliary" in out) == own


def test_a_model_in_that_layout_has_the_same_tokens_and_stands_under_another(tmp_path, scratch, monkeypatch):
    monkeypatch.chdir(scratch)
    torch.save(dict(model=published(whole=False, seed=3)), tmp_path / "frames.pt")
    model = models.load_swincvs(str(tmp_path / "frames.pt"))
    assert (
        model.spec["backbone"]["frames"] | WIDE == model.spec["backbone"]["frames"]
        and model.spec["backbone"]["frames"]["pretrained_window_sizes"] == TRAINED
    )
    models.save_frames(model, "weights/theirs")
    under = models.build_model(
        dict(kind="swin", frames="weights/theirs", train_frames=False), pooler="lstm", hidden=0, pixels="swincvs"
    ).eval()
    video = torch.randint(0, 256, (1, 5, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(under.encode(video), model.encode(video))


def without(name):
    return lambda s: {n: t for n, t in s.items() if n != name}


FAULTS = {
    "missing": (
        without("swinv2_model.layers.1.blocks.0.mlp.fc1.bias"),
        r"1 missing \(backbone.frames.encoder.layers.1.blocks.0.intermediate.dense.bias\)",
    ),
    "left over": (
        lambda s: s | {"swinv2_model.layers.0.blocks.0.attn.k_bias": torch.zeros(8)},
        r"1 left over \(backbone.frames.encoder.layers.0.blocks.0.attn.k_bias\)",
    ),
    "another head": (lambda s: s | {"fc_other.weight": torch.zeros(3, 16)}, r"1 left over \(fc_other.weight\)"),
    "narrow LSTM": (
        lambda s: s | {"lstm.weight_hh_l0": torch.zeros(64, 16)},
        r"1 of another shape \(pooler.lstm.weight_hh_l0 is \(64, 16\), not \(1024, 256\)\)",
    ),
    "no LSTM": (without("fc_lstm.weight"), "lacks fc_lstm.weight"),
    "no windows": (
        without("swinv2_model.layers.1.blocks.0.attn.relative_position_index"),
        "lacks layers.1.blocks.0.attn.relative_position_index",
    ),
    "other windows": (
        lambda s: s | {"swinv2_model.layers.0.blocks.1.attn.relative_coords_table": coordinates(4, 8)},
        "layers.0.blocks.1.attn.relative_coords_table has other values",
    ),
    "no tensors": (lambda s: dict(epoch=3), "holds no tensors by name"),
    "no Swin": (
        lambda s: {"fc_lstm.weight": torch.zeros(3, 4), "swinv2_model.x": torch.zeros(1)},
        "it holds no Swin V2",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_does_not_fit_is_named(tmp_path, fault):
    change, says = FAULTS[fault]
    torch.save(change(published()), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=says) as stopped:
        models.load_swincvs(str(tmp_path / "w.pt"))
    assert "w.pt" in str(stopped.value)


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def test_nothing_but_tensors_is_unpickled(tmp_path, capsys):
    torch.save(dict(model=Evil()), tmp_path / "w.pt")
    (tmp_path / "page.pt").write_text("<html>")
    for name in ("w.pt", "page.pt"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as tensors alone"):
            models.load_swincvs(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="no file 'none.pt'"):
        models.load_swincvs(str(tmp_path / "none.pt"))
    assert "run" not in capsys.readouterr().out
