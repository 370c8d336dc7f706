"""bfloat16 autocast, which a GPU computes in by default, against float32; here on the CPU."""

import dataclasses

import pytest
import torch

from benchmarks.check_gpu import compared
from support import runs
from tests.test_train_gan import CPU, TINY, log_of, patch_set
from train import GAN_PRESETS, train_gan

# Relative errors, norm of the difference over norm. bfloat16 keeps 8 bits, 0.2 to 0.4% an
# operation; gradients pass it dozens of times and leave a max pooling by another pixel where two
# round alike. Measured: at most 0.006 and 0.08; at the paper's size docs/RESULTS.md.
FORWARD, GRADIENTS = 0.02, 0.15


@pytest.mark.parametrize("sn_d", [False, True])
def test_bfloat16_agrees_with_float32_in_losses_penalty_and_gradients(sn_d):
    small = {"noise_cells": 0, "d_base": 16, "d_center": 2048}  # as it was measured
    config = dataclasses.replace(GAN_PRESETS["tiny"], sn_d=sn_d, **small)
    rows = compared(config, 3, CPU)  # an odd batch: see there
    assert len(rows) == 7
    for row in rows:
        limit = GRADIENTS if "gradients" in row["group"] else FORWARD
        assert 0 < row["relative error"] < limit, row


def test_every_stage_of_growth_trains_in_bfloat16(tmp_path, monkeypatch):
    patches = patch_set(tmp_path / "data")
    config = dataclasses.replace(TINY, batch_size=3, iters_base=2, iters_fade=2, iters_final=2)
    config = dataclasses.replace(config, log_every=1, save_every=10, g_lr=1e-5, d_lr=1e-5)
    train_gan(config, patches, tmp_path / "float32", CPU)
    autocast = torch.autocast("cpu", torch.bfloat16)
    monkeypatch.setattr(runs.Run, "autocast", lambda run, bfloat16: autocast)
    train_gan(config, patches, tmp_path / "bfloat16", CPU)
    rows = list(zip(log_of(tmp_path / "float32"), log_of(tmp_path / "bfloat16"), strict=True))
    assert [row["alpha"] for row, _ in rows] == [1, 1, 0, 0.5, 1, 1]
    for one, other in rows:
        for name in ("loss_d", "loss_g", "penalty"):
            assert other[name] != one[name]  # computed in another format
            assert other[name] == pytest.approx(one[name], rel=0.03), (one["step"], name)
