"""The kernel of the label engine: packed timelines in, sparse labels out, one pass a scan. Imported only to label.

Times are int64 seconds since 1970; a coded time is seconds * 2 + date_only. Shapes: N = member, K = task, G = rule
(tasks with equal rules share one), R = clock.
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

# Columns of the rule table (G, 9), the member table (N, 10) and the clock table (N, R, 2); all int64.
START, LOOK_BACK, SAME_DAY_AFTER, EXCLUDES_PRIOR, COMPETES, TO_DATA_CUT, WASHOUT, MIN_FOLLOW_UP, CLOCK = range(9)
INDEX, END, CUT_END, DEATH, ELIGIBLE, OBSERVED, VISIT_FROM, VISIT_TO, SPLIT, PERSON_ROW = range(10)
STARTS, BARRED_BY_CLOCK = range(2)
# Columns of what a rule means at one member (G, 5).
OPENS, LAST, BARRED, OTHERWISE, AT_RISK_UNTIL = range(5)

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
def group_events(
    concepts: NDArray[np.int32],
    lookup: NDArray[np.int32],
    touched: NDArray[np.int32],
    head: NDArray[np.int64],
    tail: NDArray[np.int64],
    following: NDArray[np.int64],
) -> int:
    """Chain a person's events by concept, in their order: `head` of each concept's row, then `following`.

    The number of rows touched, whose heads are set (all heads are -1 before).
    """
    used = 0
    for j in range(len(concepts)):
        row = look_up(concepts[j], lookup)
        if row < 0:
            continue
        following[j] = -1
        if head[row] < 0:
            head[row] = j
            touched[used] = row
            used += 1
        else:
            following[tail[row]] = j
        tail[row] = j
    return used


@compiled
def apply_rules(
    rules: NDArray[np.int64], member: NDArray[np.int64], clocks: NDArray[np.int64], here: NDArray[np.int64]
) -> None:
    """What each rule means at one member: its window (opens, last], and the status of a task without any event."""
    index = member[INDEX]
    for g in range(len(rules)):
        rule = rules[g]
        clock = rule[CLOCK]
        start, barred = index, 0
        if clock >= 0 and clocks[clock, STARTS] != NOT_STARTED:
            start = clocks[clock, STARTS]
        if clock >= 0 and clocks[clock, BARRED_BY_CLOCK] == 1:
            barred = 1
        opens = max(start + rule[START], index)  # of a scan whose day alone is known, discharge may come first
        last = member[CUT_END] if rule[TO_DATA_CUT] == 1 else member[END]
        ended_by_death = member[DEATH] != NEVER and member[DEATH] == last
        if last - index < rule[MIN_FOLLOW_UP] and not ended_by_death:
            barred = 1
        if index - member[OBSERVED] < rule[WASHOUT]:
            barred = 1
        status, until = CENSORED, last
        if member[ELIGIBLE] == 0 or barred == 1 or last <= opens:
            status = INELIGIBLE
        elif rule[COMPETES] == 1 and member[DEATH] <= last:
            status, until = COMPETING, member[DEATH]
        here[g, OPENS], here[g, LAST], here[g, BARRED] = opens, last, barred
        here[g, OTHERWISE], here[g, AT_RISK_UNTIL] = status, until


@compiled
def read_chain(
    first: int,
    following: NDArray[np.int64],
    times: NDArray[np.int64],
    rule: NDArray[np.int64],
    here: NDArray[np.int64],
    member: NDArray[np.int64],
) -> tuple[int, int]:
    """Earliest outcome among one concept's events under one rule (NEVER: none), and flags of history and visit."""
    index, opens, last = member[INDEX], here[OPENS], here[LAST]
    index_day, visit_last_day = day_of(index), day_of(member[VISIT_TO])
    best, flags, j = NEVER, 0, first
    while j >= 0:
        second, date_only = times[j] >> 1, times[j] & 1
        if second >= member[VISIT_FROM] and (
            second <= member[VISIT_TO] or (date_only == 1 and day_of(second) == visit_last_day)
        ):
            flags |= VISIT_FLAG
        same_day = date_only == 1 and day_of(second) == index_day and rule[SAME_DAY_AFTER] == 0
        if second <= opens or same_day:
            if second >= index - rule[LOOK_BACK]:
                flags |= PRIOR_FLAG
        elif second <= last and second < best:
            best = second
        j = following[j]
    return best, flags


@compiled
def gather(
    touched: NDArray[np.int32],
    head: NDArray[np.int64],
    following: NDArray[np.int64],
    times: NDArray[np.int64],
    ptr: NDArray[np.int64],
    tasks: NDArray[np.int16],
    rule_of: NDArray[np.int16],
    rules: NDArray[np.int64],
    here: NDArray[np.int64],
    member: NDArray[np.int64],
    first: NDArray[np.int64],
    flags: NDArray[np.uint8],
) -> None:
    """Each task's first outcome (K,) and flags (K,) at one member; a concept's tasks of one rule follow each other."""
    for row in touched:
        before, best, flag = -1, NEVER, 0
        for q in range(ptr[row], ptr[row + 1]):
            k = tasks[q]
            g = rule_of[k]
            if g != before:
                best, flag = read_chain(head[row], following, times, rules[g], here[g], member)
                before = g
            if best < first[k]:
                first[k] = best
            flags[k] |= flag


@compiled
def label_members(
    begin: int,
    times: NDArray[np.int64],
    concepts: NDArray[np.int32],
    person_ptr: NDArray[np.int64],
    lookup: NDArray[np.int32],
    ptr: NDArray[np.int64],
    tasks: NDArray[np.int16],
    rule_of: NDArray[np.int16],
    rules: NDArray[np.int64],
    members: NDArray[np.int64],
    clocks: NDArray[np.int64],
    out_task: NDArray[np.int16],
    out_seconds: NDArray[np.int64],
    out_ptr: NDArray[np.int64],
    counts: NDArray[np.int64],
    seen: NDArray[np.int32],
) -> int:
    """Label members from row `begin` on; the row after the last one that fitted into the output.

    Output lists, by first axis: 0 events, 1 priors, 2 ineligibles, 3 windows, 4 visits; `out_ptr` is (5, N + 1),
    `out_task` (5, capacity), and `out_seconds` (2, capacity) holds those of events and windows. `counts` (3, 5, 3, K)
    gathers scans, persons and seconds at risk by split and status; `seen` (5, K) holds the person counted last
    (members of a person follow each other).
    """
    num_tasks, capacity = len(rule_of), out_task.shape[1]
    here = np.empty((len(rules), 5), np.int64)
    first, flags = np.full(num_tasks, NEVER, np.int64), np.zeros(num_tasks, np.uint8)
    head, tail = np.full(len(ptr), -1, np.int64), np.empty(len(ptr), np.int64)
    touched, num_touched, lo, hi, person = np.empty(len(ptr), np.int32), 0, 0, 0, -1
    following = np.empty(np.diff(person_ptr).max() if len(person_ptr) > 1 else 0, np.int64)
    used = out_ptr[:, begin].copy()
    for n in range(begin, len(members)):
        if used.max() + num_tasks > capacity:
            return n
        member = members[n]
        if member[PERSON_ROW] != person:
            person = member[PERSON_ROW]
            head[touched[:num_touched]] = -1
            lo, hi = person_ptr[person], person_ptr[person + 1]
            num_touched = group_events(concepts[lo:hi], lookup, touched, head, tail, following)
        apply_rules(rules, member, clocks[n], here)
        gather(
            touched[:num_touched], head, following, times[lo:hi], ptr, tasks, rule_of, rules, here, member, first, flags
        )
        count = counts[member[SPLIT]]
        for k in range(num_tasks):
            g = rule_of[k]
            status, until = here[g, OTHERWISE], here[g, AT_RISK_UNTIL]
            if flags[k] & PRIOR_FLAG:
                out_task[1, used[1]] = k
                used[1] += 1
                if rules[g, EXCLUDES_PRIOR] == 1 and status != INELIGIBLE:
                    status = PRIOR
            if first[k] != NEVER and status != INELIGIBLE and status != PRIOR:
                status, until = EVENT, first[k]
                out_task[0, used[0]], out_seconds[0, used[0]] = k, first[k] - member[INDEX]
                used[0] += 1
            if flags[k] & VISIT_FLAG:
                out_task[4, used[4]] = k
                used[4] += 1
            if here[g, BARRED] == 1 and member[ELIGIBLE] == 1:
                out_task[2, used[2]] = k
                used[2] += 1
            if here[g, OPENS] != member[INDEX] + rules[g, START]:
                out_task[3, used[3]], out_seconds[1, used[3]] = k, here[g, OPENS] - member[INDEX]
                used[3] += 1
            count[status, 0, k] += 1
            if seen[status, k] != person:
                seen[status, k] = person
                count[status, 1, k] += 1
            if status <= CENSORED:
                count[status, 2, k] += until - here[g, OPENS]
            first[k], flags[k] = NEVER, 0
        out_ptr[:, n + 1] = used
    return len(members)
