"""The script for accelerators runs, at tiny sizes, on any machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench.gpu import main


@pytest.mark.long
def test_the_script_for_accelerators_makes_every_row_at_tiny_sizes(tmp_path: Path) -> None:
    assert main(["--small", "-o", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    rows = {row["row"]: row["figure"] for row in found["rows"]}
    assert found["small"] is True
    assert {"check-loss", "step-tiny-32", "embed-densenet121-32", "check-resume", "published-run", "profile"} <= set(
        rows
    )
    assert rows["check-loss"] == "ok" and rows["published-run"] > 0
    assert rows["check-chance"] == rows["check-resume"] == 0.0, "on the processor nothing is left to chance"
    assert "aten::" in (tmp_path / "profile.txt").read_text()
    table = (tmp_path / "gpu.md").read_text()
    assert "no measurement" in table.splitlines()[0] and "| check-loss | ok |" in table
