"""HTTP/2 from the sandbox: decided as HTTP/1.1 is, and each stream for itself."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
import time
from collections.abc import Callable, Iterator

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import pytest
import trustme

from tests.h2client import Headers, Http2
from tests.harness import Proxy, Reply, Upstream, read_request, refused, server_context, wait_for

SECRET = "real-key-4f1e9b7c2d"
CLEAN = "[redacted:api]"
RULES = """
version: 1
rules:
  - {name: api, match: {host: [api.test, two.test], path: /v1/**}, action: allow}
  - name: keyed
    match: {host: [api.test, two.test], path: /keyed/**}
    action: allow
    inject: [{credential: api, as: bearer}]
  - name: marked
    match: {host: [api.test, two.test], path: /marked/**}
    action: allow
    inject: [{credential: api, as: {placeholder: {in: [header, body]}}}]
"""
MARK = "slp_placeholder_api"


class Upstream2(Upstream):
    """An upstream that speaks HTTP/2: echoes the body, and the credential in a header and in a trailer."""

    heard: list[tuple[list[tuple[str, str]], bytes]]
    stalled = False

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        conn = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        conn.initiate_connection()
        requests: dict[int, tuple[list[tuple[str, str]], bytes]] = {}
        with contextlib.suppress(OSError, ssl.SSLError, h2.exceptions.ProtocolError):
            writer.write(conn.data_to_send())
            while data := await reader.read(65536):
                for event in conn.receive_data(data):
                    match event:
                        case h2.events.RequestReceived():
                            requests[event.stream_id] = list(event.headers), b""
                        case h2.events.DataReceived():
                            headers, body = requests[event.stream_id]
                            requests[event.stream_id] = headers, body + event.data
                            if not self.stalled:
                                conn.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                        case h2.events.TrailersReceived():
                            headers, body = requests[event.stream_id]
                            requests[event.stream_id] = [*headers, *event.headers], body
                        case h2.events.StreamEnded():
                            self._answer(conn, event.stream_id, *requests.pop(event.stream_id))
                writer.write(conn.data_to_send())
        with contextlib.suppress(OSError, ssl.SSLError):
            writer.close()

    def _answer(
        self, conn: h2.connection.H2Connection, stream: int, headers: list[tuple[str, str]], body: bytes
    ) -> None:
        self.heard.append((headers, body))
        told = dict(headers).get("authorization", "none")
        conn.send_headers(stream, [(":status", "200"), ("x-echo", told)])
        conn.send_data(stream, body or b"ok")
        conn.send_headers(stream, [("grpc-status", "0"), ("grpc-message", told)], end_stream=True)


@pytest.fixture(scope="module")
def upstream2(upstream_ca: trustme.CA) -> Iterator[Upstream2]:
    context = server_context(upstream_ca, "two.test")
    context.set_alpn_protocols(["h2"])
    with Upstream2(context) as upstream:
        yield upstream


@pytest.fixture(scope="module")
def proxy(lane: str, make_proxy: Callable[..., Proxy], upstream2: Upstream2) -> Proxy:
    proxy = make_proxy(RULES, lane=lane, connect_to={"two.test:443": f"127.0.0.1:{upstream2.port}"})
    proxy.agent()
    proxy.credential("api", SECRET, "--host", "api.test", "--host", "two.test")
    return proxy


@pytest.fixture
def client(proxy: Proxy) -> Http2:
    return Http2(proxy.tunnel("api.test", alpn="h2"))


@pytest.fixture
def client2(proxy: Proxy, upstream2: Upstream2) -> Http2:
    """To the upstream that speaks HTTP/2 too."""
    upstream2.heard, upstream2.connections = [], 0
    return Http2(proxy.tunnel("two.test", alpn="h2"))


def test_requests_are_allowed_refused_and_injected(proxy: Proxy, client: Http2, upstream: Upstream) -> None:
    """On one connection; what comes back is redacted, in headers and body."""
    upstream.handler = lambda seen: Reply(headers=[("x-echo", SECRET)], body=str(seen.headers).encode())
    allowed, blocked, keyed = client.responses(map(client.request, ("/v1/x", "/v2/x", "/keyed/x")))
    assert allowed.status == 200
    error = refused(blocked, "no_rule")
    assert blocked.header("connection") is None
    assert keyed.header("x-echo") == CLEAN
    assert f"Bearer {CLEAN}" in keyed.body.decode()
    assert SECRET not in keyed.body.decode()
    assert [seen.target for seen in upstream.seen] == ["/v1/x", "/keyed/x"]
    assert upstream.seen[1].header("authorization") == [f"Bearer {SECRET}"]
    (line,) = proxy.audit(id=error["request_id"])
    assert (line["path"], line["status"]) == ("/v2/x", 403)


def test_streams_do_not_wait_for_each_other(client: Http2, upstream: Upstream) -> None:
    """More of them than mitmproxy gives connections to one place: the upstream answers when all are there."""
    waiting, all_there = [], asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen = await read_request(reader)
        waiting.append(seen)
        if len(waiting) == 12:
            all_there.set()
        await all_there.wait()
        body = seen.target.encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        await writer.drain()

    upstream.raw = serve
    paths = [f"/v1/{number}" for number in range(12)]
    responses = client.responses([client.request(path) for path in paths])
    assert [response.body.decode() for response in responses] == paths


def test_a_refused_upload_does_not_hold_up_the_others(client: Http2, upstream: Upstream) -> None:
    """It is answered at once, and what still comes of it is dropped."""
    upload = client.request("/v2/x", method="POST", end=False)
    refused(client.response(upload), "no_rule")
    other = client.request("/v1/x")
    for _ in range(20):
        client.h2.send_data(upload, b"x" * 1000)
    client.flush()
    assert client.response(other).status == 200
    client.h2.end_stream(upload)
    client.flush()
    assert client.response(client.request("/v1/x")).status == 200
    assert len(upstream.seen) == 2


@pytest.mark.parametrize("headers", [[], [("content-length", "44")]], ids=["no length", "length"])
def test_a_body_is_no_further_request(client: Http2, upstream: Upstream, headers: Headers) -> None:
    """HTTP/2 needs no length; a body sent bare to an HTTP/1.1 upstream would be read as the next request."""
    body = b"DELETE /v2/x HTTP/1.1\r\nHost: api.test\r\n\r\nGE"
    response = client.response(
        client.request("/v1/x", method="POST", headers=headers, body=body + b" /"[: 44 - len(body)])
    )
    assert response.status == 200
    assert [(seen.method, seen.target) for seen in upstream.seen] == [("POST", "/v1/x")]
    assert upstream.seen[0].body.startswith(body)


@pytest.mark.parametrize("length", [True, False], ids=["length", "no length"])
def test_a_placeholder_in_a_body_is_replaced(client: Http2, upstream: Upstream, length: bool) -> None:
    """Held where its length must be told, streamed otherwise; framed either way."""
    body = f'{{"key": "{MARK}"}}'.encode()
    headers = [("content-length", str(len(body)))] if length else []
    assert client.response(client.request("/marked/x", method="POST", headers=headers, body=body)).status == 200
    assert upstream.seen[0].body == f'{{"key": "{SECRET}"}}'.encode()
    assert upstream.seen[0].header("content-length") == ([str(len(upstream.seen[0].body))] if length else [])


@pytest.mark.parametrize(
    "answer", [b"", b"SSH-2.0 " + SECRET.encode() + b"\r\n\r\n", b"HTTP/1.1 101 X\r\n\r\n"], ids=str
)
def test_an_answer_that_is_none_is_a_bad_gateway(client: Http2, upstream: Upstream, answer: bytes) -> None:
    """For that stream only, in our words."""
    upstream.handler = lambda _: Reply(raw=answer)
    response = client.response(client.request("/keyed/x"))
    refused(response, "upstream_unreachable")
    upstream.reset()
    assert client.response(client.request("/v1/x")).status == 200


def test_a_body_that_was_cut_short_looks_so(client: Http2, upstream: Upstream) -> None:
    """Its stream is reset."""
    upstream.handler = lambda _: Reply(raw=b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nonly this")
    with pytest.raises(ConnectionError):
        client.response(client.request("/v1/x"))
    upstream.reset()
    assert client.response(client.request("/v1/x")).status == 200


def test_a_stream_that_the_client_gives_up_ends_alone(proxy: Proxy, client: Http2, upstream: Upstream) -> None:
    """And is no failure of the upstream."""
    asked = len(upstream.seen)

    async def silence(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        upstream.seen.append(await read_request(reader))
        await reader.read()

    upstream.raw = silence
    stream = client.request("/v1/given-up")
    wait_for(lambda: len(upstream.seen) > asked)
    client.h2.reset_stream(stream)
    client.flush()
    (line,) = proxy.audit(path="/v1/given-up")
    assert (line["verdict"], line["reason"], line["status"]) == ("allow", "allowed", None)
    upstream.reset()
    assert client.response(client.request("/v1/x")).status == 200


def test_http_2_to_the_upstream(client2: Http2, upstream2: Upstream2) -> None:
    """Many streams on one connection, with trailers back, in which secrets are redacted too."""
    responses = client2.responses(
        [client2.request("/keyed/x", "two.test", "POST", body=b"%d" % number) for number in range(20)]
    )
    assert [response.body for response in responses] == [b"%d" % number for number in range(20)]
    assert all(response.header("x-echo") == f"Bearer {CLEAN}" for response in responses)
    assert all(("grpc-message", f"Bearer {CLEAN}") in trailers for trailers in client2.trailers.values())
    assert all(("grpc-status", "0") in trailers for trailers in client2.trailers.values())
    assert len(client2.trailers) == 20
    assert upstream2.connections == 1
    assert {dict(headers)["authorization"] for headers, _ in upstream2.heard} == {f"Bearer {SECRET}"}


def test_trailers_of_a_request_are_dropped(client2: Http2, upstream2: Upstream2, upstream: Upstream) -> None:
    """They come when all was decided."""
    stream = client2.request("/v1/x", "two.test", "POST", body=b"hello", end=False)
    client2.h2.send_headers(stream, [("authorization", "Bearer mine"), ("x-late", "1")], end_stream=True)
    client2.flush()
    assert client2.response(stream).status == 200
    assert "x-late" not in dict(upstream2.heard[0][0])
    assert "authorization" not in dict(upstream2.heard[0][0])


def test_trailers_of_a_request_do_not_reach_an_older_upstream(client: Http2, upstream: Upstream) -> None:
    """Nor end the connection."""
    stream = client.request("/v1/x", method="POST", body=b"hello", end=False)
    client.h2.send_headers(stream, [("x-late", "1")], end_stream=True)
    client.flush()
    assert client.response(stream).status == 200
    assert (upstream.seen[0].body, upstream.seen[0].header("x-late")) == (b"hello", [])


def test_a_client_that_does_not_read_holds_the_upstream_back(client: Http2, upstream: Upstream) -> None:
    """Its window is shut: what does not fit must wait at the upstream, not in the proxy's memory."""
    sent = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (24 << 20))
        for sent in range(1, 25):
            writer.write(b"x" * (1 << 20))
            await writer.drain()

    upstream.raw = serve
    stream = client.request("/v1/big")
    wait_for(lambda: sent > 2)
    assert wait_for(lambda: still(lambda: sent)) < 20
    assert len(client.response(stream).body) == 24 << 20


def test_an_upstream_that_does_not_read_holds_the_client_back(client2: Http2, upstream2: Upstream2) -> None:
    """And when it reads again all of it arrives."""
    client2.response(client2.request("/v1/first", "two.test"))
    upstream2.stalled = True
    stream = client2.request("/v1/big", "two.test", "POST", end=False)
    client2.connection.sock.settimeout(1)
    sent = 0
    with pytest.raises(TimeoutError):
        while sent < 64 << 20:
            client2.h2.send_data(stream, bytes(16384))
            client2.connection.send(client2.h2.data_to_send())
            sent += 16384
    assert sent < 20 << 20
    upstream2.stalled = False


def still(value: Callable[[], int]) -> int:
    """The value once it has not changed for 0.4 seconds, else 0."""
    first, deadline = value(), time.monotonic() + 0.4
    while value() == first and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    return first if value() == first else 0
