"""Checks of tasks: their code sets, the vocabulary, units, and what the counts of a label set tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from app.store.codes import resolve
from app.tasks.spec import ANY_UNIT, TaskSpec

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from app.settings import Settings

OVERLAP = 0.9
"""Code sets of which a larger share is common are one question asked twice."""
FEW, SCARCE = 20, 50
"""Fewer events cannot be estimated; fewer than the second are flagged (docs/science.md, section 4)."""
OFTEN_PRIOR = 0.5
"""A larger share of scans with the outcome before them leaves few at risk."""

EXPANDED = """
SELECT concept_id FROM unnest(CAST(:concepts AS int[])) concept_id
UNION
SELECT a.descendant_concept_id FROM omop.concept_ancestor a
WHERE :descendants AND a.ancestor_concept_id = ANY (CAST(:concepts AS int[]))
"""

SEEN = """
SELECT coalesce(sum(c.num_events) FILTER (WHERE c.concept_id = ANY (CAST(:concepts AS int[]))), 0)
     + coalesce(sum(c.num_source_events) FILTER (WHERE c.concept_id = ANY (CAST(:source_concepts AS int[]))), 0)
FROM omop.concept_count c
WHERE c.concept_id = ANY (CAST(:concepts AS int[]) || CAST(:source_concepts AS int[]))
"""

NOT_STANDARD = """
SELECT concept_id FROM omop.concept
WHERE concept_id = ANY (CAST(:concepts AS int[])) AND standard_concept IS DISTINCT FROM 'S'
  AND standard_concept IS DISTINCT FROM 'C' ORDER BY 1
"""

UNITS = """
SELECT coalesce(e.unit_concept_id, 0) AS unit, count(*) AS rows FROM omop.event e
WHERE e.concept_id = ANY (CAST(:concepts AS int[])) AND e.value_as_number IS NOT NULL GROUP BY 1 ORDER BY 2 DESC, 1
"""

OF_LABELS = """
SELECT t.name AS task, t.horizons_days, c.split, c.status, c.n
FROM label.label_set s JOIN label.task t USING (task_set_id)
LEFT JOIN label.task_status_count c USING (label_set_id, position)
WHERE s.label_set_id = label.find_label_set(:labels)
"""

FOLLOWED = """
SELECT max(y.follow_up_seconds) / 86400.0 FROM label.tte y WHERE y.label_set_id = label.find_label_set(:labels)
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to look at."""

    task: str
    check: str
    status: str
    """fail: the task cannot do what it says; warn: it may not."""
    found: str
    mend: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def check_specs(connection: Connection, specs: Sequence[TaskSpec], settings: Settings | None = None) -> list[Finding]:
    """What is remarkable in tasks and the vocabulary and rows of this store. Raises InputError as `resolve` does."""
    resolved = resolve(connection, specs, allow_absent=True, settings=settings)
    sets = {spec.name: _expanded(connection, spec, found) for spec, found in zip(specs, resolved, strict=True)}
    findings = [
        finding
        for spec, found in zip(specs, resolved, strict=True)
        for finding in _of_one(connection, spec, found, sets[spec.name])
    ]
    return [*findings, *_alike({spec.name: (sets[spec.name], _rest(spec)) for spec in specs})]


def _expanded(connection: Connection, spec: TaskSpec, resolved: Mapping[str, Any]) -> frozenset[int]:
    from sqlalchemy import text

    values = {"concepts": resolved["concepts"], "descendants": resolved.get("descendants", spec.descendants)}
    return frozenset(connection.execute(text(EXPANDED), values).scalars()) | frozenset(resolved["source_concepts"])


def _of_one(
    connection: Connection, spec: TaskSpec, resolved: Mapping[str, Any], concepts: frozenset[int]
) -> Iterator[Finding]:
    from sqlalchemy import text

    if resolved["absent"]:
        shown = ", ".join(resolved["absent"][:5])
        yield Finding(
            spec.name, "absent_code", "fail", f"{len(resolved['absent']):,} codes unknown here: {shown}",
            "load a vocabulary that has them, or take them out",
        )  # fmt: skip
    wrong = connection.execute(text(NOT_STANDARD), {"concepts": list(spec.concepts)}).scalars().all()
    if wrong:
        yield Finding(
            spec.name, "not_standard", "warn", f"concepts {', '.join(map(str, wrong[:5]))} are not standard",
            "name the standard concept it maps to (`lachesis concepts` shows it), or give it under source_codes",
        )  # fmt: skip
    if spec.by_codes and concepts:
        values = {"concepts": list(concepts), "source_concepts": resolved["source_concepts"]}
        if not connection.scalar(text(SEEN), values):
            yield Finding(
                spec.name, "never_seen", "fail", f"its {len(concepts):,} concepts are known, and none is in any event",
                "look the codes up with `lachesis concepts`",
            )  # fmt: skip
    yield from _units(connection, spec, resolved, concepts)


def _units(
    connection: Connection, spec: TaskSpec, resolved: Mapping[str, Any], concepts: frozenset[int]
) -> Iterator[Finding]:
    """Bounds in a unit that no row of the task has, though rows with other units are there."""
    from sqlalchemy import text

    wanted = {unit for unit in resolved["units"] if unit is not None}
    if not wanted or any(rule.unit == ANY_UNIT for rule in spec.values):
        return
    rows = {row.unit: row.rows for row in connection.execute(text(UNITS), {"concepts": list(concepts)})}
    missed = {unit: count for unit, count in rows.items() if unit not in wanted}
    if missed:
        shown = ", ".join(f"{unit or 'none'} ({count:,} rows)" for unit, count in list(missed.items())[:5])
        yield Finding(
            spec.name, "other_units", "warn" if wanted & set(rows) else "fail", f"rows with other units: {shown}",
            "add a value rule for each unit that means the same",
        )  # fmt: skip


def _rest(spec: TaskSpec) -> dict[str, Any]:
    """A task without what names its codes: two that differ here ask different questions of the same codes."""
    named = {"name", "title", "concepts", "vocabulary_codes", "source_codes", "concept_set", "descendants"}
    named |= {"exclude_concepts", "exclude_vocabulary_codes", "horizons_days"}
    return {field: value for field, value in spec.to_dict().items() if field not in named}


def _alike(sets: Mapping[str, tuple[frozenset[int], dict[str, Any]]]) -> Iterator[Finding]:
    """Pairs of tasks that ask the same of the same codes."""
    for (one, (left, rules)), (other, (right, others)) in combinations(sets.items(), 2):
        if not left or not right or rules != others:
            continue
        common = len(left & right) / len(left | right)
        if common == 1:
            yield Finding(other, "same_codes", "warn", f"the same codes and rules as {one}", "keep one of the two")
        elif common > OVERLAP:
            yield Finding(
                other, "overlap", "warn", f"{common:.0%} of its codes are those of {one}", "keep one of the two"
            )


def check_labels(connection: Connection, labels: str) -> list[Finding]:
    """What the counts of a label set tell about its tasks."""
    from sqlalchemy import text

    counts: dict[str, dict[tuple[str, str], int]] = {}
    horizons: dict[str, Sequence[int]] = {}
    for row in connection.execute(text(OF_LABELS), {"labels": labels}):
        horizons[row.task] = row.horizons_days
        counts.setdefault(row.task, {})[row.split or "", row.status or ""] = row.n or 0
    followed = float(connection.scalar(text(FOLLOWED), {"labels": labels}) or 0)
    return [finding for task, found in counts.items() for finding in of_counts(task, found, horizons[task], followed)]


def of_counts(
    task: str, counts: Mapping[tuple[str, str], int], horizons: Sequence[int], followed: float
) -> Iterator[Finding]:
    """What scans by split and status tell about a task; `followed` is the longest follow-up in days."""
    for split in ("train", "held_out"):
        events = counts.get((split, "event"), 0)
        words = split.replace("_", " ")
        if events < FEW:
            yield Finding(
                task, "few_events", "fail", f"{events} events in {words}, under {FEW}: it will not be estimated",
                "widen its codes, follow longer, or load more persons",
            )  # fmt: skip
        elif events < SCARCE:
            yield Finding(
                task, "few_events", "warn", f"{events} events in {words}, under {SCARCE}", "read it with care"
            )
    total = sum(n for (_, status), n in counts.items() if status != "ineligible")
    prior = sum(n for (_, status), n in counts.items() if status == "prior")
    if total and prior > OFTEN_PRIOR * total:
        yield Finding(
            task, "fires_before_index", "warn", f"{prior / total:.0%} of scans have it before the risk window opens",
            "give prior_days, or ask for the next occurrence",
        )  # fmt: skip
    late = [days for days in horizons if days > followed]
    if late:
        yield Finding(
            task, "horizon_beyond_follow_up", "fail",
            f"horizons {', '.join(map(str, late))} days, no scan is followed over {followed:,.0f}",
            "shorten horizons_days",
        )  # fmt: skip
