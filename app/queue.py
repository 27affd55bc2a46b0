"""Submitting jobs: the row first, then a nudge through Redis that carries the job's id and nothing else.

Postgres is the queue; a lost nudge costs the seconds until an idle worker looks at the table by itself.
"""

from __future__ import annotations

import getpass
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from app.errors import LachesisError, UnknownName

if TYPE_CHECKING:
    from celery import Celery
    from sqlalchemy import Connection

    from app.embedded import Store

QUEUE_OF = {
    "load": "load",
    "forget": "load",
    "cohort": "label",
    "tasks": "label",
    "label": "label",
    "features": "label",
    "leakage": "label",
    "label_shard": "label",
    "cache": "load",
    "pretrain": "gpu",
    "embed": "gpu",
    "evaluate": "eval",
    "report": "eval",
    "slices": "eval",
    "load_embeddings": "eval",
}
"""Which workers may claim a kind of job."""

QUEUES = tuple(sorted(set(QUEUE_OF.values())))

RUN_JOB = "run_job"
"""The one Celery task there is, for ever: old workers silently discard the messages of names they do not know."""


def submit(
    store: Store,
    kind: str,
    args: dict[str, Any],
    name: str | None = None,
    *,
    dedupe_key: str | None = None,
    parent: int | None = None,
    held_for: float = 0.0,
) -> int:
    """Queue a job and ring for a worker; its id.

    Args:
        store: where the job is kept.
        kind: which stage fulfils it.
        args: its arguments, JSON.
        name: name of what it makes.
        dedupe_key: at most one open job a key; the open one's id is returned.
        parent: the job that queued it.
        held_for: seconds in which only a claim by its id takes it, and for which no bell rings.

    Raises:
        UnknownName: there is no such kind.
    """
    from app.store import jobs
    from app.store.session import make_engine

    if kind not in QUEUE_OF:
        raise UnknownName("kind of job", kind, QUEUE_OF)
    queue = QUEUE_OF[kind]
    engine = make_engine(store.database_url)
    values: dict[str, Any] = {"kind": kind, "queue": queue, "name": name, "created_by": user()}
    with engine.begin() as connection:
        values["args"] = args | _encoder(connection, kind, args)
        job_id = jobs.insert(connection, **values, dedupe_key=dedupe_key, parent=parent, delay=held_for)
    if not held_for and not nudge(store.redis_url, job_id, queue):
        with engine.begin() as connection:
            jobs.unpublish(connection, job_id)
    return job_id


def _encoder(connection: Connection, kind: str, args: dict[str, Any]) -> dict[str, str]:
    """The encoder that embedding by a checkpoint needs, so that a worker which has it takes the job.

    A checkpoint that is not there yet may be by the time the job runs, whose stage says so where it is not.
    """
    from app.store import artifacts

    if kind != "embed":
        return {}
    with suppress(LachesisError):
        found = artifacts.find_checkpoint(connection, str(args["checkpoint"]))
        return {} if found.arm == artifacts.EXTERNAL else {"encoder": found.encoder}
    return {}


def user() -> str | None:
    """The operating system's name of whoever runs this."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return None


def nudge(redis_url: str, job_id: int, queue: str) -> bool:
    """Ring for a worker of `queue`; False where Redis is away. Takes two seconds at the most."""
    from kombu.exceptions import OperationalError
    from redis.exceptions import RedisError

    try:
        producer = publisher(redis_url)
        with producer.connection_for_write() as connection:
            producer.send_task(RUN_JOB, args=[job_id], queue=queue, connection=connection, retry=False)
    except (OperationalError, RedisError, OSError):
        return False
    return True


@lru_cache(maxsize=8)
def publisher(redis_url: str) -> Celery:
    """A Celery application that only sends."""
    return celery_app(redis_url, socket_timeout=1.0, max_retries=1, interval_start=0, interval_step=0.1)


def celery_app(redis_url: str, *, socket_timeout: float = 5.0, **transport_options: Any) -> Celery:
    """A Celery application on `redis_url` as senders and workers share it: JSON, known queues, no results."""
    from celery import Celery
    from kombu.entity import Queue

    app = Celery("lachesis", broker=broker_url(redis_url), set_as_current=False)
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        result_accept_content=["json"],
        result_backend=None,
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        task_queues=[Queue(name) for name in QUEUES],  # type: ignore[no-untyped-call]
        task_default_queue=QUEUES[0],
        task_create_missing_queues=False,
        task_publish_retry=False,
        broker_connection_timeout=socket_timeout,
        broker_pool_acquire_timeout=5,
        broker_transport_options={
            "socket_timeout": socket_timeout,
            "socket_connect_timeout": min(3.0, socket_timeout),
            "socket_keepalive": True,
            "retry_on_timeout": False,
            "health_check_interval": 25,
            "visibility_timeout": 3600,
            "global_keyprefix": "lachesis:",
            **transport_options,
        },
    )
    return app


def broker_url(redis_url: str) -> str:
    """A redis-py URL as Celery reads it: `unix://PATH?db=N` is `redis+socket://PATH?virtual_host=N` there."""
    parts = urlsplit(redis_url)
    if parts.scheme != "unix":
        return redis_url
    number = parse_qs(parts.query).get("db", ["0"])[0]
    return f"redis+socket://{parts.path}?virtual_host={number}"
