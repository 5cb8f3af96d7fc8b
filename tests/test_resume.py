"A run killed with SIGKILL at five moments, and started again with the same command each time, ends as if nothing had happened."
import shutil, time

import pandas as pd
import psutil
from conftest import run_folders, start_papermill

ARGS = ["-p", "epochs", "3", "-p", "max_clips", "32", "-p", "name", "x", "-p", "rank", "8", "-p", "batch_size", "8", "-p", "micro_batch", "4"]

# a moment is a file of the run folder that has just appeared, and the seconds to wait after it; the fourth is a checkpoint half written or just renamed
MOMENTS = [("params.json", 0.0), ("applied.json", 0.5), ("checkpoint/epoch_0001.pt", 0.3), ("checkpoint/*epoch_0002*.pt", 0.0), ("predictions.parquet", 0.0)]

def kill_at(job, folder, pattern, wait):
    "SIGKILL papermill and its kernel at the moment, while the run is still going."
    while job.poll() is None and not list(folder.glob(pattern)): time.sleep(0.002)
    time.sleep(wait)
    going = job.poll() is None
    if going:
        for process in [*psutil.Process(job.pid).children(recursive=True), job]: process.kill()
    out, _ = job.communicate()
    assert going, f"the run ended before {pattern} was seen:\n{out[-2000:]}"

def test_killed_five_times(project, tmp_path_factory):
    twin = tmp_path_factory.mktemp("unbroken")/"project"
    shutil.copytree(project, twin)
    unbroken = start_papermill(twin, "10_lora", *ARGS)
    folder = project/"outputs/10_lora/x"
    for pattern, wait in MOMENTS:
        job = start_papermill(project, "10_lora", *ARGS)
        kill_at(job, folder, pattern, wait)
    job = start_papermill(project, "10_lora", *ARGS)
    out, _ = job.communicate()
    assert job.returncode == 0, out[-3000:]
    out, _ = unbroken.communicate()
    assert unbroken.returncode == 0, out[-3000:]
    pd.testing.assert_frame_equal(pd.read_csv(folder/"history.csv"), pd.read_csv(twin/"outputs/10_lora/x/history.csv"), check_exact=True)
    pd.testing.assert_frame_equal(pd.read_parquet(folder/"predictions.parquet"), pd.read_parquet(twin/"outputs/10_lora/x/predictions.parquet"), check_exact=True)
    assert run_folders(project, "10_lora") == [folder]
