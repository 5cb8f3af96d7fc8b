"The batch runner: everything checked before anything starts, and planted failures that each end as described."
import contextlib, io, json, os, shutil, signal, subprocess, sys, time

import nbformat
import pandas as pd
import pytest
import yaml
from conftest import ROOT
from s3_server import client, moto, proxy, use

from cvslab import runner
from cvslab.core import ParameterError, code_fingerprint
from cvslab.storage import Mirror

# a page as the runner sees one: typed parameters, a run folder that grows epoch by epoch and goes on where it was cut
PAGE = ['''import os, time
from pathlib import Path
import pandas as pd
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from cvslab.core import Run''',
'''epochs: PositiveInt = 3         # at most
fault: str = ""                 # what goes wrong in epoch 2
pause: NonNegativeFloat = 0.05  # seconds an epoch
data: str = "demo"              # a folder, or demo
seed: NonNegativeInt = 0        # of everything random
name: str = ""                  # run folder''',
'''run = Run("90_tiny", globals())
run.start(dict(demo=True, fingerprint="0"))
mirror = None
if "CVSLAB_MIRROR" in os.environ:
    from cvslab.storage import Mirror
    mirror = Mirror.of(run.dir)
    mirror.pull()
history = run.load("history.csv").to_dict("records") if (run.dir/"history.csv").exists() else []
print(f"begins after epoch {len(history)}", flush=True)''',
'''def once(): return not (run.dir/"tripped").exists() and (run.dir/"tripped").touch() is None
while len(history) < epochs:
    epoch = len(history) + 1
    time.sleep(pause)
    print(f"trained epoch {epoch}", flush=True)
    if epoch == 2 and fault == "crash": raise KeyError("planted in epoch 2")
    if epoch == 2 and fault == "connection" and once(): raise ConnectionResetError("planted")
    if epoch == 2 and fault == "killed" and once(): os.kill(os.getpid(), 9)
    history.append(dict(epoch=epoch, val_map=0.1*epoch))
    run.save("history.csv", pd.DataFrame(history))
    if mirror: mirror.try_push()''',
'''run.save("metrics.json", run.header() | dict(epochs=len(history)))
if mirror: mirror.push()''']

# os.fsync that finds the disk full in one run folder, on its second epoch
FULL = '''import os
real = os.fsync
def fsync(fd):
    path = os.readlink(f"/proc/self/fd/{fd}")
    if "/full-s0/" in path and os.path.exists(os.path.dirname(path) + "/history.csv") and path.endswith(".csv") and "attempts" not in path:
        raise OSError(28, "No space left on device", path)
    real(fd)
os.fsync = fsync
'''

@pytest.fixture
def small(tmp_path, monkeypatch):
    "A project with the page 90_tiny alone."
    (tmp_path/"nbs").mkdir()
    (tmp_path/"params/studies").mkdir(parents=True)
    shutil.copytree(ROOT/"cvslab", tmp_path/"cvslab", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT/"settings.ini", tmp_path)
    kernel = dict(name="python3", display_name="python3", language="python")
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in PAGE], metadata=dict(kernelspec=kernel))
    page.cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(page, tmp_path/"nbs/90_tiny.ipynb")
    monkeypatch.chdir(tmp_path)
    for name, value in dict(PYTHONPATH=str(tmp_path), CVSLAB_CACHE=str(tmp_path/"cache"), OMP_NUM_THREADS="1").items(): monkeypatch.setenv(name, value)
    monkeypatch.delenv("IN_TEST", raising=False)
    return tmp_path

def write(project, name, **values):
    (project/"params"/name).write_text(yaml.safe_dump(values))
    return name

def batch(*args, **popen):
    "`cvslab-batch <args>` as a process."
    return subprocess.Popen([sys.executable, "-c", "import sys; from cvslab.runner import main; sys.exit(main())", *map(str, args)],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **popen)

def done(*args):
    "The same in this process: exit code and what it said."
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said): code = runner.main([*map(str, args)])
    return code, said.getvalue()

def finished(project, file, code=None):
    "The folder of a finished run of `file`, as `code` left it."
    job, = runner.plan([file])
    job.dir.mkdir(parents=True)
    (job.dir/"params.json").write_text(json.dumps(dict(params=job.params, code=code or code_fingerprint())))
    (job.dir/"metrics.json").write_text("{}")
    return job.dir

def until(seen, seconds=300):
    end = time.time() + seconds
    while not seen():
        assert time.time() < end, "it was never seen"
        time.sleep(0.02)

def folder(project, name): return project/"outputs/90_tiny"/name
def log(project, name): return runner.attempts(folder(project, name))

def no_epoch_twice(path, cuts=0):
    "No epoch saved was trained again, by the log of what the page itself printed and by the attempts log."
    trained = [int(line.rsplit(" ", 1)[1]) for line in (path/"log.txt").read_text().splitlines() if line.startswith("trained epoch")]
    assert len(trained) <= len(set(trained)) + cuts, trained
    table = runner.attempts(path)
    assert (table["epochs_before"].iloc[1:].to_numpy() >= table["epochs_after"].iloc[:-1].to_numpy()).all(), table

# ---- before anything starts

def test_all_that_is_wrong_is_told_at_once(small):
    files = [write(small, "90a.yaml", epochs=2), write(small, "90b.yaml", epoch=2, fault=3), write(small, "90c.yaml", data="nowhere"),
             write(small, "nowhere.yaml", epochs=2), "90d.yaml", write(small, "91.yaml"), write(small, "studies/s.yaml", runs=[dict(file=["90a.yaml"])])]
    (small/"params/90e.yaml").write_text("epochs: [1")
    code, out = done(*files, "90e.yaml")
    assert code == 2 and not (small/"outputs").exists()
    for said in ("did you mean 'epochs'?", "fault=3", "90c.yaml: data='nowhere': there is no such folder", "nowhere.yaml: it belongs to no notebook",
                 "90d.yaml: there is no such file", "0 notebooks begin with 91_", "unknown ['file'] in a study's runs", "90e.yaml: it is no YAML"):
        assert said in out, out
    assert "90a" not in out

def test_a_page_looks_into_the_files_that_papermill_read(small):
    write(small, "90a.yaml", epochs=2)
    (small/"params/90b.yaml").write_text("epochs: 2\nepochs: 64\n")
    (small/"params/90c.yaml").write_text("seed: 010\n")
    def page(*args):
        cmd = [sys.executable, "-m", "papermill", "--no-progress-bar", "nbs/90_tiny.ipynb", "page.ipynb", *args]
        job = subprocess.run(cmd, cwd=small, capture_output=True, text=True)
        return job.returncode, runner.why(job.returncode, small, job.stdout + job.stderr)[0] + job.stderr
    assert page("-f", "params/90a.yaml", "-r", "name", "007")[0] == 0 and (small/"outputs/90_tiny/007").is_dir()
    code, said = page("-f", "params/90a.yaml", "-f", "params/90b.yaml", "--parameters_file", str(small/"params/90c.yaml"), "-p", "name", "007")
    assert code == 1 and len(list((small/"outputs/90_tiny").iterdir())) == 1
    for words in ("params/90b.yaml: `epochs` stands twice, in lines 1 and 2", "90c.yaml: 010 in line 1 is the number 8 to YAML", "Pass `-r name 007`"): assert words in said, said

def test_a_full_disk_of_the_log_ends_no_study(small, monkeypatch):
    job, = runner.plan([write(small, "90a.yaml")])
    attempt = runner.Attempt.__new__(runner.Attempt)
    attempt.job, attempt.rows = job, [dict.fromkeys(runner.ATTEMPTS) | dict(epochs_after=0)]
    job.dir.mkdir(parents=True)
    (job.dir/"history.csv").write_text("epoch\n1\n")
    def full(*_): raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(runner, "save", full)
        assert attempt.look() and attempt.rows[0]["epochs_after"] == 1
    attempt._write()
    assert log(small, "90a-s0")["epochs_after"].tolist() == [1]

def test_a_machine_file_and_seeds_go_on_top(small):
    write(small, "90a.yaml", epochs=2, seed=7)
    (small/"params/machines").mkdir()
    write(small, "machines/m.yaml", workers=4, precision="bf16", pause=1)
    jobs = runner.plan(["90a.yaml"], [1, 2], "m.yaml")
    assert [(j.name, j.params["seed"], j.params["pause"], "workers" in j.given) for j in jobs] == [("90a-s1", 1, 1.0, False), ("90a-s2", 2, 1.0, False)]
    assert [j.name for j in runner.plan(["90a.yaml"])] == ["90a-s7"]
    write(small, "machines/typo.yaml", worker=4)
    with pytest.raises(ParameterError, match="worker"): runner.plan(["90a.yaml"], machine="typo.yaml")

def test_a_folder_that_holds_another_run_stops_the_plan(small):
    finished(small, write(small, "90a.yaml", epochs=1))
    assert done("90a.yaml")[0] == 0 and "finished" in done("90a.yaml", "--dry-run")[1]
    write(small, "90a.yaml", epochs=2)
    code, out = done("90a.yaml")
    assert code == 2 and "outputs/90_tiny/90a-s0 holds another run (epochs 1 there, 2 asked)" in out

def test_runs_of_other_code_are_kept_or_set_aside_never_mixed(small):
    old = finished(small, write(small, "90a.yaml", epochs=1), code="0ldc0de")
    code, out = done("90a.yaml")
    assert code == 2 and "finished under 0ldc0de" in out and "--other-code" in out
    assert done("90a.yaml", "--other-code", "keep")[0] == 0 and not (old/"attempts.csv").exists()
    assert done("90a.yaml", "--other-code", "anew")[0] == 0 and len(log(small, "90a-s0")) == 1
    assert len(list((small/"outputs/90_tiny").glob(".90a-s0.0ldc0de.*/metrics.json"))) == 1

@pytest.mark.parametrize("study", sorted((ROOT/"params/studies").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_study_is_honoured_by_its_notebooks(study, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(runner, "_missing", lambda *_: "")                              # data and weights are the machine's
    for machine in (ROOT/"params/machines").glob("*.yaml"): runner.plan([study], seeds=[0], machine=machine)
    jobs = runner.plan([study])
    assert len({j.dir for j in jobs}) == len(jobs) > 8
    assert all(j.name.endswith(f"-s{j.params['seed']}") for j in jobs)

# ---- while it goes on

def test_planted_failures_each_end_as_described(small):
    (small/"sitecustomize.py").write_text(FULL)
    for fault in ("", "crash", "connection", "killed"): write(small, f"90{fault}.yaml", fault=fault)
    (small/"params/90").mkdir()
    write(small, "90/full.yaml")
    files = [p.relative_to(small/"params") for p in sorted((small/"params").rglob("*.yaml"))]
    code, out = done(*files, "--jobs", 3, "--wait", 0.1)
    assert code == 1, out
    assert all((folder(small, f"90{f}-s0")/"metrics.json").exists() for f in ("", "connection", "killed")), out
    ended = {name: (list(log(small, name)["exit"]), log(small, name)["reason"].iloc[0]) for name in (f"90{f}-s0" for f in ("crash", "connection", "killed"))}
    assert ended["90crash-s0"] == ([1], "KeyError: 'planted in epoch 2'")
    assert ended["90connection-s0"] == ([1, 0], "ConnectionResetError: planted")
    assert ended["90killed-s0"] == ([138, 0], "its kernel died")
    full = folder(small, "full-s0")
    assert "the disk of outputs/90_tiny/full-s0 is full" in log(small, "full-s0")["reason"].iloc[0] and len(pd.read_csv(full/"history.csv")) == 1 and not list(full.glob(".*.tmp.*"))
    assert "2 of 5 runs are not finished" in out and all(said in out.split("not finished")[1] for said in ("planted in epoch 2", "full-s0 is full"))
    (small/"sitecustomize.py").unlink()
    code, out = done("90.yaml", "90/full.yaml", "90connection.yaml", "--jobs", 2)          # room again: the full one goes on, the others rest
    assert code == 0 and list(log(small, "full-s0")["epochs_before"]) == [0, 1] and len(log(small, "90-s0")) == 1
    for f in ("90connection-s0", "90killed-s0", "full-s0"): no_epoch_twice(folder(small, f), cuts=1)

def test_ctrl_c_and_a_notice_leave_the_run_resumable(small):
    write(small, "90a.yaml", epochs=5, pause=0.4)
    for attempt, number, code in ((1, signal.SIGINT, 130), (2, signal.SIGTERM, 143)):
        job = batch("90a.yaml")
        until(lambda: len(log(small, "90a-s0")) == attempt and log(small, "90a-s0")["epochs_after"].iloc[-1] >= attempt)
        job.send_signal(number)
        out, _ = job.communicate(timeout=300)
        assert job.returncode == code and "stopped" in out, out
    assert done("90a.yaml")[0] == 0
    assert list(log(small, "90a-s0")["reason"]) == ["stopped by SIGINT", "stopped by SIGTERM", "finished"]
    no_epoch_twice(folder(small, "90a-s0"), cuts=2)

def test_a_killed_runner_is_started_again(small):
    write(small, "90a.yaml", epochs=6, pause=0.5)
    job = batch("90a.yaml")
    until(lambda: runner.epochs_done(folder(small, "90a-s0")) > 0)
    job.kill()                                             # the runner alone: what it started goes on, and is not started beside itself
    job.wait()
    code, out = done("90a.yaml")
    assert code == 0 and "another process is at this run" in out, out
    no_epoch_twice(folder(small, "90a-s0"))

# ---- a bucket behind the run folders

def test_a_lost_bucket_delays_and_loses_nothing(small, monkeypatch, capsys):
    monkeypatch.setattr(runner.Store.__init__, "__defaults__", (8.0, 2, 2.0))       # two tries of two seconds instead of eight of fifteen
    (small/"run/checkpoint").mkdir(parents=True)
    (small/"run/history.csv").write_text("epoch\n1\n")
    (small/"run/checkpoint/epoch_0001.pt").write_bytes(b"1")
    with moto() as endpoint, proxy(endpoint, statuses=(503,)) as front:
        use(monkeypatch, front.endpoint)
        client(endpoint).create_bucket(Bucket="runs")
        mirror = Mirror(small/"run", "s3://runs/study/90_tiny/run")
        front.fail = 1.0
        mirror.try_push()
        assert "this run's copy is behind" in capsys.readouterr().out
        with pytest.raises(OSError, match="failed after 2 tries"): mirror.push()
        front.fail = 0.0
        (small/"run/checkpoint/epoch_0002.pt").write_bytes(b"2")
        (small/"run/metrics.json").write_text("{}")
        assert mirror.push() == 4
        puts = [path.rsplit("/", 1)[1] for verb, path, _ in front.seen[-4:] if verb == "PUT"]
        assert puts == ["history.csv", "epoch_0001.pt", "epoch_0002.pt", "metrics.json"]
        other = Mirror(small/"other", "s3://runs/study/90_tiny/run")
        assert other.pull() == 4 and (small/"other/checkpoint/epoch_0002.pt").read_bytes() == b"2"

def test_another_machine_goes_on_from_the_bucket(small, monkeypatch):
    write(small, "90a.yaml", epochs=3, fault="crash")
    with moto() as endpoint:
        use(monkeypatch, endpoint)
        client(endpoint).create_bucket(Bucket="runs")
        monkeypatch.setenv("CVSLAB_MIRROR", "s3://runs/study")
        assert done("90a.yaml")[0] == 1
        shutil.rmtree(small/"outputs")
        assert done("90a.yaml")[0] == 1                                             # a fresh machine: the bucket brings epoch 1
        assert list(log(small, "90a-s0")["epochs_before"]) == [0, 1]

# ---- a study of the LoRA page, short; `tests/kill_study` alone is the long one

def test_a_study_killed_and_restarted_has_the_leaderboard_of_one_left_alone():
    run = subprocess.run([sys.executable, ROOT/"tests/kill_study", "--runs", "2", "--kills", "1", "--seed", "2"], capture_output=True, text=True)
    assert run.returncode == 0 and "same leaderboard, bit for bit" in run.stdout, run.stdout + run.stderr
