"The reader of Endoscapes against a tree that is small enough to be worked out by hand, and the packed frames against Pillow."
import json, multiprocessing, os, pickle, subprocess, sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from cvslab import endoscapes
from cvslab.core import Ledger, load
from cvslab.demo import draw_endoscapes
from cvslab.endoscapes import (IGNORE, OFFICIAL, PROTOCOLS, RECORDED, ClipDataset, Protocol, data_card, disagreements, label_proof, make_clips, mark_black, open_datasets,
                               open_tree, pack_frames, rater_table, read_coco, read_frames, read_mask, read_objects, rle_to_mask, summary, targets)

WIDTH, HEIGHT = 40, 24
VOTES = {                                     # key-frame -> votes of the three raters on C1, C2, C3
    (1, 100): ([1, 1, 0], [1, 0, 0], [0, 0, 1]),
    (1, 225): ([1, 1, 1], [1, 1, 1], [1, 1, 1]),
    (2, 50): ([0, 0, 0], [0, 0, 1], [0, 0, 1]),
    (3, 75): ([0, 0, 0], [0, 0, 0], [0, 0, 0]),
}
VIDEOS = {1: ("train", 25, 11), 2: ("val", 25, 4), 3: ("test", 25, 5)}   # split, first raw frame, number of frames
BLACK_FRAMES = {(1, 225), (2, 25)}

def encode_rle(mask):
    "COCO's compressed run lengths, written from its definition: differences to the run two before, five bits a character."
    flat = mask.T.ravel()
    runs = np.diff(np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1], [True]]))).tolist()
    if flat[0]: runs = [0, *runs]
    text = ""
    for i, run in enumerate(runs):
        x = run - runs[i-2] if i > 2 else run
        while True:
            bits, x = x & 31, x >> 5
            more = x != (-1 if bits & 16 else 0)
            text += chr(48 + bits + 32*more)
            if not more: break
    return dict(size=list(mask.shape), counts=text)

def mask_of(video, frame):
    "A gallbladder on the right, and a cystic duct inside it."
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[4:20, 20:36] = 5
    mask[8:12, 24:32] = 4
    return mask

def coco(images, annotations=()): return dict(images=images, annotations=list(annotations), categories=[dict(id=i, name=n) for i, n in enumerate(endoscapes.CLASSES[1:], 1)])

def draw(tree):
    rows, images = [], {s: [] for s in endoscapes.SPLITS}
    for video, (split, first, n) in VIDEOS.items():
        (tree/split).mkdir(parents=True)
        (tree/f"{split}_vids.txt").write_text(f"{video}.0\n")
        mean = [0., 0., 0.]
        for i, frame in enumerate(range(first, first + 25*n, 25)):
            votes = VOTES.get((video, frame))
            if votes: mean = np.mean(votes, axis=0).tolist()
            rows.append([video, frame, str(mean), *mean, votes is not None, *(map(str, votes) if votes else [np.nan]*3), np.nan, np.nan])
            colour = np.random.default_rng(frame).integers(60, 256, (6, 10, 3), dtype=np.uint8)
            image = Image.fromarray(colour).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            if (video, frame) in BLACK_FRAMES: image = Image.new("RGB", (WIDTH, HEIGHT), (2, 2, 2))
            image.save(tree/split/f"{video}_{frame}.jpg", quality=95)
            images[split].append(dict(file_name=f"{video}_{frame}.jpg", height=HEIGHT, width=WIDTH, id=video*1_000_000 + frame, video_id=video,
                                      is_ds_keyframe=votes is not None, is_det_keyframe=frame == 175, ds=mean))
    columns = "vid frame avg_cvs C1 C2 C3 is_ds_keyframe cvs_annotator_1 cvs_annotator_2 cvs_annotator_3 mask_path label_path".split()
    pd.DataFrame(rows, columns=columns).to_csv(tree/"all_metadata.csv", index=False)
    duct, bladder = mask_of(1, 175) == 4, mask_of(1, 175) >= 4
    objects = [dict(id=1, image_id=1_000_175, category_id=4, bbox=[24, 8, 8, 4], area=32, iscrowd=0, segmentation=encode_rle(duct)),
               dict(id=2, image_id=1_000_175, category_id=5, bbox=[20, 4, 16, 16], area=256, iscrowd=0, segmentation=encode_rle(bladder))]
    for split, listed in images.items():
        boxes = [i for i in listed if i["is_det_keyframe"]]
        own = objects if split == "train" else []
        files = {f"{split}/annotation_coco_vid.json": coco(listed), f"{split}/annotation_ds_coco.json": coco([i for i in listed if i["is_ds_keyframe"]]),
                 f"{split}/annotation_coco.json": coco(boxes, own), f"{split}_seg/annotation_coco.json": coco([i for i in boxes if own], own)}
        for name, content in files.items():
            (tree/name).parent.mkdir(exist_ok=True)
            (tree/name).write_text(json.dumps(content))
    (tree/"semseg").mkdir()
    Image.fromarray(np.repeat(mask_of(1, 175)[..., None], 3, -1)).save(tree/"semseg/1_175.png")
    return tree

@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.setenv("CVSLAB_CACHE", str(tmp_path/"cache"))
    return draw(tmp_path/"tree")

def edit(tree, change):
    table = pd.read_csv(tree/"all_metadata.csv")
    change(table).to_csv(tree/"all_metadata.csv", index=False)

# ---- frames

def test_frames_by_hand(tree):
    frames = read_frames(tree)
    assert len(frames) == 20 and frames["key"].sum() == 4
    one = frames[frames["video"] == 1].set_index("frame")
    assert one.index.tolist() == list(range(25, 300, 25))
    assert one["labelled"].tolist() == [False]*3 + [True]*8
    np.testing.assert_allclose(one["c1"], [0]*3 + [2/3]*5 + [1]*3)
    assert one.loc[100, ["r1_c1", "r1_c2", "r1_c3", "r3_c1", "r3_c2", "r3_c3"]].tolist() == [1, 1, 0, 0, 0, 1]
    assert one.loc[125, ["r1_c1", "r2_c2", "r3_c3"]].isna().all()
    assert frames.loc[frames["mask"] != "", ["path", "mask", "mask_source"]].values.tolist() == [["train/1_175.jpg", "semseg/1_175.png", "semseg"]]

def test_both_readers_agree(tree):
    frames = read_frames(tree)
    for split, (n_all, n_key, n_box) in dict(train=(11, 2, 1), val=(4, 1, 0), test=(5, 1, 0)).items():
        every, key, box = (read_coco(tree, split, which) for which in ("1fps", "key", "boxes"))
        assert (len(every), len(key), len(box)) == (n_all, n_key, n_box)
        assert every["path"].tolist() == frames.loc[frames["split"] == split, "path"].tolist()
        assert disagreements(frames, every).empty and disagreements(frames, key).empty

def test_disagreements_are_seen(tree):
    edit(tree, lambda t: t.assign(C2=t["C2"].where(t["frame"] != 225, 0), is_ds_keyframe=t["is_ds_keyframe"] | ((t["vid"] == 3) & (t["frame"] == 25))))
    frames = read_frames(tree)
    assert disagreements(frames, read_coco(tree, "train")).frame.tolist() == [225]
    assert disagreements(frames, read_coco(tree, "test")).frame.tolist() == [25]
    assert disagreements(frames.query("frame != 100"), read_coco(tree, "train", "key")).frame.tolist() == [100, 225]

def test_label_budgets_and_unknown_coco_files(tree):
    (tree/"12_5").mkdir()
    os.rename(tree/"val", tree/"12_5/train_0")
    assert read_coco(tree, "12_5/train_0", "key")["path"].tolist() == ["12_5/train_0/2_50.jpg"]
    with pytest.raises(FileNotFoundError, match="val/annotation_coco_vid.json is missing.*'test', 'test_seg', 'train'"): read_coco(tree, "val")
    with pytest.raises(ValueError, match="choose from"): read_coco(tree, "train", "video")
    (tree/"test/annotation_coco.json").write_text("{")
    with pytest.raises(ValueError, match="test/annotation_coco.json is no JSON"): read_coco(tree, "test", "boxes")

FAULTS = {
    "val_vids.txt is missing": lambda t: (t/"val_vids.txt").unlink(),
    "test_vids.txt is missing or empty": lambda t: (t/"test_vids.txt").write_text(""),
    "train_vids.txt: line 2 'one': a whole number": lambda t: (t/"train_vids.txt").write_text("1.0\none\n"),
    "videos listed twice: 2 (train and val)": lambda t: (t/"train_vids.txt").write_text("1.0\n2.0\n"),
    "videos in no split: 3_25, 3_50, 3_75, 3_100, 3_125": lambda t: (t/"test_vids.txt").write_text("30.0\n"),
    "images that are missing: train/1_75.jpg, val/2_50.jpg": lambda t: [(t/p).unlink() for p in ("train/1_75.jpg", "val/2_50.jpg")],
    "images without a row in all_metadata.csv: train/9_25.jpg": lambda t: (t/"train/1_25.jpg").with_name("9_25.jpg").write_bytes(b""),
    "rows given twice: 2_75": lambda t: edit(t, lambda d: pd.concat([d, d[(d["vid"] == 2) & (d["frame"] == 75)]])),
    "labels outside 0..1: 1_125, 3_50": lambda t: edit(t, lambda d: d.assign(C1=d["C1"].where(~((d["vid"] == 1) & (d["frame"] == 125)), 1.5),
                                                                            C3=d["C3"].where(~((d["vid"] == 3) & (d["frame"] == 50)), -1))),
    "labelled frames without a label: 2_50": lambda t: edit(t, lambda d: d.assign(C2=d["C2"].where(~((d["vid"] == 2) & (d["frame"] == 50))))),
    "votes of a rater that are no three of 0 and 1: 1_100, 2_50, 3_75": lambda t: edit(t, lambda d: d.assign(
        cvs_annotator_2=d["cvs_annotator_2"].mask(d["is_ds_keyframe"] & (d["vid"] > 1), "[0, 2, 0]"), cvs_annotator_1=d["cvs_annotator_1"].replace("[1, 1, 0]", "[1, 0]"))),
    "lacks the columns ['C3', 'cvs_annotator_1']": lambda t: edit(t, lambda d: d.drop(columns=["C3", "cvs_annotator_1"])),
    "all_metadata.csv, column 'is_ds_keyframe': row 3 'maybe': unknown, choose from 'True', 'False'": lambda t: edit(t, lambda d: d.assign(is_ds_keyframe=["maybe" if i == 1 else k for i, k in enumerate(d["is_ds_keyframe"])])),
}

@pytest.mark.parametrize("message", FAULTS)
def test_a_fault_is_named_with_its_offenders(tree, message):
    FAULTS[message](tree)
    with pytest.raises(ValueError) as error: read_frames(tree)
    assert message in str(error.value) and str(tree.parent) not in str(error.value)

def test_all_faults_at_once(tree):
    for message in ("images that are missing: train/1_75.jpg, val/2_50.jpg", "rows given twice: 2_75"): FAULTS[message](tree)
    with pytest.raises(ValueError, match="(?s)rows given twice: 2_75.*missing: train/1_75.jpg"): read_frames(tree)

def test_missing_images_go_to_the_ledger(tree):
    for name in ("train/1_75.jpg", "val/2_75.jpg"): (tree/name).unlink()
    ledger = Ledger(max_share=0.1)
    frames = read_frames(tree, ledger)
    assert len(frames) == 18 and ledger.table()["item"].tolist() == ["train/1_75.jpg", "val/2_75.jpg"]
    with pytest.raises(ValueError, match="2 of 20 items"): read_frames(tree, Ledger(max_share=0.05))

def test_leading_labels_may_be_blank(tree):
    edit(tree, lambda d: d.assign(C1=d["C1"].where(d["frame"] > 25)))
    assert read_frames(tree)["c1"].notna().all()

@pytest.mark.parametrize("data", ["nowhere", "nbs"])
def test_no_such_tree(data):
    with pytest.raises(FileNotFoundError) as error: open_tree(data)
    assert data in str(error.value) and "'demo'" in str(error.value) and "train_vids.txt" in str(error.value)

def test_a_tree_one_folder_down(tree):
    assert open_tree(tree.parent) == tree and len(read_frames(tree.parent)) == 20
    draw(tree.parent/"second")
    with pytest.raises(FileNotFoundError, match="choose one of '.*second', '.*tree'"): open_tree(tree.parent)

def test_fingerprint_follows_the_data(tree):
    before = data_card(tree)
    assert before == data_card(tree) and before["demo"] is False
    edit(tree, lambda d: d.assign(C1=0.))
    changed = data_card(tree)["fingerprint"]
    assert changed != before["fingerprint"]
    for path in tree.glob("*/*.jpg"): Image.open(path).resize((20, 12)).save(path)
    assert data_card(tree)["fingerprint"] not in (before["fingerprint"], changed)
    (tree/"drawn_by_cvslab.json").write_text("{}")
    assert data_card(tree)["demo"] is True

# ---- masks

@pytest.mark.parametrize("seed", range(20))
def test_run_lengths(seed):
    rng = np.random.default_rng(seed)
    mask = np.kron(rng.random((6, 9)) < rng.random(), np.ones((rng.integers(1, 30), rng.integers(1, 30)))).astype(bool)
    assert (rle_to_mask(encode_rle(mask)) == mask).all()

def test_masks_from_image_and_coco_are_the_same(tree):
    frames = read_frames(tree)
    drawn = read_mask(tree, "semseg/1_175.png")
    assert (drawn == mask_of(1, 175)).all() and drawn.dtype == np.uint8
    (tree/"semseg/1_175.png").unlink()
    listed = read_frames(tree).query("mask != ''")
    assert listed[["path", "mask_source"]].values.tolist() == [["train/1_175.jpg", "coco"]]
    assert (read_mask(tree, listed["mask"].item()) == drawn).all()
    (tree/"train_seg/annotation_coco.json").write_text("")            # a link of the archive, unpacked under Windows
    with pytest.raises(ValueError, match="train_seg/annotation_coco.json is empty: a link of the archive, copy"): read_frames(tree)
    (tree/"train_seg/annotation_coco.json").unlink()
    assert (read_frames(tree)["mask"] == "").all() and (frames["mask"] != "").sum() == 1

def test_objects(tree):
    objects = read_objects(tree, "train")
    assert objects[["video", "frame", "category", "x", "y", "w", "h"]].values.tolist() == [[1, 175, 4, 24, 8, 8, 4], [1, 175, 5, 20, 4, 16, 16]]
    assert [rle_to_mask(r).sum() for r in objects["rle"]] == [32, 256]

def test_wrong_masks(tree):
    path = tree/"semseg/1_175.png"
    Image.fromarray(np.full((HEIGHT, WIDTH), 9, np.uint8)).save(path)
    assert (read_mask(tree, "semseg/1_175.png") == 255).all()
    three = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    three[0, 0, 1] = 3
    Image.fromarray(three).save(path)
    with pytest.raises(ValueError, match="semseg/1_175.png: its channels differ"): read_mask(tree, "semseg/1_175.png")
    Image.fromarray(np.full((HEIGHT, WIDTH), 255, np.uint8)).save(path)
    assert (read_mask(tree, "semseg/1_175.png") == 255).all()
    with pytest.raises(ValueError, match="run lengths, not as list"): rle_to_mask([[1, 2, 3, 4]])

# ---- labels and clips

@pytest.mark.parametrize("labels, y", dict(majority=[1, 0, 0], any=[1, 1, 1], all=[0, 0, 0], soft=[2/3, 1/3, 1/3], rater1=[1, 1, 0], rater2=[1, 0, 0],
                                           rater3=[0, 0, 1], recorded=[1, 0, 0]).items())
def test_label_rules_by_hand(tree, labels, y):
    one = read_frames(tree).query("video == 1")
    found = targets(one, labels)
    np.testing.assert_allclose(found[3:8], [y]*5)                     # the key-frame at 100 and the four after it
    np.testing.assert_allclose(found[8:], [[1, 1, 1]]*3)              # all three saw everything at 225
    assert np.isnan(found[:3]).all()

def test_a_vote_is_not_taken_from_an_earlier_key_frame(tree):
    one = read_frames(tree).query("video == 1 and frame != 225")
    assert np.isnan(targets(one, "rater1")[8:]).all() and not np.isnan(targets(one, "rater1")[3:8]).any()
    with pytest.raises(ValueError, match="rater1 gave no label on 1_250, 1_275"):
        make_clips(one, replace(RECORDED, split="train", labels="rater1"))

def test_counts_of_clips_by_hand(tree):
    frames = read_frames(tree)
    counts = lambda p: [len(make_clips(frames, replace(p, split=s))) for s in endoscapes.SPLITS]
    assert counts(OFFICIAL) == [2, 1, 1]                              # the key-frames
    assert counts(RECORDED) == [11, 4, 5]                             # every frame
    assert counts(replace(RECORDED, leading="drop")) == [8, 3, 3]     # less three, one and two before the first key-frame

def test_windows_by_hand(tree):
    frames = read_frames(tree)
    shown = lambda **changes: make_clips(frames, replace(OFFICIAL, split="train", **changes)).set_index("clip")["frames"]
    assert shown(n_frames=5)["1_225"] == [125, 150, 175, 200, 225]
    assert shown(n_frames=5)["1_100"] == [25, 25, 50, 75, 100]
    assert shown(n_frames=4, step=2)["1_225"] == [75, 125, 175, 225]
    assert shown(n_frames=16, window="centred")["1_225"] == [25, 50, 75, 100, 125, 150, 175, 200, 225, 250, 275, 275, 275, 275, 275, 275]   # c-8 .. c+7
    assert shown(n_frames=5, window="centred")["1_225"] == [175, 200, 225, 250, 275]
    assert shown(n_frames=1, window="centred")["1_225"] == [225]

@pytest.mark.parametrize("protocol", [replace(p, n_frames=n, step=s) for p in PROTOCOLS.values() for n in (1, 3, 16) for s in (1, 4)], ids=lambda p: p.describe())
def test_windows_never_leave_their_video(tree, protocol):
    frames = read_frames(tree).assign(split=protocol.split)                          # three videos, one after the other
    own = {v: set(f["frame"]) for v, f in frames.groupby("video")}
    clips = make_clips(frames, protocol)
    assert len(clips) in (4, 20)
    for c in clips.itertuples():
        assert set(c.frames) <= own[c.video] and len(c.frames) == protocol.n_frames
        assert c.frames[-1 if protocol.window == "causal" else protocol.n_frames // 2] == c.frame

def test_leading_frames_count_as_zero_only_where_asked(tree):
    clips = make_clips(read_frames(tree), replace(RECORDED, split="train")).set_index("frame")
    assert (clips.loc[25:75, ["y_c1", "y_c2", "y_c3"]] == 0).all(axis=None)
    assert clips.loc[100, ["y_c1", "y_c2", "y_c3"]].tolist() == [1, 0, 0]

def test_clips_with_a_mask(tree):
    clips = make_clips(read_frames(tree), replace(RECORDED, split="train", n_frames=4)).set_index("frame")
    assert clips.index[clips["has_mask"]].tolist() == [150, 175, 200, 225]       # 175 lies in c-2 .. c+1

def test_summary_and_raters_by_hand(tree):
    frames = read_frames(tree)
    row = summary(dict(train=make_clips(frames, replace(RECORDED, split="train")))).loc["train"]
    assert row[["clips", "videos"]].tolist() == [11, 1]
    np.testing.assert_allclose(row[["c1", "c2", "c3", "all_negative", "all_positive"]].astype(float), [8/11, 3/11, 3/11, 3/11, 3/11])
    raters = rater_table(frames)
    np.testing.assert_allclose(raters.loc["c1"], [2/4, 2/4, 1/4, 3/4])
    np.testing.assert_allclose(raters.loc["c3"], [1/4, 2/4, 3/4, 2/4])

@pytest.mark.parametrize("change", [dict(split="dev"), dict(frames="all"), dict(window="center"), dict(labels="mode"), dict(leading="keep"), dict(black="white"),
                                    dict(geometry="pad"), dict(n_frames=0), dict(step=-1), dict(size=2.5)], ids=str)
def test_protocol_refuses(change):
    with pytest.raises(ValueError, match=f"{list(change)[0]}.*({list(change.values())[0]})"): Protocol(**change)

# ---- packed frames

def pillow(path, geometry, size):
    "What the record did: crop, and Pillow's bilinear filter."
    image = Image.open(path).convert("RGB")
    (width, height), side = image.size, min(image.size)
    if geometry == "crop": image = image.crop(((width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)

def plain(tree, path, geometry, size, read=endoscapes._pixels):
    "What one does without a store."
    return read(tree/path, geometry, size)

@pytest.mark.parametrize("geometry", ["squash", "crop"])
def test_packed_pixels_are_those_of_their_image(tree, geometry, monkeypatch):
    monkeypatch.setattr(endoscapes, "BLOCK", 3)
    frames = read_frames(tree)
    store = pack_frames(tree, frames.sample(frac=1, random_state=0), geometry, 16)
    assert len(store) == 20
    for f in frames.itertuples():
        packed = store[store.rows(f.video, f.frame)][0]
        assert (packed == plain(tree, f.path, geometry, 16)).all()
        assert np.abs(packed.astype(int) - pillow(tree/f.path, geometry, 16)).max() <= 1
        assert store.brightness[store.rows(f.video, f.frame)] == pytest.approx(packed.mean(), abs=0.006)
    everything = store[store.rows(frames["video"], frames["frame"])]                # across the arrays of the splits
    assert (everything[-1] == plain(tree, frames["path"].iat[-1], geometry, 16)).all() and everything.shape == (20, 3, 16, 16)

@pytest.mark.parametrize("width, height, mode", [(854, 480, "RGB"), (2400, 2000, "RGB"), (60, 40, "RGB"), (854, 480, "L")], ids=str)
def test_pixels_are_those_of_pillow_but_for_the_last_bit(tmp_path, width, height, mode):
    "Rough pictures of the size of the real frames, large, enlarged, and grey: decoded to the same bits; of what is resized few values differ, by 1 of 255, by 2 hardly ever."
    rough = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    rough.convert(mode).save(tmp_path/"frame.jpg", quality=90)
    assert (endoscapes._decoded(tmp_path/"frame.jpg") == np.asarray(Image.open(tmp_path/"frame.jpg").convert("RGB"))).all()
    for geometry, size in (("squash", 256), ("crop", 256), ("squash", 384), ("crop", 384)):
        apart = np.abs(endoscapes._pixels(tmp_path/"frame.jpg", geometry, size).astype(int) - pillow(tmp_path/"frame.jpg", geometry, size))
        assert apart.shape == (3, size, size) and apart.max() <= 2 and (apart > 1).mean() < 5e-4, (geometry, size)
        assert (apart > 0).mean() < {256: 0.02, 384: 0.1}[size], (geometry, size)

def decodes(monkeypatch, stop_after=None):
    "Count the images that are decoded, and be interrupted after some."
    seen, pixels = [], endoscapes._pixels
    def counted(path, *args):
        if stop_after is not None and len(seen) >= stop_after: raise KeyboardInterrupt
        seen.append(path.name)
        return pixels(path, *args)
    monkeypatch.setattr(endoscapes, "_pixels", counted)
    return seen

def test_packing_goes_on_where_it_was_cut(tree, monkeypatch):
    monkeypatch.setattr(endoscapes, "BLOCK", 2)
    frames = read_frames(tree).query("split == 'train'")
    with monkeypatch.context() as m:
        decodes(m, stop_after=7)
        with pytest.raises(KeyboardInterrupt): pack_frames(tree, frames, size=8, threads=1)
    seen = decodes(monkeypatch)
    store = pack_frames(tree, frames, size=8)
    assert len(seen) in (4, 5)                                                      # of blocks of two, three were whole, or four where the odd one was among them
    assert (store[store.rows(1, frames["frame"])] == np.stack([plain(tree, p, "squash", 8) for p in frames["path"]])).all()
    seen.clear()
    pack_frames(tree, frames, size=8)
    assert not seen                                                                 # whole: nothing is decoded again

def damage_pixels(folder):
    with open(folder/"frames.npy", "r+b") as f:
        f.seek(-5, 2)
        f.write(b"\xaa\xbb\xcc")
def cut_short(folder): os.truncate(folder/"frames.npy", 900)
def damage_index(folder): (folder/"index.json").write_text('{"brightness": [')
def edit_index(folder):
    index = load(folder/"index.json")
    (folder/"index.json").write_text(json.dumps(index | dict(brightness=[0.]*11)))
def remove_array(folder): (folder/"frames.npy").unlink()

@pytest.mark.parametrize("damage", [damage_pixels, cut_short, damage_index, edit_index, remove_array])
def test_a_damaged_store_is_mended(tree, monkeypatch, damage):
    monkeypatch.setattr(endoscapes, "BLOCK", 2)
    frames = read_frames(tree).query("split == 'train'")
    store = pack_frames(tree, frames, size=8)
    pixels, brightness = store[range(11)], store.brightness
    damage(store.files[0].parent)
    seen = decodes(monkeypatch)
    again = pack_frames(tree, frames, size=8)
    assert (again[range(11)] == pixels).all() and (again.brightness == brightness).all()
    assert len(seen) == {damage_pixels: 1, cut_short: 11 - 2*2, damage_index: 0, edit_index: 0, remove_array: 11}[damage]   # 900 bytes hold two blocks of 384

PACK = """
import sys, time
from cvslab import endoscapes
endoscapes.BLOCK = 1
pixels = endoscapes._pixels
def slow(path, *args):
    print(path.name, flush=True)
    time.sleep(0.05)
    return pixels(path, *args)
endoscapes._pixels = slow
tree = sys.argv[1]
frames = endoscapes.read_frames(tree)
store = endoscapes.pack_frames(tree, frames, size=8, threads=1)
print("sum", store[range(len(store))].sum())
"""

def test_two_processes_share_the_packing(tree):
    jobs = [subprocess.Popen([sys.executable, "-c", PACK, tree], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [j.communicate()[0].split("\n") for j in jobs]
    assert [j.returncode for j in jobs] == [0, 0]
    frames = read_frames(tree)
    true = sum(int(plain(tree, p, "squash", 8).sum(dtype=np.int64)) for p in frames["path"])
    assert [next(line for line in out if line.startswith("sum")) for out in outputs] == [f"sum {true}"]*2
    assert {line for out in outputs for line in out if line.endswith(".jpg")} == {Path(p).name for p in frames["path"]}

def test_killed_while_packing(tree):
    job = subprocess.Popen([sys.executable, "-c", PACK, tree], stdout=subprocess.PIPE, text=True)
    for _ in range(6): job.stdout.readline()
    job.kill()
    job.communicate()
    done = subprocess.run([sys.executable, "-c", PACK, tree], stdout=subprocess.PIPE, text=True, check=True).stdout.split("\n")
    frames = read_frames(tree)
    assert f"sum {sum(int(plain(tree, p, 'squash', 8).sum(dtype=np.int64)) for p in frames['path'])}" in done
    assert sum(line.endswith(".jpg") for line in done) <= 20 - 5

def test_an_unreadable_image_never_becomes_a_black_one(tree):
    frames = read_frames(tree)
    whole = (tree/"train/1_150.jpg").read_bytes()
    (tree/"train/1_150.jpg").write_bytes(bytes(len(whole)))                                # as large as it was
    (tree/"val/2_75.jpg").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(ValueError, match="(?s)train/1_150.jpg: .*val/2_75.jpg: ") as error: pack_frames(tree, frames, size=8)
        assert str(tree.parent) not in str(error.value)
    ledger = Ledger(max_share=0.1)
    store = pack_frames(tree, frames, size=8, ledger=ledger)
    assert sorted(ledger.table()["item"]) == ["train/1_150.jpg", "val/2_75.jpg"]
    with pytest.raises(ValueError, match="2 of 20 items"): pack_frames(tree, frames, size=8, ledger=Ledger(max_share=0.05))
    with pytest.raises(ValueError, match="1 frames are not in the store: 1_150"): ClipDataset(make_clips(frames, replace(OFFICIAL, split="train")), store)
    kept = mark_black(frames, store)
    assert len(kept) == 18 and len(ClipDataset(make_clips(kept, replace(OFFICIAL, split="train")), store)) == 2
    (tree/"train/1_150.jpg").write_bytes(whole)                                      # put right, it is read
    left = Ledger(max_share=0.1)
    assert (pack_frames(tree, frames, size=8, ledger=left)[store.rows(1, 125) + 1] == plain(tree, "train/1_150.jpg", "squash", 8)).all()
    assert left.table()["item"].tolist() == ["val/2_75.jpg"]

def test_black_frames(tree):
    frames = read_frames(tree)
    marked = mark_black(frames, pack_frames(tree, frames, size=8))
    assert set(zip(*marked.loc[marked["black"], ["video", "frame"]].values.T.tolist())) == BLACK_FRAMES
    clips = lambda black: make_clips(marked, replace(OFFICIAL, split="train", black=black))["clip"].tolist()
    assert clips("keep") == ["1_100", "1_225"] and clips("drop") == ["1_100"]
    with pytest.raises(ValueError, match="mark_black"): make_clips(frames, replace(OFFICIAL, black="drop"))

def test_stores_of_other_geometry_size_and_data_lie_apart(tree):
    frames = read_frames(tree)
    files = {pack_frames(tree, frames.query("split == 'val'"), g, s).files[0].parent.name for g in ("squash", "crop") for s in (8, 16)}
    assert len(files) == 4
    for path in tree.glob("*/*.jpg"): Image.open(path).resize((80, 48)).save(path)
    assert pack_frames(tree, frames.query("split == 'val'"), "squash", 8).files[0].parent.name not in files

def test_a_full_disk_is_said_before(tree, monkeypatch):
    monkeypatch.setattr(endoscapes.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(OSError, match="set CVSLAB_CACHE"): pack_frames(tree, read_frames(tree), size=64)

# ---- datasets

def test_items(tree):
    frames = read_frames(tree)
    protocol = replace(OFFICIAL, split="train", n_frames=4, size=16)
    data = ClipDataset(make_clips(frames, protocol), pack_frames(tree, frames, size=16, masks=True), protocol, masks=True)
    item = data[1]                                                                   # 150, 175, 200, 225
    assert item["video"].dtype == torch.uint8 and item["y"].tolist() == [1, 1, 1] and item["y"].dtype == torch.float32 and item["index"] == 1
    assert (item["video"].numpy() == np.stack([plain(tree, f"train/1_{f}.jpg", "squash", 16) for f in (150, 175, 200, 225)])).all()
    small = np.asarray(Image.fromarray(mask_of(1, 175)).resize((4, 4), Image.Resampling.NEAREST))
    assert item["mask"].dtype == torch.int64 and item["mask_frames"].tolist() == [False, True, False, False]
    assert (item["mask"][1].numpy() == small).all() and (item["mask"][[0, 2, 3]] == 255).all()
    with pytest.raises(ValueError, match="masks=True"): ClipDataset(data.clips, pack_frames(tree, frames, size=16), masks=True)[0]

def test_masks_follow_the_geometry(tree):
    frames = read_frames(tree)
    store = pack_frames(tree, frames, "crop", 96, masks=True)
    assert (store.mask(1, [175])[0] == mask_of(1, 175)[:, 8:32]).all()               # the central 24 x 24 of 40 x 24, at its own size

def test_items_survive_spawned_workers(tree):
    frames = read_frames(tree)
    data = ClipDataset(make_clips(frames, replace(RECORDED, split="train", n_frames=4)), pack_frames(tree, frames, size=32, masks=True), masks=True)
    everything = data.store[range(11)], [data[i] for i in range(11)]                 # the files are open here already
    assert len(pickle.dumps(data.store)) < everything[0].nbytes
    loader = DataLoader(data, batch_size=4, num_workers=1, multiprocessing_context=multiprocessing.get_context("spawn"))
    batches = list(loader)
    assert torch.cat([b["index"] for b in batches]).tolist() == list(range(11))
    assert (torch.cat([b["video"] for b in batches]) == torch.stack([item["video"] for item in everything[1]])).all()
    assert (torch.cat([b["mask"] for b in batches]) == torch.stack([item["mask"] for item in everything[1]])).all()

def test_open_datasets(tree):
    datasets, card = open_datasets(tree, replace(RECORDED, split="test", n_frames=4, size=16))
    assert {s: len(d) for s, d in datasets.items()} == dict(train=11, val=4, test=5) and card == data_card(tree)
    assert all(d.protocol == replace(RECORDED, split=s, n_frames=4, size=16) for s, d in datasets.items())
    few, _ = open_datasets(tree, replace(RECORDED, n_frames=4, size=16), max_clips=5, seed=3)
    assert {s: len(d) for s, d in few.items()} == dict(train=5, val=4)
    same, other = (open_datasets(tree, replace(RECORDED, n_frames=4, size=16), max_clips=5, seed=s)[0]["train"].clips["clip"].tolist() for s in (3, 4))
    assert same == few["train"].clips["clip"].tolist() != other
    dropped, _ = open_datasets(tree, replace(OFFICIAL, n_frames=4, size=16, black="drop"))
    assert dropped["train"].clips["clip"].tolist() == ["1_100"]

def test_a_label_rule_that_changes_nothing_is_seen(tree):
    edit(tree, lambda d: d.assign(C1=d["C1"].round(), C2=d["C2"].round(), C3=d["C3"].round()))      # raters of one mind
    proof = lambda **changes: label_proof(open_datasets(tree, replace(OFFICIAL, n_frames=2, size=8, **changes))[0]["train"])
    assert not proof(labels="any").turned and not proof(labels="soft").turned and not proof(labels="recorded").turned
    assert proof(labels="recorded", frames="1fps").turned and proof(labels="recorded", frames="1fps").seen.startswith("75.0% of clips")

# ---- the drawn tree, in the real format

@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    from cvslab.demo import draw_endoscapes
    return draw_endoscapes(tmp_path_factory.mktemp("drawn")/"tree", seed=5, videos=(3, 2, 1), seconds=(20, 30), masked=1., workers=1)

def test_readers_agree_on_the_drawn_tree(drawn):
    frames = read_frames(drawn)
    assert data_card(drawn)["demo"] and (frames["mask"] != "").sum() >= 3
    for split in endoscapes.SPLITS:
        every, key, box = (read_coco(drawn, split, which) for which in ("1fps", "key", "boxes"))
        here = frames[frames["split"] == split]
        unlisted = here[~here["path"].isin(every["path"])]             # in test, the COCO file lacks some, as in the archive
        assert every["path"].isin(here["path"]).all() and (len(unlisted) > 0) == (split == "test") and not unlisted["key"].any()
        assert disagreements(frames, every).empty and disagreements(frames, key).empty and disagreements(frames, box).empty
        assert len(make_clips(frames, replace(OFFICIAL, split=split))) == len(key)
        assert len(make_clips(frames, replace(RECORDED, split=split))) == len(every) + len(unlisted)

def test_drawn_masks_are_the_same_as_images_and_run_lengths(drawn):
    for f in read_frames(drawn).query("mask != ''").itertuples():
        image, listed = read_mask(drawn, f.mask), read_mask(drawn, f"{f.split}_seg/annotation_coco.json#{f.video}_{f.frame}")
        known = image != IGNORE                                        # some masks leave a spot open
        assert (image[known] == listed[known]).all() and known.mean() > .98, f.path

@pytest.mark.parametrize("labels", ["majority", "recorded", "rater1", "rater3"])
def test_drawn_labels_follow_from_the_votes(drawn, labels):
    frames = read_frames(drawn)
    clips = make_clips(frames, replace(RECORDED, split="train", labels=labels)).set_index("clip")
    last = None
    for f in frames[frames["split"] == "train"].itertuples():
        if f.key: last = [[getattr(f, f"r{k}_{c}") for k in (1, 2, 3)] for c in ("c1", "c2", "c3")]
        if not f.labelled: last = [[0]*3]*3
        want = [votes[int(labels[-1]) - 1] if labels.startswith("rater") else float(sum(votes) >= 2) for votes in last]
        assert clips.loc[f"{f.video}_{f.frame}", ["y_c1", "y_c2", "y_c3"]].tolist() == want


def test_a_label_budget_leaves_the_videos_of_its_fold(tmp_path, monkeypatch):
    monkeypatch.setenv("CVSLAB_CACHE", str(tmp_path/"cache"))
    tree = draw_endoscapes(tmp_path/"tree", videos=(8, 2, 1), seconds=(20, 25), size=(40, 24), workers=1)
    small = Protocol(n_frames=2, size=16)
    of_fold = set(read_coco(tree, "25/train_1", "key")["video"])
    datasets, _ = open_datasets(tree, small, budget="25/train_1")
    assert set(datasets["train"].clips["video"]) == of_fold and len(of_fold) == 2 and datasets["val"].clips["video"].nunique() == 2
    proof = endoscapes.budget_proof(datasets["train"])
    assert proof.turned and proof.seen == "2 of 8 videos"
    datasets["train"].budget = ("25/train_1", 8, 8)
    assert not endoscapes.budget_proof(datasets["train"]).turned
    with pytest.raises((ValueError, OSError), match="train_7.*choose a folder"): open_datasets(tree, small, budget="25/train_7")
