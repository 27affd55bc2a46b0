"""`lachesis diff …`: what differs between two of a kind."""

from __future__ import annotations

import json as jsonlib
import sys
from typing import Annotated

import typer

from app.cli.options import AsJson

diff = typer.Typer(no_args_is_help=True, help="Compare two of a kind.", rich_markup_mode=None)


@diff.callback()
def _group() -> None:
    """Compare two of a kind."""


@diff.command("loads")
def diff_loads(
    first: Annotated[
        str | None, typer.Argument(metavar="[A]", help="A delivery: its job, or one of its loads.")
    ] = None,
    second: Annotated[str | None, typer.Argument(metavar="[B]", help="The other; the newest by default.")] = None,
    source: Annotated[str | None, typer.Option(help="Whose last two deliveries, where none is named.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Rows as CSV on stdout.")] = False,
    as_json: AsJson = False,
) -> None:
    """Rows before and after, added, changed and removed, by table and primary key; by default of the last two.

    Examples:
      lachesis diff loads --source hospital
      lachesis diff loads 12 31 --json
    """
    from app.cli.look import connect, print_csv, print_table
    from app.store.differences import chosen, difference

    with connect().connect() as connection:
        found = difference(connection, chosen(connection, first, second, source))
    if as_json:
        typer.echo(jsonlib.dumps(found, default=str))
        return
    if as_csv:
        print_csv(found["tables"])
    else:
        title = f"{found['source']}: {found['from']} → {found['to']}"
        print_table([{k: v for k, v in row.items() if k != "exact"} for row in found["tables"]], title)
    if not found["exact"]:
        print(
            f"lachesis: there are {found['steps']} deliveries between them; added, changed and removed are sums over "
            "these steps, in which a row that changes twice counts twice. Before and after are exact.",
            file=sys.stderr,
        )


@diff.command("labels")
def diff_labels(
    first: Annotated[
        str | None, typer.Argument(metavar="[A]", help="Label set, NAME or NAME@1; alone: its previous version.")
    ] = None,
    second: Annotated[str | None, typer.Argument(metavar="[B]", help="The other; the current version.")] = None,
    task: Annotated[
        str | None, typer.Option(help="One task alone; --csv then has members whose follow-up alone differs, too.")
    ] = None,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="A row a member and task whose status or time of event differs.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What changed between two versions of labels, why (data, vocabulary, definition), and what came of it.

    Examples:
      lachesis diff labels outcomes
      lachesis diff labels outcomes@1 outcomes@3 --json
      lachesis diff labels outcomes@1 outcomes --task pulmonary_hypertension --csv > changed.csv
    """
    import csv

    from app.cli import label_differences as said
    from app.cli.look import connect, plain
    from app.store import label_cells, label_differences

    with connect().connect() as connection:
        pair = label_differences.chosen(connection, first, second)
        why = label_differences.compare(connection, pair)
        tasks = [label_differences.task_named(why, task)] if task else label_cells.common_tasks(why)
        if as_csv:
            writer = csv.writer(sys.stdout, lineterminator="\n")
            writer.writerow(label_cells.COLUMNS)
            label_cells.measure(
                connection,
                pair,
                why,
                tasks,
                lambda row: writer.writerow([plain(value) for value in row.values()]),
                censored_too=task is not None,
            )
            return
        effect = label_cells.measure(connection, pair, why, tasks)
        found = said.found(pair, why, effect, label_differences.counts(connection, pair))
    typer.echo(jsonlib.dumps(found, default=str)) if as_json else said.show(found)


@diff.command("checkpoints")
def diff_checkpoints(
    first: Annotated[str, typer.Argument(metavar="A", help="Checkpoint; alone: what it followed, and it.")],
    second: Annotated[str | None, typer.Argument(metavar="[B]", help="The other.")] = None,
    as_json: AsJson = False,
) -> None:
    """What differs between two checkpoints: recipe, labels, tasks, versions, losses; and their figures side by side.

    Examples:
      lachesis diff checkpoints tiny-base tiny-tte
      lachesis diff checkpoints tiny-tte@best tiny-tte --json
    """
    from app.cli import checkpoint_differences as said
    from app.cli.look import connect
    from app.store import checkpoint_differences

    with connect().connect() as connection:
        found = checkpoint_differences.compare(connection, checkpoint_differences.chosen(connection, first, second))
    typer.echo(jsonlib.dumps(found, default=str)) if as_json else said.show(found)


for singular, command in (("load", diff_loads), ("label", diff_labels), ("checkpoint", diff_checkpoints)):
    diff.command(singular, hidden=True)(command)


def register(app: typer.Typer) -> None:
    """Add `diff` and its commands."""
    app.add_typer(diff, name="diff")
