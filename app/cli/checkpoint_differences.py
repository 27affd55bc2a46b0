"""What `lachesis diff checkpoints` says in words and tables."""

from __future__ import annotations

from typing import Any

import typer

MOST_FIGURES = 24
"""Rows of figures where it is read by a person; --json has all."""
MOST_LETTERS = 60


def show(found: dict[str, Any]) -> None:
    """A line each checkpoint, then what differs."""
    from app.cli.look import print_table

    for side in "ab":
        one = found[side]
        typer.echo(
            f"{side}: {one['name']}, checkpoint {one['checkpoint_id']}, {one['arm']} of {one['encoder']}, epoch "
            f"{one['epoch']}{'' if one['final'] else ' (a stop on the way)'}, {one['sha256'][:12]}, "
            f"{one['created_at']:%Y-%m-%d %H:%M}"
        )
    if found["same_weights"]:
        typer.echo("The files are equal, byte for byte.")
    for line in sentences(found):
        typer.echo(line)
    for title, rows in (("differs", found["facts"]), ("settings that differ", found["settings"])):
        if rows:
            print_table([{key: _short(value) for key, value in row.items()} for row in rows], title)
    if found["validation"]:
        both_tte = all(found[side]["arm"] == "tte" for side in "ab")
        print_table(found["validation"], "validation" + (", losses in nats per event" if both_tte else ""))
    paired = {_key(row): row for row in found["paired"]}
    rows = [
        _figure(row, paired.get(_key(row)))
        for row in found["figures"]
        if row["value_a"] is not None or row["value_b"] is not None
    ]
    if rows:
        print_table(rows[:MOST_FIGURES], f"figures of both: {min(len(rows), MOST_FIGURES)} of {len(rows):,}")


def sentences(found: dict[str, Any]) -> list[str]:
    """What tables do not say: labels, tasks, and who was judged by what."""
    lines = []
    if not found["settings"]:
        lines.append("Settings: the same.")
    labels = next((row for row in found["facts"] if row["what"] == "label_set"), None)
    if labels and labels["a"] and labels["b"] and labels["a"].partition("@")[0] == labels["b"].partition("@")[0]:
        lines.append(f"Labels: two versions; `lachesis diff labels {labels['a']} {labels['b']}` says what changed.")
    only = found["tasks"]
    for side in "ab":
        if names := only[f"only_{side}"]:
            more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
            lines.append(f"Tasks of {side} alone: {', '.join(names[:5])}{more}.")
    for side in "ab":
        if sets := found["judged_by_one"][side]:
            lines.append(f"Judged by {', '.join(sets)}: {side} alone.")
    if not found["figures"]:
        lines.append("Figures: none of both; `lachesis evaluate` makes them.")
    elif not found["paired"]:
        a, b = found["a"]["checkpoint_id"], found["b"]["checkpoint_id"]
        lines.append(
            f"Figures: side by side alone; `lachesis evaluate {b} --against {a}` gives intervals of the difference."
        )
    return lines


KEY = ("label_set", "task", "metric", "horizon_days", "split", "head", "inputs")


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in KEY)


def _figure(row: dict[str, Any], paired: dict[str, Any] | None) -> dict[str, Any]:
    """One row; the interval of the difference where it was resampled in pairs by person."""

    def said(side: str) -> str:
        value = row[f"value_{side}"]
        if value is None:
            return str(row[f"reason_{side}"] or "")
        return f"{value:.4f}" + _interval(row[f"ci_low_{side}"], row[f"ci_high_{side}"])

    kept = ("label_set", "task", "metric", "horizon_days", "head", "inputs")
    difference = "" if row["difference"] is None else f"{row['difference']:+.4f}"
    if paired is not None and paired["difference"] is not None:
        difference = f"{paired['difference']:+.4f}" + _interval(paired["ci_low"], paired["ci_high"])
    return {key: row[key] for key in kept} | {"a": said("a"), "b": said("b"), "b - a": difference}


def _interval(low: float | None, high: float | None) -> str:
    return f" ({low:.4f} to {high:.4f})" if low is not None and high is not None else ""


def _short(value: Any) -> Any:
    from app.cli.look import plain

    text = plain(value)
    return text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS - 1]}…"
