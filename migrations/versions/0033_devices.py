"""Devices: which a worker offers, how many a job needs, which an attempt holds.

Revision 0033, after 0032.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY

from migrations.roles import role

revision = "0033"
down_revision = "0032"
branch_labels = None
depends_on = None

NEEDED = "CASE WHEN kind IN ('pretrain', 'embed') THEN coalesce((args ->> 'gpus')::smallint, 1::smallint) ELSE 0 END"


def upgrade() -> None:
    offered = sa.Column("devices", ARRAY(sa.Text()), comment="Devices of its host that its jobs may use; null: unsaid")
    op.add_column("worker", offered, schema="ops")
    needed = sa.Column(
        "num_devices",
        sa.SmallInteger(),
        sa.Computed(NEEDED, persisted=True),
        nullable=False,
        comment="Devices of one host that it needs at once",
    )
    op.add_column("job", needed, schema="ops")
    held = sa.Column("devices", ARRAY(sa.Text()), comment="Devices of the host that are its alone while it runs")
    op.add_column("job_attempt", held, schema="ops")
    readers = f"{role('api')}, {role('reader')}"
    op.execute(f"GRANT SELECT (devices) ON ops.worker TO {readers}")


def downgrade() -> None:
    op.drop_column("job_attempt", "devices", schema="ops")
    op.drop_column("job", "num_devices", schema="ops")
    op.drop_column("worker", "devices", schema="ops")
