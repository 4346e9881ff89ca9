"""Follows the store's change feed, so that what a process remembers is at most a poll behind. Knows no record."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from proxy.store import Revision, Store

type Apply = Callable[[set[str] | None], Awaitable[None]]

INTERVAL = 0.2  # seconds; a kill or rotation must reach every worker within one
_REVIVE_MOST = 5.0  # seconds between attempts to start a dead embedded server, at most
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Follower:
    table: str
    apply: Apply
    pending: set[str] | None  # names not applied yet; None: everything


class Follower:
    """One per process. `up` is whether the store answered the last poll and everything it told was applied."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self.up = False
        self._store = store
        self._clock = clock
        self._followers: list[_Follower] = []
        self._revision = Revision()
        self._told: set[str] = set()  # troubles of this outage that were logged
        self._wait = INTERVAL
        self._revive_at = 0.0

    def subscribe(self, table: str, apply: Apply) -> None:
        """Has `apply` awaited with the names of changed records of `table`, and with None to load everything."""
        self._followers.append(_Follower(table, apply, None))

    async def run(self) -> None:
        """Polls until cancelled, whatever happens."""
        while True:
            await self.poll()
            await asyncio.sleep(INTERVAL)

    async def poll(self) -> None:
        """One look at the feed; never raises. After an outage everything is loaded again."""
        try:
            revision, changed = await self._store.changes_since(self._revision)
        except Exception as error:
            self._failed(error)
            await self._revive()
            return
        self._revision = revision
        for follower in self._followers:
            _add(follower, changed)
        troubles = [trouble for follower in self._followers if (trouble := await _apply(follower))]
        if troubles:
            self._failed(troubles[0])
            return
        if self._told:
            _log.warning("the store is back")
        self.up, self._wait = True, INTERVAL
        self._told.clear()

    def _failed(self, error: Exception) -> None:
        self.up = False
        text = f"{type(error).__name__}: {error}"
        if text not in self._told:  # once, not five times a second
            _log.warning("cannot follow the store: %s", text)
        self._told.add(text)

    async def _revive(self) -> None:
        """Starts a dead embedded server again, ever more seldom while that fails."""
        self._revision = Revision()
        if self._clock() < self._revive_at:
            return
        try:
            await self._store.ensure()
        except Exception as error:
            self._failed(error)
        self._revive_at = self._clock() + self._wait
        self._wait = min(self._wait * 2, _REVIVE_MOST)


def _add(follower: _Follower, changed: set[str] | None) -> None:
    if changed is None or follower.pending is None:
        follower.pending = None
        return
    prefix = follower.table + "/"
    follower.pending |= {name.removeprefix(prefix) for name in changed if name.startswith(prefix)}


async def _apply(follower: _Follower) -> Exception | None:
    """Tells one subscriber. One that fails keeps what it missed, and does not keep the others waiting."""
    names = follower.pending
    if names is not None and not names:
        return None
    try:
        await follower.apply(names)
    except Exception as error:
        return error
    follower.pending = set()
    return None
