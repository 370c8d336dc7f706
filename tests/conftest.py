"""One thread in the tests and in what they start: sums keep their order, bits can be compared."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import pytest


@pytest.fixture(autouse=True)
def nothing_was_said():
    from support import runs

    runs.say_once.cache_clear()
