"""The kernel of the label engine: packed timelines in, sparse labels out, one pass a scan. Imported only to label.

Times are int64 seconds since 1970; a coded time is seconds * 2 + date_only. Shape suffixes: N = member, K = task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

DAY = 86_400
NEVER = np.iinfo(np.int64).max
PRIOR_FLAG, VISIT_FLAG = 1, 2
EVENT, COMPETING, CENSORED, PRIOR, INELIGIBLE = range(5)

# Columns of the task table (K, 9) and of the member table (N, 10); both int64.
START, LOOK_BACK, SAME_DAY_AFTER, EXCLUDES_PRIOR, COMPETES, TO_DATA_CUT, WASHOUT, MIN_FOLLOW_UP, CLOCK = range(9)
INDEX, END, CUT_END, DEATH, ELIGIBLE, OBSERVED, VISIT_FROM, VISIT_TO, SPLIT, PERSON_ROW = range(10)
# Columns of the clock table (N, clocks, 2): where that clock starts, and 1 where the member is ineligible for it.
STARTS, BARRED = range(2)

NOT_STARTED = -NEVER
"""In the clock table: the clock starts at the index."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first use; keep the machine code where numba finds a writable folder, else do without."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # neither the package's folder nor a cache folder of the user can be written
        return numba.njit(nogil=True)(function)


@compiled
def fill_table(concepts: NDArray[np.int32], table: NDArray[np.int32]) -> None:
    """Hash table of concept → row of the concept → tasks lists; `table` is (power of two, 2) filled with -1 rows."""
    mask = len(table) - 1
    for row in range(len(concepts)):
        slot = (concepts[row] * np.int64(2654435761) >> 12) & mask
        while table[slot, 1] >= 0:
            slot = (slot + 1) & mask
        table[slot, 0] = concepts[row]
        table[slot, 1] = row


@compiled
def look_up(concept: int, table: NDArray[np.int32]) -> int:
    """Row of a concept, -1 where no task wants it."""
    mask = len(table) - 1
    slot = (concept * np.int64(2654435761) >> 12) & mask
    while table[slot, 1] >= 0:
        if table[slot, 0] == concept:
            return int(table[slot, 1])
        slot = (slot + 1) & mask
    return -1


@compiled
def day_of(second: int) -> int:
    """Days since 1970, also before it."""
    return second // DAY


@compiled
def gather(
    times: NDArray[np.int64],
    concepts: NDArray[np.int32],
    table: NDArray[np.int32],
    ptr: NDArray[np.int64],
    tasks: NDArray[np.int16],
    task: NDArray[np.int64],
    member: NDArray[np.int64],
    opens: NDArray[np.int64],
    last: NDArray[np.int64],
    first: NDArray[np.int64],
    flags: NDArray[np.uint8],
) -> None:
    """One pass over a person's events: the first outcome (K,) in each window, and flags (K,) of history and visit."""
    index = member[INDEX]
    index_day = day_of(index)
    visit_last_day = day_of(member[VISIT_TO])
    for j in range(len(times)):
        row = look_up(concepts[j], table)
        if row < 0:
            continue
        second = times[j] >> 1
        date_only = times[j] & 1
        ambiguous = date_only == 1 and day_of(second) == index_day
        in_visit = second >= member[VISIT_FROM] and (
            second <= member[VISIT_TO] or (date_only == 1 and day_of(second) == visit_last_day)
        )
        for q in range(ptr[row], ptr[row + 1]):
            k = tasks[q]
            if in_visit:
                flags[k] |= VISIT_FLAG
            if second <= opens[k] or (ambiguous and task[k, SAME_DAY_AFTER] == 0):
                if second >= index - task[k, LOOK_BACK]:
                    flags[k] |= PRIOR_FLAG
            elif second <= last[k] and second < first[k]:
                first[k] = second


@compiled
def open_windows(
    task: NDArray[np.int64],
    member: NDArray[np.int64],
    clocks: NDArray[np.int64],
    opens: NDArray[np.int64],
    last: NDArray[np.int64],
    barred: NDArray[np.uint8],
) -> None:
    """Each task's window (opens, last] (K,) at one member, in seconds since 1970, and which tasks bar the member."""
    index = member[INDEX]
    for k in range(len(task)):
        clock = task[k, CLOCK]
        start = index
        barred[k] = 0
        if clock >= 0 and clocks[clock, STARTS] != NOT_STARTED:
            start = clocks[clock, STARTS]
        if clock >= 0 and clocks[clock, BARRED] == 1:
            barred[k] = 1
        opens[k] = start + task[k, START]
        last[k] = member[CUT_END] if task[k, TO_DATA_CUT] == 1 else member[END]
        ended_by_death = member[DEATH] != NEVER and member[DEATH] == last[k]
        if last[k] - index < task[k, MIN_FOLLOW_UP] and not ended_by_death:
            barred[k] = 1
        if index - member[OBSERVED] < task[k, WASHOUT]:
            barred[k] = 1


@compiled
def status_of(
    k: int,
    task: NDArray[np.int64],
    member: NDArray[np.int64],
    opens: int,
    last: int,
    barred: int,
    first: int,
    flag: int,
) -> int:
    """The first of ineligible, prior, event, competing and censored that holds."""
    if member[ELIGIBLE] == 0 or barred == 1 or last <= opens:
        return INELIGIBLE
    if task[k, EXCLUDES_PRIOR] == 1 and flag & PRIOR_FLAG:
        return PRIOR
    if first != NEVER:
        return EVENT
    if task[k, COMPETES] == 1 and member[DEATH] <= last:
        return COMPETING
    return CENSORED


@compiled
def label_members(
    begin: int,
    times: NDArray[np.int64],
    concepts: NDArray[np.int32],
    person_ptr: NDArray[np.int64],
    table: NDArray[np.int32],
    ptr: NDArray[np.int64],
    tasks: NDArray[np.int16],
    task: NDArray[np.int64],
    members: NDArray[np.int64],
    clocks: NDArray[np.int64],
    out_task: NDArray[np.int16],
    out_seconds: NDArray[np.int64],
    out_ptr: NDArray[np.int64],
    counts: NDArray[np.int64],
    seen: NDArray[np.int32],
) -> int:
    """Label members from row `begin` on; the row after the last one that fitted into the output.

    Output lists, by first axis: 0 events, 1 priors, 2 ineligibles, 3 windows, 4 visits; `out_ptr` is (5, N + 1) and
    `out_task` (5, capacity), `out_seconds` (2, capacity) for events and windows. `counts` (K, 3, 5, 3) gathers scans,
    persons and seconds at risk by task, split and status; `seen` (K, 5) holds the person counted last (members of a
    person follow each other).
    """
    num_tasks = len(task)
    opens, last = np.empty(num_tasks, np.int64), np.empty(num_tasks, np.int64)
    first = np.full(num_tasks, NEVER, np.int64)
    flags, barred = np.zeros(num_tasks, np.uint8), np.zeros(num_tasks, np.uint8)
    capacity = out_task.shape[1]
    used = out_ptr[:, begin].copy()
    for n in range(begin, len(members)):
        if used.max() + num_tasks > capacity:
            return n
        member = members[n]
        open_windows(task, member, clocks[n], opens, last, barred)
        lo, hi = person_ptr[member[PERSON_ROW]], person_ptr[member[PERSON_ROW] + 1]
        gather(times[lo:hi], concepts[lo:hi], table, ptr, tasks, task, member, opens, last, first, flags)
        for k in range(num_tasks):
            status = status_of(k, task, member, opens[k], last[k], barred[k], first[k], flags[k])
            count = counts[k, member[SPLIT], status]
            count[0] += 1
            if seen[k, status] != member[PERSON_ROW]:
                seen[k, status] = member[PERSON_ROW]
                count[1] += 1
            if status <= CENSORED:
                stop = first[k] if status == EVENT else member[DEATH] if status == COMPETING else last[k]
                count[2] += stop - opens[k]
            if status == EVENT:
                out_task[0, used[0]], out_seconds[0, used[0]] = k, first[k] - member[INDEX]
                used[0] += 1
            if flags[k] & PRIOR_FLAG:
                out_task[1, used[1]] = k
                used[1] += 1
            if barred[k] == 1 and member[ELIGIBLE] == 1:
                out_task[2, used[2]] = k
                used[2] += 1
            if opens[k] != member[INDEX] + task[k, START]:
                out_task[3, used[3]], out_seconds[1, used[3]] = k, opens[k] - member[INDEX]
                used[3] += 1
            if flags[k] & VISIT_FLAG:
                out_task[4, used[4]] = k
                used[4] += 1
            first[k], flags[k] = NEVER, 0
        out_ptr[:, n + 1] = used
    return len(members)
