"""Content codings undone piece by piece, and what an upstream is asked for."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib
from collections.abc import Callable

import brotli  # type: ignore[import-untyped]
import pytest
import zstandard

from proxy.coding import PIECE, Undecodable, decoder, narrow_accept_encoding

TEXT = b"The quick brown fox. " * 500


def br(data: bytes) -> bytes:
    """br at the speed of a server that compresses as it sends."""
    return bytes(brotli.compress(data, quality=4))


def raw_deflate(data: bytes) -> bytes:
    """deflate without zlib's header, as some servers send it."""
    return zlib.compress(data, wbits=-15)


ENCODERS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "x-gzip": ("X-GZIP", gzip.compress),
    "zlib": ("deflate", zlib.compress),
    "raw": ("deflate", raw_deflate),
    "br": ("br", br),
    "zstd": ("zstd", zstandard.compress),
}
EACH = pytest.mark.parametrize(("coding", "encode"), ENCODERS.values(), ids=ENCODERS)


def decoded(coding: str, *chunks: bytes) -> bytes:
    """`chunks` decoded to the end."""
    undo = decoder(coding)
    assert undo is not None
    output = b"".join(piece for chunk in chunks for piece in undo.decode(chunk))
    undo.finish()
    return output


@EACH
def test_body_is_decoded_whole_and_byte_by_byte(coding: str, encode: Callable[[bytes], bytes]) -> None:
    """Chunk borders do not matter."""
    body = encode(TEXT)
    assert decoded(coding, body) == TEXT
    assert decoded(coding, *(bytes([byte]) for byte in body)) == TEXT


@EACH
def test_truncated_body_is_refused(coding: str, encode: Callable[[bytes], bytes]) -> None:
    """Wherever it is cut."""
    body = encode(TEXT)
    for size in (1, 2, len(body) // 2, len(body) - 1):
        with pytest.raises(Undecodable):
            decoded(coding, body[:size])


@EACH
def test_bytes_after_the_end_are_refused(coding: str, encode: Callable[[bytes], bytes]) -> None:
    """Nobody would have looked at them."""
    for chunks in ([encode(TEXT) + b"secret"], [encode(TEXT), b"secret"], [encode(TEXT), b"s"]):
        with pytest.raises(Undecodable):
            decoded(coding, *chunks)


@EACH
def test_empty_body_is_complete(coding: str, encode: Callable[[bytes], bytes]) -> None:
    """An answer to HEAD names a coding and has no body; an empty body may be coded too."""
    assert decoded(coding) == b""
    assert decoded(coding, b"") == b""
    assert decoded(coding, encode(b"")) == b""


@EACH
def test_decompression_bomb_comes_in_small_pieces(coding: str, encode: Callable[[bytes], bytes]) -> None:
    """64 MiB out of few bytes never lie in memory together."""
    bomb = encode(bytes(64 << 20))
    undo = decoder(coding)
    assert undo is not None
    total = 0
    tracemalloc.start()
    for piece in undo.decode(bomb):
        assert 0 < len(piece) <= PIECE
        total += len(piece)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    undo.finish()
    assert total == 64 << 20
    assert peak < 12 << 20  # zstd: a slice of 4 MiB, joined from as much


def test_nothing_is_left_in_a_decoder_when_a_piece_was_full() -> None:
    """Input that is used up does not mean that all its output was given: a match of 258 bytes may be half copied."""
    for size in range(PIECE - 2, PIECE + 260):
        assert len(decoded("deflate", raw_deflate(bytes(size)))) == size


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_members_in_a_row_are_one_body(coding: str) -> None:
    """RFC 1952 section 2.2, RFC 8878 section 3; the border may lie anywhere in a chunk."""
    body = b"".join(ENCODERS[coding][1](part) for part in (b"one,", b"", b"two,", TEXT))
    for size in (1, 7, len(body)):
        assert decoded(coding, *(body[at : at + size] for at in range(0, len(body), size))) == b"one,two," + TEXT


def test_codings_are_undone_last_first() -> None:
    """RFC 9110 section 8.4: they are listed in the order they were applied; identity and empty elements do nothing."""
    body = br(zstandard.compress(gzip.compress(TEXT)))
    assert decoded("gzip, identity,, zstd ,BR", body[:100], body[100:]) == TEXT


@pytest.mark.parametrize("value", ["", " ", "identity", "Identity, identity"])
def test_nothing_to_undo_is_none(value: str) -> None:
    """Such a body is scanned as it is."""
    assert decoder(value) is None


@pytest.mark.parametrize("value", ["compress", "gzip, dcb", "gzip;q=1", "gzip br", "*", ", ".join(["gzip"] * 5)])
def test_coding_that_cannot_be_undone_is_refused(value: str) -> None:
    """Unknown ones, malformed ones, and a row so long that it costs too much memory."""
    with pytest.raises(Undecodable):
        decoder(value)


def test_zstd_window_beyond_8_mib_is_refused() -> None:
    """RFC 9659: the sender must not ask for more, and 2 GiB for one body would be an attack."""
    parameters = zstandard.ZstdCompressionParameters(window_log=24)
    body = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    with pytest.raises(Undecodable):
        decoded("zstd", body.compress(TEXT) + body.flush())


@pytest.mark.parametrize(
    ("accepted", "asked"),
    [
        ([], "identity"),
        ([""], "identity"),
        (["gzip, deflate, br, zstd"], "gzip, deflate, br, zstd"),
        (["gzip", "br"], "gzip, br"),
        (["GZIP;Q=0.5 , br ; q=1.0,zstd;q=0"], "gzip;q=0.5, br"),
        (["compress, dcz, exi"], "identity"),
        (["*"], "gzip, br, zstd, deflate, identity"),
        (["br;q=0, *;q=0.3"], "gzip;q=0.3, zstd;q=0.3, deflate;q=0.3, identity;q=0.3"),
        (["x-gzip"], "gzip"),
        (["*;q=0"], "identity"),
        (["identity;q=0"], "identity"),
        (["gzip;q=2, br;q=0.1234, zstd;level=3, deflate"], "deflate"),
        (["gzip;q=0.\u0663"], "identity"),
    ],
)
def test_only_scannable_codings_are_asked_for(accepted: list[str], asked: str) -> None:
    """The client's weights are kept; what is not well-formed is not asked for."""
    assert narrow_accept_encoding(accepted) == asked
