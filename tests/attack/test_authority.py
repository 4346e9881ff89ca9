"""Where a request goes: CONNECT target, TLS server name, Host, :authority and URL must say one and the same."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable

import pytest

from tests.h2client import Http2
from tests.harness import Connection, Proxy, Upstream, refused, wait_for

RULES = """
version: 1
rules:
  - {name: tls, match: {host: [api.test, other.test]}, action: allow}
  - {name: plain, match: {host: [api.test, other.test], scheme: http}, action: allow}
  - {name: literal, match: {host: 192.0.2.7}, action: allow}
"""


@pytest.fixture(scope="module")
def proxy(lane: str, make_proxy: Callable[..., Proxy], _shared_upstream: Upstream) -> Proxy:
    proxy = make_proxy(RULES, lane=lane, connect_to={"192.0.2.7:443": f"127.0.0.1:{_shared_upstream.port}"})
    proxy.agent()
    return proxy


def get(connection: Connection, target: str, *hosts: str, extra: str = "") -> None:
    lines = "".join(f"host: {host}\r\n" for host in hosts)
    connection.send(f"GET {target} HTTP/1.1\r\n{lines}{extra}\r\n".encode())


AGREE = [("/x", "api.test"), ("/x", "API.TEST"), ("/x", "api.test:443"), ("/x", "api.test."), ("/x", "Api.Test.:443")]
AGREE += [
    ("https://api.test/x", "api.test"),
    ("HTTPS://API.test:443/x", "api.test"),
    ("https://api.test./x", "api.test"),
]


@pytest.mark.parametrize(("target", "host"), AGREE)
def test_spellings_of_one_authority_agree(proxy: Proxy, upstream: Upstream, target: str, host: str) -> None:
    """Case, a trailing dot and the port of the scheme make no difference; what is sent is the one normal form."""
    tunnel = proxy.tunnel("api.test")
    for _ in range(2):
        get(tunnel, target, host)
        assert tunnel.response().status == 200
    assert [(seen.target, seen.header("host")) for seen in upstream.seen] == [("/x", ["api.test"])] * 2
    assert upstream.connections <= 1  # the fast lane may have kept one


MISMATCH = [
    ("/x", "other.test"),
    ("/x", "api.test:8443"),
    ("/x", "api.test:80"),
    ("/x", "x.api.test"),
    ("/x", "127.0.0.1"),
    ("https://other.test/x", "api.test"),
    ("https://other.test/x", "other.test"),
    ("https://api.test/x", "other.test"),
    ("https://api.test:8443/x", "api.test"),
    ("http://api.test/x", "api.test"),
    ("http://api.test:443/x", "api.test:443"),
    ("/x", "api.test.evil.test"),
    ("/x", "evil-api.test"),
    ("/x", "xn--pi-6kc.test"),
    ("/x", "[::1]"),
    ("/x", "[::ffff:192.0.2.7]"),
    ("/x", "192.0.2.7"),
]


@pytest.mark.parametrize(("target", "host"), MISMATCH)
@pytest.mark.parametrize("later", [False, True], ids=["first", "later"])
def test_another_authority_inside_a_tunnel_is_refused(
    proxy: Proxy, upstream: Upstream, target: str, host: str, later: bool
) -> None:
    """On the first request and on a later one; the connection can be used for what it is for."""
    tunnel = proxy.tunnel("api.test")
    if later:
        get(tunnel, "/first", "api.test")
        assert tunnel.response().status == 200
    get(tunnel, target, host)
    refused(tunnel.response(), "authority_mismatch")
    get(tunnel, "/last", "api.test")
    assert tunnel.response().status == 200
    assert [seen.target for seen in upstream.seen] == ["/first", "/last"][not later :]


AMBIGUOUS = [
    ("/x", ["api.test", "api.test"]),
    ("/x", ["api.test", "other.test"]),
    ("/x", []),
    ("/x", ["user@api.test"]),
    ("/x", ["api.test:"]),
    ("/x", ["api.test:443:443"]),
    ("/x", ["api.test:99999"]),
    ("/x", ["api.test, other.test"]),
    ("/x", ["api.test/other"]),
    ("/x", ["[::1"]),
    ("/x", ["api%2etest"]),
    ("/x", ["api.test%00.evil.test"]),
    ("/x", ["api.test%23.evil.test"]),
    ("/x", ["api..test"]),
    ("/x", [".api.test"]),
    ("/x", ["api.test.."]),
    ("/x", ["api.test\\.evil.test"]),
    ("/x", ["api.test#.evil.test"]),
    ("/x", ["api.test?.evil.test"]),
    ("/x", ["api.test;443"]),
    ("/x", ["api.test 443"]),
    ("/x", ["0x7f.1"]),
    ("/x", ["2130706433"]),
    ("/x", ["127.1"]),
    ("/x", ["[fe80::1%25eth0]"]),
    ("/x", ["*.test"]),
    ("/x", ["-api.test"]),
    ("/x", ["a" * 300 + ".test"]),
    ("https://api%2etest/x", ["api.test"]),
    ("https://api.test%2f@other.test/x", ["api.test"]),
    ("https://api.test@other.test/x", ["api.test"]),
    ("https://other.test\\@api.test/x", ["api.test"]),
    ("https://user:password@api.test/x", ["api.test"]),
    ("https://api.test:port/x", ["api.test"]),
    ("https:///x", ["api.test"]),
]


@pytest.mark.parametrize(("target", "hosts"), AMBIGUOUS, ids=str)
def test_an_authority_that_is_none_is_refused(proxy: Proxy, upstream: Upstream, target: str, hosts: list[str]) -> None:
    """Missing, twice, with a user, with a port that is no port."""
    if "api.test:" in hosts:
        hosts = ["api.test:,"]
    tunnel = proxy.tunnel("api.test")
    get(tunnel, target, *hosts)
    response = tunnel.response()
    refused(response, "ambiguous_request")
    assert "password" not in response.body.decode()
    assert upstream.connections == 0


LOOKALIKES = {  # a name that looks like api.test, and the name that it is
    "\u0430pi.test": "xn--pi-6kc.test",  # a Cyrillic letter
    "api.t\u0435st": "api.xn--tst-rdd",
    "\u0251pi.test": "xn--pi-4eb.test",
    "a\u0440i.test": "xn--ai-lmc.test",
}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_a_name_that_looks_alike_is_another(proxy: Proxy, upstream: Upstream, name: str) -> None:
    """In UTF-8 or as an A-label, as a target and as Host."""
    for spelling in (name, LOOKALIKES[name]):
        connection = proxy.connect()
        connection.send(f"GET https://{spelling}/x HTTP/1.1\r\n{proxy.auth('coder-1')}\r\n".encode())
        assert connection.response().code in ("no_rule", "ambiguous_request")
        tunnel = proxy.tunnel("api.test")
        tunnel.send(f"GET /x HTTP/1.1\r\nhost: {spelling}\r\n\r\n".encode())
        assert tunnel.response().code in ("authority_mismatch", "ambiguous_request")
    assert upstream.connections == 0


@pytest.mark.parametrize("name", ["API\uff0eTEST", "\u24d0pi.test", "api\u3002test", "ap\u00adi.test", "ap\u0131.test"])
def test_a_name_that_would_be_mapped_is_not_api_test(proxy: Proxy, upstream: Upstream, name: str) -> None:
    """What IDNA 2003 and browsers map to ASCII (UTS #46) must not be matched as one and sent as the other."""
    tunnel = proxy.tunnel("api.test")
    tunnel.send(f"GET /x HTTP/1.1\r\nhost: {name}\r\n\r\n".encode())
    response = tunnel.response()
    assert response.status == 200 or response.code in ("authority_mismatch", "ambiguous_request")
    assert [seen.header("host") for seen in upstream.seen] == ([["api.test"]] if response.status == 200 else [])


@pytest.mark.parametrize("sni", ["other.test", "x.api.test", "api.test.evil.test"])
def test_a_server_name_that_is_not_the_target_is_refused(proxy: Proxy, upstream: Upstream, sni: str) -> None:
    """Whatever Host says: it could be meant for either. The certificate shown is for the name that was asked for."""
    tunnel = proxy.tunnel("api.test", sni=sni)
    for host in ("api.test", sni):
        get(tunnel, "/x", host)
        refused(tunnel.response(), "authority_mismatch")
    assert upstream.connections == 0


def test_a_server_name_in_another_case_is_the_same(proxy: Proxy, upstream: Upstream) -> None:
    """Names are."""
    connection = connected(proxy, "API.test.:443")
    connection.start_tls(proxy.trust, "Api.TEST")
    get(connection, "/x", "api.test")
    assert connection.response().status == 200


def test_without_a_server_name_the_target_counts(proxy: Proxy, upstream: Upstream) -> None:
    """And the upstream must still prove the target's name."""
    tunnel = proxy.tunnel("api.test", sni=None)
    assert isinstance(tunnel.sock, ssl.SSLSocket)
    get(tunnel, "/x", "api.test")
    assert tunnel.response().status == 200
    get(tunnel, "/x", "other.test")
    refused(tunnel.response(), "authority_mismatch")


def test_an_address_is_a_target_too(proxy: Proxy, upstream: Upstream) -> None:
    """With a certificate for the address from us; the upstream has one for another address only."""
    tunnel = proxy.tunnel("192.0.2.7")
    get(tunnel, "/x", "192.0.2.7")
    refused(tunnel.response(), "upstream_tls")
    get(tunnel, "/x", "api.test")
    refused(tunnel.response(), "authority_mismatch")
    assert upstream.seen == []


def connected(proxy: Proxy, target: str, early: bytes = b"") -> Connection:
    connection = proxy.connect()
    connection.send(f"CONNECT {target} HTTP/1.1\r\n{proxy.auth('coder-1')}\r\n".encode() + early)
    assert connection.response("CONNECT").status == 200
    return connection


@pytest.mark.parametrize("target", ["api.test:80", "api.test:22", "api.test:8443", "127.0.0.1:25", "[::1]:3306"])
def test_a_connect_to_another_port_is_refused_at_once(proxy: Proxy, upstream: Upstream, target: str) -> None:
    """There is no TLS in which it could be answered. What was sent along is not taken for a request."""
    connection = proxy.connect()
    smuggled = f"GET http://api.test/x HTTP/1.1\r\nhost: api.test\r\n{proxy.auth('coder-1')}\r\n"
    connection.send(f"CONNECT {target} HTTP/1.1\r\n{proxy.auth('coder-1')}\r\n{smuggled}".encode())
    response = connection.response("CONNECT")
    error = refused(response, "no_rule")
    assert response.header("connection") == "close"
    assert connection.closed()
    (line,) = proxy.audit(id=error["request_id"])
    assert (line["method"], line["port"]) == ("CONNECT", int(target.rpartition(":")[2]))
    assert upstream.connections == 0


def test_much_early_data_behind_a_refused_connect_does_not_hide_the_answer(proxy: Proxy) -> None:
    """Runtimes send it before the 200; a reset would take the answer away."""
    for _ in range(5):
        connection = proxy.connect()
        connection.send(f"CONNECT api.test:22 HTTP/1.1\r\n{proxy.auth('coder-1')}\r\n".encode())
        for _ in range(20):
            connection.send(b"x" * 50_000)
        refused(connection.response("CONNECT"), "no_rule")
        assert connection.closed()


@pytest.mark.parametrize(
    "target",
    [
        "api.test",
        "api.test:",
        "api.test:0",
        "api.test:99999",
        "api.test:4x3",
        ":443",
        "user@api.test:443",
        "/x",
        "*",
        "https://api.test:443",
        "api.test:443/x",
        "::1:443",
        "[::1%25lo]:443",
        "0x7f.1:443",
        "a b:443",
        "api..test:443",
    ],
)
def test_a_connect_to_no_place_is_refused(proxy: Proxy, upstream: Upstream, target: str) -> None:
    """Its target must be a host and a port (RFC 9110 section 9.3.6)."""
    connection = proxy.connect()
    connection.send(f"CONNECT {target} HTTP/1.1\r\n{proxy.auth('coder-1')}\r\n".encode())
    refused(connection.response("CONNECT"), "ambiguous_request")
    assert connection.closed()
    assert upstream.connections == 0


def test_a_connect_with_another_host_is_refused(proxy: Proxy, upstream: Upstream) -> None:
    """Before anything is accepted."""
    connection = proxy.connect()
    connection.send(f"CONNECT api.test:443 HTTP/1.1\r\nhost: other.test:443\r\n{proxy.auth('coder-1')}\r\n".encode())
    refused(connection.response("CONNECT"), "authority_mismatch")
    assert connection.closed()


@pytest.mark.parametrize("framing", ["content-length: 5", "transfer-encoding: chunked"])
def test_a_connect_with_a_body_is_refused(proxy: Proxy, upstream: Upstream, framing: str) -> None:
    """Where it ends and the tunnel begins, two readers may disagree."""
    connection = proxy.connect()
    connection.send(f"CONNECT api.test:443 HTTP/1.1\r\n{framing}\r\n{proxy.auth('coder-1')}\r\n".encode())
    refused(connection.response("CONNECT"), "ambiguous_request")
    assert connection.closed()


@pytest.mark.parametrize(
    "data",
    [
        b"GET /x HTTP/1.1\r\nhost: api.test\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\r\n\r\n",
        b"\r\nGET /x HTTP/1.1\r\nhost: api.test\r\n\r\n",
        b"\x00" * 100,
        b"\x16",
        b"\x16\x02\x01",
        b"\x16\x03\x01\x00\x05hello",
        b"\x16\x03\x01" + b"\xff" * 100_000,
        b"\x80\x2e\x01\x00\x02" + b"\x00" * 50,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    ids=[
        "HTTP",
        "SSH",
        "empty lines",
        "late HTTP",
        "zeroes",
        "one byte",
        "SSL",
        "junk",
        "much junk",
        "SSLv2",
        "HTTP/2",
    ],
)
@pytest.mark.parametrize("early", [True, False], ids=["early", "late"])
def test_what_is_no_tls_ends_at_the_proxy(proxy: Proxy, upstream: Upstream, data: bytes, early: bool) -> None:
    """In a tunnel to a TLS port; nothing of it goes anywhere."""
    connection = connected(proxy, "api.test:443", data if early else b"")
    if not early:
        connection.send(data)
    if data == b"\x16" or (data.strip() == b"" and early):  # more could come; an empty line behind CONNECT is no data
        connection.send(b"\x99")
    assert connection.recv()[:1] in (b"", b"\x15")  # closed, or a TLS alert and then closed
    assert connection.closed()
    assert upstream.connections == 0


def test_a_tunnel_that_was_no_tls_is_on_record(proxy: Proxy, upstream: Upstream) -> None:
    """As protocol_not_allowed, with its agent and target."""
    assert not connected(proxy, "other.test:443", b"SSH-2.0-x\r\n").recv()
    (line,) = proxy.audit(reason="protocol_not_allowed", host="other.test")
    assert (line["agent"], line["method"], line["verdict"]) == ("coder-1", "CONNECT", "block")


def test_early_tls_data_is_the_beginning_of_the_tunnel(proxy: Proxy, upstream: Upstream) -> None:
    """Some runtimes do not wait for the 200."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = proxy.trust.wrap_bio(incoming, outgoing, server_hostname="api.test")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    connection = connected(proxy, "api.test:443", outgoing.read())
    while True:
        try:
            tls.do_handshake()
            break
        except ssl.SSLWantReadError:
            connection.send(outgoing.read())
            incoming.write(connection.buffer or connection.recv())
            connection.buffer = b""
    tls.write(b"GET /x HTTP/1.1\r\nhost: api.test\r\n\r\n")
    connection.send(outgoing.read())
    wait_for(lambda: upstream.seen)


# Plain HTTP


PLAIN_AGREE = [("http://api.test/x", ["api.test"]), ("http://API.test:80/x", ["api.test."]), ("http://api.test/x", [])]
PLAIN_AGREE += [("HTTP://api.test/x", ["api.test:80"])]


@pytest.mark.parametrize(("target", "hosts"), PLAIN_AGREE, ids=str)
def test_an_absolute_url_says_where_to(proxy: Proxy, plain_upstream: Upstream, target: str, hosts: list[str]) -> None:
    """workerd sends no Host beside it."""
    connection = proxy.connect()
    get(connection, target, *hosts, extra=proxy.auth("coder-1"))
    assert connection.response().status == 200
    assert [(seen.target, seen.header("host")) for seen in plain_upstream.seen] == [("/x", ["api.test"])]


def test_an_https_url_on_a_plain_connection_is_fetched_over_tls(proxy: Proxy, upstream: Upstream) -> None:
    """So workerd asks for it."""
    connection = proxy.connect()
    for host in ("api.test", "other.test", "api.test"):
        get(connection, f"https://{host}/x", extra=proxy.auth("coder-1"))
        assert connection.response().status == 200
    assert [seen.header("host") for seen in upstream.seen] == [["api.test"], ["other.test"], ["api.test"]]
    assert upstream.connections == 2


@pytest.mark.parametrize(
    ("target", "hosts", "code"),
    [
        ("http://api.test/x", ["other.test"], "authority_mismatch"),
        ("http://api.test/x", ["api.test:443"], "authority_mismatch"),
        ("http://api.test/x", ["api.test", "other.test"], "ambiguous_request"),
        ("/x", ["api.test"], "ambiguous_request"),
        ("/x", [], "ambiguous_request"),
        ("*", ["api.test"], "ambiguous_request"),
        ("x", ["api.test"], "ambiguous_request"),
        ("//api.test/x", ["api.test"], "ambiguous_request"),
        ("http:/api.test/x", ["api.test"], "ambiguous_request"),
        ("http://user:password@api.test/x", ["api.test"], "ambiguous_request"),
        ("http://api.test\\@other.test/x", ["api.test"], "ambiguous_request"),
        ("http://api.test#@other.test/x", ["api.test"], "ambiguous_request"),
        ("ftp://api.test:80/x", ["api.test:80"], "protocol_not_allowed"),
        ("ws://api.test:80/x", ["api.test:80"], "protocol_not_allowed"),
        ("file:///etc/passwd", ["api.test"], "ambiguous_request"),
        ("javascript:1", ["api.test"], "ambiguous_request"),
    ],
    ids=str,
)
def test_what_is_no_url_of_ours_is_refused(
    proxy: Proxy, plain_upstream: Upstream, target: str, hosts: list[str], code: str
) -> None:
    """On the plain connection."""
    connection = proxy.connect()
    get(connection, target, *hosts, extra=proxy.auth("coder-1"))
    response = connection.response()
    refused(response, code)
    assert "password" not in response.body.decode()
    assert plain_upstream.connections == 0


# HTTP/2


@pytest.mark.parametrize(
    ("authority", "host", "code"),
    [
        ("api.test", None, None),
        ("API.test.:443", None, None),
        ("api.test", "api.test", None),
        (None, "api.test", None),
        ("other.test", None, "authority_mismatch"),
        ("other.test", "other.test", "authority_mismatch"),
        ("api.test:8443", None, "authority_mismatch"),
        ("api.test", "other.test", "authority_mismatch"),
        (None, "other.test", "authority_mismatch"),
        ("user@api.test", None, "ambiguous_request"),
    ],
    ids=str,
)
def test_authority_in_http_2(
    proxy: Proxy, upstream: Upstream, authority: str | None, host: str | None, code: str | None
) -> None:
    """The pseudo-header and Host, alone and together."""
    client = Http2(proxy.tunnel("api.test", alpn="h2"))
    first = client.response(client.request("/first"))
    assert first.status == 200
    try:
        response = client.response(client.request("/x", authority, headers=[("host", host)] if host else []))
    except ConnectionError:
        assert code  # what h2 itself refuses ends the connection
    else:
        assert response.status == 200 if code is None else refused(response, code)
    assert [seen.target for seen in upstream.seen] == (["/first"] if code else ["/first", "/x"])
    assert all(seen.header("host") == ["api.test"] for seen in upstream.seen)


# ClientHellos


def client_hello(proxy: Proxy, name: str | None = "api.test") -> bytes:
    """The first flight of a client, one record."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = proxy.trust
    context.check_hostname = name is not None
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


def with_extension(hello: bytes, kind: int, data: bytes) -> bytes:
    """The same hello with one more extension (RFC 8446 section 4.1.2), all lengths in order."""
    body = hello[9:]
    at = 34 + 1 + body[34]
    at += 2 + int.from_bytes(body[at : at + 2])
    at += 1 + body[at]
    extensions = kind.to_bytes(2) + len(data).to_bytes(2) + data + body[at + 2 :]
    body = body[:at] + len(extensions).to_bytes(2) + extensions
    message = b"\1" + len(body).to_bytes(3) + body
    return b"\x16\3\1" + len(message).to_bytes(2) + message


def in_records(hello: bytes, size: int) -> bytes:
    """The same handshake message in records of `size` bytes (RFC 8446 section 5.1)."""
    message = hello[5:]
    pieces = [message[at : at + size] for at in range(0, len(message), size)]
    return b"".join(b"\x16\3\1" + len(piece).to_bytes(2) + piece for piece in pieces)


HELLOS: dict[str, Callable[[bytes], bytes]] = {
    "more than 1 KB": lambda hello: with_extension(hello, 0x5A5A, bytes(1500)),
    "more than 8 KB": lambda hello: with_extension(hello, 0x5A5A, bytes(8500)),
    "in many records": lambda hello: in_records(hello, 50),
    "in records of one byte": lambda hello: in_records(hello, 1),
    "encrypted, of which we know no key": lambda hello: with_extension(hello, 0xFE0D, bytes(200)),
    "with an extension nobody knows": lambda hello: with_extension(hello, 0x4A4A, b"\0"),
}


@pytest.mark.parametrize("packet", [1 << 20, 700, 3], ids=["at once", "in packets", "in drops"])
@pytest.mark.parametrize("case", HELLOS)
def test_a_client_hello_in_any_shape_is_read(proxy: Proxy, upstream: Upstream, case: str, packet: int) -> None:
    """Over records and packets: the answer is a ServerHello, or an alert where we changed what was signed for."""
    connection = connected(proxy, "api.test:443")
    hello = HELLOS[case](client_hello(proxy))
    for at in range(0, len(hello), packet):
        connection.send(hello[at : at + packet])
    assert connection.recv()[:1] in (b"\x16", b"\x15")
    assert upstream.connections == 0


@pytest.mark.parametrize("size", [1, 50, 400])
@pytest.mark.parametrize(("name", "status"), [("api.test", 200), ("other.test", 421), (None, 200)], ids=str)
def test_a_split_client_hello_names_what_it_names(
    proxy: Proxy, upstream: Upstream, size: int, name: str | None, status: int
) -> None:
    """A name that was not read because it came in pieces would be a name that was not checked."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = proxy.trust
    context.check_hostname = name is not None
    tls = context.wrap_bio(incoming, outgoing, server_hostname=name)
    connection = connected(proxy, "api.test:443")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    connection.send(in_records(outgoing.read(), size))

    def until[T](step: Callable[[], T]) -> T:
        while True:
            try:
                result = step()
            except ssl.SSLWantReadError:
                incoming.write(connection.recv())
            else:
                connection.send(outgoing.read())
                return result

    until(tls.do_handshake)
    tls.write(b"GET /x HTTP/1.1\r\nhost: api.test\r\n\r\n")
    connection.send(outgoing.read())
    assert until(lambda: tls.read(65536)).startswith(b"HTTP/1.1 %d " % status)
    assert len(upstream.seen) == (status == 200)


GARBAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda hello: hello[:-10],
    "a length that lies": lambda hello: hello[:6] + b"\xff\xff\xff" + hello[9:],
    "a list of names without end": lambda hello: with_extension(hello, 0, b"\xff\xff\0\xff\xffapi.test"),
    "two names": lambda hello: with_extension(hello, 0, b"\0\x0c\0\0\x09evil.test"),
    "an empty name": lambda hello: with_extension(hello, 0, b"\0\3\0\0\0"),
    "random bytes": lambda hello: hello[:43] + bytes(range(256)) * 2,
    "a record that is too large": lambda hello: b"\x16\3\1\xff\xff" + bytes(65535),
    "empty records": lambda _: b"\x16\3\1\0\0" * 5000,
    "a hello of 16 MB": lambda hello: b"\x16\3\1\x40\0\1\xff\xff\xff" + b"\3\3" + bytes(0x4000 - 6) * 8,
}


@pytest.mark.parametrize("case", GARBAGE)
def test_garbage_in_a_client_hello_ends_the_tunnel(proxy: Proxy, upstream: Upstream, case: str) -> None:
    """No crash, no hang and no dial; the proxy goes on."""
    connection = connected(proxy, "api.test:443")
    with contextlib.suppress(OSError):
        connection.send(GARBAGE[case](client_hello(proxy)))
        connection.sock.shutdown(socket.SHUT_WR)
    while connection.recv():
        pass
    assert upstream.connections == 0
    assert proxy.get("https://api.test/x").status == 200
