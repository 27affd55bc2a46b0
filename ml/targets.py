"""What the model learns from: sparse labels of some scans, made dense for one batch at a time.

Shape suffixes: N = scan of the cohort, B = scan of a batch, K = task, L = binary label (task × horizon).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ml.hazards import choose_edges, null_log_hazard
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
    where, seconds = _cells(labels.windows, rows)
    window_BK[where] = seconds
    end_BK = np.where(labels.to_data_cut, labels.data_cut_seconds[rows, None], labels.follow_up_seconds[rows, None])

    at_risk_BK = labels.eligible[rows, None] & (end_BK > window_BK)
    at_risk_BK[_cells(labels.ineligibles, rows)[0]] = False
    prior_BK = np.zeros_like(at_risk_BK)
    prior_BK[_cells(labels.priors, rows)[0]] = True
    at_risk_BK &= ~(prior_BK & labels.excludes_prior)

    death_B1 = labels.death_seconds[rows, None]
    died_BK = labels.competing & (death_B1 >= 0) & (death_B1 <= end_BK)
    time_BK, event_BK = np.where(died_BK, death_B1, end_BK), np.zeros_like(at_risk_BK)
    where, seconds = _cells(labels.events, rows)
    time_BK[where], event_BK[where] = seconds, True
    event_BK &= at_risk_BK
    days = np.float32(1 / DAY_SECONDS)
    return Outcomes(
        time_BK=(np.where(at_risk_BK, time_BK, 0) * days).astype(np.float32),
        start_BK=(np.maximum(window_BK, 0) * days).astype(np.float32),
        event_BK=event_BK,
        at_risk_BK=at_risk_BK,
    )


def _cells(
    sparse: Sparse, rows: NDArray[np.int64]
) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]]:
    """Where the entries of `rows` lie in a dense (B, K) array, and their seconds (0 where the list has none)."""
    begin, count = sparse.ptr[rows], sparse.ptr[rows + 1] - sparse.ptr[rows]
    row = np.repeat(np.arange(len(rows)), count)
    entry = np.repeat(begin - np.cumsum(count) + count, count) + np.arange(int(count.sum()))
    seconds = np.zeros(len(entry), np.int64) if sparse.seconds is None else sparse.seconds[entry]
    return (row, sparse.task[entry].astype(np.int64)), seconds


def totals(
    labels: LabelArrays, rows: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float32]]:
    """Events (K,) and person-days (K,) over the cells of scans `rows` that train, and the times of all events, days.

    Cells that no list names are summed up by the rule their task shares with others, the rest one by one: most cells
    of thousands of tasks are alike.
    """
    table = [labels.start_seconds, labels.excludes_prior, labels.competing, labels.to_data_cut]
    rules, rule_of = np.unique(np.stack(table, axis=1).astype(np.int64), axis=0, return_inverse=True)
    rule_of, tasks = rule_of.reshape(-1), len(labels.start_seconds)
    num_events, seconds, times = np.zeros(tasks), np.zeros(tasks), [np.zeros(0, np.float32)]
    for begin in range(0, len(rows), 8 * CHUNK):
        chunk = rows[begin : begin + 8 * CHUNK]
        alike_GB = np.stack([_untouched(labels, chunk, *rule) for rule in rules]) if len(rules) else np.zeros((0, 0))
        seconds += alike_GB.sum(1)[rule_of]
        row, task, time, exposure, event = _named_cells(labels, chunk)
        seconds += np.bincount(task, exposure - alike_GB[rule_of[task], row], tasks) if len(task) else 0
        num_events += np.bincount(task[event], minlength=tasks)
        times.append((time[event] / DAY_SECONDS).astype(np.float32))
    return num_events, seconds / DAY_SECONDS, np.concatenate(times)


def _untouched(
    labels: LabelArrays, rows: NDArray[np.int64], start: int, _: int, competing: int, to_data_cut: int
) -> NDArray[np.float64]:
    """(B,) seconds at risk of a task under one rule where no list names the scan."""
    end = (labels.data_cut_seconds if to_data_cut else labels.follow_up_seconds)[rows]
    death = labels.death_seconds[rows]
    until = np.where((death >= 0) & (death <= end), death, end) if competing else end
    at_risk = labels.eligible[rows] & (end > start)
    return np.where(at_risk, np.maximum(until - max(start, 0), 0), 0).astype(np.float64)


def _named_cells(
    labels: LabelArrays, rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_]]:
    """Cells that a list names, which may differ from the others: row of `rows`, task, time, seconds at risk, event."""
    tasks = len(labels.start_seconds)
    keys, seconds = [], []
    for sparse in (labels.events, labels.windows, labels.ineligibles, labels.priors):
        (row, task), found = _cells(sparse, rows)
        if sparse is labels.priors:
            row, task, found = (a[labels.excludes_prior[task]] for a in (row, task, found))
        keys.append(row * tasks + task)
        seconds.append(found)
    key = np.sort(np.concatenate(keys))  # np.unique hashes, which takes ten times longer
    key = key[np.diff(key, prepend=-1) != 0]
    row, task = key // tasks, key % tasks
    at_event, at_window, at_bar, at_prior = (np.searchsorted(key, one) for one in keys)
    window = labels.start_seconds[task]
    window[at_window] = seconds[1]
    place = rows[row]
    end = np.where(labels.to_data_cut[task], labels.data_cut_seconds[place], labels.follow_up_seconds[place])
    death = labels.death_seconds[place]
    at_risk = labels.eligible[place] & (end > window)
    at_risk[at_bar] = at_risk[at_prior] = False
    time = np.where(labels.competing[task] & (death >= 0) & (death <= end), death, end)
    time[at_event] = seconds[0]
    event = np.zeros(len(key), np.bool_)
    event[at_event] = True
    exposure = np.where(at_risk, np.maximum(time - np.maximum(window, 0), 0), 0).astype(np.float64)
    return row, task, time, exposure, event & at_risk


def _chunks(rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    for begin in range(0, len(rows), CHUNK):
        yield rows[begin : begin + CHUNK]


class TteTargets:
    """Targets of the arm `tte`, with the pieces and the null model of the train split."""

    def __init__(self, labels: LabelArrays, train_rows: NDArray[np.int64], pieces: int = 8) -> None:
        """Choose pieces by, and count events and person-days over, the train scans' cells that train.

        Raises:
            ValueError: no outcome at any train scan.
        """
        self.labels, self.width = labels, len(labels.start_seconds)
        num_events, person_days, times = totals(labels, train_rows)
        self.edges = choose_edges(times.astype(np.float64), pieces)
        self.num_events, self.person_days = num_events, person_days
        self.null = null_log_hazard(num_events, person_days)
        self.per_scan = float(num_events.sum()) / len(train_rows)
        """Mean number of events a train scan: the denominator that makes nats per event."""
        self.null_loss = float((np.exp(self.null) * person_days - self.null * num_events).sum() / num_events.sum())
        """Of the null model over the train scans, nats per event."""

    def batch(self, rows: NDArray[np.int64]) -> dict[str, NDArray[np.generic]]:
        o = outcomes(self.labels, rows)
        return {"time": o.time_BK, "start": o.start_BK, "event": o.event_BK, "at_risk": o.at_risk_BK}


class BinaryTargets:
    """Targets that are right or wrong (arms `mtl` and `visit`), with their train frequencies."""

    width: int

    def __init__(self, labels: LabelArrays, train_rows: NDArray[np.int64]) -> None:
        """Count positives and known labels over the train scans. Raises ValueError without any known label."""
        self.labels = labels
        positive, known = np.zeros(self.width), np.zeros(self.width)
        for chunk in _chunks(train_rows):
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
        where, seconds = _cells(labels.events, rows)
        event_BK = np.full(o.event_BK.shape, np.iinfo(np.int64).max)
        event_BK[where] = seconds
        end_BK = np.where(labels.to_data_cut, labels.data_cut_seconds[rows, None], labels.follow_up_seconds[rows, None])
        death_B1 = labels.death_seconds[rows, None]
        died_BK = labels.competing & (death_B1 >= 0) & (death_B1 <= end_BK)

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
        label_BK[_cells(self.labels.visits, rows)[0]] = True
        return {"label": label_BK, "known": np.broadcast_to(self.labels.eligible[rows, None], label_BK.shape)}
