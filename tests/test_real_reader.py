"The reader against what people report of the real archive and of files of other tools: every kind in several forms."
import json, os, shutil, subprocess, sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_endoscapes import HEIGHT, WIDTH, decodes, draw, edit, encode_rle, mask_of

from cvslab import core, endoscapes, features
from cvslab.core import contents
from cvslab.demo import draw_endoscapes
from cvslab.endoscapes import (CLASSES, OFFICIAL, RECORDED, Protocol, add_masks, clip_proof, data_card, disagreements, frame_rate, geometry_proof,
                               irregularities, mark_black, open_datasets, open_tree, pack_frames, read_coco, read_frames, read_mask, read_objects)

SMALL = Protocol(n_frames=2, size=16)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.setenv("CVSLAB_CACHE", str(tmp_path/"cache"))
    endoscapes._said.clear()
    return draw(tmp_path/"tree")


def change(path, how):
    coco = json.loads(path.read_text())
    how(coco)
    path.write_text(json.dumps(coco))


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        call(*args, **kwargs)
    return str(error.value)


def mask_pixels(tree, source=True):
    "Pixels of each class in the packed masks of all splits."
    store = open_datasets(tree, replace(SMALL, size=64), masks=source)[0]["train"].store
    return np.bincount(np.load(store.masks[0]).ravel(), minlength=256)


# ---- lists, tables and the rate of frames

@pytest.mark.parametrize("text", [b"1.000000000000000000e+00\n", b"1\n", b"1.0\n", b"1e0\r\n", b"+1.", b"\n1.0\n\n", b"  1.00 \n", b"\xef\xbb\xbf1.0\n",
                                  "1.0\r\n".encode("utf-16"), b"0.1e1\n"])
def test_every_form_of_a_list_of_videos(tree, text):
    before = read_frames(tree)
    (tree/"train_vids.txt").write_bytes(text)
    pd.testing.assert_frame_equal(read_frames(tree), before)


@pytest.mark.parametrize("text, said", {"1.5\n": "line 1 '1.5'", "1.0\n2.000000000000000001e-01\n": "line 2 '2.000000000000000001e-01'", "nan": "line 1 'nan'",
                                        "1.0\ninf\n": "line 2 'inf'", "-1": "line 1 '-1'", "1 2": "line 1 '1 2'", "v1": "line 1 'v1'"}.items())
def test_what_is_no_video_is_refused_by_file_line_and_value(tree, text, said):
    (tree/"val_vids.txt").write_text(text)
    assert f"val_vids.txt: {said}" in refusal(read_frames, tree)


def rewrite(sep=",", coding="utf-8", newline="\n", **columns):
    def write(path):
        table = pd.read_csv(path)
        for name, how in columns.items():
            table[name] = table[name].map(how)
        path.write_bytes(table.to_csv(index=False, sep=sep, lineterminator=newline).encode(coding))
    return write


def comma(value): return str(round(value, 4)).replace(".", ",")


CLOTHES = {"mark": rewrite(coding="utf-8-sig"), "utf-16": rewrite(coding="utf-16"), "windows": rewrite(newline="\r\n"), "tabs": rewrite(sep="\t"),
           "semicolons and decimal commas": rewrite(sep=";", C1=comma, C2=comma, C3=comma), "excel": rewrite(is_ds_keyframe=lambda v: str(v).upper()),
           "digits": rewrite(is_ds_keyframe=int), "floats": rewrite(vid=lambda v: f"{v:.18e}", frame=lambda v: f"{v:.1f}"),
           "blanks": rewrite(vid=lambda v: f" {v} ", is_ds_keyframe=lambda v: f" {v}")}


@pytest.mark.parametrize("kind", CLOTHES)
def test_the_table_in_other_clothes(tree, kind):
    before = read_frames(tree)
    CLOTHES[kind](tree/"all_metadata.csv")
    pd.testing.assert_frame_equal(read_frames(tree), before, atol=1e-4)


def test_missing_labels_and_votes(tree):
    edit(tree, lambda d: d.assign(C1=d["C1"].astype(object).where(d["frame"] > 25, "n/a"), cvs_annotator_2=d["cvs_annotator_2"].where(d["vid"] > 1, "N/A")))
    frames = read_frames(tree)
    assert frames["c1"].notna().all() and frames.loc[frames["video"] == 1, "r2_c1"].isna().all() and frames.query("video == 2 and key")["r2_c3"].item() == 1


@pytest.mark.parametrize("column, value, said", [("C2", "0.3x", "row 3 '0.3x'"), ("frame", "1000025", "row 3 '1000025'"), ("vid", "20230115123456", "row 3 '20230115123456'"), ("vid", "1.5", "row 3 '1.5'"), ("frame", "n/a", "row 3 'n/a'"), ("C1", "1,2,3", "row 3 '1,2,3'"),
                                                 ("is_ds_keyframe", "perhaps", "row 3 'perhaps'"), ("frame", "-25", "row 3 '-25'"), ("frame", "1,250", "row 3 '1,250'")])
def test_a_wrong_value_is_named_with_file_column_and_row(tree, column, value, said):
    edit(tree, lambda d: d.assign(**{column: [value if i == 1 else v for i, v in enumerate(d[column].astype(object))]}))
    assert f"all_metadata.csv, column '{column}': {said}" in refusal(read_frames, tree)


def test_frames_a_second_are_of_the_data(tree):
    assert data_card(tree)["fps"] == frame_rate(tree) == 25 and read_frames(tree)["seconds"].tolist()[:3] == [1, 2, 3]
    for path in [*tree.glob("*/*.jpg"), *tree.glob("semseg/*.png")]:                  # the same recordings at 30 frames a second
        video, frame = path.stem.split("_")
        path.rename(path.with_name(f"{video}_{int(frame)*6//5}{path.suffix}.new"))
    for path in tree.glob("*/*.new"): path.rename(path.with_suffix(""))
    edit(tree, lambda d: d.assign(frame=d["frame"]*6//5))
    for path in tree.glob("*/*.json"): path.unlink()
    protocol = replace(RECORDED, n_frames=9, size=16)
    wrong = clip_proof(open_datasets(tree, protocol)[0]["train"])
    (tree/"fps.txt").write_text("30\n")
    right = clip_proof(open_datasets(tree, protocol)[0]["train"])
    assert (wrong.turned, right.turned, data_card(tree)["fps"]) == (False, True, 30) and "from -4 to 4 s, 1 s apart" in right.seen
    assert "frames that are not a second apart" not in irregularities(tree)["what"].tolist()


@pytest.mark.parametrize("text", ["thirty", "0", "-25", "25\n30\n", "", "inf"])
def test_a_rate_that_is_none_is_refused(tree, text):
    (tree/"fps.txt").write_text(text)
    assert "fps.txt" in refusal(read_frames, tree)


# ---- the archive as it is

def as_attested(tree):
    "What independent readers of the archive say is there besides: links to frames, folders of all 1-fps frames with three files each, 255 and float text."
    for split in endoscapes.SPLITS:
        for folder in ("all", f"{split}_seg"):
            (tree/folder).mkdir(exist_ok=True)
            for path in (tree/split).glob("*.jpg"): shutil.copy(path, tree/folder/path.name)
        video = int(next((tree/split).glob("*.jpg")).stem.split("_")[0])
        for name in (f"{split}_vids.txt", f"{split}_seg_vids.txt"): np.savetxt(tree/name, [float(video)])
    for name in ("annotation_ds_coco", "annotation_coco_vid"): shutil.copy(tree/f"train/{name}.json", tree/f"train_seg/{name}.json")
    for fold in ("12_5/train_0", "25/train_2"): shutil.copytree(tree/"train", tree/fold)
    lists = [json.loads((tree/f"{s}/annotation_coco_vid.json").read_text()) for s in endoscapes.SPLITS]
    (tree/"all/annotation_coco.json").write_text(json.dumps(dict(lists[0], images=[i for c in lists for i in c["images"]])))
    (tree/"seg_label_map.txt").write_text("\n".join(CLASSES) + "\n")
    (tree/"insseg").mkdir()
    np.savetxt(tree/"insseg/1_175.csv", [4., 5.])
    mask = mask_of(1, 175)
    mask[:3] = 255
    Image.fromarray(np.repeat(mask[..., None], 3, -1)).save(tree/"semseg/1_175.png")


def test_the_attested_archive_reads_as_the_described_one(tree):
    before = read_frames(tree)
    as_attested(tree)
    after = read_frames(tree)
    pd.testing.assert_frame_equal(after, before)
    assert (after["mask"] != "").sum() == 1                                            # a folder of all frames is no folder of masks
    assert (read_mask(tree, "semseg/1_175.png")[:3] == 255).all() and irregularities(tree).empty
    datasets, _ = open_datasets(tree, SMALL, masks=True, budget="25/train_2")
    assert len(datasets["train"]) == 2 and len(read_coco(tree, "all", "boxes")) == 20 and len(read_coco(tree, "train_seg")) == 11


BARE = "\n".join(CLASSES) + "\n"
LABEL_MAPS = {"names": BARE, "without background": "\n".join(CLASSES[1:]), "numbered": "\n".join(f"{i} {c}" for i, c in enumerate(CLASSES)),
              "colons": "\r\n".join(f"{i}: {c.title()}" for i, c in enumerate(CLASSES)), "tabs": "\n".join(f"{i}\t{c}" for i, c in enumerate(CLASSES)),
              "commas": "\n".join(f"{i},{c}" for i, c in enumerate(CLASSES)), "spelled": BARE.upper().replace("_", "-"), "blanks": BARE.replace("_", " "),
              "with a name for 255": "\n".join(f"{i} {c}" for i, c in [*enumerate(CLASSES), (255, "unlabelled")])}


@pytest.mark.parametrize("kind", LABEL_MAPS)
def test_every_form_of_the_label_map(tree, kind):
    (tree/"seg_label_map.txt").write_text(LABEL_MAPS[kind])
    assert (read_mask(tree, "semseg/1_175.png") == mask_of(1, 175)).all()


def test_masks_of_another_numbering_count_by_name(tree):
    (tree/"seg_label_map.txt").write_text("0 background\n4 Gallbladder\n5 cystic duct\n")
    mask = mask_of(1, 175)
    assert (read_mask(tree, "semseg/1_175.png") == np.where(mask == 4, 5, np.where(mask == 5, 4, mask))).all()
    swapped = mask_pixels(tree)[[4, 5]].tolist()
    (tree/"seg_label_map.txt").unlink()
    assert mask_pixels(tree)[[5, 4]].tolist() == swapped and min(swapped) > 0          # the map is part of what is cached


@pytest.mark.parametrize("text, said", [("background\nliver\n", "liver"), ("0 background\nmetal 3\n", "with a number and lines without"), ("", "empty"), ("0 nothing", "0 nothing")])
def test_a_label_map_that_is_none(tree, text, said):
    (tree/"seg_label_map.txt").write_text(text)
    assert said in refusal(read_mask, tree, "semseg/1_175.png") and "seg_label_map.txt" in refusal(mask_pixels, tree)


@pytest.mark.parametrize("values, dtype", [([7], np.uint8), ([9, 200], np.uint8), ([300], np.uint16), ([254], np.uint8)])
def test_unknown_classes_count_as_unlabelled_and_are_named_once(tree, capsys, values, dtype):
    whole, mask = mask_pixels(tree), mask_of(1, 175).astype(dtype)
    for i, value in enumerate(values): mask[21, i] = value
    Image.fromarray(mask).save(tree/"semseg/1_175.png")
    for _ in range(2): open_datasets(tree, SMALL, masks=True)
    said = capsys.readouterr().out
    shown = " and ".join(f"class {min(v, 256)}, 1 pixels" for v in values).replace(" and ", ", ")
    assert said.count("note:") == 1 and f"semseg/1_175.png ({shown})" in said
    read = read_mask(tree, "semseg/1_175.png")
    assert (read[21, :len(values)] == 255).all() and (read == 255).sum() == len(values) and (read[:20] == mask_of(1, 175)[:20]).all()
    row = irregularities(tree).set_index("what").loc["masks with unknown classes"]
    assert row["count"] == 1 and shown in row["examples"] and whole[5] > 0


def test_classes_that_are_known_and_255_are_no_irregularity(tree, capsys):
    mask = np.arange(HEIGHT*WIDTH).reshape(HEIGHT, WIDTH) % 8
    Image.fromarray(np.where(mask == 7, 255, mask).astype(np.uint8)).save(tree/"semseg/1_175.png")
    open_datasets(tree, SMALL, masks=True)
    assert "note" not in capsys.readouterr().out and irregularities(tree).empty


def test_frames_missing_in_a_coco_file_are_reported_and_nothing_else_happens(tree):
    frames, cut = read_frames(tree), [(1, 50), (1, 75), (1, 200)]
    change(tree/"train/annotation_coco_vid.json", lambda c: c.update(images=[i for i in c["images"] if divmod(i["id"], 1_000_000) not in cut]))
    change(tree/"test/annotation_ds_coco.json", lambda c: c.update(images=[]))
    pd.testing.assert_frame_equal(read_frames(tree), frames)
    odd = irregularities(tree)
    assert odd["what"].tolist() == ["frames missing in a COCO file"]*2 and odd["where"].tolist() == ["train/annotation_coco_vid.json", "test/annotation_ds_coco.json"]
    assert odd["count"].tolist() == [3, 1] and odd["examples"].tolist() == ["video 1 (3)", "video 3 (1)"]
    assert disagreements(frames, read_coco(tree, "train")).empty and len(open_datasets(tree, replace(RECORDED, n_frames=2, size=16))[0]["train"]) == 11


def test_what_else_is_odd_in_a_tree(tree):
    frames = read_frames(tree)
    assert irregularities(tree).empty and irregularities(tree).columns.tolist() == ["what", "where", "count", "examples", "meaning"]
    marked = mark_black(frames, pack_frames(tree, frames, size=8))
    black = irregularities(tree, marked).set_index("what").loc["black frames"]
    assert black["count"] == 2 and "1 in train" in black["examples"] and "1 in val" in black["examples"] and "1 key-frames" in black["examples"]
    (tree/"train_vids.txt").write_text("1.0\n77.0\n")
    (tree/"train/1_125.jpg").unlink()
    edit(tree, lambda d: d[(d["vid"] != 1) | (d["frame"] != 125)])
    (tree/"semseg/1_175.png").rename(tree/"semseg/9_175.png")
    change(tree/"val/annotation_coco_vid.json", lambda c: c["images"][1].update(is_ds_keyframe=False))
    odd = irregularities(tree).set_index("what")
    assert odd.loc["videos without frames", "examples"] == "77" and odd.loc["frames that are not a second apart", "examples"] == "2 s before 1_150"
    assert odd.loc["masks of no frame", "examples"] == "9_175" and odd.loc["COCO file against table", "where"].tolist() == ["train/annotation_coco_vid.json", "val/annotation_coco_vid.json"]
    assert "COCO file against table" in odd.index


@pytest.mark.parametrize("column, how", [("C2", lambda v: 1 - v), ("cvs_annotator_2", lambda v: v if v != v else "[1, 1, 1]" if v == "[0, 0, 0]" else "[0, 0, 0]")])
def test_labels_that_are_not_the_mean_of_the_votes_are_counted(tree, column, how):
    change_all = rewrite(**{column: how})
    change_all(tree/"all_metadata.csv")
    frames = read_frames(tree).query("key")
    odd = irregularities(tree).set_index("what").loc["labels that are not the mean of the votes"]
    means = {c: frames[[f"r{k}_{c}" for k in (1, 2, 3)]].mean(axis=1) for c in ("c1", "c2", "c3")}
    wrong = np.any([(means[c] - frames[c]).abs() > .01 for c in means], axis=0)
    assert wrong.any() and odd["count"] == wrong.sum() and odd["where"] == "all_metadata.csv"


def test_the_demo_has_nothing_odd(tmp_path, monkeypatch):
    monkeypatch.setenv("CVSLAB_CACHE", str(tmp_path/"cache"))
    tree = draw_endoscapes(tmp_path/"tree", videos=(3, 1, 1), seconds=(20, 22), size=(40, 24), workers=1)
    known = {"frames missing in a COCO file", "masks with unknown classes"}            # of the archive itself, where the drawing has them
    assert set(irregularities(tree)["what"]) <= known


# ---- links that were unpacked as files

LINKS = {
    "empty budget": ("12_5/train_0/annotation_ds_coco.json", "", "12_5/train_0/annotation_ds_coco.json is empty: a link of the archive, copy the file it points to"),
    "zeros": ("12_5/train_0/annotation_ds_coco.json", "\0"*40, "12_5/train_0/annotation_ds_coco.json is empty: a link"),
    "text": ("12_5/train_0/annotation_ds_coco.json", "../../train/annotation_ds_coco.json", "holds only '../../train/annotation_ds_coco.json': a link of the archive, copy"),
    "pointer": ("12_5/train_0/annotation_ds_coco.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of git-lfs"),
    "page": ("12_5/train_0/annotation_ds_coco.json", "<!DOCTYPE html><html>", "is a web page"),
    "cut": ("12_5/train_0/annotation_ds_coco.json", '{"images": [', "12_5/train_0/annotation_ds_coco.json is no JSON"),
    "fold as file": ("12_5/train_0", "../train", "12_5/train_0 is a file, not a folder: a link of the archive"),
    "folds as file": ("12_5", "../12_5", "12_5 is a file, not a folder: a link of the archive"),
}


@pytest.mark.parametrize("kind", LINKS)
def test_a_budget_of_links_unpacked_as_files(tree, kind):
    name, text, said = LINKS[kind]
    shutil.copytree(tree/"train", tree/"12_5/train_0")
    shutil.rmtree(tree/name) if (tree/name).is_dir() else None
    (tree/name).write_text(text)
    assert said in refusal(open_datasets, tree, SMALL, budget="12_5/train_0")


@pytest.mark.parametrize("text, said", [("", "is empty"), ("../val/annotation.json", "holds only '../val/annotation.json'")])
def test_an_annotation_file_that_is_a_link_is_said(tree, text, said):
    (tree/"val_seg/annotation_coco.json").write_text(text)
    assert f"val_seg/annotation_coco.json {said}: a link of the archive, copy the file it points to" in refusal(read_frames, tree)


def test_links_that_cost_nothing_are_listed(tree):
    as_attested(tree)
    for path in [*(tree/"all").glob("2_*.jpg"), *(tree/"25/train_2").glob("*.jpg")]: path.write_text(f"../train/{path.name}")
    for name in ("train_seg", "test_seg"):
        shutil.rmtree(tree/name)
        (tree/name).write_text("25/train_2")
    (tree/"val_seg_vids.txt").write_text("")
    (tree/"25/train_0").write_text("")
    odd = irregularities(tree)
    files = odd[odd["what"] == "link unpacked as a file"]
    assert files["where"].tolist() == ["train_seg", "test_seg", "25/train_0", "val_seg_vids.txt"]
    pictures = odd[odd["what"] == "pictures unpacked as links"].set_index("where")["count"]
    assert pictures.to_dict() == {"all/": 4, "25/train_2/": 11} and len(read_frames(tree)) == 20


def test_a_budget_of_other_videos_is_refused(tree):
    shutil.copytree(tree/"val", tree/"12_5/train_0")
    assert "12_5/train_0/annotation_ds_coco.json has videos that are not in train: 2" in refusal(open_datasets, tree, SMALL, budget="12_5/train_0")
    change(tree/"12_5/train_0/annotation_ds_coco.json", lambda c: c.update(images=[]))
    assert "lists no key-frames" in refusal(open_datasets, tree, SMALL, budget="12_5/train_0")


# ---- annotation files of other tools

@pytest.fixture
def listed(tree):
    "A tree whose masks are in the COCO file alone, and which has boxes on another frame."
    shutil.rmtree(tree/"semseg")
    change(tree/"train/annotation_coco.json", lambda c: (c["images"][0].update(id=1_000_125, file_name="1_125.jpg"), [a.update(image_id=1_000_125) for a in c["annotations"]]))
    return tree


def annotated(tree): return [tree/"train/annotation_coco.json", tree/"train_seg/annotation_coco.json"]


def renumber(tree, number, spell=str):
    "The same objects with other numbers for their categories, and names spelled otherwise."
    for path in annotated(tree):
        def how(coco):
            name = {c["id"]: c["name"] for c in coco["categories"]}
            coco["categories"] = [dict(id=i, name=spell(n)) for n, i in number.items()]
            for a in coco["annotations"]: a["category_id"] = number[name[a["category_id"]]]
        change(path, how)


NAMES = CLASSES[1:]
NUMBERS = {"by the alphabet": {n: i for i, n in enumerate(sorted(NAMES), 1)}, "from 0": {n: i for i, n in enumerate(NAMES)}, "backwards": {n: 6 - i for i, n in enumerate(NAMES)},
           "with background": {n: i + 10 for i, n in enumerate(CLASSES)}, "as text": {n: f"id {n[::-1]}" for n in NAMES}, "some of them": dict(gallbladder=1, cystic_duct=2)}
SPELLED = dict(plain=str, capitals=str.upper, title=lambda n: n.replace("_", " ").title(), hyphens=lambda n: n.replace("_", "-"), blanks=lambda n: f" {n.replace('_', '  ')} ")


@pytest.mark.parametrize("numbers, spell", [*((n, "plain") for n in NUMBERS), *(("backwards", s) for s in SPELLED if s != "plain")])
def test_categories_count_by_name(listed, numbers, spell):
    want = [mask_pixels(listed, s).tolist() for s in (True, "boxes")], read_objects(listed, "train")
    renumber(listed, NUMBERS[numbers], SPELLED[spell])
    assert [mask_pixels(listed, s).tolist() for s in (True, "boxes")] == want[0] and want[0][0][4] > 0
    pd.testing.assert_frame_equal(read_objects(listed, "train"), want[1])


@pytest.mark.parametrize("spell, names", [(lambda n: n.replace("gallbladder", "liver"), ("'liver'", "'gallbladder'")), (lambda n: n + "s", ("'tools'", "'tool'")),
                                          (lambda n: "" if n == "tool" else n, ("''", "'tool'")), (lambda n: 5 if n == "tool" else n, ("5", "'tool'"))])
def test_unknown_categories_are_named_with_their_file(listed, spell, names):
    renumber(listed, dict(zip(NAMES, range(1, 7))), spell)
    for reader, file in ((read_frames, "train_seg"), (lambda t: read_objects(t, "train"), "train")):
        said = refusal(reader, listed)
        assert f"{file}/annotation_coco.json" in said and all(n in said for n in names)


def drop(what, key): return lambda coco: [entry.pop(key) for entry in coco[what][:1]]


LACKING = [("train_seg/annotation_coco.json", drop("images", "file_name"), read_frames, "1 of 1 images lack the key 'file_name'"),
           ("train_seg/annotation_coco.json", drop("images", "id"), read_frames, "images lack the key 'id'"),
           ("train_seg/annotation_coco.json", drop("annotations", "image_id"), read_frames, "1 of 2 annotations lack the key 'image_id'"),
           ("train_seg/annotation_coco.json", drop("annotations", "category_id"), read_frames, "annotations lack the key 'category_id'"),
           ("train_seg/annotation_coco.json", drop("categories", "name"), read_frames, "categories lack the key 'name'"),
           ("train_seg/annotation_coco.json", lambda c: c.pop("categories"), read_frames, "the categories [4, 5], which its `categories` do not name"),
           ("train_seg/annotation_coco.json", lambda c: c["categories"].pop(3), read_frames, "the categories [4], which"),
           ("train_seg/annotation_coco.json", lambda c: c.pop("annotations"), read_frames, "lacks the key 'annotations'"),
           ("train_seg/annotation_coco.json", lambda c: c["images"].clear(), read_frames, "annotations of 1 images that it does not list: ids 1000175"),
           ("train_seg/annotation_coco.json", drop("annotations", "segmentation"), mask_pixels, "#1_175: an object has no mask"),
           ("train/annotation_coco.json", drop("annotations", "bbox"), lambda t: read_objects(t, "train"), "bbox of the annotation with the id 1 is None"),
           ("train/annotation_coco.json", lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), lambda t: mask_pixels(t, "boxes"), "bbox of the annotation with the id 1 is [1, 2, 3]"),
           ("val/annotation_ds_coco.json", drop("images", "is_ds_keyframe"), lambda t: read_coco(t, "val", "key"), "images lack the key 'is_ds_keyframe'"),
           ("val/annotation_ds_coco.json", drop("images", "is_det_keyframe"), lambda t: read_coco(t, "val", "key"), "images lack the key 'is_det_keyframe'"),
           ("val/annotation_ds_coco.json", lambda c: c["images"][0].update(is_det_keyframe="False"), lambda t: read_coco(t, "val", "key"), "is_det_keyframe of an image is 'False'"),
           ("val/annotation_ds_coco.json", lambda c: c["images"][0].update(ds=[1, 0]), lambda t: read_coco(t, "val", "key"), "ds of 2_50.jpg is [1, 0]"),
           ("val/annotation_ds_coco.json", lambda c: c.pop("images"), lambda t: read_coco(t, "val", "key"), "lacks the key 'images'")]


@pytest.mark.parametrize("file, how, reader, said", LACKING, ids=[f"{i} {x[3]}" for i, x in enumerate(LACKING)])
def test_what_an_annotation_file_lacks_is_named(listed, file, how, reader, said):
    change(listed/file, how)
    message = refusal(reader, listed)
    assert file in message and said in message


@pytest.mark.parametrize("before, after", [("images/", ""), ("/data/a/b/", ""), ("C:\\\\data\\\\", ""), ("https://host.org/x/", "?X=1&b=2"), ("/data/local-files/?d=videos/", ""),
                                           ("./", ""), ("a%2Fb%2F", ""), ("s3://bucket/", "#t=1"), ("/data/local-files/?d=", "")])
def test_the_last_part_of_a_name_counts(listed, before, after):
    want = read_frames(listed), read_coco(listed, "train"), mask_pixels(listed, "boxes"), read_objects(listed, "train")
    for path in [*annotated(listed), listed/"train/annotation_coco_vid.json"]:
        change(path, lambda coco: [i.update(file_name=before.replace("\\\\", "\\") + i["file_name"] + after) for i in coco["images"]])
    pd.testing.assert_frame_equal(read_frames(listed), want[0])
    pd.testing.assert_frame_equal(read_coco(listed, "train"), want[1])
    assert (mask_pixels(listed, "boxes") == want[2]).all() and len(read_objects(listed, "train")) == 2 and (want[0]["mask"] != "").sum() == 1


@pytest.mark.parametrize("name", ["1_176.jpg", "abcd1234-1_175.jpg", "frame.jpg", "01_175.jpg", "images/1_175_2.jpg"])
def test_annotated_images_that_are_no_frames_are_named(listed, name):
    stem = name.removeprefix("images/").removesuffix(".jpg")
    for path in annotated(listed): change(path, lambda c: c["images"][0].update(file_name=name))
    said = refusal(read_frames, listed)
    assert "train_seg/annotation_coco.json" in said and stem in said
    (listed/"train_seg/annotation_coco.json").unlink()
    said = refusal(add_masks, listed, read_frames(listed), "boxes")
    assert "train/annotation_coco.json" in said and stem in said
    if not name[0] == "0" and name != "1_176.jpg": assert stem in refusal(read_objects, listed, "train")


def polygon(*corners): return [[float(v) for v in corners]]


@pytest.mark.parametrize("of", ["gallbladder"])
@pytest.mark.parametrize("corners", [[20, 4, 36, 4, 36, 20, 20, 20], [36, 20, 36, 4, 20, 4, 20, 20], [20, 4, 36, 4, 36, 12, 36, 20, 20, 20], [20.4, 3.6, 36.3, 4.4, 36.4, 20.3, 19.6, 20.2]])
def test_polygons_are_read(listed, of, corners):
    whole = mask_pixels(listed)
    change(listed/"train_seg/annotation_coco.json", lambda c: c["annotations"][1].update(segmentation=polygon(*corners)))
    assert (mask_pixels(listed) == whole).all() and (read_mask(listed, "train_seg/annotation_coco.json#1_175") == mask_of(1, 175)).all()


def test_polygons_of_other_shapes():
    inside = endoscapes._region([[0, 0, 4, 0, 4, 4, 3, 4, 3, 1, 1, 1, 1, 4, 0, 4]], dict(height=5, width=6))      # an arch
    assert inside.astype(int).tolist() == [[1, 1, 1, 1, 0, 0]] + [[1, 0, 0, 1, 0, 0]]*3 + [[0]*6]
    two = endoscapes._region([[0, 0, 2, 0, 2, 2, 0, 2], [1, 1, 9, 1, 9, 9, 1, 9]], dict(height=3, width=4))          # overlapping, beyond the picture
    assert two.astype(int).tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 1]]
    y, x = np.mgrid[:50, :60] + .5
    angles = np.linspace(0, 2*np.pi, 200, endpoint=False)
    circle = np.stack([30 + 20*np.cos(angles), 25 + 20*np.sin(angles)], 1).ravel().tolist()
    assert (endoscapes._region([circle], dict(height=50, width=60)) != (np.hypot(x - 30, y - 25) < 20)).sum() < 8


@pytest.mark.parametrize("shape, said", [([[1, 2, 3, 4]], "three or more corners"), ([[1, 2, 3, 4, 5, 6, 7]], "corners"), ([[0, 0, 1, float("inf"), 2, 2]], "corners"), ([1, 2, 3, 4, 5, 6], "corners"),
                                         ([["a"]*6], "corners"), ([], "has no mask"), ({}, "has no mask"), (dict(counts="451M"), "need size and counts"),
                                         (dict(size=[HEIGHT, WIDTH], counts=[3, 4]), "do not fill"), ("451M", "not as str"), (dict(size=[2, 3], counts=[2, 4]), "different sizes")])
def test_shapes_that_cannot_be_read_are_named(listed, shape, said):
    change(listed/"train_seg/annotation_coco.json", lambda c: c["annotations"][0].update(segmentation=shape))
    message = refusal(mask_pixels, listed)
    assert "train_seg/annotation_coco.json#1_175: " in message and said in message


@pytest.mark.parametrize("shape, said", [
    (dict(size=["24", "40"], counts=[960]), "size as two numbers"), (dict(size=None, counts=[960]), "size as two numbers"),
    (dict(size=[HEIGHT], counts=[960]), "size as two numbers"), (dict(size=[HEIGHT, WIDTH], counts=[None, 960]), "counts as text or numbers"),
    (dict(size=[HEIGHT, WIDTH], counts=960), "counts as text or numbers"),
    ([[.1, .1, .5, .1, .5, .5]], "must be in pixels"), ([[0, 0, 1, 0, 1, 1], [.5, .5, .7, .7, .9, .5]], "must be in pixels"),
    ([[400, 30, 800, 30, 800, 300]], "must be in pixels"), ([[-9, 1, -1, 1, -1, 9]], "must be in pixels")], ids=str)
def test_shapes_of_other_units_and_types_are_named(listed, shape, said):
    change(listed/"train_seg/annotation_coco.json", lambda c: c["annotations"][0].update(segmentation=shape))
    message = refusal(mask_pixels, listed)
    assert "train_seg/annotation_coco.json#1_175: " in message and said in message


@pytest.mark.parametrize("box, said", [([.1, .1, .3, .4], "must be in pixels"), ([300, 5, 20, 10], "must be in pixels"), ([2, -30, 5, 10], "must be in pixels"),
                                       ([20, 4, 36, 20], "not two corners"), ([1, 20, 5, 24], "not two corners")], ids=str)
def test_boxes_of_other_units_are_named(listed, box, said):
    file = "train/annotation_coco.json"
    change(listed/file, lambda c: c["annotations"][0].update(bbox=box))
    image = json.loads((listed/file).read_text())["annotations"][0]["image_id"]
    name = {i["id"]: i["file_name"] for i in json.loads((listed/file).read_text())["images"]}[image].removesuffix(".jpg")
    message = refusal(read_mask, listed, f"{file}#box:{name}")
    assert f"{file}#box:{name}: " in message and said in message


@pytest.mark.parametrize("what, said", [("images", "images have the ids 7 more than once"), ("categories", "categories have the ids 7 more than once")])
def test_ids_given_twice_are_refused(listed, what, said):
    file = listed/"train_seg/annotation_coco.json"
    change(file, lambda c: [entry.update(id=7) for entry in c[what][:2]] and c[what].append(dict(c[what][0])))
    assert f"train_seg/annotation_coco.json: {said}" in refusal(read_frames, listed)


@pytest.mark.parametrize("what, entry", [("annotations", None), ("annotations", 3), ("images", "1_175.jpg"), ("categories", ["tool"])])
def test_what_is_no_entry_is_named(listed, what, entry):
    change(listed/"train_seg/annotation_coco.json", lambda c: c[what].append(entry))
    assert f"{what} are no entries with keys: {what}[" in refusal(read_frames, listed)


@pytest.mark.parametrize("text, said", [("300 tool\n", "0 to 255: 300"), ("256 tool\n0 background\n", "0 to 255: 256"),
                                        ("0 background\n1 tool\n1 gallbladder\n", "the numbers 1 more than one name")])
def test_numbers_of_a_label_map_are_pixels_with_one_name(tree, text, said):
    (tree/"seg_label_map.txt").write_text(text)
    message = refusal(mask_pixels, tree)
    assert said in message and "\n" not in message                           # once, not for each mask


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_a_mask_of_a_format_that_blurs_is_refused(tree, kind):
    Image.fromarray(mask_of(1, 175)).convert("RGB").save(tree/"semseg/1_175.png", kind)
    message = refusal(mask_pixels, tree)
    assert "semseg/1_175.png: " in message and f"the format {kind}" in message


def resized(width, height): return Image.fromarray(mask_of(1, 175)).resize((width, height), Image.Resampling.NEAREST)


@pytest.mark.parametrize("width, height", [(40, 24), (20, 12), (80, 48), (41, 24), (27, 16), (854, 512), (13, 8), (160, 96)])
def test_a_mask_of_the_proportions_of_its_frame_is_stretched(tree, width, height):
    resized(width, height).save(tree/"semseg/1_175.png")
    assert mask_pixels(tree)[5] > 0


@pytest.mark.parametrize("width, height", [(24, 40), (24, 24), (64, 64), (40, 20), (44, 24), (400, 250)])
@pytest.mark.parametrize("where", ["semseg", "pseudo", "coco"])
def test_a_mask_of_other_proportions_is_refused_by_name(tree, where, width, height):
    source, name = True, "semseg/1_175.png"
    if where == "pseudo":
        source, name = str(tree.parent/"made"), "made/1_100.png"
        (tree.parent/"made").mkdir()
        resized(width, height).save(tree.parent/name)
    elif where == "semseg": resized(width, height).save(tree/name)
    else:
        shutil.rmtree(tree/"semseg")
        mask, name = np.asarray(resized(width, height)), "train_seg/annotation_coco.json#1_175"
        change(tree/"train_seg/annotation_coco.json", lambda c: [a.update(segmentation=encode_rle(mask == a["category_id"])) for a in c["annotations"]])
    assert f"{name}: it is {width} x {height} pixels, other proportions than its frame of 40 x 24" in refusal(open_datasets, tree, SMALL, masks=source)


BROKEN = {"empty": lambda b: (b"", "is empty"), "cut": lambda b: (b[:len(b)//2], "cut short or damaged"), "pointer": lambda b: (b"version https://git-lfs.github.com/spec/v1\n", "pointer of git-lfs"),
          "page": lambda b: (b"<html>", "web page"), "link": lambda b: (b"../semseg/1_175.png", "holds only '../semseg/1_175.png'"), "noise": lambda b: (b"\x00\x01\x02" + b, "is no picture")}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_masks_are_all_named_at_once(tree, kind):
    broken, said = BROKEN[kind]((tree/"semseg/1_175.png").read_bytes())
    for name in ("1_175", "2_25", "3_50"): (tree/f"semseg/{name}.png").write_bytes(broken)
    message = refusal(open_datasets, tree, replace(SMALL, split="test"), masks=True)
    assert message.startswith("tree cannot be read:") and all(f"- semseg/{n}.png: " in message for n in ("1_175", "2_25", "3_50"))
    assert said in message and str(tree.parent) not in message
    assert irregularities(tree).set_index("what").loc["masks that cannot be read", "count"] == 3 and said in refusal(read_mask, tree, "semseg/1_175.png")


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "LA", "I;16", "1"])
def test_masks_of_every_mode(tree, mode):
    mask = mask_of(1, 175) if mode != "1" else mask_of(1, 175) // 5
    image = {"I;16": lambda: Image.fromarray(mask.astype(np.uint16)), "1": lambda: Image.fromarray(mask.astype(bool)), "P": lambda: Image.fromarray(mask, "P")}.get(mode, lambda: Image.fromarray(mask).convert(mode))()
    if mode == "P": image.putpalette([i*7 % 256 for i in range(768)])
    image.save(tree/"semseg/1_175.png")
    assert (read_mask(tree, "semseg/1_175.png") == mask).all()


# ---- JPEGs

def jpeg(tree): return tree/"train/1_125.jpg"


@pytest.mark.parametrize("padding", [bytes(3), b"\xff"*40, b"\r\n", b"a comment of a camera", bytes(100_000), b"\xff\xd8\xff\xe0 another that is cut"])
def test_what_follows_the_end_of_a_jpeg_is_padding(tree, padding):
    store = pack_frames(tree, read_frames(tree), size=16)
    whole = store[store.rows(1, 125)]
    jpeg(tree).write_bytes(jpeg(tree).read_bytes() + padding)
    padded = pack_frames(tree, read_frames(tree), size=16)
    assert padded.files != store.files and (padded[padded.rows(1, 125)] == whole).all()


@pytest.mark.parametrize("cut", [lambda b: b[:-2], lambda b: b[:-1], lambda b: b[:len(b)//2], lambda b: b[:400], lambda b: b[:2], lambda b: b[:20]])
def test_a_jpeg_that_is_cut_is_said_to_be(tree, cut):
    jpeg(tree).write_bytes(cut(jpeg(tree).read_bytes()))
    assert "train/1_125.jpg: it is cut short, to " in refusal(pack_frames, tree, read_frames(tree), size=16)


@pytest.mark.parametrize("data, said", [(b"", "is empty"), (b"\x89PNG\r\n\x1a\n" + bytes(50), "no JPEG: it begins with b'\\x89PNG"), (b"../val/2_25.jpg", "holds only '../val/2_25.jpg'"),
                                        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"), (b"<html></html>", "web page"), (b"\n\xff\xd8\xff", "no JPEG")])
def test_what_is_no_jpeg_is_said_to_be(tree, data, said):
    jpeg(tree).write_bytes(data)
    message = refusal(pack_frames, tree, read_frames(tree), size=16)
    assert "train/1_125.jpg: " in message and said in message


# ---- names and places

@pytest.mark.parametrize("suffix", [".JPG", ".jpeg", ".Jpg", ".JPEG"])
def test_suffixes_in_any_case(tree, suffix):
    before = open_datasets(tree, SMALL, masks=True)[0]["train"]
    for path in [*tree.glob("*/*.jpg")]: path.rename(path.with_suffix(suffix))
    (tree/"semseg/1_175.png").rename(tree/"semseg/1_175.PNG")
    frames = read_frames(tree)
    assert frames["path"].str.endswith(suffix).all() and frames.query("mask != ''")["mask"].tolist() == ["semseg/1_175.PNG"]
    after = open_datasets(tree, SMALL, masks=True)[0]["train"]
    assert (after.store[range(11)] == before.store[range(11)]).all() and geometry_proof(tree, after).turned
    assert (after.store.mask(1, [175]) == before.store.mask(1, [175])).all()


@pytest.mark.parametrize("folder, names", [("train", ("1_125.jpg", "1_125.JPG")), ("train", ("1_125.jpg", "1_125.jpeg")), ("semseg", ("1_175.png", "1_175.PNG"))])
def test_two_files_of_one_frame_are_refused(tree, folder, names):
    shutil.copy(tree/folder/names[0], tree/folder/names[1])
    if len(list((tree/folder).glob(names[0].split(".")[0] + ".*"))) < 2: pytest.skip("here two such names are one file")
    said = refusal(read_frames, tree)
    assert folder in said and all(n in said for n in names)


PLACES = ["a b", "umläute ß é", "runs#3", "C# drive", "x.json#1_25", "~x", "100%", "a'b"]


@pytest.mark.parametrize("name", PLACES)
def test_folders_of_every_name(listed, name):
    tree = listed
    place, made = tree.parent/name/"tree", tree.parent/name/"masks"
    made.mkdir(parents=True)
    shutil.copytree(tree, place)
    for stem in ("1_100", "1_125"): Image.fromarray(np.full((HEIGHT, WIDTH), 6, np.uint8)).save(made/f"{stem}.png")
    for source, classes in ((True, [4, 5]), ("boxes", [4, 5]), (str(made), [4, 5, 6])):
        pixels = mask_pixels(place, source)
        assert np.flatnonzero(pixels[1:7]).tolist() == [c - 1 for c in classes]


@pytest.mark.parametrize("data, masks", [("~/tree", "~/made"), ("~/a #1/tree", "~/a #1/made"), ("~/ü/tree", "~/made")])
def test_the_home_folder(tree, monkeypatch, data, masks):
    home = tree.parent/"home"
    monkeypatch.setenv("HOME", str(home))
    for there, name in ((data, "tree"), (masks, "made")): Path(there).expanduser().parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(tree, Path(data).expanduser())
    Path(masks).expanduser().mkdir()
    Image.fromarray(np.full((HEIGHT, WIDTH), 6, np.uint8)).save(Path(masks).expanduser()/"1_100.png")
    datasets, card = open_datasets(data, SMALL, masks=masks)
    assert open_tree(data) == Path(data).expanduser() and datasets["train"].sources.query("mask_source == 'pseudo'")["frames"].tolist() == [1]
    assert card["fingerprint"] == data_card(tree)["fingerprint"] and card["masks"]


# ---- caches that know what they hold

@pytest.fixture
def settled(monkeypatch):
    "As if every file had been written long ago."
    monkeypatch.setattr(core, "TICK", -10**12)


def looks(monkeypatch):
    "Count the files that are read for their digest."
    seen, content = [], core.content
    monkeypatch.setattr(core, "content", lambda path: seen.append("/".join(Path(path).parts[-2:])) or content(path))
    return seen


def in_place(path, data: bytes):
    "Other bytes under the same name, and the old time of change."
    stat = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    in_place(path, bytes(data))


def recolour(path, colour=(255, 255, 255)):
    Image.new("RGB", (WIDTH, HEIGHT), colour).save(path.with_suffix(".new"), "JPEG")
    in_place(path, path.with_suffix(".new").read_bytes())
    path.with_suffix(".new").unlink()


def swap_text(path, a, b):
    text = path.read_text().replace(a, "\0").replace(b, a).replace("\0", b)
    assert len(text) == path.stat().st_size
    in_place(path, text.encode())


def swap_mask(path):
    mask = np.asarray(Image.open(path))[..., 0]
    Image.fromarray(np.where(mask == 4, 5, np.where(mask == 5, 4, mask)).astype(np.uint8)).save(path)


CORRECTED = {"picture": lambda t: recolour(t/"train/1_125.jpg"), "picture of test": lambda t: recolour(t/"test/3_75.jpg"), "label": lambda t: swap_text(t/"all_metadata.csv", "True", "1.0 "),
             "votes": lambda t: swap_text(t/"all_metadata.csv", "[1, 0, 0]", "[0, 0, 1]"), "list": lambda t: (t/"val_vids.txt").write_text("2\n"),
             "mask": lambda t: swap_mask(t/"semseg/1_175.png"), "masks in COCO": lambda t: swap_text(t/"train_seg/annotation_coco.json", '"category_id": 4', '"category_id": 5'),
             "boxes": lambda t: swap_text(t/"train/annotation_coco.json", '"category_id": 4', '"category_id": 5'), "key-frames": lambda t: flip(t/"train/annotation_ds_coco.json", 25),
             "label map": lambda t: (t/"seg_label_map.txt").write_text("0 background\n"), "rate": lambda t: (t/"fps.txt").write_text("25")}


@pytest.mark.parametrize("kind", CORRECTED)
@pytest.mark.parametrize("seen_before", ["just now", "long ago"])
def test_a_file_corrected_in_place_is_another_fingerprint(tree, kind, seen_before, monkeypatch):
    if seen_before == "long ago": monkeypatch.setattr(core, "TICK", -10**12)
    before = data_card(tree)
    assert data_card(tree) == before
    CORRECTED[kind](tree)
    assert data_card(tree)["fingerprint"] != before["fingerprint"]


def brightest(tree, **how):
    store = open_datasets(tree, replace(SMALL, size=64), **how)[0]["train"].store
    return round(float(store[store.rows(1, 125)].mean())), np.bincount(store.mask(1, [100, 175]).ravel(), minlength=7)[:7].tolist() if how else None


@pytest.mark.parametrize("how", [{}, dict(masks=True), dict(masks="made")], ids=str)
def test_what_was_corrected_in_place_is_what_is_read(tree, how, settled):
    made = tree.parent/"made"
    made.mkdir()
    Image.fromarray(np.full((HEIGHT, WIDTH), 3, np.uint8)).save(made/"1_100.png", compress_level=0)
    how = dict(masks=str(made)) if how.get("masks") == "made" else how
    seen = [(brightest(tree, **how), open_datasets(tree, SMALL, **how)[1])]
    recolour(tree/"train/1_125.jpg")
    seen.append((brightest(tree, **how), open_datasets(tree, SMALL, **how)[1]))
    assert seen[1][0][0] == 255 != seen[0][0][0]
    swap_mask(tree/"semseg/1_175.png")
    seen.append((brightest(tree, **how), open_datasets(tree, SMALL, **how)[1]))
    if how: assert seen[2][0][1][4] == seen[1][0][1][5] != seen[2][0][1][5]
    Image.fromarray(np.full((HEIGHT, WIDTH), 4, np.uint8)).save(made/"1_100.png", compress_level=0)
    seen.append((brightest(tree, **how), open_datasets(tree, SMALL, **how)[1]))
    if "made" in str(how): assert seen[2][0][1][3] == seen[3][0][1][4] - seen[2][0][1][4] > 0 == seen[3][0][1][3]
    assert len({json.dumps(card) for _, card in seen}) == (4 if "made" in str(how) else 3)


def test_two_trees_of_one_name_and_a_tree_that_was_moved(tree, monkeypatch, settled):
    (tree.parent/"other").mkdir()
    other = Path(shutil.copytree(tree, tree.parent/"other/tree"))
    recolour(other/"train/1_125.jpg")
    swap_mask(other/"semseg/1_175.png")
    first, second = brightest(tree, masks=True), brightest(other, masks=True)
    assert second[0] == 255 != first[0] and first[1] != second[1] and brightest(tree, masks=True) == first
    card, decoded = data_card(tree), decodes(monkeypatch)
    moved, copied = tree.rename(tree.parent/"moved"), shutil.copytree(other, tree.parent/"copied")
    assert brightest(moved, masks=True) == first and brightest(copied, masks=True) == second and data_card(moved) == card
    assert not decoded                                                                 # both found their pixels


def test_an_unchanged_tree_is_not_read_again(tree, monkeypatch, settled):
    seen = looks(monkeypatch)
    card = open_datasets(tree, replace(SMALL, split="test"), masks=True)[1]
    assert len(seen) == len(set(seen)) and {"train/1_25.jpg", "test/3_75.jpg", "tree/all_metadata.csv", "semseg/1_175.png", "val_seg/annotation_coco.json"} <= set(seen)
    seen.clear()
    assert open_datasets(tree, replace(SMALL, split="test"), masks=True)[1] == card and not seen
    recolour(tree/"val/2_50.jpg")
    os.utime(tree/"train/1_50.jpg")                                                    # touched, and the same
    assert open_datasets(tree, replace(SMALL, split="test"), masks=True)[1] != card and sorted(seen) == ["train/1_50.jpg", "val/2_50.jpg"]


def test_a_corrected_picture_costs_its_block(tree, monkeypatch, settled):
    monkeypatch.setattr(endoscapes, "BLOCK", 3)
    frames, decoded = read_frames(tree), decodes(monkeypatch)
    old = pack_frames(tree, frames, size=16)
    before = old[range(20)].copy()
    decoded.clear()
    recolour(tree/"train/1_125.jpg")
    new = pack_frames(tree, frames, size=16)
    assert sorted(decoded) == ["1_100.jpg", "1_125.jpg", "1_150.jpg"]
    apart = [i for i in range(20) if (new[i] != before[i]).any()]
    assert new.rows(1, [125]).tolist() == apart and (old[range(20)] == before).all()  # what another run has open stays as it was
    edit(tree, lambda d: d.assign(C1=0.))
    decoded.clear()
    assert (pack_frames(tree, read_frames(tree), size=16)[range(20)] == new[range(20)]).all() and not decoded     # labels are no pixels


def test_a_neighbour_that_was_damaged_gives_no_pixels(tree, monkeypatch):
    monkeypatch.setattr(endoscapes, "BLOCK", 3)
    frames = read_frames(tree).query("split == 'train'")
    folder = pack_frames(tree, frames, size=16).files[0].parent
    with open(folder/"frames.npy", "r+b") as f:
        f.seek(200)
        f.write(bytes(50))
    recolour(tree/"train/1_275.jpg")
    decoded = decodes(monkeypatch)
    new = pack_frames(tree, frames, size=16)
    assert sorted(decoded) == ["1_25.jpg", "1_250.jpg", "1_275.jpg", "1_50.jpg", "1_75.jpg"]          # the damaged block, and that of the correction
    assert (new[new.rows(1, 25)][0] == endoscapes._pixels(tree/"train/1_25.jpg", "squash", 16)).all()


def test_a_picture_changed_while_it_is_packed_is_not_kept_as_the_old_one(tree, monkeypatch):
    frames, pixels = read_frames(tree), endoscapes._pixels
    def late(path, *args):
        if path.name == "1_125.jpg": recolour(path, (200, 10, 10))
        return pixels(path, *args)
    with monkeypatch.context() as m:
        m.setattr(endoscapes, "_pixels", late)
        assert "train/1_125.jpg: it was changed while it was packed" in refusal(pack_frames, tree, frames, size=16)
    store = pack_frames(tree, frames, size=16)
    assert (store[store.rows(1, 125)][0] == pixels(tree/"train/1_125.jpg", "squash", 16)).all()


def test_two_changes_within_one_tick_of_the_clock(tree, monkeypatch):
    stamps = core._stamps
    monkeypatch.setattr(core, "_stamps", lambda folder, names: dict.fromkeys(stamps(folder, names), "the same time"))
    seen = {contents(tree, ["all_metadata.csv"])["all_metadata.csv"] for text in "abab" if (tree/"all_metadata.csv").write_text(text)}
    assert len(seen) == 2


def test_a_stamp_is_of_size_and_both_times(tree, settled):
    seen = [contents(tree, ["train/1_25.jpg"])]
    flip(tree/"train/1_25.jpg")                                                        # same size, same time of change
    seen.append(contents(tree, ["train/1_25.jpg"]))
    assert seen[0] != seen[1]


@pytest.mark.parametrize("damage", ["", "{", "[1, 2]", '{"1_25.jpg": "0 0"}', '{"1_25.jpg": "12 12 12 abc"}'])
def test_a_damaged_table_of_stamps_is_made_again(tree, damage, settled):
    right = contents(tree, ["train/1_25.jpg"])
    for path in (Path(os.environ["CVSLAB_CACHE"])/"contents").glob("*.json"): path.write_text(damage)
    assert contents(tree, ["train/1_25.jpg"]) == right == contents(tree, ["train/1_25.jpg"])


def test_what_is_not_there_is_named(tree):
    assert "train lacks 9_1.jpg, 9_2.jpg" in refusal(contents, tree, ["train/1_25.jpg", "train/9_2.jpg", "train/9_1.jpg"])


LOOK = """
import sys
from cvslab import core
core.TICK = -10**12
found = core.contents(sys.argv[1], sys.argv[2:])
print(core.digest(found))
"""


def test_processes_may_look_at_once(tree, settled, monkeypatch):
    names = [f"train/1_{f}.jpg" for f in range(25, 300, 25)]
    jobs = [subprocess.Popen([sys.executable, "-c", LOOK, tree, *names[i:]], stdout=subprocess.PIPE, text=True) for i in (0, 0, 5)]
    said = [job.communicate()[0].strip() for job in jobs]
    seen = looks(monkeypatch)
    assert [j.returncode for j in jobs] == [0, 0, 0] and said == [core.digest(contents(tree, names))]*2 + [core.digest(contents(tree, names[5:]))]
    assert set(seen) <= set(names[:5]) and not list((Path(os.environ["CVSLAB_CACHE"])/"contents").glob(".*"))


def test_cached_tokens_are_of_what_the_frames_hold(tmp_path, monkeypatch, settled):
    from cvslab.models import build_model
    from test_tokens import RECIPE
    monkeypatch.setenv("CVSLAB_CACHE", str(tmp_path/"cache"))
    monkeypatch.setattr(features, "BLOCK", 4)
    tree = draw_endoscapes(tmp_path/"tree", videos=(3, 1, 1), seconds=(20, 24), size=(64, 48), workers=1)
    model, encoded, encode = build_model("demo"), [], features._encode
    monkeypatch.setattr(features, "_encode", lambda m, video, *rest: encoded.append(len(video)) or encode(m, video, *rest))
    def tokens():
        encoded.clear()
        datasets, card = open_datasets(tree, replace(OFFICIAL, n_frames=4, size=64))
        return datasets["train"].clips, features.cache_tokens(model, datasets["train"], card, RECIPE), sum(encoded)
    clips, first, n = tokens()
    values = [first[i]["video"] for i in range(len(first))]
    assert n == len(first) and tokens()[2] == 0
    edit(tree, lambda d: d.assign(C1=0.))
    for path in tree.glob("semseg/*.png"): Image.fromarray(np.zeros((48, 64), np.uint8)).save(path)
    assert tokens()[2] == 0                                                            # neither label nor mask is a token
    shown = clips.iloc[0]
    Image.new("RGB", (64, 48), (255, 255, 255)).save(tree/"train"/f"{shown['video']}_{shown['frames'][-1]}.jpg")
    _, second, n = tokens()
    assert 4 <= n < len(first) and (second[0]["video"] != values[0]).any()
    assert all((second[i]["video"] == values[i]).all() for i in range(8, len(first)))
