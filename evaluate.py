"""§3 Results and t-SNE: AUC, DeLong's test, what holds when patches share a patient, the report.

Scores are p(cancer), labels 1 malignant and 0 not; a cluster is a patient.
"""

import base64
import itertools
import math
from collections import OrderedDict
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
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import nn

import data
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
CONDITIONS = {  # positives, negatives: E4, the whole test set; by lesion; the paper has no others
    MAIN: ("malignant_mass malignant_calcification", "normal"),
    "Masses against normal": ("malignant_mass", "normal"),
    "Calcifications against normal": ("malignant_calcification", "normal"),
    "Malignant against benign masses": ("malignant_mass", "benign_mass"),
    "Malignant against benign calcifications": ("malignant_calcification", "benign_calcification"),
}
CONTROL_PATCHES = 1000  # a side, as many as the paper's validation set has of a class (P5)
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
        found = f"shape {y.shape}, values {np.unique(y)[:4].tolist()}"
        raise ValueError(f"labels: found {found}; expected one 0 or 1 (or False or True) per patch")
    y = y.astype(bool)
    if not 2 <= y.sum() <= len(y) - 2:
        found = f"{y.sum()} positive and {(~y).sum()} negative patches"
        raise ValueError(f"labels: found {found}; expected at least two of each class")
    for name, values in [*(("scores", s) for s in scores), ("clusters", clusters)]:
        if values is not None and np.shape(values) != y.shape:
            found = f"shape {np.shape(values)} for {len(y)} labels"
            raise ValueError(f"{name}: found {found}; expected one value per label")
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


def _interval(value: float, variance: float, df: float = math.inf, level: float = 0.95) -> tuple:
    """Low, high, z (or t) and its two-sided p; no variance: p = 1 for no difference, else 0."""
    error = math.sqrt(variance)
    half = float(special.stdtrit(df, (1 + level) / 2)) * error
    z = value / error if error else math.copysign(math.inf, value) if value else 0.0
    return value - half, value + half, z, float(2 * special.stdtr(df, -abs(z)))


def _difference_of(y, scores_a, scores_b, clusters=None) -> tuple:
    """Labels, AUC of a and of b, placements (1, N) of a - b: their covariance is its variance,
    free of the rounding of C11 + C22 - 2 C12."""
    y, scores = _checked(y, scores_a, scores_b, clusters=clusters)
    v = placements(y, scores)
    return y, *v[:, y].mean(axis=1).tolist(), v[:1] - v[1:]


def clustered_ci(y, scores, clusters, level: float = 0.95) -> tuple[float, float, float]:
    """AUC and Obuchowski's interval (patients are independent), cut at 0 and 1."""
    y, scores = _checked(y, scores, clusters=clusters)
    v = placements(y, scores)
    auc, variance = float(v[0, y].mean()), float(clustered_covariance(y, v, clusters)[0, 0])
    low, high, *_ = _interval(auc, variance, level=level)
    return auc, max(0.0, low), min(1.0, high)


def auc_ci(y, scores, level: float = 0.95) -> tuple[float, float, float]:
    """AUC and DeLong's interval, cut at 0 and 1: Obuchowski's with each patch its own patient."""
    return clustered_ci(y, scores, np.arange(len(y)), level)


def delong_test(y, scores_a, scores_b) -> tuple[float, float, float, float]:
    """AUC of a, AUC of b, z (with the sign of a - b) and the paired two-sided p (E4)."""
    y, auc_a, auc_b, d = _difference_of(y, scores_a, scores_b)
    return auc_a, auc_b, *_interval(float(d[0, y].mean()), float(delong_covariance(y, d)[0, 0]))[2:]


def clustered_test(
    y, scores_a, scores_b, clusters, level: float = 0.95
) -> tuple[float, float, float, float, float, float]:
    """AUC of a, of b, their difference a - b, its interval and two-sided p (Obuchowski 1997)."""
    y, auc_a, auc_b, d = _difference_of(y, scores_a, scores_b, clusters)
    difference, variance = float(d[0, y].mean()), float(clustered_covariance(y, d, clusters)[0, 0])
    low, high, _, p = _interval(difference, variance, level=level)
    return auc_a, auc_b, difference, low, high, p


# --- Beyond the paper: bootstrap of patients, several seeds, Holm, power ---


def patient_draws(clusters, draws: int, seed: int) -> np.ndarray:
    """How often each patch (draws, N) is in test sets of patients drawn with replacement."""
    _, at = np.unique(clusters, return_inverse=True)
    patients = at.max() + 1
    share = np.full(patients, 1 / patients)
    return np.random.default_rng(seed).multinomial(patients, share, size=draws)[:, at]


def drawn_curves(y, scores, drawn) -> tuple[np.ndarray, np.ndarray]:
    """ROC curves of test sets that hold patch i `drawn[:, i]` times: 1 - specificity, sensitivity.

    (draws, T + 1) each, T the number of distinct scores; NaN where a draw lacks a class.
    """
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # of each run of ties
    counts = (np.cumsum((drawn * c)[:, order], axis=1)[:, last] for c in (~y, y))
    with np.errstate(invalid="ignore"):
        return tuple(np.pad(n / n[:, -1:], ((0, 0), (1, 0))) for n in counts)


def bootstrap_aucs(y, scores, clusters, draws: int = 2000, seed: int = 0) -> np.ndarray:
    """AUC (draws, K) in test sets of drawn patients; NaN where a draw lacks a class."""
    y, scores = _checked(y, *scores, clusters=clusters)
    drawn, aucs = patient_draws(clusters, draws, seed), np.empty((draws, len(scores)))
    for k, values in enumerate(scores):
        for i in range(0, draws, 100):  # 100 draws at a time bound the memory
            fpr, tpr = drawn_curves(y, values, drawn[i : i + 100])
            aucs[i : i + 100, k] = np.trapezoid(tpr, fpr, axis=1)
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


def compare(y, scores, baseline, clusters) -> dict[str, float]:
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
    auc, *spread = _mean_auc(y, v, clusters, own)
    low, high, *_ = _interval(auc, *spread)
    found = {"auc": auc, "low": max(0.0, low), "high": min(1.0, high)}
    delta, variance, df = _mean_auc(y, v, clusters, [(1, ours), (-1, theirs)])
    low, high, _, p = _interval(delta, variance, df)
    found |= {"delta": delta, "delta_low": low, "delta_high": high, "p_clustered": p}
    contrast = v[ours].mean(axis=0, keepdims=True) - v[theirs].mean(axis=0, keepdims=True)
    found["p_delong"] = _interval(delta, float(delong_covariance(y, contrast)[0, 0]))[3]
    power = float(special.stdtrit(df, 1 - ALPHA / 2) + special.stdtrit(df, 0.8))
    return found | {"detectable": power * math.sqrt(variance)}


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
    auc, i = float(won.sum() / number.sum()), len(pairs)
    variance = i / (i - 1) * ((won - auc * number) ** 2).sum() / number.sum() ** 2
    low, high, *_ = _interval(auc, float(variance))
    return auc, max(0.0, low), min(1.0, high), sum(map(len, pairs.values()))


def lesion_or_image(test: "Patches", scores: np.ndarray) -> dict[str, Sequence | None]:
    """Does a regime (K, N) see lesions or recognise images? AUC, interval, number of images."""
    scores, found = scores.mean(axis=0), {}
    malignant, benign, normal = (
        np.char.startswith(test.kind, name) for name in ("malignant", "benign", "normal")
    )
    for name, lesion in (("Malignant", malignant), ("Benign", benign)):
        at = lesion | normal
        auc = same_image_auc(lesion[at], scores[at], test.image[at], test.patient[at])
        found[f"{name} against normal, same image"] = auc
    y, who = np.isin(test.image, test.image[malignant])[normal], test.patient[normal]
    enough = min(len(set(who[y])), len(set(who[~y]))) > 1
    auc = (*clustered_ci(y, scores[normal], who), len(set(test.image[normal]))) if enough else None
    return found | {"Normal, images with cancer against others": auc}


def kid(x, y, patients_x, patients_y) -> tuple[float, float, float]:
    """Kernel inception distance between features (N, F) and (M, F), with its interval.

    The unbiased estimate of the squared discrepancy under (x.y/F + 1)^3 (Binkowski 2018), here
    over pairs of patches of *different* patients, so that likeness within a patient does not count
    as distance; features brought to length sqrt(F), else a few outliers decide the cubes.
    Interval: jackknife over patients.
    """
    f = np.concatenate([x, y]).astype(np.float64)
    f *= math.sqrt(f.shape[1]) / np.linalg.norm(f, axis=1, keepdims=True).clip(1e-12)
    ids, at = np.unique(np.concatenate([patients_x, patients_y]), return_inverse=True)
    member = np.zeros((2, len(ids), len(f)))
    member[np.r_[np.zeros(len(x), int), np.ones(len(y), int)], at, np.arange(len(f))] = 1
    kernel = (f @ f.T / f.shape[1] + 1) ** 3

    def mean(s: int, t: int) -> np.ndarray:  # of all pairs, then without each patient in turn
        sums = member[s] @ kernel @ member[t].T
        pairs = np.outer(member[s].sum(axis=1), member[t].sum(axis=1))
        total = [
            m.sum() - m.trace() - np.r_[0, m.sum(axis=0) + m.sum(axis=1) - 2 * m.diagonal()]
            for m in (sums, pairs)
        ]
        return total[0] / total[1]

    value, *without = (mean(0, 0) + mean(1, 1) - 2 * mean(0, 1)).tolist()
    return value, *_interval(value, (len(ids) - 1) * float(np.var(without)))[:2]


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
    scores = np.empty(len(y))
    for train, held_out in StratifiedGroupKFold(folds).split(x, y, patients):
        predicted = fit_predict(x[train], y[train], x[held_out])
        scores[held_out] = stats.rankdata(predicted) / len(held_out)
    return clustered_ci(y, scores, patients)


def linear_detector(x, y, x_held_out) -> np.ndarray:
    """Logistic regression on frozen features (standardised)."""
    return LogisticRegression(C=0.1, max_iter=1000).fit(x, y).decision_function(x_held_out)


def network_detector(device: torch.device, seed: int, steps: int = 200, batch: int = 32):
    """A small convolutional network on the pixels (uint16 patches), trained from scratch."""

    def fit_predict(x, y, x_held_out) -> np.ndarray:
        rng = np.random.default_rng(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = []
            for c_in, c_out in itertools.pairwise((1, 8, 16, 32, 64)):
                layers += [nn.Conv2d(c_in, c_out, kernel_size=3, stride=2, padding=1)]
                layers += [nn.GroupNorm(8, c_out), nn.ReLU()]
            features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
            net = nn.Sequential(OrderedDict(features=features, fc=nn.Linear(64, 2))).to(device)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        for _ in range(steps):
            at = rng.integers(len(x), size=batch)
            flip = tuple(np.flatnonzero(rng.random(2) < 0.5) + 1)
            images = np.flip(data.to_float(x[at]), flip).copy()[:, None]
            target = torch.from_numpy(y[at].astype(np.int64)).to(device)
            loss = F.cross_entropy(net(torch.from_numpy(images).to(device)), target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return classifier_scores(net, x_held_out, device)

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


def open_split(patch_set: Path, split: str) -> Patches:
    held, folder = data.patch_config(patch_set)["held"], patch_set / "patches" / split
    kinds = [kind for kind in data.CLASSES if held.get(f"{split}/{kind}")]
    if not kinds:
        raise ValueError(f"{patch_set}: holds no {split} patches; prepare it with some")
    columns = "patient_id", "image_uid"
    tables = [data.read_table(folder / f"{kind}.csv", columns) for kind in kinds]
    patient, image = (np.concatenate([table[c] for table in tables]) for c in columns)
    values = {kind: data.open_patches(patch_set, split, kind) for kind in kinds}
    return Patches(values, np.repeat(kinds, list(map(len, values.values()))), patient, image)


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
    synthetic = configs[0]["synthetic"]
    proportion = float(configs[0]["proportion"]) if synthetic else 0.0
    decay = "w/ decay" if configs[0]["decay"] < 1 else "w/o decay"
    name = f"{100 * proportion:g}% {decay}" if synthetic else BASELINE
    name = BLOB if any(s["control"] == "blob" for s in synthetic) else name
    hashes = [weights_hash(load_classifier(run, torch.device("cpu"))[0]) for run in runs]
    return Regime(name, proportion, folder, runs, seeds, hashes, configs[0])


def open_regimes(baseline: Path, augmented: Sequence[Path], fingerprint: str) -> list[Regime]:
    """The baseline, then as in Table 1 by proportion, the blob control last."""
    regimes = [open_regime(Path(folder), fingerprint) for folder in augmented]
    regimes.sort(key=lambda r: (r.name == BLOB, r.proportion))
    regimes.insert(0, open_regime(Path(baseline), fingerprint))
    if regimes[0].name != BASELINE:
        raise ValueError(f"--baseline {baseline}: trained with synthetic patches; expected none")
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
            raise ValueError(f"{run}: scores are not numbers; training diverged, train it again")
    return np.array(scores)


# --- §3 Results: Table 1, and what the paper does not test ---


def condition_table(
    test: Patches, scores: dict[str, np.ndarray], condition: str, corrected: bool, seed: int
) -> dict:
    """Rows of one condition; empty when the test set has too few patients for it."""
    positive, negative = (np.isin(test.kind, kinds.split()) for kinds in CONDITIONS[condition])
    at = positive | negative
    y, patients = positive[at], test.patient[at]
    if min(len(set(patients[y])), len(set(patients[~y]))) < 2:
        return {}
    size = {"patients": len(set(patients)), "patches": len(y)}
    scores, drawn, rows = {name: s[:, at] for name, s in scores.items()}, {}, []
    for name, ours in scores.items():
        drawn[name] = bootstrap_aucs(y, ours, patients, seed=seed).mean(axis=1)
        row = {"regime": name, "seeds": len(ours), **size}
        row |= compare(y, ours, scores[BASELINE], patients)
        row["seed_aucs"] = placements(y, ours)[:, y].mean(axis=1).tolist()
        low, high = np.nanpercentile(drawn[name] - drawn[BASELINE], [2.5, 97.5]).tolist()
        row |= {"delta_bootstrap_low": low, "delta_bootstrap_high": high}
        if name == BASELINE:
            row |= {k: None for k in row if k.startswith(("delta", "p_", "detectable"))}
        elif BLOB in scores and name != BLOB:
            row["against_blob"] = compare(y, ours, scores[BLOB], patients)
        rows.append(row)
    tested = [row for row in rows[1:] if row["regime"] != BLOB]  # the control is no hypothesis
    for key in ("p_delong", "p_clustered"):
        for row in rows[1:]:
            row |= {f"{key}_raw": row[key], f"{key}_holm": row[key]}
        for row, p in zip(tested, holm([row[key] for row in tested]), strict=True):
            row[f"{key}_holm"] = p
        for row in rows[1:]:
            row[key] = row[f"{key}_holm" if corrected else f"{key}_raw"]
    size |= {"positives": int(y.sum()), "positive_patients": len(set(patients[y]))}
    return {**size, "rows": rows}


def pooled_features(regime: Regime, device: torch.device) -> Callable[[np.ndarray], np.ndarray]:
    """What gives the pooled features (N, F) of patches by the regime's first model."""
    model, _ = load_classifier(regime.runs[0], device)
    return lambda values: classifier_scores(model, values, device, features=True)[1]


def control_of(
    syn: data.SyntheticSet, splits: dict[str, Patches], features: Callable, device, seed: int
) -> tuple[dict, list[np.ndarray]]:
    """Controls of one synthetic set, and its three closest pairs: synthetic, training patch ...

    On frozen features it is compared with validation patches, which the classifier has not seen,
    and so are real training patches: that is the floor, with all that differs between the splits.
    On pixels it is compared with training patches, which were flipped and resized as its sources.
    """
    kind, facts = REAL_OF[syn.task], data.read_json(syn.path / "config.json")
    found = {"set": syn.path.name, "task": f"{syn.task} {syn.control}".strip()}
    found |= {"samples": len(syn.combined), "requested": syn.requested}
    found |= {"fingerprint": syn.fingerprint, "generator": syn.generator, "config": facts["config"]}
    try:
        found |= {key: float(facts[key]) for key in ("acceptance", "area_median", "strength")}
        found |= {"warnings": list(map(str, facts["warnings"])), "gan": dict(facts.get("gan", {}))}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{syn.path}/config.json: damaged ({error}); synthesize it again"
        ) from None
    found["patients"] = len(set(syn.index["patient_id"]))
    sides = {s: (splits[s].values.get(kind, ()), splits[s].patients(kind)) for s in data.SPLITS[:2]}
    sides["synthetic"] = syn.combined, syn.index["patient_id"]
    if min(len(set(who)) for _, who in sides.values()) < 3:
        return found | {"warnings": [f"Not compared: fewer than three patients with {kind}."]}, []
    n = min(CONTROL_PATCHES, *(len(values) for values, _ in sides.values()))
    rng, pixels, patients = np.random.default_rng(seed), {}, {}
    for name, (values, who) in sides.items():
        at = np.sort(rng.permutation(len(values))[:n])
        pixels[name], patients[name] = values[at], who[at]
    deep = {name: features(values) for name, values in pixels.items()}
    scaler = StandardScaler().fit(deep["val"])
    deep = {name: scaler.transform(values) for name, values in deep.items()}
    for prefix, side in (("", "synthetic"), ("floor_", "train")):
        pair = deep["val"], deep[side], patients["val"], patients[side]
        found |= {f"{prefix}linear": detectability(*pair, linear_detector)}
        found |= {f"{prefix}kid": [1000 * v for v in kid(*pair)]}
    pair = (side[name] for side in (pixels, patients) for name in ("train", "synthetic"))
    found["network"] = detectability(*pair, network_detector(device, seed), folds=3)
    if syn.task not in LESIONS:
        return found, []
    held_out, training = sides["val"][0], sides["train"][0]
    three = (features(values) for values in (syn.combined, training, held_out))
    at, distance, found["nearest"] = nearest_training(*three)
    closest = np.argsort(distance, kind="stable")[:3]
    return found, [p for i in closest for p in (syn.combined[i], training[at[i]])]


# --- Figures ---


def _save(figure: Figure, path: Path) -> None:
    with data.replace_file(path) as file:
        figure.savefig(file, format="png", dpi=160, metadata={"Software": None})


def roc_band(y, scores, patients, seed: int, draws: int = 300) -> np.ndarray:
    """Sensitivity (3, 101) at 0, 1 ... 100% false positives: mean over seeds, 2.5%, 97.5%.

    The band is pointwise, over patients drawn with replacement.
    """
    drawn = np.concatenate([np.ones((1, len(y)), int), patient_draws(patients, draws, seed)])
    drawn = drawn[(drawn @ y > 0) & (drawn @ ~y > 0)]
    curves = np.zeros((len(drawn), len(GRID)))
    for values in scores:
        for curve, fpr, tpr in zip(curves, *drawn_curves(y, values, drawn), strict=True):
            curve += np.interp(GRID, fpr, tpr) / len(scores)
    return np.array([curves[0], *np.percentile(curves[1:], [2.5, 97.5], axis=0)])


def roc_figure(bands: dict[str, np.ndarray], rows: list[dict]) -> Figure:
    """One panel a regime, the baseline behind each."""
    names = [row["regime"] for row in rows[1:]] or [BASELINE]
    aucs = {row["regime"]: f"{row['regime']}: {row['auc']:.3f}" for row in rows}
    down = math.ceil(len(names) / 2)
    figure = Figure(figsize=(6, 3 * down), layout="constrained")
    for i, name in enumerate(names):
        ax = figure.add_subplot(down, 2, i + 1, aspect="equal", xlim=(0, 1), ylim=(0, 1.01))
        for key in dict.fromkeys((BASELINE, name)):
            (mean, low, high), colour = bands[key], COLOURS.get(key, BLUE)
            ax.fill_between(GRID, low, high, color=colour, alpha=0.18, linewidth=0)
            ax.plot(GRID, mean, color=colour, linewidth=1.6, label=aucs[key])
        ax.legend(loc="lower right", fontsize=9, frameon=False, title="AUC", title_fontsize=9)
    figure.supxlabel("1 - specificity", fontsize=10)
    figure.supylabel("sensitivity", fontsize=10)
    return figure


def difference_figure(rows: list[dict]) -> Figure:
    """Difference to the baseline with its clustered interval; a tick for each seed."""
    figure = Figure(figsize=(6, 1 + 0.5 * len(rows)), layout="constrained")
    ax, base = figure.subplots(), rows[0]["auc"]
    for i, row in enumerate(rows[1:]):
        colour = COLOURS.get(row["regime"], BLUE)
        ax.plot([row["delta_low"], row["delta_high"]], [i, i], color=colour, linewidth=3)
        ax.plot(row["delta"], i, "o", color=colour, markersize=7)
        ax.plot(np.array(row["seed_aucs"]) - base, [i - 0.22] * row["seeds"], "|", color=colour)
    ax.axvline(0, color="#333333", linewidth=0.8)
    ax.set_yticks(range(len(rows) - 1), [row["regime"] for row in rows[1:]])
    ax.set(ylim=(len(rows) - 1.5, -0.5), xlabel=f"difference in AUC to the baseline ({base:.3f})")
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
    for i, (title, xy) in enumerate(panels.items(), start=1):
        ax = figure.add_subplot(1, len(panels), i, xticks=[], yticks=[], title=f"{title}: features")
        for name, (label, colour, size, edge) in styles.items():
            if (at := groups == name).any():
                style = {"s": size, "color": colour, "linewidths": edge, "edgecolors": "white"}
                ax.scatter(*xy[at].T, label=f"{label} ({at.sum()})", alpha=0.8, **style)
    legend = {"loc": "outside lower center", "ncols": 2, "fontsize": 9, "frameon": False}
    figure.legend(*ax.get_legend_handles_labels(), markerscale=1.5, **legend)
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
    regimes: list[Regime], splits, sets, scores: dict[str, np.ndarray], device, seed: int, out: Path
) -> dict:
    """t-SNE of the baseline's features (F4); the patches that a regime rescues (F5, F6).

    The paper's 50% regime where it was run, else the first; the first seed of each.
    """
    test, facts, rescued, models = splits["test"], {}, [], regimes[:1]
    others = [regime for regime in regimes if regime.name not in (BASELINE, BLOB)]
    if others:
        chosen = next((r for r in others if r.name == "50% w/ decay"), others[0])
        malignant = np.flatnonzero(np.char.startswith(test.kind, "malignant"))
        base, ours = (scores[name][0, malignant] for name in (BASELINE, chosen.name))
        best, facts = rescue(base, ours)
        facts |= {"regime": chosen.name, "patients": len(set(test.patient[malignant[best]]))}
        if rescued := [test[i] for i in malignant[best]]:
            models = [regimes[0], chosen]
            titles = [f"{base[i]:.2f} to {ours[i]:.2f}" for i in best]
            _save(patch_figure([("", rescued, titles)]), out / "figure6.png")
    sources = splits["val"].values | {s.task: s.combined for s in sets[::-1] if not s.control}
    rng, points = np.random.default_rng(seed), {}
    for kind, (count, *_) in EMBEDDED.items():
        if kind in sources:
            points[kind] = sources[kind][np.sort(rng.permutation(len(sources[kind]))[:count])]
    facts["points"] = {kind: len(values) for kind, values in points.items()}
    points |= {"rescued": np.array(rescued)} if rescued else {}
    groups, panels = np.repeat(list(points), list(map(len, points.values()))), {}
    for regime in models:
        features = pooled_features(regime, device)
        panels[regime.name] = embed(np.concatenate(list(map(features, points.values()))), seed)
    alone = groups != "rescued"
    first = {BASELINE: panels[BASELINE][alone]}
    _save(embedding_figure(first, groups[alone]), out / "figure4.png")
    if rescued:
        _save(embedding_figure(panels, groups), out / "figure5.png")
    return facts


# --- The whole evaluation ---


def evaluate(
    patch_set: Path,
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
    Returns the rows of table1.csv with what was concluded. Raises ValueError: runs or sets of
    another patch set, unfinished runs, fewer than two test patients a class.
    """
    patch_set, out, device = Path(patch_set), Path(out), torch.device(device)
    config = data.patch_config(patch_set)
    regimes = open_regimes(baseline, augmented, config["fingerprint"])
    sets = [data.open_synthetic(path) for path in synthetic]
    for syn in sets:
        data.check_synthetic(syn, patch_set)
    claimed = {"data": config["fingerprint"], "regimes": [[r.name, *r.hashes] for r in regimes]}
    claimed |= {"synthetic": [s.fingerprint for s in sets], "holm": holm, "seed": seed}
    claimed["skipped"] = [list(s) for s in skipped]
    stages = sum(len(r.runs) for r in regimes) + len(sets) + 1
    claim = data.claim_folder(out, "evaluate", claimed)
    with claim, data.progress(stages, "evaluate") as advance:
        splits = {split: open_split(patch_set, split) for split in data.SPLITS}
        test, scores = splits["test"], {}
        for regime in regimes:
            scores[regime.name] = score(regime, test, device)
            advance(len(regime.runs), f"{regime.name} scored")
        there = {c: set(" ".join(CONDITIONS[c]).split()) & set(test.values) for c in CONDITIONS}
        tables = {  # with one kind of lesion only, the whole test set is not shown again
            c: condition_table(test, scores, c, holm, seed)
            for c in CONDITIONS
            if c == MAIN or there[c] != there[MAIN]
        }
        if not tables[MAIN]:
            raise ValueError(f"{patch_set}: fewer than two test patients a class; prepare more")
        rows, at = tables[MAIN]["rows"], np.isin(test.kind, list(there[MAIN]))
        y, patients = test.kind[at] != "normal", test.patient[at]
        bands = {name: roc_band(y, s[:, at], patients, seed) for name, s in scores.items()}
        _save(roc_figure(bands, rows), out / "roc.png")
        if len(rows) > 1:
            _save(difference_figure(rows), out / "difference.png")
        features, controls, nearest = pooled_features(regimes[0], device), [], []
        for k, syn in enumerate(sets):
            found, closest = control_of(syn, splits, features, device, seed)
            controls.append(found)
            nearest += [(syn.path.name, closest, ("synthetic", "nearest"))] if closest else []
            new = syn.generator not in [s.generator for s in sets[:k]]
            for name in ("figure1", "gan")[: 1 + new]:  # of synthesize: a row of Figure 1, training
                if (syn.path / f"{name}.png").exists():
                    with data.replace_file(out / f"{name}-{k}.png") as file:
                        file.write((syn.path / f"{name}.png").read_bytes())
            advance(1, f"{syn.path.name}: controls")
        if nearest:
            _save(patch_figure(nearest), out / "nearest.png")
        metrics = claimed | {"conditions": tables, "controls": controls}
        metrics["data"] = {"name": patch_set.name, **config}
        metrics["lesion_or_image"] = {n: lesion_or_image(test, s) for n, s in scores.items()}
        metrics["feature_space"] = figures_4_to_6(regimes, splits, sets, scores, device, seed, out)
        metrics["data"]["patients"] = {
            f"{split}/{kind}": len(set(patches.patients(kind)))
            for split, patches in splits.items()
            for kind in patches.values
        }
        names = ("regime", "run", "seeds", "weights", "config")
        facts = [(r.name, r.folder.name, r.seeds, r.hashes, r.config) for r in regimes]
        metrics["runs"] = [dict(zip(names, fact, strict=True)) for fact in facts]
        lines = [row | {"proportion": r.proportion} for row, r in zip(rows, regimes, strict=True)]
        empty = dict.fromkeys(COLUMNS) | {"seeds": 0}
        lines += [empty | {"regime": name, "reason": reason} for name, reason in skipped]
        table = ([line[column] for column in COLUMNS] for line in lines)
        data.write_table(out / "table1.csv", COLUMNS, table)
        data.write_json(out / "metrics.json", metrics)
        with data.replace_file(out / "report.html", "w") as file:
            file.write(report(metrics, out))
        advance(1, "report written")
        data.finish_folder(out)
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
figure { margin: 1rem 0; } img { width: 46rem; max-width: 100%; display: block; }
@media screen and (max-width: 40rem) { thead, .none { display: none !important; }
  tr { display: block; border: 1px solid #ccc; border-radius: 6px; margin: .6rem 0; padding: .4rem }
  tbody th { display: block; font-size: 1rem; border: 0; }
  td { display: flex; gap: .8rem; border: 0; padding: .12rem 0; }
  td::before { content: attr(data-label); flex: 0 0 40%; color: #555; } }
@media print { body { font-size: 9pt; max-width: none; padding: 0; } table { font-size: 7.5pt; }
  img { width: 34rem; } @page { margin: 13mm; } }
"""
CAPTIONS = {
    "difference": "Difference in AUC to the baseline, 95% interval over patients and seeds. Ticks: "
    "single seeds.",
    "roc": "ROC curves, mean over seeds, with pointwise 95% bands over patients.",
    "figure1": "Figure 1. Pairs: real patch (left), synthetic one (right). From the top: {}.",
    "nearest": "The three synthetic patches of each set closest to a training patch of the class "
    "in the baseline's features, and that patch.",
    "gan": "How the GANs were trained. Healthy: D gets neither all nor nothing right, the norm of "
    "its gradient is near one, lesions neither vanish nor fill the patch and differ with the "
    "input and the noise (spread). From the top: {}.",
    "figure4": "Figure 4. t-SNE of the baseline's pooled features. Real patches are the stored "
    "validation patches; synthetic ones come from training patients.",
    "figure5": "Figure 5. The rescued patches among the points of Figure 4.",
    "figure6": "Figure 6. The rescued patches: p(cancer) before and after.",
}
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Synthetic lesions: evaluation</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>
<body><h1>Do synthetic lesions improve a breast cancer patch classifier?</h1>
<p class="box"><b>Research only, not for clinical use.</b> An AUC on patches that hold annotated
lesions says nothing about sensitivity on whole mammograms or in screening.</p>
<h2>In short</h2><p><b>{answer}</b> A difference to the baseline counts as found only if its
clustered interval excludes zero, its p stays under 0.05 when corrected for the number of regimes
(Holm), several seeds were trained, and the regime differs in the same direction from the blob
control (a smooth bump of the same size and brightness in place of each lesion, at the proportion
given below).</p><ul>{short}</ul>
<h2>Table 1: the whole test set</h2>{table1}
<p class="note">Difference: to the baseline. Intervals and <i>p, patients</i>: patients are the unit
(Obuchowski 1997); with several training seeds the difference must hold beyond these trainings too
(Obuchowski and Rockette 1995, seeds as readers). Bootstrap: patients drawn with replacement, the
models stay. <i>p, DeLong</i>: the paper's test, which takes every patch for a new patient. {holm}
Paper: Table 1, on OMI-DB; other data give other values. The paper contradicts itself (Q37): its
text has p &lt; 1e-8 for 50% where the table has 1e-4, and calls 10% and 25% significant where the
table has 0.10 and 0.055. The table fits the AUCs better.</p>{difference}{roc}
<h2>Other test conditions</h2>{conditions}
<p class="note">Against benign: a classifier that was given no benign patches (Q36) finds lesions,
whatever they are; expect little more than 0.5.</p>
<h2>Lesion or image?</h2>{seen}
<p class="note">AUC (95% CI), number of images. Same image: over the pairs of a lesion and a normal
patch of one image; a model that recognises images has 0.5 there. Normal patches alone: well above
0.5 if images with cancer are known by their normal tissue.</p>
<h2>Are the synthetic patches realistic?</h2>{figure1}{controls}
<p class="note">Told apart: AUC of a detector of synthetic patches, cross-validated, each patient in
one fold; 0.5 is chance, 1 always. By features: logistic regression on the baseline's features,
against validation patches; the floor is the same for real training patches: what differs between
the splits and what the baseline remembers. By pixels: a small network, against training patches;
lesions put into other patients' tissue need not reach 0.5. KID: kernel inception distance on the
same features (standardised, of equal length), unbiased, without pairs of one patient, interval by
jackknife over patients. Nearer: the share of synthetic patches nearer to a training patch than the
nearest 1% of real validation patches; copies would make it far more than 1%.</p>{nearest}{gan}
<h2>Feature space</h2>{figure4}<p>{rescued}</p>{figure5}{figure6}
<h2>What was run</h2><p><code>{command}</code></p>{held}{runs}
<h2>How to read this</h2><ul>
<li>No difference shown is not equality: see from which size on one would have been found.</li>
<li>Patches of one patient resemble each other, so DeLong's test calls too much significant. With
fewer than about 30 patients on either side, or with only two seeds, the clustered intervals are
rather too narrow as well.</li>
<li>With one seed the result is about these very models; training again may give another.</li>
</ul><p class="note">The same for machines: table1.csv and metrics.json.</p></body></html>
"""


def in_words(value: Sequence[float | None] | None, form: str = ".3f") -> str:
    """(value, low, high, ...) with its interval."""
    if value is None or value[0] is None:
        return "-"
    return "{} ({} to {})".format(*(f"{v:{form}}" for v in value[:3]))


def p_in_words(p: float | None) -> str:
    return "-" if p is None else f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def difference_in_words(row: dict, kind: str = "") -> str:
    return in_words([row[f"delta{end}"] for end in ("", f"{kind}_low", f"{kind}_high")], "+.3f")


def verdict(row: dict, rows: list[dict]) -> str:
    """In plain words whether a difference to the baseline counts as found.

    Its clustered interval must exclude zero, over seeds too, its p hold for the number of regimes
    (Holm), and the regime be told from the blob control in the same direction, by the same test.
    """
    if row["delta"] is None:
        return "-"
    if row["p_clustered_raw"] >= ALPHA:
        return f"not found (one of {row['detectable']:.3f} would be, with 80% power)"
    word = "higher" if row["delta"] > 0 else "lower"
    if row["regime"] == BLOB:
        return f"{word}, with a featureless bump"
    if min(r["seeds"] for r in (row, rows[0])) == 1:
        return f"{word} for these models, but not found: train several (--seeds)"
    if row["p_clustered_holm"] >= ALPHA:
        p = p_in_words(row["p_clustered_holm"])
        return f"{word}, but not found: p is {p} for the number of regimes (Holm)"
    if BLOB not in [r["regime"] for r in rows]:
        return f"{word}, but not found: no blob control was run"
    blob = row["against_blob"]
    against = f"against the blob control {difference_in_words(blob)}"
    if blob["p_clustered"] >= ALPHA or blob["delta"] * row["delta"] < 0:
        return f"{word}, but not found: a featureless bump may do the same ({against})"
    return f"found: {word}; {against}"


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


def _condition(found: dict, skipped: Sequence = (), paper: bool = False) -> str:
    rows = []
    for r in found["rows"]:
        differences = (difference_in_words(r, kind) for kind in ("", "_bootstrap"))
        cells = [r["seeds"], in_words((r["auc"], r["low"], r["high"])), *differences]
        p = (p_in_words(r[key]) for key in ("p_clustered", "p_delong"))
        rows.append([r["regime"], *cells, *p, verdict(r, found["rows"])])
    rows += [[name, 0, *"-----", f"not run: {reason}"] for name, reason in skipped]
    for row in rows if paper else ():
        row += PAPER_TABLE_1.get(row[0], ("-", "-"))
    head = "Regime|Seeds|AUC (95% CI)|Difference (95% CI)|Bootstrap|p, patients|p, DeLong|Result"
    size = "{patches} test patches of {patients} patients; {positives} malignant ones of "
    size = (size + "{positive_patients} patients.").format(**found)
    return f"<p>{size}</p>" + _table(head + ("|Paper: AUC|Paper: p" if paper else ""), rows)


def _rescued(facts: dict) -> str:
    if "regime" not in facts:
        return "Figures 5 and 6 need an augmented regime."
    text = "{up} malignant test patches rise from below 0.5 to above it under {regime}, {down} "
    text += "fall (first seed of each)."
    if facts["up"]:
        text += " The largest rises (Figures 5 and 6; at most five, of {patients} patients) are "
        text += "{rise:.2f} on average; the paper's 0.32. Some of so many are large by chance."
    text += " The largest falls are {fall:.2f} on average." if facts["down"] else ""
    return escape(text.format(**facts))


def _controls(controls: list[dict]) -> str:
    """One column a synthetic set."""
    forms = {"Accepted": ("acceptance", ".1%"), "Object, median": ("area_median", ".1%")}
    forms["Mean change inside"] = "strength", "+.3f"
    lines = {"Task": [c["task"] for c in controls]}
    lines["Made"] = ["{samples} of {requested}, {patients} patients".format(**c) for c in controls]
    lines |= {name: [f"{c[key]:{form}}" for c in controls] for name, (key, form) in forms.items()}
    forms = {"Told apart by features": "linear", "(its floor)": "floor_linear"}
    forms |= {"Told apart by pixels": "network", "KID x 1000": "kid", "(floor of KID)": "floor_kid"}
    lines |= {name: [in_words(c.get(key), ".2f") for c in controls] for name, key in forms.items()}
    nearest = [c.get("nearest") for c in controls]
    lines["Nearer to training"] = [f"{n['closer']:.1%}" if n else "-" for n in nearest]
    if any(c["warnings"] for c in controls):
        lines["Remarks"] = [" ".join(c["warnings"]) or "-" for c in controls]
    head = "|".join(["Set", *(c["set"].replace("|", "/") for c in controls)])
    return _table(head, [[name, *cells] for name, cells in lines.items()] if controls else [])


def _runs(metrics: dict) -> str:
    """What everything was made with."""

    def options(config: dict) -> str:
        hidden = ("data", "name", "fingerprint", "counts", "held", "patients", "key", "synthetic")
        hidden += ("generator", "task", "seed", "source")
        return ", ".join(f"{key} {value}" for key, value in config.items() if key not in hidden)

    config = metrics["data"]
    rows = [["Patch set", config["name"], config["seed"], config["fingerprint"][:12], config]]
    for hash_, gan in {c["generator"]: c["gan"] for c in metrics["controls"]}.items():
        rows.append([f"GAN, {gan.get('task', '-')}", "-", gan.get("seed", "-"), hash_[:12], gan])
    for c in metrics["controls"]:
        made = c["config"]
        rows.append([f"Set, {c['task']}", c["set"], made["seed"], c["fingerprint"][:12], made])
    for r in metrics["runs"]:
        seeds, hashes = ", ".join(map(str, r["seeds"])), ", ".join(h[:12] for h in r["weights"])
        used = [s["fingerprint"][:12] for s in r["config"]["synthetic"]]
        rows.append([r["regime"], r["run"], seeds, hashes, r["config"] | {"sets": used}])
    rows = [[*cells, options(config) or "-"] for *cells, config in rows]
    return _table("What|Folder|Seeds|Fingerprint, weights (sha256)|Options", rows)


def report(metrics: dict, out: Path) -> str:
    """report.html: metrics.json in words, with the figures in `out` inside."""
    main, controls, config = metrics["conditions"][MAIN], metrics["controls"], metrics["data"]
    rows, slots = main["rows"], {}
    for name, caption in CAPTIONS.items():
        html, shown = "", []
        pictures = {f"{name}-{k}.png": f"{c['set']} ({c['task']})" for k, c in enumerate(controls)}
        for file, title in ({f"{name}.png": ""} | pictures).items():
            if (out / file).exists():
                uri = base64.b64encode((out / file).read_bytes()).decode()
                html += f'<img src="data:image/png;base64,{uri}" alt="{file}, described below">'
                shown.append(escape(title))
        text = caption.format(", ".join(shown))
        slots[name] = html and f"<figure>{html}<figcaption>{text}</figcaption></figure>"
    short, conditions = "", ""
    for row in rows:
        text = f"{row['regime']}: AUC {in_words((row['auc'], row['low'], row['high']))}"
        if row["delta"] is not None:
            text += f", difference {difference_in_words(row)}: {verdict(row, rows)}"
        short += f"<li>{escape(text)}</li>"
    better = [r["regime"] for r in rows if verdict(r, rows).startswith("found: higher")]
    answer = f"Here synthetic lesions helped: {', '.join(better)}."
    for name, found in metrics["conditions"].items():
        if name != MAIN:
            few = "<p>Not computed: fewer than two test patients a class.</p>"
            conditions += f"<h3>{name}</h3>{_condition(found) if found else few}"
    seen = metrics["lesion_or_image"]
    keys = "|".join(["Regime", *seen[BASELINE]])
    seen = [
        [name, *(f"{in_words(v)}, {v[3]}" if v else "-" for v in found.values())]
        for name, found in seen.items()
    ]
    held = []
    for kind in data.CLASSES:
        at = [f"{split}/{kind}" for split in data.SPLITS]
        cells = (
            f"{config['held'][k]} ({n})" if (n := config["patients"].get(k)) else "-" for k in at
        )
        held.append([kind, *cells])
    command = [f"mamgan.py evaluate --data {config['name']} --baseline {metrics['runs'][0]['run']}"]
    command += [f"--augmented {r['run']}" for r in metrics["runs"][1:]]
    command += [f"--synthetic {c['set']}" for c in controls]
    command += [*(["--holm"] if metrics["holm"] else []), f"--seed {metrics['seed']}"]
    holm = "Not corrected for the number of regimes, as in the paper (--holm does; the verdict is)."
    if metrics["holm"]:
        holm = "Both p-values are corrected for the number of regimes (Holm); intervals are not."
    return PAGE.format(
        **slots,
        style=STYLE,
        answer=escape(answer if better else "No evidence here that synthetic lesions help."),
        short=short,
        table1=_condition(main, metrics["skipped"], paper=True),
        holm=holm,
        conditions=conditions,
        seen=_table(keys, seen),
        controls=_controls(controls),
        rescued=_rescued(metrics["feature_space"]),
        command=escape(" ".join(command)),
        held=_table("|".join(["Patches (patients)", *data.SPLITS]), held),
        runs=_runs(metrics),
    )
