"""A small imitation of the INSPECT release: its files, names, columns and quirks, with labels made from its record."""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import Sequence
from pathlib import Path

from tests.app.loading.extracts import CONDITION_HEADER, DEATH_HEADER, VISIT_HEADER, write
from tests.app.loading.scans import write_nifti

TTE = ("mortality", "readmission", "PH", "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural_Effusion")
CODES = {"Atelectasis": 261880, "Cardiomegaly": 314658, "Consolidation": 4158163, "Edema": 433595,
         "Pleural_Effusion": 254061, "PH": 4013643}  # fmt: skip
WITHOUT_RECORD, WITHOUT_TIME, WITHOUT_VOLUME, TWICE = 900, 3, 4, 5
"""A person without EHR rows; persons whose first study has no time, no volume, or stands twice in every file."""
SPLITS = ("train", "train", "train", "valid", "test")
OTHER = 320128


def moment(time: dt.datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


class Person:
    """A person's events, and one to three studies among them."""

    def __init__(self, number: int, rng: random.Random) -> None:
        self.person_id = 100 + number
        self.split = SPLITS[number % len(SPLITS)]
        start = dt.datetime(2010, 1, 1) + dt.timedelta(days=rng.randrange(400))
        self.events = sorted(
            (start + dt.timedelta(minutes=rng.randrange(5 * 525_600)), rng.choice([OTHER, *CODES.values()]))
            for _ in range(20)
        )
        last = self.events[-1][0]
        self.death = last + dt.timedelta(days=3) if number % 4 == 0 else None
        self.studies = [start + dt.timedelta(days=400 * (k + 1), hours=9, minutes=7) for k in range(1 + number % 3)]

    @property
    def last(self) -> dt.datetime:
        return max(self.events[-1][0], self.death or dt.datetime.min)

    def tte(self, name: str, index: dt.datetime) -> tuple[dt.timedelta, bool]:
        """Time and whether it is censored, as the labelers have it: next occurrence, else the last event."""
        wanted = [self.death] if name == "mortality" and self.death else []
        wanted += [time for time, code in self.events if code == CODES.get(name)]
        later = [time for time in wanted if time > index + dt.timedelta(minutes=1)]
        return (min(later) - index, False) if later else (self.last - index, True)

    def within(self, name: str, index: dt.datetime, days: int) -> str:
        time, censored = self.tte(name, index)
        if not censored and time <= dt.timedelta(days=days):
            return "TRUE"
        return "FALSE" if self.last >= index + dt.timedelta(days=days) else "CENSORED"


def release(folder: Path, *, persons: int = 12, unit_seconds: float = 60, seed: int = 7) -> list[Person]:
    """Write a release to `folder` (tables, `EHR/`, `CTPA/`); the persons in it.

    A study is named impression `i<person>_<k>` and image `PE<person><k>`. Rows are shuffled; the study of person
    `100 + TWICE` stands twice; a person without a record has a study; one volume is missing and one study has no time.
    """
    rng = random.Random(seed)
    made = [Person(number, rng) for number in range(1, persons + 1)]
    mapping, labels, splits, series = [], [], [], []
    for person in made:
        for k, index in enumerate(person.studies):
            impression, image = f"i{person.person_id}_{k}", f"PE{person.person_id}{k}"
            number, first = person.person_id - 100, k == 0
            when = "" if first and number == WITHOUT_TIME else moment(index)
            copies = 2 if first and number == TWICE else 1
            mapping += [f"{impression}\t{person.person_id}\t{image}\tn{image}\t{number}{k}\t{when}\t\tstarr"] * copies
            splits += [f"{impression}\t{person.person_id}\t{person.split}"] * copies
            labels += [label_row(person, impression, index, unit_seconds)] * copies
            series += [f"{image}\tSIEMENS\t300\t1.25", f"{image}\tSIEMENS\t40\t5.0"]
            if not (first and number == WITHOUT_VOLUME):
                write_nifti(folder / "CTPA" / f"{image}.nii.gz")
    mapping.append(f"i{WITHOUT_RECORD}_0\t{WITHOUT_RECORD}\tPE{WITHOUT_RECORD}\tn\t1\t2015-01-01 10:00:00\t\tstarr")
    splits.append(f"i{WITHOUT_RECORD}_0\t{WITHOUT_RECORD}\ttrain")
    write_nifti(folder / "CTPA" / f"PE{WITHOUT_RECORD}.nii.gz")
    for rows in (mapping, labels, splits, series):
        rng.shuffle(rows)
    mapped = "impression_id person_id image_id note_id procedure_occurrence_id procedure_DATETIME note_DATETIME"
    described = "image_id Manufacturer num_slices SliceThickness"
    tables: dict[str, Sequence[str]] = {
        "splits_20250611.tsv": ["impression_id\tperson_id\tsplit", *splits],
        "labels_20250611.tsv": ["\t".join(label_columns()), *labels],
        "study_mapping_20250611.tsv": ["\t".join([*mapped.split(), "provenance"]), *mapping],
        "series_metadata_20250611.tsv": ["\t".join(described.split()), *series],
        "impressions_20250611.tsv": ["impression_id\timpressions"],
        "image_ehr_crosswalk_20250418.csv": ["image_id,person_id"],
    }
    write(folder, tables)
    write_record(folder / "EHR", made)
    return made


def label_columns() -> list[str]:
    horizons = [f"{months}_month_{name}" for name in ("mortality", "readmission") for months in (1, 6, 12)]
    times = [column for name in TTE for column in (f"tte_{name}", f"is_censored_{name}")]
    return ["impression_id", "pe_positive_nlp", "pe_acute", *horizons, "12_month_PH", *times]


def label_row(person: Person, impression: str, index: dt.datetime, unit_seconds: float) -> str:
    cells = [impression, "True" if person.person_id % 5 == 0 else "False", ""]
    cells += [person.within(name, index, days) for name in ("mortality", "readmission") for days in (30, 180, 365)]
    cells.append(person.within("PH", index, 365))
    for name in TTE:
        time, censored = person.tte(name, index)
        cells += [repr(time.total_seconds() / unit_seconds), str(censored).upper()]
    return "\t".join(cells)


def write_record(folder: Path, persons: Sequence[Person]) -> None:
    """The record as OMOP tables; `visit_occurrence` holds a visit for each study."""
    people = ["person_id,gender_concept_id,year_of_birth,month_of_birth,day_of_birth,race_concept_id"]
    periods = ["observation_period_id,person_id,observation_period_start_date,observation_period_end_date"]
    conditions, visits, deaths = [CONDITION_HEADER], [VISIT_HEADER], [DEATH_HEADER]
    for person in persons:
        number = person.person_id
        people.append(f"{number},8532,1950,1,{1 + number % 28},8527")
        periods.append(f"{number},{number},2009-01-01,{person.last:%Y-%m-%d}")
        for k, (time, code) in enumerate(person.events):
            conditions.append(f"{number * 100 + k},{number},{code},{time:%Y-%m-%d},{moment(time)},,,0,,0")
        for k, index in enumerate(person.studies):
            end = index + dt.timedelta(hours=5)
            visits.append(
                f"{number * 100 + k},{number},9203,{index:%Y-%m-%d},{moment(index)},{end:%Y-%m-%d},{moment(end)},0,,"
            )
        if person.death:
            deaths.append(f"{number},{person.death:%Y-%m-%d},{moment(person.death)},0,0")
    write(
        folder,
        {
            "person": people,
            "observation_period": periods,
            "condition_occurrence": conditions,
            "visit_occurrence": visits,
            "death": deaths,
        },
    )
