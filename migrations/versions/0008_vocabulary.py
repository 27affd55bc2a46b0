"""The vocabulary kept beside the store, what of it is used, and the search in it.

Revision 0008, after 0007.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from migrations.roles import role

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

# Punctuation splits words, so that `bleed/ulcer` is two of them and no path, and codes keep none of their own parts.
SEARCH_WORDS = r"""
CREATE FUNCTION omop.search_words(name text) RETURNS tsvector LANGUAGE sql IMMUTABLE PARALLEL SAFE AS
$$ SELECT pg_catalog.to_tsvector('pg_catalog.simple',
    pg_catalog.translate(name, '!"#$%&''()*+,-./:;<=>?@[\]^_`{|}~', '                                ')) $$
"""

COUNT = """
INSERT INTO omop.concept_count (source_id, concept_id, num_events, num_persons, num_source_events, num_value_events)
SELECT source_id, concept_id, sum(events), sum(persons), sum(source_events), sum(value_events)
FROM (
    SELECT l.source_id, e.concept_id, count(*) AS events, count(DISTINCT e.person_id) AS persons,
           0 AS source_events, 0 AS value_events
    FROM omop.event e JOIN ops.load l USING (load_id) GROUP BY 1, 2
    UNION ALL
    SELECT l.source_id, e.source_concept_id, 0, 0, count(*), 0
    FROM omop.event e JOIN ops.load l USING (load_id) GROUP BY 1, 2
    UNION ALL
    SELECT l.source_id, v.concept_id, 0, 0, 0, count(*)
    FROM omop.event e JOIN ops.load l USING (load_id)
    CROSS JOIN LATERAL (VALUES (e.value_as_concept_id), (e.unit_concept_id)) v(concept_id)
    WHERE v.concept_id IS NOT NULL GROUP BY 1, 2
) c GROUP BY 1, 2
"""

TABLES = ("omop.vocabulary", "omop.concept_count", "omop.concept_completed", "ops.vocabulary_release")


def upgrade() -> None:
    op.create_table(
        "vocabulary",
        sa.Column("vocabulary_id", sa.Text(), nullable=False, comment="Vocabulary, e.g. SNOMED; None is the whole"),
        sa.Column("vocabulary_name", sa.Text(), nullable=False, comment="Name"),
        sa.Column("vocabulary_reference", sa.Text(), nullable=True, comment="Where it is described"),
        sa.Column("vocabulary_version", sa.Text(), nullable=True, comment="Its version"),
        sa.Column("vocabulary_concept_id", sa.Integer(), nullable=True, comment="Concept that stands for it"),
        sa.PrimaryKeyConstraint("vocabulary_id", name=op.f("pk_vocabulary")),
        schema="omop",
        comment="OMOP VOCABULARY of the vocabulary that was loaded last.",
    )
    op.create_table(
        "concept_count",
        sa.Column("source_id", sa.Integer(), nullable=False, comment="Source"),
        sa.Column("concept_id", sa.Integer(), nullable=False, comment="Concept, in the vocabulary or not; 0 unmapped"),
        sa.Column("num_events", sa.BigInteger(), nullable=False, comment="Events with this concept_id"),
        sa.Column("num_persons", sa.BigInteger(), nullable=False, comment="Persons who have such an event"),
        sa.Column("num_source_events", sa.BigInteger(), nullable=False, comment="Events with this source_concept_id"),
        sa.Column(
            "num_value_events", sa.BigInteger(), nullable=False, comment="Events whose coded value or unit it is"
        ),
        sa.ForeignKeyConstraint(
            ["source_id"], ["ops.source.source_id"], name=op.f("fk_concept_count_source_id_source")
        ),
        sa.PrimaryKeyConstraint("source_id", "concept_id", name=op.f("pk_concept_count")),
        schema="omop",
        comment="How often a source's events name a concept; kept by every load. Persons of two sources never mix.",
    )
    op.create_index(op.f("ix_concept_count_concept_id"), "concept_count", ["concept_id"], schema="omop")
    op.create_table(
        "concept_completed",
        sa.Column("concept_id", sa.Integer(), autoincrement=False, nullable=False, comment="Concept"),
        sa.PrimaryKeyConstraint("concept_id", name=op.f("pk_concept_completed")),
        schema="omop",
        comment="Concepts looked up in the current vocabulary release, found or not: later loads need not again.",
    )
    op.create_table(
        "vocabulary_release",
        sa.Column("vocabulary_release_id", sa.Integer(), sa.Identity(), nullable=False, comment="Key"),
        sa.Column("version", sa.Text(), nullable=False, comment="As the download calls it, e.g. v5.0 27-FEB-25"),
        sa.Column("is_current", sa.Boolean(), nullable=False, comment="True for the one that completes loads"),
        sa.Column("is_full", sa.Boolean(), nullable=False, comment="True where all of it is in the store (--full)"),
        sa.Column("digest", postgresql.BYTEA(), nullable=False, comment="sha256 over the files' digests"),
        sa.Column(
            "files",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="Table: {path among the artifacts, sha256, rows} of what is kept beside the store",
        ),
        sa.Column("job_id", sa.BigInteger(), nullable=True, comment="The job that loaded it"),
        sa.Column(
            "created_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
            comment="When",
        ),
        sa.PrimaryKeyConstraint("vocabulary_release_id", name=op.f("pk_vocabulary_release")),
        schema="ops",
        comment="Vocabularies that were loaded; the current one completes the store's concepts at every load.",
    )
    op.create_index(
        "ix_vocabulary_release_current",
        "vocabulary_release",
        ["is_current"],
        unique=True,
        schema="ops",
        postgresql_where=sa.text("is_current"),
    )
    op.add_column(
        "label_set",
        sa.Column(
            "vocabulary_version",
            sa.Text(),
            nullable=True,
            comment="Vocabulary release when it was made; null where none was loaded",
        ),
        schema="label",
    )
    op.execute(SEARCH_WORDS)
    op.execute("CREATE INDEX ix_concept_words ON omop.concept USING gin (omop.search_words(concept_name))")
    op.execute(
        "CREATE INDEX ix_concept_synonym_words ON omop.concept_synonym "
        "USING gin (omop.search_words(concept_synonym_name))"
    )
    op.execute("CREATE INDEX ix_concept_code ON omop.concept (lower(concept_code) text_pattern_ops)")
    op.execute(COUNT)
    grant()


def grant() -> None:
    """The same rights as on the neighbours; readers see no paths."""
    loader, worker, api, reader = map(role, ("loader", "worker", "api", "reader"))
    for table in TABLES:
        op.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO {loader}")
        op.execute(f"GRANT SELECT ON {table} TO {worker}")
        if table.startswith("omop."):
            op.execute(f"GRANT SELECT ON {table} TO {api}, {reader}")
    shown = "vocabulary_release_id, version, is_current, is_full, digest, job_id, created_at"
    op.execute(f"GRANT SELECT ({shown}) ON ops.vocabulary_release TO {api}, {reader}")
    op.execute(f"GRANT SELECT (vocabulary_version) ON label.label_set TO {api}, {reader}")
    op.execute("REVOKE EXECUTE ON FUNCTION omop.search_words FROM PUBLIC")
    op.execute(f"GRANT EXECUTE ON FUNCTION omop.search_words TO {loader}, {worker}, {api}, {reader}")


def downgrade() -> None:
    for index in ("ix_concept_code", "ix_concept_synonym_words", "ix_concept_words"):
        op.execute(f"DROP INDEX omop.{index}")
    op.execute("DROP FUNCTION omop.search_words(text)")
    op.drop_column("label_set", "vocabulary_version", schema="label")
    op.drop_table("vocabulary_release", schema="ops")
    for table in ("concept_completed", "concept_count", "vocabulary"):
        op.drop_table(table, schema="omop")
