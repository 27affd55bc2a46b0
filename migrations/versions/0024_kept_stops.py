"""Epochs of checkpoints, and which stop on the way was the best.

Revision 0024, after 0023.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations.roles import role

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None

COLUMNS = (
    sa.Column("epoch", sa.Integer(), nullable=False, server_default="0", comment="Epochs finished"),
    sa.Column(
        "is_best",
        sa.Boolean(),
        nullable=False,
        server_default=sa.text("false"),
        comment="True for the stop on the way that was the best of its run by the figure its recipe watches",
    ),
)


def upgrade() -> None:
    for column in COLUMNS:
        op.add_column("checkpoint", column.copy(), schema="model")
    op.execute(
        "UPDATE model.checkpoint SET epoch = step / greatest(1, num_steps / greatest(1, "
        "coalesce((recipe -> 'settings' ->> 'epochs')::int, 1))) WHERE num_steps > 0"
    )
    op.execute(f"GRANT SELECT (epoch, is_best) ON model.checkpoint TO {role('api')}, {role('reader')}")


def downgrade() -> None:
    for column in reversed(COLUMNS):
        op.drop_column("checkpoint", column.name, schema="model")
