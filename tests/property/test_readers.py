"""The fast lane's reader and mitmproxy's, as it was made strict: what one refuses the other does not take, and what
both take they read alike."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st
from mitmproxy.connection import Client, ConnectionState
from mitmproxy.options import Options
from mitmproxy.proxy import commands, events
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layers.http._base import ReceiveHttp
from mitmproxy.proxy.layers.http._events import RequestData, RequestEndOfMessage, RequestHeaders

from proxy.http1 import BadMessage, Body, parse_request
from proxy.strict1 import StrictServer
from tests.property.test_http1 import BODIES, LIMIT, REQUESTS

OPTIONS = Options()
OPTIONS.add_option("tcp_timeout", int, 300, "")
OPTIONS.add_option("validate_inbound_headers", bool, True, "")


@dataclass
class Read:
    """What a reader made of bytes: the head, the payload, and whether that ended or was refused."""

    method: bytes = b""
    target: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""
    done: bool = False
    refused: bool = field(default=False, compare=False)


def by_the_lane(data: bytes) -> Read | None:
    buffer = bytearray(data)
    try:
        head = parse_request(buffer, LIMIT)
    except BadMessage:
        return Read(refused=True)
    if head is None:
        return None
    read, body = Read(head.method, head.target, head.headers), Body(head.length)
    try:
        read.body = body.take(buffer) if not body.done else b""
        read.done = body.done
    except BadMessage:
        read.refused = True
    return read


def by_the_stack(data: bytes) -> Read | None:
    client = Client(peername=("192.0.2.1", 1), sockname=("192.0.2.2", 2), state=ConnectionState.OPEN)
    read = Read()
    server = StrictServer(Context(client, OPTIONS), LIMIT, lambda *_: b"refused")
    for event in (events.Start(), events.DataReceived(client, data)):
        for command in server.handle_event(event):
            match command:
                case ReceiveHttp(event=RequestHeaders(request=request)):
                    origin = b"%b://%b" % (request.data.scheme, request.data.authority) if request.data.scheme else b""
                    read.method, read.headers = request.data.method, request.data.headers.fields
                    connect = read.method == b"CONNECT"
                    read.target = request.data.authority if connect else origin + request.data.path
                case ReceiveHttp(event=RequestData(data=part)):
                    read.body += part
                case ReceiveHttp(event=RequestEndOfMessage()):
                    read.done = True
                case commands.SendData() | commands.CloseConnection():
                    read.refused = True
    return read if read.method or read.refused else None


def assert_alike(data: bytes) -> None:
    lane, stack = by_the_lane(data), by_the_stack(data)
    if lane is None or not lane.method:
        assert stack is None or not stack.method
    elif stack is not None and stack.method:
        assert (stack.method, stack.headers) == (lane.method, lane.headers)
        assert stack.target.lower() == lane.target.lower()
        assert not (stack.done and lane.refused)
        if not lane.refused and not stack.refused and lane.method != b"CONNECT":
            assert (stack.body, stack.done) == (lane.body, lane.done)


@given(REQUESTS, BODIES | st.binary(max_size=8))
def test_a_request_is_the_same_on_both_lanes(head: bytes, body: bytes) -> None:
    assert_alike(head + body)


@given(
    st.sampled_from([b"GET / HTTP/1.1\r\nhost: a\r\n", b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n"]), BODIES
)
def test_so_it_is_where_only_little_is_odd(head: bytes, rest: bytes) -> None:
    assert_alike(head + rest)


@given(st.binary(max_size=60))
def test_so_it_is_whatever_the_bytes(data: bytes) -> None:
    assert_alike(data)


def test_both_read_what_is_sound() -> None:
    """Else there would be nothing to compare."""
    sound = b"POST /a?b HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nhi"
    expected = Read(b"POST", b"/a?b", ((b"host", b"a"), (b"content-length", b"2")), b"hi", done=True)
    assert by_the_lane(sound) == by_the_stack(sound) == expected
