"""The stages `evaluate` and `report` on a store whose truth is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine, text

from app.errors import InputError, UnknownName
from app.settings import Settings
from app.store.work import InlineWork
from tests.workers import judged_store
from workers.stages.evaluate import evaluate
from workers.stages.report import report

WorkFactory = Callable[..., InlineWork]


def rows(engine: Engine, statement: str, **values: Any) -> list[dict[str, Any]]:
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(text(statement), values).mappings()]


def mean(engine: Engine, name: str | None, inputs: str = "image", reference: str | None = None) -> dict[str, Any]:
    (row,) = rows(
        engine,
        """
        SELECT m.* FROM model.metric m LEFT JOIN model.checkpoint c ON c.checkpoint_id = m.checkpoint_id
        LEFT JOIN model.checkpoint r ON r.checkpoint_id = m.reference_checkpoint_id
        WHERE m.metric = 'mean_harrell_c' AND m.head IN ('cox', 'given') AND m.inputs = :inputs AND subgroup IS NULL
          AND c.name IS NOT DISTINCT FROM :name AND r.name IS NOT DISTINCT FROM :reference AND reference_inputs IS NULL
        """,
        name=name,
        inputs=inputs,
        reference=reference,
    )
    return row


@pytest.fixture
def drawn(engine: Engine, settings: Settings) -> judged_store.Judged:
    made = judged_store.draw(900, seed=1)
    judged_store.write(engine, settings, made, simulated=True)
    return made


def test_an_encoder_that_sees_beats_a_blind_one_by_a_paired_interval(
    engine: Engine, drawn: judged_store.Judged, work: WorkFactory, tmp_path: Path
) -> None:
    truth = judged_store.write_truth(tmp_path / "truth.csv", drawn)
    done = evaluate(work(checkpoint="seeing", labels="outcomes", against="blind", truth=str(truth), replicates=200))
    assert (done["tasks"], done["estimable"]) == (3, 2)
    seeing, blind = mean(engine, "seeing"), mean(engine, "blind")
    difference = mean(engine, "seeing", reference="blind")
    assert difference["ci_low"] > 0.05
    assert seeing["value"] - blind["value"] == pytest.approx(difference["value"], abs=1e-12)
    assert blind["ci_low"] < 0.5 < blind["ci_high"] and seeing["arm"] == "tte"
    best = mean(engine, None, "truth")
    assert best["value"] >= seeing["value"] - 0.02 and mean(engine, None, "truth-image")["value"] == best["value"]
    assert abs(mean(engine, None, "voxels")["value"] - 0.5) < 0.12
    assert all("simulated" in row["flags"] for row in rows(engine, "SELECT flags FROM model.metric"))
    assert done["mean_harrell_c_difference"][0] == pytest.approx(difference["value"])


def test_a_task_without_events_has_rows_with_counts_and_a_reason_and_no_value(
    engine: Engine, drawn: judged_store.Judged, work: WorkFactory
) -> None:
    evaluate(work(checkpoint="seeing", labels="outcomes", replicates=100))
    rare = rows(engine, "SELECT * FROM model.metric WHERE task = 'rare'")
    assert rare and all(row["value"] is None and row["ci_low"] is None for row in rare)
    assert {row["reason"].partition(":")[0] for row in rare} == {"too_few_events"}
    assert {row["n"] for row in rare} == {int((drawn.split == 2).sum())}
    everything = rows(engine, "SELECT value, reason, num_events FROM model.metric")
    assert all((row["value"] is None) == (row["reason"] is not None) for row in everything)
    assert not any(row["value"] is not None and np.isnan(row["value"]) for row in everything)


def test_judging_again_replaces_what_was_there(engine: Engine, drawn: judged_store.Judged, work: WorkFactory) -> None:
    evaluate(work(checkpoint="seeing", labels="outcomes", against="blind", replicates=100))
    count = "SELECT count(*) AS n FROM model.metric UNION ALL SELECT count(*) FROM model.prediction"
    before = rows(engine, count)
    values = (
        "SELECT task, metric, head, inputs, horizon_days, value, ci_low FROM model.metric ORDER BY 1, 2, 3, 4, 5, 6"
    )
    first = rows(engine, values)
    evaluate(work(checkpoint="seeing", labels="outcomes", against="blind", replicates=100))
    assert rows(engine, count) == before and before[1]["n"] > 1000
    assert rows(engine, values) == first
    evaluate(work(checkpoint="seeing", labels="outcomes", replicates=100, top=1))
    assert {row["task"] for row in rows(engine, "SELECT task FROM model.metric WHERE arm = 'untrained'")} > {"rare"}
    kept = (
        "SELECT DISTINCT task FROM model.metric "
        "WHERE arm = 'tte' AND task IS NOT NULL AND reference_checkpoint_id IS NULL"
    )
    assert len(rows(engine, kept)) == 1


def test_predictions_are_of_held_out_members_and_order_as_the_metric_says(
    engine: Engine, drawn: judged_store.Judged, work: WorkFactory
) -> None:
    from sksurv.metrics import concordance_index_censored

    evaluate(work(checkpoint="seeing", labels="outcomes", replicates=100))
    found = rows(
        engine,
        "SELECT cohort_member_id, p.value, m.split "
        "FROM model.prediction p JOIN label.cohort_member m USING (cohort_member_id) "
        "WHERE p.position = 0 AND p.head = 'cox' AND p.inputs = 'image' AND p.kind = 'risk_score' ORDER BY 1",
    )
    assert {row["split"] for row in found} == {"held_out"} and len(found) == int((drawn.split == 2).sum())
    row = np.array([f["cohort_member_id"] for f in found]) - 1
    theirs = concordance_index_censored(drawn.event[row, 0], drawn.time[row, 0], np.array([f["value"] for f in found]))[
        0
    ]
    (ours,) = rows(
        engine,
        "SELECT value FROM model.metric "
        "WHERE task = 'heart' AND metric = 'harrell_c' AND inputs = 'image' AND arm = 'tte'",
    )
    assert ours["value"] == pytest.approx(theirs, abs=1e-6)


def test_shared_volumes_and_arbitrary_pairing_stand_on_every_row_and_section(
    engine: Engine, settings: Settings, work: WorkFactory
) -> None:
    judged_store.write(engine, settings, judged_store.draw(600, seed=2), arbitrary=True, shared=599)
    evaluate(work(checkpoint="seeing", labels="outcomes", replicates=100))
    for row in rows(engine, "SELECT flags, shared_volumes FROM model.metric"):
        assert {"arbitrary_pairing", "shared_volumes"} <= set(row["flags"]) and row["shared_volumes"] == 599
    done = report(work(labels=None, name="pairs"))
    page = Path(done["file"]).read_text()
    assert page.count("not an evaluation") >= page.count("<h3>") and "arbitrar" in page
    assert any("shared_volumes = 599" in note for note in done["notes"])


def test_one_scan_a_person_is_judged_beside_all_scans(engine: Engine, settings: Settings, work: WorkFactory) -> None:
    judged_store.write(engine, settings, judged_store.draw(1800, seed=3, copies=2))
    evaluate(work(checkpoint="seeing", labels="outcomes", replicates=100))
    one = rows(engine, "SELECT * FROM model.metric WHERE subgroup = 'one_scan_a_person' AND task = 'heart'")
    every = rows(
        engine, "SELECT * FROM model.metric WHERE subgroup IS NULL AND metric = 'harrell_c' AND task = 'heart'"
    )
    assert {row["n"] * 2 for row in one} == {row["n"] for row in every}
    assert all(row["n"] == row["num_persons"] for row in one)


def test_the_report_is_one_file_that_says_what_it_is(
    engine: Engine, drawn: judged_store.Judged, work: WorkFactory, settings: Settings, tmp_path: Path
) -> None:
    truth = judged_store.write_truth(tmp_path / "truth.csv", drawn)
    evaluate(work(checkpoint="seeing", labels="outcomes", against="blind", truth=str(truth), replicates=100))
    output = tmp_path / "deep" / "page.html"
    with engine.begin() as connection:
        connection.execute(text("UPDATE model.embedding_set SET num_failed = 7"))
    done = report(work(labels="outcomes", output=str(output)))
    page = output.read_text()
    assert "outcomes: 7 scans could not be read and were left out." in done["notes"]
    assert "7 of these scans could not be read as volumes" in page
    assert done["file"] == str(output) and "simulated" in page and "Not a medical device" in page
    assert page.count("<svg") >= 5 and "<script" not in page and "<link" not in page and "<img" not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert [line["inputs"] for line in done["summary"]] == [
        "image, blind", "image, seeing", "difference, seeing − blind", "voxels: mean and SD", "age + sex",
        "true hazard, as far as the image shows", "true hazard",
    ]  # fmt: skip
    (row,) = rows(engine, "SELECT * FROM model.report")
    assert (Path(str(settings.home)) / "artifacts" / row["path"]).read_text() == page and row["report_id"] == done[
        "report_id"
    ]


def test_a_name_trained_anew_keeps_the_older_numbers_apart(
    engine: Engine, settings: Settings, drawn: judged_store.Judged, work: WorkFactory
) -> None:
    evaluate(work(checkpoint="seeing", labels="outcomes", replicates=100))
    (older,) = rows(engine, "SELECT checkpoint_id FROM model.checkpoint WHERE name = 'seeing'")
    with engine.begin() as connection:
        judged_store.add_embedding(connection, settings, drawn, "seeing", "mtl", 0, None)
    evaluate(work(checkpoint="seeing", labels="outcomes", replicates=100))
    shown = {line["inputs"]: float(line["mean C"]) for line in report(work(labels="outcomes"))["summary"]}
    assert shown[f"image, seeing (checkpoint {older['checkpoint_id']})"] > 0.6 > shown["image, seeing"]


def test_what_is_missing_is_said_in_one_sentence(
    engine: Engine, drawn: judged_store.Judged, work: WorkFactory, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="evaluated, found none"):
        report(work(labels=None))
    assert "not judged" in Path(report(work(labels="outcomes"))["file"]).read_text()
    with pytest.raises(UnknownName, match="Did you mean 'seeing'"):
        evaluate(work(checkpoint="seein", labels="outcomes"))
    with pytest.raises(InputError, match="twice"):
        evaluate(work(checkpoint="seeing", labels="outcomes", against="seeing"))
    some = judged_store.write_truth(tmp_path / "truth.csv", drawn)
    some.write_text("\n".join(some.read_text().splitlines()[:-5]))
    with pytest.raises(InputError, match=r"of each of 900 scans, \d+ have none"):
        evaluate(work(checkpoint="seeing", labels="outcomes", truth=str(some)))
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM model.embedding_set"))
    with pytest.raises(InputError, match="lachesis embed seeing --cohort c"):
        evaluate(work(checkpoint="seeing", labels="outcomes"))
