"A run that diverges says so in the epoch in which it happens, leaves no checkpoint of it, and never goes on from one; a full disk leaves no half of one."
import errno, re, shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pages import Toy, toy_run
from torch import nn

from cvslab import training
from cvslab.models import build_model
from cvslab.objectives import LossTerm, bce
from cvslab.training import Recipe, cvs_scores, fit, preflight

STEPS = 3      # of an epoch: 24 clips in batches of 8

def poison(at, value=float("nan")):
    "A loss that is `value` times itself in its batch number `at` (or those `at`), counted once it is `on`."
    inner, seen = bce(), [0]
    def fn(outputs, batch):
        seen[0] += fn.on
        return inner(outputs, batch) * (value if fn.on and seen[0] in np.atleast_1d(at) else 1)
    fn.on = False
    return fn

class Frames(nn.Module):
    "A classifier of the mean of each channel, with the groups of a real one."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head, self.spec = nn.Linear(3, 4), nn.Linear(4, 3), {}

    def forward(self, video):
        return dict(logits=self.head(self.backbone(video.float().div(255).mean((1, 3, 4)))))

def start(folder, term=None, model=None, **changes):
    "A model, a recipe and a run past its preflight."
    model, run = model or Frames(), toy_run(folder)
    recipe = Recipe(**dict(losses=dict(cvs=LossTerm(term or bce())), lr=dict(backbone=1e-3, head=1e-2), score=cvs_scores, epochs=3, batch_size=8, patience=9, device="cpu") | changes)
    preflight(model, Toy(24, 0), recipe, run)
    if hasattr(term, "on"): term.on = True
    return model, recipe, run

def train(model, recipe, run): return fit(model, Toy(24, 0), Toy(12, 1), recipe, run)

def diverges(model, recipe, run) -> str:
    with pytest.raises(FloatingPointError) as caught: train(model, recipe, run)
    return str(caught.value)

def kept(run): return sorted(p.name for p in (run.dir/"checkpoint").glob("*")) if (run.dir/"checkpoint").exists() else []

@pytest.fixture(autouse=True)
def groups(monkeypatch):
    monkeypatch.setattr("cvslab.training.trainable", lambda m: {g: dict(getattr(m, g).named_parameters()) for g in ("backbone", "head")})
    monkeypatch.setattr("cvslab.training.lora_modules", lambda m: {})

@pytest.mark.parametrize("at, value", [(1, float("nan")), (2, float("inf")), (STEPS + 1, float("nan")), (2*STEPS, float("-inf"))])
def test_it_is_told_in_its_epoch_with_step_term_and_rate(tmp_path, at, value):
    epoch, step = (at - 1) // STEPS + 1, (at - 1) % STEPS + 1
    said = diverges(*(parts := start(tmp_path/"run", poison(at, value))))
    assert f"diverged in epoch {epoch}: loss term cvs" in said and f"at step {step} of {STEPS}" in said
    assert "lr of head 0.001 instead of 0.01" in said and ("epoch 1 is kept" if epoch == 2 else "no epoch was finished") in said
    assert kept(parts[2]) == [f"epoch_{e:04d}.pt" for e in range(1, epoch)]
    assert (parts[2].dir/"history.csv").exists() == (epoch > 1)

def test_the_term_that_broke_is_named_among_others_and_its_rate_by_its_parameter(tmp_path):
    model, recipe, run = start(tmp_path/"run")
    run.params = dict(lr_head=0.01, lr_backbone=1e-3)
    bad = poison(2)
    bad.on = True
    said = diverges(model, replace(recipe, losses=dict(cvs=LossTerm(bce()), mask=LossTerm(bad))), run)
    assert "loss term mask is no finite number at step 2" in said and "-p lr_head 0.001 instead of 0.01" in said

def test_steps_are_counted_in_steps_of_the_optimizer(tmp_path):
    assert f"at step 2 of {STEPS}" in diverges(*start(tmp_path/"run", poison(3), micro_batch=4))

def test_a_rate_that_is_far_too_high(tmp_path):
    model, recipe, run = start(tmp_path/"run", lr=dict(backbone=1e38, head=1e-3), warmup_epochs=0.)
    assert re.search(r"diverged in epoch 1.*weights of .*backbone.*lr of backbone 0.001 instead of 1e\+38", diverges(model, recipe, run))
    assert not kept(run)

class Cut(nn.Module):
    "Logits that are no number, of a loss that does not see it; in evaluation alone where `late`."
    def __init__(self, late):
        super().__init__()
        self.inner, self.late, self.spec, self.armed = Frames(), late, {}, False
        self.backbone, self.head = self.inner.backbone, self.inner.head

    def forward(self, video):
        logits = self.inner(video)["logits"]
        return dict(logits=logits + torch.inf if self.armed and self.training != self.late else logits, all=logits)

@pytest.mark.parametrize("late, words", [(False, "logits is no finite number at step 1"), (True, "the logits of 12 of 12 val clips are no finite numbers")])
def test_logits_that_are_not_finite_under_a_loss_that_is(tmp_path, late, words):
    model = Cut(late)
    seen = bce()
    model, recipe, run = start(tmp_path/"run", lambda outputs, batch: seen(dict(logits=outputs["all"]), batch), model)
    model.armed = True
    assert words in diverges(model, recipe, run) and not kept(run)

def test_the_same_command_again_goes_on_from_the_last_good_epoch(tmp_path, capsys):
    model, recipe, run = start(tmp_path/"run", poison(STEPS + 2))
    diverges(model, recipe, run)
    history = train(Frames(), replace(recipe, losses=dict(cvs=LossTerm(bce()))), run)
    assert "continuing" in capsys.readouterr().out and history["epoch"].tolist() == [1, 2, 3]

@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [[2], [1, 2]], ids=["the last", "all"])
def test_a_diverged_checkpoint_of_earlier_is_not_gone_on_from(tmp_path, capsys, value, which):
    model, recipe, run = start(tmp_path/"run", epochs=2)
    train(model, recipe, run)
    for epoch in which:
        state = torch.load(path := run.dir/f"checkpoint/epoch_{epoch:04d}.pt", weights_only=True)
        next(iter(state["model"].values())).view(-1)[0] = value
        torch.save(state, path)
    history = train(Frames(), recipe, run)
    assert "holds weights that are not finite, of a run that diverged" in capsys.readouterr().out
    assert history["epoch"].tolist() == [1, 2]
    for path in (run.dir/"checkpoint").glob("*.pt"): assert training._readable(path) is not None

class Half(training.torch.amp.GradScaler):
    "A gradient scaler on the CPU, as fp16 has it on a GPU."
    def __init__(self, *_, **__): super().__init__("cpu", enabled=True)

@pytest.mark.parametrize("at", [[2], [1, 2]])
def test_an_overflow_that_the_gradient_scaler_leaves_out_is_no_divergence(tmp_path, capsys, monkeypatch, at):
    model, recipe, run = start(tmp_path/"run", epochs=1)
    monkeypatch.setattr(training, "_scaler", lambda acc, recipe: Half())
    term = poison(at, float("inf"))
    term.on = True
    history = train(model, replace(recipe, losses=dict(cvs=LossTerm(term))), run)
    assert f"numbers overflow in fp16, first in batch {at[0]} of {STEPS}" in capsys.readouterr().out
    assert history["train_loss"].notna().all() and kept(run) == ["epoch_0001.pt"]

def test_a_scaler_that_leaves_every_step_out_is_one(tmp_path, monkeypatch):
    model, recipe, run = start(tmp_path/"run", precision="fp32")
    monkeypatch.setattr(training, "_scaler", lambda acc, recipe: Half())
    always = bce()
    said = diverges(model, replace(recipe, losses=dict(cvs=LossTerm(lambda o, b: always(o, b) * torch.inf))), run)
    assert "diverged in epoch 1" in said and not kept(run)

def test_no_step_waits_for_the_device(tmp_path, monkeypatch):
    model, recipe, run = start(tmp_path/"run", epochs=1)
    epoch, looks, inside = training._epoch, [], []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__"):
        def counted(self, *args, plain=getattr(torch.Tensor, name), name=name):
            if inside: looks.append(name)
            return plain(self, *args)
        monkeypatch.setattr(torch.Tensor, name, counted)
    def watched(acc, model, loader, *args):
        batches = list(loader)
        inside.append(1)
        try: return epoch(acc, model, batches, *args)
        finally: inside.clear()
    monkeypatch.setattr(training, "_epoch", watched)
    train(model, recipe, run)
    assert looks == ["tolist"]                             # the one look, at the end of the epoch

# ---- a full disk

@pytest.mark.parametrize("error", [RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 192 vs 89"), OSError(errno.ENOSPC, "No space left on device"),
                                   RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"), OSError(errno.EDQUOT, "Disk quota exceeded")], ids=repr)
def test_a_checkpoint_that_does_not_fit_is_said_and_the_one_before_it_stays(tmp_path, monkeypatch, error):
    model, recipe, run = start(tmp_path/"run")
    save, calls = torch.save, []
    def full(state, path):
        calls.append(path)
        save(state, path)
        if len(calls) == 2:
            path.write_bytes(path.read_bytes()[:100])
            raise error
    with monkeypatch.context() as m:
        m.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"the disk of checkpoint is full: epoch_0002.pt needs \d+ \w+, .* are free. Make room"): train(model, recipe, run)
    assert kept(run) == ["epoch_0001.pt"]
    assert train(Frames(), recipe, run)["epoch"].tolist() == [1, 2, 3]

def test_the_disk_that_is_asked_is_that_of_the_run(tmp_path, monkeypatch):
    parts = start(tmp_path/"run")
    def disk(**free): monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free["run" if "/run" in str(path) else "else_"]))
    disk(run=100, else_=10**12)
    for refused in (lambda: train(*parts), lambda: training.estimate(parts[0], dict(train=Toy(24, 0), val=Toy(12, 1)), *parts[1:])):
        with pytest.raises(OSError, match="checkpoints need 1 kB, and 0 kB are free on the disk of run: make room there"): refused()
    assert not kept(parts[2])
    disk(run=10**9, else_=0)
    train(*parts)
    disk(run=0, else_=0)                                   # what its own checkpoints hold is room for the next ones
    (parts[2].dir/"checkpoint/epoch_0002.pt").write_bytes(bytes(10**6))
    assert training._room(*parts[::2])[1] >= 10**6
