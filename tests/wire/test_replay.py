"""A client that asks the same again and again on one connection: it is decided once, and anew when anything changes."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterator

import pytest

from tests.harness import Connection, Proxy, Reply, Response, Seen, Upstream, refused, wait_for

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
    wait_for(lambda: proxy.get(f"https://api.test/guard/{SECRET}").status == 403, "the guard")
    upstream.seen.clear()
    yield proxy
    proxy.stop()


def ask(
    connection: Connection, path: str = "/one", *lines: str, method: str = "GET", body: bytes | None = None
) -> Response:
    if body is not None:
        lines = (*lines, f"content-length: {len(body)}")
    head = "\r\n".join([f"{method} {path} HTTP/1.1", "host: api.test", "accept: */*", *lines])
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


def test_each_is_sent_answered_and_recorded_alike(proxy: Proxy, upstream: Upstream, used: Connection) -> None:
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
    assert proxy.metric("sallyport_rule_requests_total", rule="one", verdict="allow") == TIMES
    assert proxy.metric("sallyport_upstream_duration_seconds_count") == TIMES
    assert proxy.metric("sallyport_requests_replayed_total") == TIMES - 2


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
