"""What a finished job did, in one line: a sentence for each kind of stage."""

from __future__ import annotations

from typing import Any

SENTENCES = {
    "cohort": "{members:,} scans of {persons:,} persons, {eligible:,} eligible; version {version}",
    "tasks": "{tasks:,} tasks; version {version}",
    "label": "{members:,} scans, {events:,} events; version {version}",
    "features": "{features:,} features of {members:,} scans, {values:,} values",
    "pretrain": "{steps:,} steps on {num_train:,} scans for {num_tasks:,} tasks; checkpoint {checkpoint_id}",
    "embed": "{num_scans:,} scans as vectors of {width:,}, {newly_embedded:,} made now; checkpoint {checkpoint_id}",
    "evaluate": "{estimable:,} of {tasks:,} tasks estimable, {metrics:,} metrics; checkpoint {checkpoint_id}",
    "report": "{file}",
}
"""By kind, over the fields of its result; `load` writes a sentence of its own."""


def ending(kind: str, result: dict[str, Any]) -> str:
    """What a job made: "unchanged" first where nothing was new, its sentence, and what it could not use."""
    if isinstance(result.get("summary"), str):
        return str(result["summary"])
    try:
        sentence = SENTENCES[kind].format_map(result)
    except (KeyError, TypeError, ValueError):  # a kind without a sentence, or a result of another version
        sentence = plain(result)
    if result.get("unchanged") is True:
        sentence = f"unchanged: {sentence}"
    if result.get("taken_over_from"):
        computed, members = result["recomputed"], result["members"]
        sentence += f"; {computed:,} of {members:,} members recomputed, the others as in {result['taken_over_from']}"
    c = result.get("mean_harrell_c")
    if c:
        sentence += f"; mean Harrell's C {c[0]:.3f} ({c[1]:.3f} to {c[2]:.3f})"
    asked = result.get("asked")
    if isinstance(asked, int) and asked > result.get("tasks", asked):
        sentence += f"; warning: {asked:,} were asked for, no more concepts have enough events after a train scan"
    failed = result.get("num_failed")
    return f"{sentence}; {failed:,} scans cannot be read (its log says why of each)" if failed else sentence


def plain(result: dict[str, Any]) -> str:
    """The numbers and names of a result, without its tables."""
    parts = []
    for key, value in result.items():
        if isinstance(value, bool) or key == "name" or not isinstance(value, (str, int, float)) or value == "":
            continue
        number = f"{value:,}" if isinstance(value, int) and not key.endswith("_id") else str(value)
        parts.append(f"{key.removeprefix('num_').replace('_', ' ')} {number}")
    return ", ".join(parts) or "done"
