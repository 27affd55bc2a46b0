"""Rows of tasks that concepts and source codes alone tell: one statement for all of them, however many.

Nothing indexes source concepts, so that a statement reads all rows of a cohort; one a task would read them thousands of
times. Which tasks a row is of its reader finds: arrays do that quicker than a join whose sizes the planner cannot know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.store.outcomes import CODED, PERSONS

Definitions = Mapping[int, dict[str, Any]]
"""Position → definition of a task, with what its codes mean."""

CODES = """
WITH asked (position, concept_id, narrower) AS (
    SELECT * FROM unnest(%(asked_by)s::int2[], %(asked)s::int[], %(narrower)s::bool[])
)
SELECT position, concept_id, false FROM asked
UNION
SELECT a.position, d.descendant_concept_id, false
FROM asked a CROSS JOIN LATERAL (  -- by the key, concept for concept, as in app/store/outcomes.py
    SELECT c.descendant_concept_id FROM omop.concept_ancestor c WHERE c.ancestor_concept_id = a.concept_id OFFSET 0
) d WHERE a.narrower
UNION
SELECT position, concept_id, true FROM unnest(%(written_for)s::int2[], %(written)s::int[]) w(position, concept_id)
"""
"""(position, concept, whether as the source wrote it), each once."""

IS_ASKED = "(e.source_concept_id = ANY (%(written)s::int[]) OR e.concept_id = ANY (%(concepts)s::int[]))"
"""Whether a row `e` of omop.event is one of any task, by the concepts of CODES."""

_CODED = CODED.format(time="e.time", date_only="e.date_only")
PACKED = f"string_agg(int8send({_CODED}) || int4send(e.concept_id) || int4send(e.source_concept_id), '')"
"""Coded time, concept and source concept of rows, 16 bytes each, the most significant first: a row each takes ten times
longer to read."""

ROWS = f"""
SELECT e.person_id, {PACKED} FROM omop.event e JOIN {PERSONS} m USING (person_id) WHERE {IS_ASKED}
GROUP BY e.person_id ORDER BY e.person_id
"""
"""(person_id, packed rows) of the persons of `cohort_id`, ascending."""


BY_CODES = ("concepts", "vocabulary_codes", "source_codes", "concept_set")
ASKS_MORE = ("domains", "values", "visit_concepts")


def split(definitions: Definitions) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, Any]]]:
    """Tasks whose rows concepts and source codes alone tell, and those that ask for more than that."""
    together, apart = dict[int, dict[str, Any]](), dict[int, dict[str, Any]]()
    for position, definition in definitions.items():  # by the fields themselves: a TaskSpec each takes longer than rows
        by_codes = any(map(definition.get, BY_CODES)) and not any(map(definition.get, ASKS_MORE))
        (together if by_codes else apart)[position] = definition
    return together, apart


def parameters(definitions: Definitions) -> dict[str, Any]:
    """What CODES is given of tasks."""
    values: dict[str, list[Any]] = {name: [] for name in ("asked_by", "asked", "narrower", "written_for", "written")}
    for position, definition in definitions.items():
        resolved = definition["resolved"]
        concepts, written = resolved["concepts"], resolved["source_concepts"]
        values["asked_by"] += [position] * len(concepts)
        values["asked"] += concepts
        values["narrower"] += [resolved.get("descendants", definition["descendants"])] * len(concepts)
        values["written_for"] += [position] * len(written)
        values["written"] += written
    return values
