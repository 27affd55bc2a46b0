"""Who may use which devices of a host.

Each worker says which devices its jobs may use; several workers of a host may name the same. A job takes all it needs
at once, in the transaction that claims it, and holds them exactly as long as it runs: what a running attempt has
noted (`ops.job_attempt.devices`) nobody else on that host gets. So nothing has to be given back, by whom ever the job
ends, and two jobs never wait for each other's devices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from app.store import locks

if TYPE_CHECKING:
    from sqlalchemy import Connection

FRESH_SECONDS = 300.0
"""Silent for so long, a worker with devices is not waited for by those who would do without."""

_FREE = """
SELECT d.name FROM unnest(CAST(:devices AS text[])) WITH ORDINALITY d(name, place)
WHERE d.name <> ALL (
    SELECT unnest(a.devices) FROM ops.job j JOIN ops.job_attempt a USING (job_id, fence)
    WHERE j.state = 'running' AND a.host = :host)
ORDER BY d.place
"""

MAY_CLAIM = f"""
(num_devices = 0 OR num_devices <= :free
 OR :offered = 0 AND (num_devices = 1 OR NOT EXISTS (
        SELECT FROM ops.worker w WHERE cardinality(w.devices) > 0 AND w.stopped_at IS NULL
        AND w.heartbeat_at > clock_timestamp() - make_interval(secs => {FRESH_SECONDS}))))
"""
"""Whether a job's devices are free at a worker; without any, it may do with the processor, unless somebody has some."""

IN_TURN = """
(num_devices = 0 OR NOT EXISTS (
    SELECT FROM ops.job k
    WHERE k.state IN ('queued', 'retry_wait') AND k.cancel_requested_at IS NULL AND k.run_after <= clock_timestamp()
      AND k.queue = ANY(:queues) AND k.num_devices > :free AND k.num_devices <= :offered
      AND (k.priority, k.job_id) < (ops.job.priority, ops.job.job_id)
      AND (k.args ->> 'encoder' IS NULL OR EXISTS (
          SELECT FROM ops.worker w WHERE w.worker_id = :worker AND k.args ->> 'encoder' = ANY(w.encoders)))))
"""
"""Whether no job before it waits for more devices of this worker: else many small jobs would keep a large one out."""


def lock_free(connection: Connection, host: str, devices: list[str]) -> list[str]:
    """Those of a worker's devices that no running job of its host holds, in their order.

    They stay free until the transaction ends: whoever claims at this host waits for it.
    """
    from sqlalchemy import text

    if not devices:
        return []
    locks.hold(connection, f"lachesis: devices of {host}")
    found = connection.execute(text(_FREE), {"host": host, "devices": devices})
    return [str(name) for name in found.scalars()]


_WANTING = """
SELECT worker_id, cardinality(devices) AS offered FROM ops.worker
WHERE :queue = ANY(queues) AND stopped_at IS NULL
  AND heartbeat_at > clock_timestamp() - make_interval(secs => :fresh)
ORDER BY started_at DESC
"""


def too_few(
    connection: Connection, queue: str, needed: int, most: int = 4, fresh_seconds: float = 30.0
) -> list[str] | None:
    """Living workers of a queue with the devices of each, in words, where some have devices and none has enough."""
    from sqlalchemy import text

    values = {"queue": queue, "fresh": fresh_seconds}
    rows = [(row.worker_id, row.offered or 0) for row in connection.execute(text(_WANTING), values)]
    offered = [count for _, count in rows]
    if not any(offered) or max(offered) >= needed:
        return None
    return [
        f"{worker.rpartition(':')[0]} ({count or 'no'} device{'s' * (count != 1)})" for worker, count in rows[:most]
    ]
