"""What needs a GPU, in one command that a few minutes suffice for.

    python benchmarks/gpu.py --data DATA --out OUT       # DATA: mamgan.py prepare --preset cbis
    python benchmarks/gpu.py --dry-run --out OUT         # every part on the CPU, at tiny size

Each part runs in a process of its own with its own time limit (PARTS) and rewrites OUT/PART.json
after each measurement, so that a limit or a crash loses only what is left; OUT/gpu.md shows all
there is. Given again, parts that ended are skipped; those that failed are run again.

    correctness   CPU against GPU: forward passes, losses, penalty, gradients; CUDA graphs; resume;
                  out of memory
    throughput    the shipped loop at preset paper against the plain one; memory, profile, hours
    classifier    patches a second, share of the time spent waiting for data
    gan           preset cbis, its whole schedule compressed to what fits, then a synthetic set
"""

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import signal
import statistics
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from benchmarks import bench_gan, bench_memory, check_gpu
from benchmarks.bench_gan import STAGES, clocked, schedule_seconds, shipped, unsaved
from support import phantom, runs
from support.files import read_json, replace_file

ROOT = Path(__file__).resolve().parents[1]
PARTS = {  # time limits in seconds: on a GPU, of the dry run
    "correctness": (120, 100),
    "throughput": (150, 90),
    "classifier": (60, 75),
    "gan": (270, 90),
}
RESERVE = (30, 55)  # of the GAN's limit, for starting programs and the synthetic set
GAN, CLASSIFIER = ("cbis", "tiny"), ("cbis", "tiny")  # presets: on a GPU, of the dry run
SPEEDUP, WAITING = 4.0, 0.05  # what is meant: times the plain loop; share of time for data


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

    def keep(self, **more: object) -> None:
        self.results.update(more, status="running")
        write(self.out, self.results)

    def left(self) -> float:
        return self.end - time.monotonic()


def write(file: Path, results: dict) -> None:
    with replace_file(file, "w") as opened:
        json.dump(results, opened, indent=1)  # in the order of the measurements


# --- correctness ---


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
    part.measure("64 px, batch 3", check_gpu.compared, presets["tiny"], 3, device)
    sn = dataclasses.replace(presets["tiny"], sn_d=True)
    part.measure("64 px, spectral norm of D, batch 3", check_gpu.compared, sn, 3, device)
    part.measure("graphs", check_gpu.graphed, device)
    part.measure("resume", check_gpu.resumed, device)
    part.measure("out of memory", check_gpu.out_of_memory, device, command)
    if not part.dry:  # last: the CPU's side takes long
        part.measure("paper, batch 1", check_gpu.compared, presets["paper"], 1, device)


# --- throughput ---


def plain(config, data: Path, device, steps: int, half: bool) -> dict:
    times = bench_gan.plain(config, data, device, steps, half)
    return {"step": statistics.median(times)}


def throughput(part: Part) -> None:
    device, gpu = part.device, part.device.type == "cuda"
    config = train.GAN_PRESETS["tiny" if part.dry else "paper"]
    config = dataclasses.replace(config, batch_size=2) if part.dry else config
    steps, few, images = *((4, 3) if part.dry else (24, 9)), 3 * config.batch_size
    part.results["what"] = f"{config.patch_size} px, batch {config.batch_size} of each class"
    rate = part.measure("bf16 product FLOP/s", bench_gan.matrix_product_rate, device) if gpu else 0
    with tempfile.TemporaryDirectory() as folder:
        data = bench_gan.random_patches(Path(folder) / "data", config.patch_size, 2 * images)
        common, figures = (config, data, device), {}
        for stage in ("full", "half"):
            name, save = f"{stage} size, shipped", stage == "full"
            ours = part.measure(name, shipped, *common, steps, stage, True, save)
            name = f"{stage} size, plain float32 (TF32 as torch sets it)"
            eager = part.measure(name, plain, *common, few, stage == "half")
            if ours and eager:
                gain, figures[stage] = eager["step"] / ours["step"], ours
                row = {"real images / s": images / ours["step"], "plain": images / eager["step"]}
                row |= {"times the plain loop": gain, "at least 4 times": gain >= SPEEDUP}
                row |= {"GFLOP / real image": ours["flops"] / images / 1e9}
                row["share of the bf16 product rate"] = rate and ours["flops"] / ours["step"] / rate
                part.keep(**{f"{stage} size": row})
        figures["fade"] = part.measure("fade, shipped", shipped, *common, few, "fade")
        if len(figures) == 3 and figures["fade"]:
            hours = schedule_seconds(config, figures) / 3600
            part.keep(**{f"hours for {config.steps} steps": hours})
        part.measure("bytes by arithmetic", bench_memory.gan, config, config.batch_size, gpu)
        if gpu:
            torch.backends.cudnn.benchmark = True
            part.measure("full size, shipped, cudnn.benchmark", shipped, *common, steps, "full")
            torch.backends.cudnn.benchmark = False
            with check_gpu.allowed_tf32(False):
                part.measure("full size, plain float32, TF32 off", plain, *common, few, False)
        float32 = (dataclasses.replace(config, bfloat16=False), data, device, few, "full")
        for tf32 in (True, False) if gpu else ():
            with check_gpu.allowed_tf32(tf32):
                part.measure(f"full size, shipped in float32, TF32 {tf32}", shipped, *float32)
        with mock.patch.object(runs.Run, "save", unsaved):
            part.measure("where the time goes", bench_gan.where_time_goes, *common, 30)


# --- classifier ---


def classifier(part: Part) -> None:
    preset = CLASSIFIER[part.dry]
    config = dataclasses.replace(train.CLASSIFIER_PRESETS[preset], weights="none")
    batch, (warm, steps) = config.batch_size, (3, 5) if part.dry else (10, 30)

    def rate() -> dict:
        samples = (warm + steps + 2) * batch
        short = dataclasses.replace(config, samples=samples, evaluate_every=samples)
        with tempfile.TemporaryDirectory() as folder, clocked(part.device, warm, steps) as figures:
            train.train_classifier(short, part.data, Path(folder) / "run", [], part.device)
        return figures | {"patches / s": batch / figures["step"]}

    if not (found := part.measure("a few steps", rate)):
        return

    def trained() -> dict:
        looks, start = 4, 45 if part.dry else 12  # and seconds until the program trains
        seconds = max(3, 0.5 * (part.left() - start))
        samples = max(looks * batch, int(seconds * found["patches / s"]) // batch * batch)
        run = part.out.parent / "classifier-run"
        shutil.rmtree(run, ignore_errors=True)
        options = ["--samples", samples, "--evaluate-every", samples // looks]
        options += ["--data", part.data, "--run", run, "--device", part.device.type]
        line, limit = ("train-cls", "--preset", preset, "--weights", "none"), part.left() - 6
        done = command(*line, *options, limit=limit)
        rows = runs.read_log(run)
        seconds = sum(row["seconds"] for row in rows)
        share = rows[-1]["seconds_waiting"] / seconds
        row = {"exit code": done.returncode, "samples": (seen := rows[-1]["samples_seen"])}
        row |= {"patches / s, validation included": seen / seconds}
        row |= {"share of time waiting for data": share, "at most 5%": share <= WAITING}
        return row | {"validation AUC": [r["val_auc"] for r in rows]}

    part.measure("train-cls", trained)


# --- gan ---


def gan(part: Part) -> None:
    preset = GAN[part.dry]
    config = train.GAN_PRESETS[preset]
    few = (config, part.data, part.device, 3 if part.dry else 30)
    figures = {s: part.measure(f"{s}, a few steps", shipped, *few, s, False, True) for s in STAGES}
    if not all(figures.values()):
        return

    def trained() -> dict:
        seconds = 0.85 * (part.left() - RESERVE[part.dry])
        fits = min(1.0, seconds / schedule_seconds(config, figures))
        short = {name: int(fits * getattr(config, name)) for name in STAGES.values()}
        minute = max(1, int(sum(short.values()) * 60 / max(60, seconds)))
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
        row |= {"said": done.stderr[-600:] if done.returncode else ""}
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


# --- All of it ---

FUNCTIONS = dict(zip(PARTS, (correctness, throughput, classifier, gan), strict=True))


def dry_data(out: Path) -> Path:
    """A small patch set of phantoms."""
    manifest, keys = phantom.write_phantoms(out / "phantoms", patients=10), ("train", "val")
    counts = [f"{key}/{name}={n}" for key, n in zip(keys, (32, 16), strict=True) for name in KINDS]
    counts += [f"test/{name}=1" for name in KINDS] + ["train/benign_mass=32"]
    counts += [f"train/{name}=1" for name in ("malignant_calcification", "benign_calcification")]
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

    for part in [name for name in PARTS if (out / f"{name}.json").exists()]:
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
    if failed := [k for k, v in results.items() if isinstance(v, dict) and "failed" in v]:
        status = f"failed: {', '.join(failed)}; {status}"
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
        run_part(name, out, data and data.resolve(), device, PARTS[name][dry_run], dry_run)
        click.echo(f"{name}: {read_json(file)['status']} after {time.monotonic() - start:.0f} s")
        (out / "gpu.md").write_text(markdown(out), encoding="utf-8")
    click.echo(f"Results: {out / 'gpu.md'}")
    failed = [n for n in parts if read_json(out / f"{n}.json")["status"].startswith("failed")]
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
