"""Stage `load meds`: a MEDS data set becomes events, persons, visits, static facts and concepts, all or nothing.

find → count → decode → judge → gate → publish, as `load omop`. MEDS has no observation periods; none are made up.
"""

from __future__ import annotations

import datetime as dt
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import InputError
from app.loading import context, meds_codes, meds_rows
from app.loading.decode import examine, open_decoder
from app.loading.meds_files import CODES, DATA, SPLITS, DataSet, read_data_set, types_of
from app.loading.meds_publish import KIND, MedsDelivery, name_concepts, publish
from app.loading.meds_rows import Books, Read
from app.loading.shift import Shift, asked
from app.loading.stops import SHRINK, Stopped, keep_cut, rejects_at, told
from app.loading.validate import one
from app.store.copy import copy_out
from app.store.forgetting import read_memory
from app.store.loads import (
    Published,
    Reject,
    content_digest,
    describe_source,
    find_source,
    lock_publishing,
    open_source,
    published_loads,
    record_rejects,
)
from app.store.shifting import keep_key, refuse_other_key
from app.store.vocabulary import current_release
from app.store.work import Work

if TYPE_CHECKING:
    import duckdb
    from sqlalchemy import Connection

    from app.store.vocabulary import Release

NO_PERIODS = "MEDS has no observation periods: make cohorts with --follow-up last_event, or data_cut"


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What `lachesis load meds` was asked for."""

    path: Path
    source: str
    max_rejects: float = 0.05
    allow_shrink: bool = False
    data_cut: dt.date | None = None
    midnight_is_time: bool = False
    shift: Shift | None = None

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> Options:
        """From a job's arguments; absent ones have the command line's defaults."""
        cut = args.get("data_cut")
        options = cls(
            path=Path(args["path"]),
            source=str(args.get("source") or "meds"),
            max_rejects=float(args.get("max_rejects", 0.05)),
            allow_shrink=bool(args.get("allow_shrink")),
            data_cut=dt.date.fromisoformat(cut) if cut else None,
            midnight_is_time=bool(args.get("midnight_is_time")),
            shift=asked(args),
        )
        if options.shift and options.data_cut:
            raise InputError(
                "Expected either --data-cut or --shift-dates, got both; where dates move, no one day is the last of "
                "all persons."
            )
        return options

    @property
    def shift_key(self) -> str | None:
        """Id of the key that dates move with."""
        return self.shift.key_id if self.shift else None


@dataclass(slots=True)
class Judged:
    """A delivery in the decoder, its rejects counted."""

    reads: dict[str, list[Read]]
    books: dict[str, Books]
    codes: meds_codes.Codes
    described: dict[str, tuple[str | None, list[str]]] = field(default_factory=dict)
    rejects: dict[str, list[Reject]] = field(default_factory=dict)
    final: bool = False
    splits_from: str | None = None

    @property
    def num_events(self) -> int:
        return self.books[DATA].num_loaded


def load(work: Work) -> dict[str, Any]:
    """Load a MEDS data set (see docs for what becomes what, rules and flags).

    Returns:
        source, unchanged, persons, events, rejected, tables (one row each), data_cut, splits_from, summary.

    Raises:
        InputError: the folder cannot be used, a gate or guard stops it, or its ids are another source's.
    """
    options = Options.of(work.args)
    data_set = read_data_set(options.path)
    reads = {
        table: [(file, examine(file, work.check)[0]) for file in files] for table, files in data_set.tables.items()
    }
    folder = work.folder / "load"
    folder.mkdir(exist_ok=True)
    decoder = open_decoder(folder)
    try:
        links = _link(reads, folder)
        judged = _number_codes(decoder, reads, links)
        with work.connect() as connection:
            shown = _shown(connection, find_source(connection, options.source))
            release = current_release(connection)
            _look_up(connection, decoder, work, release, judged)
        digests = _digests(judged, options)
        if _is_shown(digests, shown):
            return _unchanged(work, options, shown)
        _judge(work, decoder, judged, links, options)
        return _publish(work, decoder, judged, release, options, data_set)
    finally:
        decoder.close()
        shutil.rmtree(folder, ignore_errors=True)


def _link(reads: Mapping[str, list[Read]], folder: Path) -> dict[str, str]:
    """Links to the files, by their names: paths with wildcard characters stay out of DuckDB's hands."""
    links = {}
    for i, (file, _) in enumerate(read for listed in reads.values() for read in listed):
        link = folder / f"in{i}.parquet"
        link.symlink_to(file.path.resolve())
        links[file.name] = str(link)
    return links


def _shown(connection: Connection, source_id: int | None) -> dict[str, Published]:
    """What a source shows of MEDS.

    Raises:
        InputError: it shows tables that another kind of load brought.
    """
    shown = published_loads(connection, source_id)
    context.refuse_other_format(shown, "omop", "vocabulary", "inspect")
    return {table: loads[-1] for table, loads in shown.items() if loads[-1].kind == KIND}


def _number_codes(decoder: duckdb.DuckDBPyConnection, reads: dict[str, list[Read]], links: Mapping[str, str]) -> Judged:
    """Number the codes of shards and metadata."""
    books = {table: Books(table, [record for _, record in listed]) for table, listed in reads.items()}
    shards = [(read, links[read[0].name]) for read in reads[DATA]]
    meds_rows.make_codes(decoder, shards)
    described: dict[str, tuple[str | None, list[str]]] = {}
    rejects = {}
    if CODES in reads:
        described, rejects[CODES] = meds_rows.read_codes(reads[CODES][0], books[CODES])
        meds_rows.add_codes(decoder, [*described, *(p for _, parents in described.values() for p in parents)])
    final = any("source_code" in types_of(file) for file, _ in reads[DATA])
    return Judged(reads, books, meds_codes.read(decoder), described, rejects, final)


def _look_up(
    connection: Connection, decoder: duckdb.DuckDBPyConnection, work: Work, release: Release | None, judged: Judged
) -> None:
    meds_codes.look_up(connection, decoder, work.settings, release, judged.codes, final=judged.final)


def _digests(judged: Judged, options: Options) -> dict[str, bytes]:
    """Digests of files, of how they are read, and of what the vocabulary says of their codes."""
    how = f"midnight_is_time={options.midnight_is_time} shift={options.shift_key} "
    how += judged.codes.digest().hex()
    return {table: content_digest(books.files, how) for table, books in judged.books.items()}


def _is_shown(digests: Mapping[str, bytes], shown: Mapping[str, Published]) -> bool:
    """True where what the source shows now is these very files."""
    return digests.keys() == shown.keys() and all(shown[t].content_sha256 == digest for t, digest in digests.items())


def _judge(
    work: Work,
    decoder: duckdb.DuckDBPyConnection,
    judged: Judged,
    links: Mapping[str, str],
    options: Options,
) -> None:
    """Decode and judge the shards; stop at the gate."""
    reads, books = judged.reads, judged.books
    total, done = books[DATA].num_read, 0

    def check(rows: int) -> None:
        nonlocal done
        work.progress(done, total, "rows", "reading shards")
        done += rows

    shards = [(read, links[read[0].name]) for read in reads[DATA]]
    meds_rows.decode(decoder, shards, midnight_is_time=options.midnight_is_time, check=check)
    work.progress(total, total, "rows", "checking")
    with work.connect() as connection:
        memory = read_memory(connection, work.settings)
    meds_rows.judge(decoder, books[DATA], memory)
    if options.shift:
        _shift(decoder, options.shift)
    if SPLITS in reads:
        read = reads[SPLITS][0]
        judged.rejects[SPLITS] = meds_rows.read_splits(decoder, read, links[read[0].name], books[SPLITS])
        judged.splits_from = read[0].name
    elif meds_rows.splits_of_folders(decoder, reads[DATA]):
        judged.splits_from = "the shards' folders"
    found = books[DATA]
    if found.num_loaded == 0:
        said = told(found.rejects_by_rule) or "they are empty"
        _stop(work, decoder, judged, f"Expected at least one usable row in the shards, found none ({said}).")
    if found.num_gated > options.max_rejects * found.num_read:
        _stop(
            work,
            decoder,
            judged,
            f"Expected at most {options.max_rejects:.1%} of the rows to be rejected, found {found.num_gated:,} of "
            f"{found.num_read:,} ({told(found.rejects_by_rule)}); see {rejects_at(work)} or raise --max-rejects.",
        )


def _shift(decoder: duckdb.DuckDBPyConnection, shift: Shift) -> None:
    """Move every date of a person."""
    shift.move_table(decoder, "m", ("time", "end_time"))
    shift.move_table(decoder, "m_birth", ("time",))
    shift.move_table(decoder, "t_person", ("birth_time",))


def _stop(work: Work, decoder: duckdb.DuckDBPyConnection, judged: Judged, message: str) -> None:
    """Keep the rejects under the job alone, then refuse."""
    with work.transaction() as store:
        for table, books in judged.books.items():
            if books.rejects_by_rule:
                rows = meds_rows.rejects(decoder, judged.reads[DATA]) if table == DATA else judged.rejects[table]
                record_rejects(store, None, work.job_id, rows)
    raise InputError(message)


def _publish(
    work: Work,
    decoder: duckdb.DuckDBPyConnection,
    judged: Judged,
    release: Release | None,
    options: Options,
    data_set: DataSet,
) -> dict[str, Any]:
    written, total = 0, judged.num_events

    def report(rows: int, what: str) -> None:
        nonlocal written
        written += rows
        work.progress(min(written, total), total, "rows", what)

    try:
        with work.transaction() as connection:
            lock_publishing(connection, work.check)
            source_id = open_source(connection, options.source)
            shown = _shown(connection, source_id)
            _look_up(connection, decoder, work, release, judged)  # now nobody else gives out ids
            digests = _digests(judged, options)
            if _is_shown(digests, shown):  # another job was faster
                return _unchanged_result(options, shown, _persons(connection, shown), None)
            refuse_other_key(connection, source_id, options.shift_key, replaces_all=True)
            delivery = MedsDelivery(
                settings=work.settings,
                source_id=source_id,
                job_id=work.job_id,
                reads=judged.reads[DATA],
                books=judged.books,
                digests=digests,
                shown=shown,
                codes=judged.codes,
                described=judged.described,
                rejects=judged.rejects,
                release=release,
                final=judged.final,
            )
            new = name_concepts(connection, decoder, delivery)
            context.refuse_collisions(connection, decoder, source_id, ("person", "visit_occurrence"))
            if not options.allow_shrink:
                _guard(connection, decoder, judged, shown)
            publish(connection, decoder, delivery, report)
            cut = _describe(connection, source_id, data_set, options)
            keep_key(connection, source_id, options.shift_key)
    except Stopped as stopped:
        _stop(work, decoder, judged, str(stopped))
    return _result(decoder, delivery, judged, options, data_set, cut, new)


def _persons_gone(connection: Connection, decoder: duckdb.DuckDBPyConnection, load_id: int) -> tuple[int, int]:
    """How many persons of an earlier load are not in this delivery, and of how many."""
    decoder.execute("CREATE OR REPLACE TABLE former (id BIGINT)")
    query = f"SELECT person_id FROM omop.person WHERE load_id = {int(load_id)}"
    context.append(decoder, "former", copy_out(connection, query, [("id", "i8")]), "id")
    gone, before = one(
        decoder,
        "SELECT count_if(NOT EXISTS (FROM t_person p WHERE p.person_id = f.id)), count(*) FROM former f",
    )
    return int(gone or 0), int(before)


def _guard(
    connection: Connection, decoder: duckdb.DuckDBPyConnection, judged: Judged, shown: Mapping[str, Published]
) -> None:
    """Stop a snapshot that would remove much of what its source shows."""
    if DATA not in shown:
        return
    before, now = shown[DATA].num_loaded, judged.books[DATA].num_loaded
    shrunk = [f"rows {before:,} → {now:,}"] if before - now > SHRINK * before else []
    gone, persons = _persons_gone(connection, decoder, shown[DATA].load_id)
    if gone > SHRINK * persons:
        shrunk.append(f"{gone:,} of {persons:,} persons would vanish")
    if shrunk:
        raise Stopped(
            f"Expected a snapshot to remove at most {SHRINK:.0%} of a source's rows or persons, found "
            f"{'; '.join(shrunk)}; load the whole data set, or say --allow-shrink."
        )


def _describe(connection: Connection, source_id: int, data_set: DataSet, options: Options) -> dt.date | None:
    """Keep what the data set says of itself; its last day, where it was given."""
    before = context.source_row(connection, source_id)
    cut, cut_source = before.data_cut, before.data_cut_source
    if options.data_cut is not None:
        cut, cut_source = options.data_cut, "option"
    if options.shift:
        cut, cut_source = None, None
    details = {"meds": data_set.about}
    describe_source(
        connection,
        source_id,
        data_cut=cut,
        data_cut_source=cut_source,
        simulated=before.simulated,
        details=details,
    )
    return cut


def _persons(connection: Connection, shown: Mapping[str, Published]) -> int:
    from sqlalchemy import text

    load_id = shown[DATA].load_id
    statement = text("SELECT count(*) FROM omop.person WHERE load_id = :load_id")
    return int(connection.scalar(statement, {"load_id": load_id}) or 0)


def _unchanged(work: Work, options: Options, shown: Mapping[str, Published]) -> dict[str, Any]:
    """Nothing to do, but that another last day of the data may have been given."""
    with work.connect() as connection:
        persons = _persons(connection, shown)
    cut = keep_cut(work, options.source, options.data_cut)
    return _unchanged_result(options, shown, persons, cut)


def _unchanged_result(
    options: Options, shown: Mapping[str, Published], persons: int, cut: dt.date | None
) -> dict[str, Any]:
    return {
        "source": options.source,
        "unchanged": True,
        "persons": persons,
        "rows": shown[DATA].num_loaded,
        "tables": [{"table": table, "loaded": load.num_loaded} for table, load in shown.items()],
        "data_cut": cut.isoformat() if cut else None,
        "summary": f"unchanged: these files are what source {options.source} shows",
    }


def _result(
    decoder: duckdb.DuckDBPyConnection,
    delivery: MedsDelivery,
    judged: Judged,
    options: Options,
    data_set: DataSet,
    cut: dt.date | None,
    new_concepts: int,
) -> dict[str, Any]:
    def count(table: str) -> int:
        return int(decoder.execute(f"SELECT count(*) FROM {table}").fetchall()[0][0])

    rejected = sum(books.num_rejected for books in judged.books.values())
    sizes = {"persons": count("t_person"), "events": count("m"), "static_facts": count("m_static")}
    visits = count("t_visit_occurrence")
    said = [
        f"{sizes['persons']:,} persons, {sizes['events']:,} events, {sizes['static_facts']:,} static facts, "
        f"{visits:,} visits, {rejected:,} rows rejected"
    ]
    if new_concepts:
        said.append(f"{new_concepts:,} codes that the vocabulary lacks are concepts of this store's own now")
    if judged.codes.several:
        said.append(f"{judged.codes.several:,} codes map to several concepts, of which the first is taken")
    if data_set.left:
        said.append(f"not read: {', '.join(data_set.left[:4])}")
    said.append(NO_PERIODS)
    return {
        "source": options.source,
        "unchanged": False,
        **sizes,
        "visits": visits,
        "births": count("m_birth"),
        "rejected": rejected,
        "new_concepts": new_concepts,
        "splits_from": judged.splits_from,
        "about": data_set.about,
        "data_cut": cut.isoformat() if cut else None,
        "summary": "; ".join(said),
        "tables": [_table_row(table, books, delivery.load_ids[table]) for table, books in judged.books.items()],
    }


def _table_row(table: str, books: Books, load_id: int) -> dict[str, Any]:
    return {
        "table": table,
        "load_id": load_id,
        "read": books.num_read,
        "loaded": books.num_loaded,
        "rejected": books.num_rejected,
        "rejects_by_rule": books.rejects_by_rule,
        "flags_by_rule": books.flags_by_rule,
    }
