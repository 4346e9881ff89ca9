"""HTTP/1.1 as hostile peers speak it, on either side: nothing is read in two ways, nothing hangs."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable

import pytest

from tests.harness import Connection, Proxy, Reply, Upstream, read_request, refused, wait_for

SECRET = "real-key-4f1e9b7c2d"
RULES = """
version: 1
rules:
  - {name: api, match: {host: api.test, path: /v1/**}, action: allow}
  - {name: plain, match: {host: api.test, scheme: http, path: /v1/**}, action: allow}
  - name: keyed
    match: {host: api.test, path: /keyed/**}
    action: allow
    inject: [{credential: api, as: bearer}]
"""
HEAD = b"GET /v1/x HTTP/1.1\r\nhost: api.test\r\n"
POST = b"POST /v1/x HTTP/1.1\r\nhost: api.test\r\n"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@pytest.fixture(scope="module")
def proxy(lane: str, make_proxy: Callable[..., Proxy]) -> Proxy:
    proxy = make_proxy(RULES, lane=lane)
    proxy.agent()
    proxy.credential("api", SECRET, "--host", "api.test")
    return proxy


@pytest.fixture
def tunnel(proxy: Proxy) -> Connection:
    """Ready for a request to api.test."""
    return proxy.tunnel("api.test")


def raw(upstream: Upstream, *parts: bytes, hold: bool = False) -> None:
    """Let the upstream answer a connection's first request with `parts` and close, or `hold` it for further ones."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream.seen.append(await read_request(reader))
        for part in parts:
            writer.write(part)
            await writer.drain()
        while hold and await upstream.exchange(reader, writer):
            pass

    upstream.raw = serve


def works(tunnel: Connection, upstream: Upstream) -> bool:
    """Whether the connection can be used for one more request."""
    upstream.reset()
    tunnel.send(HEAD + b"\r\n")
    return tunnel.response().status == 200


MALFORMED = {
    "both lengths": POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "both lengths, the other way round": POST + b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n",
    "two different lengths": POST + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello!",
    "one length twice": POST + b"content-length: 5\r\ncontent-length: 5\r\n\r\nhello",
    "a list of lengths": POST + b"content-length: 5, 5\r\n\r\nhello",
    "a signed length": POST + b"content-length: +5\r\n\r\nhello",
    "a negative length": POST + b"content-length: -1\r\n\r\n",
    "a hexadecimal length": POST + b"content-length: 0x5\r\n\r\nhello",
    "a length with a leading zero": POST + b"content-length: 05\r\n\r\nhello",
    "a length of nothing": POST + b"content-length:\r\n\r\n",
    "a huge length": POST + b"content-length: 99999999999999999999\r\n\r\n",
    "a coding before chunked": POST + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "a coding after chunked": POST + b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "a coding nobody knows": POST + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked twice": POST + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "a vertical tab in the coding": POST + b"transfer-encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "chunked from HTTP/1.0": b"POST /v1/x HTTP/1.0\r\nhost: api.test\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "a folded line": HEAD + b"x-one: a\r\n b: c\r\n\r\n",
    "a first line that is folded": b"GET /v1/x HTTP/1.1\r\n host: api.test\r\nhost: api.test\r\n\r\n",
    "a space before the colon": POST + b"content-length : 5\r\n\r\nhello",
    "a tab before the colon": HEAD + b"x-one\t: a\r\n\r\n",
    "a header without a colon": HEAD + b"x-one\r\n\r\n",
    "a header without a name": HEAD + b": a\r\n\r\n",
    "a bare line feed between headers": HEAD + b"x-one: a\nx-two: b\r\n\r\n",
    "bare line feeds only": HEAD.replace(b"\r\n", b"\n") + b"\n",
    "a bare line feed at the very end": HEAD.replace(b"\r\n", b"\n") + b"\r\n",
    "a bare carriage return": HEAD + b"x-one: a\rx-two: b\r\n\r\n",
    "a zero octet": HEAD + b"x-one: a\x00b\r\n\r\n",
    "an escape": HEAD + b"x-one: \x1b[2J\r\n\r\n",
    "a name that is not ASCII": HEAD + "x-öne: a\r\n\r\n".encode(),
    "no Host": b"GET /v1/x HTTP/1.1\r\n\r\n",
    "two Hosts": HEAD + b"host: api.test\r\n\r\n",
    "an empty Host": b"GET /v1/x HTTP/1.1\r\nhost:\r\n\r\n",
    "two spaces in the request line": b"GET  /v1/x HTTP/1.1\r\nhost: api.test\r\n\r\n",
    "tabs in the request line": b"GET\t/v1/x\tHTTP/1.1\r\nhost: api.test\r\n\r\n",
    "no version": b"GET /v1/x\r\nhost: api.test\r\n\r\n",
    "a version that is not ours": b"GET /v1/x HTTP/1.2\r\nhost: api.test\r\n\r\n",
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a lower-case version": b"GET /v1/x http/1.1\r\nhost: api.test\r\n\r\n",
    "a method that is no token": b"G@T /v1/x HTTP/1.1\r\nhost: api.test\r\n\r\n",
    "a target that is no path": b"GET v1/x HTTP/1.1\r\nhost: api.test\r\n\r\n",
    "a target of an asterisk": b"OPTIONS * HTTP/1.1\r\nhost: api.test\r\n\r\n",
    "a fragment": b"GET /v1/x#y HTTP/1.1\r\nhost: api.test\r\n\r\n",
    "a control character in the target": b"GET /v1/\x7fx HTTP/1.1\r\nhost: api.test\r\n\r\n",
    "a head that is too large": HEAD + b"x-one: " + b"a" * 65536 + b"\r\n\r\n",
    "a head that never ends": HEAD + b"x-one: " + b"a" * 70000,
    "TLS in the TLS": bytes.fromhex("1603010200010001fc0303") + bytes(64) + b"\r\n\r\n",
    "SSH": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_head_is_refused_and_the_connection_ended(
    tunnel: Connection, upstream: Upstream, case: str
) -> None:
    """What follows it could be read in two ways."""
    tunnel.send(MALFORMED[case])
    error = refused(tunnel.response(), "ambiguous_request")
    assert error["message"].startswith("The request can be read in more than one way: ")
    assert error["agent"] == "coder-1"
    if case not in {"a target of an asterisk", "no Host", "an empty Host", "a fragment"}:
        tunnel.send(HEAD + b"\r\n")
        assert tunnel.closed()
    assert upstream.connections == 0


def test_a_malformed_head_is_on_record(proxy: Proxy, upstream: Upstream) -> None:
    """Once, with the agent of the tunnel, and nothing that it sent."""
    tunnel = proxy.tunnel("api.test")
    tunnel.send(POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\nx-mark: geheim\r\n\r\n")
    request_id = refused(tunnel.response(), "ambiguous_request")["request_id"]
    (line,) = proxy.audit(id=request_id)
    assert (line["agent"], line["host"], line["verdict"], line["status"]) == ("coder-1", "api.test", "block", 400)
    assert "geheim" not in str(line)


def test_pipelined_requests_are_decided_one_by_one(proxy: Proxy, tunnel: Connection, upstream: Upstream) -> None:
    """The one in the middle is refused; the answers keep their order."""
    upstream.handler = lambda seen: Reply(body=seen.target.encode() + seen.body)
    blocked = b"POST /v2/no HTTP/1.1\r\nhost: api.test\r\ncontent-length: 4\r\n\r\nGET "
    tunnel.send(HEAD + b"\r\n" + blocked + POST + b"content-length: 3\r\n\r\nabc" + HEAD + b"\r\n")
    assert tunnel.response().body == b"/v1/x"
    refused(tunnel.response(), "no_rule")
    assert tunnel.response().body == b"/v1/xabc"
    assert tunnel.response().body == b"/v1/x"
    assert [seen.method for seen in upstream.seen] == ["GET", "POST", "GET"]


def test_nothing_is_read_behind_a_request_that_closes(tunnel: Connection, upstream: Upstream) -> None:
    """RFC 9112 section 9.6."""
    tunnel.send(HEAD + b"connection: close\r\n\r\n" + HEAD + b"\r\n")
    response = tunnel.response()
    assert (response.status, response.header("connection")) == (200, "close")
    assert tunnel.closed()
    assert len(upstream.seen) == 1
    assert upstream.seen[0].header("connection") == []


def test_pipelining_without_end_is_cut(tunnel: Connection, upstream: Upstream) -> None:
    """While the upstream thinks, a client cannot fill the proxy's memory with what comes next."""
    raw(upstream, hold=True)
    tunnel.send(HEAD + b"\r\n")
    wait_for(lambda: upstream.seen)
    tunnel.sock.settimeout(1)
    with pytest.raises(OSError):  # noqa: PT011  # a reset, a broken pipe, or nothing taken any more
        for _ in range(2000):
            tunnel.send(HEAD * 200)


def test_a_refused_request_with_a_small_body_keeps_the_connection(tunnel: Connection, upstream: Upstream) -> None:
    """Its body is read and dropped."""
    tunnel.send(b"POST /v2/x HTTP/1.1\r\nhost: api.test\r\ncontent-length: 5\r\n\r\nhello")
    response = tunnel.response()
    refused(response, "no_rule")
    assert response.header("connection") is None
    assert upstream.connections == 0
    assert works(tunnel, upstream)


@pytest.mark.parametrize("framing", ["content-length: 1000000000", "transfer-encoding: chunked"])
def test_a_refused_upload_is_answered_before_it_was_read(tunnel: Connection, upstream: Upstream, framing: str) -> None:
    """And the connection is closed, since the rest is still to come."""
    tunnel.send(f"POST /v2/x HTTP/1.1\r\nhost: api.test\r\n{framing}\r\n\r\n".encode() + b"1f\r\n" + b"x" * 31)
    response = tunnel.response()
    refused(response, "no_rule")
    assert response.header("connection") == "close"
    assert tunnel.closed()
    assert upstream.connections == 0


def test_the_answer_to_a_refused_upload_survives_what_is_still_being_sent(
    proxy: Proxy, tunnel: Connection, upstream: Upstream
) -> None:
    """A close with unread input would be a reset, and the client would never see why."""
    tunnel.send(b"POST /v2/x HTTP/1.1\r\nhost: api.test\r\ncontent-length: 2000000\r\n\r\n")
    for _ in range(20):
        tunnel.send(b"x" * 100_000)
    refused(tunnel.response(), "no_rule")
    assert tunnel.closed()


def test_expect_is_answered_here_and_a_refusal_comes_instead(tunnel: Connection, upstream: Upstream) -> None:
    """A client that waits for 100 Continue gets it, or a final answer, and never hangs."""
    tunnel.send(POST + b"content-length: 5\r\nexpect: 100-continue\r\n\r\n")
    assert tunnel.response().status == 100
    tunnel.send(b"hello")
    assert tunnel.response().status == 200
    assert upstream.seen[0].body == b"hello"
    assert upstream.seen[0].header("expect") == []
    upstream.reset()
    tunnel.send(b"POST /v2/x HTTP/1.1\r\nhost: api.test\r\ncontent-length: 5\r\nexpect: 100-continue\r\n\r\n")
    response = tunnel.response()
    refused(response, "no_rule")
    assert response.header("connection") == "close"
    assert upstream.connections == 0


def test_chunks_pass_both_ways_without_their_extensions_and_trailers(tunnel: Connection, upstream: Upstream) -> None:
    """An extension or a trailer is no part of what was decided."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"0\r\n\r\n")
        assert b"hello" in request, request
        assert not any(part in request.lower() for part in (b"x=y", b"x-mine", b"bearer")), request
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-end\r\n\r\n")
        writer.write(b"3;a=b\r\nabc\r\n0\r\nx-end: 1\r\nsallyport-x: 2\r\n\r\n")
        await upstream.exchange(reader, writer)

    upstream.raw = serve
    tunnel.send(POST + b"transfer-encoding: chunked\r\ntrailer: x-mine\r\n\r\n5;x=y\r\nhello\r\n6\r\n world\r\n")
    tunnel.send(b"0\r\nx-mine: 1\r\nauthorization: Bearer x\r\n\r\n")
    response = tunnel.response()
    assert (response.status, response.body) == (200, b"abc")
    assert works(tunnel, upstream)


@pytest.mark.parametrize(
    "body",
    [b"5\r\nhello!\r\n0\r\n\r\n", b"zz\r\n", b"-5\r\nhello\r\n", b"5 5\r\nhello\r\n", b"0\r\n" + b"a" * 200_000],
    ids=["longer than it says", "no number", "negative", "two sizes", "trailers without end"],
)
def test_a_malformed_chunk_ends_the_connection(tunnel: Connection, upstream: Upstream, body: bytes) -> None:
    """The upstream is never told that the request was complete."""
    tunnel.send(POST + b"transfer-encoding: chunked\r\n\r\n" + body)
    assert tunnel.closed()
    assert upstream.seen == []


def test_a_client_of_http_1_0_gets_what_it_understands(proxy: Proxy, upstream: Upstream) -> None:
    """No chunks, and the end of the connection for the end of the body."""
    upstream.handler = lambda _: Reply(chunks=[b"one ", b"two"])
    tunnel = proxy.tunnel("api.test")
    tunnel.send(b"GET /v1/x HTTP/1.0\r\nhost: api.test\r\n\r\n")
    response = tunnel.response()
    assert (response.body, response.header("transfer-encoding")) == (b"one two", None)
    assert response.header("connection") == "close"
    tunnel = proxy.tunnel("api.test")
    tunnel.send(b"GET /v1/x HTTP/1.0\r\nhost: api.test\r\nconnection: keep-alive\r\n\r\n")
    assert tunnel.response().body == b"one two"
    tunnel = proxy.tunnel("api.test")
    tunnel.send(b"GET /v2/x HTTP/1.0\r\nhost: api.test\r\n\r\n")
    refused(tunnel.response(), "no_rule")
    assert tunnel.closed()
    assert [seen.header("host") for seen in upstream.seen] == [["api.test"], ["api.test"]]


def test_answers_without_a_body_leave_the_connection_in_step(tunnel: Connection, upstream: Upstream) -> None:
    """HEAD, 204 and 304, whatever length they claim (RFC 9112 section 6.3)."""
    upstream.handler = lambda _: Reply(headers=[("content-length", "1000")], body=b"x" * 1000)
    tunnel.send(b"HEAD /v1/x HTTP/1.1\r\nhost: api.test\r\n\r\n")
    response = tunnel.response("HEAD")
    assert (response.status, response.header("content-length")) == (200, "1000")
    raw(upstream, b"HTTP/1.1 204 No Content\r\n\r\n", hold=True)
    for status in (b"204 No Content\r\n", b'304 Not Modified\r\netag: "x"\r\ncontent-length: 7\r\n'):
        upstream.reset()
        upstream.handler = lambda _, head=status: Reply(raw=b"HTTP/1.1 " + head + b"\r\n")  # type: ignore[misc]
        tunnel.send(HEAD + b"\r\n")
        assert tunnel.response().status == int(status[:3])
    assert works(tunnel, upstream)


def test_a_body_that_ends_with_the_connection_is_framed(tunnel: Connection, upstream: Upstream) -> None:
    """The client can tell it from one that was cut, and its own connection lives on."""
    raw(upstream, b"HTTP/1.1 200 OK\r\n\r\n", b"one ", b"two")
    tunnel.send(HEAD + b"\r\n")
    response = tunnel.response()
    assert (response.body, response.header("transfer-encoding")) == (b"one two", "chunked")
    assert works(tunnel, upstream)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nonly this",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\n",
    ],
    ids=["length", "chunks", "bad chunk"],
)
@pytest.mark.parametrize("path", ["/v1/x", "/keyed/x"])
def test_a_body_that_was_cut_short_looks_so(proxy: Proxy, upstream: Upstream, answer: bytes, path: str) -> None:
    """The client sees an end that is no end; the exchange is on record once."""
    tunnel = proxy.tunnel("api.test")
    raw(upstream, answer)
    target = f"{path}/{len(answer)}"
    tunnel.send(f"GET {target} HTTP/1.1\r\nhost: api.test\r\n\r\n".encode())
    with pytest.raises(ConnectionError):
        tunnel.response()
    assert [line["status"] for line in proxy.audit(path=target)] == [200]


NO_ANSWER = {
    "nothing": b"",
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n\r\n" + SECRET.encode(),
    "half a head": b"HTTP/1.1 200 OK\r\nx-echo: " + SECRET.encode(),
    "a head that is too large": b"HTTP/1.1 200 OK\r\nx: " + b"a" * 300_000,
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok!",
    "both lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "a coding that is not chunked": b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "101 that nobody asked for": b"HTTP/1.1 101 X\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
    "101 with two spaces": b"HTTP/1.1  101 X\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
    "a flood of 1xx": b"HTTP/1.1 103 X\r\nlink: <a>\r\n\r\n" * 40 + OK,
    "a status below 100": b"HTTP/1.1 42 X\r\n\r\n",
}


@pytest.mark.parametrize("case", NO_ANSWER)
def test_an_answer_that_is_none_is_a_bad_gateway(proxy: Proxy, upstream: Upstream, case: str) -> None:
    """Said in our words, with nothing of what the upstream sent; the connection can be used again."""
    tunnel = proxy.tunnel("api.test")
    raw(upstream, NO_ANSWER[case])
    tunnel.send(b"GET /keyed/x HTTP/1.1\r\nhost: api.test\r\nsec-websocket-version: 13\r\n\r\n")
    response = tunnel.response()
    refused(response, "upstream_unreachable")
    assert SECRET not in str(response)
    assert len(upstream.seen) == 1
    assert works(tunnel, upstream)


@pytest.mark.parametrize("end", [b"\r\n", b"\n"], ids=["CRLF", "LF"])
def test_interim_answers_are_skipped(tunnel: Connection, upstream: Upstream, end: bytes) -> None:
    """103 Early Hints and an unasked 100 are no final answers, in whichever line ends they come."""
    hints = b"HTTP/1.1 103 Early Hints" + end + b"link: </a>" + end + end
    raw(upstream, b"HTTP/1.1 100 Continue" + end + end, hints, hints, b"HTTP/1.1 102 X" + end + end + OK, hold=True)
    tunnel.send(HEAD + b"\r\n")
    response = tunnel.response()
    assert (response.status, response.body, response.header("link")) == (200, b"ok", None)
    assert works(tunnel, upstream)


def test_an_answer_before_the_body_was_read_arrives(proxy: Proxy, tunnel: Connection, upstream: Upstream) -> None:
    """The upstream says 413 and hangs up while the client is still sending."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(1000)  # what comes after a close is answered by a reset, which takes the answer away
        writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\nconnection: close\r\n\r\nno!")
        await writer.drain()

    upstream.raw = serve
    tunnel.send(b"POST /v1/early HTTP/1.1\r\nhost: api.test\r\ncontent-length: 1000000\r\n\r\n" + b"x" * 1000)
    response = tunnel.response()
    assert (response.status, response.body) == (413, b"no!")
    assert tunnel.closed()
    assert [line["status"] for line in proxy.audit(path="/v1/early")] == [413]


def test_a_header_from_the_upstream_cannot_split_the_answer(tunnel: Connection, upstream: Upstream) -> None:
    """Folded lines and bare carriage returns become spaces."""
    raw(upstream, b"HTTP/1.1 200 OK\r\nx-one: a\r\n b\r\nx-two: c\rd: e\r\ncontent-length: 2\r\n\r\nok")
    tunnel.send(HEAD + b"\r\n")
    response = tunnel.response()
    assert (response.header("x-one"), response.header("x-two")) == ("a  b", "c d: e")
    assert response.body == b"ok"


def test_headers_of_one_hop_stop_here(tunnel: Connection, upstream: Upstream) -> None:
    """And the names of ours do not come from upstreams."""
    hop = [("keep-alive", "timeout=5"), ("upgrade", "h2c"), ("alt-svc", 'h3=":443"'), ("proxy-authenticate", "Basic")]
    upstream.handler = lambda _: Reply(headers=[*hop, ("sallyport-decision", "allow"), ("x-mine", "1")], body=b"ok")
    tunnel.send(HEAD + b"connection: x-hop\r\nx-hop: 1\r\nte: trailers\r\nkeep-alive: 5\r\n\r\n")
    response = tunnel.response()
    assert [response.header(name) for name, _ in hop] == [None] * len(hop)
    assert (response.header("sallyport-decision"), response.header("x-mine")) == (None, "1")
    assert [upstream.seen[0].header(name) for name in ("x-hop", "te", "keep-alive", "connection")] == [[]] * 4


@pytest.mark.parametrize("method", ["TRACE", "trace", "CONNECT"])
def test_methods_that_are_never_forwarded(tunnel: Connection, upstream: Upstream, method: str) -> None:
    """TRACE would echo an injected credential; a CONNECT in a tunnel would be a way around it."""
    target = "api.test:443" if method == "CONNECT" else "/keyed/x"
    tunnel.send(f"{method} {target} HTTP/1.1\r\nhost: api.test\r\n\r\n".encode())
    response = tunnel.response()
    if method == "CONNECT":
        assert response.status in (400, 403)
    else:
        refused(response, "protocol_not_allowed")
    assert upstream.connections == 0


def test_a_lower_case_method_is_the_same_method(tunnel: Connection, upstream: Upstream) -> None:
    """What was matched is what is sent."""
    tunnel.send(b"get /v1/x HTTP/1.1\r\nhost: api.test\r\n\r\n")
    assert tunnel.response().status == 200
    assert upstream.seen[0].method == "GET"


def test_an_upgrade_to_cleartext_http_2_is_refused(proxy: Proxy, plain_upstream: Upstream) -> None:
    """It would smuggle requests past the rules."""
    connection = proxy.connect()
    connection.send(
        f"GET http://api.test/v1/x HTTP/1.1\r\nhost: api.test\r\n{proxy.auth('coder-1')}"
        "connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n\r\n".encode()
    )
    refused(connection.response(), "protocol_not_allowed")
    assert plain_upstream.connections == 0


def test_the_end_of_a_tunnel_is_announced(proxy: Proxy, upstream: Upstream) -> None:
    """With close_notify: clients that insist on it would take the last answer for cut off (RFC 8446 section 6.1)."""
    tunnel = proxy.tunnel("api.test")
    tunnel.send(HEAD + b"connection: close\r\n\r\n")
    assert tunnel.response().status == 200
    assert isinstance(tunnel.sock, ssl.SSLSocket)
    tunnel.sock.suppress_ragged_eofs = False
    assert tunnel.sock.recv(10) == b""


def test_an_upstream_that_comes_back_is_used_again(proxy: Proxy, tunnel: Connection, upstream: Upstream) -> None:
    """A failure is of one request, not of the connection it came by."""
    raw(upstream, b"")
    for _ in range(3):
        tunnel.send(HEAD + b"\r\n")
        refused(tunnel.response(), "upstream_unreachable")
    assert works(tunnel, upstream)


def test_a_client_that_leaves_is_no_failure_of_the_upstream(proxy: Proxy, upstream: Upstream) -> None:
    """The record says neither that the upstream failed nor that it answered."""
    raw(upstream, hold=True)
    tunnel = proxy.tunnel("api.test")
    tunnel.send(b"GET /v1/left HTTP/1.1\r\nhost: api.test\r\n\r\n")
    wait_for(lambda: upstream.seen)
    tunnel.close()
    (line,) = proxy.audit(path="/v1/left")
    assert (line["verdict"], line["reason"], line["status"]) == ("allow", "allowed", None)
