"""What a rule limits is limited, per agent, over all proxies of a store; what cannot be counted is refused."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.h2client import Http2
from tests.harness import Connection, Proxy, Reply, Response, Upstream, read_request, refused, wait_for
from tests.storage import RemoteStore

type Make = Callable[..., Proxy]

RULES = """
version: 1
rules:
  - {name: few, match: {host: api.test, path: /few/**}, action: allow, limits: {rate: 3/h}}
  - {name: again, match: {host: api.test, path: /again/**}, action: allow, limits: {rate: 2/s}}
  - {name: many, match: {host: api.test, path: /many/**}, action: allow, limits: {rate: 100/h}}
  - {name: pair, match: {host: api.test, path: /pair/**}, action: allow, limits: {concurrency: 2}}
  - {name: one, match: {host: api.test, path: /one/**}, action: allow, limits: {concurrency: 1}}
  - {name: small, match: {host: api.test, path: /small/**}, action: allow, limits: {request_body: 100KB}}
  - name: moved
    match: {host: other.test}
    action: allow
    limits: {rate: 1/h}
    rewrite: {url: {host: api.test}}
  - {name: free, match: {host: api.test, path: /free/**}, action: allow}
"""


@pytest.fixture(scope="module")
def proxy(make_proxy: Make, lane: str) -> Proxy:
    proxy = make_proxy(RULES, lane=lane)
    for number in range(12):
        proxy.agent(f"coder-{number}")
    return proxy


@pytest.fixture
def agent(proxy: Proxy, _agents: Iterator[str]) -> str:
    """One whose counters are new."""
    return next(_agents)


@pytest.fixture(scope="module")
def _agents(proxy: Proxy) -> Iterator[str]:
    return iter([name for name in proxy.tokens if name != "coder-0"])


def test_a_rate_is_kept_to_and_says_when_to_come_back(proxy: Proxy, upstream: Upstream, agent: str) -> None:
    """To the request; other rules and other agents go on, and it is counted."""
    for _ in range(3):
        assert proxy.get("https://api.test/few/x", agent=agent).status == 200
    upstream.seen.clear()
    for _ in range(3):
        response = proxy.get("https://api.test/few/x", agent=agent)
        assert refused(response, "limit_exceeded")["rule"] == "few"
        assert 1100 <= int(response.header("retry-after") or 0) <= 1200  # the next one of three in an hour
    assert upstream.seen == []
    assert proxy.get("https://api.test/free/x", agent=agent).status == 200
    assert proxy.get("https://api.test/few/x", agent="coder-0").status == 200
    assert proxy.metric("sallyport_limits_exceeded_total", agent=agent, rule="few", limit="rate") == 3
    assert len(proxy.audit(3, agent=agent, reason="limit_exceeded", rule="few")) == 3


def test_a_rate_comes_back(proxy: Proxy, upstream: Upstream, agent: str) -> None:
    statuses = [proxy.get("https://api.test/again/x", agent=agent).status for _ in range(4)]
    assert statuses[:2] == [200, 200]
    wait_for(lambda: proxy.get("https://api.test/again/x", agent=agent).status == 200)


def test_a_flood_gets_no_more_than_the_rate(proxy: Proxy, upstream: Upstream, agent: str) -> None:
    """A hundred of four hundred on one connection each of eight, taken from the store a few at a time."""

    def flood(_: int) -> int:
        tunnel = proxy.tunnel("api.test", agent=agent)
        allowed = 0
        for _ in range(50):
            tunnel.send(b"GET /many/x HTTP/1.1\r\nhost: api.test\r\n\r\n")
            allowed += tunnel.response().status == 200
        return allowed

    with ThreadPoolExecutor(8) as threads:
        allowed = sum(threads.map(flood, range(8)))
    assert allowed in (100, 101)  # one may have been earned meanwhile
    assert len(upstream.seen) == allowed


def test_a_rewritten_request_is_counted_by_the_rule_it_came_by(proxy: Proxy, upstream: Upstream, agent: str) -> None:
    assert proxy.get("https://other.test/free/x", agent=agent).status == 200
    assert refused(proxy.get("https://other.test/free/x", agent=agent), "limit_exceeded")["rule"] == "moved"


class Slow:
    """An upstream that answers when it is told to."""

    def __init__(self, upstream: Upstream) -> None:
        upstream.reset()  # or a kept connection would still be served as before
        self.waiting = 0
        self.go = asyncio.Event()
        upstream.raw = self.serve
        self._upstream = upstream

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            self._upstream.seen.append(await read_request(reader))
            self.waiting += 1
            gone = asyncio.ensure_future(reader.read(1))
            go = asyncio.ensure_future(self.go.wait())
            await asyncio.wait([gone, go], return_when=asyncio.FIRST_COMPLETED)
            self.waiting -= 1
            go.cancel()
            if gone.done():
                return
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone
            writer.write(b"HTTP/1.1 200 X\r\ncontent-length: 0\r\n\r\n")
            await writer.drain()

    def answer(self) -> None:
        """Let all go that wait, and who comes later."""
        self._upstream._loop.call_soon_threadsafe(self.go.set)


def begin(proxy: Proxy, agent: str, path: str) -> Connection:
    tunnel = proxy.tunnel("api.test", agent=agent)
    tunnel.send(f"GET {path} HTTP/1.1\r\nhost: api.test\r\n\r\n".encode())
    return tunnel


def test_so_many_at_a_time_and_a_place_comes_free(proxy: Proxy, upstream: Upstream, agent: str) -> None:
    """When an answer has ended, and when its client has gone."""
    slow = Slow(upstream)
    first, second = begin(proxy, agent, "/pair/1"), begin(proxy, agent, "/pair/2")
    wait_for(lambda: slow.waiting == 2)
    response = proxy.get("https://api.test/pair/3", agent=agent)
    refused(response, "limit_exceeded")
    assert response.header("retry-after") == "1"
    first.close()
    wait_for(lambda: slow.waiting == 1)
    slow.answer()
    assert second.response().status == 200
    for _ in range(5):
        assert proxy.get("https://api.test/pair/4", agent=agent).status == 200


def test_one_after_the_other_is_never_two_at_a_time(proxy: Proxy, upstream: Upstream, agent: str) -> None:
    """A client that asks again at once must not meet its own last request."""
    tunnel = proxy.tunnel("api.test", agent=agent)
    for _ in range(200):
        tunnel.send(b"GET /one/x HTTP/1.1\r\nhost: api.test\r\n\r\n")
        assert tunnel.response().status == 200


def test_http2_streams_are_counted_each(proxy: Proxy, upstream: Upstream, agent: str) -> None:
    slow = Slow(upstream)
    client = Http2(proxy.tunnel("api.test", agent=agent, alpn="h2"))
    first = [client.request(f"/pair/{number}") for number in range(2)]
    wait_for(lambda: slow.waiting == 2)
    refused(client.response(client.request("/pair/x")), "limit_exceeded")
    slow.answer()
    assert [client.response(stream).status for stream in first] == [200, 200]


def post(proxy: Proxy, agent: str, size: int, *, chunked: bool, http2: bool = False) -> Response:
    tunnel = proxy.tunnel("api.test", agent=agent, alpn="h2" if http2 else "")
    if http2:
        client = Http2(tunnel)
        length = [] if chunked else [("content-length", str(size))]
        return client.response(client.request("/small/x", method="POST", headers=length, body=b"x" * size))
    head = "POST /small/x HTTP/1.1\r\nhost: api.test\r\n"
    if not chunked:
        tunnel.send(f"{head}content-length: {size}\r\n\r\n".encode())
        with contextlib.suppress(OSError):
            tunnel.send(b"x" * size)
        return tunnel.response()
    tunnel.send(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
    with contextlib.suppress(OSError):
        for at in range(0, size, 10_000):
            piece = b"x" * min(10_000, size - at)
            tunnel.send(b"%x\r\n%s\r\n" % (len(piece), piece))
        tunnel.send(b"0\r\n\r\n")
    return tunnel.response()


@pytest.mark.parametrize("http2", [False, True], ids=["http/1.1", "h2"])
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunks"])
def test_a_body_may_have_the_size_and_not_more(
    proxy: Proxy, upstream: Upstream, agent: str, chunked: bool, http2: bool
) -> None:
    """Where the size is not told the upstream gets a part of it, and never the end."""
    upstream.handler = lambda seen: Reply(body=str(len(seen.body)).encode())
    ok = post(proxy, agent, 100_000, chunked=chunked, http2=http2)
    assert (ok.status, ok.body) == (200, b"100000")
    upstream.seen.clear()
    for size in (100_001, 3_000_000):
        error = refused(post(proxy, agent, size, chunked=chunked, http2=http2), "body_too_large")
        assert error["rule"] == "small"
        (line,) = proxy.audit(id=error["request_id"])
        assert (line["verdict"], line["reason"], line["status"]) == ("block", "body_too_large", 413)
    assert upstream.seen == []
    assert proxy.metric("sallyport_limits_exceeded_total", agent=agent, rule="small", limit="request_body") == 2
    assert proxy.get("https://api.test/free/x", agent=agent).status == 200


def test_two_proxies_of_a_store_share_the_counts(
    make_proxy: Make, upstream: Upstream, lane: str, tmp_path: Path
) -> None:
    """What one gave the other has not."""
    with RemoteStore(tmp_path) as store:
        store.start()
        proxies = [make_proxy(RULES, start=False, store=store.url, lane=lane) for _ in range(2)]
        key = proxies[0].folder / ".sallyport"
        proxies[0].start()
        (proxies[1].folder / ".sallyport").mkdir(mode=0o700)
        for file in key.glob("master*"):
            (proxies[1].folder / ".sallyport" / file.name).write_bytes(file.read_bytes())
            (proxies[1].folder / ".sallyport" / file.name).chmod(0o600)
        proxies[1].start()
        token = proxies[0].agent()
        proxies[1].tokens["coder-1"] = token
        wait_for(lambda: proxies[1].knows("coder-1"))
        allowed = [proxies[number % 2].get("https://api.test/few/x").status == 200 for number in range(8)]
        assert allowed == [True] * 3 + [False] * 5
        slow = Slow(upstream)
        begin(proxies[0], "coder-1", "/one/x")
        wait_for(lambda: slow.waiting == 1)
        refused(proxies[1].get("https://api.test/one/x"), "limit_exceeded")


def test_what_cannot_be_counted_is_refused(make_proxy: Make, upstream: Upstream, lane: str, tmp_path: Path) -> None:
    """While the store is down; rules without such limits go on, and a size needs no store."""
    with RemoteStore(tmp_path) as store:
        store.start()
        proxy = make_proxy(RULES, start=False, store=store.url, lane=lane).start()
        proxy.agent()
        assert proxy.get("https://api.test/many/x").status == 200
        assert proxy.get("https://api.test/pair/x").status == 200
        store.kill()
        upstream.seen.clear()
        for path in ("many", "pair", "few"):
            refused(proxy.get(f"https://api.test/{path}/x"), "store_unavailable")
        assert upstream.seen == []
        assert proxy.get("https://api.test/free/x").status == 200
        assert proxy.get("https://api.test/small/x", method="POST", body=b"x").status == 200
        store.start()
        wait_for(lambda: proxy.get("https://api.test/many/x").status == 200)
        assert json.loads(proxy.fetch_admin("/readyz")[1])["ready"]
