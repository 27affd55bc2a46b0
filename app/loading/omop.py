"""Stage `load omop`: a folder of OMOP CDM files becomes events, timelines and vocabulary, all or nothing.

find → count → decode → judge → gate → publish; a delta is also settled against what is shown. All up to `publish`
touches no row of the store; a delivery that is stopped leaves its rejects in `ops.reject`, readable by its job, and
nothing else.
"""

from __future__ import annotations

import datetime as dt
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import InputError
from app.loading import context
from app.loading.cdm import COLUMNS, EVENTS, VOCABULARY, used_columns
from app.loading.database import Database, clean_address, read_database
from app.loading.decode import Decoder, examine, open_decoder
from app.loading.deltas import KEYED, MODES, changes_nothing, is_delta, settle, split_deletions
from app.loading.dialect import Reading
from app.loading.extract import Extract, TableFile, read_extract
from app.loading.forgotten import note
from app.loading.ignored import dialects_of, left_aside, rows_of
from app.loading.parse import Plan, event_plan, period_plan, person_plan, source_plan, vocabulary_plan
from app.loading.publish import Delivery, publish
from app.loading.shift import EVENT_TIMES, PERIOD_DAYS, PERSON_TIMES, Shift, asked, end_at
from app.loading.stops import SHRINK, Stopped, keep_cut, rejects_at, told
from app.loading.validate import Judged, flag, judge, make_life, one
from app.loading.vocabulary_complete import know
from app.store.forgetting import read_memory
from app.store.loads import (
    FileRecord,
    Shown,
    content_digest,
    describe_source,
    find_source,
    last_delivery,
    lock_publishing,
    num_shown,
    open_source,
    published_loads,
    record_rejects,
)
from app.store.shifting import keep_key, refuse_other_key
from app.store.work import Work

if TYPE_CHECKING:
    import duckdb
    from sqlalchemy import Connection

    from app.loading.records import Scan

Examined = dict[str, list[tuple[TableFile, FileRecord, "Scan | None"]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What `lachesis load omop` was asked for."""

    path: Path | Database
    source: str
    mode: str = "snapshot"
    max_rejects: float = 0.05
    allow_shrink: bool = False
    data_cut: dt.date | None = None
    midnight_is_time: bool = False
    reading: Reading = field(default_factory=Reading)
    """What was said of how the files are written."""
    shift: Shift | None = None

    @property
    def shift_key(self) -> str | None:
        """Id of the key that dates move with."""
        return self.shift.key_id if self.shift else None

    @property
    def is_delta(self) -> bool:
        return is_delta(self.mode)

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> Options:
        """From a job's arguments; absent ones have the command line's defaults."""
        cut = args.get("data_cut")
        return cls(
            path=_place(args),
            source=str(args.get("source") or "omop"),
            mode=str(args.get("mode") or "snapshot"),
            max_rejects=float(args.get("max_rejects", 0.05)),
            allow_shrink=bool(args.get("allow_shrink")),
            data_cut=dt.date.fromisoformat(cut) if cut else None,
            midnight_is_time=bool(args.get("midnight_is_time")),
            reading=Reading.of(args),
            shift=asked(args),
        )


def _place(args: Mapping[str, Any]) -> Path | Database:
    """A folder, or a database whose address holds no password."""
    if not args.get("database"):
        return Path(args["path"])
    return Database(
        address=clean_address(args["database"]),
        cdm_schema=args.get("cdm_schema"),
        vocabulary_schema=args.get("vocabulary_schema"),
    )


def load(work: Work) -> dict[str, Any]:
    """Load a folder of OMOP CDM files (see docs for formats, rules and flags).

    Returns:
        source, unchanged, persons, events, tables (one row each: read, loaded, rejected, …), stayed, ignored, data_cut.

    Raises:
        InputError: the folder cannot be used, a gate or guard stops it, or its ids are another source's.
    """
    options = Options.of(work.args)
    if options.mode not in MODES:
        raise InputError(f"Expected the mode {', '.join(MODES)}, got {options.mode!r}; name one of them.")
    folder = work.folder / "load"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        return _load(work, options, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _load(work: Work, options: Options, folder: Path) -> dict[str, Any]:
    if isinstance(options.path, Database):
        spool = folder / "spool"
        spool.mkdir(mode=0o700)
        extract = read_database(work, options.path, spool, {table: frozenset(used_columns(table)) for table in COLUMNS})
    else:
        extract = read_extract(options.path, options.reading, folder / "stage", work.check, whole=not options.is_delta)
    examined = _examine(extract, work.check)
    digests = _digests(examined, options)
    while True:
        try:
            return _attempt(work, extract, examined, digests, options, folder)
        except _Moved:  # another delivery of this source was published meanwhile: judge by what is shown now
            continue


class _Moved(Exception):
    """What the source shows is no longer what the delivery was judged by."""


def _attempt(
    work: Work, extract: Extract, examined: Examined, digests: dict[str, bytes], options: Options, folder: Path
) -> dict[str, Any]:
    with work.connect() as connection:
        source_id = find_source(connection, options.source)
        shown = published_loads(connection, source_id)
        context.refuse_other_format(shown, "meds")
        all_goes = not options.is_delta and _replaces_all(shown, examined)
        refuse_other_key(connection, source_id, options.shift_key, replaces_all=all_goes)
        if _is_shown(connection, digests, shown, options):
            return _unchanged(work, options, shown, extract)
        known = context.read(connection, shown)
    decoder = open_decoder(folder, options.reading)
    try:
        context.fill_former(decoder, known)
        judged = _judge(work, decoder, examined, options, folder, shown, known)
        if options.is_delta and changes_nothing(decoder, judged) and _same_words(digests, shown):
            return _unchanged(work, options, shown, extract, judged)
        return _publish(work, decoder, judged, digests, options, extract, shown)
    finally:
        decoder.close()


def _examine(extract: Extract, check: Callable[[], None]) -> Examined:
    """Count and digest every file, two at a time: hashing and counting leave the interpreter's lock."""
    from concurrent.futures import ThreadPoolExecutor

    files = [file for listed in extract.files.values() for file in listed]
    with ThreadPoolExecutor(2) as pool:
        found = list(
            pool.map(
                lambda file: examine(file, check, extract.stage), sorted(files, key=lambda f: -f.path.stat().st_size)
            )
        )
    by_name = {record.name: (record, scan) for record, scan in found}
    return {table: [(file, *by_name[file.name]) for file in listed] for table, listed in extract.files.items()}


def _digests(examined: Examined, options: Options) -> dict[str, bytes]:
    how = f"midnight_is_time={options.midnight_is_time} {options.reading}"
    if options.shift:
        how += f" shift={options.shift_key} cut={options.data_cut}"
    return {table: content_digest((record for _, record, _ in files), how) for table, files in examined.items()}


def _is_shown(connection: Connection, digests: Mapping[str, bytes], shown: Shown, options: Options) -> bool:
    """True where what the source shows now is what these very files made it: nothing to do."""
    if options.is_delta:
        found = find_source(connection, options.source)
        return found is not None and last_delivery(connection, found) == (options.mode, dict(digests))
    return all(
        [load.content_sha256 for load in shown.get(table, ())] == [digest]
        and all(load.is_whole for load in shown[table])
        for table, digest in digests.items()
    )


def _same_words(digests: Mapping[str, bytes], shown: Shown) -> bool:
    """Whether a delta's vocabulary, and what it says of itself, are shown."""
    return all(
        any(load.content_sha256 == digest for load in shown.get(table, ()))
        for table, digest in digests.items()
        if table not in KEYED
    )


def _replaces_all(shown: Shown, delivered: Iterable[str]) -> bool:
    """True where nothing of a person stays of what the source shows."""
    return {table for table, loads in shown.items() if any(found.kind == "omop" for found in loads)} <= set(delivered)


def _plan(table: str, options: Options) -> Plan:
    deletions = options.mode == "upsert"
    if table in EVENTS:
        return event_plan(EVENTS[table], midnight_is_time=options.midnight_is_time, deletions=deletions)
    if table in VOCABULARY:
        return vocabulary_plan(VOCABULARY[table])
    if table == "cdm_source":
        return source_plan()
    return {"person": person_plan, "observation_period": period_plan}[table](deletions=deletions)


def _judge(
    work: Work,
    connection: duckdb.DuckDBPyConnection,
    examined: Examined,
    options: Options,
    folder: Path,
    shown: Shown,
    known: context.Known,
) -> dict[str, Judged]:
    """Decode and judge all tables, persons first; count flags; stop at the gate."""
    judged = _decode(work, connection, examined, options, folder, shown)
    if not options.is_delta and judged["person"].num_loaded == 0:
        rules = told(judged["person"].rejects_by_rule) or "it is empty"
        message = f"Expected at least one usable row in PERSON, found none ({rules}); see {rejects_at(work)}."
        _stop(work, connection, judged, message)
    periods, deaths = context.fill(connection, judged, delta=options.is_delta)
    know(connection, judged, work.settings, known.release)
    make_life(connection, periods=periods, deaths=deaths)
    for table, one_judged in judged.items():
        if table in EVENTS:
            work.check()
            flag(connection, one_judged, periods=periods)
    _gate(work, connection, judged, options)
    return judged


def _decode(
    work: Work,
    connection: duckdb.DuckDBPyConnection,
    examined: Examined,
    options: Options,
    folder: Path,
    shown: Shown,
) -> dict[str, Judged]:
    """Decode and judge table by table; those of a delta are settled against what is shown."""
    decoder = Decoder(connection, folder, work.check, options.reading.timezone)
    total = sum(record.records for files in examined.values() for _, record, _ in files)
    done = 0
    judged: dict[str, Judged] = {}
    if "person" not in examined:
        context.fill_persons(connection, delivered=False, delta=options.is_delta)
    with work.connect() as store:
        memory = read_memory(store, work.settings)
        for table in sorted(examined, key=lambda name: (name != "person", name not in VOCABULARY, name)):
            dialects = ", ".join(sorted({record.dialect for _, record, _ in examined[table]}))
            work.progress(done, total, "rows", f"reading {table} ({dialects})")
            plan = _plan(table, options)
            decoded = decoder.table(f"t_{table}", examined[table], plan.query)
            delta = options.is_delta and table in KEYED
            deletions = split_deletions(connection, table, upsert=options.mode == "upsert") if delta else 0
            of_persons = table in EVENTS or table == "observation_period"
            if of_persons or table == "person":
                note(connection, f"t_{table}", memory)
            judged[table] = judge(connection, table, decoded, plan, persons=of_persons)
            if options.shift:
                _shift(connection, judged, table, options, options.shift)
            if delta:
                settle(store, connection, judged[table], shown, mode=options.mode, num_deletions=deletions)
            if table == "person":
                context.fill_persons(connection, delivered=True, delta=options.is_delta)
            done += decoded.num_read
    work.progress(done, total, "rows", "checking")
    return judged


def _shift(
    connection: duckdb.DuckDBPyConnection, judged: Mapping[str, Judged], table: str, options: Options, shift: Shift
) -> None:
    """Move a table's dates; periods end with the data first, since no one day ends them all afterwards."""
    if table in VOCABULARY or table == "cdm_source" or not judged[table].num_loaded:
        return
    if table == "observation_period" and (cut := options.data_cut or _release(connection, judged)) is not None:
        end_at(connection, cut)
    times = {"person": PERSON_TIMES, "observation_period": PERIOD_DAYS}
    shift.move_table(connection, f"t_{table}", times.get(table, EVENT_TIMES))


def _release(connection: duckdb.DuckDBPyConnection, judged: Mapping[str, Judged]) -> dt.date | None:
    """The day an extract says it was made, unless its data begin later."""
    if "cdm_source" not in judged or not judged["cdm_source"].num_loaded:
        return None
    (release,) = one(connection, "SELECT source_release_date FROM t_cdm_source ORDER BY rowid LIMIT 1")
    return None if release is None or _precedes_data(connection, release, "t_observation_period") else release


def _gate(work: Work, connection: duckdb.DuckDBPyConnection, judged: dict[str, Judged], options: Options) -> None:
    for table, found in judged.items():
        if table in EVENTS and found.num_gated > options.max_rejects * found.num_read:
            _stop(
                work,
                connection,
                judged,
                f"Expected at most {options.max_rejects:.1%} of {table} to be rejected, found {found.num_gated:,} of "
                f"{found.num_read:,} rows ({told(found.rejects_by_rule)}); "
                f"see {rejects_at(work)} or raise --max-rejects.",
            )


def _stop(work: Work, connection: duckdb.DuckDBPyConnection, judged: Mapping[str, Judged], message: str) -> None:
    """Keep the rejects under the job alone, then refuse."""
    with work.transaction() as store:
        for found in judged.values():
            if found.rejects_by_rule:
                record_rejects(store, None, work.job_id, found.rejects(connection))
    raise InputError(message)


def _publish(
    work: Work,
    decoder: duckdb.DuckDBPyConnection,
    judged: dict[str, Judged],
    digests: dict[str, bytes],
    options: Options,
    extract: Extract,
    shown: Shown,
) -> dict[str, Any]:
    total = sum(found.num_loaded for found in judged.values())
    total += judged["visit_occurrence"].num_loaded if "visit_occurrence" in judged else 0
    written = 0

    def report(rows: int, what: str) -> None:
        nonlocal written
        written += rows
        work.progress(written, total, "rows", what)

    try:
        with work.transaction() as connection:
            lock_publishing(connection, work.check)
            source_id = open_source(connection, options.source)
            if published_loads(connection, source_id) != shown:
                raise _Moved
            all_goes = not options.is_delta and _replaces_all(shown, judged)
            refuse_other_key(connection, source_id, options.shift_key, replaces_all=all_goes)
            context.refuse_collisions(connection, decoder, source_id, judged)
            delivery = Delivery(
                settings=work.settings,
                source_id=source_id,
                job_id=work.job_id,
                mode=options.mode,
                judged=judged,
                digests=digests,
                published=shown,
            )
            if not options.allow_shrink:
                _guard(decoder, delivery)
            publish(connection, decoder, delivery, report)
            cut = _describe(connection, decoder, source_id, judged, options)
            keep_key(connection, source_id, options.shift_key)
    except Stopped as stopped:
        _stop(work, decoder, judged, str(stopped))
    return _result(delivery, options, extract, cut)


def _guard(decoder: duckdb.DuckDBPyConnection, delivery: Delivery) -> None:
    """Stop a delivery that would remove much of what its source shows."""
    shrunk = []
    for table, found in delivery.judged.items():
        before = num_shown(delivery.published, table)
        if table not in KEYED or not before:
            continue
        after = found.num_loaded
        if is_delta(delivery.mode):
            after += before - int(one(decoder, f"SELECT count(*) FROM x_{table}")[0])
        if before - after > SHRINK * before:
            shrunk.append(f"{table} {before:,} → {after:,}")
    gone, before = context.persons_gone(decoder)
    if gone > SHRINK * before and not any(text.startswith("person ") for text in shrunk):
        shrunk.insert(0, f"person: {gone:,} of {before:,} would vanish")
    if shrunk:
        what = "a snapshot" if delivery.mode == "snapshot" else f"an {delivery.mode}"
        mend = "load the whole extract" if delivery.mode == "snapshot" else "check what it deletes"
        raise Stopped(
            f"Expected {what} to remove at most {SHRINK:.0%} of a table's rows or of persons, found "
            f"{'; '.join(shrunk)}; {mend}, or say --allow-shrink."
        )


def _describe(
    connection: Connection,
    decoder: duckdb.DuckDBPyConnection,
    source_id: int,
    judged: Mapping[str, Judged],
    options: Options,
) -> dt.date | None:
    """Keep what the extract says of itself; its last day, where known."""
    before = context.source_row(connection, source_id)
    cut, cut_source, simulated = before.data_cut, before.data_cut_source, before.simulated
    details: dict[str, Any] = {}
    if "cdm_source" in judged and judged["cdm_source"].num_loaded:
        names = ("cdm_source_name", "cdm_holder", "cdm_version", "vocabulary_version", "source_release_date")
        row = one(decoder, f"SELECT {', '.join(names)} FROM t_cdm_source ORDER BY rowid LIMIT 1")
        details["cdm_source"] = {
            name: value.isoformat() if isinstance(value, dt.date) else value
            for name, value in zip(names, row, strict=True)
        }
        (simulated,) = one(decoder, "SELECT bool_or(contains(lower(cdm_source_name), 'simulated')) FROM t_cdm_source")
        if row[4] is not None and not _precedes_data(decoder, row[4]):
            cut, cut_source = row[4], "cdm_source"
        elif cut_source == "cdm_source":
            cut, cut_source = None, None
    if options.data_cut is not None:
        cut, cut_source = options.data_cut, "option"
    if options.shift:  # periods end with it; a day kept beside moved dates would give the offsets away
        cut, cut_source = None, None
        details.get("cdm_source", {}).pop("source_release_date", None)
    describe_source(
        connection, source_id, data_cut=cut, data_cut_source=cut_source, simulated=bool(simulated), details=details
    )
    return cut


def _precedes_data(decoder: duckdb.DuckDBPyConnection, release: dt.date, periods: str = "known_period") -> bool:
    """Whether most observation begins after an extract's release: its dates were shifted, the release date was not."""
    share = "count(*) FILTER (start_date > ?) > count(*) / 2"
    return bool(decoder.execute(f"SELECT {share} FROM {periods}", [release]).fetchall()[0][0])


def _unchanged(
    work: Work, options: Options, shown: Shown, extract: Extract, judged: Mapping[str, Judged] | None = None
) -> dict[str, Any]:
    """Nothing to do, but that another last day of the data may have been given."""
    cut = keep_cut(work, options.source, None if options.shift else options.data_cut)
    tables = [{"table": table, "loaded": num_shown(shown, table)} for table in shown if table in extract.files]
    rejected = sum(found.num_rejected for found in (judged or {}).values())
    summary = f"unchanged: these files are what source {options.source} shows"
    if options.is_delta:
        summary = f"unchanged: source {options.source} already shows all that this {options.mode} says"
    if rejected:
        summary += f"; {rejected:,} rows rejected"
    return {
        "source": options.source,
        "unchanged": True,
        "mode": options.mode,
        "persons": num_shown(shown, "person"),
        "events": sum(num_shown(shown, table) for table in shown if table in EVENTS),
        "rejected": rejected,
        "tables": tables,
        "data_cut": cut.isoformat() if cut else None,
        "summary": summary,
    }


def _result(delivery: Delivery, options: Options, extract: Extract, cut: dt.date | None) -> dict[str, Any]:
    judged, changes = delivery.judged, delivery.changes
    stayed = sorted(
        table
        for table, loads in delivery.published.items()
        if table not in judged and any(load.kind == delivery.kind for load in loads)
    )
    events = sum(found.num_loaded for table, found in judged.items() if table in EVENTS)
    rejected = sum(found.num_rejected for found in judged.values())
    ignored, unknown = left_aside(extract, options.reading)
    summary = _summary(delivery, events, rejected, stayed, unknown)
    if delivery.num_orphans:
        tables = ", ".join(sorted(table for table, change in changes.items() if table not in judged and change.removed))
        summary += f"; {delivery.num_orphans:,} rows of persons who are gone went with them ({tables})"
    summary += f"; read as {dialects_of(read.record for one in judged.values() for read in one.decoded.files)}"
    if ignored:
        summary += f"; ignored: {rows_of(ignored)}"
    return {
        "source": options.source,
        "unchanged": False,
        "mode": options.mode,
        "persons": changes["person"].after if "person" in changes else num_shown(delivery.published, "person"),
        "events": events,
        "rejected": rejected,
        "data_cut": cut.isoformat() if cut else None,
        "summary": summary,
        "tables": [*_table_rows(delivery)],
        "stayed": stayed,
        "rows_of_vanished_persons": delivery.num_orphans,
        "files": [
            {"table": table, **read.record.to_json()} for table, one in judged.items() for read in one.decoded.files
        ],
        "ignored": ignored,
        "unknown_files": unknown,
    }


def _table_rows(delivery: Delivery) -> Iterator[dict[str, Any]]:
    for table, found in delivery.judged.items():
        yield {
            "table": table,
            "load_id": delivery.load_ids[table],
            "read": found.num_read,
            "loaded": found.num_loaded,
            "rejected": found.num_rejected,
            "same": found.num_same,
            "deleted": found.num_deleted,
            **(asdict(delivery.changes[table]) if table in delivery.changes else {}),
            "rejects_by_rule": found.rejects_by_rule,
            "flags_by_rule": found.flags_by_rule,
        }


def _summary(delivery: Delivery, events: int, rejected: int, stayed: list[str], unknown: dict[str, int | None]) -> str:
    if is_delta(delivery.mode):
        changes = delivery.changes.values()
        added, changed, removed = (sum(getattr(c, what) for c in changes) for what in ("added", "changed", "removed"))
        same = sum(found.num_same for found in delivery.judged.values())
        parts = [
            f"{delivery.mode}: {added:,} rows added, {changed:,} changed, {removed:,} removed, {same:,} already so, "
            f"{rejected:,} rejected"
        ]
    else:
        parts = [f"{delivery.judged['person'].num_loaded:,} persons, {events:,} events, {rejected:,} rows rejected"]
        if stayed:
            parts.append(f"not in this folder and left as they were: {', '.join(stayed)}")
    if unknown:
        parts.append(f"not read, because no table has that name: {rows_of(unknown)}")
    return "; ".join(parts)
