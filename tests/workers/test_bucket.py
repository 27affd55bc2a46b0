"""A training and an embedding whose files lie in a bucket."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from safetensors.numpy import load_file
from sqlalchemy import Engine, text

from app.cli.follow import progress_words
from app.errors import Preempted, StoreError
from app.queue import nudge
from app.settings import Settings
from app.store import artifacts, jobs, object_place
from app.store.places import place
from app.store.work import InlineWork
from tests.bucket import Bucket, serving
from tests.workers.conftest import Lab
from tests.workers.small_cohort import SMALL, insert_cohort
from tests.workers.test_pretrain_resume import ARGS, JobWork
from workers.stages.embed import embed
from workers.stages.pretrain import pretrain


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    with serving(tmp_path) as made:
        for name, value in made.environment.items():
            monkeypatch.setenv(name, value)
        object_place._client.cache_clear()
        boto3.client("s3").create_bucket(Bucket="artifacts")
        yield made
        object_place._client.cache_clear()


@pytest.fixture
def stored(server: Bucket, settings: Settings) -> Settings:
    return replace(settings, artifacts="s3://artifacts/lachesis")


class Host:
    """A host with copies of its own, on which a job is attempted."""

    def __init__(self, engine: Engine, settings: Settings, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self.settings = replace(settings, cache=folder / "cache")

    def attempt(self, job_id: int, fence: int, **how: Any) -> JobWork:
        folder = self.folder / f"runs-{fence}"
        more = {"folder": folder, "settings": self.settings, "job_id": job_id, "fence": fence, **how}
        return JobWork(self.engine, args=dict(ARGS), **more)

    def work(self, **args: Any) -> InlineWork:
        return InlineWork(self.engine, args=args, folder=self.folder / "work", settings=self.settings)


@pytest.fixture
def job(engine: Engine, tmp_path: Path) -> int:
    with engine.begin() as connection:
        insert_cohort(connection, tmp_path / "scans")
        made = "INSERT INTO ops.job (kind, queue, name) VALUES ('pretrain', 'gpu', 't') RETURNING job_id"
        return int(connection.execute(text(made)).scalar_one())


def weights(settings: Settings, engine: Engine, checkpoint: int) -> dict[str, Any]:
    statement = text("SELECT path, sha256 FROM model.checkpoint WHERE checkpoint_id = :c")
    with engine.connect() as connection:
        row = connection.execute(statement, {"c": checkpoint}).one()
    return load_file(artifacts.fetch(settings, row.path, row.sha256))


def test_a_training_goes_on_at_another_host_from_the_bucket_and_is_embedded_at_a_third(
    engine: Engine, stored: Settings, job: int, tmp_path: Path
) -> None:
    first, second, third = (Host(engine, stored, tmp_path / name) for name in ("first", "second", "third"))
    with pytest.raises(Preempted):
        pretrain(first.attempt(job, 1, steps=11, error=Preempted()))
    again = second.attempt(job, 2)
    made = pretrain(again)
    assert again.started == [11]
    same = pretrain(third.work(**{**ARGS, "name": "uninterrupted"}))
    ends = [weights(second.settings, engine, one["checkpoint_id"]) for one in (made, same)]
    assert all(np.array_equal(ends[0][name], ends[1][name]) for name in ends[1])
    embedded = embed(third.work(checkpoint="t", cohort="chest"))
    assert embedded["num_scans"] > 0 and embed(second.work(checkpoint="t", cohort="chest"))["unchanged"]
    assert {one.key.split("/")[0] for one in place(stored).listing()} >= {"checkpoints", "embeddings"}


class Outage(JobWork):
    """Work whose bucket is away from step 4 to step 9, and comes back empty."""

    server: Bucket

    def progress(self, done: int, total: int | None = None, unit: str = "", note: str = "") -> None:
        super().progress(done, total, unit, note)
        if unit == "step" and done == 4:
            self.server.end()
        if unit == "step" and done == 9:
            self.server.start()
            boto3.client("s3").create_bucket(Bucket="artifacts")


def test_a_training_outlives_a_bucket_that_is_away(
    engine: Engine,
    stored: Settings,
    server: Bucket,
    job: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("ml.keeping.KEEP_SECONDS", 0.0)
    monkeypatch.setattr("ml.keeping.KEEP_TIMES", 0.0)
    monkeypatch.setattr("ml.keeping.WAIT_SECONDS", 0.0)
    host = Host(engine, stored, tmp_path / "host")
    work = Outage(engine, args=dict(ARGS), folder=tmp_path / "runs", settings=host.settings, job_id=job, fence=1)
    work.server = server
    made = pretrain(work)
    said = [line for line in capsys.readouterr().err.splitlines() if "could not be kept" in line]
    assert said and all("check AWS_ENDPOINT_URL" in line and "disk" not in line for line in said)
    assert weights(stored, engine, made["checkpoint_id"])


def test_a_bucket_that_may_not_be_used_is_told_before_the_training(
    engine: Engine, stored: Settings, job: int, tmp_path: Path
) -> None:
    host = Host(engine, replace(stored, artifacts="s3://absent"), tmp_path / "host")
    with pytest.raises(StoreError, match="answered NoSuchBucket"):
        pretrain(host.attempt(job, 1))
    assert not list(host.folder.rglob("*.safetensors"))


def test_a_job_whose_bucket_is_away_waits_says_why_and_is_tried_again(
    lab: Lab, stored: Settings, server: Bucket, job: int
) -> None:
    lab.settings = stored
    server.end()
    lab.worker()
    with lab.engine.begin() as connection:
        queued = jobs.insert(connection, kind="pretrain", queue="gpu", args={**ARGS, "set": {**SMALL, "epochs": "1"}})
    assert nudge(lab.store.redis_url, queued, "gpu")
    lab.until(lambda: lab.job(queued)["state"] == "retry_wait", 30)
    waiting = lab.job(queued)
    assert "check AWS_ENDPOINT_URL" in waiting["error_message"]
    assert progress_words(waiting).startswith("waits to be tried again: Expected the server of the bucket artifacts")
    server.start()
    boto3.client("s3").create_bucket(Bucket="artifacts")
    done = lab.ended(queued, 90)
    assert done["state"] == "succeeded", done["error_message"]
