"""Labels as MEDS has them: nothing that a label may use is later than what ours may use."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from sqlalchemy import Engine

from app.errors import InputError
from app.export.meds import ExportOptions, export
from app.loading import images, meds
from app.store import cohorts, tasks
from app.store.work import InlineWork
from app.tasks import TaskSpec
from tests.app.loading.extracts import rows
from tests.app.loading.meds_sets import at, data_set
from tests.app.loading.scans import chest, write_nifti
from workers.stages.label import label

Make = Callable[..., InlineWork]


@pytest.fixture
def labelled(tmp_path: Path, work: Make) -> None:
    """Two persons with a scan each, one of a moment and one of a day, and labels of one task."""
    events = {
        "train/0": [(1, at(1), "A", None), (1, at(10, 9), "A", None), (1, at(20), "A", None)],
        "held_out/0": [(2, at(1), "A", None), (2, at(10, 9), "A", None), (2, at(28), "B", None)],
    }
    meds.load(work(path=str(data_set(tmp_path / "in", events))))
    for i in (1, 2):
        write_nifti(tmp_path / f"scan{i}.nii.gz", chest(seed=i))
    lines = ["person_id,acquired_at,path", "1,2015-03-10 09:00:00,scan1.nii.gz", "2,2015-03-10,scan2.nii.gz"]
    (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n")
    images.load(work(path=str(tmp_path / "manifest.csv")))
    cohorts.build(work(name="c", follow_up="last_event"))
    spec = TaskSpec.from_dict(
        {"name": "a", "vocabulary_codes": ["MEDS/A"], "prior": "keep", "horizons_days": [5, 15], "follow_up": "cohort"}
    )
    tasks.build(work(name="t", cohort="c", specs=[spec.to_dict()]))
    label(work(name="l", cohort="c", tasks="t"))


def test_labels_are_one_file_a_task_and_horizon(labelled: None, tmp_path: Path, engine: Engine) -> None:
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        written = export(connection, ExportOptions(folder=tmp_path / "out", labels=["l"]), lambda _: None)
    place = tmp_path / "out" / "labels" / "l" / "a"
    found = {path.stem: pq.ParquetFile(path).read() for path in sorted(place.iterdir())}
    moments = {1: dt.datetime(2015, 3, 10, 8, 59, 59, 999_999), 2: dt.datetime(2015, 3, 9, 23, 59, 59, 999_999)}
    told = {name: [tuple(row.values()) for row in table.to_pylist()] for name, table in found.items()}
    assert told["5d"] == [(1, moments[1], False), (2, moments[2], False)]
    assert told["15d"] == [(1, moments[1], True), (2, moments[2], False)]
    ours = rows(engine, "SELECT person_id, event = 1, time_days FROM label.tte_long WHERE task = 'a' ORDER BY 1")
    assert [(person, event) for person, _, event, _ in told["tte"]] == [(person, event) for person, event, _ in ours]
    assert [days for *_, days in told["tte"]] == pytest.approx([days for *_, days in ours], rel=1e-6)
    assert [str(f.type) for f in found["15d"].schema] == ["int64", "timestamp[us]", "bool"]
    assert written.label_files == 3 and written.by_split == {"train": 1, "held_out": 1}


def test_label_sets_of_another_cohort_are_refused(labelled: None, tmp_path: Path, work: Make, engine: Engine) -> None:
    cohorts.build(work(name="other", follow_up="last_event", where="i.person_id = 1"))
    with engine.connect() as connection, pytest.raises(InputError, match="label sets of one cohort"):
        export(connection, ExportOptions(folder=tmp_path / "o", cohort="other", labels=["l"]), lambda _: None)
    with engine.connect() as connection:
        written = export(connection, ExportOptions(folder=tmp_path / "o", cohort="other"), lambda _: None)
    assert (written.persons, written.rows) == (1, 3)
