"""The spellings of a secret that are looked for."""

from __future__ import annotations

import base64
import html
import json
from urllib.parse import quote, quote_plus

import pytest

from proxy.forms import MIN_BASE64, MIN_REDACTABLE, forms

ODD = "pa/ss \"w+r\\d'<&>~=!\t"


def seen(secret: bytes, where: bytes) -> bool:
    """Whether some form of `secret` stands in `where`."""
    return any(form in where for form in forms(secret))


@pytest.mark.parametrize("urlsafe", [False, True])
@pytest.mark.parametrize("before", range(4))
@pytest.mark.parametrize("after", range(4))
def test_base64_is_found_at_every_offset_in_both_alphabets(before: int, after: int, urlsafe: bool) -> None:
    """The secret may begin and end anywhere in a group of three bytes."""
    secret = bytes(range(190, 255))
    encode = base64.urlsafe_b64encode if urlsafe else base64.b64encode
    assert seen(secret, encode(b"\xfb" * before + secret + b"\xff" * after))


@pytest.mark.parametrize(("before", "after"), [(b, a) for b in range(3) for a in range(3)])
def test_what_base64_leaves_over_tells_less_than_a_byte_at_each_end(before: int, after: int) -> None:
    """The bits of the secret that are in the characters beside the form."""
    secret = bytes(range(40))
    encoded = base64.b64encode(bytes(before) + secret + bytes(after))
    form = max((form for form in forms(secret) if form in encoded), key=len)
    left = 6 * encoded.index(form) - 8 * before
    right = 8 * len(secret) - 6 * len(form) - left
    assert 0 <= left <= 4
    assert 0 <= right <= 4


@pytest.mark.parametrize(
    "spelling",
    [
        "".join(f"%{byte:02X}" for byte in ODD.encode()),
        "".join(f"%{byte:02x}" for byte in ODD.encode()),
        quote(ODD),
        quote(ODD, safe=""),
        quote_plus(ODD),
        quote(ODD, safe="!'()*"),
        "pa%2fss%20%22w%2br%5cd%27%3c%26%3e~%3d%21%09",
        "pa%2Fss+%22w%2Br%5Cd%27%3C%26%3E%7E%3D%21%09",
    ],
)
def test_percent_encoded_spellings_are_found(spelling: str) -> None:
    """Upper and lower hexadecimal, every byte or only what must be, as the usual libraries write it."""
    assert spelling.encode() in forms(ODD.encode())


@pytest.mark.parametrize(
    "spelling",
    [
        json.dumps(ODD)[1:-1],
        json.dumps(ODD)[1:-1].replace("/", r"\/"),
        r"pa/ss \"w+r\\d'\u003c\u0026\u003e~=!\t",
        r"pa/ss \"w+r\\d\u0027\u003c\u0026\u003e~\u003d!\t",
        r"pa/ss \u0022w\u002Br\\d\u0027\u003C\u0026\u003E~=!\t",
        html.escape(ODD),
        html.escape(ODD, quote=False),
        html.escape(ODD).replace("&#x27;", "&#39;"),
    ],
)
def test_escaped_spellings_are_found(spelling: str) -> None:
    """JSON as Python, PHP, Go, Gson and .NET write it, and HTML."""
    assert spelling.encode() in forms(ODD.encode())


@pytest.mark.parametrize(
    "spelling", ['"pässwörd"', r'"p\u00e4ssw\u00f6rd"', '"pÃ¤sswÃ¶rd"', r'"p\u00c3\u00a4ssw\u00c3\u00b6rd"']
)
def test_text_that_passed_through_latin_1_is_found(spelling: str) -> None:
    """A server that reads header values as Latin-1 echoes each byte of UTF-8 as a character."""
    assert seen("pässwörd".encode(), spelling.encode())


def test_bytes_that_are_no_text_are_found() -> None:
    """A secret need not be UTF-8."""
    secret = b"\xff\xfe\x00key"
    assert secret in forms(secret)
    assert seen(secret, json.dumps(secret.decode("latin-1")).encode())


def test_plain_token_has_few_forms() -> None:
    """Spellings that do not differ are searched once: the token, twice percent-encoded, three offsets."""
    assert len(forms(b"ghp_Zk3TnQ8vL1xYw5RbAc7D")) == 6


def test_too_short_secret_has_no_forms() -> None:
    """One that stands everywhere by chance would ruin every answer."""
    assert forms(b"x" * (MIN_REDACTABLE - 1)) == set()
    assert forms(b"") == set()
    assert b"x" * MIN_REDACTABLE in forms(b"x" * MIN_REDACTABLE)


def test_short_secret_is_not_looked_for_in_base64() -> None:
    """Its base64 is so short that a picture would hold it."""
    assert not seen(b"k" * (MIN_BASE64 - 1), base64.b64encode(b"k" * (MIN_BASE64 - 1)))
    assert seen(b"k" * MIN_BASE64, base64.b64encode(b"k" * MIN_BASE64))
