"""Credentials are put, leased under their grant, rotated and taken away, and a store that is down opens nothing new."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from proxy.address import Host
from proxy.agent import Agent, AgentState
from proxy.credential import MAX_SECRET
from proxy.follow import Follower
from proxy.grant import Grant
from proxy.problem import UserError
from proxy.request import RequestView
from proxy.sealing import MasterKey
from proxy.secret import Secret
from proxy.store import Store
from proxy.vault import CredentialScope, CredentialUnavailable, Vault
from tests.storage import eventually, server_lives, server_pid, wait_until

KEY = os.urandom(32)
AGENT = Agent("coder-1", state=AgentState.ACTIVE)
GRANT = Grant.parse(hosts=["api.github.com"], methods=["GET"], agents=["coder-*"], expires=2_000.0)
VIEW = RequestView.parse("GET", "https", Host.parse("api.github.com"), 443, "/user")
NOW = 1_000.0


class World:
    """One store and one vault, with clocks that stand still until they are moved."""

    def __init__(self, store: Store, state: Path) -> None:
        self.store = store
        self.state = state
        self.now = NOW
        self.elapsed = 0.0
        self.counts: Counter[tuple[str, str]] = Counter()
        self.vault = self.another(state)

    def another(self, state: Path, key: bytes = KEY) -> Vault:
        """A vault of another process of the same store."""

        def count(operation: str, result: str) -> None:
            self.counts[operation, result] += 1

        return Vault(
            self.store,
            MasterKey(key),
            state,
            60.0,
            clock=lambda: self.now,
            monotonic=lambda: self.elapsed,
            on_operation=count,
        )

    async def put(self, secret: bytes = b"s3cret", name: str = "github", grant: Grant = GRANT) -> int:
        """Puts a bearer credential; its version."""
        return await self.vault.put(name, "bearer", {}, Secret(secret), grant)

    async def leased(self, name: str = "github", vault: Vault | None = None) -> bytes:
        """The plaintext of a lease for the usual agent and request."""
        vault = vault or self.vault
        lease = await vault.open(name)
        vault.check(lease, AGENT, VIEW, self.now)
        return lease.secret.reveal()


def in_world(tmp_path: Path, story: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        async with await Store.open("embedded", tmp_path) as store:
            await story(World(store, tmp_path))

    asyncio.run(main())


async def dead(world: World) -> None:
    os.kill(server_pid(world.state), signal.SIGKILL)
    await asyncio.to_thread(wait_until, lambda: not server_lives(world.state))


def test_a_credential_is_put_and_leased(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        fields = {"name": "x-key", "value": "Token {secret}"}
        assert await world.vault.put("github", "header", fields, Secret(b"s3cret"), GRANT) == 1
        lease = await world.vault.open("github")
        world.vault.check(lease, AGENT, VIEW, NOW)
        assert (lease.name, lease.version, lease.kind, lease.fields) == ("github", 1, "header", fields)
        assert lease.secret == Secret(b"s3cret")
        assert lease.grant == GRANT
        assert lease.until == 60.0
        assert "s3cret" not in repr(lease)
        with pytest.raises(FrozenInstanceError):
            lease.until = 1e9  # type: ignore[misc]

    in_world(tmp_path, story)


def test_what_is_wrong_is_refused_before_anything_is_stored(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        for name, kind, secret, message in [
            ("a/b", "bearer", b"x", "cannot be a credential name"),
            ("a", "bearre", b"x", "did you mean 'bearer'"),
            ("a", "bearer", b"", "empty"),
            ("a", "bearer", b"x\ny", "line break"),
        ]:
            with pytest.raises(UserError, match=message):
                await world.vault.put(name, kind, {}, Secret(secret), GRANT)
        assert await world.vault.list() == []

    in_world(tmp_path, story)


@pytest.mark.parametrize(
    ("agent", "view", "now"),
    [
        ("reviewer", VIEW, NOW),
        ("coder-1", RequestView.parse("POST", "https", Host.parse("api.github.com"), 443, "/user"), NOW),
        ("coder-1", RequestView.parse("GET", "https", Host.parse("evil.test"), 443, "/user"), NOW),
        ("coder-1", VIEW, 2_000.0),
    ],
)
def test_the_grant_refuses_whatever_policy_said(tmp_path: Path, agent: str, view: RequestView, now: float) -> None:
    async def story(world: World) -> None:
        await world.put()
        lease = await world.vault.open("github")
        with pytest.raises(CredentialScope):
            world.vault.check(lease, Agent(agent), view, now)
        assert world.counts["lease", "denied"] == 1

    in_world(tmp_path, story)


def test_the_grant_is_checked_again_on_an_open_lease(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.put()
        assert await world.leased() == b"s3cret"
        lease = world.vault.cached("github")
        assert lease
        with pytest.raises(CredentialScope):
            world.vault.check(lease, AGENT, VIEW, 2_000.0)
        with pytest.raises(CredentialScope):
            world.vault.check(lease, Agent("stranger"), VIEW, NOW)

    in_world(tmp_path, story)


def test_rotation_changes_the_secret_and_nothing_else(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.vault.put("github", "basic", {"username": "x"}, Secret(b"old"), GRANT)
        world.now = 1_500.0
        assert await world.vault.rotate("github", Secret(b"new")) == 2
        assert await world.leased() == b"new"
        entry = await world.vault.show("github")
        assert (entry.version, entry.kind, entry.fields, entry.grant) == (2, "basic", {"username": "x"}, GRANT)
        assert (entry.created, entry.rotated) == (1_000.0, 1_500.0)
        with pytest.raises(UserError, match="line break"):
            await world.vault.rotate("github", Secret(b"a\nb"))
        with pytest.raises(UserError, match="there is no credential gitlab"):
            await world.vault.rotate("gitlab", Secret(b"new"))

    in_world(tmp_path, story)


def test_a_removed_credential_is_gone_until_it_is_put_again(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.put()
        await world.leased()
        await world.vault.remove("github")
        with pytest.raises(CredentialUnavailable, match="was removed"):
            await world.leased()
        with pytest.raises(UserError, match="there is no credential github"):
            await world.vault.show("github")
        with pytest.raises(UserError, match="there is no credential github"):
            await world.vault.remove("github")
        with pytest.raises(UserError, match="there is no credential github"):
            await world.vault.rotate("github", Secret(b"new"))
        assert await world.vault.list() == []
        assert await world.put(b"again") == 3
        assert await world.leased() == b"again"

    in_world(tmp_path, story)


def test_a_credential_that_never_was_is_unavailable(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        with pytest.raises(CredentialUnavailable, match="there is no credential github"):
            await world.leased()
        assert world.counts["lease", "unavailable"] == 1

    in_world(tmp_path, story)


def test_the_list_shows_everything_but_secrets_and_names_what_is_broken(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.put(name="b")
        await world.put(name="a")
        await world.store.change("vault", "c\x1b[2J", lambda _: '{"kind": "\x1b[2J"}')
        a, b, c = await world.vault.list()
        assert (a.name, a.version, a.kind, a.grant, a.problem) == ("a", 1, "bearer", GRANT, "")
        assert b.name == "b"
        assert (c.name, c.kind, c.problem) == ("c\\x1b[2J", "", "its record is damaged")
        assert "s3cret" not in repr([a, b, c])

    in_world(tmp_path, story)


def test_a_widened_record_is_refused_and_counted(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.put()

        def widen(old: str | None) -> str:
            record = json.loads(old or "")
            record["grant"]["hosts"] = ["**.evil.test"]
            return json.dumps(record)

        await world.store.change("vault", "github", widen)
        with pytest.raises(CredentialUnavailable, match="changed after it was sealed"):
            await world.leased()
        assert world.counts["open", "broken"] == 1
        assert "changed after" in (await world.vault.show("github")).problem

    in_world(tmp_path, story)


def test_a_lease_needs_no_store_until_it_ends(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.put()
        await world.leased()
        await dead(world)
        world.elapsed = 59.9
        assert await world.leased() == b"s3cret"
        assert world.vault.cached("github") is not None
        world.elapsed = 60.0
        assert world.vault.cached("github") is None
        with pytest.raises(CredentialUnavailable, match="store"):
            await world.leased()

    in_world(tmp_path, story)


def test_a_clock_that_jumps_does_not_lengthen_a_lease(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.put()
        await world.leased()
        world.now = -1e9
        world.elapsed = 60.0
        assert world.vault.cached("github") is None

    in_world(tmp_path, story)


def test_many_requests_at_once_open_a_credential_once(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.put()
        assert set(await asyncio.gather(*(world.leased() for _ in range(50)))) == {b"s3cret"}
        assert world.counts["open", "ok"] == 1
        assert world.counts["lease", "ok"] == 50

    in_world(tmp_path, story)


def test_what_is_open_is_told_for_redaction(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.put(name="a")
        await world.put(name="b")
        await world.leased("a")
        known = world.vault.leased()
        assert list(known) == ["a"]
        assert world.vault.leased() is known
        await world.leased("b")
        assert world.vault.leased() is not known

    in_world(tmp_path, story)


def test_a_change_ends_the_lease_of_what_changed_only(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.put(name="a")
        await world.put(name="b")
        await world.leased("a")
        await world.leased("b")
        await world.another(tmp_path).rotate("a", Secret(b"new"))
        await world.vault.apply_changes({"a"})
        assert world.vault.cached("a") is None
        assert world.vault.cached("b") is not None
        assert await world.leased("a") == b"new"
        await world.vault.apply_changes(None)
        assert list(world.vault.leased()) == []

    in_world(tmp_path, story)


def test_a_change_is_remembered_before_anybody_asks_for_it(tmp_path: Path) -> None:
    """Rolling back right after a rotation that this machine only heard of."""

    async def story(world: World) -> None:
        elsewhere = world.another(tmp_path / "elsewhere")
        await world.put(b"leaked")
        old = await world.store.get("vault", "github")
        await elsewhere.apply_changes(None)
        await world.vault.rotate("github", Secret(b"new"))
        await elsewhere.apply_changes({"github"})
        await world.store.change("vault", "github", lambda _: old)
        with pytest.raises(CredentialUnavailable, match="older than 2"):
            await world.leased(vault=elsewhere)

    in_world(tmp_path, story)


def test_a_broken_record_does_not_keep_others_from_changing(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.put(name="a")
        await world.put(name="b")
        await world.leased("a")
        await world.leased("b")
        await world.store.change("vault", "a", lambda _: "garbage")
        await world.vault.apply_changes({"a", "b"})
        assert list(world.vault.leased()) == []
        with pytest.raises(CredentialUnavailable, match="its record is damaged"):
            await world.leased("a")
        assert await world.leased("b") == b"s3cret"

    in_world(tmp_path, story)


def test_an_opening_that_a_rotation_overtakes_gives_the_new_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record was read before the change and would be leased after it."""

    async def story(world: World) -> None:
        await world.put(b"old")
        other = world.another(tmp_path)
        get = world.store.get
        overtaken = 0

        async def slow_get(table: str, name: str) -> str | None:
            nonlocal overtaken
            text = await get(table, name)
            if not overtaken:
                overtaken += 1
                monkeypatch.undo()
                await other.rotate("github", Secret(b"new"))
                await world.vault.apply_changes({"github"})
            return text

        monkeypatch.setattr(world.store, "get", slow_get)
        assert await world.leased() == b"new"
        assert overtaken == 1

    in_world(tmp_path, story)


def test_rotation_and_removal_reach_another_process_within_a_second(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        follower = Follower(world.store)
        follower.subscribe("vault", world.vault.apply_changes)
        task = asyncio.create_task(follower.run())
        command = world.another(tmp_path)
        await world.put(b"old")
        await world.leased()
        await command.rotate("github", Secret(b"new"))

        async def rotated() -> bool:
            return await world.leased() == b"new"

        async def removed() -> bool:
            try:
                return not await world.leased()
            except CredentialUnavailable:
                return True

        await eventually(rotated, 1)
        await command.remove("github")
        await eventually(removed, 1)
        task.cancel()

    in_world(tmp_path, story)


def test_another_master_key_leases_nothing(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.put()
        with pytest.raises(CredentialUnavailable, match="sealed under master key"):
            await world.leased(vault=world.another(tmp_path, os.urandom(32)))

    in_world(tmp_path, story)


def test_marks_that_cannot_be_kept_refuse_the_credential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the mark an older version could be put back later."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    async def story(world: World) -> None:
        await world.put()
        monkeypatch.setattr("proxy.rollback.write_private", full)
        with pytest.raises(CredentialUnavailable, match="No space left"):
            await world.leased(vault=world.another(tmp_path / "elsewhere"))

    in_world(tmp_path, story)


def test_every_operation_is_counted_with_its_result(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.put()
        await world.vault.rotate("github", Secret(b"x"))
        await world.vault.list()
        await world.leased()
        await world.vault.remove("github")
        with pytest.raises(UserError):
            await world.vault.remove("github")
        await dead(world)
        with pytest.raises(UserError):
            await world.vault.list()
        ok: Iterable[str] = ("put", "rotate", "list", "lease", "open", "remove")
        assert all(world.counts[operation, "ok"] == 1 for operation in ok)
        assert world.counts["remove", "denied"] == 1
        assert world.counts["list", "unavailable"] == 1

    in_world(tmp_path, story)


def test_the_smallest_and_the_largest_secret_come_back_as_they_were(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        big = b"\xff" * MAX_SECRET
        await world.put(b"x", "small")
        await world.put(big, "big")
        assert await world.leased("small") == b"x"
        assert await world.leased("big") == big

    in_world(tmp_path, story)
