"""What a strict HTTP/1 reader must refuse in a request head before anything reads it (RFC 9112). Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from proxy.request import Field

HEAD_END = b"\r\n\r\n"

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
_LINE = rb"(%b) ([\x21-\x7e]++) (HTTP/1\.[01])\r\n" % _TOKEN
FIELD_LINES = rb"(?:%b:[\x21-\x7e\x80-\xff \t]*+\r\n)*+\r\n" % _TOKEN
_HEAD = re.compile(_LINE + FIELD_LINES)
_FIELD = re.compile(rb"([^:]++):[ \t]*+([^\r]*+)\r\n")  # of lines that are known to be sound
_MARKED = frozenset({b"host", b"content-length", b"transfer-encoding", b"upgrade", b"expect"})
_LENGTH = re.compile(rb"0|[1-9][0-9]{0,17}")


class BadMessage(ValueError):
    """Bytes that are no HTTP message; the text is for the agent and quotes nothing."""


@dataclass(slots=True)
class RequestHead:
    """A request line and headers. `length`: bytes of the body, None for chunked. `raw`: as it came, with its end."""

    method: bytes
    target: bytes
    version: bytes
    headers: tuple[Field, ...]
    length: int | None = 0
    upgrade: bool = False
    expect: bool = False
    raw: bytes = b""


def read_head(raw: bytes) -> RequestHead:
    """A request head, which ends with its empty line.

    Raises BadMessage: stricter than RFC 9112 where it leaves a choice two readers might make differently, on bare CR or
    LF (section 2.2), line folding (5.2), Content-Length twice or beside Transfer-Encoding (6.3), any coding but chunked
    (6.1).
    """
    match = _HEAD.fullmatch(raw)
    if not match:
        raise BadMessage("a header line is malformed" if re.match(_LINE, raw) else "the request line is malformed")
    method, target, version = match.groups()
    head = RequestHead(method, target, version, split_fields(raw, match.end(3) + 2), raw=raw)
    lengths, codings, hosts = [], [], 0
    for name, value in [field for field in head.headers if field[0].lower() in _MARKED]:
        match name.lower():
            case b"host":
                hosts += 1
            case b"content-length":
                lengths.append(value)
            case b"transfer-encoding":
                codings.append(value.lower())
            case b"upgrade":
                head.upgrade = True
            case b"expect":
                head.expect |= value.lower() == b"100-continue"
    if hosts > 1:
        raise BadMessage("it has several Host headers")
    if lengths or codings:
        head.length = _length(lengths, codings, head)
    return head


def _length(lengths: list[bytes], codings: list[bytes], head: RequestHead) -> int | None:
    if codings and (lengths or codings != [b"chunked"] or head.version == b"HTTP/1.0"):
        raise BadMessage("its transfer encoding is not chunked alone")
    if head.method == b"CONNECT" and (codings or any(length != b"0" for length in lengths)):
        # RFC 9110 section 9.3.6; a reader may take it for the tunnel's first bytes
        raise BadMessage("a CONNECT has no body")
    if codings:
        return None
    if len(lengths) > 1 or not _LENGTH.fullmatch(lengths[0]):
        raise BadMessage("its content length is not one number")
    return int(lengths[0])


def split_fields(raw: bytes, at: int) -> tuple[Field, ...]:
    """The names and values of `FIELD_LINES` that begin at `at` and end `raw`."""
    fields = _FIELD.findall(raw, at, len(raw) - 2)
    if raw.find(b" \r\n", at) >= 0 or raw.find(b"\t\r\n", at) >= 0:
        fields = [(name, value.rstrip(b" \t")) for name, value in fields]
    return tuple(fields)


def head_problem(head: bytes) -> str | None:
    """Why a request head (up to and without its empty line) is refused, in words for the agent; None: it is sound."""
    try:
        read_head(head + HEAD_END)
    except BadMessage as problem:
        return str(problem)
    return None
