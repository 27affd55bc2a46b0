"""What a load brought, as a table: rows read, loaded and rejected, what is remarkable in them, and their span."""

from __future__ import annotations

from typing import Any


def print_delivery(rows: list[dict[str, Any]]) -> None:
    """The loads of one job on stderr, a line a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.width = 160
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("load", "table", "read", "loaded", "rejected", "concept 0", "from", "to", "remarkable"):
        table.add_column(name, justify="right" if name in ("load", "read", "loaded", "concept 0") else "left")
    for row in rows:
        table.add_row(
            str(row["load_id"]),
            row["table"],
            f"{row['read']:,}",
            f"{row['loaded']:,}",
            counted(row["rejects_by_rule"]),
            percent(row["concept_0_percent"]),
            day(row["first_time"]),
            day(row["last_time"]),
            counted({rule: n for rule, n in row["flags_by_rule"].items() if rule != "concept_zero"}),
        )
    console.print(table)


SHARED = ("job_id", "source", "mode", "created_at")
"""What the loads of one delivery have in common."""


def shortened(row: dict[str, Any]) -> dict[str, Any]:
    """A load as a line of its delivery."""
    line = {key: row[key] for key in ("load_id", "table", "kind", "state", "read", "loaded", "shown", "rejected")}
    line |= {"concept 0": percent(row["concept_0_percent"]), "from": day(row["first_time"])}
    return line | {"to": day(row["last_time"]), "superseded_by": row["superseded_by"]}


def counted(by_rule: dict[str, int], most: int = 3) -> str:
    """Counts by rule, the largest first: `unparsable_id 12, duplicate_row 3`."""
    ordered = sorted(by_rule.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{rule} {count:,}" for rule, count in ordered[:most]]
    more = len(ordered) - most
    return ", ".join([*shown, f"and {more} more"] if more > 0 else shown)


def percent(share: float | None) -> str:
    """A percentage as people read it; a small one is never shown as none."""
    if share is None:
        return ""
    if 0 < share < 0.1:
        return "<0.1 %"
    return f"{share:.1f} %"


def day(moment: Any) -> str:
    """The day of a moment."""
    return "" if moment is None else str(moment)[:10]


def explained(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that name a rule, each with what was found and how to mend it."""
    from app.loading import rules

    return [
        row | {"found": rules.came(row["rule"]), "how to mend": rules.mend(row["rule"])} if "rule" in row else row
        for row in rows
    ]
