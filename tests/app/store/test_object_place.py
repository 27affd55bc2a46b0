"""Artifacts in a bucket of a real server that speaks S3."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest
from sqlalchemy import Engine, text

from app.errors import ArtifactsAway, StoreError
from app.settings import Settings
from app.store import artifacts, disk, named_files, object_place, pruning
from app.store.object_place import ObjectPlace
from app.store.places import digest_of, place
from tests.bucket import Bucket, serving
from tests.migrations.rows import add_checkpoint


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    with serving(tmp_path_factory.mktemp("bucket")) as made:
        yield made


@pytest.fixture
def client(server: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    object_place._client.cache_clear()
    made = boto3.client("s3")
    made.create_bucket(Bucket="artifacts")
    yield made
    for one in made.list_objects_v2(Bucket="artifacts").get("Contents", ()):
        made.delete_object(Bucket="artifacts", Key=one["Key"])
    object_place._client.cache_clear()


@pytest.fixture
def stored(settings: Settings, client: Any) -> Settings:
    return replace(settings, artifacts="s3://artifacts/team/lachesis")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "weights.safetensors"
    made.write_bytes(os.urandom(9 << 20))  # above the size from which uploads go in parts
    return made


def copies(settings: Settings) -> Path:
    here = place(settings)
    assert isinstance(here, ObjectPlace)
    return here.copies


def test_a_file_is_kept_under_its_digest_and_comes_back_on_another_host(
    stored: Settings, client: Any, file: Path, tmp_path: Path
) -> None:
    key, sha256 = artifacts.publish(stored, file, "checkpoints")
    assert artifacts.publish(stored, file, "checkpoints") == (key, sha256)
    found = client.list_objects_v2(Bucket="artifacts")["Contents"]
    assert [one["Key"] for one in found] == [f"team/lachesis/checkpoints/{sha256[:2]}/{sha256}.safetensors"]
    elsewhere = replace(stored, cache=tmp_path / "elsewhere")
    fetched = artifacts.fetch(elsewhere, key, sha256)
    assert fetched.read_bytes() == file.read_bytes() and fetched.is_relative_to(tmp_path / "elsewhere")
    assert [(one.key, one.size) for one in place(stored).listing("checkpoints")] == [(key, 9 << 20)]
    assert not list(place(stored).listing("reports"))


def test_what_was_read_once_is_read_from_this_host_and_a_damaged_copy_is_fetched_again(
    stored: Settings, client: Any, file: Path
) -> None:
    key, sha256 = artifacts.publish(stored, file, "checkpoints")
    kept = artifacts.fetch(stored, key, sha256)
    client.delete_object(Bucket="artifacts", Key=f"team/lachesis/{key}")
    assert artifacts.fetch(stored, key, sha256) == kept
    kept.write_bytes(b"damaged")
    with pytest.raises(StoreError, match="found none; set LACHESIS_ARTIFACTS"):
        artifacts.fetch(stored, key, sha256)
    artifacts.publish(stored, file, "checkpoints")
    kept.write_bytes(b"damaged")
    assert digest_of(artifacts.fetch(stored, key, sha256)) == sha256


def test_an_altered_object_is_refused_and_mended_by_the_next_to_publish_it(
    stored: Settings, client: Any, file: Path, tmp_path: Path
) -> None:
    key, sha256 = artifacts.publish(stored, file, "checkpoints")
    other_host = replace(stored, cache=tmp_path / "elsewhere")
    client.put_object(Bucket="artifacts", Key=f"team/lachesis/{key}", Body=b"x" * (9 << 20))
    with pytest.raises(StoreError, match="sha256 differs"):
        artifacts.fetch(other_host, key, sha256)
    assert not [path for path in copies(other_host).rglob("*") if path.is_file()]
    artifacts.publish(stored, file, "checkpoints")
    assert digest_of(artifacts.fetch(other_host, key, sha256)) == sha256


def test_a_removed_file_is_gone_from_the_bucket_and_from_this_host(stored: Settings, client: Any, file: Path) -> None:
    key, _ = artifacts.publish(stored, file, "reports")
    assert artifacts.is_kept(stored, key)
    assert place(stored).remove(key)
    assert not artifacts.is_kept(stored, key) and "Contents" not in client.list_objects_v2(Bucket="artifacts")
    assert not place(stored).path(key).exists() and not place(stored).remove(key)


def test_files_of_a_bucket_that_no_row_names_are_counted_and_pruned(
    stored: Settings, file: Path, engine: Engine
) -> None:
    named, sha256 = artifacts.publish(stored, file, "checkpoints")
    with engine.begin() as connection:
        named_files.hold(connection, stored, file, named, sha256)
        add_checkpoint(connection, "a", 1)
        connection.execute(text("UPDATE model.checkpoint SET path = :key"), {"key": named})
    file.write_bytes(b"nobody's")
    key, _ = artifacts.publish(stored, file, "checkpoints")
    options = pruning.Options(days=0)
    with engine.connect() as connection:
        (kind,) = disk.files(connection, stored)["kinds"]
        items = pruning.look(connection, stored, options)
    assert (kind["files"], kind["bytes"], kind["unnamed_bytes"]) == (2, (9 << 20) + 8, 8)
    assert [(one.kind, one.name) for one in pruning.take(engine, stored, options, items)] == [("files", key)]
    assert artifacts.is_kept(stored, named) and not artifacts.is_kept(stored, key)


def test_copies_that_nobody_read_for_a_month_go_when_another_comes(stored: Settings, file: Path) -> None:
    old, _ = artifacts.publish(stored, file, "checkpoints")
    half = copies(stored) / "checkpoints/.half"
    half.write_bytes(b"of a process that was killed")
    for path, days in ((place(stored).path(old), 31), (half, 2)):
        os.utime(path, (time.time() - 86_400 * days,) * 2)
    file.write_bytes(b"new")
    new, _ = artifacts.publish(stored, file, "checkpoints")
    assert not place(stored).path(old).exists() and not half.exists()
    assert place(stored).path(new).exists() and artifacts.is_kept(stored, old), "the bucket keeps both"


def test_a_bucket_is_tried_before_a_run(stored: Settings, client: Any) -> None:
    place(stored).require()
    assert "Contents" not in client.list_objects_v2(Bucket="artifacts")
    with pytest.raises(StoreError, match="bucket absent, its server answered NoSuchBucket"):
        place(replace(stored, artifacts="s3://absent")).require()


def test_missing_keys_are_named(stored: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    object_place._client.cache_clear()
    with pytest.raises(StoreError, match="set AWS_ACCESS_KEY_ID"):
        place(stored).require()


def test_a_server_that_is_away_is_trouble_that_passes(
    stored: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    with serving(tmp_path) as other:
        monkeypatch.setenv("AWS_ENDPOINT_URL", other.environment["AWS_ENDPOINT_URL"])
        object_place._client.cache_clear()
        object_place._client(os.getpid()).create_bucket(Bucket="artifacts")
        key, sha256 = artifacts.publish(stored, file, "checkpoints")
        other.end()
        place(stored).path(key).unlink()
        for call in (lambda: artifacts.publish(stored, file, "x"), lambda: artifacts.fetch(stored, key, sha256)):
            with pytest.raises(ArtifactsAway, match="check AWS_ENDPOINT_URL") as away:
                call()
            assert isinstance(away.value, OSError), "a training goes on and writes its stop again later"
