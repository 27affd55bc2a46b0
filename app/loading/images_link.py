"""Whose scan it is: declared by a manifest, by ids in headers and names, or by a file; compared as text."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

from app.errors import InputError
from app.loading.images_header import Acquired, Header, parse_moment

if TYPE_CHECKING:
    from sqlalchemy import Connection

CONFLICT = "identity_conflict"
MOST_CONFLICTS = 0.01
"""A larger share of linked scans whose headers contradict their persons stops a load."""
KEYS = ("series_uid", "study_uid", "accession", "path", "patient_id")
"""Columns of a matching file that may name a scan, the most exact first: it counts, the others are compared."""
SEXES = {8507: "M", 8532: "F"}
_ID = re.compile(r"0|-?[1-9]\d{0,18}", re.ASCII)
_LIKE_ID = re.compile(r"[+-]?\d+", re.ASCII)
_NAMED = re.compile(r"(-?\d{1,19})(?:[_-](\d{8}(?:T?\d{4}(?:\d{2})?)?))?(?:[_.-].*)?", re.ASCII)
_SUBJECT = re.compile(r"sub-([A-Za-z0-9+]+)(?:[_.].*)?")
_DATED = re.compile(r".*?[_-](\d{8}(?:T?\d{4}(?:\d{2})?)?)(?:[_.-].*)?", re.ASCII)
_MOST_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Person:
    """What the store knows of a person that a header may contradict."""

    person_id: int
    sex: str | None
    birth_year: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """A person, or the rule by which there is none."""

    person_id: int | None = None
    rule: str | None = None
    acquired: Acquired | None = None
    """What the matching file says of it."""
    contradicts: bool = False
    """Whether the matching file's other columns say something else than the header."""
    mask: str | None = None
    """The path of a mask, as the matching file states it."""


class Linker(Protocol):
    """A declared way from scans to persons."""

    def link(self, path: str, header: Header) -> Link:
        """The link of the scan at a path relative to its root."""
        ...


def to_person_id(text: str) -> int | None:
    """A person id as it would be printed: 7, not 007, +7 or 7.0."""
    return int(text) if _ID.fullmatch(text) and -(2**63) <= int(text) < 2**63 else None


def person_id_text(path: str, header: Header) -> str | None:
    """The text that names a scan's person where `--match person_id` is declared.

    A PatientID that is a whole number, of whatever form, decides; then `sub-<number>` in the path; then a NIfTI file's
    name, `<number>…`; then the outermost folder, or a DICOM series' own, whose whole name is a number.
    """
    if header.patient and _LIKE_ID.fullmatch(header.patient):
        return header.patient
    parts = PurePosixPath(path).parts
    subjects = [found.group(1) for part in parts if (found := _SUBJECT.fullmatch(part))]
    if subjects and _LIKE_ID.fullmatch(subjects[0]):
        return subjects[0]
    if header.format == "nifti" and (named := _NAMED.fullmatch(parts[-1])):
        return named.group(1)
    folders = parts[:-1] if header.format == "nifti" else parts
    return next((part for part in folders if _LIKE_ID.fullmatch(part)), None)


def source_value_text(path: str, header: Header) -> str | None:
    """The text that names a scan's person where `--match person_source_value` is declared.

    The PatientID of a header, or of the JSON file beside a NIfTI file. Of a NIfTI file without one: the label of the
    outermost `sub-<label>` in its path, else its outermost folder, else its name up to the first `_` or `.`.
    """
    if header.patient or header.format == "dicom":
        return header.patient
    parts = PurePosixPath(path).parts
    subjects = [found.group(1) for part in parts if (found := _SUBJECT.fullmatch(part))]
    return subjects[0] if subjects else parts[0] if len(parts) > 1 else re.split(r"[_.]", parts[0])[0] or None


def name_time(path: str) -> Acquired | None:
    """The acquisition that a NIfTI file's name tells after its first part: `…_YYYYMMDD[Thhmm[ss]]…`."""
    found = _DATED.fullmatch(PurePosixPath(path).name)
    return parse_moment(found.group(1), "file_name") if found else None


@dataclass(frozen=True, slots=True)
class ByPersonId:
    """`--match person_id`."""

    def link(self, path: str, header: Header) -> Link:
        text = person_id_text(path, header)
        if text is None:
            return Link(rule="no_person_in_header" if header.format == "dicom" else "no_person_in_name")
        person_id = to_person_id(text)
        return Link(rule="unknown_person") if person_id is None else Link(person_id=person_id)


@dataclass(frozen=True, slots=True)
class BySourceValue:
    """`--match person_source_value`."""

    persons: Mapping[str, list[int]]

    def link(self, path: str, header: Header) -> Link:
        text = source_value_text(path, header)
        if text is None:
            return Link(rule="no_person_in_header")
        found = self.persons.get(text, [])
        if len(found) == 1:
            return Link(person_id=found[0])
        return Link(rule="ambiguous_person" if found else "unknown_person")


@dataclass(frozen=True, kw_only=True, slots=True)
class MatchRow:
    """One line of a matching file."""

    line: int
    person_id: int
    acquired: Acquired | None
    keys: Mapping[str, str]
    mask: str | None = None


@dataclass(slots=True)
class ByFile:
    """`--match FILE.csv`."""

    rows: list[MatchRow] = field(default_factory=list)
    by_key: dict[tuple[str, str], MatchRow] = field(default_factory=dict)
    used: set[int] = field(default_factory=set)

    def link(self, path: str, header: Header) -> Link:
        facts = {
            "series_uid": header.series_uid,
            "study_uid": header.study_uid,
            "accession": header.identity.get("accession"),
            "patient_id": header.patient,
        }
        places = [path, *(str(folder) for folder in PurePosixPath(path).parents)]
        for column in KEYS:
            for value in places if column == "path" else [facts[column]]:
                if value and (row := self.by_key.get((column, value))):
                    self.used.add(row.line)
                    return Link(
                        person_id=row.person_id,
                        acquired=row.acquired,
                        mask=row.mask,
                        contradicts=any(
                            facts[other] and stated and facts[other] != stated
                            for other, stated in row.keys.items()
                            if other not in (column, "path")
                        ),
                    )
        return Link(rule="not_in_match_file")

    @property
    def num_unused(self) -> int:
        return len(self.rows) - len(self.used)


def read_match_file(path: Path) -> ByFile:
    """A CSV file with `person_id`, one or more of KEYS, and maybe `acquired_at` and `mask`.

    A line may fill several keys: the first of KEYS that it fills is what scans are looked up by, the others are
    compared with their headers. Paths are relative to the loaded folder; those of scans may be folders'.

    Raises:
        InputError: it is none, naming the lines at fault.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise InputError("Expected a matching file in UTF-8, found none that can be read; check --match.") from None
    header = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",\t;", key=header.count))
    names = [name.strip().lower() for name in next(reader, [])]
    if "person_id" not in names or not set(names) & set(KEYS) or len(set(names)) < len(names):
        raise InputError(
            f"Expected a matching file with the columns person_id and one or more of {', '.join(KEYS)}, each once, "
            "found others; name the columns in its first line."
        )
    match, faults = ByFile(), []
    try:
        for values in reader:
            if values and (fault := _add_row(match, names, values, reader.line_num)):
                faults.append(f"line {reader.line_num}: {fault}")
    except csv.Error as error:
        raise InputError(f"Expected CSV, got something else at line {reader.line_num} ({error}); mend it.") from None
    if faults or not match.rows:
        shown = "; ".join(faults[:_MOST_SHOWN]) or "no line below the header"
        more = f"; and {len(faults) - _MOST_SHOWN:,} more" if len(faults) > _MOST_SHOWN else ""
        raise InputError(f"Expected a matching file without faults, found {shown}{more}; mend it and load again.")
    return match


def _add_row(match: ByFile, names: list[str], values: list[str], line: int) -> str | None:
    """Take a line in; what is wrong with it, without its values."""
    if len(values) != len(names):
        return f"{len(values)} fields, where the header has {len(names)}"
    stated = {name: value.strip() for name, value in zip(names, values, strict=True)}
    person_id = to_person_id(stated["person_id"])
    if person_id is None:
        return "person_id is no whole number as it would be printed"
    keys = {name: stated[name] for name in KEYS if stated.get(name)}
    if not keys:
        return f"none of {', '.join(name for name in KEYS if name in names)} is filled"
    if "path" in keys:
        keys["path"] = str(PurePosixPath(keys["path"]))
    moment = stated.get("acquired_at")
    acquired = parse_moment(moment, "match_file") if moment else None
    if moment and acquired is None:
        return "acquired_at is no time"
    row = MatchRow(line=line, person_id=person_id, acquired=acquired, keys=keys, mask=stated.get("mask") or None)
    first = next(iter(keys.items()))
    before = match.by_key.setdefault(first, row)
    if before is not row and (before.person_id, before.acquired, before.mask) != (person_id, acquired, row.mask):
        return f"the {first[0]} of line {before.line} again, with another person, time or mask"
    match.rows.append(row)
    return None


def source_values(connection: Connection, texts: Iterable[str]) -> dict[str, list[int]]:
    """person_source_value → the persons that have it, for the texts that any has."""
    from sqlalchemy import text

    rows = connection.execute(
        text(
            "SELECT person_source_value, array_agg(person_id ORDER BY person_id) FROM omop.person "
            "WHERE person_source_value = ANY(:texts) GROUP BY 1"
        ),
        {"texts": sorted(set(texts))},
    )
    return {row[0]: list(row[1]) for row in rows}


def known_persons(connection: Connection, wanted: Iterable[int]) -> dict[int, Person]:
    """The persons of the store among some."""
    from sqlalchemy import text

    rows = connection.execute(
        text(
            "SELECT person_id, gender_concept_id, extract(year FROM birth_time)::int FROM omop.person "
            "WHERE person_id = ANY(:wanted)"
        ),
        {"wanted": sorted(set(wanted))},
    )
    return {row[0]: Person(person_id=row[0], sex=SEXES.get(row[1]), birth_year=row[2]) for row in rows}


def contradicts(header: Header, person: Person, *, tolerance_years: int) -> bool:
    """Whether sex or birth year are known on both sides and differ."""
    sex, born = header.identity.get("sex", "").upper(), header.identity.get("birth_year")
    if sex in ("M", "F") and person.sex and sex != person.sex:
        return True
    return bool(born and person.birth_year and abs(int(born) - person.birth_year) > tolerance_years)
