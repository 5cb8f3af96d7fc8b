"Every fault of the recorded encoder loader, planted in a checkpoint: nothing loads in part, nothing from the file runs."
import os

import pytest
import torch
from torch._utils import _rebuild_device_tensor_from_cpu_tensor, _rebuild_device_tensor_from_numpy
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cvslab.attention import measure
from cvslab.demo import OCT_CHECKPOINTS, draw_oct
from cvslab.oct_models import ENCODERS, OctConfig, OctEncoder, build_oct_model, distinct, load_oct_encoder, open_checkpoint, random_oct_encoder


@pytest.fixture(scope="module")
def files(tmp_path_factory): return draw_oct(tmp_path_factory.mktemp("oct")/"drawn", scale=0.001, broken=False)/"checkpoints"


@pytest.fixture
def altered(files, tmp_path):
    "Writes a checkpoint with changed names, tensors or keys and returns its path."
    def write(change=lambda state: state, **keys):
        content = open_checkpoint(files/"single_domain_01.pt")
        torch.save(content | dict(model_state_dict=change(content["model_state_dict"])) | keys, tmp_path/"a.pt")
        return tmp_path/"a.pt"
    return write


def renamed(old, new): return lambda state: {k.replace(old, new, 1): v for k, v in state.items()}
def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_the_drawn_checkpoints_say_what_they_are(files):
    cards = {kind: load_oct_encoder(files/f"{kind}.pt", "demo").card for kind in OCT_CHECKPOINTS}
    warned = {kind: " | ".join(card["warnings"]) for kind, card in cards.items()}
    assert all("target encoder: no bias and no norm ever left" in w for w in warned.values())
    assert "epoch 0" in warned["multi_domain"] and "loss 0.0" in warned["multi_domain"] and "context encoder: only" in warned["multi_domain"]
    assert "epoch" not in warned["single_domain_01"] and "context encoder" not in warned["single_domain_01"]
    card = cards["single_domain_02"]
    assert card["config"]["wandb"] == dict(project="oct-foundation", log_artifacts=True) and card["config"]["image_size"] == [16, 64, 64]
    assert (card["context"]["parameters"], card["context"]["moved"], card["target"]["moved"]) == (328_416, 1, 0)
    distinct(list(cards.values()))


@pytest.mark.parametrize("which", ["context", "target"])
def test_the_encoder_asked_for_is_the_one_loaded(files, which):
    state = open_checkpoint(files/"single_domain_01.pt")["model_state_dict"]
    encoder = load_oct_encoder(files/"single_domain_01.pt", "demo", which)
    prefix = dict(context="context_encoder.", target="target_encoder.encoder.")[which]
    assert all(torch.equal(v, state[prefix + k]) for k, v in encoder.state_dict().items())


@pytest.mark.parametrize("wrap", ["module.", "_orig_mod.", "module._orig_mod.", "backbone."])
def test_prefixes_of_wrappers_are_seen_through(files, altered, wrap):
    whole = load_oct_encoder(files/"single_domain_01.pt", "demo")
    assert same(load_oct_encoder(altered(lambda state: {wrap + k: v for k, v in state.items()}), "demo"), whole)
    assert same(load_oct_encoder(altered(renamed("context_encoder.", "context_encoder." + wrap)), "demo"), whole)


def test_the_official_layout_is_read(files, tmp_path):
    whole, target = (load_oct_encoder(files/"single_domain_01.pt", "demo", which) for which in ("context", "target"))
    wrapped = lambda model: {f"module.backbone.{k}": v for k, v in model.state_dict().items()}
    torch.save(dict(encoder=wrapped(whole), target_encoder=wrapped(target), predictor={}, epoch=3), tmp_path/"a.pt")
    assert same(load_oct_encoder(tmp_path/"a.pt", "demo"), whole) and same(load_oct_encoder(tmp_path/"a.pt", "demo", "target"), target)


def without(name): return lambda state: {k: v for k, v in state.items() if k != name}


@pytest.mark.parametrize("change, words", [
    (renamed("context_encoder.", "student."), r"no context encoder in the checkpoint: its names start with \['predictor', 'student', 'target_encoder'\]"),
    (without("context_encoder.blocks.1.attn.qkv.bias"), r"1 missing: blocks.1.attn.qkv.bias"),
    (lambda s: s | {"context_encoder.cls_token": torch.zeros(1)}, r"1 left over: cls_token"),
    (lambda s: s | {"context_encoder.norm.weight": torch.ones(5)}, r"1 of another shape: norm.weight \[5\] for \[96\]"),
    (lambda s: {k: v for k, v in s.items() if "blocks.1." not in k}, r"1 blocks in the file, 2 in the encoder.*12 missing"),
    (lambda s: s | {k.replace("blocks.1.", "blocks.2."): v for k, v in s.items() if "blocks.1." in k}, r"3 blocks in the file, 2 in the encoder.*12 left over")])
def test_what_does_not_match_is_refused_whole(altered, change, words):
    with pytest.raises(ValueError, match=words): load_oct_encoder(altered(change), "demo")


def test_a_demo_file_is_no_vit_b(altered):
    with pytest.raises(ValueError, match=r"trained on volumes \[16, 64, 64\]"): load_oct_encoder(altered())
    with pytest.raises(ValueError, match="2 blocks in the file, 12 in the encoder"): load_oct_encoder(altered(config={}))


def test_weights_that_are_not_finite_are_named(altered):
    path = altered(lambda s: s | {"context_encoder.norm.weight": torch.full((96,), float("nan"))}, loss=float("nan"))
    assert {"context encoder: weights that are not finite", "loss nan: validation measured nothing"} <= set(load_oct_encoder(path, "demo").card["warnings"])


def test_identical_encoders_under_two_names_cannot_be_compared(files, altered):
    cards = [load_oct_encoder(p, "demo").card for p in (files/"single_domain_01.pt", altered(epoch=7))]
    with pytest.raises(ValueError, match="a.pt and single_domain_01.pt hold the same context encoder"): distinct(cards)


class _Runs:
    def __reduce__(self): return os.system, ("touch ran_from_a_checkpoint",)


class _OnTPU:
    "Pickles as a tensor that lives on an XLA device."
    def __init__(self, tensor, how): self.tensor, self.how = tensor, how
    def __reduce__(self):
        data = self.tensor.numpy() if self.how is _rebuild_device_tensor_from_numpy else self.tensor
        return self.how, (data, self.tensor.dtype, "xla:0", False)


def test_nothing_in_a_file_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(model_state_dict={}, config=_Runs()), tmp_path/"a.pt")
    with pytest.raises(ValueError, match=r"a.pt is refused: it holds \w+.system, which is not on the list.*nothing was loaded"): open_checkpoint(tmp_path/"a.pt")
    assert not (tmp_path/"ran_from_a_checkpoint").exists()
    (tmp_path/"b.pt").write_bytes((tmp_path/"a.pt").read_bytes()[:200])
    with pytest.raises(ValueError, match="b.pt is half a file"): open_checkpoint(tmp_path/"b.pt")


@pytest.mark.parametrize("how", [_rebuild_device_tensor_from_numpy, _rebuild_device_tensor_from_cpu_tensor])
def test_tensors_of_a_tpu_come_to_the_cpu(tmp_path, how):
    torch.save(dict(w=_OnTPU(torch.arange(3.0), how)), tmp_path/"a.pt")
    w = open_checkpoint(tmp_path/"a.pt")["w"]
    assert w.device.type == "cpu" and w.tolist() == [0, 1, 2]


def test_attention_passes_through_the_table_of_attention_functions():
    seen, encoder, volume = [], random_oct_encoder(ENCODERS["demo"], 0), torch.randn(1, 1, 16, 64, 64)
    def listen(module, query, key, value, mask, **kwargs):
        seen.append((module, tuple(query.shape), kwargs["scaling"]))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    AttentionInterface.register("oct_listen", listen)
    plain = encoder(volume)
    encoder.set_attn_implementation("oct_listen")
    assert torch.equal(encoder(volume), plain)
    assert seen == [(layer.attention, (1, 4, 64, 24), 24**-0.5) for layer in encoder.encoder.layer]
    assert random_oct_encoder(ENCODERS["demo"], 0).config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="unknown attention 'flush'"): encoder.set_attn_implementation("flush")


def test_recomputed_activations_give_the_same_gradients():
    grads = []
    for recompute in (False, True):
        model = build_oct_model(random_oct_encoder(ENCODERS["demo"], 0), standardise=False).train()
        model.backbone.requires_grad_(True)
        if recompute: model.backbone.gradient_checkpointing_enable()
        torch.manual_seed(1)
        model.head.load_state_dict(dict(weight=torch.randn(4, 96, generator=torch.Generator().manual_seed(2)), bias=torch.zeros(4)))
        model(torch.randn(2, 1, 16, 64, 64, generator=torch.Generator().manual_seed(3)))["logits"].square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*grads)


def test_a_frozen_encoder_makes_no_graph_and_standardisation_no_parameters():
    model = build_oct_model(random_oct_encoder(ENCODERS["demo"], 0), head="mlp")
    out = model(torch.randn(2, 1, 16, 64, 64))
    assert not out["pooled"].requires_grad and out["logits"].requires_grad
    assert not list(model.standardise.parameters()) and "standardise.mean" in model.state_dict()
    with pytest.raises(ValueError, match="at least two train volumes"): model.standardise.fit(out["pooled"][:1])


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="whole patches"): OctEncoder(OctConfig((18, 64, 64), hidden_size=96, num_attention_heads=4))


def test_the_attention_instrument_reads_this_encoder():
    model, volume = build_oct_model(random_oct_encoder(ENCODERS["demo"], 0)).eval(), torch.randn(2, 1, 16, 64, 64, generator=torch.Generator().manual_seed(1))
    plain = model(volume)["logits"]
    with measure(model, keep=True) as stats: measured = model(volume)["logits"]
    assert torch.equal(plain, measured) and model.backbone.config._attn_implementation == "sdpa"
    assert stats.grid == (4, 4, 4) and stats.entropy.shape == (2, 2, 4, 64)
    block = model.backbone.blocks[0]
    x = model.backbone.patch_embed(volume) + model.backbone.pos_embed
    q, k, _ = block.attn.qkv(block.norm1(x)).view(2, 64, 3, 4, -1).permute(2, 0, 3, 1, 4)
    p = (q @ k.mT * 24**-0.5).softmax(-1)
    torch.testing.assert_close(stats.entropy[0], torch.special.entr(p).sum(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stats.rows(0, 5), p[:, :, 5], rtol=1e-4, atol=1e-5)
