"Shared by the tests: a scratch project to run notebooks in, and papermill as a user would call it."
import os, shutil, subprocess, sys
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ: os.environ["OMP_NUM_THREADS"] = "1"    # before torch is imported: two workers share the cores

ROOT = Path(__file__).resolve().parents[1]

@pytest.fixture
def project(tmp_path):
    "A copy of the project without its outputs, so that runs of a test meet no other run; the drawn data are shared through the cache."
    for name in ("nbs", "cvslab", "params"): shutil.copytree(ROOT/name, tmp_path/name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT/"settings.ini", tmp_path)
    (tmp_path/"outputs").mkdir()
    return tmp_path

@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    "The part of a project that a page needs to find itself."
    folder = tmp_path_factory.mktemp("project")
    for name in ("nbs", "cvslab"): shutil.copytree(ROOT/name, folder/name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT/"settings.ini", folder)
    return folder

def start_papermill(project, notebook, *args, **popen):
    "Start `papermill nbs/<notebook>.ipynb outputs/<notebook>.ipynb <args>` in `project`."
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | dict(CVSLAB_CACHE=os.environ.get("CVSLAB_CACHE", str(ROOT/".cache")), PYTHONPATH=str(project))
    cmd = [sys.executable, "-m", "papermill", "--no-progress-bar", f"nbs/{notebook}.ipynb", f"outputs/{notebook}.ipynb", *args]
    return subprocess.Popen(cmd, cwd=project, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **popen)

def papermill(project, notebook, *args):
    "Run it to the end; returns exit code and output."
    job = start_papermill(project, notebook, *args)
    out, _ = job.communicate()
    return job.returncode, out

def run_folders(project, notebook): return sorted(p.parent for p in (project/"outputs"/notebook).glob("*/params.json"))
