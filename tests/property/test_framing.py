"""Whatever head is accepted, h11 accepts and reads the same way."""

from __future__ import annotations

import h11
from hypothesis import assume, given
from hypothesis import strategies as st

from proxy.framing import HEAD_END, head_problem, read_head

TOKENS = st.sampled_from([b"GET", b"POST", b"x!#$%&'*+-.^_`|~9", b"G@T", b"", b"CONNECT"]) | st.binary(max_size=3)
TARGETS = st.sampled_from([b"/", b"http://a.test/x?y", b"*", b"a.test:443", b"/\xff", b"/ b"]) | st.binary(max_size=5)
VERSIONS = st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/1.2", b"HTTP/2", b"http/1.1", b""])
NAMES = st.sampled_from(
    [b"Host", b"hOST", b"Content-Length", b"Transfer-Encoding", b"X", b" X", b"X ", b"", b"Connection"]
)
VALUES = (
    st.sampled_from([b"a.test", b"0", b"5", b"05", b"5,5", b"chunked", b"Chunked", b"gzip, chunked", b"", b"a  b\tc"])
    | st.text(" \t\x00\x0b\x0c\r\n\x1cab\x7f\x85\xa0\xff", max_size=6).map(lambda text: text.encode("latin-1"))
    | st.binary(max_size=6)
)
SPACES = st.sampled_from([b"", b" ", b"\t ", b"\x0b"])
FIELDS = st.lists(st.tuples(NAMES, SPACES, VALUES, SPACES), max_size=4)
ENDS = st.sampled_from([b"\r\n"] * 8 + [b"\n", b"\r", b"\r\n ", b"\r\n\r\n"])


@st.composite
def heads(draw: st.DrawFn) -> bytes:
    """Heads that are mostly almost right."""
    line = b" ".join((draw(TOKENS), draw(TARGETS), draw(VERSIONS)))
    fields = [name + b":" + before + value + after for name, before, value, after in draw(FIELDS)]
    return line + b"".join(draw(ENDS) + field for field in fields)


def agree(raw: bytes) -> None:
    """A head that is accepted means the same to h11, which wants one Host in HTTP/1.1."""
    if head_problem(raw):
        return
    head = read_head(raw + HEAD_END)
    fields = [(name.lower(), value) for name, value in head.headers]
    if head.version == b"HTTP/1.1" and not any(name == b"host" for name, _ in fields):
        fields.append((b"host", b"a.test"))
        raw += b"\r\nhost: a.test"
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(raw + HEAD_END)
    event = connection.next_event()
    assert isinstance(event, h11.Request)
    assert (event.method, event.target, b"HTTP/" + event.http_version) == (head.method, head.target, head.version)
    assert list(event.headers) == [
        (name, value.lower() if name == b"transfer-encoding" else value)  # h11 does so
        for name, value in fields
    ]
    assert head.length == length(event)


def length(request: h11.Request) -> int | None:
    """The bytes of the body as h11 sees it, None for chunked."""
    fields = dict(request.headers)
    return None if b"transfer-encoding" in fields else int(fields.get(b"content-length", b"0"))


@given(heads())
def test_h11_reads_an_accepted_head_the_same_way(head: bytes) -> None:
    agree(head)


@given(st.binary(max_size=60))
def test_so_it_does_whatever_the_bytes(head: bytes) -> None:
    agree(head)


@given(st.lists(st.tuples(st.sampled_from([b"Host", b"A", b"Content-Length"]), VALUES), max_size=3))
def test_so_it_does_where_only_values_are_odd(fields: list[tuple[bytes, bytes]]) -> None:
    head = b"GET / HTTP/1.1" + b"".join(b"\r\n" + name + b": " + value for name, value in fields)
    assume(b"\r\n\r\n" not in head)
    agree(head)
