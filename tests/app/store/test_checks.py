"""Checks of loaded data: each fires on the fault it is for, and none fires on a sound store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from sqlalchemy import Connection, Engine, text

from app.embedded import Store
from app.errors import UnknownName
from app.report.data import every_month, middle, page
from app.store import checks
from app.store.checks_sql import EVENT_CHECKS, ROW_CHECKS
from app.store.query import ask
from tests.app.store.records import Records

CT, FINDING, NUMBER, VISIT = 10, 20, 30, 9202


def sound(connection: Connection) -> Records:
    """Ten persons observed 2010 to 2019, findings in each month of 2014 to 2017, and a scan in a visit with a CT."""
    r = Records(connection)
    r.concepts([CT, FINDING, NUMBER, VISIT, 9201, 4306655])
    r.do("UPDATE omop.concept SET concept_name = 'CT of chest' WHERE concept_id = :ct", ct=CT)
    for person in range(1, 11):
        r.person(person)
        r.period(person, "2010-01-01", "2019-12-31")
        visit = r.visit(person, "2015-06-01 08:00", "2015-06-01 18:00", VISIT)
        r.do("UPDATE omop.event SET end_time = '2015-06-01 18:00' WHERE visit_occurrence_id = :visit", visit=visit)
        r.event(person, "2015-06-01 09:00", CT, domain="p", visit=visit)
        r.event(person, "2015-06-01 10:00", NUMBER, domain="m", visit=visit, value=1.5, unit=8840)
        r.scan(person, "2015-06-01 09:05", series_uid=f"1.{person}")
    r.visit(1, "2016-01-01 08:00", "2016-01-05 10:00", 9201)
    r.death(10, "2018-03-01", date_only=True)
    r.do(
        "INSERT INTO omop.event (person_id, time, date_only, concept_id, source_concept_id, visit_occurrence_id, "
        "domain, source_row_id, load_id) SELECT 1 + (n % 10), m + make_interval(hours => n::int), false, :finding, 0, "
        "(SELECT min(visit_occurrence_id) FROM omop.visit_occurrence), 'c', 100000 + row_number() OVER (), :load "
        "FROM generate_series(timestamp '2014-01-01', '2017-12-01', '1 month') m, generate_series(1, 120) n",
        finding=FINDING,
        load=r.load_id,
    )
    r.pack()
    return r


def after(change: str) -> Callable[[Records], None]:
    """A fault that one statement plants."""
    return lambda r: r.do(change)


def lone_person(r: Records, **values: str | int | None) -> None:
    r.person(99, **values)  # type: ignore[arg-type]
    r.period(99, "2010-01-01", "2019-12-31")
    r.event(99, "2015-01-01 10:00", FINDING, visit=1, domain="v")
    r.pack()


FAULTS: dict[str, Callable[[Records], None]] = {
    "event_without_person": lambda r: r.event(77, "2015-01-01 10:00", FINDING, domain="v"),
    "event_before_birth": after("UPDATE omop.person SET birth_time = '2014-02-01' WHERE person_id = 2"),
    "event_after_death": after("UPDATE omop.event SET time = '2017-11-01' WHERE domain = 'x'"),
    "event_in_future": lambda r: (
        r.do("UPDATE omop.observation_period SET end_date = '2017-12-31'"),
        r.do("UPDATE ops.source SET data_cut = '2017-12-31'"),
        None,
    )[-1],
    "event_outside_period": after("UPDATE omop.observation_period SET start_date = '2014-03-01' WHERE person_id = 3"),
    "concept_zero": after("UPDATE omop.event SET concept_id = 0 WHERE domain = 'm' AND person_id = 1"),
    "concept_unknown": after("UPDATE omop.event SET concept_id = 31 WHERE domain = 'm' AND person_id = 1"),
    "concept_not_standard": after(f"UPDATE omop.concept SET standard_concept = NULL WHERE concept_id = {NUMBER}"),
    "visit_missing": after("UPDATE omop.event SET visit_occurrence_id = NULL WHERE domain = 'm' AND person_id = 1"),
    "end_before_start": after(
        "UPDATE omop.event SET end_time = time - interval '1 hour' WHERE domain = 'p' AND person_id = 1"
    ),
    "unit_missing": after("UPDATE omop.event SET unit_concept_id = 0 WHERE domain = 'm' AND person_id = 1"),
    "event_twice": lambda r: r.event(1, "2015-06-01 10:00", NUMBER, domain="m", visit=1, value=1.5, unit=8840),
    "volume_drop": after("DELETE FROM omop.event WHERE domain = 'c' AND time >= '2016-05-01' AND time < '2016-07-01'"),
    "table_ends_early": after("DELETE FROM omop.event WHERE domain = 'c' AND time > '2015-01-01'"),
    "birth_missing": lambda r: lone_person(r, birth=None),
    "birth_implausible": lambda r: lone_person(r, birth="1819-01-01"),
    "gender_missing": lambda r: lone_person(r, gender=0),
    "person_without_events": lambda r: (r.person(99), r.period(99, "2010-01-01", "2019-12-31"), None)[-1],
    "person_without_period": lambda r: (
        lone_person(r),
        r.do("DELETE FROM omop.observation_period WHERE person_id = 99"),
        r.do("UPDATE omop.event SET person_id = 1 WHERE person_id = 99"),
        None,
    )[-1],
    "period_overlap": lambda r: r.period(1, "2012-01-01", "2012-06-30"),
    "period_ends_before_start": lambda r: r.period(1, "2009-12-31", "2008-01-01"),
    "period_ends_after_cut": lambda r: r.period(1, "2020-01-01", "2222-01-01"),
    "death_twice": lambda r: r.death(10, "2018-06-01", date_only=True),
    "visit_ends_before_start": lambda r: r.visit(1, "2015-06-02 08:00", "2015-06-01 09:00", VISIT) and None,
    "visit_without_end": lambda r: r.visit(1, "2017-06-02 08:00", None, 9201) and None,
    "scan_outside_period": after("UPDATE omop.image_occurrence SET acquired_at = '2009-06-01' WHERE person_id = 1"),
    "scan_before_birth": after("UPDATE omop.image_occurrence SET acquired_at = '1959-06-01' WHERE person_id = 1"),
    "scan_after_death": after("UPDATE omop.image_occurrence SET acquired_at = '2018-06-01' WHERE person_id = 10"),
    "scan_without_ct_procedure": after("DELETE FROM omop.event WHERE domain = 'p' AND person_id = 1"),
    "scan_without_visit": after(
        "UPDATE omop.visit_occurrence SET visit_start_datetime = '2015-07-01', visit_end_datetime = '2015-07-02' "
        "WHERE person_id = 2"
    ),
    "scan_time_weak": after("UPDATE omop.image_occurrence SET acquired_at_source = 'file_name' WHERE person_id = 1"),
    "scan_date_only": after("UPDATE omop.image_occurrence SET date_only = true WHERE person_id = 1"),
    "scan_of_several_persons": after("UPDATE omop.image_occurrence SET series_uid = '1.2' WHERE person_id = 1"),
    "scan_unusable": after("UPDATE omop.image_occurrence SET verdict = 'unusable' WHERE person_id = 1"),
}
"""Check → how to plant what it is for."""

SCAN_MOVED = {"scan_outside_period", "scan_without_ct_procedure", "scan_without_visit"}
COMPANIONS = {
    "event_in_future": {"event_outside_period"},
    "event_without_person": {"event_outside_period"},
    "scan_outside_period": SCAN_MOVED,
    "scan_before_birth": SCAN_MOVED,
    "scan_after_death": SCAN_MOVED,
}
"""What must be minded as well, because the same rows break it."""


def minded(connection: Connection, scope: checks.Scope | None = None) -> set[str]:
    found = checks.run(connection, scope or checks.Scope(None))
    return {f.check.name for f in found if f.violations}


def test_each_check_has_a_fault_planted_for_it() -> None:
    assert set(FAULTS) == {check.name for check in (*EVENT_CHECKS, *ROW_CHECKS)}


def test_each_check_fires_on_its_fault_and_only_then(engine: Engine) -> None:
    wrong = {}
    with engine.begin() as connection:
        records = sound(connection)
        assert minded(connection) == set()
        for name, plant in FAULTS.items():
            with connection.begin_nested() as planted:
                plant(records)
                found = minded(connection)
                planted.rollback()
            if not {name} <= found <= {name} | COMPANIONS.get(name, set()):
                wrong[name] = found
    assert wrong == {}


def test_the_statement_of_each_finding_lists_as_many_rows_as_it_counts(engine: Engine) -> None:
    with engine.begin() as connection:
        records = sound(connection)
        for name in ("event_before_birth", "concept_zero", "gender_missing", "scan_time_weak", "unit_missing"):
            FAULTS[name](records)
        found = checks.run(connection, checks.Scope(None))
        listed = {
            (f.check.name, f.table): len(connection.exec_driver_sql(f.sql.replace("%", "%%")).all())
            for f in found
            if f.violations
        }
    assert listed == {(f.check.name, f.table): f.violations for f in found if f.violations}
    assert len(listed) >= 5


def test_every_statement_runs_as_a_reader(store: Store) -> None:
    assert store.reader_url is not None
    scope = checks.Scope("a", (1, 2))
    for check in ROW_CHECKS:
        with ask(store.reader_url, scope.fill(check.rows)) as answer:
            assert list(answer.rows) == []
    for event in EVENT_CHECKS:
        with ask(store.reader_url, checks.event_listing(scope, event, "c")) as answer:
            assert "source_row_id" in answer.columns
    with ask(store.reader_url, "SELECT * FROM ops.data_check") as answer:
        assert "list_sql" in answer.columns


def test_a_source_is_asked_for_its_own_rows_alone(engine: Engine) -> None:
    with engine.begin() as connection:
        sound(connection)
        connection.execute(text("UPDATE ops.source SET name = 'first'"))
        other = Records(connection)
        other.person(500, gender=0)
        assert minded(connection, checks.scope_of(connection, "first")) == set()
        assert minded(connection, checks.scope_of(connection, "test")) == {
            *("gender_missing", "person_without_events", "person_without_period")
        }
        with pytest.raises(UnknownName, match="'first'"):
            checks.scope_of(connection, "firts")


def test_answers_are_kept_with_the_statement_that_lists_their_rows(engine: Engine) -> None:
    with engine.begin() as connection:
        sound(connection)
        findings = checks.run(connection, checks.Scope(None))
        checks.keep(connection, checks.Scope(None), findings)
        rows = connection.execute(text("SELECT name, status, list_sql FROM ops.data_check")).all()
    assert len(rows) == len(findings) > 40
    assert {row.status for row in rows} == {"pass"}


def test_a_share_is_judged_by_both_thresholds_and_nothing_asked_is_no_pass() -> None:
    check = replace(ROW_CHECKS[0], warn=0.1, fail=0.5)
    shares = {violations: checks.Finding(check, "t", 10, violations, "").status for violations in (0, 1, 2, 5, 6)}
    assert shares == {0: "pass", 1: "pass", 2: "warn", 5: "warn", 6: "fail"}
    assert checks.Finding(check, "t", 0, 0, "").status == "not_applicable"
    assert checks.Finding(replace(check, fail=None), "t", 10, 10, "").status == "warn"


def test_an_empty_store_is_asked_without_an_answer(engine: Engine) -> None:
    with engine.connect() as connection:
        assert {f.status for f in checks.run(connection, checks.Scope(None))} == {"not_applicable"}
        assert checks.by_month(connection, checks.Scope(None)) == []


def test_the_page_stands_alone_and_names_every_check(engine: Engine) -> None:
    with engine.begin() as connection:
        records = sound(connection)
        FAULTS["scan_time_weak"](records)
        scope = checks.Scope(None)
        findings, months = checks.run(connection, scope), checks.by_month(connection, scope)
        html = page(findings, months, None, checks.keep(connection, scope, findings))
    assert all(f.check.name in html for f in findings)
    assert "<svg" in html and "condition_occurrence" in html
    assert "http" not in html.replace("http://www.w3.org", "") and "<script" not in html
    assert html.index("scan_time_weak") < html.index("gender_missing"), "the worst comes first"
    assert "file_name" not in html and "acquired_at_source NOT LIKE &#39;Series%&#39;" in html


def test_the_plot_leaves_out_the_outermost_thousandth(engine: Engine) -> None:
    import datetime as dt

    day = dt.date
    months = [("a", day(1900, 1, 1), 1), ("a", day(2014, 1, 1), 5000), ("b", day(2014, 3, 1), 5000)]
    assert middle([*months, ("a", day(2299, 1, 1), 1)]) == (day(2014, 1, 1), day(2014, 3, 1))
    assert middle([]) is None
    assert every_month(day(2013, 12, 1), day(2014, 2, 1)) == [day(2013, 12, 1), day(2014, 1, 1), day(2014, 2, 1)]
