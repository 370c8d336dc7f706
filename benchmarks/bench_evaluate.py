"""Speed of DeLong's test against the plain midrank loop, and how long training waits for data.

    python benchmarks/bench_evaluate.py                  # preset paper on a GPU, tiny on the CPU

Prints Markdown: time of both on 200,000 cases and six models (best of three, the same covariances
asserted); time from 1,000 to 1,000,000 cases with time / (n log2 n), which should stay level; the
share of train-cls that stands still for data, from the loop's own log (noise patches, random
weights, the first half left out as warm-up).
"""

import math
import platform
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import evaluate
import train
from support import files, runs


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


def waiting(device, samples: int, batch: int) -> tuple[str, float, float]:
    """Preset, share of the time that train-cls waits for data, patches per second."""
    preset = "paper" if device.type == "cuda" else "tiny"
    side = data.PREPARE_PRESETS[preset].patch_size
    config = replace(train.CLASSIFIER_PRESETS[preset], weights="none", batch_size=batch)
    config = replace(config, samples=samples, evaluate_every=samples // 2)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        patches, run = Path(folder) / "data", Path(folder) / "run"
        counts = {f"train/{kind}": 1_000 for kind in ("normal", "malignant_mass")}
        counts |= {key.replace("train", "val"): 16 for key in counts}
        with runs.claim_folder(patches, "prepare", {"patch_size": side}):
            for key, n in counts.items():
                (patches / "patches" / key).parent.mkdir(parents=True, exist_ok=True)
                noise = rng.integers(0, 65536, (n, side, side), dtype=np.uint16)
                np.save(patches / "patches" / f"{key}.npy", noise)
            files.write_table(patches / "splits.csv", ("patient_id", "split"), [])
            runs.finish_folder(patches, counts=counts)
        train.train_classifier(config, patches, run, [], device)
        first, second = runs.read_log(run)
    waited = second["seconds_waiting"] - first["seconds_waiting"]
    drawn = second["samples_seen"] - first["samples_seen"]
    return preset, waited / second["seconds"], drawn / second["seconds"]


@click.command(help=__doc__)
@click.option("--cases", "number", default=200_000, help="Cases of the comparison.")
@click.option("--models", "count", default=6, help="Models of the comparison.")
@click.option("--repeats", default=3, help="The best of so many runs counts.")
@click.option("--device", default="auto", help="Of train-cls: auto, cpu or cuda.")
@click.option("--samples", default=0, help="Patches that train-cls draws (25,600; CPU: 1,600).")
@click.option("--batch-size", default=32, help="Of train-cls (Q32).")
def main(number, count, repeats, device, samples, batch_size) -> None:
    click.echo(f"{platform.machine()}, NumPy {np.__version__}, Python {platform.python_version()}")
    y, scores = cases(number, count)
    ours, covariance = best_of(repeats, our_delong, y, scores)
    loop, expected = best_of(repeats, loop_delong, y, scores)
    np.testing.assert_allclose(covariance, expected, rtol=1e-9)
    click.echo(f"\n| {number:,} cases, {count} models | s | ratio |\n|---|---|---|")
    click.echo(f"| plain midrank loop | {loop:.3f} | 1.0 |")
    click.echo(f"| evaluate | {ours:.3f} | **{loop / ours:.1f}** |")
    click.echo(f"\n| cases, {count} models | s | ns / (n log2 n) a model |\n|---|---|---|")
    for n in (1_000, 10_000, 100_000, 1_000_000):
        seconds, _ = best_of(repeats, our_delong, *cases(n, count))
        click.echo(f"| {n:,} | {seconds:.4f} | {seconds * 1e9 / count / n / math.log2(n):.2f} |")
    device = runs.choose_device(device)
    samples = samples or (25_600 if device.type == "cuda" else 1_600)
    preset, share, rate = waiting(device, samples, batch_size)
    side = data.PREPARE_PRESETS[preset].patch_size
    click.echo("\n| train-cls | waits for data | patches/s |\n|---|---|---|")
    click.echo(f"| {preset}, {side} px, {device.type} | **{share:.1%}** | {rate:.0f} |")


if __name__ == "__main__":
    main()
