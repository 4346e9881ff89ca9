"""Who is asking: every proof the proxy takes, alone and together, and that none of it goes further."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from contextlib import closing

import pytest

from tests.harness import Connection, Proxy, Response, Upstream, refused, wait_for

RULES = """
version: 1
rules:
  - {name: tls, match: {host: api.test}, action: allow}
  - {name: plain, agents: ["coder-*", "sandbox-*"], match: {host: api.test, scheme: http}, action: allow}
  - {name: apart, match: {host: b.api.test}, action: allow, connections: per-agent}
  - {name: plain-apart, match: {host: b.api.test, scheme: http}, action: allow, connections: per-agent}
  - {name: only-two, agents: [coder-2], match: {host: other.test, scheme: http}, action: allow}
"""
IDENTITY_HEADERS = ("proxy-authorization", "proxy-connection", "x-forwarded-for", "forwarded", "sallyport-agent")

type Make = Callable[..., Proxy]


@pytest.fixture(scope="module")
def proxy(lane: str, make_proxy: Make) -> Proxy:
    """Tokens only; the second listener is bound to coder-2."""
    proxy = make_proxy(RULES, lane=lane, listen=["127.0.0.1:0", {"address": "127.0.0.1:0", "agent": "coder-2"}])
    proxy.agent("coder-1")
    proxy.agent("coder-2")
    return proxy


@pytest.fixture(scope="module")
def by_network(lane: str, make_proxy: Make) -> Proxy:
    """Whoever comes from this host is sandbox-1; the second listener says it is coder-2."""
    proxy = make_proxy(
        RULES,
        lane=lane,
        listen=["127.0.0.1:0", {"address": "127.0.0.1:0", "agent": "coder-2"}],
        identity={"networks": {"127.0.0.0/8": "sandbox-1"}},
    )
    for name in ("sandbox-1", "coder-2"):
        proxy.tokens[name] = proxy.cli("agent", "add", name).stdout.split()[-1]
    wait_for(lambda: json.loads(proxy.fetch_admin("/api/status")[1])["agents"]["active"] == 2)
    return proxy


def basic(name: str, token: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{token}".encode()).decode()


def ask(connection: Connection, *proofs: str, host: str = "api.test", headers: str = "", path: str = "/x") -> Response:
    """One plain request in absolute form with these Proxy-Authorization values."""
    lines = "".join(f"Proxy-Authorization: {proof}\r\n" for proof in proofs)
    connection.send(f"GET http://{host}{path} HTTP/1.1\r\nHost: {host}\r\n{lines}{headers}\r\n".encode())
    return connection.response()


def recorded(proxy: Proxy, path: str) -> tuple[str, list[str]]:
    """Whom a request was put on record for, and by which proofs."""
    (line,) = proxy.audit(path=path)
    return line["agent"], line["identity"]


@pytest.mark.parametrize("spelling", ["Bearer", "bearer", "BEARER", "Basic"])
def test_a_token_is_taken_in_every_spelling(proxy: Proxy, plain_upstream: Upstream, spelling: str) -> None:
    """As Bearer or as the password of Basic; the scheme's case does not matter (RFC 9110 section 11.1)."""
    token = proxy.tokens["coder-1"]
    proof = basic("coder-1", token) if spelling == "Basic" else f"{spelling} {token}"
    assert ask(proxy.connect(), proof).status == 200
    assert len(plain_upstream.seen) == 1


def test_basic_may_leave_the_name_out(proxy: Proxy, plain_upstream: Upstream) -> None:
    """The token says who it is."""
    assert ask(proxy.connect(), basic("", proxy.tokens["coder-1"])).status == 200


def test_without_a_proof_there_is_a_challenge(proxy: Proxy, plain_upstream: Upstream) -> None:
    """On the plain connection and on CONNECT: git and Java wait for it."""
    error = refused(ask(proxy.connect()), "no_identity")
    assert error["agent"] is None
    connection = proxy.connect()
    connection.send(b"CONNECT api.test:443 HTTP/1.1\r\nHost: api.test:443\r\n\r\n")
    refused(connection.response("CONNECT"), "no_identity")
    assert connection.closed()
    assert plain_upstream.connections == 0


@pytest.mark.parametrize(
    "proof",
    [
        "Bearer slp_0000000000000000000000000000000000000000_00000000",
        "Bearer",
        "Basic",
        "Basic !!!",
        "Basic " + base64.b64encode(b"\xff\xfe:\xff").decode(),
        "Digest username=coder-1",
        "nonsense",
        "",
    ],
)
def test_a_proof_that_proves_nothing_is_refused(proxy: Proxy, plain_upstream: Upstream, proof: str) -> None:
    """Wrong, empty, or in a scheme that is not ours."""
    refused(ask(proxy.connect(), proof), "bad_identity")
    assert plain_upstream.seen == []


def test_a_token_with_another_agents_name_conflicts(proxy: Proxy, plain_upstream: Upstream) -> None:
    """Basic says two names then."""
    refused(ask(proxy.connect(), basic("coder-2", proxy.tokens["coder-1"])), "identity_conflict")
    assert plain_upstream.seen == []


def test_two_tokens_conflict(proxy: Proxy, plain_upstream: Upstream) -> None:
    """Whichever comes first; a second header that is worthless is refused too."""
    one, two = (f"Bearer {proxy.tokens[name]}" for name in ("coder-1", "coder-2"))
    refused(ask(proxy.connect(), one, two), "identity_conflict")
    refused(ask(proxy.connect(), one, "Bearer nonsense"), "bad_identity")
    assert ask(proxy.connect(), one, one).status == 200
    assert len(plain_upstream.seen) == 1


def test_a_listener_names_its_agent(proxy: Proxy, plain_upstream: Upstream) -> None:
    """Without a token; one of the same agent may be there, one of another may not."""
    assert ask(proxy.connect(1), path="/listener").status == 200
    assert recorded(proxy, "/listener") == ("coder-2", ["listener"])
    assert ask(proxy.connect(1), f"Bearer {proxy.tokens['coder-2']}", path="/both").status == 200
    assert recorded(proxy, "/both") == ("coder-2", ["token", "listener"])
    refused(ask(proxy.connect(1), f"Bearer {proxy.tokens['coder-1']}"), "identity_conflict")
    refused(ask(proxy.connect(1), "Bearer nonsense"), "bad_identity")
    assert len(plain_upstream.seen) == 2


def test_a_network_names_its_agent(by_network: Proxy, plain_upstream: Upstream) -> None:
    """And must agree with every other proof."""
    assert ask(by_network.connect(), path="/network").status == 200
    assert recorded(by_network, "/network") == ("sandbox-1", ["network"])
    refused(ask(by_network.connect(), f"Bearer {by_network.tokens['coder-2']}"), "identity_conflict")
    refused(ask(by_network.connect(1)), "identity_conflict")
    assert len(plain_upstream.seen) == 1


def test_agents_that_share_a_connection_stay_apart(proxy: Proxy, plain_upstream: Upstream) -> None:
    """Runtimes pool many agents on one connection: identity is of the request, and so are the rules."""
    connection = proxy.connect()
    one, two = (f"Bearer {proxy.tokens[name]}" for name in ("coder-1", "coder-2"))
    assert ask(connection, two, host="other.test").status == 200
    assert refused(ask(connection, one, host="other.test"), "no_rule")["agent"] == "coder-1"
    refused(ask(connection, host="other.test"), "no_identity")
    assert ask(connection, two, host="other.test").status == 200
    assert ask(connection, one).status == 200
    assert len(plain_upstream.seen) == 3


def test_a_tunnel_belongs_to_its_agent(proxy: Proxy, upstream: Upstream) -> None:
    """What a request inside says of itself changes nothing, and goes no further."""
    tunnel = proxy.tunnel("api.test")
    claims = (
        f"{proxy.auth('coder-2')}proxy-connection: keep-alive\r\nx-forwarded-for: 10.0.0.1\r\nforwarded: for=_x\r\n"
    )
    tunnel.send(f"GET /claims HTTP/1.1\r\nhost: api.test\r\n{claims}sallyport-agent: coder-2\r\n\r\n".encode())
    assert tunnel.response().status == 200
    assert recorded(proxy, "/claims") == ("coder-1", ["token"])
    assert [upstream.seen[0].header(name) for name in IDENTITY_HEADERS] == [[]] * len(IDENTITY_HEADERS)


def test_identity_does_not_leave_on_plain_http(proxy: Proxy, plain_upstream: Upstream) -> None:
    """Any spelling, and also where Connection does not list it."""
    more = "pRoXy-CoNnEcTiOn: keep-alive\r\nX-Forwarded-For: 10.0.0.1\r\nForwarded: for=_x\r\nSallyport-Agent: root\r\n"
    assert ask(proxy.connect(), f"Bearer {proxy.tokens['coder-1']}", headers=more).status == 200
    assert [plain_upstream.seen[0].header(name) for name in IDENTITY_HEADERS] == [[]] * len(IDENTITY_HEADERS)
    assert proxy.tokens["coder-1"] not in str(plain_upstream.seen)


def is_cut(tunnel: Connection) -> bool:
    """Whether requests in it get no answer any more."""
    try:
        tunnel.send(b"GET /x HTTP/1.1\r\nhost: api.test\r\n\r\n")
        return tunnel.response().status != 200
    except OSError:
        return True


def test_a_killed_agent_is_refused_and_a_revived_one_is_not(proxy: Proxy, upstream: Upstream) -> None:
    """Its tunnels are cut, and the refusal does not tell why it was stopped."""
    tunnel = proxy.tunnel("api.test")
    assert not is_cut(tunnel)
    proxy.cli("agent", "kill", "coder-1", "--reason", "test of the switch")
    wait_for(lambda: is_cut(tunnel))
    seen = len(upstream.seen)
    killed = ask(proxy.connect(), f"Bearer {proxy.tokens['coder-1']}")
    refused(killed, "agent_killed")
    assert "test of the switch" not in killed.body.decode()
    assert ask(proxy.connect(), f"Bearer {proxy.tokens['coder-2']}").status == 200
    assert len(upstream.seen) == seen
    proxy.cli("agent", "revive", "coder-1")
    wait_for(lambda: proxy.get("https://api.test/x").status == 200)


def test_a_token_that_was_replaced_ends_at_once(proxy: Proxy, plain_upstream: Upstream) -> None:
    """The old one is worth nothing, and what it opened is cut."""
    proxy.agent("coder-3")
    tunnel, old = proxy.tunnel("api.test", agent="coder-3"), proxy.tokens["coder-3"]
    new = proxy.cli("agent", "token", "coder-3").stdout.split()[-1]
    wait_for(lambda: ask(proxy.connect(), f"Bearer {new}").status == 200)
    refused(ask(proxy.connect(), f"Bearer {old}"), "bad_identity")
    wait_for(lambda: is_cut(tunnel))


def test_an_agent_that_was_removed_is_out_of_its_tunnel_too(proxy: Proxy, upstream: Upstream) -> None:
    """An accepted CONNECT is no licence for ever."""
    proxy.agent("coder-4")
    tunnel = proxy.tunnel("api.test", agent="coder-4")
    proxy.cli("agent", "remove", "coder-4")
    wait_for(lambda: is_cut(tunnel))
    refused(ask(proxy.connect(), f"Bearer {proxy.tokens['coder-4']}"), "bad_identity")


def test_an_agent_expires(proxy: Proxy, upstream: Upstream) -> None:
    """By the clock of the proxy, in a tunnel that stands already too."""
    proxy.agent("coder-5", "--ttl", "2s")
    tunnel = proxy.tunnel("api.test", agent="coder-5")

    def answer() -> Response:
        tunnel.send(b"GET /x HTTP/1.1\r\nhost: api.test\r\n\r\n")
        return tunnel.response()

    refused(wait_for(lambda: response if (response := answer()).status != 200 else None), "bad_identity")
    assert not proxy.knows("coder-5")


def test_agents_share_connections_to_an_upstream(lane: str, proxy: Proxy, upstream: Upstream) -> None:
    """In the fast lane; mitmproxy's stack has them for one client connection only."""
    for agent in ("coder-1", "coder-2", "coder-1"):
        assert proxy.get("https://api.test/", agent).status == 200
    assert upstream.connections == (1 if lane == "fast" else 3)


def test_a_rule_can_keep_agents_apart(lane: str, proxy: Proxy, upstream: Upstream) -> None:
    """One agent's next request may share with its own, not with another's."""
    for agent in ("coder-1", "coder-2", "coder-1", "coder-2"):
        assert proxy.get("https://b.api.test/", agent).status == 200
    assert upstream.connections == (2 if lane == "fast" else 4)


def test_agents_on_one_connection_are_kept_apart_too(lane: str, proxy: Proxy, plain_upstream: Upstream) -> None:
    """As runtimes that pool their agents' requests send them."""
    with closing(proxy.connect()) as connection:
        first = ask(connection, f"Bearer {proxy.tokens['coder-1']}", host="b.api.test")
        assert first.status == 200
        if lane == "fast":
            assert ask(connection, f"Bearer {proxy.tokens['coder-2']}", host="b.api.test").status == 200
            assert plain_upstream.connections == 2
        else:
            assert first.header("connection") == "close"
