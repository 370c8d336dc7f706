"""Speed of DeLong's test against the plain midrank loop in Python, and how it grows with n.

    python benchmarks/bench_evaluate.py

Prints Markdown: time of both on 200,000 cases and six models (best of three, the same covariances
asserted), then time from 1,000 to 1,000,000 cases with time / (n log2 n), which should stay level.
"""

import math
import platform
import sys
import time
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evaluate


def midranks(values: np.ndarray) -> np.ndarray:
    """Sun and Xu 2014 as public implementations have it: a while loop over runs of ties."""
    order = np.argsort(values)
    z, n = values[order], len(values)
    ranks = np.zeros(n)
    i = 0
    while i < n:
        j = i
        while j < n and z[j] == z[i]:
            j += 1
        ranks[i:j] = 0.5 * (i + j - 1) + 1
        i = j
    found = np.empty(n)
    found[order] = ranks
    return found


def loop_delong(y: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Covariance of the AUCs from midranks within positives, within negatives, and pooled."""
    m, n = y.sum(), (~y).sum()
    v10, v01 = [], []
    for row in scores:
        pooled = midranks(np.concatenate([row[y], row[~y]]))
        v10.append((pooled[:m] - midranks(row[y])) / n)
        v01.append(1 - (pooled[m:] - midranks(row[~y])) / m)
    return np.cov(v10) / m + np.cov(v01) / n


def our_delong(y: np.ndarray, scores: np.ndarray) -> np.ndarray:
    return evaluate.delong_covariance(y, evaluate.placements(y, scores))


def cases(n: int, models: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores in float64 with ties: rounded to five decimals."""
    rng = np.random.default_rng(seed)
    y = rng.random(n) < 0.4
    return y, np.round(rng.normal(size=(models, n)) + 1.2 * y, 5)


def best_of(repeats: int, function, *arguments) -> tuple[float, np.ndarray]:
    """Shortest wall time in seconds, and the result."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function(*arguments)
        times.append(time.perf_counter() - start)
    return min(times), result


@click.command(help=__doc__)
@click.option("--cases", "number", default=200_000, help="Cases of the comparison.")
@click.option("--models", default=6, help="Models of the comparison.")
@click.option("--repeats", default=3, help="The best of so many runs counts.")
def main(number: int, models: int, repeats: int) -> None:
    click.echo(f"{platform.machine()}, NumPy {np.__version__}, Python {platform.python_version()}")
    y, scores = cases(number, models)
    ours, covariance = best_of(repeats, our_delong, y, scores)
    loop, expected = best_of(repeats, loop_delong, y, scores)
    np.testing.assert_allclose(covariance, expected, rtol=1e-9)
    click.echo(f"\n| {number:,} cases, {models} models | s | ratio |\n|---|---|---|")
    click.echo(f"| plain midrank loop | {loop:.3f} | 1.0 |")
    click.echo(f"| evaluate | {ours:.3f} | **{loop / ours:.1f}** |")
    click.echo(f"\n| cases, {models} models | s | ns / (n log2 n) a model |\n|---|---|---|")
    for n in (1_000, 10_000, 100_000, 1_000_000):
        seconds, _ = best_of(repeats, our_delong, *cases(n, models))
        click.echo(f"| {n:,} | {seconds:.4f} | {seconds * 1e9 / models / n / math.log2(n):.2f} |")


if __name__ == "__main__":
    main()
