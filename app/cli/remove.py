"""`lachesis rm KIND NAME`: versions and checkpoints that nothing rests on."""

from __future__ import annotations

import json as jsonlib
import sys
from typing import Annotated, Any

import typer

from app.cli.options import AsJson


def rm(
    kind: Annotated[str, typer.Argument(help="label, cohort, task or checkpoint.")],
    name: Annotated[
        str,
        typer.Argument(
            help="NAME@VERSION, or the name alone where it has one version; checkpoints: docs/pretraining.md."
        ),
    ],
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Although metrics, embeddings or checkpoints rest on it: the former go, checkpoints of labels stay.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; change nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove a version of labels, a cohort or a task set, or a checkpoint; what rests on it is named and holds it.

    A checkpoint goes with its stops on the way, NAME@EPOCH is one stop alone.

    Examples:
      lachesis rm label outcomes@1
      lachesis rm cohort chest@2 --dry-run --json
      lachesis rm checkpoint tiny-tte@3
    """
    from app.cli.look import connect
    from app.errors import UnknownName
    from app.store import removing

    word = kind.removesuffix("s")
    if word not in (*removing.KINDS, "checkpoint"):
        raise UnknownName("kind to remove", kind, (*removing.KINDS, "checkpoint"))
    if word == "checkpoint":
        _checkpoint(name, force=force, dry_run=dry_run, as_json=as_json)
        return
    with connect().begin() as connection:
        found = removing.remove(connection, removing.KINDS[word], name, force=force, dry_run=dry_run)
    if as_json:
        typer.echo(jsonlib.dumps(found))
        return
    said = _said(found)
    means = f"; the name means {found['name_means']}" if found["name_means"] else "; no version is left"
    typer.echo(said + means)


def _checkpoint(name: str, *, force: bool, dry_run: bool, as_json: bool) -> None:
    from app.cli.look import connect
    from app.cli.sizes import counted, in_words
    from app.errors import StoreError
    from app.settings import read_settings
    from app.store import named_files
    from app.store.removing_checkpoints import remove

    engine = connect()
    with engine.begin() as connection:
        found, files = remove(connection, name, force=force, dry_run=dry_run)
    if not dry_run:
        try:
            with engine.connect() as connection:
                named_files.remove(connection, read_settings(), files)
        except (StoreError, OSError) as error:
            print(f"lachesis: {error} The rows are gone; `lachesis prune` takes the files.", file=sys.stderr)
    if as_json:
        typer.echo(jsonlib.dumps(found))
        return
    also = f" and {counted(found['stops'], 'stop')} on the way" if found["stops"] else ""
    means = f"; the name means {found['name_means']}" if found["is_final"] and found["name_means"] else ""
    typer.echo(f"{_said(found, also)}, {in_words(found['bytes'])}{means}")


def _said(found: dict[str, Any], also: str = "") -> str:
    said = f"{'would remove' if found['dry_run'] else 'removed'} {found['removed']}{also}"
    return said + (f", on which rested {', '.join(found['rested_on_it'])}" if found["rested_on_it"] else "")


def register(app: typer.Typer) -> None:
    """Add `rm`."""
    app.command("rm")(rm)
