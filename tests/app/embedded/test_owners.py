"""Whose store a home is."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from app.embedded import Store, psql_command
from app.embedded.home import PRIVATE_FOLDERS, Place, refuse_root
from app.errors import StoreError
from app.settings import Settings


def test_root_queues_no_jobs_in_the_store_of_an_ordinary_user(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may touch the store of another user")
    nobody = pwd.getpwnam("nobody")
    with pytest.raises(StoreError, match="belongs to nobody; run its jobs as nobody, not as root"):
        refuse_root(Place(home=tmp_path, servers=tmp_path, uid=nobody.pw_uid, gid=nobody.pw_gid))
    refuse_root(Place(home=tmp_path, servers=tmp_path, uid=0, gid=0))


def test_a_url_that_psql_cannot_read_is_refused_without_its_password() -> None:
    with pytest.raises(StoreError) as refused:
        psql_command(Settings(home=None, database_url="postgresql://me:hu%sh@db/store"))
    assert "hu%sh" not in str(refused.value)


def test_only_their_owner_reads_volumes_checkpoints_and_logs(store: Store) -> None:
    assert store.settings.home is not None
    for name in PRIVATE_FOLDERS:
        assert (store.settings.home / name).stat().st_mode & 0o777 == 0o700
