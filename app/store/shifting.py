"""Which key the dates of a source were moved with; the keys themselves are nowhere in the store."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from app.errors import InputError

if TYPE_CHECKING:
    from sqlalchemy import Connection

DETAIL = "shift_key"
"""In ops.source.details: the id of the key, null or absent where dates are as they came."""


def key_of_source(connection: Connection, source_id: int | None) -> str | None:
    """Id of the key that a source's dates were moved with."""
    from sqlalchemy import text

    found: str | None = connection.scalar(
        text("SELECT details ->> :detail FROM ops.source WHERE source_id = :source"),
        {"detail": DETAIL, "source": source_id},
    )
    return found


def keep_key(connection: Connection, source_id: int, key_id: str | None) -> None:
    """Say which key a source's dates were moved with."""
    from sqlalchemy import text

    connection.execute(
        text(
            "UPDATE ops.source SET details = CASE WHEN CAST(:key AS text) IS NULL THEN details - :detail "
            "ELSE details || jsonb_build_object(CAST(:detail AS text), CAST(:key AS text)) END "
            "WHERE source_id = :source"
        ),
        {"key": key_id, "detail": DETAIL, "source": source_id},
    )


def refuse_other_key(connection: Connection, source_id: int | None, key_id: str | None, *, replaces_all: bool) -> None:
    """Refuse a delivery whose dates would lie beside dates that moved otherwise.

    Args:
        connection: to the store.
        source_id: the source; None where it is new.
        key_id: what the delivery's dates move with; None where they stay.
        replaces_all: nothing of a person stays of what the source shows now.

    Raises:
        InputError: the source shows rows, or its persons have scans, that moved with another key, or not at all.
    """
    from sqlalchemy import text

    if source_id is None:
        return
    before = key_of_source(connection, source_id)
    if before == key_id:
        return
    statement = text(
        "SELECT EXISTS (SELECT FROM omop.image_occurrence i JOIN omop.person p USING (person_id) "
        "JOIN ops.load l ON l.load_id = p.load_id WHERE l.source_id = :source), EXISTS (SELECT FROM ops.load "
        "WHERE source_id = :source AND state = 'published' AND kind NOT IN ('vocabulary', 'images'))"
    )
    scans, shown = connection.execute(statement, {"source": source_id}).one()
    if shown and (scans or not replaces_all):
        what = "whose persons have scans" if scans else "of which tables would stay"
        raise InputError(f"{_expected(before)} for this source, {what}, {_found(key_id)}; {_do(before)}.")


def refuse_other_key_of_persons(connection: Connection, persons: Iterable[int], key_id: str | None) -> None:
    """Refuse scans that would not move as their persons' records did.

    Raises:
        InputError: a person's record moved with another key, or one moved and the other not.
    """
    from sqlalchemy import text

    statement = text(
        "SELECT DISTINCT s.details ->> :detail FROM omop.person p JOIN ops.load l USING (load_id) "
        "JOIN ops.source s USING (source_id) WHERE p.person_id = ANY (:persons)"
    )
    for (before,) in connection.execute(statement, {"detail": DETAIL, "persons": sorted(set(persons))}):
        if before != key_id:
            raise InputError(f"{_expected(before)}, as these persons' records, {_found(key_id)}; {_do(before)}.")


def _expected(before: str | None) -> str:
    return "Expected dates as they are" if before is None else f"Expected dates moved with the key {before}"


def _found(key_id: str | None) -> str:
    return "got none of --shift-dates" if key_id is None else f"got the key {key_id}"


def _do(before: str | None) -> str:
    return (
        "leave --shift-dates out, or load the records anew with it" if before is None else "give --shift-dates that key"
    )


def refuse_day(connection: Connection, option: str) -> None:
    """Refuse a calendar day as a bound of follow-up where dates moved: for most persons it is another day.

    Raises:
        InputError: a source whose dates moved shows persons.
    """
    from sqlalchemy import text

    statement = text(
        "SELECT EXISTS (SELECT FROM ops.source s JOIN ops.load l USING (source_id) WHERE l.state = 'published' "
        "AND l.table_name IN ('person', 'data') AND s.details ->> :detail IS NOT NULL)"
    )
    if connection.scalar(statement, {"detail": DETAIL}):
        raise InputError(
            f"Expected no {option}, got one although dates were moved on the way in, so that no one day is the last of "
            "all persons; leave it out: their observation periods end with the data."
        )
