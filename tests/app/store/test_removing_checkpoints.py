"""Removing checkpoints: what rests on one is named and holds it; the rest goes with its rows, partition and files."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Connection, Engine, text

from app.errors import InputError, UnknownName
from app.store import artifacts, jobs, removing_checkpoints
from app.store.embeddings import replace_embeddings
from tests.app.store.command import lachesis
from tests.migrations.rows import add_checkpoint, add_labels

METRIC = """
INSERT INTO model.metric (checkpoint_id, reference_checkpoint_id, label_set_id, head, inputs, metric, split, value, n,
                          num_events, num_persons, flags, unit, seed)
VALUES (:c, :r, 2, 'cox', 'image', 'harrell_c', 'held_out', .7, 7, 3, 7, '{}', 'person', 0)
"""
SET = """
INSERT INTO model.embedding_set (checkpoint_id, cohort_id, path, sha256, mean, sd, num_scans, num_failed,
                                 shared_volumes)
VALUES (:c, 1, 'embeddings/x', 'x', '{0}', '{1}', 3, 0, 0)
"""


def do(connection: Connection, statement: str, **values: Any) -> None:
    connection.execute(text(statement), values)


def ids(connection: Connection) -> list[int]:
    return list(connection.execute(text("SELECT checkpoint_id FROM model.checkpoint ORDER BY 1")).scalars())


def take(connection: Connection, name: str, *, force: bool = False, dry_run: bool = False) -> dict[str, Any]:
    return removing_checkpoints.remove(connection, name, force=force, dry_run=dry_run)[0]


def run(connection: Connection, name: str, state: str = "succeeded") -> int:
    """A run of three epochs: stops 1 to 3, of which 2 is the best, and its end; the end's key."""
    job = jobs.insert(connection, kind="pretrain", queue="gpu", args={"name": name})
    do(connection, "ALTER TABLE ops.job DISABLE TRIGGER USER")
    do(connection, "UPDATE ops.job SET state = :s WHERE job_id = :j", s=state, j=job)
    do(connection, "ALTER TABLE ops.job ENABLE TRIGGER USER")
    insert = """
        INSERT INTO model.checkpoint (name, sha256, arm, encoder, width, recipe, seed, step, num_steps, epoch, is_best,
                                      is_final, path, num_bytes, code_version, job_id)
        SELECT CAST(:name AS text), :name || e || f, 'tte', 'tiny', 4, '{}', 0, e * 10, 30, e, e = 2 AND NOT f, f,
               'checkpoints/' || :name || e || f, 100, '', :job
        FROM (VALUES (1, false), (2, false), (3, false), (3, true)) v (e, f)
    """
    do(connection, insert, name=name, job=job)
    return ids(connection)[-1]


def test_a_finished_training_goes_with_its_stops_and_says_what_its_name_means_then(engine: Engine) -> None:
    with engine.begin() as connection:
        first = run(connection, "a")
        other = run(connection, "b")
        before = ids(connection)
        found = take(connection, "b", dry_run=True)
        assert (found["checkpoints"], found["stops"], found["bytes"]) == (
            [other, other - 3, other - 2, other - 1],
            3,
            400,
        )
        assert (found["name_means"], found["dry_run"], ids(connection)) == (None, True, before)
        gone, files = removing_checkpoints.remove(connection, "b", force=False, dry_run=False)
        assert ids(connection) == before[:4] and len(files) == 4 and gone["removed"] == f"b, checkpoint {other}"
        again = run(connection, "a")
        with pytest.raises(InputError, match=rf"'a' has 2; name one by its id: {first}, {again}\."):
            take(connection, "a")
        assert take(connection, str(again))["name_means"] == f"a, checkpoint {first}"
        with pytest.raises(UnknownName, match="Did you mean 'a'"):
            take(connection, "aa")


def test_one_stop_is_meant_by_its_epoch_also_where_the_end_has_the_same(engine: Engine) -> None:
    with engine.begin() as connection:
        end = run(connection, "a")
        do(connection, "UPDATE model.checkpoint SET step = 25, epoch = 2 WHERE checkpoint_id = :c", c=end - 1)
        assert take(connection, "a@2", dry_run=True)["checkpoints"] == [end - 2]
        do(connection, "UPDATE model.checkpoint SET step = 30, epoch = 3 WHERE checkpoint_id = :c", c=end - 1)
        assert take(connection, "a@3", dry_run=True)["checkpoints"] == [end - 1]
        assert take(connection, "a@last")["checkpoints"] == [end - 1]
        assert take(connection, "a@best")["checkpoints"] == [end - 2]
        with pytest.raises(InputError, match="found the finished training itself under 'a@3'"):
            take(connection, "a@3")
        with pytest.raises(InputError, match="Expected a kept epoch"):
            take(connection, "a@7")
        assert ids(connection) == [end - 3, end]


def test_aliases_and_checkpoints_that_go_on_from_one_hold_it_even_against_force(engine: Engine) -> None:
    with engine.begin() as connection:
        one, other = run(connection, "a"), run(connection, "b")
        do(connection, "UPDATE model.checkpoint SET parent_id = :p WHERE name = 'b'", p=one)
        do(connection, "INSERT INTO model.alias (alias, checkpoint_id, valid_to) VALUES ('nightly', :c, now())", c=one)
        do(connection, "INSERT INTO model.alias (alias, checkpoint_id) VALUES ('champion', :c)", c=one)
        for force in (False, True):
            with pytest.raises(InputError) as refused:
                take(connection, "a", force=force)
            said = str(refused.value)
            assert "the alias @champion" in said and "the history of the alias @nightly" in said
            assert f"checkpoint {other} (b), which goes on from it" in said and said.endswith("as long as they do.")
            with pytest.raises(InputError, match="the alias @champion"):
                take(connection, "@champion", force=force)


def test_embeddings_and_figures_hold_it_and_go_by_force_with_their_partition(engine: Engine) -> None:
    with engine.begin() as connection:
        add_labels(connection)
        one, other = add_checkpoint(connection, "a", 4), add_checkpoint(connection, "b", 4)
        for checkpoint in (one, other):
            do(connection, "SELECT model.add_embedding_partition(:c, 4)", c=checkpoint)
            replace_embeddings(connection, checkpoint, np.arange(1, 4), np.ones((3, 4), np.float32))
            do(connection, SET, c=checkpoint)
        do(connection, METRIC, c=one, r=None)
        do(connection, METRIC, c=other, r=one)
        said = (
            "found embeddings of cohort chest@1, 1 metrics by labels outcomes@2, 1 differences of b from it; "
            "--force removes them with it"
        )
        with pytest.raises(InputError, match=said):
            take(connection, "a")
        with pytest.raises(Exception, match=f"Checkpoint {one} is there still"), connection.begin_nested():
            do(connection, "SELECT model.drop_embedding_partition(:c)", c=one)
        assert len(take(connection, "a", force=True)["rested_on_it"]) == 3
        assert ids(connection) == [other]
        for table in ("model.embedding", "model.embedded_scan"):
            assert connection.execute(text(f"SELECT array_agg(DISTINCT checkpoint_id) FROM {table}")).scalar() == [
                other
            ]
        assert connection.execute(text("SELECT to_regclass(:t)"), {"t": f"model.embedding_{one}"}).scalar() is None
        assert connection.execute(text("SELECT count(*) FROM model.metric")).scalar() == 0


def test_jobs_that_make_or_use_it_hold_it(engine: Engine) -> None:
    with engine.begin() as connection:
        end = run(connection, "a", state="running")
        with pytest.raises(InputError, match=r"found job 1 \(pretrain\); it stays"):
            take(connection, "a@1", force=True)
        do(connection, "UPDATE ops.job SET state = 'succeeded'")
        for number, args in enumerate(
            ({"checkpoint": "a"}, {"against": str(end)}, {"continue": "a@last"}, {"set": {"weights": "a"}}), start=2
        ):
            jobs.insert(connection, kind="evaluate", queue="eval", args=args)
            with pytest.raises(InputError, match=rf"found job {number} \(evaluate\)"):
                take(connection, "a", force=True)
            do(connection, "UPDATE ops.job SET state = 'cancelled' WHERE state = 'queued'")
        jobs.insert(connection, kind="pretrain", queue="gpu", args={"set": {"weights": "/there/is/none"}})
        assert take(connection, "a")["stops"] == 3


def test_whoever_embeds_by_it_at_this_moment_is_waited_for_and_then_holds_it(engine: Engine) -> None:
    with engine.begin() as connection:
        add_labels(connection)
        one = add_checkpoint(connection, "a", 4)
    refused: list[BaseException] = []

    def remove() -> None:
        try:
            with engine.begin() as connection:
                take(connection, "a")
        except InputError as error:
            refused.append(error)

    other = threading.Thread(target=remove)
    with engine.begin() as connection:
        do(connection, "SELECT model.add_embedding_partition(:c, 4)", c=one)
        other.start()
        other.join(0.5)
        assert other.is_alive()
        replace_embeddings(connection, one, np.arange(1, 4), np.ones((3, 4), np.float32))
        do(connection, SET, c=one)
    other.join(30)
    assert len(refused) == 1 and "embeddings of cohort chest@1" in str(refused[0])


def test_embeddings_that_others_read_all_the_time_stay_and_so_does_the_checkpoint(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removing_checkpoints, "WAIT_SECONDS", 1)
    with engine.begin() as connection:
        one = add_checkpoint(connection, "a", 4)
        do(connection, "SELECT model.add_embedding_partition(:c, 4)", c=one)
    with engine.begin() as reading:
        do(reading, "SELECT count(*) FROM model.embedding")
        with pytest.raises(InputError, match="try it again"), engine.begin() as connection:
            take(connection, "a")
    with engine.begin() as connection:
        assert ids(connection) == [one]


def test_a_delivery_of_vectors_is_no_longer_shown_once_its_checkpoint_is_gone(engine: Engine) -> None:
    with engine.begin() as connection:
        do(connection, "INSERT INTO ops.source (name) VALUES ('embeddings:theirs')")
        job = jobs.insert(connection, kind="load_embeddings", queue="load", args={})
        do(connection, "UPDATE ops.job SET state = 'cancelled'")
        do(
            connection,
            "INSERT INTO ops.load (source_id, job_id, kind, mode, table_name, state, files, content_sha256, num_read, "
            "num_loaded, num_rejected) VALUES (1, :j, 'embeddings', 'snapshot', 'embedding', 'published', '[]', '', 3, "
            "3, 0)",
            j=job,
        )
        one = add_checkpoint(connection, "theirs", 4)
        do(connection, "UPDATE model.checkpoint SET arm = :a, job_id = :j", a=artifacts.EXTERNAL, j=job)
        assert take(connection, "theirs")["checkpoints"] == [one]
        assert connection.execute(text("SELECT state FROM ops.load")).scalar() == "superseded"


def test_the_command_takes_the_file_too(settings: Any, engine: Engine, tmp_path: Path) -> None:

    file = tmp_path / "w.safetensors"
    file.write_bytes(b"w")
    key, _ = artifacts.publish(settings, file, "checkpoints")
    with engine.begin() as connection:
        add_checkpoint(connection, "a", 4)
        do(connection, "UPDATE model.checkpoint SET path = :p, num_bytes = 1", p=key)
    ran = partial(lachesis, settings, "rm", "checkpoint")
    assert ran("a", "--dry-run").out == "would remove a, checkpoint 1, 1 bytes\n" and artifacts.is_kept(settings, key)
    assert ran("b").code == 2
    assert ran("a").out == "removed a, checkpoint 1, 1 bytes\n" and not artifacts.is_kept(settings, key)
    assert ran("a").code == 2
