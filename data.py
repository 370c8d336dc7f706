"""§3 Dataset details: mammograms with annotations -> breast mask, splits, 256 x 256 patches.

Patches are (N, S, S) uint16 on disk, 0..65535 mapping linearly to [-1, 1].
"""

import concurrent.futures
import contextlib
import csv
import fcntl
import functools
import hashlib
import hmac
import io
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import click
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from scipy import ndimage

from mammogram import NotUsable, image_size, read_mammogram

SPLITS = ("train", "val", "test")
CLASSES = (
    "normal",
    "malignant_mass",
    "benign_mass",
    "malignant_calcification",
    "benign_calcification",
)
KEYS = tuple(f"{split}/{name}" for split in SPLITS for name in CLASSES)
EVALUATED = (CLASSES[0], CLASSES[1], CLASSES[3])  # no benign in validation and test, P5
FINDINGS = ("mass", "calcification", "distortion", "asymmetry")
PATHOLOGIES = ("", "normal", "benign", "malignant")  # from best to worst, "" = unknown
MANIFEST_WORDS = {
    "laterality": ("L", "R"),
    "finding": ("", *FINDINGS),
    "pathology": PATHOLOGIES,
    "split": ("", *SPLITS),
}
SPLIT_SHARES = {"train": 60, "val": 20, "test": 20}  # %, P2
BOX = ("row0", "col0", "row1", "col1")
BBOX = tuple(f"bbox_{name}" for name in BOX)
SPACING = ("spacing_row_mm", "spacing_col_mm")
MANIFEST_COLUMNS = ("image_path", "patient_id", "laterality", "view", "finding", "pathology", *BOX)
MANIFEST_OPTIONAL = ("mask_path", *SPACING, "split")
INDEX_COLUMNS = (
    *("patch", "image_uid", "patient_id", *BOX),
    *("scale", "flip", "rotation", "seed", "tissue", *BBOX),
)
SYNTHETIC_COLUMNS = ("sample", "source_patch", "image_uid", "patient_id", "seed", "area", *BBOX)
TRIES = 50  # scales and lesion pixels tried in an image before another is drawn, Q21
DRAWS = 16  # corners drawn at once among those that can be valid; nine in ten are
MASK_CELLS = 200  # cells along the longer side of a breast mask: about 1 mm
BURNT_OUT = 249  # of 255; what touches the border above it is film frame, not tissue
SKIN_LEVEL = 0.35  # of the way from air to Otsu's threshold; set by eye on CBIS-DDSM
NPY_HEADER = 128  # bytes before the first patch
FLIPPED = "Boxes in air, on tissue if rows were counted from the bottom: kept, look at them"
PSEUDONYM_KEY = "MAMGAN_PSEUDONYM_KEY"  # environment variable
_LOCKS: set[int] = set()  # folder locks of this process, which forked workers must not keep
_worker: dict = {}  # what a worker process works on


@dataclass(frozen=True)
class Finding:
    """One row of the manifest: a lesion, or an image without one (`finding` empty)."""

    image_path: str  # absolute
    patient_id: str
    laterality: str  # L, R
    view: str  # CC, MLO, ...
    finding: str = ""  # mass, calcification, distortion, asymmetry
    pathology: str = ""  # normal, benign, malignant; "" = unknown
    bbox: tuple[float, float, float, float] | None = None  # row0, col0, row1, col1, stored pixels
    mask_path: str = ""  # absolute
    spacing_mm: tuple[float, float] | None = None  # (row, col); overrides the header
    split: str = ""  # train, val, test; "" = prepare decides


# --- Patch values ---


def to_float(patch: np.ndarray) -> np.ndarray:
    """uint16 0..65535 -> float32 [-1, 1]."""
    return patch.astype(np.float32) * np.float32(2 / 65535) - np.float32(1)


def to_uint16(patch: np.ndarray) -> np.ndarray:
    """Float [-1, 1] -> uint16 0..65535, rounded to nearest; to_uint16(to_float(u)) == u."""
    return np.rint((np.clip(patch, -1, 1).astype(np.float64) + 1) * 32767.5).astype(np.uint16)


# --- Files that are whole or absent ---


@contextlib.contextmanager
def replace_file(path: Path, mode: str = "wb") -> Iterator:
    """Write beside `path`, sync, rename: a reader sees the old file or the whole new one."""
    aside = path.with_name(path.name + ".part")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with open(aside, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    with replace_file(path, "w") as file:
        json.dump(value, file, indent=1, sort_keys=True, allow_nan=False)
        file.write("\n")


def read_json(path: Path) -> dict:
    """Raises ValueError that names the file when it is missing, damaged or no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_table(path: Path, columns: tuple[str, ...], rows) -> None:
    """CSV with a header; `rows` yields sequences in the order of `columns`."""
    with replace_file(path, "w") as file:
        csv.writer(file, lineterminator="\n").writerows(itertools.chain([columns], rows))


def read_table(path: Path, columns: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The named columns of a CSV as arrays of str. Raises ValueError when one is missing."""
    rows = [row for _, row in csv_rows(path, columns)]
    return {name: np.array([row[name] for row in rows], dtype=str) for name in columns}


def csv_rows(
    path: Path,
    columns: tuple[str, ...],
    optional: tuple[str, ...] = (),
    delimiter: str = ",",
    text: str | None = None,
) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and named columns of each row; an absent optional column is "" throughout.

    `text` is what the file holds, where its own format is not CSV.

    Raises ValueError: no such file, no CSV in UTF-8, a column missing or twice, a row too short.
    """
    expected = f"expected UTF-8 with fields parted by {delimiter!r}"
    try:
        opened = open(path, encoding="utf-8-sig", newline="") if text is None else io.StringIO(text)
        with opened as file:
            reader = csv.reader(file, delimiter=delimiter)
            header = [name.strip() for name in next(reader, [])]
            for name in (*columns, *optional):
                if header.count(name) > 1 or (name in columns and name not in header):
                    count = "is there twice" if name in header else "is missing"
                    found = f"found {', '.join(header[:20])[:300]!r}"
                    raise ValueError(f"{path}: column {name!r} {count}; {found}; {expected}")
            at = {name: header.index(name) for name in (*columns, *optional) if name in header}
            absent = dict.fromkeys(optional, "")
            for row in filter(None, reader):
                if len(row) != len(header):
                    count = f"{len(row)} fields; expected {len(header)}, as its header"
                    raise ValueError(f"{path}: line {reader.line_num} has {count}")
                yield reader.line_num, absent | {name: row[i] for name, i in at.items()}
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not readable as CSV ({error}); {expected}") from None


def numbers(row: dict, names: Sequence[str], where: str = "") -> tuple[float, ...]:
    """The named fields of a row as finite numbers. Raises ValueError that shows them."""
    try:
        values = tuple(float(row[name]) for name in names)
    except (KeyError, TypeError, ValueError):
        values = (math.nan,)
    if not all(map(math.isfinite, values)):
        found = ", ".join(f"{name} {str(row.get(name))[:20]!r}" for name in names)
        raise ValueError(f"{where}found {found}; expected {len(names)} numbers")
    return values


@contextlib.contextmanager
def claim_folder(out: Path, command: str, config: dict) -> Iterator[bool]:
    """Own the output folder `out` of `command` while the block runs; yields True when it goes on.

    The first call writes `out/config.json` ({"command", "config", ...}); a later one with the same
    command and config goes on there. `config` holds JSON values and whatever decides the bytes
    written, and nothing else (no workers, no device).

    A block that fails before it wrote anything leaves an empty folder, free for other options.
    Raises ValueError: another process works there, another command or other options made it, or
    it holds files that are not ours.
    """
    out.mkdir(parents=True, exist_ok=True)
    path, config = out / "config.json", json.loads(json.dumps(config))
    lock = os.open(out, os.O_RDONLY)  # the folder itself is locked: no file to leave behind
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = "another process is writing there; wait for it or give another folder"
            raise ValueError(f"{out}: {text}") from None
        if resumed := path.exists():
            found = read_json(path)
            if (other := found.get("command")) != command:
                text = f"made by {other!r}, not by {command!r}; give another folder"
                raise ValueError(f"{out}: {text}")
            if not isinstance(found.get("complete"), bool):
                raise ValueError(f"{path}: damaged, 'complete' is no truth value; delete {out}")
            there = found["config"] if isinstance(found.get("config"), dict) else {}
            if different := "; ".join(
                f"{key}: {there.get(key)!r} there, {config.get(key)!r} now"
                for key in sorted(there.keys() | config.keys())
                if there.get(key) != config.get(key)
            ):
                text = "give the same options to go on, or another folder"
                raise ValueError(f"{out}: made with other options ({different}); {text}")
        elif foreign := sorted(p.name for p in out.iterdir() if not p.name.endswith(".part")):
            text = "but no config.json; give an empty or a new folder"
            raise ValueError(f"{out}: holds {foreign[0]!r} {text}")
        else:
            write_json(path, {"command": command, "config": config, "complete": False})
        _LOCKS.add(lock)
        try:
            yield resumed
        except Exception:  # nothing was written yet: other options may try in the same folder
            if [p.name for p in out.iterdir()] == [path.name]:
                path.unlink()
            raise
    finally:
        _LOCKS.discard(lock)
        os.close(lock)


def finish_folder(out: Path, **facts: object) -> None:
    """Mark a claimed folder whole and add what is known only at the end."""
    write_json(out / "config.json", read_json(out / "config.json") | facts | {"complete": True})


def finished(path: Path, command: str) -> dict:
    """config.json of a whole folder that `command` made. Raises ValueError."""
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; expected one that {command} made")
    found = read_json(path / "config.json")
    if (other := found.get("command")) != command or not isinstance(found.get("config"), dict):
        raise ValueError(f"{path}: made by {other!r}; expected a folder made by {command!r}")
    if found.get("complete") is not True:
        raise ValueError(f"{path}: not finished; run the same {command} command again")
    return found


def sha256(*parts: bytes | Path) -> str:
    """One hex digest over bytes and files, in order."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with open(part, "rb") as file:
                hashlib.file_digest(file, lambda: digest)
        else:
            digest.update(part)
    return digest.hexdigest()


@contextlib.contextmanager
def progress(total: int, label: str, done: int = 0, every: float = 15.0) -> Iterator:
    """Yields `advance(n, text="")`: rate and time left in a bar on a terminal, else in lines."""
    start = last = time.monotonic()
    count, terminal = done, sys.stderr.isatty()
    with click.progressbar(
        length=total,
        label=label,
        file=sys.stderr,
        hidden=not terminal,
        show_pos=True,
        show_eta=False,  # click's counts what an earlier run has done
        item_show_func=lambda text: text,
    ) as bar:

        def advance(n: int = 1, text: str = "") -> None:
            nonlocal count, last
            count, now = count + n, time.monotonic()
            rate = (count - done) / max(now - start, 1e-9)
            text = f"{rate:.1f}/s  {(total - count) / (rate or 1):.0f} s left  {text}".rstrip()
            bar.update(n, current_item=text)
            if not terminal and (now - last >= every or count == total):
                last = now
                click.echo(f"{label}: {count}/{total}  {text}", err=True)

        bar.update(done)
        yield advance


# --- Manifest ---


def read_manifest(path: Path) -> list[Finding]:
    """The rows of a manifest. Raises ValueError that lists what is wrong."""
    path = Path(path)
    if path.is_dir():
        text = "expected a manifest (CSV); a public data set needs its --format"
        raise ValueError(f"{path}: found a folder; {text}")
    findings, problems = [], []
    for line, row in csv_rows(path, MANIFEST_COLUMNS, MANIFEST_OPTIONAL):
        try:
            findings.append(_finding(row, path.parent.absolute()))
        except ValueError as error:
            problems.append(f"line {line}: {error}")
    if not findings and not problems:
        problems.append("no rows")
    _raise_all(f"{path}: found", problems or check_findings(findings), "correct the manifest")
    return findings


def _finding(row: dict[str, str], folder: Path) -> Finding:
    row = {name: value.strip() for name, value in row.items()}
    for name in ("image_path", "patient_id", "view"):
        if not row[name]:
            raise ValueError(f"{name} is empty")
    words = {}
    for name, allowed in MANIFEST_WORDS.items():
        words[name] = row[name].upper() if name == "laterality" else row[name].lower()
        if words[name] not in allowed:
            wanted = "/".join(word or "empty" for word in allowed)
            raise ValueError(f"{name} is {row[name][:40]!r}; expected {wanted}")
    bbox, spacing = (
        numbers(row, names) if any(row[name] for name in names) else None
        for names in (BOX, SPACING)
    )
    if bbox and not (0 <= bbox[0] < bbox[2] and 0 <= bbox[1] < bbox[3]):
        raise ValueError(f"box {bbox} is empty or negative; expected row0 < row1, col0 < col1")
    if row["mask_path"] and not bbox:
        raise ValueError(f"mask_path without {', '.join(BOX)}; expected the mask's box")
    if spacing and not all(1e-3 < value < 10 for value in spacing):
        raise ValueError(f"spacing is {spacing} mm; expected 0.001 to 10")
    return Finding(
        image_path=str(folder / row["image_path"]),
        patient_id=row["patient_id"],
        view=row["view"].upper(),
        bbox=bbox,
        mask_path=str(folder / row["mask_path"]) if row["mask_path"] else "",
        spacing_mm=spacing,
        **words,
    )


def check_findings(findings: list[Finding]) -> list[str]:
    """What contradicts itself or the files, one line each."""
    images, splits, problems = defaultdict(list), defaultdict(set), []
    for row in findings:
        images[row.image_path].append(row)
        splits[row.patient_id].add(row.split)
    for patient, found in sorted(splits.items()):
        if len(found - {""}) > 1:
            problems.append(f"patient {patient} in splits {', '.join(sorted(found - {''}))}")
    for path, rows in images.items():
        files = {path: 1} | {row.mask_path: 1 for row in rows if row.mask_path}
        if missing := [file for file in files if not os.path.isfile(file)]:
            problems.append(f"{missing[0]}: no such file")
            continue
        if odd := [file for file in files if file.encode(errors="replace").decode() != file]:
            problems.append(f"{odd[0]}: its name is no UTF-8, so no table can hold it")
            continue
        for name in ("patient_id", "laterality", "view", "spacing_mm"):
            if len({getattr(row, name) for row in rows}) > 1:
                problems.append(f"{path}: rows differ in {name}")
        if any(r.pathology == "normal" and (r.finding or r.bbox or len(rows) > 1) for r in rows):
            problems.append(f"{path}: normal, and yet with a finding")
        if len({(row.finding, row.bbox) for row in rows}) < len(rows):
            problems.append(f"{path}: the same finding and box twice")
        boxes = [row.bbox for row in rows if row.bbox]
        height, width = (boxes and image_size(path)) or (math.inf, math.inf)
        for box in boxes:
            if box[2] > height or box[3] > width:
                problems.append(f"{path}: box {box} outside the image of {height, width} pixels")
    return problems


def _raise_all(what: str, problems: list[str], advice: str) -> None:
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        listed = "; ".join(problems[:10]) + more
        found = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ValueError(f"{what} {found}: {listed}; {advice}")


# --- §3 "breast tissue" ---


def _breast_cells(display: np.ndarray) -> tuple[np.ndarray, int]:
    """Breast mask in cells of f x f pixels, and f: about 200 cells along the longer side.

    Film: a white frame touches the border, air is a noisy grey, labels and scratches are small or
    thin. Digital: air is exactly -1. Both: tissue rises from air to skin within a few millimetres.
    """
    step = -(-max(display.shape) // (2 * MASK_CELLS))
    if min(display.shape) < 32 * step:
        raise NotUsable(f"{display.shape} pixels are too few or too narrow for a breast")
    rows, cols = (n // (2 * step) * 2 * step for n in display.shape)
    fine = display[:rows:step, :cols:step]
    grey = fine[::2, ::2] + fine[1::2, ::2] + fine[::2, 1::2] + fine[1::2, 1::2]
    grey = ((grey + 4) * (255 / 8)).astype(np.uint8)
    frame = ndimage.maximum_filter(_touching_border(grey > BURNT_OUT), size=5)
    # Otsu's threshold parts air from tissue; the skin line lies nearer to air.
    counts = np.bincount(grey[~frame], minlength=256)
    below, moment = counts.cumsum(), (counts * np.arange(256)).cumsum()
    apart = (moment[-1] * below - moment * below[-1]) ** 2.0
    otsu = int((apart / np.maximum(below * (below[-1] - below), 1)).argmax())
    air = np.searchsorted(below, below[otsu] / 2)  # the median below
    tissue = ~frame & (grey > air + SKIN_LEVEL * (otsu - air))
    # The largest object once thin bridges to labels, scratches and film borders are cut.
    core, objects = ndimage.label(ndimage.minimum_filter(tissue, size=7, mode="constant"))
    if not objects:
        raise NotUsable("no breast found: nothing large is brighter than air")
    core = core == 1 + np.bincount(core.ravel())[1:].argmax()
    breast = ndimage.maximum_filter(core, size=9) & tissue
    breast |= ~(breast | _touching_border(~breast))  # holes filled
    share, contrast = breast.mean(), (np.median(grey[breast]) - air) / 255
    box = breast[np.ix_(breast.any(axis=1), breast.any(axis=0))].mean()
    if not (0.02 < share < 0.97 and contrast > 0.05 and box > 0.35):
        raise NotUsable(
            f"breast mask fails its checks: {share:.0%} of the image (expected 2% to 97%), "
            f"{contrast:.0%} brighter than air (5% or more), fills {box:.0%} of its box (35%)"
        )
    return breast, 2 * step


def _touching_border(mask: np.ndarray) -> np.ndarray:
    """The objects of a bool mask that touch the image border."""
    labels, objects = ndimage.label(mask)
    keep = np.zeros(objects + 1, bool)
    for line in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        keep[line] = True
    keep[0] = False
    return keep[labels]


def breast_mask(display: np.ndarray) -> np.ndarray:
    """Bool (H, W): the largest object that is tissue, holes filled. Raises NotUsable."""
    cells, f = _breast_cells(display)
    whole = np.zeros(display.shape, bool)
    whole[: f * len(cells), : f * cells.shape[1]] = cells.repeat(f, axis=0).repeat(f, axis=1)
    return whole


def tissue_windows(
    mask: np.ndarray, side: int | tuple[int, int], min_tissue: float = 0.9
) -> np.ndarray:
    """Bool (H - h + 1, W - w + 1): top-left corners whose window is >= 90% tissue (P6, Q21)."""
    h, w = np.broadcast_to(side, 2).tolist()
    table = np.pad(mask, ((1, 0), (1, 0))).cumsum(0, np.int32).cumsum(1, np.int32)  # summed areas
    rows = table[h:] - table[:-h]
    return rows[:, w:] - rows[:, :-w] >= min_tissue * h * w - 1e-6


class Tissue:
    """Draws windows from a breast mask of f x f cells, every valid top-left corner equally likely.

    The summed-area table of the cells tells which blocks of f x f corners can hold a valid one. Of
    all corners of these blocks one is drawn and kept when its own window is valid, which leaves the
    valid ones equally likely; should a few draws all miss, every corner of the blocks is checked.
    """

    def __init__(self, cells: np.ndarray, f: int, shape: tuple[int, int], min_tissue: float):
        self.f, self.shape, self.min_tissue = f, shape, min_tissue
        self.table = np.pad(cells, ((1, 3), (1, 3))).cumsum(0, np.int32).cumsum(1, np.int32)

    def before(self, row: np.ndarray, col: np.ndarray) -> np.ndarray:
        """Tissue pixels above and left of pixel corners: the table, linear between its nodes."""
        f, q, p = self.f, row // self.f, col // self.f
        a, b = row - q * f, col - p * f
        first = (f - b) * self.table[q, p] + b * self.table[q, p + 1]
        return (f - a) * first + a * ((f - b) * self.table[q + 1, p] + b * self.table[q + 1, p + 1])

    def share(self, row: np.ndarray, col: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Tissue fraction of windows of `size` (h, w)."""
        (top, bottom), (left, right) = (row, row + size[0]), (col, col + size[1])
        at = self.before(np.array([[top, top], [bottom, bottom]]), np.array([[left, right]] * 2))
        return (at[1, 1] - at[0, 1] - at[1, 0] + at[0, 0]) / (size[0] * size[1])

    def draw(
        self,
        rng: np.random.Generator,
        size: tuple[int, int],
        span: tuple[int, int, int, int] | None = None,
        forbidden: Sequence[tuple[int, int, int, int]] = (),
    ) -> tuple[int, int, float] | None:
        """A corner and its window's tissue; None when no window in the image is >= 90% tissue.

        `span` and `forbidden`: rectangles of corners that are allowed and that are not.
        """
        f, (h, w), (row0, col0, row1, col1) = self.f, size, span or (0, 0, *self.shape)
        row0, col0 = max(row0, 0), max(col0, 0)
        row1, col1 = min(row1, self.shape[0] - h + 1), min(col1, self.shape[1] - w + 1)
        if row0 >= row1 or col0 >= col1:
            return None
        q0, p0, q1, p1 = row0 // f, col0 // f, -(-row1 // f), -(-col1 // f)
        down, across = -(-(f - 1 + h) // f), -(-(f - 1 + w) // f)  # cells that a block touches
        rows = self.table[q0 + down : q1 + down] - self.table[q0:q1]
        cells = rows[:, p0 + across : p1 + across] - rows[:, p0:p1]
        possible = cells >= self.min_tissue * h * w / (f * f) - 1e-6
        for a0, b0, a1, b1 in forbidden:
            a0, b0 = max(-(-a0 // f) - q0, 0), max(-(-b0 // f) - p0, 0)
            possible[a0 : max(a1 // f - q0, 0), b0 : max(b1 // f - p0, 0)] = False
        blocks = np.flatnonzero(possible)
        if not blocks.size:
            return None
        every = blocks.size * f * f
        for draw in (lambda: rng.integers(every, size=DRAWS), lambda: rng.permutation(every)):
            block, corner = np.divmod(draw(), f * f)
            q, p = np.divmod(blocks[block], p1 - p0)
            row, col = (q0 + q) * f + corner // f, (p0 + p) * f + corner % f
            ok = (row0 <= row) & (row < row1) & (col0 <= col) & (col < col1)
            for a0, b0, a1, b1 in forbidden:
                ok &= (row < a0) | (row >= a1) | (col < b0) | (col >= b1)
            row, col = row[ok], col[ok]
            share = self.share(row, col, size)
            ok = share >= self.min_tissue - 1e-9
            if ok.any():
                first = ok.argmax()
                return int(row[first]), int(col[first]), float(share[first])
        return None


# --- §3 "60%/20%/20%", P2 ---


def split_patients(findings: list[Finding], seed: int) -> dict[str, str]:
    """Patient -> split, stratified by worst pathology (Q20).

    Within a pathology, patients with the same findings are dealt out in turn: whatever the seed,
    a class of five patients comes into every split, where chance would leave small sets without.
    Published splits stay. When only some patients carry one, the others are divided over the
    splits that nobody carries, in the proportion of P2 (CBIS-DDSM: test is published).
    """
    worst, splits, kinds = {}, {}, {}
    for row in findings:
        kinds.setdefault(row.patient_id, set()).add(row.finding)
        level = PATHOLOGIES.index(row.pathology)
        worst[row.patient_id] = max(worst.get(row.patient_id, 0), level)
        if row.split:
            splits[row.patient_id] = row.split
    open_splits = [s for s in SPLITS if s not in splits.values()] or list(SPLITS)
    shares = np.array([SPLIT_SHARES[s] for s in open_splits])
    open_patients = sorted(worst.keys() - splits.keys())
    for level in range(len(PATHOLOGIES)):
        patients = [p for p in open_patients if worst[p] == level]
        order = np.random.default_rng((seed, level)).permutation(len(patients))
        dealt = np.zeros_like(shares)
        for place, at in enumerate(sorted(order, key=lambda at: sorted(kinds[patients[at]]))):
            owed = (shares * (place + 1) - shares.sum() * dealt).argmax()
            splits[patients[at]] = open_splits[owed]
            dealt[owed] += 1
    return splits


# --- §3 "we generated patches according to the following quantities" ---


def _counts(train: tuple[int, ...], other: int) -> dict[str, int]:
    """Patches of each class for training, and of each class that is evaluated (P5: no benign)."""
    evaluated = {f"{split}/{name}": other for split in ("val", "test") for name in EVALUATED}
    return {f"train/{name}": n for name, n in zip(CLASSES, train, strict=True)} | evaluated


@dataclass(frozen=True)
class PrepareConfig:
    """Everything that decides the bytes of a patch set, beside the manifest."""

    patch_size: int = 256  # px, P9
    spacing_mm: float | None = None  # resample to this; None = native pixels, as the paper, Q19
    counts: dict[str, int] = field(  # "split/class": patches, P4, P5
        default_factory=lambda: _counts((400_000, 42_280, 3_500, 24_100, 6_580), 1_000)
    )
    required: tuple[str, ...] = ()  # counts the user asked for: an error when there is no source
    seed: int = 0
    min_tissue: float = 0.9  # of the window before resizing, P6, Q21
    scale: tuple[float, float] = (0.8, 1.2)  # uniform, training patches only, P7, Q22
    normals_from_annotated: bool = False  # normal patches away from boxes, too; the paper: none
    normal_margin: float = 0.125  # of the window side, between a normal patch and any box; ours
    pseudonymise: bool = False  # keyed hashes in place of patient ids and paths

    def with_counts(self, texts: Sequence[str]) -> "PrepareConfig":
        """Override counts by "split/class=N", which are then required. Raises ValueError."""
        counts = dict(self.counts)
        for text in texts:
            key, _, number = text.partition("=")
            if key not in KEYS or not number.isdecimal() or len(number) > 8:
                raise ValueError(
                    f"--count {text[:80]}: expected SPLIT/CLASS=N with N of at most 8 digits and "
                    f"one of {', '.join(KEYS)}"
                )
            counts[key] = int(number)
        required = {t.partition("=")[0] for t in texts} | set(self.required)
        return replace(self, counts=counts, required=tuple(sorted(required)))


PREPARE_PRESETS = {
    "paper": PrepareConfig(),
    # As many train patches as an hour of training draws, in the paper's order of frequency.
    "cbis": PrepareConfig(
        patch_size=128,
        spacing_mm=0.166,
        counts=_counts((40_000, 10_000, 5_000, 10_000, 5_000), 1_000) | {"test/benign_mass": 1_000},
    ),
    # 5 to 10 patches a lesion on about 1,000 images; validation and test give AUC +-0.03.
    "tiny": PrepareConfig(
        patch_size=64,
        spacing_mm=0.33,
        counts=_counts((4_000, 2_000, 1_000, 1_000, 1_000), 300) | {"test/benign_mass": 300},
    ),
}


# --- §3 "To create patches ..." ---


@dataclass(frozen=True)
class _Image:
    """An image of the manifest and the findings that each of its classes is cut from."""

    name: str  # of the outputs: the path or its pseudonym
    patient_id: str  # the same
    split: str
    rows: tuple[Finding, ...]
    classes: dict[str, tuple[Finding, ...]]  # "split/class": lesions, or boxes to keep away from


def _images(findings: list[Finding], config: PrepareConfig, hide: Callable) -> list[_Image]:
    by_path, splits, images = defaultdict(list), split_patients(findings, config.seed), []
    for row in findings:
        by_path[row.image_path].append(row)
    for path in sorted(by_path):
        rows = tuple(sorted(by_path[path], key=repr))
        split, classes = splits[rows[0].patient_id], {}
        for name in CLASSES[1:]:
            lesions = tuple(r for r in rows if f"{r.pathology}_{r.finding}" == name and r.bbox)
            if lesions:
                classes[f"{split}/{name}"] = lesions
        if all(row.pathology == "normal" for row in rows):
            classes[f"{split}/normal"] = ()
        elif config.normals_from_annotated and all(row.bbox for row in rows):
            classes[f"{split}/normal"] = rows
        images.append(_Image(hide(path), hide(rows[0].patient_id), split, rows, classes))
    return images


def patch_seed(seed: int, key: str, patch: int, attempt: int = 0) -> int:
    """60 bits from which patch i of key "split/class" is drawn, its image first; index column."""
    return int(sha256(f"{seed}/{key}/{patch}/{attempt}".encode())[:15], 16)


class _Field:
    """A decoded mammogram: where each class has its patches, and cutting them."""

    def __init__(self, image: _Image, config: PrepareConfig):
        mammogram = read_mammogram(Path(image.rows[0].image_path))
        self.uid, self.display = mammogram.image_uid, mammogram.display
        self.image, self.config = image, config
        self.tissue = Tissue(*_breast_cells(self.display), self.display.shape, config.min_tissue)
        self.side = [config.patch_size] * 2  # of a window at scale 1, in stored pixels
        if config.spacing_mm:
            spacing = image.rows[0].spacing_mm or mammogram.spacing_mm
            if spacing is None:
                raise NotUsable("no pixel spacing in manifest or header; --spacing-mm needs it")
            self.side = [config.patch_size * config.spacing_mm / mm for mm in spacing]
        self.augment = image.split == "train"
        self.masks = {
            row: self.mask_pixels(row) for row in image.rows if row.mask_path and row.bbox
        }

    def flipped(self) -> int:
        """How many boxes in air have their mirror image (rows from the bottom) on tissue."""
        count = 0
        for row0, col0, row1, col1 in {_whole(row.bbox) for row in self.image.rows if row.bbox}:
            size, mirrored = (row1 - row0, col1 - col0), self.display.shape[0] - row1
            given, other = (self.tissue.share(row, col0, size) for row in (row0, mirrored))
            count += int(given < 0.1 and other > 0.9)
        return count

    def mask_pixels(self, lesion: Finding) -> np.ndarray:
        """(n, 2) rows and columns of a lesion's mask within its box.

        The mask is brought to the image's size: CBIS-DDSM has masks of other sizes.
        """
        try:
            mask = read_mammogram(Path(lesion.mask_path)).stored != 0
        except NotUsable as error:
            raise NotUsable(f"lesion mask: {error}") from None
        shape, (row0, col0, row1, col1) = self.display.shape, _whole(lesion.bbox)
        mask = Image.fromarray(mask).resize(shape[::-1], Image.Resampling.NEAREST)
        pixels = np.argwhere(np.asarray(mask)[row0:row1, col0:col1]) + np.array([row0, col0])
        if not len(pixels):
            raise NotUsable("lesion mask: empty inside the lesion's box")
        return pixels

    def place(self, key: str, rng: np.random.Generator) -> dict | None:
        """Window, tissue, scale, flip, rotation and lesion; None when 50 tries find no place."""
        lesions, lesion = self.image.classes[key], None
        for _ in range(TRIES):
            scale = rng.uniform(*self.config.scale) if self.augment else 1.0
            h, w = (round(n / scale) for n in self.side)
            if key.endswith("/normal"):
                down, across = (math.ceil(self.config.normal_margin * n) for n in (h, w))
                away = [
                    (r0 - down - h + 1, c0 - across - w + 1, r1 + down, c1 + across)
                    for r0, c0, r1, c1 in (_whole(row.bbox) for row in lesions)
                ]
                found = self.tissue.draw(rng, (h, w), forbidden=away)
            else:  # P8: a pixel of the lesion, of its box without a mask; then an offset, Q23
                lesion = lesions[int(rng.integers(len(lesions)))]
                if lesion in self.masks:
                    row, col = rng.choice(self.masks[lesion]).tolist()
                else:
                    row0, col0, row1, col1 = _whole(lesion.bbox)
                    row, col = int(rng.integers(row0, row1)), int(rng.integers(col0, col1))
                found = self.tissue.draw(rng, (h, w), (row - h + 1, col - w + 1, row + 1, col + 1))
            if found:
                row, col, share = found
                return {
                    "window": (row, col, row + h, col + w),
                    "tissue": share,
                    "scale": scale,
                    "flip": int(rng.integers(2)) if self.augment else 0,
                    "rotation": 90 * int(rng.integers(4)) if self.augment else 0,
                    "lesion": lesion,
                }
        return None

    def cut(self, place: dict) -> tuple[np.ndarray, tuple[int, ...] | None]:
        """The patch (S, S) uint16, and the lesion's box in it."""
        (row0, col0, row1, col1), turns = place["window"], place["rotation"] // 90
        size, lesion = self.config.patch_size, place["lesion"]
        patch = resize(self.display[row0:row1, col0:col1], size)
        patch = np.rot90(patch[:, ::-1] if place["flip"] else patch, turns)
        if lesion is None:
            return to_uint16(patch), None
        down, across = size / (row1 - row0), size / (col1 - col0)
        box = (np.array(lesion.bbox) - (row0, col0, row0, col0)) * (down, across, down, across)
        r0, c0, r1, c1 = (min(max(n, 0), size) for n in _whole(box))
        if place["flip"]:
            c0, c1 = size - c1, size - c0
        for _ in range(turns):  # counter-clockwise, as np.rot90
            r0, c0, r1, c1 = size - c1, r0, size - c0, r1
        return to_uint16(patch), (r0, c0, r1, c1)


def _whole(bbox: Iterable[float]) -> tuple[int, int, int, int]:
    """A box rounded outwards to whole pixels."""
    row0, col0, row1, col1 = bbox
    return math.floor(row0), math.floor(col0), math.ceil(row1), math.ceil(col1)


def resize(window: np.ndarray, size: int) -> np.ndarray:
    """(h, w) float -> (size, size), bilinear, anti-aliased when shrinking (Q22)."""
    if window.shape == (size, size):
        return window
    return np.asarray(Image.fromarray(window).resize((size, size), Image.Resampling.BILINEAR))


# --- Patch sets: one visit per image, in any number of processes ---


def _start_worker(images: list[_Image], config: PrepareConfig, out: Path) -> None:
    """Runs in each worker after the fork."""
    for lock in _LOCKS:  # the folder is the parent's
        os.close(lock)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    _worker.update(images=images, config=config, out=out)


def _visit(index: int, tasks: list[tuple[str, int, int]]) -> dict:
    """Decode one image, cut and store the patches (key, patch, attempt) that are drawn from it."""
    image, config = _worker["images"][index], _worker["config"]
    visit = {"image": index, "uid": "", "reason": "", "dead": [], "flipped": 0}
    visit |= {"rows": [], "failed": []}
    try:
        field = _Field(image, config)
    except (ValueError, OSError) as error:  # an OSError would name the file
        reason = getattr(error, "strerror", None) or str(error)
        return visit | {"reason": " ".join(reason.split()), "failed": tasks}
    visit |= {"uid": field.uid, "flipped": field.flipped()}
    # Whether a class has any place here may not depend on which patches ask first.
    for key in sorted({key for key, _, _ in tasks}):
        if not field.place(key, np.random.default_rng((config.seed, index, KEYS.index(key)))):
            visit["dead"].append(key)
    for key, patch, attempt in tasks:
        seed = patch_seed(config.seed, key, patch, attempt)
        alive = key not in visit["dead"]
        place = field.place(key, np.random.default_rng(seed)) if alive else None
        if place is None:
            visit["failed"].append((key, patch, attempt))
            continue
        pixels, bbox = field.cut(place)
        row = (*place["window"], f"{place['scale']:.6f}", place["flip"], place["rotation"])
        row += (seed, f"{place['tissue']:.4f}", *(bbox or ("",) * 4))
        text, body = ",".join(map(str, row)), np.ascontiguousarray(pixels).tobytes()
        os.pwrite(_store(_worker["out"], key), body, NPY_HEADER + patch * len(body))
        visit["rows"].append((key, patch, text, zlib.crc32(body, zlib.crc32(text.encode()))))
    return visit


@functools.cache
def _store(out: Path, key: str) -> int:
    """A class's patches, open in a worker; the parent may make the file anew and keeps none."""
    return os.open(out / "patches" / f"{key}.npy", os.O_RDWR)


def prepare(
    findings: list[Finding],
    out: Path,
    config: PrepareConfig,
    workers: int = 1,
    qc: int = 0,
    notes: Sequence[str] = (),
) -> None:
    """Findings -> patch set in `out`; goes on where it was interrupted.

    Raises ValueError: contradictory findings, a class that was asked for and is not there, the same
    image with two patients, no space; OSError: files that cannot be written.
    """
    _raise_all("the source: found", check_findings(findings), "correct it")
    if config.spacing_mm and not 1e-3 < config.spacing_mm < 10:
        text = "expected 0.001 to 10, or 0 for native pixels"
        raise ValueError(f"--spacing-mm {config.spacing_mm}: {text}")
    run = _Run(findings, out, config)
    base = os.path.commonpath([os.path.dirname(row.image_path) for row in findings])
    rows = [(os.path.relpath(row.image_path, base), row) for im in run.images for row in im.rows]
    rows = [(name, replace(row, image_path="", mask_path="")) for name, row in rows]
    settings = {"source": sha256(repr(rows).encode()), "key": run.hide("key")}
    with claim_folder(out, "prepare", asdict(config) | settings):
        if read_json(out / "config.json")["complete"]:
            click.echo(f"{out}: complete already", err=True)
        else:
            run.make_room()
            run.cut(workers)
            run.finish(notes)
        shutil.rmtree(out / "work", ignore_errors=True)
        if qc:
            contact_sheet(run.images, config, out, qc)


def _pseudonyms(wanted: bool) -> Callable[[str], str]:
    """Keyed hash of a patient id or path (HMAC-SHA256); without `wanted`, the text itself.

    The key comes from the environment and is kept nowhere: whoever holds it can link patients to
    pseudonyms, the outputs alone cannot, and the same key goes on with the same folder.
    """
    if not wanted:
        return lambda text: text
    key = os.environ.get(PSEUDONYM_KEY, "").encode()
    if len(key) < 16:
        raise ValueError(
            f"--pseudonymise: environment variable {PSEUDONYM_KEY} has {len(key)} characters; "
            f"expected a secret of 16 or more; export {PSEUDONYM_KEY}=$(openssl rand -hex 32)"
        )
    return lambda text: hmac.new(key, text.encode(), "sha256").hexdigest()[:16]


class _Run:
    """`prepare` at work.

    A patch goes to the image of its first attempt; where that image has no place for it, to that of
    its next. Each image is visited once with all patches that want it; only patches sent on to an
    image that was visited already cause a second visit. `work/visits.jsonl` has a line per visit:
    what it holds is done, whenever the run is killed.
    """

    def __init__(self, findings: list[Finding], out: Path, config: PrepareConfig):
        self.out, self.config, self.hide = out, config, _pseudonyms(config.pseudonymise)
        self.images = _images(findings, config, self.hide)
        self.sources = {  # "split/class": images it is drawn from
            key: [index for index, image in enumerate(self.images) if key in image.classes]
            for key in KEYS
            if config.counts.get(key)
        }
        self.skipped: dict[str, str] = {}
        self.texts = {key: [None] * config.counts[key] for key in self.sources}  # image, index row
        self.visits: dict[int, dict] = {}  # the last one of each image
        self.pending = defaultdict(list)  # image: patches that want it
        self.dead = {key: set() for key in self.sources}  # images without a place for a class
        self.same = defaultdict(set)  # image_uid: images
        for key in [key for key, indexes in self.sources.items() if not indexes]:
            hint = ", but see --normals-from-annotated" if key.endswith("/normal") else ""
            self.skip(key, f"the source holds none{hint}")
        if not self.sources:
            found = f"found no wanted class in {len(self.images)} images"
            text = "expected normal images, or boxes with a pathology; see --normals-from-annotated"
            raise ValueError(f"the source: {found}; {text} and --birads-as-pathology")
        splits = [split for _, split in {(im.patient_id, im.split) for im in self.images}]
        said = ", ".join(f"{split} {splits.count(split)}" for split in SPLITS)
        click.echo(f"patients: {said}", err=True)

    def skip(self, key: str, why: str, example: str = "") -> None:
        text = f"{key}: {why}; {self.config.counts[key]} patches wanted"
        if key in self.config.required:
            raise ValueError(f"--count {text}{example}")
        self.skipped[key] = why
        del self.sources[key], self.texts[key]
        click.echo(f"{text}: skipped", err=True)

    def make_room(self) -> None:
        """Files for every patch, their whole size reserved. Raises ValueError, OSError."""
        size, sizes = self.config.patch_size, {}
        for key, texts in self.texts.items():
            path, length = self.path(key), NPY_HEADER + 2 * len(texts) * size**2
            if not path.exists() or path.stat().st_size != length:
                sizes[path] = length, (len(texts), size, size)
        needed = sum(length for length, _ in sizes.values())
        needed += 500 * sum(map(len, self.texts.values()))  # indexes and the work folder
        if needed > (free := shutil.disk_usage(self.out).free):
            text = f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            raise ValueError(f"{self.out}: {text}; make room or lower --count")
        (self.out / "work").mkdir(exist_ok=True)
        for path, (length, shape) in sizes.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                header = {"descr": "<u2", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                assert file.tell() == NPY_HEADER
                file.flush()
                os.posix_fallocate(file.fileno(), 0, length)

    def path(self, key: str) -> Path:
        return self.out / "patches" / f"{key}.npy"

    def stored(self, key: str, patch: int, text: str, checksum: int) -> bool:
        """Whether the patch of an index row is on the disk as it was cut."""
        size = 2 * self.config.patch_size**2
        with open(self.path(key), "rb") as file:
            body = os.pread(file.fileno(), size, NPY_HEADER + patch * size)
        return zlib.crc32(body, zlib.crc32(text.encode())) == checksum

    def send(self, key: str, patch: int, attempt: int) -> None:
        """Give a patch to the image of its first attempt from `attempt` that may have a place."""
        while key in self.sources:
            draw = patch_seed(self.config.seed, key, patch, attempt)
            image = self.sources[key][draw * len(self.sources[key]) >> 60]
            if image not in self.dead[key]:
                self.pending[image].append((key, patch, attempt))
                return
            attempt += 1

    def learn(self, visit: dict, rows: Iterable) -> None:
        """Take in a visit, this run's or an earlier one's.

        Raises ValueError: an image of two patients, or normal tissue of an image with a lesion.
        """
        index, image = visit["image"], self.images[visit["image"]]
        self.visits[index] = visit
        for key, patch, text, _ in rows:
            self.texts[key][patch] = index, text
        gone = image.classes if visit["reason"] else visit["dead"]
        for key in sorted(self.sources.keys() & gone):
            self.dead[key].add(index)
            if len(self.dead[key]) == len(self.sources[key]):
                example = f"; {image.name}: {self.reason(index)}"
                self.skip(key, "no image has a place for it", example)
        same = self.same[visit["uid"] or index]
        same.add(index)
        twins = sorted((self.images[i] for i in same), key=lambda twin: twin.name)
        names = " and ".join(twin.name for twin in twins)
        if len(patients := {twin.patient_id for twin in twins}) > 1:
            text = f"and yet of patients {' and '.join(sorted(patients))}; correct the source"
            raise ValueError(f"{names} are the same image, {text}")
        findings = {tuple((r.finding, r.pathology, r.bbox) for r in twin.rows) for twin in twins}
        if len(findings) > 1 and any("/normal" in key for twin in twins for key in twin.classes):
            text = "and yet with other findings; list these under one of the names"
            raise ValueError(f"{names} are the same image, {text}")

    def tasks(self, index: int) -> list[tuple[str, int, int]]:
        """What an image is visited for; what it is known to have no place for goes on."""
        tasks = self.pending.pop(index, [])
        for key, patch, attempt in tasks:
            if index in self.dead[key]:
                self.send(key, patch, attempt + 1)
        return [task for task in tasks if index not in self.dead[task[0]]]

    def cut(self, workers: int) -> None:
        """Cut every patch that no earlier run has cut."""
        record = self.out / "work" / "visits.jsonl"
        for visit in _read_lines(record):
            self.learn(visit, [row for row in visit.pop("rows") if self.stored(*row)])
        for key, texts in self.texts.items():
            for patch in [patch for patch, text in enumerate(texts) if text is None]:
                self.send(key, patch, 0)
        total, left = (sum(map(len, d.values())) for d in (self.texts, self.pending))
        wanted = sorted({index for indexes in self.sources.values() for index in indexes})
        queue, running = deque(index for index in wanted if index not in self.visits), {}
        with (
            open(record, "a", encoding="utf-8") as lines,
            progress(total, "patches", done=total - left) as advance,
            _pool(workers, self.images, self.config, self.out) as pool,
        ):
            while queue or running or self.pending:
                while (queue or self.pending) and len(running) < 2 * workers:
                    index = queue.popleft() if queue else next(iter(self.pending))
                    if (tasks := self.tasks(index)) or index not in self.visits:
                        running[pool.submit(_visit, index, tasks)] = index
                for future in concurrent.futures.wait(running, return_when="FIRST_COMPLETED")[0]:
                    try:
                        visit = future.result()
                    except concurrent.futures.process.BrokenProcessPool:
                        names = ", ".join(self.images[index].name for index in running.values())
                        raise ValueError(
                            f"a worker process died at one of {names}; leave the damaged one out, "
                            "or give fewer --workers if the memory was too small"
                        ) from None
                    del running[future]
                    failed = visit.pop("failed")
                    lines.write(json.dumps([_checksum(visit), visit]) + "\n")
                    lines.flush()
                    rows = visit.pop("rows")
                    self.learn(visit, rows)
                    for key, patch, attempt in failed:
                        self.send(key, patch, attempt + 1)
                    advance(len(rows))

    def reason(self, index: int) -> str:
        """Why an image gave no patch."""
        dead = [key for key in sorted(self.dead) if index in self.dead[key]]
        if index not in self.visits:
            if any(row.finding and not row.bbox for row in self.images[index].rows):
                return "a finding without a box: nobody knows where its lesion lies"
            return f"none of its findings is a class wanted in {self.images[index].split}"
        if dead and not self.visits[index]["reason"]:
            return f"no window with enough tissue for {dead[0]}"
        return self.visits[index]["reason"] or "usable; no patch happened to be drawn from it"

    def finish(self, notes: Sequence[str]) -> None:
        """Write the tables, then mark the patch set whole."""
        images, out = self.images, self.out
        for key in self.skipped:
            self.path(key).unlink(missing_ok=True)
        for key, texts in self.texts.items():
            with open(self.path(key), "rb") as file:
                os.fsync(file.fileno())
            rows = (
                (patch, self.visits[index]["uid"], images[index].patient_id, *text.split(","))
                for patch, (index, text) in enumerate(texts)
            )
            write_table(self.path(key).with_suffix(".csv"), INDEX_COLUMNS, rows)
        used = {index for texts in self.texts.values() for index, _ in texts}
        excluded = [(im.name, self.reason(i)) for i, im in enumerate(images) if i not in used]
        write_table(out / "excluded.csv", ("image_path", "reason"), excluded)
        splits = {image.patient_id: image.split for image in images}
        write_table(out / "splits.csv", ("patient_id", "split"), sorted(splits.items()))
        rows = (
            (
                *(image.name, image.patient_id, row.laterality, row.view, row.finding),
                *(row.pathology, *(row.bbox or ("",) * 4)),
                *(row.mask_path and self.hide(row.mask_path), *(row.spacing_mm or ("",) * 2)),
                image.split,
            )
            for image in (images[index] for index in sorted(used))
            for row in image.rows
        )
        write_table(out / "manifest.csv", MANIFEST_COLUMNS + MANIFEST_OPTIONAL, rows)
        used = f"{len(images) - len(excluded)} of {len(images)} images gave patches"
        click.echo(f"{used}{'; the others: excluded.csv' if excluded else ''}", err=True)
        if not self.texts:
            raise ValueError(
                f"{out}: no patch could be cut; excluded.csv says why for each image, the first: "
                f"{excluded[0][1]}; give other options and a new --out"
            )
        duplicates = sorted(sorted(same) for same in self.same.values() if len(same) > 1)
        duplicates = [[images[index].name for index in same] for same in duplicates]
        said = [f"the same image under {len(n)} names: {', '.join(n)}" for n in duplicates]
        if flipped := sum(visit["flipped"] for visit in self.visits.values()):
            said.append(f"{FLIPPED}: {flipped}.")
            notes = [*notes, said[-1]]
        for text in said:
            click.echo(text, err=True)
        finish_folder(
            out,
            counts={key: len(texts) for key, texts in self.texts.items()},
            skipped=self.skipped,
            images={"used": len(used), "excluded": len(excluded)},
            patients={split: list(splits.values()).count(split) for split in SPLITS},
            duplicates=duplicates,
            notes=list(notes),
        )


@contextlib.contextmanager
def _pool(workers: int, *work: object) -> Iterator[concurrent.futures.Executor]:
    """Worker processes that end at once when the block is left by an exception."""
    before = set(multiprocessing.active_children())
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("fork"), initializer=_start_worker, initargs=work
    )
    with pool:
        try:
            with _signals_after():  # Python drops a KeyboardInterrupt that comes while it forks
                pool.submit(os.getpid).result()  # forks all workers
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()
            raise


@contextlib.contextmanager
def _signals_after() -> Iterator[None]:
    """SIGINT and SIGTERM that come meanwhile interrupt at the end of the block."""
    came, numbers = [], (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: came.append(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def _read_lines(path: Path) -> Iterator[dict]:
    """The visits of earlier runs, without lines that a kill cut off or that were damaged."""
    if path.exists():
        with open(path, "a+", encoding="utf-8", errors="replace") as file:
            file.write("\n")  # a cut line stays by itself
            file.seek(0)
            for line in file:
                with contextlib.suppress(ValueError, TypeError):
                    checksum, visit = json.loads(line)
                    if checksum == _checksum(visit):
                        yield visit


def _checksum(visit: dict) -> int:
    return zlib.crc32(json.dumps(visit).encode())


def contact_sheet(images: list[_Image], config: PrepareConfig, out: Path, number: int) -> None:
    """`out/qc.png`: images with mask outline, lesion boxes and patch windows drawn in."""
    colours = dict(zip(CLASSES, ("cyan", "red", "orange", "magenta", "yellow"), strict=True))
    kept = set(read_table(out / "manifest.csv", ("image_path",))["image_path"].tolist())
    images = [image for image in images if image.name in kept]
    images = [images[i] for i in np.unique(np.linspace(0, len(images) - 1, number).astype(int))]
    windows = defaultdict(list)
    for key in read_json(out / "config.json")["counts"]:
        table = read_table(out / "patches" / f"{key}.csv", ("image_uid", *BOX))
        for uid, *window in zip(*table.values(), strict=True):
            windows[uid].append((colours[key.split("/")[1]], 0.7, map(float, window)))
    shape = -(-len(images) // 4), min(4, len(images))
    figure = Figure((4 * shape[1], 4.6 * shape[0]), dpi=100)
    for place, image in enumerate(images, start=1):
        field, first = _Field(image, config), image.rows[0]
        (height, width), step = field.display.shape, max(field.display.shape) // 900 + 1
        axes = figure.add_subplot(*shape, place)
        extent = (0, width, height, 0)
        axes.imshow(field.display[::step, ::step], cmap="gray", extent=extent)
        outline = breast_mask(field.display)[::step, ::step]
        at = np.arange(0, width, step), np.arange(0, height, step)
        axes.contour(*at, outline, [0.5], colors="lime", linewidths=0.8)
        shown = windows[field.uid][:: len(windows[field.uid]) // 12 + 1]
        for row in image.rows:
            colour = colours.get(f"{row.pathology}_{row.finding}", "white")
            shown += [(colour, 2, row.bbox)] if row.bbox else []
        for colour, line, (row0, col0, row1, col1) in shown:
            style = {"fill": False, "edgecolor": colour, "linewidth": line}
            box = Rectangle((col0, row0), col1 - col0, row1 - row0, **style)
            axes.add_patch(box)
        title = f"{field.uid}  {image.split}  {first.laterality} {first.view}  "
        title += f"{len(windows[field.uid])} patches, {len(shown)} boxes drawn"
        axes.set(aspect=field.side[1] / field.side[0], xticks=[], yticks=[])
        axes.set_title(title, fontsize=7)
    text = "lime: breast mask; thick: lesion boxes; thin: patch windows; "
    text += ", ".join(f"{name} {colour}" for name, colour in colours.items())
    figure.suptitle(text, fontsize=8)
    figure.tight_layout()
    with replace_file(out / "qc.png") as file:
        figure.savefig(file, format="png")


# --- Patch sets: reading ---


def patch_config(data: Path) -> dict:
    """The configuration of a finished patch set, with its fingerprint. Raises ValueError."""
    found = finished(Path(data), "prepare")
    config, counts = found["config"], found.get("counts")
    sizes = [config.get("patch_size"), *(counts.values() if isinstance(counts, dict) else [None])]
    if not all(isinstance(n, int) and n > 0 for n in sizes) or not set(counts).issubset(KEYS):
        raise ValueError(f"{data}/config.json: damaged (patch_size or counts); run prepare again")
    notes = {"notes": found["notes"]} if found.get("notes") else {}  # BI-RADS as pathology, say
    return config | {"held": counts, "fingerprint": fingerprint(data)} | notes


def fingerprint(data: Path) -> str:
    """Names a patch set in everything made from it: a hash over options, splits and indexes."""
    data = Path(data)
    config = json.dumps(read_json(data / "config.json").get("config"), sort_keys=True)
    return sha256(config.encode(), data / "splits.csv", *sorted(data.glob("patches/*/*.csv")))


def open_patches(data: Path, split: str, name: str) -> np.ndarray:
    """(N, S, S) uint16 memory map of one class. Raises ValueError when it is missing or damaged."""
    config, key = patch_config(data), f"{split}/{name}"
    if key not in config["held"]:
        raise ValueError(f"{data}: holds no {key}; found {', '.join(sorted(config['held']))}")
    shape = (config["held"][key], config["patch_size"], config["patch_size"])
    return _open_array(Path(data) / "patches" / f"{key}.npy", shape, np.uint16)


def _open_array(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError:
        raise
    except Exception as error:  # a damaged header makes numpy raise almost anything
        raise ValueError(f"{path}: damaged ({error}); make it again") from None
    found = f"{getattr(array, 'shape', None)} {getattr(array, 'dtype', None)}"
    if found != (expected := f"{shape} {np.dtype(dtype)}"):
        raise ValueError(f"{path}: holds {found}; expected {expected}; make it again")
    return array


def split_of(data: Path) -> dict[str, str]:
    """Patient -> split."""
    table = read_table(Path(data) / "splits.csv", ("patient_id", "split"))
    return dict(zip(table["patient_id"].tolist(), table["split"].tolist(), strict=True))


# --- Synthetic sets: reading (postprocess.py writes them) ---


@dataclass(frozen=True, eq=False)
class SyntheticSet:
    """A finished synthetic set; arrays are memory maps (N, S, S)."""

    path: Path
    task: str  # mass, calcification, removal
    control: str  # "" or blob
    label: int  # 1 lesion added, 0 removed
    patch_size: int
    short: bool  # fewer accepted than requested
    requested: int
    fingerprint: str
    data_fingerprint: str  # of the patch set its sources are from
    generator: str  # hash of the weights
    input: np.ndarray  # uint16
    combined: np.ndarray  # uint16
    lesion: np.ndarray  # int32, combined - input
    mask: np.ndarray  # bool, the object before expansion
    index: dict[str, np.ndarray]


def open_synthetic(path: Path) -> SyntheticSet:
    """Raises ValueError when the set is unfinished, damaged or no synthetic set."""
    path = Path(path)
    found = finished(path, "synthesize")
    index = read_table(path / "index.csv", SYNTHETIC_COLUMNS)
    try:
        config = found["config"]
        values = {name: str(config[name]) for name in ("task", "control", "generator")}
        values |= {"data_fingerprint": str(config["data"]), "requested": int(config["n"])}
        values |= {"short": bool(found["short"]), "patch_size": int(config["patch_size"])}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}/config.json: damaged ({error}); run synthesize again") from None
    shape = (len(index["sample"]), values["patch_size"], values["patch_size"])
    types = {"input": np.uint16, "combined": np.uint16, "lesion": np.int32, "mask": np.bool_}
    return SyntheticSet(
        path=path,
        label=0 if values["task"] == "removal" else 1,
        fingerprint=sha256(json.dumps(found, sort_keys=True).encode(), path / "index.csv"),
        **{name: _open_array(path / f"{name}.npy", shape, t) for name, t in types.items()},
        index=index,
        **values,
    )


def check_synthetic(syn: SyntheticSet, data: Path) -> None:
    """Raises ValueError unless every sample comes from a training patient of this patch set.

    Sets carry the hash of the patch set and of each source image: both are compared, not trusted.
    """
    config, splits = patch_config(data), split_of(data)
    side, again = config["patch_size"], f"synthesize it again from {data}"
    if syn.patch_size != side:
        raise ValueError(f"{syn.path}: patches of {syn.patch_size} px; expected {side} as {data}")
    if syn.data_fingerprint != config["fingerprint"]:
        raise ValueError(f"{syn.path}: made from another patch set; {again}")
    leaked = sorted({p for p in syn.index["patient_id"].tolist() if splits.get(p) != "train"})
    if leaked:
        first = f"such as {leaked[0]} ({splits.get(leaked[0], 'unknown')})"
        text = f"{len(leaked)} source patients are not in train, {first}"
        raise ValueError(f"{syn.path}: {text}; {again}")
    columns, trained = ("image_uid", "patient_id"), set()
    for path in Path(data).glob("patches/train/*.csv"):
        trained |= set(zip(*read_table(path, columns).values(), strict=True))
    if foreign := set(zip(*(syn.index[c] for c in columns), strict=True)) - trained:
        first = "such as {} of {}".format(*min(foreign))
        text = f"{len(foreign)} source images are not in train, {first}"
        raise ValueError(f"{syn.path}: {text}; {again}")
