#!/usr/bin/env python3
"""How fast `synthesize` is, against the generator's forward pass alone.

    python benchmarks/bench_synthesize.py [--device auto|cpu|cuda] [--patch-size 256] [-n 256]

Made-up patches and a generator of the paper's size whose last layers are set by hand, so that it
marks bright tissue and most attempts are accepted; what weights it holds does not change its time.
"""

import dataclasses
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models
import train
from models import Generator
from postprocess import BATCH, synthesize_set
from support.files import write_json, write_table
from support.patchset import Patches, fingerprint, patch_config
from support.runs import CHECKPOINT_FORMAT, choose_device

TINY = {  # a generator for tests, beside `write_run`
    "patch_size": 64,
    "g_base": 4,
    "g_center": 64,
    "sn_g": False,
    "spacing_mm": 0.28,
}


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
    encoder, *_ = G.encoder.values()
    *_, (first, second) = G.decoder.values()
    skip = first.in_channels - 1 - encoder.out_channels  # behind the decoder's own channels
    for layer, channel, bias, weight in (
        (encoder, 0, 1.0, 1.0),
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
    for i, block in enumerate(G.decoder.values()):
        for layer in block:
            layer.weight[0, 0] = 1 if i == 0 else 1 / 9
            layer.bias[0] = -8 if i == 0 else 0
    G.to_lesion.weight[0, 0] = gain


def write_run(run: Path, data: Path, task="mass", lesion=bright, gain=1.0, **config) -> None:
    """A finished GAN run with a generator whose last layers are set by hand."""
    config = dataclasses.asdict(train.GAN_PRESETS["paper"]) | config
    config |= {"task": task, "seed": 0, "data": fingerprint(data)}
    config |= {"spacing_mm": patch_config(data)["spacing_mm"]}
    for fact, name in (("images", "image_uid"), ("patients", "patient_id")):
        config |= {fact: sorted(set(Patches.open(data, "train").column(name).tolist()))}
    G = models.generator(config)
    with torch.no_grad():
        lesion(G, gain)
        for _ in range(5):  # the power iterations of spectral normalisation
            G.train()(torch.zeros(1, 1, G.patch_size, G.patch_size))
    run.mkdir(parents=True)
    state = {"format": CHECKPOINT_FORMAT, "watch": {"chosen": G.state_dict()}}
    torch.save(state, run / "checkpoint.pt")
    Image.new("L", (8, 8), 200).save(run / "gan.png")
    write_json(run / "config.json", {"command": "train-gan", "config": config, "complete": True})


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
        )


@click.command()
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--patch-size", default=256, show_default=True)
@click.option("-n", default=256, show_default=True, help="Samples.")
def main(device: str, patch_size: int, n: int) -> None:
    whole(patch_size, n, choose_device(device))


if __name__ == "__main__":
    main()
