"""Rows of tasks that concepts and source codes alone tell: one statement for all of them, however many.

Nothing indexes source concepts, so that a statement reads all rows of a cohort; one a task would read them thousands of
times.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.store.outcomes import CODED, PERSONS, without_resolved
from app.tasks.spec import TaskSpec

Definitions = Mapping[int, dict[str, Any]]
"""Position → definition of a task, with what its codes mean."""

CODES = """
WITH asked (position, concept_id, narrower) AS (
    SELECT * FROM unnest(%(asked_by)s::int2[], %(asked)s::int[], %(narrower)s::bool[])
), source_code (position, concept_id) AS MATERIALIZED (
    SELECT DISTINCT * FROM unnest(%(written_for)s::int2[], %(written)s::int[])
), code AS MATERIALIZED (
    SELECT position, concept_id FROM asked
    UNION
    SELECT a.position, d.descendant_concept_id
    FROM asked a CROSS JOIN LATERAL (  -- by the key, concept for concept, as in app/store/outcomes.py
        SELECT c.descendant_concept_id FROM omop.concept_ancestor c WHERE c.ancestor_concept_id = a.concept_id OFFSET 0
    ) d WHERE a.narrower
)
"""
"""Which concepts and source concepts are those of which tasks, each pair once; further parts of the WITH may follow."""

_MATCHES = """
SELECT {columns}, s.position FROM {rows} JOIN source_code s ON s.concept_id = e.source_concept_id WHERE {condition}
UNION ALL
SELECT {columns}, c.position FROM {rows} JOIN code c ON c.concept_id = e.concept_id
WHERE NOT EXISTS (SELECT FROM source_code s WHERE s.position = c.position AND s.concept_id = e.source_concept_id)
  AND {condition}
"""
"""Each row `e` once a task, also where both its concept and its source concept are the task's."""

_PACKED = "string_agg(int8send({coded}) || int2send(position), '')"
"""Ten bytes a row, the most significant first: a row each takes ten times longer to read."""

MEANING = f"{CODES} SELECT position, concept_id FROM code UNION SELECT position, concept_id FROM source_code"


def split(definitions: Definitions) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, Any]]]:
    """Tasks whose rows concepts and source codes alone tell, and those that ask for more than that."""
    together, apart = dict[int, dict[str, Any]](), dict[int, dict[str, Any]]()
    for position, definition in definitions.items():
        spec = TaskSpec.from_dict(without_resolved(definition))
        asks_more = spec.domains or spec.values or spec.visit_concepts or not spec.by_codes
        (apart if asks_more else together)[position] = definition
    return together, apart


def parameters(definitions: Definitions) -> dict[str, Any]:
    """What the statements of this module are given of tasks."""
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


def matches(columns: str, rows: str, condition: str = "true") -> str:
    """(columns, position) of the rows `e` of omop.event that are a task's, for a statement that begins with CODES."""
    return _MATCHES.format(columns=columns, rows=rows, condition=condition)


def statement() -> str:
    """(person_id, packed coded times and positions) among the persons of `cohort_id`; some perhaps twice."""
    coded = CODED.format(time="time", date_only="date_only")
    rows = f"omop.event e JOIN {PERSONS} m USING (person_id)"
    found = matches("e.person_id, e.time, e.date_only", rows)
    return f"{CODES} SELECT person_id, {_PACKED.format(coded=coded)} FROM ({found}) e GROUP BY person_id"
