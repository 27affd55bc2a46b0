"""Every rule and flag that a loader uses is explained, in one table."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

import app.loading
from app.loading import omop, rules
from app.loading.images_header import REASONS
from app.store.work import InlineWork
from tests.app.loading.extracts import rows

FOLDER = Path(app.loading.__file__).parent
PLACES = {"Rule": 1, "parse": 2, "Refusal": 2, "refuse": 1, "Broken": 0, "Unreadable": 0}
"""Calls that name a rule → which argument does, or the keyword `rule`."""


def texts(node: ast.expr, module: object) -> Iterator[str]:
    """The texts that an expression may be: constants, constants by name, both arms of a condition."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.Name) and isinstance(value := getattr(module, node.id, None), str):
        yield value
    elif isinstance(node, ast.IfExp):
        yield from texts(node.body, module)
        yield from texts(node.orelse, module)


def used() -> dict[str, str]:
    """Rule or flag → the file that uses it."""
    found: dict[str, str] = {}
    for path in FOLDER.rglob("*.py"):
        name = ".".join(path.relative_to(FOLDER.parent.parent).with_suffix("").parts)
        module = importlib.import_module(name.removesuffix(".__init__"))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "attr", getattr(node.func, "id", ""))
                place = PLACES.get(called)
                given = [keyword.value for keyword in node.keywords if keyword.arg == "rule"]
                if place is not None and len(node.args) > place:
                    given.append(node.args[place])
                for value in given:
                    found |= dict.fromkeys(texts(value, module), path.name)
            elif isinstance(node, ast.Subscript) and getattr(node.value, "id", "") in ("flags", "counts"):
                found |= dict.fromkeys(texts(node.slice, module), path.name)
            elif (
                isinstance(node, ast.Assign)
                and isinstance(node.value, ast.Dict)
                and getattr(node.targets[0], "id", "") in ("flags", "counts")
            ):
                for key in node.value.keys:
                    found |= dict.fromkeys(texts(key, module) if key else (), path.name)
    return found


def test_every_rule_and_flag_that_a_loader_names_is_explained() -> None:
    found = used()
    assert {"unparsable_id", "malformed_quotes", "missing_file", "concept_zero", "unknown_visit"} <= set(found)
    missing = {rule: file for rule, file in found.items() if rule not in rules.REJECTS and rule not in rules.FLAGS}
    assert not missing, f"say in app/loading/rules.py what came and how to mend it: {missing}"


def test_every_reason_of_a_scan_is_explained() -> None:
    assert set(REASONS) <= set(rules.FLAGS)


def test_what_is_said_of_a_rule_is_one_sentence() -> None:
    for rule, said in (*rules.REJECTS.items(), *rules.FLAGS.items()):
        assert re.fullmatch(r"[a-z][a-z0-9_]*", rule)
        assert said.mend.endswith(".") and said.mend[0].isupper() and "\n" not in said.mend, rule
        assert said.came and not said.came.endswith("."), rule


def test_a_rule_of_another_version_points_to_the_documents() -> None:
    assert rules.mend("unheard_of") == rules.UNEXPLAINED == rules.came("unheard_of")


@pytest.mark.parametrize("name", ["omop_gibleed_broadsea_5.3", "omop_mimic_iv_demo_5.3_partial"])
def test_all_that_real_extracts_break_is_explained(
    work: Callable[..., InlineWork], engine: Engine, real_data: Path, name: str
) -> None:
    omop.load(work(path=str(real_data / name), source="a"))
    query = (
        "SELECT e.key FROM ops.load, jsonb_each(rejects_by_rule || flags_by_rule) e UNION SELECT rule FROM ops.reject"
    )
    found = {rule for (rule,) in rows(engine, query)}
    assert found
    assert found <= {*rules.REJECTS, *rules.FLAGS}
