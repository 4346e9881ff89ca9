"""Where the master key comes from, and whether it is the one this store was sealed under. Sealing is elsewhere.

While it is changed there are two: the next one lies in the state directory beside the one that is configured, and the
store says which of them seals. How it is changed is in `rekey`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from proxy.files import own_dir, read_private, write_private
from proxy.problem import UserError
from proxy.sealing import MasterKey, Random, Record, SealBroken, TokenKey, open_sealed, seal, sealed_under
from proxy.secret import Secret
from proxy.store import Store

KEY, KEY_FILE = "SALLYPORT_MASTER_KEY", "SALLYPORT_MASTER_KEY_FILE"
NAME, NEXT = "master.key", "master.key.next"  # in the state directory
FORMER = "former-keys"  # the table of what is left of keys that were changed
_CHECK = "vault:key"
_CHECK_RECORD = Record("", 0, "master-key-check", {}, {})  # no credential has an empty name
_CHECK_SECRET = Secret(b"sallyport")
_SUCCEED = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
"""


class KeyFiles:
    """The master keys that lie in files, read again when one is missing: so a running proxy follows a change."""

    def __init__(self, *paths: Path) -> None:
        self._paths = paths
        self._known: dict[str, MasterKey] = {}

    def __call__(self, wanted: str | None) -> Iterable[MasterKey]:
        """Every key ever seen there; `wanted`, or None, is looked for anew unless it is known."""
        if wanted is None or wanted not in self._known:
            for path in self._paths:
                with contextlib.suppress(OSError, ValueError):  # not there now, or half of it: it stays unknown
                    self.add(MasterKey.parse(path.read_bytes()))
        return tuple(self._known.values())

    def add(self, key: MasterKey) -> None:
        """Takes note of a key."""
        self._known.setdefault(key.id, key)


async def load_master_key(
    state_dir: Path, env: Mapping[str, str], store: Store, random: Random = os.urandom
) -> MasterKey:
    """The key from the environment, a file it names, or `state_dir`, where one is made for a store without any; or the
    one that is to follow it, if the store is sealed under that already.

    Raises UserError for a key that is malformed, readable by others or not this store's; StoreUnavailable.
    """
    for attempt in (1, 2):  # a change may end between the looks at files and store
        following = await asyncio.to_thread(next_key, state_dir)  # before the other, in whose place it will be put
        found = await asyncio.to_thread(configured, state_dir, env)
        key, place = found or await _made(state_dir, store, random)
        check = await store.set_once(_CHECK, seal(key, _CHECK_RECORD, _CHECK_SECRET, random))
        for candidate in (key, following):
            if candidate and _opens(candidate, check):
                return await _complete(candidate, key, state_dir, env, store)
        if attempt == 2:
            break
    raise UserError(
        f"the master key in {place} is {key.id}, but the store was sealed under {_id(check)}: "
        f"give that key in {KEY} or {KEY_FILE}, or use the store this key belongs to"
    )


async def _complete(
    key: MasterKey, other: MasterKey, state_dir: Path, env: Mapping[str, str], store: Store
) -> MasterKey:
    """`key` with those beside it and what is left of those before it."""
    place = Path(env[KEY_FILE]) if KEY_FILE in env else state_dir / NAME
    beside = KeyFiles(state_dir / NEXT, *(() if KEY in env else (place,)))
    beside.add(other)
    key.beside = beside
    former = []
    for key_id, text in sorted((await store.get_all(FORMER)).items()):
        with contextlib.suppress(SealBroken):  # what was made with it is told to be of another key
            former.append(TokenKey(key_id, open_sealed(key, former_record(key_id), text)))
    key.former = tuple(former)
    return key


def former_record(key_id: str) -> Record:
    """What the seal of a former key vouches for."""
    return Record(f"key:{key_id}", 0, "former-key", {}, {})


async def seals_now(store: Store, key: MasterKey) -> bool:
    """Whether the store is still to be sealed under `key`, or says nothing of it."""
    check = await store.get_key(_CHECK)
    return check is None or sealed_under(check) == key.id


async def succeed(store: Store, old: MasterKey, new: MasterKey, random: Random) -> None:
    """From now on the store is sealed under `new`. Raises UserError where another change came first."""
    check = await store.get_key(_CHECK) or ""
    if _opens(new, check):
        return
    fresh = seal(new, _CHECK_RECORD, _CHECK_SECRET, random)
    if not _opens(old, check) or not await store.run(_SUCCEED, _CHECK, check, fresh):
        raise UserError(f"the master key was changed to {_id(check)} by somebody else: give that one")


def next_key(state_dir: Path) -> MasterKey | None:
    """The key that is to follow, if it is being changed. Raises UserError."""
    path = state_dir.absolute() / NEXT
    try:
        return _parsed(read_private(path), str(path))[0]
    except FileNotFoundError:
        return None


def _opens(key: MasterKey, check: str) -> bool:
    try:
        return sealed_under(check) == key.id and open_sealed(key, _CHECK_RECORD, check) == _CHECK_SECRET
    except SealBroken:
        return False


def configured(state_dir: Path, env: Mapping[str, str]) -> tuple[MasterKey, str] | None:
    """The key that is there, and where; None: none. Raises UserError."""
    if KEY in env and KEY_FILE in env:
        raise UserError(f"both {KEY} and {KEY_FILE} are set: unset one of them")
    if KEY in env:
        return _parsed(env[KEY], KEY)
    try:
        if KEY_FILE in env:
            return _parsed(Path(env[KEY_FILE]).read_bytes(), env[KEY_FILE])  # its permissions are the operator's own
        path = own_dir(state_dir) / NAME
        return _parsed(read_private(path), str(path))
    except OSError as error:
        if KEY_FILE in env:
            raise UserError(f"cannot read {env[KEY_FILE]}, which {KEY_FILE} names: {error.strerror}") from None
        return None


async def _made(state_dir: Path, store: Store, random: Random) -> tuple[MasterKey, str]:
    """A new key in the state directory, for a store that has none yet."""
    path = own_dir(state_dir) / NAME
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
