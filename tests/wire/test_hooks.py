"""A mistake in any hook refuses: mitmproxy would log it and let the request go on."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.h2client import Http2
from tests.harness import Connection, Proxy, Reply, Response, Upstream, read_request, refused, wait_for
from tests.wire.test_websocket import HANDSHAKE

SECRET = "real-key-4f1e9b7c2d"
RULES = """
version: 1
rules:
  - name: keyed
    match: {host: [api.test, closed.test], websocket: true}
    action: allow
    inject: [{credential: api, as: bearer}]
  - name: unopened
    match: {host: unopened.test}
    action: allow
    inject: [{credential: unopened, as: bearer}]
  - {name: plain, match: {host: api.test, scheme: http}, action: allow}
"""
BEFORE = ("client_connected", "http_connect", "requestheaders", "request")
BEFORE_MITMPROXY = ("next_layer", "tls_clienthello", "tls_start_client", "server_connect", "tls_start_server")
BEFORE_INNER = ("addon:Addon._identify", "flow:view_of", "flow:write_request", "gateway:Gateway.approve")
BEFORE_INNER += ("vault:Vault.check", "upstream:Upstream.addresses")
AFTER = ("responseheaders", "flow:clean_response_headers", "redact:Replacer.finds")
REPLAYED = ("recall", "may_leave", "answer")
STREAMED = ("redact:BodyRedactor.feed", "redact:BodyRedactor.finish")
LAST = ("response", "client_disconnected", "addon:Addon._record", "metrics:Metrics.record", "audit:Audit.record")

ON_FAILURE, ON_WEBSOCKET = ("error", "server_connect_error"), ("websocket_message", "websocket_end")
ONCE = itertools.count()
EVERY_HOOK = [
    name for name in (*BEFORE, *BEFORE_MITMPROXY, *AFTER, *LAST, *ON_FAILURE, *ON_WEBSOCKET) if ":" not in name
]


@pytest.fixture(scope="module")
def proxy(lane: str, make_proxy: Callable[..., Proxy], _shared_upstream: Upstream) -> Proxy:
    _shared_upstream.reset()  # of what the module before this one left
    proxy = make_proxy(RULES, lane=lane, connect_to={"closed.test:443": "127.0.0.1:1"}, start=False)
    proxy.module = "tests.wire.planted"
    proxy.environment["PLANT"] = str(proxy.folder / "plant")
    (proxy.folder / "plant").write_text("")
    proxy.start()
    proxy.agent()
    proxy.credential("api", SECRET, "--host", "api.test", "--host", "closed.test")
    proxy.credential("unopened", SECRET, "--host", "unopened.test")
    assert get(proxy).status == 200
    return proxy


@pytest.fixture
def plant(proxy: Proxy, upstream: Upstream) -> Iterator[Callable[[str], None]]:
    """Let the named function raise until the test is over; after it the proxy works."""
    file = Path(proxy.environment["PLANT"])
    yield lambda name: void(file.write_text(f"proxy.{name}" if ":" in name else name))
    file.write_text("")
    upstream.reset()
    assert get(proxy).status == 200


def void(_: object) -> None:
    return None


def get(proxy: Proxy, body: bytes | None = None, host: str = "api.test") -> Response:
    """One that is decided: nothing like it was asked before."""
    headers = {"x-once": str(next(ONCE))}
    return proxy.get(f"https://{host}/x", method="POST" if body else "GET", headers=headers, body=body)


def attempt(proxy: Proxy, body: bytes | None = None, *, http2: bool = False) -> Response | None:
    """The answer, if there is one."""
    try:
        if http2:
            client = Http2(proxy.tunnel("api.test", alpn="h2"))
            return client.response(client.request("/x"))
        return get(proxy, body)
    except (OSError, AssertionError):  # cut, or CONNECT was refused
        return None


@pytest.mark.parametrize("name", BEFORE + BEFORE_MITMPROXY + BEFORE_INNER)
def test_what_fails_before_the_upstream_keeps_the_request_from_it(
    proxy: Proxy, upstream: Upstream, plant: Callable[[str], None], name: str
) -> None:
    """Refused as internal, or cut; nobody upstream sees a request."""
    plant(name)
    response = attempt(proxy, http2=name in BEFORE_MITMPROXY)
    if response:
        refused(response, "internal")
        assert SECRET not in response.body.decode()
    assert upstream.seen == []
    assert SECRET not in proxy.stderr_text()


@pytest.mark.parametrize("name", REPLAYED)
def test_what_fails_when_a_request_is_asked_again_keeps_it_or_its_answer(
    make_proxy: Callable[..., Proxy], proxy: Proxy, upstream: Upstream, plant: Callable[[str], None], name: str
) -> None:
    """A mistake in what spares deciding: it cuts. On mitmproxy's stack all is decided."""
    with closing(proxy.tunnel("api.test")) as connection:
        for asked in range(4):
            if asked == 3:
                upstream.seen.clear()
                plant(f"replay:Replays.{name}")
            body = b"again%d" % (asked > 1)
            connection.send(b"POST /x HTTP/1.1\r\nhost: api.test\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
            if asked < 3 or "fast" not in proxy.config.read_text():
                assert connection.response().status == 200
            else:
                assert connection.closed()
    assert len(upstream.seen) == (0 if name in ("recall", "may_leave") and "fast" in proxy.config.read_text() else 1)


def test_what_fails_while_a_credential_is_opened_refuses(
    proxy: Proxy, upstream: Upstream, plant: Callable[[str], None]
) -> None:
    """Opening one waits for the store, in a coroutine of its own."""
    plant("vault:Vault.open")
    refused(get(proxy, host="unopened.test"), "internal")
    assert upstream.seen == []


@pytest.mark.parametrize("name", ["requestheaders", "request", "flow:view_of", "gateway:Gateway.approve"])
def test_a_failure_is_answered_where_that_is_possible(
    proxy: Proxy, upstream: Upstream, plant: Callable[[str], None], name: str
) -> None:
    """500 in band, and on record."""
    plant(name)
    error = refused(get(proxy), "internal")
    (line,) = proxy.audit(id=error["request_id"])
    assert (line["verdict"], line["reason"], line["status"]) == ("block", "internal", 500)
    assert line["injected"] == []
    assert upstream.connections == 0


@pytest.mark.parametrize("name", ["requestheaders", "request"])
def test_a_failure_on_a_request_with_a_body(
    proxy: Proxy, upstream: Upstream, plant: Callable[[str], None], name: str
) -> None:
    """What has left cannot be taken back, but no answer comes through."""
    upstream.handler = lambda _: Reply(body=f"you sent {SECRET}".encode())
    plant(name)
    response = attempt(proxy, b"x" * 200_000)
    if response:
        refused(response, "internal")
    assert name == "request" or upstream.connections == 0


@pytest.mark.parametrize(
    ("name", "chunked"), [(name, False) for name in AFTER] + [(name, True) for name in AFTER + STREAMED]
)
def test_what_fails_on_the_answer_keeps_it_from_the_sandbox(
    proxy: Proxy, upstream: Upstream, plant: Callable[[str], None], name: str, chunked: bool
) -> None:
    """It could hold a secret."""
    echo = f"you sent {SECRET}".encode()
    reply = (
        Reply(headers=[("x-echo", SECRET)], chunks=[echo])
        if chunked
        else Reply(headers=[("x-echo", SECRET)], body=echo)
    )
    upstream.handler = lambda _: reply
    plant(name)
    got = raw_answer(proxy)
    assert SECRET.encode() not in got
    assert b"you sent" not in got or name.endswith("finish")
    assert not got.endswith(b"0\r\n\r\n")  # it does not look complete
    assert len(upstream.seen) == 1


def raw_answer(proxy: Proxy) -> bytes:
    """Every byte that reaches the sandbox."""
    with closing(proxy.tunnel("api.test")) as tunnel:
        tunnel.send(b"GET /x HTTP/1.1\r\nhost: api.test\r\nconnection: close\r\n\r\n")
        return tunnel.rest()


@pytest.mark.parametrize("name", LAST)
def test_what_fails_at_the_end_leaves_no_secret_and_no_wreck(
    proxy: Proxy, upstream: Upstream, plant: Callable[[str], None], name: str
) -> None:
    """The answer is there or it is not; the next request works."""
    upstream.handler = lambda _: Reply(headers=[("x-echo", SECRET)], body=f"you sent {SECRET}".encode())
    plant(name)
    assert SECRET.encode() not in raw_answer(proxy)
    assert SECRET not in proxy.stderr_text()


@pytest.mark.parametrize("name", ON_FAILURE)
def test_what_fails_on_a_failure_is_a_failure(proxy: Proxy, plant: Callable[[str], None], name: str) -> None:
    """The upstream is not there."""
    plant(name)
    try:
        response = get(proxy, host="closed.test")
    except OSError:
        return
    assert response.status in (500, 502)
    refused(response, response.code)


@pytest.mark.parametrize("name", ON_WEBSOCKET)
@pytest.mark.parametrize("from_client", [True, False], ids=["from the sandbox", "from the upstream"])
def test_what_fails_on_a_websocket_ends_it(
    proxy: Proxy, upstream: Upstream, plant: Callable[[str], None], name: str, from_client: bool
) -> None:
    """The message goes nowhere."""
    got = b""
    frame = b"\x81\x16you: " + SECRET.encode()[:16]

    async def serve(reader, writer) -> None:  # type: ignore[no-untyped-def]
        nonlocal got
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 101 X\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n")
        if not from_client:
            await reader.read(1)
            writer.write(frame if name == "websocket_message" else b"\x88\x00")
        while data := await reader.read(1000):
            got += data

    upstream.raw = serve
    tunnel = proxy.tunnel("api.test")
    tunnel.send(HANDSHAKE.format("/x").encode())
    assert tunnel.response().status == 101
    plant(name)
    message = b"\x81\x85\x00\x00\x00\x00hello"
    tunnel.send(message if name == "websocket_message" else b"\x88\x80\x00\x00\x00\x00")
    heard = tunnel.rest()
    if name == "websocket_message":
        assert heard == b""
        assert b"hello" not in unmasked(got)


def unmasked(data: bytes) -> bytes:
    """The payloads of short masked frames, run together."""
    out = b""
    while len(data) >= 6:
        size, mask = data[1] & 127, data[2:6]
        out += bytes(octet ^ mask[at % 4] for at, octet in enumerate(data[6 : 6 + size]))
        data = data[6 + size :]
    return out


@pytest.mark.parametrize("sent", [b"GARBAGE\r\n\r\n", b"GET / HTTP/1.1\r\nx y: z\r\n\r\n"])
def test_what_fails_on_bytes_that_are_no_request_ends_the_connection(
    proxy: Proxy, upstream: Upstream, plant: Callable[[str], None], sent: bytes
) -> None:
    """On the plain connection and inside a tunnel."""
    plant("addon:Addon.refuse_head")
    for connection in (proxy.connect(), proxy.tunnel("api.test")):
        connection.send(sent)
        assert closes(connection)
    assert upstream.connections == 0


def closes(connection: Connection) -> bool:
    return wait_for(lambda: not connection.recv())


def test_a_record_that_fails_leaves_no_connection_behind(
    proxy: Proxy, upstream: Upstream, plant: Callable[[str], None]
) -> None:
    """The agent would run out of them in time."""
    listener = f"{proxy.address[0]}:{proxy.address[1]}"
    before = proxy.metric("sallyport_connections", listener=listener)

    async def silence(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        upstream.seen.append(await read_request(reader))
        await reader.read()

    upstream.raw = silence
    tunnel = proxy.tunnel("api.test")
    tunnel.send(b"GET /x HTTP/1.1\r\nhost: api.test\r\n\r\n")
    wait_for(lambda: upstream.seen)
    plant("addon:Addon._record")
    tunnel.close()
    wait_for(lambda: proxy.metric("sallyport_connections", listener=listener) <= before)
