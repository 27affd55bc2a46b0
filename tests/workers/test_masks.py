"""Masks of scans on their way from the store to vectors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from sqlalchemy import Engine, text

from app.errors import InputError
from app.store.work import InlineWork
from tests.workers.small_cohort import SIDE, SMALL, SmallCohort, insert_cohort
from tests.workers.test_pretrain import ARGS
from workers.bridge import read_scans
from workers.stages.embed import embed
from workers.stages.pretrain import pretrain

Work = Callable[..., InlineWork]


@pytest.fixture
def cohort(engine: Engine, tmp_path: Path) -> SmallCohort:
    with engine.begin() as connection:
        return insert_cohort(connection, tmp_path / "scans", persons=30)


def save_mask(folder: Path, name: str, low: int) -> None:
    marked = np.zeros((SIDE,) * 3, np.uint8)
    marked[low : low + 5, 4:9, 4:9] = 1
    nibabel.save(nibabel.Nifti1Image(marked, np.diag([9.0, 9.0, 9.0, 1.0])), folder / name)


def give(engine: Engine, images: list[int], mask: str) -> None:
    with engine.begin() as connection:
        connection.execute(
            text("UPDATE omop.image_occurrence SET details = :d WHERE image_occurrence_id = ANY(:i)"),
            {"d": json.dumps({"mask": mask}), "i": images},
        )


def vectors(engine: Engine) -> dict[int, str]:
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT image_occurrence_id, embedding::text FROM model.embedding"))
        return dict(rows.tuples().all())


def test_equal_scans_with_other_masks_have_vectors_of_their_own_and_a_changed_mask_a_new_one(
    work: Work, engine: Engine, cohort: SmallCohort
) -> None:
    save_mask(cohort.folder, "one.nii", 3)
    save_mask(cohort.folder, "two.nii", 7)
    give(engine, cohort.images, "one.nii")
    give(engine, cohort.images[-1:], "two.nii")  # the last two are of one file
    settings = {**SMALL, "grid": "stretch", "crop": "mask"}
    pretrain(work(arm="base", name="u", **{**ARGS, "set": settings}))
    first = embed(work(checkpoint="u", cohort="chest"))
    assert (first["num_scans"], first["distinct_volumes"], first["shared_volumes"]) == (30, 30, 2)
    before = vectors(engine)
    assert before[cohort.images[-1]] != before[cohort.images[-2]]
    again = embed(work(checkpoint="u", cohort="chest"))
    assert again["newly_embedded"] == 0
    assert vectors(engine) == before
    give(engine, cohort.images[:1], "two.nii")
    third = embed(work(checkpoint="u", cohort="chest"))
    assert third["newly_embedded"] == 1
    changed = vectors(engine)
    assert {image for image in before if changed[image] != before[image]} == {cohort.images[0]}


def test_a_mask_that_leaves_its_root_is_not_followed(work: Work, engine: Engine, cohort: SmallCohort) -> None:
    give(engine, cohort.images[:1], "../mask.nii")
    with engine.connect() as connection, pytest.raises(InputError, match="Expected scans inside their root"):
        read_scans(connection, work().settings, cohort.cohort_id)
