"""Checks of leakage that SQL alone can answer, and where answers are kept (docs/science.md, section 6)."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy import Connection

SAME_DAY_SHARE = 0.95
"""At least so many scans have a CT procedure, or a visit, within a day; else dates may have been shifted apart."""
SAMPLE_MEMBERS, SAMPLE_TASKS = 500, 20

EARLY_OUTCOMES = """
SELECT count(*), count(*) FILTER (WHERE u.seconds <= coalesce(
           y.window_seconds[array_position(y.window_tasks, u.position)], t.start_seconds))
FROM label.tte y
CROSS JOIN LATERAL unnest(y.event_tasks, y.event_seconds) u(position, seconds)
JOIN label.label_set s USING (label_set_id)
JOIN label.task t ON t.task_set_id = s.task_set_id AND t.position = u.position
WHERE y.label_set_id = :label_set
"""

RELABELLED = """
WITH sample AS MATERIALIZED (
    SELECT m.*, y.event_tasks, y.event_seconds, y.follow_up_seconds
    FROM label.tte y JOIN label.cohort_member m USING (cohort_member_id)
    WHERE y.label_set_id = :label_set AND m.eligible AND y.follow_up_seconds > 0
    ORDER BY hashint8(m.cohort_member_id) LIMIT :members
), chosen AS MATERIALIZED (
    SELECT t.position, t.definition, t.start_seconds
    FROM label.label_set s JOIN label.task t USING (task_set_id)
    JOIN label.task_status_count c ON (c.label_set_id, c.position, c.status) = (s.label_set_id, t.position, 'event')
    WHERE s.label_set_id = :label_set AND t.follow_up = 'cohort'
      AND NOT (t.definition -> 'resolved' ->> 'by_statement')::bool AND t.definition ->> 'clock' = 'index'
    GROUP BY t.position, t.definition, t.start_seconds ORDER BY sum(c.n) DESC, t.position LIMIT :tasks
), meaning AS MATERIALIZED (
    SELECT c.position, r.concept_id::int AS concept_id FROM chosen c
    CROSS JOIN LATERAL jsonb_array_elements_text(c.definition -> 'resolved' -> 'concepts') r(concept_id)
    UNION
    SELECT c.position, a.descendant_concept_id FROM chosen c
    CROSS JOIN LATERAL jsonb_array_elements_text(c.definition -> 'resolved' -> 'concepts') r(concept_id)
    JOIN omop.concept_ancestor a ON a.ancestor_concept_id = r.concept_id::int
    WHERE coalesce(c.definition -> 'resolved' ->> 'descendants', c.definition ->> 'descendants')::bool
), later AS (
    SELECT m.cohort_member_id, n.position, min(floor(extract(epoch FROM e.time - m.index_time)))::int8 AS seconds
    FROM sample m
    JOIN omop.event e ON e.person_id = m.person_id AND e.time > m.index_time AND e.time <= m.follow_up_end
    JOIN meaning n USING (concept_id)
    JOIN chosen c ON c.position = n.position
    WHERE e.time > m.index_time + make_interval(secs => c.start_seconds)
      AND NOT (m.index_date_only AND e.time < date_trunc('day', m.index_time) + interval '1 day')
      AND NOT (e.date_only AND c.definition ->> 'same_day' = 'exclude'
               AND e.time < date_trunc('day', m.index_time) + interval '1 day')
    GROUP BY 1, 2
)
SELECT count(*), count(*) FILTER (WHERE l.seconds IS DISTINCT FROM
           m.event_seconds[array_position(m.event_tasks, c.position)])
FROM sample m CROSS JOIN chosen c LEFT JOIN later l USING (cohort_member_id, position)
JOIN label.tte y ON y.cohort_member_id = m.cohort_member_id AND y.label_set_id = :label_set
WHERE NOT (c.position = ANY (y.ineligible_tasks))
  AND NOT (c.definition ->> 'prior' = 'exclude' AND c.position = ANY (y.prior_tasks))
"""
"""Outcomes found anew in what happened after the index alone, for some members and the tasks with most events."""

SPLIT_PERSONS = """
SELECT count(*), count(*) FILTER (WHERE splits > 1) FROM (
    SELECT person_id, count(DISTINCT split) AS splits FROM label.cohort_member WHERE cohort_id = :cohort GROUP BY 1) p
"""

SHARED_VOLUMES = """
WITH member AS (
    SELECT m.split, m.person_id, i.root, i.path, i.series_uid, i.sha256
    FROM label.cohort_member m JOIN omop.image_occurrence i USING (image_occurrence_id) WHERE m.cohort_id = :cohort
), shared AS (
    SELECT split, root || ':' || path AS volume FROM member
    UNION SELECT split, 'series ' || series_uid FROM member WHERE series_uid IS NOT NULL
    UNION SELECT split, 'content ' || sha256::text FROM member WHERE sha256 IS NOT NULL
)
SELECT count(*), count(*) FILTER (WHERE splits > 1)
FROM (SELECT volume, count(DISTINCT split) AS splits FROM shared GROUP BY 1) v
"""

SCAN_DAYS = "SELECT person_id, index_time::date FROM label.cohort_member WHERE cohort_id = :cohort AND eligible"

CONTROLS = """
SELECT c.name, m.value, m.ci_low, m.ci_high FROM model.metric m
JOIN model.checkpoint c ON c.checkpoint_id = m.checkpoint_id
WHERE m.label_set_id = :label_set AND c.shuffled AND m.metric = 'mean_harrell_c' AND m.split = 'held_out'
  AND m.inputs = 'image' AND m.reference_checkpoint_id IS NULL AND m.subgroup IS NULL AND m.value IS NOT NULL
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What one check found."""

    name: str
    asks: str
    num_rows: int
    num_violations: int
    verdict: str
    """passed, failed or not_checked."""
    found: str


def counted(name: str, asks: str, rows: int, violations: int, what: str, *, bound: int = 0) -> Answer:
    """A check that fails where more than `bound` of `rows` break it."""
    if not rows:
        return Answer(
            name=name, asks=asks, num_rows=0, num_violations=0, verdict="not_checked", found=f"there are no {what}"
        )
    verdict = "passed" if violations <= bound else "failed"
    found = f"{violations:,} of {rows:,} {what}"
    return Answer(name=name, asks=asks, num_rows=rows, num_violations=violations, verdict=verdict, found=found)


def pair(connection: Connection, statement: str, **values: Any) -> tuple[int, int]:
    """(rows, violations) that a statement counts."""
    from sqlalchemy import text

    row = connection.execute(text(statement), values).one()
    return int(row[0]), int(row[1])


def keep(connection: Connection, label_set_id: int, answers: Sequence[Answer], job_id: int | None) -> dt.datetime:
    """Store answers; the moment under which they stand."""
    from sqlalchemy import insert

    from app.schema.label import LeakageCheck

    now = dt.datetime.now(dt.UTC)
    rows = [
        {"label_set_id": label_set_id, "checked_at": now, "job_id": job_id}
        | {field: getattr(answer, field) for field in Answer.__dataclass_fields__}
        for answer in answers
    ]
    connection.execute(insert(LeakageCheck), rows)
    return now


def stored_features(
    connection: Connection, cohort_id: int
) -> tuple[dict[str, Any] | None, list[tuple[int, str, float]]]:
    """How a cohort's features were asked for (None where it has none), and their rows by member and name."""
    from sqlalchemy import text

    asked = connection.scalar(
        text("SELECT definition FROM label.feature_set WHERE cohort_id = :cohort"), {"cohort": cohort_id}
    )
    rows = connection.execute(
        text(
            "SELECT f.cohort_member_id, f.name, f.value FROM label.feature f "
            "JOIN label.cohort_member m USING (cohort_member_id) WHERE m.cohort_id = :cohort"
        ),
        {"cohort": cohort_id},
    )
    return asked, [(row[0], row[1], row[2]) for row in rows]
