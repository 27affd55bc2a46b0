"""Events and history of tasks among the scans of a cohort, counted before any label is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from app.store import names, outcomes
from app.store.codes import resolve
from app.store.session import raw
from app.store.task_checks import Finding, of_counts
from app.tasks.spec import DAY_SECONDS, TaskSpec

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from app.settings import Settings

COUNTS = """
WITH happened (person_id, coded) AS ({rows}), scan AS (
    SELECT cohort_member_id, person_id, split, floor(extract(epoch FROM index_time))::int8 AS at,
           floor(extract(epoch FROM CASE WHEN %(to_cut)s THEN coalesce(data_cut_end, follow_up_end)
                                         ELSE follow_up_end END))::int8 AS ends
    FROM label.cohort_member WHERE cohort_id = %(cohort_id)s AND eligible
), seen AS (
    SELECT s.cohort_member_id, s.split,
           bool_or(h.coded >> 1 >= s.at - %(look_back)s AND (d.same_day OR h.coded >> 1 <= s.at + %(start)s)) AS before,
           bool_or(NOT d.same_day AND h.coded >> 1 > s.at + %(start)s AND h.coded >> 1 <= s.ends) AS after
    FROM scan s LEFT JOIN happened h USING (person_id)
    CROSS JOIN LATERAL (SELECT %(no_same_day)s AND h.coded & 1 = 1
                               AND floor((h.coded >> 1) / 86400.0) = floor(s.at / 86400.0) AS same_day) d
    WHERE s.ends > s.at + %(start)s GROUP BY 1, 2
)
SELECT split, CASE WHEN before AND %(excludes)s THEN 'prior' WHEN after THEN 'event' ELSE 'censored' END, count(*)
FROM seen GROUP BY 1, 2
"""
"""Scans by split and status, the window taken to open after the scan also where the task's clock is discharge."""

FOLLOWED = """
SELECT max(extract(epoch FROM follow_up_end - index_time)) / 86400.0 FROM label.cohort_member
WHERE cohort_id = %s AND eligible
"""


def check_cohort(
    connection: Connection, cohort: str, specs: Sequence[TaskSpec], settings: Settings | None = None
) -> list[Finding]:
    """What the scans of a cohort tell about tasks: too few events, history, horizons. Raises UnknownName."""
    cohort_id = names.find(connection, "cohort", cohort).id
    resolved = resolve(connection, specs, allow_absent=True, settings=settings)
    row = raw(connection).execute(FOLLOWED, (cohort_id,)).fetchone()
    followed = float(row[0] or 0) if row else 0.0
    return [
        finding
        for spec, found in zip(specs, resolved, strict=True)
        for finding in of_counts(
            spec.name, count(connection, cohort_id, spec.to_dict() | {"resolved": found}), spec.horizons_days, followed
        )
    ]


def count(connection: Connection, cohort_id: int, definition: dict[str, object]) -> dict[tuple[str, str], int]:
    """(split, status) → scans, of one task with what its codes mean."""
    spec = TaskSpec.from_dict(outcomes.without_resolved(definition))
    statement, values = outcomes.statement(definition)
    values |= {
        "cohort_id": cohort_id,
        "from_person": -(2**63),
        "to_person": 2**63 - 1,
        "to_cut": spec.follow_up == "data_cut",
        "look_back": 2**40 if spec.prior_days is None else spec.prior_days * DAY_SECONDS,
        "start": spec.start_seconds,
        "no_same_day": spec.same_day == "exclude",
        "excludes": spec.prior == "exclude",
    }
    rows = raw(connection).execute(COUNTS.format(rows=statement).encode(), values).fetchall()
    return {(split, status): n for split, status, n in rows}
