"""`lachesis export …`: what is in the store, for other tools."""

from __future__ import annotations

import json as jsonlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from app.cli.options import AsJson, one_of

export = typer.Typer(no_args_is_help=True, help="Write timelines and labels for other tools.", rich_markup_mode=None)


@export.command("meds")
def export_meds(
    folder: Annotated[Path, typer.Argument(help="Folder to make; it must be new or empty.")],
    cohort: Annotated[str | None, typer.Option(help="Only the persons of this cohort, with its splits.")] = None,
    labels: Annotated[list[str] | None, typer.Option(help="Label set to write too; may be given again.")] = None,
    codes: Annotated[
        str, typer.Option(help="standard: codes of standard concepts, the source's beside them; source: as loaded.")
    ] = "standard",
    shard_rows: Annotated[int, typer.Option(help="Rows of a shard, about.", min=1)] = 2_000_000,
    as_json: AsJson = False,
) -> None:
    """Write a MEDS 0.4 data set: shards by split, codes with their parents, splits, and labels a file a task.

    Examples:
      lachesis export meds out/meds --cohort chest --labels outcomes
      lachesis export meds /data/meds_2026_11 --codes source
    """
    from app.cli.follow import bar
    from app.cli.look import connect
    from app.export.meds import ExportOptions, total_rows
    from app.export.meds import export as write

    options = ExportOptions(
        folder=folder.absolute(),
        cohort=cohort,
        labels=labels or [],
        codes=one_of("--codes", codes, ("standard", "source")),
        shard_rows=shard_rows,
    )
    engine = connect().execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    with engine.connect() as connection, bar("export meds", total_rows(connection, options), "rows") as advance:
        written = write(connection, options, advance)
    if as_json:
        typer.echo(jsonlib.dumps({"folder": str(options.folder), **asdict(written)}))
        return
    said = f"{written.persons:,} persons, {written.rows:,} rows in {written.shards} shards, {written.codes:,} codes"
    if written.label_files:
        said += f", {written.labels:,} labels in {written.label_files} files"
    print(f"export meds: {said} in {folder}", file=sys.stderr)


@export.command("curves")
def export_curves(
    checkpoints: Annotated[list[str], typer.Argument(help="Checkpoints whose trainings are meant.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder; each training gets one of its own in it.")],
    as_json: AsJson = False,
) -> None:
    """Write loss curves as TensorBoard event files, and as CSV beside them.

    Examples:
      lachesis export curves tiny-tte tiny-mtl -o curves && tensorboard --logdir curves
      lachesis export curves @champion -o /tmp/curves --json
    """
    from app.cli.look import connect
    from app.export.curves import export as write

    with connect().connect() as connection:
        written = write(connection, checkpoints, out)
    if as_json:
        typer.echo(jsonlib.dumps({"written": [asdict(one) for one in written]}))
        return
    for one in written:
        print(f"export curves: {one.points:,} points of {one.checkpoint} in {one.folder}", file=sys.stderr)


def register(app: typer.Typer) -> None:
    """Add `export` and its commands."""
    app.add_typer(export, name="export")
