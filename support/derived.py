"""What leaves for other programs: a derived DICOM file, a 16-bit PNG, COCO annotations (F7)."""

import io
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydicom import Dataset, FileDataset, uid
from pydicom.dataset import FileMetaDataset
from pydicom.sr.codedict import Code, codes

from support import files, mammogram
from support.mammogram import CODES, LUTS, NUMBERS, WORDS, Mammogram, floats, lut_words, values

EMPTY = (  # required, may be empty, and nothing of the source is copied into them
    *("StudyDate", "StudyTime", "ContentDate", "ContentTime", "AccessionNumber", "StudyID"),
    *("ReferringPhysicianName", "PatientBirthDate", "PatientSex", "Manufacturer"),
)


def write_derived_dicom(
    source: Mammogram, stored: np.ndarray, path: Path, derivation: str, seed: str
) -> None:
    """A new DICOM file with `stored` in place of the source's pixels, marked as derived.

    Built from NUMBERS, WORDS, CODES and LUTs of the source and nothing else; its UIDs only appear
    hashed. New UIDs follow from `seed` and the source: the same call writes the same bytes.
    """
    assert source.ds is not None
    assert (stored.shape, stored.dtype) == (source.stored.shape, source.stored.dtype)
    ds = FileDataset("", {}, preamble=bytes(128), file_meta=FileMetaDataset())
    for keyword in source.ds.dir():  # what is empty stays empty: some must be there
        copied = values(source.ds, keyword)
        if keyword in NUMBERS:
            setattr(ds, keyword, copied if floats(source.ds, keyword) else [])
        elif keyword in WORDS:
            setattr(ds, keyword, copied if set(copied) <= set(WORDS[keyword]) else [])
        elif keyword in CODES:
            setattr(ds, keyword, _known_codes(copied, keyword))
        elif keyword in LUTS and copied:
            setattr(ds, keyword, [_copy_lut(source.ds, item) for item in copied])
    for item in ds.get("ModalityLUTSequence", ()):
        item.ModalityLUTType = "US"  # unspecified

    def new_uid(*what: object) -> str:
        return uid.generate_uid(entropy_srcs=["derived", *map(str, what)])

    origin = source.ds.get("SOPInstanceUID") or source.image_uid
    study = source.ds.get("StudyInstanceUID") or origin
    kind = uid.UID(source.ds.get("SOPClassUID") or "")
    ds.SOPClassUID = kind if kind.type == "SOP Class" else uid.SecondaryCaptureImageStorage
    reference = Dataset()
    reference.ReferencedSOPClassUID = ds.SOPClassUID
    reference.ReferencedSOPInstanceUID = new_uid("source", origin)
    purpose = codes.DCM.SourceImageForImageProcessingOperation
    reference.PurposeOfReferenceCodeSequence = [code_item(purpose)]
    ds.SourceImageSequence = [reference]
    ds.StudyInstanceUID = new_uid("study", study)
    ds.SeriesInstanceUID = new_uid("series", seed, study)
    ds.SOPInstanceUID = new_uid("image", seed, derivation, origin, source.image_uid)
    primary = "PRIMARY" in values(source.ds, "ImageType")[1:2]
    ds.ImageType = ["DERIVED", "PRIMARY" if primary else "SECONDARY"]
    ds.DerivationDescription = derivation
    ds.DerivationCodeSequence = [code_item(codes.DCM.PixelByPixelAddition)]
    for keyword in EMPTY:
        setattr(ds, keyword, None)
    if ds.SOPClassUID != uid.SecondaryCaptureImageStorage:
        ds.AcquisitionContextSequence = []  # as EMPTY
    syntax = source.ds.file_meta.TransferSyntaxUID
    if "LossyImageCompression" not in ds and syntax in mammogram.LOSSY:
        ds.LossyImageCompression = "01"  # once lossy, always lossy
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.PatientID = f"SYNTHETIC-{ds.StudyInstanceUID[-12:]}"
    ds.PatientName = f"{ds.PatientID}^"
    ds.PatientIdentityRemoved = "YES"
    ds.DeidentificationMethod = "New file; only what display needs was copied"
    ds.SeriesDescription = "Synthetic, research only"
    ds.SeriesNumber, ds.InstanceNumber = 1, 1
    ds.add_new("PixelData", "OW", _little_endian(stored))
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    whole = io.BytesIO()  # pydicom would hide why a file cannot be written
    ds.save_as(whole, enforce_file_format=True)
    with files.replace_file(path) as file:
        file.write(whole.getvalue())


def _little_endian(array: np.ndarray) -> bytes:
    """The bytes of an OW element, of even length."""
    data = array.astype(array.dtype.newbyteorder("<")).tobytes()
    return data + bytes(len(data) % 2)


def code_item(code: Code) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning, _ = code
    return item


def _known_codes(items: list[Dataset], keyword: str) -> list[Dataset]:
    """CODES[keyword] found among the items, and their modifiers."""
    known = []
    for item in items:
        found = Code(str(item.get("CodeValue")), str(item.get("CodingSchemeDesignator")), "")
        for code in CODES[keyword]:
            if code == found:  # SNOMED's older codes (SRT) equal the newer ones (SCT)
                known.append(code_item(code))
                if (modifier := "ViewModifierCodeSequence") in item:
                    setattr(known[-1], modifier, _known_codes(values(item, modifier), modifier))
    return known


def _copy_lut(source: Dataset, item: Dataset) -> Dataset:
    copy = Dataset()
    copy.add(item["LUTDescriptor"])
    copy.add_new("LUTData", "OW", _little_endian(lut_words(source, item)))
    return copy


def write_png16(path: Path, display: np.ndarray, comment: str) -> None:
    """(H, W) uint16 as a PNG that says what it is."""
    assert display.dtype == np.uint16
    said = PngInfo()
    said.add_text("Comment", comment)
    with files.replace_file(path) as file:
        Image.fromarray(display).save(file, format="PNG", pnginfo=said)


def rle(mask: np.ndarray) -> dict:
    """A bool mask as COCO's uncompressed run lengths: down the columns, zeros first."""
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs}


def coco(images: list[dict], annotations: list[dict]) -> dict:
    """COCO JSON of images (id, file_name, height, width) and their annotations.

    annotations: image_id, category (its name), bbox (row0, col0, row1, col1), segmentation (`rle`)
    and whatever else; ids, [x, y, w, h] and areas are filled in here.
    """
    names = sorted({annotation["category"] for annotation in annotations})
    filled = []
    for number, annotation in enumerate(annotations, start=1):
        row0, col0, row1, col1 = annotation["bbox"]
        box = [col0, row0, col1 - col0, row1 - row0]
        area = sum(annotation["segmentation"]["counts"][1::2])
        label = {"id": number, "category_id": names.index(annotation["category"]) + 1}
        filled.append(annotation | label | {"bbox": box, "area": area, "iscrowd": 0})
    return {
        "info": {"description": "Synthetic lesions in mammograms; research only"},
        "images": images,
        "annotations": filled,
        "categories": [{"id": k, "name": name} for k, name in enumerate(names, start=1)],
    }
