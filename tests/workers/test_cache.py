"""The job `cache`: volumes ahead of training, room checked first, and every mistake a sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from app.errors import InputError, UnknownName
from app.store.work import InlineWork
from tests.workers.small_cohort import SMALL, SmallCohort, insert_cohort
from workers.stages.cache import cache

Work = Callable[..., InlineWork]
ARGS = {"cohort": "chest", "encoder": "tiny", "set": {"shape_zyx": SMALL["shape_zyx"]}}


@pytest.fixture
def cohort(engine: Engine, tmp_path: Path) -> SmallCohort:
    with engine.begin() as connection:
        return insert_cohort(connection, tmp_path / "scans")


def test_volumes_are_made_once_and_the_second_time_says_so(work: Work, cohort: SmallCohort) -> None:
    first, second = cache(work(**ARGS)), cache(work(**ARGS))
    assert (first["num_made"], first["unchanged"]) == (59, False)
    assert (second["num_made"], second["unchanged"]) == (0, True)
    assert first["num_volumes"] == second["num_volumes"] == 59


def test_a_cap_too_small_is_told_before_anything_is_decoded(work: Work, cohort: SmallCohort) -> None:
    made = work(**ARGS)
    made.settings = replace(made.settings, cache_bytes=100_000)
    with pytest.raises(InputError, match=r"59 volumes of 16 × 16 × 16 \(0\.00 GB\), but .*raise LACHESIS_CACHE_SIZE"):
        cache(made)
    assert not list(Path(made.settings.home or "").rglob("*.npy"))


def test_another_folder_is_used_where_one_is_named(work: Work, cohort: SmallCohort, tmp_path: Path) -> None:
    made = work(**ARGS)
    made.settings = replace(made.settings, cache=tmp_path / "big")
    cache(made)
    assert len(list((tmp_path / "big").rglob("*.npy"))) == 59
    assert not list((tmp_path / "home").rglob("*.npy"))


def test_a_cancel_in_the_middle_keeps_what_is_whole_and_the_next_run_goes_on(work: Work, cohort: SmallCohort) -> None:
    made = work(**ARGS)

    def cancel(done: int, total: int | None = None, unit: str = "", note: str = "") -> None:
        if done >= 7:
            raise KeyboardInterrupt

    made.progress = cancel  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        cache(made)
    folder = Path(made.settings.home or "") / "cache"
    assert not list(folder.glob("*/.*"))
    again = cache(work(**ARGS))
    assert 0 < again["num_made"] <= 52
    assert again["num_volumes"] == 59


def test_a_recipe_that_asks_for_masks_does_not_spoil_scans_without(
    work: Work, engine: Engine, cohort: SmallCohort
) -> None:
    with pytest.raises(InputError, match="Expected a mask of the scan"):
        cache(work(**{**ARGS, "set": {**ARGS["set"], "centre": "mask"}}))
    with engine.connect() as connection:
        verdicts = connection.execute(text("SELECT DISTINCT verdict FROM omop.image_occurrence")).scalars().all()
    assert verdicts == ["ok"]


def test_mistakes_are_sentences(work: Work, cohort: SmallCohort) -> None:
    with pytest.raises(UnknownName, match="No cohort named 'chst'\\. Did you mean 'chest'"):
        cache(work(**{**ARGS, "cohort": "chst"}))
    with pytest.raises(InputError, match="Expected one of body, middle, lung, mask for centre, got 'lungs'"):
        cache(work(**{**ARGS, "set": {"centre": "lungs"}}))
    with pytest.raises(InputError, match="No preset of recipes named 'papr'\\. Did you mean 'paper'"):
        cache(work(**{**ARGS, "set": {"recipe": "papr"}}))
