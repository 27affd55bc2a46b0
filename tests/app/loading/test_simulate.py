"""The simulated cohort: reproducible, named as simulated, with the hazards it says it has."""

from __future__ import annotations

import csv
import datetime as dt
import hashlib
import os
import tomllib
from pathlib import Path

import nibabel
import numpy as np
import pytest

from app.loading import simulate_ehr as ehr
from app.loading.simulate import simulate
from app.loading.simulate_phantom import DESCRIPTION, SHAPE_ZYX, phantom

PERSONS = 40


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def digests(folder: Path) -> dict[str, str]:
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simulated") / "cohort"
    done: list[int] = []
    simulate(folder, persons=PERSONS, seed=3, report=done.append)
    assert sum(done) == PERSONS
    return folder


@pytest.fixture(scope="module")
def many() -> list[ehr.Person]:
    return [ehr.person(11, number) for number in range(4000)]


def test_the_same_seed_writes_the_same_bytes(cohort: Path, tmp_path: Path) -> None:
    simulate(tmp_path / "again", persons=PERSONS, seed=3, report=lambda n: None)
    assert digests(tmp_path / "again") == digests(cohort)


def test_a_small_cohort_is_the_beginning_of_a_large_one(cohort: Path, tmp_path: Path) -> None:
    simulate(tmp_path / "small", persons=5, seed=3, report=lambda n: None)
    small, large = digests(tmp_path / "small"), digests(cohort)
    images = [name for name in small if name.startswith("images/")]
    assert len(images) == 5
    assert all(small[name] == large[name] for name in images)
    assert rows(tmp_path / "small" / "omop" / "person.csv") == rows(cohort / "omop" / "person.csv")[:5]


def test_another_seed_makes_other_persons_and_the_same_outcomes(cohort: Path, tmp_path: Path) -> None:
    simulate(tmp_path / "other", persons=5, seed=4, report=lambda n: None)
    other, first = digests(tmp_path / "other"), digests(cohort)
    assert other["parameters.json"] == first["parameters.json"]
    assert other["images/simulated-000001.nii"] != first["images/simulated-000001.nii"]


def test_an_interrupted_simulation_leaves_nothing(tmp_path: Path) -> None:
    def stop(n: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(tmp_path / "cohort", persons=5, seed=0, report=stop)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_simulation_left_is_removed_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    dead = tmp_path / ".cohort.4194399.part"
    living = tmp_path / f".cohort.{os.getppid()}.part"
    for folder in (dead, living):
        folder.mkdir()
    simulate(tmp_path / "cohort", persons=2, seed=0, report=lambda n: None)
    assert not dead.exists()
    assert living.exists()


def test_simulated_stands_on_everything(cohort: Path) -> None:
    assert (cohort / "SIMULATED.txt").read_text().startswith("SIMULATED DATA")
    assert rows(cohort / "omop" / "cdm_source.csv")[0]["cdm_source_name"] == "Lachesis simulated cohort"
    own = [r for r in rows(cohort / "omop" / "concept.csv") if int(r["concept_id"]) > 2_000_000_000]
    assert own
    assert all("simulated" in r["concept_name"] for r in own)
    image = nibabel.load(cohort / "images" / "simulated-000001.nii")
    assert image.header["descrip"].tobytes().rstrip(b"\0").decode() == DESCRIPTION
    for file in (cohort / "tasks").iterdir():
        task = tomllib.loads(file.read_text())
        assert task["name"] == file.stem
        assert "simulated" in task["title"]
        assert task["horizons_days"] == [365, 1095]


def test_every_concept_used_has_a_name_and_every_row_a_person(cohort: Path) -> None:
    concepts = {r["concept_id"] for r in rows(cohort / "omop" / "concept.csv")}
    persons = {r["person_id"] for r in rows(cohort / "omop" / "person.csv")}
    assert len(persons) == PERSONS
    for file in (cohort / "omop").glob("*.csv"):
        for row in rows(file):
            used = {v for k, v in row.items() if k.endswith("_concept_id")}
            assert used <= concepts, file.name
            assert row.get("person_id", next(iter(persons))) in persons
    assert {tomllib.loads(f.read_text())["concepts"][0] for f in (cohort / "tasks").iterdir()} <= {
        int(c) for c in concepts
    }


def test_the_ontology_has_levels(cohort: Path) -> None:
    levels = {
        (int(r["ancestor_concept_id"]), int(r["descendant_concept_id"])): int(r["min_levels_of_separation"])
        for r in rows(cohort / "omop" / "concept_ancestor.csv")
    }
    for finding in ehr.findings():
        assert levels[finding.concept_id, finding.concept_id] == 0
        assert levels[finding.group_id, finding.concept_id] == 1
        assert levels[ehr.ROOT_CONCEPT, finding.concept_id] == 2


def test_a_ct_code_stands_at_the_index_and_no_later_event_after_follow_up(cohort: Path) -> None:
    scans = {r["person_id"]: dt.datetime.fromisoformat(r["acquired_at"]) for r in rows(cohort / "manifest.csv")}
    for row in rows(cohort / "omop" / "procedure_occurrence.csv"):
        assert dt.datetime.fromisoformat(row["procedure_datetime"]) == scans[row["person_id"]]
    ends = {r["person_id"]: r["observation_period_end_date"] for r in rows(cohort / "omop" / "observation_period.csv")}
    deaths = {
        r["person_id"]: dt.datetime.fromisoformat(r["death_datetime"]) for r in rows(cohort / "omop" / "death.csv")
    }
    assert deaths
    for row in rows(cohort / "omop" / "condition_occurrence.csv"):
        time = dt.datetime.fromisoformat(row["condition_start_datetime"])
        assert time.time() != dt.time()
        assert row["condition_start_date"] <= ends[row["person_id"]]
        assert time <= deaths.get(row["person_id"], dt.datetime.max)
        assert (time < scans[row["person_id"]]) == bool(row["visit_occurrence_id"])


def test_images_are_the_phantoms_in_ras_order(cohort: Path) -> None:
    person = ehr.person(3, 0)
    image = nibabel.load(cohort / "images" / "simulated-000001.nii")
    assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
    assert image.header.get_zooms() == (9.0, 9.0, 9.0)
    voxels = np.asanyarray(image.dataobj).transpose(2, 1, 0)
    assert voxels.shape == SHAPE_ZYX
    np.testing.assert_array_equal(voxels, phantom(3, 0, person.biomarkers))


def test_each_biomarker_shows_in_the_phantom() -> None:
    """More of it than the average changes what it should, with everything else held the same."""
    counts = {"heart": [], "effusion": [], "emphysema": [], "nodules": []}
    for number in range(30):
        plain = phantom(0, number, np.full(4, -2.0)).astype(float)
        for k, name in enumerate(counts):
            marked = np.full(4, -2.0)
            marked[k] = 2.0
            changed = phantom(0, number, marked).astype(float)
            dark, bright = changed < plain - 100, changed > plain + 100
            counts[name].append(dark.sum() - bright.sum())
    means = {name: float(np.mean(values)) for name, values in counts.items()}
    assert means["heart"] < -100
    assert means["effusion"] < -100
    assert means["emphysema"] > 100
    assert means["nodules"] < -100


def test_latents_are_those_of_the_definition(many: list[ehr.Person]) -> None:
    latents = np.array([[p.age, *p.biomarkers] for p in many])
    wanted = np.full((5, 5), 0.09)
    wanted[0, :] = wanted[:, 0] = 0.3
    np.fill_diagonal(wanted, 1)
    np.testing.assert_allclose(np.cov(latents.T), wanted, atol=0.06)
    ages = np.array([(p.scan / ehr.DAY - p.birth_day) / ehr.YEAR_DAYS for p in many])
    np.testing.assert_allclose(ages, 60 + 10 * latents[:, 0], atol=0.01)


def exposures(many: list[ehr.Person]) -> np.ndarray:
    return np.array([(p.follow_up_end - p.scan) / ehr.DAY for p in many])


def test_true_hazards_times_exposure_explain_the_counts_of_findings(many: list[ehr.Person]) -> None:
    """Each finding's count is Poisson with the mean that truth and exposure give; so are counts by decile of risk."""
    outcomes = ehr.findings()
    index = {o.concept_id: k for k, o in enumerate(outcomes)}
    counts = np.zeros((len(many), len(outcomes)))
    for row, person in enumerate(many):
        for time, outcome, at_visit in person.conditions:
            if outcome.concept_id in index and not at_visit:
                assert person.scan < time <= person.follow_up_end
                counts[row, index[outcome.concept_id]] += 1
    hazards = np.exp([ehr.log_hazards(outcomes, p.biomarkers, p.age) for p in many])
    expected = hazards * exposures(many)[:, None]
    z = (counts.sum(0) - expected.sum(0)) / np.sqrt(expected.sum(0))
    assert np.abs(z).max() < 4
    decile = np.argsort(np.argsort(expected.ravel())) * 10 // expected.size
    seen, wanted = (np.bincount(decile, a.ravel()) for a in (counts, expected))
    assert (np.abs(seen - wanted) < 4 * np.sqrt(wanted)).all()


def test_poisson_regression_recovers_rates_and_hazard_ratios_of_the_clinical_outcomes(many: list[ehr.Person]) -> None:
    x = np.array([[1.0, *p.biomarkers, p.age] for p in many])
    for outcome in ehr.clinical():
        first = [
            p.death if outcome.name == "death" else next((t for t, o, _ in p.conditions if o is outcome), None)
            for p in many
        ]
        event = np.array([t is not None for t in first])
        ends = [p.follow_up_end if t is None else t for t, p in zip(first, many, strict=True)]
        days = np.array([(end - p.scan) / ehr.DAY for end, p in zip(ends, many, strict=True)])
        truth = np.array([np.log(outcome.rate / ehr.YEAR_DAYS), *outcome.weights, outcome.age_weight])
        estimate, error = poisson_regression(x, event, days)
        assert (np.abs(estimate - truth) < 4 * error).all(), outcome.name
        assert error.max() < 0.06


def poisson_regression(x: np.ndarray, event: np.ndarray, exposure: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    beta = np.zeros(x.shape[1])
    beta[0] = np.log(event.sum() / exposure.sum())
    for _ in range(25):
        mean = np.exp(x @ beta) * exposure
        information = (x * mean[:, None]).T @ x
        beta += np.linalg.solve(information, x.T @ (event - mean))
    return beta, np.sqrt(np.diag(np.linalg.inv(information)))


def test_findings_are_coded_at_the_visit_as_often_as_defined(many: list[ehr.Person]) -> None:
    outcomes = ehr.findings()
    rates = np.log([o.rate / ehr.YEAR_DAYS for o in outcomes])
    linear = np.array([ehr.log_hazards(outcomes, p.biomarkers, p.age) - rates for p in many])
    expected = (0.3 / (1 + np.exp(1.5 - linear))).sum()
    coded = sum(at_visit for p in many for _, _, at_visit in p.conditions)
    assert abs(coded - expected) < 4 * np.sqrt(expected)


def test_follow_up_is_one_to_eight_years_unless_death_comes_first(many: list[ehr.Person]) -> None:
    alive = [(p.follow_up_end - p.scan) / ehr.DAY / ehr.YEAR_DAYS for p in many if p.death is None]
    assert min(alive) > 0.99
    assert max(alive) < 8.01
    assert all(p.follow_up_end == p.death for p in many if p.death is not None)
    assert all((p.follow_up_end + 1) % ehr.DAY == 0 for p in many if p.death is None)


def test_truth_holds_the_log_hazards_and_their_expectation_from_the_image(cohort: Path) -> None:
    truth = {(int(r["person_id"]), r["task"]): r for r in rows(cohort / "truth.csv")}
    assert len(truth) == 4 * PERSONS
    for number in range(PERSONS):
        person = ehr.person(3, number)
        for outcome, value in zip(
            ehr.clinical(), ehr.log_hazards(ehr.clinical(), person.biomarkers, person.age), strict=True
        ):
            assert float(truth[number + 1, outcome.name]["log_hazard"]) == pytest.approx(value, abs=1e-6)


def test_the_expected_age_is_the_regression_of_age_on_the_biomarkers(many: list[ehr.Person]) -> None:
    z, age = np.array([p.biomarkers for p in many]), np.array([p.age for p in many])
    slopes, *_ = np.linalg.lstsq(z, age, rcond=None)
    wanted = [ehr.expected_age(row) for row in np.eye(4)]
    np.testing.assert_allclose(slopes, wanted, atol=0.06)
