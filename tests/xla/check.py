"""Pages through papermill on the XLA CPU client, killed once and resumed: the losses of plain CPU, no compilation after the first epoch.

check.py [page ...], pages as in PAGES. Dropout is switched off in the kernels, for its draws differ from device to device."""
import os, re, shutil, subprocess, sys, tempfile, time
from pathlib import Path

import pandas as pd
import psutil

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"10_lora": dict(epochs=3, max_clips=32, flip=1, lora_dropout=0), "31_oct_probe": dict(epochs=6, dropout=0, folds=0)}

# runs in every kernel before the page does
STARTUP = '''
def _prepare():
    import torch.nn.functional as F
    real = F.scaled_dot_product_attention
    F.dropout = lambda x, *args, **kwargs: x
    F.scaled_dot_product_attention = lambda q, k, v, attn_mask=None, dropout_p=0., is_causal=False, **kwargs: real(q, k, v, attn_mask, 0., is_causal, **kwargs)
    from accelerate.utils import is_torch_xla_available
    from cvslab import training
    shown = training._Live.show
    def show(self, history, new):
        shown(self, history, new)
        if not new: return
        compiled = 0
        if is_torch_xla_available():
            from torch_xla.debug import metrics
            compiled = metrics.metric_data("CompileTime")[0]
        print(f"epoch {len(history)} on {training.Accelerator().device} after {compiled} compilations", flush=True)
    training._Live.show = show
_prepare()
'''

def start(project, page, device, log):
    env = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "RANK")}
    env |= dict(PJRT_DEVICE="CPU", PYTHONPATH=str(project), IPYTHONDIR=str(project/"ipython"), CVSLAB_CACHE=str(ROOT/".cache"), OMP_NUM_THREADS="2",
                USE_TORCH_XLA=str(int(device == "xla")))
    given = [w for name, value in (PAGES[page] | dict(device=device, name=device)).items() for w in ("-p", name, str(value))]
    cmd = [sys.executable, "-m", "papermill", "-k", "python3", "--log-output", "--no-progress-bar", f"nbs/{page}.ipynb", f"outputs/{page}.{device}.ipynb", *given]
    return subprocess.Popen(cmd, cwd=project, env=env, stdout=log, stderr=log)

def kill(job):
    there = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    for p in there: p.kill()
    psutil.wait_procs(there)
    job.wait()

def finish(job, log):
    if job.wait(): sys.exit(f"papermill ended with {job.returncode}:\n{Path(log.name).read_text()[-4000:]}")

def check(project, page):
    with open(project/f"{page}.xla.log", "w+") as log:
        began, first = time.time(), project/f"outputs/{page}/xla/checkpoint/epoch_0001.pt"
        job = start(project, page, "xla", log)
        while not first.exists() and job.poll() is None: time.sleep(0.002)
        if job.poll() is not None: sys.exit(f"{page} ended before its first checkpoint:\n{Path(log.name).read_text()[-4000:]}")
        kill(job)
        finish(start(project, page, "xla", log), log)
        said = Path(log.name).read_text()
    took = time.time() - began
    with open(project/f"{page}.cpu.log", "w+") as log: finish(start(project, page, "cpu", log), log)
    epochs = [(int(e), device, int(n)) for e, device, n in re.findall(r"epoch (\d+) on (\S+) after (\d+) compilations", said)]
    assert all(device.startswith("xla") for _, device, _ in epochs), epochs
    assert re.search(r"continuing \S+ after epoch 1", said), "it began anew after the kill"
    resumed = [n for e, _, n in epochs if e > 1]
    assert len(resumed) > 1 and len(set(resumed)) == 1, f"it compiled after its first epoch: {epochs}"
    xla, cpu = (pd.read_csv(project/f"outputs/{page}/{device}/history.csv") for device in ("xla", "cpu"))
    worst = (xla["train_loss"] - cpu["train_loss"]).abs().max()
    assert len(xla) == len(cpu) and worst < 1e-4, f"losses differ by {worst:.2g}:\n{xla}\n{cpu}"
    print(f"{page}: {len(xla)} epochs on {epochs[-1][1]} in {took:.0f} s, killed after epoch 1 and resumed; "
          f"losses within {worst:.1g} of plain CPU; {resumed[-1]} compilations after the resumed process's first epoch and after its last", flush=True)

with tempfile.TemporaryDirectory() as tmp:
    project = Path(tmp)
    for name in ("nbs", "cvslab", "params"): shutil.copytree(ROOT/name, project/name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT/"settings.ini", project)
    (project/"outputs").mkdir()
    (project/"ipython/profile_default/startup").mkdir(parents=True)
    (project/"ipython/profile_default/startup/00.py").write_text(STARTUP)
    for page in sys.argv[1:] or PAGES: check(project, page)
