"""One sandbox may use up what is its own, and nothing of the others'."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.h2client import Http2
from tests.harness import Connection, Proxy, Upstream, refused, wait_for

type Make = Callable[..., Proxy]

RULES = """
version: 1
rules:
  - {name: all, match: {host: api.test}, action: allow}
  - {name: plain, match: {host: api.test, scheme: http}, action: allow}
"""
CAP, STRANGERS = 20, 50


@pytest.fixture(scope="module")
def proxy(make_proxy: Make, lane: str) -> Proxy:
    proxy = make_proxy(RULES, lane=lane, limits={"connections_per_agent": CAP, "unidentified_per_source": STRANGERS})
    proxy.agent("hog")
    proxy.agent("other")
    return proxy


def memory(proxy: Proxy) -> int:
    """Bytes that the process has in RAM."""
    assert proxy.process
    return int(Path(f"/proc/{proxy.process.pid}/statm").read_text().split()[1]) * 4096


def descriptors(proxy: Proxy) -> int:
    assert proxy.process
    return len(list(Path(f"/proc/{proxy.process.pid}/fd").iterdir()))


def connect(proxy: Proxy, agent: str, target: str = "api.test:443") -> Connection:
    connection = proxy.connect()
    connection.send(f"CONNECT {target} HTTP/1.1\r\nhost: {target}\r\n{proxy.auth(agent)}\r\n".encode())
    return connection


def close(proxy: Proxy, connections: list[Connection]) -> None:
    for connection in connections:
        connection.close()
    wait_for(lambda: proxy.get("http://api.test/", agent="hog").status == 200)


def test_an_agent_has_so_many_connections_and_others_have_theirs(proxy: Proxy, upstream: Upstream) -> None:
    crowd = [connect(proxy, "hog") for _ in range(CAP)]
    assert [each.response("CONNECT").status for each in crowd] == [200] * CAP
    upstream.seen.clear()
    refused(connect(proxy, "hog").response(), "limit_exceeded")
    assert proxy.get("https://api.test/", agent="other").status == 200
    assert [seen.method for seen in upstream.seen] == ["GET"]
    assert proxy.metric("sallyport_limits_exceeded_total", agent="hog", rule="_none", limit="connections") >= 1
    close(proxy, crowd)


def test_tunnels_that_change_hands_are_counted_on(proxy: Proxy, upstream: Upstream) -> None:
    """Those that speak HTTP/2, or say nothing after their handshake."""
    crowd = [proxy.tunnel("api.test", agent="hog", alpn="h2") for _ in range(CAP)]
    refused(connect(proxy, "hog").response(), "limit_exceeded")
    first = Http2(crowd[0])
    assert first.response(first.request("/x")).status == 200
    assert proxy.get("https://api.test/", agent="other").status == 200
    close(proxy, crowd)


@pytest.mark.parametrize("said", [b"", b"G", b"\x16\x03", b"CONNECT a.test:443 HTTP/1.1\r\n\r\n"], ids=repr)
def test_thousands_that_say_nothing_take_nothing(proxy: Proxy, upstream: Upstream, said: bytes) -> None:
    """From the same address as everybody: the one that waited longest goes, so others get in."""
    used, before = descriptors(proxy), memory(proxy)
    crowd: list[socket.socket] = []
    for _ in range(1000):
        crowd.append(sock := socket.create_connection(proxy.address))
        with contextlib.suppress(OSError):
            sock.sendall(said)
    for _ in range(3):
        assert proxy.get("https://api.test/", agent="other").status == 200
    wait_for(lambda: descriptors(proxy) <= used + STRANGERS + 20)
    assert memory(proxy) < before + 30_000_000
    assert proxy.metric("sallyport_limits_exceeded_total", agent="_none", rule="_none", limit="unidentified") > 0
    for sock in crowd:
        sock.close()
    wait_for(lambda: descriptors(proxy) <= used + 10)


def test_idle_connections_of_an_agent_are_small(make_proxy: Make, upstream: Upstream, lane: str) -> None:
    """Each with its TLS and after a request: some hundred kilobytes at most."""
    proxy = make_proxy(RULES, lane=lane)
    proxy.agent()
    proxy.get("https://api.test/")
    before = memory(proxy)
    tunnels = [proxy.tunnel("api.test") for _ in range(200)]
    for tunnel in tunnels:
        tunnel.send(b"GET /x HTTP/1.1\r\nhost: api.test\r\n\r\n")
        assert tunnel.response().status == 200
    assert (memory(proxy) - before) / len(tunnels) < 400_000


def test_a_storm_of_new_hosts_mints_for_a_while(make_proxy: Make, upstream: Upstream, lane: str) -> None:
    """Random names, by CONNECT or as server name: so many certificates for each agent; known hosts go on."""
    proxy = make_proxy(RULES, lane=lane, limits={"new_hosts_per_agent": "60/m"})
    proxy.agent("hog")
    proxy.agent("other")
    assert proxy.get("https://api.test/", agent="hog").status == 200
    minted = proxy.metric("sallyport_certificates_minted_total")
    over = 0
    started = time.monotonic()
    for number in range(200):
        connection = connect(proxy, "hog", f"{number}.storm.test:443")
        response = connection.response("CONNECT")
        connection.close()
        if response.status == 429:
            refused(response, "limit_exceeded")
            over += 1
            if over > 5:
                break
    allowed = 60 + (time.monotonic() - started) + 1
    assert over
    assert proxy.get("https://api.test/", agent="hog").status == 200
    assert proxy.metric("sallyport_certificates_minted_total") - minted <= allowed
    refused(proxy.get("https://new.test/", agent="other"), "no_rule")
    assert upstream.connections <= 4


def test_a_flood_does_not_make_others_wait_long(proxy: Proxy, upstream: Upstream) -> None:
    """The median of another agent's requests, on a connection of its own, while one keeps all of its own busy."""
    over = threading.Event()

    def flood() -> None:
        with contextlib.suppress(OSError, AssertionError):
            tunnel = proxy.tunnel("api.test", agent="hog")
            while not over.is_set():
                tunnel.send(b"GET /x HTTP/1.1\r\nhost: api.test\r\n\r\n")
                tunnel.response()

    threads = [threading.Thread(target=flood) for _ in range(8)]
    quiet = median(proxy)
    for thread in threads:
        thread.start()
    try:
        assert median(proxy) < max(20 * quiet, 0.25)
    finally:
        over.set()
        for thread in threads:
            thread.join()


def median(proxy: Proxy) -> float:
    tunnel = proxy.tunnel("api.test", agent="other")
    times = []
    for _ in range(31):
        started = time.monotonic()
        tunnel.send(b"GET /x HTTP/1.1\r\nhost: api.test\r\n\r\n")
        assert tunnel.response().status == 200
        times.append(time.monotonic() - started)
    return sorted(times)[15]
