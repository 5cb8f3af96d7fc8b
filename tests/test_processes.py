"Two processes that train one run together end where one process ends: same global batch, same numbers."
import os, subprocess, sys

import pandas as pd
from conftest import ROOT

from cvslab import runner

# what the page 10_lora does, without dropout and augmentation: their draws differ between processes
TRAIN = '''
import sys
from dataclasses import replace
from torch import nn
from cvslab import endoscapes, models, runner, training
from cvslab.core import Run, root
from cvslab.objectives import LossTerm, bce
values = dict(epochs=2, max_clips=32, batch_size=8, micro_batch=int(sys.argv[2]), flip=0., lora_dropout=0., device="cpu", name=sys.argv[1])
run = Run("10_lora", runner.types_of(root()/"nbs/10_lora.ipynb") | values)
asked = replace(endoscapes.OFFICIAL, n_frames=8, size=models.input_size("demo"), split="val")
datasets, card = endoscapes.open_datasets("demo", asked, max_clips=32)
model = models.build_model("demo", lora=dict(rank=8, dropout=0.))
for m in model.modules():
    if isinstance(m, nn.Dropout): m.p = 0.
    if isinstance(m, nn.MultiheadAttention): m.dropout = 0.
recipe = training.Recipe(losses=dict(cvs=LossTerm(bce(None))), lr=dict(lora=2e-3, head=1e-3), score=training.cvs_scores, epochs=2, batch_size=8,
                         micro_batch=int(sys.argv[2]), device="cpu", train_scores=sys.argv[3])
run.start(card)
training.preflight(model, datasets["train"], recipe, run)
training.fit(model, datasets["train"], datasets["val"], recipe, run)
training.report(run, model, datasets, recipe, asked)
import torch.distributed as group
print("processes", group.get_world_size() if group.is_initialized() else 1, group.is_initialized() and group.get_backend())
'''

def train(project, name, processes, micro, scores):
    "`processes` processes at one run; returns what they said."
    jobs = [subprocess.Popen([sys.executable, "-c", TRAIN, name, str(micro), scores], cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             env=os.environ | rank | dict(PYTHONPATH=str(project), OMP_NUM_THREADS="1", CVSLAB_CACHE=os.environ.get("CVSLAB_CACHE", str(ROOT/".cache"))))
            for rank in runner._ranks(processes, gpus=False)]
    out = [job.communicate()[0] for job in jobs]
    assert not any(job.returncode for job in jobs), "\n".join(out)[-4000:]
    return out

def test_two_processes_are_one(project, monkeypatch):
    monkeypatch.delenv("IN_TEST", raising=False)
    assert all("processes 1 False" in out for out in train(project, "one", 1, 4, "running"))
    assert all("processes 2 gloo" in out for out in train(project, "two", 2, 2, "running"))
    one, two = (project/"outputs/10_lora"/name for name in ("one", "two"))
    a, b = pd.read_csv(one/"history.csv"), pd.read_csv(two/"history.csv")
    pd.testing.assert_frame_equal(a, b, rtol=0, atol=1e-5)
    a, b = pd.read_parquet(one/"predictions.parquet"), pd.read_parquet(two/"predictions.parquet")
    pd.testing.assert_frame_equal(a, b, rtol=0, atol=1e-5)
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
