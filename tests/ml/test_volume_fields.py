"""What a recipe says of a volume: where its grid lies, how fine it is along each axis, and what its numbers mean."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from app.loading.simulate_ehr import person
from app.loading.simulate_phantom import phantom
from ml import augment
from ml.config import from_dict, read_recipe
from ml.decoding import Unreadable
from ml.embed import to_input
from ml.volume_cache import Cached, Source, VolumeCache, volume_recipe
from ml.volume_centre import centre_of
from ml.volumes import WHOLE, VolumeRecipe, read_volume
from tests.app.loading.scans import write_dicom, write_nifti


def torso(shape: tuple[int, int, int] = (50, 60, 70), lungs: tuple[slice, ...] = ()) -> np.ndarray:
    """(Z, Y, X) HU at 3 mm: an elliptic trunk in air, a couch behind it, gas in the bowel, and two lungs."""
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    hu = np.full(shape, -1000, np.int16)
    hu[(y / 0.7) ** 2 + (x / 0.8) ** 2 < 1] = 40
    hu[:, 4, :] = 200
    for side in (-1, 1):
        hu[((z - 0.5) / 0.35) ** 2 + (y / 0.4) ** 2 + ((x - side * 0.4) / 0.25) ** 2 < 1] = -830
    hu[((z + 0.6) / 0.2) ** 2 + ((y - 0.2) / 0.3) ** 2 + (x / 0.4) ** 2 < 1] = -1000
    return hu


def save(path: Path, hu_zyx: np.ndarray, spacing: float = 3.0) -> Path:
    return write_nifti(path, hu_zyx.transpose(2, 1, 0), np.diag([spacing] * 3 + [1.0]))


def read(path: Path, **fields: object) -> np.ndarray:
    recipe = VolumeRecipe.from_dict({"shape_zyx": (24, 40, 48), "spacing_mm": 3.0, **fields})
    return read_volume(path, "dicom" if path.is_dir() else "nifti", recipe).voxels


def middle_of(marked: np.ndarray) -> np.ndarray:
    places = np.argwhere(marked)
    return (places.min(0) + places.max(0) + 1) / 2


def test_the_lungs_are_in_the_middle_whatever_gas_lies_below_them(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", torso(), 5.0)
    voxels = read(path, centre="lung", spacing_mm=5.0)
    np.testing.assert_allclose(middle_of(voxels == -830), [12, 20, 24], atol=1.5)
    assert (read(path, centre="body", spacing_mm=5.0) == -830).sum() < (voxels == -830).sum()


def test_a_scan_without_lungs_is_centred_on_the_body(tmp_path: Path) -> None:
    hu = torso()
    hu[hu == -830] = 40
    path = save(tmp_path / "a.nii.gz", hu)
    np.testing.assert_array_equal(read(path, centre="lung"), read(path, centre="body"))


@pytest.mark.parametrize("seed", range(6))
def test_the_lungs_of_simulated_persons_are_found(seed: int) -> None:
    """Independent of the search: where voxels of the lung's own HU lie, away from the borders of the scan."""
    voxels = phantom(0, seed, person(0, seed).biomarkers)
    found = centre_of(voxels, np.array([9.0] * 3), "lung") / 9
    lung = np.argwhere((voxels < -700) & (voxels > -900))
    inner = lung[(np.abs(lung - voxels.shape / np.array(2.0)) < np.array([16, 14, 14])).all(1)]
    np.testing.assert_allclose(found, np.percentile(inner, [3, 97], axis=0).mean(0) + 0.5, atol=4)


def test_the_lungs_of_a_real_chest_are_in_the_middle(real_data: Path) -> None:
    folder = real_data / "ct_lung_pet_ct_dx_A0001" / "3.000000-5mm-41315"
    recipe = VolumeRecipe((80, 96, 112), 3.0, centre="lung")
    voxels = read_volume(folder, "dicom", recipe).voxels
    lung = np.argwhere((voxels < -600) & (voxels > -950))
    assert len(lung) > 200_000
    np.testing.assert_allclose(lung.mean(0), [40, 48, 56], atol=8)


def test_a_mask_beside_the_scan_says_where_the_grid_lies_in_its_own_orientation(tmp_path: Path) -> None:
    hu = torso()
    hu[30:34, 20:24, 40:46] = 300
    path = save(tmp_path / "a.nii.gz", hu)
    mask = nibabel.Nifti1Image((hu.transpose(2, 1, 0) == 300).astype(np.uint8), np.diag([3.0, 3, 3, 1]))
    turned = nibabel.as_closest_canonical(mask).as_reoriented(np.array([[1, -1], [0, 1], [2, -1]]))
    nibabel.save(turned, tmp_path / "a.mask.nii.gz")
    np.testing.assert_allclose(middle_of(read(path, centre="mask") == 300), [12, 20, 24], atol=0.6)


def test_a_mask_stands_beside_the_folder_of_a_series(tmp_path: Path) -> None:
    series = write_dicom(tmp_path / "series")
    with pytest.raises(Unreadable, match="Expected a mask of the scan"):
        read(series, centre="mask")
    plain = read_volume(series, "dicom", VolumeRecipe((12, 16, 14), 3.0)).voxels
    image = write_nifti(tmp_path / "x.nii", plain.transpose(2, 1, 0))
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), tmp_path / "series.mask.nii")
    with pytest.raises(Unreadable, match="marks nothing"):
        read(series, centre="mask")
    assert image.is_file()


def test_another_mask_makes_another_volume(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", torso())
    cache = VolumeCache(tmp_path / "cache", VolumeRecipe((16, 16, 16), 3.0, centre="mask"))
    made = []
    for z in (5, 30):
        marked = np.zeros((70, 60, 50), np.uint8)
        marked[30:40, 20:30, z : z + 5] = 1
        nibabel.save(nibabel.Nifti1Image(marked, np.diag([3.0, 3, 3, 1])), tmp_path / "a.mask.nii")
        made.append(cache.prepare([Source(path, "nifti")])[Source(path, "nifti")])
    assert all(isinstance(one, Cached) for one in made)
    assert made[0] != made[1]


def test_each_axis_may_have_its_own_spacing(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", torso())
    fine, coarse = (read(path, spacing_mm=mm, shape_zyx=(12, 40, 48)) for mm in ((3.0, 3.0, 3.0), (6.0, 3.0, 3.0)))
    assert fine.shape == coarse.shape
    both = read(path, spacing_mm=3.0, shape_zyx=(12, 40, 48))
    np.testing.assert_array_equal(fine, both)
    wide = read(path, spacing_mm=3.0, shape_zyx=(24, 40, 48)).reshape(12, 2, 40, 48).mean(1)
    assert np.corrcoef(coarse.ravel(), wide.ravel())[0, 1] > 0.97


def test_minmax_keeps_the_scans_own_range_and_stretch_its_own_axes(tmp_path: Path) -> None:
    hu = torso()
    path = save(tmp_path / "a.nii", hu)
    recipe = VolumeRecipe(hu.shape, 2.0, scaling="minmax", grid="stretch")
    volume = read_volume(path, "nifti", recipe)
    wanted = (hu.astype(np.float64) + 1000) / 1200
    np.testing.assert_allclose(volume.voxels / WHOLE, wanted, atol=2e-5)
    np.testing.assert_allclose(volume.offset_hu + volume.step_hu * volume.voxels, hu, atol=0.05)
    half = read_volume(path, "nifti", VolumeRecipe((25, 30, 35), 2.0, scaling="minmax", grid="stretch")).voxels
    assert np.corrcoef(half.ravel(), wanted.reshape(25, 2, 30, 2, 35, 2).mean((1, 3, 5)).ravel())[0, 1] > 0.99
    flipped = nibabel.Nifti1Image(hu.transpose(2, 1, 0), np.diag([-3.0, 3, 3, 1]))
    nibabel.save(flipped, tmp_path / "b.nii")
    np.testing.assert_array_equal(read_volume(tmp_path / "b.nii", "nifti", recipe).voxels, volume.voxels)


def test_minmax_refuses_a_range_that_metal_would_decide(tmp_path: Path) -> None:
    hu = torso()
    hu[0, 0, 0] = 4001
    with pytest.raises(Unreadable, match=r"at most 5,000 HU .* got 5,001"):
        read(save(tmp_path / "a.nii", hu), scaling="minmax")
    hu[0, 0, 0] = 4000
    assert read(save(tmp_path / "b.nii", hu), scaling="minmax").max() <= WHOLE


def test_the_statistics_of_a_volume_are_hu_whatever_its_scaling(tmp_path: Path) -> None:
    source = Source(save(tmp_path / "a.nii", torso((40, 48, 48))), "nifti")
    found = []
    for scaling in ("window", "minmax"):
        recipe = VolumeRecipe((40, 48, 48), 3.0, scaling=scaling)
        cached = VolumeCache(tmp_path / "cache", recipe).prepare([source])[source]
        assert isinstance(cached, Cached)
        found.append((cached.mean_hu, cached.sd_hu))
    assert found[0] == pytest.approx(found[1], abs=0.1)


def test_an_encoder_sees_minmax_volumes_from_0_to_1() -> None:
    recipe = read_recipe("tiny", {"recipe": "paper", "rotate_degrees": "10"})
    voxels = torch.tensor([0, 16384, WHOLE], dtype=torch.int16).view(1, 1, 1, 3)
    np.testing.assert_allclose(to_input(voxels, recipe).flatten(), [0, 0.5, 1], atol=1e-4)
    volume = torch.full((1, 224, 224, 224), WHOLE, dtype=torch.int16)[:, :32, :32, :32]
    small = from_dict({**recipe.to_dict(), "shape_zyx": [32, 32, 32]})
    drawn = {k: torch.from_numpy(v) for k, v in augment.draw(small, 0, 0, np.arange(1)).items()}
    assert augment.apply(volume, drawn, small).min() >= 0, "what comes in from outside is the smallest value"


@pytest.mark.parametrize(("encoder", "output"), [("densenet121", ""), ("resnet152", ""), ("swinunetr", "decoder")])
def test_the_recipe_paper_is_there_for_every_published_encoder(encoder: str, output: str) -> None:
    recipe = read_recipe(encoder, {"recipe": "paper", "epochs": "3"})
    assert (recipe.batch, recipe.weight_decay, recipe.precision, recipe.schedule) == (1, 0, "float32", "plateau")
    assert (recipe.standardise, recipe.reduction, recipe.drop_without_events) == ("none", "mean", True)
    assert recipe.epochs == 3, "what is set by hand wins"
    assert output in ("", recipe.output)
    volume = volume_recipe(recipe)
    assert (volume.shape_zyx, volume.scaling, volume.grid) == ((224, 224, 224), "minmax", "stretch")
    assert volume == volume_recipe(read_recipe("tiny", {"recipe": "paper"})), "encoders share the volumes"


def test_recipes_of_older_checkpoints_have_one_spacing() -> None:
    recipe = read_recipe("tiny")
    assert from_dict({**recipe.to_dict(), "spacing_mm": 9.0}) == recipe
    assert recipe.spacing_zyx == (9.0, 9.0, 9.0)


def test_noise_in_hu_and_minmax_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="offset_hu and noise_hu of 0 for scaling=minmax"):
        read_recipe("tiny", {"scaling": "minmax", "noise_hu": "5"})
