"""Changing the master key of a store while proxies run on it. Every step may be the last one: the next run goes on.

1. The new key lies in the state directory as `master.key.next`, where running proxies find it.
2. The store says that it is sealed under the new key; whoever writes with the old one from then on is told to repeat.
3. What tokens of the old key follow from is sealed under the new one, so that they can be told again.
4. Each record is sealed anew, with its version as it was. Both keys open records all the while.
5. `master.key` becomes the new key. A key of the environment is the operator's to change.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from proxy.files import locked, own_dir, write_private
from proxy.masterkey import (
    FORMER,
    KEY,
    KEY_FILE,
    NAME,
    NEXT,
    configured,
    former_record,
    load_master_key,
    next_key,
    succeed,
)
from proxy.problem import UserError
from proxy.records import TABLE
from proxy.sealing import MasterKey, Random, SealBroken, Stored, reseal, seal, sealed_under
from proxy.store import Store


@dataclass(frozen=True, slots=True)
class Rekeyed:
    """What was done: `resealed` records; `broken` ones, which did not open before either; and whether the new key is
    where the proxy is told to look for it, so that nothing is left to do."""

    key: str
    resealed: int
    broken: tuple[str, ...]
    finished: bool


async def rekey(
    state_dir: Path, env: Mapping[str, str], store: Store, new: bytes | None, random: Random = os.urandom
) -> Rekeyed:
    """Seals everything under `new` (None: one that is made, or the one of a change that was broken off).

    Raises UserError, StoreUnavailable; then it can be run again.
    """
    state = own_dir(state_dir)
    with locked(state / "rekey.lock", "another `sallyport vault rekey` is at work"):
        old = await load_master_key(state, env, store, random)
        await asyncio.to_thread(announce, state, env, old, new, random)
        target = next_key(state)
        assert target
        await succeed(store, old, target, random)
        master = await load_master_key(state, env, store, random)
        for key in master.token_keys():
            if key.id != master.id:
                text = seal(master, former_record(key.id), key.key, random)
                await store.change(FORMER, key.id, lambda _, text=text: text)  # type: ignore[misc]
        resealed, broken, foreign = await _reseal_all(store, master, random)
        if foreign:
            name, key_id = min(foreign.items())
            raise UserError(
                f"{len(foreign)} of the records, {ascii(name)[1:-1]} among them, are sealed under master key "
                f"{_shown(key_id)}, which is not here: give it in {KEY} or {KEY_FILE} and run this again, "
                "or remove them"
            )
        finished = await asyncio.to_thread(_finish, state, env, master)
    return Rekeyed(master.id, resealed, tuple(sorted(broken)), finished)


def announce(state: Path, env: Mapping[str, str], old: MasterKey | None, new: bytes | None, random: Random) -> None:
    """Puts the next key where the proxies of this state directory find it. Raises UserError."""
    path, there = state / NEXT, next_key(state)
    try:
        given = None if new is None else MasterKey.parse(new)
    except ValueError as error:
        raise UserError(f"the new key is none: {error}") from None
    if there:
        if given and given.id != there.id:
            raise UserError(
                f"a change to master key {there.id} was begun ({path}): run `sallyport vault rekey` without "
                "--new-key-file to end it"
            )
        return
    if new is None and (KEY in env or KEY_FILE in env):
        name = KEY if KEY in env else KEY_FILE
        raise UserError(
            f"the master key is given in {name}, so the new one must be yours: "
            "`openssl rand -hex 32 > FILE`, then `sallyport vault rekey --new-key-file FILE`"
        )
    if old and given and given.id == old.id:
        raise UserError(f"the new key is the old one ({old.id}): make another with `openssl rand -hex 32`")
    try:
        write_private(path, new if new is not None else random(32).hex().encode("ascii") + b"\n", replace=False)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


async def _reseal_all(store: Store, master: MasterKey, random: Random) -> tuple[int, set[str], dict[str, str]]:
    """How many were sealed anew; which are broken; and which are under a key that is not here, with its id."""
    count, broken, foreign = 0, set[str](), dict[str, str]()

    def anew(name: str, old: str | None) -> str | None:
        if old is None:
            return None
        return reseal(master, Stored.parse(name, old), random).text()

    while True:  # again, until nobody wrote with the old key meanwhile
        texts = await store.get_all(TABLE)
        todo = {name: _key_of(name, text) for name, text in texts.items()}
        todo = {name: key for name, key in todo.items() if key != master.id and name not in broken | foreign.keys()}
        if not todo:
            return count, broken, foreign
        for name, key_id in todo.items():
            try:
                await store.change(TABLE, name, lambda old, name=name: anew(name, old))  # type: ignore[misc]
                count += 1
            except SealBroken:
                if key_id and not master.find(key_id):
                    foreign[name] = key_id
                else:
                    broken.add(name)


def _key_of(name: str, text: str) -> str:
    try:
        return sealed_under(Stored.parse(name, text).sealed)
    except SealBroken:
        return ""


def _shown(key_id: str) -> str:
    return "".join(char for char in key_id if char.isalnum())


def _finish(state: Path, env: Mapping[str, str], master: MasterKey) -> bool:
    path = state / NEXT
    if KEY in env or KEY_FILE in env:
        there = configured(state, env)
        if not there or there[0].id != master.id:
            return False
    else:
        try:
            write_private(state / NAME, path.read_bytes())
        except OSError as error:
            raise UserError(f"cannot write {state / NAME}: {error.strerror}; then run this again") from None
    path.unlink()
    return True
