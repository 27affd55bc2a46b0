from __future__ import annotations

import pytest

from ml.config import from_dict, read_recipe
from ml.registry import FOLDER, RECIPES, encoders


def test_every_recipe_is_of_an_encoder_and_is_read_and_written_alike() -> None:
    assert {path.stem for path in RECIPES.glob("*.toml")} <= {path.stem for path in FOLDER.glob("[!_]*.py")}
    for name in encoders():
        recipe = read_recipe(name)
        assert from_dict(recipe.to_dict()) == recipe


def test_settings_are_read_by_their_type() -> None:
    recipe = read_recipe("tiny", {"epochs": "4", "learning_rate": "1e-3", "shape_zyx": "16,24,24", "weights": "a"})
    assert (recipe.epochs, recipe.learning_rate, recipe.shape_zyx, recipe.weights) == (4, 1e-3, (16, 24, 24), "a")
    assert recipe.digest != read_recipe("tiny").digest


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("epoch", "4", "No recipe setting named 'epoch'. Did you mean 'epochs'?"),
        ("epochs", "4.5", "Expected a whole number for epochs, got '4.5'."),
        ("epochs", "0", "Expected 1 or more for epochs, got 0."),
        ("learning_rate", "nan", "Expected more than 0 for learning_rate, got nan."),
        ("momentum", "2", "Expected 0 to 1 for momentum, got 2.0."),
        ("schedule", "linear", "Expected one of one_cycle, cosine, plateau for schedule, got 'linear'."),
        ("shape_zyx", "16,16", "Expected three sizes of 8 voxels or more for shape_zyx, got [16, 16]."),
        ("shape_zyx", "16;16", "Expected whole numbers with commas for shape_zyx, got '16;16'."),
        ("window_hu", "200,-100", "Expected low,high for window_hu, got [200.0, -100.0]."),
        ("encoder", "tiny", "Expected the encoder as --encoder"),
    ],
)
def test_a_mistake_in_a_setting_is_one_sentence(key: str, value: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        read_recipe("tiny", {key: value})
    assert str(error.value).startswith(message)


def test_a_mistyped_encoder_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"No encoder named 'densenet'.*Did you mean 'densenet121'"):
        read_recipe("densenet")


def test_batch_normalisation_wants_eight_volumes_a_pass() -> None:
    with pytest.raises(ValueError, match="batch 8 or more for norm=batch, got 2"):
        read_recipe("densenet121", {"norm": "batch"})
