"""Taking away what nothing needs: what jobs use, rows name or somebody is still writing stays, and twice is once."""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine, text

from app.errors import InputError
from app.settings import Settings
from app.store import artifacts, disk, jobs, named_files, pruning
from app.store.cache_room import CacheRoom, folder
from app.store.embeddings import replace_embeddings
from app.store.incoming import Place, write_block
from app.store.places import place
from app.store.pruning import Options
from tests.app.store.command import Ran, lachesis
from tests.migrations.rows import add_checkpoint, add_labels


def publish(settings: Settings, tmp_path: Path, content: str, *, days: float = 0) -> str:
    file = tmp_path / "made.safetensors"
    file.write_text(content)
    key, _ = artifacts.publish(settings, file, "checkpoints")
    age(place(settings).path(key), days)
    return key


def age(path: Path, days: float) -> None:
    os.utime(path, (time.time() - 86_400 * days,) * 2)


def training(engine: Engine, settings: Settings, tmp_path: Path, name: str, state: str, stops: int = 5) -> int:
    """A job with so many stops, of which the first was the best, and its end where it has succeeded; its key."""
    insert = text(
        "INSERT INTO model.checkpoint (name, sha256, arm, encoder, width, recipe, seed, step, num_steps, epoch, "
        "is_best, is_final, path, num_bytes, code_version, job_id) VALUES (:name, :path, 'tte', 'tiny', 4, '{}', 0, "
        ":step, :stops, :step, :best, :final, :path, 10, '', :job)"
    )
    with engine.begin() as connection:
        job = jobs.insert(connection, kind="pretrain", queue="gpu", args={})
        set_state(engine, connection, job, state)
        for step in range(1, stops + 1 + (state == "succeeded")):
            key = publish(settings, tmp_path, f"{name} {step}")
            final = step > stops
            values = {"name": name, "path": key, "step": step, "stops": stops, "best": step == 1, "final": final}
            connection.execute(insert, values | {"job": job})
    return job


def set_state(engine: Engine, connection: Any, job: int, state: str, *, days: float = 0) -> None:
    connection.execute(text("ALTER TABLE ops.job DISABLE TRIGGER USER"))
    connection.execute(
        text(
            "UPDATE ops.job SET state = :s, finished_at = clock_timestamp() - make_interval(secs => :a) "
            "WHERE job_id = :j"
        ),
        {"s": state, "j": job, "a": 86_400 * days},
    )
    connection.execute(text("ALTER TABLE ops.job ENABLE TRIGGER USER"))


def look(engine: Engine, settings: Settings, **options: Any) -> list[tuple[str, str]]:
    with engine.connect() as connection:
        return [(one.kind, one.name) for one in pruning.look(connection, settings, Options(**options))]


def take(engine: Engine, settings: Settings, **options: Any) -> list[tuple[str, str]]:
    asked = Options(**options)
    with engine.connect() as connection:
        items = pruning.look(connection, settings, asked)
    return [(one.kind, one.name) for one in pruning.take(engine, settings, asked, items)]


def epochs(engine: Engine, name: str) -> list[int]:
    with engine.connect() as connection:
        statement = text("SELECT epoch FROM model.checkpoint WHERE name = :n AND NOT is_final ORDER BY step")
        return list(connection.execute(statement, {"n": name}).scalars())


def test_ended_trainings_keep_their_newest_stops_and_the_best_and_running_ones_all(
    engine: Engine, settings: Settings, tmp_path: Path
) -> None:
    training(engine, settings, tmp_path, "done", "succeeded")
    training(engine, settings, tmp_path, "stopped", "cancelled")
    training(engine, settings, tmp_path, "at-work", "running")
    assert look(engine, settings) == [("stops", "done@2"), ("stops", "stopped@2")]
    assert look(engine, settings, stops=1) == take(engine, settings, stops=1)
    assert epochs(engine, "done") == epochs(engine, "stopped") == [1, 5] and epochs(engine, "at-work") == [
        1,
        2,
        3,
        4,
        5,
    ]
    with engine.connect() as connection:
        assert {one.key for one in place(settings).listing()} == named_files.named(connection)
    assert take(engine, settings, stops=1) == []


def test_stops_that_embeddings_aliases_or_trainings_rest_on_stay(
    engine: Engine, settings: Settings, tmp_path: Path
) -> None:
    training(engine, settings, tmp_path, "done", "succeeded", stops=6)
    with engine.begin() as connection:
        by_epoch = {
            row.epoch: row.checkpoint_id
            for row in connection.execute(text("SELECT epoch, checkpoint_id FROM model.checkpoint WHERE NOT is_final"))
        }
        alias = text("INSERT INTO model.alias (alias, checkpoint_id, valid_to) VALUES ('old', :c, now())")
        connection.execute(alias, {"c": by_epoch[2]})
        child = add_checkpoint(connection, "child", 4)
        parent = text("UPDATE model.checkpoint SET parent_id = :p WHERE checkpoint_id = :c")
        connection.execute(parent, {"p": by_epoch[3], "c": child})
    assert take(engine, settings, stops=0) == [("stops", f"done@{epoch}") for epoch in (4, 5, 6)]
    assert epochs(engine, "done") == [1, 2, 3]


def test_the_stop_to_go_back_to_stays_until_its_training_has_ended_well(
    engine: Engine, settings: Settings, tmp_path: Path
) -> None:
    jobs_ = [training(engine, settings, tmp_path, name, state) for name, state in (("a", "succeeded"), ("b", "failed"))]
    with engine.begin() as connection:
        connection.execute(text("UPDATE model.checkpoint SET is_retreat = true WHERE epoch = 2 AND NOT is_final"))
    assert take(engine, settings) == [("stops", "a@2")] and epochs(engine, "b") == [1, 2, 3, 4, 5]
    with engine.begin() as connection:
        assert artifacts.forget_stops(connection, jobs_[1], 3) == []


@pytest.mark.parametrize(
    ("args", "held"),
    [
        ({"checkpoint": "done@2"}, True),
        ({"checkpoint": "done@last"}, True),
        ({"against": "3"}, True),
        ({"checkpoint": "checkpoints/"}, True),  # the beginning of a digest; here digests are paths
        ({"set": {"weights": "done@2"}}, True),
        ({"continue": "done"}, True),
        ({"checkpoint": "done"}, False),
        ({"checkpoint": "another@2"}, False),
        ({"set": {"weights": "/a/file.safetensors"}, "checkpoint": None}, False),
    ],
)
def test_stops_that_a_waiting_or_running_job_may_mean_stay(
    engine: Engine, settings: Settings, tmp_path: Path, args: dict[str, Any], held: bool
) -> None:
    done = training(engine, settings, tmp_path, "done", "succeeded")
    with engine.begin() as connection:
        job = jobs.insert(connection, kind="embed", queue="gpu", args=args)
    if held:
        assert not [one for one in look(engine, settings, stops=2) if one[1] == "done@3"]
        with engine.begin() as connection:
            artifacts.forget_stops(connection, done, 2)
        assert 3 in epochs(engine, "done")
        with engine.begin() as connection:
            set_state(engine, connection, job, "succeeded")
    assert ("stops", "done@3") in look(engine, settings, stops=2)


def test_files_without_a_row_go_once_they_are_old_and_nobodys_else_do(
    engine: Engine, settings: Settings, tmp_path: Path
) -> None:
    training(engine, settings, tmp_path, "done", "succeeded")
    old, young = publish(settings, tmp_path, "old", days=8), publish(settings, tmp_path, "young", days=6)
    root = place(settings).path("")
    for name, days in (("checkpoints/.a.part", 9), ("checkpoints/.b.part", 0.5), ("notes/mine", 99)):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("x")
        age(root / name, days)
    expected = [("files", old), ("unfinished", "checkpoints/.a.part")]
    assert sorted(take(engine, settings, stops=9)) == expected
    assert sorted(look(engine, settings, stops=9, days=0)) == [("files", young)]
    assert (root / "notes/mine").exists() and (root / "checkpoints/.b.part").exists()


def test_a_place_most_of_whose_files_no_row_names_is_refused(
    engine: Engine, settings: Settings, tmp_path: Path
) -> None:
    old = publish(settings, tmp_path, "of another store", days=8)
    with pytest.raises(InputError, match="is not another store's"):
        take(engine, settings)
    assert artifacts.is_kept(settings, old)
    assert take(engine, settings, force=True) == [("files", old)]


def test_a_file_that_a_row_names_since_it_was_looked_at_stays(
    engine: Engine, settings: Settings, tmp_path: Path
) -> None:
    key = publish(settings, tmp_path, "twin", days=8)
    options = Options(force=True)
    with engine.connect() as connection:
        items = pruning.look(connection, settings, options)
    with engine.begin() as connection:
        add_checkpoint(connection, "twin", 4)
        connection.execute(text("UPDATE model.checkpoint SET path = :k"), {"k": key})
    assert [one.name for one in items] == [key] and pruning.take(engine, settings, options, items) == []
    assert artifacts.is_kept(settings, key)


def test_what_attempts_left_goes_when_their_job_ended_long_ago(engine: Engine, settings: Settings) -> None:
    assert settings.home is not None
    with engine.begin() as connection:
        ids = [jobs.insert(connection, kind="embed", queue="gpu", args={}) for _ in range(4)]
        for job, (state, days) in zip(
            ids, (("failed", 8.0), ("succeeded", 6.0), ("running", 9.0), ("cancelled", 9.0)), strict=True
        ):
            set_state(engine, connection, job, state, days=days)
    for job in (*ids, 999):
        left = settings.home / "runs" / str(job) / "1" / "embedded-x.part"
        left.parent.mkdir(parents=True)
        left.write_bytes(b"123")
    retrying = engine.connect()
    retrying.execute(text("UPDATE ops.job SET state = 'queued' WHERE job_id = :j"), {"j": ids[3]})
    found: list[list[tuple[str, str]]] = []
    thread = threading.Thread(target=lambda: found.append(take(engine, settings)))
    thread.start()
    thread.join(1)
    assert thread.is_alive()  # it waits for the one that is tried again at this moment
    retrying.commit()
    retrying.close()
    thread.join(30)
    assert found == [[("attempts", str(settings.home / "runs" / str(ids[0])))]]
    assert sorted(int(path.name) for path in (settings.home / "runs").iterdir()) == [*ids[1:], 999]


def test_cached_volumes_go_where_that_is_asked_for_but_not_those_in_use(engine: Engine, settings: Settings) -> None:
    cache = folder(settings) / "recipe"
    cache.mkdir(parents=True)
    for name, days in (("old.npy", 40.0), ("used.npy", 40.0), ("young.npy", 1.0), (".half.1", 9.0)):
        (cache / name).write_bytes(b"1234")
        age(cache / name, days)
    lease, _ = CacheRoom(folder(settings)).claim(["recipe/used.npy"], 0, "scans")
    with closing(lease):
        assert look(engine, settings) == [("unfinished", str(cache / ".half.1"))]
        assert take(engine, settings, volumes_days=30) == [
            ("unfinished", str(cache / ".half.1")), ("volumes", "1 volumes"),
        ]  # fmt: skip
        assert sorted(path.name for path in cache.iterdir()) == ["used.npy", "young.npy"]
        assert take(engine, settings, volumes_days=30) == []


def test_partitions_of_embeddings_without_a_checkpoint_go(engine: Engine, settings: Settings) -> None:
    with engine.begin() as connection:
        one, other = add_checkpoint(connection, "a", 4), add_checkpoint(connection, "b", 4)
        for checkpoint in (one, other):
            add = text("SELECT model.add_embedding_partition(:c, 4)")
            connection.execute(add, {"c": checkpoint})
            replace_embeddings(connection, checkpoint, np.arange(1, 4), np.ones((3, 4), np.float32))
        connection.execute(text("DELETE FROM model.checkpoint WHERE checkpoint_id = :c"), {"c": one})
    assert take(engine, settings) == [("embeddings", f"embedding_{one}")] and take(engine, settings) == []


def test_vectors_that_wait_for_an_embedding_go_where_no_job_embeds(engine: Engine, settings: Settings) -> None:
    with engine.begin() as connection:
        add_labels(connection)
        checkpoint = add_checkpoint(connection, "a", 4)
        write_block(connection, Place(checkpoint, 1), np.arange(1, 3), ["ab" * 32] * 2, np.ones((2, 4), np.float32))
        job = jobs.insert(connection, kind="embed", queue="gpu", args={})
    assert look(engine, settings) == []
    with engine.begin() as connection:
        set_state(engine, connection, job, "cancelled")
        options = Options()
        items = pruning.look(connection, settings, options)
    assert [(one.kind, one.name) for one in items] == [("incoming", "a on chest@1")] and items[0].size > 0
    with engine.begin() as connection:
        again = jobs.insert(connection, kind="embed", queue="gpu", args={})
    assert pruning.take(engine, settings, options, items) == []
    with engine.begin() as connection:
        set_state(engine, connection, again, "succeeded")
    assert take(engine, settings) == [("incoming", "a on chest@1")] and take(engine, settings) == []


def test_the_sizes_add_up(engine: Engine, settings: Settings, tmp_path: Path) -> None:
    training(engine, settings, tmp_path, "done", "succeeded")
    publish(settings, tmp_path, "nobody's")
    with engine.connect() as connection:
        database, files = disk.database(connection), disk.files(connection, settings)
    assert 0 < sum(table["bytes"] for table in database["tables"]) < database["bytes"]
    assert {"omop.event", "ops.job", "model.checkpoint"} <= {table["name"] for table in database["tables"]}
    (kind,) = files["kinds"]
    assert (kind["name"], kind["files"], kind["unnamed_bytes"]) == ("checkpoints", 7, len("nobody's"))
    assert kind["bytes"] == files["bytes"] == 6 * len("done 1") + len("nobody's")
    assert files["missing_files"] == 0
    with engine.connect() as connection:
        place(settings).remove(next(iter(named_files.named(connection))))
        assert disk.files(connection, settings)["missing_files"] == 1


def test_the_commands_say_first_and_remove_by_yes(engine: Engine, settings: Settings, tmp_path: Path) -> None:
    training(engine, settings, tmp_path, "done", "succeeded")

    def ran(*arguments: str, using: Settings = settings) -> Ran:
        return lachesis(using, *arguments)

    code, out, _ = ran("prune")
    assert code == 0 and "done@2" in out and out.endswith("would remove 10 bytes; --yes removes it\n")
    assert json.loads(ran("prune", "--json")[1]) == {
        "removed": False, "bytes": 10, "items": [{"kind": "stops", "name": "done@2", "size": 10}],
    }  # fmt: skip
    assert ran("prune", "--yes")[1].endswith("removed 10 bytes\n")
    assert ran("prune") == (0, "nothing to remove\n", "") and ran("prune", "--yes")[1] == "removed 0 bytes\n"
    assert ran("prune", "--days", "-1")[0] == 2
    code, out, err = ran("du")
    assert code == 0 and "checkpoints" in out and "5 files" in out and "in all" in out and err == ""
    assert json.loads(ran("du", "--json")[1])["artifacts"]["bytes"] == 5 * len("done 1")
    code, _, err = ran("du", using=replace(settings, artifacts=str(tmp_path / "elsewhere")))
    assert code == 0 and "5 files that rows name are not at" in err
    away = replace(settings, artifacts="s3://bucket.invalid")
    code, out, err = ran("du", using=away)
    assert code == 0 and "database" in out and "artifacts are not counted" in err
