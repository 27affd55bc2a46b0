"""The job core against a model: whatever the order of claims, crashes, late heartbeats, cancels and retries."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import IntegrityError

from app.errors import InputError
from app.store import attempts, jobs
from workers.holder import Clocks

WORKERS = ("a", "b", "c")
LEASE = Clocks().lease
TERMINAL = {"succeeded", "failed", "cancelled", "dead"}


class Life(RuleBasedStateMachine):
    """`model` says what each job must be; `old` keeps every claim ever made, stale ones too."""

    connection: Connection

    @initialize()
    def start(self) -> None:
        for table in ("job", "worker"):
            self.connection.execute(text(f"TRUNCATE ops.{table} CASCADE"))
        for worker in WORKERS:
            attempts.register_worker(
                self.connection, worker, host="h", pid=1, queues=["load"], version="0", device=None
            )
        self.model: dict[int, dict[str, Any]] = {}
        self.old: list[tuple[int, int]] = []
        self.effects: list[tuple[int, int]] = []
        for worker in WORKERS:  # begin in the middle of things: each worker holds a job, and one more waits
            self.submit()
            self.claim_best(worker)
        self.submit()

    # --- helpers

    def holder(self, worker: str) -> int | None:
        return next((job for job, it in self.model.items() if it["state"] == "running" and it["by"] == worker), None)

    def waiting(self) -> list[int]:
        return [job for job, it in sorted(self.model.items()) if it["state"] in ("queued", "retry_wait")]

    def pick(self, data: st.DataObject) -> tuple[int, int]:
        """A claim, current or stale; one of the newest six, so that chains of steps on one job come about."""
        found: tuple[int, int] = data.draw(st.sampled_from(self.old[-6:]))
        return found

    def pick_job(self, data: st.DataObject) -> int:
        found: int = data.draw(st.sampled_from(sorted(self.model)[-6:]))
        return found

    def holds(self, job: int, fence: int) -> bool:
        return self.model[job]["state"] == "running" and self.model[job]["fence"] == fence

    def crashed(self, job: int) -> None:
        it = self.model[job]
        it["crashes"] += 1
        it["state"] = "cancelled" if it["cancel"] else "dead" if it["crashes"] >= 3 else "queued"

    # --- rules

    @precondition(lambda self: len(self.waiting()) < 3)
    @rule()
    def submit(self) -> None:
        job = jobs.insert(self.connection, kind="count", queue="load", args={})
        self.model[job] = {"state": "queued", "fence": 0, "crashes": 0, "cancel": False, "by": None, "ends": 0}

    @rule(worker=st.sampled_from(WORKERS))
    def claim_best(self, worker: str) -> None:
        self.connection.execute(text("UPDATE ops.job SET run_after = clock_timestamp() WHERE state = 'retry_wait'"))
        claim = jobs.claim(
            self.connection, worker_id=worker, host="h", pid=1, version="0", lease=LEASE, queues=["load"]
        )
        expected = None if self.holder(worker) else next(iter(self.waiting()), None)
        assert (claim.job_id if claim else None) == expected
        if claim:
            self.claimed(claim, worker)

    @rule(worker=st.sampled_from(WORKERS), data=st.data())
    def claim_one(self, worker: str, data: st.DataObject) -> None:
        job = self.pick_job(data)
        claim = jobs.claim(self.connection, worker_id=worker, host="h", pid=1, version="0", lease=LEASE, job_id=job)
        assert (claim is not None) == (job in self.waiting() and self.holder(worker) is None)
        if claim:
            self.claimed(claim, worker)

    def claimed(self, claim: jobs.Claim, worker: str) -> None:
        it = self.model[claim.job_id]
        assert claim.fence == it["fence"] + 1
        it.update(state="running", fence=claim.fence, by=worker)
        self.old.append((claim.job_id, claim.fence))

    @rule(data=st.data(), how=st.sampled_from(["succeed", "fail", "cancelled", "hand_back", "retry_later", "crash"]))
    def end(self, data: st.DataObject, how: str) -> None:
        """Any claim ever made tries to end its job; only the newest, while it holds, does."""
        job, fence = self.pick(data)
        c = self.connection
        steps = {
            "succeed": lambda: jobs.succeed(c, job, fence, {"n": 1}),
            "fail": lambda: jobs.fail(c, job, fence, exit_code=1, error_class="E", message="m"),
            "cancelled": lambda: jobs.end_cancelled(c, job, fence),
            "hand_back": lambda: jobs.hand_back(c, job, fence),
            "retry_later": lambda: jobs.retry_later(c, job, fence, "m"),
            "crash": lambda: jobs.crash(c, job, fence, message="m") is not None,
        }
        held = self.holds(job, fence)
        assert steps[how]() == held
        if not held:
            return
        if how == "crash":
            self.crashed(job)
            return
        states = {"succeed": "succeeded", "fail": "failed", "cancelled": "cancelled", "hand_back": "queued"}
        it = self.model[job]
        it["state"] = states.get(how, "retry_wait")
        if it["cancel"] and it["state"] in ("queued", "retry_wait"):
            it["state"] = "cancelled"

    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        """A stage's transaction: write first, lock last."""
        job, fence = self.pick(data)
        with self.connection.begin_nested() as nested:
            self.connection.execute(
                text("INSERT INTO ops.job_log (job_id, fence, message) VALUES (:j, :f, 'effect')"),
                {"j": job, "f": fence},
            )
            held = jobs.lock(self.connection, job, fence)
            if held:
                self.effects.append((job, fence))
            else:
                nested.rollback()
        assert held == self.holds(job, fence)

    @rule(data=st.data())
    def say(self, data: st.DataObject) -> None:
        """Progress, log lines and the like of a stale attempt land nowhere."""
        found = self.pick(data)
        held = self.holds(*found)
        c = self.connection
        assert attempts.write_progress(c, *found, done=1, total=2, unit="steps", note="") == held
        assert attempts.write_log(c, *found, ["one", "two"]) == held
        assert attempts.write_start_step(c, *found, 3) == held
        assert attempts.place(c, *found, "h", 2) == held

    @rule(worker=st.sampled_from(WORKERS))
    def heartbeat(self, worker: str) -> None:
        """A late heartbeat revives nothing: it reaches only what the worker still holds."""
        jobs.heartbeat(self.connection, worker, LEASE)
        held = {job.job_id for job in jobs.held(self.connection, worker)}
        assert held == {job for job in [self.holder(worker)] if job is not None}

    @rule(worker=st.sampled_from(WORKERS))
    def fall_silent(self, worker: str) -> None:
        """The worker's leases end, and whoever looks ends its attempts."""
        self.connection.execute(
            text("UPDATE ops.job SET lease_until = clock_timestamp() - interval '1 s' WHERE worker_id = :w"),
            {"w": worker},
        )
        job = self.holder(worker)
        reaped = [found for found, _, _ in jobs.reap(self.connection)]
        assert reaped == ([] if job is None else [job])
        if job is not None:
            self.crashed(job)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job = self.pick_job(data)
        it = self.model[job]
        if it["state"] in ("queued", "retry_wait"):
            it["state"] = "cancelled"
        it["cancel"] |= it["state"] in ("running", "cancelled")
        assert jobs.cancel(self.connection, job) == it["state"]

    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        job = self.pick_job(data)
        it = self.model[job]
        if it["state"] in ("failed", "cancelled", "dead"):
            assert jobs.retry(self.connection, job) == "load"
            it.update(state="queued", crashes=0, cancel=False)
        else:
            with pytest.raises(InputError):
                jobs.retry(self.connection, job)

    # --- what always holds

    @invariant()
    def the_table_is_as_the_model_says(self) -> None:
        rows = self.connection.execute(text("SELECT * FROM ops.job ORDER BY job_id")).all()
        assert {row.job_id: (row.state, row.fence) for row in rows} == {
            job: (it["state"], it["fence"]) for job, it in self.model.items()
        }
        for row in rows:
            assert (row.finished_at is not None) == (row.state in TERMINAL)
            assert (row.exit_code is not None) == (row.state in TERMINAL)
            assert (row.worker_id is not None) == (row.lease_until is not None) == (row.state == "running")

    @invariant()
    def at_most_one_attempt_a_job_is_open(self) -> None:
        rows = self.connection.execute(
            text(
                "SELECT job_id, max(fence) AS fence, count(*) AS n FROM ops.job_attempt "
                "WHERE finished_at IS NULL GROUP BY 1"
            )
        ).all()
        running = {job: it["fence"] for job, it in self.model.items() if it["state"] == "running"}
        assert {row.job_id: row.fence for row in rows} == running
        assert all(row.n == 1 for row in rows)

    @invariant()
    def only_holders_left_effects(self) -> None:
        rows = self.connection.execute(
            text("SELECT job_id, fence FROM ops.job_log WHERE message = 'effect' ORDER BY job_log_id")
        ).all()
        assert [tuple(row) for row in rows] == self.effects

    @invariant()
    def a_job_ends_once_unless_it_is_retried(self) -> None:
        rows = self.connection.execute(
            text("SELECT job_id, from_state, to_state FROM ops.job_event ORDER BY job_event_id")
        ).all()
        last: dict[int, str] = {}
        for row in rows:
            assert row.from_state == last.get(row.job_id)
            if row.from_state in TERMINAL:
                assert (row.from_state, row.to_state) != ("succeeded", "queued")
                assert row.to_state == "queued"
            last[row.job_id] = row.to_state


def live(engine: Engine, examples: int, *, derandomize: bool) -> None:
    with engine.connect() as connection:
        Life.connection = connection
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            Life,
            settings=settings(
                max_examples=examples,
                stateful_step_count=50,
                deadline=None,
                derandomize=derandomize,
                suppress_health_check=list(HealthCheck),
            ),
        )


def test_no_order_of_steps_breaks_the_life_of_a_job(engine: Engine) -> None:
    live(engine, 80, derandomize=True)


@pytest.mark.long
def test_no_order_of_many_more_steps_breaks_the_life_of_a_job(engine: Engine) -> None:
    live(engine, 600, derandomize=False)


def test_an_open_job_is_found_again_by_its_dedupe_key(engine: Engine) -> None:
    with engine.begin() as connection:
        values: dict[str, Any] = {"kind": "count", "queue": "load", "args": {}, "dedupe_key": "nightly"}
        first = jobs.insert(connection, **values)
        assert jobs.insert(connection, **values) == first
        jobs.cancel(connection, first)
        second = jobs.insert(connection, **values)
        assert second != first
    with pytest.raises(InputError, match="does the same"), engine.begin() as connection:
        jobs.retry(connection, first)


def test_the_database_itself_refuses_a_step_that_no_job_may_take(engine: Engine) -> None:
    with engine.begin() as connection:
        job = jobs.insert(connection, kind="count", queue="load", args={})
    with pytest.raises(IntegrityError, match="may not go from queued to succeeded"), engine.begin() as connection:
        connection.execute(text("UPDATE ops.job SET state = 'succeeded' WHERE job_id = :j"), {"j": job})


def test_a_job_of_an_unknown_kind_waits_for_a_newer_worker(engine: Engine) -> None:
    with engine.begin() as connection:
        attempts.register_worker(connection, "a", host="h", pid=1, queues=["load"], version="0", device=None)
        jobs.insert(connection, kind="from_the_future", queue="load", args={})
        values: dict[str, Any] = {"worker_id": "a", "host": "h", "pid": 1, "version": "0", "lease": 60.0}
        assert jobs.claim(connection, **values, queues=["load"], kinds=["count"]) is None
        assert jobs.claim(connection, **values, queues=["load"], kinds=["from_the_future"]) is not None


def test_a_job_waits_for_a_worker_that_has_its_encoder_and_an_unknown_one_for_nobody(engine: Engine) -> None:
    with engine.begin() as connection:
        common: dict[str, Any] = {"host": "h", "pid": 1, "queues": ["gpu"], "version": "0", "device": None}
        attempts.register_worker(connection, "plain", **common, encoders=["tiny"])
        attempts.register_worker(connection, "rich", **common, encoders=["tiny", "merlin"])
        values: dict[str, Any] = {"host": "h", "pid": 1, "version": "0", "lease": 60.0, "queues": ["gpu"]}
        job = jobs.insert(connection, kind="pretrain", queue="gpu", args={"encoder": "merlin"})
        assert jobs.claim(connection, worker_id="plain", **values) is None
        assert attempts.encoder_is_served(connection, "merlin")
        attempts.stop_worker(connection, "rich")
        assert not attempts.encoder_is_served(connection, "merlin")
        assert jobs.claim(connection, worker_id="plain", **values) is None, "it comes back perhaps"
        claim = jobs.claim(connection, worker_id="rich", **values)
        assert claim is not None and claim.job_id == job

        unknown = jobs.insert(connection, kind="pretrain", queue="gpu", args={"encoder": "merlyn"})
        claim = jobs.claim(connection, worker_id="plain", **values)
        assert claim is not None and claim.job_id == unknown, "its stage names the nearest"


def test_a_job_retried_after_trouble_fails_when_its_attempts_are_used_up(engine: Engine) -> None:
    with engine.begin() as connection:
        attempts.register_worker(connection, "a", host="h", pid=1, queues=["load"], version="0", device=None)
        job = jobs.insert(connection, kind="count", queue="load", args={})
        connection.execute(text("UPDATE ops.job SET max_attempts = 2"))
        delays = []
        for _ in range(2):
            claim = jobs.claim(connection, worker_id="a", host="h", pid=1, version="0", lease=60.0, job_id=job)
            assert claim is not None
            assert jobs.retry_later(connection, job, claim.fence, "The database did not answer.")
            delays.append(
                connection.execute(text("SELECT run_after - clock_timestamp() FROM ops.job"))
                .scalar_one()
                .total_seconds()
            )
        assert jobs.find(connection, job)["state"] == "failed"
        assert 1.5 < delays[0] <= 2.0
