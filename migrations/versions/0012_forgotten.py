"""Persons who are forgotten: tokens of whom never to load again, and files that are still to go.

Revision 0012, after 0011.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations.roles import role

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "forgotten",
        sa.Column("token", sa.LargeBinary(), nullable=False, comment="HMAC-SHA256 of an id or a source value"),
        sa.Column("key_id", sa.Text(), nullable=False, comment="Which secret: first digits of a digest of it"),
        sa.Column("job_id", sa.BigInteger(), nullable=True, comment="The job that forgot them"),
        sa.Column(
            "forgotten_at",
            sa.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
            comment="When",
        ),
        sa.PrimaryKeyConstraint("token", name=op.f("pk_forgotten")),
        schema="ops",
        comment="Persons who were forgotten, as tokens that only the home's secret can make: loads leave them out.",
    )
    op.create_table(
        "forgotten_file",
        sa.Column("kind", sa.Text(), nullable=False, comment="artifact or volume"),
        sa.Column("name", sa.Text(), nullable=False, comment="Path among the artifacts, or digest of the voxels"),
        sa.CheckConstraint("kind IN ('artifact', 'volume')", name=op.f("ck_forgotten_file_kind")),
        sa.PrimaryKeyConstraint("kind", "name", name=op.f("pk_forgotten_file")),
        schema="ops",
        comment="Files of forgotten persons that are still to be deleted; empty but while a job does it.",
    )
    writers = f"{role('loader')}, {role('worker')}"
    op.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON ops.forgotten, ops.forgotten_file TO {writers}")


def downgrade() -> None:
    op.drop_table("forgotten_file", schema="ops")
    op.drop_table("forgotten", schema="ops")
