"""Files of a CT series → Hounsfield units and an affine, whatever the format, order or transfer syntax.

Every failure is a ValueError of one sentence that names no file, so that it may be logged. The rules by which a series
is chosen from a folder are those of the loader's headers (`app/loading/images_dicom.py`); a test holds them together.
"""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
MILLIMETRES = {"meter": 1000.0, "mm": 1.0, "micron": 0.001}
FRAME_GROUPS = (
    "PlanePositionSequence",
    "PlaneOrientationSequence",
    "PixelMeasuresSequence",
    "PixelValueTransformationSequence",
)
UNEVEN = 0.01
"""Slice distances that differ by a larger share are interpolated to even ones."""
AIR = -1000
LEAST_SPACING_MM, MOST_SPACING_MM = 0.02, 100.0
"""Other spacings are those of a damaged header, or in another unit than it says."""
MOST_VOXELS = 2**30
"""More are a damaged header, or an attack on the memory."""
MOST_FRAMES = 65_536
HIGHEST_RATIO, FREE_BYTES = 200, 64 << 20
"""A file that unpacks to more than FREE_BYTES is not as much smaller; scans come to half or a fifth of their size."""
COMPRESSED = (".gz", ".bz2", ".zst")


class Unreadable(ValueError):
    """A scan that cannot be read as a CT volume; one sentence that names no file and no value of its header."""


class Gone(Unreadable):
    """A scan that is not at its place, or changed while it was read; another try may find it."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """Voxels as stored, in HU."""

    hu: NDArray[np.int16]
    """(I, J, K) in the file's own order."""
    affine: NDArray[np.float64]
    """(4, 4) voxel index → RAS millimetres."""


def spacing_of(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """(3,) distances of neighbouring voxels along each stored axis."""
    spacing: NDArray[np.float64] = np.sqrt((affine[:3, :3] ** 2).sum(0))
    return spacing


def is_plausible(affine: NDArray[np.float64]) -> bool:
    """Whether the spacing can be that of a CT scan, mm."""
    spacing = spacing_of(affine)
    return bool(((spacing > LEAST_SPACING_MM) & (spacing < MOST_SPACING_MM)).all() and np.isfinite(affine).all())


def to_int16(values: NDArray[Any]) -> NDArray[np.int16]:
    """Rounded HU; what is not a number is air."""
    if values.dtype == np.int16:
        return values
    if values.dtype.kind == "f":
        values = np.rint(np.nan_to_num(values, nan=AIR, posinf=32767, neginf=AIR))
    limits = np.iinfo(np.int16)
    result: NDArray[np.int16] = np.clip(values, limits.min, limits.max).astype(np.int16)
    return result


def decode(path: Path, format: str, files: Sequence[Path] = ()) -> Decoded:
    """A NIfTI file or a DICOM series, whatever state it is in.

    Args:
        path: a NIfTI file, a DICOM file, or the folder of a DICOM series.
        format: nifti or dicom.
        files: the series' own files where its folder holds others, too; else `path` is looked through.

    Raises:
        Unreadable: it is no CT volume, is damaged, or needs a decoder that is not installed.
    """
    if not path.exists():
        raise Gone(f"Expected a scan ({format}), found none at its place; check the root folder.")
    if not (path.is_file() or path.is_dir()):  # opening a pipe would wait for ever
        raise Unreadable(f"Expected a {format} file or folder, found a thing of another kind; check its path.")
    try:
        return decode_nifti(path) if format == "nifti" else decode_dicom(path, files)
    except (Unreadable, MemoryError):
        raise
    except FileNotFoundError:
        raise Gone(
            f"Expected all files of a scan ({format}), one went away while it was read; check the root."
        ) from None
    except OSError as error:
        if error.errno is not None:  # of the disk or the network, not of what the file holds
            raise
        raise Unreadable(
            f"Expected a readable {format} scan, got one that fails with {type(error).__name__}."
        ) from error
    except Exception as error:  # a damaged file makes the libraries raise almost anything, with its values in the text
        raise Unreadable(
            f"Expected a readable {format} scan, got one that fails with {type(error).__name__}."
        ) from error


def decode_nifti(path: Path, *, is_mask: bool = False) -> Decoded:
    """One NIfTI file: the header's slope and intercept applied once, its sform (else qform) as affine.

    A mask may have one byte a voxel; a scan may not, unless the header scales it.
    """
    import nibabel

    image: Any = nibabel.load(path)
    header, proxy = image.header, image.dataobj
    shape = tuple(n for axis, n in enumerate(image.shape) if axis < 3 or n != 1)
    _check_nifti(header, proxy, shape, is_mask)
    _check_ratio(path, proxy, shape)
    if header["sform_code"] <= 0 and not _has_spacing(image):
        raise Unreadable("Expected a spacing along each axis, got zero in the header; convert the scan again.")
    stored = proxy.slope == 1 and proxy.inter == 0
    values = np.asanyarray(proxy) if stored else image.get_fdata(dtype=np.float32, caching="unchanged")
    affine = np.array(image.affine, np.float64)
    scaled = affine.copy()
    scaled[:3] *= MILLIMETRES.get(header.get_xyzt_units()[0], 1.0)
    if not is_plausible(affine) or is_plausible(scaled):  # else the unit is wrong, not the numbers
        affine = scaled
    return Decoded(to_int16(values.reshape(shape)), affine)


def _has_spacing(image: Any) -> bool:
    """Whether the file's own header has one; nibabel puts 1 mm where it has zero."""
    from nibabel.openers import ImageOpener

    holder = image.file_map.get("header") or image.file_map["image"]
    with ImageOpener(holder.filename) as file:
        stored = type(image.header).from_fileobj(file, check=False)
    return bool((stored["pixdim"][1:4] != 0).all())


def _check_nifti(header: Any, proxy: Any, shape: tuple[int, ...], is_mask: bool) -> None:
    if math.prod(shape) > MOST_VOXELS:
        raise Unreadable(f"Expected a CT volume, got {math.prod(shape):,} voxels in the header; is the file damaged?")
    if len(shape) != 3:
        raise Unreadable(f"Expected a volume of three dimensions, got shape {shape}; split it into one file a volume.")
    if min(shape) < 2:
        raise Unreadable(f"Expected at least 2 voxels along each axis, got shape {shape}.")
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise Unreadable(f"Expected one number a voxel, got values of type {dtype}.")
    if dtype.itemsize == 1 and not is_mask and (proxy.slope, proxy.inter) == (1, 0):
        raise Unreadable("Expected Hounsfield units, got 8-bit values without a rescale; convert the scan again.")


def _check_ratio(path: Path, proxy: Any, shape: tuple[int, ...]) -> None:
    """Refuse, before anything is unpacked, a small compressed file whose header asks for very much."""
    wanted = math.prod(shape) * proxy.dtype.itemsize + max(0, int(proxy.offset))
    if path.suffix in COMPRESSED and wanted > max(FREE_BYTES, HIGHEST_RATIO * path.stat().st_size):
        raise Unreadable(
            f"Expected a compressed scan that unpacks to at most {HIGHEST_RATIO} times its size, got one whose header "
            f"asks for {wanted / 1e9:.2f} GB; is the file damaged?"
        )


@dataclass(frozen=True, slots=True)
class _Slice:
    """One image file, as far as choosing and placing it needs."""

    file: Path
    series: str
    uid: str
    shape: tuple[int, int]
    orientation: tuple[float, ...]
    """Six direction cosines, of rows then columns, or none."""
    position: tuple[float, ...]
    spacing: tuple[float, ...]
    """Of rows, then of columns, mm."""
    instance: int
    rescale: tuple[float, float]
    """Slope and intercept."""
    frame: int | None
    """Which frame of a multi-frame file; None where the file is one image."""
    is_localizer: bool

    @property
    def key(self) -> tuple[tuple[int, int], tuple[float, ...]]:
        """Size and orientation, which the slices of a volume share."""
        return self.shape, tuple(round(x, 3) + 0.0 for x in self.orientation)


def decode_dicom(path: Path, files: Sequence[Path] = ()) -> Decoded:
    """One DICOM series: the largest one of a folder, slices sorted by position, rescaled slice by slice.

    Copies of a slice and second slices at one position are dropped, slices of another size or orientation, too; uneven
    distances are interpolated to the median one.
    """
    slices = _chosen(_read_headers(files or _files(path)))
    _check_size(slices)
    row, column = np.array(slices[0].orientation[:3]), np.array(slices[0].orientation[3:])
    points = np.array([s.position for s in slices])
    along = points @ np.cross(row, column)
    order = sorted(range(len(slices)), key=lambda i: (round(float(along[i]), 2), slices[i].instance))
    kept = order[:1] + [j for i, j in pairwise(order) if along[j] - along[i] > 0.01]
    if len(kept) < 2:
        raise Unreadable("Expected slices at two positions or more, got one position; is this a localizer?")
    along, points = along[kept], points[kept]
    hu, count = _stack(slices[i] for i in kept), len(kept)
    gaps = np.diff(along)
    if np.ptp(gaps) > UNEVEN * np.median(gaps):
        if gaps.sum() / np.median(gaps) + 1 > 2 * count:
            raise Unreadable("Expected a whole series, found most of its slices missing; export it again.")
        hu, count = _even(hu, along, float(np.median(gaps)))
    spacing_y, spacing_x = slices[0].spacing
    affine = np.eye(4)
    affine[:3, :3] = np.stack([row * spacing_x, column * spacing_y, (points[-1] - points[0]) / (count - 1)], 1)
    affine[:3, 3] = points[0]
    return Decoded(hu.transpose(2, 1, 0), LPS_TO_RAS @ affine)


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


def _check_size(slices: Sequence[_Slice]) -> None:
    voxels = len(slices) * math.prod(slices[0].shape)
    if voxels > MOST_VOXELS:
        raise Unreadable(f"Expected a CT volume, got {voxels:,} voxels in the headers; is a file damaged?")


def _read_headers(files: Iterable[Path]) -> list[_Slice]:
    """The CT images among files; what is no image, or damaged, is passed over."""
    from pydicom import config

    config.settings.reading_validation_mode = config.IGNORE  # its warnings would show values
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    found = [one for file in files for one in _read_header(file)]
    if not found:
        raise Unreadable("Expected a DICOM series of modality CT, found no CT image there.")
    return found


def _read_header(file: Path) -> list[_Slice]:
    """The CT images of one file: one, or the frames of an enhanced CT object."""
    import pydicom

    try:
        ds = pydicom.dcmread(file, stop_before_pixels=True)
        if (ds.get("Modality") or "CT") != "CT":
            return []
        frames = int(ds.get("NumberOfFrames") or 1)
        if not 0 < frames <= MOST_FRAMES:
            return []
        if frames > 1 or "PerFrameFunctionalGroupsSequence" in ds:
            return [_slice(file, ds, _frame_groups(ds, k), k) for k in range(frames)]
        return [_slice(file, ds, ds, None)]
    except (FileNotFoundError, MemoryError):
        raise
    except Exception:  # not DICOM, not an image, or damaged in one of many ways
        return []


def _frame_groups(ds: Any, frame: int) -> Any:
    """What an enhanced object says of one frame, for itself or for all, as one flat data set."""
    from pydicom import Dataset

    flat = Dataset()
    for group in (ds.SharedFunctionalGroupsSequence[0], ds.PerFrameFunctionalGroupsSequence[frame]):
        for name in FRAME_GROUPS:
            if group.get(name):
                flat.update(group[name][0])
    return flat


def _slice(file: Path, ds: Any, place: Any, frame: int | None) -> _Slice:
    """An image; `place` holds what tells its position, spacing and rescale."""
    uid = str(ds.get("SOPInstanceUID") or file.name)
    return _Slice(
        file=file,
        series=str(ds.get("SeriesInstanceUID") or ""),
        uid=uid if frame is None else f"{uid}.{frame}",
        shape=(int(ds.Rows), int(ds.Columns)),
        orientation=tuple(float(x) for x in place.get("ImageOrientationPatient") or ()),
        position=tuple(float(x) for x in place.get("ImagePositionPatient") or ()),
        spacing=tuple(float(x) for x in place.get("PixelSpacing") or ()),
        instance=int(ds.get("InstanceNumber") or 0) if frame is None else frame,
        rescale=(float(place.get("RescaleSlope") or 1), float(place.get("RescaleIntercept") or 0)),
        frame=frame,
        is_localizer="LOCALIZER" in (ds.get("ImageType") or ()),
    )


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(f for f in path.iterdir() if f.is_file() and not f.name.startswith("."))
    return files or sorted(f for f in path.rglob("*") if f.is_file() and not f.name.startswith("."))


def _most(values: Iterable[Any]) -> Any:
    """The most frequent value; of ties the smallest."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def _chosen(found: list[_Slice]) -> list[_Slice]:
    """Slices of the largest series that is no localizer, of its most frequent size and orientation, each once."""
    images = [one for one in found if not one.is_localizer] or found
    series = _most(one.series for one in images)
    images = [one for one in images if one.series == series]
    key = _most(one.key for one in images)
    images = [one for one in images if one.key == key]
    if any(len(one.orientation) != 6 or len(one.spacing) != 2 for one in images):
        raise Unreadable("Expected slices with orientation and pixel spacing, found some without; convert them again.")
    if any(len(one.position) != 3 or not np.isfinite(one.position).all() for one in images):
        raise Unreadable("Expected a position in every slice, found one without; convert the series again.")
    return list({one.uid: one for one in reversed(images)}.values())[::-1]


def _stack(slices: Iterable[_Slice]) -> NDArray[np.int16]:
    """(K, rows, columns) HU, each slice by its own slope and intercept."""
    found, file, pixels = [], None, np.empty(0)
    for one in slices:
        if one.file != file:
            file, pixels = one.file, _pixels(one.file)
        image = pixels[one.frame] if one.frame is not None and pixels.ndim == 3 else pixels
        if image.ndim != 2:
            raise Unreadable(f"Expected one grey value a pixel, got pixels of shape {image.shape}.")
        slope, intercept = one.rescale
        if slope == 1 and intercept.is_integer():
            found.append(to_int16(image.astype(np.int32) + int(intercept)))
        else:
            found.append(to_int16(image.astype(np.float32) * slope + intercept))
    return np.stack(found)


@functools.cache
def _be_quiet() -> None:
    """Keep the library of JPEG decoders from writing what it dislikes in a file to stderr."""
    import contextlib

    with contextlib.suppress(ImportError):
        import gdcm

        for off in (gdcm.Trace.DebugOff, gdcm.Trace.WarningOff, gdcm.Trace.ErrorOff):
            off()


def _pixels(file: Path) -> NDArray[Any]:
    """Stored values of a file: (rows, columns), with frames before and samples behind where there are any."""
    import pydicom

    _be_quiet()
    dataset = pydicom.dcmread(file)
    syntax = getattr(getattr(dataset.file_meta, "TransferSyntaxUID", None), "name", "no transfer syntax")
    try:
        pixels: NDArray[Any] = dataset.pixel_array
    except MemoryError:
        raise
    except Exception as error:  # decoders of many libraries raise whatever they please
        raise Unreadable(
            f"Expected pixel data that can be decoded ({syntax}), got {type(error).__name__}; "
            "convert the series or install a decoder."
        ) from error
    return pixels
