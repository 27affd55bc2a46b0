"""What the model learns from: sparse labels of some scans, made dense for one batch at a time.

Shape suffixes: N = scan of the cohort, B = scan of a batch, K = task, L = binary label (task × horizon).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ml.labelling import DAY_SECONDS, LabelArrays, Sparse

CHUNK = 256
"""Scans made dense at once where a whole split is summed up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcomes:
    """Time-to-event labels of some scans, dense."""

    time_BK: NDArray[np.float32]
    """Days from the index to the outcome, else to the end of follow-up."""
    start_BK: NDArray[np.float32]
    """Days from the index at which the risk window opens, 0 or later."""
    event_BK: NDArray[np.bool_]
    """True where the outcome was observed."""
    at_risk_BK: NDArray[np.bool_]
    """False where the task may not use the scan (prior, ineligible)."""


def outcomes(labels: LabelArrays, rows: NDArray[np.int64]) -> Outcomes:
    """The outcomes of scans `rows` (B,), all K tasks (docs/science.md section 2; ineligible > prior > event)."""
    window_BK = np.broadcast_to(labels.start_seconds, (len(rows), len(labels.start_seconds))).copy()
    where, seconds = cells_of(labels.windows, rows)
    window_BK[where] = seconds
    end_BK, died_BK = ends(labels, rows)

    at_risk_BK = labels.eligible[rows, None] & (end_BK > window_BK)
    at_risk_BK[cells_of(labels.ineligibles, rows)[0]] = False
    prior_BK = np.zeros_like(at_risk_BK)
    prior_BK[cells_of(labels.priors, rows)[0]] = True
    at_risk_BK &= ~(prior_BK & labels.excludes_prior)

    time_BK, event_BK = np.where(died_BK, labels.death_seconds[rows, None], end_BK), np.zeros_like(at_risk_BK)
    where, seconds = cells_of(labels.events, rows)
    time_BK[where], event_BK[where] = seconds, True
    event_BK &= at_risk_BK
    days = 1 / DAY_SECONDS
    return Outcomes(
        time_BK=(np.where(at_risk_BK, time_BK, 0) * days).astype(np.float32),
        start_BK=(np.maximum(window_BK, 0) * days).astype(np.float32),
        event_BK=event_BK,
        at_risk_BK=at_risk_BK,
    )


def cells_of(
    sparse: Sparse, rows: NDArray[np.int64]
) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]]:
    """Where the entries of `rows` lie in a dense (B, K) array, and their seconds (0 where the list has none)."""
    begin, count = sparse.ptr[rows], sparse.ptr[rows + 1] - sparse.ptr[rows]
    row = np.repeat(np.arange(len(rows)), count)
    entry = np.repeat(begin - np.cumsum(count) + count, count) + np.arange(int(count.sum()))
    seconds = np.zeros(len(entry), np.int64) if sparse.seconds is None else sparse.seconds[entry]
    return (row, sparse.task[entry].astype(np.int64)), seconds


def chunks(rows: NDArray[np.int64], size: int = CHUNK) -> Iterator[NDArray[np.int64]]:
    """Rows, a few at a time."""
    for begin in range(0, len(rows), size):
        yield rows[begin : begin + size]


def ends(labels: LabelArrays, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(B, K) seconds to the end of follow-up, and whether a competing death came by then."""
    end_BK = np.where(labels.to_data_cut, labels.data_cut_seconds[rows, None], labels.follow_up_seconds[rows, None])
    death_B1 = labels.death_seconds[rows, None]
    return end_BK, labels.competing & (death_B1 >= 0) & (death_B1 <= end_BK)


class BinaryTargets:
    """Targets that are right or wrong (arms `mtl` and `visit`), with their train frequencies."""

    width: int

    def __init__(self, labels: LabelArrays, train_rows: NDArray[np.int64]) -> None:
        """Count positives and known labels over the train scans. Raises ValueError without any known label."""
        self.labels = labels
        positive, known = np.zeros(self.width), np.zeros(self.width)
        for chunk in chunks(train_rows):
            b = self.batch(chunk)
            positive += (b["label"] & b["known"]).sum(0)
            known += b["known"].sum(0)
        if not positive.any():
            raise ValueError("Expected positive labels at train scans, found none.")
        share = (positive + 0.5) / (known + 1)
        self.positive, self.known = positive, known
        self.null = np.log(share / (1 - share))
        self.per_scan = float(known.sum()) / len(train_rows)
        """Mean number of known labels a train scan."""
        self.null_loss = float((known * np.logaddexp(0, self.null) - positive * self.null).sum() / known.sum())
        """Of the null model over the train scans, nats per label."""

    def batch(self, rows: NDArray[np.int64]) -> dict[str, NDArray[np.bool_]]:
        """`label` and `known`, both (B, L)."""
        raise NotImplementedError


class MtlTargets(BinaryTargets):
    """Each clinical task at each of its horizons, side by side: 1 iff the outcome came by then."""

    def __init__(
        self, labels: LabelArrays, train_rows: NDArray[np.int64], horizons_days: Sequence[Sequence[int]]
    ) -> None:
        """`horizons_days` holds the horizons of each of the K tasks."""
        self.task = np.array([k for k, days in enumerate(horizons_days) for _ in days], np.int64)
        self.horizon_seconds = np.array([d for days in horizons_days for d in days], np.int64) * DAY_SECONDS
        self.width = len(self.task)
        super().__init__(labels, train_rows)

    def batch(self, rows: NDArray[np.int64]) -> dict[str, NDArray[np.bool_]]:
        """Known: event by the horizon, or followed up to it; death before it counts as none where it competes."""
        labels, task = self.labels, self.task
        o = outcomes(labels, rows)
        where, seconds = cells_of(labels.events, rows)
        event_BK = np.full(o.event_BK.shape, np.iinfo(np.int64).max)
        event_BK[where] = seconds
        end_BK, died_BK = ends(labels, rows)

        by_then_BL = o.event_BK[:, task] & (event_BK[:, task] <= self.horizon_seconds)
        followed_BL = (end_BK[:, task] >= self.horizon_seconds) | died_BK[:, task]
        return {"label": by_then_BL, "known": o.at_risk_BK[:, task] & (by_then_BL | followed_BL)}


class VisitTargets(BinaryTargets):
    """The pretraining tasks seen in the visit that holds the index: their codes without time."""

    def __init__(self, labels: LabelArrays, train_rows: NDArray[np.int64]) -> None:
        self.width = len(labels.start_seconds)
        super().__init__(labels, train_rows)

    def batch(self, rows: NDArray[np.int64]) -> dict[str, NDArray[np.bool_]]:
        label_BK = np.zeros((len(rows), self.width), np.bool_)
        label_BK[cells_of(self.labels.visits, rows)[0]] = True
        return {"label": label_BK, "known": np.broadcast_to(self.labels.eligible[rows, None], label_BK.shape)}
