"""What `lachesis diff labels` says: one object, and that object in words and tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from app.store.label_cells import Effect
    from app.store.label_differences import Pair, Why

MOST_TASKS = 20
"""Rows of a table of tasks, where it is read by a person; --json has all."""
SAID = {"follow_up": "follow-up", "scan": "time of the scan", "split": "split", "eligibility": "eligibility"}


def found(pair: Pair, why: Why, effect: Effect, counts: dict[str, dict[str, int]]) -> dict[str, Any]:
    """All that is known of the difference, as one object."""
    from app.store import label_cells, label_differences

    position = {name: c for c, name in enumerate(effect.tasks)}
    tasks: list[dict[str, Any]] = []
    for name, numbers in counts.items():
        c = position.get(name)
        moved = {"status_changed": None, "time_changed": None} if c is None else {
            "status_changed": int(effect.status_changed[c]), "time_changed": int(effect.time_changed[c])
        }  # fmt: skip
        tasks.append({"task": name, **numbers, **moved})
    tasks.sort(key=_weight)
    result: dict[str, Any] = {
        "before": {key: value for key, value in pair.before.items() if key != "cohort_rule"},
        "after": {key: value for key, value in pair.after.items() if key != "cohort_rule"},
        "equal": pair.before["digest"] == pair.after["digest"],
        "members": label_differences.of_members(why),
        "tasks": label_differences.of_tasks(why),
        "cohort_rule": why.cohort_rule,
        "loads": why.loads,
        "effect": {
            "members": effect.members,
            "status_changed": int(effect.status_changed.sum()),
            "time_changed": int(effect.time_changed.sum()),
            "follow_up_alone_changed": effect.follow_up_alone,
            "statuses": label_cells.crosstab(effect),
            "largest_moves": label_cells.largest(effect),
            "tasks": tasks if len(effect.tasks) != 1 else [row for row in tasks if row["task"] in position],
        },
    }
    return result | {"summary": summary(result)}


def _weight(row: dict[str, Any]) -> tuple[int, int, str]:
    """Order of tasks: those with most cells that differ first, then those whose events do."""
    cells = (row["status_changed"] or 0) + (row["time_changed"] or 0)
    return -cells, -abs(row["events_after"] - row["events_before"]), row["task"]


def summary(result: dict[str, Any]) -> list[str]:
    """A sentence a question: what, why by data, vocabulary and definition, and what came of it."""
    before, after, members, effect = (result[key] for key in ("before", "after", "members", "effect"))
    lines = [
        f"{before['name']} → {after['name']}: {before['members']:,} members before, {after['members']:,} after; "
        f"{members['new']:,} new, {members['gone']:,} gone."
    ]
    if result["equal"]:
        lines.append("The labels are equal, byte for byte.")
    lines += [data(members, result["loads"]), vocabulary(result), definition(result)]
    lines.append(
        f"Effect: {before['events']:,} events before, {after['events']:,} after; of members in both, "
        f"{effect['status_changed']:,} statuses changed and {effect['time_changed']:,} events moved, at "
        f"{effect['members']:,} members; {effect['follow_up_alone_changed']:,} censored cells are followed otherwise."
    )
    return lines


def data(members: dict[str, Any], loads: list[dict[str, Any]]) -> str:
    """Whose data differ, and which loads came between."""
    if members["made_of_other_data"] is None:
        line = "Data: one of the two kept no digests of its members, so changed timelines are not known."
    else:
        line = f"Data: {members['made_of_other_data']:,} of {members['both']:,} members in both are made of other data."
    causes = [
        f"{SAID.get(cause, cause)} of {counts['members']:,} ({counts['persons']:,} persons)"
        for cause, counts in members["causes"].items()
    ]
    if causes:
        line += f" Changed: {', '.join(causes)}."
    if loads:
        named = [
            f"{load['load_id']} ({load['table']}, {load['persons']:,} of them)" for load in loads if load["persons"]
        ]
        line += f" Loads between the two: {len(loads)}; those with rows of these persons: {', '.join(named) or 'none'}."
    return line


def vocabulary(result: dict[str, Any]) -> str:
    """Which tasks mean other concepts although they are defined as before."""
    tasks = result["tasks"]["other_concepts"]
    if tasks is None:
        return "Vocabulary: one of the two kept no concepts of its tasks, so it is not known which changed."
    own = [task for task in tasks if not task["definition_too"]]
    releases = [result[side]["vocabulary_version"] or "none" for side in ("before", "after")]
    release = f" (release {releases[0]} → {releases[1]})" if releases[0] != releases[1] else ""
    if not own:
        return f"Vocabulary: every task means the concepts it meant{release}."
    named = [f"{task['task']} (+{task['added']:,} −{task['removed']:,})" for task in own[:5]]
    more = f" and {len(own) - 5:,} more" if len(own) > 5 else ""
    return f"Vocabulary: {len(own):,} tasks mean other concepts{release}: {', '.join(named)}{more}."


def definition(result: dict[str, Any]) -> str:
    """Which tasks and which cohort rule are others."""
    tasks, rule = result["tasks"], result["cohort_rule"]
    parts = [
        f"{len(tasks[what]):,} tasks {what} ({', '.join(tasks[what][:3])})" for what in ("new", "gone") if tasks[what]
    ]
    changed = tasks["defined_otherwise"]
    if changed:
        named = [
            f"{task['task']}: " + ", ".join(f"{key} {a} → {b}" for key, (a, b) in task["fields"].items())
            for task in changed[:3]
        ]
        parts.append(f"{len(changed):,} tasks defined otherwise ({'; '.join(named)})")
    if rule:
        parts.append("the cohort's rule: " + ", ".join(f"{key} {a} → {b}" for key, (a, b) in rule.items()))
    return f"Definition: {'; '.join(parts)}." if parts else "Definition: tasks and the cohort's rule are the same."


def show(result: dict[str, Any]) -> None:
    """The summary, then tables."""
    from app.cli.look import print_table

    for line in result["summary"]:
        typer.echo(line)
    effect = result["effect"]
    rows = [row for row in effect["tasks"] if row["status_changed"] or row["time_changed"]
            or row["events_before"] != row["events_after"]]  # fmt: skip
    if rows:
        print_table(rows[:MOST_TASKS], f"tasks that differ: {min(len(rows), MOST_TASKS)} of {len(rows):,}")
    if effect["statuses"]:
        print_table(effect["statuses"], "members and tasks by status, where it changed")
    if effect["largest_moves"]:
        print_table(effect["largest_moves"], "events that moved most")
