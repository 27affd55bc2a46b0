"""A home: where an embedded store's files lie, who its servers run as, and its lock."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pwd
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.errors import StoreError
from app.settings import Settings

SYSTEM_USER = "lachesis"
SYSTEM_FOLDER = Path("/var/lib/lachesis")
PRIVATE_FOLDERS = ("artifacts", "cache", "demo", "log", "runs", "workers")
LONGEST_SOCKET = 100
"""Bytes; the kernel takes 107, and a client may append to it."""
LOCK_SECONDS = 180.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where one home's servers keep their files, and the system user they run as."""

    home: Path
    servers: Path
    """Holds postgres/, redis/ and sock/; the home itself unless its servers cannot reach it."""
    uid: int
    gid: int

    @property
    def sock(self) -> Path:
        return self.servers / "sock"

    @property
    def postgres(self) -> Path:
        return self.servers / "postgres"

    @property
    def redis(self) -> Path:
        return self.servers / "redis"

    @property
    def as_server(self) -> dict[str, Any]:
        """Arguments of subprocess that run a command as the servers' user, untied from this process."""
        arguments: dict[str, Any] = {"env": server_environment(), "cwd": "/", "start_new_session": True}
        if self.uid != os.geteuid():
            arguments |= {"user": self.uid, "group": self.gid, "extra_groups": []}
        return arguments


def server_environment() -> dict[str, str]:
    """A server's environment: no PGPORT, no locale and no secret of whoever happens to start it."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "TMPDIR", "LD_LIBRARY_PATH")}
    return {**kept, "LC_ALL": "C", "TZ": "UTC"}


def say(message: str) -> None:
    """One line for whoever waits at the terminal; stdout stays free for results."""
    print(f"lachesis: {message}", file=sys.stderr, flush=True)


def existing(settings: Settings) -> Place | None:
    """The place of the store that is here, or None."""
    home = settings.home
    if home is None:
        return None
    try:
        servers = _pointer(home)
        data = servers / "postgres" / "data"
        owner = data.stat()
    except FileNotFoundError:
        return None
    except PermissionError:
        raise StoreError(
            f"The store in {home} belongs to another user; ask its owner, or give a home of yours."
        ) from None
    if not (data / "PG_VERSION").is_file():
        return None
    place = Place(home=home, servers=servers, uid=owner.st_uid, gid=owner.st_gid)
    if os.geteuid() not in (0, place.uid):
        raise StoreError(f"The store in {home} belongs to {_user_name(place.uid)}; run as that user or as root.")
    return place


def no_store(settings: Settings) -> StoreError:
    """What a command says that needs a store where there is none."""
    where = settings.home or Path.cwd()
    return StoreError(
        f"There is no store here ({where}); `lachesis up` creates one, LACHESIS_HOME names one elsewhere."
    )


def prepare(settings: Settings) -> Path:
    """Make the folder of a new store's home, so that it can be locked.

    Raises:
        StoreError: the home is a file, its path too long, or its folder cannot be made.
    """
    home = settings.home_to_be
    try:
        if home.exists() and not home.is_dir():
            raise StoreError(f"Expected a folder for the store, {home} is a file; give LACHESIS_HOME another path.")
        check_socket_path(home / "sock")
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"No store can be made in {home}: {error.strerror} ({error.filename}).") from error
    return home


def create(home: Path) -> Place:
    """Make the folders of a new store in a prepared home. The caller holds its lock.

    Raises:
        StoreError: somebody else's files are in the way, or a folder cannot be made.
    """
    try:
        place = _create_as_root(home) if os.geteuid() == 0 else _own(home)
        _refuse_foreign(place)
        for folder in (place.postgres, place.redis, place.sock):
            _make_private(folder, place)
    except OSError as error:
        raise StoreError(f"No store can be made in {home}: {error.strerror} ({error.filename}).") from error
    return place


def check_socket_path(sock: Path) -> None:
    """Refuse a folder whose sockets the kernel or libpq cannot name."""
    path = str(sock / ".s.PGSQL.5432")
    size = len(os.fsencode(path))
    if size > LONGEST_SOCKET:
        raise StoreError(
            f"The socket path {path} has {size} bytes, {LONGEST_SOCKET} are possible; choose a shorter LACHESIS_HOME."
        )
    if any(character in path for character in ',"\n\\'):
        raise StoreError(
            f"The socket path {path!r} holds a comma, quote, backslash or line end; use another LACHESIS_HOME."
        )


def secure(place: Place) -> None:
    """Give a place's folders their modes again, and the socket folder back after a clean-up of it."""
    try:
        if os.geteuid() == 0 and place.servers == place.home:
            _open_for_passage(place.home)
        for folder in (place.postgres, place.redis, place.sock):
            _make_private(folder, place)
        _keep_files_private(place.home)
    except OSError as error:
        raise StoreError(f"The store in {place.home} cannot be used: {error.strerror} ({error.filename}).") from error


@contextmanager
def lock(home: Path, *, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Hold HOME/lock: one process at a time starts, stops or creates servers and workers. Not reentrant."""
    descriptor = _open_lock(home)
    deadline = time.monotonic() + seconds
    try:
        while not _try_lock(descriptor):
            if time.monotonic() > deadline:
                raise StoreError(
                    f"Another process holds {home / 'lock'} for over {seconds:.0f} s; end it and try again."
                )
            time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def _open_lock(home: Path) -> int:
    try:
        descriptor = os.open(home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if os.geteuid() == 0:  # root may be first to lock a home of somebody else's
            owner = home.stat()
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
        return descriptor
    except OSError as error:
        raise StoreError(f"The store's lock {home / 'lock'} cannot be opened: {error.strerror}.") from error


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _pointer(home: Path) -> Path:
    """The folder that HOME/servers names, else the home."""
    try:
        return Path((home / "servers").read_text().strip())
    except FileNotFoundError:
        return home


def _own(home: Path) -> Place:
    return Place(home=home, servers=home, uid=os.geteuid(), gid=os.getegid())


def _create_as_root(home: Path) -> Place:
    user = system_user()
    _open_for_passage(home)
    if _pointer(home) == home and reaches(user.pw_uid, user.pw_gid, home):
        return Place(home=home, servers=home, uid=user.pw_uid, gid=user.pw_gid)
    servers = SYSTEM_FOLDER / hashlib.sha256(os.fsencode(os.path.realpath(home))).hexdigest()[:16]
    SYSTEM_FOLDER.mkdir(parents=True, exist_ok=True)
    SYSTEM_FOLDER.chmod(0o755)
    if (servers / "postgres").exists():
        _set_aside(servers, user.pw_uid)
    servers.mkdir(mode=0o711, exist_ok=True)
    (home / "servers").write_text(f"{servers}\n")
    say(f"the user {user.pw_name} cannot reach {home}, so the servers' data are kept in {servers}.")
    return Place(home=home, servers=servers, uid=user.pw_uid, gid=user.pw_gid)


def _set_aside(servers: Path, uid: int) -> None:
    """A home of this path was removed, its servers' data were not: keep them, start afresh."""
    from app.embedded.processes import end, with_argument

    for pid in with_argument(str(servers / "sock"), ("postgres",), uid):
        end(pid)
    aside = servers.with_name(f"{servers.name}.{int(time.time())}")
    servers.rename(aside)
    say(f"data of a removed home of the same path are kept in {aside}; remove that folder if nobody needs it.")


def system_user() -> pwd.struct_passwd:
    """The system user that servers run as when root starts them; created where it is absent."""
    for _ in range(10):
        try:
            return pwd.getpwnam(SYSTEM_USER)
        except KeyError:
            _add_system_user()
    raise StoreError(
        f"Postgres does not run as root and the system user {SYSTEM_USER!r} cannot be created; create it, "
        "or run as an ordinary user."
    )


def _add_system_user() -> None:
    command = shutil.which("useradd") or "/usr/sbin/useradd"
    group = ["--gid", SYSTEM_USER] if _group_exists() else ["--user-group"]
    where = ["--no-create-home", "--home-dir", str(SYSTEM_FOLDER), "--shell", "/usr/sbin/nologin"]
    try:
        subprocess.run([command, "--system", *group, *where, SYSTEM_USER], capture_output=True, check=False)
    except FileNotFoundError:
        return
    time.sleep(0.1)


def _group_exists() -> bool:
    import grp

    try:
        grp.getgrnam(SYSTEM_USER)
    except KeyError:
        return False
    return True


def refuse_root(place: Place) -> None:
    """Keep root's jobs out of a user's home: what their workers write there would lock its owner out.

    Raises:
        StoreError: this is root, and an ordinary user made the store.
    """
    if os.geteuid() != 0 or place.uid == 0:
        return
    try:
        owner = pwd.getpwuid(place.uid).pw_name
    except KeyError:
        owner = str(place.uid)
    if owner != SYSTEM_USER:
        raise StoreError(f"The store in {place.home} belongs to {owner}; run its jobs as {owner}, not as root.")


def reaches(uid: int, gid: int, folder: Path) -> bool:
    """True if that user may pass through `folder`; the kernel is asked, for it knows of ACLs and mounts."""
    who: dict[str, Any] = {"user": uid, "group": gid, "extra_groups": []}
    return subprocess.run(["/usr/bin/test", "-x", folder], cwd="/", check=False, **who).returncode == 0


def _open_for_passage(home: Path) -> None:
    mode = stat.S_IMODE(home.stat().st_mode)
    if mode & 0o711 != 0o711:
        home.chmod(mode | 0o711)


def _keep_files_private(home: Path) -> None:
    """Volumes, checkpoints and reports tell of patients, and root's home lets everybody pass: make their folders first.

    A folder that is there keeps its mode, so that its owner may share it.
    """
    owner = home.stat()
    for folder in (home / name for name in PRIVATE_FOLDERS):
        if not folder.exists():
            folder.mkdir(mode=0o700)
            if owner.st_uid != os.geteuid():
                os.chown(folder, owner.st_uid, owner.st_gid)


def _make_private(folder: Path, place: Place) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.stat()
    if (status.st_uid, status.st_gid) != (place.uid, place.gid):
        os.chown(folder, place.uid, place.gid)
    if stat.S_IMODE(status.st_mode) != 0o700:
        folder.chmod(0o700)


def _refuse_foreign(place: Place) -> None:
    """Nothing of somebody else's is taken over: our folders are absent, empty or ours."""
    ours = {"postgres": {"new", "data", "log", "port"}, "redis": {"redis.pid", "log"}, "sock": None}
    for name, known in ours.items():
        folder = place.servers / name
        if not folder.exists():
            continue
        found = {path.name for path in folder.iterdir()} if folder.is_dir() else {name}
        strange = sorted(n for n in found if known is not None and n not in known and not n.startswith("append"))
        if strange:
            raise StoreError(f"{folder} holds {strange[0]!r}, which is not ours; give LACHESIS_HOME another folder.")


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
