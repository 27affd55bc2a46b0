"""Counts of events before the index: what is known of a scan's person when the scan is made.

Shape suffixes: N = member, K = group of concepts (0 is every event), W = window.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ml.labelling import DAY_SECONDS, ConceptTasks

EVER = np.iinfo(np.int64).max // 4
"""A window without a beginning, seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Events:
    """Events of some persons or of some members, one after the other; each stretch ascending in (time, concept)."""

    ptr: NDArray[np.int64]
    time: NDArray[np.int64]
    """Seconds since 1970-01-01 00:00 times 2, plus 1 where only the date is known."""
    concept: NDArray[np.int32]

    @classmethod
    def none(cls, stretches: int) -> Events:
        """So many empty stretches."""
        return cls(ptr=np.zeros(stretches + 1, np.int64), time=np.zeros(0, np.int64), concept=np.zeros(0, np.int32))

    def before(self, row: NDArray[np.int64], index_seconds: NDArray[np.int64]) -> Events:
        """A stretch of its own for each of N members, without what happened from its index on."""
        lengths = self.ptr[row + 1] - self.ptr[row]
        ends = np.cumsum(lengths)
        take = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(self.ptr[row] - (ends - lengths), lengths)
        kept = self.time[take] >> 1 < np.repeat(index_seconds, lengths)
        before = np.concatenate([[0], np.cumsum(kept)])
        take = take[kept]
        ptr = np.concatenate([[0], before[ends]]).astype(np.int64)
        return Events(ptr=ptr, time=self.time[take], concept=self.concept[take])


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """What N members look back from."""

    index_seconds: NDArray[np.int64]
    """(N,)"""
    index_date_only: NDArray[np.bool_]
    """(N,) True where only the day of the scan is known."""
    row: NDArray[np.int64]
    """(N,) which stretch of the events is the member's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """What lies behind N members."""

    counts: NDArray[np.int32]
    """(N, K, W) events; group 0 is every event."""
    first_days: NDArray[np.float64]
    """(N,) days from the first event to the index; nan where there is none."""
    last_days: NDArray[np.float64]
    """(N,) days from the last."""


class Counter:
    """Counts events before the index by groups of concepts and windows; makes its tables once."""

    def __init__(self, groups: ConceptTasks, num_groups: int, window_seconds: NDArray[np.int64]) -> None:
        """`groups` says which of `num_groups` each concept is of; a window of `EVER` has no beginning."""
        from ml import label_kernel

        self.groups, self.num_groups, self.windows = groups, num_groups, window_seconds
        self.lookup = np.full((1 << max(4, int(2 * len(groups.concept)).bit_length()), 2), -1, np.int32)
        label_kernel.fill_table(groups.concept, self.lookup)

    def count(self, moments: Moments, events: Events, hidden: Events, chosen: Events) -> Counted:
        """Look back from N members (docs/science.md, sections 1 and 2).

        An event counts if it is earlier than the index; where it or the index has only a day, if its day is earlier.

        Args:
            moments: the members.
            events: timelines.
            hidden: a stretch a member: which of these events are no features.
            chosen: a stretch a member: rows that statements chose for single groups, under negative concepts; they
                are events of the timeline, too, and count for their groups alone.
        """
        from ml import feature_kernel

        n = len(moments.row)
        counts = np.zeros((n, self.num_groups + 1, len(self.windows)), np.int32)
        ends = np.full((n, 2), np.iinfo(np.int64).min, np.int64)
        feature_kernel.look_back(
            moments.index_seconds, moments.index_date_only, moments.row, events.ptr, events.time, events.concept,
            hidden.ptr, hidden.time, hidden.concept, chosen.ptr, chosen.time, chosen.concept, self.lookup,
            self.groups.ptr, self.groups.task, self.windows, counts, ends,
        )  # fmt: skip
        known = ends[:, 0] != np.iinfo(np.int64).min
        days = np.full((n, 2), np.nan)
        days[known] = (moments.index_seconds[known, None] - ends[known]) / DAY_SECONDS
        return Counted(counts=counts, first_days=days[:, 0], last_days=days[:, 1])
