"""INbreast: digital mammograms, exact contours, BI-RADS."""

import plistlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from support.files import reading
from support.sources import common

COLUMNS = ("Laterality", "View", "File Name", "Bi-Rads")
NAMES = {  # lower case, with the spellings that occur
    "mass": "mass",
    **dict.fromkeys(("calcification", "calcifications", "cluster"), "calcification"),
    # a spiculated region is drawn around a mass as well; distortions give no patches (Q24)
    **dict.fromkeys(("distortion", "spiculated region", "espiculated region"), "distortion"),
    **dict.fromkeys(("asymmetry", "assymetry"), "asymmetry"),
}


def read_inbreast(root: Path, traps: common.Traps) -> Iterator[common.Finding]:
    """INbreast (digital, exact contours; Centro Hospitalar de Sao Joao, Porto).

    Access: "INbreast" of the Breast Research Group at INESC Porto, on request.
    Licence: the agreement signed with it; research only.

    `INbreast.csv` (INbreast.xls saved as CSV with ';'), `AllXML/<file>.xml` with OsiriX regions,
    `AllDICOMs/<file>_<patient hash>_MG_<side>_<view>_ANON.dcm`. BI-RADS is given per image, and
    all its regions take it.
    """
    files = common.files(root)
    table = common.named(files, root, "INbreast.csv", "; save INbreast.xls as CSV with ';'")
    images = {p.name.split("_")[0]: p for p in files if p.suffix.lower() == ".dcm"}
    drawn = [p for p in files if p.parent.name.lower() == "allxml"]
    contours = {p.stem: p for p in drawn if p.suffix.lower() == ".xml"}
    for where, row in common.table(table, COLUMNS, traps, delimiter=";"):
        if not (name := row["File Name"]):
            continue  # the spreadsheet ends in empty rows
        if (path := images.get(name)) is None:
            traps[common.ABSENT, name] = 1
            continue
        with common.sparing(traps, str(path)):
            side = common.known({"L": "L", "R": "R"}, row["Laterality"], where)
            image = common.Finding(str(path), path.name.split("_")[1], side, row["View"])
            pathology = common.birads(row["Bi-Rads"])
            regions = _regions(contours[name], traps) if name in contours else []
            for kinds, box in regions:
                yield from common.typed(image, kinds, pathology, box, traps)
            if not regions:
                yield common.unmarked(image, pathology, traps)
    if not contours:
        raise ValueError(f"{root}: found no .xml in a folder AllXML; put INbreast's contours there")


def _regions(path: Path, traps: common.Traps) -> list[tuple[set[str], common.Box | None]]:
    """(type, box) of each OsiriX region; a single point is a single calcification."""
    regions, expected = [], "expected OsiriX regions"
    with reading(path, expected):
        # plistlib refuses entity declarations and fetches nothing
        document = plistlib.loads(path.read_bytes(), fmt=plistlib.FMT_XML)
        for roi in document["Images"][0]["ROIs"]:
            kinds, box = set(), None
            with common.sparing(traps), reading(path, expected):
                name = roi["Name"].strip().lower()
                kinds |= {NAMES[name]} if name in NAMES else set()
                xy = np.array([point.strip("() ").split(",") for point in roi["Point_px"]], float)
                if not len(xy) or not np.isfinite(xy).all():
                    raise ValueError(f"{name}: points {roi['Point_px'][:4]}")
                (x0, y0), (x1, y1) = np.floor(xy.min(axis=0)), np.floor(xy.max(axis=0)) + 1
                box = tuple(map(float, (y0, x0, y1, x1)))
                kinds = {"calcification"} if len(xy) == 1 else kinds
            regions.append((kinds, box))
    return regions
