"""Lesions in full mammograms: boxes, masks, before and after (F3, F7)."""

import io
import itertools
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image, ImageDraw

import data
from data import resize
from models import BORDER_PX
from postprocess import IsolatedLesion, Synthesizer, draw
from support import derived, files, mammogram, runs, sources
from support.figures import grey, save_tiles

# --- Reinsertion into full mammograms (§4 "As a future step", F7; Figure 3) ---

TRIES_PER_LESION, STRIP_MIN_AREA_FRAC = 100, 0.01  # ours
CATEGORY = {"mass": "synthetic mass", "calcification": "synthetic calcification"}


def synthesize_images(
    gan: Path,
    files: Iterable[Path],
    out: Path,
    at: Sequence[tuple[int, int]] = (),
    lesions: int = 1,
    strip: int = 1,
    component: str = "largest",
    seed: int = 0,
    device: torch.device | str = "cpu",
    **options: object,
) -> list[tuple[str, str]]:
    """Add lesions to full mammograms, or remove them; returns the files that failed, with reasons.

    files: mammograms, or manifests (.csv) whose images are meant and whose spacing overrides
    at: centres of patches in stored pixels, a lesion each; or `strip` contiguous patches in a row,
        where none fits in a column (Figure 3). Without either, removal takes every lesion that
        the manifest marks in an image; else `lesions` random places that satisfy the 90% rule
    """
    synth = Synthesizer(gan, device, "", {"component": component, **options})
    if strip > 1:  # Figure 3 shows a lesion on every patch, so smaller ones are taken too
        synth.options["min_area_frac"] = options.get("min_area_frac") or STRIP_MIN_AREA_FRAC
    images, failed = _named(files), []
    marked = synth.task == "removal" and not at and strip == lesions == 1
    shown = {name: [mm, boxes if marked else []] for name, (_, mm, boxes) in images.items()}
    config = {"images": shown, "at": at, "lesions": lesions, "strip": strip}
    config |= {"seed": seed, **synth.config}
    category = CATEGORY.get(synth.task, "removed lesion")
    made = f"{category} by contextual GAN {synth.hash[:16]}; research only", f"{seed} {synth.hash}"
    with runs.claim_folder(out, "synthesize", config), runs.progress(len(images), "images") as tick:
        parts = out / "parts"  # a record per finished image: a killed run goes on with the others
        parts.mkdir(exist_ok=True)
        for number, (name, (file, *_)) in enumerate(images.items(), start=1):
            part = parts / f"{number:08d}.json"
            if not part.exists():
                try:
                    m, (spacing_mm, boxes) = mammogram.read_mammogram(file), shown[name]
                    m.spacing_mm = spacing_mm or m.spacing_mm
                    display, placed = insert_lesions(synth, m, at, lesions, strip, seed, boxes)
                except (ValueError, OSError) as error:
                    reason = getattr(error, "strerror", None) or str(error)
                    failed.append((str(file), reason.removeprefix(f"{file}: ")))
                    click.echo(f"{file}: failed: {failed[-1][1]}", err=True)
                else:
                    note = _write_image(out / name, m, display, placed, strip, made)
                    image = dict(zip(("height", "width"), m.display.shape, strict=True))
                    image |= {"id": number, "file_name": f"{name}_synthetic.png"}
                    label = {"image_id": number, "category": category}
                    annotations = [label | lesion for lesion in placed]
                    files.write_json(part, {"image": image, "annotations": annotations})
                    note += " at random, no box was given" if marked and not boxes else ""
                    shares = ", ".join(f"{p['covered']:.0%}" for p in placed if "covered" in p)
                    note += f" that covers {shares} of the annotated box" if shares else ""
                    click.echo(f"{file}: {len(placed)} x {category}{note}")
            tick()
        records = [files.read_json(part) for part in sorted(parts.glob("*.json"))]
        if not records:  # nothing is there: other options may try in the same folder
            (out / "config.json").unlink()
        else:
            annotations = [a for record in records for a in record["annotations"]]
            found = derived.coco([record["image"] for record in records], annotations)
            files.write_json(out / "annotations.json", found)
            runs.finish_folder(out, failed=failed)
        shutil.rmtree(parts)
    click.echo(f"{out}: {len(records)} images written, {len(failed)} failed")
    return failed


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

    boxes: annotated lesions in stored pixels, one after the other; what changes must hold their
    middle, and `placed` tells what share of each box it covers
    """
    shape = window_shape(synth, m.spacing_mm)
    if (np.array(m.display.shape) < shape).any():
        raise ValueError(f"{_px(m.display.shape)}, smaller than a patch of {_px(shape)}")
    tissue = data.breast_mask(m.display)
    fixed = [_centred(place, shape, tissue) for place in at]
    valid, step = _side_by_side(data.tissue_windows(tissue, shape), shape, strip)
    display, placed = m.display.copy(), []

    def ends(isolated: IsolatedLesion, corner: tuple[int, int]) -> np.ndarray:
        """First and last corner (2, 2) of the object in the image."""
        return np.reshape(isolated.bbox, (2, 2)) * shape / synth.side + corner

    for k in range(len(fixed) or len(boxes) or lesions):
        if not fixed and not boxes and not valid.any():
            raise ValueError(f"lesion {k + 1}: no place for {strip} x {_px(shape)} with 90% tissue")
        for attempt in range(TRIES_PER_LESION * strip):
            _, rng = draw(seed, int(m.image_uid, 16), k, attempt)
            if boxes:  # first in the middle, then beside it, as training patches hold lesions (P8)
                shift = rng.uniform(-0.25, 0.25, size=2) * (attempt > 0)
                row, col = _around(boxes[k], shape, tissue.shape, shift)
            else:
                row, col = fixed[k] if fixed else _choose(valid, rng)
            corners = [(row + k * step[0], col + k * step[1]) for k in range(strip)]
            windows = [(slice(r, r + shape[0]), slice(c, c + shape[1])) for r, c in corners]
            patches = np.stack([resize(display[w], (synth.side, synth.side)) for w in windows])
            found = [synth.isolate(lesion, rng) for lesion in synth.lesions(patches, [rng] * strip)]
            good = all(isolated is not None and not _is_cut(isolated) for _, isolated in found)
            if good and boxes:
                low, high = ends(found[0][1], corners[0])
                middle = np.add(boxes[k][:2], boxes[k][2:]) / 2
                good = (low < middle).all() and (middle < high).all()
            if good:
                break
        else:
            raise ValueError(
                f"no lesion accepted in {attempt + 1} attempts, the last in the window of "
                f"{_px(shape)} at row {row}, column {col}: too small (S5) or cut by its border"
                + (" or off the middle of the annotated box" if boxes else "")
            )
        for corner, window, (lesion, isolated) in zip(corners, windows, found, strict=True):
            added = resize(isolated.weights * lesion, shape)
            changed = np.clip(display[window] + added, -1, 1)
            display[window] = np.where(added == 0, display[window], changed)
            low, high = ends(isolated, corner)
            bbox = [int(v) for v in (*np.floor(low), *np.ceil(high))]  # half-open
            mask = np.zeros(display.shape, bool)
            mask[window] = resize(isolated.mask, shape) >= 0.5
            around = [*corner, *(edge.stop for edge in window)]
            placed.append({"window": around, "bbox": bbox, "segmentation": derived.rle(mask)})
            if boxes:
                box = [int(v) for v in (*np.floor(boxes[k][:2]), *np.ceil(boxes[k][2:]))]
                placed[-1] |= {"annotated": box, "covered": round(float(cut(mask, box).mean()), 3)}
        near = slice(max(row - shape[0] + 1, 0), row + shape[0])
        valid[near, max(col - shape[1] + 1, 0) : col + shape[1]] = False  # no overlap
    return display, placed


def _side_by_side(valid: np.ndarray, shape: tuple[int, int], count: int) -> tuple:
    """First corners of `count` valid windows in a row, else in a column; step between them."""
    for step in ((0, shape[1]), (shape[0], 0)):
        rows, cols = np.maximum(np.array(valid.shape) - (count - 1) * np.array(step), 0)
        each = [valid[k * step[0] :, k * step[1] :][:rows, :cols] for k in range(count)]
        if (together := np.logical_and.reduce(each)).any():
            break
    return together, step


def _is_cut(isolated: IsolatedLesion) -> bool:
    """Whether the object ends at the generator's zero frame: its straight edge would show."""
    frame = BORDER_PX * len(isolated.mask) // 256
    inner = isolated.mask[frame:-frame, frame:-frame]
    return bool(inner[[0, -1]].any() or inner[:, [0, -1]].any())


def window_shape(synth: Synthesizer, spacing_mm: tuple[float, float] | None) -> tuple[int, int]:
    """Stored pixels of one patch: its own size, or the physical size that it was trained at."""
    trained_mm = synth.run["spacing_mm"]
    if trained_mm and not spacing_mm:
        raise ValueError(
            f"pixel spacing unknown; the generator was trained at {trained_mm} mm. Give a manifest "
            "with spacing_row_mm and spacing_col_mm"
        )
    rows, cols = (trained_mm / mm for mm in spacing_mm) if trained_mm else (1, 1)
    return round(synth.side * rows), round(synth.side * cols)


def _px(shape: Sequence[int]) -> str:
    return f"{shape[0]} x {shape[1]} px"


def _choose(valid: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """One top left corner, uniform among the valid ones."""
    spots = np.flatnonzero(valid)
    return divmod(int(spots[rng.integers(len(spots))]), valid.shape[1])


def _centred(place: tuple[int, int], shape: tuple[int, int], tissue: np.ndarray) -> tuple[int, int]:
    """Top left corner of the window around `place`, which must lie in the breast."""
    low = np.array(shape) // 2
    room = np.array(tissue.shape) - shape
    corner = np.array(place) - low
    if (corner < 0).any() or (corner > room).any():
        raise ValueError(
            f"--at {place[0]} {place[1]}: the patch of {_px(shape)} leaves the image; expected row "
            f"{low[0]} to {low[0] + room[0]} and column {low[1]} to {low[1] + room[1]}"
        )
    if not tissue[tuple(place)]:
        raise ValueError(f"--at {place[0]} {place[1]}: outside the breast")
    return int(corner[0]), int(corner[1])


def _around(box, shape: tuple[int, int], image: tuple[int, int], shift: np.ndarray) -> tuple:
    """Top left corner of the window about a box, `shift` windows off, moved into the image."""
    middle = np.reshape(box, (2, 2)).mean(axis=0) + (shift - 0.5) * shape
    corner = np.clip(np.rint(middle), 0, np.subtract(image, shape))
    return int(corner[0]), int(corner[1])


def _named(files: Iterable[Path]) -> dict[str, tuple]:
    """Output name -> (file, spacing, boxes of the manifest); names are file stems, made unique."""
    found = {}
    for file in map(Path, files):
        rows = sources.read_manifest(file) if file.suffix.lower() == ".csv" else []
        found |= {row.image_path: (row.spacing_mm, []) for row in rows} or {str(file): (None, [])}
        for row in rows:  # a lesion that is both mass and calcification has two rows
            boxes = found[row.image_path][1]
            boxes += [row.bbox] if row.bbox and row.bbox not in boxes else []
    named = {}
    for path, (spacing_mm, boxes) in found.items():
        stem = Path(path).stem
        names = itertools.chain([stem], (f"{stem}_{k}" for k in itertools.count(2)))
        named[next(name for name in names if name not in named)] = Path(path), spacing_mm, boxes
    return named


def _write_image(
    stem: Path, m: mammogram.Mammogram, display: np.ndarray, placed: list[dict], strip: int, made
) -> str:
    """The files of one mammogram; returns what the user should know about them."""
    note = ""
    try:
        stored = m.restore(display)
    except ValueError as error:
        note = f" ({error}: no DICOM)"
    else:
        display = m.table.apply(stored)  # what a viewer makes of the new stored values
        if m.ds is not None:
            whole = io.BytesIO()  # pydicom would hide why a file cannot be written
            derived.write_derived_dicom(m, stored, whole, *made)
            with files.replace_file(Path(f"{stem}_synthetic.dcm")) as file:
                file.write(whole.getvalue())
    with files.replace_file(Path(f"{stem}_synthetic.png")) as file:
        derived.write_png16(file, data.to_uint16(display))
    _before_after(Path(f"{stem}_before_after.png"), m.display, display, placed, m.spacing_mm)
    if strip > 1:  # Figure 3: before above after, or beside it
        whole = (*placed[0]["window"][:2], *placed[-1]["window"][2:])
        pair = [grey(square(cut(a, whole), m.spacing_mm)) for a in (m.display, display)]
        rows = [[strip] for strip in pair] if pair[0].shape[1] > pair[0].shape[0] else [pair]
        mm = m.spacing_mm and min(m.spacing_mm)
        save_tiles(Path(f"{stem}_figure3.png"), rows, len(rows[0]) * [mm])
    return note


def _before_after(
    path: Path, before: np.ndarray, after: np.ndarray, placed: list, spacing_mm, height: int = 1200
) -> None:
    """The whole mammogram before and after, boxes drawn in; below, every window at full size."""
    pair = [square(a, spacing_mm) for a in (before, after)]
    factor = min(1.0, height / len(pair[0]))
    shape = tuple(max(1, round(n * factor)) for n in pair[0].shape)
    whole = [Image.fromarray(grey(resize(a, shape))).convert("RGB") for a in pair]
    rows, cols = np.divide(shape, before.shape)
    for lesion in placed:
        r0, c0, r1, c1 = (round(v) for v in np.multiply(lesion["bbox"], (rows, cols, rows, cols)))
        box = (c0 - 2, r0 - 2, c1 + 1, r1 + 1)
        ImageDraw.Draw(whole[1]).rectangle(box, outline=(255, 200, 0), width=2)
    windows = [
        [grey(square(cut(a, p["window"]), spacing_mm)) for p in placed] for a in (before, after)
    ]
    save_tiles(path, [list(map(np.asarray, whole)), *windows], [])


def square(values: np.ndarray, spacing_mm: tuple[float, float] | None) -> np.ndarray:
    """For pictures: pixels as high as wide, the finer side's size kept."""
    if not spacing_mm or spacing_mm[0] == spacing_mm[1]:
        return values
    stretch = np.divide(spacing_mm, min(spacing_mm))
    return resize(values, tuple(int(n) for n in np.rint(values.shape * stretch)))


def cut(image: np.ndarray, window: Sequence[int]) -> np.ndarray:
    return image[window[0] : window[2], window[1] : window[3]]
