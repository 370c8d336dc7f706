"""§3 Synthetic dataset: steps 1 to 5 from a training patch to a synthetic one, and whole sets.

Lesions are what the generator adds in [-1, 1] units (0 = no change); patches on disk are uint16.
Lengths are the paper's at 256 px and scale with the patch side S by S / 256. Where a step stands:

    1, 2 "Randomly sample a healthy mammogram image", "a 256x256px patch"   source_patches, attempt
    3 "Input the patch into the generator"                                  Synthesizer.lesions
    4 "Perform the following steps to post-process"                         isolate_lesion
      "Element-wise multiply the resulting mask with the lesion channel"    add_lesion
    5 "Add the lesion channel to the base normal patch"                     add_lesion
    "we generated 5000 examples each"                                       synthesize_set
"""

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
from models import BORDER_PX, Generator, generator
from support import derived, figures, files, patchset, provenance, runs

LESION_THRESHOLD = 0.1  # §3 "applying a threshold of 0.1", S3; no rescaling, Q25
MIN_AREA_FRAC = {"largest": 0.10, "cluster": 0.02}  # §3 "< 10% of the patch area", S5; ours, Q27
DILATE_PX = 5.0  # §3 "Expand the edges of the object by 5px", S6
SMOOTH_SIGMA = 10.0  # §3 "10px Gaussian smoothing filter", S7; read as sigma, Q29
CLUSTER_PX = 10.0  # ours, for calcifications; Q27
CONNECTIVITY = {4: ndimage.generate_binary_structure(2, 1), 8: np.ones((3, 3), bool)}  # Q26
ATTEMPTS_PER_SAMPLE = 20  # ours; Q27
BATCH = 16  # attempts per forward pass (another number may move a last bit) and per part file
SHOWN = 4  # samples in Figures 1 and 2a
IMAGES = {"input": "<u2", "combined": "<u2", "lesion": "<i4", "mask": "|b1"}  # of a sample
FACTS = {"seed": "i8", "source": "i8", "area": "i8", "bbox": "4i8", "strength": "f8"}
ADVICE = "Train longer, or widen --min-area, --max-area"


# --- Steps 1 and 2: "Randomly sample a 256x256px patch" ---


def source_patches(patch_set: Path, task: str) -> patchset.Patches:
    """Training patches that a task's generator takes as input (S1, S9, Q20). Deviation: A9.

    Raises ValueError when one is not of a training patient, or there are none.
    """
    patches = patchset.Patches.open(patch_set, "train", data.TASKS[task].source)
    splits = patchset.split_of(patch_set)
    for patient in map(str, np.unique(patches.column("patient_id"))):
        if splits.get(patient) != "train":
            found = f"{patch_set}: patient {patient} is in split {splits.get(patient)!r}"
            advice = "synthetic patches are made from training patients only. Prepare it again"
            raise ValueError(f"{found}; {advice}")
    return patches


def draw(*key: int) -> tuple[int, np.random.Generator]:
    """One number that names an attempt, and the random numbers that follow from it."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 11)  # exact in JSON
    return seed, np.random.default_rng(seed)


# --- Step 3: "Input the patch into the generator and generate the synthetic patch" ---


def load_generator(run: Path, device: torch.device) -> tuple[Generator, dict, str]:
    """The trained generator of a finished run: (G in eval mode, config, hash of its weights)."""
    config = runs.finished(run, "train-gan")["config"]
    with files.reading(run / "config.json", "train it again"):
        G = generator(config)
        assert config["task"] in data.TASKS, config["task"]
    with runs.checkpoint(run) as state:
        G.load_state_dict(state["watch"]["chosen"])
    return G.to(device).eval(), config, runs.weights_hash(G)


class Synthesizer:
    """Generator, control and post-processing (keywords of isolate_lesion) of one command."""

    def __init__(self, gan: Path, device: torch.device | str, control: str, options: dict):
        isolate_lesion(np.zeros((1, 1)), **options)  # limits that exclude each other are told first
        self.G, self.run, self.hash = load_generator(gan, torch.device(device))
        self.gan, self.control, self.options = gan, control, {"component": "largest"} | options
        self.task, self.side = self.run["task"], self.G.patch_size
        self.config = {"task": self.task, "generator": self.hash, "control": control} | self.options
        grains = self.task == "calcification" and self.options["component"] == "largest"
        self.advice = f"{ADVICE}, or give --component cluster" if grains else ADVICE

    @torch.inference_mode()
    def lesions(self, patches: np.ndarray, rngs: Sequence[np.random.Generator]) -> np.ndarray:
        """ "Isolate the lesion channel" (S2) of patches (N, S, S) in [-1, 1], an rng for each."""
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
            any_area = {"min_area_frac": 0, "max_area_frac": 1}
            isolated = isolate_lesion(lesion, removal, **self.options | any_area)
        return lesion, isolated


# --- Step 4: "Perform the following steps to post-process the synthetic patch" ---


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
    max_area_frac: float | None = None,
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
    max_area_frac: ours; None = 1, as the paper: no object is too large
    Raises ValueError when the second is below the first.
    """
    side = len(lesion)
    assert lesion.shape == (side, side), lesion.shape
    scale = side / 256
    least = MIN_AREA_FRAC[component] if min_area_frac is None else min_area_frac
    most = 1 if max_area_frac is None else max_area_frac
    if most < least:
        raise ValueError(f"--max-area {most:g}: below --min-area {least:g}; raise it or lower that")
    # "Create a binary mask of the channel by applying a threshold of 0.1" (S3; S9 for removal)
    mask = lesion < -threshold if removal else lesion > threshold
    if not mask.any():
        return None
    # "Use connected-component labeling and pick the largest object" (S4); ties: the first one
    joined = dilate(mask, cluster_px * scale) if component == "cluster" else mask
    labels, _ = ndimage.label(joined, CONNECTIVITY[connectivity])
    areas = np.bincount(labels.ravel())[1:]
    largest = 1 + int(areas.argmax())
    kept, area = labels == largest, int(areas.max())
    # "Discard the object if it is too small (< 10% of the patch area)" (S5), or if it is too large
    if not least * side**2 <= area <= most * side**2:
        return None
    # "Expand the edges of the object by 5px" (S6)
    expanded = dilate(kept, dilate_px * scale, dilate_shape)
    # "Apply a 10px Gaussian smoothing filter to the edge of the object" (S7); it ends at 4 sigma
    weights = ndimage.gaussian_filter(expanded.astype(np.float64), smooth_sigma * scale)
    box = ndimage.find_objects(labels)[largest - 1]
    bbox = (*(edge.start for edge in box), *(edge.stop for edge in box))
    return IsolatedLesion(weights, mask & kept, area, bbox)


def dilate(mask: np.ndarray, radius: float, shape: str = "disk") -> np.ndarray:
    """Grow a mask: "disk" = Euclidean distance <= radius, "cross" = city block, "square" (Q28)."""
    assert mask.any()  # without an object there is no distance to it
    if shape == "disk":
        return ndimage.distance_transform_edt(~mask) <= radius
    metric = {"cross": "taxicab", "square": "chessboard"}[shape]
    return ndimage.distance_transform_cdt(~mask, metric) <= radius


# --- The end of step 4, "multiply", and step 5: "Add the lesion channel to the base patch" ---


def add_lesion(patch: np.ndarray, lesion: np.ndarray, isolated: IsolatedLesion) -> np.ndarray:
    """ "Element-wise multiply the resulting mask with the lesion channel"; add it; clip (S8, Q30).

    patch: uint16; the result equals it bit for bit wherever the weight is zero
    """
    return data.to_uint16(data.to_float(patch) + isolated.weights * lesion)


# --- "To create our synthetic training dataset, we generated 5000 examples each" ---


class NothingAccepted(ValueError):
    """The generator yields no lesion that passes post-processing; the set would be empty."""


def synthesize_set(
    gan: Path,
    patch_set: Path,
    out: Path,
    n: int = 5000,  # S10
    control: str = "",
    seed: int = 0,
    device: torch.device | str = "cpu",
    **options: object,
) -> dict:
    """Write a synthetic set, say what came out, return its config.json.

    Attempt a draws source patch and noise from (seed, a) alone; the first n accepted are the set.
    control: "blob" replaces each accepted lesion by a bump, see `blob`
    options: keywords of isolate_lesion
    Raises ValueError: the run does not fit the patch set, a source patient is not in the training
    split, or nothing was accepted.
    """
    synth = Synthesizer(gan, device, control, options)
    prepared = patchset.patch_config(patch_set)
    for key, side in (("patch_size", synth.side), ("spacing_mm", synth.run["spacing_mm"])):
        if prepared[key] != side:
            found = f"trained with {key} {side}, --data {patch_set} has {prepared[key]}"
            raise ValueError(f"--gan {gan}: {found}; prepare patches with the same")
    provenance.check_unseen(synth.run, patch_set, f"--gan {gan}:")
    sources = source_patches(patch_set, synth.task)
    config = {"data": prepared["fingerprint"], "spacing_mm": prepared["spacing_mm"], "n": n}
    config |= {"patch_size": synth.side, "seed": seed} | synth.config
    parts = out / "parts"  # a file per batch of attempts: a killed run goes on after the last
    with runs.claim_folder(out, "synthesize", config) as complete:
        if not complete:
            parts.mkdir(exist_ok=True)
            facts = generate(synth, sources, n, seed, parts)
            facts |= assemble(out, sorted(parts.glob("*.npz")), config, sources)
            facts |= {"warnings": _warnings(facts, synth.advice), "gan": synth.run}
            with files.replace_file(out / "gan.png") as file:  # how it was trained, for the report
                file.write((gan / "gan.png").read_bytes())
            click.echo(
                f"{out}: {facts['accepted']} of {n} samples, {facts['acceptance']:.1%} of "
                f"{facts['attempts']} attempts, from {len(facts['patients'])} training patients; "
                f"area in tenths of the patch: {facts['area_histogram']}, median "
                f"{facts['area_median']:.1%}; mean strength inside the lesion: "
                f"{facts['strength']:+.3f} of [-1, 1]"
            )
            for warning in facts["warnings"]:
                click.echo(f"Warning: {warning}")
            runs.finish_folder(out, **facts)
        shutil.rmtree(parts, ignore_errors=True)
        return files.read_json(out / "config.json")


def generate(
    synth: Synthesizer, sources: patchset.Patches, n: int, seed: int, parts: Path
) -> dict[str, int | float | bool]:
    """Make attempts until n are accepted, or 20 n were made (Q27); what came of them."""
    counts, most = np.zeros(3, int), ATTEMPTS_PER_SAMPLE * n  # attempts, accepted, empty
    for part in parts.glob("*.npz"):
        counts += _read_part(part, "counts")
    with runs.progress(n, f"synthesize {synth.task}", done=int(counts[1])) as advance:
        while counts[1] < n and counts[0] < most:
            attempts = range(counts[0], min(counts[0] + BATCH, most))
            samples, new = attempt(synth, sources, seed, attempts, wanted=n - counts[1])
            with files.replace_file(parts / f"{counts[0]:08d}.npz") as file:
                np.savez(file, counts=new, **{name: samples[name] for name in samples.dtype.names})
            counts += new
            advance(len(samples), f"{counts[1] / counts[0]:.0%} of attempts accepted")
    made, accepted, empty = counts.tolist()
    if not accepted:
        raise NothingAccepted(
            f"--gan {synth.gan}: no lesion accepted in {made} attempts; {empty} had no pixel "
            f"over the threshold of 0.1, the others too small or large (S5). {synth.advice}"
        )
    facts = {"attempts": made, "accepted": accepted, "acceptance": accepted / made}
    return facts | {"empty": empty, "short": accepted < n}


def attempt(
    synth: Synthesizer, sources: patchset.Patches, seed: int, attempts: range, wanted: int
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Steps 1 to 5 for one batch: at most `wanted` samples; attempts made, accepted, empty."""
    # Always a whole batch: what comes out does not depend on where the attempts end.
    numbers, rngs = zip(*[draw(seed, attempts[0] + k) for k in range(BATCH)], strict=True)
    # "Randomly sample a healthy mammogram image", "Randomly sample a 256x256px patch" (S1)
    chosen = np.array([rng.integers(len(sources)) for rng in rngs])
    patches = sources[chosen]  # (BATCH, S, S) uint16
    # "Input the patch into the generator and generate the synthetic patch" (S2)
    lesions = synth.lesions(data.to_float(patches), rngs)
    kept, made, empty = [], 0, 0
    while made < len(attempts) and len(kept) < wanted:
        k, made = made, made + 1
        # "Perform the following steps to post-process the synthetic patch" (S3 to S7)
        lesion, isolated = synth.isolate(lesions[k], rngs[k])
        if isolated is None:
            empty += not (np.abs(lesion) > LESION_THRESHOLD).any()
            continue
        # "Add the lesion channel to the base normal patch" (S8)
        combined = add_lesion(patches[k], lesion, isolated)
        added = combined.astype(np.int32) - patches[k]
        facts = (isolated.area, isolated.bbox, lesion[isolated.mask].mean())
        kept.append((patches[k], combined, added, isolated.mask, numbers[k], chosen[k], *facts))
    images = [(name, dtype, (synth.side, synth.side)) for name, dtype in IMAGES.items()]
    return np.array(kept, images + list(FACTS.items())), (made, len(kept), empty)


def _read_part(part: Path, name: str) -> np.ndarray:
    with files.reading(part, f"delete {part.parent}, run it again"), np.load(part) as arrays:
        return arrays[name]


def assemble(out: Path, parts: list[Path], config: dict, sources: patchset.Patches) -> dict:
    """Arrays, index and figures from the parts; what there is to say about the lesions."""
    side = config["patch_size"]
    rows = {name: np.concatenate([_read_part(part, name) for part in parts]) for name in FACTS}
    for name, dtype in IMAGES.items():
        with files.replace_file(out / f"{name}.npy") as file:
            shape = (len(rows["seed"]), side, side)
            header = {"descr": dtype, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                file.write(_read_part(part, name).tobytes())
    columns = ("patch", "image_uid", "patient_id", "scale")
    patch, uid, patient, scale = (sources.column(name)[rows["source"]] for name in columns)
    masks = np.load(out / "mask.npy", mmap_mode="r")
    outlines = (" ".join(map(str, derived.rle(mask)["counts"])) for mask in masks)  # COCO's
    index = [range(len(masks)), patch, uid, patient, rows["seed"], rows["area"], *rows["bbox"].T]
    index += [sources.kind[rows["source"]], rows["strength"].round(6), outlines]
    header = (*patchset.SYNTHETIC_COLUMNS, "source_class", "strength", "mask_rle")
    files.write_table(out / "index.csv", header, zip(*index, strict=True))
    _figures(out, [config["spacing_mm"] and config["spacing_mm"] / float(s) for s in scale[:SHOWN]])
    share = rows["area"] / side**2
    return {
        "patients": sorted(set(patient.tolist())),
        "area_histogram": np.histogram(share, bins=10, range=(0, 1))[0].tolist(),
        "area_median": float(np.median(share)),
        "strength": float(rows["strength"].mean()),
    }


def _figures(out: Path, mm: list[float | None]) -> None:
    """A row of Figure 1 (pairs: before, after) and Figure 2a of the first samples (F1, F2)."""
    names = ("input", "lesion", "combined")
    before, lesion, after = (np.load(out / f"{n}.npy", mmap_mode="r")[:SHOWN] for n in names)
    lesion = lesion / max(1, np.abs(lesion).max())  # mid-grey is no change; stretched
    pairs = [patch for pair in zip(before, after, strict=True) for patch in pair]
    figure1 = figures.patch_figure([("", pairs, ("real", "synthetic"))], mm=np.repeat(mm, 2))
    rows = [("(i) input", before, ()), ("(ii) lesion", lesion, ()), ("(iii) sum", after, ())]
    figures.save_figure(figure1, out / "figure1.png")
    figures.save_figure(figures.patch_figure(rows, mm=mm), out / "figure2a.png")


def _warnings(facts: dict, advice: str = ADVICE) -> list[str]:
    few = f"short, {facts['accepted']} samples: {facts['attempts']} attempts are the most made"
    rare = f"only {facts['acceptance']:.1%} accepted, the generator's rare results. {advice}"
    wide = f"half of the lesions cover over {facts['area_median']:.0%} of the patch. {advice}"
    when = {few: facts["short"], rare: facts["acceptance"] < 0.05, wide: facts["area_median"] > 0.5}
    return [text for text, applies in when.items() if applies]


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
    edge2 = ranked[min(area, len(ranked) - 1)] - 1e-6  # exactly `area` pixels pass
    # mean of a Gaussian of height p over the disc where it exceeds t: (p - t) / ln(p / t)
    t, strength = LESION_THRESHOLD, float(lesion[isolated.mask].mean())
    mean = max(abs(strength), 1.001 * t)
    peak = optimize.brentq(lambda p: (p - t) / math.log(p / t) - mean, t * (1 + 1e-9), 100.0)
    bump = np.where(inside, np.minimum(peak * np.exp(-math.log(peak / t) * r2 / edge2), 1), 0)
    return np.copysign(bump, strength)
