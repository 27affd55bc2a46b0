"""Devices: named alike by all workers of a host, claimed all at once, never held by two jobs."""

from __future__ import annotations

import json
import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, Engine, text

from app.errors import InputError
from app.store import attempts, jobs
from tests.workers.conftest import Lab
from tests.workers.small_cohort import SMALL, insert_cohort
from tests.workers.test_commands import lachesis, outcome
from workers.devices import Accelerator, environment_of, offered, visible

KNOWN = [Accelerator(str(n), f"GPU-{letter}1-{n}") for n, letter in enumerate("abcd")]
SETTINGS = [option for key, value in (SMALL | {"epochs": "1"}).items() for option in ("--set", f"{key}={value}")]


@pytest.mark.parametrize(
    ("named", "found"),
    [
        (None, "abcd"),
        ("", ""),
        ("2,0", "ca"),
        ("GPU-b,3", "bd"),
        ("1,9,2", "b"),  # CUDA, too, stops at the first name that nothing has
        ("-1", ""),
    ],
)
def test_a_worker_sees_what_cuda_sees(named: str | None, found: str) -> None:
    assert visible(named, KNOWN) == tuple(one.uuid for letter in found for one in KNOWN if f"-{letter}1" in one.uuid)


def test_parts_of_accelerators_go_by_their_own_names() -> None:
    assert visible("MIG-1234,MIG-5678", KNOWN) == ("MIG-1234", "MIG-5678")


def test_the_processor_is_shared_by_as_many_ranks_as_asked_for() -> None:
    assert offered("cpu:3", {}) == ("cpu:0", "cpu:1", "cpu:2")
    assert environment_of(offered("cpu:3", {})) == {"CUDA_VISIBLE_DEVICES": ""}
    assert offered("none", {"CUDA_VISIBLE_DEVICES": "0"}) == () and environment_of(()) == {}


@pytest.mark.parametrize("wanted", ["cpu:0", "cpu:x", "cpu:65", "99", "0,0,GPU-", "all"])
def test_devices_that_a_host_lacks_are_refused_by_name(wanted: str) -> None:
    with pytest.raises(InputError, match=r"LACHESIS_DEVICES|cpu:N"):
        offered(wanted, {})


def test_a_job_is_told_the_devices_that_are_its_own() -> None:
    assert environment_of(("GPU-b", "GPU-d")) == {"CUDA_VISIBLE_DEVICES": "GPU-b,GPU-d"}


def register(connection: Connection, worker: str, devices: list[str] | None, host: str = "h") -> None:
    named = {"host": host, "pid": 1, "queues": ["gpu"], "version": "0", "device": None, "encoders": ["tiny"]}
    attempts.register_worker(connection, worker, **named, devices=devices)  # type: ignore[arg-type]


def job(connection: Connection, gpus: int | None = None, **more: object) -> int:
    args = {**({} if gpus is None else {"gpus": gpus}), **more}
    return jobs.insert(connection, kind="pretrain", queue="gpu", args=args)


def claim(connection: Connection, worker: str, job_id: int | None = None, host: str = "h") -> jobs.Claim | None:
    who = {"worker_id": worker, "host": host, "pid": 1, "version": "0", "lease": 60.0}
    return jobs.claim(connection, **who, queues=["gpu"], job_id=job_id)  # type: ignore[arg-type]


HELD = """
SELECT a.host, d.name FROM ops.job j JOIN ops.job_attempt a USING (job_id, fence) CROSS JOIN unnest(a.devices) d(name)
WHERE j.state = 'running'
"""


def held(connection: Connection) -> list[tuple[str, str]]:
    return [(row.host, row.name) for row in connection.execute(text(HELD))]


def end(connection: Connection, done: jobs.Claim) -> None:
    assert jobs.succeed(connection, done.job_id, done.fence, {})


def test_a_job_takes_all_its_devices_at_once_or_waits(engine: Engine) -> None:
    with engine.begin() as connection:
        for worker in ("one", "two", "three"):
            register(connection, worker, ["a", "b", "c"])
        first, second, third = job(connection, 2), job(connection, 2), job(connection)
        taken = claim(connection, "one")
        assert taken is not None and (taken.job_id, taken.devices) == (first, ("a", "b"))
        assert claim(connection, "two") is None, "one is free, two are asked for, and the third job waits its turn"
        assert claim(connection, "two", second) is None
        end(connection, taken)
        after = claim(connection, "two"), claim(connection, "three")
        assert [(one.job_id, one.devices) for one in after if one] == [(second, ("a", "b")), (third, ("c",))]


def test_a_job_that_needs_more_than_a_host_has_keeps_nobody_waiting(engine: Engine) -> None:
    with engine.begin() as connection:
        register(connection, "small", ["a"])
        register(connection, "large", ["x", "y"], host="g")
        large, small = job(connection, 2), job(connection, 1)
        taken = claim(connection, "small")
        assert taken is not None and taken.job_id == small
        taken = claim(connection, "large", host="g")
        assert taken is not None and (taken.job_id, taken.devices) == (large, ("x", "y"))


def test_a_job_of_an_encoder_that_a_worker_lacks_keeps_it_from_nothing(engine: Engine) -> None:
    with engine.begin() as connection:
        register(connection, "one", ["a", "b"])
        register(connection, "two", ["a", "b"])
        attempts.register_worker(
            connection, "rich", host="g", pid=1, queues=["gpu"], version="0", device=None, encoders=["mine"]
        )
        job(connection)
        assert claim(connection, "one") is not None
        job(connection, 2, encoder="mine")
        last = job(connection)
        taken = claim(connection, "two")
        assert taken is not None and (taken.job_id, taken.devices) == (last, ("b",))


def test_a_host_without_devices_trains_on_the_processor_unless_another_has_some(engine: Engine) -> None:
    with engine.begin() as connection:
        register(connection, "plain", [])
        several, one = job(connection, 4), job(connection, 1)
        taken = claim(connection, "plain")
        assert taken is not None and (taken.job_id, taken.devices) == (several, ())
        end(connection, taken)
        register(connection, "rich", ["a"], host="g")
        another = job(connection, 2)
        taken = claim(connection, "plain")
        assert taken is not None and taken.job_id == one
        end(connection, taken)
        assert claim(connection, "plain") is None and jobs.find(connection, another)["state"] == "queued"


def test_devices_of_a_killed_worker_are_free_once_its_lease_is_over(engine: Engine) -> None:
    with engine.begin() as connection:
        register(connection, "killed", ["a"])
        register(connection, "other", ["a"])
        job(connection)
        assert claim(connection, "killed") is not None
        waiting = job(connection)
        assert claim(connection, "other") is None
        connection.execute(text("UPDATE ops.job SET lease_until = now() - interval '1 s' WHERE state = 'running'"))
        jobs.reap(connection)
        assert not held(connection)
        assert claim(connection, "other", waiting) is not None


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(["queue", "claim", "end", "lose"]), st.integers(0, 5)), max_size=40))
def test_no_device_is_ever_held_twice_and_every_job_gets_what_it_asked_for(
    engine: Engine, steps: list[tuple[str, int]]
) -> None:
    workers = {f"w{n}": ("g" if n < 3 else "h") for n in range(6)}
    running: dict[str, jobs.Claim] = {}
    with engine.connect() as connection:
        for number, (worker, host) in enumerate(workers.items()):
            register(connection, worker, ["a", "b", "c"][: 1 + number % 3], host)
        for step, n in steps:
            worker = f"w{n}"
            if step == "queue":
                job(connection, 1 + n % 3)
            elif step == "claim":
                taken = claim(connection, worker, host=workers[worker])
                if taken is not None:
                    assert worker not in running
                    assert len(taken.devices) == int(taken.args["gpus"])
                    running[worker] = taken
            elif worker in running:
                ending = running.pop(worker)
                if step == "end":
                    end(connection, ending)
                else:
                    assert jobs.retry_later(connection, ending.job_id, ending.fence, "lost")
            now = held(connection)
            assert len(now) == len(set(now))
            claimed = [(workers[worker], name) for worker, one in running.items() for name in one.devices]
            assert sorted(now) == sorted(claimed)
        connection.rollback()


def test_workers_of_a_host_that_claim_at_once_share_no_device_and_leave_no_job(engine: Engine) -> None:
    names = [f"w{n}" for n in range(4)]
    with engine.begin() as connection:
        for worker in names:
            register(connection, worker, ["a", "b", "c", "d"])
        for n in range(40):
            job(connection, 1 + n % 4)
    twice: list[tuple[str, str]] = []

    def work(worker: str) -> None:
        chance = random.Random(worker)
        quiet = 0
        while quiet < 60:
            with engine.begin() as connection:
                taken = claim(connection, worker)
            if taken is None:
                quiet += 1
                continue
            quiet = 0
            with engine.connect() as connection:
                now = held(connection)
                twice.extend(one for one in set(now) if now.count(one) > 1)
            threading.Event().wait(chance.random() * 0.005)
            with engine.begin() as connection:
                end(connection, taken)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not twice
    with engine.connect() as connection:
        states = connection.execute(text("SELECT DISTINCT state FROM ops.job")).scalars().all()
    assert states == ["succeeded"], "the largest was not kept out by smaller ones"


def test_a_training_waits_told_why_until_a_host_has_as_many_devices_as_it_shares_a_step_among(
    lab: Lab, tmp_path: Path
) -> None:
    with lab.engine.begin() as connection:
        insert_cohort(connection, tmp_path / "scans")
    lab.settings = replace(lab.settings, devices="cpu:1")
    few = lab.worker()
    command = ("pretrain", "tte", "--encoder", "tiny", "--labels", "outcomes", "--name", "m", "--gpus", "2", *SETTINGS)
    training = lachesis(lab, *command, "--set", "accumulate=2", "--set", "batch=2", "--json")
    lab.until(lambda: lab.scalar("SELECT count(*) FROM ops.job WHERE kind = 'pretrain'") == 1, 20)
    threading.Event().wait(4)  # the worker looks at the table many times, the command once
    assert lab.scalar("SELECT state FROM ops.job WHERE kind = 'pretrain'") == "queued"
    lab.settings = replace(lab.settings, devices="cpu:2")
    lab.worker()
    code, said, told = outcome(training)
    assert code == 0, told
    host = lab.scalar("SELECT max(host) FROM ops.worker")
    assert f"waits: it needs 2 devices of one host; workers seen: {host}:{few.pid} (1 device)" in told
    (attempt,) = lab.attempts(json.loads(said)["job_id"])
    assert attempt.devices == ["cpu:0", "cpu:1"]
