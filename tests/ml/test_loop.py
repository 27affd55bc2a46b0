from __future__ import annotations

import itertools
import math
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ml import augment, checkpoint, keeping, training
from ml.config import read_recipe
from ml.data import prefetch
from ml.keeping import Diverged
from ml.pretrain import pretrain, take_step
from ml.schedules import Plateau, learning_rate
from ml.selection import Probe, Selection
from ml.training import Training
from tests.ml.arrays import label_arrays
from tests.ml.test_pretrain import SMALL, Watch, ball_data

DAY = 86_400
CHANCE = {"rotate_degrees": "10", "zoom": "0.1", "shift_mm": "9", "offset_hu": "20", "noise_hu": "30"}


@pytest.mark.parametrize(
    "settings",
    [
        {"ema": "0.9"},
        {"schedule": "plateau"},
        {"select": "best", "epochs": "4"},
        {"objective": "discrete", "death": "competes", **CHANCE},
        {"objective": "cox", "batch": "8"},
        {"ema": "0.9", "schedule": "plateau", "select": "best", "epochs": "3", "watch": "tuning_probe_c", **CHANCE},
    ],
    ids=lambda settings: ",".join(settings),
)
@pytest.mark.parametrize("at", [1, 13])
def test_whatever_the_recipe_a_resumed_training_equals_an_uninterrupted_one(
    tmp_path: Path, settings: dict[str, str], at: int
) -> None:
    recipe, data = read_recipe("tiny", {**SMALL, **settings}), ball_data(200)
    common: dict[str, Any] = {"seed": 3, "facts": {}}
    watch = Watch(at)
    whole = pretrain(recipe, data, folder=tmp_path / "whole", observer=Watch(), **common)
    stopped = pretrain(recipe, data, folder=tmp_path / "part", observer=watch, **common)
    assert stopped.step == at
    resumed = pretrain(
        recipe, data, folder=tmp_path / "part", observer=Watch(), kept=watch.to_go_on(stopped.file), **common
    )
    assert whole.file is not None and resumed.file is not None
    assert whole.file.read_bytes() == resumed.file.read_bytes()
    assert whole.validation == resumed.validation


def steps(run: Training, count: int) -> Iterator[None]:
    run.train()
    for batch in [prefetch(run.load, range(run.step, run.step + count))]:
        for _ in range(count):
            take_step(run, batch, 1e-3)
            yield


def test_the_running_average_follows_the_weights_and_is_what_is_judged() -> None:
    run = Training(read_recipe("tiny", {**SMALL, "ema": "0.6"}), ball_data(), seed=0)
    name = "head.task.weight"
    wanted = run.named[name].detach().clone()
    for step, _ in enumerate(steps(run, 4)):
        decay = min(0.6, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * run.named[name].detach()
    torch.testing.assert_close(run.average[name], wanted)
    weights = run.named[name].detach().clone()
    with run.averaged():
        torch.testing.assert_close(run.named[name].detach(), wanted)
    torch.testing.assert_close(run.named[name].detach(), weights)


def test_training_ends_where_nothing_better_comes_and_keeps_the_best_epoch(tmp_path: Path) -> None:
    watch = Watch()
    recipe = read_recipe(
        "tiny",
        {**SMALL, "epochs": "30", "patience": "2", "select": "best", "learning_rate": "0.03", "min_delta": "0.02"},
    )
    made = pretrain(recipe, ball_data(100), seed=0, folder=tmp_path, observer=watch, facts={})
    gains = [entry["tuning_gain"] for entry in made.validation["epochs"]]
    best = made.validation["best_epoch"]
    assert made.finished and made.step < made.num_steps
    assert len(gains) - 1 == best + 2
    assert all(gain <= gains[best] + 0.02 for gain in gains[best + 1 :])
    assert made.file is not None and watch.best is not None
    final, kept = load_file(made.file), load_file(watch.best)
    assert all(torch.equal(final[name], kept[name]) for name in final if name.startswith(("encoder.", "head.")))


def test_a_figure_that_is_never_better_ends_the_training_by_its_patience() -> None:
    selection = Selection(watch="tuning_gain", min_delta=0.0, patience=3)
    assert [selection.note(epoch, {"tuning_gain": math.nan}) for epoch in (0, 1, 2)] == [False] * 3
    assert not selection.is_over
    selection.note(3, {})
    assert selection.is_over


def spoil(monkeypatch: pytest.MonkeyPatch, steps: range, turns: range = range(1)) -> None:
    """Make the embeddings of some steps not numbers, unless training went back."""
    honest = Training.embedding

    def embedding(self: Training, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        made = honest(self, batch)
        return made * math.nan if made.requires_grad and self.turn in turns and self.step in steps else made

    monkeypatch.setattr(Training, "embedding", embedding)


def test_a_training_that_diverges_goes_back_to_its_retreat_and_takes_another_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "RETREAT_STEPS", 6)
    spoil(monkeypatch, range(14, 18))
    watch = Watch()
    made = pretrain(read_recipe("tiny", SMALL), ball_data(), seed=0, folder=tmp_path, observer=watch, facts={})
    assert made.finished and watch.went_to == [12]
    assert len(watch.alarms) == 1 and "went back to step 12" in watch.alarms[0]
    assert made.file is not None
    assert all(torch.isfinite(t).all() for t in load_file(made.file).values() if t.is_floating_point())


class Stopped(Watch):
    """Stops at a step of a turn."""

    def __init__(self, turn: int, step: int) -> None:
        super().__init__()
        self.turn, self.at = turn, step

    def stop(self) -> bool:
        return (len(self.went_to), self.step) == (self.turn, self.at)


MIXED = {"ema": "0.9", "schedule": "plateau", "select": "best", "batch": "2", "accumulate": "3", **CHANCE}


@pytest.mark.parametrize(
    ("settings", "retreat"), [({}, 1000), (MIXED, 6)], ids=["plain, to the start", "mixed, to a stop"]
)
def test_when_stops_are_kept_decides_nothing_also_where_training_went_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], retreat: int
) -> None:
    monkeypatch.setattr(training, "RETREAT_STEPS", retreat)
    recipe, data = read_recipe("tiny", {**SMALL, "epochs": "3", **settings}), ball_data()
    spoil(monkeypatch, range(14, 18))
    common: dict[str, Any] = {"seed": 3, "facts": {}}
    watch = Watch()
    whole = pretrain(recipe, data, folder=tmp_path / "whole", observer=watch, **common)
    assert whole.file is not None and watch.went_to == [12 if retreat == 6 else 0]
    monkeypatch.setattr(keeping, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(keeping, "KEEP_TIMES", 0.0)
    often = pretrain(recipe, data, folder=tmp_path / "often", observer=Watch(), **common)
    assert often.file is not None and often.file.read_bytes() == whole.file.read_bytes()
    for turn, step in ((0, 13), (0, 16), (1, 15)):
        folder, first = tmp_path / f"{turn}-{step}", Stopped(turn, step)
        stopped = pretrain(recipe, data, folder=folder, observer=first, **common)
        assert stopped.step == step and not stopped.finished
        made = pretrain(recipe, data, folder=folder, observer=Watch(), kept=first.to_go_on(stopped.file), **common)
        assert made.file is not None and made.file.read_bytes() == whole.file.read_bytes()
        assert made.validation == whole.validation


def test_a_best_epoch_that_is_undone_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "RETREAT_STEPS", 8)  # the best of step 12 came after it
    spoil(monkeypatch, range(13, 17))
    recipe = read_recipe("tiny", {**SMALL, "epochs": "3", "select": "best", "patience": "2"})
    watch = Watch()
    made = pretrain(recipe, ball_data(), seed=0, folder=tmp_path, observer=watch, facts={})
    assert watch.went_to == [8] and made.finished and made.step == made.num_steps
    steps = [checkpoint.facts(file)["step"] for file in watch.kept]
    assert steps.count(12) == 2, "before and after it went back"


def test_a_step_that_is_skipped_leaves_running_statistics_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Training.output
    monkeypatch.setattr(Training, "output", lambda run, batch: honest(run, batch) * (math.nan if run.step == 1 else 1))
    run = Training(read_recipe("tiny", SMALL), ball_data(), seed=0)
    before = [buffer.clone() for buffer in run.running]
    seen = [before] + [[buffer.clone() for buffer in run.running] for _ in steps(run, 3)]
    assert run.skipped == 0 and len(before) > 0
    changed = [not torch.equal(torch.cat(a), torch.cat(b)) for a, b in itertools.pairwise(seen)]
    assert changed == [True, False, True], "the second step is skipped"


def test_a_training_that_diverges_again_and_again_names_its_scans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, range(14, 10**9), range(10))
    watch, data = Watch(), ball_data()
    with pytest.raises(Diverged, match="smaller learning_rate") as caught:
        pretrain(read_recipe("tiny", SMALL), data, seed=0, folder=tmp_path, observer=watch, facts={})
    assert len(watch.alarms) == 2
    assert len(caught.value.rows) >= 4 and set(caught.value.rows) <= set(data.train.tolist())


def test_a_stop_that_cannot_be_written_is_told_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "WAIT_SECONDS", 0)

    class Full(Watch):
        def keep(self, file: Path, step: int, total: int, *, is_best: bool, is_retreat: bool) -> Path:
            raise OSError(28, "No space left on device")

    recipe, watch = read_recipe("tiny", {**SMALL, "select": "best"}), Full()
    made = pretrain(recipe, ball_data(), seed=0, folder=tmp_path / "full", observer=watch, facts={})
    plain = read_recipe("tiny", SMALL)
    whole = pretrain(plain, ball_data(), seed=0, folder=tmp_path / "whole", observer=Watch(), facts={})
    assert "No space left" in watch.alarms[0]
    assert made.validation["best_epoch"] == -1, "what was not kept is no best"
    assert made.file is not None and whole.file is not None
    last, wanted = load_file(made.file), load_file(whole.file)
    assert all(torch.equal(last[name], tensor) for name, tensor in wanted.items())


def test_a_disk_that_is_full_is_told_and_leaves_no_part_of_a_file(tmp_path: Path) -> None:
    import resource

    from ml import checkpoint

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    held = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="cannot be written"):
            checkpoint.save(tmp_path / "c.safetensors", {"a": torch.ones(10_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, held)
    assert list(tmp_path.iterdir()) == []


def test_what_chance_makes_of_a_scan_does_not_depend_on_its_batch() -> None:
    recipe = read_recipe("tiny", {**SMALL, **CHANCE})
    rows = np.arange(6)
    voxels = torch.randint(-1000, 400, (6, 16, 16, 16), dtype=torch.int16, generator=torch.Generator().manual_seed(0))

    def changed(some: np.ndarray, epoch: int) -> torch.Tensor:
        drawn = augment.draw(recipe, 5, epoch, some)
        return augment.apply(voxels[some], {n: torch.from_numpy(np.asarray(a)) for n, a in drawn.items()}, recipe)

    together, alone = changed(rows, 1), torch.cat([changed(rows[i : i + 1], 1) for i in range(6)])
    torch.testing.assert_close(together, alone)
    assert not torch.equal(together, changed(rows, 2))
    assert together.dtype == torch.float32 and together.shape == voxels.shape


def test_mirroring_alone_leaves_voxels_as_they_are() -> None:
    recipe = read_recipe("tiny", SMALL)
    voxels = torch.arange(2 * 16**3, dtype=torch.int16).view(2, 16, 16, 16)
    made = augment.apply(voxels, {"augment_flip": torch.tensor([True, False])}, recipe)
    assert made.dtype == torch.int16
    assert torch.equal(made[0], voxels[0].flip(2)) and torch.equal(made[1], voxels[1])


def test_a_volume_turned_by_nothing_stays_and_shifted_by_a_voxel_lets_air_in() -> None:
    recipe = read_recipe("tiny", {**SMALL, "shift_mm": "9"})  # one voxel
    still = augment._grid(recipe, np.zeros(8))
    moved = augment._grid(recipe, np.array([0, 0, 1.0, 0, 0, 0, 0, 0]))
    voxels = torch.randint(-900, 400, (2, 16, 16, 16), dtype=torch.int16)
    grid = torch.from_numpy(np.stack([still, moved]).astype(np.float32))
    made = augment.apply(voxels, {"augment_grid": grid}, recipe)
    torch.testing.assert_close(made[0], voxels[0].float(), atol=0.01, rtol=0)
    torch.testing.assert_close(made[1, :, :, :-1], voxels[1, :, :, 1:].float(), atol=0.01, rtol=0)
    torch.testing.assert_close(made[1, :, :, -1], torch.full((16, 16), -1000.0), atol=0.01, rtol=0)


def test_the_rate_halves_after_two_epochs_in_a_row_without_a_better_one() -> None:
    plateau = Plateau()
    scales = []
    for loss in (3.0, 2.0, 2.0, 1.9, 1.9, 1.9, 1.9, 1.9):
        plateau.note(loss)
        scales.append(plateau.scale)
    assert scales == [1, 1, 1, 1, 1, 0.5, 0.5, 0.25]
    recipe = read_recipe("tiny", {"schedule": "plateau", "warm_up": "0"})
    assert learning_rate(recipe, 7, 100, 0.25) == recipe.learning_rate / 4


def test_the_probe_finds_what_the_embeddings_tell_and_nothing_in_noise() -> None:
    rng = np.random.default_rng(0)
    risk = rng.normal(size=600)
    seconds = (rng.exponential(1000 / np.exp(risk), (3, 600)).T * DAY).astype(np.int64) + 1
    labels = label_arrays(seconds <= 1826 * DAY, seconds)
    train, tuning = np.arange(300), np.arange(300, 600)
    probe = Probe(labels, train, tuning)
    told = np.column_stack([risk + 0.1 * rng.normal(size=600), rng.normal(size=(600, 20))]).astype(np.float32)
    c = probe.c(told[train] * 50 + 1000, told[tuning] * 50 + 1000)
    assert len(probe.tasks) == 3 and c is not None and c > 0.65
    noise = rng.normal(size=(600, 40)).astype(np.float32)
    nothing = probe.c(noise[train], noise[tuning])
    assert nothing is not None and abs(nothing - 0.5) < 0.06
    assert probe.c(np.ones((300, 4), np.float32), np.ones((300, 4), np.float32)) is None
    assert probe.c(noise[train] * np.float32(np.nan), noise[tuning]) is None
