"""The rows at the paper's scale run, on a store of their shape that is small."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Engine

from app.store import cohorts, tasks
from app.store.work import InlineWork
from tests.bench.label_full import read
from tests.bench.scale import Shape, fill
from workers.stages.label import label


def test_a_small_store_of_that_shape_is_labelled_and_read(
    engine: Engine, database_url: str, work: Callable[..., InlineWork]
) -> None:
    fill(database_url, Shape(events=40_000, persons=200, scans=190))
    cohorts.build(work(name="full"))
    tasks.build(work(name="full", cohort="full", size=50))
    made = label(work(name="full", cohort="full", tasks="full"))
    found = read(work())
    assert found["entries"] == made["events"] > found["events"] > 0
