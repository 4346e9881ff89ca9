"""The master key is found, made once, and never one the store was not sealed under."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Mapping
from pathlib import Path

import pytest

from proxy.masterkey import load_master_key
from proxy.problem import UserError
from proxy.sealing import MasterKey
from proxy.store import Store
from tests.storage import process

HEX = "ab" * 32


def load(state: Path, env: Mapping[str, str] | None = None, keys: Path | None = None) -> MasterKey:
    """The key for the store in `state`, looked for in `keys`."""

    async def main() -> MasterKey:
        async with await Store.open("embedded", state) as store:
            return await load_master_key(keys or state, env or {}, store)

    return asyncio.run(main())


def test_a_key_is_made_on_first_use_for_us_alone(tmp_path: Path) -> None:
    made = load(tmp_path)
    path = tmp_path / "master.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert MasterKey.parse(path.read_bytes()).id == made.id == load(tmp_path).id


def test_the_environment_gives_the_key_and_none_is_made(tmp_path: Path) -> None:
    assert load(tmp_path, {"SALLYPORT_MASTER_KEY": HEX}).id == MasterKey.parse(HEX).id
    assert not (tmp_path / "master.key").exists()


def test_a_file_that_the_environment_names_gives_the_key(tmp_path: Path) -> None:
    """A mounted secret is often readable by its group; that is the operator's business."""
    path = tmp_path / "mounted"
    path.write_text(HEX + "\n")
    path.chmod(0o444)
    assert load(tmp_path, {"SALLYPORT_MASTER_KEY_FILE": str(path)}).id == MasterKey.parse(HEX).id


def test_two_keys_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unset one"):
        load(tmp_path, {"SALLYPORT_MASTER_KEY": HEX, "SALLYPORT_MASTER_KEY_FILE": "x"})


@pytest.mark.parametrize("text", ["", "  ", "hunter2"])
def test_a_malformed_key_is_refused_and_not_quoted(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"SALLYPORT_MASTER_KEY holds no master key.*openssl rand -hex 32") as caught:
        load(tmp_path, {"SALLYPORT_MASTER_KEY": text})
    assert "hunter2" not in str(caught.value)


def test_a_key_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read /nowhere/key, which SALLYPORT_MASTER_KEY_FILE names"):
        load(tmp_path, {"SALLYPORT_MASTER_KEY_FILE": "/nowhere/key"})


@pytest.mark.parametrize("mode", [0o644, 0o640])
def test_a_key_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    load(tmp_path)
    (tmp_path / "master.key").chmod(mode)
    with pytest.raises(UserError, match=r"master\.key is open to other users: .chmod 600"):
        load(tmp_path)


def test_a_key_that_does_not_fit_the_store_is_told_with_both_names(tmp_path: Path) -> None:
    right = load(tmp_path)
    wrong = MasterKey.parse(HEX)
    with pytest.raises(UserError, match=f"SALLYPORT_MASTER_KEY is {wrong.id}.*sealed under {right.id}: give that key"):
        load(tmp_path, {"SALLYPORT_MASTER_KEY": HEX})


def test_no_new_key_is_made_for_a_store_that_has_one(tmp_path: Path) -> None:
    right = load(tmp_path)
    (tmp_path / "master.key").unlink()
    with pytest.raises(UserError, match=f"sealed under master key {right.id}, and there is none in .*master.key"):
        load(tmp_path)
    assert not (tmp_path / "master.key").exists()


def test_a_forged_check_in_the_store_does_not_pass(tmp_path: Path) -> None:
    """The public id alone proves nothing."""
    key = MasterKey.parse(HEX)

    async def forge() -> None:
        async with await Store.open("embedded", tmp_path) as store:
            await store.set_once("vault:key", f"sp1.{key.id}.AAAA.AAAA")

    asyncio.run(forge())
    with pytest.raises(UserError, match="sealed under"):
        load(tmp_path, {"SALLYPORT_MASTER_KEY": HEX})


def test_a_check_that_is_garbage_is_told_without_showing_it(tmp_path: Path) -> None:
    async def forge() -> None:
        async with await Store.open("embedded", tmp_path) as store:
            await store.set_once("vault:key", "\x1b[2J.\x1b]0;owned")

    asyncio.run(forge())
    with pytest.raises(UserError) as caught:
        load(tmp_path, {"SALLYPORT_MASTER_KEY": HEX})
    assert "\x1b" not in str(caught.value)


def test_processes_that_start_at_once_agree_on_one_key(tmp_path: Path) -> None:
    code = """
from proxy.masterkey import load_master_key
async def main():
    async with await Store.open("embedded", Path(sys.argv[1])) as store:
        print((await load_master_key(Path(sys.argv[1]), {}, store)).id)
asyncio.run(main())
"""
    with process(code, tmp_path) as one, process(code, tmp_path) as two, process(code, tmp_path) as three:
        ids = {child.communicate()[0] for child in (one, two, three)}
    assert ids == {load(tmp_path).id + "\n"}


def test_the_key_is_never_in_the_store(tmp_path: Path) -> None:
    load(tmp_path)
    text = (tmp_path / "master.key").read_text().strip()
    kept = b"".join(path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file())
    assert b"vault:key" in kept
    assert text.encode() not in kept
    assert bytes.fromhex(text) not in kept


def test_a_key_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("proxy.masterkey.write_private", full)
    with pytest.raises(UserError, match="No space left"):
        load(tmp_path, {}, tmp_path / "keys")
    assert os.listdir(tmp_path / "keys") == []
