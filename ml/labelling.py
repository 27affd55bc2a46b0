"""Labels of a cohort as arrays, and the engine that makes them from packed timelines.

Shape suffixes: N = cohort member (one scan), K = task, E = entry of a sparse list, C = concept, R = clock.
Times without a suffix are seconds since 1970-01-01 00:00, naive local time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DAY_SECONDS = 86_400

EVENT, COMPETING, CENSORED, PRIOR, INELIGIBLE = range(5)
STATUSES = ("event", "competing", "censored", "prior", "ineligible")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sparse:
    """Positions of tasks a member has something in, as compressed rows; positions ascend within a member."""

    ptr: NDArray[np.int64]
    """(N + 1,) where each member's entries begin."""
    task: NDArray[np.int16]
    """(E,) task positions."""
    seconds: NDArray[np.int64] | None = None
    """(E,) seconds from the index, where the list carries times."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelArrays:
    """`label.tte` of N members and the K tasks of their task set (docs/science.md sections 1 and 2)."""

    member: NDArray[np.int64]
    """(N,) cohort_member_id, ascending."""
    eligible: NDArray[np.bool_]
    """(N,) False for members that no task may use."""
    events: Sparse
    """Observed outcomes only (status event), seconds from the index."""
    priors: Sparse
    """Tasks with history before the window opens, whatever the task makes of it."""
    ineligibles: Sparse
    """Tasks ineligible for this member alone."""
    windows: Sparse
    """Where the window opens other than at the task's start_seconds (readmission); seconds from the index."""
    visits: Sparse
    """Tasks seen in the visit that holds the index (arm `visit`)."""
    follow_up_seconds: NDArray[np.int64]
    """(N,) end of follow-up from the index; -1 where there is none."""
    data_cut_seconds: NDArray[np.int64]
    """(N,) the end for tasks followed to the data cut, that of follow-up where no cut is known; -1 where neither is."""
    death_seconds: NDArray[np.int64]
    """(N,) death from the index; -1 where none is recorded."""
    start_seconds: NDArray[np.int64]
    """(K,) opening of the risk window from the index."""
    excludes_prior: NDArray[np.bool_]
    """(K,) True where prior history disqualifies."""
    competing: NDArray[np.bool_]
    """(K,) True where death competes, False where it censors."""
    to_data_cut: NDArray[np.bool_]
    """(K,) True where follow-up ends at the data cut."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskOutcomes:
    """One task at all N members, dense."""

    status: NDArray[np.int8]
    """(N,) EVENT, COMPETING, CENSORED, PRIOR or INELIGIBLE."""
    time_days: NDArray[np.float64]
    """(N,) days from the index to event, competing death or end of follow-up; nan where prior or ineligible."""
    start_days: NDArray[np.float64]
    """(N,) days from the index to the opening of the risk window; exposure starts there."""


def task_outcomes(labels: LabelArrays, position: int) -> TaskOutcomes:
    """What became of every member under one task: the first of ineligible, prior, event, competing, censored.

    Args:
        labels: the label set.
        position: the task's position, 0 to K - 1.

    Raises:
        ValueError: no such position.
    """
    if not 0 <= position < len(labels.start_seconds):
        raise ValueError(f"Expected a task position from 0 to {len(labels.start_seconds) - 1}, got {position}.")
    rows, seconds = _entries(labels.windows, position)
    opens = np.full(len(labels.member), labels.start_seconds[position])
    opens[rows] = seconds
    end = labels.data_cut_seconds if labels.to_data_cut[position] else labels.follow_up_seconds

    ineligible = ~labels.eligible | (end <= opens)
    ineligible[_entries(labels.ineligibles, position)[0]] = True
    prior = np.zeros(len(end), np.bool_)
    if labels.excludes_prior[position]:
        prior[_entries(labels.priors, position)[0]] = True
    died = labels.competing[position] & (labels.death_seconds >= 0) & (labels.death_seconds <= end)

    status = np.where(died, COMPETING, CENSORED).astype(np.int8)
    time = np.where(died, labels.death_seconds, end).astype(np.float64)
    rows, seconds = _entries(labels.events, position)
    status[rows], time[rows] = EVENT, seconds
    status[prior] = PRIOR
    status[ineligible] = INELIGIBLE
    time[prior | ineligible] = np.nan
    return TaskOutcomes(status=status, time_days=time / DAY_SECONDS, start_days=opens / DAY_SECONDS)


def _entries(sparse: Sparse, position: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Members (as row numbers) that have the task in a list, and its seconds (zeros where the list has none)."""
    entry = np.flatnonzero(sparse.task == position)
    rows = np.searchsorted(sparse.ptr, entry, side="right") - 1
    return rows, np.zeros(len(entry), np.int64) if sparse.seconds is None else sparse.seconds[entry]


_POSITIONS = 1 << 15
"""Positions of tasks are smaller."""
NEVER = np.iinfo(np.int64).max
"""A time that does not come, and a look-back without limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskRules:
    """How each of K tasks reads a timeline (docs/science.md section 2)."""

    start_seconds: NDArray[np.int64]
    """(K,) opening of the window after the clock starts; outcomes come strictly later."""
    look_back_seconds: NDArray[np.int64]
    """(K,) how far before the index history counts; half of NEVER where without limit."""
    same_day_after: NDArray[np.bool_]
    """(K,) True where date-only rows of the index day stand at 23:59:59, False where they are history."""
    excludes_prior: NDArray[np.bool_]
    competing: NDArray[np.bool_]
    to_data_cut: NDArray[np.bool_]
    washout_seconds: NDArray[np.int64]
    """(K,) record needed before the index, 0 where none is."""
    min_follow_up_seconds: NDArray[np.int64]
    """(K,) follow-up needed after the index unless death ended it; -NEVER where none is."""
    clock: NDArray[np.int64]
    """(K,) which clock starts the window: a column of `MemberRows.clocks`, -1 for the index."""

    def table(self) -> NDArray[np.int64]:
        """(K, 9) as the kernel reads it."""
        columns = [getattr(self, name).astype(np.int64) for name in TaskRules.__dataclass_fields__]
        return np.ascontiguousarray(np.stack(columns, axis=1))


@dataclass(frozen=True, kw_only=True, slots=True)
class ConceptTasks:
    """Which tasks an event of a concept means, as compressed rows; negative concepts are rows chosen by statements."""

    concept: NDArray[np.int32]
    """(C,) ascending."""
    ptr: NDArray[np.int64]
    """(C + 1,)."""
    task: NDArray[np.int16]

    @classmethod
    def of_pairs(cls, concept: NDArray[np.int64], task: NDArray[np.int64]) -> ConceptTasks:
        """From (concept, task position) pairs in any order, some perhaps twice."""
        key = np.sort(concept * _POSITIONS + task)
        key = key[np.diff(key, prepend=-NEVER) != 0]
        begins = np.flatnonzero(np.diff(key // _POSITIONS, prepend=-NEVER))
        return cls(
            concept=(key[begins] // _POSITIONS).astype(np.int32),
            ptr=np.concatenate([begins, [len(key)]]).astype(np.int64),
            task=(key % _POSITIONS).astype(np.int16),
        )

    def sorted_by(self, rule_of: NDArray[np.int16]) -> NDArray[np.int16]:
        """`task` with each concept's tasks of one rule next to each other."""
        concept = np.repeat(np.arange(len(self.concept)), np.diff(self.ptr))
        key = (concept * _POSITIONS + rule_of[self.task]) * _POSITIONS + self.task
        return (np.sort(key) % _POSITIONS).astype(np.int16)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemberRows:
    """N members, those of a person one after the other."""

    index: NDArray[np.int64]
    end: NDArray[np.int64]
    """(N,) end of follow-up; anything where not eligible."""
    cut_end: NDArray[np.int64]
    """(N,) end for tasks followed to the data cut."""
    death: NDArray[np.int64]
    """(N,) NEVER where none is recorded."""
    eligible: NDArray[np.bool_]
    observed_from: NDArray[np.int64]
    """(N,) start of the record, not after the index."""
    visit_from: NDArray[np.int64]
    """(N,) start of the visit that holds the index, else of the index day."""
    visit_to: NDArray[np.int64]
    split: NDArray[np.int8]
    """(N,) 0 train, 1 tuning, 2 held out."""
    person_row: NDArray[np.int64]
    """(N,) which stretch of the timelines is the member's person's."""
    clocks: NDArray[np.int64]
    """(N, R, 2) where each clock starts (-NEVER: at the index), and 1 where the member is ineligible for its tasks."""

    def table(self) -> NDArray[np.int64]:
        """(N, 10) as the kernel reads it."""
        names = [name for name in MemberRows.__dataclass_fields__ if name != "clocks"]
        return np.ascontiguousarray(np.stack([getattr(self, name).astype(np.int64) for name in names], axis=1))


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseLabels:
    """The lists of `LabelArrays` for N members."""

    events: Sparse
    priors: Sparse
    ineligibles: Sparse
    windows: Sparse
    visits: Sparse


class Scratch:
    """What one thread labels into: counts, output lists that grow, and nothing that others see."""

    def __init__(self, num_tasks: int) -> None:
        self.counts = np.zeros((3, len(STATUSES), 3, num_tasks), np.int64)
        self.out_task, self.out_seconds = np.empty((5, 0), np.int16), np.empty((2, 0), np.int64)

    def make_room(self, capacity: int) -> None:
        """Lists of at least this length, with what they hold; kept from call to call."""
        more = capacity - self.out_task.shape[1]
        if more > 0:
            self.out_task = np.concatenate([self.out_task, np.empty((5, more), np.int16)], axis=1)
            self.out_seconds = np.concatenate([self.out_seconds, np.empty((2, more), np.int64)], axis=1)


class Labeller:
    """Labels members chunk by chunk, and counts them by task, split and status; threads may share one."""

    def __init__(self, rules: TaskRules, concept_tasks: ConceptTasks) -> None:
        from ml import label_kernel

        self.kernel = label_kernel
        self.rules, self.rule_of = _distinct(rules.table())
        self.task = concept_tasks.sorted_by(self.rule_of)
        self.row_slots, self.slot_rule, self.slot_ptr = _slots(concept_tasks.ptr, self.rule_of[self.task])
        size = 1 << max(4, int(2 * len(concept_tasks.concept)).bit_length())
        self.lookup = np.full((size, 2), -1, np.int32)
        label_kernel.fill_table(concept_tasks.concept, self.lookup)
        self._idle: list[Scratch] = []
        self._made: list[Scratch] = []

    @property
    def counts(self) -> NDArray[np.int64]:
        """(split, status, 3, K): members, persons and seconds at risk inside the window, so far."""
        total = np.zeros((3, len(STATUSES), 3, len(self.rule_of)), np.int64)
        for scratch in self._made:
            total += scratch.counts
        return total

    def label(
        self,
        times: NDArray[np.int64],
        concepts: NDArray[np.int32],
        person_ptr: NDArray[np.int64],
        members: MemberRows,
    ) -> SparseLabels:
        """Labels of members whose persons' events are `times` (coded: seconds * 2 + date_only) and `concepts`.

        All members of a person must be in one call, one after the other. Raises ValueError where the arrays do not
        fit each other.
        """
        if len(times) != len(concepts) or person_ptr[-1] != len(times):
            raise ValueError(
                f"Expected as many times as concepts as the stretches hold, got {len(times)}, {len(concepts)} and "
                f"{person_ptr[-1]}."
            )
        try:
            scratch = self._idle.pop()
        except IndexError:
            scratch = Scratch(len(self.rule_of))
            self._made.append(scratch)
        labels = self._label(scratch, times, concepts, person_ptr, members)
        self._idle.append(scratch)
        return labels

    def _label(
        self,
        scratch: Scratch,
        times: NDArray[np.int64],
        concepts: NDArray[np.int32],
        person_ptr: NDArray[np.int64],
        members: MemberRows,
    ) -> SparseLabels:
        num_members, num_tasks = len(members.index), len(self.rule_of)
        scratch.make_room(1 + num_tasks * 4 + num_members * min(num_tasks, 512))
        out_ptr = np.zeros((5, num_members + 1), np.int64)
        seen = np.full((len(STATUSES), num_tasks), -1, np.int32)
        table, done = members.table(), 0
        while True:
            done = self.kernel.label_members(
                done, times, concepts, person_ptr, self.lookup, self.row_slots, self.slot_rule, self.slot_ptr,
                self.task, self.rule_of, self.rules, table, members.clocks, scratch.out_task, scratch.out_seconds,
                out_ptr, scratch.counts, seen,
            )  # fmt: skip
            if done == num_members:
                break
            scratch.make_room(2 * scratch.out_task.shape[1])
        task, seconds = scratch.out_task, scratch.out_seconds
        return SparseLabels(
            events=_cut(out_ptr[0], task[0], seconds[0]),
            priors=_cut(out_ptr[1], task[1]),
            ineligibles=_cut(out_ptr[2], task[2]),
            windows=_cut(out_ptr[3], task[3], seconds[1]),
            visits=_cut(out_ptr[4], task[4]),
        )


def _distinct(table: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int16]]:
    """The distinct rows of a table, in the order in which they appear, and which of them each row is."""
    width = table.itemsize * table.shape[1]
    raw, number = table.tobytes(), dict[bytes, int]()
    rows = [number.setdefault(raw[at : at + width], len(number)) for at in range(0, len(raw), width)]
    found = np.frombuffer(b"".join(number), table.dtype).reshape(-1, table.shape[1])
    return np.ascontiguousarray(found), np.array(rows, np.int16)


def _slots(
    ptr: NDArray[np.int64], rule: NDArray[np.int16]
) -> tuple[NDArray[np.int32], NDArray[np.int16], NDArray[np.int64]]:
    """Slots: each concept's tasks of one rule. Where each concept's slots begin, their rules, where their tasks begin.

    `ptr` (C + 1,) says where each concept's tasks begin, `rule` their rules, sorted within a concept.
    """
    starts = np.zeros(len(rule), np.bool_)
    starts[ptr[:-1]] = True
    starts[1:] |= rule[1:] != rule[:-1]
    before = np.concatenate([[0], np.cumsum(starts)])
    begins = np.flatnonzero(starts)
    return (
        before[ptr].astype(np.int32),
        rule[begins],
        np.concatenate([begins, [len(rule)]]).astype(np.int64),
    )


def _cut(ptr: NDArray[np.int64], task: NDArray[np.int16], seconds: NDArray[np.int64] | None = None) -> Sparse:
    used = int(ptr[-1])
    return Sparse(ptr=ptr.copy(), task=task[:used].copy(), seconds=None if seconds is None else seconds[:used].copy())


def merge_events(
    times: NDArray[np.int64],
    concepts: NDArray[np.int32],
    person_ptr: NDArray[np.int64],
    person_row: NDArray[np.int64],
    more_times: NDArray[np.int64],
    more_concepts: NDArray[np.int32],
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
    """Events with further ones put to the end of their persons' stretches (`person_row`); the kernel needs no order."""
    if not len(more_times):
        return times, concepts, person_ptr
    at = person_ptr[person_row + 1]
    added = np.concatenate([[0], np.cumsum(np.bincount(person_row, minlength=len(person_ptr) - 1))])
    return np.insert(times, at, more_times), np.insert(concepts, at, more_concepts), person_ptr + added
