"""What may not leave is found however it is cut, and nothing else is held up."""

from __future__ import annotations

import base64
import gzip
import zlib

import pytest
import re2

from proxy.leak import MAX_EXPANDED, MAX_HELD, MIN_GUARDED, REACH, Detector, Finding, Leak, LeakStream, Shape, spellings

SECRET = b"tok-4f1e9b7c2d8a"
API = Finding("credential", "api")
SHAPE = Shape("key_[a-z]{8}", (b"key_",), "[a-z]*", lambda text: Finding("key", "k") if text[-1:] == b"z" else None)


def detector(*secrets: bytes) -> Detector:
    return Detector({text: API for secret in secrets or (SECRET,) for text in spellings(secret)}, [SHAPE])


def stream(content_encoding: str = "") -> LeakStream:
    return LeakStream([detector()], lambda _: False, content_encoding)


def test_spellings_are_those_that_come_back_and_some_more() -> None:
    found = spellings(b"Secret/Key+1")
    assert {b"Secret/Key+1", b"Secret%2FKey%2B1", base64.b64encode(b"Secret/Key+1")} <= found
    assert {b"5365637265742f4b65792b31", b"5365637265742F4B65792B31", b"secret/key+1"} <= found


def test_what_is_short_is_not_guarded() -> None:
    """It is sent by chance, and refusals would tell it to whoever tries all there are."""
    assert spellings(b"x" * (MIN_GUARDED - 1)) == set()
    assert all(len(text) >= MIN_GUARDED for text in spellings(b"x" * MIN_GUARDED))


def test_of_a_long_secret_the_beginning_is_known() -> None:
    secret = b"-----BEGIN " + bytes(range(65, 91)) * 40
    assert max(map(len, spellings(secret))) == REACH
    assert list(detector(secret).find(b"key: " + secret)) == [(5, API)]


def test_all_finds_are_told_those_inside_others_too() -> None:
    other = Detector({b"abcdefgh": Finding("placeholder", "a"), b"cdefghij": Finding("credential", "b")})
    assert [name for _, (_, name) in other.find(b"..abcdefghij")] == ["a", "b"]


def test_of_two_that_begin_alike_the_longer_is_found() -> None:
    marks = Detector({b"slp_placeholder_git": Finding("placeholder", "git"), b"slp_placeholder_github": API})
    assert next(marks.find(b"x slp_placeholder_github"))[1] is API


def test_a_shape_is_found_where_its_checksum_fits() -> None:
    assert [finding for _, finding in detector().find(b"key_aaaaaaaa key_aaaaaaaz")] == [Finding("key", "k")]


def test_many_false_shapes_cost_little_and_hide_nothing_behind_them() -> None:
    assert list(detector().find(b"key_aaaaaaaa" * 1000 + SECRET)) == [(12_000, API)]


def test_without_patterns_everything_passes() -> None:
    none = Detector({})
    assert list(none.find(SECRET)) == []
    assert none.undecided(SECRET) == len(SECRET)


@pytest.mark.parametrize("cut", range(1, len(SECRET)))
def test_a_cut_secret_is_found_and_but_a_few_bytes_of_it_have_left(cut: int) -> None:
    body = stream()
    passed = body.feed(b"before " + SECRET[:cut])
    with pytest.raises(Leak) as caught:
        body.feed(SECRET[cut:] + b" after")
    assert caught.value.finding == API
    assert len(passed) - len(b"before ") < 8


def test_byte_by_byte_it_is_found_too() -> None:
    body, passed = stream(), b""
    with pytest.raises(Leak):
        for byte in b"before " + SECRET:
            passed += body.feed(bytes([byte]))
    assert SECRET[:8] not in passed


def test_what_only_begins_like_a_secret_passes_whole() -> None:
    body = stream()
    pieces = [b"a " + SECRET[:-1], b"- ", SECRET[:10], b"", SECRET[:12]]
    passed = [body.feed(piece) for piece in pieces]
    assert b"".join(passed) + body.finish() == b"".join(pieces)


@pytest.mark.parametrize("ending", [b"t", b"to", b"tok-4f1", b"\n", b"k"])
def test_a_message_is_not_held_for_a_few_bytes(ending: bytes) -> None:
    """An upstream that waits for its end would wait for ever."""
    assert stream().feed(b"message " + ending) == b"message " + ending


def test_what_is_allowed_passes() -> None:
    body = LeakStream([detector()], lambda finding: finding == API)
    assert body.feed(b"a " + SECRET + b" b") + body.finish() == b"a " + SECRET + b" b"


def test_a_coded_body_waits_for_what_is_inside_but_not_for_ever() -> None:
    packer = zlib.compressobj(wbits=31)
    start = packer.compress(SECRET[:12]) + packer.flush(zlib.Z_SYNC_FLUSH)
    body = stream("gzip")
    assert body.feed(start) == b""
    with pytest.raises(Leak) as caught:
        for _ in range(MAX_HELD):
            body.feed(packer.flush(zlib.Z_FULL_FLUSH) or b"\0\0\0\xff\xff" * 100)
    assert caught.value.finding is None


def test_a_bomb_is_not_decoded_to_its_end() -> None:
    with pytest.raises(Leak) as caught:
        stream("gzip").feed(gzip.compress(bytes(MAX_EXPANDED + 1)))
    assert caught.value.finding is None


def test_no_copy_of_a_pattern_stays_in_re2() -> None:
    detector()
    assert re2._Regexp._make.cache_info().currsize == 0


def test_every_byte_can_be_in_a_secret() -> None:
    secret = bytes(range(256))
    assert list(Detector({secret: API}).find(b"x" + secret)) == [(1, API)]
