"A run outlives notices, damaged checkpoints and machines; what it tells a tracker is its history."
import signal
from dataclasses import replace

import pandas as pd
import pytest
from s3_server import client, moto, use

from cvslab import endoscapes, models, runner, training
from cvslab.core import Run
from cvslab.objectives import LossTerm, bce

EPOCHS = 4

class Taken(Exception): "The machine is taken away."

def train(project, name, monkeypatch, until=EPOCHS, **recipe):
    "The page 10_lora, small; stopped after epoch `until`. Returns the run, and the history where it came to its end."
    monkeypatch.chdir(project)
    values = dict(epochs=EPOCHS, max_clips=32, rank=4, patience=9, device="cpu", name=name)
    run = Run("10_lora", runner.types_of(project/"nbs/10_lora.ipynb") | values)
    asked = replace(endoscapes.OFFICIAL, n_frames=2, size=models.input_size("demo"), split="val")
    datasets, card = endoscapes.open_datasets("demo", asked, max_clips=32)
    model = models.build_model("demo", lora=dict(rank=4))
    recipe = training.Recipe(losses=dict(cvs=LossTerm(bce(None))), lr=dict(lora=2e-3, head=1e-2), score=training.cvs_scores, epochs=EPOCHS, batch_size=16,
                             patience=9, device="cpu", **recipe)
    run.start(card)
    shown = training._Live.show
    def show(self, history, new):
        shown(self, history, new)
        if len(history) >= until: raise Taken
    training.preflight(model, datasets["train"], recipe, run)
    with monkeypatch.context() as m:
        if until < EPOCHS: m.setattr(training._Live, "show", show)
        try: history = training.fit(model, datasets["train"], datasets["val"], recipe, run)
        except Taken: return run, None
    training.report(run, model, datasets, recipe, asked)
    return run, history

@pytest.fixture
def alone(project, monkeypatch):
    "History of a run that nothing happened to, and a spare copy of its kind."
    monkeypatch.delenv("IN_TEST", raising=False)
    return train(project, "alone", monkeypatch, tracker="tensorboard")

def best_of(run): return training._best_file(run, pd.read_csv(run.dir/"history.csv").to_dict("records"))

def test_what_is_lost_is_trained_again(alone, project, monkeypatch, capsys):
    whole, history = alone
    run, _ = train(project, "best", monkeypatch, until=3)
    lost = best_of(run)
    lost.write_bytes(lost.read_bytes()[:1000])
    again, ended = train(project, "best", monkeypatch)
    out = capsys.readouterr().out
    assert f"{lost.name} cannot be read" in out
    pd.testing.assert_frame_equal(ended, history, check_exact=True)
    run, _ = train(project, "newest", monkeypatch, until=3)
    newest = sorted((run.dir/"checkpoint").glob("*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    with moto() as endpoint:                                                   # and, with a bucket behind it, on another machine
        use(monkeypatch, endpoint)
        client(endpoint).create_bucket(Bucket="runs")
        monkeypatch.setenv("CVSLAB_MIRROR", "s3://runs/x")
        run, _ = train(project, "bucket", monkeypatch, until=2)
        run.dir.rename(project/"gone")
        capsys.readouterr()
        run, ended = train(project, "bucket", monkeypatch)
        assert "continuing outputs/10_lora/bucket after epoch 2" in capsys.readouterr().out
        pd.testing.assert_frame_equal(ended, history, check_exact=True)
        held = {o["Key"].removeprefix("x/10_lora/bucket/") for o in client(endpoint).list_objects_v2(Bucket="runs")["Contents"]}
        assert {"metrics.json", "history.csv", "params.json"} <= held
        assert {k for k in held if k.endswith(".pt")} == {f"checkpoint/{p.name}" for p in (run.dir/"checkpoint").glob("*.pt")}
        monkeypatch.delenv("CVSLAB_MIRROR")
    _, ended = train(project, "newest", monkeypatch)
    assert f"{newest.name} cannot be read" in capsys.readouterr().out
    pd.testing.assert_frame_equal(ended, history, check_exact=True)

def test_tensorboard_is_told_the_history(alone):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run, history = alone
    told = EventAccumulator(str(run.dir/"tensorboard/alone")).Reload()
    for name in ("train_loss", "val_map"):
        scalars = told.Scalars(name)
        assert [s.step for s in scalars] == [1, 2, 3, 4] and [s.value for s in scalars] == pytest.approx(history[name].tolist())

def test_wandb_offline(project, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is an extra of one's own: pip install wandb")
    monkeypatch.delenv("IN_TEST", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run, _ = train(project, "w", monkeypatch, tracker="wandb")
    log, = run.dir.glob("wandb/offline-run-*/run-*.wandb")
    assert b"val_map" in log.read_bytes() and b"10_lora" in log.read_bytes()

def test_a_tracker_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(training, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install wandb"): training.Recipe(losses={}, lr={}, score=None, tracker="wandb")

def test_a_notice_waits_until_the_checkpoint_is_written():
    came = []
    old = signal.signal(signal.SIGTERM, lambda *_: came.append("left"))
    try:
        with training.undisturbed():
            signal.raise_signal(signal.SIGTERM)
            came.append("written")
        assert came == ["written", "left"]
    finally: signal.signal(signal.SIGTERM, old)
