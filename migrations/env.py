"""How migrations run: on the connection that app.store.schema_version gives, else on one to the store here."""

from __future__ import annotations

from typing import Any

from alembic import context
from sqlalchemy import Connection, text

from app.schema import SCHEMAS, metadata
from app.settings import read_settings
from app.store.schema_version import is_compared

VERSION_TABLE = {"version_table": "alembic_version", "version_table_schema": "ops"}
LOCK = 4_210_001
"""Key of the advisory lock held while a store is migrated; it ends with the transaction."""


def include_name(name: str | None, kind: str, _parents: Any) -> bool:
    """Only our schemas are compared with the models."""
    return name in SCHEMAS if kind == "schema" else True


def run(connection: Connection) -> None:
    """Upgrade or downgrade in one transaction; whoever comes second waits, then finds nothing to do."""
    connection.execute(text("SET LOCAL lock_timeout = '30s'"))
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK})
    connection.execute(text("CREATE SCHEMA IF NOT EXISTS ops"))
    context.configure(
        connection=connection,
        target_metadata=metadata,
        include_schemas=True,
        include_name=include_name,
        include_object=is_compared,
        compare_server_default=True,
        **VERSION_TABLE,
    )
    with context.begin_transaction():
        context.run_migrations()


def main() -> None:
    """Take the connection that was given, or open one."""
    given: Connection | None = context.config.attributes.get("connection")
    if given is not None:
        run(given)
        return
    from app.embedded import connection_url
    from app.store.session import make_engine

    with make_engine(connection_url(read_settings())).begin() as connection:
        run(connection)


if context.is_offline_mode():
    raise SystemExit("Expected a database: rights and comments depend on what is there, so no script can be written.")
main()
