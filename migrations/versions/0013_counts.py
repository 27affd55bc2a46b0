"""Counts of a label set as arrays by task: fifteen rows instead of a row a task, split and status.

Revision 0013, after 0012.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY

from migrations.roles import role

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

WRITES = "SELECT, INSERT, UPDATE, DELETE"
SMALL = 11

TO_ARRAYS = """
INSERT INTO label.status_count (label_set_id, split, status, n, persons, person_days)
SELECT k.label_set_id, k.split, k.status, array_agg(coalesce(c.n, 0) ORDER BY t.position),
       array_agg(coalesce(c.persons, 0) ORDER BY t.position),
       array_agg(coalesce(c.person_days, 0) ORDER BY t.position)
FROM (SELECT DISTINCT label_set_id, split, status FROM label.task_status_count) k
JOIN label.label_set s USING (label_set_id)
JOIN label.task t USING (task_set_id)
LEFT JOIN label.task_status_count c
    ON (c.label_set_id, c.split, c.status, c.position) = (k.label_set_id, k.split, k.status, t.position)
GROUP BY 1, 2, 3
"""

BY_TASK = """
SELECT c.label_set_id, (u.place - 1)::int2 AS position, c.split, c.status, u.n, u.persons, u.person_days
FROM label.status_count c
CROSS JOIN LATERAL unnest(c.n, c.persons, c.person_days) WITH ORDINALITY u(n, persons, person_days, place)
WHERE u.n > 0
"""

BY_TASK_COMMENTS = {
    "label_set_id": "Label set",
    "position": "Task",
    "split": "Split",
    "status": "event, competing, censored, prior or ineligible",
    "n": "Scans",
    "persons": "Persons",
    "person_days": "Days at risk inside the window",
}

TASK_COUNT = """
SELECT s.name AS label_set, t.name AS task, c.split, c.status, c.n, c.persons, c.person_days
FROM label.label_set s
JOIN label.task_status_count c USING (label_set_id)
JOIN label.task t ON t.task_set_id = s.task_set_id AND t.position = c.position
WHERE s.is_current
"""

VIEWS = {
    "task_count": (
        TASK_COUNT,
        "Members by task, split and status, as counted when the label set was stored",
        {
            "label_set": "Label set, by its name",
            "task": "Task",
            "split": "train, tuning or held_out",
            "status": "ineligible, prior, event, competing or censored: the first of these that holds",
            "n": "Scans",
            "persons": "Persons",
            "person_days": "Days at risk inside the window",
        },
    ),
    "task_count_public": (
        f"SELECT label_set, task, split, status, CASE WHEN persons >= {SMALL} THEN n END AS n, "
        f"CASE WHEN persons >= {SMALL} THEN persons END AS persons FROM label.task_count",
        f"label.task_count with cells under {SMALL} persons left empty",
        {
            "label_set": "Label set",
            "task": "Task",
            "split": "Split",
            "status": "Status",
            "n": f"Scans; null under {SMALL} persons",
            "persons": f"Persons; null under {SMALL}",
        },
    ),
}


def make_views() -> None:
    """What reads label.task_status_count, with comments and rights."""
    for view, (statement, text, columns) in VIEWS.items():
        op.execute(f"CREATE VIEW label.{view} AS {statement}")
        op.execute(f"COMMENT ON VIEW label.{view} IS '{text}'")
        for column, meaning in columns.items():
            op.execute(f"COMMENT ON COLUMN label.{view}.{column} IS '{meaning}'")
    op.execute(f"GRANT SELECT ON label.task_count TO {role('api')}, {role('reader')}")
    op.execute(f"GRANT SELECT ON label.task_count_public TO {role('public')}, {role('api')}, {role('reader')}")
    op.execute(f"GRANT {WRITES} ON label.task_count, label.task_count_public TO {role('worker')}")


def drop_views() -> None:
    for view in reversed(VIEWS):
        op.execute(f"DROP VIEW label.{view}")


def upgrade() -> None:
    op.create_table(
        "status_count",
        sa.Column("label_set_id", sa.Integer(), nullable=False, comment="Label set"),
        sa.Column("split", sa.Text(), nullable=False, comment="Split"),
        sa.Column("status", sa.Text(), nullable=False, comment="event, competing, censored, prior or ineligible"),
        sa.Column("n", ARRAY(sa.Integer()), nullable=False, comment="Scans, by the position of the task"),
        sa.Column("persons", ARRAY(sa.Integer()), nullable=False, comment="Persons, by the position of the task"),
        sa.Column(
            "person_days",
            ARRAY(sa.Float()),
            nullable=False,
            comment="Days at risk inside the window, by the position of the task",
        ),
        sa.ForeignKeyConstraint(
            ["label_set_id"],
            ["label.label_set.label_set_id"],
            name=op.f("fk_status_count_label_set_id_label_set"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("label_set_id", "split", "status", name=op.f("pk_status_count")),
        schema="label",
        comment="Members by split and status, arrays by task; read label.task_count or label.task_status_count.",
    )
    op.execute(TO_ARRAYS)
    drop_views()
    op.drop_table("task_status_count", schema="label")
    op.execute(f"CREATE VIEW label.task_status_count AS {BY_TASK}")
    op.execute("COMMENT ON VIEW label.task_status_count IS 'Members by task, split and status; those with any'")
    for column, meaning in BY_TASK_COMMENTS.items():
        op.execute(f"COMMENT ON COLUMN label.task_status_count.{column} IS '{meaning}'")
    op.execute(f"GRANT {WRITES} ON label.status_count TO {role('worker')}")
    for relation in ("status_count", "task_status_count"):
        op.execute(f"GRANT SELECT ON label.{relation} TO {role('api')}, {role('reader')}, {role('worker')}")
    make_views()


def downgrade() -> None:
    drop_views()
    op.execute("ALTER VIEW label.task_status_count RENAME TO task_status_count_view")
    op.create_table(
        "task_status_count",
        sa.Column("label_set_id", sa.Integer(), nullable=False, comment="Label set"),
        sa.Column("position", sa.SmallInteger(), autoincrement=False, nullable=False, comment="Task"),
        sa.Column("split", sa.Text(), nullable=False, comment="Split"),
        sa.Column("status", sa.Text(), nullable=False, comment="event, competing, censored, prior or ineligible"),
        sa.Column("n", sa.Integer(), nullable=False, comment="Scans"),
        sa.Column("persons", sa.Integer(), nullable=False, comment="Persons"),
        sa.Column("person_days", sa.Float(), nullable=False, comment="Days at risk inside the window"),
        sa.ForeignKeyConstraint(
            ["label_set_id"],
            ["label.label_set.label_set_id"],
            name=op.f("fk_task_status_count_label_set_id_label_set"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("label_set_id", "position", "split", "status", name=op.f("pk_task_status_count")),
        schema="label",
        comment="Members by task, split and status, stored when a label set commits.",
    )
    op.execute("INSERT INTO label.task_status_count SELECT * FROM label.task_status_count_view")
    op.execute("DROP VIEW label.task_status_count_view")
    op.drop_table("status_count", schema="label")
    op.execute(f"GRANT SELECT ON label.task_status_count TO {role('api')}, {role('reader')}")
    op.execute(f"GRANT {WRITES} ON label.task_status_count TO {role('worker')}")
    make_views()
