"Each knob of the pages 17 and 18, broken on purpose where the page takes it from: its preflight stops the run and names it."
import dataclasses

import pytest
from pages import run_page, small
from transformers import Dinov2Config, Dinov2Model, VideoMAEConfig, VideoMAEModel

from cvslab import endoscapes, models, objectives, pretraining, training
from cvslab.core import ParameterError
from cvslab.objectives import bce, segmentation
from cvslab.training import PreflightError

IDEAS, PRETRAINING = "18_ideas", "17_domain_pretraining"

def instead(function, **change): return lambda *args, **kwargs: function(*args, **kwargs | change)
def windows(function=endoscapes._windows, **change): return lambda video, chosen, protocol: function(video, chosen, dataclasses.replace(protocol, **change))
def same_seed(thing, replace=dataclasses.replace, **changes): return replace(thing, **{k: v for k, v in changes.items() if k != "seed"})
def pooled(**change): return models.POOLERS | {k: models.POOLERS[v] for k, v in change.items()}
def built(build=models.build_model, **change): return lambda backbone, **spec: build(**dict(backbone=backbone) | spec | change)
def alike(model, recipe, groups=training.param_groups): return groups(model, dataclasses.replace(recipe, layer_decay=1.))
def unseen(outputs, batch, visible=objectives.visible): return visible(dict(visible=outputs["visible"].detach()), batch)

class Half(objectives.Augment):
    def __post_init__(self): object.__setattr__(self, "rotation", self.rotation/2)

BROKEN = {   # knob: parameters, where it is broken, under which name, by what, and what the preflight says
    "fewer frames": (dict(n_frames=8), endoscapes, "_windows", windows(n_frames=4), "window: asked 8 frames of 64 pixels, 8 different"),
    "frames close together": (dict(spacing=2), endoscapes, "_windows", windows(step=1), "from -6 to 0 s, 2 s apart; seen 4 frames of 64 pixels, up to 4 different, from -3 to 0 s, 1 s apart"),
    "first frames kept": (dict(keep_frames=2), models, "liveliest_frames", lambda video, keep: video[:, :keep], "kept frames: asked 2"),
    "all frames kept": (dict(keep_frames=4), None, "", None, "kept frames: asked 4"),
    "size not told": (dict(size=96), models, "load_backbone", instead(models.load_backbone, size=None), "tokens: asked 2 bins of 6 x 6"),
    "centre not seen": (dict(centre=True), models, "Reading", instead(models.Reading, centre=False), "2 views: 64; seen 32"),
    "no middle layers": (dict(middle=1), models, "Reading", instead(models.Reading, layers=()), "1 middle layers"),
    "whole depth": (dict(kept_layers=.5), models, "load_backbone", instead(models.load_backbone, depth=None), "depth: asked 2 layers; seen 4"),
    "no path dropped": (dict(drop_path=.1), models, "load_backbone", instead(models.load_backbone, drop_path=0.), "drop path: asked up to 0.1"),
    "lower rank": (dict(rank=64), models, "add_lora", instead(models.add_lora, rank=16), "lora: asked rank 64"),
    "not all linear": (dict(targets=["q", "k", "v", "o", "fc1", "fc2"]), models, "add_lora", instead(models.add_lora, targets=["q", "v"]), "adapted projections: asked q k v o fc1 fc2; seen q v"),
    "fewer layers trained": (dict(rank=0, train_share=.5), models, "unfreeze", instead(models.unfreeze, layers=1), "unfrozen layers: asked layers 2..3"),
    "MLPs trained too": (dict(rank=0, train_share=.5, train_only="attention"), models, "unfreeze", instead(models.unfreeze, only=""), "matching attention"),
    "rates alike": (dict(rank=0, train_share=.5, layer_decay=.65), training, "param_groups", alike, "layer decay: asked 0.65"),
    "no windows": (dict(window=[1, 2, 2]), models, "set_attention", lambda encoder, **asked: None, "attention window: asked"),
    "windows alone": (dict(window=[1, 2, 2]), models, "set_attention", instead(models.set_attention, beside=0.), "beside 0.5"),
    "official pooler is a mean": (dict(pooler="official"), models, "POOLERS", pooled(official="mean"), "pooler: asked official; seen MeanPooler"),
    "mean pooler is an LSTM": (dict(pooler="mean"), models, "POOLERS", pooled(mean="lstm"), "pooler: asked mean; seen LSTMPooler"),
    "LSTM is a mean": (dict(pooler="lstm"), models, "POOLERS", pooled(lstm="mean"), "pooler: asked lstm; seen MeanPooler"),
    "one query for all": (dict(pooler="criterion"), models, "POOLERS", pooled(criterion="attention"), "pooler: asked criterion; seen AttentionPooler"),
    "videomae is V-JEPA": (dict(backbone="weights/videomae", rank=0), models, "build_model", built(backbone="demo"), "backbone: asked videomae of width 32, of weights/videomae; seen VJEPA2Model"),
    "dinov2 is V-JEPA": (dict(backbone="weights/images", rank=0, pooler="lstm"), models, "build_model", built(backbone="demo"), "backbone: asked dinov2 of width 32, of weights/images; seen VJEPA2Model"),
    "answer not told": (dict(visible_weight=.3, hierarchical=True), models, "Visible", instead(models.Visible, told=False), "what is in view: asked told to the criteria; seen asked alone"),
    "view without gradient": (dict(visible_weight=.3), objectives, "visible", unseen, "loss visible: "),
    "easy negatives count": (dict(hard_share=.5), objectives, "hard_negatives", lambda share: bce(), "hard negatives: asked"),
    "smoothing forgotten": (dict(regularized=True), objectives, "bce", lambda **asked: bce(), "label targets: asked negative 0.05, positive 0.95; seen negative 0, positive 1"),
    "never mixed": (dict(regularized=True), objectives.Mix, "__call__", lambda self, batch: batch, "mixing: asked mixup 33%"),
    "augmented by half": (dict(regularized=True), objectives, "Augment", Half, "rotation: asked 15"),
    "classes weigh alike": (dict(seg_weight=.3), objectives, "segmentation", lambda: segmentation([1]*5), "class weights 0.1 5 3 2 2; seen 1.76"),
    "mask is a bias": (dict(regularized=True), models, "set_attention", instead(models.set_attention, mask=False, bias=.1), "attention mask: "),
    "mirrored is the same": (dict(mirrored=True), training, "Recipe", instead(training.Recipe, views=(lambda video: video,)), "view 1: asked other pixels in evaluation; seen 0.0%"),
    "activations kept": (dict(checkpointing=True), models.VJEPA2Model, "gradient_checkpointing_enable", lambda self, kwargs=None: None, "checkpointing: asked activations recomputed"),
    "seeds alike": (dict(ensemble_seeds=2), dataclasses, "replace", same_seed, "member seed1: asked lora head from weights of its own; seen lora head from seed 0, the same as this run"),
    "frozen is adapted": (dict(with_frozen=True), models, "build_model", built(lora=dict(rank=16, targets=["q", "v"])), "member frozen: asked head from weights of its own; seen lora head"),
}

def drawn(draw=pretraining.draw_blocks, **change): return lambda grid, batch, kind, *rest, **more: draw(grid, batch, dataclasses.replace(kind, **change), *rest, **more)
def held(hold_out=pretraining.hold_out): return lambda clips, share: (clips, hold_out(clips, share)[1])
def as_it_is(like, seed, folder):
    models.load_backbone(like).save_pretrained(folder)
    return folder

BROKEN_17 = {   # the same of pretraining
    "target stands still": ({}, pretraining, "following", lambda momentum: lambda model, share: None, "target: asked 0.99 of it kept in the first step, all in the last; seen 1 and 1"),
    "another momentum": ({}, pretraining, "following", lambda momentum, following=pretraining.following: following(.9), "target: asked 0.99 of it kept in the first step, all in the last; seen 0.9 and 1"),
    "momentum does not rise": ({}, pretraining, "following", lambda momentum: lambda model, share: model.follow(momentum), "seen 0.99 and 0.99"),
    "blocks as by default": ({}, pretraining, "Pretrainer", lambda backbone, kinds, model=pretraining.Pretrainer: model(backbone), "blocks 1: asked 3 of 15% of a frame, through time; seen 8 of"),
    "one block of many": ({}, pretraining, "draw_blocks", drawn(n=1), "blocks 1: asked 3 of 15%"),
    "smaller blocks": (dict(large_scale=.7), pretraining, "draw_blocks", drawn(scale=.15), "blocks 2: asked 1 of 70%"),
    "blocks for a moment": ({}, pretraining, "draw_blocks", drawn(time=.5), "not through time"),
    "never guided": (dict(guided=.7), pretraining, "guided", lambda share, guided=pretraining.guided: guided(0.), "anatomy in blocks: asked more than by chance, in 70% of batches; seen in 0%"),
    "always guided": (dict(guided=.5), pretraining, "guided", lambda share, guided=pretraining.guided: guided(1.), "anatomy in blocks: asked more than by chance, in 50% of batches; seen in 100%"),
    "guided anywhere": (dict(guided=.7), pretraining, "ANATOMY", (1.,)*7, "anatomy in blocks: asked more than by chance, in 70%"),
    "val is no slip": (dict(slips=["val_frames"]), pretraining, "video_proof", instead(pretraining.video_proof, slip=False), "videos: asked of train alone"),
    "held-out videos trained on": ({}, pretraining, "hold_out", held(), "held-out videos: asked 15%, none of them trained on"),
    "half of the videos held out": ({}, pretraining, "hold_out", lambda clips, share, hold_out=pretraining.hold_out: hold_out(clips, .5), "held-out videos: asked 15%"),
    "scratch that is not": ({}, pretraining, "random_backbone", as_it_is, "start: asked random weights"),
    "random where weights were asked": (dict(from_scratch=False), models, "load_backbone", lambda name, load=models.load_backbone: models.VJEPA2Model(load(name).config), "start: asked the weights of the backbone; seen 0 of"),
    "always mirrored": ({}, objectives, "random_flip", lambda p, flip=objectives.random_flip: flip(1.), "flip: asked"),
}

INERT = {"hierarchical": dict(hierarchical=True), "train_only": dict(train_only="attention"),
         "targets": dict(rank=0, targets=["q", "k"]), "regularized": dict(window=[1, 2, 2], regularized=True)}

@pytest.fixture(scope="module")
def scratch(scratch):
    "With small backbones of other families."
    wide = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=64)
    VideoMAEModel(VideoMAEConfig(**wide, num_frames=4, intermediate_size=64)).save_pretrained(scratch/"weights/videomae")
    Dinov2Model(Dinov2Config(**wide, patch_size=16)).save_pretrained(scratch/"weights/images")
    return scratch

def begun(project, page, knob, change): return run_page(project, page, small("".join(c if c.isalnum() else "-" for c in knob)) | change, until="training.estimate")

@pytest.mark.parametrize("knob", BROKEN)
def test_a_broken_idea_stops_the_run(knob, scratch, monkeypatch):
    change, where, name, broken, says = BROKEN[knob]
    if where: monkeypatch.setattr(where, name, broken)
    with pytest.raises(PreflightError) as stopped: begun(scratch, IDEAS, knob, change)
    assert says in str(stopped.value)

@pytest.mark.parametrize("knob", BROKEN_17)
def test_a_broken_pretraining_stops_the_run(knob, scratch, monkeypatch):
    change, where, name, broken, says = BROKEN_17[knob]
    monkeypatch.setattr(where, name, broken)
    with pytest.raises(PreflightError) as stopped: begun(scratch, PRETRAINING, knob, change)
    assert says in str(stopped.value)

def test_frames_of_val_are_a_declared_slip(scratch):
    run = begun(scratch, PRETRAINING, "slip", dict(slips=["val_frames"], precision="bf16"))["own"]
    assert [(p["knob"], p["slip"]) for p in run.load("applied.json")["proofs"] if not p["turned"]] == [("videos", True)]

@pytest.mark.parametrize("knob", INERT)
def test_a_knob_that_would_turn_nothing_is_an_error(knob, scratch):
    with pytest.raises(ParameterError, match=f"would turn nothing.*\n{knob}"): begun(scratch, IDEAS, f"inert {knob}", INERT[knob])
