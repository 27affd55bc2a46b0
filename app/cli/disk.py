"""`lachesis du` and `lachesis prune`: what takes space, and taking away what nothing needs."""

from __future__ import annotations

import json as jsonlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.options import AsJson

if TYPE_CHECKING:
    from app.settings import Settings
    from app.store.pruning import Item

MOST = 12
"""Rows of a part that a person is shown."""


def du(
    partitions: Annotated[bool, typer.Option("--partitions", help="A row a partition, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """What takes space: tables, artifacts by kind, cached volumes by recipe, and what else lies in the home.

    Examples:
      lachesis du
      lachesis du --json
    """
    from app.cli.look import connect
    from app.settings import read_settings

    settings = read_settings()
    with connect().connect() as connection:
        found = _measure(connection, settings)
    total = sum(part["bytes"] for part in found.values() if part)
    from app.store.disk import free

    if as_json:
        typer.echo(jsonlib.dumps({**found, "bytes": total, "free": free(settings)}, default=str))
        return
    _show(found, total, free(settings), partitions=partitions)


def _measure(connection: Any, settings: Settings) -> dict[str, Any]:
    from app.embedded import home
    from app.errors import StoreError
    from app.store import disk

    found: dict[str, Any] = {"database": disk.database(connection), "servers": None, "artifacts": None}
    embedded = None if settings.database_url else home.existing(settings)
    if embedded is not None:
        found["servers"] = disk.servers(embedded.servers, found["database"]["bytes"])
    try:
        found["artifacts"] = disk.files(connection, settings)
    except StoreError as error:
        print(f"lachesis: artifacts are not counted: {error}", file=sys.stderr)
    return found | {"volumes": disk.volumes(settings), "others": disk.rest(settings)}


def _show(found: dict[str, Any], total: int, free: dict[str, int], *, partitions: bool) -> None:
    from app.cli.look import print_table
    from app.cli.sizes import counted, in_words

    rows: list[dict[str, str]] = []
    for part, lines in (
        ("database", _tables(found["database"])),
        ("servers", found["servers"] and [(one["name"], one["bytes"], "") for one in found["servers"]["folders"]]),
        ("artifacts", found["artifacts"] and _kinds(found["artifacts"])),
        ("volumes", _recipes(found["volumes"])),
        ("others", [(one["name"], one["bytes"], "") for one in found["others"]["folders"]]),
    ):
        if not found[part]:
            continue
        rows.append({"what": part, "size": in_words(found[part]["bytes"]), "of which": ""})
        shown = [line for line in lines if line[1]]
        rows += [{"what": f"  {name}", "size": in_words(size), "of which": note} for name, size, note in shown[:MOST]]
        if more := shown[MOST:]:
            size = in_words(sum(line[1] for line in more))
            rows.append({"what": f"  {len(more)} more", "size": size, "of which": "--json has them"})
    print_table(rows)
    if partitions:
        print_table(
            [
                {
                    "partition": one["name"],
                    "size": in_words(one["bytes"]),
                    "rows": "" if one["rows"] is None else f"{one['rows']:,}",
                    "what": one["what"],
                }
                for one in found["database"]["partitions"]
            ]
        )
    if missing := (found["artifacts"] or {}).get("missing_files"):
        print(
            f"lachesis: {counted(missing, 'file')} that rows name {'is' if missing == 1 else 'are'} not at "
            f"{found['artifacts']['place']}; is LACHESIS_ARTIFACTS the place they were written to?",
            file=sys.stderr,
        )
    disks = ", ".join(f"{in_words(size)} free at {path}" for path, size in free.items())
    typer.echo(f"{in_words(total)} in all; {disks}" if disks else f"{in_words(total)} in all")


def _tables(part: dict[str, Any]) -> list[tuple[str, int, str]]:
    from app.cli.sizes import counted, in_words

    lines = []
    for one in part["tables"]:
        note = f"indexes {in_words(one['index_bytes'])}" + (
            f", about {counted(one['rows'], 'row')}" if one["rows"] else ""
        )
        lines.append(
            (
                one["name"],
                one["bytes"],
                note + (f", {counted(one['partitions'], 'partition')}" if one["partitions"] else ""),
            )
        )
    return lines


def _kinds(part: dict[str, Any]) -> list[tuple[str, int, str]]:
    from app.cli.sizes import counted, in_words

    lines = []
    for one in part["kinds"]:
        unnamed = f", {in_words(one['unnamed_bytes'])} named by no row" if one["unnamed_bytes"] else ""
        lines.append((one["name"], one["bytes"], f"{counted(one['files'], 'file')}{unnamed}"))
    return lines


def _recipes(part: dict[str, Any]) -> list[tuple[str, int, str]]:
    from app.cli.sizes import counted

    lines = [
        (one["recipe"], one["bytes"], f"{counted(one['volumes'], 'volume')}, {one['in_use']:,} in use")
        for one in part["recipes"]
    ]
    return [*lines, ("copies of a bucket's files", part["copies_bytes"], "")]


def prune(
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without this it is only said.")] = False,
    stops: Annotated[
        int, typer.Option(help="Stops on the way that each ended training keeps beside its best.", min=0)
    ] = 3,
    days: Annotated[float, typer.Option(help="Younger files stay, and those of jobs that ended since.", min=0)] = 7,
    volumes_days: Annotated[
        float | None, typer.Option(help="Cached volumes unused for so many days go, too.", min=0)
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Although most files among the artifacts are named by no row.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Take away what nothing needs: old stops, files without a row, half-written ones, what attempts left.

    Without --yes it says what would go. Jobs may run meanwhile. Without any stop (--stops 0) a training cannot be
    carried on by `pretrain --continue`.

    Examples:
      lachesis prune
      lachesis prune --yes --stops 1 --volumes-days 30
    """
    from app.cli.look import connect
    from app.settings import read_settings
    from app.store import pruning

    settings, engine = read_settings(), connect()
    options = pruning.Options(stops=stops, days=days, volumes_days=volumes_days, force=force)
    with engine.connect() as connection:
        items = pruning.look(connection, settings, options)
        doubtful = not force and pruning.mostly_unnamed(connection, settings, items)
    if yes:
        items = pruning.take(engine, settings, options, items)
    if as_json:
        typer.echo(jsonlib.dumps(_object(items, removed=yes)))
    else:
        _say(items, removed=yes)
    if doubtful:
        print(
            "lachesis: More files among the artifacts are named by no row than by one; --yes refuses them without "
            "--force. Is LACHESIS_ARTIFACTS another store's?",
            file=sys.stderr,
        )


def _object(items: list[Item], *, removed: bool) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "removed": removed,
        "bytes": sum(item.size for item in items),
        "items": [
            {key: value for key, value in asdict(item).items() if key in ("kind", "name", "size")} for item in items
        ],
    }


def _say(items: list[Item], *, removed: bool) -> None:
    from app.cli.look import print_table
    from app.cli.sizes import in_words
    from app.store.pruning import KINDS

    rows = []
    for kind, words in KINDS.items():
        own = [item for item in items if item.kind == kind]
        if own:
            some = ", ".join(item.name for item in own[:3]) + (f" and {len(own) - 3} more" if len(own) > 3 else "")
            count = own[0].key if kind == "volumes" else len(own)
            size = in_words(sum(item.size for item in own))
            rows.append({"what": words, "number": f"{count:,}", "size": size, "which": some})
    if rows:
        print_table(rows)
    size = in_words(sum(item.size for item in items))
    if removed:
        typer.echo(f"removed {size}")
    else:
        typer.echo(f"would remove {size}; --yes removes it" if items else "nothing to remove")


def register(app: typer.Typer) -> None:
    """Add `du` and `prune`."""
    for command in (du, prune):
        app.command()(command)
