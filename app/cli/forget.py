"""`lachesis forget FILE`: persons who withdraw."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.cli.options import AsJson, Detach, Inline, existing, one_of, queue


def forget(
    file: Annotated[Path, typer.Argument(help="One person a line.")],
    by: Annotated[str, typer.Option(help="What a line holds: person_id or person_source_value.")] = "person_id",
    detach: Detach = False,
    inline: Inline = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count what would go; change nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Take persons out of the store and its files for good; later loads leave them out. Prints a receipt.

    Examples:
      lachesis forget withdrawn.txt --by person_source_value --dry-run
      lachesis forget withdrawn.txt --by person_source_value --json > receipt.json
    """
    args = {
        "path": existing(file, "a file of persons"),
        "by": one_of("--by", by, ("person_id", "person_source_value")),
        "dry_run": dry_run,
    }
    queue("forget", args, None, detach=detach, inline=inline, dry_run=False, as_json=as_json)


def register(app: typer.Typer) -> None:
    """Add `forget`."""
    app.command("forget")(forget)
