"""Following a job from the command line: submit, show how far it is, end with its exit code."""

from __future__ import annotations

import json as jsonlib
import logging
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from app.cli.endings import ending
from app.errors import Cancelled, JobFailed, StoreError
from app.settings import Settings

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

    from app.embedded import Store

LINE_SECONDS = 30.0
"""Between two lines where there is no terminal."""
UNCLAIMED_SECONDS = 3.0
SILENT_SECONDS = 25.0
"""Two heartbeats and a half: the worker is gone, or the machine is very busy."""
RETURN_SECONDS = 60.0
"""How long a follower waits for a database that went away."""
INLINE_HOLD_SECONDS = 60.0
"""A job to be run in the foreground is no other worker's for so long."""
ENDED = ("succeeded", "failed", "cancelled", "dead")


def submit_and_follow(
    settings: Settings,
    kind: str,
    args: dict[str, Any],
    name: str | None,
    *,
    detach: bool,
    inline: bool,
    as_json: bool,
) -> dict[str, Any]:
    """Queue a job and follow it to its end.

    Args:
        settings: where the store is.
        kind: stage.
        args: its arguments.
        name: name of what it makes.
        detach: print the job's id and return at once.
        inline: run it in the foreground, without a broker or a worker.
        as_json: one object on stdout.

    Returns:
        The job's result; {"job_id"} where detached.

    Raises:
        LachesisError: with the job's message and exit code.
    """
    from app.embedded import ensure_up, require_own
    from app.queue import submit

    store = ensure_up(settings)
    require_own(store)
    with ExitStack() as stack:
        stack.enter_context(interrupts_held_back())  # once the job is there, Ctrl-C is about following it
        job_id = submit(store, kind, args, name, held_for=INLINE_HOLD_SECONDS if inline and not detach else 0.0)
        if inline and not detach:
            stack.close()
            return conclude(follow(store, job_id, start_inline(store, job_id)), as_json=as_json)
        with going_on(job_id):
            care_for_workers(store)  # who goes on with it, also where nobody follows
            stack.close()
            if detach:
                print(jsonlib.dumps({"job_id": job_id}) if as_json else job_id)
                return {"job_id": job_id}
            job = follow(store, job_id)
    return conclude(job, as_json=as_json)


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Ctrl-C in it takes effect at its end; only the main thread hears of one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[bool] = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def care_for_workers(store: Store) -> None:
    """Start our own workers where none serves; a job is queued by then, so trouble is told and survived."""
    from app.embedded import ensure_workers

    try:
        ensure_workers(store)
    except StoreError as error:
        print(f"lachesis: {error}", file=sys.stderr)


@contextmanager
def going_on(job_id: int) -> Iterator[None]:
    """Ctrl-C in it leaves the job as it is, says how to stop it, and exits with 130."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nlachesis: job {job_id} goes on; `lachesis cancel {job_id}` stops it.", file=sys.stderr)
        raise SystemExit(130) from None


def start_inline(store: Store, job_id: int) -> subprocess.Popen[bytes]:
    """Run a job in the foreground: it shares this terminal, and its Ctrl-C."""
    import os

    from app.embedded import environment

    kept = {key: value for key, value in os.environ.items() if not key.startswith("LACHESIS_")}
    command = [sys.executable, "-P", "-m", "workers", "run", str(job_id)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, env={**kept, **environment(store.settings)})


def follow(store: Store, job_id: int, process: subprocess.Popen[bytes] | None = None) -> dict[str, Any]:
    """Show a job's progress until it ends; the job as it ended. `process` runs it, where it runs in the foreground."""
    logging.getLogger("psycopg").setLevel(logging.ERROR)  # it warns of each query that Ctrl-C breaks off
    watch = Watch(store, job_id, inline=process is not None)
    try:
        if process is None:
            with going_on(job_id):
                job = watch_to_end(watch, None)
        else:
            try:
                job = watch_to_end(watch, process)
            except KeyboardInterrupt:
                job = wait_for_cancel(watch, process)
        return job | {"loads": watch.loads(job)}
    finally:
        watch.close()


def watch_to_end(watch: Watch, process: subprocess.Popen[bytes] | None) -> dict[str, Any]:
    """Look, show and care until the job ends. Raises StoreError where its foreground process left it."""
    job = watch.look()
    with reporter(title(job)) as report:
        while job["state"] not in ENDED:
            report.show(job)
            watch.care(job, report)
            left = process is not None and process.poll() is not None
            time.sleep(0.05 if watch.age < 5 else 0.2)
            job = watch.look()
            if left and job["state"] not in ENDED:
                raise StoreError(_left(job))
    return job


def _left(job: dict[str, Any]) -> str:
    """Why a foreground process ended before its job, and what becomes of the job."""
    if job["state"] == "retry_wait" and job["error_message"]:
        return f"{job['error_message']} A worker tries job {job['job_id']} again; `lachesis watch` follows it."
    return f"The process of job {job['job_id']} ended; see `lachesis show job {job['job_id']}`."


def wait_for_cancel(watch: Watch, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """The foreground process saw the same Ctrl-C: the job ends as cancelled, or is killed by a second one."""
    try:
        process.wait()
    except KeyboardInterrupt:
        process.kill()
        raise SystemExit(130) from None
    return watch.look()


def title(job: dict[str, Any]) -> str:
    """A job in two words."""
    return " ".join(filter(None, (job["kind"], job["name"])))


class Watch:
    """Looks at one job, through lost connections, and cares for its workers."""

    def __init__(self, store: Store, job_id: int, *, inline: bool) -> None:
        from app.store.session import make_engine

        self.store, self.job_id, self.inline = store, job_id, inline
        self._engine: Engine = make_engine(store.database_url, application_name="lachesis:follow")
        self._connection: Connection | None = None
        self._started = self._next_care = time.monotonic()
        self._next_care += UNCLAIMED_SECONDS

    @property
    def age(self) -> float:
        """Seconds since this began."""
        return time.monotonic() - self._started

    def look(self) -> dict[str, Any]:
        """The job now.

        Raises:
            StoreError: the database has not answered for a minute.
            UnknownName: there is no such job.
        """
        from sqlalchemy.exc import DBAPIError

        from app.store import jobs

        deadline = time.monotonic() + RETURN_SECONDS
        while True:
            try:
                if self._connection is None:
                    self._connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
                return jobs.find(self._connection, self.job_id)
            except DBAPIError:
                self.close()
                if time.monotonic() > deadline:
                    raise StoreError(
                        f"The database does not answer any more; job {self.job_id} may go on without this command."
                    ) from None
                self._revive()

    def loads(self, job: dict[str, Any]) -> list[dict[str, Any]]:
        """What a job that loads brought, a row a table; nothing where it failed or changed nothing."""
        from app.store.listing import delivery

        if job["kind"] != "load" or job["state"] != "succeeded" or self._connection is None:
            return []
        return delivery(self._connection, self.job_id)

    def _revive(self) -> None:
        """Embedded servers that died are started again; servers of somebody else are waited for."""
        from app.embedded import ensure_up, was_stopped

        time.sleep(0.5)
        if self.store.embedded and was_stopped(self.store.settings):
            raise StoreError(f"`lachesis down` ended the servers; job {self.job_id} goes on after `lachesis up`.")
        try:
            ensure_up(self.store.settings)
        except StoreError:
            return

    def care(self, job: dict[str, Any], report: Report) -> None:
        """See that somebody works on it: start our own workers again, or say who is missing."""
        if self.inline or time.monotonic() < self._next_care:
            return
        self._next_care = time.monotonic() + UNCLAIMED_SECONDS
        waiting = job["state"] in ("queued", "retry_wait")
        self._say_who_has_the_encoder(job, waiting, report)
        self._say_who_has_devices(job, waiting, report)
        if self.store.embedded:
            if waiting or is_silent(job):
                care_for_workers(self.store)
        elif waiting and not self._is_served(job["queue"]):
            self._next_care = time.monotonic() + LINE_SECONDS
            report.say(
                f"job {self.job_id} waits: no worker serves the queue {job['queue']!r}; start one with "
                f"`lachesis worker --queues {job['queue']}`."
            )

    def _say_who_has_the_encoder(self, job: dict[str, Any], waiting: bool, report: Report) -> None:
        from app.store import attempts

        encoder = job.get("encoder")
        if not (waiting and encoder) or self._connection is None:
            return
        if not attempts.encoder_is_served(self._connection, encoder):
            self._next_care = time.monotonic() + LINE_SECONDS
            seen = "; ".join(attempts.encoders_by_worker(self._connection, job["queue"])) or "none"
            report.say(
                f"job {self.job_id} waits: no worker has the encoder {encoder!r}; workers seen: {seen}; start one "
                "where it is installed (docs/encoders.md)."
            )

    def _say_who_has_devices(self, job: dict[str, Any], waiting: bool, report: Report) -> None:
        from app.store import devices

        if not (waiting and job["num_devices"]) or self._connection is None:
            return
        seen = devices.too_few(self._connection, job["queue"], job["num_devices"])
        if seen is not None:
            self._next_care = time.monotonic() + LINE_SECONDS
            report.say(
                f"job {self.job_id} waits: it needs {job['num_devices']} devices of one host; workers seen: "
                f"{'; '.join(seen)}; start one where there are as many, or ask for fewer with --gpus."
            )

    def _is_served(self, queue: str) -> bool:
        from app.store import attempts

        if self._connection is None:
            return True
        return attempts.queue_is_served(self._connection, queue)

    def close(self) -> None:
        """Give the connection back."""
        import contextlib

        from sqlalchemy.exc import DBAPIError

        if self._connection is not None:
            with contextlib.suppress(DBAPIError):
                self._connection.close()
            self._connection = None


def conclude(job: dict[str, Any], *, as_json: bool) -> dict[str, Any]:
    """Say how a job ended; its result.

    Raises:
        JobFailed: with its message and exit code.
        Cancelled: it was cancelled.
    """
    if as_json:
        shown = {key: job[key] for key in ("job_id", "kind", "name", "state", "result", "exit_code", "error_message")}
        shown |= {"loads": job["loads"]} if job.get("loads") else {}
        print(jsonlib.dumps(shown, default=str))
    if job["state"] == "succeeded":
        if not as_json:
            if job.get("loads"):
                from app.cli.loads import print_delivery

                print_delivery(job["loads"])
            if job["kind"] == "cohort" and not (job["result"] or {}).get("unchanged"):
                from app.cli.cohorts import print_cohort

                print_cohort(job["result"] or {})
            said = ending(job["kind"], job["result"] or {})
            print(f"{title(job)}: {said} (job {job['job_id']})", file=sys.stderr)
        return dict(job["result"] or {})
    if job["state"] == "cancelled":
        raise Cancelled(f"Job {job['job_id']} ({title(job)}) was cancelled.")
    message, code = job["error_message"] or f"Job {job['job_id']} is {job['state']}.", job["exit_code"] or 1
    hint = f" (`lachesis logs {job['job_id']}` says where.)" if code == JobFailed.exit_code else ""
    raise JobFailed(message + hint, code)


class Report(Protocol):
    """Where progress is shown."""

    def show(self, job: dict[str, Any]) -> None:
        """How far a job is."""

    def say(self, message: str) -> None:
        """One sentence beside the progress."""


def reporter(name: str) -> AbstractContextManager[Report]:
    """A bar with the time left on a terminal, else a line every 30 s; on stderr."""
    return _terminal(name) if sys.stderr.isatty() else _lines(name)


@contextmanager
def _lines(name: str) -> Iterator[Report]:
    yield Lines(name)


class Lines:
    """A line every 30 s."""

    def __init__(self, name: str) -> None:
        self.name, self._next, self._pace = name, time.monotonic() + LINE_SECONDS, Pace()
        self._trouble: str | None = None

    def show(self, job: dict[str, Any]) -> None:
        self._pace.see(job)
        news = job["state"] == "retry_wait" and job["error_message"] != self._trouble
        self._trouble = job["error_message"] if news else self._trouble
        if news or time.monotonic() >= self._next:
            self._next = time.monotonic() + LINE_SECONDS
            self.say(f"{self.name}: {progress_words(job, self._pace)}")

    def say(self, message: str) -> None:
        print(f"lachesis: {message}", file=sys.stderr, flush=True)


def progress_words(job: dict[str, Any], pace: Pace | None = None) -> str:
    """How far a job is, in words."""
    if is_silent(job):
        return f"no sign of life from its worker for {duration(job['silent_seconds'])}; another takes over soon"
    shared = job["state"] == "retry_wait" and job.get("open_shards")
    if (job["state"] != "running" and not shared) or job["done"] is None:
        return _waiting(job)
    parts = [f"{job['done']:,}" + (f" of {job['total']:,}" if job["total"] else "") + f" {job['unit']}".rstrip()]
    if pace is not None and pace.rate is not None:
        parts.append(per_second(pace.rate, job["unit"]))
    if pace is not None and pace.seconds_left is not None:
        parts.append(f"about {duration(pace.seconds_left)} left")
    if job["note"]:
        parts.append(job["note"])
    return ", ".join(parts)


def _waiting(job: dict[str, Any]) -> str:
    if job["state"] != "retry_wait":
        return "waits for a worker"
    why = str(job["error_message"] or "").rstrip(".")
    return f"waits to be tried again: {why}" if why else "waits to be tried again"


def is_silent(job: dict[str, Any]) -> bool:
    """True where the worker of a running job missed two heartbeats."""
    return job["state"] == "running" and (job["silent_seconds"] or 0.0) > SILENT_SECONDS


PACE_SECONDS = 60.0
"""The pace is that of the last minute: a table of wide rows is slower than one of narrow ones."""


class Pace:
    """How fast a job goes, by what was done while this command watched: a resumed training does not begin at 0."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self._clock = clock or time.monotonic
        self._what: tuple[Any, ...] = ()
        self._seen: deque[tuple[float, int]] = deque()
        self._left: int | None = None

    def see(self, job: dict[str, Any]) -> Pace:
        """Note how far a job is now."""
        if job["done"] is None:
            return self
        what = (job["fence"], job["unit"], job["total"])
        if what != self._what or (self._seen and job["done"] < self._seen[-1][1]):
            self._what = what
            self._seen.clear()
        now = self._clock()
        if not self._seen or now - self._seen[-1][0] >= 0.5 or job["done"] == job["total"]:
            self._seen.append((now, job["done"]))
        while now - self._seen[0][0] > PACE_SECONDS and len(self._seen) > 2:
            self._seen.popleft()
        self._left = max(0, job["total"] - job["done"]) if job["total"] else None
        return self

    @property
    def rate(self) -> float | None:
        """Units a second; None where nothing can be said yet."""
        if len(self._seen) < 2:
            return None
        (since, first), (now, done) = self._seen[0], self._seen[-1]
        return (done - first) / (now - since) if done > first and now > since else None

    @property
    def seconds_left(self) -> float | None:
        """None where nothing can be said yet, or no total is known."""
        rate = self.rate
        return self._left / rate if rate and self._left is not None else None


def per_second(rate: float, unit: str) -> str:
    """A pace as a person says it: `1,240,000 rows/s`, or `8 s/scan` where one takes longer than a second."""
    unit = unit or "steps"
    if rate >= 1:
        shown = float(f"{rate:.3g}")
        return f"{shown:,.0f} {unit}/s" if shown >= 100 else f"{shown:g} {unit}/s"
    return f"{1 / rate:.3g} s/{unit.removesuffix('s')}"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


@contextmanager
def _terminal(name: str) -> Iterator[Report]:
    with _progress() as progress:
        yield Terminal(progress, progress.add_task(name, total=None, unit="", note="", rate="", left=""))


def _progress() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)


class Terminal:
    """A rich bar."""

    def __init__(self, progress: Any, task: Any) -> None:
        self._progress, self._task, self._count, self._pace = progress, task, None, Pace()

    def show(self, job: dict[str, Any]) -> None:
        if job["state"] != "running" or job["done"] is None or is_silent(job):
            self._progress.update(self._task, note=progress_words(job), rate="", left="")
            return
        count = (job["unit"], job["total"])
        if count != self._count:
            self._count = count  # type: ignore[assignment]
            self._progress.reset(self._task, total=job["total"], completed=job["done"])
        values = {"completed": job["done"], "total": job["total"], "unit": job["unit"], "note": job["note"]}
        self._progress.update(self._task, **values, **pace_fields(self._pace.see(job), job["unit"]))

    def say(self, message: str) -> None:
        self._progress.console.print(f"lachesis: {message}", highlight=False)


def pace_fields(pace: Pace, unit: str) -> dict[str, str]:
    """The fields `rate` and `left` of a bar; empty where nothing can be said yet."""
    rate, left = pace.rate, pace.seconds_left
    return {
        "rate": "" if rate is None else per_second(rate, unit),
        "left": "" if left is None else f"{duration(left)} left",
    }


@contextmanager
def bar(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Progress of work in this process: the value of the context advances it by n."""
    job: dict[str, Any] = {"state": "running", "fence": 0, "done": 0, "total": total, "unit": unit, "note": ""}
    job["silent_seconds"] = None
    with reporter(title) as report:
        report.show(job)

        def advance(n: int) -> None:
            job["done"] += n
            report.show(job)

        yield advance
