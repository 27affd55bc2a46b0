"""Features of a cohort: against the slow twin, under later rows, made again, and as readers see them."""

from __future__ import annotations

import datetime as dt
import itertools
import random
from collections.abc import Callable

import pytest
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from app.errors import InputError
from app.store import cohorts, listing, tasks
from app.store.work import InlineWork
from app.tasks import TaskSpec
from tests.app.store.records import Records, rows
from tests.reference.features import Event, Visit
from tests.reference.features import features as slow
from tests.workers import sound_store
from tests.workers.sound_store import change, repack
from workers.stages.features import features
from workers.stages.leakage_features import features_look_back

Make = Callable[..., InlineWork]

START = dt.datetime(2019, 12, 1)
ROOT, CHILD, LAB = 100, 101, 300
WINDOWS = (2, 30)


def draw_time(random_: random.Random) -> tuple[dt.datetime, bool]:
    """A moment on a coarse grid, so that ties and shared days are common; sometimes a day alone."""
    day = START + dt.timedelta(days=random_.randrange(40))
    if random_.random() < 0.4:
        return day + dt.timedelta(seconds=86_399), True
    return day + dt.timedelta(hours=random_.choice([0, 8, 12, 16])), False


def draw_visit(random_: random.Random, key: int) -> Visit:
    start, date_only = draw_time(random_)
    end: dt.datetime | None = start + dt.timedelta(hours=random_.choice([0, 4, 60, 400]))
    end_date_only = date_only or random_.random() < 0.3
    if end_date_only and end is not None:
        end = dt.datetime.combine(end.date(), dt.time(23, 59, 59))
    if random_.random() < 0.15:
        end, end_date_only = None, False
    concept = random_.choice([9201, 9202])
    return Visit(key=key, concept=concept, start=start, end=end, date_only=date_only, end_date_only=end_date_only)


def draw_event(random_: random.Random, visits: list[Visit]) -> Event:
    time, date_only = draw_time(random_)
    concept = random_.choice([ROOT, CHILD, LAB, 7])
    value = float(random_.randrange(9)) if concept == LAB and random_.random() < 0.8 else None
    return Event(
        time=time, date_only=date_only, concept=concept,
        domain=random_.choice("mmo") if concept == LAB else random_.choice("cd"), value=value,
        unit=random_.choice([0, 8713]) if value is not None else 0,
        visit=random_.choice([v.key for v in visits]) if visits and random_.random() < 0.6 else None,
    )  # fmt: skip


def write_person(records: Records, person: int, events: list[Event], visits: list[Visit], sex: int) -> list[Event]:
    """A person's rows; all events, the starts of visits too, in the order of their row ids."""
    records.person(person, gender=sex, birth="1960-01-01")
    records.period(person, "2010-01-01", "2022-01-01")
    for v in visits:
        records.visit(
            person, v.start, v.end, v.concept, key=v.key, date_only=v.date_only, end_date_only=v.end_date_only
        )
    for e in events:
        records.event(
            person, e.time, e.concept, date_only=e.date_only, domain=e.domain, value=e.value, unit=e.unit or None,
            visit=e.visit,
        )  # fmt: skip
    starts = [Event(time=v.start, date_only=v.date_only, concept=v.concept, domain="v", visit=v.key) for v in visits]
    return starts + events


SPECS = [
    TaskSpec(name="root", concepts=(ROOT,)),
    TaskSpec.from_dict({"name": "high", "concepts": [LAB], "values": [{"above": 4, "unit": 8713}]}),
    TaskSpec.from_dict({"name": "given", "concepts": [ROOT], "domains": ["condition"]}),
    TaskSpec.from_dict({"name": "admission", "visit_concepts": [9201], "occurrence": "next"}),
]
GROUPS: dict[str, Callable[[Event], bool]] = {
    "root": lambda e: e.concept in (ROOT, CHILD),
    "high": lambda e: e.concept == LAB and e.value is not None and e.value > 4 and e.unit == 8713,
    "given": lambda e: e.concept in (ROOT, CHILD) and e.domain == "c",
    "admission": lambda e: e.domain == "v" and e.concept == 9201,
}


@pytest.mark.parametrize("seed", range(5))
def test_features_are_those_of_the_slow_twin(engine: Engine, work: Make, seed: int) -> None:
    random_, keys = random.Random(seed), itertools.count(100_000)
    people: dict[int, tuple[list[Event], list[Visit], int]] = {}
    scans: dict[int, tuple[int, dt.datetime, bool]] = {}
    with engine.begin() as connection:
        records = Records(connection)
        records.concepts([ROOT, CHILD, LAB, 7])
        records.ancestors([(ROOT, CHILD, 1)])
        for person in range(1, 61):
            visits = [draw_visit(random_, next(keys)) for _ in range(random_.randrange(3))]
            visits = list({v.start: v for v in visits}.values())  # two starts of one second are one to `admission`
            events = [draw_event(random_, visits) for _ in range(random_.choice([0, 2, 6, 15]))]
            sex = random_.choice([8507, 8532, 0])
            people[person] = write_person(records, person, events, visits, sex), visits, sex
            for _ in range(random_.randrange(1, 3)):
                time, date_only = draw_time(random_)
                scans[records.scan(person, time, date_only=date_only)] = person, time, date_only
        records.pack()
    cohorts.build(work(name="c", per="series"))
    tasks.build(work(name="t", cohort="c", specs=[spec.to_dict() for spec in SPECS]))
    made = features(work(cohort="c", tasks="t", windows=WINDOWS, values=4))
    pairs = [
        (row.concept_id, row.unit_concept_id)
        for row in rows(engine, "SELECT concept_id, unit_concept_id FROM label.feature_definition WHERE kind = 'value'")
    ]
    assert pairs
    found: dict[int, dict[str, float]] = {scan: {} for scan in scans}
    statement = (
        "SELECT m.image_occurrence_id AS scan, f.name, f.value FROM label.feature f "
        "JOIN label.cohort_member m USING (cohort_member_id)"
    )
    for row in rows(engine, statement):
        found[row.scan][row.name] = row.value
    assert sum(map(len, found.values())) == made["values"] > 100
    for scan, (person, time, date_only) in scans.items():
        events, visits, sex = people[person]
        expected = slow(events, visits, time, index_date_only=date_only, windows=WINDOWS, groups=GROUPS, pairs=pairs)
        expected["age_years"] = (time - dt.datetime(1960, 1, 1)) / dt.timedelta(days=365.25)
        if sex:
            expected["sex_female"] = float(sex == 8532)
        assert found[scan] == pytest.approx(expected, rel=1e-6), (scan, time, date_only)
    assert leakage_of_features(engine, work) == "passed"


def leakage_of_features(engine: Engine, work: Make) -> str:
    """The verdict on the features of a cohort, without labels."""
    with engine.connect() as connection:
        return features_look_back(work(), connection, 1).verdict


def test_no_later_row_changes_a_feature(engine: Engine, work: Make) -> None:
    """Rows from the index on, and ends of visits that are yet to come, are added; what was stored stays the same."""
    random_ = random.Random(11)
    with engine.begin() as connection:
        records = Records(connection)
        records.concepts([ROOT, CHILD, LAB, 7])
        for person in range(1, 31):
            visit = records.visit(person, "2019-12-30 08:00:00", "2020-01-01 13:00:00", 9201)
            records.person(person)
            records.period(person, "2010-01-01", "2022-01-01")
            records.scan(person, "2020-01-01 12:00:00")
            for _ in range(5):
                day = dt.datetime(2020, 1, 1, 11) - dt.timedelta(days=random_.randrange(60))
                records.event(person, day, LAB, domain="m", value=float(random_.randrange(9)))
                records.event(person, day, CHILD, visit=visit)
        records.pack()
    cohorts.build(work(name="c"))
    features(work(cohort="c"))
    before = rows(engine, "SELECT * FROM label.feature ORDER BY 1, 2")
    with engine.begin() as connection:
        for person in range(1, 31):
            for hours in (0, 1, 30):
                later = dt.datetime(2020, 1, 1, 12) + dt.timedelta(hours=hours)
                for concept, domain in ((LAB, "m"), (CHILD, "c"), (7, "d")):
                    records_event(connection, person, later, concept, domain)
            records_event(connection, person, dt.datetime(2020, 1, 1, 23, 59, 59), LAB, "m", date_only=True)
        connection.execute(text("UPDATE omop.visit_occurrence SET visit_end_datetime = '2020-03-01 10:00:00'"))
    repack(engine)
    assert features(work(cohort="c"))["unchanged"] is True
    assert rows(engine, "SELECT * FROM label.feature ORDER BY 1, 2") == before


def records_event(
    connection: Connection, person: int, time: dt.datetime, concept: int, domain: str, *, date_only: bool = False
) -> None:
    """One more row of the store's only load."""
    connection.execute(
        text(
            "INSERT INTO omop.event (person_id, time, date_only, concept_id, source_concept_id, value_as_number, "
            "domain, source_row_id, load_id) SELECT :person, :time, :date_only, :concept, 0, 5, :domain, "
            "max(source_row_id) + 1, max(load_id) FROM omop.event"
        ),
        {"person": person, "time": time, "date_only": date_only, "concept": concept, "domain": domain},
    )


@pytest.fixture
def sound(engine: Engine, work: Make) -> Engine:
    sound_store.write(engine, work)
    return engine


def test_features_again_change_nothing_and_other_windows_replace_them(sound: Engine, work: Make) -> None:
    assert features(work(cohort="c", tasks="t"))["unchanged"] is True
    again = features(work(cohort="c", windows=[7], values=0))
    assert again["unchanged"] is False
    names = {row.name for row in rows(sound, "SELECT DISTINCT name FROM label.feature")}
    assert "events_7d" in names and not names & {"events_30d", "root_ever"}
    with pytest.raises(InputError, match="windows"):
        features(work(cohort="c", windows=[0]))


def test_what_others_put_among_features_goes_when_they_are_made_again(sound: Engine, work: Make) -> None:
    statement = "SELECT * FROM label.feature ORDER BY 1, 2"
    before = rows(sound, statement)
    change(
        sound,
        "INSERT INTO label.feature SELECT cohort_member_id, 'from_nowhere', 1 FROM label.cohort_member",
        "UPDATE label.feature SET value = value + 1 WHERE name = 'events_ever'",
        "DELETE FROM label.feature WHERE name = 'events_365d'",
    )
    assert features(work(cohort="c", tasks="t"))["unchanged"] is False
    assert rows(sound, statement) == before


def test_tasks_of_one_name_with_other_features_are_refused(sound: Engine, work: Make) -> None:
    spec = TaskSpec(name="events", concepts=(ROOT,))
    tasks.build(work(name="u", cohort="c", specs=[spec.to_dict()]))
    with pytest.raises(InputError, match="events_30d twice"):
        features(work(cohort="c", tasks="u"))


def test_features_stand_side_by_side_in_sql(sound: Engine) -> None:
    statement = (
        "SELECT a.*, coalesce(f.value, 0)::float8 AS root, g.value::float8 AS age, h.value::float8 AS last "
        "FROM label.feature_array('c', ARRAY['root_ever', 'age_years', 'days_since_last_event']) a "
        "LEFT JOIN label.feature f ON f.cohort_member_id = a.cohort_member_id AND f.name = 'root_ever' "
        "LEFT JOIN label.feature g ON g.cohort_member_id = a.cohort_member_id AND g.name = 'age_years' "
        "LEFT JOIN label.feature h ON h.cohort_member_id = a.cohort_member_id AND h.name = 'days_since_last_event'"
    )
    found = rows(sound, statement)
    assert len(found) == 90
    assert all(row.feature_values == [row.root, row.age, row.last] for row in found)
    assert 0 < sum(row.root == 0 for row in found) < 90
    for wrong, message in (("'d', ARRAY['age_years']", 'none called "d"'), ("'c', ARRAY['agee']", "none called agee")):
        with pytest.raises(DBAPIError, match=message):
            rows(sound, f"SELECT * FROM label.feature_array({wrong})")


def test_features_are_shown_by_split(sound: Engine) -> None:
    kind = listing.KINDS["feature"]
    with sound.connect() as connection:
        shown = listing.details(connection, kind.parts[0][1], "c", None)
    by = {(row["name"], row["split"]): row for row in shown}
    counts = rows(
        sound,
        "SELECT split, count(*) AS scans, avg(feature_values[1]) AS mean, "
        "percentile_cont(0.75) WITHIN GROUP (ORDER BY feature_values[1]) AS upper "
        "FROM label.feature_array('c', ARRAY['root_ever']) GROUP BY split",
    )
    assert len(counts) == 2
    for row in counts:
        one = by["root_ever", row.split]
        assert (one["scans"], one["mean"], one["upper_quartile"]) == (row.scans, pytest.approx(row.mean), row.upper)
        assert by["age_years", row.split]["known_percent"] == 100
