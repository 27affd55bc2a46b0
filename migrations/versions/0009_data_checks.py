"""Checks of loaded data: their answers, and scans that several persons share.

Revision 0009, after 0008.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations.roles import role

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

SHARED = """
CREATE VIEW omop.shared_scan AS
SELECT i.image_occurrence_id, i.person_id, greatest(f.persons, u.persons, d.persons)::int AS num_persons
FROM omop.image_occurrence i
JOIN ops.load l ON l.load_id = i.load_id
JOIN (
    SELECT m.source_id, j.root, j.path, count(DISTINCT j.person_id) AS persons
    FROM omop.image_occurrence j JOIN ops.load m USING (load_id) GROUP BY 1, 2, 3
) f ON f.source_id = l.source_id AND f.root = i.root AND f.path = i.path
LEFT JOIN (
    SELECT series_uid, count(DISTINCT person_id) AS persons FROM omop.image_occurrence GROUP BY 1
) u ON u.series_uid = i.series_uid
LEFT JOIN (
    SELECT sha256, count(DISTINCT person_id) AS persons FROM omop.image_occurrence GROUP BY 1
) d ON d.sha256 = i.sha256
WHERE greatest(f.persons, u.persons, d.persons) > 1
"""
COMMENTS = {
    "image_occurrence_id": "The scan",
    "person_id": "Whose scan",
    "num_persons": "Persons who have the same file, series UID or content",
}


def upgrade() -> None:
    op.create_table(
        "data_check",
        sa.Column("data_check_id", sa.BigInteger(), sa.Identity(always=False), nullable=False, comment="Key"),
        sa.Column(
            "checked_at",
            sa.TIMESTAMP(timezone=True),
            nullable=False,
            comment="When; the same for all checks of one `lachesis check data`",
        ),
        sa.Column("source", sa.Text(), nullable=True, comment="Source that was asked about; null for the whole store"),
        sa.Column("name", sa.Text(), nullable=False, comment="The check"),
        sa.Column("table_name", sa.Text(), nullable=False, comment="Table that was asked about"),
        sa.Column("asks", sa.Text(), nullable=False, comment="What it looks for"),
        sa.Column("num_rows", sa.BigInteger(), nullable=False, comment="Rows that could break it (denominator)"),
        sa.Column("num_violations", sa.BigInteger(), nullable=False, comment="Rows that break it"),
        sa.Column("warn_above", sa.Float(), nullable=False, comment="A larger share is a warning"),
        sa.Column("fail_above", sa.Float(), nullable=True, comment="A larger share is a failure; null: never one"),
        sa.Column("status", sa.Text(), nullable=False, comment="pass, warn, fail or not_applicable"),
        sa.Column("list_sql", sa.Text(), nullable=False, comment="Statement that lists the rows that break it"),
        sa.CheckConstraint("status IN ('pass', 'warn', 'fail', 'not_applicable')", name=op.f("ck_data_check_status")),
        sa.PrimaryKeyConstraint("data_check_id", name=op.f("pk_data_check")),
        schema="ops",
        comment="Answers to `lachesis check data`: one row a check, a table and a time it was asked.",
    )
    op.create_index(op.f("ix_data_check_checked_at"), "data_check", ["checked_at"], schema="ops")
    op.execute(SHARED)
    op.execute("COMMENT ON VIEW omop.shared_scan IS 'Scans whose volume several persons have'")
    for name, meaning in COMMENTS.items():
        op.execute(f"COMMENT ON COLUMN omop.shared_scan.{name} IS '{meaning}'")
    writers, readers = f"{role('loader')}, {role('worker')}", f"{role('api')}, {role('reader')}"
    op.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON ops.data_check TO {writers}")
    op.execute(f"GRANT SELECT ON ops.data_check TO {readers}")
    op.execute(f"GRANT SELECT ON omop.shared_scan TO {writers}, {readers}")


def downgrade() -> None:
    op.execute("DROP VIEW omop.shared_scan")
    op.drop_table("data_check", schema="ops")
