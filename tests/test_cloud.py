"The cloud's task files: what they call exists, what they need is asked for, and SkyPilot's own loader takes them where it is installed."
import json, os, re, shlex, subprocess
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from cvslab import runner
from cvslab.core import MACHINE

TASKS = sorted((ROOT/"params/cloud").glob("*.yaml"))
SKY = next((p for p in (Path(os.environ.get("CVSLAB_SKY_ENV", ""))/"bin/python", ROOT/".cache/sky/bin/python") if p.is_file()), None)

@pytest.mark.parametrize("task", TASKS, ids=lambda p: p.stem)
def test_what_a_task_calls_exists(task, monkeypatch):
    cfg = yaml.safe_load(task.read_text())
    given = cfg["envs"] | cfg["secrets"]
    used = set(re.findall(r"\$([A-Z_]+)", cfg["run"] + cfg["setup"]))
    assert used <= given.keys() and all(v is None for v in cfg["secrets"].values())
    assert {"CVSLAB_MIRROR", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= given.keys()
    line = next(l.split("#")[0] for l in cfg["run"].splitlines() if l.strip().startswith("cvslab-batch"))
    words = shlex.split(line.replace('"$STUDY"', "params/10b.yaml").replace("$SEEDS", given["SEEDS"]).replace('"$data"', "demo"))
    asked = {}
    monkeypatch.setattr(runner, "run_study", lambda files, seeds, machine, jobs, values, *rest: asked.update(files=files, seeds=seeds, machine=machine, values=values) or 1/0)
    with pytest.raises(ZeroDivisionError): runner.main(words[1:])                     # the command line is one that cvslab-batch takes
    assert asked["seeds"] == [0, 1, 2] and asked["values"] == dict(data="demo")
    monkeypatch.chdir(ROOT)
    jobs = runner.plan(asked["files"], asked["seeds"], asked["machine"], asked["values"] | dict(backbone="demo", n_frames=8))
    assert [j.params["device"] for j in jobs] == [yaml.safe_load((ROOT/asked["machine"]).read_text())["device"]] * 3

def test_a_machine_file_describes_the_machine_alone():
    for path in (ROOT/"params/machines").glob("*.yaml"): assert yaml.safe_load(path.read_text()).keys() <= MACHINE | {"precision"}, path.name

LOAD = '''
import copy, json, sys, sky, yaml
cfg = yaml.safe_load(open(sys.argv[1]))
given = dict(env_overrides=dict(STUDY="params/10b.yaml", DATA="s3://b/data", CVSLAB_MIRROR="s3://b/runs"), secrets_overrides=dict.fromkeys(cfg["secrets"], "x"))
load = lambda cfg: sky.Task.from_yaml_config(copy.deepcopy(cfg), **given)
task = load(cfg)
wrong = []
for typo in (dict(cfg, resuorces={}), dict(cfg, resources=dict(cfg["resources"], use_sopt=True))):
    try: load(typo)
    except Exception as e: wrong.append(str(e))
print(json.dumps(dict(spot=[r.use_spot for r in task.resources], clouds=sorted({str(r.cloud) for r in task.resources}), wrong=wrong)))
'''

@pytest.mark.skipif(SKY is None, reason="no environment with SkyPilot: python -m venv .cache/sky && .cache/sky/bin/pip install 'skypilot[runpod,gcp]==0.14.1'")
@pytest.mark.parametrize("task", TASKS, ids=lambda p: p.stem)
def test_skypilot_takes_it(task, tmp_path):
    run = subprocess.run([SKY, "-c", LOAD, task], cwd=ROOT, env=os.environ | dict(HOME=str(tmp_path), PYTHONPATH=""), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    said = json.loads(run.stdout.splitlines()[-1])
    assert all(said["spot"]) and said["clouds"] == [{"runpod": "RunPod", "tpu": "GCP"}[task.stem]] and len(said["wrong"]) == 2
