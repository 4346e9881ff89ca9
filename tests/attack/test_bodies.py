"""Rules that look at a request's body: what is forwarded is what was looked at, and what cannot be evaluated is refused
by an allow rule and met by a block rule."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator

import pytest

from tests.h2client import Http2
from tests.harness import Proxy, Response, Upstream, refused

type Make = Callable[..., Proxy]

RULES = """
version: 1
rules:
  - name: ours
    match: {host: api.test, method: [GET, POST], body: {json: {/owner: "acme*", /count: [1, 2]}}}
    action: allow
    inject: [{credential: key, as: bearer}]
  - name: not-this-model
    match: {host: other.test, body: {json: {/model: "big-*"}}}
    action: block
  - name: other
    match: {host: other.test}
    action: allow
  - name: moved
    match: {host: b.api.test}
    action: allow
    rewrite: {url: {host: api.test}}
"""
LIMIT = 64 * 1024


@pytest.fixture(scope="module")
def proxy(make_proxy: Make, lane: str) -> Proxy:
    proxy = make_proxy(RULES, lane=lane, limits={"buffer": "64KiB"})
    proxy.agent()
    proxy.credential("key", "real-key-5d1c7e9a", "--host", "api.test")
    return proxy


@pytest.fixture(autouse=True)
def fresh(proxy: Proxy, upstream: Upstream) -> Iterator[None]:
    upstream.reset()
    yield
    upstream.reset()


def post(proxy: Proxy, host: str, body: bytes, chunked: bool = False, headers: str = "") -> Response:
    client = proxy.tunnel(host)
    framing = "transfer-encoding: chunked" if chunked else f"content-length: {len(body)}"
    client.send(f"POST / HTTP/1.1\r\nhost: {host}\r\n{headers}{framing}\r\n\r\n".encode())
    pieces = [body[at : at + 5000] for at in range(0, len(body), 5000)]
    try:
        for piece in pieces:
            client.send(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
        client.send(b"0\r\n\r\n" if chunked else b"")
    except OSError:
        pass  # it was answered before it was read
    return client.response()


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("host", ["api.test", "b.api.test"])
def test_a_body_that_fits_arrives_as_it_was_looked_at(
    proxy: Proxy, upstream: Upstream, host: str, chunked: bool
) -> None:
    """With its credential, also where another rule led there."""
    body = json.dumps({"owner": "acme-web", "count": 2, "more": "x" * 20_000}).encode()
    assert post(proxy, host, body, chunked).status == 200
    assert upstream.seen[0].body == body
    assert upstream.seen[0].header("authorization") == ["Bearer real-key-5d1c7e9a"]
    assert upstream.seen[0].header("content-length") == [str(len(body))]
    assert upstream.seen[0].header("transfer-encoding") == []


@pytest.mark.parametrize(
    "body",
    [
        b'{"owner": "evil", "count": 1}',
        b'{"owner": "acme"}',
        b'{"owner": "acme", "count": 3}',
        b'{"owner": "acme", "count": 1, "count": 2}',
        b'{"owner": "acme", "Owner": "evil", "count": 1}',
        b'{"owner": ["acme"], "count": 1}',
        b'{"owner": "acme", "count": 1} x',
        b'{"owner": "acme", "count": NaN}',
        b'\xef\xbb\xbf{"owner": "acme", "count": 1}',
        '{"owner": "acme", "count": 1}'.encode("utf-16"),
        b'{"owner": "\xff", "count": 1}',
        b"[" * 30_000,
        b"owner=acme&count=1",
        b"",
    ],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_what_does_not_fit_or_can_be_read_in_two_ways_is_refused(
    proxy: Proxy, upstream: Upstream, body: bytes, chunked: bool
) -> None:
    refused(post(proxy, "api.test", body, chunked), "no_rule")
    assert upstream.seen == []


def test_a_request_without_a_body_has_no_value(proxy: Proxy, upstream: Upstream) -> None:
    refused(proxy.get("https://api.test/"), "no_rule")
    assert upstream.seen == []
    assert proxy.get("https://other.test/").status == 200


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "big-7"}',
        b'{"Model": "big-7"}',
        b'{"model": "small", "model": "big-7"}',
        b'{"model": "b\\u0069g-7"}',
        b'{"model": {"name": "big-7"}}',
        b"not json",
        b'\xef\xbb\xbf{"model": "small"}',
        gzip.compress(b'{"model": "big-7"}', mtime=0),
    ],
)
def test_a_block_rule_blocks_what_fits_and_what_cannot_be_evaluated(
    proxy: Proxy, upstream: Upstream, body: bytes
) -> None:
    headers = "content-encoding: gzip\r\n" if body.startswith(b"\x1f") else ""
    error = refused(post(proxy, "other.test", body, headers=headers), "blocked")
    assert (error["rule"], upstream.seen) == ("not-this-model", [])


@pytest.mark.parametrize(
    "body", [b'{"model": "small"}', b"{}", b"[]", b'"big-7"', gzip.compress(b'{"model": "s"}', mtime=0)]
)
def test_what_a_block_rule_does_not_name_passes(proxy: Proxy, upstream: Upstream, body: bytes) -> None:
    headers = "content-encoding: gzip\r\n" if body.startswith(b"\x1f") else ""
    assert post(proxy, "other.test", body, headers=headers).status == 200
    assert upstream.seen[0].body == body


@pytest.mark.parametrize("host", ["api.test", "other.test"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_too_large_to_be_seen_is_refused(proxy: Proxy, upstream: Upstream, host: str, chunked: bool) -> None:
    body = b'{"owner": "acme", "count": 1, "more": "' + b"x" * LIMIT + b'"}'
    refused(post(proxy, host, body, chunked), "body_too_large")
    assert upstream.seen == []


def test_a_coded_body_that_is_too_large_is_refused(proxy: Proxy, upstream: Upstream) -> None:
    body = gzip.compress(b'{"owner": "acme", "count": 1, "more": "' + b"x" * LIMIT + b'"}', mtime=0)
    refused(post(proxy, "api.test", body, headers="content-encoding: gzip\r\n"), "body_too_large")
    assert upstream.seen == []


def test_the_connection_goes_on(proxy: Proxy, upstream: Upstream) -> None:
    """Bodies that were held and refused are read to their end, and not taken for a request."""
    client = proxy.tunnel("api.test")
    for owner, status in (("evil", 403), ("acme", 200), ("evil", 403), ("acme", 200)):
        body = json.dumps({"owner": owner, "count": 1}).encode()
        client.send(b"POST / HTTP/1.1\r\nhost: api.test\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        assert client.response().status == status
    assert len(upstream.seen) == 2


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"owner": "acme", "count": 1}', 200),
        (b'{"owner": "evil", "count": 1}', 403),
        (b"", 403),
        (None, 403),
        (b'"' + b"x" * LIMIT + b'"', 413),
    ],
    ids=["fits", "does not", "empty", "none", "too large"],
)
def test_http_2_is_no_way_around(proxy: Proxy, upstream: Upstream, body: bytes | None, status: int) -> None:
    """Where no length is told."""
    client = Http2(proxy.tunnel("api.test", alpn="h2"))
    assert client.response(client.request(method="POST", body=body)).status == status
    assert [seen.body for seen in upstream.seen] == ([body] if status == 200 else [])
