"""Stage `report`: everything known about label sets → one self-contained HTML page."""

from __future__ import annotations

import datetime as dt
import platform
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from app.errors import InputError
from app.report import build, rows, tables
from app.store import artifacts, evaluations, named_files, plots
from app.store.names import check_name
from app.store.places import place
from app.store.work import Work
from ml.evaluate import HELD_OUT, TRAIN
from ml.labelling import CENSORED, COMPETING, EVENT, LabelArrays, task_outcomes
from ml.metrics import FollowUp, Outcomes, follow_up
from workers.bridge import LabelSetInfo, Members, find_label_set, read_labels, read_members

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from sqlalchemy import Connection

MAX_PANELS = 8
"""Tasks drawn one by one, those with most held-out events; the tables have all."""
GROUP_NAMES = {3: ("lowest third", "middle third", "highest third"), 2: ("lower risk", "higher risk"), 1: ("all",)}
LIBRARIES = ("lachesis", "torch", "monai", "numpy", "scipy", "SQLAlchemy", "pgvector")


def report(work: Work) -> dict[str, Any]:
    """Write a page about `args["labels"]` (a name, several, or the label set evaluated last).

    Raises:
        InputError: no label set of that name, or none that was evaluated.
    """
    with work.connect() as connection:
        names = wanted(connection, work.args.get("labels"))
        parts = []
        for done, name in enumerate(names):
            work.progress(done, len(names), "label sets", "gathering")
            parts.append(gather(connection, name))
        versions = {**library_versions(), "PostgreSQL": server_version(connection)}
    title = check_name("report", work.args.get("name") or names[0].replace("@", "-"))
    made_at = dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC")
    page = build(rows.Page(name=title, made_at=made_at, parts=parts, versions=versions))
    file = work.folder / f"{title}.html"
    file.write_text(page, encoding="utf-8")
    path, sha256 = artifacts.publish(work.settings, file, "reports")
    with work.transaction() as connection:
        named_files.hold(connection, work.settings, file, path, sha256)
        report_id = evaluations.add_report(connection, name=title, path=path, sha256=sha256, job_id=work.job_id)
    shown = readable_copy(work, title, page)
    return {
        "file": str(shown.absolute()) if shown else place(work.settings).name(path),
        "summary": [line for part in parts for line in tables.summary(part)],
        "notes": notes(parts),
        "report_id": report_id,
    }


def wanted(connection: Connection, labels: object) -> list[str]:
    """The label sets asked for, by name."""
    if isinstance(labels, str):
        return [labels]
    if isinstance(labels, list) and labels:
        return [str(name) for name in labels]
    newest = evaluations.newest_evaluated(connection)
    if newest is None:
        raise InputError(
            "Expected a label set that was evaluated, found none; run `lachesis evaluate CHECKPOINT --labels L` first."
        )
    return [newest]


def readable_copy(work: Work, title: str, page: str) -> Path | None:
    """The page where a person finds it: the output asked for, else HOME/reports; None without a home."""
    output = work.args.get("output")
    if output:
        target = Path(output)
    elif work.settings.home is not None:
        target = work.settings.home / "reports" / f"{title}.html"
    else:
        return None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"Expected to write the page to {target}, got {error.strerror}; name another file.") from error
    return target


def library_versions() -> dict[str, str]:
    """What made the page."""
    found = {"Python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def server_version(connection: Connection) -> str:
    """Version of the database server."""
    from sqlalchemy import text

    return str(connection.execute(text("SHOW server_version")).scalar_one()).split()[0]


def gather(connection: Connection, name: str) -> rows.Part:
    """All rows of one label set."""
    info = find_label_set(connection, name)
    metrics = evaluations.read_metrics(connection, info.label_set_id)
    labels, members = read_labels(connection, info), read_members(connection, info.cohort_id)
    positions = judged_positions(info, metrics)
    flags = evaluations.caveats(connection, info.cohort_id)
    flags += sorted({flag for row in metrics for flag in row["flags"] if flag in rows.NOT_AN_EVALUATION} - set(flags))
    checkpoints = sorted({row["checkpoint_id"] for row in metrics if row["checkpoint_id"] is not None})
    part = rows.Part(
        label_set=info.name,
        version=info.version,
        kind=info.kind,
        task_set=info.task_set,
        cohort=evaluations.read_cohort(connection, info.cohort_id),
        flags=flags,
        metrics=metrics,
        tasks=[task_row(info, labels, members, position) for position in positions],
        num_tasks=len(info.task_names),
        labels=label_rows(connection, info, labels, positions),
        training=evaluations.read_training(connection, checkpoints),
    )
    drawn = most_events(part)
    panels = [task_panels(connection, part, info, labels, members, task) for task in drawn]
    return replace(part, panels=[p for p in panels if p.curves])


def judged_positions(info: LabelSetInfo, metrics: list[dict[str, Any]]) -> list[int]:
    """Tasks that an evaluation has rows about; all where there was none (but not thousands)."""
    judged = {row["task"] for row in metrics if row["task"] is not None}
    found = [k for k, name in enumerate(info.task_names) if name in judged]
    return found or list(range(min(len(info.task_names), 20)))


def task_row(info: LabelSetInfo, labels: LabelArrays, members: Members, position: int) -> rows.TaskRow:
    """A task with its status counts."""
    from ml.labelling import STATUSES
    from workers.bridge import SPLITS

    status = task_outcomes(labels, position).status
    counts = {
        (split, name): int(((members.split == s) & (status == k)).sum())
        for s, split in enumerate(SPLITS)
        for k, name in enumerate(STATUSES)
    }
    return rows.TaskRow(
        name=info.task_names[position],
        title=info.task_titles[position],
        horizons_days=info.horizons_days[position],
        counts=counts,
    )


def label_rows(connection: Connection, info: LabelSetInfo, labels: LabelArrays, positions: list[int]) -> rows.LabelRows:
    """What is drawn of the labels: density by arm, events by task, follow-up, incidence of the tasks judged."""
    name = f"{info.name}@{info.version}"
    by_task = plots.rows(connection, plots.EVENTS, labels=name)
    judged = [row for row in by_task if row["position"] in set(positions)][:MAX_PANELS]
    followed = labels.follow_up_seconds[labels.eligible & (labels.follow_up_seconds >= 0)] / 86_400
    return rows.LabelRows(
        by_arm=plots.rows(connection, plots.DENSITY, labels=name),
        by_task=by_task,
        followed=plots.rows(connection, plots.FOLLOW_UP, cohort_id=info.cohort_id),
        incidences={row["title"]: plots.incidence_curves(connection, name, row["task"], (None,)) for row in judged},
        follow_up_days=np.percentile(followed, np.arange(101)).tolist() if len(followed) else [],
    )


def most_events(part: rows.Part) -> list[rows.TaskRow]:
    """Estimable tasks to draw, in the label set's order."""
    known = set(tables.estimable_tasks(part))
    tasks = [task for task in part.tasks if task.name in known]
    chosen = sorted(tasks, key=lambda task: -task.count("held_out", "event"))[:MAX_PANELS]
    return [task for task in tasks if task in chosen]


def task_panels(
    connection: Connection,
    part: rows.Part,
    info: LabelSetInfo,
    labels: LabelArrays,
    members: Members,
    task: rows.TaskRow,
) -> rows.TaskPanels:
    """Curves by risk of the newest trained checkpoint and of what it was compared with, and its calibration."""
    position = info.task_names.index(task.name)
    found = task_outcomes(labels, position)
    at_risk = np.isin(found.status, (EVENT, COMPETING, CENSORED)) & np.isfinite(found.time_days)
    known = follow_up(outcomes_of(found.status, found.time_days, members, at_risk & (members.split == TRAIN)))
    place = {int(member): row for row, member in enumerate(members.member)}
    curves: list[rows.CurvePanel] = []
    calibrations: list[rows.CalibrationPanel] = []
    for checkpoint_id, name in compared(part):
        risk = evaluations.read_predictions(
            connection, info.label_set_id, position, checkpoint_id=checkpoint_id, head="cox", inputs="image"
        )
        judged = np.array([place[member] for member in risk if member in place], np.int64)
        judged = judged[at_risk[judged] & (members.split[judged] == HELD_OUT)]
        if not len(judged):
            continue
        outcomes = outcomes_of(found.status, found.time_days, members, judged)
        values = np.array([risk[int(member)] for member in members.member[judged]])
        curves.append(curve_panel(outcomes, values, known, name))
        if not calibrations:
            calibrations += calibration_panels(
                connection, info, position, checkpoint_id, name, task, known, members, place, found
            )
    return rows.TaskPanels(name=task.name, title=task.title, curves=curves, calibrations=calibrations)


def outcomes_of(status: NDArray[np.int8], time: NDArray[np.float64], members: Members, which: NDArray[Any]) -> Outcomes:
    """Outcomes of some members; persons are numbered among them."""
    _, person = np.unique(members.person[which], return_inverse=True)
    return Outcomes(time=time[which], event=status[which] == EVENT, competing=status[which] == COMPETING, person=person)


def compared(part: rows.Part) -> list[tuple[int, str]]:
    """(checkpoint_id, name): the one judged last, then what it was compared with; at most two."""
    pairs = [row for row in tables.differences(part, "mean_harrell_c") if row["value"] is not None]
    if pairs:
        newest = pairs[-1]
        return [
            (newest["checkpoint_id"], newest["checkpoint"]),
            (newest["reference_checkpoint_id"], newest["reference"]),
        ]
    alone = [row for row in tables.find(part, "mean_harrell_c", inputs="image") if row["value"] is not None]
    return [(alone[-1]["checkpoint_id"], alone[-1]["checkpoint"])] if alone else []


def curve_panel(outcomes: Outcomes, risk: NDArray[np.float64], known: FollowUp, name: str) -> rows.CurvePanel:
    """Kaplan–Meier by thirds of predicted risk, drawn as long as a group has 11 scans and train 10 % at risk."""
    from ml.curves import group_curves

    marks = np.linspace(0, known.tau, 5)
    made = group_curves(outcomes, risk)
    names = GROUP_NAMES.get(len(made), tuple(f"group {k + 1}" for k in range(len(made))))
    curves = []
    for one, label in zip(made, names, strict=True):
        kept = (one.curve.times <= known.tau) & (one.curve.at_risk >= rows.SMALL_CELL)
        curves.append(
            rows.Curve(
                label=label,
                times=one.curve.times[kept].tolist(),
                survival=one.curve.values[kept].tolist(),
                at_risk=one.at_risk(marks).tolist(),
                n=one.n,
                num_events=one.num_events,
            )
        )
    return rows.CurvePanel(title=name, marks=marks.tolist(), curves=curves)


def calibration_panels(
    connection: Connection,
    info: LabelSetInfo,
    position: int,
    checkpoint_id: int,
    name: str,
    task: rows.TaskRow,
    known: FollowUp,
    members: Members,
    place: dict[int, int],
    found: Any,
) -> list[rows.CalibrationPanel]:
    """Calibration at the longest horizon within follow-up; none where no horizon is."""
    from ml.curves import calibration

    horizons = [h for h in task.horizons_days if h <= known.tau]
    if not horizons:
        return []
    horizon = max(horizons)
    risk = evaluations.read_predictions(
        connection, info.label_set_id, position, checkpoint_id=checkpoint_id, head="cox", inputs="image",
        horizon_days=horizon,
    )  # fmt: skip
    judged = np.array([place[member] for member in risk if member in place], np.int64)
    judged = judged[np.isfinite(found.time_days[judged])]
    if not len(judged):
        return []
    outcomes = outcomes_of(found.status, found.time_days, members, judged)
    predicted = np.array([risk[int(member)] for member in members.member[judged]])
    groups = int(np.clip((outcomes.event & (outcomes.time <= horizon)).sum() // 12, 2, 10))
    points = [
        rows.Point(predicted=p.predicted, observed=p.observed, low=p.low, high=p.high, n=p.n)
        for p in calibration(outcomes, predicted, horizon, groups)
    ]
    return [rows.CalibrationPanel(title=f"Calibration of {name}", horizon_days=horizon, points=points)]


def notes(parts: list[rows.Part]) -> list[str]:
    """What must be said beside the closing table."""
    said = []
    for part in parts:
        if part.simulated:
            said.append(f"{part.label_set}: {rows.SIMULATED}.")
        said += [f"{part.label_set}: not an evaluation: {warning}." for warning in part.warnings]
        refused = tables.refusals(part)
        if refused:
            said.append(
                f"{part.label_set}: {len(refused)} of {len(part.tasks)} tasks are not estimable: "
                + ", ".join(f"{r.title} ({r.reason.partition(':')[0].replace('_', ' ')})" for r in refused[:12])
                + (", …" if len(refused) > 12 else "")
                + "."
            )
        if part.cohort["unreadable"]:
            said.append(f"{part.label_set}: {part.cohort['unreadable']} scans could not be read and were left out.")
        shared = max((row["shared_volumes"] or 0 for row in part.metrics), default=0)
        if shared:
            said.append(f"{part.label_set}: shared_volumes = {shared} scans have the content of another person's scan.")
    said.append("Intervals tell test sampling only: one training seed. Not a medical device.")
    return said
