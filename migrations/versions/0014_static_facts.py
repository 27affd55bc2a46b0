"""Facts about a person that have no time, as MEDS has them.

Revision 0014, after 0013.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations.roles import role

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "static_fact",
        sa.Column("person_id", sa.BigInteger(), nullable=False, comment="Whose fact"),
        sa.Column("source_row_id", sa.BigInteger(), nullable=False, comment="Number of the row in its delivery"),
        sa.Column("concept_id", sa.Integer(), nullable=False, comment="Concept of its code"),
        sa.Column("value_as_number", sa.REAL(), nullable=True, comment="Numeric value"),
        sa.Column("unit_concept_id", sa.Integer(), nullable=True, comment="Unit of value_as_number"),
        sa.Column(
            "fills",
            sa.Text(),
            nullable=True,
            comment="Column of omop.person that it fills: gender, race or ethnicity; null where it fills none",
        ),
        sa.Column(
            "at_birth", sa.Boolean(), nullable=False, comment="True where the source gives the time of birth, not none"
        ),
        sa.Column("load_id", sa.Integer(), nullable=False, comment="The load that brought this row"),
        sa.CheckConstraint("fills IN ('gender', 'race', 'ethnicity')", name=op.f("ck_static_fact_fills")),
        sa.ForeignKeyConstraint(["load_id"], ["ops.load.load_id"], name=op.f("fk_static_fact_load_id_load")),
        sa.PrimaryKeyConstraint("load_id", "source_row_id", name=op.f("pk_static_fact")),
        schema="omop",
        comment="Facts about a person without a time, as MEDS has them; no events, so no label sees them.",
    )
    op.create_index(op.f("ix_static_fact_person_id"), "static_fact", ["person_id"], schema="omop")
    loader, worker, api, reader = map(role, ("loader", "worker", "api", "reader"))
    op.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON omop.static_fact TO {loader}")
    op.execute(f"GRANT SELECT ON omop.static_fact TO {worker}, {api}, {reader}")


def downgrade() -> None:
    op.drop_table("static_fact", schema="omop")
