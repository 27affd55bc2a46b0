"""`python -m app.loading.images_child`: reads headers for the process that started it, and may die of one.

Each line of stdin is a JSON list of [format, path]; each line of stdout the list of what was found there, as
`read_one` gives it. Memory is capped, so that a header which claims to be huge ends in an error or with this process.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

MEMORY_BYTES = 2 << 30
"""Address space; the libraries alone map a third of it."""


def read_one(format: str, path: str) -> Any:
    """A rule (str) by which the file is set aside, the images of a DICOM file (list), or a NIfTI header (dict)."""
    from app.loading.images_header import Unreadable

    try:
        if format == "nifti":
            from app.loading.images_nifti import read_nifti

            header = asdict(read_nifti(Path(path)))
            if header["acquired"]:
                header["acquired"]["at"] = header["acquired"]["at"].isoformat()
            return header
        from app.loading.images_dicom import read_images

        return read_images(Path(path))
    except Unreadable as rule:
        return str(rule)
    except MemoryError:
        return "header_too_large"
    except OSError:
        return "unreadable_file"


def main() -> None:
    """Answer until stdin ends."""
    _end_with_parent()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin:
        answers.write(json.dumps([read_one(*wanted) for wanted in json.loads(line)]) + "\n")
        answers.flush()


def _end_with_parent() -> None:
    """Ask Linux to end this process with the one that started it, which may be killed without a word."""
    import contextlib
    import ctypes
    import signal

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    main()
