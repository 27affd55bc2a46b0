"""Features as arrays in SQL, a checksum of their rows, and what to do about a failed check of leakage.

Revision 0021, after 0020.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations.roles import role

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None

ARRAYS = """
CREATE FUNCTION label.feature_array(cohort text, names text[])
RETURNS TABLE (cohort_member_id bigint, person_id bigint, image_occurrence_id bigint, index_time timestamp, split text,
               feature_values float8[])
LANGUAGE plpgsql STABLE PARALLEL SAFE AS $$
#variable_conflict use_column
DECLARE
    chosen int;
    unknown text;
BEGIN
    SELECT c.cohort_id INTO chosen FROM label.cohort c
    WHERE c.name = split_part($1, '@', 1)
      AND CASE WHEN strpos($1, '@') = 0 THEN c.is_current ELSE c.version::text = split_part($1, '@', 2) END;
    IF chosen IS NULL THEN
        RAISE EXCEPTION 'Expected a cohort, found none called "%"; SELECT name FROM label.cohort lists them.', $1;
    END IF;
    SELECT string_agg(n.name, ', ') INTO unknown FROM unnest($2) n(name)
    WHERE NOT EXISTS (SELECT FROM label.feature_definition d WHERE d.cohort_id = chosen AND d.name = n.name);
    IF unknown IS NOT NULL THEN
        RAISE EXCEPTION 'Expected features of the cohort "%", found none called %; SELECT name FROM '
                        'label.feature_definition lists them.', $1, unknown;
    END IF;
    RETURN QUERY
    SELECT m.cohort_member_id, m.person_id, m.image_occurrence_id, m.index_time, m.split, ARRAY(
        SELECT coalesce(f.value::float8, CASE WHEN d.absent_is_zero AND f.name IS NULL THEN 0 END)
        FROM unnest($2) WITH ORDINALITY n(name, place)
        JOIN label.feature_definition d ON d.cohort_id = chosen AND d.name = n.name
        LEFT JOIN label.feature f ON f.cohort_member_id = m.cohort_member_id AND f.name = n.name
        ORDER BY n.place)
    FROM label.cohort_member m WHERE m.cohort_id = chosen ORDER BY m.cohort_member_id;
END $$
"""
COMMENT = (
    "Features of a cohort side by side: one row a member, ineligible ones too, values in the order of the names given; "
    "0 where there is no row and that means none, null where it is unknown"
)


def upgrade() -> None:
    op.add_column(
        "feature_set",
        sa.Column(
            "row_checksum",
            sa.Numeric(),
            nullable=True,
            comment="Sum of hashes of its rows in label.feature; another sum: someone else changed them",
        ),
        schema="label",
    )
    op.add_column(
        "leakage_check",
        sa.Column("mend", sa.Text(), server_default=sa.text("''"), nullable=False, comment="What to do where it fails"),
        schema="label",
    )
    op.execute(ARRAYS)
    op.execute(f"COMMENT ON FUNCTION label.feature_array IS '{COMMENT}'")
    op.execute("REVOKE EXECUTE ON FUNCTION label.feature_array FROM PUBLIC")
    roles = ", ".join(map(role, ("loader", "worker", "api", "reader")))
    op.execute(f"GRANT EXECUTE ON FUNCTION label.feature_array TO {roles}")


def downgrade() -> None:
    op.execute("DROP FUNCTION label.feature_array")
    op.drop_column("leakage_check", "mend", schema="label")
    op.drop_column("feature_set", "row_checksum", schema="label")
