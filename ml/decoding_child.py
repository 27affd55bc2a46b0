"""`python -m ml.decoding_child MEMORY_BYTES CPU_SECONDS PARENT`: decodes scans for the process that started it.

It may die of one. Each line of stdin is a JSON object with path, format, files, mask, recipe and folder; each line of
stdout, after a first one that says `ready`, the answer: `kept` (fields of `Cached`), or `why` not, with `again` where
another try may succeed, or `full` where the disk has no room left.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT)


def answer(request: dict[str, Any], memory_bytes: int) -> dict[str, Any]:
    """Decode one scan into the cache."""
    from ml.decoding import Gone
    from ml.volume_cache import Source, keep
    from ml.volumes import VolumeRecipe

    files, mask = tuple(Path(file) for file in request["files"]), request.get("mask")
    source = Source(Path(request["path"]), request["format"], files, Path(mask) if mask else None)
    try:
        return {"kept": keep(source, VolumeRecipe.from_dict(request["recipe"]), Path(request["folder"]))}
    except Gone as error:
        return {"why": str(error), "again": True}
    except ValueError as error:
        return {"why": str(error)}
    except MemoryError:
        return {
            "why": f"Expected a scan that can be decoded within {memory_bytes / 1e9:.1f} GB of memory, got one that "
            "needs more; is it damaged?"
        }
    except OSError as error:  # its text would name the path
        if error.errno in FULL:
            return {"full": True}
        why = error.strerror or "cannot be read"
        return {"why": f"Expected a readable {source.format} volume, found none ({why}).", "again": True}


def main(memory_bytes: int, cpu_seconds: int, parent: int) -> None:
    """Answer until stdin ends."""
    _end_with(parent)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what a library prints is no answer
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + cpu_seconds + 1, hard))
        answers.write(json.dumps(answer(json.loads(line), memory_bytes)) + "\n")
        answers.flush()


def _end_with(parent: int) -> None:
    """Ask Linux to end this process with the one that started it, which may be killed without a word."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
