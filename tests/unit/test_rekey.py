"""The master key is changed while it is used: at each step both keys are there, and the next run goes on."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from proxy.canary import Canaries
from proxy.gatewaykeys import GatewayKeys
from proxy.grant import Grant
from proxy.masterkey import load_master_key
from proxy.problem import UserError
from proxy.records import TABLE
from proxy.registry import Registry
from proxy.rekey import rekey
from proxy.sealing import MasterKey
from proxy.secret import Secret
from proxy.store import Store
from proxy.vault import Vault

ONE, TWO = "11" * 32, "22" * 32
NAMES = ("a", "b", "c")
GRANT = Grant.parse(hosts=["api.test"])

type Story = Callable[[Store], Awaitable[None]]


class KilledError(BaseException):
    """Stands for kill -9: nothing of ours catches it."""


def with_store(state: Path, story: Story) -> None:
    async def main() -> None:
        async with await Store.open("embedded", state) as store:
            await story(store)

    asyncio.run(main())


class Told:
    """A store with a credential or three, a tombstone, a gateway, an agent and a canary."""

    def __init__(self, store: Store, state: Path, env: Mapping[str, str] | None = None) -> None:
        self.store, self.state, self.env = store, state, env or {}
        self.token = self.canary = ""

    async def master(self) -> MasterKey:
        return await load_master_key(self.state, self.env, self.store)

    async def fill(self) -> Told:
        master = await self.master()
        vault = Vault(self.store, master, self.state)
        for name in (*NAMES, "gone"):
            await vault.put(name, "static", {}, Secret(f"secret of {name}".encode()), GRANT)
        await vault.remove("gone")
        await GatewayKeys(self.store, master, self.state).add("one", ["coder-*"])
        self.token = await Registry(self.store, master).add("coder-1")
        self.canary = await Canaries(self.store, master).add("bait", 1.0)
        return self

    async def holds(self, master: MasterKey | None = None) -> None:
        """Everything is as it was, for a process that starts now, or for one that has `master`."""
        master = master or await self.master()
        vault = Vault(self.store, master, self.state)
        for name in NAMES:
            lease = await vault.open(name)
            assert (lease.version, lease.secret) == (1, Secret(f"secret of {name}".encode()))
        assert [entry.name for entry in await vault.list()] == list(NAMES)
        assert [g.problem for g in await GatewayKeys(self.store, master, self.state).list()] == [""]
        assert await Registry(self.store, master).reissue("coder-1") == self.token
        assert await Canaries(self.store, master).tokens() == {"bait": self.canary.encode()}


def key_file(state: Path) -> Path:
    return state / "master.key"


def test_everything_is_sealed_under_a_new_key_and_the_old_one_opens_nothing(tmp_path: Path) -> None:
    """Twice: what was made two keys ago is told still."""

    async def story(store: Store) -> None:
        told = await Told(store, tmp_path).fill()
        for _ in (1, 2):
            before = MasterKey.parse(key_file(tmp_path).read_bytes())
            done = await rekey(tmp_path, {}, store, None)
            assert (done.resealed, done.broken, done.finished) == (5, (), True)
            assert MasterKey.parse(key_file(tmp_path).read_bytes()).id == done.key != before.id
            assert stat.S_IMODE(key_file(tmp_path).stat().st_mode) == 0o600
            assert not (tmp_path / "master.key.next").exists()
            await told.holds()
            assert {e.problem[:35] for e in await Vault(store, before, tmp_path).list()} == {
                f"it is sealed under master key {done.key}"[:35]
            }

    with_store(tmp_path, story)


def test_a_process_that_had_the_old_key_follows(tmp_path: Path) -> None:
    """It looks into the state directory when it meets a key that it does not know."""

    async def story(store: Store) -> None:
        told = await Told(store, tmp_path).fill()
        running = await told.master()
        await rekey(tmp_path, {}, store, None)
        await told.holds(running)

    with_store(tmp_path, story)


@pytest.mark.parametrize("env", [{}, {"SALLYPORT_MASTER_KEY": ONE}], ids=["made", "given"])
def test_wherever_it_is_killed_everything_opens_and_the_next_run_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env: Mapping[str, str]
) -> None:
    """Before each write to the store or to a file, one after the other, until one run needs no more."""
    new = TWO.encode() if env else None
    left = 0

    def mortal(original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise KilledError
            return original(*arguments, **options)

        return step

    async def story(store: Store, state: Path, steps: int) -> bool:
        nonlocal left
        told = await Told(store, state, env).fill()
        running = await told.master()
        left = steps
        with monkeypatch.context() as patched:
            for where in ("proxy.store.Store.change", "proxy.store.Store.run", "proxy.rekey.write_private"):
                module, _, name = where.rpartition(".")
                owner: Any = Store if "Store" in module else __import__(module, fromlist=[name])
                patched.setattr(owner, name, mortal(getattr(owner, name)))
            try:
                await rekey(state, env, store, new)
            except KilledError:
                whole = False
            else:
                whole = True
        await told.holds()
        await told.holds(running)
        done = await rekey(state, env, store, new)
        assert done.broken == ()
        assert done.finished == (not env)
        await told.holds()
        await told.holds(running)
        return whole

    async def stories() -> None:
        for steps in range(30):
            state = tmp_path / str(steps)
            async with await Store.open("embedded", state) as store:
                if await story(store, state, steps):
                    assert steps >= 8, "a file, the store's own word, the former key, five records"
                    return
        pytest.fail("it never ended")

    asyncio.run(stories())


def test_a_key_of_the_environment_is_changed_by_the_operator(tmp_path: Path) -> None:
    """The copy in the state directory serves until the new one is given, and is taken away then."""
    old, new = {"SALLYPORT_MASTER_KEY": ONE}, {"SALLYPORT_MASTER_KEY": TWO}

    async def story(store: Store) -> None:
        told = await Told(store, tmp_path, old).fill()
        with pytest.raises(UserError, match=r"SALLYPORT_MASTER_KEY, so the new one must be yours.*--new-key-file"):
            await rekey(tmp_path, old, store, None)
        done = await rekey(tmp_path, old, store, TWO.encode())
        assert (done.key, done.resealed, done.finished) == (MasterKey.parse(TWO).id, 5, False)
        await told.holds()
        copy = tmp_path / "master.key.next"
        assert stat.S_IMODE(copy.stat().st_mode) == 0o600
        told.env = new
        await told.holds()
        done = await rekey(tmp_path, new, store, None)
        assert (done.key, done.resealed, done.finished) == (MasterKey.parse(TWO).id, 0, True)
        assert not copy.exists()
        assert not key_file(tmp_path).exists(), "a key of the environment is not written elsewhere"
        await told.holds()
        told.env = old
        with pytest.raises(UserError, match="sealed under"):
            await told.master()

    with_store(tmp_path, story)


def test_a_file_that_the_environment_names_is_read_again_by_a_running_process(tmp_path: Path) -> None:
    mounted, state = tmp_path / "mounted", tmp_path / "state"
    mounted.write_text(ONE)
    env = {"SALLYPORT_MASTER_KEY_FILE": str(mounted)}

    async def story(store: Store) -> None:
        told = await Told(store, state, env).fill()
        running = await told.master()
        assert not (await rekey(state, env, store, TWO.encode())).finished
        mounted.write_text(TWO)
        assert (await rekey(state, env, store, None)).finished
        assert not (state / "master.key.next").exists()
        await told.holds(running)

    with_store(state, story)


@pytest.mark.parametrize(
    ("new", "words"), [(b"hunter2", "the new key is none"), (ONE.encode(), "the new key is the old one")]
)
def test_a_new_key_that_is_none_changes_nothing(tmp_path: Path, new: bytes, words: str) -> None:
    async def story(store: Store) -> None:
        env = {"SALLYPORT_MASTER_KEY": ONE}
        told = await Told(store, tmp_path, env).fill()
        with pytest.raises(UserError, match=words) as caught:
            await rekey(tmp_path, env, store, new)
        assert "hunter2" not in str(caught.value)
        assert not (tmp_path / "master.key.next").exists()
        await told.holds()

    with_store(tmp_path, story)


def test_the_wrong_old_key_changes_nothing(tmp_path: Path) -> None:
    async def story(store: Store) -> None:
        told = await Told(store, tmp_path).fill()
        with pytest.raises(UserError, match="sealed under"):
            await rekey(tmp_path, {"SALLYPORT_MASTER_KEY": ONE}, store, TWO.encode())
        assert not (tmp_path / "master.key.next").exists()
        await told.holds()

    with_store(tmp_path, story)


def test_a_change_that_was_begun_is_ended_before_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(store: Store) -> None:
        told = await Told(store, tmp_path).fill()

        async def cut(*_: object) -> None:
            raise KilledError

        with monkeypatch.context() as patched:
            patched.setattr(Store, "change", cut)
            with pytest.raises(KilledError):
                await rekey(tmp_path, {}, store, None)
        with pytest.raises(UserError, match=r"was begun .*without --new-key-file"):
            await rekey(tmp_path, {}, store, TWO.encode())
        assert (await rekey(tmp_path, {}, store, None)).finished
        await told.holds()

    with_store(tmp_path, story)


def test_two_hosts_do_not_change_it_to_two_keys(tmp_path: Path) -> None:
    """The second is told which key is in force."""
    here, there = tmp_path / "here", tmp_path / "there"

    async def story(store: Store) -> None:
        env = {"SALLYPORT_MASTER_KEY": ONE}
        told = await Told(store, here, env).fill()
        running = await load_master_key(there, env, store)
        done = await rekey(here, env, store, TWO.encode())
        with pytest.raises(UserError, match=f"sealed under {done.key}"):
            await rekey(there, env, store, b"33" * 32)
        assert {e.problem != "" for e in await Vault(store, running, there).list()} == {True}
        (there / "master.key.next").write_text(TWO)
        (there / "master.key.next").chmod(0o600)
        await told.holds(running)

    with_store(here, story)


def test_who_writes_with_the_old_key_meanwhile_is_told_to_repeat(tmp_path: Path) -> None:
    """The change may have passed that record already."""

    async def story(store: Store) -> None:
        told = await Told(store, tmp_path).fill()
        late = Vault(store, await told.master(), tmp_path)
        await rekey(tmp_path, {}, store, None)
        with pytest.raises(UserError, match="changed at the same time: do it again"):
            await late.put("a", "static", {}, Secret(b"late secret"), GRANT)
        again = Vault(store, await told.master(), tmp_path)
        await again.put("a", "static", {}, Secret(b"late secret"), GRANT)
        assert (await again.open("a")).secret == Secret(b"late secret")

    with_store(tmp_path, story)


def test_a_record_that_was_tampered_with_is_left_as_it_was_and_told(tmp_path: Path) -> None:
    async def story(store: Store) -> None:
        told = await Told(store, tmp_path).fill()
        forged = (await store.get(TABLE, "a") or "").replace("api.test", "evil.test")
        await store.change(TABLE, "x", lambda _: forged)
        await store.change(TABLE, "y", lambda _: "garbage")
        done = await rekey(tmp_path, {}, store, None)
        assert (done.resealed, done.broken, done.finished) == (5, ("x", "y"), True)
        assert await store.get_all(TABLE, ["x", "y"]) == {"x": forged, "y": "garbage"}
        await store.change(TABLE, "x", lambda _: None)
        await store.change(TABLE, "y", lambda _: None)
        await told.holds()

    with_store(tmp_path, story)


def test_a_record_under_a_key_that_is_not_here_stops_it_before_the_old_key_goes(tmp_path: Path) -> None:
    async def story(store: Store) -> None:
        told = await Told(store, tmp_path).fill()
        stranger = MasterKey.parse(ONE)
        text = await store.get(TABLE, "a") or ""
        mine = (await told.master()).id
        await store.change(TABLE, "x", lambda _: text.replace(mine, stranger.id))
        with pytest.raises(UserError, match=f"x among them, are sealed under master key {stranger.id}"):
            await rekey(tmp_path, {}, store, None)
        assert MasterKey.parse(key_file(tmp_path).read_bytes()).id == mine
        await Vault(store, await told.master(), tmp_path).remove("x")
        assert (await rekey(tmp_path, {}, store, None)).finished
        await told.holds()

    with_store(tmp_path, story)


def test_no_key_is_in_the_store(tmp_path: Path) -> None:
    """What is left of the old one is sealed."""

    async def story(store: Store) -> None:
        await Told(store, tmp_path).fill()
        old = key_file(tmp_path).read_text().strip()
        await rekey(tmp_path, {}, store, None)
        kept = b"".join(path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file())
        assert b"former-keys" in kept
        for key in (old, key_file(tmp_path).read_text().strip()):
            assert key.encode() not in kept
            assert bytes.fromhex(key) not in kept

    with_store(tmp_path, story)
