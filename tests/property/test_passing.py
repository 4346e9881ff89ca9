"""However an answer's body is cut on its way in, what goes out is the same body, and nothing behind it is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import h11
from hypothesis import given
from hypothesis import strategies as st

from proxy.flow import scan
from proxy.http1 import BadMessage, Body, chunk
from proxy.passing import Passing
from proxy.redact import BodyRedactor, Replacer

type Scan = Callable[[bytes], Iterable[bytes]]

SECRET = b"abcab"
HIDES = Replacer({SECRET: (b"#", "x")})
PARTS = st.lists(st.binary(min_size=1, max_size=9) | st.sampled_from([SECRET, SECRET[:3], SECRET[3:]]), max_size=6)
CUTS = st.lists(st.integers(0, 300), max_size=12)
EXTENSIONS = st.sampled_from([b"", b"", b";", b";x=y", b" ", b"\t "])
TRAILERS = st.sampled_from([b"", b"", b"x-sum: 1\r\n", b"x: y\r\nz: 0\r\n"])
BEHIND = st.sampled_from([b"", b"HTTP/1.1 200 OK\r\n", b"0\r\n\r\n"])


@st.composite
def encodings(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A payload, and one of the ways to write it in chunks."""
    parts = draw(PARTS)
    data = b""
    for part in parts:
        size = draw(st.sampled_from([b"%x", b"%X", b"0%x", b"%08X"])) % len(part)
        data += size + draw(EXTENSIONS) + b"\r\n" + part + b"\r\n"
    data += draw(st.sampled_from([b"0", b"00"])) + draw(EXTENSIONS) + b"\r\n" + draw(TRAILERS) + b"\r\n"
    return b"".join(parts), data


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """No piece is empty: that would be the end."""
    ends = sorted(place % (len(data) + 1) for place in places)
    return [piece for start, end in zip([0, *ends], [*ends, len(data)], strict=True) if (piece := data[start:end])]


def plain(data: bytes) -> list[bytes]:
    """Looks for nothing."""
    return [data] if data else []


def redacting() -> Scan:
    """As answers are looked through."""
    body = BodyRedactor(HIDES)
    return lambda data: scan(body, data)


def passed(length: int | None, pieces: list[bytes], look: Scan, *, chunked: bool) -> tuple[bytes, bool, bytes]:
    """All that goes out for pieces that arrive one after the other, whether it ended, and what is left behind it."""
    buffer = bytearray()
    rest = Passing(Body(length), buffer, look, chunked=chunked)
    out = b""
    for piece in pieces:
        if rest.done:
            buffer += piece
        else:
            out += rest.feed(piece)
    if length == -1:
        out += rest.feed(b"")
    return out, rest.done, bytes(buffer)


def read_chunks(out: bytes) -> bytes:
    """What a client reads, which is one whole body to it and nothing more."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("host", "a.test")]))
    client.send(h11.EndOfMessage())
    client.receive_data(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + out)
    assert isinstance(client.next_event(), h11.Response)
    payload = b""
    while isinstance(event := client.next_event(), h11.Data):
        payload += event.data
    assert isinstance(event, h11.EndOfMessage)
    assert not list(event.headers), "trailers do not pass"
    assert client.trailing_data == (b"", False)
    return payload


@given(encodings(), CUTS, BEHIND, st.booleans())
def test_however_chunks_arrive_the_body_is_the_same(
    encoding: tuple[bytes, bytes], places: list[int], behind: bytes, chunked: bool
) -> None:
    payload, data = encoding
    out, done, left = passed(None, cut(data + behind, places), plain, chunked=chunked)
    assert (done, left) == (True, behind)
    assert (read_chunks(out) if chunked else out) == payload


@given(encodings(), CUTS)
def test_however_chunks_arrive_a_secret_in_them_is_found(encoding: tuple[bytes, bytes], places: list[int]) -> None:
    """As often as in the undivided body."""
    payload, data = encoding
    out, done, _ = passed(None, cut(data, places), redacting(), chunked=True)
    assert done
    assert read_chunks(out) == HIDES.replace(payload)[0]


@given(PARTS.map(b"".join).filter(len), CUTS, BEHIND, st.booleans())
def test_however_a_body_of_a_length_arrives_it_is_the_same(
    payload: bytes, places: list[int], behind: bytes, chunked: bool
) -> None:
    out, done, left = passed(len(payload), cut(payload + behind, places), redacting(), chunked=chunked)
    assert (done, left) == (True, behind)
    assert (read_chunks(out) if chunked else out) == HIDES.replace(payload)[0]


@given(PARTS.map(b"".join), CUTS, st.booleans())
def test_however_a_body_until_the_end_arrives_it_is_the_same(payload: bytes, places: list[int], chunked: bool) -> None:
    out, done, left = passed(-1, cut(payload, places), redacting(), chunked=chunked)
    assert (done, left) == (True, b"")
    assert (read_chunks(out) if chunked else out) == HIDES.replace(payload)[0]


@given(encodings(), CUTS, st.integers(0, 300))
def test_what_is_cut_short_is_never_whole(encoding: tuple[bytes, bytes], places: list[int], end: int) -> None:
    """What came of it passes, and the client sees that it is not all."""
    payload, data = encoding
    rest = Passing(Body(None), bytearray(), plain, chunked=True)
    out = b"".join(map(rest.feed, cut(data[: end % len(data)], places)))
    try:
        rest.feed(b"")
    except BadMessage:
        pass
    else:
        raise AssertionError("it was taken for whole")
    buffer, body = bytearray(out), Body(None)
    assert payload.startswith(body.take(buffer))
    assert not body.done


@given(st.lists(st.binary(min_size=1, max_size=9), max_size=6))
def test_chunks_that_come_one_by_one_pass_one_by_one(parts: list[bytes]) -> None:
    """No event of a stream waits for the next."""
    rest = Passing(Body(None), bytearray(), plain, chunked=True)
    assert [rest.feed(chunk(part)) for part in parts] == list(map(chunk, parts))
