"""Counts of events before the index: what is known of a scan's person when the scan is made.

Shape suffixes: N = member, K = group of concepts (0 is every event), W = window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from ml.labelling import DAY_SECONDS, ConceptTasks

compiled: Callable[..., Any] = numba.njit(cache=True, nogil=True)

EVER = np.iinfo(np.int64).max // 4
"""A window without a beginning, seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Events:
    """Packed events of some persons (or of some members), one after the other; each stretch ascending in time."""

    ptr: NDArray[np.int64]
    time: NDArray[np.int64]
    """Seconds since 1970-01-01 00:00 times 2, plus 1 where only the date is known."""
    concept: NDArray[np.int32]


def count_before(
    index_seconds: NDArray[np.int64],
    index_date_only: NDArray[np.bool_],
    row: NDArray[np.int64],
    events: Events,
    groups: ConceptTasks,
    num_groups: int,
    window_seconds: NDArray[np.int64],
) -> NDArray[np.int32]:
    """Events before the index, by group of concepts and window (docs/science.md, sections 1 and 2: features look back).

    An event counts if it is earlier than the index; where it or the index has only a day, if its day is earlier.

    Args:
        index_seconds: (N,) of the members.
        index_date_only: (N,) whether only the day of the scan is known.
        row: (N,) which stretch of `events` is the member's person's.
        events: of these persons.
        groups: which groups a concept is of, from 0 on.
        num_groups: K - 1.
        window_seconds: (W,) how far each window reaches back; `EVER` for all.

    Returns:
        (N, K, W) counts; group 0 is every event, group k + 1 the k-th of `groups`.
    """
    counts = np.zeros((len(index_seconds), num_groups + 1, len(window_seconds)), np.int32)
    _count(
        index_seconds, index_date_only, row, events.ptr, events.time, events.concept, groups.concept, groups.ptr,
        groups.task, window_seconds, counts,
    )  # fmt: skip
    return counts


@compiled
def _count(
    index: NDArray[np.int64],
    index_date_only: NDArray[np.bool_],
    row: NDArray[np.int64],
    ptr: NDArray[np.int64],
    time: NDArray[np.int64],
    concept: NDArray[np.int32],
    known: NDArray[np.int32],
    known_ptr: NDArray[np.int64],
    group: NDArray[np.int16],
    windows: NDArray[np.int64],
    counts: NDArray[np.int32],
) -> None:
    for n in range(len(index)):
        midnight = index[n] // DAY_SECONDS * DAY_SECONDS
        for e in range(ptr[row[n]], ptr[row[n] + 1]):
            second = time[e] >> 1
            if second >= index[n]:
                break  # a date-only event stands at the last second of its day: what follows is no earlier
            if (index_date_only[n] or time[e] & 1) and second >= midnight:
                continue
            place = np.searchsorted(known, concept[e])
            found = place < len(known) and known[place] == concept[e]
            for w in range(len(windows)):
                if index[n] - second > windows[w]:
                    continue
                counts[n, 0, w] += 1
                if found:
                    for g in range(known_ptr[place], known_ptr[place + 1]):
                        counts[n, group[g] + 1, w] += 1


def first_and_last(
    index_seconds: NDArray[np.int64], index_date_only: NDArray[np.bool_], row: NDArray[np.int64], events: Events
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(N,) days from the first and from the last event before the index to it; nan where there is none."""
    first, last = np.full(len(row), np.nan), np.full(len(row), np.nan)
    for n, (index, day_alone, where) in enumerate(zip(index_seconds, index_date_only, row, strict=True)):
        stretch = events.time[events.ptr[where] : events.ptr[where + 1]]
        seconds, coarse = stretch >> 1, (stretch & 1).astype(bool) | day_alone
        midnight = index // DAY_SECONDS * DAY_SECONDS
        before = seconds[np.where(coarse, seconds < midnight, seconds < index)]
        if len(before):
            first[n], last[n] = (index - before[0]) / DAY_SECONDS, (index - before[-1]) / DAY_SECONDS
    return first, last
