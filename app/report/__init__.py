"""Rows → one self-contained HTML page: no script, no font, no image is fetched; it reads the same offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from app.report.rows import SIMULATED, SMALL_CELL, Page, Part

FOLDER = Path(__file__).parent


def build(page: Page) -> str:
    """The page as HTML."""
    import jinja2

    from app.report import tables

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=tables.number, readable=tables.readable)
    return environment.get_template("page.html").render(
        page=page,
        parts=[describe(part) for part in page.parts],
        css=(FOLDER / "page.css").read_text(encoding="utf-8"),
        simulated=SIMULATED,
        small_cell=SMALL_CELL,
        flag_marks=tables.FLAG_MARKS.values(),
    )


def describe(part: Part) -> dict[str, Any]:
    """A part with the tables and figures that are drawn from its rows."""
    from app.report import figures, label_figures, tables

    made = tables.tables(part)
    primary = next((t for t in made if t.metric == "harrell_c"), None)
    return {
        "part": part,
        "primary": primary,
        "others": [t for t in made if t is not primary],
        "forest": figures.forest(primary.alone) if primary else None,
        "headlines": [
            {"row": row, "cell": tables.cell(row), "gap": tables.gap_closed(part, row)}
            for row in tables.differences(part, "mean_harrell_c")
            if row["value"] is not None
        ],
        "estimable": tables.estimable_tasks(part),
        "silent": tables.silent(part),
        "refusals": tables.refusals(part),
        "one_scan": [r for r in part.metrics if r["subgroup"] == "one_scan_a_person" and r["task"] is None],
        "panels": [(panels, figures.task(panels)) for panels in part.panels],
        "labels": label_figures.drawn(part.labels) if part.labels else [],
        "training": figures.training(part.training),
    }
