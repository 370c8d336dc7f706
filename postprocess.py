"""§3 Synthetic dataset: lesion isolation, synthetic sets, reinsertion into full mammograms.

Lesions are what the generator adds in [-1, 1] units (0 = no change); patches on disk are uint16.
Lengths are the paper's at 256 px and scale with the patch side S by S / 256.
"""

import functools
import io
import itertools
import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage, optimize

import data
import mammogram
from models import BORDER_PX, load_generator

LESION_THRESHOLD = 0.1  # §3 "applying a threshold of 0.1", S3; no rescaling, Q25
MIN_AREA_FRAC = 0.10  # §3 "< 10% of the patch area", S5
DILATE_PX = 5.0  # §3 "Expand the edges of the object by 5px", S6
SMOOTH_SIGMA = 10.0  # §3 "10px Gaussian smoothing filter", S7; read as sigma, Q29
CLUSTER_PX, CLUSTER_MIN_AREA_FRAC = 10.0, 0.02  # ours, for calcifications; Q27
CONNECTIVITY = {4: ndimage.generate_binary_structure(2, 1), 8: np.ones((3, 3), bool)}  # Q26
ATTEMPTS_PER_SAMPLE = 20  # ours; Q27
ADVICE = "Train longer, or for calcifications give --component cluster"
BATCH, CHUNK = 16, 128  # attempts per forward pass (it may move a last bit) and per part file
SOURCES = {  # train classes that each task's generator takes as input; S1, S9
    "mass": ("normal",),
    "calcification": ("normal",),
    "removal": ("malignant_mass", "malignant_calcification"),
}


# --- §3 Synthetic dataset, step 4: post-process the synthetic patch ---


@dataclass(frozen=True)
class IsolatedLesion:
    """What post-processing keeps of one lesion channel."""

    weights: np.ndarray  # (S, S) float64 in [0, 1]: multiply with the lesion, then add
    mask: np.ndarray  # (S, S) bool: the object before expansion
    area: int  # pixels of the object
    bbox: tuple[int, int, int, int]  # of the object


def isolate_lesion(
    lesion: np.ndarray,
    removal: bool = False,
    *,
    component: str = "largest",
    min_area_frac: float | None = None,
    threshold: float = LESION_THRESHOLD,
    connectivity: int = 4,
    dilate_px: float = DILATE_PX,
    dilate_shape: str = "disk",
    smooth_sigma: float = SMOOTH_SIGMA,
    cluster_px: float = CLUSTER_PX,
) -> IsolatedLesion | None:
    """The paper's steps on a lesion channel (S, S) (S2); None when the object is discarded.

    component: "largest" as the paper, or "cluster": grains, each widened by `cluster_px`, that
        meet are one object. Deviation: Q27.
    min_area_frac: of the patch; None = 0.10, with "cluster" 0.02
    """
    side = len(lesion)
    assert lesion.shape == (side, side), lesion.shape
    scale = side / 256
    if min_area_frac is None:
        min_area_frac = MIN_AREA_FRAC if component == "largest" else CLUSTER_MIN_AREA_FRAC
    # "Create a binary mask of the channel by applying a threshold" (S3; S9 for removal)
    found = lesion < -threshold if removal else lesion > threshold
    joined = dilate(found, cluster_px * scale) if component == "cluster" else found
    # "Use connected-component labeling and pick the largest object" (S4); ties: the first one
    labels, count = ndimage.label(joined, CONNECTIVITY[connectivity])
    if count == 0:
        return None
    areas = np.bincount(labels.ravel())
    largest = 1 + int(areas[1:].argmax())
    # "Discard the object if it is too small" (S5)
    if areas[largest] < min_area_frac * side**2:
        return None
    kept, (rows, cols) = labels == largest, ndimage.find_objects(labels)[largest - 1]
    bbox = (rows.start, cols.start, rows.stop, cols.stop)
    # "Expand the edges of the object by 5px" (S6)
    reach = int(dilate_px * scale)
    box = _grow(bbox, reach, side)
    expanded = dilate(kept[box], dilate_px * scale, dilate_shape)
    # "Apply a 10px Gaussian smoothing filter to the edge of the object" (S7)
    blur = smoothing(side, smooth_sigma * scale)
    to = _grow(bbox, reach + int(4 * smooth_sigma * scale + 0.5), side)  # zero beyond 4 sigma
    weights = np.zeros((side, side))
    weights[to] = blur[to[0], box[0]] @ expanded.astype(np.float64) @ blur[to[1], box[1]].T
    return IsolatedLesion(weights, found & kept, int(areas[largest]), bbox)


def add_lesion(patch: np.ndarray, lesion: np.ndarray, isolated: IsolatedLesion) -> np.ndarray:
    """ "Element-wise multiply the resulting mask with the lesion channel", add it, clip (S8, Q30).

    patch: uint16; the result equals it bit for bit wherever the weight is zero
    """
    return data.to_uint16(data.to_float(patch) + isolated.weights * lesion)


def dilate(mask: np.ndarray, radius: float, shape: str = "disk") -> np.ndarray:
    """Grow a mask: "disk" = Euclidean distance <= radius, "cross" = city block, "square" (Q28)."""
    rows, cols = mask.shape
    out, wide, k = np.zeros_like(mask), mask.copy(), 0
    for d in range(min(int(radius), rows - 1), -1, -1):  # row offset; its run of columns grows
        run = {"disk": math.sqrt(radius**2 - d**2), "cross": radius - d, "square": radius}[shape]
        while k < min(int(run), cols - 1):
            k += 1
            wide[:, k:] |= mask[:, :-k]
            wide[:, :-k] |= mask[:, k:]
        out[d:] |= wide[: rows - d]
        out[: rows - d] |= wide[d:]
    return out


@functools.lru_cache(maxsize=4)
def smoothing(side: int, sigma: float) -> np.ndarray:
    """scipy's Gaussian filter (truncated at 4 sigma, reflecting) as a matrix: B @ mask @ B.T.

    Cut to the rows and columns of an object, two small products replace the whole-patch filter.
    """
    sigma = max(sigma, 1e-3)  # 0 is no smoothing
    return ndimage.gaussian_filter1d(np.eye(side), sigma, axis=0, mode="reflect", truncate=4.0)


def _grow(bbox: tuple[int, int, int, int], by: int, side: int) -> tuple[slice, slice]:
    low, high = np.maximum(bbox[:2], by) - by, np.minimum(bbox[2:], side - by) + by
    return slice(low[0], high[0]), slice(low[1], high[1])


# --- Control: a bump of the same size that nobody learned ---


def blob(
    isolated: IsolatedLesion, lesion: np.ndarray, component: str, rng: np.random.Generator
) -> np.ndarray:
    """A smooth featureless bump with the area and mean strength of an accepted lesion (S, S).

    Its place is uniform among those where it fits inside the generator's zero frame. The profile
    is a Gaussian that falls to the threshold at the edge of the area.
    """
    side, area = len(lesion), isolated.area
    frame, radius = BORDER_PX * side // 256, math.sqrt(area / math.pi)
    if component == "cluster":  # `area` is that of the joined object: joining will widen the bump
        radius = max(radius - CLUSTER_PX * side / 256, 0.6)
        area = max(round(math.pi * radius**2), 1)
    low = min(frame + radius, side / 2)
    row, col = rng.uniform(low, side - low, size=2) - 0.5
    r2 = (np.arange(side)[:, None] - row) ** 2 + (np.arange(side) - col) ** 2
    inside = np.pad(np.ones((side - 2 * frame,) * 2, bool), frame)
    ranked = np.sort(r2[inside])
    edge2 = ranked[min(area, len(ranked) - 1) :][:1] - 1e-6  # exactly `area` pixels pass
    # mean of a Gaussian of height p over the disc where it exceeds t: (p - t) / ln(p / t)
    t, strength = LESION_THRESHOLD, float(lesion[isolated.mask].mean())
    mean = max(abs(strength), 1.001 * t)
    peak = optimize.brentq(lambda p: (p - t) / math.log(p / t) - mean, t * (1 + 1e-9), 100.0)
    bump = np.where(inside, np.minimum(peak * np.exp(-math.log(peak / t) * r2 / edge2), 1), 0)
    return np.copysign(bump, strength)


# --- A trained generator and what is done with its lesions ---


class Synthesizer:
    """Generator, control and post-processing (keywords of isolate_lesion) of one command."""

    def __init__(self, gan: Path, device: torch.device | str, control: str, options: dict):
        self.G, self.run, self.hash = load_generator(gan, torch.device(device))
        self.gan, self.control, self.options = gan, control, options
        self.task, self.side = self.run.get("task"), self.G.patch_size
        if self.task not in tuple(SOURCES):
            raise ValueError(f"--gan {gan}: its config.json is damaged (task {self.task!r:.80})")
        self.config = {"task": self.task, "generator": self.hash, "control": control, **options}

    @torch.inference_mode()
    def lesions(self, patches: np.ndarray, rngs: Sequence[np.random.Generator]) -> np.ndarray:
        """Lesion channels (S2) of patches (N, S, S) in [-1, 1], noise from one rng each."""
        z = np.stack([rng.uniform(-1, 1, size=2 * self.G.blocks) for rng in rngs])
        device = next(self.G.parameters()).device
        x, z = (torch.from_numpy(a.astype(np.float32)).to(device) for a in (patches[:, None], z))
        lesions = self.G(x, z)[:, 0].float().cpu().numpy()  # (N, S, S)
        if not np.isfinite(lesions).all():
            raise ValueError(f"--gan {self.gan}: gives values that are not finite; train it again")
        return lesions

    def isolate(self, lesion: np.ndarray, rng: np.random.Generator) -> tuple:
        """(lesion channel to use, its IsolatedLesion or None)."""
        removal = self.task == "removal"
        isolated = isolate_lesion(lesion, removal, **self.options)
        if isolated is not None and self.control == "blob":
            lesion = blob(isolated, lesion, self.options["component"], rng)
            # The same steps again; the area was accepted already.
            isolated = isolate_lesion(lesion, removal, **self.options | {"min_area_frac": 0})
        return lesion, isolated


def draw(*key: int) -> tuple[int, np.random.Generator]:
    """One number that names an attempt, and the random numbers that follow from it."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 11)  # exact in JSON
    return seed, np.random.default_rng(seed)


# --- §3 "To create our synthetic training dataset, we generated 5000 examples each" ---


class NothingAccepted(ValueError):
    """The generator yields no lesion that passes post-processing; the set would be empty."""


def synthesize_set(
    gan: Path,
    patch_set: Path,
    out: Path,
    n: int = 5000,  # S10
    component: str = "largest",
    control: str = "",
    seed: int = 0,
    device: torch.device | str = "cpu",
    **options: object,
) -> dict:
    """Write a synthetic set, say what came out, return its config.json.

    Attempt a draws source patch and noise from (seed, a) alone; the first n accepted are the set.
    control: "blob" replaces each accepted lesion by a bump, see `blob`
    options: more keywords of isolate_lesion
    Raises ValueError: the run does not fit the patch set, a source patient is not in the training
    split, or nothing was accepted.
    """
    synth = Synthesizer(gan, device, control, {"component": component, **options})
    patches = data.patch_config(patch_set)
    if synth.run["data"] != patches["fingerprint"]:
        raise ValueError(
            f"--gan {gan}: trained on another patch set ({synth.side} px) than --data {patch_set} "
            f"({patches['patch_size']} px); give the one that the run was trained on"
        )
    sources = TrainingPatches(patch_set, synth.task)
    config = {"data": patches["fingerprint"], "spacing_mm": patches["spacing_mm"], "n": n}
    config |= {"patch_size": synth.side, "seed": seed, **synth.config}
    with data.claim_folder(out, "synthesize", config):
        parts = out / "parts"  # one file per chunk of attempts: a killed run goes on after the last
        if data.read_json(out / "config.json")["complete"]:
            shutil.rmtree(parts, ignore_errors=True)  # it was killed while tidying up
            click.echo(f"{out}: complete already", err=True)
            return data.read_json(out / "config.json")
        parts.mkdir(exist_ok=True)
        counts = np.zeros(3, int)  # attempts, accepted, without a pixel over the threshold
        counts += sum(_chunk(part, "counts") for part in parts.glob("*.npz"))
        with data.progress(n, f"synthesize {synth.task}", done=int(counts[1])) as advance:
            while counts[1] < n and counts[0] < ATTEMPTS_PER_SAMPLE * n:
                end = min(counts[0] + CHUNK, ATTEMPTS_PER_SAMPLE * n)
                samples, new = attempt(synth, sources, seed, range(counts[0], end), n - counts[1])
                with data.replace_file(parts / f"{counts[0]:08d}.npz") as file:
                    np.savez(file, samples=samples, counts=new)
                counts += new
                advance(len(samples), f"{counts[1] / counts[0]:.0%} of attempts accepted")
        attempts, accepted, empty = counts.tolist()
        if not accepted:
            raise NothingAccepted(
                f"--gan {gan}: no lesion accepted in {attempts} attempts; {empty} had no pixel "
                f"over the threshold of 0.1, the others too small an object (S5). {ADVICE}"
            )
        facts = {"attempts": attempts, "accepted": accepted, "acceptance": accepted / attempts}
        facts |= {"empty": empty, "short": accepted < n}
        facts |= _assemble(out, sorted(parts.glob("*.npz")), config, sources)
        facts |= {"warnings": _warnings(facts), "gan": synth.run}
        click.echo(
            f"{out}: {accepted} of {n} samples, {facts['acceptance']:.1%} of {attempts} attempts, "
            f"from {len(facts['patients'])} training patients; area in tenths of the patch: "
            f"{facts['area_histogram']}, median {facts['area_median']:.1%}; mean strength inside "
            f"the lesion: {facts['strength']:+.3f} of [-1, 1]"
        )
        for warning in facts["warnings"]:
            click.echo(f"Warning: {warning}")
        with data.replace_file(out / "gan.png") as file:  # how it was trained, for the report
            file.write((gan / "gan.png").read_bytes())
        data.finish_folder(out, **facts)
        shutil.rmtree(parts)
        return data.read_json(out / "config.json")


class TrainingPatches:
    """The union of the training patches that a task's generator takes as input (S1, S9, Q20)."""

    def __init__(self, patch_set: Path, task: str):
        folder = patch_set / "patches" / "train"
        names = [name for name in SOURCES[task] if (folder / f"{name}.npy").exists()]
        names = names or [SOURCES[task][0]]  # data.open_patches says that it is missing
        self.arrays = {name: data.open_patches(patch_set, "train", name) for name in names}
        wanted = ("image_uid", "patient_id", "scale")
        tables = [data.read_table(folder / f"{name}.csv", wanted) for name in names]
        self.columns = {c: np.concatenate([table[c] for table in tables]) for c in wanted}
        lengths = [len(array) for array in self.arrays.values()]
        self.columns["source_class"] = np.repeat(names, lengths)
        self.columns["source_patch"] = np.concatenate([np.arange(length) for length in lengths])
        splits = data.split_of(patch_set)
        for patient in map(str, np.unique(self.columns["patient_id"])):
            if splits.get(patient) != "train":
                raise ValueError(
                    f"{folder}: patient {patient} is in split {splits.get(patient)!r}; synthetic "
                    "patches are made from training patients only. Prepare the patch set again"
                )

    def __len__(self) -> int:
        return len(self.columns["source_patch"])

    def __getitem__(self, i: int) -> np.ndarray:
        return self.arrays[self.columns["source_class"][i]][self.columns["source_patch"][i]]


def attempt(
    synth: Synthesizer, sources: TrainingPatches, seed: int, attempts: range, wanted: int
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Up to `wanted` samples; how many attempts were made, accepted and without a lesion."""
    square = (synth.side, synth.side)
    sample = [("input", "<u2", square), ("combined", "<u2", square), ("mask", "?", square)]
    sample += [("seed", "i8"), ("source", "i8"), ("area", "i8"), ("bbox", "i8", 4)]
    kept, tried, empty = [], 0, 0
    for start in range(attempts.start, attempts.stop, BATCH):
        if len(kept) == wanted:
            break
        # Always a whole batch: what comes out does not depend on where the attempts end.
        named = [draw(seed, a) for a in range(start, start + BATCH)]
        chosen = [int(rng.integers(len(sources))) for _, rng in named]
        inputs = np.stack([sources[i] for i in chosen])
        lesions = synth.lesions(data.to_float(inputs), [rng for _, rng in named])
        for (name, rng), source, patch, lesion in zip(named, chosen, inputs, lesions, strict=True):
            if len(kept) == wanted or tried == len(attempts):
                break
            tried += 1
            lesion, isolated = synth.isolate(lesion, rng)
            if isolated is None:
                empty += not (np.abs(lesion) > LESION_THRESHOLD).any()
                continue
            row = (name, source, isolated.area, isolated.bbox, lesion[isolated.mask].mean())
            kept.append((patch, add_lesion(patch, lesion, isolated), isolated.mask, *row))
    return np.array(kept, [*sample, ("strength", "f8")]), (tried, len(kept), empty)


def _chunk(part: Path, name: str) -> np.ndarray:
    """An array of a part file. Raises ValueError when the file is damaged."""
    try:
        with np.load(part) as arrays:
            return arrays[name]
    except Exception as error:  # a damaged archive makes numpy raise almost anything
        raise ValueError(f"{part}: damaged ({error}); delete {part.parent}, run it again") from None


def _assemble(out: Path, parts: list[Path], config: dict, sources: TrainingPatches) -> dict:
    """Arrays, index and figures from the chunks; what there is to say about the lesions."""
    fields = ("seed", "source", "area", "bbox", "strength")
    rows = np.concatenate([_chunk(part, "samples")[list(fields)] for part in parts])
    side = config["patch_size"]
    for name, dtype in (("input", "<u2"), ("combined", "<u2"), ("lesion", "<i4"), ("mask", "|b1")):
        with data.replace_file(out / f"{name}.npy") as file:
            header = {"descr": dtype, "fortran_order": False, "shape": (len(rows), side, side)}
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                samples = _chunk(part, "samples")
                lesion = samples["combined"].astype(np.int32) - samples["input"]
                file.write((lesion if name == "lesion" else samples[name]).tobytes())
    source = {c: values[rows["source"]].tolist() for c, values in sources.columns.items()}
    masks = np.load(out / "mask.npy", mmap_mode="r")
    runs = (" ".join(map(str, mammogram.rle(mask)["counts"])) for mask in masks)  # COCO's
    columns = [range(len(rows)), source["source_patch"], source["image_uid"], source["patient_id"]]
    columns += [rows["seed"], rows["area"], *rows["bbox"].T, source["source_class"]]
    columns += [rows["strength"].round(6), runs]
    header = (*data.SYNTHETIC_COLUMNS, "source_class", "strength", "mask_rle")
    data.write_table(out / "index.csv", header, zip(*columns, strict=True))
    shown = slice(0, FIGURE_SAMPLES)
    names = ("input", "lesion", "combined")
    before, lesion, after = (np.load(out / f"{n}.npy", mmap_mode="r")[shown] for n in names)
    lesion = lesion / max(1, int(np.abs(lesion).max()))  # mid-grey is no change; stretched
    mm = [config["spacing_mm"] and config["spacing_mm"] / float(s) for s in source["scale"][shown]]
    pairs = [grey(patch) for pair in zip(before, after, strict=True) for patch in pair]
    save_tiles(out / "figure1.png", [pairs], np.repeat(mm, 2))
    save_tiles(out / "figure2a.png", [list(map(grey, a)) for a in (before, lesion, after)], mm)
    share = rows["area"] / side**2
    return {
        "patients": sorted(set(source["patient_id"])),
        "area_histogram": np.histogram(share, bins=10, range=(0, 1))[0].tolist(),
        "area_median": float(np.median(share)),
        "strength": float(rows["strength"].mean()),
    }


def _warnings(facts: dict) -> list[str]:
    few = f"short, {facts['accepted']} samples: {facts['attempts']} attempts are the most made"
    rare = f"only {facts['acceptance']:.1%} accepted, the generator's rare results. {ADVICE}"
    wide = f"half of the lesions cover over {facts['area_median']:.0%} of the patch. {ADVICE}"
    said = {few: facts["short"], rare: facts["acceptance"] < 0.05, wide: facts["area_median"] > 0.5}
    return [text for text, applies in said.items() if applies]


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
    with data.claim_folder(out, "synthesize", config), data.progress(len(images), "images") as tick:
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
                    data.write_json(part, {"image": image, "annotations": annotations})
                    note += " at random, no box was given" if marked and not boxes else ""
                    shares = ", ".join(f"{p['covered']:.0%}" for p in placed if "covered" in p)
                    note += f" that covers {shares} of the annotated box" if shares else ""
                    click.echo(f"{file}: {len(placed)} x {category}{note}")
            tick()
        records = [data.read_json(part) for part in sorted(parts.glob("*.json"))]
        if not records:  # nothing is there: other options may try in the same folder
            (out / "config.json").unlink()
        else:
            annotations = [a for record in records for a in record["annotations"]]
            found = mammogram.coco([record["image"] for record in records], annotations)
            data.write_json(out / "annotations.json", found)
            data.finish_folder(out, failed=failed)
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
            placed.append({"window": around, "bbox": bbox, "segmentation": mammogram.rle(mask)})
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


def resize(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Bilinear, averaging where it shrinks, as the training patches; float32 (rows, cols)."""
    image = Image.fromarray(np.asarray(values, np.float32))
    return np.asarray(image.resize(shape[::-1], Image.Resampling.BILINEAR))


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
        rows = data.read_manifest(file) if file.suffix.lower() == ".csv" else []
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
            mammogram.write_derived_dicom(m, stored, whole, *made)
            with data.replace_file(Path(f"{stem}_synthetic.dcm")) as file:
                file.write(whole.getvalue())
    with data.replace_file(Path(f"{stem}_synthetic.png")) as file:
        mammogram.write_png16(file, data.to_uint16(display))
    _before_after(Path(f"{stem}_before_after.png"), m.display, display, placed, m.spacing_mm)
    if strip > 1:  # Figure 3: before above after, or beside it
        whole = (*placed[0]["window"][:2], *placed[-1]["window"][2:])
        pair = [grey(square(cut(a, whole), m.spacing_mm)) for a in (m.display, display)]
        rows = [[strip] for strip in pair] if pair[0].shape[1] > pair[0].shape[0] else [pair]
        mm = m.spacing_mm and min(m.spacing_mm)
        save_tiles(Path(f"{stem}_figure3.png"), rows, len(rows[0]) * [mm])
    return note


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
    with data.replace_file(path) as file:
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
