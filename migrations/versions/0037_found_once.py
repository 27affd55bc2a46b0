"""A label looks for its task in a member's outcomes once, however many of its columns are asked for.

Revision 0037, after 0036.
"""

from __future__ import annotations

from importlib import import_module

from alembic import op

revision = "0037"
down_revision = "0036"
branch_labels = None
depends_on = None

FOLLOW_UP = "ELSE y.follow_up_seconds END AS follow_up\n"


def member_task() -> str:
    """The view as it was before, to be replaced."""
    before: str = import_module("migrations.versions.0005_views").MEMBER_TASK
    return before.replace("CREATE VIEW", "CREATE OR REPLACE VIEW")


def upgrade() -> None:
    """Keep the place of the task from being looked up again for status, event and seconds: OFFSET 0 fences it."""
    before = member_task()
    op.execute(before.replace(FOLLOW_UP, f"{FOLLOW_UP}    OFFSET 0\n"))


def downgrade() -> None:
    """Let the planner unfold it again."""
    op.execute(member_task())
