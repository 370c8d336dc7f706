"""Golden values: what no change may alter unawares, and what does not depend on the processor.

A commit that changes them on purpose says why. Between two versions of the code on one machine
networks, synthetic sets and tables were compared to the last bit as well.
"""

import dataclasses

import numpy as np
import pytest

import data
from support import files, patchset, phantom, runs, sources

PATCHES = "a7a7be637c34bb94bfef16dfd4c4c9c6f77a334f143afe021c9693046524ada9"


@pytest.mark.parametrize("workers", [1, 2])
def test_the_patches_of_a_small_set_of_phantoms(phantoms, tmp_path, workers):
    config = data.PREPARE_PRESETS["tiny"]
    counts = {key: 12 for key in config.counts if key != "train/benign_calcification"}
    config = dataclasses.replace(config, counts=counts)
    patchset.prepare(sources.read_manifest(phantoms), tmp_path / "set", config, workers)
    held = sorted((tmp_path / "set/patches").rglob("*.*"))
    assert len(held) >= 2 * 10
    assert files.sha256(*held, tmp_path / "set/splits.csv") == PATCHES


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return phantom.write_phantoms(tmp_path_factory.mktemp("phantoms") / "set", patients=24)


def test_the_streams_of_random_numbers():
    assert runs.numpy_rng(0, 7, runs.BATCH).integers(1000, size=4).tolist() == [796, 38, 225, 777]
    assert runs.torch_rng(3, 5, runs.NOISE).initial_seed() == 5597133759174589634
    assert data.patch_seed(0, "train/normal", 5) == 416190476497420247
    assert np.random.default_rng(data.patch_seed(0, "val/normal", 0)).integers(1000) == 898
