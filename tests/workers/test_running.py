"""Jobs run by real workers: another process, heartbeats under load, ends of every kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis
from sqlalchemy import text

from app.queue import nudge
from app.store import jobs
from tests.workers.conftest import Lab
from workers.supervisor import tail


@pytest.mark.parametrize("kind", ["count", "child_count"])
def test_a_stage_runs_in_another_process_and_leaves_its_attempt(lab: Lab, kind: str) -> None:
    worker = lab.worker()
    job = lab.ended(lab.submit(kind, number=3))
    assert (job["state"], job["exit_code"], job["done"], job["total"]) == ("succeeded", 0, 3, 3)
    (attempt,) = lab.attempts(job["job_id"])
    assert attempt.outcome == "succeeded"
    assert attempt.pid == job["result"]["pid"] != worker.pid
    assert attempt.peak_rss_bytes > 1e6
    assert lab.scalar("SELECT message FROM ops.job_log") == "counted"
    states = [row.to_state for row in lab.rows("SELECT to_state FROM ops.job_event ORDER BY job_event_id")]
    assert states == ["queued", "running", "succeeded"]


@pytest.mark.parametrize(
    "kind",
    [
        "hold_interpreter",
        "long_statement",
        pytest.param("child_hold_interpreter", marks=pytest.mark.long),
    ],
)
def test_a_job_longer_than_its_lease_keeps_its_heartbeat(lab: Lab, kind: str) -> None:
    """The lease is 1.5 s; neither a held interpreter lock nor a long transaction stops the heartbeat."""
    lab.worker()
    lab.worker()
    job = lab.ended(lab.submit(kind, seconds=3.0))
    assert job["state"] == "succeeded"
    (attempt,) = lab.attempts(job["job_id"])
    assert (attempt.finished_at - attempt.started_at).total_seconds() >= 3.0
    assert lab.scalar("SELECT crash_count FROM ops.job") == 0


def test_five_deliveries_to_two_workers_run_a_job_once(lab: Lab) -> None:
    lab.worker()
    lab.worker()
    job_id = lab.insert("count", number=20)
    for _ in range(5):
        nudge(lab.store.redis_url, job_id, "load")
    assert lab.ended(job_id)["state"] == "succeeded"
    nudge(lab.store.redis_url, job_id, "load")  # an old message changes nothing
    with redis.from_url(lab.store.redis_url) as client:
        lab.until(lambda: not client.llen("lachesis:load"))
    other = lab.ended(lab.submit("count", number=1))
    assert other["state"] == "succeeded"
    assert len(lab.attempts(job_id)) == 1
    assert lab.job(job_id)["attempt"] == 1


def test_a_message_means_look_at_the_table_and_priority_goes_first(lab: Lab) -> None:
    first, second = lab.insert("count", number=1), lab.insert("count", number=1)
    with lab.engine.begin() as connection:
        connection.execute(text("UPDATE ops.job SET priority = 1 WHERE job_id = :j"), {"j": second})
    nudge(lab.store.redis_url, first, "load")
    lab.worker("--lease", "60", "--heartbeat", "10", "--poll", "5")
    lab.ended(second)
    assert lab.job(first)["state"] == "queued"


def test_wrong_input_fails_with_2_and_its_sentence(lab: Lab) -> None:
    lab.worker()
    job = lab.ended(lab.submit("wrong_input"))
    assert (job["state"], job["exit_code"], job["error_class"]) == ("failed", 2, "InputError")
    assert job["error_message"] == "Expected a folder of OMOP files, got a fish; give a folder."


def test_a_fault_fails_with_1_and_one_line_while_its_trace_stays_in_a_private_file(lab: Lab) -> None:
    lab.worker()
    job = lab.ended(lab.submit("fault"))
    assert (job["state"], job["exit_code"], job["error_message"]) == ("failed", 1, "RuntimeError: first line")
    tables = ("job", "job_attempt", "job_log", "job_event")
    assert "secret" not in str([lab.rows(f"SELECT * FROM ops.{table}") for table in tables])
    assert lab.settings.home is not None
    log = lab.settings.home / "runs" / str(job["job_id"]) / "1" / "log"
    assert "second line with a secret" in log.read_text()
    assert log.stat().st_mode & 0o077 == 0


def test_a_value_that_the_database_refuses_is_not_quoted(lab: Lab) -> None:
    lab.worker()
    job = lab.ended(lab.submit("bad_value"))
    assert (job["state"], job["exit_code"]) == ("failed", 1)
    assert "SQLSTATE 22P02" in job["error_message"]
    tables = ("job", "job_attempt", "job_event", "job_log")
    assert "secret" not in str([lab.rows(f"SELECT * FROM ops.{table}") for table in tables])


def test_the_tail_of_a_log_leaves_out_what_may_quote_a_row(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("one\nDETAIL:  Key (person_id)=(4711) already exists.\nCONTEXT:  COPY person, line 1: 4711\ntwo\n")
    assert tail(log) == ["one", "two"]


def test_a_cancelled_queued_job_never_runs(lab: Lab) -> None:
    job_id = lab.submit("count", number=1)
    with lab.engine.begin() as connection:
        assert jobs.cancel(connection, job_id) == "cancelled"
    lab.worker()
    assert lab.ended(lab.submit("count", number=1))["state"] == "succeeded"
    assert (lab.job(job_id)["state"], lab.job(job_id)["exit_code"]) == ("cancelled", 3)
    assert lab.attempts(job_id) == []


@pytest.mark.parametrize("kind", [pytest.param("count", marks=pytest.mark.long), "child_count"])
def test_a_cancelled_running_job_ends_at_its_next_check(lab: Lab, kind: str) -> None:
    lab.worker()
    job_id = lab.submit(kind, number=10_000, seconds=0.05)
    lab.running(job_id)
    with lab.engine.begin() as connection:
        assert jobs.cancel(connection, job_id) == "running"
    job = lab.ended(job_id, 5)
    assert (job["state"], job["exit_code"]) == ("cancelled", 3)
    assert lab.attempts(job_id)[0].outcome == "cancelled"


def test_a_cancel_ends_a_statement_that_takes_longer_than_the_grace(lab: Lab) -> None:
    lab.worker()
    job_id = lab.submit("long_statement", seconds=60)
    lab.until(lambda: lab.job(job_id)["state"] == "running")
    with lab.engine.begin() as connection:
        jobs.cancel(connection, job_id)
    assert lab.ended(job_id, 10)["state"] == "cancelled"


def test_an_ended_job_is_retried_and_a_succeeded_one_is_not(lab: Lab) -> None:
    from app.errors import InputError

    lab.worker()
    job_id = lab.submit("wrong_input")
    lab.ended(job_id)
    with lab.engine.begin() as connection:
        assert jobs.retry(connection, job_id) == "load"
    lab.until(lambda: lab.job(job_id)["attempt"] == 2 and lab.job(job_id)["state"] == "failed")
    done = lab.ended(lab.submit("count", number=1))["job_id"]
    with pytest.raises(InputError, match="succeeded"), lab.engine.begin() as connection:
        jobs.retry(connection, done)


def test_redis_holds_the_id_of_a_job_and_none_of_its_arguments(lab: Lab) -> None:
    job_id = lab.submit("count", number=1, path="/CANARY-MRN-4711", note="CANARY")
    with redis.from_url(lab.store.redis_url) as client:
        (message,) = client.lrange("lachesis:load", 0, -1)
        everything = b"".join(client.dump(key) or b"" for key in client.keys("*")) + message
    assert b"CANARY" not in everything
    assert f'"argsrepr": "[{job_id}]"'.encode() in message
    lab.worker()
    assert lab.ended(job_id)["state"] == "succeeded"
    assert "CANARY" not in lab.log.read_text()
