"The pages on a frozen encoder from cached tokens, through papermill: the run is that of the backbone in the loop, and what is saved on disk."
import pandas as pd
import pytest
from conftest import papermill

SMALL = ["-p", "max_clips", "32", "-p", "batch_size", "8"]
STILL = [x for name in ("rotation", "brightness", "contrast", "saturation", "hue", "erasing", "blur") for x in ("-p", name, "0")]

@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    "A cache of these tests alone: the pages find the tokens of each other."
    with pytest.MonkeyPatch.context() as env:
        env.setenv("CVSLAB_CACHE", str(folder := tmp_path_factory.mktemp("cache")))
        yield folder

def both(project, page, *args):
    "Folders of two runs of `page`: with the encoder in the loop, and from cached tokens."
    for name, more in dict(looped=[], cached=["-p", "cached", "True"]).items():
        code, out = papermill(project, page, *SMALL, *args, "-p", "name", name, *more)
        assert code == 0, out[-3000:]
    return [project/"outputs"/page/name for name in ("looped", "cached")]

def equal(looped, cached):
    "Fails unless losses and predictions of the two runs agree up to half precision; the scores follow from them, but for the order of clips that nearly tie."
    losses = [pd.read_csv(folder/"history.csv")[["epoch", "train_loss"]] for folder in (looped, cached)]
    predictions = [pd.read_parquet(folder/"predictions.parquet") for folder in (looped, cached)]
    for pair in (losses, predictions): pd.testing.assert_frame_equal(*pair, rtol=1e-3, atol=1e-3)

def views(cache):
    "Size of each file of tokens, one view of 32 clips of 64 tokens of 96 halves being 1."
    return sorted(round(p.stat().st_size / (32*64*96*2)) for p in (cache/"tokens").rglob("*.safetensors"))

@pytest.mark.parametrize("page", ["02_baseline", "05_focal_balanced"])
def test_cached_tokens_train_as_the_encoder_in_the_loop(project, cache, page):
    equal(*both(project, page, "-p", "epochs", "2"))
    assert views(cache) == [1, 1, 1]                                          # val plain, train plain and mirrored

def test_stage_1_and_control_from_cached_tokens(project, cache):
    looped, cached = both(project, "09_staged", "-p", "epochs", "1", "-p", "epochs2", "1", *STILL)
    for part in ("stage1", "control", "."): equal(looped/part, cached/part)
    assert views(cache) == [1, 1, 1]

def test_cached_refuses_augmentation(project, cache):
    code, out = papermill(project, "09_staged", *SMALL, "-p", "cached", "True", "-p", "rotation", "0", "-p", "hue", "0")
    assert code and "set brightness 0, contrast 0, saturation 0, erasing 0, blur 0, or cached False" in out
    assert not (project/"outputs/09_staged").exists()                         # it said so before it made a folder
