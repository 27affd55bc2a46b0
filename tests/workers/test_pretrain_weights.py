"""Weights to start from, as the stage sees them: told ahead of reading volumes, kept with the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sqlalchemy import Engine, text

from app.errors import InputError
from app.store.work import InlineWork
from ml.encoders import build_encoder
from tests.workers.small_cohort import SMALL, insert_cohort
from workers.stages.pretrain import pretrain

Work = Callable[..., InlineWork]


@pytest.fixture
def weights(engine: Engine, tmp_path: Path) -> Path:
    """A cohort, and a file of weights that declares its window."""
    with engine.begin() as connection:
        insert_cohort(connection, tmp_path / "scans")
    torch.manual_seed(7)
    file = tmp_path / "w.safetensors"
    save_file(build_encoder("tiny").state_dict(), file, {"window_hu": "-900,1300", "centre_hu": "200"})
    return file


def args(file: Path, **changed: str) -> dict[str, object]:
    settings = {**SMALL, "weights": str(file), **changed}
    return {"encoder": "tiny", "labels": "outcomes", "seed": 0, "set": settings, "shuffle_volumes": False}


def test_a_checkpoint_says_what_of_its_weights_was_loaded_and_takes_their_window(
    work: Work, engine: Engine, weights: Path
) -> None:
    pretrain(work(arm="base", name="b", **args(weights)))
    with engine.connect() as connection:
        recipe = connection.scalar(text("SELECT recipe FROM model.checkpoint WHERE name = 'b'"))
    assert recipe["loaded"]["num_loaded"] == 16
    assert recipe["loaded"]["layout"] == "the encoder"
    assert (recipe["settings"]["window_hu"], recipe["settings"]["centre_hu"]) == ([-900, 1300], 200)
    assert recipe["settings"]["clip_hu"] == [-1000, 1300]
    again = pretrain(work(arm="base", name="b", **args(weights)))
    assert again["unchanged"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"window_hu": "-1000,1000"}, "Expected window_hu=-900,1300, which the weights were trained with"),
        ({"norm": "frozen"}, "Expected weights with batch-norm statistics for norm=frozen"),
        ({"weights": "/tmp/there-is-none.pth"}, "found none there"),
    ],
)
def test_what_does_not_fit_is_told_before_any_volume_is_read(
    work: Work, weights: Path, changed: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("volumes were read")

    monkeypatch.setattr("workers.stages.pretrain.prepare", read)
    with pytest.raises(InputError, match=message):
        pretrain(work(arm="base", name="b", **args(weights, **changed)))


def test_a_pickle_is_refused_with_how_to_convert_it(work: Work, weights: Path) -> None:
    pickle = weights.with_suffix(".pth")
    torch.save({"w": torch.ones(1)}, pickle)
    with pytest.raises(InputError, match=r"got \.pth: such files are pickles, .* docs/encoders\.md"):
        pretrain(work(arm="base", name="b", **args(pickle)))
