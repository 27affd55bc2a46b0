"""Targets of the arm `tte`: what trains at each scan and task, as few numbers as there are differences.

Of thousands of tasks a scan has an outcome in hundreds. All other tasks under one rule are at risk over one and the
same stretch of time, so a batch holds that stretch once a rule, and one entry for each cell that a list names. Shape
suffixes: B = scan, G = rule (tasks with equal rules share one), K = task, E = cell that a list names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ml.hazards import choose_edges, null_log_hazard, null_log_odds, time_at_risk
from ml.labelling import DAY_SECONDS, LabelArrays, Sparse
from ml.targets import cells_of, chunks

CHUNK = 2048
"""Scans summed up at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cells:
    """Scans and tasks that differ from what is shared, and the stretch over which each is at risk."""

    row: NDArray[np.int64]
    """(E,) which of the rows asked for."""
    task: NDArray[np.int64]
    opens: NDArray[np.int64]
    """(E,) seconds from the index at which the risk window opens, 0 or later."""
    until: NDArray[np.int64]
    """(E,) seconds to the outcome, competing death or end of follow-up; `opens` where the cell carries nothing."""
    event: NDArray[np.bool_]


def with_death(labels: LabelArrays) -> LabelArrays:
    """The labels with death as one more outcome, the last, from the index to the end of follow-up."""
    death, end = labels.death_seconds, labels.follow_up_seconds
    died = labels.eligible & (death > 0) & (death <= end)
    events, tasks = labels.events, len(labels.start_seconds)
    at = events.ptr[1:][died]
    seconds = np.zeros(len(events.task), np.int64) if events.seconds is None else events.seconds
    more = Sparse(
        ptr=events.ptr + np.concatenate([[0], np.cumsum(died)]),
        task=np.insert(events.task, at, np.int16(tasks)),
        seconds=np.insert(seconds, at, death[died]),
    )
    return replace(
        labels,
        events=more,
        start_seconds=np.append(labels.start_seconds, 0),
        excludes_prior=np.append(labels.excludes_prior, False),
        competing=np.append(labels.competing, False),
        to_data_cut=np.append(labels.to_data_cut, False),
    )


class Stretches:
    """Who is at risk when, of all scans and tasks of a label set."""

    def __init__(self, labels: LabelArrays) -> None:
        self.labels = labels
        table = [labels.start_seconds, labels.competing, labels.to_data_cut]
        rules, rule_of = np.unique(np.stack(table, axis=1).astype(np.int64), axis=0, return_inverse=True)
        self.rules, self.rule_of = rules, rule_of.reshape(-1).astype(np.int64)
        self.num_tasks = len(labels.start_seconds)

    def shared(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(B, G) seconds at which tasks that no list names come under risk, and until when."""
        labels, (start, competing, to_data_cut) = self.labels, self.rules.T
        end = np.where(to_data_cut, labels.data_cut_seconds[rows, None], labels.follow_up_seconds[rows, None])
        death = labels.death_seconds[rows, None]
        until = np.where(competing.astype(bool) & (death >= 0) & (death <= end), death, end)
        opens = np.broadcast_to(np.maximum(start, 0), end.shape)
        at_risk = labels.eligible[rows, None] & (end > start)
        return opens, np.where(at_risk, np.maximum(until, opens), opens)

    def cells(self, rows: NDArray[np.int64]) -> Cells:
        """Cells that a list names: outcomes, windows of their own, history that disqualifies, the ineligible."""
        labels, tasks = self.labels, self.num_tasks
        keys, seconds = [], []
        for sparse in (labels.events, labels.windows, labels.ineligibles, labels.priors):
            (row, task), found = cells_of(sparse, rows)
            if sparse is labels.priors:
                row, task, found = (a[labels.excludes_prior[task]] for a in (row, task, found))
            keys.append(row * tasks + task)
            seconds.append(found)
        key, (at_event, at_window, at_bar, at_prior) = _merged(keys)
        row, task = key // max(tasks, 1), key % max(tasks, 1)
        window = labels.start_seconds[task]
        window[at_window] = seconds[1]
        place = rows[row]
        end = np.where(labels.to_data_cut[task], labels.data_cut_seconds[place], labels.follow_up_seconds[place])
        death = labels.death_seconds[place]
        at_risk = labels.eligible[place] & (end > window)
        at_risk[at_bar] = at_risk[at_prior] = False
        until = np.where(labels.competing[task] & (death >= 0) & (death <= end), death, end)
        until[at_event] = seconds[0]
        event = np.zeros(len(key), np.bool_)
        event[at_event] = True
        opens = np.maximum(window, 0)
        until = np.where(at_risk, np.maximum(until, opens), opens)
        return Cells(row=row, task=task, opens=opens, until=until, event=event & at_risk)

    def totals(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float32]]:
        """Events (K,) and person-days (K,) over the cells of scans `rows` that train, and times of all events, days."""
        num_events, seconds, times = np.zeros(self.num_tasks), np.zeros(self.num_tasks), [np.zeros(0, np.float32)]
        for chunk in chunks(rows, CHUNK):
            opens, until = self.shared(chunk)
            length = (until - opens).astype(np.float64)
            cells = self.cells(chunk)
            own = (cells.until - cells.opens).astype(np.float64) - length[cells.row, self.rule_of[cells.task]]
            seconds += length.sum(0)[self.rule_of] + np.bincount(cells.task, own, self.num_tasks)
            num_events += np.bincount(cells.task[cells.event], minlength=self.num_tasks)
            times.append(in_days(cells.until[cells.event]))
        return num_events, seconds / DAY_SECONDS, np.concatenate(times)

    def pieces_at_risk(self, rows: NDArray[np.int64], edges: NDArray[np.float64]) -> NDArray[np.float64]:
        """(K,) how many pieces of time, over scans `rows`, count as lived through or as that of the outcome."""
        total = np.zeros(self.num_tasks)
        for chunk in chunks(rows, CHUNK):
            shared = _counted(*self.shared(chunk), None, edges)
            cells = self.cells(chunk)
            own = _counted(cells.opens, cells.until, cells.event, edges) - shared[cells.row, self.rule_of[cells.task]]
            total += shared.sum(0)[self.rule_of] + np.bincount(cells.task, own, self.num_tasks)
        return total


def in_days(seconds: NDArray[np.int64]) -> NDArray[np.float32]:
    """The days that losses read; edges of pieces are such numbers, too, so that a time is on one side for all."""
    return (seconds * (1 / DAY_SECONDS)).astype(np.float32)


def _counted(
    opens: NDArray[np.int64], until: NDArray[np.int64], event: NDArray[np.bool_] | None, edges: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Pieces (…) of which at least half was at risk, and the outcome's."""
    begin, end = (in_days(a).astype(np.float64)[..., None] for a in (opens, until))
    counted = time_at_risk(begin, end, edges[:-1], edges[1:]) >= np.diff(edges) / 2
    if event is not None:
        inside = (edges[:-1] < end) & (end <= edges[1:])
        counted |= inside & event[..., None]
    return np.asarray(counted.sum(-1), np.float64)


Places = NDArray[np.int64] | slice


def _merged(lists: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.int64], list[Places]]:
    """Numbers from 0 on that any list holds, ascending, each once; and where those of each list are among them."""
    named = [one for one in lists if len(one)]
    if len(named) == 1 and (np.diff(named[0]) > 0).all():  # pretraining tasks mostly have outcomes and nothing else
        return named[0], [slice(0, len(one)) for one in lists]
    key = np.sort(np.concatenate(lists))  # np.unique hashes, which takes ten times longer
    key = key[np.diff(key, prepend=-1) != 0]
    return key, [np.searchsorted(key, one) for one in lists]


class TteTargets:
    """Targets of the arm `tte`, with the pieces and the null model of the train split."""

    def __init__(
        self,
        labels: LabelArrays,
        train_rows: NDArray[np.int64],
        pieces: int = 8,
        *,
        objective: str = "piecewise",
        death: str = "censors",
    ) -> None:
        """Choose pieces by, and count events and time at risk over, the train scans' cells that train.

        Args:
            labels: of the whole cohort.
            train_rows: its rows that train.
            pieces: of time, at most.
            objective: piecewise, discrete or cox; docs/science.md section 3 defines them.
            death: `censors`, or `competes` for one more output, the hazard of death.

        Raises:
            ValueError: no outcome at any train scan.
        """
        self.labels = labels = with_death(labels) if death == "competes" else labels
        self.stretches, self.width, self.objective = Stretches(labels), len(labels.start_seconds), objective
        num_events, person_days, times = self.stretches.totals(train_rows)
        self.edges = choose_edges(times.astype(np.float64), pieces).astype(np.float32).astype(np.float64)
        self.num_events, self.person_days = num_events, person_days
        self.per_scan = float(num_events.sum()) / len(train_rows)
        """Mean number of events a train scan: the denominator that makes nats per event."""
        if objective == "discrete":
            self.edges[-1] = max(np.ceil(times.max()), self.edges[-2] + 1)
            self.null, lost = self._discrete_null(train_rows)
        elif objective == "cox":
            self.edges = self.edges[[0, -1]]
            self.null, lost = np.zeros(self.width), 0.0
        else:
            self.null = null_log_hazard(num_events, person_days)
            lost = float((np.exp(self.null) * person_days - self.null * num_events).sum())
        self.null_loss = lost / float(num_events.sum())
        """Of the null model over the train scans, nats per event; 0 for cox, whose null model depends on the batch."""

    def _discrete_null(self, train_rows: NDArray[np.int64]) -> tuple[NDArray[np.float64], float]:
        pieces = self.stretches.pieces_at_risk(train_rows, self.edges)
        null = null_log_odds(self.num_events, pieces)
        return null, float((np.logaddexp(0, null) * pieces - null * self.num_events).sum())

    def batch(self, rows: NDArray[np.int64]) -> dict[str, NDArray[np.generic]]:
        """What a loss reads of scans `rows`, in days: (B, G) `opens` and `until`, and cells (E,) that differ."""
        opens, until = self.stretches.shared(rows)
        cells = self.stretches.cells(rows)
        return {
            "opens": in_days(opens),
            "until": in_days(until),
            "cell_scan": cells.row,
            "cell_task": cells.task,
            "cell_opens": in_days(cells.opens),
            "cell_until": in_days(cells.until),
            "cell_event": cells.event,
        }
