"""Headers of DICOM series; pixel data are not read.

A folder counts as one series: its largest one that is no localizer, of its most frequent size and orientation, as
`ml/decoding.py` reads it (a test holds the two together).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from app.loading.images_header import MIN_SLICES, Acquired, Header, Unreadable, parse_moment

UNEVEN = 0.01
"""Slice distances that differ by a larger share of their median are uneven."""
TILT_DEGREES = 0.5
LADDER = (
    ("AcquisitionDateTime", None),
    ("AcquisitionDate", "AcquisitionTime"),
    ("SeriesDate", "SeriesTime"),
    ("StudyDate", "StudyTime"),
)
"""Attributes that tell when, best first."""
TAGS = [
    *(tag for pair in LADDER for tag in pair if tag),
    "BitsAllocated",
    "BodyPartExamined",
    "Columns",
    "ConvolutionKernel",
    "GantryDetectorTilt",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "ImageType",
    "InstanceNumber",
    "KVP",
    "Manufacturer",
    "ManufacturerModelName",
    "Modality",
    "NumberOfFrames",
    "PatientID",
    "PhotometricInterpretation",
    "PixelRepresentation",
    "PixelSpacing",
    "RescaleIntercept",
    "RescaleSlope",
    "RescaleType",
    "Rows",
    "SOPInstanceUID",
    "SamplesPerPixel",
    "SeriesInstanceUID",
    "SliceThickness",
    "StudyInstanceUID",
]


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
    try:
        found = [(f, d) for f in series_files(path) if (d := _read(f)) is not None]
    except OSError as error:
        raise Unreadable("unreadable_file") from error
    if not found:
        raise Unreadable("unreadable_file")
    reasons: list[str] = []
    images = _choose(found, reasons)
    first = images[0][1]
    facts = _geometry([d for _, d in images], reasons)
    _content_reasons([d for _, d in images], reasons)
    return Header(
        format="dicom",
        rows=_integer(first, "Rows"),
        columns=_integer(first, "Columns"),
        slice_thickness_mm=_number(first, "SliceThickness"),
        kernel=_text(first, "ConvolutionKernel"),
        hu_state=_hu_state(first, reasons),
        study_uid=_text(first, "StudyInstanceUID"),
        series_uid=_text(first, "SeriesInstanceUID"),
        acquired=acquisition_time([d for _, d in images]),
        patient=_text(first, "PatientID"),
        reasons=tuple(dict.fromkeys(reasons)),
        details=_details(first),
        **facts,
    )


def _hu_state(dataset: Any, reasons: list[str]) -> str:
    if {"not_hounsfield", "not_ct"} & set(reasons):
        return "not_hu"
    rescaled = "RescaleSlope" in dataset or "RescaleIntercept" in dataset
    return "hu" if rescaled and _text(dataset, "RescaleType") in (None, "HU", "US") else "unknown"


def _read(file: Path) -> Any | None:
    """Header of one image, with what follows it in the file; None for anything that is no DICOM image."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        with file.open("rb") as stream:
            dataset = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=list(TAGS))
            # the stream stands where the pixels begin; a plain attribute, not a DICOM element
            dataset.bytes_left = file.stat().st_size - stream.tell()
    except (InvalidDicomError, EOFError, ValueError, KeyError, AttributeError, NotImplementedError):
        return None
    return dataset if "Rows" in dataset else None


def _choose(found: list[tuple[Path, Any]], reasons: list[str]) -> list[tuple[Path, Any]]:
    """The images that make the series, each once; why others were left out goes to `reasons`."""
    ct = [(f, d) for f, d in found if (_text(d, "Modality") or "CT") == "CT"]
    single = [(f, d) for f, d in ct if (_integer(d, "NumberOfFrames") or 1) == 1]
    if not single:
        reasons.append("multi_frame" if ct else "not_ct")
        return ct or found
    images = [(f, d) for f, d in single if "LOCALIZER" not in (d.get("ImageType") or ())]
    if not images:
        reasons.append("localizer")
        images = single
    images = _largest(images, lambda d: _text(d, "SeriesInstanceUID") or "", "several_series", reasons)
    images = _largest(images, _shape_key, "mixed_geometry", reasons)
    once = {_text(d, "SOPInstanceUID") or f.name: (f, d) for f, d in reversed(images)}
    if len(once) < len(images):
        reasons.append("duplicate_slices")
    return list(reversed(once.values()))


def _largest(images: list[tuple[Path, Any]], key: Any, reason: str, reasons: list[str]) -> list[tuple[Path, Any]]:
    counts = Counter(key(d) for _, d in images)
    if len(counts) > 1:
        reasons.append(reason)
    best = min(counts, key=lambda value: (-counts[value], value))
    return [(f, d) for f, d in images if key(d) == best]


def _shape_key(dataset: Any) -> tuple[Any, ...]:
    orientation = dataset.get("ImageOrientationPatient") or ()
    return (
        _integer(dataset, "Rows") or 0,
        _integer(dataset, "Columns") or 0,
        tuple(round(float(x), 3) + 0.0 for x in orientation),
    )


def _geometry(datasets: list[Any], reasons: list[str]) -> dict[str, Any]:
    """Slices, spacing and plane, from positions rather than from the slice thickness."""
    first = datasets[0]
    pixel = [float(x) for x in first.get("PixelSpacing") or ()]
    orientation = np.array([float(x) for x in first.get("ImageOrientationPatient") or ()])
    positions = [d.get("ImagePositionPatient") or () for d in datasets]
    if len(pixel) != 2 or min(pixel) <= 0:
        reasons.append("no_spacing")
        pixel = []
    if len(orientation) != 6 or any(len(p) != 3 for p in positions):
        if not {"multi_frame", "not_ct"} & set(reasons):
            reasons.append("no_position")
        return {"slices": len(datasets)}
    normal = np.cross(orientation[:3], orientation[3:])
    points = np.array([[float(x) for x in p] for p in positions])
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
        reasons += ["uneven_spacing"] if np.ptp(gaps) > UNEVEN * np.median(gaps) else []
        axis = points[order[-1]] - points[order[0]]
        cosine = float(axis @ normal / np.linalg.norm(axis))
        reasons += ["tilted_gantry"] if cosine < np.cos(np.radians(TILT_DEGREES)) else []
        spacing = [round(x, 5) for x in (*pixel, float(np.median(gaps)))] if pixel else None
    plane = ("sagittal", "coronal", "axial")[int(np.abs(normal).argmax())]
    if np.abs(normal).max() < 0.9:
        plane = "oblique"
        reasons.append("oblique")
    return {"slices": slices, "spacing_mm": spacing, "orientation": plane}


def _content_reasons(datasets: list[Any], reasons: list[str]) -> None:
    if len({_text(d, "PatientID") for d in datasets}) > 1:
        reasons.append("mixed_persons")
    if any("RescaleSlope" not in d and "RescaleIntercept" not in d for d in datasets):
        unsigned = all(_integer(d, "PixelRepresentation") == 0 for d in datasets)
        reasons.append("not_hounsfield" if unsigned else "no_rescale")
    photometric = {_text(d, "PhotometricInterpretation") for d in datasets}
    if "MONOCHROME1" in photometric:
        reasons.append("monochrome1")
    if any((_integer(d, "SamplesPerPixel") or 1) > 1 for d in datasets):
        reasons.append("colour")
    if not all(_can_decode(uid) for uid in {_syntax(d) for d in datasets}):
        reasons.append("no_decoder")
    if any(_is_truncated(d) for d in datasets):
        reasons.append("truncated")


def _syntax(dataset: Any) -> str | None:
    uid = getattr(dataset.file_meta, "TransferSyntaxUID", None)
    return str(uid) if uid else None


def _can_decode(uid: str | None) -> bool:
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import UID

    if uid is None:
        return False
    try:
        return not UID(uid).is_encapsulated or bool(get_decoder(UID(uid)).is_available)
    except (NotImplementedError, ValueError):
        return False


def _is_truncated(dataset: Any) -> bool:
    """Whether the file of an uncompressed image ends before its pixels do."""
    from pydicom.uid import UID

    uid = _syntax(dataset)
    if uid is None or UID(uid).is_compressed:
        return False
    pixels = (_integer(dataset, "Rows") or 0) * (_integer(dataset, "Columns") or 0)
    start = 8 if UID(uid).is_implicit_VR else 12  # tag, type and length stand before the pixels
    return int(dataset.bytes_left) - start < pixels * (_integer(dataset, "BitsAllocated") or 8) // 8


def acquisition_time(datasets: Iterable[Any]) -> Acquired | None:
    """The earliest time of a series by the best attribute that any of its slices has."""
    listed = list(datasets)
    for date_tag, time_tag in LADDER:
        found = [t for d in listed if (t := _moment(d, date_tag, time_tag))]
        if found:
            return min(found, key=lambda t: t.at)
    return None


def _moment(dataset: Any, date_tag: str, time_tag: str | None) -> Acquired | None:
    date = _text(dataset, date_tag)
    if date is None:
        return None
    time = (_text(dataset, time_tag) or "").partition(".")[0].replace(":", "") if time_tag else ""
    return parse_moment(date + time, date_tag) or parse_moment(date, date_tag)


def _text(dataset: Any, tag: str) -> str | None:
    value = dataset.get(tag)
    if value is None:
        return None
    text = "\\".join(str(v) for v in value) if hasattr(value, "append") else str(value)
    return text.replace("\0", "").strip() or None


def _integer(dataset: Any, tag: str) -> int | None:
    number = _number(dataset, tag)
    return None if number is None else int(number)


def _number(dataset: Any, tag: str) -> float | None:
    try:
        return float(dataset.get(tag))
    except (TypeError, ValueError):
        return None


def _details(dataset: Any) -> dict[str, Any]:
    facts = {
        "body_part": _text(dataset, "BodyPartExamined"),
        "manufacturer": _text(dataset, "Manufacturer"),
        "model": _text(dataset, "ManufacturerModelName"),
        "kvp": _number(dataset, "KVP"),
        "tilt_degrees": _number(dataset, "GantryDetectorTilt"),
        "transfer_syntax": _syntax(dataset),
    }
    return {key: value for key, value in facts.items() if value is not None}
