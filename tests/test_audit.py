"The audit's verdicts are computed: other tables give other verdicts, and what does not depend on them stays."
import shutil

import pandas as pd
import pytest
from conftest import ROOT, run_folders, start_papermill

from cvslab.record import DATA

def edit(folder, table, change):
    frame = pd.read_csv(folder/f"{table}.csv", dtype=str)
    change(frame)
    frame.to_csv(folder/f"{table}.csv", index=False)

def put(column, value, **where):
    "An edit that sets `column` to `value` in the rows where the other columns have these texts."
    def change(frame):
        rows = pd.Series(True, frame.index)
        for k, v in where.items(): rows &= frame[k] == v
        assert rows.any()
        frame.loc[rows, column] = value
    return change

def everyone_matched(cohort): cohort.iloc[3:, 2:6] = cohort.iloc[:3, 2:6].to_numpy()

# claim -> verdict on the record, verdict on a table altered so that the claim would be true (or false), the table and the alteration
ALTERED = {
    "Exp6 tests a five-fold weight": ("not tested", "holds", "epochs", put("val_map", "50.21", exp="6", epoch="2")),
    "Exp10b adapts queries, keys and values": ("does not hold", "holds", "experiments", put("trainable_params", "11253328", exp="10b")),
    "C2 is the cystic plate": ("misnamed", "holds", "criteria", lambda t: t.__setitem__("record_name", t["dataset_name"])),
    "twenty-fold": ("does not hold", "holds", "setups", put("backbone_lr", "5e-7", exp="9-S2")),
    "Focal loss is harmful": ("confounded", "holds", "setups", put("focal_alpha", "0.75", exp="3")),
    "Every mAP is the mean": ("holds", "does not hold", "epochs", put("c1_ap", "60.00", exp="12", epoch="4")),
    "best number is the maximum": ("holds", "does not hold", "experiments", put("best_val_map", "48.90", exp="8")),
    "There are": ("overstated", "holds", "splits", put("key_frames", "36694", split="train")),
    "LoRA improves on the frozen": ("within the noise", "holds", "experiments", put("best_val_map", "90", exp="10a")),
    "Fine-tuning made attention more uniform": ("does not hold", "holds", "entropy", put("entropy_pct", "90.0", measured_on="baseline V-JEPA")),
    "The probe was trained on the cohort": ("does not hold", "holds", "oct_cohort", everyone_matched),
    "Class imbalance is the primary cause": ("unsupported", "holds", "oct_runs", put("train_acc", "60", checkpoint="single_domain_01"))}

@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    "Verdicts on the record and on the altered tables, both pages executed at the same time."
    projects = {}
    for which in ("record", "altered"):
        project = projects[which] = tmp_path_factory.mktemp(which)
        for name in ("nbs", "cvslab", "params"): shutil.copytree(ROOT/name, project/name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT/"settings.ini", project)
        (project/"outputs").mkdir()
        shutil.copytree(DATA, project/"tables")
    for _, _, table, change in ALTERED.values(): edit(projects["altered"]/"tables", table, change)
    jobs = {w: start_papermill(p, "41_audit", "-p", "tables", str(p/"tables"), "-p", "studies", "1") for w, p in projects.items()}
    for which, job in jobs.items():
        out, _ = job.communicate()
        assert job.returncode == 0, f"{which}: {out[-3000:]}"
    return {w: pd.read_csv(run_folders(p, "41_audit")[0]/"audit.csv").set_index("claim")["verdict"] for w, p in projects.items()}

def test_there_are_at_least_twenty_claims(verdicts):
    assert len(verdicts["record"]) >= 20 and verdicts["record"].index.is_unique

@pytest.mark.parametrize("claim", ALTERED)
def test_a_verdict_follows_the_table(verdicts, claim):
    on_record, on_altered, *_ = ALTERED[claim]
    for which, expected in (("record", on_record), ("altered", on_altered)):
        found = verdicts[which][verdicts[which].index.str.contains(claim, regex=False)]
        assert found.tolist() == [expected], which

def test_what_rests_on_no_table_stays(verdicts):
    for claim in ("A majority over five frames cleans", "Hard attention masking", "V-JEPA's attention is 98 % uniform", "best of pretraining"):
        one, other = (v[v.index.str.contains(claim, regex=False)].tolist() for v in verdicts.values())
        assert one == other and len(one) == 1
