"""Where the master key comes from, and whether it is the one this store was sealed under. Sealing is elsewhere."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path

from proxy.files import own_dir, read_private, write_private
from proxy.problem import UserError
from proxy.sealing import MasterKey, Random, Record, SealBroken, open_sealed, seal
from proxy.secret import Secret
from proxy.store import Store

KEY, KEY_FILE = "SALLYPORT_MASTER_KEY", "SALLYPORT_MASTER_KEY_FILE"
_NAME = "master.key"
_CHECK = "vault:key"
_CHECK_RECORD = Record("", 0, "master-key-check", {}, {})  # no credential has an empty name
_CHECK_SECRET = Secret(b"sallyport")


async def load_master_key(
    state_dir: Path, env: Mapping[str, str], store: Store, random: Random = os.urandom
) -> MasterKey:
    """The key from the environment, a file it names, or `state_dir`, where one is made for a store without any.

    Raises UserError for a key that is malformed, readable by others or not this store's; StoreUnavailable.
    """
    found = await asyncio.to_thread(_given, state_dir, env)
    key, place = found or await _made(state_dir, store, random)
    check = await store.set_once(_CHECK, seal(key, _CHECK_RECORD, _CHECK_SECRET, random))
    try:
        if open_sealed(key, _CHECK_RECORD, check) == _CHECK_SECRET:
            return key
    except SealBroken:
        pass
    raise UserError(
        f"the master key in {place} is {key.id}, but the store was sealed under {_id(check)}: "
        f"give that key in {KEY} or {KEY_FILE}, or use the store this key belongs to"
    )


def _given(state_dir: Path, env: Mapping[str, str]) -> tuple[MasterKey, str] | None:
    """The key that is there, and where."""
    if KEY in env and KEY_FILE in env:
        raise UserError(f"both {KEY} and {KEY_FILE} are set: unset one of them")
    if KEY in env:
        return _parsed(env[KEY], KEY)
    try:
        if KEY_FILE in env:
            return _parsed(Path(env[KEY_FILE]).read_bytes(), env[KEY_FILE])  # its permissions are the operator's own
        path = own_dir(state_dir) / _NAME
        return _parsed(read_private(path), str(path))
    except OSError as error:
        if KEY_FILE in env:
            raise UserError(f"cannot read {env[KEY_FILE]}, which {KEY_FILE} names: {error.strerror}") from None
        return None


async def _made(state_dir: Path, store: Store, random: Random) -> tuple[MasterKey, str]:
    """A new key in the state directory, for a store that has none yet."""
    path = own_dir(state_dir) / _NAME
    check = await store.get_key(_CHECK)
    if check and path.exists():  # another process made it just now: the file comes before the check
        return _parsed(read_private(path), str(path))
    if check:
        raise UserError(
            f"the store was sealed under master key {_id(check)}, and there is none in {path}: "
            f"put that key there, or give it in {KEY} or {KEY_FILE}"
        )
    try:
        write_private(path, random(32).hex().encode("ascii") + b"\n", replace=False)
    except FileExistsError:
        pass  # another process made it just now
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; or give a key in {KEY}") from None
    return _parsed(read_private(path), str(path))


def _parsed(text: str | bytes, place: str) -> tuple[MasterKey, str]:
    try:
        return MasterKey.parse(text), place
    except ValueError as error:
        raise UserError(f"{place} holds no master key: {error}") from None


def _id(check: str) -> str:
    """The public id in a sealed text, as far as it looks like one."""
    return "".join(char for char in check.split(".")[1][:12] if char.isalnum()) if check.count(".") else "unknown"
