"""Figures 1 to 6 and the pictures of the report: drawing alone, nothing is computed here."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from data import to_uint16
from support import files

DPI = 160
BLUE, COLOURS = "#0b62a8", {"Baseline": "#555555", "Blob control": "#c2500a"}
OTHERS = (BLUE, "#2a9d55", "#7b3fa0", "#17a2a2", "#8a6d00", "#c71585")  # regimes in one picture
PATCH_PX = 256  # a side of a patch in a picture, at least: smaller ones get larger pixels
LINE_PX, GAP_PX = 28, 6  # of a picture: a line of text, the gap between patches
BAR_MM = (1, 2, 5, 10, 20, 50)


def save_figure(figure: Figure, path: Path, dpi: int = DPI) -> None:
    """PNG, whole or absent; the same figure gives the same bytes."""
    with files.replace_file(path) as file:
        figure.savefig(file, format="png", dpi=dpi, metadata={"Software": None})


# --- Figures 1, 2a, 3 and 6, nearest patches, before and after ---


def grey(patch: np.ndarray) -> np.ndarray:
    """uint16, or float in [-1, 1], as uint8."""
    return ((patch if patch.dtype == np.uint16 else to_uint16(patch)) >> 8).astype(np.uint8)


def patch_figure(
    rows: Sequence[tuple[str, Sequence[np.ndarray], Sequence[str]]],
    mm: Sequence[float | None] = (),
) -> Figure:
    """Rows of patches: label, patches (H, W) uint16 or float [-1, 1], titles (repeated in turn).

    A pixel of a patch is a square of whole pixels in the picture, as large in all of a row. mm: how
    wide the pixels of each column are; below those known stands a scale bar. `figure.axes` has one
    axes for each patch, row by row, in the pixels of the patch.
    """
    figure, boxes, top, width = Figure(dpi=DPI), [], 0, 0
    for label, patches, titles in rows:
        zoom = math.ceil(PATCH_PX / min(patches[0].shape))
        top += LINE_PX if any(titles) else GAP_PX
        left = LINE_PX if any(row[0] for row in rows) else GAP_PX
        for i, patch in enumerate(patches):
            height, columns = zoom * np.array(patch.shape)
            boxes.append((left, top + height, columns, height))
            ax = figure.add_axes((0, 0, 1, 1), xticks=[], yticks=[], frame_on=False)
            # as colours: matplotlib's own grey map is one level off here and there
            ax.imshow(np.dstack(3 * [grey(patch)]), interpolation="nearest")
            if titles:
                ax.set_title(titles[i % len(titles)], fontsize=9, pad=3)
            if i < len(mm) and mm[i]:
                _scale_bar(ax, patch.shape, mm[i], zoom)
            if i == 0:
                ax.set_ylabel(label, fontsize=9, labelpad=3)
            left += columns + GAP_PX
        top += zoom * max(map(len, patches)) + (LINE_PX if any(mm) else 0)
        width = max(width, left)
    size = np.array([width, top + GAP_PX])
    figure.set_size_inches(size / DPI)
    for ax, (left, bottom, *extent) in zip(figure.axes, boxes, strict=True):
        ax.set_position(np.array([left, size[1] - bottom, *extent]) / np.tile(size, 2))
    return figure


def _scale_bar(ax, shape: tuple[int, int], mm: float, zoom: int) -> None:
    """A bar of so many mm below a patch, about a third of it at most."""
    bar = max([b for b in BAR_MM if b / mm <= 0.35 * shape[1]], default=BAR_MM[0])
    end, y = bar / mm - 0.5, shape[0] - 0.5 + LINE_PX / 2 / zoom
    ax.autoscale(False)
    ax.plot([-0.5, end], [y, y], "black", linewidth=1.5, solid_capstyle="butt", clip_on=False)
    ax.text(end + 8 / zoom, y, f"{bar} mm", fontsize=9, verticalalignment="center")


# --- Table 1 ---


def roc_figure(curves: dict[str, np.ndarray], rows: list[dict]) -> Figure:
    """The mean curve of each regime over the seeds."""
    figure = Figure(figsize=(6, 6), layout="constrained")
    ax = figure.add_subplot(aspect="equal", xlabel="1 - specificity", ylabel="sensitivity")
    for row, colour in zip(rows, itertools.cycle(OTHERS)):
        curve, name = curves[row["regime"]], row["regime"]
        style = {"color": COLOURS.get(name, colour), "label": f"{row['title']}: {row['auc']:.3f}"}
        ax.plot(np.linspace(0, 1, len(curve)), curve, linewidth=1.6, **style)
    ax.legend(loc="lower right", fontsize=9, frameon=False, title="AUC", title_fontsize=9)
    return figure


def reliability_figure(rows: list[dict], readings: dict[str, dict]) -> Figure:
    """Share of cancers against p(cancer) in each bin; the more patches, the larger the point."""
    figure = Figure(figsize=(6, 6), layout="constrained")
    ax = figure.add_subplot(aspect="equal", xlabel="mean p(cancer)", ylabel="share of cancers")
    ax.plot([0, 1], [0, 1], color="#999999", linewidth=0.8)
    for row, colour in zip(rows, itertools.cycle(OTHERS)):
        p, share, number = np.array(readings[row["regime"]]["bins"]).T
        style = {"color": COLOURS.get(row["regime"], colour), "label": row["title"]}
        ax.plot(p, share, linewidth=1.2, **style)
        ax.scatter(p, share, s=300 * number / number.sum(), color=style["color"])
    ax.legend(loc="upper left", fontsize=9, frameon=False)
    return figure


def difference_figure(rows: list[dict]) -> Figure:
    """Difference to its reference with the clustered interval; a tick for each seed."""
    figure = Figure(figsize=(6, 1 + 0.5 * len(rows)), layout="constrained")
    ax, aucs = figure.subplots(), {row["regime"]: row["auc"] for row in rows}
    for i, row in enumerate(rows[1:]):
        colour = COLOURS.get(row["regime"], BLUE)
        ax.plot([row["delta_low"], row["delta_high"]], [i, i], color=colour, linewidth=3)
        ax.plot(row["delta"], i, "o", color=colour, markersize=7)
        ticks = np.array(row["seed_aucs"]) - aucs[row["reference"]]
        ax.plot(ticks, [i - 0.22] * row["seeds"], "|", color=colour)
    ax.axvline(0, color="#333333", linewidth=0.8)
    ax.set_yticks(range(len(rows) - 1), [row["title"] for row in rows[1:]])
    ax.set(ylim=(len(rows) - 1.5, -0.5), xlabel="difference in AUC")
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def gain_figure(reports: Sequence[list[dict]]) -> Figure:
    """AUC, and difference with its clustered interval, over the training patients with cancer.

    reports: rows (`report.RESULTS`) of several evaluations; drawn are the regimes that all have.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    tables = [{row["regime"]: row for row in rows} for rows in reports]
    tables.sort(key=lambda table: table["Baseline"]["train_malignant"])
    names = [name for name in tables[0] if all(name in table for table in tables)]
    for k, (name, colour) in enumerate(zip(names, itertools.cycle(OTHERS))):
        cells = ("train_malignant", "auc", "delta", "delta_low", "delta_high")
        n, auc, delta, low, high = np.array([[t[name][c] for c in cells] for t in tables], float).T
        style = {"color": COLOURS.get(name, colour), "label": name, "marker": "o", "markersize": 5}
        left.plot(n, auc, linewidth=1.4, **style)
        if name != "Baseline":
            aside = n * 1.03 ** (k - len(names) / 2)
            right.errorbar(aside, delta, [delta - low, high - delta], capsize=3, **style)
    right.axhline(0, color="#333333", linewidth=0.8)
    right.set_title("to the baseline; with augmentation, to that alone", fontsize=10)
    for ax, label in ((left, "AUC"), (right, "difference in AUC")):
        ax.set(xscale="log", xlabel="patients with cancer in training", ylabel=label)
        ax.set_xticks(n, [f"{v:.0f}" for v in n])
        ax.minorticks_off()
    left.legend(fontsize=9, frameon=False)
    return figure


# --- Figures 4 and 5 ---


MARKERS = "osD^v"  # of the groups: not everybody tells red from green


def embedding_figure(panels: dict[str, np.ndarray], groups: np.ndarray, embedded: dict) -> Figure:
    """Points by group, for each model's t-SNE; those of no group of F4 are the rescued patches."""
    figure = Figure(figsize=(5.5 * len(panels), 6), layout="constrained")
    styles = {
        name: (label, {"color": colour, "s": 6, "linewidths": 0, "marker": marker})
        for (name, (_, colour, label)), marker in zip(embedded.items(), MARKERS, strict=True)
    }
    dark_blue = {"color": "#00004d", "s": 90, "linewidths": 1.2, "edgecolors": "white"}  # F5
    styles["rescued"] = "rescued malignant test patches", dark_blue
    for i, (title, xy) in enumerate(panels.items(), start=1):
        ax = figure.add_subplot(1, len(panels), i, xticks=[], yticks=[], title=f"{title}: features")
        for name, (label, style) in styles.items():
            if (at := groups == name).any():
                ax.scatter(*xy[at].T, label=f"{label} ({at.sum()})", alpha=0.8, **style)
    legend = {"loc": "outside lower center", "ncols": 2, "fontsize": 9, "frameon": False}
    figure.legend(*ax.get_legend_handles_labels(), markerscale=1.5, **legend)
    return figure
