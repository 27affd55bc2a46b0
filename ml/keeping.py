"""Stops of a training: when they are kept, where it goes back to when it diverges, and who is told."""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ml import checkpoint
from ml.training import Training

MOST_TURNS = 2
"""How often a run that diverges goes back."""
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

    def keep(self, file: Path, step: int, total: int, *, is_best: bool, is_retreat: bool) -> Path:
        """A stop on the way lies at `file`, to be published; where it is from now on.

        One that is the best, or the retreat, stays until another one is.

        Raises:
            OSError: it cannot be written.
        """
        ...

    def went_back(self, step: int) -> None:
        """What came after a step is undone: curves, and stops on the way, which nobody shall go on from."""
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


class Silent:
    """The observer of a rank that nobody watches."""

    def stop(self) -> bool:
        return False

    def progress(self, step: int, total: int, epoch: int) -> None: ...

    def curve(self, step: int, epoch: int, values: Mapping[str, float]) -> None: ...

    def keep(self, file: Path, step: int, total: int, *, is_best: bool, is_retreat: bool) -> Path:
        return file

    def went_back(self, step: int) -> None: ...

    def alarm(self, message: str) -> None: ...


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """Stops that there are when a training begins to go on."""

    last: Path | None = None
    """To go on from."""
    best: Path | None = None
    """That was the best so far."""
    retreat: Path | None = None
    """To go back to; None where that is the start."""
    extends: bool = False
    """`retreat` is the end of a training with fewer epochs, which goes on."""

    @property
    def begins(self) -> bool:
        """Whether a training that goes on after its end is still there."""
        return self.extends and self.last == self.retreat


class Keeper:
    """Writes stops on the way, often enough and not too often, and goes back where training diverges.

    When stops are kept depends on the clock, and must decide nothing. So training goes back to the last retreat, a stop
    at a step that the recipe alone determines, or to the start where there is none yet.
    """

    def __init__(
        self, run: Training, folder: Path, facts: Mapping[str, Any], observer: Observer, kept: Kept | None = None
    ) -> None:
        kept = kept or Kept()
        self.run, self.folder, self.facts, self.observer = run, folder, facts, observer
        self.last, self.best = None if kept.begins else kept.last, kept.best
        self.retreat, self.extends = kept.retreat, kept.extends
        if self.retreat is None and run.retreat:  # it was lost: the next best, which is told when it is used
            self.retreat = kept.last
        self.kept_step = run.step if self.last is not None else -1
        self.at, self.cost = time.monotonic(), 0.0

    @property
    def is_due(self) -> bool:
        """Whether to keep a stop: a retreat always; at the end of an epoch and every few seconds where that is worth
        its cost."""
        if self.run.step == self.kept_step or not self.run.step:
            return False
        elapsed = time.monotonic() - self.at
        due = elapsed > KEEP_SECONDS or self.run.step % self.run.steps_per_epoch == 0
        return self.run.is_at_retreat or (due and elapsed > KEEP_TIMES * self.cost)

    def keep(self, *, is_best: bool = False) -> bool:
        """Write a stop; where that fails, training goes on, and whoever watches is told. Whether it is kept."""
        began = time.monotonic()
        if self.run.world.is_first:
            self._try_to_write(is_best=is_best)
        self.at = time.monotonic()
        self.cost = self.at - began
        paths = [_text(path) for path in (self.last, self.best, self.retreat)]
        word = self.run.world.agree([self.kept_step, self.run.retreat, self.extends, *paths])
        self.kept_step, self.run.retreat, self.extends = word[:3]
        self.last, self.best, self.retreat = map(_path, word[3:])
        return self.kept_step == self.run.step

    def _try_to_write(self, *, is_best: bool) -> None:
        for attempt in range(1 + WRITE_AGAIN):
            try:
                self._write(is_best=is_best)
                break
            except checkpoint.NotFinite as error:
                self.observer.alarm(f"Step {self.run.step} is not kept: {error}")
                break
            except OSError as error:
                if attempt == WRITE_AGAIN:
                    full = " Is the disk full?" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
                    why = error.strerror or str(error).rstrip(".")
                    self.observer.alarm(
                        f"Step {self.run.step} could not be kept ({why}); training goes on, and "
                        f"would go on from the stop before if it ended now.{full}"
                    )
                else:
                    time.sleep(WAIT_SECONDS)

    def _write(self, *, is_best: bool) -> None:
        run, before = self.run, self.run.retreat
        run.retreat = run.step if run.is_at_retreat else before
        try:
            file = run.save(self.folder / f"step-{run.step}.safetensors", self.facts)
            how = {"is_best": is_best, "is_retreat": run.is_at_retreat}
            self.last = self.observer.keep(file, run.step, run.num_steps, **how)
        except BaseException:
            run.retreat = before
            raise
        self.kept_step = run.step
        if is_best:
            self.best = self.last
        if run.is_at_retreat:
            self.retreat, self.extends = self.last, False

    def go_back(self, error: Diverged) -> None:
        """Take up the retreat, or start again, with another order of scans. Raises the error after some turns."""
        run, turn, wanted = self.run, self.run.turn + 1, self.run.retreat
        if turn > MOST_TURNS:
            raise error
        run.optimiser.zero_grad(set_to_none=True)
        if self.retreat is None:
            run.begin_again()
        else:
            run.resume(self.retreat, extends=self.extends)
        run.turn, run.skipped = turn, 0
        self.last = None if self.extends else self.retreat
        self.kept_step = run.step if self.last is not None else -1
        if self.best is not None and checkpoint.facts(self.best)["step"] > run.step:
            self.best = None
            run.selection.begin_again(run.epoch)
        lost = f" Step {wanted}, where it should have gone, is lost." if run.step != wanted else ""
        if run.world.is_first:
            self.observer.went_back(run.step)
            self.observer.alarm(f"{error} Training went back to step {run.step} and goes on in another order.{lost}")

    def hand_back(self) -> Result:
        """Keep what there is; where no step was taken, nothing is. What cannot be written is done again later."""
        if self.run.step and self.run.step != self.kept_step:
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
