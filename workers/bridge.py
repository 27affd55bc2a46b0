"""The only place where rows become arrays and arrays become rows. Readers commit nothing.

Shape suffixes: N = cohort member (one scan), E = entry of a sparse list.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from app.errors import InputError, StoreError
from app.store import names, outcomes
from app.store.cohorts import PERIODS
from app.store.copy import copy_out
from ml.labelling import (
    DAY_SECONDS,
    NEVER,
    STATUSES,
    ConceptTasks,
    LabelArrays,
    MemberRows,
    Sparse,
    SparseLabels,
    TaskRules,
)

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from app.settings import Settings

TRAIN, TUNING, HELD_OUT = range(3)
SPLITS = ("train", "tuning", "held_out")

MALE, FEMALE = 8507, 8532
YEAR_SECONDS = 365.25 * 86_400


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelSetInfo:
    """A label set and the tasks in it, by position."""

    label_set_id: int
    name: str
    version: int
    cohort_id: int
    cohort: str
    task_set_id: int
    task_set: str
    kind: str
    """pretraining or clinical."""
    digest: str
    """Hexadecimal; equal labels have equal digests."""
    task_names: list[str]
    task_titles: list[str]
    horizons_days: list[list[int]]
    num_train_events: list[int]
    """Scans of the train split whose outcome was observed, by task."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Members:
    """The members of a cohort, in the order of their cohort_member_id (that of `read_labels`)."""

    member: NDArray[np.int64]
    """(N,) cohort_member_id, ascending."""
    person: NDArray[np.int64]
    image: NDArray[np.int64]
    """(N,) image_occurrence_id."""
    split: NDArray[np.int8]
    """(N,) TRAIN, TUNING or HELD_OUT."""
    eligible: NDArray[np.bool_]
    index_seconds: NDArray[np.int64]
    """(N,) index, seconds since 1970-01-01 00:00 in naive local time."""
    age_years: NDArray[np.float64]
    """(N,) age at the index; nan where birth is unknown."""
    female: NDArray[np.float64]
    """(N,) 1 female, 0 male, nan unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scan:
    """Where a scan's voxels are on this host."""

    image_occurrence_id: int
    person_id: int
    format: str
    """nifti (a file) or dicom (a folder)."""
    path: Path
    image_key: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Timelines:
    """Packed events of some persons, one after the other."""

    person: NDArray[np.int64]
    """(persons,) ascending."""
    ptr: NDArray[np.int64]
    """(persons + 1,) where each person's events begin."""
    time: NDArray[np.int64]
    """(events,) seconds since 1970-01-01 00:00 times 2, plus 1 where only the date is known; ascending a person."""
    concept: NDArray[np.int32]
    """(events,) standard concept ids."""


_LABEL_SET = """
SELECT s.label_set_id, s.name, s.version, s.cohort_id, c.name AS cohort, s.task_set_id, t.name AS task_set, t.kind,
       encode(s.digest, 'hex') AS digest
FROM label.label_set s JOIN label.cohort c USING (cohort_id) JOIN label.task_set t USING (task_set_id)
WHERE s.label_set_id = :id
"""

_TASKS = """
SELECT t.name, coalesce(t.title, t.name) AS title, t.horizons_days, coalesce(n.n, 0) AS num_train_events
FROM label.label_set s JOIN label.task t USING (task_set_id)
LEFT JOIN label.task_status_count n ON n.label_set_id = s.label_set_id AND n.position = t.position
      AND n.split = 'train' AND n.status = 'event'
WHERE s.label_set_id = :id ORDER BY t.position
"""


def find_label_set(connection: Connection, name: str) -> LabelSetInfo:
    """The label set that `NAME` (its current version) or `NAME@2` means. Raises UnknownName."""
    from sqlalchemy import text

    found = names.find(connection, "label set", name)
    row = connection.execute(text(_LABEL_SET), {"id": found.id}).mappings().one()
    tasks = connection.execute(text(_TASKS), {"id": found.id}).mappings().all()
    return LabelSetInfo(
        **row,
        task_names=[t["name"] for t in tasks],
        task_titles=[t["title"] for t in tasks],
        horizons_days=[list(t["horizons_days"]) for t in tasks],
        num_train_events=[int(t["num_train_events"]) for t in tasks],
    )


_TTE = """
SELECT y.cohort_member_id, m.eligible, array_send(y.event_tasks), array_send(y.event_seconds),
       array_send(y.prior_tasks), array_send(y.ineligible_tasks), array_send(y.window_tasks),
       array_send(y.window_seconds), array_send(y.visit_tasks), coalesce(y.follow_up_seconds, -1),
       coalesce(y.data_cut_seconds, y.follow_up_seconds, -1), coalesce(y.death_seconds, -1)
FROM label.tte y JOIN label.cohort_member m USING (cohort_member_id)
WHERE y.label_set_id = %s ORDER BY y.cohort_member_id
"""

_RULES = """
SELECT start_seconds, prior = 'exclude', death = 'competing', follow_up = 'data_cut'
FROM label.task WHERE task_set_id = %s ORDER BY position
"""


def read_labels(connection: Connection, info: LabelSetInfo) -> LabelArrays:
    """`label.tte` of a label set as arrays, members ascending, ineligible ones too.

    Where no data cut is known, tasks followed to the data cut end with the cohort's follow-up.
    """
    cursor = _binary_cursor(connection)
    rows = cursor.execute(_TTE, (info.label_set_id,)).fetchall()
    columns: list[Sequence[Any]] = list(zip(*rows, strict=True)) if rows else [()] * 12
    rules = cursor.execute(_RULES, (info.task_set_id,)).fetchall()
    start, excludes, competing, to_data_cut = list(zip(*rules, strict=True)) if rules else [()] * 4
    return LabelArrays(
        member=np.array(columns[0], np.int64),
        eligible=np.array(columns[1], np.bool_),
        events=_sparse(columns[2], columns[3]),
        priors=_sparse(columns[4]),
        ineligibles=_sparse(columns[5]),
        windows=_sparse(columns[6], columns[7]),
        visits=_sparse(columns[8]),
        follow_up_seconds=np.array(columns[9], np.int64),
        data_cut_seconds=np.array(columns[10], np.int64),
        death_seconds=np.array(columns[11], np.int64),
        start_seconds=np.array(start, np.int64),
        excludes_prior=np.array(excludes, np.bool_),
        competing=np.array(competing, np.bool_),
        to_data_cut=np.array(to_data_cut, np.bool_),
    )


def _binary_cursor(connection: Connection) -> Any:
    from app.store.session import raw

    return raw(connection).cursor(binary=True)


_ARRAY_HEADER = 20
"""Bytes before the elements of a one-dimensional array in Postgres's binary form; an empty one has 12 and no more."""


def _sparse(tasks: Sequence[bytes], seconds: Sequence[bytes] | None = None) -> Sparse:
    """Arrays in Postgres's binary form (int2[], int8[]) as one sparse list: no Python object a number."""
    packed = b"".join(t[_ARRAY_HEADER:] for t in tasks)
    counts = np.array([max(len(t) - _ARRAY_HEADER, 0) // 6 for t in tasks], np.int64)
    task = np.frombuffer(packed, np.dtype([("length", ">i4"), ("value", ">i2")]))["value"].astype(np.int16)
    times = None
    if seconds is not None:
        packed = b"".join(s[_ARRAY_HEADER:] for s in seconds)
        times = np.frombuffer(packed, np.dtype([("length", ">i4"), ("value", ">i8")]))["value"].astype(np.int64)
    return Sparse(ptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), task=task, seconds=times)


_MEMBERS = """
SELECT m.cohort_member_id, m.person_id, m.image_occurrence_id, array_position(%s::text[], m.split) - 1, m.eligible,
       extract(epoch FROM m.index_time)::int8,
       coalesce(extract(epoch FROM m.index_time - p.birth_time)::float8, 'NaN'), coalesce(p.gender_concept_id, 0)
FROM label.cohort_member m LEFT JOIN omop.person p USING (person_id)
WHERE m.cohort_id = %s ORDER BY m.cohort_member_id
"""


def read_members(connection: Connection, cohort_id: int) -> Members:
    """All members of a cohort, ineligible ones too, by ascending cohort_member_id."""
    rows = _binary_cursor(connection).execute(_MEMBERS, (list(SPLITS), cohort_id)).fetchall()
    columns: list[Sequence[Any]] = list(zip(*rows, strict=True)) if rows else [()] * 8
    gender = np.array(columns[7], np.int64)
    return Members(
        member=np.array(columns[0], np.int64),
        person=np.array(columns[1], np.int64),
        image=np.array(columns[2], np.int64),
        split=np.array(columns[3], np.int8),
        eligible=np.array(columns[4], np.bool_),
        index_seconds=np.array(columns[5], np.int64),
        age_years=np.array(columns[6], np.float64) / YEAR_SECONDS,
        female=np.where(gender == FEMALE, 1.0, np.where(gender == MALE, 0.0, np.nan)),
    )


_SCANS = """
SELECT DISTINCT i.image_occurrence_id, i.person_id, i.format, i.root, i.path, i.image_key,
       s.details -> 'roots' ->> i.root AS folder
FROM label.cohort_member m
JOIN omop.image_occurrence i USING (image_occurrence_id)
JOIN ops.load l ON l.load_id = i.load_id
JOIN ops.source s USING (source_id)
WHERE m.cohort_id = :cohort_id ORDER BY i.image_occurrence_id
"""


def read_scans(connection: Connection, settings: Settings, cohort_id: int) -> list[Scan]:
    """Where the scans of a cohort's members are, one a distinct scan, by ascending image_occurrence_id.

    A root's folder is LACHESIS_ROOT_<NAME> where this host names one, else the folder it was loaded from.

    Raises:
        StoreError: this host does not know where a root is.
        InputError: a path leads out of its root.
    """
    from sqlalchemy import text

    scans = []
    for row in connection.execute(text(_SCANS), {"cohort_id": cohort_id}).mappings():
        folder = settings.roots.get(row["root"].lower()) or row["folder"]
        if folder is None:
            raise StoreError(
                f"Expected LACHESIS_ROOT_{row['root'].upper()} to name the folder of the scans under the root "
                f"{row['root']!r}, found neither it nor a folder kept when they were loaded; set it on this host."
            )
        if Path(row["path"]).is_absolute() or ".." in Path(row["path"]).parts:
            raise InputError(f"Expected scans inside their root, found one outside of {row['root']!r}; load it again.")
        scans.append(
            Scan(
                image_occurrence_id=row["image_occurrence_id"],
                person_id=row["person_id"],
                format=row["format"],
                path=Path(folder) / row["path"],
                image_key=row["image_key"],
            )
        )
    return scans


_TIMELINES = "SELECT person_id, times, concepts FROM omop.timeline WHERE person_id = ANY(%s) ORDER BY person_id"


def read_timelines(connection: Connection, persons: Sequence[int] | NDArray[np.int64]) -> Timelines:
    """Packed events of `persons` (ascending); a person without events has an empty stretch."""
    person = np.unique(np.asarray(persons, np.int64))
    rows = _binary_cursor(connection).execute(_TIMELINES, (person.tolist(),)).fetchall()
    counts = np.zeros(len(person), np.int64)
    if rows:
        found = np.searchsorted(person, np.array([row[0] for row in rows], np.int64))
        counts[found] = [len(row[2]) // 4 for row in rows]
    return Timelines(
        person=person,
        ptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        time=np.frombuffer(b"".join(row[1] for row in rows), "<i8").astype(np.int64, copy=False),
        concept=np.frombuffer(b"".join(row[2] for row in rows), "<i4").astype(np.int32, copy=False),
    )


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
    rows = _binary_cursor(connection).execute(_LABEL_TASKS, (task_set_id,)).fetchall()
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
        rows = _binary_cursor(connection).execute(statement, values | {"cohort_id": cohort_id}).fetchall()
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
    rows = _binary_cursor(connection).execute(_LABEL_MEMBERS, values).fetchall()
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
        found = _binary_cursor(connection).execute(outcomes.CLOCKS, task_values | values).fetchall()
        _scatter(clocks[:, n, 0], member, [(row[0], row[1]) for row in found])
        _scatter(clocks[:, n, 1], member, [(row[0], row[2]) for row in found])
    observed = index.copy()
    if tasks.rules.washout_seconds.any():
        found = _binary_cursor(connection).execute(_OBSERVED_FROM, values).fetchall()
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
    rows = _binary_cursor(connection).execute(_DIGESTS, (persons.tolist(),)).fetchall()
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
