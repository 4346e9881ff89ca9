"""Whatever the secret, the body, the coding and the cuts: it does not get through, and clean bytes do."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from unittest.mock import patch

import brotli  # type: ignore[import-untyped]
import pytest
import zstandard
from hypothesis import assume, given
from hypothesis import strategies as st

from proxy import literals, redact
from proxy.coding import PIECE, SCANNABLE, Undecodable, decoder, narrow_accept_encoding
from proxy.forms import MIN_REDACTABLE, forms
from proxy.redact import BodyRedactor, Replacer, secret_replacer

ENCODERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": brotli.compress,
    "zstd": zstandard.compress,
}
CODINGS = st.lists(st.sampled_from(list(ENCODERS)), max_size=2)
FEW_BYTES = st.lists(st.sampled_from([b"a", b"b", b"aaaa", b"abab"])).map(b"".join)
PATTERNS = st.lists(FEW_BYTES.filter(len), min_size=1, max_size=5, unique=True)
# No brackets: "]abc" after a replacement could be half replacement, half body.
SECRETS = st.binary(min_size=MIN_REDACTABLE, max_size=40).filter(lambda secret: not {*b"[]"} & {*secret})
CUTS = st.lists(st.integers(0, 400), max_size=12)


@pytest.fixture(scope="module", autouse=True, params=[0, literals.WORTH])
def worth(request: pytest.FixtureRequest) -> Iterator[None]:
    """Short bodies are looked through as long ones are, and as they are."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(literals, "WORTH", request.param)
        yield


def cut(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    """`data` divided at `cuts`."""
    places = sorted({0, *(place for place in cuts if place < len(data)), len(data)})
    return [data[start:end] for start, end in pairwise(places)]


def model(patterns: list[bytes], data: bytes, hold: int) -> bytes:
    """What replacing means, byte by byte: `#` and the length of what was found."""
    output, at = b"", 0
    while at < len(data):
        known = [pattern for pattern in patterns if data.startswith(pattern[:hold], at)]
        if not known:
            output += data[at : at + 1]
            at += 1
            continue
        head = max(len(pattern[:hold]) for pattern in known)
        size = head
        for pattern in known:
            if len(pattern[:hold]) == head:
                common = head
                while common < len(pattern) and data[at + common : at + common + 1] == pattern[common : common + 1]:
                    common += 1
                size = max(size, common)
        output += b"#"
        at += size
    return output


@given(PATTERNS, st.data(), CUTS, st.integers(1, 12))
def test_any_division_gives_what_the_undivided_body_gives(
    patterns: list[bytes], draw: st.DataObject, cuts: list[int], hold: int
) -> None:
    """Leftmost, then longest, at every length of what is held."""
    parts = st.sampled_from(patterns).flatmap(lambda pattern: st.integers(1, len(pattern)).map(lambda n: pattern[:n]))
    data = b"".join(draw.draw(st.lists(parts | FEW_BYTES, max_size=8)))
    with patch.object(redact, "HOLD", hold):
        replacer = Replacer(dict.fromkeys(patterns, (b"#", "x")))
    stream = replacer.stream()
    output = b"".join([stream.feed(chunk) for chunk in cut(data, cuts)]) + stream.finish()
    assert output == model(patterns, data, hold)
    assert replacer.replace(data) == (output, stream.found)
    assert stream.found["x"] == output.count(b"#")


@given(PATTERNS, FEW_BYTES, CUTS)
def test_nothing_is_withheld_that_cannot_begin_a_pattern(patterns: list[bytes], data: bytes, cuts: list[int]) -> None:
    """What is missing from the output is the longest end that is a proper beginning of a pattern."""
    assume(not any(pattern in data for pattern in patterns))
    stream = Replacer(dict.fromkeys(patterns, (b"#", "x"))).stream()
    output = b"".join([stream.feed(chunk) for chunk in cut(data, cuts)])
    beginnings = {pattern[:size] for pattern in patterns for size in range(len(pattern))}
    held = max(len(start) for start in beginnings if data.endswith(start))
    assert output == data[: len(data) - held]


@given(SECRETS, st.data(), CODINGS, CUTS)
def test_no_form_of_a_secret_gets_through(
    secret: bytes, data: st.DataObject, codings: list[str], cuts: list[int]
) -> None:
    """Embedded anywhere, in any form, cut anywhere, coded by anything."""
    spellings = sorted(forms(secret))
    assume(not any(form in b"[redacted:n]" for form in spellings))
    body = b"".join(data.draw(st.lists(st.one_of(st.sampled_from(spellings), st.binary(max_size=20)), max_size=6)))
    coded = body
    for coding in codings:
        coded = ENCODERS[coding](coded)
    replacer = secret_replacer({"n": [secret]})
    redactor = BodyRedactor(replacer, ", ".join(codings))
    output = b"".join([piece for chunk in cut(coded, cuts) for piece in redactor.feed(chunk)])
    output += b"".join(redactor.finish())
    assert not [form for form in spellings if form in output]
    assert (output, redactor.found) == replacer.replace(body)
    if not redactor.found:
        assert output == body


@given(st.lists(st.sampled_from(list(ENCODERS)), min_size=1, max_size=2), st.binary(), CUTS)
def test_random_bytes_are_undecodable_and_nothing_worse(codings: list[str], body: bytes, cuts: list[int]) -> None:
    """A decoder raises one exception only."""
    undo = decoder(",".join(codings))
    assert undo is not None
    try:
        for chunk in cut(body, cuts):
            assert all(0 < len(piece) <= PIECE for piece in undo.decode(chunk))
        undo.finish()
    except Undecodable:
        pass


@given(st.sampled_from(list(ENCODERS)), st.binary(min_size=1), st.data())
def test_damaged_body_is_decoded_or_undecodable(coding: str, body: bytes, data: st.DataObject) -> None:
    """One byte changed in a well-formed body."""
    coded = bytearray(ENCODERS[coding](body))
    coded[data.draw(st.integers(0, len(coded) - 1))] ^= data.draw(st.integers(1, 255))
    undo = decoder(coding)
    assert undo is not None
    try:
        assert all(len(piece) <= PIECE for piece in undo.decode(bytes(coded)))
        undo.finish()
    except Undecodable:
        pass


@given(st.lists(st.text() | st.text("gzipbrdeflatx*;q=0.15, ")))
def test_only_scannable_codings_are_ever_asked_for(values: list[str]) -> None:
    """Whatever a client sends."""
    asked = narrow_accept_encoding(values)
    assert {preference.split(";")[0] for preference in asked.split(", ")} <= set(SCANNABLE)
    assert asked.isascii()
