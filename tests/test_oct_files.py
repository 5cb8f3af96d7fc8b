"Volumes as other people's software writes them: read as what they are, or refused in words that name the file and what to do."
import gzip, io, itertools, re

import nibabel
import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from nibabel.orientations import apply_orientation, inv_ornt_aff
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

from cvslab import volumes
from cvslab.core import Ledger
from cvslab.storage import Store
from cvslab.volumes import Preprocess, read_volume, stream

D, H, W = 14, 44, 40
PREP = Preprocess((16, 24, 24))
z, y, x = np.meshgrid(range(D), range(H), range(W), indexing="ij")
TRUE = (100 * np.exp(-((y - 10 - z) / 6)**2) + 50 * np.exp(-((x - 10) / 8)**2) + 3 * z).round().astype(np.uint16)
INTERLEAVED = [*range(0, D, 2), *range(1, D, 2)]


def item(**values):
    ds = Dataset()
    for k, v in values.items(): setattr(ds, k, v)
    return ds


def jpeg2000(frame):
    out = io.BytesIO()
    Image.fromarray(frame.astype(np.uint8)).save(out, "JPEG2000", no_jp2=True, irreversible=False)
    return out.getvalue()


def opt(pixels=TRUE, groups=None, shared=None, change=None, coding="raw") -> bytes:
    "A multi-frame Ophthalmic Tomography file; `groups` gives the sequences of each frame's group, `change` edits the finished dataset."
    ds = item(SOPClassUID="1.2.840.10008.5.1.4.1.1.77.1.5.4", SOPInstanceUID="1.2.3", Modality="OPT", SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2",
              PixelRepresentation=0)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.NumberOfFrames, ds.Rows, ds.Columns = pixels.shape
    bits = 8 if coding == "jpeg2000" else 16
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = bits, bits, bits - 1
    if groups is not None: ds.PerFrameFunctionalGroupsSequence = [item(**{k: [v] for k, v in g.items()}) for g in groups]
    if shared is not None: ds.SharedFunctionalGroupsSequence = [item(**{k: [v] for k, v in shared.items()})]
    ds.PixelData = pixels.round().astype("<u2").tobytes()
    ds["PixelData"].VR = "OW"
    if coding == "rle": ds.compress(RLELossless, pixels.astype(np.uint16), generate_instance_uid=False)
    if coding == "jpeg2000":
        ds.PixelData = encapsulate([jpeg2000(f) for f in pixels])
        ds["PixelData"].VR, ds.file_meta.TransferSyntaxUID = "OB", JPEG2000Lossless
    if change: change(ds)
    out = io.BytesIO()
    ds.save_as(out, enforce_file_format=True)
    return out.getvalue()


def read(data: bytes, name="a.dcm"): return read_volume(io.BytesIO(data), name)
def pixels(volume): return volume.frames(range(volume.shape[0]))
def same(volume, atol=2e-3): torch.testing.assert_close(PREP(volume), PREP(read(opt())), rtol=2e-3, atol=atol)


def ledger_says(tmp_path, data: bytes, name="a.dcm", **row) -> str:
    "The one reason that stands in the ledger after the file was streamed."
    (tmp_path/name).write_bytes(data)
    ledger = Ledger(max_share=1)
    table = pd.DataFrame([dict(participant="1001", split="train", label=0, key=name, etag="1", **row)])
    assert list(stream(table, Store(tmp_path), PREP, ledger, keep=False)) == [] and len(ledger.rows) == 1
    said = ledger.rows[0]["message"]
    assert said.startswith(f"{name}: ") and ledger.rows[0]["error"] == "VolumeError"
    assert not re.search(r"\w+(Error|Exception)\b|invalid literal|object has no attribute|0x[0-9a-f]{9}", said), said
    assert re.search(r"export|fetch|choose|save|correct|join|convert|install|resample", said), f"no remedy: {said}"
    return said


# where frames lie

def line(r0, c0, r1, c1): return dict(OphthalmicFrameLocationSequence=item(ReferenceCoordinates=[float(v) for v in (r0, c0, r1, c1)]))
def horizontal(i): return line(40 + 8 * i, 20, 40 + 8 * i, 340)
def vertical(i): return line(20, 40 + 8 * i, 340, 40 + 8 * i)
def tilted(i): return line(100 + 8 * i, 20 - 4 * i, 250 + 8 * i, 320 - 4 * i)
def zigzag(i): return line(40 + 8 * i, *((20, 40 + 8 * i, 340) if i % 2 else (340, 40 + 8 * i, 20)))
def position(i): return dict(PlanePositionSequence=item(ImagePositionPatient=[1.5, 2.0, 0.25 * i]))
def radial(i): return line(*(160 + 100 * np.array([np.sin(a), np.cos(a), -np.sin(a), -np.cos(a)]) for a in [np.pi * i / D]).__next__())


@pytest.mark.parametrize("place, coding", [*((place, "raw") for place in (horizontal, vertical, tilted, zigzag, position)), (horizontal, "rle"), (horizontal, "jpeg2000")])
@pytest.mark.parametrize("order", [range(D), INTERLEAVED, [*reversed(INTERLEAVED)], np.random.default_rng(0).permutation(D).tolist()], ids=["in order", "interleaved", "from below", "mixed"])
def test_frames_are_sorted_by_where_they_lie(place, order, coding):
    volume = read(opt(TRUE[list(order)], [place(i) for i in order], coding=coding))
    found = pixels(volume)
    assert (found == TRUE).all()
    assert not volume.upward and (volume.frames([5, 2]) == found[[5, 2]]).all()


def test_frames_in_reversed_order_stay_and_are_turned_by_the_preprocessing():
    back = range(D)[::-1]
    up, side = read(opt(TRUE[::-1], [horizontal(i) for i in back])), read(opt(TRUE[::-1], [vertical(i) for i in back]))
    assert up.upward and not side.upward and (pixels(up) == TRUE[::-1]).all() and (pixels(side) == TRUE[::-1]).all()
    same(up)


@pytest.mark.parametrize("groups", [
    [radial(i) for i in INTERLEAVED], [radial(i) for i in range(D - 2)] + [line(0, 0, 9, 9), line(0, 0, 0, 0)], [line(40, 20, 40, 340)] * D,
    [horizontal(i // 2) for i in range(D)], [dict(OphthalmicFrameLocationSequence=item())] * D, [dict(OphthalmicFrameLocationSequence=item(ReferenceCoordinates=None))] * D,
    [dict(OphthalmicFrameLocationSequence=item(ReferenceCoordinates=[1.0, 2.0]))] * D, [horizontal(i) if i not in (0, 5) else {} for i in range(D)], [{}] * D],
    ids=["radial", "radial and circle", "one line", "each twice", "none", "empty", "short", "two unknown", "no sequence"])
def test_frames_without_an_order_of_their_own_stay_as_stored(groups):
    volume = read(opt(groups=groups))
    assert (pixels(volume) == TRUE).all() and not volume.upward


@pytest.mark.parametrize("groups, words", [
    ([horizontal(i) if i != 5 else {} for i in INTERLEAVED], "frames are not in order, and 1 of 14 do not say where they lie"),
    ([horizontal(i // 2) for i in INTERLEAVED], r"frames are not in order, and frames \[1, 8\] lie at the same place"),
    ([horizontal(i) for i in range(D - 1)], "counts 14 frames, but describes 13")])
def test_an_order_that_cannot_be_told_is_named(tmp_path, groups, words):
    assert re.search(words, ledger_says(tmp_path, opt(groups=groups)))


# slope and intercept

SLOPES = np.linspace(0.05, 1, D)
def scaled(slope, intercept=0): return dict(PixelValueTransformationSequence=item(RescaleSlope=str(slope)[:16], RescaleIntercept=str(intercept)[:16], RescaleType="US"))
def put(**values): return lambda ds: [setattr(ds, k, v) for k, v in values.items()]


@pytest.mark.parametrize("make", [
    lambda: opt((3000 - TRUE), change=put(RescaleSlope=-1, RescaleIntercept=3000)), lambda: opt(TRUE + 1000, change=put(RescaleSlope=1, RescaleIntercept=-1000)),
    lambda: opt(2 * TRUE, shared=scaled(0.5)), lambda: opt(2 * TRUE, [scaled(0.5)] * D, shared=scaled(7)),
    lambda: opt(TRUE / SLOPES[:, None, None], [scaled(s) for s in SLOPES]), lambda: opt(TRUE + 100 * np.arange(D)[:, None, None], [scaled(1, -100 * i) for i in range(D)]),
    lambda: opt((TRUE / SLOPES[:, None, None])[INTERLEAVED], [scaled(SLOPES[i]) | horizontal(i) for i in INTERLEAVED]),
    lambda: opt(4 * TRUE, [scaled(0.25) if i % 3 else {} for i in range(D)], shared=scaled(0.25))],
    ids=["negative", "intercept", "shared", "own before shared", "by frame", "intercept by frame", "by frame, interleaved", "some own, the rest shared"])
def test_slope_and_intercept_are_applied(make):
    volume = read(make())
    torch.testing.assert_close(PREP.resize(volume), PREP.resize(read(opt())), rtol=0, atol=0.6)          # the stored numbers are rounded
    same(volume, atol=0.02)


def test_stored_numbers_stay_what_pydicom_reads():
    data = opt(change=put(RescaleSlope=2, RescaleIntercept=-1024))
    assert (pixels(read(data)) == pydicom.dcmread(io.BytesIO(data)).pixel_array).all() and read(opt()).rescale is None


@pytest.mark.parametrize("make, words", [
    (lambda: opt(change=put(RescaleSlope=0, RescaleIntercept=1)), "frame 1 is scaled by RescaleSlope"), (lambda: opt(change=put(RescaleSlope=2)), "an intercept"),
    (lambda: opt(groups=[dict(PixelValueTransformationSequence=item(RescaleIntercept=5))] * D), "frame 1 is scaled by RescaleIntercept"),
    (lambda: opt(groups=[scaled(2) if i < 3 else {} for i in range(D)]), "3 of 14 frames have a rescale slope"), (lambda: opt(groups=[scaled(2)] * 5), "describes 5"),
    (lambda: opt(change=put(ModalityLUTSequence=[item(LUTDescriptor=[2, 0, 16])])), "Modality LUT"),
    (lambda: opt(change=put(RescaleSlope="12345678", RescaleIntercept="0")).replace(b"12345678", b"1,234567"), "RescaleSlope")])
def test_a_scaling_that_cannot_be_applied_is_refused(tmp_path, make, words): assert words in ledger_says(tmp_path, make())


# header, manifest and pixels agree

def longer(ds): ds.PixelData += ds.PixelData[: len(ds.PixelData) // 2]


@pytest.mark.parametrize("coding, change, words", [
    ("raw", put(NumberOfFrames=7), "the header says 7 frames of 44 x 40 pixels, 24,640 bytes, the pixel data hold 49,280 bytes (14 such frames)"),
    ("raw", lambda ds: ds.__delattr__("NumberOfFrames"), "the header says 1 frames"), ("raw", put(Columns=39), "the header says 14 frames of 44 x 39"),
    ("raw", put(Rows=45), "cut short"), ("raw", put(BitsAllocated=8, BitsStored=8, HighBit=7), "the pixel data hold"), ("raw", longer, "(21 such frames)"),
    ("rle", put(NumberOfFrames=13), "the header says 13 frames, the pixel data hold 14"), ("jpeg2000", put(NumberOfFrames=28), "says 28 frames, the pixel data hold 14"),
    ("jpeg2000", put(Rows=W, Columns=H), "the header says 14 frames of 40 x 44 pixels, the pixel data 14 frames of 44 x 40"), ("rle", put(Columns=39), "44 x 39 pixels, 1,716 in a frame, the pixel data hold 1,760"), ("rle", put(Rows=45), "1,800 in a frame, the pixel data hold 1,760"),
    ("jpeg2000", lambda ds: setattr(ds.file_meta, "TransferSyntaxUID", RLELossless), "its pixel data are not RLE Lossless"),
    ("rle", lambda ds: setattr(ds.file_meta, "TransferSyntaxUID", JPEG2000Lossless), "the pixel data are not JPEG 2000".replace("the", "its"))])
def test_a_header_that_does_not_fit_its_pixels_is_named(tmp_path, coding, change, words): assert words in ledger_says(tmp_path, opt(change=change, coding=coding))


def test_sizes_of_every_coding_are_read():
    out = io.BytesIO()
    Image.fromarray(TRUE[0].astype(np.uint8)).save(out, "JPEG", progressive=True)
    assert volumes._coded_size(out.getvalue()) == volumes._coded_size(jpeg2000(TRUE[0])) == (H, W) and volumes._coded_size(b"\xff\xd8\xff") is None
    baseline = opt(coding="jpeg2000", change=lambda ds: (setattr(ds, "PixelData", encapsulate(D * [out.getvalue()])), setattr(ds.file_meta, "TransferSyntaxUID", JPEGBaseline8Bit)))
    assert read(baseline).shape == (D, H, W)


def test_a_filling_of_zeros_behind_the_pixels_costs_nothing(): same(read(opt(change=lambda ds: setattr(ds, "PixelData", ds.PixelData + bytes(128)))))


@pytest.mark.parametrize("said", [dict(frames=15), dict(rows=W, cols=H), dict(cols=39), dict(frames=14, rows=44, cols=41)])
def test_a_manifest_that_says_another_size_is_named(tmp_path, monkeypatch, said):
    monkeypatch.setenv("CVSLAB_CACHE", str(tmp_path/"cache"))
    right = dict(frames=D, rows=H, cols=W)
    table = pd.DataFrame([dict(participant="1001", split="train", label=0, key="a.dcm", etag="1") | right])
    (tmp_path/"a.dcm").write_bytes(opt())
    assert len(list(stream(table, Store(tmp_path), PREP, Ledger(max_share=0)))) == 1                      # now it stands in the cache
    ledger = Ledger(max_share=1)
    assert list(stream(table.assign(**said), Store(tmp_path), PREP, ledger)) == []
    say = {k: v for k, v in (right | said).items()}
    assert f"the manifest says {say['frames']} frames of {say['rows']} x {say['cols']} pixels, the file 14 frames of 44 x 40" in ledger.rows[0]["message"]
    assert len(list(stream(table.assign(frames=np.nan), Store(tmp_path), PREP, Ledger(max_share=0)))) == 1


# headers of other makers

def no(keyword): return lambda ds: ds.__delattr__(keyword)
def unmark(data): return data[:128] + b"XXXX" + data[132:]


@pytest.mark.parametrize("data, words", [
    (lambda: opt(change=put(NumberOfFrames=14)).replace(b"IS\x02\x0014", b"IS\x02\x00NA"), "NumberOfFrames is 'NA'"), (lambda: opt(change=put(NumberOfFrames=0)), "NumberOfFrames is"),
    (lambda: opt(change=no("Rows")), "has no Rows"), (lambda: opt(change=no("SamplesPerPixel")), "has no SamplesPerPixel"), (lambda: opt(change=no("BitsAllocated")), "has no BitsAllocated"),
    (lambda: opt(change=no("PhotometricInterpretation")), "1 samples a pixel of None"), (lambda: opt(change=put(PhotometricInterpretation="MONOCHROME1")), "of MONOCHROME1"),
    (lambda: opt(change=no("PixelData")), "holds no pixel data"), (lambda: opt(change=put(InConcatenationNumber=2, InConcatenationTotalNumber=3)), "part 2 of 3"),
    (lambda: opt().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.99999.1.2.1\0"), "can be read"), (lambda: unmark(opt()), "no DICOM file"), (lambda: b"", "no DICOM file"),
    (lambda: b"<!DOCTYPE html><html>sign in</html>" * 9, "no DICOM file"), (lambda: opt()[:-20000], "the file is cut short"),
    (lambda: opt(coding="rle")[:-3000], "ends within them"), (lambda: opt(coding="jpeg2000")[:-3000], "ends within them"),
    (lambda: opt(coding="jpeg2000", change=lambda ds: setattr(ds, "PixelData", encapsulate([bytes(b ^ 0x5A for b in jpeg2000(f)) for f in TRUE]))), "scrambled"),
    (lambda: opt(coding="jpeg2000", change=lambda ds: setattr(ds, "PixelData", encapsulate([jpeg2000(f)[:150] for f in TRUE]))), "decoded as JPEG 2000")])
def test_every_reason_of_a_dicom_is_a_sentence_with_a_remedy(tmp_path, data, words): assert words in ledger_says(tmp_path, data())


def spacing(text: str, vr=b"DS"):
    "The file with the bytes of its Pixel Spacing exchanged."
    data = opt(change=put(PixelSpacing=["0.00260000", "0.01170000"]))
    at = data.find(b"\x28\x00\x30\x00DS")
    size = int.from_bytes(data[at+6:at+8], "little")
    return data[:at+4] + vr + data[at+6:at+8] + text.encode().ljust(size) + data[at+8+size:]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("text, vr", [("0.0026,0.0117", b"DS"), ("0,0026\\0,0117", b"DS"), ("0.0026", b"DS"), ("0.0026\\0.0117\\1", b"DS"), ("", b"DS"), ("n/a", b"DS"), ("0.0026\\0.0117", b"LT"),
                                      ("NaN\\inf", b"DS"), ("0.0026 x 0.0117", b"LO")])
def test_a_spacing_that_cannot_be_read_is_unknown_and_costs_nothing(text, vr):
    volume = read(spacing(text, vr))
    assert np.isnan(volume.spacing[1:]).all()
    same(volume)


def test_spacings_are_read_where_they_stand():
    assert read(spacing("0.0026\\0.0117")).spacing[1:] == (0.0026, 0.0117)
    measures = dict(PixelMeasuresSequence=item(PixelSpacing=[0.0039, 0.012], SliceThickness=0.13))
    assert read(opt(shared=measures)).spacing == read(opt(groups=[measures] * D)).spacing == (0.13, 0.0039, 0.012)
    same(read(opt(groups=[measures] * 5)))                              # frames counted wrongly where nothing is computed from them


# NIfTI

AXES = (0.0117, 0.0026, 0.0469)                                        # lateral, axial, between B-scans


def nifti(ornt=None, kind=nibabel.Nifti1Image, array=None):
    "The volume with its axes turned and flipped as `ornt` says, and an affine that says the same."
    array = TRUE.T.astype(np.int16) if array is None else array
    affine = np.diag([*AXES, 1])
    if ornt is not None:
        shape, array = array.shape, apply_orientation(array, ornt)
        affine = affine @ inv_ornt_aff(ornt, shape[:3])
    return kind(array, affine)


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))], ids=str)
@pytest.mark.parametrize("flips", [*itertools.product((1, -1), repeat=3)], ids=str)
def test_a_nifti_is_turned_by_its_affine(order, flips):
    volume = read(nifti(np.array([*zip(order, flips)], float)).to_bytes(), "a.nii")
    assert volume.shape == (D, H, W) and (pixels(volume) == TRUE).all() and np.allclose(volume.spacing, AXES[::-1])


def without_codes(image) -> bytes:
    data = bytearray(image.to_bytes())
    data[252:256] = bytes(4)
    return bytes(data)


def only_qform(image):
    image.set_qform(image.affine, 1)
    image.set_sform(None, 0)
    return image


def askew(degrees, image):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return nibabel.Nifti1Image(image.get_fdata().astype(np.int16), np.array([[1, 0, 0, 0], [0, c, -s, 0], [0, s, c, 0], [0, 0, 0, 1]]) @ image.affine)


TURNED = np.array([(1, -1), (0, 1), (2, -1)], float)


def stored_scale(image):
    image.header.set_slope_inter(0.5, -3)
    return image


@pytest.mark.parametrize("make", [
    lambda: nifti(TURNED, nibabel.Nifti2Image).to_bytes(), lambda: nifti(None, nibabel.Nifti2Image).to_bytes(), lambda: only_qform(nifti(TURNED)).to_bytes(),
    lambda: nifti(array=TRUE.T[..., None].astype(np.int16)).to_bytes(), lambda: nifti(TURNED, array=TRUE.T[..., None, None].astype(np.float64)).to_bytes(),
    lambda: nibabel.Nifti1Image(TRUE.T.astype(">f4"), np.diag([*AXES, 1]), nibabel.Nifti1Header(endianness=">")).to_bytes(), lambda: gzip.compress(nifti(TURNED).to_bytes()),
    lambda: gzip.compress(nifti(TURNED, nibabel.Nifti2Image).to_bytes()), lambda: askew(5, nifti()).to_bytes(), lambda: without_codes(nifti())],
    ids=["NIfTI-2 turned", "NIfTI-2", "qform", "four axes", "five axes", "big-endian", "gzip", "gzip NIfTI-2", "slightly askew", "no affine"])
@pytest.mark.parametrize("name", ["a.nii", "A.NII.GZ", "a.Nii.gz"])
def test_niftis_of_every_kind(make, name): assert (pixels(read(make(), name)) == TRUE).all()


def test_an_affine_that_says_nothing_turns_nothing():
    turned = nifti(TURNED)
    volume = read(without_codes(turned), "a.nii")
    assert (pixels(volume) == np.asarray(turned.dataobj).T).all() and volume.syntax == "nifti, as stored"
    assert read(nifti(TURNED).to_bytes(), "a.nii").syntax == "nifti, ALI turned to RAS" and read(nifti().to_bytes(), "a.nii").syntax == "nifti, RAS"


def test_units_and_scaling_of_a_nifti():
    image = nibabel.Nifti1Image(TRUE.T.astype(np.int16), np.diag([11.7, 2.6, 46.9, 1]))
    image.header.set_xyzt_units("micron")
    assert np.allclose(read(image.to_bytes(), "a.nii").spacing, AXES[::-1])
    assert np.allclose(pixels(read(stored_scale(nibabel.Nifti1Image(TRUE.T.astype(np.float32), np.eye(4))).to_bytes(), "a.nii")), 0.5 * TRUE - 3)


def colour():
    rgb = np.zeros(TRUE.T.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    return nibabel.Nifti1Image(rgb, np.eye(4))


def bad_sform(value):
    image = nifti()
    image.header["srow_x"] = value
    image.header["sform_code"] = 1
    data = bytearray(image.to_bytes())
    data[280:296] = np.array(value, "<f4").tobytes()
    return bytes(data)


@pytest.mark.parametrize("data, words, name", [
    (lambda: askew(30, nifti()).to_bytes(), "askew by 30 degrees, more than 10", "a.nii"), (lambda: nifti(array=np.repeat(TRUE.T[..., None].astype(np.int16), 2, 3)).to_bytes(), "4 dimensions", "a.nii"),
    (lambda: nibabel.Nifti1Image(TRUE[0].astype(np.int16), np.eye(4)).to_bytes(), "2 dimensions", "a.nii"), (lambda: colour().to_bytes(), "not one number each", "a.nii"),
    (lambda: nibabel.Nifti1Image(TRUE.T.astype(np.complex64), np.eye(4)).to_bytes(), "complex64", "a.nii"), (lambda: bad_sform([0, 0, 0, 0]), "no three directions", "a.nii"),
    (lambda: bad_sform([np.nan, 0, 0, 0]), "no three directions", "a.nii"), (lambda: nifti().to_bytes()[:-999], "end early or are damaged", "a.nii"),
    (lambda: without_codes(nifti())[:-999], "end early or are damaged", "a.nii"), (lambda: gzip.compress(nifti().to_bytes())[:-50], "gzip data end early", "a.nii.gz"),
    (lambda: gzip.compress(nifti().to_bytes())[:40], "gzip data end early", "a.NII.GZ"), (lambda: b"<html></html>" * 99, "no NIfTI file", "a.nii"), (lambda: b"", "no NIfTI file", "a.nii.gz"),
    (lambda: nifti().to_bytes()[:200], "header cannot be read", "a.nii"), (lambda: b"x", "no array that numpy saved", "a.npy"), (lambda: opt(), "no array that numpy saved", "a.npy"),
    (lambda: b"x", "unknown format: choose .dcm, .nii, .nii.gz, .npy", "a.tif"), (lambda: opt(), "unknown format", "a")])
def test_every_reason_of_the_other_formats_is_a_sentence_with_a_remedy(tmp_path, data, words, name): assert words in ledger_says(tmp_path, data(), name)


def test_arrays_that_hold_no_volume_are_refused(tmp_path):
    for array, words in ((np.zeros((9, 9)), "2 dimensions"), (np.full((9, 9, 9), "a"), "not one number"), (np.zeros((9, 9, 9), complex), "complex"), (np.full((9, 9, 9), np.nan), "NaN"),
                         (np.ones((9, 9, 9)), "constant"), (np.zeros((2, 9, 9)), "tiny: 2x9x9")):
        out = io.BytesIO()
        np.save(out, array)
        assert words in ledger_says(tmp_path, out.getvalue(), "a.npy")
    out = io.BytesIO()
    np.savez(out, TRUE)
    assert "dimensions" in ledger_says(tmp_path, out.getvalue(), "a.npy")


@pytest.mark.parametrize("name", ["a.DCM", "a.Dcm", "a.NPY", "a.NII", "a.nii.GZ"])
def test_endings_in_capitals(name):
    out = io.BytesIO()
    np.save(out, TRUE)
    data = {"dcm": opt(), "npy": out.getvalue(), "nii": nifti().to_bytes(), "gz": gzip.compress(nifti().to_bytes())}[name.lower().split(".")[-1]]
    assert (pixels(read(data, name)) == TRUE).all()


# caches

def test_correcting_a_file_in_place_gives_new_data(tmp_path, monkeypatch):
    monkeypatch.setenv("CVSLAB_CACHE", str(tmp_path/"cache"))
    store, data = Store(tmp_path/"tree"), opt()
    (tmp_path/"tree").mkdir()
    def streamed(content):
        with open(tmp_path/"tree/a.dcm", "wb") as f: f.write(content)
        table = store.list().assign(participant="1001", split="train", label=0)
        return next(stream(table, store, PREP, Ledger(max_share=0)))[1]
    first, other = streamed(data), bytearray(data)
    other[-2000:] = other[-4000:-2000]
    corrected = streamed(bytes(other))
    assert len(other) == len(data) and not torch.equal(first, corrected) and torch.equal(streamed(data), first)


def test_another_reading_rule_names_other_caches(monkeypatch):
    name = PREP.name
    monkeypatch.setattr(volumes, "_REVISION", volumes._REVISION + 1)
    assert PREP.name != name


def test_only_the_frames_that_count_are_decoded():
    many = np.repeat(TRUE, 20, 0)
    volume, seen = read(opt(many[::-1], [line(i, 0, i, 99) for i in range(len(many))][::-1])), []
    decode = volume.frames
    volume.frames = lambda indices: seen.extend(indices) or decode(indices)
    PREP(volume)
    assert len(seen) <= 32 < len(many)
