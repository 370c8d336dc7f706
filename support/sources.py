"""Public mammography data sets, in the folders and files they are distributed in -> manifest rows.

Every reader takes the data set's folder and returns the findings; `READERS` adds one sentence for
each trap that was met, with its count. Boxes are (row0, col0, row1, col1), half-open, in stored
pixels, origin top left. What a data set does not know stays empty: `pathology` "" gives no lesion
patch, and its region no normal patch. Distributed files are data: nothing in them is evaluated,
and no path in them may leave the data set's folder.
"""

import ast
import functools
import math
import os
import plistlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from xml.parsers.expat import ExpatError

import numpy as np
import pydicom

from support.files import csv_rows, numbers, read_json
from support.mammogram import WORDS, Mammogram, NotUsable, image_size, read_header, read_mammogram
from support.runs import progress

Traps = Counter  # sentence -> how often it was met
Box = tuple[float, float, float, float]
SIDES = {"L": "L", "R": "R"}

ABSENT = "Images that the data set lists but its folder does not hold, left out"
CLIPPED = "Boxes that reached outside their image, clipped"
OUTSIDE = "Boxes outside their image or without area: only their image is labelled"
ESCAPES = "Rows whose path leaves the data set's folder, left out"
NO_TYPE = "Marked regions that are no mass, calcification, distortion or asymmetry: no lesion patch"
NOT_NORMAL = "Images without a mark that are not known to be normal: no patches"
REPEATED = "Findings with the type and box of another one, joined, the worst pathology kept"
BIRADS_USED = (
    "Findings without pathology in the data set: BI-RADS 4 to 6 stand for malignant, 2 and 3 for "
    "benign (--birads-as-pathology)"
)
BIRADS_UNUSED = (
    "Findings without pathology in the data set: no lesion patches without --birads-as-pathology"
)


# --- Manifest ---

SPLITS = ("train", "val", "test")
FINDINGS = ("mass", "calcification", "distortion", "asymmetry")
PATHOLOGIES = ("", "normal", "benign", "malignant")  # from best to worst, "" = unknown
MANIFEST_WORDS = {
    "laterality": ("L", "R"),
    "finding": ("", *FINDINGS),
    "pathology": PATHOLOGIES,
    "split": ("", *SPLITS),
}
BOX = ("row0", "col0", "row1", "col1")
SPACING = ("spacing_row_mm", "spacing_col_mm")
MANIFEST_COLUMNS = ("image_path", "patient_id", "laterality", "view", "finding", "pathology", *BOX)
MANIFEST_OPTIONAL = ("mask_path", *SPACING, "split")


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
    raise_all(f"{path}: found", problems or check_findings(findings), "correct the manifest")
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


def raise_all(what: str, problems: list[str], advice: str) -> None:
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        listed = "; ".join(problems[:10]) + more
        found = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ValueError(f"{what} {found}: {listed}; {advice}")


# --- What the readers share ---


def _files(root: Path) -> list[Path]:
    """Every file below `root`, sorted; linked folders too, but each folder once."""
    found, seen = [], {os.path.realpath(root)}
    for folder, folders, names in os.walk(root, followlinks=True):
        found += (Path(folder, name) for name in names)
        real = {os.path.realpath(Path(folder, name)): name for name in sorted(folders)}
        folders[:] = [name for path, name in real.items() if path not in seen]
        seen |= real.keys()
    return sorted(found)


def _named(files: Iterable[Path], root: Path, name: str) -> Path:
    """The one file of this name (case ignored). Raises ValueError when there is none or two."""
    found = [path for path in files if path.name.lower() == name.lower()]
    if len(found) != 1:
        raise ValueError(f"{root}: found {len(found)} files named {name}; expected exactly one")
    return found[0]


def _table(
    path: Path, columns: tuple[str, ...], delimiter: str = ","
) -> Iterator[tuple[str, dict[str, str]]]:
    """Place and named columns of each row; blanks and newlines around values taken off."""
    for line, row in csv_rows(path, columns, delimiter=delimiter):
        yield f"{path} line {line}", {name: row[name].strip() for name in columns}


def _known(table: dict[str, str], value: str, where: str) -> str:
    """The meaning of one of a data set's own words. Raises ValueError for an unknown word."""
    if value not in table:
        raise ValueError(f"{where}: found {value[:80]!r}; expected one of {', '.join(table)}")
    return table[value]


def _inside(text: str) -> tuple[str, ...]:
    """The parts of a relative path that a distributed file names; () when it would lead outside."""
    path = PurePosixPath("".join(text.splitlines()).replace("\\", "/"))
    unsafe = path.is_absolute() or ".." in path.parts or ":" in text or "\0" in text
    return () if unsafe else path.parts


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
    try:
        with open(path, "rb") as file:
            return read_header(path, file, ("ImageLaterality", "Laterality", "ViewPosition"))
    except (NotUsable, OSError):
        return pydicom.Dataset()


def _decoded(path: Path) -> Mammogram | None:
    """None for a file that `prepare` would not read either (damaged, more than 200 megapixels)."""
    try:
        return read_mammogram(path)
    except (ValueError, OSError):
        return None


def _typed(image: Finding, kinds: set[str], pathology: str, box: Box | None, traps: Traps) -> list:
    """A row for each type of a marked region, which patches are cut from by type (Q24)."""
    traps["Marked regions of several types, one row for each"] += len(kinds) > 1
    traps[NO_TYPE] += not kinds
    return [
        replace(image, finding=kind, pathology=pathology if kind else "", bbox=box)
        for kind in sorted(kinds) or [""]
    ]


def _birads(text: str) -> str:
    """BI-RADS 4 (a to c), 5 and 6 stand for malignant, 2 and 3 for benign."""
    grade = re.search(r"[0-6]", text)
    meaning = {"2": "benign", "3": "benign"} | dict.fromkeys("456", "malignant")
    return meaning.get(grade[0], "") if grade else ""


# --- OMI-DB (OPTIMAM), the paper's data (P1) ---

# The events of an NBSS episode: those that look at tissue decide before the others.
OMIDB_EVENTS = ("SURGERY", "BIOPSYWIDE", "BIOPSYFINE", "ASSESSMENT", "CLINICAL", "SCREENING")
# Opinions that decide, as code or in words: overall (O), histology (H), biopsy (B), cytology (C).
MALIGNANT = ("OM", "H5", "B5", "C5", "Malignant", "O Malignant", "Hist malignant", "Cyt malig")
BENIGN = ("OB", "H2", "B2", "C2", "Benign", "O Benign", "Histol benign", "Cyt benign")
OMIDB_OPINIONS = dict.fromkeys(MALIGNANT, "malignant") | dict.fromkeys(BENIGN, "benign")
OMIDB_FLAGS = {
    "Mass": "mass",
    "SuspiciousCalcifications": "calcification",
    "WithCalcification": "calcification",
    "ArchitecturalDistortion": "distortion",
    "FocalAsymmetry": "asymmetry",
}
UID = re.compile(r"\d+(\.\d+)+")


def read_omidb(root: Path, traps: Traps) -> list[Finding]:
    """OMI-DB, the OPTIMAM Mammography Image Database.

    Access: "OMI-DB, sharing" at Royal Surrey NHS Foundation Trust, on application.
    Licence: the sharing agreement signed with it; research only, not to be passed on.

    `data/<client>/imagedb_<client>.json` lists studies, series, images and marks (boxes, no
    pathology), `nbss_<client>.json` the opinions of each episode by event, side and lesion number.
    Not guessed: an image without marks is normal only when all its client's episodes are.
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
    normal = bool(episodes) and all(map(_omidb_normal, episodes.values()))
    findings = []
    for study_id, study in _dict(imagedb.get("STUDIES")).items():
        episode = _omidb_episode(_dict(study), episodes, traps)
        for series_id, series in _dict(study).items():
            for image_id, marks in _dict(series).items():
                if not all(UID.fullmatch(uid) for uid in (study_id, series_id, image_id)):
                    continue  # attributes of a study or series
                path = images / study_id / f"{image_id}.dcm"
                if not path.is_file():
                    traps[ABSENT] += 1
                    continue
                ds = _header(path)
                side = str(ds.get("ImageLaterality") or ds.get("Laterality") or "").strip()
                if side not in ("L", "R"):
                    traps["Images whose header is damaged or tells no side, left out"] += 1
                    continue
                view = str(ds.get("ViewPosition") or "").strip()
                view = view if view in WORDS["ViewPosition"] else ""  # a header's text stays there
                image = Finding(str(path), client.name, side, view)
                rows = []
                for mark in filter(None, map(_dict, _dict(marks).values())):
                    rows += _omidb_mark(mark, image, episode, traps)
                if not rows:
                    pathology = "normal" if normal else _omidb_pathology(episode, side, "", traps)
                    rows = [replace(image, pathology=pathology)]
                    traps[NOT_NORMAL] += not normal
                findings += rows
    return findings


def _omidb_mark(mark: dict, image: Finding, episode: dict, traps: Traps) -> list[Finding]:
    """One mark -> a row for each of its types; a mass with calcification is two rows (Q24)."""
    box = None
    try:
        x1, y1, x2, y2 = numbers(mark, ("X1", "Y1", "X2", "Y2"))
        traps["Boxes with corners in another order, sorted"] += x1 > x2 or y1 > y2
        box = min(y1, y2), min(x1, x2), max(y1, y2), max(x1, x2)
        box = _clip(box, image_size(image.image_path), traps)
    except ValueError:
        traps["Marks without four corners: only their image is labelled"] += 1
    linked = re.findall(r"\d+", str(mark.get("LinkedNBSSLesionNumber") or "")) or ["0"]
    verdicts = {_omidb_pathology(episode, image.laterality, str(int(n)), traps) for n in linked}
    # Several linked lesions: one malignant decides; benign only when all of them are.
    pathology = "malignant" if "malignant" in verdicts else min(verdicts)
    traps["Marks whose linked lesion has no deciding opinion: pathology unknown"] += not pathology
    kinds = {kind for flag, kind in OMIDB_FLAGS.items() if mark.get(flag)}
    return _typed(image, kinds, pathology, box, traps)


def _dict(value: object) -> dict:
    """A level of OMI-DB's JSON; empty where the file holds null or "" in its place."""
    return value if isinstance(value, dict) else {}


def _omidb_json(client: Path, kind: str) -> dict:
    upper = client / f"{kind.upper()}_{client.name}.json"
    return read_json(upper if upper.is_file() else client / f"{kind}_{client.name}.json")


def _leaves(node: dict) -> Iterator[tuple[str, str]]:
    """Names (lower case) and values at any level of an episode."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield key.lower(), str(value)


def _omidb_normal(episode: dict) -> bool:
    """No interval cancer, surgery, benign or malignant opinion, and no examination without one."""
    events = {name: _dict(episode[name]) for name in OMIDB_EVENTS if episode.get(name) is not None}
    examined = [event for name, event in events.items() if name != "SCREENING"]
    return (
        bool(events)
        and episode.get("EpisodeType") not in ("CI", "Interval case")
        and not episode.get("INTERVALCANCER")
        and "SURGERY" not in events
        and all(event.get("left_opinion") or event.get("right_opinion") for event in examined)
        and not any(k.endswith("opinion") and v in OMIDB_OPINIONS for k, v in _leaves(episode))
    )


def _omidb_episode(study: dict, episodes: dict[str, dict], traps: Traps) -> dict:
    """The study's episode, by its id or else by an event on the day of the study."""
    if (key := str(study.get("EpisodeID"))) in episodes:
        return episodes[key]
    day = str(study.get("StudyDate") or "").replace("-", "")
    for episode in episodes.values():
        dates = (v for k, v in _leaves(episode) if k in ("dateperformed", "datetaken"))
        if day and day in (date.replace("-", "") for date in dates):
            traps["Studies whose episode id is unknown to NBSS, linked by date"] += 1
            return episode
    traps["Studies without an NBSS episode: their marks have no pathology"] += 1
    return {}


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
        if verdict := OMIDB_OPINIONS.get(own):
            return verdict
        verdict = OMIDB_OPINIONS.get(event.get("left_opinion" if side == "L" else "right_opinion"))
        if verdict == "malignant" and lesion and not single:
            traps["Malignant opinions of a side with several lesions, used for none of them"] += 1
        elif verdict:
            return verdict
    return ""


# --- CBIS-DDSM ---

CBIS_TABLES = {
    f"{kind}_case_description_{part}_set.csv": split
    for kind in ("mass", "calc")
    for part, split in (("train", ""), ("test", "test"))
}
CBIS_COLUMNS = (
    *("patient_id", "left or right breast", "image view", "abnormality type", "pathology"),
    *("image file path", "cropped image file path", "ROI mask file path"),
)
CBIS_WORDS = {
    "left or right breast": {"LEFT": "L", "RIGHT": "R"},
    "abnormality type": {"mass": "mass", "calcification": "calcification"},
    "pathology": {"MALIGNANT": "malignant"}
    | dict.fromkeys(("BENIGN", "BENIGN_WITHOUT_CALLBACK"), "benign"),
}


def read_cbis_ddsm(root: Path, traps: Traps) -> list[Finding]:
    """CBIS-DDSM, the Curated Breast Imaging Subset of DDSM (digitised film, masks, pathology).

    Access: "CBIS-DDSM" at The Cancer Imaging Archive, open. Licence: CC BY 3.0.

    Four case tables and a DICOM tree. The tables' file names are older than the tree's and name
    mask and crop in either order, so files are looked up by their folder (series UID, else case)
    and told apart by size and values. The published test cases keep their split; `prepare` takes
    validation from the rest.
    """
    files = _files(root)
    names = {path.name.lower() for path in files} & CBIS_TABLES.keys()
    tables = {name: _named(files, root, name) for name in names}
    if not tables:
        raise ValueError(f"{root}: found none of {', '.join(CBIS_TABLES)}; put them there")
    traps["Case tables that are absent, so that their cases are not read"] += 4 - len(tables)
    folders = defaultdict(set)  # folder name -> DICOM files anywhere below it
    for path in files:
        for part in path.relative_to(root).parts[:-1] if path.suffix.lower() == ".dcm" else ():
            folders[part].add(path)
    rows = [
        (where, CBIS_TABLES[name], row)
        for name, path in sorted(tables.items())
        for where, row in _table(path, CBIS_COLUMNS)
    ]
    tested = {row["patient_id"] for _, split, row in rows if split == "test"}
    both = tested & {row["patient_id"] for _, split, row in rows if split != "test"}
    traps["Patients in a train and in a test table, put in test with all images"] += len(both)
    findings, films = [], defaultdict(set)
    with progress(len(rows), "CBIS-DDSM masks") as advance:
        for where, _, row in rows:
            advance(1)
            film, *regions = (_inside(row[column]) for column in CBIS_COLUMNS[-3:])
            if not film or not all(regions):
                traps[ESCAPES] += 1
                continue
            film, *regions = (_cbis_files(parts, folders) for parts in (film, *regions))
            if not film:
                traps[ABSENT] += 1
                continue
            path = max(film, key=lambda path: (path.stat().st_size, path))
            words = (_known(known, row[column], where) for column, known in CBIS_WORDS.items())
            side, finding, pathology = words
            patient, view = row["patient_id"], row["image view"]
            split = "test" if patient in tested else ""
            finding = Finding(str(path), patient, side, view, finding, pathology, split=split)
            films[patient, side, view].add(finding.image_path)
            findings.append(_cbis_region(finding, set().union(*regions), traps))
    same = _cbis_same_films(films.values(), traps)
    traps["Findings, and no normal image (--normals-from-annotated)"] += len(findings)
    return [replace(f, image_path=same.get(f.image_path, f.image_path)) for f in findings]


def _cbis_files(parts: tuple[str, ...], folders: dict[str, set[Path]]) -> set[Path]:
    """The DICOM files in the folder that a table's path means: its series within its case."""
    case, series = (folders.get(part, set()) for part in (parts[0], parts[-2:][0]))
    return case & series or case or series


def _cbis_region(finding: Finding, paths: set[Path], traps: Traps) -> Finding:
    """Add mask and box: the mask is the largest file with two values; the crop is a photograph."""
    size = image_size(finding.image_path)
    sizes = {path: image_size(str(path)) or (0, 0) for path in paths}
    for path in sorted(paths, key=lambda path: (-math.prod(sizes[path]), path)):
        if (file := _decoded(path)) is None:
            continue
        low, high = file.stored.min(), file.stored.max()
        mask = file.stored == high
        if low == high or not np.all(mask | (file.stored == low)):
            continue
        rows, cols = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        down, across = (n / m for n, m in zip(size or mask.shape, mask.shape, strict=True))
        traps["Masks of another size than their image, rescaled to it"] += (down, across) != (1, 1)
        box = (rows[0] * down, cols[0] * across, (rows[-1] + 1) * down, (cols[-1] + 1) * across)
        return replace(
            finding, bbox=_clip(tuple(map(float, box)), size, traps), mask_path=str(path)
        )
    traps["Abnormalities without a readable mask: only their image is labelled"] += 1
    return finding


def _cbis_same_films(films: Iterable[set[str]], traps: Traps) -> dict[str, str]:
    """A film with masses and calcifications is distributed twice: copy -> the one to use."""
    same = {}
    for paths in films:
        first = {}
        for path in sorted(paths) if len(paths) > 1 else ():
            if film := _decoded(Path(path)):
                same[path] = first.setdefault(film.image_uid, path)
                traps["Films distributed twice, joined"] += same[path] != path
    return same


# --- VinDr-Mammo ---

VINDR_COLUMNS = (
    *("study_id", "image_id", "laterality", "view_position", "height", "width", "breast_birads"),
    *("finding_categories", "finding_birads", "xmin", "ymin", "xmax", "ymax", "split"),
)
VINDR_CATEGORIES = {
    "Mass": "mass",
    "Suspicious Calcification": "calcification",
    "Architectural Distortion": "distortion",
    **dict.fromkeys(("Asymmetry", "Focal Asymmetry", "Global Asymmetry"), "asymmetry"),
}


def read_vindr(root: Path, traps: Traps) -> list[Finding]:
    """VinDr-Mammo (digital, boxes, BI-RADS; two hospitals in Hanoi).

    Access: "VinDr-Mammo" at PhysioNet, restricted: sign the data use agreement.
    Licence: PhysioNet Restricted Health Data License 1.5.0.

    `finding_annotations.csv`, `images/<study>/<image>.dicom`; a study is a patient. Only findings
    of BI-RADS 3 and above are boxed, so "No Finding" is normal only in a breast of BI-RADS 1.
    """
    table = _named(_files(root), root, "finding_annotations.csv")
    findings = []
    for where, row in _table(table, VINDR_COLUMNS):
        inner = _inside(f"images/{row['study_id']}/{row['image_id']}.dicom")
        if len(inner) != 3:
            traps[ESCAPES] += 1
            continue
        path = table.parent.joinpath(*inner)
        if not path.is_file():
            traps[ABSENT] += 1
            continue
        side = _known(SIDES, row["laterality"], where)
        split = _known({"training": "", "test": "test"}, row["split"], where)
        image = Finding(str(path), row["study_id"], side, row["view_position"], split=split)
        categories = _vindr_categories(row["finding_categories"], where)
        if categories == {"No Finding"}:
            normal = row["breast_birads"].endswith("1")
            traps[NOT_NORMAL] += not normal
            pathology = _birads(row["breast_birads"])
            findings.append(replace(image, pathology="normal" if normal else pathology))
            continue
        size = numbers(row, ("height", "width"), f"{where}: ")
        box = numbers(row, ("ymin", "xmin", "ymax", "xmax"), f"{where}: ")
        resized = image_size(str(path)) not in (size, None)
        traps["Images of another size than in their table: boxes not used"] += resized
        box = None if resized else _clip(box, size, traps)
        kinds = {VINDR_CATEGORIES[c] for c in categories if c in VINDR_CATEGORIES}
        findings += _typed(image, kinds, _birads(row["finding_birads"]), box, traps)
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
    **dict.fromkeys(("calcification", "calcifications", "cluster"), "calcification"),
    # a spiculated region is drawn around a mass as well; distortions give no patches (Q24)
    **dict.fromkeys(("distortion", "spiculated region", "espiculated region"), "distortion"),
    **dict.fromkeys(("asymmetry", "assymetry"), "asymmetry"),
}


def read_inbreast(root: Path, traps: Traps) -> list[Finding]:
    """INbreast (digital, exact contours; Centro Hospitalar de Sao Joao, Porto).

    Access: "INbreast" of the Breast Research Group at INESC Porto, on request.
    Licence: the agreement signed with it; research only.

    `INbreast.csv` (fields separated by ";"), `AllXML/<file>.xml` with OsiriX
    regions, `AllDICOMs/<file>_<patient hash>_MG_<side>_<view>_ANON.dcm`. BI-RADS is given per
    image, and all its regions take it.
    """
    files = _files(root)
    names = {path.name.lower(): path for path in files}
    table = names.get("inbreast.csv")
    if table is None:
        raise ValueError(
            f"{root}: found no INbreast.csv; put it there (saved from INbreast.xls, fields parted by ;)"
        )
    images = {p.name.split("_")[0]: p for p in files if p.suffix.lower() == ".dcm"}
    drawn = [p for p in files if p.parent.name.lower() == "allxml"]
    contours = {p.stem: p for p in drawn if p.suffix.lower() == ".xml"}
    findings = []
    for where, row in _table(table, INBREAST_COLUMNS, ";"):
        if not (name := row["File Name"]):
            continue  # the spreadsheet ends in empty rows
        if (path := images.get(name)) is None:
            traps[ABSENT] += 1
            continue
        if len(path.name.split("_")) < 3:
            raise ValueError(f"{path}: expected a name such as <file>_<patient>_MG_R_CC_ANON.dcm")
        side = _known(SIDES, row["Laterality"], where)
        image = Finding(str(path), path.name.split("_")[1], side, row["View"])
        pathology = _birads(row["Bi-Rads"])
        regions = _inbreast_regions(contours[name]) if name in contours else []
        size = image_size(str(path)) if regions else None
        for kinds, box in regions:
            findings += _typed(image, kinds, pathology, _clip(box, size, traps), traps)
        if not regions:
            normal = row["Bi-Rads"].startswith("1")
            traps[NOT_NORMAL] += not normal
            findings.append(replace(image, pathology="normal" if normal else pathology))
    if findings and not contours:
        raise ValueError(f"{root}: found no .xml in a folder AllXML; put INbreast's contours there")
    return findings


def _inbreast_regions(path: Path) -> list[tuple[set[str], Box]]:
    """(type, box) of each OsiriX region; a single point is a single calcification."""
    regions = []
    try:
        # plistlib refuses entity declarations and fetches nothing
        document = plistlib.loads(path.read_bytes(), fmt=plistlib.FMT_XML)
        for roi in document["Images"][0]["ROIs"]:
            points = [point.strip("() ").split(",") for point in roi["Point_px"]]
            xy = np.array([[float(x), float(y)] for x, y in points])
            (x0, y0), (x1, y1) = np.floor(xy.min(axis=0)), np.floor(xy.max(axis=0)) + 1
            name = "calcification" if len(xy) == 1 else roi["Name"].strip().lower()
            box = (float(y0), float(x0), float(y1), float(x1))
            if not np.isfinite(box).all():
                raise ValueError(f"box {box}")
            regions.append(({INBREAST_NAMES[name]} if name in INBREAST_NAMES else set(), box))
    except (ValueError, ExpatError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: not an OsiriX region file ({error})") from None
    return regions


# --- mini-MIAS ---

MIAS_SIZE = (1024, 1024)  # of every image
MIAS_SPACING_MM = 0.2  # "reduced to 200 micron pixel edge"
MIAS_CLASSES = {
    "CALC": "calcification",
    "CIRC": "mass",  # well-defined masses
    "SPIC": "mass",  # spiculated masses
    "MISC": "mass",  # other, ill-defined masses
    "ARCH": "distortion",
    "ASYM": "asymmetry",
}
MIAS_ROW = re.compile(
    r"(?P<name>mdb(?P<n>\d{3}))\s+[FGD]\s+"
    rf"(?:NORM|(?P<kind>{'|'.join(MIAS_CLASSES)})\s+(?P<severity>[BM])"
    r"(?:\s+(?P<x>\d+)\s+(?P<y>\d+)\s+(?P<radius>\d+)|\s+\*NOTE 3\*)?)"
)


def read_mini_mias(root: Path, traps: Traps) -> list[Finding]:
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
        line = line.strip()
        if not re.match(r"mdb\d", line, re.IGNORECASE):
            continue  # the explanations around the table
        if not (row := MIAS_ROW.fullmatch(line)):
            raise ValueError(
                f"{table} line {number}: found {line[:80]!r}; expected a row such as "
                "'mdb001 G CIRC B 535 425 197'"
            )
        if (path := images.get(row["name"])) is None:
            traps[ABSENT] += 1
            continue
        box, size = None, image_size(str(path)) or MIAS_SIZE
        if size != MIAS_SIZE:  # the circles are in its pixels, and so is the spacing
            raise ValueError(f"{path}: found {size} pixels; expected mini-MIAS's own {MIAS_SIZE}")
        if row["x"]:
            x, y, radius = (float(row[key]) for key in ("x", "y", "radius"))
            middle = size[0] - y
            circle = (middle - radius, x - radius, middle + radius, x + radius)
            box = _clip(circle, size, traps)
        elif row["kind"]:
            traps["Findings without coordinates: only their image is labelled"] += 1
        n = int(row["n"])
        patient, side = f"mias{(n + 1) // 2:03d}", "R" if n % 2 else "L"
        kind = MIAS_CLASSES.get(row["kind"], "")
        pathology = {"B": "benign", "M": "malignant"}.get(row["severity"], "normal")
        spacing = (MIAS_SPACING_MM, MIAS_SPACING_MM)
        image = Finding(str(path), patient, side, "MLO", spacing_mm=spacing)
        findings.append(replace(image, finding=kind, pathology=pathology, bbox=box))
    return findings


# --- The formats of `prepare` ---


def _read(
    read: Callable, has_pathology: bool, path: Path, birads_as_pathology: bool
) -> tuple[list[Finding], list[str]]:
    """The findings of the data set in folder `path`, and a sentence for each trap that was met.

    Raises ValueError: no such folder, a damaged table, none of the images, or BI-RADS asked to
    stand for a pathology that the data set holds.
    """
    root, traps = Path(path).absolute(), Traps()
    if not root.is_dir():
        raise ValueError(f"{path}: expected the folder of the data set")
    if birads_as_pathology and has_pathology:
        raise ValueError(
            "--birads-as-pathology: this data set holds pathology; leave the option out"
        )
    findings = {}
    for row in read(root, traps):
        if not has_pathology and not birads_as_pathology and row.pathology != "normal":
            row = replace(row, pathology="")
        key = (row.image_path, row.finding, row.bbox)
        traps[REPEATED] += key in findings
        findings[key] = max(
            findings.get(key, row), row, key=lambda row: PATHOLOGIES.index(row.pathology)
        )
    if not findings:
        raise ValueError(f"{path}: found no image that its tables list; is the download complete?")
    if not has_pathology:  # no silent stand-in: the notes say what the pathology rests on
        note = BIRADS_USED if birads_as_pathology else BIRADS_UNUSED
        traps[note] += sum(bool(row.finding) for row in findings.values())
    notes = [f"{sentence}: {count}." for sentence, count in traps.items() if count]
    return list(findings.values()), notes


READERS: dict[str, Callable[[Path, bool], tuple[list[Finding], list[str]]]] = {
    "omidb": functools.partial(_read, read_omidb, True),
    "cbis-ddsm": functools.partial(_read, read_cbis_ddsm, True),
    "vindr": functools.partial(_read, read_vindr, False),
    "inbreast": functools.partial(_read, read_inbreast, False),
    "mini-mias": functools.partial(_read, read_mini_mias, True),
}
