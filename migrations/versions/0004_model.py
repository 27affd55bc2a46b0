"""What a machine made: checkpoints, embeddings, predictions and metrics.

Revision 0004, after 0003.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from pgvector.sqlalchemy import HALFVEC
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

TABLES = ("embedding", "report", "checkpoint", "alias", "embedding_set", "metric", "prediction")


def upgrade() -> None:
    op.execute("CREATE SCHEMA IF NOT EXISTS model")

    op.create_table(
        "embedding",
        sa.Column(
            "checkpoint_id", sa.Integer(), autoincrement=False, nullable=False, comment="Checkpoint; the partition key"
        ),
        sa.Column("image_occurrence_id", sa.BigInteger(), autoincrement=False, nullable=False, comment="Scan"),
        sa.Column("embedding", HALFVEC(), nullable=False, comment="Vector, standardised by the train mean and SD"),
        sa.PrimaryKeyConstraint("checkpoint_id", "image_occurrence_id", name=op.f("pk_embedding")),
        schema="model",
        comment="Standardised embeddings, one partition a checkpoint; search them with model.neighbours.",
        postgresql_partition_by="LIST (checkpoint_id)",
    )
    op.create_table(
        "report",
        sa.Column("report_id", sa.Integer(), sa.Identity(always=False), nullable=False, comment="Key"),
        sa.Column("name", sa.Text(), nullable=False, comment="Name"),
        sa.Column("root", sa.Text(), server_default=sa.text("'artifacts'"), nullable=False, comment="Root name"),
        sa.Column("path", sa.Text(), nullable=False, comment="File, relative to its root"),
        sa.Column("sha256", sa.Text(), nullable=False, comment="Digest"),
        sa.Column(
            "created_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
            comment="When",
        ),
        sa.Column("job_id", sa.BigInteger(), nullable=True, comment="The job that made it"),
        sa.PrimaryKeyConstraint("report_id", name=op.f("pk_report")),
        schema="model",
        comment="Reports written, with the file and its digest.",
    )
    op.create_index(op.f("ix_report_name"), "report", ["name"], unique=False, schema="model")
    op.create_table(
        "checkpoint",
        sa.Column("checkpoint_id", sa.Integer(), sa.Identity(always=False), nullable=False, comment="Key"),
        sa.Column(
            "name",
            sa.Text(),
            nullable=False,
            comment="Name given at training; the newest finished of a name is meant by it",
        ),
        sa.Column("sha256", sa.Text(), nullable=False, comment="Digest of the weights file, hexadecimal"),
        sa.Column("arm", sa.Text(), nullable=False, comment="base, untrained, mtl, visit or tte"),
        sa.Column("encoder", sa.Text(), nullable=False, comment="Encoder"),
        sa.Column("width", sa.Integer(), nullable=False, comment="Length of its embeddings"),
        sa.Column("recipe", postgresql.JSONB(astext_type=sa.Text()), nullable=False, comment="The complete recipe"),
        sa.Column("seed", sa.BigInteger(), nullable=False, comment="Seed"),
        sa.Column("step", sa.Integer(), nullable=False, comment="Optimiser steps taken"),
        sa.Column("num_steps", sa.Integer(), nullable=False, comment="Steps of the whole run"),
        sa.Column(
            "is_final", sa.Boolean(), nullable=False, comment="True for the end of a run, False for a stop on the way"
        ),
        sa.Column("parent_id", sa.Integer(), nullable=True, comment="Checkpoint it continues"),
        sa.Column("label_set_id", sa.Integer(), nullable=True, comment="Labels it learnt from"),
        sa.Column("cohort_id", sa.Integer(), nullable=True, comment="Cohort it learnt from"),
        sa.Column(
            "shuffled",
            sa.Boolean(),
            server_default=sa.text("false"),
            nullable=False,
            comment="True where volumes were permuted among persons (a control)",
        ),
        sa.Column(
            "root",
            sa.Text(),
            server_default=sa.text("'artifacts'"),
            nullable=False,
            comment="Root name of the artifact store",
        ),
        sa.Column("path", sa.Text(), nullable=False, comment="File, relative to its root"),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False, comment="File size"),
        sa.Column(
            "validation",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default=sa.text("'{}'"),
            nullable=False,
            comment="Losses on tuning, gain over the null model",
        ),
        sa.Column("code_version", sa.Text(), nullable=False, comment="Version of Lachesis"),
        sa.Column(
            "created_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
            comment="When",
        ),
        sa.Column("job_id", sa.BigInteger(), nullable=True, comment="The job that made it"),
        sa.Column("fence", sa.BigInteger(), nullable=True, comment="The attempt's fence"),
        sa.ForeignKeyConstraint(
            ["label_set_id"], ["label.label_set.label_set_id"], name=op.f("fk_checkpoint_label_set_id_label_set")
        ),
        sa.ForeignKeyConstraint(
            ["parent_id"], ["model.checkpoint.checkpoint_id"], name=op.f("fk_checkpoint_parent_id_checkpoint")
        ),
        sa.PrimaryKeyConstraint("checkpoint_id", name=op.f("pk_checkpoint")),
        schema="model",
        comment="Weights of an encoder (and head), with all that made them.",
    )
    op.create_index(op.f("ix_checkpoint_name"), "checkpoint", ["name"], unique=False, schema="model")
    op.create_index(op.f("ix_checkpoint_sha256"), "checkpoint", ["sha256"], unique=False, schema="model")
    op.create_table(
        "alias",
        sa.Column("alias_id", sa.Integer(), sa.Identity(always=False), nullable=False, comment="Key"),
        sa.Column("alias", sa.Text(), nullable=False, comment="Alias, e.g. champion"),
        sa.Column("checkpoint_id", sa.Integer(), nullable=False, comment="Checkpoint"),
        sa.Column(
            "valid_from",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
            comment="From",
        ),
        sa.Column("valid_to", postgresql.TIMESTAMP(timezone=True), nullable=True, comment="Until; null while it holds"),
        sa.Column("reason", sa.Text(), nullable=True, comment="Why"),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"], ["model.checkpoint.checkpoint_id"], name=op.f("fk_alias_checkpoint_id_checkpoint")
        ),
        sa.PrimaryKeyConstraint("alias_id", name=op.f("pk_alias")),
        schema="model",
        comment="Which checkpoint an alias meant, and when.",
    )
    op.create_index(
        "ix_alias_current",
        "alias",
        ["alias"],
        unique=True,
        schema="model",
        postgresql_where=sa.text("valid_to IS NULL"),
    )
    op.create_table(
        "embedding_set",
        sa.Column("checkpoint_id", sa.Integer(), nullable=False, comment="Checkpoint"),
        sa.Column("cohort_id", sa.Integer(), nullable=False, comment="Cohort"),
        sa.Column("root", sa.Text(), server_default=sa.text("'artifacts'"), nullable=False, comment="Root name"),
        sa.Column(
            "path",
            sa.Text(),
            nullable=False,
            comment="safetensors file: image_occurrence_id, embedding (standardised float32), mean, sd",
        ),
        sa.Column("sha256", sa.Text(), nullable=False, comment="Digest of the file"),
        sa.Column("mean", postgresql.ARRAY(sa.Float()), nullable=False, comment="Train mean of the raw embeddings"),
        sa.Column("sd", postgresql.ARRAY(sa.Float()), nullable=False, comment="Train standard deviation"),
        sa.Column("num_scans", sa.Integer(), nullable=False, comment="Scans embedded"),
        sa.Column("num_failed", sa.Integer(), nullable=False, comment="Scans that could not be read"),
        sa.Column(
            "shared_volumes", sa.Integer(), nullable=False, comment="Scans whose content equals another person's scan"
        ),
        sa.Column(
            "created_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
            comment="When",
        ),
        sa.Column("job_id", sa.BigInteger(), nullable=True, comment="The job that made it"),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"],
            ["model.checkpoint.checkpoint_id"],
            name=op.f("fk_embedding_set_checkpoint_id_checkpoint"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["cohort_id"],
            ["label.cohort.cohort_id"],
            name=op.f("fk_embedding_set_cohort_id_cohort"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("checkpoint_id", "cohort_id", name=op.f("pk_embedding_set")),
        schema="model",
        comment="One embedding of a cohort by a checkpoint: its exact float32 file and the standardisation.",
    )
    op.create_table(
        "metric",
        sa.Column("metric_id", sa.BigInteger(), sa.Identity(always=False), nullable=False, comment="Key"),
        sa.Column(
            "checkpoint_id", sa.Integer(), nullable=True, comment="Checkpoint; null for inputs without an image model"
        ),
        sa.Column(
            "reference_checkpoint_id",
            sa.Integer(),
            nullable=True,
            comment="For a paired difference: what is subtracted",
        ),
        sa.Column("label_set_id", sa.Integer(), nullable=False, comment="Labels"),
        sa.Column("head", sa.Text(), nullable=False, comment="cox, logistic, given"),
        sa.Column("inputs", sa.Text(), nullable=False, comment="image, age+sex, age+sex+image, voxels, truth"),
        sa.Column(
            "reference_inputs",
            sa.Text(),
            nullable=True,
            comment="For a paired difference: inputs of what is subtracted",
        ),
        sa.Column("task", sa.Text(), nullable=True, comment="Task name; null for a mean over tasks"),
        sa.Column("metric", sa.Text(), nullable=False, comment="harrell_c, uno_c, auroc, ibs, …; mean_… over tasks"),
        sa.Column("horizon_days", sa.Integer(), nullable=True, comment="Horizon, where the metric has one"),
        sa.Column("split", sa.Text(), nullable=False, comment="Split judged"),
        sa.Column("subgroup", sa.Text(), nullable=True, comment="Subgroup; null for all"),
        sa.Column("arm", sa.Text(), nullable=True, comment="Arm of the checkpoint"),
        sa.Column("value", sa.Float(), nullable=True, comment="Value; null where not estimable"),
        sa.Column("ci_low", sa.Float(), nullable=True, comment="Lower end of the 95 % interval, bootstrap by person"),
        sa.Column("ci_high", sa.Float(), nullable=True, comment="Upper end"),
        sa.Column("p_value", sa.Float(), nullable=True, comment="Two-sided, where asked for"),
        sa.Column("n", sa.Integer(), nullable=False, comment="Scans"),
        sa.Column("num_persons", sa.Integer(), nullable=True, comment="Persons"),
        sa.Column("num_events", sa.Integer(), nullable=False, comment="Events"),
        sa.Column("replicates", sa.Integer(), nullable=True, comment="Bootstrap replicates"),
        sa.Column(
            "unit",
            sa.Text(),
            server_default=sa.text("'person'"),
            nullable=False,
            comment="What was resampled: person or scan",
        ),
        sa.Column(
            "shared_volumes",
            sa.Integer(),
            nullable=True,
            comment="Scans whose content equals another person's; not an evaluation where > 0",
        ),
        sa.Column(
            "flags",
            postgresql.ARRAY(sa.Text()),
            server_default=sa.text("'{}'"),
            nullable=False,
            comment="few_events, shared_volumes, simulated, arbitrary_pairing, …",
        ),
        sa.Column("reason", sa.Text(), nullable=True, comment="Why value is null"),
        sa.Column("seed", sa.BigInteger(), nullable=True, comment="Training seed"),
        sa.Column(
            "created_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
            comment="When",
        ),
        sa.Column("job_id", sa.BigInteger(), nullable=True, comment="The job that made it"),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"],
            ["model.checkpoint.checkpoint_id"],
            name=op.f("fk_metric_checkpoint_id_checkpoint"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["label_set_id"],
            ["label.label_set.label_set_id"],
            name=op.f("fk_metric_label_set_id_label_set"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["reference_checkpoint_id"],
            ["model.checkpoint.checkpoint_id"],
            name=op.f("fk_metric_reference_checkpoint_id_checkpoint"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("metric_id", name=op.f("pk_metric")),
        schema="model",
        comment="Metrics with person-level intervals; a null value carries its reason.",
    )
    op.create_index(op.f("ix_metric_checkpoint_id"), "metric", ["checkpoint_id"], unique=False, schema="model")
    op.create_index(
        op.f("ix_metric_label_set_id_task_metric"),
        "metric",
        ["label_set_id", "task", "metric"],
        unique=False,
        schema="model",
    )
    op.create_table(
        "prediction",
        sa.Column("prediction_id", sa.BigInteger(), sa.Identity(always=False), nullable=False, comment="Key"),
        sa.Column(
            "checkpoint_id", sa.Integer(), nullable=True, comment="Checkpoint; null for inputs without an image model"
        ),
        sa.Column("head", sa.Text(), nullable=False, comment="cox, logistic, given"),
        sa.Column("inputs", sa.Text(), nullable=False, comment="image, age+sex, age+sex+image, voxels, truth"),
        sa.Column("label_set_id", sa.Integer(), nullable=False, comment="Labels"),
        sa.Column("position", sa.SmallInteger(), nullable=False, comment="Task"),
        sa.Column("cohort_member_id", sa.BigInteger(), nullable=False, comment="Member"),
        sa.Column("split", sa.Text(), nullable=False, comment="Split"),
        sa.Column("horizon_days", sa.Integer(), nullable=True, comment="Horizon; null for a risk score"),
        sa.Column("kind", sa.Text(), nullable=False, comment="risk_score, net or cumulative_incidence"),
        sa.Column("value", sa.REAL(), nullable=False, comment="Value"),
        sa.Column("seed", sa.BigInteger(), nullable=True, comment="Training seed"),
        sa.Column("job_id", sa.BigInteger(), nullable=True, comment="The job that made it"),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"],
            ["model.checkpoint.checkpoint_id"],
            name=op.f("fk_prediction_checkpoint_id_checkpoint"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["label_set_id"],
            ["label.label_set.label_set_id"],
            name=op.f("fk_prediction_label_set_id_label_set"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("prediction_id", name=op.f("pk_prediction")),
        schema="model",
        comment="Predictions of heads on frozen embeddings. Not for the care of a person.",
    )
    op.create_index(op.f("ix_prediction_checkpoint_id"), "prediction", ["checkpoint_id"], unique=False, schema="model")
    op.create_index(
        op.f("ix_prediction_label_set_id_position_cohort_member_id"),
        "prediction",
        ["label_set_id", "position", "cohort_member_id"],
        unique=False,
        schema="model",
    )


def downgrade() -> None:
    for table in reversed(TABLES):
        op.drop_table(table, schema="model")
    op.execute("DROP SCHEMA model CASCADE")
