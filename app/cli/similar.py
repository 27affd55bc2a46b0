"""`lachesis similar IMAGE`: the scans nearest to one, and what became of them."""

from __future__ import annotations

import contextlib
import json as jsonlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.options import AsJson
from app.errors import InputError

NO_DEVICE = "Neighbours are not a prognosis of this person, and Lachesis is not a medical device."


def similar(
    image: Annotated[int, typer.Argument(help="image_occurrence_id of a scan.")],
    checkpoint: Annotated[
        str, typer.Option(help="Checkpoint whose embeddings to compare: NAME, NAME@best, @champion.")
    ],
    k: Annotated[int, typer.Option("-k", "--k", help="Neighbours.", min=1, max=1000)] = 10,
    cohort: Annotated[str | None, typer.Option(help="Only among scans of this cohort.")] = None,
    split: Annotated[str | None, typer.Option(help="Only among its train, tuning or held_out scans.")] = None,
    sex: Annotated[str | None, typer.Option(help="Only among scans of male or female persons.")] = None,
    min_age: Annotated[float | None, typer.Option(help="Youngest at the scan, years.")] = None,
    max_age: Annotated[float | None, typer.Option(help="Oldest at the scan, years.")] = None,
    same_person: Annotated[bool, typer.Option("--same-person", help="Other scans of the person, too.")] = False,
    verdict: Annotated[str | None, typer.Option(help="Only among scans of this verdict (ok, suspect).")] = None,
    labels: Annotated[str | None, typer.Option(help="Label set that holds --task.")] = None,
    task: Annotated[str | None, typer.Option(help="Say what became of the neighbours: of 11 persons or more.")] = None,
    horizon_days: Annotated[int, typer.Option(help="By when, days after the scan.", min=1)] = 365,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="PNG to draw: their middle slices.")] = None,
    as_json: AsJson = False,
) -> None:
    """The scans nearest to one, by cosine distance of their embeddings; what became of them; their middle slices.

    Examples:
      lachesis similar 17 --checkpoint tiny-tte -o similar.png
      lachesis similar 17 --checkpoint @champion -k 50 --split train --labels outcomes --task mortality --json
    """
    from app.cli.look import connect, print_record, print_table
    from app.store import similar as store

    if (task is None) != (labels is None):
        raise InputError("Expected --labels and --task together, got one of them; give both.")
    among = store.Among(
        cohort=cohort,
        split=split,
        sex=sex,
        min_age=min_age,
        max_age=max_age,
        same_person=same_person,
        verdict=verdict,
    )
    if out is not None and (out.suffix != ".png" or not out.absolute().parent.is_dir()):
        raise InputError(f"Expected a file in an existing folder that ends in .png for -o, got {out}.")
    with connect().connect() as connection:
        rows = store.nearest(connection, image, checkpoint, k, among)
        summary = store.outcomes(connection, rows, labels, task, horizon_days) if labels and task else None
    if as_json:
        typer.echo(jsonlib.dumps({"rows": rows, "outcomes": summary}, default=str))
    else:
        print_table(rows)
        if summary is not None:
            print_record(summary)
            typer.echo(NO_DEVICE)
    if out is not None:
        draw(image, checkpoint, rows, out)


def title(row: dict[str, Any]) -> str:
    """Scan and distance; its status and when, where that is told of enough persons."""
    named = f"scan {row['image_occurrence_id']}: {row['distance']:.3f}"
    if row.get("status") is None:
        return named
    return f"{named}\n{row['status']}" + ("" if row["time_days"] is None else f", day {row['time_days']:.0f}")


def draw(image: int, checkpoint: str, rows: list[dict[str, Any]], out: Path) -> None:
    """Have a worker draw the slices, since it reads scans."""
    from app.cli.options import queue

    shown = [{"image": image, "title": f"scan {image}"}]
    shown += [{"image": row["image_occurrence_id"], "title": title(row)} for row in rows[:11]]
    args = {"checkpoint": checkpoint, "shown": shown, "out": str(out.absolute())}
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the rows
        queue("slices", args, checkpoint, detach=False, inline=False, dry_run=False, as_json=False)


def register(app: typer.Typer) -> None:
    """Add `similar`."""
    app.command("similar")(similar)
