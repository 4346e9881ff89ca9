"""The body of an answer on its way: out of one framing, looked through, into the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from proxy.http1 import LAST_CHUNK, MAX_CHUNK_LINE, BadMessage, Body, chunk
from proxy.passing import Passing

CHUNKED = b"5;x=y\r\nhello\r\n006 \r\n world\r\n0\r\nX-Sum: 1\r\nY: 2 \r\n\r\n"


class Scan:
    """Passes everything on, and keeps what it was given."""

    def __init__(self) -> None:
        self.given: list[bytes] = []

    def __call__(self, data: bytes) -> list[bytes]:
        self.given.append(data)
        return [data] if data else []


class Holding:
    """Passes on every whole word, and the rest at the end."""

    def __init__(self) -> None:
        self.held = b""

    def __call__(self, data: bytes) -> list[bytes]:
        *words, self.held = (self.held + data).split(b" ")
        if not data:
            words.append(self.held)
        return [word for word in words if word]


def passing(
    length: int | None,
    *,
    chunked: bool,
    scan: Callable[[bytes], Iterable[bytes]] | None = None,
    buffer: bytearray | None = None,
) -> Passing:
    return Passing(Body(length), bytearray() if buffer is None else buffer, scan or Scan(), chunked=chunked)


def payload(out: bytes) -> bytes:
    """What is in chunks that are one whole body."""
    buffer, body = bytearray(out), Body(None)
    data = body.take(buffer)
    assert body.done
    assert not buffer
    return data


# Out of each framing, into each


def test_a_body_of_a_length_ends_there() -> None:
    rest = passing(5, chunked=False)
    assert (rest.feed(b"he"), rest.done) == (b"he", False)
    assert (rest.feed(b"llo"), rest.done) == (b"llo", True)


def test_a_body_of_a_length_may_leave_in_chunks() -> None:
    rest = passing(5, chunked=True)
    assert (rest.feed(b"he"), rest.done) == (chunk(b"he"), False)
    assert (rest.feed(b"llo"), rest.done) == (chunk(b"llo") + LAST_CHUNK, True)


def test_each_chunk_passes_when_it_comes() -> None:
    rest = passing(None, chunked=True)
    for event in (b"data: 1\n\n", b"data: 2\n\n"):
        assert (rest.feed(chunk(event)), rest.done) == (chunk(event), False)
    assert (rest.feed(LAST_CHUNK), rest.done) == (LAST_CHUNK, True)


def test_chunks_may_leave_without_their_framing() -> None:
    rest = passing(None, chunked=False)
    assert [rest.feed(chunk(b"he")), rest.feed(chunk(b"llo") + LAST_CHUNK)] == [b"he", b"llo"]
    assert rest.done


def test_chunks_that_come_together_leave_together() -> None:
    rest = passing(None, chunked=True)
    assert rest.feed(chunk(b"a") + chunk(b"bc")) == chunk(b"abc")
    assert rest.feed(chunk(b"d") + chunk(b"e") + LAST_CHUNK) == chunk(b"de") + LAST_CHUNK


@pytest.mark.parametrize("place", range(1, len(CHUNKED)))
def test_a_chunk_may_be_cut_anywhere(place: int) -> None:
    """Its extensions, and trailers behind the last, do not pass."""
    rest = passing(None, chunked=True)
    out, done = rest.feed(CHUNKED[:place]), rest.done
    out += rest.feed(CHUNKED[place:])
    assert (done, rest.done) == (False, True)
    assert payload(out) == b"hello world"


def test_chunks_byte_by_byte_are_the_same() -> None:
    rest = passing(None, chunked=True)
    assert payload(b"".join([rest.feed(bytes([byte])) for byte in CHUNKED])) == b"hello world"
    assert rest.done


def test_what_arrived_of_a_chunk_is_not_held_back() -> None:
    rest = passing(None, chunked=True)
    assert rest.feed(b"10\r\ndata: 1") == chunk(b"data: 1")
    assert rest.feed(b"\n\n") == chunk(b"\n\n")


def test_where_there_is_no_payload_nothing_leaves() -> None:
    """A chunk of nothing would be the last."""
    scan = Scan()
    rest = passing(None, chunked=True, scan=scan)
    assert [rest.feed(b"5"), rest.feed(b"\r\n"), rest.feed(b"hello"), rest.feed(b"\r\n")] == [
        *(b"", b"", chunk(b"hello"), b""),
    ]
    assert scan.given == [b"hello"]


@pytest.mark.parametrize(("chunked", "out"), [(True, LAST_CHUNK), (False, b"")])
def test_chunks_of_nothing_are_an_empty_body(chunked: bool, out: bytes) -> None:
    scan = Scan()
    rest = passing(None, chunked=chunked, scan=scan)
    assert (rest.feed(LAST_CHUNK), rest.done) == (out, True)
    assert scan.given == [b""]


@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_until_the_end_lasts_until_the_end(chunked: bool) -> None:
    scan = Scan()
    rest = passing(-1, chunked=chunked, scan=scan)
    out, done = rest.feed(b"he") + rest.feed(b"5\r\nllo"), rest.done
    out += rest.feed(b"")
    assert (done, rest.done) == (False, True)
    assert (payload(out) if chunked else out) == b"he5\r\nllo"
    assert scan.given == [b"he", b"5\r\nllo", b""]


def test_what_was_taken_out_of_its_framing_passes_too() -> None:
    buffer, body = bytearray(chunk(b"he") + b"3\r\nl"), Body(None)
    rest = Passing(body, buffer, Scan(), chunked=True)
    assert rest.pass_on(body.take(buffer)) == chunk(b"hel")
    assert rest.pass_on(b"") == b""
    assert rest.feed(b"lo\r\n" + LAST_CHUNK) == chunk(b"lo") + LAST_CHUNK


def test_what_is_in_the_buffer_comes_first() -> None:
    """Also where what comes behind it looks like a chunk of its own."""
    rest = passing(None, chunked=True, buffer=bytearray(b"b\r\nhe"))
    assert rest.feed(b"3\r\nllo\r\n") == chunk(b"he3\r\nllo\r\n")
    assert not rest.done


# What looks through it


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize(
    ("length", "last"), [(5, b"llo"), (None, chunk(b"llo") + LAST_CHUNK), (None, b"3\r\nllo\r\n0\r\nx: y\r\n\r\n")]
)
def test_the_end_is_told_once(length: int | None, last: bytes, chunked: bool) -> None:
    scan = Scan()
    rest = passing(length, chunked=chunked, scan=scan)
    rest.feed(b"he" if length else chunk(b"he"))
    assert scan.given == [b"he"]
    rest.feed(last)
    assert scan.given == [b"he", b"llo", b""]


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("length", [8, None, -1])
def test_what_was_held_back_is_let_go_at_the_end(length: int | None, chunked: bool) -> None:
    framed: Callable[[bytes], bytes] = chunk if length is None else bytes
    end = {8: b"", None: LAST_CHUNK, -1: b""}[length]
    rest = passing(length, chunked=chunked, scan=Holding())
    out: Callable[[bytes], bytes] = chunk if chunked else bytes
    assert rest.feed(framed(b"on")) == b""
    assert rest.feed(framed(b"e two")) == out(b"one")
    parts = [rest.feed(framed(b"s") + end)]
    if length == -1:
        parts.append(rest.feed(b""))
    assert rest.done
    assert b"".join(parts) == out(b"twos") + (LAST_CHUNK if chunked else b"")


def test_each_piece_of_what_was_seen_is_a_chunk() -> None:
    rest = passing(12, chunked=True, scan=Holding())
    assert rest.feed(b"one two thre") == chunk(b"one") + chunk(b"two") + chunk(b"thre") + LAST_CHUNK


def test_what_looks_through_it_may_do_so_piece_by_piece() -> None:
    def slowly(data: bytes) -> Iterable[bytes]:
        yield data + b"."
        yield b"!"

    rest = passing(2, chunked=True, scan=slowly)
    assert rest.feed(b"hi") == chunk(b"hi.") + chunk(b"!") + chunk(b".") + chunk(b"!") + LAST_CHUNK


def test_a_piece_of_nothing_is_no_chunk() -> None:
    """It would be the last."""
    rest = passing(4, chunked=True, scan=lambda data: [b"", data, b""])
    assert rest.feed(b"he") == chunk(b"he")
    assert rest.feed(b"y!") == chunk(b"y!") + LAST_CHUNK


@pytest.mark.parametrize("at", [b"he", b""])
def test_what_stops_it_is_told(at: bytes) -> None:
    def refuses(data: bytes) -> list[bytes]:
        if data == at:
            raise KeyError
        return [data]

    with pytest.raises(KeyError):
        passing(2, chunked=True, scan=refuses).feed(b"he")


# Where it ends


@pytest.mark.parametrize(
    ("length", "begun"),
    [
        *((5, b""), (5, b"hell"), (None, b""), (None, b"5"), (None, b"5\r\nhell"), (None, b"5\r\nhello\r\n")),
        *((None, b"0\r\n"), (None, b"0\r\nx: y\r\n")),
    ],
)
@pytest.mark.parametrize("chunked", [True, False])
def test_an_upstream_that_hangs_up_too_early_sent_no_body(length: int | None, begun: bytes, chunked: bool) -> None:
    """What was passed on of it is not ended as if it were whole."""
    scan = Scan()
    rest = passing(length, chunked=chunked, scan=scan)
    out = rest.feed(begun) if begun else b""
    assert not out.endswith(LAST_CHUNK)
    with pytest.raises(BadMessage, match="cut short"):
        rest.feed(b"")
    assert not rest.done
    assert b"" not in scan.given


@pytest.mark.parametrize("apart", [0, 2])
@pytest.mark.parametrize(
    ("length", "body", "found"),
    [(5, b"hello", b"hello"), (None, chunk(b"hello") + LAST_CHUNK, b"hello"), (None, CHUNKED, b"hello world")],
)
def test_what_is_behind_it_is_left_alone(length: int | None, body: bytes, found: bytes, apart: int) -> None:
    buffer = bytearray()
    rest = passing(length, chunked=True, buffer=buffer)
    out = rest.feed(body[:apart]) if apart else b""
    out += rest.feed(body[apart:] + b"HTTP/1.1 200 OK\r\n")
    assert rest.done
    assert payload(out) == found
    assert bytes(buffer) == b"HTTP/1.1 200 OK\r\n"


BAD = {
    "no size": b"\r\n",
    "no number": b"zz\r\n",
    "a signed size": b"+5\r\nhello\r\n",
    "a bare line feed behind the size": b"5\nhello\r\n",
    "a size that never ends": b"5;" + b"a" * MAX_CHUNK_LINE,
    "data longer than its size": b"5\r\nhello!\r\n",
    "data shorter than its size": b"5\r\nhell\r\n0\r\n\r\n",
    "bare line feeds behind the data": b"5\r\nhello\n\n",
    "a malformed trailer": b"0\r\nA b\r\n\r\n",
    "a trailer that frames": b"0\r\nContent-Length: 5\r\n\r\n",
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("begun", [[], [b"2\r\nhe\r\n"], [b"2\r\nhe", b"\r\n"]])
def test_a_malformed_chunk_is_refused(case: str, begun: list[bytes]) -> None:
    scan = Scan()
    rest = passing(None, chunked=True, scan=scan)
    assert b"".join(map(rest.feed, begun)) == (chunk(b"he") if begun else b"")
    with pytest.raises(BadMessage):
        rest.feed(BAD[case])
    assert not rest.done
    assert b"" not in scan.given
