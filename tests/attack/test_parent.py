"""A parent proxy between us and the world: it carries what was decided, and learns and answers nothing else."""

from __future__ import annotations

import base64
import ssl
from collections.abc import Callable, Iterator

import pytest
import trustme

from tests.h2client import Http2
from tests.harness import Connection, Proxy, Upstream, refused
from tests.nameserver import Nameserver
from tests.parentproxy import ParentProxy

PASSWORD = "parents-own-5d1c"
SECRET = "real-key-4f1e9b7c2d"
PROOF = base64.b64encode(f"corp:{PASSWORD}".encode()).decode()
NAMES = '["**.api.test", "*.internal", intranet, "**.localhost", "10.0.0.1", "169.254.169.254", "127.0.0.1"]'
RULES = f"""
version: 1
rules:
  - {{name: pinned, match: {{host: [pinned.api.test, pinned.internal]}}, action: allow, tls: passthrough}}
  - {{name: keyed, match: {{host: key.api.test}}, action: allow, inject: [{{credential: api, as: bearer}}]}}
  - {{name: tls, match: {{host: {NAMES}}}, action: allow}}
  - {{name: plain, match: {{host: {NAMES}, scheme: http}}, action: allow}}
  - {{name: never, match: {{host: no.api.test}}, action: block}}
"""


@pytest.fixture(scope="module")
def _parent() -> Iterator[ParentProxy]:
    with ParentProxy() as parent:
        yield parent


@pytest.fixture
def parent(_parent: ParentProxy, upstream: Upstream, plain_upstream: Upstream) -> ParentProxy:
    _parent.reset()
    return _parent


@pytest.fixture(scope="module")
def nameserver() -> Iterator[Nameserver]:
    with Nameserver() as server:
        yield server


@pytest.fixture(scope="module")
def proxy(
    lane: str,
    make_proxy: Callable[..., Proxy],
    nameserver: Nameserver,
    _parent: ParentProxy,
    _shared_upstream: Upstream,
    _shared_plain_upstream: Upstream,
) -> Proxy:
    for name in ("far", "key", "early", "again", "pinned"):
        _parent.places[f"{name}.api.test:443"] = _shared_upstream.port
        _parent.places[f"{name}.api.test:80"] = _shared_plain_upstream.port
    proxy = make_proxy(
        RULES,
        lane=lane,
        upstream={
            "via": f"http://corp:{PASSWORD}@127.0.0.1:{_parent.port}",
            "nameservers": [f"127.0.0.1:{nameserver.port}"],
        },
        limits={"idle": "2s"},
    )
    proxy.agent()
    proxy.credential("api", SECRET, "--host", "key.api.test")
    return proxy


def heads(parent: ParentProxy) -> list[tuple[str, bool]]:
    """What the parent was asked, and whether it was told who asks."""
    return [(head.partition("\r\n")[0], f"\r\nProxy-Authorization: Basic {PROOF}\r\n" in head) for head in parent.heads]


@pytest.mark.parametrize("scheme", ["https", "http"])
def test_what_was_decided_goes_through_the_parent(
    proxy: Proxy, parent: ParentProxy, nameserver: Nameserver, upstream: Upstream, plain_upstream: Upstream, scheme: str
) -> None:
    """As a tunnel, also for plain http; the parent resolves the name and sees no request, the upstream no password."""
    nameserver.asked.clear()
    response = proxy.get(f"{scheme}://far.api.test/x?q=1", headers={"x-mine": "1"})
    assert response.status == 200
    port = {"https": 443, "http": 80}[scheme]
    assert heads(parent) in ([(f"CONNECT far.api.test:{port} HTTP/1.1", True)], [])  # the fast lane may have kept one
    (seen,) = (upstream if scheme == "https" else plain_upstream).seen
    assert (seen.target, seen.header("host"), seen.header("proxy-authorization")) == ("/x?q=1", ["far.api.test"], [])
    assert nameserver.asked == []
    for text in (str(seen), str(response), proxy.stderr_text(), proxy.fetch_admin("/metrics")[1]):
        assert PASSWORD not in text
        assert PROOF not in text


def test_http_2_goes_through_the_parent(proxy: Proxy, parent: ParentProxy, upstream: Upstream) -> None:
    """On mitmproxy's stack, from either lane."""
    client = Http2(proxy.tunnel("again.api.test", alpn="h2"))
    assert client.response(client.request("/x", authority="again.api.test")).status == 200
    assert heads(parent) == [("CONNECT again.api.test:443 HTTP/1.1", True)]
    assert [seen.target for seen in upstream.seen] == ["/x"]


def test_a_credential_goes_to_the_upstream_alone(proxy: Proxy, parent: ParentProxy, upstream: Upstream) -> None:
    """It is inside the TLS that the parent cannot read."""
    assert SECRET not in proxy.get("https://key.api.test/x").body.decode()
    assert [seen.header("authorization") for seen in upstream.seen] == [[f"Bearer {SECRET}"]]
    assert SECRET not in "".join(parent.heads)


def pinned(proxy: Proxy, upstream_ca: trustme.CA, host: str) -> Connection:
    """A client that takes nothing but the upstream's own certificate."""
    connection = proxy.connect()
    connection.send(f"CONNECT {host}:443 HTTP/1.1\r\nhost: {host}:443\r\n{proxy.auth('coder-1')}\r\n".encode())
    assert connection.response("CONNECT").status == 200
    context = ssl.create_default_context()
    upstream_ca.configure_trust(context)
    connection.start_tls(context, host)
    return connection


def test_what_is_passed_through_goes_through_the_parent(
    proxy: Proxy, parent: ParentProxy, upstream: Upstream, upstream_ca: trustme.CA
) -> None:
    """Unread by either of us, and to no private name."""
    connection = pinned(proxy, upstream_ca, "pinned.api.test")
    connection.send(b"GET /x HTTP/1.1\r\nhost: pinned.api.test\r\n\r\n")
    assert connection.response().status == 200
    assert heads(parent) == [("CONNECT pinned.api.test:443 HTTP/1.1", True)]
    assert [seen.target for seen in upstream.seen] == ["/x"]
    with pytest.raises((ssl.SSLError, ConnectionError)):
        pinned(proxy, upstream_ca, "pinned.internal")
    assert len(parent.heads) == 1


def test_a_kept_connection_goes_on(proxy: Proxy, parent: ParentProxy, upstream: Upstream) -> None:
    """One tunnel carries request after request."""
    tunnel = proxy.tunnel("early.api.test")
    for _ in range(3):
        tunnel.send(b"GET /x HTTP/1.1\r\nhost: early.api.test\r\n\r\n")
        assert tunnel.response().status == 200
    assert parent.asked == ["CONNECT early.api.test:443 HTTP/1.1"]


@pytest.mark.parametrize(
    "host", ["10.0.0.1", "169.254.169.254", "127.0.0.1", "metadata.internal", "intranet", "a.localhost"]
)
def test_the_parent_is_no_way_to_what_is_private(
    proxy: Proxy, parent: ParentProxy, nameserver: Nameserver, host: str
) -> None:
    """Addresses, and names that mean something else on each network, although a rule allows them."""
    nameserver.asked.clear()
    refused(proxy.get(f"http://{host}/x"), "private_address")
    refused(proxy.get(f"https://{host}/x"), "private_address")
    assert parent.heads == []
    assert nameserver.asked == []


def test_the_parent_hears_nothing_of_what_is_refused(proxy: Proxy, parent: ParentProxy, nameserver: Nameserver) -> None:
    """No rule, a block rule, no identity."""
    refused(proxy.get("https://evil.example/x"), "no_rule")
    refused(proxy.get("https://no.api.test/x"), "blocked")
    connection = proxy.connect()
    connection.send(b"GET http://far.api.test/x HTTP/1.1\r\nhost: far.api.test\r\n\r\n")
    refused(connection.response(), "no_identity")
    assert parent.heads == []


def test_what_the_operator_wrote_is_dialled_from_here(proxy: Proxy, parent: ParentProxy, upstream: Upstream) -> None:
    """connect_to is the way to what the parent does not know."""
    assert proxy.get("https://a.api.test/x").status == 200
    assert parent.heads == []
    assert len(upstream.seen) == 1


ANSWERS = {
    "forbidden": b"HTTP/1.1 403 Forbidden\r\ncontent-length: 9\r\n\r\nparents-page",
    "credentials": b'HTTP/1.1 407 Nope\r\nProxy-Authenticate: Basic realm="parents-page"\r\n\r\n',
    "redirect": b"HTTP/1.1 302 Found\r\nLocation: http://parents-page.example/\r\n\r\n",
    "split": b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 12\r\n\r\nparents-page",
    "nonsense": b"parents-page\r\n\r\n",
    "endless": b"HTTP/1.1 200 OK\r\n" + b"x: parents-page\r\n" * 2000,
    "nothing": b"",
}


@pytest.mark.parametrize("scheme", ["https", "http"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_the_parents_answer_is_not_the_upstreams(
    proxy: Proxy, parent: ParentProxy, upstream: Upstream, plain_upstream: Upstream, answer: str, scheme: str
) -> None:
    """Only that it could not be reached is told; what the parent says goes no further."""
    parent.answer = ANSWERS[answer]
    response = proxy.get(f"{scheme}://{answer}.api.test/x")
    refused(response, "upstream_timeout" if answer == "nothing" else "upstream_unreachable")
    assert b"parents-page" not in response.body
    assert "parents-page" not in str(response.headers)
    assert upstream.connections + plain_upstream.connections == 0


def test_a_parent_that_says_nothing_is_given_up(proxy: Proxy, parent: ParentProxy, upstream: Upstream) -> None:
    """After limits.idle, where that is less than 10 s."""
    parent.silent = True
    refused(proxy.get("https://silent.api.test/x"), "upstream_timeout")
    assert upstream.connections == 0


def test_no_command_shows_the_password(proxy: Proxy) -> None:
    """Nor does the log, the audit log or a process listing."""
    assert proxy.process
    with open(f"/proc/{proxy.process.pid}/cmdline", encoding="latin-1") as cmdline:
        assert PASSWORD not in cmdline.read()
    for words in (["check"], ["agent", "env", "coder-1"], ["schema", "settings"]):
        result = proxy.cli(*words, check=False)
        assert PASSWORD not in result.stdout + result.stderr
    for line in proxy.audit():
        assert PASSWORD not in str(line)
    proxy.environment["SALLYPORT_UPSTREAM__VIA"] = f"https://corp:{PASSWORD}@h.example:1"
    try:
        result = proxy.cli("check", check=False)
    finally:
        del proxy.environment["SALLYPORT_UPSTREAM__VIA"]
    assert result.returncode == 1
    assert "a parent proxy is a URL beginning with http://" in result.stdout + result.stderr
    assert PASSWORD not in result.stdout + result.stderr
