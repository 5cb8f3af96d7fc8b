"Each knob of the pages 03 to 16 that the page itself proves, broken on purpose where it takes it from: its preflight stops the run and names it."
import dataclasses
from contextlib import nullcontext

import pytest
from pages import run_page, small

from cvslab import endoscapes, models, objectives, training
from cvslab.objectives import Augment, Mix, bce, focal, random_flip, segmentation
from cvslab.training import PreflightError

def instead(function, **change): return lambda *args, **kwargs: function(*args, **kwargs | change)
def plain(*args): return bce()

def detached(*args):
    loss = bce()
    return lambda outputs, batch: loss(dict(logits=outputs["logits"].detach()), batch)

def lukewarm(*args, recipe=training.Recipe, **kwargs): return recipe(*args, **kwargs | dict(sampling=kwargs["sampling"]**.1))
def centred(video, chosen, protocol, windows=endoscapes._windows): return windows(video, chosen, dataclasses.replace(protocol, window="centred"))
def squashed(data, frames, geometry, *rest, pack=endoscapes.pack_frames): return pack(data, frames, "squash", *rest)
def majority(frames, labels="", targets=endoscapes.targets): return targets(frames)
def shortened(self, i, item=endoscapes.ClipDataset.__getitem__): return item(self, i) | dict(video=item(self, i)["video"][:4])

def built(kind, **change):
    init = kind.__init__
    return lambda self, *args, **kwargs: init(self, *args, **kwargs | change)

def frozen(kind, **change):
    "A class like the dataclass `kind` whose objects have `change`, whatever was asked."
    def after(self):
        for name, value in change.items(): object.__setattr__(self, name, value)
    return type(kind.__name__, (kind,), dict(__post_init__=after))

class ByFrame(Augment):
    def __post_init__(self): object.__setattr__(self, "per", "frame")

def one_alpha(self, batch): return Mix.__call__(Mix(self.mixup, self.cutmix, 4., 4., self.masks), batch)
def alike(): return segmentation([1]*5)
def boxes(data, frames, source, add=endoscapes.add_masks): return add(data, frames, "boxes")
def no_boxes(data, frames, source): return frames
def no_masks(data, frames, source): return frames.assign(mask="", mask_source="")

BROKEN = {   # knob: page, parameters, where it is broken, under which name, by what, and what the preflight says
    "focal is cross-entropy": ("03_focal_loss", {}, objectives, "focal", plain, "focal: asked alpha 0.75, gamma 2; seen positives 1"),
    "focal without gamma": ("03_focal_loss", {}, objectives, "focal", lambda alpha, gamma: focal(alpha, 0), "gamma 0 in the loss"),
    "draws without weights": ("04_balanced_sampling", {}, training, "Recipe", instead(training.Recipe, sampling=None), "sampling: asked class_balanced"),
    "draws hardly balanced": ("04_balanced_sampling", dict(sampling="rare_combo"), training, "Recipe", lukewarm, "sampling: asked rare_combo"),
    "focal, draws without weights": ("05_focal_balanced", {}, training, "Recipe", instead(training.Recipe, sampling=None), "sampling: asked class_balanced"),
    "balanced, focal left out": ("05_focal_balanced", {}, objectives, "focal", plain, "focal: asked alpha 0.5"),
    "weights left out": ("06_c2_weighted", {}, objectives, "bce", plain, "pos_weight: asked 1 5 1; seen 1 1 1 in the loss"),
    "loss without a gradient": ("06_c2_weighted", {}, objectives, "bce", detached, "loss cvs"),
    "no final norm": ("08_multitask", {}, models, "unfreeze", instead(models.unfreeze, norm=False), "without the final norm"),
    "one layer of two": ("08_multitask", {}, models, "unfreeze", instead(models.unfreeze, layers=1), "unfrozen layers: asked layers 2..3"),
    "classes weigh alike": ("08_multitask", {}, objectives, "segmentation", alike, "class weights 0.1 5 3 2 2; seen 1.76"),
    "boxes that add nothing": ("08_multitask", dict(masks="boxes"), endoscapes, "add_masks", no_boxes, "mask source: asked boxes"),
    "no mask at all": ("08_multitask", {}, endoscapes, "add_masks", no_masks, "are there masks in the data"),
    "blur forgotten": ("09_staged", {}, objectives, "_blurred", lambda x, p: x, "blur: asked 0.1"),
    "hue in whole channels": ("09_staged", {}, objectives, "adjust_hue", lambda x, angle: objectives._rolled(x, angle/6.3), "hue: asked 0.1"),
    "colours drawn by frame": ("09_staged", {}, objectives, "Augment", ByFrame, "brightness: asked 0.3, drawn by clip"),
    "rotation by nothing": ("09_staged", {}, objectives, "rotate", lambda x, *args, **kwargs: x, "rotation: asked 15"),
    "background turned in": ("09_staged", {}, objectives, "Augment", frozen(Augment, fill=0), "fill: asked mask pixels from outside the frame are 255"),
    "never mirrored": ("09_staged", {}, objectives, "random_flip", lambda p: None, "flip: asked 50%"),
    "weights left out in stages": ("09_staged", dict(pos_weight=[1, 3, 1]), objectives, "bce", plain, "pos_weight: asked 1 3 1"),
    "keys not adapted": ("10_lora", dict(targets=["q", "k", "v"]), models, "add_lora", instead(models.add_lora, targets=["q", "v"]), "adapted projections: asked q k v; seen q v"),
    "predictor adapted": ("10_lora", {}, models, "add_lora", instead(models.add_lora, predictor=True), "adapters that learn"),
    "augmentation not composed": ("10_lora", dict(rotation=15), objectives, "compose", lambda *transforms: transforms[0], "rotation: asked 15"),
    "mirrored too seldom": ("10_lora", dict(rotation=15), objectives, "random_flip", lambda p: random_flip(.9*p), "flip: asked 50%"),
    "masks that nothing reads": ("10_lora", dict(masks="boxes"), None, "", None, "mask source: asked boxes"),
    "supervised without boxes": ("11_attention_supervision", dict(masks="boxes"), endoscapes, "add_masks", no_boxes, "mask source: asked boxes"),
    "masks of a run that reads none": ("11_attention_supervision", dict(masks="boxes", weight=0), None, "", None, "mask source: asked boxes"),
    "supervised, classes weigh alike": ("11_attention_supervision", dict(seg_weight=.3), objectives, "segmentation", alike, "seen 1.76"),
    "regularised, classes weigh alike": ("12_regularized", dict(seg_weight=.3), objectives, "segmentation", alike, "seen 1.76"),
    "boxes that nobody asked for": ("12_regularized", {}, endoscapes, "add_masks", boxes, "mask source: asked ground truth in train"),
    "mixed, never mirrored": ("12_regularized", {}, objectives, "random_flip", lambda p: None, "flip: asked 50%"),
    "regularised without boxes": ("12_regularized", dict(masks="boxes"), endoscapes, "add_masks", no_boxes, "mask source: asked boxes"),
    "regularised, keys not adapted": ("12_regularized", dict(targets=["q", "k", "v"]), models, "add_lora", instead(models.add_lora, targets=["q", "v"]), "asked q k v; seen q v"),
    "blended evenly": ("12_regularized", {}, objectives, "Mix", frozen(Mix, mixup_alpha=1.), "mixup_alpha: asked Beta(0.8, 0.8)"),
    "pasted evenly": ("12_regularized", dict(cutmix_alpha=.4), objectives, "Mix", frozen(Mix, cutmix_alpha=1.), "cutmix_alpha: asked Beta(0.4, 0.4)"),
    "drawn by no alpha": ("12_regularized", {}, objectives, "Mix", type("Mix", (Mix,), dict(__call__=one_alpha)), "mixup_alpha: asked Beta(0.8, 0.8)"),
    "a hue by whole channels": ("12_regularized", dict(hue=.1), objectives, "adjust_hue", lambda x, angle: objectives._rolled(x, angle/6.3), "hue: asked 0.1"),
    "narrower": ("13_window_vit", {}, models.WindowViT, "__init__", built(models.WindowViT, dim=24), "sizes: asked 4 layers of width 48 with 3 heads; seen 4 layers of width 24"),
    "a layer less": ("13_window_vit", {}, models.WindowViT, "__init__", built(models.WindowViT, layers=3), "seen 3 layers"),
    "other heads": ("13_window_vit", {}, models.WindowViT, "__init__", built(models.WindowViT, heads=4), "with 3 heads; seen 4 layers of width 48 with 4 heads"),
    "tokens that stay": ("13_window_vit", dict(token_mask=True), models, "masked_norm", lambda: lambda model, batch: nullcontext(), "token mask: asked final tokens"),
    "from scratch, classes weigh alike": ("13_window_vit", dict(seg_weight=.3), objectives, "segmentation", alike, "seen 1.76"),
    "from scratch without boxes": ("13_window_vit", dict(token_mask=True, masks="boxes"), endoscapes, "add_masks", no_boxes, "mask source: asked boxes"),
    "another stage": ("14_hybrid", {}, models.Hybrid, "__init__", built(models.Hybrid, stage=4), "stage: asked 3: 4 x 4 places of 96 channels; seen 4 places of 192"),
    "criteria weigh alike": ("14_hybrid", dict(class_weight=[3., 4., 2.]), objectives, "bce", lambda pos_weight=None, weight=None: bce(pos_weight), "class_weight: asked 3 4 2; seen 1 1 1"),
    "positives alone weighed": ("14_hybrid", dict(class_weight=[3., 4., 2.]), objectives, "bce", lambda pos_weight=None, weight=None: bce(weight), "class_weight: asked 3 4 2; seen 1 1 1 on negatives, 3 4 2"),
    "windows, never mirrored": ("15_window_attention", {}, objectives, "random_flip", lambda p: None, "flip: asked 50%"),
    "clean labels without boxes": ("16_clean_labels", dict(token_mask=True, masks="boxes"), endoscapes, "add_masks", no_boxes, "mask source: asked boxes"),
    "clean labels, no mask at all": ("16_clean_labels", dict(seg_weight=.3), endoscapes, "add_masks", no_masks, "are there masks in the data"),
    "clean labels, classes weigh alike": ("16_clean_labels", dict(seg_weight=.3), objectives, "segmentation", alike, "seen 1.76"),
    "labels by majority": ("16_clean_labels", dict(labels="all"), endoscapes, "targets", majority, "labels: asked all; seen 0.0%"),
    "vote among copies": ("16_clean_labels", dict(labels="clip", protocol="recorded", n_frames=5, pad=6), None, "", None, "labels: asked clip; seen 0.0%"),
    "picture not cut": ("16_clean_labels", {}, endoscapes, "pack_frames", squashed, "geometry: asked crop"),
    "clip not filled up": ("16_clean_labels", dict(pad=6), endoscapes.ClipDataset, "__getitem__", shortened, "window: asked 6 frames"),
    "future seen": ("16_clean_labels", {}, endoscapes, "_windows", centred, "window: asked 4 frames of 64 pixels, 4 different, from -3 to 0 s"),
    "all layers adapted": ("16_clean_labels", {}, models, "add_lora", instead(models.add_lora, layers=()), "lora: asked"),
    "smoothing forgotten": ("16_clean_labels", dict(label_targets=[.05, .95]), objectives, "bce", plain, "label targets: asked negative 0.05"),
    "never mixed": ("16_clean_labels", dict(mixup=.3, cutmix=.3), objectives.Mix, "__call__", lambda self, batch: batch, "mixing: asked mixup 30%"),
}

@pytest.mark.parametrize("knob", BROKEN)
def test_a_broken_knob_stops_the_run(knob, scratch, monkeypatch):
    page, change, where, name, broken, says = BROKEN[knob]
    if where: monkeypatch.setattr(where, name, broken)
    with pytest.raises(PreflightError) as stopped:
        values = small(knob.replace(" ", "-").replace(",", "")) | change
        run_page(scratch, page, {k: v for k, v in values.items() if k != "backbone" or page != "13_window_vit"}, until="training.fit")
    assert says in str(stopped.value)
