"""Stages pretrain and embed on a cohort of real rows and files, with a real Postgres and pgvector."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from sqlalchemy import Engine, text

from app.errors import InputError, UnknownName
from app.store import artifacts
from app.store.places import place
from app.store.work import InlineWork
from ml.config import read_recipe
from tests.workers.small_cohort import SMALL, SmallCohort, insert_cohort
from workers.bridge import Scan, read_scans
from workers.scan_volumes import ScanVolumes, _refuse_too_many, prepare
from workers.stages.embed import embed
from workers.stages.pretrain import pretrain

Work = Callable[..., InlineWork]
ARGS = {"encoder": "tiny", "labels": "outcomes", "seed": 0, "set": SMALL, "shuffle_volumes": False}


@pytest.fixture
def cohort(engine: Engine, tmp_path: Path) -> SmallCohort:
    with engine.begin() as connection:
        return insert_cohort(connection, tmp_path / "scans")


def test_training_leaves_a_final_checkpoint_with_its_recipe_tasks_and_pieces(
    work: Work, engine: Engine, cohort: SmallCohort
) -> None:
    result = pretrain(work(arm="tte", name="t", **ARGS))
    with engine.connect() as connection:
        row = connection.execute(text("SELECT * FROM model.checkpoint WHERE is_final")).mappings().one()
    assert (row["name"], row["arm"], row["width"], row["step"]) == ("t", "tte", 64, row["num_steps"])
    assert row["step"] == 3 * (result["num_train"] // 4)
    assert row["recipe"]["settings"]["shape_zyx"] == [16, 16, 16]
    assert row["recipe"]["tasks"] == ["a", "b"]
    assert row["recipe"]["pieces_days"][0] == 0
    assert row["recipe"]["pieces_days"][-1] is None
    assert len(row["validation"]["epochs"]) == 4
    assert result["num_train"] == sum(s == "train" for s in cohort.split[1:]), "the ineligible member trains nothing"


def test_embeddings_are_searchable_and_standardised_by_the_train_members(
    work: Work, engine: Engine, cohort: SmallCohort
) -> None:
    pretrain(work(arm="base", name="u", **ARGS))
    result = embed(work(checkpoint="u", cohort="chest"))
    assert (result["num_scans"], result["distinct_volumes"], result["shared_volumes"]) == (60, 59, 2)
    settings = work().settings
    with engine.connect() as connection:
        row = connection.execute(text("SELECT * FROM model.embedding_set")).mappings().one()
        stored = connection.execute(
            text("SELECT image_occurrence_id, embedding::text FROM model.embedding ORDER BY 1")
        ).all()
        neighbours = connection.execute(
            text("SELECT image_occurrence_id FROM model.neighbours(:i, 'u', 1)"), {"i": cohort.images[-1]}
        ).scalars()
        assert list(neighbours) == [cohort.images[-2]], "the two scans of one file are nearest"
        read = connection.execute(text("SELECT count(*) FROM omop.image_occurrence WHERE sha256 IS NULL")).scalar()
    assert read == 0
    kept = load_file(artifacts.fetch(settings, row["path"], row["sha256"]))
    assert kept["image_occurrence_id"].tolist() == sorted(cohort.images) == [image for image, _ in stored]
    train = np.array([s == "train" for s in cohort.split])
    train[0] = False
    moving = kept["sd"] > 1e-6
    np.testing.assert_allclose(kept["embedding"][train][:, moving].mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(kept["embedding"][train][:, moving].std(0), 1, atol=1e-3)
    halves = np.array([np.fromstring(vector.strip("[]"), sep=",") for _, vector in stored])
    np.testing.assert_allclose(halves, kept["embedding"], rtol=2e-3, atol=1e-3)
    assert kept["voxel_stats"].shape == (60, 2)
    assert (kept["padding_share"] == 0).all()


def test_doing_the_same_again_changes_nothing_and_another_seed_does(
    work: Work, engine: Engine, cohort: SmallCohort
) -> None:
    first = pretrain(work(arm="tte", name="t", **ARGS))
    again = pretrain(work(arm="tte", name="t", **ARGS))
    assert again["unchanged"]
    assert again["checkpoint_id"] == first["checkpoint_id"]
    other = pretrain(work(arm="tte", name="t", **{**ARGS, "seed": 1}))
    assert other["checkpoint_id"] != first["checkpoint_id"]
    assert not embed(work(checkpoint="t", cohort="chest"))["unchanged"]
    assert embed(work(checkpoint="t", cohort="chest"))["unchanged"]
    with engine.connect() as connection:
        ids = connection.execute(text("SELECT checkpoint_id FROM model.embedding_set")).scalars().all()
    assert ids == [other["checkpoint_id"]], "a name means its newest finished checkpoint"


@pytest.mark.parametrize("arm", ["mtl", "visit"])
def test_the_binary_arms_train_too(work: Work, cohort: SmallCohort, arm: str) -> None:
    result = pretrain(work(arm=arm, name=arm, **ARGS))
    assert result["steps"] > 0
    assert np.isfinite(result["validation"]["tuning_loss"])


def test_shuffled_volumes_are_a_marked_control(work: Work, engine: Engine, cohort: SmallCohort) -> None:
    pretrain(work(arm="tte", name="t", **ARGS))
    pretrain(work(arm="tte", name="s", **{**ARGS, "shuffle_volumes": True}))
    with engine.connect() as connection:
        rows = connection.execute(
            text("SELECT name, shuffled, sha256 FROM model.checkpoint WHERE is_final ORDER BY name")
        ).all()
    assert [(name, shuffled) for name, shuffled, _ in rows] == [("s", True), ("t", False)]
    assert rows[0].sha256 != rows[1].sha256


def test_a_shuffled_checkpoint_embeds_the_volumes_of_others_inside_the_split(
    work: Work, engine: Engine, cohort: SmallCohort
) -> None:
    pretrain(work(arm="base", name="u", **ARGS))
    pretrain(work(arm="base", name="s", **{**ARGS, "shuffle_volumes": True}))
    kept = {}
    for name in ("u", "s"):
        row = embed(work(checkpoint=name, cohort="chest"))
        assert embed(work(checkpoint=name, cohort="chest"))["unchanged"]
        with engine.connect() as connection:
            path = connection.execute(
                text("SELECT path FROM model.embedding_set WHERE checkpoint_id = :c"), {"c": row["checkpoint_id"]}
            ).scalar_one()
        kept[name] = load_file(place(work().settings).path(path))
    true, shuffled = kept["u"]["voxel_stats"], kept["s"]["voxel_stats"]
    for split in ("train", "tuning", "held_out"):
        rows = np.array([s == split for s in cohort.split])
        assert sorted(map(tuple, true[rows])) == sorted(map(tuple, shuffled[rows])), "a permutation inside the split"
    assert (true == shuffled).all(1).mean() < 0.2


def test_an_unreadable_scan_is_set_aside_and_counted(
    work: Work, engine: Engine, cohort: SmallCohort, capsys: pytest.CaptureFixture[str]
) -> None:
    (cohort.folder / "1.nii").write_bytes(b"not a volume")
    result = pretrain(work(arm="tte", name="t", **ARGS))
    assert (result["num_failed"], list(result["failed_scans"])) == (1, [str(cohort.images[1])])
    reason = result["failed_scans"][str(cohort.images[1])]
    assert f"scan {cohort.images[1]} (image_occurrence_id) is set aside: {reason}\n" in capsys.readouterr().err
    embedded = embed(work(checkpoint="t", cohort="chest"))
    assert (embedded["num_scans"], embedded["num_failed"]) == (59, 1)
    assert str(cohort.folder) not in str(result) + str(embedded), "paths of scans stay out of results"


def test_a_scan_whose_voxels_cannot_be_read_is_unusable_until_its_file_is_mended(
    work: Work, engine: Engine, cohort: SmallCohort
) -> None:
    def verdict(number: int) -> tuple[str, list[str]]:
        with engine.connect() as connection:
            row = connection.execute(
                text("SELECT verdict, reasons FROM omop.image_occurrence WHERE image_occurrence_id = :i"),
                {"i": cohort.images[number]},
            ).one()
        return row.verdict, row.reasons

    damaged, absent = cohort.folder / "1.nii", cohort.folder / "2.nii"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1000])
    absent.unlink()
    with engine.begin() as connection:
        scans = read_scans(connection, work().settings, cohort.cohort_id)
    recipe = read_recipe("tiny", SMALL)
    found = prepare(work(), recipe, scans)
    assert set(found.failed) == {cohort.images[1], cohort.images[2]}
    assert verdict(1) == ("unusable", ["unreadable_voxels"])
    assert verdict(2) == ("ok", []), "a file that is away says nothing of the scan"
    prepare(work(), recipe, scans)
    assert verdict(1) == ("unusable", ["unreadable_voxels"])
    damaged.write_bytes(whole)
    prepare(work(), recipe, scans)
    assert verdict(1) == ("ok", [])


def test_too_many_unreadable_scans_end_the_job_with_the_reason(work: Work, cohort: SmallCohort) -> None:
    for i in range(1, 21):
        (cohort.folder / f"{i}.nii").unlink()
    with pytest.raises(InputError, match=r"at most 10 unreadable volumes of \d+, got 1\d; .*found none"):
        pretrain(work(arm="tte", name="t", **ARGS))


def test_a_few_files_may_fail_but_not_most_and_a_file_counts_once_for_all_its_scans() -> None:
    def scans(files: int, persons: int) -> list[Scan]:
        return [
            Scan(image_occurrence_id=i, person_id=i, format="nifti", path=Path(f"{i % files}.nii"), image_key=str(i))
            for i in range(persons)
        ]

    def refuse(found: list[Scan], bad: int) -> None:
        failed = {s.image_occurrence_id: "damaged" for s in found if int(s.path.stem) < bad}
        _refuse_too_many(ScanVolumes(cache=None, cached={}, failed=failed), found)  # type: ignore[arg-type]

    for files, persons, fine in ((5, 100, 2), (1, 10, 0), (2, 10, 1), (16, 16, 8), (100, 100, 10), (1000, 1000, 50)):
        refuse(scans(files, persons), fine)
        with pytest.raises(InputError, match=f"at most {fine} unreadable volumes of {files}, got {fine + 1};"):
            refuse(scans(files, persons), fine + 1)


def test_mistakes_are_sentences(work: Work, cohort: SmallCohort) -> None:
    with pytest.raises(InputError, match="No recipe setting named 'epoch'\\. Did you mean 'epochs'"):
        pretrain(work(arm="tte", name="t", **{**ARGS, "set": {"epoch": "3"}}))
    with pytest.raises(InputError, match="Expected a whole number for epochs, got 'many'"):
        pretrain(work(arm="tte", name="t", **{**ARGS, "set": {"epochs": "many"}}))
    with pytest.raises(UnknownName, match="Did you mean 'outcomes'"):
        pretrain(work(arm="tte", name="t", **{**ARGS, "labels": "outcome"}))
    with pytest.raises(UnknownName, match="No checkpoint named 'nothing'"):
        embed(work(checkpoint="nothing", cohort="chest"))


def test_base_keeps_given_weights_and_is_called_untrained_without(
    work: Work, engine: Engine, cohort: SmallCohort
) -> None:
    pretrain(work(arm="tte", name="t", **ARGS))
    pretrain(work(arm="base", name="u", **ARGS))
    pretrain(work(arm="base", name="b", **{**ARGS, "set": {**SMALL, "weights": "t"}}))
    with engine.connect() as connection:
        rows = connection.execute(
            text("SELECT name, arm, parent_id, path, sha256 FROM model.checkpoint WHERE is_final ORDER BY 1")
        ).all()
    base, trained, untrained = rows
    assert (base.arm, untrained.arm) == ("base", "untrained")
    assert base.parent_id is not None
    settings = work().settings
    files = [load_file(artifacts.fetch(settings, row.path, row.sha256)) for row in rows]
    for name, tensor in files[0].items():
        if name.startswith("encoder."):
            np.testing.assert_array_equal(tensor, files[1][name])
    assert trained.arm == "tte"
