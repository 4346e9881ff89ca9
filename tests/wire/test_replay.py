"""A client that asks the same again and again on one connection: it is decided once, and anew when anything changes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.harness import Connection, Proxy, Reply, Response, Seen, Upstream, read_request, refused, wait_for

type Make = Callable[..., Proxy]

SECRET, OTHER = "real-key-4f1e9b7c2d", "next-key-83ab0c6e51"
RULES = """version: 1
rules:
  - name: one
    match: {host: api.test, method: GET, path: /one}
    action: allow
    inject: [{credential: api, as: bearer}]
  - name: below
    match: {host: api.test, method: [GET, POST], path: /below/**}
    action: allow
    inject: [{credential: api, as: bearer}]
  - name: not there
    match: {host: api.test, path: /below/private/**}
    action: block
  - name: long
    match: {host: api.test, path: /long/**}
    action: allow
    limits: {max_url: 60}
  - name: ungranted
    match: {host: api.test, path: /ungranted/**}
    action: allow
    inject: [{credential: narrow, as: bearer}]
  - name: moved
    match: {host: api.test, path: /moved/**}
    action: allow
    rewrite: {url: {path: {regex: /moved/, to: /to/}}}
  - name: in-query
    match: {host: api.test, path: /in-query/**}
    action: allow
    inject: [{credential: api, as: query, name: key}]
  - name: counted
    match: {host: api.test, path: /counted}
    action: allow
    limits: {rate: 3/h}
  - name: guard
    match: {host: api.test, path: /guard/**}
    action: allow
  - name: edited
    match: {host: api.test, path: /edited}
    action: allow
    response: {headers: {set: {x-seen: "yes"}, remove: [x-origin]}}
  - name: bare
    match: {host: other.test}
    action: allow
"""
FORBIDDEN = """  - name: never
    match: {host: api.test, path: /one}
    action: block
"""
TIMES = 4  # the third is the first that is not decided


def hello(seen: Seen) -> Reply:
    """The same answer each time."""
    return Reply(headers=[("x-origin", "here"), ("content-type", "text/plain")], body=b"hello")


@pytest.fixture
def proxy(make_proxy: Make, upstream: Upstream) -> Iterator[Proxy]:
    upstream.handler = hello
    proxy = make_proxy(RULES, lane="fast")
    proxy.agent()
    proxy.credential("api", SECRET, "--host", "api.test")
    numbers = itertools.count()  # each request is another one
    guarded = lambda: proxy.get(f"https://api.test/guard/{SECRET}", headers={"x-n": str(next(numbers))}).status == 403  # noqa: E731
    wait_for(guarded, "the guard")
    upstream.seen.clear()
    yield proxy
    proxy.stop()


def ask(
    connection: Connection,
    path: str = "/one",
    *lines: str,
    method: str = "GET",
    body: bytes | None = None,
    host: str = "api.test",
) -> Response:
    if body is not None:
        lines = (*lines, f"content-length: {len(body)}")
    head = "\r\n".join([f"{method} {path} HTTP/1.1", f"host: {host}", "accept: */*", *lines])
    connection.send(f"{head}\r\n\r\n".encode() + (body or b""))
    return connection.response(method)


@pytest.fixture
def used(proxy: Proxy) -> Iterator[Connection]:
    """A connection on which the request was asked and answered often enough to be remembered."""
    with contextlib.closing(proxy.tunnel("api.test")) as connection:
        assert [ask(connection).body for _ in range(TIMES)] == [b"hello"] * TIMES
        yield connection


def sent(upstream: Upstream) -> list[str]:
    return [value for seen in upstream.seen for value in seen.header("authorization")]


def test_each_is_sent_answered_and_recorded_alike(proxy: Proxy, upstream: Upstream) -> None:
    names = ("sallyport_upstream_duration_seconds_count", "sallyport_requests_replayed_total")
    before = [proxy.metric(name) for name in names]  # the guard was asked before it was up
    with contextlib.closing(proxy.tunnel("api.test")) as connection:
        assert [ask(connection).body for _ in range(TIMES)] == [b"hello"] * TIMES
    first, *others = upstream.seen
    assert all(seen == first for seen in others)
    assert sent(upstream) == [f"Bearer {SECRET}"] * TIMES
    lines = proxy.audit(TIMES, host="api.test", path="/one")
    own = ("time", "id", "duration_ms", "decision_us", "prev", "hash")
    assert len({line["id"] for line in lines}) == len(lines) == TIMES
    assert all({**line, **dict.fromkeys(own)} == {**lines[0], **dict.fromkeys(own)} for line in lines)
    assert lines[-1]["status"] == 200
    assert lines[-1]["response_bytes"] == len("hello")
    assert lines[-1]["upstream_ip"] == "127.0.0.1"
    assert lines[-1]["injected"][0]["credential"] == "api"
    assert proxy.metric("sallyport_rule_requests_total", rule="one", verdict="allow") == TIMES
    assert proxy.metric("sallyport_credentials_injected_total", agent="coder-1", credential="api") == TIMES
    grown = [proxy.metric(name) - count for name, count in zip(names, before, strict=True)]
    assert grown == [TIMES, TIMES - 2]


def test_a_new_block_rule_counts_on_an_open_connection(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
    proxy.write_rules(RULES + FORBIDDEN)
    wait_for(lambda: ask(used).status == 403)
    before = len(upstream.seen)
    assert refused(ask(used), "blocked")["rule"] == "never"
    assert len(upstream.seen) == before
    proxy.write_rules(RULES)
    wait_for(lambda: ask(used).status == 200)


def test_a_rotated_secret_is_the_one_that_is_sent(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
    proxy.cli("vault", "rotate", "api", stdin=OTHER)
    wait_for(lambda: ask(used).status == 200 and sent(upstream)[-1] == f"Bearer {OTHER}")
    upstream.seen.clear()
    assert [ask(used).status for _ in range(TIMES)] == [200] * TIMES
    assert sent(upstream) == [f"Bearer {OTHER}"] * TIMES


def test_a_removed_credential_is_sent_no_more(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
    proxy.cli("vault", "remove", "api")
    wait_for(lambda: ask(used).status == 503)
    upstream.seen.clear()
    refused(ask(used), "credential_unavailable")
    assert upstream.seen == []


def test_a_narrowed_grant_counts(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
    proxy.credential("api", SECRET, "--host", "api.test", "--path", "/other/**")
    wait_for(lambda: ask(used).status == 403)
    refused(ask(used), "credential_scope")


def test_a_secret_in_the_next_answer_is_redacted(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
    """In a body behind the same head as before, in one of another length, and in the head."""
    upstream.handler = lambda seen: Reply(
        headers=[("x-origin", "here"), ("content-type", "text/plain")], body=SECRET.encode()[:5]
    )
    assert ask(used).body == SECRET.encode()[:5]
    upstream.handler = lambda seen: Reply(headers=[("content-type", "text/plain")], body=SECRET.encode())
    assert [ask(used).body for _ in range(TIMES)] == [b"[redacted:api]"] * TIMES
    upstream.handler = lambda seen: Reply(headers=[("x-echo", SECRET)], body=b"hello")
    assert [ask(used).header("x-echo") for _ in range(TIMES)] == ["[redacted:api]"] * TIMES
    upstream.handler = lambda seen: Reply(headers=[("x", "y")], body=b"-" * len(SECRET))
    assert [len(ask(used).body) for _ in range(TIMES)] == [len(SECRET)] * TIMES
    upstream.handler = lambda seen: Reply(headers=[("x", "y")], body=SECRET.encode())
    assert ask(used).body == b"[redacted:api]"


def test_answers_of_every_form_follow(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
    """Chunked, without a body, until the connection closes, and the first form again."""
    upstream.handler = lambda seen: Reply(chunks=[b"a", b"b"])
    assert [ask(used).body for _ in range(TIMES)] == [b"ab"] * TIMES
    upstream.handler = lambda seen: Reply(status=204)
    assert [ask(used).status for _ in range(TIMES)] == [204] * TIMES
    upstream.handler = lambda seen: Reply(raw=b"HTTP/1.1 200 OK\r\n\r\nto the end")
    assert [ask(used).body for _ in range(TIMES)] == [b"to the end"] * TIMES
    upstream.handler = lambda seen: Reply(raw=b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok")
    assert [ask(used).body for _ in range(TIMES)] == [b"ok"] * TIMES
    upstream.handler = hello
    assert [ask(used).body for _ in range(TIMES)] == [b"hello"] * TIMES


def test_an_upstream_that_hung_up_is_dialled_again(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
    for _ in range(TIMES):
        upstream.reset()
        upstream.handler = hello
        assert ask(used).body == b"hello"


def test_a_failing_upstream_is_told_once(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
    """What was sent to a kept connection and broken there is tried once more, then it is an error of the upstream."""
    upstream.handler = lambda seen: Reply(raw=b"")
    refused(ask(used), "upstream_unreachable")
    refused(ask(used), "upstream_unreachable")
    assert len(proxy.audit(2, reason="upstream_unreachable")) == 2
    upstream.handler = lambda seen: Reply(raw=b"no HTTP\r\n\r\n")
    refused(ask(used), "upstream_unreachable")
    upstream.handler = hello
    assert ask(used).body == b"hello"


def test_other_bytes_are_other_requests(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
    for _ in range(TIMES):
        refused(ask(used, method="DELETE"), "no_rule")
        assert ask(used, "/one", "x-more: 1").status == 200
        assert ask(used, method="HEAD").header("content-length") == "5"
        assert ask(used).body == b"hello"


def replayed(proxy: Proxy) -> float:
    return proxy.metric("sallyport_requests_replayed_total")


def test_another_target_of_the_same_rule_is_alike(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
    """Only the rules are asked again; what goes out is in normal form, and on record."""
    upstream.seen.clear()
    before = replayed(proxy)
    targets = ["/below/a", "/below/b?x=1", "/below/%7Ec", "/below/d/../e", "/below/f?y=%41", "/below/g"]
    assert [ask(used, target).status for target in targets] == [200] * len(targets)
    wanted = ["/below/a", "/below/b?x=1", "/below/~c", "/below/e", "/below/f?y=%41", "/below/g"]
    assert [seen.target for seen in upstream.seen] == wanted
    assert sent(upstream) == [f"Bearer {SECRET}"] * len(targets)
    lines = proxy.audit(len(targets), rule="below")
    assert [line["path"] for line in lines] == [target.partition("?")[0] for target in wanted]
    assert replayed(proxy) == before + len(targets) - 1


def test_a_target_of_another_rule_is_not(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
    for number in range(TIMES):
        assert ask(used, f"/below/{number}").status == 200
        upstream.seen.clear()
        for target in (
            f"/below/private/{number}",
            f"/below/x/../private/{number}",
            f"/below/x%2f..%2fprivate/{number}",
        ):
            assert refused(ask(used, target), "blocked")["rule"] == "not there"
        refused(ask(used, f"/above/{number}"), "no_rule")
        refused(ask(used, f"/above/..%2fbelow/{number}"), "no_rule")
        refused(ask(used, f"/below/{number}?x={SECRET}"), "secret_leak")
        assert upstream.seen == []
        assert ask(used, f"/below/{number}?_method=DELETE").status == 200
    refused(ask(used, "/below/%"), "ambiguous_request")
    assert used.closed()


def test_what_a_rule_does_with_the_target_is_done_anew(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
    proxy.credential("narrow", OTHER, "--host", "api.test", "--path", "/ungranted/a/**")
    for number in range(TIMES):
        assert ask(used, f"/long/{number}").status == 200
        refused(ask(used, f"/long/{number}" + "x" * 60), "limit_exceeded")
        upstream.seen.clear()
        assert ask(used, f"/moved/{number}").status == 200
        assert ask(used, f"/in-query/{number}").status == 200
        wait_for(lambda: ask(used, f"/ungranted/a/{number}").status == 200)  # noqa: B023
        refused(ask(used, f"/ungranted/b/{number}"), "credential_scope")
        assert [seen.target for seen in upstream.seen][:2] == [f"/to/{number}", f"/in-query/{number}?key={SECRET}"]
        assert upstream.seen[-1].header("authorization") == [f"Bearer {OTHER}"]


TARGETS = (
    *("/one", "/one?", "/one?x=1", "/one/", "/One", "//one", "/one;a", "/./one", "/two", "/"),
    *(
        "/below",
        "/below/",
        "/below/a",
        "/below/a?b=%zz",
        "/below/%2e%2e/one",
        "/below/a%00",
        "/below/a#b",
        "/below/%c0%af",
    ),
    *("/below/private", "/below/private/a", "/below/PRIVATE/a", "/below//private/a", "/below/%70rivate/a"),
    *("/below/a?key=slp_placeholder_api", f"/below/{SECRET}", "/moved/a", "/moved/../one", "/in-query/a?key=mine"),
    *("/counted/..", "/long/" + "x" * 80, "/below/" + "y" * 3000, "https://api.test/below/a", "https://other.test/one"),
    *("*", "/edited", "/below/a b", "/below/\xe9", "/below/a?_method=PUT", "/below/a?x=" + "%25" * 20),
)
LINES = (
    (),
    ("x-http-method-override: DELETE",),
    ("authorization: mine",),
    ("connection: x-a", "x-a: 1"),
    ("te: gzip",),
)


def outcome(connection: Connection, upstream: Upstream, target: str, lines: tuple[str, ...], method: str) -> object:
    """What the client got, and what the upstream saw; None where the connection had ended."""
    before = len(upstream.seen)
    try:
        answer = ask(connection, target, *lines, method=method)
    except OSError:
        return None
    return answer.status, answer.code if answer.status >= 400 else answer.body, upstream.seen[before:]


def test_what_is_repeated_comes_out_as_what_is_asked_once(proxy: Proxy, upstream: Upstream) -> None:
    """Odd targets, methods and headers in any order, on a connection that remembers and on one that does not."""
    dice = random.Random(5)
    cases = [(target, dice.choice(LINES), dice.choice(("GET", "GET", "POST"))) for target in TARGETS * 2]
    wanted = []
    for case in cases:
        with contextlib.closing(proxy.tunnel("api.test")) as connection:
            wanted.append(outcome(connection, upstream, *case))
    assert {result[0] for result in wanted if isinstance(result, tuple)} >= {200, 400, 403, 421}
    connection = proxy.tunnel("api.test")
    for case, once in dice.sample([*zip(cases, wanted, strict=True)] * 3, 3 * len(cases)):
        if (again := outcome(connection, upstream, *case)) is None:
            connection.close()
            connection = proxy.tunnel("api.test")
            again = outcome(connection, upstream, *case)
        assert again == once, case
    connection.close()
    assert replayed(proxy) > len(cases) / 4


def test_bodies_are_sent_as_they_come(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
    """Of any length, also none, and in pieces; one that is too long to be held streams."""
    upstream.seen.clear()
    bodies = [b"a", b"bc", b"de", b"", b"f" * 5000, b"g" * 65536, b"h" * 65537, b"i"]
    before = replayed(proxy)
    for number, body in enumerate(bodies):
        assert ask(used, f"/below/{number}", method="POST", body=body).body == b"hello"
    used.send(b"POST /below/x HTTP/1.1\r\nhost: api.test\r\naccept: */*\r\ncontent-length: 6\r\n\r\n")
    for piece in (b"in", b" p", b"cs"):
        used.send(piece)
    assert used.response().body == b"hello"
    assert [seen.body for seen in upstream.seen] == [*bodies, b"in pcs"]
    assert [seen.header("content-length") for seen in upstream.seen] == [
        [str(len(seen.body))] for seen in upstream.seen
    ]
    assert sent(upstream) == [f"Bearer {SECRET}"] * len(upstream.seen)
    assert [line["request_bytes"] for line in proxy.audit(9, rule="below")] == [
        len(seen.body) for seen in upstream.seen
    ]
    assert replayed(proxy) == before + len(bodies) + 1 - 3  # the first two, and the long one


def test_a_body_is_looked_through_each_time(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
    for number in range(TIMES):
        assert ask(used, "/below/a", method="POST", body=b"x" * len(SECRET)).status == 200
        upstream.seen.clear()
        refused(ask(used, "/below/a", method="POST", body=SECRET.encode()), "secret_leak")
        refused(ask(used, f"/below/{number}", method="POST", body=b"=" * number + SECRET.encode()), "secret_leak")
        assert upstream.seen == []
    assert len(proxy.audit(2 * TIMES, reason="secret_leak", method="POST")) == 2 * TIMES


def test_what_looks_like_a_secret_and_is_none_passes(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
    """A placeholder may go where its secret may, a text of the form of a token anywhere."""
    token = f"slp_{'a' * 43}_{'0' * 8}".encode()
    for body in (b"slp_placeholder_api", token, b"x" * len(token)) * TIMES:
        assert ask(used, "/below/a", method="POST", body=body).status == 200
        assert upstream.seen[-1].body == body
    lines = proxy.audit(3 * TIMES, rule="below")
    assert {line["request_bytes"] for line in lines} == {len(b"slp_placeholder_api"), len(token)}


def test_a_rule_that_looks_at_the_length_sees_it(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
    proxy.write_rules(RULES.replace("path: /below/**}", 'path: /below/**, headers: {content-length: "1*"}}', 1))
    wait_for(lambda: ask(used, "/below/a", method="POST", body=b"").status == 403)
    for _ in range(TIMES):
        assert ask(used, "/below/a", method="POST", body=b"x" * 12).status == 200
        refused(ask(used, "/below/a", method="POST", body=b"x" * 20), "no_rule")
        assert ask(used, "/below/a", method="POST", body=b"x" * 15).status == 200


def test_a_change_while_a_body_is_awaited_counts(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
    """What is remembered is what was decided by, not what is in force when the body has come."""
    assert ask(used, "/below/a", method="POST", body=b"abc").status == 200
    used.send(b"POST /below/a HTTP/1.1\r\nhost: api.test\r\naccept: */*\r\ncontent-length: 3\r\n\r\n")
    proxy.write_rules(RULES.replace("/below/private/**", "/below/**"))
    wait_for(lambda: proxy.get("https://api.test/below/a").status == 403)
    used.send(b"abc")
    assert used.response().status == 200
    for _ in range(TIMES):
        assert refused(ask(used, "/below/a", method="POST", body=b"abc"), "blocked")["rule"] == "not there"


def test_two_requests_in_one_piece_are_two(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
    one = b"POST /below/a HTTP/1.1\r\nhost: api.test\r\naccept: */*\r\ncontent-length: 3\r\n\r\nabc"
    two = b"GET /one HTTP/1.1\r\nhost: api.test\r\naccept: */*\r\n\r\n"
    for _ in range(TIMES):
        used.send(one + two + two)
        assert [used.response().body for _ in range(3)] == [b"hello"] * 3
        assert [(seen.method, seen.body) for seen in upstream.seen[-3:]] == [
            ("POST", b"abc"),
            ("GET", b""),
            ("GET", b""),
        ]


def test_an_override_of_the_method_is_seen(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
    """In the query of a POST some frameworks take it for the method."""
    for number in range(TIMES):
        assert ask(used, f"/below/{number}", method="POST").status == 200
    refused(ask(used, "/below/x?_method=DELETE", method="POST"), "no_rule")


def test_each_agent_is_itself(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
    proxy.agent("coder-2")
    with contextlib.closing(proxy.tunnel("api.test", agent="coder-2")) as connection:
        assert [ask(connection).status for _ in range(TIMES)] == [200] * TIMES
    assert len(proxy.audit(TIMES, agent="coder-2", path="/one")) == TIMES


def test_a_counted_request_is_counted_each_time(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
    assert [ask(used, "/counted").status for _ in range(5)] == [200, 200, 200, 429, 429]


def test_an_answer_is_edited_each_time(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
    for _ in range(TIMES):
        answer = ask(used, "/edited")
        assert (answer.header("x-seen"), answer.header("x-origin")) == ("yes", None)
        assert ask(used).header("x-origin") == "here"


def test_a_killed_agent_is_cut_and_what_was_under_way_is_on_record(
    proxy: Proxy, upstream: Upstream, used: Connection
) -> None:
    proxy.audit(TIMES, path="/one")

    async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        upstream.seen.append(Seen("", "", [], await reader.readline()))
        await reader.read()

    upstream.reset()
    upstream.raw = silent
    used.send(b"GET /one HTTP/1.1\r\nhost: api.test\r\naccept: */*\r\n\r\n")
    wait_for(lambda: upstream.seen)
    proxy.cli("agent", "kill", "coder-1")
    assert used.closed()
    [line] = proxy.audit(1, path="/one", reason="agent_killed")
    assert line["verdict"] == "block"


def test_a_client_that_leaves_is_on_record_once(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
    waiting: list[Seen] = []

    def slow(seen: Seen) -> Reply:
        waiting.append(seen)
        return Reply(chunks=[b"x"] * 3)

    upstream.handler = slow
    used.send(b"GET /one HTTP/1.1\r\nhost: api.test\r\naccept: */*\r\n\r\n")
    wait_for(lambda: waiting)
    used.close()
    assert len(proxy.audit(TIMES + 1, path="/one")) == TIMES + 1


def test_what_has_expired_is_refused(proxy: Proxy, upstream: Upstream) -> None:
    """An agent and a grant that end while a connection is in use."""
    proxy.agent("brief", "--ttl", "3s")
    with contextlib.closing(proxy.tunnel("api.test", agent="brief")) as connection:
        assert [ask(connection).status for _ in range(TIMES)] == [200] * TIMES
        wait_for(lambda: ask(connection).status == 407)


# Answers that do not come whole with their head

ASKED = b"GET /one HTTP/1.1\r\nhost: api.test\r\naccept: */*\r\n\r\n"
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
FIVE = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n"
EVENTS = [b"data: %d\n\n" % number for number in range(5)]
MARK = b"[redacted:api]"


class Told:
    """An upstream that answers what the test tells it, byte for byte. `None` hangs up."""

    def __init__(self, upstream: Upstream) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self.says: asyncio.Queue[bytes | None] = asyncio.Queue()
        upstream.reset()
        upstream.raw = self.serve

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.loop = asyncio.get_running_loop()
        while True:
            await reader.readuntil(b"\r\n\r\n")
            while said := await self.says.get():
                writer.write(said)
                await writer.drain()
            if said is None:
                return

    def say(self, *pieces: bytes | None) -> None:
        """Send these, one by one; an empty one ends an answer."""
        loop = wait_for(lambda: self.loop, "a connection to the upstream")
        assert loop
        for piece in pieces:
            loop.call_soon_threadsafe(self.says.put_nowait, piece)


def answers(upstream: Upstream, answer: Callable[[Seen], bytes]) -> None:
    """What the upstream says to each request, byte for byte; it keeps its connections."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            seen = await read_request(reader)
            upstream.seen.append(seen)
            writer.write(answer(seen))
            await writer.drain()

    upstream.reset()
    upstream.raw = serve


def streams(upstream: Upstream, *chunks: bytes) -> None:
    upstream.handler = lambda _: Reply(headers=[("content-type", "text/event-stream")], chunks=list(chunks))


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def read_chunk(connection: Connection) -> bytes:
    size = int(connection.read_until(b"\r\n"), 16)
    return connection.read_exactly(size + 2)[:-2]


def begin(used: Connection, told: Told) -> None:
    """A stream whose head and first event have come."""
    used.send(ASKED)
    told.say(STREAM, chunk(EVENTS[0]))
    assert used.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    assert read_chunk(used) == EVENTS[0]


def begin_five(used: Connection, told: Told) -> None:
    """The same with a body of five bytes, of which two have come."""
    used.send(ASKED)
    told.say(FIVE)
    assert used.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    told.say(b"he")
    assert read_chunk(used) == b"he"


def lines_of(proxy: Proxy, count: int) -> list[dict[str, Any]]:
    """The last audit lines about /one, of as many requests as there were in all."""
    lines = proxy.audit(TIMES + count, path="/one")
    assert len(lines) == TIMES + count
    return lines[TIMES:]


@pytest.fixture
def told(upstream: Upstream, used: Connection) -> Told:
    """An upstream that answered with a stream often enough for it to be known, and is told what it says from now on."""
    told = Told(upstream)
    for _ in range(TIMES):
        begin(used, told)
        told.say(b"0\r\n\r\n", b"")
        assert read_chunk(used) == b""
    return told


def test_a_stream_that_is_repeated_arrives_whole(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
    def response_bytes() -> float:
        return proxy.metric("sallyport_bytes_total", agent="coder-1", direction="response")

    streams(upstream, *EVENTS)
    before, bytes_before = replayed(proxy), response_bytes()
    answered = [ask(used) for _ in range(2 * TIMES)]
    assert [answer.body for answer in answered] == [b"".join(EVENTS)] * 2 * TIMES
    assert all(answer == answered[0] for answer in answered)
    assert answered[0].header("content-type") == "text/event-stream"
    size = sum(map(len, EVENTS))
    lines = lines_of(proxy, 2 * TIMES)
    assert all((line["status"], line["response_bytes"], line["redacted"]) == (200, size, []) for line in lines)
    assert replayed(proxy) == before + len(lines)
    assert response_bytes() == bytes_before + len(lines) * size
    assert sent(upstream) == [f"Bearer {SECRET}"] * len(upstream.seen)


def test_streams_of_other_lengths_follow_one_another(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
    """Also an empty one, a large one, and the kind that comes whole."""
    sizes = [3, 0, 70_000, 1, 5]
    for _ in range(TIMES):
        for size in sizes:
            streams(upstream, *[b"x" * 1000] * (size // 1000), *[b"y" * (size % 1000)] * bool(size % 1000))
            assert len(ask(used).body) == size
        upstream.handler = hello
        assert ask(used).body == b"hello"
    lines = lines_of(proxy, TIMES * (len(sizes) + 1))
    assert [line["response_bytes"] for line in lines] == [*sizes, len("hello")] * TIMES


def test_events_of_a_repeated_stream_stay_live(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
    """Each reaches the client before the next is sent, and so does the head."""
    told = Told(upstream)
    for _ in range(TIMES + 1):
        used.send(ASKED)
        told.say(STREAM)
        assert used.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")
        for event in EVENTS:
            told.say(chunk(event))
            assert read_chunk(used) == event
        told.say(b"9\r\ndata")
        assert read_chunk(used) == b"data"
        told.say(b": 1\n\n\r\n")
        assert read_chunk(used) == b": 1\n\n"
        told.say(b"0\r\n\r\n", b"")
        assert read_chunk(used) == b""
    assert upstream.connections == 1
    assert {line["response_bytes"] for line in lines_of(proxy, TIMES + 1)} == {sum(map(len, EVENTS)) + 9}


def test_a_first_event_that_comes_with_the_head_is_not_held_back(
    proxy: Proxy, upstream: Upstream, used: Connection
) -> None:
    told = Told(upstream)
    for _ in range(TIMES + 1):
        used.send(ASKED)
        told.say(STREAM + chunk(EVENTS[0]))
        assert used.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")
        assert read_chunk(used) == EVENTS[0]
        told.say(chunk(EVENTS[1]) + b"0\r\n\r\n", b"")
        assert [read_chunk(used), read_chunk(used)] == [EVENTS[1], b""]


def redactions(proxy: Proxy) -> float:
    return proxy.metric("sallyport_secrets_redacted_total", agent="coder-1", credential="api", where="body")


def test_a_secret_in_a_repeated_stream_is_redacted(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
    """And on record where it was; the next without one is as before."""
    secret, before = SECRET.encode(), redactions(proxy)
    for _ in range(TIMES):
        streams(upstream, *EVENTS)
        assert ask(used).body == b"".join(EVENTS)
        streams(upstream, EVENTS[0], b"key: " + secret, secret[:9], secret[9:] + b"\n\n", EVENTS[1])
        assert ask(used).body == EVENTS[0] + b"key: " + MARK + MARK + b"\n\n" + EVENTS[1]
    lines = lines_of(proxy, 2 * TIMES)
    clean, found = lines[::2], lines[1::2]
    assert [line["redacted"] for line in clean] == [[]] * TIMES
    assert [line["redacted"] for line in found] == [[{"credential": "api", "where": "body", "count": 2}]] * TIMES
    assert {line["response_bytes"] for line in clean} == {sum(map(len, EVENTS))}
    assert {line["response_bytes"] for line in found} == {len(EVENTS[0] * 2) + 7 + 2 * len(secret)}
    assert redactions(proxy) == before + 2 * TIMES


def test_a_secret_in_events_that_come_apart_is_redacted(
    proxy: Proxy, upstream: Upstream, used: Connection, told: Told
) -> None:
    secret, before, count = SECRET.encode(), redactions(proxy), replayed(proxy)
    begin(used, told)
    told.say(chunk(b"key: " + secret[:9]))
    assert read_chunk(used) == b"key: "
    told.say(chunk(secret[9:] + b"\n\n"))
    assert read_chunk(used) == MARK + b"\n\n"
    told.say(chunk(b"key: " + secret[:9]))
    assert read_chunk(used) == b"key: "
    told.say(b"0\r\n\r\n", b"")
    assert read_chunk(used) == secret[:9], "it was none"
    assert read_chunk(used) == b""
    line = lines_of(proxy, TIMES + 1)[-1]
    assert line["redacted"] == [{"credential": "api", "where": "body", "count": 1}]
    assert line["response_bytes"] == len(EVENTS[0]) + 12 + len(secret) + 9
    assert redactions(proxy) == before + 1
    assert replayed(proxy) == count + 1


def test_a_stream_where_nothing_is_looked_for_is_passed_on(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
    """No credential is for that host."""
    streams(upstream, *EVENTS)
    before = replayed(proxy)
    with contextlib.closing(proxy.tunnel("other.test")) as connection:
        for _ in range(2 * TIMES):
            answer = ask(connection, "/stream", host="other.test")
            assert answer.body == b"".join(EVENTS)
            assert not connection.buffer
    assert replayed(proxy) == before + 2 * TIMES - 2


def test_the_head_of_a_repeated_stream_is_edited(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
    """Where the rule says so."""
    upstream.handler = lambda _: Reply(headers=[("x-origin", "here")], chunks=EVENTS)
    for _ in range(TIMES):
        answered = [ask(used, path) for path in ("/edited", "/edited", "/one", "/one")]
        assert [answer.header("x-seen") for answer in answered] == ["yes", "yes", None, None]
        assert [answer.header("x-origin") for answer in answered] == [None, None, "here", "here"]
        assert {answer.body for answer in answered} == {b"".join(EVENTS)}


@pytest.mark.parametrize(
    ("last", "left"),
    [
        ([None], b""),
        ([b"5\r\nhel", None], b"3\r\nhel\r\n"),
        ([b"0\r\n", None], b""),
        ([b"no size\r\n"], b""),
    ],
    ids=["between chunks", "in a chunk", "before the trailers", "a malformed chunk"],
)
def test_a_repeated_stream_that_breaks_off_is_not_taken_for_whole(
    proxy: Proxy, upstream: Upstream, used: Connection, told: Told, last: list[bytes | None], left: bytes
) -> None:
    """The client is cut before the last chunk, it is on record once, and who asks next is answered."""
    begin(used, told)
    told.say(*last)
    assert used.rest() == left
    upstream.raw, upstream.handler = None, hello
    with contextlib.closing(proxy.tunnel("api.test")) as connection:
        assert ask(connection).body == b"hello"
    proxy.stop()
    lines = lines_of(proxy, TIMES + 2)[-2:]
    assert [(line["verdict"], line["status"]) for line in lines] == [("allow", 200)] * 2
    assert [line["response_bytes"] for line in lines] == [len(EVENTS[0]) + (3 if left else 0), len("hello")]


def test_a_killed_agent_is_cut_in_the_middle_of_a_repeated_stream(
    proxy: Proxy, upstream: Upstream, used: Connection, told: Told
) -> None:
    begin(used, told)
    proxy.cli("agent", "kill", "coder-1")
    assert used.closed()
    proxy.stop()
    line = lines_of(proxy, TIMES + 1)[-1]
    assert (line["verdict"], line["reason"]) == ("block", "agent_killed")
    assert (line["status"], line["response_bytes"]) == (200, len(EVENTS[0]))
    assert line["injected"][0]["credential"] == "api"


def test_a_client_that_leaves_a_repeated_stream_is_on_record_once(
    proxy: Proxy, upstream: Upstream, used: Connection, told: Told
) -> None:
    begin(used, told)
    used.close()
    proxy.audit(2 * TIMES + 1, path="/one")
    proxy.stop()
    line = lines_of(proxy, TIMES + 1)[-1]
    assert (line["verdict"], line["status"], line["response_bytes"]) == ("allow", 200, len(EVENTS[0]))


def test_a_long_body_that_is_repeated_arrives_whole(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
    """Another one behind the same head each time, at last with a secret in it."""
    bodies = [random.Random(number).randbytes(300_000) for number in range(2 * TIMES)]
    for body in bodies:
        upstream.handler = lambda _, body=body: Reply(body=body)  # type: ignore[misc]
        assert ask(used).body == body
    body = bodies[0][:150_000] + SECRET.encode() + bodies[0][150_000 + len(SECRET) :]
    upstream.handler = lambda _: Reply(body=body)
    assert ask(used).body == body.replace(SECRET.encode(), MARK)
    lines = lines_of(proxy, 2 * TIMES + 1)
    assert {line["response_bytes"] for line in lines} == {300_000}
    assert [len(line["redacted"]) for line in lines] == [0] * 2 * TIMES + [1]
    assert upstream.connections == 1


def test_a_long_body_where_nothing_is_looked_for_keeps_its_length(
    proxy: Proxy, upstream: Upstream, used: Connection
) -> None:
    """No credential is for that host."""
    body = random.Random(5).randbytes(300_000)
    upstream.handler = lambda _: Reply(body=body)
    with contextlib.closing(proxy.tunnel("other.test")) as connection:
        for _ in range(2 * TIMES):
            answer = ask(connection, "/long", host="other.test")
            assert answer.body == body
            assert answer.header("content-length") == "300000"
    assert {line["response_bytes"] for line in proxy.audit(2 * TIMES, host="other.test")} == {300_000}


@pytest.mark.parametrize("whole_first", [True, False])
def test_a_body_may_come_with_its_head_or_behind_it(
    proxy: Proxy, upstream: Upstream, used: Connection, whole_first: bool
) -> None:
    told = Told(upstream)
    for number in range(2 * TIMES):
        if number % 2 == whole_first:
            begin_five(used, told)
            told.say(b"llo", b"")
            assert [read_chunk(used), read_chunk(used)] == [b"llo", b""]
        else:
            used.send(ASKED)
            told.say(FIVE + b"hello", b"")
            assert used.response().body == b"hello"
        assert not used.buffer
    lines = lines_of(proxy, 2 * TIMES)
    assert {(line["status"], line["response_bytes"]) for line in lines} == {(200, 5)}
    assert upstream.connections == 1


def test_a_repeated_body_that_breaks_off_is_not_taken_for_whole(
    proxy: Proxy, upstream: Upstream, used: Connection
) -> None:
    told = Told(upstream)
    for _ in range(TIMES):
        begin_five(used, told)
        told.say(b"llo", b"")
        assert [read_chunk(used), read_chunk(used)] == [b"llo", b""]
    begin_five(used, told)
    told.say(b"ll", None)
    assert used.rest() == chunk(b"ll")
    assert [line["response_bytes"] for line in lines_of(proxy, TIMES + 1)] == [5] * TIMES + [4]


def test_answers_without_a_body_are_told_from_streams(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
    """By the method or the status, whatever their heads say."""
    heads = {
        "/below/204": b"HTTP/1.1 204 None\r\n\r\n",
        "/below/304": b'HTTP/1.1 304 Same\r\netag: "1"\r\ncontent-length: 500\r\n\r\n',
        "/below/chunked": STREAM.replace(b" 200 ", b" 304 "),
    }

    def answer(seen: Seen) -> bytes:
        body = b"" if seen.method == "HEAD" else b"".join(map(chunk, EVENTS)) + b"0\r\n\r\n"
        return heads.get(seen.target) or STREAM + body

    answers(upstream, answer)
    for _ in range(TIMES):
        assert ask(used).body == b"".join(EVENTS)
        head = ask(used, method="HEAD")
        assert (head.status, head.header("content-type")) == (200, "text/event-stream")
        assert ask(used).body == b"".join(EVENTS)
        assert [ask(used, path).status for path in heads] == [204, 304, 304]
        assert not used.buffer
    assert upstream.connections == 1
    assert {line["response_bytes"] for line in proxy.audit(3 * TIMES, rule="below")} == {0}
    assert replayed(proxy) > 4 * TIMES


@pytest.mark.parametrize("apart", [True, False])
def test_trailers_of_a_repeated_stream_do_not_pass(
    proxy: Proxy, upstream: Upstream, used: Connection, told: Told, apart: bool
) -> None:
    """And the connection carries the next request."""
    trailers = [b"0\r\nx-key: ", SECRET.encode() + b"\r\nx-sum", b": 1\r\n\r\n"]
    for _ in range(TIMES):
        begin(used, told)
        told.say(*trailers if apart else [b"".join(trailers)], b"")
        assert read_chunk(used) == b""
        assert not used.buffer
    assert upstream.connections == 1
    lines = lines_of(proxy, 2 * TIMES)
    assert {(line["response_bytes"], len(line["redacted"])) for line in lines} == {(len(EVENTS[0]), 0)}


def test_a_stream_that_is_malformed_from_its_head_on_is_on_record(
    proxy: Proxy, upstream: Upstream, used: Connection, told: Told
) -> None:
    before = replayed(proxy)
    used.send(ASKED)
    told.say(STREAM + b"no size\r\n")
    assert used.rest() == b""
    assert lines_of(proxy, TIMES + 1)[-1]["status"] == 200
    assert replayed(proxy) == before + 1


def test_what_was_redacted_before_a_kill_is_on_record(
    proxy: Proxy, upstream: Upstream, used: Connection, told: Told
) -> None:
    begin(used, told)
    told.say(chunk(SECRET.encode() + b"\n\n"))
    assert read_chunk(used) == MARK + b"\n\n"
    proxy.cli("agent", "kill", "coder-1")
    assert used.closed()
    assert len(lines_of(proxy, TIMES + 1)[-1]["redacted"]) == 1
