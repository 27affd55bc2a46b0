"""Encoders that workers have.

Revision 0025, after 0024.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY

from migrations.roles import role

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "worker",
        sa.Column("encoders", ARRAY(sa.Text()), comment="Encoders it can build; null of a worker that did not say"),
        schema="ops",
    )
    op.execute(f"GRANT SELECT (encoders) ON ops.worker TO {role('api')}, {role('reader')}")


def downgrade() -> None:
    op.drop_column("worker", "encoders", schema="ops")
