"""Stage `forget`: take persons out of the store, of the files beside it, and of every later load."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import InputError
from app.store import artifacts, cache_room, forgetting, named_files
from app.store.loads import lock_publishing
from app.store.places import place
from app.store.work import Work
from workers.stages.embed_unfinished import PATTERN

if TYPE_CHECKING:
    from sqlalchemy import Connection

BY = ("person_id", "person_source_value")


def forget(work: Work) -> dict[str, Any]:
    """Forget the persons that a file names, one a line.

    Args (of the job): path, by (person_id or person_source_value), dry_run.

    Returns:
        given, found, rows (table → rows), files (kind → files), conditions, reports, checkpoints trained on them,
        running jobs, dry_run, summary.

    Raises:
        InputError: the file cannot be read, or a line is no id.
        StoreError: there is no place for the secret.
    """
    by, dry_run = str(work.args.get("by") or BY[0]), bool(work.args.get("dry_run"))
    values = read_list(Path(work.args["path"]), by)
    result: dict[str, Any] = {"given": len(values), "dry_run": dry_run}
    if dry_run:
        with work.connect() as connection:
            persons = forgetting.find_persons(connection, by, values)
            forgetting.choose(connection, sorted(persons))
            result |= {"found": len(persons), "rows": forgetting.count_rows(connection)}
            result |= {"checkpoints": forgetting.trained_on(connection), "files": {}}
            connection.rollback()
        return result | {"summary": summary(result)}
    with work.transaction() as connection:
        lock_publishing(connection, work.check)
        result |= _remove(work, connection, by, values)
    result["files"] = _remove_files(work, set(result.pop("ids")))
    return result | {"summary": summary(result)}


def read_list(path: Path, by: str) -> list[str]:
    """Ids or source values of a file, each once.

    Raises:
        InputError: naming the line, never what stands there.
    """
    if by not in BY:
        raise InputError(f"Expected --by {' or '.join(BY)}, got {by!r}.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"Expected a UTF-8 file with one {by} a line, found none ({type(error).__name__}); check its path."
        ) from None
    values: dict[str, None] = {}
    for number, line in enumerate(lines, start=1):
        value = line.strip()
        if not value or (number == 1 and value.lower() == by):
            continue
        if by == "person_id":
            if not re.fullmatch(r"-?\d{1,19}", value, re.ASCII) or not -(2**63) <= int(value) < 2**63:
                raise InputError(f"Expected a person_id in line {number}, found something else; give one id a line.")
            value = str(int(value))
        values[value] = None
    if not values:
        raise InputError(f"Expected at least one {by} in the file, found none.")
    return list(values)


def _remove(work: Work, connection: Connection, by: str, values: Sequence[str]) -> dict[str, Any]:
    """All that is in the database, in one transaction."""
    persons = forgetting.find_persons(connection, by, values)
    ids = set(persons) | ({int(value) for value in values} if by == "person_id" else set())
    told = {value for value in persons.values() if value} | (set(values) if by != "person_id" else set())
    forgetting.choose(connection, sorted(persons))
    result: dict[str, Any] = {"found": len(persons), "checkpoints": forgetting.trained_on(connection)}
    old = _rewrite_embeddings(work, connection)
    reports = forgetting.take_reports(connection)
    forgetting.plan_files(connection, [*old, *reports], forgetting.unshared_contents(connection))
    result["conditions"] = forgetting.redact_conditions(connection, ids)
    result["rows"] = forgetting.remove_rows(connection)
    result["reports"] = len(reports)
    result["remembered"] = forgetting.remember(connection, work.settings, ids, told, work.job_id)
    result["running_jobs"] = forgetting.running_jobs(connection, work.job_id)
    return result | {"ids": sorted(ids)}


def _rewrite_embeddings(work: Work, connection: Connection) -> list[str]:
    """Publish the files of vectors anew without these persons' scans; the old ones, which are to go."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    gone = {int(row[0]) for row in connection.exec_driver_sql("SELECT image_occurrence_id FROM gone_image_occurrence")}
    old = []
    for number, row in enumerate(forgetting.embedding_files(connection)):
        work.check()
        tensors = load_file(artifacts.fetch(work.settings, row.path, row.sha256))
        images = tensors["image_occurrence_id"]
        keep = ~np.isin(images, list(gone))
        if keep.all():
            continue
        kept = {
            name: np.ascontiguousarray(
                array[keep] if len(array) == len(images) and name not in ("mean", "sd") else array
            )
            for name, array in tensors.items()
        }
        file = work.folder / f"embedding{number}.safetensors"
        save_file(kept, file)
        path, sha256 = artifacts.publish(work.settings, file, Path(row.path).parts[0])
        named_files.hold(connection, work.settings, file, path, sha256)
        file.unlink()
        forgetting.replace_embedding_file(connection, row, path, sha256, int(keep.sum()))
        old.append(row.path)
    return old


def _remove_files(work: Work, ids: set[int]) -> dict[str, int]:
    """Artifacts that no row names any more, cached volumes, and rows of CSV files that attempts left."""
    with work.connect() as connection:
        planned = forgetting.planned_files(connection)
    counts = {"artifacts": 0, "volumes": 0, "csv rows": 0}
    volumes = {name for kind, name in planned if kind == "volume"}
    for kind, name in planned:
        if kind == "artifact":
            counts["artifacts"] += place(work.settings).remove(name)
    home = work.settings.home
    if volumes:
        counts["volumes"] = _remove_volumes(cache_room.folder(work.settings), volumes)
    if home is not None:
        for path in sorted((home / "runs").rglob(PATTERN)):  # they are made again; nobody knows whose each vector is
            path.unlink(missing_ok=True)
        for path in sorted((home / "runs").rglob("set_aside.csv")):  # paths of scans, which may hold names
            counts["path lists"] = counts.get("path lists", 0) + 1
            path.unlink(missing_ok=True)
        counts["csv rows"] = sum(strip_csv(path, ids) for path in sorted((home / "runs").rglob("*.csv")))
    with work.transaction() as connection:
        forgetting.forget_files(connection)
    return {kind: count for kind, count in counts.items() if count}


def _remove_volumes(cache: Path, contents: set[str]) -> int:
    """Delete cached volumes by the digest of their content."""
    removed = 0
    for facts in sorted(cache.rglob("*.json")):
        try:
            known = json.loads(facts.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(known, dict) and known.get("content_sha256") in contents:
            facts.with_name(Path(str(known.get("file") or f"{facts.stem}.npy")).name).unlink(missing_ok=True)
            facts.unlink(missing_ok=True)
            removed += 1
    return removed


def strip_csv(path: Path, ids: set[int]) -> int:
    """Take the rows of these persons out of a CSV file with a column person_id; how many."""
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        if "person_id" not in header:
            return 0
        column, told = header.index("person_id"), {str(person) for person in ids}
        body = list(rows)
    kept = [row for row in body if len(row) <= column or row[column] not in told]
    if len(kept) < len(body):
        part = path.with_name(f".{path.name}.{os.getpid()}")
        with part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *kept])
        part.replace(path)
    return len(body) - len(kept)


def summary(result: dict[str, Any]) -> str:
    """The receipt, a line a table and kind of file."""
    would = "would be forgotten" if result["dry_run"] else "forgotten"
    lines = [f"{result['given']:,} persons {would}, {result['found']:,} of them in the store"]
    lines += [f"  {table}: {count:,} rows" for table, count in result["rows"].items()]
    lines += [f"  {kind}: {count:,} removed" for kind, count in result["files"].items()]
    if result.get("reports"):
        lines.append(f"  reports: {result['reports']:,} deleted; write them again")
    if result["checkpoints"]:
        lines.append(f"  trained on them, and left as they are: {', '.join(result['checkpoints'])}")
    if result.get("running_jobs"):
        lines.append(f"  jobs run now ({', '.join(map(str, result['running_jobs']))}): forget again when they end")
    return "\n".join(lines)
