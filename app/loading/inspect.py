"""Stage `load inspect`: the INSPECT data set as it is released: record, volumes, splits and labels.

Three steps, each a transaction of its own and each repeatable: the record through the loader of OMOP extracts, the
volumes through that of scans, then splits and labels. One that was broken off goes on where it stopped when it is
started again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from app.errors import InputError
from app.loading import images, omop
from app.loading.extract import find_extract
from app.loading.images_header import Header
from app.loading.images_manifest import Entry, Refusal
from app.loading.images_read import read_paths
from app.loading.inspect_files import OPTIONAL, REQUIRED, Sheet, Study, facts, find, person_id, read, studies
from app.loading.inspect_labels import UNITS, Released, Unit, labels, unit_of
from app.store import released as store
from app.store.loads import (
    LoadRow,
    Reject,
    content_digest,
    find_source,
    lock_publishing,
    open_source,
    published_loads,
    record_load,
    record_rejects,
    supersede,
)
from app.store.splits import OWN_WORDS
from app.store.work import Work

if TYPE_CHECKING:
    from sqlalchemy import Connection

ROOT = "inspect"
VOLUMES = "ctpa"


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What `lachesis load inspect` was asked for."""

    path: Path
    source: str
    ehr: Path | None
    volumes: Path | None
    tte_unit: str | None

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> Options:
        """From a job's arguments. Raises InputError where the folder or the unit is none."""
        path = Path(args["path"])
        if not path.is_dir():
            raise InputError(f"Expected the folder of the release, found the file {path.name}; give its folder.")
        unit = args.get("tte_unit")
        if unit is not None and unit not in UNITS:
            raise InputError(f"Expected one of {', '.join(UNITS)} for --tte-unit, got {unit!r}; give one of them.")
        return cls(
            path=path,
            source=str(args.get("source") or "inspect"),
            ehr=Path(args["ehr"]) if args.get("ehr") else None,
            volumes=Path(args["images"]) if args.get("images") else _volumes(path),
            tte_unit=unit,
        )


def _volumes(folder: Path) -> Path | None:
    """The folder CTPA, in the release or one folder below."""
    level = [p for p in sorted(folder.iterdir()) if p.is_dir()]
    level += [below for above in level for below in sorted(above.iterdir()) if below.is_dir()]
    return next((p for p in level if p.name.lower() == VOLUMES), None)


class Part:
    """The same work with the arguments of another loader."""

    def __init__(self, work: Work, args: dict[str, Any]) -> None:
        self._work, self.args = work, args

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def load(work: Work) -> dict[str, Any]:
    """Load a release (see docs/inspect.md).

    Args (of the job): path, source, ehr (folder of the OMOP tables, where it is not below path), images (folder of the
    volumes), tte_unit, and max_rejects, allow_shrink and data_cut as the loader of OMOP extracts has them.

    Raises:
        InputError: a file of the release is missing or cannot be read, there is no record, or what the loaders of
            extracts and scans raise.
    """
    options = Options.of(work.args)
    sheets = read_sheets(options.path)
    found = studies(sheets["study_mapping"])
    if not found:
        raise InputError(
            f"Expected studies in {sheets['study_mapping'].file.name}, found none that can be read; "
            "give the file as it was released."
        )
    record = load_record(work, options)
    scans = load_scans(work, options, sheets, found)
    return finish(work, options, sheets, found, record, scans)


def read_sheets(folder: Path) -> dict[str, Sheet]:
    """The tables of the release. Raises InputError where one that is needed is missing."""
    sheets = {}
    for name in (*REQUIRED, *OPTIONAL):
        path = find(folder, name)
        if path is not None:
            sheets[name] = read(path, name)
        elif name in REQUIRED:
            raise InputError(
                f"Expected {name}_YYYYMMDD.tsv in the folder of the release, found none; download it to there."
            )
    return sheets


def load_record(work: Work, options: Options) -> dict[str, Any] | None:
    """Load the OMOP tables; None where there are none and the store shows the source's persons already."""
    place = options.ehr or options.path
    try:
        find_extract(place)
    except InputError:
        with work.connect() as connection:
            known = store.has_persons(connection, find_source(connection, options.source))
        if options.ehr is not None or not known:
            raise InputError(
                "Expected the OMOP tables of the record (person.csv, …) below the folder or in --ehr, found none; "
                f"download them to there, or load the record first under --source {options.source}."
            ) from None
        return None
    passed = ("max_rejects", "allow_shrink", "data_cut")
    args = {"path": str(place), "source": options.source, **{k: work.args[k] for k in passed if k in work.args}}
    return omop.load(cast("Work", Part(work, args)))


def load_scans(work: Work, options: Options, sheets: Mapping[str, Sheet], found: list[Study]) -> dict[str, Any] | None:
    """Load the headers of the volumes that are there; None where there is no folder of them."""
    if options.volumes is None:
        return None
    args = {"path": str(options.volumes), "match": "person_id", "source": options.source}
    request = images.read_request(args | {"allow_shrink": bool(work.args.get("allow_shrink"))})
    request = replace(request, root=ROOT)
    mapping = sheets["study_mapping"]
    entries = [Entry(study.record, study.person_id, study.acquired, study.path) for study in found]
    refusals = [Refusal(record, column, rule) for record, column, rule in mapping.refused]
    headers = read_paths(work, (request.locate(entry) for entry in entries))
    known = facts(sheets.get("series_metadata"), sheets.get("study_metadata"))
    for study in found:
        path = request.locate(Entry(study.record, study.person_id, None, study.path))
        header = headers[path]
        if isinstance(header, Header) and (told := known.get(study.image_id)):
            thickness = header.slice_thickness_mm or told.thickness_mm
            headers[path] = replace(header, slice_thickness_mm=thickness, kernel=header.kernel or told.kernel)
    candidates = [images.candidate_of(request, entry, headers[request.locate(entry)]) for entry in entries]
    scans, refusals, tally = images.resolve(work, request, candidates, refusals, None)
    return images.publish(work, request, mapping.file, scans, refusals, tally)


def judge_splits(sheet: Sheet, known: set[int]) -> dict[int, str]:
    """Person → split; records that cannot be used are refused: a person in two splits is in none."""
    splits: dict[int, set[str]] = {}
    rows: dict[int, list[int]] = {}
    for row in sheet.rows:
        person, word = person_id(row.values["person_id"]), OWN_WORDS.get(row.values["split"].lower())
        if person is None:
            sheet.refused.append((row.record, "person_id", "unparsable_id"))
        elif word is None:
            sheet.refused.append((row.record, "split", "unknown_split"))
        elif person not in known:
            sheet.refused.append((row.record, "person_id", "unknown_person"))
        else:
            splits.setdefault(person, set()).add(word)
            rows.setdefault(person, []).append(row.record)
    for person, words in splits.items():
        if len(words) > 1:
            sheet.refused += [(record, "split", "conflicting_split") for record in rows[person]]
    return {person: next(iter(words)) for person, words in splits.items() if len(words) == 1}


@dataclass(slots=True)
class Judged:
    """The labels of known studies of known persons."""

    labels: list[tuple[Study, Released]]
    num_studies: int
    strange: int
    """Cells that cannot be understood."""


def judge_labels(sheet: Sheet, found: list[Study], known: set[int]) -> Judged:
    """Labels by study; records of unknown studies or persons are refused."""
    sheet.once("impression_id")
    by_impression = {study.impression_id: study for study in found}
    judged = Judged([], 0, 0)
    for row in sheet.rows:
        study = by_impression.get(row.values["impression_id"])
        if study is None:
            sheet.refused.append((row.record, "impression_id", "unknown_study"))
        elif study.person_id not in known:
            sheet.refused.append((row.record, "impression_id", "unknown_person"))
        else:
            made, strange = labels(row)
            judged.labels += [(study, label) for label in made]
            judged.num_studies += 1
            judged.strange += strange
    return judged


def find_unit(connection: Connection, judged: Judged, given: str | None) -> Unit:
    """The unit of the released times, by one censored time a study against the person's last event."""
    censored: dict[str, tuple[Study, float]] = {}
    for study, label in judged.labels:
        if label.kind == "tte" and label.status == "censored" and label.time is not None and study.acquired:
            censored.setdefault(study.impression_id, (study, label.time))
    last = store.last_events(connection, (study.person_id for study, _ in censored.values()))
    pairs = [
        (time, (last[study.person_id] - study.acquired.at).total_seconds())
        for study, time in censored.values()
        if study.person_id in last and study.acquired
    ]
    return unit_of(pairs, given)


def finish(
    work: Work,
    options: Options,
    sheets: Mapping[str, Sheet],
    found: list[Study],
    record: dict[str, Any] | None,
    scans: dict[str, Any] | None,
) -> dict[str, Any]:
    """Write splits and labels in one transaction, unless all is as it was; the job's result."""
    splits, released = sheets["splits"], sheets["labels"]
    persons = {study.person_id for study in found} | {
        p for row in splits.rows if (p := person_id(row.values["person_id"])) is not None
    }
    with work.transaction() as connection:
        lock_publishing(connection, work.check)
        source_id = open_source(connection, options.source)
        known = store.known_persons(connection, persons)
        own = judge_splits(splits, known)
        judged = judge_labels(released, found, known)
        unit = find_unit(connection, judged, options.tte_unit)
        moved = store.put_splits(connection, own)
        digest = content_digest([splits.file, released.file, sheets["study_mapping"].file], f"unit={unit.name}")
        shown = published_loads(connection, source_id)
        same = all(name in shown and shown[name][-1].content_sha256 == digest for name in ("split", "released_label"))
        same = same and all(part is None or part["unchanged"] for part in (record, scans)) and not moved
        if not same:
            _write(connection, work, source_id, splits, _row("split", splits, digest, {}), shown)
            row = _row("released_label", released, digest, {"unparsable_label": judged.strange})
            load_id = _write(connection, work, source_id, released, row, shown)
            by_path = store.images_by_path(connection, source_id, ROOT)
            store.put_labels(connection, source_id, _rows(judged, by_path, unit, load_id))
    return _result(options, found, own, judged, unit, (record, scans), unchanged=same)


def _row(table: str, sheet: Sheet, digest: bytes, flags: dict[str, int]) -> LoadRow:
    rejects = Counter(rule for _, _, rule in sheet.refused)
    return LoadRow(
        kind="inspect",
        mode="snapshot",
        table_name=table,
        files=[sheet.file],
        content_sha256=digest,
        num_read=sheet.file.records,
        num_loaded=sheet.file.records - len(sheet.refused),
        rejects_by_rule=rejects,
        flags_by_rule={rule: count for rule, count in flags.items() if count},
    )


def _write(
    connection: Connection, work: Work, source_id: int, sheet: Sheet, row: LoadRow, shown: Mapping[str, Any]
) -> int:
    """The books of one file; its load."""
    if row.table_name in shown:
        supersede(connection, [found.load_id for found in shown[row.table_name]])
    load_id = record_load(connection, source_id, work.job_id, row)
    rejects = (
        Reject(table_name=row.table_name, file=sheet.file.name, record=record, rule=rule, column_name=column)
        for record, column, rule in sorted(sheet.refused)
    )
    record_rejects(connection, load_id, work.job_id, rejects)
    return load_id


def _rows(judged: Judged, by_path: Mapping[tuple[int, str], int], unit: Unit, load_id: int) -> Any:
    """Rows of label.released_label."""
    for study, label in judged.labels:
        days = label.time * unit.seconds / 86_400 if label.time is not None and unit.seconds else None
        image = by_path.get((study.person_id, study.path))
        yield (
            *(study.impression_id, study.person_id, image, label.task, label.kind, label.horizon_days),
            *(label.status, label.time, days, load_id),
        )


def _result(
    options: Options,
    found: list[Study],
    splits: Mapping[int, str],
    judged: Judged,
    unit: Unit,
    parts: tuple[dict[str, Any] | None, dict[str, Any] | None],
    *,
    unchanged: bool,
) -> dict[str, Any]:
    record, scans = parts
    count = Counter(splits.values())
    said = [
        f"record: {record['summary']}" if record else f"record: as source {options.source} shows it",
        f"of {len(found):,} studies {scans['summary']}" if scans else "scans: no folder CTPA, none loaded",
        f"splits of {len(splits):,} persons: "
        + ", ".join(f"{count[name]:,} {name}" for name in ("train", "tuning", "held_out")),
        f"{len(judged.labels):,} released labels of {judged.num_studies:,} studies",
        str(unit),
    ]
    return {
        "source": options.source,
        "unchanged": unchanged,
        "record": record,
        "scans": scans,
        "studies": len(found),
        "splits": dict(count),
        "released_labels": len(judged.labels),
        "unparsable_labels": judged.strange,
        "tte_unit": unit.name,
        "tte_unit_studies": unit.studies,
        "tte_unit_deviation": unit.deviation,
        "summary": ("unchanged: " if unchanged else "") + "; ".join(said),
    }
