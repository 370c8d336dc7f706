"""§3 "Dataset details": mammograms with annotations -> splits, breast masks, 256 x 256 patches.

In the paper's order; its words head each part. Patches are (N, S, S) uint16 on disk, 0..65535
mapping linearly to [-1, 1]. `support/patchset.py` writes and reads them. Where a sentence stands:

    "split into 60%/20%/20%"                           split_patients
    "according to the following quantities"            PrepareConfig, PREPARE_PRESETS
    "a random mammogram image"                         random_image
    "a random location", "at least 90% breast tissue"  breast_cells, Tissue.draw
    "flipped ..., rotated ..., and resized"            drawn in DecodedImage.place, done in .cut
    "a random pixel on the lesion", "x and y offset"   DecodedImage.lesion_window
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from support.files import sha256
from support.mammogram import NotUsable, read_mammogram, read_mask
from support.sources import PATHOLOGIES, SPLITS, Finding

# --- Classes of patches, and the tasks that work on them ---

CLASSES = (
    "normal",
    "malignant_mass",
    "benign_mass",
    "malignant_calcification",
    "benign_calcification",
)
KEYS = tuple(f"{split}/{name}" for split in SPLITS for name in CLASSES)
EVALUATED = (CLASSES[0], CLASSES[1], CLASSES[3])  # no benign in validation and test, P5


class Task(NamedTuple):
    """Classes of patches that one GAN works on, by name or by how their names begin (G14, Q14)."""

    source: str  # G's input (S1, S9)
    real: str  # what D calls real, benign and normal
    benign: str
    normal: str


TASKS = {
    "mass": Task("normal", "malignant_mass", "benign_mass", "normal"),
    "calcification": Task("normal", "malignant_calcification", "benign_calcification", "normal"),
    # The mirror image, of both lesion types: D takes healthy patches for real, and lesions stand
    # where normal patches stand otherwise.
    "removal": Task("malignant", "normal", "benign", "malignant"),
}


# --- Patch values ---


def to_float(patch: np.ndarray) -> np.ndarray:
    """uint16 0..65535 -> float32 [-1, 1]."""
    return patch.astype(np.float32) * np.float32(2 / 65535) - np.float32(1)


def to_uint16(patch: np.ndarray) -> np.ndarray:
    """Float [-1, 1] -> uint16 0..65535, rounded to nearest; to_uint16(to_float(u)) == u."""
    return np.rint((np.clip(patch, -1, 1).astype(np.float64) + 1) * 32767.5).astype(np.uint16)


# --- §3 "The data is split into 60%/20%/20% training/validation/testing splits", P2 ---

SPLIT_SHARES = {"train": 60, "val": 20, "test": 20}  # %


def split_patients(
    findings: list[Finding], seed: int, normals: str = "studies", shares: dict | None = None
) -> dict[str, str]:
    """Patient -> split, stratified by the classes that he gives patches of and worst pathology.

    Whatever the seed, a class of five patients comes into every split (Q20), where chance would
    leave small sets without. Published splits stay. When only some patients carry one, the others
    are divided over the splits that nobody carries, in the proportion of P2 (CBIS-DDSM: test is
    published). shares: of other parts to deal into, as `deal` takes them (support/folds.py).
    """
    worst, splits, labels = {}, {}, defaultdict(set)
    for row in findings:
        pathologies = worst.get(row.patient_id, ""), row.pathology
        worst[row.patient_id] = max(pathologies, key=PATHOLOGIES.index)
        if row.split:
            splits[row.patient_id] = row.split
    for rows, classes in image_classes(findings, normals):
        labels[rows[0].patient_id] |= classes.keys()
    open_splits = [s for s in SPLITS if s not in splits.values()] or list(SPLITS)
    unsplit = {p: {*labels[p], f"worst {worst[p]}"} for p in worst.keys() - splits.keys()}
    shares = shares or {split: SPLIT_SHARES[split] for split in open_splits}
    return splits | deal(unsplit, shares, seed)


def deal(labels: dict[str, set[str]], shares: dict[str, float], seed: int) -> dict[str, str]:
    """Patient -> split, each label in proportion to the shares: iterative stratification.

    labels: of each patient; shares: of each split, in any unit. Of the label with the fewest
    patients left, one goes to the split that holds least of it for its share; labels that a split
    still misses come first. Ties: the split and patient whose other labels are missed most; the
    seed orders patients of the same labels. Source: Sechidis et al. 2011, who take the patient
    first, which leaves more splits without a label.
    """
    patients, alike = sorted(labels), defaultdict(list)  # the same labels: patients
    for at in np.random.default_rng(seed).permutation(len(patients)):
        alike["", *sorted(labels[patients[at]])].append(patients[at])  # "" is everybody's
    total = Counter(itertools.chain(*(kind * len(alike[kind]) for kind in alike)))
    left, placed, result = total, Counter(), {}

    due = {  # patients
        (label, split): total[label] * share / sum(shares.values())
        for split, share in shares.items()
        for label in total
    }

    def missing(label: str, split: str) -> bool:
        return not placed[label, split] and due[label, split] >= 1

    def filled(label: str, split: str) -> float:
        """How much a split has of its share of a label; far less when it misses it."""
        return (placed[label, split] + 0.5) / due[label, split] - 1 - missing(label, split)

    def urgency(label: str) -> tuple[bool, int]:
        needed = sum(missing(label, split) for split in shares)
        return not 0 < needed <= left[label], left[label] - needed

    while left := +left:
        rarest = min(sorted(left, reverse=True), key=urgency)
        split, kind = min(
            itertools.product(shares, [kind for kind in alike if rarest in kind]),
            key=lambda at: (filled(rarest, at[0]), sum(filled(label, at[0]) for label in at[1])),
        )
        result[alike[kind].pop()] = split
        placed.update((label, split) for label in kind)
        left.subtract(kind)
        alike = {kind: group for kind, group in alike.items() if group}
    return result


# --- §3 "From these full images, we generated patches according to the following quantities" ---


def _counts(train: tuple[int, ...], other: int) -> dict[str, int]:
    """Patches of each class for training, and of each class that is evaluated (P5: no benign)."""
    evaluated = {f"{split}/{name}": other for split in ("val", "test") for name in EVALUATED}
    return {f"train/{name}": n for name, n in zip(CLASSES, train, strict=True)} | evaluated


@dataclass(frozen=True)
class PrepareConfig:
    """Everything that decides the bytes of a patch set, beside the manifest."""

    patch_size: int = 256  # px, P9
    spacing_mm: float | None = None  # resample to this; None = native pixels, as the paper, Q19
    counts: dict[str, int] = field(  # "split/class": patches, P4, P5
        default_factory=lambda: _counts((400_000, 42_280, 3_500, 24_100, 6_580), 1_000)
    )
    required: tuple[str, ...] = ()  # counts the user asked for: an error when there is no source
    seed: int = 0
    min_tissue: float = 0.9  # of the window before resizing, P6, Q21
    scale: tuple[float, float] = (0.8, 1.2)  # uniform, training patches only, P7, Q22
    normals: str = "studies"  # of women without any finding; images, annotated: `image_classes`
    normal_margin: float = 0.125  # of the window side, between a normal patch and any box; ours
    bits: int | None = None  # of values without window or LUT; None = the file's bit depth
    pseudonymise: bool = False  # keyed hashes in place of patient ids and paths
    fold: str | None = None  # "K/N": fold K of N is tested; None: 60/20/20. support/folds.py
    malignant_share: float | None = None  # of the training patients with cancer; None: all

    def with_counts(self, texts: Sequence[str]) -> "PrepareConfig":
        """Override counts by "split/class=N", which are then required. Raises ValueError."""
        counts, expected = {}, f"SPLIT/CLASS=N with N of at most 8 digits, one of {', '.join(KEYS)}"
        for text in texts:
            key, _, number = text.partition("=")
            if key not in KEYS or not number.isdecimal() or len(number) > 8:
                hint = f"; of which split? train/{text}, say" if key in CLASSES else ""
                raise ValueError(f"--count {text[:80]}: expected {expected}{hint}")
            counts[key] = int(number)
        required = tuple(sorted({*self.required, *counts}))
        return replace(self, counts=self.counts | counts, required=required)


# As many train patches as an hour of training draws, in the paper's order of frequency.
CBIS = _counts((40_000, 10_000, 5_000, 10_000, 5_000), 1_000) | {"test/benign_mass": 1_000}
# 5 to 10 patches a lesion on about 1,000 images; validation and test give AUC +-0.03.
TINY = _counts((4_000, 2_000, 1_000, 1_000, 1_000), 300) | {"test/benign_mass": 300}
PREPARE_PRESETS = {
    "paper": PrepareConfig(),
    "cbis": PrepareConfig(patch_size=128, spacing_mm=0.166, normals="images", counts=CBIS),
    "tiny": PrepareConfig(patch_size=64, spacing_mm=0.33, normals="images", counts=TINY),
}
PREPARE_PRESETS["cbis-cpu"] = PREPARE_PRESETS["cbis"]


@dataclass(frozen=True)
class SourceImage:
    """An image of the manifest and the findings that each of its classes is cut from."""

    name: str  # of the outputs: the path or its pseudonym
    patient_id: str  # the same
    split: str
    rows: tuple[Finding, ...]
    classes: dict[str, tuple[Finding, ...]]  # "split/class": lesions, or boxes to keep away from


def image_classes(findings: list[Finding], normals: str) -> Iterator[tuple[tuple, dict]]:
    """Each image's rows, and the findings that each of its classes is cut from, by path.

    normals: "studies", of women without any finding, as the paper; "images", of any image without
    one; "annotated", also of images whose findings all have a box, away from these.
    """
    by_path, ill = defaultdict(list), {r.patient_id for r in findings if r.pathology != "normal"}
    for row in findings:
        by_path[row.image_path].append(row)
    for path in sorted(by_path):
        rows, classes = tuple(sorted(by_path[path], key=repr)), {}
        for row in rows:
            if row.bbox and (name := f"{row.pathology}_{row.finding}") in CLASSES:
                classes[name] = (*classes.get(name, ()), row)
        if all(row.pathology == "normal" for row in rows):
            if normals != "studies" or rows[0].patient_id not in ill:
                classes["normal"] = ()
        elif normals == "annotated" and all(row.bbox for row in rows):
            classes["normal"] = rows
        yield rows, classes


def source_images(
    findings: list[Finding], config: PrepareConfig, hide: Callable[[str], str]
) -> list[SourceImage]:
    """The images in the order of their paths; `hide` gives the names to use in the outputs."""
    splits, images = split_patients(findings, config.seed, config.normals), []
    for rows, classes in image_classes(findings, config.normals):
        path, patient, split = rows[0].image_path, rows[0].patient_id, splits[rows[0].patient_id]
        classes = {f"{split}/{name}": boxes for name, boxes in classes.items()}
        images.append(SourceImage(hide(path), hide(patient), split, rows, classes))
    return images


# --- §3 "To create patches, a random location is picked on a random mammogram image" ---


def patch_seed(seed: int, key: str, patch: int, attempt: int = 0) -> int:
    """60 random bits: all that decides patch i of key "split/class"; column `seed` of its index."""
    return int(sha256(f"{seed}/{key}/{patch}/{attempt}".encode())[:15], 16)


def random_image(images: Sequence[int], bits: int) -> int:
    """The "random mammogram image" that `patch_seed` means, each equally likely.

    support/patchset.py asks for it; an image without a place passes the patch to another.
    """
    return images[bits * len(images) >> 60]  # 60 bits as a share of 2**60


# --- §3 "that contains at least 90% breast tissue", P6 ---

MASK_CELLS = 200  # cells along the longer side of a breast mask: about 1 mm
BURNT_OUT = 249  # of 255; what touches the border above it is film frame, not tissue
FRAME_STEP = 12  # of 255; so much brighter than what lies 2 cells inwards, a straight edge is frame
FRAME = -3  # a cell of frame outweighs three of tissue: windows hold air at most, not film frame
SKIN_LEVEL = 0.35  # of the way from air to Otsu's threshold; set by eye on CBIS-DDSM
DRAWS = 16  # corners drawn at once among those that can be valid; nine in ten are


def air_is_bright(grey: np.ndarray) -> bool:
    """A negative: the grey that fills most of the rim and of the image is brighter than the rest.

    A breast leaves most of the rim to air, and cells of air are alike. Film frames fill the rim,
    too, and are cut off first: up to 16 cells that are of one grey along a whole side.
    """
    grey, kept = grey.astype(int), []
    for axis in (1, 0):
        unlike = abs(grey - np.median(grey, axis=axis, keepdims=True)) > 12
        kept.append(unlike.mean(axis) > 0.02)
        kept[-1][16:-16] = True
    grey = grey[np.ix_(*kept)]
    rim = np.ones(grey.shape, bool)
    rim[4:-4, 4:-4] = False
    counts = (np.bincount(part, minlength=256) for part in (grey[rim], grey.ravel()))
    at_rim, anywhere = (np.convolve(count, np.ones(12), "same") for count in counts)
    air = (at_rim * anywhere**0.5).argmax()
    rest = grey[abs(grey - air) > 6]  # those 12 greys are alike
    return rest.size > 0 and bool(rest.mean() < air)


def film_frame(grey: np.ndarray) -> np.ndarray:
    """Burnt-out cells that touch the border, and bright strips with a straight edge along it."""
    burnt = grey > BURNT_OUT
    inner = np.pad(np.ones([n - 2 for n in grey.shape], bool), 1)
    frame = ndimage.binary_propagation(burnt & ~inner, mask=burnt)  # burnt from the border on
    frame = ndimage.maximum_filter(frame, size=5)
    for turn in range(4):
        strip = np.rot90(grey, turn)[:8].astype(int)
        edge = ndimage.binary_opening(strip[:-2] - strip[2:] > FRAME_STEP, np.ones((1, 15)))
        np.rot90(frame, turn)[:6] |= np.maximum.accumulate(edge[::-1])[::-1]  # from it outwards
    return frame


def breast_cells(display: np.ndarray) -> tuple[np.ndarray, int]:
    """Breast mask in cells of f x f pixels, and f: about 200 cells along the longer side.

    1 is tissue, 0 air, FRAME film frame. Film: a white frame touches the border, air is a noisy
    grey, labels and scratches are small or thin. Digital: air is exactly -1, noise makes pinholes
    in dark fat. Both: tissue rises from air to skin within a few millimetres.
    """
    step = -(-max(display.shape) // (2 * MASK_CELLS))
    if min(display.shape) < 32 * step:
        raise NotUsable(f"{display.shape} pixels are too few or too narrow for a breast")
    fine = display[::step, ::step]
    fine = np.pad(fine, [(0, n % 2) for n in fine.shape], mode="edge")
    grey = fine[::2, ::2] + fine[1::2, ::2] + fine[::2, 1::2] + fine[1::2, 1::2]
    grey = ((grey + 4) * (255 / 8)).astype(np.uint8)
    if air_is_bright(grey):
        raise NotUsable("air is brighter than tissue: inverted?")
    frame = film_frame(grey)
    # Otsu's threshold parts air from tissue; the skin line lies nearer to air.
    counts = np.bincount(grey[~frame], minlength=256)
    below, moment = counts.cumsum(), (counts * np.arange(256)).cumsum()
    apart = (moment[-1] * below - moment * below[-1]) ** 2.0
    otsu = int((apart / np.maximum(below * (below[-1] - below), 1)).argmax())
    air = np.searchsorted(below, below[otsu] / 2)  # the median below
    tissue = ~frame & (grey > air + SKIN_LEVEL * (otsu - air))
    # Pinholes in fat are closed; what is bright takes no part: gaps to labels stay.
    fat = ndimage.maximum_filter(tissue & (grey <= otsu), size=5)
    tissue |= ndimage.minimum_filter(fat, size=5) & ~frame
    # The largest object once thin bridges to labels, scratches and film borders are cut.
    core, objects = ndimage.label(ndimage.minimum_filter(tissue, size=7, mode="constant"))
    if not objects:
        raise NotUsable("no breast found: nothing large is brighter than air")
    core = core == 1 + np.bincount(core.ravel())[1:].argmax()
    breast = ndimage.binary_fill_holes(ndimage.maximum_filter(core, size=9) & tissue)
    share, contrast = breast.mean(), (np.median(grey[breast]) - air) / 255
    box = breast[np.ix_(breast.any(axis=1), breast.any(axis=0))].mean()
    if not (0.02 < share < 0.97 and contrast > 0.05 and box > 0.35):
        raise NotUsable(
            f"breast mask fails its checks: {share:.0%} of the image (expected 2% to 97%), "
            f"{contrast:.0%} brighter than air (5% or more), fills {box:.0%} of its box (35%)"
        )
    return np.where(frame & ~breast, FRAME, breast), 2 * step


def breast_mask(display: np.ndarray) -> np.ndarray:
    """Bool (H, W): the largest object that is tissue, holes filled. Raises NotUsable."""
    cells, f = breast_cells(display)
    whole = (cells > 0).repeat(f, axis=0).repeat(f, axis=1)
    return whole[: display.shape[0], : display.shape[1]]


class Tissue:
    """Where windows hold "at least 90% breast tissue", every valid top-left corner equally likely.

    The mask has cells of several pixels. A block is the corners that lie in one cell: from the
    summed areas of the cells follows which blocks can hold a valid corner at all. Of all corners of
    these blocks one is drawn and kept when its own window is valid, which leaves the valid ones
    equally likely; should a few draws all miss, every corner of the blocks is looked at.
    """

    def __init__(self, cells: np.ndarray, px: int, shape: tuple[int, int], min_tissue: float = 0.9):
        """cells: 1 tissue, 0 air, FRAME, of px x px pixels each; shape: of the image."""
        self.cells, self.px, self.shape, self.min_tissue = cells, px, shape, min_tissue
        self.areas = np.pad(cells, ((1, 3), (1, 3))).cumsum(0, np.int32).cumsum(1, np.int32)

    @classmethod
    def of(cls, display: np.ndarray, min_tissue: float = 0.9) -> "Tissue":
        """The breast in a display image (H, W) in [-1, 1]. Raises NotUsable."""
        return cls(*breast_cells(display), display.shape, min_tissue)

    def before(self, row: np.ndarray, col: np.ndarray) -> np.ndarray:
        """Tissue pixels above and left of pixel corners: linear between the corners of cells."""
        px, areas = self.px, self.areas
        (i, down), (j, right) = divmod(row, px), divmod(col, px)
        above = (px - right) * areas[i, j] + right * areas[i, j + 1]
        below = (px - right) * areas[i + 1, j] + right * areas[i + 1, j + 1]
        return (px - down) * above + down * below

    def share(self, row: np.ndarray, col: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Tissue fraction of windows of `size` (h, w)."""
        (top, bottom), (left, right) = (row, row + size[0]), (col, col + size[1])
        at = self.before(np.array([[top, top], [bottom, bottom]]), np.array([[left, right]] * 2))
        return (at[1, 1] - at[0, 1] - at[1, 0] + at[0, 0]) / (size[0] * size[1])

    def draw(
        self,
        rng: np.random.Generator,
        size: tuple[int, int],
        span: tuple[int, int, int, int] | None = None,
        forbidden: Sequence[tuple[int, int, int, int]] = (),
    ) -> tuple[int, int, float] | None:
        """A random corner and its window's tissue; None when no window (h, w) holds enough.

        `span` and `forbidden`: rectangles of corners that are allowed and that are not.
        """
        px, (h, w), (row0, col0, row1, col1) = self.px, size, span or (0, 0, *self.shape)
        row0, col0 = max(row0, 0), max(col0, 0)
        row1, col1 = min(row1, self.shape[0] - h + 1), min(col1, self.shape[1] - w + 1)
        if row0 >= row1 or col0 >= col1:
            return None
        top, left, bottom, right = row0 // px, col0 // px, ceil_div(row1, px), ceil_div(col1, px)
        # Tissue of all cells that the windows of a block touch: an upper bound for each of them.
        down, across = ceil_div(px - 1 + h, px), ceil_div(px - 1 + w, px)
        rows = self.areas[top + down : bottom + down] - self.areas[top:bottom]
        most = rows[:, left + across : right + across] - rows[:, left:right]
        possible = most >= self.min_tissue * h * w / px**2 - 1e-6
        for a0, b0, a1, b1 in forbidden:
            a0, b0 = max(ceil_div(a0, px) - top, 0), max(ceil_div(b0, px) - left, 0)
            possible[a0 : max(a1 // px - top, 0), b0 : max(b1 // px - left, 0)] = False
        blocks = np.flatnonzero(possible)
        if not blocks.size:
            return None
        every = blocks.size * px**2  # corners of the blocks
        for draw in (lambda: rng.integers(every, size=DRAWS), lambda: rng.permutation(every)):
            block, corner = np.divmod(draw(), px**2)
            i, j = np.divmod(blocks[block], right - left)
            row, col = (top + i) * px + corner // px, (left + j) * px + corner % px
            ok = (row0 <= row) & (row < row1) & (col0 <= col) & (col < col1)
            for a0, b0, a1, b1 in forbidden:
                ok &= (row < a0) | (row >= a1) | (col < b0) | (col >= b1)
            row, col = row[ok], col[ok]
            share = self.share(row, col, size)
            enough = np.flatnonzero(share >= self.min_tissue - 1e-9)
            if enough.size:
                first = enough[0]
                return int(row[first]), int(col[first]), float(share[first])
        return None


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# --- §3 "randomly flipped (left/right), rotated (90, 180, or 270 degrees), and resized", P7 ---


def resize(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(h, w) -> `shape` (rows, cols) float32, bilinear, anti-aliased when shrinking (Q22)."""
    image = Image.fromarray(np.asarray(values, np.float32))
    return np.asarray(image.resize(shape[::-1], Image.Resampling.BILINEAR))


def flip_rotate(patch: np.ndarray, flip: int, rotation: int) -> np.ndarray:
    """Flipped left/right or not, then rotated counter-clockwise by 0, 90, 180 or 270 degrees."""
    return np.rot90(patch[:, ::-1] if flip else patch, rotation // 90)


def flip_rotate_box(box: Sequence[int], size: int, flip: int, rotation: int) -> tuple[int, ...]:
    """The same for a box (row0, col0, row1, col1) in a patch of side `size`."""
    row0, col0, row1, col1 = box
    if flip:
        col0, col1 = size - col1, size - col0
    for _ in range(rotation // 90):
        row0, col0, row1, col1 = size - col1, row0, size - col0, row1
    return row0, col0, row1, col1


# --- §3 Cutting patches: P6 and P7 together, and for lesions P8, DecodedImage.lesion_window ---

IN_AIR = 0.25  # a box with less tissue is misplaced; CBIS-DDSM's at nipple and skin hold more
TRIES = 50  # scales and lesion pixels tried in an image before another is drawn, Q21


class Place(NamedTuple):
    """Where a patch is cut, and how it is augmented."""

    window: tuple[int, int, int, int]  # row0, col0, row1, col1 in stored pixels
    tissue: float  # share of the window
    scale: float
    flip: int  # 0, 1
    rotation: int  # degrees
    lesion: Finding | None


class DecodedImage:
    """A decoded mammogram: where each class has its patches, and cutting them. Raises NotUsable."""

    def __init__(self, image: SourceImage, config: PrepareConfig):
        mammogram = read_mammogram(Path(image.rows[0].image_path), config.bits)
        self.dark = mammogram.dark
        self.unlimited = bool(config.bits) and mammogram.table.depth != config.bits
        self.uid, self.display = mammogram.image_uid, mammogram.display
        self.image, self.config = image, config
        try:
            self.tissue = Tissue.of(self.display, config.min_tissue)
        except NotUsable as error:
            error.dark = self.dark  # may be why
            raise
        self.side = [config.patch_size] * 2  # of a window at scale 1, in stored pixels
        if config.spacing_mm:
            spacing = image.rows[0].spacing_mm or mammogram.spacing_mm
            if spacing is None:
                why = f" ({mammogram.spacing_source})" if mammogram.spacing_source else ""
                text = f"no pixel spacing in manifest or header{why}; --spacing-mm needs it"
                raise NotUsable(text)
            self.side = [config.patch_size * config.spacing_mm / mm for mm in spacing]
        boxed = (row for row in image.rows if row.bbox)
        self.in_air = {row for row in boxed if self.on_tissue(row.bbox) < IN_AIR}
        self.masks, self.unmasked = {}, []  # the boxes stand in for masks that cannot be used
        for row in image.rows:
            try:
                self.masks |= {row: self.mask_pixels(row)} if row.mask_path else {}
            except (NotUsable, OSError) as error:  # an OSError would name the file
                reason = getattr(error, "strerror", None) or error
                self.unmasked.append(f"mask of the box from {row.bbox[:2]}: {reason}")

    def on_tissue(self, bbox: Sequence[float]) -> float:
        """Tissue share of a box in cells of the mask, without film frame, which may hide tissue.

        0 of a box that leaves the image.
        """
        (row0, col0, row1, col1), px = whole_box(bbox), self.tissue.px
        if min(row0, col0) < 0 or row1 > self.display.shape[0] or col1 > self.display.shape[1]:
            return 0.0
        rows, cols = slice(row0 // px, ceil_div(row1, px)), slice(col0 // px, ceil_div(col1, px))
        cells = self.tissue.cells[rows, cols]
        return float(cells[cells >= 0].mean()) if (cells >= 0).any() else 1.0

    def mask_pixels(self, lesion: Finding) -> np.ndarray:
        """(n, 2) rows and columns of a lesion's mask within its box: over half of the highest value
        there, as JPEG blurs.

        The mask is brought to the image's size: CBIS-DDSM has masks of other sizes.
        """
        mask, shape = read_mask(Path(lesion.mask_path)), self.display.shape
        row0, col0, row1, col1 = whole_box(lesion.bbox)
        rows, cols = np.arange(row0, row1) + 0.5, np.arange(col0, col1) + 0.5
        at = (rows * mask.shape[0] / shape[0], cols * mask.shape[1] / shape[1])
        inside = mask[np.ix_(*(edge.astype(int) for edge in at))]
        if not inside.any():
            raise NotUsable("empty inside the box")
        return np.argwhere(inside > inside.max() / 2) + np.array([row0, col0])

    def place(self, key: str, rng: np.random.Generator) -> Place | None:
        """A random place of class `key` ("split/class"); None when 50 tries find none."""
        augment = self.image.split == "train"  # P7 is "for augmentation": not in val and test, Q22
        for _ in range(TRIES):
            # "Resized (uniformly from 0.8 to 1.2x)": at 1.2 a smaller window becomes the patch.
            scale = rng.uniform(*self.config.scale) if augment else 1.0
            size = round(self.side[0] / scale), round(self.side[1] / scale)
            if key.endswith("/normal"):
                lesion, drawn = None, self.normal_window(key, size, rng)
            else:
                lesion, drawn = self.lesion_window(key, size, rng)
            if drawn:
                row, col, tissue = drawn
                window = row, col, row + size[0], col + size[1]
                # flipped or not, and by 0 degrees as well as the paper's 90, 180 or 270 (Q22)
                turned = (int(rng.integers(2)), 90 * int(rng.integers(4))) if augment else (0, 0)
                return Place(window, tissue, scale, *turned, lesion)
        return None

    def normal_window(self, key: str, size: tuple[int, int], rng: np.random.Generator):
        """P6: anywhere in the breast, off the boxes of an image that has some.

        Nowhere when one lies in air: the lesion, wherever it is, would pass for normal tissue.
        """
        if self.in_air:
            return None
        h, w = size
        down, across = (math.ceil(self.config.normal_margin * n) for n in size)
        boxes = (whole_box(row.bbox) for row in self.image.classes[key])
        forbidden = [
            (row0 - down - h + 1, col0 - across - w + 1, row1 + down, col1 + across)
            for row0, col0, row1, col1 in boxes
        ]
        return self.tissue.draw(rng, size, forbidden=forbidden)

    def lesion_window(self, key: str, size: tuple[int, int], rng: np.random.Generator):
        """ "A random pixel on the lesion is chosen, and then a random x and y offset" (P8).

        "Between 0 to 128 pixels in either direction": the pixel, of the lesion's mask or else its
        box, may lie anywhere in the window, whose centre is at most half its side away (Q23).
        """
        lesions, (h, w) = [r for r in self.image.classes[key] if r not in self.in_air], size
        if not lesions:
            return None, None
        lesion = lesions[int(rng.integers(len(lesions)))]
        if lesion in self.masks:
            row, col = rng.choice(self.masks[lesion]).tolist()
        else:
            row0, col0, row1, col1 = whole_box(lesion.bbox)
            row, col = int(rng.integers(row0, row1)), int(rng.integers(col0, col1))
        holding = (row - h + 1, col - w + 1, row + 1, col + 1)  # corners of windows with the pixel
        return lesion, self.tissue.draw(rng, size, holding)

    def cut(self, place: Place) -> tuple[np.ndarray, tuple[int, ...] | None]:
        """The patch (S, S) uint16, and the lesion's box in it."""
        (row0, col0, row1, col1), size = place.window, self.config.patch_size
        patch = resize(self.display[row0:row1, col0:col1], (size, size))
        patch = to_uint16(flip_rotate(patch, place.flip, place.rotation))
        if place.lesion is None:
            return patch, None
        down, across = size / (row1 - row0), size / (col1 - col0)
        box = np.array(place.lesion.bbox) - (row0, col0, row0, col0)
        box = np.clip(whole_box(box * (down, across, down, across)), 0, size).tolist()
        return patch, flip_rotate_box(box, size, place.flip, place.rotation)


def whole_box(bbox: Iterable[float]) -> tuple[int, int, int, int]:
    """A box rounded outwards to whole pixels."""
    row0, col0, row1, col1 = bbox
    return math.floor(row0), math.floor(col0), math.ceil(row1), math.ceil(col1)
