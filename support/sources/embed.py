"""EMBED, the Emory Breast Imaging Dataset: digital and synthetic 2-D, boxes, pathology."""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from support.sources import common

METADATA = ("empi_anon", "acc_anon", "anon_dicom_path", "FinalImageType", "ImageLateralityFinal")
MASS, CALCIFICATION = ("massmargin", "massdens"), ("calcfind", "calcdistri", "calcnumber")
CLINICAL = ("acc_anon", "side", "asses", "massshape", "path_severity", *MASS, *CALCIFICATION)
BOXES = ("DCM_ROI_coords", "ROI_coords")  # of one release or another; the first are in DICOM pixels
SHAPES = {"": ""} | dict.fromkeys("GROXNYDL", "mass") | dict.fromkeys("TBSFV", "asymmetry")
SHAPES |= dict.fromkeys("QA", "distortion")
# Invasive and in situ cancer; high risk, borderline, benign, normal tissue. 6 is another cancer.
SEVERITY = dict.fromkeys("01", "malignant") | dict.fromkeys("2345", "benign")
NONE = ("", "0", "0.0")


def read_embed(root: Path, traps: common.Traps) -> Iterator[common.Finding]:
    """EMBED, the Emory Breast Imaging Dataset (digital and C-view, boxes, pathology; Atlanta).

    Access: "EMBED" at the AWS Open Data registry, on request. Licence: its data use agreement;
    research only, not to be passed on.

    `tables/EMBED_OpenData_metadata.csv` has a row an image with its boxes, `..._clinical.csv` a row
    a finding (exam, side), the reduced tables will do; `images/cohort_<n>/...`. No box names its
    finding: it takes what all findings of its exam and side agree on. Normal is an image without
    box whose exam says "negative", and nothing else, of its side.
    """
    paths, exams = [*root.glob("*.csv"), *root.glob("tables/*.csv")], defaultdict(set)
    names = (f"EMBED_OpenData_{kind}.csv" for kind in ("clinical", "metadata"))
    clinical, metadata = (common.named(paths, root, name) for name in names)
    for _, row in common.table(clinical, CLINICAL, traps, optional=("bside",)):
        for side in row["side"] if row["side"] in ("L", "R") else "LR":
            exams[_id(row["acc_anon"]), side].add(_opinion(row, side, traps))
    optional = ("ViewPosition", "spot_mag", *BOXES)
    images = "images/" if (root / "images").is_dir() else ""
    for where, row in common.table(metadata, METADATA, traps, optional=optional):
        if row["FinalImageType"].lower() not in ("2d", "cview") or row["spot_mag"] not in NONE:
            traps["Images that are no full view in 2D or C-view, left out"] += 1
            continue
        place = common.inside(re.sub(r"^.*?(?=cohort_)", images, row["anon_dicom_path"]))
        path = common.image(root, place, traps)
        with common.sparing(traps, path):
            side = common.known({"L": "L", "R": "R"}, row["ImageLateralityFinal"], where)
            image = common.Finding(path, _id(row["empi_anon"]), side, row["ViewPosition"])
            boxes = _boxes(row["DCM_ROI_coords"] or row["ROI_coords"], where)
            told = exams[_id(row["acc_anon"]), side]
            yield from _rows(image, boxes, told, traps) if path else ()


def _id(text: str) -> str:
    return text.removesuffix(".0")  # which some programs add


def _opinion(row: dict, side: str, traps: common.Traps) -> tuple[frozenset, str, bool]:
    """Types, pathology and whether it is negative, of a finding as far as it is of this side."""
    kinds = {SHAPES.get(row["massshape"]) or ("mass" if any(row[n] for n in MASS) else "")}
    kinds |= {"calcification"} if any(row[n] not in NONE for n in CALCIFICATION) else set()
    pathology, severity = SEVERITY.get(row["path_severity"][:1], ""), row["path_severity"]
    if pathology and row["bside"] == {"L": "R", "R": "L"}[side]:
        traps["Findings whose pathology is of the other side: pathology unknown"] += 1
        pathology = ""
    clear = row["asses"] == "N" and not severity and kinds == {""}
    return frozenset(kinds - {""}), pathology, clear


def _boxes(text: str, where: str) -> list[common.Box]:
    """Boxes (y, x, y, x) of nested lists or tuples in text."""
    found = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]
    if len(found) % 4 or not re.fullmatch(r"[-\d.,()\[\]\s]*|nan", text):
        raise ValueError(f"{where}: found {text[:80]!r}; expected boxes of four numbers")
    fours = (found[i : i + 4] for i in range(0, len(found), 4))
    return [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in fours]


def _rows(image: common.Finding, boxes: list, told: set, traps: common.Traps) -> list:
    if not boxes:
        worst = max((p for _, p, _ in told), key=common.PATHOLOGIES.index, default="")
        normal = told and all(clear for _, _, clear in told)
        return [common.unmarked(image, "normal" if normal else worst, traps)]
    told = [finding for finding in told if not finding[2]]
    kinds, pathology, _ = told[0] if len(told) == 1 else (frozenset(), "", False)
    traps["Images with boxes and findings that differ: no lesion patch"] += len(told) > 1
    typed = (common.typed(image, set(kinds), pathology, box, traps) for box in boxes)
    return [row for rows in typed for row in rows]
