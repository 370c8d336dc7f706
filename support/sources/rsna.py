"""RSNA Screening Mammography Breast Cancer Detection 2022: digital, labels of images, no boxes."""

from collections.abc import Iterator
from pathlib import Path

from support.sources import common

COLUMNS = ("patient_id", "image_id", "laterality", "view", "cancer", "biopsy", "BIRADS", "implant")
FLAGS = {"0": False, "0.0": False, "1": True, "1.0": True}


def read_rsna(root: Path, traps: common.Traps) -> Iterator[common.Finding]:
    """RSNA Screening Mammography Breast Cancer Detection (digital; Australia and the USA).

    Access: the competition "RSNA Screening Mammography Breast Cancer Detection" at Kaggle.
    Licence: its rules; non-commercial research and education.

    `train.csv`, a row an image, and `train_images/<patient>/<image>.dcm`. Cancer is a label of the
    breast, nobody knows where it lies. Normal is a breast without cancer, biopsy or recall
    (BI-RADS 0; one of the two sites gives none), and without an implant, which is no tissue.
    """
    table = common.named(root.iterdir(), root, "train.csv")
    for where, row in common.table(table, COLUMNS, traps):
        names = ("train_images", row["patient_id"], f"{row['image_id']}.dcm")
        path = common.image(table.parent, names, traps)
        with common.sparing(traps, path):
            side = common.known({"L": "L", "R": "R"}, row["laterality"], where)
            flags = ("cancer", "biopsy", "implant")
            cancer, biopsy, implant = (common.known(FLAGS, row[name], where) for name in flags)
            clear = not biopsy and not implant and row["BIRADS"] not in ("0", "0.0")
            pathology = "malignant" if cancer else "normal" if clear else ""
            image = common.Finding(path, row["patient_id"], side, row["view"])
            yield from [common.unmarked(image, pathology, traps)] if path else []
