"""HTTP/2 as a weapon: floods and bombs end the attacker's connection and nobody else's; tricks reach nobody."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import h2.settings
import pytest
import trustme
from hpack import Encoder
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    PushPromiseFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from tests.h2client import Http2
from tests.harness import Proxy, Reply, Upstream, refused, server_context

RULES = """
version: 1
rules:
  - {name: api, match: {host: [api.test, two.test], path: /v1/**}, action: allow}
"""
PATIENT = 1.0  # seconds the victim may wait; undefended it waits for four and more
BIG = 1 << 31


@pytest.fixture(scope="module")
def upstream2(upstream_ca: trustme.CA) -> Iterator[Upstream]:
    """two.test, which negotiates HTTP/2; each test says what it does with it."""
    context = server_context(upstream_ca, "two.test")
    context.set_alpn_protocols(["h2"])
    with Upstream(context) as upstream:
        yield upstream


@pytest.fixture(scope="module")
def proxy(lane: str, make_proxy: Callable[..., Proxy], upstream2: Upstream) -> Proxy:
    return make_proxy(RULES, lane=lane, connect_to={"two.test:443": f"127.0.0.1:{upstream2.port}"})


@pytest.fixture
def attacker(proxy: Proxy, request: pytest.FixtureRequest) -> str:
    """An agent of its own for each test: what one has spent is not given back at once."""
    name = f"attacker-{abs(hash(request.node.name)) % 1_000_000}"
    proxy.agent(name)
    return name


@pytest.fixture(scope="module")
def spender(proxy: Proxy) -> str:
    """An agent for tests that spend nothing."""
    proxy.agent("spender-1")
    return "spender-1"


@pytest.fixture
def client(proxy: Proxy, attacker: str, upstream: Upstream) -> Http2:
    client = Http2(proxy.tunnel("api.test", agent=attacker, alpn="h2"))
    assert client.response(client.request("/v1/first")).status == 200
    upstream.seen.clear()
    return client


def block(*extra: tuple[str, str], path: str = "/v1/x", method: str = "GET") -> bytes:
    """A request's header block that needs no table."""
    head = [(":method", method), (":scheme", "https"), (":authority", "api.test"), (":path", path)]
    return bytes(Encoder().encode([*head, *extra]))


def headers(stream: int, data: bytes, *flags: str) -> HeadersFrame:
    return HeadersFrame(stream, data=data, flags=["END_HEADERS", *flags])


class Unknown(Frame):
    """A frame of a type nobody knows (RFC 9113 section 4.1: it is ignored)."""

    type = 0xBE
    defined_flags = ()
    stream_association = None

    def serialize_body(self) -> bytes:
        return b"x"


def resets(path: str) -> Iterator[Frame]:
    for stream in range(3, 8003, 2):
        yield headers(stream, block(path=path), "END_STREAM")
        yield RstStreamFrame(stream, error_code=8)


def own_resets() -> Iterator[Frame]:
    """The proxy itself is made to reset each stream: its window is more than full."""
    for stream in range(3, 4003, 2):
        yield headers(stream, block(method="POST"))
        yield WindowUpdateFrame(stream, window_increment=BIG - 1)


def continuation(size: int, times: int) -> Iterator[Frame]:
    yield HeadersFrame(3, data=block())
    for _ in range(times):
        yield ContinuationFrame(3, data=b"\x00\x01x\x01y"[:size] * (size // 5))


def empty_data() -> Iterator[Frame]:
    yield headers(3, block(method="POST"))
    for _ in range(20_000):
        yield DataFrame(3, data=b"")


def table_bomb() -> Iterator[Frame]:
    """One header of 3 KB in the table, and then 16,000 references to it: 50 MB in 16 KB."""
    encoder = Encoder()
    stored = encoder.encode([(":method", "GET"), (":scheme", "https"), (":authority", "api.test"), (":path", "/v1/x")])
    stored += encoder.encode([("x-bomb", "b" * 3000)])
    yield headers(3, stored, "END_STREAM")
    for stream in range(5, 65, 2):
        yield headers(stream, block() + b"\xbe" * 16_000, "END_STREAM")


FLOODS: dict[str, Callable[[], Iterator[Frame]]] = {
    "streams opened and reset, CVE-2023-44487": lambda: resets("/v1/x"),
    "the same where each is refused": lambda: resets("/v2/x"),
    "streams that we must reset, CVE-2025-8671": own_resets,
    "a header block that never ends, CVE-2024-27316": lambda: continuation(16_000, 500),
    "one that grows by nothing": lambda: continuation(0, 20_000),
    "pings, CVE-2019-9512": lambda: (PingFrame(0, opaque_data=b"12345678") for _ in range(20_000)),
    "settings, CVE-2019-9515": lambda: (SettingsFrame(0, settings={4: 65535 + n % 9}) for n in range(20_000)),
    "priorities, CVE-2019-9513": lambda: (PriorityFrame(n | 1, depends_on=0) for n in range(20_000)),
    "empty frames, CVE-2019-9518": empty_data,
    "frames nobody knows": lambda: (Unknown(0) for _ in range(20_000)),
    "references to one large header, CVE-2016-6581": table_bomb,
}


@pytest.mark.parametrize("case", FLOODS)
def test_a_flood_ends_its_own_connection_and_nobody_waits(
    proxy: Proxy, attacker: str, client: Http2, upstream: Upstream, case: str
) -> None:
    """All is sent at once and nothing read; meanwhile another agent is served as before."""
    data = b"".join(frame.serialize() for frame in FLOODS[case]())
    assert slowest_beside(proxy, client, data) < PATIENT
    while not client.gone:
        client.pump()
    assert len([seen for seen in upstream.seen if seen.target != "/v1/victim"]) <= 220


def slowest_beside(proxy: Proxy, client: Http2, data: bytes) -> float:
    """Seconds that the slowest of another agent's requests took while `data` was sent, and a little longer."""
    victim = proxy.tunnel("api.test")
    sender = threading.Thread(target=push, args=(client, data))
    sender.start()
    slowest, until = 0.0, time.monotonic() + 1
    while sender.is_alive() or time.monotonic() < until:
        began = time.monotonic()
        victim.send(b"GET /v1/victim HTTP/1.1\r\nhost: api.test\r\n\r\n")
        assert victim.response().status == 200
        slowest = max(slowest, time.monotonic() - began)
    return slowest


def test_much_that_is_allowed_is_done_piece_by_piece(proxy: Proxy, client: Http2) -> None:
    """Windows opened byte by byte are no flood, and nobody waits for them either."""
    data = b"".join(WindowUpdateFrame(0, window_increment=1).serialize() for _ in range(40_000))
    assert slowest_beside(proxy, client, data) < PATIENT
    assert client.response(client.request("/v1/after")).status == 200


def test_a_flood_is_on_record(proxy: Proxy, attacker: str, client: Http2) -> None:
    """With its agent, as a limit that was exceeded."""
    push(client, b"".join(frame.serialize() for frame in resets("/v2/x")))
    (line,) = proxy.audit(agent=attacker, reason="limit_exceeded")
    assert (line["verdict"], line["host"], line["status"]) == ("block", "api.test", 429)
    assert proxy.metric("sallyport_limits_exceeded_total", agent=attacker, rule="_none", limit="http2") == 1


def test_what_an_agent_spent_is_spent_on_its_next_connection_too(proxy: Proxy, attacker: str, client: Http2) -> None:
    """Hanging up does not fill the budget again."""
    push(client, b"".join(frame.serialize() for frame in resets("/v2/x")))
    while not client.gone:
        client.pump()
    again = Http2(proxy.tunnel("api.test", agent=attacker, alpn="h2"))
    push(again, b"".join(frame.serialize() for frame in list(resets("/v2/x"))[:300]))
    while not again.gone:
        again.pump()


def test_a_header_table_of_any_size_is_offered_and_not_taken(client: Http2, upstream: Upstream) -> None:
    """The proxy would fill it with what an upstream sends, for as long as the connection lasts."""
    upstream.handler = lambda seen: Reply(headers=[("x-fill", seen.target.rpartition("/")[2] * 500)])
    client.h2.update_settings({h2.settings.SettingCodes.HEADER_TABLE_SIZE: 1 << 30})
    client.flush()
    for number in range(40):
        assert client.response(client.request(f"/v1/{number:03}")).status == 200
    assert client.h2.decoder.header_table._current_size <= 4096


def push(client: Http2, data: bytes) -> None:
    """Send everything, or as much as is taken."""
    with contextlib.suppress(OSError):
        client.connection.sock.sendall(data)


# Tricks with headers

M, S, A, P = (":method", "POST"), (":scheme", "https"), (":authority", "api.test"), (":path", "/v1/x")
GOOD = [M, S, A, P]
TRICKS: dict[str, list[tuple[str, str]]] = {
    "no method": [S, A, P],
    "no scheme": [M, A, P],
    "no path": [M, S, A],
    "no authority and no Host": [M, S, P],
    "two methods": [M, M, S, A, P],
    "two schemes": [M, S, S, A, P],
    "two authorities": [M, S, A, A, P],
    "two other authorities": [M, S, A, (":authority", "other.test"), P],
    "two paths": [M, S, A, P, (":path", "/v2/x")],
    "a path behind a header": [M, S, A, ("x-one", "a"), P],
    "a second path behind a header": [*GOOD, ("x-one", "a"), (":path", "/v2/x")],
    "a status": [*GOOD, (":status", "200")],
    "a pseudo-header nobody knows": [*GOOD, (":x", "a")],
    "a protocol": [*GOOD, (":protocol", "websocket")],
    "an empty path": [M, S, A, (":path", "")],
    "a path that is none": [M, S, A, (":path", "v1/x")],
    "a whole URL for a path": [M, S, A, (":path", "https://other.test/v1/x")],
    "an authority for a path": [M, S, A, (":path", "//other.test/v1/x")],
    "a line break in the path": [M, S, A, (":path", "/v1/x HTTP/1.1\r\nhost: other.test\r\n\r\n")],
    "a line feed in the path": [M, S, A, (":path", "/v1/x\nx-two: b")],
    "a NUL in the path": [M, S, A, (":path", "/v1/x\0")],
    "a fragment": [M, S, A, (":path", "/v1/x#y")],
    "an empty method": [(":method", ""), S, A, P],
    "a request line for a method": [(":method", "GET /v2/x HTTP/1.1\r\nx: y\r\n\r\nPOST"), S, A, P],
    "a space in the method": [(":method", "POST "), S, A, P],
    "cleartext": [M, (":scheme", "http"), A, P],
    "a scheme with a line break": [M, (":scheme", "https\r\nx: y"), A, P],
    "a URL for a scheme": [M, (":scheme", "https://other.test/"), A, P],
    "a line break in the authority": [M, S, (":authority", "api.test\r\nx-two: b"), P],
    "a user in the authority": [M, S, (":authority", "u@api.test"), P],
    "a path in the authority": [M, S, (":authority", "api.test/v2"), P],
    "an empty authority": [M, S, (":authority", ""), ("host", "other.test"), P],
    "another Host": [*GOOD, ("host", "other.test")],
    "two Hosts": [*GOOD, ("host", "api.test"), ("host", "other.test")],
    "a length with a sign": [*GOOD, ("content-length", "+5")],
    "a length twice": [*GOOD, ("content-length", "5"), ("content-length", "5")],
    "two lengths": [*GOOD, ("content-length", "5"), ("content-length", "6")],
    "a length that is too large": [*GOOD, ("content-length", "6")],
    "a length that is too small": [*GOOD, ("content-length", "4")],
    "chunks": [*GOOD, ("transfer-encoding", "chunked")],
    "connection": [*GOOD, ("connection", "close")],
    "keep-alive": [*GOOD, ("keep-alive", "5")],
    "upgrade": [*GOOD, ("upgrade", "websocket")],
    "a coding in te": [*GOOD, ("te", "gzip")],
    "a line break in a value": [*GOOD, ("x-one", "a\r\nx-two: b")],
    "a request in a value": [*GOOD, ("x-one", "a\r\n\r\nGET /v2/x HTTP/1.1\r\nhost: api.test")],
    "a carriage return in a value": [*GOOD, ("x-one", "a\rb")],
    "a line feed in a value": [*GOOD, ("x-one", "a\nb")],
    "a NUL in a value": [*GOOD, ("x-one", "a\0")],
    "a line break in a cookie": [*GOOD, ("cookie", "a=b\r\nx-two: b")],
    "a space in a name": [*GOOD, ("x one", "a")],
    "a line break in a name": [*GOOD, ("x-one: a\r\nx-two", "b")],
    "a colon in a name": [*GOOD, ("x:one", "b")],
    "an empty name": [*GOOD, ("", "b")],
    "a capital in a name": [*GOOD, ("X-One", "a")],
    "framing with an underscore": [*GOOD, ("content_length", "1")],
}


def sent(client: Http2, head: list[tuple[str, str]]) -> int:
    """A request with exactly this head, and five bytes of body."""
    push(client, headers(1, bytes(Encoder().encode(head))).serialize())
    push(client, DataFrame(1, data=b"hello", flags=["END_STREAM"]).serialize())
    client.h2.send_headers(1, GOOD, end_stream=True)  # so that our own state machine knows of it; it is not sent
    client.h2.clear_outbound_data_buffer()
    return 1


@pytest.mark.parametrize("case", TRICKS)
def test_a_malformed_head_reaches_nobody(proxy: Proxy, spender: str, upstream: Upstream, case: str) -> None:
    """It is refused, or its stream or its connection is ended (RFC 9113 section 8.1.1)."""
    client = Http2(proxy.tunnel("api.test", agent=spender, alpn="h2"))
    stream = sent(client, TRICKS[case])
    try:
        response = client.response(stream)
    except ConnectionError:
        pass
    else:
        assert response.status in (400, 403, 421), response
        refused(response, response.code)
    assert upstream.seen == []


def test_a_head_with_nothing_wrong_arrives(proxy: Proxy, spender: str, upstream: Upstream) -> None:
    """Sent in the same way as those above."""
    client = Http2(proxy.tunnel("api.test", agent=spender, alpn="h2"))
    assert client.response(sent(client, GOOD)).status == 200
    assert [(seen.method, seen.target, seen.body) for seen in upstream.seen] == [("POST", "/v1/x", b"hello")]


def test_methods_that_are_never_forwarded(proxy: Proxy, spender: str, upstream: Upstream) -> None:
    """TRACE in band; CONNECT has no path, which ends the connection."""
    client = Http2(proxy.tunnel("api.test", agent=spender, alpn="h2"))
    refused(client.response(client.request("/v1/x", method="TRACE")), "protocol_not_allowed")
    with pytest.raises(ConnectionError):
        client.response(client.request("", method="CONNECT"))
    assert upstream.connections == 0


# From an upstream


def answer(stream: int, *fields: tuple[str, str], end: str = "END_STREAM") -> HeadersFrame:
    return HeadersFrame(stream, data=bytes(Encoder().encode(fields)), flags=["END_HEADERS", end] if end else [])


def bomb() -> Iterator[Frame]:
    yield HeadersFrame(1, data=bytes(Encoder().encode([(":status", "200"), ("x-bomb", "b" * 3000)])) + b"\xbe" * 16_000)
    yield ContinuationFrame(1, data=b"\xbe" * 100, flags=["END_HEADERS"])


HOSTILE: dict[str, Callable[[], Iterator[Frame]]] = {
    "1xx without end": lambda: (answer(1, (":status", "103"), end="END_HEADERS") for _ in range(1000)),
    "101, which HTTP/2 does not have": lambda: iter([answer(1, (":status", "101"))]),
    "a header block that never ends": lambda: continuation_of_answer(16_000, 500),
    "references to one large header": bomb,
    "pings": lambda: (PingFrame(0, opaque_data=b"12345678") for _ in range(20_000)),
    "settings": lambda: (SettingsFrame(0, settings={4: 65535 + n % 9}) for n in range(20_000)),
    "frames nobody knows": lambda: (Unknown(0) for _ in range(20_000)),
    "a pushed answer": lambda: iter([PushPromiseFrame(1, promised_stream_id=2, data=block(), flags=["END_HEADERS"])]),
    "no status": lambda: iter([answer(1, ("x-one", "a"))]),
    "a status that is none": lambda: iter([answer(1, (":status", "2OO"))]),
    "two statuses": lambda: iter([answer(1, (":status", "200"), (":status", "201"))]),
    "a request": lambda: iter([headers(1, block(), "END_STREAM")]),
    "a line break in a value": lambda: iter([answer(1, (":status", "200"), ("x-one", "a\r\nx-two: b"))]),
    "the end": lambda: iter([GoAwayFrame(0, last_stream_id=0, error_code=0)]),
}


def continuation_of_answer(size: int, times: int) -> Iterator[Frame]:
    yield HeadersFrame(1, data=bytes(Encoder().encode([(":status", "200")])))
    for _ in range(times):
        yield ContinuationFrame(1, data=b"\x00\x01x\x01y" * (size // 5))


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_upstream_is_given_up(proxy: Proxy, spender: str, upstream2: Upstream, case: str) -> None:
    """The client is told at once, in our words, or its stream is reset; it can go on."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"SM\r\n\r\n")
        writer.write(SettingsFrame(0).serialize())
        kind = -1
        while kind != HeadersFrame.type:
            header = await reader.readexactly(9)
            kind = header[3]
            await reader.readexactly(int.from_bytes(header[:3]))
        writer.write(b"".join(frame.serialize() for frame in HOSTILE[case]()))
        await reader.read()

    upstream2.raw = serve
    client = Http2(proxy.tunnel("two.test", agent=spender, alpn="h2"))
    stream = client.request("/v1/x", "two.test")
    try:
        response = client.response(stream)
    except ConnectionError:
        assert stream in client.resets
    else:
        refused(response, "upstream_unreachable")
    assert client.response(client.request("/v2/x", "two.test")).status == 403
