"""No random split of any body lets a secret out, and a body without one passes byte for byte."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import brotli  # type: ignore[import-untyped]
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from proxy import literals
from proxy.leak import MIN_GUARDED, Detector, Finding, Leak, LeakStream, spellings

API = Finding("credential", "api")
ENCODERS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": brotli.compress,
    "zstd": zstandard.compress,
    "gzip, br": lambda data: brotli.compress(gzip.compress(data)),
}
FEW_BYTES = st.lists(st.sampled_from([b"a", b"b", b"ab", b"aaaa"]), max_size=60).map(b"".join)
SECRETS = st.binary(min_size=MIN_GUARDED, max_size=60) | FEW_BYTES.filter(lambda text: len(text) >= MIN_GUARDED)
CUTS = st.lists(st.integers(0, 400), max_size=12)


@pytest.fixture(scope="module", autouse=True, params=[0, literals.WORTH])
def worth(request: pytest.FixtureRequest) -> Iterator[None]:
    """Short bodies are looked through as long ones are, and as they are."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(literals, "WORTH", request.param)
        yield


def cut(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    places = sorted({0, *(place for place in cuts if place < len(data)), len(data)})
    return [data[start:end] for start, end in pairwise(places)]


def sent(detector: Detector, coding: str, pieces: Iterable[bytes]) -> tuple[bytes, bool]:
    """What left of a body, and whether all of it could."""
    stream, passed = LeakStream([detector], lambda _: False, coding), b""
    try:
        for piece in pieces:
            passed += stream.feed(piece)
        return passed + stream.finish(), True
    except Leak:
        return passed, False


@given(SECRETS, st.data(), FEW_BYTES | st.binary(), FEW_BYTES | st.binary(), CUTS, st.sampled_from(list(ENCODERS)))
def test_no_split_of_any_body_lets_a_secret_out(
    secret: bytes, data: st.DataObject, before: bytes, after: bytes, cuts: list[int], coding: str
) -> None:
    text = data.draw(st.sampled_from(sorted(spellings(secret))))
    detector = Detector(dict.fromkeys(spellings(secret), API))
    passed, whole = sent(detector, coding, cut(ENCODERS[coding](before + text + after), cuts))
    assert not whole
    if not coding:
        assert text not in passed
        assert len(passed) < len(before) + min(8, (len(text) + 1) // 2) or before.find(text[:8]) >= 0 or text in before


@given(st.lists(SECRETS, max_size=3), FEW_BYTES | st.binary(max_size=300), CUTS, st.sampled_from(list(ENCODERS)))
def test_what_holds_no_secret_passes_byte_for_byte(
    secrets: list[bytes], body: bytes, cuts: list[int], coding: str
) -> None:
    texts = {text for secret in secrets for text in spellings(secret)}
    coded = ENCODERS[coding](body)
    clean = not any(text in body or text in coded for text in texts)
    assert sent(Detector(dict.fromkeys(texts, API)), coding, cut(coded, cuts)) == (coded, True) or not clean
