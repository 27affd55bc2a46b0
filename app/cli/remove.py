"""`lachesis rm KIND NAME`: versions that nothing rests on."""

from __future__ import annotations

import json as jsonlib
from typing import Annotated

import typer

from app.cli.options import AsJson


def rm(
    kind: Annotated[str, typer.Argument(help="label, cohort or task.")],
    name: Annotated[str, typer.Argument(help="NAME@VERSION; the name alone where it has one version.")],
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Although metrics or checkpoints rest on it: the former go, the latter forget it."
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; change nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove a version of labels, a cohort or a task set; what rests on it is named and holds it.

    Examples:
      lachesis rm label outcomes@1
      lachesis rm cohort chest@2 --dry-run --json
    """
    from app.cli.look import connect
    from app.errors import UnknownName
    from app.store import removing

    word = kind if kind in removing.KINDS else kind.removesuffix("s")
    if word not in removing.KINDS:
        raise UnknownName("kind to remove", kind, removing.KINDS)
    with connect().begin() as connection:
        found = removing.remove(connection, removing.KINDS[word], name, force=force, dry_run=dry_run)
    if as_json:
        typer.echo(jsonlib.dumps(found))
        return
    said = f"{'would remove' if dry_run else 'removed'} {found['removed']}"
    if found["rested_on_it"]:
        said += f", on which rested {', '.join(found['rested_on_it'])}"
    means = f"; the name means {found['name_means']}" if found["name_means"] else "; no version is left"
    typer.echo(said + means)


def register(app: typer.Typer) -> None:
    """Add `rm`."""
    app.command("rm")(rm)
