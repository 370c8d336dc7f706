"""Manifest and public data sets, as they are distributed -> findings.

Boxes are (row0, col0, row1, col1), half-open, in stored pixels, origin top left. What a data set
does not know stays empty: `pathology` "" gives no lesion patch, and its region no normal patch.
Distributed files are data: nothing in them is evaluated, and no path in them may leave the data
set's folder.
"""

import functools
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path

import click

from support.files import csv_rows, numbers, write_table
from support.mammogram import image_size
from support.sources import common
from support.sources.cbis_ddsm import read_cbis_ddsm
from support.sources.common import FINDINGS, PATHOLOGIES, SPLITS, Finding, Traps, look, plain_id
from support.sources.embed import read_embed
from support.sources.inbreast import read_inbreast
from support.sources.mini_mias import read_mini_mias
from support.sources.omidb import read_omidb
from support.sources.rsna import read_rsna
from support.sources.vindr import read_vindr

# --- Manifest: one row per finding, or per image without one ---

BOX = ("row0", "col0", "row1", "col1")
SPACING = ("spacing_row_mm", "spacing_col_mm")
MANIFEST_COLUMNS = ("image_path", "patient_id", "laterality", "view", "finding", "pathology", *BOX)
MANIFEST_OPTIONAL = ("mask_path", *SPACING, "split", "density")
MANIFEST_WORDS = {"laterality": ("L", "R"), "finding": ("", *FINDINGS), "pathology": PATHOLOGIES}
MANIFEST_WORDS |= {"split": ("", *SPLITS), "density": ("", *"abcd")}


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
    raise_all(f"{path}: found", problems + check_findings(findings), "correct the manifest")
    return findings


def _finding(row: dict[str, str], folder: Path) -> Finding:
    row = {name: value.strip() for name, value in row.items()}
    row["patient_id"] = plain_id(row["patient_id"])
    row |= {name: row[name].lower() for name in ("finding", "pathology", "split", "density")}
    row["density"] = common.DENSITY.get(plain := row["density"].removesuffix(".0"), plain)
    row |= {name: row[name].upper() for name in ("laterality", "view")}
    for name in ("image_path", "patient_id", "view"):
        if not row[name]:
            raise ValueError(f"{name} is empty")
    for name, words in MANIFEST_WORDS.items():
        if row[name] not in words:
            wanted = "/".join(word or "empty" for word in words)
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
    paths = {name: str(folder / row[name]) for name in ("image_path", "mask_path") if row[name]}
    words = {name: row[name] for name in ("patient_id", "view", *MANIFEST_WORDS)}
    return Finding(**words, **paths, bbox=bbox, spacing_mm=spacing)


def write_manifest(path: Path, findings: list[Finding], **more: list[str]) -> None:
    """What `read_manifest` reads; more: further columns, which it passes over."""
    rows = (
        (*words, *(box or ("",) * 4), mask, *(spacing or ("",) * 2), split, density, *told)
        for (*words, box, mask, spacing, split, density), *told in zip(
            map(astuple, findings), *more.values(), strict=True
        )
    )
    write_table(path, (*MANIFEST_COLUMNS, *MANIFEST_OPTIONAL, *more), rows)


def check_findings(findings: list[Finding]) -> list[str]:
    """What contradicts itself or the files, one line each."""
    images, splits, problems = defaultdict(list), defaultdict(set), []
    for row in findings:
        images[row.image_path].append(row)
        splits[row.patient_id].add(row.split)
    for patient, given in sorted(splits.items()):
        if len(given - {""}) > 1:
            problems.append(f"patient {patient} in splits {', '.join(sorted(given - {''}))}")
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
        normal = [row for row in rows if row.pathology == "normal"]
        if any(r.finding or r.bbox for r in (rows if normal else ())):
            problems.append(f"{path}: normal, and yet with a finding")
        elif len({(row.finding, row.bbox) for row in rows}) < len(rows):
            problems.append(f"{path}: {'normal' if normal else 'the same finding and box'} twice")
        for box in [row.bbox for row in rows if row.bbox]:
            height, width = image_size(path) or (math.inf, math.inf)
            if box[2] > height or box[3] > width:
                problems.append(f"{path}: box {box} outside the image of {height, width} pixels")
    return problems


def look_alikes(findings: list[Finding]) -> list[str]:
    """Patient ids that differ, and yet may be one patient's, one line for each."""
    alike = defaultdict(list)
    for patient in sorted({row.patient_id for row in findings}):
        alike[look(patient)].append(repr(patient))
    return [f"{', '.join(ids)} look alike" for ids in alike.values() if len(ids) > 1]


def raise_all(what: str, problems: list[str], advice: str) -> None:
    """One ValueError for all problems, when there are any."""
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ValueError(f"{what} {count}: {'; '.join(problems[:10])}{more}; {advice}")


# --- Public data sets: the formats of `prepare` ---

REPEATED = "Findings with the type and box of another one, joined, the worst pathology kept"
NO_PATHOLOGY = "Findings without pathology in the data set: "
BIRADS_USED = "BI-RADS 4 to 6 stand for malignant, 2 and 3 for benign (--birads-as-pathology)"
BIRADS_UNUSED = "no lesion patches without --birads-as-pathology"


def _read(
    read: Callable, has_pathology: bool, path: Path, birads_as_pathology: bool
) -> tuple[list[Finding], list[str]]:
    """The findings of the data set in folder `path`, and a sentence for each trap that was met.

    Raises ValueError: no such folder, a damaged table, none of the images, or BI-RADS asked to
    stand for a pathology that the data set holds.
    """
    root, traps, findings = Path(path).absolute(), Traps(), {}
    if not root.is_dir():
        raise ValueError(f"{path}: expected the folder of the data set")
    if birads_as_pathology and has_pathology:
        raise ValueError("--birads-as-pathology: this data set holds pathology; leave it out")
    rows = list(read(root, traps))
    damaged = [key for key in traps if key[0] == common.DAMAGED]
    spoiled = {path for *_, path in damaged}
    rows = [row for row in rows if row.image_path not in spoiled]
    if damaged and not any(row.bbox or row.pathology == "normal" for row in rows):
        raise ValueError(damaged[0][1])  # there is nothing else
    for _, error, _ in damaged[:10]:  # here alone: notes go into the patch set
        click.echo(f"{error}: left out", err=True)
    for row in rows:
        row = replace(row, patient_id=plain_id(row.patient_id))
        if not has_pathology and not birads_as_pathology and row.pathology != "normal":
            row = replace(row, pathology="")
        same = findings.setdefault((row.image_path, row.finding, row.bbox), [])
        traps[REPEATED] += bool(same)
        same.append(row)
    if not findings:
        raise ValueError(f"{path}: found no image that its tables list; is the download complete?")
    worst = [max(rows, key=lambda r: PATHOLOGIES.index(r.pathology)) for rows in findings.values()]
    if not has_pathology:  # no silent stand-in: the notes say what the pathology rests on
        note = NO_PATHOLOGY + (BIRADS_USED if birads_as_pathology else BIRADS_UNUSED)
        traps[note] += sum(bool(row.finding) for row in worst)
    met = Counter(trap if isinstance(trap, str) else trap[0] for trap in traps.elements())
    return worst, [f"{sentence}: {count}." for sentence, count in met.items()]


# A folder, and whether BI-RADS stands for pathology -> findings, a sentence for each trap
READERS: dict[str, Callable[[Path, bool], tuple[list[Finding], list[str]]]] = {
    "omidb": functools.partial(_read, read_omidb, True),
    "cbis-ddsm": functools.partial(_read, read_cbis_ddsm, True),
    "vindr": functools.partial(_read, read_vindr, False),
    "inbreast": functools.partial(_read, read_inbreast, False),
    "mini-mias": functools.partial(_read, read_mini_mias, True),
    "embed": functools.partial(_read, read_embed, True),
    "rsna": functools.partial(_read, read_rsna, True),
}
