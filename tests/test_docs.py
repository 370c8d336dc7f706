"""docs/PAPER.md names code and tests that exist, and has a row for every claim."""

import ast
import functools
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = re.compile(r"`((?:[a-z_]+)(?:\.[A-Za-z_]\w*)+)`")
TEST = re.compile(r"`(test_\w+\.py)::(test_\w+)`")
CLAIMS = {"G": 16, "D": 3, "L": 5, "T": 7, "P": 9, "S": 10, "C": 7, "E": 4, "F": 7}


def rows() -> list[list[str]]:
    """The cells of every row of a table."""
    lines = (ROOT / "docs/PAPER.md").read_text(encoding="utf-8").splitlines()
    return [line.strip("|").split(" | ") for line in lines if line.startswith("|")]


@functools.cache
def functions_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def resolve(dotted: str) -> object:
    """`models.Generator.forward`, `support.sources.omidb.read_omidb`: module, then attributes."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(getattr, parts[length:], found)
    raise ModuleNotFoundError(dotted)


def test_every_claim_has_a_row():
    ids = [row[0].strip() for row in rows()]
    for letter, count in CLAIMS.items():
        assert [i for i in ids if re.fullmatch(rf"{letter}\d+", i)] == [
            f"{letter}{n}" for n in range(1, count + 1)
        ]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0].strip())
def test_named_code_and_tests_exist(row):
    for dotted in CODE.findall(" | ".join(row)):
        if not dotted.endswith((".csv", ".json", ".html", ".py", ".png", ".pt", ".jsonl")):
            resolve(dotted)
    for file, name in TEST.findall(" | ".join(row)):
        assert name in functions_of(file), f"{file}::{name}"
