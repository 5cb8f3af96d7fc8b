"Paths as people write them, disks that are full, and parameter files that say two things: each is read right or named at once."
import errno, os, shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from pydantic import PositiveInt
from safetensors import SafetensorError

from cvslab import core, record, runner, storage
from cvslab.batch import collect
from cvslab.core import ParameterError, Run, cache_dir, check_parameters, free_bytes, local, read_yaml, root, save, writing
from cvslab.demo import DEMO_BACKBONE, draw_endoscapes, draw_oct
from cvslab.endoscapes import read_frames
from cvslab.models import input_size
from cvslab.oct_models import open_checkpoint
from cvslab.oct_training import open_oct

NAMES = ("plain", "runs#3 C# drive", "Größe über 2 %", "it's [a] (b)&c")

@pytest.fixture(params=NAMES)
def home(request, tmp_path, monkeypatch):
    "A home folder of this test, and a folder in it with a name as people give."
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path/request.param).mkdir()
    return tmp_path/request.param

@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    return dict(endoscapes=draw_endoscapes(folder/"endoscapes", videos=(4, 2, 2), seconds=(20, 24), workers=1), oct=draw_oct(folder/"oct", scale=0.001, broken=False))

def ways(home, name):
    "A folder below the home folder as it may be written: by its tilde, whole, and as seen from the project."
    return [f"~/{home.name}/{name}", str(home/name), os.path.relpath(home/name, root())]

def test_a_path_is_read_in_one_way(home):
    for path in ways(home, "x"): assert local(path).resolve() == (home/"x").resolve()
    assert local(Path("~")/home.name) == home and local("outputs") == root()/"outputs"
    with pytest.raises(ValueError, match="no user of that name"): local("~nobody-of-this-name/x")

def test_data_weights_and_checkpoints_are_found_by_page_and_batch_alike(home, drawn):
    shutil.copytree(drawn["endoscapes"], home/"cvs")
    shutil.copytree(drawn["oct"], home/"eyes")
    shutil.copytree(DEMO_BACKBONE, home/"weights")
    (home/"masks").mkdir()
    for cvs, eyes, weights, masks, file in zip(*(ways(home, n) for n in ("cvs", "eyes", "weights", "masks", "eyes/checkpoints/multi_domain.pt"))):
        assert len(read_frames(cvs)) and open_oct(eyes)[1].card["found"] and input_size(weights) == 64 and open_checkpoint(file)["epoch"] == 0
        assert runner.plan(["10b.yaml"], values=dict(data=cvs, backbone=weights, masks=masks))
        assert runner.plan(["31.yaml"], values=dict(data=eyes, checkpoint=file))
        assert runner.plan(["33.yaml"], values=dict(data=eyes, checkpoints=[file, "single_domain_01"]))
    assert not (root()/"~").exists()

@pytest.mark.parametrize("file, values", [("10b.yaml", dict(data="~/nowhere", backbone="demo")), ("10b.yaml", dict(data="demo", backbone="~/nowhere")),
                                          ("10b.yaml", dict(data="demo", backbone="demo", masks="~/nowhere")), ("31.yaml", dict(data="demo", checkpoint="~/nowhere.pt")),
                                          ("33.yaml", dict(data="demo", checkpoints=["single_domain_01", "~/nowhere.pt"])), ("10b.yaml", dict(data="~nobody-of-this-name/x", backbone="demo"))])
def test_a_place_that_is_not_there_stops_the_plan(file, values):
    with pytest.raises(ParameterError, match="nowhere|nobody"): runner.plan([file], values=values)

def test_cache_mirror_runs_and_tables(home, monkeypatch):
    for cache in ways(home, "cache"):
        monkeypatch.setenv("CVSLAB_CACHE", cache)
        assert cache_dir().resolve() == (home/"cache").resolve()
    for mirror in ways(home, "mirror"):
        monkeypatch.setenv("CVSLAB_MIRROR", mirror)
        copy = storage.Mirror.of(root()/"outputs/10_lora/x")
        assert Path(copy.store.url).resolve() == (home/"mirror/10_lora/x").resolve()
    save(home/"outputs/10_lora/r/params.json", dict(experiment="10_lora", run="r", params={}, data=dict(demo=True, fingerprint="0"), code="0"))
    shutil.copytree(record.DATA, home/"tables")
    for run, outputs, tables in zip(*(ways(home, n) for n in ("outputs/10_lora/r", "outputs", "tables"))):
        assert Run.open(run).name == "r" and len(collect(outputs)) == 1 and len(record.experiments(folder=tables))
    store = storage.Store(f"~/{home.name}/outputs/10_lora")
    store.put(home/"tables/peers.csv", "a b/ü#.csv")
    assert store.read("a b/ü#.csv") == (record.DATA/"peers.csv").read_bytes() and "a b/ü#.csv" in store.list()["key"].tolist()
    assert not (root()/"~").exists()

# ---- full disks

BIG = np.zeros(10**6)

def numpy_into(path):
    with open(path, "wb") as f: np.save(f, BIG)

def safetensors_into(path): raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

WRITERS = dict(torch=lambda path: torch.save(torch.from_numpy(BIG), path), numpy=numpy_into, csv=lambda path: pd.DataFrame(BIG[:9999]).to_csv(path),
               text=lambda path: Path(path).write_text("x" * 10**6), copy=lambda path: shutil.copyfile(DEMO_BACKBONE/"model.safetensors", path), safetensors=safetensors_into)

@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="Linux alone has a device that is always full")
@pytest.mark.parametrize("library", WRITERS)
def test_a_full_disk_is_said_whichever_library_writes(library, tmp_path):
    (path := tmp_path/"runs/w.pt").parent.mkdir()
    path.symlink_to("/dev/full")                           # a link: what writes beside and renames replaces the link, not the device
    with pytest.raises(OSError, match=r"the disk of runs is full: w.pt needs 2.0 GB, .* are free. Make room there"), writing(path, 2 * 10**9): WRITERS[library](path)

@pytest.mark.parametrize("error", [ValueError("no number"), PermissionError(errno.EACCES, "Permission denied"), RuntimeError("other"), KeyboardInterrupt()], ids=repr)
def test_another_failure_stays_what_it_is_and_leaves_the_old_file(tmp_path, error):
    save(tmp_path/"a.txt", "old")
    def write(path):
        path.write_text("half")
        raise error
    with pytest.raises(type(error)) as caught: core.atomic(tmp_path/"a.txt", write)
    assert caught.value is error and [p.name for p in tmp_path.iterdir()] == ["a.txt"] and (tmp_path/"a.txt").read_text() == "old"

def test_the_room_of_a_folder_that_is_not_made_yet(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(Path(path)) or SimpleNamespace(free=7))
    assert free_bytes(tmp_path/"a/b/c") == 7 and asked == [tmp_path]

def test_a_mirror_whose_disk_is_full_costs_no_run(tmp_path, monkeypatch, capsys):
    save(tmp_path/"run/history.csv", pd.DataFrame(dict(epoch=[1])))
    mirror = storage.Mirror(tmp_path/"run", str(tmp_path/"copy"))
    with monkeypatch.context() as m:
        def full(source, path): Path(path).write_text("ha"); raise OSError(errno.ENOSPC, "No space left on device")
        m.setattr(shutil, "copyfile", full)
        mirror.try_push()
        assert "copy is behind" in (said := capsys.readouterr().out) and "the disk of copy is full: history.csv" in said
        with pytest.raises(storage.StorageError, match="disk of copy is full"): mirror.push()
    assert list((tmp_path/"copy").iterdir()) == [] and mirror.push() == 1

def test_the_batch_runner_says_a_full_disk_in_these_words(tmp_path, monkeypatch):
    log = "Traceback\nOSError: the disk of outputs/10_lora/x is full: epoch_0001.pt needs 2.0 MB, 0 kB are free. Make room there\n"
    assert runner.why(1, tmp_path, log) == (log.splitlines()[1], False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4096))               # the log itself was cut
    reason, passing = runner.why(1, tmp_path, "RuntimeError: unexpected pos 192 vs 89\n")
    assert "the disk of" in reason and "is full (4 kB free)" in reason and not passing

# ---- parameter files

@pytest.mark.parametrize("text, said", [
    ("rank: 8\nlr: 1\nrank: 64\n", "`rank` stands twice, in lines 1 and 3"), ("rank: 8\n'rank': 8\n", "`rank` stands twice, in lines 1 and 2"),
    ("runs:\n- files: [a]\n  set: {rank: 1, rank: 2}\n", "`rank` stands twice, in lines 3 and 3"), ("runs:\n- grid:\n    rank: [1]\n    lr: [1]\n    rank: [2]\n", "lines 3 and 5"),
    ("a: [1, {b: 1, b: 1}]", "`b` stands twice"), ("{rank: 1, rank: 2}", "`rank` stands twice"), ("<<: {a: 1}\n<<: {b: 1}", "`<<` stands twice"),
    ("seed: 010", "010 in line 1 is the number 8 to YAML"), ("name: 007", "007 in line 1 is the number 7"), ("a: 1\nb: 12:30", "12:30 in line 2 is the number 750"),
    ("a: 1:30:00.5", "1:30:00.5 in line 1 is the number 5400.5"), ("a: [1, -012]", "-012 in line 1 is the number -10"), ("budget: 0_1", "0_1 in line 1 is the number 1")])
def test_a_file_that_says_two_things_is_refused(tmp_path, text, said):
    with pytest.raises(ParameterError) as caught: read_yaml(text)
    assert said in str(caught.value)
    for name in ("10_mine.yaml", "study.yaml"):
        (tmp_path/name).write_text(text)
        with pytest.raises(ParameterError) as caught: runner.plan([tmp_path/name], values=dict(data="demo", backbone="demo"))
        assert said in str(caught.value) and name in str(caught.value)
    (tmp_path/"10_plain.yaml").write_text("rank: 8\n")
    with pytest.raises(ParameterError) as caught: runner.plan([tmp_path/"10_plain.yaml"], machine=tmp_path/"study.yaml", values=dict(data="demo"))
    assert said in str(caught.value)

@pytest.mark.parametrize("text, value", [("a: 3e-4", dict(a="3e-4")), ("a: 2024-01-01", dict(a="2024-01-01")), ("a: '010'", dict(a="010")), ("a: 0x10", dict(a=16)), ("a: 1_000", dict(a=1000)),
                                         ("a: 0.5", dict(a=0.5)), ("a: 0", dict(a=0)), ("a: 08", dict(a="08")), ("x: &x {a: 1}\ny: {<<: *x, a: 2}", dict(x=dict(a=1), y=dict(a=2))), ("", None), ("# nothing", None)])
def test_what_is_read_is_what_is_written(text, value): assert read_yaml(text) == value

def test_every_file_of_params_is_read_as_before():
    for path in (root()/"params").rglob("*.yaml"): assert read_yaml(path.read_text(encoding="utf-8")) == yaml.safe_load(path.read_text(encoding="utf-8")), path

@pytest.mark.parametrize("content, said", [(b"on: 3\n", "the name True is no text"), (b"12: 3\n", "the name 12 is no text"), ("name: gr\u00f6\u00dfe\n".encode("cp1252"), "no UTF-8 text"),
                                           (b"- rank\n", "it must hold `name: value` lines, not list"), (b"rank: 1\n---\nrank: 2\n", "it is no YAML")])
def test_other_files_that_are_none(tmp_path, content, said):
    (tmp_path/"10_mine.yaml").write_bytes(content)
    with pytest.raises(ParameterError) as caught: runner.plan([tmp_path/"10_mine.yaml"], values=dict(data="demo", backbone="demo"))
    assert said in str(caught.value)

def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    (tmp_path/"10_mine.yaml").write_bytes(b"\xef\xbb\xbfrank: 8\r\n")
    assert runner.plan([tmp_path/"10_mine.yaml"], values=dict(data="demo", backbone="demo"))[0].params["rank"] == 8

# ---- values

def one(kind, value, **more):
    declared = dict(x=dict(annotation=kind, default="None", comment="of a test"))
    return check_parameters(declared, dict(x=value), namespace=dict(PositiveInt=PositiveInt), **more)["x"]

@pytest.mark.parametrize("kind, value, read", [("list[int]", 11, [11]), ("list[float]", 3, [3.0]), ("list[float]", 0.5, [0.5]), ("list[int]", "10,11", [10, 11]), ("list[int]", "[10, 11]", [10, 11]),
                                               ("list[str]", "q", ["q"]), ("int", "08", 8), ("float", "3e-4", 3e-4), ("bool", "off", False), ("bool", "Yes", True), ("list[int]", [], [])])
def test_one_value_is_a_list_of_one_and_text_is_read_by_its_type(kind, value, read): assert one(kind, value) == read

@pytest.mark.parametrize("kind, value", [("str", 2023), ("str", 7), ("str", 0.5), ("str", True), ("str", False), ("str", None), ("list[str]", 3), ("list[str]", ["a", 3]), ("list[str]", [None])])
def test_text_that_came_as_something_else_names_the_remedy(kind, value):
    with pytest.raises(ParameterError, match="text is needed.*`-r x .*007 comes as 7|text is needed.*007 comes as 7.*`-r x "): one(kind, value)
    with pytest.raises(ParameterError, match="Pass `-r x 007`"): one(kind, value, typed=dict(x="007"))

@pytest.mark.parametrize("kind, value", [("PositiveInt", True), ("list[int]", True), ("float", False), ("list[int]", "[010]"), ("list[int]", "q"), ("float", "inf")])
def test_a_number_that_is_none_is_refused(kind, value):
    with pytest.raises(ParameterError): one(kind, value)

def test_the_batch_runner_takes_text_as_it_was_typed(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(runner, "_standing", lambda todo, other: seen.extend(todo) or {})
    ask = lambda *args: runner.main(["10b.yaml", "--dry-run", "-p", "data", "demo", "-p", "backbone", "demo", *args])
    assert ask("-p", "budget", "12_5", "-p", "layers", "3", "-p", "rank", "8") == 0, capsys.readouterr()
    assert (seen[0].params["budget"], seen[0].params["layers"], seen[0].params["rank"], seen[0].given["budget"]) == ("12_5", [3], 8, "12_5")
    assert type(seen[0].given["budget"]) is str                                    # as YAML writes it for papermill
    with pytest.raises(SystemExit): ask("-p", "rank", "8", "-p", "rank", "64")
    assert "twice" in capsys.readouterr().err
