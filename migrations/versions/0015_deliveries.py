"""Deliveries on top of deliveries: several loads a table, what each changed, and what labels and embeddings rest on.

Revision 0015, after 0014.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations.roles import role

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

WRITES = "SELECT, INSERT, UPDATE, DELETE"

LOAD_COLUMNS = (
    sa.Column("delivery_id", sa.Integer(), nullable=True, comment="Smallest load_id of its delivery: groups the loads"),
    sa.Column(
        "num_same",
        sa.BigInteger(),
        server_default=sa.text("0"),
        nullable=False,
        comment="Records of a delta that say what is already shown",
    ),
    sa.Column(
        "num_deleted",
        sa.BigInteger(),
        server_default=sa.text("0"),
        nullable=False,
        comment="Records of a delta that take a row away",
    ),
    sa.Column(
        "num_shown",
        sa.BigInteger(),
        nullable=True,
        comment="Rows of it that are still seen; null where they are not counted one by one (vocabulary, scans)",
    ),
)
KEYED = (
    "person",
    "observation_period",
    "visit_occurrence",
    "condition_occurrence",
    "drug_exposure",
    "procedure_occurrence",
    "device_exposure",
    "measurement",
    "observation",
    "specimen",
    "visit_detail",
    "death",
)


def upgrade() -> None:
    for column in LOAD_COLUMNS:
        op.add_column("load", column.copy(), schema="ops")
    op.execute(
        "UPDATE ops.load l SET delivery_id = d.first FROM (SELECT load_id, min(load_id) OVER (PARTITION BY "
        "coalesce(job_id, -load_id)) AS first FROM ops.load) d WHERE d.load_id = l.load_id"
    )
    listed = ", ".join(f"'{table}'" for table in KEYED)
    op.execute(
        "UPDATE ops.load SET num_shown = CASE state WHEN 'published' THEN num_loaded ELSE 0 END "
        f"WHERE kind = 'omop' AND table_name IN ({listed})"
    )
    op.drop_constraint(op.f("ck_load_counts"), "load", schema="ops", type_="check")
    op.create_check_constraint(
        op.f("ck_load_counts"), "load", "num_read = num_loaded + num_rejected + num_same + num_deleted", schema="ops"
    )
    op.create_index(op.f("ix_load_delivery_id"), "load", ["delivery_id"], unique=False, schema="ops")
    op.create_table(
        "load_change",
        sa.Column("delivery_id", sa.Integer(), autoincrement=False, nullable=False, comment="Delivery"),
        sa.Column("table_name", sa.Text(), nullable=False, comment="Table"),
        sa.Column("source_id", sa.Integer(), nullable=False, comment="Source"),
        sa.Column("num_before", sa.BigInteger(), nullable=False, comment="Rows its source showed before"),
        sa.Column("num_after", sa.BigInteger(), nullable=False, comment="Rows its source showed after"),
        sa.Column("num_added", sa.BigInteger(), nullable=False, comment="Rows whose primary key was not shown before"),
        sa.Column("num_changed", sa.BigInteger(), nullable=False, comment="Rows of a known key with other content"),
        sa.Column("num_removed", sa.BigInteger(), nullable=False, comment="Rows whose key is no longer shown"),
        sa.ForeignKeyConstraint(["source_id"], ["ops.source.source_id"], name=op.f("fk_load_change_source_id_source")),
        sa.PrimaryKeyConstraint("delivery_id", "table_name", name=op.f("pk_load_change")),
        schema="ops",
        comment="What a delivery changed, table by table, against what its source showed before.",
    )
    op.add_column(
        "event",
        sa.Column(
            "unknown_visit_id",
            sa.BigInteger(),
            nullable=True,
            comment="Visit that the extract names and does not hold; it becomes visit_occurrence_id when it comes",
        ),
        schema="omop",
    )
    op.create_table(
        "member_digest",
        sa.Column("label_set_id", sa.Integer(), autoincrement=False, nullable=False, comment="Label set"),
        sa.Column("cohort_member_id", sa.BigInteger(), autoincrement=False, nullable=False, comment="Member"),
        sa.Column(
            "digest",
            sa.LargeBinary(),
            nullable=False,
            comment="First 16 bytes of sha256 over the timeline, periods, visits, birth and scan at labelling",
        ),
        sa.ForeignKeyConstraint(
            ["label_set_id"],
            ["label.label_set.label_set_id"],
            name=op.f("fk_member_digest_label_set_id_label_set"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("label_set_id", "cohort_member_id", name=op.f("pk_member_digest")),
        schema="label",
        comment="What each member's labels were made of, so that changed members are found.",
    )
    op.create_table(
        "embedded_scan",
        sa.Column("checkpoint_id", sa.Integer(), autoincrement=False, nullable=False, comment="Checkpoint"),
        sa.Column("image_occurrence_id", sa.BigInteger(), autoincrement=False, nullable=False, comment="Scan"),
        sa.Column("sha256", sa.LargeBinary(), nullable=True, comment="Digest of the content that was embedded"),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"],
            ["model.checkpoint.checkpoint_id"],
            name=op.f("fk_embedded_scan_checkpoint_id_checkpoint"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("checkpoint_id", "image_occurrence_id", name=op.f("pk_embedded_scan")),
        schema="model",
        comment="What content each embedding was made of, so that changed scans are found.",
    )
    reading = ", ".join((role("api"), role("reader")))
    new_columns = ", ".join(column.name for column in LOAD_COLUMNS)
    op.execute(f"GRANT SELECT ({new_columns}) ON ops.load TO {reading}")
    op.execute(f"GRANT SELECT (unknown_visit_id) ON omop.event TO {reading}")
    op.execute(f"GRANT SELECT ON ops.load_change, label.member_digest, model.embedded_scan TO {reading}")
    op.execute(f"GRANT {WRITES} ON ops.load_change TO {role('loader')}, {role('worker')}")
    op.execute(f"GRANT {WRITES} ON label.member_digest, model.embedded_scan TO {role('worker')}")


def downgrade() -> None:
    op.drop_table("embedded_scan", schema="model")
    op.drop_table("member_digest", schema="label")
    op.drop_column("event", "unknown_visit_id", schema="omop")
    op.drop_table("load_change", schema="ops")
    op.drop_constraint(op.f("ck_load_counts"), "load", schema="ops", type_="check")
    for column in reversed(LOAD_COLUMNS):
        op.drop_column("load", column.name, schema="ops")
    op.execute("UPDATE ops.load SET num_read = num_loaded + num_rejected")
    op.create_check_constraint(op.f("ck_load_counts"), "load", "num_read = num_loaded + num_rejected", schema="ops")
