"""What a strict HTTP/1 reader must refuse in a request head before anything reads it (RFC 9112). Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from proxy.request import Field, HeaderFacts

HEAD_END = b"\r\n\r\n"

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
LINE = re.compile(rb"(%b) ([\x21-\x7e]++) (HTTP/1\.[01])\r\n" % _TOKEN)
FIELD_LINES = rb"(?:%b:[\x21-\x7e\x80-\xff \t]*+\r\n)*+\r\n" % _TOKEN
_BLOCK = re.compile(FIELD_LINES)
_FIELD = re.compile(rb"([^:]++):[ \t]*+([^\r]*+)\r\n")  # of lines that are known to be sound
_LENGTH = re.compile(rb"0|[1-9][0-9]{0,17}")
_SHORT = 4096  # bytes: only such blocks are worth remembering


class BadMessage(ValueError):
    """Bytes that are no HTTP message; the text is for the agent and quotes nothing."""


class HeaderBlock:
    """The header lines of a request and all that is read from them, once: a client that keeps its connection mostly
    sends the same block again.

    Raises BadMessage: stricter than RFC 9112 where it leaves a choice two readers might make differently, on bare CR or
    LF (section 2.2), line folding (5.2), several Host headers (3.2).
    """

    __slots__ = ("_facts", "coded", "codings", "expect", "fields", "lengths", "upgrade")

    def __init__(self, lines: bytes) -> None:
        if not _BLOCK.fullmatch(lines):
            raise BadMessage("a header line is malformed")
        self.fields = split_fields(lines, 0)
        self.lengths: list[bytes] = []
        self.codings: list[bytes] = []
        self.upgrade = self.expect = self.coded = False
        self._facts: HeaderFacts | None = None
        hosts = 0
        for name, value in self.fields:
            match name.lower():
                case b"host":
                    hosts += 1
                case b"content-length":
                    self.lengths.append(value)
                case b"transfer-encoding":
                    self.codings.append(value.lower())
                case b"upgrade":
                    self.upgrade = True
                case b"content-encoding":
                    self.coded = True
                case b"expect":
                    self.expect |= value.lower() == b"100-continue"
        if hosts > 1:
            raise BadMessage("it has several Host headers")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeaderBlock) and self.fields == other.fields

    __hash__ = None  # type: ignore[assignment]

    @property
    def plain(self) -> bool:
        """Whether what follows the head is known from it, can be read as it is, and is no other protocol."""
        return not (self.codings or self.coded or self.expect or self.upgrade or len(self.lengths) > 1)

    @property
    def facts(self) -> HeaderFacts:
        """What the fields mean. Raises Ambiguous."""
        if self._facts is None:
            self._facts = HeaderFacts.of(self.fields)
        return self._facts


_remembered = lru_cache(maxsize=1024)(HeaderBlock)


@dataclass(slots=True)
class RequestHead:
    """A request line and headers. `length`: bytes of the body, None for chunked."""

    method: bytes
    target: bytes
    version: bytes
    block: HeaderBlock
    length: int | None = 0

    @property
    def headers(self) -> tuple[Field, ...]:
        """The fields in order."""
        return self.block.fields

    @property
    def upgrade(self) -> bool:
        """Whether there is an Upgrade header."""
        return self.block.upgrade

    @property
    def expect(self) -> bool:
        """Whether it waits for 100 Continue."""
        return self.block.expect

    @property
    def raw(self) -> bytes:
        """The head again, with its end."""
        lines = b"".join([b"%b: %b\r\n" % field for field in self.block.fields])
        return b"%b %b %b\r\n%b\r\n" % (self.method, self.target, self.version, lines)


def read_head(raw: bytes) -> RequestHead:
    """A request head, which ends with its empty line.

    Raises BadMessage, beside what `HeaderBlock` refuses: for Content-Length twice or beside Transfer-Encoding (RFC 9112
    section 6.3), and for any coding but chunked (6.1).
    """
    line = LINE.match(raw)
    if not line:
        raise BadMessage("the request line is malformed")
    lines = raw[line.end() :]
    block = _remembered(lines) if len(lines) <= _SHORT else HeaderBlock(lines)
    head = RequestHead(line[1], line[2], line[3], block)
    if block.lengths or block.codings:
        head.length = _length(block.lengths, block.codings, head)
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
