"""Row `label`: labels of 2,000 scans for 8,192 tasks from 10 M events, in the store, against DuckDB over Parquet.

Ours is the whole stage: reading timelines, the concept → tasks lists, the kernel, `label.tte` with its counts and
digests, COMMIT. DuckDB (2 threads, Parquet sorted by person) writes what the view `label.tte_long` shows of it, a row a
scan and task, with history and visit, to Parquet.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.embedded import ensure_up, stop
from app.settings import Settings
from app.store.session import make_engine, raw
from app.store.work import InlineWork
from app.tasks import TaskSpec
from tests.bench import Row, median_ratio

PERSONS, EVENTS, CONCEPTS, TASKS = 2_000, 10_000_000, 20_000, 8_192
OWN = 600
"""Concepts that one person's record repeats: most rows of a long record are the same few laboratory tests and drugs."""
BRANCHES = 5
"""The ontology is a tree in which every concept has so many children: 5 to 6 tasks a concept, broad ones shared."""
FIRST_DAY, DAYS = 10_957, 5_500
"""The record: 15 years from 2000-01-01."""
DAY_SECONDS = 86_400
TARGET = 4.0

DUCKDB = """
COPY (
    WITH seen AS (
        SELECT m.member, e.concept,
               min(e.time) FILTER (WHERE e.time > m.index_time AND e.time <= m.follow_up_end) AS first_time,
               bool_or(e.time <= m.index_time) AS prior,
               bool_or(e.time BETWEEN m.visit_from AND m.visit_to) AS in_visit
        FROM read_parquet('{folder}/event.parquet') e JOIN read_parquet('{folder}/member.parquet') m USING (person)
        GROUP BY ALL
    ), label AS (
        SELECT s.member, p.task, min(s.first_time) AS first_time, bool_or(s.prior) AS prior,
               bool_or(s.in_visit) AS in_visit
        FROM seen s JOIN read_parquet('{folder}/pair.parquet') p USING (concept) GROUP BY ALL
    )
    SELECT m.member, t.task::smallint AS task, first_time IS NOT NULL AS event,
           coalesce(first_time, m.follow_up_end) - m.index_time AS seconds,
           coalesce(prior, false) AS prior, coalesce(in_visit, false) AS in_visit
    FROM read_parquet('{folder}/member.parquet') m CROSS JOIN range({tasks}) t(task)
    LEFT JOIN label l ON l.member = m.member AND l.task = t.task
) TO '{folder}/label.parquet' (FORMAT parquet)
"""
"""A concept's events are reduced before the join with its tasks: twice as fast as joining all events."""


def run() -> list[Row]:
    """How many times faster the stage is, and its events a second."""
    with tempfile.TemporaryDirectory(prefix="lachesis-bench-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # as root, the servers run as another user, who must reach it
        settings = Settings(home=folder / "home", home_is_named=True)
        try:
            url = ensure_up(settings).database_url
            ours, check, forget = fill(url, folder, settings)
            theirs = duckdb_query(folder)
            ours(), theirs()  # compiles, warms the page cache
            check()
            ratio, mine, _ = median_ratio(ours, theirs, before=forget)
        finally:
            stop(settings)
    return [
        Row(row="label", figure=ratio, unit="x DuckDB", target=TARGET),
        Row(row="label-rate", figure=EVENTS / mine / 1e6, unit="M events/s", target=0.37),
    ]


def draw(random: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(person, time in seconds, concept) of all events, sorted; visits cluster them, each person has few concepts."""
    share = random.lognormal(0, 0.6, PERSONS)
    counts = np.maximum(random.multinomial(EVENTS, share / share.sum()), 10)
    person = np.repeat(np.arange(1, PERSONS + 1), counts)
    visit = random.integers(0, 150, len(person))
    visit_day = random.integers(0, DAYS, (PERSONS + 1, 150))
    day = visit_day[person, visit] + random.geometric(0.6, len(person)) - 1
    second = np.where(random.random(len(person)) < 0.3, DAY_SECONDS - 1, random.integers(0, DAY_SECONDS, len(person)))
    weight = 1 / np.arange(1, CONCEPTS + 1) ** 1.05
    own = random.permutation(CONCEPTS)[
        np.stack([random.choice(CONCEPTS, OWN, replace=False, p=weight / weight.sum()) for _ in range(PERSONS + 1)])
    ]
    habit = 1 / np.arange(1, OWN + 1)
    concept = own[person, random.choice(OWN, len(person), p=habit / habit.sum())] + 1
    time = (FIRST_DAY + day) * DAY_SECONDS + second
    order = np.lexsort((concept, time, person))
    return person[order], time[order], concept[order].astype(np.int64)


def pairs() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(concept, task): concept n + 1 is task n; a concept means itself and its ancestors in the tree."""
    concept = node = np.arange(1, CONCEPTS + 1)
    found = []
    while len(node):
        found.append(np.column_stack([concept, node - 1]))
        concept, node = concept[node > 1], (node[node > 1] + BRANCHES - 2) // BRANCHES
    table = np.concatenate(found)
    table = table[table[:, 1] < TASKS]
    return table[:, 0], table[:, 1]


Call = Callable[[], None]


def fill(url: str, folder: Path, settings: Settings) -> tuple[Call, Call, Call]:
    """Make the rows in both; calls that label anew, check that both made the same labels, and forget ours.

    DuckDB writes its file over the last one; so ours are forgotten before they are made anew.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from app.store import cohorts, tasks
    from app.store.copy import HEADER, TRAILER
    from app.store.timelines import COLUMNS, pack
    from workers.stages import stage as stage_of

    random = np.random.default_rng(0)
    person, time, concept = draw(random)
    pair_concept, pair_task = pairs()
    date_only = time % DAY_SECONDS == DAY_SECONDS - 1
    last = np.zeros(PERSONS + 1, np.int64)
    last[person] = time
    index = (FIRST_DAY + random.integers(DAYS // 4, 3 * DAYS // 4, PERSONS)) * DAY_SECONDS + 43_200
    engine = make_engine(url)
    with engine.begin() as connection:
        write_rows(connection, index, last, pair_concept, pair_task)
        with (
            raw(connection).cursor().copy(f"COPY omop.timeline ({', '.join(COLUMNS)}) FROM STDIN (FORMAT BINARY)") as c
        ):
            c.write(HEADER)
            for block in pack([(person, time * 2 + date_only, concept.astype(np.int32))]):
                c.write(block)
            c.write(TRAILER)

    def stage(function: Callable[[Any], dict[str, Any]], **args: Any) -> dict[str, Any]:
        return function(InlineWork(engine, args=args, folder=folder / "work", settings=settings))

    stage(cohorts.build, name="bench")
    specs = [
        TaskSpec(name=f"task {n}", concepts=(n + 1,), occurrence="next", prior="keep", same_day="after").to_dict()
        for n in range(TASKS)
    ]
    stage(tasks.build, name="bench", cohort="bench", specs=specs)
    members = pa.table(
        {
            "member": np.arange(PERSONS),
            "person": np.arange(1, PERSONS + 1),
            "index_time": index,
            "follow_up_end": (last[1:] // DAY_SECONDS + 1) * DAY_SECONDS - 1,
            "visit_from": index - 43_200,
            "visit_to": index + 43_199,
        }
    )
    pq.write_table(members, folder / "member.parquet")
    pq.write_table(
        pa.table({"concept": pair_concept.astype(np.int32), "task": pair_task.astype(np.int16)}),
        folder / "pair.parquet",
    )
    events = pa.table({"person": person, "time": time, "concept": concept.astype(np.int32)})
    pq.write_table(events, folder / "event.parquet", row_group_size=250_000)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM ANALYZE")  # as the server does by itself within minutes

    number = itertools.count(1)

    label = stage_of("label")

    def ours() -> None:
        stage(label, name=f"bench{next(number)}", cohort="bench", tasks="bench")

    def check() -> None:
        import duckdb

        totals = duckdb.sql(
            "SELECT count(*) FILTER (WHERE event), sum(seconds) FILTER (WHERE event), count(*) FILTER (WHERE prior), "
            f"count(*) FILTER (WHERE in_visit) FROM '{folder}/label.parquet'"
        ).fetchall()[0]
        with engine.connect() as connection:
            found = connection.exec_driver_sql(
                "SELECT sum(cardinality(event_tasks)), sum((SELECT sum(s) FROM unnest(event_seconds) s)), "
                "sum(cardinality(prior_tasks)), sum(cardinality(visit_tasks)) FROM label.tte WHERE label_set_id = 1"
            ).one()
        if [int(n) for n in totals] != [int(n) for n in found]:
            raise ValueError(f"Expected both to make the same labels, got {totals} from DuckDB and {tuple(found)}.")

    def forget() -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql("TRUNCATE label.label_set RESTART IDENTITY CASCADE")

    return ours, check, forget


def write_rows(
    connection: Any,
    index: NDArray[np.int64],
    last: NDArray[np.int64],
    concept: NDArray[np.int64],
    task: NDArray[np.int64],
) -> None:
    """Persons, their periods and scans, and the ancestors that make the pairs."""
    run = connection.exec_driver_sql
    run("INSERT INTO ops.source (name) VALUES ('bench')")
    run(
        "INSERT INTO ops.load (source_id, kind, mode, table_name, state, files, content_sha256, num_read, num_loaded, "
        "num_rejected) SELECT source_id, 'omop', 'snapshot', 'person', 'published', '[]', '', 0, 0, 0 FROM ops.source"
    )
    run(
        "INSERT INTO omop.person (person_id, birth_time, load_id) "
        f"SELECT n, '1960-01-01', load_id FROM generate_series(1, {PERSONS}) n, ops.load"
    )
    with (
        raw(connection)
        .cursor()
        .copy(
            "COPY omop.observation_period (observation_period_id, person_id, start_date, end_date, load_id) FROM STDIN"
        ) as copy
    ):
        for n in range(1, PERSONS + 1):
            end = np.datetime64(int(last[n]) // DAY_SECONDS, "D")
            copy.write_row([n, n, "2000-01-01", str(end), 1])
    with (
        raw(connection)
        .cursor()
        .copy(
            "COPY omop.image_occurrence (person_id, acquired_at, date_only, acquired_at_source, image_key, root, path, "
            "format, verdict, load_id) FROM STDIN"
        ) as copy
    ):
        for n in range(1, PERSONS + 1):
            when = str(np.datetime64(int(index[n - 1]), "s"))
            copy.write_row([n, when, False, "manifest", f"{n}", "r", f"{n}", "nifti", "ok", 1])
    with raw(connection).cursor().copy("COPY omop.concept_ancestor FROM STDIN") as copy:
        for descendant, ancestor in zip(concept.tolist(), (task + 1).tolist(), strict=True):
            if descendant != ancestor:
                copy.write_row([ancestor, descendant, 1, 1])
    run(
        "INSERT INTO omop.concept (concept_id, concept_name, domain_id, vocabulary_id, concept_class_id, "
        f"standard_concept, concept_code) SELECT n, n, 'd', 'v', 'c', 'S', n FROM generate_series(1, {CONCEPTS}) n"
    )


def duckdb_query(folder: Path) -> Callable[[], object]:
    """The peer as a call."""
    import duckdb

    connection = duckdb.connect()
    connection.execute("SET threads = 2")
    statement = DUCKDB.format(folder=folder, tasks=TASKS)
    return lambda: connection.execute(statement)
