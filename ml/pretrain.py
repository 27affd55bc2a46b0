"""The training loop, on one page. It knows volumes, targets and a recipe; its news is its observer's concern."""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ml import checkpoint
from ml.config import Recipe
from ml.data import prefetch, threads_for
from ml.embed import embed, statistics, to_input
from ml.normalisation import reestimate_statistics
from ml.parallel import SOLO, World
from ml.schedules import learning_rate
from ml.training import CALIBRATION, STATISTICS, Data, Training, own_facts, start_encoder

PATIENCE = 3
"""Steps in a row that may be skipped because a number is not finite."""
POINTS = 200
"""Points of a train loss curve, about."""
MOST_TURNS = 2
"""How often a run that diverges goes back to its last stop."""
WRITE_AGAIN, WAIT_SECONDS = 3, 1.0
"""How often writing a stop is tried again, and how long after."""
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

    def keep(self, file: Path, step: int, total: int, *, is_best: bool) -> Path:
        """A stop on the way lies at `file`, to be published; where it is from now on.

        Raises:
            OSError: it cannot be written.
        """
        ...

    def alarm(self, message: str) -> None:
        """Something that training survives and that somebody should know."""
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
    best: Path | None = None,
    extends: bool = False,
    world: World = SOLO,
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
        best: its stop that was the best so far.
        extends: `resume` is the end of a training with fewer epochs, which goes on.
        world: which of several ranks this is; the observer of rank 0 alone is asked and told.

    Raises:
        ValueError: weights or a stop that do not fit.
        Diverged: numbers that are not finite, also after going back to a stop.
    """
    torch.set_num_threads(max(1, threads_for(recipe) // world.size))
    run = Training(recipe, data, seed, weights, world)
    if resume:
        run.resume(resume, extends=extends)
    else:
        if world.is_first:  # whose numbers all follow
            run.calibrate()
        run.note_epoch()
    run.follow()
    keeper = Keeper(run, folder, facts, observer, last=None if extends else resume, best=best)
    while not run.is_over:
        try:
            if not train_on(run, keeper, observer):
                return keeper.hand_back()
        except Diverged as error:
            keeper.go_back(error)
    return keeper.finish()


def train_on(run: Training, keeper: Keeper, observer: Observer) -> bool:
    """Take step after step to the end of the run; False where the observer says to stop."""
    meter = _Meter(run, observer)
    run.train()
    with closing(prefetch(run.load, run.passes_from(run.step))) as batches:
        while not run.is_over:
            stop, due = run.world.agree([run.world.is_first and observer.stop(), keeper.is_due])
            if stop:
                return False
            if due:
                keeper.keep()
            rate = learning_rate(run.recipe, run.step, run.num_steps, run.plateau.scale)
            meter.note(take_step(run, batches, rate), rate)
            if run.step % run.steps_per_epoch == 0:
                values = run.note_epoch()
                meter.note_epoch(values)
                before = replace(run.selection)
                if run.selection.note(run.epoch, values) and not keeper.keep(is_best=True):
                    run.selection = replace(before, last_epoch=run.epoch)  # a best that is not kept is none
            if run.world.is_first:
                observer.progress(run.step, run.num_steps, run.epoch)
    return True


def take_step(run: Training, batches: Iterator[dict[str, Tensor]], rate: float) -> float:
    """Forward and backward over the scans of one step, and the optimiser; what was lost beyond the null model."""
    loss, null = torch.zeros(2, device=run.device).unbind()
    for _ in range(run.passes):
        batch = run.to_device(next(batches))
        output = run.output(batch)
        part = run.objective.loss(output, batch) / run.volumes_per_step
        part.backward()
        with torch.no_grad():
            loss, null = loss + part.detach(), null + run.objective.null_loss(batch) / run.volumes_per_step
    run.sum_up(loss, null)
    _update(run, rate, float(loss))
    run.share_statistics()
    return float(loss - null)


def _update(run: Training, rate: float, loss: float) -> None:
    """One optimiser step; skipped where loss or gradient are not finite. Raises Diverged after some in a row."""
    clip = run.recipe.clip_norm or math.inf
    norm = float(nn.utils.clip_grad_norm_(run.named.values(), clip))
    if math.isfinite(loss) and math.isfinite(norm):
        for group in run.optimiser.param_groups:
            group["lr"] = rate
        run.optimiser.step()
        run.note_step(loss)
        run.skipped = 0
    else:
        run.skipped += 1
        if run.skipped > PATIENCE:
            raise Diverged(run, loss, norm)
    run.optimiser.zero_grad(set_to_none=True)
    run.step += 1


class Diverged(ValueError):
    """Steps in a row whose loss or gradient is not finite."""

    def __init__(self, run: Training, loss: float, norm: float) -> None:
        steps = range(run.step - run.skipped + 1, run.step + 1)
        self.rows = sorted({row for step in steps for row in run.rows_of_step(step).tolist()})
        """Rows of the scans of these steps."""
        super().__init__(
            f"Expected a finite loss, got {loss} with a gradient of norm {norm} in {run.skipped} steps in a row at "
            f"step {run.step}; use a smaller learning_rate or precision=float32, and look at the scans of these steps."
        )


class Keeper:
    """Writes stops on the way, often enough and not too often, and goes back to the last where training diverges."""

    def __init__(
        self,
        run: Training,
        folder: Path,
        facts: Mapping[str, Any],
        observer: Observer,
        *,
        last: Path | None = None,
        best: Path | None = None,
    ) -> None:
        self.run, self.folder, self.facts, self.observer = run, folder, facts, observer
        self.last, self.best = last, best
        self.kept_step = -1
        self.at, self.cost = time.monotonic(), 0.0

    @property
    def is_due(self) -> bool:
        """Whether to keep a stop: at the end of an epoch and every few seconds, where that is worth its cost."""
        elapsed = time.monotonic() - self.at
        due = elapsed > KEEP_SECONDS or self.run.step % self.run.steps_per_epoch == 0
        return self.run.step > 0 and due and elapsed > KEEP_TIMES * self.cost

    def keep(self, *, is_best: bool = False) -> bool:
        """Write a stop; where that fails, training goes on, and whoever watches is told. Whether it is kept."""
        began = time.monotonic()
        if self.run.world.is_first:
            self._try_to_write(is_best=is_best)
        self.at = time.monotonic()
        self.cost = self.at - began
        kept_step, last, best = self.run.world.agree([self.kept_step, *map(_text, (self.last, self.best))])
        self.kept_step, self.last, self.best = kept_step, _path(last), _path(best)
        return self.kept_step == self.run.step

    def _try_to_write(self, *, is_best: bool) -> None:
        for attempt in range(1 + WRITE_AGAIN):
            try:
                self._write(is_best=is_best)
                break
            except OSError as error:
                if attempt == WRITE_AGAIN:
                    full = " Is the disk full?" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
                    self.observer.alarm(
                        f"Step {self.run.step} could not be kept ({str(error).rstrip('.')}); training goes on, and "
                        f"would go on from the stop before if it ended now.{full}"
                    )
                else:
                    time.sleep(WAIT_SECONDS)

    def _write(self, *, is_best: bool = False) -> Path:
        file = self.run.save(self.folder / f"step-{self.run.step}.safetensors", self.facts)
        self.last = self.observer.keep(file, self.run.step, self.run.num_steps, is_best=is_best)
        self.kept_step = self.run.step
        if is_best:
            self.best = self.last
        return self.last

    def go_back(self, error: Diverged) -> None:
        """Take up the last stop, with another order of scans. Raises the error where there is none, or too often."""
        if self.last is None or self.run.turn >= MOST_TURNS:
            raise error
        turn = self.run.turn + 1
        self.run.optimiser.zero_grad(set_to_none=True)
        self.run.resume(self.last)
        self.run.turn, self.run.skipped = turn, 0
        self.observer.alarm(f"{error} Training went back to step {self.run.step} and goes on with another order.")

    def hand_back(self) -> Result:
        """Keep what there is; where no step was taken, nothing is. What cannot be written is done again later."""
        if self.run.step:
            self.keep()
        return self._result(self.last if self.run.step else None, finished=False)

    def finish(self) -> Result:
        """The weights of the last epoch, or of the best one where the recipe says so."""
        run = self.run
        if run.step != self.kept_step:
            self.keep()  # so that the training can go on after its end
        if run.recipe.select == "best" and self.best is not None:
            run.take_weights(self.best)
        file = run.finish(self.folder / "final.safetensors", self.facts) if run.world.is_first else None
        return self._result(file, finished=True)

    def _result(self, file: Path | None, *, finished: bool) -> Result:
        run = self.run
        last = run.history[-1] if run.history else {}
        validation = {**last, "epochs": run.history, "best_epoch": run.selection.best_epoch}
        return Result(file=file, step=run.step, num_steps=run.num_steps, finished=finished, validation=validation)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


class Silent:
    """The observer of a rank that nobody watches."""

    def stop(self) -> bool:
        return False

    def progress(self, step: int, total: int, epoch: int) -> None: ...

    def curve(self, step: int, epoch: int, values: Mapping[str, float]) -> None: ...

    def keep(self, file: Path, step: int, total: int, *, is_best: bool) -> Path:
        return file

    def alarm(self, message: str) -> None: ...


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
