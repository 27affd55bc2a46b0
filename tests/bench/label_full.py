"""Rows at the paper's scale: `tasks`, `label-full` (with its memory), `label-read` and `cookbook`, against the clock.

225 M events of 19,402 persons, 18,945 scans, 8,192 tasks chosen by entropy. LACHESIS_BENCH_FULL_EVENTS scales it (cost
is linear: docs/benchmarks.md shows 2, 20 and 200 M); LACHESIS_BENCH_FOREIGN_ANCESTORS=79000000 adds as many rows of
omop.concept_ancestor as a whole vocabulary has. Each step runs in a process of its own, whose greatest memory counts.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from app.embedded import ensure_up, stop
from app.settings import Settings
from app.store.session import make_engine
from app.store.work import InlineWork
from tests.bench import Row
from tests.bench.scale import EVENTS, Shape, fill, write_foreign_ancestors

TASKS = 8_192
STEPS = ("cohort", "tasks", "label", "read", "cookbook")


def run() -> list[Row]:
    """Make the store, then time each step."""
    events = int(os.environ.get("LACHESIS_BENCH_FULL_EVENTS") or EVENTS)
    foreign = int(os.environ.get("LACHESIS_BENCH_FOREIGN_ANCESTORS") or 0)
    with tempfile.TemporaryDirectory(prefix="lachesis-bench-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # as root, the servers run as another user, who must reach it
        settings = Settings(home=folder / "home", home_is_named=True)
        try:
            url = ensure_up(settings).database_url
            fill(url, Shape(events=events))
            if foreign:
                with make_engine(url).begin() as connection:
                    write_foreign_ancestors(connection, foreign)
            found = {step: apart(step, folder) for step in STEPS}
        finally:
            stop(settings)
    label = found["label"]
    return [
        Row(row="tasks", figure=found["tasks"]["seconds"], unit="s", target=300, at_least=False),
        Row(row="tasks-memory", figure=found["tasks"]["gib"], unit="GiB", target=4, at_least=False),
        Row(row="label-full", figure=label["seconds"], unit="s", target=60, at_least=False),
        Row(row="label-full-memory", figure=label["gib"], unit="GiB", target=4, at_least=False),
        Row(row="label-read", figure=found["read"]["seconds"], unit="s", target=5, at_least=False),
        Row(row="cookbook", figure=found["cookbook"]["slowest_ms"] / 1e3, unit="s", target=1, at_least=False),
    ]


def apart(step: str, folder: Path) -> dict[str, Any]:
    """Time one step in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.label_full", step, str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"# {step}: {found['seconds']:.1f} s, {found['gib']:.2f} GiB", file=sys.stderr)
    return found


def one_step(step: str, folder: Path) -> dict[str, Any]:
    """Run one step here: what it returned, its seconds without imports and compilation, and this process's memory."""
    from app.store import cohorts, tasks
    from workers.stages.label import label

    settings = Settings(home=folder / "home", home_is_named=True)
    engine = make_engine(ensure_up(settings).database_url)
    warm_up()
    began = time.perf_counter()
    work = InlineWork(engine, args={}, folder=folder / "work", settings=settings)
    work.args = {
        "cohort": {"name": "full"},
        "tasks": {"name": "full", "cohort": "full", "size": TASKS},
        "label": {"name": f"full-{time.time_ns()}", "cohort": "full", "tasks": "full"},
    }.get(step, {})
    stages = {"cohort": cohorts.build, "tasks": tasks.build, "label": label, "read": read, "cookbook": cookbook}
    result = stages[step](work)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "gib": peak / 2**30} | {k: v for k, v in result.items() if isinstance(v, int)}


def warm_up() -> None:
    """Compile the kernels, or read them from numba's cache."""
    from tests.ml.test_labelling import test_a_follow_up_of_eighty_years_keeps_every_second

    test_a_follow_up_of_eighty_years_keeps_every_second()


def read(work: InlineWork) -> dict[str, Any]:
    """The newest label set as what a training draws its batches from."""
    import numpy as np

    from ml.tte_targets import TteTargets
    from workers import bridge

    with work.connect() as connection:
        query = "SELECT name FROM label.label_set ORDER BY label_set_id DESC LIMIT 1"
        info = bridge.find_label_set(connection, connection.exec_driver_sql(query).scalar_one())
        labels, members = bridge.read_labels(connection, info), bridge.read_members(connection, info.cohort_id)
    targets = TteTargets(labels, np.flatnonzero((members.split == bridge.TRAIN) & members.eligible))
    return {"entries": len(labels.events.task), "events": int(targets.num_events.sum())}


def cookbook(work: InlineWork) -> dict[str, Any]:
    """Each query of docs/cookbook.md on the newest label set and its most common task; how long the slowest took."""
    from sqlalchemy import text

    text_of = (Path(__file__).parents[2] / "docs" / "cookbook.md").read_text(encoding="utf-8")
    slowest = 0.0
    with work.connect() as connection:
        name, task = connection.exec_driver_sql(
            "SELECT s.name, t.name FROM label.label_set s JOIN label.task t USING (task_set_id) "
            "JOIN label.task_status_count c ON (c.label_set_id, c.position, c.status) = "
            "(s.label_set_id, t.position, 'event') "
            "GROUP BY s.label_set_id, s.name, t.name ORDER BY s.label_set_id DESC, sum(c.n) DESC LIMIT 1"
        ).one()
        for query in re.findall(r"```sql\n(.*?)```", text_of, flags=re.DOTALL):
            asked = re.sub("'(outcomes|chest)'", f"'{name}'", query).replace("'adults'", "'full'")
            asked = re.sub("'(pulmonary_hypertension|mortality)'", f"'{task}'", asked)
            seconds = []
            for _ in range(3):
                began = time.perf_counter()
                connection.execute(text(asked.replace(":", r"\:"))).all()
                seconds.append(time.perf_counter() - began)
            print(f"# {min(seconds):.3f} s  {' '.join(asked.split())[:100]}", file=sys.stderr)
            slowest = max(slowest, min(seconds))
    return {"slowest_ms": round(slowest * 1e3)}


if __name__ == "__main__":
    print(json.dumps(one_step(sys.argv[1], Path(sys.argv[2]))))
