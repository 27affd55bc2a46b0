"""Next occurrences as femr 0.2.3 finds them against ours; each difference has a rule."""

from __future__ import annotations

import datetime as dt
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from app.store import cohorts, tasks
from app.store.work import InlineWork
from app.tasks import TaskSpec
from tests.app.store.records import Records, rows
from workers.stages.label import label

Make = Callable[..., InlineWork]

FEMR = "femr==0.2.3"
EPOCH = dt.datetime(1970, 1, 1)
START = dt.datetime(2019, 1, 1)
ANCESTORS = {2: [1], 3: [1], 4: [1, 2], 5: []}
"""Concept → its ancestors."""


@pytest.fixture(scope="module")
def femr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """femr's own files, without what it depends on."""
    folder = tmp_path_factory.mktemp("femr")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), FEMR]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        pytest.skip(f"{FEMR} cannot be installed here (no package index)")
    return folder


def draw(random_: random.Random) -> tuple[list[tuple[dt.datetime, int]], list[dt.datetime]]:
    """Events and scans on a coarse grid, so that ties are common."""

    def moment() -> dt.datetime:
        return START + dt.timedelta(days=random_.randrange(40), hours=random_.choice([1, 8, 8, 12]))

    events = sorted((moment(), random_.choice([1, 2, 3, 4, 5])) for _ in range(random_.choice([1, 3, 8, 20])))
    return events, sorted({moment() for _ in range(random_.choice([1, 2, 3]))})


def ask_femr(folder: Path, lives: dict[int, Any]) -> dict[tuple[int, dt.datetime], tuple[float, dict[str, float]]]:
    given = {
        "ancestors": {str(code): [str(a) for a in ancestors] for code, ancestors in ANCESTORS.items()},
        "persons": [
            {
                "events": [[(time - EPOCH).total_seconds(), str(concept)] for time, concept in events],
                "indices": [(index - EPOCH).total_seconds() for index in indices],
            }
            for events, indices in lives.values()
        ],
    }
    command = [sys.executable, "-m", "tests.reference.femr_child", str(folder)]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    return {
        (person, index): (censored, times)
        for (person, (_, indices)), some in zip(lives.items(), answers, strict=True)
        for index, (censored, times) in zip(indices, some, strict=True)
    }


@pytest.mark.long
def test_next_occurrences_and_censoring_are_those_of_femr_but_for_two_rules_of_ours(
    engine: Engine, work: Make, femr: Path
) -> None:
    random_ = random.Random(11)
    lives = {person: draw(random_) for person in range(1, 301)}
    with engine.begin() as connection:
        records = Records(connection)
        records.concepts([1, 2, 3, 4, 5])
        records.ancestors([(a, code, 1) for code, ancestors in ANCESTORS.items() for a in ancestors])
        for person, (events, indices) in lives.items():
            records.person(person)
            for time, concept in events:
                records.event(person, time, concept)
            for index in indices:
                records.scan(person, index)
        records.pack()
    cohorts.build(work(name="c", follow_up="last_event", per="series"))
    specs = [
        TaskSpec(name=str(c), concepts=(c,), occurrence="next", prior="keep", same_day="after") for c in (1, 2, 3, 4, 5)
    ]
    tasks.build(work(name="t", cohort="c", specs=[spec.to_dict() for spec in specs]))
    label(work(name="l", cohort="c", tasks="t"))
    theirs = ask_femr(femr, lives)
    compared = {"event": 0, "censored": 0}
    ours_alone = {"scan after the last event": 0, "last event on the day of the scan": 0}
    for row in rows(engine, "SELECT * FROM label.tte_long WHERE label_set = 'l'"):
        censored, times = theirs[row.person_id, row.index_time]
        if row.status == "ineligible":
            last = lives[row.person_id][0][-1][0]
            assert (censored < 0) == (last < row.index_time)
            assert last.date() <= row.index_time.date()  # no follow-up, or none beyond the day of the scan
            early = last < row.index_time
            ours_alone["scan after the last event" if early else "last event on the day of the scan"] += 1
            continue
        expected = ("event", times[row.task]) if row.task in times else ("censored", censored)
        assert (row.status, row.time_days * 86_400) == expected
        compared[row.status] += 1
    assert min(compared.values()) > 300 and min(ours_alone.values()) > 0
