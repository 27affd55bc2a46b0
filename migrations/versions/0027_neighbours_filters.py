"""Neighbours among chosen scans alone, and the recall of an index as measured.

Revision 0027, after 0026.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations.roles import role

revision = "0027"
down_revision = "0026"
branch_labels = None
depends_on = None

# Among few scans all distances are computed (the + 0 keeps the index away): exact, and quick. Among many the index is
# walked until k of them are found.
NEIGHBOURS_SQL = """
CREATE FUNCTION model.neighbours_sql(
    image bigint, checkpoint text, k integer DEFAULT 10, cohort text DEFAULT NULL, split text DEFAULT NULL,
    gender_concept_id integer DEFAULT NULL, min_age float8 DEFAULT NULL, max_age float8 DEFAULT NULL,
    same_person boolean DEFAULT true)
RETURNS text LANGUAGE plpgsql STABLE AS $$
#variable_conflict use_column
DECLARE
    id integer := model.find_checkpoint($2);
    width integer;
    chosen integer;
    conditions text := '';
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
    IF $6 IS NOT NULL OR $7 IS NOT NULL OR $8 IS NOT NULL OR NOT $9 THEN
        conditions := conditions
            || ' AND EXISTS (SELECT FROM omop.image_occurrence i JOIN omop.person p USING (person_id) '
            || 'WHERE i.image_occurrence_id = e.image_occurrence_id'
            || CASE WHEN $6 IS NULL THEN '' ELSE format(' AND p.gender_concept_id = %s', $6) END
            || CASE WHEN $7 IS NULL THEN '' ELSE
                   format(' AND i.acquired_at >= p.birth_time + %L * interval ''1 year''', $7) END
            || CASE WHEN $8 IS NULL THEN '' ELSE
                   format(' AND i.acquired_at < p.birth_time + (%L + 1) * interval ''1 year''', $8) END
            || CASE WHEN $9 THEN '' ELSE format(
                   ' AND i.person_id <> (SELECT q.person_id FROM omop.image_occurrence q '
                   'WHERE q.image_occurrence_id = %s)', $1) END
            || ' OFFSET 0)';
    END IF;
    IF conditions <> '' THEN
        EXECUTE format('SELECT count(*) FROM (SELECT FROM model.embedding e WHERE e.checkpoint_id = %s%s LIMIT 2001) f',
                       id, conditions) INTO wanted;
        exactly := CASE WHEN wanted <= 2000 THEN ' + 0' ELSE '' END;
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
ORDER BY n.distance, n.image_occurrence_id$statement$, width, id, $1, $3, conditions, exactly);
END $$
"""

NEIGHBOURS = """
CREATE FUNCTION model.neighbours(
    image bigint, checkpoint text, k integer DEFAULT 10, cohort text DEFAULT NULL, split text DEFAULT NULL,
    gender_concept_id integer DEFAULT NULL, min_age float8 DEFAULT NULL, max_age float8 DEFAULT NULL,
    same_person boolean DEFAULT true)
RETURNS TABLE (image_occurrence_id bigint, person_id bigint, acquired_at timestamp, distance float8)
LANGUAGE plpgsql STABLE ROWS 10
SET hnsw.ef_search = 200 SET hnsw.iterative_scan = strict_order SET hnsw.max_scan_tuples = 1000000 AS $$
BEGIN
    RETURN QUERY EXECUTE model.neighbours_sql($1, $2, $3, $4, $5, $6, $7, $8, $9);
END $$
"""

SIGNATURE = "(bigint, text, integer, text, text, integer, float8, float8, boolean)"
COMMENTS = {
    "model.neighbours_sql": "The statement that model.neighbours executes, for EXPLAIN",
    "model.neighbours": (
        "The k scans nearest to a scan by cosine distance of their embeddings by one checkpoint; if asked, only among "
        "scans of a cohort (and split of it), of a gender, of an age in years at the scan (max_age included), or of "
        "other persons (same_person := false)"
    ),
}


def upgrade() -> None:
    op.execute("DROP FUNCTION model.neighbours(bigint, text, integer)")
    op.execute("DROP FUNCTION model.neighbours_sql(bigint, text, integer)")
    op.execute(NEIGHBOURS_SQL)
    op.execute(NEIGHBOURS)
    everybody = ", ".join(map(role, ("loader", "worker", "api", "reader")))
    for function, words in COMMENTS.items():
        op.execute(f"COMMENT ON FUNCTION {function} IS '{words}'")
        op.execute(f"REVOKE EXECUTE ON FUNCTION {function}{SIGNATURE} FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON FUNCTION {function}{SIGNATURE} TO {everybody}")
    op.add_column(
        "embedding_set",
        sa.Column(
            "recall",
            sa.Float(),
            comment="Share of the ten exactly nearest scans that the index finds, on some scans; null without an index",
        ),
        schema="model",
    )
    op.execute(f"GRANT SELECT (recall) ON model.embedding_set TO {role('api')}, {role('reader')}")


def downgrade() -> None:
    op.drop_column("embedding_set", "recall", schema="model")
    for function in ("neighbours", "neighbours_sql"):
        op.execute(f"DROP FUNCTION model.{function}{SIGNATURE}")
    from importlib import import_module

    before = import_module("migrations.versions.0006_functions")
    everybody = ", ".join(map(role, ("loader", "worker", "api", "reader")))
    for name in ("NEIGHBOURS_SQL", "NEIGHBOURS"):
        op.execute(getattr(before, name))
    for function in ("neighbours", "neighbours_sql"):
        words = before.COMMENTS[f"model.{function}"]
        op.execute(f"COMMENT ON FUNCTION model.{function} IS '{words}'")
        op.execute(f"REVOKE EXECUTE ON FUNCTION model.{function}(bigint, text, integer) FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON FUNCTION model.{function}(bigint, text, integer) TO {everybody}")
