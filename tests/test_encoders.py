"Encoders of transformers other than V-JEPA 2, small and random: their tokens, grids, adapters and pages, and what is refused."
import json, shutil

import pytest
import torch
import transformers as t
from conftest import papermill, run_folders
from pages import run_page, small
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from cvslab.encoders import PIXELS, Encoder, Pixels
from cvslab.models import Normalise, build_model, depth_of, input_size, load_backbone, lora_modules, lora_size, trainable

WIDE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
PLAIN = dict(WIDE, image_size=64, patch_size=16)
STAGES = dict(image_size=64, embed_dim=12, depths=[1, 1, 2], num_heads=[1, 2, 2], window_size=4)
CONVOLVED = dict(hidden_sizes=[8, 16, 32], depths=[1, 1, 2], num_stages=3, image_size=64)
TOWER = dict(vision_config=PLAIN, text_config=dict(WIDE, vocab_size=50, pad_token_id=1, bos_token_id=0, eos_token_id=2))

# name: class, its configuration, frames it was made for (0: any), frames of a bin, tokens before the grid, adapted by q and v, places of a frame
KINDS = {
    "dinov2": (t.Dinov2Model, PLAIN | dict(drop_path_rate=.3), 0, 1, 1, 4, 16),
    "registers": (t.Dinov2WithRegistersModel, PLAIN, 0, 1, 5, 4, 16),
    "dinov3": (t.DINOv3ViTModel, PLAIN | dict(num_register_tokens=4), 0, 1, 5, 4, 16),
    "dinov3 convolved": (t.DINOv3ConvNextModel, dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], image_size=64), 0, 1, 1, 0, 4),
    "videomae": (t.VideoMAEModel, PLAIN | dict(num_frames=4, hidden_dropout_prob=.3), 4, 2, 0, 4, 16),
    "vivit": (t.VivitModel, WIDE | dict(image_size=64, tubelet_size=[2, 16, 16], num_frames=4), 4, 2, 1, 4, 16),
    "timesformer": (t.TimesformerModel, PLAIN | dict(num_frames=4), 4, 1, 1, 0, 16),
    "vit": (t.ViTModel, PLAIN | dict(attention_probs_dropout_prob=.3), 0, 1, 1, 4, 16),
    "deit": (t.DeiTModel, PLAIN, 0, 1, 2, 4, 16),
    "ijepa": (t.IJepaModel, PLAIN, 0, 1, 0, 4, 16),
    "siglip": (t.SiglipVisionModel, PLAIN, 0, 1, 0, 4, 16),
    "clip": (t.CLIPVisionModel, PLAIN, 0, 1, 1, 4, 16),
    "beit": (t.BeitModel, PLAIN | dict(use_relative_position_bias=True), 0, 1, 1, 4, 16),
    "swin": (t.SwinModel, STAGES, 0, 1, 0, 8, 16),
    "swinv2": (t.Swinv2Model, STAGES, 0, 1, 0, 8, 16),
    "hiera": (t.HieraModel, dict(image_size=[64, 64], embed_dim=12, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 4]), 0, 1, 0, 0, 4),
    "convnext": (t.ConvNextModel, CONVOLVED, 0, 1, 0, 0, 16),
    "aimv2": (t.Aimv2VisionModel, PLAIN, 0, 1, 0, 4, 16),
    "resnet": (t.ResNetModel, dict(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]), 0, 1, 0, 0, 4)}
SIZE = dict(resnet=dict(size=64))                 # its config says no size
ATTENDING = [k for k, v in KINDS.items() if v[5]]

def made(kind, config, folder, seed=0):
    "A random model of the class `kind`, saved to `folder`; what starts at zero or alike is drawn too, so that nothing is inert."
    torch.manual_seed(seed)
    model = kind(kind.config_class(**config)).eval()
    for p in model.parameters():
        if p.numel() and (p == p.flatten()[0]).all(): torch.nn.init.normal_(p, p.flatten()[0].item(), .05)
    model.save_pretrained(folder)
    return model

@pytest.fixture(scope="module")
def saved(scratch):
    "`saved(name)`: folder of one of `KINDS` in a project of its own, and the model in it, made once."
    there = {}
    def get(name):
        if name not in there: there[name] = f"weights/{name.replace(' ', '-')}", made(*KINDS[name][:2], scratch/"weights"/name.replace(" ", "-"))
        return there[name]
    return get

@pytest.fixture(autouse=True)
def inside(scratch, monkeypatch): monkeypatch.chdir(scratch)

def clips(name, n=2, seed=1): return torch.randn(n, KINDS[name][2] or 4, 3, 64, 64, generator=torch.Generator().manual_seed(seed))

@pytest.mark.parametrize("name", KINDS)
def test_tokens_and_grid(name, saved):
    folder, model = saved(name)
    kind, config, frames, tubelet, extra, _, places = KINDS[name]
    encoder, video = load_backbone(folder, **SIZE.get(name, {})), clips(name)
    tokens, side = encoder.read(video), int(places**.5)
    assert isinstance(encoder, Encoder) and type(encoder.model) is kind
    assert tokens.grid == (4 // tubelet, side, side) and tokens.extra.shape[2] == extra
    assert tokens.patches.shape == (2, 4 // tubelet * places, encoder.config.hidden_size)
    assert (encoder.config.crop_size, encoder.config.patch_size, encoder.config.tubelet_size) == (64, 64 // side, tubelet)
    with torch.no_grad(): said = model(video if frames else video.flatten(0, 1)).last_hidden_state
    if said.ndim == 4: said = said.flatten(2).mT
    if frames: assert torch.allclose(tokens.extra[:, 0], said[:, :extra], atol=1e-5)
    else:
        assert torch.allclose(tokens.patches.unflatten(1, (4, places)).flatten(0, 1), said[:, extra:], atol=1e-5)
        assert torch.allclose(tokens.extra.flatten(0, 1), said[:, :extra], atol=1e-5)

@pytest.mark.parametrize("name", [k for k in KINDS if k != "resnet"])      # 2 x 2 places that each see nearly all
def test_tokens_stand_where_they_look(name, saved):
    "Of all tokens, that of the place which changes moves most; at a grid that is not the same in rows and columns read backwards."
    encoder, video = load_backbone(saved(name)[0], **SIZE.get(name, {})), clips(name)
    side, tubelet = encoder.side, encoder.config.tubelet_size
    with torch.no_grad():
        before = encoder.get_vision_features(video)
        for frame, row, column in ((3, 0, side - 1), (0, side - 1, 0), (2, side // 2, 0)):
            other, step = video.clone(), 64 // side
            other[:, frame, :, row*step:(row + 1)*step, column*step:(column + 1)*step] += 3
            moved = (encoder.get_vision_features(other) - before).norm(dim=-1).sum(0)
            assert moved.argmax().item() == ((frame // tubelet)*side + row)*side + column

@pytest.mark.parametrize("name", KINDS)
def test_training_mode_changes_nothing(name, saved):
    encoder, video = load_backbone(saved(name)[0], **SIZE.get(name, {})), clips(name)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    with torch.no_grad(): assert torch.equal(encoder.train().get_vision_features(video), encoder.eval().get_vision_features(video))
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())

@pytest.mark.parametrize("name", ATTENDING)
@pytest.mark.parametrize("targets", [["q", "v"], ["key", "o", "fc1", "fc2"]])
def test_adapters(name, targets, saved):
    folder, base = saved(name)
    linear = {n: m.in_features + m.out_features for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    adapted = build_model(folder, lora=dict(rank=3, targets=targets, dropout=0.))
    there, video = lora_modules(adapted.backbone), clips(name)
    assert lora_size(adapted.backbone.config, 3, targets) == (len(there), sum(there.values()))
    assert {n.removeprefix("model."): size for n, size in there.items()} == {n: 3*linear[n] for n in (m.removeprefix("model.") if m not in linear else m for m in there) if n in linear}
    assert sorted({n.split(".")[-1] for n in there}) and (len(there) == KINDS[name][5] or targets != ["q", "v"])
    if targets == ["q", "v"]: assert not any(part in n for n in there for part in ("k_proj", "key", "fc", "dense", "out", "o_proj", "gate", "up_"))
    same = adapted.backbone.get_vision_features(video)
    assert torch.allclose(same, load_backbone(folder).get_vision_features(video), atol=1e-5)      # B starts at zero
    adapted(video)["logits"].square().sum().backward()
    assert set(trainable(adapted)) == {"lora", "head"} and all(p.grad is not None and p.grad.isfinite().all() for p in trainable(adapted)["lora"].values())
    for m in adapted.modules():
        if isinstance(m, LoraLayer): torch.nn.init.normal_(m.lora_B["default"].weight)
    assert (adapted.backbone.get_vision_features(video) - same).abs().max() > 1e-3

@pytest.mark.parametrize("name", ["vit", "dinov2", "videomae", "siglip", "swinv2"])
def test_activations_are_recomputed(name, saved):
    "The same gradients, from layers that run twice."
    found, folder = [], saved(name)[0]
    for recomputed in (False, True):
        torch.manual_seed(0)
        encoder, video, ran = build_model(folder, lora=dict(rank=2, dropout=0.)).backbone.train(), clips(name), []
        if recomputed: encoder.gradient_checkpointing_enable(dict(use_reentrant=False))
        assert encoder.is_gradient_checkpointing == recomputed
        inner = next(m for m in encoder.modules() if isinstance(m, LoraLayer))
        inner.register_forward_hook(lambda *_: ran.append(1))
        for m in encoder.modules():
            if isinstance(m, LoraLayer): torch.nn.init.ones_(m.lora_B["default"].weight)
        encoder.get_vision_features(video).square().mean().backward()
        found.append([p.grad for p in encoder.parameters() if p.grad is not None])
        assert len(ran) == 1 + recomputed
    for a, b in zip(*found): torch.testing.assert_close(a, b)

def test_layers_to_adapt_are_counted_through_stages(saved):
    folder = saved("swin")[0]
    there = lora_modules(build_model(folder, lora=dict(rank=2, targets=["v"], layers=[1, 3])).backbone)
    assert sorted(there) == ["model.encoder.layers.1.blocks.0.attention.v_proj", "model.encoder.layers.2.blocks.1.attention.v_proj"]
    assert depth_of(folder) == 4
    with pytest.raises(ValueError, match=r"no encoder layers \[4\]: choose from 0..3"): build_model(folder, lora=dict(rank=2, layers=[4]))

@pytest.mark.parametrize("name, targets, words", [
    ("hiera", ["q", "v"], r"\['q', 'v'\] in a hiera \(its query, key and value are one matrix, qkv\): choose from \['fc1', 'fc2', 'o', 'qkv'\]"),
    ("convnext", ["q"], r"in a convnext: choose from \['fc1', 'fc2'\]"), ("vit", ["qkv"], "choose from"), ("vit", [], "none given"), ("swinv2", ["z"], r"\['z'\]")])
def test_projections_that_are_not_there(name, targets, words, saved):
    with pytest.raises(ValueError, match=words): build_model(saved(name)[0], lora=dict(rank=2, targets=targets))

def test_fused_projections_are_adapted_together(saved):
    there = lora_modules(build_model(saved("hiera")[0], lora=dict(rank=2, targets=["qkv"])).backbone)
    assert len(there) == 5 and all(n.endswith("attn.qkv") for n in there)

@pytest.mark.parametrize("whole, config, part", [
    (t.ViTForImageClassification, PLAIN, "vit"), (t.CLIPModel, TOWER, "vision_model"), (t.SiglipModel, TOWER, "vision_model"),
    (t.VideoMAEForPreTraining, PLAIN | dict(num_frames=4, decoder_num_hidden_layers=1, decoder_hidden_size=32, decoder_num_attention_heads=2), "videomae"),
    (t.Dinov2ForImageClassification, PLAIN, "dinov2"), (t.CLIPVisionModelWithProjection, PLAIN, "")], ids=lambda x: getattr(x, "__name__", None))
def test_the_encoder_in_a_larger_model(whole, config, part, tmp_path):
    model = made(whole, config, tmp_path)
    encoder, video = load_backbone(str(tmp_path)), torch.randn(1, 4, 3, 64, 64)
    inner = getattr(model, part, model)
    with torch.no_grad(): said = inner(video if encoder.frames else video[0]).last_hidden_state
    assert torch.allclose(encoder.read(video).patches.flatten(0, 1), said[:, encoder.extra:].flatten(0, 1), atol=1e-5)
    assert input_size(str(tmp_path)) == 64 and depth_of(str(tmp_path)) == 2

@pytest.mark.parametrize("name, size", [("dinov2", 96), ("dinov3", 32), ("vit", 96), ("clip", 32), ("siglip", 96), ("beit", 96), ("convnext", 128), ("swinv2", 128), ("ijepa", 32)])
def test_other_sizes(name, size, saved):
    encoder = load_backbone(saved(name)[0], size=size)
    assert encoder.read(torch.randn(1, 2, 3, size, size)).grid == (2, size // 16, size // 16)
    with pytest.raises(ValueError, match=f"reads {size}"): encoder.read(torch.randn(1, 2, 3, 64, 64))

def test_what_cannot_be_read_says_what_it_lacks(saved, tmp_path):
    def refused(words, where, **how):
        with pytest.raises((ValueError, ImportError), match=words): load_backbone(str(where), **how)
    refused("VideoMAEModel: .*doesn't match", saved("videomae")[0], size=96)
    refused("says in|pass -p size", saved("resnet")[0])
    refused("depth and drop_path change the layers of a V-JEPA 2, and backbone .* is a ViTModel", saved("vit")[0], depth=1, drop_path=.1)
    made(t.BertModel, WIDE | dict(vocab_size=50), tmp_path/"words")
    refused("BertModel, which reads input_ids and no pixels", tmp_path/"words")
    made(t.ViTMAEModel, PLAIN, tmp_path/"mae")
    refused("drops most of its patches at random", tmp_path/"mae")
    made(t.HieraForPreTraining, KINDS["hiera"][1] | dict(decoder_hidden_size=16, decoder_depth=1, decoder_num_heads=2), tmp_path/"hiera")
    refused("drops most of its patches at random", tmp_path/"hiera")
    made(t.YolosModel, WIDE | dict(image_size=[64, 64], patch_size=16), tmp_path/"yolos")
    refused("fill no square in each of 1 bins", tmp_path/"yolos")
    made(t.Siglip2VisionModel, WIDE | dict(num_patches=16, patch_size=16), tmp_path/"naflex")
    refused("spatial_shapes", tmp_path/"naflex", size=64)
    made(t.ViTModel, PLAIN | dict(image_size=[64, 32]), tmp_path/"wide")
    refused("no square", tmp_path/"wide")
    video = torch.randn(1, 8, 3, 64, 64)
    with pytest.raises(ValueError, match="clips of 8 frames, but this VivitModel was made for 4: pass -p n_frames 4"): load_backbone(saved("vivit")[0]).get_vision_features(video)

def test_timm_is_asked_for(tmp_path):
    if t.utils.is_timm_available(): pytest.skip("timm is installed")
    (tmp_path/"config.json").write_text(json.dumps(dict(model_type="timm_wrapper", architectures=["TimmWrapperModel"], architecture="vit_tiny_patch16_224")))
    save_file(dict(x=torch.zeros(1)), tmp_path/"model.safetensors")
    with pytest.raises(ImportError, match="timm"): load_backbone(str(tmp_path))

@pytest.mark.parametrize("name", ["vit", "videomae", "swin"])
@pytest.mark.parametrize("change, words", [(lambda s, k: s.pop(k), "missing keys"), (lambda s, k: s.__setitem__("more.weight", s[k].clone()), "unexpected keys"),
                                           (lambda s, k: s.__setitem__(k, s[k][..., :1].clone()), "mismatched keys")])
def test_every_tensor_is_accounted_for(name, change, words, saved, tmp_path):
    for f in ("config.json", "model.safetensors"): shutil.copy(f"{saved(name)[0]}/{f}", tmp_path)
    state = load_file(tmp_path/"model.safetensors")
    change(state, sorted(k for k, v in state.items() if v.ndim == 2)[0])
    save_file(state, tmp_path/"model.safetensors", metadata=dict(format="pt"))
    with pytest.raises(ValueError, match=words): load_backbone(str(tmp_path))

@pytest.mark.parametrize("said, mean, std", [
    (dict(image_mean=[.1, .2, .3], image_std=[.4, .5, .6]), (.1, .2, .3), (.4, .5, .6)),
    (dict(image_mean=[.5]*3, image_std=[.5]*3, rescale_factor=1/127.5, offset=True), (.75,)*3, (.25,)*3),
    (dict(do_normalize=False), (0,)*3, (1,)*3), (None, (.485, .456, .406), (.229, .224, .225))])
def test_pixels_are_normalised_as_the_folder_says(said, mean, std, saved, tmp_path):
    for f in ("config.json", "model.safetensors"): shutil.copy(f"{saved('dinov2')[0]}/{f}", tmp_path)
    if said: (tmp_path/"preprocessor_config.json").write_text(json.dumps(said))
    model, video = build_model(str(tmp_path)), torch.randint(0, 256, (1, 1, 3, 64, 64), dtype=torch.uint8)
    wanted = (video/255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.allclose(model.normalise(video), wanted, atol=1e-5)
    assert model.backbone.card["pixels"] == ("preprocessor_config.json" if said else "ImageNet; no preprocessor_config.json")

@pytest.mark.parametrize("name, mean", [("siglip", .5), ("clip", .48145466), ("vit", .5), ("beit", .5), ("vivit", .75), ("videomae", .485)])
def test_pixels_as_the_class_is_known_for(name, mean, saved):
    pixels = load_backbone(saved(name)[0]).config.pixels
    assert pixels.mean[0] == pytest.approx(mean) and "no preprocessor_config.json" in pixels.source and pixels != Pixels()

def test_a_frame_encoder_of_this_project_keeps_the_pixels_it_was_trained_on(saved, tmp_path):
    shutil.copytree(saved("swinv2")[0], tmp_path/"frames")
    config = json.loads((tmp_path/"frames/config.json").read_text())
    def say(pixels): (tmp_path/"frames/config.json").write_text(json.dumps(config | dict(pixels=pixels)))
    video = torch.randint(0, 256, (1, 2, 3, 8, 8), dtype=torch.uint8)
    for pixels in ("swincvs", "imagenet"):
        say(pixels)
        model = build_model(str(tmp_path/"frames"))
        assert torch.equal(model.normalise(video), Normalise(PIXELS[pixels])(video)) and model.backbone.card["pixels"] == PIXELS[pixels].source
    say("bgr")
    with pytest.raises(ValueError, match="says pixels 'bgr': choose from"): build_model(str(tmp_path/"frames"))

def test_what_belongs_to_vjepa_is_refused_by_name(saved):
    folder = saved("dinov2")[0]
    for asked in (dict(unfrozen=dict(layers=1)), dict(reading=dict(centre=True)), dict(attention=dict(window=[1, 2, 2])), dict(masked_tokens=True)):
        with pytest.raises(ValueError, match=f"{next(iter(asked))}: for a V-JEPA 2 by name alone, and this backbone is a Dinov2Model"): build_model(folder, **asked)
    with pytest.raises(ValueError, match="has no predictor"): build_model(folder, lora=dict(rank=2, predictor=True))
    with pytest.raises(ValueError, match="one token a frame"): build_model(folder, pooler="lstm", decoder=True)
    from cvslab.attention import encoder_of
    with pytest.raises(ValueError, match="holds a Dinov2Model"): encoder_of(build_model(folder))

def test_a_sequence_has_one_token_a_frame(saved):
    video = clips("registers")
    read = build_model(saved("registers")[0], pooler="lstm").backbone
    assert torch.allclose(read.get_vision_features(video), read.read(video).extra[:, :, 0])
    means = build_model(saved("convnext")[0], pooler="lstm").backbone
    assert torch.allclose(means.get_vision_features(video), means.read(video).patches.unflatten(1, (4, -1)).mean(2))

@pytest.mark.parametrize("name", ["registers", "videomae"])
def test_a_decoder_has_a_map_of_every_bin(name, saved):
    out = build_model(saved(name)[0], decoder=True)(clips(name))
    assert out["seg"].shape == (2, 4 // KINDS[name][3], 5, 16, 16)

# pages ---------------------------------------------------------------------------------------------------------------------

def tiny(name, **change): return small(name, max_clips=16) | change

@pytest.mark.parametrize("name", KINDS)
def test_a_step_of_the_frozen_page(name, saved, scratch):
    page = run_page(scratch, "02_baseline", tiny(f"frozen-{name.replace(' ', '-')}", backbone=saved(name)[0], **SIZE.get(name, {})), until="training.fit")
    assert page["run"].load("estimate.json")["seconds_a_step"] > 0 and set(trainable(page["model"])) == {"head"}

@pytest.mark.parametrize("name", [*ATTENDING, "hiera"])
def test_a_step_of_the_adapted_page(name, saved, scratch):
    targets = ["qkv"] if name == "hiera" else ["q", "v"]
    page = run_page(scratch, "10_lora", tiny(f"adapted-{name}", backbone=saved(name)[0], targets=targets, rank=2, seg_weight=.3), until="training.fit")
    proofs = {p["knob"]: p for p in page["run"].load("applied.json")["proofs"]}
    assert proofs["adapted projections"]["seen"].startswith(" ".join(targets)) and proofs["lora"]["turned"] and proofs["loss seg"]["turned"]

@pytest.mark.parametrize("name, change", [("registers", dict(pooler="lstm", rank=0)), ("videomae", dict(rank=0)), ("dinov3", dict(rank=4, size=96)), ("swinv2", dict(rank=2, seg_weight=.3))])
def test_a_step_of_the_ideas(name, change, saved, scratch):
    page = run_page(scratch, "18_ideas", tiny(f"ideas-{name}", backbone=saved(name)[0]) | change, until="training.fit")
    assert page["before"] is None and {p["knob"] for p in page["run"].load("applied.json")["proofs"]} >= {"backbone", "head"}

def test_cached_tokens_of_another_reading_are_others(saved, scratch):
    found = {}
    for pooler in ("mean", "lstm"):
        page = run_page(scratch, "02_baseline", tiny(f"cached-{pooler}", backbone=saved("registers")[0], pooler=pooler, cached=True), until="training.fit")
        found[pooler] = page["datasets"]["val"][0]["video"].shape
    assert found == dict(mean=(64, 32), lstm=(4, 32))

@pytest.mark.parametrize("page, name", [("02_baseline", "dinov2"), ("10_lora", "videomae")])
def test_a_whole_page(page, name, project):
    made(*KINDS[name][:2], project/"weights"/name)
    code, out = papermill(project, page, *(w for k, v in tiny("whole", backbone=f"weights/{name}").items() for w in ("-p", k, str(v))))
    assert not code, out[-2000:]
    metrics = json.loads((run_folders(project, page)[0]/"metrics.json").read_text())
    assert metrics["backbone"][0]["model"] == KINDS[name][0].__name__ and metrics["map"]["value"] > 0
