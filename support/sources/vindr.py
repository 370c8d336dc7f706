"""VinDr-Mammo: digital mammograms, boxes, BI-RADS."""

import re
from collections.abc import Iterator
from pathlib import Path

from support.files import numbers
from support.mammogram import image_size
from support.sources import common

COLUMNS = (
    *("study_id", "image_id", "laterality", "view_position", "height", "width", "breast_birads"),
    *("finding_categories", "finding_birads", "xmin", "ymin", "xmax", "ymax", "split"),
)
CATEGORIES = {
    "Mass": "mass",
    "Suspicious Calcification": "calcification",
    "Architectural Distortion": "distortion",
    **dict.fromkeys(("Asymmetry", "Focal Asymmetry", "Global Asymmetry"), "asymmetry"),
}


def read_vindr(root: Path, traps: common.Traps) -> Iterator[common.Finding]:
    """VinDr-Mammo (digital, boxes, BI-RADS; two hospitals in Hanoi).

    Access: "VinDr-Mammo" at PhysioNet, restricted: sign the data use agreement.
    Licence: PhysioNet Restricted Health Data License 1.5.0.

    `finding_annotations.csv`, `images/<study>/<image>.dicom`; a study is a patient. Only findings
    of BI-RADS 3 and above are boxed, so "No Finding" is normal only in a breast of BI-RADS 1.
    """
    table = common.named(common.files(root), root, "finding_annotations.csv")
    for where, row in common.table(table, COLUMNS, traps, optional=("breast_density",)):
        names = "images", row["study_id"], f"{row['image_id']}.dicom"
        path = common.image(table.parent, names, traps)
        with common.sparing(traps, path):
            yield from _row(path, row, where, traps) if path else ()


def _row(path: str, row: dict, where: str, traps: common.Traps) -> list[common.Finding]:
    side = common.known({"L": "L", "R": "R"}, row["laterality"], where)
    split = common.known({"training": "", "test": "test"}, row["split"], where)
    density = common.DENSITY.get(row["breast_density"].lower().removeprefix("density "), "")
    view = row["view_position"]
    image = common.Finding(path, row["study_id"], side, view, split=split, density=density)
    text = row["finding_categories"]
    if not re.fullmatch(r"\['[^']+'(, '[^']+')*\]", text):
        raise ValueError(f"{where}: found {text[:80]!r}; expected a list such as ['Mass']")
    categories, box, resized = re.findall(r"'([^']+)'", text), None, False
    if categories == ["No Finding"]:
        return [common.unmarked(image, common.birads(row["breast_birads"]), traps)]
    with common.sparing(traps):  # else only the image is labelled
        size = numbers(row, ("height", "width"), f"{where}: ")
        box = numbers(row, ("ymin", "xmin", "ymax", "xmax"), f"{where}: ")
        resized = image_size(path) not in (size, None)
        traps["Images of another size than in their table: boxes not used"] += resized
    kinds = {CATEGORIES[name] for name in categories if name in CATEGORIES}
    pathology = common.birads(row["finding_birads"])
    return common.typed(image, kinds, pathology, None if resized else box, traps)
