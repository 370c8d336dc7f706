"""What needs a GPU, prepared so that one lent for a few minutes can be used at once.

    python benchmarks/gpu.py --data DATA --out OUT       # DATA: mamgan.py prepare --preset cbis
    python benchmarks/gpu.py --dry-run --out OUT         # every part on the CPU, at tiny size

Each part runs in a process of its own with its own time limit (PARTS) and rewrites OUT/PART.json
after each measurement, so that a limit or a crash loses only what is left; OUT/gpu.md shows all
there is. Given again, parts that ended are skipped; those that failed are run again.

    correctness   CPU against GPU: forward passes, losses, penalty, gradients; resume; out of memory
    throughput    the shipped loop at preset paper against the plain one; memory, profile, hours
    classifier    patches a second, share of the time spent waiting for data
    gan           preset cbis, its whole schedule compressed to what fits, then a synthetic set
    compile       whether CUDA graphs or torch.compile pay for G's update
"""

import contextlib
import copy
import dataclasses
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import click
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
import train
from benchmarks import bench_gan
from models import COMBINED, discriminator_loss, generator_loss, gradient_penalty
from support import phantom, runs
from support.files import read_json, replace_file
from support.watch import Watch

ROOT = Path(__file__).resolve().parents[1]
PARTS = {  # time limits in seconds: on a GPU, of the dry run
    "correctness": (60, 60),
    "throughput": (150, 90),
    "classifier": (60, 40),
    "gan": (270, 90),
    "compile": (60, 60),
}
RESERVE = (30, 55)  # of the GAN's limit, for starting programs and the synthetic set
LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}  # relative errors that are meant
GAN, CLASSIFIER = ("cbis", "tiny"), ("cbis", "tiny")  # presets: on a GPU, of the dry run
SPEEDUP, WAITING = 4.0, 0.05  # what is meant: times the plain loop; share of time for data
LOG_EVERY = 100  # steps between looks, in what a whole schedule is said to take


class Part(NamedTuple):
    """What the functions of a part work with."""

    out: Path
    data: Path | None
    device: torch.device
    dry: bool
    end: float  # of its time, by time.monotonic()
    results: dict

    def measure(self, name: str, function: Callable, *arguments: object) -> object:
        """Keep what the function returns, or how it failed, on disk at once."""
        start = time.monotonic()
        try:
            value = self.results[name] = function(*arguments)
        except Exception:
            value, self.results[name] = None, {"failed": traceback.format_exc()}
        self.results.setdefault("seconds", {})[name] = round(time.monotonic() - start, 2)
        self.keep()
        return value

    def keep(self, status: str = "running") -> None:
        self.results["status"] = status
        write(self.out, self.results)

    def left(self) -> float:
        return self.end - time.monotonic()


def write(file: Path, results: dict) -> None:
    with replace_file(file, "w") as opened:
        json.dump(results, opened, indent=1)  # in the order of the measurements


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# --- correctness ---


def inputs(config: train.GanConfig, n: int) -> dict[str, Tensor]:
    """Random patches and noise for one update of D and of G."""
    rng, side = torch.Generator().manual_seed(0), config.patch_size
    G = models.generator(dataclasses.asdict(config) | {"sn_g": False})
    made = {"z": G.sample_noise(n, rng), "delta": torch.rand(n, 1, side, side, generator=rng)}
    for name in ("source", "real", "benign", "normal"):
        coarse = torch.empty(n, 1, side // 8, side // 8).uniform_(-1, 1, generator=rng)
        made[name] = nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    return made


def networks(config: train.GanConfig) -> tuple[nn.Module, nn.Module]:
    """As training starts with, but with attention switched on: at gamma = 0 nothing reaches it."""
    pair = train.networks(config, torch.device("cpu"))
    with torch.no_grad():
        for module in (m for network in pair for m in network.modules()):
            if isinstance(module, models.SelfAttention):
                module.gamma.fill_(0.1)
    return pair


def quantities(G, D, x: dict[str, Tensor], autocast) -> dict[str, dict[str, Tensor]]:
    """Groups of tensors of one step, computed as train.train_gan does; G and D stay as they are."""
    G, D = copy.deepcopy(G), copy.deepcopy(D)
    weights = dict(D.named_parameters())

    def gradients(loss: Tensor, of: dict) -> dict[str, Tensor]:
        found = torch.autograd.grad(loss, list(of.values()), retain_graph=True, allow_unused=True)
        return {name: g for name, g in zip(of, found, strict=True) if g is not None}

    with torch.no_grad(), autocast:
        made = G(x["source"], x["z"])
    with autocast, parametrize.cached():
        shown = torch.cat([x["real"], made[:, COMBINED], x["benign"], x["normal"]])
        logits = D(shown).chunk(4)
        penalty = gradient_penalty(D, x["real"], delta=x["delta"])
    loss_D = discriminator_loss(*logits) + penalty
    groups = {
        "G: lesions": {"lesion": made[:, :1]},
        "D: logits": {"logits": torch.cat(logits)},
        "penalty": {"penalty": penalty},
        "D: gradients": gradients(loss_D, weights),
        "D: gradients of the penalty alone": gradients(penalty, weights),
    }
    D.requires_grad_(False)
    with autocast:
        loss_G = generator_loss(D(G(x["source"], x["z"])[:, COMBINED]))
    groups["losses"] = {"D": loss_D, "G": loss_G}
    groups["G: gradients"] = gradients(loss_G, dict(G.named_parameters()))
    return {k: {n: t.detach().cpu() for n, t in group.items()} for k, group in groups.items()}


def relative_errors(found: dict, reference: dict) -> dict[str, tuple[float, float, str]]:
    """By group: norm of the difference over norm, the worst of its tensors, that one's name.

    The worst of those that hold at least a hundredth of the norm: a bias before a softmax has no
    gradient but rounding.
    """
    errors = {}
    for group, tensors in reference.items():
        norms = {
            name: ((found[group][name].double() - t.double()).norm(), t.double().norm())
            for name, t in tensors.items()
        }
        difference, norm = torch.tensor(list(norms.values())).square().sum(0).sqrt().tolist()
        each = {name: float(d / n) for name, (d, n) in norms.items() if n >= 0.01 * norm}
        worst = max(each, key=each.get)
        errors[group] = difference / norm, each[worst], worst
    return errors


def compared(config: train.GanConfig, n: int, device: torch.device) -> list[dict]:
    """float32 on the CPU against the other ways to compute the same; without a GPU bfloat16.

    In bfloat16 on the CPU n must be odd: oneDNN 3.12 (torch 2.14) is wrong in convolutions of 2, 4
    or 8 channels with kernels as large as the map, which the double backward consists of.
    """
    G, D = networks(config)
    x, cpu = inputs(config, n), torch.device("cpu")
    ways = {"CPU bfloat16": (cpu, torch.bfloat16, "bfloat16", True)}
    if device.type == "cuda":
        ways = {"GPU float32": (device, torch.float32, "float32", False)}
        ways["GPU float32, TF32"] = (device, torch.float32, "bfloat16", True)
        ways["GPU bfloat16"] = (device, torch.bfloat16, "bfloat16", True)

    def computed(where: torch.device, dtype: torch.dtype, tf32: bool) -> dict:
        moved = {name: t.to(where) for name, t in x.items()}
        autocast = torch.autocast(where.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
        with allowed_tf32(tf32):
            return quantities(*(copy.deepcopy(m).to(where) for m in (G, D)), moved, autocast)

    reference, rows = computed(cpu, torch.float32, True), []
    for way, (where, dtype, limit, tf32) in ways.items():
        errors = relative_errors(computed(where, dtype, tf32), reference)
        for group, (error, worst, name) in errors.items():
            row = {"way": way, "group": group, "relative error": error, "limit": LIMITS[limit]}
            row["within"] = error <= LIMITS[limit]
            rows.append(row | {"worst tensor": worst, "its name": name})
    return rows


@contextlib.contextmanager
def allowed_tf32(allowed: bool):
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def resumed(device: torch.device, steps: int = 12) -> dict:
    """A run that SIGTERM stopped and that went on, against one that was not; and that one again."""
    stages = {"iters_base": steps // 3, "iters_fade": steps // 3, "iters_final": steps // 3}
    config = dataclasses.replace(train.GAN_PRESETS["tiny"], **stages, log_every=3, save_every=5)
    original = runs.Run.steps

    def interrupted(run, total, by=1):
        for step in original(run, total, by):
            if step == steps // 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield step

    def weights(run: Path) -> Tensor:
        state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
        return torch.cat([t.flatten().float() for net in "GD" for t in state[net].values()])

    with tempfile.TemporaryDirectory() as folder:
        data = bench_gan.random_patches(Path(folder) / "data", config.patch_size, 40)
        runs_of = {name: Path(folder) / name for name in ("whole", "again", "stopped")}
        with mock.patch.object(runs.Run, "steps", interrupted):
            try:
                train.train_gan(config, data, runs_of["stopped"], device)
                return {"failed": "SIGTERM did not stop the run"}
            except KeyboardInterrupt:
                pass
        for run in runs_of.values():
            train.train_gan(config, data, run, device)
        whole, again, stopped = map(weights, runs_of.values())
    return {
        "steps": steps,
        "largest difference, stopped and resumed": float((stopped - whole).abs().max()),
        "largest difference, the same run twice": float((again - whole).abs().max()),
        "largest weight": float(whole.abs().max()),
    }


NO_MEMORY = """
import sys
from unittest import mock
import torch
import mamgan, train
text = "CUDA out of memory. Tried to allocate 20.00 MiB.\\nmore lines"
if torch.cuda.is_available():
    torch.cuda.set_per_process_memory_fraction(0.01)
else:
    train.networks = mock.Mock(side_effect=torch.OutOfMemoryError(text))
mamgan.cli.main(sys.argv[1:])
"""


def out_of_memory(device: torch.device) -> dict:
    """What the command says when the card is too small: one message, no traceback."""
    with tempfile.TemporaryDirectory() as folder:
        preset = "paper" if device.type == "cuda" else "tiny"
        side = train.GAN_PRESETS[preset].patch_size
        data = bench_gan.random_patches(Path(folder) / "data", side, 16)
        options = ["--preset", preset, "--data", data, "--run", Path(folder) / "run"]
        done = command("train-gan", "--task", "mass", *options, program=("-c", NO_MEMORY))
    message = done.stderr.strip()
    good = done.returncode == 1 and "--batch-size" in message and "Traceback" not in message
    return {"exit code": done.returncode, "one clear message": good, "message": message}


def command(*arguments: object, program=(str(ROOT / "mamgan.py"),), limit: float | None = None):
    """A command of mamgan.py, in a process of its own; asked to stop when the limit is over."""
    line, pipe = [sys.executable, *program, *map(str, arguments)], subprocess.PIPE
    with subprocess.Popen(line, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            texts = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.terminate()  # it saves and stops
            texts = process.communicate()
    print(texts[1][-2000:], texts[0][-1000:], file=sys.stderr)
    return subprocess.CompletedProcess(line, process.returncode, *texts)


def correctness(part: Part) -> None:
    device, presets = part.device, train.GAN_PRESETS
    part.measure("64 px, batch 3", compared, presets["tiny"], 3, device)
    if part.dry:
        sn = dataclasses.replace(presets["tiny"], sn_d=True)
        part.measure("64 px, spectral normalisation of D, batch 3", compared, sn, 3, device)
    else:
        part.measure("paper, batch 2", compared, presets["paper"], 2, device)
    part.measure("resume", resumed, device)
    part.measure("out of memory", out_of_memory, device)


# --- throughput ---


def unsaved(run: runs.Run) -> None:
    run.saved = True


@contextlib.contextmanager
def clocked(device: torch.device, warm: int, steps: int, flops: bool = False, save: bool = False):
    """Yields seconds of one step, one look and one save of the loops of train.py run inside.

    They must take `warm + steps + 2` steps. save: else nothing is saved at all
    """
    figures, originals = {}, (runs.Run.steps, Watch.look, Watch.draw, runs.Run.save)
    counter = bench_gan.FlopCounter()

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
                if flops:
                    counter.__enter__()
            elif flops and i == warm + steps + 1:
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


def shipped(config, data: Path, device, steps: int, half: bool, **more: bool) -> dict:
    """Seconds of a step, a look and a save of the shipped loop in one stage; memory, FLOPs."""
    warm = max(2, steps // 3)
    short = bench_gan.schedule(config, warm + steps + 2, half)
    short = dataclasses.replace(short, log_every=10**6)
    with tempfile.TemporaryDirectory() as folder, clocked(device, warm, steps, **more) as figures:
        train.train_gan(short, data, Path(folder) / "run", device)
    if device.type == "cuda":
        figures["peak GiB with the look"] = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.empty_cache()
    return figures


def plain(config, data: Path, device, steps: int, half: bool, tf32: bool) -> dict:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with contextlib.ExitStack() as stack:
        if not tf32:
            stack.enter_context(allowed_tf32(False))
        times = bench_gan.plain(config, data, device, steps, half)
    figures = {"step": sorted(times)[len(times) // 2]}
    if device.type == "cuda":
        figures["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.empty_cache()
    return figures


def schedule_seconds(config: train.GanConfig, half: dict, full: dict) -> float:
    """What the whole schedule takes, with its looks and saves."""
    steps = config.iters_base * half["step"] + (config.steps - config.iters_base) * full["step"]
    looks = config.steps / config.log_every * full["look"]
    return steps + looks + config.steps / config.save_every * (full["draw"] + full.get("save", 0))


def throughput(part: Part) -> None:
    device, gpu = part.device, part.device.type == "cuda"
    config = train.GAN_PRESETS["tiny" if part.dry else "paper"]
    if part.dry:
        config = dataclasses.replace(config, batch_size=2)
    steps, few = (4, 3) if part.dry else (24, 9)
    part.results["what"] = f"{config.patch_size} px, batch {config.batch_size} of each class"
    rate = part.measure("bf16 product FLOP/s", bench_gan.matrix_product_rate, device) if gpu else 0
    with tempfile.TemporaryDirectory() as folder:
        count = 4 * config.batch_size
        data = bench_gan.random_patches(Path(folder) / "data", config.patch_size, count)
        figures = {}
        for stage, half in (("full", False), ("half", True)):
            common = (config, data, device)
            name = f"{stage} size, shipped"
            flags = {"flops": True, "save": stage == "full"}
            ours = part.measure(name, lambda c=common, h=half, f=flags: shipped(*c, steps, h, **f))
            figures[stage] = ours
            name = f"{stage} size, plain float32 (TF32 as torch sets it)"
            eager = part.measure(name, plain, *common, few, half, True)
            if ours and eager:
                images = 3 * config.batch_size  # real ones that D sees in a step
                row = {"images / s": images / ours["step"], "plain": images / eager["step"]}
                row["times the plain loop"] = eager["step"] / ours["step"]
                row["at least 4 times"] = row["times the plain loop"] >= SPEEDUP
                row["GFLOP / image"] = ours["flops"] / images / 1e9
                if rate:
                    row["share of the bf16 product rate"] = ours["flops"] / ours["step"] / rate
                part.results[f"{stage} size"] = row
                part.keep()
        if all(figures.values()):
            hours = schedule_seconds(config, figures["half"], figures["full"]) / 3600
            part.results["hours"] = {"steps": config.steps, "the preset's schedule": hours}
            part.keep()
        if gpu:
            torch.backends.cudnn.benchmark = True
            name = "full size, shipped, cudnn.benchmark"
            part.measure(name, shipped, config, data, device, steps, False)
            torch.backends.cudnn.benchmark = False
        exact = "full size, plain float32, TF32 off"
        eager = part.measure(exact, plain, config, data, device, few, False, False)
        if eager and figures["full"]:
            gain = eager["step"] / figures["full"]["step"]
            part.results["full size"]["times the plain loop without TF32"] = gain
        float32 = dataclasses.replace(config, bfloat16=False)
        for tf32 in (True, False) if gpu else ():
            name = f"full size, shipped in float32, TF32 {'on' if tf32 else 'off'}"
            with allowed_tf32(tf32):
                part.measure(name, shipped, float32, data, device, few, False)
        with mock.patch.object(runs.Run, "save", unsaved):
            part.measure("where the time goes", bench_gan.where_time_goes, config, data, device, 30)


# --- classifier ---


def classifier(part: Part) -> None:
    preset = CLASSIFIER[part.dry]
    config = dataclasses.replace(train.CLASSIFIER_PRESETS[preset], weights="none")
    batch, (warm, steps) = config.batch_size, (3, 5) if part.dry else (10, 30)

    def rate() -> dict:
        samples = (warm + steps + 2) * batch
        short = dataclasses.replace(config, samples=samples, evaluate_every=samples)
        times, original = [], train.validation_auc

        def validation(*arguments) -> float:
            start = time.perf_counter()
            auc = original(*arguments)
            times.append(time.perf_counter() - start)
            return auc

        with (
            tempfile.TemporaryDirectory() as folder,
            clocked(part.device, warm, steps) as figures,
            mock.patch.object(train, "validation_auc", validation),
        ):
            train.train_classifier(short, part.data, Path(folder) / "run", [], part.device)
        return figures | {"patches / s": batch / figures["step"], "validation": times[0]}

    found = part.measure("a few steps", rate)
    if not found:
        return

    def trained() -> dict:
        looks, start = 4, 12  # and seconds until the program trains
        seconds = max(3, 0.8 * (part.left() - start - looks * found["validation"]))
        samples = max(looks * batch, int(seconds * found["patches / s"]) // batch * batch)
        run = part.out.parent / "classifier-run"
        shutil.rmtree(run, ignore_errors=True)
        options = ["--samples", samples, "--evaluate-every", samples // looks]
        options += ["--data", part.data, "--run", run, "--device", part.device.type]
        done = command("train-cls", "--preset", preset, "--weights", "none", *options)
        rows = runs.read_log(run)
        seconds = sum(row["seconds"] for row in rows)
        share = rows[-1]["seconds_waiting"] / seconds
        row = {"exit code": done.returncode, "samples": rows[-1]["samples_seen"]}
        row |= {"patches / s, validation included": row["samples"] / seconds}
        row |= {"share of time waiting for data": share, "at most 5%": share <= WAITING}
        return row | {"validation AUC": [r["val_auc"] for r in rows]}

    part.measure("train-cls", trained)


# --- gan ---


def gan(part: Part) -> None:
    preset = GAN[part.dry]
    config = train.GAN_PRESETS[preset]
    common, steps = (config, part.data, part.device), 3 if part.dry else 30
    half = part.measure("half size, a few steps", lambda: shipped(*common, steps, True))
    full = part.measure("full size, a few steps", lambda: shipped(*common, steps, False, save=True))
    if not (half and full):
        return

    def trained() -> dict:
        seconds = 0.85 * (part.left() - RESERVE[part.dry])
        fits = min(1.0, seconds / schedule_seconds(config, half, full))
        short = {name: int(fits * getattr(config, name)) for name in STAGES}
        minute = int(sum(short.values()) * 60 / max(60, seconds))
        every = {"log_every": min(config.log_every, max(5, minute // 10)), "save_every": minute}
        options = [f"--{k.replace('_', '-')}={v}" for k, v in (short | every).items()]
        options += ["--data", part.data, "--run", run, "--device", part.device.type]
        shutil.rmtree(run, ignore_errors=True)
        start = time.monotonic()
        limit = part.left() - RESERVE[part.dry] / 2
        done = command("train-gan", "--preset", preset, "--task", "mass", *options, limit=limit)
        rows, took = runs.read_log(run), time.monotonic() - start
        row = {"exit code": done.returncode, "share of the preset's steps": fits, **short, **every}
        seconds = sum(r["seconds"] for r in rows)
        row |= {"seconds": took, "steps / s": rows[-1]["step"] / seconds}
        row |= {"share of time waiting for data": rows[-1]["seconds_waiting"] / seconds}
        row["acceptance of fixed patches"] = [r["acceptance"] for r in rows][-12:]
        return row | {"last row of the log": rows[-1]}

    def synthesized() -> dict:
        out = part.out.parent / "synthetic-mass"
        shutil.rmtree(out, ignore_errors=True)
        options = ["--gan", run, "--data", part.data, "--out", out, "-n", 200]
        done = command("synthesize", *options, "--device", part.device.type)
        row = {"exit code": done.returncode, "said": (done.stdout + done.stderr).strip()[-600:]}
        if done.returncode == 0:
            made = read_json(out / "config.json")
            row |= {k: made[k] for k in ("attempts", "accepted", "acceptance", "area_median")}
        return row

    run = part.out.parent / "gan-mass"
    part.measure("train-gan", trained)
    part.measure("synthesize", synthesized)


STAGES = ("iters_base", "iters_fade", "iters_final")


# --- compile ---


def generator_update(part: Part, preset: str) -> Callable[[], None]:
    """Milliseconds of G's update: eager, as one CUDA graph; returns what measures it compiled."""
    config, device, gpu = train.GAN_PRESETS[preset], part.device, part.device.type == "cuda"
    if part.dry:
        config = dataclasses.replace(config, batch_size=1)
    G, D = train.networks(config, device)
    D.requires_grad_(False)
    fused = {"fused": True, "capturable": gpu}
    opt = torch.optim.Adam(G.parameters(), lr=config.g_lr, **fused, **train.ADAM)
    shape = (config.batch_size, 1, config.patch_size, config.patch_size)
    source = torch.empty(shape, device=device).uniform_(-1, 1)
    z = torch.empty(len(source), G.noise_size, device=device).uniform_(-1, 1)

    def loss(source: Tensor, z: Tensor) -> Tensor:
        # A graph must not rest on weights that autocast cast before it was captured.
        with torch.autocast(device.type, torch.bfloat16, enabled=gpu, cache_enabled=False):
            return generator_loss(D(G(source, z)[:, COMBINED]))

    def update(loss: Callable) -> None:
        opt.zero_grad()
        loss(source, z).backward()
        opt.step()

    def milliseconds(function: Callable, *arguments) -> float:
        n = 2 if part.dry else 30
        for _ in range(1 if part.dry else 5):
            function(*arguments)
        synchronize(device)
        start = time.perf_counter()
        for _ in range(n):
            function(*arguments)
        synchronize(device)
        return 1000 * (time.perf_counter() - start) / n

    def graphed() -> float:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                update(loss)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        opt.zero_grad()
        with torch.cuda.graph(graph):
            update(loss)
        return milliseconds(graph.replay)

    def compiled() -> float:
        kind = {} if gpu else {"backend": "aot_eager"}  # the dry run: no time for a compiler
        return milliseconds(update, torch.compile(loss, **kind))

    def measured(name: str, function: Callable) -> None:
        took = part.measure(f"{preset}, {name}, ms", function)
        if took and eager:
            part.results[f"{preset}, {name}, times eager"] = eager / took
            part.keep()

    eager = part.measure(f"{preset}, eager, ms", milliseconds, update, loss)
    if gpu:
        measured("CUDA graph", graphed)
    return lambda: measured("torch.compile", compiled)


def compile_(part: Part) -> None:
    presets = ("tiny",) if part.dry else ("paper", "cbis")
    for compiled in [generator_update(part, preset) for preset in presets][::-1]:
        compiled()


# --- All of it ---

FUNCTIONS = dict(zip(PARTS, (correctness, throughput, classifier, gan, compile_), strict=True))


def dry_data(out: Path) -> Path:
    """A small patch set of phantoms."""
    manifest, keys = phantom.write_phantoms(out / "phantoms", patients=10), ("train", "val")
    counts = [f"{key}/{name}={n}" for key, n in zip(keys, (32, 16), strict=True) for name in KINDS]
    counts += [f"test/{name}=1" for name in KINDS] + ["train/benign_mass=32"]
    options = [word for count in counts for word in ("--count", count)]
    done = command("prepare", manifest, "--out", out / "patches", "--preset", "tiny", *options)
    if done.returncode:
        raise click.ClickException(done.stderr)
    return out / "patches"


KINDS = ("normal", "malignant_mass")


def facts(device: torch.device) -> dict:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    cpu = f"{os.cpu_count()} cores, {platform.machine()}, {torch.get_num_threads()} threads"
    return {"device": name, "host": cpu, "torch": torch.__version__}


def markdown(out: Path) -> str:
    """All results there are."""
    lines = ["# GPU", ""]

    def shown(value: object) -> str:
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        return text.replace("\n", " ").replace("|", "\\|")

    def table(rows: list[dict]) -> None:
        lines.extend([f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0])])
        lines.extend(f"| {' | '.join(map(shown, row.values()))} |" for row in rows)

    for part in PARTS:
        if not (out / f"{part}.json").exists():
            continue
        results = read_json(out / f"{part}.json")
        lines += [f"## {part}", ""]
        simple = {k: v for k, v in results.items() if not isinstance(v, dict | list)}
        long = {k: v for k, v in simple.items() if "\n" in str(v)}
        table([{"": k, " ": v} for k, v in simple.items() if k not in long])
        for name, value in results.items():
            if name in long or name not in simple:
                lines += ["", f"### {name}", ""]
            if name in long:
                lines += ["```", str(value), "```"]
            elif isinstance(value, dict) and "failed" in value:
                lines += ["failed:", "```", value["failed"], "```"]
            elif isinstance(value, dict):
                table([{"": k, " ": v} for k, v in value.items()])
            elif isinstance(value, list):
                table(value)
        lines.append("")
    return "\n".join(lines)


def run_part(name: str, out: Path, data: Path | None, device: str, limit: float, dry: bool) -> None:
    """The part in a process of its own, which is ended at its limit with all that it started."""
    line = [sys.executable, __file__, "--inside", "--part", name, "--out", out, "--device", device]
    line += (["--data", data] if data else []) + (["--dry-run"] if dry else [])
    process = subprocess.Popen(list(map(str, line)), start_new_session=True)
    status = "whole"
    try:
        if code := process.wait(limit):
            status = f"failed: exit code {code}"
    except subprocess.TimeoutExpired:
        status = f"ended at its limit of {limit} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    file = out / f"{name}.json"
    results = read_json(file) if file.exists() else {}
    failed = [k for k, v in results.items() if isinstance(v, dict) and "failed" in v]
    if failed and status == "whole":
        status = f"failed: {', '.join(failed)}"
    write(file, results | {"status": status})


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="Patch set of --preset cbis.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of results.")
@click.option("--part", "parts", type=click.Choice(list(PARTS)), multiple=True, help="Only these.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--dry-run", is_flag=True, help="On the CPU, at tiny size.")
@click.option("--inside", is_flag=True, hidden=True)
def main(data, out, parts, device, dry_run, inside) -> None:
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    device = "cpu" if dry_run else device
    parts = [name for name in PARTS if name in (parts or PARTS)]
    if inside:
        chosen = runs.choose_device(device)
        end = time.monotonic() + PARTS[parts[0]][dry_run] - 3  # it was longer in starting
        part = Part(out / f"{parts[0]}.json", data, chosen, dry_run, end, facts(chosen))
        part.keep()
        FUNCTIONS[parts[0]](part)
        return
    if {"gan", "classifier"} & set(parts):
        if dry_run:
            data = dry_data(out)
        elif data is None:
            raise click.UsageError("--data: expected a patch set of prepare --preset cbis")
    for name in parts:
        file = out / f"{name}.json"
        if file.exists() and not read_json(file)["status"].startswith(("failed", "running")):
            click.echo(f"{name}: there already")
            continue
        start = time.monotonic()
        data_ = data and data.resolve()
        run_part(name, out, data_, device, PARTS[name][dry_run], dry_run)
        click.echo(f"{name}: {read_json(file)['status']} after {time.monotonic() - start:.0f} s")
        (out / "gpu.md").write_text(markdown(out), encoding="utf-8")
    click.echo(f"Results: {out / 'gpu.md'}")
    failed = [n for n in parts if read_json(out / f"{n}.json")["status"].startswith("failed")]
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
