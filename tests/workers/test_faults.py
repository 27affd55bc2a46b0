"""What kill -9, SIGSTOP, SIGTERM, a lost database and an absent Redis do to a job: they delay it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import psycopg
import pytest
import redis
from sqlalchemy import text

from app.embedded import Store
from app.embedded.processes import start_time
from app.errors import FenceLost
from app.queue import nudge
from app.store import attempts, jobs
from tests.workers.conftest import Lab
from workers.attempt import JobWork, execute
from workers.board import Board


def steps_once(lab: Lab, job_id: int, steps: int) -> None:
    """Each step was kept once, by whichever attempt; the job ended once."""
    kept = [row.step for row in lab.rows("SELECT step FROM ops.training_step WHERE job_id = :j ORDER BY 1", j=job_id)]
    assert kept == list(range(1, steps + 1))
    ends = "SELECT count(*) FROM ops.job_event WHERE job_id = :j AND to_state = 'succeeded'"
    assert lab.scalar(ends, j=job_id) == 1


@pytest.mark.parametrize("kind", [pytest.param("train", marks=pytest.mark.long), "child_train"])
def test_kill_9_of_the_worker_ends_its_child_and_another_worker_goes_on(lab: Lab, kind: str) -> None:
    worker = lab.worker()
    job_id = lab.submit(kind, steps=20, seconds=0.1)
    at_work = lab.running(job_id, done=5)
    assert at_work != worker.pid
    worker.kill()
    lab.until(lambda: start_time(at_work) is None, 3)
    second = lab.worker()
    job = lab.ended(job_id)
    assert job["state"] == "succeeded"
    first, resumed = lab.attempts(job_id)
    assert (first.outcome, resumed.outcome) == ("crashed", "succeeded")
    assert first.start_step == 0 < resumed.start_step
    assert first.worker_id != resumed.worker_id
    assert f":{second.pid}:" in resumed.worker_id
    assert lab.scalar("SELECT crash_count FROM ops.job") == 1
    steps_once(lab, job_id, 20)


@pytest.mark.parametrize("kind", [pytest.param("train", marks=pytest.mark.long), "child_train"])
def test_kill_9_of_the_process_at_work_is_noted_long_before_the_lease_is_over(lab: Lab, kind: str) -> None:
    worker = lab.worker("--lease", "60", "--heartbeat", "10", "--poll", "0.2")
    job_id = lab.submit(kind, steps=12, seconds=0.1)
    os.kill(lab.running(job_id, done=3), signal.SIGKILL)
    assert lab.ended(job_id, 10)["state"] == "succeeded"
    first, resumed = lab.attempts(job_id)
    assert first.outcome == "crashed"
    assert resumed.start_step > 0
    if kind == "child_train":
        assert first.signal == signal.SIGKILL
    assert worker.poll() is None
    steps_once(lab, job_id, 12)


def test_a_job_that_kills_its_process_is_parked_after_three_and_the_next_one_runs(lab: Lab) -> None:
    lab.worker()
    poison = lab.submit("child_end_itself")
    job = lab.ended(poison)
    assert (job["state"], job["attempt"], job["exit_code"]) == ("dead", 3, 1)
    assert "SIGKILL" in job["error_message"]
    assert [row.outcome for row in lab.attempts(poison)] == ["crashed"] * 3
    assert "a last line" in str(lab.rows("SELECT message FROM ops.job_log WHERE job_id = :j", j=poison))
    assert lab.ended(lab.submit("count", number=1))["state"] == "succeeded"


def test_a_worker_that_slept_through_its_lease_writes_nothing_when_it_wakes(lab: Lab) -> None:
    sleeper = lab.worker()
    job_id = lab.submit("child_train", steps=15, seconds=0.1)
    lab.running(job_id, done=3)
    family = [psutil.Process(sleeper.pid), *psutil.Process(sleeper.pid).children(recursive=True)]
    for process in family:
        process.suspend()
    lab.worker()
    lab.until(lambda: lab.job(job_id)["fence"] == 2)
    for process in reversed(family):
        process.resume()
    at_work = lab.attempts(job_id)[0].pid
    lab.until(lambda: start_time(at_work) is None, 5)  # it learned that it lost the job, and ended
    assert lab.ended(job_id)["state"] == "succeeded"
    assert [row.outcome for row in lab.attempts(job_id)] == ["crashed", "succeeded"]
    assert lab.rows("SELECT fence FROM ops.job_event WHERE to_state = 'succeeded'")[0].fence == 2
    steps_once(lab, job_id, 15)
    assert sleeper.poll() is None


def test_an_attempt_that_only_checks_learns_that_it_lost_its_job(lab: Lab) -> None:
    sleeper = lab.worker()
    job_id = lab.submit("child_stopped_late")
    lab.until(lambda: lab.job(job_id)["state"] == "running" and lab.attempts(job_id)[0].pid != sleeper.pid)
    lab.until(lambda: lab.scalar("SELECT count(*) FROM ops.job_log WHERE message = 'in its loop'"), 30)
    family = [psutil.Process(sleeper.pid), *psutil.Process(sleeper.pid).children(recursive=True)]
    for process in family:
        process.suspend()
    lab.worker()
    lab.until(lambda: lab.job(job_id)["fence"] == 2)
    for process in reversed(family):
        process.resume()
    lab.until(lambda: start_time(lab.attempts(job_id)[0].pid) is None, 5)
    assert lab.job(job_id)["fence"] == 2
    assert lab.scalar("SELECT count(*) FROM ops.training_step") == 0


def test_a_stale_attempt_leaves_no_row_and_a_live_one_leaves_all(lab: Lab) -> None:
    insert = text("INSERT INTO ops.training_step (job_id, step, name, epoch, value) VALUES (:j, :s, 'x', 0, 1)")
    job_id = lab.insert("count")
    url = lab.store.database_url
    works = []
    for worker in ("a", "b"):
        with lab.engine.begin() as connection:
            attempts.register_worker(connection, worker, host="h", pid=1, queues=["load"], version="0", device=None)
            claim = jobs.claim(connection, worker_id=worker, host="h", pid=1, version="0", lease=60.0, queues=["load"])
            assert claim is not None
            works.append(JobWork(claim, database_url=url, settings=lab.settings, board=Board()))
        if worker == "a":
            with lab.engine.begin() as connection:
                assert jobs.crash(connection, job_id, claim.fence, message="m") == "queued"
    stale, live = works
    with live.transaction() as connection:
        connection.execute(insert, {"j": job_id, "s": 1})
    with pytest.raises(FenceLost), stale.transaction() as connection:
        connection.execute(insert, {"j": job_id, "s": 2})
    with pytest.raises(FenceLost):
        stale.progress(1, 2, "steps")
    stale.log("a stale word")
    assert lab.rows("SELECT step FROM ops.training_step") == [(1,)]
    assert lab.scalar("SELECT count(*) FROM ops.job_log") == 0
    for work in works:
        work.close()


@pytest.mark.parametrize("kind", [pytest.param("stopped_late", marks=pytest.mark.long), "child_stopped_late"])
def test_sigterm_hands_the_job_back_after_a_last_checkpoint(lab: Lab, kind: str) -> None:
    worker = lab.worker("--lease", "60", "--heartbeat", "10", "--poll", "0.2")
    job_id = lab.submit(kind)
    lab.until(lambda: lab.job(job_id)["state"] == "running")
    lab.until(lambda: lab.scalar("SELECT count(*) FROM ops.job_log WHERE message = 'in its loop'"), 30)
    worker.terminate()
    assert worker.wait(10) == 0
    job = lab.job(job_id)
    assert (job["state"], job["worker_id"]) == ("queued", None)
    assert lab.attempts(job_id)[0].outcome == "preempted"
    assert lab.scalar("SELECT step FROM ops.training_step WHERE name = 'saved'") == 7
    assert lab.scalar("SELECT stopped_at IS NOT NULL FROM ops.worker")
    assert lab.scalar("SELECT max_attempts - attempt FROM ops.job") == 10
    assert lab.scalar("SELECT crash_count FROM ops.job") == 0


@contextmanager
def database_away(lab: Lab, admin_url: str) -> Iterator[None]:
    """Nobody reaches the test's database meanwhile."""
    name = lab.engine.url.database
    ending = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"
    with psycopg.connect(admin_url, autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        admin.execute(ending, (name,))
        try:
            yield
        finally:
            admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


@pytest.mark.parametrize("kind", ["count", "train", "child_count"])
def test_a_database_that_is_away_for_longer_than_the_lease_costs_a_job_time_alone(
    lab: Lab, store: Store, kind: str
) -> None:
    worker = lab.worker()
    args = {"number": 30, "steps": 30, "seconds": 0.1}
    job_id = lab.submit(kind, **args)
    lab.running(job_id, done=3)
    with database_away(lab, store.database_url.replace("/lachesis?", "/postgres?", 1)):
        time.sleep(2.5)
    assert lab.ended(job_id, 30)["state"] == "succeeded"
    assert lab.attempts(job_id)[0].outcome != "succeeded"
    assert lab.ended(lab.submit("count", number=1))["state"] == "succeeded"
    assert worker.poll() is None


def test_an_attempt_that_gives_its_job_up_hands_it_back_only_while_it_is_its_own(lab: Lab) -> None:
    job_id = lab.insert("count", number=1)
    url = lab.store.database_url
    for worker, state in (("a", "queued"), ("b", "running")):
        with lab.engine.begin() as connection:
            attempts.register_worker(connection, worker, host="h", pid=1, queues=["load"], version="0", device=None)
            claim = jobs.claim(connection, worker_id=worker, host="h", pid=1, version="0", lease=60.0, queues=["load"])
        assert claim is not None
        board = Board()
        board.lose(job_id, 1)
        stale = replace(claim, fence=1)
        assert execute(JobWork(stale, database_url=url, settings=lab.settings, board=board))
        assert lab.job(job_id)["state"] == state
    assert [row.outcome for row in lab.attempts(job_id)] == ["preempted", None]


def test_a_database_session_that_is_ended_puts_the_job_off_and_it_runs_again(lab: Lab) -> None:
    lab.worker()
    job_id = lab.submit("train", steps=15, seconds=0.1)
    lab.running(job_id, done=3)
    ending = """
    SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = :name AND state <> 'idle'
    """
    name = f"lachesis:{job_id}:1"
    lab.until(lambda: lab.scalar(ending, name=name) or lab.job(job_id)["state"] == "retry_wait")
    job = lab.ended(job_id, 20)
    assert job["state"] == "succeeded"
    assert lab.attempts(job_id)[0].outcome == "lost"
    steps_once(lab, job_id, 15)


@pytest.mark.parametrize("kind", ["count", pytest.param("child_count", marks=pytest.mark.long)])
def test_without_redis_a_job_still_runs(lab: Lab, tmp_path: Path, kind: str) -> None:
    away = f"unix://{tmp_path}/no.sock?db=0"
    lab.settings = replace(lab.settings, redis_url=away)
    began = time.monotonic()
    assert not nudge(away, 1, "load")
    assert time.monotonic() - began < 2.5
    lab.worker()
    first, second = lab.insert(kind, number=3), lab.insert(kind, number=3)
    assert lab.ended(first)["state"] == "succeeded"
    assert lab.ended(second)["state"] == "succeeded"
    (worker,) = lab.workers
    worker.terminate()
    assert worker.wait(10) == 0


def test_a_nudge_that_redis_lost_costs_seconds(lab: Lab) -> None:
    lab.worker()
    job_id = lab.insert("count", number=1)
    assert lab.ended(job_id, 5)["state"] == "succeeded"


def test_garbage_in_redis_ends_a_worker_and_loses_no_job(lab: Lab) -> None:
    """Kombu gives up on an element that is no JSON; who started the worker starts another."""
    worker = lab.worker()
    job_id = lab.submit("train", steps=15, seconds=0.1)
    lab.running(job_id, done=3)
    with redis.from_url(lab.store.redis_url) as client:
        client.lpush("lachesis:load", "this is no JSON")
    assert worker.wait(20) == 1
    assert lab.scalar("SELECT stopped_at IS NOT NULL FROM ops.worker")
    lab.worker()
    assert lab.ended(job_id)["state"] == "succeeded"
    steps_once(lab, job_id, 15)


@pytest.mark.long
def test_two_workers_run_many_jobs_once_each_while_one_is_killed_again_and_again(lab: Lab) -> None:
    lab.worker()
    queued = [lab.submit("train", steps=3, seconds=0.02) for _ in range(20)]
    for _ in range(3):
        victim = lab.worker()
        time.sleep(0.3)
        victim.kill()
    for job_id in queued:
        assert lab.ended(job_id, 30)["state"] == "succeeded"
        steps_once(lab, job_id, 3)
    with lab.engine.connect() as connection:
        assert not connection.execute(text("SELECT count(*) FROM ops.job WHERE worker_id IS NOT NULL")).scalar()
