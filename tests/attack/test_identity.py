"""Who is asking: a sandbox with a token of its own tries to be another one, nobody, or to find a token by trying."""

from __future__ import annotations

import base64
import contextlib
import socket
import ssl
import zlib
from collections.abc import Callable

import pytest

from tests.harness import PATIENCE, Connection, Proxy, Response, Upstream, refused

RULES = """
version: 1
rules:
  - {name: tls, match: {host: [api.test, other.test]}, action: allow}
  - {name: plain, agents: ["coder-*"], match: {host: api.test, scheme: http}, action: allow}
  - {name: only-two, agents: [coder-2], match: {host: other.test, scheme: http}, action: allow}
"""
CLAIMS = (
    *("cf-connecting-ip", "client-ip", "fastly-client-ip", "forwarded", "proxy-authorization", "proxy-connection"),
    *("sallyport-agent", "true-client-ip", "x-client-ip", "x-cluster-client-ip", "x-envoy-external-address"),
    *("x-forwarded-for", "x-forwarded-host", "x-forwarded-user", "x-original-forwarded-for", "x-real-ip"),
)


@pytest.fixture(scope="module")
def proxy(lane: str, make_proxy: Callable[..., Proxy]) -> Proxy:
    """coder-1 is the attacker, coder-2 whom it wants to be; 10.0.0.0/8 is another one's network."""
    proxy = make_proxy(RULES, lane=lane, identity={"networks": {"10.0.0.0/8": "coder-3"}})
    for name in ("coder-1", "coder-2", "coder-3"):
        proxy.agent(name)
    return proxy


def request(host: str, path: str, *lines: str) -> bytes:
    return "\r\n".join([f"GET http://{host}{path} HTTP/1.1", f"Host: {host}", *lines, "", ""]).encode()


def bearer(token: str) -> str:
    return f"Proxy-Authorization: Bearer {token}"


def basic(name: str, token: str) -> str:
    return "Proxy-Authorization: Basic " + base64.b64encode(f"{name}:{token}".encode()).decode()


def ask(connection: Connection, *lines: str, host: str = "api.test") -> Response:
    connection.send(request(host, "/x", *lines))
    return connection.response()


def near(token: str, *, mended: bool = True) -> str:
    """A token with one character changed; `mended`: and the checksum that belongs to it."""
    body, _, checksum = token.rpartition("_")
    body = body[:-1] + ("A" if body[-1] != "A" else "B")
    return f"{body}_{zlib.crc32(body.encode()):08x}" if mended else f"{body}_{checksum}"


def test_no_wrong_token_tells_more_than_another(proxy: Proxy, plain_upstream: Upstream) -> None:
    """Nearly right, with a right checksum, of nobody, for an agent that is there or is not: one and the same answer."""
    token = proxy.tokens["coder-2"]
    wrong = [
        bearer(near(token)),
        bearer(near(token, mended=False)),
        bearer(token[:-1]),
        bearer(token + "0"),
        bearer(token.upper()),
        bearer("x"),
        basic("coder-2", near(token)),
        basic("coder-2", ""),
        basic("nobody", near(token)),
        basic("nobody", "x"),
    ]
    answers = [ask(proxy.connect(), line) for line in wrong]
    errors = [refused(answer, "bad_identity") for answer in answers]
    assert len({(error["message"], error["hint"], error["agent"]) for error in errors}) == 1
    assert len({tuple(name for name, _ in answer.headers) for answer in answers}) == 1
    assert plain_upstream.seen == []


def connect_from(proxy: Proxy, source: str) -> Connection:
    client = Connection(socket.create_connection(proxy.address, PATIENCE, source_address=(source, 0)))
    proxy.clients.append(client)
    return client


def test_guessing_is_slowed_and_locks_nobody_out(proxy: Proxy, plain_upstream: Upstream) -> None:
    """After 100 wrong tokens of one address there is a time to wait; right ones from there are taken all the while,
    and another address is none the worse for it."""
    attacker, name = connect_from(proxy, "127.0.0.66"), {"agent": "_none", "rule": "_none", "limit": "identity"}
    statuses = [ask(attacker, bearer(near(proxy.tokens["coder-2"]))).status for _ in range(130)]
    assert statuses[:90] == [407] * 90
    assert statuses[-1] == 429
    refused(ask(attacker, bearer("x")), "limit_exceeded")
    assert proxy.metric("sallyport_limits_exceeded_total", **name) >= 1
    connect = b"CONNECT api.test:443 HTTP/1.1\r\nhost: api.test:443\r\nproxy-authorization: Bearer x\r\n\r\n"
    other_way = connect_from(proxy, "127.0.0.66")
    other_way.send(connect)
    refused(other_way.response("CONNECT"), "limit_exceeded")
    assert plain_upstream.seen == []
    assert ask(connect_from(proxy, "127.0.0.66"), bearer(proxy.tokens["coder-2"])).status == 200
    assert ask(attacker, bearer(proxy.tokens["coder-1"])).status == 200
    refused(ask(connect_from(proxy, "127.0.0.67"), bearer("x")), "bad_identity")
    refused(ask(connect_from(proxy, "127.0.0.66")), "no_identity")  # asking for the challenge is no guess


@pytest.mark.parametrize("claim", ["10.1.2.3", "127.0.0.1, 10.1.2.3", "for=10.1.2.3"])
@pytest.mark.parametrize("name", ["X-Forwarded-For", "X-Real-IP", "Forwarded", "X-Client-IP"])
def test_a_header_is_no_source_address(proxy: Proxy, plain_upstream: Upstream, name: str, claim: str) -> None:
    """coder-3 is known by its network, and a header does not put anybody there."""
    refused(ask(proxy.connect(), f"{name}: {claim}"), "no_identity")
    assert plain_upstream.seen == []


@pytest.mark.parametrize(
    "preamble",
    [
        b"PROXY TCP4 10.1.2.3 127.0.0.1 4000 8080\r\n",
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x0a\x01\x02\x03\x7f\0\0\x01\x0f\xa0\x1f\x90",
    ],
    ids=["1", "2"],
)
def test_a_preamble_is_no_source_address(proxy: Proxy, plain_upstream: Upstream, preamble: bytes) -> None:
    """What a load balancer would say of a connection (PROXY protocol) is no request here."""
    connection = proxy.connect()
    connection.send(preamble + request("api.test", "/x"))
    refused(connection.response(), "ambiguous_request")
    assert connection.closed()
    assert plain_upstream.seen == []


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_no_claim_of_identity_reaches_an_upstream(
    proxy: Proxy, upstream: Upstream, plain_upstream: Upstream, scheme: str
) -> None:
    """In no spelling, and not the token."""
    claims = {name.title() if number % 2 else name: "10.1.2.3" for number, name in enumerate(CLAIMS)}
    claims |= {name.replace("-", "_"): "10.1.2.3" for name in CLAIMS if name != "proxy-authorization"}
    claims.pop("proxy-authorization", None)
    claims.pop("Proxy-Authorization", None)
    if scheme == "https":
        claims["Proxy-Authorization"] = "Basic YTpi"
    assert proxy.get(f"{scheme}://api.test/x", headers=claims).status == 200
    (seen,) = (upstream if scheme == "https" else plain_upstream).seen
    arrived = {name.lower().replace("_", "-") for name, _ in seen.headers}
    assert arrived.isdisjoint(CLAIMS)
    assert proxy.tokens["coder-1"] not in str(seen)


def test_each_request_in_a_row_proves_for_itself(proxy: Proxy, plain_upstream: Upstream) -> None:
    """Sent in one piece on one connection: what one proved is nothing to the next."""
    one, two = bearer(proxy.tokens["coder-1"]), bearer(proxy.tokens["coder-2"])
    connection = proxy.connect()
    connection.send(
        request("other.test", "/1", two)
        + request("other.test", "/2", one)
        + request("other.test", "/3")
        + request("other.test", "/4", two, one)
        + request("other.test", "/5", two)
    )
    statuses = [connection.response().status for _ in range(5)]
    assert statuses == [200, 403, 407, 407, 200]
    assert [seen.target for seen in plain_upstream.seen] == ["/1", "/5"]


def test_a_refused_tunnel_leaves_nothing_behind(proxy: Proxy, plain_upstream: Upstream) -> None:
    """A tunnel of coder-2 to a port no rule names is refused; the connection is not coder-2's after that."""
    connection = proxy.connect()
    connect = f"CONNECT other.test:22 HTTP/1.1\r\nhost: other.test:22\r\n{proxy.auth('coder-2')}\r\n".encode()
    connection.send(connect + request("other.test", "/x"))
    refused(connection.response("CONNECT"), "no_rule")
    assert connection.closed()
    assert plain_upstream.seen == []


@pytest.mark.parametrize("scheme", ["Negotiate", "NTLM", "negotiate", "  nTLM"])
def test_nobody_signs_in_a_connection_that_others_use(
    proxy: Proxy, upstream: Upstream, plain_upstream: Upstream, scheme: str
) -> None:
    """Negotiate and NTLM prove who a TCP connection is of, and upstream connections are shared: the next agent's
    request would be taken for the first one's (RFC 4559 section 6)."""
    for url in ("https://api.test/x", "http://api.test/x"):
        refused(proxy.get(url, headers={"Authorization": f"{scheme} YII="}), "ambiguous_request")
        refused(proxy.get(url, headers={"authORIZATION": scheme.strip()}), "ambiguous_request")
        assert proxy.get(url, headers={"Authorization": "Bearer negotiate"}).status == 200
    assert len(upstream.seen) == len(plain_upstream.seen) == 1


HELLOS = {
    "distrust": None,
    "garbage": b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00",
    "cut": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
}


@pytest.mark.parametrize("hello", HELLOS)
def test_a_handshake_that_fails_is_on_record(proxy: Proxy, upstream: Upstream, hello: str) -> None:
    """A client that does not trust our CA, sends nonsense or hangs up: an audit line and a count say whose it was."""
    before = proxy.metric("sallyport_requests_total", agent="coder-1", verdict="block", reason="client_tls")
    name = f"{hello}.other.test"
    connection = proxy.connect()
    connection.send(f"CONNECT {name}:443 HTTP/1.1\r\nhost: {name}:443\r\n{proxy.auth('coder-1')}\r\n".encode())
    assert connection.response("CONNECT").status == 200
    if data := HELLOS[hello]:
        connection.send(data)
        if hello == "cut":
            connection.close()
    else:
        with contextlib.suppress(ssl.SSLError):
            connection.start_tls(ssl.create_default_context(), name)
    (line,) = proxy.audit(host=name)
    assert (line["method"], line["verdict"], line["reason"], line["agent"], line["identity"], line["port"]) == (
        "CONNECT",
        "block",
        "client_tls",
        "coder-1",
        ["token"],
        443,
    )
    after = proxy.metric("sallyport_requests_total", agent="coder-1", verdict="block", reason="client_tls")
    assert after == before + 1
    assert upstream.connections == 0
