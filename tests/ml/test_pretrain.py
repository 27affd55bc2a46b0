from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from ml import checkpoint
from ml.config import Recipe, read_recipe
from ml.embed import embed
from ml.heads import Standardise
from ml.keeping import Kept
from ml.pretrain import keep_untrained, pretrain
from ml.schedules import learning_rate
from ml.targets import MtlTargets
from ml.training import Data, Training
from ml.tte_targets import TteTargets
from tests.ml.arrays import label_arrays

DAY = 86_400
SMALL = {"shape_zyx": "16,16,16", "epochs": "2", "batch": "4", "rank": "16"}


class Watch:
    """An observer that remembers, and stops where it is told to."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at, self.step = stop_at, 0
        self.losses: list[float] = []
        self.kept: list[Path] = []
        self.best: Path | None = None
        self.retreat: Path | None = None
        self.went_to: list[int] = []
        self.alarms: list[str] = []

    def stop(self) -> bool:
        return self.step == self.stop_at

    def progress(self, step: int, total: int, epoch: int) -> None:
        self.step = step

    def curve(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        if "train_loss" in values:
            self.losses.append(values["train_loss"])

    def keep(self, file: Path, step: int, total: int, *, is_best: bool, is_retreat: bool) -> Path:
        self.kept.append(file)
        self.best = file if is_best else self.best
        self.retreat = file if is_retreat else self.retreat
        return file

    def went_back(self, step: int) -> None:
        self.went_to.append(step)

    def to_go_on(self, last: Path | None) -> Kept:
        """What a further attempt is given."""
        return Kept(last=last, best=self.best, retreat=self.retreat)

    def alarm(self, message: str) -> None:
        self.alarms.append(message)


def ball_data(n: int = 60, tasks: int = 3, seed: int = 0, recipe: Recipe | None = None) -> Data:
    """Noisy balls whose radius sets the hazard of every task."""
    rng = np.random.default_rng(seed)
    size = rng.uniform(0, 1, n)
    grid = np.sqrt((np.stack(np.meshgrid(*[np.linspace(-1, 1, 16)] * 3, indexing="ij")) ** 2).sum(0))
    noise = rng.normal(0, 20, (n, 16, 16, 16))
    volumes = np.where(grid < (0.3 + 0.5 * size)[:, None, None, None], 40, -800) + noise
    seconds = (rng.exponential(1500 / np.exp(3 * (size - 0.5)), (tasks, n)).T * DAY).astype(np.int64) + 1
    labels = label_arrays(seconds <= 1826 * DAY, seconds)
    rows = np.arange(n)
    train, tuning = rows[rows % 5 > 0], rows[rows % 5 == 0]
    stored = np.rint(volumes).astype(np.int16)
    return Data(volume=lambda i, out=None: stored[i], train=train, tuning=tuning, targets=TteTargets(labels, train))


def test_training_starts_at_the_null_model() -> None:
    data = ball_data()
    run = Training(read_recipe("tiny", SMALL), data, seed=0)
    run.calibrate()
    for rows in (data.train, data.tuning):
        loss, null, _ = run.validate(rows)
        assert loss == pytest.approx(null, rel=0.01)


def test_the_loss_falls_far_below_where_it_began(tmp_path: Path) -> None:
    watch = Watch()
    recipe = read_recipe("tiny", {**SMALL, "epochs": "10"})
    result = pretrain(recipe, ball_data(100), seed=0, folder=tmp_path, observer=watch, facts={})
    tenth = len(watch.losses) // 10
    first, last = np.array(watch.losses[:tenth]), np.array(watch.losses[-tenth:])
    error = math.sqrt(first.var(ddof=1) / tenth + last.var(ddof=1) / tenth)
    assert last.mean() < first.mean() - 3 * error
    assert result.validation["tuning_gain"] > 0.02
    assert [entry["epoch"] for entry in result.validation["epochs"]] == list(range(11))


@pytest.mark.parametrize("settings", [{}, {"batch": "2", "accumulate": "3"}])
def test_a_resumed_training_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path, settings: dict[str, str]) -> None:
    recipe = read_recipe("tiny", {**SMALL, **settings})
    whole = pretrain(recipe, ball_data(), seed=3, folder=tmp_path / "whole", observer=Watch(), facts={"a": 1})
    stopped = pretrain(recipe, ball_data(), seed=3, folder=tmp_path / "part", observer=Watch(7), facts={"a": 1})
    assert (stopped.finished, stopped.step) == (False, 7)
    resumed = pretrain(
        recipe,
        ball_data(),
        seed=3,
        folder=tmp_path / "part",
        observer=Watch(),
        facts={"a": 1},
        kept=Kept(last=stopped.file),
    )
    assert whole.file is not None
    assert resumed.file is not None
    assert whole.file.read_bytes() == resumed.file.read_bytes()
    assert whole.validation == resumed.validation


def test_accumulated_passes_make_the_step_of_one_large_batch(tmp_path: Path) -> None:
    files = []
    for batch, accumulate in (("6", "1"), ("2", "3")):
        recipe = read_recipe(
            "tiny", {**SMALL, "batch": batch, "accumulate": accumulate, "momentum": "0", "epochs": "1"}
        )
        folder = tmp_path / batch
        made = pretrain(recipe, ball_data(), seed=0, folder=folder, observer=Watch(1), facts={})
        assert made.file is not None
        files.append(load_file(made.file))
    for name, tensor in files[0].items():
        if name.endswith("exp_avg"):
            np.testing.assert_allclose(tensor, files[1][name], rtol=1e-3, atol=1e-6)


def test_a_stop_ahead_of_the_first_step_leaves_nothing(tmp_path: Path) -> None:
    result = pretrain(read_recipe("tiny", SMALL), ball_data(), seed=0, folder=tmp_path, observer=Watch(0), facts={})
    assert (result.file, result.finished) == (None, False)


def test_another_training_s_stop_is_refused(tmp_path: Path) -> None:
    recipe = read_recipe("tiny", SMALL)
    stopped = pretrain(recipe, ball_data(), seed=0, folder=tmp_path, observer=Watch(3), facts={})
    with pytest.raises(ValueError, match="another one"):
        pretrain(recipe, ball_data(), seed=1, folder=tmp_path, observer=Watch(), facts={}, kept=Kept(last=stopped.file))


def test_numbers_that_stay_infinite_end_the_training_and_nothing_is_kept(tmp_path: Path) -> None:
    data = ball_data()
    broken = read_recipe("tiny", {**SMALL, "learning_rate": "1e8"})
    watch = Watch()
    with pytest.raises(ValueError, match="Expected a finite loss"):
        pretrain(broken, data, seed=0, folder=tmp_path, observer=watch, facts={})
    assert not watch.kept
    assert not list(tmp_path.glob("final*"))


def test_untrained_is_where_a_training_of_the_same_seed_begins(tmp_path: Path) -> None:
    recipe, data = read_recipe("tiny", SMALL), ball_data()
    result = keep_untrained(recipe, data, seed=5, folder=tmp_path, facts={})
    assert result.file is not None
    start = Training(recipe, data, seed=5).encoder.state_dict()
    for name, tensor in checkpoint.tensors(result.file, "encoder.").items():
        torch.testing.assert_close(tensor, start[name])
    trained = checkpoint.load_encoder(result.file)
    raw = embed(trained.encoder, recipe, data.volume, data.train.tolist())
    assert trained.mean is not None
    np.testing.assert_allclose(trained.mean.numpy(), raw.mean(0), rtol=1e-3, atol=1e-5)


def test_the_standardisation_follows_the_train_volumes_and_both_modes_agree() -> None:
    layer = Standardise(3)
    x = torch.randn(500, 3) * torch.tensor([1.0, 5.0, 0.1]) + torch.tensor([0.0, 40.0, -3.0])
    for batch in x.repeat(4, 1).split(2):
        layer.update(batch)
    torch.testing.assert_close(layer.mean, x.mean(0), rtol=0.1, atol=0.6)
    layer.set(x)
    made = layer.eval()(x)
    torch.testing.assert_close(made.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(made.std(0), torch.ones(3), atol=1e-2, rtol=0)
    before = layer.mean.clone()
    layer.train()(torch.tensor([[math.inf, 1.0, 1.0]]))
    torch.testing.assert_close(layer.mean, before)


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine"])
def test_the_learning_rate_rises_to_its_largest_and_falls(schedule: str) -> None:
    recipe = read_recipe("tiny", {"schedule": schedule, "warm_up": "0.25"})
    rates = [learning_rate(recipe, step, 100) for step in range(100)]
    top = int(np.argmax(rates))
    assert top == 25
    assert rates[top] == pytest.approx(recipe.learning_rate)
    assert (np.diff(rates[:top]) > 0).all()
    assert (np.diff(rates[top:]) < 0).all()
    assert rates[-1] < 0.02 * recipe.learning_rate


def test_the_binary_arms_start_at_their_null_model() -> None:
    data = ball_data()
    labels = data.targets.labels
    binary = Data(
        volume=data.volume,
        train=data.train,
        tuning=data.tuning,
        targets=MtlTargets(labels, data.train, [[365, 1095]] * 3),
    )
    run = Training(read_recipe("tiny", SMALL), binary, seed=0)
    run.calibrate()
    loss, null, _ = run.validate(binary.train)
    assert loss == pytest.approx(null, rel=0.01)
