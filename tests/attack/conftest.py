"""Attacks on a running proxy over raw sockets, judged by what upstreams saw and what came back.

Each claim they prove is a row of docs/threat-model.md; `teeth.py` shows that they fail where a defence is missing.
"""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.slow)
