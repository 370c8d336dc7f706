"""docs/LESSON.md: every command, in a fresh folder, prints what the document says it prints."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A block of commands: indented, the first line begins with "$".
BLOCK = re.compile(r"(<!-- not run -->\n\n)?((?:^ {4}.*\n)+)", re.MULTILINE)
PROGRESS = re.compile(r"^[\w/. -]+: \d+/\d+  .*\n", re.MULTILINE)
# A number, the hash of a generator, a cell of Table 1 without a number.
NUMBER = re.compile(r"\b[0-9a-f]{16}\b|[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?|(?<= )-(?= |$)")


def lesson(text: str) -> list[tuple[str, str]]:
    """The commands that are run, each with what it prints."""
    found = []
    for not_run, block in BLOCK.findall(text):
        for line in [] if not_run else block.splitlines():
            if line.startswith("    $ "):
                found.append((line.removeprefix("    $ "), ""))
            else:
                found[-1] = (found[-1][0], found[-1][1] + line + "\n")
    return found


def masked(text: str) -> str:
    """Words alone: no progress, numbers masked, lines joined (the document may break them)."""
    return NUMBER.sub("#", " ".join(PROGRESS.sub("", text).split()))


def test_masked_output_keeps_the_words():
    said = "synthesize mass: 50/50  36.6/s  0 s left  31%\na: 5 of 50,\n  +0.145 of [-1, 1]\n"
    assert masked(said) == "a: # of #, # of [#, #]"
    assert masked("Baseline 0.4 (0.1 to 1e-5)  -  x-ray") == "Baseline # (# to #) # x-ray"


@pytest.mark.timeout(1800)  # under two minutes of a core of its own
def test_every_command_of_the_lesson_prints_what_the_document_says(tmp_path):
    for path in (*ROOT.glob("*.py"), ROOT / "support", ROOT / "weights"):
        (tmp_path / path.name).symlink_to(path)
    commands = lesson((ROOT / "docs/LESSON.md").read_text(encoding="utf-8"))
    assert len(commands) >= 16
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "CUDA_VISIBLE_DEVICES": "", "LC_ALL": "C"}
    for command, printed in commands:
        run = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert run.returncode == 0, f"{command}\n{run.stdout}"
        said = run.stdout.replace(str(tmp_path.resolve()), "/home/you/mamgan")
        assert masked(said) == masked(printed), f"{command}\n{said}"
