"""A pinned client sees its own server's certificate through a tunnel; nothing else goes that way, on both lanes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.harness import PATIENCE, Connection, Proxy, Upstream, read_request, refused, server_context, wait_for
from tests.unit.test_clienthello import hello, made

pytestmark = pytest.mark.slow
Make = Callable[..., Proxy]
RULES = """version: 1
rules:
  - {name: pinned, action: allow, tls: passthrough, match: {host: [pinned.test, nowhere.test, inner.test, half.test]}}
  - {name: api, action: allow, match: {host: api.test}}
"""
SIZE = 3_000_000


@pytest.fixture(scope="module")
def pinned_ca() -> trustme.CA:
    """The only CA that the pinned client accepts, and that the proxy does not know."""
    return trustme.CA()


@pytest.fixture(scope="module")
def _pinned(pinned_ca: trustme.CA) -> Iterator[Upstream]:
    with Upstream(server_context(pinned_ca, "pinned.test")) as upstream:
        yield upstream


@pytest.fixture
def pinned(_pinned: Upstream) -> Upstream:
    """An upstream that the proxy would not trust."""
    _pinned.reset()
    return _pinned


@pytest.fixture(scope="module")
def half() -> Iterator[Upstream]:
    """One that reads what it is sent as it is."""
    with Upstream(None) as upstream:
        yield upstream


@pytest.fixture(scope="module")
def proxy(make_proxy: Make, lane: str, _pinned: Upstream, half: Upstream) -> Proxy:
    led = {"pinned.test:443": f"127.0.0.1:{_pinned.port}", "half.test:443": f"127.0.0.1:{half.port}"}
    led["nowhere.test:443"] = "127.0.0.1:1"
    led["inner.test:443"] = "localhost:443"  # what a name resolves to must be public
    proxy = make_proxy(RULES, lane=lane, connect_to=led)
    proxy.agent()
    return proxy


def tunnel(proxy: Proxy, host: str = "pinned.test", agent: str = "coder-1") -> Connection:
    """An accepted CONNECT."""
    proxy.agent(agent)
    connection = proxy.connect()
    connection.send(f"CONNECT {host}:443 HTTP/1.1\r\nhost: {host}:443\r\n{proxy.auth(agent)}\r\n".encode())
    assert connection.response("CONNECT").status == 200
    return connection


def client_context(ca: trustme.CA, *protocols: str) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # trustme's CA has no key usage
    ca.configure_trust(context)
    if protocols:
        context.set_alpn_protocols(protocols)
    return context


def tls(proxy: Proxy, ca: trustme.CA, *protocols: str, agent: str = "coder-1") -> Connection:
    """A pinned client's connection."""
    connection = tunnel(proxy, agent=agent)
    connection.start_tls(client_context(ca, *protocols), "pinned.test")
    return connection


@pytest.mark.parametrize("protocols", [(), ("http/1.1",), ("h2",)], ids=["no ALPN", "http/1.1", "h2 alone"])
def test_a_pinned_client_reaches_its_server_untouched(
    proxy: Proxy, pinned: Upstream, pinned_ca: trustme.CA, protocols: tuple[str, ...]
) -> None:
    """Whatever it speaks: the bytes are not looked at. One line in the audit log for all of it."""
    connection = tls(proxy, pinned_ca, *protocols)
    before = len(lines_of(proxy, "pinned.test"))
    for path in ("/one", "/two"):
        connection.send(f"GET {path} HTTP/1.1\r\nhost: anything\r\nproxy-x: kept\r\n\r\n".encode())
        assert connection.response().status == 200
    assert [(seen.target, seen.header("proxy-x")) for seen in pinned.seen] == [("/one", ["kept"]), ("/two", ["kept"])]
    connection.close()
    line = wait_for(lambda: lines_of(proxy, "pinned.test")[before:], "the audit line")[0]
    assert (line["verdict"], line["reason"], line["rule"], line["status"]) == ("allow", "allowed", "pinned", 200)
    assert (line["method"], line["host"], line["port"], line["path"]) == ("CONNECT", "pinned.test", 443, "")
    assert (line["agent"], line["upstream_ip"], line["injected"]) == ("coder-1", "127.0.0.1", [])
    assert line["request_bytes"] > 500
    assert line["response_bytes"] > 1000


def lines_of(proxy: Proxy, host: str) -> list[dict[str, Any]]:
    """The audit lines there are of a host."""
    text = (proxy.folder / ".sallyport" / "audit.jsonl").read_text()
    return [line for line in map(json.loads, text.split("\n")[:-1]) if line["host"] == host]


def test_curl_that_pins_a_ca_goes_through(
    proxy: Proxy, pinned: Upstream, pinned_ca: trustme.CA, tmp_path: Path
) -> None:
    pinned_ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    command = ["curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "--cacert", "ca.pem", "https://pinned.test/curl"]
    command += ["-x", f"http://coder-1:{proxy.tokens['coder-1']}@{proxy.address[0]}:{proxy.address[1]}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (result.stdout, result.stderr) == ("200", "")
    assert [seen.target for seen in pinned.seen] == ["/curl"]


def test_much_goes_both_ways(proxy: Proxy, pinned: Upstream, pinned_ca: trustme.CA) -> None:
    async def swap(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen = await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(seen.body) + seen.body[::-1])
        await writer.drain()

    pinned.raw = swap
    body = bytes(range(250)) * (SIZE // 250)
    connection = tls(proxy, pinned_ca)
    connection.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    assert connection.response().body == body[::-1]


def ended(connection: Connection) -> bool:
    """Whether the proxy hung up without a byte of an answer."""
    connection.sock.settimeout(PATIENCE)
    with contextlib.suppress(ConnectionResetError):
        return connection.closed()
    return True


ECH = (0xFE0D, b"\x00\x00\x01\x00\x01\x07\x00\x20" + bytes(32) + b"\x00\x10" + bytes(16))
HALF = (0, b"\x00\x0c\x00\x00\x09half.test")


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        (hello("api.test"), "authority_mismatch"),
        (hello(None), "authority_mismatch"),
        (made(HALF, ECH), "protocol_not_allowed"),
        (made(HALF, HALF), "ambiguous_request"),
        (b"GET / HTTP/1.1\r\nhost: half.test\r\n\r\n", "protocol_not_allowed"),
    ],
    ids=["another name", "no name", "an encrypted hello", "two names", "no TLS"],
)
def test_a_start_that_does_not_show_where_it_leads_is_refused(
    proxy: Proxy, half: Upstream, start: bytes, reason: str
) -> None:
    """Before anything is dialled, and on record."""
    half.reset()
    connection = tunnel(proxy, "half.test")
    before = len(lines_of(proxy, "half.test"))
    connection.send(start)
    assert ended(connection)
    line = wait_for(lambda: lines_of(proxy, "half.test")[before:], "the audit line")[0]
    assert (line["verdict"], line["reason"], line["response_bytes"]) == ("block", reason, 0)
    assert half.connections == 0


def test_a_hello_in_pieces_is_waited_for(proxy: Proxy, pinned: Upstream, pinned_ca: trustme.CA) -> None:
    connection = tunnel(proxy)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context(pinned_ca).wrap_bio(incoming, outgoing, server_hostname="pinned.test")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    start = outgoing.read()
    for piece in (start[:1], start[1:4], start[4:40], start[40:]):
        connection.send(piece)
        assert pinned.seen == []
    incoming.write(connection.recv())
    with pytest.raises(ssl.SSLWantReadError):
        client.read()  # the handshake is over


@pytest.mark.parametrize(
    ("host", "reason"), [("nowhere.test", "upstream_unreachable"), ("inner.test", "private_address")]
)
def test_no_upstream_is_a_closed_tunnel_and_a_line(proxy: Proxy, host: str, reason: str) -> None:
    connection = tunnel(proxy, host)
    connection.send(hello(host))
    assert ended(connection)
    assert proxy.audit(host=host, reason=reason)


def test_a_kill_cuts_it(proxy: Proxy, pinned: Upstream, pinned_ca: trustme.CA) -> None:
    connection = tls(proxy, pinned_ca, agent="doomed")
    connection.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    assert connection.response().status == 200
    proxy.cli("agent", "kill", "doomed")
    assert ended(connection)
    (line,) = proxy.audit(agent="doomed", host="pinned.test")
    assert (line["verdict"], line["reason"]) == ("block", "agent_killed")
    assert line["response_bytes"] > 0
    again = tunnel(proxy, agent="doomed")
    seen = pinned.connections
    context = proxy.trust
    again.start_tls(context, "pinned.test")  # intercepted, so that the refusal can be read
    again.send(b"GET / HTTP/1.1\r\nhost: pinned.test\r\n\r\n")
    refused(again.response(), "agent_killed")
    assert pinned.connections == seen


def test_silence_ends_it(make_proxy: Make, lane: str, pinned: Upstream, pinned_ca: trustme.CA) -> None:
    """`limits.idle`, but not while one side is heard."""
    led = {"pinned.test:443": f"127.0.0.1:{pinned.port}"}
    proxy = make_proxy(RULES, lane=lane, connect_to=led, limits={"idle": "2s"})
    proxy.agent()

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(6):
            writer.write(b"1\r\nx\r\n")
            await writer.drain()
            await asyncio.sleep(0.6)  # 3.6 s in all, longer than the client may be silent alone
        await asyncio.sleep(60)

    pinned.raw = drip
    connection = tls(proxy, pinned_ca)
    connection.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    connection.read_until(b"x\r\n1\r\nx\r\n1\r\nx\r\n1\r\nx\r\n1\r\nx\r\n1\r\nx\r\n")
    assert ended(connection)


def test_what_one_side_ended_the_other_may_answer(proxy: Proxy, half: Upstream, lane: str) -> None:
    """A half-closed connection (RFC 9293 section 3.6) stays one, but in mitmproxy's stack."""
    got: list[bytes] = []

    async def last_word(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append(await reader.read())
        writer.write(b"the last word")
        await writer.drain()

    half.raw = last_word
    connection = tunnel(proxy, "half.test")
    start = hello("half.test")
    connection.send(start)
    connection.sock.shutdown(socket.SHUT_WR)
    if lane == "fast":
        assert connection.read_exactly(13) == b"the last word"
    assert ended(connection)
    wait_for(lambda: got, "what the upstream read")
    assert got == [start]


def test_other_hosts_are_intercepted_as_ever(proxy: Proxy, upstream: Upstream) -> None:
    assert proxy.get("https://api.test/x").status == 200
    assert upstream.seen[-1].target == "/x"
    answer = proxy.cli("explain", "--agent", "coder-1", "GET", "https://pinned.test/x").stdout
    assert "passes the connection through: requests are not read, nothing is injected" in answer
