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
    UNION
    SELECT s.concept_id::int
    FROM label.task t, jsonb_array_elements_text(t.definition -> 'resolved' -> 'source_concepts') s(concept_id)
    WHERE t.task_set_id = :task_set_id
), narrower AS (
    SELECT concept_id FROM given
    UNION
    SELECT a.descendant_concept_id FROM given g JOIN omop.concept_ancestor a ON a.ancestor_concept_id = g.concept_id
)
SELECT concept_id FROM narrower
UNION
SELECT r.concept_id_1 FROM narrower n JOIN omop.concept_relationship r ON r.concept_id_2 = n.concept_id
WHERE :source_concepts AND r.relationship_id = 'Maps to'
"""


def banned_by(connection: Connection, task_set_id: int, *, source_concepts: bool = False) -> set[int]:
    """The concepts of a task set (also those its source codes map to) and all their descendants.

    With `source_concepts` also those that map to any of these.
    """
    from sqlalchemy import text

    values = {"task_set_id": task_set_id, "source_concepts": source_concepts}
    return set(connection.execute(text(BANNED), values).scalars())
