"""Taking checkpoints out of the store: a finished training with its stops on the way, or one of these stops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app.errors import InputError, LachesisError
from app.store.artifacts import find_checkpoint
from app.store.loads import supersede
from app.store.removing import some_of

if TYPE_CHECKING:
    from sqlalchemy import Connection

LOCK = 4_210_002
"""Of model.add_embedding_partition, with the checkpoint as its second number."""
WAIT_SECONDS = 30
"""The longest wait for those who read embeddings."""

# What rests on some checkpoints, as rows (what, always). Those with `always` hold them even against --force.
RESTING = """
SELECT CASE WHEN bool_or(valid_to IS NULL) THEN 'the alias @' ELSE 'the history of the alias @' END || alias AS what,
       true AS always
FROM model.alias WHERE checkpoint_id = ANY(:ids) GROUP BY alias
UNION ALL
SELECT 'checkpoint ' || max(checkpoint_id) || ' (' || name || '), which goes on from it', true FROM model.checkpoint
WHERE parent_id = ANY(:ids) AND NOT checkpoint_id = ANY(:ids) GROUP BY name, job_id
UNION ALL
SELECT 'embeddings of cohort ' || c.name || '@' || c.version, false
FROM model.embedding_set JOIN label.cohort c USING (cohort_id) WHERE checkpoint_id = ANY(:ids)
UNION ALL
SELECT count(*) || ' metrics by labels ' || s.name || '@' || s.version, false
FROM model.metric m JOIN label.label_set s USING (label_set_id) WHERE m.checkpoint_id = ANY(:ids)
GROUP BY s.name, s.version
UNION ALL
SELECT count(*) || ' differences of ' || coalesce(c.name, 'others') || ' from it', false
FROM model.metric m LEFT JOIN model.checkpoint c ON c.checkpoint_id = m.checkpoint_id
WHERE m.reference_checkpoint_id = ANY(:ids) GROUP BY c.name
UNION ALL
SELECT count(*) || ' predictions', false FROM model.prediction WHERE checkpoint_id = ANY(:ids) HAVING count(*) > 0
"""

# Jobs that are queued or at work: what they make, and the names of checkpoints in their arguments.
JOBS = """
SELECT j.job_id, j.kind, EXISTS (SELECT FROM model.checkpoint c WHERE c.job_id = j.job_id
                                 AND c.checkpoint_id = ANY(:ids)) AS makes,
       array_remove(ARRAY[j.args ->> 'checkpoint', j.args ->> 'against', j.args ->> 'continue',
                          j.args -> 'set' ->> 'weights'], NULL) AS named
FROM ops.job j WHERE j.state IN ('queued', 'running', 'retry_wait') ORDER BY j.job_id
"""


_ROW = "SELECT checkpoint_id, name, epoch, is_final, is_best, job_id FROM model.checkpoint"


@dataclass(frozen=True, slots=True)
class Meant:
    """Checkpoints that one name means."""

    said: str
    """What a person calls them."""
    name: str
    ids: list[int]
    is_final: bool

    @property
    def stops(self) -> int:
        return len(self.ids) - 1 if self.is_final else 0


def find(connection: Connection, given: str) -> Meant:
    """A finished training and its stops, or the one stop that is meant.

    Raises:
        UnknownName: there is none.
        InputError: a name alone has several finished trainings, or NAME@EPOCH is the finished training itself.
    """
    from sqlalchemy import text

    found = find_checkpoint(connection, given)
    row = connection.execute(
        text(f"{_ROW} WHERE checkpoint_id = :id"),
        {"id": found.checkpoint_id},
    ).one()
    part = given.rpartition("@")[2] if given.startswith(f"{row.name}@") else None
    if row.is_final and part is not None:
        row = _stop(connection, row, given, part)
    said = f"{row.name}@{row.epoch}{' (best)' if row.is_best else ''}, checkpoint {row.checkpoint_id}"
    if not row.is_final:
        return Meant(said, row.name, [row.checkpoint_id], is_final=False)
    finals = connection.execute(
        text("SELECT checkpoint_id FROM model.checkpoint WHERE name = :name AND is_final ORDER BY 1"),
        {"name": row.name},
    ).scalars()
    known = list(finals)
    if given == row.name and len(known) > 1:
        raise InputError(
            f"Expected one finished training to remove, {given!r} has {len(known)}; name one by its id: "
            f"{', '.join(map(str, known))}."
        )
    stops = connection.execute(
        text("SELECT checkpoint_id FROM model.checkpoint WHERE job_id = :job AND NOT is_final ORDER BY step"),
        {"job": row.job_id},
    ).scalars()
    return Meant(f"{row.name}, checkpoint {row.checkpoint_id}", row.name, [row.checkpoint_id, *stops], is_final=True)


def _stop(connection: Connection, final: Any, given: str, part: str) -> Any:
    """The stop of a run that NAME@EPOCH means, where its end has the same epoch."""
    from sqlalchemy import text

    row = connection.execute(
        text(
            f"{_ROW} WHERE job_id = :job AND NOT is_final AND CASE CAST(:part AS text) WHEN 'last' THEN true "
            "WHEN 'best' THEN is_best ELSE epoch::text = :part END "
            "ORDER BY CASE WHEN :part IN ('best', 'last') THEN -step ELSE step END LIMIT 1"
        ),
        {"job": final.job_id, "part": part},
    ).first()
    if row is None:
        raise InputError(
            f"Expected a stop on the way of {final.name!r}, found the finished training itself under {given!r}; "
            f"`lachesis rm checkpoint {final.name}` removes it with its stops."
        )
    return row


def resting(connection: Connection, ids: Sequence[int]) -> list[tuple[str, bool]]:
    """(what, whether it holds them even against --force) of all that rests on some checkpoints."""
    from sqlalchemy import text

    values = {"ids": list(ids)}
    rows = [(row.what, row.always) for row in connection.execute(text(RESTING), values)]
    for job in connection.execute(text(JOBS), values).all():
        if job.makes or any(_meant(connection, name) in ids for name in job.named):
            rows.append((f"job {job.job_id} ({job.kind})", True))
    return rows


def _meant(connection: Connection, name: str) -> int | None:
    try:
        return find_checkpoint(connection, name).checkpoint_id
    except LachesisError:  # a file of weights, or what another job is still to make
        return None


def remove(connection: Connection, given: str, *, force: bool, dry_run: bool) -> tuple[dict[str, Any], list[str]]:
    """Take a checkpoint away, in this transaction; what was done, and keys of files to take away after it.

    With `force`, its embeddings, metrics and predictions go, too.

    Raises:
        InputError: something rests on it, or others read embeddings all the time.
        UnknownName: there is none.
    """
    from sqlalchemy import text

    meant = find(connection, given)
    values = {"ids": meant.ids}
    rows = _refuse_held(connection, meant, force=force)
    if not dry_run:  # who embeds by it has ended, or begins when it is gone
        with _in_peace(connection):
            for checkpoint_id in meant.ids:
                lock = {"lock": LOCK, "id": checkpoint_id}
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock, :id)"), lock)
            connection.execute(text("SELECT FROM model.checkpoint WHERE checkpoint_id = ANY(:ids) FOR UPDATE"), values)
        rows = _refuse_held(connection, meant, force=force)
    files, size = _files(connection, meant.ids)
    left = connection.scalar(
        text(
            "SELECT max(checkpoint_id) FROM model.checkpoint "
            "WHERE name = :name AND is_final AND NOT checkpoint_id = ANY(:ids)"
        ),
        values | {"name": meant.name},
    )
    result = {
        "removed": meant.said,
        "checkpoints": meant.ids,
        "is_final": meant.is_final,
        "stops": meant.stops,
        "rested_on_it": [what for what, _ in rows],
        "name_means": None if left is None else f"{meant.name}, checkpoint {left}",
        "bytes": size,
        "dry_run": dry_run,
    }
    if not dry_run:
        _delete(connection, meant.ids)
    return result, files


def _files(connection: Connection, ids: Sequence[int]) -> tuple[list[str], int]:
    """Keys of the files of checkpoints and their embeddings; bytes of weights and of searched embeddings."""
    from sqlalchemy import text

    values = {"ids": list(ids)}
    files = connection.execute(
        text(
            "SELECT path, num_bytes FROM model.checkpoint WHERE checkpoint_id = ANY(:ids) "
            "UNION SELECT path, 0 FROM model.embedding_set WHERE checkpoint_id = ANY(:ids)"
        ),
        values,
    ).all()
    partitions = connection.scalar(
        text(
            "SELECT coalesce(sum(pg_total_relation_size(to_regclass('model.embedding_' || c))), 0)::bigint "
            "FROM unnest(CAST(:ids AS integer[])) c"
        ),
        values,
    )
    return [row.path for row in files], sum(row.num_bytes for row in files) + int(partitions or 0)


def _refuse_held(connection: Connection, meant: Meant, *, force: bool) -> list[tuple[str, bool]]:
    """What rests on it and would go with it. Raises InputError where something holds it."""
    rows = resting(connection, meant.ids)
    held = [what for what, always in rows if always or not force]
    if held:
        always = any(always for _, always in rows)
        way = "it stays as long as they do" if always else "--force removes them with it"
        raise InputError(f"Expected nothing to rest on {meant.said}, found {some_of(held)}; {way}.")
    return rows


def _delete(connection: Connection, ids: Sequence[int]) -> None:
    from sqlalchemy import text

    values = {"ids": list(ids)}
    loads = connection.execute(
        text(
            "SELECT l.load_id FROM ops.load l JOIN model.checkpoint c USING (job_id) "
            "WHERE l.kind = 'embeddings' AND l.state = 'published' AND c.checkpoint_id = ANY(:ids)"
        ),
        values,
    ).scalars()
    supersede(connection, list(loads))
    connection.execute(text("DELETE FROM model.checkpoint WHERE checkpoint_id = ANY(:ids)"), values)
    drop_embeddings(connection, ids)


def drop_embeddings(connection: Connection, ids: Sequence[int]) -> None:
    """Drop the partitions of checkpoints that are gone. Raises InputError where others read embeddings all the time."""
    from sqlalchemy import text

    with _in_peace(connection):
        for checkpoint_id in ids:
            connection.execute(text("SELECT model.drop_embedding_partition(:id)"), {"id": checkpoint_id})


@contextmanager
def _in_peace(connection: Connection) -> Iterator[None]:
    """Wait for others for a while only. Raises InputError where that is too short, or each waits for the other."""
    from sqlalchemy import text
    from sqlalchemy.exc import OperationalError

    connection.execute(text(f"SET LOCAL lock_timeout = '{WAIT_SECONDS}s'"))
    try:
        yield
    except OperationalError as error:
        if getattr(error.orig, "sqlstate", None) not in ("55P03", "40P01"):
            raise
        raise InputError(
            f"Expected nobody to use these embeddings for a moment, others did for {WAIT_SECONDS} seconds; nothing was "
            "removed, try it again."
        ) from None
