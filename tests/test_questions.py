"The page of the four questions: with nothing there it says what is missing, with runs it uses the control of each."
import builtins, json

import pandas as pd
from conftest import papermill, run_folders
from pages import run_page
from test_batch import write

from cvslab.core import save

def test_without_runs_it_says_what_is_missing(project):
    code, out = papermill(project, "43_questions")
    assert code == 0, out[-3000:]
    cells = json.loads((project/"outputs/43_questions.ipynb").read_text(encoding="utf-8"))["cells"]
    said = "\n".join("".join(o["data"].get("text/markdown", "")) for c in cells for o in c.get("outputs", []) if "data" in o)
    for page in ("08_multitask", "10_lora", "11_attention_supervision", "12_regularized", "13_window_vit", "15_window_attention", "16_clean_labels", "18_ideas.ipynb outputs/18_ideas.ipynb -f params/18/all_linear.yaml",
                 "14_hybrid.ipynb outputs/14_hybrid.ipynb -p arm hybrid", "22_attention_drift", "02_baseline.ipynb outputs/02_baseline.ipynb -p n_frames 16 -p step 2"):
        assert f"`papermill nbs/{page}" in said, page
    assert said.count("0 settings compared") == 7

def test_with_runs_it_uses_the_controls_they_have(project, monkeypatch):
    monkeypatch.setattr(builtins, "display", lambda *shown: None, raising=False)
    outputs, looked_at = project/"outputs", dict(n_frames=16, step=1)
    runs = {"02_baseline/plain": {}, "11_attention_supervision/a": {}, "11_attention_supervision/a/control": {}, "15_window_attention/b": {}, "15_window_attention/b/control": {},
            "14_hybrid/h": dict(arm="hybrid"), "14_hybrid/s": dict(arm="swincvs"), "16_clean_labels/c": {}, "16_clean_labels/c/frozen": {}, "10_lora/r16": {}, "18_ideas/all": dict(targets=["q", "k"]), "18_ideas/videomae": dict(targets=["q", "v"])}
    for i, (folder, params) in enumerate(runs.items()):
        experiment, _, name = folder.rpartition("/")
        five = "16_clean" in folder
        write(outputs, experiment, name, weights=1, looked_at=looked_at | (dict(n_frames=5, geometry="crop") if five else {}), seed=i, **params)
    layers = dict(layer=[0, 1], lo=-.1, hi=.1)
    save(outputs/"11_attention_supervision/a/mass.csv", pd.DataFrame(dict(layers, what="difference", value=[0., .05])))
    save(outputs/"15_window_attention/b/reach.csv", pd.DataFrame(dict(layer=[0, 1], keys=[16, 64], mean=[9., 40.], mean_control=[40., 40.])))
    save(outputs/"22_attention_drift/d/params.json", dict(experiment="22_attention_drift", run="d", params={}, data=dict(demo=False, fingerprint="tree"), code="abc"))
    save(outputs/"22_attention_drift/d/switches.csv", pd.DataFrame(dict(run=["10_lora/r16"], switch=["values off"], change=[.1])))
    run_page(project, "43_questions", dict(name="all"))
    run_page(project, "43_questions", dict(name="all"))                                        # it does not read what it wrote
    folder, = run_folders(project, "43_questions")
    def read(name): return pd.read_csv(folder/f"{name}.csv").set_index("run")
    assert read("attention_own_control")["control"].to_dict() == {"a": "a/control", "b": "b/control"}
    assert read("hybrid_minus_swincvs")["control"].to_dict() == {"h": "s"}
    assert read("clean_labels")["control"].to_dict() == {"c": "c/frozen"} and read("clean_labels")["missing"].isna().all()
    assert read("global_attention").loc[["a", "b", "r16"], "control"].eq("plain").all()
    assert read("switches")["switch"].tolist() == ["values off"] and len(read("temporal")) == 9
    assert sorted(read("what_lora_adapts").index) == ["all", "r16"]
    assert {"attention_own_control.png", "did_attention_obey.png", "temporal.png", "hybrids.png", "clean_labels.pdf"} <= {p.name for p in (folder/"figures").iterdir()}
