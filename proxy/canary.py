"""Canary tokens: texts that look like keys and open nothing. Whoever sends one has read what it should not have.

A token follows from the master key, its name and a nonce, so that the store alone does not tell which texts to avoid.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from proxy.agenttoken import make_token
from proxy.credential import parse_name
from proxy.problem import UserError
from proxy.sealing import MasterKey, TokenKey
from proxy.store import Store

TABLE = "canaries"
PREFIX = "sk-live-"  # what a thief looks for
_LENGTH = 40  # characters behind the prefix


@dataclass(frozen=True, slots=True)
class Canary:
    """One canary; `created` in Unix seconds. `token` is empty where it was made under another master key."""

    name: str
    token: str
    created: float


class Canaries:
    """The canaries of one store."""

    def __init__(self, store: Store, master: MasterKey, random: Callable[[int], bytes] = os.urandom) -> None:
        self._store = store
        self._master = master
        self._random = random

    async def add(self, name: str, now: float, prefix: str = PREFIX) -> str:
        """A new canary, made at `now`; its token. Raises UserError."""
        parse_name(name)
        if not prefix.isascii() or not prefix.isprintable() or " " in prefix or len(prefix) > 64:
            raise UserError("--prefix must be up to 64 printable ASCII characters without space")
        nonce = self._random(16).hex()
        token = _token(self._master.tokens, name, nonce, prefix)

        def change(old: str | None) -> str:
            if old is not None:
                raise UserError(f"there is a canary {name} already: `sallyport canary remove {name}`")
            record = {"nonce": nonce, "prefix": prefix, "digest": _digest(token), "created": now}
            return json.dumps(record, sort_keys=True)

        await self._store.change(TABLE, name, change)
        return token

    async def remove(self, name: str) -> None:
        """Forgets a canary. Raises UserError if there is none."""

        def change(old: str | None) -> None:
            if old is None:
                raise UserError(
                    f"there is no canary {ascii(name)[1:-1]}: `sallyport canary list` shows those there are"
                )

        await self._store.change(TABLE, name, change)

    async def list(self) -> list[Canary]:
        """Every canary by name. Raises StoreUnavailable."""
        return sorted(self._read(await self._store.get_all(TABLE)), key=lambda canary: canary.name)

    async def tokens(self, names: Iterable[str] | None = None) -> dict[str, bytes]:
        """The tokens of `names` that there are, or of all. Raises StoreUnavailable."""
        found = self._read(await self._store.get_all(TABLE, names))
        return {canary.name: canary.token.encode() for canary in found if canary.token}

    def _read(self, records: Mapping[str, str]) -> Iterable[Canary]:
        for name, text in records.items():
            try:
                data = json.loads(text)
                nonce, prefix, digest = str(data["nonce"]), str(data["prefix"]), data["digest"]
                created = float(data["created"])
                tokens = (_token(key, name, nonce, prefix) for key in self._master.token_keys())
                token = next((token for token in tokens if _digest(token) == digest), "")
            except (ValueError, KeyError, TypeError, RecursionError):  # a damaged record
                token, created = "", 0.0
            yield Canary(name if token else ascii(name)[1:-1], token, created)


def _token(key: TokenKey, name: str, nonce: str, prefix: str) -> str:
    source = key.source(f"canary/{name}", nonce)  # no agent's id has a slash
    return prefix + make_token(source)[len("slp_") :][:_LENGTH]


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
