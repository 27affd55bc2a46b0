"""What a cohort became, as tables: which step left how many scans, and how long they are followed under each rule."""

from __future__ import annotations

from typing import Any


def print_cohort(result: dict[str, Any]) -> None:
    """Attrition and follow-up of a cohort job's result, on stderr."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.width = 120
    attrition = Table(box=box.SIMPLE_HEAD)
    for name in ("step", "scans", "persons", "left out"):
        attrition.add_column(name, justify="left" if name == "step" else "right")
    before: int | None = None
    for step in result.get("attrition", []):
        gone = "" if before is None else f"{before - step['scans']:,}"
        attrition.add_row(step["step"], f"{step['scans']:,}", f"{step['persons']:,}", gone)
        before = step["scans"]
    console.print(attrition)
    if result.get("follow_up"):
        console.print(_follow_up(result["follow_up"]))


def _follow_up(rules: list[dict[str, Any]]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for name in ("follow-up, days", "scans", "ended by death", "median", "quartiles", "reverse Kaplan-Meier median"):
        table.add_column(name, justify="left" if name.startswith("follow") else "right")
    for rule in rules:
        reverse = rule["reverse_km_median_days"]
        table.add_row(
            rule["rule"],
            f"{rule['scans']:,}",
            f"{rule['deaths']:,}",
            f"{rule['median_days']:,.0f}",
            f"{rule['lower_days']:,.0f} to {rule['upper_days']:,.0f}",
            "not reached" if reverse is None else f"{reverse:,.0f}",
        )
    return table
