"""A secret that an upstream sends back does not reach the sandbox, and nothing is held up by looking for it."""

from __future__ import annotations

import asyncio
import base64
import gzip
import itertools
import zlib
from collections.abc import Callable
from urllib.parse import quote, quote_plus

import brotli
import pytest
import zstandard

from tests.harness import Connection, Proxy, Reply, Response, Seen, Upstream

type Make = Callable[..., Proxy]

SECRET = "real/key+4f1e9b7c2d=="
MARK = b"[redacted:api]"
RULES = """
version: 1
rules:
  - name: injected
    match: {host: api.test}
    action: allow
    inject: [{credential: api, as: bearer}]
  - name: untouched
    match: {host: other.test}
    action: allow
"""
NUMBERS = itertools.count()
CODINGS: dict[str, Callable[[bytes], bytes]] = {
    "identity": lambda data: data,
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "br": brotli.compress,
    "zstd": lambda data: zstandard.ZstdCompressor().compress(data),
    "deflate": zlib.compress,
    "gzip, br": lambda data: brotli.compress(gzip.compress(data)),
}


@pytest.fixture(scope="module")
def proxy(make_proxy: Make, lane: str) -> Proxy:
    proxy = make_proxy(RULES, lane=lane)
    proxy.agent()
    proxy.credential("api", SECRET, "--host", "api.test")
    return proxy


def answers(upstream: Upstream, reply: Reply) -> None:
    upstream.handler = lambda _: reply


def get(proxy: Proxy, headers: dict[str, str] | None = None) -> Response:
    response = proxy.get("https://api.test/", headers=headers)
    assert SECRET.encode() not in response.body
    assert SECRET not in str(response.headers)
    return response


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_a_secret_in_a_body_is_replaced_however_it_is_cut_and_coded(
    proxy: Proxy, upstream: Upstream, coding: str, size: int
) -> None:
    """It comes out uncoded, and so without the header that says otherwise."""
    text = b"".join(b"%d %s, " % (number, SECRET.encode()) for number in range(20))
    body = CODINGS[coding](text)
    chunks = [body[at : at + size] for at in range(0, len(body), size)]
    headers = [("content-encoding", coding), ("content-type", "text/plain")]
    answers(upstream, Reply(headers=headers, chunks=chunks))
    response = get(proxy, {"accept-encoding": "gzip, br, zstd, deflate"})
    assert response.body == text.replace(SECRET.encode(), MARK)
    assert response.header("content-encoding") is None
    assert response.header("content-type") == "text/plain"


def test_a_body_of_known_length_is_replaced_too(proxy: Proxy, upstream: Upstream) -> None:
    """Its length, and digests of what it was, are no longer true."""
    told = [("content-md5", "x"), ("digest", "x"), ("content-digest", "x"), ("repr-digest", "x")]
    answers(upstream, Reply(headers=[*told, ("accept-ranges", "bytes"), ("etag", '"1"')], body=SECRET.encode()))
    response = get(proxy)
    assert response.body == MARK
    assert {name.lower() for name, _ in response.headers} - {"content-length", "transfer-encoding"} == {"etag"}


@pytest.mark.parametrize("before", range(3))
@pytest.mark.parametrize("after", range(3))
def test_base64_is_found_at_any_offset(proxy: Proxy, upstream: Upstream, before: int, after: int) -> None:
    encoded = base64.b64encode(b"x" * before + SECRET.encode() + b"y" * after)
    answers(upstream, Reply(body=b'{"auth": "' + encoded + b'"}'))
    response = get(proxy)
    assert MARK in response.body
    assert len(response.body) <= len(b'{"auth": "') + len(MARK) + 11, "at most what lies beside it"


@pytest.mark.parametrize("encode", [lambda text: quote(text, safe=""), quote, quote_plus])
def test_url_encoded_it_is_found_in_body_and_headers(
    proxy: Proxy, upstream: Upstream, encode: Callable[[str], str]
) -> None:
    answers(upstream, Reply(302, [("location", f"/next?key={encode(SECRET)}")], encode(SECRET).encode()))
    response = get(proxy)
    assert response.header("location") == "/next?key=[redacted:api]"
    assert response.body == MARK


def test_a_secret_in_headers_and_in_the_status_line_is_replaced(proxy: Proxy, upstream: Upstream) -> None:
    bearer = f"Bearer {SECRET}"
    head = f"HTTP/1.1 200 {SECRET}\r\nx-a: {bearer}\r\nX-A: {bearer}\r\nset-cookie: k={SECRET}; path=/\r\n"
    answers(upstream, Reply(raw=f"{head}content-length: 0\r\n\r\n".encode()))
    client = ask(proxy)
    received = client.read_until(b"\r\n\r\n")
    assert SECRET.encode() not in received
    assert received.count(MARK) == 4
    assert received.startswith(b"HTTP/1.1 200 ")


def ask(proxy: Proxy, target: str = "/", host: str = "api.test", headers: str = "") -> Connection:
    client = proxy.tunnel(host)
    client.send(f"GET {target} HTTP/1.1\r\nhost: {host}\r\n{headers}\r\n".encode())
    return client


def test_a_secret_in_trailers_does_not_pass(proxy: Proxy, upstream: Upstream) -> None:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    answers(upstream, Reply(raw=head + b"2\r\nhi\r\n0\r\nx-key: %s\r\n\r\n" % SECRET.encode()))
    client = ask(proxy)
    assert client.response().body == b"hi"
    assert SECRET.encode() not in client.buffer


def test_a_secret_in_a_103_does_not_pass(proxy: Proxy, upstream: Upstream) -> None:
    early = f"HTTP/1.1 103 Early Hints\r\nlink: <{SECRET}>\r\n\r\n"
    answers(upstream, Reply(raw=early.encode() + b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"))
    client = ask(proxy)
    response = client.response()
    assert (response.status, response.body) == (200, b"hi")


def test_it_is_counted_where_it_was_found(proxy: Proxy, upstream: Upstream) -> None:
    def count(where: str) -> float:
        name = "sallyport_secrets_redacted_total"
        return proxy.metric(name, agent="coder-1", credential="api", where=where)

    before = count("header"), count("body")
    answers(upstream, Reply(headers=[("x-key", SECRET)], body=SECRET.encode() * 3))
    proxy.get("https://api.test/counted")
    line = proxy.audit(path="/counted")[0]
    assert sorted(line["redacted"], key=str) == [
        {"credential": "api", "where": "body", "count": 3},
        {"credential": "api", "where": "header", "count": 1},
    ]
    assert (count("header"), count("body")) == (before[0] + 1, before[1] + 3)


# Streaming


class Events:
    """An upstream that sends event n + 1 only after `more` was called n times."""

    def __init__(self, upstream: Upstream, coding: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.close()
        self.turns: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.coding = coding
        upstream.raw = self.serve

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.loop = asyncio.get_running_loop()
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: {self.coding}\r\n"
        writer.write(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
        packer = zlib.compressobj(wbits=31)
        while (event := await self.turns.get()) is not None:
            if self.coding == "gzip":
                event = packer.compress(event) + packer.flush(zlib.Z_SYNC_FLUSH)
            writer.write(b"%x\r\n%s\r\n" % (len(event), event))
            await writer.drain()
        rest = packer.flush() if self.coding == "gzip" else b""
        writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(rest), rest) if rest else b"0\r\n\r\n")
        await writer.drain()

    def send(self, event: bytes | None) -> None:
        self.loop.call_soon_threadsafe(self.turns.put_nowait, event)


def read_chunk(client: Connection) -> bytes:
    size = int(client.read_until(b"\r\n"), 16)
    return client.read_exactly(size + 2)[:-2]


@pytest.mark.parametrize("coding", ["identity", "gzip"])
def test_events_stay_live(proxy: Proxy, upstream: Upstream, coding: str) -> None:
    """Each reaches the client before the next is sent, even one that ends like the beginning of a secret."""
    events = Events(upstream, coding)
    client = ask(proxy)
    assert b" 200 " in client.read_until(b"\r\n\r\n")
    for number in range(5):
        events.send(b"data: token %d\n\n" % number)
        assert read_chunk(client) == b"data: token %d\n\n" % number
    events.send(b"data: " + SECRET.encode() + b"\n\n")
    received = b""
    while not received.endswith(b"\n\n"):
        received += read_chunk(client)
    assert received == b"data: " + MARK + b"\n\n"
    events.send(b"data: " + SECRET[:9].encode())
    assert read_chunk(client) == b"data: "
    events.send(b"-not\n\n")
    assert read_chunk(client) == SECRET[:9].encode() + b"-not\n\n"
    events.send(None)
    assert read_chunk(client) == b""


# What the upstream is asked


def test_only_what_can_be_scanned_is_asked_for(proxy: Proxy, upstream: Upstream) -> None:
    """A part of a body could be half of a secret, and a coding nobody knows could hide one."""
    headers = {"range": "bytes=0-9", "if-range": '"1"', "accept-encoding": "gzip;q=0.5, dcb, *;q=0"}
    get(proxy, headers)
    seen: Seen = upstream.seen[0]
    assert seen.header("range") == []
    assert seen.header("if-range") == []
    assert seen.header("accept-encoding") == ["gzip;q=0.5"]


@pytest.mark.parametrize(
    "reply",
    [
        Reply(headers=[("content-encoding", "dcb")], body=SECRET.encode()),
        Reply(headers=[("content-encoding", "gzip")], body=b"not gzip " + SECRET.encode()),
        Reply(headers=[("content-encoding", "gzip")], chunks=[gzip.compress(SECRET.encode())[:-9]]),
        Reply(headers=[("content-encoding", ", ".join(["gzip"] * 9))], body=SECRET.encode()),
        Reply(headers=[("content-encoding", "br")], body=brotli.compress(bytes(1 << 28), quality=4)),
    ],
    ids=["unknown", "broken", "cut short", "too many", "a bomb"],
)
def test_what_cannot_be_scanned_is_cut(proxy: Proxy, upstream: Upstream, reply: Reply) -> None:
    answers(upstream, reply)
    path = f"/cut/{next(NUMBERS)}"
    client = ask(proxy, path)
    received = client.rest()
    assert SECRET.encode() not in received
    assert not received.endswith(b"0\r\n\r\n"), "a client must not take it for whole"
    line = proxy.audit(path=path)[0]
    assert (line["verdict"], line["reason"]) == ("block", "secret_leak")
    said = proxy.stderr_text().splitlines()[-1]
    assert "could not be scanned and was cut" in said
    assert SECRET not in said


def test_a_not_modified_answer_keeps_its_validators(proxy: Proxy, upstream: Upstream) -> None:
    answers(upstream, Reply(304, [("etag", '"v1"'), ("content-length", "500")]))
    client = ask(proxy, headers='if-none-match: "v1"\r\n')
    response = client.response()
    assert (response.status, response.header("etag")) == (304, '"v1"')
    assert upstream.seen[0].header("if-none-match") == ['"v1"']
    client.send(b"GET / HTTP/1.1\r\nhost: api.test\r\n\r\n")
    assert client.response().status == 304, "and the connection goes on"


def test_the_length_a_head_request_asks_for_is_told(proxy: Proxy, upstream: Upstream) -> None:
    answers(upstream, Reply(headers=[("content-length", "500"), ("content-encoding", "gzip")]))
    response = proxy.get("https://api.test/", method="HEAD")
    assert response.header("content-length") == "500"
    assert response.header("content-encoding") == "gzip"


# What no secret can be in


def test_without_a_credential_everything_passes_byte_for_byte(proxy: Proxy, upstream: Upstream) -> None:
    """Not for this host, so not known there: the answer is not decoded, nor its length changed."""
    get(proxy)  # it is open now
    packed = gzip.compress(SECRET.encode() * 100)
    headers = [("Content-Encoding", "gzip"), ("ETag", '"v1"'), ("Accept-Ranges", "bytes"), ("X-Odd", "a  b")]
    answers(upstream, Reply(206, headers, packed))
    asked = {"range": "bytes=0-9", "if-range": '"1"', "accept-encoding": "dcb, gzip"}
    response = proxy.get("https://other.test/", headers=asked)
    assert response.body == packed
    assert response.headers == [*headers, ("content-length", str(len(packed)))]
    seen = upstream.seen[-1]
    assert [seen.header(name) for name in asked] == [[value] for value in asked.values()]


def test_what_a_request_without_credential_gets_back_is_looked_at_too(proxy: Proxy, upstream: Upstream) -> None:
    """A host that was sent the secret may tell it in any later answer."""
    get(proxy)
    answers(upstream, Reply(body=SECRET.encode()))
    proxy.write_rules(RULES.replace("    inject: [{credential: api, as: bearer}]\n", ""))
    try:
        while "authorization" in {name.lower() for name, _ in upstream.seen[-1].headers}:
            response = get(proxy)
        assert response.body == MARK
    finally:
        proxy.write_rules(RULES)
