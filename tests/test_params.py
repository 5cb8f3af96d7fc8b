"Every parameter file of a CVS experiment, on a tree of the real frame size and on small saved backbones: its page runs to the end."
import json, multiprocessing, os, shutil
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

SMALL = dict(epochs=1, max_clips=32, batch_size=8, micro_batch=0, data="data/endoscapes", device="cpu", precision="fp32")
HALF = ("02", "03", "04", "06")      # run in the precision they ask for; convolutions in half precision take minutes on a CPU
VJEPA = dict(backbone="weights/vjepa2")
OWN = {"17": dict(probe_epochs=1, held_out=0.3, n_frames=8), "videomae": dict(backbone="weights/videomae"), "dinov3": dict(backbone="weights/dinov2"),
       "15": dict(window=[0, 2, 2]), "13": dict(size=64, dim=48, layers=3, heads=2, window=2), "14": dict(frames="weights/swin", upper=2), "larger": dict(size=96),
       "vjepa21_b": dict(backbone="weights/vjepa21.pt"), "vjepa21_l": dict(backbone="weights/vjepa21"), "vjepa21_l_levels": dict(backbone="weights/vjepa21.pt")}
FILES = sorted(p.relative_to(ROOT/"params").as_posix() for p in (*(ROOT/"params").glob("[01]*.yaml"), *(ROOT/"params/18").glob("*.yaml")))

def notebook_of(file: str) -> Path:
    "The page a parameter file belongs to, by the two digits its name or its folder begins with."
    [page] = (ROOT/"nbs").glob(f"{file[:2]}_*.ipynb")
    return page

def run_page(project, page, values, log):
    "Run the cells of `page` in `project` as papermill would, with `values` injected behind the parameters."
    os.chdir(project)
    namespace = dict(__name__="__main__", In=[""], display=lambda *shown, **how: None)
    with redirect_stdout(StringIO()) as out:
        for i, cell in enumerate(json.loads(page.read_text(encoding="utf-8"))["cells"]):
            if cell["cell_type"] != "code": continue
            sources = ["".join(cell["source"])]
            if "parameters" in cell["metadata"].get("tags", []): sources.append("# Parameters\n" + "".join(f"{k} = {v!r}\n" for k, v in values.items()))
            for source in sources:
                namespace["In"].append(source)
                exec(compile(source, f"{page.name}, cell {i}", "exec"), namespace)
    run = namespace["run"]
    proofs = [p for path in sorted(run.dir.rglob("applied.json")) for p in json.loads(path.read_text())["proofs"]]      # of the parts of a run too
    return dict(folder=run.dir, out=out.getvalue(), proofs=proofs, metrics=run.load("metrics.json"), params=run.params)

def save_backbones(folder):
    from transformers import Dinov2Config, Dinov2Model, Swinv2Config, Swinv2Model, VideoMAEConfig, VideoMAEModel, VJEPA2Config, VJEPA2Model
    from cvslab.checkpoints import to_file
    from cvslab.vjepa import VJEPA21Config, VJEPA21Model
    wide = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=2)
    VJEPA2Model(VJEPA2Config(**wide, crop_size=64, frames_per_clip=16, pred_hidden_size=24, pred_num_hidden_layers=1, pred_num_attention_heads=1)).save_pretrained(folder/"vjepa2")
    VJEPA21Model(VJEPA21Config(**wide | dict(num_hidden_layers=12), crop_size=64)).save_pretrained(folder/"vjepa21")
    to_file(folder/"vjepa21", folder/"vjepa21.pt")
    (folder/"vjepa21.pt.json").write_text('{"heads": 2, "size": 64}')
    VideoMAEModel(VideoMAEConfig(**wide, image_size=32, num_frames=16, intermediate_size=96)).save_pretrained(folder/"videomae")
    Dinov2Model(Dinov2Config(**wide, image_size=28, patch_size=14)).save_pretrained(folder/"dinov2")
    Swinv2Model(Swinv2Config(image_size=64, patch_size=4, embed_dim=24, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 4], window_size=4)).save_pretrained(folder/"swin")

@pytest.fixture(scope="module")
def pages(request, tmp_path_factory):
    "A running page for each file that is asked for, two at a time, each forked from a process that has imported the library."
    from cvslab.demo import draw_endoscapes
    project = tmp_path_factory.mktemp("params")
    for name in ("nbs", "cvslab", "params"): shutil.copytree(ROOT/name, project/name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT/"settings.ini", project)
    draw_endoscapes(project/"data/endoscapes", seed=1, videos=(5, 3, 2), seconds=(40, 45), size=(854, 480))
    save_backbones(project/"weights")
    with pytest.MonkeyPatch.context() as env:
        for name, value in dict(CVSLAB_CACHE=str(project/"cache"), OMP_NUM_THREADS="1", MPLBACKEND="agg").items(): env.setenv(name, value)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["cvslab.diagnostics", "cvslab.pretraining", "kornia.geometry.transform"])
        with ProcessPoolExecutor(2, mp_context=context, max_tasks_per_child=1) as pool:
            def submit(file):
                asked = yaml.safe_load((ROOT/"params"/file).read_text())
                declared = notebook_of(file).read_text(encoding="utf-8")
                ours = SMALL | VJEPA | OWN.get(file[:2], {}) | OWN.get(Path(file).stem, {})
                if file.startswith(HALF): ours.pop("precision")
                return pool.submit(run_page, project, notebook_of(file), asked | {k: v for k, v in ours.items() if f'"{k}: ' in declared}, file)
            chosen = [item.callspec.params["file"] for item in request.session.items if item.path == Path(__file__)]
            yield {file: submit(file) for file in chosen}

@pytest.mark.parametrize("file", FILES)
def test_parameter_file(pages, file):
    found = pages[file].result()
    asked = yaml.safe_load((ROOT/"params"/file).read_text())
    assert found["metrics"]["n_videos"] >= 2 and found["metrics"]["protocol"]["split"] == asked.get("split", "val")
    proofs = found["proofs"]
    assert proofs and all(p["turned"] or p["slip"] for p in proofs)
    stuck = {p["knob"] for p in proofs if not p["turned"]}
    assert len(stuck) == len(asked.get("slips", [])), f"declared slips {asked.get('slips')}, seen {sorted(stuck)}"
