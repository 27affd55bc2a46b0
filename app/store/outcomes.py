"""Which rows of the store are outcomes of a task: statements over concepts, source codes, values and visits.

A statement gives (person_id, coded time): seconds since 1970-01-01 00:00 times 2, plus 1 where only the day is known.
"""

from __future__ import annotations

from typing import Any

from app.tasks.spec import DOMAINS, TaskSpec

PERSONS = (
    "(SELECT DISTINCT person_id FROM label.cohort_member WHERE cohort_id = %(cohort_id)s "
    "AND person_id BETWEEN %(from_person)s AND %(to_person)s)"
)

CODED = "floor(extract(epoch FROM {time}))::int8 * 2 + {date_only}::int"

PAIRS = """
WITH root AS MATERIALIZED (
    SELECT position, concept_id,
           coalesce(definition -> 'resolved' ->> 'descendants', definition ->> 'descendants')::bool AS descendants
    FROM label.task WHERE task_set_id = {task_set_id:d} AND concept_id IS NOT NULL
    UNION ALL
    SELECT t.position, c.concept_id::int,
           coalesce(t.definition -> 'resolved' ->> 'descendants', t.definition ->> 'descendants')::bool
    FROM label.task t, jsonb_array_elements_text(t.definition -> 'resolved' -> 'concepts') c(concept_id)
    WHERE t.task_set_id = {task_set_id:d} AND t.concept_id IS NULL
      AND NOT (t.definition -> 'resolved' ->> 'by_statement')::bool
)
SELECT concept_id, position FROM root
UNION ALL
SELECT a.descendant_concept_id, r.position
FROM root r CROSS JOIN LATERAL (  -- by the key, concept for concept: OFFSET 0 keeps it from reading the whole table
    SELECT a.descendant_concept_id FROM omop.concept_ancestor a WHERE a.ancestor_concept_id = r.concept_id OFFSET 0
) a WHERE r.descendants
"""
"""(concept, position) of all tasks that concepts alone describe, descendants included; some pairs twice."""

PACKED_PAIRS = f"SELECT string_agg(int4send(concept_id) || int2send(position), '') FROM ({PAIRS}) p HAVING count(*) > 0"
"""The same as one value, six bytes a pair, the most significant first: a row each takes ten times longer to read."""

WITH_DESCENDANTS = """
SELECT unnest(%(concepts)s::int[]) AS concept_id
UNION SELECT a.descendant_concept_id FROM omop.concept_ancestor a
WHERE %(narrower)s AND a.ancestor_concept_id = ANY (%(concepts)s::int[])
"""

OF_VISIT_CONCEPTS = """
v.visit_concept_id IN (
    SELECT unnest(%(visit_concepts)s::int[])
    UNION SELECT a.descendant_concept_id FROM omop.concept_ancestor a
    WHERE %(descendants)s AND a.ancestor_concept_id = ANY (%(visit_concepts)s::int[]))
"""

VISITS = f"""
SELECT v.person_id, v.visit_start_datetime AS visit_start, v.date_only,
       coalesce(v.visit_end_datetime, v.visit_start_datetime) AS visit_end,
       CASE WHEN v.visit_end_datetime IS NULL THEN v.date_only ELSE v.end_date_only END AS end_date_only
FROM omop.visit_occurrence v JOIN {PERSONS} m USING (person_id)
WHERE {OF_VISIT_CONCEPTS}
"""

STAYS = f"""
SELECT person_id, min(visit_start) AS stay_start, max(visit_end) AS stay_end,
       (array_agg(date_only ORDER BY visit_start, date_only))[1] AS date_only,
       (array_agg(end_date_only ORDER BY visit_end DESC, end_date_only DESC))[1] AS end_date_only
FROM (
    SELECT *, count(*) FILTER (WHERE before IS NULL OR visit_start > before + interval '24 hours') OVER run AS stay
    FROM (
        SELECT *, max(visit_end) OVER (
                   PARTITION BY person_id ORDER BY visit_start, visit_end
                   ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before
        FROM ({VISITS}) v
    ) v WINDOW run AS (PARTITION BY person_id ORDER BY visit_start, visit_end)
) s GROUP BY person_id, stay
"""
"""Visits of the wanted kinds, those at most 24 hours apart merged into one stay (a transfer is no readmission)."""

VISIT_STARTS = f"SELECT DISTINCT person_id, {CODED.format(time='visit_start', date_only='date_only')} FROM ({VISITS}) v"
STAY_STARTS = f"SELECT person_id, {CODED.format(time='stay_start', date_only='date_only')} FROM ({STAYS}) s"


def holding(start: str, date_only: str, end: str, end_date_only: str) -> str:
    """Condition that a span holds the index of member `m`; where only days are known, days decide."""
    return (
        f"CASE WHEN {date_only} OR m.index_date_only THEN date_trunc('day', {start}) ELSE {start} END <= m.index_time "
        f"AND CASE WHEN {end_date_only} OR m.index_date_only THEN date_trunc('day', {end}) + interval '86399 seconds' "
        f"ELSE {end} END >= m.index_time"
    )


VISIT_OF_INDEX = f"""
SELECT CASE WHEN v.date_only THEN date_trunc('day', v.visit_start) ELSE v.visit_start END AS visit_from,
       coalesce(v.visit_end, v.visit_start) AS visit_to
FROM (
    SELECT *, visit_start_datetime AS visit_start, visit_end_datetime AS visit_end FROM omop.visit_occurrence
) v
WHERE v.person_id = m.person_id
  AND {holding("v.visit_start", "v.date_only", "coalesce(v.visit_end, v.visit_start)", "v.end_date_only")}
ORDER BY v.visit_start DESC, v.visit_end, v.visit_occurrence_id LIMIT 1
"""
"""The visit that holds the index of member `m`: of several the one that started last."""

CLOCKS = f"""
WITH stay AS MATERIALIZED ({STAYS})
SELECT m.cohort_member_id, floor(extract(epoch FROM c.starts))::int8,
       coalesce(m.death_time <= c.starts OR (d.date_only AND m.death_time::date = c.starts::date), false)
FROM label.cohort_member m
LEFT JOIN omop.death d USING (person_id)
LEFT JOIN LATERAL ({VISIT_OF_INDEX}) v ON true
LEFT JOIN LATERAL (
    SELECT max(s.stay_end) AS stay_end FROM stay s
    WHERE s.person_id = m.person_id
      AND (({holding("s.stay_start", "s.date_only", "s.stay_end", "s.end_date_only")})
           OR (v.visit_to IS NOT NULL AND s.stay_start >= m.index_time
               AND s.stay_start <= v.visit_to + interval '24 hours'))
) s ON true
CROSS JOIN LATERAL (SELECT coalesce(s.stay_end, v.visit_to) AS starts) c
WHERE m.cohort_id = %(cohort_id)s AND c.starts IS NOT NULL
  AND m.person_id BETWEEN %(from_person)s AND %(to_person)s
"""
"""(member, discharge, whether death came by then) of members whose index a visit holds.

Discharge is the end of the stay that holds the index, or that the visit which holds it leads to within 24 hours, else
the end of that visit.
"""


def statement(definition: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The statement that selects a task's rows among the persons of `cohort_id`, and its other parameters."""
    spec, values = TaskSpec.from_dict(without_resolved(definition)), parameters(definition)
    if not spec.by_codes:
        return (STAY_STARTS if spec.clock == "discharge" else VISIT_STARTS), values
    condition, more = event_condition(definition)
    coded = CODED.format(time="e.time", date_only="e.date_only")
    return (
        f"SELECT DISTINCT e.person_id, {coded} FROM omop.event e JOIN {PERSONS} m USING (person_id) WHERE {condition}",
        values | more,
    )


def parameters(definition: dict[str, Any]) -> dict[str, Any]:
    """What every statement of a task is given."""
    spec, resolved = TaskSpec.from_dict(without_resolved(definition)), definition["resolved"]
    return {
        "concepts": resolved["concepts"],
        "narrower": resolved.get("descendants", spec.descendants),
        "descendants": spec.descendants,
        "source_concepts": resolved["source_concepts"],
        "visit_concepts": list(spec.visit_concepts),
        "domains": [DOMAINS[domain] for domain in spec.domains],
    }


def event_condition(definition: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Which rows `e` of omop.event are those of a task by codes, and the parameters of its value rules."""
    spec, resolved = TaskSpec.from_dict(without_resolved(definition)), definition["resolved"]
    values: dict[str, Any] = {}
    conditions = [
        f"(e.concept_id IN ({WITH_DESCENDANTS}) OR e.source_concept_id = ANY (%(source_concepts)s::int[]))"
        if resolved["source_concepts"]
        else f"e.concept_id IN ({WITH_DESCENDANTS})"
    ]
    if spec.domains:
        conditions.append("""e.domain = ANY (%(domains)s::"char"[])""")
    if spec.visit_concepts:
        conditions.append(
            "e.visit_occurrence_id IN (SELECT v.visit_occurrence_id FROM omop.visit_occurrence v "
            f"WHERE {OF_VISIT_CONCEPTS})"
        )
    if spec.values:
        rules = [value_condition(n, values, unit) for n, unit in enumerate(resolved["units"])]
        for n, rule in enumerate(spec.values):
            values |= {f"{bound}_{n}": getattr(rule, bound) for bound in BOUNDS}
            values[f"value_concepts_{n}"] = list(rule.value_concepts)
        conditions.append("(" + " OR ".join(rules) + ")")
    return " AND ".join(conditions), values


BOUNDS = {"above": ">", "at_least": ">=", "below": "<", "at_most": "<="}


def value_condition(n: int, values: dict[str, Any], unit: int | None) -> str:
    """The n-th value rule as a condition on `e`; a bound that is not given holds."""
    parts = [
        f"(%({bound}_{n})s::real IS NULL OR e.value_as_number {sign} %({bound}_{n})s::real)"
        for bound, sign in BOUNDS.items()
    ]
    if unit is not None:
        values[f"unit_{n}"] = unit
        parts.append(f"coalesce(e.unit_concept_id, 0) = %(unit_{n})s AND e.value_as_number IS NOT NULL")
    parts.append(
        f"(%(value_concepts_{n})s::int[] = '{{}}' OR e.value_as_concept_id = ANY (%(value_concepts_{n})s::int[]))"
    )
    return "(" + " AND ".join(parts) + ")"


def without_resolved(definition: dict[str, Any]) -> dict[str, Any]:
    """A task's definition as its file gave it."""
    return {key: value for key, value in definition.items() if key != "resolved"}
