"""What the label engine reads of the store as arrays, and its arrays as rows of `label.tte`."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from app.store import coded_outcomes, outcomes
from app.store.cohorts import PERIODS
from ml.labelling import (
    DAY_SECONDS,
    NEVER,
    STATUSES,
    ConceptTasks,
    MemberRows,
    SparseLabels,
    TaskRules,
)
from workers.bridge import SPLITS, binary_cursor, coded

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
SELECT string_agg(int2send(position::int2), '' ORDER BY position), start_seconds,
       (definition ->> 'prior_days')::int8, definition ->> 'same_day' = 'after', prior = 'exclude',
       death = 'competing', follow_up = 'data_cut', (definition ->> 'washout_days')::int8,
       (definition ->> 'min_follow_up_days')::int8, definition ->> 'clock' = 'discharge',
       (definition -> 'resolved' ->> 'by_statement')::bool,
       CASE WHEN (definition -> 'resolved' ->> 'by_statement')::bool OR definition ->> 'clock' = 'discharge'
            THEN definition END
FROM label.task WHERE task_set_id = %s GROUP BY 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12
"""
"""A row a rule, with the positions of its tasks: there are few rules, and many tasks."""


def read_label_tasks(connection: Connection, task_set_id: int) -> LabelTasks:
    """How each task of a set reads a timeline, by position."""
    rows = binary_cursor(connection).execute(_LABEL_TASKS, (task_set_id,)).fetchall()
    positions = [np.frombuffer(row[0], ">i2").astype(np.int64) for row in rows]
    of_position = np.zeros(sum(map(len, positions)), np.int64)
    for rule, held in enumerate(positions):
        of_position[held] = rule
    columns: list[Sequence[Any]] = list(zip(*rows, strict=True)) if rows else [()] * 12

    def told(column: int, dtype: type) -> NDArray[Any]:
        return np.array(columns[column], dtype)[of_position]

    def seconds(column: int, default: int) -> NDArray[np.int64]:
        days: Sequence[int | None] = columns[column]
        return np.array([default if n is None else n * DAY_SECONDS for n in days], np.int64)[of_position]

    clocks = {int(p): row[11] for row, held in zip(rows, positions, strict=True) if row[9] for p in held}
    clock = np.full(len(of_position), -1, np.int64)
    clock[sorted(clocks)] = np.arange(len(clocks))
    rules = TaskRules(
        start_seconds=told(1, np.int64),
        look_back_seconds=seconds(2, NEVER // 2),
        same_day_after=told(3, np.bool_),
        excludes_prior=told(4, np.bool_),
        competing=told(5, np.bool_),
        to_data_cut=told(6, np.bool_),
        washout_seconds=seconds(7, 0),
        min_follow_up_seconds=seconds(8, -NEVER),
        clock=clock,
    )
    by_statement = {int(p): row[11] for row, held in zip(rows, positions, strict=True) if row[10] for p in held}
    return LabelTasks(rules=rules, by_statement=dict(sorted(by_statement.items())), clocks=dict(sorted(clocks.items())))


def read_concept_tasks(connection: Connection, task_set_id: int, tasks: LabelTasks) -> ConceptTasks:
    """Which tasks each concept means, descendants included; tasks of statements have negative concepts."""
    packed = binary_cursor(connection).execute(outcomes.PACKED_PAIRS.format(task_set_id=task_set_id)).fetchall()
    pairs = np.frombuffer(b"".join(row[0] for row in packed), np.dtype([("concept", ">i4"), ("task", ">i2")]))
    chosen = np.array(list(tasks.by_statement), np.int64)
    return ConceptTasks.of_pairs(
        concept=np.concatenate([pairs["concept"].astype(np.int64), -1 - chosen]),
        task=np.concatenate([pairs["task"].astype(np.int64), chosen]),
    )


EVERYBODY = (-NEVER, NEVER)
"""Bounds of person ids that hold all of them."""


def read_persons(connection: Connection, cohort_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Persons of a cohort, ascending, and how many members each is."""
    statement = "SELECT person_id, count(*) FROM label.cohort_member WHERE cohort_id = %s GROUP BY 1 ORDER BY 1"
    rows = binary_cursor(connection).execute(statement, (cohort_id,)).fetchall()
    table = np.array(rows, np.int64).reshape(-1, 2)
    return table[:, 0].copy(), table[:, 1].copy()


def read_statement_events(
    connection: Connection, cohort_id: int, tasks: LabelTasks, persons: tuple[int, int] = EVERYBODY
) -> StatementEvents:
    """Rows of the tasks that concepts alone do not describe, among the persons of a cohort (from one to another)."""
    who = {"cohort_id": cohort_id, "from_person": persons[0], "to_person": persons[1]}
    together, apart = coded_outcomes.split(tasks.by_statement)
    found = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
    if together:
        blocks = coded.read_rows(connection, coded_outcomes.ROWS, together, who)
        found += [_ordered(person, _keys(time, task)) for person, time, task in blocks]
    for position, definition in apart.items():
        statement, values = outcomes.statement(definition)
        rows = binary_cursor(connection).execute(statement, values | who).fetchall()
        pairs = np.array(rows, np.int64).reshape(-1, 2)
        found.append((pairs[:, 0], _keys(pairs[:, 1], np.full(len(pairs), position))))
    person, key = (np.concatenate([part[n] for part in found]) for n in range(2))
    if apart:
        person, key = _ordered(person, key)
    return StatementEvents(
        person=person,
        time=key >> _POSITION_BITS,
        concept=((key & _LAST_POSITION) - _LAST_POSITION - 1).astype(np.int32),
    )


_POSITION_BITS = 15
_LAST_POSITION = (1 << _POSITION_BITS) - 1


def _keys(time: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.int64]:
    """Coded times (48 bits hold all that Postgres has) and positions as numbers in the order of events."""
    return (time << _POSITION_BITS) + (_LAST_POSITION - position)


def _ordered(person: NDArray[np.int64], key: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Persons and keys ascending, each pair once."""
    order = np.lexsort((key, person))
    person, key = person[order], key[order]
    first = np.ones(len(key), np.bool_)
    first[1:] = (np.diff(person) != 0) | (np.diff(key) != 0)
    return person[first], key[first]


_LABEL_MEMBERS = f"""
SELECT m.cohort_member_id, m.person_id, coalesce(i.image_key, ''), m.index_date_only,
       floor(date_part('epoch', m.index_time))::int8, floor(date_part('epoch', m.follow_up_end))::int8,
       floor(date_part('epoch', m.data_cut_end))::int8, floor(date_part('epoch', m.death_time))::int8, m.eligible,
       array_position(%(splits)s::text[], m.split) - 1,
       floor(date_part('epoch', coalesce(v.visit_from, date_trunc('day', m.index_time))))::int8,
       floor(date_part('epoch', coalesce(v.visit_to, date_trunc('day', m.index_time) + interval '86399 seconds')))::int8
FROM label.cohort_member m
LEFT JOIN omop.image_occurrence i USING (image_occurrence_id)
LEFT JOIN LATERAL ({outcomes.VISIT_OF_INDEX}) v ON true
WHERE m.cohort_id = %(cohort_id)s AND m.person_id BETWEEN %(from_person)s AND %(to_person)s
ORDER BY m.person_id, m.index_time, 3, m.cohort_member_id
"""

_OBSERVED_FROM = f"""
WITH member AS (
    SELECT * FROM label.cohort_member
    WHERE cohort_id = %(cohort_id)s AND person_id BETWEEN %(from_person)s AND %(to_person)s
), period AS ({PERIODS})
SELECT m.cohort_member_id, floor(extract(epoch FROM CASE WHEN c.follow_up = 'observation_period' THEN p.period_start
           ELSE (SELECT min(e.time) FROM omop.event e WHERE e.person_id = m.person_id) END))::int8
FROM member m JOIN label.cohort c USING (cohort_id)
LEFT JOIN period p ON p.person_id = m.person_id AND m.index_time BETWEEN p.period_start AND p.period_end
"""


def read_label_members(
    connection: Connection, cohort_id: int, tasks: LabelTasks, persons: tuple[int, int] = EVERYBODY
) -> LabelMembers:
    """Members of a cohort (of persons from one to another) with their follow-up, visit, clocks and start of record."""
    values: dict[str, Any] = {"cohort_id": cohort_id, "from_person": persons[0], "to_person": persons[1]}
    values["splits"] = list(SPLITS)
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


@dataclass(frozen=True, kw_only=True, slots=True)
class TteRows:
    """Rows of label.tte, or of a table whose first columns differ, in Postgres's binary COPY form."""

    data: NDArray[np.uint8]
    begins: NDArray[np.int64]
    """(N + 1,) where each row begins."""
    head: int
    """Bytes of a row before its first array."""

    def digests(self, who: Sequence[bytes]) -> list[bytes]:
        """sha256 of whose each row is and its arrays and times, without its head: no key of ours counts."""
        data, found = self.data.data, []
        edges = self.begins.tolist()
        for n, name in enumerate(who):
            digest = hashlib.sha256(name)
            digest.update(data[edges[n] + self.head : edges[n + 1]])
            found.append(digest.digest())
        return found


def tte_rows(heads: NDArray[np.uint8], members: LabelMembers, part: slice, labels: SparseLabels) -> TteRows:
    """Rows of some members, after `heads` (N, H): the number of fields and the fields before the arrays."""
    from workers.bridge import encode

    if labels.events.seconds is None or labels.windows.seconds is None:
        raise ValueError("Expected seconds beside the tasks of events and windows, found none.")
    rows, null = members.rows, encode.NULL
    index, end, cut, death = (a[part] for a in (rows.index, rows.end, rows.cut_end, rows.death))
    numbers = np.stack(
        [
            np.where(members.has_end[part], end - index, null),
            np.where(members.has_cut[part], cut - index, null),
            np.where(death != NEVER, death - index, null),
        ],
        axis=1,
    )
    lists = (labels.events, labels.priors, labels.ineligibles, labels.windows, labels.visits)
    ptrs = np.stack([one.ptr for one in lists])
    begins = encode.row_sizes(heads, ptrs, numbers)
    data = np.empty(int(begins[-1]), np.uint8)
    encode.put_rows(
        data, begins, heads, ptrs, labels.events.task, labels.events.seconds, labels.priors.task,
        labels.ineligibles.task, labels.windows.task, labels.windows.seconds, labels.visits.task, numbers,
    )  # fmt: skip
    return TteRows(data=data, begins=begins, head=heads.shape[1])


def tte_heads(label_set_id: int, member: NDArray[np.int64]) -> NDArray[np.uint8]:
    """(N, 18): what comes before the arrays in rows of label.tte."""
    layout = [("fields", ">i2"), ("l0", ">i4"), ("label_set_id", ">i4"), ("l1", ">i4"), ("member", ">i8")]
    heads = np.empty(len(member), np.dtype(layout))
    heads["fields"], heads["l0"], heads["label_set_id"], heads["l1"], heads["member"] = 12, 4, label_set_id, 8, member
    return heads.view(np.uint8).reshape(len(member), -1)


def shard_heads(job_id: int, shard: int, member: NDArray[np.int64]) -> NDArray[np.uint8]:
    """(N, 68): what comes before the arrays in rows of label.shard_tte, the digest left empty."""
    layout = [("fields", ">i2"), ("l0", ">i4"), ("job_id", ">i8"), ("l1", ">i4"), ("shard", ">i2")]
    layout += [("l2", ">i4"), ("member", ">i8"), ("l3", ">i4"), ("digest", "V32")]
    heads = np.zeros(len(member), np.dtype(layout))
    heads["fields"], heads["l0"], heads["l1"], heads["l2"], heads["l3"] = 14, 8, 2, 8, 32
    heads["job_id"], heads["shard"], heads["member"] = job_id, shard, member
    return heads.view(np.uint8).reshape(len(member), -1)


def put_digests(rows: TteRows, digests: Sequence[bytes]) -> None:
    """Write each row's digest to the end of its head."""
    places = rows.begins[:-1, None] + np.arange(rows.head - 32, rows.head)
    rows.data[places] = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)


def who(members: LabelMembers, part: slice) -> list[bytes]:
    """What tells each scan from all others, whichever ids it got in this store."""
    rows = members.rows
    columns = (members.person, rows.index, members.index_date_only, rows.split, rows.eligible)
    lists = [column[part].tolist() for column in columns]
    keys = members.image_key[part]
    return ["\t".join(map(str, values)).encode() + b"\n" for values in zip(*lists, keys, strict=True)]


def status_count_rows(label_set_id: int, counts: NDArray[np.int64]) -> bytes:
    """Rows of label.status_count in binary COPY form, of `Labeller.counts`; one a split and status that has any."""
    rows = []
    for split, split_name in enumerate(SPLITS):
        for status, status_name in enumerate(STATUSES):
            n, persons, seconds = counts[split, status]
            if not n.any():
                continue
            fields = [struct.pack(">i", label_set_id), split_name.encode(), status_name.encode()]
            fields += [
                packed_array(n, "i4", 23),
                packed_array(persons, "i4", 23),
                packed_array(seconds / DAY_SECONDS, "f8", 701),
            ]
            rows.append(struct.pack(">h", len(fields)))
            rows += [struct.pack(">i", len(field)) + field for field in fields]
    return b"".join(rows)


def packed_array(values: NDArray[Any], kind: str, oid: int) -> bytes:
    """A one-dimensional array in Postgres's binary form; `kind` is the elements' dtype and `oid` their type there."""
    if not len(values):
        return struct.pack(">iii", 0, 0, oid)
    elements = np.empty(len(values), np.dtype([("length", ">i4"), ("value", f">{kind}")]))
    elements["length"], elements["value"] = np.dtype(kind).itemsize, values
    return struct.pack(">iiiii", 1, 0, oid, len(values), 1) + elements.tobytes()
