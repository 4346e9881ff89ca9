"""The few fixtures that tests compose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.harness import Proxy, Upstream, server_context


@pytest.fixture(scope="session")
def upstream_ca() -> trustme.CA:
    """The CA of every upstream."""
    return trustme.CA()


@pytest.fixture(scope="session")
def _shared_upstream(upstream_ca: trustme.CA) -> Iterator[Upstream]:
    with Upstream(server_context(upstream_ca, "api.test", "*.api.test", "other.test", "127.0.0.1")) as upstream:
        yield upstream


@pytest.fixture(scope="session")
def _shared_plain_upstream() -> Iterator[Upstream]:
    with Upstream(None) as upstream:
        yield upstream


@pytest.fixture
def _fresh_upstreams(_shared_upstream: Upstream, _shared_plain_upstream: Upstream) -> None:
    """A rule without a scheme leads to both, whichever a test asks for."""
    _shared_upstream.reset()
    _shared_plain_upstream.reset()


@pytest.fixture
def upstream(_shared_upstream: Upstream, _fresh_upstreams: None) -> Upstream:
    """A TLS upstream for api.test, *.api.test and other.test that echoes, and keeps what it saw."""
    return _shared_upstream


@pytest.fixture
def plain_upstream(_shared_plain_upstream: Upstream, _fresh_upstreams: None) -> Upstream:
    """The same names without TLS."""
    return _shared_plain_upstream


@pytest.fixture(scope="module", params=["mitmproxy", "fast"])
def lane(request: pytest.FixtureRequest) -> str:
    """What drives the connections: whoever asks for it says that both do the same."""
    return str(request.param)


@pytest.fixture(scope="module")
def make_proxy(
    tmp_path_factory: pytest.TempPathFactory,
    upstream_ca: trustme.CA,
    _shared_upstream: Upstream,
    _shared_plain_upstream: Upstream,
) -> Iterator[Callable[..., Proxy]]:
    """Starts proxies: `make_proxy(rules, connect_to={...}, **settings)`; every one is stopped at the end."""
    for shared in (_shared_upstream, _shared_plain_upstream):
        shared.reset()  # a module before this one may have left it silent
    started: list[Proxy] = []

    def make(rules: str, connect_to: dict[str, str] | None = None, start: bool = True, **settings: Any) -> Proxy:
        folder: Path = tmp_path_factory.mktemp("proxy")
        upstream_ca.cert_pem.write_to_path(str(folder / "upstream-ca.pem"))
        names = ("api.test", "a.api.test", "b.api.test", "other.test")
        led = {f"{name}:443": f"127.0.0.1:{_shared_upstream.port}" for name in names}
        led |= {f"{name}:80": f"127.0.0.1:{_shared_plain_upstream.port}" for name in names}
        upstream = {"trust": ["upstream-ca.pem"], "connect_to": {**led, **(connect_to or {})}}
        proxy = Proxy(folder, {"upstream": {**upstream, **settings.pop("upstream", {})}, **settings}, rules)
        started.append(proxy)
        return proxy.start() if start else proxy

    yield make
    for proxy in started:
        if proxy.process:
            proxy.stop()
