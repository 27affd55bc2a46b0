"""Stage `load vocabulary`: an Athena download is kept beside the store, and what is in use of it comes into the store.

find → count → decode → judge → keep → publish. The kept files complete the store at every later load.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import InputError
from app.loading import vocabulary_files as files
from app.loading import vocabulary_kept
from app.loading.cdm import VOCABULARY
from app.loading.decode import Decoder, know_rules
from app.loading.parse import vocabulary_plan
from app.loading.validate import Judged, judge, one
from app.loading.vocabulary_complete import FIRST_LOCAL, bring, bring_seeds, target
from app.store import artifacts, named_files
from app.store.loads import (
    LoadRow,
    content_digest,
    lock_publishing,
    open_source,
    published_loads,
    record_load,
    record_rejects,
    supersede,
)
from app.store.vocabulary import Release, add_release, current_release, replace_vocabularies
from app.store.work import Work

if TYPE_CHECKING:
    import duckdb
    from sqlalchemy import Connection

MEMORY_LIMIT = "2GB"
THREADS = 4
"""More would each hold memory of their own."""
SPACE = 3
"""Bytes needed for a byte of input: unpacked, decoded, sorted."""
SOURCE = "vocabulary"
"""What the books call it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What `lachesis load vocabulary` was asked for."""

    path: Path
    full: bool = False
    max_rejects: float = 0.05

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> Options:
        """From a job's arguments."""
        return cls(
            path=Path(args["path"]), full=bool(args.get("full")), max_rejects=float(args.get("max_rejects", 0.05))
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Read:
    """A vocabulary that was read, judged and written as sorted Parquet."""

    version: str
    digest: bytes
    vocabularies: list[dict[str, Any]]
    judged: dict[str, Judged]
    parquet: dict[str, Path]
    warnings: list[str]
    ignored: list[str]


def load(work: Work) -> dict[str, Any]:
    """Load a vocabulary (docs/loading.md, "Vocabulary").

    Returns:
        version, unchanged, full, tables (read, kept, in_store, rejected), warnings, summary.

    Raises:
        InputError: the files cannot be used, or too many rows of one break a rule.
    """
    options = Options.of(work.args)
    folder = work.folder / "vocabulary"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        size = _size(options.path)
        files.has_room(folder, SPACE * size)
        work.progress(0, None, "", "unpacking" if options.path.is_file() else "looking")
        download = files.find_download(files.unpack(options.path, folder / "unpacked", work.check))
        connection = open_decoder(folder)
        try:
            return _load(work, connection, download, options, folder)
        finally:
            connection.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _size(path: Path) -> int:
    if path.is_file():
        return 4 * path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def open_decoder(folder: Path) -> duckdb.DuckDBPyConnection:
    """A DuckDB with a file of its own: a vocabulary is larger than memory."""
    import duckdb

    connection = duckdb.connect(str(folder / "decoded.duckdb"))
    (threads,) = one(connection, "SELECT current_setting('threads')")
    connection.execute(f"SET memory_limit = '{MEMORY_LIMIT}'; SET threads = {min(int(threads), THREADS)}")
    connection.execute("SET temp_directory = $1", [str(folder / "spill")])
    connection.execute("SET enable_progress_bar = false; SET TimeZone = 'UTC'")
    know_rules(connection)
    return connection


def _load(
    work: Work, connection: duckdb.DuckDBPyConnection, download: files.Download, options: Options, folder: Path
) -> dict[str, Any]:
    examined = {}
    for table, listed in download.tables.items():
        work.progress(0, None, "", f"counting {table}")
        examined[table] = [files.examine(file, folder / "lines", work.check) for file in listed]
    digest = content_digest((record for found in examined.values() for _, record, _ in found), f"full={options.full}")
    with work.connect() as store:
        release = current_release(store)
    if release is not None and release.digest == digest and _is_kept(work, release):
        return _unchanged(release)
    if download.is_athena:  # "null" may be a name there
        connection.execute("CREATE OR REPLACE MACRO blank(x) AS nullif(x, '')")
    decoder = Decoder(connection, folder, work.check)
    total = sum(record.records for found in examined.values() for _, record, _ in found)
    done, judged, parquet = 0, dict[str, Judged](), dict[str, Path]()
    for table, found in examined.items():
        work.progress(done, total, "rows", f"reading {table}")
        plan = vocabulary_plan(VOCABULARY[table])
        decoded = decoder.table(f"t_{table}", found, plan.query)
        work.progress(done, total, "rows", f"sorting {table}")
        parquet[table] = folder / f"{table}.parquet"
        judged[table] = keep(connection, table, decoded, plan, parquet[table])
        done += decoded.num_read
        _gate(work, connection, judged[table], options)
        connection.execute(f"DROP TABLE t_{table}; CHECKPOINT")
    vocabularies = files.read_vocabularies(download.vocabulary)
    read = Read(
        version=files.version(vocabularies),
        digest=digest,
        vocabularies=vocabularies,
        judged=judged,
        parquet=parquet,
        warnings=warnings(connection, download, judged, parquet),
        ignored=download.ignored,
    )
    return _publish(work, connection, read, options)


def _is_kept(work: Work, release: Release) -> bool:
    return all(artifacts.is_kept(work.settings, kept["path"]) for kept in release.files.values())


def keep(connection: duckdb.DuckDBPyConnection, table: str, decoded: Any, plan: Any, into: Path) -> Judged:
    """Write a decoded table without the rows that break a rule; keys that come twice are seen in the sorted file."""
    (bad,) = one(connection, f"SELECT count(*) FROM t_{table} WHERE bad IS NOT NULL")
    vocabulary_kept.write_parquet(connection, table, into, "bad IS NULL")
    if bad or any(read.broken for read in decoded.files) or vocabulary_kept.has_twins(into, table):
        judged = judge(connection, table, decoded, plan, persons=False)
        vocabulary_kept.write_parquet(connection, table, into)
        return judged
    rules = [(rule.rule, rule.column) for rule in plan.rules]
    (count,) = one(connection, f"SELECT count(*) FROM t_{table}")
    connection.execute(f"CREATE TABLE r_{table} (row BIGINT, code INTEGER, key VARCHAR)")
    return Judged(table, decoded, rules, {}, int(count))


def _gate(work: Work, connection: duckdb.DuckDBPyConnection, judged: Judged, options: Options) -> None:
    """Raises InputError where too many rows, or all of CONCEPT, are rejected; the rejects stay readable."""
    empty = judged.table == "concept" and not judged.num_loaded
    if not empty and judged.num_gated <= options.max_rejects * judged.num_read:
        return
    first = next(judged.rejects(connection), None)
    with work.transaction() as store:
        record_rejects(store, None, work.job_id, judged.rejects(connection))
    if first is None:
        raise InputError(f"Expected rows in {judged.table.upper()}, found none; download the vocabulary again.")
    rules = ", ".join(f"{rule} {count:,}" for rule, count in judged.rejects_by_rule.items())
    where = "ops.reject" if work.job_id is None else f"`lachesis show rejects {work.job_id}`"
    column = f" in {first.column_name}" if first.column_name else ""
    raise InputError(
        f"Expected at most {options.max_rejects:.1%} of {judged.table.upper()} to be rejected, found "
        f"{judged.num_gated:,} of {judged.num_read:,} rows ({rules}; the first: {first.file}, record {first.record}, "
        f"{first.rule}{column}); see {where}, and use the files as they were downloaded."
    )


def warnings(
    connection: duckdb.DuckDBPyConnection,
    download: files.Download,
    judged: Mapping[str, Judged],
    parquet: Mapping[str, Path],
) -> list[str]:
    """What a vocabulary lacks, and what follows from it."""
    said = []
    if "concept_ancestor" not in judged or not judged["concept_ancestor"].num_loaded:
        said.append(
            "CONCEPT_ANCESTOR is missing or empty: outcomes do not include narrower concepts, and every pretraining "
            "task is weighed against all persons; download it, too."
        )
    if "concept_relationship" not in judged or not judged["concept_relationship"].num_loaded:
        said.append("CONCEPT_RELATIONSHIP is missing or empty: source codes map to no standard concept.")
    if download.cpt4 is not None:
        query = f"SELECT count(*) FROM read_parquet('{parquet['concept']}') WHERE vocabulary_id = 'CPT4'"
        if not one(connection, query)[0]:
            said.append(
                "CPT4 concepts are missing: CONCEPT.csv holds none, and CONCEPT_CPT4.csv has codes without names; "
                "run the download's cpt4 tool with the API key of a UMLS licence (https://uts.nlm.nih.gov), which "
                "appends them to CONCEPT.csv, and load the vocabulary again."
            )
    return said


def _unchanged(release: Release) -> dict[str, Any]:
    return {
        "version": release.version,
        "unchanged": True,
        "full": release.is_full,
        "summary": f"unchanged: the store uses this vocabulary ({release.version}) already",
    }


def _publish(work: Work, decoder: duckdb.DuckDBPyConnection, read: Read, options: Options) -> dict[str, Any]:
    """Keep the files, then let the store use them, in one transaction."""
    kept: dict[str, dict[str, Any]] = {}
    for table, path in read.parquet.items():
        work.progress(0, None, "", f"keeping {table}")
        relative, sha256 = artifacts.publish(work.settings, path, "vocabulary")
        rows = read.judged[table].num_loaded
        kept[table] = {"path": relative, "sha256": sha256, "bytes": path.stat().st_size, "rows": rows}

    def report(rows: int, what: str) -> None:
        work.progress(0, None, "", what)

    with work.transaction() as connection:
        lock_publishing(connection, work.check)
        for table, path in read.parquet.items():
            named_files.hold(connection, work.settings, path, kept[table]["path"], kept[table]["sha256"])
        release = add_release(
            connection,
            version=read.version,
            is_full=options.full,
            digest=read.digest,
            files=kept,
            job_id=work.job_id,
        )
        replace_vocabularies(connection, read.vocabularies)
        brought, older = replace(connection, decoder, work, release, report)
        _keep_books(connection, decoder, work, read, brought)
    for sentence in read.warnings:
        work.log(sentence)
    return _result(read, options, brought, older)


def replace(
    connection: Connection,
    decoder: duckdb.DuckDBPyConnection,
    work: Work,
    release: Release,
    report: Callable[[int, str], None],
) -> tuple[dict[str, int], int]:
    """Put a release in the place of what the store knew of its concepts.

    What an older release said of ancestors, relations and synonyms of a concept that this one has goes; rows of a
    site's own concepts stay, and so do concepts that this release lacks.

    Returns:
        rows brought by table, and how many concepts of the store this release lacks.
    """
    from sqlalchemy import text

    vocabulary_kept.views(decoder, work.settings, release)
    if release.is_full:
        decoder.execute("CREATE OR REPLACE VIEW v_concept AS FROM k_concept")
        for statement in _OUTDATED_FULL:
            connection.execute(text(statement), {"local": FIRST_LOCAL})
        counts = {table: int(one(decoder, f"SELECT count(*) FROM k_{table}")[0]) for table in VOCABULARY}
        from app.loading.publish import fill

        targets = [target(connection, decoder, table, n, "full", "k_") for table, n in counts.items() if n]
        fill(connection, targets, report)
        return counts, _older(connection, decoder)

    def outdated() -> None:
        ids = [row[0] for row in decoder.execute("SELECT concept_id FROM v_concept").fetchall()]
        for statement in _OUTDATED:
            connection.execute(text(statement), {"ids": ids, "local": FIRST_LOCAL})

    brought = bring_seeds(connection, decoder, work.settings, release, report, before=outdated)
    older = _older(connection, decoder)
    # concepts that an extract brought and nothing uses: the release's words count for them, too
    decoder.execute("CREATE OR REPLACE TABLE v_concept AS FROM k_concept SEMI JOIN v_held USING (concept_id)")
    bring(connection, decoder, ["concept"], "held", report)
    return {table: brought.get(table, 0) for table in VOCABULARY}, older


_OUTDATED = (
    "DELETE FROM omop.concept_ancestor WHERE descendant_concept_id = ANY (CAST(:ids AS int[])) "
    "AND ancestor_concept_id < :local",
    "DELETE FROM omop.concept_relationship WHERE concept_id_1 = ANY (CAST(:ids AS int[])) AND concept_id_2 < :local",
    "DELETE FROM omop.concept_synonym WHERE concept_id = ANY (CAST(:ids AS int[]))",
)
_OUTDATED_FULL = (
    "DELETE FROM omop.concept_ancestor WHERE descendant_concept_id < :local AND ancestor_concept_id < :local",
    "DELETE FROM omop.concept_relationship WHERE concept_id_1 < :local AND concept_id_2 < :local",
    "DELETE FROM omop.concept_synonym WHERE concept_id < :local",
)


def _older(connection: Connection, decoder: duckdb.DuckDBPyConnection) -> int:
    """Concepts of the store, but a site's own, that the release lacks."""
    from sqlalchemy import text

    statement = text("SELECT concept_id FROM omop.concept WHERE concept_id < :local")
    vocabulary_kept.add_seeds(decoder, "v_held", connection.execute(statement, {"local": FIRST_LOCAL}).scalars())
    return int(one(decoder, "SELECT count(*) FROM v_held ANTI JOIN k_concept USING (concept_id)")[0])


def _keep_books(
    connection: Connection,
    decoder: duckdb.DuckDBPyConnection,
    work: Work,
    read: Read,
    brought: Mapping[str, int],
) -> None:
    source_id = open_source(connection, SOURCE)
    supersede(connection, [load.load_id for loads in published_loads(connection, source_id).values() for load in loads])
    for table, judged in read.judged.items():
        row = LoadRow(
            kind="vocabulary",
            mode="snapshot",
            table_name=table,
            files=[file.record for file in judged.decoded.files],
            content_sha256=read.digest,
            num_read=judged.num_read,
            num_loaded=judged.num_loaded,
            rejects_by_rule=judged.rejects_by_rule,
            flags_by_rule={"not_in_use": judged.num_loaded - brought[table]},
        )
        load_id = record_load(connection, source_id, work.job_id, row)
        if judged.rejects_by_rule:
            record_rejects(connection, load_id, work.job_id, judged.rejects(decoder))


def _result(read: Read, options: Options, brought: Mapping[str, int], older: int) -> dict[str, Any]:
    tables = [
        {
            "table": table,
            "read": found.num_read,
            "kept": found.num_loaded,
            "in_store": brought[table],
            "rejected": found.num_read - found.num_loaded,
            "rejects_by_rule": found.rejects_by_rule,
        }
        for table, found in read.judged.items()
    ]
    rejected = sum(found.num_read - found.num_loaded for found in read.judged.values())
    how = "all" if options.full else "in use, with what stands above them"
    summary = (
        f"vocabulary {read.version}: {read.judged['concept'].num_loaded:,} concepts kept beside the store, "
        f"{brought['concept']:,} in it ({how}), {rejected:,} rows rejected"
    )
    if older:
        summary += f"; {older:,} concepts of the store are not in this release and stay as they were"
    return {
        "version": read.version,
        "unchanged": False,
        "full": options.full,
        "tables": tables,
        "not_in_this_release": older,
        "ignored": read.ignored,
        "warnings": read.warnings,
        "summary": ". ".join([summary, *(said.removesuffix(".") for said in read.warnings)]),
    }
