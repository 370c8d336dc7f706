"""§3 Synthetic dataset, Figures 1 and 2a: claims S1 to S10, F1, F2."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from scipy import ndimage

from benchmarks.bench_synthesize import TINY, write_patch_set, write_run
from postprocess import (
    IsolatedLesion,
    Synthesizer,
    _warnings,
    add_lesion,
    blob,
    isolate_lesion,
    synthesize_set,
)
from support.fullimage import synthesize_images
from support.patchset import open_synthetic
from support.provenance import check_synthetic

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:pycocotools.*")

# --- S2 to S8 by hand: SPEC 3.5 in full ---


def rectangles(*boxes, side=256):
    """Lesion channel with value v in rows r0..r1, columns c0..c1 of each (r0, c0, r1, c1, v)."""
    lesion = np.zeros((side, side), np.float32)
    for r0, c0, r1, c1, value in boxes:
        lesion[r0:r1, c0:c1] = value
    return lesion


def expanded(lesion, **options):
    """The binary object after expansion."""
    return isolate_lesion(lesion, smooth_sigma=0, **options).weights


def blotches(seed, side=256):
    """A random lesion channel with several objects, some at the border."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.standard_normal((side, side)), side / 16, mode="wrap")
    return (field / np.abs(field).max()).astype(np.float32)


def test_S3_threshold_is_strict_and_signed():
    assert isolate_lesion(rectangles((40, 40, 140, 140, 0.09))) is None
    assert isolate_lesion(rectangles((40, 40, 140, 140, 0.11))).area == 10_000


def test_S3_nothing_or_only_negative_is_discarded():
    assert isolate_lesion(np.zeros((256, 256), np.float32)) is None
    assert isolate_lesion(rectangles((40, 40, 200, 200, -0.9))) is None


def test_S4_the_largest_object_wins_not_the_brightest():
    lesion = rectangles((20, 20, 110, 110, 0.5), (150, 150, 235, 235, 0.9))
    assert isolate_lesion(lesion).bbox == (20, 20, 110, 110)


def test_S4_ties_go_to_the_first_in_raster_order():
    lesion = rectangles((150, 10, 240, 100, 0.5), (20, 150, 110, 240, 0.9))
    assert isolate_lesion(lesion).bbox == (20, 150, 110, 240)


def test_Q26_connectivity():
    corner = rectangles((40, 40, 100, 100, 0.5), (100, 100, 160, 160, 0.5))
    assert isolate_lesion(corner) is None
    both = isolate_lesion(corner, connectivity=8)
    assert (both.area, both.bbox) == (7200, (40, 40, 160, 160))
    assert isolate_lesion(corner, min_area_frac=0).area == 3600


@pytest.mark.parametrize(("extra", "kept"), [(73, False), (74, True)])
def test_S5_objects_under_ten_percent_are_discarded(extra, kept):
    lesion = rectangles((60, 60, 140, 141, 0.5), (140, 60, 141, 60 + extra, 0.5))
    isolated = isolate_lesion(lesion)
    assert (isolated is not None) == kept
    assert not kept or isolated.area == 6554


@pytest.mark.parametrize("component", ["largest", "cluster"])
def test_objects_over_the_largest_area_that_is_asked_for_are_discarded(component):
    lesion = rectangles((60, 60, 160, 160, 0.5))
    area = isolate_lesion(lesion, component=component).area
    assert area == 10_000 if component == "largest" else area > 10_000  # of the joined object
    for pixels, kept in ((area, True), (area - 1, False)):
        isolated = isolate_lesion(lesion, component=component, max_area_frac=pixels / 256**2)
        assert (isolated is not None) == kept
    whole = rectangles((0, 0, 256, 256, 0.5))
    assert isolate_lesion(whole, component=component).area == 256**2  # none is too large


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({"max_area_frac": 0.05}, "0.1"),
        ({"max_area_frac": 0.01, "component": "cluster"}, "0.02"),
        ({"max_area_frac": 0.3, "min_area_frac": 0.4}, "0.4"),
    ],
)
def test_limits_of_area_that_exclude_each_other_are_told_before_anything_is_written(
    made, tmp_path, options, least
):
    said = (
        f"--max-area {options['max_area_frac']}: below --min-area {least}; raise it or lower that"
    )
    for call in (synthesize_set, synthesize_images):
        with pytest.raises(ValueError, match=said):
            call(made / "mass", made / "data", tmp_path / "out", device="cpu", **options)
    assert not (tmp_path / "out").exists()
    for lesion in (np.zeros((256, 256)), rectangles((60, 60, 160, 160, 0.5))):
        with pytest.raises(ValueError, match=said):
            isolate_lesion(lesion, **options)


@pytest.mark.parametrize(("shape", "area"), [("disk", 8241), ("cross", 8221), ("square", 8281)])
def test_S6_expansion_of_81_by_81(shape, area):
    lesion = rectangles((80, 80, 161, 161, 0.5))
    assert isolate_lesion(lesion).area == 6561
    assert expanded(lesion, dilate_shape=shape).sum() == area


@pytest.mark.parametrize(("shape", "corners"), [("disk", 60), ("cross", 40), ("square", 100)])
@pytest.mark.parametrize(("h", "w"), [(80, 90), (100, 70), (66, 120)])
def test_S6_expansion_of_any_rectangle(shape, corners, h, w):
    lesion = rectangles((60, 60, 60 + h, 60 + w, 0.5))
    assert expanded(lesion, dilate_shape=shape).sum() == h * w + 10 * (h + w) + corners


@pytest.mark.parametrize(("shape", "area"), [("disk", 81), ("cross", 61), ("square", 121)])
def test_S6_S7_one_pixel(shape, area):
    lesion = rectangles((128, 128, 129, 129, 0.5))
    assert expanded(lesion, dilate_shape=shape, min_area_frac=0).sum() == area
    if shape == "disk":
        weights = isolate_lesion(lesion, min_area_frac=0).weights
        assert weights.max() == pytest.approx(0.120910, abs=1e-5)


WEIGHTS = {
    (127, 127): 1.0,
    (78, 127): 0.708930,
    (77, 127): 0.673721,
    (73, 127): 0.519948,
    (72, 127): 0.480052,
    (63, 127): 0.170939,
    (40, 127): 0.000549,
    (78, 78): 0.489157,
    (73, 73): 0.254909,
}


def test_S2_to_S8_worked_example():
    lesion = rectangles((78, 78, 178, 178, 0.5))
    isolated = isolate_lesion(lesion)
    assert (isolated.area, isolated.mask.sum()) == (10_000, 10_000)
    assert isolated.bbox == (78, 78, 178, 178)
    grown = expanded(lesion)
    rows, cols = np.flatnonzero(grown.any(1)), np.flatnonzero(grown.any(0))
    assert grown.sum() == 12_060
    assert (rows[0], cols[0], rows[-1] + 1, cols[-1] + 1) == (73, 73, 183, 183)
    for at, weight in WEIGHTS.items():
        assert isolated.weights[at] == pytest.approx(weight, abs=1e-5)
    assert isolated.weights.sum() == pytest.approx(12_060, abs=1e-5)
    assert (isolated.weights * lesion).sum() == pytest.approx(4610.285, abs=1e-3)


def test_S9_removal_mirrors_synthesis():
    for lesion in (rectangles((78, 78, 178, 178, 0.5)), blotches(3)):
        added, removed = isolate_lesion(lesion), isolate_lesion(-lesion, removal=True)
        assert np.array_equal(added.weights * lesion, -(removed.weights * -lesion))
        assert np.array_equal(added.mask, removed.mask)
    assert isolate_lesion(rectangles((78, 78, 178, 178, 0.5)), removal=True) is None


def cluster_of_grains():
    """25 grains of 2 px radius, 12 px apart: SPEC Q27's calcification cluster."""
    lesion = np.zeros((256, 256), np.float32)
    rows, cols = np.mgrid[:256, :256]
    for r in range(100, 160, 12):
        for c in range(100, 160, 12):
            lesion[(rows - r) ** 2 + (cols - c) ** 2 <= 4] = 0.6
    return lesion


def test_Q27_literal_rule_discards_a_cluster_of_grains_and_cluster_keeps_it():
    lesion = cluster_of_grains()
    assert isolate_lesion(lesion) is None
    joined = isolate_lesion(lesion, component="cluster")
    assert np.array_equal(joined.mask, lesion > 0.1)  # all grains, and nothing between them
    grown = ndimage.distance_transform_edt(~(lesion > 0.1)) <= 10
    rows, cols = np.flatnonzero(grown.any(1)), np.flatnonzero(grown.any(0))
    assert joined.area == grown.sum()
    assert joined.bbox == (rows[0], cols[0], rows[-1] + 1, cols[-1] + 1)
    assert joined.weights[lesion > 0.1].min() > 0.5  # grains are not faded away


def test_Q27_cluster_discards_under_two_percent():
    lesion = rectangles((100, 100, 106, 106, 0.5))  # joined: 6*6 + 2*10*12 + 313-ish < 1310
    assert isolate_lesion(lesion, component="cluster") is None
    assert isolate_lesion(lesion, component="cluster", min_area_frac=0.005) is not None


@pytest.mark.parametrize("seed", range(5))
def test_S8_untouched_where_the_weight_is_zero_and_clipped_elsewhere(seed):
    rng = np.random.default_rng(seed)
    patch = rng.integers(0, 65536, (256, 256), dtype=np.uint16)
    lesion = 3 * rectangles((20, 20, 120, 130, 0.5))
    isolated = isolate_lesion(lesion)
    combined = add_lesion(patch, lesion, isolated)
    untouched = isolated.weights == 0
    assert 1000 < untouched.sum() < 60_000
    assert np.array_equal(combined[untouched], patch[untouched])
    assert (combined[40:100, 40:100] == 65535).mean() > 0.5  # clipped at 1, not wrapped
    expected = patch / 32767.5 - 1 + isolated.weights * lesion
    assert np.abs(np.clip(expected, -1, 1) - (combined / 32767.5 - 1)).max() < 2 / 65535


# --- Synthetic sets ---

SPLITS_OF_PATIENTS = {"a": "train", "b": "train", "c": "val", "d": "test"}
COUNTS = {
    "train/normal": 12,
    "train/malignant_mass": 6,
    "train/malignant_calcification": 4,
    "val/normal": 4,
    "test/normal": 4,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A made-up patch set and runs of the three tasks, 64 px."""
    folder = tmp_path_factory.mktemp("made")
    write_patch_set(folder / "data", 64, COUNTS, SPLITS_OF_PATIENTS)
    write_run(folder / "mass", folder / "data", **TINY)
    write_run(folder / "removal", folder / "data", task="removal", gain=-1.0, **TINY)
    write_run(folder / "nothing", folder / "data", gain=0.0, **TINY)
    return folder


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def arrays(folder):
    names = ("input", "combined", "lesion", "mask")
    return SimpleNamespace(**{name: np.load(folder / f"{name}.npy") for name in names})


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_S10_set_holds_what_the_design_says(made, tmp_path):
    facts = synthesize_set(made / "mass", made / "data", tmp_path / "out", n=20, device="cpu")
    syn = open_synthetic(tmp_path / "out")
    made_of = arrays(tmp_path / "out")
    assert (made_of.lesion.dtype, made_of.mask.dtype) == (np.int32, bool)
    check_synthetic(syn, made / "data")
    assert (len(syn.combined), syn.label, syn.requested, syn.short) == (20, 1, 20, False)
    assert np.array_equal(made_of.input.astype(np.int32) + made_of.lesion, syn.combined)
    sources = np.load(made / "data/patches/train/normal.npy")
    for k, row in enumerate(rows_of(tmp_path / "out/index.csv")):
        assert int(row["sample"]) == k and row["patient_id"] in ("a", "b")
        assert np.array_equal(made_of.input[k], sources[int(row["source_patch"])])
        # the made-up generator adds relu(input + 0.3) inside its frame of 2 px
        lesion = np.maximum(made_of.input[k] / 32767.5 - 0.7, 0).astype(np.float32)[::2, ::2]
        lesion = lesion.repeat(2, 0).repeat(2, 1)
        lesion[[0, 1, -1, -2]] = lesion[:, [0, 1, -1, -2]] = 0
        isolated = isolate_lesion(lesion)
        assert np.array_equal(made_of.mask[k], isolated.mask)
        assert int(row["area"]) == isolated.area == isolated.mask.sum()
        assert (
            tuple(int(row[f"bbox_{e}"]) for e in ("row0", "col0", "row1", "col1")) == isolated.bbox
        )
        combined = add_lesion(made_of.input[k], lesion, isolated)  # up to the last bit of float32
        assert np.abs(syn.combined[k].astype(int) - combined).max() <= 1
        assert not made_of.lesion[k][isolated.weights == 0].any()
        runs = {"size": [64, 64], "counts": list(map(int, row["mask_rle"].split()))}
        decoded = coco_mask.decode(coco_mask.frPyObjects(runs, 64, 64))
        assert np.array_equal(decoded.astype(bool), made_of.mask[k])
    assert facts["acceptance"] == 20 / facts["attempts"]
    assert sum(facts["area_histogram"]) == 20 and facts["strength"] > 0.1
    assert facts["patients"] == ["a", "b"]
    assert (tmp_path / "out/gan.png").read_bytes() == (made / "mass/gan.png").read_bytes()
    assert (tmp_path / "out/figure1.png").exists() and (tmp_path / "out/figure2a.png").exists()
    assert not (tmp_path / "out/parts").exists()


def test_S9_removal_uses_both_lesion_types_and_darkens(made, tmp_path):
    synthesize_set(made / "removal", made / "data", tmp_path / "out", n=30, device="cpu")
    syn = open_synthetic(tmp_path / "out")
    made_of = arrays(tmp_path / "out")
    rows = rows_of(tmp_path / "out/index.csv")
    assert {row["source_class"] for row in rows} == {"malignant_mass", "malignant_calcification"}
    for k, row in enumerate(rows):
        source = np.load(made / f"data/patches/train/{row['source_class']}.npy")
        assert np.array_equal(made_of.input[k], source[int(row["source_patch"])])
    assert syn.label == 0 and (made_of.lesion <= 0).all()
    assert (made_of.lesion.min(axis=(1, 2)) < -1000).all()


def test_the_same_command_gives_the_same_bytes_and_another_seed_does_not(made, tmp_path):
    for name, seed in (("one", 1), ("two", 1), ("other", 2)):
        synthesize_set(made / "mass", made / "data", tmp_path / name, n=10, seed=seed, device="cpu")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert contents(tmp_path / "one") != contents(tmp_path / "other")


COMMAND = """
import sys, signal; from pathlib import Path; from postprocess import synthesize_set
signal.signal(signal.SIGTERM, signal.default_int_handler)
run, data, out = map(Path, sys.argv[1:4])
synthesize_set(run, data, out, n=150, device="cpu", control=sys.argv[4])
"""


@pytest.mark.parametrize("control", ["", "blob"])
def test_killed_at_any_moment_it_ends_with_the_same_bytes(made, tmp_path, control, monkeypatch):
    """Run k dies at the k-th file that it would put into its place, just before or just after."""
    args = {"n": 100, "device": "cpu", "control": control}
    synthesize_set(made / "mass", made / "data", tmp_path / "whole", **args)
    replace, left, kills = os.replace, 0, 0

    def replace_or_die(source, target):
        nonlocal left
        left -= 1
        if left == 0 and kills % 2:
            raise KeyboardInterrupt
        replace(source, target)
        if left == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", replace_or_die)
    while kills < 50:
        left = kills + 1
        try:
            synthesize_set(made / "mass", made / "data", tmp_path / "cut", **args)
            break
        except KeyboardInterrupt:
            kills += 1
            if not json.loads((tmp_path / "cut/config.json").read_text())["complete"]:
                with pytest.raises(ValueError, match="not finished"):
                    open_synthetic(tmp_path / "cut")
    assert kills > 5
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_what_is_done_is_not_done_again(made, tmp_path, monkeypatch):
    lesions, calls = Synthesizer.lesions, []

    def counted(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return lesions(*args)

    monkeypatch.setattr(Synthesizer, "lesions", counted)
    args = {"n": 50, "device": "cpu"}
    with pytest.raises(KeyboardInterrupt):
        synthesize_set(made / "mass", made / "data", tmp_path / "out", **args)
    facts = synthesize_set(made / "mass", made / "data", tmp_path / "out", **args)
    assert len(calls) == 1 + -(-facts["attempts"] // 16)  # one batch was begun twice


def test_sigkill_then_the_same_command(made, tmp_path):
    synthesize_set(made / "mass", made / "data", tmp_path / "whole", n=150, device="cpu")
    command = [sys.executable, "-c", COMMAND, made / "mass", made / "data", tmp_path / "cut", ""]
    root = Path(__file__).resolve().parent.parent
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / "cut/parts").glob("*.npz")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("control", ["", "blob"])
def test_Q27_cluster_sets_keep_the_joined_area_and_the_thresholded_mask(made, tmp_path, control):
    args = {"n": 20, "component": "cluster", "control": control, "device": "cpu"}
    synthesize_set(made / "mass", made / "data", tmp_path / "out", **args)
    syn = open_synthetic(tmp_path / "out")
    for k, mask in enumerate(arrays(tmp_path / "out").mask):
        joined = ndimage.distance_transform_edt(~mask) <= 2.5  # 10 px at 64 / 256
        box = [int(syn.index[f"bbox_{edge}"][k]) for edge in ("row0", "col0", "row1", "col1")]
        rows, cols = np.flatnonzero(joined.any(1)), np.flatnonzero(joined.any(0))
        assert box == [rows[0], cols[0], rows[-1] + 1, cols[-1] + 1]
        assert int(syn.index["area"][k]) == joined.sum() > mask.sum()


def test_Q27_attempts_are_capped_and_a_short_set_is_said(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("postprocess.ATTEMPTS_PER_SAMPLE", 1)
    facts = synthesize_set(
        made / "mass", made / "data", tmp_path / "out", n=30, device="cpu", min_area_frac=0.2
    )
    assert facts["short"] and facts["attempts"] == 30 and 0 < facts["accepted"] < 30
    assert open_synthetic(tmp_path / "out").short
    assert "short" in capsys.readouterr().out


def test_Q27_rare_and_patch_filling_lesions_are_said(made, tmp_path, capsys):
    write_run(tmp_path / "strong", made / "data", gain=30.0, **TINY)
    synthesize_set(
        tmp_path / "strong",
        made / "data",
        tmp_path / "out",
        n=5,
        device="cpu",
        threshold=-1.0,
    )
    assert "half of the lesions cover over" in capsys.readouterr().out
    facts = {"short": False, "accepted": 4, "attempts": 100, "acceptance": 0.04, "area_median": 0.2}
    assert [text[:9] for text in _warnings(facts)] == ["only 4.0%"]


@pytest.mark.parametrize(
    ("task", "component", "advised"),
    [
        ("calcification", "largest", True),
        ("calcification", "cluster", False),
        ("mass", "largest", False),
        ("removal", "largest", False),
    ],
)
def test_Q27_cluster_is_advised_for_calcifications_that_were_made_without(
    made, tmp_path, task, component, advised
):
    write_run(tmp_path / "run", made / "data", task=task, gain=0.0, **TINY)
    synth = Synthesizer(tmp_path / "run", "cpu", "", {"component": component})
    assert ("--component cluster" in synth.advice) == advised
    facts = {"short": False, "accepted": 4, "attempts": 100, "acceptance": 0.04, "area_median": 0.6}
    for text in _warnings(facts, synth.advice):
        assert ("--component cluster" in text) == advised and "Train longer" in text


def test_nothing_accepted_is_one_clear_message(made, tmp_path):
    with pytest.raises(ValueError, match=r"no lesion accepted in 40 attempts; 40 had no pixel"):
        synthesize_set(made / "nothing", made / "data", tmp_path / "out", n=2, device="cpu")
    with pytest.raises(ValueError, match=r"not finished"):
        open_synthetic(tmp_path / "out")


def test_Q20_validation_and_test_patients_are_refused(made, tmp_path):
    counts = {"train/normal": 4}
    write_patch_set(tmp_path / "data", 64, counts, {"a": "train", "c": "val"})
    index = tmp_path / "data/patches/train/normal.csv"
    index.write_text(index.read_text().replace(",a,", ",c,", 1))
    write_run(tmp_path / "run", tmp_path / "data", **TINY)
    with pytest.raises(ValueError, match=r"patient c is in split 'val'.*training patients"):
        synthesize_set(tmp_path / "run", tmp_path / "data", tmp_path / "out", n=2, device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_run_that_does_not_fit_is_refused(made, tmp_path):
    write_patch_set(tmp_path / "data", 128, {"train/normal": 2}, {"a": "train"})
    with pytest.raises(ValueError, match=r"trained with patch_size 64, --data .*data has 128"):
        synthesize_set(made / "mass", tmp_path / "data", tmp_path / "out", n=2)
    write_patch_set(tmp_path / "small", 64, {"train/normal": 2}, {"a": "train"})
    write_run(tmp_path / "removal", tmp_path / "small", task="removal", **TINY)
    with pytest.raises(ValueError, match=r"holds no train/malignant"):
        synthesize_set(tmp_path / "removal", tmp_path / "small", tmp_path / "out", n=2)
    with pytest.raises(ValueError, match=r"no such folder; expected one that train-gan made"):
        synthesize_set(tmp_path / "absent", tmp_path / "small", tmp_path / "out", n=2)
    with pytest.raises(ValueError, match=r"'prepare'; expected a folder made by 'train-gan'"):
        synthesize_set(tmp_path / "small", tmp_path / "small", tmp_path / "out", n=2)


def test_a_generator_travels_to_patches_that_it_never_saw_in_validation_or_test(made, tmp_path):
    stranger = {"x": "train", "y": "val", "z": "test"}
    counts = {"train/normal": 4, "val/normal": 4, "test/normal": 4}
    write_patch_set(tmp_path / "own", 64, counts, stranger)
    for split, start in (("train", 0), ("val", 400), ("test", 800)):  # no image but in train
        index = tmp_path / f"own/patches/{split}/normal.csv"
        rows = index.read_text().splitlines()
        for i in range(4):
            rows[1 + i] = rows[1 + i].replace(f"{i:016x}", f"{start + i:016x}")
        index.write_text("\n".join(rows) + "\n")
    synthesize_set(made / "mass", tmp_path / "own", tmp_path / "syn", n=2, device="cpu")
    check_synthetic(open_synthetic(tmp_path / "syn"), tmp_path / "own")
    index = tmp_path / "own/patches/val/normal.csv"
    text = index.read_text()
    index.write_text(text.replace(f"{401:016x}", f"{1:016x}"))
    leak = rf"mass: was trained on 1 of split val, such as image_uid {1:016x}; give patches that it"
    with pytest.raises(ValueError, match=leak):
        synthesize_set(made / "mass", tmp_path / "own", tmp_path / "out", n=2, device="cpu")
    index.write_text(text.replace(",y,", ",a,"))
    synthesize_set(made / "mass", tmp_path / "own", tmp_path / "out", n=2, device="cpu")
    for name in ("own", "mass"):  # "a" is one woman when both are of one archive
        path = (tmp_path if name == "own" else made) / name / "config.json"
        facts = json.loads(path.read_text())
        target = facts if name == "own" else facts["config"]
        target["format"] = "cbis-ddsm"
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text(json.dumps(facts))
    for name in ("checkpoint.pt", "gan.png"):
        shutil.copy(made / "mass" / name, tmp_path / "mass")
    with pytest.raises(ValueError, match="trained on 1 of split val, such as patient_id a"):
        synthesize_set(tmp_path / "mass", tmp_path / "own", tmp_path / "two", n=2, device="cpu")
    old = json.loads((tmp_path / "mass/config.json").read_text())
    del old["config"]["images"]
    (tmp_path / "mass/config.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match="does not say which images it was trained on; train it"):
        synthesize_set(tmp_path / "mass", tmp_path / "own", tmp_path / "two", n=2, device="cpu")


def test_a_damaged_configuration_of_a_run_is_named(made, tmp_path):
    shutil.copytree(made / "mass", tmp_path / "run")
    path = tmp_path / "run/config.json"
    for task in ('"masses"', "[]"):
        path.write_text((made / "mass/config.json").read_text().replace('"mass"', task))
        with pytest.raises(ValueError, match=r"config.json: damaged .*; train it again"):
            synthesize_set(tmp_path / "run", made / "data", tmp_path / "out", n=3, device="cpu")


def test_another_checkpoint_or_option_does_not_go_on_in_the_same_folder(made, tmp_path):
    synthesize_set(made / "mass", made / "data", tmp_path / "out", n=3, device="cpu")
    write_run(tmp_path / "mass", made / "data", gain=0.9, **TINY)
    with pytest.raises(ValueError, match=r"made with other options .generator"):
        synthesize_set(tmp_path / "mass", made / "data", tmp_path / "out", n=3, device="cpu")
    with pytest.raises(ValueError, match=r"n: 3 there, 4 now"):
        synthesize_set(made / "mass", made / "data", tmp_path / "out", n=4, device="cpu")


def test_a_generator_that_gives_nan_is_one_clear_message(made, tmp_path):
    write_run(tmp_path / "nan", made / "data", gain=float("nan"), **TINY)
    with pytest.raises(ValueError, match=r"not finite"):
        synthesize_set(tmp_path / "nan", made / "data", tmp_path / "out", n=3, device="cpu")


def test_blob_control_has_the_same_number_areas_and_strength(made, tmp_path):
    for control in ("", "blob"):
        synthesize_set(
            made / "mass", made / "data", tmp_path / f"out{control}", n=40, control=control,
            device="cpu",
        )  # fmt: skip
    lesion, blob = open_synthetic(tmp_path / "out"), open_synthetic(tmp_path / "outblob")
    assert (lesion.control, blob.control, len(blob.combined)) == ("", "blob", 40)
    made_of, bumps = arrays(tmp_path / "out"), arrays(tmp_path / "outblob")
    assert np.array_equal(made_of.input, bumps.input)  # the same inputs, one by one
    assert np.array_equal(lesion.index["area"], blob.index["area"])  # and the same areas
    assert np.array_equal(bumps.mask.sum(axis=(1, 2)), blob.index["area"].astype(int))
    strength = [
        np.array([float(r["strength"]) for r in rows_of(tmp_path / f"out{c}/index.csv")])
        for c in ("", "blob")
    ]
    assert np.abs(strength[0] - strength[1]).max() < 0.02
    assert np.array_equal(bumps.input.astype(np.int32) + bumps.lesion, blob.combined)
    for mask in bumps.mask:  # a disc, as far as the zero frame lets it be one
        rows, cols = mask.any(1).sum(), mask.any(0).sum()
        assert mask.sum() == pytest.approx(np.pi / 4 * rows * cols, rel=0.1)
    places = np.array([ndimage.center_of_mass(mask) for mask in bumps.mask])
    assert places.std(axis=0).min() > 3  # anywhere
    assert not bumps.lesion[:, [0, 1, -1, -2]].any()  # the generator's zero frame


@pytest.mark.parametrize("control", ["", "blob"])
def test_a_set_holds_no_object_over_the_largest_area(made, tmp_path, control):
    runs = {"all": {}, "some": {"max_area_frac": 0.15}}
    common = {"n": 20, "control": control, "device": "cpu"}
    areas = {}
    for name, options in runs.items():
        out = tmp_path / name
        facts = synthesize_set(made / "mass", made / "data", out, **common, **options)
        assert facts["config"].get("max_area_frac") == options.get("max_area_frac")
        areas[name] = open_synthetic(out).index["area"].astype(int)
    assert areas["some"].max() <= 0.15 * 64**2 < areas["all"].max()
    with pytest.raises(
        ValueError, match=r"made with other options \(max_area_frac: 0.15 there, 0.3"
    ):
        synthesize_set(made / "mass", made / "data", tmp_path / "some", **common, max_area_frac=0.3)
    with pytest.raises(ValueError, match=r"the others too small or large \(S5\)"):
        options = {"min_area_frac": 0.999, "max_area_frac": 1.0}
        synthesize_set(made / "mass", made / "data", tmp_path / "none", **common, **options)


def test_blob_control_is_one_smooth_hill():
    lesion = blotches(3, 128)
    isolated = isolate_lesion(lesion)
    bump = blob(isolated, lesion, "largest", np.random.default_rng(0))
    for level in (0.1, 0.15, 0.2):
        assert ndimage.label(bump > level)[1] == 1
    assert np.abs(np.diff(bump[5:-5, 5:-5], n=2)).max() < 0.02


@pytest.mark.parametrize("area", [350, 1000, 3000])
def test_blob_control_of_clusters_matches_the_joined_area(area):
    rng, got = np.random.default_rng(0), []
    lesion = np.zeros((128, 128), np.float32)
    lesion[60:64, 60:64] = 0.4
    for _ in range(20):
        bump = blob(
            IsolatedLesion(lesion, lesion > 0.1, area, (0, 0, 9, 9)), lesion, "cluster", rng
        )
        got.append(isolate_lesion(bump, component="cluster", min_area_frac=0).area)
    assert np.mean(got) == pytest.approx(area, rel=0.05)


# --- Figures ---


def test_F1_F2_figures_hold_the_patches_at_full_resolution(made, tmp_path):
    """A patch of 64 px is drawn with pixels of 4 x 4, between gaps of 6 and lines of 28."""
    synthesize_set(made / "mass", made / "data", tmp_path / "out", n=5, device="cpu")
    drew = arrays(tmp_path / "out")
    one = np.asarray(Image.open(tmp_path / "out/figure1.png").convert("L"))
    two = np.asarray(Image.open(tmp_path / "out/figure2a.png").convert("L"))

    def drawn(picture, top, left):
        return picture[top : top + 256, left : left + 256]

    for k in range(4):
        before, after = (np.kron(x[k] >> 8, np.ones((4, 4))) for x in (drew.input, drew.combined))
        assert np.array_equal(drawn(one, 28, 6 + 2 * k * 262), before)
        assert np.array_equal(drawn(one, 28, 6 + (2 * k + 1) * 262), after)
        assert np.array_equal(drawn(two, 6, 28 + k * 262), before)
        lesion = drawn(two, 6 + 290, 28 + k * 262)
        assert lesion.min() == 128 and lesion.max() > 200  # mid-grey and brighter
        assert np.array_equal(drawn(two, 6 + 2 * 290, 28 + k * 262), after)
    bar = (one[28 + 256 + 14, :100] < 64).sum()  # 5 mm at 0.28 mm a pixel
    assert bar == pytest.approx(4 * 5 / 0.28, abs=3)
