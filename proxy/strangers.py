"""Connections that have not said yet whose they are: so many from a source, and then the one that waited longest goes.

So who opens thousands and says nothing takes nothing from others, not even from those behind the same address.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable


class Strangers:
    """`most` for each source; `on_cut` is told of each that was cut."""

    def __init__(self, most: int, on_cut: Callable[[], None]) -> None:
        self._most = most
        self._on_cut = on_cut
        self._sources: dict[str, OrderedDict[object, Callable[[], None]]] = {}

    def add(self, source: str, key: object, cut: Callable[[], None]) -> None:
        """A connection that is nobody's so far; `cut` ends it."""
        there = self._sources.setdefault(source, OrderedDict())
        there[key] = cut
        if len(there) > self._most:
            _, longest = there.popitem(last=False)
            self._on_cut()
            longest()

    def remove(self, source: str, key: object) -> None:
        """It is somebody's now, or gone."""
        if there := self._sources.get(source):
            there.pop(key, None)
            if not there:
                del self._sources[source]
