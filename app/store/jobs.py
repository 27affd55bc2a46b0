"""Jobs: every step of their life as one statement, guarded by the fence of the attempt that takes it.

A fence is the number of the newest claim of a job. Whoever holds an older one changes no row: each statement below
names (job, fence, running) and says by its row count whether it held. Time is the database's clock alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app.errors import InputError, UnknownName
from app.store import devices

if TYPE_CHECKING:
    from sqlalchemy import Connection

OPEN_STATES = ("queued", "running", "retry_wait")
MAX_CRASHES = 3
"""A job whose process ended so often without a word is parked as `dead`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """One attempt at one job."""

    job_id: int
    fence: int
    kind: str
    name: str | None
    args: dict[str, Any]
    devices: tuple[str, ...] = ()
    """Devices of its host that are this attempt's alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """A job that a worker holds, as its heartbeat sees it."""

    job_id: int
    fence: int
    host: str
    pid: int
    cancel_seconds: float | None
    """Seconds since a cancel was asked for."""


def _run(connection: Connection, statement: str, /, **parameters: Any) -> Any:
    from sqlalchemy import text

    return connection.execute(text(statement), parameters)


# --- queueing -------------------------------------------------------------------------------------------------------

_INSERT = """
INSERT INTO ops.job (kind, queue, name, args, dedupe_key, parent_job_id, shard, created_by, run_after, published_at)
VALUES (:kind, :queue, :name, CAST(:args AS jsonb), :dedupe_key, :parent, :shard, :created_by,
        clock_timestamp() + make_interval(secs => :delay), clock_timestamp())
ON CONFLICT (dedupe_key) WHERE state IN ('queued', 'running', 'retry_wait') DO NOTHING
RETURNING job_id
"""


def insert(
    connection: Connection,
    *,
    kind: str,
    queue: str,
    args: dict[str, Any],
    name: str | None = None,
    dedupe_key: str | None = None,
    parent: int | None = None,
    shard: int | None = None,
    created_by: str | None = None,
    delay: float = 0.0,
) -> int:
    """Queue a job; its id, or the id of the open job with the same `dedupe_key`.

    Args:
        connection: the job exists once its transaction commits.
        kind: which stage fulfils it.
        queue: which workers may claim it.
        args: arguments of the stage.
        name: name of what it makes.
        dedupe_key: at most one open job a key.
        parent: the job that queued it.
        shard: which share of the parent's work it is; None where it is none.
        created_by: who asked.
        delay: seconds before it is due; a claim by id does not wait for that.
    """
    values: dict[str, Any] = {
        "kind": kind,
        "queue": queue,
        "name": name,
        "args": json.dumps(args),
        "dedupe_key": dedupe_key,
    }
    values |= {"parent": parent, "shard": shard, "created_by": created_by, "delay": delay}
    for _ in range(3):
        job_id = _run(connection, _INSERT, **values).scalar()
        if job_id is None:  # the open one may end between these two statements
            job_id = _run(
                connection,
                "SELECT job_id FROM ops.job WHERE dedupe_key = :key AND state = ANY(:states)",
                key=dedupe_key,
                states=list(OPEN_STATES),
            ).scalar()
        if job_id is not None:
            return int(job_id)
    raise InputError(f"The job {dedupe_key!r} ends and begins again too fast; try again.")


def unpublish(connection: Connection, job_id: int) -> None:
    """Note that no nudge went out for a job."""
    _run(connection, "UPDATE ops.job SET published_at = NULL WHERE job_id = :job", job=job_id)


# --- claiming and holding -------------------------------------------------------------------------------------------

# The worker's own row is locked first, so that two processes of one worker never claim two jobs at once.
# Materialized: a join could otherwise run the subquery, and lock, once a row.
# A job that names an encoder which some worker has is for workers that have it; one that nobody knows is taken by
# whoever comes first, and told so.
_CLAIM = """
WITH due AS MATERIALIZED (
    SELECT job_id FROM ops.job
    WHERE state IN ('queued', 'retry_wait') AND cancel_requested_at IS NULL AND {which}
      AND (CAST(:kinds AS text[]) IS NULL OR kind = ANY(CAST(:kinds AS text[])))
      AND (args ->> 'encoder' IS NULL
           OR NOT EXISTS (SELECT FROM ops.worker w WHERE args ->> 'encoder' = ANY(w.encoders))
           OR EXISTS (SELECT FROM ops.worker w WHERE w.worker_id = :worker AND args ->> 'encoder' = ANY(w.encoders)))
      AND {may_claim}
    ORDER BY priority, job_id LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE ops.job j SET
    state = 'running', fence = j.fence + 1, attempt = j.attempt + 1, worker_id = :worker, code_version = :version,
    lease_until = clock_timestamp() + make_interval(secs => :lease), heartbeat_at = clock_timestamp(),
    started_at = coalesce(j.started_at, clock_timestamp())
FROM due
WHERE j.job_id = due.job_id
  AND NOT EXISTS (SELECT FROM ops.job h WHERE h.worker_id = :worker AND h.state = 'running')
RETURNING j.job_id, j.fence, j.kind, j.name, j.args, j.num_devices
"""
_CLAIM_BEST = _CLAIM.format(
    which=f"queue = ANY(:queues) AND run_after <= clock_timestamp() AND {devices.IN_TURN}", may_claim=devices.MAY_CLAIM
)
_CLAIM_ONE = _CLAIM.format(which="job_id = :job", may_claim=devices.MAY_CLAIM)

_ATTEMPT = """
INSERT INTO ops.job_attempt (job_id, fence, worker_id, host, pid, devices)
VALUES (:job, :fence, :worker, :host, :pid, :devices)
"""


def claim(
    connection: Connection,
    *,
    worker_id: str,
    host: str,
    pid: int,
    version: str,
    lease: float,
    queues: Sequence[str] = (),
    job_id: int | None = None,
    kinds: Iterable[str] | None = None,
) -> Claim | None:
    """Take the best due job of `queues`, or that one job whether due or not; None where there is none to take.

    Args:
        connection: the claim holds once its transaction commits.
        worker_id: a registered worker, which holds at most one job.
        host: where the attempt runs.
        pid: process that does the work, as far as is known.
        version: of the code.
        lease: seconds for which the job is this worker's without a heartbeat.
        queues: of which to take the best job by (priority, age).
        job_id: the job to take.
        kinds: kinds that this code knows; others wait for newer workers.
    """
    own = _run(connection, "SELECT devices FROM ops.worker WHERE worker_id = :worker FOR UPDATE", worker=worker_id)
    offered = list(own.scalar() or ())
    free = devices.lock_free(connection, host, offered)
    which: dict[str, Any] = {"queues": list(queues)} if job_id is None else {"job": job_id}
    which |= {"offered": len(offered), "free": len(free)}
    row = (
        _run(
            connection,
            _CLAIM_BEST if job_id is None else _CLAIM_ONE,
            worker=worker_id,
            version=version,
            lease=lease,
            kinds=None if kinds is None else list(kinds),
            **which,
        )
        .mappings()
        .first()
    )
    if row is None:
        return None
    claimed = dict(row)
    held = free[: claimed.pop("num_devices")]
    who = {"worker": worker_id, "host": host, "pid": pid, "devices": held or None}
    _run(connection, _ATTEMPT, job=row["job_id"], fence=row["fence"], **who)
    return Claim(**claimed, devices=tuple(held))


def due_seconds(connection: Connection, queues: Sequence[str], kinds: Iterable[str]) -> float | None:
    """Since when (seconds) the longest waiting job of these queues is due; None where none is."""
    statement = """
    SELECT extract(epoch FROM clock_timestamp() - min(run_after))::float8 FROM ops.job
    WHERE state IN ('queued', 'retry_wait') AND queue = ANY(:queues) AND run_after <= clock_timestamp()
      AND cancel_requested_at IS NULL AND kind = ANY(:kinds)
    """
    found: float | None = _run(connection, statement, queues=list(queues), kinds=list(kinds)).scalar()
    return found


_HEARTBEAT = """
UPDATE ops.job SET heartbeat_at = clock_timestamp(), lease_until = clock_timestamp() + make_interval(secs => :lease)
WHERE worker_id = :worker AND state = 'running'
"""

_HELD = """
SELECT j.job_id, j.fence, a.host, a.pid,
       extract(epoch FROM clock_timestamp() - j.cancel_requested_at)::float8 AS cancel_seconds
FROM ops.job j JOIN ops.job_attempt a USING (job_id, fence)
WHERE j.worker_id = :worker AND j.state = 'running'
"""


def heartbeat(connection: Connection, worker_id: str, lease: float) -> None:
    """A sign of life of a worker and of every job it holds."""
    _run(connection, _HEARTBEAT, worker=worker_id, lease=lease)
    _run(
        connection,
        "UPDATE ops.worker SET heartbeat_at = clock_timestamp(), stopped_at = NULL WHERE worker_id = :worker",
        worker=worker_id,
    )


def held(connection: Connection, worker_id: str) -> list[Held]:
    """The jobs that a worker holds."""
    return [Held(**row) for row in _run(connection, _HELD, worker=worker_id).mappings()]


def lock(connection: Connection, job_id: int, fence: int) -> bool:
    """Lock the job's row until this transaction ends, if the attempt holds it: the last statement before COMMIT."""
    statement = "SELECT FROM ops.job WHERE job_id = :job AND fence = :fence AND state = 'running' FOR UPDATE"
    return _run(connection, statement, job=job_id, fence=fence).first() is not None


def claimed(connection: Connection, job_id: int, fence: int) -> Claim | None:
    """The claim that goes by this fence, while it holds."""
    statement = """
    SELECT job_id, fence, kind, name, args FROM ops.job WHERE job_id = :job AND fence = :fence AND state = 'running'
    """
    row = _run(connection, statement, job=job_id, fence=fence).mappings().first()
    return None if row is None else Claim(**row)


def is_held(connection: Connection, job_id: int, fence: int) -> bool:
    """True while the attempt holds the job; another may take it at any time."""
    statement = "SELECT FROM ops.job WHERE job_id = :job AND fence = :fence AND state = 'running'"
    return _run(connection, statement, job=job_id, fence=fence).first() is not None


# --- ending an attempt ----------------------------------------------------------------------------------------------

# A job that would wait again is cancelled instead where that was asked for in the meantime.
_END = """
WITH held AS MATERIALIZED (
    SELECT job_id, NOT :final AND cancel_requested_at IS NOT NULL AS cancelled,
           :final OR cancel_requested_at IS NOT NULL AS final
    FROM ops.job WHERE job_id = :job AND fence = :fence AND state = 'running' FOR NO KEY UPDATE
), ended AS (
    UPDATE ops.job j SET
        state = CASE WHEN cancelled THEN 'cancelled' ELSE :state END,
        finished_at = CASE WHEN h.final THEN clock_timestamp() END,
        result = CAST(:result AS jsonb),
        exit_code = CASE WHEN cancelled THEN 3 ELSE CAST(:exit_code AS smallint) END,
        error_class = CASE WHEN cancelled THEN 'Cancelled' ELSE CAST(:error_class AS text) END,
        error_message = CASE WHEN cancelled THEN 'The job was cancelled.' ELSE CAST(:message AS text) END,
        run_after = CASE WHEN h.final THEN j.run_after ELSE clock_timestamp() + make_interval(secs => :delay) END,
        max_attempts = j.max_attempts + :allowance, worker_id = NULL, lease_until = NULL
    FROM held h WHERE j.job_id = h.job_id
    RETURNING j.job_id, j.fence
)
UPDATE ops.job_attempt a SET finished_at = clock_timestamp(), outcome = :outcome, error_message = :message,
    peak_rss_bytes = coalesce(:peak, a.peak_rss_bytes)
FROM ended e WHERE a.job_id = e.job_id AND a.fence = e.fence
"""


def _end(connection: Connection, job_id: int, fence: int, state: str, outcome: str, **values: Any) -> bool:
    defaults: dict[str, Any] = {"result": None, "exit_code": None, "error_class": None, "message": None}
    defaults |= {"delay": 0.0, "allowance": 0, "peak": None, "final": state not in OPEN_STATES}
    parameters = {**defaults, **values, "job": job_id, "fence": fence, "state": state, "outcome": outcome}
    return bool(_run(connection, _END, **parameters).rowcount)


def succeed(
    connection: Connection, job_id: int, fence: int, result: dict[str, Any], peak_rss_bytes: int | None = None
) -> bool:
    """running → succeeded; False where this attempt does not hold the job any more."""
    values = {"result": json.dumps(result), "exit_code": 0, "peak": peak_rss_bytes}
    return _end(connection, job_id, fence, "succeeded", "succeeded", **values)


def fail(
    connection: Connection,
    job_id: int,
    fence: int,
    *,
    exit_code: int,
    error_class: str,
    message: str,
    peak_rss_bytes: int | None = None,
) -> bool:
    """running → failed, with one sentence why; False where this attempt does not hold the job any more."""
    values = {"exit_code": exit_code, "error_class": error_class, "message": message, "peak": peak_rss_bytes}
    return _end(connection, job_id, fence, "failed", "failed", **values)


def end_cancelled(connection: Connection, job_id: int, fence: int) -> bool:
    """running → cancelled."""
    values = {"exit_code": 3, "error_class": "Cancelled", "message": "The job was cancelled."}
    return _end(connection, job_id, fence, "cancelled", "cancelled", **values)


def hand_back(connection: Connection, job_id: int, fence: int) -> bool:
    """running → queued, because the worker stops; does not count against max_attempts."""
    return _end(connection, job_id, fence, "queued", "preempted", allowance=1)


def retry_later(connection: Connection, job_id: int, fence: int, message: str, first_delay: float = 2.0) -> bool:
    """running → retry_wait, because of trouble that passes; the wait doubles up to 5 minutes, then the job fails."""
    row = _run(connection, "SELECT attempt, max_attempts FROM ops.job WHERE job_id = :job", job=job_id).first()
    if row is not None and row.attempt >= row.max_attempts:
        return fail(connection, job_id, fence, exit_code=1, error_class="RetriesExhausted", message=message)
    delay = min(300.0, first_delay * 2.0 ** min(10, (row.attempt if row else 1) - 1))
    return _end(connection, job_id, fence, "retry_wait", "lost", message=message, delay=delay)


WAIT_SECONDS = 60.0
"""How long a job waits for its shards before it looks by itself; the end of the last one wakes it."""


def wait_for_shards(connection: Connection, job_id: int, fence: int) -> bool:
    """running → retry_wait until the job's shards have ended; does not count against max_attempts.

    The job's row is locked before its shards are looked at, and a shard's end locks it, too: neither misses the other.
    """
    if not lock(connection, job_id, fence):
        return False
    is_open = any(shard["state"] in OPEN_STATES for shard in shards(connection, job_id))
    return _end(connection, job_id, fence, "retry_wait", "waiting", delay=WAIT_SECONDS if is_open else 0.0, allowance=1)


# A retried job shares its work out anew: shards of before the retry are none of its.
_SHARDS = """
SELECT DISTINCT ON (s.shard) s.job_id, s.shard, s.state, s.args, s.exit_code, s.error_message
FROM ops.job s WHERE s.parent_job_id = :job AND s.shard IS NOT NULL AND s.created_at > coalesce((
    SELECT max(e.at) FROM ops.job_event e
    WHERE e.job_id = :job AND e.to_state = 'queued' AND e.from_state IN ('failed', 'cancelled', 'dead')), '-infinity')
ORDER BY s.shard, s.job_id DESC
"""


def shards(connection: Connection, job_id: int) -> list[dict[str, Any]]:
    """The jobs that share a job's work, the newest of each share, by share."""
    return [dict(row) for row in _run(connection, _SHARDS, job=job_id).mappings()]


# A crashed job is cancelled if that was asked for, parked if it crashes again and again, else queued.
_CRASH = """
WITH gone AS MATERIALIZED (
    SELECT job_id, CASE WHEN cancel_requested_at IS NOT NULL THEN 'cancelled'
        WHEN crash_count + 1 >= :max_crashes OR attempt >= max_attempts THEN 'dead' ELSE 'queued' END AS next
    FROM ops.job WHERE state = 'running' AND {which}
    ORDER BY job_id LIMIT 50 FOR NO KEY UPDATE SKIP LOCKED
), stepped AS (
    UPDATE ops.job j SET
        state = next, crash_count = crash_count + 1, worker_id = NULL, lease_until = NULL,
        run_after = clock_timestamp(),
        exit_code = CASE next WHEN 'cancelled' THEN 3 WHEN 'dead' THEN 1 END,
        error_class = CASE next WHEN 'cancelled' THEN 'Cancelled' WHEN 'dead' THEN 'Crashed' END,
        error_message = CASE next WHEN 'cancelled' THEN 'The job was cancelled.'
                                  WHEN 'dead' THEN CAST(:message AS text) END,
        finished_at = CASE WHEN next <> 'queued' THEN clock_timestamp() END
    FROM gone WHERE j.job_id = gone.job_id
    RETURNING j.job_id, j.fence, j.state
), noted AS (
    UPDATE ops.job_attempt a SET finished_at = clock_timestamp(), outcome = 'crashed',
        error_message = CAST(:message AS text), exit_code = CAST(:code AS integer), signal = CAST(:signal AS integer)
    FROM stepped s WHERE a.job_id = s.job_id AND a.fence = s.fence
)
SELECT job_id, fence, state FROM stepped
"""
_REAP = _CRASH.format(which="lease_until < clock_timestamp()")
_CRASHED = _CRASH.format(which="job_id = :job AND fence = :fence")


def crash(
    connection: Connection,
    job_id: int,
    fence: int,
    *,
    message: str,
    exit_code: int | None = None,
    signal: int | None = None,
) -> str | None:
    """Note that the process of an attempt ended without a word; the job's new state, None where it was not held."""
    parameters = {"job": job_id, "fence": fence, "message": message, "code": exit_code, "signal": signal}
    row = _run(connection, _CRASHED, max_crashes=MAX_CRASHES, **parameters).first()
    return None if row is None else str(row.state)


def reap(connection: Connection) -> list[tuple[int, int, str]]:
    """End the attempts whose lease is over: (job, fence, new state) of each. Any number of workers may do so."""
    message = "The worker gave no sign of life until its lease was over."
    rows = _run(connection, _REAP, max_crashes=MAX_CRASHES, message=message, code=None, signal=None)
    return [(row.job_id, row.fence, row.state) for row in rows]


def session_name(job_id: int, fence: int) -> str:
    """What an attempt's database sessions are called in pg_stat_activity."""
    return f"lachesis:{job_id}:{fence}"


def end_sessions(connection: Connection, job_id: int, fence: int) -> int:
    """End the database sessions of an attempt that lost its job, so that they block nobody; how many."""
    statement = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = :name"
    return int(_run(connection, statement, name=session_name(job_id, fence)).scalar_one())


# --- what people ask for --------------------------------------------------------------------------------------------

_CANCEL = """
UPDATE ops.job SET
    cancel_requested_at = coalesce(cancel_requested_at, clock_timestamp()),
    state = CASE WHEN state = 'running' THEN state ELSE 'cancelled' END,
    finished_at = CASE WHEN state = 'running' THEN finished_at ELSE clock_timestamp() END,
    exit_code = CASE WHEN state = 'running' THEN exit_code ELSE 3 END,
    error_class = CASE WHEN state = 'running' THEN error_class ELSE 'Cancelled' END,
    error_message = CASE WHEN state = 'running' THEN error_message ELSE 'The job was cancelled.' END
WHERE {which} AND state IN ('queued', 'retry_wait', 'running') RETURNING state
"""
_CANCEL_ONE = _CANCEL.format(which="job_id = :job")
_CANCEL_SHARDS = _CANCEL.format(which="parent_job_id = :job AND shard IS NOT NULL")


def cancel(connection: Connection, job_id: int) -> str:
    """Ask for a cancel, of its shards too: a waiting job is cancelled at once, a running one when its worker sees it.

    Returns:
        The job's state: cancelled, running (it will be), or the state it had ended in before.

    Raises:
        UnknownName: there is no such job.
    """
    cancel_shards(connection, job_id)
    state = _run(connection, _CANCEL_ONE, job=job_id).scalar()
    if state is None:
        state = find(connection, job_id)["state"]
    return str(state)


def cancel_shards(connection: Connection, job_id: int) -> None:
    """Ask for a cancel of the jobs that share a job's work."""
    _run(connection, _CANCEL_SHARDS, job=job_id)


_RETRY = """
UPDATE ops.job SET state = 'queued', run_after = clock_timestamp(), crash_count = 0, max_attempts = attempt + 10,
    cancel_requested_at = NULL, exit_code = NULL, error_class = NULL, error_message = NULL, result = NULL,
    finished_at = NULL, published_at = clock_timestamp()
WHERE job_id = :job AND state IN ('failed', 'cancelled', 'dead') RETURNING queue
"""


def retry(connection: Connection, job_id: int) -> str:
    """Queue an ended job again; its queue.

    Raises:
        UnknownName: there is no such job.
        InputError: it waits, runs or has succeeded, or another open job has its dedupe key.
    """
    from sqlalchemy.exc import IntegrityError

    try:
        queue = _run(connection, _RETRY, job=job_id).scalar()
    except IntegrityError:
        raise InputError(f"Another open job does the same as job {job_id}; wait for its end or cancel it.") from None
    if queue is None:
        state = find(connection, job_id)["state"]
        raise InputError(
            f"Expected job {job_id} to be failed, cancelled or dead, it is {state}; only such are retried."
        )
    return str(queue)


# While a job waits for its shards, what they have done is what it has done; of a share done twice the newest counts.
DONE = """
CASE WHEN j.state = 'retry_wait' THEN coalesce((
    SELECT sum(n.done)::int8 FROM (
        SELECT DISTINCT ON (s.shard) q.done FROM ops.job s JOIN ops.job_progress q USING (job_id)
        WHERE s.parent_job_id = j.job_id AND s.shard IS NOT NULL ORDER BY s.shard, s.job_id DESC) n), p.done)
ELSE p.done END"""
OPEN_SHARDS = """
(SELECT count(*) FROM ops.job s WHERE s.parent_job_id = j.job_id AND s.shard IS NOT NULL
 AND s.state IN ('queued', 'running', 'retry_wait'))"""

_FIND = f"""
SELECT j.job_id, j.kind, j.queue, j.name, j.state, j.result, j.exit_code, j.error_class, j.error_message, j.finished_at,
       j.attempt, j.fence, j.worker_id, j.cancel_requested_at, {DONE} AS done, p.total, p.unit, p.note,
       extract(epoch FROM clock_timestamp() - j.heartbeat_at)::float8 AS silent_seconds, {OPEN_SHARDS} AS open_shards,
       j.args ->> 'encoder' AS encoder, j.num_devices
FROM ops.job j LEFT JOIN ops.job_progress p USING (job_id) WHERE j.job_id = :job
"""


def find(connection: Connection, job_id: int) -> dict[str, Any]:
    """A job and how far it is. Raises UnknownName."""
    row = _run(connection, _FIND, job=job_id).mappings().first()
    if row is None:
        known = _run(connection, "SELECT job_id::text FROM ops.job ORDER BY job_id DESC LIMIT 50").scalars()
        raise UnknownName("job", str(job_id), known)
    return dict(row)


_LISTING = f"""
SELECT j.job_id, j.kind, j.name, j.queue, j.state, j.attempt, {DONE} AS done, p.total, p.unit, j.created_at,
       j.started_at, j.finished_at, j.error_message, (
           SELECT extract(epoch FROM sum(coalesce(a.finished_at, clock_timestamp()) - a.started_at))::float8
           FROM ops.job_attempt a WHERE a.job_id = j.job_id
       ) AS worked_seconds
FROM ops.job j LEFT JOIN ops.job_progress p USING (job_id)
WHERE j.shard IS NULL AND (CAST(:state AS text) IS NULL OR j.state = :state) ORDER BY j.job_id DESC LIMIT :limit
"""


def listing(connection: Connection, state: str | None, limit: int) -> list[dict[str, Any]]:
    """Jobs, newest first; all of them or those in one state. Shards are left out: they are part of another job."""
    return [dict(row) for row in _run(connection, _LISTING, state=state, limit=limit).mappings()]


def log_lines(connection: Connection, job_id: int, after: int = 0, limit: int = 1000) -> list[dict[str, Any]]:
    """Lines of a job's log behind line `after` (a job_log_id), oldest first."""
    statement = """
    SELECT job_log_id, fence, at, level, message FROM ops.job_log
    WHERE job_id = :job AND job_log_id > :after ORDER BY job_log_id LIMIT :limit
    """
    return [dict(row) for row in _run(connection, statement, job=job_id, after=after, limit=limit).mappings()]
