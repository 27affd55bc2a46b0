"""The stage `pretrain`, in a process of its own, for tests: `python -m tests.workers.rank_stage URL FOLDER ARGS`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from app.settings import Settings
from app.store.session import make_engine
from app.store.work import InlineWork
from workers.stages.pretrain import pretrain

if __name__ == "__main__":
    url, folder, args = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    settings = Settings(home=folder / "home", home_is_named=True)
    print(json.dumps(pretrain(InlineWork(make_engine(url), args=args, folder=folder / "work", settings=settings))))
