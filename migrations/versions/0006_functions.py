"""Functions of embeddings, and the trigger that guards the life of a job.

Revision 0006, after 0005.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

FIND_CHECKPOINT = """
CREATE FUNCTION model.find_checkpoint(checkpoint text) RETURNS integer LANGUAGE plpgsql STABLE AS $$
DECLARE found_id integer;
BEGIN
    SELECT c.checkpoint_id INTO found_id FROM model.checkpoint c
    WHERE (c.name = $1 AND c.is_final) OR c.checkpoint_id::text = $1
       OR (length($1) >= 6 AND starts_with(c.sha256, $1))
       OR c.checkpoint_id = (SELECT a.checkpoint_id FROM model.alias a WHERE a.alias = $1 AND a.valid_to IS NULL)
    ORDER BY c.name = $1 DESC, c.checkpoint_id DESC LIMIT 1;
    IF found_id IS NULL THEN
        RAISE EXCEPTION 'No checkpoint named ''%''; `lachesis ls checkpoints` lists them.', $1
            USING ERRCODE = 'no_data_found';
    END IF;
    RETURN found_id;
END $$
"""

# The dimension and the checkpoint are literals: with parameters the planner takes neither the partition nor its index.
NEIGHBOURS_SQL = """
CREATE FUNCTION model.neighbours_sql(image bigint, checkpoint text, k integer DEFAULT 10)
RETURNS text LANGUAGE plpgsql STABLE AS $$
DECLARE
    id integer := model.find_checkpoint($2);
    width integer;
BEGIN
    SELECT vector_dims(e.embedding) INTO width FROM model.embedding e
    WHERE e.checkpoint_id = id AND e.image_occurrence_id = $1;
    IF width IS NULL THEN
        RAISE EXCEPTION 'Scan % has no embedding by checkpoint ''%''; `lachesis embed` makes them.', $1, $2
            USING ERRCODE = 'no_data_found';
    END IF;
    IF k IS NULL OR k < 1 THEN
        RAISE EXCEPTION 'Expected k of 1 or more, found %.', k USING ERRCODE = 'invalid_parameter_value';
    END IF;
    RETURN format($statement$
SELECT n.image_occurrence_id, i.person_id, i.acquired_at, n.distance
FROM (
    SELECT e.image_occurrence_id, e.embedding::halfvec(%1$s) <=> q.embedding AS distance
    FROM model.embedding e,
         (SELECT o.embedding::halfvec(%1$s) FROM model.embedding o
          WHERE o.checkpoint_id = %2$s AND o.image_occurrence_id = %3$s) q
    WHERE e.checkpoint_id = %2$s AND e.image_occurrence_id <> %3$s
    ORDER BY e.embedding::halfvec(%1$s) <=> (
        SELECT o.embedding::halfvec(%1$s) FROM model.embedding o
        WHERE o.checkpoint_id = %2$s AND o.image_occurrence_id = %3$s)
    LIMIT %4$s
) n LEFT JOIN omop.image_occurrence i USING (image_occurrence_id)
ORDER BY n.distance, n.image_occurrence_id$statement$, width, id, $1, k);
END $$
"""

NEIGHBOURS = """
CREATE FUNCTION model.neighbours(image bigint, checkpoint text, k integer DEFAULT 10)
RETURNS TABLE (image_occurrence_id bigint, person_id bigint, acquired_at timestamp, distance float8)
LANGUAGE plpgsql STABLE ROWS 10
SET hnsw.ef_search = 200 SET hnsw.iterative_scan = strict_order AS $$
BEGIN
    RETURN QUERY EXECUTE model.neighbours_sql($1, $2, $3);
END $$
"""

# A table made apart and attached takes no lock that readers or other trainings would wait for.
ADD_PARTITION = """
CREATE FUNCTION model.add_embedding_partition(checkpoint_id integer, width integer) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {vector}, pg_temp AS $$
DECLARE
    part text := 'embedding_' || $1;
    declared integer;
BEGIN
    SELECT c.width INTO declared FROM model.checkpoint c WHERE c.checkpoint_id = $1;
    IF declared IS DISTINCT FROM $2 THEN
        RAISE EXCEPTION 'Checkpoint % has embeddings of length %, found %.', $1, declared, $2
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    PERFORM pg_advisory_xact_lock({lock}, $1);
    IF to_regclass('model.' || part) IS NOT NULL THEN
        RETURN;
    END IF;
    EXECUTE format('CREATE TABLE model.%I (LIKE model.embedding INCLUDING ALL,
        CONSTRAINT %I CHECK (checkpoint_id = %s AND vector_dims(embedding) = %s))', part, part || '_width', $1, $2);
    IF 2 * $2 + 200 <= 8000 THEN  -- a vector that fits a page stays in it: exact search is four times faster
        EXECUTE format('ALTER TABLE model.%I ALTER embedding SET STORAGE PLAIN', part);
    END IF;
    EXECUTE format('COMMENT ON TABLE model.%I IS %L', part, 'Embeddings by checkpoint ' || $1);
    EXECUTE format('ALTER TABLE model.embedding ATTACH PARTITION model.%I FOR VALUES IN (%s)', part, $1);
END $$
"""

INDEX_PARTITION = """
CREATE FUNCTION model.index_embedding_partition(checkpoint_id integer) RETURNS boolean
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
    RETURN width <= 4000;
END $$
"""

# queued -> running -> succeeded | failed | cancelled | dead, with retry_wait between; running -> queued when preempted;
# failed, cancelled and dead -> queued when a person retries.
JOB_STEP = """
CREATE FUNCTION ops.check_job_step() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NEW.state = OLD.state OR (OLD.state, NEW.state) IN (
        ('queued', 'running'), ('queued', 'cancelled'),
        ('running', 'succeeded'), ('running', 'failed'), ('running', 'cancelled'), ('running', 'dead'),
        ('running', 'retry_wait'), ('running', 'queued'),
        ('retry_wait', 'running'), ('retry_wait', 'queued'), ('retry_wait', 'cancelled'), ('retry_wait', 'dead'),
        ('failed', 'queued'), ('cancelled', 'queued'), ('dead', 'queued')
    ) THEN
        IF NEW.fence < OLD.fence THEN
            RAISE EXCEPTION 'The fence of job % may not fall from % to %.', OLD.job_id, OLD.fence, NEW.fence
                USING ERRCODE = 'check_violation';
        END IF;
        RETURN NEW;
    END IF;
    RAISE EXCEPTION 'Job % may not go from % to %.', OLD.job_id, OLD.state, NEW.state
        USING ERRCODE = 'check_violation';
END $$
"""

JOB_EVENT = """
CREATE FUNCTION ops.write_job_event() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO ops.job_event (job_id, from_state, to_state, fence, detail)
    VALUES (NEW.job_id, CASE WHEN TG_OP = 'UPDATE' THEN OLD.state END, NEW.state, NEW.fence,
            CASE WHEN NEW.state IN ('failed', 'dead', 'retry_wait', 'cancelled') THEN NEW.error_message END);
    RETURN NULL;
END $$
"""

TRIGGERS = (
    "CREATE TRIGGER check_job_step BEFORE UPDATE OF state, fence ON ops.job FOR EACH ROW "
    "EXECUTE FUNCTION ops.check_job_step()",
    "CREATE TRIGGER write_first_job_event AFTER INSERT ON ops.job FOR EACH ROW EXECUTE FUNCTION ops.write_job_event()",
    "CREATE TRIGGER write_job_event AFTER UPDATE OF state, fence ON ops.job FOR EACH ROW "
    "WHEN (OLD.state IS DISTINCT FROM NEW.state OR OLD.fence IS DISTINCT FROM NEW.fence) "
    "EXECUTE FUNCTION ops.write_job_event()",
)

COMMENTS = {
    "model.find_checkpoint": "Checkpoint meant by a name (its newest finished), an id, an alias or part of its digest",
    "model.neighbours_sql": "The statement that model.neighbours executes, for EXPLAIN",
    "model.neighbours": "The k scans nearest to a scan by cosine distance of their embeddings by one checkpoint",
    "model.add_embedding_partition": "Make the partition for the embeddings of a checkpoint, where it is absent",
    "model.index_embedding_partition": "Make the HNSW index of a checkpoint's embeddings; false where too long",
    "ops.check_job_step": "Refuses steps between states that a job may not take",
    "ops.write_job_event": "Appends each step of a job to ops.job_event",
}


def upgrade() -> None:
    vector = op.get_bind().scalar(
        sa.text(
            "SELECT quote_ident(nspname) FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace "
            "WHERE e.extname = 'vector'"
        )
    )
    for function in (FIND_CHECKPOINT, NEIGHBOURS_SQL, NEIGHBOURS, JOB_STEP, JOB_EVENT):
        op.execute(sa.text(function.replace(":", r"\:")))
    for function in (ADD_PARTITION, INDEX_PARTITION):
        op.execute(sa.text(function.format(vector=vector, lock=4_210_002).replace(":", r"\:")))
    for trigger in TRIGGERS:
        op.execute(trigger)
    for function, text in COMMENTS.items():
        op.execute(f"COMMENT ON FUNCTION {function} IS '{text.replace(chr(39), chr(39) * 2)}'")


def downgrade() -> None:
    for name in ("write_job_event", "write_first_job_event", "check_job_step"):
        op.execute(f"DROP TRIGGER {name} ON ops.job")
    for function in reversed(COMMENTS):
        op.execute(f"DROP FUNCTION {function}")
