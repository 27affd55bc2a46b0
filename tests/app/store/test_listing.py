"""Listings: each statement runs, on a store with nothing in it and on one with a little."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from app.errors import UnknownName
from app.store import artifacts, listing
from app.store.concepts import search
from app.store.work import InlineWork
from tests.app.loading.extracts import conditions, extract


@pytest.mark.parametrize("word", sorted(listing.KINDS))
def test_every_kind_lists_and_shows_nothing_in_an_empty_store(engine: Engine, word: str) -> None:
    kind = listing.KINDS[word]
    with engine.connect() as connection:
        assert listing.listing(connection, kind, 5) == []
        assert listing.details(connection, kind.one, "1") == []
        for _, statement in kind.parts:
            assert listing.details(connection, statement, "1") == []


def test_a_kind_is_known_by_singular_and_plural() -> None:
    assert listing.kind_named("loads")[0] == "load"
    assert listing.kind_named("job")[0] == "job"
    with pytest.raises(UnknownName, match="'cohort'"):
        listing.kind_named("cohrts")


def test_a_job_is_listed_newest_first_and_shown_with_its_states(engine: Engine) -> None:
    insert = text("INSERT INTO ops.job (kind, queue, name) VALUES ('load', 'load', :name) RETURNING job_id")
    with engine.begin() as connection:
        first, second = (connection.execute(insert, {"name": name}).scalar_one() for name in ("a", "b"))
        rows = listing.listing(connection, listing.JOB, 10)
        states = listing.details(connection, dict(listing.JOB.parts)["states"], str(first))
    assert [row["job_id"] for row in rows] == [second, first]
    assert [row["to_state"] for row in states] == ["queued"]


def test_a_checkpoint_is_shown_by_name_id_or_digest_and_not_by_what_another_digest_begins_with(engine: Engine) -> None:
    with engine.begin() as connection:
        first, second = (
            artifacts.add_checkpoint(
                connection,
                {
                    "name": "a", "sha256": sha256, "arm": "tte", "encoder": "tiny", "width": 1, "recipe": {}, "seed": 0,
                    "step": 1, "num_steps": 1, "is_final": True, "path": "x", "num_bytes": 1, "code_version": "0",
                },
            )
            for sha256 in ("aaaaaaaa", "1bbbbbbb")
        )  # fmt: skip
        one = listing.KINDS["checkpoint"].one
        for name, meant in ((str(first), first), ("aaaaaa", first), ("a", second), ("1bbbbb", second)):
            found = artifacts.find_checkpoint(connection, name).checkpoint_id
            assert [row["checkpoint_id"] for row in listing.details(connection, one, str(found))] == [meant]
        with pytest.raises(UnknownName):
            artifacts.find_checkpoint(connection, "______")


def test_rejects_are_asked_of_loads_and_of_jobs_that_load(engine: Engine) -> None:
    with engine.begin() as connection:
        job = "INSERT INTO ops.job (kind, queue, name) VALUES (:kind, 'load', 'a') RETURNING job_id"
        load, other = (str(connection.scalar(text(job), {"kind": kind})) for kind in ("load", "embed"))
        found = [listing.is_load(connection, name) for name in (load, other, "nothing")]
    assert found == [True, False, False]


def test_a_number_of_a_delivery_and_of_a_load_means_the_delivery(engine: Engine) -> None:
    load = (
        "INSERT INTO ops.load (load_id, source_id, job_id, kind, mode, table_name, state, files, content_sha256, "
        "num_read, num_loaded, num_rejected) VALUES (:load, 1, :job, 'omop', 'snapshot', 'death', 'published', '[]', "
        "'', 2, 1, 1)"
    )
    reject = (
        "INSERT INTO ops.reject (load_id, job_id, table_name, file, record, rule) "
        "VALUES (:load, :job, 'death', 'death.csv', :load, 'unparsable_id')"
    )
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO ops.source (source_id, name) VALUES (1, 'a')"))
        job = "INSERT INTO ops.job (job_id, kind, queue, name) VALUES (:id, 'load', 'load', 'a')"
        for job_id, load_id in ((1001, 1002), (1002, 1003)):
            connection.execute(text(job), {"id": job_id})
            connection.execute(text(load), {"load": load_id, "job": job_id})
            connection.execute(text(reject), {"load": load_id, "job": job_id})
        loads = [listing.details(connection, listing.LOAD.one, name) for name in ("1001", "1002", "1003")]
        rejects = [listing.details(connection, listing.REJECT.one, name) for name in ("1001", "1002", "1003")]
    assert [[row["load_id"] for row in found] for found in loads] == [[1002], [1003], [1003]]
    assert [[row["record"] for row in found] for found in rejects] == [[1002], [1003], [1003]]


def test_concepts_are_found_by_name_code_and_synonym_and_a_percent_sign_is_only_a_sign(engine: Engine) -> None:
    concept = text(
        "INSERT INTO omop.concept (concept_id, concept_name, domain_id, vocabulary_id, concept_class_id,"
        " standard_concept, concept_code) VALUES (:id, :name, 'Condition', 'SNOMED', 'Disorder', 'S', :code)"
    )
    with engine.begin() as connection:
        connection.execute(concept, {"id": 1, "name": "Gastrointestinal hemorrhage", "code": "74474003"})
        connection.execute(concept, {"id": 2, "name": "100% oxygen", "code": "x"})
        connection.execute(text("INSERT INTO omop.concept_synonym VALUES (1, 'GI bleed', 4180186)"))
        found = {
            words: [row["concept_id"] for row in search(connection, words, 5)]
            for words in ("hemorrhage", "gi bleed", "74474003", "%", "_")
        }
    assert found == {"hemorrhage": [1], "gi bleed": [1], "74474003": [1], "%": [2], "_": []}


def test_a_load_says_when_and_by_which_load_it_was_superseded(
    work: Callable[..., InlineWork], engine: Engine, tmp_path: Path
) -> None:
    from app.loading import omop

    extract(tmp_path / "a")
    extract(tmp_path / "b", condition_occurrence=conditions("21,9,0,2015-03-01,,,,0,,0", "22,1,0,2015-03-01,,,,0,,0"))
    for name in ("a", "b"):
        omop.load(work(path=str(tmp_path / name), source="s", max_rejects=1))
    with engine.connect() as connection:
        table = "condition_occurrence"
        first, second = (
            row for row in reversed(listing.listing(connection, listing.LOAD, 50)) if row["table"] == table
        )
        shown = listing.details(connection, listing.LOAD.one, str(first["load_id"]))
        (files, *_) = (listing.details(connection, s, str(second["load_id"])) for _, s in listing.LOAD.parts)
    assert [row["superseded_by"] for row in shown] == [second["load_id"]]
    assert shown[0]["superseded_at"] is not None and second["state"] == "published"
    assert second["concept_0_percent"] == pytest.approx(100 / 21)
    assert [(row["file"], row["dialect"], row["records"]) for row in files] == [(f"{table}.csv", "comma", 22)]


def test_a_person_is_shown_with_table_and_row_of_each_event_and_as_many_as_asked_for(
    work: Callable[..., InlineWork], engine: Engine, tmp_path: Path
) -> None:
    from app.loading import omop

    omop.load(work(path=str(extract(tmp_path / "a")), source="s"))
    with engine.connect() as connection:
        (person,) = listing.details(connection, listing.PERSON.one, "2")
        parts = {title: listing.details(connection, s, "2", 3) for title, s in listing.PERSON.parts}
    assert person["num_events"] == 4 and person["source"] == "s"
    assert [(row["table"], row["row_id"], row["concept_id"]) for row in parts["timeline"]] == [
        ("condition_occurrence", 1, 301),
        ("condition_occurrence", 6, 306),
        ("condition_occurrence", 11, 311),
    ]
    assert len(parts["observation periods"]) == 1


def test_a_delivery_is_told_a_row_a_table(engine: Engine) -> None:
    insert = (
        "INSERT INTO ops.load (source_id, job_id, kind, mode, table_name, state, files, content_sha256, num_read, "
        "num_loaded, num_rejected, rejects_by_rule, flags_by_rule, first_time) VALUES (1, 7, 'omop', 'snapshot', "
        "'death', 'published', '[]', '', 12, 10, 2, '{\"missing_time\": 2}', '{\"before_birth\": 1}', '2001-02-03')"
    )
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO ops.source (source_id, name) VALUES (1, 'a')"))
        connection.execute(text(insert))
        (row,) = listing.delivery(connection, 7)
        assert listing.delivery(connection, 8) == []
    assert (row["read"], row["loaded"], row["rejects_by_rule"]) == (12, 10, {"missing_time": 2})
    assert row["concept_0_percent"] is None
