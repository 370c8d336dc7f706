"""GPU memory that training takes, by arithmetic: no GPU needed, no number is typed in.

    python benchmarks/bench_memory.py --preset paper

One step runs on tensors without data (torch's FakeTensorMode); every storage is counted from the
operation that makes it until nothing refers to it. What a kernel takes for itself, CUDA's context
(about half a GiB) and the gaps between blocks come on top.
"""

import contextlib
import dataclasses
import sys
import weakref
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
import train
from models import COMBINED
from support.watch import FIXED


class Alive(TorchDispatchMode):
    """Bytes of the storages that were made under it and are still referred to: now, at most."""

    def __init__(self, *networks: nn.Module):
        super().__init__()
        self.now = self.most = 0
        held = (t for network in networks for t in (*network.parameters(), *network.buffers()))
        self.known = {t.untyped_storage()._cdata for t in held}  # counted apart

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and (s := t.untyped_storage())._cdata not in self.known:
                self.known.add(s._cdata)
                self.now += s.nbytes()
                weakref.finalize(s, self.gone, s._cdata, s.nbytes())
        self.most = max(self.most, self.now)
        return out

    def gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    @contextlib.contextmanager
    def peak(self, peaks: dict[str, int], name: str):
        self.most = self.now
        yield
        peaks[name] = self.most


def size(*networks: nn.Module) -> int:
    held = (t for network in networks for t in (*network.parameters(), *network.buffers()))
    return sum(t.numel() * t.element_size() for t in held)


def gan(config: train.GanConfig, n: int, bfloat16: bool) -> dict[str, int]:
    """Bytes by what they are for, of a step at full size as train.train_gan takes it."""
    fields, side, peaks = dataclasses.asdict(config), config.patch_size, {}
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bfloat16)
    with FakeTensorMode():
        G, D = models.generator(fields), models.discriminator(fields)
        x, real, benign, normal, delta = (torch.empty(n, 1, side, side) for _ in range(5))
        z = torch.empty(n, G.noise_size)
        with Alive(G, D) as alive:
            with alive.peak(peaks, "update of D"):
                with torch.no_grad(), autocast:
                    fake = G(x, z)[:, COMBINED]
                with autocast, parametrize.cached():
                    logits = D(torch.cat([real, fake, benign, normal])).chunk(4)
                    penalty = models.gradient_penalty(D, real, delta=delta)
                loss = models.discriminator_loss(*logits) + penalty
                kept = alive.now
                loss.backward()
            del loss, penalty, logits, fake
            D.requires_grad_(False)
            with alive.peak(peaks, "update of G"):
                with autocast:
                    loss = models.generator_loss(D(G(x, z)[:, COMBINED]))
                loss.backward()
            del loss
            D.eval()  # the log's look, in float32
            with alive.peak(peaks, "look: gradient norm"):
                models.gradient_norm(D, real, delta)
            with alive.peak(peaks, "look: fixed patches"), torch.no_grad():
                G(torch.empty(FIXED, 1, side, side), torch.empty(FIXED, G.noise_size))
    parts = {"weights of G and D": size(G, D), "moments of Adam": 2 * size(G, D)}
    parts["average of G, G chosen"] = 2 * size(G)
    parts["kept for the backward passes of D"] = kept
    return parts | peaks | {"in all": sum(list(parts.values())[:3]) + max(peaks.values())}


def classifier(config: train.ClassifierConfig, n: int, side: int, bfloat16: bool) -> dict:
    with FakeTensorMode():
        model, peaks = models.classifier(dataclasses.asdict(config)), {}
        x, y = torch.empty(n, 1, side, side), torch.empty(n, dtype=torch.long)
        with Alive(model) as alive, alive.peak(peaks, "step"):
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = F.cross_entropy(model(x).float(), y)
            loss.backward()
    return {"in all": 4 * size(model) + peaks["step"]}  # weights, moments, those of the best


@click.command()
@click.option("--preset", type=click.Choice(list(train.GAN_PRESETS)), default="paper")
def main(preset: str) -> None:
    gans, classifiers = train.GAN_PRESETS[preset], train.CLASSIFIER_PRESETS[preset]
    ways = [(n, half) for half in (True, False) for n in (8, 4, 2, 1)]
    names = [f"{'bfloat16' if half else 'float32'}, {n}" for n, half in ways]
    print(f"| train-gan, {preset}, GiB | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    columns = [gan(gans, n, half) for n, half in ways]
    for what in columns[0]:
        print(f"| {what} | {' | '.join(f'{column[what] / 2**30:.2f}' for column in columns)} |")
    ways = [(4 * n, half) for n, half in ways]
    names = [f"{'bfloat16' if half else 'float32'}, {n}" for n, half in ways]
    print(f"\n| train-cls, {preset}, GiB | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    totals = [classifier(classifiers, n, gans.patch_size, half)["in all"] for n, half in ways]
    print(f"| in all | {' | '.join(f'{total / 2**30:.2f}' for total in totals)} |")


if __name__ == "__main__":
    main()
