"""A training on some ranks, for tests: `python -m tests.workers.rank_child JSON` prints what came of it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.errors import RankEnded
from ml.config import read_recipe
from ml.keeping import Kept, Silent
from ml.parallel import World
from ml.pretrain import pretrain
from tests.ml.test_pretrain import SMALL, Watch, ball_data
from workers.ranks import ranks


class Losses(Watch):
    """Remembers the losses, and kills rank 1 where it is told to."""

    kill_at: int | None = None

    def curve(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        super().curve(step, epoch, values)
        if step == self.kill_at:
            for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)


def main(asked: dict[str, Any]) -> dict[str, Any]:
    """Train as asked: ranks, settings, folder, stop_at, kill_at, resume."""
    recipe, data = read_recipe("tiny", {**SMALL, **asked["settings"]}), ball_data()
    folder, watch = Path(asked["folder"]), Losses(asked.get("stop_at"))
    watch.kill_at = asked.get("kill_at")
    resume = Path(asked["resume"]) if asked.get("resume") else None
    common: dict[str, Any] = {"seed": 3, "folder": folder, "facts": {}, "kept": Kept(last=resume)}

    def follow(world: World) -> None:
        pretrain(recipe, data, observer=Silent(), world=world, **common)

    try:
        with ranks(asked["ranks"], folder, follow) as world:
            made = pretrain(recipe, data, observer=watch, world=world, **common)
    except RankEnded as error:
        return {"error": str(error), "children": Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}
    digest = hashlib.sha256(made.file.read_bytes()).hexdigest() if made.file else None
    gains = [entry["tuning_gain"] for entry in made.validation["epochs"]]
    return {"losses": watch.losses, "file": str(made.file), "digest": digest, "step": made.step, "gains": gains}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
