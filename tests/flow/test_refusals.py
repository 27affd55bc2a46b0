"""Wrong input, from outside: one sentence, exit 2, and no row changed."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from tests.flow.conftest import Shell
from tests.flow.extract import STROKE, write_csv, write_extract, write_scans

COUNTS = """
SELECT (SELECT count(*) FROM omop.person) AS persons, (SELECT count(*) FROM omop.event) AS events,
       (SELECT count(*) FROM omop.image_occurrence) AS scans, (SELECT count(*) FROM label.task) AS tasks,
       (SELECT count(*) FROM omop.timeline) AS timelines
"""


@pytest.fixture(scope="module")
def loaded(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with six persons, their scans and a cohort `all`; the folder of its files."""
    folder = tmp_path_factory.mktemp("extract")
    shell.do("load", "omop", write_extract(folder / "omop"))
    shell.do("load", "images", write_scans(folder / "scans"))
    shell.do("cohort", "all")
    return folder


def refuse(shell: Shell, *words: object) -> str:
    """Run a command that must exit 2 with one sentence and change nothing outside `ops`; the sentence."""
    before = shell.rows(COUNTS)
    done = shell.run(*words)
    assert done.returncode == 2, f"exit {done.returncode}: {done.stderr}"
    lines = [line for line in done.stderr.splitlines() if line.startswith("lachesis: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert shell.rows(COUNTS) == before
    return lines[0]


def test_a_truncated_gzip_is_refused_by_name(shell: Shell, loaded: Path, tmp_path: Path) -> None:
    extract = write_extract(tmp_path / "broken", persons=500)
    packed = gzip.compress((extract / "condition_occurrence.csv").read_bytes())
    (extract / "condition_occurrence.csv").unlink()
    (extract / "condition_occurrence.csv.gz").write_bytes(packed[: len(packed) // 2])
    assert "condition_occurrence.csv.gz" in refuse(shell, "load", "omop", extract)


def test_a_folder_without_person_is_refused(shell: Shell, loaded: Path, tmp_path: Path) -> None:
    extract = write_extract(tmp_path / "headless")
    (extract / "person.csv").unlink()
    assert "person" in refuse(shell, "load", "omop", extract).lower()


def test_an_unknown_task_name_suggests_the_nearest(shell: Shell, loaded: Path) -> None:
    assert "mortality" in refuse(shell, "tasks", "t", "--cohort", "all", "--task", "mortalty")


def test_an_unknown_cohort_suggests_the_nearest(shell: Shell, loaded: Path) -> None:
    assert "'all'" in refuse(shell, "tasks", "t", "--cohort", "al", "--size", 4)


def test_a_task_file_with_an_unknown_field_names_line_and_field(shell: Shell, loaded: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    file.write_text(f'name = "stroke"\nconcepts = [{STROKE}]\nhorizon_days = [365]\n')
    message = refuse(shell, "tasks", "t", "--cohort", "all", "--file", file)
    assert "t.toml" in message and "horizon_days" in message and "3" in message


def test_a_missing_folder_is_refused(shell: Shell, loaded: Path, tmp_path: Path) -> None:
    refuse(shell, "load", "omop", tmp_path / "nothing")


def test_a_manifest_with_a_missing_file_and_an_unknown_person_loads_the_rest(
    shell: Shell, loaded: Path, tmp_path: Path
) -> None:
    manifest = write_scans(tmp_path / "scans", persons=3)
    rows: list[dict[str, object]] = [
        {"person_id": 1, "acquired_at": "2020-03-02 12:00:00", "path": "1.nii.gz"},
        {"person_id": 2, "acquired_at": "2020-03-02 12:00:00", "path": "gone.nii.gz"},
        {"person_id": 99, "acquired_at": "2020-03-02 12:00:00", "path": "3.nii.gz"},
    ]
    write_csv(manifest, rows)
    shell.do("load", "images", manifest, "--source", "second")
    rejects = shell.rows("SELECT record, rule FROM ops.reject WHERE table_name = 'image_occurrence' ORDER BY record")
    assert [row["record"] for row in rejects] == [2, 3]
    assert shell.value("SELECT count(*) FROM omop.image_occurrence WHERE acquired_at > '2020-03-02'") == 1


def test_a_command_without_a_store_exits_4(tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    environment = {k: v for k, v in os.environ.items() if not k.startswith("LACHESIS_")}
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", "ls", "loads"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 4 and "no store here" in done.stderr
    assert not list(tmp_path.iterdir())
