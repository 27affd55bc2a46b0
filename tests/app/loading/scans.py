"""Small scans made on the fly, NIfTI and DICOM, with any one fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid


def chest(shape: tuple[int, int, int] = (14, 16, 12), seed: int = 0) -> np.ndarray:
    """Air around a body of tissue, (X, Y, Z) int16 HU, without symmetry."""
    rng = np.random.default_rng(seed)
    hu = np.full(shape, -1000, np.int16)
    inner = tuple(slice(2, n - 1) for n in shape)
    hu[inner] = rng.integers(-100, 300, hu[inner].shape)
    return hu


def write_nifti(path: Path, hu: np.ndarray | None = None, affine: np.ndarray | None = None) -> Path:
    """A NIfTI file; 3 mm RAS unless told otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(
        chest() if hu is None else hu, np.diag([3.0, 3, 3, 1]) if affine is None else affine
    ).to_filename(path)
    return path


Edit = Callable[[int, FileDataset], Any]


def write_dicom(folder: Path, hu: np.ndarray | None = None, *, edit: Edit = lambda k, ds: None, **fields: Any) -> Path:
    """An axial series, one file a slice; `hu` is (X, Y, Z) in RAS order at 3 mm.

    `edit(k, dataset)` changes slice k before it is written; a slice for which it returns False is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    voxels = chest() if hu is None else hu
    study, series = generate_uid(entropy_srcs=[str(folder), "s"]), generate_uid(entropy_srcs=[str(folder)])
    nx, ny, nz = voxels.shape
    for k in range(nz):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(folder), str(k)])
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds = FileDataset(str(folder), {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.Modality = study, series, "CT"
        ds.PatientID, ds.ImageType = "1", ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.StudyDate, ds.SeriesDate, ds.SeriesTime = "20150203", "20150203", "101112.5"
        ds.Rows, ds.Columns, ds.PixelSpacing = ny, nx, [3, 3]
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.ImagePositionPatient = [-3.0 * (nx - 1), -3.0 * (ny - 1), 3.0 * k]
        ds.InstanceNumber, ds.SliceThickness, ds.ConvolutionKernel = k + 1, 5, "B30f"
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
        ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
        for name, value in fields.items():
            setattr(ds, name, value)
        # RAS (x, y) → DICOM rows go to the back, columns to the left
        set_pixels(ds, voxels[::-1, ::-1, k].T)
        if edit(k, ds) is not False:
            pydicom.dcmwrite(folder / f"{k:03d}.dcm", ds)
    return folder


def set_pixels(ds: FileDataset, hu: np.ndarray) -> None:
    """Store HU by the slice's own rescale."""
    stored = (hu.astype(np.float64) - float(ds.RescaleIntercept)) / float(ds.RescaleSlope)
    ds.PixelData = np.rint(stored).astype("<i2").tobytes()


def write_enhanced(folder: Path, hu: np.ndarray | None = None) -> Path:
    """The same series as one enhanced CT object, its frames out of order and each with a rescale of its own."""
    voxels = chest() if hu is None else hu
    series = write_dicom(folder / "frames", voxels)
    slices = [pydicom.dcmread(file) for file in sorted(series.iterdir())]
    one, order = slices[0].copy(), [*range(1, len(slices), 2), *range(0, len(slices), 2)]
    measures, orientation = Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = one.PixelSpacing, one.SliceThickness
    orientation.ImageOrientationPatient = one.ImageOrientationPatient
    shared = Dataset()
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    frames, pixels = [], b""
    for k in order:
        position, values, frame = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = slices[k].ImagePositionPatient
        values.RescaleSlope, values.RescaleIntercept, values.RescaleType = 1, -1000 - k, "HU"
        frame.PlanePositionSequence, frame.PixelValueTransformationSequence = [position], [values]
        frames.append(frame)
        slices[k].RescaleIntercept = -1000 - k
        set_pixels(slices[k], voxels[::-1, ::-1, k].T)
        pixels += slices[k].PixelData
    one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    one.SharedFunctionalGroupsSequence, one.PerFrameFunctionalGroupsSequence = [shared], frames
    one.NumberOfFrames, one.PixelData = len(frames), pixels
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"):
        delattr(one, name)
    target = folder / "enhanced"
    target.mkdir()
    pydicom.dcmwrite(target / "all.dcm", one)
    return target
