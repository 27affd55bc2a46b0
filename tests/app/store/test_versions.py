"""Versions of names: what `ls` and `show` say of older ones."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine

from app.store import listing, stale
from tests.migrations.rows import add_labels


def test_show_takes_a_name_with_a_version_wherever_names_have_versions(engine: Engine) -> None:
    with engine.begin() as connection:
        add_labels(connection)
        for kind, newest, older in (("cohort", "chest@1", "chest@9"), ("task", "clinical@1", "clinical@2")):
            found = listing.KINDS[kind]
            assert listing.details(connection, found.one, newest)[0]["version"] == 1
            assert listing.details(connection, found.one, older) == []
        one = listing.LABEL.one
        said = [listing.details(connection, one, name)[0] for name in ("outcomes", "outcomes@2", "outcomes@1")]
        assert [(row["version"], row["current"], row["cohort"]) for row in said] == [
            (2, True, "chest@1"),
            (2, True, "chest@1"),
            (1, False, "chest@1"),
        ]


@pytest.mark.parametrize("kind", ["cohort", "task", "label"])
def test_all_versions_are_listed_with_what_rests_on_them(engine: Engine, kind: str) -> None:
    with engine.begin() as connection:
        add_labels(connection)
        found = listing.listing(connection, listing.KINDS[kind], 10, versions=True)
        shown = listing.listing(connection, listing.KINDS[kind], 10)
    assert len(shown) == 1 and len(found) == (2 if kind == "label" else 1)
    if kind == "label":
        assert [(row["version"], row["current"], row["checkpoints"]) for row in found] == [(2, True, 0), (1, False, 0)]
    else:
        assert found[0]["labels"] == "outcomes@1, outcomes@2"


def test_only_the_current_version_is_called_stale_or_not(engine: Engine) -> None:
    with engine.begin() as connection:
        add_labels(connection)  # made by hand, without digests: nobody knows, so it counts as stale
        found = stale.add_stale(connection, "label", listing.listing(connection, listing.LABEL, 10, versions=True))
    assert [(row["version"], row["stale"]) for row in found] == [(2, True), (1, None)]
