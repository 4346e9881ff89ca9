"""A mistake in anything the drivers ask the addon, and in the hooks of failures, refuses or cuts, on both lanes."""

from __future__ import annotations

import contextlib
import inspect
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proxy.addon import Addon
from tests.attack.test_http2 import push, resets
from tests.h2client import Http2
from tests.harness import Connection, Proxy, Upstream, wait_for
from tests.wire import test_hooks
from tests.wire.planted import ENTRIES
from tests.wire.test_websocket import HANDSHAKE

pytestmark = pytest.mark.slow
SECRET = "real-key-4f1e9b7c2d"
RULES = """
version: 1
rules:
  - {name: pinned, action: allow, tls: passthrough, match: {host: [pinned.test, nowhere.test]}}
  - name: keyed
    match: {host: [api.test, other.test, wrong.test], websocket: true}
    action: allow
    inject: [{credential: api, as: bearer}]
"""
NEVER = {"tcp_start", "udp_start", "dns_request"}  # no layer that would call them is ever made
REDIRECTED = {"open_redirected"}  # asked by `tls_clienthello` and in the strand of a connection, where others raise
FAILURES = {"tls_failed_client": "mitmproxy", "tls_failed_server": "mitmproxy"}


@pytest.fixture(scope="module")
def proxy(lane: str, make_proxy: Callable[..., Proxy], _shared_upstream: Upstream) -> Proxy:
    led = {f"{name}.test:443": f"127.0.0.1:{_shared_upstream.port}" for name in ("pinned", "wrong")}
    proxy = make_proxy(RULES, lane=lane, connect_to={**led, "nowhere.test:443": "127.0.0.1:1"}, start=False)
    proxy.module = "tests.wire.planted"
    proxy.environment["PLANT"] = str(proxy.folder / "plant")
    (proxy.folder / "plant").write_text("")
    proxy.start()
    proxy.agent()
    proxy.credential("api", SECRET, *(f"--host={name}.test" for name in ("api", "other", "wrong")))
    assert proxy.get("https://api.test/x").status == 200
    return proxy


@pytest.fixture
def planted(proxy: Proxy, upstream: Upstream) -> Iterator[Callable[[str], Path]]:
    """Lets the named function raise until the test is over; the file is there once it did. After it the proxy works."""
    file = Path(proxy.environment["PLANT"])
    met = file.with_suffix(".met")
    met.unlink(missing_ok=True)

    def plant(name: str) -> Path:
        file.write_text(f"proxy.addon:Addon.{name}" if name in ENTRIES else name)
        return met

    yield plant
    file.write_text("")
    upstream.reset()
    assert proxy.get("https://api.test/x").status == 200
    assert SECRET not in proxy.stderr_text()


def accepted(proxy: Proxy, host: str) -> Connection:
    """An accepted CONNECT, with nothing in it yet."""
    connection = proxy.connect()
    connection.send(f"CONNECT {host}:443 HTTP/1.1\r\nhost: {host}:443\r\n{proxy.auth('coder-1')}\r\n".encode())
    assert connection.response("CONNECT").status == 200
    return connection


def request(proxy: Proxy, version: str = "1.1", more: str = "", body: bytes = b"", host: str = "api.test") -> bytes:
    tunnel = proxy.tunnel(host)
    tunnel.send(f"GET /x HTTP/{version}\r\nhost: {host}\r\nconnection: close\r\n{more}\r\n".encode() + body)
    return tunnel.rest()


def http2(proxy: Proxy) -> bytes:
    client = Http2(proxy.tunnel("api.test", alpn="h2"))
    with contextlib.suppress(ConnectionError):
        return str(client.response(client.request("/x"))).encode()
    return b""


def flood(proxy: Proxy) -> bytes:
    client = Http2(proxy.tunnel("api.test", alpn="h2"))
    push(client, b"".join(frame.serialize() for frame in resets("/x")))
    return client.connection.rest()


def websocket(proxy: Proxy) -> bytes:
    """A message and a ping of it."""
    tunnel = proxy.tunnel("api.test")
    tunnel.send(HANDSHAKE.format("/x").encode())
    assert tunnel.response().status == 101
    tunnel.send(b"\x81\x85\x00\x00\x00\x00hello")
    return tunnel.rest()


def leak(proxy: Proxy) -> bytes:
    """A secret behind so much of a body that the rest is on its way."""
    size = b"%x\r\n"
    parts = [b"x" * 100_000, SECRET.encode(), b""]
    body = b"".join(size % len(part) + part + b"\r\n" for part in parts)
    return request(proxy, more="transfer-encoding: chunked\r\n", body=body)


def garbage(proxy: Proxy) -> bytes:
    tunnel = proxy.tunnel("api.test")
    tunnel.send(b"GARBAGE\r\n\r\n")
    return tunnel.rest()


def no_tls(proxy: Proxy) -> bytes:
    tunnel = accepted(proxy, "api.test")
    tunnel.send(b"SSH-2.0-x\r\n")
    return tunnel.rest()


def untrusting(proxy: Proxy) -> bytes:
    """A client that does not take our certificate."""
    tunnel = accepted(proxy, "api.test")
    with pytest.raises(ssl.SSLCertVerificationError):
        tunnel.start_tls(ssl.create_default_context(), "api.test")
    return b""


def passed(proxy: Proxy, host: str) -> bytes:
    """TLS through a tunnel that is passed through; the server's certificate must be the upstream's own."""
    tunnel = accepted(proxy, host)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        tunnel.start_tls(context, host)
    except OSError:
        return b""
    tunnel.send(b"GET /x HTTP/1.1\r\nhost: %s\r\nconnection: close\r\n\r\n" % host.encode())
    return tunnel.rest()


SCENES: dict[str, Callable[[Proxy], bytes]] = {
    "enter_tunnel": http2,
    "http_layer": http2,
    "may_send": websocket,
    "may_pass": lambda proxy: passed(proxy, "pinned.test"),
    "pass_through": lambda proxy: passed(proxy, "pinned.test"),
    "passage_failed": lambda proxy: passed(proxy, "nowhere.test"),
    "is_mismatched": lambda proxy: request(proxy, version="1.0"),
    "wants_close": lambda proxy: request(proxy, host="b.api.test"),
    "refuse": lambda proxy: request(proxy, host="b.api.test"),
    "refuse_head": garbage,
    "refuse_tunnel": no_tls,
    "refuse_flood": flood,
    "stop_body": leak,
    "tls_failed_client": untrusting,
    "tls_failed_server": lambda proxy: request(proxy, host="wrong.test"),
}


@pytest.mark.parametrize("name", [*ENTRIES, *FAILURES])
def test_what_fails_there_lets_nothing_through(
    proxy: Proxy, upstream: Upstream, planted: Callable[[str], Path], lane: str, name: str
) -> None:
    """The connection ends, and nobody upstream saw a whole request."""
    messages: list[bytes] = []

    async def serve(reader, writer) -> None:  # type: ignore[no-untyped-def]
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 101 X\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n")
        while data := await reader.read(1000):
            messages.append(data)

    if name == "may_send":
        upstream.raw = serve
    met = planted(name)
    got = b""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        got = SCENES.get(name, request)(proxy)
    by = {**ENTRIES, **FAILURES}[name]
    if by in ("both", lane):
        wait_for(met.exists, "the mistake")
    if met.exists():
        assert b" 200 " not in got
        assert SECRET.encode() not in got
        assert upstream.seen == []
        assert messages == []


def test_no_entry_and_no_hook_is_left_out() -> None:
    """Whoever adds one says here what a mistake in it does."""
    parts = inspect.getmembers_static(Addon)
    hooks = {name for name, hook in parts if hasattr(hook, "__wrapped__") and inspect.isfunction(hook)}
    public = {name for name, _ in parts if name[0] != "_" and callable(getattr(Addon, name))}
    assert public - hooks == ENTRIES.keys() | NEVER | REDIRECTED
    assert hooks == {*test_hooks.EVERY_HOOK, *FAILURES}
