"""Features of a cohort with their definitions, and answers of the leakage checks.

Revision 0019, after 0018.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from migrations.roles import role

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

TABLES = ("label.feature_set", "label.feature_definition", "label.leakage_check")
WRITES = "SELECT, INSERT, UPDATE, DELETE"
NOW = sa.text("clock_timestamp()")


def moment() -> sa.types.TypeEngine[object]:
    """A point in time."""
    return postgresql.TIMESTAMP(timezone=True)


def upgrade() -> None:
    op.create_table(
        "feature_set",
        sa.Column("cohort_id", sa.Integer(), autoincrement=False, nullable=False, comment="Cohort"),
        sa.Column("definition", postgresql.JSONB(), nullable=False, comment="Task set, windows, number of last values"),
        sa.Column("digest", sa.LargeBinary(), nullable=False, comment="sha256 of definitions and values"),
        sa.Column("created_at", moment(), server_default=NOW, nullable=False, comment="When"),
        sa.Column("job_id", sa.BigInteger(), nullable=True, comment="The job that made them"),
        sa.ForeignKeyConstraint(
            ["cohort_id"], ["label.cohort.cohort_id"], name="fk_feature_set_cohort_id_cohort", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("cohort_id", name="pk_feature_set"),
        schema="label",
        comment="Features of a cohort: how they were asked for, and their digest.",
    )
    op.create_table(
        "feature_definition",
        sa.Column("cohort_id", sa.Integer(), autoincrement=False, nullable=False, comment="Cohort"),
        sa.Column("name", sa.Text(), nullable=False, comment="Name, as in label.feature"),
        sa.Column("kind", sa.Text(), nullable=False, comment="demographic, count, time, value or visit"),
        sa.Column("description", sa.Text(), nullable=False, comment="What it says, in words"),
        sa.Column("window_days", sa.Integer(), nullable=True, comment="How far back it counts; null without limit"),
        sa.Column("concept_id", sa.Integer(), nullable=True, comment="Concept, where it is of one"),
        sa.Column("unit_concept_id", sa.Integer(), nullable=True, comment="Unit of a value; 0 none"),
        sa.Column(
            "absent_is_zero",
            sa.Boolean(),
            nullable=False,
            comment="True where a member without a row has none of it, else unknown",
        ),
        sa.ForeignKeyConstraint(
            ["cohort_id"],
            ["label.feature_set.cohort_id"],
            name="fk_feature_definition_cohort_id_feature_set",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("cohort_id", "name", name="pk_feature_definition"),
        schema="label",
        comment="What each feature of a cohort is; the values are in label.feature.",
    )
    op.create_table(
        "leakage_check",
        sa.Column("leakage_check_id", sa.BigInteger(), sa.Identity(always=False), nullable=False, comment="Key"),
        sa.Column("label_set_id", sa.Integer(), nullable=False, comment="Label set"),
        sa.Column("checked_at", moment(), nullable=False, comment="When; the same for all checks of one job"),
        sa.Column("name", sa.Text(), nullable=False, comment="The check"),
        sa.Column("asks", sa.Text(), nullable=False, comment="What it looks for"),
        sa.Column("num_rows", sa.BigInteger(), nullable=False, comment="Rows that were looked at"),
        sa.Column("num_violations", sa.BigInteger(), nullable=False, comment="Rows that break it"),
        sa.Column("verdict", sa.Text(), nullable=False, comment="passed, failed or not_checked"),
        sa.Column("found", sa.Text(), nullable=False, comment="What was found, or why it was not checked"),
        sa.Column("job_id", sa.BigInteger(), nullable=True, comment="The job that asked"),
        sa.CheckConstraint("verdict IN ('passed', 'failed', 'not_checked')", name="ck_leakage_check_verdict"),
        sa.ForeignKeyConstraint(
            ["label_set_id"],
            ["label.label_set.label_set_id"],
            name="fk_leakage_check_label_set_id_label_set",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("leakage_check_id", name="pk_leakage_check"),
        schema="label",
        comment="Answers to `lachesis check leakage`: one row a check and a time it was asked.",
    )
    op.create_index(
        "ix_leakage_check_label_set_id_checked_at", "leakage_check", ["label_set_id", "checked_at"], schema="label"
    )
    worker, api, reader = map(role, ("worker", "api", "reader"))
    for table in TABLES:
        op.execute(f"GRANT {WRITES} ON {table} TO {worker}")
        op.execute(f"GRANT SELECT ON {table} TO {api}, {reader}")


def downgrade() -> None:
    for table in reversed(TABLES):
        op.drop_table(table.split(".")[1], schema="label")
