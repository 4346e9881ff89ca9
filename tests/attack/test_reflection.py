"""A secret that an upstream sends back does not reach the sandbox, wherever in an answer it stands; and a credential
stays where it was sent. More places and encodings are in tests/wire/test_redaction.py and test_websocket.py."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterator
from urllib.parse import quote

import pytest

from tests.harness import Proxy, Reply, Response, Upstream

type Make = Callable[..., Proxy]

SECRET = "real/key+4f1e9b7c2d=="
NAME = "4f1e9b7c2d8a6b5c4d3e2f1a"  # one that can be the name of a header
MARK = b"[redacted:api]"
RULES = """
version: 1
rules:
  - name: api
    match: {host: api.test}
    action: allow
    inject: [{credential: api, as: bearer}]
  - name: named
    match: {host: a.api.test}
    action: allow
    inject: [{credential: named, as: header, name: x-key}]
  - name: other
    match: {host: other.test}
    action: allow
"""


@pytest.fixture(scope="module")
def proxy(make_proxy: Make, lane: str) -> Proxy:
    proxy = make_proxy(RULES, lane=lane)
    proxy.agent()
    proxy.credential("api", SECRET, "--host", "api.test")
    proxy.credential("named", NAME, "--host", "a.api.test")
    return proxy


@pytest.fixture(autouse=True)
def fresh(proxy: Proxy, upstream: Upstream) -> Iterator[None]:
    upstream.reset()
    yield
    upstream.reset()


def get(proxy: Proxy, upstream: Upstream, reply: Reply, host: str = "api.test") -> Response:
    upstream.handler = lambda _: reply
    response = proxy.get(f"https://{host}/")
    for secret in (SECRET, NAME):
        assert secret not in str(response.headers)
        assert secret.encode() not in response.body
    return response


@pytest.mark.parametrize("name", [NAME, f"x-{NAME}", f"x-{NAME}-y"])
def test_a_header_that_is_named_after_a_secret_is_left_out(proxy: Proxy, upstream: Upstream, name: str) -> None:
    response = get(proxy, upstream, Reply(headers=[(name, "1"), ("x-kept", "2")], body=b"hi"), "a.api.test")
    assert (response.header("x-kept"), response.body) == ("2", b"hi")
    assert NAME not in str(response.headers).lower()


@pytest.mark.parametrize("status", [200, 206, 400, 401, 404, 418, 500, 502, 503])
def test_error_pages_and_parts_are_searched_like_all_else(proxy: Proxy, upstream: Upstream, status: int) -> None:
    response = get(proxy, upstream, Reply(status, body=f"what is {SECRET}?".encode()))
    assert (response.status, response.body) == (status, b"what is " + MARK + b"?")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("spelling", [str, quote, lambda text: base64.b64encode(text.encode()).decode()])
def test_a_redirect_takes_no_credential_to_another_host(
    proxy: Proxy, upstream: Upstream, status: int, spelling: Callable[[str], str]
) -> None:
    """Neither in its URL, nor by the proxy, which follows none."""
    location = f"https://other.test/?k={spelling(SECRET)}"
    response = get(proxy, upstream, Reply(status, [("location", location), ("refresh", f"0; url={location}")]))
    assert str(response.header("location")).startswith("https://other.test/?k=[redacted:api]")
    assert [seen.header("host") for seen in upstream.seen] == [["api.test"]]
    proxy.get(str(response.header("location")))
    assert upstream.seen[1].header("authorization") == []


@pytest.mark.parametrize("framing", ["content-length: {size}", "transfer-encoding: chunked", "connection: close"])
def test_no_border_of_packets_or_chunks_hides_it(proxy: Proxy, upstream: Upstream, framing: str) -> None:
    body = b"a " + SECRET.encode() + b" b " + base64.b64encode(b"me:" + SECRET.encode()) + b" c"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 200 OK\r\nx-key: {SECRET}\r\n{framing.format(size=len(body))}\r\n\r\n"
        for byte in head.encode():
            writer.write(bytes([byte]))
            await writer.drain()
        for byte in body:
            writer.write(b"1\r\n%c\r\n" % byte if "chunked" in framing else bytes([byte]))
            await writer.drain()
        writer.write(b"0\r\n\r\n" if "chunked" in framing else b"")
        await writer.drain()

    upstream.raw = serve
    response = proxy.get("https://api.test/")
    assert response.header("x-key") == MARK.decode()
    assert response.body.startswith(b"a " + MARK + b" b ")
    assert response.body.count(MARK) == 2


@pytest.mark.parametrize("name", ["authorization", "Authorization", "AUTHORIZATION"])
@pytest.mark.parametrize("value", ["Bearer mine", "Basic bWU6bWluZQ==", "Digest x", ""])
def test_a_credential_replaces_what_the_agent_sent_and_is_never_beside_it(
    proxy: Proxy, upstream: Upstream, name: str, value: str
) -> None:
    client = proxy.tunnel("api.test")
    client.send(f"GET / HTTP/1.1\r\nhost: api.test\r\n{name}: {value}\r\n{name}: again\r\n\r\n".encode())
    assert client.response().status == 200
    assert upstream.seen[0].header("authorization") == [f"Bearer {SECRET}"]
