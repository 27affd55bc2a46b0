"""`lachesis promote CHECKPOINT`: have a standing name such as champion mean it."""

from __future__ import annotations

import json as jsonlib
from typing import Annotated

import typer

from app.cli.options import AsJson
from app.errors import InputError


def promote(
    checkpoint: Annotated[
        str | None, typer.Argument(help="NAME, NAME@best, an id or the beginning of a digest.")
    ] = None,
    alias: Annotated[str, typer.Option(help="The standing name.")] = "champion",
    reason: Annotated[str | None, typer.Option(help="Why, kept in the history.")] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Mean again what it meant before.")] = False,
    history: Annotated[bool, typer.Option("--history", help="Show what it meant and when.")] = False,
    as_json: AsJson = False,
) -> None:
    """Have an alias mean a checkpoint that was evaluated by the same labels as the one before; @champion finds it.

    Examples:
      lachesis promote tiny-tte --reason "better on heart failure"
      lachesis promote --undo
      lachesis promote --history --json
    """
    from app.cli.look import connect, print_table
    from app.store import promotion
    from app.store.artifacts import find_checkpoint

    if (checkpoint is None) == (not undo and not history):
        raise InputError("Expected a checkpoint, or --undo or --history without one; see `lachesis promote --help`.")
    with connect().begin() as connection:
        if history:
            rows = promotion.history(connection, alias)
            if as_json:
                typer.echo(jsonlib.dumps({"rows": rows}, default=str))
            else:
                print_table(rows)
            return
        if undo:
            name, changed = promotion.undo(connection, alias), True
        else:
            found = find_checkpoint(connection, str(checkpoint))
            name, changed = found.name, promotion.promote(connection, alias, found, reason)
    if as_json:
        typer.echo(jsonlib.dumps({"alias": alias, "checkpoint": name, "changed": changed}))
    else:
        typer.echo(f"@{alias} {'now means' if changed else 'already meant'} {name}")


def register(app: typer.Typer) -> None:
    """Add `promote`."""
    app.command("promote")(promote)
