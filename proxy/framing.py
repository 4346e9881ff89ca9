"""What a strict HTTP/1 reader must refuse in a request head before anything reads it (RFC 9112). Pure."""

from __future__ import annotations

import re

_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+ [\x21-\x7e\x80-\xff]+ HTTP/1\.[01]")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x21-\x7e\x80-\xff \t]*)")
_LENGTH = re.compile(rb"0|[1-9][0-9]{0,17}")
HEAD_END = b"\r\n\r\n"


def head_problem(head: bytes) -> str | None:
    """Why a request head (up to and without its empty line) is refused, in words for the agent; None: it is sound.

    Stricter than RFC 9112 where it leaves a choice two readers might make differently: bare CR or LF (section 2.2),
    line folding (5.2), Content-Length twice or beside Transfer-Encoding (6.3), any coding but chunked (6.1).
    """
    line, *fields = head.split(b"\r\n")
    if not _LINE.fullmatch(line):
        return "the request line is malformed"
    lengths, codings, hosts = [], [], 0
    for field in fields:
        match = _FIELD.fullmatch(field)
        if not match:
            return "a header line is malformed"
        name = match[1].lower()
        if name == b"content-length":
            lengths.append(match[2].strip(b" \t"))
        elif name == b"transfer-encoding":
            codings.append(match[2].strip(b" \t").lower())
        hosts += name == b"host"
    if hosts > 1:
        return "it has several Host headers"
    if codings and (lengths or codings != [b"chunked"] or line.endswith(b"1.0")):
        return "its transfer encoding is not chunked alone"
    if len(lengths) > 1 or not all(_LENGTH.fullmatch(length) for length in lengths):
        return "its content length is not one number"
    return None
