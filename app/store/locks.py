"""Locks that go by a name and end with the transaction."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy import Connection


def hold(connection: Connection, name: str) -> None:
    """Wait until no other transaction holds a name, and hold it until this one ends."""
    from sqlalchemy import text

    connection.execute(text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))"), {"name": name})
