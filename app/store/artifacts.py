"""Checkpoints, embeddings and the files behind them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import InputError, UnknownName
from app.store.places import digest_of, place

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from app.settings import Settings


EXTERNAL = "external"
"""Arm of vectors that were made elsewhere: no weights stand behind them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A row of model.checkpoint, as far as stages need it."""

    checkpoint_id: int
    name: str
    sha256: str
    arm: str
    encoder: str
    width: int
    recipe: dict[str, Any]
    seed: int
    path: str
    label_set_id: int | None
    cohort_id: int | None
    shuffled: bool


_COLUMNS = """
SELECT checkpoint_id, name, sha256, arm, encoder, width, recipe, seed, path, label_set_id, cohort_id, shuffled
FROM model.checkpoint WHERE checkpoint_id = :id
"""


def find_checkpoint(connection: Connection, name: str) -> Checkpoint:
    """The checkpoint meant by NAME, NAME@EPOCH, NAME@best, NAME@last, an alias, an id or the beginning of a digest.

    Raises:
        UnknownName: there is none.
        InputError: an epoch that is not kept, or a beginning of several digests.
    """
    from sqlalchemy import text
    from sqlalchemy.exc import DBAPIError

    try:
        with connection.begin_nested():
            found = connection.execute(text("SELECT model.find_checkpoint(:name)"), {"name": name}).scalar_one()
    except DBAPIError as error:
        state = getattr(error.orig, "sqlstate", None)
        if state == "22023":
            raise InputError(str(error.orig).splitlines()[0] + _meant(connection, name)) from None
        if state != "P0002":
            raise
        raise UnknownName("checkpoint", name, _known(connection, name)) from None
    return Checkpoint(**connection.execute(text(_COLUMNS), {"id": found}).mappings().one())


def _aliases(connection: Connection) -> list[str]:
    from sqlalchemy import text

    return list(connection.execute(text("SELECT alias FROM model.alias WHERE valid_to IS NULL")).scalars())


def _known(connection: Connection, name: str) -> list[str]:
    """Names and aliases, in the form of the one that was not found."""
    from sqlalchemy import text

    names = connection.execute(text("SELECT DISTINCT name FROM model.checkpoint WHERE is_final")).scalars()
    base, at, part = name.rpartition("@")
    if at and base:
        return [f"{one}@{part}" for one in names]
    return [*names, *(f"@{alias}" if at else alias for alias in _aliases(connection))]


def _meant(connection: Connection, name: str) -> str:
    """The nearest to what stands behind the @ of a name that is known, as the end of a sentence."""
    base, at, part = name.rpartition("@")
    forms = {"best": f"{base}@best", "last": f"{base}@last"} | {one: f"@{one}" for one in _aliases(connection)}
    near = difflib.get_close_matches(part, forms, n=1) if at else []
    return f" Did you mean {forms[near[0]]!r}?" if near else ""


def publish(settings: Settings, file: Path, kind: str) -> tuple[str, str]:
    """Put a file under its digest among the artifacts; (its key there, sha256).

    Writing it again is a no-op, so that two attempts at one job cannot harm each other. The transaction that writes the
    row which names it begins with `named_files.hold`; the file given stays until then.

    Raises:
        OSError: it could not be written, or does not read back as written; ArtifactsAway where a bucket is away.
        StoreError: there is no place for it, or we may not write there.
    """
    digest = digest_of(file)
    key = f"{kind}/{digest[:2]}/{digest}{file.suffix}"
    place(settings).put(file, key, digest)
    return key, digest


def fetch(settings: Settings, key: str, sha256: str) -> Path:
    """A published file on this host, its content checked. Raises StoreError where it is missing or altered."""
    return place(settings).get(key, sha256)


def is_kept(settings: Settings, key: str) -> bool:
    """Whether a published file is still there."""
    return place(settings).size(key) is not None


def add_checkpoint(connection: Connection, values: Mapping[str, Any]) -> int:
    """Insert a row of model.checkpoint; its key. Where it is the best of its job, or the retreat, no other is."""
    from sqlalchemy import insert, update

    from app.schema.model import Checkpoint as Table

    for flag in (Table.is_best, Table.is_retreat):
        if values.get(flag.key) or (flag is Table.is_retreat and values.get("is_final")):  # which goes back nowhere
            others = update(Table).where(Table.job_id == values.get("job_id"), flag)
            connection.execute(others.values({flag: False}))
    return int(connection.execute(insert(Table).values(**values).returning(Table.checkpoint_id)).scalar_one())


_UNUSED = """
NOT EXISTS (SELECT FROM model.embedding_set e WHERE e.checkpoint_id = c.checkpoint_id)
AND NOT EXISTS (SELECT FROM model.alias a WHERE a.checkpoint_id = c.checkpoint_id)
AND NOT EXISTS (SELECT FROM model.checkpoint p WHERE p.parent_id = c.checkpoint_id)
AND NOT EXISTS (
    SELECT FROM ops.job j
    CROSS JOIN unnest(ARRAY[j.args ->> 'checkpoint', j.args ->> 'against', j.args -> 'set' ->> 'weights']) n (name)
    WHERE j.state IN ('queued', 'running', 'retry_wait') AND j.job_id IS DISTINCT FROM c.job_id
      AND (starts_with(n.name, c.name || '@') OR n.name = c.checkpoint_id::text
           OR length(n.name) >= 6 AND starts_with(c.sha256, n.name)
           OR split_part(j.args ->> 'continue', '@', 1) IN (c.name, c.checkpoint_id::text)))
"""
"""Nothing refers to a stop `c`, and no job that waits or is at work may mean it by what its arguments name."""
SUPERFLUOUS = f"""
SELECT c.checkpoint_id, c.job_id, c.name, c.epoch, c.path, c.num_bytes FROM (
    SELECT k.*, row_number() OVER (PARTITION BY k.job_id ORDER BY k.checkpoint_id DESC) AS newest
    FROM model.checkpoint k WHERE NOT k.is_final AND (CAST(:job AS bigint) IS NULL OR k.job_id = :job)) c
WHERE c.newest > :keep AND NOT c.is_best AND {_UNUSED}
  AND NOT (c.is_retreat AND NOT EXISTS (SELECT FROM ops.job j WHERE j.job_id = c.job_id AND j.state = 'succeeded'))
"""
"""Stops on the way of one training, or of all, but for the newest `keep`, the best, those in use, and the retreat until
the training has ended well."""
KEPT_STOPS = 3
"""Stops on the way that stay."""
_FORGET = f"""
DELETE FROM model.checkpoint WHERE checkpoint_id IN (SELECT checkpoint_id FROM ({SUPERFLUOUS}) s) RETURNING path
"""
_UNDO = f"""
WITH plain AS (
    UPDATE model.checkpoint c SET is_best = false, is_retreat = false
    WHERE c.job_id = :job AND NOT c.is_final AND c.step > :step AND NOT ({_UNUSED}))
DELETE FROM model.checkpoint c WHERE c.job_id = :job AND NOT c.is_final AND c.step > :step AND {_UNUSED} RETURNING path
"""


def forget_stops(connection: Connection, job_id: int, keep: int) -> list[str]:
    """Delete a training's stops that are superfluous.

    Returns:
        paths of artifacts that no row names any more; `named_files.remove` them once the transaction has committed.
    """
    return _delete_stops(connection, _FORGET, {"job": job_id, "keep": keep})


def undo_stops(connection: Connection, job_id: int, step: int) -> list[str]:
    """Delete a training's stops after a step to which it went back; paths as by `forget_stops`."""
    return _delete_stops(connection, _UNDO, {"job": job_id, "step": step})


def _delete_stops(connection: Connection, statement: str, values: dict[str, int]) -> list[str]:
    from sqlalchemy import text

    paths = set(connection.execute(text(statement), values).scalars())
    named = text("SELECT path FROM model.checkpoint WHERE path = ANY(:paths)")
    return sorted(paths - set(connection.execute(named, {"paths": list(paths)}).scalars()))
