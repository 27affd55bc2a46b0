"""`concepts`: search the vocabulary, or list what it lacks."""

from __future__ import annotations

import json as jsonlib
import sys
from typing import Annotated

import typer

from app.cli.look import AsJson, connect, print_csv, print_table
from app.errors import InputError

SHORT = {
    "concept_id": "id",
    "concept_name": "name",
    "domain_id": "domain",
    "vocabulary_id": "vocabulary",
    "concept_code": "code",
    "standard_concept": "std",
    "invalid_reason": "invalid",
    "persons_with_descendants": "persons*",
    "events_with_descendants": "events*",
    "source_events": "as source",
    "maps_to": "maps to",
}
"""Titles of the table on a terminal."""


def concepts(
    words: Annotated[
        str | None, typer.Argument(metavar="[TEXT]", help="Words of a name or synonym, a code, or a concept id.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Rows at the most.", min=1)] = 20,
    standard: Annotated[bool, typer.Option("--standard", help="Only standard concepts.")] = False,
    domain: Annotated[str | None, typer.Option(help="Only this domain, e.g. Condition.")] = None,
    vocabulary: Annotated[str | None, typer.Option(help="Only this vocabulary, e.g. SNOMED.")] = None,
    unknown: Annotated[
        bool, typer.Option("--unknown", help="List the concepts in use that the vocabulary lacks.")
    ] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Rows as CSV on stdout.")] = False,
    as_json: AsJson = False,
) -> None:
    """Search concepts by name, synonym, code or id, with the persons and events that carry them.

    Examples:
      lachesis concepts "gastrointestinal hemorrhage" --standard
      lachesis concepts K92.2 --vocabulary ICD10CM --json
    """
    from app.store import concepts as store

    if (words is None) != unknown:
        raise InputError("Expected either TEXT to search for or --unknown; give one of the two.")
    if words is not None and not words.strip():
        raise InputError(
            "Expected a word, a code or a concept id, got nothing; for instance `lachesis concepts bleed`."
        )
    with connect().connect() as connection:
        if words is None:
            rows = store.unknown(connection, limit)
        else:
            wanted = store.Filter(standard=standard, domain=domain, vocabulary=vocabulary)
            rows = store.search(connection, words, limit, wanted)
    if as_json:
        typer.echo(jsonlib.dumps({"rows": rows}, default=str))
    elif as_csv:
        print_csv(rows)
    else:
        print_table([{SHORT.get(key, key): value for key, value in row.items()} for row in rows])
        if words is not None and rows:
            print("* with all narrower concepts; no number where they are too many to count", file=sys.stderr)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(concepts)
