"""Lesions in full mammograms (§4 "As a future step", F7; Figure 3): boxes, masks, pictures."""

import itertools
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar

import data
from models import BORDER_PX
from postprocess import Synthesizer, draw
from support import derived, figures, files, mammogram, runs, sources

TRIES_PER_LESION, STRIP_MIN_AREA_FRAC = 100, 0.01  # ours
STRIP_DRAWS = 100  # places for a row of windows that are looked at before a column is taken
CATEGORY = {"mass": "synthetic mass", "calcification": "synthetic calcification"}
CATEGORY |= {"removal": "removed lesion"}
Corner = tuple[int, int]  # row, col of the first pixel of a window, in stored pixels
Window = tuple[int, int, int, int]  # row0, col0, row1, col1, half-open
Images = tuple[np.ndarray, np.ndarray]  # display values before and after


class Source(NamedTuple):
    """An image to work on, and what its manifest says of it."""

    path: str
    spacing_mm: tuple[float, float] | None
    boxes: list[Window]  # of annotated lesions: to remove, or to keep new ones off


# --- The command ---


def synthesize_images(
    gan: Path,
    paths: Iterable[Path],
    out: Path,
    at: Sequence[tuple[int, int]] = (),
    lesions: int = 1,
    strip: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    **options: object,
) -> list[tuple[str, str]]:
    """Add lesions to full mammograms, or remove them; returns the files that failed, with reasons.

    paths: mammograms, or manifests (.csv) whose images are meant and whose spacing overrides
    at: centres of patches in stored pixels, a lesion each; or `strip` contiguous patches in a row,
        where none fits in a column (Figure 3). Without either, removal takes every lesion that
        the manifest marks in an image; else `lesions` random places that satisfy the 90% rule.
        What is added keeps its whole window off every box that the manifest gives
    """
    if strip > 1:  # Figure 3 shows a lesion on every patch, so smaller ones are taken too
        options["min_area_frac"] = options.get("min_area_frac") or STRIP_MIN_AREA_FRAC
    synth = Synthesizer(gan, device, "", options)
    marked = synth.task != "removal" or (not at and strip == lesions == 1)
    images, parts, failed = _named(paths, marked), out / "parts", []
    places = {"at": at, "lesions": lesions, "strip": strip, "seed": seed}
    config = {"images": {name: source[1:] for name, source in images.items()}}
    with runs.claim_folder(out, "synthesize", config | places | synth.config) as complete:
        if complete:
            return []
        parts.mkdir(exist_ok=True)  # a record per whole image: a killed run does the others
        with runs.progress(len(images), "images") as advance:
            for number, (name, source) in enumerate(images.items(), start=1):
                part = parts / f"{number:08d}.json"
                if not part.exists() and (why := _make(synth, source, part, name, places)):
                    failed.append((source.path, why))
                advance()
        _finish(out, parts, failed)
    return failed


def _named(paths: Iterable[Path], marked: bool) -> dict[str, Source]:
    """Images by the names of their outputs: file stems, made unique. With boxes when `marked`."""
    images, named = {}, {}
    for path in map(str, paths):
        rows = sources.read_manifest(Path(path)) if path.lower().endswith(".csv") else []
        known = {row.image_path: row.spacing_mm for row in rows} if rows else {path: None}
        images |= {name: Source(name, mm, []) for name, mm in known.items()}
        for row in rows if marked else ():
            boxes = images[row.image_path].boxes
            if row.bbox and row.bbox not in boxes:  # of both types: two rows
                boxes.append(row.bbox)
    for source in images.values():
        name = Path(source.path).stem
        while name in named:
            name += "_2"
        named[name] = source
    return named


def _make(synth: Synthesizer, source: Source, part: Path, name: str, places: dict) -> str:
    """Write everything of one image, its record `part` last; or say why that cannot be."""
    out, category, note = part.parent.parent, CATEGORY[synth.task], ""
    try:
        m = mammogram.read_mammogram(source.path, synth.run.get("bits"))
        m.spacing_mm = source.spacing_mm or m.spacing_mm
        display, placed = insert_lesions(synth, m, boxes=source.boxes, **places)
    except (ValueError, OSError) as error:
        why = (getattr(error, "strerror", None) or str(error)).removeprefix(f"{source.path}: ")
        return re.sub(
            r"^(--bits \d+): (.*); give.*", r"\2; the generator's patches were read with \1", why
        )
    made = f"{category} by contextual GAN {synth.hash[:16]}; research only"
    try:
        stored = m.restore(display)
    except ValueError as error:
        note = f" ({error}: no DICOM)"
    else:
        display = m.table.apply(stored)  # what a viewer makes of it
        if m.ds is not None:
            seed = f"{places['seed']} {synth.hash}"
            derived.write_derived_dicom(m, stored, out / f"{name}_synthetic.dcm", made, seed)
    derived.write_png16(out / f"{name}_synthetic.png", data.to_uint16(display), made)
    shown = (m.display, display), placed, m.spacing_mm
    figures.save_figure(before_after(*shown), out / f"{name}_before_after.png")
    if places["strip"] > 1:
        figures.save_figure(figure3(*shown), out / f"{name}_figure3.png")
    shares = ", ".join(f"{lesion['covered']:.0%}" for lesion in placed if "covered" in lesion)
    if shares:
        note += f" that covers {shares} of the annotated box"
    elif not places["at"]:
        note += " at random places" + f" off {len(source.boxes)} annotated" * bool(source.boxes)
    click.echo(f"{source.path}: {len(placed)} x {category}{note}")
    image = {"id": int(part.stem), "file_name": f"{name}_synthetic.png"}
    image |= {"height": display.shape[0], "width": display.shape[1]}
    annotations = [{"image_id": image["id"], "category": category} | lesion for lesion in placed]
    files.write_json(part, {"image": image, "annotations": annotations})
    return ""


def _finish(out: Path, parts: Path, failed: list[tuple[str, str]]) -> None:
    """annotations.json of all images (COCO); the folder is whole when none failed."""
    records = [files.read_json(part) for part in sorted(parts.glob("*.json"))]
    config = out / "config.json"
    click.echo(f"{out}: {len(records)} images written, {len(failed)} failed")
    if not records:  # nothing is there: other options may try in the same folder
        parts.rmdir()
        config.unlink()
        return
    annotations = [a for record in records for a in record["annotations"]]
    coco = derived.coco([record["image"] for record in records], annotations)
    files.write_json(out / "annotations.json", coco)
    if not failed:  # else the same command tries them again
        shutil.rmtree(parts)
    files.write_json(config, files.read_json(config) | {"failed": failed, "complete": not failed})


# --- Reinsertion: choose windows, try, place ---


def insert_lesions(
    synth: Synthesizer,
    m: mammogram.Mammogram,
    at: Sequence[tuple[int, int]] = (),
    lesions: int = 1,
    strip: int = 1,
    seed: int = 0,
    boxes: Sequence[tuple[float, ...]] = (),
) -> tuple[np.ndarray, list[dict]]:
    """New display image, equal to the old one wherever a weight is zero, and what was placed.

    boxes: annotated lesions in stored pixels. Removal takes them one after the other; what changes
        must hold their middle, and `placed` tells what share of each it covers. What is added
        keeps its window off all of them
    Raises ValueError: no place, or no lesion accepted in it.
    """
    shape = window_shape(synth, m.spacing_mm)
    if (np.array(m.display.shape) < shape).any():
        raise ValueError(f"{_px(m.display.shape)}, smaller than a patch of {_px(shape)}")
    tissue, display, placed = data.Tissue.of(m.display), m.display.copy(), []
    boxes, off = (boxes, []) if synth.task == "removal" else ([], list(map(data.whole_box, boxes)))
    for k in range(len(boxes) or len(at) or lesions):
        for attempt in range(TRIES_PER_LESION * strip):
            _, rng = draw(seed, int(m.image_uid, 16), k, attempt)
            if boxes:  # first in the middle, then beside it, as training patches hold lesions (P8)
                shift = rng.uniform(-0.25, 0.25, size=2) * (attempt > 0)
                corners = [_around(boxes[k], shape, tissue.shape, shift)]
            elif at:
                corners = [_centred(at[k], shape, tissue, off)]
            else:
                corners = _at_random(tissue, shape, strip, off + [p["window"] for p in placed], rng)
            tried = _try(synth, display, corners, shape, rng)
            if tried and (not boxes or _holds_middle(tried[0].bbox, boxes[k])):
                break
        else:
            raise ValueError(
                f"no lesion accepted in {attempt + 1} attempts, the last in the window of "
                f"{_px(shape)} at row {corners[0][0]}, column {corners[0][1]}: too small or large, "
                "cut by its border" + (" or off the middle of the annotated box" if boxes else "")
            )
        placed += [_place(display, lesion, boxes[k : k + 1]) for lesion in tried]
    return display, placed


def window_shape(synth: Synthesizer, spacing_mm: tuple[float, float] | None) -> tuple[int, int]:
    """Stored pixels of one patch: its own size, or the physical size that it was trained at."""
    trained_mm = synth.run["spacing_mm"]
    if trained_mm and not spacing_mm:
        text = f"pixel spacing unknown; the generator was trained at {trained_mm} mm"
        raise ValueError(f"{text}. Give a manifest with spacing_row_mm and spacing_col_mm")
    rows, cols = (trained_mm / mm for mm in spacing_mm) if trained_mm else (1, 1)
    return round(synth.side * rows), round(synth.side * cols)


def _px(shape: Sequence[int]) -> str:
    return f"{shape[0]} x {shape[1]} px"


def _centred(place: Corner, shape: tuple[int, int], tissue: data.Tissue, off: list) -> Corner:
    """Top left corner of the window around `place`, which must lie in the breast, `off` boxes."""
    corner = np.subtract(place, np.array(shape) // 2)
    if (corner < 0).any() or (corner + shape > tissue.shape).any():
        text = f"the patch of {_px(shape)} leaves the image of {_px(tissue.shape)}"
        raise ValueError(f"--at {place[0]} {place[1]}: {text}")
    if not tissue.share(*place, (1, 1)):
        raise ValueError(f"--at {place[0]} {place[1]}: outside the breast")
    for box in off:
        if (corner < box[2:]).all() and (corner + shape > box[:2]).all():
            text = f"the patch of {_px(shape)} meets the annotated box {box}"
            raise ValueError(f"--at {place[0]} {place[1]}: {text}; give a place beside it")
    return corner.tolist()


def _around(box, shape: tuple[int, int], image: tuple[int, int], shift: np.ndarray) -> Corner:
    """Top left corner of the window about a box, `shift` windows off, moved into the image."""
    corner = np.reshape(box, (2, 2)).mean(axis=0) + (shift - 0.5) * shape
    return np.clip(np.rint(corner).astype(int), 0, np.subtract(image, shape)).tolist()


def _at_random(
    tissue: data.Tissue, shape: tuple[int, int], strip: int, off: list[Window], rng
) -> list[Corner]:
    """`strip` windows of 90% tissue each (P6), in a row, else in a column; none overlaps `off`."""
    for down, across in ((1, strip), (strip, 1)):
        h, w = down * shape[0], across * shape[1]
        used = [(a - h + 1, b - w + 1, c, d) for a, b, c, d in off]
        for _ in range(STRIP_DRAWS):
            if not (place := tissue.draw(rng, (h, w), forbidden=used)):
                break
            each = itertools.product(range(0, h, shape[0]), range(0, w, shape[1]))
            corners = [(place[0] + row, place[1] + col) for row, col in each]
            if min(tissue.share(*corner, shape) for corner in corners) >= tissue.min_tissue - 1e-9:
                return corners
    missing = f"no place for {strip} x {_px(shape)} with 90% tissue"
    raise ValueError(f"{missing} beside the {len(off)} lesions there")


class Lesion(NamedTuple):
    """What the generator made of a window (h, w), in stored pixels."""

    window: Window
    bbox: Window  # of the object
    mask: np.ndarray  # (h, w) bool, the object before expansion
    added: np.ndarray  # (h, w) float, weights * lesion


def _try(
    synth: Synthesizer, display: np.ndarray, corners: list[Corner], shape: tuple[int, int], rng
) -> list[Lesion]:
    """A lesion for each window; none at all when one is not accepted or cut by its border."""
    side, tried = (synth.side, synth.side), []
    windows = [(row, col, row + shape[0], col + shape[1]) for row, col in corners]
    patches = np.stack([data.resize(_cut(display, window), side) for window in windows])
    for window, lesion in zip(windows, synth.lesions(patches, [rng] * len(windows)), strict=True):
        lesion, isolated = synth.isolate(lesion, rng)
        if isolated is None or _is_cut(isolated.mask):
            return []
        ends = window[:2] + np.reshape(isolated.bbox, (2, 2)) * shape / synth.side
        mask, added = data.resize(isolated.mask, shape) >= 0.5, isolated.weights * lesion
        bbox = data.whole_box(ends.ravel())
        tried.append(Lesion(window, bbox, mask, data.resize(added, shape)))
    return tried


def _is_cut(mask: np.ndarray) -> bool:
    """Whether the object ends at the generator's zero frame: its straight edge would show."""
    frame = BORDER_PX * len(mask) // 256
    inner = mask[frame:-frame, frame:-frame]
    return bool(inner[[0, -1]].any() or inner[:, [0, -1]].any())


def _holds_middle(outer: Window, box: tuple[float, ...]) -> bool:
    (low, high), middle = np.reshape(outer, (2, 2)), np.reshape(box, (2, 2)).mean(axis=0)
    return bool((low < middle).all() and (middle < high).all())


def _place(display: np.ndarray, lesion: Lesion, annotated: list[tuple[float, ...]]) -> dict:
    """Add a lesion to the image; its annotation, and the share of an annotated box it covers."""
    before, mask = _cut(display, lesion.window), np.zeros(display.shape, bool)
    before[...] = np.where(lesion.added == 0, before, np.clip(before + lesion.added, -1, 1))
    _cut(mask, lesion.window)[...] = lesion.mask
    record = {"window": lesion.window, "bbox": lesion.bbox, "segmentation": derived.rle(mask)}
    for box in map(data.whole_box, annotated):
        record |= {"annotated": box, "covered": round(float(_cut(mask, box).mean()), 3)}
    return record


def _cut(image: np.ndarray, window: Sequence[int]) -> np.ndarray:
    """A view of a window."""
    return image[window[0] : window[2], window[1] : window[3]]


# --- Pictures of one mammogram ---


def before_after(images: Images, placed: list[dict], spacing_mm) -> Figure:
    """The whole mammogram before and after; below, every window enlarged. Objects in boxes."""
    n, (tall, wide), (down, across) = len(placed), images[0].shape, spacing_mm or (1, 1)
    width, rows = max(8, 2.5 * n), 1 + (n > 1)  # as high as the pictures are, with their titles
    heights = width / 2 * tall * down / (wide * across) + 0.5, rows * (width * rows / 2 / n + 0.5)
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=heights)
    whole, windows = upper.subplots(1, 2), lower.subplots(rows, 2 * n // rows).reshape(2, n)
    _show(whole, images, (0, 0, *images[0].shape), spacing_mm)
    for lesion, axes in zip(placed, windows.T, strict=True):
        row0, col0, row1, col1 = lesion["bbox"]
        _show(axes, images, lesion["window"], spacing_mm, bar_mm=5)
        for ax in (whole[1], axes[1]):
            size = (col1 - col0, row1 - row0)
            ax.add_patch(Rectangle((col0, row0), *size, fill=False, edgecolor="#ffc800"))
    return figure


def figure3(images: Images, placed: list[dict], spacing_mm) -> Figure:
    """Figure 3: the windows of a row before (above) and after (below), or of a column (F3)."""
    window = (*placed[0]["window"][:2], *placed[-1]["window"][2:])
    down = len({lesion["window"][1] for lesion in placed}) == 1
    figure = Figure(figsize=(6, 12) if down else (12, 6), layout="constrained")
    _show(figure.subplots(2 - down, 1 + down), images, window, spacing_mm, bar_mm=5)
    return figure


def _show(axes: np.ndarray, images: Images, window: Window, spacing_mm, bar_mm: int = 0) -> None:
    """A window before and after at its place in stored pixels, which are as high as they are."""
    row0, col0, row1, col1 = window
    for ax, image, title in zip(axes, images, ("before", "after"), strict=True):
        extent = (col0, col1, row1, row0)
        ax.imshow(_cut(image, window), cmap="gray", vmin=-1, vmax=1, extent=extent)
        ax.tick_params(labelsize=7)
        ax.set_title(title, fontsize=9)
        if spacing_mm:
            ax.set_aspect(spacing_mm[0] / spacing_mm[1])
        if spacing_mm and bar_mm:
            bar = (bar_mm / spacing_mm[1], f"{bar_mm} mm", "lower left")
            ax.add_artist(AnchoredSizeBar(ax.transData, *bar, color="white", frameon=False))
