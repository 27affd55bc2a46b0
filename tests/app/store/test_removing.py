"""Removing versions: what rests on one is named and holds it; a number is never given twice."""

from __future__ import annotations

import pytest
from sqlalchemy import Connection, Engine, text

from app.errors import InputError, UnknownName
from app.store import names, removing
from tests.migrations.rows import add_checkpoint, add_labels

METRIC = """
INSERT INTO model.metric (label_set_id, head, inputs, metric, split, value, n, num_events, num_persons, flags, unit,
                          seed)
VALUES (2, 'cox', 'image', 'harrell_c', 'held_out', .7, 7, 3, 7, '{}', 'person', 0)
"""


def take(
    connection: Connection, kind: str, name: str, *, force: bool = False, dry_run: bool = False
) -> dict[str, object]:
    return removing.remove(connection, removing.KINDS[kind], name, force=force, dry_run=dry_run)


def number(connection: Connection, statement: str) -> int:
    return int(connection.execute(text(statement)).scalar_one())


def test_an_older_version_goes_with_its_rows_and_the_name_stays(engine: Engine) -> None:
    with engine.begin() as connection:
        add_labels(connection)
        found = take(connection, "label", "outcomes@1", dry_run=True)
        assert (found["removed"], found["name_means"], found["dry_run"]) == ("outcomes@1", "outcomes@2", True)
        assert number(connection, "SELECT count(*) FROM label.label_set") == 2
        take(connection, "label", "outcomes@1")
        assert number(connection, "SELECT count(*) FROM label.label_set") == 1
        assert number(connection, "SELECT count(*) FROM label.tte") == 7
        with pytest.raises(UnknownName, match="outcomes@1"):
            take(connection, "label", "outcomes@1")


def test_after_the_current_version_the_name_means_the_newest_left_and_no_number_comes_twice(engine: Engine) -> None:
    with engine.begin() as connection:
        add_labels(connection)
        with pytest.raises(InputError, match="name one: outcomes@1, outcomes@2"):
            take(connection, "label", "outcomes")
        assert take(connection, "label", "outcomes@2")["name_means"] == "outcomes@1"
        assert number(connection, "SELECT count(*) FROM label.tte") == 0
        assert names.find(connection, "label set", "outcomes").version == 1
        assert names.move(connection, "label set", "outcomes") == 3


def test_what_rests_on_labels_is_named_and_goes_only_by_force(engine: Engine) -> None:
    with engine.begin() as connection:
        add_labels(connection)
        checkpoint = add_checkpoint(connection, "tiny-tte", 4)
        connection.execute(text("UPDATE model.checkpoint SET label_set_id = 2"))
        connection.execute(text(METRIC))
        said = rf"on label set outcomes@2, found checkpoint {checkpoint} \(tiny-tte\), 1 metrics; --force removes"
        with pytest.raises(InputError, match=said):
            take(connection, "label", "outcomes@2")
        assert len(take(connection, "label", "outcomes@2", force=True)["rested_on_it"]) == 2  # type: ignore[arg-type]
        assert number(connection, "SELECT count(*) FROM model.metric") == 0
        assert number(connection, "SELECT count(*) FROM model.checkpoint WHERE label_set_id IS NULL") == 1


@pytest.mark.parametrize(("kind", "name"), [("cohort", "chest"), ("task", "clinical@1")])
def test_labels_hold_their_cohort_and_tasks_even_against_force(engine: Engine, kind: str, name: str) -> None:
    with engine.begin() as connection:
        add_labels(connection)
        for force in (False, True):
            with pytest.raises(InputError, match="found labels outcomes@1, labels outcomes@2; remove them first"):
                take(connection, kind, name, force=force)
        take(connection, "label", "outcomes@1")
        take(connection, "label", "outcomes@2")
        assert take(connection, kind, name)["name_means"] is None


def test_a_job_that_waits_for_labels_holds_them(engine: Engine) -> None:
    from app.store import jobs

    with engine.begin() as connection:
        add_labels(connection)
        job = jobs.insert(connection, kind="pretrain", queue="gpu", args={"labels": "outcomes"})
        with pytest.raises(InputError, match=rf"found job {job} \(pretrain\)"):
            take(connection, "label", "outcomes@2", force=True)
        take(connection, "label", "outcomes@1")
