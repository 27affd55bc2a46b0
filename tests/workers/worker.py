"""`python -m tests.workers.worker …` is `python -m workers …` with the stages of tests added."""

from __future__ import annotations

import sys

from tests.workers.stages import CHILDREN, STAGES
from workers import stages
from workers.__main__ import main

stages.STAGES.update(STAGES)
stages.STAGES.update(CHILDREN)
stages.CHILD_KINDS.update(CHILDREN)

if __name__ == "__main__":
    sys.exit(main())
