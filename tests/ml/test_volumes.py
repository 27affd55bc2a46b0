"""Volumes: every storage of the same scan gives the same voxels, and what cannot be read says why."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset
from pydicom.uid import JPEG2000Lossless, JPEGLosslessSV1, RLELossless

from app.loading.simulate_ehr import person
from app.loading.simulate_phantom import phantom, write_phantom
from ml import decoding
from ml.config import read_recipe
from ml.volume_cache import volume_recipe
from ml.volumes import Volume, VolumeRecipe, read_volume
from tests.app.loading.scans import chest, set_pixels, write_dicom, write_enhanced, write_nifti

TINY, STANDARD = (volume_recipe(read_recipe(encoder)) for encoder in ("tiny", "densenet121"))
SMALL = VolumeRecipe((12, 16, 14), 3.0)


def native(recipe_hu: np.ndarray) -> np.ndarray:
    """(X, Y, Z) → what SMALL gives, for a scan that fits it exactly."""
    return recipe_hu.transpose(2, 1, 0)


def read(path: Path, recipe: VolumeRecipe = SMALL) -> Volume:
    return read_volume(path, "dicom" if path.is_dir() else "nifti", recipe)


def test_a_simulated_phantom_comes_through_unchanged(tmp_path: Path) -> None:
    voxels = phantom(0, 0, person(0, 0).biomarkers)
    write_phantom(tmp_path / "a.nii", voxels)
    volume = read(tmp_path / "a.nii", TINY)
    np.testing.assert_array_equal(volume.voxels, np.clip(voxels, -1000, 1000))
    assert volume.voxels.dtype == np.int16
    assert volume.padding_share == 0
    assert volume.z_coverage == 32 * 9


@pytest.mark.parametrize("axes", ["RAS", "LPS", "RSA", "PIR", "ASL", "LAI"])
def test_every_storage_order_gives_the_same_volume_and_digest(tmp_path: Path, axes: str) -> None:
    image = nibabel.Nifti1Image(chest(), np.diag([3.0, 3, 3, 1]))
    wanted = nibabel.orientations.axcodes2ornt(axes)
    image.as_reoriented(
        nibabel.orientations.ornt_transform(nibabel.orientations.io_orientation(image.affine), wanted)
    ).to_filename(tmp_path / "a.nii.gz")
    write_nifti(tmp_path / "plain.nii.gz")
    volume, plain = read(tmp_path / "a.nii.gz"), read(tmp_path / "plain.nii.gz")
    np.testing.assert_array_equal(volume.voxels, native(chest()))
    assert volume.content_sha256 == plain.content_sha256


def test_a_dicom_series_equals_the_same_scan_as_nifti(tmp_path: Path) -> None:
    write_dicom(tmp_path / "series")
    write_nifti(tmp_path / "a.nii.gz")
    series, file = read(tmp_path / "series"), read(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(series.voxels, native(chest()))
    assert series.content_sha256 == file.content_sha256
    assert series.z_coverage == 12 * 3  # from positions: the slice thickness says 5 mm


def test_an_enhanced_object_equals_the_same_slices_one_by_one(tmp_path: Path) -> None:
    volume = read(write_enhanced(tmp_path))
    np.testing.assert_array_equal(volume.voxels, native(chest()))
    assert volume.content_sha256 == read(tmp_path / "frames").content_sha256


def per_slice_rescale(k: int, ds: FileDataset) -> None:
    ds.RescaleSlope, ds.RescaleIntercept = (1, -1024) if k % 2 else (1, -500 - k)
    set_pixels(ds, chest()[::-1, ::-1, k].T)


def renumber(k: int, ds: FileDataset) -> None:
    ds.InstanceNumber = 100 - k


def compress(syntax: str):
    def edit(k: int, ds: FileDataset) -> None:
        if syntax == RLELossless:
            ds.compress(RLELossless, encoding_plugin="pydicom")
        else:
            ds.compress(syntax, j2k_cr=None, encoding_plugin="pylibjpeg")

    return edit


def copy_slice(k: int, ds: FileDataset) -> None:
    if k == 3:
        pydicom.dcmwrite(Path(ds.filename) / "zz_copy.dcm", ds)


def second_at_same_position(k: int, ds: FileDataset) -> None:
    if k == 3:
        other = pydicom.dcmread(Path(ds.filename) / "002.dcm")
        other.SOPInstanceUID, other.InstanceNumber = "1.2.3", 99
        other.ImagePositionPatient = ds.ImagePositionPatient
        pydicom.dcmwrite(Path(ds.filename) / "zz_second.dcm", other)


def stray(k: int, ds: FileDataset) -> None:
    folder = Path(ds.filename)
    if k == 0:
        (folder / "notes.txt").write_text("not an image")
        (folder / "empty.dcm").write_bytes(b"")
    if k < 3:
        other = pydicom.dcmread(folder / "000.dcm") if k else None
        if other is not None:
            other.SeriesInstanceUID, other.SOPInstanceUID = "1.2.4", f"1.2.4.{k}"
            pydicom.dcmwrite(folder / f"other{k}.dcm", other)


@pytest.mark.parametrize(
    "edit", [per_slice_rescale, renumber, compress(RLELossless), copy_slice, second_at_same_position, stray]
)
def test_what_does_not_change_the_scan_does_not_change_the_volume(tmp_path: Path, edit) -> None:
    volume = read(write_dicom(tmp_path / "series", edit=edit))
    np.testing.assert_array_equal(volume.voxels, native(chest()))


def test_one_lost_slice_is_interpolated(tmp_path: Path) -> None:
    hu = chest()
    hu[:] = hu[:, :, :1]
    hu[2:-1, 2:-1] = np.arange(12) * 20
    volume = read(write_dicom(tmp_path / "series", hu, edit=lambda k, ds: k != 5))
    np.testing.assert_array_equal(volume.voxels, native(hu))


def test_a_slice_of_another_size_is_left_out(tmp_path: Path) -> None:
    def edit(k: int, ds: FileDataset) -> None:
        if k == 11:
            ds.Rows, ds.Columns = 4, 4
            ds.PixelData = np.zeros((4, 4), "<i2").tobytes()

    assert read(write_dicom(tmp_path / "series", edit=edit)).z_coverage == 11 * 3


def test_rescale_is_applied_once(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image((chest() + 1024).astype(np.uint16), np.diag([3.0, 3, 3, 1]))
    image.header.set_slope_inter(1, -1024)
    image.header.set_data_dtype(np.uint16)
    raw = nibabel.Nifti1Image.from_bytes(image.to_bytes())
    raw.to_filename(tmp_path / "a.nii")
    # nibabel rescales on writing, so the header is set by hand
    content = bytearray((tmp_path / "a.nii").read_bytes())
    data = (chest() + 1024).astype("<u2").tobytes(order="F")
    content[112:120] = np.array([1, -1024], "<f4").tobytes()
    content[352:] = data
    (tmp_path / "a.nii").write_bytes(content)
    np.testing.assert_array_equal(read(tmp_path / "a.nii").voxels, native(chest()))


def test_not_a_number_is_air_and_metres_are_metres(tmp_path: Path) -> None:
    hu = chest().astype(np.float32)
    hu[5, 5, 5], hu[6, 6, 6], hu[7, 7, 7] = np.nan, -np.inf, np.inf
    image = nibabel.Nifti1Image(hu, np.diag([0.003, 0.003, 0.003, 1]))
    image.header.set_xyzt_units("meter")
    image.to_filename(tmp_path / "a.nii")
    volume = read(tmp_path / "a.nii").voxels
    assert volume[5, 5, 5] == volume[6, 6, 6] == -1000
    assert volume[7, 7, 7] == 1000


def test_a_fourth_axis_of_length_one_is_dropped(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii", chest()[..., None])
    np.testing.assert_array_equal(read(tmp_path / "a.nii").voxels, native(chest()))


def smooth(shape: tuple[int, int, int], mm: tuple[float, float, float]) -> np.ndarray:
    """A ball of tissue with a gradient inside, drawn at any spacing around the same centre."""
    x, y, z = (
        ((np.arange(n) - (n - 1) / 2) * d).reshape([-1 if k == i else 1 for k in range(3)])
        for i, (n, d) in enumerate(zip(shape, mm, strict=True))
    )
    radius = np.sqrt(x * x + y * y + z * z)
    return np.clip(40 + x - 2 * y + 3 * z - 20 * np.maximum(0, radius - 30), -1000, 1000).astype(np.float32)


def test_resampling_agrees_with_the_scan_drawn_at_the_wanted_spacing(tmp_path: Path) -> None:
    recipe = VolumeRecipe((40, 44, 48), 3.0, centre="middle")
    fine = (120, 110, 72)
    write_nifti(tmp_path / "a.nii", smooth(fine, (1.2, 1.2, 2.0)), np.diag([1.2, 1.2, 2.0, 1]))
    volume = read(tmp_path / "a.nii", recipe).voxels
    wanted = smooth((48, 44, 40), (3, 3, 3)).transpose(2, 1, 0)
    inside = wanted > -500
    assert np.abs(volume - wanted)[inside].mean() < 12
    assert np.corrcoef(volume.ravel(), wanted.ravel())[0, 1] > 0.999


def test_downsampling_averages_noise_away(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noisy = np.clip(rng.normal(-200, 200, (96, 96, 96)), -1000, 1000).astype(np.int16)
    write_nifti(tmp_path / "a.nii", noisy, np.diag([1.0, 1, 1, 1]))
    volume = read(tmp_path / "a.nii", VolumeRecipe((16, 16, 16), 6.0))
    assert volume.voxels[2:-2, 2:-2, 2:-2].std() < 20  # every sixth voxel would keep all 200
    assert abs(volume.voxels.mean() + 200) < 5


def test_a_tilted_gantry_gives_the_body_upright(tmp_path: Path) -> None:
    """A sheared affine: slices stored without the shift that the tilt causes."""
    recipe = VolumeRecipe((20, 24, 24), 4.0)
    tilt = np.tan(np.radians(15))
    upright = smooth((96, 128, 60), (1, 1, 2))
    affine = np.diag([1.0, 1, 2, 1])
    affine[1, 2] = 2 * tilt
    sheared = np.full_like(upright, -1000)
    for k in range(60):
        shift = round((k - 29.5) * 2 * tilt)
        sheared[:, :, k] = np.roll(upright[:, :, k], -shift, axis=1)
    write_nifti(tmp_path / "tilted.nii", sheared, affine)
    write_nifti(tmp_path / "upright.nii", upright, np.diag([1.0, 1, 2, 1]))
    tilted, wanted = read(tmp_path / "tilted.nii", recipe).voxels, read(tmp_path / "upright.nii", recipe).voxels
    assert np.corrcoef(tilted.ravel(), wanted.ravel())[0, 1] > 0.995
    assert np.corrcoef(np.roll(tilted, 2, 1).ravel(), wanted.ravel())[0, 1] < 0.97


def test_the_grid_is_centred_on_the_body_and_padded_with_air(tmp_path: Path) -> None:
    hu = np.full((60, 60, 30), -1000, np.int16)
    hu[40:56, 10:26, 8:24] = 50
    hu[:, 58, :] = 300  # a couch
    write_nifti(tmp_path / "a.nii", hu, np.diag([3.0, 3, 3, 1]))
    volume = read(tmp_path / "a.nii", VolumeRecipe((40, 40, 40), 3.0))
    dense = np.argwhere(volume.voxels == 50)
    np.testing.assert_allclose((dense.min(0) + dense.max(0)) / 2, [19.5] * 3, atol=1)
    assert volume.padding_share == pytest.approx(1 - 30 / 40 * 32 / 40, abs=0.05)
    middle = read(tmp_path / "a.nii", VolumeRecipe((40, 40, 40), 3.0, centre="middle"))
    assert middle.padding_share == pytest.approx(0.25, abs=0.01)


def four_dimensional(folder: Path) -> Path:
    return write_nifti(folder / "a.nii", np.stack([chest()] * 3, -1))


def truncated_gzip(folder: Path) -> Path:
    path = write_nifti(folder / "a.nii.gz")
    path.write_bytes(path.read_bytes()[:-2000])
    return path


def truncated(folder: Path) -> Path:
    path = write_nifti(folder / "a.nii")
    path.write_bytes(path.read_bytes()[:-2000])
    return path


def no_image(folder: Path) -> Path:
    path = folder / "a.nii.gz"
    path.write_bytes(gzip.compress(b"hello " * 100))
    return path


def eight_bit(folder: Path) -> Path:
    return write_nifti(folder / "a.nii", (chest() // 8 + 128).clip(0, 255).astype(np.uint8))


def constant(folder: Path) -> Path:
    return write_nifti(folder / "a.nii", np.zeros((14, 16, 12), np.int16))


def not_rescaled(folder: Path) -> Path:
    return write_nifti(folder / "a.nii", (chest() + 1024).astype(np.int16))


def rescaled_twice(folder: Path) -> Path:
    return write_nifti(folder / "a.nii", np.minimum(chest() - 1024, -700).astype(np.int16))


def wide_range(folder: Path) -> Path:
    return write_nifti(folder / "a.nii", (chest() * 20).astype(np.int16))


def zero_spacing(folder: Path) -> Path:
    path = folder / "a.nii"
    image = nibabel.Nifti1Image(chest(), None)  # neither sform nor qform
    content = bytearray(image.to_bytes())
    content[88:92] = bytes(4)
    path.write_bytes(content)
    return path


def one_slice(folder: Path) -> Path:
    return write_nifti(folder / "a.nii", chest()[:, :, :1])


def empty_folder(folder: Path) -> Path:
    (folder / "series").mkdir()
    return folder / "series"


def one_position(folder: Path) -> Path:
    return write_dicom(folder / "series", ImagePositionPatient=[0, 0, 0])


def no_position(folder: Path) -> Path:
    return write_dicom(folder / "series", edit=lambda k, ds: ds.__delattr__("ImagePositionPatient"))


def other_modality(folder: Path) -> Path:
    return write_dicom(folder / "series", Modality="MR")


def short_pixels(folder: Path) -> Path:
    def edit(k: int, ds: FileDataset) -> None:
        if k == 4:
            ds.PixelData = ds.PixelData[:100]

    return write_dicom(folder / "series", edit=edit)


def no_decoder(folder: Path) -> Path:
    def edit(k: int, ds: FileDataset) -> None:
        ds.file_meta.TransferSyntaxUID = JPEGLosslessSV1
        ds.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
        ds["PixelData"].VR = "OB"
        ds["PixelData"].is_undefined_length = True

    return write_dicom(folder / "series", edit=edit)


def missing(folder: Path) -> Path:
    return folder / "a.nii"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (four_dimensional, "three dimensions"),
        (truncated_gzip, "readable nifti"),
        (truncated, "readable nifti"),
        (no_image, "readable nifti"),
        (eight_bit, "8-bit"),
        (constant, "in every voxel"),
        (not_rescaled, "Hounsfield units"),
        (rescaled_twice, "Hounsfield units"),
        (wide_range, "span"),
        (zero_spacing, "spacing"),
        (one_slice, "at least 2"),
        (empty_folder, "DICOM series"),
        (one_position, "one position"),
        (no_position, "position in every slice"),
        (other_modality, "modality CT"),
        (short_pixels, "can be decoded"),
        (no_decoder, "JPEG Lossless"),
        (missing, "found none"),
    ],
)
def test_what_cannot_be_read_says_why_in_one_sentence_without_naming_a_file(tmp_path: Path, make, says: str) -> None:
    path = make(tmp_path)
    with pytest.raises(ValueError, match=says) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith("Expected")
    assert str(tmp_path) not in message
    assert "\n" not in message


def test_all_volumes_of_the_real_manifest_decode_with_both_recipes(real_data: Path) -> None:
    with (real_data / "manifest_gibleed_celecoxib.csv").open() as file:
        paths = sorted({row["path"] for row in csv.DictReader(file)})
    assert len(paths) == 5
    digests = set()
    for path in paths:
        for recipe in (TINY, STANDARD):
            volume = read(real_data / path, recipe)
            assert volume.voxels.shape == recipe.shape_zyx
            assert volume.voxels.dtype == np.int16
            assert volume.voxels.min() == -1000
            assert volume.voxels.max() > 200
            assert 0 <= volume.padding_share < 0.9
            digests.add(volume.content_sha256)
    assert len(digests) == 5


def test_real_dicom_equals_its_published_nifti(real_data: Path) -> None:
    folder = real_data / "ct_ibsi" / "ibsi_validation"
    series = read(folder / "dicom/STS_044/CT/image", STANDARD)
    file = read(folder / "nifti/STS_044/CT_image.nii.gz", STANDARD)
    np.testing.assert_array_equal(series.voxels, file.voxels)
    assert series.content_sha256 == file.content_sha256


@pytest.mark.parametrize("name", ["rle", "j2k_lossless", "reversed_instance_numbers", "per_slice_rescale_differs"])
def test_another_encoding_of_a_real_series_equals_it(real_data: Path, name: str) -> None:
    folder = real_data / "dicom_derived_tricky"
    if not (folder / name).is_dir():
        pytest.skip(f"these extracts have no {name}")
    assert read(folder / name).content_sha256 == read(folder / "ok_shuffled_names").content_sha256


def test_orientations_of_a_real_scan_are_equal(real_data: Path) -> None:
    folder = real_data / "nifti_derived_tricky"
    plain = read(folder / "base_ras_i16.nii.gz", STANDARD)
    others = sorted(folder.glob("same_voxels_*.nii.gz"))
    assert len(others) >= 2
    for path in others:
        np.testing.assert_array_equal(read(path, STANDARD).voxels, plain.voxels)


def test_real_jpeg_2000_of_a_real_scan_decodes(real_data: Path) -> None:
    volume = read(real_data / "ct_totalsegmentator" / "example_ct_dicom", STANDARD)
    header = pydicom.dcmread(next(iter((real_data / "ct_totalsegmentator/example_ct_dicom").iterdir())))
    assert header.file_meta.TransferSyntaxUID == JPEG2000Lossless
    assert volume.z_coverage == pytest.approx(40)  # 20 slices 2 mm apart, though 3 mm thick


JPEG_SYNTAXES = {
    "lossless": "JPEGLosslessProcess14_1",
    "lossless of any predictor": "JPEGLosslessProcess14",
    "JPEG-LS": "JPEGLSLossless",
}


@pytest.mark.parametrize("syntax", JPEG_SYNTAXES.values(), ids=JPEG_SYNTAXES.keys())
def test_a_real_series_in_another_jpeg_has_the_same_voxels(real_data: Path, tmp_path: Path, syntax: str) -> None:
    import gdcm

    plain = real_data / "dicom_derived_tricky" / "ok_shuffled_names"
    for file in plain.iterdir():
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(str(file))
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        writer.SetFileName(str(tmp_path / file.name))
        assert writer.Write()
    assert pydicom.dcmread(next(tmp_path.iterdir())).file_meta.TransferSyntaxUID.is_compressed
    assert read(tmp_path).content_sha256 == read(plain).content_sha256


@pytest.mark.parametrize(
    "name", ["compressed", "compressed_j2k", "compressed_jpeg", "compressed_jpegls", "compressed_rle"]
)
def test_pixels_of_every_compression_equal_the_published_ones(real_data: Path, name: str) -> None:
    folder = real_data / "ct_dicom2nifti_tests" / "generic" / name
    truth = np.asanyarray(nibabel.load(folder / "001_ground_truth.nii.gz").dataobj)
    decoded = np.stack([decoding._pixels(file) for file in sorted((folder / "001").iterdir())])
    np.testing.assert_array_equal(decoded.transpose(2, 1, 0), truth)
