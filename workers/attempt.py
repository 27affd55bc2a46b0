"""One attempt at one job, in the process that does the work: JobWork, and what each way to end means for the job."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import DBAPIError

from app.errors import (
    ArtifactsAway,
    Cancelled,
    FenceLost,
    InputError,
    LachesisError,
    Preempted,
    RankEnded,
    Waiting,
)
from app.queue import QUEUE_OF, nudge
from app.settings import Settings
from app.store import attempts, jobs
from app.store.runs import runs_folder
from app.store.session import make_engine
from workers.board import Board
from workers.stages import stage

if TYPE_CHECKING:
    from sqlalchemy import Connection

PROGRESS_SECONDS = 0.5
NOTE_SECONDS = 10.0
LONGEST_MESSAGE = 300
MOST_PLACES = 8
"""Innermost calls of a failed attempt that its log names."""
PATIENCE_SECONDS = 45.0
"""How long an attempt tries to report its end to a database that is away; its lease is over soon afterwards."""
PASSING = ("08", "40001", "40P01", "55P03", "57P01", "57P02", "57P03", "53300")
"""SQLSTATEs (and their beginnings) of trouble that passes: no connection, deadlock, lock timeout, shutdown."""


class JobWork:
    """Work (see app/store/work.py) of a claimed job."""

    job_id: int | None

    def __init__(
        self,
        claim: jobs.Claim,
        *,
        database_url: str,
        settings: Settings,
        board: Board,
        is_stopped: Callable[[], bool] = lambda: False,
        redis_url: str | None = None,
    ) -> None:
        """`is_stopped` says whether this process alone was asked to stop; `redis_url` is where to ring for workers."""
        self.claim, self.settings, self.args = claim, settings, claim.args
        self.job_id, self.fence = claim.job_id, claim.fence
        self._board, self._is_stopped, self._redis_url = board, is_stopped, redis_url
        name = jobs.session_name(claim.job_id, claim.fence)
        self.engine = make_engine(database_url, application_name=name)
        self._own: Connection | None = None
        self._pending: dict[str, Any] | None = None
        self._written: dict[str, Any] = {}
        self._next_write = self._next_note = 0.0

    @property
    def folder(self) -> Path:
        folder = runs_folder(self.settings) / str(self.claim.job_id) / str(self.fence)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder

    def check(self) -> None:
        verdict = self._board.verdict(self.claim.job_id, self.fence)
        if verdict is not None:
            raise verdict
        if self._is_stopped():
            raise Preempted

    def progress(self, done: int, total: int | None = None, unit: str = "", note: str = "") -> None:
        self.check()
        now = time.monotonic()
        value = {"done": int(done), "total": None if total is None else int(total), "unit": unit, "note": note}
        new_count = any(value[key] != self._written.get(key) for key in ("total", "unit"))
        self._pending = value
        if new_count or now >= self._next_write:
            self._next_write = now + PROGRESS_SECONDS
            self.flush()

    def flush(self) -> None:
        """Write the newest progress, if it is not written yet."""
        if self._pending is None or self._pending == self._written:
            return
        value, anew = self._pending, not self._written
        if self._say(attempts.write_progress, **value, anew=anew) is False:
            raise FenceLost
        self._written = value
        if time.monotonic() >= self._next_note:
            self._next_note = time.monotonic() + NOTE_SECONDS
            self._say(attempts.note_progress)

    def ring(self, queue: str, job_ids: Sequence[int]) -> None:
        if self._redis_url is not None:
            all(nudge(self._redis_url, job_id, queue) for job_id in job_ids)  # the first that is not heard is the last

    def log(self, message: str) -> None:
        self.tell([message])

    def tell(self, lines: list[str], level: str = "info") -> None:
        """Lines for `lachesis logs`."""
        self._say(attempts.write_log, lines=lines, level=level)

    def started_at_step(self, step: int) -> None:
        if self._say(attempts.write_start_step, step=step) is False:
            raise FenceLost

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        # No check here: a stage that is asked to stop still writes its checkpoint.
        with self.engine.begin() as connection:
            yield connection
            if not jobs.lock(connection, self.claim.job_id, self.fence):
                raise FenceLost

    @contextmanager
    def connect(self) -> Iterator[Connection]:
        with self.engine.connect() as connection:
            yield connection

    def _say(self, write: Callable[..., Any], **values: Any) -> Any:
        """Write beside the results, on a connection of its own; None where the database is away."""
        try:
            if self._own is None:
                self._own = self.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            return write(self._own, self.claim.job_id, self.fence, **values)
        except DBAPIError as error:
            self.close()
            if not passes(error):
                raise
            return None

    def close(self) -> None:
        """Give the connection back."""
        if self._own is not None:
            with contextlib.suppress(DBAPIError):
                self._own.close()
            self._own = None


def passes(error: BaseException) -> bool:
    """True for trouble with the database that passes: the job is tried again later."""
    import psycopg

    cause = error.orig if isinstance(error, DBAPIError) else error
    if not isinstance(cause, psycopg.Error):
        return False
    state = cause.sqlstate
    if state is None:  # no answer from a server at all
        return isinstance(cause, (psycopg.OperationalError, psycopg.InterfaceError))
    return state.startswith(PASSING)


def execute(work: JobWork) -> bool:
    """Run the stage of a claimed job and note how it ended; never raises what a stage raised.

    False where the database stayed away, so that the job still counts as this process's: the process must end then, for
    its worker goes on to keep the lease of a job whose process lives.
    """
    _persist(work, lambda c: attempts.place(c, work.claim.job_id, work.fence, socket.gethostname(), os.getpid()))
    try:
        end = _outcome(work)
    finally:
        work.close()
    done = _persist(work, end)
    if work.args.get("parent") is not None:
        work.ring(QUEUE_OF[work.claim.kind], [work.args["parent"]])  # which goes on when its last shard has ended
    return done


End = Callable[["Connection"], Any]


def _outcome(work: JobWork) -> End:
    """Run the stage; the step of the job that follows from its end."""
    job_id, fence = work.claim.job_id, work.fence
    try:
        work.check()
        result = stage(work.claim.kind)(work)
        json.dumps(result)
        work.flush()
    except (Preempted, Cancelled, FenceLost) as error:
        return _stopped(work, type(error))
    except Waiting:
        work.flush()
        return lambda c: jobs.wait_for_shards(c, job_id, fence)
    except (KeyboardInterrupt, SystemExit):
        return lambda c: jobs.hand_back(c, job_id, fence)
    except Exception as error:
        verdict = _verdict(work)
        if verdict is not None:  # a cancel also ends the sessions of a stage that does not look
            return _stopped(work, verdict)
        return _failed(work, error)
    return lambda c: jobs.succeed(c, job_id, fence, result, peak_rss())


def _verdict(work: JobWork) -> type[LachesisError] | None:
    try:
        work.check()
    except LachesisError as error:
        return type(error)
    return None


def _stopped(work: JobWork, how: type[LachesisError]) -> End:
    """Cancelled, or back to the queue; nothing where the job is another's by now.

    Losing the fence hands back, too: a worker that cannot reach the database gives up jobs that may still be its own.
    """
    job_id, fence = work.claim.job_id, work.fence
    if how is Cancelled:
        return lambda c: jobs.end_cancelled(c, job_id, fence)
    return lambda c: jobs.hand_back(c, job_id, fence)


def _failed(work: JobWork, error: Exception) -> End:
    """What an error means: wrong input, trouble that passes, or a fault of ours. Its trace goes to a file alone."""
    job_id, fence = work.claim.job_id, work.fence
    trace = _write_trace(work)
    if passes(error):
        return lambda c: jobs.retry_later(c, job_id, fence, "The database did not answer.")
    if isinstance(error, (RankEnded, ArtifactsAway)):
        return lambda c: jobs.retry_later(c, job_id, fence, str(error))
    if isinstance(error, LachesisError):
        message, exit_code = str(error), error.exit_code
    else:
        message, exit_code = f"{type(error).__name__}: {_first_line(error)}", 1
    if not isinstance(error, InputError):
        message = message[:LONGEST_MESSAGE]
        work.tell([*places(error), f"traceback: {trace}"], "error")
    values: dict[str, Any] = {"exit_code": exit_code, "error_class": type(error).__name__, "message": message}
    return lambda c: jobs.fail(c, job_id, fence, **values, peak_rss_bytes=peak_rss())


def _first_line(error: Exception) -> str:
    """The error's own first line; the rest of a database error (detail, statement, parameters) may hold rows."""
    import psycopg

    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    if isinstance(cause, psycopg.DataError):  # its very first line quotes the value
        return f"a value cannot be stored or computed (SQLSTATE {cause.sqlstate})"
    return (str(cause).strip().splitlines() or ["no message"])[0]


def places(error: Exception) -> list[str]:
    """Where an error arose, outermost first: files, lines and functions, and no value of a row."""
    frames = traceback.extract_tb(error.__traceback__)[-MOST_PLACES:]
    return [f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno} in {frame.name}" for frame in frames]


def _write_trace(work: JobWork) -> str:
    """The whole trace, which may quote rows, goes to a file of this user alone; where that is."""
    path = runs_folder(work.settings) / str(work.claim.job_id) / str(work.fence) / "log"
    try:
        with (work.folder / path.name).open("a") as file:
            os.fchmod(file.fileno(), 0o600)
            traceback.print_exc(file=file)
    except OSError as error:
        return f"{path} cannot be written: {error.strerror}"
    return f"{path} on {socket.gethostname()}"


def peak_rss() -> int:
    """Largest memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _persist(work: JobWork, step: End) -> bool:
    """Do one step in a transaction, and try again while the database is away; False where it stays away."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            with work.engine.begin() as connection:
                step(connection)
            return True
        except DBAPIError as error:
            if not passes(error):
                raise
            if time.monotonic() > deadline:
                print(f"Job {work.claim.job_id}: the database does not answer; it will be run again.", file=sys.stderr)
                return False
            time.sleep(0.5)


@contextmanager
def terminable() -> Iterator[Callable[[], bool]]:
    """While it lasts, a SIGTERM to this process (a whole group is told to end) means: hand the job back."""
    told = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
