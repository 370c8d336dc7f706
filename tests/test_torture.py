"""Nothing lost, nothing leaked, nothing crashes: the short version of `make torture`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(900)  # a minute on two idle cores
ROOT = Path(__file__).resolve().parent.parent
# Two processes for two cores. What other tests show already stays out: kills and repetitions of
# each command, and what takes minutes.
LINES = (
    "--only private --only parted --only hostile --only dicom --only raster --mutations 100",
    "--only killed --kills 2 --only starved --starve gan --only manifest --only patches --only run "
    "--only set --mutations 8",
)


@pytest.fixture(scope="module")
def lines() -> dict[str, str]:
    """Part of the harness: its line, with findings before it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.torture"]
    processes = [
        subprocess.Popen(
            [*command, *line.split()], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )
        for line in LINES
    ]
    try:
        printed = "".join(process.communicate()[0] for process in processes)
    finally:
        for process in processes:
            process.kill()
    found = dict(re.findall(r"^(\w+): (.*)", printed, re.M))
    found["findings"] = "\n".join(re.findall(r"^FOUND .*(?:\n    .*)*", printed, re.M))
    return found


def number(line: str, what: str) -> int:
    return int(re.search(rf"{what} (\d+)", line)[1])


def test_nothing_is_found(lines):
    assert not lines["findings"]
    assert len(lines) == 12 and all("findings 0" in line for line in [*lines.values()][:-1])


def test_killed_commands_go_on_to_the_same_bytes(lines):
    assert number(lines["killed"], "killed") == 12 and number(lines["killed"], "resumed") >= 6


def test_files_that_may_not_grow_or_a_second_process_is_one_message(lines):
    assert number(lines["starved"], "files limited") >= 3
    assert number(lines["starved"], "second processes refused") == 1


@pytest.mark.parametrize("kind", ["dicom", "raster", "manifest", "patches", "run", "set"])
def test_bad_files_end_in_success_a_row_or_one_message(lines, kind):
    assert number(lines[kind], "mutated") == (100 if kind in ("dicom", "raster") else 8)


def test_no_file_holds_a_planted_identifier(lines):
    assert number(lines["private"], "files searched") > 80
    assert number(lines["private"], "attributes planted in a file") > 5000


def test_leak_forged_sets_are_refused(lines):
    assert number(lines["parted"], "forged sets refused") == 4
    assert number(lines["parted"], "leaked") == 0


def test_nothing_that_is_loaded_runs_and_no_path_leads_out(lines):
    assert number(lines["hostile"], "pickles refused") == 21
    assert number(lines["hostile"], "odd names written") == 8


def test_requirements_are_pinned_and_say_what_for():
    names = ("requirements.txt", "requirements-dev.txt")
    lines = [line for name in names for line in (ROOT / name).read_text().splitlines()]
    lines = [line for line in lines if line and not line.startswith(("#", "-r "))]
    assert len(lines) >= 15
    for line in lines:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9.]*\s+# \S.+", line)
