"""The sealed records behind the vault: what the store says is believed only after it opened and is not outdated.

A removed credential leaves a sealed tombstone with the next version, so that nothing older can be put back and a later
credential of that name goes on counting. No lease, no grant and no plaintext is kept here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from proxy.masterkey import seals_now
from proxy.problem import UserError
from proxy.rollback import HighWater
from proxy.sealing import MasterKey, Random, Record, SealBroken, Stored, open_sealed, seal
from proxy.secret import Secret
from proxy.store import Store

TABLE = "vault"
GATEWAY = "gateway:"  # begins the name of a gateway's key; no credential's name has a colon, so no rule can inject one
_TOMBSTONE = "removed"  # a kind no operator can write
_SANE = 1 << 53  # a version above is a forger's, and not counted on from


@dataclass(frozen=True, slots=True)
class Opened:
    """A record that was authenticated, and its secret."""

    stored: Stored
    secret: Secret

    @property
    def version(self) -> int:
        """Counts up for ever, also over removal."""
        return self.stored.record.version

    @property
    def removed(self) -> bool:
        """Whether this is the tombstone of a credential."""
        return self.stored.record.kind == _TOMBSTONE


def is_gateway(name: str) -> bool:
    """Whether the record is a gateway's key."""
    return name.startswith(GATEWAY)


class Records:
    """The records of one store, under one master key."""

    def __init__(self, store: Store, master: MasterKey, state_dir: Path, random: Random) -> None:
        """Raises UserError for a damaged state file."""
        self._store = store
        self._master = master
        self._random = random
        self._water = HighWater(state_dir)

    def marks(self) -> Mapping[str, int]:
        """What `open` must be given, taken before the record was read: what came in between is no rollback.

        Raises UserError.
        """
        return self._water.marks()

    def open(self, name: str, text: str, marks: Mapping[str, int]) -> Opened:
        """A record that is what was sealed, and as new as any seen of its name before. Raises SealBroken."""
        stored = Stored.parse(name, text)
        secret = open_sealed(self._master, stored.record, stored.sealed)
        mark = marks.get(name, 0)
        if stored.record.version < mark:
            raise SealBroken(
                f"its version {stored.record.version} is older than {mark}, which was seen before; "
                f"if the store was restored on purpose, put it again or delete {self._water.path}"
            )
        return Opened(stored, secret)

    def present(self, name: str, text: str | None, marks: Mapping[str, int]) -> Opened:
        """The same for an operator, who wants one that is there. Raises UserError for everything else."""
        try:
            opened = self.open(name, text, marks) if text else None
        except SealBroken as error:
            raise UserError(f"the credential {name} does not open: {error}; `sallyport vault put {name}`") from None
        if opened is None or opened.removed:
            raise UserError(f"there is no credential {ascii(name)[1:-1]}: `sallyport vault list` shows those there are")
        return opened

    async def note(self, versions: Mapping[str, int]) -> None:
        """Remembers authenticated versions, on disk when this returns. Raises UserError."""
        if any(version > self._water.known(name) for name, version in versions.items()):
            await asyncio.to_thread(self._water.rise, versions)

    def outdated(self, name: str, version: int) -> bool:
        """Whether this process has seen a newer version of `name`."""
        return version < self._water.known(name)

    async def write(self, name: str, secret: Secret, draft: Callable[[str | None], Stored]) -> int:
        """Seals `secret` as the next version of `name`; the version.

        `draft` is given the text there now and returns the record; number and seal are filled in. Raises UserError.
        """
        version = 0

        def change(old: str | None) -> str:
            nonlocal version
            stored = draft(old)
            version = self._next(name, old)
            record = replace(stored.record, version=version)
            return replace(stored, record=record, sealed=seal(self._master, record, secret, self._random)).text()

        await self._store.change(TABLE, name, change)
        await self.note({name: version})
        if not await seals_now(self._store, self._master):  # `rekey` may have passed this record already
            raise UserError("the master key was changed at the same time: do it again")
        return version

    async def bury(self, name: str, now: float) -> int:
        """Puts a tombstone, dated `now` (Unix seconds), in the place of a record; its version. Raises UserError."""

        marks = self.marks()

        def draft(old: str | None) -> Stored:
            if old is None or self._buried(name, old, marks):
                self.present(name, None, marks)
            return Stored(Record(name, 0, _TOMBSTONE, {}, {}), "", now, None)

        return await self.write(name, Secret(b""), draft)

    def _buried(self, name: str, text: str, marks: Mapping[str, int]) -> bool:
        try:
            return self.open(name, text, marks).removed
        except SealBroken:
            return False

    def _next(self, name: str, old: str | None) -> int:
        """A version above every one seen of `name`, and above what the store claims, true or not."""
        try:
            claimed = Stored.parse(name, old).record.version if old else 0
        except SealBroken:
            claimed = 0
        return max(self._water.marks().get(name, 0), claimed if claimed < _SANE else 0) + 1
