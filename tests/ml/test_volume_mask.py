"""Masks: of which part of a scan a volume is made, and what is said of masks that are not of the scan."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.config import read_recipe
from ml.decoding import Decoded, Unreadable, decode
from ml.volume_cache import Cached, Source, VolumeCache, stem_of, volume_recipe
from ml.volume_mask import cut_out, marked_corners, middle_of
from ml.volumes import WHOLE, VolumeRecipe, read_volume
from tests.app.loading.scans import chest, write_dicom, write_nifti

CROP = VolumeRecipe((6, 8, 7), 3.0, grid="stretch", crop="mask")
CHEST = np.diag([3.0, 3, 3, 1])
REAL = "ct_lung_pet_ct_dx_A0001/3.000000-5mm-41315"


def save_mask(path: Path, marked: np.ndarray, affine: np.ndarray = CHEST) -> Path:
    nibabel.Nifti1Image(marked.astype(np.uint8), affine).to_filename(path)
    return path


def marked(shape: tuple[int, ...] = (14, 16, 12)) -> np.ndarray:
    """X 3 to 9, Y 4 to 11, Z 2 to 7."""
    mask = np.zeros(shape, bool)
    mask[3:10, 4:12, 2:8] = True
    return mask


def test_a_crop_is_the_box_of_the_mask_and_has_a_range_of_its_own(tmp_path: Path) -> None:
    hu = chest()
    hu[0, 0, 0] = 3000
    scan, mask = write_nifti(tmp_path / "a.nii.gz", hu), save_mask(tmp_path / "m.nii.gz", marked())
    box = hu[3:10, 4:12, 2:8].transpose(2, 1, 0)
    np.testing.assert_array_equal(read_volume(scan, "nifti", CROP, mask=mask).voxels, np.clip(box, -1000, 1000))
    scaled = read_volume(scan, "nifti", VolumeRecipe.from_dict(CROP.to_dict() | {"scaling": "minmax"}), mask=mask)
    expected = (box.astype(float) - box.min()) / (int(box.max()) - int(box.min())) * WHOLE
    np.testing.assert_allclose(scaled.voxels, expected, atol=1)


def test_a_mask_in_another_orientation_and_spacing_cuts_the_same_box(tmp_path: Path) -> None:
    scan = write_dicom(tmp_path / "series")
    fine = np.kron(marked(), np.ones((2, 2, 2)))
    affine = np.diag([1.5, 1.5, 1.5, 1.0])
    affine[:3, 3] = -0.75  # middles of half voxels
    image = nibabel.Nifti1Image(fine.astype(np.uint8), affine)
    nibabel.save(image.as_reoriented(np.array([[2, -1], [0, 1], [1, -1]])), tmp_path / "m.nii.gz")
    volume = read_volume(scan, "dicom", CROP, mask=tmp_path / "m.nii.gz").voxels
    decoded = decode(scan, "dicom")
    assert cut_out(decoded, marked_corners(tmp_path / "m.nii.gz", decoded)).shape == (7, 8, 6)
    # a DICOM series is stored from right to left and from front to back
    np.testing.assert_array_equal(volume, chest()[3:10, 4:12, 2:8].transpose(2, 1, 0)[:, ::-1, ::-1])


def test_the_mask_that_is_given_counts_before_the_one_beside_the_scan(tmp_path: Path) -> None:
    scan = write_nifti(tmp_path / "a.nii.gz")
    beside, given_mask = np.zeros((14, 16, 12), bool), marked()
    beside[:4, :4, :4] = True
    save_mask(tmp_path / "a.mask.nii.gz", beside)
    other = save_mask(tmp_path / "other.nii.gz", given_mask)
    with_own, with_beside = Source(scan, "nifti", (), other), Source(scan, "nifti")
    cache = VolumeCache(tmp_path / "cache", CROP)
    made = cache.prepare([with_own, with_beside])
    one, two = made[with_own], made[with_beside]
    assert isinstance(one, Cached)
    assert isinstance(two, Cached)
    assert one.file != two.file
    box = chest()[3:10, 4:12, 2:8].transpose(2, 1, 0)
    np.testing.assert_array_equal(cache.read(one), box)
    assert stem_of(with_own, VolumeRecipe((6, 8, 7), 3.0)) == stem_of(with_beside, VolumeRecipe((6, 8, 7), 3.0))


def shifted(by: float) -> np.ndarray:
    affine = CHEST.copy()
    affine[:3, 3] = by
    return affine


@pytest.mark.parametrize(
    ("mask", "affine", "says"),
    [
        (marked(), np.eye(4), "lies where its scan does, got a mask of the same 14 × 16 × 12 voxels up to 31 mm away"),
        (marked((20, 20, 20)), shifted(60), "of which 100% lies outside the scan's 14 × 16 × 12 voxels"),
        (np.zeros((14, 16, 12)), CHEST, "marks nothing"),
        (np.zeros((14, 16)), CHEST, "Of a mask: Expected a volume of three dimensions"),
    ],
)
def test_a_mask_that_is_not_of_the_scan_says_so(
    tmp_path: Path, mask: np.ndarray, affine: np.ndarray, says: str
) -> None:
    scan = write_nifti(tmp_path / "a.nii.gz")
    with pytest.raises(Unreadable) as error:
        read_volume(scan, "nifti", CROP, mask=save_mask(tmp_path / "m.nii.gz", mask, affine))
    assert says in str(error.value)
    assert "mask" in str(error.value)
    assert str(tmp_path) not in str(error.value)


def test_a_mask_that_is_no_nifti_file_or_not_there_says_so(tmp_path: Path) -> None:
    scan = write_nifti(tmp_path / "a.nii.gz")
    (tmp_path / "m.nii.gz").write_bytes(b"no mask")
    with pytest.raises(Unreadable, match="Expected a mask as a NIfTI file"):
        read_volume(scan, "nifti", CROP, mask=tmp_path / "m.nii.gz")
    with pytest.raises(Unreadable, match="Expected a mask of the scan"):
        read_volume(scan, "nifti", CROP, mask=tmp_path / "gone.nii.gz")


@given(
    order=st.permutations([0, 1, 2]),
    flips=st.tuples(*[st.sampled_from([-1, 1])] * 3),
    low=st.tuples(*[st.integers(0, 5)] * 3),
)
def test_boxes_do_not_depend_on_how_scan_and_mask_are_stored(order, flips, low, tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("masks")
    i, j, k = low
    mask = np.zeros((14, 16, 12), bool)
    mask[i : i + 4, j : j + 5, k : k + 6] = True
    turned = nibabel.Nifti1Image(chest(), CHEST).as_reoriented(np.column_stack([order, flips]))
    scan = Decoded(np.asanyarray(turned.dataobj), turned.affine)
    corners = marked_corners(save_mask(folder / "m.nii", mask), scan)
    back = nibabel.Nifti1Image(cut_out(scan, corners), np.eye(4)).as_reoriented(
        nibabel.orientations.ornt_transform(np.column_stack([order, flips]), np.array([[0, 1], [1, 1], [2, 1]]))
    )
    np.testing.assert_array_equal(
        np.sort(back.get_fdata(), None), np.sort(chest()[i : i + 4, j : j + 5, k : k + 6], None)
    )
    np.testing.assert_allclose(middle_of(corners), [3 * k + 7.5, 3 * j + 6, 3 * i + 4.5])


def test_the_recipe_paper_lung_is_paper_on_the_box_of_a_mask() -> None:
    recipe, paper = (read_recipe("densenet121", {"recipe": name}) for name in ("paper_lung", "paper"))
    assert volume_recipe(recipe) == VolumeRecipe(
        (160, 192, 224), (2.0, 2.0, 2.0), scaling="minmax", grid="stretch", crop="mask"
    )
    changed = {"shape_zyx": (224, 224, 224), "crop": "none"}
    assert {k: v for k, v in recipe.to_dict().items() if k not in changed} == {
        k: v for k, v in paper.to_dict().items() if k not in changed
    }
    with pytest.raises(ValueError, match="Expected grid=stretch for crop=lung, got grid=spacing"):
        read_recipe("densenet121", {"crop": "lung"})


def test_the_lungs_of_a_real_chest_are_cut_out_with_and_without_a_mask(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / REAL
    scan = decode(folder, "dicom")
    lung = np.zeros(scan.hu.shape, bool)
    lung[85:414, 155:407, 2:] = (scan.hu < -600)[85:414, 155:407, 2:]  # 277 × 212 × 310 mm, read off the images
    mask = save_mask(tmp_path / "lung.nii.gz", lung, scan.affine)
    recipe = {"shape_zyx": (62, 51, 66), "spacing_mm": 2.0, "grid": "stretch"}
    by_mask = read_volume(folder, "dicom", VolumeRecipe.from_dict(recipe | {"crop": "mask"}), mask=mask).voxels
    found = read_volume(folder, "dicom", VolumeRecipe.from_dict(recipe | {"crop": "lung"})).voxels
    whole = read_volume(folder, "dicom", VolumeRecipe.from_dict(recipe)).voxels
    apart = np.abs(found.astype(float) - by_mask).mean()
    assert apart < 0.35 * np.abs(whole.astype(float) - by_mask).mean()
    dense = [float((v[20:40, 20:31, 28:38] > -500).mean()) for v in (by_mask, found)]
    assert min(dense) > 0.5, "heart and great vessels are in the middle of the lungs' box"


def test_a_mask_of_another_real_scan_is_refused(real_data: Path, tmp_path: Path) -> None:
    other = nibabel.load(real_data / "ct_totalsegmentator" / "example_ct.nii.gz")
    mask = save_mask(tmp_path / "m.nii.gz", np.asanyarray(other.dataobj) > 100, other.affine)
    with pytest.raises(Unreadable, match="Expected a mask of this scan"):
        read_volume(real_data / REAL, "dicom", CROP, mask=mask)
