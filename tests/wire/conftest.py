"""Tests over the wire take minutes together; one module of them stays in `scripts/test --fast`."""

from __future__ import annotations

from pathlib import Path

import pytest

QUICK = "test_main_job.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.name != QUICK:
            item.add_marker(pytest.mark.slow)
