"""Tiny synthetic mammograms, written as real DICOM files: data for the demo and the tests.

No anatomy is copied from anybody. Lengths are in mm, `shade` is the displayed brightness (0 air,
1 white), every image is a function of (seed, patient, laterality, view).

    python -m support.phantom OUT PATIENTS
"""

import io
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.sr.codedict import Code
from scipy import fft, ndimage
from scipy.interpolate import PchipInterpolator

from support import derived, files, runs, sources

FORMAT = 3  # raised when the same seed gives other bytes
IMAGES = (("L", "CC"), ("R", "CC"), ("L", "MLO"), ("R", "MLO"))  # of one patient
# Finding and pathology of patients 0..23, then again: 10 + 7 malignant, 3 + 2 benign, 2 normal, so
# that 72 patients leave 6 with a malignant mass, 4 with malignant calcifications and 2 with benign
# masses for testing (healthy images come from everybody). Every class comes early.
MM, MC = ("mass", "malignant"), ("calcification", "malignant")
BM, BC, NO = ("mass", "benign"), ("calcification", "benign"), ("", "normal")
CASES = (
    *(MM, NO, MC, BM, NO, BC, MM, BM, MC, MM, MM, MC),
    *(MM, BM, MC, MM, MM, MC, BC, MM, MC, MM, MM, MC),
)
SPACINGS = (0.25, 0.28, 0.3, 0.33, 0.36)  # mm; real detectors have 0.05-0.1, too many pixels here
LOSSLESS = (uid.JPEG2000Lossless, uid.JPEGLSLossless, uid.RLELossless)
SYNTAXES = (uid.ExplicitVRLittleEndian, *LOSSLESS, uid.ImplicitVRLittleEndian)
BITS = (12, 14, 16)
VOIS = ("LINEAR", "LUT", "LINEAR_EXACT", "SIGMOID")
BREAST = Code("T-04000", "SRT", "Breast")
VIEWS = {
    "CC": Code("R-10242", "SRT", "cranio-caudal"),
    "MLO": Code("R-10226", "SRT", "medio-lateral oblique"),
}


@dataclass(frozen=True)
class Patient:
    """What the four images of one patient share. The lesion is in one breast, in both views."""

    spacing: float  # mm
    depth: float  # chest wall to nipple, mm
    half: float  # half of the breast's height, mm
    density: float  # -1 fatty .. 1 dense
    finding: str  # of the lesion, "" without one
    pathology: str
    laterality: str  # of the lesion
    behind: float  # mm from nipple to lesion
    below: float  # mm below the nipple's height
    size: float  # of the lesion, mm
    contrast: float  # shade that the lesion adds to fat


def patient(seed: int, number: int) -> Patient:
    rng = np.random.default_rng([seed, number])
    finding, pathology = CASES[number % len(CASES)]
    depth, half = rng.uniform(66, 92), rng.uniform(56, 72)
    body = float(rng.choice(SPACINGS)), depth, half, rng.uniform(-1, 1)
    place = "LR"[rng.integers(2)], rng.uniform(0.3, 0.65) * depth, rng.uniform(-0.4, 0.4) * half
    contrast = rng.uniform(0.19, 0.32) if finding == "mass" else rng.uniform(0.28, 0.46)
    return Patient(*body, finding, pathology, *place, rng.uniform(8, 14), contrast)


# --- Normal anatomy ---


def power_law(rng, shape, spacing, beta=3.0, stretch=1.0, angle=0.0, longest=40.0) -> np.ndarray:
    """Gaussian field, unit variance, power ~ 1 / f^beta, drawn out `stretch`-fold along `angle`.

    Mammograms have beta near 3 (Burgess 1999); flat for structures longer than `longest` mm.
    """
    fy, fx = fft.fftfreq(shape[0], spacing)[:, None], fft.rfftfreq(shape[1], spacing)
    along, over = fx * np.cos(angle) + fy * np.sin(angle), fy * np.cos(angle) - fx * np.sin(angle)
    amplitude = (stretch * along**2 + over**2 / stretch + longest**-2) ** (-beta / 4)
    amplitude[0, 0] = 0
    white = rng.standard_normal((2, *amplitude.shape))
    field = fft.irfft2(amplitude * (white[0] + 1j * white[1]), shape)
    return field / field.std()


def strands(field: np.ndarray, spacing: float, width: float) -> np.ndarray:
    """Thin curved lines, 0..1: where a smooth random field crosses zero. `width` in mm."""
    slope = np.hypot(*np.gradient(field, spacing))
    return np.exp(-((field / (width * slope + 1e-9)) ** 2))


def smoothstep(x: np.ndarray) -> np.ndarray:
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def outline(rng, who: Patient, view: str, y: np.ndarray) -> tuple[np.ndarray, float]:
    """Distance from the chest wall to the skin at each height, and the nipple's height (mm)."""
    tall = y[-1] + y[0]
    if view == "CC":
        nipple = tall / 2 + rng.uniform(-4, 4)
        t = np.abs(y - nipple) / who.half
        x = (1 - np.clip(t, 0, 1) ** rng.uniform(1.9, 2.4)) ** rng.uniform(0.5, 0.66)
    else:  # from the axilla over the nipple to the fold beneath the breast
        nipple = tall * rng.uniform(0.56, 0.62)
        top, fold = rng.uniform(0.5, 0.62), rng.uniform(0.12, 0.2)
        knots = np.array([-0.01, 0.3, 0.7, 1.0]) * nipple
        below = nipple + np.array([0.3, 0.58, 0.8, 1.01]) * (tall - nipple)
        extent = [top, top + 0.12, 0.93, 1.0, 0.93, 0.62, fold + 0.04, fold]
        x = PchipInterpolator([*knots, *below], extent)(y)
    x = ndimage.gaussian_filter1d(x, 2.5 / (y[1] - y[0]), mode="nearest") * who.depth
    return x + 3.2 * np.exp(-(((y - nipple) / 3.8) ** 4)), float(nipple)


@dataclass
class Anatomy:
    shade: np.ndarray
    inside: np.ndarray  # bool, the breast with what muscle the view shows
    skin: np.ndarray  # mm from the skin, 0 outside
    muscle: np.ndarray  # mm from the edge of the pectoral muscle, negative in it; +inf in CC
    nipple: tuple[float, float]  # mm from the top, mm from the chest wall


def anatomy(rng, who: Patient, view: str) -> Anatomy:
    """A breast without lesion, chest wall on the left."""
    s = who.spacing
    tall = 2 * who.half + (14 if view == "CC" else 26)
    shape = tuple(8 * int(np.ceil(mm / s / 8)) for mm in (tall, who.depth + rng.uniform(10, 24)))
    y, x = ((axis + 0.5) * s for axis in np.ogrid[: shape[0], : shape[1]])
    edge, nipple_y = outline(rng, who, view, y[:, 0])
    nipple = nipple_y, float(edge.max())
    inside = x < edge[:, None]
    skin = ndimage.distance_transform_edt(inside) * s
    # Ducts and ligaments fan out from the nipple: textures are drawn in polar coordinates there.
    hub = x - nipple[1] - 12
    polar = np.arctan2(y - nipple[0], -hub) * 60 + 95, np.hypot(y - nipple[0], hub)

    def fan(texture: np.ndarray) -> np.ndarray:
        wavy = [(mm + 2 * bend) / s for mm in polar]
        return ndimage.map_coordinates(texture, wavy, order=1, mode="nearest")

    canvas = fft.next_fast_len(int(190 / s)), fft.next_fast_len(int(140 / s), real=True)
    bend = power_law(rng, shape, s, 5.0, longest=30.0)

    # Fibroglandular tissue: a ragged cone behind the nipple that fades into fat.
    behind = (nipple[1] - x) / who.depth
    across = (y - nipple[0]) / who.half + (0 if view == "CC" else 0.45) * behind
    reach = 1 - ((behind - 0.38) / 0.46) ** 2 - (across / (0.42 + 0.22 * who.density)) ** 2
    cloud = power_law(rng, shape, s, 3.4, longest=60.0)
    region = smoothstep(0.35 + 0.55 * reach + 0.22 * cloud) * smoothstep((skin - 3) / 8)
    lobules = fan(power_law(rng, canvas, s, 3.0, 2.2, longest=30.0))
    gland = region / (1 + np.exp(-1.6 * lobules - 0.9 * who.density - 0.2))

    # Cooper's ligaments and ducts, broken up; a few veins.
    patchy = smoothstep(0.4 + 0.6 * power_law(rng, shape, s, longest=20.0))
    net = strands(power_law(rng, canvas, s, 5.0, 10.0, longest=30.0), s, 0.4)
    net += 0.7 * strands(power_law(rng, canvas, s, 5.0, 3.0, 0.5, longest=20.0), s, 0.35)
    fine = power_law(rng, shape, s, 2.8, longest=12.0)

    thick = np.sqrt(1 - (1 - np.clip(skin / rng.uniform(9, 13), 0, 1)) ** 2)  # compressed edge
    tissue = 0.33 + 0.03 * cloud + 0.33 * gland + 0.02 * fine * (0.5 + gland)
    tissue += 0.1 * fan(net) * patchy * (1 - 0.6 * gland)
    tissue += 0.06 * fan(strands(power_law(rng, canvas, s, 7.0, 8.0, longest=90.0), s, 0.9))
    muscle = np.full(shape, np.inf)
    if view == "MLO":
        top, low = rng.uniform(0.62, 0.82) * edge[0], rng.uniform(0.55, 0.72) * tall
        bow = rng.uniform(1, 5) * np.sin(np.pi * np.clip(y / low, 0, 1))
        muscle = (x - top * (1 - y / low) - bow) * low / np.hypot(top, low)
        fibres = power_law(rng, shape, s, 3.4, 4.0, np.arctan2(low, -top), 15.0)
        flesh = 0.46 + 0.12 * np.clip(1 - y / low, 0, 1) + 0.014 * fibres
        flesh = flesh - muscle.clip(-15, 0) / 150
        tissue += (flesh - 0.75 * tissue) * smoothstep(0.5 - muscle / 3)
    shade = thick * tissue + 0.16 * np.exp(-(((skin - 0.9) / 0.7) ** 2))
    spot = ((y - nipple[0]) / 4) ** 2 + ((x - nipple[1] + 3.5) / 3.2) ** 2
    shade += 0.2 * np.exp(-(spot**2))
    return Anatomy(np.where(inside, shade, 0), inside, skin, muscle, nipple)


# --- Lesions: each gives (shade added, annotated area), centred on (0, 0) mm ---


def mass(rng, who: Patient, y, x, spacing) -> tuple[np.ndarray, np.ndarray]:
    """Malignant: irregular, ill-defined, mostly spiculated. Benign: oval, smooth, well-defined."""
    malignant = who.pathology == "malignant"
    turn = rng.uniform(0, 2 * np.pi)
    y, x = y * np.cos(turn) - x * np.sin(turn), y * np.sin(turn) + x * np.cos(turn)
    if not malignant:
        y = y * rng.uniform(1.15, 1.6)
    theta, rho = np.arctan2(y, x), np.hypot(y, x)
    k = np.arange(2, 10)[:, None, None]
    wave = rng.normal(0, 0.15 if malignant else 0.03, k.shape) / k ** (0.5 if malignant else 1)
    core = (0.38 if malignant else 0.5) * who.size
    margin = core * (1 + np.sum(wave * np.cos(k * theta + rng.uniform(0, 6.3, k.shape)), axis=0))
    body = np.sqrt(np.clip(1 - (rho / margin) ** 2, 0, 1))
    blur = rng.uniform(0.5, 0.8) if malignant else 0.25
    body = ndimage.gaussian_filter(body, blur / spacing)
    if malignant:
        n = rng.integers(10, 17)
        at = (np.arange(n) + rng.uniform(-0.4, 0.4, n))[:, None, None] * 2 * np.pi / n
        bend = rng.normal(0, 0.25, at.shape) * (rho / core - 1)
        length = core * rng.uniform(1.4, 2.3, at.shape)
        off = np.angle(np.exp(1j * (theta - at - bend))) * rho
        fade = np.clip(1 - rho / length, 0, 1)
        width = 0.25 + 0.7 * fade
        spicules = np.exp(-((off / width) ** 2)) * np.sqrt(fade) * rng.uniform(0.3, 1, at.shape)
        body = np.maximum(body, rng.uniform(0.4, 1.0) * spicules.max(axis=0))
        body *= 1 + 0.12 * power_law(rng, body.shape, spacing, 2.5, longest=5.0)
    labels, _ = ndimage.label(body > 0.25)
    return who.contrast * body, labels == labels[len(labels) // 2, len(labels) // 2]


def calcifications(rng, who: Patient, y, x, spacing) -> tuple[np.ndarray, np.ndarray]:
    """Malignant: many grains of all shapes and brightness. Benign: fewer, round, alike."""
    malignant = who.pathology == "malignant"
    pitch, wanted = (1.45, rng.integers(12, 22)) if malignant else (1.8, rng.integers(6, 11))
    # Places on a shaken lattice within an ellipse: grains that lie apart.
    places = np.mgrid[-6:7, -6:7].reshape(2, -1) * pitch
    places += rng.uniform(-0.4, 0.4, places.shape) * pitch
    turn, slim = rng.uniform(0, np.pi), rng.uniform(0.6, 0.9) if malignant else 0.9
    within = np.hypot(places[0], places[1] / slim) < 0.45 * who.size
    a, b = rng.permutation(places[:, within].T)[:wanted].T
    grains = (len(a), 1, 1, 1)
    parts = (len(a), 1 + 2 * malignant, 1, 1)  # a pleomorphic grain is three overlapping ellipses
    jitter = 0.17 * malignant * rng.standard_normal((2, *parts))
    dy = y - ((a * np.cos(turn) - b * np.sin(turn)).reshape(grains) + jitter[0])
    dx = x - ((a * np.sin(turn) + b * np.cos(turn)).reshape(grains) + jitter[1])
    size, bright, angle, long = rng.uniform(0.55, 0.75), 1.0, 0.0, 1.0
    if malignant:
        size, bright = 0.3 + 0.6 * rng.uniform(size=grains) ** 1.5, rng.uniform(0.5, 1.3, grains)
        angle, long = rng.uniform(0, np.pi, parts), rng.uniform(1, 1.7, parts)
    u, v = dy * np.cos(angle) + dx * np.sin(angle), dx * np.cos(angle) - dy * np.sin(angle)
    off = np.hypot(u / long, v) * np.sqrt(long)
    disc = np.clip((size / 2 - off) / spacing + 0.5, 0, 1)
    added = who.contrast * (bright * disc).max(axis=(0, 1))
    near = ndimage.distance_transform_edt(added < 0.3 * who.contrast) * spacing < 1.5
    haze = 0.03 * malignant * np.exp(-((np.hypot(y, x) / (0.4 * who.size)) ** 2))
    return added + haze, ndimage.binary_closing(near, iterations=int(2 / spacing))


def add_lesion(rng, who: Patient, breast: Anatomy) -> np.ndarray:
    """Put the lesion into `breast.shade`; gives its mask.

    It goes as near to where the patient has it as leaves a patch around it that is tissue.
    """
    shape, spacing = breast.shade.shape, who.spacing
    y, x = (axis * spacing for axis in np.ogrid[: shape[0], : shape[1]])
    room = 15.0  # mm
    free = (breast.skin > room) & (breast.muscle > 10) & (x > room)
    free &= (y > room) & (y < shape[0] * spacing - room)
    assert free.any()
    away = (y - breast.nipple[0] - who.below) ** 2 + (x - breast.nipple[1] + who.behind) ** 2
    row, col = np.unravel_index(np.argmin(np.where(free, away, np.inf)), shape)
    reach = int(np.ceil(room / spacing))
    at = np.s_[row - reach : row + reach + 1, col - reach : col + reach + 1]
    grid = (np.arange(-reach, reach + 1) * spacing,) * 2
    draw = mass if who.finding == "mass" else calcifications
    added, area = draw(rng, who, *np.meshgrid(*grid, indexing="ij"), spacing)
    breast.shade[at] += added * (1 - breast.shade[at]) / 0.65  # dense tissue hides lesions
    mask = np.zeros(shape, bool)
    mask[at] = area
    return mask


def render(seed: int, number: int, laterality: str, view: str) -> tuple:
    """Shade (H, W), air below 0; lesion mask (all False without one); Anatomy, not mirrored."""
    who = patient(seed, number)
    rng = np.random.default_rng([seed, number, "LR".index(laterality), ("CC", "MLO").index(view)])
    breast = anatomy(rng, who, view)
    mask = np.zeros(breast.shade.shape, bool)
    if who.finding and who.laterality == laterality:
        mask = add_lesion(rng, who, breast)
    shade, (rows, cols) = np.minimum(breast.shade, 0.97), np.ogrid[: mask.shape[0], : mask.shape[1]]
    where = np.argwhere(breast.skin > 6)
    for row, col in where[rng.integers(len(where), size=rng.poisson(1.2))]:
        # Single round calcifications, which most breasts have and nobody annotates.
        grain = np.hypot(rows - row, cols - col) * who.spacing < rng.uniform(0.25, 0.45)
        shade[grain] = rng.uniform(0.65, 0.95)
    shade = np.where(breast.inside, shade + rng.normal(0, 0.006, shade.shape), -0.02)
    if laterality == "R":  # the chest wall is on the right
        shade, mask = shade[:, ::-1], mask[:, ::-1]
    marker = Image.new("L", (40, 12))
    ImageDraw.Draw(marker).text((0, 0), f"{laterality} {view}", fill=255)
    spot = shade[6:18, -46:-6] if laterality == "L" else shade[6:18, 6:46]
    spot[(np.asarray(marker) > 128) & (spot < 0)] = 0.9  # lead letters beside the breast
    return shade, mask, breast


# --- DICOM ---


def store(ds: Dataset, shade: np.ndarray, bits: int, voi: str, inverse: bool) -> None:
    """Stored values that VOI transformation and, in MONOCHROME1, inversion turn into shade."""
    output = 1 - shade if inverse else shade
    top = 2**bits - 1
    center, width = round(0.47 * top), round(0.8 * top)
    if voi == "LUT":  # an S-shaped curve over part of the range, 12 bits out
        first, n = top // 16, 3000 * (top + 1) // 4096
        s = np.linspace(-2.2, 2.2, n)
        curve = np.rint((np.tanh(s) / np.tanh(2.2) + 1) / 2 * 4095).astype(np.uint16)
        stored = first + np.interp(np.clip(output, 0, 1) * 4095, curve, np.arange(n))
        item = Dataset()
        item.LUTDescriptor, item.LUTExplanation = [n, first, 12], "Phantom tone curve"
        item.add_new("LUTData", "OW", curve.astype("<u2").tobytes())
        ds.VOILUTSequence = [item]
    else:
        width //= 1 + (voi == "SIGMOID")
        ds.WindowCenter, ds.WindowWidth, ds.VOILUTFunction = center, width, voi
        if voi == "SIGMOID":  # PS3.3 C.11.2.1.3.1
            p = np.clip(output, 0.01, 0.99)
            stored = center + width / 4 * np.log(p / (1 - p))
        else:  # C.11.2.1.2.1: the window of LINEAR is half a value lower and one narrower
            half = 0.5 * (voi == "LINEAR")
            stored = center - half + (output - 0.5) * (width - 2 * half)
    pixels = np.rint(np.clip(stored, 0, top)).astype(np.uint16)
    kind = "MONOCHROME1" if inverse else "MONOCHROME2"
    ds.PresentationLUTShape = "INVERSE" if inverse else "IDENTITY"
    ds.set_pixel_data(pixels, kind, bits, generate_instance_uid=False)
    ds.PixelIntensityRelationship, ds.PixelIntensityRelationshipSign = "LOG", 1 - 2 * inverse


def dicom(seed: int, number: int, laterality: str, view: str, shade, spacing) -> bytes:
    """A whole DICOM file. How it is stored goes round by image, so that a few patients show all."""

    def new_uid(*what: object) -> str:
        return uid.generate_uid(entropy_srcs=["phantom", *map(str, (FORMAT, seed, *what))])

    index = len(IMAGES) * number + IMAGES.index((laterality, view)) + seed
    ds = Dataset()
    for keyword in (*derived.EMPTY, "DetectorType", "AcquisitionContextSequence"):
        setattr(ds, keyword, None)
    ds.SpecificCharacterSet, ds.ImageType = "ISO_IR 100", ["DERIVED", "PRIMARY"]
    ds.SOPClassUID = uid.DigitalMammographyXRayImageStorageForPresentation
    ds.SOPInstanceUID = new_uid(number, laterality, view)
    ds.StudyInstanceUID, ds.SeriesInstanceUID = new_uid(number), new_uid(number, "series")
    ds.PatientID, ds.PatientName = f"P{number:04d}", f"Phantom^{number:04d}"
    ds.Modality, ds.PresentationIntentType, ds.Manufacturer = "MG", "FOR PRESENTATION", "Phantom"
    ds.SeriesNumber, ds.InstanceNumber = 1, IMAGES.index((laterality, view)) + 1
    ds.ImageLaterality, ds.BodyPartExamined, ds.OrganExposed = laterality, "BREAST", "BREAST"
    ds.AnatomicRegionSequence = [derived.code_item(BREAST)]
    ds.ViewCodeSequence = [derived.code_item(VIEWS[view])]
    ds.ViewCodeSequence[0].ViewModifierCodeSequence = []
    medial = "RL"[laterality == "R"]  # columns run down, to the other breast
    ds.PatientOrientation = ["PA"[laterality == "L"], ("F" if view == "MLO" else "") + medial]
    ds.PositionerType, ds.BreastImplantPresent, ds.BurnedInAnnotation = "MAMMOGRAPHIC", "NO", "NO"
    ds.ImagerPixelSpacing = [f"{spacing:.3g}"] * 2
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = 0, 1, "US"
    ds.LossyImageCompression, ds.DerivationDescription = "00", "Synthetic phantom, no patient"
    bits, voi, inverse = BITS[index % 3], VOIS[index // 4 % 4], bool(index // 2 % 2)
    store(ds, shade, bits, voi, inverse)
    if (syntax := SYNTAXES[index % 5]).is_compressed:
        ds.compress(syntax, generate_instance_uid=False)
    ds.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


# --- The data set ---


def write_phantoms(out: Path, patients: int = 72, seed: int = 0) -> Path:
    """Four DICOM files a patient, lesion masks (PNG) and `manifest.csv`, whose path is returned.

    Called again after an interruption it writes the same bytes again; a whole set it leaves alone.
    """
    manifest, rows = out / "manifest.csv", []
    options = {"format": FORMAT, "patients": patients, "seed": seed}
    with runs.claim_folder(out, "phantoms", options) as complete:
        if not complete:
            with runs.progress(patients * len(IMAGES), "phantoms") as advance:
                for number, image in itertools.product(range(patients), IMAGES):
                    rows.append(write_image(out, seed, number, *image))
                    advance()
            files.write_table(manifest, (*sources.MANIFEST_COLUMNS, "mask_path"), rows)
            runs.finish_folder(out)
    return manifest


def write_image(out: Path, seed: int, number: int, laterality: str, view: str) -> tuple:
    """One image, the mask of its lesion if it has one, and its row of the manifest."""
    who, name = patient(seed, number), f"P{number:04d}_{laterality}_{view}"
    shade, lesion, _ = render(seed, number, laterality, view)
    file = dicom(seed, number, laterality, view, shade, who.spacing)
    (out / f"{name}.dcm").write_bytes(file)
    about = f"{name}.dcm", f"P{number:04d}", laterality, view
    if not lesion.any():
        return (*about, "", "normal", *5 * [""])
    mask = lesion.astype(np.uint8)
    Image.fromarray(mask * 255).save(out / f"{name}_mask.png")
    row, col = ndimage.find_objects(mask)[0]
    box = row.start, col.start, row.stop, col.stop
    return (*about, who.finding, who.pathology, *box, f"{name}_mask.png")


if __name__ == "__main__":
    write_phantoms(Path(sys.argv[1]), int(sys.argv[2]))
