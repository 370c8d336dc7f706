"""The public data sets as distributed: one made-up tree a set, one test a trap."""

import csv
import json
import plistlib
import random
import uuid
from collections import defaultdict
from pathlib import Path

import numpy as np
import omidb
import pydicom
import pytest
from loguru import logger
from PIL import Image
from pydicom import uid
from pydicom.dataset import FileMetaDataset

from support import sources
from support.mammogram import image_size
from support.sources import READERS

logger.disable("omidb")
SHAPE = (60, 40)  # rows, columns of every made-up image


def write_dicom(path: Path, pixels: np.ndarray, side: str = "L", view: str = "CC") -> Path:
    ds = pydicom.Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = uid.SecondaryCaptureImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = uid.generate_uid(
        entropy_srcs=[str(path)]
    )
    ds.Modality, ds.ImageLaterality, ds.ViewPosition = "MG", side, view
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = pixels.itemsize * 8
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, 0
    ds.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


def photograph(seed: int = 0, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4096, shape, dtype=np.uint16)


def write_csv(path: Path, rows: list[dict], delimiter: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def read(name: str, root: Path, birads: bool = False):
    """Findings that `prepare` accepts, and {sentence: count}."""
    findings, notes = READERS[name](root, birads)
    assert sources.check_findings(findings) == []
    assert all(Path(f.image_path).resolve().is_relative_to(root.resolve()) for f in findings)
    return findings, {s: int(n.rstrip(".")) for s, n in (note.rsplit(": ", 1) for note in notes)}


def count(notes: dict[str, int], words: str) -> int:
    """How often the one trap whose sentence holds `words` was met."""
    found = [n for sentence, n in notes.items() if words in sentence]
    assert len(found) <= 1
    return found[0] if found else 0


# --- OMI-DB ---

STUDY, SERIES = "1.2.826.1", "1.2.826.2"


def image_uid(number: int) -> str:
    return f"1.2.826.3.{number}"


def mark(number: int, lesion: object = "1", box=(5, 10, 25, 30), **flags: object) -> dict:
    """One mark as imagedb has it; `box` is X1, Y1, X2, Y2, and flags are "1" or null."""
    return {
        "MarkID": number,
        "LinkedNBSSLesionNumber": lesion,
        "Conspicuity": "Obvious",
        **dict(zip(("X1", "Y1", "X2", "Y2"), box, strict=True)),
        "Mass": "1",
        "SuspiciousCalcifications": None,
        "WithCalcification": "",
        **flags,
    }


def write_client(
    root: Path,
    client: str,
    images: dict[int, object],
    episode: dict,
    *,
    episode_id: str = "E1",
    linked: str = "E1",
    upper: bool = False,
    sides: str = "L",
    pixels: np.ndarray | None = None,
) -> None:
    """data/<client>/ with both files, images/<client>/<study>/<image>.dcm."""
    marked = {
        image_uid(n): {str(m["MarkID"]): m for m in marks} if isinstance(marks, list) else marks
        for n, marks in images.items()
    }
    imagedb = {
        "ClientID": client,
        "Site": "adde",
        "STUDIES": {
            STUDY: {
                "EpisodeID": linked,
                "StudyDate": "2015-03-02",
                SERIES: {"SeriesDescription": "made up", **marked},
            }
        },
    }
    nbss = {"ClientID": client, episode_id: episode}
    folder = root / "data" / client
    (folder / STUDY).mkdir(parents=True)
    for kind, value in (("imagedb", imagedb), ("nbss", nbss)):
        name = (kind.upper() if upper else kind) + f"_{client}.json"
        (folder / name).write_text(json.dumps(value))
    for n in images:
        path = root / "images" / client / STUDY / f"{image_uid(n)}.dcm"
        write_dicom(path, photograph(n) if pixels is None else pixels, sides, "MLO")


def lesions(*numbers: str, side: str = "L") -> dict:
    return {"LESION": {side: {n: {"LesionDescription": "MA"} for n in numbers}}}


def event(opinion: str = "", side: str = "L", **own: str) -> dict:
    """An NBSS event: the side's opinion, and {lesion number: opinion} as l1="B5"."""
    found = {n[1:]: {"Opinion": o, "DatePerformed": "20150320"} for n, o in own.items()}
    return {"left_opinion" if side == "L" else "right_opinion": opinion, side: found}


ROUTINE = {"EpisodeType": "R", "SCREENING": {"L": {"DateTaken": "2015-03-02", "Opinion": "RN"}}}


def omidb_tree(root: Path) -> Path:
    """One client for each thing that the package and our reader should see alike."""
    malignant = {**lesions("1"), "EpisodeType": "F", "SURGERY": event("OM", l1="H5")}
    benign = {**lesions("1"), "EpisodeType": "F", "BIOPSYWIDE": event("OB", l1="B2")}
    write_client(root, "demd1", {1: [mark(1), mark(2, box=(1, 2, 9, 12))], 2: None}, malignant)
    write_client(root, "demd2", {3: [mark(3, WithCalcification="1")]}, benign, upper=True)
    write_client(root, "optm3", {4: None, 5: ""}, ROUTINE)
    write_client(root, "optm4", {6: None}, {**ROUTINE, "EpisodeType": "CI"})
    write_client(root, "optm5", {7: None}, {**ROUTINE, "SURGERY": event("ON")})
    write_client(root, "optm6", {8: None}, {**ROUTINE, "ASSESSMENT": event("ON")})
    write_client(
        root, "optm7", {9: [mark(9, "1,2", Mass=None, FocalAsymmetry=True)]},
        {**lesions("1", "2"), "BIOPSYFINE": event("", l1="C2", l2="C5")},
    )  # fmt: skip
    write_client(root, "optm8", {10: [mark(10)]}, malignant | ROUTINE, linked="E9")
    write_client(root, "optm9", {11: None}, {**ROUTINE, "ASSESSMENT": event("")})
    (root / "data" / "other").mkdir()  # not a client
    return root


def test_P1_omidb_agrees_with_the_package_that_documents_the_layout(tmp_path):
    root = omidb_tree(tmp_path)
    findings, _ = read("omidb", root)
    ours = defaultdict(set)
    for f in findings:
        ours[f.patient_id, Path(f.image_path).stem].add((f.bbox, f.finding))
    flags = {
        "mass": "mass",
        "suspicious_calcifications": "calcification",
        "calcifications": "calcification",
        "architectural_distortion": "distortion",
        "focal_asymmetry": "asymmetry",
    }
    theirs, normal = {}, set()
    for client in omidb.DB(root / "data", root / "images"):
        clear = all(e.status and e.status.name in ("N", "NA", "NAB") for e in client.episodes)
        for image in (
            i for e in client.episodes for s in e.studies for r in s.series for i in r.images
        ):
            assert image.dcm is not None  # the package finds the same file
            theirs[client.id, image.id] = {
                ((float(b.y1), float(b.x1), float(b.y2), float(b.x2)), kind)
                for m in image.marks
                for b in [m.boundingBox]
                for kind in {k for flag, k in flags.items() if getattr(m, flag)}
            } or {(None, "")}
            if clear and not image.marks:
                normal.add((client.id, image.id))
    assert len(theirs) == 11 and ours == theirs
    assert normal == {
        (f.patient_id, Path(f.image_path).stem) for f in findings if f.pathology == "normal"
    }


def test_omidb_pathology_follows_from_the_linked_lesion(tmp_path):
    findings, _ = read("omidb", omidb_tree(tmp_path))
    found = {(f.patient_id, f.finding, f.pathology) for f in findings if f.finding}
    assert found == {
        ("demd1", "mass", "malignant"),
        ("demd2", "mass", "benign"),  # a mass with calcification is two rows, Q24
        ("demd2", "calcification", "benign"),
        ("optm7", "asymmetry", "malignant"),  # lesion 1 benign, lesion 2 malignant
        ("optm8", "mass", "malignant"),
    }


@pytest.mark.parametrize(
    ("episode", "lesion", "expected"),
    [
        # surgery decides before biopsy, biopsy before an opinion without tissue
        ({"SURGERY": event("", l1="H2"), "BIOPSYWIDE": event("", l1="B5")}, "1", "benign"),
        ({"BIOPSYFINE": event("", l1="C5"), "ASSESSMENT": event("OB")}, "1", "malignant"),
        ({"ASSESSMENT": event("OM")}, "1", "malignant"),
        # opinions in words, which the package reads too
        ({"SURGERY": event("Malignant")}, "1", "malignant"),
        # of another lesion, of the other side, undecided, none
        (lesions("1", "2") | {"SURGERY": event("OM", l2="H5")}, "1", ""),
        (lesions("1", "2") | {"SURGERY": event("OB", l2="H2")}, "1", "benign"),
        ({"SURGERY": event("OM", side="R", l1="H5")}, "1", ""),
        ({"BIOPSYWIDE": event("OS", l1="B4")}, "1", ""),
        ({}, "1", ""),
        (lesions("1", "2") | {"SURGERY": event("", l1="H5")}, "01", "malignant"),
        # without a link the side decides, where it holds one lesion
        (lesions("1") | {"SURGERY": event("OM", l1="H5")}, None, "malignant"),
        (lesions("1", "2") | {"SURGERY": event("OM", l1="H5")}, "", ""),
    ],
)
def test_omidb_opinions_by_event_side_and_lesion_number(tmp_path, episode, lesion, expected):
    write_client(tmp_path, "demd1", {1: [mark(1, lesion)]}, {"EpisodeType": "F", **episode})
    (finding,), _ = read("omidb", tmp_path)
    assert finding.pathology == expected


def test_omidb_several_linked_lesions_are_benign_only_when_all_are(tmp_path):
    for n, opinions in enumerate([("H2", "H2"), ("H2", "H1"), ("H5", "H1")]):
        surgery = event("", l1=opinions[0], l2=opinions[1])
        write_client(
            tmp_path, f"demd{n}", {n: [mark(1, "1, 2")]}, lesions("1", "2") | {"SURGERY": surgery}
        )
    findings, _ = read("omidb", tmp_path)
    assert [f.pathology for f in findings] == ["benign", "", "malignant"]


def test_omidb_unmarked_images_are_normal_only_when_nothing_speaks_against_it(tmp_path):
    findings, notes = read("omidb", omidb_tree(tmp_path))
    unmarked = {(f.patient_id, f.pathology) for f in findings if not f.finding}
    assert unmarked == {
        ("demd1", "malignant"), ("optm3", "normal"), ("optm4", ""), ("optm5", ""), ("optm9", ""),
        ("optm6", "normal"),
    }  # fmt: skip
    assert count(notes, "not known to be normal") == 4


def test_omidb_client_with_an_interval_cancer_is_not_normal(tmp_path):
    """Whatever the type of its episode says."""
    write_client(tmp_path, "demd1", {1: None}, ROUTINE | {"INTERVALCANCER": {"L": {"1": {}}}})
    (finding,), notes = read("omidb", tmp_path)
    assert finding.pathology == "" and count(notes, "not known to be normal") == 1


def test_omidb_text_in_place_of_a_view_stays_in_the_header(tmp_path):
    write_client(tmp_path, "demd1", {1: None}, ROUTINE)
    (path,) = tmp_path.glob("images/*/*/*.dcm")
    write_dicom(path, photograph(), "L", "JANE DOE")
    assert read("omidb", tmp_path)[0][0].view == ""


def test_omidb_client_without_an_episode_is_not_normal(tmp_path):
    write_client(tmp_path, "demd1", {1: None}, None)
    (finding,), notes = read("omidb", tmp_path)
    assert finding.pathology == "" and count(notes, "without an NBSS episode") == 1


def test_omidb_study_of_an_unknown_episode_is_linked_by_date(tmp_path):
    surgery = {"SURGERY": event("OM", l1="H5")}
    write_client(tmp_path, "demd1", {1: [mark(1)]}, ROUTINE | surgery, linked="E7")
    write_client(tmp_path, "demd2", {2: [mark(1)]}, surgery, linked="E7")  # another date
    findings, notes = read("omidb", tmp_path)
    assert [f.pathology for f in findings] == ["malignant", ""]
    assert count(notes, "linked by date") == 1 and count(notes, "without an NBSS episode") == 1


def test_omidb_side_is_the_header_s_and_the_right_one_has_its_own_opinions(tmp_path):
    episode = {"SURGERY": event("OM", l1="H5") | event("OB", side="R", l1="H2")}
    write_client(tmp_path, "demd1", {1: [mark(1)]}, episode, sides="R")
    write_client(tmp_path, "demd2", {2: [mark(1)]}, episode, sides="")
    (finding,), notes = read("omidb", tmp_path)
    assert (finding.laterality, finding.view, finding.pathology) == ("R", "MLO", "benign")
    assert count(notes, "tells no side") == 1


def test_omidb_boxes_are_sorted_clipped_and_joined_and_each_is_reported(tmp_path):
    marks = [
        mark(1, box=(25, 30, 5, 10)),
        mark(2, box=(-3, 10, 99, 30)),
        mark(3, box=(100, 10, 120, 30)),
        mark(4, box=(5, 10, 25, 30)),  # the first one again
        mark(5, box=("", None, 1, 2), SuspiciousCalcifications=1, Mass=0),
        mark(6, box=(1, 1, 2, 2), Mass="", Skin="1"),
    ]
    write_client(tmp_path, "demd1", {1: marks}, {"SURGERY": event("OM")})
    findings, notes = read("omidb", tmp_path)
    assert [(f.finding, f.bbox) for f in findings] == [
        ("mass", (10, 5, 30, 25)),
        ("mass", (10, 0, 30, 40)),
        ("mass", None),
        ("calcification", None),
        ("", (1, 1, 2, 2)),
    ]
    assert findings[-1].pathology == ""
    for words in ("another order", "clipped", "outside their image or", "joined", "four corners"):
        assert count(notes, words) == 1, words


def test_omidb_boxes_keep_their_origin_and_no_image_is_decoded(tmp_path, monkeypatch):
    """From the top left; `prepare`, which decodes each image anyway, reports flipped ones."""
    monkeypatch.delattr("support.sources.omidb.read_mammogram", raising=False)
    write_client(tmp_path, "demd1", {1: [mark(1, box=(5, 40, 25, 50))]}, ROUTINE)
    findings, _ = read("omidb", tmp_path)
    assert findings[0].bbox == (40, 5, 50, 25)


def test_omidb_absent_image_is_left_out_and_counted(tmp_path):
    write_client(tmp_path, "demd1", {1: None, 2: None}, ROUTINE)
    (tmp_path / "images" / "demd1" / STUDY / f"{image_uid(1)}.dcm").unlink()
    findings, notes = read("omidb", tmp_path)
    assert len(findings) == 1 and count(notes, "does not hold") == 1


def test_omidb_identifiers_that_are_paths_are_never_followed(tmp_path):
    root = tmp_path / "omidb"
    write_client(root, "demd1", {1: None}, ROUTINE)
    write_dicom(tmp_path / "outside.dcm", photograph())
    path = root / "data" / "demd1" / "imagedb_demd1.json"
    imagedb = json.loads(path.read_text())
    imagedb["STUDIES"][STUDY][SERIES]["../../../../outside"] = None
    imagedb["STUDIES"]["../../.."] = {SERIES: {"outside": None}}
    path.write_text(json.dumps(imagedb))
    assert len(read("omidb", root)[0]) == 1


@pytest.mark.parametrize("kind", ["imagedb", "nbss"])
@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_omidb_damaged_or_missing_json_is_one_clear_error(tmp_path, kind, text):
    write_client(tmp_path, "demd1", {1: None}, ROUTINE)
    path = tmp_path / "data" / "demd1" / f"{kind}_demd1.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ValueError, match=path.name):
        READERS["omidb"](tmp_path, False)


# --- CBIS-DDSM ---


def cbis_case(
    root: Path,
    *,
    kind: str = "mass",
    part: str = "train",
    patient: str = "P_00001",
    number: int = 1,
    pathology: str = "MALIGNANT",
    film: np.ndarray | None = None,
    mask_box: tuple[int, int, int, int] | None = (10, 5, 30, 25),
    mask_shape: tuple[int, int] = SHAPE,
    names: tuple[str, str] = ("1-1.dcm", "1-2.dcm"),  # of the crop and of the mask
) -> dict:
    """One abnormality in The Cancer Imaging Archive's tree; returns its row of the case table."""
    part_name = {"train": "Training", "test": "Test"}[part]
    case = f"{'Mass' if kind == 'mass' else 'Calc'}-{part_name}_{patient}_LEFT_CC"
    uids = [f"1.3.6.1.4.{sum(map(ord, case))}.{n}" for n in (1, 2, 10 * number, 10 * number + 1)]
    tree = root / "CBIS-DDSM"
    path = tree / case / uids[0] / uids[1] / "1-1.dcm"
    if not path.exists():
        write_dicom(path, photograph(int(patient[2:])) if film is None else film)
    regions = tree / f"{case}_{number}" / uids[2] / uids[3]
    write_dicom(regions / names[0], photograph(9, (20, 20)))
    if mask_box:
        mask = np.zeros(mask_shape, dtype=np.uint8)
        mask[mask_box[0] : mask_box[2], mask_box[1] : mask_box[3]] = 255
        write_dicom(regions / names[1], mask)
    return {
        "patient_id": patient,
        "breast_density" if kind == "mass" else "breast density": "3",
        "left or right breast": "LEFT",
        "image view": "CC",
        "abnormality id": str(number),
        "abnormality type": "mass" if kind == "mass" else "calcification",
        "mass shape" if kind == "mass" else "calc type": "made up",
        "assessment": "4",
        "pathology": f"{pathology} ",
        "subtlety": "4",
        # as published: with newlines in the fields, and names of an older tree
        "image file path": f"{case}\n/{uids[0]}/{uids[1]}\n/000000.dcm",
        "cropped image file path": f"{case}_{number}/{uids[2]}/{uids[3]}/000000.dcm",
        "ROI mask file path": f"{case}_{number}/{uids[2]}/{uids[3]}/000001.dcm\n",
    }


def cbis_tables(root: Path, kind: str = "mass", part: str = "train", rows: list | None = None):
    write_csv(root / f"{kind}_case_description_{part}_set.csv", rows)


def test_cbis_four_tables_with_their_own_columns_and_embedded_newlines(tmp_path):
    for n, kind in enumerate(("mass", "calc")):
        for part in ("train", "test"):
            patient = f"P_{n * 2 + (part == 'test'):05d}"
            row = cbis_case(tmp_path, kind=kind, part=part, patient=patient)
            cbis_tables(tmp_path, kind, part, [row])
    findings, notes = read("cbis-ddsm", tmp_path)
    assert [f.density for f in findings] == ["c"] * 4
    assert {(f.patient_id, f.finding, f.split, f.bbox, f.laterality, f.view) for f in findings} == {
        (f"P_{2 * n + test:05d}", kind, split, (10, 5, 30, 25), "L", "CC")
        for n, kind in enumerate(("mass", "calcification"))
        for test, split in enumerate(("", "test"))  # validation comes from train by patient
    }
    assert count(notes, "tables that are absent") == 0 and count(notes, "does not hold") == 0


def test_cbis_benign_without_callback_is_benign(tmp_path):
    words = ("MALIGNANT", "BENIGN", "BENIGN_WITHOUT_CALLBACK")
    cbis_tables(
        tmp_path,
        rows=[
            cbis_case(tmp_path, patient=f"P_{n:05d}", pathology=word)
            for n, word in enumerate(words)
        ],
    )
    findings, notes = read("cbis-ddsm", tmp_path)
    assert [f.pathology for f in findings] == ["malignant", "benign", "benign"]
    assert count(notes, "tables that are absent") == 3


def test_cbis_several_abnormalities_of_an_image_keep_their_own_mask(tmp_path):
    boxes = [(10, 5, 30, 25), (40, 20, 50, 39)]
    rows = [cbis_case(tmp_path, number=n, mask_box=box) for n, box in enumerate(boxes, 1)]
    cbis_tables(tmp_path, rows=rows)
    findings, _ = read("cbis-ddsm", tmp_path)
    assert [f.bbox for f in findings] == boxes
    assert len({f.image_path for f in findings}) == 1 and len({f.mask_path for f in findings}) == 2


@pytest.mark.parametrize("names", [("1-1.dcm", "1-2.dcm"), ("1-2.dcm", "1-1.dcm")])
def test_cbis_mask_and_crop_are_told_apart_by_values_not_by_name(tmp_path, names):
    cbis_tables(tmp_path, rows=[cbis_case(tmp_path, names=names)])
    (finding,), _ = read("cbis-ddsm", tmp_path)
    assert Path(finding.mask_path).name == names[1] and finding.bbox == (10, 5, 30, 25)


def test_cbis_crop_of_two_values_is_smaller_than_the_mask(tmp_path):
    cbis_tables(tmp_path, rows=[cbis_case(tmp_path)])
    (crop,) = tmp_path.glob("CBIS-DDSM/*_1/*/*/1-1.dcm")
    write_dicom(crop, np.eye(20, dtype=np.uint8))
    (finding,), _ = read("cbis-ddsm", tmp_path)
    assert Path(finding.mask_path).name == "1-2.dcm"


def test_cbis_mask_of_another_size_is_rescaled_and_reported(tmp_path):
    shape = (SHAPE[0] // 2, SHAPE[1] * 2)
    row = cbis_case(tmp_path, mask_shape=shape, mask_box=(5, 10, 15, 50))
    cbis_tables(tmp_path, rows=[row])
    (finding,), notes = read("cbis-ddsm", tmp_path)
    assert finding.bbox == (10, 5, 30, 25) and count(notes, "rescaled") == 1


def test_cbis_missing_masks_leave_only_a_label(tmp_path):
    rows = [
        cbis_case(tmp_path, number=n, mask_box=None, pathology=word)
        for n, word in enumerate(("BENIGN", "MALIGNANT"), 1)
    ]
    cbis_tables(tmp_path, rows=rows)
    (finding,), notes = read("cbis-ddsm", tmp_path)  # two rows without a box are one label
    assert (finding.bbox, finding.mask_path, finding.pathology) == (None, "", "malignant")
    assert count(notes, "without a readable mask") == 2 and count(notes, "joined") == 1


def test_cbis_damaged_mask_is_reported(tmp_path):
    cbis_tables(tmp_path, rows=[cbis_case(tmp_path)])
    (mask,) = tmp_path.glob("CBIS-DDSM/*_1/*/*/1-2.dcm")
    mask.write_bytes(mask.read_bytes()[:400])
    (finding,), notes = read("cbis-ddsm", tmp_path)
    assert finding.bbox is None and count(notes, "without a readable mask") == 1


def test_cbis_empty_mask_is_reported(tmp_path):
    cbis_tables(tmp_path, rows=[cbis_case(tmp_path, mask_box=(0, 0, 0, 0))])
    (finding,), notes = read("cbis-ddsm", tmp_path)
    assert finding.bbox is None and count(notes, "without a readable mask") == 1


def test_cbis_upper_case_names_and_what_other_systems_leave_in_folders(tmp_path):
    cbis_tables(tmp_path, rows=[cbis_case(tmp_path)])
    for path in list(tmp_path.rglob("*.dcm")):
        path.rename(path.with_suffix(".DCM"))
        path.with_name("._1-1.dcm").write_bytes(b"\0\5\x16\7" + bytes(100))
        path.with_name("z.dcm").write_bytes(b"")
    (finding,), _ = read("cbis-ddsm", tmp_path)
    assert finding.bbox == (10, 5, 30, 25) and finding.image_path.endswith("1-1.DCM")


def test_cbis_mask_of_too_many_pixels_is_not_decoded(tmp_path, monkeypatch):
    cbis_tables(tmp_path, rows=[cbis_case(tmp_path)])
    monkeypatch.setattr("support.mammogram.MAX_PIXELS", 1000)
    (finding,), notes = read("cbis-ddsm", tmp_path)
    assert finding.bbox is None and count(notes, "without a readable mask") == 1


def test_cbis_patient_in_train_and_test_is_test(tmp_path):
    for part in ("train", "test"):
        cbis_tables(tmp_path, part=part, rows=[cbis_case(tmp_path, part=part)])
    findings, notes = read("cbis-ddsm", tmp_path)
    assert {f.split for f in findings} == {"test"} and count(notes, "and in a test table") == 1


def test_cbis_film_distributed_as_mass_and_as_calcification_is_one_image(tmp_path):
    for kind in ("mass", "calc"):
        cbis_tables(tmp_path, kind, rows=[cbis_case(tmp_path, kind=kind)])
    findings, notes = read("cbis-ddsm", tmp_path)
    assert {f.finding for f in findings} == {"mass", "calcification"}
    assert len({f.image_path for f in findings}) == 1 and count(notes, "distributed twice") == 1


def test_cbis_folders_named_by_description_are_found_by_case(tmp_path):
    cbis_tables(tmp_path, rows=[cbis_case(tmp_path)])
    for n, series in enumerate(sorted(tmp_path.glob("CBIS-DDSM/*/*/*"))):
        series.rename(series.with_name(f"1.000000-full mammogram images-{n}"))
    (finding,), _ = read("cbis-ddsm", tmp_path)
    assert finding.bbox == (10, 5, 30, 25)
    assert "_1" not in Path(finding.image_path).relative_to(tmp_path).parts[1][-2:]


def test_cbis_series_of_the_same_name_belong_to_their_own_case(tmp_path):
    boxes = [(10, 5, 30, 25), (40, 20, 50, 39)]
    rows = [cbis_case(tmp_path, patient=f"P_{n:05d}", mask_box=boxes[n]) for n in range(2)]
    for row in rows:  # of the films, and of the masks
        for column in ("image file path", "ROI mask file path"):
            case, study, series, _ = row[column].replace("\n", "").split("/")
            folder = tmp_path / "CBIS-DDSM" / case / study
            (folder / series).rename(folder / "1.2.3.4")
            row[column] = row[column].replace(series, "1.2.3.4")
            row["cropped image file path"] = row["ROI mask file path"]
    cbis_tables(tmp_path, rows=rows)
    findings, _ = read("cbis-ddsm", tmp_path)
    assert [f.bbox for f in findings] == boxes
    assert all(f.patient_id in f.image_path and f.patient_id in f.mask_path for f in findings)


def test_cbis_table_that_is_there_twice_is_an_error(tmp_path):
    row = cbis_case(tmp_path)
    write_csv(tmp_path / "Mass_Case_Description_Train_Set.CSV", [row])  # upper case or not
    assert read("cbis-ddsm", tmp_path)[0]
    write_csv(tmp_path / "old" / "mass_case_description_train_set.csv", [row])
    with pytest.raises(ValueError, match="found 2 files named mass_case_description_train_set"):
        READERS["cbis-ddsm"](tmp_path, False)


@pytest.mark.parametrize("column", ["image file path", "ROI mask file path"])
@pytest.mark.parametrize("text", ["../secret/1-1.dcm", "/etc/1-1.dcm", "C:\\x\\1-1.dcm", ""])
def test_cbis_paths_never_leave_the_folder(tmp_path, column, text):
    root = tmp_path / "cbis"
    rows = [cbis_case(root), cbis_case(root, patient="P_00002") | {column: text}]
    cbis_tables(root, rows=rows)
    write_dicom(tmp_path / "secret" / "1-1.dcm", photograph())
    findings, notes = read("cbis-ddsm", root)
    assert [f.patient_id for f in findings] == ["P_00001"]
    assert count(notes, "leaves the data set's folder") == 1


@pytest.mark.parametrize(
    ("column", "text"), [("pathology", "PERHAPS"), ("left or right breast", "BOTH")]
)
def test_cbis_unknown_word_is_an_error_with_file_and_line(tmp_path, column, text):
    cbis_tables(tmp_path, rows=[cbis_case(tmp_path) | {column: text}])
    with pytest.raises(ValueError, match=f"mass_case_description_train_set.csv line .*{text}"):
        READERS["cbis-ddsm"](tmp_path, False)


def test_cbis_case_whose_images_are_absent_is_counted(tmp_path):
    gone = cbis_case(tmp_path / "elsewhere", patient="P_00002")
    cbis_tables(tmp_path / "cbis", rows=[cbis_case(tmp_path / "cbis"), gone])
    findings, notes = read("cbis-ddsm", tmp_path / "cbis")
    assert len(findings) == 1 and count(notes, "does not hold") == 1


# --- VinDr-Mammo ---


def vindr_row(root: Path, image: str = "i1", study: str = "s1", **changes: object) -> dict:
    write_dicom(root / "images" / study / f"{image}.dicom", photograph())
    return {
        "study_id": study, "series_id": "x", "image_id": image, "laterality": "L",
        "view_position": "CC", "height": SHAPE[0], "width": SHAPE[1],
        "breast_birads": "BI-RADS 4", "breast_density": "DENSITY C",
        "finding_categories": "['Mass']", "finding_birads": "BI-RADS 4", "xmin": 5.5, "ymin": 10.0,
        "xmax": 25.0, "ymax": 30.25, "split": "training",
    } | changes  # fmt: skip


CLEAR = {
    "finding_categories": "['No Finding']",
    "finding_birads": "",
    **dict.fromkeys(("xmin", "ymin", "xmax", "ymax"), ""),
}


def vindr(root: Path, *rows: dict, birads: bool = True):
    write_csv(root / "finding_annotations.csv", list(rows))
    return read("vindr", root, birads)


def test_vindr_box_split_and_patient(tmp_path):
    rows = [vindr_row(tmp_path), vindr_row(tmp_path, study="s2", split="test", laterality="R")]
    findings, _ = vindr(tmp_path, *rows)
    assert [f.density for f in findings] == ["c", "c"]
    assert [(f.patient_id, f.split, f.laterality, f.view) for f in findings] == [
        ("s1", "", "L", "CC"),
        ("s2", "test", "R", "CC"),
    ]
    assert findings[0].bbox == (10.0, 5.5, 30.25, 25.0) and findings[0].finding == "mass"


def test_density_that_a_data_set_does_not_know_is_unknown(tmp_path):
    findings, _ = vindr(tmp_path, vindr_row(tmp_path, breast_density="none given"))
    assert [f.density for f in findings] == [""]
    row = cbis_case(tmp_path / "c") | {"breast_density": "0"}  # as published, of a few
    cbis_tables(tmp_path / "c", rows=[row])
    assert [f.density for f in read("cbis-ddsm", tmp_path / "c")[0]] == [""]


def test_vindr_several_categories_of_a_box_are_several_findings(tmp_path):
    text = "['Suspicious Calcification', 'Mass', 'Skin Thickening']"
    findings, notes = vindr(tmp_path, vindr_row(tmp_path, finding_categories=text))
    assert [f.finding for f in findings] == ["calcification", "mass"]
    assert count(notes, "several types") == 1
    findings, notes = vindr(tmp_path, vindr_row(tmp_path, finding_categories="['Skin Thickening']"))
    assert [(f.finding, f.pathology) for f in findings] == [("", "")]
    assert count(notes, "no mass, calcification") == 1


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').remove('x')",
        "Mass",
        "",
        "[]",
        "[1]",
        "[" * 300 + "]" * 300,
        "[" + "'Mass'," * 99 + "]",
    ],
)
def test_vindr_categories_are_read_never_evaluated(tmp_path, text):
    with pytest.raises(ValueError, match="expected a list such as"):
        vindr(tmp_path, vindr_row(tmp_path, finding_categories=text))


def test_vindr_box_of_an_image_of_another_size_is_not_used_and_reported(tmp_path):
    """Images that somebody has resized: the table's boxes are in the pixels of the original."""
    row = vindr_row(tmp_path, height=2 * SHAPE[0], width=2 * SHAPE[1])
    (finding,), notes = vindr(tmp_path, row)
    assert (finding.finding, finding.bbox) == ("mass", None) and count(notes, "another size") == 1


def test_vindr_box_outside_the_image_is_clipped_and_reported(tmp_path):
    rows = [
        vindr_row(tmp_path, xmin=-3.0, ymax=99.0),
        vindr_row(tmp_path, image="i2", xmin=50, xmax=60),
    ]
    findings, notes = vindr(tmp_path, *rows)
    assert [f.bbox for f in findings] == [(10.0, 0.0, 60.0, 25.0), None]
    assert count(notes, "clipped") == 1 and count(notes, "outside their image or") == 1


@pytest.mark.parametrize(
    ("grade", "pathology"),
    [
        ("3", "benign"),
        ("2", "benign"),
        ("4", "malignant"),
        ("5", "malignant"),
        ("0", ""),
        ("1", ""),
    ],
)
def test_vindr_birads_stands_for_pathology_only_when_asked(tmp_path, grade, pathology):
    row = vindr_row(tmp_path, finding_birads=f"BI-RADS {grade}")
    (finding,), notes = vindr(tmp_path, row)
    assert finding.pathology == pathology and count(notes, "stand for malignant") == 1
    (finding,), notes = vindr(tmp_path, row, birads=False)
    assert finding.pathology == "" and count(notes, "no lesion patches without") == 1


def test_vindr_no_finding_is_normal_only_in_a_breast_of_birads_1(tmp_path):
    rows = [
        vindr_row(tmp_path, image=f"i{n}", breast_birads=f"BI-RADS {n}", **CLEAR) for n in (1, 2, 5)
    ]
    findings, notes = vindr(tmp_path, *rows)
    assert [f.pathology for f in findings] == ["normal", "benign", "malignant"]
    assert not any(f.finding or f.bbox for f in findings)
    assert count(notes, "not known to be normal") == 2
    findings, _ = vindr(tmp_path, *rows, birads=False)
    assert [f.pathology for f in findings] == ["normal", "", ""]


@pytest.mark.parametrize("study", ["..", "../..", "a/b", "a:b"])
def test_vindr_paths_never_leave_the_folder(tmp_path, study):
    rows = [vindr_row(tmp_path / "v"), vindr_row(tmp_path / "v", image="i2") | {"study_id": study}]
    write_dicom(tmp_path / "v" / "i2.dicom", photograph())
    findings, notes = vindr(tmp_path / "v", *rows)
    assert len(findings) == 1 and count(notes, "leaves the data set's folder") == 1


@pytest.mark.parametrize("change", [{"xmin": "x"}, {"ymax": "nan"}, {"height": ""}, {"split": "?"}])
def test_vindr_damaged_row_is_an_error_with_file_and_line(tmp_path, change):
    with pytest.raises(ValueError, match=r"finding_annotations\.csv line 2: found"):
        vindr(tmp_path, vindr_row(tmp_path, **change))


# --- INbreast ---


def inbreast_image(root: Path, name: str, rois: list[tuple[str, list]] | None = None, **row: str):
    """One image in AllDICOMs and AllXML; returns its row. `rois` are (name, points x, y)."""
    write_dicom(root / "AllDICOMs" / f"{name}_6c613a14b80a8591_MG_R_CC_ANON.dcm", photograph())
    if rois is not None:
        path = root / "AllXML" / f"{name}.xml"
        path.parent.mkdir(exist_ok=True)
        document = {
            "Images": [
                {
                    "ImageIndex": 0,
                    "NumberOfROIs": len(rois),
                    "ROIs": [
                        {
                            "Name": kind,
                            "NumberOfPoints": len(points),
                            "Point_mm": [f"({x}, {y}, 0.000000)" for x, y in points],
                            "Point_px": [f"({x:.6f}, {y:.6f})" for x, y in points],
                        }
                        for kind, points in rois
                    ],
                }
            ]
        }
        path.write_bytes(plistlib.dumps(document))
    return {
        "Patient ID": "removed", "Patient age": "removed", "Laterality": "R", "View": "CC",
        "Acquisition date": "201001", "File Name": name, "ACR": "4", "Bi-Rads": "4a",
    } | row  # fmt: skip


def inbreast(root: Path, *rows: dict, birads: bool = True):
    write_csv(root / "INbreast.csv", list(rows), delimiter=";")
    return read("inbreast", root, birads)


SQUARE = [(5.2, 10.7), (24.9, 10.7), (24.9, 29.1), (5.2, 29.1)]


def test_inbreast_semicolons_patient_from_the_file_name_and_points_as_x_y(tmp_path):
    row = inbreast_image(tmp_path, "20586908", [("Mass", SQUARE)])
    (finding,), _ = inbreast(tmp_path, row, dict.fromkeys(row, ""))  # it ends in empty rows
    assert finding.patient_id == "6c613a14b80a8591" and finding.finding == "mass"
    assert finding.bbox == (10, 5, 30, 25) and (finding.laterality, finding.view) == ("R", "CC")


def test_inbreast_single_point_is_a_single_calcification(tmp_path):
    rois = [("Calcification", [(7.5, 9.5)]), ("Point 2", [(8.5, 9.5)]), ("Point 2", [(8.6, 9.6)])]
    findings, notes = inbreast(tmp_path, inbreast_image(tmp_path, "1", rois))
    assert [(f.finding, f.bbox) for f in findings] == [
        ("calcification", (9, 7, 10, 8)),
        ("calcification", (9, 8, 10, 9)),
    ]
    assert count(notes, "joined") == 1  # two grains in one pixel


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Mass", "mass"), ("Calcifications", "calcification"), ("Cluster", "calcification"),
        ("Distortion", "distortion"), ("Espiculated Region ", "distortion"),
        ("Assymetry", "asymmetry"), ("Unnamed", ""),
    ],
)  # fmt: skip
def test_inbreast_names_with_the_spellings_that_occur(tmp_path, name, kind):
    (finding,), notes = inbreast(tmp_path, inbreast_image(tmp_path, "1", [(name, SQUARE)]))
    assert finding.finding == kind and finding.pathology == ("malignant" if kind else "")
    assert count(notes, "no mass, calcification") == (not kind)


@pytest.mark.parametrize(
    ("grade", "pathology"),
    [("2", "benign"), ("3", "benign"), ("4a", "malignant"), ("4b", "malignant"),
     ("4c", "malignant"), ("5", "malignant"), ("6", "malignant"), ("0", ""), ("", "")],
)  # fmt: skip
def test_inbreast_birads_with_4a_to_4c_only_when_asked(tmp_path, grade, pathology):
    row = inbreast_image(tmp_path, "1", [("Mass", SQUARE)], **{"Bi-Rads": grade})
    (finding,), notes = inbreast(tmp_path, row)
    assert finding.pathology == pathology and count(notes, "stand for malignant") == 1
    (finding,), notes = inbreast(tmp_path, row, birads=False)
    assert finding.pathology == "" and count(notes, "no lesion patches without") == 1


def test_inbreast_image_without_contours_is_normal_only_with_birads_1(tmp_path):
    rows = [
        inbreast_image(tmp_path, "1", **{"Bi-Rads": "1"}),
        inbreast_image(tmp_path, "2", [], **{"Bi-Rads": "2"}),
    ]
    findings, notes = inbreast(tmp_path, *rows)
    assert [(f.finding, f.pathology) for f in findings] == [("", "normal"), ("", "benign")]
    assert count(notes, "not known to be normal") == 1


def test_inbreast_without_its_contours_is_an_error_not_a_set_without_lesions(tmp_path):
    row = inbreast_image(tmp_path, "1", [("Mass", SQUARE)])
    (tmp_path / "AllXML" / "1.xml").rename(tmp_path / "AllXML" / "1.XML")
    (tmp_path / "AllXML").rename(tmp_path / "ALLXML")
    (finding,), _ = inbreast(tmp_path, row)  # upper case is no other name
    assert finding.finding == "mass"
    (tmp_path / "ALLXML").rename(tmp_path / "contours")
    with pytest.raises(ValueError, match=r"found no \.xml in a folder AllXML"):
        inbreast(tmp_path, row)


def test_inbreast_contour_outside_its_image_is_clipped(tmp_path):
    rois = [("Mass", [(-4.0, 2.0), (99.0, 8.5)])]
    (finding,), notes = inbreast(tmp_path, inbreast_image(tmp_path, "1", rois))
    assert finding.bbox == (2, 0, 9, 40) and count(notes, "clipped") == 1


def test_inbreast_without_its_csv_says_how_to_save_it(tmp_path):
    inbreast_image(tmp_path, "1", [("Mass", SQUARE)])
    (tmp_path / "INbreast.xls").write_bytes(b"\xd0\xcf\x11\xe0")
    with pytest.raises(ValueError, match=r"save INbreast\.xls as CSV with ';'"):
        READERS["inbreast"](tmp_path, True)


XML_BOMB = """<?xml version="1.0"?><!DOCTYPE plist [<!ENTITY a "aaaa"><!ENTITY b SYSTEM "file:///x">]>
<plist version="1.0"><dict><key>Images</key><string>&a;&b;</string></dict></plist>"""


@pytest.mark.parametrize(
    "text",
    ["", "<plist>", "<html></html>", XML_BOMB, "<plist><dict/></plist>",
     "<plist><dict><key>Images</key><array><dict><key>ROIs</key><array><dict><key>Name</key>"
     "<string>Mass</string><key>Point_px</key><array><string>(nan, 1)</string></array></dict>"
     "</array></dict></array></dict></plist>"],
)  # fmt: skip
def test_inbreast_damaged_contours_are_one_clear_error(tmp_path, text):
    row = inbreast_image(tmp_path, "1", [])
    (tmp_path / "AllXML" / "1.xml").write_text(text)
    with pytest.raises(ValueError, match=r"1\.xml: damaged .*expected OsiriX regions"):
        inbreast(tmp_path, row)


# --- mini-MIAS ---

MIAS_HEADER = """INFORMATION:
1st column: MIAS database reference number.
7th column: approximate radius (in pixels) of a circle enclosing the abnormality.

"""


def mias(root: Path, *lines: str):
    """Each line ends in blanks, as in the distributed Info.txt."""
    (root / "Info.txt").write_text(MIAS_HEADER + "".join(f"{line} \n" for line in lines))
    for name in {line[:6] for line in lines}:
        Image.fromarray(np.zeros((1024, 1024), dtype=np.uint8)).save(root / f"{name}.pgm")
    return read("mini-mias", root)


def test_mias_y_is_counted_from_the_bottom(tmp_path):
    (finding,), _ = mias(tmp_path, "mdb001 G CIRC B 535 425 197")
    assert finding.bbox == (1024 - 425 - 197, 535 - 197, 1024 - 425 + 197, 535 + 197)
    assert (finding.finding, finding.pathology, finding.view) == ("mass", "benign", "MLO")
    assert finding.spacing_mm == (0.2, 0.2)


def test_mias_several_rows_of_an_image(tmp_path):
    findings, _ = mias(tmp_path, "mdb005 F CIRC B 477 133 30", "mdb005 F CIRC B 500 168 26")
    assert len(findings) == 2 and len({f.image_path for f in findings}) == 1


def test_mias_rows_without_coordinates_label_the_image(tmp_path):
    lines = ("mdb059 F CIRC B *NOTE 3*", "mdb216 D CALC M *NOTE 3*", "mdb245 F CALC M")
    findings, notes = mias(tmp_path, *lines)
    assert [(f.finding, f.pathology, f.bbox) for f in findings] == [
        ("mass", "benign", None),
        ("calcification", "malignant", None),
        ("calcification", "malignant", None),
    ]
    assert count(notes, "without coordinates") == 3


def test_mias_odd_numbers_are_right_and_two_numbers_are_one_patient(tmp_path):
    findings, _ = mias(tmp_path, *(f"mdb{n:03d} D NORM" for n in (1, 2, 3, 322)))
    assert [(f.laterality, f.patient_id) for f in findings] == [
        ("R", "mias001"),
        ("L", "mias001"),
        ("R", "mias002"),
        ("L", "mias161"),
    ]
    assert {(f.finding, f.pathology, f.bbox) for f in findings} == {("", "normal", None)}


@pytest.mark.parametrize(
    ("word", "kind"),
    [("CALC", "calcification"), ("CIRC", "mass"), ("SPIC", "mass"), ("MISC", "mass"),
     ("ARCH", "distortion"), ("ASYM", "asymmetry")],
)  # fmt: skip
def test_mias_types(tmp_path, word, kind):
    (finding,), _ = mias(tmp_path, f"mdb010 G {word} M 500 500 20")
    assert (finding.finding, finding.pathology) == (kind, "malignant")


def test_mias_circle_that_leaves_the_image_is_clipped(tmp_path):
    (finding,), notes = mias(tmp_path, "mdb058 D MISC M 10 1000 100")
    assert finding.bbox == (0, 0, 124, 110) and count(notes, "clipped") == 1


@pytest.mark.parametrize(
    "line",
    ["mdb001 G CIRC 535 425 197", "mdb001 G WHAT B 1 2 3", "mdb001 G NORM B 1 2 3", "mdb001 G",
     "mdb001 G CIRC B 535 425", "mdb001 G CIRC B 535 425 -1", "MDB001 G NORM"],
)  # fmt: skip
def test_mias_damaged_row_is_an_error_with_file_and_line(tmp_path, line):
    with pytest.raises(ValueError, match=r"Info\.txt line 5: found '(mdb|MDB)001"):
        mias(tmp_path, line)


def test_mias_blanks_and_windows_line_ends_lose_no_row(tmp_path):
    mias(tmp_path, "mdb001 D NORM", "mdb002 D NORM")
    (tmp_path / "Info.txt").write_bytes(b"  mdb001 D NORM \r\n\tmdb002 G CIRC B 522 280 69\r\n")
    findings, _ = read("mini-mias", tmp_path)
    assert [f.bbox for f in findings] == [None, (675, 453, 813, 591)]


def test_mias_image_of_another_size_is_an_error(tmp_path):
    """Its circles, and its spacing, would be those of other pixels."""
    mias(tmp_path, "mdb001 G CIRC B 135 825 10")
    Image.fromarray(np.zeros((512, 512), dtype=np.uint8)).save(tmp_path / "mdb001.pgm")
    image_size.cache_clear()
    with pytest.raises(ValueError, match=r"mdb001\.pgm: found \(512, 512\) pixels; expected mini"):
        READERS["mini-mias"](tmp_path, False)


# --- EMBED ---

EMBED_CLINICAL = {
    "empi_anon": "11", "acc_anon": "501", "desc": "MG Screen Bilat", "numfind": "1", "side": "L",
    "asses": "A", "massshape": "", "massmargin": "", "massdens": "", "calcfind": "",
    "calcdistri": "", "calcnumber": "0", "bside": "", "path_severity": "",
}  # fmt: skip
MASS = {"massshape": "X", "path_severity": "0.0", "asses": "S"}
NEGATIVE = {"asses": "N", "side": ""}


def embed_image(root: Path, number: int = 1, **changes: object) -> dict:
    """A row of the metadata and its file, whose path there is that of another disk."""
    patient, exam = changes.get("empi_anon", "11"), changes.get("acc_anon", "501")
    place = f"cohort_1/{str(patient).split('.')[0]}/1.2.3.{exam}/1.2.4/1.2.826.{number}.dcm"
    write_dicom(root / "images" / place, photograph(number))
    return {
        "empi_anon": "11", "acc_anon": "501", "anon_dicom_path": f"/mnt/NAS3/anon_dicom/{place}",
        "FinalImageType": "2D", "ImageLateralityFinal": "L", "ViewPosition": "CC",
        "spot_mag": "", "num_roi": "1", "ROI_coords": "((10, 5, 30, 25),)", "match_level": "[1]",
    } | changes  # fmt: skip


def embed(root: Path, metadata: list[dict], clinical: list[dict]):
    rows = [EMBED_CLINICAL | row for row in clinical]
    write_csv(root / "tables" / "EMBED_OpenData_clinical.csv", rows)
    write_csv(root / "tables" / "EMBED_OpenData_metadata.csv", metadata)
    return read("embed", root)


def test_embed_box_type_and_pathology_of_the_only_finding(tmp_path):
    (finding,), notes = embed(tmp_path, [embed_image(tmp_path)], [MASS])
    assert (finding.finding, finding.pathology, finding.bbox) == (
        *("mass", "malignant"),
        (10, 5, 30, 25),
    )
    assert (finding.patient_id, finding.laterality, finding.view) == ("11", "L", "CC")
    assert not notes


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("((10, 5, 30, 25), (40, 6, 50, 20))", [(10, 5, 30, 25), (40, 6, 50, 20)]),
        ("(([10, 5, 30, 25], [40, 6, 50, 20]),)", [(10, 5, 30, 25), (40, 6, 50, 20)]),
        ("[[[10, 5, 30, 25]]]", [(10, 5, 30, 25)]),
        ("[(10.5, 5.0, 30.25, 25.0)]", [(10.5, 5, 30.25, 25)]),
        ("((30, 25, 10, 5),)", [(10, 5, 30, 25)]),
        ("((-3, 5, 30, 99),)", [(0, 5, 30, 40)]),
        ("((10, 5, 10, 25),)", [None]),
    ],
)
def test_embed_boxes_are_text_of_nested_lists(tmp_path, text, boxes):
    findings, _ = embed(tmp_path, [embed_image(tmp_path, ROI_coords=text)], [MASS])
    assert [f.bbox for f in findings] == boxes and {f.finding for f in findings} == {"mass"}


def test_embed_boxes_in_dicom_pixels_come_first(tmp_path):
    """Newer tables give boxes twice: in PNG files, some of them mirrored, and in the DICOM ones."""
    row = embed_image(tmp_path, DCM_ROI_coords="[[[1, 2, 9, 8]]]")
    (finding,), _ = embed(tmp_path, [row], [MASS])
    assert finding.bbox == (1, 2, 9, 8)


@pytest.mark.parametrize(
    "text",
    ["((10, 5, 30),)", "__import__('os').remove('x')", "((10, 5, 30, x),)", "(1e3, 2, 3, 4)"],
)
def test_embed_damaged_boxes_cost_their_image_alone_and_are_never_evaluated(tmp_path, capsys, text):
    rows = [embed_image(tmp_path), embed_image(tmp_path, 2, ROI_coords=text)]
    findings, notes = embed(tmp_path, rows, [MASS])
    assert [Path(f.image_path).stem for f in findings] == ["1.2.826.1"]
    assert count(notes, "Damaged") == 1
    assert "EMBED_OpenData_metadata.csv line 3: found" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["()", "", "[]", "nan"])
def test_embed_image_without_box_is_normal_only_when_its_side_is_negative(tmp_path, text):
    """BI-RADS 2 has a benign finding somewhere, and nobody marked it."""
    clinical = [
        NEGATIVE | {"acc_anon": "1"},
        {"asses": "B", "acc_anon": "2"},
        {"asses": "A", "acc_anon": "3", "side": "L"}, NEGATIVE | {"acc_anon": "3", "side": "R"},
        NEGATIVE | {"acc_anon": "4", "massshape": "S"},
        NEGATIVE | {"acc_anon": "5", "side": "B"}, MASS | {"acc_anon": "5", "side": "R"},
        MASS | {"acc_anon": "6", "side": "B"},
    ]  # fmt: skip
    rows = [
        embed_image(
            tmp_path, 10 * n + (side == "R"), acc_anon=str(n), ImageLateralityFinal=side,
            ROI_coords=text,
        )
        for n in range(1, 8)
        for side in "LR"
    ]  # fmt: skip
    findings, notes = embed(tmp_path, rows, clinical)
    found = {Path(f.image_path).stem.split(".")[-1]: f.pathology for f in findings}
    assert found == {
        "10": "normal", "11": "normal", "20": "", "21": "", "30": "", "31": "normal", "40": "",
        "41": "", "50": "normal", "51": "malignant", "60": "malignant", "61": "malignant",
        "70": "", "71": "",
    }  # fmt: skip
    assert count(notes, "not known to be normal") == 10


@pytest.mark.parametrize(
    ("severity", "pathology"),
    [
        ("0", "malignant"), ("1.0", "malignant"), ("2.0", "benign"), ("3", "benign"),
        ("4.0", "benign"), ("5", "benign"), ("6.0", ""), ("", ""),
    ],
)  # fmt: skip
def test_embed_path_severity(tmp_path, severity, pathology):
    """6 is cancer of another organ; without a specimen nobody knows."""
    row = MASS | {"path_severity": severity}
    (finding,), _ = embed(tmp_path, [embed_image(tmp_path)], [row])
    assert (finding.finding, finding.pathology) == ("mass", pathology)


@pytest.mark.parametrize(
    ("described", "kinds"),
    [
        ({"massshape": "O"}, ["mass"]),
        ({"massshape": "N"}, ["mass"]),  # a lymph node, as its authors count it
        ({"massmargin": "S"}, ["mass"]),
        ({"massdens": "="}, ["mass"]),
        ({"massshape": "F"}, ["asymmetry"]),
        ({"massshape": "A", "massmargin": "S"}, ["distortion"]),
        ({"calcfind": "A"}, ["calcification"]),
        ({"calcdistri": "G", "massshape": "R"}, ["calcification", "mass"]),
        ({"calcnumber": "3"}, ["calcification"]),
        ({"calcnumber": "0.0"}, [""]),
        ({"massshape": "?"}, [""]),
    ],
)
def test_embed_descriptors_tell_the_type(tmp_path, described, kinds):
    row = {"path_severity": "4", "asses": "S"} | described
    findings, _ = embed(tmp_path, [embed_image(tmp_path)], [row])
    assert [f.finding for f in findings] == kinds


def test_embed_box_takes_what_all_findings_of_its_side_agree_on(tmp_path):
    """No table says which finding a box is of."""
    benign = MASS | {"path_severity": "4", "numfind": "2"}
    clinical = [
        *(MASS | {"acc_anon": "1"}, MASS | {"acc_anon": "1", "numfind": "2"}),
        *(MASS | {"acc_anon": "2"}, benign | {"acc_anon": "2"}),
        *(MASS | {"acc_anon": "3"}, benign | {"acc_anon": "3", "side": "R"}),
        *(MASS | {"acc_anon": "4"}, NEGATIVE | {"acc_anon": "4", "side": "L"}),
        MASS | {"acc_anon": "5", "side": "R"},
    ]
    rows = [embed_image(tmp_path, n, acc_anon=str(n)) for n in range(1, 6)]
    findings, notes = embed(tmp_path, rows, clinical)
    assert [(f.finding, f.pathology) for f in findings] == [
        ("mass", "malignant"),
        ("", ""),
        ("mass", "malignant"),
        ("mass", "malignant"),
        ("", ""),  # a box on the left, findings on the right alone
    ]
    assert all(f.bbox for f in findings)  # their regions give no normal patches
    assert count(notes, "findings that differ") == 1


def test_embed_pathology_of_the_other_side_is_not_that_of_the_finding(tmp_path):
    rows = [embed_image(tmp_path), embed_image(tmp_path, 2, ImageLateralityFinal="R")]
    clinical = [MASS | {"side": "B", "bside": "L"}]
    findings, notes = embed(tmp_path, rows, clinical)
    assert [(f.laterality, f.pathology) for f in findings] == [("L", "malignant"), ("R", "")]
    assert count(notes, "of the other side") == 1


def test_embed_c_views_are_read_and_other_images_left_out(tmp_path):
    rows = [
        embed_image(tmp_path, 1, FinalImageType="cview"),
        embed_image(tmp_path, 2, FinalImageType="3D"),
        embed_image(tmp_path, 3, FinalImageType="ROI_SSC"),
        embed_image(tmp_path, 4, spot_mag="1.0"),
        embed_image(tmp_path, 5, spot_mag="0"),
    ]
    findings, notes = embed(tmp_path, rows, [MASS])
    assert [Path(f.image_path).stem[-1] for f in findings] == ["1", "5"]
    assert count(notes, "no full view in 2D or C-view") == 3


def test_embed_ids_that_a_program_made_floats_of_are_joined(tmp_path):
    row = embed_image(tmp_path, empi_anon="11.0", acc_anon="501.0")
    (finding,), _ = embed(tmp_path, [row], [MASS])
    assert (finding.patient_id, finding.pathology) == ("11", "malignant")


def test_embed_images_are_counted_once_and_never_looked_for_outside(tmp_path):
    gone = embed_image(tmp_path / "e", 2)
    next((tmp_path / "e").glob("**/1.2.826.2.dcm")).unlink()
    outside = [
        gone | {"anon_dicom_path": text}
        for text in ("/etc/passwd", "cohort_1/../../x.dcm", "C:\\cohort", "")
    ]
    write_dicom(tmp_path / "x.dcm", photograph())
    rows = [embed_image(tmp_path / "e"), gone, gone, *outside]
    findings, notes = embed(tmp_path / "e", rows, [MASS])
    assert len(findings) == 1 and count(notes, "does not hold") == 1
    assert count(notes, "leaves the data set's folder") >= 1


def test_embed_folders_of_cohorts_beside_the_tables(tmp_path):
    row = embed_image(tmp_path)
    (tmp_path / "images" / "cohort_1").rename(tmp_path / "cohort_1")
    (tmp_path / "images").rmdir()
    assert len(embed(tmp_path, [row], [MASS])[0]) == 1


# --- RSNA ---


def rsna_row(root: Path, number: int, **changes: object) -> dict:
    row = {
        "site_id": 1, "patient_id": 10006, "image_id": number, "laterality": "L", "view": "CC",
        "age": 61.0, "cancer": 0, "biopsy": 0, "invasive": 0, "BIRADS": "", "implant": 0,
        "density": "", "machine_id": 29, "difficult_negative_case": False,
    } | changes  # fmt: skip
    folder = root / "train_images" / str(row["patient_id"])
    write_dicom(folder / f"{row['image_id']}.dcm", photograph(number))
    return row


def rsna(root: Path, *rows: dict):
    write_csv(root / "train.csv", list(rows))
    return read("rsna", root)


def test_rsna_images_are_labelled_and_have_no_boxes(tmp_path):
    changes = [
        {}, {"BIRADS": "1.0"}, {"BIRADS": 2}, {"cancer": 1, "biopsy": 1, "BIRADS": "0.0"},
        {"biopsy": 1}, {"BIRADS": "0.0"}, {"implant": 1}, {"laterality": "R", "view": "MLO"},
        {"cancer": 1, "implant": 1},
    ]  # fmt: skip
    rows = [rsna_row(tmp_path, n, **change) for n, change in enumerate(changes)]
    findings, notes = rsna(tmp_path, *rows)
    assert [f.pathology for f in findings] == [
        *("normal", "normal", "normal", "malignant", "", "", "", "normal", "malignant")
    ]
    assert not any(f.finding or f.bbox or f.split for f in findings)
    assert (findings[7].laterality, findings[7].view, findings[7].patient_id) == (
        "R",
        "MLO",
        "10006",
    )
    assert count(notes, "not known to be normal") == 5


def test_rsna_absent_images_and_paths_that_lead_outside_are_counted(tmp_path):
    rows = [rsna_row(tmp_path / "r", 1), rsna_row(tmp_path / "r", 2), rsna_row(tmp_path / "r", 3)]
    (tmp_path / "r/train_images/10006/2.dcm").unlink()
    (tmp_path / "r/train_images/10006/2.dcm").symlink_to(tmp_path / "nowhere")
    write_dicom(tmp_path / "r/secret.dcm", photograph())
    findings, notes = rsna(
        tmp_path / "r", *rows, rows[2] | {"patient_id": "../", "image_id": "secret"}
    )
    assert len(findings) == 2
    assert count(notes, "does not hold") == 1 and count(notes, "leaves the data set's folder") == 1


@pytest.mark.parametrize("change", [{"laterality": "B"}, {"cancer": ""}, {"biopsy": "maybe"}])
def test_rsna_damaged_row_costs_its_image_alone(tmp_path, capsys, change):
    findings, notes = rsna(tmp_path, rsna_row(tmp_path, 1), rsna_row(tmp_path, 2, **change))
    assert [Path(f.image_path).stem for f in findings] == ["1"] and count(notes, "Damaged") == 1
    assert "train.csv line 3: found" in capsys.readouterr().err


def test_rsna_test_images_have_no_labels_and_are_not_read(tmp_path):
    rows = [rsna_row(tmp_path, 1)]
    write_csv(tmp_path / "test.csv", [{"patient_id": 1, "image_id": 2}])
    write_dicom(tmp_path / "test_images/1/2.dcm", photograph())
    assert len(rsna(tmp_path, *rows)[0]) == 1


# --- What is damaged costs itself ---


def test_a_damaged_row_of_a_table_costs_its_image(tmp_path, capsys):
    rows = [
        vindr_row(tmp_path, image="i1"),
        vindr_row(tmp_path, image="i2", split="?"),
        vindr_row(tmp_path, image="i2", xmin=7.5),  # another mark of the damaged one's image
        vindr_row(tmp_path, image="i3", finding_categories=""),
        vindr_row(tmp_path, image="i4", laterality="B"),
        vindr_row(tmp_path, image="i5", xmax=""),
        vindr_row(tmp_path, image="i6", height="nan"),
    ]
    findings, notes = vindr(tmp_path, *rows)
    assert {(Path(f.image_path).stem, f.bbox is None) for f in findings} == {
        ("i1", False),
        ("i5", True),  # its lesion lies somewhere: no normal patches
        ("i6", True),
    }
    assert count(notes, "Damaged parts of tables") == 5
    said = capsys.readouterr().err
    assert all(f"finding_annotations.csv line {n}: found" in said for n in (3, 5, 6, 7, 8))
    assert not any("line" in sentence for sentence in notes)  # which go into the patch set


def test_a_row_of_another_length_is_left_out(tmp_path, capsys):
    vindr(tmp_path, vindr_row(tmp_path, image="i1"), vindr_row(tmp_path, image="i2"))
    table = tmp_path / "finding_annotations.csv"
    table.write_text(table.read_text() + "s1,x,i1\n")
    findings, notes = read("vindr", tmp_path, True)
    assert len(findings) == 2 and count(notes, "Damaged") == 1
    assert "line 4 has 3 fields; expected 16" in capsys.readouterr().err


@pytest.mark.parametrize("points", [[], [(float("nan"), 1.0)], ["(3", "x)"], [(1.0,)]])
def test_inbreast_damaged_region_costs_its_box_alone(tmp_path, capsys, points):
    row = inbreast_image(tmp_path, "1", [("Mass", SQUARE), ("Mass", [(1, 2)])])
    path = tmp_path / "AllXML" / "1.xml"
    document = plistlib.loads(path.read_bytes())
    texts = [str(p) if isinstance(p, tuple) else p for p in points]
    document["Images"][0]["ROIs"][1]["Point_px"] = texts
    path.write_bytes(plistlib.dumps(document))
    findings, notes = inbreast(tmp_path, row)
    assert [(f.finding, f.bbox) for f in findings] == [("mass", (10, 5, 30, 25)), ("mass", None)]
    assert count(notes, "Damaged") == 1 and "1.xml: damaged (" in capsys.readouterr().err


def test_inbreast_damaged_contours_cost_their_image_alone(tmp_path):
    rows = [inbreast_image(tmp_path, "1", [("Mass", SQUARE)]), inbreast_image(tmp_path, "2", [])]
    (tmp_path / "AllXML" / "2.xml").write_text("<plist>")
    findings, notes = inbreast(tmp_path, *rows)
    assert len(findings) == 1 and count(notes, "Damaged") == 1  # and not a normal image


def test_mias_damaged_row_costs_its_image_alone(tmp_path):
    lines = ["mdb001 G CIRC B 535 425 197", "mdb002 G CIRC B 535", "mdb002 G CIRC B 477 133 30"]
    findings, notes = mias(tmp_path, *lines)
    assert [Path(f.image_path).stem for f in findings] == ["mdb001"]
    assert count(notes, "Damaged") == 1


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_omidb_damaged_client_costs_itself_alone(tmp_path, text):
    write_client(tmp_path, "demd1", {1: None}, ROUTINE)
    write_client(tmp_path, "demd2", {2: None}, ROUTINE)
    path = tmp_path / "data" / "demd2" / "nbss_demd2.json"
    path.unlink() if text is None else path.write_text(text)
    findings, notes = read("omidb", tmp_path)
    assert {f.patient_id for f in findings} == {"demd1"} and count(notes, "Damaged") == 1


def test_cbis_unknown_word_costs_its_image_alone(tmp_path):
    rows = [cbis_case(tmp_path), cbis_case(tmp_path, patient="P_00002", pathology="PERHAPS")]
    cbis_tables(tmp_path, rows=rows)
    findings, notes = read("cbis-ddsm", tmp_path)
    assert {f.patient_id for f in findings} == {"P_00001"} and count(notes, "Damaged") == 1


def test_a_link_that_leads_nowhere_is_an_absent_file(tmp_path):
    rows = [cbis_case(tmp_path), cbis_case(tmp_path, patient="P_00002")]
    cbis_tables(tmp_path, rows=rows)
    for path in tmp_path.glob("CBIS-DDSM/*P_00002*/*/*/*.dcm"):
        path.unlink()
        path.symlink_to(tmp_path / "nowhere")
    findings, notes = read("cbis-ddsm", tmp_path)
    assert len(findings) == 1 and count(notes, "does not hold") == 1


def test_absent_images_are_counted_once_whatever_number_of_rows_they_have(tmp_path):
    rows = [vindr_row(tmp_path, image="i1"), *(vindr_row(tmp_path, image="i2"),) * 3]
    (tmp_path / "images/s1/i2.dicom").unlink()
    assert count(vindr(tmp_path, *rows)[1], "does not hold") == 1
    cbis = [cbis_case(tmp_path / "x", number=n) for n in (1, 2)]
    cbis_tables(tmp_path / "cbis", rows=[*cbis, cbis_case(tmp_path / "cbis", patient="P_00002")])
    assert count(read("cbis-ddsm", tmp_path / "cbis")[1], "does not hold") == 1


# --- All of them ---


@pytest.mark.parametrize("name", READERS)
def test_folder_that_is_absent_or_of_another_data_set_is_one_clear_error(tmp_path, name):
    with pytest.raises(ValueError, match="expected the folder of the data set"):
        READERS[name](tmp_path / "absent", False)
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(ValueError, match=str(tmp_path)):
        READERS[name](tmp_path, False)


TABLES = {
    "cbis-ddsm": "mass_case_description_train_set.csv",
    "vindr": "finding_annotations.csv",
    "inbreast": "INbreast.csv",
    "rsna": "train.csv",
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("content", [b"", b"a,b;c\n1,2;3\n", b"\xff\xfe\x00a", b'"'])
def test_damaged_table_is_one_clear_error(tmp_path, name, content):
    (tmp_path / TABLES[name]).write_bytes(content)
    with pytest.raises(ValueError, match=TABLES[name]):
        READERS[name](tmp_path, False)


def test_tables_that_list_no_image_of_the_folder_are_an_error(tmp_path):
    (tmp_path / "Info.txt").write_text("mdb001 G NORM\n")
    with pytest.raises(ValueError, match="found no image that its tables list"):
        READERS["mini-mias"](tmp_path, False)


@pytest.mark.parametrize("name", ["omidb", "cbis-ddsm", "mini-mias"])
def test_birads_is_refused_where_pathology_exists(tmp_path, name):
    with pytest.raises(ValueError, match="--birads-as-pathology: this data set holds pathology"):
        READERS[name](tmp_path, True)


def test_linked_folders_are_read(tmp_path):
    store, root = tmp_path / "store", tmp_path / "set"
    store.mkdir(), root.mkdir()
    findings, _ = mias(store, "mdb001 G NORM")
    (root / "MIAS").symlink_to(store)
    assert len(READERS["mini-mias"](root, False)[0]) == len(findings)


def test_every_reader_names_access_and_licence():
    readers = [read for name, read in vars(sources).items() if name.startswith("read_")]
    readers.remove(sources.read_manifest)
    assert len(readers) == len(READERS)
    for reader in readers:
        assert "Access: " in reader.__doc__ and "Licence: " in reader.__doc__


# --- Patient ids ---


@pytest.mark.parametrize(
    "text",
    [
        *(
            "Zo\u0065\u0308 1",
            "\ufeffZo\xeb 1",
            "Zo\xeb 1\u200b",
            "Zo\u200de\u0308 1",
            "Zo\xeb\xa01",
        ),
        *(
            "\u3000Zo\xeb 1\t",
            "Zo\xeb 1\xad",
            "Zo\xeb\u3164 1",
            "Zo\xeb 1\ufe0f",
            "Zo\u200be\u0308 1\x00",
        ),
    ],
)
def test_ids_lose_what_cannot_be_seen_in_manifest_and_archive(tmp_path, text):
    assert sources.common.plain_id(text) == "Zo\xeb 1"
    Image.fromarray(photograph()).save(tmp_path / "a.png")
    row = {"image_path": "a.png", "patient_id": text.replace("\x00", ""), "view": "CC"}
    row |= dict.fromkeys(sources.MANIFEST_COLUMNS[4:], "") | {"laterality": "L"}
    write_csv(tmp_path / "m.csv", [row | {"pathology": "normal"}])
    assert sources.read_manifest(tmp_path / "m.csv")[0].patient_id == "Zo\xeb 1"
    finding = sources.Finding(str(tmp_path / "a.png"), text, "L", "CC", "", "normal")
    findings, _ = sources._read(lambda root, traps: [finding], True, tmp_path, False)
    assert findings[0].patient_id == "Zo\xeb 1"


def test_an_id_of_invisible_characters_is_empty(tmp_path):
    (tmp_path / "m.csv").write_text(
        f"{','.join(sources.MANIFEST_COLUMNS)}\na.png,\u200b,L,CC,,normal,,,,\n", encoding="utf-8"
    )
    with pytest.raises(ValueError, match="line 2: patient_id is empty"):
        sources.read_manifest(tmp_path / "m.csv")


@pytest.mark.parametrize(
    "ids",
    [
        ("7", "7.0", "007", "07.00", "\uff17"),
        ("P1", "p1", "p01", "P 1"),
        ("Zo\xeb", "ZO\xcb"),
        ("Stra\xdfe 1", "STRASSE 1", "STRASSE\u20031"),
        ("A-7", "a\u20137", "A\u221207", "A\u20110007"),
        ("site-1-007", "site-1-7"),
    ],
)
def test_ids_that_look_alike_are_named(ids):
    findings = [sources.Finding(f"{i}.png", i, "L", "CC") for i in (*ids, "another", "100")]
    (line,) = sources.look_alikes(findings)
    assert line == f"{', '.join(map(repr, sorted(ids)))} look alike"


def test_ids_of_the_archives_never_look_alike():
    rng = random.Random(0)
    for ids in (
        [str(n) for n in range(2_000)],  # RSNA, EMBED
        [f"P_{n:05d}" for n in range(2_000)],  # CBIS-DDSM
        [f"demd{n}" for n in range(2_000)],  # OMI-DB
        [f"mias{n:03d}" for n in range(161)],
        [f"{rng.getrandbits(128):032x}" for _ in range(1_000)],  # VinDr
        [f"{rng.getrandbits(64):016x}" for _ in range(1_000)],  # INbreast
        [f"{n:04x}" for n in range(2**12)],
        [str(uuid.UUID(int=rng.getrandbits(128))) for _ in range(1_000)],
        [f"1.2.840.{rng.getrandbits(30)}.{n}" for n in range(1_000)],
        [f"{site}{sign}{n}" for sign in ". -" for site in range(30) for n in range(1, 300)],
    ):
        assert not sources.look_alikes([sources.Finding("", i, "L", "CC") for i in ids])
