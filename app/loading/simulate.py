"""A simulated cohort on disk: OMOP tables, phantoms, task files, true hazards. "Simulated" stands on everything."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import psutil

from app.loading import simulate_ehr as ehr
from app.loading.simulate_omop import TABLES, moment
from app.loading.simulate_phantom import BIOMARKERS, phantom, write_phantom

HORIZONS_DAYS = (365, 1095)

_NOTE = """\
SIMULATED DATA

Everything in this folder was made by a random number generator: persons, records, scans, outcomes.
No person stands behind any of it, and nothing learned from it says anything about the fate of persons.

persons  {persons}
seed     {seed}

omop/            an OMOP CDM 5.4 extract (source name "Lachesis simulated cohort")
images/          chest phantoms, NIfTI, one a person
manifest.csv     which phantom is whose, and when it was acquired
tasks/           the four outcomes that are judged
truth.csv        true log hazards a day: given everything, and as expected from the biomarkers in the image alone
latents.csv      standardised age and biomarkers of each person
parameters.json  rates and weights of every outcome
"""


def simulate(folder: Path, *, persons: int, seed: int, report: Callable[[int], None]) -> None:
    """Write a simulated cohort; the same seed writes the same bytes, and a smaller cohort holds the first persons.

    Args:
        folder: absent or empty. It appears complete, in one rename, or not at all.
        persons: number of persons, one scan each.
        seed: of persons and scans; the outcomes' parameters do not depend on it.
        report: called with the number of persons done since the last call.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    part.mkdir()
    try:
        drawn = [ehr.person(seed, number) for number in range(persons)]
        _write_records(part, drawn)
        _write_tasks(part / "tasks")
        parameters = [asdict(o) for o in (*ehr.findings(), *ehr.clinical())]
        (part / "parameters.json").write_text(json.dumps({"simulated": True, "outcomes": parameters}, indent=1) + "\n")
        (part / "SIMULATED.txt").write_text(_NOTE.format(persons=persons, seed=seed))
        _write_images(part, drawn, seed, report)
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _remove_leftovers(folder: Path) -> None:
    """What a killed simulation left beside `folder`; those of living processes stay."""
    for part in folder.parent.glob(f".{folder.name}.*.part"):
        pid = part.name.removesuffix(".part").rpartition(".")[2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(part, ignore_errors=True)


def _write_images(part: Path, drawn: Sequence[ehr.Person], seed: int, report: Callable[[int], None]) -> None:
    (part / "images").mkdir()
    for person in drawn:
        voxels = phantom(seed, person.person_id - 1, person.biomarkers)
        write_phantom(part / image_path(person.person_id), voxels)
        report(1)


def image_path(person_id: int) -> str:
    """Where a person's phantom lies in the cohort's folder."""
    return f"images/simulated-{person_id:06d}.nii"


def _write_records(part: Path, drawn: Sequence[ehr.Person]) -> None:
    (part / "omop").mkdir()
    for table in TABLES:
        write_csv(part / "omop" / f"{table.name}.csv", table.columns, table.rows(drawn))
    write_csv(
        part / "manifest.csv",
        ("person_id", "acquired_at", "path"),
        ((p.person_id, moment(p.scan, "T"), image_path(p.person_id)) for p in drawn),
    )
    write_csv(
        part / "latents.csv",
        ("person_id", "age", *BIOMARKERS),
        ((p.person_id, *(f"{x:.6f}" for x in (p.age, *p.biomarkers))) for p in drawn),
    )
    write_csv(part / "truth.csv", ("person_id", "task", "log_hazard", "log_hazard_image"), _truth(drawn))


def _truth(drawn: Sequence[ehr.Person]) -> Iterable[tuple[object, ...]]:
    outcomes = ehr.clinical()
    for person in drawn:
        known = ehr.log_hazards(outcomes, person.biomarkers, person.age)
        seen = ehr.log_hazards(outcomes, person.biomarkers, ehr.expected_age(person.biomarkers))
        for outcome, given_all, given_image in zip(outcomes, known, seen, strict=True):
            yield person.person_id, outcome.name, f"{given_all:.6f}", f"{given_image:.6f}"


def _write_tasks(folder: Path) -> None:
    folder.mkdir()
    for outcome in ehr.clinical():
        (folder / f"{outcome.name}.toml").write_text(
            f'name = "{outcome.name}"\n'
            f'title = "{outcome.title}"\n'
            f"concepts = [{outcome.concept_id}]\n"
            'prior = "exclude"\n'
            f"horizons_days = [{', '.join(map(str, HORIZONS_DAYS))}]\n"
        )


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A CSV file with a header line, LF line ends and empty cells for None."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
