"""§2 Training details, Progressive growing: the loop's bookkeeping, resume, processes, warnings."""

import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import models
import postprocess
import train
from support import files, patchset, provenance, publish, runs
from support import watch as watching
from train import GAN_PRESETS, GanBatches, GanConfig, growth, train_gan

CPU, ROOT = torch.device("cpu"), Path(train.__file__).parent
TINY = GanConfig(  # every stage of growth in seconds
    patch_size=64,
    g_base=2,
    g_center=8,
    d_base=2,
    d_center=8,
    batch_size=2,
    iters_base=20,
    iters_fade=20,
    iters_final=20,
    g_lr=1e-3,
    d_lr=1e-3,
    g_average=0.9,
    gp_noise="std",
    log_every=7,
    save_every=9,
)


def patch_set(out: Path, n: int = 40, leave_out: tuple[str, ...] = ()) -> Path:
    """A patch set as `prepare` writes it; the value of a patch tells its class and number."""
    keys = [
        f"{split}/{c}" for split in ("train", "val") for c in data.CLASSES if c not in leave_out
    ]
    rng = np.random.default_rng(0)
    with runs.claim_folder(out, "prepare", {"patch_size": 64, "spacing_mm": 0.33}):
        for i, key in enumerate(keys):
            file = out / "patches" / f"{key}.npy"
            file.parent.mkdir(parents=True, exist_ok=True)
            patches = rng.integers(0, 20_000, (n, 64, 64)) + 4_000 * i
            patches[:, 0, 0] = 1_000 * i + np.arange(n)
            np.save(file, patches.astype(np.uint16))
            rows = [(f"{out.name} {k}", f"woman {k}") for k in range(n)]
            files.write_table(file.with_suffix(".csv"), ("image_uid", "patient_id"), rows)
        (out / "splits.csv").write_text("patient_id,split\n")
        runs.finish_folder(out, counts=dict.fromkeys(keys, n))
    return out


@pytest.fixture(scope="module")
def patches(tmp_path_factory) -> Path:
    return patch_set(tmp_path_factory.mktemp("data") / "patches")


def log_of(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def state_of(run: Path) -> dict:
    return torch.load(run / "checkpoint.pt", weights_only=True)


def alone(folder: Path = Path("run"), device: torch.device = CPU) -> runs.Run:
    """A run of one process that is not entered: for what only asks it for its share."""
    return runs.Run(folder, "train-gan", {}, device, 0)


@pytest.fixture(scope="module")
def finished(patches, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    train_gan(TINY, patches, run, CPU)
    return run


# --- The paper's numbers ---


def test_T1_to_T6_paper_preset_holds_the_papers_numbers():
    paper = GAN_PRESETS["paper"]
    assert (paper.patch_size, paper.g_base, paper.g_center) == (256, 16, 2048)
    assert (paper.d_base, paper.d_center) == (8 * 16, 8 * 2048)
    assert (paper.g_lr, paper.d_lr) == (1e-5, 1e-5)
    assert train.ADAM == {"betas": (0.0, 0.99), "eps": 1e-8}
    assert (paper.g_updates_mass, paper.iters_fade, paper.gp_noise) == (2, 3000, "uniform")
    assert paper.sn_g and paper.sn_d and paper.g_average == 0 and paper.noise_cells == 0
    assert (paper.batch_size, paper.iters_base, paper.iters_final) == (8, 30_000, 30_000)  # Q18


@pytest.mark.parametrize("preset", GAN_PRESETS)
def test_presets_keep_the_papers_topology(preset):
    config = GAN_PRESETS[preset]
    assert config.g_center == 128 * config.g_base
    assert config.d_center == 128 * config.d_base


def test_only_small_presets_of_calcifications_differ_from_those_of_masses():
    for task in data.TASKS:
        for name, config in train.gan_presets(task).items():
            usual = dataclasses.replace(GAN_PRESETS[name], task=task)
            grains = dataclasses.replace(usual, **train.CALCIFICATION.get(name, {}))
            assert config == (grains if task == "calcification" and name != "paper" else usual)
    tiny = train.gan_presets("calcification")["tiny"]
    assert set(models.generator(dataclasses.asdict(tiny)).noise_sides) == {4, 8, 16, 32, 64}
    assert growth(tiny, 0) == (64, 1.0)


def test_T3_T5_schedule_of_the_growth():
    paper = GAN_PRESETS["paper"]
    assert growth(paper, 0) == growth(paper, 29_999) == (128, 1.0)
    assert growth(paper, 30_000) == (256, 0.0)
    assert growth(paper, 31_500) == (256, 0.5)
    assert growth(paper, 33_000) == growth(paper, 62_999) == (256, 1.0)
    assert growth(dataclasses.replace(paper, iters_fade=0), 30_000) == (256, 1.0)


def test_T1_T2_optimisers_and_updates_per_step(patches, tmp_path):
    base = dataclasses.replace(TINY, iters_base=5, iters_fade=0, iters_final=5, g_updates_mass=2)
    for task, updates in (("mass", 20), ("calcification", 10), ("removal", 10)):
        config = dataclasses.replace(base, task=task, g_lr=2e-5, d_lr=1e-5)
        train_gan(config, patches, tmp_path / task, CPU)
        state = state_of(tmp_path / task)
        for name, lr, steps in (("opt_G", 2e-5, updates), ("opt_D", 1e-5, 10)):
            (group,) = state[name]["param_groups"]
            assert (group["lr"], list(group["betas"]), group["eps"]) == (lr, [0.0, 0.99], 1e-8)
            assert max(float(s["step"]) for s in state[name]["state"].values()) == steps


@pytest.mark.parametrize("noise", ["uniform", "std"])
def test_L1_to_L5_T1_to_T6_the_loop_against_the_formulas_written_out(patches, tmp_path, noise):
    config = dataclasses.replace(TINY, iters_base=3, iters_fade=2, iters_final=3, gp_noise=noise)
    config = dataclasses.replace(config, log_every=1, save_every=100)
    train_gan(config, patches, tmp_path / "run", CPU)
    G, D = train.networks(config, CPU)
    adam = {"lr": 1e-3, "betas": (0.0, 0.99), "eps": 1e-8}
    opt_G, opt_D = (torch.optim.Adam(network.parameters(), **adam) for network in (G, D))
    batches = GanBatches(config, patches, alone())
    stages = [(32, 1.0)] * 3 + [(64, 0.0), (64, 0.5)] + [(64, 1.0)] * 3
    for step, ((side, alpha), row) in enumerate(zip(stages, log_of(tmp_path / "run"), strict=True)):
        source, *shown, x, x_second = batches.draw(step)
        if side == 32:
            shown = [F.avg_pool2d(patch, 2) for patch in shown]
        rng = runs.torch_rng(0, step, runs.NOISE)
        z = torch.empty(2, 8).uniform_(-1, 1, generator=rng)
        delta = torch.empty(2, 1, side, side).uniform_(0, 1, generator=rng)
        z = [z, *(torch.empty(2, 8).uniform_(-1, 1, generator=rng) for _ in range(2))]
        if noise == "std":
            delta *= torch.stack([0.5 * patch.std() for patch in shown[0]])[:, None, None, None]
        shown.insert(1, G(source, z[0], side, alpha)[:, 2:].detach())
        log_p = D(torch.cat(shown), side, alpha).log_softmax(1).split(2)
        losses = [-log_p[i][:, i].mean() for i in range(4)]  # real, fake, benign, normal
        loss_D = losses[0] + losses[1] + 0.2 * losses[2] + 0.2 * losses[3]
        D.eval()  # the weights of this step: no power iteration of its own
        noisy = (shown[0] + delta).requires_grad_()
        p_real = D(noisy, side, alpha).softmax(1)[:, 0]
        (slope,) = torch.autograd.grad(
            (p_real / (1 - p_real)).log().sum(), noisy, create_graph=True
        )
        norm = slope.flatten(1).norm(dim=1)
        penalty = 10 * ((norm - 1) ** 2).mean()
        D.train()
        opt_D.zero_grad()
        (loss_D + penalty).backward()
        opt_D.step()
        for x_i, z_i in ((x, z[1]), (x_second, z[2])):  # masses: twice
            made = D(G(x_i, z_i, side, alpha)[:, 2:], side, alpha)
            loss_G = -made.softmax(1)[:, 0].log().mean()
            opt_G.zero_grad()
            loss_G.backward()
            opt_G.step()
        expected = {"loss_d": loss_D, "penalty": penalty, "loss_g": loss_G}
        for name, value in expected.items():
            assert row[name] == pytest.approx(value.item(), rel=1e-3), (step, name)
        for i, name in enumerate(watching.CLASSES_OF_D):
            right = (log_p[i].argmax(1) == i).float().mean()
            assert row[f"{name}_right"] == pytest.approx(right.item()), (step, name)


def test_G14_Q14_classes_of_each_task(patches):
    expected = {
        "mass": ("normal", "malignant_mass", "benign_mass", "normal"),
        "calcification": (
            "normal",
            "malignant_calcification",
            "benign_calcification",
            "normal",
        ),
        "removal": ("malignant", "normal", "benign", "malignant"),
    }
    for task, names in expected.items():
        batches = GanBatches(dataclasses.replace(TINY, task=task), patches, alone())
        assert data.TASKS[task] == names
        for name, pool in zip(names, batches.pools, strict=True):
            kinds = (name,) if name in data.CLASSES else (f"{name}_mass", f"{name}_calcification")
            stored = [patchset.Patches.open(patches, "train", kind).parts[kind] for kind in kinds]
            assert tuple(pool.parts) == kinds and len(pool) == 40 * len(kinds)
            assert all(map(np.array_equal, pool.parts.values(), stored))


def test_L2_Q10_sub_batches_are_equal_disjoint_and_fresh(patches):
    for task in ("mass", "removal"):
        config = dataclasses.replace(TINY, task=task, batch_size=8, g_updates_mass=2)
        batches = GanBatches(config, patches, alone())
        drawn = [batches.at(step, 64) for step in range(20)]
        for batch in drawn:
            assert len(batch.sources) == (2 if task == "mass" else 1)
            assert all(x.shape == (8, 1, 64, 64) for x in (*batch[:4], *batch.sources))
            kept = [{float(v) for v in x[:, 0, 0, 0]} for x in batch[:4]]
            assert all(len(values) == 8 for values in kept)  # no patch twice in a sub-batch
            assert not kept[0] & kept[3]  # D's fakes come from others than its normal ones
            fresh = [batch.fake_source, *batch.sources]
            assert not any(torch.equal(a, b) for a, b in itertools.pairwise(fresh))
        assert not torch.equal(drawn[0].fake_source, drawn[1].fake_source)
        again = GanBatches(config, patches, alone()).at(7, 64)
        assert all(map(torch.equal, again[:4], drawn[7][:4]))
        assert all(map(torch.equal, again.sources, drawn[7].sources))
    half = batches.at(7, 32)  # D's patches at half size; G always reads the whole patch (Q11)
    assert torch.equal(half.real, F.avg_pool2d(again.real, 2)) and half.fake_source.shape[-1] == 64


def test_real_patches_are_what_the_patch_set_holds(patches):
    batches = GanBatches(TINY, patches, alone())
    stored = patchset.Patches.open(patches, "train", "malignant_mass")
    real = batches.at(0, 64).real
    numbers = [int(n) for n in data.to_uint16(real[:, 0, 0, 0].numpy()) - 1_000]
    np.testing.assert_array_equal(real[:, 0].numpy(), data.to_float(stored[numbers]))


# --- What a run leaves ---


def test_run_folder_explains_itself(finished, patches):
    config = files.read_json(finished / "config.json")
    assert config["complete"] and config["command"] == "train-gan"
    made_of = {"data": patchset.fingerprint(patches), "spacing_mm": 0.33}
    made_of["images"] = sorted(f"patches {k}" for k in range(40))
    made_of["patients"] = sorted(f"woman {k}" for k in range(40))
    assert config["config"] == dataclasses.asdict(TINY) | made_of
    rows = log_of(finished)
    assert [row["step"] for row in rows] == [*range(7, 60, 7), 60]
    assert [row["side"] for row in rows] == [32] * 2 + [64] * 7
    for row in rows:
        for name in ("real_right", "fake_right", "benign_right", "normal_right", "acceptance"):
            assert 0 <= row[name] <= 1
        # How large they are is not decided in 60 steps: what they mean is tested by hand below.
        for name in (
            "penalty",
            "gradient_norm",
            "dead_units",
            "lesion_mean",
            "spread_x",
            "spread_z",
        ):
            assert math.isfinite(row[name])
        assert len(row["gamma"]) == 3
    assert (finished / "gan.png").exists()
    assert len(list((finished / "samples").glob("*.png"))) == 7
    names = {"config.json", "log.jsonl", "checkpoint.pt", "gan.png", "varieties.png", "samples"}
    assert {path.name for path in finished.iterdir()} == names


def test_a_run_carries_how_its_images_were_read(patches, tmp_path):
    assert "bits" not in train.gan_facts(TINY, patches)
    shutil.copytree(patches, tmp_path / "set")
    config = files.read_json(tmp_path / "set" / "config.json")
    config["config"]["bits"] = 12
    files.write_json(tmp_path / "set" / "config.json", config)
    assert train.gan_facts(TINY, tmp_path / "set")["bits"] == 12


def test_the_average_of_the_weights_is_what_is_used(finished):
    state = state_of(finished)
    G, config, name = postprocess.load_generator(finished, CPU)
    assert name == files.read_json(finished / "config.json")["generator"]
    assert config["task"] == "mass" and not G.training
    key = "to_lesion.parametrizations.weight.original"
    assert torch.equal(G.state_dict()[key], state["watch"]["chosen"][key])
    assert not torch.equal(state["watch"]["chosen"][key], state["G"][key])


def test_Q11_without_an_average_the_generator_itself_is_used(patches, tmp_path):
    config = dataclasses.replace(TINY, iters_base=3, iters_fade=0, iters_final=2, g_average=0.0)
    train_gan(config, patches, tmp_path / "run", CPU)
    state = state_of(tmp_path / "run")
    assert all(torch.equal(state["watch"]["chosen"][k], v) for k, v in state["G"].items())


@pytest.mark.parametrize(
    ("accepted", "last_chosen"),
    [
        ([0.1, 0.2, 0.05, 0.1], 14),  # none reaches 0.3: the one of which most pass
        ([0.9, 0.2, 0.4, 0.1], 16),  # the last that reaches 0.3
        ([0.0, 0.0, 0.0, 0.0], 18),
    ],
)
def test_the_generator_is_chosen_by_how_many_validation_lesions_pass(
    patches, tmp_path, monkeypatch, accepted, last_chosen
):
    early = [0.99] * 5  # at half size and in the first half of the last stage: no candidates
    lesions, script, seen = watching.Watch.lesions, iter([*early, *accepted]), {}

    def scripted(watch, G, size, alpha):
        seen[len(seen) * 2] = {k: v.clone() for k, v in G.state_dict().items()}
        return lesions(watch, G, size, alpha) | {"acceptance": next(script, 0.0)}

    monkeypatch.setattr(watching.Watch, "lesions", scripted)
    config = dataclasses.replace(TINY, iters_base=2, iters_fade=0, iters_final=16, log_every=2)
    config = dataclasses.replace(config, save_every=100, g_accepted=0.3)
    train_gan(config, patches, tmp_path / "run", CPU)
    rows = log_of(tmp_path / "run")
    assert [row["step"] for row in rows if row["chosen"]][-1] == last_chosen
    chosen = state_of(tmp_path / "run")["watch"]["chosen"]
    assert all(torch.equal(v, chosen[k]) for k, v in seen[last_chosen - 2].items())


def test_unfinished_and_foreign_runs_are_not_taken_for_generators(finished, patches, tmp_path):
    with runs.claim_folder(tmp_path / "run", "train-gan", {}):
        pass
    with pytest.raises(ValueError, match="not finished; run the same train-gan command again"):
        postprocess.load_generator(tmp_path / "run", CPU)
    with pytest.raises(ValueError, match="'prepare'; expected a folder made by 'train-gan'"):
        postprocess.load_generator(patches, CPU)
    with pytest.raises(ValueError, match=r"made with other options \(g_lr: 0.001 there, 0.5 now"):
        train_gan(dataclasses.replace(TINY, g_lr=0.5), patches, finished, CPU)


def test_bad_data_are_refused_before_anything_is_written(patches, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="holds patches of 64 px, the preset trains on 256 px"):
        train_gan(GAN_PRESETS["paper"], patches, run, CPU)
    with pytest.raises(ValueError, match="train/normal holds 40 patches; expected at least 42"):
        train_gan(dataclasses.replace(TINY, batch_size=21), patches, run, CPU)
    lacking = patch_set(tmp_path / "lacking", leave_out=("benign_mass",))
    with pytest.raises(ValueError, match="holds no train/benign_mass"):
        train_gan(TINY, lacking, run, CPU)
    assert not run.exists()
    removal = dataclasses.replace(TINY, task="removal", iters_base=1, iters_fade=0, iters_final=1)
    train_gan(removal, lacking, run, CPU)  # the union of the lesion types that are there


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(
    patches, tmp_path, monkeypatch
):
    calls = []

    def poisoned(fake):
        calls.append(fake)
        return models.generator_loss(fake) * (math.nan if len(calls) == 12 else 1)

    monkeypatch.setattr(train, "generator_loss", poisoned)
    config = dataclasses.replace(TINY, g_updates_mass=1, log_every=5, save_every=5)
    with pytest.raises(ValueError, match=r"step 12: loss_g is nan; expected finite values"):
        train_gan(config, patches, tmp_path / "run", CPU)
    state = state_of(tmp_path / "run")
    assert state["step"] == 10
    assert all(v.isfinite().all() for v in state["G"].values())
    torch.save(state | {"G": state["D"]}, tmp_path / "run/checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.pt: damaged .*; delete the run and train"):
        train_gan(config, patches, tmp_path / "run", CPU)


@pytest.mark.parametrize(
    ("figures", "sign"),
    [
        ({"real_right": 0.99, "fake_right": 1.0}, "D wins outright"),
        ({"lesion_share": 0.0}, "the lesions vanish"),
        ({"lesion_share": 0.9}, "the lesions cover the patch"),
        ({"dead_units": 0.95}, "the lesions ignore their input"),
        ({"spread_x": 0.0001}, "the lesions ignore their input"),
        ({"spread_z": 0.009}, "the noise is ignored"),
    ],
)
def test_a_run_that_fails_says_so_in_words_once_it_lasts(patches, capsys, figures, sign):
    watch = watching.Watch(TINY, patches, models.Generator(64, 2, 8), alone())
    good = {"real_right": 0.7, "fake_right": 0.7, "lesion_share": 0.1, "lesion_mean": 0.05}
    good |= {"spread_x": 0.05, "spread_z": 0.03, "dead_units": 0.1, "side": 64, "alpha": 1.0}
    for _ in range(10):
        assert watch.signs_of_failure(good) == []
    messages = [watch.signs_of_failure(good | figures) for _ in range(5)]
    assert messages[:2] == [[], []]
    assert all(len(now) == 1 and now[0].startswith(sign) for now in messages[2:])
    assert capsys.readouterr().err.count(sign) == 1
    for _ in range(5):  # at half size nothing is said yet
        assert watch.signs_of_failure(good | figures | {"side": 32}) == []


def test_noise_that_is_ignored_is_said_after_a_quarter_and_at_the_end(patches, capsys):
    config = dataclasses.replace(TINY, iters_base=0, iters_fade=0, iters_final=80, log_every=2)
    watch = watching.Watch(config, patches, models.Generator(64, 2, 8), alone())
    row = {"real_right": 0.7, "fake_right": 0.7, "lesion_share": 0.1, "lesion_mean": 0.05}
    row |= {"spread_x": 0.05, "spread_z": 0.009, "dead_units": 0.1, "side": 64, "alpha": 1.0}
    said = []
    for step in range(2, 82, 2):
        watch.run.done = step
        said.append(watch.signs_of_failure(row) == [watching.IGNORED])
    assert said == [False] * 9 + [True] * 31  # 10 of 40 rows are the quarter
    err = capsys.readouterr().err
    assert err == f"step 20: {watching.IGNORED}\nstep 80: {watching.IGNORED}\n"
    removal = dataclasses.replace(config, task="removal")
    watch = watching.Watch(removal, patches, models.Generator(64, 2, 8), alone())
    assert [watch.signs_of_failure(row) for _ in range(12)] == [[]] * 12


def test_the_figures_of_the_watch_by_hand(patches):
    class Constant(models.Generator):
        def forward(self, x, z=None, size=None, alpha=1.0):
            super().forward(x, z, size, alpha)
            lesion = torch.zeros_like(x)
            lesion[:, :, 10:40, 10:40] = 0.5 + 0.1 * z[:, :1, None, None]
            return torch.cat([lesion, x, x + lesion], dim=1)

    G = Constant(64, 2, 8, sn=False)
    for layer in (layer for block in G.decoder.values() for layer in block):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.ones_(layer.bias)
    # 4 of 2 * (8 + 4 + 2 + 2) units are dead
    torch.nn.init.constant_(G.decoder["16"][0].bias, -1.0)
    watch = watching.Watch(TINY, patches, G, alone())
    figures = watch.lesions(G, 64, 1.0)
    inside = 900 / 4096
    assert figures["dead_units"] == pytest.approx(4 / 32)
    over_x = 0.5 + 0.1 * watch.z[8:, 0]
    assert figures["spread_x"] == pytest.approx(float(over_x.std()) * inside, rel=1e-3)
    assert figures["lesion_mean"] == pytest.approx(float(over_x.mean()) * inside, rel=1e-3)
    assert figures["lesion_share"] == pytest.approx(inside)
    assert figures["acceptance"] == 1
    z = watch.z[:8, 0]  # the same eight for each of eight patches
    assert figures["spread_z"] == pytest.approx(float((0.5 + 0.1 * z).std()) * inside, rel=1e-3)
    removal = watching.Watch(dataclasses.replace(TINY, task="removal"), patches, G, alone())
    figures = removal.lesions(G, 64, 1.0)
    assert figures["lesion_share"] == figures["acceptance"] == 0  # nothing below -0.1


def test_L4_the_norm_in_the_log_is_that_of_the_penalty(finished, patches, tmp_path):
    G, D = train.networks(TINY, CPU)
    watch = watching.Watch(TINY, patches, G.eval(), alone(tmp_path))
    watch.run.record(loss_d=torch.tensor(1.0), real_right=torch.ones(()), fake_right=torch.ones(()))
    x = torch.rand(2, 1, 64, 64)
    before = {k: v.clone() for k, v in D.state_dict().items()}
    row = watch.look(G, D, x, 64, 1.0)
    assert all(torch.equal(v, before[k]) for k, v in D.state_dict().items())  # looking is free
    D.eval()
    norm = models.gradient_norm(D, x, torch.zeros_like(x))
    penalty = models.gradient_penalty(D, x, delta=torch.zeros_like(x))
    assert row["gradient_norm"] == pytest.approx(norm.mean().item())
    assert penalty.item() == pytest.approx(10 * (norm - 1).square().mean().item())


def test_sample_grids_show_patch_lesion_and_result_side_by_side(patches, finished, tmp_path):
    class Known(models.Generator):
        def forward(self, x, z=None, size=None, alpha=1.0):
            return torch.tensor([0.25, -1.0, -0.75])[None, :, None, None].expand(len(x), 3, 64, 64)

    G = Known(64, 2, 8)
    shutil.copy(finished / "log.jsonl", tmp_path)
    watching.Watch(TINY, patches, G, alone(tmp_path)).draw(G, 64, 1.0)
    with Image.open(tmp_path / "samples/000000.png") as picture:
        row = np.asarray(picture)[32, :, 0]
    values = [row[1 + 32], row[1 + 64 + 32], row[1 + 128 + 32]]  # before, lesion doubled, after
    assert values == [0, round(0.75 * 255 + 0.01), round(0.125 * 255)]
    with Image.open(tmp_path / "varieties.png") as picture:
        shown = np.asarray(picture)[..., 0]
    assert shown.shape == (4 * 65 + 1, 9 * 65 + 1)  # four patches, each with eight noises
    assert shown[33, 33::65].tolist() == [0] + 8 * [round(0.125 * 255)]


# --- Resume ---


def assert_equal(one: object, other: object) -> None:
    """Checkpoints of the same values, to the last bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        for pair in zip(one, other, strict=True):
            assert_equal(*pair)
    else:
        assert one == other


def child(
    config: GanConfig, patches: Path, run: Path, env: dict | None = None, cut: tuple = ()
) -> None:
    """cut: step, signal and seconds after the step's beginning when it comes."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # not so behind a "&"
    os.environ.update(env or {})
    sys.stderr = open(os.devnull, "w")
    steps = runs.Run.steps

    def steps_with_cut(run, total, by=1):
        for step in steps(run, total, by):
            if cut and step == cut[0]:
                threading.Timer(cut[2], os.kill, (os.getpid(), cut[1])).start()
            yield step

    runs.Run.steps = steps_with_cut
    try:
        train_gan(config, patches, run, CPU)
    except KeyboardInterrupt:
        sys.exit(1)


def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    return context


def steps_logged(run: Path) -> int:
    try:
        lines = (run / "log.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"] if lines else 0
    except (OSError, ValueError):
        return 0


def test_killed_at_twenty_moments_over_all_stages_a_run_ends_bitwise_the_same(
    patches, finished, tmp_path
):
    rng, run = random.Random(0), tmp_path / "run"
    ended = []
    for i, step in enumerate(sorted(rng.sample(range(55), 22))):  # at half size, in the fade, after
        kind = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[i % 3]
        cut = (step, kind, rng.uniform(0, 0.03))
        process = processes().Process(target=child, args=(TINY, patches, run, None, cut))
        process.start()
        process.join()
        ended.append(process.exitcode)
    assert ended.count(0) <= 2  # those that were done before the signal came
    assert ended.count(-signal.SIGKILL) >= 7
    train_gan(TINY, patches, run, CPU)
    assert_equal(state_of(run), state_of(finished))
    assert log_of(run) == log_of(finished)
    assert (run / "gan.png").read_bytes() == (finished / "gan.png").read_bytes()
    samples = sorted((finished / "samples").iterdir())
    assert [p.read_bytes() for p in sorted((run / "samples").iterdir())] == [
        p.read_bytes() for p in samples
    ]


@pytest.mark.parametrize("cells", [16, 64])
@pytest.mark.parametrize("growth_steps", [(6, 4), (0, 0)])
def test_noise_a_cell_resumes_bitwise_with_growth_and_without(
    patches, tmp_path, monkeypatch, cells, growth_steps
):
    base, fade = growth_steps
    config = dataclasses.replace(TINY, noise_cells=cells, sn_g=False, log_every=3, save_every=2)
    config = dataclasses.replace(config, iters_base=base, iters_fade=fade, iters_final=6)
    train_gan(config, patches, tmp_path / "whole", CPU)
    update, left = runs.Run.update, [11]

    def cut(run, *arguments):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        update(run, *arguments)

    monkeypatch.setattr(runs.Run, "update", cut)
    with pytest.raises(KeyboardInterrupt):
        train_gan(config, patches, tmp_path / "cut", CPU)
    train_gan(config, patches, tmp_path / "cut", CPU)
    assert_equal(state_of(tmp_path / "cut"), state_of(tmp_path / "whole"))
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")


def test_a_run_starts_from_the_networks_of_another_and_inherits_its_images(
    patches, finished, tmp_path, capsys
):
    other = patch_set(tmp_path / "other")
    config = dataclasses.replace(TINY, g_lr=1e-12, d_lr=1e-12)
    train_gan(config, other, tmp_path / "tuned", CPU, init=finished)
    assert f"starts from the networks of {finished}" in capsys.readouterr().err
    start, end = state_of(finished), state_of(tmp_path / "tuned")
    for old, new in ((start["watch"]["chosen"], end["G"]), (start["D"], end["D"])):
        names = [name for name in old if name.endswith(("original", "bias", "gamma"))]
        assert names and all(torch.allclose(new[n], old[n], atol=1e-8) for n in names)
    made_of = files.read_json(tmp_path / "tuned/config.json")["config"]
    generator = files.read_json(finished / "config.json")["generator"]
    assert made_of["init"] == {"generator": generator, "task": "mass"}
    assert made_of["images"] == sorted(
        f"{of} {k}" for of in ("other", "patches") for k in range(40)
    )
    with pytest.raises(ValueError, match=r"made with other options \(images: .*\.\.\."):
        train_gan(config, other, tmp_path / "tuned", CPU)  # the same command without --init
    with pytest.raises(ValueError, match=r"--init .*: found networks with g_base 2; expected 4"):
        wider = dataclasses.replace(config, g_base=4)
        train_gan(wider, other, tmp_path / "wider", CPU, init=finished)
    with pytest.raises(ValueError, match="no such folder; expected one that train-gan made"):
        train_gan(config, other, tmp_path / "none", CPU, init=tmp_path / "nothing")


def test_a_published_run_generates_and_is_a_start(patches, finished, tmp_path):
    out = tmp_path / "weights"
    publish.publish(finished, out)
    assert {p.name for p in out.iterdir()} == {"config.json", "checkpoint.pt", "gan.png"}
    size = (finished / "checkpoint.pt").stat().st_size
    assert (out / "checkpoint.pt").stat().st_size < size / 3
    G, _, name = postprocess.load_generator(out, CPU)
    whole, *_ = postprocess.load_generator(finished, CPU)
    assert name == files.read_json(out / "config.json")["generator"]
    x, z = torch.zeros(1, 1, 64, 64), whole.sample_noise(1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(G(x, z), whole(x, z), atol=0.01, rtol=0)
    short = dataclasses.replace(TINY, iters_base=1, iters_fade=0, iters_final=1)
    train_gan(short, patches, tmp_path / "tuned", CPU, init=out)
    with pytest.raises(ValueError, match="no such folder"):
        publish.publish(tmp_path / "nothing", tmp_path / "other")


@pytest.mark.parametrize(
    ("spacing", "said"),
    [(0.33, "WARNING: "), (0.15, "calcifications of"), (None, "calcifications of")],
)
def test_which_spacing_calcifications_need_is_said(spacing, said, capsys):
    provenance.say_spacing(spacing)
    text = capsys.readouterr().err
    assert text.startswith(said) and "0.15 mm or less" in text and text.count("\n") == 1
    assert (f"{spacing} mm" if spacing else "native pixels") in text


def test_stopping_saves_the_step_it_was_in(patches, tmp_path):
    run = tmp_path / "run"
    config = dataclasses.replace(TINY, save_every=10_000)
    process = processes().Process(target=child, args=(config, patches, run))
    process.start()
    while steps_logged(run) < 14:
        time.sleep(0.005)
    asked = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert time.monotonic() - asked < 2
    assert process.exitcode == 1
    assert state_of(run)["step"] >= 14


def test_log_keeps_what_the_checkpoint_knows_and_refuses_damage(patches, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    log, rows = tmp_path / "run/log.jsonl", log_of(finished)
    log.write_text(log.read_text() + '{"step": 61}\n{"step": 2')  # a kill cut the last row
    train_gan(TINY, patches, tmp_path / "run", CPU)
    assert log_of(tmp_path / "run") == rows
    log.write_text('{"step": 5}\nrubbish\n{"step": 10}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl: damaged .*; delete the run"):
        train_gan(TINY, patches, tmp_path / "run", CPU)


# --- Several processes ---


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def assert_same_losses(one: Path, two: Path, steps: int, rel: float) -> None:
    rows = list(zip(log_of(one), log_of(two), strict=True))
    assert len(rows) == steps
    names = ["loss_d", "penalty", "loss_g", *(f"{name}_right" for name in watching.CLASSES_OF_D)]
    for one, two in rows:
        for name in names:
            assert two[name] == pytest.approx(one[name], rel=rel, abs=1e-6), (one["step"], name)


def test_two_processes_with_half_the_batch_equal_one(patches, tmp_path):
    config = dataclasses.replace(
        TINY, batch_size=4, iters_base=4, iters_fade=3, iters_final=3, g_lr=1e-4, d_lr=1e-4
    )
    config = dataclasses.replace(config, log_every=1, save_every=10)
    train_gan(config, patches, tmp_path / "one", CPU)
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    both = [
        processes().Process(
            target=child, args=(config, patches, tmp_path / "two", env | {"RANK": str(rank)})
        )
        for rank in (0, 1)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert_same_losses(tmp_path / "one", tmp_path / "two", steps=10, rel=1e-4)


def test_two_machines_under_torchrun_equal_one_process(patches, tmp_path):
    sizes = {"g_base": 2, "g_center": 8, "d_base": 2, "d_center": 8, "batch_size": 4}
    stages = {"iters_base": 1, "iters_fade": 1, "iters_final": 1, "log_every": 1, "save_every": 9}
    config = dataclasses.replace(GAN_PRESETS["tiny"], **sizes, **stages)
    train_gan(config, patches, tmp_path / "one", CPU)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]  # README's line
    torchrun += ["--nproc-per-node", "1", "--rdzv-backend", "c10d", "--local-addr", "127.0.0.1"]
    torchrun += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--", ROOT / "mamgan.py"]
    options = [f"--{k.replace('_', '-')}={v}" for k, v in (sizes | stages).items()]
    options += ["--data", patches, "--run", tmp_path / "two", "--device", "cpu"]
    line = [*torchrun, "train-gan", "--preset", "tiny", "--task", "mass", *options]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen(list(map(str, line)), env=env) for _ in range(2)]
    try:
        assert [process.wait(200) for process in both] == [0, 0]
    finally:
        for process in both:
            process.terminate()  # an agent ends its worker, too
    assert_same_losses(tmp_path / "one", tmp_path / "two", steps=3, rel=1e-5)


def test_a_batch_that_the_processes_cannot_share_evenly_is_refused(patches):
    run = alone()
    run.processes = 2
    with pytest.raises(ValueError, match="--batch-size 3: found 2 processes"):
        GanBatches(dataclasses.replace(TINY, batch_size=3), patches, run)
