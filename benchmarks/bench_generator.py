"""Does G's update (no second derivative in it) gain from a CUDA graph or from torch.compile?

benchmarks/gpu.py runs it.
"""

import dataclasses
import time
from collections.abc import Callable

import torch
from torch import Tensor

import train
from benchmarks.bench_gan import synchronize
from models import COMBINED, generator_loss


def generator_update(part, preset: str) -> Callable[[], None]:
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
