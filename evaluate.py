"""§3 Results and t-SNE: AUC, DeLong's test, what holds when patches share a patient, the report.

Scores are p(cancer), labels 1 malignant and 0 not; a cluster is a patient.
"""

import base64
import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy import special, stats
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.metrics import pairwise_distances_argmin_min
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import nn

from data import (
    CLASSES,
    SPLITS,
    SyntheticSet,
    check_synthetic,
    claim_folder,
    finish_folder,
    open_patches,
    open_synthetic,
    patch_config,
    progress,
    read_json,
    read_table,
    replace_file,
    to_float,
    write_json,
    write_table,
)
from models import classifier_scores, finished_config, load_classifier, weights_hash

ALPHA = 0.05  # Q37: two-sided; the paper calls no other level significant
PAPER_TABLE_1 = {  # E1, E2; the text says p < 1e-8 for the 50% row (Q37)
    "Baseline": ("0.829", "-"),
    "10% w/ decay": ("0.837", "0.10"),
    "25% w/ decay": ("0.839", "0.055"),
    "50% w/ decay": ("0.846", "1e-4"),
    "75% w/ decay": ("0.828", "0.72"),
    "100% w/ decay": ("0.797", "1e-8"),
}
COLUMNS = (  # of table1.csv
    *("regime", "proportion", "seeds", "patients", "patches", "auc", "low", "high"),
    *("delta", "delta_low", "delta_high", "p_delong", "p_clustered"),
)
BASELINE, BLOB = "Baseline", "Blob control"
COLOURS, BLUE = {BASELINE: "#555555", BLOB: "#c2500a"}, "#0b62a8"
GRID = np.linspace(0, 1, 101)  # of false positive rates, for ROC curves
LESIONS = {"mass": "malignant_mass", "calcification": "malignant_calcification"}
REAL_OF = LESIONS | {"removal": "normal"}  # the real class that a synthetic set imitates
MAIN = "Malignant against normal"
CONDITIONS = {  # E4, the whole test set; by lesion; then what the paper does not test
    MAIN: (tuple(LESIONS.values()), ("normal",)),
    "Masses against normal": (("malignant_mass",), ("normal",)),
    "Calcifications against normal": (("malignant_calcification",), ("normal",)),
    "Malignant against benign": (tuple(LESIONS.values()), ("benign_mass", "benign_calcification")),
}
CONTROL_PATCHES = 1000  # a side, as many as the paper's validation set has of a class (P5)
SET_FACTS = {"acceptance": ".1%", "area_median": ".1%", "strength": "+.3f"}  # of synthesize
EMBEDDED = {  # F4: counts and colours; the normal patches are those stored, Q38
    "normal": (2000, "#d62728", "real normal"),
    "malignant_calcification": (1000, "#ff7f0e", "real malignant calcification"),
    "malignant_mass": (1000, "#2ca02c", "real malignant mass"),
    "mass": (3560, "#17a2a2", "synthetic mass"),
    "calcification": (4000, "#1f4fd8", "synthetic calcification"),
}
RESCUED = 5  # F5: patches in Figures 5 and 6


# --- §3 Results: AUC and the DeLong method (E4) ---


def _checked(y, *scores, clusters=None) -> tuple[np.ndarray, np.ndarray]:
    """Labels as bool (N,) and scores as float64 (K, N). Raises ValueError for unusable input."""
    y = np.asarray(y)
    if y.ndim != 1 or not np.isin(y, (0, 1)).all():
        raise ValueError(
            f"labels: found shape {y.shape}, values {np.unique(y)[:4].tolist()}; "
            "expected one 0 or 1 (or False or True) per patch"
        )
    y = y.astype(bool)
    if not 2 <= y.sum() <= len(y) - 2:
        raise ValueError(
            f"labels: found {y.sum()} positive and {(~y).sum()} negative patches; "
            "expected at least two of each class"
        )
    for name, values in [*(("scores", s) for s in scores), ("clusters", clusters)]:
        if values is not None and np.shape(values) != y.shape:
            raise ValueError(
                f"{name}: found shape {np.shape(values)} for {len(y)} labels; "
                "expected one value per label"
            )
    scores = np.array(scores, dtype=np.float64)
    if np.isnan(scores).any():
        raise ValueError(f"scores: found {np.isnan(scores).sum()} NaN; expected a number per patch")
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
        share = np.where(
            is_positive,
            np.repeat(below / (len(y) - positives), np.diff(edges)),
            np.repeat(above / positives, np.diff(edges)),
        )
        row[order] = share
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
        raise ValueError(
            f"clusters: found {with_class[0]} patients with positive and {with_class[1]} with "
            "negative patches; expected at least two of each"
        )
    centred = v - v[:, y].mean(axis=1, keepdims=True)
    a, b = (  # (K, I) sums over each patient, as shares of the class
        np.array([np.bincount(at[c], row[c], patients) for row in centred]) / np.count_nonzero(c)
        for c in (y, ~y)
    )
    s10, s01, s11 = (i / (i - 1) for i in (*with_class, patients))
    return s10 * a @ a.T + s01 * b @ b.T + s11 * (a @ b.T + b @ a.T)


def _p_value(difference: float, variance: float, df: float = math.inf) -> tuple[float, float]:
    """z (or t) and its two-sided p; zero variance gives p = 1 for no difference, else 0."""
    if variance == 0:
        z = math.copysign(math.inf, difference) if difference else 0.0
    else:
        z = difference / math.sqrt(variance)
    return z, float(2 * special.stdtr(df, -abs(z)))


def _interval(auc: float, variance: float, level: float, df: float = math.inf) -> tuple:
    half = special.stdtrit(df, (1 + level) / 2) * math.sqrt(variance)
    return auc, max(0.0, float(auc - half)), min(1.0, float(auc + half))


def auc_ci(y, scores, level: float = 0.95) -> tuple[float, float, float]:
    """AUC and DeLong's interval (independent patches), cut at 0 and 1."""
    y, scores = _checked(y, scores)
    v = placements(y, scores)
    return _interval(float(v[0, y].mean()), delong_covariance(y, v)[0, 0], level)


def delong_test(y, scores_a, scores_b) -> tuple[float, float, float, float]:
    """AUC of a, AUC of b, z (with the sign of a - b) and the paired two-sided p (E4)."""
    y, scores = _checked(y, scores_a, scores_b)
    v = placements(y, scores)
    d = v[:1] - v[1:]  # the variance of the difference, free of the rounding of C11 + C22 - 2 C12
    auc_a, auc_b = v[:, y].mean(axis=1).tolist()
    return auc_a, auc_b, *_p_value(float(d[0, y].mean()), delong_covariance(y, d)[0, 0])


def clustered_ci(y, scores, clusters, level: float = 0.95) -> tuple[float, float, float]:
    """AUC and Obuchowski's interval (patients are independent), cut at 0 and 1."""
    y, scores = _checked(y, scores, clusters=clusters)
    v = placements(y, scores)
    return _interval(float(v[0, y].mean()), clustered_covariance(y, v, clusters)[0, 0], level)


def clustered_test(
    y, scores_a, scores_b, clusters, level: float = 0.95
) -> tuple[float, float, float, float, float, float]:
    """AUC of a, of b, their difference a - b, its interval and two-sided p (Obuchowski 1997)."""
    y, scores = _checked(y, scores_a, scores_b, clusters=clusters)
    v = placements(y, scores)
    d = v[:1] - v[1:]
    auc_a, auc_b = v[:, y].mean(axis=1).tolist()
    difference, variance = float(d[0, y].mean()), clustered_covariance(y, d, clusters)[0, 0]
    half = special.ndtri((1 + level) / 2) * math.sqrt(variance)
    p = _p_value(difference, variance)[1]
    return auc_a, auc_b, difference, difference - half, difference + half, p


# --- Beyond the paper: bootstrap of patients, several seeds, Holm, power ---


def patient_draws(clusters, draws: int, seed: int) -> np.ndarray:
    """How often each patch (draws, N) is in test sets of patients drawn with replacement."""
    _, at = np.unique(clusters, return_inverse=True)
    patients = at.max() + 1
    share = np.full(patients, 1 / patients)
    return np.random.default_rng(seed).multinomial(patients, share, size=draws)[:, at]


def bootstrap_aucs(y, scores, clusters, draws: int = 2000, seed: int = 0) -> np.ndarray:
    """AUC (draws, K) in test sets of drawn patients; NaN where a draw lacks a class."""
    y, scores = _checked(y, *scores, clusters=clusters)
    drawn, aucs = patient_draws(clusters, draws, seed), np.empty((draws, len(scores)))
    for k, values in enumerate(scores):
        order = np.argsort(values)
        edges = np.flatnonzero(np.r_[True, values[order][1:] != values[order][:-1]])  # runs of ties
        for i in range(0, draws, 100):  # 100 draws at a time bound the memory
            positive, negative = (
                np.add.reduceat((drawn[i : i + 100] * c)[:, order], edges, axis=1) for c in (y, ~y)
            )
            won = (positive * (np.cumsum(negative, axis=1) - negative / 2)).sum(axis=1)
            with np.errstate(invalid="ignore"):
                aucs[i : i + 100, k] = won / (positive.sum(axis=1) * negative.sum(axis=1))
    return aucs


def _mean_auc(y, v, clusters, groups) -> tuple[float, float, float]:
    """Weighted sum of regimes' mean AUCs, its variance and degrees of freedom.

    groups: (weight, rows of v) per regime, the rows being its training seeds. The seeds of a
    regime are what the readers are in a multi-reader study, so the variance is Obuchowski and
    Rockette's (1995) with patient-clustered covariances of the AUCs: for a difference
        s^2 (1/K_a + 1/K_b) + max(0, cov2_a + cov2_b - 2 cov3),
    s^2 among the seeds of a regime (pooled), cov2 between two seeds of one regime, cov3 across.
    Degrees of freedom after Satterthwaite with the test-set part taken as known (Hillis 2007).
    A regime with a single seed makes the seeds fixed: then it is Obuchowski 1997 on the means.
    """
    contrast = sum(weight * v[rows].mean(axis=0) for weight, rows in groups)[None]
    value = float(contrast[0, y].mean())
    if min(len(rows) for _, rows in groups) == 1:
        return value, float(clustered_covariance(y, contrast, clusters)[0, 0]), math.inf
    covariance, aucs = clustered_covariance(y, v, clusters), v[:, y].mean(axis=1)
    test = 0.0
    for weight, rows in groups:
        for other_weight, others in groups:
            block, k = covariance[np.ix_(rows, others)], len(rows)
            same = rows is others
            mean = (block.sum() - np.trace(block)) / (k * (k - 1)) if same else block.mean()
            test += weight * other_weight * float(mean)
    free = sum(len(rows) - 1 for _, rows in groups)
    pooled = sum(float(aucs[rows].var()) * len(rows) for _, rows in groups) / free
    seeds = pooled * sum(weight**2 / len(rows) for weight, rows in groups)
    variance = max(0.0, test) + seeds
    return value, variance, free * (variance / seeds) ** 2 if seeds else math.inf


def compare(y, scores, baseline, clusters, level: float = 0.95) -> dict[str, float]:
    """Mean AUC over the seeds of a regime (K, N), alone and against the baseline's (K_b, N).

    low, high and delta_low, delta_high, p_clustered: patients vary, and the training seeds where
    both have several. p_delong: these very models, every patch on its own (the paper's test).
    detectable: the smallest true difference found at 5% with 80% power.
    """
    y, v = _checked(y, *scores, *baseline, clusters=clusters)
    v = placements(y, v)
    ours, theirs = np.arange(len(scores)), np.arange(len(scores), len(v))
    # the baseline's seeds (weight 0) only help to tell how seeds vary
    own = [(1, ours)] if scores is baseline else [(1, ours), (0, theirs)]
    auc, variance, df = _mean_auc(y, v, clusters, own)
    _, low, high = _interval(auc, variance, level, df)
    contrast = v[ours].mean(axis=0, keepdims=True) - v[theirs].mean(axis=0, keepdims=True)
    delta, variance, df = _mean_auc(y, v, clusters, [(1, ours), (-1, theirs)])
    error, of_patches = math.sqrt(variance), float(delong_covariance(y, contrast)[0, 0])
    half = float(special.stdtrit(df, (1 + level) / 2)) * error
    half_delong = float(special.ndtri((1 + level) / 2)) * math.sqrt(of_patches)
    return {
        "auc": auc,
        "low": low,
        "high": high,
        "delta": delta,
        "delta_low": delta - half,
        "delta_high": delta + half,
        "delta_delong_low": delta - half_delong,
        "delta_delong_high": delta + half_delong,
        "p_delong": _p_value(delta, of_patches)[1],
        "p_clustered": _p_value(delta, variance, df)[1],
        "detectable": float(special.stdtrit(df, 0.975) + special.stdtrit(df, 0.8)) * error,
        "df": None if math.isinf(df) else df,
    }


def holm(p: list[float]) -> list[float]:
    """Holm's step-down correction for the number of tests."""
    p = np.asarray(p, dtype=float)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(adjusted, 1).tolist()


# --- Controls ---


def same_image_auc(y, scores, images, clusters) -> tuple[float, float, float, int] | None:
    """AUC over the pairs (positive, negative) of one image, its interval, images that hold both.

    A model that recognises the image, not the lesion, has 0.5 here. Ratio of sums over patients.
    """
    pairs = {}
    for image in np.unique(images):
        at = images == image
        x, z = scores[at & y][:, None], scores[at & ~y][None]
        if x.size and z.size:
            won = ((x > z) + (x == z) / 2).sum()
            pairs.setdefault(clusters[at][0], []).append((won, x.size * z.size))
    if len(pairs) < 2:
        return None
    won, number = np.array([np.sum(p, axis=0) for p in pairs.values()]).T
    auc, i = won.sum() / number.sum(), len(pairs)
    variance = i / (i - 1) * ((won - auc * number) ** 2).sum() / number.sum() ** 2
    return *_interval(float(auc), float(variance), 0.95), sum(map(len, pairs.values()))


def kid(x, y, patients_x, patients_y, level: float = 0.95) -> tuple[float, float, float]:
    """Kernel inception distance between features (N, F) and (M, F), with its interval.

    The unbiased estimate of the squared discrepancy under (x.y/F + 1)^3 (Binkowski 2018), here
    over pairs of patches of *different* patients, so that likeness within a patient does not count
    as distance. Interval: jackknife over patients.
    """
    f = np.concatenate([x, y]).astype(np.float64)
    ids, at = np.unique(np.concatenate([patients_x, patients_y]), return_inverse=True)
    member = np.zeros((2, len(ids), len(f)))
    member[np.r_[np.zeros(len(x), int), np.ones(len(y), int)], at, np.arange(len(f))] = 1
    if (member.sum(axis=2) > 0).sum(axis=1).min() < 3:
        raise ValueError("kernel inception distance: expected three patients or more on each side")
    kernel = (f @ f.T / f.shape[1] + 1) ** 3

    def mean(s: int, t: int) -> np.ndarray:  # of all pairs, then without each patient in turn
        sums = member[s] @ kernel @ member[t].T
        pairs = np.outer(member[s].sum(axis=1), member[t].sum(axis=1))
        total = [
            m.sum() - m.trace() - np.r_[0, m.sum(axis=0) + m.sum(axis=1) - 2 * m.diagonal()]
            for m in (sums, pairs)
        ]
        return total[0] / total[1]

    value, *without = mean(0, 0) + mean(1, 1) - 2 * mean(0, 1)
    error = math.sqrt((len(ids) - 1) * np.var(without))
    half = special.ndtri((1 + level) / 2) * error
    return float(value), float(value - half), float(value + half)


def detectability(
    real, fake, patients_real, patients_fake, fit_predict: Callable, folds: int = 5
) -> tuple[float, float, float]:
    """AUC at which real and synthetic patches can be told apart; 0.5 is chance.

    Cross-validated, a patient in one fold only; ranks within the fold, since each has its own
    model. fit_predict(x, y, x_held_out) -> scores. The interval is Obuchowski's.
    """
    x, y = np.concatenate([real, fake]), np.repeat([False, True], [len(real), len(fake)])
    patients = np.concatenate([patients_real, patients_fake])
    folds = min(folds, len(np.unique(patients_real)), len(np.unique(patients_fake)))
    if folds < 2:
        raise ValueError("detectability: expected two patients or more on each side")
    scores = np.empty(len(y))
    for train, held_out in StratifiedGroupKFold(folds).split(x, y, patients):
        predicted = fit_predict(x[train], y[train], x[held_out])
        scores[held_out] = stats.rankdata(predicted) / len(held_out)
    return clustered_ci(y, scores, patients)


def linear_detector(x, y, x_held_out) -> np.ndarray:
    """Logistic regression on frozen features."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    return model.fit(x, y).decision_function(x_held_out)


def network_detector(device: torch.device, seed: int, steps: int = 200, batch: int = 32):
    """A small convolutional network on the pixels (uint16 patches), trained from scratch."""

    def fit_predict(x, y, x_held_out) -> np.ndarray:
        rng = np.random.default_rng(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers, c_in = [], 1
            for c_out in (8, 16, 32, 64):
                layers += [nn.Conv2d(c_in, c_out, kernel_size=3, stride=2, padding=1)]
                layers += [nn.GroupNorm(8, c_out), nn.ReLU()]
                c_in = c_out
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, 1)]
            net = nn.Sequential(*layers).to(device)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        for _ in range(steps):
            at = rng.integers(len(x), size=batch)
            flip = tuple(np.flatnonzero(rng.random(2) < 0.5) + 1)
            images = np.flip(to_float(x[at]), flip).copy()[:, None]
            logits = net(torch.from_numpy(images).to(device))[:, 0]
            target = torch.from_numpy(y[at].astype(np.float32)).to(device)
            loss = F.binary_cross_entropy_with_logits(logits, target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        net.eval()
        with torch.inference_mode():
            parts = np.array_split(x_held_out, math.ceil(len(x_held_out) / 64))
            held = (net(torch.from_numpy(to_float(p))[:, None].to(device))[:, 0] for p in parts)
            return torch.cat(list(held)).cpu().numpy()

    return fit_predict


def nearest_training(fake, training, held_out) -> tuple[np.ndarray, np.ndarray, dict]:
    """Nearest training patch of each synthetic one in feature space: where, how far, summary.

    The yardstick is how far real held-out patches of the class lie from their nearest training
    patch: copies would be closer than the closest 1% of those.
    """
    at, distance = pairwise_distances_argmin_min(fake, training)
    reference = pairwise_distances_argmin_min(held_out, training)[1]
    found = {"median": float(np.median(distance)), "reference": float(np.median(reference))}
    found["closer"] = float((distance < np.percentile(reference, 1)).mean())
    return at, distance, found


# --- Runs and patches ---


@dataclass(frozen=True)
class Patches:
    """Patches of one split, its classes one after the other."""

    values: dict[str, np.ndarray]  # (N, S, S) uint16 by class
    kind: np.ndarray  # class of each patch, all classes in the order of `values`
    patient: np.ndarray
    image: np.ndarray

    def patients(self, kind: str) -> np.ndarray:
        return self.patient[self.kind == kind]

    def __getitem__(self, i: int) -> np.ndarray:
        return self.values[self.kind[i]][i - np.argmax(self.kind == self.kind[i])]


def open_split(data: Path, split: str) -> Patches:
    held, folder = patch_config(data)["held"], data / "patches" / split
    values = {c: open_patches(data, split, c) for c in CLASSES if held.get(f"{split}/{c}")}
    if not values:
        raise ValueError(f"{data}: holds no {split} patches; prepare it with some")
    tables = [read_table(folder / f"{c}.csv", ("patient_id", "image_uid")) for c in values]
    kind = np.repeat(list(values), [len(v) for v in values.values()])
    patient, image = (np.concatenate([t[c] for t in tables]) for c in ("patient_id", "image_uid"))
    return Patches(values, kind, patient, image)


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


def open_regime(folder: Path, fingerprint: str, baseline: bool = False) -> Regime:
    """A run of train-cls, or a folder of seed-0, seed-1 ...; `fingerprint` is the patch set's."""
    found = {int(p.name[5:]): p for p in folder.glob("seed-*") if p.name[5:].isdecimal()}
    runs = [found[k] for k in sorted(found)] or [folder]
    configs = [finished_config(run, "train-cls") for run in runs]
    seeds = [config.pop("seed") for config in configs]
    for run, config in zip(runs, configs, strict=True):
        if config["data"] != fingerprint:
            raise ValueError(
                f"{run}: trained on patch set {config['data'][:12]}, found {fingerprint[:12]}; "
                "give --data the patch set that it was trained on"
            )
        if config != configs[0]:
            raise ValueError(f"{run}: differs from {runs[0]} in more than the seed; train it again")
    synthetic, proportion = configs[0]["synthetic"], float(configs[0]["proportion"])
    if baseline and synthetic:
        raise ValueError(f"--baseline {folder}: trained with synthetic patches; expected none")
    if not synthetic:
        name, proportion = BASELINE, 0.0
    else:
        blob = any(s["control"] == "blob" for s in synthetic)
        name = BLOB if blob else f"{100 * proportion:g}% w/ decay"
    hashes = [weights_hash(load_classifier(run, torch.device("cpu"))[0]) for run in runs]
    return Regime(name, proportion, folder, runs, seeds, hashes, configs[0])


def open_regimes(baseline: Path, augmented: Sequence[Path], fingerprint: str) -> list[Regime]:
    """The baseline, then as in Table 1 by proportion, the blob control last."""
    regimes = [open_regime(Path(folder), fingerprint) for folder in augmented]
    regimes.sort(key=lambda r: (r.name == BLOB, r.proportion))
    regimes.insert(0, open_regime(Path(baseline), fingerprint, baseline=True))
    names = [regime.name for regime in regimes]
    if double := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--augmented: {double[0]} is given twice; give one run of it")
    return regimes


def score(regime: Regime, patches: Patches, device: torch.device) -> np.ndarray:
    """p(cancer) (K, N) of all patches by the model of each seed."""
    scores = []
    for run in regime.runs:
        model, _ = load_classifier(run, device)
        parts = [classifier_scores(model, v, device) for v in patches.values.values()]
        scores.append(np.concatenate(parts).astype(np.float64))
        if np.isnan(scores[-1]).any():
            raise ValueError(
                f"{run}: scores are not numbers; its training diverged, train it again"
            )
    return np.array(scores)


def feature_reader(run: Path, device: torch.device) -> Callable[[np.ndarray], np.ndarray]:
    """Pooled features (N, F) of patches by one model; each array is read once."""
    model, _ = load_classifier(run, device)
    kept = {}

    def features(values: np.ndarray) -> np.ndarray:
        if id(values) not in kept:  # `values` is kept too, so that its id stays its own
            kept[id(values)] = classifier_scores(model, values, device, features=True)[1], values
        return kept[id(values)][0]

    return features


# --- §3 Results: Table 1, and what the paper does not test ---


def condition_table(
    test: Patches, scores: dict[str, np.ndarray], condition: str, corrected: bool, seed: int
) -> dict:
    """Rows of one condition; empty when the test set has too few patients for it."""
    positive, negative = (np.isin(test.kind, kinds) for kinds in CONDITIONS[condition])
    at = positive | negative
    y, patients = positive[at], test.patient[at]
    if min(len(set(patients[y])), len(set(patients[~y]))) < 2:
        return {}
    size = {"patients": len(set(patients)), "patches": len(y)}
    scores = {name: s[:, at] for name, s in scores.items()}
    last = np.cumsum([len(s) for s in scores.values()])
    drawn = bootstrap_aucs(y, np.concatenate(list(scores.values())), patients, seed=seed)
    drawn = [part.mean(axis=1) for part in np.split(drawn, last[:-1], axis=1)]
    rows, against_blob = [], []
    for (name, ours), aucs in zip(scores.items(), drawn, strict=True):
        row = {"regime": name, "seeds": len(ours), **size}
        row |= compare(y, ours, scores[BASELINE], patients)
        row["seed_aucs"] = placements(y, ours)[:, y].mean(axis=1).tolist()
        low, high = np.nanpercentile(aucs - drawn[0], [2.5, 97.5]).tolist()
        row |= {"delta_bootstrap_low": low, "delta_bootstrap_high": high}
        if name == BASELINE:
            row |= {k: None for k in row if k.startswith(("delta", "p_", "detectable", "df"))}
        elif BLOB in scores and name != BLOB:
            against_blob.append({"regime": name, **compare(y, ours, scores[BLOB], patients)})
        rows.append(row)
    for key in ("p_delong", "p_clustered"):
        raw = [row[key] for row in rows[1:]]
        for row, p in zip(rows[1:], holm(raw) if corrected else raw, strict=True):
            row |= {key: p, f"{key}_raw": row[key]}
    size |= {"positives": int(y.sum()), "positive_patients": len(set(patients[y]))}
    return {**size, "rows": rows, "against_blob": against_blob}


def score_groups(test: Patches, scores: np.ndarray) -> dict[str, Sequence]:
    """How a regime scores lesions and tissue: median, quartiles, number; AUC within images."""
    scores, kind = scores.mean(axis=0), test.kind
    malignant, benign, normal = (
        np.char.startswith(kind, name) for name in ("malignant", "benign", "normal")
    )
    with_cancer = np.isin(test.image, test.image[malignant])
    groups = {"malignant lesions": malignant, "benign lesions": benign}
    groups["normal, image with cancer"] = normal & with_cancer
    groups["normal, other images"] = normal & ~with_cancer
    found = {
        name: [*np.percentile(scores[at], [50, 25, 75]).tolist(), int(at.sum())]
        for name, at in groups.items()
        if at.any()
    }
    for name, lesion in (("malignant", malignant), ("benign", benign)):
        at = lesion | normal
        auc = same_image_auc(lesion[at], scores[at], test.image[at], test.patient[at])
        found |= {f"same image, {name} against normal": auc} if auc else {}
    return found


def control_of(
    syn: SyntheticSet, splits: dict[str, Patches], features: Callable, device, seed: int
) -> tuple[dict, list[np.ndarray]]:
    """Controls of one synthetic set, and its three closest pairs: synthetic, training patch ...

    On frozen features it is compared with validation patches, which the classifier has not seen,
    and so are real training patches: that is the floor, with all that differs between the splits.
    On pixels it is compared with training patches, which were flipped and resized as its sources.
    """
    kind, facts = REAL_OF[syn.task], read_json(syn.path / "config.json")
    found = {"set": syn.path.name, "task": f"{syn.task} {syn.control}".strip()}
    found |= {"samples": len(syn.combined), "requested": syn.requested}
    found |= {"fingerprint": syn.fingerprint, "generator": syn.generator}
    found |= {key: facts[key] for key in (*SET_FACTS, "warnings") if key in facts}
    found["patients"] = len(set(syn.index["patient_id"]))
    arrays = {
        s: (splits[s].values.get(kind, ()), splits[s].patients(kind)) for s in ("train", "val")
    }
    arrays["synthetic"] = syn.combined, syn.index["patient_id"]
    if min(len(set(who)) for _, who in arrays.values()) < 3:
        return found | {"warnings": [f"Not compared: fewer than three patients with {kind}."]}, []
    found["compared"] = n = min(CONTROL_PATCHES, *(len(a) for a, _ in arrays.values()))
    rng, pixels, patients, deep = np.random.default_rng(seed), {}, {}, {}
    for name, (values, who) in arrays.items():
        at = np.sort(rng.permutation(len(values))[:n])
        pixels[name], patients[name] = values[at], who[at]
        whole = name != "train" or syn.task in LESIONS  # not all 400,000 normal patches
        deep[name] = features(values)[at] if whole else features(pixels[name])
    for prefix, side in (("", "synthetic"), ("floor_", "train")):
        pair = deep["val"], deep[side], patients["val"], patients[side]
        found[f"{prefix}linear"] = detectability(*pair, linear_detector)
        found[f"{prefix}kid"] = kid(*pair)
    pair = (side[name] for side in (pixels, patients) for name in ("train", "synthetic"))
    found["network"] = detectability(*pair, network_detector(device, seed), folds=3)
    if syn.task not in LESIONS:
        return found, []
    training, validation = arrays["train"][0], arrays["val"][0]
    at, distance, found["nearest"] = nearest_training(
        *(features(values) for values in (syn.combined, training, validation))
    )
    closest = np.argsort(distance, kind="stable")[:3]
    return found, [p for i in closest for p in (syn.combined[i], training[at[i]])]


# --- Figures ---


def _save(figure: Figure, path: Path) -> None:
    with replace_file(path) as file:
        figure.savefig(file, format="png", dpi=160, metadata={"Software": None})


def roc_band(y, scores, patients, seed: int, draws: int = 300) -> np.ndarray:
    """Sensitivity (3, 101) at 0, 1 ... 100% false positives: mean over seeds, 2.5%, 97.5%.

    The band is pointwise, over patients drawn with replacement.
    """
    drawn = np.concatenate([np.ones((1, len(y)), int), patient_draws(patients, draws, seed)])
    drawn = drawn[(drawn @ y > 0) & (drawn @ ~y > 0)]
    curves = np.zeros((len(drawn), len(GRID)))
    for values in scores:
        order = np.argsort(-values, kind="stable")
        last = np.flatnonzero(np.append(np.diff(values[order]) != 0, True))  # of each run of ties
        fpr, tpr = (np.cumsum((drawn * c)[:, order], axis=1)[:, last] for c in (~y, y))
        for curve, f, t in zip(curves, fpr, tpr, strict=True):
            curve += np.interp(GRID, np.r_[0, f / f[-1]], np.r_[0, t / t[-1]]) / len(scores)
    return np.array([curves[0], *np.percentile(curves[1:], [2.5, 97.5], axis=0)])


def roc_figure(bands: dict[str, np.ndarray], rows: list[dict]) -> Figure:
    """One panel a regime, the baseline behind each."""
    aucs = {row["regime"]: f"{row['regime']}: {row['auc']:.3f}" for row in rows}
    names = [name for name in bands if name != BASELINE] or [BASELINE]
    down = math.ceil(len(names) / 2)
    figure = Figure(figsize=(6, 3 * down), layout="constrained")
    panels = list(figure.subplots(down, 2, sharex=True, sharey=True, squeeze=False).flat)
    for name, ax in zip(names, panels, strict=False):
        for key in dict.fromkeys((BASELINE, name)):
            mean, low, high = bands[key]
            colour = COLOURS.get(key, BLUE)
            ax.fill_between(GRID, low, high, color=colour, alpha=0.18, linewidth=0)
            ax.plot(GRID, mean, color=colour, linewidth=1.6, label=aucs[key])
        ax.set(aspect="equal", xlim=(0, 1), ylim=(0, 1.01))
        ax.legend(loc="lower right", fontsize=9, frameon=False, title="AUC", title_fontsize=9)
    for ax in panels[len(names) :]:
        ax.set_axis_off()
    figure.supxlabel("1 - specificity", fontsize=10)
    figure.supylabel("sensitivity", fontsize=10)
    return figure


def difference_figure(rows: list[dict]) -> Figure:
    """Difference to the baseline: clustered interval (thick), DeLong's (thin), each seed (tick)."""
    figure = Figure(figsize=(6, 1 + 0.5 * len(rows)), layout="constrained")
    ax, base = figure.subplots(), rows[0]["auc"]
    for i, row in enumerate(rows[1:]):
        colour = COLOURS.get(row["regime"], BLUE)
        ax.plot([row["delta_low"], row["delta_high"]], [i, i], color=colour, linewidth=3)
        ax.plot(row["delta"], i, "o", color=colour, markersize=7)
        delong = row["delta_delong_low"], row["delta_delong_high"]
        ax.plot(delong, [i + 0.22] * 2, color="#888888", linewidth=1)
        ax.plot(np.array(row["seed_aucs"]) - base, [i - 0.22] * row["seeds"], "|", color=colour)
    ax.axvline(0, color="#333333", linewidth=0.8)
    ax.set_yticks(range(len(rows) - 1), [row["regime"] for row in rows[1:]])
    ax.set_ylim(len(rows) - 1.5, -0.5)
    ax.set_xlabel(f"difference in AUC to the baseline ({base:.3f})")
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def patch_figure(rows: list[tuple[str, Sequence[np.ndarray], Sequence[str]]]) -> Figure:
    """Rows of patches (uint16): label, patches, titles above them (repeated in turn)."""
    columns = max(len(patches) for _, patches, _ in rows)
    figure = Figure(figsize=(1.35 * columns, 1.6 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, (label, patches, titles) in zip(grid, rows, strict=True):
        for i, ax in enumerate(line):
            ax.set(xticks=[], yticks=[], frame_on=False)
            if i < len(patches):
                ax.imshow(patches[i], cmap="gray", vmin=0, vmax=65535, interpolation="nearest")
                ax.set_title(titles[i % len(titles)], fontsize=9)
        line[0].set_ylabel(label, fontsize=9)
    return figure


def embed(features: np.ndarray, seed: int) -> np.ndarray:
    """t-SNE (N, 2): perplexity 30, PCA start; the paper names no setting (Q38)."""
    tsne = TSNE(perplexity=min(30, (len(features) - 1) / 3), init="pca", random_state=seed)
    with threadpool_limits(1):  # sums in one order: the same bytes on any number of cores
        return tsne.fit_transform(features.astype(np.float64))


def embedding_figure(panels: dict[str, np.ndarray], groups: np.ndarray) -> Figure:
    """Points by group, for each model's t-SNE; those of no group of F4 are the rescued patches."""
    figure = Figure(figsize=(5.5 * len(panels), 6), layout="constrained")
    styles = {name: (label, colour, 6, 0) for name, (_, colour, label) in EMBEDDED.items()}
    styles["rescued"] = "rescued malignant test patches", "#00004d", 90, 1.2  # F5: dark blue
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, xy) in zip(axes, panels.items(), strict=True):
        for name, (label, colour, size, edge) in styles.items():
            if (at := groups == name).any():
                style = {"s": size, "color": colour, "linewidths": edge, "edgecolors": "white"}
                ax.scatter(*xy[at].T, label=f"{label} ({at.sum()})", alpha=0.8, **style)
        ax.set(xticks=[], yticks=[], title=f"features of: {title}")
    legend = {"loc": "outside lower center", "ncols": 2, "fontsize": 9, "frameon": False}
    legend = figure.legend(*ax.get_legend_handles_labels(), **legend)
    for handle in legend.legend_handles:
        handle.set_sizes([30])
    return figure


def rescue(baseline: np.ndarray, augmented: np.ndarray) -> tuple[np.ndarray, dict]:
    """F5: malignant patches that rise above 0.5, largest rise first; how many fall, too."""
    rise = augmented - baseline
    up = np.flatnonzero((baseline < 0.5) & (augmented > 0.5))
    down = np.flatnonzero((baseline > 0.5) & (augmented < 0.5))
    best, worst = (at[np.argsort(-abs(rise[at]), kind="stable")[:RESCUED]] for at in (up, down))
    means = [float(rise[at].mean()) if len(at) else None for at in (best, worst)]
    found = {"up": len(up), "down": len(down), "rise": means[0], "fall": means[1]}
    return best, found


def figures_4_to_6(
    regimes: list[Regime], splits, sets, scores: dict[str, np.ndarray], read, seed: int, out: Path
) -> dict:
    """t-SNE of the baseline's features (F4); the patches that a regime rescues (F5, F6).

    The paper's 50% regime where it was run, else the first; the first seed of each.
    """
    test, names = splits["test"], [r.name for r in regimes if r.name not in (BASELINE, BLOB)]
    facts, rescued, titles = {}, [], []
    if names:
        name = "50% w/ decay" if "50% w/ decay" in names else names[0]
        malignant = np.flatnonzero(np.char.startswith(test.kind, "malignant"))
        base, ours = (scores[n][:, malignant] for n in (BASELINE, name))
        best, facts = rescue(base[0], ours[0])
        rescued = [test[i] for i in malignant[best]]
        titles = [f"{base[0, i]:.2f} to {ours[0, i]:.2f}" for i in best]
        facts |= {"regime": name, "patients": len(set(test.patient[malignant[best]]))}
        if len(base) > 1:
            facts["between_baseline_seeds"] = rescue(base[0], base[1])[1]
    sources = splits["val"].values | {s.task: s.combined for s in sets[::-1] if not s.control}
    rng, chosen = np.random.default_rng(seed), {}
    for kind, (count, *_) in EMBEDDED.items():
        if kind in sources:
            chosen[kind] = np.sort(rng.permutation(len(sources[kind]))[:count])
    facts["points"] = {kind: len(at) for kind, at in chosen.items()}
    groups = np.repeat([*chosen, "rescued"], [*facts["points"].values(), len(rescued)])
    panels = {}
    for regime in (r for r in regimes if r.name in (BASELINE, rescued and facts["regime"])):
        features = read(regime)
        points = [features(sources[kind])[at] for kind, at in chosen.items()]
        points += [features(np.array(rescued))] if rescued else []
        panels[regime.name] = embed(np.concatenate(points), seed)
    alone = groups != "rescued"
    first = {BASELINE: panels[BASELINE][alone]}
    _save(embedding_figure(first, groups[alone]), out / "figure4.png")
    if rescued:
        _save(embedding_figure(panels, groups), out / "figure5.png")
        _save(patch_figure([("", rescued, titles)]), out / "figure6.png")
    return facts


# --- The whole evaluation ---


def evaluate(
    data: Path,
    baseline: Path,
    augmented: Sequence[Path],
    synthetic: Sequence[Path],
    out: Path,
    holm: bool = False,
    skipped: Sequence[tuple[str, str]] = (),
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> list[dict]:
    """Table 1 with statistics that hold, controls, Figures 1, 4, 5, 6, and report.html.

    skipped: (regime, reason) of rows that could not be trained; they stay in the table, empty.
    Returns the rows of table1.csv, skipped ones with their `reason`. Raises ValueError: runs or
    sets of another patch set, unfinished runs, fewer than two test patients a class.
    """
    data, out, device, config = Path(data), Path(out), torch.device(device), patch_config(data)
    regimes = open_regimes(baseline, augmented, config["fingerprint"])
    sets = [open_synthetic(path) for path in synthetic]
    for syn in sets:
        check_synthetic(syn, data)
    claimed = {"data": config["fingerprint"], "regimes": [[r.name, *r.hashes] for r in regimes]}
    claimed |= {"synthetic": [s.fingerprint for s in sets], "holm": holm, "seed": seed}
    claimed["skipped"] = [list(s) for s in skipped]
    stages = sum(len(r.runs) for r in regimes) + len(sets) + 1
    with claim_folder(out, "evaluate", claimed), progress(stages, "evaluate") as advance:
        splits = {split: open_split(data, split) for split in SPLITS}
        test, scores = splits["test"], {}
        for regime in regimes:
            scores[regime.name] = score(regime, test, device)
            advance(len(regime.runs), f"{regime.name} scored")
        tables = {c: condition_table(test, scores, c, holm, seed) for c in CONDITIONS}
        if not (main := tables[MAIN]):
            raise ValueError(f"{data}: fewer than two test patients a class; prepare it with more")
        rows = main["rows"]
        there = {c: set(sum(CONDITIONS[c], ())) & set(test.values) for c in CONDITIONS}
        # with one kind of lesion only, the whole test set is not shown again
        tables = {c: t for c, t in tables.items() if c == MAIN or there[c] != there[MAIN]}
        at = np.isin(test.kind, sum(CONDITIONS[MAIN], ()))
        y, patients = test.kind[at] != "normal", test.patient[at]
        bands = {name: roc_band(y, s[:, at], patients, seed) for name, s in scores.items()}
        _save(roc_figure(bands, rows), out / "roc.png")
        if len(rows) > 1:
            _save(difference_figure(rows), out / "difference.png")
        read = functools.cache(lambda regime: feature_reader(regime.runs[0], device))
        controls, nearest, pairs = [], [], []
        for syn in sets:
            found, closest = control_of(syn, splits, read(regimes[0]), device, seed)
            controls.append(found)
            if closest:
                nearest.append((syn.path.name, closest, ("synthetic", "nearest")))
            both = [p for pair in zip(syn.input[:3], syn.combined[:3], strict=True) for p in pair]
            titles = ("real", "synthetic") if syn.label else ("lesion", "removed")
            pairs.append((syn.path.name, both, titles))
            advance(1, f"{syn.path.name}: controls")
        for name, patches in (("figure1", pairs), ("nearest", nearest)):
            if patches:
                _save(patch_figure(patches), out / f"{name}.png")
        metrics = {"conditions": tables, "controls": controls, "holm": holm, "seed": seed}
        metrics["skipped"] = claimed["skipped"]
        metrics["score_groups"] = {name: score_groups(test, s) for name, s in scores.items()}
        metrics["feature_space"] = figures_4_to_6(regimes, splits, sets, scores, read, seed, out)
        metrics["data"] = {"name": data.name, **config, "patients": {}}
        for split, patches in splits.items():
            for kind in patches.values:
                metrics["data"]["patients"][f"{split}/{kind}"] = len(set(patches.patients(kind)))
        metrics["runs"] = [
            {"regime": r.name, "run": r.folder.name, "seeds": r.seeds, "weights": r.hashes}
            | {"config": r.config, "proportion": r.proportion}
            for r in regimes
        ]
        lines = [row | {"proportion": r.proportion} for row, r in zip(rows, regimes, strict=True)]
        lines = [{column: line[column] for column in COLUMNS} for line in lines]
        empty = dict.fromkeys(COLUMNS) | {"seeds": 0}
        lines += [empty | {"regime": name, "reason": reason} for name, reason in skipped]
        write_table(out / "table1.csv", COLUMNS, ([line[c] for c in COLUMNS] for line in lines))
        write_json(out / "metrics.json", metrics)
        with replace_file(out / "report.html", "w") as file:
            file.write(report(metrics, out))
        advance(1, "report written")
        finish_folder(out)
    return lines


# --- The report: one file, no script, for a screen, a telephone and paper ---

STYLE = """
* { box-sizing: border-box; } h2, h3 { break-after: avoid; } tr, figure { break-inside: avoid; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; margin: 0 auto;
  max-width: 62rem; padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.2; } h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .4rem; border-top: 2px solid #0b62a8; padding-top: .5rem; }
.box { border-left: 4px solid #c2500a; background: #fdf3ec; padding: .6rem .9rem; }
.note, figcaption { color: #444; font-size: .88rem; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; margin: .5rem 0; }
th, td { text-align: left; vertical-align: top; padding: .3rem .5rem .3rem 0;
  border-bottom: 1px solid #d8d8d8; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; } img { width: 46rem; max-width: 100%; }
@media screen and (max-width: 40rem) { thead, .none { display: none !important; }
  tr { display: block; border: 1px solid #ccc; border-radius: 6px; margin: .6rem 0; padding: .4rem }
  tbody th { display: block; font-size: 1rem; border: 0; }
  td { display: flex; gap: .8rem; border: 0; padding: .12rem 0; }
  td::before { content: attr(data-label); flex: 0 0 40%; color: #555; } }
@media print { body { font-size: 9pt; max-width: none; padding: 0; } table { font-size: 7.5pt; }
  img { width: 34rem; } @page { margin: 13mm; } }
"""
FIGURES = ("difference", "roc", "figure1", "nearest", "figure4", "figure5", "figure6")
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Synthetic lesions: evaluation</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>
<body><h1>Do synthetic lesions improve a breast cancer patch classifier?</h1>
<p class="box"><b>Research only, not for clinical use.</b> An AUC on patches centred on annotated
lesions says nothing about sensitivity on whole mammograms or in screening.</p>
<h2>In short</h2><ul>{short}</ul>
<h2>Table 1: the whole test set</h2>{table1}
<p class="note">Difference: to the baseline. Intervals and <i>p, patients</i>: patients are the unit
(Obuchowski 1997); with several training seeds the difference must hold beyond these trainings too
(Obuchowski and Rockette 1995, seeds as readers). <i>p, DeLong</i>: the paper's test, which takes
every patch for a new patient. {holm} Paper: Table 1, on OMI-DB; other data give other values. The
paper contradicts itself (Q37): its text has p &lt; 1e-8 for 50% where the table has 1e-4, and calls
10% and 25% significant where the table has 0.10 and 0.055. The table fits the AUCs better.</p>
<figure>{difference}<figcaption>Difference in AUC to the baseline. Thick: 95% interval over
patients and seeds. Thin: DeLong's, as if patches were independent. Ticks: single
seeds.</figcaption></figure>
<figure>{roc}<figcaption>ROC curves, mean over seeds, with pointwise 95% bands over
patients.</figcaption></figure>
<h2>The clustered analysis in full</h2>{full}
<p class="note">Clustered: patients and, where there are several, seeds vary. Bootstrap: patients
are drawn with replacement, the models stay; with one seed it should agree with the clustered
interval, with several it is narrower. DeLong: patches as if independent.</p>
<h3>Against the blob control instead of the baseline</h3>{against_blob}
{conditions}
<h2>Lesion or image?</h2>{groups}
<p class="note">p(cancer): median (quartiles), number of patches. Same image, where images hold
both: AUC over the pairs of a lesion patch and a normal patch of one image, number of images; a
model that recognises images has 0.5 there.</p>
<h2>Are the synthetic patches realistic?</h2>
<figure>{figure1}<figcaption>Figure 1. Pairs: real patch (left), synthetic one
(right).{wide}</figcaption></figure>{sets}{controls}
<p class="note">Told apart: AUC of a detector of synthetic patches, cross-validated, each patient in
one fold; 0.5 is chance, 1 always. By features: logistic regression on the baseline's features,
against validation patches; its floor is the same for real training patches: what differs between
the splits and what the baseline remembers. By pixels: a small network, against training patches;
its floor is 0.5. KID: kernel inception distance on the same features, unbiased, without pairs of
one patient, interval by jackknife over patients.</p>
<h3>Copies of training lesions?</h3>{copies}
<figure>{nearest}<figcaption>The three synthetic patches of each set closest to a training patch of
the class in the baseline's features, and that patch. Closer: the share closer than the closest 1%
of real validation patches; copies would look alike and make it far more than
1%.</figcaption></figure>
<h2>Feature space</h2>
<figure>{figure4}<figcaption>Figure 4. t-SNE of the baseline's pooled features. Real patches are the
stored validation patches; synthetic ones come from training patients.</figcaption></figure>
<p>{rescued}</p>
<figure>{figure5}<figcaption>Figure 5. The rescued patches among the points of Figure
4.</figcaption></figure>
<figure>{figure6}<figcaption>Figure 6. The rescued patches: p(cancer) before and
after.</figcaption></figure>
<h2>What was run</h2><p><code>{command}</code></p><p>{size}</p>{held}{runs}
<h2>How to read this</h2><ul>
<li>A difference counts as found only if its clustered interval excludes zero and the blob control
(a smooth bump of the same size and brightness in place of each lesion) does not show the same.</li>
<li>No difference shown is not equality: see from which size on one would have been found.</li>
<li>Patches of one patient resemble each other, so DeLong's test calls too much significant. With
fewer than about 30 patients on either side, or with only two seeds, the clustered intervals are
rather too narrow as well.</li>
<li>With one seed the result is about these very models; training again may give another.</li>
</ul><p class="note">The same for machines: table1.csv and metrics.json.</p></body></html>
"""


def _ci(value: Sequence[float | None] | None, form: str = ".3f") -> str:
    """(value, low, high, ...) in words."""
    if value is None or value[0] is None:
        return "-"
    return "{} ({} to {})".format(*(f"{v:{form}}" for v in value[:3]))


def _p(p: float | None) -> str:
    return "-" if p is None else f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def _difference(row: dict, kind: str = "") -> str:
    return _ci([row[f"delta{end}"] for end in ("", f"{kind}_low", f"{kind}_high")], "+.3f")


def _table(head: str, rows: Sequence[Sequence]) -> str:
    """Escaped; on a telephone each row is a card and each cell carries its heading."""
    if not rows:
        return "<p>None was run.</p>"
    head = [escape(h) for h in head.split("|")]
    html = "".join(f'<th scope="col">{h}</th>' for h in head)
    html = f"<table><thead><tr>{html}</tr></thead><tbody>"
    for first, *cells in rows:
        html += f'<tr><th scope="row">{escape(str(first))}</th>'
        for h, cell in zip(head[1:], map(str, cells), strict=True):
            empty = ' class="none"' if cell == "-" else ""
            html += f'<td{empty} data-label="{h}"><span>{escape(cell)}</span></td>'
        html += "</tr>"
    return html + "</tbody></table>"


def verdict(row: dict, rows: list[dict]) -> str:
    """What a row says in plain words: found, not found, or found in the blob control as well."""
    if row["delta"] is None:
        return "-"
    if row["p_clustered"] >= ALPHA:
        return f"no difference shown (one of {row['detectable']:.3f} is found with 80% power)"
    word = "higher" if row["delta"] > 0 else "lower"
    blob = next((r for r in rows if r["regime"] == BLOB), None)
    if blob is None:
        return f"{word}; no blob control was run"
    if blob is not row and blob["p_clustered"] < ALPHA and blob["delta"] * row["delta"] > 0:
        return f"{word}, but so is the blob control: not found"
    return word


def _condition(found: dict, skipped: Sequence = (), paper: bool = False) -> str:
    head = "Regime|Seeds|AUC (95% CI)|Difference (95% CI)|p, patients|p, DeLong|Result"
    rows = []
    for row in found["rows"]:
        auc, p = (
            _ci((row["auc"], row["low"], row["high"])),
            map(_p, (row["p_clustered"], row["p_delong"])),
        )
        rows.append(
            [row["regime"], row["seeds"], auc, _difference(row), *p, verdict(row, found["rows"])]
        )
    rows += [[name, 0, *"----", f"not run: {reason}"] for name, reason in skipped]
    for row in rows if paper else ():
        row += PAPER_TABLE_1.get(row[0], ("-", "-"))
    size = "{patches} test patches of {patients} patients; {positives} malignant ones of "
    size += "{positive_patients} patients."
    head += "|Paper: AUC|Paper: p" if paper else ""
    return f'<p class="note">{size.format(**found)}</p>' + _table(head, rows)


def _rescued(facts: dict) -> str:
    if "regime" not in facts:
        return "Figures 5 and 6 need an augmented regime."
    text = "{up} malignant test patches rise from below 0.5 to above it under {regime}, {down} "
    text += "fall (first seed of each)."
    if facts["up"]:
        text += " The largest rises (Figures 5 and 6; at most five, of {patients} patients) are "
        text += "{rise:.2f} on average; the paper's 0.32. Some of so many are large by chance."
    if facts["down"]:
        text += " The largest falls are {fall:.2f} on average."
    if between := facts.get("between_baseline_seeds"):
        text += f" Between two seeds of the baseline {between['up']} rise"
        text += f", at most by {between['rise']:.2f} on average." if between["up"] else "."
    return escape(text.format(**facts))


def report(metrics: dict, out: Path) -> str:
    """report.html: metrics.json in words, with the figures in `out` inside."""
    main, controls, data = metrics["conditions"][MAIN], metrics["controls"], metrics["data"]
    groups, runs, rows = metrics["score_groups"], metrics["runs"], main["rows"]
    short, full, sets, options = "", [], [], []
    for row in rows:
        text = f"{row['regime']}: AUC {_ci((row['auc'], row['low'], row['high']))}"
        text += "" if row["delta"] is None else f"; {verdict(row, rows)}"
        short += f"<li>{escape(text)}</li>"
        seeds = ", ".join(f"{auc:.3f}" for auc in row["seed_aucs"])
        intervals = (_difference(row, kind) for kind in ("", "_bootstrap", "_delong"))
        full.append([row["regime"], *intervals, seeds])
    keys = list(dict.fromkeys(key for found in groups.values() for key in found))
    forms = [".3f" if key.startswith("same image") else ".2f" for key in keys]
    group_rows = []
    for name, found in groups.items():
        values = zip(map(found.get, keys), forms, strict=True)
        group_rows.append([name, *(f"{_ci(v, form)}, {v[3]}" if v else "-" for v, form in values)])
    for c in controls:
        made = f"{c['samples']} of {c['requested']} ({c['patients']} patients)"
        facts = (f"{c[key]:{form}}" if key in c else "-" for key, form in SET_FACTS.items())
        sets.append([c["set"], c["task"], made, *facts, " ".join(c.get("warnings", [])) or "-"])
    compared, near = [], []
    for c in (c for c in controls if "linear" in c):
        kids = (_ci([1000 * v for v in c[key]], ".2f") for key in ("kid", "floor_kid"))
        aucs = (_ci(c[key]) for key in ("linear", "floor_linear", "network"))
        compared.append([c["set"], *aucs, *kids])
        if n := c.get("nearest"):
            near.append(
                [c["set"], f"{n['median']:.2f}", f"{n['reference']:.2f}", f"{n['closer']:.1%}"]
            )
    for r in runs:
        settings = (f"{k} {v}" for k, v in r["config"].items() if k not in ("data", "synthetic"))
        used = (s["fingerprint"][:12] for s in r["config"]["synthetic"])
        lists = map(str, r["seeds"]), (h[:12] for h in r["weights"]), settings, used
        options.append([r["regime"], r["run"], *(", ".join(part) or "-" for part in lists)])
    held = []
    for kind in CLASSES:
        at = [f"{split}/{kind}" for split in SPLITS]
        cells = (
            f"{data['held'][k]} ({data['patients'][k]})" if k in data["held"] else "-" for k in at
        )
        held.append([kind, *cells])
    command = [f"mamgan.py evaluate --data {data['name']} --baseline {runs[0]['run']}"]
    command += [f"--augmented {r['run']}" for r in runs[1:]]
    command += [f"--synthetic {c['set']}" for c in controls]
    command += [*(["--holm"] if metrics["holm"] else []), f"--seed {metrics['seed']}"]
    spacing, side = data.get("spacing_mm"), data["patch_size"]
    size = f"Patch set {data['fingerprint'][:12]}, {side} px, "
    size += f"{spacing} mm a pixel" if spacing else "native pixels"
    holm = "Not corrected for the number of regimes, as in the paper (--holm does)."
    if metrics["holm"]:
        holm = "Both p-values are corrected for the number of regimes (Holm); intervals are not."
    slots = {}
    for name in FIGURES:
        if (out / f"{name}.png").exists():
            uri = base64.b64encode((out / f"{name}.png").read_bytes()).decode()
            slots[name] = f'<img src="data:image/png;base64,{uri}" alt="{name}, described below">'
    page = re.sub(  # without the captions of figures that there are not
        r"(?s)<figure>{(\w+)}.*?</figure>", lambda m: m[0] if m[1] in slots else "", PAGE
    )
    against = [[r["regime"], _difference(r), _p(r["p_clustered"])] for r in main["against_blob"]]
    others = ""
    for name, found in metrics["conditions"].items():
        if name != MAIN:
            few = "<p>Not computed: fewer than two test patients a class.</p>"
            others += f"<h2>{name}</h2>{_condition(found) if found else few}"
    return page.format(
        **slots,
        style=STYLE,
        short=short,
        table1=_condition(main, metrics["skipped"], paper=True),
        holm=holm,
        full=_table("Regime|Clustered|Bootstrap|DeLong|AUC of each seed", full),
        against_blob=_table("Regime|Difference (95% CI)|p, patients", against),
        conditions=others,
        groups=_table("|".join(["Regime", *keys]), group_rows),
        wide=f" A patch is about {spacing * side:.0f} mm wide." if spacing else "",
        sets=_table("Set|Task|Made|Accepted|Object, median|Mean change inside|Remarks", sets),
        controls=_table(
            "Set|Told apart by features|(floor)|by pixels|KID x 1000|(floor of KID)", compared
        ),
        copies=_table("Set|Distance to nearest training patch|of real validation|Closer", near),
        rescued=_rescued(metrics["feature_space"]),
        command=escape(" ".join(command)),
        size=f"{escape(size)}; patches (patients) per split:",
        held=_table("|".join(["Class", *SPLITS]), held),
        runs=_table("Regime|Folder|Seeds|Weights (sha256)|Options|Synthetic sets", options),
    )
