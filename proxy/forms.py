"""The spellings a secret can come back in. What is done about them lies in `redact`."""

from __future__ import annotations

import base64
import html
import json
import string
from collections.abc import Iterator

MIN_REDACTABLE = 4  # bytes: a shorter secret stands everywhere by chance, redacting it would ruin every answer
MIN_BASE64 = 8  # bytes: a shorter secret has base64 forms of 4 to 9 characters, which other base64 holds by chance


def forms(secret: bytes) -> set[bytes]:
    """The spellings in which `secret` may come back: as it is, base64, percent-encoded, and escaped for JSON and HTML.

    Empty below `MIN_REDACTABLE` bytes, without base64 below `MIN_BASE64`. Text that passed through Latin-1, as header
    values do in many servers, counts as a spelling. Base64 is found at any offset in longer data by the characters
    that depend on the secret alone (RFC 4648 section 4), so up to 4 bits of its first and last byte may remain in the
    characters beside it. Not found: a mixture of spellings, one inside another, base64 broken into lines.
    """
    if len(secret) < MIN_REDACTABLE:
        return set()
    found: set[bytes] = set()
    for data in {secret, secret.decode("latin-1").encode()}:
        found |= {data, *_percent_encoded(data)}
        if len(data) >= MIN_BASE64:
            found |= set(_base64(data))
        try:
            text = data.decode()
        except UnicodeDecodeError:
            continue
        found |= {spelling.encode() for spelling in (*_json_escaped(text), *_html_escaped(text))}
    return found


def _base64(data: bytes) -> Iterator[bytes]:
    for offset in range(3):
        own = slice((8 * offset + 5) // 6, 8 * (offset + len(data)) // 6)
        yield base64.b64encode(bytes(offset) + data)[own]
        yield base64.urlsafe_b64encode(bytes(offset) + data)[own]


_UNRESERVED = string.ascii_letters + string.digits + "-._~"  # RFC 3986 section 2.3
_PERCENT_TABLES = [
    {byte: escape % byte for byte in range(256) if chr(byte) not in kept} | extra
    for escape in ("%%%02X", "%%%02x")
    for kept, extra in (
        ("", {}),
        (_UNRESERVED, {}),
        (_UNRESERVED, {32: "+"}),  # urllib's quote_plus
        (_UNRESERVED + "/", {}),  # urllib's quote
        (_UNRESERVED + "!'()*", {}),  # encodeURIComponent
        (_UNRESERVED + "!'()*;/?:@&=+$,#", {}),  # encodeURI
        (_UNRESERVED.replace("~", "*"), {32: "+"}),  # HTML forms
    )
]


def _percent_encoded(data: bytes) -> Iterator[bytes]:
    text = data.decode("latin-1")
    return (text.translate(table).encode() for table in _PERCENT_TABLES)


def _json_escaped(text: str) -> Iterator[str]:
    """RFC 8259 section 7 leaves a choice; these are those of Python, JavaScript, PHP, Go, Gson and .NET."""
    for ascii_only in (True, False):
        escaped = json.dumps(text, ensure_ascii=ascii_only)[1:-1]
        yield escaped
        yield escaped.replace("/", r"\/")
        for special in ("<>&", "<>&'="):
            yield escaped.translate({ord(char): rf"\u{ord(char):04x}" for char in special})
    parts = r"\u0022".join(json.dumps(part)[1:-1] for part in text.split('"'))
    yield parts.translate({ord(char): rf"\u{ord(char):04X}" for char in "<>&'+`"})


def _html_escaped(text: str) -> Iterator[str]:
    yield html.escape(text, quote=False)
    yield html.escape(text)
    yield html.escape(text).replace("&#x27;", "&#39;")
