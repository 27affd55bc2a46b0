"""The database itself guards the life of a job."""

from __future__ import annotations

import itertools

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import IntegrityError

from app.schema.ops import STATES

ALLOWED = {
    "queued": {"running", "cancelled"},
    "running": {"succeeded", "failed", "cancelled", "dead", "retry_wait", "queued"},
    "retry_wait": {"running", "queued", "cancelled", "dead"},
    "failed": {"queued"},
    "cancelled": {"queued"},
    "dead": {"queued"},
    "succeeded": set(),
}


def test_a_job_takes_the_allowed_steps_and_no_other(engine: Engine) -> None:
    with engine.connect() as connection:
        for before, after in itertools.permutations(STATES, 2):
            insert = text("INSERT INTO ops.job (kind, queue, state) VALUES ('load', 'load', :s) RETURNING job_id")
            job = connection.execute(insert, {"s": before}).scalar_one()
            connection.commit()
            step = text("UPDATE ops.job SET state = :s WHERE job_id = :j")
            if after in ALLOWED[before]:
                assert connection.execute(step, {"s": after, "j": job}).rowcount == 1
            else:
                with pytest.raises(IntegrityError, match=f"Job {job} may not go from {before} to {after}"):
                    connection.execute(step, {"s": after, "j": job})
            connection.rollback()


def test_every_step_and_every_claim_is_written_down(engine: Engine) -> None:
    with engine.begin() as connection:
        for statement in (
            "INSERT INTO ops.job (kind, queue) VALUES ('load', 'load')",
            "UPDATE ops.job SET state = 'running', fence = 1",
            "UPDATE ops.job SET heartbeat_at = clock_timestamp()",
            "UPDATE ops.job SET fence = 2",
            "UPDATE ops.job SET state = 'failed', error_message = 'why'",
        ):
            connection.execute(text(statement))
        found = connection.execute(
            text("SELECT from_state, to_state, fence, detail FROM ops.job_event ORDER BY 3, 1 DESC")
        )
        assert [tuple(row) for row in found] == [
            (None, "queued", 0, None),
            ("queued", "running", 1, None),
            ("running", "running", 2, None),
            ("running", "failed", 2, "why"),
        ]


def test_a_fence_never_falls(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO ops.job (kind, queue, fence) VALUES ('load', 'load', 3)"))
    with engine.connect() as connection, pytest.raises(IntegrityError, match="may not fall from 3 to 2"):
        connection.execute(text("UPDATE ops.job SET fence = 2"))
