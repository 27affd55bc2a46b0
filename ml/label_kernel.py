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
PRIOR_FLAG, VISIT_FLAG, EVENT_FLAG = 1, 2, 4
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
def match_events(
    times: NDArray[np.int64],
    concepts: NDArray[np.int32],
    lookup: NDArray[np.int32],
    row_at: NDArray[np.int32],
    when: NDArray[np.int64],
) -> int:
    """A person's events that a task wants: rows of their concepts and their coded times; how many they are."""
    found = 0
    for j in range(len(concepts)):
        row = look_up(concepts[j], lookup)
        if row >= 0:
            row_at[found], when[found] = row, times[j]
            found += 1
    return found


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
def read_events(
    row_at: NDArray[np.int32],
    when: NDArray[np.int64],
    row_slots: NDArray[np.int32],
    slot_rule: NDArray[np.int16],
    rules: NDArray[np.int64],
    here: NDArray[np.int64],
    member: NDArray[np.int64],
    best: NDArray[np.int64],
    state: NDArray[np.uint8],
    touched: NDArray[np.int32],
    used: int,
) -> int:
    """Earliest outcome and flags of each slot (a concept under one rule) at one member; how many slots are touched.

    `best` (S,) is NEVER and `state` (S,) zero before any event is read; the slots that were touched, `used` of them
    before this call, are the first of `touched`.
    """
    index = member[INDEX]
    day_from = day_of(index) * DAY
    visit_from, visit_to = member[VISIT_FROM], member[VISIT_TO]
    visit_day_to = day_of(visit_to) * DAY + DAY - 1
    loaded = -1
    opens, last, history_from, same_day_is_history = index, index, index, False
    for j in range(len(row_at)):
        row, second, date_only = row_at[j], when[j] >> 1, when[j] & 1
        seen = np.uint8(0)
        # what is rarely true comes first: the processor guesses it, which it cannot with a bit like date_only
        if second >= visit_from and (second <= visit_to or (second <= visit_day_to and date_only == 1)):
            seen = np.uint8(VISIT_FLAG)
        on_index_day = day_from <= second < day_from + DAY and date_only == 1
        for slot in range(row_slots[row], row_slots[row + 1]):
            g, flag = slot_rule[slot], seen
            if g != loaded:  # most sets have one rule: its values stay in registers
                opens, last, history_from = here[g, OPENS], here[g, LAST], index - rules[g, LOOK_BACK]
                same_day_is_history, loaded = rules[g, SAME_DAY_AFTER] == 0, g
            if second <= opens or (on_index_day and same_day_is_history):
                if second >= history_from:
                    flag |= np.uint8(PRIOR_FLAG)
            elif second <= last:
                flag |= np.uint8(EVENT_FLAG)
                if second < best[slot]:
                    best[slot] = second
            before = state[slot]
            if flag & ~before:
                if before == 0:
                    touched[used] = slot
                    used += 1
                state[slot] = before | flag
    return used


@compiled
def is_sorted(when: NDArray[np.int64]) -> bool:
    """Whether coded times ascend."""
    descents = 0
    for j in range(1, len(when)):
        descents += when[j] < when[j - 1]
    return descents == 0


@compiled
def first_at(when: NDArray[np.int64], second: int) -> int:
    """Where the first event at a second or later stands among ascending coded times."""
    lo, hi = 0, len(when)
    while lo < hi:
        middle = (lo + hi) >> 1
        if when[middle] >> 1 < second:
            lo = middle + 1
        else:
            hi = middle
    return lo


@compiled
def read_history(
    row_at: NDArray[np.int32],
    when: NDArray[np.int64],
    row_slots: NDArray[np.int32],
    slot_rule: NDArray[np.int16],
    rules: NDArray[np.int64],
    index: int,
    state: NDArray[np.uint8],
    touched: NDArray[np.int32],
    used: int,
) -> int:
    """Like `read_events` for events that are history to every rule and in no visit: once seen, a slot is done with."""
    alone = len(rules) == 1  # then a concept's row is its one slot
    for j in range(len(row_at)):
        row = row_at[j]
        begin, end = (row, row + 1) if alone else (row_slots[row], row_slots[row + 1])
        for slot in range(begin, end):
            if state[slot] == 0 and when[j] >> 1 >= index - rules[slot_rule[slot], LOOK_BACK]:
                state[slot] = PRIOR_FLAG
                touched[used] = slot
                used += 1
    return used


@compiled
def read_future(
    row_at: NDArray[np.int32],
    when: NDArray[np.int64],
    row_slots: NDArray[np.int32],
    slot_rule: NDArray[np.int16],
    here: NDArray[np.int64],
    best: NDArray[np.int64],
    state: NDArray[np.uint8],
    touched: NDArray[np.int32],
    used: int,
) -> int:
    """Like `read_events` for ascending events after every window opened: the first of a slot is its outcome."""
    alone = len(here) == 1  # then a concept's row is its one slot
    for j in range(len(row_at)):
        row = row_at[j]
        begin, end = (row, row + 1) if alone else (row_slots[row], row_slots[row + 1])
        for slot in range(begin, end):
            before = state[slot]
            if before & EVENT_FLAG == 0 and when[j] >> 1 <= here[slot_rule[slot], LAST]:
                state[slot], best[slot] = before | EVENT_FLAG, when[j] >> 1
                if before == 0:
                    touched[used] = slot
                    used += 1
    return used


@compiled
def read_all(
    row_at: NDArray[np.int32],
    when: NDArray[np.int64],
    ascending: bool,
    row_slots: NDArray[np.int32],
    slot_rule: NDArray[np.int16],
    rules: NDArray[np.int64],
    here: NDArray[np.int64],
    member: NDArray[np.int64],
    best: NDArray[np.int64],
    state: NDArray[np.uint8],
    touched: NDArray[np.int32],
) -> int:
    """`read_events` over all of a person's events; where they ascend, most are read by simpler rules.

    Before the index day and the visit all is history; after them and all openings, all may be outcomes.
    """
    begin, end = 0, len(when)
    if ascending and len(rules):
        day_from = day_of(member[INDEX]) * DAY
        day_to = max(day_from, day_of(member[VISIT_TO]) * DAY) + DAY - 1
        begin = first_at(when, min(day_from, member[VISIT_FROM]))
        end = max(begin, first_at(when, max(day_to, here[:, OPENS].max()) + 1))
    used = read_history(row_at[:begin], when[:begin], row_slots, slot_rule, rules, member[INDEX], state, touched, 0)
    used = read_events(
        row_at[begin:end], when[begin:end], row_slots, slot_rule, rules, here, member, best, state, touched, used
    )
    used = read_future(row_at[end:], when[end:], row_slots, slot_rule, here, best, state, touched, used)
    return int(used)


@compiled
def gather(
    touched: NDArray[np.int32],
    slot_ptr: NDArray[np.int64],
    tasks: NDArray[np.int16],
    best: NDArray[np.int64],
    state: NDArray[np.uint8],
    first: NDArray[np.int64],
    flags: NDArray[np.uint8],
) -> None:
    """Each task's first outcome (K,) and flags (K,) at one member; its slots are left as they were found."""
    for slot in touched:
        second, flag = best[slot], state[slot]
        if flag & EVENT_FLAG:
            for q in range(slot_ptr[slot], slot_ptr[slot + 1]):
                k = tasks[q]
                flags[k] |= flag
                first[k] = min(first[k], second)
        else:
            for q in range(slot_ptr[slot], slot_ptr[slot + 1]):
                flags[tasks[q]] |= flag
        best[slot], state[slot] = NEVER, 0


@compiled
def is_plain(n: int, members: NDArray[np.int64], rules: NDArray[np.int64], here: NDArray[np.int64]) -> bool:
    """Whether tasks that no event touches are alike but for their rule: a person's only member, usual windows."""
    member = members[n]
    if n > 0 and members[n - 1, PERSON_ROW] == member[PERSON_ROW]:
        return False
    if n + 1 < len(members) and members[n + 1, PERSON_ROW] == member[PERSON_ROW]:
        return False
    for g in range(len(rules)):
        barred = here[g, BARRED] == 1 and member[ELIGIBLE] == 1
        if barred or here[g, OPENS] != member[INDEX] + rules[g, START]:
            return False
    return True


@compiled
def count_untouched(member: NDArray[np.int64], here: NDArray[np.int64], alike: NDArray[np.int64]) -> None:
    """Count all tasks of each rule as if no event touched them; `alike` is (3, 5, 3, G) like the counts."""
    for g in range(len(here)):
        status = here[g, OTHERWISE]
        count = alike[member[SPLIT], status]
        count[0, g] += 1
        if status <= CENSORED:
            count[2, g] += here[g, AT_RISK_UNTIL] - here[g, OPENS]


@compiled
def add_alike(
    alike: NDArray[np.int64], alone: NDArray[np.int64], rule_of: NDArray[np.int16], counts: NDArray[np.int64]
) -> None:
    """Add what was counted by rule, and `alone` (3, 5, 3, K) of persons with one member, to the counts by task."""
    for split in range(counts.shape[0]):
        for status in range(counts.shape[1]):
            by_rule, own, by_task = alike[split, status], alone[split, status], counts[split, status]
            for k in range(len(rule_of)):
                g = rule_of[k]
                members = by_rule[0, g] + own[0, k]
                by_task[0, k] += members
                by_task[1, k] += members
                if status <= CENSORED:
                    by_task[2, k] += by_rule[2, g] + own[2, k]


@compiled
def touched_tasks(flags: NDArray[np.uint8], out: NDArray[np.int32]) -> int:
    """Tasks with any flag, ascending, in `out` (K + 1,); how many. No branch: which they are nobody can guess."""
    used = 0
    for k in range(len(flags)):
        out[used] = k
        used += int(flags[k] != 0)
    return used


@compiled
def write_touched(
    touched: NDArray[np.int32],
    rule_of: NDArray[np.int16],
    rules: NDArray[np.int64],
    here: NDArray[np.int64],
    index: int,
    first: NDArray[np.int64],
    flags: NDArray[np.uint8],
    out_task: NDArray[np.int16],
    out_seconds: NDArray[np.int64],
    used: NDArray[np.int64],
    count: NDArray[np.int64],
) -> None:
    """Lists and counts of the tasks that events touch, at a member whose other tasks are counted by rule.

    Whether a touched task is an outcome, history or both is anybody's guess, so most of it is arithmetic, not branches.
    """
    events, priors, visits = used[0], used[1], used[4]
    for k in touched:
        flag, g = flags[k], rule_of[k]
        otherwise, until, opens = here[g, OTHERWISE], here[g, AT_RISK_UNTIL], here[g, OPENS]
        prior, second = np.int64(flag & PRIOR_FLAG), first[k]
        out_task[1, priors] = k
        priors += prior
        out_task[4, visits] = k
        visits += np.int64((flag & VISIT_FLAG) != 0)
        barred = prior * rules[g, EXCLUDES_PRIOR] * np.int64(otherwise != INELIGIBLE)
        event = np.int64((flag & EVENT_FLAG) != 0) * np.int64(otherwise != INELIGIBLE) * (1 - barred)
        out_task[0, events], out_seconds[0, events] = k, second - index
        events += event
        count[EVENT, 0, k] += event
        count[EVENT, 2, k] += event * (second - opens)
        count[PRIOR, 0, k] += barred
        count[otherwise, 0, k] -= event + barred
        count[otherwise, 2, k] -= (event + barred) * (until - opens)
        first[k], flags[k] = NEVER, 0
    used[0], used[1], used[4] = events, priors, visits


@compiled
def write_all(
    rule_of: NDArray[np.int16],
    rules: NDArray[np.int64],
    here: NDArray[np.int64],
    member: NDArray[np.int64],
    first: NDArray[np.int64],
    flags: NDArray[np.uint8],
    out_task: NDArray[np.int16],
    out_seconds: NDArray[np.int64],
    used: NDArray[np.int64],
    count: NDArray[np.int64],
    seen: NDArray[np.int32],
) -> None:
    """Lists and counts of all tasks at one member, one after the other."""
    index, person = member[INDEX], member[PERSON_ROW]
    for k in range(len(rule_of)):
        flag, g = flags[k], rule_of[k]
        status, until = here[g, OTHERWISE], here[g, AT_RISK_UNTIL]
        if flag & PRIOR_FLAG:
            out_task[1, used[1]] = k
            used[1] += 1
            if rules[g, EXCLUDES_PRIOR] == 1 and status != INELIGIBLE:
                status = PRIOR
        if flag & EVENT_FLAG and status != INELIGIBLE and status != PRIOR:
            status, until = EVENT, first[k]
            out_task[0, used[0]], out_seconds[0, used[0]] = k, until - index
            used[0] += 1
        if flag & VISIT_FLAG:
            out_task[4, used[4]] = k
            used[4] += 1
        first[k], flags[k] = NEVER, 0
        if here[g, BARRED] == 1 and member[ELIGIBLE] == 1:
            out_task[2, used[2]] = k
            used[2] += 1
        if here[g, OPENS] != index + rules[g, START]:
            out_task[3, used[3]], out_seconds[1, used[3]] = k, here[g, OPENS] - index
            used[3] += 1
        count[status, 0, k] += 1
        if seen[status, k] != person:
            seen[status, k] = person
            count[status, 1, k] += 1
        if status <= CENSORED:
            count[status, 2, k] += until - here[g, OPENS]


@compiled
def label_members(
    begin: int,
    times: NDArray[np.int64],
    concepts: NDArray[np.int32],
    person_ptr: NDArray[np.int64],
    lookup: NDArray[np.int32],
    row_slots: NDArray[np.int32],
    slot_rule: NDArray[np.int16],
    slot_ptr: NDArray[np.int64],
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
    (members of a person follow each other). Tasks that no event touches are counted by their rule where that is the
    same; most tasks of most members are such.
    """
    num_tasks, capacity = len(rule_of), out_task.shape[1]
    here = np.empty((len(rules), 5), np.int64)
    first, flags = np.full(num_tasks, NEVER, np.int64), np.zeros(num_tasks, np.uint8)
    alone = np.zeros(counts.shape, np.int64)
    best, state = np.full(len(slot_rule), NEVER, np.int64), np.zeros(len(slot_rule), np.uint8)
    touched, touched_task = np.empty(len(slot_rule), np.int32), np.empty(num_tasks + 1, np.int32)
    longest = np.diff(person_ptr).max() if len(person_ptr) > 1 else 0
    row_at, when = np.empty(longest, np.int32), np.empty(longest, np.int64)
    alike = np.zeros((counts.shape[0], counts.shape[1], counts.shape[2], len(rules)), np.int64)
    matched, ascending, person, done = 0, False, -1, len(members)
    used = out_ptr[:, begin].copy()
    for n in range(begin, len(members)):
        if used.max() + num_tasks >= capacity:  # one place more is written to than is kept
            done = n
            break
        member = members[n]
        if member[PERSON_ROW] != person:
            person = member[PERSON_ROW]
            lo, hi = person_ptr[person], person_ptr[person + 1]
            matched = match_events(times[lo:hi], concepts[lo:hi], lookup, row_at, when)
            ascending = is_sorted(when[:matched])
        apply_rules(rules, member, clocks[n], here)
        num_touched = read_all(
            row_at[:matched], when[:matched], ascending, row_slots, slot_rule, rules, here, member, best, state, touched
        )
        gather(touched[:num_touched], slot_ptr, tasks, best, state, first, flags)
        plain = is_plain(n, members, rules, here)
        if plain:
            count_untouched(member, here, alike)
        if plain:
            found = touched_tasks(flags, touched_task)
            write_touched(
                touched_task[:found],
                rule_of,
                rules,
                here,
                member[INDEX],
                first,
                flags,
                out_task,
                out_seconds,
                used,
                alone[member[SPLIT]],
            )
        else:
            write_all(
                rule_of, rules, here, member, first, flags, out_task, out_seconds, used, counts[member[SPLIT]], seen
            )
        out_ptr[:, n + 1] = used
    add_alike(alike, alone, rule_of, counts)
    return done
