"A page of an experiment as a function: its cells in this process, with other parameters, up to a named step; and clips to train on at once."
import json, os
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
import yaml
from torch.utils.data import Dataset

from conftest import ROOT
from cvslab.core import Run, save

def small(name, **changes):
    "Parameters that make a run of a few seconds on the demo."
    return dict(data="demo", backbone="demo", epochs=1, max_clips=32, batch_size=8, n_frames=4, split="val", precision="fp32", name=name) | changes

def page_file(name): return yaml.safe_load((ROOT/"params"/f"{name}.yaml").read_text(encoding="utf-8"))

def run_page(project: Path, notebook: str, params: dict, until: str = "") -> dict:
    "Run the code cells of `nbs/<notebook>.ipynb` in `project` with `params`, up to the first that holds `until`; returns its names."
    cells = [c for c in json.loads((ROOT/"nbs"/f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    told, here = "# Parameters\n" + "\n".join(f"{k} = {v!r}" for k, v in params.items()), Path.cwd()
    names = {"__name__": "__main__", "In": [told], "display": lambda *shown, **how: None}
    os.chdir(project)
    try:
        with patch.dict(os.environ, CVSLAB_CACHE=os.environ.get("CVSLAB_CACHE", str(ROOT/".cache"))):
            for cell in cells:
                source = "".join(cell["source"])
                if until and until in source: break
                exec(compile(source, notebook, "exec"), names)
                if "parameters" in cell["metadata"].get("tags", []): exec(told, names)
    finally: os.chdir(here)
    return names

class Toy(Dataset):
    "Noisy clips (4 frames of 64 pixels) of which some are brighter, every other one with a mask of the bright part; `cut` breaks at that many items read."
    cut = 10**9

    def __init__(self, n, seed):
        rng = np.random.default_rng(seed)
        self.y = torch.tensor(rng.random((n, 3)) < 0.5).float()
        self.y[0], self.y[1] = 1, 0
        self.video = torch.tensor(rng.integers(0, 100, (n, 4, 3, 64, 64))).add(120*self.y[:, None, :, None, None]).to(torch.uint8)
        self.mask = torch.full((n, 4, 16, 16), 255)
        self.mask[::2, 1] = torch.where(torch.arange(16) < 8, 3*self.y[::2, :1, None].long(), 0)
        self.clips = pd.DataFrame(dict(clip=[f"{i}_0" for i in range(n)], video=range(n), frame=0, split="val")).assign(**{f"y_c{i+1}": self.y[:, i].numpy() for i in range(3)})

    def __len__(self): return len(self.y)

    def __getitem__(self, i):
        Toy.cut -= 1
        if Toy.cut < 0: raise KeyboardInterrupt
        return dict(video=self.video[i], y=self.y[i], mask=self.mask[i], mask_frames=self.mask[i].ne(255).flatten(1).any(1), index=i)

def toy_run(folder: Path) -> Run:
    return Run.open(save(folder/"params.json", dict(experiment="toy", run=folder.name, params={}, data=dict(demo=True))).parent)
