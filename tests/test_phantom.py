"""Phantoms: real DICOM files, the same bytes for the same seed, believable anatomy and lesions."""

import csv
import dataclasses
import functools
import hashlib
import itertools
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.pixels import apply_voi_lut
from scipy import ndimage

import data
from support import phantom, sources

PATIENTS = 8  # 32 images: all syntaxes, bits, windows and, by patient 5, all classes


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return phantom.write_phantoms(tmp_path_factory.mktemp("phantoms"), PATIENTS).parent


@pytest.fixture(scope="module")
def rows(folder) -> list[dict]:
    with open(folder / "manifest.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def headers(folder) -> list[pydicom.Dataset]:
    return [pydicom.dcmread(path, stop_before_pixels=True) for path in sorted(folder.glob("*.dcm"))]


def digests(folder: Path, pattern: str = "*") -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob(pattern)}


@functools.cache
def render(number: int, laterality: str, view: str) -> tuple:
    return phantom.render(0, number, laterality, view)


def rendered(row: dict, mirrored: bool = True) -> tuple:
    """Shade, mask and Anatomy of a row; mirrored: chest wall always on the left."""
    shade, mask, breast = render(int(row["patient_id"][1:]), row["laterality"], row["view"])
    flip = np.s_[:, ::-1] if mirrored and row["laterality"] == "R" else np.s_[:, :]
    return shade[flip], mask[flip], breast


def image_seed(row: dict) -> list[int]:
    sides = "LR".index(row["laterality"]), ("CC", "MLO").index(row["view"])
    return [0, int(row["patient_id"][1:]), *sides]


# --- The same bytes, whole ---


def test_same_seed_gives_the_same_bytes_and_more_patients_change_none(folder, tmp_path):
    phantom.write_phantoms(tmp_path / "again", 2)
    again = digests(tmp_path / "again", "P*")
    assert len(again) == 8 + 2  # images, and two masks: patient 0 has a lesion, patient 1 none
    assert again.items() <= digests(folder, "P*").items()


def test_another_seed_gives_other_images_under_other_uids(folder, tmp_path):
    phantom.write_phantoms(tmp_path / "other", 1, seed=1)
    ours, other = (pydicom.dcmread(p / "P0000_L_CC.dcm") for p in (folder, tmp_path / "other"))
    assert ours.SOPInstanceUID != other.SOPInstanceUID
    assert ours.StudyInstanceUID != other.StudyInstanceUID
    assert not np.array_equal(ours.pixel_array, other.pixel_array)
    with pytest.raises(ValueError, match="seed: 1 there, 0 now"):
        phantom.write_phantoms(tmp_path / "other", 1, seed=0)


def test_killed_at_any_moment_and_started_again_it_ends_with_the_same_bytes(folder, tmp_path):
    script = "from support import phantom; import pathlib as p, sys\n"
    script += "phantom.write_phantoms(p.Path(sys.argv[1]), 2)"
    out = tmp_path / "killed"
    for images in (1, 4):  # killed when so many are there, the last one perhaps not whole
        process = subprocess.Popen(
            [sys.executable, "-c", script, out],
            cwd=Path(__file__).parents[1],
            stderr=subprocess.PIPE,
        )
        deadline = time.monotonic() + 60
        while len(list(out.glob("*.dcm"))) < images:
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
        assert not (out / "manifest.csv").exists()
        for path in out.glob("P*"):
            path.write_bytes(path.read_bytes()[:100])
    phantom.write_phantoms(out, 2)
    phantom.write_phantoms(tmp_path / "whole", 2)
    assert digests(out) == digests(tmp_path / "whole")
    written = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    phantom.write_phantoms(out, 2)
    assert written == {p: p.stat().st_mtime_ns for p in out.iterdir()}


# --- Varied as real files are ---


def test_files_vary_as_real_ones(headers):
    assert {h.file_meta.TransferSyntaxUID for h in headers} == set(phantom.SYNTAXES)
    assert {h.PhotometricInterpretation for h in headers} == {"MONOCHROME1", "MONOCHROME2"}
    assert {h.BitsStored for h in headers} == {12, 14, 16}
    assert {h.get("VOILUTFunction", "LUT") for h in headers} == set(phantom.VOIS)
    assert len({(h.Rows, h.Columns) for h in headers}) > 10
    assert len({tuple(h.ImagerPixelSpacing) for h in headers}) > 2
    assert all(300 < h.Rows < 720 and 200 < h.Columns < 500 for h in headers)


def test_headers_identify_nobody_and_no_moment(headers):
    for h in headers:
        assert h.SOPClassUID == "1.2.840.10008.5.1.4.1.1.1.2"  # Digital Mammography, presentation
        assert h.PresentationIntentType == "FOR PRESENTATION"
        assert not any(
            element.value
            for element in h.iterall()
            if element.VR in ("DA", "TM", "DT", "PN") and element.keyword != "PatientName"
        )
    assert len({h.SOPInstanceUID for h in headers}) == len(headers)
    assert len({h.StudyInstanceUID for h in headers}) == PATIENTS


def test_patient_orientation_is_that_of_hung_mammograms(headers):
    """Rows of a left breast run to the nipple; columns to the other breast, or to the feet."""
    found = {
        (h.ImageLaterality, h.ViewCodeSequence[0].CodeValue): h.PatientOrientation for h in headers
    }
    assert found == {
        ("L", "R-10242"): ["A", "R"],
        ("R", "R-10242"): ["P", "L"],
        ("L", "R-10226"): ["A", "FR"],
        ("R", "R-10226"): ["P", "FL"],
    }


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="dciodvfy (dicom3tools) is not installed")
def test_dciodvfy_finds_no_error(folder):
    for path in sorted(folder.glob("*.dcm")):
        run = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=False)
        report = run.stdout + run.stderr
        assert "MammographyImageForPresentation" in report
        assert "Error" not in report, f"{path.name}: {report}"


def test_compressed_pixels_equal_the_uncompressed_ones(folder, rows):
    compressed = 0
    for row in rows:
        ds = pydicom.dcmread(folder / row["image_path"])
        shade, _, _ = rendered(row, mirrored=False)
        plain = pydicom.Dataset()
        inverse = ds.PhotometricInterpretation == "MONOCHROME1"
        phantom.store(plain, shade, ds.BitsStored, ds.get("VOILUTFunction", "LUT"), inverse)
        stored = np.frombuffer(plain.PixelData, "<u2").reshape(ds.Rows, ds.Columns)
        np.testing.assert_array_equal(ds.pixel_array, stored)
        compressed += ds.file_meta.TransferSyntaxUID.is_compressed
    assert compressed > len(rows) / 2


def test_windows_and_luts_show_what_was_drawn(folder, rows):
    """pydicom's own VOI transformation, then the inversion, gives the shade that was meant."""
    for row in rows:
        ds = pydicom.dcmread(folder / row["image_path"])
        shade, _, _ = rendered(row, mirrored=False)
        top = 4095 if "VOILUTSequence" in ds else 2**ds.BitsStored - 1
        shown = apply_voi_lut(ds.pixel_array, ds) / top
        if ds.PhotometricInterpretation == "MONOCHROME1":
            shown = 1 - shown
        expected = np.clip(shade, 0.01, 0.99)
        np.testing.assert_allclose(np.clip(shown, 0.01, 0.99), expected, atol=0.003)


# --- The manifest ---


def test_manifest_has_every_class_and_both_views(rows):
    assert len(rows) == 4 * PATIENTS
    assert {(r["laterality"], r["view"]) for r in rows} == set(phantom.IMAGES)
    assert {(r["finding"], r["pathology"]) for r in rows} == set(phantom.CASES)
    for number in range(PATIENTS):
        mine = [r for r in rows if r["patient_id"] == f"P{number:04d}" and r["finding"]]
        assert len(mine) in (0, 2) and len({r["laterality"] for r in mine}) == len(mine) // 2


def test_the_demo_tests_on_six_malignant_masses_and_four_clusters_at_least():
    """Of 72 patients: fewer would leave Table 1's patient-clustered intervals meaningless."""
    findings = [
        sources.Finding(
            f"{n}.dcm", f"P{n:04d}", "L", "CC", *case, bbox=(0, 0, 9, 9) if case else None
        )
        for n in range(72)
        for case in [phantom.CASES[n % len(phantom.CASES)]]
    ]
    for seed in range(20):
        splits = data.split_patients(findings, seed)
        found = [(splits[f.patient_id], f.finding, f.pathology) for f in findings]
        assert set(found) == {(s, *case) for s in sources.SPLITS for case in phantom.CASES}
        for case, least in ((phantom.MM, 6), (phantom.MC, 4), (phantom.BM, 2)):
            assert found.count(("test", *case)) >= least


# --- Anatomy ---


def test_breast_lies_on_the_side_of_its_chest_wall_in_dark_air(rows):
    for row in rows[:4]:
        shade, _, breast = rendered(row)
        assert breast.inside[:, 0].mean() > 0.9 and not breast.inside[:, -8:].any()
        assert shade[breast.inside].mean() > 0.3
        assert np.mean(shade[~breast.inside] <= 0) > 0.97  # but for the lead letters


def test_skin_is_a_bright_line_and_the_nipple_juts_out(rows):
    for row in rows[:4]:
        shade, _, breast = rendered(row)
        line, beneath = ((breast.skin > a) & (breast.skin < b) for a, b in ((0.5, 1.3), (2.2, 3)))
        assert np.median(shade[line]) > np.median(shade[beneath]) + 0.02
        s = phantom.patient(0, int(row["patient_id"][1:])).spacing
        reach = breast.inside.sum(axis=1) * s
        at = int(breast.nipple[0] / s)
        beside = int(7 / s)
        assert reach[at] > max(reach[at - beside], reach[at + beside]) + 2


def test_mlo_has_a_bright_pectoral_muscle_and_cc_none(rows):
    for row in rows:
        shade, _, breast = rendered(row)
        muscle = (breast.muscle < -3) & (breast.skin > 5)
        if row["view"] == "CC":
            assert not muscle.any()
            continue
        assert 0.03 < muscle.sum() / breast.inside.sum() < 0.35
        assert muscle[5, 5] and not muscle[-5].any()  # a triangle in the upper inner corner
        before = (breast.muscle > 3) & (breast.muscle < 12) & (breast.skin > 10)
        assert np.median(shade[muscle]) > np.median(shade[before]) + 0.08


def spectral_slope(patch: np.ndarray, spacing: float) -> float:
    """Exponent of the radially averaged power spectrum between 0.12 and 0.9 cycles/mm."""
    window = np.hanning(len(patch))
    power = np.abs(np.fft.fft2((patch - patch.mean()) * np.outer(window, window))) ** 2
    f = np.hypot(*np.meshgrid(*(np.fft.fftfreq(len(patch), spacing),) * 2))
    edges = np.geomspace(0.12, 0.9, 9)
    rings = [(f >= low) & (f < high) for low, high in itertools.pairwise(edges)]
    x, y = zip(*((np.log(f[r]).mean(), np.log(power[r].mean())) for r in rings), strict=True)
    return np.polyfit(x, y, 1)[0]


def test_parenchyma_has_a_spectrum_like_that_of_mammograms(rows):
    """Burgess 1999: power falls as f^-3 or so (2 to 4 in single images)."""
    slopes = []
    for row in rows:
        shade, mask, breast = rendered(row)
        s = phantom.patient(0, int(row["patient_id"][1:])).spacing
        side = 2 * int(15 / s)
        # The 30 mm window that lies deepest in the breast, off muscle and lesion.
        off = (breast.skin > 3) & (breast.muscle > 2) & ~mask
        deep = ndimage.distance_transform_cdt(np.pad(off, 1))[1:-1, 1:-1]
        row0, col0 = np.array(np.unravel_index(deep.argmax(), deep.shape)) - side // 2
        if deep.max() >= side // 2:
            slopes.append(spectral_slope(shade[row0 : row0 + side, col0 : col0 + side], s))
    assert len(slopes) > 10
    assert -3.5 < np.median(slopes) < -2.3
    assert min(slopes) > -4.2 and max(slopes) < -1.5


# --- Lesions ---


def test_mask_is_the_box_and_lies_in_tissue(folder, rows):
    lesions = [r for r in rows if r["finding"]]
    for row in lesions:
        box = [int(row[c]) for c in ("row0", "col0", "row1", "col1")]
        mask = np.asarray(Image.open(folder / row["mask_path"])) > 0
        _, drawn, breast = rendered(row)
        np.testing.assert_array_equal(mask if row["laterality"] == "L" else mask[:, ::-1], drawn)
        at = np.argwhere(mask)
        assert [*at.min(axis=0), *(at.max(axis=0) + 1)] == box
        assert breast.inside[drawn].all() and (breast.muscle[drawn] > 0).all()
        who = phantom.patient(0, int(row["patient_id"][1:]))
        s = who.spacing
        size = max(box[2] - box[0], box[3] - box[1]) * s
        assert 5 < size < 21  # mm, inside a 64 px patch at 0.33 mm
        (r, c), half = np.argwhere(drawn).mean(axis=0).astype(int), int(10.5 / s)
        assert breast.inside[r - half : r + half, c - half : c + half].mean() > 0.9
        healthy = phantom.anatomy(np.random.default_rng(image_seed(row)), who, row["view"])
        added = breast.shade - healthy.shade
        assert added.min() == 0  # a lesion darkens nothing, pectoral muscle included
        strong = added > 0.5 * added.max()
        assert drawn[strong].mean() > 0.98
        if row["finding"] == "mass":
            assert (added[drawn] > 0.02).mean() > 0.95
    assert {r["finding"] for r in lesions} == {"mass", "calcification"}


@pytest.mark.parametrize("behind, below", [(2, 0), (40, 90), (40, -90), (120, 0), (80, -60)])
def test_lesions_stay_where_a_patch_around_them_is_tissue(behind, below):
    who = dataclasses.replace(phantom.patient(0, 0), behind=behind, below=below)
    for view in ("CC", "MLO"):
        rng = np.random.default_rng(0)
        breast = phantom.anatomy(rng, who, view)
        (row, col), half = np.argwhere(phantom.add_lesion(rng, who, breast)).mean(axis=0), 32 * 0.33
        at = [int(v - half / who.spacing) for v in (row, col)]
        side = int(2 * half / who.spacing)
        window = np.s_[at[0] : at[0] + side, at[1] : at[1] + side]
        assert min(at) >= 0 and breast.inside[window].shape == (side, side)
        assert breast.inside[window].mean() >= 0.9
        assert breast.muscle[int(row), int(col)] > 8


def lesion(finding: str, pathology: str, number: int) -> tuple[np.ndarray, np.ndarray, float]:
    """A lesion on its own: shade added, mask, spacing."""
    s = 0.25
    grid = np.meshgrid(*(np.arange(-60, 61) * s,) * 2, indexing="ij")
    rng = np.random.default_rng(number)
    who = dataclasses.replace(
        phantom.patient(0, 0),
        finding=finding,
        pathology=pathology,
        size=8 + 6 * rng.uniform(),
        contrast=0.25,
    )
    draw = phantom.mass if finding == "mass" else phantom.calcifications
    return *draw(rng, who, *grid, s), s


def circularity(mask: np.ndarray) -> float:
    """4 pi area / perimeter^2: 1 for a disc. The perimeter is Crofton's, in two directions."""
    padded = np.pad(mask, 1).astype(int)
    perimeter = sum(np.abs(np.diff(padded, axis=a)).sum() for a in (0, 1)) * np.pi / 4
    return 4 * np.pi * mask.sum() / perimeter**2


def test_malignant_masses_are_irregular_and_benign_ones_round():
    malignant, benign = (
        [circularity(lesion("mass", p, n)[1]) for n in range(40)] for p in ("malignant", "benign")
    )
    assert np.median(malignant) < 0.6 < 0.85 < min(benign)
    assert np.quantile(malignant, 0.9) < np.median(benign)


def test_masses_are_of_a_size_that_patches_hold():
    for pathology in ("malignant", "benign"):
        for n in range(20):
            added, mask, s = lesion("mass", pathology, n)
            rows, cols = np.nonzero(mask)
            assert 6 <= max(np.ptp(rows), np.ptp(cols)) * s <= 20
            assert added[mask].mean() > 0.3 * added.max() > 0  # not a dot in a wide mask
            assert ndimage.label(mask)[1] == 1


def test_malignant_grains_are_pleomorphic_and_benign_ones_alike():
    spread = {}
    for pathology in ("malignant", "benign"):
        sizes, peaks = [], []
        for n in range(20):
            added, mask, s = lesion("calcification", pathology, n)
            assert mask[added > 0.1].all()
            labels, count = ndimage.label(added > 0.08)
            index = np.arange(1, count + 1)
            area = ndimage.sum_labels(np.ones(labels.shape), labels, index) * s**2
            peak = ndimage.maximum(added, labels, index)
            assert count >= (10 if pathology == "malignant" else 4)  # apart: grains, not strokes
            sizes.append(area.std() / area.mean())
            peaks.append(np.std(peak) / np.mean(peak))
            coarse = ndimage.zoom(added, s / 0.33, order=1)  # the tiny preset's pixels
            assert ndimage.label(coarse > 0.1)[1] >= 4
        spread[pathology] = np.median(sizes), np.median(peaks)
    assert spread["malignant"][0] > 1.5 * spread["benign"][0]
    assert spread["malignant"][1] > 0.12 > 0.08 > spread["benign"][1]


def test_lesions_are_neither_invisible_nor_white(rows):
    contrasts = []
    for row in (r for r in rows if r["finding"]):
        shade, mask, _ = rendered(row)
        around = ndimage.binary_dilation(mask, iterations=12) & ~mask
        assert np.mean(shade[mask] > 0.93) < 0.1
        top = shade[mask].mean() if row["finding"] == "mass" else np.quantile(shade[mask], 0.97)
        contrasts.append(top - shade[around].mean())
    assert np.median(contrasts) > 0.08 and max(contrasts) < 0.6
