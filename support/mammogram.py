"""One mammogram in and out: DICOM and other images -> display values and back (Q19, Q39, F7).

`stored` are the integers of the file, `display` is float32 in [-1, 1] with air low: modality LUT ->
VOI LUT or window -> inversion -> a fixed linear map, PS3.3 C.11 (C.x and CID n: DICOM standard).
"""

import contextlib
import functools
import hashlib
import logging
import math
import os
import re
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pydicom
from PIL import Image
from pydicom import Dataset, FileDataset, uid
from pydicom.dataset import FileMetaDataset
from pydicom.pixels import get_decoder
from pydicom.pixels.utils import as_pixel_options
from pydicom.sr.codedict import Code, codes

MAX_PIXELS = 200_000_000  # a header that claims more is refused before anything is decoded
# Above 50 megapixels (film at 43 micrometres has 40) a file must hold a byte for 512 pixels, a bit
# for each 8 x 8 block: a mammogram takes tens of times more, what is forged or flat takes less.
PLAUSIBLE_PIXELS, PIXELS_A_BYTE = 50_000_000, 512
RASTERS = ("PNG", "PPM", "TIFF", "JPEG")
WIDEST_MM = 1000  # no detector or film is a metre long: converters write 1 where they know none
MODALITIES = ("MG", "CR", "DX", "RG", "SC")  # mammography and what film digitisers write
FOR_PROCESSING = (
    "1.2.840.10008.5.1.4.1.1.1.2.1",  # digital mammography X-ray image, for processing
    "1.2.840.10008.5.1.4.1.1.1.1.1",  # digital X-ray image, for processing
)
# Values 3 and 4 of ImageType, of the standard and of vendors, for a slice or a raw projection
SLICED = {"TOMOSYNTHESIS", "TOMO", "TOMO_PROJ"}
SPECIMEN_CODES = ("127457009", "G-8310")  # tissue specimen from breast, CID 4014, SCT and SRT

# Transfer syntax -> (plug-in of pydicom, package to install). Of several plug-ins we name the one
# that refuses damaged data.
DECODERS = {
    uid.JPEGBaseline8Bit: ("pillow", "pillow"),
    uid.JPEGExtended12Bit: ("pylibjpeg", "pylibjpeg-libjpeg"),
    uid.JPEGLossless: ("pylibjpeg", "pylibjpeg-libjpeg"),
    uid.JPEGLosslessSV1: ("pylibjpeg", "pylibjpeg-libjpeg"),
    uid.JPEGLSLossless: ("pyjpegls", "pyjpegls"),
    uid.JPEGLSNearLossless: ("pyjpegls", "pyjpegls"),
    uid.JPEG2000Lossless: ("pylibjpeg", "pylibjpeg-openjpeg"),
    uid.JPEG2000: ("pylibjpeg", "pylibjpeg-openjpeg"),
    uid.RLELossless: ("pylibjpeg", "pylibjpeg-rle"),
}
MARKED = [  # streams that end in a marker, which some makers leave out of JPEG 2000
    syntax for syntax in DECODERS if "JPEG" in syntax.name and "2000" not in syntax.name
]
LOSSY = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLSNearLossless, uid.JPEG2000)
NATIVE = (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian)

# --- What is read of a DICOM file, and what of it a derived file may hold ---

NUMBERS = (  # copied as they are: nobody's name fits into a number
    *("SamplesPerPixel", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit"),
    *("PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit", "RescaleSlope"),
    *("RescaleIntercept", "WindowCenter", "WindowWidth", "PixelSpacing", "ImagerPixelSpacing"),
    *("NominalScannedPixelSpacing", "EstimatedRadiographicMagnificationFactor"),
    *("LossyImageCompressionRatio", "PixelIntensityRelationshipSign"),
)
WORDS = {  # copied when every value is one of these, so that no text comes through
    "Modality": MODALITIES,
    "PresentationIntentType": ("FOR PRESENTATION",),
    "PhotometricInterpretation": ("MONOCHROME1", "MONOCHROME2"),
    "VOILUTFunction": ("LINEAR", "LINEAR_EXACT", "SIGMOID"),
    "PresentationLUTShape": ("IDENTITY", "INVERSE"),
    "RescaleType": ("US", "OD"),
    "BodyPartExamined": ("BREAST",),
    "OrganExposed": ("BREAST",),
    "Laterality": ("L", "R", "B"),
    "ImageLaterality": ("L", "R", "B"),
    "ViewPosition": ("CC", "MLO", "ML", "LM", "LMO", "SIO", "FB", "XCC", "XCCL", "XCCM", "AT"),
    "PatientOrientation": ("A", "P", "L", "R", "H", "F", "FL", "FR", "HL", "HR", "AF", "PF"),
    "BurnedInAnnotation": ("YES", "NO"),
    "LossyImageCompression": ("00", "01"),
    "LossyImageCompressionMethod": ("ISO_10918_1", "ISO_14495_1", "ISO_15444_1"),
    "PixelIntensityRelationship": ("LIN", "LOG"),
    "PositionerType": ("MAMMOGRAPHIC", "NONE"),
    "DetectorType": ("DIRECT", "SCINTILLATOR", "STORAGE", "FILM"),
    "BreastImplantPresent": ("YES", "NO"),
    "ConversionType": ("DV", "DI", "DF", "WSD", "SD", "SI", "DRW", "SYN"),
}
CODES = {  # copied when pydicom knows the code, with pydicom's meaning in place of the file's
    "AnatomicRegionSequence": (codes.SCT.Breast,),
    "ViewCodeSequence": tuple(getattr(codes.cid4014, name) for name in codes.cid4014.dir()),
    "ViewModifierCodeSequence": tuple(getattr(codes.cid4015, name) for name in codes.cid4015.dir()),
}
LUTS = ("ModalityLUTSequence", "VOILUTSequence")
# All that is ever read: no name, no identifier but two UIDs (which only leave hashed), no date, no
# free text enters the program.
KEYWORDS = (
    *(*NUMBERS, *WORDS, *CODES, *LUTS, "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID"),
    *("ImageType", "SpecimenDescriptionSequence", "NumberOfFrames", "PlanarConfiguration"),
    "QualityControlImage",
)

# They log tracebacks when decoding fails; NotUsable says it in one line.
for name in ("pydicom", "pylibjpeg", "openjpeg", "PIL"):
    logging.getLogger(name).setLevel(logging.CRITICAL + 1)
Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow then warns above it, which read_mammogram turns around


class NotUsable(ValueError):
    """Why a file is left out, without its name: the `reason` of excluded.csv."""


@dataclass(eq=False)
class Mammogram:
    """`windowing` and `spacing_source` say in words what was used."""

    path: Path
    stored: np.ndarray  # (H, W) uint8, uint16, int8 or int16
    display: np.ndarray = field(repr=False)  # (H, W) float32 in [-1, 1], air low
    spacing_mm: tuple[float, float] | None
    spacing_source: str
    windowing: str
    ds: Dataset | None  # KEYWORDS and file_meta only; None when the file is no DICOM
    table: "DisplayTable" = field(repr=False)

    @functools.cached_property
    def image_uid(self) -> str:
        """16 hex digits over stored pixels and shape: the same image under two names is found."""
        digest = hashlib.sha256(repr((self.stored.shape, self.stored.dtype.str)).encode())
        digest.update(np.ascontiguousarray(self.stored))
        return digest.hexdigest()[:16]

    def restore(self, display: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
        """New stored integers for new display values: the inverse of the display pipeline.

        A pixel outside `where` (bool (H, W), e.g. weights > 0), or whose display value is the one
        it had, keeps its stored integer bit for bit. Of several integers with the nearest display
        value a pixel takes the one closest to its own.
        Raises ValueError where the pipeline has no inverse (a LUT that rises and falls).
        """
        assert display.shape == self.stored.shape and np.isfinite(display).all()
        changed = display != self.display
        if where is not None:
            changed &= where
        restored = self.stored.copy()
        try:
            restored[changed] = self.table.invert(display[changed], self.stored[changed])
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}; write the display image instead") from None
        return restored


def read_mammogram(path: Path) -> Mammogram:
    """A 2-D mammogram for presentation from DICOM (told by content), PNG, PGM, TIFF or JPEG.

    Raises NotUsable with one clear reason for any other or damaged file, OSError when the file
    cannot be opened.
    """
    path = Path(path)
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        head = file.read(132)
        file.seek(0)
        if head[128:] == b"DICM":
            return _read_dicom(path, file)
        return _read_raster(path, file)


@functools.cache
def image_size(path: str) -> tuple[int, int] | None:
    """(rows, columns) by the header alone; None when read_mammogram would not read it either."""
    with contextlib.suppress(NotUsable, OSError), open(path, "rb") as file:
        if file.read(132)[128:] == b"DICM":
            file.seek(0)
            ds = read_header(path, file, ("Rows", "Columns"))
            return _integer(ds, "Rows"), _integer(ds, "Columns")
        with _foreign_code("image is damaged"), Image.open(file, formats=RASTERS) as image:
            return image.height, image.width


@contextlib.contextmanager
def _foreign_code(what: str, quote: bool = True) -> Iterator[None]:
    """Whatever pydicom, Pillow or a decoder does with damaged data ends as NotUsable, in one line.

    They raise almost anything, the RLE decoder (Rust) even a BaseException, and some print to file
    descriptor 2 behind Python's back, which therefore leads nowhere meanwhile. Their words are not
    quoted where these may hold words of the file, a patient's name for example.
    """
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    except (NotUsable, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        text = ": " + " ".join(str(error).split())[:200] if quote else ""
        raise NotUsable(f"{what} ({type(error).__name__}{text})") from None
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


# --- DICOM: header, exclusions ---


def _read_dicom(path: Path, file) -> Mammogram:
    ds = read_header(path, file)
    _exclude(ds)
    stored = _read_pixels(ds, file)
    table = dicom_table(ds)
    return Mammogram(path, stored, table.apply(stored), *_spacing(ds), table.text, ds, table)


def read_header(path: Path, file: BinaryIO, keywords: tuple[str, ...] = KEYWORDS) -> Dataset:
    """The named attributes, each decoded; leaves `file` at the PixelData element."""
    with _foreign_code("DICOM file meta information is damaged", quote=False):
        meta = pydicom.filereader.read_file_meta_info(path)
        syntax = uid.UID(meta.get("TransferSyntaxUID") or "")
    if syntax not in NATIVE and syntax not in DECODERS:  # deflated: inflating could fill the memory
        raise NotUsable(
            f"TransferSyntaxUID is {_shown(syntax)}; expected a plain or a JPEG or RLE syntax"
        )
    with _foreign_code("DICOM header is damaged", quote=False):
        ds = pydicom.dcmread(
            file, stop_before_pixels=True, defer_size="1 MB", specific_tags=list(keywords)
        )
        for element in ds.iterall():  # pydicom decodes an element when it is asked for
            element.value  # noqa: B018
            if element.keyword.endswith("Sequence") and element.VR != "SQ":
                raise NotUsable(f"{element.keyword} is not a sequence")
    return ds


def _shown(value: object) -> str:
    """An attribute's value in a reason. A damaged one may hold anything, names too: not shown."""
    if value is None or value == "":
        return "absent"
    if isinstance(value, uid.UID):
        return value.name if value.type else "unknown"
    texts = [value] if isinstance(value, str | int) else list(value)
    if all(re.fullmatch(r"[A-Z0-9_ ]{0,16}", str(text)) for text in texts):  # VR CS
        return " ".join(map(repr, texts))
    return "not a valid value"


def _integer(ds: Dataset, keyword: str, default: int | None = None) -> int:
    value = ds.get(keyword)
    if value is None or value == "":
        value = default
    if value is None:
        raise NotUsable(f"{keyword} is absent")
    try:
        return int(value)
    except (TypeError, ValueError):
        raise NotUsable(f"{keyword} is not one number") from None


def _exclude(ds: Dataset) -> None:
    """Raise NotUsable, naming the attribute that decides, unless this is a 2-D mammogram."""

    def need(ok: bool, keyword: str, expected: str) -> None:
        if not ok:
            raise NotUsable(f"{keyword} is {_shown(ds.get(keyword))}; expected {expected}")

    sop_class = uid.UID(str(ds.get("SOPClassUID") or ""))
    processing = str(ds.get("PresentationIntentType") or "").upper() == "FOR PROCESSING"
    need(not processing, "PresentationIntentType", "FOR PRESENTATION")
    if sop_class in FOR_PROCESSING or "Tomosynthesis" in sop_class.name:
        found = _shown(sop_class)
        raise NotUsable(f"SOPClassUID is {found}; expected a 2-D image for presentation")
    frames = _integer(ds, "NumberOfFrames", 1)
    if frames > 1:
        raise NotUsable(f"NumberOfFrames is {frames}; expected 1 (tomosynthesis or a loop)")
    image_type = [str(v).upper() for v in _values(ds, "ImageType")]
    sliced = SLICED.intersection(image_type) and "GENERATED_2D" not in image_type
    need(not sliced, "ImageType", "a 2-D image, not tomosynthesis")
    test_object = str(ds.get("QualityControlImage") or "").upper() == "YES"
    need(not test_object, "QualityControlImage", "NO, a patient's image")
    need(str(ds.get("Modality") or "") in MODALITIES, "Modality", f"one of {', '.join(MODALITIES)}")
    body_part = str(ds.get("BodyPartExamined") or "BREAST").upper()
    need("BREAST" in body_part and "SPECIMEN" not in body_part, "BodyPartExamined", "BREAST")
    need(not ds.get("SpecimenDescriptionSequence"), "SpecimenDescriptionSequence", "no specimen")
    for keyword in ("AnatomicRegionSequence", "ViewCodeSequence"):
        for item in ds.get(keyword) or ():
            if str(item.get("CodeValue", "")) in SPECIMEN_CODES:
                raise NotUsable(f"{keyword} is tissue specimen from breast; expected a mammogram")
    if "Rows" not in ds:
        raise NotUsable(f"no image: Rows is absent (SOP class is {_shown(sop_class)})")
    monochrome = ds.get("PhotometricInterpretation") in ("MONOCHROME1", "MONOCHROME2")
    need(monochrome, "PhotometricInterpretation", "MONOCHROME1 or MONOCHROME2")
    need(_integer(ds, "SamplesPerPixel", 1) == 1, "SamplesPerPixel", "1")
    rows, columns = _integer(ds, "Rows"), _integer(ds, "Columns")
    _check_size(rows, columns)
    allocated, stored = _integer(ds, "BitsAllocated"), _integer(ds, "BitsStored")
    need(allocated in (8, 16), "BitsAllocated", "8 or 16")
    need(1 < stored <= allocated, "BitsStored", f"2 to {allocated}")
    need(_integer(ds, "HighBit", stored - 1) == stored - 1, "HighBit", f"{stored - 1}")
    need(_integer(ds, "PixelRepresentation") in (0, 1), "PixelRepresentation", "0 or 1")


def _check_size(rows: int, columns: int) -> None:
    if rows < 1 or columns < 1:
        raise NotUsable(f"size is {rows} x {columns} pixels; expected at least 1 x 1")
    if rows * columns > MAX_PIXELS:
        raise NotUsable(
            f"header claims {rows} x {columns} pixels, more than {MAX_PIXELS // 10**6} megapixels"
        )


def _check_bytes(file, rows: int, columns: int) -> None:
    """Raise NotUsable for a small file that claims a huge image, which decoders would make up."""
    size = os.fstat(file.fileno()).st_size
    if rows * columns > max(PLAUSIBLE_PIXELS, PIXELS_A_BYTE * size):
        raise NotUsable(f"header claims {rows} x {columns} pixels in a file of {size} bytes")


def _values(ds: Dataset, keyword: str) -> list:
    """The values of an element of any multiplicity, none when it is absent or empty."""
    value = ds.get(keyword)
    if value is None or value == "":
        return []
    return [value] if isinstance(value, str | bytes | int | float) else list(value)


def _floats(ds: Dataset, keyword: str) -> list[float]:
    """The numbers of an element, none when one of them is no finite number."""
    try:
        values = [float(v) for v in _values(ds, keyword)]
    except (TypeError, ValueError):
        return []
    return values if all(map(math.isfinite, values)) else []


def _spacing(ds: Dataset) -> tuple[tuple[float, float] | None, str]:
    """(row, col) spacing in the breast and its source; (None, "") rather than a guess.

    PixelSpacing is calibrated where a projection image has it; ImagerPixelSpacing is that of the
    detector, larger by the magnification (PS3.3 10.7.1.3).
    """
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        spacing = _floats(ds, keyword)
        if len(spacing) != 2 or not all(1e-3 < v < 10 for v in spacing):
            continue
        if max(spacing[0] * ds.Rows, spacing[1] * ds.Columns) > WIDEST_MM:
            continue
        factor = _floats(ds, "EstimatedRadiographicMagnificationFactor")
        if keyword == "ImagerPixelSpacing" and len(factor) == 1 and 1 < factor[0] < 10:
            spacing = [v / factor[0] for v in spacing]
            keyword += f" / magnification {factor[0]:g}"
        return (spacing[0], spacing[1]), keyword
    return None, ""


# --- DICOM: pixels ---


def _read_pixels(ds: Dataset, file) -> np.ndarray:
    """(rows, columns) integers as stored, in native byte order; `file` stands at PixelData."""
    syntax = ds.file_meta.TransferSyntaxUID
    rows, columns, bits = ds.Rows, ds.Columns, ds.BitsAllocated
    order = "<" if syntax.is_little_endian else ">"
    element = file.read(8)
    if len(element) < 8:
        raise NotUsable("PixelData is absent")
    group, number, length = struct.unpack(f"{order}HHL", element)
    if (group, number) != (0x7FE0, 0x0010):
        raise NotUsable("PixelData is absent (the file holds floating point pixels)")
    vr = "OW"
    if element[4:6] in (b"OB", b"OW", b"UN"):  # whatever the syntax says; a length is even
        vr = element[4:6].decode()
        length = int.from_bytes(file.read(4), "little" if order == "<" else "big")
    if syntax in NATIVE:
        found = min(length, os.fstat(file.fileno()).st_size - file.tell())
        expected = rows * columns * bits // 8
        if found < expected:
            raise NotUsable(f"PixelData is cut off: {found} bytes; expected {expected}")
        plugin, package = "", "pydicom"
    else:
        start = file.tell()
        _check_bytes(file, rows, columns)
        if "2000" in syntax.name and rows * columns > MAX_PIXELS // 2:  # 12 bytes a pixel
            raise NotUsable(f"JPEG 2000 of more than {MAX_PIXELS // 2_000_000} megapixels")
        _check_whole(file, syntax, order)
        file.seek(start)
        shape = _codestream_shape(file.read(1 << 20), syntax)
        file.seek(start)
        if shape and shape != (rows, columns):  # a decoder would make room for what it finds there
            raise NotUsable(
                f"PixelData is an image of {shape[0]} x {shape[1]} pixels; "
                f"Rows and Columns say {rows} x {columns}"
            )
        plugin, package = DECODERS[syntax]
        if plugin not in get_decoder(syntax).available_plugins:
            raise NotUsable(
                f"TransferSyntaxUID is {syntax.name}; to read it: pip install {package}"
            )
    options = as_pixel_options(
        ds, transfer_syntax_uid=syntax, pixel_keyword="PixelData", pixel_vr=vr, number_of_frames=1
    )
    with _foreign_code(f"PixelData could not be decoded as {syntax.name} by {package}"):
        stored, _ = get_decoder(syntax).as_array(
            file, index=0, raw=True, decoding_plugin=plugin, **options
        )
    kind = "ui"[ds.PixelRepresentation]
    stored = np.ascontiguousarray(stored, dtype=f"={kind}{bits // 8}")
    assert stored.shape == (rows, columns)
    return stored


def _check_whole(file, syntax: uid.UID, order: str) -> None:
    """Raise NotUsable for compressed data that end early: of the decoders some hang, some invent.

    PixelData is a sequence of items, a table and the stream's fragments (PS3.5 A.4).
    """
    size, last = os.fstat(file.fileno()).st_size, b""
    while len(head := file.read(8)) == 8:
        group, number, length = struct.unpack(f"{order}HHL", head)
        if (group, number) == (0xFFFE, 0xE0DD):  # end of the sequence
            if syntax not in MARKED or b"\xff\xd9" in last:  # end of the image
                return
            break
        if (group, number) != (0xFFFE, 0xE000) or file.tell() + length > size:
            break
        file.seek(max(length - 16, 0), os.SEEK_CUR)
        last = file.read(min(length, 16))
    raise NotUsable("PixelData is cut off or its fragments are damaged")


def _codestream_shape(head: bytes, syntax: uid.UID) -> tuple[int, int] | None:
    """(rows, columns) that a JPEG, JPEG-LS or JPEG 2000 stream claims; None for RLE."""
    if syntax == uid.RLELossless:
        return None
    try:
        if syntax in (uid.JPEG2000, uid.JPEG2000Lossless):
            at = head.index(b"\xff\x4f\xff\x51") + 8  # SOC and SIZ, ISO 15444-1 A.5.1
            x1, y1, x0, y0 = struct.unpack(">4L", head[at : at + 16])
            return y1 - y0, x1 - x0
        at = head.index(b"\xff\xd8\xff") + 2  # SOI, then segments up to SOF, ISO 10918-1 B.2.2
        while not (0xC0 <= head[at + 1] <= 0xCF or head[at + 1] == 0xF7) or head[at + 1] == 0xC4:
            at += 1 if head[at + 1] == 0xFF else 2 + int.from_bytes(head[at + 2 : at + 4], "big")
        rows, columns = struct.unpack(">2H", head[at + 5 : at + 9])
        return rows, columns
    except (ValueError, IndexError, struct.error):
        raise NotUsable(f"PixelData holds no {syntax.name} image") from None


# --- Display pipeline, PS3.3 C.11: one table over all stored values ---


@dataclass(frozen=True)
class DisplayTable:
    """The whole display pipeline as one look-up, exact and fast for integers of up to 16 bits."""

    values: np.ndarray  # stored values that can occur and are not padding, ascending
    display: np.ndarray  # float32 by bit pattern of the stored value
    text: str

    def apply(self, stored: np.ndarray) -> np.ndarray:
        """(H, W) integers -> (H, W) float32 in [-1, 1]."""
        pattern = _unsigned(stored)
        display = np.empty(stored.shape, np.float32)
        for row in range(0, len(stored), 64):  # numpy widens indices to 8 bytes: not all at once
            np.take(self.display, pattern[row : row + 64], out=display[row : row + 64], mode="clip")
        return display

    def invert(self, display: np.ndarray, stored: np.ndarray) -> np.ndarray:
        """The stored values nearest to `display`; among equals the ones nearest to `stored`."""
        values, levels = self.values, self.display[_unsigned(self.values)]
        if levels[0] > levels[-1]:
            values, levels = values[::-1], levels[::-1]
        if levels[0] == levels[-1] or (np.diff(levels) < 0).any():
            raise ValueError(f"the display pipeline ({self.text}) cannot be inverted")
        levels, first = np.unique(levels, return_index=True)
        last = np.append(first[1:], len(values)) - 1
        nearest = np.searchsorted((levels[1:] + levels[:-1].astype(np.float64)) / 2, display)
        ends = values[first[nearest]], values[last[nearest]]
        return np.clip(stored, np.minimum(*ends), np.maximum(*ends))


def _unsigned(stored: np.ndarray) -> np.ndarray:
    return stored.view(f"u{stored.dtype.itemsize}")


def dicom_table(ds: Dataset) -> DisplayTable:
    """Modality LUT -> VOI LUT or window -> inversion -> [-1, 1] of a header that passed _exclude.

    Fixed bounds (Q19): the range of the VOI LUT or window, else that of the bit depth.
    Raises NotUsable when a LUT or window is not valid.
    """
    signed, bits = ds.PixelRepresentation, ds.BitsStored
    text = []
    dtype = np.dtype(f"{'ui'[signed]}{ds.BitsAllocated // 8}")
    pattern = np.arange(2**ds.BitsAllocated, dtype=f"u{dtype.itemsize}").view(dtype)
    x = pattern.astype(np.float64)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    occurs = (x >= low) & (x <= high)

    if ds.get("ModalityLUTSequence"):
        x, high = _apply_lut(ds, "ModalityLUTSequence", x, low < 0)
        low = 0
        text.append("modality LUT")
    elif "RescaleSlope" in ds or "RescaleIntercept" in ds:
        slope, intercept = _number(ds, "RescaleSlope", 1.0), _number(ds, "RescaleIntercept", 0.0)
        if slope == 0:
            raise NotUsable("RescaleSlope is 0")
        x = x * slope + intercept
        low, high = sorted((low * slope + intercept, high * slope + intercept))
        if (slope, intercept) != (1, 0):
            text.append(f"rescale {slope:g} {intercept:g}")

    centers, widths = _values(ds, "WindowCenter"), _values(ds, "WindowWidth")
    if ds.get("VOILUTSequence"):
        x, top = _apply_lut(ds, "VOILUTSequence", x, low < 0)
        y = x * (2 / top) - 1
        text.append(f"VOI LUT 1 of {len(ds.VOILUTSequence)}")
    elif centers and widths:
        center, width = _number(ds, "WindowCenter"), _number(ds, "WindowWidth")
        function = str(ds.get("VOILUTFunction") or "LINEAR").upper()
        y = window(x, center, width, function)
        text.append(f"window {center:g} {width:g} {function}, 1 of {len(centers)}")
    else:
        y = (x - low) * (2 / (high - low)) - 1
        text.append(f"no window, bit depth {low:g} to {high:g}")

    shape = str(ds.get("PresentationLUTShape") or "").upper()
    if ds.PhotometricInterpretation == "MONOCHROME1" or shape == "INVERSE":
        y = -y  # [-1, 1] is the window: inverting here is inverting about it, and only here
        text.append("inverted")
    padding = _floats(ds, "PixelPaddingValue")
    if padding:
        ends = [padding[0], (_floats(ds, "PixelPaddingRangeLimit") or padding)[0]]
        ends = [int(v) & 0xFFFF for v in ends]  # of either sign, whatever its VR says
        ends = [v - 2**16 if signed and v >= 2**15 else v for v in ends]
        padded = (pattern >= min(ends)) & (pattern <= max(ends))
        y = np.where(padded, -1, y)
        occurs &= ~padded
        text.append(f"padding {min(ends)} to {max(ends)} is air")
    display = np.clip(y, -1, 1).astype(np.float32)
    return DisplayTable(np.sort(pattern[occurs]), display, "; ".join(text))


def window(x: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """C.11.2.1.2 and C.11.2.1.3 with the output range [-1, 1]."""
    if function == "LINEAR" and width >= 1:
        center, width = center - 0.5, width - 1
        if width == 0:
            return np.where(x <= center, -1.0, 1.0)
    elif function not in ("LINEAR_EXACT", "SIGMOID") or width <= 0:
        raise NotUsable(
            f"WindowWidth is {width:g} with VOILUTFunction {_shown(function)}; expected at least 1 "
            "with LINEAR or more than 0 with LINEAR_EXACT or SIGMOID"
        )
    y = 2 * (x - center) / width
    # tanh(v / 2) = 2 / (1 + exp(-v)) - 1, without its overflow
    return np.tanh(y) if function == "SIGMOID" else np.clip(y, -1, 1)


def _number(ds: Dataset, keyword: str, default: float | None = None) -> float:
    """The first value of a decimal string. Raises NotUsable when it is not a finite number."""
    value = (_values(ds, keyword) or [default])[0]
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise NotUsable(f"{keyword} is not a finite number")
    return number


def _apply_lut(ds: Dataset, keyword: str, x: np.ndarray, signed: bool) -> tuple[np.ndarray, int]:
    """x through the first LUT of the sequence (C.11.1.1, C.11.2.1.1), and the LUT's top value."""
    item = ds[keyword].value[0]
    descriptor = [int(v) for v in _floats(item, "LUTDescriptor")]
    if len(descriptor) != 3 or item.get("LUTData") is None:
        raise NotUsable(f"{keyword} has no complete LUT")
    count = (descriptor[0] & 0xFFFF) or 65536  # 65536 does not fit its 16 bits
    first, bits = descriptor[1] & 0xFFFF, descriptor[2]
    if signed and first >= 2**15:  # two's complement or not follows from x, whatever the VR says
        first -= 2**16
    if not 1 < bits <= 16:
        raise NotUsable(f"{keyword} says {bits} bits an entry; expected 8 or 10 to 16")
    words = _lut_words(ds, item)
    if bits <= 8 and len(words) == (count + 1) // 2 < count:  # two entries a word, low byte first
        words = np.frombuffer(_little_endian(words), np.uint8)
    top = 2**bits - 1
    if len(words) < count or words[:count].max() > top:
        raise NotUsable(f"{keyword}: its data do not fit its descriptor {descriptor}")
    at = np.clip(np.rint(x) - first, 0, count - 1).astype(np.int64)
    return words[at].astype(np.float64), top


def _lut_words(ds: Dataset, item: Dataset) -> np.ndarray:
    """LUTData, which is bytes or numbers, as 16-bit words."""
    data = item.LUTData
    if not isinstance(data, bytes):
        return np.array(_values(item, "LUTData"), np.uint16)
    order = "<" if ds.file_meta.TransferSyntaxUID.is_little_endian else ">"
    return np.frombuffer(data[: len(data) // 2 * 2], f"{order}u2").astype(np.uint16)


# --- Other images ---


def _read_raster(path: Path, file) -> Mammogram:
    """8- or 16-bit greyscale PNG, PGM, TIFF or JPEG; the bounds are those of the bit depth."""
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    with _foreign_code("image is damaged"):
        try:
            image = Image.open(file, formats=RASTERS)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise NotUsable(f"header claims more than {MAX_PIXELS // 10**6} megapixels") from None
        except Image.UnidentifiedImageError:
            raise NotUsable(
                "neither DICOM nor PNG, PGM, TIFF or JPEG (DICOM files have DICM at byte 128)"
            ) from None
    _check_size(image.height, image.width)
    _check_bytes(file, image.height, image.width)
    wide = image.mode in ("I;16", "I;16L", "I;16B") or (image.format, image.mode) == ("PPM", "I")
    if image.mode != "L" and not wide:
        raise NotUsable(f"{image.format} of mode {image.mode}; expected 8- or 16-bit greyscale")
    with _foreign_code(f"{image.format} is damaged"):
        frames = getattr(image, "n_frames", 1)
        white_is_zero = image.format == "TIFF" and image.tag_v2.get(262) == 0
        stored = np.ascontiguousarray(image, dtype=np.uint16 if wide else np.uint8)
    if frames > 1:
        raise NotUsable(f"{image.format} holds {frames} images; expected 1")
    values = np.arange(2 ** (8 * stored.itemsize), dtype=stored.dtype)
    display = np.linspace(-1, 1, len(values))
    text = f"no window, bit depth 0 to {values[-1]}"
    if white_is_zero and wide:  # Pillow has inverted 8-bit ones already
        display, text = -display, f"{text}; inverted"
    table = DisplayTable(values, display.astype(np.float32), text)
    return Mammogram(path, stored, table.apply(stored), None, "", text, None, table)


# --- Writing: a derived DICOM file, a 16-bit PNG, COCO annotations (F7) ---

EMPTY = (  # required, may be empty, and nothing of the source is copied into them
    *("StudyDate", "StudyTime", "ContentDate", "ContentTime", "AccessionNumber", "StudyID"),
    *("ReferringPhysicianName", "PatientBirthDate", "PatientSex", "Manufacturer"),
)


def write_derived_dicom(
    source: Mammogram, stored: np.ndarray, path: Path | BinaryIO, derivation: str, seed: str
) -> None:
    """A new DICOM file with `stored` in place of the source's pixels, marked as derived.

    Built from NUMBERS, WORDS, CODES and LUTs of the source and nothing else; its UIDs only appear
    hashed. New UIDs follow from `seed` and the source: the same call writes the same bytes.
    """
    assert source.ds is not None
    assert (stored.shape, stored.dtype) == (source.stored.shape, source.stored.dtype)
    ds = FileDataset("", {}, preamble=bytes(128), file_meta=FileMetaDataset())
    for keyword in (*NUMBERS, *WORDS):
        values = _values(source.ds, keyword)
        if keyword in WORDS and not all(v in WORDS[keyword] for v in values):
            values = []
        if keyword in NUMBERS and not _floats(source.ds, keyword):
            values = []  # pydicom leaves a damaged number as text
        if keyword in source.ds:
            setattr(ds, keyword, values)  # empty stays empty: some must be there
    for keyword in CODES:
        _copy_codes(source.ds, ds, keyword)
    for keyword in LUTS:
        if items := source.ds.get(keyword):
            setattr(ds, keyword, [_copy_lut(source.ds, item) for item in items])
    for item in ds.get("ModalityLUTSequence", ()):
        item.ModalityLUTType = "US"  # unspecified

    def new_uid(*what: object) -> str:
        return uid.generate_uid(entropy_srcs=["derived", *map(str, what)])

    origin = source.ds.get("SOPInstanceUID") or source.image_uid
    study = source.ds.get("StudyInstanceUID") or origin
    reference = Dataset()
    kind = uid.UID(source.ds.get("SOPClassUID") or "")
    ds.SOPClassUID = kind if kind.type == "SOP Class" else uid.SecondaryCaptureImageStorage
    reference.ReferencedSOPClassUID = ds.SOPClassUID
    reference.ReferencedSOPInstanceUID = new_uid("source", origin)
    purpose = codes.DCM.SourceImageForImageProcessingOperation
    reference.PurposeOfReferenceCodeSequence = [_code_item(purpose)]
    ds.SourceImageSequence = [reference]
    ds.StudyInstanceUID = new_uid("study", study)
    ds.SeriesInstanceUID = new_uid("series", seed, study)
    ds.SOPInstanceUID = new_uid("image", seed, derivation, origin, source.image_uid)
    primary = "PRIMARY" in _values(source.ds, "ImageType")[1:2]
    ds.ImageType = ["DERIVED", "PRIMARY" if primary else "SECONDARY"]
    ds.DerivationDescription = derivation
    ds.DerivationCodeSequence = [_code_item(codes.DCM.PixelByPixelAddition)]
    for keyword in EMPTY:
        setattr(ds, keyword, None)
    if ds.SOPClassUID != uid.SecondaryCaptureImageStorage:
        ds.AcquisitionContextSequence = []  # as EMPTY
    if "LossyImageCompression" not in ds and source.ds.file_meta.TransferSyntaxUID in LOSSY:
        ds.LossyImageCompression = "01"  # once lossy, always lossy
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.PatientID = f"SYNTHETIC-{ds.StudyInstanceUID[-12:]}"
    ds.PatientName = f"{ds.PatientID}^"
    ds.PatientIdentityRemoved = "YES"
    ds.DeidentificationMethod = "New file; only what display needs was copied"
    ds.SeriesDescription = "Synthetic, research only"
    ds.SeriesNumber, ds.InstanceNumber = 1, 1
    ds.add_new("PixelData", "OW", _little_endian(stored))
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    ds.save_as(path, enforce_file_format=True)


def _little_endian(array: np.ndarray) -> bytes:
    """The bytes of an OW element, of even length."""
    data = array.astype(array.dtype.newbyteorder("<")).tobytes()
    return data + bytes(len(data) % 2)


def _code_item(code: Code) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator = code.value, code.scheme_designator
    item.CodeMeaning = code.meaning
    return item


def _copy_codes(source: Dataset, target: Dataset, keyword: str) -> None:
    """CODES[keyword] found in the source's sequence, and their modifiers."""
    items = []
    for item in source.get(keyword) or ():
        found = Code(str(item.get("CodeValue")), str(item.get("CodingSchemeDesignator")), "")
        for code in CODES[keyword]:
            if code == found:  # SNOMED's older codes (SRT) equal the newer ones (SCT)
                items.append(_code_item(code))
                _copy_codes(item, items[-1], "ViewModifierCodeSequence")
    if keyword in source:
        setattr(target, keyword, items)


def _copy_lut(source: Dataset, item: Dataset) -> Dataset:
    copy = Dataset()
    copy.add(item["LUTDescriptor"])
    copy.add_new("LUTData", "OW", _little_endian(_lut_words(source, item)))
    return copy


def write_png16(path: Path | BinaryIO, display: np.ndarray) -> None:
    """(H, W) uint16 as a PNG."""
    assert display.dtype == np.uint16
    Image.fromarray(display).save(path, format="PNG")


def rle(mask: np.ndarray) -> dict:
    """A bool mask as COCO's uncompressed run lengths: down the columns, zeros first."""
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs}


def coco(images: list[dict], annotations: list[dict]) -> dict:
    """COCO JSON of images (id, file_name, height, width) and their annotations.

    annotations: image_id, category (its name), bbox (row0, col0, row1, col1), segmentation (`rle`)
    and whatever else; ids, [x, y, w, h] and areas are filled in here.
    """
    names = sorted({annotation["category"] for annotation in annotations})
    filled = []
    for number, annotation in enumerate(annotations, start=1):
        row0, col0, row1, col1 = annotation["bbox"]
        box = [col0, row0, col1 - col0, row1 - row0]
        area = sum(annotation["segmentation"]["counts"][1::2])
        label = {"id": number, "category_id": names.index(annotation["category"]) + 1}
        filled.append(annotation | label | {"bbox": box, "area": area, "iscrowd": 0})
    return {
        "info": {"description": "Synthetic lesions in mammograms; research only"},
        "images": images,
        "annotations": filled,
        "categories": [{"id": k, "name": name} for k, name in enumerate(names, start=1)],
    }
