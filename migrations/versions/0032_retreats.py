"""Which stop on the way a training goes back to when it diverges.

Revision 0032, after 0031.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations.roles import role

revision = "0032"
down_revision = "0031"
branch_labels = None
depends_on = None

RETREAT = sa.Column(
    "is_retreat",
    sa.Boolean(),
    nullable=False,
    server_default=sa.text("false"),
    comment="True for the stop on the way to which its run goes back when it diverges",
)


def upgrade() -> None:
    op.add_column("checkpoint", RETREAT.copy(), schema="model")
    op.execute(f"GRANT SELECT (is_retreat) ON model.checkpoint TO {role('api')}, {role('reader')}")


def downgrade() -> None:
    op.drop_column("checkpoint", RETREAT.name, schema="model")
