"""STAGES: kind of job → the function that fulfils it; each is imported when it first runs."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable
from typing import Any

from app.errors import UnknownName
from app.store.work import Work

Stage = Callable[[Work], dict[str, Any]]

STAGES: dict[str, str] = {
    "load": "workers.stages.load",
    "forget": "workers.stages.forget",
    "cohort": "app.store.cohorts:build",
    "tasks": "app.store.tasks:build",
    "label": "workers.stages.label",
    "features": "workers.stages.features",
    "leakage": "workers.stages.leakage",
    "label_shard": "workers.stages.label_shards:label_shard",
    "cache": "workers.stages.cache",
    "pretrain": "workers.stages.pretrain",
    "embed": "workers.stages.embed",
    "evaluate": "workers.stages.evaluate",
    "report": "workers.stages.report",
    "slices": "workers.stages.slices",
    "load_embeddings": "workers.stages.load_embeddings",
}
"""`module` (its function has the stage's name) or `module:function`."""

CHILD_KINDS = {"pretrain", "embed", "evaluate", "slices", "load_embeddings"}
"""Kinds that use torch or a device: each attempt is a process of its own, whose death takes no worker with it."""


ROUNDS = (50_000, 20, 50)
"""The collector's: rows come by the ten thousand and hold no cycles."""


def stage(kind: str) -> Stage:
    """The function of a kind. Raises UnknownName."""
    if kind not in STAGES:
        raise UnknownName("kind of job", kind, STAGES)
    module, _, function = STAGES[kind].partition(":")
    is_new = module not in sys.modules
    found: Stage = getattr(importlib.import_module(module), function or kind)
    if is_new:  # what is imported stays: the collector need not walk through it in each of its rounds
        gc.collect()  # but garbage of an earlier job shall not stay with it
        gc.freeze()
        gc.set_threshold(*ROUNDS)
    return found
