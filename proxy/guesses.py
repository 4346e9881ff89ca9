"""How many wrong tokens a source address may show. A right one is always taken: nobody who shares an address can be
locked out by another, and what is limited is the noise of guessing, which 256 random bits make hopeless anyway."""

from __future__ import annotations

from collections import OrderedDict
from ipaddress import IPv6Address

from proxy.address import ip_literal, unmapped

BURST = 100  # wrong proofs at once: a fleet that was given old tokens is told so
EVERY = 1.0  # seconds until one more is answered as such
SOURCES = 4096  # addresses remembered, the longest idle forgotten first
_SITE = 64  # bits of an IPv6 address that one sandbox cannot choose (RFC 4291 section 2.5.4)


class Guesses:
    """A token bucket for each source address (an IPv6 one by its /64), bounded in memory."""

    def __init__(self, burst: int = BURST, every: float = EVERY) -> None:
        self._burst, self._every = burst, every
        self._sources: OrderedDict[str, tuple[float, float]] = OrderedDict()  # what is left, and when it was

    def __len__(self) -> int:
        return len(self._sources)

    def too_many(self, source: str, now: float) -> bool:
        """Count a wrong proof shown by `source` at `now` (seconds); whether it is beyond what is answered as such."""
        key = _network(source)
        left, since = self._sources.get(key, (float(self._burst), now))
        left = min(self._burst, left + max(0.0, now - since) / self._every)  # a clock may jump back
        over = left < 1
        self._sources[key] = (left if over else left - 1), now
        self._sources.move_to_end(key)
        if len(self._sources) > SOURCES:
            self._sources.popitem(last=False)
        return over


def _network(source: str) -> str:
    address = ip_literal(source.partition("%")[0])
    address = unmapped(address) if address else None
    if isinstance(address, IPv6Address):
        return f"{int(address) >> 128 - _SITE:x}/{_SITE}"
    return str(address or source)
