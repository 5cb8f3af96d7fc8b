"Encoder layers through torch.compile: the same training; and one without them, said aloud, where that fails."
import pandas as pd
from conftest import papermill

ARGS = ["-p", "epochs", "1", "-p", "max_clips", "32", "-p", "n_frames", "4", "-p", "batch_size", "8", "-p", "rank", "4", "-p", "device", "cpu"]

def history(project, name, *args):
    code, out = papermill(project, "10_lora", *ARGS, "-p", "name", name, *args)
    assert code == 0, out[-3000:]
    return pd.read_csv(project/"outputs/10_lora"/name/"history.csv"), (project/"outputs/10_lora.ipynb").read_text()

def test_a_compiled_training_is_the_same_and_one_that_cannot_be_goes_on(project, monkeypatch, tmp_path):
    plain, _ = history(project, "plain")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path/"made"))
    compiled, page = history(project, "compiled", "-p", "compile", "true")
    assert "without torch.compile" not in page and list((tmp_path/"made").rglob("*.so"))
    pd.testing.assert_frame_equal(compiled, plain, rtol=1e-3)                                 # dropout draws the same clips and tokens
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path/"none"))
    monkeypatch.setenv("CXX", str(tmp_path/"no_compiler"))
    without, page = history(project, "without", "-p", "compile", "true")
    assert "training goes on without torch.compile: it fails here" in page
    pd.testing.assert_frame_equal(without, plain, check_exact=True)
