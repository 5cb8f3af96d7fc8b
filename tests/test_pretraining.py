"Pretraining judged: the rank of features against known numbers, probes along the way, what the saved card says, and rates side by side."
import math, shutil
from types import SimpleNamespace

import pytest
import torch
import transformers as t
from conftest import ROOT
from pages import run_page, small

from cvslab import models, pretraining, vjepa
from cvslab.checkpoints import to_file
from cvslab.pretraining import Along, Pretrainer, along_proof, effective_rank, random_backbone, rankme
from cvslab.provenance import leakage_of, read_card

def rotated(values, rows=12, seed=0):
    "A matrix of 12 columns with these singular values."
    draw = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.double))[0] for n in (rows, 12))
    return u[:, :len(values)] @ torch.diag(torch.tensor(values, dtype=torch.double)) @ v[:len(values)]

@pytest.mark.parametrize("values, rank", [([1.]*12, 12), ([3.], 1), ([5., 5., 5.], 3), ([2., 1.], math.exp(2/3*math.log(3/2) + 1/3*math.log(3))),
                                          ([4., 2., 1., 1.], math.exp(.5*math.log(2) + .25*math.log(4) + .25*math.log(8)))])
def test_rank_of_known_spectra(values, rank):
    for rows in (12, 40):
        x = rotated(values, rows)
        assert effective_rank(x) == pytest.approx(rank, rel=1e-6) == effective_rank(7*x)
        assert rankme(x) == pytest.approx(rank, rel=1e-4)

def test_rankme_adds_its_constant_to_each_share():
    p = torch.tensor([2/3, 1/3], dtype=torch.double) + 1e-7
    assert rankme(torch.diag(torch.tensor([2., 1.]))) == pytest.approx(math.exp(-(p*p.log()).sum().item()), rel=1e-12)
    assert rankme(rotated([1.])) > effective_rank(rotated([1.]))

def test_a_common_mean_hides_from_the_centred_rank_alone():
    x = torch.randn(400, 12, generator=torch.Generator().manual_seed(0))
    far = x + 100
    assert effective_rank(far - far.mean(0)) == pytest.approx(effective_rank(x - x.mean(0)), rel=1e-4) and rankme(far) < 2 < 11 < rankme(x)

@pytest.mark.parametrize("x", [torch.zeros(4, 4), torch.full((4, 4), torch.nan)])
def test_no_rank_of_nothing(x):
    with pytest.raises((ValueError, RuntimeError), match="zero or not finite|non-finite|singular|converge"): effective_rank(x)

# along the way -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("epochs, every, kept", [(4, 2, [2]), (5, 2, [2, 4]), (4, 1, [1, 2, 3]), (4, 0, []), (1, 2, []), (7, 3, [3, 6]), (2, 5, [])])
def test_when_backbones_are_kept(epochs, every, kept, tmp_path):
    calls, saved = [], []
    class Model:
        def save(self, path): saved.append(path.name)
    step = Along(lambda model, share: calls.append(share), tmp_path, epochs, every)
    for i in range(1, 13*epochs + 1): step(Model(), i/(13*epochs))
    assert len(calls) == 13*epochs and saved == [f"epoch_{e:04d}" for e in kept]
    assert along_proof(step, every, epochs).turned
    assert not along_proof(Along(step.step, tmp_path, epochs, every), every + 1, epochs).turned or [e for e in range(1, epochs) if e % (every + 1) == 0] == kept

def test_other_encoders_have_no_predictor(tmp_path):
    t.ViTModel(t.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8)).save_pretrained(tmp_path)
    for call in (lambda: Pretrainer(models.load_backbone(str(tmp_path))), lambda: random_backbone(str(tmp_path), 0, tmp_path/"new")):
        with pytest.raises(ValueError, match="V-JEPA 2 with its predictor, and this backbone is a ViTModel"): call()

@pytest.mark.parametrize("kind, as_file", [("VJEPA2EncoderModel", True), ("VJEPA2EncoderModel", False), ("VJEPA21Model", True), ("VJEPA21Model", False), ("VJEPA2Model", False)])
def test_a_vjepa_without_a_predictor_is_refused_by_name(tmp_path, kind, as_file):
    sizes = dict(hidden_size=48, num_hidden_layers=12, num_attention_heads=4, crop_size=64, pred_num_hidden_layers=0)
    model = dict(VJEPA2EncoderModel=vjepa.VJEPA2EncoderModel, VJEPA21Model=vjepa.VJEPA21Model, VJEPA2Model=t.VJEPA2Model)[kind]
    model((vjepa.VJEPA21Config if kind == "VJEPA21Model" else t.VJEPA2Config)(**sizes)).save_pretrained(tmp_path/"x")
    where = tmp_path/"x"
    if as_file:
        to_file(where, where := tmp_path/"x.pt")
        (tmp_path/"x.pt.json").write_text('{"heads": 4, "size": 64}')
    for call in (lambda: Pretrainer(models.load_backbone(str(where))), lambda: random_backbone(str(where), 0, tmp_path/"drawn")):
        with pytest.raises(ValueError, match=f"V-JEPA 2 with its predictor, and this backbone is a {kind} without one"): call()
    assert not (tmp_path/"drawn").exists()

def test_a_file_with_its_predictor_is_pretrained(tmp_path):
    shutil.copy(ROOT/"tests/data/vjepa2_small.pt", tmp_path/"x.pt")
    (tmp_path/"x.pt.json").write_text('{"heads": 2}')
    with pytest.raises(ValueError, match=r"a VJEPA2EncoderModel without one \(.*pred_heads"): Pretrainer(models.load_backbone(str(tmp_path/"x.pt")))
    (tmp_path/"x.pt.json").write_text('{"heads": 2, "pred_heads": 2, "size": 64}')
    model = Pretrainer(models.load_backbone(str(tmp_path/"x.pt")))
    assert model(torch.zeros(2, 4, 3, 64, 64, dtype=torch.uint8))["logits"].isfinite().all()

@pytest.mark.parametrize("trained, scratch, slips, allowed, state", [
    ("cholec80", False, [], "refuse", "leak"), ("cholec80", False, [], "allow", "leak"), ("cholec80", True, [], "refuse", "clean"), ("imagenet", False, [], "refuse", "clean"),
    ("imagenet", False, ["val_frames"], "refuse", "leak"), ("imagenet", True, ["val_frames"], "allow", "leak")])
def test_leakage_is_refused_before_anything_is_pretrained(tmp_path, trained, scratch, slips, allowed, state):
    shutil.copytree(models.DEMO_BACKBONE, tmp_path/"x")
    (tmp_path/"x/README.md").write_text(f"---\ndatasets: [{trained}]\n---\n")
    run = SimpleNamespace(data=dict(dataset="Endoscapes"), demo=False, params=dict(slips=slips, from_scratch=scratch, backbone=str(tmp_path/"x"), split="val", leakage=allowed))
    proof = pretraining.leakage_proof(run)
    assert f"it will be {state}" in proof.seen and proof.turned == (state == "clean" or allowed == "allow") == ("-p leakage allow" not in proof.seen)

def test_drawn_weights_have_seen_nothing(tmp_path):
    card = read_card(random_backbone("demo", 0, tmp_path/"x"))
    assert leakage_of(card["datasets"], base=card["base_model"]).state == "clean"

def asked(name, **change):
    return small(name, max_clips=24, epochs=2, probe_every=1, probe_epochs=1, held_out=.3, momentum=.5, batch_size=4) | change

@pytest.fixture(scope="module")
def runs(scratch):
    "A run of the page, one that differs in its rate and one that starts from the weights of the demo; these two are only begun."
    until = dict(fast=(dict(lr=3e-3), ""), slow=(dict(lr=1e-4), "kinds ="), onward=(dict(from_scratch=False), "kinds ="))
    return {name: run_page(scratch, "17_domain_pretraining", asked(name, **change), until=stop) for name, (change, stop) in until.items()}

def test_the_page_probes_along_the_way(runs, scratch, monkeypatch):
    monkeypatch.chdir(scratch)
    table = runs["fast"]["table"]
    assert table["epoch"].tolist() == [0, 1, 2] and set(table["lr"]) == {3e-3} and set(table["run"]) == {"fast"}
    assert table[["value", "lo", "hi", "effective_rank", "rankme"]].notna().all(axis=None) and (table["effective_rank"] > 1).all()
    tensors = [models.load_backbone(where).state_dict()["encoder.layer.0.mlp.fc1.weight"] for where, _ in runs["fast"]["parts"].values()]
    assert not torch.equal(tensors[0], tensors[1]) and not torch.equal(tensors[1], tensors[2])
    assert (runs["fast"]["run"].dir/"figures/along.png").exists()

def test_runs_that_differ_in_more_are_not_beside_each_other(runs, scratch, monkeypatch):
    monkeypatch.chdir(scratch)
    fast, slow, onward = (runs[name]["run"] for name in ("fast", "slow", "onward"))
    for run in (slow, onward): run.save("along.csv", fast.load("along.csv").assign(lr=run.params["lr"]))
    assert set(pretraining.beside(slow)["run"]) == {"slow", "fast"} and set(pretraining.beside(onward)["run"]) == {"onward"}
    assert len(pretraining.along_figure(pretraining.beside(slow)).axes[0].containers) == 2

def test_the_card_of_what_was_pretrained(runs, monkeypatch):
    run = runs["fast"]["run"]
    for folder in (run.dir/"backbone", run.dir/"along/epoch_0001"):
        assert read_card(folder)["datasets"] == ["clips drawn by cvslab"] and read_card(folder)["base_model"] == []
    run = runs["onward"]["run"]
    monkeypatch.setitem(run.data, "demo", False)
    assert pretraining._lineage(run)["datasets"] == ["clips drawn by cvslab", "endoscapes:train"]
    monkeypatch.setitem(run.params, "slips", ["val_frames"])
    assert leakage_of(pretraining._lineage(run)["datasets"], split="val").state == "leak"
    assert leakage_of(pretraining._lineage(run)["datasets"], split="test").state == "clean"

def test_a_base_that_says_nothing_stays_unknown(runs, monkeypatch, tmp_path):
    shutil.copytree(models.DEMO_BACKBONE, tmp_path/"quiet")
    (tmp_path/"quiet/README.md").unlink()
    run = runs["onward"]["run"]
    monkeypatch.setitem(run.params, "backbone", str(tmp_path/"quiet"))
    told = pretraining._lineage(run)
    assert told["base_model"] == [str(tmp_path/"quiet")] and leakage_of(told["datasets"], base=told["base_model"]).state == "unverified"
