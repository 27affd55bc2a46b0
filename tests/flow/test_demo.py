"""The main job, end to end, by one command: on a simulated cohort and on real input."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.flow.conftest import Shell

MEAN = """
SELECT m.value, m.ci_low, m.ci_high FROM model.metric m JOIN label.label_set s USING (label_set_id)
JOIN model.checkpoint c ON c.checkpoint_id = m.checkpoint_id
LEFT JOIN model.checkpoint r ON r.checkpoint_id = m.reference_checkpoint_id
WHERE s.name = 'outcomes' AND s.is_current AND m.metric = 'mean_harrell_c' AND m.inputs = 'image' AND m.head = 'cox'
  AND m.split = 'held_out' AND m.subgroup IS NULL AND m.reference_inputs IS NULL
  AND c.name = :name AND r.name IS NOT DISTINCT FROM :minus
ORDER BY m.metric_id DESC LIMIT 1
"""


def report_of(output: str) -> Path:
    """The report's path, as the demo prints it."""
    found = re.search(r"^Report: (.+)$", output, re.MULTILINE)
    assert found, output
    return Path(found[1].strip())


@pytest.fixture(scope="module")
def small(shell: Shell) -> str:
    """What a small demo prints."""
    return shell.do("demo", "--persons", 240, "--size", 12, "--set", "epochs=1")


def test_a_small_demo_ends_with_a_page_that_needs_nothing_else(small: str) -> None:
    page = report_of(small).read_text()
    assert "simulated" in page.lower()
    assert "<script src" not in page and "<link" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_every_stage_of_a_demo_is_a_job_of_another_process(shell: Shell, small: str) -> None:
    kinds = shell.rows("SELECT DISTINCT kind FROM ops.job")
    assert {row["kind"] for row in kinds} == {
        "load", "cohort", "tasks", "label", "pretrain", "embed", "evaluate", "report",
    }  # fmt: skip
    assert {row["state"] for row in shell.rows("SELECT state FROM ops.job")} == {"succeeded"}
    attempts = shell.rows("SELECT j.kind, a.pid, a.outcome FROM ops.job_attempt a JOIN ops.job j USING (job_id)")
    assert all(row["outcome"] == "succeeded" and row["pid"] != os.getpid() for row in attempts)
    children = [row["pid"] for row in attempts if row["kind"] in ("pretrain", "embed", "evaluate")]
    assert len(set(children)) == len(children) == 5


def test_the_queries_that_the_demo_prints_work(shell: Shell, small: str) -> None:
    queries = re.findall(r' sql "(.+)"$', small, re.MULTILINE)
    assert len(queries) == 3
    for query in queries:
        assert len(shell.do("sql", query, "--csv").splitlines()) > 1, query


@pytest.mark.long
def test_volumes_permuted_among_persons_before_training_teach_nothing(shell: Shell) -> None:
    shell.do("demo", "--seed", 0, seconds=900)
    shell.do(
        "pretrain", "tte", "--encoder", "tiny", "--labels", "pretraining", "--name", "permuted", "--shuffle-volumes",
        seconds=600,
    )  # fmt: skip
    shell.do("embed", "permuted", "--cohort", "demo")
    shell.do("evaluate", "permuted", "--labels", "outcomes")
    (row,) = shell.rows(MEAN, name="permuted", minus=None)
    assert row["ci_low"] <= 0.5 <= row["ci_high"] and abs(row["value"] - 0.5) <= 0.05, row


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pretraining_beats_an_untrained_encoder_on_the_simulated_cohort(shell: Shell, seed: int) -> None:
    shell.do("demo", "--seed", seed, seconds=900)
    (row,) = shell.rows(MEAN, name=f"tiny-tte-s{seed}", minus=f"tiny-untrained-s{seed}")
    assert row["ci_low"] > 0, row
    (base,) = shell.rows(MEAN, name=f"tiny-untrained-s{seed}", minus=None)
    (trained,) = shell.rows(MEAN, name=f"tiny-tte-s{seed}", minus=None)
    assert trained["value"] - base["value"] == pytest.approx(row["value"], abs=1e-6)


@pytest.mark.long
def test_the_demo_runs_on_a_real_extract_and_real_volumes(shell: Shell, real_data: Path) -> None:
    extract = real_data / "omop_gibleed_broadsea_5.3"
    output = shell.do(
        "demo", "--omop", extract, "--images", real_data / "manifest_gibleed_celecoxib.csv", "--arbitrary-pairing",
        seconds=900,
    )  # fmt: skip
    page = report_of(output).read_text()
    assert "arbitrar" in page and "not an evaluation" in page
    assert shell.value("SELECT count(*) FROM omop.person") == 2694
    shown = "SELECT count(*) FROM omop.image_occurrence WHERE NOT 'gone_from_source' = ANY(reasons)"
    assert shell.value(shown) == 1844
    assert shell.value("SELECT max(shared_volumes) FROM model.embedding_set") > 1000
    assert shell.value("SELECT count(*) FROM model.metric WHERE value IS NULL AND reason IS NULL") == 0
    before = shell.rows("SELECT load_id, state FROM ops.load ORDER BY load_id")
    shell.do("load", "omop", extract, "--source", "demo")
    assert shell.rows("SELECT load_id, state FROM ops.load ORDER BY load_id") == before
