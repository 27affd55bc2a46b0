"""The kernel of features: packed timelines in, counts before the index out, one pass a scan. Imported only to count.

Times are coded: seconds * 2 + date_only. Shapes: N = member, K = group of concepts (0 is every event), W = window.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ml.label_kernel import compiled, day_of, look_up

NONE = np.iinfo(np.int64).min
"""In `ends`: there is no event."""


@compiled
def is_before(coded: int, index: int, day_alone: bool) -> bool:
    """Is an event earlier than the index; where either has only a day, is its day earlier?"""
    second = coded >> 1
    if day_alone or coded & 1 == 1:
        return bool(day_of(second) < day_of(index))
    return bool(second < index)


@compiled
def add(
    concept: int,
    ago: int,
    lookup: NDArray[np.int32],
    ptr: NDArray[np.int64],
    group: NDArray[np.int16],
    windows: NDArray[np.int64],
    counts: NDArray[np.int32],
    every: bool,
) -> None:
    """Count one event, `ago` seconds before the index, for its groups, and for group 0 where `every`."""
    place = look_up(concept, lookup)
    for w in range(len(windows)):
        if ago > windows[w]:
            continue
        if every:
            counts[0, w] += 1
        if place >= 0:
            for g in range(ptr[place], ptr[place + 1]):
                counts[group[g] + 1, w] += 1


@compiled
def look_back(
    index: NDArray[np.int64],
    day_alone: NDArray[np.bool_],
    row: NDArray[np.int64],
    ptr: NDArray[np.int64],
    time: NDArray[np.int64],
    concept: NDArray[np.int32],
    hidden_ptr: NDArray[np.int64],
    hidden_time: NDArray[np.int64],
    hidden_concept: NDArray[np.int32],
    chosen_ptr: NDArray[np.int64],
    chosen_time: NDArray[np.int64],
    chosen_concept: NDArray[np.int32],
    lookup: NDArray[np.int32],
    group_ptr: NDArray[np.int64],
    group: NDArray[np.int16],
    windows: NDArray[np.int64],
    counts: NDArray[np.int32],
    ends: NDArray[np.int64],
) -> None:
    """Fill `counts` (N, K, W) and `ends` (N, 2): seconds of the first and the last event before the index.

    `ends` is NONE before.
    """
    for n in range(len(index)):
        h, h_end = hidden_ptr[n], hidden_ptr[n + 1]
        for e in range(ptr[row[n]], ptr[row[n] + 1]):
            if time[e] >> 1 >= index[n]:
                break  # a date-only event stands at the last second of its day: what follows is no earlier
            while h < h_end and (
                hidden_time[h] < time[e] or (hidden_time[h] == time[e] and hidden_concept[h] < concept[e])
            ):
                h += 1
            if h < h_end and hidden_time[h] == time[e] and hidden_concept[h] == concept[e]:
                h += 1
                continue
            if not is_before(time[e], index[n], day_alone[n]):
                continue
            second = time[e] >> 1
            if ends[n, 0] == NONE:
                ends[n, 0] = second
            ends[n, 1] = second
            add(concept[e], index[n] - second, lookup, group_ptr, group, windows, counts[n], True)
        for e in range(chosen_ptr[n], chosen_ptr[n + 1]):
            if is_before(chosen_time[e], index[n], day_alone[n]):
                ago = index[n] - (chosen_time[e] >> 1)
                add(chosen_concept[e], ago, lookup, group_ptr, group, windows, counts[n], False)
