"""Searching the vocabulary, and listing what it lacks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy import Connection

MOST_HITS = 20_000
"""Names looked at in each table: words that more names hold tell nothing."""
MOST_SCANNED = 300_000
"""Up to so many concepts, parts inside words are looked for where no word begins with them."""
MOST_COUNTED = 5_000_000
"""Up to so many events, the persons of a concept with its descendants are counted, else left empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Filter:
    """Which concepts are wanted; None is any."""

    standard: bool = False
    domain: str | None = None
    vocabulary: str | None = None


_FILTER = """
(NOT :standard OR c.standard_concept = 'S')
AND (CAST(:domain AS text) IS NULL OR lower(c.domain_id) = lower(:domain))
AND (CAST(:vocabulary AS text) IS NULL OR lower(c.vocabulary_id) = lower(:vocabulary))
"""

_BY_CODE = """
    SELECT c.concept_id, 0 AS rank FROM omop.concept c WHERE c.concept_id = :id
    UNION ALL
    SELECT c.concept_id, 1 FROM omop.concept c WHERE lower(c.concept_code) = lower(:words)
    UNION ALL
    SELECT concept_id, 2 FROM (
        SELECT c.concept_id FROM omop.concept c WHERE lower(c.concept_code) LIKE :code_like LIMIT :most) s
"""

_BY_WORD = """
    UNION ALL
    SELECT concept_id, 3 FROM (
        SELECT c.concept_id FROM omop.concept c
        WHERE omop.search_words(c.concept_name) @@ CAST(:query AS tsquery) LIMIT :most) s
    UNION ALL
    SELECT concept_id, 4 FROM (
        SELECT s.concept_id FROM omop.concept_synonym s
        WHERE omop.search_words(s.concept_synonym_name) @@ CAST(:query AS tsquery) LIMIT :most) s
"""

_BY_PART = """
    UNION ALL
    SELECT c.concept_id, 5 FROM omop.concept c WHERE c.concept_name ILIKE ALL (CAST(:parts AS text[]))
    UNION ALL
    SELECT s.concept_id, 6 FROM omop.concept_synonym s
    WHERE s.concept_synonym_name ILIKE ALL (CAST(:parts AS text[]))
"""

_SEARCH = f"""
WITH hit AS MATERIALIZED (
    SELECT h.concept_id, min(h.rank) AS rank FROM ({{hits}}) h GROUP BY 1
), found AS MATERIALIZED (
    SELECT c.*, h.rank, own.events, own.persons, own.source_events,
           greatest(own.events, (
               SELECT coalesce(sum(d.num_events), 0)
               FROM omop.concept_ancestor a JOIN omop.concept_count d ON d.concept_id = a.descendant_concept_id
               WHERE a.ancestor_concept_id = c.concept_id AND EXISTS (SELECT FROM omop.concept_count))
           ) AS events_with_descendants
    FROM hit h JOIN omop.concept c USING (concept_id)
    CROSS JOIN LATERAL (
        SELECT coalesce(sum(n.num_events), 0) AS events, coalesce(sum(n.num_persons), 0) AS persons,
               coalesce(sum(n.num_source_events), 0) AS source_events
        FROM omop.concept_count n WHERE n.concept_id = c.concept_id) own
    WHERE {_FILTER}
)
SELECT f.concept_id, f.concept_name, f.domain_id, f.vocabulary_id, f.concept_code, f.standard_concept,
       f.invalid_reason, f.persons::bigint, f.events::bigint, f.source_events::bigint,
       f.events_with_descendants::bigint,
       (SELECT string_agg(m.concept_id || ' ' || m.concept_name, '; ' ORDER BY m.concept_id)
        FROM omop.concept_relationship r JOIN omop.concept m ON m.concept_id = r.concept_id_2
        WHERE r.concept_id_1 = f.concept_id AND r.relationship_id = 'Maps to' AND r.invalid_reason IS NULL
          AND r.concept_id_2 <> f.concept_id) AS maps_to
FROM found f
ORDER BY least(f.rank, 3), f.events_with_descendants DESC, f.source_events DESC, f.rank,
         f.standard_concept NULLS LAST, length(f.concept_name), f.concept_id
LIMIT :limit
"""

_PERSONS = """
SELECT q.id, count(DISTINCT e.person_id) AS persons
FROM unnest(CAST(:ids AS int[])) q(id)
CROSS JOIN LATERAL (
    SELECT q.id AS concept_id
    UNION SELECT a.descendant_concept_id
    FROM omop.concept_ancestor a JOIN omop.concept_count n ON n.concept_id = a.descendant_concept_id
    WHERE a.ancestor_concept_id = q.id) d
JOIN omop.event e ON e.concept_id = d.concept_id
GROUP BY 1
"""

_UNKNOWN = """
SELECT n.concept_id, s.name AS source, n.num_persons AS persons, n.num_events AS events,
       n.num_source_events AS source_events, n.num_value_events AS value_events
FROM omop.concept_count n JOIN ops.source s USING (source_id)
WHERE n.concept_id <> 0 AND NOT EXISTS (SELECT FROM omop.concept c WHERE c.concept_id = n.concept_id)
ORDER BY n.num_events DESC, n.num_source_events DESC, n.num_value_events DESC, n.concept_id LIMIT :limit
"""


def search(connection: Connection, words: str, limit: int, wanted: Filter = Filter()) -> list[dict[str, Any]]:
    """Concepts by id, code, or words of their names and synonyms; exact ids and codes first, then the most used.

    Every word must begin a word of one name, in any case. Where nothing does and the vocabulary is small, parts inside
    words count, too. `persons` and `events` are those with this concept_id, `source_events` those with this
    source_concept_id; `persons_with_descendants` is None where over 5 million events would have to be looked at.
    """
    from sqlalchemy import text

    words = words.strip()
    digits = re.fullmatch(r"\d{1,10}", words)
    values = {
        "id": int(words) if digits and int(words) < 1 << 31 else None,
        "words": words,
        "code_like": _escaped(words.lower()) + "%",
        "query": _query(words),
        "parts": [f"%{_escaped(word)}%" for word in words.split()],
        "standard": wanted.standard,
        "domain": wanted.domain,
        "vocabulary": wanted.vocabulary,
        "most": MOST_HITS,
        "limit": limit,
    }
    hits = _BY_CODE + (_BY_WORD if values["query"] else "")
    rows = _rows(connection, hits, values)
    if not rows and values["parts"]:
        held = connection.scalar(text("SELECT reltuples FROM pg_class WHERE oid = 'omop.concept'::regclass"))
        if held <= MOST_SCANNED:
            rows = _rows(connection, _BY_CODE + _BY_PART, values)
    return with_persons(connection, rows)


def _rows(connection: Connection, hits: str, values: dict[str, Any]) -> list[dict[str, Any]]:
    from sqlalchemy import text

    statement = text(_SEARCH.replace("{hits}", hits))
    return [dict(row) for row in connection.execute(statement, values).mappings()]


def with_persons(connection: Connection, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `persons_with_descendants` beside `persons`."""
    from sqlalchemy import text

    left, ids = MOST_COUNTED, []
    for row in rows:
        if row["events"] < row["events_with_descendants"] <= left:
            left -= row["events_with_descendants"]
            ids.append(row["concept_id"])
    persons: dict[int, int] = {}
    if ids:
        persons = {row.id: row.persons for row in connection.execute(text(_PERSONS), {"ids": ids})}
    made = []
    for row in rows:
        alone = row["events"] == row["events_with_descendants"]
        count = row["persons"] if alone else persons.get(row["concept_id"])
        made.append(
            {
                **{key: row[key] for key in list(row)[:7]},
                "persons": row["persons"],
                "persons_with_descendants": count,
                "events": row["events"],
                "events_with_descendants": row["events_with_descendants"],
                "source_events": row["source_events"],
                "maps_to": row["maps_to"],
            }
        )
    return made


def unknown(connection: Connection, limit: int) -> list[dict[str, Any]]:
    """Concepts that a source's events name and the vocabulary lacks, the most used first; concept 0 is none."""
    from sqlalchemy import text

    return [dict(row) for row in connection.execute(text(_UNKNOWN), {"limit": limit}).mappings()]


def _escaped(words: str) -> str:
    """Text as it stands in a LIKE pattern."""
    return words.replace("\\", "\\\\").replace("%", r"\%").replace("_", r"\_")


def _query(words: str) -> str:
    """Words as a tsquery, each the beginning of a word; empty where there is none."""
    return " & ".join(f"'{word}':*" for word in re.findall(r"[^\W_]+", words.lower()))
