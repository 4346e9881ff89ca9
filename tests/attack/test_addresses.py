"""Where a request is dialled: a sandbox that may name any host wants what only the proxy can reach.

Every rule here allows every name, and a trap listens on every loopback address at the port that is asked for.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import PATIENCE, Connection, Proxy, Response, Upstream, refused, wait_for
from tests.nameserver import Nameserver
from tests.storage import RemoteStore


class Trap:
    """Accepts on one port of 127.0.0.0/8 and ::1, and remembers that somebody came."""

    def __init__(self) -> None:
        self.sprung = 0
        self._sockets = [socket.create_server(("0.0.0.0", 0))]  # every address of 127.0.0.0/8 is one of this host's
        self.port: int = self._sockets[0].getsockname()[1]
        self._sockets.append(socket.create_server(("::1", self.port), family=socket.AF_INET6))
        self._threads = [threading.Thread(target=self._run, args=(sock,), daemon=True) for sock in self._sockets]

    def __enter__(self) -> Trap:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join(PATIENCE)

    def _run(self, sock: socket.socket) -> None:
        while True:
            try:
                client, _ = sock.accept()
            except OSError:
                return
            self.sprung += 1
            client.close()


@pytest.fixture(scope="module")
def nameserver() -> Iterator[Nameserver]:
    with Nameserver() as server:
        yield server


@pytest.fixture(scope="module")
def _trap() -> Iterator[Trap]:
    with Trap() as trap:
        yield trap


@pytest.fixture
def trap(_trap: Trap) -> Iterator[Trap]:
    """At the end of the test nobody has come."""
    _trap.sprung = 0
    yield _trap
    assert _trap.sprung == 0


def rules(*ports: int) -> str:
    return f"""
version: 1
rules:
  - {{name: never, match: {{host: ["never.test", "**.never.test"]}}, action: block}}
  - {{name: not-you, agents: [coder-2], match: {{host: "two.test", scheme: http}}, action: allow}}
  - {{name: http, match: {{host: "**", scheme: http, port: {[80, *ports]}}}, action: allow}}
  - {{name: https, match: {{host: "**", port: {[443, *ports]}}}, action: allow}}
"""


@pytest.fixture(scope="module")
def proxy(lane: str, make_proxy: Callable[..., Proxy], nameserver: Nameserver, _trap: Trap) -> Proxy:
    upstream = {"nameservers": [f"127.0.0.1:{nameserver.port}"]}
    proxy = make_proxy(rules(_trap.port), lane=lane, upstream=upstream)
    proxy.agent()
    return proxy


LITERALS = [
    *("127.0.0.1", "127.255.255.254", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.0.1"),  # asked for, not bound
    *("169.254.169.254", "100.100.100.200", "168.63.129.16", "192.0.0.192", "100.64.0.1", "169.254.170.2"),  # metadata
    *("224.0.0.1", "239.255.255.250", "255.255.255.255", "240.0.0.1", "198.18.0.1", "192.0.2.1", "192.88.99.1"),
    *("[::]", "[::1]", "[fe80::1]", "[fec0::1]", "[fd00::1]", "[fd00:ec2::254]", "[ff02::1]", "[ff0e::1]"),
    *("[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:ffff:a9fe:a9fe]", "[::127.0.0.1]", "[::ffff:0:127.0.0.1]"),
    *("[64:ff9b::127.0.0.1]", "[64:ff9b::a9fe:a9fe]", "[64:ff9b:1::a9fe:a9fe]"),  # NAT64: RFC 6052, RFC 8215
    *("[2002:7f00:1::]", "[2002:a9fe:a9fe::1]"),  # 6to4: RFC 3056
    *("[2001:0:7f00:1::]", "[2001::5601:5601]", "[2001:db8::1]", "[2001:10::1]", "[3fff::1]", "[100::1]"),  # Teredo
    *("[::1%25lo]", "[fe80::1%25lo]", "[::1%lo]"),  # zones: RFC 6874
]
SPELLINGS = [
    *("2130706433", "0x7f000001", "0x7F.1", "017700000001", "0177.0.0.1", "127.1", "127.0.1", "0", "127.0.0.01"),
    *(
        "127.0.0.1.",
        "127.0.0.1..",
        "127\u30020\u30020\u30021",
        "\u2460\u2461\u2466.\u24ea.\u24ea.\u2460",
        "\uff11\uff12\uff17.\uff10.\uff10.\uff11",
        "%31%32%37.0.0.1",
    ),
    *("0x7f.0x0.0x0.0x1", "00000177.1", "4294967297", "127.0.0.0x1", "[::0x1]", "[0::1", "::1", "[::1].", "[]"),
    *("[::ffff:127.1]", "[::ffff:2130706433]", "[v1.127.0.0.1]", "127.0.0.1%00.a.test", "127.0.0.1\\.a.test"),
]


def ask(proxy: Proxy, url: str) -> Response:
    """By the absolute form, as any plain proxy client."""
    authority = url.split("/")[2]
    head = f"GET {url} HTTP/1.1\r\nHost: {authority}\r\n{proxy.auth('coder-1')}\r\n"
    with contextlib.closing(proxy.connect()) as connection:
        connection.send(head.encode())
        return connection.response()


def ask_in_tunnel(proxy: Proxy, host: str, port: int) -> Response:
    """By CONNECT, without a server name: an address has none."""
    with contextlib.closing(proxy.connect()) as connection:
        lines = f"Host: {host}:{port}\r\n{proxy.auth('coder-1')}"
        connection.send(f"CONNECT {host}:{port} HTTP/1.1\r\n{lines}\r\n".encode())
        response = connection.response("CONNECT")
        if response.status == 200:
            context = proxy.trust
            context.check_hostname = False
            connection.start_tls(context, None)
            connection.send(f"GET /x HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
            response = connection.response()
        return response


@pytest.mark.parametrize("host", LITERALS)
def test_an_address_that_is_not_public_is_not_dialled(proxy: Proxy, trap: Trap, host: str) -> None:
    """By http, by https in absolute form and in a tunnel, although a rule names every host."""
    for response in (
        ask(proxy, f"http://{host}:{trap.port}/x"),
        ask(proxy, f"https://{host}:{trap.port}/x"),
        ask_in_tunnel(proxy, host, trap.port),
    ):
        if "%" in host and response.status == 400:
            refused(response, "ambiguous_request")
        else:
            refused(response, "private_address")


@pytest.mark.parametrize("host", SPELLINGS)
def test_no_spelling_hides_an_address(proxy: Proxy, trap: Trap, nameserver: Nameserver, host: str) -> None:
    """Decimal, octal, hexadecimal, short, full-width and escaped: refused, and never taken for a name."""
    nameserver.asked.clear()
    for response in (
        ask(proxy, f"http://{host}:{trap.port}/x"),
        ask(proxy, f"https://{host}:{trap.port}/x"),
        ask_in_tunnel(proxy, host, trap.port),
    ):
        assert response.status in (400, 403), response
        refused(response, "ambiguous_request" if response.status == 400 else "private_address")
    assert nameserver.asked == []


NAMES = {
    "a.names.test": ["127.0.0.1"],
    "unspecified.names.test": ["0.0.0.0"],
    "six.names.test": ["::1"],
    "mapped.names.test": ["::ffff:127.0.0.1"],
    "nat64.names.test": ["64:ff9b::7f00:1"],
    "sixtofour.names.test": ["2002:7f00:1::1"],
    "teredo.names.test": ["2001:0:7f00:1::1"],
    "metadata.names.test": ["169.254.169.254"],
    "cgnat.names.test": ["100.100.100.200"],
    "azure.names.test": ["168.63.129.16"],
    "multicast.names.test": ["224.0.0.1"],
    "mixed.names.test": ["8.8.8.8", "127.0.0.1"],
    "mixed-first.names.test": ["127.0.0.1", "8.8.8.8"],
    "mixed-six.names.test": ["8.8.8.8", "::1"],
    "cname.names.test": ["inner.names.test", "127.0.0.1"],
    "chain.names.test": ["one.names.test", "two.names.test", "three.names.test", "10.0.0.1"],
    "public-cname.names.test": ["cdn.names.test", "8.8.8.8", "127.0.0.1"],
    "localhost": ["127.0.0.1"],
    "x.localhost": ["127.0.0.1"],
    "localhost.localdomain": ["::1"],
    "metadata.google.internal": ["169.254.169.254"],
    "127.0.0.1.nip.test": ["127.0.0.1"],
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_leads_to_such_an_address_is_refused(
    proxy: Proxy, trap: Trap, nameserver: Nameserver, name: str
) -> None:
    """One of several answers is enough, and so is one behind CNAMEs; the public ones among them are not dialled."""
    nameserver.names[name] = NAMES[name]
    for spelling in (name, name.upper() + "."):
        refused(ask(proxy, f"http://{spelling}:{trap.port}/x"), "private_address")
        refused(ask_in_tunnel(proxy, spelling, trap.port), "private_address")


def test_nothing_is_asked_for_a_name_that_is_refused(proxy: Proxy, nameserver: Nameserver) -> None:
    """A query would carry out whatever its labels say: not before a request, and not for one that policy refuses."""
    nameserver.asked.clear()
    refused(ask(proxy, "http://secret-1.never.test/x"), "blocked")
    refused(ask(proxy, "http://secret-2.dns.test:8080/x"), "no_rule")
    refused(ask_in_tunnel(proxy, "secret-3.never.test", 443), "blocked")
    refused(ask_in_tunnel(proxy, "secret-4.dns.test", 22), "no_rule")
    refused(ask(proxy, "http://secret-5.dns.test/%zz"), "ambiguous_request")
    connection = proxy.connect()
    connection.send(b"GET http://secret-6.dns.test/x HTTP/1.1\r\nHost: secret-6.dns.test\r\n\r\n")
    refused(connection.response(), "no_identity")
    proxy.tunnel("secret-7.dns.test").close()  # a tunnel, and no request in it
    mismatched = proxy.tunnel("secret-8.dns.test", sni="secret-9.dns.test")
    mismatched.send(b"GET /x HTTP/1.1\r\nHost: secret-8.dns.test\r\n\r\n")
    refused(mismatched.response(), "authority_mismatch")
    assert nameserver.asked == []


# Another proxy, for which loopback is a place to dial: what is left of it must still hold.


@pytest.fixture(scope="module")
def loopback(
    lane: str,
    make_proxy: Callable[..., Proxy],
    nameserver: Nameserver,
    _trap: Trap,
    _shared_plain_upstream: Upstream,
    _shared_upstream: Upstream,
) -> Proxy:
    proxy = make_proxy(
        "version: 1\nrules: []\n",
        lane=lane,
        listen=["127.0.0.1:0", "127.0.0.1:0"],
        connect_to={"admin.written.test:80": "127.0.0.1:1"},
        upstream={
            "nameservers": [f"127.0.0.1:{nameserver.port}"],
            "allow_addresses": ["127.0.0.0/8", "::1/128", "0.0.0.0/32"],
        },
    )
    own = [port for _, port in proxy.listeners] + [int(proxy.admin.rpartition(":")[2])]
    proxy.write_rules(rules(_shared_plain_upstream.port, _shared_upstream.port, _trap.port, *own))
    proxy.agent()
    wait_for(lambda: proxy.metric("sallyport_rules") == 4)
    return proxy


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.2", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]", "own.names.test", "cname.own.test"]
)
def test_the_proxy_is_no_way_to_itself(loopback: Proxy, nameserver: Nameserver, host: str) -> None:
    """Not to a listener nor the admin port, even where loopback is allowed: by address, name or CNAME."""
    nameserver.names["own.names.test"] = ["127.0.0.1"]
    nameserver.names["cname.own.test"] = ["own.names.test", "127.0.0.1"]
    for _, port in (*loopback.listeners, loopback.admin.split(":")):
        refused(ask(loopback, f"http://{host}:{port}/metrics"), "private_address")
        refused(ask_in_tunnel(loopback, host, int(port)), "private_address")


def test_the_store_is_no_upstream(make_proxy: Callable[..., Proxy], lane: str, tmp_path: Path) -> None:
    """It may be in a network that rules are to reach, and it takes commands from who speaks HTTP to it."""
    with RemoteStore(tmp_path) as store:
        store.start()
        upstream = {"allow_addresses": ["127.0.0.0/8", "::1/128"]}
        store_too = rules(store.port)
        proxy = make_proxy(store_too, lane=lane, store=f"redis://localhost:{store.port}", upstream=upstream)
        proxy.agent()
        for host in ("127.0.0.1", "127.0.0.2", "localhost", "[::ffff:127.0.0.1]"):
            refused(ask(proxy, f"http://{host}:{store.port}/"), "private_address")
            refused(ask_in_tunnel(proxy, host, store.port), "private_address")


def kept(proxy: Proxy, name: str, port: int) -> tuple[Connection, Callable[[], Response]]:
    connection = proxy.connect()
    head = f"GET http://{name}:{port}/x HTTP/1.1\r\nHost: {name}:{port}\r\n{proxy.auth('coder-1')}\r\n"

    def again() -> Response:
        connection.send(head.encode())
        return connection.response()

    return connection, again


def test_a_name_is_not_asked_again_between_check_and_dial(
    loopback: Proxy, nameserver: Nameserver, plain_upstream: Upstream
) -> None:
    """Rebinding: the answer that was checked (A and AAAA, one query each) is the one that is dialled."""
    nameserver.names["rebind.names.test"] = [["127.0.0.1"], ["127.0.0.1"], ["10.0.0.9"]]
    nameserver.asked.clear()
    _, again = kept(loopback, "rebind.names.test", plain_upstream.port)
    assert again().status == 200
    assert nameserver.asked == ["rebind.names.test"] * 2


def test_every_new_dial_is_checked_anew(loopback: Proxy, nameserver: Nameserver, plain_upstream: Upstream) -> None:
    """On a kept client connection: once its upstream is closed and the name leads elsewhere, it is refused."""
    nameserver.names["later.names.test"] = [["127.0.0.1"], ["127.0.0.1"], ["10.0.0.9"]]
    _, again = kept(loopback, "later.names.test", plain_upstream.port)
    assert again().status == 200
    plain_upstream.reset()
    refused(wait_for(lambda: response if (response := again()).status != 502 else None), "private_address")
    assert plain_upstream.seen == []
