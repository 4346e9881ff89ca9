"""Upgrades and tunnels as ways out: nothing but a WebSocket that a rule allows becomes another protocol."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.h2client import Http2
from tests.harness import Connection, Proxy, Upstream, read_request, refused

RULES = """
version: 1
rules:
  - {name: api, match: {host: [api.test, other.test], path: /v1/**}, action: allow}
  - {name: plain, match: {host: api.test, scheme: http}, action: allow}
  - {name: live, match: {host: api.test, path: /live/**, websocket: true}, action: allow}
"""
KEY = "sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: %b\r\n%b\r\n"
ACCEPTED = b"sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"
MIB = 1 << 20


@pytest.fixture(scope="module")
def proxy(lane: str, make_proxy: Callable[..., Proxy]) -> Proxy:
    proxy = make_proxy(RULES, lane=lane)
    proxy.agent()
    return proxy


def handshake(path: str, upgrade: str, host: str = "api.test", more: str = KEY, connection: str = "upgrade") -> bytes:
    return (
        f"GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: {connection}\r\nupgrade: {upgrade}\r\n{more}\r\n"
    ).encode()


UPGRADES = ["h2c", "TLS/1.3", "websocket, h2c", "h2c, websocket", "connect-udp", "WebSocket/13", "tcp", "x" * 500]


@pytest.mark.parametrize("upgrade", UPGRADES)
@pytest.mark.parametrize("path", ["/v1/x", "/live/x"])
def test_no_other_protocol_can_be_asked_for(proxy: Proxy, upstream: Upstream, upgrade: str, path: str) -> None:
    """Not even where WebSockets are allowed."""
    tunnel = proxy.tunnel("api.test")
    tunnel.send(handshake(path, upgrade, more=KEY + "http2-settings: AAMAAABkAAQAAP__\r\n"))
    refused(tunnel.response(), "protocol_not_allowed")
    assert upstream.connections == 0


def test_cleartext_http_2_can_neither_be_asked_for_nor_assumed(proxy: Proxy, plain_upstream: Upstream) -> None:
    """RFC 9113 section 3.3: it would smuggle requests past the rules."""
    connection = proxy.connect()
    settings = "http2-settings: AAMAAABkAAQAAP__\r\n"
    connection.send(handshake("http://api.test/", "h2c", more=settings + proxy.auth("coder-1")))
    refused(connection.response(), "protocol_not_allowed")
    connection = proxy.connect()
    connection.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
    refused(connection.response(), "ambiguous_request")
    assert plain_upstream.connections == 0


@pytest.mark.parametrize(
    ("host", "path"), [("api.test", "/v1/x"), ("other.test", "/live/x"), ("api.test", "/live/../v1/x")]
)
def test_a_websocket_goes_only_where_a_rule_lets_it(proxy: Proxy, upstream: Upstream, host: str, path: str) -> None:
    """By host and by path."""
    tunnel = proxy.tunnel(host)
    tunnel.send(handshake(path, "websocket", host))
    response = tunnel.response()
    assert response.code in ("protocol_not_allowed", "no_rule")
    assert upstream.connections == 0


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_a_websocket_is_asked_for_by_get(proxy: Proxy, upstream: Upstream, method: str) -> None:
    """RFC 6455 section 4.1; nothing else becomes one."""
    tunnel = proxy.tunnel("api.test")
    tunnel.send(handshake("/live/x", "websocket").replace(b"GET", method.encode(), 1))
    refused(tunnel.response(), "ambiguous_request")
    assert upstream.connections == 0


def answers(upstream: Upstream, *parts: bytes) -> None:
    """Let the upstream answer so, and keep what else it hears in `seen`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream.seen.append(await read_request(reader))
        for part in parts:
            writer.write(part)
            await writer.drain()
        while data := await reader.read(65536):
            upstream.seen[-1].body += data

    upstream.raw = serve


UNASKED = {
    "to a plain request": (b"GET /v1/x HTTP/1.1\r\nhost: api.test\r\n\r\n", SWITCHED % (b"websocket", ACCEPTED)),
    "to another protocol than asked for": (handshake("/live/x", "websocket"), SWITCHED % (b"h2c", b"")),
    "to none": (handshake("/live/x", "websocket"), b"HTTP/1.1 101 Switching Protocols\r\n\r\n"),
    "to several": (handshake("/live/x", "websocket"), SWITCHED % (b"websocket, h2c", ACCEPTED)),
    "to a handshake without a version": (handshake("/live/x", "websocket", more=""), SWITCHED % (b"websocket", b"")),
}


@pytest.mark.parametrize("case", UNASKED)
def test_a_101_that_was_not_asked_for_opens_nothing(proxy: Proxy, upstream: Upstream, case: str) -> None:
    """No byte passes in either direction."""
    asked, answer = UNASKED[case]
    answers(upstream, answer + b"from the upstream")
    tunnel = proxy.tunnel("api.test")
    tunnel.send(asked)
    tunnel.send(b"from the sandbox")
    got = b""
    while data := tunnel.recv():
        got += data
        if b"}}" in data:
            break
    assert b"from the upstream" not in got
    assert b"from the sandbox" not in (upstream.seen[0].body if upstream.seen else b"")


def test_what_follows_an_upgrade_that_failed_is_decided(proxy: Proxy, upstream: Upstream) -> None:
    """A request hidden behind the handshake is a request, not a frame."""
    tunnel = proxy.tunnel("api.test")
    tunnel.send(handshake("/live/x", "websocket") + b"GET /v2/hidden HTTP/1.1\r\nhost: api.test\r\n\r\n")
    assert tunnel.response().status == 200  # the upstream did not switch
    with contextlib.suppress(ConnectionError):
        refused(tunnel.response(), "no_rule")
    assert [seen.target for seen in upstream.seen] == ["/live/x"]


# WebSockets


def opened(proxy: Proxy, *, deflate: bool = False) -> Connection:
    more = KEY + ("sec-websocket-extensions: permessage-deflate\r\n" if deflate else "")
    tunnel = proxy.tunnel("api.test")
    tunnel.send(handshake("/live/x", "websocket", more=more))
    assert tunnel.response().status == 101
    return tunnel


def frame(opcode: int, size: int, data: bytes = b"", *, mask: bool) -> bytes:
    """The header of a frame that says it has `size` bytes, and `data`."""
    if not size:
        return bytes([opcode, 0x80 if mask else 0]) + (b"\0\0\0\0" if mask else b"")
    return bytes([opcode, (0x80 if mask else 0) | 127]) + size.to_bytes(8) + (b"\0\0\0\0" if mask else b"") + data


def accept(extensions: bytes = b"") -> bytes:
    return SWITCHED % (b"websocket", ACCEPTED + extensions)


def resident(proxy: Proxy) -> int:
    """Bytes of memory that the proxy has."""
    assert proxy.process
    return int(Path(f"/proc/{proxy.process.pid}/statm").read_text().split()[1]) * 4096


MESSAGES = {
    "in one frame": lambda: [frame(0x82, 1 << 40, mask=True)] + [bytes(MIB)] * 64,
    "in many frames": lambda: [frame(0x02, MIB, bytes(MIB), mask=True)] + [frame(0, MIB, bytes(MIB), mask=True)] * 64,
    "in frames without anything": lambda: [frame(0x02, 0, mask=True)] + [frame(0, 0, mask=True) * 10_000] * 100,
}


@pytest.mark.parametrize("case", MESSAGES)
def test_a_message_without_end_is_cut(proxy: Proxy, upstream: Upstream, case: str) -> None:
    """It would be held until it ends. Both sides are told that it was too big (RFC 6455 section 7.4.1)."""
    answers(upstream, accept())
    tunnel = opened(proxy)
    before = resident(proxy)
    with contextlib.suppress(OSError):
        for part in MESSAGES[case]():
            tunnel.send(part)
    tail = tunnel.rest()
    assert tail[:4] in (b"", bytes([0x88, len(tail) - 2]) + (1009).to_bytes(2))  # a reset can take the answer away
    assert resident(proxy) - before < 100 * MIB
    assert len(upstream.seen[0].body) < 1000


def test_a_compressed_bomb_is_cut(proxy: Proxy, upstream: Upstream) -> None:
    """From an upstream: a gigabyte of zeros in a megabyte."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = b"".join(deflate.compress(bytes(MIB)) for _ in range(1024)) + deflate.flush(zlib.Z_SYNC_FLUSH)[:-4]
    extension = b"sec-websocket-extensions: permessage-deflate\r\n"
    answers(upstream, accept(extension), frame(0xC2, len(bomb), bomb, mask=False))
    before = resident(proxy)
    tunnel = opened(proxy, deflate=True)
    tail = tunnel.rest()
    assert tail[2:4] == (1009).to_bytes(2)
    assert resident(proxy) - before < 100 * MIB


# CONNECT


def test_tls_in_a_tunnel_to_another_port_reaches_nobody(proxy: Proxy, plain_upstream: Upstream) -> None:
    """CONNECT to port 80 is refused, and a ClientHello sent along with it is no request."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        proxy.trust.wrap_bio(incoming, outgoing, server_hostname="api.test").do_handshake()
    connection = proxy.connect()
    connection.send(f"CONNECT api.test:80 HTTP/1.1\r\n{proxy.auth('coder-1')}\r\n".encode() + outgoing.read())
    refused(connection.response("CONNECT"), "no_rule")
    assert connection.closed()
    assert plain_upstream.connections == 0


def test_an_extended_connect_is_none(proxy: Proxy, upstream: Upstream) -> None:
    """A WebSocket over HTTP/2 (RFC 8441) was not offered: whoever asks for it is cut off."""
    client = Http2(proxy.tunnel("api.test", alpn="h2"))
    pairs = [(":protocol", "websocket")]
    stream = client.h2.get_next_available_stream_id()
    head = [(":method", "CONNECT"), (":scheme", "https"), (":authority", "api.test"), (":path", "/live/x"), *pairs]
    client.h2.send_headers(stream, head)
    client.flush()
    with pytest.raises(ConnectionError):
        client.response(stream)
    assert upstream.connections == 0
