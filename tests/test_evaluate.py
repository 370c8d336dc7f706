"""§3 Results: the statistics against hand-worked numbers, definitions, R, and simulation."""

import functools
import itertools
import json
import math
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, spatial, stats

import data
import evaluate
import models
import train
from support import (
    controls,
    figures,
    files,
    gain,
    patchset,
    phantom,
    provenance,
    report,
    runs,
    sources,
    subgroups,
)

Y = [1] * 5 + [0] * 6
S1 = [0.9, 0.8, 0.7, 0.55, 0.3, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
S2 = [0.6, 0.9, 0.4, 0.5, 0.35, 0.7, 0.5, 0.45, 0.2, 0.65, 0.1]


def with_ties(seed: int, n: int = 120) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels and two correlated scores with many ties (RandomState's stream is frozen)."""
    rs = np.random.RandomState(seed)
    y = (rs.rand(n) < 0.2 + 0.06 * seed).astype(int)
    shared = rs.randn(n)
    a = np.round(shared + 0.2 * seed * y, 1)
    b = np.round(0.7 * shared + 0.7 * rs.randn(n) + 0.9 * y, seed % 3)
    return y, a, b


def direct_placements(y, scores):
    """DeLong 1988 as printed: a double loop over positives and negatives."""
    y, s = np.asarray(y, bool), np.asarray(scores, float)
    psi = [[(x > z) + 0.5 * (x == z) for z in s[~y]] for x in s[y]]
    return np.mean(psi, axis=1), np.mean(psi, axis=0)


def direct_delong(y, a, b):
    v10, v01 = zip(direct_placements(y, a), direct_placements(y, b), strict=True)
    c = np.cov(v10) / len(v10[0]) + np.cov(v01) / len(v01[0])
    z = (np.mean(v10[0]) - np.mean(v10[1])) / math.sqrt(c[0, 0] + c[1, 1] - 2 * c[0, 1])
    return np.mean(v10[0]), np.mean(v10[1]), z, math.erfc(abs(z) / math.sqrt(2)), c


def direct_clustered(y, scores_a, scores_b, clusters):
    """Obuchowski 1997 as printed: loops over the patients, variance of a - b."""
    y, clusters = np.asarray(y, bool), np.asarray(clusters)
    v = [direct_placements(y, s) for s in (scores_a, scores_b)]
    theta = [np.mean(v10) for v10, _ in v]
    names = sorted(set(clusters.tolist()))
    big_m, big_n, total = y.sum(), (~y).sum(), len(names)
    i10, i01 = len(set(clusters[y].tolist())), len(set(clusters[~y].tolist()))

    def covariance(r, t):
        s10 = s01 = s11 = 0.0
        for name in names:
            pos, neg = clusters[y] == name, clusters[~y] == name
            dr10, dt10 = (v[k][0][pos].sum() - pos.sum() * theta[k] for k in (r, t))
            dr01, dt01 = (v[k][1][neg].sum() - neg.sum() * theta[k] for k in (r, t))
            s10 += dr10 * dt10
            s01 += dr01 * dt01
            s11 += dr10 * dt01 + dt10 * dr01
        s10 *= i10 / ((i10 - 1) * big_m)
        s01 *= i01 / ((i01 - 1) * big_n)
        s11 *= total / (total - 1)
        return s10 / big_m + s01 / big_n + s11 / (big_m * big_n)

    return covariance(0, 0), covariance(0, 0) + covariance(1, 1) - 2 * covariance(0, 1)


def patients(rng, number=60, most=8, mixed=True):
    """Cluster of each patch (1 to `most` a patient) and labels, mixed within patients or not."""
    clusters = np.repeat(np.arange(number), rng.integers(1, most + 1, number))
    return clusters, (rng.random(len(clusters)) < 0.4) if mixed else clusters % 2 == 0


def correlated_scores(rng, y, clusters, icc, models=2, effect=1.2):
    """Scores of models of equal AUC, correlated with each other and within patients."""
    per_patient, per_patch = rng.normal(size=(2, models + 1, len(y)))
    per_patient = 0.8 * per_patient[0] + 0.6 * per_patient[1:]
    per_patch = 0.8 * per_patch[0] + 0.6 * per_patch[1:]
    return effect * y + icc**0.5 * per_patient[:, clusters] + (1 - icc) ** 0.5 * per_patch


# --- AUC and DeLong ---


def test_E4_delong_first_worked_example():
    auc_a, auc_b, z, p = evaluate.delong_test(Y, S1, S2)
    assert (auc_a, auc_b) == pytest.approx((0.85, 17.5 / 30), abs=1e-12)
    assert z == pytest.approx(1.5248471879, abs=1e-10)
    assert p == pytest.approx(0.1272972170, abs=1e-10)
    y = np.array(Y, bool)
    v = evaluate.placements(y, np.array([S1, S2]))
    np.testing.assert_allclose(
        v[:, y] * 6, [[6, 6, 6, 5, 2.5], [4, 6, 2, 3.5, 2]], rtol=0, atol=1e-12
    )
    np.testing.assert_allclose(
        v[:, ~y] * 5, [[3, 4, 4, 4.5, 5, 5], [1, 2.5, 3, 5, 1, 5]], rtol=0, atol=1e-12
    )
    np.testing.assert_allclose(
        evaluate.delong_covariance(y, v),
        [[0.0166111111, 0.0114583333], [0.0114583333, 0.0368888889]],
        rtol=0,
        atol=1e-10,
    )


def test_E4_delong_second_worked_example():
    rs, y = np.random.RandomState(0), np.array([1] * 80 + [0] * 120)
    base = rs.randn(200)
    a, b = np.round(base + y, 2), np.round(0.8 * base + 0.6 * rs.randn(200) + 1.4 * y, 2)
    auc_a, auc_b, z, p = evaluate.delong_test(y, a, b)
    assert (auc_a, auc_b) == pytest.approx((0.7115104167, 0.7989583333), abs=1e-10)
    assert z == pytest.approx(-4.1380886087, abs=1e-10)
    assert p == pytest.approx(3.5021112827e-5, rel=1e-10)
    covariance = evaluate.delong_covariance(
        y == 1, evaluate.placements(y == 1, np.array([a, b], dtype=float))
    )
    np.testing.assert_allclose(
        covariance, [[1.3217827e-3, 9.103776e-4], [9.103776e-4, 9.455526e-4]], rtol=0, atol=1e-9
    )


# The reference values: pROC 1.18.0 under R 4.2.2 (Debian's r-cran-proc), made with
#   python tests/test_evaluate.py > sets.csv && Rscript -e 'library(pROC); options(digits=15);
#     for (d in split(read.csv("sets.csv"), ~set)) { r <- lapply(d[c("a", "b")], function(s)
#     roc(d$y, s, levels=c(0, 1), direction="<")); cat(roc.test(r$a, r$b, method="delong",
#     paired=TRUE)$p.value, ci.auc(r$a, method="delong")[c(2, 1, 3)], "\n", sep=", ") }'
PROC = [
    (2.82994366193473e-07, 0.449052631578947, 0.325709021429316, 0.572396241728578),
    (0.000458184410932912, 0.573508522727273, 0.45372805391108, 0.693288991543465),
    (0.0173098952570918, 0.639831932773109, 0.530080344902425, 0.749583520643793),
    (0.223231741422598, 0.633780238997377, 0.532669173054657, 0.734891304940097),
    (0.150231402330025, 0.670714285714286, 0.573617284430589, 0.767811286997982),
    (0.418981860172468, 0.776187829952765, 0.69419291121056, 0.858182748694969),
    (0.100615898689206, 0.809722222222222, 0.73067318105202, 0.888771263392424),
    (0.00202612875435022, 0.856, 0.787549000910661, 0.924450999089339),
    (0.000546892842601331, 0.866335044929397, 0.798987108143511, 0.933682981715282),
    (3.28471155536377e-09, 0.8657905217045, 0.788884134631203, 0.942696908777797),
]


@pytest.mark.parametrize("seed", range(10))
def test_E4_delong_agrees_with_pROC(seed):
    y, a, b = with_ties(seed)
    assert len(np.unique(a)) < len(a) / 2  # ties, and many
    p, auc, low, high = PROC[seed]
    assert evaluate.delong_test(y, a, b)[3] == pytest.approx(p, abs=1e-9, rel=1e-9)
    assert evaluate.auc_ci(y, a) == pytest.approx((auc, low, high), abs=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_E4_fast_form_equals_the_direct_definition(seed):
    y, a, b = with_ties(seed)
    *direct, covariance = direct_delong(y, a, b)
    assert evaluate.delong_test(y, a, b) == pytest.approx(direct, abs=1e-10)
    v = evaluate.placements(y == 1, np.array([a, b]))
    np.testing.assert_allclose(evaluate.delong_covariance(y == 1, v), covariance, atol=1e-12)


def test_E4_many_classifiers_at_once_equal_pairs():
    rng = np.random.default_rng(5)
    y = rng.random(300) < 0.3
    scores = np.round(rng.normal(size=(6, 300)) + y, 1)
    covariance = evaluate.delong_covariance(y, evaluate.placements(y, scores))
    for i in range(5):
        z = evaluate.delong_test(y, scores[i], scores[i + 1])[2]
        auc = [evaluate.auc_ci(y, s)[0] for s in scores[i : i + 2]]
        pair = covariance[i : i + 2, i : i + 2]
        assert z == pytest.approx((auc[0] - auc[1]) / math.sqrt([1, -1] @ pair @ [1, -1]))


def test_E4_invariances():
    y, a, b = with_ties(4)
    auc_a, auc_b, z, p = evaluate.delong_test(y, a, b)
    assert evaluate.delong_test(y, np.exp(a / 2), b**3) == (auc_a, auc_b, z, p)
    assert evaluate.delong_test(y, b, a) == pytest.approx((auc_b, auc_a, -z, p), abs=1e-15)
    assert evaluate.delong_test(1 - y, -a, -b)[3] == pytest.approx(p, abs=1e-12)
    shuffled = np.random.default_rng(0).permutation(len(y))
    assert evaluate.delong_test(y[shuffled], a[shuffled], b[shuffled])[3] == pytest.approx(p)
    assert evaluate.delong_test(y == 1, a, b) == (auc_a, auc_b, z, p)


def test_E4_identical_scores_give_p_one():
    y, a, _ = with_ties(2)
    for same in (a, 2 * a + 1):
        assert evaluate.delong_test(y, a, same)[2:] == (0.0, 1.0)
        assert evaluate.clustered_test(y, a, same, np.arange(len(y)) // 3)[2:] == (0, 0, 0, 1)
    assert evaluate.delong_test(y, y, 2 * y)[3] == 1.0  # both perfect
    assert evaluate.delong_test(y, y, -y)[2:] == (math.inf, 0.0)  # perfect against inverted
    assert evaluate.auc_ci(y, np.zeros(len(y))) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("y", "scores", "message"),
    [
        ([1] * 6, range(6), "6 positive and 0 negative"),
        ([0] * 5 + [1], range(6), "1 positive"),
        ([], [], "0 positive and 0 negative"),
        ([0, 1, 2, 1, 0, 1], range(6), "expected one 0 or 1"),
        ([0, 1, math.nan, 1, 0, 1], range(6), "expected one 0 or 1"),
        ([-1, 1, -1, 1, -1, 1], range(6), "expected one 0 or 1"),
        ([0, 1, 0, 1, 0, 1], [0.1, math.nan, 0.2, 0.3, 0.1, 0.1], "NaN; expected"),
        ([0, 1, 0, 1, 0, 1], range(5), r"scores \[\(5,\)"),
        ([0, 1, 0, 1, 0, 1], np.ones((6, 1)), r"scores \[\(6, 1\)"),
    ],
)
def test_unusable_input_is_a_clear_error(y, scores, message):
    scores = np.asarray(scores, dtype=float)
    with pytest.raises(ValueError, match=message):
        evaluate.auc_ci(y, scores)
    with pytest.raises(ValueError, match=message):
        evaluate.delong_test(y, scores, scores)
    with pytest.raises(ValueError, match=message):
        evaluate.clustered_test(y, scores, scores, np.arange(len(y)))


def test_clusters_must_fit_and_be_several():
    with pytest.raises(ValueError, match="clusters: found shape"):
        evaluate.clustered_test(Y, S1, S2, range(3))
    with pytest.raises(ValueError, match="found 1 patients with positive"):
        evaluate.clustered_ci(Y, S1, [0] * 5 + list(range(6)))


# --- Patients ---


@pytest.mark.parametrize("seed", range(5))
def test_obuchowski_equals_the_direct_definition(seed):
    rng = np.random.default_rng(seed)
    clusters, y = patients(rng, mixed=seed % 2 == 0)
    a, b = np.round(correlated_scores(rng, y, clusters, 0.5), 1)
    variance_a, variance = direct_clustered(y, a, b, clusters)
    half = 1.959963984540054 * math.sqrt(variance)
    auc_a, auc_b, difference, low, high, p = evaluate.clustered_test(y, a, b, clusters)
    assert difference == pytest.approx(auc_a - auc_b, abs=1e-12)
    assert (low, high) == pytest.approx((difference - half, difference + half), abs=1e-10)
    assert p == pytest.approx(math.erfc(abs(difference) / math.sqrt(2 * variance)), abs=1e-10)
    auc, low, high = evaluate.clustered_ci(y, a, clusters)
    half = 1.959963984540054 * math.sqrt(variance_a)
    assert (auc, low, high) == pytest.approx((auc_a, auc_a - half, auc_a + half), abs=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_obuchowski_with_one_patch_a_patient_is_delong(seed):
    """The finite-sample factors I/(I-1) per class are then DeLong's m/(m-1) and n/(n-1)."""
    y, a, b = with_ties(seed + 3)
    names = [f"P{i:04d}" for i in range(len(y))]
    _, _, difference, low, high, p = evaluate.clustered_test(y, a, b, names)
    _, _, z, p_delong = evaluate.delong_test(y, a, b)
    assert p == pytest.approx(p_delong, rel=1e-10)
    assert (high - low) / 2 == pytest.approx(1.959963984540054 * difference / z, rel=1e-10)
    assert evaluate.clustered_ci(y, a, names) == pytest.approx(evaluate.auc_ci(y, a), abs=1e-12)


def test_patients_named_otherwise_or_in_another_order_change_nothing():
    rng = np.random.default_rng(1)
    clusters, y = patients(rng)
    a, b = correlated_scores(rng, y, clusters, 0.5)
    expected = evaluate.clustered_test(y, a, b, clusters)
    order = rng.permutation(len(y))
    names = np.array([f"patient {9999 - c}" for c in clusters])
    found = evaluate.clustered_test(y[order], a[order], b[order], names[order])
    assert found == pytest.approx(expected, abs=1e-12)


def test_copies_of_patches_do_not_make_evidence():
    """Every patch twice: DeLong's p falls, the clustered test does not notice."""
    rng = np.random.default_rng(3)
    clusters, y = patients(rng)
    a, b = correlated_scores(rng, y, clusters, 0.5) + [[0.0], [0.3]] * y
    once = evaluate.clustered_test(y, a, b, clusters)
    twice = evaluate.clustered_test(*(np.tile(v, 2) for v in (y, a, b, clusters)))
    assert twice == pytest.approx(once, abs=1e-12)
    delong_once = evaluate.delong_test(y, a, b)[3]
    assert evaluate.delong_test(*(np.tile(v, 2) for v in (y, a, b)))[3] < delong_once


@pytest.mark.parametrize("icc", [0, 0.5, 0.7])
def test_size_of_the_clustered_test_is_nominal(icc):
    """4,000 test sets of 150 patients with 1 to 8 patches under the null hypothesis."""
    rng = np.random.default_rng(7)
    rejected = np.zeros(2)
    for _ in range(4000):
        clusters, y = patients(rng, number=150, mixed=False)
        scores = correlated_scores(rng, y, clusters, icc)
        rejected += [
            evaluate.delong_test(y, *scores)[3] < 0.05,
            evaluate.clustered_test(y, *scores, clusters)[5] < 0.05,
        ]
    delong, clustered = rejected / 4000
    print(f"ICC {icc}: DeLong rejects {delong:.2%}, clustered {clustered:.2%}")
    assert 0.035 <= clustered <= 0.065
    assert delong > 0.15 if icc else 0.035 <= delong <= 0.065


# --- Seeds, several tests, power ---


def test_one_seed_is_the_clustered_test():
    rng = np.random.default_rng(6)
    clusters, y = patients(rng)
    a, b = correlated_scores(rng, y, clusters, 0.5)
    found = evaluate.compare(y, [a], [b], clusters)
    assert [found[k] for k in ("auc", "low", "high")] == pytest.approx(
        evaluate.clustered_ci(y, a, clusters), abs=1e-12
    )
    assert found["p_delong"] == pytest.approx(evaluate.delong_test(y, a, b)[3], abs=1e-12)


def test_the_baseline_against_itself_is_no_difference():
    rng = np.random.default_rng(6)
    clusters, y = patients(rng)
    scores = correlated_scores(rng, y, clusters, 0.5, models=3)
    found = evaluate.compare(y, scores[:1], scores[:1], clusters)
    assert (found["delta"], found["p_delong"], found["p_clustered"]) == (0, 1, 1)
    found = evaluate.compare(y, scores, scores, clusters)
    assert found["delta"] == 0 and found["p_clustered"] == 1


def seeds_of_a_regime(rng, y, clusters, shared, spread, k=3):
    """Scores of k training seeds whose true AUC varies about the regime's with `spread`."""
    effect = 1.2 + spread * rng.normal(size=(k, 1))
    own = rng.normal(size=(k, clusters.max() + 1))[:, clusters]
    return effect * y + shared + 0.4 * own + 0.5 * rng.normal(size=(k, len(y)))


def test_interval_of_one_regime_borrows_how_seeds_vary():
    """Two seeds each: by hand, one degree of freedom more and the pooled variance."""
    rng = np.random.default_rng(12)
    clusters, y = patients(rng, number=80, mixed=False)
    shared = rng.normal(size=len(y))
    a, b = (seeds_of_a_regime(rng, y, clusters, shared, spread=0.2, k=2) for _ in range(2))
    found, alone = evaluate.compare(y, a, b, clusters), evaluate.compare(y, a, a, clusters)
    v = evaluate.placements(y, np.concatenate([a, b]))
    aucs, c = v[:, y].mean(axis=1), evaluate.clustered_covariance(y, v, clusters)
    pooled = (aucs[:2].var(ddof=1) + aucs[2:].var(ddof=1)) / 2
    variance = c[0, 1] + pooled / 2
    half = stats.t.ppf(0.975, 2 * (variance / (pooled / 2)) ** 2) * math.sqrt(variance)
    expected = [aucs[:2].mean() + sign * half for sign in (0, -1, 1)]
    assert [found[k] for k in ("auc", "low", "high")] == pytest.approx(expected)
    variance = c[0, 1] + aucs[:2].var(ddof=1) / 2
    df = (variance / (aucs[:2].var(ddof=1) / 2)) ** 2
    half = stats.t.ppf(0.975, df) * math.sqrt(variance)
    assert alone["low"] == pytest.approx(max(0, aucs[:2].mean() - half))


@pytest.mark.parametrize(("number", "mixed"), [(80, False), (130, True)])
def test_interval_over_seeds_covers_patients_and_seeds(number, mixed):
    """Size of the three-seed comparison, and of those that ignore that seeds or patients vary.

    130 patients with patches of both classes are what CBIS-DDSM's test set looks like.
    """
    rng = np.random.default_rng(8)
    rejected = np.zeros(3)
    for _ in range(2000):
        clusters, y = patients(rng, number=number, mixed=mixed)
        shared = rng.normal(size=clusters.max() + 1)[clusters] * 0.6 + 0.4 * rng.normal(size=len(y))
        a, b = (seeds_of_a_regime(rng, y, clusters, shared, spread=0.15) for _ in range(2))
        both = evaluate.compare(y, a, b, clusters)
        v = evaluate.placements(y, np.concatenate([a, b]))
        d = v[:3].mean(axis=0, keepdims=True) - v[3:].mean(axis=0, keepdims=True)
        z = both["delta"] / math.sqrt(evaluate.clustered_covariance(y, d, clusters)[0, 0])
        rejected += [abs(z) > 1.96, both["p_clustered"] < 0.05, both["p_delong"] < 0.05]
    fixed, both, delong = rejected / 2000
    print(f"seeds as fixed rejects {fixed:.2%}, Obuchowski-Rockette {both:.2%}, {delong:.2%}")
    assert 0.025 <= both <= 0.065
    assert fixed > 0.08 and delong > 0.15


def test_holm_by_hand():
    assert evaluate.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert evaluate.holm([0.5, 0.9]) == [1.0, 1.0]
    assert evaluate.holm([0.02]) == [0.02]
    # Table 1 of the paper (Q37): only 50% and 100% stand
    adjusted = evaluate.holm([0.10, 0.055, 1e-4, 0.72, 1e-8])
    assert adjusted == pytest.approx([0.2, 0.165, 4e-4, 0.72, 5e-8])


def test_detectable_difference_is_found_with_80_percent_power():
    """A true difference of that size, drawn 1,500 times, is significant about 80% of the time."""
    rng = np.random.default_rng(10)
    clusters, y = patients(rng, number=150, mixed=False)
    sizes, found = [], 0
    for _ in range(1500):
        a, b = correlated_scores(rng, y, clusters, 0.5)
        sizes.append(evaluate.compare(y, [a], [b], clusters)["detectable"])
    goal = float(np.mean(sizes))
    effects, base = np.arange(0.6, 3, 0.001), 0.5 * math.erfc(-1.2 / 2)  # AUC of the normal model
    aucs = np.array([0.5 * math.erfc(-e / 2) for e in effects])
    more, less = (effects[np.argmin(abs(aucs - base - d))] - 1.2 for d in (goal / 2, -goal / 2))
    for _ in range(1500):
        a, b = correlated_scores(rng, y, clusters, 0.5)
        found += evaluate.clustered_test(y, a + more * y, b + less * y, clusters)[5] < 0.05
    assert found / 1500 == pytest.approx(0.8, abs=0.05)


# --- Folds of a cross-validation ---


def cross_validated(rng, k=3, number=150, effect=0.0, spread=0.15, shared=0.0, n=5, mixed=False):
    """Labels, scores (k, N) of two regimes, patients and folds (N,) of one whole experiment.

    Patches of a patient are alike to every model, and to each model in its own way; patients are
    harder in some folds; all models of all folds, which share training patients, are better or
    worse together. The AUC of a seed in a fold varies with `spread`; the first regime's scores are
    better by `effect`, and each regime's are in all its folds by `shared` (times a normal number):
    luck with the training set.
    """
    clusters, y = patients(rng, number, most=6, mixed=mixed)
    fold = clusters // 2 % n
    common = 1.2 + 0.2 * rng.normal() + 0.2 * rng.normal(size=n)[fold]
    common = common * y + 0.6 * rng.normal(size=number)[clusters] + 0.4 * rng.normal(size=len(y))
    scores = []
    for better in (effect, 0.0):
        strength = better + shared * rng.normal() + spread * rng.normal(size=(k, n))
        own = 0.4 * rng.normal(size=(k, number))[:, clusters] + 0.5 * rng.normal(size=(k, len(y)))
        scores.append(common + strength[:, fold] * y + own)
    return y, *scores, clusters, fold


def simulate(repeats: int, seed: int, **more) -> dict[str, np.ndarray]:
    """What `compare` finds, of each of so many experiments."""
    rng = np.random.default_rng(seed)
    found = [evaluate.compare(*cross_validated(rng, **more)) for _ in range(repeats)]
    return {key: np.array([row[key] for row in found]) for key in found[0]}


@pytest.mark.parametrize(
    "more",
    [{"k": 1, "spread": 0}, {}, {"number": 300, "mixed": True}],
    ids=["one seed", "three seeds", "patients with both classes"],
)
def test_size_of_the_test_over_folds_is_nominal(more):
    """Five folds under the null hypothesis; about 6 s a case."""
    found = simulate(1500, 20, **more)
    rejected, delong = (np.mean(found[key] < 0.05) for key in ("p_clustered", "p_delong"))
    print(f"{more}: clustered over folds rejects {rejected:.2%}, DeLong {delong:.2%}")
    assert 0.035 <= rejected <= 0.065 and delong > 0.1


def test_power_over_folds_is_80_percent_at_the_detectable_difference():
    """About 8 s."""
    goal = simulate(300, 21)["detectable"].mean()
    slope = simulate(300, 22, effect=0.2)["delta"].mean() / 0.2
    found = simulate(1000, 23, effect=goal / slope)
    power = np.mean(found["p_clustered"] < 0.05)
    print(f"at {found['delta'].mean():.4f}, detectable {goal:.4f}: found in {power:.1%}")
    assert found["delta"].mean() == pytest.approx(goal, rel=0.05)
    assert power == pytest.approx(0.8, abs=0.05)


def test_the_test_over_folds_is_about_these_training_sets():
    """The limit that docstring and report name: luck with training patients that folds share."""
    rejected = np.mean(simulate(400, 24, shared=0.15)["p_clustered"] < 0.05)
    print(f"training sets differ in luck: {rejected:.1%}")
    assert rejected > 0.2


def test_a_mean_over_folds_and_its_variance_by_hand():
    """One seed: mean of the folds' differences, variances of `clustered_test` over F squared."""
    y, a, b, clusters, fold = cross_validated(np.random.default_rng(25), k=1, n=3)
    found = evaluate.compare(y, a, b, clusters, fold)
    parts = [fold == f for f in range(3)]
    single = [evaluate.clustered_test(y[f], a[0, f], b[0, f], clusters[f]) for f in parts]
    differences = [part[2] for part in single]
    half = math.sqrt(sum(((part[4] - part[3]) / 2) ** 2 for part in single)) / 3
    assert found["delta"] == pytest.approx(np.mean(differences))
    assert found["delta_high"] - found["delta"] == pytest.approx(half)
    assert found["auc"] == pytest.approx(np.mean([part[0] for part in single]))
    assert found["detectable"] == pytest.approx(half * (1.959964 + 0.841621) / 1.959964)


def test_seeds_over_folds_are_pooled_as_written():
    """Two seeds, two folds: Obuchowski and Rockette by hand from each fold's covariance."""
    y, a, b, clusters, fold = cross_validated(np.random.default_rng(26), k=2, n=2)
    found, test, squares, deltas = evaluate.compare(y, a, b, clusters, fold), 0.0, 0.0, []
    for f in (fold == 0, fold == 1):
        v = evaluate.placements(y[f], np.concatenate([a, b])[:, f])
        aucs, c = v[:, y[f]].mean(axis=1), evaluate.clustered_covariance(y[f], v, clusters[f])
        test += c[0, 1] + c[2, 3] - 2 * c[:2, 2:].mean()
        squares += aucs[:2].var(ddof=1) + aucs[2:].var(ddof=1)
        deltas.append(aucs[:2].mean() - aucs[2:].mean())
    seeds = squares / 4 * (1 / 2 + 1 / 2) / 2  # four seed variances; over two folds
    variance = max(0, test) / 4 + seeds
    half = stats.t.ppf(0.975, 4 * (variance / seeds) ** 2) * math.sqrt(variance)
    assert found["delta"] == pytest.approx(np.mean(deltas))
    assert found["delta_high"] - found["delta_low"] == pytest.approx(2 * half)


def test_models_of_different_folds_are_never_ranked_together():
    y, a, b, clusters, fold = cross_validated(np.random.default_rng(27))
    shifted = [scores + 10.0 * fold for scores in (a, b)]
    found = evaluate.compare(y, *shifted, clusters, fold)
    assert found == pytest.approx(evaluate.compare(y, a, b, clusters, fold))
    assert evaluate.compare(y, *shifted, clusters)["auc"] < found["auc"] - 0.05


def test_a_condition_that_a_fold_cannot_give_is_not_computed():
    y, a, b, clusters, fold = cross_validated(np.random.default_rng(28))
    kind = np.where(y, "malignant_mass", "normal")
    scores = {"Baseline": b, "50% w/ decay": a}
    table = evaluate.condition_table(kind, clusters, scores, evaluate.MAIN, fold)
    row = table["rows"][1]
    assert row["auc"] == pytest.approx(np.mean(row["fold_aucs"]))
    assert row["auc"] == pytest.approx(np.mean(row["seed_aucs"]))
    assert len(row["fold_aucs"]) == 5 and len(row["seed_aucs"]) == 3
    kind[(fold == 2) & y] = "benign_mass"
    assert evaluate.condition_table(kind, clusters, scores, evaluate.MAIN, fold) == {}


# --- The whole evaluation, on made-up patches and networks ---

SIDE = 32


def write_data(folder: Path, counts: dict[str, int], patients=12, prefix="", **config) -> Path:
    """A patch set: soft tissue, with a bright lump in every lesion patch."""
    rng, index = np.random.default_rng(0), {}
    names = {s: [f"{prefix}{s}-{i:02d}" for i in range(patients)] for s in sources.SPLITS}
    for key, n in counts.items():
        split, kind = key.split("/")
        (folder / "patches" / split).mkdir(parents=True, exist_ok=True)
        patch = 0.2 * ndimage.gaussian_filter(rng.normal(size=(n, SIDE, SIDE)), (0, 3, 3)) * 6
        if kind != "normal":
            lump = np.exp(-(((np.indices((SIDE, SIDE)) - 16) / 6) ** 2).sum(axis=0))
            patch += rng.uniform(0.1, 0.7, (n, 1, 1)) * lump
        np.save(folder / "patches" / f"{key}.npy", data.to_uint16(patch))
        who = rng.integers(patients, size=n)
        index[key] = [
            (i, f"{prefix}{split}{w}-{i % 2}", names[split][w], 100, 100, 132, 132, "1.000000")
            for i, w in enumerate(who)
        ]
        columns = ("patch", "image_uid", "patient_id", *sources.BOX, "scale")
        files.write_table(folder / "patches" / f"{key}.csv", columns, index[key])
    rows = [(name, split) for split, members in names.items() for name in members]
    files.write_table(folder / "splits.csv", ("patient_id", "split"), rows)
    write_tables(folder, index)
    config = {"patch_size": SIDE, "spacing_mm": 0.33, "seed": 0} | config
    facts = {"command": "prepare", "config": config, "counts": counts, "complete": True}
    files.write_json(folder / "config.json", facts)
    return folder


def write_tables(folder: Path, index: dict[str, list]) -> None:
    """manifest.csv: two views a patient, density by the patient's number, a box of 5 px a number,
    10 at least, for each image that gave lesion patches; excluded.csv."""
    findings, told = [], {"image_uid": [], "patient_pathology": []}
    kinds = {(k.split("/")[1], *row[1:3]) for k, rows in index.items() for row in rows}
    for kind, uid, who in sorted(kinds):
        pathology, _, finding = kind.partition("_")
        box = (100, 100, 100 + max(10, 5 * int(who[-2:])), 110) if finding else None
        about = f"{uid}.dcm", who, "L", ("CC", "MLO")[uid[-1] == "1"], finding, pathology, box
        findings.append(sources.Finding(*about, density="abcd"[int(who[-2:]) % 4]))
        told["image_uid"].append(uid)
        told["patient_pathology"].append("malignant" if int(who[-2:]) % 2 else "benign")
    sources.write_manifest(folder / "manifest.csv", findings, **told)
    rows = [(f"x{k}.dcm", f"x{k}.dcm: Rows is {k}; expected 'more'") for k in range(3)]
    files.write_table(folder / "excluded.csv", ("image_path", "reason"), rows)


def write_set(folder: Path, patches: Path, task: str, control: str = "", n: int = 40) -> Path:
    """A synthetic set: a lump added to (or, for removal, taken from) training patches."""
    folder.mkdir()
    kind = "malignant_mass" if task == "removal" else "normal"
    source = np.load(patches / "patches" / "train" / f"{kind}.npy")[:n].astype(np.int32)
    columns = ("image_uid", "patient_id")
    who = files.read_table(patches / "patches" / "train" / f"{kind}.csv", columns)
    lump = np.exp(-(((np.indices((SIDE, SIDE)) - 15) / 5) ** 2).sum(axis=0)) * 9000
    combined = np.clip(source + (-1 if task == "removal" else 1) * lump, 0, 65535)
    arrays = {"input": source.astype(np.uint16), "combined": combined.astype(np.uint16)}
    arrays["lesion"] = arrays["combined"].astype(np.int32) - source
    arrays["mask"] = np.broadcast_to(lump > 5000, source.shape)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    origin = zip(*(who[c][:n] for c in columns), strict=True)
    rows = [(i, i, *both, i, 80, 9, 9, 20, 20) for i, both in enumerate(origin)]
    files.write_table(folder / "index.csv", patchset.SYNTHETIC_COLUMNS, rows)
    config = {"task": task, "control": control, "patch_size": SIDE, "n": n, "generator": "g" * 64}
    config |= {"data": patchset.fingerprint(patches), "seed": 0, "spacing_mm": 0.33}
    facts = {"command": "synthesize", "config": config, "complete": True, "short": False}
    facts |= {"attempts": 3 * n, "acceptance": 1 / 3, "area_median": 0.12, "strength": 0.2}
    gan = {"task": task, "seed": 7, "g_lr": 0.00012, "data": config["data"]}
    gan |= {"images": ["unshown"], "patients": ["unshown"]}
    facts |= {"warnings": [], "gan": gan}
    files.write_json(folder / "config.json", facts)
    for name, value in (("figure1", 60), ("gan", 200)):
        Image.new("L", (8, 8), value).save(folder / f"{name}.png")
    return folder


def write_run(folder: Path, patches: Path, proportion: float, sets=(), seed: int = 0) -> Path:
    """A classifier run with random, but scaled, weights."""
    folder.mkdir(parents=True)
    torch.manual_seed(1000 * seed + int(100 * proportion) + len(sets))
    model = models.SmallResNet(16)
    x = torch.from_numpy(data.to_float(np.load(patches / "patches/train/malignant_mass.npy")[:20]))
    z = torch.from_numpy(data.to_float(np.load(patches / "patches/train/normal.npy")[:20]))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(8 + seed + int(10 * proportion)):
        logits = model(torch.cat([x, z])[:, None])
        y = torch.arange(len(logits)).lt(len(x)).long()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, y).backward()
        optimizer.step()
    model.fc.bias.data += torch.tensor([0.0, float(len(sets))])  # so that some patches rise
    config = {
        "width": 16,
        "network": "small",
        "augment": "",
        "decay": 0.9,
        "proportion": proportion,
    }
    config |= {"seed": seed, "data": patchset.fingerprint(patches)}
    config["synthetic"] = [
        {"fingerprint": s.fingerprint, "task": s.task, "control": s.control}
        for s in map(patchset.open_synthetic, sets)
    ]
    facts = {"command": "train-cls", "config": config, "complete": True}
    files.write_json(folder / "config.json", facts)
    state = {"format": runs.CHECKPOINT_FORMAT, "best": {"weights": model.state_dict()}}
    torch.save(state, folder / "checkpoint.pt")
    return folder


COUNTS = {"train/normal": 60, "train/malignant_mass": 60, "train/malignant_calcification": 40} | {
    f"{split}/{kind}": 40
    for split in ("val", "test")
    for kind in ("normal", "malignant_mass", "malignant_calcification", "benign_mass")
}


def fake_world(folder: Path, seeds: int = 2) -> dict:
    """Arguments of evaluate(): a patch set, a baseline, two regimes, a blob control, four sets."""
    patches = write_data(folder / "data", COUNTS)
    sets = [
        write_set(folder / f"{task}{control}", patches, task, control)
        for task, control in (
            ("mass", ""),
            ("calcification", ""),
            ("removal", ""),
            ("mass", "blob"),
        )
    ]
    regimes = {"baseline": (0.5, ()), "aug-50": (0.5, sets[:3]), "aug-100": (1.0, sets[:3])}
    for name, (p, used) in (regimes | {"blob": (0.5, sets[3:])}).items():
        for k in range(seeds):
            write_run(folder / name / f"seed-{k}", patches, p, used, k)
    return {
        "patch_set": patches,
        "baseline": folder / "baseline",
        "augmented": [folder / name for name in ("blob", "aug-100", "aug-50")],
        "synthetic": sets,
    }


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """One whole evaluation, its arguments and its folder."""
    root = tmp_path_factory.mktemp("evaluate")
    world = fake_world(root)
    with pytest.MonkeyPatch.context() as patch:
        quick = functools.partial(controls.network_detector, steps=3)
        patch.setattr(controls, "network_detector", quick)
        rows = report.evaluate(**world, out=root / "out")
        again = report.evaluate(**world, out=root / "again")
        assert rows == again
    return world, root / "out", rows


def test_E1_table_has_the_papers_rows_and_columns(evaluated):
    _, out, rows = evaluated
    header, *lines = (out / "table1.csv").read_text().splitlines()
    assert header == (
        "regime,proportion,seeds,patients,patches,auc,low,high,delta,delta_low,delta_high,"
        "p_delong,p_clustered,detectable"
    )
    names = ["Baseline", "50% w/ decay", "100% w/ decay", "Blob control"]
    assert [line.split(",")[0] for line in lines] == names == [row["regime"] for row in rows]
    assert [row["proportion"] for row in rows] == [0, 0.5, 1, 0.5]
    assert all(row["seeds"] == 2 and row["patches"] == 120 for row in rows)
    assert rows[0]["delta"] is None and rows[1]["delta"] == pytest.approx(
        rows[1]["auc"] - rows[0]["auc"]
    )


def test_table_is_what_the_models_score(evaluated):
    """The row of a regime from its checkpoints, by the public functions alone."""
    world, _, rows = evaluated
    kinds = ("normal", "malignant_mass", "malignant_calcification")
    folder = world["patch_set"] / "patches" / "test"
    patches = np.concatenate([np.load(folder / f"{k}.npy") for k in kinds])
    who = [files.read_table(folder / f"{k}.csv", ("patient_id",))["patient_id"] for k in kinds]
    y = np.arange(len(patches)) >= len(who[0])
    scores = {}
    for name in ("baseline", "aug-50"):
        runs = [world["baseline"].parent / name / f"seed-{k}" for k in range(2)]
        loaded = [train.load_classifier(run, torch.device("cpu"))[0] for run in runs]
        cpu = torch.device("cpu")
        scores[name] = np.array([train.classifier_scores(m, patches, cpu) for m in loaded])
    aucs = [evaluate.auc_ci(y, s)[0] for s in scores["aug-50"]]
    assert rows[1]["auc"] == pytest.approx(np.mean(aucs))
    found = evaluate.compare(y, scores["aug-50"], scores["baseline"], np.concatenate(who))
    assert rows[1]["p_clustered"] == pytest.approx(found["p_clustered"])


def test_same_command_same_bytes(evaluated):
    _, out, _ = evaluated
    names = sorted(p.name for p in out.iterdir())
    assert {"table1.csv", "metrics.json", "report.html", "roc.png", "difference.png"} < set(names)
    assert {f"figure{k}.png" for k in (4, 5, 6)} | {"nearest.png"} < set(names)
    assert {"gan-0.png", *(f"figure1-{k}.png" for k in range(4))} < set(names)
    assert "gan-1.png" not in names  # all four sets say that one generator made them
    for name in names:
        assert (out / name).read_bytes() == (out.parent / "again" / name).read_bytes(), name


def test_report_is_one_file_without_script(evaluated):
    _, out, _ = evaluated
    html = (out / "report.html").read_text()
    page = Page()
    page.feed(html)
    page.close()
    assert not page.open
    assert "script" not in page.tags and not page.handlers
    sources = [value for tag, name, value in page.attributes if name in ("src", "href")]
    assert len(sources) == 12 and all(s.startswith("data:image/png;base64,") for s in sources)
    assert "Research only, not for clinical use" in html and "unshown" not in html
    assert "GAN, mass" in html and "g_lr 0.00012" in html  # what the sets were made with
    for said in ("0.846", "1e-4", "p &lt; 1e-8 for 50%"):
        assert said in html
    assert str(out) not in html and str(out.parent) not in html  # folder names, no paths


def test_what_was_run_is_told_in_words(evaluated):
    """No None, True, brackets or quotes of Python; sets by their folders."""
    html = (evaluated[1] / "report.html").read_text()
    run = html.partition("<h2>What was run</h2>")[2].partition("<h2>How to read this")[0]
    texts = re.findall(r"<span>(.*?)</span>", run, re.DOTALL)
    assert len(texts) > 20
    for text in texts:
        assert not re.search(r"\bNone\b|\bTrue\b|\bFalse\b|[\[\]{}]|&#39;|\(\d+, ", text), text
    assert any(re.search(r"sets [^,]*\bmass\b", text) for text in texts)


def test_report_tells_normals_of_women_with_cancer(evaluated):
    metrics = files.read_json(evaluated[1] / "metrics.json")
    metrics["data"]["normals_with_cancer"] = {"train": 945, "test": 0}
    html = report.report(metrics, evaluated[1])
    words = "Normal patches of women with cancer (a malignant finding in any of their images)"
    assert f"{words}: train 945, test 0." in html


def test_metrics_hold_what_the_report_says(evaluated):
    _, out, _ = evaluated
    metrics = files.read_json(out / "metrics.json")
    assert set(metrics["conditions"]) == set(evaluate.CONDITIONS)
    for control in metrics["controls"]:
        assert 0 <= control["linear"][1] <= control["linear"][0] <= control["linear"][2] <= 1
        assert ("nearest" in control) == (control["set"] != "removal")
    assert metrics["controls"][3]["task"] == "mass blob"
    rows = metrics["conditions"]["Malignant against normal"]["rows"]
    assert ["against_blob" in row for row in rows] == [False, True, True, False]
    assert metrics["conditions"]["Malignant against benign masses"]["patches"] == 80
    assert not metrics["conditions"]["Malignant against benign calcifications"]
    assert set(metrics["lesion_or_image"]) == {row["regime"] for row in rows}
    points = metrics["feature_space"]["points"]
    assert points["normal"] == 40 and points["mass"] == 40  # F4: min of the paper's and ours
    assert metrics["feature_space"]["up"] > 0


class Page(HTMLParser):
    """Tags, attributes, and elements left open."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.handlers, self.open = set(), [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, *a) for a in attrs]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_names_from_files_are_escaped(evaluated, tmp_path):
    """Folder names, reasons and options are text to the report, whatever they hold."""
    metrics = files.read_json(evaluated[1] / "metrics.json")
    evil = "<img src=x onerror=alert(1)>\"'&"
    metrics["data"]["name"] = metrics["controls"][0]["set"] = metrics["runs"][0]["run"] = evil
    metrics["controls"][0]["warnings"] = [evil]
    metrics["runs"][0]["config"] = {"preset": evil, "synthetic": []}
    page = Page()
    page.feed(report.report(metrics, evaluated[1]))
    assert not page.handlers and not page.open and "script" not in page.tags


def test_E4_holm_stands_beside_each_p():
    rng = np.random.default_rng(4)
    clusters, y = patients(rng)
    kind = np.where(y, "malignant_mass", "normal")
    names = ("Baseline", "10% w/ decay", "25% w/ decay", "Blob control")
    values = correlated_scores(rng, y, clusters, 0.3, 4)[:, None]
    scores = dict(zip(names, values, strict=True))
    rows = evaluate.condition_table(kind, clusters, scores, evaluate.MAIN)["rows"]
    for key in ("p_clustered", "p_delong"):
        raw = [row[key] for row in rows[1:]]
        # the blob control is no hypothesis: it neither counts nor is corrected
        assert [row[f"{key}_holm"] for row in rows[1:]] == [*evaluate.holm(raw[:2]), raw[2]]
    expected = evaluate.clustered_test(y, values[1, 0], values[0, 0], clusters)
    assert rows[1]["p_clustered"] == pytest.approx(expected[5])  # as the paper's, not corrected


def test_another_statistic_is_a_function_and_a_line(evaluated, monkeypatch):
    """It stands in every row of metrics.json and in the report, empty for the baseline itself."""

    def spread(y, scores, baseline, clusters, fold):
        return {"spread": scores.std(), "spread_low": 0.25, "spread_high": 0.75, "delta_x": 0.125}

    line = {"Spread": (spread, "spread", "spread_low", "spread_high"), "X": (spread, "delta_x")}
    monkeypatch.setattr(evaluate, "STATISTICS", evaluate.STATISTICS | line)
    monkeypatch.setattr(report, "STATISTICS", evaluate.STATISTICS)
    rng = np.random.default_rng(4)
    clusters, y = patients(rng)
    kind = np.where(y, "malignant_mass", "normal")
    names = ("Baseline", "50% w/ decay")
    scores = dict(zip(names, correlated_scores(rng, y, clusters, 0.3)[:, None], strict=True))
    metrics = files.read_json(evaluated[1] / "metrics.json")
    metrics["lesion_or_image"] = {name: {} for name in names}
    table = evaluate.condition_table(kind, clusters, scores, evaluate.MAIN)
    metrics["conditions"] = {evaluate.MAIN: table}
    assert [row["delta_x"] for row in table["rows"]] == [None, 0.125]
    html = report.report(metrics, evaluated[1])
    assert html.count(">+0.125<") == 1 and html.count(">(0.250<") == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"data": "0" * 64}}, "trained on patch set 000000000000"),
        ({"complete": False}, "not finished"),
        ({"command": "train-gan"}, "expected a folder made by 'train-cls'"),
        ({"config": {"width": 8}}, "differs from"),
    ],
)
def test_runs_that_do_not_fit_are_refused(evaluated, tmp_path, change, message):
    world, _, _ = evaluated
    run = tmp_path / "run"
    shutil.copytree(world["augmented"][0], run)
    facts = files.read_json(run / "seed-1" / "config.json")
    config = facts["config"] | change.pop("config", {})
    files.write_json(run / "seed-1" / "config.json", facts | change | {"config": config})
    with pytest.raises(ValueError, match=message):
        report.evaluate(**world | {"augmented": [run]}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_C5_a_constant_share_is_not_called_decaying(evaluated, tmp_path):
    world, _, _ = evaluated
    run = shutil.copytree(world["augmented"][2], tmp_path / "run")
    for path in run.rglob("config.json"):
        facts = json.loads(path.read_text())
        facts["config"]["decay"] = 1.0
        path.write_text(json.dumps(facts))
    fingerprint = patchset.patch_config(world["patch_set"])["fingerprint"]
    assert evaluate.open_regime(run, fingerprint).name == "50% w/o decay"


def test_a_run_that_diverged_is_named(evaluated, tmp_path):
    world, _, _ = evaluated
    run = shutil.copytree(world["baseline"], tmp_path / "run")
    state = torch.load(run / "seed-1" / "checkpoint.pt")
    state["best"]["weights"]["fc.bias"][0] = math.nan
    torch.save(state, run / "seed-1" / "checkpoint.pt")
    with pytest.raises(ValueError, match="seed-1: scores are not numbers"):
        report.evaluate(**world | {"baseline": run, "augmented": []}, out=tmp_path / "out")


def test_arguments_that_do_not_fit_are_refused(evaluated, tmp_path):
    world, out, _ = evaluated
    for change, message in (
        ({"baseline": world["augmented"][0]}, "expected neither synthetic patches"),
        ({"augmented": world["augmented"] * 2}, "50% w/ decay is given twice"),
        ({"synthetic": [world["patch_set"]]}, "expected a folder made by 'synthesize'"),
        ({"out": out, "seed": 1}, "other options"),
    ):
        with pytest.raises(ValueError, match=message):
            report.evaluate(**{**world, "out": tmp_path / "out", **change})


def test_baseline_alone_and_one_lesion_type(tmp_path):
    """The least there can be: one model, masses only, no set, no benign patches."""
    kinds = ("normal", "malignant_mass")
    counts = {f"{split}/{kind}": 30 for split in sources.SPLITS for kind in kinds}
    patches = write_data(tmp_path / "data", counts)
    run = write_run(tmp_path / "run", patches, 0.5)
    (row,) = report.evaluate(patches, run, [], [], tmp_path / "out")
    assert row["regime"] == "Baseline" and row["seeds"] == 1
    conditions = files.read_json(tmp_path / "out" / "metrics.json")["conditions"]
    assert "Masses against normal" not in conditions  # the whole test set again
    assert not conditions["Calcifications against normal"]
    html = (tmp_path / "out" / "report.html").read_text()
    assert "Calcifications against normal</h3><p>Not computed" in html
    absent = "the patch set holds no test/malignant_calcification (--count)"
    assert absent in html and "benign masses</h3><p>Not computed: the patch set holds no" in html
    assert "fewer than two test patients" not in html
    assert "None was run" in html and "<figure><figcaption>" not in html


def test_too_few_test_patients_are_told_by_class(tmp_path):
    counts = {"train/normal": 30, "train/malignant_mass": 30, "test/normal": 30, "val/normal": 30}
    patches = write_data(tmp_path / "data", counts)
    run = write_run(tmp_path / "run", patches, 0.5)
    found = "found malignant_mass 0, malignant_calcification 0, normal [0-9]+; prepare more"
    with pytest.raises(ValueError, match=f"fewer than two test patients a class; {found}"):
        report.evaluate(patches, run, [], [], tmp_path / "out")


def test_F4_groups_differ_in_shape_and_colour():
    groups = np.repeat([*evaluate.EMBEDDED, "rescued"], 3)
    xy = np.random.default_rng(0).random((len(groups), 2))
    (ax,) = figures.embedding_figure({"Baseline": xy}, groups, evaluate.EMBEDDED).axes
    shapes = {points.get_paths()[0].vertices.tobytes() for points in ax.collections[:-1]}
    colours = {tuple(points.get_facecolor()[0]) for points in ax.collections}
    assert len(shapes) == len(evaluate.EMBEDDED) and len(colours) == len(groups) // 3


def test_scores_csv_is_what_the_table_was_made_of(evaluated):
    """Table 1 again, from scores.csv alone."""
    world, out, rows = evaluated
    names = [f"{row['regime']} seed {k}" for row in rows for k in range(2)]
    table = files.read_table(out / "scores.csv", ("patch", "patient", "class", *names))
    test = patchset.Patches.open(world["patch_set"], "test")
    assert table["class"].tolist() == test.kind.tolist()
    assert table["patient"].tolist() == test.column("patient_id").tolist()
    assert table["patch"].tolist() == [
        str(i) for part in test.parts.values() for i in range(len(part))
    ]
    values = np.array([table[name] for name in names], dtype=float).reshape(4, 2, -1)
    scores = {row["regime"]: value for row, value in zip(rows, values, strict=True)}
    again = evaluate.condition_table(table["class"], table["patient"], scores, evaluate.MAIN)
    assert [row["p_clustered"] for row in again["rows"]] == [row["p_clustered"] for row in rows]


def test_rows_json_holds_what_documents_quote(evaluated):
    _, out, rows = evaluated
    kept = json.loads((out / "rows.json").read_text())
    names = {"regime", "patients", "auc", "low", "high", "delta", "delta_low", "delta_high"}
    names |= {"p_clustered", "detectable", "seeds", "folds", "train_malignant"}
    assert [set(row) for row in kept] == [names] * 4
    assert kept == [{name: row[name] for name in row if name in names} for row in rows]
    assert kept[0]["folds"] == 1


# --- Cross-validation and external test, on the same ---

FEW = {f"{s}/{k}": 24 for s in sources.SPLITS for k in ("normal", "malignant_mass")}


def write_fold(root: Path, k: int) -> Path:
    """The output of `evaluate` for fold k of 3: a baseline and a regime, two seeds each."""
    patches = write_data(root / "data", FEW, 8, f"fold{k}-", fold=f"{k}/3", source="s")
    syn = write_set(root / "mass", patches, "mass", n=20)
    for seed in range(2):
        write_run(root / "baseline" / f"seed-{seed}", patches, 0.5, (), seed)
        write_run(root / "aug" / f"seed-{seed}", patches, 0.5, [syn], seed)
    report.evaluate(patches, root / "baseline", [root / "aug"], [], root / "out")
    return root / "out"


@pytest.fixture(scope="module")
def folds(tmp_path_factory):
    root = tmp_path_factory.mktemp("folds")
    return [write_fold(root / f"{k}", k) for k in (1, 2, 3)]


def test_folds_give_one_table_from_the_scores_of_each(folds, tmp_path):
    out = tmp_path / "cv"
    rows = report.evaluate_folds(folds, out)
    parts = [files.read_json(fold / "metrics.json") for fold in folds]
    mains = [part["conditions"][evaluate.MAIN]["rows"] for part in parts]
    for k, row in enumerate(rows):
        assert row["auc"] == pytest.approx(np.mean([main[k]["auc"] for main in mains]))
        assert row["fold_aucs"] == pytest.approx([main[k]["auc"] for main in mains])
        assert (row["patients"], row["patches"]) == (24, 144)
    assert rows[1]["delta"] == pytest.approx(np.mean([main[1]["delta"] for main in mains]))
    assert rows[1]["detectable"] < min(main[1]["detectable"] for main in mains)
    kept = json.loads((out / "rows.json").read_text())
    assert [(row["folds"], row["seeds"], row["train_malignant"]) for row in kept] == [(3, 2, 7)] * 2
    who = patchset.Patches.open(folds[0].parent / "data", "train", "malignant").column("patient_id")
    assert len(set(who)) == 7
    assert (out / "table1.csv").read_text().splitlines()[2].startswith("50% w/ decay,0.5,2,24,144,")
    names = {"config.json", "difference.png", "metrics.json", "report.html", "roc.png", "rows.json"}
    assert {path.name for path in out.iterdir()} == names | {"table1.csv", "reliability.png"}
    page = Page()
    html = (out / "report.html").read_text()
    page.feed(html)
    assert not page.open and not page.handlers
    assert "conditional on these" in html and "Bengio and Grandvalet" in html
    assert "Lesion or image?" not in html and "Figure 4" not in html
    assert html.count("fold") > 5 and str(out.parent) not in html
    report.evaluate_folds(folds, tmp_path / "again")
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def changed(fold: Path, folder: Path, change) -> Path:
    """A copy of a fold's output with other metrics."""
    shutil.copytree(fold, folder)
    metrics = files.read_json(folder / "metrics.json")
    change(metrics)
    files.write_json(folder / "metrics.json", metrics)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m["runs"].pop(),
            r"differs from .*out in more than its patients: 50% w/ decay: ",
        ),
        (lambda m: m["runs"][1]["config"].update(decay=0.5), "patients: 50% w/ decay: decay 0.5"),
        (lambda m: m["runs"][0].update(seeds=[0]), "patients: Baseline: number of seeds 1"),
        (
            lambda m: m["data"].update(malignant_share=0.1),
            "patients: patch set: malignant_share 0.1",
        ),
        (lambda m: m["data"].update(source="t"), "patients: patch set: source s"),
        (lambda m: m["data"].update(fold="1/3"), "found 1/3, 2/3, 1/3; expected each K/N"),
        (lambda m: m["data"].update(fold="3/5"), "found 1/3, 2/3, 3/5; expected each K/N"),
        (lambda m: m["data"].pop("fold"), "found 1/3, 2/3, None; expected each"),
        (
            lambda m: m["data"].pop("train_malignant"),
            "damaged .*of an older version.; evaluate again",
        ),
        (lambda m: m.pop("runs"), "damaged .KeyError: 'runs'.*evaluate again"),
        (lambda m: m["runs"][0].pop("config"), "damaged .KeyError: 'config'"),
    ],
)
def test_folds_that_differ_are_named(folds, tmp_path, change, message):
    third = changed(folds[2], tmp_path / "third", change)
    with pytest.raises(ValueError, match=message):
        report.evaluate_folds([*folds[:2], third], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_gain_over_patients_is_drawn_for_the_regimes_of_all_reports(folds, tmp_path):
    few, many = (json.loads((folds[0] / "rows.json").read_text()) for _ in range(2))
    for row in few:
        row |= {"train_malignant": 2, "auc": row["auc"] / 2}
    few.append(few[1] | {"regime": "Blob control"})  # run with few patients alone
    left, right = figures.gain_figure([many, few]).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in left.lines}
    assert set(lines) == {"Baseline", "50% w/ decay"}
    aucs = {row["regime"]: row["auc"] for row in many}
    assert lines["50% w/ decay"] == [[2, aucs["50% w/ decay"] / 2], [7, aucs["50% w/ decay"]]]
    (bars,) = right.containers
    ((_, low), (_, high)), _ = bars[2][0].get_segments()
    assert (low, high) == pytest.approx((many[1]["delta_low"], many[1]["delta_high"]))
    points = right.lines[0].get_xdata() / lines["50% w/ decay"][0][0]
    assert points == pytest.approx([1, 3.5], rel=0.1)  # moved aside, not to other numbers
    gain.gain(tmp_path / "gain.png", folds[:2])
    assert (tmp_path / "gain.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no such folder"):
        gain.gain(tmp_path / "gain.png", [tmp_path / "none"])
    old = shutil.copytree(folds[0], tmp_path / "old")
    (old / "rows.json").write_text('[{"regime": "Baseline"}]')
    with pytest.raises(ValueError, match=r"rows.json: damaged .*of an older version"):
        gain.gain(tmp_path / "gain.png", [old])


def test_folds_may_have_seeds_of_their_own(folds, tmp_path):
    def other(metrics):
        for run in metrics["runs"]:
            run["seeds"] = [seed + 10 for seed in run["seeds"]]

    third = changed(folds[2], tmp_path / "third", other)
    text = (third / "scores.csv").read_text()
    (third / "scores.csv").write_text(text.replace("seed ", "seed 1"))
    rows = report.evaluate_folds([*folds[:2], third], tmp_path / "out")
    assert rows == report.evaluate_folds(folds, tmp_path / "same")


def test_folds_say_how_many_patients_with_cancer_train(folds, tmp_path):
    more = changed(folds[2], tmp_path / "3/out", lambda m: m["data"].update(train_malignant=13))
    rows = report.evaluate_folds([*folds[:2], more], tmp_path / "out")
    assert {row["train_malignant"] for row in rows} == {9}
    html = (tmp_path / "out/report.html").read_text()
    assert [html.count(f'"With cancer in training"><span>{n}<') for n in (7, 13)] == [2, 1]


def test_folds_that_are_none_or_share_patients_are_refused(folds, evaluated, tmp_path):
    cv = tmp_path / "cv"
    report.evaluate_folds(folds, cv)
    twice = shutil.copytree(folds[0], tmp_path / "twice")
    (unscored := shutil.copytree(folds[2], tmp_path / "unscored") / "scores.csv").unlink()
    text = (folds[2] / "scores.csv").read_text()
    for given, message in (
        (folds[:1], "found 1/3; expected each K/N of one N once"),
        (folds[:2], "found 1/3, 2/3; expected each K/N"),
        ([*folds, twice], "8 test patients, such as fold1-test-00, are in .*out too"),
        (
            [*folds, evaluated[1]],
            "differs from .* in more than its patients: .*; evaluate all folds alike",
        ),
        ([*folds, cv], "scores.csv: no such file|damaged"),
        ([folds[0], tmp_path / "none"], "none: no such folder"),
        ([folds[0], evaluated[0]["patch_set"]], "expected a folder made by 'evaluate'"),
        ([*folds[:2], unscored.parent], "scores.csv: no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            report.evaluate_folds(given, tmp_path / "out")
    for damage in (text.replace("0.", "x.", 1), text[:-40], text.replace("seed 1", "seed 9")):
        unscored.write_text(damage)
        with pytest.raises(ValueError, match=r"unscored: damaged"):
            report.evaluate_folds([*folds[:2], unscored.parent], tmp_path / "out")


def test_external_test_scores_another_patch_set(folds, tmp_path):
    root = folds[0].parent
    other = write_data(tmp_path / "other", FEW, 8, "other-")
    line = (root / "data", root / "baseline", [root / "aug"], [root / "mass"], tmp_path / "out")
    rows = report.evaluate(*line, test=other)
    assert rows == report.evaluate(*line[:4], tmp_path / "alone")
    metrics = files.read_json(tmp_path / "out" / "metrics.json")["external"]
    assert metrics["name"] == "other" and metrics["data"]["held"] == FEW
    regimes = evaluate.open_regimes(
        root / "baseline", [root / "aug"], patchset.fingerprint(line[0])
    )
    test = patchset.Patches.open(other, "test")
    scores = {r.name: evaluate.score(r, test, torch.device("cpu")) for r in regimes}
    who = test.column("patient_id")
    table = evaluate.condition_table(test.kind, who, scores, evaluate.MAIN)
    assert metrics["conditions"][evaluate.MAIN] == json.loads(json.dumps(table))
    external = files.read_table(tmp_path / "out" / "scores-external.csv", ("patient",))
    assert external["patient"].tolist() == who.tolist()
    html = (tmp_path / "out" / "report.html").read_text()
    assert "External test: other" in html and "--test other" in html
    assert "External test" not in (tmp_path / "alone" / "report.html").read_text()
    with pytest.raises(ValueError, match="made with other options"):
        report.evaluate(*line)


def test_external_test_that_does_not_fit_or_leaks_is_refused(folds, tmp_path):
    root = folds[0].parent
    line = (root / "data", root / "baseline", [], [], tmp_path / "out")

    def other(name: str, prefix: str, **config) -> Path:
        return write_data(tmp_path / name, FEW, 8, prefix, **config)

    for test, message in (
        (other("size", "a-", patch_size=64), "size: patch_size 64; prepare it with 32, as .*data"),
        (other("mm", "b-", spacing_mm=None), "mm: spacing_mm None; prepare it with 0.33, as"),
        (root / "data", r"\d+ images of its test split, such as fold1-test0-0, are in .*data too"),
        (tmp_path / "absent", "absent: no such folder"),
    ):
        with pytest.raises(ValueError, match=message):
            report.evaluate(*line, test=test)
    assert not (tmp_path / "out").exists()


def patients_only(folder: Path) -> Path:
    """Other images of the same patients."""
    for path in folder.glob("patches/*/*.csv"):
        header, *lines = path.read_text().splitlines()
        cells = [line.split(",") for line in lines]
        lines = [",".join((patch, f"new-{uid}", *rest)) for patch, uid, *rest in cells]
        path.write_text("\n".join([header, *lines]) + "\n")
    return folder


def test_external_patients_of_one_source_are_told_and_of_another_are_not(tmp_path):
    ours = write_data(tmp_path / "ours", FEW, 8, source="s")
    same = patients_only(write_data(tmp_path / "same", FEW, 8, source="s"))
    with pytest.raises(ValueError, match="8 patients of its test split, such as test-00"):
        provenance.check_external(same, ours)
    other = patients_only(write_data(tmp_path / "other", FEW, 8, source="t"))
    assert provenance.check_external(other, ours)["held"] == FEW
    for name, refused in (("manifest", False), ("cbis-ddsm", True)):
        for folder in (ours, other):
            facts = files.read_json(folder / "config.json") | {"format": name}
            files.write_json(folder / "config.json", facts)
        if refused:
            with pytest.raises(ValueError, match="patients of its test split"):
                provenance.check_external(other, ours)
        else:
            provenance.check_external(other, ours)


def test_patches_stand_pixel_by_pixel_in_figures(tmp_path):
    """Each pixel is a square of whole pixels of its own grey; the bar is as long as it says."""
    line, gap, rng = figures.LINE_PX, figures.GAP_PX, np.random.default_rng(0)
    small, large = rng.integers(65536, size=(2, 64, 64)).astype(np.uint16), np.full((256, 300), 0.5)
    figure = figures.patch_figure([("a", small, ("x", "y")), ("b", [large], ())], mm=[0.33])
    figures.save_figure(figure, tmp_path / "figure.png")
    picture = np.asarray(Image.open(tmp_path / "figure.png"))[..., :3]
    second = line + 256 + line + gap
    for top, left, patch, zoom in (
        (line, line, small[0], 4),
        (line, line + 256 + gap, small[1], 4),
        (second, line, data.to_uint16(large), 1),
    ):
        grey = np.kron(patch >> 8, np.ones((zoom, zoom), int))[..., None]
        shown = picture[top : top + grey.shape[0], left : left + grey.shape[1]]
        assert (shown == grey).all()
    for bottom, length in ((line + 256, 5 / 0.33 * 4), (second + 256, 20 / 0.33)):
        dark = picture[bottom + line // 2, line:, 0] < 128
        assert np.argmin(dark) == pytest.approx(length, abs=2)


def test_kid_is_the_textbook_estimate_when_every_patch_has_its_own_patient():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 5)), rng.normal(0.3, 1, size=(15, 5))
    x, y = (a * np.sqrt(5 / (a * a).sum(axis=1, keepdims=True)) for a in (x, y))
    k = lambda a, b: (a @ b.T / 5 + 1) ** 3  # noqa: E731
    within = [(k(a, a).sum() - np.trace(k(a, a))) / (len(a) * (len(a) - 1)) for a in (x, y)]
    expected = sum(within) - 2 * k(x, y).mean()
    value, low, high = controls.kid(x, y, np.arange(20), 100 + np.arange(15))
    assert value == pytest.approx(expected) and low < value < high


def test_kid_is_unbiased_for_equal_distributions_even_with_patients():
    """Mean over 400 draws is 0 within its error; a plain estimate would be far above."""
    rng, values = np.random.default_rng(1), []
    who = np.repeat(np.arange(12), 4)
    for _ in range(400):
        x, y = (rng.normal(size=(12, 6))[who] + rng.normal(size=(48, 6)) for _ in range(2))
        values.append(controls.kid(x, y, who, who + 12))
    means = np.array(values)[:, 0]
    assert abs(means.mean()) < 3 * means.std() / 20
    covered = np.mean([low <= 0 <= high for _, low, high in values])
    assert 0.9 <= covered <= 1  # the jackknife is cautious where the distributions are equal
    singles = [controls.kid(x, y, np.arange(48), np.arange(48, 96))[0]]
    assert singles[0] > 3 * means.std() / 20


def test_kid_finds_a_shift():
    rng, who = np.random.default_rng(2), np.arange(60) // 3
    x, y = rng.normal(size=(60, 6)), rng.normal(0.5, 1, size=(60, 6))
    assert controls.kid(x, y, who, who + 20)[1] > 0


def test_detectors_tell_apart_what_differs_and_only_that():
    rng, who = np.random.default_rng(3), np.arange(120) // 4
    same, other = rng.normal(size=(120, 8)), rng.normal(size=(120, 8))
    args = who, who + 30, controls.linear_detector
    _, low, high = controls.detectability(same, other, *args)
    assert low < 0.5 < high
    assert controls.detectability(same, other + 2, *args)[1] > 0.9
    noise = data.to_uint16(0.3 * rng.normal(size=(2, 120, 32, 32)))
    network = controls.network_detector(torch.device("cpu"), seed=0, steps=60)
    args = who, who + 30, network, 2
    _, low, high = controls.detectability(*noise, *args)
    assert low < 0.5 < high
    smooth = data.to_uint16(ndimage.gaussian_filter(data.to_float(noise[1]), (0, 1, 1)))
    assert controls.detectability(noise[0], smooth, *args)[1] > 0.9


def test_a_detector_never_sees_the_patient_it_is_asked_about():
    """Patients recognisable by a feature, labels mixed within them: a leak would give AUC 1."""
    rng, who = np.random.default_rng(3), np.repeat(np.arange(20), 6)
    seen = []

    def fit_predict(x, y, held_out):
        seen.append(set(x[:, 0]) & set(held_out[:, 0]))
        return rng.normal(size=len(held_out))

    controls.detectability(who[:, None], who[:, None], who, who, fit_predict)
    assert len(seen) == 5 and not any(seen)


def clusters_of_phantoms(n: int, mm: float):
    """Patches (64 px) of tissue with a malignant cluster, and each one's drawn figures."""
    women = (phantom.patient(0, k) for k in itertools.count())
    women = (w for w in women if (w.finding, w.pathology) == ("calcification", "malignant"))
    for seed, who in enumerate(itertools.islice(women, n)):
        rng, axis = np.random.default_rng(seed), (np.arange(64) - 32) * mm
        y, x = np.meshgrid(axis, axis, indexing="ij")
        added, _ = phantom.calcifications(rng, who, y, x, mm)
        tissue = 0.45 + 0.05 * phantom.power_law(rng, (64, 64), mm, 3.4, longest=20.0)
        tissue += rng.normal(0, 0.006, tissue.shape)
        labels, n = ndimage.label(added > 0.3 * who.contrast, np.ones((3, 3)))
        at = mm * np.array(ndimage.center_of_mass(labels > 0, labels, range(1, n + 1)))
        sizes = mm * np.sqrt(4 / np.pi * np.bincount(labels.ravel())[1:])
        contrast = 2 * np.median(ndimage.maximum(added, labels, range(1, n + 1)))
        extent = spatial.distance.pdist(at).max()
        drawn = (n, np.median(sizes), contrast, extent)
        yield (tissue * 2 - 1, 2 * (tissue + added) - 1, drawn)


def test_the_grain_table_counts_what_the_phantoms_drew():
    tissue, patches, drawn = map(np.array, zip(*clusters_of_phantoms(40, 0.33), strict=True))
    found = np.array([controls.grains(patch, 0.33) for patch in data.to_uint16(patches)])
    for figure, (ours, true) in enumerate(zip(found.T, drawn.T, strict=True)):
        assert 0.8 < np.median(ours / true) < 1.2, controls.GRAINS[figure]
    assert np.corrcoef(found[:, 0], drawn[:, 0])[0, 1] > 0.7
    table = controls.grain_table(data.to_uint16(patches), 0.33)
    assert table["with"] == 1
    assert table["grains"] == pytest.approx(np.percentile(found[:, 0], (25, 50, 75)).tolist())
    bare = controls.grain_table(data.to_uint16(tissue), 0.33)
    assert bare["with"] < 0.2
    half = controls.grain_table(data.to_uint16((tissue + patches) / 2), 0.33)
    assert half["contrast"][1] == pytest.approx(table["contrast"][1] / 2, rel=0.2)


def test_copies_are_nearest_to_their_originals():
    rng = np.random.default_rng(5)
    training, held_out = rng.normal(size=(50, 8)), rng.normal(size=(200, 8))
    at, distance, found = controls.nearest_training(training[[7, 3]] + 1e-3, training, held_out)
    assert at.tolist() == [7, 3] and distance.max() < 0.01
    assert found["closer"] == 1.0
    fresh = controls.nearest_training(rng.normal(size=(200, 8)), training, held_out)[2]
    assert fresh["closer"] < 0.05


def test_same_image_auc_by_hand():
    y = np.array([1, 1, 0, 0, 1, 0, 1, 0], bool)
    scores = np.array([0.9, 0.4, 0.5, 0.4, 0.2, 0.3, 0.99, 0.0])
    images = np.array(["a", "a", "a", "a", "b", "b", "c", "d"])
    # a: 0.9 beats both; 0.4 loses to 0.5, ties 0.4. b: loses. c and d hold one class only.
    auc, low, high, number = controls.same_image_auc(y, scores, images, images)
    assert (auc, number) == (pytest.approx(2.5 / 5), 2)
    assert low <= auc <= high
    assert controls.same_image_auc(y[4:], scores[4:], images[4:], images[4:]) is None


def test_F5_rescued_patches_cross_one_half_largest_rise_first():
    base = np.array([0.1, 0.4, 0.6, 0.3, 0.2, 0.45, 0.49, 0.05, 0.9, 0.5])
    ours = np.array([0.9, 0.6, 0.9, 0.4, 0.8, 0.75, 0.51, 0.7, 0.3, 0.9])
    best, found = evaluate.rescue(base, ours)
    assert best.tolist() == [0, 7, 4, 5, 1]
    assert found == {
        "up": 6,
        "down": 1,
        "rise": pytest.approx((0.8 + 0.65 + 0.6 + 0.3 + 0.2) / 5),
        "fall": pytest.approx(-0.6),
    }


def test_mean_roc_is_the_curve_whose_area_is_the_mean_auc():
    rng = np.random.default_rng(9)
    clusters, y = patients(rng, number=120)
    scores = correlated_scores(rng, y, clusters, 0.5)
    curve = evaluate.mean_roc(y, scores)
    area = np.trapezoid(curve, np.linspace(0, 1, len(curve)))
    aucs = [evaluate.auc_ci(y, values)[0] for values in scores]
    assert area == pytest.approx(np.mean(aucs), abs=0.01)


@pytest.mark.parametrize(
    ("delta", "p", "p_holm", "against", "expected"),
    [
        (0.02, 0.2, 0.6, None, "not found (one of 0.030 would be, with 80% power)"),
        (0.02, 0.01, 0.06, (0.02, 0.01), "higher, but not found: p is 0.060 for the number of"),
        (0.02, 0.01, 0.03, None, "higher, but not found: no blob control was run"),
        (0.02, 0.01, 0.03, (0.03, 0.01), "found: higher; against the blob control +0.030 (+0.0"),
        (-0.02, 0.01, 0.03, (-0.03, 0.01), "found: lower; against the blob control -0.030"),
        (0.02, 0.01, 0.03, (0.03, 0.3), "higher, but not found: a featureless bump may do the"),
        (0.02, 0.01, 0.03, (-0.03, 0.01), "higher, but not found: a featureless bump may do the"),
    ],
)
def test_E3_found_needs_holm_and_a_difference_to_the_blob_control(
    delta, p, p_holm, against, expected
):
    row = {"regime": "50% w/ decay", "delta": delta, "detectable": 0.03, "seeds": 3}
    row |= {"reference": "Baseline", "p_clustered": p, "p_clustered_holm": p_holm}
    rows = [{"regime": "Baseline", "seeds": 3}, row]
    if against:
        delta, p = against
        ends = {"delta_low": delta - 0.02, "delta_high": delta + 0.02}
        row["against_blob"] = {"delta": delta, "p_clustered": p, **ends}
        rows.append({"regime": "Blob control", "seeds": 3})
    assert report.verdict(row, rows).startswith(expected)
    if expected.startswith("found"):  # a single training says nothing about the next
        rows[0]["seeds"] = 1
        assert "for these models, but not found" in report.verdict(row, rows)


def test_what_augmentation_gives_is_not_put_down_to_synthetic_patches():
    """Regimes are compared with those augmented alike; augmentation alone is no finding."""
    rng = np.random.default_rng(4)
    kind = np.repeat(["normal", "malignant_mass"], 150)
    who = np.array([f"{k[:3]}{i % 50}" for i, k in enumerate(kind)])
    lifts = {"Baseline": 0.5, "Classical augmentation": 3.0, "50% w/ decay": 0.5}
    lifts |= {"50% w/ decay, classical": 3.0, "Blob control": 0.5, "Blob control, classical": 3.0}
    y = kind != "normal"
    scores = {n: rng.normal(size=(3, 300)) + lift * y for n, lift in lifts.items()}
    rows = evaluate.condition_table(kind, who, scores, evaluate.MAIN)["rows"]
    by = {row["regime"]: row for row in rows}
    mixed = by["50% w/ decay, classical"]
    assert mixed["reference"] == "Classical augmentation" and abs(mixed["delta"]) < 0.03
    assert (
        by["50% w/ decay"]["reference"] == by["Classical augmentation"]["reference"] == "Baseline"
    )
    assert abs(mixed["against_blob"]["delta"]) < 0.03  # the control that was augmented, too
    alone = by["Classical augmentation"]
    assert "against_blob" not in alone  # its control would be one without augmentation
    assert alone["delta"] > 0.2 and alone["p_clustered_holm"] == alone["p_clustered"]
    texts = {row["regime"]: report.verdict(row, rows) for row in rows}
    assert texts["Classical augmentation"] == "higher, without synthetic ones"
    assert not any(text.startswith("found") for text in texts.values())
    few = {n: s for n, s in scores.items() if n != "Classical augmentation"}
    rows = evaluate.condition_table(kind, who, few, evaluate.MAIN)["rows"]
    mixed = next(row for row in rows if row["regime"] == "50% w/ decay, classical")
    assert mixed["reference"] == "Baseline"
    assert "the augmentation alone was not run" in report.verdict(mixed, rows)


def test_E3_the_report_says_in_one_sentence_whether_synthetic_lesions_help(evaluated):
    metrics = files.read_json(evaluated[1] / "metrics.json")
    rows = metrics["conditions"][evaluate.MAIN]["rows"]
    for row in rows[1:]:
        row |= {"delta": 0.01, "p_clustered": 0.3, "p_clustered_holm": 0.3}
    assert "No evidence here that synthetic lesions help." in report.report(metrics, evaluated[1])
    rows[2] |= {"p_clustered": 0.001, "p_clustered_holm": 0.002}
    rows[2]["against_blob"] |= {"delta": 0.01, "p_clustered": 0.01}
    assert "lesions helped: 100% w/ decay." in report.report(metrics, evaluated[1])
    rows[2]["against_blob"]["p_clustered"] = 0.5
    assert "No evidence here that synthetic lesions help." in report.report(metrics, evaluated[1])


def test_lesion_or_image_tells_a_model_of_lesions_from_one_that_recognises_images():
    rng, n = np.random.default_rng(13), 40
    kind = np.tile(["malignant_mass", "normal", "benign_mass", "normal"], n)
    image = np.repeat(np.arange(2 * n), 2)  # cancer in every second one
    lesion, cancer = np.char.endswith(kind, "mass"), np.tile([1, 1, 0, 0], n)
    of_lesions, of_images = (
        controls.lesion_or_image(
            kind, image, image, (2 * seen + rng.normal(size=4 * n))[None]
        ).values()
        for seen in (lesion, cancer)
    )
    low, high = 1, 2
    malignant, benign, normal = of_lesions
    assert malignant[low] > 0.7 and benign[low] > 0.7 and normal[low] < 0.5 < normal[high]
    malignant, benign, normal = of_images
    assert malignant[low] < 0.5 < malignant[high] and benign[low] < 0.5 < benign[high]
    assert normal[low] > 0.7


# --- Subgroups, thresholds, calibration ---


def test_facts_of_patches_come_from_the_manifest(tmp_path):
    """Two masses in an image: the one that shares most with the window; pixels of 0.1 x 0.2 mm."""
    folder = write_data(tmp_path / "data", {"test/malignant_mass": 3, "test/normal": 2}, 2)
    header, *lines = (folder / "patches/test/malignant_mass.csv").read_text().splitlines()
    assert header == "patch,image_uid,patient_id,row0,col0,row1,col1,scale"
    window = "1000,1000,1320,1160,1.000000"  # 32 px of 1 mm: a stored pixel is 0.1 x 0.2 mm
    lines = [f"0,u,P,{window}", f"1,v,Q,{window}", f"2,w,R,{window}"]
    (folder / "patches/test/malignant_mass.csv").write_text("\n".join([header, *lines]) + "\n")
    mass = {"finding": "mass", "pathology": "malignant", "laterality": "L"}
    rows = [
        sources.Finding(
            "u.dcm", "P", view="CC", bbox=(1300, 1100, 1500, 1150), density="b", **mass
        ),
        sources.Finding("u.dcm", "P", view="CC", bbox=(1000, 1100, 1090, 1150), **mass),
        sources.Finding("v.dcm", "Q", view="LM", bbox=(900, 1100, 1090, 1110), **mass),
        sources.Finding("v2.dcm", "Q", view="MLO", bbox=(900, 1100, 1090, 1110), **mass),
        sources.Finding("x.dcm", "S", "L", "CC", "", "normal"),
    ]
    told = {"image_uid": ["u", "u", "v", "v", "x"], "patient_pathology": ["malignant"] * 5}
    sources.write_manifest(folder / "manifest.csv", rows, **told)
    facts = files.read_json(folder / "config.json")
    for spacing, sizes in ((1.0, ["10.0", "19.0", ""]), (None, ["90.0", "190.0", ""])):
        facts["config"]["spacing_mm"] = spacing
        files.write_json(folder / "config.json", facts)
        found = subgroups.patch_facts(folder, "test")
        at = patchset.Patches.open(folder, "test").kind == "malignant_mass"
        assert found["size"][at].tolist() == sizes and not any(found["size"][~at])
    assert found["view"][at].tolist() == ["CC", "", ""]  # one image, two views: unknown
    assert found["density"][at].tolist() == ["b", "", ""]
    assert found["patient_pathology"][at].tolist() == ["malignant", "malignant", ""]
    sources.write_manifest(folder / "manifest.csv", rows)  # as before there were subgroups
    assert not any("".join(values) for values in subgroups.patch_facts(folder, "test").values())


def some_scores(rng, n=240):
    """Class, patient, scores of two regimes and facts of n patches, 4 a patient."""
    who = np.array([f"P{i // 4:02d}" for i in range(n)])
    kind = np.array(["normal", "malignant_mass", "normal", "benign_mass"])[np.arange(n) % 4]
    kind[::8] = "malignant_mass"
    scores = {name: rng.random((2, n)) for name in ("Baseline", "50% w/ decay")}
    facts = {"view": np.array(["CC", "MLO", "LM", "MLO"])[np.arange(n) // 4 % 4]}
    facts["density"] = np.array(["a", "b", ""])[np.arange(n) // 4 % 3]
    facts["size"] = np.where(kind == "malignant_mass", rng.integers(5, 40, n).astype(str), "")
    worst = np.array(["malignant", "benign", "benign", ""])
    return kind, who, scores, facts | {"patient_pathology": worst[np.arange(n) // 4 % 4]}


def test_subgroups_are_the_tables_of_their_patches():
    kind, who, scores, facts = some_scores(np.random.default_rng(0))
    found = subgroups.subgroups(kind, who, scores, facts, "mm")
    size = np.array([float(text or "nan") for text in facts["size"]])
    a, b = sorted(size[kind == "malignant_mass"])[29::30][:2]
    normal, ill = kind == "normal", kind == "malignant_mass"
    expected = {
        ("Longest side of the lesion", f"up to {a} mm"): normal | (size <= a),
        ("Longest side of the lesion", f"over {b} mm"): normal | (size > b),
        ("View", "CC"): facts["view"] == "CC",
        ("View", "others"): facts["view"] == "LM",
        ("Breast density", "b"): facts["density"] == "b",
        ("Normal patches of", "women with a malignant finding"): ill
        | (facts["patient_pathology"] == "malignant"),
    }
    for (what, name), at in expected.items():
        cut = {regime: values[:, at] for regime, values in scores.items()}
        table = evaluate.condition_table(kind[at], who[at], cut, evaluate.MAIN)
        assert found[what][name] == table and table["patients"] > 1, name
    assert list(found["Breast density"]) == ["a", "b"]
    assert "women without any finding" not in found["Normal patches of"]
    thirds = [table["positives"] for table in found["Longest side of the lesion"].values()]
    assert sum(thirds) == ill.sum() and max(thirds) - min(thirds) < 12  # sizes are tied
    facts["view"][normal] = "MLO"
    assert subgroups.subgroups(kind, who, scores, facts, "mm")["View"]["CC"] == {}
    nothing = {name: np.full(len(kind), "") for name in facts}
    assert subgroups.subgroups(kind, who, scores, nothing, "mm") == {}


def test_ratio_is_the_binomial_one_when_each_patient_has_one_patch():
    hit = np.array([1, 1, 1, 0, 1, 0, 1, 1, 0, 1.0])
    value, low, high = controls.ratio(hit, np.ones(10), np.arange(10))
    half = 1.959964 * math.sqrt(0.7 * 0.3 / 9)
    assert (value, low, high) == pytest.approx((0.7, 0.7 - half, 0.7 + half), abs=1e-6)
    wider = controls.ratio(np.tile(hit, 2), np.ones(20), np.tile(np.arange(10), 2))
    assert wider == pytest.approx((value, low, high))  # copies make no evidence
    assert controls.ratio([1, 1.0], [1, 1], [0, 1]) == (1, 1, 1)


def test_90_percent_of_normal_patches_lie_under_the_threshold_and_ties_do_not():
    scores = np.array([np.arange(12) / 12, np.repeat([0.2, 0.9], 6)])
    assert controls.thresholds(scores) == [10 / 12, 0.9]  # 11 of 12, as 10 are fewer than 90%
    assert ((scores <= np.c_[controls.thresholds(scores)]).mean(axis=1) >= 0.9).all()


def test_readings_by_hand():
    """Thresholds of each seed are given, not found in the test scores; benign patches are none."""
    kind = np.array(["normal"] * 4 + ["malignant_mass"] * 2 + ["benign_mass"])
    who = np.array(list("aabbcdd"))
    p = np.array([[0.1, 0.3, 0.6, 0.7, 0.65, 0.9, 0.5], [0.1, 0.1, 0.1, 0.9, 0.95, 0.2, 0.5]])
    found = controls.readings(kind, who, {"x": p}, {"x": np.array([[0.62], [0.15]])})["x"]
    assert found["sensitivity"][0] == pytest.approx((2 + 2) / 4)
    assert found["specificity"][0] == pytest.approx((3 + 3) / 8)
    y = np.array([0, 0, 0, 0, 1, 1])
    assert found["brier"][0] == pytest.approx(((p[:, :6] - y) ** 2).mean())
    gaps = [0.1 + 0.3 + (0.6 + 0.65 - 1) + 0.7 + 0.1]  # 0.6 and 0.65 share a bin
    gaps += [0.1 + 0.1 + 0.1 + (0.9 + 0.95 - 1) + 0.8]
    assert found["ece"] == pytest.approx(sum(gaps) / 2 / 6)
    assert sum(n for *_, n in found["bins"]) == 12
    limits = np.array([[0.62] * 4 + [0.99] * 3, [0.15] * 7])  # of two folds
    found = controls.readings(kind, who, {"x": p}, {"x": limits})["x"]
    assert found["sensitivity"][0] == pytest.approx((0 + 2) / 4)


def test_calibration_error_of_calibrated_and_of_constant_scores():
    who, share = np.arange(400) // 2, np.repeat([0.25, 0.75], 200)
    y = np.concatenate([np.arange(200) % 4 == 0, np.arange(200) % 4 > 0])
    kind = np.where(y, "malignant_mass", "normal")
    scores = {"calibrated": share[None], "half": np.full((1, 400), 0.5), "sure": y[None] * 1.0}
    scores["all"] = np.full((1, 400), 1.0)
    found = controls.readings(kind, who, scores, dict.fromkeys(scores, np.array([[0.5]])))
    eces = [found[name]["ece"] for name in scores]
    assert eces == pytest.approx([0, 0, 0, 0.5])
    briers = [found[name]["brier"][0] for name in scores]
    assert briers == pytest.approx([0.1875, 0.25, 0, 0.5])
    assert found["calibrated"]["bins"] == [pytest.approx([v, v, 200]) for v in (0.25, 0.75)]
    fewer = np.r_[0:200, 200:240]
    some = {"half": scores["half"][:, fewer]}
    found = controls.readings(kind[fewer], who[fewer], some, {"half": np.array([[0.5]])})["half"]
    assert found["ece"] == pytest.approx(0.5 - 80 / 240)
    # Of two folds whose errors are opposite, a quarter each: they do not cancel.
    fold, limit = np.repeat(["a", "b"], 200), {"half": np.array([[0.5]])}
    half = {"half": scores["half"]}
    assert controls.readings(kind, who, half, limit)["half"]["ece"] == pytest.approx(0)
    assert controls.readings(kind, who, half, limit, fold)["half"]["ece"] == pytest.approx(0.25)


def test_thresholds_are_those_of_validation_patches(evaluated):
    """From the models and the validation set; sensitivity again from scores.csv alone."""
    world, out, _ = evaluated
    metrics, cpu = files.read_json(out / "metrics.json"), torch.device("cpu")
    healthy = np.load(world["patch_set"] / "patches/val/normal.npy")
    for run in metrics["runs"]:
        names = [f"{run['regime']} seed {seed}" for seed in run["seeds"]]
        table = files.read_table(out / "scores.csv", ("class", *names))
        ill = np.char.startswith(table["class"], "malignant")
        shares = []
        for seed, limit, name in zip(run["seeds"], run["thresholds"], names, strict=True):
            folder = world["baseline"].parent / run["run"] / f"seed-{seed}"
            scores = train.classifier_scores(train.load_classifier(folder, cpu)[0], healthy, cpu)
            assert np.mean(scores <= limit) >= 0.9 > np.mean(scores < limit)
            shares.append(np.mean(table[name][ill].astype(float) > limit))
        found = metrics["readings"][run["regime"]]["sensitivity"]
        assert found[0] == pytest.approx(np.mean(shares)) and found[1] <= found[0] <= found[2]
    html = (out / "report.html").read_text()
    assert "training draws half of its patches from cancers" in html
    assert "67% of these test patches are malignant" in html  # 80 of 120


def test_subgroups_stand_in_metrics_and_report(evaluated):
    _, out, _ = evaluated
    found = files.read_json(out / "metrics.json")["subgroups"]
    assert set(found) == {
        "Longest side of the lesion",
        "View",
        "Normal patches of",
        "Breast density",
    }
    table = files.read_table(out / "scores.csv", ("class", "view", "patient"))
    at = (table["view"] == "CC") & (table["class"] == "normal")
    assert found["View"]["CC"]["negative_patients"] == len(set(table["patient"][at]))
    html = (out / "report.html").read_text()
    for said in ("women with a malignant finding", ">MLO</th>", "<i>Breast density</i>"):
        assert said in html
    assert "Blob control (50%)" in html and "<b>Few test patients.</b> " in html
    assert "Blob control</" not in html
    assert "so what is hard or easy about them partly cancels" in html.replace("\n", " ")


def test_a_patch_set_without_image_uids_has_no_subgroups(tmp_path):
    kinds = ("normal", "malignant_mass")
    counts = {f"{split}/{kind}": 30 for split in sources.SPLITS for kind in kinds}
    patches = write_data(tmp_path / "data", counts, patients=22)
    rows = sources.csv_rows(patches / "manifest.csv", sources.MANIFEST_COLUMNS)
    rows = [row.values() for _, row in rows]
    files.write_table(patches / "manifest.csv", sources.MANIFEST_COLUMNS, rows)
    run = write_run(tmp_path / "run", patches, 0.5)
    report.evaluate(patches, run, [], [], tmp_path / "out")
    assert files.read_json(tmp_path / "out" / "metrics.json")["subgroups"] == {}
    html = (tmp_path / "out" / "report.html").read_text()
    assert "<code>prepare</code> again with the same options" in html


def test_flow_counts_images_patients_and_reasons_without_names(evaluated, tmp_path):
    world, out, _ = evaluated
    flow = files.read_json(out / "metrics.json")["flow"]
    assert flow["images_left_out"] == 3 and flow["reasons"] == [["..: Rows is ..; expected ..", 3]]
    uids = files.read_table(world["patch_set"] / "manifest.csv", ("image_uid",))["image_uid"]
    assert flow["images"] == len(set(uids.tolist()))
    assert flow["patients"] == 36
    reasons = ["box 1, 2.5, 30, 4 in air, no mirror or swap fits", "no place for test/normal"]
    reasons += ["box 7, 8, 9, 10 in air, no mirror or swap fits"]
    data = write_data(tmp_path / "data", {"test/normal": 4}, 2)
    rows = [(f"{k}.dcm", reason) for k, reason in enumerate(reasons)]
    files.write_table(data / "excluded.csv", ("image_path", "reason"), rows)
    expected = [("box .. in air, no mirror or swap fits", 2), ("no place for test/normal", 1)]
    assert patchset.flow(data)["reasons"] == expected
    assert "expected .." in (out / "report.html").read_text()


def test_a_class_with_few_test_patients_is_a_warning(evaluated):
    metrics = files.read_json(evaluated[1] / "metrics.json")
    assert "Few test patients" in report.report(metrics, evaluated[1])
    for table in filter(None, metrics["conditions"].values()):
        table |= {"positive_patients": 20, "negative_patients": 20}
    assert "Few test patients" not in report.report(metrics, evaluated[1])


# --- More of synthetic sets ---


def test_precision_recall_density_coverage_of_identical_and_disjoint_clouds():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 6))
    same = controls.alike(x, x.copy())
    assert same == pytest.approx({"precision": 1, "recall": 1, "density": 1, "coverage": 1})
    assert set(controls.alike(x, x + 50).values()) == {0}
    one = controls.alike(x, x[:1] + 1e-6 * rng.normal(size=(200, 6)))  # one mode of many
    assert one["precision"] == 1 and one["recall"] < 0.05 and one["coverage"] < 0.1
    part = np.concatenate([x[:100], x[:100] + 50])  # half of what is made is good
    assert controls.alike(x, part)["precision"] == 0.5
    fresh = controls.alike(x, rng.normal(size=(200, 6)))
    assert fresh["density"] == pytest.approx(1, abs=0.2) and fresh["coverage"] > 0.9


def test_density_by_hand():
    """On a line, k = 1: balls of 1, 1 and 3 about 0, 1 and 4."""
    real, fake = np.array([[0.0], [1], [4]]), np.array([[0.5], [1.5], [10]])
    found = controls.alike(real, fake, k=1)
    # 0.5 lies in the balls of 0 and 1; 1.5 in those of 1 and 4; balls of 1, 1 and 8.5 about them
    expected = {"precision": 2 / 3, "density": 4 / 3, "coverage": 1.0, "recall": 1.0}
    assert found == pytest.approx(expected)


def test_duplicates_are_found_within_a_set():
    rng = np.random.default_rng(0)
    training, fake = rng.normal(size=(100, 6)), rng.normal(size=(100, 6))
    assert controls.duplicates(fake, training) < 0.1
    copies = np.concatenate([fake[:60], fake[:40] + 1e-3])
    assert controls.duplicates(copies, training) == pytest.approx(0.8, abs=0.05)


def test_warnings_of_a_set_stay_when_it_cannot_be_compared(evaluated):
    world, _, _ = evaluated
    syn = patchset.open_synthetic(world["synthetic"][0])
    config = files.read_json(syn.path / "config.json")
    splits = {s: patchset.Patches.open(world["patch_set"], s) for s in sources.SPLITS}
    splits["val"] = patchset.Patches.open(world["patch_set"], "val", "normal")
    with pytest.MonkeyPatch.context() as patch:
        read = lambda path: config | {"warnings": ["acceptance is low"]}  # noqa: E731
        patch.setattr(controls.files, "read_json", read)
        control, _ = controls.control_of(syn, splits, None, torch.device("cpu"), 0)
    assert control["warnings"][0] == "acceptance is low"
    assert control["warnings"][1].startswith("Not compared: fewer than three patients")


def test_controls_hold_what_they_are_compared_by(evaluated):
    for control in files.read_json(evaluated[1] / "metrics.json")["controls"]:
        found = [control[name] for name in controls.ALIKE]
        floor = [control[f"floor_{name}"] for name in controls.ALIKE]
        assert found != floor and max(floor) > 0 and 0 <= control["duplicates"] <= 1
    assert "Density (real training)" in (evaluated[1] / "report.html").read_text()


# --- Folds and external test, of the same ---


def test_folds_pool_subgroups_and_keep_their_thresholds(folds, tmp_path):
    report.evaluate_folds(folds, tmp_path / "cv")
    metrics = files.read_json(tmp_path / "cv" / "metrics.json")
    parts = [files.read_json(fold / "metrics.json") for fold in folds]
    cc = metrics["subgroups"]["View"]["CC"]
    alone = [part["subgroups"]["View"]["CC"] for part in parts]
    assert cc["patients"] == sum(part["patients"] for part in alone)
    for k in (0, 1):
        aucs = [part["rows"][k]["auc"] for part in alone]
        assert cc["rows"][k]["fold_aucs"] == pytest.approx(aucs)
    tables = [files.read_table(f / "scores.csv", ("class", "size")) for f in folds]
    sizes = [t["size"][t["class"] == "malignant_mass"].astype(float) for t in tables]
    cut = np.quantile(np.concatenate(sizes), (1 / 3, 2 / 3), method="inverted_cdf")
    names = metrics["subgroups"]["Longest side of the lesion"]
    assert f"up to {cut[0]} mm" in names and f"over {cut[1]} mm" in names
    for name, found in metrics["readings"].items():
        for value in ("sensitivity", "specificity"):  # each fold has 24 patches of a class
            own = [part["readings"][name][value][0] for part in parts]
            assert found[value][0] == pytest.approx(np.mean(own))
    html = (tmp_path / "cv" / "report.html").read_text()
    assert "Images used" in html and "of each fold" in html and "<i>View</i>" in html


def test_external_test_needs_sets_whose_generators_never_saw_it(folds, tmp_path):
    root = folds[0].parent
    other = write_data(tmp_path / "other", FEW, 8, "other-", source="t")
    line = (root / "data", root / "baseline", [root / "aug"])
    with pytest.raises(ValueError, match="50% w/ decay was trained with a mass set that is not gi"):
        report.evaluate(*line, [], tmp_path / "out", test=other)
    syn = shutil.copytree(root / "mass", tmp_path / "mass")
    facts = files.read_json(syn / "config.json")
    uid = patchset.Patches.open(other, "test").column("image_uid")[0]
    for seen, source, message in (
        ({"images": [str(uid)]}, "s", f"trained on 1 of split test, such as image_uid {uid}"),
        ({"patients": ["other-test-03"]}, "t", "split test, such as patient_id other-test-03"),
        ({"patients": ["other-test-03"]}, "s", None),  # of another source: another patient
        ({"images": ["other-val0-0"]}, "s", None),  # validation patches of it test nothing
    ):
        gan = facts["gan"] | {"source": source} | seen
        files.write_json(syn / "config.json", facts | {"gan": gan | {"data": "of a third"}})
        sets = [patchset.open_synthetic(syn)]
        regimes = evaluate.open_regimes(*line[1:], patchset.fingerprint(line[0]))
        regimes[1].config["synthetic"][0]["fingerprint"] = sets[0].fingerprint
        if message:
            with pytest.raises(ValueError, match=message):
                provenance.check_generators(other, regimes, sets)
        else:
            provenance.check_generators(other, regimes, sets)


if __name__ == "__main__":  # the ten data sets for R, see PROC
    rows = [(k, *row) for k in range(10) for row in zip(*with_ties(k), strict=True)]
    sys.stdout.write(
        "set,y,a,b\n" + "".join(f"{k},{y},{float(a)!r},{float(b)!r}\n" for k, y, a, b in rows)
    )
