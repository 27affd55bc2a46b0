"""Which concepts become pretraining tasks: those that tell most beyond their rarest parent (docs/science.md, 2)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy import Connection

MIN_EVENTS, MIN_EVENT_SHARE = 10, 1000
"""A task needs events after an index in at least 10, and in at least one in 1,000, of the train persons."""

PERSONS = """
SELECT count(DISTINCT person_id) FROM label.cohort_member WHERE cohort_id = :cohort_id AND split = 'train' AND eligible
"""

COUNTS = """
WITH scan AS MATERIALIZED (
    SELECT person_id, index_time, follow_up_end FROM label.cohort_member
    WHERE cohort_id = :cohort_id AND split = 'train' AND eligible
), had AS MATERIALIZED (
    SELECT e.person_id, e.concept_id, bool_or(e.time > s.index_time AND e.time <= s.follow_up_end) AS after
    FROM scan s JOIN omop.event e USING (person_id) WHERE e.concept_id <> 0 GROUP BY 1, 2
), seen AS MATERIALIZED (
    SELECT DISTINCT concept_id FROM had
), up AS MATERIALIZED (
    SELECT concept_id AS descendant, concept_id AS ancestor FROM seen
    UNION
    SELECT a.descendant_concept_id, a.ancestor_concept_id
    FROM seen JOIN omop.concept_ancestor a ON a.descendant_concept_id = seen.concept_id
    WHERE a.ancestor_concept_id <> 0
), f AS MATERIALIZED (
    SELECT ancestor AS concept_id, count(*) AS persons, count(*) FILTER (WHERE after) AS events
    FROM (
        SELECT up.ancestor, had.person_id, bool_or(had.after) AS after
        FROM had JOIN up ON up.descendant = had.concept_id GROUP BY 1, 2
    ) p GROUP BY 1
)
SELECT f.concept_id, f.persons, f.events,
       least(min(coalesce(parent.persons, 0)) FILTER (WHERE a.ancestor_concept_id IS NOT NULL), :persons) AS base
FROM f
LEFT JOIN omop.concept_ancestor a ON a.descendant_concept_id = f.concept_id AND a.min_levels_of_separation = 1
     AND a.ancestor_concept_id <> 0
LEFT JOIN f parent ON parent.concept_id = a.ancestor_concept_id
GROUP BY 1, 2, 3
"""
"""Persons who ever have a concept or a descendant, those who have it after an index, and the rarest parent's count.

Ancestors of real vocabularies are not always transitive (a combined drug lacks the classes of its ingredients): nobody
may have a parent of a concept that some have. It then counts 0, and the concept is as certain as under any parent that
is rarer than itself.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A concept weighed as a task."""

    concept_id: int
    rank: int
    persons: int
    base_persons: int
    entropy: float
    num_train_events: int
    verdict: str
    """chosen, too_few_events, beyond_size or banned."""


def weigh(
    counts: Iterable[tuple[int, int, int, int]], persons: int, size: int, banned: Collection[int] = ()
) -> list[Candidate]:
    """All concepts that carry information, most informative first; the first `size` that may be are chosen.

    Args:
        counts: (concept, persons, persons with an event after an index, persons of its rarest parent), each once.
        persons: train persons.
        size: how many tasks are wanted.
        banned: concepts that may not be chosen.
    """
    scored = [(score(n, base, persons), concept, n, events, base) for concept, n, events, base in counts if n < base]
    result, chosen = list[Candidate](), 0
    for rank, (entropy, concept, n, events, base) in enumerate(sorted(scored), 1):
        if concept in banned:
            verdict = "banned"
        elif events < MIN_EVENTS or events * MIN_EVENT_SHARE < persons:
            verdict = "too_few_events"
        elif chosen == size:
            verdict = "beyond_size"
        else:
            verdict, chosen = "chosen", chosen + 1
        result.append(
            Candidate(
                concept_id=concept,
                rank=rank,
                persons=n,
                base_persons=base,
                entropy=entropy,
                num_train_events=events,
                verdict=verdict,
            )
        )
    return result


def score(n: int, base: int, persons: int) -> float:
    """Minus the entropy of a concept given its rarest parent, weighted by that parent's share: b (q ln q + r ln r).

    b = base / persons, q = n / base, r = 1 - q; 0 < n < base.
    """
    q = n / base
    return base / persons * (q * math.log(q) + (1 - q) * math.log(1 - q))


def count(connection: Connection, cohort_id: int) -> tuple[list[tuple[int, int, int, int]], int]:
    """Counts for `weigh` over the train persons of a cohort with an eligible scan, and how many they are."""
    from sqlalchemy import text

    persons = int(connection.execute(text(PERSONS), {"cohort_id": cohort_id}).scalar_one())
    connection.execute(text("SET LOCAL work_mem = '256MB'"))
    rows = connection.execute(text(COUNTS), {"cohort_id": cohort_id, "persons": persons})
    return [(row.concept_id, row.persons, row.events, row.base) for row in rows], persons


BANNED = """
WITH given AS (
    SELECT jsonb_array_elements_text(coalesce(
               t.definition -> 'resolved' -> 'concepts', '[]') || coalesce(t.definition -> 'visit_concepts', '[]')
           )::int AS concept_id
    FROM label.task t WHERE t.task_set_id = :task_set_id
    UNION
    SELECT r.concept_id_2
    FROM label.task t, jsonb_array_elements_text(t.definition -> 'resolved' -> 'source_concepts') s(concept_id)
    JOIN omop.concept_relationship r ON r.concept_id_1 = s.concept_id::int AND r.relationship_id = 'Maps to'
    WHERE t.task_set_id = :task_set_id
)
SELECT concept_id FROM given
UNION
SELECT a.descendant_concept_id FROM given g JOIN omop.concept_ancestor a ON a.ancestor_concept_id = g.concept_id
"""


def banned_by(connection: Connection, task_set_id: int) -> set[int]:
    """The concepts of a task set (also those its source codes map to) and all their descendants."""
    from sqlalchemy import text

    return set(connection.execute(text(BANNED), {"task_set_id": task_set_id}).scalars())
