"""Whatever the fast lane's reader accepts, h11 accepts and reads the same way, however it arrives.

The differences that are meant: h11 wants a Host in HTTP/1.1 (RFC 9110 section 7.2; the addon decides about that), no
empty line before a request, and puts several equal Content-Lengths together. In responses, where h11 joins folded lines
by one space we do by two, and a bare CR, which h11 refuses, is a space (RFC 9112 section 2.2).
"""

from __future__ import annotations

import re
from collections.abc import Callable

import h11
from hypothesis import given
from hypothesis import strategies as st

from proxy.http1 import BadMessage, Body, RequestHead, ResponseHead, parse_request, parse_response

LIMIT = 4096
NAMES = st.sampled_from(
    [b"Host", b"Content-Length", b"content-length", b"Transfer-Encoding", b"Connection", b"Expect", b"X", b"X ", b""]
)
VALUES = st.sampled_from(
    [b"", b"0", b"5", b"05", b"5,5", b"chunked", b"Chunked", b"gzip, chunked", b"close", b"a, Close", b"100-continue"]
) | st.text(" \t\x00\x0b\x0c\r\n\x1cab\x7f\x85\xa0\xff", max_size=5).map(lambda text: text.encode("latin-1"))
SPACES = st.sampled_from([b"", b" ", b"\t ", b"\x0b"])
ENDS = st.sampled_from([b"\r\n"] * 12 + [b"\n", b"\r", b"\r\n ", b"\r\n\r\n"])
FIELDS = st.lists(st.tuples(NAMES, st.just(b":"), SPACES, VALUES, SPACES, ENDS).map(b"".join), max_size=4).map(b"".join)
REQUEST_LINES = st.sampled_from(
    [b"GET / HTTP/1.1", b"HEAD /a?b HTTP/1.0", b"POST http://a.test/ HTTP/1.1", b"CONNECT a:443 HTTP/1.1", b"G@T / x"]
)
STATUS_LINES = st.tuples(
    st.sampled_from([b"HTTP/1.1 ", b"HTTP/1.0 ", b"HTTP/1.2 ", b" HTTP/1.1 "]),
    st.sampled_from([b"200", b"204", b"304", b"404", b"100", b"103", b"999", b"99", b"+20"]),
    st.sampled_from([b"", b" ", b" OK", b"  O K ", b" \xff", b" \x0b", b"OK"]),
).map(b"".join)
METHODS = st.sampled_from([b"GET", b"HEAD", b"POST"])
CHUNK_LINES = st.sampled_from(
    [b"1", b"3", b"5", b"0", b"00", b"a", b"A ", b"3;x", b"3 ;x", b"3;x\t ", b"-1", b"0x3", b""]
)
CHUNKS = st.lists(st.tuples(CHUNK_LINES, ENDS, st.binary(max_size=5) | st.just(b"abc"), ENDS).map(b"".join), max_size=4)
BODIES = st.tuples(CHUNKS.map(b"".join), st.sampled_from([b"0\r\n", b""]), FIELDS, st.just(b"\r\n")).map(b"".join)


def heads(lines: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Mostly almost right."""
    return st.tuples(lines, ENDS, FIELDS, st.just(b"\r\n")).map(b"".join)


REQUESTS, RESPONSES = heads(REQUEST_LINES), heads(STATUS_LINES)


def fields_as_h11_has_them(headers: tuple[tuple[bytes, bytes], ...]) -> list[tuple[bytes, bytes]]:
    """Names in lower case, codings too, an equal length once."""
    fields: list[tuple[bytes, bytes]] = []
    for name, value in ((name.lower(), value) for name, value in headers):
        if name != b"content-length" or (name, value) not in fields:
            fields.append((name, value.lower() if name == b"transfer-encoding" else value))
    return fields


def drained(connection: h11.Connection) -> tuple[bytes, bool]:
    """The payload h11 finds, and whether the message ended."""
    payload = b""
    while isinstance(event := connection.next_event(), h11.Data):
        payload += event.data
    return payload, isinstance(event, h11.EndOfMessage)


def taken(body: Body, pieces: list[bytes]) -> tuple[bytes, bool, bytes]:
    """The payload of pieces that arrive one after the other, whether it ended, and what is left behind it."""
    buffer, payload = bytearray(), b""
    for piece in pieces:
        buffer += piece
        if not body.done:
            payload += body.take(buffer)
    return payload, body.done, bytes(buffer)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted(place % (len(data) + 1) for place in places)
    return [data[start:end] for start, end in zip([0, *ends], [*ends, len(data)], strict=True)]


def assert_body(connection: h11.Connection, length: int | None, data: bytes) -> None:
    """What is behind a head is one body to both, and what is behind that is nobody's."""
    if data:  # no data is an end to h11
        connection.receive_data(data)
    body = Body(length)
    try:
        payload, done, rest = taken(body, [data])
    except BadMessage:
        return
    assert drained(connection) == (payload, done)
    if done:
        assert connection.trailing_data[0] == rest


def read_request(data: bytes) -> tuple[RequestHead, bytes] | None:
    buffer = bytearray(data)
    try:
        head = parse_request(buffer, LIMIT)
    except BadMessage:
        return None
    return (head, bytes(buffer)) if head else None


def assert_request(data: bytes) -> None:
    found = read_request(data)
    if not found:
        return
    head, rest = found
    assert read_request(head.raw) == (head, b"")
    raw = data[: len(data) - len(rest)]
    while raw.startswith(b"\r\n"):
        raw = raw[2:]
    headers = head.headers
    if head.version == b"HTTP/1.1" and not any(name.lower() == b"host" for name, _ in headers):
        raw = raw[:-2] + b"host: a.test\r\n\r\n"
        headers += ((b"host", b"a.test"),)
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=2 * LIMIT)
    connection.receive_data(raw)
    event = connection.next_event()
    assert isinstance(event, h11.Request)
    assert (event.method, event.target, b"HTTP/" + event.http_version) == (head.method, head.target, head.version)
    assert list(event.headers) == fields_as_h11_has_them(headers)
    assert connection.client_is_waiting_for_100_continue == (head.expect and head.version == b"HTTP/1.1")
    assert_body(connection, head.length, rest)


@given(REQUESTS, BODIES | st.binary(max_size=8))
def test_h11_reads_an_accepted_request_the_same_way(head: bytes, body: bytes) -> None:
    assert_request(head + body)


@given(
    st.sampled_from([b"GET / HTTP/1.1\r\nhost: a\r\n", b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n"]), BODIES
)
def test_so_it_does_where_only_little_is_odd(head: bytes, rest: bytes) -> None:
    assert_request(head + rest)


@given(st.binary(max_size=60))
def test_so_it_does_whatever_the_bytes(data: bytes) -> None:
    assert_request(data)


def read_response(data: bytes, method: bytes) -> tuple[ResponseHead, bytes] | None:
    buffer = bytearray(data)
    try:
        head = parse_response(buffer, method, LIMIT)
    except BadMessage:
        return None
    return (head, bytes(buffer)) if head else None


def assert_response(data: bytes, method: bytes) -> None:
    """A 101 is left out: who reads it gives up, as no upgrade is asked for in the fast lane."""
    found = read_response(data, method)
    if not found or found[0].status == 101:
        return
    head, rest = found
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=2 * LIMIT)
    connection.send(h11.Request(method=method, target="/", headers=[("host", "a.test")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(re.sub(rb"\r(?!\n)", b" ", data[: len(data) - len(rest)]))
    event = connection.next_event()
    assert isinstance(event, h11.InformationalResponse if head.status < 200 else h11.Response)
    assert (event.status_code, b"HTTP/" + event.http_version) == (head.status, head.version)
    assert event.reason == head.phrase
    spaced = [(name, re.sub(rb"[ \t]+", b" ", value)) for name, value in fields_as_h11_has_them(head.headers)]
    assert [(name, re.sub(rb"[ \t]+", b" ", value)) for name, value in event.headers] == spaced
    if head.status >= 200:
        assert_body(connection, head.length, rest)
        if head.keep_alive:  # where they differ, it is we who close
            assert connection.their_state is not h11.MUST_CLOSE


@given(RESPONSES, METHODS, BODIES | st.binary(max_size=8))
def test_h11_reads_an_accepted_response_the_same_way(head: bytes, method: bytes, body: bytes) -> None:
    assert_response(head + body, method)


@given(st.sampled_from([b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"]), BODIES)
def test_so_it_does_where_only_little_of_it_is_odd(head: bytes, rest: bytes) -> None:
    assert_response(head + rest, b"GET")


@given(st.binary(max_size=60), METHODS)
def test_so_it_does_whatever_the_bytes_of_it(data: bytes, method: bytes) -> None:
    assert_response(data, method)


def outcome(length: int | None, pieces: list[bytes]) -> tuple[bytes, bool, bytes] | None:
    try:
        return taken(Body(length), pieces)
    except BadMessage:
        return None


@given(st.none() | st.integers(-1, 9), BODIES | st.binary(max_size=30), st.lists(st.integers(0, 200), max_size=6))
def test_however_a_body_arrives_it_is_the_same(length: int | None, data: bytes, places: list[int]) -> None:
    assert outcome(length, cut(data, places)) == outcome(length, [data])


@given(st.none() | st.integers(0, 9), st.lists(st.binary(max_size=5), max_size=5), st.binary(max_size=9))
def test_a_body_that_was_written_is_read(length: int | None, parts: list[bytes], behind: bytes) -> None:
    """And nothing behind it is touched."""
    payload = b"".join(parts)
    if length is None:
        data = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts if part) + b"0\r\n\r\n"
        assert outcome(None, [data + behind]) == (payload, True, behind)
    else:
        assert outcome(len(payload), [payload + behind]) == (payload, True, behind)


def read_all(pieces: list[bytes], parse: Callable[[bytearray], object]) -> list[object]:
    """Every head that is read while the pieces of a connection arrive, and `refused` where one was."""
    buffer = bytearray()
    found: list[object] = []
    for piece in pieces:
        buffer += piece
        try:
            while head := parse(buffer):
                found.append(head)
        except BadMessage:
            return [*found, "refused"]
    return [*found, bytes(buffer)]


@given(st.lists(REQUESTS, max_size=3).map(b"".join), st.lists(st.integers(0, 400), max_size=6))
def test_however_requests_arrive_they_are_the_same(data: bytes, places: list[int]) -> None:
    """Behind one another too."""

    def parse(buffer: bytearray) -> object:
        return parse_request(buffer, LIMIT)

    assert read_all(cut(data, places), parse) == read_all([data], parse)


@given(st.lists(RESPONSES, max_size=3).map(b"".join), METHODS, st.lists(st.integers(0, 400), max_size=6))
def test_however_responses_arrive_they_are_the_same(data: bytes, method: bytes, places: list[int]) -> None:
    def parse(buffer: bytearray) -> object:
        return parse_response(buffer, method, LIMIT)

    assert read_all(cut(data, places), parse) == read_all([data], parse)


@given(st.lists(REQUESTS.filter(read_request), min_size=1, max_size=4))
def test_requests_behind_one_another_are_read_one_by_one(messages: list[bytes]) -> None:
    whole = [found for found in map(read_request, messages) if found and not found[1]]
    data = b"".join(head.raw for head, _ in whole)
    assert read_all([data], lambda buffer: parse_request(buffer, LIMIT)) == [*(head for head, _ in whole), b""]
