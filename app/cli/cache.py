"""`lachesis cache`: volumes made ahead, what lies in the cache, and removing it."""

from __future__ import annotations

import json as jsonlib
from typing import Annotated

import typer

from app.cli.options import AsJson, Detach, DryRun, Inline, queue

cache = typer.Typer(
    name="cache",
    help="Volumes as encoders see them, kept so that no scan is decoded twice; docs/volumes.md.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@cache.command()
def build(
    cohort: Annotated[str, typer.Argument(help="Cohort whose scans to decode.")],
    encoder: Annotated[str, typer.Option(help="Encoder whose recipe says what a volume is.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of the recipe, e.g. spacing_mm=3,1.5,1.5.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="A preset of the encoder's recipe: paper or paper_lung.")] = None,
    detach: Detach = False,
    inline: Inline = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Decode the scans of a cohort ahead of training; what is there already is left as it is.

    Examples:
      lachesis cache build chest --encoder densenet121 --detach
      lachesis cache build chest --encoder densenet121 --set shape_zyx=128,128,128 --set centre=lung
    """
    from app.cli.stages import settings_of_recipe

    args = {"cohort": cohort, "encoder": encoder, "set": settings_of_recipe(set_ or [], recipe)}
    queue("cache", args, cohort, detach=detach, inline=inline, dry_run=dry_run, as_json=as_json)


@cache.command()
def ls(as_json: AsJson = False) -> None:
    """List what lies in the cache: a row a recipe, its size, and how many volumes running jobs use.

    Examples:
      lachesis cache ls
      lachesis cache ls --json
    """
    import datetime as dt

    from app.cli.look import print_table
    from app.settings import read_settings
    from app.store.cache_room import CacheRoom, folder, gb

    settings = read_settings()
    rows = CacheRoom(folder(settings), settings.cache_bytes).listing()
    if as_json:
        typer.echo(jsonlib.dumps({"recipes": rows, "bytes": sum(row["bytes"] for row in rows)}))
        return
    print_table(
        [
            {
                "recipe": row["recipe"],
                "volumes": row["volumes"],
                "size": gb(row["bytes"]),
                "in use": row["in_use"],
                "last used": dt.datetime.fromtimestamp(row["last_used"]).strftime("%Y-%m-%d %H:%M")
                if row["last_used"]
                else None,
                "settings": ", ".join(f"{key}={value}" for key, value in row["settings"].items()),
            }
            for row in rows
        ]
    )
    most = "" if settings.cache_bytes is None else f" of at most {gb(settings.cache_bytes)}"
    typer.echo(f"{gb(sum(row['bytes'] for row in rows))}{most}")


@cache.command()
def rm(
    recipe: Annotated[list[str] | None, typer.Argument(help="Recipes of `cache ls`; default all.")] = None,
    unused_days: Annotated[float, typer.Option(help="Only volumes unused for so many days.", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Remove cached volumes that no running job uses; they are made again when they are needed.

    Examples:
      lachesis cache rm --unused-days 30
      lachesis cache rm 3f2a91c0d4e5b6a7
    """
    from app.settings import read_settings
    from app.store.cache_room import CacheRoom, folder, gb

    settings = read_settings()
    count, size = CacheRoom(folder(settings), settings.cache_bytes).remove(recipe or (), unused_days)
    if as_json:
        typer.echo(jsonlib.dumps({"removed": count, "bytes": size}))
    else:
        typer.echo(f"removed {count:,} volumes, {gb(size)}")


def register(app: typer.Typer) -> None:
    """Add `cache` and its commands."""
    app.add_typer(cache, name="cache")
