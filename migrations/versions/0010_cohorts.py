"""Follow-up of a cohort under each rule, and cohorts under OMOP's names.

Revision 0010, after 0009.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from migrations.roles import role

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

COHORT_OMOP = """
CREATE VIEW label.cohort_omop AS
SELECT DISTINCT c.cohort_id AS cohort_definition_id, m.person_id AS subject_id,
       m.index_time::date AS cohort_start_date, m.follow_up_end::date AS cohort_end_date
FROM label.cohort c JOIN label.cohort_member m USING (cohort_id) WHERE m.eligible
"""
COMMENTS = {
    "cohort_definition_id": "label.cohort.cohort_id: one version of one cohort",
    "subject_id": "Person",
    "cohort_start_date": "Day of the scan",
    "cohort_end_date": "Last day of follow-up under the rule of the cohort",
}


def upgrade() -> None:
    op.add_column(
        "cohort",
        sa.Column(
            "follow_up_summary",
            postgresql.JSONB(),
            server_default=sa.text("'[]'::jsonb"),
            nullable=False,
            comment="Follow-up under each rule: [{rule, scans, persons, deaths, median_days, lower_days, upper_days, "
            "reverse_km_median_days}]",
        ),
        schema="label",
    )
    op.execute(COHORT_OMOP)
    op.execute(
        "COMMENT ON VIEW label.cohort_omop IS 'Eligible members of every cohort in the four columns of an OMOP cohort "
        "table; persons with several scans have several rows'"
    )
    for column, meaning in COMMENTS.items():
        op.execute(f"COMMENT ON COLUMN label.cohort_omop.{column} IS '{meaning}'")
    loader, worker, api, reader = map(role, ("loader", "worker", "api", "reader"))
    op.execute(f"GRANT SELECT (follow_up_summary) ON label.cohort TO {api}, {reader}")
    op.execute(f"GRANT SELECT ON label.cohort_omop TO {loader}, {worker}, {api}, {reader}")


def downgrade() -> None:
    op.execute("DROP VIEW label.cohort_omop")
    op.drop_column("cohort", "follow_up_summary", schema="label")
