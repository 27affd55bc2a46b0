"""The cookbook: every query of it runs as a reader on a real store, and its figures are those of lifelines."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import ProgrammingError

from app.store import cohorts, plots, tasks
from app.store.work import InlineWork
from app.tasks import builtin
from tests.app.store.records import Records
from workers.stages.label import label

Make = Callable[..., InlineWork]

COOKBOOK = (Path(__file__).parents[3] / "docs" / "cookbook.md").read_text(encoding="utf-8")
QUERIES = re.findall(r"```sql\n(.*?)```", COOKBOOK, flags=re.DOTALL)
HYPERTENSION, OTHER = 4185932, 77
NAMES = ("mortality", "pulmonary_hypertension", "readmission")


def insert_embeddings(connection: Connection) -> None:
    """Each scan as a point on a circle, by one checkpoint."""
    made = connection.execute(
        text(
            "INSERT INTO model.checkpoint (name, sha256, arm, encoder, width, recipe, seed, step, num_steps, is_final, "
            "path, num_bytes, code_version) VALUES ('circle', '0', 'external', 'circle', 2, '{}', 0, 0, 0, true, '', "
            "0, '0') RETURNING checkpoint_id"
        )
    ).scalar_one()
    values = {"c": made}
    connection.execute(text("SELECT model.add_embedding_partition(:c, 2)"), values)
    for table, more in (
        ("embedded_scan (checkpoint_id, image_occurrence_id)", ""),
        ("embedding", ", format('[%s,%s]', cos(image_occurrence_id), sin(image_occurrence_id))::halfvec"),
    ):
        more = more.replace(":", r"\:")
        statement = f"INSERT INTO model.{table} SELECT :c, image_occurrence_id{more} FROM omop.image_occurrence"
        connection.execute(text(statement), values)


@pytest.fixture
def labelled(engine: Engine, work: Make) -> Engine:
    """Eighty persons with drawn follow-up, deaths, diagnoses; labels `outcomes` and `chest` of the cohort `adults`."""
    draw = np.random.default_rng(7)
    followed = draw.permutation(2500)[:80] + 20  # no two alike
    with engine.begin() as connection:
        records = Records(connection)
        for concept, code in ((HYPERTENSION, "70995007"), (OTHER, "77")):
            records.do(
                "INSERT INTO omop.concept (concept_id, concept_name, domain_id, vocabulary_id, concept_class_id, "
                "concept_code, standard_concept) "
                "VALUES (:id, 'a finding', 'Condition', 'SNOMED', 'Finding', :code, 'S')",
                id=concept, code=code,
            )  # fmt: skip
        for person in range(1, 81):
            records.person(person)
            records.scan(person, "2015-03-01 10:00:00")
            days = int(followed[person - 1])
            records.period(person, "2010-01-01", np.datetime64("2015-03-01") + days)
            for code, share in ((HYPERTENSION, 0.5), (OTHER, 0.7)):
                if draw.random() < share:
                    day = np.datetime64(f"2015-03-01T11:{person % 60:02}:{person // 60:02}") + np.timedelta64(
                        int(draw.integers(-200, days)), "D"
                    )
                    records.event(person, str(day).replace("T", " "), code)
            if draw.random() < 0.3:
                records.death(person, f"{np.datetime64('2015-03-01') + days} 12:00:00")
        records.pack()
    cohorts.build(work(name="adults"))
    tasks.build(work(name="clinical", cohort="adults", specs=[builtin(name).to_dict() for name in NAMES]))
    tasks.build(work(name="pretraining", cohort="adults", size=2))
    label(work(name="outcomes", cohort="adults", tasks="clinical"))
    label(work(name="chest", cohort="adults", tasks="pretraining"))
    return engine


def test_every_query_of_the_cookbook_gives_rows_to_a_reader(labelled: Engine) -> None:
    assert len(QUERIES) > 15
    empty = []
    with labelled.begin() as connection:
        insert_embeddings(connection)
    with labelled.connect() as connection:
        connection.execute(text("SET ROLE lachesis_reader"))
        for query in QUERIES:
            rows = connection.execute(text(query.replace(":", r"\:"))).all()
            if not rows:
                empty.append(query)
    # the cohort has every scan eligible: nobody was left out by reason
    assert [query for query in empty if "NOT eligible" not in query] == []


def test_the_python_of_the_cookbook_runs(labelled: Engine) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", COOKBOOK, flags=re.DOTALL)
    url = labelled.url.set(drivername="postgresql").render_as_string(hide_password=False)
    environment = {**os.environ, "LACHESIS_READER_URL": url}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "time_days" in done.stdout


def incidence(engine: Engine, task: str, *, competes: bool, split: str | None = None) -> list[dict[str, Any]]:
    with engine.connect() as connection:
        return plots.rows(
            connection, plots.INCIDENCE, labels="outcomes", task=task, split=split, death_competes=competes
        )


def observed(engine: Engine, task: str) -> list[Any]:
    with engine.connect() as connection:
        return list(
            connection.execute(
                text(
                    "SELECT l.time_days, l.event, l.status, y.death_seconds / 86400.0 <= l.time_days AS died "
                    "FROM label.tte_long l JOIN label.label_set s ON s.name = l.label_set AND s.is_current "
                    "JOIN label.tte y USING (label_set_id, cohort_member_id) "
                    "WHERE l.label_set = 'outcomes' AND l.task = :task AND l.event IS NOT NULL ORDER BY 1"
                ),
                {"task": task},
            )
        )


@pytest.mark.parametrize("task", ["mortality", "pulmonary_hypertension"])
def test_incidence_without_competing_deaths_is_one_minus_the_kaplan_meier_of_lifelines(
    labelled: Engine, task: str
) -> None:
    from lifelines import KaplanMeierFitter

    rows = observed(labelled, task)
    fitted = KaplanMeierFitter().fit([float(r.time_days) for r in rows], [r.event for r in rows])
    ours = incidence(labelled, task, competes=False)
    assert len(ours) > 5 and sum(row["num_events"] for row in ours) > 5
    theirs = fitted.survival_function_at_times([row["time_days"] + 1e-9 for row in ours]).to_numpy()
    assert np.allclose([row["survival"] for row in ours], theirs, atol=1e-12)
    assert np.allclose([row["incidence"] for row in ours], 1 - theirs, atol=1e-12)
    assert [row["at_risk"] for row in ours] == [
        sum(float(r.time_days) >= row["time_days"] for r in rows) for row in ours
    ]


def test_incidence_with_competing_deaths_is_the_aalen_johansen_of_lifelines(labelled: Engine) -> None:
    from lifelines import AalenJohansenFitter

    rows = observed(labelled, "pulmonary_hypertension")
    kinds = [1 if r.event else 2 if r.died else 0 for r in rows]
    assert {0, 1, 2} == set(kinds)
    times = [float(r.time_days) for r in rows]
    assert len(set(times)) == len(times)  # lifelines would jitter ties
    ours = incidence(labelled, "pulmonary_hypertension", competes=True)
    for event, column in ((1, "incidence"), (2, "death_incidence")):
        fitted = AalenJohansenFitter(calculate_variance=False).fit(times, kinds, event_of_interest=event)
        theirs = np.interp(
            [row["time_days"] for row in ours], fitted.cumulative_density_.index, fitted.cumulative_density_.iloc[:, 0]
        )
        assert np.allclose([row[column] for row in ours], theirs, atol=1e-9)
    last = ours[-1]
    assert last["survival"] + last["incidence"] + last["death_incidence"] == pytest.approx(1)


def test_a_scan_is_at_risk_only_once_its_window_has_opened(engine: Engine) -> None:
    """Hand-made labels: two windows of readmission open at day 10 and 20; without late entry six would be at risk."""
    from tests.migrations.rows import add_labels

    with engine.begin() as connection:
        add_labels(connection)
        found = connection.execute(text("SELECT * FROM label.incidence('outcomes', 'readmission')")).mappings().all()
    (first, *_) = found
    assert (first["time_days"], first["at_risk"], first["num_events"]) == (5, 3, 1)
    died = next(row for row in found if row["time_days"] == 50)
    assert (died["at_risk"], died["num_deaths"]) == (3, 1)
    assert found[-1]["incidence"] == pytest.approx(1 / 3)
    assert died["death_incidence"] == pytest.approx(2 / 3 / 3)


def test_splits_add_up_and_an_unknown_task_is_refused(labelled: Engine) -> None:
    all_scans = incidence(labelled, "mortality", competes=False)
    by_split = [incidence(labelled, "mortality", competes=False, split=s) for s in ("train", "tuning", "held_out")]
    total = sum(row["num_events"] + row["num_censored"] for rows in by_split for row in rows)
    assert total == sum(row["num_events"] + row["num_censored"] for row in all_scans)
    with pytest.raises(ProgrammingError, match="did you mean 'mortality'"):
        incidence(labelled, "mortalty", competes=False)


def test_figures_are_drawn_from_the_store_and_hide_small_cells(labelled: Engine, tmp_path: Path) -> None:
    from app.cli.plot import save
    from app.report.label_figures import draw

    with labelled.connect() as connection:
        density = plots.rows(connection, plots.DENSITY, labels="chest")
        events = plots.rows(connection, plots.EVENTS, labels="outcomes")
        followed = plots.rows(connection, plots.FOLLOW_UP, cohort_id=1)
        curves = plots.incidence_curves(connection, "outcomes", "mortality", ("train", "tuning", None))
    assert sum(row["scans"] for row in density if row["arm"] == "tte") == 80
    assert [row["events"] for row in events] == sorted((row["events"] for row in events), reverse=True)
    drawn = {
        "density": draw("density", density),
        "events": draw("events", events),
        "follow_up": draw("follow_up", followed),
        "incidence": draw("incidence", "mortality", curves),
    }
    for name, figure in drawn.items():
        save(figure, tmp_path / f"{name}.svg")
        assert (tmp_path / f"{name}.svg").read_text(encoding="utf-8").count("<path") > 5
    shown = (tmp_path / "incidence.svg").read_text(encoding="utf-8")
    assert "train: death competing" in shown and "tuning: death competing" not in shown


@pytest.mark.usefixtures("labelled")
def test_reading_as_psycopg_does_gives_the_same_numbers(labelled: Engine) -> None:
    url = labelled.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url) as connection:
        (events,) = connection.execute(
            "SELECT sum(event) FROM label.tte_long WHERE label_set = 'outcomes' AND task = 'mortality'"
        ).fetchone() or (None,)
    assert events == sum(row["num_events"] for row in incidence(labelled, "mortality", competes=False))
