"""Rows of a small store, written straight into the tables, for tests that need exact timelines."""

from __future__ import annotations

import datetime as dt
import hashlib
import itertools
import struct
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, Engine, text

EPOCH = dt.datetime(1970, 1, 1)
SECOND = dt.timedelta(seconds=1)


class Records:
    """Inserts rows under one load each for persons, events and scans; `pack` makes the timelines."""

    def __init__(self, connection: Connection, *, data_cut: dt.date | None = None) -> None:
        self.connection = connection
        self.ids = itertools.count(1)
        self.source_id = self.value(
            "INSERT INTO ops.source (name, data_cut, details) VALUES ('test', :cut, CAST(:details AS jsonb)) "
            "RETURNING source_id",
            cut=data_cut,
            details='{"roots": {"images": "/scans"}}',
        )
        self.load_id = self.value(
            "INSERT INTO ops.load (source_id, kind, mode, table_name, state, files, content_sha256, num_read, "
            "num_loaded, num_rejected) VALUES (:source, 'omop', 'snapshot', 'person', 'published', '[]', '', 0, 0, 0) "
            "RETURNING load_id",
            source=self.source_id,
        )
        self.do(f"CREATE TABLE omop.event_test_{self.load_id} PARTITION OF omop.event FOR VALUES IN ({self.load_id})")

    def do(self, statement: str, **values: Any) -> None:
        self.connection.execute(text(statement), values)

    def value(self, statement: str, **values: Any) -> Any:
        return self.connection.execute(text(statement), values).scalar_one()

    def person(
        self, person_id: int, *, birth: str | None = "1960-01-01", gender: int = 8507, split: str | None = None
    ) -> None:
        self.do(
            "INSERT INTO omop.person (person_id, birth_time, gender_concept_id, split, load_id) "
            "VALUES (:person, CAST(:birth AS timestamp), :gender, :split, :load)",
            person=person_id, birth=birth, gender=gender, split=split, load=self.load_id,
        )  # fmt: skip

    def period(self, person_id: int, start: object, end: object) -> None:
        self.do(
            "INSERT INTO omop.observation_period "
            "VALUES (:id, :person, CAST(:start AS date), CAST(:end AS date), :load)",
            id=next(self.ids), person=person_id, start=str(start), end=str(end), load=self.load_id,
        )  # fmt: skip

    def event(
        self, person_id: int, time: str | dt.datetime, concept: int, *, date_only: bool = False, domain: str = "c",
        source: int = 0, value: float | None = None, unit: int | None = None, coded: int | None = None,
        visit: int | None = None,
    ) -> None:  # fmt: skip
        self.do(
            "INSERT INTO omop.event (person_id, time, date_only, concept_id, source_concept_id, value_as_number, "
            "value_as_concept_id, unit_concept_id, visit_occurrence_id, domain, source_row_id, load_id) "
            "VALUES (:person, CAST(:time AS timestamp), :date_only, :concept, :source, :value, :coded, :unit, :visit, "
            ":domain, :id, :load)",
            person=person_id, time=str(time), date_only=date_only, concept=concept, source=source, value=value,
            coded=coded, unit=unit, visit=visit, domain=domain, id=next(self.ids), load=self.load_id,
        )  # fmt: skip

    def day(self, person_id: int, day: object, concept: int, **values: Any) -> None:
        """A date-only event."""
        self.event(person_id, f"{day} 23:59:59", concept, date_only=True, **values)

    def death(self, person_id: int, time: object, *, date_only: bool = False) -> None:
        self.event(person_id, str(time), 4306655, date_only=date_only, domain="x")

    def visit(
        self, person_id: int, start: object, end: object | None, concept: int = 9201, *, key: int | None = None,
        date_only: bool = False, end_date_only: bool = False,
    ) -> int:  # fmt: skip
        """A visit and its start as an event; its id."""
        visit_id = next(self.ids) if key is None else key
        self.do(
            "INSERT INTO omop.visit_occurrence (visit_occurrence_id, person_id, visit_concept_id, "
            "visit_start_datetime, visit_end_datetime, date_only, end_date_only, load_id) "
            "VALUES (:id, :person, :concept, CAST(:start AS timestamp), "
            "CAST(:end AS timestamp), :date_only, :end_date_only, :load)",
            id=visit_id, person=person_id, concept=concept, start=str(start), end=end and str(end),
            date_only=date_only, end_date_only=end_date_only, load=self.load_id,
        )  # fmt: skip
        self.event(person_id, str(start), concept, date_only=date_only, domain="v", visit=visit_id)
        return visit_id

    def scan(self, person_id: int, time: object, **columns: Any) -> int:
        number = next(self.ids)
        row = {
            "person_id": person_id, "acquired_at": str(time), "date_only": False, "study_uid": None,
            "series_uid": None, "image_key": f"images/{number}.nii", "root": "images", "path": f"{number}.nii",
            "slices": 64, "spacing_mm": [1.0, 1.0, 2.0], "slice_thickness_mm": None, "kernel": None,
            "orientation": "RAS", "verdict": "ok",
        } | columns  # fmt: skip
        names = ", ".join(row)
        marks = ", ".join("CAST(:acquired_at AS timestamp)" if n == "acquired_at" else f":{n}" for n in row)
        return int(
            self.value(
                f"INSERT INTO omop.image_occurrence ({names}, acquired_at_source, format, load_id) "
                f"VALUES ({marks}, 'manifest', 'nifti', :load) RETURNING image_occurrence_id",
                **row,
                load=self.load_id,
            )
        )

    def concepts(self, concepts: Iterable[int], vocabulary: str = "SNOMED", standard: str | None = "S") -> None:
        for concept in concepts:
            self.do(
                "INSERT INTO omop.concept (concept_id, concept_name, domain_id, vocabulary_id, concept_class_id, "
                "standard_concept, concept_code) VALUES (:id, :name, 'Condition', :vocabulary, 'Finding', :standard, "
                ":code)",
                id=concept, name=f"concept {concept}", vocabulary=vocabulary, standard=standard, code=f"c{concept}",
            )  # fmt: skip

    def ancestors(self, rows: Iterable[tuple[int, int, int]]) -> None:
        """(ancestor, descendant, levels) rows."""
        for ancestor, descendant, levels in rows:
            self.do(
                "INSERT INTO omop.concept_ancestor VALUES (:ancestor, :descendant, :levels, :levels)",
                ancestor=ancestor, descendant=descendant, levels=levels,
            )  # fmt: skip

    def pack(self) -> None:
        """Timelines of all persons with events, as a load packs them."""
        rows = self.connection.execute(
            text("SELECT person_id, time, date_only, concept_id FROM omop.event ORDER BY person_id")
        ).all()
        self.do("TRUNCATE omop.timeline")
        for person_id, group in itertools.groupby(rows, key=lambda row: row.person_id):
            coded = sorted(((row.time - EPOCH) // SECOND * 2 + row.date_only, row.concept_id) for row in group)
            times = struct.pack(f"<{len(coded)}q", *(time for time, _ in coded))
            concepts = struct.pack(f"<{len(coded)}i", *(concept for _, concept in coded))
            self.do(
                "INSERT INTO omop.timeline VALUES (:person, :n, :times, :concepts, :digest)",
                person=person_id, n=len(coded), times=times, concepts=concepts,
                digest=hashlib.sha256(times + concepts).digest()[:16],
            )  # fmt: skip


def rows(engine: Engine, statement: str, **values: Any) -> Sequence[Any]:
    """Rows of a question to the store."""
    with engine.connect() as connection:
        return connection.execute(text(statement), values).all()
