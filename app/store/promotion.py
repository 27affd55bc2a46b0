"""Aliases: which checkpoint stands under a name such as champion, with all that stood there before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from app.errors import InputError
from app.store.artifacts import Checkpoint
from app.store.names import check_name

if TYPE_CHECKING:
    from sqlalchemy import Connection

UNDONE = "undone"
"""The reason of a row that an undoing wrote."""

# Label sets by which the one that stands was judged, and the newcomer was not.
_UNJUDGED = """
SELECT DISTINCT s.name || '@' || s.version FROM model.alias a
JOIN model.metric m ON m.checkpoint_id = a.checkpoint_id AND m.value IS NOT NULL
JOIN label.label_set s USING (label_set_id)
WHERE a.alias = :alias AND a.valid_to IS NULL AND s.is_current AND NOT EXISTS (
    SELECT FROM model.metric n WHERE n.checkpoint_id = :checkpoint AND n.label_set_id = m.label_set_id
      AND n.value IS NOT NULL)
ORDER BY 1
"""


def promote(connection: Connection, alias: str, checkpoint: Checkpoint, reason: str | None) -> bool:
    """Have an alias mean a checkpoint from now on; False where it does already. Two at once: one after the other.

    Raises:
        InputError: it was never evaluated, or not by the labels that the one that stands was.
    """
    from sqlalchemy import text

    _lock(connection, alias)
    values = {"alias": check_name("alias", alias), "checkpoint": checkpoint.checkpoint_id}
    if current(connection, alias) == checkpoint.checkpoint_id:
        return False
    judged = "SELECT EXISTS (SELECT FROM model.metric WHERE checkpoint_id = :checkpoint AND value IS NOT NULL)"
    if not connection.execute(text(judged), values).scalar_one():
        raise InputError(
            f"Expected figures of checkpoint {checkpoint.name!r}, found none; "
            f"run `lachesis evaluate {checkpoint.name} --labels L` first."
        )
    missing = list(connection.execute(text(_UNJUDGED), values).scalars())
    if missing:
        raise InputError(
            f"Expected checkpoint {checkpoint.name!r} to be judged by the labels that the present {alias} was, found "
            f"no figures by {', '.join(missing)}; run `lachesis evaluate` with them first."
        )
    _end(connection, alias)
    connection.execute(
        text("INSERT INTO model.alias (alias, checkpoint_id, reason) VALUES (:alias, :checkpoint, :reason)"),
        values | {"reason": reason},
    )
    return True


def undo(connection: Connection, alias: str) -> str:
    """Have an alias mean what it meant before; the name of that. Raises InputError where it meant nothing before."""
    from sqlalchemy import text

    _lock(connection, alias)
    rows = connection.execute(
        text(
            "SELECT a.alias_id, a.checkpoint_id, c.name, a.reason FROM model.alias a "
            "JOIN model.checkpoint c USING (checkpoint_id) WHERE a.alias = :alias ORDER BY a.alias_id"
        ),
        {"alias": alias},
    ).all()
    stack: list[Any] = []
    for row in rows:  # an undoing takes away what it undid, so that the next one goes a step further back
        if row.reason == UNDONE:
            stack.pop()
        else:
            stack.append(row)
    if len(stack) < 2:
        raise InputError(
            f"Expected a checkpoint that {alias!r} meant before, found none; `lachesis promote` names one."
        )
    before = stack[-2]
    _end(connection, alias)
    connection.execute(
        text("INSERT INTO model.alias (alias, checkpoint_id, reason) VALUES (:alias, :checkpoint, :reason)"),
        {"alias": alias, "checkpoint": before.checkpoint_id, "reason": UNDONE},
    )
    return str(before.name)


def history(connection: Connection, alias: str) -> list[dict[str, Any]]:
    """What an alias meant and means, newest first."""
    from sqlalchemy import text

    found = connection.execute(
        text(
            "SELECT a.alias, c.name, a.checkpoint_id, left(c.sha256, 12) AS sha256, a.valid_from, a.valid_to, a.reason "
            "FROM model.alias a JOIN model.checkpoint c USING (checkpoint_id) WHERE a.alias = :alias "
            "ORDER BY a.alias_id DESC"
        ),
        {"alias": alias},
    ).mappings()
    return [dict(row) for row in found]


def current(connection: Connection, alias: str) -> int | None:
    """The checkpoint that an alias means."""
    from sqlalchemy import text

    statement = "SELECT checkpoint_id FROM model.alias WHERE alias = :alias AND valid_to IS NULL"
    found: int | None = connection.execute(text(statement), {"alias": alias}).scalar()
    return found


def _lock(connection: Connection, alias: str) -> None:
    from sqlalchemy import text

    connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('alias ' || :alias))"), {"alias": alias})


def _end(connection: Connection, alias: str) -> None:
    from sqlalchemy import text

    statement = "UPDATE model.alias SET valid_to = clock_timestamp() WHERE alias = :alias AND valid_to IS NULL"
    connection.execute(text(statement), {"alias": alias})
