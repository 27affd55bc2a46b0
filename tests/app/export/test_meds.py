"""MEDS both ways: what is exported is what was loaded, and loads to the same timelines."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sqlalchemy import Engine, text

from app.embedded import Store
from app.errors import InputError, UnknownName
from app.export.meds import ExportOptions, Written, export
from app.loading import meds, omop
from app.store.session import make_engine
from app.store.work import InlineWork
from tests.app.loading.extracts import extract, rows
from tests.app.loading.meds_sets import at, data_set, person, read_events, shard

Make = Callable[..., InlineWork]
CORE = ("subject_id", "time", "code", "numeric_value")


def write(engine: Engine, folder: Path, **options: Any) -> Written:
    """Export what the store shows at one moment."""
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        return export(connection, ExportOptions(folder=folder, **options), lambda _: None)


def core(found: list[dict[str, Any]]) -> Counter[tuple[Any, ...]]:
    """The columns that MEDS has, each row with how often it comes."""
    return Counter(tuple(row[name] for name in CORE) for row in found)


@pytest.fixture
def other(store: Store, template: str, tmp_path: Path, engine: Engine) -> Iterator[tuple[Engine, Make]]:
    """A second, fresh store, and work in it."""
    from dataclasses import replace

    from app.settings import read_settings

    name = f"other_{id(tmp_path)}"
    admin = store.database_url.replace("/lachesis?", "/postgres?", 1)
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    url = store.database_url.replace("/lachesis?", f"/{name}?", 1)
    made = make_engine(url)
    settings = replace(read_settings(), home=tmp_path / "home", home_is_named=True, database_url=url)

    def make(**args: Any) -> InlineWork:
        return InlineWork(made, args=args, folder=tmp_path / "other", settings=settings)

    yield made, make
    made.dispose()
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def copy_vocabulary(source: Engine, target: Engine) -> None:
    """Give the second store the concepts of the first."""
    for table in ("concept", "concept_relationship", "concept_ancestor"):
        with source.connect() as one_side, target.begin() as other_side:
            held = [dict(row) for row in one_side.execute(text(f"SELECT * FROM omop.{table}")).mappings()]
            if held:
                names = ", ".join(held[0])
                marks = ", ".join(f":{name}" for name in held[0])
                other_side.execute(text(f"INSERT INTO omop.{table} ({names}) VALUES ({marks})"), held)


TIMELINES = "SELECT person_id, num_events, times, concepts, digest FROM omop.timeline ORDER BY person_id"
EVENTS = """
SELECT person_id, time, date_only, concept_id, source_concept_id, value_as_number, nullif(value_as_concept_id, 0),
       nullif(unit_concept_id, 0), end_time, visit_occurrence_id, domain
FROM omop.event ORDER BY 1, 2, 4, 5, 6, 7, 8, 9, 10, 11
"""
PERSONS = """
SELECT person_id, birth_time, gender_concept_id, race_concept_id, ethnicity_concept_id FROM omop.person ORDER BY 1
"""
VISITS = """
SELECT visit_occurrence_id, person_id, visit_concept_id, visit_start_datetime, visit_end_datetime, date_only,
       end_date_only FROM omop.visit_occurrence ORDER BY 1
"""


@pytest.mark.parametrize(
    "folder", ["meds_aces_sample/meds_sample", "meds_transforms_example/data", "meds_femr_synthetic/synthetic"]
)
def test_a_real_data_set_comes_out_as_it_went_in(
    real_data: Path, tmp_path: Path, work: Make, engine: Engine, folder: str
) -> None:
    meds.load(work(path=str(real_data / folder), midnight_is_time=True))
    written = write(engine, tmp_path / "out", codes="source")
    place = real_data / folder
    came = read_events(place if (place / "data").is_dir() else _with_data(place, tmp_path))
    for row in came:  # the store keeps 32 bits of a number, as MEDS asks
        row["numeric_value"] = (
            None if row["numeric_value"] is None else pa.scalar(row["numeric_value"], pa.float32()).as_py()
        )
    assert core(read_events(tmp_path / "out")) == core(came)
    assert written.rows == len(came)


def _with_data(place: Path, tmp_path: Path) -> Path:
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "data").symlink_to(place)
    return tmp_path / "linked"


@pytest.mark.parametrize("extract_name", ["omop_synthea27nj_5.4", "omop_gibleed_broadsea_5.3"])
def test_omop_to_meds_to_a_fresh_store_gives_the_same_timelines_byte_for_byte(
    real_data: Path, tmp_path: Path, work: Make, engine: Engine, other: tuple[Engine, Make], extract_name: str
) -> None:
    omop.load(work(path=str(real_data / extract_name), max_rejects=1))
    write(engine, tmp_path / "out")
    fresh, make = other
    copy_vocabulary(engine, fresh)
    result = meds.load(make(path=str(tmp_path / "out")))
    assert result["rejected"] == 0
    for statement in (TIMELINES, EVENTS, PERSONS, VISITS):
        assert rows(fresh, statement) == rows(engine, statement)


def test_without_a_vocabulary_the_same_events_have_concepts_of_the_stores_own(
    tmp_path: Path, work: Make, engine: Engine, other: tuple[Engine, Make]
) -> None:
    omop.load(work(path=str(extract(tmp_path / "omop"))))
    write(engine, tmp_path / "out")
    fresh, make = other
    meds.load(make(path=str(tmp_path / "out")))
    assert rows(fresh, EVENTS) == rows(engine, EVENTS), "concepts without a name go by their ids"
    assert rows(fresh, PERSONS) == rows(engine, PERSONS)


def test_ancestors_statics_units_and_values_survive_the_way_out_and_in(
    tmp_path: Path, work: Make, engine: Engine, other: tuple[Engine, Make]
) -> None:
    codes = [{"code": "A", "description": "An A", "parent_codes": ["B"]}, {"code": "B", "parent_codes": ["C"]}]
    folder = data_set(tmp_path / "in", {"train/0": person(1)}, codes)
    more = {"unit": ["kg", None], "value_code": [None, "B"], "visit_id": [7, 7], "end": [at(4), None]}
    shard(folder / "data" / "held_out" / "0.parquet", [(2, at(1), "A", 2.5), (2, at(3), "Visit/IP", None)], more)
    meds.load(work(path=str(folder)))
    write(engine, tmp_path / "out")
    fresh, make = other
    meds.load(make(path=str(tmp_path / "out")))
    told = (
        "SELECT e.person_id, e.time, c.concept_code, s.concept_code, value_as_number, v.concept_code, u.concept_code, "
        "end_time, visit_occurrence_id, e.domain FROM omop.event e LEFT JOIN omop.concept c USING (concept_id) "
        "LEFT JOIN omop.concept s ON s.concept_id = source_concept_id LEFT JOIN omop.concept v ON v.concept_id = "
        "value_as_concept_id LEFT JOIN omop.concept u ON u.concept_id = unit_concept_id ORDER BY 1, 2, 3"
    )
    assert rows(fresh, told) == rows(engine, told)
    above = (
        "SELECT a.concept_code, d.concept_code, min_levels_of_separation, max_levels_of_separation FROM "
        "omop.concept_ancestor JOIN omop.concept a ON a.concept_id = ancestor_concept_id "
        "JOIN omop.concept d ON d.concept_id = descendant_concept_id WHERE d.concept_code IN ('A', 'B') ORDER BY 1, 2"
    )
    assert rows(fresh, above) == rows(engine, above)
    statics = "SELECT person_id, concept_code, value_as_number, fills FROM omop.static_fact LEFT JOIN omop.concept "
    assert rows(fresh, statics + "USING (concept_id) ORDER BY 1, 2") == rows(
        engine, statics + "USING (concept_id) ORDER BY 1, 2"
    )
    assert rows(fresh, "SELECT person_id, split FROM omop.person ORDER BY 1") == [(1, "train"), (2, "held_out")]


def test_each_subject_lies_in_one_shard_of_its_split_sorted_by_time(tmp_path: Path, work: Make, engine: Engine) -> None:
    folder = data_set(tmp_path / "in", {"train/0": [r for p in range(1, 8) for r in person(p)], "tuning/0": person(9)})
    meds.load(work(path=str(folder)))
    written = write(engine, tmp_path / "out", shard_rows=15)
    places: dict[int, set[str]] = {}
    for path in sorted((tmp_path / "out" / "data").rglob("*.parquet")):
        table = pq.read_table(path, partitioning=None)
        assert pq.ParquetFile(path).metadata.row_group(0).column(0).compression == "ZSTD"
        assert [str(f.type) for f in list(table.schema)[:4]] == ["int64", "timestamp[us]", "string", "float"]
        found = table.to_pylist()
        order = [(row["subject_id"], row["time"] or dt.datetime.min) for row in found]
        assert order == sorted(order)
        for row in found:
            places.setdefault(row["subject_id"], set()).add(path.parent.name + path.name)
    assert all(len(files) == 1 for files in places.values()) and written.shards > 2
    splits = pq.read_table(tmp_path / "out" / "metadata" / "subject_splits.parquet").to_pylist()
    assert {row["subject_id"]: row["split"] for row in splits} == {**dict.fromkeys(range(1, 8), "train"), 9: "tuning"}
    codes = {row["code"] for row in pq.read_table(tmp_path / "out" / "metadata" / "codes.parquet").to_pylist()}
    assert {row["code"] for row in read_events(tmp_path / "out")} <= codes


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path, work: Make, engine: Engine) -> None:
    with pytest.raises(InputError, match="Expected persons to export"):
        write(engine, tmp_path / "out")
    meds.load(work(path=str(data_set(tmp_path / "in", {"0": person(1)}))))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").touch()
    with pytest.raises(InputError, match="Expected no files at"):
        write(engine, tmp_path / "full")
    with pytest.raises(UnknownName):
        write(engine, tmp_path / "out", cohort="nobody")

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with engine.connect() as connection, pytest.raises(KeyboardInterrupt):
        export(connection, ExportOptions(folder=tmp_path / "out"), stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "home", "in", "work"]
    write(engine, tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o077 == 0
