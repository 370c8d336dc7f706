"""A run folder: claimed, resumed, whole or absent; checkpoint, log, stop, processes, progress.

Nothing here is of the paper; the loops of train.py use `Run`, the other commands the folders.
"""

import contextlib
import fcntl
import functools
import io
import json
import math
import os
import re
import signal
import socket
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from support.files import read_json, reading, replace_file, sha256, write_json

CHECKPOINT_FORMAT = "mamgan 3"
LOCKS: set[int] = set()  # folder locks of this process, which forked workers must not keep
LOCK_FILE = ".lock.part"  # where folders cannot be locked


# --- Random numbers: a step's batch and noise follow from (seed, step), whenever it is run ---

BATCH, NOISE, WEIGHTS, FIXED_NOISE = range(4)  # streams that are independent of each other


def numpy_rng(seed: int, step: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([seed, step, stream])


def torch_rng(
    seed: int, step: int, stream: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    number = int(numpy_rng(seed, step, stream).integers(2**63))
    return torch.Generator(device).manual_seed(number)


# --- Folders that are whole or not finished ---


@contextlib.contextmanager
def claim_folder(out: Path, command: str, config: dict) -> Iterator[bool]:
    """Own the output folder `out` of `command` while the block runs; yields True when it is whole.

    The first call writes `out/config.json` ({"command", "config", ...}); a later one with the same
    command and config goes on there. `config` holds JSON values and whatever decides the bytes
    written, and nothing else (no workers, no device).

    A block that fails before it wrote anything leaves an empty folder, free for other options.
    Raises ValueError: another process works there, another command or other options made it, or
    it holds files that are not ours.
    """
    out.mkdir(parents=True, exist_ok=True)
    path, config = out / "config.json", json.loads(json.dumps(config))
    with _locked(out):
        if path.exists():
            existing = read_json(path)
            _check_options(out, existing, {"command": command, "config": config})
            complete = existing.get("complete") is True
            if complete:
                click.echo(f"{out}: complete already", err=True)
        elif foreign := sorted(p.name for p in out.iterdir() if not p.name.endswith(".part")):
            text = "but no config.json; give an empty or a new folder"
            raise ValueError(f"{out}: holds {foreign[0]!r} {text}")
        else:
            complete = False
            write_json(path, {"command": command, "config": config, "complete": False})
        try:
            yield complete
        except Exception:  # nothing was written yet: other options may try in the same folder
            if {p.name for p in out.iterdir()} <= {path.name, LOCK_FILE}:
                path.unlink()
            raise


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """The folder is this process's. Raises ValueError when it is another's."""
    lock, held = os.open(out, os.O_RDONLY), None  # itself is locked: no file to leave behind
    LOCKS.add(lock)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = "another process is writing there; wait for it or give another folder"
            raise ValueError(f"{out}: {text}") from None
        except OSError as error:  # NFS, some of FUSE
            held = _lock_file(out / LOCK_FILE)
            say_once(f"the disk locks no folders ({error.strerror}): {LOCK_FILE} stands for it")
        yield
    finally:
        if held:
            held.unlink(missing_ok=True)
        LOCKS.discard(lock)
        os.close(lock)


def _lock_file(path: Path) -> Path:
    """Create `path`, which names process and host; that of a killed process is taken over."""
    mine = f"{os.getpid()} on {socket.gethostname()}"
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        process, _, host = path.read_text(encoding="utf-8").partition(" on ")
        if not mine.endswith(f" on {host}") or os.kill(int(process), 0) is None:
            text = f"process {process} on {host} is writing there; wait or give another folder"
            raise ValueError(f"{path.parent}: {text}; if it is no more, delete {path}")
    path.unlink(missing_ok=True)
    with open(path, "x", encoding="utf-8") as file:
        file.write(mine)
    return path


@functools.cache
def say_once(text: str) -> None:
    """What holds for several runs of one command."""
    click.echo(text, err=True)


def _check_options(out: Path, existing: dict, wanted: dict) -> None:
    """Raises ValueError that names what differs between the folder's options and those given."""
    if (other := existing.get("command")) != wanted["command"]:
        text = f"made by {other!r}, not by {wanted['command']!r}; give another folder"
        raise ValueError(f"{out}: {text}")
    old, new = existing.get("config"), wanted["config"]
    with reading(out / "config.json"):
        differing = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if differing:
        short = functools.partial(textwrap.shorten, width=80, placeholder=" ...")
        values = ((key, *(short(repr(side.get(key))) for side in (old, new))) for key in differing)
        text = "; ".join(f"{key}: {there} there, {now} now" for key, there, now in values)
        text = re.sub(r"'\w{64}' there, '\w{64}' now", "another one there", text)  # hashes
        advice = "give the same options to go on, or another folder"
        raise ValueError(f"{out}: made with other options ({text}); {advice}")


def finish_folder(out: Path, **facts: object) -> None:
    """Mark a claimed folder whole and add what is known only at the end."""
    write_json(out / "config.json", read_json(out / "config.json") | facts | {"complete": True})


def finished(path: Path, command: str) -> dict:
    """config.json of a whole folder that `command` made. Raises ValueError."""
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; expected one that {command} made")
    existing = read_json(path / "config.json")
    other, config = existing.get("command"), existing.get("config")
    if other != command or not isinstance(config, dict):
        raise ValueError(f"{path}: made by {other!r}; expected a folder made by {command!r}")
    if existing.get("complete") is not True:
        raise ValueError(f"{path}: not finished; run the same {command} command again")
    return existing


# --- Ctrl-C and SIGTERM, progress ---


@contextlib.contextmanager
def signals_held() -> Iterator[Callable[[], bool]]:
    """Yields `stopping()`: True once SIGINT or SIGTERM came. The second one interrupts at once."""
    came = []

    def note(number, frame):
        if came:
            raise KeyboardInterrupt
        came.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def progress(total: int, label: str, done: int = 0, every: float = 15.0) -> Iterator:
    """Yields `advance(n, text="")`: rate and time left in a bar on a terminal, else in lines."""
    start = last = time.monotonic()
    count, terminal = done, sys.stderr.isatty()
    options = {"file": sys.stderr, "hidden": not terminal, "show_pos": True}
    options |= {"show_eta": False, "item_show_func": lambda text: text}  # click's eta counts `done`
    with click.progressbar(length=total, label=label, **options) as bar:

        def advance(n: int = 1, text: str = "") -> None:
            nonlocal count, last
            count, now = count + n, time.monotonic()
            rate = (count - done) / max(now - start, 1e-9)
            text = f"{rate:.1f}/s  {(total - count) / (rate or 1):.0f} s left  {text}".rstrip()
            bar.update(n, current_item=text)
            if not terminal and (now - last >= every or count == total):
                last = now
                click.echo(f"{label}: {count}/{total}  {text}", err=True)

        bar.update(done)
        yield advance


# --- Devices, checkpoints ---


def choose_device(name: str = "auto") -> torch.device:
    """auto: the GPU when there is one. Under torchrun each process takes its own."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: found no usable GPU; give --device cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextlib.contextmanager
def checkpoint(run: Path) -> Iterator[dict]:
    """Yields the state in `run/checkpoint.pt`: tensors and primitives.

    Raises ValueError when it is missing, cut or foreign, or the block can make nothing of it.
    """
    path = run / "checkpoint.pt"
    with reading(path, "delete the run and train again"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state.get("format") != CHECKPOINT_FORMAT:
            raise ValueError(f"expected a checkpoint of format {CHECKPOINT_FORMAT}")
        yield state


def weights_hash(module: nn.Module) -> str:
    """sha256 over names, shapes and values of all weights and buffers: names a network."""
    parts = []
    for name, value in sorted(module.state_dict().items()):
        parts += [f"{name} {tuple(value.shape)} {value.dtype}".encode()]
        parts += [value.detach().cpu().contiguous().numpy().tobytes()]
    return sha256(*parts)


# --- One training ---


class Graph:
    """A function of tensors that is launched as one CUDA graph, not as thousands of kernels.

    Called as `f(stage, *tensors)`, it gives f(*stage, *tensors). After three calls of a stage it
    is recorded and then replayed, so it must do the same at every call, wait for nothing, draw
    nothing, and what it returns holds until the next call. On the CPU, or for several processes
    (which exchange gradients), the function is simply called.
    """

    def __init__(self, function: Callable, run: "Run"):
        self.function, self.stage = function, ()
        self.enabled = run.device.type == "cuda" and run.processes == 1

    def __call__(self, stage: tuple, *tensors: Tensor) -> tuple[Tensor, ...]:
        if not self.enabled:
            return self.function(*stage, *tensors)
        if stage != self.stage:
            self.stage, self.calls, self.graph = stage, 0, None
            self.side = torch.cuda.Stream()  # where it is recorded; the first calls run there too
        self.calls += 1
        if self.calls <= 3:
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                result = self.function(*stage, *tensors)
            torch.cuda.current_stream().wait_stream(self.side)
            return result
        if self.graph is None:
            self.inputs, self.graph = [t.clone() for t in tensors], torch.cuda.CUDAGraph()
            # The thread that reads ahead may pin memory meanwhile.
            with torch.cuda.graph(self.graph, stream=self.side, capture_error_mode="thread_local"):
                self.result = self.function(*stage, *self.inputs)
        for held, given in zip(self.inputs, tensors, strict=True):
            held.copy_(given)
        self.graph.replay()
        return self.result


class ReadAhead:
    """`draw(step)` in a thread, the next step's while one is computed, of `steps` in all."""

    def __init__(self, draw: Callable[[int], Any], steps: int):
        self.draw, self.steps, self.reader = draw, steps, ThreadPoolExecutor(1)
        self.ahead: dict[int, Future] = {}
        self.waited = 0.0  # seconds that training stood still for data

    def at(self, step: int) -> Any:
        start = time.perf_counter()
        drawn = (self.ahead.pop(step, None) or self.reader.submit(self.draw, step)).result()
        if step + 1 < self.steps:
            self.ahead = {step + 1: self.reader.submit(self.draw, step + 1)}
        self.waited += time.perf_counter() - start
        return drawn


class Run:
    """The folder of one training, and the processes that share it (torchrun; else one).

    Everything a stop or a kill must not lose goes through `resume`, `record` and `log`; a run that
    was stopped and started again equals one that was not, bitwise on the CPU.
    """

    def __init__(self, folder: Path, command: str, facts: dict, device: torch.device, seed: int):
        self.folder, self.command, self.facts = folder, command, facts
        self.device, self.seed = device, seed
        self.rank, self.processes = 0, 1
        self.parts: dict = {}
        self.done = 0  # steps that are whole
        self.names: list[str] = []
        self.recorded: list[Tensor] = []  # of each step since the last row of the log
        self.since, self.text = time.time(), ""

    def __enter__(self) -> "Run":
        with contextlib.ExitStack() as stack:
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                if self.device.type == "cuda":
                    torch.cuda.set_device(self.device)
                dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
                stack.callback(dist.destroy_process_group)
                self.rank, self.processes = dist.get_rank(), dist.get_world_size()
            if self.rank == 0:
                stack.enter_context(claim_folder(self.folder, self.command, self.facts))
            self._wait()
            self.stopping = stack.enter_context(signals_held())
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> bool | None:
        return self.stack.__exit__(*error)

    def resume(self, **parts: object) -> None:
        """Take on what has a state_dict, and bring it to where an earlier run was saved."""
        self.parts, log = parts, self.folder / "log.jsonl"
        if (self.folder / "checkpoint.pt").exists():
            with checkpoint(self.folder) as state:
                for name, part in parts.items():
                    part.load_state_dict(state[name])
                self.done, self.names = state["step"], state["names"]
                self.recorded = list(state["recorded"].to(self.device))
        for part in parts.values():
            if isinstance(part, torch.optim.Optimizer):  # the checkpoint may be of another device
                for group in part.param_groups:
                    group["capturable"] = self.device.type == "cuda"  # in a CUDA graph
        if self.rank == 0:
            rows = read_log(self.folder, self.done) if log.exists() else []
            with replace_file(log, "w") as file:  # later rows come again
                file.writelines(json.dumps(row) + "\n" for row in rows)

    def steps(self, total: int, by: int = 1) -> Iterator[int]:
        """The steps left, each of `by` units of `total`; saves and stops when asked to."""
        self.total, self.by, advance = total, by, lambda n, text: None
        if self.rank == 0:
            done = min(self.done * by, total)
            bar = progress(total, f"{self.command} {self.folder.name}", done)
            advance = self.stack.enter_context(bar)
        for step in range(self.done, math.ceil(total / by)):
            self.done, self.saved = step + 1, False
            yield step
            advance(min(by, total - step * by), self.text)
            if self._any(self.stopping()) and self.done * by < total:
                if not self.saved:
                    self.save()
                raise KeyboardInterrupt

    def due(self, every: int) -> bool:
        """Whether this step passes a multiple of `every` units, or is the last."""
        before, after = (self.done - 1) * self.by, self.done * self.by
        return before // every < after // every or after >= self.total

    def rng(self, step: int) -> torch.Generator:
        """The noise of a step, on the device."""
        return torch_rng(self.seed, step, NOISE, self.device)

    def autocast(self, bfloat16: bool) -> torch.autocast:
        """On a GPU; the CPU always computes in float32."""
        enabled = bfloat16 and self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def share(self, batch: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """This process's rows of what all processes draw alike."""
        n = len(batch) // self.processes
        return batch[self.rank * n : (self.rank + 1) * n]

    def update(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        """One step down the gradient of the whole batch."""
        optimizer.zero_grad()
        loss.backward()
        weights = (p for group in optimizer.param_groups for p in group["params"])
        self._average([p.grad for p in weights if p.grad is not None])
        optimizer.step()

    def record(self, **figures: Tensor) -> None:
        """Keep figures of this step, on the device: nothing waits for it."""
        self.names = list(figures)
        self.recorded.append(torch.stack([value.detach().float() for value in figures.values()]))

    def averages(self) -> dict[str, float]:
        """Means of what was recorded since the last call, all finite (else ValueError)."""
        values, self.recorded = self._checked().mean(0).tolist(), []
        return dict(zip(self.names, values, strict=True))

    def log(self, row: dict, text: str = "") -> None:
        """A row of log.jsonl, on disk at once: a checkpoint never lacks a row before it."""
        row = {"step": self.done} | row | {"seconds": round(time.time() - self.since, 3)}
        self.since, self.text = time.time(), text
        if self.rank == 0:
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def save(self) -> None:
        """checkpoint.pt, whole or not at all. Raises ValueError when something is not finite."""
        recorded = self._checked()
        if self.rank == 0:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            state |= {"format": CHECKPOINT_FORMAT, "step": self.done}
            state |= {"names": self.names, "recorded": recorded}
            buffer = io.BytesIO()  # torch would not say that the disk is full
            torch.save(state, buffer)
            with replace_file(self.folder / "checkpoint.pt") as file:
                file.write(buffer.getbuffer())
        self.saved = True
        self._wait()

    def finish(self, **facts: object) -> None:
        """Mark the run whole."""
        versions = {"torch": torch.__version__, "numpy": np.__version__}
        if self.rank == 0:
            finish_folder(self.folder, versions=versions, **facts)

    def _checked(self) -> Tensor:
        """What was recorded (steps, figures), the mean over processes; finite, as are all weights.

        Raises ValueError naming figure and step.
        """
        values = torch.stack(self.recorded or [torch.zeros(len(self.names), device=self.device)])
        self._average([values])
        self.recorded = list(values) if self.recorded else []
        problem = ""
        if bad := (~values.isfinite()).nonzero().tolist():
            step = self.done - len(values) + bad[0][0] + 1
            problem = f"step {step}: {self.names[bad[0][1]]} is {values[*bad[0]].item()}"
        networks = (part for part in self.parts.values() if isinstance(part, nn.Module))
        if not all(p.isfinite().all() for network in networks for p in network.parameters()):
            problem = problem or f"step {self.done}: a weight is not finite"
        if problem:
            advice = "lower the learning rates, in a new folder"
            raise ValueError(f"{problem}; expected finite values; {advice}")
        return values[: len(self.recorded)]

    def _average(self, tensors: list[Tensor]) -> None:
        """Replace each by its mean over the processes."""
        if self.processes > 1 and tensors:
            flat = torch.cat([t.flatten() for t in tensors])
            dist.all_reduce(flat)
            flat /= self.processes
            for t, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                t.copy_(mean.view_as(t))

    def _any(self, flag: bool) -> bool:
        """True in every process when it is in one."""
        if self.processes == 1:
            return flag
        value = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value)

    def _wait(self) -> None:
        if self.processes > 1:
            dist.barrier()


def read_log(run: Path, step: float = math.inf) -> list[dict]:
    """The rows of `run/log.jsonl` up to `step`. Raises ValueError when one is damaged."""
    path = run / "log.jsonl"
    with reading(path, "delete the run and train again"):
        whole = path.read_bytes().rpartition(b"\n")[0]  # the last row may be cut by a kill
        rows = [json.loads(line) for line in whole.splitlines()]
        return [row for row in rows if row["step"] <= step]
