"""Chance changes of values: by MONAI's definitions, by seed, scan and epoch alone, and none unless asked for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from monai.transforms import AdjustContrast, ScaleIntensity, ShiftIntensity

from ml import augment
from ml.config import Recipe, read_recipe
from ml.volumes import WHOLE

SIZE = (8, 10, 12)
VALUES = ("gamma", "gain", "offset_hu", "noise_hu")


def recipe(**settings: float) -> Recipe:
    return read_recipe("tiny", {"shape_zyx": "8,10,12", "flip_x": "0"} | {k: str(v) for k, v in settings.items()})


def drawn(of: Recipe, rows: list[int], *, seed: int = 0, epoch: int = 0) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(a) for name, a in augment.draw(of, seed, epoch, np.array(rows)).items()}


def volumes(count: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(-1000, 1000, (count, *SIZE)).astype(np.int16))


@pytest.mark.parametrize("name", ["gamma", "gain", "offset_hu"])
def test_values_change_by_the_definitions_of_monai(name: str) -> None:
    of = recipe(**{name: 0.5 if name != "offset_hu" else 30})
    chance = drawn(of, [4, 5, 6])
    made = augment.apply(volumes(), chance, of)
    for volume, changed, (offset, _, gain, gamma) in zip(volumes(), made, chance["augment_hu"].tolist(), strict=True):
        twin = {
            "gamma": AdjustContrast(gamma),
            "gain": ScaleIntensity(minv=None, maxv=None, factor=gain - 1),
            "offset_hu": ShiftIntensity(offset),
        }[name]
        np.testing.assert_allclose(changed, twin(volume.float()), rtol=1e-4, atol=0.05)
        assert not torch.equal(changed, volume.float())


def test_noise_has_the_deviation_drawn_and_contrast_keeps_the_range() -> None:
    of = recipe(noise_hu=40)
    chance = drawn(of, [1, 2, 3])
    noise = augment.apply(volumes(), chance, of) - volumes().float()
    np.testing.assert_allclose(noise.std((1, 2, 3)), chance["augment_hu"][:, 1], rtol=0.1)
    contrast = recipe(gamma=2)
    made = augment.apply(volumes(), drawn(contrast, [1, 2, 3]), contrast)
    np.testing.assert_allclose(made.amin((1, 2, 3)), volumes().amin((1, 2, 3)), atol=0.01)
    np.testing.assert_allclose(made.amax((1, 2, 3)), volumes().amax((1, 2, 3)), atol=0.01)


def test_a_scan_changes_alike_in_whatever_batch_and_otherwise_in_another_epoch_or_seed() -> None:
    of = recipe(gamma=0.3, gain=0.1, offset_hu=10, noise_hu=20)
    together = augment.apply(volumes(), drawn(of, [7, 8, 9]), of)
    for i, row in enumerate([7, 8, 9]):
        alone = augment.apply(volumes()[i : i + 1], drawn(of, [row]), of)
        torch.testing.assert_close(alone[0], together[i])
    for other in (drawn(of, [7, 8, 9], epoch=1), drawn(of, [7, 8, 9], seed=1), drawn(of, [6, 8, 9])):
        assert not torch.equal(augment.apply(volumes(), other, of)[0], together[0])


def test_values_stay_as_they_are_by_default_and_bounds_are_held() -> None:
    plain = recipe()
    assert all(getattr(plain, name) == 0 for name in VALUES)
    assert augment.apply(volumes(), drawn(plain, [1, 2, 3]), plain).dtype == torch.int16
    many = drawn(recipe(gamma=0.5, gain=0.2, offset_hu=10, noise_hu=20), list(range(500)))["augment_hu"]
    for column, (low, high) in enumerate([(-10, 10), (0, 20), (0.8, 1.2), (1 / 1.5, 1.5)]):
        assert low <= many[:, column].min() < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < many[:, column].max() <= high


def test_new_changes_leave_what_older_recipes_drew_as_it_was() -> None:
    of = recipe(offset_hu=20, noise_hu=30, zoom=0.1)
    more = dataclasses.replace(of, gain=0.1, gamma=0.1)
    before, after = drawn(of, [3, 4]), drawn(more, [3, 4])
    assert torch.equal(before["augment_grid"], after["augment_grid"])
    assert torch.equal(before["augment_seed"], after["augment_seed"])
    assert torch.equal(before["augment_hu"][:, :2], after["augment_hu"][:, :2])
    chance = np.random.default_rng([0, 0, 3, 4]).uniform(-1, 1, 8)
    assert before["augment_hu"][0, 0] == pytest.approx(20 * chance[6])


def test_gain_and_contrast_go_with_minmax_and_values_out_of_range_are_refused() -> None:
    of = recipe(gain=0.1, gamma=0.5)
    scaled = dataclasses.replace(of, scaling="minmax")
    whole = torch.full((1, *SIZE), WHOLE, dtype=torch.int16)
    whole[0, 0] = 0
    assert augment.apply(whole, drawn(scaled, [1]), scaled).min() >= 0
    for name, value, says in (("gain", 1.0, "less than 1"), ("gamma", -0.1, "0 to 10"), ("gamma", 11, "0 to 10")):
        with pytest.raises(ValueError, match=f"Expected .*{says} for {name}"):
            recipe(**{name: value})
