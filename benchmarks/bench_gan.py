"""Speed of `train-gan` against the same networks in a plain eager float32 loop with a DataLoader.

    python benchmarks/bench_gan.py --preset tiny --device cpu
    python benchmarks/bench_gan.py --preset paper --device cuda   # --dry-run works without a GPU

Prints a Markdown table: steps and images per second of both loops, memory, FLOPs (of the shipped
loop, counted at dispatch, double backward included), on a GPU the share of the bfloat16
matrix-product rate measured on the same card and where the time goes, and the time for the preset's
schedule. A step of the shipped loop includes its share of the looks and saves, timed once each.
Patches are random numbers: the arithmetic does not depend on them.
"""

import contextlib
import dataclasses
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import click
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import models
import train
from support import runs
from support.files import write_table
from support.patchset import Patches
from support.watch import Watch

# docs/configs.md of StyleGAN3, "Old StyleGAN2-ADA configurations", 256 px on one GPU. The FLOPs are
# our estimate, from its convolutions: G 30 and D 31 GFLOP forward; an image costs 4 G and 8 D, and
# 9% more for the two regularisers.
STYLEGAN2_ADA = "12.5 s (one A100) or 20.8 s (one V100) per 1,000, about 400 GFLOP per real image"


def random_patches(out: Path, side: int, count: int) -> Path:
    """A patch set of noise in the format of `prepare`."""
    keys = [f"{split}/{name}" for split in ("train", "val") for name in data.CLASSES]
    rng = np.random.default_rng(0)
    with runs.claim_folder(out, "prepare", {"patch_size": side, "spacing_mm": None}):
        for key in keys:
            file = out / "patches" / f"{key}.npy"
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, rng.integers(0, 65536, (count, side, side), dtype=np.uint16))
            rows = [(f"image {k}", f"woman {k}") for k in range(count)]
            write_table(file.with_suffix(".csv"), ("image_uid", "patient_id"), rows)
        (out / "splits.csv").write_text("patient_id,split\n")
        runs.finish_folder(out, counts=dict.fromkeys(keys, count))
    return out


STAGES = {"half": "iters_base", "fade": "iters_fade", "full": "iters_final"}


def schedule(config: train.GanConfig, steps: int, stage: str) -> train.GanConfig:
    """`steps` steps of one stage: half size, the fade to full size, or after it."""
    lengths = dict.fromkeys(STAGES.values(), 0) | {STAGES[stage]: steps}
    return dataclasses.replace(config, **lengths, save_every=10 * steps)


class Samples(Dataset):
    """Samples of [source, real, benign, normal], as a user would write them."""

    def __init__(self, folder: Path, task: str):
        self.pools = [Patches.open(folder, "train", names) for names in data.TASKS[task]]

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, i: int) -> list[torch.Tensor]:
        rng = np.random.default_rng(i)
        drawn = [pool[int(rng.integers(len(pool)))] for pool in self.pools]
        return [torch.from_numpy(data.to_float(patch))[None] for patch in drawn]


def plain_step(config, G, D, opt_G, opt_D, batches, device, half: bool) -> None:
    """One step as the paper's text reads: a pass per class, nothing shared or switched off."""
    size = config.patch_size // 2 if half else config.patch_size
    source, real, benign, normal = (x.to(device) for x in next(batches))
    if half:
        real, benign, normal = (models.down2(x) for x in (real, benign, normal))
    fake = G(source, size=size)[:, 2:].detach()
    loss = models.discriminator_loss(*(D(x, size) for x in (real, fake, benign, normal)))
    loss = loss + models.gradient_penalty(lambda x: D(x, size), real)
    opt_D.zero_grad()
    loss.backward()
    opt_D.step()
    for _ in range(config.g_updates):
        source = next(batches)[0].to(device)
        loss = models.generator_loss(D(G(source, size=size)[:, 2:], size))
        opt_G.zero_grad()
        loss.backward()
        opt_G.step()


def plain(config: train.GanConfig, patches: Path, device, steps: int, half: bool) -> list[float]:
    """Seconds per step of the plain loop, the first third (warm-up) left out."""
    G, D = (
        network.to(memory_format=torch.contiguous_format)
        for network in train.networks(config, device)
    )
    opt_G = torch.optim.Adam(G.parameters(), lr=config.g_lr, **train.ADAM)
    opt_D = torch.optim.Adam(D.parameters(), lr=config.d_lr, **train.ADAM)
    loader = DataLoader(Samples(patches, config.task), batch_size=config.batch_size, num_workers=1)
    batches, times = iter(loader), []
    for _ in range(steps):
        start = time.perf_counter()
        plain_step(config, G, D, opt_G, opt_D, batches, device, half)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[steps // 3 :]


class FlopCounter(TorchDispatchMode):
    """torch's own formulas at dispatch; its FlopCounterMode fails inside autograd.grad."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def unsaved(run: runs.Run) -> None:
    run.saved = True


@contextlib.contextmanager
def clocked(device: torch.device, warm: int, steps: int, flops: bool = False, save: bool = False):
    """Yields seconds of one step, one look and one save of the loops of train.py run inside.

    They must take `warm + steps + 2` steps. save: else nothing is saved at all
    """
    figures, originals = {}, (runs.Run.steps, Watch.look, Watch.draw, runs.Run.save)
    counter = FlopCounter()

    def steps_(run, total, by=1):
        for i, step in enumerate(originals[0](run, total, by)):
            if i in (warm, warm + steps):
                synchronize(device)
            if i == warm:
                figures["step"] = time.perf_counter()
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
            elif i == warm + steps:
                figures["step"] = (time.perf_counter() - figures["step"]) / steps
                if device.type == "cuda":
                    figures["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
            if flops and i == 0:  # later steps may be replayed, which nothing here sees
                counter.__enter__()
            elif flops and i == 1:
                counter.__exit__(None, None, None)
                figures["flops"] = counter.total
            yield step

    def timed(name: str, function: Callable):
        def wrapper(*arguments):
            synchronize(device)
            start = time.perf_counter()
            value = function(*arguments)
            synchronize(device)
            figures[name] = time.perf_counter() - start
            return value

        return wrapper

    with (
        mock.patch.object(runs.Run, "steps", steps_),
        mock.patch.object(Watch, "look", timed("look", originals[1])),
        mock.patch.object(Watch, "draw", timed("draw", originals[2])),
        mock.patch.object(runs.Run, "save", timed("save", originals[3]) if save else unsaved),
    ):
        yield figures


def shipped(config, data: Path, device, steps, stage, flops=False, save=False) -> dict:
    """Seconds of a step, a look and a save of the shipped loop in one stage; memory, FLOPs."""
    # On a GPU the fourth step is recorded as a CUDA graph.
    warm = max(5 if device.type == "cuda" else 2, steps // 3)
    short = schedule(config, warm + steps + 2, stage)
    short = dataclasses.replace(short, log_every=10**6)
    with (
        tempfile.TemporaryDirectory() as folder,
        clocked(device, warm, steps, flops, save) as figures,
    ):
        train.train_gan(short, data, Path(folder) / "run", device)
    if device.type == "cuda":
        figures["peak GiB with the look"] = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.empty_cache()
    return figures


def step_seconds(config: train.GanConfig, figures: dict) -> float:
    """Of a step of the shipped loop with its share of the looks and saves."""
    saving = (figures["draw"] + figures.get("save", 0)) / config.save_every
    return figures["step"] + figures["look"] / config.log_every + saving


def schedule_seconds(config: train.GanConfig, figures: dict[str, dict]) -> float:
    """What the whole schedule takes, by the figures of its stages."""
    return sum(getattr(config, STAGES[s]) * step_seconds(config, figures[s]) for s in figures)


def matrix_product_rate(device) -> float:
    """bfloat16 FLOP/s of a large square product on this card."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(50):
        a @ b
    torch.cuda.synchronize()
    return 50 * 2 * 8192**3 / (time.perf_counter() - start)


def where_time_goes(config: train.GanConfig, patches: Path, device, rows: int = 12) -> str:
    """The operations that take most of ten steps."""
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if device.type == "cuda" else []
    ten = dataclasses.replace(schedule(config, 10, "full"), log_every=100)
    with tempfile.TemporaryDirectory() as folder, profile(activities=activities) as profiler:
        train.train_gan(ten, patches, Path(folder) / "run", device)
    key = f"self_{device.type}_time_total"
    return profiler.key_averages().table(sort_by=key, row_limit=rows, max_name_column_width=60)


@click.command()
@click.option("--preset", type=click.Choice(list(train.GAN_PRESETS)), default="tiny")
@click.option("--task", type=click.Choice(list(data.TASKS)), default="mass")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--steps", type=int, default=60, help="Of each measurement.")
@click.option("--rounds", default=2, help="The two loops take turns so often.")
@click.option("--batch-size", type=int, default=None, help="Per class; default: the preset's.")
@click.option("--threads", type=int, default=None, help="CPU threads (default: torch's).")
@click.option("--profile", "profiled", is_flag=True, help="Print where the time goes.")
@click.option("--dry-run", is_flag=True, help="Everything once, with few steps and one round.")
def main(preset, task, device, steps, rounds, batch_size, threads, profiled, dry_run) -> None:
    config = dataclasses.replace(train.GAN_PRESETS[preset], task=task)
    if dry_run:
        steps, rounds, batch_size = 4, 1, 1
    if batch_size:
        config = dataclasses.replace(config, batch_size=batch_size)
    if threads:
        torch.set_num_threads(threads)
    device = runs.choose_device(device)
    gpu = device.type == "cuda"
    cpu = f"{platform.processor() or platform.machine()} CPU"
    name = torch.cuda.get_device_name() if gpu else cpu
    print(
        f"{preset}, {task}, batch {config.batch_size} per class, torch {torch.__version__}, "
        f"{name}, {torch.get_num_threads()} threads, {steps} steps x {rounds} rounds\n"
    )
    rate = matrix_product_rate(device) if gpu else None
    print(
        "| stage | loop | s / step | steps / s | real images / s | s / 1,000 real images | "
        "GFLOP / real image | share of bf16 product rate | peak GiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    real = 3 * config.batch_size  # real images that D sees in a step
    per_step = {}
    with tempfile.TemporaryDirectory() as folder:
        patches = random_patches(Path(folder) / "data", config.patch_size, 4 * config.batch_size)
        for stage, half in (("half", True), ("full", False)):
            times, peak = {"plain": [], "ours": []}, {}
            for _ in range(rounds):  # in turns: what else runs on the machine meets both
                if gpu:
                    torch.cuda.reset_peak_memory_stats()
                times["plain"] += plain(config, patches, device, steps, half)
                if gpu:
                    peak["plain"] = torch.cuda.max_memory_allocated() / 2**30
                made = shipped(config, patches, device, steps, stage, flops=True, save=True)
                times["ours"].append(step_seconds(config, made))
                flops, peak["ours"] = made["flops"], made.get("peak GiB")
            for loop, values in times.items():
                s = per_step[stage, loop] = statistics.median(values)
                share = f"{flops / s / rate:.0%}" if rate else "not measured"
                memory = f"{peak[loop]:.1f}" if gpu else "not measured"
                print(
                    f"| {stage} size | {loop} | {s:.3f} | {1 / s:.2f} | {real / s:.1f} | "
                    f"{1000 * s / real:.2f} | {flops / real / 1e9:.3f} | {share} | {memory} |"
                )
        times = [per_step["half", "ours"], per_step["full", "ours"]]
        total = config.iters_base * times[0] + (config.iters_fade + config.iters_final) * times[1]
        for stage in ("half", "full"):
            gain = per_step[stage, "plain"] / per_step[stage, "ours"]
            print(f"\n{stage} size: ours is {gain:.2f} times as fast as the plain loop")
        print(
            f"\nThe preset's schedule takes {total / 60:.1f} min. Process peak (CPU memory) "
            f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB."
        )
        print(f"StyleGAN2-ADA needs {STYLEGAN2_ADA}.")
        if profiled:
            print(where_time_goes(config, patches, device))


if __name__ == "__main__":
    main()
