"""Label sets on a store: versions, digests, empty inputs, and a real extract against an independent count."""

from __future__ import annotations

import csv
import datetime as dt
import gzip
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine, text

from app.errors import Cancelled, InputError, UnknownName
from app.store import cohorts, tasks
from app.store.splits import fraction, split_at
from app.store.work import InlineWork
from tests.app.store.records import Records, rows
from workers import bridge
from workers.stages import label_timelines
from workers.stages.label import label

Make = Callable[..., InlineWork]


def fill(engine: Engine, persons: range = range(1, 13), *, reverse: bool = False) -> None:
    """Persons scanned in 2015 with concept 1 before or 2 after it; scans get other keys when reversed."""
    with engine.begin() as connection:
        records = Records(connection)
        records.concepts([1, 2])
        for person in reversed(persons) if reverse else persons:
            records.person(person)
            records.period(person, "2010-01-01", "2020-12-31")
            records.event(person, f"2014-01-{person:02} 10:00:00", 1)
            records.event(person, f"2016-01-{person:02} 10:00:00", 1 + person % 2)
            records.scan(person, f"2015-03-{person:02} 12:00:00", path=f"{person}.nii", image_key=f"i/{person}.nii")
        records.pack()


def build(work: Make) -> dict[str, Any]:
    cohorts.build(work(name="c"))
    specs = [{"name": "one", "concepts": [1], "prior": "keep"}, {"name": "two", "concepts": [2]}]
    tasks.build(work(name="t", cohort="c", specs=specs))
    return label(work(name="l", cohort="c", tasks="t"))


def digests(engine: Engine) -> list[tuple[bytes, bytes]]:
    found = rows(engine, "SELECT digest, data_digest FROM label.label_set ORDER BY version")
    return [(bytes(r.digest), bytes(r.data_digest)) for r in found]


def test_the_same_inputs_change_nothing_and_a_new_event_moves_the_name(engine: Engine, work: Make) -> None:
    fill(engine)
    first = build(work)
    assert not first["unchanged"] and first["events"] == 12
    assert build(work) == first | {"unchanged": True, "recomputed": 0}
    assert rows(engine, "SELECT count(*) AS n FROM label.tte")[0].n == 12

    with engine.begin() as connection:
        records = Records.__new__(Records)
        records.connection = connection
        records.do("UPDATE omop.event SET time = time + interval '1 day' WHERE person_id = 4 AND time > '2015-06-01'")
        records.pack()
    second = build(work)
    assert (second["version"], second["unchanged"]) == (2, False)
    with engine.connect() as connection:
        now, old = (bridge.find_label_set(connection, name) for name in ("l", "l@1"))
        assert (now.version, old.version, now.cohort, now.task_set) == (2, 1, "c", "t")
        times = [bridge.read_labels(connection, info).events.seconds for info in (now, old)]
    assert times[0] is not None and times[1] is not None and (times[0] - times[1]).sum() == 86_400
    (before, data_before), (after, data_after) = digests(engine)
    assert before != after and data_before != data_after


def test_labels_kept_under_other_keys_have_the_same_digest(engine: Engine, work: Make) -> None:
    """The digests hold neither member nor scan keys, so the same data loaded elsewhere gives the same."""
    found = []
    for reverse in (False, True):
        with engine.begin() as connection:
            for table in ("label.label_set", "label.cohort", "label.task_set", "omop.event", "omop.image_occurrence"):
                connection.exec_driver_sql(f"TRUNCATE {table} CASCADE")
            connection.exec_driver_sql("TRUNCATE omop.person, omop.observation_period, omop.concept CASCADE")
            connection.exec_driver_sql("DELETE FROM ops.load; DELETE FROM ops.source")
        fill(engine, reverse=reverse)
        build(work)
        found += digests(engine)
    assert len(found) == 2 and len(set(found)) == 1


def test_the_number_of_chunks_changes_nothing(engine: Engine, work: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(engine)
    build(work)
    counts = "SELECT position, split, status, n, persons, person_days FROM label.task_status_count ORDER BY 1, 2, 3"
    before, rows_before = digests(engine), rows(engine, counts)
    with engine.begin() as connection:
        connection.exec_driver_sql("TRUNCATE label.label_set CASCADE")
    monkeypatch.setattr(label_timelines, "STRETCH_MEMBERS", 1)
    build(work)
    assert digests(engine) == before and rows(engine, counts) == rows_before


def test_timelines_that_are_read_early_are_those_of_the_moment_all_else_is_read(engine: Engine, work: Make) -> None:
    fill(engine)
    with engine.connect() as connection:
        person = np.array(connection.exec_driver_sql("SELECT person_id FROM omop.timeline ORDER BY 1").scalars().all())
    ones = np.ones(len(person), np.int64)
    with engine.connect() as connection:
        reading = connection.execution_options(isolation_level="REPEATABLE READ")
        with label_timelines.Early(work(), reading) as early:
            with engine.begin() as other:
                other.exec_driver_sql("UPDATE omop.timeline SET num_events = 0, times = '', concepts = ''")
            early.begin(person, ones, ones)
            assert early.reader is not None
            members = SimpleNamespace(person=person)
            (part, timelines), *more = early.reader.of_members(members)  # type: ignore[arg-type]
    assert part == slice(0, len(person)) and not more
    assert len(timelines.time) > len(person)


def test_a_cancelled_job_leaves_no_label_and_the_name_where_it_was(engine: Engine, work: Make) -> None:
    fill(engine)
    first = build(work)

    class Stopped(InlineWork):
        def progress(self, done: int, total: int | None = None, unit: str = "", note: str = "") -> None:
            raise Cancelled

    plain = work(name="l", cohort="c", tasks="t2")
    tasks.build(work(name="t2", cohort="c", specs=[{"name": "two", "concepts": [2]}]))
    with pytest.raises(Cancelled):
        label(Stopped(engine, args=plain.args, folder=plain.folder, settings=plain.settings))
    current = rows(engine, "SELECT label_set_id, is_current FROM label.label_set")
    assert [tuple(r) for r in current] == [(first["label_set_id"], True)]
    assert rows(engine, "SELECT count(*) AS n FROM label.tte")[0].n == 12


def test_stored_counts_are_those_of_the_long_view(engine: Engine, work: Make) -> None:
    fill(engine)
    build(work)
    counted = rows(
        engine,
        "SELECT task, split, status, count(*) AS n, count(DISTINCT person_id) AS persons FROM label.tte_long "
        "GROUP BY 1, 2, 3 ORDER BY 1, 2, 3",
    )
    stored = rows(engine, "SELECT task, split, status, n, persons FROM label.task_count ORDER BY 1, 2, 3")
    assert [tuple(r) for r in stored] == [tuple(r) for r in counted]


def test_an_empty_cohort_and_tasks_without_outcomes_work(
    engine: Engine, work: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    cohorts.build(work(name="c"))
    specs = [{"name": "a", "concepts": [1]}]
    tasks.build(work(name="t", cohort="c", specs=specs, allow_absent=True))
    assert label(work(name="l", cohort="c", tasks="t"))["members"] == 0
    with engine.connect() as connection:
        info = bridge.find_label_set(connection, "l")
        arrays, members = bridge.read_labels(connection, info), bridge.read_members(connection, info.cohort_id)
    assert len(arrays.member) == len(members.member) == 0 and arrays.events.ptr.tolist() == [0]
    fill(engine)
    cohorts.build(work(name="c"))
    tasks.build(work(name="none", cohort="c", specs=[{"name": "b", "concepts": [9]}], allow_absent=True))
    assert label(work(name="l", cohort="c", tasks="none"))["events"] == 0
    assert "No member has an outcome" in capsys.readouterr().err
    assert {r.status for r in rows(engine, "SELECT status FROM label.tte_long")} == {"censored"}


def test_unknown_names_suggest_the_nearest(engine: Engine, work: Make) -> None:
    fill(engine)
    build(work)
    with pytest.raises(UnknownName, match="No cohort named 'cc'"):
        label(work(name="l", cohort="cc", tasks="t"))
    with engine.connect() as connection, pytest.raises(UnknownName, match="No label set named 'l@7'"):
        bridge.find_label_set(connection, "l@7")


def read_table(folder: Path, table: str) -> Iterator[list[str]]:
    """Rows of a file by position, header left out."""
    with gzip.open(folder / f"{table}.csv.gz", "rt", newline="") as file:
        reader = csv.reader(file)
        next(reader)
        yield from reader


def end_of_day(text: str) -> dt.datetime:
    return dt.datetime.fromisoformat(text[:10]) + dt.timedelta(days=1, seconds=-1)


def count_gi_bleeds(folder: Path, manifest: Path) -> Counter[tuple[str, str]]:
    """(split, status) of every scan of the manifest, from the files alone."""
    bleed, cut = 192671, end_of_day(next(read_table(folder, "cdm_source"))[6])
    wanted = {bleed} | {int(r[1]) for r in read_table(folder, "concept_ancestor") if int(r[0]) == bleed}
    times: dict[int, list[dt.datetime]] = {}
    for row in read_table(folder, "condition_occurrence"):
        if int(row[2]) in wanted:
            times.setdefault(int(row[1]), []).append(end_of_day(row[3]))
    periods = {int(r[1]): (r[2], r[3]) for r in read_table(folder, "observation_period")}
    found: Counter[tuple[str, str]] = Counter()
    with manifest.open(newline="") as file:
        for scan in csv.DictReader(file):
            person, index = int(scan["person_id"]), dt.datetime.fromisoformat(scan["acquired_at"])
            start, end = periods[person]
            last = min(end_of_day(end), cut)
            inside = start <= str(index.date()) <= end and last.date() > index.date()
            mine = times.get(person, [])
            if not inside:
                status = "ineligible"
            elif any(t.date() <= index.date() for t in mine):
                status = "prior"
            else:
                status = "event" if any(t <= last for t in mine) else "censored"
            found[split_at(fraction(person)), status] += 1
    return found


def test_bleeds_after_celecoxib_agree_with_counting_in_the_files(
    engine: Engine, work: Make, real_data: Path, tmp_path: Path
) -> None:
    from app.loading import images, omop
    from app.tasks import read_task_file

    folder, manifest = real_data / "omop_gibleed_broadsea_5.3", real_data / "manifest_gibleed_celecoxib.csv"
    loading = {"mode": "snapshot", "max_rejects": 0.05, "allow_shrink": False, "data_cut": None}
    loading |= {"midnight_is_time": False, "delimiter": None}
    omop.load(work(what="omop", path=str(folder), source="omop", **loading))
    images.load(work(what="images", path=str(manifest), root=None, match=None, source="images", arbitrary_pairing=True))
    file = tmp_path / "gi_bleed.toml"
    file.write_text('name = "gi_bleed"\nconcepts = [192671]\n')
    cohorts.build(work(name="c"))
    tasks.build(work(name="t", cohort="c", specs=[read_task_file(file).to_dict()]))
    label(work(name="l", cohort="c", tasks="t"))
    stored = {(r.split, r.status): r.n for r in rows(engine, "SELECT * FROM label.task_count")}
    assert stored == count_gi_bleeds(folder, manifest)
    with engine.connect() as connection:
        scans = bridge.read_scans(connection, work().settings, bridge.find_label_set(connection, "l").cohort_id)
    assert len(scans) == 1844 and all(scan.path.exists() for scan in scans)


def test_labels_are_refused_where_the_vocabulary_lacks_concepts_in_use(
    engine: Engine, work: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    def state(statement: str) -> None:
        with engine.begin() as connection:
            connection.execute(text(statement))

    fill(engine)
    state(
        "INSERT INTO omop.concept_count SELECT l.source_id, e.concept_id, count(*), 1, 0, 0 "
        "FROM omop.event e JOIN ops.load l USING (load_id) GROUP BY 1, 2"
    )
    build(work)
    state("DELETE FROM omop.concept")
    make = {"name": "l", "cohort": "c", "tasks": "t"}
    assert label(work(**make))["unchanged"]  # no vocabulary to speak of: said, not refused
    assert "24 of 24 events (100.00%) of source 'test'" in capsys.readouterr().err
    state(
        "INSERT INTO ops.vocabulary_release (version, is_current, is_full, digest, files) "
        "VALUES ('v5.0 27-FEB-25', true, false, '', '{}')"
    )
    with pytest.raises(InputError, match=r"of source 'test' have concepts .* `lachesis load vocabulary DIR`"):
        label(work(**make))
    assert label(work(**make, allow_unknown_concepts=True))["unchanged"]
    state(
        "INSERT INTO omop.concept (concept_id, concept_name, domain_id, vocabulary_id, concept_class_id, concept_code) "
        "SELECT concept_id, '', '', '', '', '' FROM omop.concept_count WHERE concept_id <> 0"
    )
    assert label(work(**make))["unchanged"]
    assert label(work(**make | {"name": "newer"}))["version"] == 1
    assert [
        r.vocabulary_version for r in rows(engine, "SELECT vocabulary_version FROM label.label_set ORDER BY 1")
    ] == [
        "v5.0 27-FEB-25",
        None,
    ]
