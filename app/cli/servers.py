"""Servers and their schema: `up`, `down`, `status`, `psql`, `sql`, `db`, `worker`."""

from __future__ import annotations

import json as jsonlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from app.errors import InputError, StoreError

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]

MOST_SHOWN = 1000
"""Rows of a table on the terminal."""

db = typer.Typer(no_args_is_help=True, help="The schema of the store.", rich_markup_mode=None)


def up(
    listen: Annotated[
        int | None,
        typer.Option(
            metavar="PORT",
            help="Let Postgres listen on 127.0.0.1:PORT, too, for readers; 0 ends that.",
            min=0,
            max=65535,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Start the servers of the store here; make the store where there is none.

    Examples:
      lachesis up
      LACHESIS_HOME=/data/lachesis lachesis up --listen 5433
    """
    from app.embedded import ensure_up, listen_on, status
    from app.settings import read_settings

    store = ensure_up(read_settings(), create=True)
    if store.embedded and listen is not None:
        listen_on(store, listen)
    if not store.embedded and not as_json:
        typer.echo("The servers named by LACHESIS_DATABASE_URL and LACHESIS_REDIS_URL are used; nothing was started.")
        return
    found = status(store.settings)
    if as_json:
        typer.echo(jsonlib.dumps(found))
        return
    typer.echo(f"Postgres {found['postgres_version']} and Redis answer; the store is {found['home']}.")
    if found["listens"]:
        typer.echo(f"Postgres listens on {found['listens']}; the reader's URL is in {found['reader_url_file']}.")


def down(as_json: AsJson = False) -> None:
    """End the workers and servers of the store here; nothing is lost, running jobs go on after the next start.

    Examples:
      lachesis down
      LACHESIS_HOME=/data/lachesis lachesis down
    """
    from app.embedded import stop
    from app.settings import read_settings

    ended = stop(read_settings())
    if as_json:
        typer.echo(jsonlib.dumps(ended))
        return
    servers = [name for name, ran in (("Postgres", ended["postgres"]), ("Redis", ended["redis"])) if ran]
    what = [*(f"{ended['workers']} worker(s)" for _ in range(ended["workers"] > 0)), *servers]
    typer.echo(f"Ended {', '.join(what)}." if what else "Nothing ran.")


def status(as_json: AsJson = False) -> None:
    """Say what runs, without starting anything; exits 4 where a server is down or the schema is another version.

    Examples:
      lachesis status
      lachesis status --json
    """
    from app import embedded
    from app.settings import read_settings

    found = embedded.status(read_settings())
    if as_json:
        typer.echo(jsonlib.dumps(found))
    else:
        width = max(map(len, found))
        for key, value in found.items():
            shown = ", ".join(f"{k} ({v})" for k, v in value.items()) if isinstance(value, dict) else value
            typer.echo(f"{key:<{width}}  {'-' if shown in (None, '') else shown}")
    servers_up = not found["embedded"] or (found["postgres"] and found["redis"])
    if not servers_up or found["schema"] != found["schema_needed"]:
        raise typer.Exit(StoreError.exit_code)


def psql(context: typer.Context) -> None:
    """Open psql on the store as its owner; what follows `--` goes to psql. `lachesis sql` only reads.

    Examples:
      lachesis psql
      lachesis psql -- -c '\\d+ label.tte_long'
    """
    from app.embedded import psql_command
    from app.settings import read_settings

    command, more = psql_command(read_settings())
    os.execve(command[0], [*command, *context.args], {**os.environ, **more})  # noqa: S606


def sql(
    statement: Annotated[str | None, typer.Argument(metavar="STATEMENT", help="One statement that gives rows.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Read the statement from a file; - for stdin.")
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV: one header line, LF line ends.")] = False,
    as_json: AsJson = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write to a file; .csv and .json say how.")
    ] = None,
) -> None:
    """Ask the store one question in SQL, as a login that may only read.

    Examples:
      lachesis sql "SELECT task, status, n FROM label.task_count WHERE label_set = 'outcomes'"
      lachesis sql -f question.sql -o answer.csv
    """
    from app.embedded import ensure_up
    from app.settings import read_settings
    from app.store.query import ask

    text = read_statement(statement, file)
    as_csv, as_json = _form(output, as_csv, as_json)
    store = ensure_up(read_settings())
    if store.reader_url is None:
        raise StoreError("Expected LACHESIS_READER_URL, the login that `lachesis sql` reads with, found none; set it.")
    with ask(store.reader_url, text) as answer, _target(output) as target:
        if as_csv or (output is not None and not as_json):
            _write_csv(target, answer.columns, answer.rows)
        elif as_json:
            _write_json(target, answer.columns, answer.rows)
        else:
            _print_rows(answer.columns, answer.rows)


def worker(
    queues: Annotated[
        str, typer.Option(help="Queues to serve, comma-separated: load, label, gpu, eval.")
    ] = "load,label,eval",
    name: Annotated[str | None, typer.Option(help="Name shown in lists of workers.")] = None,
) -> None:
    """Serve queues in the foreground until a signal ends it; run one a host and GPU beside external servers.

    Examples:
      lachesis worker --queues load,label,eval
      CUDA_VISIBLE_DEVICES=1 lachesis worker --queues gpu --name host2-gpu1
    """
    known = ("load", "label", "gpu", "eval")
    unknown = [queue for queue in queues.split(",") if queue not in known]
    if unknown:
        raise InputError(f"Expected queues among {', '.join(known)}, found {unknown[0]!r}; separate them by commas.")
    named = ["--name", name] if name else []
    command = [sys.executable, "-P", "-m", "workers", "worker", "--queues", queues, *named]
    os.execv(sys.executable, command)  # noqa: S606


@db.command("upgrade")
def db_upgrade(
    revision: Annotated[str, typer.Argument(help="Revision to go to.")] = "head",
) -> None:
    """Bring the schema to this version, in one transaction; a store that is current stays untouched.

    Examples:
      lachesis db upgrade
      LACHESIS_DATABASE_URL=postgresql://host/lachesis lachesis db upgrade
    """
    from app.embedded import connection_url
    from app.settings import read_settings
    from app.store import schema_version

    settings = read_settings()
    url = connection_url(settings)
    before = schema_version.revision_of(url)
    schema_version.upgrade(url, role_prefix=settings.role_prefix, revision=revision)
    after = schema_version.revision_of(url)
    typer.echo(
        f"The schema is {after}, as before."
        if before == after
        else f"The schema went from {before or 'absent'} to {after or 'absent'}."
    )


@db.command("current")
def db_current(as_json: AsJson = False) -> None:
    """Say which version the schema has and which one is needed.

    Examples:
      lachesis db current
      lachesis db current --json
    """
    from app.embedded import connection_url
    from app.settings import read_settings
    from app.store import schema_version

    found = schema_version.revision_of(connection_url(read_settings()))
    if as_json:
        typer.echo(jsonlib.dumps({"schema": found, "schema_needed": schema_version.NEEDED}))
    else:
        typer.echo(f"The schema is {found or 'absent'}; {schema_version.NEEDED} is needed.")


@db.command("check")
def db_check() -> None:
    """Compare the database with what this version expects; exits 4 for another version, 1 where something differs.

    Examples:
      lachesis db check
      lachesis db check && lachesis load omop EXTRACT
    """
    from app.embedded import connection_url
    from app.settings import read_settings
    from app.store import schema_version

    url = connection_url(read_settings())
    schema_version.require(schema_version.revision_of(url))
    differences = schema_version.drift(url)
    for difference in differences:
        typer.echo(difference)
    if differences:
        raise typer.Exit(1)
    typer.echo(f"The schema is {schema_version.NEEDED}, and nothing differs.")


def read_statement(statement: str | None, file: Path | None) -> str:
    """The statement that is given, or that a file (`-`: standard input) holds. Raises InputError."""
    if (statement is None) == (file is None):
        raise InputError("Expected one statement, or -f FILE; `lachesis sql --help` shows both.")
    if statement is not None:
        return statement
    try:
        return sys.stdin.read() if str(file) == "-" else Path(str(file)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise InputError(f"Expected a statement in {file}, could not read it: {why}.") from None


def _form(output: Path | None, as_csv: bool, as_json: bool) -> tuple[bool, bool]:
    if as_csv and as_json:
        raise InputError("Expected --csv or --json, found both; give one.")
    if output is not None and not as_csv:
        as_json = as_json or output.suffix == ".json"
    return as_csv, as_json


@contextmanager
def _target(output: Path | None) -> Iterator[IO[str]]:
    """Stdout, or a file that appears whole or not at all."""
    if output is None:
        yield sys.stdout
        return
    part = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        with part.open("w", newline="") as file:
            yield file
        part.replace(output)
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror}.") from None
    finally:
        part.unlink(missing_ok=True)


def _print_rows(columns: list[str], rows: Iterator[tuple[Any, ...]]) -> None:
    """A table to look at; nobody reads thousands of lines of one."""
    from itertools import islice

    from app.cli.look import print_table

    shown = [dict(zip(columns, row, strict=True)) for row in islice(rows, MOST_SHOWN + 1)]
    print_table(shown[:MOST_SHOWN])
    if len(shown) > MOST_SHOWN:
        print(f"lachesis: the first {MOST_SHOWN} rows; --csv, --json or -o FILE gives all.", file=sys.stderr)


def _write_csv(target: IO[str], columns: list[str], rows: Iterator[tuple[Any, ...]]) -> None:
    import csv

    writer = csv.writer(target, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(value) for value in row] for row in rows)


def _write_json(target: IO[str], columns: list[str], rows: Iterator[tuple[Any, ...]]) -> None:
    listed = [{c: None if v != v else v for c, v in zip(columns, row, strict=True)} for row in rows]
    target.write(jsonlib.dumps({"columns": columns, "rows": listed}, default=_json_value) + "\n")


def _cell(value: Any) -> Any:
    """A value in CSV: null is empty, times and arrays are read back by any tool."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, (dict, list)):
        return jsonlib.dumps(value, default=_json_value)
    return value


def _json_value(value: Any) -> Any:
    from decimal import Decimal

    if isinstance(value, Decimal):
        return float(value)
    return value.hex() if isinstance(value, bytes) else str(value)


def register(app: typer.Typer) -> None:
    """Add the commands of servers."""
    for command in (up, down, status, sql, worker):
        app.command()(command)
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(psql)
    app.add_typer(db, name="db")
