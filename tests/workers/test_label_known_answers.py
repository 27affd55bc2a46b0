"""Labels of real extracts against counting in their files, by plain SQL that shares nothing with the store."""

from __future__ import annotations

import csv
import datetime as dt
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pytest
from sqlalchemy import Engine

from app.store import cohorts, tasks
from app.store.splits import fraction, split_at
from app.store.work import InlineWork
from tests.app.store.records import rows
from workers.stages.label import label

Make = Callable[..., InlineWork]

DEATH = 4306655
VOLUME = "ct_totalsegmentator/example_ct_sm.nii.gz"

# Columns by place, from 1, as headers of some files cannot be trusted: person, concept, date, datetime.
TABLES = {
    "condition_occurrence": (2, 3, 4, 5),
    "drug_exposure": (2, 3, 4, 5),
    "procedure_occurrence": (2, 3, 4, 5),
    "device_exposure": (2, 3, 4, 5),
    "measurement": (2, 3, 4, 5),
    "observation": (2, 3, 4, 5),
    "specimen": (2, 3, 5, 6),
    "visit_occurrence": (2, 3, 4, 5),
    "visit_detail": (2, 3, 4, 5),
    "death": (1, None, 2, 3),
}


@dataclass(frozen=True)
class Extract:
    """A public data set: its folder, its data cut, and a condition that many of its persons have."""

    folder: str
    cut: str
    condition: int
    manifest: str | None = None


EXTRACTS = {
    "gibleed": Extract("omop_gibleed_broadsea_5.3", "2019-05-25", 192671, "manifest_gibleed_celecoxib.csv"),
    "synthea": Extract("omop_synthea27nj_5.4", "2022-10-10", 40481087),
    "mimic": Extract("omop_mimic_iv_demo_5.3_partial", "2190-06-30", 320128),
}

SPECS: dict[str, dict[str, Any]] = {
    "first": {},
    "next": {"prior": "keep", "same_day": "after"},
    "late": {"start_days": 30, "prior_days": 365},
    "competing": {"prior": "keep", "death": "competing", "min_follow_up_days": 100},
}

EVENTS = "CREATE TABLE event (person BIGINT, concept BIGINT, time TIMESTAMP, day_alone BOOLEAN, died BOOLEAN)"

CELLS = """
CREATE OR REPLACE TABLE cell AS
WITH death AS (SELECT person, min(time) AS died FROM event WHERE died GROUP BY 1),
last AS (SELECT person, max(time) AS last FROM event GROUP BY 1),
period AS (SELECT person, start, stop FROM read_period),
ends AS (
    SELECT s.person, s.indexed, d.died, CASE $rule
               WHEN 'observation_period' THEN (
                   SELECT max(p.stop) + INTERVAL 86399 SECOND FROM period p
                   WHERE p.person = s.person AND s.indexed::DATE BETWEEN p.start AND p.stop)
               WHEN 'last_event' THEN l.last
               ELSE $cut::DATE + INTERVAL 86399 SECOND END AS rule_end
    FROM scan s LEFT JOIN death d USING (person) LEFT JOIN last l USING (person)
),
member AS (
    SELECT person, indexed, died, CASE WHEN rule_end IS NOT NULL
               THEN least(rule_end, coalesce(died, rule_end), $cut::DATE + INTERVAL 86399 SECOND) END AS until
    FROM ends
),
hit AS (SELECT person, time, day_alone FROM event WHERE concept IN (SELECT concept FROM wanted)),
seen AS (
    SELECT m.*, m.indexed + INTERVAL 1 DAY * $start_days AS opens,
           EXISTS (SELECT 1 FROM hit h WHERE h.person = m.person
                   AND (h.time <= m.indexed + INTERVAL 1 DAY * $start_days
                        OR NOT $after AND h.day_alone AND h.time::DATE = m.indexed::DATE)
                   AND ($look_back IS NULL OR h.time >= m.indexed - INTERVAL 1 DAY * $look_back)) AS had,
           (SELECT min(h.time) FROM hit h WHERE h.person = m.person AND h.time <= m.until
            AND h.time > m.indexed + INTERVAL 1 DAY * $start_days
            AND NOT (NOT $after AND h.day_alone AND h.time::DATE = m.indexed::DATE)) AS first
    FROM member m
)
SELECT person, indexed, opens, CASE
           WHEN until IS NULL OR until::DATE <= indexed::DATE OR until <= opens THEN 'ineligible'
           WHEN until < indexed + INTERVAL 1 DAY * $min_days AND until IS DISTINCT FROM died THEN 'ineligible'
           WHEN $exclude AND had THEN 'prior' WHEN first IS NOT NULL THEN 'event'
           WHEN $competing AND died <= until THEN 'competing' ELSE 'censored' END AS status,
       coalesce(first, until) AS stop
FROM seen
"""

COUNTS = """
SELECT split, status, count(*), count(DISTINCT person),
       sum(CASE WHEN status IN ('event', 'competing', 'censored') THEN epoch(stop - opens) ELSE 0 END)::BIGINT
FROM cell JOIN person_split USING (person) GROUP BY 1, 2
"""


class Files:
    """The files of an extract in DuckDB, as text by column place."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.db = folder, duckdb.connect()
        self.db.execute("SET threads = 1")
        self.db.execute(EVENTS)
        for table, (person, concept, date, time) in TABLES.items():
            source = self.source(table)
            if source is None:
                continue
            what = DEATH if concept is None else f"c{concept}::BIGINT"
            moment = f"coalesce(c{time}, c{date})::TIMESTAMP"
            self.db.execute(
                f"INSERT INTO event SELECT c{person}::BIGINT, {what}, CASE WHEN t = t::DATE "
                f"THEN t::DATE + INTERVAL 86399 SECOND ELSE t END, t = t::DATE, {table == 'death'} "
                f"FROM (SELECT *, {moment} AS t FROM {source})"
            )
        self.db.execute(
            "CREATE TABLE read_period AS SELECT c2::BIGINT AS person, c3::DATE AS start, c4::DATE AS stop "
            f"FROM {self.source('observation_period')}"
        )

    def source(self, table: str) -> str | None:
        """A FROM item with columns c1, c2, …; None where there is no such file or no row in it."""
        found = [p for p in self.folder.iterdir() if p.name.lower().split(".")[0] == table]
        if not found:
            return None
        header = self.db.execute(
            f"SELECT * FROM read_csv('{found[0]}', header = false, all_varchar = true, delim = ',', quote = '\"', "
            "escape = '\"', strict_mode = false) LIMIT 2"
        ).fetchall()
        if len(header) < 2:
            return None
        names = ", ".join(f"'c{n + 1}'" for n in range(len(header[0])))
        return (
            f"read_csv('{found[0]}', header = false, skip = 1, all_varchar = true, names = [{names}], delim = ',', "
            "quote = '\"', escape = '\"', strict_mode = false)"
        )

    def middles(self) -> list[tuple[int, dt.datetime]]:
        """Of each person the time of the event in the middle, at noon where only its day is known."""
        return self.db.execute(
            "SELECT person, CASE WHEN day_alone THEN time::DATE + INTERVAL 12 HOUR ELSE time END FROM ("
            "  SELECT *, row_number() OVER w AS n, count(*) OVER (PARTITION BY person) AS of FROM event "
            "  WINDOW w AS (PARTITION BY person ORDER BY time, concept)) WHERE n = (of + 1) // 2 ORDER BY 1"
        ).fetchall()

    def want(self, condition: int) -> None:
        """A condition and what is narrower."""
        self.db.execute(f"CREATE TABLE wanted AS SELECT {condition}::BIGINT AS concept")
        source = self.source("concept_ancestor")
        if source is not None:
            self.db.execute(f"INSERT INTO wanted SELECT c2::BIGINT FROM {source} WHERE c1::BIGINT = {condition}")

    def scanned(self, scans: list[tuple[int, dt.datetime]]) -> None:
        self.db.execute("CREATE TABLE scan (person BIGINT, indexed TIMESTAMP)")
        self.db.executemany("INSERT INTO scan VALUES (?, ?)", scans)
        self.db.execute("CREATE TABLE person_split (person BIGINT, split VARCHAR)")
        splits = [(person, split_at(fraction(person))) for person in sorted({p for p, _ in scans})]
        self.db.executemany("INSERT INTO person_split VALUES (?, ?)", splits)

    def count(self, rule: str, cut: str, spec: dict[str, Any]) -> dict[tuple[str, str], tuple[int, int, int]]:
        """(split, status) → scans, persons, seconds at risk."""
        self.db.execute(
            CELLS,
            {
                "rule": rule,
                "cut": cut,
                "start_days": spec.get("start_days", 0),
                "look_back": spec.get("prior_days"),
                "after": spec.get("same_day") == "after",
                "exclude": spec.get("prior", "exclude") == "exclude",
                "competing": spec.get("death") == "competing",
                "min_days": spec.get("min_follow_up_days", 0),
            },
        )
        return {(r[0], r[1]): (r[2], r[3], r[4]) for r in self.db.execute(COUNTS).fetchall()}


def scans_of(files: Files, extract: Extract, real_data: Path, manifest: Path) -> list[tuple[int, dt.datetime]]:
    """Whose scans, and when; written as a manifest where the data set has none."""
    if extract.manifest:
        with (real_data / extract.manifest).open(newline="") as file:
            listed = list(csv.DictReader(file))
        manifest.write_bytes((real_data / extract.manifest).read_bytes())
        return [(int(r["person_id"]), dt.datetime.fromisoformat(r["acquired_at"])) for r in listed]
    scans = files.middles()
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["person_id", "acquired_at", "path"])
        writer.writerows([person, at.isoformat(" "), VOLUME] for person, at in scans)
    return scans


@pytest.mark.parametrize("name", EXTRACTS)
def test_counts_and_follow_up_are_those_of_the_files_under_every_rule(
    engine: Engine, work: Make, real_data: Path, tmp_path: Path, name: str
) -> None:
    from app.loading import images, omop

    extract = EXTRACTS[name]
    files = Files(real_data / extract.folder)
    scans = scans_of(files, extract, real_data, tmp_path / "scans.csv")
    files.want(extract.condition)
    files.scanned(scans)
    loading: dict[str, Any] = {"mode": "snapshot", "max_rejects": 0.05, "allow_shrink": False, "delimiter": None}
    loading |= {"midnight_is_time": False, "data_cut": extract.cut}
    omop.load(work(what="omop", path=str(real_data / extract.folder), source="omop", **loading))
    listed = {"path": str(tmp_path / "scans.csv"), "root": {"images": str(real_data)}, "match": None}
    images.load(work(what="images", source="images", arbitrary_pairing=True, **listed))
    specs = [{"name": task, "concepts": [extract.condition]} | fields for task, fields in SPECS.items()]
    seen: Counter[str] = Counter()
    for rule in ("observation_period", "last_event", "data_cut"):
        cohorts.build(work(name=rule, follow_up=rule))
        tasks.build(work(name="t", cohort=rule, specs=specs))
        label(work(name=rule, cohort=rule, tasks="t"))
        stored: defaultdict[str, dict[tuple[str, str], tuple[int, int, int]]] = defaultdict(dict)
        for r in rows(engine, "SELECT * FROM label.task_count WHERE label_set = :rule AND n > 0", rule=rule):
            stored[r.task][r.split, r.status] = r.n, r.persons, round(r.person_days * 86_400)
            seen[r.status] += r.n
        for task, fields in SPECS.items():
            assert stored[task] == files.count(rule, extract.cut, fields), (rule, task)
    assert min(seen[status] for status in ("event", "censored", "prior")) > 0
    assert (seen["competing"] > 0) == bool(files.db.execute("SELECT count(*) FROM event WHERE died").fetchall()[0][0])
