"""What is out of date after a delivery: members of label sets, cohorts, embeddings; each counted, and since when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Connection, Engine, text

from app.store import embeddings, stale
from app.store.work import InlineWork
from tests.migrations.rows import add_checkpoint
from tests.workers.test_label_versions import build, fill

Make = Callable[..., InlineWork]

DELIVERY = """
INSERT INTO ops.load (source_id, job_id, kind, mode, table_name, state, files, content_sha256, num_read, num_loaded,
                      num_rejected, delivery_id)
SELECT source_id, 77, 'omop', 'upsert', 'condition_occurrence', 'published', '[]', '', 0, 0, 0, load_id
FROM ops.load ORDER BY load_id LIMIT 1
"""


NEW_SCAN = """
INSERT INTO omop.image_occurrence (person_id, acquired_at, date_only, acquired_at_source, image_key, root, path, format,
                                   verdict, load_id)
SELECT 6, '2016-06-01 12:00', false, 'manifest', 'i/new.nii', 'images', 'new.nii', 'nifti', 'ok', min(load_id)
FROM ops.load
"""


@pytest.fixture
def labelled(engine: Engine, work: Make) -> dict[str, Any]:
    """Twelve persons with one scan each, labelled, and a delivery since."""
    fill(engine)
    made = build(work)
    with engine.begin() as connection:
        connection.execute(text(DELIVERY))
    return made


def changed(connection: Connection, label_set_id: int) -> list[int]:
    found = stale.changed_members(connection, label_set_id)
    assert found is not None
    return [member.person_id for member in found]


def test_nothing_is_stale_right_after_it_was_made(engine: Engine, labelled: dict[str, Any]) -> None:
    with engine.connect() as connection:
        assert changed(connection, labelled["label_set_id"]) == []
        assert stale.stale_labels(connection) == stale.stale_cohorts(connection) == []


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE omop.observation_period SET end_date = '2019-12-31' WHERE person_id = 3",
        "UPDATE omop.timeline SET digest = sha256('other') WHERE person_id = 3",
        "DELETE FROM omop.timeline WHERE person_id = 3",
        "DELETE FROM omop.person WHERE person_id = 3",
        "UPDATE omop.person SET birth_time = '1911-01-01' WHERE person_id = 3",
        "UPDATE omop.image_occurrence SET acquired_at = '2015-03-03 12:00:01' WHERE person_id = 3",
        "UPDATE omop.image_occurrence SET reasons = '{gone_from_source}' WHERE person_id = 3",
        "INSERT INTO omop.visit_occurrence (visit_occurrence_id, person_id, visit_concept_id, visit_start_datetime, "
        "date_only, end_date_only, load_id) SELECT 1, 3, 9201, '2015-03-01', false, false, min(load_id) FROM ops.load",
    ],
)
def test_a_member_whose_data_differ_is_changed_and_no_other(
    engine: Engine, labelled: dict[str, Any], statement: str
) -> None:
    with engine.begin() as connection:
        connection.execute(text(statement))
        assert changed(connection, labelled["label_set_id"]) == [3]
        (row,) = stale.stale_labels(connection)
    assert (row["name"], row["members"], row["changed_members"], row["since"]) == ("l", 12, 1, "job 77")


def test_labels_made_again_are_fresh(engine: Engine, work: Make, labelled: dict[str, Any]) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE omop.timeline SET digest = sha256('other') WHERE person_id = 5"))
        assert changed(connection, labelled["label_set_id"]) == [5]
    assert build(work)["version"] == 2
    with engine.connect() as connection:
        assert stale.stale_labels(connection) == []


def test_labels_that_are_found_unchanged_are_fresh(engine: Engine, work: Make, labelled: dict[str, Any]) -> None:
    with engine.begin() as connection:  # no task asks when a person was born
        connection.execute(text("UPDATE omop.person SET birth_time = '1911-01-01' WHERE person_id = 3"))
        assert changed(connection, labelled["label_set_id"]) == [3]
    assert build(work)["unchanged"]
    with engine.connect() as connection:
        assert stale.stale_labels(connection) == []


def test_labels_without_digests_say_that_nobody_knows(engine: Engine, labelled: dict[str, Any]) -> None:
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM label.member_digest"))
        assert stale.changed_members(connection, labelled["label_set_id"]) is None
        (row,) = stale.stale_labels(connection)
    assert row["changed_members"] is None and "made before" in row["also"]


def test_a_cohort_that_would_be_chosen_otherwise_is_stale(engine: Engine, labelled: dict[str, Any]) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE omop.observation_period SET end_date = '2019-12-31' WHERE person_id IN (3, 4)"))
        connection.execute(text("DELETE FROM omop.person WHERE person_id = 5"))
        connection.execute(text(NEW_SCAN))
        (row,) = stale.stale_cohorts(connection)
    assert {key: row[key] for key in ("changed_members", "gone_members", "new_members", "since")} == {
        "changed_members": 2,
        "gone_members": 1,
        "new_members": 1,
        "since": "job 77",
    }


def test_an_embedding_of_other_content_is_stale(engine: Engine, labelled: dict[str, Any]) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE omop.image_occurrence SET sha256 = sha256(image_key::bytea)"))
        checkpoint = add_checkpoint(connection, "tiny", 3)
        connection.execute(text("SELECT model.add_embedding_partition(:c, 3)"), {"c": checkpoint})
        images = [int(i) for (i,) in connection.execute(text("SELECT image_occurrence_id FROM omop.image_occurrence"))]
        vectors = np.ones((len(images), 3), np.float32)
        embeddings.replace_embeddings(connection, checkpoint, np.array(images), vectors)
        assert [row for row in stale.stale_checkpoints(connection) if row["changed_scans"]] == []
        connection.execute(
            text("UPDATE omop.image_occurrence SET sha256 = NULL WHERE image_occurrence_id = :i"), {"i": images[0]}
        )
        (row,) = stale.stale_checkpoints(connection)
        assert (row["name"], row["embedded_scans"], row["changed_scans"]) == ("tiny", 12, 1)


def test_who_uses_labels_that_are_out_of_date_is_told_in_one_line(
    engine: Engine, work: Make, labelled: dict[str, Any]
) -> None:
    with engine.begin() as connection:
        assert stale.warning(connection, labelled["label_set_id"]) is None
        connection.execute(text("UPDATE omop.timeline SET digest = sha256('other') WHERE person_id IN (5, 6)"))
        said = stale.warning(connection, labelled["label_set_id"])
    assert said == (
        "Labels l@1 are out of date: 2 of 12 members have other data since job 77; `lachesis label l` makes them again."
    )
    build(work)
    with engine.connect() as connection:
        said = stale.warning(connection, labelled["label_set_id"])
    assert said == "Labels l@1 are not the current version, which is l@2."
