"""What a machine made: checkpoints, embeddings, predictions and metrics."""

from __future__ import annotations

import datetime as dt
from typing import Any

from pgvector.sqlalchemy import HALFVEC
from sqlalchemy import (
    REAL,
    BigInteger,
    Boolean,
    Float,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    SmallInteger,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import Mapped

from app.schema.base import MOMENT, NOW, Base, column


class Checkpoint(Base):
    """Weights in a file named by its digest."""

    __tablename__ = "checkpoint"
    __table_args__ = (
        Index(None, "name"),
        Index(None, "sha256"),
        {"schema": "model", "comment": "Weights of an encoder (and head), with all that made them."},
    )

    checkpoint_id: Mapped[int] = column("Key", Integer, Identity(), primary_key=True)
    name: Mapped[str] = column("Name given at training; the newest finished of a name is meant by it", Text)
    sha256: Mapped[str] = column("Digest of the weights file, hexadecimal", Text)
    arm: Mapped[str] = column(
        "base, untrained, mtl, visit or tte; external where the vectors were made elsewhere", Text
    )
    encoder: Mapped[str] = column("Encoder", Text)
    width: Mapped[int] = column("Length of its embeddings", Integer)
    recipe: Mapped[dict[str, Any]] = column("The complete recipe", JSONB)
    seed: Mapped[int] = column("Seed", BigInteger)
    step: Mapped[int] = column("Optimiser steps taken", Integer)
    num_steps: Mapped[int] = column("Steps of the whole run", Integer)
    epoch: Mapped[int] = column("Epochs finished", Integer, server_default=text("0"))
    is_best: Mapped[bool] = column(
        "True for the stop on the way that was the best of its run by the figure its recipe watches",
        Boolean,
        server_default=text("false"),
    )
    is_retreat: Mapped[bool] = column(
        "True for the stop on the way to which its run goes back when it diverges",
        Boolean,
        server_default=text("false"),
    )
    is_final: Mapped[bool] = column("True for the end of a run, False for a stop on the way", Boolean)
    parent_id: Mapped[int | None] = column("Checkpoint it continues", ForeignKey("model.checkpoint.checkpoint_id"))
    label_set_id: Mapped[int | None] = column("Labels it learnt from", ForeignKey("label.label_set.label_set_id"))
    cohort_id: Mapped[int | None] = column("Cohort it learnt from", Integer)
    shuffled: Mapped[bool] = column(
        "True where volumes were permuted among persons (a control)", Boolean, server_default=text("false")
    )
    root: Mapped[str] = column("Root name of the artifact store", Text, server_default=text("'artifacts'"))
    path: Mapped[str] = column("File, relative to its root", Text)
    num_bytes: Mapped[int] = column("File size", BigInteger)
    validation: Mapped[dict[str, Any]] = column(
        "Losses on tuning, gain over the null model", JSONB, server_default=text("'{}'")
    )
    code_version: Mapped[str] = column("Version of Lachesis", Text)
    created_at: Mapped[dt.datetime] = column("When", MOMENT, server_default=NOW)
    job_id: Mapped[int | None] = column("The job that made it", BigInteger)
    fence: Mapped[int | None] = column("The attempt's fence", BigInteger)


class Alias(Base):
    """A standing name such as champion."""

    __tablename__ = "alias"
    __table_args__ = (
        Index("ix_alias_current", "alias", unique=True, postgresql_where=text("valid_to IS NULL")),
        {"schema": "model", "comment": "Which checkpoint an alias meant, and when."},
    )

    alias_id: Mapped[int] = column("Key", Integer, Identity(), primary_key=True)
    alias: Mapped[str] = column("Alias, e.g. champion", Text)
    checkpoint_id: Mapped[int] = column("Checkpoint", ForeignKey("model.checkpoint.checkpoint_id"))
    valid_from: Mapped[dt.datetime] = column("From", MOMENT, server_default=NOW)
    valid_to: Mapped[dt.datetime | None] = column("Until; null while it holds", MOMENT)
    reason: Mapped[str | None] = column("Why", Text)


class Embedding(Base):
    """A scan's vector under one checkpoint. Partitioned by checkpoint."""

    __tablename__ = "embedding"
    __table_args__ = {
        "schema": "model",
        "comment": "Standardised embeddings, one partition a checkpoint; search them with model.neighbours.",
        "postgresql_partition_by": "LIST (checkpoint_id)",
    }

    checkpoint_id: Mapped[int] = column("Checkpoint; the partition key", Integer, primary_key=True, autoincrement=False)
    image_occurrence_id: Mapped[int] = column("Scan", BigInteger, primary_key=True, autoincrement=False)
    embedding: Mapped[Any] = column("Vector, standardised by the train mean and SD", HALFVEC())


class IncomingEmbedding(Base):
    """A vector of an embedding that has not ended."""

    __tablename__ = "incoming_embedding"
    __table_args__ = {
        "schema": "model",
        "comment": "Embeddings of jobs that have not ended; they move to model.embedding together. Unlogged.",
        "prefixes": ["UNLOGGED"],
    }

    checkpoint_id: Mapped[int] = column(
        "Checkpoint", ForeignKey("model.checkpoint.checkpoint_id", ondelete="CASCADE"), primary_key=True
    )
    cohort_id: Mapped[int] = column(
        "Cohort being embedded", ForeignKey("label.cohort.cohort_id", ondelete="CASCADE"), primary_key=True
    )
    image_occurrence_id: Mapped[int] = column("Scan", BigInteger, primary_key=True, autoincrement=False)
    sha256: Mapped[bytes] = column("Digest of the scan's content", LargeBinary)
    embedding: Mapped[Any] = column("Vector, standardised by the train mean and SD", HALFVEC())


class EmbeddedScan(Base):
    """What an embedding was made of."""

    __tablename__ = "embedded_scan"
    __table_args__ = {
        "schema": "model",
        "comment": "What content each embedding was made of, so that changed scans are found.",
    }

    checkpoint_id: Mapped[int] = column(
        "Checkpoint", ForeignKey("model.checkpoint.checkpoint_id", ondelete="CASCADE"), primary_key=True
    )
    image_occurrence_id: Mapped[int] = column("Scan", BigInteger, primary_key=True, autoincrement=False)
    sha256: Mapped[bytes | None] = column("Digest of the content that was embedded", LargeBinary)


class EmbeddingIndex(Base):
    """How an index of embeddings is searched."""

    __tablename__ = "embedding_index"
    __table_args__ = {
        "schema": "model",
        "comment": "How wide the index of a checkpoint's embeddings is searched, and what it finds so.",
    }

    checkpoint_id: Mapped[int] = column(
        "Checkpoint", ForeignKey("model.checkpoint.checkpoint_id", ondelete="CASCADE"), primary_key=True
    )
    ef_search: Mapped[int] = column(
        "Candidates a search keeps: the fewest that gave a recall of .99, or 1000 where none did", Integer
    )
    recall: Mapped[float] = column("Share of the ten exactly nearest scans that model.neighbours finds so", Float)
    num_queries: Mapped[int] = column("Scans whose neighbours were compared", Integer)
    num_embeddings: Mapped[int] = column("Embeddings in the index then", BigInteger)
    created_at: Mapped[dt.datetime] = column("When", MOMENT, server_default=NOW)


class EmbeddingSet(Base):
    """The float32 embeddings of a checkpoint and cohort, as a file."""

    __tablename__ = "embedding_set"
    __table_args__ = {
        "schema": "model",
        "comment": "One embedding of a cohort by a checkpoint: its exact float32 file and the standardisation.",
    }

    checkpoint_id: Mapped[int] = column(
        "Checkpoint", ForeignKey("model.checkpoint.checkpoint_id", ondelete="CASCADE"), primary_key=True
    )
    cohort_id: Mapped[int] = column(
        "Cohort", ForeignKey("label.cohort.cohort_id", ondelete="CASCADE"), primary_key=True
    )
    root: Mapped[str] = column("Root name", Text, server_default=text("'artifacts'"))
    path: Mapped[str] = column(
        "safetensors file: image_occurrence_id, embedding (standardised float32), mean, sd", Text
    )
    sha256: Mapped[str] = column("Digest of the file", Text)
    mean: Mapped[list[float]] = column("Train mean of the raw embeddings", ARRAY(Float))
    sd: Mapped[list[float]] = column("Train standard deviation", ARRAY(Float))
    num_scans: Mapped[int] = column("Scans embedded", Integer)
    recall: Mapped[float | None] = column(
        "Share of the ten exactly nearest scans that the index finds, on some scans; null without an index", Float
    )
    num_failed: Mapped[int] = column("Scans that could not be read", Integer)
    shared_volumes: Mapped[int] = column("Scans whose content equals another person's scan", Integer)
    created_at: Mapped[dt.datetime] = column("When", MOMENT, server_default=NOW)
    job_id: Mapped[int | None] = column("The job that made it", BigInteger)


class Prediction(Base):
    """One predicted number for one member and task."""

    __tablename__ = "prediction"
    __table_args__ = (
        Index(None, "label_set_id", "position", "cohort_member_id"),
        Index(None, "checkpoint_id"),
        {"schema": "model", "comment": "Predictions of heads on frozen embeddings. Not for the care of a person."},
    )

    prediction_id: Mapped[int] = column("Key", BigInteger, Identity(), primary_key=True)
    checkpoint_id: Mapped[int | None] = column(
        "Checkpoint; null for inputs without an image model",
        ForeignKey("model.checkpoint.checkpoint_id", ondelete="CASCADE"),
    )
    head: Mapped[str] = column("cox, logistic, given", Text)
    inputs: Mapped[str] = column("image, age+sex, age+sex+image, voxels, truth", Text)
    label_set_id: Mapped[int] = column("Labels", ForeignKey("label.label_set.label_set_id", ondelete="CASCADE"))
    position: Mapped[int] = column("Task", SmallInteger)
    cohort_member_id: Mapped[int] = column("Member", BigInteger)
    split: Mapped[str] = column("Split", Text)
    horizon_days: Mapped[int | None] = column("Horizon; null for a risk score", Integer)
    kind: Mapped[str] = column("risk_score, net or cumulative_incidence", Text)
    value: Mapped[float] = column("Value", REAL)
    seed: Mapped[int | None] = column("Training seed", BigInteger)
    job_id: Mapped[int | None] = column("The job that made it", BigInteger)


class Metric(Base):
    """One number about predictions."""

    __tablename__ = "metric"
    __table_args__ = (
        Index(None, "label_set_id", "task", "metric"),
        Index(None, "checkpoint_id"),
        {
            "schema": "model",
            "comment": "Metrics with person-level intervals; a null value carries its reason.",
        },
    )

    metric_id: Mapped[int] = column("Key", BigInteger, Identity(), primary_key=True)
    checkpoint_id: Mapped[int | None] = column(
        "Checkpoint; null for inputs without an image model",
        ForeignKey("model.checkpoint.checkpoint_id", ondelete="CASCADE"),
    )
    reference_checkpoint_id: Mapped[int | None] = column(
        "For a paired difference: what is subtracted", ForeignKey("model.checkpoint.checkpoint_id", ondelete="CASCADE")
    )
    label_set_id: Mapped[int] = column("Labels", ForeignKey("label.label_set.label_set_id", ondelete="CASCADE"))
    head: Mapped[str] = column("cox, logistic, given", Text)
    inputs: Mapped[str] = column("image, age+sex, age+sex+image, voxels, truth", Text)
    reference_inputs: Mapped[str | None] = column("For a paired difference: inputs of what is subtracted", Text)
    task: Mapped[str | None] = column("Task name; null for a mean over tasks", Text)
    metric: Mapped[str] = column("harrell_c, uno_c, auroc, ibs, …; mean_… over tasks", Text)
    horizon_days: Mapped[int | None] = column("Horizon, where the metric has one", Integer)
    split: Mapped[str] = column("Split judged", Text)
    subgroup: Mapped[str | None] = column("Subgroup; null for all", Text)
    arm: Mapped[str | None] = column("Arm of the checkpoint", Text)
    value: Mapped[float | None] = column("Value; null where not estimable", Float)
    ci_low: Mapped[float | None] = column("Lower end of the 95 % interval, bootstrap by person", Float)
    ci_high: Mapped[float | None] = column("Upper end", Float)
    p_value: Mapped[float | None] = column("Two-sided, where asked for", Float)
    n: Mapped[int] = column("Scans", Integer)
    num_persons: Mapped[int | None] = column("Persons", Integer)
    num_events: Mapped[int] = column("Events", Integer)
    replicates: Mapped[int | None] = column("Bootstrap replicates", Integer)
    unit: Mapped[str] = column("What was resampled: person or scan", Text, server_default=text("'person'"))
    shared_volumes: Mapped[int | None] = column(
        "Scans whose content equals another person's; not an evaluation where > 0", Integer
    )
    flags: Mapped[list[str]] = column(
        "few_events, shared_volumes, simulated, arbitrary_pairing, …", ARRAY(Text), server_default=text("'{}'")
    )
    reason: Mapped[str | None] = column("Why value is null", Text)
    seed: Mapped[int | None] = column("Training seed", BigInteger)
    created_at: Mapped[dt.datetime] = column("When", MOMENT, server_default=NOW)
    job_id: Mapped[int | None] = column("The job that made it", BigInteger)


class Report(Base):
    """A page made of rows."""

    __tablename__ = "report"
    __table_args__ = (
        Index(None, "name"),
        {"schema": "model", "comment": "Reports written, with the file and its digest."},
    )

    report_id: Mapped[int] = column("Key", Integer, Identity(), primary_key=True)
    name: Mapped[str] = column("Name", Text)
    root: Mapped[str] = column("Root name", Text, server_default=text("'artifacts'"))
    path: Mapped[str] = column("File, relative to its root", Text)
    sha256: Mapped[str] = column("Digest", Text)
    created_at: Mapped[dt.datetime] = column("When", MOMENT, server_default=NOW)
    job_id: Mapped[int | None] = column("The job that made it", BigInteger)
