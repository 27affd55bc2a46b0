"""The declarative base: named constraints, and the column types and helper used by every schema file."""

from __future__ import annotations

from typing import Any

from sqlalchemy import MetaData, text
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.orm import DeclarativeBase, MappedColumn, mapped_column

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}

NAIVE = TIMESTAMP(timezone=False)
"""Local time without a zone, as OMOP has it."""
MOMENT = TIMESTAMP(timezone=True)
"""A point in time, for what machines do."""
NOW = text("clock_timestamp()")


class Base(DeclarativeBase):
    """Every table of ours."""

    metadata = MetaData(naming_convention=NAMING)


def column(comment: str, *args: Any, **kwargs: Any) -> MappedColumn[Any]:
    """A mapped column that says what it holds first: the comment goes into the database."""
    return mapped_column(*args, comment=comment, **kwargs)
