"""The schema's version: which revision a database has, which one this code needs, and how it gets there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import StoreError

if TYPE_CHECKING:
    import psycopg
    from alembic.config import Config

MIGRATIONS = Path(__file__).resolve().parents[2] / "migrations"
NEEDED = max(path.name[:4] for path in (MIGRATIONS / "versions").glob("[0-9]*.py"))
"""The newest revision, read from the names of the files so that a look at the version imports no alembic."""
SCHEMAS = ("omop", "label", "model", "ops")

_FOUND = """
SELECT to_regclass('ops.alembic_version') IS NOT NULL,
       (SELECT array_agg(nspname::text ORDER BY nspname) FROM pg_namespace WHERE nspname = ANY(%s))
"""


def current(connection: psycopg.Connection[Any]) -> str | None:
    """The revision of a database, or None where Lachesis has no tables in it.

    Raises:
        StoreError: the database has schemas of our names that are not ours; nothing is touched.
    """
    row = connection.execute(_FOUND, (list(SCHEMAS),)).fetchone()
    ours, schemas = row if row is not None else (False, None)
    if not ours:
        if schemas:
            raise StoreError(
                f"Expected a database of Lachesis or an empty one, found a schema {schemas[0]!r} that is not ours; "
                "give LACHESIS_DATABASE_URL another database."
            )
        return None
    version = connection.execute("SELECT version_num FROM ops.alembic_version").fetchone()
    return str(version[0]) if version else None


def revision_of(url: str) -> str | None:
    """`current` of the database at a URL. Raises StoreError where it does not answer."""
    import psycopg

    plain = url.replace("postgresql+psycopg://", "postgresql://", 1)
    try:
        with psycopg.connect(plain, connect_timeout=5, application_name="lachesis") as connection:
            return current(connection)
    except psycopg.OperationalError as error:
        raise StoreError(f"The database does not answer: {first_line(error)}") from None
    except psycopg.ProgrammingError as error:
        if error.sqlstate is None:  # its message repeats the URL, password and all
            raise StoreError("The URL of the database cannot be read; check LACHESIS_DATABASE_URL.") from None
        raise StoreError(f"The database cannot be asked for its schema: {first_line(error)}") from None


def require(found: str | None) -> None:
    """Refuse a database of another version, saying which command mends it. Raises StoreError."""
    if found == NEEDED:
        return
    if found is None:
        raise StoreError("The database holds no tables of Lachesis; run `lachesis db upgrade` first.")
    if found > NEEDED:
        raise StoreError(f"The database has schema {found}, this Lachesis knows {NEEDED}; install a newer Lachesis.")
    raise StoreError(f"The database has schema {found}, {NEEDED} is needed; run `lachesis db upgrade`.")


def upgrade(url: str, *, role_prefix: str, revision: str = "head") -> None:
    """Bring a database to a revision, in one transaction.

    Raises:
        StoreError: it does not answer, is not ours, is newer than this code, or lacks a right.
    """
    from alembic import command
    from sqlalchemy.exc import DBAPIError

    from app.store.session import make_engine

    found = revision_of(url)
    if found is not None and found > NEEDED:
        require(found)
    try:
        with make_engine(url).begin() as connection:
            command.upgrade(alembic_config(connection=connection, role_prefix=role_prefix), revision)
    except DBAPIError as error:
        raise StoreError(f"The schema cannot be upgraded: {first_line(error.orig or error)}") from error


def drift(url: str) -> list[str]:
    """Differences between a database and the models, one line each; partitions and the version table are no drift."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    from app.schema import metadata
    from app.store.session import make_engine

    options = {
        "include_schemas": True,
        "include_name": lambda name, kind, _parents: kind != "schema" or name in SCHEMAS,
        "include_object": is_compared,
        "compare_type": True,
        "compare_server_default": True,
        "version_table": "alembic_version",
        "version_table_schema": "ops",
    }
    with make_engine(url).connect() as connection:
        found = compare_metadata(MigrationContext.configure(connection, opts=options), metadata)
    return [str(difference) for difference in found]


def is_compared(_thing: Any, name: str | None, kind: str, reflected: bool, _compared: Any) -> bool:
    """False for tables that migrations do not make: partitions of loads and checkpoints."""
    return not (kind == "table" and reflected and re.fullmatch(r"event_.+|embedding_\d+", name or ""))


def alembic_config(**attributes: Any) -> Config:
    """Alembic's configuration of our migrations; `attributes` reach migrations/env.py."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes.update(attributes)
    return config


def first_line(error: BaseException) -> str:
    """The first line of a database's message, with a full stop."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if line.endswith(".") else f"{line}."
