"""Jobs run by real workers: another process, heartbeats under load, ends of every kind."""

from __future__ import annotations

from tests.workers.conftest import Lab


def test_a_stage_runs_in_another_process_and_leaves_its_attempt(lab: Lab) -> None:
    worker = lab.worker()
    for kind in ("count", "child_count"):
        job = lab.ended(lab.submit(kind, number=3))
        assert job["state"] == "succeeded", job
        assert job["exit_code"] == 0
        (attempt,) = lab.attempts(job["job_id"])
        assert attempt.outcome == "succeeded"
        assert attempt.pid == job["result"]["pid"] != worker.pid
        assert attempt.peak_rss_bytes > 1e6
        assert lab.scalar("SELECT message FROM ops.job_log WHERE job_id = :j", j=job["job_id"]) == "counted"
        states = [row.to_state for row in lab.rows("SELECT to_state FROM ops.job_event ORDER BY job_event_id")][-3:]
        assert states == ["queued", "running", "succeeded"]
