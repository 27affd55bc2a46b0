"""Cumulative incidence of a task in SQL: Kaplan-Meier and Aalen-Johansen, with late entry.

Revision 0016, after 0015.
"""

from __future__ import annotations

from alembic import op

from migrations.roles import role

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

# A member is at risk at t if its window opened before t and its time is not before t. With all factors in one window,
# survival before t is the survival of the row before.
INCIDENCE = """
CREATE FUNCTION label.incidence(
    label_set text, task text, split text DEFAULT NULL, death_competes boolean DEFAULT true
) RETURNS TABLE (time_days float8, at_risk int, num_events int, num_deaths int, num_censored int, survival float8,
                 incidence float8, death_incidence float8)
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    WITH seen AS (
        SELECT l.seconds, l.start_seconds, l.status = 'event' AS event,
               l.status <> 'event' AND $4 AND coalesce(y.death_seconds <= l.seconds, false) AS died
        FROM label.member_task l JOIN label.tte y USING (label_set_id, cohort_member_id)
        WHERE l.label_set_id = label.find_label_set($1) AND l.task = $2 AND l.event IS NOT NULL
          AND ($3 IS NULL OR l.split = $3)
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
COMMENT = (
    "Cumulative incidence of a task over the days from the index, one row a time at which a scan leaves: "
    "Aalen-Johansen with death competing, or with death_competes false 1 - Kaplan-Meier; survival is the share without "
    "event (and alive); scans enter as their risk window opens; ineligible and prior ones are left out"
)


def upgrade() -> None:
    op.execute(INCIDENCE)
    op.execute(f"COMMENT ON FUNCTION label.incidence IS '{COMMENT}'")
    op.execute("REVOKE EXECUTE ON FUNCTION label.incidence FROM PUBLIC")
    roles = ", ".join(map(role, ("loader", "worker", "api", "reader")))
    op.execute(f"GRANT EXECUTE ON FUNCTION label.incidence TO {roles}")


def downgrade() -> None:
    op.execute("DROP FUNCTION label.incidence")
