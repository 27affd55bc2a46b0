"""Looking: `ls`, `show`, `similar`; questions are asked in app/store/listing.py."""

from __future__ import annotations

import csv
import json as jsonlib
import sys
from typing import Annotated, Any

import typer

from app.errors import InputError, UnknownName

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def connect() -> Any:
    """An engine of the store here; raises StoreError where there is none."""
    from app.embedded import ensure_up
    from app.settings import read_settings
    from app.store.session import make_engine

    return make_engine(ensure_up(read_settings()).database_url)


def plain(value: Any) -> str:
    """A cell as a person reads it."""
    import datetime as dt

    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}" if 1e-4 <= abs(value) < 1e6 else str(value)
    if isinstance(value, dt.datetime):
        return value.isoformat(sep=" ", timespec="seconds")
    if isinstance(value, (dict, list)):
        return jsonlib.dumps(value, default=str)
    if isinstance(value, bytes):
        return value.hex()[:12]
    return str(value)


def print_table(rows: list[dict[str, Any]], title: str | None = None) -> None:
    """Rows as an aligned table, or a line that there are none."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    if not rows:
        console.print(f"{title}: none" if title else "none")
        return
    table = Table(*rows[0].keys(), title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(plain(value) for value in row.values()))
    console.print(table)


def print_record(record: dict[str, Any]) -> None:
    """One thing, a line a field."""
    width = max(map(len, record))
    for key, value in record.items():
        typer.echo(f"{key:<{width}}  {plain(value)}")


def print_csv(rows: list[dict[str, Any]]) -> None:
    """Rows as CSV: one header line, LF line ends."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    if rows:
        writer.writerow(rows[0].keys())
    writer.writerows([plain(value) for value in row.values()] for row in rows)


def ls(
    kind: Annotated[
        str,
        typer.Argument(help="load, reject, person, cohort, task, label, feature, encoder, checkpoint, metric or job."),
    ],
    limit: Annotated[int, typer.Option(help="Rows at the most.", min=1)] = 50,
    stale: Annotated[
        bool, typer.Option("--stale", help="Only what is out of date, and since when: labels, cohorts, checkpoints.")
    ] = False,
    versions: Annotated[
        bool, typer.Option("--versions", "--all", help="Older versions, too, and which is current or stale.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List things of a kind, newest first.

    Examples:
      lachesis ls loads
      lachesis ls labels --stale --json
      lachesis ls labels --versions
      lachesis ls encoders
    """
    from app.store import listing
    from app.store.stale import STALE, add_stale

    if kind in ("encoder", "encoders"):
        from app.cli.encoders import print_encoders

        print_encoders(as_json=as_json)
        return
    word, found = listing.kind_named(kind)
    if stale and word not in STALE:
        raise InputError(f"Expected {', '.join(STALE)} with --stale, got {word}; leave --stale out.")
    if versions and not found.versions:
        raise InputError(f"Expected cohorts, tasks or labels with --versions, got {word}; leave --versions out.")
    with connect().connect() as connection:
        if stale and not versions:
            rows = STALE[word](connection)[:limit]
        else:
            rows = listing.listing(connection, found, limit, versions=versions)
        if versions and word in STALE:
            rows = [row for row in add_stale(connection, word, rows) if row["stale"] or not stale]
    if as_json:
        typer.echo(jsonlib.dumps({"rows": rows}, default=str))
    else:
        print_table(rows)


MOST_SHOWN = 200
"""Rows of a long table, where nobody says how many."""


def csv_rows(word: str, rows: list[dict[str, Any]], parts: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What `show --csv` prints: a timeline, a task set's tasks (all concepts weighed, where it chose), features."""
    if word == "person":
        return parts["timeline"]
    if word == "task":
        return parts["weighed"] or parts["tasks"]
    if word == "feature":
        return parts["features"]
    return rows


def show(
    kind: Annotated[
        str, typer.Argument(help="load, reject, person, cohort, task, label, feature, checkpoint, metric or job.")
    ],
    name: Annotated[str, typer.Argument(help="Its name or id.")],
    limit: Annotated[
        int | None,
        typer.Option(help="Rejects, events or tasks at the most; 200, but all of them with --csv or --json.", min=1),
    ] = None,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Rows as CSV on stdout: a timeline, tasks or features, where they are shown.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show one thing and what belongs to it: a delivery's files and rules, a person's timeline, a job's attempts.

    Examples:
      lachesis show load 12
      lachesis show rejects 12 --csv > rejects.csv
      lachesis show person 1017 --limit 50
      lachesis show task pretraining --csv > tasks.csv
    """
    from app.cli.loads import explained
    from app.store import listing
    from app.store.artifacts import find_checkpoint

    word, found = listing.kind_named(kind)
    most = limit if limit is not None or as_csv or as_json else MOST_SHOWN
    with connect().connect() as connection:
        if word == "checkpoint":
            name = str(find_checkpoint(connection, name).checkpoint_id)
        rows = listing.details(connection, found.one, name, most)
        if not rows and not (word == "reject" and listing.is_load(connection, name)):
            known = "load" if word == "reject" else word
            raise UnknownName(known, name, listing.names(connection, known))
        parts = {title: listing.details(connection, statement, name, most) for title, statement in found.parts}
        total = listing.count(connection, found, name) if found.count else len(rows)
    if word == "reject":
        rows = explained(rows)
    parts = {title: explained(part) for title, part in parts.items()}
    if as_json:
        typer.echo(jsonlib.dumps({"rows": rows, **parts}, default=str))
    elif as_csv:
        print_csv(csv_rows(word, rows, parts))
    else:
        if word == "load" and len(rows) > 1:
            from app.cli.loads import SHARED, shortened

            print_record({key: rows[0][key] for key in SHARED})
            print_table([shortened(row) for row in rows])
        else:
            print_record(rows[0]) if len(rows) == 1 and word != "reject" else print_table(rows)
        for title, part in parts.items():
            print_table(part, title)
    shown = len(rows)
    if word == "person":
        shown, total = len(parts["timeline"]), rows[0]["num_events"]
    if shown < total:
        print(f"lachesis: {shown:,} of {total:,} shown; --limit {total} or --csv shows all.", file=sys.stderr)


def register(app: typer.Typer) -> None:
    """Add the commands that look."""
    for command in (ls, show):
        app.command()(command)
