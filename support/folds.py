"""Cross-validation and scarcity, beyond the paper: folds of patients, fewer of them with cancer."""

from collections import defaultdict
from dataclasses import replace

import click
import numpy as np

from data import PrepareConfig, SourceImage, split_patients
from support.sources import Finding


def deal_folds(findings: list[Finding], config: PrepareConfig) -> list[Finding]:
    """The findings, each with the split of its patient in fold K of N; without --fold as they are.

    Patients are dealt into N folds by the seed, stratified as the splits are (`data.deal`), the
    same whatever K: fold K (of 1 to N) is tested, fold K+1 (after N the first) validates, the
    others train; published splits are not used, which is said. Raises ValueError: no such fold.
    """
    if config.fold is None:
        return findings
    k, _, n = (int(x) if x.isdecimal() and len(x) < 4 else 0 for x in config.fold.partition("/"))
    if not 1 <= k <= n or n < 3:
        raise ValueError(f"--fold {config.fold}: expected K/N, fold K (1 to N) of N, 3 or more")
    if given := {row.patient_id for row in findings if row.split}:
        text = f"--fold: the source's own splits of {len(given)} patients are not used"
        click.echo(text, err=True)
        findings = [replace(row, split="") for row in findings]
    fold = split_patients(findings, config.seed, config.normals, dict.fromkeys(range(n), 1.0))
    split = {k - 1: "test", k % n: "val"}
    return [replace(row, split=split.get(fold[row.patient_id], "train")) for row in findings]


def keep_share(images: list[SourceImage], share: float | None, seed: int) -> list[SourceImage]:
    """The images, those of all but a share of the training patients with cancer left out.

    What is left out keeps its place, as an image of no split that gives no class: the others'
    patches stay the same, those of validation and test byte for byte. Patients are kept in an order
    that the seed draws, the same share among those with each type of malignant lesion: those kept
    at 0.1 are among those kept at 0.25. Raises ValueError: a type left without patients.
    """
    if share is None:
        return images
    ill = {r.patient_id for image in images for r in image.rows if r.pathology == "malignant"}
    lesions, alike = defaultdict(set), defaultdict(list)
    for image in images:
        if image.split == "train" and (patient := image.rows[0].patient_id) in ill:
            lesions[patient] |= {key for key in image.classes if "malignant" in key}
    for at in np.random.default_rng(seed).permutation(len(patients := sorted(lesions))):
        alike[frozenset(lesions[patients[at]])].append(patients[at])
    kept = {p for same in alike.values() for p in same[: int(share * len(same) + 0.5)]}
    text = f"--malignant-share {share:g}: {len(kept)} of {len(lesions)} patients with cancer train"
    for key in sorted(set().union(*lesions.values())):
        having = {patient for patient in lesions if key in lesions[patient]}
        text += f"; {key} {len(having & kept)} of {len(having)}"
        if not having & kept:
            raise ValueError(f"{text}; expected at least one of each class, give a larger share")
    click.echo(f"{text}; the others are left out", err=True)
    out, gone = lesions.keys() - kept, {"split": "", "classes": {}}
    return [replace(i, **gone) if i.rows[0].patient_id in out else i for i in images]
