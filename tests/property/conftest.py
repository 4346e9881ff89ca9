"""How long hypothesis looks: `fast`, some 20 seconds in all; `HYPOTHESIS_PROFILE=deep`, as long as it takes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

DEEP = 20_000  # examples of each property
FAST = 200

settings.register_profile("fast", max_examples=FAST, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("deep", parent=settings.get_profile("fast"), max_examples=DEEP)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "fast")
settings.load_profile(PROFILE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if PROFILE == "deep" and item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(3600))
