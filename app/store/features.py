"""Features in the store: what one statement over omop.event tells, and the rows of label.feature."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

from app.store import coded_outcomes
from app.store.copy import Field, Text, copy_in, encode_mixed
from app.store.outcomes import CODED, event_condition, holding, parameters

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from sqlalchemy import Connection

BEFORE = """
CASE WHEN {date_only} OR m.index_date_only THEN {time} < date_trunc('day', m.index_time) ELSE {time} < m.index_time END
"""
"""Features look back: where an event or the index has only a day, an earlier day."""

_EVENT_BEFORE = BEFORE.format(date_only="e.date_only", time="e.time")

_STOP = "coalesce(v.visit_end_datetime, v.visit_start_datetime)"
_STOP_DAY_ALONE = "CASE WHEN v.visit_end_datetime IS NULL THEN v.date_only ELSE v.end_date_only END"

_OPEN = f"""
member AS MATERIALIZED (SELECT * FROM label.cohort_member WHERE cohort_id = %(cohort_id)s),
visit AS (
    SELECT m.*, v.visit_occurrence_id, v.visit_concept_id, v.visit_start_datetime, v.date_only,
           {{stop}} AS visit_stop, {_STOP_DAY_ALONE} AS stop_day_alone
    FROM member m JOIN omop.visit_occurrence v USING (person_id) WHERE {{visits}}
), open AS MATERIALIZED (
    SELECT m.cohort_member_id, m.person_id, m.index_time, m.index_date_only, m.visit_occurrence_id,
           m.visit_concept_id, extract(epoch FROM m.index_time - m.visit_start_datetime)::float8 / 86400 AS days
    FROM visit m
    WHERE {BEFORE.format(date_only="m.date_only", time="m.visit_start_datetime")}
      AND {holding("m.visit_start_datetime", "m.date_only", "m.visit_stop", "m.stop_day_alone")}
)
"""
"""Visits that began before the index and had not ended by then; one without an end is a moment."""

_LOOK_BACK = f"""
WITH {_OPEN}, measured AS MATERIALIZED (
    SELECT m.cohort_member_id, m.person_id, m.split, m.index_time, e.concept_id, coalesce(e.unit_concept_id, 0) AS unit,
           e.time, e.value_as_number AS value, e.source_row_id
    FROM member m JOIN omop.event e USING (person_id)
    WHERE %(values)s > 0 AND e.domain = 'm' AND e.value_as_number IS NOT NULL AND e.concept_id <> 0
      AND {_EVENT_BEFORE} AND {{events}}
), pair AS (
    SELECT concept_id, unit FROM measured WHERE split = 'train'
    GROUP BY 1, 2 ORDER BY count(DISTINCT person_id) DESC, 1, 2 LIMIT %(values)s
)
SELECT 'open', cohort_member_id, 0::int8, visit_concept_id, 0, days::float8 FROM open
UNION ALL
SELECT 'hidden', m.cohort_member_id, {CODED.format(time="e.time", date_only="e.date_only")}, e.concept_id, 0, 0::float8
FROM open m JOIN omop.event e USING (person_id, visit_occurrence_id)
WHERE e.domain = 'c' AND {_EVENT_BEFORE} AND {{events}}
UNION ALL
SELECT 'value', cohort_member_id, floor(extract(epoch FROM index_time - time))::int8, concept_id, unit, value::float8
FROM (
    SELECT DISTINCT ON (cohort_member_id, concept_id, unit) *
    FROM measured JOIN pair USING (concept_id, unit)
    ORDER BY cohort_member_id, concept_id, unit, time DESC, source_row_id DESC
) l
"""

_IS_FEATURE = f"""
{_EVENT_BEFORE} AND {{events}}
  AND NOT (e.domain = 'c' AND e.visit_occurrence_id IS NOT NULL
           AND (m.cohort_member_id, e.visit_occurrence_id) IN (SELECT cohort_member_id, visit_occurrence_id FROM open))
"""

_CHOSEN = f"""
WITH {_OPEN}
SELECT m.cohort_member_id, {CODED.format(time="e.time", date_only="e.date_only")}
FROM member m JOIN omop.event e USING (person_id) WHERE {{condition}} AND {_IS_FEATURE}
"""

_CHOSEN_BY_CODES = f"""
WITH {_OPEN}
SELECT m.cohort_member_id, {coded_outcomes.PACKED} FROM member m JOIN omop.event e USING (person_id)
WHERE {coded_outcomes.IS_ASKED} AND {_IS_FEATURE} GROUP BY 1
"""

_AS_THEY_ARE = {"stop": _STOP, "visits": "true", "events": "true"}
_TAKEN_AWAY = {
    "stop": f"CASE WHEN {_STOP} >= m.index_time THEN 'infinity' ELSE {_STOP} END",
    "visits": "v.visit_start_datetime < m.index_time",
    "events": "e.time < m.index_time",
}
"""The store as it was at the index: nothing that began later, and no visit whose end is yet to come."""


def look_back(*, truncated: bool = False) -> str:
    """Visits open at the index; conditions of these, which are not features; last values of what is measured most.

    Columns: what, cohort_member_id, time (of hidden ones coded as in timelines, of values seconds before the index),
    concept, unit, number (days since the start of the visit, or the value). With `truncated`, of the store without
    anything from each member's index on.
    """
    return _LOOK_BACK.format(**(_TAKEN_AWAY if truncated else _AS_THEY_ARE))


def chosen_before(definition: Mapping[str, Any], *, truncated: bool = False) -> tuple[str, dict[str, Any]]:
    """Statement and parameters: (cohort_member_id, coded time) of the events before the index of a task whose rows
    concepts alone do not describe, without conditions of open visits."""
    task = dict(definition)
    condition, values = event_condition(task)
    source = _TAKEN_AWAY if truncated else _AS_THEY_ARE
    return _CHOSEN.format(condition=condition, **source), parameters(task) | values


def chosen_by_codes(*, truncated: bool = False) -> str:
    """The same of all tasks that concepts and source codes alone tell: (cohort_member_id, packed rows)."""
    return _CHOSEN_BY_CODES.format(**(_TAKEN_AWAY if truncated else _AS_THEY_ARE))


@dataclass(frozen=True, kw_only=True, slots=True)
class Definition:
    """What a feature is."""

    name: str
    kind: str
    """demographic, count, time, value or visit."""
    description: str
    window_days: int | None = None
    """How far back it counts; null without limit."""
    concept_id: int | None = None
    unit_concept_id: int | None = None
    absent_is_zero: bool = False
    """True where a member without a row has none of it; else it is unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """Values of one feature, as they are stored."""

    place: NDArray[np.int64]
    """Rows of the members that have it, ascending."""
    value: NDArray[np.float32]


def digest_of(cohort: bytes, definitions: Sequence[Definition], columns: Mapping[str, Column]) -> bytes:
    """sha256 of a cohort's features, name by name."""
    digest = hashlib.sha256(cohort)
    for definition in definitions:
        digest.update(json.dumps(asdict(definition), sort_keys=True).encode())
        column = columns[definition.name]
        digest.update(column.place.tobytes() + column.value.tobytes())
    return digest.digest()


ROWS_AT_A_TIME = 200_000

DEFINITION_COLUMNS = tuple(Definition.__dataclass_fields__)


def replace(
    connection: Connection,
    cohort_id: int,
    definitions: Sequence[Definition],
    columns: Mapping[str, Column],
    members: NDArray[np.int64],
    *,
    digest: bytes,
    asked: Mapping[str, Any],
    job_id: int | None,
) -> None:
    """Put features in place of a cohort's earlier ones.

    Args:
        connection: whose transaction it is.
        cohort_id: the cohort.
        definitions: every feature, in order.
        columns: their values, by name.
        members: (N,) cohort_member_id, ascending.
        digest: of definitions and values.
        asked: how they were asked for.
        job_id: the job that made them.
    """
    from sqlalchemy import text

    from app.store.session import raw

    values = {"cohort": cohort_id}
    connection.execute(
        text(
            "DELETE FROM label.feature f USING label.cohort_member m "
            "WHERE m.cohort_member_id = f.cohort_member_id AND m.cohort_id = :cohort"
        ),
        values,
    )
    connection.execute(text("DELETE FROM label.feature_set WHERE cohort_id = :cohort"), values)
    connection.execute(
        text(
            "INSERT INTO label.feature_set (cohort_id, definition, digest, job_id) "
            "VALUES (:cohort, CAST(:definition AS jsonb), :digest, :job)"
        ),
        {"cohort": cohort_id, "definition": json.dumps(dict(asked)), "digest": digest, "job": job_id},
    )
    statement = f"COPY label.feature_definition (cohort_id, {', '.join(DEFINITION_COLUMNS)}) FROM STDIN"
    with raw(connection).cursor().copy(statement.encode()) as copy:
        for definition in definitions:
            copy.write_row([cohort_id, *(getattr(definition, name) for name in DEFINITION_COLUMNS)])
    names = [definition.name for definition in definitions]
    rows = encoded(members, names, [columns[name] for name in names])
    copy_in(connection, "label.feature", ("cohort_member_id", "name", "value"), rows)
    connection.execute(
        text("UPDATE label.feature_set SET row_checksum = :checksum WHERE cohort_id = :cohort"),
        values | {"checksum": checksum(connection, cohort_id)},
    )
    connection.execute(text("ANALYZE label.feature"))


def encoded(members: NDArray[np.int64], names: Sequence[str], columns: Sequence[Column]) -> Iterator[bytes]:
    """Rows of label.feature for COPY, member by member: in the order of the table's key."""
    place = np.concatenate([np.zeros(0, np.int64), *(column.place for column in columns)])
    feature = np.repeat(np.arange(len(columns)), [len(column.place) for column in columns])
    value = np.concatenate([np.zeros(0, np.float32), *(column.value for column in columns)])
    spelt = [name.encode() for name in names]
    data = np.frombuffer(b"".join(spelt), np.uint8)
    length = np.array([len(name) for name in spelt], np.int64)
    begin = np.cumsum(length) - length
    order = np.argsort(place, kind="stable")
    for start in range(0, len(order), ROWS_AT_A_TIME):
        rows = order[start : start + ROWS_AT_A_TIME]
        sizes = length[feature[rows]]
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        take = np.arange(int(offsets[-1])) + np.repeat(begin[feature[rows]] - offsets[:-1], sizes)
        yield encode_mixed([Field(members[place[rows]]), Text(data[take], offsets), Field(value[rows])])


_CHECKSUM = """
SELECT coalesce(sum(hash_record_extended(f, 0)), 0)
FROM label.feature f JOIN label.cohort_member m USING (cohort_member_id) WHERE m.cohort_id = :cohort
"""


def checksum(connection: Connection, cohort_id: int) -> Decimal:
    """A number that other rows of label.feature would change."""
    from sqlalchemy import text

    return Decimal(connection.scalar(text(_CHECKSUM), {"cohort": cohort_id}))


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """The features that a cohort has."""

    definition: dict[str, Any]
    digest: bytes
    is_intact: bool
    """False where rows were put in, changed or taken out by others than the stage."""


def stored(connection: Connection, cohort_id: int) -> Stored | None:
    """What a cohort's features were made of; None where it has none."""
    from sqlalchemy import text

    statement = "SELECT definition, digest, row_checksum FROM label.feature_set WHERE cohort_id = :cohort"
    row = connection.execute(text(statement), {"cohort": cohort_id}).one_or_none()
    if row is None:
        return None
    intact = row.row_checksum is not None and row.row_checksum == checksum(connection, cohort_id)
    return Stored(definition=row.definition, digest=bytes(row.digest), is_intact=intact)


_ROWS = """
SELECT f.cohort_member_id, f.name, coalesce(f.value, 'NaN')
FROM label.feature f JOIN label.cohort_member m USING (cohort_member_id) WHERE m.cohort_id = %s ORDER BY 2, 1
"""


def read_columns(connection: Connection, cohort_id: int, members: NDArray[np.int64]) -> dict[str, Column]:
    """Stored features by name, also such as no definition has; `members` (N,) ascending."""
    from app.store.session import raw

    found: dict[str, Column] = {}
    rows = raw(connection).cursor(binary=True).execute(_ROWS, (cohort_id,)).fetchall()
    for name, group in itertools.groupby(rows, key=lambda row: str(row[1])):
        keys, _, values = zip(*group, strict=True)
        place = np.searchsorted(members, np.array(keys, np.int64))
        found[name] = Column(place=place, value=np.array(values, np.float32))
    return found
