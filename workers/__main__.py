"""`python -m workers worker | run JOB | attempt JOB FENCE | encoders`: the processes that do the work."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from app.errors import InputError, LachesisError, StoreError
from app.queue import QUEUES
from app.settings import read_settings
from workers.devices import offered
from workers.holder import Clocks, Holder

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

    from app.store import jobs

LOOK_SECONDS = 0.1


def parser() -> argparse.ArgumentParser:
    """Arguments of the three commands."""
    clocks = Clocks()
    top = argparse.ArgumentParser(prog="python -m workers", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    worker = commands.add_parser("worker", help="Serve queues until SIGTERM.")
    worker.add_argument("--queues", default=",".join(QUEUES), help=f"Of {', '.join(QUEUES)}; comma between them.")
    worker.add_argument("--name", default="worker", help="Name for logs.")
    worker.add_argument("--lease", type=float, default=clocks.lease, help="Seconds a job is kept without a heartbeat.")
    worker.add_argument("--heartbeat", type=float, default=clocks.heartbeat, help="Seconds between heartbeats.")
    worker.add_argument("--poll", type=float, default=clocks.poll, help="Seconds between looks at the table.")
    worker.add_argument("--grace", type=float, default=clocks.grace, help="Seconds to end by itself when told to.")
    commands.add_parser("encoders", help="The encoders of this host as JSON.")
    run = commands.add_parser("run", help="Claim one job and run it in the foreground, without a broker.")
    run.add_argument("job", type=int)
    attempt = commands.add_parser("attempt", help="The child of a supervisor: run a job that is claimed already.")
    attempt.add_argument("job", type=int)
    attempt.add_argument("fence", type=int)
    attempt.add_argument("--board", type=int, required=True, help="Descriptor of the worker's board.")
    attempt.add_argument("--parent", type=int, required=True, help="Process to die with.")
    return top


def check_encoders() -> None:
    """Refuse to begin where an encoder of this host cannot be found, rather than at its first job."""
    from ml.registry import encoders

    try:
        encoders()
    except ValueError as error:
        raise InputError(str(error)) from None


def list_encoders() -> list[dict[str, Any]]:
    """The encoders of this host, a row each; none is built or imported."""
    from ml.registry import encoders

    check_encoders()
    return [
        {"name": known.name, "width": known.width, "weights": known.about.get("weights"), "source": known.source}
        | {"text": known.about.get("text", "")}
        for known in encoders().values()
    ]


def serve(arguments: argparse.Namespace) -> None:
    """Serve queues until told to stop."""
    from app.embedded import ensure_up
    from workers import celery_app

    queues = tuple(name for name in arguments.queues.split(",") if name)
    unknown = [name for name in queues if name not in QUEUES]
    if unknown or not queues:
        raise InputError(f"Expected queues of {', '.join(QUEUES)}, got {arguments.queues!r}.")
    if arguments.lease < 3 * arguments.heartbeat:
        raise InputError("Expected a lease of three heartbeats or more, so that a late one loses no job.")
    check_encoders()
    clocks = Clocks(lease=arguments.lease, heartbeat=arguments.heartbeat, poll=arguments.poll, grace=arguments.grace)
    settings = read_settings()
    own, store = offered(settings.devices, os.environ), ensure_up(settings)
    celery_app.serve(Holder(store=store, queues=queues, clocks=clocks, devices=own), arguments.name)


def run(arguments: argparse.Namespace) -> int:
    """Run one job as its own worker; its exit code. A Ctrl-C cancels it."""
    from app.embedded import ensure_up
    from app.store import jobs
    from app.store.session import make_engine
    from workers.pulse import Pulse
    from workers.supervisor import Child

    check_encoders()
    settings = read_settings()
    own, store = offered(settings.devices, os.environ), ensure_up(settings)
    holder = Holder(store=store, queues=(), clocks=Clocks(poll=0.5), devices=own)
    engine = make_engine(holder.store.database_url)
    pulse = Pulse(holder, serves=False)
    pulse.register()
    first = holder.claim(arguments.job)
    if first is None:
        with engine.connect() as connection:
            raise StoreError(_why_not(connection, arguments.job, len(own)))
    held, interrupted = [first], threading.Event()

    def interrupt(*_: object) -> None:
        interrupted.set()
        holder.board.cancel(held[-1].job_id, held[-1].fence)

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, lambda *_: holder.board.stop())
    pulse.start()
    following: jobs.Claim | None = first
    while following is not None:
        held.append(following)
        child = Child(holder, following)
        while not child.attend():
            time.sleep(LOOK_SECONDS)
        following = None if holder.board.stopping else next_claim(holder, engine, arguments.job, interrupted)
    pulse.end()
    with engine.connect() as connection:
        return int(jobs.find(connection, arguments.job)["exit_code"] or 0)


def _why_not(connection: Connection, job_id: int, num_devices: int) -> str:
    """Why a job cannot be taken here, where there are so many devices."""
    from app.store import jobs
    from ml.registry import encoders

    job = jobs.find(connection, job_id)
    if job["state"] in ("queued", "retry_wait") and job["encoder"] not in (None, *encoders()):
        return (
            f"Expected the encoder {job['encoder']!r} on this host, found none; run job {job_id} where it is installed."
        )
    if job["state"] in ("queued", "retry_wait") and job["num_devices"]:
        return (
            f"Expected {job['num_devices']} free device(s) for job {job_id}, and this host offers {num_devices}, some "
            "of which others may use; it waits for a worker that has them, or `lachesis cancel` it."
        )
    return f"Expected job {job_id} to wait, it is {job['state']}; nothing was run."


def next_claim(holder: Holder, engine: Engine, job_id: int, interrupted: threading.Event) -> jobs.Claim | None:
    """What this process runs next of a job that shared its work out: a shard, or the job again; None at its end."""
    from app.store import jobs

    while True:
        with engine.begin() as connection:
            job, shards = jobs.find(connection, job_id), jobs.shards(connection, job_id)
            if job["state"] != "retry_wait" or not shards:
                return None
            if interrupted.is_set():
                jobs.cancel(connection, job_id)
                return None
        waiting = [shard["job_id"] for shard in shards if shard["state"] in ("queued", "retry_wait")]
        if not any(shard["state"] in jobs.OPEN_STATES for shard in shards):
            waiting = [job_id]
        for one in waiting:
            claim = holder.claim(one)
            if claim is not None:
                return claim
        time.sleep(LOOK_SECONDS * 5)


def attempt(arguments: argparse.Namespace) -> None:
    """Run the stage of a claimed job in this process, and die with its parent."""
    from workers.supervisor import die_with_parent

    die_with_parent(arguments.parent)
    from app.embedded import ensure_up
    from app.store import jobs
    from app.store.session import make_engine
    from workers.attempt import JobWork, execute, terminable
    from workers.board import Board

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with terminable() as is_stopped:
        store = ensure_up(read_settings())
        with make_engine(store.database_url).connect() as connection:
            claim = jobs.claimed(connection, arguments.job, arguments.fence)
        if claim is not None:
            board = Board(arguments.board)
            execute(
                JobWork(
                    claim,
                    database_url=store.database_url,
                    settings=store.settings,
                    board=board,
                    is_stopped=is_stopped,
                    redis_url=store.redis_url,
                )
            )


def main(argv: list[str] | None = None) -> int:
    """Run one command; an error of ours is one sentence on stderr and its exit code."""
    arguments = parser().parse_args(argv)
    try:
        if arguments.command == "run":
            return run(arguments)
        if arguments.command == "encoders":
            print(json.dumps(list_encoders()))
        elif arguments.command == "worker":
            serve(arguments)
        else:
            attempt(arguments)
    except LachesisError as error:
        print(f"lachesis: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
