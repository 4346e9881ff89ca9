"""A hostile upstream, which the sandbox may own: it must not pass for another, fool a client, or hold the proxy up."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gzip
import re
import socket
import ssl
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import brotli  # type: ignore[import-untyped]
import pytest
import trustme
import zstandard

from tests.h2client import Http2
from tests.harness import (
    Connection,
    Proxy,
    RawHandler,
    Reply,
    Upstream,
    read_request,
    refused,
    server_context,
    wait_for,
)

MIB = 1 << 20
SECRET = "real-key-4f1e9b7c2d"
IDLE = 2  # seconds
RULES = """
version: 1
rules:
  - name: keyed
    match: {host: [api.test, "*.bad.test"], path: /keyed/**}
    action: allow
    inject: [{credential: api, as: bearer}]
  - {name: tls, match: {host: ["**.api.test", api.test, "*.bad.test", 192.0.2.9]}, action: allow}
  - {name: plain, match: {host: api.test, scheme: http}, action: allow}
"""
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


def _self_signed(name: str) -> ssl.SSLContext:
    """Its own CA's certificate, for the right name."""
    return server_context(trustme.CA(), name)


def _dated(ca: trustme.CA, name: str, days: int) -> ssl.SSLContext:
    day = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(name, not_before=day, not_after=day + datetime.timedelta(hours=12)).configure_cert(context)
    return context


def _old(ca: trustme.CA, name: str, version: ssl.TLSVersion) -> ssl.SSLContext:
    """A right certificate, and a protocol that nobody should speak (RFC 8996)."""
    context = server_context(ca, name)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        context.maximum_version = version
    return context


def _weak(ca: trustme.CA, name: str) -> ssl.SSLContext:
    """TLS 1.2 without forward secrecy."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(name, key_type=trustme.KeyType.RSA).configure_cert(context)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("AES128-SHA:AES256-GCM-SHA384:@SECLEVEL=0")
    return context


@pytest.fixture(scope="module")
def bad(upstream_ca: trustme.CA) -> Iterator[dict[str, Upstream]]:
    contexts = {
        "expired": _dated(upstream_ca, "expired.bad.test", -7),
        "early": _dated(upstream_ca, "early.bad.test", 7),
        "self-signed": _self_signed("self-signed.bad.test"),
        "other-name": server_context(upstream_ca, "api.test"),
        "parent-name": server_context(upstream_ca, "bad.test", "*.parent-name.bad.test"),
        "top-wildcard": server_context(upstream_ca, "*.test"),
        "address": server_context(upstream_ca, "192.0.2.9"),
        "tls10": _old(upstream_ca, "tls10.bad.test", ssl.TLSVersion.TLSv1),
        "tls11": _old(upstream_ca, "tls11.bad.test", ssl.TLSVersion.TLSv1_1),
        "weak": _weak(upstream_ca, "weak.bad.test"),
    }
    with ExitStack() as stack:
        yield {name: stack.enter_context(Upstream(context)) for name, context in contexts.items()}


@pytest.fixture(scope="module")
def proxy(lane: str, make_proxy: Callable[..., Proxy], bad: dict[str, Upstream], _shared_upstream: Upstream) -> Proxy:
    _shared_upstream.reset()  # of what the module before this one left
    led = {f"{name}.bad.test:443": f"127.0.0.1:{upstream.port}" for name, upstream in bad.items()}
    led["192.0.2.9:443"] = f"127.0.0.1:{_shared_upstream.port}"  # whose certificate has names, and another address
    proxy = make_proxy(RULES, lane=lane, connect_to=led, limits={"idle": f"{IDLE}s"})
    proxy.agent("coder-1")
    proxy.agent("coder-2")
    proxy.credential("api", SECRET, "--host", "api.test", "--host", "*.bad.test")
    assert wait_for(lambda: proxy.get("https://api.test/keyed/x").status == 200)
    return proxy


BAD = [
    *("expired", "early", "self-signed", "other-name", "parent-name", "top-wildcard", "address"),
    *("tls10", "tls11", "weak"),
]


@pytest.mark.parametrize("name", BAD)
def test_who_does_not_prove_its_name_gets_nothing(proxy: Proxy, bad: dict[str, Upstream], name: str) -> None:
    """Neither request nor credential, by HTTP/1.1 nor HTTP/2, the first time nor the second."""
    host = f"{name}.bad.test"
    for _ in range(2):
        refused(proxy.get(f"https://{host}/keyed/x"), "upstream_tls")
    client = Http2(proxy.tunnel(host, alpn="h2"))
    refused(client.response(client.request("/keyed/x", authority=host)), "upstream_tls")
    assert bad[name].seen == []


def test_an_address_must_be_in_the_certificate(proxy: Proxy, upstream: Upstream) -> None:
    """A certificate for names proves no address."""
    refused(proxy.get("https://192.0.2.9/x"), "upstream_tls")
    assert upstream.seen == []


# What an upstream says is an answer to one request, and to nothing else.


def raw(upstream: Upstream, *parts: bytes, hold: bool = True) -> None:
    """Answer a connection's first request with `parts`; further ones by the handler, if it is not closed."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream.seen.append(await read_request(reader))
        for part in parts:
            writer.write(part)
            await writer.drain()
        while hold and await upstream.exchange(reader, writer):
            pass

    upstream.raw = serve


def get(connection: Connection, path: str = "/x") -> None:
    connection.send(f"GET {path} HTTP/1.1\r\nhost: api.test\r\n\r\n".encode())


POISON = b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\npoison"
SURPLUS = {
    "a second answer": OK + POISON,
    "an answer to come": OK + b"HTTP/1.1 200 OK\r\ncontent-le",
    "a body of 204": b"HTTP/1.1 204 No\r\n\r\n" + POISON,
    "a body of 304": b"HTTP/1.1 304 No\r\ncontent-length: 60\r\n\r\n" + POISON,
    "behind the last chunk": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n" + POISON,
    "behind the length": b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n" + POISON,
}


@pytest.mark.parametrize("case", SURPLUS)
def test_what_nobody_asked_for_answers_nobody(proxy: Proxy, upstream: Upstream, case: str) -> None:
    """Bytes behind an answer are not the next one's, for this agent or another, on this connection or another."""
    raw(upstream, SURPLUS[case])
    tunnel = proxy.tunnel("api.test")
    get(tunnel)
    assert b"poison" not in tunnel.response().body
    upstream.raw = None
    for agent in ("coder-1", "coder-2"):
        assert b"poison" not in proxy.get("https://api.test/next", agent=agent).body
    with contextlib.suppress(ConnectionError):
        get(tunnel, "/next")
        assert b"poison" not in tunnel.response().body


def test_what_comes_late_answers_nobody(proxy: Proxy, upstream: Upstream) -> None:
    """It is sent when the connection has been put away for the next one."""
    more = asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loops.append(asyncio.get_running_loop())
        upstream.seen.append(await read_request(reader))
        writer.write(OK)
        await more.wait()
        writer.write(POISON)
        await writer.drain()
        await reader.read()

    upstream.raw = serve
    tunnel = proxy.tunnel("api.test")
    get(tunnel)
    assert tunnel.response().body == b"ok"
    upstream.raw = None
    loops[0].call_soon_threadsafe(more.set)
    for _ in range(3):
        assert b"poison" not in proxy.get("https://api.test/next", agent="coder-2").body
    with contextlib.suppress(ConnectionError):
        get(tunnel)
        assert b"poison" not in tunnel.response().body


SPLITS = {
    "bare CR": b"x-a: 1\rx-evil: 1",
    "two CR": b"x-a: 1\r\rx-evil: 1",
    "folded": b"x-a: 1\r\n x-evil: 1",
    "NUL": b"x-a: 1\0x-evil: 1",
    "no colon": b"x-a: 1\r\nx-evil",
    "space before colon": b"x-a: 1\r\nx-evil : 1",
    "empty name": b"x-a: 1\r\n: x-evil",
    "vertical tab": b"x-a: 1\x0bx-evil: 1",
    "next line": b"x-a: 1\x85x-evil: 1",
    "location": b"location: /\rx-evil: 1\r\r<script>",
}


@pytest.mark.parametrize("case", SPLITS)
@pytest.mark.parametrize("path", ["/x", "/keyed/x"])
def test_a_header_cannot_become_two(proxy: Proxy, upstream: Upstream, case: str, path: str) -> None:
    """What the client gets is one answer, in which no line is one the upstream slipped in; or it is refused."""
    raw(upstream, b"HTTP/1.1 200 OK\r\n" + SPLITS[case] + b"\r\ncontent-length: 2\r\n\r\nok", hold=False)
    tunnel = proxy.tunnel("api.test")
    get(tunnel, path)
    response = tunnel.response()
    assert response.status in (200, 502)
    assert "x-evil" not in {name.strip().lower() for name, _ in response.headers}
    assert not re.search("[\r\0\x0b]", "".join(value for _, value in response.headers))
    assert response.status == 502 or response.body == b"ok"


LENGTHS = {
    "negative": b"content-length: -1",
    "plus": b"content-length: +2",
    "hexadecimal": b"content-length: 0x2",
    "list": b"content-length: 2, 3",
    "huge": b"content-length: 99999999999999999999999",
    "spaced": b"content-length: 2 2",
    "identity": b"transfer-encoding: identity\r\ncontent-length: 2",
    "chunked twice": b"transfer-encoding: chunked, chunked",
    "hidden": b"transfer-encoding: \x0bchunked",
    "chunked and not": b"transfer-encoding: chunked\r\ntransfer-encoding: identity",
}


@pytest.mark.parametrize("case", LENGTHS)
def test_an_answer_has_one_length(proxy: Proxy, upstream: Upstream, case: str) -> None:
    """Else the client might read another end than we do, and take the rest for the next answer."""
    raw(upstream, b"HTTP/1.1 200 OK\r\n" + LENGTHS[case] + b"\r\n\r\nok" + POISON, hold=False)
    tunnel = proxy.tunnel("api.test")
    get(tunnel)
    with contextlib.suppress(ConnectionError):
        response = tunnel.response()
        assert response.status == 502
    upstream.raw = None
    assert b"poison" not in proxy.get("https://api.test/next", agent="coder-2").body


# Without end, too large, too slow.


def memory(proxy: Proxy) -> int:
    """The most bytes it ever had."""
    assert proxy.process
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{proxy.process.pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


BOMB = bytes(256 * MIB)


@pytest.fixture(scope="module")
def bombs() -> dict[str, bytes]:
    once = gzip.compress(BOMB)
    return {
        "gzip": once,
        "gzip, gzip": gzip.compress(once),
        "br": brotli.compress(BOMB, quality=1),
        "zstd": zstandard.compress(BOMB),
    }


@pytest.mark.parametrize("coding", ["gzip", "gzip, gzip", "br", "zstd"])
def test_a_bomb_does_not_go_off_here(proxy: Proxy, upstream: Upstream, bombs: dict[str, bytes], coding: str) -> None:
    """A few KiB that decode to 256 MiB, where the answer must be searched and the client does not read: they are cut,
    or decoded no faster than they are taken. Others are answered meanwhile."""
    upstream.handler = lambda _: Reply(headers=[("content-encoding", coding)], body=bombs[coding])
    before = memory(proxy)
    tunnel = proxy.tunnel("api.test")
    get(tunnel, f"/keyed/{coding.replace(', ', '-')}")
    upstream.raw = None
    started = time.monotonic()
    assert proxy.get("https://a.api.test/x", agent="coder-2").status == 200
    assert time.monotonic() - started < 5
    tunnel.close()
    proxy.audit(path=f"/keyed/{coding.replace(', ', '-')}")
    assert memory(proxy) - before < 64 * MIB


def test_where_nothing_is_searched_a_bomb_passes_as_it_is(proxy: Proxy, upstream: Upstream) -> None:
    """Decoding is the client's own affair."""
    bomb = gzip.compress(bytes(MIB))
    upstream.handler = lambda _: Reply(headers=[("content-encoding", "gzip")], body=bomb)
    assert proxy.get("https://a.api.test/x").body == bomb


def endless(start: bytes, more: bytes, seconds: float, gone: list[int]) -> RawHandler:
    """Says `start`, then `more` every `seconds` until the proxy hangs up; then `gone` holds one entry."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        with contextlib.suppress(OSError, ssl.SSLError):
            writer.write(start)
            while not writer.is_closing() and not reader.at_eof():
                writer.write(more)
                await writer.drain()
                await asyncio.sleep(seconds)
        gone.append(1)

    return serve


ENDLESS = {
    "chunks": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"4000\r\n" + b"x" * 0x4000 + b"\r\n"),
    "until closed": (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 0x4000),
}


@pytest.mark.parametrize("case", ENDLESS)
@pytest.mark.parametrize("path", ["/x", "/keyed/x"])
def test_a_body_without_end_ends_with_its_client(proxy: Proxy, upstream: Upstream, case: str, path: str) -> None:
    """It streams, at the client's pace; when the client goes, so does the upstream's connection."""
    gone: list[int] = []
    upstream.raw = endless(*ENDLESS[case], 0, gone)
    before = memory(proxy)
    tunnel = proxy.tunnel("api.test")
    get(tunnel, path)
    taken = 0
    while taken < 8 * MIB:
        taken += len(tunnel.recv())
    tunnel.close()
    wait_for(lambda: gone, "the upstream's end")
    assert memory(proxy) - before < 32 * MIB


HEADS = {
    "header lines": (b"HTTP/1.1 200 OK\r\n", b"x-filler: " + b"y" * 1000 + b"\r\n"),
    "one line": (b"HTTP/1.1 200 OK\r\nx: ", b"y" * 1000),
    "1xx": (b"", b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n"),
    "line feeds": (b"", b"\r\n" * 500),
}


@pytest.mark.parametrize("case", HEADS)
def test_a_head_without_end_is_given_up(proxy: Proxy, upstream: Upstream, case: str) -> None:
    """After 256 KiB, or some 1xx answers."""
    gone: list[int] = []
    upstream.raw = endless(*HEADS[case], 0, gone)
    refused(proxy.get("https://api.test/x"), "upstream_unreachable")
    wait_for(lambda: gone, "the upstream's end")


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 O", b"HTTP/1.1 200 OK\r\nx: "], ids=["status line", "header"])
def test_a_head_that_drips_is_given_up(proxy: Proxy, upstream: Upstream, start: bytes) -> None:
    """Every byte is a sign of life, but a head has a time in all: limits.idle, or 30 s where that is more."""
    gone: list[int] = []
    upstream.raw = endless(start, b"K", 0.1, gone)
    started = time.monotonic()
    refused(proxy.get("https://api.test/x"), "upstream_timeout")
    assert time.monotonic() - started < 3 * IDLE
    wait_for(lambda: gone, "the upstream's end")


def test_a_body_that_stands_still_is_cut(proxy: Proxy, upstream: Upstream) -> None:
    """After limits.idle; the client sees that something is missing."""

    async def stall(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
        await reader.read()

    upstream.raw = stall
    tunnel = proxy.tunnel("api.test")
    get(tunnel)
    with pytest.raises(ConnectionError):
        tunnel.response()


def test_an_upstream_that_takes_nothing_is_given_up(proxy: Proxy, upstream: Upstream) -> None:
    """It accepts an upload and never reads it: after limits.idle the client is told, or cut."""

    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(600)

    upstream.raw = deaf
    tunnel = proxy.tunnel("api.test")
    tunnel.sock.settimeout(0.5)
    head = b"POST /deaf HTTP/1.1\r\nhost: api.test\r\ncontent-length: 1000000000\r\n\r\n"
    with contextlib.suppress(OSError):
        tunnel.send(head)
        while True:
            tunnel.send(b"x" * MIB)
    (line,) = proxy.audit(path="/deaf")
    assert (line["reason"], line["status"]) == ("upstream_timeout", 504)
    assert line["duration_ms"] < 3000 * IDLE


@pytest.mark.parametrize("ending", ["close", "keep"])
@pytest.mark.parametrize("path", ["/early", "/keyed/early"])
def test_an_upstream_may_answer_before_it_has_read(proxy: Proxy, upstream: Upstream, ending: str, path: str) -> None:
    """The client gets the answer although it is still sending; nothing of its body is the next request."""

    async def hasty(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\n\r\nno!")
        await writer.drain()
        if ending == "keep":
            await reader.read()

    upstream.raw = hasty
    tunnel = proxy.tunnel("api.test")
    smuggled = b"GET /smuggled HTTP/1.1\r\nhost: api.test\r\n\r\n"
    tunnel.send(f"POST {path} HTTP/1.1\r\nhost: api.test\r\ncontent-length: 5000000\r\n\r\n".encode() + smuggled)
    response = tunnel.response()
    assert (response.status, response.body) == (413, b"no!")
    assert tunnel.closed()
    upstream.raw = None
    assert proxy.get("https://api.test/next", agent="coder-2").json()["target"] == "/next"
    assert "/smuggled" not in [seen.target for seen in upstream.seen]


@pytest.mark.parametrize("scheme", ["https", "h2"])
def test_a_handshake_that_stands_still_is_given_up(lane: str, make_proxy: Callable[..., Proxy], scheme: str) -> None:
    """After limits.idle where that is less than 10 s."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        stalled = make_proxy(
            RULES,
            lane=lane,
            connect_to={"stalled.bad.test:443": f"127.0.0.1:{silent.getsockname()[1]}"},
            limits={"idle": f"{IDLE}s"},
        )
        stalled.agent()
        started = time.monotonic()
        if scheme == "https":
            response = stalled.get("https://stalled.bad.test/x")
        else:
            client = Http2(stalled.tunnel("stalled.bad.test", alpn="h2"))
            response = client.response(client.request("/x", authority="stalled.bad.test"))
        refused(response, "upstream_timeout")
        assert time.monotonic() - started < 4 * IDLE
