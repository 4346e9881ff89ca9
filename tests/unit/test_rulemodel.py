"""The JSON Schema of rule files, against what loads."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from proxy.rulefile import parse_rules
from proxy.rulemodel import rules_schema
from proxy.yamltree import load

SCHEMA = jsonschema.Draft202012Validator(rules_schema())
STARTER = sorted((Path(__file__).parents[2] / "rules").glob("*.yaml"))
GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.txt"))


def valid(text: str) -> bool:
    return bool(SCHEMA.is_valid(load(text, "a").data))


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(rules_schema())
    assert json.dumps(rules_schema())


@pytest.mark.parametrize("path", [path for path in STARTER if ".test." not in path.name], ids=lambda path: path.stem)
def test_an_editor_accepts_the_starter_set(path: Path) -> None:
    assert valid(path.read_text())


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_an_editor_accepts_what_loads(path: Path) -> None:
    """The schema may be more lenient than `check`, never stricter."""
    text = path.read_text().partition("----------\n")[0]
    _, problems = parse_rules(text, "a")
    if all(problem.warning for problem in problems):
        assert valid(text)


@pytest.mark.parametrize(
    "rule",
    [
        "{name: a}",
        "{name: a, action: alow}",
        "{name: a, action: block, mach: {}}",
        "{name: a, action: block, match: }",
        "{name: a, action: block, match: {host: []}}",
        "{name: a, action: block, match: {body: {}}}",
        "{name: a, action: block, limits: {rate: 1}}",
        "{name: a, action: allow, inject: [{credential: k, as: bearr}]}",
        "{name: a, action: allow, inject: [{credential: k, as: {basic: {}, bearer: {}}}]}",
    ],
)
def test_an_editor_marks_a_mistake(rule: str) -> None:
    assert not valid(f"version: 1\nrules: [{rule}]")
