"""Encoders: those of this host, and those that workers said they have."""

from __future__ import annotations

import json as jsonlib
import os
import subprocess
import sys
from typing import Any

import typer

from app.errors import InputError


def print_encoders(*, as_json: bool) -> None:
    """One row an encoder: its width, number of weights, where it comes from, and how many living workers have it."""
    from app.cli.look import connect, print_table
    from app.store import attempts

    with connect().connect() as connection:
        rows = merged(of_this_host(), attempts.encoders_seen(connection))
    if as_json:
        typer.echo(jsonlib.dumps({"rows": rows}))
    else:
        print_table([row | {"weights": None if row["weights"] is None else f"{row['weights']:,}"} for row in rows])


def of_this_host() -> list[dict[str, Any]]:
    """What the code for workers finds here, asked in a process of its own: this one knows no encoder.

    Raises:
        InputError: an encoder of this host cannot be found.
    """
    from app.embedded import environment
    from app.settings import read_settings

    kept = {key: value for key, value in os.environ.items() if not key.startswith("LACHESIS_")}
    command = [sys.executable, "-P", "-m", "workers", "encoders"]
    asked = subprocess.run(command, env={**kept, **environment(read_settings())}, capture_output=True, text=True)
    if asked.returncode:
        raise InputError((asked.stderr.strip().splitlines() or ["no answer"])[-1].removeprefix("lachesis: "))
    rows: list[dict[str, Any]] = jsonlib.loads(asked.stdout)
    return rows


def merged(here: list[dict[str, Any]], seen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Encoders of this host first, then those that only workers elsewhere have."""
    by_name = {row["name"]: row for row in seen}
    known = {row["name"] for row in here}
    rows = [{**row, "workers": by_name.get(row["name"], {}).get("workers", 0)} for row in here]
    elsewhere = {"weights": None, "source": "another host", "text": ""}
    rows += [
        {"name": r["name"], "width": r["width"], **elsewhere, "workers": r["workers"]}
        for r in seen
        if r["name"] not in known
    ]
    for row in rows:
        row["width"] = row["width"] or by_name.get(row["name"], {}).get("width")
    return rows
