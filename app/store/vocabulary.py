"""The vocabulary release in the books, which concepts the store uses, and those that it lacks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy import Connection

OWN_CONCEPTS = (4306655, 9201, 262)
"""Death, inpatient visit, emergency and inpatient visit: Lachesis names them itself."""

MAX_UNKNOWN = 0.001
"""Largest share of a source's events whose concept the vocabulary may lack before labels are refused."""

MEANT_FOR = 0.5
"""Without a release, a source counts as having a vocabulary where CONCEPT names at least this share of its events."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """A vocabulary whose files are kept beside the store."""

    vocabulary_release_id: int
    version: str
    is_full: bool
    digest: bytes
    files: Mapping[str, Any]
    """Table → {path, sha256, rows}."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unknown:
    """Events of a source whose concept the vocabulary lacks; concept 0 is none of them."""

    source: str
    unknown: int
    events: int
    """Events with a concept other than 0."""
    has_vocabulary: bool
    """A release was loaded, or the store's CONCEPT names at least half of these events."""

    @property
    def share(self) -> float:
        return self.unknown / self.events if self.events else 0.0


def current_release(connection: Connection) -> Release | None:
    """The vocabulary that completes loads, None where none was loaded."""
    from sqlalchemy import text

    statement = (
        "SELECT vocabulary_release_id, version, is_full, digest, files FROM ops.vocabulary_release WHERE is_current"
    )
    row = connection.execute(text(statement)).mappings().first()
    return None if row is None else Release(**{**row, "digest": bytes(row["digest"])})


def add_release(
    connection: Connection, *, version: str, is_full: bool, digest: bytes, files: Mapping[str, Any], job_id: int | None
) -> Release:
    """Make a vocabulary the current one; nothing counts as looked up in it yet."""
    from sqlalchemy import bindparam, text
    from sqlalchemy.dialects.postgresql import JSONB

    connection.execute(text("UPDATE ops.vocabulary_release SET is_current = false WHERE is_current"))
    connection.execute(text("DELETE FROM omop.concept_completed"))
    statement = text(
        "INSERT INTO ops.vocabulary_release (version, is_current, is_full, digest, files, job_id) "
        "VALUES (:version, true, :is_full, :digest, :files, :job_id) RETURNING vocabulary_release_id"
    ).bindparams(bindparam("files", type_=JSONB))
    row = {"version": version, "is_full": is_full, "digest": digest, "files": dict(files), "job_id": job_id}
    key = int(connection.execute(statement, row).scalar_one())
    return Release(vocabulary_release_id=key, version=version, is_full=is_full, digest=digest, files=files)


_IN_USE = """
SELECT concept_id FROM omop.concept_count
UNION SELECT gender_concept_id FROM omop.person
UNION SELECT race_concept_id FROM omop.person
UNION SELECT ethnicity_concept_id FROM omop.person
UNION SELECT discharged_to_concept_id FROM omop.visit_occurrence WHERE discharged_to_concept_id IS NOT NULL
UNION SELECT jsonb_array_elements_text(t.definition -> 'resolved' -> 'concepts')::int FROM label.task t
      WHERE t.definition -> 'resolved' ? 'concepts'
UNION SELECT unnest(CAST(:own AS int[]))
EXCEPT SELECT concept_id FROM omop.concept_completed
EXCEPT SELECT 0
"""


def to_complete(connection: Connection) -> list[int]:
    """Concepts that events, values, units, persons, visits or tasks name, not looked up in the release yet."""
    from sqlalchemy import text

    return sorted(connection.execute(text(_IN_USE), {"own": list(OWN_CONCEPTS)}).scalars())


def mark_completed(connection: Connection, concepts: Collection[int]) -> None:
    """Keep that these concepts were looked up, found or not."""
    from sqlalchemy import text

    statement = "INSERT INTO omop.concept_completed SELECT unnest(CAST(:ids AS int[])) ON CONFLICT DO NOTHING"
    connection.execute(text(statement), {"ids": sorted(concepts)})


_UNKNOWN = """
SELECT s.name AS source,
       coalesce(sum(c.num_events) FILTER (WHERE k.concept_id IS NULL AND c.concept_id <> ALL (:own)), 0)::bigint
           AS unknown,
       coalesce(sum(c.num_events), 0)::bigint AS events
FROM omop.concept_count c
JOIN ops.source s USING (source_id)
LEFT JOIN omop.concept k ON k.concept_id = c.concept_id
WHERE c.concept_id <> 0 AND c.source_id IN (
    SELECT DISTINCT l.source_id FROM ops.load l WHERE l.load_id IN (
        SELECT p.load_id FROM label.cohort_member m JOIN omop.person p USING (person_id)
        WHERE m.cohort_id = :cohort_id))
GROUP BY 1 ORDER BY 1
"""


def unknown_of_cohort(connection: Connection, cohort_id: int) -> list[Unknown]:
    """For each source of a cohort's persons: events whose concept is not in the vocabulary."""
    from sqlalchemy import text

    released = current_release(connection) is not None
    rows = connection.execute(text(_UNKNOWN), {"cohort_id": cohort_id, "own": list(OWN_CONCEPTS)})
    return [
        Unknown(
            source=row.source,
            unknown=row.unknown,
            events=row.events,
            has_vocabulary=released or row.events - row.unknown >= MEANT_FOR * row.events,
        )
        for row in rows
    ]


# One pass over each table of a source; its loads not yet attached to omop.event are read by their own names.
_COUNT = """
INSERT INTO omop.concept_count (source_id, concept_id, num_events, num_persons, num_source_events, num_value_events)
WITH e AS NOT MATERIALIZED ({events})
SELECT :source_id, concept_id, sum(events), sum(persons), sum(source_events), sum(value_events)
FROM (
    SELECT concept_id, sum(n) AS events, count(*) AS persons, 0 AS source_events, 0 AS value_events
    FROM (SELECT concept_id, person_id, count(*) AS n FROM e GROUP BY 1, 2) p GROUP BY 1
    UNION ALL
    SELECT source_concept_id, 0, 0, count(*), 0 FROM e GROUP BY 1
    UNION ALL
    SELECT value_as_concept_id, 0, 0, 0, count(*) FROM e WHERE value_as_concept_id IS NOT NULL GROUP BY 1
    UNION ALL
    SELECT unit_concept_id, 0, 0, 0, count(*) FROM e WHERE unit_concept_id IS NOT NULL GROUP BY 1
) c GROUP BY 2
"""


def recount(connection: Connection, source_id: int) -> None:
    """Count the concepts of a source anew from the events that it shows."""
    from sqlalchemy import text

    forget_counts(connection, source_id)
    parts = connection.execute(
        text(
            "SELECT DISTINCT partition_name FROM ops.load "
            "WHERE source_id = :source AND state = 'published' AND partition_name IS NOT NULL ORDER BY 1"
        ),
        {"source": source_id},
    ).scalars()
    columns = "person_id, concept_id, source_concept_id, value_as_concept_id, unit_concept_id"
    events = " UNION ALL ".join(f"SELECT {columns} FROM {part}" for part in parts)
    if events:
        connection.execute(text("SET LOCAL work_mem = '256MB'"))
        connection.execute(text(_COUNT.replace("{events}", events)), {"source_id": source_id})
        connection.execute(text("RESET work_mem"))


def forget_counts(connection: Connection, source_id: int) -> None:
    """Delete the counts of a source."""
    from sqlalchemy import text

    connection.execute(text("DELETE FROM omop.concept_count WHERE source_id = :source"), {"source": source_id})


def replace_vocabularies(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Keep VOCABULARY as the newest release has it."""
    from sqlalchemy import insert, text

    from app.schema.omop import Vocabulary

    connection.execute(text("DELETE FROM omop.vocabulary"))
    if rows:
        connection.execute(insert(Vocabulary), list(rows))
