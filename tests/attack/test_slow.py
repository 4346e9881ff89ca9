"""Clients that are slow on purpose: each byte is a sign of life, but a head and a handshake have a time in all."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable

import pytest

from tests.harness import Connection, Proxy, Upstream

IDLE = 2  # seconds
RULES = """
version: 1
rules:
  - {name: tls, match: {host: api.test}, action: allow}
  - {name: plain, match: {host: api.test, scheme: http}, action: allow}
"""


@pytest.fixture(scope="module")
def proxy(lane: str, make_proxy: Callable[..., Proxy]) -> Proxy:
    proxy = make_proxy(RULES, lane=lane, limits={"idle": f"{IDLE}s"})
    proxy.agent()
    return proxy


def hello() -> bytes:
    """A whole ClientHello."""
    outgoing = ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="api.test")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def drip(connection: Connection, data: bytes, pause: float) -> float:
    """Send `data` byte by byte until the other side has enough of it; the seconds that took."""
    started = time.monotonic()
    connection.sock.settimeout(pause)
    for byte in data:
        try:
            connection.sock.send(bytes([byte]))
            if not connection.sock.recv(1):
                break
        except TimeoutError:
            continue  # nothing said, nothing closed
        except OSError:
            break
    return time.monotonic() - started


def in_a_tunnel(proxy: Proxy) -> Connection:
    return proxy.tunnel("api.test")


def behind_connect(proxy: Proxy) -> Connection:
    connection = proxy.connect()
    connection.send(f"CONNECT api.test:443 HTTP/1.1\r\nhost: api.test:443\r\n{proxy.auth('coder-1')}\r\n".encode())
    assert connection.response("CONNECT").status == 200
    return connection


def after_a_request(proxy: Proxy) -> Connection:
    connection = proxy.connect()
    connection.send(f"GET http://api.test/x HTTP/1.1\r\nhost: api.test\r\n{proxy.auth('coder-1')}\r\n".encode())
    assert connection.response().status == 200
    return connection


HEAD = b"GET http://api.test/x HTTP/1.1\r\nhost: api.test\r\nx: "
CASES: dict[str, tuple[Callable[[Proxy], Connection], bytes]] = {
    "request": (Proxy.connect, HEAD),
    "CONNECT": (Proxy.connect, b"CONNECT api.test:443 HTTP/1.1\r\nhost: api.test:443\r\nx: "),
    "method": (Proxy.connect, b"G"),
    "later_request": (after_a_request, HEAD),
    "in_a_tunnel": (in_a_tunnel, b"GET /x HTTP/1.1\r\nhost: api.test\r\nx: "),
    "ClientHello": (behind_connect, b""),
}


@pytest.mark.parametrize("pause", [0.05, 0.7], ids=["fast", "slow"])
@pytest.mark.parametrize("case", CASES)
def test_what_drips_is_cut(proxy: Proxy, upstream: Upstream, plain_upstream: Upstream, case: str, pause: float) -> None:
    """Whatever its pace: after limits.idle, or 30 s for a head and 10 s for a handshake where that is less."""
    begin, start = CASES[case]
    connection = begin(proxy)
    before = len(upstream.seen) + len(plain_upstream.seen)
    if start:
        connection.send(start)
    took = drip(connection, b"G" * 1000 if start else hello(), pause)
    assert took < 3 * IDLE
    assert len(upstream.seen) + len(plain_upstream.seen) == before
