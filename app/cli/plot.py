"""`lachesis plot …`: figures of labels, cohorts and trainings as files, or their numbers as CSV."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.errors import InputError, UnknownName

if TYPE_CHECKING:
    from sqlalchemy import Connection

FORMATS = (".svg", ".png", ".pdf")
SPLITS = ("train", "tuning", "held_out")

Output = Annotated[
    Path | None, typer.Option("-o", "--output", help="File to write: .svg, .png or .pdf; default WHAT-NAME.svg here.")
]
AsCsv = Annotated[bool, typer.Option("--csv", help="The numbers on stdout, no figure.")]
Labels = Annotated[str, typer.Argument(help="Label set: NAME, or NAME@2 for an earlier version.")]

plot = typer.Typer(no_args_is_help=True, help="Draw labels, cohorts and trainings.", rich_markup_mode=None)

Asked = tuple[list[dict[str, Any]], Callable[[], Any]]
"""Rows for CSV, and what draws them."""


@plot.command("density")
def density(labels: Labels, output: Output = None, csv: AsCsv = False) -> None:
    """Labels a scan by arm, as a distribution function: how much more TTE tells of a scan than its visit does.

    Examples:
      lachesis plot density chest
      lachesis plot density chest -o density.png
    """
    from app.store import names, plots

    def ask(connection: Connection) -> Asked:
        names.find(connection, "label set", labels)
        found = plots.rows(connection, plots.DENSITY, labels=labels)
        return found, lambda: figure("density", found)

    make(ask, f"density-{labels}", output, csv=csv)


@plot.command("events")
def events(labels: Labels, output: Output = None, csv: AsCsv = False) -> None:
    """Scans with an outcome, by task.

    Examples:
      lachesis plot events chest
      lachesis plot events outcomes --csv > events.csv
    """
    from app.store import names, plots

    def ask(connection: Connection) -> Asked:
        names.find(connection, "label set", labels)
        found = plots.rows(connection, plots.EVENTS, labels=labels)
        return found, lambda: figure("events", found)

    make(ask, f"events-{labels}", output, csv=csv)


@plot.command("follow-up")
def follow_up(
    cohort: Annotated[str, typer.Argument(help="Cohort.")], output: Output = None, csv: AsCsv = False
) -> None:
    """How long the eligible scans of a cohort are followed, by split.

    Examples:
      lachesis plot follow-up chest
      lachesis plot follow-up chest -o follow_up.pdf
    """
    from app.store import names, plots

    def ask(connection: Connection) -> Asked:
        cohort_id = names.find(connection, "cohort", cohort).id
        found = plots.rows(connection, plots.FOLLOW_UP, cohort_id=cohort_id)
        return found, lambda: figure("follow_up", found)

    make(ask, f"follow-up-{cohort}", output, csv=csv)


@plot.command("incidence")
def incidence(
    labels: Labels,
    task: Annotated[str, typer.Option(help="Task of the label set.")],
    by_split: Annotated[bool, typer.Option("--by-split", help="A curve a split.")] = False,
    output: Output = None,
    csv: AsCsv = False,
) -> None:
    """Cumulative incidence of a task: Aalen-Johansen with death competing, and 1 - Kaplan-Meier beside it.

    Examples:
      lachesis plot incidence outcomes --task pulmonary_hypertension
      lachesis plot incidence outcomes --task mortality --by-split -o mortality.png
    """
    from app.store import plots

    def ask(connection: Connection) -> Asked:
        one_task(connection, labels, task)
        curves = plots.incidence_curves(connection, labels, task, SPLITS if by_split else (None,))
        found = [
            {"group": group, "estimate": estimate, **row}
            for group, pair in curves.items()
            for estimate, rows in zip(("aalen_johansen", "kaplan_meier"), pair, strict=True)
            for row in rows
        ]
        return found, lambda: figure("incidence", task.replace("_", " "), curves)

    make(ask, f"incidence-{labels}-{task}", output, csv=csv)


@plot.command("curves")
def curves(
    checkpoints: Annotated[list[str], typer.Argument(help="Checkpoints whose trainings are meant, also unfinished.")],
    output: Output = None,
    csv: AsCsv = False,
) -> None:
    """Loss on train and tuning, gain over the null model and the probe's C by epoch; several trainings on one figure.

    Examples:
      lachesis plot curves tiny-tte -o curves.png
      lachesis plot curves tiny-tte tiny-mtl @champion --csv > curves.csv
    """
    from app.store.curves import read

    def ask(connection: Connection) -> Asked:
        found = read(connection, checkpoints)

        def draw() -> Any:
            from app.report.curve_figures import curves as drawn

            return drawn(found)

        return found, draw

    make(ask, f"curves-{checkpoints[0].lstrip('@')}", output, csv=csv)


def figure(name: str, *args: Any) -> Any:
    """A figure of `app.report.label_figures`."""
    from app.report.label_figures import draw

    return draw(name, *args)


def one_task(connection: Connection, labels: str, task: str) -> None:
    """Raises UnknownName where there is no such label set, or it has no such task."""
    from app.store import names, plots

    label_set_id = names.find(connection, "label set", labels).id
    tasks = [row["name"] for row in plots.rows(connection, plots.TASKS, label_set_id=label_set_id)]
    if task not in tasks:
        raise UnknownName("task", task, tasks)


def make(ask: Callable[[Connection], Asked], name: str, output: Path | None, *, csv: bool) -> None:
    """Ask, then write the figure or print the numbers."""
    from app.cli.look import connect, print_csv

    target = output or Path(f"{name.replace('@', '-')}.svg")
    if not csv:
        writable(target)
    with connect().connect() as connection:
        rows, draw = ask(connection)
    if csv:
        print_csv(rows)
        return
    if not rows:
        raise InputError("Expected scans to draw, found none that is eligible; `lachesis show cohort` tells why.")
    save(draw(), target)
    typer.echo(str(target.absolute()))


def writable(target: Path) -> None:
    """Refuse a file of another kind, or in no folder, before anything is asked."""
    if target.suffix.lower() not in FORMATS:
        raise InputError(f"Expected a file ending in {', '.join(FORMATS)} for -o, got {target.name!r}; name one.")
    if not target.absolute().parent.is_dir():
        raise InputError(f"Expected a folder to write {target.name} in, found none at {target.parent}; make it first.")


def save(figure: Any, target: Path) -> None:
    """Write a figure; an image with 200 dots an inch."""
    import matplotlib

    from app.report.figures import STYLE

    try:
        with matplotlib.rc_context(STYLE):
            figure.savefig(target, dpi=200, metadata={"Date": None} if target.suffix.lower() == ".svg" else None)
    except OSError as error:
        raise InputError(f"Expected to write {target}, got {error.strerror}; name another file.") from error


def register(app: typer.Typer) -> None:
    """Add `plot` and its commands."""
    app.add_typer(plot, name="plot")
