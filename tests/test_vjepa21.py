"V-JEPA 2 and 2.1 against Meta's own tokens, against a plain second implementation on many grids, and in everything the library does to an encoder."
import copy, math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from pages import run_page, small
from transformers import AutoConfig, AutoModel, VJEPA2Config, VJEPA2Model

from cvslab import models, vjepa
from cvslab.attention import clip_grid, mask_tokens, measure, set_attention
from cvslab.checkpoints import load_checkpoint, to_meta
from cvslab.vjepa import VJEPA21Config, VJEPA21Model, VJEPA2EncoderModel

SIZES = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=2, crop_size=64, mlp_ratio=2, initializer_range=0.3)

def made(newer: bool, **changes):
    "A small random encoder, its positions and norms far from trivial."
    torch.manual_seed(0)
    kind, config = (VJEPA21Model, VJEPA21Config(**SIZES | dict(hierarchical_layers=[0, 1, 2, 3]) | changes)) if newer else (VJEPA2EncoderModel, VJEPA2Config(**SIZES | changes))
    model = kind(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name: p.add_(torch.randn_like(p)*0.2)
    return model

# vectors of Meta's code on random weights: `<name>.npz` beside `<name>.pt`

VECTORS = sorted((ROOT/"tests/data").glob("vjepa2*.npz"))

@pytest.mark.parametrize("file", VECTORS, ids=lambda p: p.stem)
@pytest.mark.parametrize("dtype, most", [(torch.float64, 1e-6), (torch.float32, 3e-4)], ids=["float64", "float32"])
@torch.no_grad()
def test_tokens_of_metas_code(file, dtype, most):
    seen = np.load(file)
    model = load_checkpoint(file.with_suffix(".pt"), heads=int(seen["heads"])).to(dtype)
    groups = {name.split("_")[0] for name in seen if name.endswith("_pixels32")}
    assert groups >= {"a", "b"}
    def far(x, name): return (x.double() - torch.from_numpy(seen[name]).double()).abs().max().item()
    for group in groups:
        video = torch.from_numpy(seen[f"{group}_pixels32"]).to(dtype) / 32
        with measure(model, [int(seen["layer"])], keep=True) as stats: tokens = model.get_vision_features(video)
        assert far(tokens, f"{group}_tokens") < most, group
        if f"{group}_hierarchical" in seen: assert far(model.get_vision_features(video, hierarchical=True), f"{group}_hierarchical") < most, group
        if f"{group}_attention" in seen:
            q, k, scale = stats._kept[int(seen["layer"])][:3]
            assert far((scale * q[:1] @ k[:1].mT).softmax(-1), f"{group}_attention") < most, group

# a second implementation, from the tensors by Meta's names

def turned(x, places, corrected):
    "(B, H, N, D) queries or keys, each of three parts turned by its places (N,)."
    n, parts = 2*((x.shape[-1] // 3) // 2), []
    for a, place in enumerate(places):
        part, out = x[..., a*n:(a + 1)*n], torch.zeros_like(x[..., :n])
        for j in range(n):
            other, sign = (j + 1, -1) if j % 2 == 0 else (j - 1, 1)
            frequency = 10000.0**(-(j // 2 if corrected else j % (n // 2)) / (n / 2))
            out[..., j] = part[..., j]*(place*frequency).cos() + sign*part[..., other]*(place*frequency).sin()
        parts.append(out)
    return torch.cat([*parts, x[..., 3*n:]], -1)

def reference(model, video) -> list:
    "Normalised tokens of the levels (2.1) or of the last layer (2)."
    newer, w, heads, patch = isinstance(model, VJEPA21Model), to_meta(model.state_dict(), isinstance(model, VJEPA21Model)), model.config.num_attention_heads, model.config.patch_size
    image = newer and video.shape[1] == 1
    name = "patch_embed_img.proj" if image else "patch_embed.proj"
    x = F.conv3d(video.transpose(1, 2), w[f"{name}.weight"], w[f"{name}.bias"], stride=(1 if image else 2, patch, patch))
    bins, rows, columns = x.shape[2:]
    x = x.flatten(2).mT + (w["img_mod_embed" if image else "video_mod_embed"] if newer else 0)
    t, r, c = (i.flatten().double() for i in torch.meshgrid(*(torch.arange(n) for n in (bins, rows, columns)), indexing="ij"))
    if newer: r, c = r*15/max(1, rows - 1), c*15/max(1, columns - 1)
    def norm(x, name): return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)
    def linear(x, name): return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])
    levels = []
    for i in range(model.config.num_hidden_layers):
        q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (turned(part, (t, r, c), newer) for part in (q, k))
        out = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        x = x + linear(out.transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")), f"blocks.{i}.mlp.fc2")
        if newer and i in model.config.hierarchical_layers: levels.append(norm(x, f"norms_block.{len(levels)}"))
    return levels or [norm(x, "norm")]

CLIPS = [(4, 64, 64), (4, 32, 96), (6, 96, 32), (2, 16, 80), (4, 80, 16), (2, 16, 16), (4, 128, 128)]     # frames, height, width

@pytest.mark.parametrize("frames, height, width", [*CLIPS, (1, 64, 64), (1, 32, 80), (3, 48, 64)])
@pytest.mark.parametrize("newer", [True, False], ids=["2.1", "2"])
@torch.no_grad()
def test_a_second_implementation(newer, frames, height, width):
    if not newer and frames % 2: return             # V-JEPA 2 knows no images, and pages refuse to drop a frame
    model, video = made(newer).double(), torch.randn(2, frames, 3, height, width, dtype=torch.float64)
    wanted = reference(model, video)
    torch.testing.assert_close(model.get_vision_features(video), wanted[-1], atol=1e-9, rtol=0)
    if newer: torch.testing.assert_close(model.get_vision_features(video, hierarchical=True), torch.cat(wanted, -1), atol=1e-9, rtol=0)

def test_a_wide_frame_is_never_taken_for_a_square():
    "The tokens of transformers' own class on its square grid are others; those of a loaded backbone are right."
    plain = made(False).double()
    wide = torch.randn(1, 4, 3, 32, 128, dtype=torch.float64)
    square = VJEPA2Model(VJEPA2Config(**SIZES, pred_hidden_size=24, pred_num_attention_heads=1, pred_num_hidden_layers=1)).double()
    square.encoder.load_state_dict(plain.encoder.state_dict())
    wrong, [right] = square.get_vision_features(wide), reference(plain, wide)
    assert (wrong - right).abs().max() > 0.1
    torch.testing.assert_close(vjepa.cache_rotary(square).get_vision_features(wide), right, atol=1e-9, rtol=0)

@pytest.mark.parametrize("newer", [True, False])
@pytest.mark.parametrize("height, width", [(60, 64), (64, 72), (8, 8)])
def test_pixels_that_fill_no_patch_are_refused(newer, height, width):
    with pytest.raises(ValueError, match=f"frames of {height} x {width} pixels do not fill patches of 16"): made(newer).get_vision_features(torch.randn(1, 4, 3, height, width))

@pytest.mark.parametrize("newer", [True, False])
def test_saved_and_loaded_and_trained_alike(newer, tmp_path):
    model = made(newer)
    model.save_pretrained(tmp_path/"folder")
    again, video = models.load_backbone(str(tmp_path/"folder")), torch.randn(1, 4, 3, 32, 64)
    assert type(again) is type(model) and torch.equal(again.get_vision_features(video), model.get_vision_features(video))
    if newer:
        assert type(AutoModel.from_pretrained(tmp_path/"folder")) is VJEPA21Model and AutoConfig.from_pretrained(tmp_path/"folder").hierarchical_layers == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="no predictor"): again(video, skip_predictor=False)
    kept = copy.deepcopy(again).train()
    kept.gradient_checkpointing_enable()
    for m in (again, kept):
        out = m.get_vision_features(video).square().sum()
        m.get_vision_features(video[..., :32]).sum()          # another grid before the layers are computed again
        out.backward()
    for a, b in zip(again.encoder.parameters(), kept.encoder.parameters()):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None: torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_what_it_is(dtype):
    model, video = made(True), torch.randn(1, 4, 3, 48, 64)
    tokens = copy.deepcopy(model).to(dtype).get_vision_features(video.to(dtype))
    assert tokens.dtype == dtype and F.cosine_similarity(tokens.float(), model.get_vision_features(video), dim=-1).mean() > 0.99

def test_positions_of_chosen_tokens_are_those_of_the_grid():
    "As the pretraining asks for them: the tokens of a square frame by their numbers."
    attention, x = made(True).double().encoder.layer[0].attention, torch.randn(2, 2, 32, 24, dtype=torch.float64)
    whole = attention.apply_rotary_embeddings(x, (2, 4, 4))
    chosen = torch.stack([torch.randperm(32)[:9].sort().values for _ in range(2)])
    index = chosen[:, None, :, None].expand(-1, 2, -1, 24)
    part = attention.apply_rotary_embeddings(x.gather(2, index), attention.get_position_ids(x[:, 0, :9], chosen))
    torch.testing.assert_close(part, whole.gather(2, index), atol=1e-12, rtol=0)

# what the library does to an encoder

@pytest.mark.parametrize("newer", [True, False])
def test_statistics_windows_and_masks_take_the_grid_of_the_frames(newer):
    model, video = made(newer), torch.randn(2, 4, 3, 32, 96)
    with torch.no_grad(), measure(model) as stats: model.get_vision_features(video)
    assert stats.grid == (2, 2, 6) and stats.expectation("column").max() > 2
    set_attention(model, window=(1, 2, 2))
    with torch.no_grad(), measure(model) as stats: model.get_vision_features(video)
    assert stats.effective_tokens.max() <= 4.001
    model = made(newer)
    mask_tokens(model, always=True)
    from cvslab.attention import attention_inputs
    mask = torch.zeros(2, 24)
    mask[:, :5] = 1
    with attention_inputs(model, mask): tokens = model.get_vision_features(video)
    assert torch.equal((tokens != 0).any(-1), mask.bool())

def test_adapters_layers_and_readings_are_found_by_the_same_names(tmp_path):
    made(True, num_hidden_layers=12, hierarchical_layers=None).save_pretrained(tmp_path/"b")
    model = models.build_model(str(tmp_path/"b"), lora=dict(rank=4, targets=["q", "k", "v", "o", "fc1", "fc2"]), reading=dict(layers=models.spaced_layers(12, 3)))
    assert models.input_size(str(tmp_path/"b")) == 64 and models.depth_of(str(tmp_path/"b")) == 12 and models.upper_layers(str(tmp_path/"b"), .25) == [9, 10, 11]
    there = models.lora_modules(model.backbone)
    assert (len(there), sum(there.values())) == models.lora_size(model.backbone.config, 4, ["q", "k", "v", "o", "fc1", "fc2"])
    video = torch.randn(1, 4, 3, 64, 64)
    levels = model.backbone.video.eval().get_vision_features(video, hierarchical=True).chunk(4, -1)
    torch.testing.assert_close(model.eval().encode(video), torch.cat([levels[3], *levels[:3]], 1))      # each level by its own norm
    unfrozen = models.unfreeze(models.load_backbone(str(tmp_path/"b")).requires_grad_(False), 2)
    assert models.unfreeze_proof(unfrozen, 2).turned and unfrozen.encoder.layernorm.weight.requires_grad
    cut = models.load_backbone(str(tmp_path/"b"), depth=5, size=32)
    assert cut.get_vision_features(video).shape == (1, 32, 48)
    with pytest.raises(ValueError, match="5 layers were kept"): cut.get_vision_features(video, hierarchical=True)

def test_pages_refuse_frames_that_would_be_dropped_and_read_single_ones(tmp_path):
    made(True).save_pretrained(tmp_path/"newer")
    newer, older = models.build_model(str(tmp_path/"newer")), models.build_model("demo")
    for model in (newer, older):
        with pytest.raises(ValueError, match="3 frames do not fill tubelets of 2"): model.encode(torch.randn(1, 3, 3, 64, 64))
    with pytest.raises(ValueError, match="1 frames do not fill"): older.encode(torch.randn(1, 1, 3, 64, 64))
    assert newer.encode(torch.randn(1, 1, 3, 64, 64)).shape == (1, math.prod(clip_grid(newer, 1)), 48) == (1, 16, 48)

# the price of V-JEPA 2's positions

@pytest.mark.parametrize("width", [24, 64, 80])
def test_scores_at_a_fixed_distance(width):
    old, new = (vjepa.score_against_position(width, corrected, offset=3, starts=16, pairs=64) for corrected in (False, True))
    spread = {name: (t.groupby("pair")["score"].max() - t.groupby("pair")["score"].min()) for name, t in (("old", old), ("new", new))}
    assert spread["new"].max() < 1e-12 and spread["old"].median() > 0.1
    assert (new["norm"] - 1).abs().max() < 1e-12 and old["norm"].min() < 0.97 and old["norm"].max() > 1.03

def test_tokens_move_with_all_positions_in_the_older_alone():
    video = torch.randn(1, 4, 3, 48, 64, dtype=torch.float64)
    old, new = (vjepa.moved_tokens(made(newer).double(), video, (1, 8)) for newer in (False, True))
    assert old.min() > 0.01 and new.max() < 1e-12 and list(old.index) == [1, 8]
    model = made(False).double()
    before = model.get_vision_features(video)
    with pytest.raises(KeyError), vjepa.shifted(model, 3): raise KeyError
    assert torch.equal(model.get_vision_features(video), before)
    with pytest.raises(ValueError, match="no rotary positions"), vjepa.shifted(torch.nn.Linear(1, 1), 1): pass

# pages

@pytest.mark.parametrize("page, more", [("02_baseline", dict(cached=True, n_frames=1)), ("10_lora", dict(rank=2))], ids=["02 on single frames", "10"])
def test_pages_take_it(project, page, more):
    made(True, initializer_range=0.05).save_pretrained(project/"weights/newer")
    said = run_page(project, page, small("newer", backbone="weights/newer", **more))
    assert said["run"].load("metrics.json")["n_clips"] > 0 and all(p["turned"] for p in said["run"].load("applied.json")["proofs"])
    assert any(isinstance(m, VJEPA21Model) for m in said["model"].modules())
