"""Whatever way a credential goes out, and however the request ends, it is found nowhere but at the upstream."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.clients.sandbox import Sandbox, assert_no_trace, files, search, spellings, tool
from tests.harness import Proxy, Reply, Seen, Upstream, wait_for

SECRET = "s3cr3t/with+signs=and~more-Zk4Wq"
NEXT = "its-successor-t8Hb2LpX5cVn"
RULES = """
version: 1
rules:
  - name: as-bearer
    match: {host: api.test, path: /bearer/*}
    action: allow
    inject: [{credential: key, as: bearer}]
  - name: as-basic
    match: {host: api.test, path: /basic}
    action: allow
    inject: [{credential: key, as: basic, username: coder}]
  - name: as-header
    match: {host: api.test, path: /header}
    action: allow
    inject: [{credential: key, as: header, name: x-key, value: "Token {secret}"}]
  - name: as-query
    match: {host: api.test, path: /query}
    action: allow
    inject: [{credential: key, as: query, name: key}]
  - name: as-cookie
    match: {host: api.test, path: /cookie}
    action: allow
    inject: [{credential: key, as: cookie, name: session}]
  - name: as-placeholder
    match: {host: api.test, path: /placeholder/**}
    action: allow
    inject: [{credential: key, as: placeholder, in: [header, query, path, body]}]
"""
MARK = "slp_placeholder_key"
KINDS = {
    "bearer": ("/bearer/mirror",),
    "basic": ("/basic",),
    "header": ("/header",),
    "query": ("/query?a=1",),
    "cookie": ("/cookie", "--cookie", "a=1"),
    "placeholder": (f"/placeholder/{MARK}?q={MARK}", "--header", f"x-mark: {MARK}", "--data", f"body={MARK}"),
}


@pytest.fixture(scope="module")
def proxy(make_proxy: Callable[..., Proxy]) -> Proxy:
    proxy = make_proxy(RULES)
    proxy.credential("key", SECRET, "--host", "api.test")
    return proxy


def mirror(seen: Seen) -> Reply:
    """All that arrived, in the body and in a header."""
    lines = [seen.target, *(f"{name}: {value}" for name, value in seen.headers), seen.body.decode()]
    headers = [("location", f"https://api.test{seen.target}"), ("set-cookie", f"all={quote('|'.join(lines), safe='')}")]
    return Reply(headers=headers, body=json.dumps(lines).encode())


def arrived(seen: Seen, secret: str) -> bool:
    """Whether an upstream got the credential, in any spelling."""
    whole = "\n".join([seen.target, *(value for _, value in seen.headers), seen.body.decode()]).encode()
    return any(spelling in whole for spelling in spellings(secret))


@pytest.mark.parametrize("kind", KINDS)
def test_an_upstream_that_mirrors_the_request_gives_nothing_away(
    proxy: Proxy, upstream: Upstream, sandbox: Sandbox, kind: str
) -> None:
    """Whichever way the credential went, it comes back redacted from header and body."""
    upstream.handler = mirror
    path, *words = KINDS[kind]
    result = sandbox.run(tool("curl"), "--silent", "--show-error", "--verbose", *words, f"https://api.test{path}")
    assert [arrived(seen, SECRET) for seen in upstream.seen] == [True], result.stdout
    assert "[redacted:key]" in result.stdout
    proxy.audit(rule=f"as-{kind}", status=200)
    sandbox.assert_no_trace(SECRET)


FAILURES = {
    "a malformed status line": b"HTTP/1.1 {secret}\r\n\r\n",
    "a header that is none": b"HTTP/1.1 200 OK\r\n{secret}\r\ncontent-length: 0\r\n\r\n",
    "no HTTP at all": b"{secret} {secret} {secret}\r\n\r\n",
    "a chunk of no size": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{secret}\r\n",
    "a body that is cut": b"HTTP/1.1 200 OK\r\ncontent-length: 9999\r\n\r\n{secret}",
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: {secret}\r\ncontent-length: 2\r\n\r\nab",
    "a coding that is no coding": b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\n\r\n{secret}",
    "an early hint": b"HTTP/1.1 103 Hints\r\nlink: {secret}\r\n\r\nHTTP/1.1 200 {secret}\r\ncontent-length: 0\r\n\r\n",
}


@pytest.mark.parametrize("failure", FAILURES)
def test_an_upstream_that_fails_gives_nothing_away(
    proxy: Proxy, upstream: Upstream, sandbox: Sandbox, failure: str
) -> None:
    """Errors are where proxies quote what they could not read; the client may fail in any way it likes."""
    upstream.handler = lambda _: Reply(raw=FAILURES[failure].replace(b"{secret}", SECRET.encode()))
    path = f"/bearer/{failure.replace(' ', '-')}"
    curl = f"{tool('curl')} --silent --show-error --verbose --max-time 10 https://api.test{path}"
    sandbox.run("/bin/sh", "-c", f"{curl} || exit 0")
    assert [arrived(seen, SECRET) for seen in upstream.seen] == [True]
    proxy.audit(path=path)
    sandbox.assert_no_trace(SECRET)


def test_a_rotated_credential_is_as_well_hidden(make_proxy: Callable[..., Proxy], upstream: Upstream) -> None:
    """Before and after, while it is removed, and when the proxy has stopped and left its files."""
    proxy = make_proxy(RULES)
    proxy.credential("key", SECRET, "--host", "api.test")
    assert proxy.get("https://api.test/bearer/1").status == 200
    proxy.cli("vault", "rotate", "key", stdin=NEXT)
    wait_for(
        lambda: proxy.get("https://api.test/bearer/1").status == 200 and arrived(upstream.seen[-1], NEXT), "rotation"
    )
    told = [proxy.cli("vault", *words).stdout for words in (("list",), ("list", "--json"), ("show", "key"))]
    proxy.cli("vault", "remove", "key")
    wait_for(lambda: proxy.get("https://api.test/bearer/1").status == 503, "removal")
    for secret in (SECRET, NEXT):
        assert_no_trace(proxy, secret)
        search([("vault", text.encode()) for text in told], secret)
    proxy.stop()
    for secret in (SECRET, NEXT):
        search([*files(proxy.folder)], secret)


def test_a_token_is_in_no_output_either(proxy: Proxy, upstream: Upstream, sandbox: Sandbox) -> None:
    """It is the agent's own, so its environment has it; the proxy holds a digest, and the token only under seal."""
    sandbox.run(tool("curl"), "--silent", "https://api.test/bearer/1")
    assert not upstream.seen[0].header("proxy-authorization")
    assert_no_trace(proxy, proxy.tokens["coder-1"])


@pytest.mark.parametrize(
    "hidden",
    [
        SECRET,
        quote(SECRET, safe=""),
        base64.b64encode(f"user:{SECRET}:x".encode()).decode(),
        base64.b64encode(f"users:{SECRET}:xy".encode()).decode(),
        base64.urlsafe_b64encode(f"u:{SECRET}".encode()).decode(),
        SECRET.encode().hex(),
    ],
)
def test_the_search_finds_what_is_planted(tmp_path: Path, hidden: str) -> None:
    """In a file however deep; a search that finds nothing proves nothing otherwise."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(b"\0\xff" + hidden.encode() + b"\n")
    with pytest.raises(AssertionError, match="a/b/file"):
        search([*files(tmp_path)], SECRET)
