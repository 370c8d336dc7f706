"""Figures 1 to 6 and the pictures of the report."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

import data
from support import files

# --- Figures 1, 2a, 3 and before/after ---

FIGURE_SAMPLES = 4
BAR_MM = (1, 2, 5, 10, 20, 50)


def grey(values: np.ndarray) -> np.ndarray:
    """uint16 patches, or floats in [-1, 1], as uint8."""
    return ((values if values.dtype == np.uint16 else data.to_uint16(values)) >> 8).astype(np.uint8)


def save_tiles(
    path: Path, rows: Sequence[Sequence[np.ndarray]], mm_per_px: Sequence[float | None]
) -> None:
    """Rows of uint8 images; below each a scale bar where the spacing of its column is known."""
    rows = [[_barred(*cell) for cell in itertools.zip_longest(row, mm_per_px)] for row in rows]
    rows = [np.hstack(row) for row in rows]
    width = max(row.shape[1] for row in rows)
    rows = [np.pad(r, ((0, 0), (0, width - r.shape[1]), (0, 0)), constant_values=255) for r in rows]
    with files.replace_file(path) as file:
        Image.fromarray(np.vstack(rows)).save(file, format="PNG")


def _barred(values: np.ndarray, mm: float | None) -> np.ndarray:
    """(H, W) or (H, W, 3) -> (H + 24, W + 4, 3) with white margins and a bar of so many mm."""
    rows, cols = values.shape[:2]
    canvas = Image.new("RGB", (cols + 4, rows + 24), "white")
    canvas.paste(Image.fromarray(values), (4, 4))
    if mm:
        bar = max([b for b in BAR_MM if b / mm <= 0.35 * cols], default=BAR_MM[0])
        pen, end, y = ImageDraw.Draw(canvas), 4 + bar / mm, rows + 13
        pen.rectangle((4, y - 1, end, y + 1), fill="black")
        font = ImageFont.load_default(size=12)
        pen.text((end + 6, y), f"{bar} mm", fill="black", font=font, anchor="lm")
    return np.asarray(canvas)


BASELINE, BLOB = "Baseline", "Blob control"
COLOURS, BLUE = {BASELINE: "#555555", BLOB: "#c2500a"}, "#0b62a8"


# --- Figures ---


def save_figure(figure: Figure, path: Path, dpi: int = 160) -> None:
    with files.replace_file(path) as file:
        figure.savefig(file, format="png", dpi=dpi, metadata={"Software": None})


def roc_figure(bands: dict[str, np.ndarray], rows: list[dict]) -> Figure:
    """One panel a regime, the baseline behind each."""
    names = [row["regime"] for row in rows[1:]] or [BASELINE]
    aucs = {row["regime"]: f"{row['regime']}: {row['auc']:.3f}" for row in rows}
    down = math.ceil(len(names) / 2)
    figure = Figure(figsize=(6, 3 * down), layout="constrained")
    for i, name in enumerate(names):
        ax = figure.add_subplot(down, 2, i + 1, aspect="equal", xlim=(0, 1), ylim=(0, 1.01))
        for key in dict.fromkeys((BASELINE, name)):
            (mean, low, high), colour = bands[key], COLOURS.get(key, BLUE)
            grid = np.linspace(0, 1, len(mean))  # of false positive rates
            ax.fill_between(grid, low, high, color=colour, alpha=0.18, linewidth=0)
            ax.plot(grid, mean, color=colour, linewidth=1.6, label=aucs[key])
        ax.legend(loc="lower right", fontsize=9, frameon=False, title="AUC", title_fontsize=9)
    figure.supxlabel("1 - specificity", fontsize=10)
    figure.supylabel("sensitivity", fontsize=10)
    return figure


def difference_figure(rows: list[dict]) -> Figure:
    """Difference to the baseline with its clustered interval; a tick for each seed."""
    figure = Figure(figsize=(6, 1 + 0.5 * len(rows)), layout="constrained")
    ax, base = figure.subplots(), rows[0]["auc"]
    for i, row in enumerate(rows[1:]):
        colour = COLOURS.get(row["regime"], BLUE)
        ax.plot([row["delta_low"], row["delta_high"]], [i, i], color=colour, linewidth=3)
        ax.plot(row["delta"], i, "o", color=colour, markersize=7)
        ax.plot(np.array(row["seed_aucs"]) - base, [i - 0.22] * row["seeds"], "|", color=colour)
    ax.axvline(0, color="#333333", linewidth=0.8)
    ax.set_yticks(range(len(rows) - 1), [row["regime"] for row in rows[1:]])
    ax.set(ylim=(len(rows) - 1.5, -0.5), xlabel=f"difference in AUC to the baseline ({base:.3f})")
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def patch_figure(rows: list[tuple[str, Sequence[np.ndarray], Sequence[str]]]) -> Figure:
    """Rows of patches (uint16): label, patches, titles above them (repeated in turn)."""
    columns = max(len(patches) for _, patches, _ in rows)
    figure = Figure(figsize=(1.35 * columns, 1.6 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, (label, patches, titles) in zip(grid, rows, strict=True):
        for i, ax in enumerate(line):
            ax.set(xticks=[], yticks=[], frame_on=False)
            if i < len(patches):
                ax.imshow(patches[i], cmap="gray", vmin=0, vmax=65535, interpolation="nearest")
                ax.set_title(titles[i % len(titles)], fontsize=9)
        line[0].set_ylabel(label, fontsize=9)
    return figure


def embedding_figure(panels: dict[str, np.ndarray], groups: np.ndarray, embedded: dict) -> Figure:
    """Points by group, for each model's t-SNE; those of no group of F4 are the rescued patches."""
    figure = Figure(figsize=(5.5 * len(panels), 6), layout="constrained")
    styles = {name: (label, colour, 6, 0) for name, (_, colour, label) in embedded.items()}
    styles["rescued"] = "rescued malignant test patches", "#00004d", 90, 1.2  # F5: dark blue
    for i, (title, xy) in enumerate(panels.items(), start=1):
        ax = figure.add_subplot(1, len(panels), i, xticks=[], yticks=[], title=f"{title}: features")
        for name, (label, colour, size, edge) in styles.items():
            if (at := groups == name).any():
                style = {"s": size, "color": colour, "linewidths": edge, "edgecolors": "white"}
                ax.scatter(*xy[at].T, label=f"{label} ({at.sum()})", alpha=0.8, **style)
    legend = {"loc": "outside lower center", "ncols": 2, "fontsize": 9, "frameon": False}
    figure.legend(*ax.get_legend_handles_labels(), markerscale=1.5, **legend)
    return figure
