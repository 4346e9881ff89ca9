"""Replacing patterns in streams: what is passed on, what is held back, what never gets through."""

from __future__ import annotations

import base64
import gzip
import tracemalloc
import zlib
from collections.abc import Iterable, Iterator

import brotli  # type: ignore[import-untyped]
import pytest
import zstandard

from proxy.coding import Undecodable
from proxy.redact import BodyRedactor, Replacer, secret_replacer

SECRET = b"ghp_Zk3TnQ8vL1xYw5RbAc7D"
EVENTS = [b"data: one\n\n", b"data: " + SECRET + b"\n\n", b"data: three\n\n"]
REDACTED = [b"data: one\n\n", b"data: [redacted:github]\n\n", b"data: three\n\n"]


def github() -> Replacer:
    """A replacer of `SECRET`."""
    return secret_replacer({"github": [SECRET]})


def chunks(data: bytes, size: int) -> Iterator[bytes]:
    """`data` cut into pieces of `size` bytes."""
    return (data[at : at + size] for at in range(0, len(data), size))


def through(replacer: Replacer, pieces: Iterable[bytes]) -> bytes:
    """All that a stream makes of `pieces`."""
    stream = replacer.stream()
    return b"".join([stream.feed(piece) for piece in pieces]) + stream.finish()


def test_whole_value_is_replaced_and_counted() -> None:
    """Both of two occurrences in a header value go."""
    value, found = github().replace(b"token " + SECRET + b", token " + SECRET)
    assert value == b"token [redacted:github], token [redacted:github]"
    assert found == {"github": 2}


def test_value_without_secret_is_the_same_object() -> None:
    """A clean header value is not copied."""
    value = b"text/html; charset=utf-8"
    replaced, found = github().replace(value)
    assert replaced is value
    assert not found


def test_value_that_ends_in_half_a_secret_is_kept() -> None:
    """Half a secret at the end of a value is no secret."""
    assert github().replace(SECRET + SECRET[:9]) == (b"[redacted:github]" + SECRET[:9], {"github": 1})


@pytest.mark.parametrize("size", range(1, len(SECRET) + 2))
def test_secret_does_not_slip_through_chunk_borders(size: int) -> None:
    """The border may be anywhere in the secret."""
    assert through(github(), chunks(b"a " + SECRET + b" b", size)) == b"a [redacted:github] b"


def test_basic_credentials_are_replaced_beside_the_secret_itself() -> None:
    """Several byte strings count under one name."""
    basic = base64.b64encode(b"octocat:" + SECRET)
    value, found = secret_replacer({"github": [SECRET, basic]}).replace(b"Basic " + basic + b" " + SECRET)
    assert value == b"Basic [redacted:github] [redacted:github]"
    assert found == {"github": 2}


def test_two_secrets_get_their_own_names() -> None:
    """Each is counted under its own name."""
    stream = secret_replacer({"one": [b"first secret"], "two": [b"second secret"]}).stream()
    assert stream.feed(b"<second secret|first secret>") == b"<[redacted:two]|[redacted:one]>"
    assert stream.found == {"one": 1, "two": 1}


def test_chunk_that_cannot_begin_a_secret_is_passed_on_whole() -> None:
    """A live stream is not delayed, and not even copied."""
    event = b"data: {}\n\n"
    assert github().stream().feed(event) is event


def test_only_the_beginning_of_a_secret_is_held_back() -> None:
    """What stands before it leaves at once; it follows as soon as it turns out harmless."""
    stream = github().stream()
    assert stream.feed(b"token=ghp_Z") == b"token="
    assert stream.feed(b"k3X") == b"ghp_Zk3X"
    assert stream.feed(b"g") == b""
    assert stream.finish() == b"g"


def test_longest_of_several_patterns_wins_even_across_chunks() -> None:
    """`ab` waits until `abcd` is excluded."""
    replacer = Replacer({b"ab": (b"1", "short"), b"abcd": (b"2", "long")})
    assert through(replacer, [b"ab", b"c", b"d."]) == b"2."
    assert through(replacer, [b"ab", b"c", b"x."]) == b"1cx."
    assert through(replacer, [b"ab"]) == b"1"


def test_longest_possible_beginning_is_held_back() -> None:
    """Not only the last few bytes of it, where they are a beginning too."""
    assert through(Replacer({b"aaaaaaab": (b"1", "x")}), [b"aaaaaa", b"ab"]) == b"1"


def test_leftmost_pattern_wins_over_a_longer_one_further_right() -> None:
    """What was replaced is not the beginning of anything."""
    replacer = Replacer({b"abc": (b"1", "left"), b"bcdefg": (b"2", "right")})
    assert through(replacer, [b"abcd", b"efg"]) == b"1defg"


def test_placeholder_becomes_the_secret_on_the_way_out() -> None:
    """The other direction is the same replacement."""
    replacer = Replacer({b"SALLYPORT_GITHUB": (SECRET, "github")})
    assert through(replacer, [b'{"token":"SALLYPORT', b'_GITHUB"}']) == b'{"token":"' + SECRET + b'"}'


def test_empty_pattern_is_refused() -> None:
    """It would be found between any two bytes."""
    with pytest.raises(ValueError, match="empty"):
        Replacer({b"": (b"x", "x")})


def test_no_patterns_change_nothing() -> None:
    """A replacer of secrets too short to redact lets everything through."""
    assert secret_replacer({"tiny": [b"abc", b""]}).replace(b"abc") == (b"abc", {})


def test_secret_does_not_show_in_repr() -> None:
    """A replacer or stream that is logged by accident tells nothing."""
    replacer = Replacer({b"placeholder": (SECRET, "github")})
    assert SECRET.decode() not in repr(replacer) + repr(replacer.stream())


@pytest.mark.parametrize("size", [16, 1400, 65536])
@pytest.mark.slow
def test_secret_of_1_mib_is_replaced_whole_and_never_held(size: int) -> None:
    """Only `HOLD` bytes wait; the rest is swallowed as it comes."""
    secret = zlib.compress(bytes(1 << 20)).hex().encode() * 510
    stream = Replacer({secret: (b"[redacted]", "big")}).stream()
    body = b"<" + secret + b">"
    tracemalloc.start()
    output = b"".join(filter(None, map(stream.feed, chunks(body, size)))) + stream.finish()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert output == b"<[redacted]>"
    assert stream.found == {"big": 1}
    assert len(secret) > 1 << 20
    assert peak < len(secret) / 2


def test_long_secret_cut_short_is_replaced_as_far_as_it_goes() -> None:
    """An upstream that quotes the first 2,000 bytes of a key shows none of them."""
    secret = bytes(range(32, 127)) * 40
    body = b"<" + secret[:2000] + b"\0>"
    for size in (1, 999, 5000):
        assert through(Replacer({secret: (b"[redacted]", "key")}), chunks(body, size)) == b"<[redacted]\0>"


def test_long_secret_that_broke_off_does_not_go_on_later() -> None:
    """Bytes that would have followed are of no interest once others came."""
    secret = bytes(range(32, 127)) * 40
    replacer = Replacer({secret: (b"[redacted]", "key")})
    assert through(replacer, [secret[:2000] + b"\0", secret[2000:2050]]) == b"[redacted]\0" + secret[2000:2050]


def test_long_patterns_with_one_beginning_are_told_apart() -> None:
    """The one that goes on furthest is swallowed."""
    same = bytes(range(32, 127)) * 20
    replacer = Replacer({same + b"/1": (b"x", "x"), same + b"%2F1": (b"x", "x")})
    assert through(replacer, chunks(same + b"%2F1." + same + b"/1.", 7)) == b"x.x."


class Deflate:
    """The shape of the other compressors around zlib."""

    def __init__(self, bits: int) -> None:
        self._object = zlib.compressobj(wbits=bits)

    def event(self, data: bytes) -> bytes:
        """`data` compressed and flushed."""
        return self._object.compress(data) + self._object.flush(zlib.Z_SYNC_FLUSH)

    def end(self) -> bytes:
        """The last bytes."""
        return self._object.flush()


class Brotli:
    """br, flushed per event."""

    def __init__(self) -> None:
        self._object = brotli.Compressor()

    def event(self, data: bytes) -> bytes:
        """`data` compressed and flushed."""
        return bytes(self._object.process(data) + self._object.flush())

    def end(self) -> bytes:
        """The last bytes."""
        return bytes(self._object.finish())


class Zstd:
    """zstd, flushed per event."""

    def __init__(self) -> None:
        self._object = zstandard.ZstdCompressor().compressobj()

    def event(self, data: bytes) -> bytes:
        """`data` compressed and flushed."""
        return self._object.compress(data) + self._object.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)

    def end(self) -> bytes:
        """The last bytes."""
        return self._object.flush()


@pytest.mark.parametrize(
    ("coding", "server"),
    [
        ("gzip", Deflate(31)),
        ("deflate", Deflate(15)),
        ("deflate", Deflate(-15)),
        ("br", Brotli()),
        ("zstd", Zstd()),
    ],
    ids=["gzip", "zlib", "raw", "br", "zstd"],
)
def test_each_compressed_event_comes_out_as_soon_as_it_went_in(coding: str, server: Deflate | Brotli | Zstd) -> None:
    """Server-sent events stay live through decoding and redaction."""
    body = BodyRedactor(github(), coding)
    assert [b"".join(body.feed(server.event(event))) for event in EVENTS] == REDACTED
    assert b"".join([*body.feed(server.end()), *body.finish()]) == b""
    assert body.found == {"github": 1}


def test_uncoded_events_come_out_as_they_went_in() -> None:
    """Without a coding there is nothing between."""
    body = BodyRedactor(github())
    assert [b"".join(body.feed(event)) for event in EVENTS] == REDACTED
    assert list(body.finish()) == []


def test_truncated_body_does_not_release_what_was_held() -> None:
    """The end of a body that is not the end is refused."""
    body = BodyRedactor(github(), "gzip")
    assert b"".join(body.feed(gzip.compress(b"token " + SECRET[:9])[:-8])) == b"token "
    with pytest.raises(Undecodable):
        body.finish()


def test_unknown_coding_is_refused_before_any_byte() -> None:
    """What cannot be scanned does not pass."""
    with pytest.raises(Undecodable):
        BodyRedactor(github(), "compress")
