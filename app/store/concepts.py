"""Searching the vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy import Connection

# The inner query bounds the concepts before events are counted, so that the cost does not grow with the vocabulary.
_SEARCH = """
WITH hit AS (
    SELECT DISTINCT c.concept_id, c.concept_name, c.vocabulary_id, c.concept_code, c.standard_concept
    FROM omop.concept c LEFT JOIN omop.concept_synonym s USING (concept_id)
    WHERE c.concept_name ILIKE :like OR s.concept_synonym_name ILIKE :like
       OR c.concept_code = :words OR c.concept_id::text = :words
    ORDER BY c.standard_concept NULLS LAST, c.concept_name LIMIT :wide
)
SELECT h.*,
    (SELECT count(*) FROM omop.event e WHERE e.concept_id = h.concept_id) AS events,
    (SELECT count(DISTINCT e.person_id) FROM omop.event e WHERE e.concept_id = h.concept_id) AS persons,
    (SELECT count(DISTINCT e.person_id)
     FROM omop.concept_ancestor a JOIN omop.event e ON e.concept_id = a.descendant_concept_id
     WHERE a.ancestor_concept_id = h.concept_id) AS persons_with_descendants
FROM hit h ORDER BY persons_with_descendants DESC, persons DESC, h.concept_name LIMIT :limit
"""


def search(connection: Connection, words: str, limit: int) -> list[dict[str, Any]]:
    """Concepts whose name or synonym holds `words`, or whose code or id is it, most used first."""
    from sqlalchemy import text

    like = "%" + words.replace("\\", "\\\\").replace("%", r"\%").replace("_", r"\_") + "%"
    rows = connection.execute(text(_SEARCH), {"like": like, "words": words, "limit": limit, "wide": 5 * limit})
    return [dict(row) for row in rows.mappings()]
