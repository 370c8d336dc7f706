"""A finding, its words, and what the readers of public data sets share."""

import contextlib
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from support.files import csv_rows
from support.mammogram import image_size

SPLITS = ("train", "val", "test")
FINDINGS = ("mass", "calcification", "distortion", "asymmetry")
PATHOLOGIES = ("", "normal", "benign", "malignant")  # from best to worst, "" = unknown
DENSITY = dict(zip("1234abcd", "abcdabcd", strict=True))  # BI-RADS, in either writing
Box = tuple[float, float, float, float]  # row0, col0, row1, col1, half-open, stored pixels
Traps = Counter  # sentence -> how often it was met; or (sentence, what): a thing is counted once

ABSENT = "Images that the data set lists but its folder does not hold, left out"
ESCAPES = "Images whose path leaves the data set's folder, left out"
DAMAGED = "Damaged parts of tables and annotation files, left out"
BIRADS = {"1": "normal", **dict.fromkeys("23", "benign"), **dict.fromkeys("456", "malignant")}
NO_TYPE = "Marked regions that are no mass, calcification, distortion or asymmetry: no lesion patch"
NOT_NORMAL = "Images without a mark that are not known to be normal: no patches"


@dataclass(frozen=True)
class Finding:
    """One row of the manifest: a lesion, or an image without one (`finding` empty)."""

    image_path: str  # absolute
    patient_id: str
    laterality: str  # L, R
    view: str  # CC, MLO, ...
    finding: str = ""  # mass, calcification, distortion, asymmetry
    pathology: str = ""  # normal, benign, malignant; "" = unknown
    bbox: Box | None = None
    mask_path: str = ""  # absolute
    spacing_mm: tuple[float, float] | None = None  # (row, col); overrides the header
    split: str = ""  # train, val, test; "" = prepare decides
    # BI-RADS a to d, "" = unknown; hidden from repr, by which `prepare` tells sources apart: no
    # patch depends on it, so it may be added later
    density: str = field(default="", repr=False)


def damage(traps: Traps, error: object, image_path: str = "") -> None:
    """Something of the tables or annotation files cannot be understood, of this image or of any."""
    traps[DAMAGED, str(error), image_path] = 1


@contextlib.contextmanager
def sparing(traps: Traps, image_path: str = "") -> Iterator[None]:
    """What is damaged costs itself and the image that it is of, never the whole reading."""
    try:
        yield
    except ValueError as error:
        damage(traps, error, image_path)


# --- Patient ids ---

# Drawn as nothing, and yet printable: joiners, Hangul fillers, variation selectors
INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0]")
NUMBER = re.compile(r"(?<![^\W_])([^\W\d_]*+)(\d++)([^\W\d_]*+)(?![^\W_])")  # of a word, if one
DASHES = re.compile("[\u2010-\u2015\u2212]")


def plain_id(text: str) -> str:
    """A patient id in composed letters (NFC), without what cannot be seen in or around it."""
    seen = (c if c.isprintable() else " " if c.isspace() else "" for c in text)
    return unicodedata.normalize("NFC", INVISIBLE.sub("", "".join(seen))).strip()


def look(text: str) -> str:
    """The same for ids that a spreadsheet or a keyboard makes of one: P1, p01, "P 1"; 7, 7.0, 007.

    Ids of one form (hex digits, P_00010) stay apart: only the single number of a word loses zeros.
    """
    text = DASHES.sub("-", unicodedata.normalize("NFKC", text).casefold())
    text = re.sub(r"(?<!\d) +| +(?!\d)", "", text)
    text = re.sub(r"^([^.]*\d)\.0+$", r"\1", text)
    return NUMBER.sub(lambda m: f"{m[1]}{m[2].lstrip('0') or '0'}{m[3]}", text)


# --- Files and tables ---


def files(root: Path) -> list[Path]:
    """Every file below `root`, in linked folders too, sorted; a link that leads nowhere is none."""
    walk = os.walk(root, followlinks=True)
    paths = (Path(folder, name) for folder, _, names in walk for name in names)
    return sorted(path for path in paths if path.exists())


def named(paths: Iterable[Path], root: Path, name: str, advice: str = "") -> Path:
    """The one file of this name (case ignored). Raises ValueError when there is none or two."""
    same = [path for path in paths if path.name.lower() == name.lower()]
    if len(same) != 1:
        count = f"found {len(same)} files named {name}"
        raise ValueError(f"{root}: {count}; expected exactly one{advice}")
    return same[0]


def table(path: Path, columns: tuple[str, ...], traps: Traps, **more) -> Iterator[tuple[str, dict]]:
    """Place and named columns of each row; blanks and newlines around values taken off."""
    for line, row in csv_rows(path, columns, damaged=lambda text: damage(traps, text), **more):
        yield f"{path} line {line}", {name: value.strip() for name, value in row.items()}


def known(words: dict[str, str], value: str, where: str) -> str:
    """The meaning of one of a data set's own words. Raises ValueError for an unknown word."""
    if value not in words:
        raise ValueError(f"{where}: found {value[:80]!r}; expected one of {', '.join(words)}")
    return words[value]


def inside(text: str) -> tuple[str, ...]:
    """The parts of a relative path that a distributed file names; () when it would lead outside."""
    path = PurePosixPath("".join(text.splitlines()).replace("\\", "/"))
    unsafe = path.is_absolute() or ".." in path.parts or ":" in text or "\0" in text
    return () if unsafe else path.parts


def image(root: Path, names: tuple[str, ...], traps: Traps) -> str:
    """The file at `names` below `root`; "", counted once, when it is absent or outside."""
    path, safe = root.joinpath(*names), all(len(inside(name)) == 1 for name in names) and names
    if safe and path.is_file():
        return str(path)
    traps[ABSENT if safe else ESCAPES, names] = 1
    return ""


# --- Regions and opinions ---


def clip(box: Box, image_path: str, traps: Traps) -> Box | None:
    """The part of `box` inside its image; None when nothing is left."""
    rows, cols = image_size(image_path) or (math.inf, math.inf)
    row0, col0, row1, col1 = box
    clipped = (max(row0, 0.0), max(col0, 0.0), min(row1, rows), min(col1, cols))
    if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
        traps["Boxes outside their image or without area: only their image is labelled"] += 1
        return None
    traps["Boxes that reached outside their image, clipped"] += clipped != box
    return clipped


def typed(image: Finding, kinds: set[str], pathology: str, box: Box | None, traps: Traps) -> list:
    """A row for each type of a marked region, which patches are cut from by type (Q24)."""
    traps["Marked regions of several types, one row for each"] += len(kinds) > 1
    traps[NO_TYPE] += not kinds
    box = box and clip(box, image.image_path, traps)
    if not kinds or pathology == "normal":
        pathology = ""
    return [replace(image, finding=f, pathology=pathology, bbox=box) for f in sorted(kinds) or [""]]


def unmarked(image: Finding, pathology: str, traps: Traps) -> Finding:
    """The row of an image without marks: normal only where the data set says so."""
    traps[NOT_NORMAL] += pathology != "normal"
    return replace(image, pathology=pathology)


def birads(text: str) -> str:
    """BI-RADS 4 (a to c), 5 and 6 stand for malignant, 2 and 3 for benign, 1 for normal."""
    grade = re.search(r"[1-6]", text)
    return BIRADS[grade[0]] if grade else ""
