"""Neighbours as wide a search as an index needs, and only among scans of a verdict; arm `external` is told of.

Revision 0028, after 0027.
"""

from __future__ import annotations

from importlib import import_module

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from migrations.roles import role

revision = "0028"
down_revision = "0027"
branch_labels = None
depends_on = None

# Among few scans all distances are computed (the first + 0 keeps the index away): exact, and quick. Among many the
# index is walked until k of them are found. It gives them nearly in order (relaxed_order finds more than strict_order),
# so they are sorted again; the last + 0 keeps the planner from taking them for sorted, as Postgres 17 and later do.
NEIGHBOURS_SQL = """
CREATE FUNCTION model.neighbours_sql(
    image bigint, checkpoint text, k integer DEFAULT 10, cohort text DEFAULT NULL, split text DEFAULT NULL,
    gender_concept_id integer DEFAULT NULL, min_age float8 DEFAULT NULL, max_age float8 DEFAULT NULL,
    same_person boolean DEFAULT true, verdict text DEFAULT NULL)
RETURNS text LANGUAGE plpgsql STABLE AS $$
#variable_conflict use_column
DECLARE
    id integer := model.find_checkpoint($2);
    width integer;
    chosen integer;
    conditions text := '';
    few bigint;
    wanted bigint;
    exactly text := '';
BEGIN
    SELECT vector_dims(e.embedding) INTO width FROM model.embedding e
    WHERE e.checkpoint_id = id AND e.image_occurrence_id = $1;
    IF width IS NULL THEN
        RAISE EXCEPTION 'Scan % has no embedding by checkpoint ''%''; `lachesis embed` makes them.', $1, $2
            USING ERRCODE = 'no_data_found';
    END IF;
    IF $3 IS NULL OR $3 < 1 THEN
        RAISE EXCEPTION 'Expected k of 1 or more, found %.', $3 USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF $10 IS NOT NULL AND $10 NOT IN ('ok', 'suspect', 'unusable') THEN
        RAISE EXCEPTION 'Expected ok, suspect or unusable as verdict, found ''%''.', $10
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF $4 IS NOT NULL OR $5 IS NOT NULL THEN
        SELECT c.cohort_id INTO chosen FROM label.cohort c
        WHERE CASE WHEN $4 IS NULL THEN c.cohort_id = (
                  SELECT s.cohort_id FROM model.embedding_set s WHERE s.checkpoint_id = id
                  ORDER BY s.created_at DESC LIMIT 1)
              ELSE c.name = split_part($4, '@', 1) AND CASE WHEN strpos($4, '@') = 0 THEN c.is_current
                                                       ELSE c.version::text = split_part($4, '@', 2) END END;
        IF chosen IS NULL THEN
            RAISE EXCEPTION 'Expected a cohort, found none called ''%''; SELECT name FROM label.cohort lists them.', $4
                USING ERRCODE = 'no_data_found';
        END IF;
        IF $5 IS NOT NULL AND $5 NOT IN ('train', 'tuning', 'held_out') THEN
            RAISE EXCEPTION 'Expected train, tuning or held_out as split, found ''%''.', $5
                USING ERRCODE = 'invalid_parameter_value';
        END IF;
        conditions := format(
            ' AND EXISTS (SELECT FROM label.cohort_member m WHERE m.cohort_id = %s AND '
            'm.image_occurrence_id = e.image_occurrence_id%s OFFSET 0)',
            chosen, CASE WHEN $5 IS NULL THEN '' ELSE format(' AND m.split = %L', $5) END);
    END IF;
    IF $6 IS NOT NULL OR $7 IS NOT NULL OR $8 IS NOT NULL OR $10 IS NOT NULL OR NOT $9 THEN
        conditions := conditions
            || ' AND EXISTS (SELECT FROM omop.image_occurrence i'
            || CASE WHEN $6 IS NULL AND $7 IS NULL AND $8 IS NULL THEN ''
                    ELSE ' JOIN omop.person p USING (person_id)' END
            || ' WHERE i.image_occurrence_id = e.image_occurrence_id'
            || CASE WHEN $6 IS NULL THEN '' ELSE format(' AND p.gender_concept_id = %s', $6) END
            || CASE WHEN $7 IS NULL THEN '' ELSE
                   format(' AND i.acquired_at >= p.birth_time + %L * interval ''1 year''', $7) END
            || CASE WHEN $8 IS NULL THEN '' ELSE
                   format(' AND i.acquired_at < p.birth_time + (%L + 1) * interval ''1 year''', $8) END
            || CASE WHEN $9 THEN '' ELSE format(
                   ' AND i.person_id <> (SELECT q.person_id FROM omop.image_occurrence q '
                   'WHERE q.image_occurrence_id = %s)', $1) END
            || CASE WHEN $10 IS NULL THEN '' ELSE format(' AND i.verdict = %L', $10) END
            || ' OFFSET 0)';
    END IF;
    IF conditions <> '' THEN
        few := greatest(2000, 50 * $3::bigint);
        EXECUTE format('SELECT count(*) FROM (SELECT FROM model.embedding e WHERE e.checkpoint_id = %s%s LIMIT %s) f',
                       id, conditions, few + 1) INTO wanted;
        exactly := CASE WHEN wanted <= few THEN ' + 0' ELSE '' END;
    END IF;
    RETURN format($statement$
SELECT n.image_occurrence_id, i.person_id, i.acquired_at, n.distance
FROM (
    SELECT e.image_occurrence_id, e.embedding::halfvec(%1$s) <=> q.embedding AS distance
    FROM model.embedding e,
         (SELECT o.embedding::halfvec(%1$s) FROM model.embedding o
          WHERE o.checkpoint_id = %2$s AND o.image_occurrence_id = %3$s) q
    WHERE e.checkpoint_id = %2$s AND e.image_occurrence_id <> %3$s%5$s
    ORDER BY (e.embedding::halfvec(%1$s) <=> (
        SELECT o.embedding::halfvec(%1$s) FROM model.embedding o
        WHERE o.checkpoint_id = %2$s AND o.image_occurrence_id = %3$s))%6$s
    LIMIT %4$s
) n LEFT JOIN omop.image_occurrence i USING (image_occurrence_id)
ORDER BY n.distance + 0, n.image_occurrence_id$statement$, width, id, $1, $3, conditions, exactly);
END $$
"""

# A search that is filtered visits many to find few: what it may visit and keep in mind is raised from pgvector's
# defaults (20,000 scans, once work_mem), lest it end before k are found.
NEIGHBOURS = """
CREATE FUNCTION model.neighbours(
    image bigint, checkpoint text, k integer DEFAULT 10, cohort text DEFAULT NULL, split text DEFAULT NULL,
    gender_concept_id integer DEFAULT NULL, min_age float8 DEFAULT NULL, max_age float8 DEFAULT NULL,
    same_person boolean DEFAULT true, verdict text DEFAULT NULL)
RETURNS TABLE (image_occurrence_id bigint, person_id bigint, acquired_at timestamp, distance float8)
LANGUAGE plpgsql STABLE ROWS 10
SET hnsw.ef_search = 200 SET hnsw.iterative_scan = relaxed_order SET hnsw.max_scan_tuples = 1000000
SET hnsw.scan_mem_multiplier = 64 AS $$
DECLARE
    enough integer;
BEGIN
    SELECT i.ef_search INTO enough FROM model.embedding_index i WHERE i.checkpoint_id = model.find_checkpoint($2);
    -- judged for ten neighbours: more of them need a wider search
    PERFORM set_config('hnsw.ef_search', greatest(coalesce(enough, 200), least(2 * $3, 1000))::text, true);
    RETURN QUERY EXECUTE model.neighbours_sql($1, $2, $3, $4, $5, $6, $7, $8, $9, $10);
END $$
"""

SIGNATURE = "(bigint, text, integer, text, text, integer, float8, float8, boolean, text)"
COMMENTS = {
    "model.neighbours_sql": "The statement that model.neighbours executes, for EXPLAIN",
    "model.neighbours": (
        "The k scans nearest to a scan by cosine distance of their embeddings by one checkpoint; if asked, only among "
        "scans of a cohort (and split of it), of a gender, of an age in years at the scan (max_age included), of other "
        "persons (same_person := false), or of a verdict"
    ),
}
ARM = "base, untrained, mtl, visit or tte; external where the vectors were made elsewhere"


def _grant(signature: str, comments: dict[str, str]) -> None:
    everybody = ", ".join(map(role, ("loader", "worker", "api", "reader")))
    for function, words in comments.items():
        op.execute(f"COMMENT ON FUNCTION {function} IS '{words}'")
        op.execute(f"REVOKE EXECUTE ON FUNCTION {function}{signature} FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON FUNCTION {function}{signature} TO {everybody}")


def upgrade() -> None:
    before = import_module("migrations.versions.0027_neighbours_filters")
    op.create_table(
        "embedding_index",
        sa.Column("checkpoint_id", sa.Integer(), autoincrement=False, nullable=False, comment="Checkpoint"),
        sa.Column(
            "ef_search",
            sa.Integer(),
            nullable=False,
            comment="Candidates a search keeps: the fewest that gave a recall of .99, or 1000 where none did",
        ),
        sa.Column(
            "recall",
            sa.Float(),
            nullable=False,
            comment="Share of the ten exactly nearest scans that model.neighbours finds so",
        ),
        sa.Column("num_queries", sa.Integer(), nullable=False, comment="Scans whose neighbours were compared"),
        sa.Column("num_embeddings", sa.BigInteger(), nullable=False, comment="Embeddings in the index then"),
        sa.Column(
            "created_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
            comment="When",
        ),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"],
            ["model.checkpoint.checkpoint_id"],
            name=op.f("fk_embedding_index_checkpoint_id_checkpoint"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("checkpoint_id", name=op.f("pk_embedding_index")),
        schema="model",
        comment="How wide the index of a checkpoint's embeddings is searched, and what it finds so.",
    )
    op.execute(f"GRANT SELECT ON model.embedding_index TO {role('api')}, {role('reader')}, {role('loader')}")
    op.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON model.embedding_index TO {role('worker')}")
    for function in COMMENTS:
        op.execute(f"DROP FUNCTION {function}{before.SIGNATURE}")
    op.execute(NEIGHBOURS_SQL)
    op.execute(NEIGHBOURS)
    _grant(SIGNATURE, COMMENTS)
    op.alter_column("checkpoint", "arm", schema="model", comment=ARM, existing_type=sa.Text())


def downgrade() -> None:
    before = import_module("migrations.versions.0027_neighbours_filters")
    op.alter_column(
        "checkpoint", "arm", schema="model", comment="base, untrained, mtl, visit or tte", existing_type=sa.Text()
    )
    for function in COMMENTS:
        op.execute(f"DROP FUNCTION {function}{SIGNATURE}")
    op.execute(before.NEIGHBOURS_SQL)
    op.execute(before.NEIGHBOURS)
    _grant(before.SIGNATURE, before.COMMENTS)
    op.drop_table("embedding_index", schema="model")
