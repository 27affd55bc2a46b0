"""Write persons, events and labels as a MEDS 0.4 data set (https://github.com/Medical-Event-Data-Standard/meds).

Beside the columns that MEDS has, shards have some of ours, so that loading them gives the same timelines;
`docs/meds.md` says what each holds. Of identifiers only `person_id` and `visit_occurrence_id` leave the store.
"""

from __future__ import annotations

import datetime as dt
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from app import __version__
from app.errors import InputError
from app.export.codes import Namer
from app.store import exports, names, splits
from app.store.codes_meds import TABLE_OF_LETTER

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray
    from sqlalchemy import Connection

MEDS_VERSION = "0.4.1"
SPLITS = ("train", "tuning", "held_out")
CHUNK_ROWS = 200_000
"""Rows in memory at a time."""
SHARD_ROWS = 2_000_000
"""Rows of a shard, where its last person fits."""
DEATH_CONCEPT = 4306655
DEMOGRAPHICS = ("gender", "race", "ethnicity")
EXTENSIONS = ("end_date_only", "date_only", "table", "value_code", "source_code", "unmapped", "end")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """What `lachesis export meds` was asked for."""

    folder: Path
    cohort: str | None = None
    labels: Sequence[str] = ()
    codes: str = "standard"
    """`standard`: the concept that events are known by, the source's code beside it; `source`: the latter alone."""
    shard_rows: int = SHARD_ROWS


@dataclass(slots=True)
class Written:
    """What was written."""

    persons: int = 0
    rows: int = 0
    shards: int = 0
    codes: int = 0
    labels: int = 0
    label_files: int = 0
    by_split: dict[str, int] = field(default_factory=dict)


def export(connection: Connection, options: ExportOptions, advance: Callable[[int], None]) -> Written:
    """Write a data set; the folder appears whole or not at all.

    Args:
        connection: a transaction that sees one moment of the store throughout (repeatable read).
        options: what to write, and where.
        advance: told of rows written; may raise to stop.

    Raises:
        InputError: the folder is not empty, a name is unknown, or label sets are of several cohorts.
        UnknownName: there is no such cohort or label set.
    """
    cohort_id = choose_cohort(connection, options)
    persons = exports.find_persons(connection, cohort_id)
    if not len(persons):
        raise InputError("Expected persons to export, found none; load some, or give a cohort that has members.")
    written = Written(persons=len(persons))
    with whole_folder(options.folder) as folder:
        of_person = person_splits(connection, persons, cohort_id)
        namer = Namer(connection)
        with Shards(folder / "data", options.shard_rows, schema(options)) as shards:
            for part in exports.chunks(persons, min(CHUNK_ROWS, options.shard_rows)):
                table = rows_of(connection, part, namer, options)
                advance(shards.write(table, of_person))
        written.rows, written.shards = shards.rows, shards.count
        written.codes = write_metadata(folder / "metadata", namer, persons["person_id"], of_person)
        for split in of_person.values():
            written.by_split[split] = written.by_split.get(split, 0) + 1
        for name in options.labels:
            write_labels(connection, folder / "labels", name, written)
    return written


def total_rows(connection: Connection, options: ExportOptions) -> int:
    """About how many rows an export has: events, without births and static facts."""
    return int(exports.find_persons(connection, choose_cohort(connection, options))["num_rows"].sum())


def choose_cohort(connection: Connection, options: ExportOptions) -> int | None:
    """The cohort whose persons and splits are exported; None for all persons.

    Raises:
        InputError: a label set labels another cohort.
    """
    given = names.find(connection, "cohort", options.cohort).id if options.cohort else None
    for name in options.labels:
        found, cohort = exports.cohort_of_label_set(connection, names.find(connection, "label set", name).id)
        if given is None:
            given = found
        elif found != given:
            raise InputError(
                f"Expected label sets of one cohort, found {name} of {cohort}; export each cohort into a folder of its "
                "own."
            )
    return given


@contextmanager
def whole_folder(place: Path) -> Iterator[Path]:
    """A folder beside `place`, open to its owner alone, that takes its name where all went well, else goes.

    Raises:
        InputError: something is there already, or nothing can be written beside it.
    """
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise InputError(f"Expected no files at {place}, found some; give a folder that is new or empty.")
    if not place.parent.is_dir():
        raise InputError(f"Expected a folder to put {place.name} into, found no {place.parent}; make it first.")
    try:
        made = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    except OSError as error:
        raise InputError(f"Expected to write into {place.parent}, could not ({error.strerror}).") from error
    try:
        yield made
        made.rename(place)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def person_splits(connection: Connection, persons: NDArray[Any], cohort_id: int | None) -> dict[int, str]:
    """Person → split: the cohort's, else the source's own or by hash, as a cohort would be split."""
    if cohort_id is not None:
        return exports.member_splits(connection, cohort_id)
    own = exports.own_splits(connection)
    chosen = {person: own.get(person) for person in persons["person_id"].tolist()}
    return splits.split_persons(chosen, splits.find_sharing(connection))


def schema(options: ExportOptions) -> pa.Schema:
    """Columns of a shard: those of MEDS first."""
    import pyarrow as pa

    fields = [
        pa.field("subject_id", pa.int64(), nullable=False),
        pa.field("time", pa.timestamp("us")),
        pa.field("code", pa.string(), nullable=False),
        pa.field("numeric_value", pa.float32()),
        pa.field("unit", pa.string()),
        pa.field("end", pa.timestamp("us")),
        pa.field("visit_id", pa.int64()),
        pa.field("table", pa.string()),
        pa.field("value_code", pa.string()),
        pa.field("date_only", pa.int64()),  # 0 or 1: meds_reader reads no booleans
        pa.field("end_date_only", pa.int64()),
    ]
    if options.codes == "standard":
        fields += [pa.field("source_code", pa.string()), pa.field("unmapped", pa.int64())]
    return pa.schema(fields)


def rows_of(connection: Connection, persons: NDArray[Any], namer: Namer, options: ExportOptions) -> pa.Table:
    """All rows of some persons, by person, those without a time first, then by time."""
    import pyarrow as pa

    ids = persons["person_id"]
    columns = schema(options)
    statics = exports.read_statics(connection, ids)
    parts = [
        static_table(statics, persons, namer, columns),
        demographic_table(statics, persons, namer, columns),
        birth_table(persons, columns),
        event_table(exports.read_events(connection, ids), namer, options, columns),
    ]
    table = pa.concat_tables(parts)
    subject = table["subject_id"].to_numpy()
    time = table["time"].cast(pa.int64()).fill_null(exports.NULL).to_numpy()
    return table.take(np.lexsort((np.arange(len(subject)), time, subject)))


def _times(microseconds: NDArray[np.int64]) -> Any:
    import pyarrow as pa

    return pa.array(microseconds, pa.timestamp("us"), mask=microseconds == exports.NULL)


def _numbers(values: NDArray[np.float32]) -> Any:
    import pyarrow as pa

    return pa.array(values, pa.float32(), mask=np.isnan(values))


def _table(columns: pa.Schema, given: Mapping[str, Any], rows: int) -> pa.Table:
    """A table with the given columns, the others null."""
    import pyarrow as pa

    arrays = [given.get(f.name, pa.nulls(rows, f.type)) for f in columns]
    return pa.Table.from_arrays([a.cast(f.type) for a, f in zip(arrays, columns, strict=True)], schema=columns)


def static_table(statics: NDArray[Any], persons: NDArray[Any], namer: Namer, columns: pa.Schema) -> pa.Table:
    """Facts without a time; those that came with the time of birth have it again."""
    import pyarrow as pa

    births = persons["birth"][np.searchsorted(persons["person_id"], statics["person_id"])]
    given = {
        "subject_id": pa.array(statics["person_id"]),
        "time": _times(np.where(statics["at_birth"] == 1, exports.microseconds(births), exports.NULL)),
        "code": namer.write(statics["concept_id"]),
        "numeric_value": _numbers(statics["number"]),
        "unit": namer.write_units(statics["unit_concept_id"]),
        "table": pa.array(np.full(len(statics), "person")).cast(pa.string()),
    }
    return _table(columns, given, len(statics))


def demographic_table(statics: NDArray[Any], persons: NDArray[Any], namer: Namer, columns: pa.Schema) -> pa.Table:
    """Gender, race and ethnicity of persons of whom no static fact says them."""
    import pyarrow as pa

    who: list[NDArray[np.int64]] = []
    codes: list[str] = []
    for name in DEMOGRAPHICS:
        said = statics["person_id"][statics["fills"] == ord(name[0])]
        chosen = (persons[name] != 0) & ~np.isin(persons["person_id"], said)
        who.append(persons["person_id"][chosen])
        codes += namer.write_kind(name.capitalize(), persons[name][chosen])
    subject = np.concatenate(who)
    given = {
        "subject_id": pa.array(subject),
        "code": pa.array(codes, pa.string()),
        "table": pa.array(np.full(len(subject), "person")).cast(pa.string()),
    }
    return _table(columns, given, len(subject))


def birth_table(persons: NDArray[Any], columns: pa.Schema) -> pa.Table:
    """MEDS_BIRTH of persons whose birth is known."""
    import pyarrow as pa

    born = persons[persons["birth"] != exports.NULL]
    given = {
        "subject_id": pa.array(born["person_id"]),
        "time": _times(exports.microseconds(born["birth"])),
        "code": pa.array(np.full(len(born), "MEDS_BIRTH")).cast(pa.string()),
        "table": pa.array(np.full(len(born), "person")).cast(pa.string()),
    }
    return _table(columns, given, len(born))


def event_table(events: NDArray[Any], namer: Namer, options: ExportOptions, columns: pa.Schema) -> pa.Table:
    """Events, each with the code of its standard concept or of its source's."""
    import pyarrow as pa
    import pyarrow.compute as pc

    concept, source = events["concept_id"], events["source_concept_id"]
    instead = (source != 0) & ((concept == 0) | (options.codes == "source"))
    dead = (events["domain"] == ord("x")) & (concept == DEATH_CONCEPT) & (source == 0)
    code = namer.write(np.where(instead, source, concept), ~dead)
    letters = np.array([TABLE_OF_LETTER.get(chr(i), "observation") for i in range(256)])
    values = events["value_concept_id"]
    visits = events["visit_id"]
    given = {
        "subject_id": pa.array(events["person_id"]),
        "time": _times(exports.microseconds(events["time"])),
        "code": pc.fill_null(code, "MEDS_DEATH"),
        "numeric_value": _numbers(events["number"]),
        "unit": namer.write_units(events["unit_concept_id"]),
        "end": _times(exports.microseconds(events["end_time"])),
        "visit_id": pa.array(visits, pa.int64(), mask=visits == exports.NULL),
        "table": pa.array(letters[events["domain"]]).cast(pa.string()),
        "value_code": namer.write(values, values > 0),
        "date_only": pa.array(events["date_only"]),
        "end_date_only": pa.array(events["end_date_only"]),
        "source_code": namer.write(source, source != 0),
        "unmapped": pa.array((instead & (concept == 0)).astype(np.int64)),
    }
    return _table(columns, given, len(events))


class Shards:
    """Open files, one a split; a new one begins with the person after the one that filled the last."""

    def __init__(self, folder: Path, shard_rows: int, columns: pa.Schema) -> None:
        self.folder, self.shard_rows, self.columns = folder, shard_rows, columns
        self.writers: dict[str, Any] = {}
        self.filled: dict[str, int] = {}
        self.numbers: dict[str, int] = {}
        self.rows = self.count = 0

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self.writers.values():
            writer.close()

    def write(self, table: pa.Table, of_person: Mapping[int, str]) -> int:
        """Write whole persons, each to its split; how many rows."""
        import pyarrow as pa

        subject = table["subject_id"].to_numpy()
        distinct, back = np.unique(subject, return_inverse=True)
        number = np.array([SPLITS.index(of_person[int(p)]) for p in distinct])[back]
        for i, split in enumerate(SPLITS):
            chosen = np.flatnonzero(number == i)
            if len(chosen):
                self._append(split, table.take(pa.array(chosen)))
        self.rows += len(subject)
        return len(subject)

    def _append(self, split: str, table: pa.Table) -> None:
        import pyarrow.parquet as pq

        if split not in self.writers:
            path = self.folder / split / f"{self.numbers.get(split, 0)}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            self.writers[split] = pq.ParquetWriter(path, self.columns, compression="zstd")
            self.filled[split] = 0
            self.count += 1
        self.writers[split].write_table(table)
        self.filled[split] += len(table)
        if self.filled[split] >= self.shard_rows:
            self.writers.pop(split).close()
            self.numbers[split] = self.numbers.get(split, 0) + 1


def write_metadata(folder: Path, namer: Namer, persons: NDArray[np.int64], of_person: Mapping[int, str]) -> int:
    """Write codes, splits and what the data set says of itself; how many codes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    fixed = [("MEDS_BIRTH", "Birth"), ("MEDS_DEATH", "Death")]
    rows = [{"code": code, "description": said, "parent_codes": None} for code, said in fixed]
    rows += [row for row in namer.described() if row["code"] not in dict(fixed)]
    if 0 in namer.used:
        rows.append({"code": namer.codes[0], "description": "No matching concept", "parent_codes": None})
    columns = pa.schema(
        [
            pa.field("code", pa.string(), nullable=False),
            ("description", pa.string()),
            ("parent_codes", pa.list_(pa.string())),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, columns), folder / "codes.parquet", compression="zstd")
    columns = pa.schema(
        [pa.field("subject_id", pa.int64(), nullable=False), pa.field("split", pa.string(), nullable=False)]
    )
    given = [pa.array(persons), pa.array([of_person[int(p)] for p in persons], pa.string())]
    pq.write_table(pa.table(given, schema=columns), folder / "subject_splits.parquet", compression="zstd")
    about = {
        "dataset_name": "lachesis",
        "etl_name": "lachesis",
        "etl_version": __version__,
        "meds_version": MEDS_VERSION,
        "created_at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "code_modifier_columns": ["unit"],
        "raw_source_id_columns": ["visit_id"],
        "other_extension_columns": list(EXTENSIONS),
    }
    (folder / "dataset.json").write_text(json.dumps(about, indent=2) + "\n")
    return len(rows)


def write_labels(connection: Connection, folder: Path, label_set: str, written: Written) -> None:
    """Write the labels of a set: `SET/TASK/365d.parquet` for each horizon, and `SET/TASK/tte.parquet`."""
    import pyarrow as pa

    head = [
        pa.field("subject_id", pa.int64(), nullable=False),
        pa.field("prediction_time", pa.timestamp("us"), nullable=False),
        pa.field("boolean_value", pa.bool_(), nullable=False),
    ]
    found = names.find(connection, "label set", label_set)
    for task in exports.tasks_of_label_set(connection, found.id):
        place = folder / label_set / task.name
        place.mkdir(parents=True)
        for days in task.horizons_days:
            rows = exports.binary_labels(connection, label_set, task.name, days)
            _write_labels(place / f"{days}d.parquet", rows, pa.schema(head), written)
        columns = pa.schema([*head, pa.field("float_value", pa.float32(), nullable=False)])
        _write_labels(place / "tte.parquet", exports.tte_labels(connection, label_set, task.name), columns, written)


def _write_labels(path: Path, rows: Sequence[tuple[Any, ...]], columns: pa.Schema, written: Written) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    held = list(zip(*rows, strict=True)) or [()] * len(columns)
    table = pa.table([pa.array(c, f.type) for c, f in zip(held, columns, strict=True)], schema=columns)
    pq.write_table(table, path, compression="zstd")
    written.labels += len(rows)
    written.label_files += 1
