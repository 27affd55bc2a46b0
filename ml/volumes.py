"""One CT series as the volume an encoder sees: oriented, resampled, centred, clipped.

Shape suffixes: volumes are (Z, Y, X) in RAS order: Z towards the head, Y towards the front, X to the right.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ml.decoding import AIR, Decoded, Unreadable, decode, is_plausible, spacing_of
from ml.volume_centre import box_of, centre_of
from ml.volume_mask import cut_out, marked_corners, mask_of, middle_of

OBLIQUE = 0.02
"""Axes whose direction cosines are off by more are resampled through the whole affine."""
Filter = tuple[Any, NDArray[np.bool_], slice]
"""Of one axis: weights (n_out, used), sparse; which outputs lie inside the scan; which inputs are used."""
SLAB = 16
"""Rows resampled at a time, which bounds the memory."""
WIDEST_RANGE_HU = 5000


CENTRES = ("body", "middle", "lung", "mask")
SCALINGS = ("window", "minmax")
GRIDS = ("spacing", "stretch")
CROPS = ("none", "lung", "mask")
WHOLE = 32767
"""What the largest value of a scan becomes with scaling=minmax; the smallest becomes 0."""


@dataclass(frozen=True, slots=True)
class VolumeRecipe:
    """What a volume is; part of an encoder's recipe."""

    shape_zyx: tuple[int, int, int]
    spacing_mm: float | tuple[float, float, float]
    """Of the grid: the same along all axes, or of Z, Y and X."""
    low_hu: int = -1000
    high_hu: int = 1000
    centre: Literal["body", "middle", "lung", "mask"] = "body"
    """Centre of the grid: of the box around the body, the lungs or what the scan's mask marks, or of the scan."""
    scaling: Literal["window", "minmax"] = "window"
    """window: HU clipped to low_hu..high_hu; minmax: the scan's own range becomes 0 to WHOLE."""
    grid: Literal["spacing", "stretch"] = "spacing"
    """spacing: RAS, at spacing_mm, around the centre; stretch: each stored axis over the whole shape, as it lies."""
    crop: Literal["none", "lung", "mask"] = "none"
    """With grid=stretch, what is cut out ahead of all else: nothing, the box of the lungs or of what a mask marks."""

    @property
    def wants_mask(self) -> bool:
        """Whether a volume depends on the scan's mask."""
        return self.crop == "mask" or (self.grid == "spacing" and self.centre == "mask")

    @property
    def spacing_zyx(self) -> NDArray[np.float64]:
        """(3,) mm."""
        return np.broadcast_to(np.asarray(self.spacing_mm, np.float64), 3)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able and canonical: settings that are the defaults are left out, one spacing stands for three equal."""
        fields = asdict(self)
        fields["shape_zyx"] = list(self.shape_zyx)
        spacing = [float(mm) for mm in self.spacing_zyx]
        fields["spacing_mm"] = spacing[0] if len(set(spacing)) == 1 else spacing
        for name in ("scaling", "grid", "crop"):
            if fields[name] == VolumeRecipe.__dataclass_fields__[name].default:
                del fields[name]
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> VolumeRecipe:
        """What `to_dict` made, or the same with tuples."""
        spacing, shape = fields["spacing_mm"], tuple(fields["shape_zyx"])
        if not isinstance(spacing, int | float):
            spacing = tuple(float(mm) for mm in spacing)
        return cls(**{**fields, "shape_zyx": shape, "spacing_mm": spacing})


@dataclass(frozen=True, slots=True)
class Volume:
    """What an encoder sees of a scan."""

    voxels: NDArray[np.int16]
    """(Z, Y, X) HU clipped to the recipe's window; with scaling=minmax 0 to WHOLE."""
    content_sha256: bytes
    """Of the decoded voxels in RAS order and their spacing: equal content has one digest, whatever its file format."""
    padding_share: float
    """Share of the grid that lies outside the scan."""
    z_coverage: float
    """Length scanned along Z, mm."""
    offset_hu: float = 0.0
    step_hu: float = 1.0
    """HU = offset + step * voxel."""


@dataclass(frozen=True, slots=True)
class Canonical:
    """A scan in RAS order."""

    hu: NDArray[np.int16]
    """(Z, Y, X)."""
    spacing: NDArray[np.float64]
    """(3,) of Z, Y, X, mm."""
    directions: NDArray[np.float64]
    """(3, 3) unit columns of Z, Y, X in (Z, Y, X) coordinates; the identity where the axes are the body's."""
    origin: NDArray[np.float64]
    """(3,) Z, Y, X of the first voxel's middle, mm of the file's own coordinates."""


def read_volume(
    path: Path, format: str, recipe: VolumeRecipe, files: Sequence[Path] = (), mask: Path | None = None
) -> Volume:
    """Decode one series and bring it into the recipe's grid.

    A scan that has the recipe's shape and spacing is only clipped. Others are clipped, resampled by a triangle filter
    as wide as the coarser of both spacings (linear upwards, antialiased downwards) and padded with air.

    Args:
        path: a NIfTI file or a folder with a DICOM series.
        format: nifti or dicom.
        recipe: grid and window.
        files: the DICOM series' own files, where its folder holds others, too.
        mask: a NIfTI file that marks the part a recipe asks for; None for the one beside the scan.

    Raises:
        Unreadable: a ValueError; what is there cannot be read as a CT volume, in one sentence that names no file.
    """
    decoded = decode(path, format, files)
    scan = _canonical(decoded)
    _check_hounsfield(scan.hu)
    digest = _digest(scan)
    length = float(scan.hu.shape[0] * scan.spacing[0])
    corners = marked_corners(mask or mask_of(path), decoded) if recipe.wants_mask else None
    stored = _cropped(decoded, scan, recipe, corners).transpose(2, 1, 0)
    low, high, step = _window(stored, recipe)
    if recipe.grid == "stretch":
        voxels, padding = _sampled(stored, _stretched(stored.shape, recipe), low, high), 0.0
    elif _fits(scan, recipe):
        voxels, padding = np.clip(scan.hu, low, high), 0.0
    else:
        if np.abs(scan.directions - np.eye(3)).max() > OBLIQUE:
            scan = _straighten(scan, recipe, low, high)
        edge = scan.origin - scan.spacing / 2
        inside = centre_of(scan.hu, scan.spacing, recipe.centre) if corners is None else middle_of(corners) - edge
        voxels, padding = _resample(scan, recipe, inside, low, high)
    if recipe.scaling == "minmax":
        scaled = np.rint((voxels.astype(np.float32) - low) / step).astype(np.int16)
        return Volume(scaled, digest, padding, length, float(low), step)
    return Volume(np.rint(voxels).astype(np.int16), digest, padding, length)


def _fits(scan: Canonical, recipe: VolumeRecipe) -> bool:
    """Whether the scan is the grid already; one that is centred on a part of the body is moved all the same."""
    is_placed = recipe.centre in ("body", "middle") and scan.hu.shape == tuple(recipe.shape_zyx)
    return is_placed and np.allclose(scan.spacing, recipe.spacing_zyx, atol=1e-3)


def _cropped(
    decoded: Decoded, scan: Canonical, recipe: VolumeRecipe, corners: NDArray[np.float64] | None
) -> NDArray[np.int16]:
    """(I, J, K) the part of the stored voxels that the recipe takes."""
    if recipe.crop == "none":
        return decoded.hu
    if corners is None:
        low, high = box_of(scan.hu, scan.spacing, recipe.crop)
        places = np.stack(np.meshgrid(*zip(low, high, strict=True), indexing="ij"), -1).reshape(-1, 3)
        corners = (scan.origin + (places - scan.spacing / 2) @ scan.directions.T)[:, ::-1]
    return cut_out(decoded, corners)


def _window(hu: NDArray[np.int16], recipe: VolumeRecipe) -> tuple[int, int, float]:
    """Lowest and highest HU that are kept, and HU a step of the volume. Raises Unreadable for too wide a range."""
    if recipe.scaling == "window":
        return recipe.low_hu, recipe.high_hu, 1.0
    low, high = int(hu.min()), int(hu.max())
    if high - low > WIDEST_RANGE_HU:
        raise Unreadable(
            f"Expected at most {WIDEST_RANGE_HU:,} HU between the lowest and the highest voxel for scaling=minmax, got "
            f"{high - low:,}; one piece of metal would decide what all others become: use scaling=window."
        )
    return low, high, (high - low) / WHOLE


def _stretched(shape: tuple[int, ...], recipe: VolumeRecipe) -> list[Filter]:
    """Filters of a grid that lies over the whole scan, whatever its spacing."""
    return [_filter(n, 1.0, n / 2, n_out, n / n_out) for n, n_out in zip(shape, recipe.shape_zyx, strict=True)]


def _canonical(decoded: Decoded) -> Canonical:
    """Permute and flip the stored axes to the nearest RAS order."""
    from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

    if not is_plausible(decoded.affine):
        raise Unreadable("Expected a spacing between 0.02 and 100 mm along each axis, got another; convert it again.")
    orientation = io_orientation(decoded.affine)
    if np.isnan(orientation).any():
        raise Unreadable("Expected three independent axes, got an affine that has fewer; convert the scan again.")
    hu = apply_orientation(decoded.hu, orientation)
    affine = decoded.affine @ inv_ornt_aff(orientation, decoded.hu.shape)
    spacing = spacing_of(affine)
    directions = (affine[:3, :3] / spacing)[::-1, ::-1]
    # Formats keep spacings with different precision; 0.1 micrometre is more than any of them means.
    return Canonical(np.ascontiguousarray(hu.transpose(2, 1, 0)), spacing[::-1].round(4), directions, affine[2::-1, 3])


def _check_hounsfield(hu: NDArray[np.int16]) -> None:
    lowest, highest = int(hu.min()), int(hu.max())
    if lowest == highest:
        raise Unreadable(f"Expected a scan, got {lowest} in every voxel; export it again.")
    if lowest >= 0 or highest < -500:
        guess = "was its rescale left out" if lowest >= 0 else "was its rescale applied twice"
        raise Unreadable(
            f"Expected Hounsfield units, which hold air or fat and tissue, got values from {lowest} to {highest}; "
            f"{guess}? Convert the scan again."
        )
    if highest - lowest > WIDEST_RANGE_HU:
        sample = hu.ravel()[:: max(1, hu.size // 100_000)]
        low, high = np.percentile(sample, [1, 99])
        if high - low > WIDEST_RANGE_HU:
            raise Unreadable(
                f"Expected Hounsfield units, got values that span {high - low:.0f} between their 1st and 99th "
                "percentile; was its rescale wrong? Convert the scan again."
            )


def _digest(scan: Canonical) -> bytes:
    about = [*scan.hu.shape, *(round(float(s) * 10_000) for s in scan.spacing)]
    digest = hashlib.sha256(np.array(about, "<i8").tobytes())
    digest.update(np.ascontiguousarray(scan.hu, "<i2").data)
    return digest.digest()


def _straighten(scan: Canonical, recipe: VolumeRecipe, low_hu: int, high_hu: int) -> Canonical:
    """Resample an oblique or sheared (tilted gantry) scan to axes that are the body's."""
    from scipy.ndimage import affine_transform, gaussian_filter

    spacing = np.maximum(scan.spacing, recipe.spacing_zyx / 2)
    matrix = scan.directions * scan.spacing
    corners = np.stack(np.meshgrid(*[(-0.5, n - 0.5) for n in scan.hu.shape], indexing="ij"), -1).reshape(-1, 3)
    low, high = (corners @ matrix.T).min(0), (corners @ matrix.T).max(0)
    shape = np.maximum(2, np.ceil((high - low) / spacing - 1e-6)).astype(int)
    start = (low + high) / 2 - (shape - 1) / 2 * spacing
    hu = np.clip(scan.hu, low_hu, high_hu).astype(np.float32)
    blur = np.where(spacing > scan.spacing * 1.01, spacing / scan.spacing / 2.355, 0)
    if blur.any():
        hu = gaussian_filter(hu, blur, mode="nearest", truncate=2.5)
    inverse = np.linalg.inv(matrix)
    straight = affine_transform(
        hu, inverse * spacing, inverse @ start, output_shape=tuple(shape), order=1, cval=float(AIR), output=np.float32
    )
    return Canonical(np.rint(straight).astype(np.int16), spacing, np.eye(3), scan.origin + start)


def _resample(
    scan: Canonical, recipe: VolumeRecipe, centre: NDArray[np.float64], low_hu: int, high_hu: int
) -> tuple[NDArray[Any], float]:
    """The recipe's grid around the centre (mm from the scan's edges), and the share of it that is padding."""
    spacing = recipe.spacing_zyx
    filters = [
        _filter(n, float(mm), float(middle), n_out, float(out_mm))
        for n, mm, middle, n_out, out_mm in zip(
            scan.hu.shape, scan.spacing, centre, recipe.shape_zyx, spacing, strict=True
        )
    ]
    voxels = _sampled(scan.hu, filters, low_hu, high_hu, fine=recipe.scaling == "minmax")
    in_z, in_y, in_x = (inside for _, inside, _ in filters)
    pad = np.clip(AIR, low_hu, high_hu)
    voxels[~in_z], voxels[:, ~in_y], voxels[:, :, ~in_x] = pad, pad, pad
    return voxels, float(1 - in_z.mean() * in_y.mean() * in_x.mean())


def _sampled(
    hu: NDArray[np.int16], filters: Sequence[Filter], low_hu: int, high_hu: int, *, fine: bool = True
) -> NDArray[Any]:
    """(Z, Y, X) HU of the filters' grid: float32 where `fine`, else rounded to int16."""
    (z, _, used_z), (y, _, used_y), (x, _, used_x) = filters
    used = hu[used_z, used_y, used_x]
    pages = np.empty((z.shape[0], *used.shape[1:]), np.float32)
    for k in range(0, used.shape[1], SLAB):
        slab = np.clip(used[:, k : k + SLAB], low_hu, high_hu).astype(np.float32)
        pages[:, k : k + SLAB] = (z @ slab.reshape(len(slab), -1)).reshape(len(pages), -1, slab.shape[2])
    flat = ((x @ (y @ page).T).T for page in pages)
    return np.stack([page if fine else np.rint(page).astype(np.int16) for page in flat])


def _filter(n: int, mm: float, centre: float, n_out: int, out_mm: float) -> Filter:
    """Weights (n_out, used) of one axis, sparse, which outputs lie inside the scan, and which inputs are used.

    Positions are millimetres from the scan's edge. Where the spacings agree the grid snaps to the voxels.
    """
    from scipy.sparse import csr_array

    position = centre + (np.arange(n_out) - (n_out - 1) / 2) * out_mm
    if abs(mm - out_mm) < 1e-3:
        position += (round(position[0] / mm - 0.5) + 0.5) * mm - position[0]
    inside = (position >= 0) & (position <= n * mm)
    width = max(mm, out_mm)
    weights = np.maximum(0, 1 - np.abs(position[:, None] - (np.arange(n) + 0.5) * mm) / width)
    weights[~inside] = 0
    weights[inside] /= weights[inside].sum(1, keepdims=True)
    columns = np.flatnonzero(weights.any(0))
    used = slice(int(columns[0]), int(columns[-1]) + 1) if len(columns) else slice(0, 1)
    return csr_array(weights[:, used], dtype=np.float32), inside, used
