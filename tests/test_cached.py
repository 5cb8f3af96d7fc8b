"The baseline from cached tokens, through papermill: what it saves on disk, and that the run is that of the backbone in the loop."
import pandas as pd
from conftest import papermill

ARGS = ["-p", "epochs", "2", "-p", "max_clips", "32", "-p", "batch_size", "8"]

def test_baseline_from_cached_tokens(project, monkeypatch):
    monkeypatch.setenv("CVSLAB_CACHE", str(project/"cache"))
    for name, more in dict(looped=[], cached=["-p", "cached", "True"]).items():
        code, out = papermill(project, "02_baseline", *ARGS, "-p", "name", name, *more)
        assert code == 0, out[-3000:]
    looped, cached = (pd.read_csv(project/f"outputs/02_baseline/{name}/history.csv") for name in ("looped", "cached"))
    pd.testing.assert_frame_equal(looped, cached, rtol=5e-3, atol=5e-3)
    sizes = sorted(p.stat().st_size for p in (project/"cache/tokens").rglob("*.safetensors"))
    assert [round(s / (32*64*96*2)) for s in sizes] == [1, 2]                 # val plain, train plain and mirrored: 32 clips of 64 tokens of 96 halves
