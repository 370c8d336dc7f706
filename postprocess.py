"""§3 Synthetic dataset: lesion isolation, synthetic sets, reinsertion into full mammograms.

Lesions are what the generator adds in [-1, 1] units (0 = no change); patches on disk are uint16.
Lengths are the paper's at 256 px and scale with the patch side S by S / 256.
"""

import functools
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from scipy import ndimage, optimize

import data
from models import BORDER_PX, Generator
from support import derived, files, patchset, runs
from support.figures import FIGURE_SAMPLES, grey, save_tiles
from support.runs import checkpoint, finished, weights_hash

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
        z = np.stack([rng.uniform(-1, 1, size=self.G.noise_size) for rng in rngs])
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
    patches = patchset.patch_config(patch_set)
    if synth.run["data"] != patches["fingerprint"]:
        raise ValueError(
            f"--gan {gan}: trained on another patch set ({synth.side} px) than --data {patch_set} "
            f"({patches['patch_size']} px); give the one that the run was trained on"
        )
    sources = TrainingPatches(patch_set, synth.task)
    config = {"data": patches["fingerprint"], "spacing_mm": patches["spacing_mm"], "n": n}
    config |= {"patch_size": synth.side, "seed": seed, **synth.config}
    with runs.claim_folder(out, "synthesize", config):
        parts = out / "parts"  # one file per chunk of attempts: a killed run goes on after the last
        if files.read_json(out / "config.json")["complete"]:
            shutil.rmtree(parts, ignore_errors=True)  # it was killed while tidying up
            click.echo(f"{out}: complete already", err=True)
            return files.read_json(out / "config.json")
        parts.mkdir(exist_ok=True)
        counts = np.zeros(3, int)  # attempts, accepted, without a pixel over the threshold
        counts += sum(_chunk(part, "counts") for part in parts.glob("*.npz"))
        with runs.progress(n, f"synthesize {synth.task}", done=int(counts[1])) as advance:
            while counts[1] < n and counts[0] < ATTEMPTS_PER_SAMPLE * n:
                end = min(counts[0] + CHUNK, ATTEMPTS_PER_SAMPLE * n)
                samples, new = attempt(synth, sources, seed, range(counts[0], end), n - counts[1])
                with files.replace_file(parts / f"{counts[0]:08d}.npz") as file:
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
        with files.replace_file(out / "gan.png") as file:  # how it was trained, for the report
            file.write((gan / "gan.png").read_bytes())
        runs.finish_folder(out, **facts)
        shutil.rmtree(parts)
        return files.read_json(out / "config.json")


class TrainingPatches:
    """The union of the training patches that a task's generator takes as input (S1, S9, Q20)."""

    def __init__(self, patch_set: Path, task: str):
        folder = patch_set / "patches" / "train"
        names = [name for name in SOURCES[task] if (folder / f"{name}.npy").exists()]
        names = names or [SOURCES[task][0]]  # patchset.open_patches says that it is missing
        self.arrays = {name: patchset.open_patches(patch_set, "train", name) for name in names}
        wanted = ("image_uid", "patient_id", "scale")
        tables = [files.read_table(folder / f"{name}.csv", wanted) for name in names]
        self.columns = {c: np.concatenate([table[c] for table in tables]) for c in wanted}
        lengths = [len(array) for array in self.arrays.values()]
        self.columns["source_class"] = np.repeat(names, lengths)
        self.columns["source_patch"] = np.concatenate([np.arange(length) for length in lengths])
        splits = patchset.split_of(patch_set)
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
        with files.replace_file(out / f"{name}.npy") as file:
            header = {"descr": dtype, "fortran_order": False, "shape": (len(rows), side, side)}
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                samples = _chunk(part, "samples")
                lesion = samples["combined"].astype(np.int32) - samples["input"]
                file.write((lesion if name == "lesion" else samples[name]).tobytes())
    source = {c: values[rows["source"]].tolist() for c, values in sources.columns.items()}
    masks = np.load(out / "mask.npy", mmap_mode="r")
    runs = (" ".join(map(str, derived.rle(mask)["counts"])) for mask in masks)  # COCO's
    columns = [range(len(rows)), source["source_patch"], source["image_uid"], source["patient_id"]]
    columns += [rows["seed"], rows["area"], *rows["bbox"].T, source["source_class"]]
    columns += [rows["strength"].round(6), runs]
    header = (*patchset.SYNTHETIC_COLUMNS, "source_class", "strength", "mask_rle")
    files.write_table(out / "index.csv", header, zip(*columns, strict=True))
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


def load_generator(run: Path, device: torch.device) -> tuple[Generator, dict, str]:
    """The trained generator of a finished run: (G in eval mode, config, hash of its weights)."""
    config = finished(run, "train-gan")["config"]
    with checkpoint(run) as state:
        G = Generator(config["patch_size"], config["g_base"], config["g_center"], config["sn_g"])
        G.load_state_dict(state["watch"]["chosen"])
    return G.to(device).eval(), config, weights_hash(G)
