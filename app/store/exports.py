"""What an export asks the store: chosen persons, their rows chunk by chunk, labels task by task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from app.store.copy import EPOCH_MICROSECONDS, copy_out

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from sqlalchemy import Connection

NULL = np.iinfo(np.int64).min
"""Stands for null in columns of 64 bits: Postgres keeps `-infinity` as this."""

PERSON_LAYOUT = (
    ("person_id", "i8"),
    ("num_rows", "i8"),
    ("birth", "i8"),
    ("gender", "i4"),
    ("race", "i4"),
    ("ethnicity", "i4"),
)
_NUM = "coalesce((SELECT t.num_events FROM omop.timeline t WHERE t.person_id = p.person_id), 0)::bigint"
_PERSONS = f"""
SELECT p.person_id, {_NUM}, coalesce(p.birth_time, '-infinity'), p.gender_concept_id, p.race_concept_id,
       p.ethnicity_concept_id
FROM omop.person p WHERE {{which}} ORDER BY p.person_id
"""
_MEMBERS = "p.person_id IN (SELECT m.person_id FROM label.cohort_member m WHERE m.cohort_id = {cohort_id})"

EVENT_LAYOUT = (
    ("person_id", "i8"),
    ("time", "i8"),
    ("date_only", "u1"),
    ("concept_id", "i4"),
    ("source_concept_id", "i4"),
    ("number", "f4"),
    ("value_concept_id", "i4"),
    ("unit_concept_id", "i4"),
    ("end_time", "i8"),
    ("end_date_only", "u1"),
    ("visit_id", "i8"),
    ("domain", "u1"),
)
_EVENTS = """
SELECT e.person_id, e.time, e.date_only, e.concept_id, e.source_concept_id, coalesce(e.value_as_number, 'NaN'),
       coalesce(e.value_as_concept_id, -1), coalesce(e.unit_concept_id, -1), coalesce(e.end_time, '-infinity'),
       coalesce(v.end_date_only, false), coalesce(e.visit_occurrence_id, {null}), e.domain::"char"
FROM omop.event e LEFT JOIN omop.visit_occurrence v
     ON e.domain = 'v' AND v.visit_occurrence_id = e.visit_occurrence_id
WHERE e.person_id = ANY ('{{{ids}}}'::bigint[])
ORDER BY e.person_id, e.time, e.domain, e.source_row_id
"""

STATIC_LAYOUT = (
    ("person_id", "i8"),
    ("concept_id", "i4"),
    ("number", "f4"),
    ("unit_concept_id", "i4"),
    ("fills", "u1"),
    ("at_birth", "u1"),
)
_STATICS = """
SELECT person_id, concept_id, coalesce(value_as_number, 'NaN'), coalesce(unit_concept_id, -1),
       coalesce(left(fills, 1), '-')::"char", at_birth
FROM omop.static_fact WHERE person_id = ANY ('{{{ids}}}'::bigint[]) ORDER BY person_id, source_row_id
"""


def microseconds(postgres: NDArray[np.int64]) -> NDArray[np.int64]:
    """Microseconds since 1970-01-01 from Postgres's timestamps; `NULL` stays."""
    return np.where(postgres == NULL, NULL, postgres + EPOCH_MICROSECONDS)


def find_persons(connection: Connection, cohort_id: int | None) -> NDArray[Any]:
    """Persons of a cohort, or all, by id: the columns of `PERSON_LAYOUT`, (N,)."""
    which = "true" if cohort_id is None else _MEMBERS.format(cohort_id=int(cohort_id))
    return np.concatenate(list(copy_out(connection, _PERSONS.format(which=which), PERSON_LAYOUT)))


def read_events(connection: Connection, persons: NDArray[np.int64]) -> NDArray[Any]:
    """Events of some persons by person, time, domain and source row: the columns of `EVENT_LAYOUT`, (N,)."""
    query = _EVENTS.format(null=f"'{NULL}'::bigint", ids=",".join(map(str, persons.tolist())))
    return np.concatenate(list(copy_out(connection, query, EVENT_LAYOUT)))


def read_statics(connection: Connection, persons: NDArray[np.int64]) -> NDArray[Any]:
    """Facts without a time of some persons, in their order: the columns of `STATIC_LAYOUT`, (N,)."""
    query = _STATICS.format(ids=",".join(map(str, persons.tolist())))
    return np.concatenate(list(copy_out(connection, query, STATIC_LAYOUT)))


def own_splits(connection: Connection) -> dict[int, str | None]:
    """Person → the split that its source gave."""
    from sqlalchemy import text

    rows = connection.execute(text("SELECT person_id, split FROM omop.person"))
    return {row[0]: row[1] for row in rows}


def member_splits(connection: Connection, cohort_id: int) -> dict[int, str]:
    """Person → its split in a cohort."""
    from sqlalchemy import text

    statement = text("SELECT DISTINCT person_id, split FROM label.cohort_member WHERE cohort_id = :cohort")
    return {row[0]: row[1] for row in connection.execute(statement, {"cohort": cohort_id})}


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportTask:
    """A task of a label set."""

    name: str
    horizons_days: Sequence[int]


def cohort_of_label_set(connection: Connection, label_set_id: int) -> tuple[int, str]:
    """Key and name of the cohort that a label set labels."""
    from sqlalchemy import text

    statement = text(
        "SELECT c.cohort_id, c.name FROM label.label_set s JOIN label.cohort c USING (cohort_id) "
        "WHERE s.label_set_id = :id"
    )
    row = connection.execute(statement, {"id": label_set_id}).one()
    return int(row[0]), str(row[1])


def tasks_of_label_set(connection: Connection, label_set_id: int) -> list[ExportTask]:
    """Tasks of a label set, in their order."""
    from sqlalchemy import text

    statement = text(
        "SELECT t.name, t.horizons_days FROM label.label_set s JOIN label.task t USING (task_set_id) "
        "WHERE s.label_set_id = :id ORDER BY t.position"
    )
    rows = connection.execute(statement, {"id": label_set_id})
    return [ExportTask(name=name, horizons_days=list(horizons or [])) for name, horizons in rows]


# A label may use what happened at or before `prediction_time`; ours may use what happened before the index, and of a
# date-only index only what happened on earlier days. Hence the microsecond.
_MOMENT = """
CASE WHEN m.index_date_only THEN date_trunc('day', l.index_time) ELSE l.index_time END - interval '1 microsecond'
"""
_BINARY = f"""
SELECT DISTINCT l.person_id, {_MOMENT} AS prediction_time, l.label = 1
FROM label.binary(:label_set, :days) l JOIN label.cohort_member m USING (cohort_member_id)
WHERE l.task = :task AND l.label IS NOT NULL ORDER BY 1, 2
"""
_TTE = f"""
SELECT DISTINCT l.person_id, {_MOMENT} AS prediction_time, l.event = 1, l.time_days::real
FROM label.tte_long(:label_set) l JOIN label.cohort_member m USING (cohort_member_id)
WHERE l.task = :task AND l.event IS NOT NULL ORDER BY 1, 2
"""


def binary_labels(connection: Connection, label_set: str, task: str, days: int) -> list[tuple[Any, ...]]:
    """(person_id, prediction_time, label) of the members whose label at a horizon is known."""
    from sqlalchemy import text

    values = {"label_set": label_set, "task": task, "days": days}
    return [tuple(row) for row in connection.execute(text(_BINARY), values)]


def tte_labels(connection: Connection, label_set: str, task: str) -> list[tuple[Any, ...]]:
    """(person_id, prediction_time, event, days) of the members at risk."""
    from sqlalchemy import text

    return [tuple(row) for row in connection.execute(text(_TTE), {"label_set": label_set, "task": task})]


def chunks(persons: NDArray[Any], rows: int) -> Iterator[NDArray[Any]]:
    """Slices of `find_persons` that hold about `rows` events each, whole persons, one at the least."""
    ends = np.cumsum(persons["num_rows"])
    start = 0
    while start < len(persons):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + rows, side="right")))
        stop = min(stop, start + 20_000)
        yield persons[start:stop]
        start = stop
