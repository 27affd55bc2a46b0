"""Embeddings on their way to the store: unseen until whole, fenced, resumed, made again where contents changed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from sqlalchemy import Connection, Engine, text

from app.errors import FenceLost
from app.store import incoming
from app.store.incoming import Place
from app.store.places import place
from app.store.work import InlineWork
from tests.migrations.rows import add_checkpoint
from tests.workers.small_cohort import SMALL, SmallCohort, insert_cohort, write_volume
from workers.stages import embed_incoming
from workers.stages.embed import embed
from workers.stages.embed_incoming import Incoming, Order
from workers.stages.embed_unfinished import Unfinished
from workers.stages.pretrain import pretrain

Work = Callable[..., InlineWork]
SEEN = "SELECT image_occurrence_id, embedding::text FROM model.embedding ORDER BY 1"
WAITING = "SELECT count(*) FROM model.incoming_embedding"


@pytest.fixture
def cohort(engine: Engine, tmp_path: Path, work: Work, monkeypatch: pytest.MonkeyPatch) -> SmallCohort:
    """Sixty scans, of which the last two are one file; an untrained checkpoint `u`; blocks of eight vectors."""
    monkeypatch.setattr(embed_incoming, "ROWS", 8)
    monkeypatch.setattr(incoming, "ASKED", 7)
    with engine.begin() as connection:
        made = insert_cohort(connection, tmp_path / "scans")
    pretrain(work(arm="base", encoder="tiny", labels="outcomes", name="u", seed=0, set=SMALL))
    return made


def rows(engine: Engine, statement: str) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.execute(text(statement)).tuples())


def file_of(engine: Engine, work: Work, cohort: str = "chest") -> dict[str, np.ndarray]:
    """The exact vectors of a cohort."""
    statement = f"SELECT path FROM model.embedding_set JOIN label.cohort USING (cohort_id) WHERE name = '{cohort}'"
    ((path,),) = rows(engine, statement)
    return load_file(place(work().settings).path(path))


class Stopped(Exception):
    """What a test stops an attempt with."""


def stop_at(attempt: InlineWork, done: int, note: str = "embedding") -> InlineWork:
    def progress(now: int, total: int | None = None, unit: str = "", said: str = "") -> None:
        if said == note and now >= done:
            raise Stopped

    attempt.progress = progress  # type: ignore[method-assign]
    return attempt


def change(engine: Engine, cohort: SmallCohort, n: int) -> None:
    """Other voxels under the same scan, noted as loading scans notes them."""
    file = cohort.folder / f"{n}.nii"
    write_volume(file, 0.9, 1000 + n)
    os.utime(file, ns=(1, 10**18 + n))
    with engine.begin() as connection:
        statement = text("UPDATE omop.image_occurrence SET sha256 = NULL WHERE image_occurrence_id = :i")
        connection.execute(statement, {"i": cohort.images[n]})


def test_vectors_go_to_the_store_while_others_are_made_and_are_seen_together(
    engine: Engine, cohort: SmallCohort, work: Work
) -> None:
    seen: list[tuple[int, int, int]] = []
    attempt = work(checkpoint="u", cohort="chest")

    def progress(done: int, total: int | None = None, unit: str = "", note: str = "") -> None:
        if note == "embedding":
            ((waiting,),) = rows(engine, WAITING)
            seen.append((done, waiting, len(rows(engine, SEEN))))

    attempt.progress = progress  # type: ignore[method-assign]
    result = embed(attempt)
    assert result["written"] == len(rows(engine, SEEN)) == 60
    assert rows(engine, WAITING) == [(0,)]
    assert [waiting for _, waiting, _ in seen] == [max(0, done // 8 * 8) for done, _, _ in seen[:-1]] + [56]
    assert {public for _, _, public in seen} == {0}


def test_what_waits_of_other_scans_or_contents_is_taken_away(engine: Engine, cohort: SmallCohort, work: Work) -> None:
    images, contents = np.arange(10, 70), [f"{n:064x}" for n in range(60)]
    with engine.begin() as connection:
        checkpoint = add_checkpoint(connection, "w", 3)
        place = Place(checkpoint, cohort.cohort_id)
        incoming.write_block(connection, place, images, contents, np.ones((60, 3), np.float32))
        kept = np.flatnonzero(images % 3)
        changed = [contents[row] if row % 5 else "f" * 64 for row in kept.tolist()]
        incoming.keep_only(connection, place, images[kept], changed)
        found = connection.execute(text("SELECT image_occurrence_id FROM model.incoming_embedding ORDER BY 1"))
        assert found.scalars().all() == [int(images[row]) for row in kept if row % 5]
        assert incoming.missing(connection, place, images, contents, anew=False) == [
            image for row, image in enumerate(images.tolist()) if image % 3 == 0 or row % 5 == 0
        ]
        incoming.keep_only(connection, place, images[:0], [])
        assert connection.execute(text(WAITING)).scalar_one() == 0


@pytest.mark.parametrize("lost", ["nothing", "what waits in the store", "the file of raw vectors"])
def test_a_stopped_embedding_goes_on_with_what_is_left_of_it(
    engine: Engine, cohort: SmallCohort, work: Work, lost: str
) -> None:
    embed(work(checkpoint="u", cohort="chest"))
    whole, exact = rows(engine, SEEN), file_of(engine, work)["embedding"]
    with engine.begin() as connection:
        for table in ("embedding_set", "embedded_scan", "embedding"):
            connection.execute(text(f"DELETE FROM model.{table}"))
    attempt = stop_at(work(checkpoint="u", cohort="chest"), 40)
    with pytest.raises(Stopped):
        embed(attempt)
    assert rows(engine, SEEN) == [] and rows(engine, WAITING) == [(40,)]
    if lost == "what waits in the store":
        with engine.begin() as connection:
            connection.execute(text("TRUNCATE model.incoming_embedding"))
    if lost == "the file of raw vectors":
        for file in attempt.folder.glob("*.part"):
            file.unlink()
    result = embed(work(checkpoint="u", cohort="chest"))
    again = 59 if lost == "the file of raw vectors" else 19
    assert (result["newly_embedded"], result["resumed"], result["written"]) == (again, 59 - again, 60)
    assert rows(engine, SEEN) == whole and rows(engine, WAITING) == [(0,)]
    np.testing.assert_array_equal(file_of(engine, work)["embedding"], exact)


KILLED = """
import sys, time
from pathlib import Path
from app.settings import Settings
from app.store.session import make_engine
from app.store.work import InlineWork
from workers.stages import embed, embed_incoming

embed_incoming.ROWS = 8
url, home, folder = sys.argv[1:]
work = InlineWork(make_engine(url), args={"checkpoint": "u", "cohort": "chest"}, folder=Path(folder),
                  settings=Settings(home=Path(home), home_is_named=True, database_url=url))
work.progress = lambda *rest: time.sleep(0.05)
embed.embed(work)
"""


def test_kill_9_costs_the_block_at_work(engine: Engine, cohort: SmallCohort, work: Work, tmp_path: Path) -> None:
    settings = work().settings
    folder = tmp_path / "runs" / "1" / "1"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(settings.database_url), str(settings.home), folder])
    try:
        deadline = time.monotonic() + 60
        while rows(engine, WAITING)[0][0] < 16:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    ((waiting,),) = rows(engine, WAITING)
    assert 16 <= waiting < 60 and rows(engine, SEEN) == []
    again = InlineWork(
        engine, args={"checkpoint": "u", "cohort": "chest"}, folder=tmp_path / "runs" / "1" / "2", settings=settings
    )
    result = embed(again)
    assert result["resumed"] >= waiting and result["newly_embedded"] + result["resumed"] == 59
    killed, vectors = dict(rows(engine, SEEN)), file_of(engine, work)["embedding"]
    with engine.begin() as connection:
        for table in ("embedding_set", "embedded_scan", "embedding"):
            connection.execute(text(f"DELETE FROM model.{table}"))
    embed(work(checkpoint="u", cohort="chest"))
    assert dict(rows(engine, SEEN)) == killed
    np.testing.assert_array_equal(file_of(engine, work)["embedding"], vectors)


def test_what_another_attempt_took_away_is_written_before_all_is_seen(
    engine: Engine, cohort: SmallCohort, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = Incoming.publish

    def late(self: Incoming, connection: Connection, *rest: Any) -> int:
        connection.execute(text("DELETE FROM model.incoming_embedding WHERE image_occurrence_id % 2 = 0"))
        return publish(self, connection, *rest)

    monkeypatch.setattr(Incoming, "publish", late)
    assert embed(work(checkpoint="u", cohort="chest"))["written"] == 60
    exact = file_of(engine, work)
    stored = np.array([np.fromstring(vector.strip("[]"), sep=",") for _, vector in rows(engine, SEEN)])
    np.testing.assert_allclose(stored, exact["embedding"], rtol=2e-3, atol=1e-3)


def test_an_attempt_that_lost_its_job_writes_no_block(engine: Engine, cohort: SmallCohort, work: Work) -> None:
    attempt = work(checkpoint="u", cohort="chest")
    whole, blocks = attempt.transaction, 0

    @contextmanager
    def fenced() -> Iterator[Connection]:
        nonlocal blocks
        with whole() as connection:
            yield connection
            if connection.execute(text(WAITING)).scalar_one() > 8:
                blocks += 1
                raise FenceLost(1)

    attempt.transaction = fenced  # type: ignore[method-assign]
    with pytest.raises(FenceLost):
        embed(attempt)
    assert blocks == 1 and rows(engine, WAITING) == [(8,)] and rows(engine, SEEN) == []


def test_a_scan_whose_content_changed_is_embedded_again_and_no_other(
    engine: Engine, cohort: SmallCohort, work: Work
) -> None:
    embed(work(checkpoint="u", cohort="chest"))
    before = dict(rows(engine, SEEN))
    assert embed(work(checkpoint="u", cohort="chest"))["unchanged"]
    change(engine, cohort, 5)
    result = embed(work(checkpoint="u", cohort="chest"))
    assert (result["newly_embedded"], result["written"], result["unchanged"]) == (1, 1, False)
    after = dict(rows(engine, SEEN))
    assert {image for image in after if after[image] != before[image]} == {cohort.images[5]}
    exact = file_of(engine, work)
    vector = np.fromstring(after[cohort.images[5]].strip("[]"), sep=",")
    np.testing.assert_allclose(
        vector, exact["embedding"][exact["image_occurrence_id"] == cohort.images[5]][0], atol=0.1
    )
    assert embed(work(checkpoint="u", cohort="chest"))["unchanged"]


def test_each_cohort_learns_that_a_scan_has_changed(engine: Engine, cohort: SmallCohort, work: Work) -> None:
    columns = "person_id, image_occurrence_id, index_time, index_date_only, follow_up_end, split, eligible"
    more = "definition, attrition, follow_up, digest"
    with engine.begin() as connection:
        connection.execute(
            text(
                f"INSERT INTO label.cohort (name, version, is_current, {more}) SELECT 'other', 1, true, {more} "
                "FROM label.cohort"
            )
        )
        connection.execute(
            text(
                f"INSERT INTO label.cohort_member (cohort_id, {columns}) SELECT o.cohort_id, {columns} FROM "
                "label.cohort_member m, (SELECT cohort_id FROM label.cohort WHERE name = 'other') o"
            )
        )
    for name in ("chest", "other"):
        embed(work(checkpoint="u", cohort=name))
    change(engine, cohort, 5)
    assert embed(work(checkpoint="u", cohort="chest"))["newly_embedded"] == 1
    second = embed(work(checkpoint="u", cohort="other"))
    assert (second["newly_embedded"], second["written"], second["unchanged"]) == (0, 0, False)
    one, other = file_of(engine, work, "chest"), file_of(engine, work, "other")
    np.testing.assert_array_equal(one["embedding"], other["embedding"])


def test_a_damaged_file_is_made_again(engine: Engine, cohort: SmallCohort, work: Work) -> None:
    embed(work(checkpoint="u", cohort="chest"))
    exact = file_of(engine, work)["embedding"]
    ((path,),) = rows(engine, "SELECT path FROM model.embedding_set")
    file = place(work().settings).path(path)
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\x01")
    assert embed(work(checkpoint="u", cohort="chest"))["newly_embedded"] == 59
    np.testing.assert_array_equal(file_of(engine, work)["embedding"], exact)


def test_a_stop_on_the_way_is_standardised_by_its_cohort_when_all_is_made(
    engine: Engine, cohort: SmallCohort, work: Work
) -> None:
    embed(work(checkpoint="u", cohort="chest"))
    pretrain(work(arm="tte", encoder="tiny", labels="outcomes", name="t", seed=0, set=SMALL))
    ((stop,),) = rows(engine, "SELECT max(checkpoint_id) FROM model.checkpoint WHERE NOT is_final")
    attempt = stop_at(work(checkpoint=str(stop), cohort="chest"), 40)
    with pytest.raises(Stopped):
        embed(attempt)
    assert rows(engine, WAITING) == [(0,)], "nothing to standardise by is known yet"
    result = embed(work(checkpoint=str(stop), cohort="chest"))
    assert (result["resumed"], result["written"]) == (40, 60)
    with engine.connect() as connection:
        path = connection.scalar(
            text("SELECT path FROM model.embedding_set WHERE checkpoint_id = :c"), {"c": result["checkpoint_id"]}
        )
    made = load_file(place(work().settings).path(str(path)))
    train = np.array([split == "train" for split in cohort.split])
    train[0] = False
    moving = made["sd"] > 1e-6
    np.testing.assert_allclose(made["embedding"][train][:, moving].mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(made["embedding"][train][:, moving].std(0), 1, atol=1e-3)


def test_vectors_are_never_all_in_memory(engine: Engine, work: Work, tmp_path: Path) -> None:
    width, count = 1024, 8_000
    images = np.arange(1, count + 1)
    contents = [f"{n:064x}" for n in range(count)]
    with engine.begin() as connection:
        checkpoint = add_checkpoint(connection, "wide", width)
        insert = "INSERT INTO label.cohort (name, version, is_current, definition, attrition, follow_up, digest) "
        connection.execute(text(insert + "VALUES ('c', 1, true, '{}', '[]', 'observation_period', '')"))
    attempt = work()
    unfinished = Unfinished(attempt.folder, "f" * 64, width)
    arriving = Incoming(
        attempt, Place(checkpoint, 1), Order(images=images, embedded=contents, own=contents), anew=False
    )
    for start in range(0, count, 100):
        made = np.random.default_rng(start).normal(size=(100, width)).astype(np.float32)
        unfinished.add(contents[start : start + 100], made)
    tracemalloc.start()
    raw = unfinished.locate(contents)
    arriving.fill(raw.take)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(raw) == count and rows(engine, WAITING) == [(count,)]
    assert peak < count * width * 4 * 2 / 3, "all vectors are 31 MiB, a block of them 4"
