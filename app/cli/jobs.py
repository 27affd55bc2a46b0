"""Jobs: `jobs`, `watch`, `logs`, `cancel`, `retry`."""

from __future__ import annotations

import json as jsonlib
import time
from typing import Annotated, Any

import typer

from app.cli.look import AsJson, connect, print_table
from app.errors import UnknownName

JobId = Annotated[int, typer.Argument(metavar="JOB", help="Its number, as `lachesis jobs` shows it.", min=1)]

STATES = ("queued", "running", "retry_wait", "succeeded", "failed", "cancelled", "dead")
FOLLOW_SECONDS = 0.5


def jobs(
    state: Annotated[str | None, typer.Option(help=f"Only those in one state: {', '.join(STATES)}.")] = None,
    limit: Annotated[int, typer.Option(help="Rows at the most.", min=1)] = 30,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first.

    Examples:
      lachesis jobs
      lachesis jobs --state failed --json
    """
    from app.store import jobs as store

    if state is not None and state not in STATES:
        raise UnknownName("state", state, STATES)
    with connect().connect() as connection:
        rows = store.listing(connection, state, limit)
    if as_json:
        typer.echo(jsonlib.dumps({"jobs": rows}, default=str))
    else:
        print_table([shown(row) for row in rows])


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A job as a line of the list."""
    from app.cli.follow import duration

    done = f"{row['done']:,} of {row['total']:,} {row['unit']}".strip() if row["total"] else ""
    seconds = row["worked_seconds"]
    return {
        "job": row["job_id"],
        "kind": row["kind"],
        "name": row["name"],
        "state": row["state"],
        "attempt": row["attempt"],
        "progress": done if row["state"] == "running" else "",
        "took": "" if seconds is None else f"{seconds:.1f} s" if seconds < 60 else duration(seconds),
        "created": row["created_at"],
        "error": (row["error_message"] or "")[:80],
    }


def watch(job: JobId, as_json: AsJson = False) -> None:
    """Follow a job to its end, and end with its exit code.

    Examples:
      lachesis watch 12
      lachesis pretrain tte --encoder tiny --labels chest --name a --detach | xargs lachesis watch
    """
    from app.cli.follow import care_for_workers, conclude, follow
    from app.embedded import ensure_up
    from app.settings import read_settings

    store = ensure_up(read_settings())
    care_for_workers(store)
    conclude(follow(store, job), as_json=as_json)


def logs(
    job: JobId,
    on: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """What a job said, oldest first.

    Examples:
      lachesis logs 12
      lachesis logs 12 -f
    """
    from app.cli.follow import ENDED
    from app.store import jobs as store

    lines: list[dict[str, Any]] = []
    with connect().connect() as connection:
        connection = connection.execution_options(isolation_level="AUTOCOMMIT")
        last = 0
        while True:
            found_job = store.find(connection, job)
            ended = found_job["state"] in ENDED
            while found := store.log_lines(connection, job, last):
                last = found[-1]["job_log_id"]
                lines += found if as_json else []
                for line in [] if as_json else found:
                    level = "" if line["level"] == "info" else f"{line['level']}: "
                    typer.echo(f"{line['at']:%Y-%m-%d %H:%M:%S}  {line['fence']}  {level}{line['message']}")
            if ended or not on:
                break
            time.sleep(FOLLOW_SECONDS)
    if as_json:
        typer.echo(jsonlib.dumps({"lines": lines}, default=str))
    elif found_job["state"] in ENDED and found_job["error_message"]:
        end = f"{found_job['finished_at']:%Y-%m-%d %H:%M:%S}  {found_job['fence']}"
        typer.echo(f"{end}  {found_job['state']}: {found_job['error_message']}")


def cancel(job: JobId, as_json: AsJson = False) -> None:
    """Cancel a job: at once while it waits, at its next check while it runs.

    Examples:
      lachesis cancel 12
      lachesis cancel 12 --json
    """
    from app.store import jobs as store

    with connect().begin() as connection:
        state = store.cancel(connection, job)
    if as_json:
        typer.echo(jsonlib.dumps({"job_id": job, "state": state}))
    elif state == "cancelled":
        typer.echo(f"Job {job} is cancelled.")
    elif state == "running":
        typer.echo(f"Job {job} is asked to stop; `lachesis watch {job}` waits for its end.")
    else:
        typer.echo(f"Job {job} has ended before: {state}.")


def retry(job: JobId, as_json: AsJson = False) -> None:
    """Queue a failed, cancelled or dead job again.

    Examples:
      lachesis retry 12
      lachesis retry 12 && lachesis watch 12
    """
    from app.cli.follow import care_for_workers
    from app.embedded import ensure_up
    from app.queue import nudge
    from app.settings import read_settings
    from app.store import jobs as store
    from app.store.session import make_engine

    servers = ensure_up(read_settings())
    with make_engine(servers.database_url).begin() as connection:
        queue = store.retry(connection, job)
    nudge(servers.redis_url, job, queue)
    care_for_workers(servers)
    typer.echo(jsonlib.dumps({"job_id": job, "state": "queued"}) if as_json else f"Job {job} is queued again.")


def register(app: typer.Typer) -> None:
    """Add the commands about jobs."""
    for command in (jobs, watch, logs, cancel, retry):
        app.command()(command)
