"""Taking versions of label sets, cohorts and task sets out of the store, unless something rests on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app.errors import InputError
from app.store import names

if TYPE_CHECKING:
    from sqlalchemy import Connection

# What rests on one version, as rows (what, named). Those with `always` hold it even against --force: they would be left
# without what they are of.
LABEL = """
SELECT 'checkpoint ' || checkpoint_id || ' (' || name || ')' AS what, false AS always FROM model.checkpoint
WHERE label_set_id = :id
UNION ALL
SELECT count(*) || ' metrics', false FROM model.metric WHERE label_set_id = :id HAVING count(*) > 0
UNION ALL
SELECT count(*) || ' predictions', false FROM model.prediction WHERE label_set_id = :id HAVING count(*) > 0
"""

COHORT = """
SELECT 'labels ' || name || '@' || version AS what, true AS always FROM label.label_set WHERE cohort_id = :id
UNION ALL
SELECT 'task set ' || name || '@' || version, false FROM label.task_set WHERE cohort_id = :id
UNION ALL
SELECT 'checkpoint ' || checkpoint_id || ' (' || name || ')', false FROM model.checkpoint WHERE cohort_id = :id
UNION ALL
SELECT 'embeddings by checkpoint ' || checkpoint_id, false FROM model.embedding_set WHERE cohort_id = :id
UNION ALL
SELECT 'features', false FROM label.feature_set WHERE cohort_id = :id
"""

TASKS = """
SELECT 'labels ' || name || '@' || version AS what, true AS always FROM label.label_set WHERE task_set_id = :id
"""

# Jobs that are queued or at work and name it: with its number, or without where it is what the name means.
JOBS = """
SELECT 'job ' || job_id || ' (' || kind || ')' AS what, true AS always FROM ops.job
WHERE state IN ('queued', 'running', 'retry_wait')
  AND (args ->> :key = :exact OR (:current AND args ->> :key = :name))
"""


@dataclass(frozen=True, slots=True)
class Kind:
    """How a kind of thing is removed."""

    noun: str
    resting: str
    key: str
    """Argument of jobs that use it."""


KINDS = {
    "label": Kind("label set", LABEL, "labels"),
    "cohort": Kind("cohort", COHORT, "cohort"),
    "task": Kind("task set", TASKS, "tasks"),
}


def find(connection: Connection, kind: Kind, name: str) -> tuple[names.Version, bool]:
    """The version that is meant, and whether it is current; of several the number must be given.

    Raises:
        UnknownName: there is none.
        InputError: a name alone has several versions.
    """
    from sqlalchemy import text

    found = names.find(connection, kind.noun, name)
    table = names.TABLES[kind.noun]
    rows = connection.execute(
        text(f"SELECT {table}_id AS id, version, is_current FROM label.{table} WHERE name = :name ORDER BY version"),
        {"name": found.name},
    ).all()
    if "@" not in name and len(rows) > 1:
        known = ", ".join(f"{found.name}@{row.version}" for row in rows)
        raise InputError(f"Expected a version of {found.name!r} to remove, which has {len(rows)}; name one: {known}.")
    return found, next(row.is_current for row in rows if row.id == found.id)


def resting(connection: Connection, kind: Kind, found: names.Version, is_current: bool) -> list[Any]:
    """Rows (what, always) of all that rests on a version."""
    from sqlalchemy import text

    rows = list(connection.execute(text(kind.resting), {"id": found.id}))
    exact = f"{found.name}@{found.version}"
    values = {"key": kind.key, "exact": exact, "name": found.name, "current": is_current}
    return rows + list(connection.execute(text(JOBS), values))


def some_of(held: Sequence[str]) -> str:
    """The first ten of what holds something, and how many more."""
    return ", ".join(held[:10]) + (f" and {len(held) - 10} more" if len(held) > 10 else "")


def remove(connection: Connection, kind: Kind, name: str, *, force: bool, dry_run: bool) -> dict[str, Any]:
    """Take a version away; the name means the newest that is left.

    With `force`, metrics and predictions of labels go, too, and checkpoints no longer say what they learnt from.

    Raises:
        InputError: something rests on it.
    """
    from sqlalchemy import text

    table = names.TABLES[kind.noun]
    names.lock(connection, kind.noun, name.partition("@")[0])
    found, is_current = find(connection, kind, name)
    exact = f"{found.name}@{found.version}"
    rows = resting(connection, kind, found, is_current)
    held = [row.what for row in rows if row.always or not force]
    if held:
        way = "remove them first" if any(row.always for row in rows) else "--force removes it all the same"
        raise InputError(f"Expected nothing to rest on {kind.noun} {exact}, found {some_of(held)}; {way}.")
    result = {"removed": exact, "rested_on_it": [row.what for row in rows], "name_means": None, "dry_run": dry_run}
    left = connection.scalar(
        text(
            f"SELECT version FROM label.{table} WHERE name = :name AND version <> :version "
            "ORDER BY is_current DESC, version DESC LIMIT 1"
        ),
        {"name": found.name, "version": found.version},
    )
    if left is not None:
        result["name_means"] = f"{found.name}@{left}"
    if dry_run:
        return result
    if kind.noun == "label set":
        connection.execute(
            text("UPDATE model.checkpoint SET label_set_id = NULL WHERE label_set_id = :id"), {"id": found.id}
        )
    connection.execute(text(f"DELETE FROM label.{table} WHERE {table}_id = :id"), {"id": found.id})
    connection.execute(
        text(
            "INSERT INTO label.removed_version (kind, name, version, digest) VALUES (:kind, :name, :version, :digest)"
        ),
        {"kind": table, "name": found.name, "version": found.version, "digest": found.digest},
    )
    if is_current:
        connection.execute(
            text(f"UPDATE label.{table} SET is_current = true WHERE name = :name AND version = :left"),
            {"name": found.name, "left": left},
        )
    return result
