"""`python -m workers worker | run JOB | attempt JOB FENCE`: the processes that do the work."""

from __future__ import annotations

import argparse
import signal
import sys
import time

from app.errors import InputError, LachesisError, StoreError
from app.queue import QUEUES
from app.settings import read_settings
from workers.holder import Clocks, Holder


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
    run = commands.add_parser("run", help="Claim one job and run it in the foreground, without a broker.")
    run.add_argument("job", type=int)
    attempt = commands.add_parser("attempt", help="The child of a supervisor: run a job that is claimed already.")
    attempt.add_argument("job", type=int)
    attempt.add_argument("fence", type=int)
    attempt.add_argument("--board", type=int, required=True, help="Descriptor of the worker's board.")
    attempt.add_argument("--parent", type=int, required=True, help="Process to die with.")
    return top


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
    clocks = Clocks(lease=arguments.lease, heartbeat=arguments.heartbeat, poll=arguments.poll, grace=arguments.grace)
    celery_app.serve(Holder(store=ensure_up(read_settings()), queues=queues, clocks=clocks), arguments.name)


def run(arguments: argparse.Namespace) -> int:
    """Run one job as its own worker; its exit code. A Ctrl-C cancels it."""
    from app.embedded import ensure_up
    from app.store import jobs
    from app.store.session import make_engine
    from workers.pulse import Pulse
    from workers.supervisor import LOOK_SECONDS, Child

    holder = Holder(store=ensure_up(read_settings()), queues=(), clocks=Clocks(poll=0.5))
    engine = make_engine(holder.store.database_url)
    pulse = Pulse(holder, serves=False)
    pulse.register()
    claim = holder.claim(arguments.job)
    if claim is None:
        with engine.connect() as connection:
            state = jobs.find(connection, arguments.job)["state"]
        raise StoreError(f"Expected job {arguments.job} to wait, it is {state}; nothing was run.")
    signal.signal(signal.SIGINT, lambda *_: holder.board.cancel(claim.job_id, claim.fence))
    signal.signal(signal.SIGTERM, lambda *_: holder.board.stop())
    pulse.start()
    child = Child(holder, claim)
    while not child.attend():
        time.sleep(LOOK_SECONDS)
    pulse.end()
    with engine.connect() as connection:
        return int(jobs.find(connection, claim.job_id)["exit_code"] or 0)


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
                )
            )


def main(argv: list[str] | None = None) -> int:
    """Run one command; an error of ours is one sentence on stderr and its exit code."""
    arguments = parser().parse_args(argv)
    try:
        if arguments.command == "run":
            return run(arguments)
        if arguments.command == "worker":
            serve(arguments)
        else:
            attempt(arguments)
    except LachesisError as error:
        print(f"lachesis: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
