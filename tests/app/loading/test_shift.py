"""Dates moved on the way in: what stays, what moves together, and which deliveries may not lie side by side."""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine

from app.errors import InputError
from app.loading import images, omop
from app.loading.shift import MOST_DAYS, Shift, make_key, read_key
from app.store import cohorts, tasks
from app.store.work import InlineWork
from app.tasks import TaskSpec, builtin
from tests.app.loading.extracts import DEATH_HEADER, PERSONS, VISIT_HEADER, extract, one, rows
from tests.app.loading.scans import write_nifti

Make = Callable[..., InlineWork]

PERSON = st.integers(-(2**63), 2**63 - 1)
MOMENT = st.datetimes(dt.datetime(1801, 1, 1), dt.datetime(2299, 12, 31))
KEY = st.binary(min_size=32, max_size=80)


@given(KEY, PERSON, MOMENT, MOMENT)
def test_intervals_and_times_of_day_stay_and_every_date_goes_back_by_one_to_364_days(
    key: bytes, person: int, first: dt.datetime, second: dt.datetime
) -> None:
    shift = Shift(key)
    moved = shift.moved(person, first)
    assert shift.moved(person, second) - moved == second - first
    assert moved.time() == first.time()
    assert dt.timedelta(days=1) <= first - moved <= dt.timedelta(days=MOST_DAYS)


@given(KEY, st.lists(PERSON, max_size=20))
def test_offsets_of_many_are_those_of_each_by_the_standard(key: bytes, persons: list[int]) -> None:
    found = Shift(key).offsets(np.array(persons, np.int64))
    expected = [
        -1 - int.from_bytes(hmac.new(key, str(p).encode(), hashlib.sha256).digest()[:8], "big") % 364 for p in persons
    ]
    assert found.tolist() == expected


def test_offsets_of_many_persons_cover_the_year_evenly() -> None:
    counts = np.bincount(-Shift(b"k" * 32).offsets(np.arange(100_000)), minlength=365)
    assert counts[0] == 0 and counts[1:].min() > 0.7 * counts[1:].mean() and counts[1:].max() < 1.4 * counts[1:].mean()


def test_a_key_is_made_for_its_owner_alone_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key"
    made = make_key(path)
    assert read_key(path) == made.key and path.stat().st_mode & 0o777 == 0o600
    assert made.key.decode() not in repr(made) and made.key_id not in made.key.decode()
    with pytest.raises(InputError, match="never overwritten"):
        make_key(path)
    path.chmod(0o640)
    with pytest.raises(InputError, match="0640"):
        read_key(path)


@pytest.mark.parametrize(("content", "message"), [(b"short\n", "found 5"), (None, "no file")])
def test_a_key_that_is_short_or_absent_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
        path.chmod(0o600)
    with pytest.raises(InputError, match=message):
        read_key(path)


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Paths of two keys."""
    for name in ("one.key", "two.key"):
        make_key(tmp_path / name)
    yield str(tmp_path / "one.key"), str(tmp_path / "two.key")


def delivery(folder: Path) -> tuple[Path, Path]:
    """An extract with visits, a death and a birth time; and a manifest of scans."""
    path = extract(
        folder / "omop",
        visit_occurrence=[VISIT_HEADER, "1,1,9201,2014-01-02,2014-01-02 08:30:00,2014-01-09,2014-01-09 12:00:00,0,0,"],
        death=[DEATH_HEADER, "2,2018-05-06,,0,0"],
        cdm_source=["cdm_source_name,source_release_date", "a hospital,2020-11-30"],
    )
    write_nifti(folder / "scan.nii.gz")
    lines = [f"{i},2014-0{i}-11 09:1{i}:00,scan.nii.gz" for i in range(1, 6)]
    (folder / "manifest.csv").write_text("\n".join(["person_id,acquired_at,path", *lines]) + "\n")
    return path, folder / "manifest.csv"


def labels(work: Make, engine: Engine) -> list[Any]:
    """Load nothing; make a cohort, tasks and labels, and give their arrays."""
    from workers.stages.label import label

    cohorts.build(work(name="c"))
    specs = [TaskSpec.from_dict({"name": f"t{i}", "concepts": [300 + i], "prior": "keep"}) for i in range(1, 21)]
    specs.append(builtin("mortality"))
    tasks.build(work(name="t", cohort="c", specs=[spec.to_dict() for spec in specs]))
    label(work(name="l", cohort="c", tasks="t"))
    return rows(
        engine,
        "SELECT m.person_id, m.split, event_tasks, event_seconds, prior_tasks, ineligible_tasks, visit_tasks, "
        "follow_up_seconds, death_seconds FROM label.tte JOIN label.cohort_member m USING (cohort_member_id) "
        "JOIN label.label_set s USING (label_set_id) WHERE s.is_current ORDER BY 1",
    )


LIFE = """
SELECT person_id, birth_time FROM omop.person
UNION ALL SELECT person_id, time FROM omop.event UNION ALL SELECT person_id, end_time FROM omop.event
UNION ALL SELECT person_id, start_date FROM omop.observation_period
UNION ALL SELECT person_id, end_date FROM omop.observation_period
UNION ALL SELECT person_id, visit_start_datetime FROM omop.visit_occurrence
UNION ALL SELECT person_id, visit_end_datetime FROM omop.visit_occurrence
UNION ALL SELECT person_id, acquired_at FROM omop.image_occurrence
ORDER BY 1, 2
"""


def test_labels_are_the_same_with_and_without_a_shift_and_every_date_moves(
    tmp_path: Path, work: Make, engine: Engine, keys: tuple[str, str]
) -> None:
    path, manifest = delivery(tmp_path)
    omop.load(work(path=str(path)))
    images.load(work(path=str(manifest)))
    plain, life = labels(work, engine), rows(engine, LIFE)
    with engine.begin() as connection:
        connection.exec_driver_sql("TRUNCATE omop.image_occurrence, label.cohort, label.label_set CASCADE")
    result = omop.load(work(path=str(path), shift_dates=keys[0]))
    images.load(work(path=str(manifest), shift_dates=keys[0]))
    assert result["data_cut"] is None
    assert labels(work, engine) == plain
    assert any(row[2] for row in plain) and any(row[8] is not None for row in plain)
    shift = Shift(read_key(Path(keys[0])))
    cut = dt.datetime(2020, 11, 30)
    # periods that passed the release ended with it before they moved
    ended = [(p, t if t is None or t < dt.datetime(2020, 12, 31) else cut) for p, t in life]
    assert rows(engine, LIFE) == [(p, None if t is None else shift.moved(p, t)) for p, t in ended]


def test_no_follow_up_passes_the_data_though_its_last_day_is_not_kept(
    tmp_path: Path, work: Make, engine: Engine, keys: tuple[str, str]
) -> None:
    path, _ = delivery(tmp_path)
    omop.load(work(path=str(path), shift_dates=keys[0], data_cut="2016-06-30"))
    shift = Shift(read_key(Path(keys[0])))
    found = rows(engine, "SELECT person_id, end_date FROM omop.observation_period ORDER BY 1")
    assert found == [(p, dt.date(2016, 6, 30) + dt.timedelta(days=shift.days(p))) for p in range(1, 6)]
    kept = rows(engine, "SELECT data_cut, details::text FROM ops.source")
    assert kept[0][0] is None and "20" not in kept[0][1].replace(shift.key_id, "")
    with pytest.raises(InputError, match="no one day"):
        cohorts.build(work(name="c", follow_up="data_cut", data_cut="2016-06-30"))


def test_records_and_scans_of_one_person_move_by_one_key_or_not_at_all(
    tmp_path: Path, work: Make, engine: Engine, keys: tuple[str, str]
) -> None:
    path, manifest = delivery(tmp_path)
    omop.load(work(path=str(path), shift_dates=keys[0]))
    for other in (None, keys[1]):
        with pytest.raises(InputError, match="moved with the key"):
            images.load(work(path=str(manifest), shift_dates=other))
    assert one(engine, "SELECT count(*) FROM omop.image_occurrence") == 0
    images.load(work(path=str(manifest), shift_dates=keys[0]))
    assert images.load(work(path=str(manifest), shift_dates=keys[0]))["unchanged"]
    assert omop.load(work(path=str(path), shift_dates=keys[0]))["unchanged"]
    before = rows(engine, LIFE)
    for other in (None, keys[1]):
        with pytest.raises(InputError, match="have scans"):
            omop.load(work(path=str(path), shift_dates=other))
    assert rows(engine, LIFE) == before


def test_a_delivery_of_some_tables_moves_as_those_that_stay(
    tmp_path: Path, work: Make, engine: Engine, keys: tuple[str, str]
) -> None:
    path, _ = delivery(tmp_path)
    omop.load(work(path=str(path)))
    part = extract(tmp_path / "part", person=PERSONS)
    with pytest.raises(InputError, match="dates as they are"):
        omop.load(work(path=str(part), shift_dates=keys[0]))
    assert not omop.load(work(path=str(path), shift_dates=keys[0]))["unchanged"]
    (part / "condition_occurrence.csv").unlink()
    life = rows(engine, LIFE)
    omop.load(work(path=str(part), shift_dates=keys[0], data_cut="2020-11-30"))
    assert rows(engine, LIFE) == life
