"""Where embeddings wait, a block at a time, until all of them are there to be seen.

Revision 0031, after 0030.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from pgvector.sqlalchemy import HALFVEC

from migrations.roles import role

revision = "0031"
down_revision = "0030"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "incoming_embedding",
        sa.Column("checkpoint_id", sa.Integer(), autoincrement=False, nullable=False, comment="Checkpoint"),
        sa.Column("cohort_id", sa.Integer(), autoincrement=False, nullable=False, comment="Cohort being embedded"),
        sa.Column("image_occurrence_id", sa.BigInteger(), autoincrement=False, nullable=False, comment="Scan"),
        sa.Column("sha256", sa.LargeBinary(), nullable=False, comment="Digest of the scan's content"),
        sa.Column("embedding", HALFVEC(), nullable=False, comment="Vector, standardised by the train mean and SD"),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"],
            ["model.checkpoint.checkpoint_id"],
            name=op.f("fk_incoming_embedding_checkpoint_id_checkpoint"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["cohort_id"],
            ["label.cohort.cohort_id"],
            name=op.f("fk_incoming_embedding_cohort_id_cohort"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint(
            "checkpoint_id", "cohort_id", "image_occurrence_id", name=op.f("pk_incoming_embedding")
        ),
        schema="model",
        comment="Embeddings of jobs that have not ended; they move to model.embedding together. Unlogged.",
        prefixes=["UNLOGGED"],
    )
    op.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON model.incoming_embedding TO {role('worker')}")


def downgrade() -> None:
    op.drop_table("incoming_embedding", schema="model")
