"""Credentials over the wire: each kind as the upstream sees it, changed and taken away while requests go through."""

from __future__ import annotations

import base64
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import Proxy, Reply, Seen, Upstream, wait_for
from tests.storage import RemoteStore, server_pid

type Make = Callable[..., Proxy]

SECRET = "real-key-4f1e9b7c2d"
KINDS = {
    "bearer": "as: bearer",
    "basic": "as: basic, username: robot",
    "nameless": "as: basic",
    "header": 'as: header, name: X-Api-Key, value: "Token {secret}"',
    "query": "as: query, name: key",
    "cookie": "as: cookie, name: session",
    "placeholder": "as: placeholder, in: [header, query, path, body]",
    "in-body": "as: placeholder, in: [body]",
}
RULES = "version: 1\nrules:\n" + "".join(
    f"  - name: {name}\n    match: {{host: api.test, path: /{name}/**}}\n    action: allow\n"
    f"    inject: [{{credential: {'mark' if 'placeholder' in how else 'api'}, {how}}}]\n"
    for name, how in KINDS.items()
)


def rule(name: str, credential: str, host: str = "api.test", how: str = "bearer") -> str:
    """One more rule, which injects `credential` below the path /name/."""
    return (
        f"  - name: {name}\n    match: {{host: {host}, path: /{name}/**}}\n    action: allow\n"
        f"    inject: [{{credential: {credential}, as: {how}}}]\n"
    )


RULES += rule("missing", "nothing") + rule("unscoped", "api", "other.test") + rule("limited", "limited")
RULES += rule("changing", "changing") + rule("short", "short") + rule("plain", "api").partition("    inject")[0]


@pytest.fixture(scope="module")
def proxy(make_proxy: Make) -> Proxy:
    proxy = make_proxy(RULES)
    proxy.agent()
    proxy.agent("coder-2")
    proxy.credential("api", SECRET, "--host", "api.test")
    proxy.credential("mark", SECRET, "--kind", "placeholder", "--host", "api.test")
    return proxy


@pytest.fixture(scope="module")
def served(make_proxy: Make, lane: str) -> Proxy:
    """One whose credentials stay as they are."""
    proxy = make_proxy(RULES, lane=lane)
    proxy.agent()
    proxy.credential("api", SECRET, "--host", "api.test")
    proxy.credential("mark", SECRET, "--kind", "placeholder", "--host", "api.test")
    return proxy


MARK = "slp_placeholder_mark"


def basic(user: str, password: str = SECRET) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def test_bearer_replaces_every_authorization_of_the_agent(served: Proxy, upstream: Upstream) -> None:
    headers = {"Authorization": "Bearer mine", "authorization": "Basic bWluZTptaW5l", "AUTHORIZATION": "x"}
    assert served.get("https://api.test/bearer/x", headers=headers).status == 200
    assert upstream.seen[0].header("authorization") == [f"Bearer {SECRET}"]


@pytest.mark.parametrize(("kind", "user"), [("basic", "robot"), ("nameless", "")])
def test_basic_takes_its_user_name_from_the_rule(served: Proxy, upstream: Upstream, kind: str, user: str) -> None:
    """RFC 7617: without one the name is empty."""
    assert served.get(f"https://api.test/{kind}/x", headers={"authorization": basic("me", "mine")}).status == 200
    assert upstream.seen[0].header("authorization") == [basic(user)]


def test_a_header_is_set_by_its_template(served: Proxy, upstream: Upstream) -> None:
    headers = {"x-api-key": "mine", "X-API-KEY": "mine too", "authorization": "Bearer mine"}
    assert served.get("https://api.test/header/x", headers=headers).status == 200
    assert upstream.seen[0].header("x-api-key") == [f"Token {SECRET}"]
    assert upstream.seen[0].header("authorization") == ["Bearer mine"], "not what the rule sets"


@pytest.mark.parametrize("query", ["key=mine", "a=1&key=mine&b=2&key=again", "k%65y=mine", "b=2&key", ""])
def test_a_query_parameter_is_the_only_one_of_its_name(served: Proxy, upstream: Upstream, query: str) -> None:
    assert served.get(f"https://api.test/query/x?{query}").status == 200
    target = upstream.seen[0].target
    assert target.endswith(f"key={SECRET}")
    assert target.count("key") == 1 + SECRET.count("key")
    assert "mine" not in target
    assert "k%65y" not in target
    assert [pair for pair in ("a=1", "b=2") if pair in query] == [pair for pair in ("a=1", "b=2") if pair in target]


@pytest.mark.parametrize("cookie", ["session=mine", "a=1; session=mine; b=2", "SESSION=mine; session = spaced", ""])
def test_a_cookie_is_the_only_one_of_its_name(served: Proxy, upstream: Upstream, cookie: str) -> None:
    """Names of cookies are case-sensitive (RFC 6265), so SESSION is another one."""
    assert served.get("https://api.test/cookie/x", headers={"cookie": cookie, "Cookie": "z=9"}).status == 200
    (sent,) = upstream.seen[0].header("cookie")
    cookies = [part.strip() for part in sent.split(";")]
    assert f"session={SECRET}" in cookies
    assert len([part for part in cookies if part.partition("=")[0].strip() == "session"]) == 1
    assert "z=9" in cookies


def test_a_placeholder_is_replaced_wherever_the_agent_wrote_it(served: Proxy, upstream: Upstream) -> None:
    """Inside a Basic header too."""
    headers = {"x-key": f"<{MARK}>", "authorization": basic("me", MARK)}
    url = f"https://api.test/placeholder/{MARK}/x?q={MARK}&r=a%26b"
    assert served.get(url, method="POST", headers=headers, body=f'{{"key": "{MARK}"}}'.encode()).status == 200
    seen = upstream.seen[0]
    assert seen.header("x-key") == [f"<{SECRET}>"]
    assert seen.header("authorization") == [basic("me")]
    assert seen.target == f"/placeholder/{SECRET}/x?q={SECRET}&r=a%26b"
    assert seen.body == f'{{"key": "{SECRET}"}}'.encode()
    assert seen.header("content-length") == [str(len(seen.body))]
    where = {entry["location"] for entry in served.audit(rule="placeholder")[-1]["injected"]}
    assert where == {f"placeholder:{place}" for place in ("header", "query", "path", "body")}


def test_without_the_placeholder_nothing_is_injected(served: Proxy, upstream: Upstream) -> None:
    """And nothing is put on record as injected."""
    assert served.get("https://api.test/placeholder/none", method="POST", body=b"hello").status == 200
    assert SECRET not in str(upstream.seen[0])
    assert served.audit(path="/placeholder/none")[0]["injected"] == []


def send_body(served: Proxy, path: str, head: str, pieces: Iterator[bytes]) -> int:
    client = served.tunnel("api.test")
    client.send(f"POST {path} HTTP/1.1\r\nhost: api.test\r\n{head}\r\n\r\n".encode())
    for piece in pieces:
        client.send(piece)
    return client.response().status


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_placeholder_is_found_across_chunks(served: Proxy, upstream: Upstream, size: int) -> None:
    body = f"a{MARK}b{MARK}{MARK[:-1]}c".encode()
    chunks = (body[at : at + size] for at in range(0, len(body), size))
    coded = (b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    pieces = iter([*coded, b"0\r\n\r\n"])
    assert send_body(served, "/in-body/chunked", "transfer-encoding: chunked", pieces) == 200
    assert upstream.seen[0].body == f"a{SECRET}b{SECRET}{MARK[:-1]}c".encode()


def test_a_placeholder_is_found_in_a_body_too_large_to_hold(served: Proxy, upstream: Upstream) -> None:
    """Its new length is not known when its head is sent, so it goes on in chunks."""
    filler = b"x" * 1_500_000
    pieces = iter([filler, MARK.encode(), filler])
    head = f"content-length: {2 * len(filler) + len(MARK)}"
    assert send_body(served, "/in-body/large", head, pieces) == 200
    seen: Seen = upstream.seen[0]
    assert seen.header("transfer-encoding") == ["chunked"]
    assert seen.header("content-length") == []
    assert seen.body == filler + SECRET.encode() + filler
    assert [entry["location"] for entry in served.audit(path="/in-body/large")[0]["injected"]] == ["placeholder:body"]


def test_a_credential_that_does_not_exist_refuses(served: Proxy, upstream: Upstream) -> None:
    """The name of it is for the operator, not for the agent."""
    response = served.get("https://api.test/missing/x")
    assert (response.status, response.code) == (503, "credential_unavailable")
    assert upstream.connections == 0
    assert served.audit(path="/missing/x")[0]["rule"] == "missing"
    assert served.get("https://api.test/plain/x").status == 200, "others go on"


def test_put_rotate_and_remove_take_effect_within_a_second(proxy: Proxy, upstream: Upstream) -> None:
    def sent() -> list[str]:
        upstream.seen.clear()
        proxy.get("https://api.test/changing/x")
        return upstream.seen[0].header("authorization") if upstream.seen else []

    assert sent() == []
    for words, secret in ((("put", "changing", "--host", "api.test"), "first-one"), (("rotate", "changing"), "second")):
        proxy.cli("vault", *words, stdin=secret)
        before = time.monotonic()
        wait_for(lambda secret=secret: sent() == [f"Bearer {secret}"])  # type: ignore[misc]
        assert time.monotonic() - before < 1.5
    proxy.cli("vault", "remove", "changing")
    before = time.monotonic()
    wait_for(lambda: sent() == [])
    assert time.monotonic() - before < 1.5
    assert proxy.get("https://api.test/changing/x").code == "credential_unavailable"
    versions = [line["injected"][0]["version"] for line in proxy.audit(verdict="allow", rule="changing")]
    assert sorted(set(versions)) == [1, 2]


GRANTS = [
    (["--host", "other.test"], "GET", "/limited/a", False),
    (["--host", "*.test"], "GET", "/limited/a", True),
    (["--host", "api.test:8443"], "GET", "/limited/a", False),
    (["--host", "api.test:443"], "GET", "/limited/a", True),
    (["--host", "api.test", "--method", "POST"], "GET", "/limited/a", False),
    (["--host", "api.test", "--method", "get"], "HEAD", "/limited/a", True),
    (["--host", "api.test", "--path", "/limited/b/**"], "GET", "/limited/a", False),
    (["--host", "api.test", "--path", "/limited/a"], "GET", "/limited/a", True),
    (["--host", "api.test", "--path", "/limited/a"], "GET", "/limited/x/%2e%2e/a", True),
    (["--host", "api.test", "--path", "/limited/a*"], "GET", "/limited/a%2fb", False),
    (["--host", "api.test", "--agent", "coder-2"], "GET", "/limited/a", False),
    (["--host", "api.test", "--agent", "coder-*"], "GET", "/limited/a", True),
    (["--host", "api.test", "--expires", "2001-01-31"], "GET", "/limited/a", False),
    (["--host", "api.test", "--expires", "1h"], "GET", "/limited/a", True),
]


@pytest.mark.parametrize(("grant", "method", "path", "granted"), GRANTS, ids=[" ".join(g[0]) + g[2] for g in GRANTS])
def test_the_grant_is_checked_for_each_request(
    proxy: Proxy, upstream: Upstream, grant: list[str], method: str, path: str, granted: bool
) -> None:
    """Although the rule asks for it every time."""
    version = json.loads(proxy.cli("vault", "put", "limited", "--json", *grant, stdin=SECRET).stdout)["version"]

    if granted:

        def injected() -> bool:
            status = proxy.get(f"https://api.test{path}", method=method).status
            lines = proxy.audit(rule="limited", verdict="allow") if status == 200 else []
            return any(line["injected"][0]["version"] == version for line in lines)

        wait_for(injected, "the new grant")
        return
    wait_for(lambda: proxy.get(f"https://api.test{path}", method=method).status == 403, "the new grant")
    before = len(upstream.seen)
    response = proxy.get(f"https://api.test{path}", method="GET")
    assert (response.status, response.code) == (403, "credential_scope")
    assert len(upstream.seen) == before


def test_an_expiry_is_honoured_although_the_lease_is_fresh(proxy: Proxy, upstream: Upstream) -> None:
    proxy.credential("short", SECRET, "--host", "api.test", "--expires", "2s")
    wait_for(lambda: proxy.get("https://api.test/short/x").status == 200)
    wait_for(lambda: proxy.get("https://api.test/short/x").status == 403)
    assert proxy.get("https://api.test/short/x").code == "credential_scope"


BAD = [
    (b"", [], "the secret is empty"),
    (b"\n", [], "the secret is empty"),
    (b"a\nb", ["--kind", "bearer"], "line break"),
    (b"a\0b", ["--kind", "header", "--field", "name=x-key"], "line break or NUL"),
    (b"x" * (1 << 20), [], "64 KiB"),
]


@pytest.mark.parametrize(("secret", "words", "told"), BAD)
def test_a_secret_that_cannot_be_used_is_refused_in_one_line(
    proxy: Proxy, secret: bytes, words: list[str], told: str
) -> None:
    result = proxy.cli("vault", "put", "bad", "--host", "api.test", *words, stdin=secret, check=False)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert told in result.stderr
    assert "bad" not in proxy.cli("vault", "list").stdout


def test_one_newline_at_the_end_is_left_out_and_said(proxy: Proxy, upstream: Upstream) -> None:
    """`echo secret | sallyport vault put` is what everybody types."""
    result = proxy.cli("vault", "put", "changing", "--host", "api.test", stdin="from-echo\n")
    assert "one newline at the end of the secret was left out" in result.stderr
    wait_for(lambda: proxy.get("https://api.test/changing/x").status == 200)
    assert upstream.seen[-1].header("authorization") == ["Bearer from-echo"]


def test_a_secret_of_one_byte_works_and_is_warned_of(proxy: Proxy, upstream: Upstream) -> None:
    """It is in every answer by chance, so it cannot be taken out of one."""
    result = proxy.cli("vault", "put", "changing", "--host", "api.test", stdin="e")
    assert "is not redacted" in result.stderr
    wait_for(lambda: upstream_got(proxy, upstream, "Bearer e"))
    assert b"[redacted" not in proxy.get("https://api.test/changing/x").body


def test_the_largest_secret_is_injected_and_redacted(proxy: Proxy, upstream: Upstream) -> None:
    """64 KiB: more than any server takes in a header, enough for a chain of certificates in a body."""
    secret = "".join(f"{number:08x}" for number in range(8192))
    proxy.cli("vault", "put", "mark", "--kind", "placeholder", "--host", "api.test", stdin=secret)
    upstream.handler = lambda seen: Reply(body=seen.body)

    def injected() -> bool:
        body = proxy.get("https://api.test/in-body/big", method="POST", body=MARK.encode()).body
        assert secret.encode() not in body
        return upstream.seen[-1].body == secret.encode() and body == b"[redacted:mark]"

    wait_for(injected)
    proxy.credential("mark", SECRET, "--kind", "placeholder", "--host", "api.test")


def upstream_got(proxy: Proxy, upstream: Upstream, value: str) -> bool:
    upstream.seen.clear()
    proxy.get("https://api.test/changing/x")
    return bool(upstream.seen) and upstream.seen[0].header("authorization") == [value]


# The master key


def test_a_master_key_that_does_not_fit_the_store_is_one_line(make_proxy: Make) -> None:
    proxy = make_proxy(RULES, start=False)
    proxy.cli("vault", "put", "api", "--host", "api.test", stdin=SECRET)
    proxy.environment["SALLYPORT_MASTER_KEY"] = "ab" * 32
    for words in (("run",), ("vault", "list"), ("agent", "add", "coder-9")):
        result = proxy.cli(*words, check=False)
        assert result.returncode == 1
        assert result.stderr.count("\n") == 1
        assert "SALLYPORT_MASTER_KEY" in result.stderr
        assert "sealed under" in result.stderr
        assert "ab" * 32 not in result.stderr


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda path: path.chmod(0o644), "chmod 600"),
        (lambda path: path.write_text("hello\n"), "holds no master key"),
        (lambda path: path.unlink(), "there is none in"),
    ],
)
def test_a_spoilt_master_key_is_one_line(make_proxy: Make, spoil: Callable[[Path], object], told: str) -> None:
    proxy = make_proxy(RULES, start=False)
    proxy.cli("vault", "put", "api", "--host", "api.test", stdin=SECRET)
    spoil(proxy.folder / ".sallyport" / "master.key")
    result = proxy.cli("run", check=False)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert told in result.stderr


# The store


def test_when_the_embedded_store_dies_leases_live_and_it_comes_back(make_proxy: Make, upstream: Upstream) -> None:
    """Started again by the proxy, with all that was in it."""
    proxy = make_proxy(RULES)
    proxy.agent()
    proxy.credential("api", SECRET, "--host", "api.test")
    assert proxy.get("https://api.test/bearer/x").status == 200
    state = proxy.folder / ".sallyport"
    os.kill(server_pid(state), signal.SIGKILL)
    assert proxy.get("https://api.test/bearer/x").status == 200
    wait_for(lambda: "the store is back" in proxy.stderr_text())
    wait_for(lambda: proxy.fetch_admin("/readyz")[0] == 200)
    proxy.cli("vault", "rotate", "api", stdin="after-the-crash")
    wait_for(lambda: got(proxy, upstream, "Bearer after-the-crash"))


def got(proxy: Proxy, upstream: Upstream, value: str) -> bool:
    upstream.seen.clear()
    proxy.get("https://api.test/bearer/x")
    return bool(upstream.seen) and upstream.seen[0].header("authorization") == [value]


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[RemoteStore]:
    with RemoteStore(tmp_path) as store:
        yield store


def test_a_remote_store_that_goes_and_comes_back(make_proxy: Make, upstream: Upstream, remote: RemoteStore) -> None:
    """What is open stays open for its lease, what needs the store is refused, what does not goes on."""
    proxy = make_proxy(RULES, start=False, store=remote.url)
    remote.start()
    proxy.start()
    proxy.agent()
    proxy.credential("api", SECRET, "--host", "api.test")
    proxy.credential("changing", "never-opened", "--host", "api.test")
    assert proxy.get("https://api.test/bearer/x").status == 200
    remote.kill()
    wait_for(lambda: proxy.fetch_admin("/readyz")[0] == 503)
    assert json.loads(proxy.fetch_admin("/readyz")[1])["not_ready"] == {"store": "the store does not answer"}
    assert proxy.metric("sallyport_store_up") == 0
    assert proxy.get("https://api.test/bearer/x").status == 200
    assert proxy.get("https://api.test/plain/x").status == 200
    response = proxy.get("https://api.test/changing/x")
    assert (response.status, response.code) == (503, "credential_unavailable")
    remote.start()
    wait_for(lambda: proxy.fetch_admin("/readyz")[0] == 200)
    assert proxy.get("https://api.test/changing/x").status == 200
    assert proxy.metric("sallyport_store_up") == 1


def test_a_lease_ends_while_the_store_is_down(make_proxy: Make, upstream: Upstream, remote: RemoteStore) -> None:
    proxy = make_proxy(RULES, start=False, store=remote.url, vault={"lease": "1s"})
    remote.start()
    proxy.start()
    proxy.agent()
    proxy.credential("api", SECRET, "--host", "api.test")
    assert proxy.get("https://api.test/bearer/x").status == 200
    remote.kill()
    wait_for(lambda: proxy.get("https://api.test/bearer/x").status == 503)
    assert proxy.get("https://api.test/bearer/x").code == "credential_unavailable"
    assert proxy.get("https://api.test/plain/x").status == 200


def test_it_starts_without_its_store_and_recovers_by_itself(
    make_proxy: Make, upstream: Upstream, remote: RemoteStore
) -> None:
    """Nobody can be identified meanwhile, so everything is refused."""
    proxy = make_proxy(RULES, start=False, store=remote.url)
    proxy.start()
    assert remote.url in "".join(proxy.said)
    assert proxy.fetch_admin("/readyz")[0] == 503
    client = proxy.connect()
    client.send(b"GET http://api.test/ HTTP/1.1\r\nhost: api.test\r\nproxy-authorization: Bearer x\r\n\r\n")
    response = client.response()
    assert (response.status, response.code) == (503, "store_unavailable")
    client = proxy.connect()
    client.send(b"CONNECT api.test:443 HTTP/1.1\r\nhost: api.test:443\r\nproxy-authorization: Bearer x\r\n\r\n")
    assert client.response().code == "store_unavailable"
    assert upstream.connections == 0
    result = proxy.cli("agent", "list", check=False)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "check that it runs" in result.stderr
    remote.start()
    wait_for(lambda: proxy.fetch_admin("/readyz")[0] == 200)
    proxy.agent()
    proxy.credential("api", SECRET, "--host", "api.test")
    assert proxy.get("https://api.test/bearer/x").status == 200
    assert upstream.seen[0].header("authorization") == [f"Bearer {SECRET}"]
