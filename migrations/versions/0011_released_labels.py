"""Labels that an extract releases, kept beside ours.

Revision 0011, after 0010.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations.roles import role

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "released_label",
        sa.Column("released_label_id", sa.BigInteger(), sa.Identity(always=False), nullable=False, comment="Key"),
        sa.Column("impression_id", sa.Text(), nullable=False, comment="The study, as the extract names it"),
        sa.Column("person_id", sa.BigInteger(), nullable=False, comment="Whose study"),
        sa.Column(
            "image_occurrence_id", sa.BigInteger(), nullable=True, comment="Its scan; null where no volume is loaded"
        ),
        sa.Column("task", sa.Text(), nullable=False, comment="Task, by its name here where there is one"),
        sa.Column(
            "kind",
            sa.Text(),
            nullable=False,
            comment="tte (time to event), horizon (event by a horizon) or diagnosis (at the study)",
        ),
        sa.Column("horizon_days", sa.Integer(), nullable=True, comment="Horizon, where the label has one"),
        sa.Column("status", sa.Text(), nullable=False, comment="event, negative or censored"),
        sa.Column(
            "released_time", sa.Float(), nullable=True, comment="Time from the study, in the unit of the release"
        ),
        sa.Column("time_days", sa.Float(), nullable=True, comment="The same in days; null where the unit is not known"),
        sa.Column("load_id", sa.Integer(), nullable=False, comment="The load that brought this row"),
        sa.CheckConstraint("kind IN ('tte', 'horizon', 'diagnosis')", name=op.f("ck_released_label_kind")),
        sa.CheckConstraint("status IN ('event', 'negative', 'censored')", name=op.f("ck_released_label_status")),
        sa.ForeignKeyConstraint(
            ["image_occurrence_id"],
            ["omop.image_occurrence.image_occurrence_id"],
            name=op.f("fk_released_label_image_occurrence_id_image_occurrence"),
            ondelete="SET NULL",
        ),
        sa.ForeignKeyConstraint(["load_id"], ["ops.load.load_id"], name=op.f("fk_released_label_load_id_load")),
        sa.PrimaryKeyConstraint("released_label_id", name=op.f("pk_released_label")),
        schema="label",
        comment="Labels as an extract releases them, to compare with ours; never used for training.",
    )
    for columns in (["image_occurrence_id", "task"], ["person_id"], ["load_id"]):
        name = f"ix_released_label_{'_'.join(columns)}"
        op.create_index(op.f(name), "released_label", columns, schema="label")
    readers = f"{role('api')}, {role('reader')}"
    for name in ("loader", "worker"):
        op.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON label.released_label TO {role(name)}")
    op.execute(f"GRANT SELECT ON label.released_label TO {readers}")


def downgrade() -> None:
    op.drop_table("released_label", schema="label")
