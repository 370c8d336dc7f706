"""§3 Dataset details: mammograms with annotations -> breast mask, splits, 256 x 256 patches.

Patches are (N, S, S) uint16 on disk, 0..65535 mapping linearly to [-1, 1] (DESIGN section 4).
"""

import contextlib
import csv
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

SPLITS = ("train", "val", "test")
CLASSES = (
    "normal",
    "malignant_mass",
    "benign_mass",
    "malignant_calcification",
    "benign_calcification",
)


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
    """Write beside `path`, sync, rename over it: a reader sees the old file or the whole new one."""
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
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def read_table(path: Path, columns: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The named columns of a CSV as arrays of str. Raises ValueError when one is missing."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            if missing := [c for c in columns if c not in header]:
                raise ValueError(f"{path}: column {missing[0]!r} is missing; found {header}")
            at = [header.index(c) for c in columns]
            rows = [[row[i] for i in at] for row in reader if row]
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (UnicodeDecodeError, csv.Error, IndexError) as error:
        raise ValueError(f"{path}: not readable as CSV ({error})") from None
    values = list(zip(*rows, strict=True)) if rows else [()] * len(columns)
    return {c: np.array(v, dtype=str) for c, v in zip(columns, values, strict=True)}


@contextlib.contextmanager
def claim_folder(out: Path, command: str, config: dict) -> Iterator[bool]:
    """Own the output folder `out` of `command` while the block runs; yields True when it goes on.

    The first call writes `out/config.json` ({"command", "config", ...}); a later one with the same
    command and config goes on there. `config` holds JSON values and whatever decides the bytes
    written, and nothing else (no workers, no device).

    Raises ValueError: another process works there, another command or other options made it, or
    it holds files that are not ours.
    """
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out, os.O_RDONLY)  # the lock is on the folder: no lock file to leave behind
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{out}: another process is writing there; wait for it or give another folder"
            ) from None
        path = out / "config.json"
        config = json.loads(json.dumps(config))
        resumed = path.exists()
        if resumed:
            found = read_json(path)
            if found.get("command") != command:
                raise ValueError(
                    f"{out}: made by {found.get('command')!r}, not by {command!r}; "
                    "give another folder"
                )
            if differences := _differences(found.get("config"), config):
                raise ValueError(
                    f"{out}: made with other options ({'; '.join(differences)}); "
                    "give the same options to go on, or another folder"
                )
        elif foreign := sorted(p.name for p in out.iterdir() if not p.name.endswith(".part")):
            raise ValueError(
                f"{out}: holds {foreign[0]!r} but no config.json; give an empty or a new folder"
            )
        else:
            write_json(path, {"command": command, "config": config, "complete": False})
        yield resumed
    finally:
        os.close(descriptor)


def _differences(found: object, wanted: dict) -> list[str]:
    found = found if isinstance(found, dict) else {}
    return [
        f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} now"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]


def finish_folder(out: Path, **facts: object) -> None:
    """Mark a claimed folder whole and add what is known only at the end."""
    write_json(out / "config.json", read_json(out / "config.json") | facts | {"complete": True})


def sha256(*parts: bytes | Path) -> str:
    """One hex digest over bytes and files, in order."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with open(part, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        else:
            digest.update(part)
    return digest.hexdigest()


# --- Progress ---


@contextlib.contextmanager
def progress(total: int, label: str, done: int = 0, every: float = 15.0) -> Iterator:
    """Yields `advance(n, text="")`: a bar on a terminal, elsewhere a line every `every` seconds."""
    if sys.stderr.isatty():
        shown = {"text": ""}
        with click.progressbar(
            length=total,
            label=label,
            file=sys.stderr,
            show_pos=True,
            item_show_func=lambda _: shown["text"],
        ) as bar:
            bar.update(done)

            def advance(n: int = 1, text: str = "") -> None:
                shown["text"] = text
                bar.update(n, current_item=text)

            yield advance
        return
    start = last = time.monotonic()
    count = done

    def advance(n: int = 1, text: str = "") -> None:
        nonlocal count, last
        count += n
        now = time.monotonic()
        if now - last >= every or count == total:
            last = now
            rate = (count - done) / max(now - start, 1e-9)
            left = (total - count) / rate if rate else 0.0
            click.echo(
                f"{label}: {count}/{total}  {rate:.1f}/s  {left:.0f} s left  {text}".rstrip(),
                err=True,
            )

    yield advance
