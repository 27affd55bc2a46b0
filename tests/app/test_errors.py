"""What a wrong word or file is answered with."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.cli.servers import read_statement
from app.errors import InputError, UnknownName


def test_a_name_with_several_versions_is_listed_once() -> None:
    assert str(UnknownName("cohort", "zz", ["demo", "demo", "adults"])).endswith("Known: adults, demo.")


def test_a_statement_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"could not read it: No such file or directory\.$"):
        read_statement(None, tmp_path / "none.sql")
    (tmp_path / "latin.sql").write_bytes(b"SELECT '\xe9'")
    with pytest.raises(InputError, match="it is not UTF-8 text"):
        read_statement(None, tmp_path / "latin.sql")
