"""What the label engine reads of the store as arrays, and its arrays as rows of `label.tte`."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from app.store import outcomes
from app.store.cohorts import PERIODS
from app.store.copy import copy_out
from ml.labelling import (
    DAY_SECONDS,
    NEVER,
    STATUSES,
    ConceptTasks,
    MemberRows,
    SparseLabels,
    TaskRules,
)
from workers.bridge import SPLITS, binary_cursor

if TYPE_CHECKING:
    from sqlalchemy import Connection


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelMembers:
    """What the label engine reads of a cohort's members, ordered by person, index and series."""

    member: NDArray[np.int64]
    person: NDArray[np.int64]
    image_key: list[str]
    index_date_only: NDArray[np.bool_]
    has_end: NDArray[np.bool_]
    has_cut: NDArray[np.bool_]
    rows: MemberRows
    """With `person_row` unset: it depends on the persons read together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StatementEvents:
    """Rows that statements chose, as events of the negative concept -1 - position; by person, time and concept."""

    person: NDArray[np.int64]
    time: NDArray[np.int64]
    """Coded like a timeline's."""
    concept: NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelTasks:
    """The tasks of a set as the label engine reads them."""

    rules: TaskRules
    by_statement: dict[int, dict[str, Any]]
    """Position → definition of the tasks that concepts alone do not describe."""
    clocks: dict[int, dict[str, Any]]
    """Position → definition of the tasks whose window opens after discharge; clock n is that of the n-th."""


_LABEL_TASKS = """
SELECT start_seconds, (definition ->> 'prior_days')::int8, definition ->> 'same_day' = 'after', prior = 'exclude',
       death = 'competing', follow_up = 'data_cut', (definition ->> 'washout_days')::int8,
       (definition ->> 'min_follow_up_days')::int8, definition ->> 'clock' = 'discharge',
       (definition -> 'resolved' ->> 'by_statement')::bool,
       CASE WHEN (definition -> 'resolved' ->> 'by_statement')::bool OR definition ->> 'clock' = 'discharge'
            THEN definition END
FROM label.task WHERE task_set_id = %s ORDER BY position
"""


def read_label_tasks(connection: Connection, task_set_id: int) -> LabelTasks:
    """How each task of a set reads a timeline, by position."""
    rows = binary_cursor(connection).execute(_LABEL_TASKS, (task_set_id,)).fetchall()
    columns: list[Sequence[Any]] = list(zip(*rows, strict=True)) if rows else [()] * 11
    clocks = {position: row[10] for position, row in enumerate(rows) if row[8]}
    number = {position: n for n, position in enumerate(clocks)}

    def seconds(days: Sequence[int | None], default: int) -> NDArray[np.int64]:
        return np.array([default if n is None else n * DAY_SECONDS for n in days], np.int64)

    rules = TaskRules(
        start_seconds=np.array(columns[0], np.int64),
        look_back_seconds=seconds(columns[1], NEVER // 2),
        same_day_after=np.array(columns[2], np.bool_),
        excludes_prior=np.array(columns[3], np.bool_),
        competing=np.array(columns[4], np.bool_),
        to_data_cut=np.array(columns[5], np.bool_),
        washout_seconds=seconds(columns[6], 0),
        min_follow_up_seconds=seconds(columns[7], -NEVER),
        clock=np.array([number.get(position, -1) for position in range(len(rows))], np.int64),
    )
    by_statement = {position: row[10] for position, row in enumerate(rows) if row[9]}
    return LabelTasks(rules=rules, by_statement=by_statement, clocks=clocks)


def read_concept_tasks(connection: Connection, task_set_id: int, tasks: LabelTasks) -> ConceptTasks:
    """Which tasks each concept means, descendants included; tasks of statements have negative concepts."""
    layout = [("concept", "i4"), ("task", "i2")]
    pairs = np.concatenate(list(copy_out(connection, outcomes.PAIRS.format(task_set_id=task_set_id), layout)))
    chosen = np.array(list(tasks.by_statement), np.int64)
    return ConceptTasks.of_pairs(
        concept=np.concatenate([pairs["concept"].astype(np.int64), -1 - chosen]),
        task=np.concatenate([pairs["task"].astype(np.int64), chosen]),
    )


def read_statement_events(connection: Connection, cohort_id: int, tasks: LabelTasks) -> StatementEvents:
    """Rows of the tasks that concepts alone do not describe, among the persons of a cohort."""
    found = [np.zeros((0, 3), np.int64)]
    for position, definition in tasks.by_statement.items():
        statement, values = outcomes.statement(definition)
        rows = binary_cursor(connection).execute(statement, values | {"cohort_id": cohort_id}).fetchall()
        pairs = np.array(rows, np.int64).reshape(-1, 2)
        found.append(np.column_stack([pairs, np.full(len(pairs), -1 - position)]))
    all_rows = np.concatenate(found)
    all_rows = all_rows[np.lexsort((all_rows[:, 2], all_rows[:, 1], all_rows[:, 0]))]
    return StatementEvents(person=all_rows[:, 0], time=all_rows[:, 1], concept=all_rows[:, 2].astype(np.int32))


_LABEL_MEMBERS = f"""
SELECT m.cohort_member_id, m.person_id, coalesce(i.image_key, ''), m.index_date_only,
       extract(epoch FROM m.index_time)::int8, extract(epoch FROM m.follow_up_end)::int8,
       extract(epoch FROM m.data_cut_end)::int8, extract(epoch FROM m.death_time)::int8, m.eligible,
       array_position(%(splits)s::text[], m.split) - 1,
       extract(epoch FROM coalesce(v.visit_from, date_trunc('day', m.index_time)))::int8,
       extract(epoch FROM coalesce(v.visit_to, date_trunc('day', m.index_time) + interval '86399 seconds'))::int8
FROM label.cohort_member m
LEFT JOIN omop.image_occurrence i USING (image_occurrence_id)
LEFT JOIN LATERAL ({outcomes.VISIT_OF_INDEX}) v ON true
WHERE m.cohort_id = %(cohort_id)s ORDER BY m.person_id, m.index_time, 3, m.cohort_member_id
"""

_OBSERVED_FROM = f"""
WITH member AS (SELECT * FROM label.cohort_member WHERE cohort_id = %(cohort_id)s), period AS ({PERIODS})
SELECT m.cohort_member_id, extract(epoch FROM CASE WHEN c.follow_up = 'observation_period' THEN p.period_start ELSE (
           SELECT min(e.time) FROM omop.event e WHERE e.person_id = m.person_id) END)::int8
FROM member m JOIN label.cohort c USING (cohort_id)
LEFT JOIN period p ON p.person_id = m.person_id AND m.index_time BETWEEN p.period_start AND p.period_end
"""


def read_label_members(connection: Connection, cohort_id: int, tasks: LabelTasks) -> LabelMembers:
    """Members of a cohort with their follow-up, visit, clocks and start of record."""
    values = {"cohort_id": cohort_id, "splits": list(SPLITS)}
    rows = binary_cursor(connection).execute(_LABEL_MEMBERS, values).fetchall()
    columns: list[Sequence[Any]] = list(zip(*rows, strict=True)) if rows else [()] * 12
    member, index = np.array(columns[0], np.int64), np.array(columns[4], np.int64)
    has_end = np.array([end is not None for end in columns[5]], np.bool_)
    has_cut = np.array([end is not None for end in columns[6]], np.bool_)
    end = np.array([-(NEVER // 2) if end is None else end for end in columns[5]], np.int64)
    cut = np.array([-(NEVER // 2) if cut is None else cut for cut in columns[6]], np.int64)
    clocks = np.zeros((len(member), len(tasks.clocks), 2), np.int64)
    clocks[:, :, 0] = -NEVER
    for n, definition in enumerate(tasks.clocks.values()):
        _, task_values = outcomes.statement(definition)
        found = binary_cursor(connection).execute(outcomes.CLOCKS, task_values | values).fetchall()
        _scatter(clocks[:, n, 0], member, [(row[0], row[1]) for row in found])
        _scatter(clocks[:, n, 1], member, [(row[0], row[2]) for row in found])
    observed = index.copy()
    if tasks.rules.washout_seconds.any():
        found = binary_cursor(connection).execute(_OBSERVED_FROM, values).fetchall()
        _scatter(observed, member, [row for row in found if row[1] is not None])
    return LabelMembers(
        member=member,
        person=np.array(columns[1], np.int64),
        image_key=list(columns[2]),
        index_date_only=np.array(columns[3], np.bool_),
        has_end=has_end,
        has_cut=has_cut,
        rows=MemberRows(
            index=index,
            end=end,
            cut_end=np.where(has_cut, cut, end),
            death=np.array([NEVER if death is None else death for death in columns[7]], np.int64),
            eligible=np.array(columns[8], np.bool_),
            observed_from=np.minimum(observed, index),
            visit_from=np.array(columns[10], np.int64),
            visit_to=np.array(columns[11], np.int64),
            split=np.array(columns[9], np.int8),
            person_row=np.zeros(len(member), np.int64),
            clocks=clocks,
        ),
    )


def _scatter(target: NDArray[np.int64], member: NDArray[np.int64], rows: Sequence[tuple[int, int]]) -> None:
    """Put (member, value) rows where `member` has them."""
    if rows:
        order = np.argsort(member)
        ids = np.array([row[0] for row in rows], np.int64)
        target[order[np.searchsorted(member, ids, sorter=order)]] = [row[1] for row in rows]


_DIGESTS = "SELECT person_id, num_events, digest FROM omop.timeline WHERE person_id = ANY(%s) ORDER BY person_id"


def read_timeline_digests(
    connection: Connection, persons: NDArray[np.int64]
) -> tuple[NDArray[np.int64], list[tuple[int, bytes]]]:
    """Number of events of each of `persons` (ascending), and (person, digest) of those that have any."""
    rows = binary_cursor(connection).execute(_DIGESTS, (persons.tolist(),)).fetchall()
    counts = np.zeros(len(persons), np.int64)
    if rows:
        counts[np.searchsorted(persons, np.array([row[0] for row in rows], np.int64))] = [row[1] for row in rows]
    return counts, [(row[0], bytes(row[2])) for row in rows]


_INT2, _INT8 = 21, 20


def tte_rows(
    label_set_id: int, members: LabelMembers, part: slice, labels: SparseLabels
) -> Iterator[tuple[bytes, bytes]]:
    """Rows of label.tte in Postgres's binary COPY form, with what of each counts for the digest.

    The second item holds neither key: equal labels of equal scans have equal bytes, whichever ids they got.
    """
    rows = members.rows
    lists = [
        _packed(labels.events.task, labels.events.ptr, _INT2),
        _packed(labels.events.seconds, labels.events.ptr, _INT8),
        _packed(labels.priors.task, labels.priors.ptr, _INT2),
        _packed(labels.ineligibles.task, labels.ineligibles.ptr, _INT2),
        _packed(labels.windows.task, labels.windows.ptr, _INT2),
        _packed(labels.windows.seconds, labels.windows.ptr, _INT8),
        _packed(labels.visits.task, labels.visits.ptr, _INT2),
    ]
    for n, fields in zip(range(part.start, part.stop), zip(*lists, strict=True), strict=True):
        index = int(rows.index[n])
        content = b"".join(fields)
        content += _int8(int(rows.end[n]) - index if members.has_end[n] else None)
        content += _int8(int(rows.cut_end[n]) - index if members.has_cut[n] else None)
        content += _int8(int(rows.death[n]) - index if rows.death[n] != NEVER else None)
        key = struct.pack(">hiiiq", 12, 4, label_set_id, 8, members.member[n])
        who = f"{members.person[n]}\t{index}\t{members.index_date_only[n]}\t{rows.split[n]}\t{rows.eligible[n]}"
        yield key + content, f"{who}\t{members.image_key[n]}\n".encode() + content


def _int8(value: int | None) -> bytes:
    return b"\xff\xff\xff\xff" if value is None else struct.pack(">iq", 8, value)


def _packed(values: NDArray[Any] | None, ptr: NDArray[np.int64], oid: int) -> Iterator[bytes]:
    """Each member's stretch of `values` as a field of a binary COPY row: an array with its length before it."""
    width = 2 if oid == _INT2 else 8
    if values is None:
        raise ValueError("Expected seconds beside the tasks of this list, found none.")
    elements = np.empty(len(values), np.dtype([("length", ">i4"), ("value", f">i{width}")]))
    elements["length"], elements["value"] = width, values
    data, size = memoryview(elements.tobytes()), width + 4
    empty = struct.pack(">iiii", 12, 0, 0, oid)
    for begin, end in zip(ptr[:-1].tolist(), ptr[1:].tolist(), strict=True):
        if begin == end:
            yield empty
        else:
            count = end - begin
            yield struct.pack(">iiiiii", 20 + count * size, 1, 0, oid, count, 1) + data[begin * size : end * size]


def status_count_rows(label_set_id: int, counts: NDArray[np.int64]) -> bytes:
    """Rows of label.task_status_count in binary COPY form, of `Labeller.counts`; zero counts are left out."""
    blocks = []
    for split, split_name in enumerate(SPLITS):
        for status, status_name in enumerate(STATUSES):
            n, persons, seconds = counts[split, status]
            position = np.flatnonzero(n)
            a, b = len(split_name), len(status_name)
            layout = [
                ("fields", ">i2"),
                ("l0", ">i4"),
                ("id", ">i4"),
                ("l1", ">i4"),
                ("position", ">i2"),
                ("l2", ">i4"),
            ]
            layout += [("split", f"S{a}"), ("l3", ">i4"), ("status", f"S{b}"), ("l4", ">i4"), ("n", ">i4")]
            layout += [("l5", ">i4"), ("persons", ">i4"), ("l6", ">i4"), ("days", ">f8")]
            rows = np.empty(len(position), np.dtype(layout))
            rows["fields"], rows["id"], rows["position"] = 7, label_set_id, position
            rows["split"], rows["status"] = split_name.encode(), status_name.encode()
            rows["n"], rows["persons"], rows["days"] = n[position], persons[position], seconds[position] / DAY_SECONDS
            for field, length in enumerate((4, 2, a, b, 4, 4, 8)):
                rows[f"l{field}"] = length
            blocks.append(rows.tobytes())
    return b"".join(blocks)
