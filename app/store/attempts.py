"""What an attempt writes beside its results: progress, log lines, where it runs; and the registry of workers.

A line lands only while the attempt holds its job: the row is locked FOR SHARE by the statement that writes, which makes
a heartbeat wait for no longer than that one statement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy import Connection

_HOLDS = "SELECT FROM ops.job WHERE job_id = :job AND fence = :fence AND state = 'running' FOR SHARE"


def _run(connection: Connection, statement: str, /, **parameters: Any) -> Any:
    from sqlalchemy import text

    return connection.execute(text(statement), parameters)


_PROGRESS = f"""
WITH held AS MATERIALIZED ({_HOLDS})
INSERT INTO ops.job_progress AS p (job_id, done, total, unit, note)
SELECT :job, :done, :total, :unit, :note FROM held
ON CONFLICT (job_id) DO UPDATE SET
    done = EXCLUDED.done, total = EXCLUDED.total, unit = EXCLUDED.unit, note = EXCLUDED.note,
    updated_at = clock_timestamp(),
    since = CASE WHEN p.unit = EXCLUDED.unit AND p.done <= EXCLUDED.done AND p.total IS NOT DISTINCT FROM EXCLUDED.total
                      AND NOT :anew THEN p.since ELSE clock_timestamp() END
"""


def write_progress(
    connection: Connection,
    job_id: int,
    fence: int,
    *,
    done: int,
    total: int | None,
    unit: str,
    note: str,
    anew: bool = False,
) -> bool:
    """How far the work is; False where the attempt does not hold the job. `anew` starts the clock of the time left."""
    values = {"done": done, "total": total, "unit": unit, "note": note, "anew": anew}
    return bool(_run(connection, _PROGRESS, job=job_id, fence=fence, **values).rowcount)


def write_log(connection: Connection, job_id: int, fence: int, lines: Sequence[str], level: str = "info") -> bool:
    """Append lines to the job's log; False where the attempt does not hold the job."""
    statement = f"""
    WITH held AS MATERIALIZED ({_HOLDS})
    INSERT INTO ops.job_log (job_id, fence, level, message)
    SELECT :job, :fence, :level, line FROM held, unnest(CAST(:lines AS text[])) WITH ORDINALITY l(line, n) ORDER BY n
    """
    clean = [line.replace("\x00", "")[:2000] for line in lines]
    return bool(_run(connection, statement, job=job_id, fence=fence, level=level, lines=clean).rowcount)


def place(connection: Connection, job_id: int, fence: int, host: str, pid: int) -> bool:
    """Say which process does the work; False where the attempt does not hold the job."""
    statement = f"""
    WITH held AS MATERIALIZED ({_HOLDS})
    UPDATE ops.job_attempt SET host = :host, pid = :pid FROM held WHERE job_id = :job AND fence = :fence
    """
    return bool(_run(connection, statement, job=job_id, fence=fence, host=host, pid=pid).rowcount)


def write_start_step(connection: Connection, job_id: int, fence: int, step: int) -> bool:
    """Say at which step a training goes on; False where the attempt does not hold the job."""
    statement = f"""
    WITH held AS MATERIALIZED ({_HOLDS})
    UPDATE ops.job_attempt SET start_step = :step FROM held WHERE job_id = :job AND fence = :fence
    """
    return bool(_run(connection, statement, job=job_id, fence=fence, step=step).rowcount)


def note_progress(connection: Connection, job_id: int, fence: int) -> None:
    """A sign of work, for whoever asks whether a living job gets on."""
    statement = """
    UPDATE ops.job SET progress_at = clock_timestamp() WHERE job_id = :job AND fence = :fence AND state = 'running'
    """
    _run(connection, statement, job=job_id, fence=fence)


_REGISTER = """
INSERT INTO ops.worker (worker_id, host, pid, queues, code_version, device, encoders, devices)
VALUES (:worker, :host, :pid, :queues, :version, :device, :encoders, :devices)
ON CONFLICT (worker_id) DO UPDATE SET heartbeat_at = clock_timestamp(), stopped_at = NULL, queues = EXCLUDED.queues,
    encoders = EXCLUDED.encoders, devices = EXCLUDED.devices
"""


def register_worker(
    connection: Connection,
    worker_id: str,
    *,
    host: str,
    pid: int,
    queues: Sequence[str],
    version: str,
    device: str | None,
    encoders: Sequence[str] | None = None,
    devices: Sequence[str] | None = None,
) -> None:
    """Enter a worker; again after its row was removed."""
    values = {"host": host, "pid": pid, "queues": list(queues), "version": version, "device": device}
    values["encoders"] = None if encoders is None else list(encoders)
    values["devices"] = None if devices is None else list(devices)
    _run(connection, _REGISTER, worker=worker_id, **values)


def stop_worker(connection: Connection, worker_id: str) -> None:
    """Say that a worker stopped in order."""
    statement = """
    UPDATE ops.worker SET stopped_at = clock_timestamp(), heartbeat_at = clock_timestamp() WHERE worker_id = :worker
    """
    _run(connection, statement, worker=worker_id)


def neighbours(connection: Connection, worker_id: str, host: str) -> list[tuple[str, int]]:
    """(worker_id, pid) of the other workers of a host that have not said that they stopped."""
    statement = """
    SELECT worker_id, pid FROM ops.worker WHERE host = :host AND worker_id <> :worker AND stopped_at IS NULL
    """
    return [(row.worker_id, row.pid) for row in _run(connection, statement, worker=worker_id, host=host)]


def prune_workers(connection: Connection, days: int = 7) -> None:
    """Forget workers that have been silent for so long."""
    statement = """
    DELETE FROM ops.worker w WHERE heartbeat_at < clock_timestamp() - make_interval(days => :days)
    AND NOT EXISTS (SELECT FROM ops.job j WHERE j.worker_id = w.worker_id)
    """
    _run(connection, statement, days=days)


def encoder_is_served(connection: Connection, encoder: str, fresh_seconds: float = 30.0) -> bool:
    """Whether a worker that lives has an encoder, or nobody ever had it (then any worker takes the job and says so)."""
    statement = """
    SELECT count(*) = 0
        OR bool_or(stopped_at IS NULL AND heartbeat_at > clock_timestamp() - make_interval(secs => :fresh))
    FROM ops.worker WHERE :encoder = ANY(encoders)
    """
    return bool(_run(connection, statement, encoder=encoder, fresh=fresh_seconds).scalar())


def encoders_seen(connection: Connection, fresh_seconds: float = 30.0) -> list[dict[str, Any]]:
    """Encoders that workers said they have: name, width (of a checkpoint, where there is one), living workers."""
    statement = """
    SELECT e.name, (SELECT max(c.width) FROM model.checkpoint c WHERE c.encoder = e.name) AS width,
        count(*) FILTER (WHERE w.stopped_at IS NULL
                         AND w.heartbeat_at > clock_timestamp() - make_interval(secs => :fresh)) AS workers
    FROM ops.worker w CROSS JOIN LATERAL unnest(w.encoders) e(name) GROUP BY 1 ORDER BY 1
    """
    return [dict(row) for row in _run(connection, statement, fresh=fresh_seconds).mappings()]


def encoders_by_worker(connection: Connection, queue: str, most: int = 4, fresh_seconds: float = 30.0) -> list[str]:
    """Living workers of a queue and the encoders of each, in words."""
    statement = """
    SELECT worker_id, coalesce(array_to_string(encoders, ', '), 'unknown') AS has FROM ops.worker
    WHERE :queue = ANY(queues) AND stopped_at IS NULL
      AND heartbeat_at > clock_timestamp() - make_interval(secs => :fresh) ORDER BY started_at DESC LIMIT :most
    """
    rows = _run(connection, statement, queue=queue, fresh=fresh_seconds, most=most)
    return [f"{row.worker_id.rpartition(':')[0]} ({row.has})" for row in rows]


def queue_is_served(connection: Connection, queue: str, fresh_seconds: float = 30.0) -> bool:
    """True if a worker that serves this queue gave a sign of life lately."""
    statement = """
    SELECT count(*) > 0 FROM ops.worker WHERE :queue = ANY(queues) AND stopped_at IS NULL
    AND heartbeat_at > clock_timestamp() - make_interval(secs => :seconds)
    """
    return bool(_run(connection, statement, queue=queue, seconds=fresh_seconds).scalar_one())
