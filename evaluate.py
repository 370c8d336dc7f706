"""§3 Results and t-SNE: AUC, DeLong's test, what holds when patches share a patient, Table 1.

Scores are p(cancer), labels 1 malignant and 0 not; a cluster is a patient. Where sentences stand:

    "computed using the DeLong method"         delong_test; for several seeds p_delong of compare
    "test performance on real data", Table 1   condition_table, compare
    "the last feature layer in the model"      pooled_features, embed; which patches, Figures 4 to
                                               6: figures_4_to_6 of support/report.py
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import special
from sklearn.manifold import TSNE
from sklearn.metrics import roc_curve
from threadpoolctl import threadpool_limits

from support.patchset import Patches
from support.runs import finished, weights_hash
from train import classifier_scores, load_classifier

ALPHA = 0.05  # Q37: two-sided; the paper calls no other level significant


# --- §3 Results: AUC and the DeLong method (E4) ---


def checked(y, *scores) -> tuple[np.ndarray, np.ndarray]:
    """Labels as bool (N,) and scores as float64 (K, N). Raises ValueError for unusable input."""
    y, shapes = np.asarray(y), [np.shape(s) for s in scores]
    if y.ndim != 1 or not np.isin(y, (0, 1)).all() or any(shape != y.shape for shape in shapes):
        found = f"labels of shape {y.shape}, values {np.unique(y)[:4].tolist()}, scores {shapes}"
        raise ValueError(f"found {found}; expected one 0 or 1 and one score per patch")
    y, scores = y.astype(bool), np.array(scores, dtype=np.float64)
    if np.isnan(scores).any():
        raise ValueError(f"scores: found {np.isnan(scores).sum()} NaN; expected a number per patch")
    if not 2 <= y.sum() <= len(y) - 2:
        found = f"{y.sum()} positive and {(~y).sum()} negative patches"
        raise ValueError(f"labels: found {found}; expected at least two of each class")
    return y, scores


def placements(y: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """DeLong's structural components (K, N): V10 at the positives, V01 at the negatives.

    V10 is the share of negatives scored below a positive, V01 the share of positives scored above
    a negative, ties one half: the mean of either is the AUC. One sort per classifier; within a run
    of ties the middle count is Sun and Xu's (2014) midrank TZ less the midrank within the class.
    """
    positives = np.count_nonzero(y)
    v = np.empty_like(scores)
    for row, values in zip(v, scores, strict=True):
        order = np.argsort(values)
        values, is_positive = values[order], y[order]
        edges = np.flatnonzero(np.r_[True, values[1:] != values[:-1], True])  # runs of ties
        counted = np.r_[0, np.cumsum(is_positive)][edges]
        above = positives - (counted[:-1] + counted[1:]) / 2
        below = (edges[:-1] + edges[1:]) / 2 - (positives - above)
        row[order] = np.where(
            is_positive,
            np.repeat(below / (len(y) - positives), np.diff(edges)),
            np.repeat(above / positives, np.diff(edges)),
        )
    return v


def delong_covariance(y: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Covariance (K, K) of the AUCs when patches are independent: S10/m + S01/n."""
    v10, v01 = v[:, y], v[:, ~y]
    return np.atleast_2d(np.cov(v10) / v10.shape[1] + np.cov(v01) / v01.shape[1])


def clustered_covariance(y: np.ndarray, v: np.ndarray, clusters) -> np.ndarray:
    """Covariance (K, K) of the AUCs when patches of one patient are not independent.

    Obuchowski 1997 (Biometrics 53:567), with its factors I/(I-1) over the patients that have
    positives, negatives, or either. With one patch per patient it *is* DeLong's, factor included.
    """
    _, at = np.unique(clusters, return_inverse=True)
    patients = at.max() + 1
    with_class = [len(np.unique(at[y])), len(np.unique(at[~y]))]
    if min(with_class) < 2:
        found = f"{with_class[0]} patients with positive and {with_class[1]} with negative patches"
        raise ValueError(f"clusters: found {found}; expected at least two of each")
    centred = v - v[:, y].mean(axis=1, keepdims=True)
    a, b = (  # (K, I) sums over each patient, as shares of the class
        np.array([np.bincount(at[c], row[c], patients) for row in centred]) / np.count_nonzero(c)
        for c in (y, ~y)
    )
    s10, s01, s11 = (i / (i - 1) for i in (*with_class, patients))
    return s10 * a @ a.T + s01 * b @ b.T + s11 * (a @ b.T + b @ a.T)


def interval(value: float, variance: float, df: float = math.inf, level: float = 0.95) -> tuple:
    """Low, high, z (or t), two-sided p; no variance: p = 1 for no difference, else 0."""
    error = math.sqrt(variance)
    half = float(special.stdtrit(df, (1 + level) / 2)) * error
    z = value / error if error else math.copysign(math.inf, value) if value else 0.0
    return value - half, value + half, z, float(2 * special.stdtr(df, -abs(z)))


def auc_ci(y, scores, level: float = 0.95) -> tuple[float, float, float]:
    """AUC and DeLong's interval, cut at 0 and 1: Obuchowski's with each patch its own patient."""
    return clustered_ci(y, scores, np.arange(len(y)), level)


def delong_test(y, scores_a, scores_b) -> tuple[float, float, float, float]:
    """AUC of a, AUC of b, z (with the sign of a - b) and the paired two-sided p (E4)."""
    y, scores = checked(y, scores_a, scores_b)
    v = placements(y, scores)
    d = v[:1] - v[1:]  # its variance is free of the rounding of C11 + C22 - 2 C12
    z_and_p = interval(float(d[0, y].mean()), float(delong_covariance(y, d)[0, 0]))[2:]
    return *v[:, y].mean(axis=1).tolist(), *z_and_p


# --- Beyond the paper: patients as units, several seeds, Holm, power ---


def clustered_ci(y, scores, clusters, level: float = 0.95) -> tuple[float, float, float]:
    """AUC and Obuchowski's interval (patients are independent), cut at 0 and 1."""
    auc, *spread = _mean_auc(by_fold(y, [scores], clusters), [(1, [0])])
    low, high, *_ = interval(auc, *spread, level)
    return auc, max(0.0, low), min(1.0, high)


def clustered_test(
    y, scores_a, scores_b, clusters, level: float = 0.95
) -> tuple[float, float, float, float, float, float]:
    """AUC of a, of b, their difference a - b, its interval and two-sided p (Obuchowski 1997)."""
    ((y, v, _),) = folds = by_fold(y, [scores_a, scores_b], clusters)
    difference, *spread = _mean_auc(folds, [(1, [0]), (-1, [1])])
    low, high, _, p = interval(difference, *spread, level)
    return *v[:, y].mean(axis=1).tolist(), difference, low, high, p


def mean_roc(y, scores, fold=None) -> np.ndarray:
    """Sensitivity (101,) at 0, 1 ... 100% false positives: mean over seeds (K, N), and folds."""
    grid, fold = np.linspace(0, 1, 101), np.zeros(len(y)) if fold is None else fold
    drawn = [(y[at], s[at]) for at in (fold == k for k in np.unique(fold)) for s in scores]
    return np.mean([np.interp(grid, *roc_curve(*pair)[:2]) for pair in drawn], axis=0)


def by_fold(y, scores, clusters, fold=None) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Labels (n,), placements (K, n), patients (n,) of each fold; without `fold` (N,), of all.

    y, clusters: (N,); scores: (K, N). Raises ValueError for unusable input.
    """
    y, scores = checked(y, *scores)
    if np.shape(clusters) != y.shape:
        raise ValueError(f"clusters: found shape {np.shape(clusters)} for {len(y)} patches")
    clusters, fold = np.asarray(clusters), np.zeros(len(y)) if fold is None else fold
    parts = [fold == name for name in np.unique(fold)]
    return [(y[at], placements(y[at], scores[:, at]), clusters[at]) for at in parts]


def _mean_auc(folds, groups) -> tuple[float, float, float]:
    """Weighted sum of regimes' mean AUCs, mean over folds; its variance, degrees of freedom.

    folds: as `by_fold`; groups: (weight, rows of v) per regime, the rows being its training seeds.
    The seeds of a regime are what the readers are in a multi-reader study, so the variance is
    Obuchowski and Rockette's (1995) with patient-clustered covariances of the AUCs: in one fold
        s^2 (1/K_a + 1/K_b) + max(0, cov2_a + cov2_b - 2 cov3)
    for a difference, s^2 among the seeds of a regime (pooled over regimes and folds), cov2 between
    two seeds of one regime, cov3 across. Over F folds, each with patients of its own, variances
    add: their sum / F^2, the covariances summed before the max, for it would bias each fold's.
    Folds weigh the same: they are dealt equal, and weights by variance would follow the results.
    Degrees of freedom after Satterthwaite with the test-set part taken as known (Hillis 2007).
    A regime with a single seed makes the seeds fixed: then it is Obuchowski 1997 on the means.

    What it does not hold: models of different folds share most of their training patients, so the
    folds are no independent replications of training, and no estimate from them of how results vary
    with the training set is unbiased (Bengio and Grandvalet 2004). Nothing here uses the spread
    over folds: interval and test are conditional on these training sets, about new test patients
    and new seeds. For another training set they are too narrow (Bates, Hastie, Tibshirani 2023).
    Seeds count as drawn anew in each fold: give each its own (--seed) if the same seed may be
    lucky in all of them, as with the same random first weights.
    """
    parts = [(y, sum(w * v[k].mean(axis=0) for w, k in groups)[None], who) for y, v, who in folds]
    value = float(np.mean([d[0, y].mean() for y, d, _ in parts]))
    if min(len(rows) for _, rows in groups) == 1:
        test = sum(float(clustered_covariance(*part)[0, 0]) for part in parts)
        return value, test / len(folds) ** 2, math.inf
    test = pooled = 0.0
    for y, v, clusters in folds:
        covariance, aucs = clustered_covariance(y, v, clusters), v[:, y].mean(axis=1)
        pooled += sum(float(aucs[rows].var()) * len(rows) for _, rows in groups)
        for weight, rows in groups:
            for other_weight, others in groups:
                block, k = covariance[np.ix_(rows, others)], len(rows)
                same = rows is others
                mean = (block.sum() - np.trace(block)) / (k * (k - 1)) if same else block.mean()
                test += weight * other_weight * float(mean)
    free = sum(len(rows) - 1 for _, rows in groups) * len(folds)
    seeds = pooled / free * sum(weight**2 / len(rows) for weight, rows in groups) / len(folds)
    variance = max(0.0, test) / len(folds) ** 2 + seeds
    return value, variance, free * (variance / seeds) ** 2 if seeds else math.inf


def compare(y, scores, baseline, clusters, fold=None) -> dict[str, float]:
    """Mean AUC over the seeds of a regime (K, N), alone and against the baseline's (K_b, N).

    low, high and delta_low, delta_high, p_clustered: patients vary, and the training seeds where
    both have several. p_delong: these very models, every patch on its own (the paper's test).
    detectable: the smallest true difference found at 5% with 80% power.
    With one seed each p_delong is that of `delong_test` and p_clustered that of `clustered_test`.
    fold: the fold (N,) of a cross-validation that tests each patch, a patient in one of them. AUCs
    are then of a fold's own models on its own patients, and averaged: scores of different models
    are never ranked together. What that means for the test: `_mean_auc`.
    """
    folds = by_fold(y, [*scores, *baseline], clusters, fold)
    ours, theirs = np.arange(len(scores)), len(scores) + np.arange(len(baseline))
    # the baseline's seeds (weight 0) only help to tell how seeds vary
    own = [(1, ours)] if scores is baseline else [(1, ours), (0, theirs)]
    auc, *spread = _mean_auc(folds, own)
    low, high, *_ = interval(auc, *spread)
    row = {"auc": auc, "low": max(0.0, low), "high": min(1.0, high)}
    delta, variance, df = _mean_auc(folds, [(1, ours), (-1, theirs)])
    low, high, _, p = interval(delta, variance, df)
    row |= {"delta": delta, "delta_low": low, "delta_high": high, "p_clustered": p}
    d = [(y, (v[ours].mean(axis=0) - v[theirs].mean(axis=0))[None]) for y, v, _ in folds]
    alone = sum(float(delong_covariance(*part)[0, 0]) for part in d) / len(folds) ** 2
    row["p_delong"] = interval(delta, alone)[3]
    power = float(special.stdtrit(df, 1 - ALPHA / 2) + special.stdtrit(df, 0.8))
    return row | {"detectable": power * math.sqrt(variance)}


def holm(p: list[float]) -> list[float]:
    """Holm's step-down correction for the number of tests."""
    p = np.asarray(p, dtype=float)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(adjusted, 1).tolist()


# --- §3 Results: Table 1, its regimes ---

BASELINE, BLOB = "Baseline", "Blob control"


@dataclass(frozen=True, eq=False)
class Regime:
    """One row of Table 1: training runs that differ in their seed only."""

    name: str
    proportion: float
    folder: Path
    runs: list[Path]
    seeds: list[int]
    hashes: list[str]  # of the weights
    config: dict  # without the seed


def open_regime(folder: Path, fingerprint: str) -> Regime:
    """A run of train-cls, or a folder of seed-0, seed-1 ...; `fingerprint` is the patch set's."""
    by_seed = {int(p.name[5:]): p for p in folder.glob("seed-*") if p.name[5:].isdecimal()}
    runs = [by_seed[k] for k in sorted(by_seed)] or [folder]
    configs = [finished(run, "train-cls")["config"] for run in runs]
    seeds = [config.pop("seed") for config in configs]
    for run, config in zip(runs, configs, strict=True):
        if config["data"] != fingerprint:
            raise ValueError(
                f"{run}: trained on patch set {config['data'][:12]}, found {fingerprint[:12]}; "
                "give --data the patch set that it was trained on"
            )
        if config != configs[0]:
            raise ValueError(f"{run}: differs from {runs[0]} in more than the seed; train it again")
    hashes = [weights_hash(load_classifier(run, torch.device("cpu"))[0]) for run in runs]
    synthetic = configs[0]["synthetic"]
    proportion = float(configs[0]["proportion"]) if synthetic else 0.0
    decay = "w/ decay" if configs[0]["decay"] < 1 else "w/o decay"
    name = f"{100 * proportion:g}% {decay}" if synthetic else BASELINE
    name = BLOB if any(s["control"] == "blob" for s in synthetic) else name
    if augment := configs[0]["augment"]:
        name = f"{name}, {augment}" if synthetic else f"{augment.capitalize()} augmentation"
    return Regime(name, proportion, folder, runs, seeds, hashes, configs[0])


def is_control(name: str) -> bool:
    return name.startswith(BLOB)


def is_hypothesis(name: str) -> bool:
    """Whether a regime is one about synthetic lesions: no control, nor augmentation alone."""
    return not (name == BASELINE or is_control(name) or name.endswith("augmentation"))


def compared_with(name: str, names: Collection[str]) -> tuple[str, str]:
    """What a regime's difference is to, and its control: those augmented alike, so that what
    augmentation gives is not put down to synthetic patches."""
    _, comma, augment = name.partition(", ")
    alike = f"{augment.capitalize()} augmentation" if augment else BASELINE
    return alike if alike in names else BASELINE, BLOB + comma + augment


def open_regimes(baseline: Path, augmented: Sequence[Path], fingerprint: str) -> list[Regime]:
    """The baseline, then as in Table 1 by proportion, blob controls last."""
    regimes = [open_regime(Path(folder), fingerprint) for folder in augmented]
    regimes.sort(key=lambda r: (is_control(r.name), r.proportion))
    regimes.insert(0, open_regime(Path(baseline), fingerprint))
    if regimes[0].name != BASELINE:
        found = f"found {regimes[0].name}; expected neither synthetic patches nor augmentation"
        raise ValueError(f"--baseline {baseline}: {found}")
    names = [regime.name for regime in regimes]
    if double := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--augmented: {double[0]} is given twice; give one run of it")
    return regimes


def score(regime: Regime, patches: Patches, device: torch.device) -> np.ndarray:
    """p(cancer) (K, N) of all patches by the model of each seed."""
    scores = []
    for run in regime.runs:
        model, _ = load_classifier(run, device)
        parts = [classifier_scores(model, v, device) for v in patches.parts.values()]
        scores.append(np.concatenate(parts).astype(np.float64))
        if np.isnan(scores[-1]).any():
            raise ValueError(f"{run}: scores are not numbers; training diverged, train it again")
    return np.array(scores)


# --- §3 Results: Table 1, its numbers ---

MAIN = "Malignant against normal"
CONDITIONS = {  # positives, negatives: E4, the whole test set; by lesion; the paper has no others
    MAIN: (("malignant_mass", "malignant_calcification"), ("normal",)),
    "Masses against normal": (("malignant_mass",), ("normal",)),
    "Calcifications against normal": (("malignant_calcification",), ("normal",)),
    "Malignant against benign masses": (("malignant_mass",), ("benign_mass",)),
    "Malignant against benign calcifications": (
        ("malignant_calcification",),
        ("benign_calcification",),
    ),
}
# A statistic is a function of labels (N,), scores (K, N) of a regime and (K_b, N) of the baseline,
# patients (N,) and folds (N,), that returns named numbers for the regime's row: a line here puts it
# in metrics.json and in every table of the report. Names of what compares with the baseline begin
# with delta, p_ or detectable; each p_ gets Holm's beside it.
STATISTICS = {  # heading: function, names of the value and its ends, or of the p
    "AUC (95% CI)": (compare, "auc", "low", "high"),
    "Difference (95% CI)": (compare, "delta", "delta_low", "delta_high"),
    "p, patients (Holm)": (compare, "p_clustered"),
    "p, DeLong (Holm)": (compare, "p_delong"),
    "Detectable": (compare, "detectable"),
}


def condition_table(
    kind: np.ndarray, patients: np.ndarray, scores: dict[str, np.ndarray], condition: str, fold=None
) -> dict:
    """Rows of one condition; empty when the test set, or a fold, has too few patients for it.

    kind, patients, fold: class, patient and, of a cross-validation, fold of each test patch (N,);
    scores: (K, N) of each regime.
    """
    positive, negative = (np.isin(kind, kinds) for kinds in CONDITIONS[condition])
    fold = np.zeros(len(kind)) if fold is None else fold
    for name in np.unique(fold):
        if min(len(set(patients[at & (fold == name)])) for at in (positive, negative)) < 2:
            return {}
    at = positive | negative
    y, patients, fold = positive[at], patients[at], fold[at]
    size = {"patients": len(set(patients)), "patches": len(y)}
    scores, rows = {name: s[:, at] for name, s in scores.items()}, []
    for name, ours in scores.items():
        aucs = np.array([v[:, y].mean(axis=1) for y, v, _ in by_fold(y, ours, patients, fold)])
        row = {"regime": name, "seeds": len(ours), "folds": len(aucs), **size}
        row |= {"seed_aucs": aucs.mean(axis=0).tolist(), "fold_aucs": aucs.mean(axis=1).tolist()}
        row["reference"], control = compared_with(name, scores)
        for statistic in dict.fromkeys(function for function, *_ in STATISTICS.values()):
            row |= statistic(y, ours, scores[row["reference"]], patients, fold)
        if name == BASELINE:
            row |= {k: None for k in row if k.startswith(("delta", "p_", "detectable"))}
        elif control in scores and is_hypothesis(name):
            row["against_blob"] = compare(y, ours, scores[control], patients, fold)
        rows.append(row)
    tested = [row for row in rows if is_hypothesis(row["regime"])]
    for key in [key for key in rows[0] if key.startswith("p_")]:
        corrected = holm([row[key] for row in tested])
        for row in rows[1:]:
            row[f"{key}_holm"] = corrected.pop(0) if row in tested else row[key]
    size |= {"positives": int(y.sum()), "positive_patients": len(set(patients[y]))}
    size |= {"negative_patients": len(set(patients[~y]))}
    return {**size, "rows": rows}


# --- §3 t-SNE: Figures 4 to 6 ---

EMBEDDED = {  # F4: counts and colours; the normal patches are those stored, Q38
    "normal": (2000, "#d62728", "real normal"),
    "malignant_calcification": (1000, "#ff7f0e", "real malignant calcification"),
    "malignant_mass": (1000, "#2ca02c", "real malignant mass"),
    "mass": (3560, "#17a2a2", "synthetic mass"),
    "calcification": (4000, "#1f4fd8", "synthetic calcification"),
}
RESCUED = 5  # F5: patches in Figures 5 and 6


def pooled_features(regime: Regime, device: torch.device) -> Callable[[np.ndarray], np.ndarray]:
    """What gives the last features (F4) of patches, (N, F), by the regime's first model."""
    model, _ = load_classifier(regime.runs[0], device)
    return lambda patches: classifier_scores(model, patches, device, features=True)[1]


def embed(features: np.ndarray, seed: int) -> np.ndarray:
    """t-SNE (N, 2): perplexity 30, PCA start; the paper names no setting (Q38)."""
    tsne = TSNE(perplexity=min(30, (len(features) - 1) / 3), init="pca", random_state=seed)
    with threadpool_limits(1):  # sums in one order: the same bytes on any number of cores
        return tsne.fit_transform(features.astype(np.float64))


def rescue(baseline: np.ndarray, augmented: np.ndarray) -> tuple[np.ndarray, dict]:
    """F5: rows of the malignant patches that rise above 0.5, largest rise first, at most five; how
    many rise and fall, and how far on average (of at most five)."""
    rise = augmented - baseline
    up = np.flatnonzero((baseline < 0.5) & (augmented > 0.5))
    down = np.flatnonzero((baseline > 0.5) & (augmented < 0.5))
    best, worst = (at[np.argsort(-abs(rise[at]), kind="stable")[:RESCUED]] for at in (up, down))
    means = [float(rise[at].mean()) if len(at) else None for at in (best, worst)]
    return best, {"up": len(up), "down": len(down), "rise": means[0], "fall": means[1]}
