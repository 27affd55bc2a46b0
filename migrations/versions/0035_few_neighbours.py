"""Neighbours among few scans are found from these scans, not by asking every embedding whether it is one of them.

Revision 0035, after 0034.
"""

from __future__ import annotations

from importlib import import_module

import sqlalchemy as sa
from alembic import op

revision = "0035"
down_revision = "0034"
branch_labels = None
depends_on = None

# Among few scans all distances are computed (the first + 0 keeps the index away): exact, and quick, for the planner may
# begin with the scans that meet the conditions. Among many the index is walked until k of them are found; OFFSET 0 has
# each scan it gives asked for the conditions. It gives them nearly in order, so they are sorted again; the last + 0
# keeps the planner from taking them for sorted. Rows of embedded_scan are counted, since they are small.
NEIGHBOURS_SQL = """
CREATE OR REPLACE FUNCTION model.neighbours_sql(
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
    joined text;
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
        joined := replace(conditions, ' OFFSET 0)', ')');
        EXECUTE format(
            'SELECT count(*) FROM (SELECT FROM model.embedded_scan e WHERE e.checkpoint_id = %s%s LIMIT %s) f',
            id, joined, few + 1) INTO wanted;
        IF wanted <= few THEN
            conditions := joined;
            exactly := ' + 0';
        END IF;
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

INDEX_PARTITION = """
CREATE OR REPLACE FUNCTION model.index_embedding_partition(checkpoint_id integer) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {vector}, pg_temp AS $$
DECLARE
    part text := 'embedding_' || $1;
    width integer;
BEGIN
    SELECT c.width INTO width FROM model.checkpoint c WHERE c.checkpoint_id = $1;
    IF width IS NULL OR to_regclass('model.' || part) IS NULL THEN
        RAISE EXCEPTION 'Checkpoint % has no embeddings.', $1 USING ERRCODE = 'no_data_found';
    END IF;
    IF width <= 4000 THEN  -- the longest halfvec that an HNSW index takes
        EXECUTE format('CREATE INDEX IF NOT EXISTS %I ON model.%I USING hnsw
            ((embedding::halfvec(%s)) halfvec_cosine_ops) WITH (m = 16, ef_construction = 128)',
            part || '_hnsw', part, width);
    END IF;
    EXECUTE format('ANALYZE model.%I', part);
    ANALYZE model.embedded_scan;  -- filtered searches are planned by it
    RETURN width <= 4000;
END $$
"""


def _index_partition(function: str) -> None:
    vector = op.get_bind().scalar(
        sa.text(
            "SELECT quote_ident(nspname) FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace "
            "WHERE e.extname = 'vector'"
        )
    )
    op.execute(sa.text(function.format(vector=vector).replace(":", r"\:")))


def upgrade() -> None:
    op.execute(NEIGHBOURS_SQL)
    _index_partition(INDEX_PARTITION)


def downgrade() -> None:
    before = import_module("migrations.versions.0028_neighbours_tuned").NEIGHBOURS_SQL
    op.execute(before.replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION"))
    first = import_module("migrations.versions.0006_functions").INDEX_PARTITION
    _index_partition(first.replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION"))
