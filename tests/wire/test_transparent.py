"""Clients that know of no proxy: a firewall redirects them, and the name in what they send says where to go."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable, Iterator

import pytest
import trustme

from tests.h2client import Http2
from tests.harness import Connection, Proxy, Response, Upstream, refused, server_context, wait_for
from tests.namespaces import ROUTER4, SANDBOX4, SANDBOX6, STRANGER4, InsideUpstream, Pair

RULES = """
version: 1
rules:
  - {name: tls, match: {host: api.test, websocket: true}, action: allow}
  - {name: plain, match: {host: api.test, scheme: http}, action: allow}
  - {name: pinned, match: {host: pinned.test}, action: allow, tls: passthrough}
"""
ANYWHERE4, ANYWHERE6 = "203.0.113.9", "2001:db8::9"  # for documentation; nobody is there (RFC 5737, RFC 3849)

type Make = Callable[..., Proxy]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


@pytest.fixture(scope="module")
def shared_upstreams(pair: Pair, upstream_ca: trustme.CA) -> Iterator[tuple[Upstream, Upstream]]:
    tls = server_context(upstream_ca, "api.test", "other.test", "pinned.test")
    with InsideUpstream(pair.router, tls) as upstream, InsideUpstream(pair.router, None) as plain:
        yield upstream, plain


@pytest.fixture
def upstream(shared_upstreams: tuple[Upstream, Upstream]) -> Upstream:
    """With TLS; what it and its plain neighbour saw before is forgotten."""
    for each in shared_upstreams:
        each.reset()
    return shared_upstreams[0]


@pytest.fixture
def plain_upstream(upstream: Upstream, shared_upstreams: tuple[Upstream, Upstream]) -> Upstream:
    return shared_upstreams[1]


@pytest.fixture(scope="module")
def proxy(lane: str, make_proxy: Make, pair: Pair, shared_upstreams: tuple[Upstream, Upstream]) -> Iterator[Proxy]:
    upstream, plain = shared_upstreams
    led = {f"{name}:443": f"127.0.0.1:{upstream.port}" for name in ("api.test", "other.test", "pinned.test")}
    proxy = make_proxy(
        RULES,
        {**led, "api.test:80": f"127.0.0.1:{plain.port}"},
        lane=lane,
        listen=["transparent@0.0.0.0:0", "transparent@[::]:0"],
        identity={"networks": {f"{SANDBOX4}/32": "vm-1", f"{SANDBOX6}/128": "vm-1"}},
        start=False,
    )
    proxy.enter = pair.router.enter
    proxy.cli("agent", "add", "vm-1")
    proxy.start()
    pair.redirect(proxy.listeners[0][1], proxy.listeners[1][1])
    yield proxy
    proxy.stop()
    pair.router.run("nft", "delete", "table", "inet", "sallyport")


@pytest.fixture
def dial(proxy: Proxy, pair: Pair) -> Callable[..., Connection]:
    """A connection from the sandbox to an address that nobody has."""

    def dial(port: int = 443, address: str = ANYWHERE4, source: str | None = None) -> Connection:
        connection = Connection(pair.sandbox.connect(address, port, source))
        proxy.clients.append(connection)
        return connection

    return dial


def tls(proxy: Proxy, connection: Connection, name: str | None = "api.test", alpn: str = "http/1.1") -> Connection:
    context = proxy.trust
    context.check_hostname = name is not None
    context.set_alpn_protocols([alpn])
    connection.start_tls(context, name)
    return connection


def ask(connection: Connection, path: str, host: str = "api.test", headers: str = "") -> Response:
    connection.send(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{headers}\r\n".encode())
    return connection.response()


@pytest.mark.parametrize("address", [ANYWHERE4, ANYWHERE6])
def test_tls_goes_where_its_server_name_says(
    proxy: Proxy, dial: Callable[..., Connection], upstream: Upstream, address: str
) -> None:
    """By IPv4 and IPv6, whatever address was dialled; the client knows the agent's address only."""
    connection = tls(proxy, dial(443, address))
    path = "/four" if address == ANYWHERE4 else "/six"
    for _ in range(2):
        assert ask(connection, path).status == 200
    lines = proxy.audit(2, path=path)
    assert {(line["agent"], str(line["identity"]), line["host"], line["port"]) for line in lines} == {
        ("vm-1", "['network']", "api.test", 443)
    }
    assert [seen.header("host") for seen in upstream.seen] == [["api.test"]] * 2


def test_plain_http_goes_where_its_host_says(
    proxy: Proxy, dial: Callable[..., Connection], plain_upstream: Upstream
) -> None:
    connection = dial(80)
    for host in ("api.test", "api.test:80", "API.test."):
        assert ask(connection, "/plain", host).status == 200
    assert [(seen.target, seen.header("host")) for seen in plain_upstream.seen] == [("/plain", ["api.test"])] * 3
    assert {line["scheme"] for line in proxy.audit(3, path="/plain")} == {"http"}


def test_the_address_that_was_dialled_allows_nothing(
    proxy: Proxy, dial: Callable[..., Connection], upstream: Upstream, plain_upstream: Upstream
) -> None:
    """A name no rule has is refused inside, to be read by the client."""
    assert refused(ask(tls(proxy, dial(), "other.test"), "/x", "other.test"), "no_rule")["agent"] == "vm-1"
    refused(ask(dial(80), "/x", "other.test"), "no_rule")
    refused(ask(dial(80), "/x", ANYWHERE4), "no_rule")
    refused(ask(tls(proxy, dial(8443)), "/x", "api.test:8443"), "no_rule")  # the port is the one dialled
    assert upstream.seen == plain_upstream.seen == []


def test_host_and_server_name_must_agree(
    proxy: Proxy, dial: Callable[..., Connection], upstream: Upstream, plain_upstream: Upstream
) -> None:
    refused(ask(tls(proxy, dial()), "/x", "other.test"), "authority_mismatch")
    refused(ask(tls(proxy, dial()), "/x", "api.test:8443"), "authority_mismatch")
    refused(ask(dial(80), "/x", "api.test:8080"), "authority_mismatch")
    refused(ask(dial(80), "/x", "api.test", "Host: other.test\r\n"), "ambiguous_request")
    assert upstream.seen == plain_upstream.seen == []


def test_without_a_name_nothing_goes_out(proxy: Proxy, dial: Callable[..., Connection], upstream: Upstream) -> None:
    """TLS without a server name ends; the log says so."""
    with pytest.raises((ssl.SSLError, OSError)):
        tls(proxy, dial(), None)
    line = proxy.audit(reason="authority_mismatch", method="CONNECT")[0]
    assert (line["agent"], line["port"], line["verdict"]) == ("vm-1", 443, "block")
    connection = dial(80)
    connection.send(b"GET /x HTTP/1.1\r\n\r\n")
    refused(connection.response(), "ambiguous_request")
    assert upstream.connections == 0


@pytest.mark.parametrize(
    "start",
    [b"SSH-2.0-OpenSSH_9.6\r\n", b"\r\n\r\n", b"\x16\x03\x01\x00", b"\x16", b"\x00" * 64, b"PRI * HTTP/2.0\r\n\r\n"],
)
def test_other_protocols_end_here(
    proxy: Proxy, dial: Callable[..., Connection], upstream: Upstream, start: bytes
) -> None:
    connection = dial()
    connection.send(start)
    connection.sock.shutdown(1)
    while connection.recv():
        pass
    assert upstream.connections == 0


def test_it_is_no_proxy(
    proxy: Proxy, dial: Callable[..., Connection], upstream: Upstream, plain_upstream: Upstream
) -> None:
    """Neither CONNECT nor a whole URL leads anywhere."""
    connection = dial(80)
    connection.send(b"CONNECT api.test:443 HTTP/1.1\r\nHost: api.test:443\r\n\r\n")
    refused(connection.response("CONNECT"), "protocol_not_allowed")
    for url in ("http://api.test/x", "https://api.test/x"):
        refused(ask(dial(80), url), "protocol_not_allowed")
    assert upstream.connections == plain_upstream.connections == 0


def test_whoever_was_not_redirected_is_not_served(proxy: Proxy, pair: Pair, plain_upstream: Upstream) -> None:
    """The listener itself, dialled by its own address."""
    connection = Connection(pair.sandbox.connect(ROUTER4, proxy.listeners[0][1]))
    proxy.clients.append(connection)
    connection.send(b"GET /x HTTP/1.1\r\nHost: api.test\r\n\r\n")
    assert connection.recv() == b""
    assert plain_upstream.seen == []


def test_an_unknown_source_is_told_so_inside(
    proxy: Proxy, dial: Callable[..., Connection], upstream: Upstream, plain_upstream: Upstream
) -> None:
    refused(ask(tls(proxy, dial(source=STRANGER4)), "/x"), "no_identity")
    refused(ask(dial(80, source=STRANGER4), "/x"), "no_identity")
    assert upstream.seen == plain_upstream.seen == []


def test_http_2_and_websockets_and_old_http(
    proxy: Proxy, dial: Callable[..., Connection], upstream: Upstream, plain_upstream: Upstream
) -> None:
    """What the fast lane hands over arrives with what is known of it."""
    http2 = Http2(tls(proxy, dial(), alpn="h2"))
    assert http2.response(http2.request("/two")).status == 200
    upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAA\r\n"
    assert ask(tls(proxy, dial()), "/ws", headers=upgrade).status == 200  # the upstream does not upgrade
    old = dial(80)
    old.send(b"GET /old HTTP/1.0\r\nHost: api.test\r\n\r\n")
    assert old.response().status == 200
    for path in ("/two", "/ws", "/old"):
        assert proxy.audit(path=path)[0]["agent"] == "vm-1"


def test_a_killed_agent_is_cut(proxy: Proxy, dial: Callable[..., Connection], upstream: Upstream) -> None:
    def status() -> int:
        try:
            return ask(tls(proxy, dial()), "/x").status
        except OSError:  # cut on the way
            return 0

    proxy.cli("agent", "kill", "vm-1")
    wait_for(lambda: status() == 403)
    refused(ask(tls(proxy, dial()), "/x"), "agent_killed")
    proxy.cli("agent", "revive", "vm-1")
    wait_for(lambda: status() == 200)


def test_curl_without_any_setting_is_caught(proxy: Proxy, pair: Pair, upstream: Upstream) -> None:
    """It resolves the name to an address nobody has, and gets the answer."""
    ca = str(proxy.folder / "certs" / "ca.pem")
    done = pair.sandbox.run(
        "curl", "-sS", "--cacert", ca, "--resolve", f"api.test:443:{ANYWHERE4}", "https://api.test/c"
    )
    assert json.loads(done.stdout)["target"] == "/c"


def test_a_pinned_client_is_passed_through(
    proxy: Proxy, dial: Callable[..., Connection], upstream: Upstream, upstream_ca: trustme.CA
) -> None:
    """By its server name alone; it sees the upstream's own certificate."""
    context = ssl.create_default_context()
    upstream_ca.configure_trust(context)
    connection = dial()
    connection.start_tls(context, "pinned.test")
    assert ask(connection, "/pinned", "pinned.test").status == 200
    connection.sock.close()
    line = proxy.audit(rule="pinned")[0]
    assert (line["agent"], line["method"], line["host"]) == ("vm-1", "CONNECT", "pinned.test")
    assert len(upstream.seen) == 1
