"""Arrays a task long are stored as they are: compressing them took longer than all else that keeping them does.

Revision 0030, after 0029.
"""

from __future__ import annotations

from alembic import op

revision = "0030"
down_revision = "0029"
branch_labels = None
depends_on = None

COLUMNS = {"status_count": ("n", "persons", "person_days"), "label_meaning": ("positions", "concepts")}


def upgrade() -> None:
    _store("EXTERNAL")


def downgrade() -> None:
    _store("EXTENDED")


def _store(how: str) -> None:
    for table, columns in COLUMNS.items():
        alter = ", ".join(f"ALTER {column} SET STORAGE {how}" for column in columns)
        op.execute(f"ALTER TABLE label.{table} {alter}")
