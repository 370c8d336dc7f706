#!/usr/bin/env python3
"""How fast `synthesize` is: post-processing against whole-patch scipy, all of it against G alone.

    python benchmarks/bench_synthesize.py [--device auto|cpu|cuda] [--patch-size 256] [-n 256]

Made-up patches and a generator of the paper's size whose last layers are set by hand, so that it
marks bright tissue and most attempts are accepted; what weights it holds does not change its time.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # per core; set before numpy is loaded

import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from models import Generator
from postprocess import CHUNK, isolate_lesion, synthesize_set
from support.files import write_json, write_table
from support.patchset import fingerprint
from support.runs import CHECKPOINT_FORMAT, choose_device
from train import BATCH

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def plain_chain(lesion, removal=False, scale=1.0):
    """The paper's steps as whole-patch scipy calls: (weights, object), or None when discarded."""
    found = lesion < -0.1 if removal else lesion > 0.1
    labels, count = ndimage.label(found)
    if not count:
        return None
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    if areas.max() < 0.1 * lesion.size:
        return None
    kept = labels == areas.argmax()
    grown = ndimage.distance_transform_edt(~kept) <= 5 * scale
    return ndimage.gaussian_filter(grown.astype(np.float64), 10 * scale), kept


def tissue(seed: int, side: int) -> np.ndarray:
    """A made-up patch (S, S) in [-1, 1]: dark, with one bright spot and fine texture."""
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[:side, :side] / side
    row, col = rng.uniform(0.3, 0.7, 2)
    height, width = rng.uniform(0.18, 0.32, 2)
    spot = np.exp(-(((rows - row) / height) ** 2) - ((cols - col) / width) ** 2)
    texture = ndimage.gaussian_filter(rng.standard_normal((side, side)), side / 40)
    return np.clip(0.9 * spot - 0.6 + 0.1 * texture / texture.std(), -1, 1).astype(np.float32)


def write_patch_set(data: Path, side: int, counts: dict[str, int], splits: dict[str, str]) -> None:
    """A finished patch set as `prepare` writes it, of made-up tissue."""
    config = {"patch_size": side, "spacing_mm": 0.07 * 256 / side, "seed": 0}
    edges = ("row0", "col0", "row1", "col1")
    columns = ("patch", "image_uid", "patient_id", *edges, "scale", "flip", "rotation", "seed")
    columns += ("tissue", *(f"bbox_{edge}" for edge in edges))
    for key, count in counts.items():
        path = data / "patches" / f"{key}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        patches = np.stack([tissue(i, side) for i in range(count)])
        np.save(path, np.rint((patches + 1) * 32767.5).astype(np.uint16))
        own = [patient for patient, split in splits.items() if split == key.split("/")[0]]
        rows = [
            (i, f"{i:016x}", own[i % len(own)], 0, 0, side, side, 1.0, 0, 0, i, 1.0, *[""] * 4)
            for i in range(count)
        ]
        write_table(path.with_suffix(".csv"), columns, rows)
    write_table(data / "splits.csv", ("patient_id", "split"), splits.items())
    facts = {"command": "prepare", "config": config, "counts": counts, "complete": True}
    write_json(data / "config.json", facts)


def bright(G: Generator, gain: float) -> None:
    """Make the lesion gain * relu(input + 0.3), every second pixel twice; z is left aside.

    The input reaches the last decoder block through the first skip; spectral normalisation leaves
    the single 1 of each kernel alone (and would undo another gain).
    """
    first, second = G.decoder[-1]
    skip = first.in_channels - 1 - G.encoder[0].out_channels  # behind the decoder's own channels
    for layer, channel, bias, weight in (
        (G.encoder[0], 0, 1.0, 1.0),
        (first, skip, 0.0, 1.0),
        (second, 0, -0.7, 1.0),
        (G.to_lesion, 0, 0.0, gain),
    ):
        normalised = getattr(layer, "parametrizations", None)
        kernel = normalised.weight.original if normalised else layer.weight
        kernel.zero_()
        layer.bias.zero_()
        kernel[0, channel, kernel.shape[2] // 2, kernel.shape[3] // 2] = weight
        layer.bias[0] = bias


def square(G: Generator, gain: float) -> None:
    """Make the lesion a blurred square in the middle, on any input (without normalisation).

    A sum over 3 x 3 of a constant is 9 but at the border, where the padding is zero.
    """
    for parameter in G.parameters():
        parameter.zero_()
    G.compress.bias[0] = 1
    for i, block in enumerate(G.decoder):
        for layer in block:
            layer.weight[0, 0] = 1 if i == 0 else 1 / 9
            layer.bias[0] = -8 if i == 0 else 0
    G.to_lesion.weight[0, 0] = gain


def write_run(run: Path, data: Path, task="mass", lesion=bright, gain=1.0, **config) -> None:
    """A finished GAN run with a generator whose last layers are set by hand."""
    config = {"patch_size": 256, "g_base": 16, "g_center": 2048, "sn_g": True} | config
    config |= {"task": task, "seed": 0, "data": fingerprint(data)}
    G = Generator(config["patch_size"], config["g_base"], config["g_center"], config["sn_g"])
    with torch.no_grad():
        lesion(G, gain)
        for _ in range(5):  # the power iterations of spectral normalisation
            G.train()(torch.zeros(1, 1, G.patch_size, G.patch_size))
    run.mkdir(parents=True)
    torch.save({"format": CHECKPOINT_FORMAT, "chosen": G.state_dict()}, run / "checkpoint.pt")
    Image.new("L", (8, 8), 200).save(run / "gan.png")
    write_json(run / "config.json", {"command": "train-gan", "config": config, "complete": True})


def seconds(work, repeat: int = 5) -> float:
    """Processor time of the fastest of some runs after one to warm up."""
    work()
    times = []
    for _ in range(repeat):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def postprocessing(side: int) -> None:
    lesions = [np.maximum(tissue(seed, side) + 0.3, 0) for seed in range(64)]
    lesions = [lesion for lesion in lesions if isolate_lesion(lesion) is not None]
    scale = side / 256
    worst = max(
        np.abs(isolate_lesion(lesion).weights - plain_chain(lesion, scale=scale)[0]).max()
        for lesion in lesions
    )
    torch.set_num_threads(1)
    ours = seconds(lambda: [isolate_lesion(lesion) for lesion in lesions]) / len(lesions)
    plain = seconds(lambda: [plain_chain(lesion, scale=scale) for lesion in lesions]) / len(lesions)
    area = np.mean([isolate_lesion(lesion).area for lesion in lesions]) / side**2
    click.echo(
        f"post-processing, {side} px, objects of {area:.0%} of the patch on average, one core: "
        f"{1 / ours:.0f} patches/s against {1 / plain:.0f} of whole-patch scipy calls: "
        f"{plain / ours:.1f} times (target 3); largest difference {worst:.1e} (target 1e-6)"
    )


def whole(side: int, n: int, device: torch.device) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data, run = Path(folder) / "data", Path(folder) / "run"
        write_patch_set(data, side, {"train/normal": 64}, {"a": "train"})
        write_run(run, data, patch_size=side, spacing_mm=None)
        start = time.perf_counter(), time.process_time()
        facts = synthesize_set(run, data, Path(folder) / "out", n=n, device=device.type)
        total = time.perf_counter() - start[0], time.process_time() - start[1]
        attempts = -(-facts["attempts"] // BATCH) * BATCH
        G = Generator(side).to(device).eval()
        x = torch.from_numpy(np.stack([tissue(i, side) for i in range(BATCH)]))[:, None].to(device)

        @torch.inference_mode()
        def forward(batches: int) -> None:
            for _ in range(batches):
                G(x)[:, 0].cpu()

        forward(1)  # to warm up
        start = time.perf_counter(), time.process_time()
        forward(attempts // BATCH)
        alone = time.perf_counter() - start[0], time.process_time() - start[1]
        click.echo(
            f"synthesize, {side} px, {device.type}, {n} samples from {facts['attempts']} attempts: "
            f"{total[0]:.1f} s; the generator's forward pass alone {alone[0]:.1f} s: "
            f"{total[0] / alone[0]:.2f} times, in processor time {total[1] / alone[1]:.2f} times"
            + (" (target 1.3)" if device.type == "cpu" else " (reported)")
        )


@click.command()
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--patch-size", default=256, show_default=True)
@click.option("-n", default=2 * CHUNK, show_default=True, help="Samples of the whole command.")
def main(device: str, patch_size: int, n: int) -> None:
    threads = torch.get_num_threads()
    postprocessing(patch_size)
    torch.set_num_threads(threads)
    whole(patch_size, n, choose_device(device))


if __name__ == "__main__":
    main()
