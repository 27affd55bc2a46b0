"""The Celery side of a worker: it hears the bell and lends the process in which a job runs. Jobs live in Postgres.

Every message means "look at the table": the child claims the best due job of its queues, whichever was named, and ends
quietly where there is none. Messages are acknowledged before the work (leases recover, not redeliveries), never
prefetched, and carry a job's id alone.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from typing import Any

from celery import Celery, signals
from celery.exceptions import SecurityWarning
from sqlalchemy.exc import DBAPIError

from app.queue import RUN_JOB, celery_app
from app.store import jobs
from workers import stages
from workers.attempt import JobWork, execute, passes, terminable
from workers.holder import Holder
from workers.pulse import Pulse
from workers.supervisor import LOOK_SECONDS, Child

SETTINGS: dict[str, Any] = {
    "task_acks_late": False,
    "task_reject_on_worker_lost": False,
    "worker_disable_prefetch": True,
    "worker_prefetch_multiplier": 1,
    "worker_concurrency": 1,
    "worker_pool": "prefork",
    "worker_max_tasks_per_child": 50,
    "worker_cancel_long_running_tasks_on_connection_loss": False,
    "worker_enable_remote_control": False,
    "worker_send_task_events": False,
    "worker_redirect_stdouts": False,
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
    "broker_channel_error_retry": True,
}
"""What differs between Celery's defaults and a worker whose jobs take hours."""


def worker_app(holder: Holder) -> Celery:
    """The Celery application of one worker, its one task and its signals connected."""
    app = celery_app(holder.store.redis_url, unacked_restore_interval=10, unacked_restore_throttle=1)
    app.conf.update(SETTINGS)

    @app.task(name=RUN_JOB, ignore_result=True)
    def run_job(job_id: int) -> None:
        run_best(holder)

    def stop(**_: Any) -> None:
        holder.board.stop()

    signals.worker_shutting_down.connect(stop, weak=False)
    return app


def serve(holder: Holder, name: str) -> None:
    """Serve until a SIGTERM; the job at hand is handed back at its next check."""
    # Running as root matters to Celery where it reads pickle, which nobody here does.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    pulse = Pulse(holder, serves=True)
    pulse.register()
    app = worker_app(holder)
    worker = app.Worker(
        hostname=f"{name}@{holder.host}",
        queues=list(holder.queues),
        loglevel="WARNING",
        quiet=True,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
    )
    pulse.start()
    try:
        worker.start()
    finally:
        holder.board.stop()
        pulse.end()
    if worker.exitcode:
        sys.exit(worker.exitcode)


def run_best(holder: Holder) -> None:
    """Claim the best due job and see it through; quiet where there is none, where this worker has one or stops."""
    if holder.board.stopping:
        return
    try:
        claim = holder.claim()
    except DBAPIError as error:
        if not passes(error):
            raise
        return  # whoever finds the database again finds the job
    if claim is None:
        return
    with terminable() as is_stopped:
        if claim.kind in stages.CHILD_KINDS:
            child = Child(holder, claim)
            while not child.attend(stopped=is_stopped()):
                time.sleep(LOOK_SECONDS)
        else:
            run_here(holder, claim, is_stopped)


def run_here(holder: Holder, claim: jobs.Claim, is_stopped: Any) -> None:
    """Run a job in this process."""
    url, settings = holder.store.database_url, holder.store.settings
    redis_url = holder.store.redis_url
    work = JobWork(
        claim, database_url=url, settings=settings, board=holder.board, is_stopped=is_stopped, redis_url=redis_url
    )
    if not execute(work):
        os._exit(os.EX_TEMPFAIL)  # the pulse sees its death once the database is back; Celery starts another child
