"""Vectors that were made elsewhere: read, refused, standardised, judged and searched like a checkpoint's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from safetensors.numpy import save_file
from sqlalchemy import Engine, text

from app.errors import InputError
from app.loading import rules
from app.loading.embeddings_read import read_vectors, resolve
from app.store.similar import Among, nearest
from app.store.work import InlineWork
from tests.workers.small_cohort import SmallCohort, insert_cohort
from workers.stages.embed import embed
from workers.stages.evaluate import evaluate
from workers.stages.load_embeddings import load_embeddings

Work = Callable[..., InlineWork]


@pytest.fixture
def cohort(engine: Engine, tmp_path: Path) -> SmallCohort:
    with engine.begin() as connection:
        return insert_cohort(connection, tmp_path / "scans")


def vectors(cohort: SmallCohort) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Five numbers a scan, of which one is its size."""
    made = np.random.default_rng(1).normal(3, 2, (len(cohort.images), 5)).astype(np.float32)
    made[:, 0] = cohort.size
    return made


def write(file: Path, name: str, keys: list[Any], made: np.ndarray[Any, Any]) -> Path:
    """The same vectors in a format that the file's ending says."""
    if file.suffix == ".parquet":
        parquet.write_table(pa.table({name: keys, "embedding": made.tolist()}), file)
    elif file.suffix == ".csv":
        head = ",".join([name, *(f"x{i}" for i in range(made.shape[1]))])
        rows = (f"{key}," + ",".join(repr(float(x)) for x in row) for key, row in zip(keys, made, strict=True))
        file.write_text("\n".join([head, *rows]) + "\n")
    elif file.suffix == ".npz":
        np.savez(file, **{name: np.array(keys), "embedding": made})
    else:
        save_file({name: np.array(keys, np.int64), "embedding": made}, file)
    return file


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".npz", ".safetensors"])
def test_every_format_gives_the_same_vectors(tmp_path: Path, suffix: str) -> None:
    made = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    given = read_vectors(write(tmp_path / f"v{suffix}", "image_occurrence_id", [7, 8, 9, 10], made), None)
    assert (given.keys, given.width, given.num_read) == (["7", "8", "9", "10"], 3, 4)
    np.testing.assert_array_equal(np.stack(given.vectors), made)


def test_vectors_made_elsewhere_are_judged_and_searched_like_those_of_a_checkpoint(
    engine: Engine, cohort: SmallCohort, work: Work, tmp_path: Path
) -> None:
    file = write(tmp_path / "merlin.parquet", "image_occurrence_id", cohort.images, vectors(cohort))
    args = {"path": str(file), "encoder": "merlin", "cohort": "chest"}
    made = load_embeddings(work(**args))
    assert (made["loaded"], made["rejected"], made["unchanged"], made["recall"]) == (60, 0, False, 1.0)
    again = load_embeddings(work(**args))
    assert again["unchanged"] and again["load_id"] == made["load_id"]
    judged = evaluate(work(checkpoint="merlin", labels="outcomes", replicates=20))
    assert judged["tasks"] == 2 and judged["metrics"] > 0
    with engine.connect() as connection:
        rows = nearest(connection, cohort.images[3], "merlin", 5, Among())
        assert len(rows) == 5 and rows[0]["distance"] < rows[-1]["distance"]
        inputs = connection.execute(text("SELECT DISTINCT inputs FROM model.metric")).scalars().all()
        assert "image" in inputs and "voxels" not in inputs
    with pytest.raises(InputError, match="whose vectors were made elsewhere"):
        embed(work(checkpoint="merlin", cohort="chest"))


def test_scans_of_two_persons_that_share_a_content_are_counted_however_the_vectors_were_made(
    engine: Engine, cohort: SmallCohort, work: Work, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "m.npz", "image_occurrence_id", cohort.images, vectors(cohort))
    args = {"path": str(file), "encoder": "merlin", "cohort": "chest"}
    load_embeddings(work(**args))
    shared = text("SELECT shared_volumes FROM model.embedding_set")
    with engine.begin() as connection:
        assert connection.execute(shared).scalar_one() == 2, "the last two have one file"
        connection.execute(
            text(
                "UPDATE omop.image_occurrence SET sha256 = sha256(convert_to(CASE WHEN image_occurrence_id = ANY(:i) "
                "THEN 'same' ELSE image_occurrence_id::text END, 'UTF8'))"
            ),
            {"i": cohort.images[:3]},
        )
    assert "voxels of 60 of 60 scans were never read" in capsys.readouterr().err
    assert load_embeddings(work(**args))["unchanged"]
    with engine.connect() as connection:
        assert connection.execute(shared).scalar_one() == 3, "as their voxels say"
    assert "never read" not in capsys.readouterr().err


def test_a_changed_file_becomes_a_newer_checkpoint_and_supersedes_the_load(
    engine: Engine, cohort: SmallCohort, work: Work, tmp_path: Path
) -> None:
    made = vectors(cohort)
    file = write(tmp_path / "m.npz", "image_occurrence_id", cohort.images, made)
    args = {"path": str(file), "encoder": "merlin", "cohort": "chest"}
    old = load_embeddings(work(**args))
    write(file, "image_occurrence_id", cohort.images, made[:, ::-1] * 2)
    new = load_embeddings(work(**args))
    assert new["checkpoint_id"] > old["checkpoint_id"]
    with engine.connect() as connection:
        found = connection.execute(text("SELECT model.find_checkpoint('merlin')")).scalar_one()
        states = dict(connection.execute(text("SELECT load_id, state FROM ops.load")).tuples().all())
    assert found == new["checkpoint_id"]
    assert (states[old["load_id"]], states[new["load_id"]]) == ("superseded", "published")


def test_a_scan_is_named_by_its_path_below_its_root_or_in_full(cohort: SmallCohort, work: Work, tmp_path: Path) -> None:
    paths = [f"{n}.nii" if n % 2 else str(cohort.folder / f"{n}.nii") for n in range(58)]
    file = write(tmp_path / "m.csv", "path", [*paths, "58.nii"], vectors(cohort)[:59])
    made = load_embeddings(work(path=str(file), encoder="ct-fm", cohort="chest"))
    assert (made["loaded"], made["rejects_by_rule"]) == (58, {"ambiguous_scan": 1}), "two scans share the last file"


def test_a_vector_that_cannot_be_used_is_rejected_with_its_record_and_rule(
    engine: Engine, cohort: SmallCohort, work: Work, tmp_path: Path
) -> None:
    file = write(tmp_path / "m.csv", "image_occurrence_id", cohort.images, vectors(cohort))
    lines = file.read_text().splitlines()
    first = lines[1].partition(",")[2]
    for n, values in ((11, "nan,1,1,1,1"), (12, "0,0,0,0,0"), (13, "a,1,1,1,1"), (14, "1,1")):
        lines[n] = f"{cohort.images[n - 1]},{values}"
    lines += [f"999999,{first}", f",{first}", lines[1], f"{cohort.images[1]},1,2,3,4,5"]
    file.write_text("\n".join(lines) + "\n")
    args = {"path": str(file), "encoder": "merlin", "cohort": "chest"}
    with pytest.raises(InputError, match=r"9 of 64 are rejected .*nothing was published"):
        load_embeddings(work(**args))
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM model.checkpoint")).scalar() == 0
    made = load_embeddings(work(**args, max_rejects=0.5))
    wanted = {(11, "not_finite"), (12, "zero_vector"), (13, "unparsable_number"), (14, "wrong_number_of_fields")}
    wanted |= {(61, "unknown_scan"), (62, "missing_scan"), (63, "duplicate_row")}
    wanted |= {(2, "duplicate_key"), (64, "duplicate_key")}
    with engine.connect() as connection:
        statement = text("SELECT record, rule FROM ops.reject WHERE load_id = :l")
        assert {tuple(row) for row in connection.execute(statement, {"l": made["load_id"]})} == wanted
    assert {rule for _, rule in wanted} <= set(rules.REJECTS)
    assert made["loaded"] == 55


def test_vectors_of_several_lengths_are_refused_one_by_one(tmp_path: Path) -> None:
    file = tmp_path / "m.parquet"
    parquet.write_table(pa.table({"series_uid": ["a", "b", None], "embedding": [[1.0, 2.0], [1.0], [1.0, 2.0]]}), file)
    given = read_vectors(file, None)
    assert [(r.record, r.rule) for r in given.refusals] == [(2, "wrong_width"), (3, "missing_scan")]
    assert list(resolve(given, {"a": [5]})) == [5]


def test_a_file_of_another_kind_is_refused_in_a_sentence(tmp_path: Path) -> None:
    pickled = tmp_path / "p.npz"
    np.savez(pickled, image_occurrence_id=np.array([1, None], object), embedding=np.ones((2, 2)))
    (tmp_path / "x.parquet").write_bytes(b"not parquet")
    (tmp_path / "y.safetensors").write_bytes(b"\xff" * 40)
    (tmp_path / "z.csv").write_text("person,x0\n1,2\n")
    (tmp_path / "w.csv").write_text("path,series_uid,x0\na,b,2\n")
    (tmp_path / "e.csv").write_text("path,x0\n")
    for name, words in (
        ("p.npz", "without pickle"),
        ("x.parquet", "Expected Parquet"),
        ("y.safetensors", "something else"),
        ("z.csv", "found none"),
        ("w.csv", "found series_uid, path"),
        ("e.csv", "found none; nothing was changed"),
        ("q.pt", "got .pt"),
    ):
        with pytest.raises(InputError, match=words):
            read_vectors(tmp_path / name, None)


def test_vectors_without_train_scans_or_with_a_name_that_is_taken_are_refused(
    engine: Engine, cohort: SmallCohort, work: Work, tmp_path: Path
) -> None:
    held_out = [image for image, split in zip(cohort.images, cohort.split, strict=True) if split == "held_out"]
    file = write(tmp_path / "m.npz", "image_occurrence_id", held_out, vectors(cohort)[: len(held_out)])
    with pytest.raises(InputError, match="two or more train scans"):
        load_embeddings(work(path=str(file), encoder="m", cohort="chest"))
    file = write(tmp_path / "n.npz", "image_occurrence_id", cohort.images, np.ones((60, 4), np.float32))
    with pytest.raises(InputError, match="the same vector for every train scan"):
        load_embeddings(work(path=str(file), encoder="m", cohort="chest"))
