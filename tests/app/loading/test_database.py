"""Loading straight out of a Postgres: as from files, of one moment, without a password anywhere."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from sqlalchemy import Engine

from app.embedded import Store
from app.errors import InputError, SourceLost
from app.loading.database import clean_address, is_address
from app.loading.omop import load
from app.store.work import InlineWork
from tests.app.loading.databases import fill_database
from tests.app.loading.extracts import (
    CONTENT,
    DEATH_HEADER,
    MEASUREMENT_HEADER,
    VISIT_HEADER,
    conditions,
    extract,
    one,
    rows,
)

Make = Callable[..., InlineWork]
_counter = itertools.count(1)

STORED = (
    "SELECT person_id, time, date_only, concept_id, source_concept_id, value_as_number, value_as_concept_id, "
    "unit_concept_id, end_time, visit_occurrence_id, domain, source_row_id FROM omop.event ORDER BY domain, 12, 1, 2",
    "SELECT person_id, num_events, times, concepts, digest FROM omop.timeline ORDER BY 1",
    "SELECT person_id, birth_time, gender_concept_id, person_source_value FROM omop.person ORDER BY 1",
    "SELECT observation_period_id, person_id, start_date, end_date FROM omop.observation_period ORDER BY 1",
    "SELECT * FROM omop.concept ORDER BY 1",
    "SELECT * FROM omop.concept_ancestor ORDER BY 1, 2",
    "SELECT table_name, num_read, num_loaded, rejects_by_rule, flags_by_rule FROM ops.load WHERE state = 'published' "
    "ORDER BY 1",
)
"""What must be equal, wherever the rows came from."""


@pytest.fixture
def cdm_url(store: Store) -> Iterator[str]:
    """URL of an empty database that is no store of ours."""
    name = f"warehouse_{os.getpid()}_{next(_counter)}"
    admin = store.database_url.replace("/lachesis?", "/postgres?", 1)
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    yield store.database_url.replace("/lachesis?", f"/{name}?", 1)
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def stored(engine: Engine) -> list[list[tuple[Any, ...]]]:
    return [rows(engine, statement) for statement in STORED]


def forget_loads(engine: Engine) -> None:
    """Back to an empty store."""
    with engine.begin() as connection:
        for (name,) in connection.exec_driver_sql(
            "SELECT partition_name FROM ops.load WHERE partition_name > ''"
        ).all():
            connection.exec_driver_sql(f"DROP TABLE IF EXISTS {name}")
        connection.exec_driver_sql(
            "TRUNCATE ops.load, ops.reject, ops.source, omop.person, omop.timeline, omop.observation_period, "
            "omop.visit_occurrence, omop.concept, omop.concept_ancestor, omop.concept_relationship, "
            "omop.concept_synonym CASCADE"
        )


def rich(folder: Path) -> Path:
    """An extract with most of what tables may hold, and some of what they should not."""
    return extract(
        folder,
        condition_occurrence=conditions(
            '21,1,"301",2016-01-01,,,,0,77,0', "22,99,1,2015-01-01,,,,0,,0", "23,2,0,1700-01-01,,,,0,,0"
        ),
        measurement=[
            MEASUREMENT_HEADER,
            "1,1,3000963,2015-01-01,2015-01-01 07:30:00,7.125,0,8713,1,0",
            "2,2,3000963,2015-01-02,,,45,,,0",
            "-9223372036854775807,3,3000963,2015-01-02,2015-01-02 00:00:00,1e-7,,,,0",
        ],
        visit_occurrence=[VISIT_HEADER, "1,1,9201,2014-01-02,2014-01-02 08:30:00,2014-01-09,,0,0,"],
        death=[DEATH_HEADER, "2,2018-05-06,,0,0", "2,2018-05-07,,0,0"],
        concept=[
            "concept_id,concept_name,domain_id,vocabulary_id,concept_class_id,standard_concept,concept_code,"
            "valid_start_date,valid_end_date,invalid_reason",
            '301,"Fever, ""high""",Condition,SNOMED,Clinical Finding,S,386661006,1970-01-01,2099-12-31,',
            "302,Größe\u2028x,Measurement,None,Lab Test,,a b,1970-01-01,2099-12-31,",
        ],
        cdm_source=["cdm_source_name,source_release_date", "a hospital,2020-11-30"],
    )


def test_a_database_gives_the_rows_rejects_and_flags_that_its_files_give(
    tmp_path: Path, work: Make, engine: Engine, cdm_url: str
) -> None:
    folder = rich(tmp_path / "files")
    load(work(path=str(folder), max_rejects=1))
    from_files = stored(engine)
    forget_loads(engine)
    fill_database(cdm_url, folder, "cdm_54", "vocab")
    given = {"database": cdm_url, "cdm_schema": "cdm_54", "vocabulary_schema": "vocab", "max_rejects": 1}
    result = load(work(**given))
    assert stored(engine) == from_files
    assert result["data_cut"] == "2020-11-30" and result["rejected"] == 3
    assert rows(engine, "SELECT file, record, rule, row_key FROM ops.reject ORDER BY 1, 2") == [
        ("cdm_54.condition_occurrence", 22, "unknown_person", "22"),
        ("cdm_54.condition_occurrence", 23, "time_out_of_range", "23"),
        ("cdm_54.death", 2, "duplicate_key", "2"),
    ]
    assert load(work(**given))["unchanged"] is True
    with psycopg.connect(cdm_url) as connection:  # rows that only move in their table are the same rows
        connection.execute("UPDATE cdm_54.measurement SET value_as_number = value_as_number")
    assert load(work(**given))["unchanged"] is True
    with psycopg.connect(cdm_url) as connection:
        connection.execute("UPDATE cdm_54.measurement SET value_as_number = 8 WHERE measurement_id = 1")
    assert load(work(**given))["unchanged"] is False
    assert one(engine, "SELECT value_as_number FROM omop.event WHERE source_row_id = 1 AND domain = 'm'") == 8
    assert not list((tmp_path / "work").rglob("*.csv"))


@pytest.mark.parametrize(
    "kinds",
    [
        {"person_id": "numeric(20,2)", "condition_occurrence_id": "varchar", "measurement_id": "numeric"},
        {"person_id": "char(20)", "condition_start_date": "varchar", "measurement_concept_id": "double precision"},
        {"visit_occurrence_id": "text", "condition_concept_id": "numeric(18,3)", "birth_datetime": "varchar"},
    ],
    ids=["numerics", "text", "mixed"],
)
def test_ids_and_dates_of_other_types_are_read_exactly(
    tmp_path: Path, work: Make, engine: Engine, cdm_url: str, kinds: dict[str, str]
) -> None:
    folder = rich(tmp_path / "files")
    load(work(path=str(folder), max_rejects=1))
    from_files = stored(engine)
    forget_loads(engine)
    fill_database(cdm_url, folder, "public", "public", **kinds)
    load(work(database=cdm_url, max_rejects=1))
    assert stored(engine) == from_files


def test_moments_with_a_zone_are_read_by_the_clock_of_the_session(
    tmp_path: Path, work: Make, engine: Engine, cdm_url: str
) -> None:
    fill_database(cdm_url, extract(tmp_path / "files"), "public", "public")
    database = conninfo_to_dict(cdm_url)["dbname"]
    with psycopg.connect(cdm_url) as connection:
        connection.execute(
            "ALTER TABLE condition_occurrence ALTER condition_start_datetime TYPE timestamptz "
            "USING condition_start_datetime AT TIME ZONE 'Europe/Berlin'"
        )
        connection.execute(f"ALTER DATABASE {database} SET TimeZone = 'Europe/Berlin'")
        connection.execute(f"ALTER DATABASE {database} SET DateStyle = 'German'")
    load(work(database=cdm_url))
    assert rows(engine, "SELECT DISTINCT time::time::text FROM omop.event") == [("10:00:00",)]


def test_a_connection_that_is_cut_midway_leaves_nothing(
    tmp_path: Path, work: Make, engine: Engine, cdm_url: str
) -> None:
    fill_database(cdm_url, extract(tmp_path / "files"), "public", "public")
    with psycopg.connect(cdm_url) as connection:
        connection.execute(
            "CREATE FUNCTION slow(bigint) RETURNS bigint LANGUAGE plpgsql AS "
            "$$ BEGIN PERFORM pg_sleep(0.5); RETURN $1; END $$"
        )
        connection.execute("ALTER TABLE person RENAME TO hidden")
        connection.execute(
            "CREATE VIEW person AS SELECT slow(person_id) AS person_id, gender_concept_id, year_of_birth FROM hidden"
        )
    before = rows(engine, CONTENT)

    def cut() -> None:
        with psycopg.connect(cdm_url, autocommit=True) as connection:
            while not connection.execute(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                "WHERE application_name = 'lachesis:load' AND query LIKE 'COPY%slow%' OR query LIKE 'COPY%person%' "
                "AND application_name = 'lachesis:load'"
            ).fetchone()[0]:  # type: ignore[index]
                pass

    thread = threading.Thread(target=cut)
    thread.start()
    with pytest.raises(SourceLost, match="nothing was loaded"):
        load(work(database=cdm_url))
    thread.join()
    assert rows(engine, CONTENT) == before and one(engine, "SELECT count(*) FROM ops.load") == 0
    assert not list((tmp_path / "work").rglob("*.csv"))


def test_what_cannot_be_loaded_is_refused_in_one_sentence(
    tmp_path: Path, work: Make, database_url: str, cdm_url: str
) -> None:
    def refused(match: str, **args: Any) -> None:
        with pytest.raises(InputError, match=match):
            load(work(**args))

    refused("Lachesis store", database=database_url)
    refused("found none; name it with --cdm-schema", database=cdm_url)
    fill_database(cdm_url, extract(tmp_path / "files"), "a", "a")
    fill_database(cdm_url, tmp_path / "files", "b", "b")
    refused("several: a, b", database=cdm_url)
    refused("table person in the schema c", database=cdm_url, cdm_schema="c")
    refused("in the schema c", database=cdm_url, cdm_schema="a", vocabulary_schema="c")
    with psycopg.connect(cdm_url) as connection:
        connection.execute("ALTER TABLE a.condition_occurrence DROP condition_concept_id")
    refused("condition_concept_id in a.condition_occurrence", database=cdm_url, cdm_schema="a")
    refused("service file of the host", database="service=nowhere")
    refused("that answers", database=make_conninfo(cdm_url, dbname="nothing_of_that_name"))


def test_rows_hidden_by_a_policy_or_a_missing_grant_are_no_smaller_extract(
    tmp_path: Path, work: Make, cdm_url: str
) -> None:
    fill_database(cdm_url, extract(tmp_path / "files"), "cdm", "cdm")
    role = f"etl_{os.getpid()}"
    try:
        with psycopg.connect(cdm_url) as connection:
            connection.execute(f"CREATE ROLE {role} LOGIN")
        address = make_conninfo(cdm_url, user=role)
        for grant, match in (
            (None, "USAGE"),
            (f"GRANT USAGE ON SCHEMA cdm TO {role}", "grant SELECT"),
            (
                f"GRANT SELECT ON ALL TABLES IN SCHEMA cdm TO {role}; ALTER TABLE cdm.person ENABLE ROW LEVEL SECURITY",
                "row",
            ),
        ):
            if grant:
                with psycopg.connect(cdm_url) as connection:
                    connection.execute(grant.encode())
            with pytest.raises(InputError, match=match):
                load(work(database=address, cdm_schema="cdm"))
    finally:
        with psycopg.connect(cdm_url) as connection:
            connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}".encode())


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://etl:S3cret@db/ehr",
        "postgresql://etl@db/ehr?password=S3cret",
        "host=db user=etl password=S3cret",
        "host=db dbname=postgresql://etl:S3cret@db/ehr",
        "host=db sslpassword=S3cret",
        "postgresql://etl:S3cret@db:port:port/ehr",
        "postgres://etl:S3cret@[db/ehr",
        "password=S3cret",
    ],
)
def test_a_password_in_an_address_is_refused_before_it_gets_anywhere(address: str, tmp_path: Path) -> None:
    assert is_address(address)
    with pytest.raises(InputError) as refused:
        clean_address(address)
    assert "S3cret" not in str(refused.value)
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", "load", "omop", address, "--dry-run"],
        capture_output=True, text=True, check=False, env={**os.environ, "LACHESIS_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert done.returncode == 2 and "S3cret" not in done.stdout + done.stderr
    assert not (tmp_path / "home").exists()


def test_a_service_keeps_the_password_out_of_the_job(
    tmp_path: Path, work: Make, engine: Engine, cdm_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_database(cdm_url, extract(tmp_path / "files"), "public", "public")
    parts = "\n".join(f"{name}={value}" for name, value in conninfo_to_dict(cdm_url).items())
    (tmp_path / "services").write_text(f"[warehouse]\n{parts}\npassword=unused\n")
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    assert clean_address("service=warehouse") == "service=warehouse"
    assert load(work(database="service=warehouse"))["persons"] == 5
    kept = json.dumps([list(map(str, row)) for row in rows(engine, "SELECT files, kind, mode FROM ops.load")])
    assert "unused" not in kept and "public.person" in kept


@pytest.mark.parametrize("name", ["omop_gibleed_broadsea_5.3", "omop_synthea27nj_5.4"])
def test_a_real_extract_in_a_database_gives_what_its_files_give(
    name: str, real_data: Path, work: Make, engine: Engine, cdm_url: str
) -> None:
    load(work(path=str(real_data / name)))
    from_files = stored(engine)
    forget_loads(engine)
    fill_database(cdm_url, real_data / name, "cdm", "vocab")
    load(work(database=cdm_url, cdm_schema="cdm", vocabulary_schema="vocab"))
    assert stored(engine) == from_files
