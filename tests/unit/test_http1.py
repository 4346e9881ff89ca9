"""HTTP/1.1 messages taken out of a buffer. That h11 reads what is accepted the same way: tests/property."""

from __future__ import annotations

import contextlib
import time
from itertools import pairwise

import pytest

from proxy.http1 import (
    LAST_CHUNK,
    MAX_CHUNK_LINE,
    MAX_TRAILERS,
    BadMessage,
    Body,
    RequestHead,
    ResponseHead,
    chunk,
    parse_request,
    parse_response,
    request_bytes,
    response_bytes,
)

LIMIT = 65536
GET = b"GET /a?b HTTP/1.1\r\nHost: a.test\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 5\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"


def request(data: bytes) -> RequestHead:
    buffer = bytearray(data)
    head = parse_request(buffer, LIMIT)
    assert head
    assert not buffer
    return head


def response(data: bytes, method: bytes = b"GET") -> ResponseHead:
    buffer = bytearray(data)
    head = parse_response(buffer, method, LIMIT)
    assert head
    assert not buffer
    return head


# Requests


def test_a_request_is_read() -> None:
    head = request(b"GET /a?b HTTP/1.1\r\nHost: a.test\r\nX-A:\t b  c \t\r\nx-a:\r\n\r\n")
    assert (head.method, head.target, head.version) == (b"GET", b"/a?b", b"HTTP/1.1")
    assert head.headers == ((b"Host", b"a.test"), (b"X-A", b"b  c"), (b"x-a", b""))
    assert (head.length, head.upgrade, head.expect) == (0, False, False)


def test_it_is_kept_as_it_came() -> None:
    """Whom it is handed over to reads the same bytes."""
    assert request(POST).raw == POST


def test_empty_lines_before_a_request_are_no_part_of_it() -> None:
    """RFC 9112 section 2.2. h11 refuses them."""
    assert request(b"\r\n\r\n\r\n" + GET).raw == GET


@pytest.mark.parametrize(
    ("field", "length"),
    [
        (b"Content-Length: 0", 0),
        (b"CONTENT-LENGTH:12 ", 12),
        (b"transfer-encoding: Chunked", None),
        (b"Content-Lengths: 3", 0),
        (b"Transfer-Encodings: gzip", 0),
    ],
)
def test_the_length_of_a_body_is_told(field: bytes, length: int | None) -> None:
    assert request(b"POST / HTTP/1.1\r\n" + field + b"\r\n\r\n").length == length


@pytest.mark.parametrize(("field", "upgrade"), [(b"UPGRADE: websocket", True), (b"Upgraded: yes", False)])
def test_an_upgrade_is_told(field: bytes, upgrade: bool) -> None:
    assert request(b"GET / HTTP/1.1\r\n" + field + b"\r\n\r\n").upgrade is upgrade


@pytest.mark.parametrize(("value", "expect"), [(b"100-Continue", True), (b"nothing", False), (b"", False)])
def test_an_expectation_is_told(value: bytes, expect: bool) -> None:
    assert request(b"POST / HTTP/1.1\r\nExpect: " + value + b"\r\n\r\n").expect is expect


def test_requests_behind_one_another_are_read_one_by_one() -> None:
    """What is behind a message stays as it is."""
    buffer = bytearray(GET + POST + b"hello" + GET[:7])
    first, second = parse_request(buffer, LIMIT), parse_request(buffer, LIMIT)
    assert first
    assert second
    assert (first.raw, second.raw, bytes(buffer)) == (GET, POST, b"hello" + GET[:7])
    body = Body(second.length)
    assert (body.take(buffer), body.done) == (b"hello", True)
    assert parse_request(buffer, LIMIT) is None
    assert bytes(buffer) == GET[:7]


@pytest.mark.parametrize("end", range(len(POST)))
def test_an_incomplete_request_is_waited_for(end: int) -> None:
    buffer = bytearray(POST[:end])
    assert parse_request(buffer, LIMIT) is None
    assert bytes(buffer) == POST[:end]


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\n\n", b"GET / HTTP/1.1\r\nA: b\n\r\n", b"G\n", b"\n", b"\r\n\n"])
def test_a_bare_line_feed_is_not_waited_on(data: bytes) -> None:
    """No empty line would ever end such a head, and the client would wait for the time-out."""
    with pytest.raises(BadMessage):
        parse_request(bytearray(data), LIMIT)


def test_a_head_has_a_bound() -> None:
    """To the byte, whether its end came already or not."""
    assert parse_request(bytearray(GET), len(GET))
    for data in (GET, GET[:-1]):
        with pytest.raises(BadMessage, match=f"larger than {len(GET) - 1} bytes"):
            parse_request(bytearray(data), len(GET) - 1)


def test_a_problem_quotes_nothing() -> None:
    for data in (b"GET /geheim\x00 HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nA: geheim\x00\r\n\r\n"):
        with pytest.raises(BadMessage) as caught:
            parse_request(bytearray(data), LIMIT)
        assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    "field",
    [
        b"A: b" + b" " * 60000 + b"c",
        b"A:" + b" " * 60000,
        b"A: " + b"b " * 30000,
        b"A: b" + b"\t" * 60000 + b"\x00",
        b"A" * 60000,
        b"A:b\r\n" * 12000,
        b"A: b \r\n" * 8000 + b"\x00",
    ],
)
def test_no_head_takes_long(field: bytes) -> None:
    """Linear in its length."""
    started = time.process_time()
    for parse in (parse_request, lambda buffer, limit: parse_response(buffer, b"GET", limit)):
        for line in (b"GET / HTTP/1.1\r\n", b"HTTP/1.1 200 OK\r\n"):
            with contextlib.suppress(BadMessage):
                parse(bytearray(line + field + b"\r\n\r\n"), LIMIT)
    assert time.process_time() - started < 0.5


# Responses


def test_a_response_is_read() -> None:
    head = response(b"HTTP/1.1 404 Not  Found \r\nServer: a b\t\r\nContent-Length: 3\r\n\r\n")
    assert (head.version, head.status, head.phrase) == (b"HTTP/1.1", 404, b"Not  Found ")
    assert head.headers == ((b"Server", b"a b"), (b"Content-Length", b"3"))
    assert (head.length, head.keep_alive) == (3, True)


@pytest.mark.parametrize("line", [b"HTTP/1.1 200", b"HTTP/1.1 200 ", b"HTTP/1.1 200 \xfcber"])
def test_a_phrase_may_be_missing_or_odd(line: bytes) -> None:
    assert response(line + b"\r\n\r\n").phrase == line[13:]


@pytest.mark.parametrize(
    ("head", "length", "keep_alive"),
    [
        (b"HTTP/1.1 200 OK\r\n", -1, False),
        (b"HTTP/1.0 200 OK\r\n", -1, False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n", 2, False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n", 2, True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\ncontent-length: 2\r\n", 2, True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: CHUNKED\r\n", None, True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: Close\r\n", 2, False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: x\r\nConnection: y, close\r\n", 2, False),
    ],
)
def test_where_a_response_ends_is_told(head: bytes, length: int | None, keep_alive: bool) -> None:
    """RFC 9112 sections 6.3 and 9.3; what was HTTP/1.0 is not kept."""
    found = response(head + b"\r\n")
    assert (found.length, found.keep_alive) == (length, keep_alive)


@pytest.mark.parametrize("field", [b"Content-Length: 9\r\n", b"Transfer-Encoding: chunked\r\n", b""])
@pytest.mark.parametrize(
    ("status", "method"), [(b"100", b"GET"), (b"204", b"GET"), (b"304", b"GET"), (b"200", b"HEAD")]
)
def test_some_responses_never_have_a_body(status: bytes, method: bytes, field: bytes) -> None:
    found = response(b"HTTP/1.1 " + status + b" x\r\n" + field + b"\r\n", method)
    assert (found.length, found.keep_alive) == (0, True)


BAD_RESPONSES = {
    "another protocol": b"SSH-2.0-OpenSSH\r\n\r\n",
    "another version": b"HTTP/2 200 OK\r\n\r\n",
    "an empty line first": b"\r\n" + OK,
    "a status of two digits": b"HTTP/1.1 20 OK\r\n\r\n",
    "a status below 100": b"HTTP/1.1 099 OK\r\n\r\n",
    "a control character in the phrase": b"HTTP/1.1 200 O\x0bK\r\n\r\n",
    "a space before a colon": b"HTTP/1.1 200 OK\r\nContent-Length : 5\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
    "two spellings of a length": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 05\r\n\r\n",
    "a list of lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\n",
    "a negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
    "a length of nothing": b"HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\n",
    "a huge length": b"HTTP/1.1 200 OK\r\nContent-Length: 9999999999999999999\r\n\r\n",
    "both lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    "another coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    "chunked twice": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
    "a head that is too large": b"HTTP/1.1 200 OK\r\nA: " + b"b" * LIMIT + b"\r\n\r\n",
    "a head that never ends": b"HTTP/1.1 200 OK\r\nA: " + b"b" * LIMIT,
}


@pytest.mark.parametrize("case", BAD_RESPONSES)
def test_a_bad_response_is_refused_at_once(case: str) -> None:
    """It would split a connection that others use after it."""
    with pytest.raises(BadMessage, match="answer"):
        parse_response(bytearray(BAD_RESPONSES[case]), b"GET", LIMIT)


def test_responses_behind_one_another_are_read_one_by_one() -> None:
    buffer = bytearray(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK + b"hello" + OK)
    assert [head.status for head in (parse_response(buffer, b"GET", LIMIT) for _ in range(2)) if head] == [103, 200]
    body = Body(5)
    assert body.take(buffer) == b"hello"
    assert bytes(buffer) == OK


@pytest.mark.parametrize("end", range(len(OK)))
def test_an_incomplete_response_is_waited_for(end: int) -> None:
    buffer = bytearray(OK[:end])
    assert parse_response(buffer, b"GET", LIMIT) is None
    assert bytes(buffer) == OK[:end]


# Bodies


def take(body: Body, *parts: bytes, rest: bytes = b"") -> bytes:
    """The payload of all parts; `rest` is what must be left of them."""
    buffer, found = bytearray(), b""
    for part in parts:
        buffer += part
        found += body.take(buffer)
    assert bytes(buffer) == rest
    return found


def test_a_body_of_a_length_ends_there() -> None:
    body = Body(5)
    assert take(body, b"he", b"", b"llo world", rest=b" world") == b"hello"
    assert body.done
    body.end()


def test_a_body_of_no_length_is_over_before_it_began() -> None:
    body = Body(0)
    assert body.done
    assert take(body, b"GET", rest=b"GET") == b""


def test_a_body_until_the_end_lasts_until_the_end() -> None:
    body = Body(-1)
    assert take(body, b"he", b"llo") == b"hello"
    assert not body.done
    body.end()
    assert body.done


@pytest.mark.parametrize("length", [5, None])
def test_a_body_that_is_cut_short_is_no_body(length: int | None) -> None:
    body = Body(length)
    take(body, b"4\r\n")
    with pytest.raises(BadMessage, match="cut short"):
        body.end()


CHUNKED = b"5;x=y\r\nhello\r\n006 \r\n world\r\n0\r\nX-Sum: 1\r\nY: 2 \r\n\r\n"


def test_chunks_are_joined_and_trailers_dropped() -> None:
    body = Body(None)
    assert take(body, CHUNKED + b"GET /", rest=b"GET /") == b"hello world"
    assert body.done


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_chunks_in_small_pieces_are_the_same(size: int) -> None:
    cuts = [*range(0, len(CHUNKED), size), len(CHUNKED)]
    body = Body(None)
    assert take(body, *(CHUNKED[start:end] for start, end in pairwise(cuts))) == b"hello world"
    assert body.done


def test_what_arrived_of_a_chunk_is_not_held_back() -> None:
    """An event stream stays live."""
    body = Body(None)
    assert take(body, b"10\r\ndata: 1") == b"data: 1"


BAD_CHUNKS = {
    "no size": b"\r\n",
    "a signed size": b"+5\r\nhello\r\n",
    "a size with a prefix": b"0x5\r\nhello\r\n",
    "a size with an underscore": b"1_0\r\n",
    "a size in other digits": b"\xd9\xa5\r\n",
    "a space before the size": b" 5\r\nhello\r\n",
    "a space before an extension": b"5 ;x\r\nhello\r\n",
    "a huge size": b"1000000000000000\r\n",
    "a bare line feed behind the size": b"5\nhello\r\n",
    "a carriage return in an extension": b"5;a\rb\r\nhello\r\n",
    "an extension that never ends": b"5;" + b"a" * MAX_CHUNK_LINE,
    "data longer than its size": b"5\r\nhello!\r\n",
    "bare line feeds behind the data": b"5\r\nhello\n\n",
    "a malformed trailer": b"0\r\nA b\r\n\r\n",
    "a folded trailer": b"0\r\nA: b\r\n c\r\n\r\n",
    "a trailer that frames": b"0\r\nContent-Length: 5\r\n\r\n",
    "trailers without an end": b"0\r\n" + b"A: b\r\n" * (MAX_TRAILERS // 6 + 1),
}


@pytest.mark.parametrize("case", BAD_CHUNKS)
def test_bad_chunks_are_refused(case: str) -> None:
    with pytest.raises(BadMessage):
        Body(None).take(bytearray(BAD_CHUNKS[case]))


# Writing


def test_what_is_written_is_read_again() -> None:
    fields = ((b"Host", b"a.test"), (b"X", b""))
    head = request(request_bytes(b"PUT", b"/", fields))
    assert (head.method, head.target, head.headers) == (b"PUT", b"/", fields)
    found = response(response_bytes(299, b"All right", fields))
    assert (found.status, found.phrase, found.headers) == (299, b"All right", fields)


def test_chunks_that_are_written_are_read_again() -> None:
    data = bytes(range(256)) * 80
    body = Body(None)
    assert take(body, chunk(b"a") + chunk(data) + LAST_CHUNK) == b"a" + data
    assert body.done


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b"HTTP/1.1 200 OK\r\na: b\r\n c\r\n\r\n", b"b  c"),
        (b"HTTP/1.1 200 OK\r\na: b\rc\r\n\r\n", b"b c"),
        (b"HTTP/1.1 200 OK\na: b\r\n\r\n", b"b"),
        (b"HTTP/1.1 200 OK\na: b\n\n", b"b"),
    ],
    ids=["a folded line", "a bare carriage return", "a bare line feed", "bare line feeds only"],
)
def test_sloppy_line_ends_of_a_response_are_mended(raw: bytes, value: bytes) -> None:
    """Upstreams are not all strict; what the client gets is (RFC 9112 sections 2.2 and 5.2)."""
    buffer = bytearray(raw + b"rest")
    head = parse_response(buffer, b"GET", 1000)
    assert head
    assert head.headers == ((b"a", value),)
    assert bytes(buffer) == b"rest"


@pytest.mark.parametrize(
    ("length", "data", "whole", "done"),
    [(3, b"ab", True, False), (2, b"ab", True, True), (1, b"ab", False, False), (-1, b"ab", True, False)],
)
def test_payload_to_its_end_needs_no_buffer(length: int, data: bytes, whole: bool, done: bool) -> None:
    body = Body(length)
    assert (body.payload(data) == data) == whole
    assert body.done == done


def test_one_whole_chunk_needs_no_buffer() -> None:
    body = Body(None)
    assert body.payload(b"2\r\nab\r\n") == b"ab"
    for other in (b"2\r\nab\r\n0\r\n", b"2\r\nab\r", b"2\r\nabcd", b"1\r\nab\r\n", b"0\r\n\r\n", b"x\r\n\r\n", b""):
        assert body.payload(other) is None
    assert not body.done
