"Cached tokens as files: what is said before they are computed, what is computed again, and what a file says of itself."
import json, shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from cvslab import features
from cvslab.endoscapes import OFFICIAL, open_datasets
from cvslab.features import cache_tokens
from cvslab.models import build_model
from cvslab.objectives import LossTerm, bce
from cvslab.training import Recipe, cvs_scores

RECIPE = Recipe(dict(cvs=LossTerm(bce())), dict(head=1e-3), cvs_scores, batch_size=4, device="cpu")

@pytest.fixture
def clips(monkeypatch, tmp_path):
    "Twelve demo clips of 4 x 16 tokens in blocks of five, a model for them, and the views of each clip that its encoder is shown."
    datasets, card = open_datasets("demo", replace(OFFICIAL, n_frames=8, size=64), max_clips=12)
    monkeypatch.setenv("CVSLAB_CACHE", str(tmp_path))
    monkeypatch.setattr(features, "BLOCK", 5)
    model, shown = build_model("demo"), []
    encode = features._encode
    monkeypatch.setattr(features, "_encode", lambda m, video, *rest: shown.append(len(video)) or encode(m, video, *rest))
    return SimpleNamespace(train=datasets["train"], card=card, model=model, shown=shown, tokens=lambda **how: cache_tokens(model, datasets["train"], card, RECIPE, **how))

def test_the_size_is_said_before_it_starts(clips, capsys, monkeypatch):
    def refuse(*args): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(features, "_encode", refuse)
        with pytest.raises(KeyboardInterrupt): clips.tokens(mirrored=True)
    said = capsys.readouterr().out
    assert said.startswith("tokens of 12 clips of train: 0.3 MB, ") and said.endswith(" GB free\n")      # 12 x 2 x 64 x 96 halves
    tokens = clips.tokens(mirrored=True)
    assert "0.3 MB" in capsys.readouterr().out
    kept = sum(p.stat().st_size for files in tokens.files.values() for p in files)
    assert 12*2*64*96*2 <= kept < 1.05 * 12*2*64*96*2
    clips.tokens(mirrored=True)
    assert not capsys.readouterr().out                                                # nothing is left to compute

def test_a_clip_that_shows_more_frames_than_it_has_is_counted_whole(clips, capsys):
    datasets, card = open_datasets("demo", replace(OFFICIAL, n_frames=8, pad=16, size=64), max_clips=4)
    cache_tokens(clips.model, datasets["train"], card, RECIPE)
    assert ": 0.1 MB" in capsys.readouterr().out and datasets["train"].protocol.shown == 16               # 4 x 128 x 96 halves

def test_each_view_is_computed_once(clips):
    clips.tokens()
    assert sum(clips.shown) == 12
    both = clips.tokens(mirrored=True)
    assert sum(clips.shown) == 24                                                     # the mirror images alone
    both.files["plain"][1].unlink()
    clips.tokens(mirrored=True)
    assert sum(clips.shown) == 24 + 5                                                 # the block that is missing
    clips.tokens(pool=2)
    assert sum(clips.shown) == 24 + 5 + 12
    mirror = clips.model.encode(clips.train[7]["video"][None].flip(-1))[0]
    torch.testing.assert_close(both[7]["mirrored"], mirror, rtol=2e-3, atol=2e-3)

def test_other_pixels_are_other_tokens(clips, monkeypatch):
    first = clips.tokens()
    monkeypatch.setattr(features, "PIXELS", 0)
    assert clips.tokens().files["plain"][0].parent != first.files["plain"][0].parent

def test_other_heads_are_other_tokens(clips):
    where = clips.tokens().files["plain"][0].parent
    clips.model.backbone.config.num_attention_heads *= 2                              # as a file beside a `.pt` may say; its weights are the same
    assert clips.tokens().files["plain"][0].parent != where

def test_a_file_says_whose_tokens_it_holds(clips):
    tokens = clips.tokens(mirrored=True)
    for view, files in tokens.files.items():
        told = [safe_open(p, "pt").metadata() for p in files]
        assert [c for t in told for c in json.loads(t["clips"])] == clips.train.clips["clip"].tolist() and {t["view"] for t in told} == {view}

def test_a_small_disk_is_said_with_what_would_fit(clips, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(OSError, match="need 0.3 MB, and 0.1 MB are free.*flip 0.*half.*protocol official.*fifth.*pool=2.*quarter.*CVSLAB_CACHE"): clips.tokens(mirrored=True)
    assert clips.tokens(mirrored=True, pool=2)[0]["mirrored"].shape == (16, 96)
