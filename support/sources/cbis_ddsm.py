"""CBIS-DDSM: digitised film, masks, pathology."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy import ndimage

from support.mammogram import Mammogram, image_size, read_mammogram
from support.runs import progress
from support.sources import common

TABLES = {
    f"{kind}_case_description_{part}_set.csv": split
    for kind in ("mass", "calc")
    for part, split in (("train", ""), ("test", "test"))
}
COLUMNS = (
    *("patient_id", "left or right breast", "image view", "abnormality type", "pathology"),
    *("image file path", "cropped image file path", "ROI mask file path"),
)
DENSITY = ("breast_density", "breast density")  # of the masses, of the calcifications
WORDS = {
    "left or right breast": {"LEFT": "L", "RIGHT": "R"},
    "abnormality type": {"mass": "mass", "calcification": "calcification"},
    "pathology": {"MALIGNANT": "malignant"}
    | dict.fromkeys(("BENIGN", "BENIGN_WITHOUT_CALLBACK"), "benign"),
}


def read_cbis_ddsm(root: Path, traps: common.Traps) -> list[common.Finding]:
    """CBIS-DDSM, the Curated Breast Imaging Subset of DDSM (digitised film, masks, pathology).

    Access: "CBIS-DDSM" at The Cancer Imaging Archive, open. Licence: CC BY 3.0.

    Four case tables and a DICOM tree. The tables' file names are older than the tree's and name
    mask and crop in either order, so files are looked up by their folder (series UID, else case)
    and told apart by size and values. The published test cases keep their split; `prepare` takes
    validation from the rest.
    """
    files = common.files(root)
    names = {path.name.lower() for path in files} & TABLES.keys()
    tables = {name: common.named(files, root, name) for name in names}
    if not tables:
        raise ValueError(f"{root}: found none of {', '.join(TABLES)}; put them there")
    traps["Case tables that are absent, so that their cases are not read"] += 4 - len(tables)
    folders = defaultdict(set)  # folder name -> DICOM files anywhere below it
    for path in files:
        for part in path.relative_to(root).parts[:-1] if path.suffix.lower() == ".dcm" else ():
            folders[part].add(path)
    rows = [
        (where, TABLES[name], row)
        for name, path in sorted(tables.items())
        for where, row in common.table(path, COLUMNS, traps, optional=DENSITY)
    ]
    tested = {row["patient_id"] for _, split, row in rows if split == "test"}
    both = tested & {row["patient_id"] for _, split, row in rows if split != "test"}
    traps["Patients in a train and in a test table, put in test with all images"] += len(both)
    findings, films = [], defaultdict(set)
    with progress(len(rows), "CBIS-DDSM masks") as advance:
        for where, _, row in rows:
            advance(1)
            paths = [common.inside(row[column]) for column in COLUMNS[-3:]]
            film, *regions = (_files(parts, folders) if all(paths) else set() for parts in paths)
            if not film:
                what = row["image file path"]
                traps[common.ABSENT if all(paths) else common.ESCAPES, what] = 1
                continue
            path = max(film, key=lambda path: (path.stat().st_size, path))
            with common.sparing(traps, str(path)):
                known = (common.known(words, row[name], where) for name, words in WORDS.items())
                side, *words = known
                image = str(path), row["patient_id"], side, row["image view"]
                split = "test" if row["patient_id"] in tested else ""
                density = common.DENSITY.get("".join(row[name] for name in DENSITY), "")
                finding = common.Finding(*image, *words, split=split, density=density)
                films[image[1:]].add(image[0])
                findings.append(_region(finding, set().union(*regions), traps))
    same = _same_films(films.values(), traps)
    traps["Findings, and no normal image (--normals annotated)"] += len(findings)
    return [replace(f, image_path=same.get(f.image_path, f.image_path)) for f in findings]


def _files(parts: tuple[str, ...], folders: dict[str, set[Path]]) -> set[Path]:
    """The DICOM files in the folder that a table's path means: its series within its case."""
    case, series = (folders.get(part, set()) for part in (parts[0], parts[-2:][0]))
    return case & series or case or series


def _region(finding: common.Finding, paths: set[Path], traps: common.Traps) -> common.Finding:
    """Add mask and box: the mask is the largest file with two values; the crop is a photograph."""
    size = image_size(finding.image_path)
    for path in sorted(paths, key=lambda path: (-math.prod(image_size(str(path)) or (0,)), path)):
        if (file := _decoded(path)) is None:
            continue
        low, high = file.stored.min(), file.stored.max()
        mask = file.stored == high
        if low == high or not np.all(mask | (file.stored == low)):
            continue
        rows, cols = ndimage.find_objects(mask.astype(np.uint8))[0]
        down, across = (n / m for n, m in zip(size or mask.shape, mask.shape, strict=True))
        traps["Masks of another size than their image, rescaled to it"] += (down, across) != (1, 1)
        box = rows.start * down, cols.start * across, rows.stop * down, cols.stop * across
        box = common.clip(box, finding.image_path, traps)
        return replace(finding, bbox=box, mask_path=str(path))
    traps["Abnormalities without a readable mask: only their image is labelled"] += 1
    return finding


def _same_films(films: Iterable[set[str]], traps: common.Traps) -> dict[str, str]:
    """A film with masses and calcifications is distributed twice: copy -> the one to use."""
    same = {}
    for paths in films:
        first = {}
        for path in sorted(paths) if len(paths) > 1 else ():
            if film := _decoded(Path(path)):
                same[path] = first.setdefault(film.image_uid, path)
                traps["Films distributed twice, joined"] += same[path] != path
    return same


def _decoded(path: Path) -> Mammogram | None:
    """None for a file that `prepare` would not read either (damaged, more than 120 megapixels)."""
    try:
        return read_mammogram(path)
    except (ValueError, OSError):
        return None
