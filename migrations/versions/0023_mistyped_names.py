"""Functions of labels refuse a name that nothing has, instead of giving no rows.

Revision 0023, after 0022.
"""

from __future__ import annotations

from alembic import op

from migrations.roles import role

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None

# Dice's coefficient over pairs of letters: no extension is needed for it.
NO_SUCH = """
CREATE FUNCTION label.no_such(kind text, wanted text, known text[]) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    WITH word AS (
        SELECT k.name, lower(k.name) AS letters FROM unnest($3) k(name)
        UNION ALL SELECT NULL, lower($2)
    ), pair AS (
        SELECT DISTINCT w.name, substr(' ' || w.letters || ' ', n, 2) AS pair
        FROM word w CROSS JOIN LATERAL generate_series(1, length(w.letters) + 1) n
    ), alike AS (
        SELECT k.name, 2.0 * count(g.pair) / (count(*) + (SELECT count(*) FROM pair WHERE name IS NULL)) AS share
        FROM pair k LEFT JOIN pair g ON g.pair = k.pair AND g.name IS NULL
        WHERE k.name IS NOT NULL GROUP BY k.name
    ), near AS (
        SELECT name FROM alike WHERE share >= 0.4 ORDER BY share DESC, name LIMIT 1
    )
    SELECT format('Expected a %s, found none called %s; ', $1, quote_nullable($2)) || CASE
        WHEN EXISTS (SELECT FROM near) THEN format('did you mean %L?', (SELECT name FROM near))
        WHEN coalesce(cardinality($3), 0) = 0 THEN 'there is none yet.'
        ELSE format('known: %s.', array_to_string($3[1:20], ', ')) END
$$
"""

FIND_LABEL_SET = """
CREATE OR REPLACE FUNCTION label.find_label_set(name text) RETURNS integer LANGUAGE plpgsql STABLE PARALLEL SAFE AS $$
DECLARE
    found integer;
    known text[];
BEGIN
    SELECT s.label_set_id INTO found FROM label.label_set s
    WHERE (s.is_current AND s.name = $1) OR s.name || '@' || s.version = $1
    ORDER BY s.name = $1 DESC LIMIT 1;
    IF found IS NOT NULL THEN
        RETURN found;
    END IF;
    SELECT array_agg(s.name || '@' || s.version ORDER BY s.version) INTO known FROM label.label_set s
    WHERE s.name = split_part($1, '@', 1);
    IF known IS NULL THEN
        SELECT array_agg(s.name ORDER BY s.name) INTO known FROM label.label_set s WHERE s.is_current;
    END IF;
    RAISE EXCEPTION USING ERRCODE = 'undefined_object', MESSAGE = label.no_such('label set', $1, known);
END $$
"""

WAS_FIND_LABEL_SET = """
CREATE OR REPLACE FUNCTION label.find_label_set(name text) RETURNS integer LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT s.label_set_id FROM label.label_set s
    WHERE (s.is_current AND s.name = $1) OR s.name || '@' || s.version = $1
    ORDER BY s.name = $1 DESC LIMIT 1
$$
"""

FIND_TASK = """
CREATE FUNCTION label.find_task(label_set_id integer, task text) RETURNS smallint
LANGUAGE plpgsql STABLE PARALLEL SAFE AS $$
DECLARE
    found smallint;
    known text[];
BEGIN
    SELECT t.position INTO found FROM label.task t JOIN label.label_set s ON s.task_set_id = t.task_set_id
    WHERE s.label_set_id = $1 AND t.name = $2;
    IF found IS NOT NULL THEN
        RETURN found;
    END IF;
    SELECT array_agg(t.name ORDER BY t.position) INTO known
    FROM label.task t JOIN label.label_set s ON s.task_set_id = t.task_set_id WHERE s.label_set_id = $1;
    RAISE EXCEPTION USING ERRCODE = 'undefined_object',
        MESSAGE = label.no_such('task of the label set', $2, known);
END $$
"""

FIND_SPLIT = """
CREATE FUNCTION label.find_split(split text) RETURNS text LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
BEGIN
    IF $1 IN ('train', 'tuning', 'held_out') THEN
        RETURN $1;
    END IF;
    RAISE EXCEPTION USING ERRCODE = 'undefined_object',
        MESSAGE = label.no_such('split', $1, ARRAY['train', 'tuning', 'held_out']);
END $$
"""

ASKED = """
    WITH asked AS MATERIALIZED (
        SELECT label.find_task(s.label_set_id, $2), CASE WHEN $3 IS NOT NULL THEN label.find_split($3) END
        FROM label.find_label_set($1) s(label_set_id)
    ), seen AS ("""
# As in 0016, but for the task and the split, which must be there.
INCIDENCE = """
CREATE OR REPLACE FUNCTION label.incidence(
    label_set text, task text, split text DEFAULT NULL, death_competes boolean DEFAULT true
) RETURNS TABLE (time_days float8, at_risk int, num_events int, num_deaths int, num_censored int, survival float8,
                 incidence float8, death_incidence float8)
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    WITH seen AS (
        SELECT l.seconds, l.start_seconds, l.status = 'event' AS event,
               l.status <> 'event' AND $4 AND coalesce(y.death_seconds <= l.seconds, false) AS died
        FROM label.member_task l JOIN label.tte y USING (label_set_id, cohort_member_id)
        WHERE l.label_set_id = label.find_label_set($1) AND l.task = $2 AND l.event IS NOT NULL
          AND ($3 IS NULL OR l.split = $3) AND EXISTS (SELECT FROM asked)
    ), moment AS (
        SELECT at, sum(entering) AS entering, sum(leaving) AS leaving, sum(events) AS events, sum(deaths) AS deaths
        FROM (
            SELECT start_seconds AS at, count(*) AS entering, 0 AS leaving, 0 AS events, 0 AS deaths
            FROM seen GROUP BY 1
            UNION ALL
            SELECT seconds, 0, count(*), count(*) FILTER (WHERE event), count(*) FILTER (WHERE died)
            FROM seen GROUP BY 1
        ) m GROUP BY 1
    ), risk AS (
        SELECT at, events, deaths, leaving, sum(entering - leaving) OVER (
                   ORDER BY at ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS at_risk
        FROM moment
    ), curve AS (
        SELECT at, events, deaths, leaving, at_risk,
               CASE WHEN bool_or(events + deaths = at_risk) OVER so_far THEN 0
                    ELSE exp(sum(ln(nullif(1 - (events + deaths)::float8 / at_risk, 0))) OVER so_far) END AS survival
        FROM risk WHERE leaving > 0 WINDOW so_far AS (ORDER BY at)
    ), step AS (
        SELECT *, lag(survival, 1, 1::float8) OVER (ORDER BY at) AS before FROM curve
    )
    SELECT at / 86400.0::float8, at_risk::int, events::int, deaths::int, (leaving - events - deaths)::int, survival,
           sum(before * events / at_risk::float8) OVER so_far, sum(before * deaths / at_risk::float8) OVER so_far
    FROM step WINDOW so_far AS (ORDER BY at) ORDER BY at
$$
"""
WAS_SEEN, WAS_INCIDENCE = "\n    WITH seen AS (", INCIDENCE.replace(" AND EXISTS (SELECT FROM asked)", "")
INCIDENCE = INCIDENCE.replace(WAS_SEEN, ASKED)

COMMENTS = {
    "no_such(text, text, text[])": "What to say of a name that nothing of a kind has, with the known one most like it",
    "find_task(integer, text)": "Position of a task of a label set; an error where it has none of that name",
    "find_split(text)": "train, tuning or held_out; an error where it is none of these",
}


def upgrade() -> None:
    roles = ", ".join(map(role, ("loader", "worker", "api", "reader")))
    for statement in (NO_SUCH, FIND_TASK, FIND_SPLIT):
        op.execute(statement)
    for function, comment in COMMENTS.items():
        op.execute(f"COMMENT ON FUNCTION label.{function} IS '{comment}'")
        op.execute(f"REVOKE EXECUTE ON FUNCTION label.{function} FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON FUNCTION label.{function} TO {roles}")
    op.execute(FIND_LABEL_SET)
    op.execute(INCIDENCE)


def downgrade() -> None:
    op.execute(WAS_FIND_LABEL_SET)
    op.execute(WAS_INCIDENCE)
    for function in COMMENTS:
        op.execute(f"DROP FUNCTION label.{function}")
