"The LoRA page on a tree of the real frame size and on a backbone from a folder, with a parameter file of the real experiment."
import json

import pytest
import torch
from conftest import papermill, run_folders
from safetensors.torch import load_file, save_file
from transformers import VJEPA2Config, VJEPA2ForVideoClassification

from cvslab.demo import draw_endoscapes
from cvslab.models import load_backbone, lora_size

CONFIG = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=2, crop_size=32, frames_per_clip=16,
              pred_hidden_size=24, pred_num_hidden_layers=1, pred_num_attention_heads=1)

@pytest.fixture
def weights(project):
    "A folder as `save_pretrained` writes it for the checkpoint with a classifier, which is what the hub holds."
    folder = project/"weights/small"
    VJEPA2ForVideoClassification(VJEPA2Config(**CONFIG, num_labels=4)).save_pretrained(folder)
    return folder

def test_parameter_file_on_a_real_tree(project, weights):
    draw_endoscapes(project/"data/endoscapes", seed=1, videos=(4, 3, 2), seconds=(40, 45), size=(854, 480))
    code, out = papermill(project, "10_lora", "-f", "params/10b.yaml", "-p", "backbone", "weights/small", "-p", "epochs", "1", "-p", "batch_size", "8", "-p", "name", "b")
    assert code == 0, out[-3000:]
    [folder] = run_folders(project, "10_lora")
    applied, metrics, params = (json.loads((folder/f"{n}.json").read_text()) for n in ("applied", "metrics", "params"))
    assert (len(applied["lora"]["modules"]), applied["lora"]["parameters"]) == lora_size(VJEPA2Config(**CONFIG), 32, "qkv") == (6, 2*3*32*2*48)
    assert (metrics["protocol"]["split"], metrics["input"]["size"], metrics["selection"]["n_videos"], metrics["n_videos"]) == ("test", 32, 3, 2)
    assert params["params"]["lr_lora"] == 1e-4 and metrics["data"] == "demo"
    assert {p.name for p in folder.iterdir()} >= {"applied.json", "checkpoint", "environment.txt", "history.csv", "manifest.csv", "metrics.json", "params.json", "predictions.parquet"}

def test_every_tensor_must_match(weights):
    whole = load_file(weights/"model.safetensors")
    encoder = {k: v for k, v in whole.items() if ".encoder." in k}
    assert load_backbone(str(weights)).state_dict()["encoder.layernorm.weight"].shape == (48,)
    def stored(tensors): save_file(tensors, weights/"model.safetensors", metadata=dict(format="pt"))
    for lost in (next(iter(encoder)), "classifier.weight"):
        stored({k: v for k, v in whole.items() if k != lost})
        with pytest.raises(ValueError, match="missing keys"): load_backbone(str(weights))
    stored(whole | {"vjepa2.encoder.layer.9.norm1.weight": torch.ones(48)})
    with pytest.raises(ValueError, match="unexpected keys"): load_backbone(str(weights))

def test_rank_changes_the_count(project):
    counts = {}
    for rank in (32, 64):
        code, out = papermill(project, "10_lora", "-p", "rank", str(rank), "-p", "epochs", "1", "-p", "max_clips", "16", "-p", "name", f"r{rank}")
        assert code == 0, out[-3000:]
        counts[rank] = json.loads((project/f"outputs/10_lora/r{rank}/applied.json").read_text())["lora"]["parameters"]
    assert counts == {rank: 4 * 2 * rank * (96 + 96) for rank in (32, 64)}      # 4 layers, q and v, rank x (inputs + outputs)
