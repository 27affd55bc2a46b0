"""`lachesis check …`: questions to what is in the store, each with a verdict."""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.options import AsJson, Detach, DryRun, Inline, existing, queue
from app.errors import InputError

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from app.store.checks import Finding
    from app.tasks import TaskSpec

check = typer.Typer(no_args_is_help=True, help="Check what is in the store.", rich_markup_mode=None)

SHOWN = 25
"""Lines of the table on a terminal; the rest is in the page and in ops.data_check."""


@check.callback()
def group() -> None:
    """Check what is in the store."""


@check.command("data")
def data(
    source: Annotated[str | None, typer.Option(help="Only what this source brought; all sources otherwise.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write a self-contained HTML page here.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if a check fails.")] = False,
    as_json: AsJson = False,
) -> None:
    """Ask the loaded data what would spoil labels: impossible dates, gaps, unmapped concepts, mismatched scans.

    Each check has a denominator, a share, thresholds, and the SQL that lists its rows; answers go to ops.data_check.

    Examples:
      lachesis check data --source hospital -o data.html
      lachesis check data --strict --json > data.json
    """
    from app.cli.follow import bar
    from app.cli.look import connect
    from app.store import checks

    if out is not None and not out.absolute().parent.is_dir():
        raise InputError(f"Expected a folder to write {out.name} in, found none at {out.parent}; make it first.")
    engine = connect()
    with engine.connect() as connection, bar("check data", checks.num_checks(), "checks") as advance:
        scope = checks.scope_of(connection, source)
        findings = checks.run(connection, scope, advance)
        months = checks.by_month(connection, scope) if out is not None else []
    with engine.begin() as connection:
        asked_at = checks.keep(connection, scope, findings)
    if out is not None:
        from app.report.data import page

        out.write_text(page(findings, months, source, asked_at), encoding="utf-8")
    count = {status: sum(f.status == status for f in findings) for status in checks.STATUSES}
    if as_json:
        body = {"source": source, "checked_at": asked_at, **count, "checks": [f.to_json() for f in findings]}
        typer.echo(jsonlib.dumps(body, default=str))
    else:
        tell(findings)
    said = f"{count['fail']} failed, {count['warn']} warned, {count['pass']} passed"
    said += f", {count['not_applicable']} had nothing to ask"
    where = f"; {out}" if out is not None else "; -o FILE.html writes a page with the rows' SQL"
    print(f"check data: {said}{where}", file=sys.stderr)
    if strict and count["fail"]:
        raise typer.Exit(1)


@check.command("leakage")
def leakage(
    labels: Annotated[str, typer.Option(help="Label set; its cohort's features are checked, too.")],
    checkpoint: Annotated[
        list[str] | None, typer.Option(help="Permute the outcomes and fit a head on this checkpoint's embeddings, too.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if a check fails.")] = False,
    detach: Detach = False,
    inline: Inline = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Ask whether the future shows in features, the past in labels, or one scan in two splits.

    What passes are these checks; that nothing leaks is more than any check can say.

    Examples:
      lachesis check leakage --labels outcomes --checkpoint d121-tte
      lachesis check leakage --labels outcomes --strict --json
    """
    from app.cli.look import print_table

    args = {"labels": labels, "checkpoints": checkpoint or []}
    result = queue("leakage", args, labels, detach=detach, inline=inline, dry_run=dry_run, as_json=as_json)
    if not result or "checks" not in result:
        return
    if not as_json:
        print_table([{key: one[key] for key in ("verdict", "name", "found")} for one in result["checks"]])
        for one in result["checks"]:
            if one["verdict"] != "passed":
                typer.echo(f"{one['name']}: {one['mend']}.")
    if strict and result["failed"]:
        raise typer.Exit(1)


@check.command("tasks")
def tasks(
    files: Annotated[list[Path] | None, typer.Argument(help="Task files.")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="A task that comes with Lachesis; `clinical`: the eight.")
    ] = None,
    task_set: Annotated[str | None, typer.Option("--tasks", help="The tasks of a task set.")] = None,
    labels: Annotated[str | None, typer.Option(help="The tasks of a label set, with their events.")] = None,
    cohort: Annotated[str | None, typer.Option(help="Count events and history among the scans of this cohort.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if a check fails.")] = False,
    as_json: AsJson = False,
) -> None:
    """Ask tasks what would spoil them: codes unknown or never seen, units, twins, too few events, horizons too far.

    Examples:
      lachesis check tasks gi_bleed.toml --task clinical
      lachesis check tasks gi_bleed.toml --cohort chest
      lachesis check tasks --labels outcomes --strict
    """
    from app.cli.look import connect, print_table
    from app.settings import read_settings
    from app.store import task_checks, task_counts

    engine = connect()
    with engine.connect() as connection:
        specs = asked_specs(connection, files or [], task or [], task_set, labels)
        findings = task_checks.check_specs(connection, specs, read_settings())
        if labels:
            findings += task_checks.check_labels(connection, labels)
        if cohort:
            findings += task_counts.check_cohort(connection, cohort, specs, read_settings())
    count = {status: sum(f.status == status for f in findings) for status in ("fail", "warn")}
    if as_json:
        typer.echo(jsonlib.dumps({"tasks": len(specs), **count, "findings": [f.to_json() for f in findings]}))
    else:
        print_table([f.to_json() for f in findings[: 4 * SHOWN]])
    counted = "" if labels or cohort else "; events are counted with --cohort or --labels"
    print(f"check tasks: {len(specs)} tasks, {count['fail']} failed, {count['warn']} warned{counted}", file=sys.stderr)
    if strict and count["fail"]:
        raise typer.Exit(1)


def asked_specs(
    connection: Connection, files: list[Path], names: list[str], task_set: str | None, labels: str | None
) -> list[TaskSpec]:
    """The tasks that files, names, a task set or a label set give. Raises InputError where none is given."""
    from app.store.tasks import specs_of
    from app.tasks import chosen_tasks

    specs = chosen_tasks(names, [Path(existing(file, "a task file")) for file in files])
    if task_set is not None:
        specs += specs_of(connection, task_set=task_set)
    if labels is not None:
        specs += specs_of(connection, labels=labels)
    if not specs:
        raise InputError("Expected tasks to check, got none; give files, --task NAME, --tasks SET or --labels SET.")
    return specs


def tell(findings: list[Finding]) -> None:
    """What failed or warned, as a table."""
    from app.cli.loads import percent
    from app.cli.look import print_table

    minded = [f for f in findings if f.status in ("fail", "warn")]
    rows: list[dict[str, Any]] = [
        {
            "status": f.status,
            "check": f.check.name,
            "table": f.table,
            "rows": f"{f.violations:,} of {f.denominator:,}",
            "share": percent(None if f.share is None else 100 * f.share),
            "asks": f.check.asks,
        }
        for f in minded[:SHOWN]
    ]
    print_table(rows)
    if len(minded) > SHOWN:
        typer.echo(f"and {len(minded) - SHOWN} more: SELECT * FROM ops.data_check ORDER BY checked_at DESC")


def register(app: typer.Typer) -> None:
    """Add `check` and its commands."""
    app.add_typer(check, name="check")
