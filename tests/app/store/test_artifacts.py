"""Where published files lie, and which checkpoint a name means."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from app.errors import InputError, StoreError, UnknownName
from app.settings import Settings
from app.store import artifacts, jobs
from app.store.places import place


def add(engine: Engine, name: str, sha256: str, *, is_final: bool = True) -> int:
    values = {
        "name": name, "sha256": sha256, "arm": "tte", "encoder": "tiny", "width": 1, "recipe": {}, "seed": 0, "step": 1,
        "num_steps": 1, "is_final": is_final, "path": "x", "num_bytes": 1, "code_version": "0",
    }  # fmt: skip
    with engine.begin() as connection:
        return artifacts.add_checkpoint(connection, values)


def test_a_checkpoint_is_meant_by_its_name_its_id_or_the_beginning_of_its_digest(engine: Engine) -> None:
    older, newer = add(engine, "a", "0123456789"), add(engine, "a", "abcdef9999")
    add(engine, "a", "fedcba9999", is_final=False)

    def found(name: str) -> int:
        with engine.connect() as connection:
            return artifacts.find_checkpoint(connection, name).checkpoint_id

    assert found("a") == newer
    assert found(str(older)) == found("012345") == older
    for name in ("01234", "______", "%%%%%%", "b"):
        with pytest.raises(UnknownName):
            found(name)


def test_an_epoch_is_its_end_where_later_stops_of_the_next_are_kept(engine: Engine) -> None:
    steps = {10: 1, 14: 1, 20: 2, 27: 2, 30: 3}
    with engine.begin() as connection:
        job = jobs.insert(connection, kind="pretrain", queue="gpu", args={})
    ids = {step: add(engine, "a", f"{step:010d}", is_final=step == 30) for step in steps}
    with engine.begin() as connection:
        for step, epoch in steps.items():
            connection.execute(
                text(
                    "UPDATE model.checkpoint SET step = :s, epoch = :e, is_best = :s = 10, job_id = :j "
                    "WHERE checkpoint_id = :c"
                ),
                {"s": step, "e": epoch, "j": job, "c": ids[step]},
            )
    with engine.connect() as connection:
        for name, step in (("a@1", 10), ("a@2", 20), ("a@3", 30), ("a@best", 10), ("a@last", 30), ("a", 30)):
            assert artifacts.find_checkpoint(connection, name).checkpoint_id == ids[step]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("tiny-tte@chmpion", r"found 'chmpion'\. Did you mean '@champion'\?"),
        ("tiny-tte@bst", r"found 'bst'\. Did you mean 'tiny-tte@best'\?"),
        ("tiny-tte@xyz", r"best or last after the @, found 'xyz'\.$"),
        ("@chmpion", r"No checkpoint named '@chmpion'\. Did you mean '@champion'\?"),
        ("chmpion", r"Did you mean 'champion'\?"),
        ("tiny-tt", r"Did you mean 'tiny-tte'\?"),
        ("tny-tte@best", r"Did you mean 'tiny-tte@best'\?"),
        ("qqqqqq", r"Known: champion, tiny-tte\."),
    ],
)
def test_a_mistyped_name_epoch_or_alias_suggests_the_nearest(engine: Engine, given: str, said: str) -> None:
    checkpoint = add(engine, "tiny-tte", "0123456789")
    with engine.begin() as connection:
        for alias, end in (("champion", None), ("chmpon", "now")):
            statement = text("INSERT INTO model.alias (alias, checkpoint_id, valid_to) VALUES (:a, :c, :e)")
            connection.execute(statement, {"a": alias, "c": checkpoint, "e": end})
    with engine.connect() as connection, pytest.raises(InputError, match=said):
        artifacts.find_checkpoint(connection, given)


def test_files_are_kept_under_their_digest_and_an_altered_one_is_refused(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text("one")
    path, sha256 = artifacts.publish(settings, file, "reports")
    assert artifacts.publish(settings, file, "reports") == (path, sha256)
    kept = artifacts.fetch(settings, path, sha256)
    assert kept.read_text() == "one" and sha256 in kept.name
    kept.write_text("two")
    with pytest.raises(StoreError, match="sha256 differs"):
        artifacts.fetch(settings, path, sha256)


def test_artifacts_are_a_folder_or_a_bucket_and_another_url_is_refused(settings: Settings, tmp_path: Path) -> None:
    for named in (str(tmp_path), f"file://{tmp_path}"):
        assert place(replace(settings, artifacts=named)).path("x") == tmp_path / "x"
    assert place(replace(settings, artifacts="s3://bucket/a/")).name("x") == "s3://bucket/a/x"
    with pytest.raises(StoreError, match="URL of the kind ftp"):
        place(replace(settings, artifacts="ftp://host/x"))
    with pytest.raises(StoreError, match="set LACHESIS_ARTIFACTS or LACHESIS_HOME"):
        place(replace(settings, home=None))


@pytest.mark.parametrize("url", ["s3://", "s3:///a", "s3://key:secret@bucket/a", "s3://bucket/a?token=secret"])
def test_a_bucket_is_named_without_keys_and_what_is_wrong_is_not_repeated(settings: Settings, url: str) -> None:
    with pytest.raises(StoreError, match="to be s3://BUCKET/PREFIX") as refused:
        place(replace(settings, artifacts=url))
    assert "secret" not in str(refused.value)


def test_a_bucket_without_a_home_asks_for_a_folder_of_copies(settings: Settings) -> None:
    with pytest.raises(InputError, match="set LACHESIS_CACHE"):
        place(replace(settings, artifacts="s3://bucket", home=None))


def test_a_folder_that_may_not_be_written_is_refused_before_anything_is_made(settings: Settings) -> None:
    place(settings).require()
    assert not list(place(settings).listing())
    with pytest.raises((StoreError, OSError)):
        place(replace(settings, artifacts="/proc/nowhere")).require()
