"""The page of `lachesis check data`: every check with its rows' SQL, and a plot of events by month and table."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from app.store.checks import Finding

FOLDER = Path(__file__).parent
Month = tuple[str, dt.date, int]
"""(table, first day of the month, events)."""


def page(findings: Sequence[Finding], months: Sequence[Month], source: str | None, asked_at: dt.datetime) -> str:
    """The page as HTML: no script, nothing is fetched."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["share"] = share
    return environment.get_template("data.html").render(
        groups=groups(findings),
        counts={s: sum(f.status == s for f in findings) for s in ("fail", "warn", "pass", "not_applicable")},
        source=source,
        asked_at=asked_at.strftime("%Y-%m-%d %H:%M %Z"),
        css=(FOLDER / "page.css").read_text(encoding="utf-8"),
        figure=figure(months),
    )


def groups(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Findings by check, the check with the worst first; in it the worst table first."""
    by_name: dict[str, list[Finding]] = {}
    for finding in findings:
        by_name.setdefault(finding.check.name, []).append(finding)
    return [{"check": found[0].check, "status": found[0].status, "findings": found} for found in by_name.values()]


def share(value: float | None) -> str:
    """A share as a percentage; a small one is never shown as none."""
    if value is None:
        return ""
    return "<0.1 %" if 0 < value < 0.001 else f"{100 * value:.1f} %"


def figure(months: Sequence[Month]) -> str | None:
    """Events by month, a panel a table; months that hold the first or last 0.1 % of all events are cut off."""
    import matplotlib

    from app.report.figures import COLOURS, STYLE, blank, svg

    span = middle(months)
    if span is None:
        return None
    first, last = span
    tables = sorted({table for table, month, _ in months if first <= month <= last})
    with matplotlib.rc_context(STYLE):
        drawn = blank(8.6, 0.5 + 0.95 * len(tables))
        panels = drawn.subplots(len(tables), 1, sharex=True, squeeze=False)[:, 0]
        for axes, table in zip(panels, tables, strict=True):
            counts = {month: n for name, month, n in months if name == table and first <= month <= last}
            days = every_month(first, last)
            axes.fill_between(days, [counts.get(day, 0) for day in days], step="post", color=COLOURS[0], lw=0)
            axes.set_title(table, fontsize=8, pad=2)
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(2, integer=True))
            axes.tick_params(labelsize=7)
    return svg(drawn, "Events by month and table")


def middle(months: Sequence[Month]) -> tuple[dt.date, dt.date] | None:
    """The span of months that holds all but the first and last 0.1 % of events; None without events."""
    total: dict[dt.date, int] = {}
    for _, month, n in months:
        total[month] = total.get(month, 0) + n
    number, seen, inside = sum(total.values()), 0, []
    for month in sorted(total):
        seen += total[month]
        if seen > 0.001 * number and seen - total[month] < 0.999 * number:
            inside.append(month)
    return (inside[0], inside[-1]) if inside else None


def every_month(first: dt.date, last: dt.date) -> list[dt.date]:
    """First days of the months from one to another, both included."""
    start, end = first.year * 12 + first.month - 1, last.year * 12 + last.month - 1
    return [dt.date(number // 12, number % 12 + 1, 1) for number in range(start, end + 1)]
