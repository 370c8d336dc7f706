"""mini-MIAS: digitised film, circles, pathology."""

import re
from collections.abc import Iterator
from pathlib import Path

from support.mammogram import image_size
from support.sources import common

SIZE = (1024, 1024)  # of every image
SPACING_MM = (0.2, 0.2)  # "reduced to 200 micron pixel edge"
CLASSES = {
    "CALC": "calcification",
    **dict.fromkeys(("CIRC", "SPIC", "MISC"), "mass"),  # well-defined, spiculated, ill-defined
    "ARCH": "distortion",
    "ASYM": "asymmetry",
}
ROW = re.compile(
    r"(?P<name>mdb(?P<n>\d{3}))\s+[FGD]\s+"
    rf"(?:NORM|(?P<kind>{'|'.join(CLASSES)})\s+(?P<severity>[BM])"
    r"(?:\s+(?P<x>\d+)\s+(?P<y>\d+)\s+(?P<radius>\d+)|\s+\*NOTE 3\*)?)"
)


def read_mini_mias(root: Path, traps: common.Traps) -> Iterator[common.Finding]:
    """mini-MIAS, the reduced database of the Mammographic Image Analysis Society (film, MLO).

    Access: "The mini-MIAS database of mammograms" at the Pilot European Image Processing Archive,
    open. Licence: the society's agreement; scientific research only, with citation.

    `Info.txt`: image, tissue, class, severity, circle (x, y from the bottom left, radius).
    Odd numbers are right breasts, even ones left; two numbers in a row are one patient.
    """
    files = common.files(root)
    table = common.named(files, root, "Info.txt")
    images = {path.stem.lower(): path for path in files if path.suffix.lower() == ".pgm"}
    for number, line in enumerate(table.read_text(encoding="latin-1").splitlines(), 1):
        line = line.strip()
        if not re.match(r"mdb\d", line, re.IGNORECASE):
            continue  # the explanations around the table
        path = images.get(line[:6].lower())
        with common.sparing(traps, str(path or "")):
            if not (row := ROW.fullmatch(line)):
                text = f"found {line[:80]!r}; expected a row such as 'mdb001 G CIRC B 535 425 197'"
                raise ValueError(f"{table} line {number}: {text}")
            if path is None:
                traps[common.ABSENT, row["name"]] = 1
                continue
            yield _finding(row, str(path), traps)


def _finding(row: re.Match, path: str, traps: common.Traps) -> common.Finding:
    if (size := image_size(path)) not in (SIZE, None):  # circles are in its pixels
        raise ValueError(f"{path}: found {size} pixels; expected mini-MIAS's own {SIZE}")
    box = None
    if row["x"]:
        x, y, radius = (float(row[key]) for key in ("x", "y", "radius"))
        y = SIZE[0] - y
        box = common.clip((y - radius, x - radius, y + radius, x + radius), path, traps)
    elif row["kind"]:
        traps["Findings without coordinates: only their image is labelled"] += 1
    n, kind = int(row["n"]), CLASSES.get(row["kind"], "")
    patient, side = f"mias{(n + 1) // 2:03d}", "R" if n % 2 else "L"
    pathology = {"B": "benign", "M": "malignant"}.get(row["severity"], "normal")
    return common.Finding(path, patient, side, "MLO", kind, pathology, box, spacing_mm=SPACING_MM)
