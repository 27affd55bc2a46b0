"""A small store with features and labels in which nothing leaks: where leaks are planted."""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import Callable

from sqlalchemy import Engine, text

from app.store import cohorts, tasks
from app.store.work import InlineWork
from app.tasks import TaskSpec
from tests.app.store.records import Records
from workers.stages.features import features
from workers.stages.label import label

Make = Callable[..., InlineWork]

ROOT, CHILD, OTHER = 100, 101, 7
INDEX = dt.datetime(2020, 1, 1, 12)


def write(engine: Engine, work: Make) -> None:
    """Ninety persons with visits on the day of their scans, features and labels without a fault."""
    random_ = random.Random(3)
    with engine.begin() as connection:
        records = Records(connection)
        records.concepts([ROOT, CHILD])
        records.ancestors([(ROOT, CHILD, 1)])
        for person in range(1, 91):
            records.person(person, split=random_.choice(["train", "test"]))
            records.period(person, "2010-01-01", "2022-01-01")
            records.visit(person, "2020-01-01 08:00:00", "2020-01-01 18:00:00", 9202)
            records.scan(person, INDEX)
            for _ in range(4):
                day = INDEX + dt.timedelta(days=random_.randrange(-300, 300), hours=1)
                records.event(person, day, random_.choice([CHILD, OTHER, OTHER]))
        records.pack()
    cohorts.build(work(name="c"))
    keep = TaskSpec(name="root", concepts=(ROOT,), prior="keep")
    first = TaskSpec(name="first", concepts=(ROOT,))
    tasks.build(work(name="t", cohort="c", specs=[keep.to_dict(), first.to_dict()]))
    label(work(name="l", cohort="c", tasks="t"))
    features(work(cohort="c", tasks="t"))


def change(engine: Engine, *statements: str) -> None:
    """Statements that must change some row each."""
    with engine.begin() as connection:
        for statement in statements:
            assert connection.execute(text(statement)).rowcount > 0, statement


def repack(engine: Engine) -> None:
    """Timelines anew from the rows."""
    with engine.begin() as connection:
        records = Records.__new__(Records)
        records.connection = connection
        records.pack()
