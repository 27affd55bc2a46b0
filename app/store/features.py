"""Features in the store: what one statement over omop.event tells, and the rows of label.feature."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from app.store.outcomes import CODED, holding

if TYPE_CHECKING:
    from sqlalchemy import Connection

BEFORE = """
CASE WHEN e.date_only OR m.index_date_only THEN e.time < date_trunc('day', m.index_time) ELSE e.time < m.index_time END
"""
"""Features look back: where an event or the index has only a day, an earlier day."""

_HOLDS = holding(
    "v.visit_start_datetime",
    "v.date_only",
    "coalesce(v.visit_end_datetime, v.visit_start_datetime)",
    "v.end_date_only",
)

LOOK_BACK = f"""
WITH member AS MATERIALIZED (SELECT * FROM label.cohort_member WHERE cohort_id = %(cohort_id)s),
open AS MATERIALIZED (
    SELECT m.cohort_member_id, m.person_id, m.index_time, m.index_date_only, v.visit_occurrence_id, v.visit_concept_id,
           extract(epoch FROM m.index_time - v.visit_start_datetime)::float8 / 86400 AS days
    FROM member m JOIN omop.visit_occurrence v USING (person_id)
    WHERE v.visit_start_datetime < m.index_time
      AND {_HOLDS}
), measured AS MATERIALIZED (
    SELECT m.cohort_member_id, m.person_id, m.split, m.index_time, e.concept_id, coalesce(e.unit_concept_id, 0) AS unit,
           e.time, e.value_as_number AS value, e.source_row_id
    FROM member m JOIN omop.event e USING (person_id)
    WHERE %(values)s > 0 AND e.value_as_number IS NOT NULL AND e.concept_id <> 0 AND {BEFORE}
), pair AS (
    SELECT concept_id, unit FROM measured WHERE split = 'train'
    GROUP BY 1, 2 ORDER BY count(DISTINCT person_id) DESC, 1, 2 LIMIT %(values)s
)
SELECT 'open', cohort_member_id, 0::int8, visit_concept_id, 0, days::float8 FROM open
UNION ALL
SELECT 'hidden', m.cohort_member_id, {CODED.format(time="e.time", date_only="e.date_only")}, e.concept_id, 0, 0::float8
FROM open m JOIN omop.event e USING (person_id, visit_occurrence_id) WHERE e.domain = 'c' AND {BEFORE}
UNION ALL
SELECT 'value', cohort_member_id, floor(extract(epoch FROM index_time - time))::int8, concept_id, unit, value::float8
FROM (
    SELECT DISTINCT ON (cohort_member_id, concept_id, unit) *
    FROM measured JOIN pair USING (concept_id, unit)
    ORDER BY cohort_member_id, concept_id, unit, time DESC, source_row_id DESC
) l
"""
"""Visits open at the index; conditions of these visits, which are not features; last values of what is measured most.

Columns: what, cohort_member_id, time (of hidden ones coded as in timelines, of values seconds before the index),
concept, unit, number (days since the start of the visit, or the value).
"""


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


def digest_of(
    cohort: bytes, definitions: Sequence[Definition], values: Mapping[str, Sequence[tuple[int, float]]]
) -> bytes:
    """sha256 of a cohort's features, name by name."""
    digest = hashlib.sha256(cohort)
    for definition in definitions:
        digest.update(json.dumps(asdict(definition), sort_keys=True).encode())
        digest.update(repr([(place, float(value)) for place, value in values[definition.name]]).encode())
    return digest.digest()


def replace(
    connection: Connection,
    cohort_id: int,
    definitions: Sequence[Definition],
    rows: Iterable[tuple[int, str, float]],
    digest: bytes,
    asked: Mapping[str, Any],
    job_id: int | None,
) -> None:
    """Put features in place of a cohort's earlier ones; `rows` are (cohort_member_id, name, value)."""
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
    names = ("name", "kind", "description", "window_days", "concept_id", "unit_concept_id", "absent_is_zero")
    with (
        raw(connection).cursor().copy(f"COPY label.feature_definition (cohort_id, {', '.join(names)}) FROM STDIN") as c
    ):
        for definition in definitions:
            c.write_row([cohort_id, *(getattr(definition, name) for name in names)])
    with raw(connection).cursor().copy("COPY label.feature (cohort_member_id, name, value) FROM STDIN") as c:
        for row in rows:
            c.write_row(row)
    connection.execute(text("ANALYZE label.feature"))


def current_digest(connection: Connection, cohort_id: int) -> bytes | None:
    """Digest of the features that a cohort has, None where it has none."""
    from sqlalchemy import text

    found = connection.scalar(text("SELECT digest FROM label.feature_set WHERE cohort_id = :id"), {"id": cohort_id})
    return None if found is None else bytes(found)
