"""Content codings (RFC 9110 section 8.4): which ones can be scanned, and their decoding piece by piece.

What is searched for in the decoded bytes, and what becomes of the Content-Encoding header, lies elsewhere.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Protocol

import brotli  # type: ignore[import-untyped]
import zstandard

SCANNABLE = ("gzip", "br", "zstd", "deflate", "identity")
PIECE = 65536  # bytes: the most one step yields
_MAX_CODINGS = 4  # each costs 40 KiB to 16 MiB of window; a header of 1,000 codings would cost 1,000 of them
_ZSTD_WINDOW = 8 << 20  # RFC 9659: a decoder for HTTP need not take more
_ZSTD_SLICE = 128  # a block of 4 bytes grows to 128 KiB (RFC 8878 section 3.1.1.2), so a slice to 4 MiB
_PREFERENCE = re.compile(r"\s*([^\s;=]+)\s*(?:;\s*q=(0(?:\.\d{0,3})?|1(?:\.0{0,3})?)\s*)?", re.ASCII | re.IGNORECASE)


class Undecodable(Exception):
    """A body that cannot be read to its end: broken, truncated, followed by something else, or of an unknown coding."""


class _Stage(Protocol):
    def decode(self, data: bytes) -> Iterator[bytes]: ...

    def complete(self) -> bool: ...


class _Inflate:
    """gzip with any number of members (RFC 1952 section 2.2), or one deflate stream."""

    def __init__(self, window_bits: Callable[[bytes], int], members: bool) -> None:
        self._window_bits = window_bits
        self._members = members
        self._start = b""
        self._member: zlib._Decompress | None = None
        self._ended = False

    def decode(self, data: bytes) -> Iterator[bytes]:
        full = False
        while data or full:
            if self._member is None:
                data = self._start + data
                if self._ended and not self._members:
                    raise Undecodable("bytes after the end of a deflate body")
                if len(data) < 2:  # what window_bits has to see
                    self._start = data
                    return
                self._start = b""
                self._member = zlib.decompressobj(self._window_bits(data))
            piece = self._member.decompress(data, PIECE)
            full = len(piece) == PIECE
            data = self._member.unconsumed_tail
            if self._member.eof:
                data, full, self._ended = self._member.unused_data, False, True
                self._member = None
            if piece:
                yield piece

    def complete(self) -> bool:
        return self._member is None and not self._start


class _Brotli:
    """br (RFC 7932). The decoder itself refuses bytes after the end."""

    def __init__(self) -> None:
        self._decoder = brotli.Decompressor()
        self._begun = False

    def decode(self, data: bytes) -> Iterator[bytes]:
        self._begun = True
        piece = self._decoder.process(data, output_buffer_limit=PIECE)
        while piece or not self._decoder.can_accept_more_data():  # which is silent on output still to come
            yield from _pieces(piece)
            piece = self._decoder.process(b"", output_buffer_limit=PIECE)

    def complete(self) -> bool:
        return not self._begun or bool(self._decoder.is_finished())


class _Zstd:
    """zstd with any number of frames (RFC 8878). Input goes in by slices, because output cannot be limited."""

    def __init__(self) -> None:
        self._decoder = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        self._frame: zstandard.ZstdDecompressionObj | None = None

    def decode(self, data: bytes) -> Iterator[bytes]:
        for start in range(0, len(data), _ZSTD_SLICE):
            rest = data[start : start + _ZSTD_SLICE]
            while rest:
                if self._frame is None:
                    self._frame = self._decoder.decompressobj()
                yield from _pieces(self._frame.decompress(rest))
                rest = self._frame.unused_data if self._frame.eof else b""
                if self._frame.eof:
                    self._frame = None

    def complete(self) -> bool:
        return self._frame is None


def _pieces(data: bytes) -> Iterator[bytes]:
    if len(data) <= PIECE:
        return iter((data,) if data else ())
    return (data[at : at + PIECE] for at in range(0, len(data), PIECE))


def _gzip_bits(start: bytes) -> int:
    return 16 + zlib.MAX_WBITS


def _deflate_bits(start: bytes) -> int:
    """RFC 9110 section 8.4.1.2 wants zlib's header (RFC 1950 section 2.2), but some servers send the bare stream."""
    wrapped = start[0] & 15 == 8 and int.from_bytes(start[:2]) % 31 == 0
    return zlib.MAX_WBITS if wrapped else -zlib.MAX_WBITS


_STAGES: dict[str, Callable[[], _Stage]] = {
    "gzip": lambda: _Inflate(_gzip_bits, members=True),
    "deflate": lambda: _Inflate(_deflate_bits, members=False),
    "br": _Brotli,
    "zstd": _Zstd,
}


class Decoder:
    """Undoes codings in a row. Once it raised `Undecodable` it is of no further use."""

    def __init__(self, codings: Sequence[str]) -> None:
        self._stages = [_STAGES[coding]() for coding in reversed(codings)]

    def decode(self, chunk: bytes) -> Iterator[bytes]:
        """All that `chunk` brings to light, in pieces of at most `PIECE` bytes. Exhaust it before the next call.

        Raises Undecodable.
        """
        pieces: Iterable[bytes] = (chunk,) if chunk else ()
        for stage in self._stages:
            pieces = chain.from_iterable(map(stage.decode, pieces))
        try:
            yield from pieces
        except (zlib.error, brotli.error, zstandard.ZstdError):
            raise Undecodable("the body is not what its content-encoding says") from None

    def finish(self) -> None:
        """The body ended here. Raises Undecodable if it was cut short; an empty body is complete (HEAD, 304)."""
        if not all(stage.complete() for stage in self._stages):
            raise Undecodable("the body ends before its content-encoding does")


def decoder(content_encoding: str) -> Decoder | None:
    """What undoes a Content-Encoding (several header lines joined by commas); None if there is nothing to undo.

    Raises Undecodable for a coding nobody here knows, or too many of them.
    """
    codings = [_canonical(name) for name in content_encoding.split(",")]
    codings = [name for name in codings if name not in ("", "identity")]
    if len(codings) > _MAX_CODINGS or not _STAGES.keys() >= set(codings):
        raise Undecodable("the body has a content-encoding that cannot be undone")
    return Decoder(codings) if codings else None


def narrow_accept_encoding(values: Sequence[str]) -> str:
    """What to ask an upstream for, given the Accept-Encoding lines of a client (RFC 9110 section 12.5.3).

    Scannable codings only, with the client's weights; `identity` where that leaves nothing.
    """
    weights: dict[str, str] = {}
    for preference in ",".join(values).split(","):
        if found := _PREFERENCE.fullmatch(preference):
            weights[_canonical(found[1])] = found[2] or "1"
    rest = weights.pop("*", "0")
    weights |= {coding: rest for coding in SCANNABLE if coding not in weights}
    wanted = [(coding, weight) for coding, weight in weights.items() if coding in SCANNABLE and float(weight) > 0]
    return ", ".join(name if float(weight) == 1 else f"{name};q={weight}" for name, weight in wanted) or "identity"


def _canonical(coding: str) -> str:
    name = coding.strip().lower()
    return "gzip" if name == "x-gzip" else name  # RFC 9110 section 8.4.1.3
