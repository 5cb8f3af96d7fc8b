"""The drawn tree against what is known of Endoscapes2023 as shipped, property by property."""
import ast
import filecmp
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, cohen_kappa_score

from cvslab.demo import draw_endoscapes

SPLITS = {"train": (1, 120), "val": (121, 161), "test": (162, 201)}
CRITERIA = ["C1", "C2", "C3"]
RATERS = ["cvs_annotator_1", "cvs_annotator_2", "cvs_annotator_3"]
JSONS = ["annotation_coco.json", "annotation_ds_coco.json", "annotation_coco_vid.json"]
CLASSES = {1: "cystic_plate", 2: "calot_triangle", 3: "cystic_artery", 4: "cystic_duct", 5: "gallbladder", 6: "tool"}
MASK_EVERY = 375  # raw frames; 750 in the real tree, whose videos are longer


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return draw_endoscapes(tmp_path_factory.mktemp("data")/"endoscapes")


@pytest.fixture(scope="module")
def table(tree):
    table = pd.read_csv(tree/"all_metadata.csv")
    table["split"] = table["vid"].map(lambda vid: next(s for s, (first, last) in SPLITS.items() if first <= vid <= last))
    return table


@pytest.fixture(scope="module")
def votes(table):
    "Votes on the key-frames of train: (rater, key-frame, criterion)."
    keys = table[table["is_ds_keyframe"] & (table["split"] == "train")]
    return np.array([[ast.literal_eval(text) for text in keys[rater]] for rater in RATERS])


def coco(path):
    return json.loads(path.read_text())


def pictures(folder):
    return sorted(tuple(map(int, path.stem.split("_"))) for path in folder.glob("*.jpg"))


def decode(rle):
    "COCO's compressed run lengths as a binary mask."
    counts, text, at = [], rle["counts"], 0
    while at < len(text):
        value, shift, more = 0, 0, True
        while more:
            digit = ord(text[at]) - 48
            value |= (digit & 31) << shift
            more, at, shift = bool(digit & 32), at + 1, shift + 5
        if digit & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    height, width = rle["size"]
    assert sum(counts) == height*width and min(counts[1:]) > 0
    return np.repeat(np.arange(len(counts)) % 2, counts).reshape(width, height).T


def kappas(votes):
    return np.array([[cohen_kappa_score(votes[a, :, c], votes[b, :, c]) for a, b in ((0, 1), (0, 2), (1, 2))] for c in range(3)])


# files -----------------------------------------------------------------------------------------------------------------------

def test_layout(tree):
    folders = {"train", "val", "test", "train_seg", "val_seg", "test_seg", "12_5", "25", "all", "insseg", "semseg"}
    texts = {f"{name}_vids.txt" for name in ("train", "val", "test", "train_seg", "val_seg", "test_seg")}
    assert {p.name for p in tree.iterdir()} == folders | texts | {"all_metadata.csv", "seg_label_map.txt", "drawn_by_cvslab.json"}
    for split in SPLITS:
        assert sorted(p.name for p in (tree/split).glob("*.json")) == sorted(JSONS)
        assert sorted(p.name for p in (tree/f"{split}_seg").glob("*.json")) == (sorted(JSONS) if split == "train" else JSONS[:1])


def test_it_says_that_it_is_drawn(tree):
    card = json.loads((tree/"drawn_by_cvslab.json").read_text())
    assert card["seed"] == 0 and card["size"] == [214, 120] and card["videos"] == [36, 20, 10] and "drawing" in card


@pytest.mark.parametrize("split", SPLITS)
def test_frames_are_one_second_apart_without_a_gap(tree, split):
    frames = pd.DataFrame(pictures(tree/split), columns=["vid", "frame"])
    assert (frames["frame"] % 25 == 0).all() and (frames["frame"] > 0).all()
    assert (frames.groupby("vid")["frame"].diff().dropna() == 25).all()
    assert frames.groupby("vid").size().between(50, 80).all()


def test_some_video_is_out_of_order_when_sorted_as_text(table):
    digits = table.assign(digits=table["frame"].astype(str).str.len()).groupby("vid")["digits"].nunique()
    assert (digits > 1).any()


@pytest.mark.parametrize("split,count", [("train", 36), ("val", 20), ("test", 10)])
def test_video_ids_lie_in_the_ranges_of_the_real_splits(tree, split, count):
    first, last = SPLITS[split]
    assert {vid for vid, _ in pictures(tree/split)} == set(range(first, first + count)) and first + count - 1 <= last


def test_no_video_is_in_two_splits(tree):
    seen = Counter(vid for split in SPLITS for vid in {vid for vid, _ in pictures(tree/split)})
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("split", SPLITS)
def test_video_lists_are_written_as_floats(tree, split):
    for name in (split, f"{split}_seg"):
        lines = (tree/f"{name}_vids.txt").read_text().splitlines()
        assert all(line == f"{float(line):.18e}" for line in lines)
        assert [int(float(line)) for line in lines] == sorted({vid for vid, _ in pictures(tree/name)})


def test_frames_are_colour_jpegs_of_the_size_asked_for(tree, table):
    for row in table.iloc[::97].itertuples():
        with Image.open(tree/row.split/f"{row.vid}_{row.frame}.jpg") as image:
            assert (image.format, image.size, image.mode) == ("JPEG", (214, 120), "RGB")


# metadata --------------------------------------------------------------------------------------------------------------------

def test_metadata_columns_and_rows(tree, table):
    assert list(table.columns[:-1]) == ["vid", "frame", "avg_cvs", *CRITERIA, "is_ds_keyframe", *RATERS, "mask_path", "label_path"]
    assert not table.duplicated(["vid", "frame"]).any()
    for split, rows in table.groupby("split"):
        assert sorted(zip(rows["vid"], rows["frame"])) == pictures(tree/split)


def test_metadata_types(table):
    assert [table[c].dtype.kind for c in ("vid", "frame", *CRITERIA, "is_ds_keyframe")] == ["i", "i", "f", "f", "f", "b"]
    assert np.isin((table[CRITERIA]*3).round(9), [0, 1, 2, 3]).all()


def test_key_frames_are_five_seconds_apart(table):
    keys = table[table["is_ds_keyframe"]]
    assert (keys.groupby("vid")["frame"].diff().dropna() == 125).all()
    ends = table.groupby("vid")["frame"].last() - keys.groupby("vid")["frame"].last()
    assert ends.between(0, 100).all()


def test_votes_stand_on_key_frames_only(table):
    for rater in RATERS:
        assert (table[rater].notna() == table["is_ds_keyframe"]).all()
        parsed = table.loc[table["is_ds_keyframe"], rater].map(ast.literal_eval)
        assert all(len(vote) == 3 and set(vote) <= {0, 1} for vote in parsed)


def test_labels_are_the_mean_of_the_votes(table):
    keys = table[table["is_ds_keyframe"]]
    means = np.mean([np.array(keys[rater].map(ast.literal_eval).tolist()) for rater in RATERS], axis=0)
    np.testing.assert_allclose(keys[CRITERIA], means, atol=1e-9)


def test_avg_cvs_is_the_same_three_means_as_text(table):
    np.testing.assert_allclose(np.array(table["avg_cvs"].map(ast.literal_eval).tolist()), table[CRITERIA], atol=1e-9)


def test_labels_are_copied_forward_and_leading_frames_are_zero(table):
    expected = table[CRITERIA].where(table["is_ds_keyframe"]).groupby(table["vid"]).ffill().fillna(0)
    pd.testing.assert_frame_equal(table[CRITERIA], expected)


def test_every_video_begins_with_unlabelled_frames(table):
    leading = table.groupby("vid")["is_ds_keyframe"].agg(lambda key: key.argmax())
    assert leading.min() >= 1 and leading.nunique() > 1


# COCO files ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("split", SPLITS)
def test_coco_images_agree_with_the_metadata(tree, table, split):
    rows = table[table["split"] == split]
    rows = rows.set_index(rows["vid"]*1_000_000 + rows["frame"])
    for name, expected in zip(JSONS[1:], (rows[rows["is_ds_keyframe"]], rows)):
        images = {image["id"]: image for image in coco(tree/split/name)["images"]}
        unlisted = len(expected) - len(images)
        assert set(images) <= set(expected.index) and (0 < unlisted < 30 if (split, name) == ("test", JSONS[2]) else unlisted == 0)
        for key, image in images.items():
            row = expected.loc[key]
            assert image["file_name"] == f"{row['vid']}_{row['frame']}.jpg" and image["video_id"] == row["vid"]
            assert (image["height"], image["width"]) == (120, 214)
            assert image["is_ds_keyframe"] is bool(row["is_ds_keyframe"]) and isinstance(image["is_det_keyframe"], bool)
            np.testing.assert_allclose(image["ds"], row[CRITERIA].astype(float), atol=1e-9)


@pytest.mark.parametrize("split", SPLITS)
def test_boxes_lie_on_a_grid_of_key_frames(tree, split):
    boxed, every = coco(tree/split/JSONS[0])["images"], coco(tree/split/JSONS[2])["images"]
    assert {image["id"] for image in boxed} == {image["id"] for image in every if image["is_det_keyframe"]}
    assert all(image["is_det_keyframe"] and image["is_ds_keyframe"] for image in boxed)
    frames = pd.DataFrame([divmod(image["id"], 1_000_000) for image in boxed], columns=["vid", "frame"])
    gaps = frames.sort_values(["vid", "frame"]).groupby("vid")["frame"].diff().dropna()
    assert MASK_EVERY % 125 == 0 and (gaps % MASK_EVERY == 0).all() and (gaps == MASK_EVERY).mean() > .5
    assert frames["vid"].nunique() == len({image["video_id"] for image in every})


@pytest.mark.parametrize("name", [f"{split}/{name}" for split in SPLITS for name in JSONS] + [f"{split}_seg/{JSONS[0]}" for split in SPLITS])
def test_annotations_are_well_formed(tree, name):
    data = coco(tree/name)
    assert {c["id"]: c["name"] for c in data["categories"]} == CLASSES
    images = {image["id"] for image in data["images"]}
    assert len({a["id"] for a in data["annotations"]}) == len(data["annotations"]) > 0
    for a in data["annotations"]:
        x, y, width, height = a["bbox"]
        assert a["image_id"] in images and a["category_id"] in CLASSES and a["iscrowd"] == 0
        assert 0 <= x < x + width <= 214 and 0 <= y < y + height <= 120 and 0 < a["area"] <= width*height


def test_every_class_is_annotated_in_every_split(tree):
    for split in SPLITS:
        assert {a["category_id"] for a in coco(tree/split/JSONS[0])["annotations"]} == set(CLASSES)


@pytest.mark.parametrize("name,share", [("12_5", .125), ("25", .25)])
def test_label_budget_folds(tree, name, share):
    folds = [{image["video_id"] for image in coco(tree/name/f"train_{k}"/JSONS[2])["images"]} for k in range(3)]
    train = {image["id"]: image for image in coco(tree/"train"/JSONS[2])["images"]}
    for k, vids in enumerate(folds):
        assert (len(vids) == round(36*share) or (name, k) == ("25", 2)) and vids <= set(range(1, 37))
        assert sorted(p.name for p in (tree/name/f"train_{k}").iterdir() if p.suffix == ".json") == sorted(JSONS)
        images = coco(tree/name/f"train_{k}"/JSONS[2])["images"]
        assert images == [image for image in train.values() if image["video_id"] in vids]
    assert len(set(map(frozenset, folds))) > 1


def test_all_holds_the_listed_frames_of_every_split(tree):
    parts = {image["id"] for split in SPLITS for image in coco(tree/split/JSONS[2])["images"]}
    assert {image["id"] for image in coco(tree/"all"/JSONS[0])["images"]} == parts


# masks -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("split", SPLITS)
def test_masks_are_there_for_some_videos_only(tree, table, split):
    rows, masked = table[table["split"] == split], sorted(divmod(image["id"], 1_000_000) for image in coco(tree/f"{split}_seg"/JSONS[0])["images"])
    with_masks = {vid for vid, _ in masked}
    assert 0 < len(with_masks) < rows["vid"].nunique()
    assert sorted(zip(rows.dropna(subset="mask_path")["vid"], rows.dropna(subset="mask_path")["frame"])) == masked
    boxed = {tuple(divmod(image["id"], 1_000_000)) for image in coco(tree/split/JSONS[0])["images"]}
    assert set(masked) == {key for key in boxed if key[0] in with_masks}
    assert pictures(tree/f"{split}_seg") == sorted(key for key in zip(rows["vid"], rows["frame"]) if key[0] in with_masks)


def test_frames_of_the_segmentation_subset_are_those_of_the_splits(tree):
    for split in SPLITS:
        for path in (tree/f"{split}_seg").glob("*.jpg"):
            assert filecmp.cmp(path, tree/split/path.name, shallow=False)


def class_ids(path):
    "The first channel of a mask, and where it holds one of the seven classes."
    mask = np.asarray(Image.open(path))[..., 0]
    return mask, mask < 7


def test_semantic_masks_have_three_equal_channels_of_class_ids(tree, table):
    stems = {f"{row.vid}_{row.frame}" for row in table.dropna(subset="mask_path").itertuples()}
    assert {p.stem for p in (tree/"semseg").iterdir()} == stems
    for path in (tree/"semseg").glob("*.png"):
        mask = np.asarray(Image.open(path))
        assert mask.shape == (120, 214, 3) and mask.dtype == np.uint8 and set(np.unique(mask)) <= {*range(7), 7, 255}
        assert np.mean(mask >= 7) < .01
        assert (mask[..., 0] == mask[..., 1]).all() and (mask[..., 0] == mask[..., 2]).all()


def test_instance_masks_with_their_labels_give_the_semantic_mask(tree, table):
    masked = table.dropna(subset="mask_path")
    assert {p.name for p in (tree/"insseg").iterdir()} == {Path(p).name for p in [*masked["mask_path"], *masked["label_path"]]}
    for row in masked.itertuples():
        stack, labels = np.load(tree/row.mask_path), pd.read_csv(tree/row.label_path, header=None)[0].to_numpy()
        assert stack.shape == (len(labels), 120, 214) and set(np.unique(stack)) == {0, 1} and set(labels) <= set(CLASSES)
        semantic, known = class_ids(tree/"semseg"/f"{row.vid}_{row.frame}.png")
        np.testing.assert_array_equal((stack*labels[:, None, None]).sum(0)[known], semantic[known])


@pytest.mark.parametrize("split", SPLITS)
def test_run_lengths_decode_to_the_semantic_mask(tree, split):
    data = coco(tree/f"{split}_seg"/JSONS[0])
    semantic = {image["id"]: np.zeros((120, 214), int) for image in data["images"]}
    for a in data["annotations"]:
        mask = decode(a["segmentation"])
        rows, columns = np.nonzero(mask)
        assert a["bbox"] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1] and a["area"] == mask.sum()
        semantic[a["image_id"]][mask == 1] = a["category_id"]
    for image in data["images"]:
        there, known = class_ids(tree/"semseg"/image["file_name"].replace(".jpg", ".png"))
        np.testing.assert_array_equal(semantic[image["id"]][known], there[known])


def test_label_map_names_the_classes(tree):
    assert dict(enumerate((tree/"seg_label_map.txt").read_text().splitlines())) == CLASSES | {0: "background"}


# statistics ------------------------------------------------------------------------------------------------------------------

def test_shares_of_copied_labels_are_near_the_recorded_ones(table):
    met = table.loc[table["split"] == "train", CRITERIA].to_numpy() >= .5
    np.testing.assert_allclose(met.mean(0), [.146, .105, .168], atol=.025)
    np.testing.assert_allclose([(~met).all(1).mean(), met.all(1).mean()], [.739, .049], atol=.025)


@pytest.mark.parametrize("split,recorded", [("train", (.156, .112, .179)), ("val", (.163, .125, .167)), ("test", (.235, .168, .279))])
def test_shares_at_key_frames_are_near_the_recorded_ones(table, split, recorded):
    keys = table[(table["split"] == split) & table["is_ds_keyframe"]]
    np.testing.assert_allclose((keys[CRITERIA] >= .5).mean(), recorded, atol=.06)


def test_about_half_of_the_videos_ever_meet_a_criterion(table):
    ever = (table[CRITERIA] >= .5).groupby(table["vid"]).any()
    assert ever.mean().between(.35, .7).all()


def test_raters_disagree_as_the_real_ones(votes):
    rates = np.array([[.039, .112, .295], [.180, .130, .126], [.313, .167, .266]])
    np.testing.assert_allclose(votes.mean(1), rates, atol=.09)
    np.testing.assert_allclose((votes.min(0) == votes.max(0)).mean(0), [.727, .843, .698], atol=.09)
    recorded = np.array([[.22, .15, .59], [.46, .46, .65], [.35, .47, .48]])
    found = kappas(votes)
    assert abs(found.mean() - recorded.mean()) < .12 and np.abs(found - recorded).max() < .4 and found[0].argmax() == 2


def test_labels_change_now_and_then(table):
    keys = table[(table["split"] == "train") & table["is_ds_keyframe"]]
    changes = (keys[CRITERIA] >= .5).astype(int).groupby(keys["vid"]).diff().dropna().abs().max(axis=1)
    assert .08 < changes.mean() < .25


def test_some_key_frames_are_black(tree, table):
    share = {}
    for split, rows in table[table["is_ds_keyframe"]].groupby("split"):
        brightest = [np.asarray(Image.open(tree/split/f"{r.vid}_{r.frame}.jpg")).max() for r in rows.itertuples()]
        black = np.array(brightest) < 16
        assert (np.array(brightest)[~black] > 100).all()
        share[split] = black.mean()
    assert 0 < share["train"] < .05 < share["val"] < .16 and .02 < share["test"] < .16


@pytest.mark.parametrize("criterion,classes", [("C1", (3, 4)), ("C2", (2,)), ("C3", (1,))])
def test_the_masks_show_what_the_labels_say(tree, table, criterion, classes):
    masked = table.dropna(subset="mask_path")
    area = np.array([np.isin(np.asarray(Image.open(tree/"semseg"/f"{r.vid}_{r.frame}.png"))[..., 0], classes).mean() for r in masked.itertuples()])
    assert area[masked[criterion] >= .5].mean() > 2*area[masked[criterion] == 0].mean() > 0


def test_the_criteria_can_be_learnt_from_thumbnails(tree, table):
    def read(split):
        keys = table[(table["split"] == split) & table["is_ds_keyframe"]]
        frames = (Image.open(tree/split/f"{r.vid}_{r.frame}.jpg").resize((16, 16), Image.Resampling.BOX) for r in keys.itertuples())
        return np.stack([np.asarray(f, float).ravel() for f in frames])/64, keys[CRITERIA].to_numpy() >= .5
    (x, y), (x_val, y_val) = read("train"), read("val")
    models = [LogisticRegression(C=.001, max_iter=300).fit(x - x.mean(0), y[:, c]) for c in range(3)]
    ap = [average_precision_score(y_val[:, c], model.decision_function(x_val - x.mean(0))) for c, model in enumerate(models)]
    assert (ap > 1.5*y_val.mean(0)).all() and np.mean(ap) > 2.5*y_val.mean(), ap


# drawing ---------------------------------------------------------------------------------------------------------------------

SMALL = dict(videos=(2, 1, 1), seconds=(20, 22))


def test_the_same_seed_draws_the_same_tree_and_another_seed_another(tmp_path):
    a, b, c = (draw_endoscapes(tmp_path/name, seed=seed, workers=1, **SMALL) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    names = [sorted(p.relative_to(t).as_posix() for p in t.rglob("*") if p.is_file()) for t in (a, b, c)]
    assert names[0] == names[1] != names[2]
    assert all(filecmp.cmp(a/name, b/name, shallow=False) for name in names[0])


def test_the_real_size_draws_too(tmp_path):
    tree = draw_endoscapes(tmp_path/"large", size=(854, 480), workers=1, videos=(1, 1, 1), seconds=(20, 20), masked=1., mask_every=10)
    masks = list((tree/"semseg").glob("*.png"))
    assert len(masks) >= 3 and np.asarray(Image.open(masks[0])).shape == (480, 854, 3)
    assert Image.open(next((tree/"val").glob("*.jpg"))).size == (854, 480)


def test_two_processes_may_want_the_same_tree_at_once(tmp_path):
    code = f"from cvslab.demo import demo_tree; print(demo_tree(workers=1, **{SMALL!r}))"
    env = os.environ | dict(CVSLAB_CACHE=str(tmp_path))
    both = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0] and said[0] == said[1]
    assert [p.name for p in tmp_path.iterdir()] == [Path(said[0]).name] and (Path(said[0])/"all_metadata.csv").exists()
