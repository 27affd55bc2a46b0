"""Names with versions: `NAME` means the current version of a cohort, task set or label set, `NAME@2` its second."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from app.errors import InputError, UnknownName

if TYPE_CHECKING:
    from sqlalchemy import Connection

TABLES = {"cohort": "cohort", "task set": "task_set", "label set": "label_set"}
"""What can be named so → its table in the schema `label`, whose key is `<table>_id`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """One version of something named."""

    id: int
    name: str
    version: int
    digest: bytes


def check_name(kind: str, name: object) -> str:
    """A name fit to be given to something new. Raises InputError."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError(f"Expected a name of letters, digits, '.', '_' or '-' for the {kind}, got {name!r}.")
    return name


def find(connection: Connection, kind: str, name: str) -> Version:
    """What `NAME` or `NAME@2` means. Raises UnknownName."""
    from sqlalchemy import text

    table = TABLES[kind]
    base, _, number = name.partition("@")
    row = connection.execute(
        text(
            f"SELECT {table}_id AS id, name, version, digest FROM label.{table} "
            "WHERE name = :name AND CASE WHEN :number = '' THEN is_current ELSE version::text = :number END"
        ),
        {"name": base, "number": number},
    ).mappings()
    found = row.first()
    if found is None:
        known = connection.execute(text(f"SELECT name FROM label.{table} WHERE is_current")).scalars()
        raise UnknownName(kind, name, known)
    return Version(**{**found, "digest": bytes(found["digest"])})


def find_current(connection: Connection, kind: str, name: str) -> Version | None:
    """The version a name means now, or None where it is new."""
    try:
        return find(connection, kind, name)
    except UnknownName:
        return None


def lock(connection: Connection, kind: str, name: str) -> None:
    """Make two jobs that make the same name wait for each other, until the transaction ends."""
    from sqlalchemy import text

    connection.execute(text("SELECT pg_advisory_xact_lock(hashtext(:key))"), {"key": f"label.{TABLES[kind]}:{name}"})


def move(connection: Connection, kind: str, name: str) -> int:
    """Take the name from its current version, in this transaction, and say which number the next one has.

    Numbers of removed versions are not given again.
    """
    from sqlalchemy import text

    table = TABLES[kind]
    connection.execute(
        text(f"UPDATE label.{table} SET is_current = false WHERE name = :name AND is_current"), {"name": name}
    )
    newest = connection.execute(
        text(
            f"SELECT coalesce(max(version), 0) FROM (SELECT version FROM label.{table} WHERE name = :name UNION ALL "
            "SELECT version FROM label.removed_version WHERE kind = :kind AND name = :name) v"
        ),
        {"name": name, "kind": table},
    ).scalar_one()
    return int(newest) + 1
