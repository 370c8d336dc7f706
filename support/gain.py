"""Scarcity, beyond the paper: the gain over the number of training patients with cancer.

    python -m support.gain OUT.png REPORT REPORT ...

Each REPORT is a folder that `evaluate` wrote, of one data set prepared with other shares of those
patients (`prepare --malignant-share`). A difference is to the regime that the report compares with.
"""

import json
import sys
from pathlib import Path

from support import figures, files, runs


def gain(out: Path, folders: list[Path]) -> None:
    """Raises ValueError: a folder that `evaluate` did not finish, or that is damaged or old."""
    reports = []
    for folder in folders:
        runs.finished(folder, "evaluate")
        with files.reading(folder / "rows.json", "evaluate again"):
            reports.append(json.loads((folder / "rows.json").read_text(encoding="utf-8")))
            assert "train_malignant" in reports[-1][0], "of an older version"
    figures.save_figure(figures.gain_figure(reports), out)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        gain(Path(sys.argv[1]), list(map(Path, sys.argv[2:])))
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")
