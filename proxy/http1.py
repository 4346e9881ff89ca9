"""HTTP/1.1 messages to and from bytes (RFC 9112), strictly: what is accepted here, h11 reads the same way. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from proxy.framing import FIELD_LINES, HEAD_END, read_head, split_fields
from proxy.framing import BadMessage as BadMessage
from proxy.framing import RequestHead as RequestHead
from proxy.request import Field

MAX_RESPONSE_HEAD = 256 * 1024  # bytes
MAX_INFORMATIONAL = 16  # 1xx responses before the final one
CONSUMED_BODY = 64 * 1024  # bytes; a refused body up to this is read, so that the connection can be kept
LINGER_BYTES = 4 * 1024 * 1024  # read and dropped after an early answer, so that the client gets it
HEAD_SECONDS = 30.0  # a head may take from its first byte
LINGER_SECONDS = 2.0
MAX_CHUNK_LINE = 256  # bytes of a chunk's size with its extensions, which are dropped
MAX_TRAILERS = 16384  # bytes, dropped too
_SHORT = 2048  # bytes: only such heads are worth remembering

_RESPONSE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: ([\t\x20-\x7e\x80-\xff]*))?(\r\n)" + FIELD_LINES)
_TRAILERS = re.compile(FIELD_LINES)
_BLANK_LINE = re.compile(rb"\r?\n\r?\n")  # upstreams are not all as strict as we are
_FOLDED_FIRST = re.compile(rb"[^\n]*\n[ \t]")  # a header, or more of the status line (RFC 9112 section 2.2)
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;[\t\x20-\x7e\x80-\xff]*|[ \t]*)\r\n")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})
_MARKED = re.compile(rb"\n((?i:content-length|transfer-encoding|connection)):[ \t]*+([^\r]*+)")


@dataclass(slots=True)
class ResponseHead:
    """A status line and headers. `length`: bytes of the body, None for chunked, -1 until the connection closes. One may
    stand for several responses with the same bytes: `cleaned` is for who passes it on, to note in what form."""

    version: bytes
    status: int
    phrase: bytes
    headers: tuple[Field, ...]
    length: int | None = 0
    keep_alive: bool = True
    cleaned: Any = field(default=None, compare=False)


def parse_request(buffer: bytearray, limit: int) -> RequestHead | None:
    """The head at the start of `buffer`, which is taken out; None while it is incomplete.

    Raises BadMessage.
    """
    while buffer.startswith(b"\r\n"):
        del buffer[:2]  # RFC 9112 section 2.2
    end = buffer.find(HEAD_END, 0, limit)
    if end < 0:
        if len(buffer) >= limit or _has_bare_line_feed(buffer):
            raise BadMessage(f"its head is malformed or larger than {limit} bytes")
        return None
    head = read_head(bytes(buffer[: end + 4]))
    del buffer[: end + 4]
    return head


def _has_bare_line_feed(buffer: bytearray) -> bool:
    """What will never be a head need not be waited for."""
    return buffer.count(b"\n") > buffer.count(b"\r\n")


def parse_response(buffer: bytearray, method: bytes, limit: int) -> ResponseHead | None:
    """The next head of a response to `method`, taken out of `buffer`; None while it is incomplete.

    Raises BadMessage.
    """
    end = buffer.find(HEAD_END, 0, limit) + len(HEAD_END)
    raw = bytes(buffer[:end])
    head = response_head(raw, method == b"HEAD")
    if head is None:
        blank = _BLANK_LINE.search(buffer, 0, limit)
        if not blank:
            if len(buffer) >= limit:
                raise BadMessage("the head of the answer is too large")
            return None
        end = blank.end()
        del blank  # it holds on to the buffer
        raw = bytes(buffer[:end])
        head = None if _FOLDED_FIRST.match(raw) else _read_response(_mended(raw), method == b"HEAD")
    if head is None:
        raise BadMessage("the answer is not HTTP")
    del buffer[:end]
    return head


def _read_response(raw: bytes, of_head: bool) -> ResponseHead | None:
    match = _RESPONSE.fullmatch(raw)
    if not match:
        return None
    minor, status, phrase, _ = match.groups()
    head = ResponseHead(
        b"HTTP/1." + minor, int(status), phrase or b"", split_fields(raw, match.end(4)), -1, minor == b"1"
    )
    _frame(head, raw)
    if of_head or head.status < 200 or head.status in (204, 304):
        head.length = 0  # RFC 9112 section 6.3, case 1
    elif head.length == -1:
        head.keep_alive = False
    return head


_remembered = lru_cache(maxsize=256)(_read_response)  # what is asked again and again is answered alike


def response_head(raw: bytes, of_head: bool) -> ResponseHead | None:
    """The head that `raw` is, if it is a sound one; `of_head`: it answers a HEAD. Raises BadMessage."""
    return _remembered(raw, of_head) if len(raw) <= _SHORT else _read_response(raw, of_head)


def _mended(raw: bytes) -> bytes:
    """A response head with its folded lines, bare CRs and bare LFs replaced (RFC 9112 sections 2.2 and 5.2)."""
    raw = re.sub(rb"\r?\n[ \t]+", b"  ", raw)
    return re.sub(rb"(?<!\r)\n", b"\r\n", re.sub(rb"\r(?!\n)", b" ", raw))


def _frame(head: ResponseHead, raw: bytes) -> None:
    lengths: set[bytes] = set()
    chunked = False
    for name, value in _MARKED.findall(raw):
        match name.lower():
            case b"content-length":
                lengths.add(value.rstrip(b" \t"))
            case b"transfer-encoding":
                if chunked or value.rstrip(b" \t").lower() != b"chunked":
                    raise BadMessage("the answer has a transfer encoding that is not chunked alone")
                chunked = True
            case b"connection" if b"close" in value.lower():
                head.keep_alive = False
    if chunked and lengths:
        raise BadMessage("the answer has two lengths")  # response splitting (RFC 9112 section 6.3)
    if chunked:
        head.length = None
    elif lengths:
        if len(lengths) > 1 or not all(map(_LENGTH.fullmatch, lengths)):
            raise BadMessage("the length of the answer is not one number")
        head.length = int(lengths.pop())


class Body:
    """Takes the payload of one message out of a buffer. `length` as in the heads above."""

    __slots__ = ("_left", "_state", "done")

    def __init__(self, length: int | None) -> None:
        self.done = length == 0
        self._left = length if length is not None else 0
        self._state = "fixed" if length is not None and length >= 0 else "open" if length == -1 else "size"

    def take(self, buffer: bytearray) -> bytes:
        """The payload that is there, which is taken out. Raises BadMessage."""
        if self._state == "open" or (self._state == "fixed" and len(buffer) <= self._left):
            data = bytes(buffer)
            buffer.clear()
            if self._state == "fixed":
                self._left -= len(data)
                self.done = not self._left
            return data
        if self._state == "fixed":
            data = bytes(buffer[: self._left])
            del buffer[: self._left]
            self._left = 0
            self.done = True
            return data
        return b"".join(self._chunks(buffer))

    def payload(self, data: bytes) -> bytes | None:
        """The payload of `data`, behind all that was taken, if it goes to its end or is one whole chunk; it is taken
        then."""
        if self._state == "fixed" and len(data) <= self._left:
            self._left -= len(data)
            self.done = not self._left
            return data
        if self._state == "size":
            start = data.find(b"\n", 0, MAX_CHUNK_LINE) + 1
            match = _CHUNK.fullmatch(data, 0, start)
            if match and data[-2:] == b"\r\n" and 0 < int(match[1], 16) == len(data) - start - 2:
                return data[start:-2]
        return data if self._state == "open" else None

    def end(self) -> None:
        """The connection ended here. Raises BadMessage if the message did not."""
        if self._state == "open":
            self.done = True
        elif not self.done:
            raise BadMessage("the message was cut short")

    def _chunks(self, buffer: bytearray) -> list[bytearray]:
        found: list[bytearray] = []
        while not self.done:
            if self._state == "size" and not self._size(buffer):
                break
            if self._state == "data":
                if not buffer:
                    break
                piece = buffer[: self._left]
                del buffer[: self._left]
                found.append(piece)
                self._left -= len(piece)
                if self._left:
                    break
                self._state = "crlf"
            if self._state == "crlf":
                if buffer[:2] != b"\r\n"[: len(buffer)]:
                    raise BadMessage("a chunk is longer than it says")
                if len(buffer) < 2:
                    break
                del buffer[:2]
                self._state = "size"
            elif self._state == "trailers" and not self._trailers(buffer):
                break
        return found

    def _size(self, buffer: bytearray) -> bool:
        end = buffer.find(b"\n", 0, MAX_CHUNK_LINE)
        if end < 0:
            if len(buffer) >= MAX_CHUNK_LINE:
                raise BadMessage("a chunk's size is malformed")
            return False
        match = _CHUNK.fullmatch(buffer, 0, end + 1)
        if not match:
            raise BadMessage("a chunk's size is malformed")
        self._left = int(match[1], 16)
        del match  # it holds on to the buffer
        del buffer[: end + 1]
        self._state = "data" if self._left else "trailers"
        return True

    def _trailers(self, buffer: bytearray) -> bool:
        if buffer[:2] == b"\r\n":
            del buffer[:2]
        else:
            end = buffer.find(HEAD_END, 0, MAX_TRAILERS)
            if end < 0:
                if len(buffer) >= MAX_TRAILERS or _has_bare_line_feed(buffer):
                    raise BadMessage("the trailers are too large or malformed")
                return False
            raw = bytes(buffer[: end + 4])
            if not _TRAILERS.fullmatch(raw) or any(name.lower() in _FRAMING for name, _ in split_fields(raw, 0)):
                raise BadMessage("a trailer is malformed")  # RFC 9110 section 6.5.1
            del buffer[: end + 4]
        self.done = True
        return True


def request_bytes(method: bytes, target: bytes, headers: tuple[Field, ...]) -> bytes:
    """A request head."""
    return b"%b %b HTTP/1.1\r\n%b" % (method, target, _field_lines(headers))


def response_bytes(status: int, phrase: bytes, headers: tuple[Field, ...]) -> bytes:
    """A response head."""
    return b"HTTP/1.1 %d %b\r\n%b" % (status, phrase, _field_lines(headers))


def _field_lines(headers: tuple[Field, ...]) -> bytes:
    return b"\r\n".join([*map(b": ".join, headers), b"\r\n"]) if headers else b"\r\n"


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"
