"""Beyond the paper: same-image AUC, thresholds, calibration, detectors, KID, nearest patches."""

import itertools
import math
from collections import OrderedDict

import numpy as np
import torch
from scipy import ndimage, spatial, stats
from scipy.sparse.csgraph import connected_components
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import pairwise_distances_argmin_min
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler
from torch import nn

import data
from evaluate import CONDITIONS, MAIN, clustered_ci, interval
from postprocess import LESION_THRESHOLD
from support import files
from support.patchset import Patches, SyntheticSet
from train import classifier_scores

CONTROL_PATCHES = 1000  # a side, as many as the paper's validation set has of a class (P5)
SPECIFICITY, BINS = 0.9, 10  # of the threshold; of equal width, of the calibration
NATIVE_MM = 0.07  # a pixel of detectors for mammography: 0.05 to 0.1
GRAIN_MM, GRAIN_GAP_MM, GRAIN_NOISE = 1.15, 3.3, 6.0  # see `grains`
ALIKE = ("precision", "recall", "density", "coverage")  # see `alike`
GRAINS = ("grains", "size_mm", "contrast", "extent_mm")  # its figures


# --- Does a model see lesions or recognise images? ---


def same_image_auc(y, scores, images, clusters) -> tuple[float, float, float, int] | None:
    """AUC over the pairs (positive, negative) of one image, its interval, images that hold both.

    A model that recognises the image, not the lesion, has 0.5 here. Ratio of sums over patients.
    """
    pairs = []
    for image in np.unique(images):
        at = images == image
        x, z = scores[at & y][:, None], scores[at & ~y][None]
        if x.size and z.size:
            pairs.append((((x > z) + (x == z) / 2).sum(), x.size * z.size, clusters[at][0]))
    won, number, who = zip(*pairs, strict=True) if pairs else ((), (), ())
    return (*ratio(won, number, who), len(pairs)) if len(set(who)) > 1 else None


def ratio(part, whole, patients) -> tuple[float, float, float]:
    """Sum of part over sum of whole (N,), with its interval over patients, cut at 0 and 1."""
    _, at = np.unique(patients, return_inverse=True)
    part, whole = np.bincount(at, part), np.bincount(at, whole)
    value, i = float(part.sum() / whole.sum()), len(whole)
    variance = i / (i - 1) * ((part - value * whole) ** 2).sum() / whole.sum() ** 2
    low, high, *_ = interval(value, float(variance))
    return value, max(0.0, low), min(1.0, high)


def lesion_or_image(kind, patients, images, scores) -> dict[str, tuple | None]:
    """AUC, interval and number of images, for a regime's scores (K, N) of the test patches (N,)."""
    scores, rows, normal = scores.mean(axis=0), {}, kind == "normal"
    for name in ("Malignant", "Benign"):
        lesion = np.char.startswith(kind, name.lower())
        at = lesion | normal
        auc = same_image_auc(lesion[at], scores[at], images[at], patients[at])
        rows[f"{name} against normal, same image"] = auc
    cancer = images[np.char.startswith(kind, "malignant")]
    y, who = np.isin(images, cancer)[normal], patients[normal]
    enough = min(len(set(who[y])), len(set(who[~y]))) > 1
    auc = (*clustered_ci(y, scores[normal], who), len(set(images[normal]))) if enough else None
    return rows | {"Normal, images with cancer against others": auc}


# --- At one threshold, and as probabilities ---


def thresholds(scores: np.ndarray) -> list[float]:
    """Above which a score (K, N) of each seed is called cancer: 90% of normal patches are not."""
    return np.quantile(scores, SPECIFICITY, axis=1, method="inverted_cdf").tolist()


def readings(kind, patients, scores: dict, limits: dict, fold=None) -> dict[str, dict]:
    """What each regime's scores (K, N) give on the main condition, mean over seeds; intervals are
    over patients. limits: thresholds (K, 1) or (K, N), settled on other patches.

    sensitivity, specificity: at these thresholds; brier: squared distance of p(cancer) from 0 or 1;
    ece: mean distance of p(cancer) from the share of cancers within ten bins; bins: mean p(cancer),
    share of cancers, patches of all seeds in each. Folds (N,) have bins of their own for the ece,
    so that the errors of their models do not cancel; the rest is of all patches together.
    """
    tested, found = np.isin(kind, sum(CONDITIONS[MAIN], ())), {}
    _, fold = np.unique(np.zeros(len(kind)) if fold is None else fold, return_inverse=True)
    y, who, ones = kind[tested] != "normal", patients[tested], np.ones(tested.sum())
    for name, p in scores.items():
        above = (p > limits[name])[:, tested].mean(axis=0)
        p = p[:, tested]
        at = np.minimum((BINS * p).astype(int), BINS - 1)
        own = at + BINS * fold[tested]  # bins of each fold
        gaps = [np.bincount(b, s - y, own.max() + 1) for b, s in zip(own, p, strict=True)]
        n, *sums = (np.bincount(at.ravel(), w.ravel(), BINS) for w in (p >= 0, p, p * 0 + y))
        found[name] = {
            "sensitivity": ratio(above[y], ones[y], who[y]),
            "specificity": ratio(1 - above[~y], ones[~y], who[~y]),
            "brier": ratio(((p - y) ** 2).mean(axis=0), ones, who),
            "ece": float(np.abs(gaps).sum(axis=1).mean() / len(y)),
            "bins": [[a / k, b / k, k] for k, a, b in zip(n, *sums, strict=True) if k],
        }
    return found


# --- Are synthetic patches like real ones? ---


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
    member[np.repeat([0, 1], [len(x), len(y)]), at, np.arange(len(f))] = 1
    kernel = (f @ f.T / f.shape[1] + 1) ** 3

    def mean(s: int, t: int) -> np.ndarray:  # of all pairs, then without each patient in turn
        sums, pairs = (
            m.sum() - m.trace() - np.r_[0, m.sum(axis=0) + m.sum(axis=1) - 2 * m.diagonal()]
            for m in (member[s] @ k @ member[t].T for k in (kernel, np.ones_like(kernel)))
        )
        return sums / pairs

    value, *without = (mean(0, 0) + mean(1, 1) - 2 * mean(0, 1)).tolist()
    return value, *interval(value, (len(ids) - 1) * float(np.var(without)))[:2]


def apart(x: np.ndarray, k: int = 1) -> np.ndarray:
    """How far the k-th nearest other one of the features (N, F) lies from each."""
    return NearestNeighbors(n_neighbors=k).fit(x).kneighbors()[0][:, -1]


def alike(real: np.ndarray, fake: np.ndarray, k: int = 5) -> dict[str, float]:
    """Precision and recall (Kynkaanniemi 2019), density and coverage (Naeem 2020) of `fake` (M, F).

    About each point stands a ball that reaches to its k-th neighbour. Precision: share of fake
    points in a real ball; density: in how many, over k; recall: share of real points in a fake
    ball; coverage: share of real balls that hold a fake point.
    """
    between = spatial.distance.cdist(real, fake)
    k = min(k, len(real) - 1, len(fake) - 1)
    inside, around = between < apart(real, k)[:, None], between < apart(fake, k)
    found = inside.any(axis=0), around.any(axis=1), inside.sum(axis=0) / k, inside.any(axis=1)
    return dict(zip(ALIKE, (float(values.mean()) for values in found), strict=True))


def detectability(real, fake, patients_real, patients_fake, fit_predict, folds=5) -> tuple:
    """AUC at which real and synthetic patches can be told apart, and its ends; 0.5 is chance.

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
            loss = nn.functional.cross_entropy(net(torch.from_numpy(images).to(device)), target)
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
    summary = {"median": float(np.median(distance)), "reference": float(np.median(reference))}
    summary["closer"] = float((distance < np.percentile(reference, 1)).mean())
    return at, distance, summary


def duplicates(fake, training) -> float:
    """Share of synthetic patches nearer to another one than the closest 1% of as many training
    patches are to each other: the more points, the closer they lie."""
    return float((apart(fake) < np.percentile(apart(training), 1)).mean())


def grains(patch: np.ndarray, mm: float) -> tuple[float, ...] | None:
    """Of the largest cluster of bright grains in a patch (S, S) uint16 with pixels of `mm`: their
    number, median diameter in mm and contrast in [-1, 1] units, largest distance in mm.

    A grain stands out from the median of the square of 2 x 1.15 mm around by the paper's threshold
    of 0.1 and six times the patch's noise; a cluster's are at most 3.3 mm from the next. None
    without a grain. Ours; settled on phantoms, whose grains it counts (tests/test_evaluate.py).
    """
    x = data.to_float(patch)
    over = x - ndimage.median_filter(x, size=2 * round(GRAIN_MM / mm) + 1)
    noise = 1.4826 * np.median(np.abs(over))  # the standard deviation, whatever stands out
    labels, n = ndimage.label(over > max(LESION_THRESHOLD, GRAIN_NOISE * noise), np.ones((3, 3)))
    if not n:
        return None
    at = mm * np.array(ndimage.center_of_mass(labels > 0, labels, range(1, n + 1)))  # (n, 2)
    size = mm * np.sqrt(4 / np.pi * np.bincount(labels.ravel())[1:])
    contrast = ndimage.maximum(over, labels, range(1, n + 1))
    between = spatial.distance_matrix(at, at)
    _, cluster = connected_components(between <= GRAIN_GAP_MM)
    own = cluster == np.bincount(cluster).argmax()
    extent = between[np.ix_(own, own)].max()
    return float(own.sum()), float(np.median(size[own])), float(np.median(contrast[own])), extent


def grain_table(patches: np.ndarray, mm: float) -> dict[str, list[float]]:
    """Quartiles of each figure of `grains` over patches, and the share of patches with a grain."""
    found = [figures for patch in patches if (figures := grains(patch, mm))]
    quartiles = np.percentile(found or [[0.0] * len(GRAINS)], (25, 50, 75), axis=0).T
    share = len(found) / len(patches)
    return dict(zip(GRAINS, quartiles.tolist(), strict=True)) | {"with": share}


def synthesis_facts(syn: SyntheticSet) -> dict:
    """What `synthesize` wrote about a set."""
    facts = files.read_json(syn.path / "config.json")
    names = ("acceptance", "area_median", "strength", "warnings", "config")
    return {
        **{name: facts[name] for name in names},
        "gan": {k: v for k, v in facts["gan"].items() if k not in ("images", "patients")},
        "set": syn.path.name,
        "task": f"{syn.task} {syn.control}".strip(),
        "samples": len(syn.combined),
        "requested": syn.requested,
        "patients": len(set(syn.index["patient_id"])),
        "fingerprint": syn.fingerprint,
        "generator": syn.generator,
    }


def control_of(syn: SyntheticSet, splits: dict[str, Patches], features, device, seed) -> tuple:
    """Controls of one synthetic set (dict), its three closest pairs: synthetic, training patch ...

    On frozen features it is compared with validation patches, which the classifier has not seen,
    and so are real training patches: that is the floor, with all that differs between the splits.
    On pixels it is compared with training patches, which were flipped and resized as its sources.
    """
    kind, control = data.TASKS[syn.task].real, synthesis_facts(syn)  # what the set imitates
    patches, patients = {"synthetic": syn.combined}, {"synthetic": syn.index["patient_id"]}
    for split in ("train", "val"):
        patches[split] = splits[split].parts.get(kind, ())
        patients[split] = splits[split].column("patient_id")[splits[split].kind == kind]
    if min(len(set(who)) for who in patients.values()) < 3:
        control["warnings"].append(f"Not compared: fewer than three patients with {kind}.")
        return control, []
    n = min(CONTROL_PATCHES, *map(len, patches.values()))
    rng, pixels = np.random.default_rng(seed), {}
    for name in ("train", "val", "synthetic"):
        at = np.sort(rng.permutation(len(patches[name]))[:n])
        pixels[name], patients[name] = patches[name][at], patients[name][at]
    if syn.task == "calcification":
        names = {"grains_real": "train", "grains_synthetic": "synthetic"}
        mm = control["config"]["spacing_mm"] or NATIVE_MM
        control |= {key: grain_table(pixels[name], mm) for key, name in names.items()}
    deep = {name: features(values) for name, values in pixels.items()}
    scaler = StandardScaler().fit(deep["val"])
    deep = {name: scaler.transform(values) for name, values in deep.items()}
    # One patch a patient, as many of each: balls must not be those of a single lesion.
    one = {name: np.unique(who, return_index=True)[1] for name, who in patients.items()}
    few = {name: deep[name][at[: min(map(len, one.values()))]] for name, at in one.items()}
    for prefix, name in (("", "synthetic"), ("floor_", "train")):
        pair = deep["val"], deep[name], patients["val"], patients[name]
        control |= {f"{prefix}linear": detectability(*pair, linear_detector)}
        control |= {f"{prefix}kid": [1000 * v for v in kid(*pair)]}
        control |= {f"{prefix}{key}": v for key, v in alike(few["val"], few[name]).items()}
    pair = (side[name] for side in (pixels, patients) for name in ("train", "synthetic"))
    control["network"] = detectability(*pair, network_detector(device, seed), folds=3)
    control["duplicates"] = duplicates(deep["synthetic"], deep["train"])
    if syn.task == "removal":
        return control, []
    three = (features(patches[name]) for name in ("synthetic", "train", "val"))
    at, distance, control["nearest"] = nearest_training(*three)
    closest = np.argsort(distance, kind="stable")[:3]
    return control, [p for i in closest for p in (syn.combined[i], patches["train"][at[i]])]
