"Each knob of the pages 03 to 10 and 16, broken on purpose where the page takes it from: its preflight stops the run and names it."
import dataclasses, shutil

import pytest
from conftest import ROOT
from pages import run_page, small

from cvslab import endoscapes, models, objectives, training
from cvslab.objectives import Augment, bce, focal, segmentation
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

class ByFrame(Augment):
    def __post_init__(self): object.__setattr__(self, "per", "frame")

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
    "classes weigh alike": ("08_multitask", {}, objectives, "segmentation", lambda: segmentation([1]*5), "class weights 0.1 5 3 2 2; seen 1.76"),
    "boxes that add nothing": ("08_multitask", dict(masks="boxes"), endoscapes, "add_masks", lambda data, frames, source: frames, "mask source: asked boxes"),
    "no mask at all": ("08_multitask", {}, endoscapes, "add_masks", lambda data, frames, source: frames.assign(mask="", mask_source=""), "are there masks in the data"),
    "blur forgotten": ("09_staged", {}, objectives, "_blurred", lambda x, p: x, "blur: asked 0.1"),
    "hue in whole channels": ("09_staged", {}, objectives, "adjust_hue", lambda x, angle: objectives._rolled(x, angle/6.3), "hue: asked 0.1"),
    "colours drawn by frame": ("09_staged", {}, objectives, "Augment", ByFrame, "brightness: asked 0.3, drawn by clip"),
    "rotation by nothing": ("09_staged", {}, objectives, "rotate", lambda x, *args, **kwargs: x, "rotation: asked 15"),
    "weights left out in stages": ("09_staged", dict(pos_weight=[1, 3, 1]), objectives, "bce", plain, "pos_weight: asked 1 3 1"),
    "keys not adapted": ("10_lora", dict(targets=["q", "k", "v"]), models, "add_lora", instead(models.add_lora, targets=["q", "v"]), "adapted projections: asked q k v; seen q v"),
    "predictor adapted": ("10_lora", {}, models, "add_lora", instead(models.add_lora, predictor=True), "adapters that learn"),
    "augmentation not composed": ("10_lora", dict(rotation=15), objectives, "compose", lambda *transforms: transforms[0], "rotation: asked 15"),
    "labels by majority": ("16_clean_labels", dict(labels="all"), endoscapes, "targets", majority, "labels: asked all; seen 0.0%"),
    "vote among copies": ("16_clean_labels", dict(labels="clip", protocol="recorded", n_frames=5, pad=6), None, "", None, "labels: asked clip; seen 0.0%"),
    "picture not cut": ("16_clean_labels", {}, endoscapes, "pack_frames", squashed, "geometry: asked crop"),
    "clip not filled up": ("16_clean_labels", dict(pad=6), endoscapes.ClipDataset, "__getitem__", shortened, "window: asked 6 frames"),
    "future seen": ("16_clean_labels", {}, endoscapes, "_windows", centred, "window: asked 4 frames of 64 pixels, 4 different, from -3 to 0 s"),
    "all layers adapted": ("16_clean_labels", {}, models, "add_lora", instead(models.add_lora, layers=()), "lora: asked"),
    "smoothing forgotten": ("16_clean_labels", dict(label_targets=[.05, .95]), objectives, "bce", plain, "label targets: asked negative 0.05"),
    "never mixed": ("16_clean_labels", dict(mixup=.3, cutmix=.3), objectives.Mix, "__call__", lambda self, batch: batch, "mixing: asked mixup 30%"),
}

@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    "The part of a project that a page needs to find itself."
    folder = tmp_path_factory.mktemp("project")
    for name in ("nbs", "cvslab"): shutil.copytree(ROOT/name, folder/name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT/"settings.ini", folder)
    return folder

@pytest.mark.parametrize("knob", BROKEN)
def test_a_broken_knob_stops_the_run(knob, scratch, monkeypatch):
    page, change, where, name, broken, says = BROKEN[knob]
    if where: monkeypatch.setattr(where, name, broken)
    with pytest.raises(PreflightError) as stopped:
        run_page(scratch, page, small(knob.replace(" ", "-").replace(",", "")) | change, until="training.fit")
    assert says in str(stopped.value)
