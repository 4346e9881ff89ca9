"""Fixtures of the client tests. Each module has a `proxy` of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.sandbox import AGENT, Sandbox, exported
from tests.harness import Proxy


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of them run real clients and take seconds."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("clients")
            item.add_marker("slow")


@pytest.fixture(scope="module")
def variables(proxy: Proxy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What `sallyport agent env` exports."""
    proxy.agent(AGENT)
    return exported(proxy, tmp_path_factory.mktemp("bin"))


@pytest.fixture
def sandbox(proxy: Proxy, variables: dict[str, str], tmp_path: Path) -> Sandbox:
    """A sandbox of the module's proxy with an empty home."""
    home = tmp_path / "home"
    home.mkdir()
    return Sandbox(proxy, variables, home)
