"""Which epoch is the best so far, whether to go on, and a cheap probe of what the embeddings tell.

The probe is the same for all arms: a ridge Cox model on a few principal components of embeddings of some train scans,
judged by Harrell's C on the tuning scans, as a mean over the tasks with most outcomes there. It is for choosing and
watching; `evaluate` is for claims.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ml.labelling import CENSORED, COMPETING, EVENT, LabelArrays, TaskOutcomes, task_outcomes

MOST_TASKS, COMPONENTS, RIDGE = 8, 32, 1.0
FEWEST = 20
"""Outcomes, and scans without one, that a task needs among the train scans of the probe and on tuning."""


@dataclass(slots=True)
class Selection:
    """The best epoch by one figure, larger is better."""

    watch: str
    """tuning_gain or tuning_probe_c."""
    min_delta: float
    patience: int
    """Epochs in a row without a better one that end the training; 0: it goes on."""
    best: float = -math.inf
    best_epoch: int = -1
    last_epoch: int = -1
    from_epoch: int = 0
    """Where patience begins: of a training that goes on after its end or went back, there."""

    def note(self, epoch: int, values: dict[str, float]) -> bool:
        """Whether this epoch is the best so far. Epochs that could not be judged count as no better."""
        self.last_epoch = epoch
        value = values.get(self.watch, math.nan)
        if epoch > 0 and value > self.best + (self.min_delta if self.best_epoch > 0 else 0):
            self.best, self.best_epoch = value, epoch
            return True
        return False

    def begin_again(self, epoch: int) -> None:
        """Look for the best anew from an epoch on: the one that was found is undone."""
        self.best, self.best_epoch, self.from_epoch = -math.inf, -1, epoch

    @property
    def is_over(self) -> bool:
        """Whether nothing better came for too long."""
        return bool(self.patience) and self.last_epoch - max(self.best_epoch, self.from_epoch) >= self.patience


@dataclass(frozen=True, slots=True)
class _Judged:
    """One task at the scans of the probe."""

    train: NDArray[np.int64]
    """Places among the probe's train scans that the task may use."""
    tuning: NDArray[np.int64]
    outcomes: TaskOutcomes


class Probe:
    """Harrell's C of some tasks on tuning, of embeddings of some train scans and all tuning scans."""

    def __init__(self, labels: LabelArrays, train: NDArray[np.int64], tuning: NDArray[np.int64]) -> None:
        self.train, self.tuning = train, tuning
        count = np.zeros(len(labels.start_seconds), np.int64)
        for row in tuning.tolist():
            count[labels.events.task[labels.events.ptr[row] : labels.events.ptr[row + 1]]] += 1
        likely = np.argsort(-count, kind="stable")[: 4 * MOST_TASKS]
        judged = (self._task(labels, position) for position in likely.tolist())
        self.tasks = [one for one in judged if one is not None][:MOST_TASKS]

    def _task(self, labels: LabelArrays, position: int) -> _Judged | None:
        outcomes = task_outcomes(labels, position)
        used = np.isin(outcomes.status, (EVENT, COMPETING, CENSORED))
        event = outcomes.status == EVENT
        places = [np.flatnonzero(used[rows]) for rows in (self.train, self.tuning)]
        for rows, place in zip((self.train, self.tuning), places, strict=True):
            events = int(event[rows[place]].sum())
            if min(events, len(place) - events) < FEWEST:
                return None
        return _Judged(places[0], places[1], outcomes)

    def c(self, train_ND: NDArray[np.float32], tuning_ND: NDArray[np.float32]) -> float | None:
        """The macro-mean; None where no task can be judged, or the embeddings do not differ.

        Args:
            train_ND: raw embeddings of the probe's train scans.
            tuning_ND: of its tuning scans.
        """
        if not self.tasks or not (np.isfinite(train_ND).all() and np.isfinite(tuning_ND).all()):
            return None
        mean, sd = train_ND.mean(0), train_ND.std(0)
        varies = sd > 1e-6 * (1 + np.abs(mean))
        if not varies.any():
            return None
        x, y = ((a[:, varies] - mean[varies]) / sd[varies] for a in (train_ND, tuning_ND))
        _, _, axes = np.linalg.svd(x.astype(np.float64), full_matrices=False)
        axes = axes[:COMPONENTS].T
        scale = (x @ axes).std(0)
        x, y = x @ axes / scale, y @ axes / scale
        return float(np.mean([self._judge(one, x, y) for one in self.tasks]))

    def _judge(self, task: _Judged, x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
        from ml.pairs import concordance
        from ml.survival import fit_cox

        time, event = task.outcomes.time_days, task.outcomes.status == EVENT
        learn, judge = self.train[task.train], self.tuning[task.tuning]
        fit = fit_cox(x[task.train], time[learn], event[learn], penalty=RIDGE, tolerance=1e-6)
        scans = np.arange(len(judge))
        ones = np.ones(len(judge))
        risk = y[task.tuning] @ fit.coefficients
        pairs = concordance(time[judge], event[judge], risk, scans, ones, np.ones((len(judge), 1), np.uint16))
        return float(pairs[0][0] / pairs[1][0])
