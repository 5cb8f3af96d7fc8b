"Every fault of the recorded OCT data pipeline, planted in a drawn tree: the cohort and the volumes must catch it."
import io, os, re, shutil
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pydicom
import pytest
import torch
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless
from torch.nn import functional as F

from cvslab.core import Ledger
from cvslab.demo import draw_oct
from cvslab.storage import Store
from cvslab.volumes import (FOLDER, RECORDED_CHOICE, RECORDED_PREPROCESS, Choice, CohortError, Preprocess, Volume, VolumeSet, read_cohort,
                            read_volume, stream)

PREP = Preprocess((16, 64, 64))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory): return draw_oct(tmp_path_factory.mktemp("oct")/"drawn", scale=0.02, broken=False)


@pytest.fixture
def tree(drawn, tmp_path, monkeypatch):
    "A copy to plant a fault in (files are links: replace them, never write into them), and an empty cache."
    monkeypatch.setenv("CVSLAB_CACHE", str(tmp_path/"cache"))
    return Path(shutil.copytree(drawn, tmp_path/"tree", copy_function=os.link))


def edit(tree, name, change):
    "Rewrite a table by `change(DataFrame) -> DataFrame`."
    table = change(pd.read_csv(tree/name, sep="\t", dtype=str, keep_default_na=False))
    (tree/name).unlink()
    table.to_csv(tree/name, sep="\t", index=False)


def replace(path, data: bytes):
    path.unlink()
    path.write_bytes(data)


def total(cohort, by="all"): return cohort.counts[cohort.counts["by"] == by].set_index("value")[["expected", "found"]].to_dict("index")


def test_a_whole_tree_is_found_whole(tree):
    cohort = read_cohort(Store(tree))
    people = pd.read_csv(tree/"participants.tsv", sep="\t", dtype=str)
    with_oct = people[people["retinal_oct"] == "TRUE"]
    assert sorted(cohort.table["participant"]) == sorted(with_oct["participant_id"]) and len(people) > len(with_oct)
    assert total(cohort)["all"] == dict(expected=len(with_oct), found=len(with_oct)) and len(cohort.lost) == 0
    for by, column in (("split", "recommended_split"), ("site", "clinical_site")):
        assert {k: v["found"] for k, v in total(cohort, by).items()} == with_oct[column].value_counts().to_dict()
    assert set(total(cohort, "device")) == {"heidelberg_spectralis", "topcon_maestro2", "topcon_triton", "zeiss_cirrus"}
    assert cohort.card["demo"] and not cohort.table["protocol"].str.contains("rc").any() and set(cohort.table["eye"]) == {"R"}


@pytest.mark.parametrize("schema", ["v1", "v3"])
def test_other_schemas_give_the_same_cohort(tree, tmp_path, schema):
    here, there = read_cohort(Store(tree)), read_cohort(Store(draw_oct(tmp_path/schema, scale=0.02, schema=schema, broken=False)))
    assert there.card["schema"] == schema != here.card["schema"] == "v2"
    columns = ["participant", "site", "label", "age", "split", "device", "eye", "frames"]
    assert here.table[columns].equals(there.table[columns])


def test_the_recorded_id_pattern_cannot_pass(tree):
    "Only UW numbers are found, as with the pattern 1xxx."
    for path in (tree/FOLDER).glob("*/[47]*/*.dcm"): path.unlink()
    with pytest.raises(CohortError) as caught: read_cohort(Store(tree), max_lost=0.99)
    assert "UCSD 0 of" in str(caught.value) and "train UAB" in str(caught.value) and "absent or empty in the store" in str(caught.value)
    cohort = caught.value.cohort
    assert set(cohort.lost["participant"].str[0]) == {"4", "7"} and set(cohort.table["participant"].str[0]) == {"1"}
    assert len(cohort.lost) + len(cohort.table) == cohort.card["expected"]


def test_lost_participants_are_named_and_stop_past_the_share(tree):
    train = read_cohort(Store(tree)).table.query("split == 'train' and label == 0")["participant"].tolist()
    edit(tree, "retinal_oct/manifest.tsv", lambda t: t[~t["participant_id"].isin(train[:2])])
    cohort = read_cohort(Store(tree), max_lost=0.07)
    assert cohort.lost[["participant", "reason"]].values.tolist() == [[p, "not in the manifest"] for p in train[:2]]
    with pytest.raises(CohortError, match=r"2 of \d+ participants are lost \(.*, allowed 5.0%\): 2 not in the manifest"): read_cohort(Store(tree))


def test_a_class_that_vanishes_from_a_split_stops(tree):
    cohort = read_cohort(Store(tree))
    for p in cohort.table.query("split == 'val' and label == 3")["participant"]: shutil.rmtree(tree/FOLDER/"topcon_maestro2"/p)
    with pytest.raises(CohortError, match="nobody is left in .*val insulin"): read_cohort(Store(tree), max_lost=0.5)


def test_a_truncated_listing_stops(tree, monkeypatch):
    whole = Store.list
    monkeypatch.setattr(Store, "list", lambda self, prefix="": whole(self, prefix).head(100))
    with pytest.raises(CohortError, match="absent or empty in the store"): read_cohort(Store(tree))


def test_a_wrong_prefix_is_told_from_lost_files(tree):
    (tree/FOLDER).rename(tree/"retinal_oct/oct")
    with pytest.raises(ValueError, match="nothing under retinal_oct/structural_oct.*check the prefix"): read_cohort(Store(tree))


@pytest.mark.parametrize("change, words", [
    (lambda t: pd.concat([t, t[t["recommended_split"] == "train"].head(1).assign(recommended_split="val")]), "several splits, a leak"),
    (lambda t: pd.concat([t, t.head(1)]), "repeats"),
    (lambda t: t.drop(columns="clinical_site").replace({"participant_id": {"1001": "9001"}}), r"unknown range of participant numbers.*\['9'\]"),
    (lambda t: pd.concat([t, t[t["recommended_split"] == "train"].head(1).assign(recommended_split="Testing")]), "several splits, a leak"),
    (lambda t: t.drop(columns="study_group"), r"lacks columns \['study_group'\]"),
    (lambda t: t.drop(columns="participant_id"), "needs exactly one of")])
def test_tables_that_say_something_else(tree, change, words):
    edit(tree, "participants.tsv", change)
    with pytest.raises(ValueError, match=words): read_cohort(Store(tree))


PEOPLE, MANIFEST = "participants.tsv", "retinal_oct/manifest.tsv"


def spell(tree, name, column, spelling: dict):
    "Write the values of a column by `spelling`, in turn where it has several; what it lacks stays."
    def change(t):
        seen = t.groupby(column).cumcount()
        return t.assign(**{column: [spelling[v][i % len(spelling[v])] if v in spelling else v for v, i in zip(t[column], seen)]})
    edit(tree, name, change)


@pytest.mark.parametrize("dress", [
    lambda t: "\ufeff" + t.replace("\n", "\r\n"), lambda t: t.encode("utf-16"), lambda t: t.replace("\t", ";"), lambda t: t.replace("\t", " \t "),
    lambda t: "".join(line + "\t\t\n" for line in t.splitlines()) + "\t\t\n\n", lambda t: t.replace("UCSD", "University of California\u00a0San Diego").encode("cp1252")],
    ids=["mark", "utf-16", "semicolons", "blanks", "empty columns", "cp1252"])
def test_tables_saved_elsewhere_give_the_same_cohort(tree, dress):
    plain = read_cohort(Store(tree))
    for name in (PEOPLE, MANIFEST):
        text = dress((tree/name).read_text())
        replace(tree/name, text if isinstance(text, bytes) else text.encode())
    other = read_cohort(Store(tree))
    assert other.table.equals(plain.table) and other.card == plain.card


@pytest.mark.parametrize("name, column, spelling", [
    (MANIFEST, "laterality", dict(R=["OD", "od", "RE", "Right", "right eye", "r"], L=["OS", "LE", "left", " l ", "Left_Eye", "Oculus sinister"])),
    (MANIFEST, "laterality", dict(R=["", "unknown_laterality"], L=["n/a", "Not reported"])),                # told by the file's name
    (MANIFEST, "anatomic_region", {"Macula": ["macula", "MACULA ", "Macular"], "Optic Disc": ["optic_disc", "Disc", "ONH", "optic nerve head"],
                                   "Macula, 6 x 6": ["Macula 6x6", "macula_6x6", "Macula, 6 × 6 mm"]}),
    (MANIFEST, "manufacturer", dict(Topcon=["TOPCON", "Topcon Corporation"], Zeiss=["Carl Zeiss Meditec", "zeiss"], Heidelberg=["Heidelberg Engineering"])),
    (MANIFEST, "manufacturers_model_name", dict(Maestro2=["maestro 2", "3D OCT-1 Maestro2"], Triton=["DRI OCT Triton"], Cirrus=["CIRRUS HD-OCT"])),
    (MANIFEST, "height", {"44": ["44.0", "44"]}), (MANIFEST, "imaging", dict(OCT=["oct", "Optical Coherence Tomography"])),
    (PEOPLE, "recommended_split", dict(train=["Training", "TRAIN"], val=["validation", "Valid"], test=["Testing", "test "])),
    (PEOPLE, "study_group", dict(healthy=["Healthy", "HEALTHY"], insulin_dependent=["Insulin Dependent", "insulin-dependent", "insulin"],
                                 pre_diabetes_lifestyle_controlled=["Pre-Diabetes / Lifestyle Controlled".replace(" / ", " "), "pre diabetes"],
                                 oral_medication_and_or_non_insulin_injectable_medication_controlled=[
                                     "Oral Medication and/or Non-Insulin Injectable Medication Controlled"])),
    (PEOPLE, "clinical_site", dict(UW=["uw", "University of Washington"], UAB=["University of Alabama at Birmingham"])),
    (PEOPLE, "retinal_oct", dict(TRUE=["True", "true", "1", "yes", "T"], FALSE=["False", "0", "no"]))])
def test_other_words_of_the_same_meaning(tree, name, column, spelling):
    choices = [Choice(), Choice(device="any", region="any", eye="L"), Choice(device="any", region="disc", radial=True)]
    def cohorts(): return [read_cohort(Store(tree), c, max_lost=1) if c.region != "disc" else read_volumes(tree, c) for c in choices]
    plain = cohorts()
    before = (tree/name).read_bytes()
    spell(tree, name, column, spelling)
    assert (tree/name).read_bytes() != before
    for was, now in zip(plain, cohorts()): assert now.table.equals(was.table)


def read_volumes(tree, choice):
    "The cohort whatever is missing from it."
    try: return read_cohort(Store(tree), choice, max_lost=1)
    except CohortError as e: return e.cohort


@pytest.mark.parametrize("folder", ["Topcon_Maestro2", "topcon-maestro2", "maestro2", "Topcon Maestro2"])
def test_another_spelling_of_a_device_folder(tree, folder):
    plain = read_cohort(Store(tree)).table
    (tree/FOLDER/"topcon_maestro2").rename(tree/FOLDER/folder)
    edit(tree, MANIFEST, lambda t: t.assign(filepath=t["filepath"].str.replace("topcon_maestro2", folder)))
    other = read_cohort(Store(tree)).table
    assert set(other["device"]) == {"topcon_maestro2"} and other["key"].str.contains(f"/{folder}/").all()
    assert other.drop(columns=["key", "etag"]).equals(plain.drop(columns=["key", "etag"]))


@pytest.mark.parametrize("name, column, value, choices", [
    (MANIFEST, "laterality", "OU", "choose from 'R', 'L'"), (MANIFEST, "laterality", "O", "choose from 'R', 'L'"), (MANIFEST, "laterality", "rechts", "choose from"),
    (MANIFEST, "anatomic_region", "Cornea", "choose from 'Macula', 'Optic Disc', 'Wide Field'"), (MANIFEST, "anatomic_region", "", "choose from"),
    (MANIFEST, "manufacturer", "Nidek", "choose from 'heidelberg'"), (MANIFEST, "manufacturers_model_name", "Maestro", "choose from"),
    (MANIFEST, "imaging", "Fundus", "choose from 'OCT'"), (MANIFEST, "height", "44.5", "a whole number from 1"), (MANIFEST, "number_of_frames", "0", "a whole number"),
    (MANIFEST, "width", "1,024", "a whole number"), (PEOPLE, "recommended_split", "holdout", "choose from 'train', 'val', 'test'"),
    (PEOPLE, "study_group", "diabetes", "choose from 'healthy'"), (PEOPLE, "clinical_site", "", "choose from 'UW'"), (PEOPLE, "retinal_oct", "maybe", "choose from 'TRUE', 'FALSE'"),
    (PEOPLE, "age", "", "a number from 0 to 120"), (PEOPLE, "age", "n/a", "a number"), (PEOPLE, "age", "999", "a number from 0 to 120"), (PEOPLE, "age", "1,234", "a number"),
    (PEOPLE, "age", "fifty", "a number"), (PEOPLE, "age", "40-49", "a number")])
def test_unknown_words_and_numbers_are_named_with_file_column_rows_and_choices(tree, name, column, value, choices):
    people = pd.read_csv(tree/PEOPLE, sep="\t", dtype=str)
    rows = (people.index[people["retinal_oct"] == "TRUE"] if name == PEOPLE else pd.RangeIndex(9))[[3, 5]]
    edit(tree, name, lambda t: t.assign(**{column: t[column].mask(t.index.isin(rows), value)}))
    with pytest.raises(ValueError) as caught: read_cohort(Store(tree))
    said = str(caught.value)
    assert said.startswith(f"{name}, column '{column}': row {rows[0] + 2} {value!r}, row {rows[1] + 2} {value!r}: ") and choices in said


def test_ages_are_read_where_they_are_certain(tree):
    plain = read_cohort(Store(tree)).table.set_index("participant")["age"]
    who = plain.index[[0, 1, 2]]
    ages = dict(zip(who, ["89+", "57,5", " 61 "]))
    without = pd.read_csv(tree/PEOPLE, sep="\t", dtype=str).query("retinal_oct == 'FALSE'")["participant_id"]
    edit(tree, PEOPLE, lambda t: t.assign(age=[ages.get(p, "n/a" if p in set(without) else a) for p, a in zip(t["participant_id"], t["age"])]))
    age = read_cohort(Store(tree)).table.set_index("participant")["age"]
    assert age[who].tolist() == [89, 57.5, 61] and age.drop(who).equals(plain.drop(who).astype(float))


def test_a_manifest_whose_columns_contradict_its_folders_is_refused(tree):
    edit(tree, MANIFEST, lambda t: t.assign(manufacturers_model_name=t["manufacturers_model_name"].mask(t.index == 4, "Cirrus")))
    with pytest.raises(ValueError, match=r"'manufacturers_model_name': 1 rows lie in another device's folder, first row 6: 'Cirrus' in the folder"): read_cohort(Store(tree))


def test_sizes_that_are_no_plain_numbers_cost_nothing(tree):
    plain = read_cohort(Store(tree)).table
    spell(tree, MANIFEST, "pixel_spacing", {"[0.0026, 0.0117]": ["0.0026\\0.0117", "[0,0026, 0,0117]", "0.0026", "Varies by frame", "0,0026", "[0.0026; 0.0117]"]})
    spell(tree, MANIFEST, "slice_thickness", {"0.0469": ["0,0469", "n/a", "0.0469"]})
    edit(tree, MANIFEST, lambda t: t.assign(number_of_frames="Not reported"))
    table = read_cohort(Store(tree)).table
    assert set(table["axial_mm"].dropna()) == {0.0026} and set(table["lateral_mm"].dropna()) == {0.0117} and set(table["slice_mm"].dropna()) == {0.0469}
    assert 0 < table["axial_mm"].isna().sum() < len(table) and table["frames"].isna().all()
    assert table["key"].tolist() == plain["key"].tolist()


def test_the_choice_of_a_volume_is_kept_and_counts(tree):
    recorded = read_cohort(Store(tree), RECORDED_CHOICE)
    assert recorded.card["choice"]["tie"] == "last" and recorded.table["device"].nunique() > 1 and recorded.table["protocol"].nunique() > 2
    assert (recorded.table["key"] == recorded.table["participant"].map(
        pd.read_csv(tree/"retinal_oct/manifest.tsv", sep="\t", dtype=str).groupby("participant_id")["filepath"].max().str[1:])).all()
    with pytest.raises(CohortError, match="no volume of zeiss_cirrus"): read_cohort(Store(tree), Choice(device="zeiss_cirrus"))
    with pytest.raises(CohortError, match="radial scans only") as caught: read_cohort(Store(tree), Choice(device="heidelberg_spectralis", region="disc"))
    assert len(caught.value.cohort.table) == 0
    right, left = (read_cohort(Store(tree), Choice(eye=eye)).table for eye in "RL")
    assert set(right["key"]).isdisjoint(left["key"]) and right["participant"].tolist() == left["participant"].tolist()


# volumes

def first(tree, device="topcon_maestro2"): return sorted((tree/FOLDER/device).rglob("*.dcm"))[0]


def test_every_syntax_gives_the_tensor_of_its_pixels(tree):
    seen = set()
    for path in sorted(tree.rglob("*.dcm")):
        ds = pydicom.dcmread(path)
        if ds.file_meta.TransferSyntaxUID in seen or "Spectralis" in ds.ManufacturerModelName: continue
        seen.add(ds.file_meta.TransferSyntaxUID)
        with open(path, "rb") as f: x = PREP(read_volume(f, path.name))
        whole = F.interpolate(torch.from_numpy(ds.pixel_array).float()[None, None], PREP.shape, mode="trilinear", align_corners=False)[0]
        torch.testing.assert_close(x, (whole - whole.mean()) / whole.std(), rtol=2e-3, atol=2e-3)
    assert len(seen) == 3


def test_a_spectralis_is_turned_to_run_downward(tree):
    path = next(p for p in sorted(tree.rglob("*.dcm")) if "ppol_mac" in p.name)
    with open(path, "rb") as f: volume = read_volume(f, path.name)
    assert volume.upward and volume.spacing == (0.128469, 0.003872, 0.01206)
    torch.testing.assert_close(PREP(volume).flip(1), Preprocess(PREP.shape, orientation="stored")(volume), rtol=2e-3, atol=2e-3)


def broken(data: bytes, kind: str) -> bytes:
    ds, out = pydicom.dcmread(io.BytesIO(data)), io.BytesIO()
    if kind.startswith("cut"): return data[:-len(ds.PixelData) // 2]
    if kind == "empty": return b""
    if kind == "no pixels": del ds.PixelData
    if kind == "other syntax": ds.file_meta.TransferSyntaxUID = JPEGLSLossless
    if kind == "relabelled": ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    if kind in ("constant", "half"):
        pixels = ds.pixel_array.copy()
        pixels[: len(pixels) * 2 // 3 if kind == "half" else None] = 7
        ds.file_meta.TransferSyntaxUID, ds.PixelData = ExplicitVRLittleEndian, pixels.tobytes()
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", False
    if kind == "colour": ds.PhotometricInterpretation = "RGB"
    if kind == "few": ds.NumberOfFrames = 2
    ds.save_as(out, enforce_file_format=True)
    return out.getvalue()


SYNTAX = {"cut raw": ExplicitVRLittleEndian, "cut rle": RLELossless, "cut jpeg2000": JPEG2000Lossless, "relabelled": JPEG2000Lossless,
          "other syntax": JPEG2000Lossless}


@pytest.mark.parametrize("kind, words", [
    ("cut raw", "the file is cut short"), ("cut rle", "ends within them"), ("cut jpeg2000", "ends within them"), ("empty", "no DICOM file"),
    ("no pixels", "holds no pixel data"), ("constant", "constant"), ("half", "B-scans have a single value"),
    ("other syntax", "JPEG-LS.* cannot be decoded here, install"), ("relabelled", "no pixel data|the pixel data hold"),
    ("colour", "MONOCHROME2 is needed"), ("few", "the header says 2 frames of .*, the pixel data hold")])
def test_a_broken_file_stands_in_the_ledger_with_its_reason(tree, kind, words):
    cohort = read_cohort(Store(tree))
    wanted = SYNTAX.get(kind, ExplicitVRLittleEndian)
    key = next(k for k in cohort.table["key"] if pydicom.dcmread(tree/k, stop_before_pixels=True).file_meta.TransferSyntaxUID == wanted)
    data, ledger = (tree/key).read_bytes(), Ledger(tree/"data_errors.csv", max_share=1 / len(cohort.table))
    replace(tree/key, broken(data, kind) or b"x")
    kept = [row.key for row, _, _ in stream(cohort.table, Store(tree), PREP, ledger)]
    assert key not in kept and len(kept) == len(cohort.table) - 1
    ledger.check(len(cohort.table))
    said = pd.read_csv(tree/"data_errors.csv", dtype=str)
    assert said["item"].tolist() == [key.split("/")[3]] and key in said["message"][0] and said["error"][0] == "VolumeError"
    assert re.search(words, said["message"][0]), said["message"][0]
    with pytest.raises(ValueError, match="could not be read"):
        strict = Ledger(max_share=0.0)
        list(stream(cohort.table, Store(tree), PREP, strict))
        strict.check(len(cohort.table))


def test_a_volume_under_two_participants_is_caught(tree):
    cohort = read_cohort(Store(tree))
    train, val = (cohort.table.query(f"split == '{s}'").iloc[0] for s in ("train", "val"))
    replace(tree/val["key"], (tree/train["key"]).read_bytes())
    ledger = Ledger(max_share=1)
    kept = [row.participant for row, _, _ in stream(read_cohort(Store(tree)).table, Store(tree), PREP, ledger)]
    pair = {train["participant"], val["participant"]}
    assert set(ledger.table()["item"]) < pair and len(pair & set(kept)) == 1 and "duplicate of" in ledger.table()["message"][0]


def test_the_drawn_faults_are_all_found(tmp_path, monkeypatch):
    monkeypatch.setenv("CVSLAB_CACHE", str(tmp_path/"cache"))
    tree, ledger = draw_oct(tmp_path/"tree", scale=0.02, seed=1), Ledger(max_share=0.2)
    cohort = read_cohort(Store(tree), max_lost=0.1)
    assert cohort.lost["reason"].tolist() == ["listed in the manifest, absent or empty in the store"] * 2
    list(stream(cohort.table, Store(tree), PREP, ledger))
    messages = ledger.check(len(cohort.table))["message"]
    assert len(messages) == 3 and messages.str.contains("constant").sum() == 1 and messages.str.contains("duplicate of").sum() == 1


def test_the_recorded_quantile_gives_up_on_large_volumes():
    rng = np.random.default_rng(0)
    frames = lambda indices: rng.integers(0, 200, (len(indices), 260, 260)).astype(np.uint8)
    small, large = Volume((60, 260, 260), frames), Volume((260, 260, 260), frames)
    at_top = [float((Preprocess((8, 32, 32), "recorded", "stored")(v) == 1).float().mean()) for v in (small, large)]
    assert at_top[0] == pytest.approx(0.01, abs=2e-3) and at_top[1] < 0.005
    assert RECORDED_PREPROCESS.name != Preprocess().name


def test_the_card_is_of_what_the_volumes_hold(tree, tmp_path):
    before = read_cohort(Store(tree))
    copy = Path(shutil.copytree(tree, tmp_path / "elsewhere"))
    there = read_cohort(Store(copy))
    assert {k: there.card[k] for k in ("fingerprint", "content")} == {k: before.card[k] for k in ("fingerprint", "content")}
    assert there.table["etag"].tolist() == before.table["etag"].tolist()
    path = copy / there.table["key"].iloc[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)                                  # the same size, one bit of one voxel
    after = read_cohort(Store(copy))
    assert after.card["content"] != before.card["content"]
    assert (after.table["etag"] != before.table["etag"]).tolist() == [True] + [False] * (len(after.table) - 1)


def test_tensors_come_from_the_cache_the_second_time_and_from_anew_when_the_file_changes(tree):
    store, prep = Store(tree), PREP
    table = read_cohort(store).table.head(6)
    cold = {row.participant: x for row, x, _ in stream(table, store, prep, Ledger(max_share=0))}
    warm = {row.participant: (x, info) for row, x, info in stream(table, store, prep, Ledger(max_share=0))}
    assert all(torch.equal(x, warm[p][0]) and warm[p][1]["seconds_decode"] == 0 for p, x in cold.items())
    other = sorted((tree/FOLDER/"topcon_maestro2").glob("7*/*.dcm"))[-1].read_bytes()
    replace(tree/table["key"][0], other)
    fresh = read_cohort(store).table.head(6)
    x = next(x for row, x, _ in stream(fresh, store, prep, Ledger(max_share=1)) if row.key == table["key"][0])
    assert not torch.equal(x, cold[table["participant"][0]])
    item = VolumeSet(fresh, store, prep)[0]
    assert torch.equal(item["video"], x) and item["y"] == fresh["label"][0]


def test_many_volumes_need_the_memory_of_a_few(tmp_path, monkeypatch):
    monkeypatch.setenv("CVSLAB_CACHE", str(tmp_path/"cache"))
    rng, process = np.random.default_rng(0), psutil.Process()
    for i in range(30): np.save(tmp_path/f"{i}.npy", rng.random((12, 12, 12)))
    table = pd.DataFrame([dict(participant=str(i), split="train", label=0, key=f"{i}.npy", etag=str(i)) for i in range(30)])
    seen = [process.memory_info().rss for _ in stream(table, Store(tmp_path), Preprocess((64, 192, 192)), Ledger(max_share=0), keep=False)]
    assert len(seen) == 30 and max(seen[10:]) - max(seen[:10]) < 5 * 64 * 192 * 192 * 4
