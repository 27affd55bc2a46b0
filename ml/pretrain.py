"""The training loop, on one page. It knows volumes, targets and a recipe; its news is its observer's concern."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ml import checkpoint
from ml.config import Recipe
from ml.data import prefetch, threads_for
from ml.embed import embed, statistics, to_input
from ml.encoders import reestimate_statistics
from ml.training import CALIBRATION, STATISTICS, Data, Training, own_facts, start_encoder

PATIENCE = 3
"""Steps in a row that may be skipped because a number is not finite."""
POINTS = 200
"""Points of a train loss curve, about."""
KEEP_SECONDS = 10.0
KEEP_TIMES = 20.0
"""A stop on the way is written at the end of an epoch and every 10 seconds, but only after 20 times the seconds that
writing takes."""


class Observer(Protocol):
    """Who watches a training."""

    def stop(self) -> bool:
        """True to keep what there is and hand back now; raises to end at once. Asked ahead of each step."""
        ...

    def progress(self, step: int, total: int, epoch: int) -> None: ...

    def curve(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """A point of the loss curves: train_loss, learning_rate, volumes_per_second; tuning_loss, tuning_gain."""
        ...

    def keep(self, file: Path, step: int, total: int) -> None:
        """A stop on the way lies at `file`, to be published."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a training leaves."""

    file: Path | None
    """None where it was told to stop before the first step."""
    step: int
    num_steps: int
    finished: bool
    """False where it was told to stop; `file` is a stop on the way then."""
    validation: dict[str, Any]


def learning_rate(recipe: Recipe, step: int, num_steps: int) -> float:
    """The rate of a step: up over the warm-up, then down by a cosine; a function of the step alone.

    `one_cycle` climbs from 1/25 by a cosine and ends near 0; `cosine` climbs from 0 by a line and ends at 1/100.
    """
    warm = max(1.0, recipe.warm_up * num_steps)
    one_cycle = recipe.schedule == "one_cycle"
    if step < warm:
        share = (1 - math.cos(math.pi * step / warm)) / 2 if one_cycle else (step + 1) / (warm + 1)
        low = 1 / 25 if one_cycle else 0.0
    else:
        share = (1 + math.cos(math.pi * (step - warm) / max(1.0, num_steps - warm))) / 2
        low = 1e-4 if one_cycle else 0.01
    return recipe.learning_rate * (low + (1 - low) * share)


def pretrain(
    recipe: Recipe,
    data: Data,
    *,
    seed: int,
    folder: Path,
    observer: Observer,
    facts: Mapping[str, Any],
    weights: Path | None = None,
    resume: Path | None = None,
) -> Result:
    """Train an encoder and its head by AdamW, from the null model on, to the last epoch or the observer's word.

    Args:
        recipe: complete settings.
        data: volumes, rows and targets; the arm is the kind of its targets.
        seed: of weights, order and augmentation. Equal inputs give equal weights on a processor.
        folder: where checkpoints are written.
        observer: who watches.
        facts: kept in the checkpoint's header.
        weights: to start from, instead of random ones.
        resume: a stop on the way of this very training.

    Raises:
        ValueError: weights or a stop that do not fit, or numbers that are not finite in several steps in a row.
    """
    torch.set_num_threads(threads_for(recipe))
    run = Training(recipe, data, seed, weights)
    if resume:
        run.resume(resume)
    else:
        run.calibrate()
        run.note_epoch()
    keeper, meter = _Keeper(run, folder, facts, observer), _Meter(run, observer)
    passes = range(run.step * run.passes_per_step, run.num_steps * run.passes_per_step)

    run.train()
    with closing(prefetch(run.load, passes)) as batches:
        while run.step < run.num_steps:
            if observer.stop():
                return keeper.hand_back()
            keeper.keep_when_due()

            rate = learning_rate(recipe, run.step, run.num_steps)
            excess = take_step(run, batches, rate)
            meter.note(excess, rate)
            if run.step % run.steps_per_epoch == 0:
                meter.note_epoch(run.note_epoch())
            observer.progress(run.step, run.num_steps, run.epoch)
    return Result(
        file=run.finish(folder / "final.safetensors", facts),
        step=run.step,
        num_steps=run.num_steps,
        finished=True,
        validation=_validation(run),
    )


def take_step(run: Training, batches: Iterator[dict[str, Tensor]], rate: float) -> float:
    """Forward and backward over the scans of one step, and the optimiser; what was lost beyond the null model."""
    loss = null = torch.zeros((), device=run.device)
    for _ in range(run.passes_per_step):
        batch = run.to_device(next(batches))
        output = run.output(batch)
        part = run.objective.loss(output, batch) / run.volumes_per_step
        part.backward()
        with torch.no_grad():
            loss, null = loss + part.detach(), null + run.objective.null_loss(batch) / run.volumes_per_step
    _update(run, rate, float(loss))
    return float(loss - null)


def _update(run: Training, rate: float, loss: float) -> None:
    """One optimiser step; skipped where loss or gradient are not finite. Raises ValueError after some in a row."""
    clip = run.recipe.clip_norm or math.inf
    norm = float(nn.utils.clip_grad_norm_(run.named.values(), clip))
    if math.isfinite(loss) and math.isfinite(norm):
        for group in run.optimiser.param_groups:
            group["lr"] = rate
        run.optimiser.step()
        run.skipped = 0
    else:
        run.skipped += 1
        if run.skipped > PATIENCE:
            raise ValueError(
                f"Expected a finite loss, got {loss} with a gradient of norm {norm} in {run.skipped} steps in a row at "
                f"step {run.step}; use a smaller learning_rate or precision=float32."
            )
    run.optimiser.zero_grad(set_to_none=True)
    run.step += 1


def _validation(run: Training) -> dict[str, Any]:
    """Losses on tuning: the last, and one entry an epoch."""
    return {**(run.history[-1] if run.history else {}), "epochs": run.history}


class _Keeper:
    """Writes stops on the way, often enough and not too often."""

    def __init__(self, run: Training, folder: Path, facts: Mapping[str, Any], observer: Observer) -> None:
        self.run, self.folder, self.facts, self.observer = run, folder, facts, observer
        self.at, self.cost = time.monotonic(), 0.0

    def keep_when_due(self) -> None:
        elapsed = time.monotonic() - self.at
        due = elapsed > KEEP_SECONDS or self.run.step % self.run.steps_per_epoch == 0
        if self.run.step and due and elapsed > KEEP_TIMES * self.cost:
            self.keep()

    def keep(self) -> Path:
        began = time.monotonic()
        file = self.run.save(self.folder / f"step-{self.run.step}.safetensors", self.facts)
        self.observer.keep(file, self.run.step, self.run.num_steps)
        self.at = time.monotonic()
        self.cost = self.at - began
        return file

    def hand_back(self) -> Result:
        """Keep what there is; where no step was taken, nothing is."""
        run = self.run
        file = self.keep() if run.step else None
        return Result(
            file=file, step=run.step, num_steps=run.num_steps, finished=False, validation=_validation(self.run)
        )


class _Meter:
    """Turns losses of steps into points of curves.

    A batch with many events loses much under any model. So the train loss is told as what the model lost beyond the
    null model on the same scans, plus what the null model loses over the whole train split: the same mean, less noise.
    """

    def __init__(self, run: Training, observer: Observer) -> None:
        self.run, self.observer = run, observer
        self.every = max(1, run.num_steps // POINTS)
        self.since, self.from_step = time.monotonic(), run.step

    def note(self, excess: float, rate: float) -> None:
        run = self.run
        if math.isfinite(excess):
            run.excess_sum, run.excess_count = run.excess_sum + excess, run.excess_count + 1
        if run.step % self.every == 0 and run.excess_count:
            speed = (run.step - self.from_step) * run.volumes_per_step / (time.monotonic() - self.since)
            loss = run.data.targets.null_loss + run.excess_sum / run.excess_count
            values = {"train_loss": loss, "learning_rate": rate, "volumes_per_second": speed}
            self.observer.curve(run.step, run.epoch, values)
            run.excess_sum, run.excess_count = 0.0, 0
            self.since, self.from_step = time.monotonic(), run.step

    def note_epoch(self, values: Mapping[str, float]) -> None:
        tuning = {name: value for name, value in values.items() if name.startswith("tuning")}
        if tuning:
            self.observer.curve(self.run.step, self.run.epoch, tuning)


def keep_untrained(
    recipe: Recipe, data: Data, *, seed: int, folder: Path, facts: Mapping[str, Any], weights: Path | None = None
) -> Result:
    """The arm `base` (`untrained` without weights): the weights as they are.

    Batch-norm statistics are those of train volumes, because the weights saw other scans.
    """
    torch.set_num_threads(threads_for(recipe))
    encoder = start_encoder(recipe, seed, weights)
    some = data.some(CALIBRATION, seed)
    device = next(encoder.parameters()).device
    reestimate_statistics(encoder, (to_input(torch.from_numpy(data.volume(i)[None]).to(device), recipe) for i in some))
    mean, sd = statistics(embed(encoder, recipe, data.volume, data.some(STATISTICS, seed)))
    tensors = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    tensors |= {"embedding.mean": torch.from_numpy(mean), "embedding.sd": torch.from_numpy(sd)}
    file = folder / "final.safetensors"
    checkpoint.save(file, tensors, {**facts, **own_facts(recipe, encoder, seed)})
    return Result(file=file, step=0, num_steps=0, finished=True, validation={})
