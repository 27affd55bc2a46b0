"""Headers of DICOM series; pixel data are not read.

A folder counts as one series: its largest one that is no localizer, of its most frequent size and orientation, as
`ml/decoding.py` reads it (a test holds the two together).
"""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from app.loading.images_elements import FEW_BYTES, FIRST_BYTES, Wanted, scan, wanted
from app.loading.images_header import (
    LEAST_SPACING_MM,
    MIN_SLICES,
    MOST_SPACING_MM,
    Acquired,
    Header,
    Unreadable,
    parse_moment,
    stamp,
    written,
)

UNEVEN = 0.01
"""Slice distances that differ by a larger share of their median are uneven."""
TILT_DEGREES = 0.5
LADDER = (
    ("AcquisitionDateTime", None),
    ("AcquisitionDate", "AcquisitionTime"),
    ("SeriesDate", "SeriesTime"),
    ("StudyDate", "StudyTime"),
    ("ContentDate", "ContentTime"),
)
"""Attributes that tell when, best first. Content comes last: of reformatted images it is when they were made."""
_TEXT = (
    *(tag for pair in LADDER for tag in pair if tag),
    *("BodyPartExamined", "ConvolutionKernel", "Manufacturer", "ManufacturerModelName", "Modality", "PatientID"),
    *("PhotometricInterpretation", "RescaleType", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"),
    *("AccessionNumber", "ContrastBolusAgent", "ImageType", "PatientBirthDate", "PatientSex", "ProtocolName"),
    *("SOPClassUID", "SeriesDescription", "StudyDescription"),
)
_NUMBER = (
    *("BitsAllocated", "Columns", "GantryDetectorTilt", "InstanceNumber", "KVP", "NumberOfFrames"),
    *("PixelRepresentation", "RescaleIntercept", "RescaleSlope", "Rows", "SamplesPerPixel", "SliceThickness"),
    "AcquisitionNumber",
)
_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_FRAME_GROUPS = (
    *("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence"),
    *("PixelValueTransformationSequence", "CTReconstructionSequence"),
)
"""Where an enhanced CT object keeps what other images have at the top, for each frame or for all."""
_NUMBERS = ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing")
TAGS = (*_TEXT, *_NUMBER, *_NUMBERS, *_GROUPS)

SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
SCREENS = frozenset(("SCREEN SAVE", "DOSE_INFO", "PATIENT_INFO", "RESULTS", "REPORT"))
PROJECTIONS = frozenset(("MIP", "MINIP", "PROJECTION IMAGE", "MAX_IP", "MIN_IP", "VRT", "SSD", "VOLUME_RENDER"))
"""Words of ImageType for images of screens, and for images whose values are no longer those of voxels."""
MOST_FRAMES = 100_000
DAMAGED = "damaged_slices"
FAULTS = ("damaged_file", "header_too_large", "header_crashed", "header_timeout")
"""Of files of a series, which then lacks them."""

Image = dict[str, Any]
"""Attributes of one image by keyword, those that have a value: text, float or list of float; beside them `file`,
`syntax` (its transfer syntax), `bytes_left` (what follows the header in the file) and `written`."""


def series_files(path: Path) -> list[Path]:
    """The files of a series' folder; those of its subfolders where it holds none itself."""
    if path.is_file():
        return [path]
    files = sorted(f for f in path.iterdir() if f.is_file() and not f.name.startswith("."))
    return files or sorted(f for f in path.rglob("*") if f.is_file() and not f.name.startswith("."))


def read_dicom(path: Path) -> Header:
    """The headers of one folder (or file) as one series.

    Raises:
        Unreadable: missing_file, or unreadable_file where nothing there is a DICOM image.
    """
    if not path.exists():
        raise Unreadable("missing_file")
    found: list[Image]
    reasons: list[str]
    found, reasons = [], []
    for file in series_files(path):
        try:
            found += [image for image in read_images(file) if is_image(image)]
        except Unreadable as fault:
            reasons += [DAMAGED] if str(fault) in FAULTS else []
    return describe(found, reasons)


def describe(found: list[Image], reasons: list[str]) -> Header:
    """What the images of one place say as a series.

    Args:
        found: images with a size, in the order of their files.
        reasons: what is known to be wrong already.

    Raises:
        Unreadable: unreadable_file where there is no image.
    """
    if not found:
        raise Unreadable("unreadable_file")
    images = _choose(found, reasons)
    first = images[0]
    facts = _geometry(images, reasons)
    _content_reasons(images, reasons)
    return Header(
        format="dicom",
        rows=int(first["Rows"]),
        columns=int(first["Columns"]),
        slice_thickness_mm=first.get("SliceThickness"),
        kernel=first.get("ConvolutionKernel"),
        hu_state=_hu_state(first, reasons),
        study_uid=first.get("StudyInstanceUID"),
        series_uid=first.get("SeriesInstanceUID"),
        acquired=acquisition_time(images),
        patient=first.get("PatientID"),
        identity=_identity(first),
        reasons=tuple(dict.fromkeys(reasons)),
        details=_details(first) | stamp((image["file"], image["written"]) for image in images),
        **facts,
    )


def _be_quiet() -> None:
    """Keep pydicom from writing values it dislikes, which may be a person's, into logs."""
    from pydicom import config

    config.settings.reading_validation_mode = config.IGNORE
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)


def read_images(file: Path) -> list[Image]:
    """The images of a file: one, or the frames of an enhanced CT object; none of a DICOM file that is no image.

    Raises:
        Unreadable: missing_file, unreadable_file (it may not be read), empty_file, not_dicom or damaged_file.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            data, status = os.read(descriptor, FEW_BYTES), os.fstat(descriptor)
            size = status.st_size
            found = scan(data, size, _wanted())
            if found is None and len(data) == FEW_BYTES:  # longer than most, or of another kind
                found = scan(data + os.read(descriptor, FIRST_BYTES - FEW_BYTES), size, _wanted())
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise Unreadable("missing_file") from None
    except OSError:
        raise Unreadable("unreadable_file") from None
    if not data:
        raise Unreadable("empty_file")
    images = [found | {"file": file.name}] if found is not None else _read_slowly(file)
    for image in images:
        image["written"] = written(status)
        image["is_localizer"] = "LOCALIZER" in image.get("ImageType", "").split("\\")
    return images


def is_image(image: Image) -> bool:
    """Whether there are pixels of some size."""
    return {"Rows", "Columns"} <= image.keys()


@functools.cache
def _wanted() -> Wanted:
    from pydicom.datadict import dictionary_VR, tag_for_keyword

    tags = {int(tag_for_keyword(name) or 0): name for name in (*_TEXT, *_NUMBER, *_NUMBERS)}
    return wanted({tag: (name, dictionary_VR(tag)) for tag, name in tags.items()})


def _read_slowly(file: Path) -> list[Image]:
    """By pydicom, which knows every kind of file."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    _be_quiet()
    try:
        with file.open("rb") as stream:
            dataset = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=[*TAGS])
            left = file.stat().st_size - stream.tell()  # the stream stands where the pixels begin
        syntax = dataset.file_meta.get("TransferSyntaxUID")
        common = {"file": file.name, "syntax": str(syntax) if syntax else None, "bytes_left": left}
        images = [_values(dataset) | common]
        if _GROUPS[1] in dataset:
            frames = range(min(int(images[0].get("NumberOfFrames", 1)), MOST_FRAMES))
            images = [images[0] | _frame(dataset, images[0], k) for k in frames]
    except InvalidDicomError:
        raise Unreadable("not_dicom") from None
    except MemoryError:
        raise Unreadable("header_too_large") from None
    except Exception as error:  # a damaged file makes the library raise almost anything
        raise Unreadable("damaged_file") from error
    return images


def _values(dataset: Any) -> Image:
    values: Image = {tag: _text(value) for tag in _TEXT if (value := dataset.get(tag)) is not None}
    values |= {tag: float(value) for tag in _NUMBER if (value := dataset.get(tag)) not in (None, "")}
    values |= {tag: [float(x) for x in value] for tag in _NUMBERS if (value := dataset.get(tag)) is not None}
    return {tag: value for tag, value in values.items() if value not in (None, [])}


def _frame(dataset: Any, image: Image, frame: int) -> Image:
    """What an enhanced object says of one frame beside what it says of all."""
    values: Image = {}
    for group in (dataset[_GROUPS[0]][0], dataset[_GROUPS[1]][frame]):
        for name in _FRAME_GROUPS:
            if group.get(name):
                values |= _values(group[name][0])
    uid = image.get("SOPInstanceUID", image["file"])
    return values | {"SOPInstanceUID": f"{uid}.{frame}", "InstanceNumber": float(frame), "is_frame": True}


def _text(value: Any) -> str | None:
    text = "\\".join(str(v) for v in value) if hasattr(value, "append") else str(value)
    return text.replace("\0", "").strip() or None


def _choose(found: list[Image], reasons: list[str]) -> list[Image]:
    """The images that make the series, each once; why others were left out goes to `reasons`."""
    ct = [i for i in found if i.get("Modality", "CT") == "CT"]
    single = [i for i in ct if i.get("NumberOfFrames", 1) <= 1 or "is_frame" in i]
    if not single:
        reasons.append("multi_frame" if ct else "not_ct")
        return ct or found
    images = [i for i in single if not i["is_localizer"]]
    if not images:
        reasons.append("localizer")
        images = single
    images = _largest(images, lambda i: i.get("SeriesInstanceUID", ""), "several_series", reasons)
    images = _largest(images, shape_key, "mixed_geometry", reasons)
    once = {i.get("SOPInstanceUID", i["file"]): i for i in reversed(images)}
    if len(once) < len(images):
        reasons.append("duplicate_slices")
    return list(reversed(once.values()))


def _largest(images: list[Image], key: Callable[[Image], Any], reason: str, reasons: list[str]) -> list[Image]:
    counts = Counter(key(i) for i in images)
    if len(counts) > 1:
        reasons.append(reason)
    best = min(counts, key=lambda value: (-counts[value], value))
    return [i for i in images if key(i) == best]


def shape_key(image: Image) -> tuple[Any, ...]:
    """Size and orientation, which the slices of a volume share."""
    orientation = image.get("ImageOrientationPatient", ())
    return int(image["Rows"]), int(image["Columns"]), tuple(round(x, 3) + 0.0 for x in orientation)


def _geometry(images: list[Image], reasons: list[str]) -> dict[str, Any]:
    """Slices, spacing and plane, from positions rather than from the slice thickness."""
    pixel = images[0].get("PixelSpacing", [])
    orientation = np.array(images[0].get("ImageOrientationPatient", ()))
    positions = [i.get("ImagePositionPatient", ()) for i in images]
    if len(pixel) != 2 or not all(LEAST_SPACING_MM < x < MOST_SPACING_MM for x in pixel):
        reasons.append("no_spacing")
        pixel = []
    if len(orientation) != 6 or any(len(p) != 3 for p in positions) or not np.isfinite(positions).all():
        if not {"multi_frame", "not_ct"} & set(reasons):
            reasons.append("no_position")
        return {"slices": len(images)}
    normal = np.cross(orientation[:3], orientation[3:])
    points = np.array(positions)
    order = np.argsort(points @ normal, kind="stable")
    gaps = np.diff(points[order] @ normal)
    distinct = np.concatenate([[True], gaps > 0.01])
    if not distinct.all():
        reasons.append("duplicate_positions" if distinct.sum() > 1 else "one_position")
    slices, gaps = int(distinct.sum()), gaps[gaps > 0.01]
    if slices < MIN_SLICES:
        reasons.append("too_few_slices")
    spacing = None
    if len(gaps):
        median = float(np.median(gaps))
        reasons += ["uneven_spacing"] if np.ptp(gaps) > UNEVEN * median else []
        reasons += ["most_slices_missing"] if gaps.sum() / median + 1 > 2 * slices else []
        reasons += ["no_spacing"] if not LEAST_SPACING_MM < median < MOST_SPACING_MM else []
        axis = points[order[-1]] - points[order[0]]
        cosine = float(axis @ normal / np.linalg.norm(axis))
        reasons += ["tilted_gantry"] if cosine < np.cos(np.radians(TILT_DEGREES)) else []
        spacing = [round(x, 5) for x in (*pixel, median)] if pixel else None
    plane = ("sagittal", "coronal", "axial")[int(np.abs(normal).argmax())]
    if np.abs(normal).max() < 0.9:
        plane = "oblique"
        reasons.append("oblique")
    return {"slices": slices, "spacing_mm": spacing, "orientation": plane}


def _content_reasons(images: list[Image], reasons: list[str]) -> None:
    if len({i.get("PatientID") for i in images}) > 1:
        reasons.append("mixed_persons")
    lacking = any(not {"RescaleSlope", "RescaleIntercept"} & i.keys() for i in images)
    unsigned = all(i.get("PixelRepresentation") == 0 for i in images)
    if unsigned and (lacking or all(i.get("RescaleIntercept", 0) >= 0 for i in images)):
        reasons.append("not_hounsfield")  # no value lies below 0, where air does
    elif lacking:
        reasons.append("no_rescale")
    reasons += [r for r in _kinds(images[0]) if r not in reasons]
    if any(i.get("PhotometricInterpretation") == "MONOCHROME1" for i in images):
        reasons.append("monochrome1")
    if any(i.get("SamplesPerPixel", 1) > 1 for i in images):
        reasons.append("colour")
    if not all(_can_decode(syntax) for syntax in {i["syntax"] for i in images}):
        reasons.append("no_decoder")
    if any(_is_truncated(i) for i in images):
        reasons.append("truncated")


def _kinds(image: Image) -> list[str]:
    """Whether an image shows what was scanned, or something made of it (ImageType, PS3.3 C.7.6.1.1.2)."""
    words = {word.strip() for word in image.get("ImageType", "").upper().split("\\")}
    if image.get("SOPClassUID", "").startswith(SECONDARY_CAPTURE) or words & SCREENS:
        return ["secondary_capture"]
    if words & PROJECTIONS:
        return ["projection"]
    return ["derived"] if "DERIVED" in words else []


def _hu_state(image: Image, reasons: list[str]) -> str:
    if {"not_hounsfield", "not_ct"} & set(reasons):
        return "not_hu"
    rescaled = {"RescaleSlope", "RescaleIntercept"} & image.keys()
    return "hu" if rescaled and image.get("RescaleType") in (None, "HU", "US") else "unknown"


def _can_decode(syntax: str | None) -> bool:
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import UID

    if syntax is None:
        return False
    try:
        return not UID(syntax).is_encapsulated or bool(get_decoder(UID(syntax)).is_available)
    except (NotImplementedError, ValueError):
        return False


def _is_truncated(image: Image) -> bool:
    """Whether the file of an uncompressed image ends before its pixels do."""
    from pydicom.uid import UID

    syntax = UID(image["syntax"] or "")
    if not syntax.is_transfer_syntax or syntax.is_compressed:
        return False
    start = 8 if syntax.is_implicit_VR else 12  # tag, type and length stand before the pixels
    frames = max(1, image.get("NumberOfFrames", 1))
    needed = frames * image["Rows"] * image["Columns"] * image.get("BitsAllocated", 8) // 8
    return bool(image["bytes_left"] - start < needed)


def acquisition_time(images: Iterable[Image]) -> Acquired | None:
    """The earliest time of a series by the best attribute that any of its slices has."""
    listed = list(images)
    for date_tag, time_tag in LADDER:
        found = [t for i in listed if (t := _moment(i, date_tag, time_tag))]
        if found:
            return min(found, key=lambda t: t.at)
    return None


def _moment(image: Image, date_tag: str, time_tag: str | None) -> Acquired | None:
    date = image.get(date_tag)
    if date is None:
        return None
    time = image.get(time_tag, "").partition(".")[0].replace(":", "") if time_tag else ""
    return parse_moment(date + time, date_tag) or parse_moment(date, date_tag)


def _identity(image: Image) -> dict[str, str]:
    """What tells whose the image is, beside the PatientID; used to compare, never stored."""
    facts = {"sex": image.get("PatientSex"), "accession": image.get("AccessionNumber")}
    born = image.get("PatientBirthDate", "")[:4]
    facts["birth_year"] = born if born.isdigit() and len(born) == 4 else None
    return {key: value for key, value in facts.items() if value}


def _details(image: Image) -> dict[str, Any]:
    facts = {
        "body_part": image.get("BodyPartExamined"),
        "contrast": image.get("ContrastBolusAgent"),
        "study_description": image.get("StudyDescription"),
        "series_description": image.get("SeriesDescription"),
        "protocol": image.get("ProtocolName"),
        "image_type": image.get("ImageType"),
        "manufacturer": image.get("Manufacturer"),
        "model": image.get("ManufacturerModelName"),
        "kvp": image.get("KVP"),
        "tilt_degrees": image.get("GantryDetectorTilt"),
        "transfer_syntax": image["syntax"],
    }
    return {key: value for key, value in facts.items() if value is not None}
