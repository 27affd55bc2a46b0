"""A small, hand-made OMOP extract and its scans, for tests that need files but no statistics."""

from __future__ import annotations

import csv
import datetime as dt
from pathlib import Path

DIABETES, STROKE = 201826, 443454


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    """Rows as a CSV file with a header."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_extract(folder: Path, persons: int = 6) -> Path:
    """Persons 1, 2, … born in 1960, observed 2015 to 2024; each has diabetes, every other one a stroke."""
    folder.mkdir(parents=True, exist_ok=True)
    people = range(1, persons + 1)
    write_csv(
        folder / "person.csv",
        [
            {
                "person_id": person,
                "gender_concept_id": 8507 if person % 2 else 8532,
                "year_of_birth": 1960,
                "race_concept_id": 0,
                "ethnicity_concept_id": 0,
            }
            for person in people
        ],
    )
    write_csv(
        folder / "observation_period.csv",
        [
            {
                "observation_period_id": person,
                "person_id": person,
                "observation_period_start_date": "2015-01-01",
                "observation_period_end_date": "2024-12-31",
                "period_type_concept_id": 0,
            }
            for person in people
        ],
    )
    write_csv(folder / "condition_occurrence.csv", [*_conditions(people)])
    return folder


def _conditions(people: range) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for person in people:
        for concept, day in ((DIABETES, dt.date(2018, 1, 1)), (STROKE, dt.date(2021, 6, 1 + person % 28))):
            if concept == STROKE and person % 2:
                continue
            rows.append(
                {
                    "condition_occurrence_id": len(rows) + 1,
                    "person_id": person,
                    "condition_concept_id": concept,
                    "condition_start_date": day.isoformat(),
                    "condition_start_datetime": f"{day.isoformat()} 08:30:00",
                    "condition_type_concept_id": 0,
                }
            )
    return rows


def write_scans(folder: Path, persons: int = 6) -> Path:
    """A NIfTI volume of noise for each person, scanned on 2020-03-01 at noon, and the manifest of them."""
    import nibabel as nib
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    rows: list[dict[str, object]] = []
    for person in range(1, persons + 1):
        voxels = random.normal(-300, 200, (40, 40, 32)).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, np.diag([9.0, 9.0, 9.0, 1.0])), folder / f"{person}.nii.gz")
        rows.append({"person_id": person, "acquired_at": "2020-03-01 12:00:00", "path": f"{person}.nii.gz"})
    write_csv(folder / "manifest.csv", rows)
    return folder / "manifest.csv"
