"""Between two rows of the log nothing waits for the device, and nothing is computed in float64."""

import contextlib
import dataclasses
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support import runs
from tests.test_train_gan import CPU, TINY, patch_set
from train import ClassifierConfig, train_classifier, train_gan

NEVER = 10**6
# By name, of operations whose result's shape or value the host must know:
WAITING = {"_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "_unique2"}
TO_HOST = {"__array__", "__bool__", "__float__", "__int__", "cpu", "item", "numpy", "tolist"}


class Operations(TorchDispatchMode):
    """What is dispatched: waiting for a value, float64."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        self.found += [name] if name in WAITING else []
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        self.found += [f"{name} in float64"] if torch.float64 in {t.dtype for t in tensors} else []
        return out


class Calls(TorchFunctionMode):
    """What is called: copies to the host, or to a device while the host waits.

    On the CPU they are no operations.
    """

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        self.found += [name] if name in TO_HOST else []
        moves = isinstance(kwargs.get("device", args[1:2] and args[1]), torch.device)
        if name == "to" and moves and not kwargs.get("non_blocking"):
            self.found.append("to a device, waiting")
        return func(*args, **kwargs)


@pytest.fixture(scope="module")
def patches(tmp_path_factory):
    return patch_set(tmp_path_factory.mktemp("data") / "patches")


@pytest.fixture
def watched(monkeypatch) -> list[str]:
    """What is found in the steps of a training, the last left out: it logs and saves."""
    found, original = [], runs.Run.steps

    def steps(run, total, by=1):
        last = -(-total // by) - 1
        with contextlib.ExitStack() as stack:
            for step in original(run, total, by):
                if step == 0:
                    stack.enter_context(Operations(found))
                    stack.enter_context(Calls(found))
                if step == last:
                    stack.close()
                yield step

    monkeypatch.setattr(runs.Run, "steps", steps)
    return found


def train_a_gan(patches, folder) -> None:
    config = dataclasses.replace(TINY, iters_base=2, iters_fade=2, iters_final=2)
    config = dataclasses.replace(config, g_updates_mass=2, log_every=NEVER, save_every=NEVER)
    train_gan(config, patches, folder / "gan", CPU)


def test_the_gans_steps_never_wait_and_hold_no_float64(patches, tmp_path, watched):
    train_a_gan(patches, tmp_path)
    assert watched == []


def test_the_classifiers_steps_never_wait_and_hold_no_float64(patches, tmp_path, watched):
    small = {"batch_size": 4, "width": 8, "network": "small", "weights": "none"}
    config = ClassifierConfig(samples=20, evaluate_every=NEVER, **small)
    train_classifier(config, patches, tmp_path / "cls", [], CPU)
    assert watched == []


PLANTS = {
    "item": lambda loss: loss.item(),
    "bool": lambda loss: loss > 0 or None,
    "float64": lambda loss: loss.double(),
    "cpu": lambda loss: loss.cpu(),
    "to": lambda loss: loss.to(torch.device("cpu")),
    "mask": lambda loss: loss[loss > 0],
}


@pytest.mark.parametrize("plant", PLANTS)
def test_what_waits_or_is_float64_would_be_found(patches, tmp_path, watched, monkeypatch, plant):
    record = runs.Run.record

    def planted(run, **figures):
        PLANTS[plant](figures["loss_d"])
        record(run, **figures)

    monkeypatch.setattr(runs.Run, "record", planted)
    train_a_gan(patches, tmp_path)
    assert len(watched) >= 5  # in each step but the last


def test_a_graph_is_recorded_after_three_calls_of_a_stage_and_replayed_on_new_inputs(monkeypatch):
    """CUDA's graphs are played by fakes: a replay computes again from what the inputs then hold."""
    calls, replays = [], []

    def function(size, alpha, x):
        calls.append((size, alpha))
        return (x * size + alpha,)

    class FakeGraph:
        def replay(self):
            replays.append(True)
            graph.result[0].copy_(graph.inputs[0] * graph.stage[0] + graph.stage[1])

    stream = mock.Mock()
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *a, **k: contextlib.nullcontext())
    run = runs.Run(Path("run"), "train-gan", {}, torch.device("cuda"), 0)
    graph, expected = runs.Graph(function, run), []
    stages = [(2, 1.0)] * 6 + [(4, 0.1), (4, 0.2), (4, 0.3), (4, 0.4), (4, 0.5)] + [(4, 1.0)] * 5
    for k, stage in enumerate(stages):
        x = torch.full((3,), float(k))
        (made,) = graph(stage, x)
        assert torch.equal(made, x * stage[0] + stage[1]), k
        expected += [stage] if k < 4 or 6 <= k < 15 else []
    assert calls == expected  # three calls of a stage and the recording; in a fade each call
    assert len(replays) == 3 + 2
    plain = runs.Graph(function, runs.Run(Path("run"), "train-gan", {}, torch.device("cpu"), 0))
    assert torch.equal(plain((2, 1.0), torch.ones(1))[0], torch.tensor([3.0]))
