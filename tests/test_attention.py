"""What the library notebook cannot check quickly: accuracy at ViT-L size, exact outputs in every mode, interventions against a definition."""

import copy, math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, VJEPA2Config, VJEPA2Model

from cvslab import attention as A
from cvslab.attention import (CONTROLS, Intervention, Windows, attention_inputs, attention_moments, attention_proofs, clear_attention, control,
                              mask_tokens, mass_loss, measure, positions, recorded_entropy, set_attention, windows_on)

GRID = (8, 16, 16)
HEADS = [0, 9]   # the heads checked at full size

def tiny(**kw):
    torch.manual_seed(0)
    sizes = dict(hidden_size=96, num_hidden_layers=4, num_attention_heads=4, crop_size=64, frames_per_clip=16, pred_hidden_size=48,
                 pred_num_attention_heads=4, pred_num_hidden_layers=1)
    return VJEPA2Model(VJEPA2Config(**sizes | kw)).eval()

def lora(model, targets="query|key|value", **kw):
    return inject_adapter_in_model(LoraConfig(r=4, target_modules=rf"encoder\.layer\.\d+\.attention\.({targets})", **kw), model)

VIDEO = torch.randn(2, 16, 3, 64, 64, generator=torch.Generator().manual_seed(1))
MASK = (torch.rand(2, 128, generator=torch.Generator().manual_seed(2)) > 0.7).float()
tokens = lambda model: model.get_vision_features(VIDEO)

# one ViT-L layer at 2,048 tokens -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def vit_l():
    "One ViT-L layer with LoRA on q, k and v, and a clip; `spy` keeps the queries and keys that reach attention."
    torch.manual_seed(0)
    model = VJEPA2Model(VJEPA2Config(num_hidden_layers=1, pred_num_hidden_layers=1))
    lora(model, init_lora_weights=False).eval().requires_grad_(False)
    seen = {}
    def spy(module, query, key, value, mask, **kw):
        seen.update(q=query, k=key)
        return AttentionInterface()["sdpa"](module, query, key, value, mask, **kw)
    AttentionInterface.register("spy", spy)
    return model, torch.randn(1, 16, 3, 256, 256), seen

def truth(q, k, values, bias, windows):
    "Entropy, expectations and marginal in float64, one head at a time, from the definition."
    scale, n = q.shape[-1]**-0.5, q.shape[2]
    q, k, values = q[0].double(), k[0].double(), values.double()
    extra = torch.zeros(1, n).double() if bias is None else bias.double()[None]
    if windows is not None:
        index = windows.fold(torch.arange(n).view(1, 1, n, 1))[:, 0, :, 0]
        allowed = torch.zeros(n, n, dtype=torch.bool)
        for w in index: allowed[w[:, None], w] = True
        for axis, (size, shift) in enumerate(zip(GRID, windows.shift)):
            if shift:   # no pair across the edge: both ends of it lie in the window that wraps around
                x = positions(GRID)[:, axis]
                allowed &= (x[:, None] < shift) == (x[None] < shift)
        extra = extra + torch.where(allowed, 0., -torch.inf).double()
    out = []
    for qh, kh in zip(q[HEADS], k[HEADS]):
        p = (scale * qh @ kh.T + extra).softmax(-1)
        out.append((torch.special.entr(p).sum(-1), p @ values, p.mean(0)))
    return [torch.stack(x) for x in zip(*out)]

CASES = {"flat": (1, {}), "sharp": (12, {}), "very sharp": (60, {}), "mask and bias": (12, dict(mask=True, bias=1.7, always=True)), "shifted": (12, {})}

@pytest.mark.parametrize("case, dtype", [("flat", torch.float32), ("very sharp", torch.float32), ("mask and bias", torch.float32), ("shifted", torch.float32),
                                         ("sharp", torch.bfloat16), ("mask and bias", torch.bfloat16)], ids=str)
def test_statistics_at_vit_l_size(vit_l, case, dtype):
    model, video, seen = vit_l
    sharpness, wanted = CASES[case]
    model = copy.deepcopy(model).to(dtype)
    model.encoder.layer[0].attention.query.base_layer.weight.mul_(sharpness)
    mask = (torch.rand(1, 2048, generator=torch.Generator().manual_seed(3)) > 0.8).float()
    if wanted: set_attention(model, **wanted)
    if case == "shifted":
        set_attention(model, window=(4, 8, 8))
        model.attention_state.sites[0].plan = Intervention((4, 8, 8), shift=True)   # the second of several layers
    windows = windows_on(GRID, (4, 8, 8), True) if case == "shifted" else None
    bias = Intervention(mask=True, bias=1.7).key_bias(mask)[0, 0, :, 0] if wanted else None
    inputs = partial(attention_inputs, model, mask) if wanted else nullcontext
    with torch.no_grad():
        with inputs(): plain = model.get_vision_features(video)
        with inputs(), measure(model, quantities=dict(anatomy=mask)) as stats: measured = model.get_vision_features(video)
        clear_attention(model)
        model.set_attn_implementation("spy")
        model.get_vision_features(video)
    assert torch.equal(plain, measured) and seen["q"].dtype == dtype
    places = positions(GRID)
    values = torch.cat([places, (places[:, 1:]**2).sum(-1, keepdim=True), mask[0, :, None]], -1)
    entropy, expectation, marginal = truth(seen["q"], seen["k"], values, bias, windows)
    share, here = 1e-4 if dtype == torch.float32 else 1e-3, lambda x: x[0, 0, HEADS]
    assert (here(stats.normalised_entropy) - entropy/math.log(2048)).abs().max() < share
    for i, (name, size) in enumerate(dict(time=7, row=15, column=15).items()):
        assert (here(stats.expectation(name)) - expectation[..., i]).abs().max() < share * size
    apart = (places[:, 1:]**2).sum(-1) - 2*(places[:, 1:] * expectation[..., 1:3]).sum(-1) + expectation[..., 3]
    assert (here(stats.squared_distance) - apart).abs().max() < share * 450
    assert (here(stats.expectation("anatomy")) - expectation[..., 4]).abs().max() < share
    assert (here(stats.marginal) - marginal).abs().max() < share * marginal.max()
    assert {"flat": entropy.mean() > 7, "sharp": 1 < entropy.mean() < 6, "very sharp": entropy.mean() < 1}.get(case, True)

def test_random_vit_l_is_nearly_uniform():
    torch.manual_seed(0)
    model = VJEPA2Model(VJEPA2Config(num_hidden_layers=1, pred_num_hidden_layers=1)).eval()
    with torch.no_grad(), measure(model, marginal=False) as stats: model.get_vision_features(torch.randn(1, 16, 3, 256, 256))
    assert abs(stats.normalised_entropy.mean().item() - 0.988) < 0.002

# one form against another --------------------------------------------------------------------------------------------------------------

def test_backends_agree_on_sharp_attention_with_shared_offset():
    torch.manual_seed(0)
    q, k, x = 6*torch.randn(1, 4, 640, 64), torch.randn(1, 4, 640, 64) + 5, torch.rand(1, 1, 640, 3)
    bias = 3*torch.rand(1, 1, 640, 1)
    for low in (torch.float32, torch.bfloat16):
        got = {b: attention_moments(q.to(low), k.to(low), x, bias=bias, backend=b) for b in ("fused", "chunked")}
        exact = attention_moments(q.to(low).double(), k.to(low).double(), x, bias=bias)
        assert exact.entropy.dtype == torch.float64
        for moments in got.values():
            for a, b in zip(moments, exact): assert (a - b).abs().max() < 3e-4

class Largest(TorchDispatchMode):
    "Remembers the size of the largest tensor made."
    numel = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor): self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out

@pytest.mark.parametrize("backend", ["fused", "chunked"])
def test_no_n_by_n_matrix(backend):
    q, k = torch.randn(2, 1, 4, 2048, 16)
    with Largest() as largest: attention_moments(q, k, backend=backend)
    assert largest.numel < 4 * 2048 * 2048 / 8

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu(dtype):
    torch.manual_seed(0)
    q, k, x = torch.randn(1, 4, 500, 64).to("cuda", dtype), torch.randn(1, 4, 500, 64).to("cuda", dtype), torch.rand(1, 1, 500, 3).cuda()
    exact = attention_moments(q.double(), k.double(), x)
    for backend in ("fused", "chunked"):
        for a, b in zip(attention_moments(q, k, x, backend=backend), exact): assert (a - b).abs().max() < 1e-3
    model = tiny().to("cuda", dtype)
    plain = model.get_vision_features(VIDEO.cuda())
    with measure(model): assert torch.equal(model.get_vision_features(VIDEO.cuda()), plain)
    assert not A._unfused

# outputs, gradients and what is left behind -----------------------------------------------------------------------------------------------

def step(model, measured, autocast=False):
    "Loss, gradients and statistics of one training step from a fixed random state."
    torch.manual_seed(0)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if measured:
            with measure(model) as stats: loss = model(VIDEO).predictor_output.last_hidden_state.float().pow(2).mean()
        else: stats, loss = None, model(VIDEO).predictor_output.last_hidden_state.float().pow(2).mean()
    loss.backward()
    return loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, stats

@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["whole", "lora", "peft", "autocast", "checkpointing", "reentrant", "dropout"])
def test_training_is_the_same_to_the_last_bit(kind, implementation):
    model = tiny(attention_probs_dropout_prob=0.2 if kind == "dropout" else 0.0)
    if kind == "lora": model = lora(model, lora_dropout=0.1)
    if kind == "peft": model = get_peft_model(model, LoraConfig(r=4, target_modules=["query", "key"]))
    A.encoder_of(model).set_attn_implementation(implementation)
    model.train()
    if kind in ("checkpointing", "reentrant"): model.gradient_checkpointing_enable(dict(use_reentrant=kind == "reentrant"))
    if kind == "reentrant": model.enable_input_require_grads()
    loss, grads, _ = step(model, False, kind == "autocast")
    loss2, grads2, stats = step(model, True, kind == "autocast")
    assert torch.equal(loss, loss2) and grads.keys() == grads2.keys() and len(grads) > 8
    assert all(torch.equal(grads[n], grads2[n]) for n in grads)
    assert stats.entropy.shape == (4, 2, 4, 128) and not stats.entropy.requires_grad
    assert A.encoder_of(model).config._attn_implementation == implementation

def test_wider_call_that_changes_bits_is_not_used(monkeypatch):
    model, plain = tiny().requires_grad_(False), tokens(tiny())
    flash, seen = A._fused, []
    def other_bits(q, k, v, scale, pairs=None):
        out, lse = flash(q, k, v, scale, pairs)
        seen.append(q.shape[-1])
        return out * (1 + 1e-6), lse
    monkeypatch.setattr(A, "_fused", other_bits)
    monkeypatch.setattr(A, "_bits", {})
    with pytest.warns(UserWarning, match="computed apart"), measure(model, marginal=False): assert torch.equal(tokens(model), plain)
    assert len(set(seen)) == 2   # one call for both, then statistics alone

@pytest.mark.parametrize("backend", ["fused", "chunked"])
def test_autocast_statistics_are_of_the_rounded_queries_and_keys(backend):
    model = tiny()
    for layer in model.encoder.layer: layer.attention.query.weight.data.mul_(20)
    attention = model.encoder.layer[1].attention
    rotate = attention.apply_rotary_embeddings
    attention.apply_rotary_embeddings = lambda *args: rotate(*args).float()   # as on a GPU, where autocast takes powers in float32
    with torch.autocast("cpu", torch.bfloat16):
        plain = tokens(model)
        with measure(model, [1], keep=True, backend=backend) as stats: assert torch.equal(tokens(model), plain)
    q, k = stats._kept[1][:2]
    assert q.dtype == k.dtype == torch.bfloat16
    p = (q.double() @ k.double().mT * 24**-0.5).softmax(-1)
    assert ((stats.entropy[0] - torch.special.entr(p).sum(-1)).abs().max() / math.log(128)) < 1e-4

def test_recomputation_in_backward_is_not_measured_again(monkeypatch):
    listened, listen = [], A.AttentionStats._listen
    monkeypatch.setattr(A.AttentionStats, "_listen", lambda self, layer, *args: listened.append(layer) or listen(self, layer, *args))
    model = lora(tiny()).train()
    model.gradient_checkpointing_enable()
    set_attention(model, [2], supervise=True)
    with measure(model), attention_inputs(model, MASK) as inputs:
        loss = tokens(model).pow(2).mean()
        mass = inputs.mass[2]
        (loss - mass.mean()).backward()
    assert listened == [0, 1, 2, 3] and inputs.mass[2] is mass

def test_a_pass_that_broke_off_is_not_mixed_with_the_one_before():
    model = tiny()
    with measure(model) as stats:
        tokens(model)
        assert stats.entropy.shape[0] == 4
        def fail(*args): raise KeyError("the third layer")
        model.encoder.layer[2].register_forward_pre_hook(fail)
        with pytest.raises(KeyError): tokens(model)
        with pytest.raises(RuntimeError, match=r"\[2, 3\] have not been measured"): stats.entropy

def test_nothing_is_left_after_an_exception_inside_the_model():
    model = tiny()
    keys = set(vars(model)), [set(vars(l.attention)) for l in model.encoder.layer]
    with pytest.raises(RuntimeError), measure(model): model(torch.randn(1, 16, 4, 64, 64))
    assert (set(vars(model)), [set(vars(l.attention)) for l in model.encoder.layer]) == keys
    assert model.config._attn_implementation == "sdpa" and not any(m._forward_hooks for m in model.modules())

def test_measuring_nests_and_meets_interventions_that_come_and_go():
    model = tiny()
    free = tokens(model)
    with measure(model, [0]) as outer:
        with measure(model, [0, 1]) as inner: assert torch.equal(tokens(model), free)
        assert torch.equal(outer.entropy[0], inner.entropy[0])
        set_attention(model, window=(1, 1, 1))
        tokens(model)
        assert outer.effective_tokens.max() < 1.0001
        assert inner.effective_tokens.max() > 2
    assert model.config._attn_implementation == "cvslab_sdpa"
    clear_attention(model)
    assert model.config._attn_implementation == "sdpa" and torch.equal(tokens(model), free)

# interventions --------------------------------------------------------------------------------------------------------------------------

def eager_with(extra):
    "An attention function that adds `extra` (broadcast to B, H, N, N) to the scores."
    def attention(module, q, k, v, mask, scaling, **kw):
        p = (q @ k.mT * scaling + extra).softmax(-1)
        return (p @ v).transpose(1, 2), p
    return attention

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bias_and_mask_against_a_definition(dtype):
    model = tiny().train()
    for layer in model.encoder.layer:
        for linear in (layer.attention.query, layer.attention.key, layer.attention.value, layer.attention.proj): linear.weight.data.mul_(5)
    model, bias = model.to(dtype), 1.3 * MASK
    for wanted, extra in ((dict(bias=1.3), bias), (dict(mask=True), torch.where(MASK > 0, 0., -torch.inf)), (dict(bias=1.3, mask=True), torch.where(MASK > 0, bias, -torch.inf))):
        set_attention(model, **wanted)
        with attention_inputs(model, MASK): got = tokens(model).float()
        clear_attention(model)
        plain = tokens(model).float()
        AttentionInterface.register("by_definition", eager_with(extra[:, None, None].to(dtype)))
        model.set_attn_implementation("by_definition")
        want = tokens(model).float()
        model.set_attn_implementation("sdpa")
        assert (got - want).abs().max() < (1e-4 if dtype == torch.float32 else 0.08)
        assert (plain - want).abs().max() > 0.2

def test_bias_survives_low_precision():
    q, k, v = torch.zeros(1, 1, 64, 16), torch.zeros(1, 1, 64, 16), torch.randn(1, 1, 64, 16)
    q[..., 0], k[..., :32, 0], mask = 1, 400, torch.arange(64)[None] >= 32
    bias = 50.07 * mask[:, None, :, None].float()   # 50.07 / scale is 400.56, which bfloat16 rounds to 400
    mass = A._intervened(*(x.bfloat16() for x in (q, k, v)), 0.125, 0.0, None, bias, mask.float())[1]
    assert (mass.float() - torch.tensor(0.07).sigmoid()).abs().max() < 0.005

@pytest.mark.parametrize("window", [(1, 2, 2), (2, 4, 2), (8, 1, 1), (4, 2, 4)])
@pytest.mark.parametrize("shift", [False, True])
def test_windows_against_a_definition(window, shift):
    model, grid = tiny(num_hidden_layers=2), (8, 4, 4)
    set_attention(model, window=window, shift=shift and window != (8, 1, 1))
    plans = [windows_on(grid, site.plan.window, site.plan.shift) for site in model.attention_state.sites]
    got = tokens(model)
    clear_attention(model)
    places, extras = positions(grid), []
    for plan in plans:
        allowed = torch.ones(128, 128, dtype=torch.bool)
        for axis, (n, w, s) in enumerate(zip(grid, plan.size, plan.shift)):
            x = places[:, axis]
            cell = (x - s) // w   # unrolled: a partial cell at each end
            allowed &= cell[:, None] == cell[None]
        extras.append(torch.where(allowed, 0., -torch.inf))
    layer = iter(extras)
    AttentionInterface.register("by_definition", lambda *args, **kw: eager_with(next(layer))(*args, **kw))
    model.set_attn_implementation("by_definition")
    assert (got - tokens(model)).abs().max() < 1e-5

def test_smaller_windows_cost_less():
    q = torch.randn(1, 4, 2048, 16)
    def pairs_scored(size):
        q_ = Windows(GRID, size).fold(q)
        return q_.shape[0] * q_.shape[2]**2
    assert [pairs_scored(s) for s in (GRID, (1, 16, 16), (1, 8, 8), (1, 4, 4))] == [2048*2048, 2048*256, 2048*64, 2048*16]
    calls, sdpa = [], torch.nn.functional.scaled_dot_product_attention
    model = tiny()
    set_attention(model, window=(1, 2, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(A.F, "scaled_dot_product_attention", lambda q, *a, **kw: calls.append(q.shape) or sdpa(q, *a, **kw))
        tokens(model)
    assert calls == [(2*32, 4, 4, 24)] * 4

def test_whole_window_is_global_attention():
    model = tiny()
    free = tokens(model)
    set_attention(model, window=(8, 4, 4))
    assert (tokens(model) - free).abs().max() < 1e-5

def test_recomputed_layer_without_its_mask_is_an_error():
    model = lora(tiny()).train()
    model.gradient_checkpointing_enable()
    set_attention(model, layers=[1], mask=True)
    with attention_inputs(model, MASK): loss = tokens(model).pow(2).mean()
    with pytest.raises(RuntimeError, match="backward too"): loss.backward()

def test_supervision_raises_the_mass_it_is_asked_to_raise():
    model = lora(tiny(), "query|key").train()
    for n, p in model.named_parameters(): p.requires_grad_("lora_" in n)
    set_attention(model, layers=[3], supervise=True)
    assert [p.turned for p in attention_proofs(model, VIDEO, MASK)] == [True]
    optimizer, mass = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2), []
    for _ in range(12):
        with attention_inputs(model, MASK) as inputs:
            tokens(model)
            mass_loss(model)({}, {}).backward()
        mass.append(inputs.mass[3].mean())
        optimizer.step()
        optimizer.zero_grad()
    assert mass[-1] > mass[0] + 0.1

def test_masked_tokens_are_zero_in_training_alone():
    model = tiny().train()
    mask_tokens(model)
    with attention_inputs(model, MASK): out = tokens(model)
    assert (out[MASK == 0] == 0).all() and (out[MASK == 1] != 0).any(-1).all()
    assert torch.equal(tokens(model.eval()), tokens(tiny()))

# controls -------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("backend", ["fused", "chunked"])
def test_controls_are_read_and_the_record_is_blind(backend):
    n, anatomy = 2048, (positions(GRID)[:, 1] > 11).float()
    known = {"identity": 0, "uniform": math.log(n), "one token": 0, "blocks": math.log(n/16), "anatomy": math.log(anatomy.sum())}
    record = {}
    for name in CONTROLS:
        q, k = control(name, GRID, mask=anatomy)
        m = attention_moments(q, k, anatomy[:, None], scale=1.0, backend=backend)
        if name in known: assert (m.entropy - known[name]).abs().max() < 2e-3, name
        else:   # far from the edges: 1.5 log(2 pi e) nats but for the eight bins
            middle = (positions(GRID) - torch.tensor([3.5, 7.5, 7.5])).abs().amax(-1) < 1
            assert abs(m.entropy[0, 0, middle].mean() - 1.5*math.log(2*math.pi*math.e)) < 0.01
        record[name] = torch.special.entr(m.received.mean(1)/n).sum() / math.log(n)
        if name == "anatomy": assert (m.expectation - 1).abs().max() < 1e-5
    assert all(record[name] > 0.995 for name in ("identity", "uniform", "gaussian", "blocks"))
    assert record["one token"] < 0.01

def test_record_does_not_see_adapters():
    base, adapted = tiny(), lora(tiny(), init_lora_weights=False)
    assert torch.allclose(recorded_entropy(adapted, VIDEO, 0), recorded_entropy(base, VIDEO, 0))   # of the first layer, whose input is the same
    readings = []
    for model in (base, adapted):
        with torch.no_grad(), measure(model, [0], marginal=False) as stats: tokens(model)
        readings.append(stats.entropy)
    assert (readings[0] - readings[1]).abs().max() > 0.05
