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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import InputError, UnknownName
from app.loading.images_dicom import read_dicom
from app.loading.images_header import Acquired, Header, Unreadable
from app.loading.images_link import (
    CONFLICT,
    MOST_CONFLICTS,
    ByFile,
    ByPersonId,
    BySourceValue,
    Link,
    Linker,
    Person,
    contradicts,
    known_persons,
    name_time,
    read_match_file,
    source_value_text,
    source_values,
)
from app.loading.images_manifest import HOST_ROOT, Entry, Refusal, mask_path, read_manifest
from app.loading.images_nifti import is_nifti, read_nifti
from app.loading.images_read import LIST_NAME, FolderFacts, Found, read_folder, read_paths
from app.loading.images_series import Series
from app.loading.shift import Shift, asked
from app.loading.stops import SHRINK
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
from app.store.scan_days import ScanDays, count_scan_days
from app.store.shifting import keep_key, refuse_other_key_of_persons
from app.store.work import Work

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from app.loading.images_store import Facts

TABLE = "image_occurrence"
MODES = ("upsert", "snapshot")
MATCHES = ("person_id", "person_source_value")
"""How a folder's files may name their persons, beside a matching file."""
FEW_MET = 0.5
"""Where a smaller share of scans meets a CT procedure or a visit on its day, somebody shifted dates."""
UNMET = "no_ct_or_visit_that_day"


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
    match: str = ""
    """How a folder's files name their persons: one of MATCHES, or a matching file."""
    allow_conflicts: bool = False

    @property
    def shift_key(self) -> str | None:
        """Id of the key that dates move with."""
        return self.shift.key_id if self.shift else None

    def locate(self, entry: Entry) -> Path:
        """Where the scan of a record is on this host."""
        return Path(entry.root or self.folder) / entry.path


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A record or a series found, before it is known whose it is."""

    record: int
    root: str
    series: Series
    person_id: int | None = None
    """Whose a manifest says it is."""
    acquired: Acquired | None = None
    mask: str | None = None
    """Relative to the root; what a manifest names."""

    @property
    def header(self) -> Header | None:
        return self.series.found if isinstance(self.series.found, Header) else None


@dataclass(slots=True)
class Tally:
    """What was found while linking."""

    linked: int = 0
    conflicts: int = 0
    """Linked scans whose headers contradict their persons."""


@dataclass(frozen=True, slots=True)
class Scan:
    """One row to be."""

    record: int
    person_id: int
    acquired: Acquired
    root: str
    series: Series
    header: Header
    mask: str | None = None
    """Relative to the root."""

    @property
    def path(self) -> str:
        """Relative to the root."""
        return self.series.path

    @property
    def image_key(self) -> str:
        """What makes a series the same one again."""
        name = self.header.series_uid or f"{self.root}:{self.path}"
        return f"{name}#{self.series.part}" if self.series.part else name

    @property
    def key(self) -> tuple[int, Any, str]:
        """The unique key of the table."""
        return self.person_id, self.acquired.at, self.image_key

    def values(self) -> tuple[Any, ...]:
        """In the order of images_store.COLUMNS."""
        h, when = self.header, self.acquired
        details = h.details | ({"files": list(self.series.files)} if self.series.files else {})
        details |= {"mask": self.mask} if self.mask else {}
        return (
            *(self.person_id, when.at, when.date_only, when.source, h.study_uid, h.series_uid, self.image_key),
            *(self.root, self.path, h.format, h.rows, h.columns, h.slices, h.spacing_mm, h.slice_thickness_mm),
            *(h.kernel, h.orientation, h.hu_state, h.verdict, list(h.reasons), details),
        )


def load(work: Work) -> dict[str, Any]:
    """Load the scans that a manifest names, or all of a folder.

    Args (of the job): path, root ({name: folder} or None), match (person_id, person_source_value or the path of a
    matching file, for a folder), source, arbitrary_pairing, mode (upsert or snapshot), allow_shrink, allow_conflicts,
    shift_dates.

    Raises:
        InputError: the manifest or matching file cannot be read as one, the folder holds no scan, over 1 % of linked
            scans contradict their persons, another source shows the same scan, or a snapshot would take away over 5 %
            of its source's scans.
    """
    request = read_request(work.args)
    facts = FolderFacts()
    if request.manifest:
        content = request.manifest.read_bytes()
        manifest = read_manifest(content, request.folder, confined=request.confined)
        headers = read_paths(work, (request.locate(entry) for entry in manifest.entries))
        candidates = [candidate_of(request, entry, headers[request.locate(entry)]) for entry in manifest.entries]
        records, refusals, linker = manifest.size, manifest.refusals, None
    else:
        content, refusals = b"", []
        linker = read_match_file(Path(request.match)) if request.match not in MATCHES else None
        found = enumerate(read_folder(work, request.folder, facts), start=1)
        candidates = [Candidate(record=n, root=request.root, series=series) for n, series in found]
        records = len(candidates)
        if not records:
            raise InputError("Expected NIfTI files or DICOM series below the folder, found none; nothing was changed.")
    scans, refusals, tally = resolve(work, request, candidates, refusals, linker)
    file = FileRecord(
        name=request.manifest.name if request.manifest else ".",
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        records=records,
        dialect="csv" if request.manifest else "folder",
    )
    result = publish(work, request, file, scans, refusals, tally)
    if not request.manifest:
        result |= {"files": facts.files, "files_aside": dict(facts.aside), "list": LIST_NAME}
    if isinstance(linker, ByFile):
        result["unused_match_lines"] = linker.num_unused
    return result


def candidate_of(request: Request, entry: Entry, found: Found) -> Candidate:
    """A manifest's record and what was found at its place."""
    return Candidate(
        record=entry.record,
        root=entry.root or request.root,
        series=Series(path=entry.path, files=(), found=found),
        person_id=entry.person_id,
        acquired=entry.acquired,
        mask=entry.mask,
    )


def read_request(args: Mapping[str, Any]) -> Request:
    """The job's arguments, checked."""
    path, root = Path(args["path"]), args.get("root") or {}
    if not path.exists():
        raise InputError("Expected a manifest or a folder of scans, found nothing there on this host; check its path.")
    match = args.get("match") or ""
    if path.is_dir() and not match:
        raise InputError("Expected a manifest, got a folder; say with --match how its files name their persons.")
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
        match=match,
        allow_conflicts=bool(args.get("allow_conflicts")),
    )


def read_header(path: Path) -> Found:
    """The header of a file or folder, by what it looks like, read in this process."""
    try:
        return read_nifti(path) if is_nifti(path) and not path.is_dir() else read_dicom(path)
    except Unreadable as reason:
        return str(reason)
    except OSError:
        return "unreadable_file"


def resolve(
    work: Work, request: Request, candidates: list[Candidate], refusals: Iterable[Refusal], linker: Linker | None
) -> tuple[list[Scan], list[Refusal], Tally]:
    """Records and headers together: scans of known persons with a time, each once; the rest with a rule."""
    refused, tally = list(refusals), Tally()
    scans: dict[tuple[int, Any, str], Scan] = {}
    with work.connect() as connection:
        links = _link_all(connection, request, candidates, linker)
        persons = known_persons(connection, (link.person_id for link in links if link.person_id is not None))
        memory = read_memory(connection, work.settings)
    for candidate, link in zip(candidates, links, strict=True):
        work.check()
        scan = _scan(request, candidate, link, persons, memory)
        if isinstance(scan, Scan) and scan.key in scans:
            scan = Refusal(candidate.record, None, "duplicate_record")
        if isinstance(scan, Refusal):
            refused.append(scan)
        else:
            scans[scan.key] = scan
            tally.linked += 1
            tally.conflicts += CONFLICT in scan.header.reasons
    return list(scans.values()), sorted(refused, key=lambda refusal: refusal.record), tally


def _link_all(
    connection: Connection, request: Request, candidates: list[Candidate], linker: Linker | None
) -> list[Link]:
    """Whose each candidate is said to be, before it is known whether there is such a person."""
    if request.match == MATCHES[1]:
        texts = (source_value_text(c.series.path, header) for c in candidates if (header := c.header))
        linker = BySourceValue(source_values(connection, (text for text in texts if text)))
    way = linker or ByPersonId()
    return [
        Link(person_id=c.person_id)
        if c.person_id is not None
        else way.link(c.series.path, c.header)
        if c.header
        else Link()
        for c in candidates
    ]


def _scan(
    request: Request, candidate: Candidate, link: Link, persons: Mapping[int, Person], memory: Memory
) -> Scan | Refusal:
    header, record = candidate.header, candidate.record
    if header is None:
        return Refusal(record, "path", str(candidate.series.found))
    if (link.person_id is not None and memory.has_person(link.person_id)) or (
        link.person_id is None and header.patient and memory.has_value(header.patient)
    ):
        return Refusal(record, "person_id", RULE)
    if link.person_id not in persons or link.person_id is None:
        return Refusal(record, "person_id", link.rule or "unknown_person")
    person = persons[link.person_id]
    when = _when(request, candidate, link, header)
    if when is None:
        return Refusal(record, "acquired_at", "no_acquisition_time")
    if request.shift:
        when = replace(when, at=request.shift.moved(person.person_id, when.at))
    years = 1 if request.shift else 0  # dates that moved may have crossed a new year
    if not request.arbitrary_pairing and (link.contradicts or contradicts(header, person, tolerance_years=years)):
        header = replace(header, reasons=(*header.reasons, CONFLICT))
    mask, fault = mask_path(link.mask or "", request.folder, request.folder)
    if fault:
        return Refusal(record, "mask", fault)
    mask = mask or candidate.mask
    return Scan(record, person.person_id, when, candidate.root, candidate.series, header, mask)


def _when(request: Request, candidate: Candidate, link: Link, header: Header) -> Acquired | None:
    """What was declared for the scan, else its header, else a NIfTI file's name."""
    stated = candidate.acquired or link.acquired or header.acquired
    if stated is None and not request.manifest and header.format == "nifti":
        stated = name_time(candidate.series.path)
    return stated


def publish(
    work: Work, request: Request, file: FileRecord, scans: list[Scan], refusals: list[Refusal], tally: Tally
) -> dict[str, Any]:
    """Put the scans beside or in place of what the source showed before, in one transaction."""
    from app.loading import images_store as store

    if tally.conflicts > MOST_CONFLICTS * tally.linked and not request.allow_conflicts:
        _stop_for_conflicts(work, file, refusals, tally)
    with work.connect() as connection:
        days = count_scan_days(connection, [(s.person_id, s.acquired.at.date()) for s in scans])
    row = _load_row(request, file, scans, refusals, days)
    result: dict[str, Any] = {
        "source": request.source,
        "read": row.num_read,
        "loaded": row.num_loaded,
        "rejected": row.num_rejected,
        "rejects_by_rule": dict(row.rejects_by_rule),
        "verdicts": dict(Counter(s.header.verdict for s in scans)),
        "reasons": {rule: count for rule, count in row.flags_by_rule.items() if rule != UNMET},
        "scan_days": {
            "scans": days.scans,
            "with_ct": days.with_ct,
            "with_ct_or_visit": days.with_ct_or_visit,
            "ct_by": days.ct_by,
        },
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
    if not stops:
        result["summary"] += _warning(days)
    if stops:
        raise InputError(
            f"Expected the scans of source {request.source!r} again, but {len(lost):,} of {len(before):,} would "
            "vanish; give --allow-shrink if that is meant, or another --source to keep both."
        )
    return result


def _stop_for_conflicts(work: Work, file: FileRecord, refusals: list[Refusal], tally: Tally) -> None:
    with work.transaction() as connection:
        _write_rejects(connection, None, work.job_id, file, refusals)
    raise InputError(
        f"Expected scans whose headers agree with their persons, but sex, birth year or another identifier differs for "
        f"{tally.conflicts:,} of {tally.linked:,}; nothing was published. Check how scans are matched to persons, or "
        "give --allow-conflicts to load them as suspect."
    )


def _warning(days: ScanDays) -> str:
    """What the closing line adds about scans and the records of their days."""
    if not days.scans:
        return ""
    told = f"; {days.share:.0%} have a CT procedure (by {days.ct_by}) or a visit on their day"
    if days.share >= FEW_MET:
        return told
    return told + ": warning, dates of records and of scans may have been shifted apart"


def _load_row(
    request: Request, file: FileRecord, scans: list[Scan], refusals: list[Refusal], days: ScanDays
) -> LoadRow:
    flags = Counter(reason for s in scans for reason in s.header.reasons)
    unmet = days.scans - days.with_ct_or_visit
    return LoadRow(
        kind="images",
        mode=request.mode,
        table_name=TABLE,
        files=[file],
        content_sha256=_content_digest(request, file, scans, refusals),
        num_read=file.records,
        num_loaded=len(scans),
        rejects_by_rule=Counter(r.rule for r in refusals),
        flags_by_rule=flags | ({UNMET: unmet} if unmet else {}),
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
