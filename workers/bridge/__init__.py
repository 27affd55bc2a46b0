"""The only place where rows become arrays and arrays become rows. Readers commit nothing.

Shape suffixes: N = cohort member (one scan), E = entry of a sparse list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from app.errors import InputError, StoreError
from app.store import moment, names, timelines
from ml.labelling import LabelArrays, Sparse

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from app.settings import Settings

TRAIN, TUNING, HELD_OUT = range(3)
SPLITS = ("train", "tuning", "held_out")

MALE, FEMALE = 8507, 8532
YEAR_SECONDS = 365.25 * 86_400


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelSetInfo:
    """A label set and the tasks in it, by position."""

    label_set_id: int
    name: str
    version: int
    cohort_id: int
    cohort: str
    task_set_id: int
    task_set: str
    kind: str
    """pretraining or clinical."""
    digest: str
    """Hexadecimal; equal labels have equal digests."""
    task_names: list[str]
    task_titles: list[str]
    horizons_days: list[list[int]]
    num_train_events: list[int]
    """Scans of the train split whose outcome was observed, by task."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Members:
    """The members of a cohort, in the order of their cohort_member_id (that of `read_labels`)."""

    member: NDArray[np.int64]
    """(N,) cohort_member_id, ascending."""
    person: NDArray[np.int64]
    image: NDArray[np.int64]
    """(N,) image_occurrence_id."""
    split: NDArray[np.int8]
    """(N,) TRAIN, TUNING or HELD_OUT."""
    eligible: NDArray[np.bool_]
    index_seconds: NDArray[np.int64]
    """(N,) index, seconds since 1970-01-01 00:00 in naive local time."""
    age_years: NDArray[np.float64]
    """(N,) age at the index; nan where birth is unknown."""
    female: NDArray[np.float64]
    """(N,) 1 female, 0 male, nan unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scan:
    """Where a scan's voxels are on this host."""

    image_occurrence_id: int
    person_id: int
    format: str
    """nifti (a file) or dicom (a folder)."""
    path: Path
    image_key: str
    files: tuple[Path, ...] = ()
    """The series' own files, where its folder holds others, too."""
    mask: Path | None = None
    """What the manifest gave as its mask."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timelines:
    """Packed events of some persons, one after the other."""

    person: NDArray[np.int64]
    """(persons,) ascending."""
    ptr: NDArray[np.int64]
    """(persons + 1,) where each person's events begin."""
    time: NDArray[np.int64]
    """(events,) seconds since 1970-01-01 00:00 times 2, plus 1 where only the date is known; ascending a person."""
    concept: NDArray[np.int32]
    """(events,) standard concept ids."""


_LABEL_SET = """
SELECT s.label_set_id, s.name, s.version, s.cohort_id, c.name AS cohort, s.task_set_id, t.name AS task_set, t.kind,
       encode(s.digest, 'hex') AS digest
FROM label.label_set s JOIN label.cohort c USING (cohort_id) JOIN label.task_set t USING (task_set_id)
WHERE s.label_set_id = :id
"""

_TASKS = """
SELECT t.name, coalesce(t.title, t.name) AS title, t.horizons_days, coalesce(n.n, 0) AS num_train_events
FROM label.label_set s JOIN label.task t USING (task_set_id)
LEFT JOIN label.task_status_count n ON n.label_set_id = s.label_set_id AND n.position = t.position
      AND n.split = 'train' AND n.status = 'event'
WHERE s.label_set_id = :id ORDER BY t.position
"""


def find_label_set(connection: Connection, name: str) -> LabelSetInfo:
    """The label set that `NAME` (its current version) or `NAME@2` means. Raises UnknownName."""
    from sqlalchemy import text

    found = names.find(connection, "label set", name)
    row = connection.execute(text(_LABEL_SET), {"id": found.id}).mappings().one()
    tasks = connection.execute(text(_TASKS), {"id": found.id}).mappings().all()
    return LabelSetInfo(
        **row,
        task_names=[t["name"] for t in tasks],
        task_titles=[t["title"] for t in tasks],
        horizons_days=[list(t["horizons_days"]) for t in tasks],
        num_train_events=[int(t["num_train_events"]) for t in tasks],
    )


_TTE = """
SELECT y.cohort_member_id, m.eligible, array_send(y.event_tasks), array_send(y.event_seconds),
       array_send(y.prior_tasks), array_send(y.ineligible_tasks), array_send(y.window_tasks),
       array_send(y.window_seconds), array_send(y.visit_tasks), coalesce(y.follow_up_seconds, -1),
       coalesce(y.data_cut_seconds, y.follow_up_seconds, -1), coalesce(y.death_seconds, -1)
FROM label.tte y JOIN label.cohort_member m USING (cohort_member_id)
WHERE y.label_set_id = %(label_set)s AND {} ORDER BY y.cohort_member_id
"""
_SOME_MEMBERS = _TTE.format("y.cohort_member_id = ANY (%(members)s::int8[])")
_STRETCH = _TTE.format(  # of both tables: the planner knows that keys are equal, not that their bounds are
    "y.cohort_member_id BETWEEN %(first)s AND %(last)s AND m.cohort_member_id BETWEEN %(first)s AND %(last)s"
)

STRETCH_MEMBERS = 1_024
"""Labels of so many members are read and turned into arrays together."""

_RULES = """
SELECT start_seconds, prior = 'exclude', death = 'competing', follow_up = 'data_cut'
FROM label.task WHERE task_set_id = %s ORDER BY position
"""


def read_labels(connection: Connection, info: LabelSetInfo, members: NDArray[np.int64] | None = None) -> LabelArrays:
    """`label.tte` of a label set, or of some `members` of it, as arrays; members ascending, ineligible ones too.

    Of a large set several connections read stretches of members at once, all of them at one moment.
    Where no data cut is known, tasks followed to the data cut end with the cohort's follow-up.
    """
    if members is None:
        parts = moment.read_parts(connection, partial(_read_stretch, info), _member_stretches(connection, info))
    else:
        values = {"label_set": info.label_set_id, "members": members.tolist()}
        parts = [_member_arrays(binary_cursor(connection).execute(_SOME_MEMBERS, values).fetchall())]
    rules = binary_cursor(connection).execute(_RULES, (info.task_set_id,)).fetchall()
    start, excludes, competing, to_data_cut = list(zip(*rules, strict=True)) if rules else [()] * 4
    return LabelArrays(
        **{name: _joined([part[name] for part in parts]) for name in parts[0]},
        start_seconds=np.array(start, np.int64),
        excludes_prior=np.array(excludes, np.bool_),
        competing=np.array(competing, np.bool_),
        to_data_cut=np.array(to_data_cut, np.bool_),
    )


def _member_stretches(connection: Connection, info: LabelSetInfo) -> list[tuple[int, int]]:
    """First and last member of stretches of a label set; at least one."""
    statement = "SELECT cohort_member_id FROM label.tte WHERE label_set_id = %s ORDER BY 1"
    rows = binary_cursor(connection).execute(statement, (info.label_set_id,)).fetchall()
    ids = [row[0] for row in rows]
    parts = [ids[begin : begin + STRETCH_MEMBERS] for begin in range(0, len(ids), STRETCH_MEMBERS)]
    return [(part[0], part[-1]) for part in parts] or [(0, -1)]


def _read_stretch(info: LabelSetInfo, connection: Connection, stretch: tuple[int, int]) -> dict[str, Any]:
    values = {"label_set": info.label_set_id, "first": stretch[0], "last": stretch[1]}
    return _member_arrays(binary_cursor(connection).execute(_STRETCH, values).fetchall())


def _member_arrays(rows: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    """The fields of `LabelArrays` that have a row a member."""
    columns: list[Sequence[Any]] = list(zip(*rows, strict=True)) if rows else [()] * 12
    return {
        "member": np.array(columns[0], np.int64),
        "eligible": np.array(columns[1], np.bool_),
        "events": _sparse(columns[2], columns[3]),
        "priors": _sparse(columns[4]),
        "ineligibles": _sparse(columns[5]),
        "windows": _sparse(columns[6], columns[7]),
        "visits": _sparse(columns[8]),
        "follow_up_seconds": np.array(columns[9], np.int64),
        "data_cut_seconds": np.array(columns[10], np.int64),
        "death_seconds": np.array(columns[11], np.int64),
    }


def _joined(parts: Sequence[Any]) -> Any:
    """Arrays, or sparse lists, one after the other."""
    if len(parts) == 1:
        return parts[0]
    if not isinstance(parts[0], Sparse):
        return np.concatenate(parts)
    counts = np.concatenate([np.diff(part.ptr) for part in parts])
    return Sparse(
        ptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        task=np.concatenate([part.task for part in parts]),
        seconds=None if parts[0].seconds is None else np.concatenate([part.seconds for part in parts]),
    )


def binary_cursor(connection: Connection) -> Any:
    """A cursor whose rows come in binary form, in the connection's transaction."""
    from app.store.session import raw

    return raw(connection).cursor(binary=True)


_ARRAY_HEADER = 20
"""Bytes before the elements of a one-dimensional array in Postgres's binary form; an empty one has 12 and no more."""


def _sparse(tasks: Sequence[bytes], seconds: Sequence[bytes] | None = None) -> Sparse:
    """Arrays in Postgres's binary form (int2[], int8[]) as one sparse list: no Python object a number."""
    packed = b"".join([memoryview(t)[_ARRAY_HEADER:] for t in tasks])
    counts = np.array([max(len(t) - _ARRAY_HEADER, 0) // 6 for t in tasks], np.int64)
    task = np.frombuffer(packed, np.dtype([("length", ">i4"), ("value", ">i2")]))["value"].astype(np.int16)
    times = None
    if seconds is not None:
        packed = b"".join([memoryview(s)[_ARRAY_HEADER:] for s in seconds])
        times = np.frombuffer(packed, np.dtype([("length", ">i4"), ("value", ">i8")]))["value"].astype(np.int64)
    return Sparse(ptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), task=task, seconds=times)


_MEMBERS = """
SELECT m.cohort_member_id, m.person_id, m.image_occurrence_id, array_position(%s::text[], m.split) - 1, m.eligible,
       floor(extract(epoch FROM m.index_time))::int8,
       coalesce(extract(epoch FROM m.index_time - p.birth_time)::float8, 'NaN'), coalesce(p.gender_concept_id, 0)
FROM label.cohort_member m LEFT JOIN omop.person p USING (person_id)
WHERE m.cohort_id = %s ORDER BY m.cohort_member_id
"""


def read_members(connection: Connection, cohort_id: int) -> Members:
    """All members of a cohort, ineligible ones too, by ascending cohort_member_id."""
    rows = binary_cursor(connection).execute(_MEMBERS, (list(SPLITS), cohort_id)).fetchall()
    columns: list[Sequence[Any]] = list(zip(*rows, strict=True)) if rows else [()] * 8
    gender = np.array(columns[7], np.int64)
    return Members(
        member=np.array(columns[0], np.int64),
        person=np.array(columns[1], np.int64),
        image=np.array(columns[2], np.int64),
        split=np.array(columns[3], np.int8),
        eligible=np.array(columns[4], np.bool_),
        index_seconds=np.array(columns[5], np.int64),
        age_years=np.array(columns[6], np.float64) / YEAR_SECONDS,
        female=np.where(gender == FEMALE, 1.0, np.where(gender == MALE, 0.0, np.nan)),
    )


_SCANS = """
SELECT DISTINCT i.image_occurrence_id, i.person_id, i.format, i.root, i.path, i.image_key,
       i.details -> 'files' AS files, i.details ->> 'mask' AS mask, s.details -> 'roots' ->> i.root AS folder
FROM omop.image_occurrence i
JOIN ops.load l ON l.load_id = i.load_id
JOIN ops.source s USING (source_id)
WHERE i.image_occurrence_id {which} ORDER BY i.image_occurrence_id
"""
_OF_COHORT = _SCANS.format(
    which="IN (SELECT image_occurrence_id FROM label.cohort_member WHERE cohort_id = :cohort_id)"
)
_SOME = _SCANS.format(which="= ANY(:images)")


def read_scans(connection: Connection, settings: Settings, cohort_id: int) -> list[Scan]:
    """Where the scans of a cohort's members are, one a distinct scan, by ascending image_occurrence_id.

    A root's folder is LACHESIS_ROOT_<NAME> where this host names one, else the folder it was loaded from.

    Raises:
        StoreError: this host does not know where a root is.
        InputError: a path leads out of its root.
    """
    return _scans(connection, settings, _OF_COHORT, {"cohort_id": cohort_id})


def read_some_scans(connection: Connection, settings: Settings, images: Sequence[int]) -> list[Scan]:
    """Where some scans are, by ascending image_occurrence_id; raises as `read_scans` does."""
    return _scans(connection, settings, _SOME, {"images": list(images)})


def _scans(connection: Connection, settings: Settings, statement: str, values: dict[str, Any]) -> list[Scan]:
    from sqlalchemy import text

    scans = []
    for row in connection.execute(text(statement), values).mappings():
        folder = settings.roots.get(row["root"].lower()) or row["folder"]
        if folder is None:
            raise StoreError(
                f"Expected LACHESIS_ROOT_{row['root'].upper()} to name the folder of the scans under the root "
                f"{row['root']!r}, found neither it nor a folder kept when they were loaded; set it on this host."
            )
        own = [Path(name) for name in row["files"] or ()]
        mask = [Path(row["mask"])] if row["mask"] else []
        if any(path.is_absolute() or ".." in path.parts for path in (Path(row["path"]), *own, *mask)):
            raise InputError(f"Expected scans inside their root, found one outside of {row['root']!r}; load it again.")
        scans.append(
            Scan(
                image_occurrence_id=row["image_occurrence_id"],
                person_id=row["person_id"],
                format=row["format"],
                path=Path(folder) / row["path"],
                image_key=row["image_key"],
                files=tuple(Path(folder) / path for path in own),
                mask=Path(folder) / mask[0] if mask else None,
            )
        )
    return scans


def read_timelines(connection: Connection, persons: Sequence[int] | NDArray[np.int64]) -> Timelines:
    """Packed events of `persons` (ascending); a person without events has an empty stretch."""
    person = np.unique(np.asarray(persons, np.int64))
    ptr, time, concept = timelines.read(connection, person)
    return Timelines(person=person, ptr=ptr, time=time, concept=concept)
