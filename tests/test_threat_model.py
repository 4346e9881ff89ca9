"""The threat model names a test for each claim, and the teeth a text for each defence: both must be there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.attack.teeth import ROOT, TEETH, Tooth

MODEL = (ROOT / "docs" / "threat-model.md").read_text()
NAMED = re.compile(r"`((?:\w+/)*test_\w+\.py)(?:::(\w+))?`")


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_test_in_the_threat_model_is_there() -> None:
    """A claim whose proof was renamed is only a claim."""
    named = {(path, name) for path, name in NAMED.findall(MODEL)}
    assert len(named) > 5
    for path, name in named:
        assert not name or name in functions(ROOT / "tests" / path), f"{path}::{name}"


def test_every_claim_has_a_test() -> None:
    """Each row of a table of claims names one."""
    rows = [line for line in MODEL.partition("\n## Claims")[2].splitlines() if line.startswith("| ")]
    assert len(rows) > 5
    for row in rows:
        assert row.startswith(("| claim |", "| ---")) or NAMED.search(row), row


@pytest.mark.parametrize("tooth", TEETH, ids=lambda tooth: tooth.name)
def test_every_tooth_finds_its_defence(tooth: Tooth) -> None:
    """Where a defence was rewritten its row must follow."""
    assert (ROOT / "proxy" / tooth.module).read_text().count(tooth.text) == 1
    assert tooth.text != tooth.instead
    assert (ROOT / "tests" / "attack" / tooth.tests.split()[0].partition("::")[0]).is_file()
