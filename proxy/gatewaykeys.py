"""Gateways: trusted parents of sandboxes that mint short-lived tokens for agents, each with a key of its own.

A token is a JWT (RFC 7519) signed with HS256 under the gateway's key, whose bytes are the characters that
`sallyport gateway add` printed: `kid` in its header names the gateway, `sub` the agent, `exp` the end. The key lies
sealed among the credentials, with the agents it may speak for and the longest life of its tokens as associated data:
whoever can write to the store can neither widen a gateway nor put a removed one back.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxy.agent import is_agent_id
from proxy.agenttoken import make_token
from proxy.claims import Unsigned, number, split, subject
from proxy.pattern import Glob, any_glob, text_glob
from proxy.problem import UserError
from proxy.proof import Proof
from proxy.records import GATEWAY, TABLE, Records, is_gateway
from proxy.sealing import MasterKey, Random, Record, SealBroken, Stored, mac_matches
from proxy.secret import Secret
from proxy.store import Store

LIFE = 300.0  # seconds a token may live, unless the gateway was added with another --ttl
MAX_LIFE = 3600.0  # seconds; a token that was seen by somebody else can be used so long
SKEW = 5.0  # seconds the clocks of gateway and proxy may differ
VERIFIED = 4096  # tokens whose signature was checked, remembered
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_AGENTS = re.compile(r"[A-Za-z0-9._*-]+")
_KIND = "gateway"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Gateway:
    """One gateway: whom it may speak for (globs), and how long its tokens may live, in seconds."""

    name: str
    agents: tuple[str, ...]
    life: float
    created: float = 0.0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class _Key:
    gateway: Gateway
    agents: tuple[Glob, ...]
    secret: Secret


class GatewayKeys:
    """The gateways of one store, as one process sees them."""

    def __init__(
        self,
        store: Store,
        master: MasterKey,
        state_dir: Path,
        *,
        clock: Callable[[], float] = time.time,
        random: Random = os.urandom,
    ) -> None:
        """Raises UserError for a damaged state file."""
        self._store = store
        self._records = Records(store, master, state_dir, random)
        self._clock = clock
        self._random = random
        self._keys: dict[str, _Key] = {}
        self._verified: dict[str, tuple[_Key, dict[str, Any]]] = {}

    # For the proxy

    def __bool__(self) -> bool:
        return bool(self._keys)

    def verify(self, token: str, now: float) -> Proof | None:
        """What a token proves at `now` (Unix seconds); None: nothing."""
        known = self._verified.get(token) or self._checked(token)
        if known is None:
            return None
        key, claims = known
        expires, begins = number(claims, "exp"), number(claims, "nbf")
        agent, told = subject(claims)
        if expires is None or not now < expires + SKEW or expires > now + key.gateway.life + SKEW:
            return None
        if "nbf" in claims and (begins is None or begins > now + SKEW):
            return None
        if not is_agent_id(agent) or not any_glob(key.agents, agent):
            return None
        return Proof(f"gateway:{key.gateway.name}", agent, expires + SKEW, told)

    def _checked(self, token: str) -> tuple[_Key, dict[str, Any]] | None:
        try:
            parts = split(token)
        except Unsigned:
            return None
        name = parts.header.get("kid")
        key = self._keys.get(name) if isinstance(name, str) else None
        if key is None or parts.header.get("alg") != "HS256":
            return None
        if not mac_matches(key.secret, parts.signed, parts.signature):
            return None
        if len(self._verified) >= VERIFIED:
            self._verified.clear()
        self._verified[token] = key, parts.claims
        return key, parts.claims

    async def apply_changes(self, names: set[str] | None) -> None:
        """Loads the gateways of `names` again, or all. Raises StoreUnavailable, UserError."""
        changed = None if names is None else {name for name in names if is_gateway(name)}
        if changed is not None and not changed:
            return
        marks = self._records.marks()
        texts = await self._store.get_all(TABLE, changed)
        keys, versions = dict(self._keys) if changed is not None else {}, {}
        for name in changed or ():
            keys.pop(name.removeprefix(GATEWAY), None)
        for record, text in texts.items():
            if not is_gateway(record):
                continue
            try:
                opened = self._records.open(record, text, marks)
                versions[record] = opened.version
                if not opened.removed:
                    key = _key(opened.stored, opened.secret)
                    keys[key.gateway.name] = key
            except (SealBroken, ValueError) as error:
                _log.warning("the gateway %s does not open and is refused: %s", ascii(record), error)
        await self._records.note(versions)
        self._keys = keys
        self._verified = {}

    # For the operator

    async def add(self, name: str, agents: Iterable[str], life: float = LIFE) -> str:
        """Registers a gateway; its key, to be shown once. Raises UserError."""
        globs = tuple(dict.fromkeys(agents))
        _check(name, globs, life)
        marks = self._records.marks()
        record = GATEWAY + name

        def draft(old: str | None) -> Stored:
            if old and not self._is_buried(record, old, marks):
                raise UserError(
                    f"gateway {name} exists already: add one of another name, let it take over, "
                    f"then `sallyport gateway remove {name}`"
                )
            grant = {"agents": list(globs), "life": life}
            return Stored(Record(record, 0, _KIND, {}, grant), "", self._clock(), None)

        key = make_token(self._random, "slg")
        await self._records.write(record, Secret(key.encode("ascii")), draft)
        return key

    async def remove(self, name: str) -> None:
        """Ends a gateway and all its tokens. Raises UserError if there is none."""
        if not any(gateway.name == name for gateway in await self.list()):
            raise UserError(f"there is no gateway {ascii(name)[1:-1]}: `sallyport gateway list` shows those there are")
        await self._records.bury(GATEWAY + name, self._clock())

    async def list(self) -> list[Gateway]:
        """Every gateway by name, with what is wrong with it. Raises StoreUnavailable."""
        marks = self._records.marks()
        found = []
        for record, text in sorted((await self._store.get_all(TABLE)).items()):
            if not is_gateway(record):
                continue
            try:
                opened = self._records.open(record, text, marks)
                if not opened.removed:
                    found.append(_key(opened.stored, opened.secret).gateway)
            except (SealBroken, ValueError) as error:
                found.append(Gateway(ascii(record.removeprefix(GATEWAY))[1:-1], (), 0.0, 0.0, str(error)))
        return found

    def _is_buried(self, record: str, text: str, marks: Any) -> bool:
        try:
            return self._records.open(record, text, marks).removed
        except SealBroken:
            return True  # worthless: a new key in its place mends it


def _key(stored: Stored, secret: Secret) -> _Key:
    """Raises ValueError for a record that is no gateway's."""
    record, agents, life = stored.record, stored.record.grant.get("agents"), stored.record.grant.get("life")
    if record.kind != _KIND or not isinstance(agents, list) or not agents or not isinstance(life, int | float):
        raise ValueError("its record is damaged")
    gateway = Gateway(record.name.removeprefix(GATEWAY), tuple(agents), float(life), stored.created)
    return _Key(gateway, tuple(text_glob(str(agent)) for agent in agents), secret)


def _check(name: str, agents: Sequence[str], life: float) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name!r} cannot be a gateway's name: use 1 to 63 letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit"
        )
    if not agents:
        raise UserError("a gateway needs to know for whom it may speak: give --agents 'coder-*'")
    wrong = next((text for text in agents if not _AGENTS.fullmatch(text)), None)
    if wrong is not None:
        raise UserError(f"--agents {wrong!r}: write an agent's id, or a glob such as 'coder-*'")
    if not 0 < life <= MAX_LIFE:
        raise UserError("--ttl is how long a token may live: from a second to 1h, such as 5m")
