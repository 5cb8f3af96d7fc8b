"What is saved under the name of weights and is none: named, with its remedy, by everything that meets it first, before anything is loaded."
import argparse, collections, gzip, io, json, re, shutil, struct, tarfile, zipfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model, Swinv2Config, Swinv2Model, VideoMAEConfig, VideoMAEModel, VJEPA2Config, VJEPA2Model

from cvslab import models, runner
from cvslab.demo import DEMO_BACKBONE, draw_oct
from cvslab.oct_models import check_checkpoint, checkpoint_card, load_oct_encoder, open_checkpoint

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1302\n"
PAGE = b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>"

def packed(write) -> bytes:
    out = io.BytesIO()
    write(out)
    return out.getvalue()

def archive(**files):
    def write(out):
        with zipfile.ZipFile(out, "w") as z:
            for name, data in files.items(): z.writestr(name, data)
    return packed(write)

def tarred(out):
    with tarfile.open(fileobj=out, mode="w") as t: t.add(DEMO_BACKBONE/"config.json", "config.json")

# bytes of a whole file -> what stands there instead, and the word that names it
BROKEN = {
    "empty": (lambda whole: b"", "an empty file"),
    "pointer": (lambda whole: POINTER, "a pointer of git-lfs"),
    "page": (lambda whole: PAGE, "a web page"),
    "page after a blank line": (lambda whole: b"\n\n  <HTML>\n<body>404</body>", "a web page"),
    "answer of a bucket": (lambda whole: b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page"),
    "text": (lambda whole: b"Repository not found", "text, no weights.*Repository not found"),
    "json": (lambda whole: b'{"error": "gated"}', "text, no weights"),
    "gzip": (gzip.compress, "a packed archive"),
    "tar": (lambda whole: packed(tarred), "a packed archive"),
    "hdf5": (lambda whole: b"\x89HDF\r\n\x1a\n" + bytes(64), "a file of another library"),
    "numpy": (lambda whole: packed(lambda out: np.save(out, np.zeros(9))), "a file of another library"),
    "zeros": (lambda whole: bytes(4096), "no file of weights"),
    "half": (lambda whole: whole[:len(whole) // 2], "half a file"),
    "all but a byte": (lambda whole: whole[:-1], "half a file"),
}
BROKEN_SAFE = BROKEN | {
    "cut in its header": (lambda whole: whole[:100], "half a file: its header alone"),
    "bytes too many": (lambda whole: whole + b"xx", "damaged: its header speaks of"),
    "a header that is none": (lambda whole: struct.pack("<Q", 8) + b"{brokenx", "its header is no JSON"),
    "of torch.save": (lambda whole: packed(lambda out: torch.save(dict(a=torch.zeros(2)), out)), r"a file of torch.save \(zip\), no safetensors"),
}
BROKEN_TORCH = BROKEN | {
    "a zip": (lambda whole: archive(readme="x"), "a zip archive that torch did not write"),
    "npz": (lambda whole: packed(lambda out: np.savez(out, a=np.zeros(2))), "a zip archive that torch did not write"),
}

@pytest.fixture
def folder(tmp_path):
    "A copy of the demo's transformers folder, at a place with a blank, an umlaut and a #."
    return Path(shutil.copytree(DEMO_BACKBONE, tmp_path/"Gewichte für #3"))

def batch(backbone, *args):
    "Exit code and words of cvslab-batch for a run on `backbone`."
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        return runner.main(["10b.yaml", "-p", "data", "demo", "-p", "backbone", str(backbone), "--dry-run", *args]), said.getvalue()

def named_everywhere(folder, words, error=(ValueError, FileNotFoundError)):
    for first in (models.check_backbone, models.input_size, models.depth_of, models.load_backbone):
        with pytest.raises(error, match=words): first(str(folder))
    code, said = batch(folder)
    assert code == 2 and "nothing was started" in said
    assert re.search(words, said, re.S), said

def test_a_whole_folder_passes(folder):
    assert models.check_backbone(str(folder)).crop_size == models.input_size(str(folder)) == 64 and models.depth_of(str(folder)) == 4
    assert batch(folder)[0] == 0

@pytest.mark.parametrize("form", BROKEN_SAFE)
def test_broken_weights_of_a_folder_are_named_by_everything_that_meets_them(folder, form):
    break_it, words = BROKEN_SAFE[form]
    (folder/"model.safetensors").write_bytes(break_it((folder/"model.safetensors").read_bytes()))
    named_everywhere(folder, f"model.safetensors of backbone .* is .*{words}", ValueError)

@pytest.mark.parametrize("dtype, said", [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_quantised_weights_are_named_by_everything_that_meets_them(folder, dtype, said):
    state = load_file(folder/"model.safetensors")
    save_file(state | {k: v.to(dtype) for k, v in state.items() if k.endswith("query.weight")}, folder/"model.safetensors", dict(format="pt"))
    named_everywhere(folder, f"model.safetensors of backbone .* is quantised: it holds weights of the type {said},", ValueError)

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precision_are_read(folder, dtype):
    state = load_file(folder/"model.safetensors")
    save_file({k: v.to(dtype) for k, v in state.items()}, folder/"model.safetensors", dict(format="pt"))
    assert {p.dtype for p in models.load_backbone(str(folder)).parameters()} == {torch.float32}

@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_finite_numbers_are_named(folder, value):
    state = load_file(folder/"model.safetensors")
    name = next(k for k in state if k.endswith("layer.1.mlp.fc1.bias"))
    state[name][3] = value
    save_file(state, folder/"model.safetensors", dict(format="pt"))
    with pytest.raises(ValueError, match=f"backbone .* are no finite numbers .1 tensors: {name}"): models.load_backbone(str(folder))

@pytest.mark.parametrize("form", ["empty", "pointer", "page", "text", "half", "gzip"])
def test_a_broken_config_is_named(folder, form):
    (folder/"config.json").write_bytes(BROKEN[form][0]((folder/"config.json").read_bytes()))
    named_everywhere(folder, "config.json of backbone .* is no JSON of settings .it begins with", ValueError)

def change(folder, **values):
    config = json.loads((folder/"config.json").read_text()) | values
    (folder/"config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

@pytest.mark.parametrize("values, words", [
    (dict(architectures=None), "names no `architectures`.*VJEPA2Model"), (dict(architectures=[]), "names no `architectures`"),
    (dict(architectures="VJEPA2Model"), "a list of class names is needed"), (dict(architectures=[3]), "a list of class names is needed"),
    (dict(architectures=["BertModel"]), "holds a BertModel, which reads input_ids and no pixels"), (dict(hidden_size="wide"), "config.json of backbone .* is not that of VJEPA2Model")])
def test_a_config_of_something_else_is_named(folder, values, words):
    change(folder, **values)
    named_everywhere(folder, words, ValueError)

SMALL = dict(hidden_size=48, num_hidden_layers=1, num_attention_heads=2)
OTHERS = {
    "videomae": lambda: VideoMAEModel(VideoMAEConfig(**SMALL, intermediate_size=64, image_size=32)),
    "images": lambda: Dinov2Model(Dinov2Config(**SMALL, image_size=28, patch_size=14)),
    "swin": lambda: Swinv2Model(Swinv2Config(image_size=64, patch_size=4, embed_dim=24, depths=[1, 1], num_heads=[1, 2], window_size=4)),
    "text": lambda: BertModel(BertConfig(**SMALL, intermediate_size=64, vocab_size=64)),
    "vjepa2": lambda: VJEPA2Model(VJEPA2Config(**SMALL, crop_size=64, pred_hidden_size=24, pred_num_hidden_layers=1, pred_num_attention_heads=1)),
}

TAKEN = dict(any={*OTHERS} - {"text"}, vjepa2={"vjepa2"}, swin={"swin"})

@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_of_another_class_is_named_and_one_of_its_own_is_taken(tmp_path, kind):
    OTHERS[kind]().save_pretrained(tmp_path/kind)
    for asked, taken in TAKEN.items():
        if kind in taken:
            assert models.check_backbone(str(tmp_path/kind), asked).architectures
        else:
            with pytest.raises(ValueError, match=r"holds a \w+(: choose one of|, which reads input_ids and no pixels)"):
                models.check_backbone(str(tmp_path/kind), asked)
    if kind == "text":
        named_everywhere(tmp_path/kind, "holds a BertModel, which reads input_ids and no pixels", ValueError)

def test_the_batch_runner_asks_for_the_kind_that_the_page_reads(tmp_path):
    for kind, make in OTHERS.items():
        make().save_pretrained(tmp_path/kind)
    def plan(file, **values):
        here = {k: str(tmp_path/v) if v in OTHERS else v for k, v in values.items()}
        return runner.plan([file], values=dict(data="demo") | here)
    assert plan("18/videomae.yaml", backbone="videomae") and plan("18/dinov3.yaml", backbone="images")
    assert plan("14.yaml", backbone="vjepa2", frames="swin")
    assert plan("14.yaml", frames="swin", arm="swincvs", backbone="nowhere")                       # this arm has no V-JEPA 2
    wrong = [("18/videomae.yaml", dict(backbone="text")), ("14.yaml", dict(backbone="videomae", frames="swin")),
             ("14.yaml", dict(backbone="demo", frames="vjepa2"))]
    for file, values in wrong:
        with pytest.raises(runner.ParameterError, match=r"holds a \w+(: choose one of|, which reads)"):
            plan(file, **values)

def shards(folder, n=2):
    "The weights of `folder` in `n` files with an index; returns their names."
    tensors = load_file(folder/"model.safetensors")
    (folder/"model.safetensors").unlink()
    parts = {f"model-{i+1:05d}-of-{n:05d}.safetensors": sorted(tensors)[i::n] for i in range(n)}
    for name, keys in parts.items(): save_file({k: tensors[k].clone() for k in keys}, folder/name, metadata=dict(format="pt"))
    (folder/"model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map={k: name for name, keys in parts.items() for k in keys})))
    return list(parts)

def test_a_folder_in_shards_is_read(folder):
    whole = models.load_backbone(str(folder)).state_dict()
    shards(folder, 3)
    assert all(torch.equal(v, whole[k]) for k, v in models.load_backbone(str(folder)).state_dict().items()) and batch(folder)[0] == 0

@pytest.mark.parametrize("hurt, words", [
    (lambda f, names: (f/names[1]).unlink(), r"lacks \['model-00002-of-00003.safetensors'\], 1 of the 3 files its index names"),
    (lambda f, names: (f/names[0]).write_bytes(POINTER), "model-00001-of-00003.safetensors of backbone .* is a pointer of git-lfs"),
    (lambda f, names: (f/names[2]).write_bytes((f/names[2]).read_bytes()[:-9]), "model-00003-of-00003.safetensors of backbone .* half a file"),
    (lambda f, names: shutil.copy(f/names[0], f/names[1]), "model-00002-of-00003.safetensors of backbone .* another file than the index means: it lacks"),
    (lambda f, names: (f/"model.safetensors.index.json").write_bytes(PAGE), "index.json of backbone .* is no index of weights"),
    (lambda f, names: (f/"model.safetensors.index.json").write_text("{}"), "index.json of backbone .* is no index of weights"),
    (lambda f, names: (f/"model.safetensors.index.json").unlink(), r"lacks \['model.safetensors'\]: it holds .*model-00001"),
], ids=["a shard lost", "a shard a pointer", "a shard cut", "a shard twice", "index a page", "index empty", "index lost"])
def test_a_folder_in_shards_that_lacks_something(folder, hurt, words):
    hurt(folder, shards(folder, 3))
    named_everywhere(folder, words)

@pytest.mark.parametrize("names, words", [
    (["pytorch_model.bin"], "pytorch_model.bin is a pickle, which is not read; .*save_pretrained"),
    (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], "pytorch_model.bin is a pickle"),
    (["adapter_model.safetensors", "adapter_config.json"], r"lacks \['model.safetensors'\]: it holds .*'adapter_config.json'"),
    ([], r"lacks \['model.safetensors'\]")])
def test_a_folder_without_safetensors(folder, names, words):
    (folder/"model.safetensors").unlink()
    for name in names: (folder/name).write_bytes(b"x")
    named_everywhere(folder, words, FileNotFoundError)

def test_a_folder_without_config_and_a_file_and_nothing(folder):
    named_everywhere(folder/"model.safetensors", "is a file: give the transformers folder", ValueError)
    (folder/"config.json").unlink()
    named_everywhere(folder, r"lacks \['config.json'\]: it holds .*model.safetensors", FileNotFoundError)
    named_everywhere(folder/"nowhere at all", "no backbone folder", FileNotFoundError)

# ---- checkpoints of the OCT encoder

@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return draw_oct(tmp_path_factory.mktemp("oct")/"drawn", scale=0.001, broken=False)/"checkpoints/single_domain_01.pt"

@pytest.fixture(scope="module")
def good(source): return open_checkpoint(source)

@pytest.mark.parametrize("form", BROKEN_TORCH)
def test_a_file_that_is_no_checkpoint_is_called_that(source, tmp_path, form):
    break_it, words = BROKEN_TORCH[form]
    (tmp_path/"c.pt").write_bytes(break_it(source.read_bytes()))
    for first in (check_checkpoint, open_checkpoint, lambda path: load_oct_encoder(path, "demo")):
        with pytest.raises(ValueError, match=f"checkpoint c.pt is {words}") as said: first(tmp_path/"c.pt")
        assert "PyTorch" not in str(said.value) and "weights_only" not in str(said.value)
    with pytest.raises(runner.ParameterError, match=f"checkpoint=.*c.pt is {words}"): runner.plan(["31.yaml"], values=dict(data="demo", checkpoint=str(tmp_path/"c.pt")))

def test_a_torchscript_program_a_cut_pickle_and_a_foreign_class(source, tmp_path, good):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path/"script.pt")
    with pytest.raises(ValueError, match="script.pt is a TorchScript archive.*state_dict"): check_checkpoint(tmp_path/"script.pt")
    torch.save(good, tmp_path/"old.pt", _use_new_zipfile_serialization=False)
    assert load_oct_encoder(tmp_path/"old.pt", "demo").card["loss"] == good["loss"]
    (tmp_path/"old.pt").write_bytes((tmp_path/"old.pt").read_bytes()[:5000])
    with pytest.raises(ValueError, match="old.pt is (damaged|refused)") as said: open_checkpoint(tmp_path/"old.pt")
    assert "PyTorch" not in str(said.value)
    torch.save(good | dict(extra=torch.nn.Linear(1, 1)), tmp_path/"module.pt")
    with pytest.raises(ValueError, match="module.pt is refused: it holds torch.nn.*Linear.*torch.save"): open_checkpoint(tmp_path/"module.pt")

def test_a_place_with_no_file_says_what_is_there(source, tmp_path):
    for path, error, words in ((source.parent/"other.pt", FileNotFoundError, "holds .*single_domain_01.pt"), (source.parent, ValueError, "is a folder"),
                               (tmp_path/"no/c.pt", FileNotFoundError, "nor the folder")):
        for first in (check_checkpoint, open_checkpoint):
            with pytest.raises(error, match=words): first(path)

rng = np.random.default_rng(0)
EXTRAS = {
    "loss a dict": dict(loss=dict(train=0.4, val=0.5)), "loss a list": dict(loss=[0.9, 0.5]), "loss an array": dict(loss=np.array([0.9, 0.5])), "loss none": dict(loss=None),
    "loss text": dict(loss="0.4 (val)"), "loss a tensor": dict(loss=torch.tensor(0.4)), "loss of numpy": dict(loss=np.float16(0.4)), "epoch a tensor": dict(epoch=torch.tensor(7)),
    "epoch a dict": dict(epoch=dict(stage=1)), "state of numpy": dict(rng=np.random.get_state()), "a float16": dict(best=np.float16(0.4)), "a bool": dict(done=np.bool_(True)),
    "a uint32": dict(seed=np.uint32(7), seeds=np.arange(3, dtype="u4")), "an int16 array": dict(ids=np.arange(3, dtype="i2")), "a text of numpy": dict(name=np.str_("x")),
    "config a list": dict(config=["--lr", "1e-4"]), "config text": dict(config="lr: 1e-4"),
    "config a Namespace": dict(config=argparse.Namespace(image_size=[16, 64, 64], lr=1e-4)), "config with one size": dict(config=dict(image_size=64)), "config empty": dict(config=None),
    "a path": dict(args=argparse.Namespace(data=Path("/data/x"))), "counts": dict(seen=collections.Counter("ab"), order=collections.OrderedDict(a=1)), "a number as key": {7: "x"},
}

@pytest.mark.parametrize("what", EXTRAS)
def test_what_lies_beside_the_weights_never_costs_a_checkpoint(good, tmp_path, what):
    torch.save(good | EXTRAS[what], tmp_path/"c.pt")
    encoder, plain = load_oct_encoder(tmp_path/"c.pt", "demo"), checkpoint_card(good)
    assert encoder.card["context"]["fingerprint"] == plain["context"]["fingerprint"]
    assert encoder.card["loss"] is None or isinstance(encoder.card["loss"], float)
    odd = " | ".join(encoder.card["warnings"])
    for key in ("loss", "epoch"):
        value = EXTRAS[what].get(key)
        assert (f"its {key} is no number" in odd) == (isinstance(value, (dict, list, str)) or value is not None and np.shape(value) not in ((), (1,))), odd
        assert value is None or (encoder.card[key] is None) == (f"its {key} is no number" in odd)
    assert ("not compared" in odd) == (what == "config with one size")
    if what == "config a Namespace": assert encoder.card["config"] == dict(image_size=[16, 64, 64], lr=1e-4)

@pytest.mark.parametrize("name", ["c.pt", "c.safetensors", "größe #2.pt"])
def test_safetensors_under_any_name_are_read(good, tmp_path, name):
    save_file({k: v.contiguous() for k, v in good["model_state_dict"].items()}, tmp_path/name)
    check_checkpoint(tmp_path/name)
    assert load_oct_encoder(tmp_path/name, "demo").card["context"] == checkpoint_card(good)["context"]
