"""Credentials: sealed in the store, opened for a while in memory, each limited by its own grant.

Which credential a request gets is policy's decision; how it is injected is not known here.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from proxy.agent import Agent
from proxy.credential import check_kind, check_secret, parse_name
from proxy.grant import Grant
from proxy.outbound import Opened
from proxy.problem import UserError
from proxy.records import TABLE, Records, is_gateway
from proxy.request import RequestView
from proxy.sealing import MasterKey, Random, Record, SealBroken, Stored
from proxy.secret import Secret
from proxy.store import Store, StoreUnavailable

LEASE = 60.0  # seconds

# Told of changed names (None: all) and of each that is there its name, secret, fields and grant.
type Opening = tuple[str, Secret, Mapping[str, str], Grant | None]
type OnChange = Callable[[set[str] | None, list[Opening]], Awaitable[None]]


class CredentialUnavailable(Exception):
    """There is no such credential, it does not open, or the store is down and no lease is left. For the operator."""


class CredentialScope(Exception):
    """The credential's own grant does not cover the request; the text says which part of it."""


@dataclass(frozen=True, slots=True)
class Lease(Opened):
    """A credential opened until `until` (monotonic seconds)."""

    grant: Grant
    until: float


@dataclass(frozen=True, slots=True)
class Entry:
    """What may be shown of a credential. Times are Unix seconds. One that does not open has only a `problem`."""

    name: str
    version: int = 0
    kind: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    grant: Grant | None = None
    created: float = 0.0
    rotated: float | None = None
    problem: str = ""


class Vault:
    """The credentials of one store, as one process sees them."""

    def __init__(
        self,
        store: Store,
        master: MasterKey,
        state_dir: Path,
        lease_seconds: float = LEASE,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        random: Random = os.urandom,
        on_operation: Callable[[str, str], None] = lambda operation, result: None,
    ) -> None:
        """`on_operation(operation, result)` is told of everything done. Raises UserError for a damaged state file."""
        self._store = store
        self._records = Records(store, master, state_dir, random)
        self._lease_seconds = lease_seconds
        self._clock = clock
        self.monotonic = monotonic
        self._count = on_operation
        self._leases: dict[str, Lease] = {}
        self.on_change: OnChange | None = None
        self.on_leases: Callable[[], None] = lambda: None  # told when the open ones are others
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    # For the operator

    async def put(self, name: str, kind: str, fields: Mapping[str, str], secret: Secret, grant: Grant) -> int:
        """Seals a new version of `name`, whatever was there before; the version. Raises UserError."""
        parse_name(name)
        check_kind(kind, fields)
        check_secret(secret, kind)
        draft = Stored(Record(name, 0, kind, dict(fields), grant.canonical()), "", self._clock(), None)
        return await self._change("put", name, self._records.write(name, secret, lambda _: draft))

    async def rotate(self, name: str, secret: Secret) -> int:
        """Seals a new version with another secret and everything else as it was; the version. Raises UserError."""
        marks = self._records.marks()

        def draft(old: str | None) -> Stored:
            present = self._records.present(name, old, marks).stored
            check_secret(secret, present.record.kind)
            return Stored(present.record, "", present.created, self._clock())

        return await self._change("rotate", name, self._records.write(name, secret, draft))

    async def remove(self, name: str) -> None:
        """Takes the credential away for good. Raises UserError if there is none."""
        await self._change("remove", name, self._records.bury(name, self._clock()))

    async def list(self) -> list[Entry]:
        """Everything in the vault by name, with what is wrong with it. Raises StoreUnavailable."""
        marks = self._records.marks()
        texts = await self._counted("list", self._store.get_all(TABLE))
        entries = (self._entry(name, text, marks) for name, text in sorted(texts.items()) if not is_gateway(name))
        return [entry for entry in entries if entry]

    async def show(self, name: str) -> Entry:
        """One credential without its secret. Raises UserError if there is none."""
        marks = self._records.marks()
        text = await self._counted("list", self._store.get(TABLE, name))
        entry = self._entry(name, text, marks) if text else None
        if entry is None:
            raise UserError(f"there is no credential {ascii(name)[1:-1]}: `sallyport vault list` shows those there are")
        return entry

    # For the proxy

    async def open(self, name: str) -> Lease:
        """The credential, opened.

        Raises CredentialUnavailable.
        """
        try:
            return self.cached(name) or await self._renew(name)
        except CredentialUnavailable:
            self._count("lease", "unavailable")
            raise

    def check(self, lease: Lease, agent: Agent, view: RequestView, now: float) -> None:
        """Whether `agent` may use it for the request as it will be sent, at `now` (Unix seconds).

        Raises CredentialScope.
        """
        refusal = lease.grant.refusal(agent, view, now)
        self._count("lease", "denied" if refusal else "ok")
        if refusal:
            raise CredentialScope(refusal)

    def cached(self, name: str) -> Lease | None:
        """The credential if it is open now; no round trip, and no check of its grant."""
        lease = self._leases.get(name)
        return lease if lease and lease.until > self.monotonic() else None

    def leased(self) -> Mapping[str, Lease]:
        """Every credential that is open, or was until lately: another object after each change."""
        return self._leases

    def keep_for(self, agents: Collection[str]) -> None:
        """Forgets every credential that none of these agents may use."""
        self._keep(lambda lease: any(map(lease.grant.covers_agent, agents)))

    async def apply_changes(self, names: set[str] | None) -> None:
        """Forgets what changed (None: anything may have) and takes note of the new versions.

        Raises StoreUnavailable, UserError; a record that does not open is only forgotten.
        """
        self._forget(names or ())
        marks = self._records.marks()
        texts = await self._store.get_all(TABLE, names)
        versions, openings = {}, list[Opening]()
        for name, text in texts.items():
            try:
                opened = self._records.open(name, text, marks)
            except SealBroken:
                self._count("open", "broken")
                continue
            versions[name] = opened.version
            if not opened.removed:
                openings.append((name, opened.secret, opened.stored.record.fields, _grant(opened.stored.record)))
        # First, so that an opening that began before the change finds its version outdated.
        await self._records.note(versions)
        self._forget(set(self._leases) if names is None else names)
        if self.on_change:
            await self.on_change(names, openings)

    # Inside

    def _forget(self, names: Iterable[str]) -> None:
        gone = set(names)
        if not gone.isdisjoint(self._leases):
            self._keep(lambda lease: lease.name not in gone)

    def _keep(self, holds: Callable[[Lease], bool], *more: Lease) -> None:
        self._leases = {lease.name: lease for lease in (*filter(holds, self._leases.values()), *more)}
        self.on_leases()

    async def _renew(self, name: str) -> Lease:
        async with self._locks[name]:  # one look at the store, however many requests wait for it
            lease = self.cached(name)
            while lease is None or self._records.outdated(name, lease.version):
                lease = await self._ask(name)
            now = self.monotonic()
            self._keep(lambda other: other.until > now and other.name != name, lease)
            return lease

    async def _ask(self, name: str) -> Lease:
        try:
            marks = self._records.marks()
            text = await self._store.get(TABLE, name)
            if text is None:
                raise CredentialUnavailable(f"there is no credential {name}")
            opened = self._records.open(name, text, marks)
            await self._records.note({name: opened.version})
            if opened.removed:
                raise CredentialUnavailable(f"the credential {name} was removed")
            record = opened.stored.record
            grant = Grant.from_canonical(record.grant)
        except SealBroken as error:
            self._count("open", "broken")
            raise CredentialUnavailable(f"the credential {name} does not open: {error}") from None
        except (UserError, ValueError) as error:
            self._count("open", "unavailable")
            raise CredentialUnavailable(f"the credential {name} cannot be opened: {error}") from None
        self._count("open", "ok")
        until = self.monotonic() + self._lease_seconds
        return Lease(name, record.version, record.kind, record.fields, opened.secret, grant, until)

    async def _change(self, operation: str, name: str, work: Awaitable[int]) -> int:
        version = await self._counted(operation, work)
        self._forget([name])
        return version

    async def _counted[T](self, operation: str, work: Awaitable[T]) -> T:
        result = "denied"
        try:
            answer = await work
            result = "ok"
            return answer
        except StoreUnavailable:
            result = "unavailable"
            raise
        finally:
            self._count(operation, result)

    def _entry(self, name: str, text: str, marks: Mapping[str, int]) -> Entry | None:
        try:
            opened = self._records.open(name, text, marks)
            if opened.removed:
                return None
            stored, record = opened.stored, opened.stored.record
            grant = Grant.from_canonical(record.grant)
        except (SealBroken, ValueError) as error:
            return Entry(ascii(name)[1:-1], problem=str(error))  # not ours: it may hold terminal escapes
        return Entry(name, record.version, record.kind, record.fields, grant, stored.created, stored.rotated)


def _grant(record: Record) -> Grant | None:
    try:
        return Grant.from_canonical(record.grant)
    except ValueError:
        return None
