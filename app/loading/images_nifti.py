"""Headers of NIfTI files; no voxel is read."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

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
from app.loading.simulate_phantom import DESCRIPTION

SUFFIXES = (".nii", ".nii.gz", ".hdr", ".img")
OBLIQUE = 0.1
"""Direction cosines that are off by more make a scan oblique (6 degrees)."""
TIMES = ("AcquisitionDateTime", "AcquisitionDate", "SeriesDateTime", "SeriesDate", "StudyDateTime", "StudyDate")
"""Keys of the JSON file that tell when, best first."""
DETAILS = {
    "body_part": "BodyPartExamined",
    "contrast": "ContrastBolusAgent",
    "study_description": "StudyDescription",
    "series_description": "SeriesDescription",
    "protocol": "ProtocolName",
    "image_type": "ImageType",
    "manufacturer": "Manufacturer",
    "model": "ManufacturersModelName",
    "kvp": "KVP",
}
"""What is kept of the JSON file beside columns: name → key."""
MOST_SIDECAR_BYTES = 4 << 20


def is_nifti(path: Path) -> bool:
    """Whether the name is that of a NIfTI file."""
    return path.name.lower().endswith(SUFFIXES)


def read_nifti(path: Path) -> Header:
    """The header of one file, and what the JSON file beside it tells, where there is one.

    Raises:
        Unreadable: missing_file or unreadable_file.
    """
    import nibabel

    if not path.is_file():
        raise Unreadable("missing_file")
    try:
        image: Any = nibabel.load(path)
        header, affine = image.header, np.array(image.affine, float)
        slope, inter, offset = image.dataobj.slope, image.dataobj.inter, int(image.dataobj.offset)
        shape = tuple(int(n) for n in image.shape)
        unit = header.get_xyzt_units()[0]
        spaced = header["sform_code"] > 0 or _has_spacing(image)
    except Exception as error:  # a damaged file makes the library raise almost anything
        raise Unreadable("unreadable_file") from error
    dtype = header.get_data_dtype()
    rescaled = (slope, inter) != (1, 0)
    simulated = DESCRIPTION.encode() in header["descrip"].tobytes() if "descrip" in header else False
    spacing, directions = _geometry(affine, unit)
    reasons = _shape_reasons(shape, spacing if spaced else np.zeros(3), dtype)
    has_no_air = dtype.kind == "u" and slope >= 0 and inter >= 0
    reasons += ["not_hounsfield"] if has_no_air or (dtype.itemsize == 1 and not rescaled) else []
    reasons += _orientation_reasons(header, unit, directions)
    reasons += ["truncated"] if _is_truncated(path, offset + math.prod(shape) * dtype.itemsize) else []
    facts = _sidecar(path)
    reasons += ["not_ct"] if (_text_of(facts, "Modality") or "CT") != "CT" else []
    state = "not_hu" if "not_hounsfield" in reasons else "rescaled" if rescaled else "hu" if simulated else "unknown"
    grid = shape[:3] if len(shape) >= 3 else (None, None, None)
    return Header(
        format="nifti",
        rows=grid[0],
        columns=grid[1],
        slices=grid[2],
        spacing_mm=[round(float(s), 5) for s in spacing] if "no_spacing" not in reasons else None,
        orientation=_codes(affine),
        hu_state=state,
        reasons=tuple(reasons),
        simulated=simulated,
        details={"type": str(dtype), "slope": float(slope), "intercept": float(inter)}
        | _sidecar_details(facts)
        | stamp([(path.name, written(path.stat()))]),
        **_sidecar_fields(facts),
    )


def _has_spacing(image: Any) -> bool:
    """Whether the file's own header has one; nibabel puts 1 mm where it has zero."""
    from nibabel.openers import ImageOpener

    holder = image.file_map.get("header") or image.file_map["image"]
    with ImageOpener(holder.filename) as file:
        stored = type(image.header).from_fileobj(file, check=False)
    return bool((stored["pixdim"][1:4] != 0).all())


def _geometry(affine: Any, unit: str) -> tuple[Any, Any]:
    """Spacing (3,) in mm and unit directions (3, 3)."""
    spacing = np.sqrt((affine[:3, :3] ** 2).sum(0))
    scaled = spacing * {"meter": 1000.0, "micron": 0.001}.get(unit, 1.0)
    if _plausible(spacing) and not _plausible(scaled):  # the unit is wrong, not the numbers
        scaled = spacing
    with np.errstate(all="ignore"):
        return scaled, affine[:3, :3] / spacing


def _plausible(spacing: Any) -> bool:
    return bool(((spacing > LEAST_SPACING_MM) & (spacing < MOST_SPACING_MM)).all())


def _shape_reasons(shape: tuple[int, ...], spacing: Any, dtype: Any) -> list[str]:
    reasons = []
    if len(shape) < 3 or any(n != 1 for n in shape[3:]):
        reasons.append("not_three_dimensional")
    elif min(shape[:3]) < MIN_SLICES:
        reasons.append("too_few_slices")
    if not _plausible(spacing):
        reasons.append("no_spacing")
    if dtype.kind not in "iuf":
        reasons.append("colour")
    return reasons


def _orientation_reasons(header: Any, unit: str, directions: Any) -> list[str]:
    reasons = []
    if unit in ("meter", "micron"):
        reasons.append("not_millimetres")
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    if sform == 0 and qform == 0:
        reasons.append("no_orientation")
    elif sform and qform and not np.allclose(header.get_sform(), header.get_qform(), atol=0.1):
        reasons.append("orientations_disagree")
    if np.isfinite(directions).all() and np.abs(np.abs(directions).max(0) - 1).max() > OBLIQUE**2 / 2:
        reasons.append("oblique")
    return reasons


def _codes(affine: Any) -> str | None:
    from nibabel.orientations import aff2axcodes

    try:
        codes = aff2axcodes(affine)  # type: ignore[no-untyped-call]
    except (ValueError, np.linalg.LinAlgError):
        return None
    return "".join(codes) if None not in codes else None


def _is_truncated(path: Path, needed: int) -> bool:
    """Whether the file ends before its voxels do, after `needed` bytes.

    A gzip file ends with the length of its content; only where that is too small, as it also is in files of several
    members, is the file read through.
    """
    if path.name.lower().endswith(".gz"):
        with path.open("rb") as file:
            file.seek(-4, 2)
            if int.from_bytes(file.read(4), "little") == needed % 2**32:
                return False
        return _unpacked_size(path) < needed
    if path.suffix.lower() in (".hdr", ".img"):
        path = path.with_suffix(".img")
    return path.stat().st_size < needed


def _unpacked_size(path: Path) -> int:
    import gzip

    size = 0
    try:
        with gzip.open(path) as file:
            while chunk := file.read(1 << 20):
                size += len(chunk)
    except (OSError, EOFError, zlib.error):
        return -1
    return size


def _sidecar(path: Path) -> dict[str, Any]:
    """What the JSON file says that converters write beside an image; empty where there is none."""
    name = path.name[: -len(".gz")] if path.name.lower().endswith(".gz") else path.name
    sidecar = path.with_name(Path(name).stem + ".json")
    try:
        if sidecar.stat().st_size > MOST_SIDECAR_BYTES:
            return {}
        facts = json.loads(sidecar.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _text_of(facts: dict[str, Any], key: str) -> str | None:
    value = facts.get(key)
    if isinstance(value, list):
        value = "\\".join(str(part) for part in value)
    return str(value).replace("\0", "").strip() or None if isinstance(value, str | int | float) else None


def _sidecar_time(facts: dict[str, Any]) -> Acquired | None:
    """The acquisition by the best key that holds a time; a day's time of day may stand in a key of its own."""
    for key in TIMES:
        value = facts.get(key)
        if not isinstance(value, str):
            continue
        clock = facts.get(key.removesuffix("Date") + "Time") if key.endswith("Date") else None
        joined = f"{value.strip()}T{clock.strip()}" if isinstance(clock, str) else value
        if found := parse_moment(joined, key) or parse_moment(value, key):
            return found
    return None


def _sidecar_fields(facts: dict[str, Any]) -> dict[str, Any]:
    """Fields of a header that only the JSON file knows."""
    thickness = facts.get("SliceThickness")
    born = _text_of(facts, "PatientBirthDate") or ""
    identity = {
        "sex": _text_of(facts, "PatientSex"),
        "accession": _text_of(facts, "AccessionNumber"),
        "birth_year": born[:4] if born[:4].isdigit() and len(born) >= 4 else None,
    }
    return {
        "acquired": _sidecar_time(facts),
        "kernel": _text_of(facts, "ConvolutionKernel"),
        "slice_thickness_mm": float(thickness) if isinstance(thickness, int | float) else None,
        "study_uid": _text_of(facts, "StudyInstanceUID"),
        "series_uid": _text_of(facts, "SeriesInstanceUID"),
        "patient": _text_of(facts, "PatientID"),
        "identity": {key: value for key, value in identity.items() if value},
    }


def _sidecar_details(facts: dict[str, Any]) -> dict[str, Any]:
    found = {name: _text_of(facts, key) for name, key in DETAILS.items()}
    return {name: value for name, value in found.items() if value}
