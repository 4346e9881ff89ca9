"""A head that two readers could read differently is refused. That h11 reads the others alike: tests/property."""

from __future__ import annotations

import time

import pytest

from proxy.framing import head_problem


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1",
        b"GET http://a.test/ HTTP/1.0\r\nHost: a.test",
        b"CONNECT a.test:443 HTTP/1.1\r\nhost:a.test:443",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: \t 123 \t",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked",
        b"GET / HTTP/1.1\r\nHost: a\r\nX:\r\nY: a\tb\r\nZ: \xff",
    ],
)
def test_a_sound_head_has_no_problem(head: bytes) -> None:
    assert head_problem(head) is None


LINE = "the request line is malformed"
FIELD = "a header line is malformed"
CODING = "its transfer encoding is not chunked alone"
LENGTH = "its content length is not one number"


@pytest.mark.parametrize(
    ("head", "problem"),
    [
        (b"", LINE),
        (b"GET /", LINE),
        (b"GET  / HTTP/1.1", LINE),
        (b"GET\t/ HTTP/1.1", LINE),
        (b" GET / HTTP/1.1", LINE),
        (b"GET / HTTP/1.1 ", LINE),
        (b"GET /a b HTTP/1.1", LINE),
        (b"GET / HTTP/2.0", LINE),
        (b"GET / http/1.1", LINE),
        (b"GET / HTTP/1.1\nHost: a", LINE),
        (b"GET /\r HTTP/1.1", LINE),
        (b"GET /\x00 HTTP/1.1", LINE),
        (b"GET /\xc3\xbc HTTP/1.1", LINE),
        (b"G@T / HTTP/1.1", LINE),
        (b"GET / HTTP/1.1\r\nHost", FIELD),
        (b"GET / HTTP/1.1\r\n: a", FIELD),
        (b"GET / HTTP/1.1\r\nHost : a", FIELD),
        (b"GET / HTTP/1.1\r\nA: b\r\n c", FIELD),
        (b"GET / HTTP/1.1\r\n A: b", FIELD),
        (b"GET / HTTP/1.1\r\nA: b\nHost: c", FIELD),
        (b"GET / HTTP/1.1\r\nA: b\rHost: c", FIELD),
        (b"GET / HTTP/1.1\r\nA: \x00", FIELD),
        (b"GET / HTTP/1.1\r\nA: \x7f", FIELD),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHOST: a", "it has several Host headers"),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 3", CODING),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked", CODING),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked", CODING),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding: identity", CODING),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding:", CODING),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding: \x0bchunked", FIELD),
        (b"GET / HTTP/1.0\r\nTransfer-Encoding: chunked", CODING),
        (b"GET / HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 3", LENGTH),
        (b"GET / HTTP/1.1\r\nContent-Length: 3, 3", LENGTH),
        (b"GET / HTTP/1.1\r\nContent-Length: +3", LENGTH),
        (b"GET / HTTP/1.1\r\nContent-Length: -3", LENGTH),
        (b"GET / HTTP/1.1\r\nContent-Length: 03", LENGTH),
        (b"GET / HTTP/1.1\r\nContent-Length: 0x3", LENGTH),
        (b"GET / HTTP/1.1\r\nContent-Length: 3_0", LENGTH),
        (b"GET / HTTP/1.1\r\nContent-Length:", LENGTH),
        (b"GET / HTTP/1.1\r\nContent-Length: " + b"9" * 19, LENGTH),
    ],
)
def test_a_head_that_can_be_read_in_two_ways_has_a_problem(head: bytes, problem: str) -> None:
    """Each has been a way to smuggle a request past some pair of readers."""
    assert head_problem(head) == problem


def test_no_head_is_slow_to_refuse() -> None:
    """Spaces that two parts of an expression could take made this quadratic: seconds for one head."""
    started = time.perf_counter()
    assert head_problem(b"GET / HTTP/1.1\r\nA:" + b" " * 60_000 + b"\0") == FIELD
    assert time.perf_counter() - started < 1
