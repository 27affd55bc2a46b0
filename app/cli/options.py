"""What the commands of the stages share: their options, and the way to a job."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer

from app.errors import InputError, UnknownName

Detach = Annotated[bool, typer.Option("--detach", help="Print the job's id and return at once.")]
Inline = Annotated[bool, typer.Option("--inline", help="Run in the foreground, without a broker or a worker.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be queued, and queue nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def queue(
    kind: str, args: dict[str, Any], name: str | None, *, detach: bool, inline: bool, dry_run: bool, as_json: bool
) -> dict[str, Any]:
    """Queue one job and follow it to its result, or say what would be queued (nothing then)."""
    if dry_run:
        typer.echo(jsonlib.dumps({"kind": kind, "name": name, "args": args}, indent=2, default=str))
        return {}
    from app.cli.follow import submit_and_follow
    from app.settings import read_settings

    return submit_and_follow(read_settings(), kind, args, name, detach=detach, inline=inline, as_json=as_json)


def one_of(option: str, value: str, known: tuple[str, ...]) -> str:
    """`value`, if it is one of `known`; else InputError with the nearest."""
    if value not in known:
        raise UnknownName(f"value of {option}", value, known)
    return value


def existing(path: Path, what: str) -> str:
    """The absolute path of something that must be there."""
    if not path.exists():
        raise InputError(f"Expected {what} at {path}, found nothing there; give the path of one that exists.")
    return str(path.absolute())


def iso_date(option: str, value: str | None) -> str | None:
    """A date as it was given, checked."""
    import datetime as dt

    if value is None:
        return None
    try:
        return dt.date.fromisoformat(value).isoformat()
    except ValueError:
        raise InputError(f"Expected a date YYYY-MM-DD for {option}, got {value!r}.") from None
