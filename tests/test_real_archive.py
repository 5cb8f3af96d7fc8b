"""The drawn tree, row by row, against what independent readers of the real archive attest, read with json, numpy and
Pillow alone; and both attested forms of each list, read by cvslab."""
import ast
import csv
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pages import run_page, small
from PIL import Image

from cvslab import endoscapes
from cvslab.demo import draw_endoscapes

SPLITS = ("train", "val", "test")
NAMES = ["background", "cystic_plate", "calot_triangle", "cystic_artery", "cystic_duct", "gallbladder", "tool"]
FOLDS = [f"{share}/train_{k}" for share in ("12_5", "25") for k in range(3)]
JSONS = {"annotation_coco.json", "annotation_ds_coco.json", "annotation_coco_vid.json"}
WIDTH, HEIGHT = 60, 34


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    "Small frames, and videos as long as in the demo: what is irregular lies in names and files, not in pixels."
    folder = tmp_path_factory.mktemp("archive")/"endoscapes"
    return draw_endoscapes(folder, seed=2, videos=(9, 3, 3), seconds=(50, 60), size=(WIDTH, HEIGHT), workers=1)


@pytest.fixture(scope="module")
def table(tree):
    with open(tree/"all_metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    key = "is_ds_keyframe"
    return [row | dict(vid=int(row["vid"]), frame=int(row["frame"]), key=row[key] == "True") for row in rows]


def coco(tree, name):
    return json.loads((tree/name).read_text())


def frames(folder):
    return {tuple(map(int, path.stem.split("_"))) for path in folder.glob("*.jpg")}


def listed(tree, name):
    return {divmod(image["id"], 1_000_000) for image in coco(tree, name)["images"]}


def videos(tree, name):
    return {int(float(line)) for line in (tree/f"{name}_vids.txt").read_text().split()}


def classes(path, size=(HEIGHT, WIDTH)):
    mask = np.asarray(Image.open(path))
    assert mask.shape == (*size, 3) and (mask == mask[..., :1]).all()
    return mask[..., 0]


def decoded(rle):
    """COCO's run lengths, from its definition: five bits a character, low ones first, and a sixth that says whether more
    follow; from the fourth run on, the difference to the one two before."""
    runs, value, shift = [], 0, 0
    for code in rle["counts"].encode():
        value |= ((code - 48) & 31) << shift
        shift += 5
        if (code - 48) & 32:
            continue
        if (code - 48) & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    height, width = rle["size"]
    return np.repeat(np.arange(len(runs)) % 2, runs).reshape(width, height).T.astype(bool)


# lists and tables ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [*SPLITS, *(f"{split}_seg" for split in SPLITS)])
def test_lists_of_videos_are_written_as_savetxt_writes_floats(tree, name):
    lines = (tree/f"{name}_vids.txt").read_text().splitlines()
    assert lines and all(re.fullmatch(r"[1-9]\.\d{18}e[+-]\d{2}", line) for line in lines)
    numbers = [float(line) for line in lines]
    assert numbers == sorted(numbers) and all(number.is_integer() for number in numbers)


def test_label_map_holds_names_alone(tree):
    assert (tree/"seg_label_map.txt").read_text().splitlines() == NAMES


def test_labels_of_instances_are_floats_in_text(tree):
    paths = list((tree/"insseg").glob("*.csv"))
    for path in paths:
        lines = path.read_text().splitlines()
        assert all("." in line for line in lines) and {float(line) for line in lines} <= set(range(1, 7))
        assert np.load(path.with_suffix(".npy")).shape == (len(lines), HEIGHT, WIDTH)
    assert paths


def test_key_frames_are_125_apart_and_means_are_exact_thirds(table):
    by_video, thirds = {}, {0., 1/3, 2/3, 1.}
    for row in table:
        assert [float(row[c]) for c in ("C1", "C2", "C3")] == ast.literal_eval(row["avg_cvs"])
        assert set(ast.literal_eval(row["avg_cvs"])) <= thirds
        if row["key"]:
            by_video.setdefault(row["vid"], []).append(row["frame"])
    assert all(set(np.diff(keys)) == {125} for keys in by_video.values())


# folders ---------------------------------------------------------------------------------------------------------------------

def test_all_holds_links_to_the_listed_frames_and_the_union_of_the_video_files(tree):
    parts = [coco(tree, f"{split}/annotation_coco_vid.json") for split in SPLITS]
    union = coco(tree, "all/annotation_coco.json")
    def plain(shapes):
        return [{k: v for k, v in a.items() if k != "id"} for a in shapes]
    assert union["images"] == [image for part in parts for image in part["images"]]
    assert plain(union["annotations"]) == [a for part in parts for a in plain(part["annotations"])]
    assert len({a["id"] for a in union["annotations"]}) == len(union["annotations"])
    names = {image["file_name"] for image in union["images"]}
    assert {path.name for path in (tree/"all").iterdir()} == names | {"annotation_coco.json"}


@pytest.mark.parametrize("fold", FOLDS)
def test_folds_of_the_label_budgets_hold_every_frame_of_their_videos_as_links(tree, fold):
    ids = {video for video, _ in frames(tree/fold)}
    assert ids <= videos(tree, "train") and {path.name for path in (tree/fold).glob("*.json")} == JSONS
    assert frames(tree/fold) == {frame for frame in frames(tree/"train") if frame[0] in ids}
    assert frames(tree/fold) == listed(tree, f"{fold}/annotation_coco_vid.json")


def test_the_segmentation_subset_of_train_is_the_last_fold_of_a_quarter(tree):
    assert (tree/"train_seg").is_symlink() and (tree/"train_seg").resolve() == tree/"25/train_2"
    assert {video for video, _ in frames(tree/"25/train_2")} == videos(tree, "train_seg")


@pytest.mark.parametrize("split", SPLITS)
def test_segmentation_subsets_hold_all_frames_of_their_videos(tree, split):
    folder, ids = tree/f"{split}_seg", videos(tree, f"{split}_seg")
    assert ids and frames(folder) == {frame for frame in frames(tree/split) if frame[0] in ids}
    assert {path.name for path in folder.glob("*.json")} == (JSONS if split == "train" else {"annotation_coco.json"})
    masked = {tuple(map(int, path.stem.split("_"))) for path in (tree/"semseg").glob("*.png")}
    masked = {frame for frame in masked if frame[0] in ids}
    assert listed(tree, f"{split}_seg/annotation_coco.json") == masked < frames(folder)


@pytest.mark.parametrize("folder", ["all", "train_seg", "val_seg", "test_seg", *FOLDS])
def test_links_lead_to_the_frame_of_the_same_name_in_its_split(tree, folder):
    for path in (tree/folder).glob("*.jpg"):
        assert path.is_symlink() and not os.path.isabs(os.readlink(path))
        there = path.resolve()
        assert there.parent.parent == tree and there.parent.name in SPLITS and there.name == path.name
    assert all(not path.is_symlink() for split in SPLITS for path in (tree/split).iterdir())


# annotations -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("folder", [*SPLITS, *FOLDS])
def test_frames_are_counted_from_0_in_the_video_files_alone(tree, folder):
    record = {"file_name", "height", "width", "id", "is_det_keyframe", "ds", "video_id", "is_ds_keyframe"}
    for name in ("annotation_coco.json", "annotation_ds_coco.json"):
        assert all(set(image) == record for image in coco(tree, f"{folder}/{name}")["images"])
    counted = {}
    for image in coco(tree, f"{folder}/annotation_coco_vid.json")["images"]:
        counted.setdefault(image["video_id"], []).append(image["frame_id"])
    assert counted and all(numbers == list(range(len(numbers))) for numbers in counted.values())


@pytest.mark.parametrize("name", [f"{split}/{name}" for split in SPLITS for name in sorted(JSONS)]
                         + [f"{split}_seg/annotation_coco.json" for split in SPLITS])
def test_boxes_are_floats_and_areas_smaller_than_boxes(tree, name):
    shapes = coco(tree, name)["annotations"]
    assert shapes and all(isinstance(number, float) for a in shapes for number in a["bbox"])
    assert all(0 < a["area"] <= a["bbox"][2]*a["bbox"][3] for a in shapes)
    unmasked = [a["area"]/(a["bbox"][2]*a["bbox"][3]) for a in shapes if not a["segmentation"]]
    assert np.mean(np.array(unmasked) < 1) > .95 if "seg" not in name else not unmasked


@pytest.mark.parametrize("split", SPLITS)
def test_masks_are_run_lengths_of_single_objects_that_an_independent_decoder_reads(tree, split):
    data = coco(tree, f"{split}_seg/annotation_coco.json")
    stems = {image["id"]: image["file_name"].removesuffix(".jpg") for image in data["images"]}
    assert {c["id"]: c["name"] for c in data["categories"]} == dict(enumerate(NAMES[1:], 1))
    for a in data["annotations"]:
        region = decoded(a["segmentation"])
        rows, columns = np.nonzero(region)
        assert isinstance(a["segmentation"]["counts"], str) and a["iscrowd"] == 0 and a["area"] == region.sum()
        assert a["bbox"] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        found = set(np.unique(classes(tree/"semseg"/f"{stems[a['image_id']]}.png")[region]))
        assert found <= {a["category_id"], 7, 255}


# masks -----------------------------------------------------------------------------------------------------------------------

def test_a_quarter_of_the_masks_is_open_somewhere_and_one_of_val_has_a_stray_class(tree):
    found = {path.stem: set(np.unique(classes(path)).tolist()) for path in (tree/"semseg").glob("*.png")}
    assert set().union(*found.values()) <= {*range(7), 7, 255}
    stray = [stem for stem, values in found.items() if 7 in values]
    assert len(stray) == 1 and (tree/"val"/f"{stray[0]}.jpg").is_file()
    assert .15 < np.mean([255 in values for values in found.values()]) < .35
    assert all(values & set(range(1, 7)) for values in found.values())


# gaps ------------------------------------------------------------------------------------------------------------------------

def test_frames_that_the_video_file_of_test_does_not_list(tree, table):
    rows = {(row["vid"], row["frame"]): row for row in table}
    gaps = sorted(frames(tree/"test") - listed(tree, "test/annotation_coco_vid.json"))
    assert set(gaps) <= set(rows) and not set(gaps) & frames(tree/"all")
    assert all(ast.literal_eval(rows[gap]["avg_cvs"]) == [0, 0, 0] and not rows[gap]["key"] for gap in gaps)
    first_key = {}
    for row in table:
        if row["key"]:
            first_key.setdefault(row["vid"], row["frame"])
    before = [gap for gap in gaps if gap[1] < first_key[gap[0]]]
    between = [gap for gap in gaps if gap[1] > first_key[gap[0]]]
    [early], [late] = {vid for vid, _ in before}, {vid for vid, _ in between}
    assert early != late
    assert before == [frame for frame in sorted(rows) if frame[0] == early and frame[1] < first_key[early]]
    blocks = [between[i:i + 4] for i in range(0, len(between), 4)]
    assert len(between) % 4 == 0 and len(blocks) > 1
    for block in blocks:
        start = block[0][1] - 25
        assert [frame for _, frame in block] == [start + 25, start + 50, start + 75, start + 100]
        assert rows[late, start]["key"] and rows[late, start + 125]["key"]


def test_train_and_val_are_listed_completely(tree):
    for split in ("train", "val"):
        assert frames(tree/split) == listed(tree, f"{split}/annotation_coco_vid.json")
    for split in SPLITS:
        assert listed(tree, f"{split}/annotation_ds_coco.json") <= listed(tree, f"{split}/annotation_coco_vid.json")


def test_names_of_video_122_sorted_as_text_break_its_five_second_sequences(tree, table):
    names = sorted(path.stem for path in (tree/"val").glob("122_*.jpg"))
    keys = {f"{row['vid']}_{row['frame']}" for row in table if row["key"]}
    windows = [names[i - 4:i + 1] for i in range(4, len(names)) if names[i] in keys]
    sequences = [[int(name.split("_")[1]) for name in window] for window in windows]
    broken = [sequence for sequence in sequences if np.diff(sequence).tolist() != [25]*4]
    assert len(sequences) > 5 and len(broken) > len(sequences)/4
    numbers = sorted(frame for video, frame in frames(tree/"val") if video == 122)
    assert set(np.diff(numbers)) == {25}


# where links cannot be made --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("refused", [("symlink",), ("symlink", "link")])
def test_where_there_are_no_links_the_files_are_the_same(tmp_path, monkeypatch, refused):
    def refuse(*args, **kwargs):
        raise OSError("a required privilege is not held by the client")
    tiny, contents = dict(videos=(4, 1, 1), seconds=(20, 22), size=(WIDTH, HEIGHT), workers=1), []
    linked = draw_endoscapes(tmp_path/"linked", **tiny)
    for name in refused:
        monkeypatch.setattr(os, name, refuse)
    other = draw_endoscapes(tmp_path/"other", **tiny)
    for root in (linked, other):
        paths = [path for path in root.rglob("*") if path.is_file()] + list((root/"train_seg").iterdir())
        contents.append({path.relative_to(root).as_posix(): path.read_bytes() for path in paths})
    assert contents[0] == contents[1] and not any(path.is_symlink() for path in other.rglob("*"))


# the reader ------------------------------------------------------------------------------------------------------------------

def as_attested(tree):
    pass


def as_described_first(tree):
    "The other form of each list: plain numbers, a label map with numbers, and no links."
    for path in tree.glob("*_vids.txt"):
        path.write_text("".join(f"{float(line)}\n" for line in path.read_text().split()))
    (tree/"seg_label_map.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(NAMES)))
    for path in (tree/"insseg").glob("*.csv"):
        path.write_text("".join(f"{int(float(line))}\n" for line in path.read_text().split()))
    for folder in ("all", "12_5", "25"):
        shutil.rmtree(tree/folder)
    (tree/"train_seg").unlink()


def as_unpacked_under_windows(tree):
    "Links of pictures and folders are small files that hold the name of their target, or are empty."
    for path in [path for path in tree.rglob("*") if path.is_symlink()]:
        target = "" if path.suffix and int(path.stem.split("_")[1]) % 2 else os.readlink(path)
        path.unlink()
        path.write_text(target)


@pytest.fixture
def copy(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("CVSLAB_CACHE", str(tmp_path/"cache"))
    return Path(shutil.copytree(tree, tmp_path/"copy", symlinks=True))


@pytest.mark.parametrize("form", [as_attested, as_described_first, as_unpacked_under_windows])
def test_the_reader_sees_the_same_in_either_form(tree, copy, table, form):
    form(copy)
    found = endoscapes.read_frames(copy)
    rows = sorted((row["vid"], row["frame"], row["key"]) for row in table)
    assert list(zip(found["video"], found["frame"], found["key"])) == rows
    assert Counter(found["split"]) == {split: len(frames(tree/split)) for split in SPLITS}
    masked = found[found["mask"] != ""]
    assert {f"{r.video}_{r.frame}" for r in masked.itertuples()} == {path.stem for path in (tree/"semseg").glob("*.png")}
    for split in SPLITS:
        for which, name in {"boxes": "annotation_coco", "key": "annotation_ds_coco", "1fps": "annotation_coco_vid"}.items():
            images = endoscapes.read_coco(copy, split, which)
            assert set(zip(images["video"], images["frame"])) == listed(tree, f"{split}/{name}.json")
        boxes = endoscapes.read_objects(copy, split)[["x", "y", "w", "h"]].to_numpy().tolist()
        assert sorted(boxes) == sorted(a["bbox"] for a in coco(tree, f"{split}/annotation_coco.json")["annotations"])
    for mask in masked["mask"]:
        there = classes(tree/mask)
        np.testing.assert_array_equal(endoscapes.read_mask(copy, mask), np.where(there == 7, 255, there))


def test_what_is_irregular_is_listed(tree, copy):
    as_unpacked_under_windows(copy)
    drawn, unpacked = (endoscapes.irregularities(t).groupby("what")["count"].sum() for t in (tree, copy))
    gaps = len(frames(tree/"test") - listed(tree, "test/annotation_coco_vid.json"))
    assert drawn.to_dict() == {"frames missing in a COCO file": gaps, "masks with unknown classes": 1}
    assert unpacked["link unpacked as a file"] >= 1
    assert unpacked["pictures unpacked as links"] >= len(frames(tree/"all"))


# the pages -------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def masked_tree(tmp_path_factory):
    "Every key-frame has a mask, so that the first clips of a page have some."
    folder = tmp_path_factory.mktemp("pages")/"endoscapes"
    return draw_endoscapes(folder, videos=(4, 2, 1), seconds=(20, 22), size=(107, 60), mask_every=5, masked=1., workers=1)


@pytest.mark.parametrize("page", ["08_multitask", "09_staged", "11_attention_supervision", "12_regularized", "14_hybrid",
                                  "15_window_attention"])
def test_pages_begin_on_a_tree_with_a_stray_class_and_say_so(scratch, masked_tree, page, monkeypatch, capsys):
    monkeypatch.setattr(endoscapes, "_said", set())
    [stray] = [path.stem for path in (masked_tree/"semseg").glob("*.png") if 7 in classes(path, (60, 107))]
    names = run_page(scratch, page, small("stray", data=str(masked_tree), max_clips=0), until="training.estimate(")
    out = capsys.readouterr().out
    assert f"{stray}.png (class 7" in out and out.count("class 7") == 1
    val = names["datasets"]["val"]
    [at] = np.flatnonzero(val.clips["clip"] == stray)
    assert set(np.unique(val[int(at)]["mask"])) - {255} <= set(range(7)) and val[int(at)]["mask_frames"].any()
    assert all(set(np.unique(item["mask"])) <= {*range(7), 255} for item in (val[i] for i in range(len(val))))
