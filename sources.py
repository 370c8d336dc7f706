"""Public mammography data sets, in the folders and files they are distributed in -> manifest rows.

Every reader takes the data set's folder and returns the findings; `READERS` adds one sentence for
each trap that was met, with its count. Boxes are (row0, col0, row1, col1), half-open, in stored
pixels, origin top left. What a data set does not know stays empty: `pathology` "" gives no lesion
patch, and its region no normal patch. Distributed files are data: nothing in them is evaluated,
and no path in them may leave the data set's folder.
"""

import ast
import csv
import functools
import math
import os
import plistlib
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from xml.parsers.expat import ExpatError

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError

from data import Finding, progress, read_json, sha256
from mammogram import read_mammogram

Traps = Counter  # sentence -> how often it was met
Box = tuple[float, float, float, float]

# What pydicom raises for files that are damaged or no DICOM; `prepare` names them one by one.
UNREADABLE = (
    InvalidDicomError, OSError, EOFError, ValueError, KeyError, AttributeError, TypeError,
    NotImplementedError, RuntimeError, struct.error,
)  # fmt: skip

ABSENT = "Images that the data set lists but its folder does not hold, left out"
CLIPPED = "Boxes that reached outside their image, clipped"
OUTSIDE = "Boxes wholly outside their image or without area, left out (their image keeps its label)"
ESCAPES = "Rows whose path leaves the data set's folder, left out"
NO_TYPE = "Marked regions that are no mass, calcification, distortion or asymmetry: no lesion patch"


# --- What the readers share ---


def _files(root: Path) -> list[Path]:
    """Every file below `root`, sorted; linked folders are followed once."""
    found, seen = [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        here = os.path.realpath(folder)
        if here in seen:
            folders.clear()
            continue
        seen.add(here)
        found += [Path(folder, name) for name in names]
    return sorted(found)


def _named(files: Iterable[Path], root: Path, name: str) -> Path:
    """The one file of this name (case ignored). Raises ValueError when there is none or two."""
    found = [path for path in files if path.name.lower() == name.lower()]
    if len(found) != 1:
        raise ValueError(f"{root}: found {len(found)} files named {name}; expected exactly one")
    return found[0]


def _table(path: Path, columns: tuple[str, ...], delimiter: str = ",") -> list[dict[str, str]]:
    """The named columns of a CSV, row by row, blanks and newlines around values taken off."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header, *rows = [row for row in csv.reader(file, delimiter=delimiter) if row] or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not readable as CSV ({error})") from None
    header = [name.strip() for name in header]
    if missing := [name for name in columns if name not in header]:
        raise ValueError(
            f"{path}: column {missing[0]!r} is missing; found {header}; expected a table whose "
            f"fields are separated by {delimiter!r}"
        )
    at = {name: header.index(name) for name in columns}
    for number, row in enumerate(rows, 2):
        if len(row) <= max(at.values()):
            raise ValueError(
                f"{path} row {number}: found {len(row)} fields, expected {len(header)}"
            )
    return [{name: row[i].strip() for name, i in at.items()} for row in rows]


def _known(table: dict[str, str], value: str, where: str) -> str:
    """The meaning of one of a data set's own words. Raises ValueError for an unknown word."""
    if value not in table:
        raise ValueError(f"{where}: found {value!r}; expected one of {sorted(table)}")
    return table[value]


def _number(text: object, where: str) -> float:
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where}: found {text!r}; expected a number of pixels")
    return value


def _inside(text: str) -> PurePosixPath | None:
    """A relative path that a distributed file names; None when it would leave the folder."""
    path = PurePosixPath(text.replace("\\", "/"))
    drive = bool(path.parts) and ":" in path.parts[0]
    return None if path.is_absolute() or drive or ".." in path.parts or "\0" in text else path


def _clip(box: Box, size: tuple[int, int] | None, traps: Traps) -> Box | None:
    """The part of `box` inside an image of `size` (rows, cols); None when nothing is left."""
    rows, cols = size or (math.inf, math.inf)
    row0, col0, row1, col1 = box
    inside = (max(row0, 0.0), max(col0, 0.0), min(row1, rows), min(col1, cols))
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        traps[OUTSIDE] += 1
        return None
    traps[CLIPPED] += inside != box
    return inside


def _header(path: Path) -> pydicom.Dataset:
    """The few attributes needed here; empty for a damaged file, which `prepare` then names."""
    keywords = ["Rows", "Columns", "ImageLaterality", "Laterality", "ViewPosition"]
    try:
        return pydicom.dcmread(path, force=True, stop_before_pixels=True, specific_tags=keywords)
    except UNREADABLE:
        return pydicom.Dataset()


def _size(ds: pydicom.Dataset) -> tuple[int, int] | None:
    size = ds.get("Rows"), ds.get("Columns")
    return size if all(isinstance(n, int) and n > 0 for n in size) else None


def _birads(text: str, allowed: bool) -> str:
    """BI-RADS 4 (a to c), 5 and 6 -> malignant, 2 and 3 -> benign; only when asked for."""
    grade = re.search(r"[0-6]", text)
    meaning = {"2": "benign", "3": "benign"} | dict.fromkeys("456", "malignant")
    return meaning.get(grade[0], "") if allowed and grade else ""


def _birads_note(name: str, allowed: bool, traps: Traps, findings: list[Finding]) -> None:
    """No silent stand-in: whoever reads the notes learns what the pathology rests on."""
    count = sum(bool(f.finding) for f in findings)
    if allowed:
        traps[
            f"{name} holds no pathology: BI-RADS 4 to 6 stand for malignant, 2 and 3 for benign "
            "(--birads-as-pathology), in this many findings"
        ] += count
    else:
        traps[
            f"{name} holds no pathology; without --birads-as-pathology these findings give no "
            "lesion patches"
        ] += count


# --- OMI-DB (OPTIMAM), the paper's data (P1) ---

# The events of an NBSS episode: pathology first, then opinions without tissue.
OMIDB_EVENTS = ("SURGERY", "BIOPSYWIDE", "BIOPSYFINE", "ASSESSMENT", "CLINICAL", "SCREENING")
# Opinion codes that decide: overall (O), histology (H), biopsy (B), cytology (C).
OMIDB_OPINIONS = dict.fromkeys(("OM", "H5", "B5", "C5"), "malignant") | dict.fromkeys(
    ("OB", "H2", "B2", "C2"), "benign"
)
OMIDB_FLAGS = {
    "Mass": "mass",
    "SuspiciousCalcifications": "calcification",
    "WithCalcification": "calcification",
    "ArchitecturalDistortion": "distortion",
    "FocalAsymmetry": "asymmetry",
}
UID = re.compile(r"\d+(\.\d+)+")


def read_omidb(root: Path, birads: bool, traps: Traps) -> list[Finding]:
    """OMI-DB, the OPTIMAM Mammography Image Database.

    Access: "OMI-DB, sharing" at Royal Surrey NHS Foundation Trust, on application.
    Licence: the sharing agreement signed with it; research only, not to be passed on.

    `data/<client>/imagedb_<client>.json` lists studies, series, images and marks (boxes, no
    pathology), `nbss_<client>.json` the opinions of each episode by event, side and lesion number.
    Not guessed: an image without marks is normal only when its client has no benign or malignant
    opinion and no interval cancer; else it carries its side's opinion, or nothing.
    """
    data, images = root / "data", root / "images"
    if not data.is_dir() or not images.is_dir():
        raise ValueError(f"{root}: expected OMI-DB's folders data and images in it")
    clients = sorted(p for p in data.iterdir() if p.is_dir() and p.name[:4] in ("demd", "optm"))
    findings = []
    with progress(len(clients), "OMI-DB clients") as advance:
        for client in clients:
            findings += _omidb_client(client, images / client.name, traps)
            advance(1)
    return findings


def _omidb_client(client: Path, images: Path, traps: Traps) -> list[Finding]:
    imagedb, nbss = (_omidb_json(client, kind) for kind in ("imagedb", "nbss"))
    episodes = {key: value for key, value in nbss.items() if isinstance(value, dict)}
    normal = not any(
        episode.get("EpisodeType") in ("CI", "Interval case") or _omidb_opinions(episode)
        for episode in episodes.values()
    )
    findings = []
    for study_id, study in _dict(imagedb.get("STUDIES")).items():
        episode = _omidb_episode(_dict(study), episodes, traps)
        for series_id, series in _dict(study).items():
            for image_id, marks in _dict(series).items():
                if not all(UID.fullmatch(uid) for uid in (study_id, series_id, image_id)):
                    continue
                path = images / study_id / f"{image_id}.dcm"
                if not path.is_file():
                    traps[ABSENT] += 1
                    continue
                ds = _header(path)
                side = str(ds.get("ImageLaterality") or ds.get("Laterality") or "").strip()
                if side not in ("L", "R"):
                    traps["Images whose header tells no side (L or R), left out"] += 1
                    continue
                image = Finding(str(path), client.name, side, str(ds.get("ViewPosition") or ""))
                if marks := [m for m in _dict(marks).values() if isinstance(m, dict)]:
                    for mark in marks:
                        findings += _omidb_mark(mark, image, _size(ds), episode, traps)
                elif normal:
                    findings.append(replace(image, pathology="normal"))
                else:
                    pathology = _omidb_pathology(episode, side, "", traps)
                    findings.append(replace(image, pathology=pathology))
                    traps[
                        "Images without marks of clients with a benign, malignant or interval "
                        "finding: never normal, no patches"
                    ] += 1
    return findings


def _omidb_mark(
    mark: dict, image: Finding, size: tuple[int, int] | None, episode: dict, traps: Traps
) -> list[Finding]:
    """One mark -> a row for each of its types; a mass with calcification is two rows (Q24)."""
    where = f"imagedb_{image.patient_id}.json, mark {mark.get('MarkID')}"
    x1, y1, x2, y2 = (_number(mark.get(key), f"{where}, {key}") for key in ("X1", "Y1", "X2", "Y2"))
    traps["Boxes with corners in another order, sorted"] += x1 > x2 or y1 > y2
    box = _clip((min(y1, y2), min(x1, x2), max(y1, y2), max(x1, x2)), size, traps)
    if box and _only_fits_flipped(image.image_path, box):
        traps[
            "Boxes that lie in air but would lie on tissue with rows counted from the bottom: "
            "kept as they are, look at them"
        ] += 1
    numbers = re.findall(r"\d+", str(mark.get("LinkedNBSSLesionNumber") or ""))
    verdicts = {
        _omidb_pathology(episode, image.laterality, str(int(number)), traps)
        for number in numbers or ["0"]
    }
    # Several linked lesions: one malignant decides; benign only when all of them are.
    pathology = "malignant" if "malignant" in verdicts else min(verdicts)
    if not pathology:
        traps["Marks whose linked lesion has no deciding opinion: pathology unknown"] += 1
    kinds = {kind for flag, kind in OMIDB_FLAGS.items() if mark.get(flag)}
    traps[NO_TYPE] += not kinds
    return [
        replace(image, finding=kind, pathology=pathology if kind else "", bbox=box)
        for kind in sorted(kinds) or [""]
    ]


def _dict(value: object) -> dict:
    """A level of OMI-DB's JSON; empty where the file holds null or "" in its place."""
    return value if isinstance(value, dict) else {}


def _omidb_json(client: Path, kind: str) -> dict:
    upper = client / f"{kind.upper()}_{client.name}.json"
    return read_json(upper if upper.is_file() else client / f"{kind}_{client.name}.json")


def _omidb_opinions(node: dict) -> bool:
    """Whether any event of an episode holds a benign or malignant opinion, at any level."""
    return any(
        _omidb_opinions(value)
        if isinstance(value, dict)
        else key.lower().endswith("opinion") and str(value) in OMIDB_OPINIONS
        for key, value in node.items()
    )


def _omidb_episode(study: dict, episodes: dict[str, dict], traps: Traps) -> dict:
    """The study's episode, by its id or else by an event on the day of the study."""
    if (key := str(study.get("EpisodeID"))) in episodes:
        return episodes[key]
    day = str(study.get("StudyDate") or "").replace("-", "")
    for episode in episodes.values():
        if day and any(day in _omidb_days(_dict(episode.get(event))) for event in OMIDB_EVENTS):
            traps["Studies whose episode id is unknown to NBSS, linked by date"] += 1
            return episode
    traps["Studies without an NBSS episode: their marks have no pathology"] += 1
    return {}


def _omidb_days(node: dict) -> set[str]:
    days = set()
    for key, value in node.items():
        if isinstance(value, dict):
            days |= _omidb_days(value)
        elif key.lower() in ("dateperformed", "datetaken"):
            days.add(str(value).replace("-", ""))
    return days


def _omidb_pathology(episode: dict, side: str, lesion: str, traps: Traps) -> str:
    """What NBSS says of a side's lesion: the first event that decides; "" when none does.

    An event's opinion of the whole side stands in for a lesion's own only where it cannot mean
    another lesion: it is benign, the side has a single lesion, or the side is asked for (`lesion`
    empty).
    """
    single = len(_dict(_dict(episode.get("LESION")).get(side))) <= 1
    for name in OMIDB_EVENTS:
        event = _dict(episode.get(name))
        own = _dict(_dict(event.get(side)).get(lesion)).get("Opinion")
        if verdict := OMIDB_OPINIONS.get(str(own), ""):
            return verdict
        whole = event.get({"L": "left_opinion", "R": "right_opinion"}[side])
        if verdict := OMIDB_OPINIONS.get(str(whole), ""):
            if verdict == "benign" or single or not lesion:
                return verdict
            traps[
                "Malignant opinions of a side with several lesions, not used for one of them"
            ] += 1
    return ""


def _only_fits_flipped(path: str, box: Box) -> bool:
    """A box in air whose mirror image (rows from the bottom) is on tissue: another origin?"""
    try:
        display = read_mammogram(Path(path)).display
    except (ValueError, OSError):
        return False  # `prepare` leaves the image out and says why
    row0, col0, row1, col1 = (round(edge) for edge in box)
    air = display.min() + 0.02 * np.ptp(display)
    given = display[row0:row1, col0:col1] > air
    flipped = display[::-1][row0:row1, col0:col1] > air
    return bool(given.size and given.mean() < 0.1 and flipped.mean() > 0.9)


# --- CBIS-DDSM ---

CBIS_TABLES = {
    f"{kind}_case_description_{part}_set.csv": split
    for kind in ("mass", "calc")
    for part, split in (("train", ""), ("test", "test"))
}
CBIS_COLUMNS = (
    "patient_id", "left or right breast", "image view", "abnormality type", "pathology",
    "image file path", "cropped image file path", "ROI mask file path",
)  # fmt: skip
CBIS_PATHOLOGY = {
    "MALIGNANT": "malignant",
    "BENIGN": "benign",
    "BENIGN_WITHOUT_CALLBACK": "benign",
}


def read_cbis_ddsm(root: Path, birads: bool, traps: Traps) -> list[Finding]:
    """CBIS-DDSM, the Curated Breast Imaging Subset of DDSM (digitised film, masks, pathology).

    Access: "CBIS-DDSM" at The Cancer Imaging Archive, open. Licence: CC BY 3.0.

    Four case tables and a DICOM tree. The tables' file names are older than the tree's and name
    mask and crop in either order, so files are looked up by their folder (series UID, else case)
    and told apart by size and values. The published test cases keep their split; `prepare` takes
    validation from the rest.
    """
    files = _files(root)
    tables = {path.name: path for path in files if path.name in CBIS_TABLES}
    if not tables:
        raise ValueError(f"{root}: found none of {', '.join(CBIS_TABLES)}; put them there")
    traps["Case tables that are absent, so that their cases are not read"] += 4 - len(tables)
    folders = defaultdict(set)  # folder name -> DICOM files anywhere below it
    for path in files:
        if path.suffix.lower() == ".dcm":
            for part in path.relative_to(root).parts[:-1]:
                folders[part].add(path)
    rows = [
        (f"{name} row {number}", split, row)
        for name, split in CBIS_TABLES.items()
        if name in tables
        for number, row in enumerate(_table(tables[name], CBIS_COLUMNS), 2)
    ]
    tested = {row["patient_id"] for _, split, row in rows if split == "test"}
    both = tested & {row["patient_id"] for _, split, row in rows if split != "test"}
    traps["Patients with cases in a train and in a test table, put in test with all images"] = len(
        both
    )
    findings, films = [], {}
    with progress(len(rows), "CBIS-DDSM masks") as advance:
        for where, _, row in rows:
            advance(1)
            film = _cbis_files(row["image file path"], folders)
            regions = [_cbis_files(row[c], folders) for c in CBIS_COLUMNS[-2:]]
            if film is None or None in regions:
                traps[f"{ESCAPES} ({where})"] += 1
                continue
            if not film:
                traps[ABSENT] += 1
                continue
            finding = Finding(
                image_path=str(max(film, key=lambda path: (path.stat().st_size, path))),
                patient_id=row["patient_id"],
                laterality=_known({"LEFT": "L", "RIGHT": "R"}, row["left or right breast"], where),
                view=row["image view"],
                finding=_known(
                    {"mass": "mass", "calcification": "calcification"},
                    row["abnormality type"],
                    where,
                ),
                pathology=_known(CBIS_PATHOLOGY, row["pathology"], where),
                split="test" if row["patient_id"] in tested else "",
            )
            films.setdefault((finding.patient_id, finding.laterality, finding.view), []).append(
                finding.image_path
            )
            size = _size(_header(Path(finding.image_path)))
            findings.append(_cbis_region(finding, set().union(*regions), size, traps))
    same = _cbis_same_films(films.values(), traps)
    traps["CBIS-DDSM holds no normal images: --normals-from-annotated, for this many findings"] = (
        len(findings)
    )
    return [replace(f, image_path=same.get(f.image_path, f.image_path)) for f in findings]


def _cbis_files(text: str, folders: dict[str, set[Path]]) -> set[Path] | None:
    """The DICOM files in the folder that a table's path means; None when the path leaves it."""
    path = _inside(text)
    if path is None:
        return None
    parts = path.parts[:-1]
    return folders.get(parts[-1], set()) or folders.get(parts[0], set()) if parts else set()


def _cbis_region(
    finding: Finding, paths: set[Path], size: tuple[int, int] | None, traps: Traps
) -> Finding:
    """Add mask and box: the mask is the largest file with two values; the crop is a photograph."""
    sizes = {path: _size(_header(path)) or (0, 0) for path in paths}
    for path in sorted(paths, key=lambda path: (-math.prod(sizes[path]), path)):
        try:
            stored = pydicom.dcmread(path).pixel_array
        except UNREADABLE:
            continue
        low, high = stored.min(), stored.max()
        mask = stored == high
        if low == high or not np.all(mask | (stored == low)):
            continue
        rows, cols = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        box = (rows[0], cols[0], rows[-1] + 1, cols[-1] + 1)
        down, across = (n / m for n, m in zip(size or mask.shape, mask.shape, strict=True))
        traps["Masks of another size than their image, rescaled to it"] += (down, across) != (1, 1)
        scaled = tuple(float(b * s) for b, s in zip(box, (down, across) * 2, strict=True))
        return replace(finding, bbox=_clip(scaled, size, traps), mask_path=str(path))
    traps["Abnormalities without a readable mask: only their image is labelled"] += 1
    return finding


def _cbis_same_films(films: Iterable[list[str]], traps: Traps) -> dict[str, str]:
    """A film with masses and calcifications is distributed twice: copy -> the one to use."""
    same = {}
    for paths in films:
        first = {}
        for path in sorted(set(paths)) if len(set(paths)) > 1 else ():
            try:
                pixels = pydicom.dcmread(path).PixelData
            except UNREADABLE:
                continue
            same[path] = first.setdefault(sha256(pixels), path)
            traps["Films distributed twice, as mass and as calcification case, joined"] += (
                same[path] != path
            )
    return same


# --- VinDr-Mammo ---

VINDR_COLUMNS = (
    "study_id", "image_id", "laterality", "view_position", "height", "width", "breast_birads",
    "finding_categories", "finding_birads", "xmin", "ymin", "xmax", "ymax", "split",
)  # fmt: skip
VINDR_CATEGORIES = {
    "Mass": "mass",
    "Suspicious Calcification": "calcification",
    "Architectural Distortion": "distortion",
    "Asymmetry": "asymmetry",
    "Focal Asymmetry": "asymmetry",
    "Global Asymmetry": "asymmetry",
}


def read_vindr(root: Path, birads: bool, traps: Traps) -> list[Finding]:
    """VinDr-Mammo (digital, boxes, BI-RADS; two hospitals in Hanoi).

    Access: "VinDr-Mammo" at PhysioNet, restricted: sign the data use agreement.
    Licence: PhysioNet Restricted Health Data License 1.5.0.

    `finding_annotations.csv`, `images/<study>/<image>.dicom`; a study is a patient. Only findings
    of BI-RADS 3 and above are boxed, so "No Finding" is normal only in a breast of BI-RADS 1.
    """
    table = _named(_files(root), root, "finding_annotations.csv")
    findings = []
    for number, row in enumerate(_table(table, VINDR_COLUMNS), 2):
        where = f"{table.name} row {number}"
        inner = _inside(f"images/{row['study_id']}/{row['image_id']}.dicom")
        if inner is None or len(inner.parts) != 3:
            traps[f"{ESCAPES} ({where})"] += 1
            continue
        path = table.parent / inner
        if not path.is_file():
            traps[ABSENT] += 1
            continue
        image = Finding(
            image_path=str(path),
            patient_id=row["study_id"],
            laterality=_known({"L": "L", "R": "R"}, row["laterality"], where),
            view=row["view_position"],
            split=_known({"training": "", "test": "test"}, row["split"], where),
        )
        categories = _vindr_categories(row["finding_categories"], where)
        if categories == {"No Finding"}:
            clear = re.search(r"[0-6]", row["breast_birads"])
            if clear and clear[0] == "1":
                findings.append(replace(image, pathology="normal"))
            else:
                pathology = _birads(row["breast_birads"], birads)
                findings.append(replace(image, pathology=pathology))
                traps["Images without a box in a breast of BI-RADS 2 or above: not normal"] += 1
            continue
        edges = [
            _number(row[edge], f"{where}, {edge}") for edge in ("ymin", "xmin", "ymax", "xmax")
        ]
        size = tuple(int(_number(row[n], f"{where}, {n}")) for n in ("height", "width"))
        box = _clip(tuple(edges), size, traps)
        kinds = {VINDR_CATEGORIES[c] for c in categories if c in VINDR_CATEGORIES}
        traps["Boxes with several categories, one row for each"] += len(kinds) > 1
        traps[NO_TYPE] += not kinds
        pathology = _birads(row["finding_birads"], birads)
        findings += [
            replace(image, finding=kind, pathology=pathology if kind else "", bbox=box)
            for kind in sorted(kinds) or [""]
        ]
    _birads_note("VinDr-Mammo", birads, traps, findings)
    return findings


def _vindr_categories(text: str, where: str) -> set[str]:
    """The text of a Python list of strings, read as a literal and of limited length."""
    try:
        value = ast.literal_eval(text) if len(text) <= 500 else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise ValueError(f"{where}: found {text[:80]!r}; expected a list such as ['Mass']")
    return set(value)


# --- INbreast ---

INBREAST_COLUMNS = ("Laterality", "View", "File Name", "Bi-Rads")
INBREAST_NAMES = {  # lower case, with the spellings that occur
    "mass": "mass",
    "calcification": "calcification",
    "calcifications": "calcification",
    "cluster": "calcification",
    "distortion": "distortion",
    "spiculated region": "distortion",  # drawn around a mass as well; gives no patches (Q24)
    "espiculated region": "distortion",
    "asymmetry": "asymmetry",
    "assymetry": "asymmetry",
}


def read_inbreast(root: Path, birads: bool, traps: Traps) -> list[Finding]:
    """INbreast (digital, exact contours; Centro Hospitalar de Sao Joao, Porto).

    Access: "INbreast" of the Breast Research Group at INESC Porto, on request.
    Licence: the agreement signed with it; research only.

    `INbreast.csv` (fields separated by ";"), `AllDICOMs/<file>_<patient hash>_MG_<side>_<view>_
    ANON.dcm`, `AllXML/<file>.xml` with OsiriX regions. BI-RADS is given per image: with
    `birads_as_pathology` all its regions take it.
    """
    files = _files(root)
    names = {path.name.lower(): path for path in files}
    if "inbreast.xls" in names and "inbreast.csv" not in names:
        raise ValueError(
            f"{names['inbreast.xls']}: is a spreadsheet; open it in a spreadsheet program and save "
            "it beside itself as INbreast.csv, fields separated by ';'"
        )
    table = _named(files, root, "INbreast.csv")
    images = {p.name.split("_")[0]: p for p in files if p.suffix.lower() == ".dcm"}
    contours = {p.stem: p for p in files if p.suffix == ".xml" and p.parent.name == "AllXML"}
    findings = []
    for number, row in enumerate(_table(table, INBREAST_COLUMNS, ";"), 2):
        where = f"{table.name} row {number}"
        if not (name := row["File Name"]):
            continue  # the spreadsheet ends in empty rows
        if (path := images.get(name)) is None:
            traps[ABSENT] += 1
            continue
        if len(path.name.split("_")) < 3:
            raise ValueError(f"{path}: expected a name such as <file>_<patient>_MG_R_CC_ANON.dcm")
        image = Finding(
            image_path=str(path),
            patient_id=path.name.split("_")[1],
            laterality=_known({"L": "L", "R": "R"}, row["Laterality"], where),
            view=row["View"],
            pathology=_birads(row["Bi-Rads"], birads),
        )
        regions = _inbreast_regions(contours[name]) if name in contours else []
        size = _size(_header(path)) if regions else None
        for kind, box in regions:
            traps[NO_TYPE] += not kind
            pathology = image.pathology if kind else ""
            findings.append(
                replace(image, finding=kind, pathology=pathology, bbox=_clip(box, size, traps))
            )
        if not regions and row["Bi-Rads"].startswith("1"):
            findings.append(replace(image, pathology="normal"))
        elif not regions:
            findings.append(image)
            traps["Images of BI-RADS 2 or above without a contour: not normal"] += 1
    _birads_note("INbreast", birads, traps, findings)
    return findings


def _inbreast_regions(path: Path) -> list[tuple[str, Box]]:
    """(finding, box) of each OsiriX region; a single point is a single calcification."""
    try:
        # plistlib refuses entity declarations and fetches nothing
        document = plistlib.loads(path.read_bytes(), fmt=plistlib.FMT_XML)
        rois = [(roi["Name"], roi["Point_px"]) for roi in document["Images"][0]["ROIs"]]
        regions = []
        for name, points in rois:
            xy = np.array([[float(n) for n in p.strip("() ").split(",")[:2]] for p in points])
            if not len(xy) or not np.isfinite(xy).all():
                raise ValueError(f"region {name!r} without points")
            (x0, y0), (x1, y1) = np.floor(xy.min(axis=0)), np.floor(xy.max(axis=0)) + 1
            kind = INBREAST_NAMES.get(name.strip().lower(), "")
            box = (float(y0), float(x0), float(y1), float(x1))
            regions.append(("calcification" if len(xy) == 1 else kind, box))
    except (ValueError, ExpatError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: not an OsiriX region file ({error})") from None
    return regions


# --- mini-MIAS ---

MIAS_SIDE = 1024  # every image is 1024 x 1024 pixels
MIAS_SPACING_MM = 0.2  # "reduced to 200 micron pixel edge"
MIAS_CLASSES = {
    "CALC": "calcification",
    "CIRC": "mass",  # well-defined masses
    "SPIC": "mass",  # spiculated masses
    "MISC": "mass",  # other, ill-defined masses
    "ARCH": "distortion",
    "ASYM": "asymmetry",
    "NORM": "",
}
MIAS_ROW = re.compile(
    r"(?P<name>mdb(?P<n>\d{3}))\s+[FGD]\s+(?P<kind>[A-Z]{4})"
    r"(?:\s+(?P<severity>[BM]))?(?:\s+(?P<x>\d+)\s+(?P<y>\d+)\s+(?P<radius>\d+)|\s+\*NOTE 3\*)?"
)


def read_mini_mias(root: Path, birads: bool, traps: Traps) -> list[Finding]:
    """mini-MIAS, the reduced database of the Mammographic Image Analysis Society (film, MLO).

    Access: "The mini-MIAS database of mammograms" at the Pilot European Image Processing Archive,
    open. Licence: the society's agreement; scientific research only, with citation.

    `Info.txt`: image, tissue, class, severity, circle (x, y from the bottom left, radius).
    Odd numbers are right breasts, even ones left; two numbers in a row are one patient.
    """
    files = _files(root)
    table = _named(files, root, "Info.txt")
    images = {path.stem.lower(): path for path in files if path.suffix.lower() == ".pgm"}
    findings = []
    for number, line in enumerate(table.read_text(encoding="latin-1").splitlines(), 1):
        if not re.match(r"mdb\d", line):
            continue  # the explanations around the table
        where = f"{table.name} line {number}"
        row = MIAS_ROW.fullmatch(line.strip())
        if row is None or (row["kind"] != "NORM") != bool(row["severity"]):
            raise ValueError(
                f"{where}: found {line.strip()!r}; expected 'mdb001 G CIRC B 535 425 197'"
            )
        kind = _known(MIAS_CLASSES, row["kind"], where)
        if row["name"] not in images:
            traps[ABSENT] += 1
            continue
        box = None
        if row["x"]:
            x, y, radius = (float(row[key]) for key in ("x", "y", "radius"))
            middle = MIAS_SIDE - y
            circle = (middle - radius, x - radius, middle + radius, x + radius)
            box = _clip(circle, (MIAS_SIDE, MIAS_SIDE), traps)
        elif kind:
            traps["Findings without coordinates: only their image is labelled"] += 1
        findings.append(
            Finding(
                image_path=str(images[row["name"]]),
                patient_id=f"mias{(int(row['n']) + 1) // 2:03d}",
                laterality="R" if int(row["n"]) % 2 else "L",
                view="MLO",
                finding=kind,
                pathology={"B": "benign", "M": "malignant"}.get(row["severity"], "normal"),
                bbox=box,
                spacing_mm=(MIAS_SPACING_MM, MIAS_SPACING_MM),
            )
        )
    return findings


# --- The formats of `prepare` ---


def _read(
    read: Callable, has_pathology: bool, path: Path, birads_as_pathology: bool
) -> tuple[list[Finding], list[str]]:
    """The findings of the data set in folder `path`, and a sentence for each trap that was met.

    Raises ValueError: no such folder, a damaged table, none of the images, or BI-RADS asked to
    stand for a pathology that the data set holds.
    """
    root = Path(path).absolute()
    if not root.is_dir():
        raise ValueError(f"{path}: expected the folder of the data set")
    if birads_as_pathology and has_pathology:
        raise ValueError(
            "--birads-as-pathology: this data set holds pathology; leave the option out"
        )
    traps = Traps()
    findings = read(root, birads_as_pathology, traps)
    if not findings:
        raise ValueError(f"{path}: found no image that its tables list; is the download complete?")
    return findings, [f"{sentence}: {count}." for sentence, count in traps.items() if count]


READERS: dict[str, Callable[[Path, bool], tuple[list[Finding], list[str]]]] = {
    "omidb": functools.partial(_read, read_omidb, True),
    "cbis-ddsm": functools.partial(_read, read_cbis_ddsm, True),
    "vindr": functools.partial(_read, read_vindr, False),
    "inbreast": functools.partial(_read, read_inbreast, False),
    "mini-mias": functools.partial(_read, read_mini_mias, True),
}
