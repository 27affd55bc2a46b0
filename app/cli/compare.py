"""`lachesis compare CHECKPOINT…`: one figure of several checkpoints side by side."""

from __future__ import annotations

import json as jsonlib
from typing import Annotated, Any

import typer

from app.cli.options import AsJson


def compare(
    checkpoints: Annotated[list[str], typer.Argument(help="Checkpoints; differences are from the first.")],
    labels: Annotated[
        str | None, typer.Option(help="Label set they were judged by; default: what judged most.")
    ] = None,
    metric: Annotated[str, typer.Option(help="harrell_c, uno_c, auroc, ibs, …")] = "harrell_c",
    head: Annotated[str, typer.Option(help="cox or logistic.")] = "cox",
    inputs: Annotated[str, typer.Option(help="image or age+sex+image.")] = "image",
    as_csv: Annotated[bool, typer.Option("--csv", help="A row a checkpoint and task, on stdout.")] = False,
    as_json: AsJson = False,
) -> None:
    """One figure of several checkpoints side by side, on held-out scans: a row a task, the mean over tasks first.

    Examples:
      lachesis compare tiny-base tiny-mtl tiny-tte
      lachesis compare tiny-base tiny-tte --labels outcomes --metric auroc --csv > auroc.csv
    """
    from app.cli.look import connect, print_csv
    from app.store.comparison import Figure
    from app.store.comparison import compare as ask

    with connect().connect() as connection:
        found = ask(connection, checkpoints, labels, Figure(metric=metric, head=head, inputs=inputs))
    if as_json:
        typer.echo(jsonlib.dumps(found, default=str))
    elif as_csv:
        print_csv(_flat(found))
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    from app.cli.look import print_table

    columns = [one["name"] for one in found["checkpoints"]]
    lines = []
    for row in found["rows"]:
        line = {"task": row["task"] or "mean over tasks", "horizon_days": row["horizon_days"], "n": row["n"]}
        line["events"] = row["num_events"]
        for name, one in zip(columns, row["figures"], strict=True):
            line[name] = _said(one)
            if name != columns[0] and any(row["figures"][columns.index(name)]["difference"] for row in found["rows"]):
                line[f"{name} less {columns[0]}"] = _said(one["difference"], sign="+")
        lines.append(line)
    if all(line["horizon_days"] is None for line in lines):
        lines = [{key: value for key, value in line.items() if key != "horizon_days"} for line in lines]
    print_table(lines, f"{found['metric']} by {found['labels']}, held out; {found['head']} on {found['inputs']}")
    if found["flags"]:
        typer.echo(f"beware: {', '.join(found['flags'])}")


def _said(one: dict[str, Any] | None, sign: str = "") -> str:
    if one is None:
        return ""
    if one["value"] is None:
        return str(one["reason"] or "")
    interval = (
        "" if one["ci_low"] is None or one["ci_high"] is None else f" ({one['ci_low']:.3f} to {one['ci_high']:.3f})"
    )
    return f"{one['value']:{sign}.3f}{interval}"


def _flat(found: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for row in found["rows"]:
        for checkpoint, one in zip(found["checkpoints"], row["figures"], strict=True):
            less = one["difference"] or {}
            numbers = {key: one[key] for key in ("value", "ci_low", "ci_high", "reason")}
            difference = {f"difference_{key}": less.get(key) for key in ("value", "ci_low", "ci_high")}
            kept = {key: row[key] for key in ("task", "horizon_days", "n", "num_events")}
            rows.append({"checkpoint": checkpoint["name"], "arm": checkpoint["arm"], **kept, **numbers, **difference})
    return rows


def register(app: typer.Typer) -> None:
    """Add `compare`."""
    app.command("compare")(compare)
