"""CPU against GPU: one step's figures, resume, and what is said when memory runs out.

benchmarks/gpu.py runs it; without a GPU bfloat16 is compared with float32 on the CPU.
"""

import contextlib
import copy
import dataclasses
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import models
import train
from benchmarks.bench_gan import random_patches
from models import COMBINED, discriminator_loss, generator_loss, gradient_penalty
from support import runs

LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}  # relative errors that are meant


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

    In bfloat16 on the CPU n must be odd: oneDNN 3.12 (torch 2.14) with AMX is wrong in convolutions
    of an even number of channels, up to 14, with kernels as large as the map. The gradient of the
    penalty for D's weights is made of them, with n as channels.
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


def weights_of(run: Path) -> Tensor:
    """All weights and buffers of a run's G and D."""
    state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    return torch.cat([t.flatten().float() for net in "GD" for t in state[net].values()])


def graphed(device: torch.device, steps: int = 8) -> dict:
    """A run whose updates are CUDA graphs against one whose are not, and that one again."""
    stages = {"iters_base": 0, "iters_fade": 0, "iters_final": steps}
    config = dataclasses.replace(train.GAN_PRESETS["tiny"], **stages, bfloat16=False)
    config = dataclasses.replace(config, g_lr=1e-5, d_lr=1e-5)  # rounding does not grow in so few

    class Eager(runs.Graph):
        def __init__(self, function, run):
            super().__init__(function, run)
            self.enabled = False

    weights = []
    with tempfile.TemporaryDirectory() as folder, allowed_tf32(False):
        data = random_patches(Path(folder) / "data", config.patch_size, 40)
        for k, graph in enumerate((runs.Graph, Eager, Eager)):
            with mock.patch.object(train, "Graph", graph):
                train.train_gan(config, data, run := Path(folder) / str(k), device)
            weights.append(weights_of(run))
    recorded, eager, again = weights
    return {
        "steps": steps,
        "largest difference, graphs and eager": float((recorded - eager).abs().max()),
        "largest difference, eager twice": float((again - eager).abs().max()),
    }


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

    with tempfile.TemporaryDirectory() as folder:
        data = random_patches(Path(folder) / "data", config.patch_size, 40)
        runs_of = {name: Path(folder) / name for name in ("whole", "again", "stopped")}
        with mock.patch.object(runs.Run, "steps", interrupted):
            try:
                train.train_gan(config, data, runs_of["stopped"], device)
                return {"failed": "SIGTERM did not stop the run"}
            except KeyboardInterrupt:
                pass
        for run in runs_of.values():
            train.train_gan(config, data, run, device)
        whole, again, stopped = map(weights_of, runs_of.values())
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


def out_of_memory(device: torch.device, command: Callable) -> dict:
    """What the command says when the card is too small: one message, no traceback.

    command: runs a program with options in a process of its own
    """
    with tempfile.TemporaryDirectory() as folder:
        preset = "paper" if device.type == "cuda" else "tiny"
        side = train.GAN_PRESETS[preset].patch_size
        data = random_patches(Path(folder) / "data", side, 16)
        options = ["--preset", preset, "--data", data, "--run", Path(folder) / "run"]
        done = command("train-gan", "--task", "mass", *options, program=("-c", NO_MEMORY))
    message = done.stderr.strip()
    good = done.returncode == 1 and "--batch-size" in message and "Traceback" not in message
    return {"exit code": done.returncode, "one clear message": good, "message": message}
