"""Find the files of a vocabulary: an Athena download, zipped or not, or vocabulary tables that a database exported.

Athena writes tab-separated text named .csv in which quotes are literal, an empty field is null and nothing else is, and
dates are YYYYMMDD. Its CPT4 tool appends lines that end with carriage returns. Exports are comma-separated with
quotes, or Parquet.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from app.errors import InputError
from app.loading.cdm import VOCABULARY
from app.loading.dialect import Reading
from app.loading.extract import TableFile, is_data, read_header, shards, stem
from app.loading.places import Place, Stage, place
from app.loading.records import Scan, blocks, scan
from app.store.loads import FileRecord

IGNORED = ("concept_class", "domain", "drug_strength", "relationship", "source_to_concept_map")
"""Vocabulary tables that nothing here asks."""
NEEDED = "concept"
CPT4 = "concept_cpt4"
EXCEL_ROWS = 1_048_575
"""Where Excel cuts a table, header not counted."""
BLOCK = 1 << 22


@dataclass(kw_only=True, slots=True)
class Download:
    """The files of a vocabulary, by what they hold."""

    tables: dict[str, list[TableFile]]
    vocabulary: Path | None
    """VOCABULARY, where it is there."""
    cpt4: Path | None
    """CONCEPT_CPT4: codes without names, until their owner's tool has filled them in."""
    ignored: list[str]
    """Vocabulary tables that are not read."""
    unknown: list[str] = field(default_factory=list)
    """Names of other files."""

    @property
    def is_athena(self) -> bool:
        """Tab-separated text: Athena's own dialect, in which quotes are letters."""
        return any(file.delimiter == "\t" for file in self.tables[NEEDED])


def unpack(path: Path, into: Path, check: Callable[[], None]) -> Path:
    """The folder of a download: itself, or what a zip holds, written to `into`.

    Raises:
        InputError: the zip is truncated, damaged or locked, or the file is none.
    """
    if path.is_dir():
        return path
    if path.suffix.lower() != ".zip":
        raise InputError(
            f"Expected a folder or a .zip of vocabulary files, found the file {path.name}; give its folder."
        )
    into.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = Path(member.filename).name
                if member.is_dir() or name.startswith((".", "_")) or "__MACOSX" in member.filename:
                    continue
                if not wanted(Path(name)):
                    (into / name).touch()  # named, not read
                    continue
                with archive.open(member) as source, (into / name).open("wb") as target:
                    while block := source.read(BLOCK):
                        check()
                        target.write(block)
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise InputError(
            f"Expected a whole zip of vocabulary files in {path.name}, found one that is truncated, damaged or locked "
            f"({type(error).__name__}); download it again."
        ) from error
    return into


def wanted(path: Path) -> bool:
    """True for a file that holds a table that is read."""
    return stem(path.name) in (*VOCABULARY, "vocabulary", CPT4)


def find_download(folder: Path) -> Download:
    """The vocabulary tables of a folder, or of the only folder below it that has any; headers are read.

    Raises:
        InputError: no CONCEPT, a table twice, or a header that is none of the table's.
    """
    held = _place(folder)
    found: dict[str, list[Path]] = {}
    unknown = []
    for path in sorted(held.iterdir()):
        name = stem(path.name)
        if path.name.startswith((".", "_")):
            continue
        if name in (*VOCABULARY, *IGNORED, "vocabulary", CPT4) and (path.is_dir() or is_data(at(path))):
            if name in found:
                raise InputError(
                    f"Expected one file or one folder of {name.upper()}, found {found[name][0].name} and {path.name}; "
                    "remove one."
                )
            found[name] = [p.path for p in shards(at(path), name)] if path.is_dir() else [path]
        else:
            unknown.append(path.name)
    if NEEDED not in found:
        have = ", ".join(sorted(n.upper() for n in found)) or "none of its tables"
        raise InputError(
            f"Expected CONCEPT.csv among the vocabulary's files, found {have}; unzip the whole download there."
        )
    return Download(
        tables={
            table: [read_header(path, path.relative_to(held).as_posix(), table, Reading()) for path in found[table]]
            for table in VOCABULARY
            if table in found
        },
        vocabulary=found["vocabulary"][0] if found.get("vocabulary") else None,
        cpt4=found[CPT4][0] if found.get(CPT4) else None,
        ignored=[name for name in IGNORED if name in found],
        unknown=unknown,
    )


def at(path: Path) -> Place:
    """A path as a place of a delivery."""
    return place(path, path.name, Stage(path.parent))


def _place(folder: Path) -> Path:
    if not folder.is_dir():
        raise InputError(f"Expected a folder or a .zip of vocabulary files, found the file {folder.name}.")
    below = [folder, *(path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith("."))]
    holding = [path for path in below if any(stem(file.name) == NEEDED for file in path.iterdir())]
    if len(holding) > 1:
        raise InputError(
            f"Expected one vocabulary, found CONCEPT in {len(holding)} folders "
            f"({', '.join(path.name for path in holding[:4])}); give one of them."
        )
    return holding[0] if holding else folder


def examine(file: TableFile, folder: Path, check: Callable[[], None]) -> tuple[TableFile, FileRecord, Scan | None]:
    """Count and digest a file; one whose lines end in several ways is written anew, with line feeds alone.

    Raises:
        InputError: other bytes than UTF-8, or as many records as Excel leaves of a longer table.
    """
    from app.loading import decode

    if file.delimiter != "\t":
        record, found = decode.examine(file, check, Stage(folder))
        if file.delimiter is not None and record.records == EXCEL_ROWS:
            raise InputError(
                f"Expected the whole of {file.name}, found {record.records:,} records, where Excel cuts a table; "
                "use the file as it was downloaded."
            )
        return file, record, found
    found = scan(file.path, file.name, "\t", check)
    original = found
    if found.line_end == "mixed":
        folder.mkdir(parents=True, exist_ok=True)
        copy = folder / f"lines_{file.path.name.removesuffix('.gz')}"
        copy.write_bytes(b"")
        with copy.open("wb") as target:
            for block in line_feeds(blocks(file.path, file.name)):
                check()
                target.write(block)
        found = scan(copy, file.name, "\t", check)
        file = TableFile(
            table=file.table, path=copy, name=file.name, columns=file.columns, cells=file.cells, delimiter="\t"
        )
    record = FileRecord(
        name=file.name, sha256=original.sha256, size=original.size, records=found.lines - 1, dialect="tab"
    )
    return file, record, replace(found, quote=None)


def line_feeds(source: Iterator[bytes]) -> Iterator[bytes]:
    """The same text with one line feed for carriage returns before one, and a space for any other carriage return."""
    rest = b""
    for block in source:
        held = rest + block
        cut = len(held.rstrip(b"\r"))
        rest, held = held[cut:], held[:cut]
        while b"\r\r\n" in held:
            held = held.replace(b"\r\r\n", b"\r\n")
        yield held.replace(b"\r\n", b"\n").replace(b"\r", b" ")


def read_vocabularies(path: Path | None) -> list[dict[str, Any]]:
    """Rows of VOCABULARY, each vocabulary once; none where the file's header does not name id and version."""
    if path is None:
        return []
    names = ("vocabulary_id", "vocabulary_name", "vocabulary_reference", "vocabulary_version", "vocabulary_concept_id")
    rows: dict[str, dict[str, Any]] = {}
    for record in _records(path):
        given = {name.strip().lower(): (value or "").strip() for name, value in record.items() if name}
        if not {"vocabulary_id", "vocabulary_version"} <= set(given):
            return []
        row: dict[str, Any] = {name: given.get(name) or None for name in names}
        concept = row["vocabulary_concept_id"] or ""
        row["vocabulary_concept_id"] = int(concept) if concept.isdigit() and int(concept) < 1 << 31 else None
        row["vocabulary_name"] = row["vocabulary_name"] or ""
        if row["vocabulary_id"]:
            rows.setdefault(row["vocabulary_id"], row)
    return list(rows.values())


def _records(path: Path) -> Iterator[dict[str, str]]:
    import csv
    import io

    if path.suffix.lower() in (".parquet", ".pq"):
        import pyarrow.parquet

        for row in pyarrow.parquet.read_table(path).to_pylist():
            yield {name: "" if value is None else str(value) for name, value in row.items()}
        return
    text = b"".join(blocks(path, path.name)).decode("utf-8-sig", errors="replace")
    tab = "\t" in text.partition("\n")[0]
    if tab:
        yield from csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        yield from csv.DictReader(io.StringIO(text))


def version(rows: list[dict[str, Any]]) -> str:
    """The release as the vocabulary calls it: the version of the one called None."""
    found = next((row["vocabulary_version"] for row in rows if row["vocabulary_id"] == "None"), None)
    return found or "unknown"


def has_room(folder: Path, needed: int) -> None:
    """Raises InputError where a folder's disk has not so many bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"Expected {needed / 1e9:.1f} GB free for unpacking and sorting the vocabulary, found {free / 1e9:.1f} GB; "
            "make room, or set LACHESIS_HOME to another disk."
        )
