"""Versions that were removed: their numbers are not given again.

Revision 0020, after 0019.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations.roles import role

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "removed_version",
        sa.Column("kind", sa.Text(), nullable=False, comment="cohort, task_set or label_set"),
        sa.Column("name", sa.Text(), nullable=False, comment="Name"),
        sa.Column(
            "version", sa.Integer(), autoincrement=False, nullable=False, comment="Number that is not given again"
        ),
        sa.Column("digest", sa.LargeBinary(), nullable=False, comment="What it was: the digest it had"),
        sa.Column(
            "removed_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
            comment="When",
        ),
        sa.CheckConstraint("kind IN ('cohort', 'task_set', 'label_set')", name=op.f("ck_removed_version_kind")),
        sa.PrimaryKeyConstraint("kind", "name", "version", name=op.f("pk_removed_version")),
        schema="label",
        comment="Versions of cohorts, task sets and label sets that were removed, so that NAME@2 never means another.",
    )
    op.execute(f"GRANT SELECT ON label.removed_version TO {role('api')}, {role('reader')}")
    op.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON label.removed_version TO {role('worker')}")


def downgrade() -> None:
    op.drop_table("removed_version", schema="label")
