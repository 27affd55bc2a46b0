"""A label set made by several jobs is the set that one job makes, whoever dies, changes or cancels on the way."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Engine, text

from app.settings import Settings
from app.store import attempts, cohorts, jobs, tasks
from app.store.work import InlineWork
from tests.app.store.records import Records, rows
from tests.workers.conftest import Lab
from tests.workers.test_label_stage import draw_person, draw_time, specs, write_person, write_vocabulary
from workers.attempt import JobWork, execute
from workers.board import Board

Make = Callable[..., InlineWork]

LABELS = """
SELECT y.cohort_member_id, y.event_tasks, y.event_seconds, y.prior_tasks, y.ineligible_tasks, y.window_tasks,
       y.window_seconds, y.visit_tasks, y.follow_up_seconds, y.data_cut_seconds, y.death_seconds
FROM label.tte y JOIN label.label_set s USING (label_set_id) WHERE s.name = '{name}' AND s.is_current ORDER BY 1
"""
COUNTS = """
SELECT c.split, c.status, c.n, c.persons, c.person_days FROM label.status_count c
JOIN label.label_set s USING (label_set_id) WHERE s.name = '{name}' AND s.is_current ORDER BY 1, 2
"""
SETS = """
SELECT digest, data_digest, num_members, num_events FROM label.label_set WHERE name = '{name}' AND is_current
"""
LEFT = "SELECT (SELECT count(*) FROM label.shard) + (SELECT count(*) FROM label.shard_tte) AS n"


@pytest.fixture
def filled(engine: Engine, work: Make) -> None:
    """Forty persons with anything a record may have, most scanned once, and tasks of every kind."""
    random_ = random.Random(5)
    with engine.begin() as connection:
        records = Records(connection)
        write_vocabulary(records)
        for person_id in range(1, 41):
            write_person(records, person_id, draw_person(random_, records.ids))
            for time, date_only in dict.fromkeys(draw_time(random_) for _ in range(random_.choice([1, 1, 2]))):
                records.scan(person_id, time, date_only=date_only)
        records.pack()
    cohorts.build(work(name="c"))
    tasks.build(work(name="t", cohort="c", specs=[spec.to_dict() for spec in specs()]))


def queue_label(engine: Engine, name: str, shards: int) -> int:
    """A job that labels in so many shards."""
    args = {"name": name, "cohort": "c", "tasks": "t", "shards": shards, "allow_unknown_concepts": True}
    with engine.begin() as connection:
        return jobs.insert(connection, kind="label", queue="label", name=name, args=args)


def step(engine: Engine, settings: Settings, job_id: int | None = None) -> int | None:
    """Run the best due job of the queue, or one job, in this process; which it was."""
    who: dict[str, Any] = {"worker_id": "w", "host": "h"}
    with engine.begin() as connection:
        attempts.register_worker(connection, **who, pid=1, queues=["label"], version="0", device=None)
        claim = jobs.claim(connection, **who, pid=1, version="0", lease=60.0, queues=["label"], job_id=job_id)
    if claim is None:
        return None
    url = settings.database_url or ""
    assert execute(JobWork(claim, database_url=url, settings=replace(settings), board=Board()))
    return claim.job_id


def finish(engine: Engine, settings: Settings) -> None:
    """Run whatever is due."""
    while step(engine, settings) is not None:
        pass


def state(engine: Engine, job_id: int) -> dict[str, Any]:
    with engine.connect() as connection:
        return jobs.find(connection, job_id)


def everything(engine: Engine, name: str) -> list[Any]:
    """All that a label set is, but its keys."""
    return [[tuple(r) for r in rows(engine, query.format(name=name))] for query in (LABELS, COUNTS, SETS)]


def test_any_number_of_shards_makes_the_same_bytes(engine: Engine, settings: Settings, filled: None) -> None:
    found = {}
    for count in (1, 2, 5, 40):
        job_id = queue_label(engine, f"l{count}", count)
        finish(engine, settings)
        job = state(engine, job_id)
        assert job["state"] == "succeeded", job["error_message"]
        made = rows(engine, f"SELECT count(*) AS n FROM ops.job WHERE parent_job_id = {job_id}")[0].n
        assert made == {1: 0, 2: 2, 5: 5}.get(count, made) and made <= count
        found[count] = everything(engine, f"l{count}")
        assert job["done"] == job["total"] == len(found[count][0]) > 40
    assert found[1] == found[2] == found[5] == found[40]
    assert rows(engine, LEFT)[0].n == 0


def test_while_shards_are_made_nothing_is_seen_and_progress_is_that_of_all(
    engine: Engine, settings: Settings, filled: None
) -> None:
    job_id = queue_label(engine, "l", 4)
    step(engine, settings, job_id)
    assert state(engine, job_id)["state"] == "retry_wait"
    seen = [0]
    for _ in range(3):
        step(engine, settings)
        seen.append(state(engine, job_id)["done"])
        assert rows(engine, "SELECT count(*) AS n FROM label.label_set")[0].n == 0
        assert rows(engine, "SELECT count(*) AS n FROM label.tte_long")[0].n == 0
    assert 0 < seen[1] < seen[2] < seen[3] < state(engine, job_id)["total"]
    finish(engine, settings)
    assert state(engine, job_id)["state"] == "succeeded"
    listed = [row["kind"] for row in listing(engine)]
    assert listed == ["label"]


def listing(engine: Engine) -> list[dict[str, Any]]:
    with engine.connect() as connection:
        return jobs.listing(connection, None, 50)


def test_a_shard_whose_data_changed_meanwhile_is_made_again(engine: Engine, settings: Settings, filled: None) -> None:
    job_id = queue_label(engine, "l", 3)
    step(engine, settings, job_id)
    step(engine, settings)
    with engine.begin() as connection:
        records = Records.__new__(Records)
        records.connection = connection
        records.do("UPDATE omop.event SET time = time - interval '1 hour' WHERE person_id <= 3 AND NOT date_only")
        records.pack()
    finish(engine, settings)
    assert state(engine, job_id)["state"] == "succeeded"
    made = rows(engine, "SELECT shard, count(*) AS n FROM ops.job WHERE shard IS NOT NULL GROUP BY 1 ORDER BY 1")
    assert [tuple(r) for r in made] == [(0, 2), (1, 1), (2, 1)]
    queue_label(engine, "again", 1)
    finish(engine, settings)
    assert everything(engine, "l") == everything(engine, "again")


def test_a_cancel_takes_every_shard_along_and_a_retry_begins_anew(
    engine: Engine, settings: Settings, filled: None
) -> None:
    job_id = queue_label(engine, "l", 3)
    step(engine, settings, job_id)
    step(engine, settings)
    with engine.begin() as connection:
        assert jobs.cancel(connection, job_id) == "cancelled"
    states = rows(engine, "SELECT state FROM ops.job WHERE shard IS NOT NULL ORDER BY shard")
    assert [r.state for r in states] == ["succeeded", "cancelled", "cancelled"]
    assert rows(engine, LEFT)[0].n == 0 and step(engine, settings) is None
    with engine.begin() as connection:
        jobs.retry(connection, job_id)
    finish(engine, settings)
    assert state(engine, job_id)["state"] == "succeeded"
    assert rows(engine, "SELECT count(*) AS n FROM ops.job WHERE shard IS NOT NULL")[0].n == 6


def test_a_shard_that_fails_fails_the_job_and_stops_the_others(
    engine: Engine, settings: Settings, filled: None
) -> None:
    job_id = queue_label(engine, "l", 4)
    step(engine, settings, job_id)
    with engine.begin() as connection:
        connection.execute(text('UPDATE ops.job SET args = args || \'{"cohort": "gone@1"}\' WHERE shard = 1'))
    finish(engine, settings)
    job = state(engine, job_id)
    assert job["state"] == "failed" and "Shard 1 of the labels" in job["error_message"]
    assert "No cohort named 'gone@1'" in job["error_message"]
    assert rows(engine, "SELECT count(*) AS n FROM ops.job WHERE state = 'cancelled'")[0].n >= 1
    assert rows(engine, LEFT)[0].n == 0 and rows(engine, "SELECT count(*) AS n FROM label.label_set")[0].n == 0


def test_the_same_again_shares_nothing_out(engine: Engine, settings: Settings, filled: None) -> None:
    for expected in (3, 3):
        job_id = queue_label(engine, "l", 3)
        finish(engine, settings)
        assert rows(engine, "SELECT count(*) AS n FROM ops.job WHERE shard IS NOT NULL")[0].n == expected
    assert state(engine, job_id)["result"]["unchanged"] is True


def test_workers_share_a_set_and_a_killed_one_costs_its_shard_alone(lab: Lab, engine: Engine, filled: None) -> None:
    """Two workers; a lock on the shards' table holds both in the middle of a shard while one is killed."""
    alone = queue_label(engine, "alone", 1)
    victim = lab.worker(queues="label")
    assert lab.ended(alone, 60)["state"] == "succeeded", lab.job(alone)
    lab.worker(queues="label")
    with lab.engine.connect() as blocker:
        blocker.execute(text("LOCK TABLE label.shard IN SHARE MODE"))
        job_id = queue_label(engine, "l", 5)
        at_work = "SELECT count(*) FROM ops.job WHERE shard IS NOT NULL AND state = 'running'"
        lab.until(lambda: lab.scalar(at_work) == 2, 40)
        victim.kill()
        victim.wait()
        lab.until(lambda: lab.scalar("SELECT count(*) FROM ops.job_attempt WHERE outcome = 'crashed'") == 1, 20)
        blocker.rollback()
    assert lab.ended(job_id, 60)["state"] == "succeeded", lab.job(job_id)
    assert everything(engine, "l") == everything(engine, "alone")
    lost = "SELECT count(*) FROM ops.job WHERE shard IS NOT NULL AND crash_count > 0"
    assert lab.scalar(lost) == 1 and lab.scalar("SELECT count(*) FROM ops.job WHERE shard IS NOT NULL") == 5
    assert lab.scalar(LEFT) == 0


def test_what_shards_made_is_taken_over_by_one_job(engine: Engine, settings: Settings, filled: None) -> None:
    """A version of few changes is made at once, whatever shards are asked for, and is what shards would make."""
    queue_label(engine, "l", 5)
    finish(engine, settings)
    with engine.begin() as connection:
        connection.execute(
            text(
                "UPDATE omop.timeline t SET (num_events, times, concepts, digest) = (SELECT num_events, times, "
                "concepts, digest FROM omop.timeline o WHERE o.person_id = 8) WHERE person_id = 7"
            )
        )
    job_id = queue_label(engine, "l", 5)
    finish(engine, settings)
    result = state(engine, job_id)["result"]
    assert (result["version"], result["taken_over_from"]) == (2, "l@1") and 0 < result["recomputed"] <= 2
    assert rows(engine, f"SELECT count(*) AS n FROM ops.job WHERE parent_job_id = {job_id}")[0].n == 0
    queue_label(engine, "whole", 5)
    finish(engine, settings)
    assert everything(engine, "l") == everything(engine, "whole")
