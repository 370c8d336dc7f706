"""Files that are whole or absent: atomic writing, JSON, CSV tables, arrays, hashes."""

import contextlib
import csv
import hashlib
import itertools
import json
import math
import os
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np


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


@contextlib.contextmanager
def reading(path: Path, advice: str = "make it again") -> Iterator[None]:
    """The one way to say that a file is missing or damaged: a ValueError that names it.

    Damaged files make numpy, torch and json raise almost anything, and so does code that takes
    for granted what they hold.
    """
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:
        if isinstance(error, OSError) and error.filename:  # it cannot be opened
            raise
        text = str(error).partition("\n")[0].partition(". ")[0]
        text = textwrap.shorten(text, 200, placeholder=" ...") or "no reason given"
        text = text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
        raise ValueError(f"{path}: damaged ({text}); {advice}") from None


def write_json(path: Path, value: object) -> None:
    with replace_file(path, "w") as file:
        json.dump(value, file, indent=1, sort_keys=True, allow_nan=False)
        file.write("\n")


def read_json(path: Path) -> dict:
    """Raises ValueError that names the file when it is missing, damaged or no JSON object."""
    with reading(path):
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    return value


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """CSV with a header; `rows` yields sequences in the order of `columns`."""
    with replace_file(path, "w") as file:
        csv.writer(file, lineterminator="\n").writerows(itertools.chain([columns], rows))


def read_table(path: Path, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """The named columns of a CSV as arrays of str. Raises ValueError when one is missing."""
    rows = [row for _, row in csv_rows(path, tuple(columns))]
    return {name: np.array([row[name] for row in rows], dtype=str) for name in columns}


def csv_rows(
    path: Path, columns: Sequence[str], optional: Sequence[str] = (), delimiter=",", damaged=None
) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and named columns of each row; an absent optional column is "" throughout.

    damaged: is told of a row with too few or too many fields, which is passed over then
    Raises ValueError: no such file, no CSV in UTF-8, a column missing or twice, a row too short.
    """
    expected = f"expected UTF-8 with fields parted by {delimiter!r}"
    with (
        reading(path, f"{expected}; correct it"),
        open(path, encoding="utf-8-sig", newline="") as file,
    ):
        reader = csv.reader(file, delimiter=delimiter)
        header = [name.strip() for name in next(reader, [])]
        for name in (*columns, *optional):
            if header.count(name) > 1 or (name in columns and name not in header):
                count = "is there twice" if name in header else "is missing"
                found = ", ".join(header[:20])[:300]
                raise ValueError(f"column {name!r} {count}; found {found!r}")
        for row in filter(None, reader):
            if len(row) != len(header):
                count = f"{len(row)} fields; expected {len(header)}, as its header"
                if damaged is None:
                    raise ValueError(f"line {reader.line_num} has {count}")
                damaged(f"{path} line {reader.line_num} has {count}")
            else:
                told = dict(zip(header, row, strict=True))
                yield reader.line_num, {n: told.get(n, "") for n in (*columns, *optional)}


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


def open_array(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """A memory map of `path` (.npy). Raises ValueError when it does not hold what is expected."""
    with reading(path):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if (array.shape, array.dtype) != (shape, np.dtype(dtype)):
            found = f"{array.shape} {array.dtype}"
            raise ValueError(f"holds {found}; expected {shape} {np.dtype(dtype)}")
    return array


def sha256(*parts: bytes | np.ndarray | Path) -> str:
    """One hex digest over bytes, contiguous arrays and files, in order."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with open(part, "rb") as file:
                hashlib.file_digest(file, lambda: digest)
        else:
            digest.update(part)
    return digest.hexdigest()
