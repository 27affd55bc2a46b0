"""Neighbours among chosen scans, what became of them, their picture; embeddings that are taken over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine, text

from app.errors import InputError, UnknownName
from app.store import similar
from app.store.similar import Among, incidence, nearest, outcomes
from app.store.work import InlineWork
from tests.workers.small_cohort import SMALL, SmallCohort, insert_cohort
from workers.stages.embed import embed
from workers.stages.pretrain import pretrain
from workers.stages.slices import slices

Work = Callable[..., InlineWork]


@pytest.fixture
def cohort(engine: Engine, tmp_path: Path, work: Work) -> SmallCohort:
    """Sixty embedded scans, of men (even) and women born so that the n-th is n years old at the scan."""
    with engine.begin() as connection:
        made = insert_cohort(connection, tmp_path / "scans")
        connection.execute(
            text(
                "UPDATE omop.person p SET gender_concept_id = CASE WHEN r.n % 2 = 0 THEN 8507 ELSE 8532 END, "
                "birth_time = TIMESTAMP '2020-01-01' - r.n * interval '1 year' FROM ("
                "SELECT i.person_id, row_number() OVER (ORDER BY i.image_occurrence_id) - 1 AS n "
                "FROM omop.image_occurrence i) r WHERE p.person_id = r.person_id"
            )
        )
        connection.execute(
            text(
                "UPDATE omop.image_occurrence i SET verdict = 'suspect' FROM (SELECT image_occurrence_id, row_number() "
                "OVER (ORDER BY image_occurrence_id) - 1 AS n FROM omop.image_occurrence) r "
                "WHERE r.image_occurrence_id = i.image_occurrence_id AND r.n % 4 = 0"
            )
        )
    pretrain(work(arm="base", encoder="tiny", labels="outcomes", name="u", seed=0, set=SMALL))
    embed(work(checkpoint="u", cohort="chest"))
    return made


def exact(engine: Engine, image: int, keep: Callable[[int], bool], images: list[int]) -> list[int]:
    """The five nearest by comparing all."""
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT image_occurrence_id, embedding::text FROM model.embedding")).all()
    vectors = {i: np.array([float(x) for x in v.strip("[]").split(",")]) for i, v in rows}
    unit = {i: v / np.linalg.norm(v) for i, v in vectors.items()}
    some = [i for n, i in enumerate(images) if i != image and keep(n)]
    return sorted(some, key=lambda i: (round(1 - float(unit[i] @ unit[image]), 9), i))[:5]


@pytest.mark.parametrize(
    ("among", "keep"),
    [
        (Among(split="held_out"), lambda n: n % 10 > 7),
        (Among(cohort="chest", split="train"), lambda n: n % 10 < 7),
        (Among(sex="female"), lambda n: n % 2 == 1),
        (Among(min_age=20, max_age=29), lambda n: 20 <= n <= 29),
        (Among(verdict="suspect"), lambda n: n % 4 == 0),
        (Among(sex="male", min_age=10, split="tuning"), lambda n: n % 2 == 0 and n >= 10 and n % 10 == 7),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_neighbours_among_chosen_scans_are_the_nearest_of_them(
    engine: Engine, cohort: SmallCohort, among: Among, keep: Callable[[int], bool]
) -> None:
    with engine.connect() as connection:
        rows = nearest(connection, cohort.images[3], "u", 5, among)
    assert [row["image_occurrence_id"] for row in rows] == exact(engine, cohort.images[3], keep, cohort.images)


def test_a_question_nobody_can_answer_is_one_sentence(engine: Engine, cohort: SmallCohort) -> None:
    with engine.connect() as connection:
        for among, words in (
            (Among(cohort="chst"), "found none called 'chst'"),
            (Among(verdict="okay"), "Expected ok, suspect or unusable as verdict, found 'okay'"),
            (Among(split="heldout"), "Expected train, tuning or held_out as split, found 'heldout'"),
        ):
            with pytest.raises(InputError, match=words):
                nearest(connection, cohort.images[3], "u", 5, among)
            connection.rollback()
        for labels, task, error in (("outcomes", "mortality", UnknownName), ("outcoms", "a", InputError)):
            with pytest.raises(error, match=r"'mortality'|'outcoms'"):
                outcomes(connection, [], labels, task, 365)
            connection.rollback()
        with pytest.raises(UnknownName, match=r"No checkpoint named 'uu'\. Did you mean 'u'"):
            nearest(connection, cohort.images[3], "uu", 5, Among())
        with pytest.raises(UnknownName, match="Did you mean 'male'"):
            nearest(connection, cohort.images[3], "u", 5, Among(sex="mael"))


def test_what_became_of_neighbours_is_told_of_eleven_persons_or_more(engine: Engine, cohort: SmallCohort) -> None:
    with engine.connect() as connection:
        few = nearest(connection, cohort.images[3], "u", 10, Among())
        told = outcomes(connection, few, "outcomes", "a", 365)
        assert told["persons"] <= 10 and told["events"] is None and told["incidence"] is None
        assert "status" not in few[0]
        many = nearest(connection, cohort.images[3], "u", 40, Among())
        told = outcomes(connection, many, "outcomes", "a", 3650)
        assert told["persons"] > 30
        events = [row for row in many if row["status"] == "event" and row["time_days"] <= 3650]
        assert told["events"] == len(events) > 0
        assert 0 < told["incidence"] <= 1


def test_the_incidence_of_neighbours_is_that_of_lifelines() -> None:
    from lifelines import AalenJohansenFitter

    rng = np.random.default_rng(0)
    time, status = rng.exponential(400, 60), rng.choice(["event", "competing", "censored"], 60)
    codes = np.select([status == "event", status == "competing"], [1, 2], 0)
    fitted = AalenJohansenFitter(calculate_variance=False).fit(time, codes, event_of_interest=1)
    wanted = float(fitted.cumulative_density_.loc[:365].iloc[-1, 0])
    assert incidence(list(zip(time.tolist(), status.tolist(), strict=True)), 365) == pytest.approx(wanted, abs=1e-9)
    assert similar.FEWEST_PERSONS == 11


def test_volumes_that_were_embedded_for_another_cohort_are_not_embedded_again(
    engine: Engine, cohort: SmallCohort, work: Work
) -> None:
    columns = "definition, attrition, follow_up, digest"
    with engine.begin() as connection:
        connection.execute(
            text(
                f"INSERT INTO label.cohort (name, version, is_current, {columns}) "
                f"SELECT 'other', 1, true, {columns} FROM label.cohort"
            )
        )
        connection.execute(
            text(
                "INSERT INTO label.cohort_member (cohort_id, person_id, image_occurrence_id, index_time, "
                "index_date_only, follow_up_end, split, eligible) SELECT o.cohort_id, person_id, image_occurrence_id, "
                "index_time, index_date_only, follow_up_end, m.split, m.eligible FROM label.cohort_member m, "
                "label.cohort o WHERE o.name = 'other'"
            )
        )
    before: dict[str, Any] = {}
    with engine.connect() as connection:
        statement = text("SELECT image_occurrence_id, embedding::text FROM model.embedding")
        before.update({str(i): v for i, v in connection.execute(statement)})
    result = embed(work(checkpoint="u", cohort="other"))
    assert (result["num_scans"], result["newly_embedded"]) == (60, 0)
    with engine.connect() as connection:
        after = {str(i): v for i, v in connection.execute(statement)}
        recall = connection.execute(text("SELECT DISTINCT recall FROM model.embedding_set")).scalars().all()
    assert after == before
    assert recall == [1.0], "sixty scans are found by any index"


def test_a_picture_of_slices_shows_the_scans_that_can_be_read(cohort: SmallCohort, work: Work, tmp_path: Path) -> None:
    from matplotlib.image import imread

    (cohort.folder / "4.nii").unlink()
    for cached in (work().settings.home / "cache").rglob("*"):  # type: ignore[operator]
        if cached.is_file():
            cached.unlink()
    shown = [{"image": cohort.images[n], "title": f"scan {n}"} for n in (3, 4, 5)]
    made = slices(work(checkpoint="u", shown=shown, out=str(tmp_path / "s.png")))
    assert (made["drawn"], made["num_failed"]) == (2, 1)
    pixels = imread(tmp_path / "s.png")
    assert pixels.shape[0] > 300 and 0.02 < pixels[..., 0].mean() < 0.98


def test_an_embedding_stopped_in_the_middle_goes_on_where_it_was(
    engine: Engine, cohort: SmallCohort, work: Work
) -> None:
    statement = text("SELECT image_occurrence_id, embedding::text FROM model.embedding ORDER BY 1")
    with engine.begin() as connection:
        before = connection.execute(statement).all()
        for table in ("embedding_set", "embedded_scan", "embedding"):
            connection.execute(text(f"DELETE FROM model.{table}"))

    class Stopped(Exception):
        pass

    def stop(done: int, total: int | None = None, unit: str = "", note: str = "") -> None:
        if note == "embedding" and done >= 40:
            raise Stopped

    interrupted = work(checkpoint="u", cohort="chest")
    interrupted.progress = stop  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        embed(interrupted)
    with engine.connect() as connection:
        assert connection.execute(statement).all() == [], "nothing is seen of half an embedding"
    (left,) = interrupted.folder.glob("*.part")
    with left.open("ab") as file:
        file.write(b"torn")
    result = embed(work(checkpoint="u", cohort="chest"))
    assert (result["resumed"], result["newly_embedded"], result["distinct_volumes"]) == (40, 19, 59)
    with engine.connect() as connection:
        assert connection.execute(statement).all() == before
    assert not left.exists()


def test_the_title_of_a_slice_tells_an_outcome_only_where_the_rows_do() -> None:
    from app.cli.similar import title

    row = {"image_occurrence_id": 7, "distance": 0.25}
    assert title(row) == "scan 7: 0.250"
    assert title(row | {"status": "event", "time_days": 41.6}) == "scan 7: 0.250\nevent, day 42"
    assert title(row | {"status": "ineligible", "time_days": None}) == "scan 7: 0.250\nineligible"
