"""Rows of label.tte in Postgres's binary COPY form, from sparse lists, without Python's lock or an object a number.

The form is that of https://www.postgresql.org/docs/current/sql-copy.html ("Binary Format"); an array is its number of
dimensions, a flag, the element type, then (unless empty) its length and lower bound and each element after its width.
Shape suffixes: N = member, E = entry of a list, H = byte of a row's head.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ml.label_kernel import compiled

INT2, INT8 = 21, 20
"""Postgres's type numbers."""
NULL = np.iinfo(np.int64).min
"""A number that is null in the row."""


@compiled
def put(out: NDArray[np.uint8], at: int, value: int, width: int) -> None:
    """Write a number of `width` bytes, the most significant first."""
    for i in range(width):
        out[at + i] = (value >> (8 * (width - 1 - i))) & 255


@compiled
def put_array_head(out: NDArray[np.uint8], at: int, count: int, width: int, oid: int) -> int:
    """The field's length and all that comes before the elements."""
    if count == 0:
        put(out, at, 12, 4)
        put(out, at + 4, 0, 8)
        put(out, at + 12, oid, 4)
        return at + 16
    for i, value in enumerate((20 + count * (4 + width), 1, 0, oid, count, 1)):
        put(out, at + 4 * i, value, 4)
    return at + 24


@compiled
def put_tasks(out: NDArray[np.uint8], at: int, task: NDArray[np.int16]) -> int:
    """An int2[]; the place after it."""
    at = put_array_head(out, at, len(task), 2, INT2)
    for value in task:
        out[at], out[at + 1], out[at + 2], out[at + 3] = 0, 0, 0, 2
        out[at + 4], out[at + 5] = (value >> 8) & 255, value & 255
        at += 6
    return at


@compiled
def put_seconds(out: NDArray[np.uint8], at: int, seconds: NDArray[np.int64]) -> int:
    """An int8[]; the place after it."""
    at = put_array_head(out, at, len(seconds), 8, INT8)
    for value in seconds:
        out[at], out[at + 1], out[at + 2], out[at + 3] = 0, 0, 0, 8
        for i in range(8):
            out[at + 4 + i] = (value >> (56 - 8 * i)) & 255
        at += 12
    return at


@compiled
def row_sizes(heads: NDArray[np.uint8], ptrs: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """(N + 1,) where each row begins."""
    begins = np.zeros(len(heads) + 1, np.int64)
    for n in range(len(heads)):
        size = heads.shape[1]
        for which in range(5):
            count = ptrs[which, n + 1] - ptrs[which, n]
            fixed = 16 if count == 0 else 24
            size += fixed + 6 * count
            if which in (0, 3):  # events and windows have times, too
                size += fixed + 12 * count
        for value in numbers[n]:
            size += 4 if value == NULL else 12
        begins[n + 1] = begins[n] + size
    return begins


@compiled
def put_rows(
    out: NDArray[np.uint8],
    begins: NDArray[np.int64],
    heads: NDArray[np.uint8],
    ptrs: NDArray[np.int64],
    events: NDArray[np.int16],
    event_seconds: NDArray[np.int64],
    priors: NDArray[np.int16],
    ineligibles: NDArray[np.int16],
    windows: NDArray[np.int16],
    window_seconds: NDArray[np.int64],
    visits: NDArray[np.int16],
    numbers: NDArray[np.int64],
) -> None:
    """Write N rows: head (N, H), the seven arrays in the order of label.tte, then `numbers` (N, 3), NULL where null.

    `ptrs` (5, N + 1) are those of events, priors, ineligibles, windows and visits.
    """
    for n in range(len(heads)):
        at = begins[n]
        for i in range(heads.shape[1]):
            out[at + i] = heads[n, i]
        at += heads.shape[1]
        at = put_tasks(out, at, events[ptrs[0, n] : ptrs[0, n + 1]])
        at = put_seconds(out, at, event_seconds[ptrs[0, n] : ptrs[0, n + 1]])
        at = put_tasks(out, at, priors[ptrs[1, n] : ptrs[1, n + 1]])
        at = put_tasks(out, at, ineligibles[ptrs[2, n] : ptrs[2, n + 1]])
        at = put_tasks(out, at, windows[ptrs[3, n] : ptrs[3, n + 1]])
        at = put_seconds(out, at, window_seconds[ptrs[3, n] : ptrs[3, n + 1]])
        at = put_tasks(out, at, visits[ptrs[4, n] : ptrs[4, n + 1]])
        for value in numbers[n]:
            if value == NULL:
                put(out, at, -1, 4)
                at += 4
            else:
                put(out, at, 8, 4)
                put(out, at + 4, value, 8)
                at += 12
