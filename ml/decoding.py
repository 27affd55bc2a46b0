"""Files of a CT series → Hounsfield units and an affine, whatever the format, order or transfer syntax.

Every failure is a ValueError of one sentence that names no file, so that it may be logged. The rules by which a series
is chosen from a folder are those of the loader's headers (`app/loading/images_dicom.py`); a test holds them together.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
MILLIMETRES = {"meter": 1000.0, "mm": 1.0, "micron": 0.001}
UNEVEN = 0.01
"""Slice distances that differ by a larger share are interpolated to even ones."""
AIR = -1000


@dataclass(frozen=True, slots=True)
class Decoded:
    """Voxels as stored, in HU."""

    hu: NDArray[np.int16]
    """(I, J, K) in the file's own order."""
    affine: NDArray[np.float64]
    """(4, 4) voxel index → RAS millimetres."""


def to_int16(values: NDArray[Any]) -> NDArray[np.int16]:
    """Rounded HU; what is not a number is air."""
    if values.dtype == np.int16:
        return values
    if values.dtype.kind == "f":
        values = np.rint(np.nan_to_num(values, nan=AIR, posinf=32767, neginf=AIR))
    limits = np.iinfo(np.int16)
    result: NDArray[np.int16] = np.clip(values, limits.min, limits.max).astype(np.int16)
    return result


def decode_nifti(path: Path) -> Decoded:
    """One NIfTI file: the header's slope and intercept applied once, its sform (else qform) as affine.

    Raises:
        ValueError: it cannot be read, has more than three dimensions, no spacing, or 8-bit values without a rescale.
    """
    import nibabel
    from nibabel.filebasedimages import ImageFileError

    try:
        image: Any = nibabel.load(path)
        header, proxy = image.header, image.dataobj
        shape = tuple(n for axis, n in enumerate(image.shape) if axis < 3 or n != 1)
        _check_nifti(header, proxy, shape)
        stored = proxy.slope == 1 and proxy.inter == 0
        values = np.asanyarray(proxy) if stored else image.get_fdata(dtype=np.float32, caching="unchanged")
        unit = MILLIMETRES.get(header.get_xyzt_units()[0], 1.0)
        spaced = header["sform_code"] > 0 or _has_spacing(image)
    except (OSError, EOFError, zlib.error, ImageFileError, KeyError, AttributeError) as error:
        raise ValueError(f"Expected a readable NIfTI file, got one that fails with {type(error).__name__}.") from error
    if not spaced:
        raise ValueError("Expected a spacing along each axis, got zero in the header; convert the scan again.")
    affine = np.array(image.affine, np.float64)
    affine[:3] *= unit
    return Decoded(to_int16(values.reshape(shape)), affine)


def _has_spacing(image: Any) -> bool:
    """Whether the file's own header has one; nibabel puts 1 mm where it has zero."""
    from nibabel.openers import ImageOpener

    holder = image.file_map.get("header") or image.file_map["image"]
    with ImageOpener(holder.filename) as file:
        stored = type(image.header).from_fileobj(file, check=False)
    return bool((stored["pixdim"][1:4] != 0).all())


def _check_nifti(header: Any, proxy: Any, shape: tuple[int, ...]) -> None:
    if len(shape) != 3:
        raise ValueError(f"Expected a volume of three dimensions, got shape {shape}; split it into one file a volume.")
    if min(shape) < 2:
        raise ValueError(f"Expected at least 2 voxels along each axis, got shape {shape}.")
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise ValueError(f"Expected one number a voxel, got values of type {dtype}.")
    if dtype.itemsize == 1 and (proxy.slope, proxy.inter) == (1, 0):
        raise ValueError("Expected Hounsfield units, got 8-bit values without a rescale; convert the scan again.")


@dataclass(slots=True)
class _Slice:
    file: Path
    dataset: Any
    position: NDArray[np.float64]
    instance: int


def decode_dicom(path: Path) -> Decoded:
    """One DICOM series: the largest one of a folder, slices sorted by position, rescaled slice by slice.

    Copies of a slice and second slices at one position are dropped, slices of another size or orientation, too; uneven
    distances are interpolated to the median one.

    Raises:
        ValueError: no CT slices, fewer than two positions, positions missing, or pixel data that cannot be decoded.
    """
    slices = _chosen(_read_headers(path))
    first = slices[0].dataset
    row, column = _directions(first)
    normal = np.cross(row, column)
    along = np.array([s.position @ normal for s in slices])
    order = sorted(range(len(slices)), key=lambda i: (round(float(along[i]), 2), slices[i].instance))
    kept = order[:1] + [j for i, j in pairwise(order) if along[j] - along[i] > 0.01]
    if len(kept) < 2:
        raise ValueError("Expected slices at two positions or more, got one position; is this a localizer?")
    slices, along = [slices[i] for i in kept], along[kept]
    hu = np.stack([_hu(s) for s in slices])
    spacing_y, spacing_x = (float(x) for x in first.PixelSpacing)
    step = (slices[-1].position - slices[0].position) / (len(slices) - 1)
    gaps = np.diff(along)
    if np.ptp(gaps) > UNEVEN * np.median(gaps):
        hu, count = _even(hu, along, float(np.median(gaps)))
        step = (slices[-1].position - slices[0].position) / (count - 1)
    affine = np.eye(4)
    affine[:3, :3] = LPS_TO_RAS @ np.stack([row * spacing_x, column * spacing_y, step], 1)
    affine[:3, 3] = LPS_TO_RAS @ slices[0].position
    return Decoded(hu.transpose(2, 1, 0), affine)


def _even(hu: NDArray[np.int16], along: NDArray[np.float64], distance: float) -> tuple[NDArray[np.int16], int]:
    """Slices at even distances by linear interpolation; (slices, how many)."""
    count = max(2, round((along[-1] - along[0]) / distance) + 1)
    wanted = np.linspace(along[0], along[-1], count)
    above = np.clip(np.searchsorted(along, wanted, side="right"), 1, len(along) - 1)
    share = ((wanted - along[above - 1]) / (along[above] - along[above - 1])).astype(np.float32)
    out = np.empty((count, *hu.shape[1:]), np.int16)
    for k, (j, w) in enumerate(zip(above, share, strict=True)):
        out[k] = np.rint(hu[j - 1] * (1 - w) + hu[j] * w)
    return out, count


def _directions(dataset: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    orientation = np.array(dataset.ImageOrientationPatient, np.float64)
    return orientation[:3], orientation[3:]


def _read_headers(path: Path) -> list[tuple[Path, Any]]:
    """Headers of the CT images among the files of a folder; anything else is passed over."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    found = []
    for file in _files(path):
        try:
            dataset = pydicom.dcmread(file, stop_before_pixels=True)
        except (InvalidDicomError, OSError, EOFError, ValueError, KeyError, AttributeError):
            continue
        if "Rows" in dataset and dataset.get("Modality", "CT") in ("CT", "", None):
            found.append((file, dataset))
    if not found:
        raise ValueError("Expected a DICOM series of modality CT, found no CT image there.")
    if all(int(d.get("NumberOfFrames") or 1) > 1 for _, d in found):
        raise ValueError("Expected one slice a file, got a multi-frame object; convert it to single frames or NIfTI.")
    return [(f, d) for f, d in found if int(d.get("NumberOfFrames") or 1) == 1]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(f for f in path.iterdir() if f.is_file() and not f.name.startswith("."))
    return files or sorted(f for f in path.rglob("*") if f.is_file() and not f.name.startswith("."))


def _most(values: Iterable[Any]) -> Any:
    """The most frequent value; of ties the smallest."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def _shape_key(dataset: Any) -> tuple[Any, ...]:
    orientation = dataset.get("ImageOrientationPatient") or ()
    return (int(dataset.Rows), int(dataset.Columns), tuple(round(float(x), 3) + 0.0 for x in orientation))


def _chosen(found: list[tuple[Path, Any]]) -> list[_Slice]:
    """Slices of the largest series that is no localizer, of its most frequent size and orientation, each once."""
    images = [(f, d) for f, d in found if "LOCALIZER" not in (d.get("ImageType") or ())] or found
    series = _most(str(d.get("SeriesInstanceUID", "")) for _, d in images)
    images = [(f, d) for f, d in images if str(d.get("SeriesInstanceUID", "")) == series]
    shape = _most(_shape_key(d) for _, d in images)
    if len(shape[2]) != 6 or any(len(d.get("PixelSpacing") or ()) != 2 for _, d in images):
        raise ValueError("Expected slices with orientation and pixel spacing, found none; convert the series again.")
    slices: dict[str, _Slice] = {}
    for file, dataset in images:
        if _shape_key(dataset) != shape:
            continue
        if len(dataset.get("ImagePositionPatient") or ()) != 3:
            raise ValueError("Expected a position in every slice, found one without; convert the series again.")
        position = np.array(dataset.ImagePositionPatient, np.float64)
        uid = str(dataset.get("SOPInstanceUID") or file.name)
        slices.setdefault(uid, _Slice(file, dataset, position, int(dataset.get("InstanceNumber") or 0)))
    return list(slices.values())


def _hu(one: _Slice) -> NDArray[np.int16]:
    """Pixels of a slice, rescaled by its own slope and intercept."""
    import pydicom

    dataset = pydicom.dcmread(one.file)
    syntax = getattr(getattr(dataset.file_meta, "TransferSyntaxUID", None), "name", "no transfer syntax")
    try:
        pixels = dataset.pixel_array
    except Exception as error:  # decoders of many libraries raise whatever they please
        raise ValueError(
            f"Expected pixel data that can be decoded ({syntax}), got {type(error).__name__}; "
            "convert the series or install a decoder."
        ) from error
    if pixels.ndim != 2:
        raise ValueError(f"Expected one grey value a pixel, got pixels of shape {pixels.shape[-1:]}.")
    slope, intercept = float(dataset.get("RescaleSlope") or 1), float(dataset.get("RescaleIntercept") or 0)
    if slope == 1 and intercept.is_integer():
        return to_int16(pixels.astype(np.int32) + int(intercept))
    return to_int16(pixels.astype(np.float32) * slope + intercept)
