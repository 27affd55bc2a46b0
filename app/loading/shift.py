"""Dates moved by an offset of each person's own, on the way in (`--shift-dates KEYFILE`).

The offset is a function of the key and the person id alone, HMAC-SHA256 (RFC 2104), so that records and scans that are
loaded apart move together: whole days, from one to 364 back. Intervals within a person, times of day and the order of
events stay; calendar dates, seasons, days of the week and what happened first to whom do not. Neither key nor offsets
are stored; a digest's prefix tells which key a source was loaded with.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import InputError

if TYPE_CHECKING:
    import duckdb
    import numpy as np
    from numpy.typing import NDArray

MOST_DAYS = 364
"""Dates go back by 1 to so many days."""
LEAST_CHARACTERS = 32
"""A key of fewer could be found by trying."""

EVENT_TIMES = ("time", "end_time")
PERSON_TIMES = ("birth_time",)
PERIOD_DAYS = ("start_date", "end_date")


@dataclass(frozen=True, slots=True)
class Shift:
    """A key, and what it does to dates."""

    key: bytes = field(repr=False)

    @property
    def key_id(self) -> str:
        """16 hexadecimal digits that tell keys apart and say nothing of them."""
        return hashlib.sha256(b"lachesis shift of dates\0" + self.key).hexdigest()[:16]

    def days(self, person_id: int) -> int:
        """Whole days to add to every date of a person, -364 to -1."""
        digest = hmac.digest(self.key, b"%d" % person_id, "sha256")
        return -1 - int.from_bytes(digest[:8], "big") % MOST_DAYS

    def moved(self, person_id: int, moment: dt.datetime) -> dt.datetime:
        """A moment of a person's life, moved; the time of day stays."""
        return moment + dt.timedelta(days=self.days(person_id))

    def offsets(self, persons: NDArray[np.int64]) -> NDArray[np.int32]:
        """`days` of persons (N,), each computed once however often it comes."""
        import numpy as np

        distinct, back = np.unique(persons, return_inverse=True)
        found = np.fromiter((self.days(person) for person in distinct.tolist()), np.int32, len(distinct))
        return found[back]

    def move_table(self, connection: duckdb.DuckDBPyConnection, table: str, columns: Sequence[str]) -> None:
        """Move the dates of a DuckDB table that has a column `person_id`; the order of its rows is lost.

        Args:
            connection: also given the table `shift(person_id, days)`, which grows with the persons that are met.
            table: its name.
            columns: its columns of type TIMESTAMP or DATE; null stays null.
        """
        import pyarrow as pa

        connection.execute("CREATE TABLE IF NOT EXISTS shift (person_id BIGINT, days INTEGER)")
        found = connection.execute(
            f"SELECT DISTINCT person_id FROM {table} t WHERE NOT EXISTS (FROM shift s WHERE s.person_id = t.person_id)"
        ).fetchnumpy()["person_id"]
        connection.register("met", pa.table({"person_id": found, "days": self.offsets(found)}))
        connection.execute("INSERT INTO shift FROM met")
        connection.unregister("met")
        moved = ", ".join(f"CAST({c} + to_days(s.days) AS {_type(connection, table, c)}) AS {c}" for c in columns)
        connection.execute(
            f"CREATE TABLE moved AS SELECT t.* REPLACE ({moved}) FROM {table} t JOIN shift s USING (person_id); "
            f"DROP TABLE {table}; ALTER TABLE moved RENAME TO {table}"
        )


def _type(connection: duckdb.DuckDBPyConnection, table: str, column: str) -> str:
    kinds = {row[0]: row[1] for row in connection.execute(f"DESCRIBE {table}").fetchall()}
    return str(kinds[column])


def end_at(connection: duckdb.DuckDBPyConnection, cut: dt.date) -> None:
    """Let no period of `t_observation_period` pass the last day of the data; to be called before its dates move.

    That day is not kept with moved dates, for one day cannot be the last of all persons: the periods carry it instead.
    """
    connection.execute(
        "UPDATE t_observation_period SET end_date = greatest(start_date, ?) WHERE end_date > ?", [cut] * 2
    )


def asked(args: Mapping[str, Any]) -> Shift | None:
    """The shift that a job's argument `shift_dates` (path of a key file) asks for.

    Raises:
        InputError: see `read_key`.
    """
    path = args.get("shift_dates")
    return Shift(read_key(Path(path))) if path else None


def read_key(path: Path) -> bytes:
    """The key in a file: its text without the white space around it.

    Raises:
        InputError: there is none, others may read it, or it is short.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            key = file.read(1 << 16).strip()
    except OSError:
        raise InputError(
            f"Expected a key for dates in {path.name}, found no file to read on this host; "
            "make one with `lachesis load key FILE`."
        ) from None
    if mode & 0o077:
        raise InputError(
            f"Expected the key file {path.name} to be readable by its owner alone, found mode {mode:04o}; "
            "run chmod 600 on it."
        )
    if len(key) < LEAST_CHARACTERS:
        raise InputError(
            f"Expected at least {LEAST_CHARACTERS} characters in the key file {path.name}, found {len(key)}; "
            "make one with `lachesis load key FILE`."
        )
    return key


def make_key(path: Path) -> Shift:
    """Write a new key to a file that only its owner may read.

    Raises:
        InputError: something is there already, or the folder is not.
    """
    key = secrets.token_hex(32).encode()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise InputError(
            f"Expected no file at {path}, found one; a key is never overwritten, give another name."
        ) from None
    except OSError as error:
        raise InputError(
            f"Expected a folder to write {path} into, found none ({error.strerror}); make it first."
        ) from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(key + b"\n")
    return Shift(key)
