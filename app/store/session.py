"""Engines and connections; no queries."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import psycopg
    from sqlalchemy import Connection, Engine


def make_engine(url: str, *, application_name: str = "lachesis", pooled: bool = False) -> Engine:
    """An engine whose sessions speak UTC, notice a dead peer within a minute and hold no idle connection.

    Args:
        url: a SQLAlchemy URL; `postgresql://` is read as `postgresql+psycopg://`.
        application_name: shown in pg_stat_activity; jobs use `lachesis:<job>:<fence>`.
        pooled: keep a few connections (servers), else open one a use (jobs, commands).
    """
    from sqlalchemy import NullPool, QueuePool, create_engine

    if url.startswith("postgresql://"):
        url = "postgresql+psycopg://" + url.removeprefix("postgresql://")
    return create_engine(
        url,
        poolclass=QueuePool if pooled else NullPool,
        hide_parameters=True,  # they may be a person's
        pool_pre_ping=pooled,
        connect_args={
            "application_name": application_name,
            "connect_timeout": 5,
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 3,
            "options": "-c TimeZone=UTC -c jit=off",
        },
    )


def is_away(error: BaseException) -> bool:
    """True where an error of the database's driver means that the server does not answer, or goes down."""
    import psycopg

    cause = getattr(error, "orig", None) or error
    if not isinstance(cause, psycopg.OperationalError):
        return False
    return cause.sqlstate is None or cause.sqlstate.startswith(("08", "57P", "53300"))


def raw(connection: Connection) -> psycopg.Connection:
    """The psycopg connection under a SQLAlchemy one, for COPY; it shares the transaction."""
    return cast("psycopg.Connection", connection.connection.driver_connection)
