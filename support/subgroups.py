"""Beyond the paper: for which lesions and women a regime does better or worse."""

from collections import defaultdict
from pathlib import Path

import numpy as np

from evaluate import MAIN, condition_table
from support import files, patchset
from support.sources import BOX

FACTS = ("view", "density", "size", "patient_pathology")  # columns of scores.csv
WOMEN = {  # patient_pathology: of all that `prepare` was given of a woman
    "malignant": "women with a malignant finding",
    "benign": "women with benign findings only",
    "normal": "women without any finding",
}


def patch_facts(data: Path, split: str) -> dict[str, np.ndarray]:
    """Of each patch (N,) str, "" = unknown: view; breast density; `size`, the longest side of its
    lesion's box in mm, or in stored pixels where patches have native ones; worst finding of the
    woman. From DATA/manifest.csv; all unknown where an older `prepare` left out the image_uid.
    """
    patches, config, rows = patchset.Patches.open(data, split), patchset.patch_config(data), []
    images, columns = defaultdict(list), ("image_uid", *FACTS, "finding", "pathology", *BOX)
    for _, row in files.csv_rows(data / "manifest.csv", (), columns):
        images[row["image_uid"]].append(row)
    images.pop("", None)
    windows = np.array([patches.column(name) for name in (*BOX, "scale")], dtype=float).T
    for kind, uid, window in zip(patches.kind, patches.column("image_uid"), windows, strict=True):
        own, scale = images.get(uid, []), window[4]
        lesions = [row for row in own if f"{row['pathology']}_{row['finding']}" == kind]
        boxes = [[float(row[name]) for name in BOX] for row in lesions if row[BOX[0]]]
        mm = (config["spacing_mm"] or 0) * config["patch_size"] / scale / (window[2:4] - window[:2])
        size = f"{longest_side(np.array(boxes), window, mm):.1f}" if boxes else ""
        told = {name: {row[name] for row in own} - {""} for name in FACTS} | {"size": {size}}
        rows.append([values.pop() if len(values) == 1 else "" for values in told.values()])
    return dict(zip(FACTS, np.array(rows).T, strict=True))


def longest_side(boxes: np.ndarray, window: np.ndarray, mm: np.ndarray) -> float:
    """Of the box (n, 4) that shares most with the window; mm: a stored pixel's sides, 0 = pixels"""
    shared = np.minimum(boxes[:, 2:], window[2:4]) - np.maximum(boxes[:, :2], window[:2])
    box = boxes[shared.clip(0).prod(axis=1).argmax()]
    return float(((box[2:] - box[:2]) * (mm if mm.any() else 1)).max())


def subgroups(kind, patients, scores, facts, unit: str, fold=None) -> dict[str, dict[str, dict]]:
    """Table of the main condition (`condition_table`) for each subgroup of each kind.

    {} stands for a subgroup with fewer than two patients of a class, or a fold with fewer; kinds of
    which nothing is known are left out. Thirds of the sizes are cut over all folds together.
    """
    normal, malignant = kind == "normal", np.char.startswith(kind, "malignant")
    size = np.where(facts["size"] == "", "nan", facts["size"]).astype(float)
    view, groups = facts["view"], {}
    if np.isfinite(size[malignant]).any():
        a, b = np.nanquantile(size[malignant], (1 / 3, 2 / 3), method="inverted_cdf")
        thirds = {f"up to {a} {unit}": size <= a, f"{a} to {b} {unit}": (size > a) & (size <= b)}
        thirds |= {f"over {b} {unit}": size > b}
        groups["Longest side of the lesion"] = {k: v | normal for k, v in thirds.items()}
    other = ~np.isin(view, ("CC", "MLO", ""))
    groups["View"] = {"CC": view == "CC", "MLO": view == "MLO", "others": other}
    women = {name: normal & (facts["patient_pathology"] == worst) for worst, name in WOMEN.items()}
    groups["Normal patches of"] = {k: v | malignant for k, v in women.items() if v.any()}
    groups["Breast density"] = {letter: facts["density"] == letter for letter in "abcd"}
    tables = defaultdict(dict)
    for what, parts in groups.items():
        for name in [name for name, at in parts.items() if (at & malignant).any()]:
            masked = np.where(parts[name], kind, "")  # every fold must hold the subgroup
            tables[what][name] = condition_table(masked, patients, scores, MAIN, fold)
    return tables
