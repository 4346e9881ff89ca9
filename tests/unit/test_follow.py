"""What a process remembers follows the store, through every outage."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from proxy.follow import Follower
from proxy.store import Store, StoreUnavailable
from tests.storage import HOLDER, eventually, process, server_lives, server_pid


class Memory:
    """A subscriber that notes what it was told."""

    def __init__(self, store: Store, table: str) -> None:
        self.store = store
        self.table = table
        self.told: list[set[str] | None] = []
        self.records: dict[str, str] = {}
        self.broken = False

    async def apply(self, names: set[str] | None) -> None:
        """Loads the table, or fails if told to."""
        self.told.append(names)
        if self.broken:
            raise ValueError("planted")
        self.records = await self.store.get_all(self.table)


@asynccontextmanager
async def following(state: Path) -> AsyncIterator[tuple[Store, Follower, Memory, Memory]]:
    async with await Store.open("embedded", state) as store:
        follower, vault, agents = Follower(store), Memory(store, "vault"), Memory(store, "agents")
        follower.subscribe("vault", vault.apply)
        follower.subscribe("agents", agents.apply)
        task = asyncio.create_task(follower.run())
        try:
            await eventually(lambda: follower.up)
            yield store, follower, vault, agents
        finally:
            task.cancel()


def run(story: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await story()

    asyncio.run(main())


def test_everything_is_loaded_first_and_then_only_what_changed(tmp_path: Path) -> None:
    async def story() -> None:
        async with following(tmp_path) as (store, _, vault, agents):
            assert vault.told == agents.told == [None]
            await store.change("vault", "a", lambda _: "one")
            await eventually(lambda: vault.records == {"a": "one"})
            assert vault.told == [None, {"a"}]
            assert agents.told == [None]

    run(story)


def test_a_change_of_another_process_arrives_within_a_second(tmp_path: Path) -> None:
    async def story() -> None:
        async with following(tmp_path) as (_, _, vault, _):
            with process(HOLDER, tmp_path, "github") as other:
                assert other.stdout is not None
                await asyncio.to_thread(other.stdout.readline)
                assert await eventually(lambda: "github" in vault.records) < 1

    run(story)


def test_a_killed_server_is_started_again_and_everything_loaded(tmp_path: Path) -> None:
    async def story() -> None:
        async with following(tmp_path) as (store, follower, vault, _):
            await store.change("vault", "a", lambda _: "one")
            await eventually(lambda: vault.records)
            vault.told.clear()
            first = server_pid(tmp_path)
            os.kill(first, signal.SIGKILL)
            await eventually(lambda: not follower.up)
            await eventually(lambda: follower.up)
            assert server_pid(tmp_path) != first
            assert vault.told == [None]
            assert vault.records == {"a": "one"}

    run(story)
    assert not server_lives(tmp_path)


def test_a_subscriber_that_fails_is_told_again_and_keeps_nobody_waiting(tmp_path: Path) -> None:
    """A broken credential must not hold up a kill."""

    async def story() -> None:
        async with following(tmp_path) as (store, follower, vault, agents):
            vault.broken = True
            await store.change("vault", "a", lambda _: "one")
            await store.change("agents", "coder-1", lambda _: "killed")
            await eventually(lambda: agents.records and not follower.up)
            await store.change("vault", "b", lambda _: "two")
            await eventually(lambda: vault.told[-1] == {"a", "b"})
            vault.broken = False
            await eventually(lambda: follower.up)
            assert vault.records == {"a": "one", "b": "two"}
            told = list(vault.told)
            await follower.poll()
            assert vault.told == told
            assert all(names == {"coder-1"} for names in agents.told[1:])

    run(story)


def test_an_outage_is_logged_once_and_its_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        async with await Store.open("embedded", tmp_path) as store:
            follower = Follower(store, clock=lambda: 0.0)
            await follower.poll()
            pid = server_pid(tmp_path)
            os.kill(pid, signal.SIGKILL)
            await follower.poll()
            os.kill(server_pid(tmp_path), signal.SIGKILL)
            await eventually(lambda: not server_lives(tmp_path))
            for _ in range(3):  # no second revival: the clock stands still
                await follower.poll()
            assert not follower.up
            await store.ensure()
            await follower.poll()
            assert follower.up

    run(story)
    *troubles, back = [record.message for record in caplog.records]
    assert all("cannot follow the store: StoreUnavailable" in trouble for trouble in troubles)
    assert len(set(troubles)) == len(troubles)
    assert back == "the store is back"


def test_a_server_that_does_not_start_is_tried_ever_more_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[float] = []
    now = 0.0

    async def story() -> None:
        nonlocal now
        async with await Store.open("embedded", tmp_path) as store:

            async def ensure() -> None:
                tried.append(now)
                raise StoreUnavailable("still dead")

            monkeypatch.setattr(store, "ensure", ensure)
            follower = Follower(store, clock=lambda: now)
            os.kill(server_pid(tmp_path), signal.SIGKILL)
            for _ in range(100):
                await follower.poll()
                now += 0.2

    run(story)
    gaps = [later - earlier for earlier, later in pairwise(tried)]
    assert tried[0] == 0
    assert sorted(gaps[:-1]) == gaps[:-1]
    assert max(gaps) < 5.5
    assert len(tried) < 12
