"""One mammogram in: DICOM and other images -> display values and back (Q19, Q39).

`stored` are the integers of the file, `display` is float32 in [-1, 1] with air low: modality LUT ->
VOI LUT or window -> inversion -> a fixed linear map, PS3.3 C.11 (C.x and CID n: DICOM standard).
"""

import contextlib
import functools
import logging
import math
import os
import re
import struct
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pydicom
from PIL import Image
from pydicom import Dataset, encaps, uid
from pydicom.misc import is_dicom
from pydicom.pixels import pixel_array
from pydicom.sr.codedict import codes

from support.files import sha256

# A header that claims more is refused before anything is decoded, which takes up to 12 bytes a
# pixel; film of 24 x 30 cm at 25 micrometres has 115 megapixels.
MAX_PIXELS = 120_000_000
# Above 50 megapixels (film at 43 micrometres has 40) a file must hold a byte for 512 pixels, a bit
# for each 8 x 8 block: a mammogram takes tens of times more, what is forged or flat takes less.
PLAUSIBLE_PIXELS, PIXELS_A_BYTE = 50_000_000, 512
RASTERS = ("PNG", "PPM", "TIFF", "JPEG")
WIDEST_MM = 1000  # no detector or film is a metre long: converters write 1 where they know none
MODALITIES = ("MG", "CR", "DX", "RG", "SC")  # mammography and what film digitisers write
# Values of ImageType (C.8.11.7.1.4, C.8.21.6.1.1, vendors' words) of a slice or projection, unless
# a 2-D image was made of them, and of other images that are no plain mammograms: with a needle, one
# of a stereo pair, made of or belonging to two energies unless it is the low one, of a screen.
SLICED = re.compile(r"TOMO(?!_?2D)|DBT|SLICE|SLAB|VOLUME|MIP\b|MAXIMUM|MEAN\b")
OTHER = re.compile(
    r"STEREO|FIRE|BIOPSY|NEEDLE|POST_?MARKER|SCOUT|LOCALIZER|SPECIMEN|SUBTRACT|ADDITION\b|RECOMB|"
    r"HIGH_?ENERGY|IODINE|(CONTRAST|CEDM|CESM)(?!.*LOW_?ENERGY)|SCREEN_?(SAVE|SHOT|CAPTURE)|CAD\b"
)
# Labels and hot pixels may lie above the depth that an image uses: so many of its pixels, and next
# to none of them up to twice as high, where values follow when an image is only dim.
FEW, NEXT_TO_NONE = 0.05, 1e-4
MAGNIFIED, MAGNIFIED_CODES = 1.2, ("399163009", "R-102D6")  # at least; view modifier, CID 4015
SPECIMEN_CODES = ("127457009", "G-8310")  # tissue specimen from breast, CID 4014, SCT and SRT

LOSSY = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLSNearLossless, uid.JPEG2000)
NATIVE = (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian)
# Transfer syntax -> (plug-in of pydicom, package that it needs). Of several plug-ins we name the
# one that refuses damaged data.
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

# --- What is read of a DICOM file, and what of it a derived file may hold ---

NUMBERS = (  # copied as they are: nobody's name fits into a number
    *("SamplesPerPixel", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit"),
    *("PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit", "RescaleSlope"),
    *("RescaleIntercept", "WindowCenter", "WindowWidth", "PixelSpacing", "ImagerPixelSpacing"),
    *("NominalScannedPixelSpacing", "EstimatedRadiographicMagnificationFactor"),
    *("DistanceSourceToDetector", "DistanceSourceToPatient"),
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
    *("QualityControlImage", "ContrastBolusAgentSequence"),
)

# They log tracebacks when decoding fails; NotUsable says it in one line.
for name in ("pydicom", "pylibjpeg", "openjpeg", "PIL"):
    logging.getLogger(name).setLevel(logging.CRITICAL + 1)


class NotUsable(ValueError):
    """Why a file is left out, without its name: the `reason` of excluded.csv."""


@dataclass(eq=False)
class Mammogram:
    """`spacing_source` and the text of the table say in words what was used."""

    stored: np.ndarray  # (H, W) uint8, uint16, int8 or int16
    display: np.ndarray = field(repr=False)  # (H, W) float32 in [-1, 1], air low
    spacing_mm: tuple[float, float] | None
    spacing_source: str
    ds: Dataset | None  # KEYWORDS and file_meta only; None when the file is no DICOM
    table: "DisplayTable" = field(repr=False)

    @functools.cached_property
    def image_uid(self) -> str:
        """16 hex digits over stored pixels and shape: the same image under two names is found."""
        shape = repr((self.stored.shape, self.stored.dtype.str))
        return sha256(shape.encode(), self.stored)[:16]

    @property
    def used_bits(self) -> tuple[int, int] | None:
        """(12, 16) when the values use 12 bits of 16, labels and hot pixels aside.

        None where a window or LUT tells what to map, for signed values, and for a black image.
        """
        step = 1 + max(self.stored.shape) // 512
        sample = self.stored[::step, ::step]
        sample = sample[np.isin(sample, self.table.values)]  # no padding
        counts = np.bincount(np.frexp(sample.astype(float))[1].clip(0), minlength=18)
        more = counts[::-1].cumsum()[::-1]  # pixels that need so many bits or more
        enough = (more[1:] <= FEW * sample.size) & (counts[1:] <= NEXT_TO_NONE * sample.size)
        used = int(enough.argmax())
        return (used, self.table.depth) if used and self.table.depth else None

    @property
    def dark(self) -> tuple[int, int] | None:
        """(12, 16), say, when only a quarter of the depth or less is used; depths are even."""
        used, depth = self.used_bits or (1, 1)
        return (used + used % 2, depth) if used + used % 2 <= depth - 2 else None

    def limit_bits(self, bits: int) -> None:
        """Map 0 to 2^bits - 1 to [-1, 1] where neither window nor LUT tells what to map.

        Labels and hot pixels above are clipped. Raises NotUsable when the image needs more bits.
        """
        table, used = self.table, self.used_bits
        if used and bits < table.depth:
            if used[0] > bits:
                found = f"its values use {used[0]} bits"
                raise NotUsable(f"--bits {bits}: {found}; give --bits {used[0]} and a new --out")
            display, ends = table.display.copy(), table.apply(table.values[[0, -1]])
            at = table.values.view(f"u{table.values.itemsize}")
            display[at] = np.interp(table.values, (0, 2**bits - 1), np.sign(ends - ends[::-1]))
            text = f"{table.text}; --bits {bits}"
            self.table = DisplayTable(table.values, display, text, bits)
            self.display = self.table.apply(self.stored)

    def restore(self, display: np.ndarray) -> np.ndarray:
        """New stored integers for new display values: the inverse of the display pipeline.

        A pixel whose display value is the one it had keeps its stored integer bit for bit. Of
        several integers with the nearest display value a pixel takes the one closest to its own.
        Raises ValueError where the pipeline has no inverse (a LUT that rises and falls).
        """
        assert display.shape == self.stored.shape and np.isfinite(display).all()
        changed, restored = display != self.display, self.stored.copy()
        restored[changed] = self.table.invert(display[changed], self.stored[changed])
        return restored


def read_mammogram(path: Path, bits: int | None = None) -> Mammogram:
    """A 2-D mammogram for presentation from DICOM (told by content), PNG, PGM, TIFF or JPEG.

    bits: that its values use where no window or LUT tells and the file has room for more
    Raises NotUsable with one clear reason for any other or damaged file, OSError when the file
    cannot be opened.
    """
    with open(path, "rb") as file:
        mammogram = _read_dicom(path, file) if is_dicom(path) else _read_raster(file)
    if bits:
        mammogram.limit_bits(bits)
    return mammogram


@functools.cache
def image_size(path: str) -> tuple[int, int] | None:
    """(rows, columns) by the header alone; None when read_mammogram would not read it either."""
    with contextlib.suppress(NotUsable, OSError), open(path, "rb") as file, _reading("damaged"):
        if is_dicom(path):
            ds = read_header(path, file, ("Rows", "Columns"))
            return int(ds.Rows), int(ds.Columns)
        with Image.open(file, formats=RASTERS) as image:
            return image.height, image.width


@contextlib.contextmanager
def _reading(what: str, quote: bool = True) -> Iterator[None]:
    """Whatever damaged data make of pydicom, Pillow, a decoder or us ends as NotUsable, in a line.

    They raise almost anything, the RLE decoder (Rust) even a BaseException, and some print to file
    descriptor 2 behind Python's back, which therefore leads nowhere meanwhile. Their words are not
    quoted where these may hold words of the file, a patient's name for example.
    """
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (NotUsable, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        text = f": {textwrap.shorten(str(error), 250, placeholder=' ...')}" if quote else ""
        raise NotUsable(f"{what} ({type(error).__name__}{text})") from None
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _check_size(file: BinaryIO, rows: int, columns: int) -> None:
    """Raise NotUsable for what decoders would fill the memory with, or make up."""
    size = os.fstat(file.fileno()).st_size
    claim = f"header claims {rows} x {columns} pixels"
    if min(rows, columns) < 1 or rows * columns > MAX_PIXELS:
        raise NotUsable(f"{claim}; expected 1 x 1 to {MAX_PIXELS // 10**6} megapixels")
    if rows * columns > max(PLAUSIBLE_PIXELS, PIXELS_A_BYTE * size):
        raise NotUsable(f"{claim} in a file of {size} bytes")


# --- DICOM: header, exclusions ---


def _read_dicom(path: Path, file: BinaryIO) -> Mammogram:
    ds = read_header(path, file)
    with _reading("DICOM header is damaged", quote=False):
        _exclude(ds)
        _check_size(file, ds.Rows, ds.Columns)
        spacing, table = _spacing(ds), dicom_table(ds)
    stored = _read_pixels(ds, file)
    return Mammogram(stored, table.apply(stored), *spacing, ds, table)


def read_header(path: Path, file: BinaryIO, keywords: tuple[str, ...] = KEYWORDS) -> Dataset:
    """The named attributes of a DICOM file, each decoded. Raises NotUsable."""
    with _reading("DICOM header is damaged", quote=False):
        meta = pydicom.filereader.read_file_meta_info(path)
        syntax = uid.UID(meta.get("TransferSyntaxUID") or "")
        if syntax not in NATIVE and syntax not in DECODERS:  # to inflate could fill the memory
            raise NotUsable(f"TransferSyntaxUID is {_shown(syntax)}; expected plain, JPEG or RLE")
        ds = pydicom.dcmread(
            file, stop_before_pixels=True, defer_size="1 MB", specific_tags=list(keywords)
        )
        for element in ds.iterall():  # pydicom decodes an element when it is asked for
            if element.keyword.endswith("Sequence") and element.VR != "SQ":
                raise NotUsable(f"{element.keyword} is not a sequence")
    return ds


def _shown(value: object) -> str:
    """An attribute's value in a reason. A damaged one may hold anything, names too: not shown."""
    if value is None or value == "":
        return "absent"
    if isinstance(value, uid.UID):
        return value.name if value.type else "unknown"
    if isinstance(value, int):
        return str(int(value))
    texts = [value] if isinstance(value, str) else list(value)
    if all(isinstance(v, str) and re.fullmatch(r"[A-Z0-9_ ]{0,16}", v) for v in texts):  # VR CS
        return " ".join(map(repr, texts))
    return "not a valid value"


def _exclude(ds: Dataset) -> None:
    """Raise NotUsable, naming the attribute that decides, unless this is a 2-D mammogram."""

    def need(ok: bool, keyword: str, expected: str) -> None:
        if not ok:
            raise NotUsable(f"{keyword} is {_shown(ds.get(keyword))}; expected {expected}")

    def word(keyword: str) -> str:
        return str(ds.get(keyword) or "").upper()

    _imply(ds)
    processing = word("PresentationIntentType") == "FOR PROCESSING"
    need(not processing, "PresentationIntentType", "FOR PRESENTATION")
    other = re.search("For Processing|Tomosynthesis", uid.UID(word("SOPClassUID")).name)
    need(not other, "SOPClassUID", "a 2-D image for presentation")
    need(ds.get("NumberOfFrames") in (None, "", 0, 1), "NumberOfFrames", "1, a single image")
    words = ["CONTRAST"] * bool(ds.get("ContrastBolusAgentSequence")) + values(ds, "ImageType")
    image_type = " ".join(str(v).upper().replace(" ", "_") for v in words)
    sliced = SLICED.search(image_type) and "GENERATED_2D" not in image_type
    need(not sliced, "ImageType", "a 2-D image, not tomosynthesis")
    plain = "a plain mammogram: no needle, no stereo pair, of two energies LOW_ENERGY"
    need(not OTHER.search(image_type), "ImageType", plain)
    need(word("QualityControlImage") != "YES", "QualityControlImage", "NO, a patient's image")
    need(ds.get("Modality") in MODALITIES, "Modality", f"one of {', '.join(MODALITIES)}")
    body_part = word("BodyPartExamined") or "BREAST"
    need("BREAST" in body_part and "SPECIMEN" not in body_part, "BodyPartExamined", "BREAST")
    if ds.get("SpecimenDescriptionSequence"):
        raise NotUsable("SpecimenDescriptionSequence is not empty; expected a mammogram")
    for keyword in ("AnatomicRegionSequence", "ViewCodeSequence"):
        for item in ds.get(keyword) or ():
            if str(item.get("CodeValue")) in SPECIMEN_CODES:
                raise NotUsable(f"{keyword} is tissue specimen from breast; expected a mammogram")
    for keyword in ("Rows", "Columns"):
        need(isinstance(ds.get(keyword), int), keyword, "a number: an image")
    monochrome = ds.get("PhotometricInterpretation") in ("MONOCHROME1", "MONOCHROME2")
    need(monochrome, "PhotometricInterpretation", "MONOCHROME1 or MONOCHROME2")
    need(ds.get("SamplesPerPixel") in (None, 1), "SamplesPerPixel", "1")
    need(ds.get("BitsAllocated") in (8, 16), "BitsAllocated", "8 or 16")
    most = ds.BitsAllocated
    need(ds.get("BitsStored") in range(2, most + 1), "BitsStored", f"2 to {most}")
    need(ds.get("HighBit") in (None, ds.BitsStored - 1), "HighBit", f"{ds.BitsStored - 1}")
    need(ds.get("PixelRepresentation") in (0, 1), "PixelRepresentation", "0 or 1")


def _imply(ds: Dataset) -> None:
    """Fill in what is absent and has one lawful value, which decoders and derived files need."""
    kind = uid.UID(ds.get("SOPClassUID") or ds.file_meta.get("MediaStorageSOPClassUID") or "")
    implied = {"SOPClassUID": kind or None, "SamplesPerPixel": 1}
    implied |= {"Modality": "MG", "PixelRepresentation": 0} if "Mammography" in kind.name else {}
    for keyword in [keyword for keyword in implied if ds.get(keyword) in (None, "")]:
        setattr(ds, keyword, implied[keyword])


def values(ds: Dataset, keyword: str) -> list:
    """The values of an element of any multiplicity, none when it is absent or empty."""
    value = ds.get(keyword)
    if value is None or value == "":
        return []
    return [value] if isinstance(value, str | bytes | int | float) else list(value)


def floats(ds: Dataset, keyword: str) -> list[float]:
    """The numbers of an element, none when one of them is no finite number."""
    try:
        numbers = [float(v) for v in values(ds, keyword)]
    except (TypeError, ValueError):  # pydicom leaves a damaged number as text
        return []
    return numbers if all(map(math.isfinite, numbers)) else []


def _number(ds: Dataset, keyword: str, default: float | None = None) -> float | None:
    """The first value of a decimal string. Raises NotUsable when it is not a finite number."""
    if not values(ds, keyword):
        return default
    if not floats(ds, keyword):
        raise NotUsable(f"{keyword} is not a finite number")
    return floats(ds, keyword)[0]


def _spacing(ds: Dataset) -> tuple[tuple[float, float] | None, str]:
    """(row, col) spacing in the breast and its source; (None, why) rather than a guess.

    PixelSpacing is calibrated where it differs from ImagerPixelSpacing, which is that of the
    detector, larger by the magnification (PS3.3 10.7.1.1, 10.7.1.3).
    """
    detector = floats(ds, "ImagerPixelSpacing")
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        spacing = floats(ds, keyword)
        pair = len(spacing) == 2 and all(1e-3 < v < 10 for v in spacing)
        if not pair or max(spacing[0] * ds.Rows, spacing[1] * ds.Columns) > WIDEST_MM:
            continue
        if np.allclose(spacing, detector[:2] or 0, 1e-3):
            if (factor := _magnification(ds)) is None:
                return None, "a magnification view that does not tell its magnification"
            spacing = [v / factor for v in spacing]
            keyword = f"{keyword} / magnification {factor:g}" if factor != 1 else keyword
        return (spacing[0], spacing[1]), keyword
    return None, ""


def _magnification(ds: Dataset) -> float | None:
    """Of the breast on the detector: as estimated, else by the distances; None where unknown."""
    factors = floats(ds, "EstimatedRadiographicMagnificationFactor")[:1]
    distances = (floats(ds, f"DistanceSourceTo{end}")[:1] for end in ("Detector", "Patient"))
    factors += [far / near for far, near in zip(*distances, strict=False) if near > 0]
    items = (ds, *values(ds, "ViewCodeSequence"))
    modifiers = [code for item in items for code in values(item, "ViewModifierCodeSequence")]
    magnified = any(str(code.get("CodeValue")) in MAGNIFIED_CODES for code in modifiers)
    # a breast on its support has up to 1.1
    known = [v for v in factors if (MAGNIFIED if magnified else 1) <= v < 10]
    return known[0] if known else None if magnified else 1.0


# --- DICOM: pixels ---


def _read_pixels(ds: Dataset, file: BinaryIO) -> np.ndarray:
    """(rows, columns) integers as stored, in native byte order."""
    syntax = ds.file_meta.TransferSyntaxUID
    plugin, package = DECODERS.get(syntax, ("", "pydicom"))
    file.seek(0)
    with _reading(f"PixelData could not be decoded as {syntax.name} by {package}"):
        whole = pydicom.dcmread(file, specific_tags=["PixelData"])
        whole.update(ds)
        if not whole.get("PixelData"):
            raise NotUsable("PixelData is absent or cut off")
        if syntax in DECODERS and syntax != uid.RLELossless:
            _check_stream(whole, syntax)
        if syntax in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit):
            whole.PixelData = _whole_scan(whole.PixelData)
        stored = pixel_array(whole, index=0, raw=True, decoding_plugin=plugin, number_of_frames=1)
    kind = "ui"[ds.PixelRepresentation]
    stored = np.ascontiguousarray(stored, dtype=f"={kind}{ds.BitsAllocated // 8}")
    assert stored.shape == (ds.Rows, ds.Columns)
    if syntax in DECODERS and syntax not in LOSSY:  # what lossy ones put above is rounding
        unused = ds.BitsAllocated - ds.BitsStored
        stored = stored << unused >> unused  # an overlay, say: of the image are the lower bits
    return stored


def _check_stream(ds: Dataset, syntax: uid.UID) -> None:
    """Raise NotUsable for compressed data that end early or are not of Rows x Columns pixels.

    Of the decoders some hang, some invent, some make room for whatever size they find.
    PixelData is a table and the stream's fragments (PS3.5 A.4).
    """
    _, *fragments = encaps.generate_fragments(ds.PixelData)
    stream = b"".join(fragments)
    # JPEG and JPEG-LS streams end in a marker, which some makers leave out of JPEG 2000; padding
    # may follow, and no pixels hold that marker.
    if "2000" not in syntax.name and b"\xff\xd9" not in stream.rstrip(b"\0\xff")[-16:]:
        raise NotUsable("PixelData is cut off: no end of image")
    try:
        rows, columns = _codestream_shape(stream[: 1 << 20], syntax)
    except (ValueError, IndexError, struct.error):
        raise NotUsable(f"PixelData holds no {syntax.name} image") from None
    if (rows, columns) != (ds.Rows, ds.Columns):
        other = f"Rows and Columns say {ds.Rows} x {ds.Columns}"
        raise NotUsable(f"PixelData is an image of {rows} x {columns} pixels; {other}")


def _whole_scan(data: bytes) -> bytes:
    """The JPEG data of a single component with Se = 63 where its only scan says else (B.2.3, G.1).

    Sequential scans have no other value; some makers wrote 0, which the decoder refuses.
    """
    head = rb"\xff[\xc0\xc1]\0\x0b.*?\xff\xda\0\x08\x01..\0([^?])\0"  # SOF0 or SOF1, then SOS
    scan = re.search(head, data[: 1 << 20], re.DOTALL)
    return data[: scan.start(1)] + b"\x3f" + data[scan.end(1) :] if scan else data


def _codestream_shape(stream: bytes, syntax: uid.UID) -> tuple[int, int]:
    """(rows, columns) that a JPEG, JPEG-LS or JPEG 2000 stream claims."""
    if syntax in (uid.JPEG2000, uid.JPEG2000Lossless):
        at = stream.index(b"\xff\x4f\xff\x51") + 8  # SOC and SIZ, ISO 15444-1 A.5.1
        x1, y1, x0, y0 = struct.unpack_from(">4L", stream, at)
        return y1 - y0, x1 - x0
    at = stream.index(b"\xff\xd8\xff") + 2  # SOI, then segments up to SOF, ISO 10918-1 B.2.2
    while not (0xC0 <= stream[at + 1] <= 0xCF or stream[at + 1] == 0xF7) or stream[at + 1] == 0xC4:
        at += 1 if stream[at + 1] == 0xFF else 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
    return struct.unpack_from(">2H", stream, at + 5)


# --- Display pipeline, PS3.3 C.11: one table over all stored values ---


@dataclass(frozen=True)
class DisplayTable:
    """The whole display pipeline as one look-up, exact and fast for integers of up to 16 bits."""

    values: np.ndarray  # stored values that can occur and are not padding, ascending
    display: np.ndarray  # float32 by bit pattern of the stored value
    text: str
    depth: int = 0  # bits of unsigned values that are all mapped, without a window or LUT

    def apply(self, stored: np.ndarray) -> np.ndarray:
        """Stored integers of any shape -> float32 in [-1, 1]."""
        pattern = stored.view(f"u{stored.itemsize}")
        display = np.empty(stored.shape, np.float32)
        for row in range(0, len(stored), 64):  # numpy widens indices to 8 bytes: not all at once
            np.take(self.display, pattern[row : row + 64], out=display[row : row + 64], mode="clip")
        return display

    def invert(self, display: np.ndarray, stored: np.ndarray) -> np.ndarray:
        """The stored values nearest to `display`; among equals the ones nearest to `stored`."""
        numbers, levels = self.values, self.apply(self.values)
        if levels[0] > levels[-1]:
            numbers, levels = numbers[::-1], levels[::-1]
        if levels[0] == levels[-1] or (np.diff(levels) < 0).any():
            raise ValueError(f"the display pipeline ({self.text}) cannot be inverted")
        levels, first = np.unique(levels, return_index=True)
        last = np.append(first[1:], len(numbers)) - 1
        nearest = np.searchsorted((levels[1:] + levels[:-1].astype(np.float64)) / 2, display)
        ends = numbers[first[nearest]], numbers[last[nearest]]
        return np.clip(stored, np.minimum(*ends), np.maximum(*ends))


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
    occurs, depth = (x >= low) & (x <= high), 0

    if ds.get("ModalityLUTSequence"):
        x, high, used = _apply_lut(ds, "ModalityLUTSequence", x, low < 0)
        low = 0
        text.append(f"modality LUT{used}")
    else:
        slope, intercept = _number(ds, "RescaleSlope", 1.0), _number(ds, "RescaleIntercept", 0.0)
        if slope == 0:
            raise NotUsable("RescaleSlope is 0")
        x, depth = x * slope + intercept, 0 if signed else bits
        low, high = sorted((low * slope + intercept, high * slope + intercept))
        if (slope, intercept) != (1, 0):
            text.append(f"rescale {slope:g} {intercept:g}")

    centers, widths = values(ds, "WindowCenter"), values(ds, "WindowWidth")
    if ds.get("VOILUTSequence"):
        x, top, used = _apply_lut(ds, "VOILUTSequence", x, low < 0)
        y, depth = x * (2 / top) - 1, 0
        text.append(f"VOI LUT 1 of {len(ds.VOILUTSequence)}{used}")
    elif centers and widths:
        center, width = _number(ds, "WindowCenter"), _number(ds, "WindowWidth")
        function = str(ds.get("VOILUTFunction") or "LINEAR").upper()
        y, depth = window(x, center, width, function), 0
        text.append(f"window {center:g} {width:g} {function}, 1 of {len(centers)}")
    else:
        y = (x - low) * (2 / (high - low)) - 1
        text.append(f"no window, bit depth {low:g} to {high:g}")

    shape = str(ds.get("PresentationLUTShape") or "").upper()
    if ds.PhotometricInterpretation == "MONOCHROME1" or shape == "INVERSE":
        y = -y  # [-1, 1] is the window: inverting here is inverting about it, and only here
        text.append("inverted")
    padding = floats(ds, "PixelPaddingValue")
    if padding:
        ends = [padding[0], (floats(ds, "PixelPaddingRangeLimit") or padding)[0]]
        ends = [int(v) & 0xFFFF for v in ends]  # of either sign, whatever its VR says
        ends = [v - 2**16 if signed and v >= 2**15 else v for v in ends]
        padded = (pattern >= min(ends)) & (pattern <= max(ends))
        y = np.where(padded, -1, y)
        occurs &= ~padded
        text.append(f"padding {min(ends)} to {max(ends)} is air")
    display = np.clip(y, -1, 1).astype(np.float32)
    return DisplayTable(np.sort(pattern[occurs]), display, "; ".join(text), depth)


def window(x: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """C.11.2.1.2 and C.11.2.1.3 with the output range [-1, 1]."""
    if function == "LINEAR" and width >= 1:
        center, width = center - 0.5, width - 1
        if width == 0:
            return np.where(x <= center, -1.0, 1.0)
    elif function not in ("LINEAR_EXACT", "SIGMOID") or width <= 0:
        words = f"WindowWidth is {width:g} with VOILUTFunction {_shown(function)}"
        raise NotUsable(f"{words}; expected LINEAR from 1 on, LINEAR_EXACT or SIGMOID above 0")
    y = 2 * (x - center) / width
    # tanh(v / 2) = 2 / (1 + exp(-v)) - 1, without its overflow
    return np.tanh(y) if function == "SIGMOID" else np.clip(y, -1, 1)


def _apply_lut(ds: Dataset, keyword: str, x: np.ndarray, signed: bool):
    """x through the first LUT of the sequence (C.11.1.1, C.11.2.1.1), its top value, a remark.

    Some makers give the size of storage, 16 bits, for entries of 12 or 14: the top is that of the
    least even number of bits, 8 or more, that holds the largest entry.
    """
    item = ds[keyword].value[0]
    descriptor = [int(v) for v in floats(item, "LUTDescriptor")]
    if len(descriptor) != 3 or item.get("LUTData") is None:
        raise NotUsable(f"{keyword} has no complete LUT")
    count = (descriptor[0] & 0xFFFF) or 65536  # 65536 does not fit its 16 bits
    first, bits = descriptor[1] & 0xFFFF, descriptor[2]
    if signed and first >= 2**15:  # two's complement or not follows from x, whatever the VR says
        first -= 2**16
    if not 1 < bits <= 16:
        raise NotUsable(f"{keyword} says {bits} bits an entry; expected 8 or 10 to 16")
    words = lut_words(ds, item)
    if bits <= 8 and len(words) == (count + 1) // 2 < count:  # two entries a word, low byte first
        words = words.astype("<u2").view(np.uint8)
    needed = int(words[:count].max(initial=0)).bit_length()
    if len(words) < count or needed > bits:
        raise NotUsable(f"{keyword}: its data do not fit its descriptor {descriptor}")
    used = min(bits, max(8, needed + needed % 2))
    remark = f" ({used} of its {bits} bits used)" if used < bits else ""
    at = np.clip(np.rint(x) - first, 0, count - 1).astype(np.int64)
    return words[at].astype(np.float64), 2**used - 1, remark


def lut_words(ds: Dataset, item: Dataset) -> np.ndarray:
    """LUTData, which is bytes or numbers, as 16-bit words."""
    data = item.LUTData
    if not isinstance(data, bytes):
        return np.array(values(item, "LUTData"), np.uint16)
    order = "<" if ds.file_meta.TransferSyntaxUID.is_little_endian else ">"
    return np.frombuffer(data[: len(data) // 2 * 2], f"{order}u2").astype(np.uint16)


# --- Other images ---


def _read_raster(file: BinaryIO) -> Mammogram:
    """8- or 16-bit greyscale PNG, PGM, TIFF or JPEG; the bounds are those of the bit depth."""
    with _reading("image is damaged"):
        try:
            image = Image.open(file, formats=RASTERS)  # decodes nothing yet
        except Image.UnidentifiedImageError:
            raise NotUsable("neither DICOM nor PNG, PGM, TIFF or JPEG") from None
        _check_size(file, image.height, image.width)
        wide = image.mode in ("I;16", "I;16L", "I;16B")
        wide |= (image.format, image.mode) == ("PPM", "I")
        if image.mode != "L" and not wide:
            raise NotUsable(f"{image.format} of mode {image.mode}; expected 8- or 16-bit greyscale")
        if getattr(image, "n_frames", 1) > 1:
            raise NotUsable(f"{image.format} holds {image.n_frames} images; expected 1")
        white_is_zero = image.format == "TIFF" and image.tag_v2.get(262) == 0
        stored = np.ascontiguousarray(image, dtype=np.uint16 if wide else np.uint8)
    levels = np.arange(2 ** (8 * stored.itemsize), dtype=stored.dtype)
    display = np.linspace(-1, 1, len(levels))
    text = f"no window, bit depth 0 to {levels[-1]}"
    if white_is_zero and wide:  # Pillow has inverted 8-bit ones already
        display, text = -display, f"{text}; inverted"
    table = DisplayTable(levels, display.astype(np.float32), text, 8 * stored.itemsize)
    return Mammogram(stored, table.apply(stored), None, "", None, table)


# --- Masks of lesions ---


def read_mask(path: Path) -> np.ndarray:
    """(H, W), higher in the lesion: DICOM or an image of any mode that people save a mask in.

    Raises NotUsable for a damaged or another file, OSError when it cannot be opened.
    """
    with open(path, "rb") as file, _reading("damaged or no image", quote=False):
        if is_dicom(path):
            return _read_dicom(path, file).stored
        with Image.open(file, formats=(*RASTERS, "BMP", "GIF")) as image:
            _check_size(file, image.height, image.width)
            if image.mode in ("1", "L") or image.mode[0] in "IF":
                return np.array(image)
            *colours, alpha = np.moveaxis(np.asarray(image.convert("RGBA")), -1, 0)
    mask = np.where(alpha > 127, np.maximum.reduce(colours), 0)
    return mask if mask.any() or alpha.min() == alpha.max() else alpha  # painted black, or thinly
