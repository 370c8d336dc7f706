"""docs/PAPER.md names code and tests that exist; what documents quote is what `evaluate` wrote."""

import ast
import functools
import importlib
import json
import re
from pathlib import Path

import pytest

from support import report

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


# --- Tables of results: README.md, docs/RESULTS.md against docs/results/NAME.json ---

# Right before a table, <!-- results: NAME --> says that it shows docs/results/NAME.json, which is
# `rows.json` of the folder that `evaluate` wrote: every row, in any order, and in each column what
# SHOWN says. Columns whose heading begins with "paper" hold the paper's numbers.
MARK = re.compile(r"<!-- results: ([\w.-]+) -->\n((?:\|.*\n?)*)")
SHOWN = {  # how a heading ends: its cells
    "regime": lambda row: row["regime"],
    "AUC (95% CI)": lambda row: report.in_words((row["auc"], row["low"], row["high"])),
    "difference": report.difference_in_words,
    "p clustered": lambda row: report.p_in_words(row["p_clustered"]),
    "detectable": lambda row: report.in_words((row["detectable"],)),
    **{name: lambda row, name=name: str(row[name]) for name in ("patients", "seeds", "folds")},
    "train": lambda row: f"{row['train_malignant']:.0f}",
}


def misquoted(text: str, folder: Path) -> list[str]:
    """What the marked tables of a document say otherwise than the results in `folder`."""
    problems = []
    for name, table in MARK.findall(text):
        if not (path := folder / f"{name}.json").exists():
            problems.append(f"{name}: no such result")
            continue
        head, _, *lines = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
        ] or [[], []]
        found, unknown = [], [h for h in head if not h.startswith("paper")]
        shown = {h: cells for h in unknown for end, cells in SHOWN.items() if h.endswith(end)}
        problems += [
            f"{name}: column {h!r} is none of rows.json" for h in unknown if h not in shown
        ]
        rows = {row["regime"]: row for row in json.loads(path.read_text(encoding="utf-8"))}
        for line in lines:
            cells = dict(zip(head, line, strict=True))
            found.append(cells.get("regime"))
            if found[-1] in rows:
                for heading, cell in shown.items():
                    expected = cell(rows[found[-1]])
                    if (cells[heading] or "-") != expected:
                        where = f"{name}: {found[-1]}, {heading}"
                        problems.append(f"{where}: {cells[heading]!r}, the result is {expected!r}")
        if sorted(found, key=str) != sorted(rows):
            problems.append(f"{name}: shows rows {found}, the result has {list(rows)}")
    return problems


@pytest.mark.parametrize("document", ["README.md", "docs/RESULTS.md"])
def test_marked_tables_quote_the_results(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    assert misquoted(text, ROOT / "docs" / "results") == []


QUOTED = """Some words.

<!-- results: cv -->
| regime | paper: AUC | mass: AUC (95% CI) | difference | p clustered | detectable | folds | train |
|---|---|---|---|---|---|---|---|
| Baseline | 0.829 | 0.750 (0.700 to 0.800) | | - | | 5 | 20 |
| 50% w/ decay | 0.8 | 0.762 (0.710 to 0.814) | +0.012 (-0.010 to +0.034) | 0.281 | 0.031 | 5 | 20 |

| regime | not marked |
|---|---|
| Baseline | 0.9 |
"""


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("", "", None),
        ("0.829", "0.830", None),  # the paper's
        ("0.750 (0.700", "0.751 (0.700", "cv: Baseline, mass: AUC (95% CI): '0.751 (0.700 to"),
        ("to 0.814)", "to 0.815)", "the result is '0.762 (0.710 to 0.814)'"),
        ("+0.012", "0.012", "the result is '+0.012 (-0.010 to +0.034)'"),
        ("0.281", "0.28", "p clustered: '0.28', the result is '0.281'"),
        ("| 0.031", "| ", "detectable: '', the result is '0.031'"),
        ("| | - |", "| +0.001 | - |", "Baseline, difference: '+0.001', the result is '-'"),
        ("0.031 | 5 |", "0.031 | 4 |", "50% w/ decay, folds: '4', the result is '5'"),
        ("| 5 | 20", "| 5 | 21", "Baseline, train: '21', the result is '20'"),
        (
            "| 50% w/ decay",
            "| 50%",
            "shows rows ['Baseline', '50%'], the result has ['Baseline', '5",
        ),
        (" p clustered", " p DeLong", "cv: column 'p DeLong' is none of rows.json"),
        ("results: cv", "results: other", "other: no such result"),
    ],
)
def test_a_table_that_misquotes_a_result_is_told(tmp_path, old, new, problem):
    names = ("regime", "auc", "low", "high", "delta", "delta_low", "delta_high", "p_clustered")
    names += ("detectable", "patients", "seeds", "folds", "train_malignant")
    end = (300, 3, 5, 20.4)
    baseline = ("Baseline", 0.75, 0.7, 0.8, None, None, None, None, None, *end)
    other = ("50% w/ decay", 0.7621, 0.71, 0.8139, 0.0121, -0.01, 0.0342, 0.2811, 0.0312, *end)
    rows = [dict(zip(names, row, strict=True)) for row in (baseline, other)]
    assert set(names) == set(report.RESULTS)
    (tmp_path / "cv.json").write_text(json.dumps(rows))
    assert old in QUOTED
    found = misquoted(QUOTED.replace(old, new, 1), tmp_path)
    assert len(found) == bool(problem) and (problem or "") in "".join(found)


def test_a_mark_without_its_table_or_rows_is_told(tmp_path):
    (tmp_path / "cv.json").write_text(json.dumps([{"regime": "Baseline"}]))
    for text in (
        "<!-- results: cv -->\n\n| regime |\n",
        "<!-- results: cv -->\n| regime |\n|---|\n",
    ):
        assert misquoted(text, tmp_path) == ["cv: shows rows [], the result has ['Baseline']"]
