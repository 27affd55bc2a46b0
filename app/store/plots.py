"""What `lachesis plot` and the report draw of labels and cohorts: one statement a figure, numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy import Connection

INCIDENCE = "SELECT * FROM label.incidence(:labels, :task, :split, :death_competes)"

DENSITY = """
SELECT arm, outcomes, count(*) AS scans
FROM (
    SELECT 'tte' AS arm, cardinality(y.event_tasks) AS outcomes FROM {members}
    UNION ALL
    SELECT 'visit', cardinality(y.visit_tasks) FROM {members}
    UNION ALL
    SELECT 'at index', cardinality(y.prior_tasks) FROM {members}
) s GROUP BY 1, 2 ORDER BY 1, 2
""".format(
    members="label.tte y JOIN label.cohort_member m USING (cohort_member_id) "
    "WHERE y.label_set_id = label.find_label_set(:labels) AND m.eligible"
)
"""Scans by number of labels: outcomes after the index (arm tte), codes of the index visit (arm visit), and history."""

EVENTS = """
SELECT t.position, t.name AS task, coalesce(t.title, t.name) AS title,
       coalesce(sum(c.n) FILTER (WHERE c.status = 'event'), 0)::bigint AS events,
       coalesce(sum(c.n) FILTER (WHERE c.status = 'competing'), 0)::bigint AS competing,
       coalesce(sum(c.n) FILTER (WHERE c.status = 'censored'), 0)::bigint AS censored
FROM label.label_set s
JOIN label.task t USING (task_set_id)
LEFT JOIN label.task_status_count c USING (label_set_id, position)
WHERE s.label_set_id = label.find_label_set(:labels)
GROUP BY t.position, t.name, t.title ORDER BY events DESC, t.position
"""

TASKS = """
SELECT t.name FROM label.label_set s JOIN label.task t USING (task_set_id)
WHERE s.label_set_id = :label_set_id ORDER BY t.position
"""

FOLLOW_UP = """
SELECT m.split, round(extract(epoch FROM m.follow_up_end - m.index_time) / 86400)::int AS days,
       count(*) AS scans, count(*) FILTER (WHERE m.death_time <= m.follow_up_end) AS deaths
FROM label.cohort_member m WHERE m.cohort_id = :cohort_id AND m.eligible
GROUP BY 1, 2 ORDER BY 1, 2
"""


def rows(connection: Connection, statement: str, **values: Any) -> list[dict[str, Any]]:
    """Rows of one of the statements above."""
    from sqlalchemy import text

    return [dict(row) for row in connection.execute(text(statement), values).mappings()]


Curves = tuple[list[dict[str, Any]], list[dict[str, Any]]]
"""Rows of label.incidence with death competing, and with death censored."""


def incidence_curves(connection: Connection, labels: str, task: str, splits: Sequence[str | None]) -> dict[str, Curves]:
    """Group → curves of one task; a split of None is all scans."""

    def curve(split: str | None, *, competes: bool) -> list[dict[str, Any]]:
        return rows(connection, INCIDENCE, labels=labels, task=task, split=split, death_competes=competes)

    return {
        (split or "all scans").replace("_", " "): (curve(split, competes=True), curve(split, competes=False))
        for split in splits
    }
