"A mistake in a parameter ends with exit code 1, a sentence a person can act on, and no run folder."
import pytest
from conftest import papermill, run_folders

MISTAKES = {
    ("-p", "rnak", "32"): "did you mean 'rank'?",
    ("-p", "rank", "many"): "rank='many'",
    ("-p", "targets", '["z"]'): "'q', 'k', 'v'",
    ("-p", "data", "nowhere"): "demo",
    ("-p", "backbone", "no/such"): "hf download no/such",
}

@pytest.mark.parametrize("args", MISTAKES, ids=lambda a: "-".join(a[1:]))
def test_mistake(project, args):
    code, out = papermill(project, "10_lora", *args)
    assert code == 1
    assert MISTAKES[args] in out
    assert not run_folders(project, "10_lora")
