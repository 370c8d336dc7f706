"""Lesions in full mammograms: boxes, masks, before and after (§4 "As a future step", F3, F7)."""

import io
import itertools
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import click
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import data
from data import resize, whole_box
from models import BORDER_PX
from postprocess import IsolatedLesion, Synthesizer, draw
from support import figures, files, mammogram, runs, sources

TRIES_PER_LESION, STRIP_MIN_AREA_FRAC = 100, 0.01  # ours
STRIP_DRAWS = 100  # places for a strip looked at before a column is tried, or it is given up
CATEGORY = {"mass": "synthetic mass", "calcification": "synthetic calcification"}
Window = tuple[int, int, int, int]  # row0, col0, row1, col1, half-open, stored pixels


def synthesize_images(
    gan: Path,
    paths: Iterable[Path],
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

    paths: mammograms, or manifests (.csv) whose images are meant and whose spacing overrides
    at: centres of patches in stored pixels, a lesion each; or `strip` contiguous patches in a row,
        where none fits in a column (Figure 3). Without either, removal takes every lesion that
        the manifest marks in an image; else `lesions` random places that satisfy the 90% rule
    """
    synth = Synthesizer(gan, device, "", {"component": component, **options})
    if strip > 1:  # Figure 3 shows a lesion on every patch, so smaller ones are taken too
        synth.options["min_area_frac"] = options.get("min_area_frac") or STRIP_MIN_AREA_FRAC
    images, failed, parts = _named(paths), [], out / "parts"
    marked = synth.task == "removal" and not at and strip == lesions == 1
    shown = {name: [mm, boxes if marked else []] for name, (_, mm, boxes) in images.items()}
    config = {"images": shown, "at": at, "lesions": lesions, "strip": strip}
    config |= {"seed": seed, **synth.config}
    with runs.claim_folder(out, "synthesize", config) as complete:
        if not complete:
            parts.mkdir(exist_ok=True)  # a record per whole image: a killed run does the others
            with runs.progress(len(images), "images") as advance:
                for number, (name, (file, *_)) in enumerate(images.items(), start=1):
                    if not (part := parts / f"{number:08d}.json").exists():
                        try:
                            m, (spacing_mm, boxes) = mammogram.read_mammogram(file), shown[name]
                            m.spacing_mm = spacing_mm or m.spacing_mm
                            inserted = insert_lesions(synth, m, at, lesions, strip, seed, boxes)
                        except (ValueError, OSError) as error:
                            reason = getattr(error, "strerror", None) or str(error)
                            failed.append((str(file), reason.removeprefix(f"{file}: ")))
                            click.echo(f"{file}: failed: {failed[-1][1]}", err=True)
                        else:
                            note = " at random, no box was given" if marked and not boxes else ""
                            record = _write_image(out / name, m, *inserted, synth, seed, note)
                            record["image"]["id"] = number
                            files.write_json(part, record)
                    advance()
            _finish(out, parts, failed)
