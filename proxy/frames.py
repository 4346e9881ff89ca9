"""The frames of an HTTP/2 peer, read only as far as it takes to bound them (RFC 9113 section 4.1). Pure.

HTTP/2 lets a few bytes ask for much work: a stream opened and reset (CVE-2023-44487), a header block without end
(CVE-2024-27316), pings, settings and empty frames (CVE-2019-9512, -9515, -9518). What no client needs in such numbers
is refused; all else is cut into pieces of little work, between which others have their turn.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PREFACE = 24  # bytes with which a client begins (RFC 9113 section 3.4)
_HEADER = 9  # bytes of every frame's header
_DATA, _HEADERS, _RST_STREAM, _PUSH_PROMISE, _WINDOW_UPDATE, _CONTINUATION = 0, 1, 3, 5, 8, 9
_END_HEADERS = 0x4
_HEADER_BLOCK = frozenset({_HEADERS, _PUSH_PROMISE, _CONTINUATION})
_REQUEST_COST = 16  # small frames that cost as much as one request does at the least
_PIECE = 32  # small frames, or two requests: a few milliseconds

RESETS = (200.0, 20.0)  # streams given up: at once, and a second; a client with a full house may cancel all of it
CONTROL = (1000.0, 200.0)  # PING, SETTINGS, PRIORITY, empty and unknown frames


class Flood(ValueError):
    """A peer that asks for work and none of its results; the text quotes nothing."""


@dataclass(slots=True)
class FrameBudget:
    """What an agent may still spend, on all its connections: tokens that come back with time."""

    resets: float = RESETS[0]
    control: float = CONTROL[0]
    at: float = 0.0

    def spend(self, now: float, resets: int = 0, control: int = 0) -> None:
        """Take tokens at `now` (seconds of a clock that never goes back).

        Raises Flood.
        """
        passed, self.at = max(0.0, now - self.at), now
        self.resets = min(RESETS[0], self.resets + passed * RESETS[1]) - resets
        self.control = min(CONTROL[0], self.control + passed * CONTROL[1]) - control
        if self.resets < 0:
            raise Flood("too many streams were reset")
        if self.control < 0:
            raise Flood("too many frames that carry nothing")


@dataclass(slots=True)
class FrameReader:
    """Follows one peer's frames. `skip`: bytes that are no frame's header; `limit`: bytes of a header block."""

    limit: int
    budget: FrameBudget = field(default_factory=FrameBudget)
    skip: int = 0
    _header: bytes = b""
    _block: int = 0

    def pieces(self, data: bytes, now: float) -> list[bytes]:
        """`data` in pieces of little work each.

        Raises Flood, before any of it was acted on.
        """
        found: list[bytes] = []
        cut = work = resets = control = 0
        at, left = self.skip, len(data)
        header = self._header
        while at + _HEADER - len(header) <= left:
            start = at
            at += _HEADER - len(header)
            header += data[start:at]
            length, kind, flags = int.from_bytes(header[:3]), header[3], header[4]
            header = b""
            if kind in _HEADER_BLOCK:
                self._follow_block(length, flags)
            if kind == _RST_STREAM:
                resets += 1
            elif kind not in (_DATA, _HEADERS, _WINDOW_UPDATE) or not length:
                control += 1
            if work >= _PIECE:
                found.append(data[cut:start])
                cut, work = start, 0
            work += _REQUEST_COST if kind == _HEADERS else 1
            at += length
        if at < left:
            header += data[at:]
            at = left
        self.skip, self._header = at - left, header
        if resets or control:
            self.budget.spend(now, resets, control)
        found.append(data[cut:])
        return found

    def _follow_block(self, length: int, flags: int) -> None:
        self._block += length
        if self._block > self.limit:
            raise Flood(f"a header block is larger than {self.limit} bytes")
        if flags & _END_HEADERS:
            self._block = 0
