"""From the codes of a task file to concepts of the vocabulary in the store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from app.errors import InputError
from app.tasks.concept_set import ConceptSetItem
from app.tasks.spec import ANY_UNIT, DEATH, TaskSpec

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from app.settings import Settings

INPATIENT, EMERGENCY_AND_INPATIENT = 9201, 262
OWN_CONCEPTS = {DEATH, INPATIENT, EMERGENCY_AND_INPATIENT}
"""Concepts that Lachesis names itself; they need no vocabulary."""

_BY_CODE = """
SELECT c.vocabulary_id || '/' || c.concept_code AS code, c.concept_id, c.standard_concept
FROM omop.concept c WHERE (c.vocabulary_id, c.concept_code) IN (
    SELECT split_part(code, '/', 1), substr(code, strpos(code, '/') + 1) FROM unnest(CAST(:codes AS text[])) code)
"""

_MAPS_TO = """
SELECT DISTINCT concept_id_2 FROM omop.concept_relationship
WHERE concept_id_1 = ANY (CAST(:ids AS int[])) AND relationship_id = 'Maps to' AND concept_id_2 <> 0
"""

_ENUMERATED = """
WITH item AS (
    SELECT * FROM unnest(CAST(:concepts AS int[]), CAST(:descendants AS bool[]), CAST(:mapped AS bool[]))
                  i(concept_id, descendants, mapped)
), named AS (
    SELECT concept_id, mapped FROM item
    UNION
    SELECT a.descendant_concept_id, i.mapped
    FROM item i
    JOIN omop.concept_ancestor a ON a.ancestor_concept_id = i.concept_id
    LEFT JOIN omop.concept c ON c.concept_id = a.descendant_concept_id
    WHERE i.descendants AND (:withdrawn OR c.invalid_reason IS NULL)
)
SELECT concept_id FROM named
UNION
SELECT r.concept_id_1 FROM named n
JOIN omop.concept_relationship r ON r.concept_id_2 = n.concept_id AND r.relationship_id = 'Maps to'
WHERE n.mapped AND r.invalid_reason IS NULL
"""
"""Concepts of items, as OHDSI's cohort generator reads a concept set: invalid descendants and mappings do not count."""

_KNOWN = """
SELECT id FROM unnest(CAST(:ids AS int[])) id
WHERE EXISTS (SELECT 1 FROM omop.concept c WHERE c.concept_id = id)
   OR EXISTS (SELECT 1 FROM omop.concept_ancestor a WHERE a.ancestor_concept_id = id)
   OR EXISTS (SELECT 1 FROM omop.event e WHERE e.concept_id = id)
   OR EXISTS (SELECT 1 FROM omop.visit_occurrence v WHERE v.visit_concept_id = id)
"""


@dataclass(slots=True)
class Resolved:
    """What a task's codes mean in this store; kept with the task, so that labels need not look it up again."""

    concepts: list[int] = field(default_factory=list)
    source_concepts: list[int] = field(default_factory=list)
    units: list[int | None] = field(default_factory=list)
    """Unit of each value rule."""
    absent: list[str] = field(default_factory=list)
    """Codes that the vocabulary does not have."""
    enumerated: bool = False
    """True where `concepts` are all there are, their descendants among them."""

    def to_dict(self, spec: TaskSpec) -> dict[str, Any]:
        """As kept in label.task.definition."""
        return {
            "concepts": sorted(set(self.concepts)),
            "source_concepts": sorted(set(self.source_concepts)),
            "units": self.units,
            "absent": self.absent,
            "by_statement": spec.by_statement,
            **({"descendants": False} if self.enumerated else {}),
        }


def resolve(
    connection: Connection, specs: Sequence[TaskSpec], *, allow_absent: bool, settings: Settings | None = None
) -> list[dict[str, Any]]:
    """What the codes of tasks mean, one record a task.

    Codes that no row uses are looked up in the vocabulary that is kept beside the store, which `settings` find.

    Raises:
        InputError: codes are not in the vocabulary (unless allow_absent: those tasks then lack them).
    """
    words = Words(
        known=known_concepts(connection, [c for spec in specs for c in ids_of(spec)]),
        by_code=by_code(connection, {code for spec in specs for code in codes_of(spec)}),
    )
    if settings is not None:
        words = words_of_release(connection, settings, specs, words)
    found = [resolve_one(connection, spec, words) for spec in specs]
    absent = [f"{code} (task {spec.name})" for spec, r in zip(specs, found, strict=True) for code in r.absent]
    if absent and not allow_absent:
        more = f" and {len(absent) - 10} more" if len(absent) > 10 else ""
        raise InputError(
            f"Expected the tasks' codes in the vocabulary of this store, not found: {', '.join(absent[:10])}{more}; "
            "load a vocabulary that has them, or leave these tasks out."
        )
    return [r.to_dict(spec) for spec, r in zip(specs, found, strict=True)]


@dataclass(frozen=True, slots=True)
class Words:
    """What the store says about the codes of all tasks, asked once."""

    known: set[int]
    by_code: dict[str, list[tuple[int, str | None]]]
    """Code → its concepts, each with its `standard_concept`."""
    maps_to: dict[int, list[int]] = field(default_factory=dict)
    """What concepts map to of which only the kept vocabulary knows."""


def words_of_release(connection: Connection, settings: Settings, specs: Sequence[TaskSpec], words: Words) -> Words:
    """The words, with what the kept vocabulary says of those that the store lacks."""
    from app.store.released_words import look_up

    ids = {c for spec in specs for c in ids_of(spec)} - words.known
    codes = {code for spec in specs for code in codes_of(spec)} - words.by_code.keys()
    more = look_up(connection, settings, ids, codes)
    return Words(known=words.known | more.known, by_code=words.by_code | more.by_code, maps_to=more.maps_to)


def codes_of(spec: TaskSpec) -> list[str]:
    """Every VOCABULARY/CODE that a task names."""
    units = [rule.unit for rule in spec.values if isinstance(rule.unit, str) and rule.unit != ANY_UNIT]
    return [*spec.vocabulary_codes, *spec.exclude_vocabulary_codes, *spec.source_codes, *units]


def ids_of(spec: TaskSpec) -> list[int]:
    """Every concept that a task names by its id and that must be known; what is excluded need not be."""
    return [*spec.concepts, *spec.visit_concepts, *(i.concept_id for i in spec.concept_set if not i.excluded)]


def resolve_one(connection: Connection, spec: TaskSpec, words: Words) -> Resolved:
    """What the codes of one task mean."""
    ids, codes = ids_of(spec), codes_of(spec)
    result = Resolved(absent=[str(c) for c in ids if c not in words.known])
    result.absent += [code for code in codes if code not in words.by_code]
    result.concepts = [c for c in spec.concepts if c in words.known]
    named = [row for code in spec.vocabulary_codes for row in words.by_code.get(code, [])]
    result.concepts += standard(connection, named, words)
    result.source_concepts = [c for code in spec.source_codes for c, _ in words.by_code.get(code, [])]
    for rule in spec.values:
        unit = None if rule.unit == ANY_UNIT else rule.unit
        if isinstance(unit, str):
            unit = words.by_code[unit][0][0] if unit in words.by_code else -1  # -1: no row has it
        result.units.append(unit)
    if spec.enumerated:
        result.concepts, result.enumerated = enumerate_concepts(connection, spec, result.concepts, words), True
        if not result.concepts and not result.absent:
            raise InputError(f"Expected concepts that are left for the task {spec.name}, found all of them excluded.")
    return result


def enumerate_concepts(connection: Connection, spec: TaskSpec, named: Sequence[int], words: Words) -> list[int]:
    """All concepts of a task one by one: what it names, less what it excludes."""
    excluded = [row for code in spec.exclude_vocabulary_codes for row in words.by_code.get(code, [])]
    away = [*spec.exclude_concepts, *standard(connection, excluded, words)]
    plain = [ConceptSetItem(concept_id=c, descendants=spec.descendants) for c in named]
    plain += [ConceptSetItem(concept_id=c, descendants=spec.descendants, excluded=True) for c in away]
    of_set = [i for i in spec.concept_set if i.excluded or i.concept_id in words.known]

    def concepts(*, excluded: bool) -> set[int]:
        found = _of_items(connection, [i for i in plain if i.excluded == excluded], withdrawn=True)
        return found | _of_items(connection, [i for i in of_set if i.excluded == excluded], withdrawn=False)

    return sorted(concepts(excluded=False) - concepts(excluded=True))


def _of_items(connection: Connection, items: Sequence[ConceptSetItem], *, withdrawn: bool) -> set[int]:
    """Concepts of items; `withdrawn`: descendants that are no longer valid are among them."""
    from sqlalchemy import text

    values = {
        "concepts": [item.concept_id for item in items],
        "descendants": [item.descendants for item in items],
        "mapped": [item.mapped for item in items],
        "withdrawn": withdrawn,
    }
    return set(connection.execute(text(_ENUMERATED), values).scalars()) if items else set()


def by_code(connection: Connection, codes: Iterable[str]) -> dict[str, list[tuple[int, str | None]]]:
    """Code → its concepts, each with its `standard_concept`."""
    from sqlalchemy import text

    wanted, found = list(codes), dict[str, list[tuple[int, str | None]]]()
    if wanted:
        for code, concept_id, is_standard in connection.execute(text(_BY_CODE), {"codes": wanted}):
            found.setdefault(code, []).append((concept_id, is_standard))
    return found


def standard(connection: Connection, concepts: Sequence[tuple[int, str | None]], words: Words) -> list[int]:
    """The concepts themselves, and what those that are not standard map to."""
    from sqlalchemy import text

    ids = [concept for concept, _ in concepts]
    others = [concept for concept, is_standard in concepts if is_standard != "S"]
    if others:
        ids += connection.execute(text(_MAPS_TO), {"ids": others}).scalars().all()
        ids += [to for concept in others for to in words.maps_to.get(concept, ())]
    return ids


def known_concepts(connection: Connection, ids: Sequence[int]) -> set[int]:
    """Those that the vocabulary or a row of this store has, or that Lachesis names itself."""
    from sqlalchemy import text

    if not ids:
        return set()
    return set(connection.execute(text(_KNOWN), {"ids": list(ids)}).scalars()) | OWN_CONCEPTS
