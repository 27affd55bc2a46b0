"""What a label set's tasks meant in one row, and the digest of a task set's definitions: neither is made anew by task.

Revision 0022, after 0021.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY

from migrations.roles import role

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None

WHAT = "What concepts each task of a label set meant when it was made, by the vocabulary of that time."
CONCEPTS = "Concepts whose events were outcomes, descendants included, ascending"

LABEL_CONCEPT = """
CREATE VIEW label.label_concept AS
SELECT m.label_set_id, p.position, array_agg(p.concept_id ORDER BY p.concept_id) AS concepts
FROM label.label_meaning m CROSS JOIN LATERAL unnest(m.positions, m.concepts) p(position, concept_id) GROUP BY 1, 2
"""

DEFINITIONS = """
UPDATE label.task_set s SET definitions_digest = (
    SELECT sha256(convert_to(coalesce(string_agg(definition::text, E'\\n' ORDER BY position), ''), 'UTF8'))
    FROM label.task t WHERE t.task_set_id = s.task_set_id)
"""


def upgrade() -> None:
    op.create_table(
        "label_meaning",
        sa.Column("label_set_id", sa.Integer(), autoincrement=False, nullable=False, comment="Label set"),
        sa.Column(
            "positions",
            ARRAY(sa.SmallInteger()),
            nullable=False,
            comment="Tasks, ascending, one entry a concept; read them through label.label_concept",
        ),
        sa.Column(
            "concepts",
            ARRAY(sa.Integer()),
            nullable=False,
            comment="The concepts beside them whose events were outcomes, descendants included, ascending by task",
        ),
        sa.ForeignKeyConstraint(
            ["label_set_id"],
            ["label.label_set.label_set_id"],
            name=op.f("fk_label_meaning_label_set_id_label_set"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("label_set_id", name=op.f("pk_label_meaning")),
        schema="label",
        comment="What concepts the tasks of a label set meant, packed: read it through label.label_concept.",
    )
    op.execute(
        "INSERT INTO label.label_meaning SELECT label_set_id, array_agg(position ORDER BY position, concept_id), "
        "array_agg(concept_id ORDER BY position, concept_id) "
        "FROM label.label_concept, unnest(concepts) c(concept_id) GROUP BY 1"
    )
    op.drop_table("label_concept", schema="label")
    op.execute(LABEL_CONCEPT)
    op.execute(f"COMMENT ON VIEW label.label_concept IS '{WHAT}'")
    for name, words in (("label_set_id", "Label set"), ("position", "Task"), ("concepts", CONCEPTS)):
        op.execute(f"COMMENT ON COLUMN label.label_concept.{name} IS '{words}'")
    op.add_column(
        "task_set",
        sa.Column(
            "definitions_digest",
            sa.LargeBinary(),
            server_default=sa.text("''::bytea"),
            nullable=False,
            comment="sha256 over its tasks as they are defined, codes resolved; empty until they are written",
        ),
        schema="label",
    )
    op.execute(DEFINITIONS)
    worker, api, reader = map(role, ("worker", "api", "reader"))
    op.execute(f"GRANT SELECT ON label.label_meaning, label.label_concept TO {api}, {reader}")
    op.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON label.label_meaning TO {worker}")
    op.execute(f"GRANT SELECT ON label.label_concept TO {worker}")
    op.execute(f"GRANT SELECT (definitions_digest) ON label.task_set TO {api}, {reader}")


def downgrade() -> None:
    op.drop_column("task_set", "definitions_digest", schema="label")
    op.execute("ALTER VIEW label.label_concept RENAME TO label_concept_of_meaning")
    op.create_table(
        "label_concept",
        sa.Column("label_set_id", sa.Integer(), autoincrement=False, nullable=False, comment="Label set"),
        sa.Column("position", sa.SmallInteger(), autoincrement=False, nullable=False, comment="Task"),
        sa.Column("concepts", ARRAY(sa.Integer()), nullable=False, comment=CONCEPTS),
        sa.ForeignKeyConstraint(
            ["label_set_id"],
            ["label.label_set.label_set_id"],
            name=op.f("fk_label_concept_label_set_id_label_set"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("label_set_id", "position", name=op.f("pk_label_concept")),
        schema="label",
        comment=WHAT,
    )
    op.execute("INSERT INTO label.label_concept SELECT * FROM label.label_concept_of_meaning")
    op.execute("DROP VIEW label.label_concept_of_meaning")
    op.drop_table("label_meaning", schema="label")
    worker, api, reader = map(role, ("worker", "api", "reader"))
    op.execute(f"GRANT SELECT ON label.label_concept TO {api}, {reader}")
    op.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON label.label_concept TO {worker}")
