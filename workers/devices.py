"""The devices of this host that a worker offers, and what tells a job's process which are its own.

Devices go by the names that CUDA_VISIBLE_DEVICES takes, those of accelerators by their UUIDs, which mean the same to
every worker of a host. Nothing here touches a device: children do, and forks of theirs.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.errors import InputError

MOST = 64
PROCESSOR = "cpu"
ASK_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One that the driver knows."""

    index: str
    uuid: str


def offered(wanted: str | None, environ: Mapping[str, str]) -> tuple[str, ...]:
    """The devices that jobs of a worker may use.

    Args:
        wanted: LACHESIS_DEVICES: `none`, `cpu:N` (the processor, shared by N ranks), or accelerators by index or UUID
            with commas between; None for all that CUDA_VISIBLE_DEVICES leaves.
        environ: the worker's environment.

    Raises:
        InputError: the setting names something else, a device twice, or one that this host lacks.
    """
    if wanted is None:
        return visible(environ.get("CUDA_VISIBLE_DEVICES"), accelerators())
    if wanted == "none":
        return ()
    if wanted.partition(":")[0] == PROCESSOR:
        return _shares(wanted)
    found, known = [], accelerators()
    for name in (part.strip() for part in wanted.split(",")):
        match = _find(name, known)
        if match is None or match in found:
            has = ", ".join(f"{one.index} ({one.uuid})" for one in known) or "no accelerator"
            raise InputError(
                f"Expected LACHESIS_DEVICES to be none, cpu:N or accelerators of this host, each once, got {name!r} in "
                f"{wanted!r}; this host has {has}."
            )
        found.append(match)
    return tuple(found)


def _shares(wanted: str) -> tuple[str, ...]:
    count = wanted.partition(":")[2] or "1"
    if not count.isdigit() or not 1 <= int(count) <= MOST:
        raise InputError(f"Expected cpu:N in LACHESIS_DEVICES with N from 1 to {MOST}, got {wanted!r}.")
    return tuple(f"{PROCESSOR}:{n}" for n in range(int(count)))


def visible(named: str | None, known: Sequence[Accelerator]) -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES leaves of the accelerators, as CUDA reads it: up to the first name that nothing has."""
    if named is None:
        return tuple(one.uuid for one in known)
    found: list[str] = []
    for name in (part.strip() for part in named.split(",")):
        match = _find(name, known)
        if match is None:
            break
        found.append(match)
    return tuple(dict.fromkeys(found))


def _find(name: str, known: Sequence[Accelerator]) -> str | None:
    """The UUID of an index or of the beginning of a UUID; parts of accelerators (MIG) go by their own names."""
    if name.startswith("MIG-"):
        return name
    if name.isdigit():
        return next((one.uuid for one in known if one.index == name), None)
    matches = [one.uuid for one in known if name.startswith("GPU-") and one.uuid.startswith(name)]
    return matches[0] if len(matches) == 1 else None


def accelerators() -> list[Accelerator]:
    """All that the driver shows on this host, in its order; none where there is no driver."""
    command = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=ASK_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        uuids = [facts.get("GPU UUID", "") for facts in driver_facts()]
        return [Accelerator(str(n), uuid) for n, uuid in enumerate(uuids) if uuid.startswith("GPU-")]
    pairs = [line.split(",") for line in told.splitlines() if line.count(",") == 1]
    return [Accelerator(index.strip(), uuid.strip()) for index, uuid in pairs]


def driver_facts() -> list[dict[str, str]]:
    """What the driver's files say of each accelerator, by the names that they use; nothing where there is no driver."""
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    told = [[line.partition(":") for line in file.read_text().splitlines()] for file in files]
    return [{name.strip(): value.strip() for name, _, value in lines} for lines in told]


def environment_of(devices: Sequence[str]) -> dict[str, str]:
    """What a job's process is told, so that its first device is the first of these."""
    if not devices:
        return {}
    own = [name for name in devices if not name.startswith(PROCESSOR)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(own)}
