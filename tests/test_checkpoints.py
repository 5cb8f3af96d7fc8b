"Files of Meta's layout: which encoder is read, what is refused and by which name, and the way to a folder and back, bit for bit."
import argparse, copy, json, math
from collections import Counter, OrderedDict
from datetime import timedelta
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from transformers import VJEPA2Config, VJEPA2ForVideoClassification, VJEPA2Model

from cvslab import checkpoints, models, runner, vjepa
from cvslab.checkpoints import load_checkpoint, main, read_checkpoint, to_file, to_folder, to_meta
from cvslab.vjepa import VJEPA21Config, VJEPA21Model, VJEPA2EncoderModel

SIZES = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, crop_size=64, mlp_ratio=3)
PREDICTOR = dict(pred_hidden_size=24, pred_num_attention_heads=2, pred_num_hidden_layers=2, pred_num_mask_tokens=3, pred_zero_init_mask_tokens=False)
CLIP = torch.randn(1, 4, 3, 32, 48, generator=torch.Generator().manual_seed(0))

def encoder(newer=False, seed=0):
    torch.manual_seed(seed)
    if newer: return VJEPA21Model(VJEPA21Config(**SIZES | dict(num_hidden_layers=12))).eval()
    return VJEPA2EncoderModel(VJEPA2Config(**SIZES)).eval()

def meta(model, prefix="module.backbone."): return {prefix + n: t for n, t in to_meta(model.state_dict(), isinstance(model, VJEPA21Model)).items()}

def put(path, **content):
    torch.save(content, path)
    return path

def same(a, b, where=""):
    "The same containers, names in their order, values and bits."
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor): assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)), where
    elif isinstance(a, dict):
        assert list(a) == list(b) and [type(k) for k in a] == [type(k) for k in b], where
        for k in a: same(a[k], b[k], f"{where}/{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)): same(x, y, f"{where}/{i}")
    else: assert a == b or (a != a and b != b), where

# which encoder

@pytest.mark.parametrize("keys, chosen", [(("encoder", "target_encoder"), "target_encoder"), (("target_encoder", "encoder"), "target_encoder"), (("encoder",), "encoder"),
                                          (("ema_encoder", "target_encoder", "encoder"), "ema_encoder"), (("target_encoder",), "target_encoder")])
@pytest.mark.parametrize("prefix", ["module.backbone.", "module.", "backbone.", ""])
def test_the_average_is_chosen_where_there_are_several(tmp_path, keys, chosen, prefix):
    made = {key: encoder(seed=i) for i, key in enumerate(keys)}
    model = load_checkpoint(put(tmp_path/"x.pt", **{k: meta(m, prefix) for k, m in made.items()}, epoch=3), heads=4)
    assert model.card["key"] == chosen and model.card["values"] == dict(epoch=3) and set(model.card["left_out"]) == set(keys) - {chosen}
    assert torch.equal(model.get_vision_features(CLIP), made[chosen].get_vision_features(CLIP)) and not model.training
    other = load_checkpoint(tmp_path/"x.pt", heads=4, which=keys[0])
    assert torch.equal(other.get_vision_features(CLIP), made[keys[0]].get_vision_features(CLIP))

def test_a_file_of_tensors_alone_and_one_with_a_key_of_its_own(tmp_path):
    model = encoder()
    torch.save(meta(model, ""), tmp_path/"bare.pth")
    assert torch.equal(load_checkpoint(tmp_path/"bare.pth", heads=4).get_vision_features(CLIP), model.get_vision_features(CLIP))
    put(tmp_path/"own.pt", teacher=meta(model))
    with pytest.raises(ValueError, match="has no encoder under .*'teacher'.*which"): load_checkpoint(tmp_path/"own.pt", heads=4)
    assert load_checkpoint(tmp_path/"own.pt", heads=4, which="teacher").card["key"] == "teacher"
    with pytest.raises(ValueError, match="has no 'student': choose from 'teacher'"): load_checkpoint(tmp_path/"own.pt", heads=4, which="student")

def test_the_predictor_is_read_where_its_heads_are_known(tmp_path):
    torch.manual_seed(0)
    whole = VJEPA2Model(VJEPA2Config(**SIZES, **PREDICTOR)).eval()
    state = to_meta(whole.state_dict())
    predictor = {f"module.backbone.{n}": state.pop(n) for n in list(state) if n.startswith(("predictor_", "mask_tokens."))}
    file = put(tmp_path/"x.pt", target_encoder={f"module.backbone.{n}": t for n, t in state.items()}, predictor=predictor)
    model = load_checkpoint(file, heads=4)
    assert type(model) is VJEPA2EncoderModel and "pred_heads" in model.card["left_out"]["predictor"]
    model = load_checkpoint(file, heads=4, pred_heads=2)
    assert type(model) is VJEPA2Model and all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), whole.state_dict().values()))
    square = torch.randn(1, 4, 3, 64, 64)
    torch.testing.assert_close(load_checkpoint(file, heads=4, pred_heads=2, size=64)(square).predictor_output.last_hidden_state, whole(square).predictor_output.last_hidden_state)
    lost = {n: t for n, t in predictor.items() if not n.endswith("mask_tokens.1")}
    with pytest.raises(ValueError, match="mask_tokens"): load_checkpoint(put(tmp_path/"y.pt", target_encoder={n: t for n, t in state.items()}, predictor=lost), heads=4, pred_heads=2)

def test_a_model_whose_weights_are_mapped_is_saved_copied_and_trained_like_any_other(tmp_path):
    state = meta(encoder())
    file = put(tmp_path/"x.pt", encoder=state)
    model, before = load_checkpoint(file, heads=4), file.read_bytes()
    model.save_pretrained(tmp_path/"saved")
    assert torch.equal(models.load_backbone(str(tmp_path/"saved")).get_vision_features(CLIP), model.get_vision_features(CLIP))
    untouched, kept = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    model.get_vision_features(CLIP).square().sum().backward()
    with torch.no_grad(): model.encoder.layer[0].attention.query.weight.add_(1.)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, kept[n])}
    assert changed == {"encoder.layer.0.attention.query.weight"} and file.read_bytes() == before           # neither its neighbours nor the file
    assert all(torch.equal(t, kept[n]) for n, t in untouched.state_dict().items())
    assert models.fingerprint(load_checkpoint(file, heads=4).requires_grad_(False)) == models.fingerprint(encoder().requires_grad_(False))

# every tensor accounted for

FAULTS = {"blocks.1.attn.qkv.bias": "missing", "patch_embed.proj.bias": "missing", "blocks.0.mlp.fc2.weight": "missing", "norms_block.1.weight": "missing", "img_mod_embed": "missing",
          "norm.weight": "missing", "blocks.1.norm2.bias": "of another shape", "blocks.0.attn.proj.weight": "of another shape", "blocks.0.attn.qkv.weight": "of another shape",
          "blocks.0.attn.q_norm.weight": "left over", "cls_token": "left over", "blocks.1.ls1.gamma": "left over", "head.weight": "left over"}

@pytest.mark.parametrize("name, how", FAULTS.items(), ids=FAULTS)
@pytest.mark.parametrize("newer", [True, False], ids=["2.1", "2"])
def test_each_fault_is_an_error_that_names_the_tensor(tmp_path, name, how, newer):
    state = meta(encoder(newer))
    whole = f"module.backbone.{name}"
    if how != "left over" and whole not in state: return        # of the other kind
    if how == "missing": del state[whole]
    else: state[whole] = torch.zeros(7) if how == "left over" else state[whole][:-1]
    with pytest.raises(ValueError, match=rf"1 {how}: .*{name}"): load_checkpoint(put(tmp_path/"x.pt", encoder=state), heads=4)

def test_names_that_begin_in_several_ways_and_what_is_no_such_encoder(tmp_path):
    state = meta(encoder())
    with pytest.raises(ValueError, match="begin in several ways"): load_checkpoint(put(tmp_path/"a.pt", encoder=state | {"blocks.0.norm1.weight": torch.ones(48)}), heads=4)
    with pytest.raises(ValueError, match=r"of shape \[48, 3, 16, 16\]"): load_checkpoint(put(tmp_path/"b.pt", encoder=state | {"module.backbone.patch_embed.proj.weight": torch.ones(48, 3, 16, 16)}), heads=4)
    with pytest.raises(ValueError, match="patch_embed.proj.weight is missing"): load_checkpoint(put(tmp_path/"c.pt", encoder={"layer1.0.conv1.weight": torch.ones(4)}), heads=4)
    with pytest.raises(ValueError, match="holds no tensors by name"): load_checkpoint(put(tmp_path/"d.pt", encoder=state | dict(step=3)), heads=4)

# heads and sizes

@pytest.mark.parametrize("heads", [5, 7, 9, 16, 48, 0, -4])
def test_heads_that_do_not_divide_are_refused(tmp_path, heads):
    with pytest.raises(ValueError, match=f"{heads} heads do not divide its width of 48"): load_checkpoint(put(tmp_path/"x.pt", encoder=meta(encoder())), heads=heads)

def test_heads_come_from_a_released_width_and_depth_or_are_told(tmp_path, monkeypatch):
    file = put(tmp_path/"x.pt", encoder=meta(encoder()))
    with pytest.raises(ValueError, match="a width of 48 is of no released size .*x.pt.json"): load_checkpoint(file)
    (tmp_path/"x.pt.json").write_text('{"heads": 2, "size": 96}')
    assert (load_checkpoint(file).config.num_attention_heads, models.input_size(str(file))) == (2, 96) and load_checkpoint(file, heads=4).config.num_attention_heads == 4
    (tmp_path/"x.pt.json").write_text('{"head": 2}')
    with pytest.raises(ValueError, match=r"says \['head'\]: choose from"): load_checkpoint(file)
    (tmp_path/"x.pt.json").unlink()
    monkeypatch.setitem(checkpoints.SIZES, "tiny", dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4))
    model = load_checkpoint(file)
    assert model.config.num_attention_heads == 4 and model.card["heads_from"] == "by the width of a released size"
    state = {n: t for n, t in meta(encoder()).items() if ".blocks.1." not in n}
    with pytest.raises(ValueError, match="has 1 blocks, and the released encoder of width 48 has 2"): load_checkpoint(put(tmp_path/"y.pt", encoder=state))

@pytest.mark.parametrize("said, words", [('{"heads": "4"}', "heads is '4': write a whole number"), ('{"heads": true}', "heads is True: write"), ('{"heads": 4.0}', "heads is 4.0"), ('{"heads": 4, "size": "64"}', "size is '64'"),
                                         ('{"heads": 4, "which": ["encoder"]}', "which is .*write the name of a part"), ("[4]", "holds a list: write"), ('{"heads": null}', "heads is None")])
def test_a_file_beside_that_says_what_is_no_number_or_name(tmp_path, said, words):
    file = put(tmp_path/"x.pt", encoder=meta(encoder()))
    (tmp_path/"x.pt.json").write_text(said)
    with pytest.raises(ValueError, match=rf"x\.pt\.json:? {words}"): models.check_backbone(str(file))

@pytest.mark.parametrize("newer", [True, False], ids=["2.1", "2"])
def test_heads_as_an_argument_are_enough(tmp_path, newer):
    model = models.load_backbone(str(put(tmp_path/"x.pt", encoder=meta(encoder(newer)))), heads=8, size=96)
    assert (model.config.num_attention_heads, model.config.crop_size, model.card["heads_from"]) == (8, 96, "as said")

def test_a_file_is_no_encoder_of_single_frames(tmp_path):
    file = str(put(tmp_path/"x.pt", encoder=meta(encoder())))
    (tmp_path/"x.pt.json").write_text('{"heads": 4, "size": 64}')
    assert models.check_backbone(file, "vjepa2").crop_size == models.input_size(file) == 64
    for call in (lambda: models.check_backbone(file, "swin"), lambda: models.input_size(dict(kind="swin", frames=file)), lambda: models.load_frames(file)):
        with pytest.raises(ValueError, match="give the transformers folder"): call()
    assert "transformers folder" in runner._missing("frames", file, "swin") and not runner._missing("backbone", file, "vjepa2")

@pytest.mark.parametrize("reading", [None, dict(layers=(0,)), dict(centre=True)])
def test_the_card_of_a_file_goes_with_the_model(tmp_path, reading):
    file = put(tmp_path/"x.pt", encoder=meta(encoder()))
    (tmp_path/"x.pt.json").write_text('{"heads": 4, "size": 64}')
    model = models.build_model(str(file), lora=dict(rank=2), reading=reading)
    assert model.backbone.card["key"] == "encoder" and model.backbone.card["heads"] == 4

@pytest.mark.parametrize("name, newer, size", [("vitl.pt", False, 256), ("vitg-384.pt", False, 384), ("vjepa2_1_vitb_dist_vitG_384.pt", True, 384), ("mine.pt", True, 384), ("jepa-e256.pth.tar", True, 384),
                                               ("x_256px.pt", True, 256), ("a_256_384.pt", False, 256), ("run_1000.pt", False, 256)])
def test_pixels_are_told_by_the_name_or_those_of_the_release(tmp_path, name, newer, size):
    assert read_checkpoint(put(tmp_path/name, encoder=meta(encoder(newer))), heads=4).config.crop_size == size

@pytest.mark.parametrize("hidden", range(40, 200, 7))
def test_widths_of_the_mlp_come_back_as_they_were(hidden):
    for width in (24, 48, 1408, 1664): assert int(width * checkpoints._ratio(width, hidden)) == hidden
    for width, wide in ((28, 61), (44, 49), (1696, 8191)): assert int(width * (wide/width)) == wide - 1 and int(width * checkpoints._ratio(width, wide)) == wide
    assert all(int(s["hidden_size"] * s.get("mlp_ratio", 4)) == {1408: 6144, 1664: 8192}.get(s["hidden_size"], 4*s["hidden_size"]) for s in vjepa.SIZES.values())

# what is no checkpoint, or no harmless one

class Bad:
    def __reduce__(self): return print, ("it ran",)

REFUSED = {"a path": (Path("x"), "pathlib"), "code": (Bad(), "print"), "arguments": (argparse.Namespace(lr=1), "argparse"), "a fraction": (Fraction(1, 2), "fractions"), "numpy": (np.arange(3), "numpy"),
           "a number of numpy": (np.float64(3.), "numpy"), "a set": ({1, 2}, "set"), "bytes": (b"x", "bytes"), "a counter": (Counter("a"), "Counter"), "a time": (timedelta(1), "timedelta"),
           "a complex number": (1j, "complex"), "a dtype": (torch.float32, "dtype")}

@pytest.mark.parametrize("where", ["beside", "deep"])
@pytest.mark.parametrize("value, name", REFUSED.values(), ids=REFUSED)
def test_anything_but_tensors_and_plain_values_is_refused_by_name(tmp_path, capsys, value, name, where):
    file = put(tmp_path/"x.pt", encoder=meta(encoder()), more=value if where == "beside" else dict(a=[1, dict(b=value)]))
    with pytest.raises(ValueError, match=name): load_checkpoint(file, heads=4)
    assert "it ran" not in capsys.readouterr().out

def test_the_older_format_of_torch_is_read_and_refused_alike(tmp_path):
    model = encoder()
    torch.save(dict(encoder=meta(model), epoch=1), tmp_path/"old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_checkpoint(tmp_path/"old.pt", heads=4).get_vision_features(CLIP), model.get_vision_features(CLIP))
    torch.save(dict(encoder=meta(model), more=Bad()), tmp_path/"bad.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="print"): load_checkpoint(tmp_path/"bad.pt", heads=4)

def test_what_is_no_checkpoint_is_called_that(tmp_path):
    whole = put(tmp_path/"x.pt", encoder=meta(encoder())).read_bytes()
    save_file({"a": torch.ones(2)}, tmp_path/"s.pt")
    for name, content, says in (("cut.pt", whole[:len(whole)//2], "half a file"), ("lfs.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
                                ("page.pt", b"<!DOCTYPE html><html>", "<!DOCTYPE html>"), ("empty.pt", b"", "an empty file"), ("packed.pt", b"\x1f\x8b" + bytes(600), "a packed archive"), ("keras.pt", b"\x89HDF\r\n" + bytes(40), "of another library"), ("s.pt", None, "a safetensors file")):
        if content is not None: (tmp_path/name).write_bytes(content)
        with pytest.raises(ValueError, match=says): load_checkpoint(tmp_path/name)
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path/"program.pt")
    with pytest.raises(ValueError, match=r"program\.pt is a TorchScript archive"): load_checkpoint(tmp_path/"program.pt")
    torch.save([1], tmp_path/"list.pt")
    with pytest.raises(ValueError, match="holds a list"): load_checkpoint(tmp_path/"list.pt")
    with pytest.raises(FileNotFoundError, match="no file"): models.load_backbone(str(tmp_path/"nothing.pt"))
    with pytest.raises(FileNotFoundError, match="no file"): models.input_size(str(tmp_path/"nothing.pt"))
    with pytest.raises(ValueError, match="leave heads out"): models.load_backbone("demo", heads=4)

# to a folder and back

def filled(newer):
    "A file with all that training scripts put beside the weights."
    first, average = (meta(encoder(newer, seed)) for seed in (0, 1))
    for state in (first, average): state["module.backbone.pos_embed"] = torch.randn(1, 4, 48)
    predictor = {"module.backbone.predictor_embed.weight": torch.randn(24, 48), "module.backbone.mask_tokens.0": torch.randn(1, 1, 24)}
    opt = dict(state={0: dict(step=torch.tensor(3.), exp_avg=torch.randn(4).bfloat16()), 1: dict(step=torch.tensor(4.))}, param_groups=[dict(lr=1e-4, betas=(0.9, 0.999), params=[0, 1])])
    return dict(epoch=7, encoder=first, predictor=predictor, opt=opt, scaler=None, target_encoder=OrderedDict(average), loss=math.nan, best=-math.inf, name="ä", done=True, lr=1e-4,
                flags=torch.tensor([True, False]), none=[], tied=[first["module.backbone.norm.bias"] if not newer else first["module.backbone.img_mod_embed"]], bits=torch.tensor(5, dtype=torch.uint8))

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("newer", [True, False], ids=["2.1", "2"])
def test_there_and_back_bit_for_bit(tmp_path, newer, dtype):
    content = filled(newer)
    content["target_encoder"] = OrderedDict((n, t.to(dtype)) for n, t in content["target_encoder"].items())
    torch.save(content, tmp_path/"x.pt")
    to_folder(tmp_path/"x.pt", tmp_path/"x", heads=4, size=64)
    to_file(tmp_path/"x", tmp_path/"y.pt")
    same(torch.load(tmp_path/"y.pt", weights_only=True), content)
    a, b = models.load_backbone(str(tmp_path/"x")), models.load_backbone(str(tmp_path/"x.pt"), heads=4)
    assert a.config.crop_size == 64 and torch.equal(a.get_vision_features(CLIP), b.get_vision_features(CLIP)) and a.dtype == torch.float32

@pytest.mark.parametrize("told, kinds", [(dict(heads=2), VJEPA2EncoderModel), (dict(heads=2, pred_heads=2), VJEPA2Model)])
def test_metas_own_file_there_and_back(tmp_path, told, kinds):
    file = ROOT/"tests/data/vjepa2_small.pt"
    card = to_folder(file, tmp_path/"x", **told)
    assert type(models.load_backbone(str(tmp_path/"x"))) is kinds and card["left_out"]["pos_embed"]
    to_file(tmp_path/"x", tmp_path/"y.pt")
    same(torch.load(tmp_path/"y.pt", weights_only=True), torch.load(file, weights_only=True))

def test_the_encoder_alone_and_a_folder_of_anyone(tmp_path):
    torch.save(filled(False), tmp_path/"x.pt")
    to_folder(tmp_path/"x.pt", tmp_path/"x", encoder_only=True, heads=4)
    to_file(tmp_path/"x", tmp_path/"y.pt")
    back, content = torch.load(tmp_path/"y.pt", weights_only=True), filled(False)
    same(back, dict(target_encoder=content["target_encoder"]))
    torch.manual_seed(0)
    whole = VJEPA2Model(VJEPA2Config(**SIZES, **PREDICTOR)).eval()
    whole.save_pretrained(tmp_path/"plain")
    to_file(tmp_path/"plain", tmp_path/"plain.pt")
    again = load_checkpoint(tmp_path/"plain.pt", heads=4, pred_heads=2)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), whole.state_dict().values()))
    VJEPA2ForVideoClassification(VJEPA2Config(**SIZES, **PREDICTOR, num_labels=3)).save_pretrained(tmp_path/"classes")
    with pytest.raises(ValueError, match="has no place for (pooler|classifier)"): to_file(tmp_path/"classes", tmp_path/"classes.pt")
    assert not (tmp_path/"classes.pt").exists()

def test_the_command(tmp_path, capsys):
    file = put(tmp_path/"x.pt", target_encoder=meta(encoder()), epoch=2)
    assert main([str(file), str(tmp_path/"x")]) == 2 and "say heads" in capsys.readouterr().err and not (tmp_path/"x").exists()
    assert main([str(file), str(tmp_path/"x"), "--heads", "4"]) == 0
    said = capsys.readouterr().out
    assert '"key": "target_encoder"' in said and "written:" in said
    assert main([str(file), str(tmp_path/"x"), "--heads", "4"]) == 2 and "is there already" in capsys.readouterr().err
    assert main([str(tmp_path/"x"), str(tmp_path/"y.bin")]) == 2 and "no name of a checkpoint" in capsys.readouterr().err
    assert main([str(tmp_path/"x"), str(tmp_path/"y.pt"), "--heads", "4"]) == 2 and "leave the options out" in capsys.readouterr().err
    assert main([str(tmp_path/"x"), str(tmp_path/"y.pt")]) == 0
    same(torch.load(tmp_path/"y.pt", weights_only=True), torch.load(file, weights_only=True))
    assert not list(tmp_path.glob(".*tmp*"))
    with pytest.raises(SystemExit) as done: main(["--help"])
    assert done.value.code == 0 and "attention heads" in capsys.readouterr().out

@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize("name, change, words", [
    ("encoder.layer.0.norm1.weight", lambda t: t[:5], r"1 of another shape: encoder.layer.0.norm1.weight \[5\] for \[48\]"),
    ("encoder.layer.1.attention.key.weight", lambda t: None, "1 missing: encoder.layer.1.attention.key.weight"),
    ("encoder.layer.1.attention.value.bias", lambda t: torch.cat([t, t]), "1 of another shape: encoder.layer.1.attention.value.bias"),
    ("encoder.layer.7.norm1.weight", lambda t: torch.ones(48), "1 left over: encoder.layer.7.norm1.weight"),
    ("encoder.layernorm.bias", lambda t: t.to(torch.int8), "1 of whole numbers: encoder.layernorm.bias torch.int8")])
def test_each_fault_of_a_folder_is_named_on_the_way_back(tmp_path, name, change, words, noted):
    to_folder(put(tmp_path/"x.pt", target_encoder=meta(encoder())), tmp_path/"x", heads=4)
    if not noted: (tmp_path/"x/checkpoint.json").unlink()
    state = load_file(tmp_path/"x/model.safetensors")
    state[name] = change(state.get(name))
    save_file({n: t.contiguous() for n, t in state.items() if t is not None}, tmp_path/"x/model.safetensors", dict(format="pt"))
    with pytest.raises(ValueError, match=words): to_file(tmp_path/"x", tmp_path/"y.pt")
    assert not (tmp_path/"y.pt").exists()

def test_whole_numbers_are_no_weights(tmp_path):
    state = meta(encoder())
    state["module.backbone.blocks.0.norm1.weight"] = state["module.backbone.blocks.0.norm1.weight"].to(torch.int8)
    with pytest.raises(ValueError, match=r"1 of whole numbers: module.backbone.blocks.0.norm1.weight torch.int8"): load_checkpoint(put(tmp_path/"x.pt", encoder=state), heads=4)

def test_the_folder_keeps_the_card_beside_the_file_and_folders_are_made(tmp_path):
    (tmp_path/"weights").mkdir()
    file = put(tmp_path/"weights/x.pt", target_encoder=meta(encoder()))
    (tmp_path/"weights/README.md").write_text("---\nlicense: mit\ndatasets: [cholec80]\n---\n")
    to_folder(file, tmp_path/"a/b/x", heads=4)
    [beside], [inside] = models.backbone_cards(str(file)), models.backbone_cards(str(tmp_path/"a/b/x"))
    assert inside["datasets"] == beside["datasets"] == ["cholec80"] and inside["license"] == "mit"
    to_file(tmp_path/"a/b/x", tmp_path/"c/d/y.pt")
    same(torch.load(tmp_path/"c/d/y.pt"), torch.load(file))

def test_a_folder_that_lost_a_tensor_is_refused_on_the_way_back(tmp_path):
    to_folder(put(tmp_path/"x.pt", target_encoder=meta(encoder())), tmp_path/"x", heads=4)
    state = load_file(tmp_path/"x/model.safetensors")
    del state["encoder.layernorm.weight"]
    save_file(state, tmp_path/"x/model.safetensors", dict(format="pt"))
    with pytest.raises(ValueError, match="1 missing: encoder.layernorm.weight"): to_file(tmp_path/"x", tmp_path/"y.pt")
    with pytest.raises(ValueError, match="1 missing keys: encoder.layernorm.weight"): models.load_backbone(str(tmp_path/"x"))
    assert json.loads((tmp_path/"x/config.json").read_text())["architectures"] == ["VJEPA2EncoderModel"]
