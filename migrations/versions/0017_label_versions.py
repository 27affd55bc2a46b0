"""Versions of labels: what each was made of, member by member and task by task, and one version's rows in SQL.

Revision 0017, after 0016.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY

from migrations.roles import role

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

RULES_DIGEST = sa.Column(
    "rules_digest",
    sa.LargeBinary(),
    nullable=True,
    comment=(
        "sha256 over the engine's rules and the tasks as concepts: of two versions with the same, a member with the "
        "same inputs has the same labels; null where nobody kept it"
    ),
)
OF_MEMBER = (
    sa.Column(
        "timeline_digest",
        sa.LargeBinary(),
        nullable=True,
        comment="Digest of the timeline at labelling; null where there was none",
    ),
    sa.Column(
        "input_digest",
        sa.LargeBinary(),
        nullable=True,
        comment="sha256 over all that the labels of this member were made of but the tasks; null where nobody kept it",
    ),
    sa.Column(
        "label_digest",
        sa.LargeBinary(),
        nullable=True,
        comment="sha256 over who the member is and its arrays: equal labels, equal digest; null where nobody kept it",
    ),
)

TTE_AT = """
CREATE FUNCTION label.tte_at(label_set text)
RETURNS TABLE (label_set text, cohort_member_id bigint, person_id bigint, image_occurrence_id bigint,
               index_time timestamp, split text, eligible boolean, reason text, event_tasks int2[],
               event_seconds int8[], prior_tasks int2[], ineligible_tasks int2[], window_tasks int2[],
               window_seconds int8[], visit_tasks int2[], follow_up_seconds int8, data_cut_seconds int8,
               death_seconds int8)
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT s.name || '@' || s.version, m.cohort_member_id, m.person_id, m.image_occurrence_id, m.index_time, m.split,
           m.eligible, m.reason, y.event_tasks, y.event_seconds, y.prior_tasks, y.ineligible_tasks, y.window_tasks,
           y.window_seconds, y.visit_tasks, y.follow_up_seconds, y.data_cut_seconds, y.death_seconds
    FROM label.label_set s
    JOIN label.tte y USING (label_set_id)
    JOIN label.cohort_member m USING (cohort_member_id)
    WHERE s.label_set_id = label.find_label_set($1)
$$
"""
TTE_AT_COMMENT = (
    "Rows of label.tte of exactly one version, NAME@2 (NAME: the current one), with whose they are; the arrays hold "
    "positions of label.task and seconds from the index; label.tte_long(NAME@2) says them in words"
)


def upgrade() -> None:
    op.add_column("label_set", RULES_DIGEST.copy(), schema="label")
    for column in OF_MEMBER:
        op.add_column("member_digest", column.copy(), schema="label")
    op.create_table(
        "label_concept",
        sa.Column("label_set_id", sa.Integer(), autoincrement=False, nullable=False, comment="Label set"),
        sa.Column("position", sa.SmallInteger(), autoincrement=False, nullable=False, comment="Task"),
        sa.Column(
            "concepts",
            ARRAY(sa.Integer()),
            nullable=False,
            comment="Concepts whose events were outcomes, descendants included, ascending",
        ),
        sa.ForeignKeyConstraint(
            ["label_set_id"],
            ["label.label_set.label_set_id"],
            name=op.f("fk_label_concept_label_set_id_label_set"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("label_set_id", "position", name=op.f("pk_label_concept")),
        schema="label",
        comment="What concepts each task of a label set meant when it was made, by the vocabulary of that time.",
    )
    op.execute(TTE_AT)
    op.execute(f"COMMENT ON FUNCTION label.tte_at IS '{TTE_AT_COMMENT}'")
    op.execute("REVOKE EXECUTE ON FUNCTION label.tte_at FROM PUBLIC")
    loader, worker, api, reader = map(role, ("loader", "worker", "api", "reader"))
    op.execute(f"GRANT EXECUTE ON FUNCTION label.tte_at TO {loader}, {worker}, {api}, {reader}")
    op.execute(f"GRANT SELECT (rules_digest) ON label.label_set TO {api}, {reader}")
    op.execute(f"GRANT SELECT ON label.label_concept TO {api}, {reader}")
    op.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON label.label_concept TO {worker}")


def downgrade() -> None:
    op.execute("DROP FUNCTION label.tte_at")
    op.drop_table("label_concept", schema="label")
    for column in reversed(OF_MEMBER):
        op.drop_column("member_digest", column.name, schema="label")
    op.drop_column("label_set", "rules_digest", schema="label")
