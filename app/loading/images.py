"""Stage `load images`: scans as rows of omop.image_occurrence, from headers alone.

An upsert (the default) adds scans and brings known ones up to date, as an archive's exports come: each holds what is
new. A snapshot also takes away what the manifest no longer names; scans that a cohort or an embedding refers to then
stay, as unusable with the reason `gone_from_source`, so that what was derived from them still has its rows while no
new cohort takes them in.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import InputError, UnknownName
from app.loading.images_dicom import read_dicom
from app.loading.images_header import Acquired, Header, Unreadable
from app.loading.images_manifest import HOST_ROOT, Entry, Manifest, Refusal, match_folder, read_manifest
from app.loading.images_nifti import is_nifti, read_nifti
from app.loading.shift import Shift, asked
from app.store.forgetting import RULE, Memory, read_memory
from app.store.loads import (
    FileRecord,
    LoadRow,
    Reject,
    lock_publishing,
    open_source,
    record_load,
    record_rejects,
)
from app.store.shifting import keep_key, refuse_other_key_of_persons
from app.store.work import Work

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from app.loading.images_store import Facts

TABLE = "image_occurrence"
THREADS = 8
"""Headers wait for disks more than for the processor."""
SHRINK = 0.05
"""A snapshot that would take away a larger share of its source's scans stops."""
MODES = ("upsert", "snapshot")

Found = Header | str
"""A header, or the rule by which its path is rejected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is to be loaded."""

    manifest: Path | None
    """None where a folder's files name their persons."""
    root: str
    folder: Path
    """Where the root is on this host."""
    confined: bool
    """Whether the root was named: no path may lead out of it then."""
    source: str
    arbitrary_pairing: bool
    mode: str
    allow_shrink: bool
    shift: Shift | None = None

    @property
    def shift_key(self) -> str | None:
        """Id of the key that dates move with."""
        return self.shift.key_id if self.shift else None

    def locate(self, entry: Entry) -> Path:
        """Where the scan of a record is on this host."""
        return Path(entry.root or self.folder) / entry.path


@dataclass(frozen=True, slots=True)
class Scan:
    """One row to be."""

    record: int
    person_id: int
    acquired: Acquired
    root: str
    path: str
    header: Header

    @property
    def image_key(self) -> str:
        """What makes a series the same one again."""
        return self.header.series_uid or f"{self.root}:{self.path}"

    @property
    def key(self) -> tuple[int, Any, str]:
        """The unique key of the table."""
        return self.person_id, self.acquired.at, self.image_key

    def values(self) -> tuple[Any, ...]:
        """In the order of images_store.COLUMNS."""
        h, when = self.header, self.acquired
        return (
            *(self.person_id, when.at, when.date_only, when.source, h.study_uid, h.series_uid, self.image_key),
            *(self.root, self.path, h.format, h.rows, h.columns, h.slices, h.spacing_mm, h.slice_thickness_mm),
            *(h.kernel, h.orientation, h.hu_state, h.verdict, list(h.reasons), h.details),
        )


def load(work: Work) -> dict[str, Any]:
    """Load the scans that a manifest or a folder names.

    Args (of the job): path, root ({name: folder} or None), match ("person_id" for a folder), source,
    arbitrary_pairing, mode (upsert or snapshot), allow_shrink.

    Raises:
        InputError: the manifest cannot be read as one, another source shows the same scan, or a snapshot would take
            away over 5 % of its source's scans.
    """
    request = read_request(work.args)
    content = request.manifest.read_bytes() if request.manifest else b""
    folder = request.folder
    manifest = read_manifest(content, folder, confined=request.confined) if request.manifest else match_folder(folder)
    headers = read_headers(work, request, manifest.entries)
    scans, refusals = resolve(work, request, manifest, headers)
    return publish(work, request, _file_record(request, content, manifest), scans, refusals)


def read_request(args: Mapping[str, Any]) -> Request:
    """The job's arguments, checked."""
    path, root = Path(args["path"]), args.get("root") or {}
    if not path.exists():
        raise InputError("Expected a manifest or a folder of scans, found nothing there on this host; check its path.")
    if path.is_dir() and args.get("match") != "person_id":
        raise InputError("Expected a manifest, got a folder; say --match person_id if its files name their persons.")
    default = path if path.is_dir() else path.parent
    name, folder = next(iter(root.items()), ("images", default))
    if not re.fullmatch(r"[A-Za-z0-9_]+", name):
        raise InputError(f"Expected letters, digits and _ in the name of a root, got {name!r}; give --root NAME=DIR.")
    if not Path(folder).is_dir():
        raise InputError(f"Expected the folder of the root {name!r} on this host, found none; check --root.")
    mode = args.get("mode") or MODES[0]
    if mode not in MODES:
        raise UnknownName("mode of loading scans", mode, MODES)
    return Request(
        manifest=None if path.is_dir() else path,
        root=name.lower(),
        folder=Path(path if path.is_dir() else folder).absolute(),
        confined=bool(root),
        source=args.get("source") or "images",
        arbitrary_pairing=bool(args.get("arbitrary_pairing")),
        mode=mode,
        allow_shrink=bool(args.get("allow_shrink")),
        shift=asked(args),
    )


def _file_record(request: Request, content: bytes, manifest: Manifest) -> FileRecord:
    return FileRecord(
        name=request.manifest.name if request.manifest else ".",
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        records=manifest.size,
        dialect="csv" if request.manifest else "folder",
    )


def read_header(path: Path) -> Found:
    """The header of a file or folder, by what it looks like."""
    try:
        return read_nifti(path) if is_nifti(path) and not path.is_dir() else read_dicom(path)
    except Unreadable as reason:
        return str(reason)
    except OSError:
        return "unreadable_file"


def read_headers(work: Work, request: Request, entries: Iterable[Entry]) -> dict[Path, Found]:
    """Each distinct path once, a few at a time."""
    paths = sorted({request.locate(entry) for entry in entries})
    found: dict[Path, Found] = {}
    pool = ThreadPoolExecutor(THREADS)
    try:
        jobs = {pool.submit(read_header, path): path for path in paths}
        for done, job in enumerate(as_completed(jobs), start=1):
            found[jobs[job]] = job.result()
            work.progress(done, len(paths), "scans", "reading headers")
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def resolve(
    work: Work, request: Request, manifest: Manifest, headers: Mapping[Path, Found]
) -> tuple[list[Scan], list[Refusal]]:
    """Records and headers together: scans of known persons with a time, each once; the rest with a rule."""
    refusals = list(manifest.refusals)
    scans: dict[tuple[int, Any, str], Scan] = {}
    with work.connect() as connection:
        known = _known_persons(connection, request, manifest.entries, headers)
        memory = read_memory(connection, work.settings)
    for entry in manifest.entries:
        scan = _scan(request, entry, headers[request.locate(entry)], known, memory)
        if isinstance(scan, Scan) and scan.key in scans:
            scan = Refusal(entry.record, None, "duplicate_record")
        if isinstance(scan, Refusal):
            refusals.append(scan)
        else:
            scans[scan.key] = scan
    return list(scans.values()), sorted(refusals, key=lambda refusal: refusal.record)


def _scan(request: Request, entry: Entry, found: Found, known: set[int], memory: Memory) -> Scan | Refusal:
    if isinstance(found, str):
        return Refusal(entry.record, "path", found)
    person_id = _person(request, entry, found)
    if person_id is None:
        return Refusal(entry.record, "person_id", "no_person_in_header")
    if memory.has_person(person_id):
        return Refusal(entry.record, "person_id", RULE)
    if person_id not in known:
        return Refusal(entry.record, "person_id", "unknown_person")
    when = entry.acquired if entry.acquired and entry.acquired.source == "manifest" else None
    when = when or found.acquired or entry.acquired
    if when is None:
        return Refusal(entry.record, "acquired_at", "no_acquisition_time")
    if request.shift:
        when = replace(when, at=request.shift.moved(person_id, when.at))
    return Scan(entry.record, person_id, when, entry.root or request.root, entry.path, found)


def _person(request: Request, entry: Entry, header: Header) -> int | None:
    """The manifest's person; in a folder the header's PatientID, where it is a number, before a name's."""
    named = header.patient if request.manifest is None else None
    if named and re.fullmatch(r"-?\d{1,18}", named, re.ASCII):
        return int(named)
    return entry.person_id


def _known_persons(
    connection: Connection, request: Request, entries: Iterable[Entry], headers: Mapping[Path, Found]
) -> set[int]:
    from sqlalchemy import text

    wanted = {
        person
        for entry in entries
        if isinstance(found := headers[request.locate(entry)], Header)
        and (person := _person(request, entry, found)) is not None
    }
    statement = text("SELECT person_id FROM omop.person WHERE person_id = ANY(:wanted)")
    return set(connection.execute(statement, {"wanted": sorted(wanted)}).scalars())


def publish(
    work: Work, request: Request, file: FileRecord, scans: list[Scan], refusals: list[Refusal]
) -> dict[str, Any]:
    """Put the scans beside or in place of what the source showed before, in one transaction."""
    from app.loading import images_store as store

    row = _load_row(request, file, scans, refusals)
    result: dict[str, Any] = {
        "source": request.source,
        "read": row.num_read,
        "loaded": row.num_loaded,
        "rejected": row.num_rejected,
        "rejects_by_rule": dict(row.rejects_by_rule),
        "verdicts": dict(Counter(s.header.verdict for s in scans)),
        "reasons": dict(row.flags_by_rule),
    }
    keys = {s.key for s in scans}
    with work.transaction() as connection:
        lock_publishing(connection, work.check)
        source_id = open_source(connection, request.source)
        refuse_other_key_of_persons(connection, (s.person_id for s in scans), request.shift_key)
        before = store.current_keys(connection, source_id)
        lost = before.keys() - keys if request.mode == "snapshot" else set()
        stops = len(lost) > SHRINK * len(before) and not request.allow_shrink
        if stops:
            _write_rejects(connection, None, work.job_id, file, refusals)
        elif not lost and (same := _same_load(connection, source_id, request, row, scans)):
            store.describe(connection, source_id, {}, _facts(request, scans))
            result |= {"load_id": same, "unchanged": True, "added": 0, "removed": 0, "gone": 0}
            result["summary"] = f"{len(scans):,} scans, unchanged"
        else:
            load_id = record_load(connection, source_id, work.job_id, row)
            _write_rejects(connection, load_id, work.job_id, file, refusals)
            gone = _replace(connection, source_id, load_id, request, scans, [before[key] for key in lost])
            keep_key(connection, source_id, request.shift_key)
            added, removed = len(keys - before.keys()), len(lost) - gone
            result |= {"load_id": load_id, "unchanged": False, "added": added, "removed": removed, "gone": gone}
            result["summary"] = f"{len(scans):,} scans ({added:,} new), {len(refusals):,} rows rejected"
    if stops:
        raise InputError(
            f"Expected the scans of source {request.source!r} again, but {len(lost):,} of {len(before):,} would "
            "vanish; give --allow-shrink if that is meant, or another --source to keep both."
        )
    return result


def _load_row(request: Request, file: FileRecord, scans: list[Scan], refusals: list[Refusal]) -> LoadRow:
    return LoadRow(
        kind="images",
        mode=request.mode,
        table_name=TABLE,
        files=[file],
        content_sha256=_content_digest(request, file, scans, refusals),
        num_read=file.records,
        num_loaded=len(scans),
        rejects_by_rule=Counter(r.rule for r in refusals),
        flags_by_rule=Counter(reason for s in scans for reason in s.header.reasons),
        first_time=min((s.acquired.at for s in scans), default=None),
        last_time=max((s.acquired.at for s in scans), default=None),
    )


def _write_rejects(
    connection: Connection, load_id: int | None, job_id: int | None, file: FileRecord, refusals: list[Refusal]
) -> None:
    rows = (
        Reject(table_name=TABLE, file=file.name, record=r.record, rule=r.rule, column_name=r.column) for r in refusals
    )
    record_rejects(connection, load_id, job_id, rows)


def _facts(request: Request, scans: list[Scan]) -> Facts:
    from app.loading.images_store import Facts

    simulated = any(s.header.simulated for s in scans)
    return Facts(arbitrary_pairing=request.arbitrary_pairing, simulated=simulated, only=request.mode == "snapshot")


def _roots(request: Request, scans: list[Scan]) -> dict[str, str]:
    """Where the roots of these scans are on this host."""
    roots = {request.root: str(request.folder)}
    if any(s.root == HOST_ROOT for s in scans):
        roots[HOST_ROOT] = HOST_ROOT
    return roots


def _same_load(connection: Connection, source_id: int, request: Request, row: LoadRow, scans: list[Scan]) -> int | None:
    """The load that already shows just these scans, in these folders."""
    from app.loading import images_store as store

    same = store.shown_load(connection, source_id, row.content_sha256)
    if same is None:
        return None
    used = {folder for root, folder in _roots(request, scans).items() if any(s.root == root for s in scans)}
    return same if store.folders_of_load(connection, source_id, same) == used else None


def _replace(
    connection: Connection, source_id: int, load_id: int, request: Request, scans: list[Scan], lost: list[int]
) -> int:
    """Write the scans under `load_id` and take the lost ones away; how many of these had to stay."""
    from app.loading import images_store as store

    store.refuse_collisions(connection, source_id, (s.key for s in scans))
    old_folder = store.root_folder(connection, source_id, request.root)
    store.describe(connection, source_id, _roots(request, scans), _facts(request, scans))
    store.put(connection, load_id, (s.values() for s in scans))
    gone = store.remove(connection, lost)
    if old_folder not in (None, str(request.folder)):
        store.keep_root(connection, source_id, request.root, old_folder, load_id)
    store.supersede_others(connection, source_id, load_id)
    return gone


def _content_digest(request: Request, file: FileRecord, scans: list[Scan], refusals: list[Refusal]) -> bytes:
    """Of all that a load would write: an equal one changes nothing."""
    digest = hashlib.sha256(f"{file.sha256}\t{request.root}".encode())
    for scan in scans:
        digest.update(repr(scan.values()).encode())
    for refusal in refusals:
        digest.update(repr((refusal.record, refusal.column, refusal.rule)).encode())
    return digest.digest()
