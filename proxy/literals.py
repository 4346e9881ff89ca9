"""Whether any of some byte strings is in a long one, looked up by SIMD. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import batched

from ahocorasick_rs import BytesAhoCorasick, MatchKind

WORTH = 4096  # bytes: with fewer, other ways are as fast where one pass is not enough
_BATCH = 64  # texts that are sought at once: with more it falls back to a pass of 150 microseconds for 64 KiB
_NEVER = 6 * _BATCH  # texts beyond which the passes take longer than one of RE2


class Literals:
    """Some texts; 64 KiB without any of them take 6 microseconds for ten of them, and 20 for 64."""

    __slots__ = ("_searches", "_texts")

    def __init__(self, texts: Iterable[bytes]) -> None:
        """`texts`: none of them empty. They are made ready, which takes long, when they are first sought."""
        self._texts = tuple(texts)
        self._searches: list[BytesAhoCorasick] | None = None

    def absent(self, data: bytes) -> bool:
        """Whether it is known that none is in `data`. What is short, or too much work, is not looked into."""
        if len(self._texts) > (_BATCH if len(data) < WORTH else _NEVER):
            return False
        if self._searches is None:
            # SIMD is only used for leftmost matches.
            kind = MatchKind.LeftmostFirst
            self._searches = [BytesAhoCorasick(texts, kind) for texts in batched(self._texts, _BATCH)]
        for search in self._searches:  # noqa: SIM110  # `all` takes longer than the search in a short text
            if search.find_matches_as_indexes(data):
                return False
        return True
