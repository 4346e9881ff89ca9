"""Every refusal that can be met: its code, its words, its record, and that nobody upstream noticed anything."""

from __future__ import annotations

import asyncio
import datetime
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest
import trustme

from tests.harness import Proxy, Response, Upstream, refused, server_context, wait_for
from tests.nameserver import Nameserver

SECRET = "real-key-4f1e9b7c2d"
LITERALS = [
    "127.0.0.1",
    "10.0.0.1",
    "100.64.0.1",
    "169.254.169.254",
    "192.168.1.1",
    "0.0.0.0",  # asked for, not bound
    "224.0.0.1",
    "[::1]",
    "[fe80::1]",
    "[fd00::1]",
    "[::ffff:127.0.0.1]",
    "[64:ff9b::7f00:1]",
    "[2002:7f00:1::1]",
]
IN_RULES = [text.strip("[]") for text in LITERALS if "ffff" not in text]  # a mapped address is its IPv4 address
RULES = f"""
version: 1
rules:
  - {{name: plain, match: {{host: ["api.test", "*.dns.test"], scheme: http}}, action: allow}}
  - {{name: tls, match: {{host: ["api.test", "*.dns.test", "*.bad.test"], path: /v1/**}}, action: allow}}
  - {{name: literals, match: {{host: {IN_RULES}, scheme: http}}, action: allow}}
  - {{name: no-secrets, match: {{host: api.test, path: /v1/secrets/**}}, action: block}}
  - {{name: scoped, match: {{host: other.test}}, action: allow, inject: [{{credential: api, as: bearer}}]}}
  - {{name: missing, match: {{host: a.api.test}}, action: allow, inject: [{{credential: nowhere, as: bearer}}]}}
"""

type Make = Callable[..., Proxy]


@pytest.fixture(scope="module")
def nameserver() -> Iterator[Nameserver]:
    with Nameserver() as server:
        yield server


@pytest.fixture(scope="module")
def bad(upstream_ca: trustme.CA) -> Iterator[dict[str, Upstream]]:
    """Upstreams whose TLS must not be trusted, and one that is not there."""
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    expired = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    upstream_ca.issue_cert("expired.bad.test", not_after=yesterday).configure_cert(expired)
    contexts = {
        "expired": expired,
        "stranger": server_context(trustme.CA(), "stranger.bad.test"),
        "name": server_context(upstream_ca, "other-name.bad.test", "name.bad.test.evil.test"),
        "common-name": _common_name_only(upstream_ca),
        "plain": None,
    }
    with ExitStack() as stack:
        upstreams = {name: stack.enter_context(Upstream(context)) for name, context in contexts.items()}
        upstreams["plain"].raw = not_found
        yield upstreams


async def not_found(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An HTTP server that was sent something else."""
    await reader.read(1)
    writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")


def _common_name_only(ca: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("unrelated.test", common_name="common-name.bad.test").configure_cert(context)
    return context


@pytest.fixture(scope="module")
def proxy(lane: str, make_proxy: Make, nameserver: Nameserver, bad: dict[str, Upstream]) -> Proxy:
    led = {f"{name}.bad.test:443": f"127.0.0.1:{upstream.port}" for name, upstream in bad.items()}
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        led["closed.bad.test:443"] = f"127.0.0.1:{free.getsockname()[1]}"
    led["named.dns.test:80"] = "elsewhere.dns.test:80"
    proxy = make_proxy(RULES, lane=lane, connect_to=led, upstream={"nameservers": [f"127.0.0.1:{nameserver.port}"]})
    proxy.agent()
    proxy.credential("api", SECRET, "--host", "api.test")
    return proxy


def on_record(proxy: Proxy, response: Response, code: str, agent: str | None = "coder-1") -> dict[str, object]:
    """The one audit line of a refusal."""
    error = refused(response, code)
    (line,) = proxy.audit(id=error["request_id"])
    assert (line["reason"], line["status"], line["agent"]) == (code, response.status, agent)
    assert line["verdict"] == ("allow" if code.startswith("upstream_") else "block")
    assert line["response_bytes"] == len(response.body)
    assert (line["injected"], line["redacted"]) == ([], [])
    return line


REFUSED = {
    "no_rule": ("GET", "https://api.test/v2/x"),
    "blocked": ("GET", "https://api.test/v1/secrets/x"),
    "credential_scope": ("GET", "https://other.test/x"),
    "credential_unavailable": ("GET", "https://a.api.test/x"),
    "protocol_not_allowed": ("TRACE", "https://api.test/v1/x"),
    "authority_mismatch": ("GET", "https://api.test/v1/x"),
    "ambiguous_request": ("GET", "https://api.test/v1/%zz"),
}


@pytest.mark.parametrize("code", REFUSED)
def test_a_refusal_tells_records_and_counts(
    proxy: Proxy, nameserver: Nameserver, upstream: Upstream, code: str
) -> None:
    """In band, on record with what was asked, in the metrics; nothing was resolved or dialled."""
    method, url = REFUSED[code]
    nameserver.asked.clear()
    before = proxy.metric("sallyport_requests_total", agent="coder-1", verdict="block", reason=code)
    response = mismatched(proxy) if code == "authority_mismatch" else proxy.get(url, method=method)
    line = on_record(proxy, response, code)
    assert (line["method"], line["scheme"], line["port"]) == (method, "https", 443)
    assert line["host"] == url.split("/")[2]
    rule = {"blocked": "no-secrets", "credential_scope": "scoped", "credential_unavailable": "missing"}.get(code)
    assert line["rule"] == rule
    assert response.json()["error"]["rule"] == (rule if code == "blocked" else response.json()["error"]["rule"])
    after = proxy.metric("sallyport_requests_total", agent="coder-1", verdict="block", reason=code)
    assert after == before + 1
    assert upstream.connections == 0
    assert nameserver.asked == []


def mismatched(proxy: Proxy) -> Response:
    with closing(proxy.tunnel("api.test")) as tunnel:
        tunnel.send(b"GET /v1/x HTTP/1.1\r\nhost: elsewhere.test\r\n\r\n")
        return tunnel.response()


def test_the_words_tell_an_agent_what_it_may_do(proxy: Proxy, upstream: Upstream) -> None:
    """Who asked, what for, without the query, and what to do about it."""
    error = refused(proxy.get("https://api.test/v2/x?key=geheim", method="DELETE"), "no_rule")
    assert error["message"] == "No rule allows coder-1 to DELETE api.test/v2/x."
    assert error["hint"] == "Ask your operator to allow this; retrying will not help."
    assert error["agent"] == "coder-1"
    assert error["rule"] is None


def test_a_name_that_no_rule_allows_is_not_resolved(proxy: Proxy, nameserver: Nameserver, upstream: Upstream) -> None:
    """Neither at CONNECT nor for the request: a name can carry data to its name server."""
    nameserver.asked.clear()
    refused(proxy.get("https://geheim.attacker.test/"), "no_rule")
    refused(proxy.get("http://geheim.attacker.test/"), "no_rule")
    refused(proxy.get("https://x.dns.test/v2/"), "no_rule")
    proxy.tunnel("x.dns.test").close()
    assert nameserver.asked == []


@pytest.mark.parametrize("host", LITERALS)
def test_an_address_that_is_not_public_is_not_dialled(proxy: Proxy, nameserver: Nameserver, host: str) -> None:
    """In every spelling of it, although a rule allows the very address."""
    line = on_record(proxy, proxy.get(f"http://{host}/x"), "private_address")
    assert line["upstream_ip"] is None


@pytest.mark.parametrize(
    "host", ["2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0x7f.1", "1.2.3.4.5", "[::1%25lo]"]
)
def test_an_address_that_only_some_can_read_is_refused(proxy: Proxy, host: str) -> None:
    """Some resolvers would take it for 127.0.0.1 (RFC 3986 section 7.4)."""
    refused(proxy.get(f"http://{host}/x"), "ambiguous_request")


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["::1"],
        ["10.1.2.3"],
        ["169.254.169.254"],
        ["fd00:ec2::254"],
        ["::ffff:10.0.0.1"],
        ["8.8.8.8", "127.0.0.1"],
        ["alias.test", "192.168.0.1"],
    ],
    ids=str,
)
def test_a_name_that_leads_to_an_address_that_is_not_public_is_refused(
    proxy: Proxy, nameserver: Nameserver, addresses: list[str]
) -> None:
    """One such address among its answers is enough."""
    nameserver.names["x.dns.test"] = addresses
    on_record(proxy, proxy.get("https://x.dns.test/v1/x"), "private_address")
    on_record(proxy, proxy.get("http://x.dns.test/"), "private_address")


def test_a_name_the_operator_wrote_is_still_checked(proxy: Proxy, nameserver: Nameserver) -> None:
    """An address in connect_to is the operator's word; what DNS says of a name there is not."""
    nameserver.names["elsewhere.dns.test"] = ["127.0.0.1"]
    nameserver.asked.clear()
    refused(proxy.get("http://named.dns.test/"), "private_address")
    assert set(nameserver.asked) == {"elsewhere.dns.test"}


def test_a_refused_dial_is_refused_again_on_the_same_connection(proxy: Proxy, nameserver: Nameserver) -> None:
    """For the same reason, and works once the name leads elsewhere."""
    nameserver.names["again.dns.test"] = ["127.0.0.1"]
    tunnel = proxy.tunnel("again.dns.test")
    for _ in range(3):
        tunnel.send(b"GET /v1/x HTTP/1.1\r\nhost: again.dns.test\r\n\r\n")
        refused(tunnel.response(), "private_address")
    del nameserver.names["again.dns.test"]
    tunnel.send(b"GET /v1/x HTTP/1.1\r\nhost: again.dns.test\r\n\r\n")
    refused(tunnel.response(), "upstream_unreachable")


@pytest.mark.parametrize("name", ["expired", "stranger", "name", "common-name", "plain"])
def test_an_upstream_that_does_not_prove_its_name_gets_nothing(
    proxy: Proxy, bad: dict[str, Upstream], name: str
) -> None:
    """Expired, of a strange CA, of another name, of a name only in its subject, without TLS."""
    line = on_record(proxy, proxy.get(f"https://{name}.bad.test/v1/x"), "upstream_tls")
    assert line["rule"] == "tls"
    assert bad[name].seen == []


@pytest.mark.parametrize("host", ["closed.bad.test", "nowhere.dns.test"])
def test_an_upstream_that_is_not_there_is_unreachable(proxy: Proxy, host: str) -> None:
    """Nobody listens, or the name does not exist."""
    on_record(proxy, proxy.get(f"https://{host}/v1/x"), "upstream_unreachable")


@pytest.mark.slow
def test_a_name_server_that_says_nothing_is_not_waited_for(proxy: Proxy, nameserver: Nameserver) -> None:
    """For ever."""
    nameserver.names["silent.dns.test"] = None
    on_record(proxy, proxy.get("https://silent.dns.test/v1/x"), "upstream_timeout")


def test_a_body_that_was_not_read_closes_the_connection(proxy: Proxy, upstream: Upstream) -> None:
    """On a plain connection and in a tunnel."""
    response = proxy.get("https://api.test/v2/x", method="POST", headers={"content-length": "1000000"})
    refused(response, "no_rule")
    assert response.header("connection") == "close"
    response = proxy.get("http://no.test/", method="POST", headers={"content-length": "1000000"})
    refused(response, "no_rule")
    assert response.header("connection") == "close"
    assert upstream.connections == 0


# Another proxy: short patience, few connections, and loopback is a place to dial.


@pytest.fixture(scope="module")
def narrow(lane: str, make_proxy: Make, nameserver: Nameserver, _shared_plain_upstream: Upstream) -> Proxy:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        admin = f"127.0.0.1:{free.getsockname()[1]}"
    proxy = make_proxy(
        RULES,
        lane=lane,
        connect_to={"admin.dns.test:80": admin, "192.0.2.7:80": f"127.0.0.1:{_shared_plain_upstream.port}"},
        upstream={
            "nameservers": [f"127.0.0.1:{nameserver.port}"],
            "allow_addresses": ["127.0.0.0/8", "::1/128"],
        },
        admin=admin,
        limits={"connections_per_agent": 2, "idle": "1s"},
    )
    ports = [_shared_plain_upstream.port, proxy.address[1], int(admin.rpartition(":")[2])]
    hosts = '["127.0.0.1", "127.0.0.2", "192.0.2.7", "*.dns.test", "::1", "api.test"]'
    proxy.write_rules(
        f"{RULES}  - {{name: any, match: {{host: {hosts}, scheme: http, port: {[80, *ports]}}}, action: allow}}"
    )
    proxy.agent()
    proxy.agent("coder-2")
    wait_for(lambda: proxy.metric("sallyport_rules") == 7)
    return proxy


def test_the_proxy_is_no_way_to_itself(narrow: Proxy, nameserver: Nameserver) -> None:
    """Neither its listener nor its admin endpoint, by address, by name or by what the operator wrote."""
    nameserver.names["loop.dns.test"] = ["127.0.0.1"]
    for _, port in (narrow.address, narrow.admin.split(":")):
        for host in ("127.0.0.1", "127.0.0.2", "loop.dns.test", "[::1]"):
            on_record(narrow, narrow.get(f"http://{host}:{port}/metrics"), "private_address")
    on_record(narrow, narrow.get("http://admin.dns.test/metrics"), "private_address")


def test_an_address_the_operator_allows_is_dialled(
    narrow: Proxy, nameserver: Nameserver, plain_upstream: Upstream
) -> None:
    """By allow_addresses, and by connect_to for an address too."""
    nameserver.names["fine.dns.test"] = ["127.0.0.1"]
    assert narrow.get(f"http://fine.dns.test:{plain_upstream.port}/x").status == 200
    assert narrow.get(f"http://127.0.0.1:{plain_upstream.port}/x").status == 200
    assert narrow.get("http://192.0.2.7/x").status == 200
    assert [seen.header("host") for seen in plain_upstream.seen][2] == ["192.0.2.7"]


def test_a_name_is_asked_once_and_pinned(narrow: Proxy, nameserver: Nameserver, plain_upstream: Upstream) -> None:
    """What was checked is what is dialled, whatever the name server says a moment later (DNS rebinding)."""
    nameserver.names["rebind.dns.test"] = [["127.0.0.1"], ["127.0.0.1"], ["10.0.0.9"]]  # A, AAAA, then another answer
    nameserver.asked.clear()
    assert narrow.get(f"http://rebind.dns.test:{plain_upstream.port}/x").status == 200
    assert nameserver.asked == ["rebind.dns.test"] * 2


def test_an_agent_has_only_so_many_connections(narrow: Proxy, plain_upstream: Upstream) -> None:
    """429 with a time to come back, and the others are none the worse for it."""
    request = f"GET http://api.test/x HTTP/1.1\r\nhost: api.test\r\n{narrow.auth('coder-1')}\r\n".encode()
    connections = [narrow.connect() for _ in range(3)]
    for connection in connections[:2]:
        connection.send(request)
        assert connection.response().status == 200
    before = narrow.metric("sallyport_limits_exceeded_total", agent="coder-1", rule="_none", limit="connections")
    connections[2].send(request)
    on_record(narrow, connections[2].response(), "limit_exceeded")
    connections[2].send(
        b"CONNECT api.test:443 HTTP/1.1\r\nhost: api.test\r\n" + narrow.auth("coder-1").encode() + b"\r\n"
    )
    refused(connections[2].response("CONNECT"), "limit_exceeded")
    after = narrow.metric("sallyport_limits_exceeded_total", agent="coder-1", rule="_none", limit="connections")
    assert after == before + 2
    assert narrow.get("http://api.test/x", agent="coder-2").status == 200
    connections[0].close()
    wait_for(lambda: narrow.get("http://api.test/x").status == 200)
    assert len(plain_upstream.seen) == 4


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_an_upstream_that_does_not_answer_is_given_up(
    narrow: Proxy, upstream: Upstream, plain_upstream: Upstream, scheme: str
) -> None:
    """After limits.idle, in words, and the connection lives on."""

    async def silence(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read(-1)

    upstream.raw = plain_upstream.raw = silence
    if scheme == "http":
        connection, target = narrow.connect(), "http://api.test/v1/x"
    else:
        connection, target = narrow.tunnel("api.test"), "/v1/x"
    request = f"GET {target} HTTP/1.1\r\nhost: api.test\r\n{narrow.auth('coder-1')}\r\n".encode()
    connection.send(request)
    on_record(narrow, connection.response(), "upstream_timeout")
    upstream.reset()
    plain_upstream.reset()
    connection.send(request)
    assert connection.response().status == 200


@pytest.mark.slow
def test_an_upstream_that_never_shakes_hands_is_given_up(narrow: Proxy) -> None:
    """It accepts the connection and says nothing."""
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        narrow.write_rules(
            "version: 1\nrules:\n  - {name: silent, match: "
            f"{{host: 127.0.0.1, port: {silent.getsockname()[1]}}}, action: allow}}\n",
            "silent.yaml",
        )
        wait_for(lambda: narrow.metric("sallyport_rules") == 8)
        on_record(narrow, narrow.get(f"https://127.0.0.1:{silent.getsockname()[1]}/x"), "upstream_timeout")


def test_an_idle_connection_is_closed(narrow: Proxy) -> None:
    """After limits.idle."""
    assert narrow.connect().closed()
    assert narrow.tunnel("api.test").closed()


# What the proxy cannot do without.


def test_without_rules_nothing_is_allowed(lane: str, make_proxy: Make, upstream: Upstream) -> None:
    """They were broken from the start."""
    proxy = make_proxy("version: 1\nrules: [{name: broken}]\n", lane=lane)
    proxy.agent()
    on_record(proxy, proxy.get("https://api.test/"), "policy_unavailable")
    assert upstream.connections == 0


def test_without_a_store_nobody_is_known(lane: str, make_proxy: Make, upstream: Upstream) -> None:
    """It was away from the start; the answer says so instead of blaming the token."""
    with closing(socket.socket()) as nobody:
        nobody.bind(("127.0.0.1", 0))
        proxy = make_proxy(RULES, lane=lane, store=f"redis://127.0.0.1:{nobody.getsockname()[1]}/0")
        connection = proxy.connect()
        connection.send(b"GET http://api.test/ HTTP/1.1\r\nhost: api.test\r\nproxy-authorization: Bearer x\r\n\r\n")
        on_record(proxy, connection.response(), "store_unavailable", agent=None)
        connection.send(b"CONNECT api.test:443 HTTP/1.1\r\nhost: api.test\r\nproxy-authorization: Bearer x\r\n\r\n")
        on_record(proxy, connection.response("CONNECT"), "store_unavailable", agent=None)
        assert connection.closed()
        assert upstream.connections == 0
