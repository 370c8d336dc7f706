"""§3 Results and t-SNE: AUC, DeLong's test, what holds when patches share a patient, the report.

Scores are p(cancer), labels 1 malignant and 0 not; a cluster is a patient.
"""

import math

import numpy as np
from scipy import special

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


def bootstrap_aucs(y, scores, clusters, draws: int = 2000, seed: int = 0) -> np.ndarray:
    """AUC (draws, K) in test sets made of patients drawn with replacement.

    A draw without patients of one class is NaN.
    """
    y, scores = _checked(y, *scores, clusters=clusters)
    _, at = np.unique(clusters, return_inverse=True)
    patients = at.max() + 1
    counts = np.random.default_rng(seed).multinomial(
        patients, np.full(patients, 1 / patients), size=draws
    )
    aucs = np.empty((draws, len(scores)))
    for k, values in enumerate(scores):
        order = np.argsort(values)
        values, is_positive, patient = values[order], y[order], at[order]
        edges = np.flatnonzero(np.r_[True, values[1:] != values[:-1], True])
        for i in range(0, draws, 100):  # 100 draws at a time bound the memory
            weights = counts[i : i + 100, patient]  # (100, N)
            positive, negative = (
                np.add.reduceat(weights * c, edges[:-1], axis=1)
                for c in (is_positive, ~is_positive)
            )
            below = np.cumsum(negative, axis=1) - negative / 2
            with np.errstate(invalid="ignore"):
                aucs[i : i + 100, k] = (positive * below).sum(axis=1) / (
                    positive.sum(axis=1) * negative.sum(axis=1)
                )
    return aucs


def _mean_auc(y, v, clusters, groups) -> tuple[float, float, float]:
    """Weighted sum of regimes' mean AUCs, its variance and degrees of freedom.

    groups: (weight, rows of v) per regime, the rows being its training seeds. The seeds of a
    regime are what the readers are in a multi-reader study, so the variance is Obuchowski and
    Rockette's (1995) with patient-clustered covariances of the AUCs: for a difference
        s_a^2/K_a + s_b^2/K_b + max(0, cov2_a + cov2_b - 2 cov3),
    s^2 among the seeds of one regime, cov2 between two of its seeds, cov3 across the regimes.
    Degrees of freedom after Satterthwaite with the test-set part taken as known (Hillis 2007).
    A regime with a single seed makes the seeds fixed: then it is Obuchowski 1997 on the means.
    """
    contrast = sum(weight * v[rows].mean(axis=0) for weight, rows in groups)[None]
    value = float(contrast[0, y].mean())
    if min(len(rows) for _, rows in groups) == 1:
        return value, float(clustered_covariance(y, contrast, clusters)[0, 0]), math.inf
    covariance, aucs = clustered_covariance(y, v, clusters), v[:, y].mean(axis=1)
    test, seed_parts = 0.0, []
    for weight, rows in groups:
        k = len(rows)
        seed_parts.append((weight**2 * float(aucs[rows].var(ddof=1)) / k, k - 1))
        for other_weight, others in groups:
            block = covariance[np.ix_(rows, others)]
            same = rows is others
            mean = (block.sum() - np.trace(block)) / (k * (k - 1)) if same else block.mean()
            test += weight * other_weight * float(mean)
    variance = max(0.0, test) + sum(part for part, _ in seed_parts)
    spread = sum(part**2 / df for part, df in seed_parts)
    return value, variance, variance**2 / spread if spread else math.inf


def compare(y, scores, baseline, clusters, level: float = 0.95) -> dict[str, float]:
    """Mean AUC over the seeds of a regime (K, N), alone and against the baseline's (K_b, N).

    low, high and delta_low, delta_high, p_clustered: patients vary, and the training seeds where
    both have several. p_delong: these very models, every patch on its own (the paper's test).
    detectable: the smallest true difference found at 5% with 80% power.
    """
    y, v = _checked(y, *scores, *baseline, clusters=clusters)
    v = placements(y, v)
    ours, theirs = np.arange(len(scores)), np.arange(len(scores), len(v))
    auc, variance, df = _mean_auc(y, v, clusters, [(1, ours)])
    _, low, high = _interval(auc, variance, level, df)
    contrast = v[ours].mean(axis=0, keepdims=True) - v[theirs].mean(axis=0, keepdims=True)
    delta, variance, df = _mean_auc(y, v, clusters, [(1, ours), (-1, theirs)])
    error = math.sqrt(variance)
    half = special.stdtrit(df, (1 + level) / 2) * error
    return {
        "auc": auc,
        "low": low,
        "high": high,
        "delta": delta,
        "delta_low": delta - half,
        "delta_high": delta + half,
        "p_delong": _p_value(delta, float(delong_covariance(y, contrast)[0, 0]))[1],
        "p_clustered": _p_value(delta, variance, df)[1],
        "detectable": (special.stdtrit(df, 0.975) + special.stdtrit(df, 0.8)) * error,
        "df": df,
    }


def holm(p: list[float]) -> list[float]:
    """Holm's step-down correction for the number of tests."""
    p = np.asarray(p, dtype=float)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(adjusted, 1).tolist()
