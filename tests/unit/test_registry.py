"""Agents are registered, stopped and forgotten; a token is shown once and kept as a digest."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest

from proxy.agent import NEVER, AgentState
from proxy.agenttoken import token_digest
from proxy.follow import Follower
from proxy.killswitch import Stops
from proxy.problem import UserError
from proxy.registry import Registry
from proxy.sealing import MasterKey
from proxy.store import Store, StoreUnavailable
from tests.storage import eventually, server_lives

type Story = Callable[[Store, Registry], Awaitable[None]]

NOW = 1_000.0


def in_registry(state: Path, story: Story) -> None:
    async def main() -> None:
        async with await Store.open("embedded", state) as store:
            await story(store, Registry(store, clock=lambda: NOW))

    asyncio.run(main())


def test_an_agent_is_known_by_its_token_and_its_id(tmp_path: Path) -> None:
    async def story(store: Store, registry: Registry) -> None:
        token = await registry.add("coder-1", {"team": "payments"}, 3600, "ada")
        assert registry.by_token(token) is None
        await registry.apply_changes(None)
        agent = registry.by_token(token)
        assert agent is not None
        assert agent == registry.by_id("coder-1") == await registry.show("coder-1")
        assert (agent.id, agent.labels, agent.on_behalf_of) == ("coder-1", {"team": "payments"}, "ada")
        assert (agent.expires, agent.state) == (NOW + 3600, AgentState.ACTIVE)

    in_registry(tmp_path, story)


def test_an_agent_without_a_term_never_expires(tmp_path: Path) -> None:
    async def story(store: Store, registry: Registry) -> None:
        await registry.add("coder-1")
        assert (await registry.show("coder-1")).expires == NEVER

    in_registry(tmp_path, story)


def test_only_digests_of_tokens_are_kept(tmp_path: Path) -> None:
    tokens: list[str] = []

    async def story(store: Store, registry: Registry) -> None:
        tokens.append(await registry.add("coder-1"))
        tokens.append(await registry.token("coder-1"))

    in_registry(tmp_path, story)
    kept = b"".join(path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file())
    for token in tokens:
        assert (token_digest(token) or "").encode() in kept
        assert token.encode() not in kept
        assert token[4:47].encode() not in kept


def test_other_tokens_are_nobody(tmp_path: Path) -> None:
    async def story(store: Store, registry: Registry) -> None:
        token = await registry.add("coder-1")
        await registry.apply_changes(None)
        for wrong in ("", "slp_", token[:-1], token + "0", token[:-1] + ("0" if token[-1] != "0" else "1")):
            assert registry.by_token(wrong) is None
        assert registry.by_id("coder-2") is None
        assert registry.by_id("*") is None

    in_registry(tmp_path, story)


def test_a_new_token_ends_the_old(tmp_path: Path) -> None:
    async def story(store: Store, registry: Registry) -> None:
        old = await registry.add("coder-1", {"team": "x"})
        await registry.apply_changes(None)
        new = await registry.token("coder-1")
        await registry.apply_changes({"coder-1"})
        assert registry.by_token(old) is None
        agent = registry.by_token(new)
        assert agent is not None
        assert agent.labels == {"team": "x"}

    in_registry(tmp_path, story)


def test_an_agent_that_exists_is_not_added_again(tmp_path: Path) -> None:
    async def story(store: Store, registry: Registry) -> None:
        token = await registry.add("coder-1")
        with pytest.raises(UserError, match="exists already: `sallyport agent token coder-1`"):
            await registry.add("coder-1")
        await registry.apply_changes(None)
        assert registry.by_token(token)

    in_registry(tmp_path, story)


@pytest.mark.parametrize("agent_id", ["a:b", "", "*", "a b", "-a"])
def test_an_odd_id_is_refused(tmp_path: Path, agent_id: str) -> None:
    async def story(store: Store, registry: Registry) -> None:
        with pytest.raises(UserError, match="cannot be an agent id"):
            await registry.add(agent_id)

    in_registry(tmp_path, story)


def test_odd_labels_and_terms_are_refused(tmp_path: Path) -> None:
    async def story(store: Store, registry: Registry) -> None:
        with pytest.raises(UserError, match="control characters"):
            await registry.add("coder-1", {"team": "a\nb"})
        with pytest.raises(UserError, match="control characters"):
            await registry.add("coder-1", on_behalf_of="ada\x1b[2J")
        for ttl in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(UserError, match="--ttl"):
                await registry.add("coder-1", ttl=ttl)
        await registry.add("coder-1")
        with pytest.raises(UserError, match="control characters"):
            await registry.kill("coder-1", "a\nb")

    in_registry(tmp_path, story)


def test_a_removed_agent_is_nobody(tmp_path: Path) -> None:
    async def story(store: Store, registry: Registry) -> None:
        token = await registry.add("coder-1")
        await registry.apply_changes(None)
        await registry.remove("coder-1")
        await registry.apply_changes({"coder-1"})
        assert registry.by_token(token) is None
        assert registry.by_id("coder-1") is None
        assert await registry.list() == []
        other = await registry.add("coder-1")
        await registry.apply_changes({"coder-1"})
        assert registry.by_token(token) is None
        assert registry.by_token(other)

    in_registry(tmp_path, story)


def test_what_is_done_to_an_agent_that_is_not_there_is_told(tmp_path: Path) -> None:
    async def story(store: Store, registry: Registry) -> None:
        await registry.kill(None)  # its record is no agent
        for agent_id in ("coder-1", "*"):
            works = (registry.token, registry.remove, registry.show, registry.kill, registry.revive)
            for work in works:
                with pytest.raises(UserError, match=r"there is no agent .*: `sallyport agent list`"):
                    await work(agent_id)
        assert await registry.list() == []

    in_registry(tmp_path, story)


def test_a_killed_agent_is_known_and_killed_until_revived(tmp_path: Path) -> None:
    async def story(store: Store, registry: Registry) -> None:
        token = await registry.add("coder-1")
        await registry.add("coder-2")
        await registry.apply_changes(None)
        await registry.kill("coder-1", "it loops")
        await registry.apply_changes({"coder-1"})
        agent = registry.by_token(token)
        assert agent is not None
        assert (agent.state, agent.kill_reason) == (AgentState.KILLED, "it loops")
        assert [agent.state for agent in await registry.list()] == [AgentState.KILLED, AgentState.ACTIVE]
        await registry.revive("coder-1")
        await registry.apply_changes({"coder-1"})
        agent = registry.by_token(token)
        assert agent is not None
        assert (agent.state, agent.kill_reason) == (AgentState.ACTIVE, "")

    in_registry(tmp_path, story)


def test_killing_all_holds_for_later_agents_and_over_restarts(tmp_path: Path) -> None:
    async def kill(store: Store, registry: Registry) -> None:
        await registry.add("early")
        await registry.add("alone")
        await registry.kill("alone", "itself")
        await registry.kill(None, "incident")

    async def still(store: Store, registry: Registry) -> None:
        token = await registry.add("late")
        await registry.apply_changes(None)
        late = registry.by_token(token)
        assert late is not None
        assert (late.state, late.kill_reason) == (AgentState.KILLED, "incident")
        states = {agent.id: (agent.state, agent.kill_reason) for agent in await registry.list()}
        assert states["early"] == (AgentState.KILLED, "incident")
        assert states["alone"] == (AgentState.KILLED, "itself")
        await registry.revive("late")
        assert (await registry.show("late")).state is AgentState.KILLED
        await registry.revive(None)
        await registry.apply_changes({"*"})
        assert registry.counts() == {"active": 2, "killed": 1, "expired": 0}
        assert (await registry.show("alone")).state is AgentState.KILLED

    in_registry(tmp_path, kill)
    assert not server_lives(tmp_path)
    in_registry(tmp_path, still)


def test_agents_are_counted_by_state(tmp_path: Path) -> None:
    async def story(store: Store, registry: Registry) -> None:
        for agent_id in ("a", "b", "c", "d"):
            await registry.add(agent_id, ttl=10)
        await registry.kill("a")
        later = Registry(store, clock=lambda: NOW + 10)
        await later.add("e")
        await later.apply_changes(None)
        assert later.counts() == {"active": 1, "killed": 1, "expired": 3}

    in_registry(tmp_path, story)


def test_it_says_when_it_was_loaded_and_keeps_what_it_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(store: Store, registry: Registry) -> None:
        token = await registry.add("coder-1")

        async def down(*_: object) -> dict[str, str]:
            raise StoreUnavailable("down")

        loaded = [registry.loaded]
        with monkeypatch.context() as patched:
            patched.setattr(store, "get_all", down)
            with pytest.raises(StoreUnavailable):
                await registry.apply_changes(None)
        loaded.append(registry.loaded)
        await registry.apply_changes({"coder-1"})
        assert [*loaded, registry.loaded] == [False, False, False]
        await registry.apply_changes(None)
        assert registry.loaded
        with monkeypatch.context() as patched:
            patched.setattr(store, "get_all", down)
            with pytest.raises(StoreUnavailable):
                await registry.apply_changes(None)
        assert registry.loaded
        assert registry.by_token(token)

    in_registry(tmp_path, story)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", "[]", "null", '{"labels": 1}', "[" * 100_000),
        '{"labels": {}, "on_behalf_of": "", "expires": null, "kill_reason": "", "digest": "d", "state": "odd"}',
    ],
)
def test_a_damaged_record_is_nobody_and_does_not_hide_others(tmp_path: Path, text: str) -> None:
    async def story(store: Store, registry: Registry) -> None:
        token = await registry.add("coder-1")
        await store.change("agents", "coder-2", lambda _: text or "x")
        await registry.apply_changes(None)
        assert registry.by_token(token)
        assert registry.by_id("coder-2") is None
        with pytest.raises(UserError, match="damaged"):
            await registry.kill("coder-2")
        await registry.remove("coder-2")

    in_registry(tmp_path, story)


@pytest.mark.parametrize("text", ["x", "{}", "null", "[" * 100_000])
def test_a_damaged_switch_for_all_is_on(tmp_path: Path, text: str) -> None:
    async def story(store: Store, registry: Registry) -> None:
        token = await registry.add("coder-1")
        await store.change("agents", "*", lambda _: text)
        await registry.apply_changes(None)
        agent = registry.by_token(token)
        assert agent is not None
        assert agent.state is AgentState.KILLED

    in_registry(tmp_path, story)


def test_a_kill_reaches_another_process_within_a_second(tmp_path: Path) -> None:
    async def story(store: Store, registry: Registry) -> None:
        token = await registry.add("coder-1")
        command = Registry(store)

        def is_now(state: AgentState) -> bool:
            agent = registry.by_token(token)
            return agent is not None and agent.state is state

        follower = Follower(store)
        follower.subscribe("agents", registry.apply_changes)
        await follower.poll()
        task = asyncio.create_task(follower.run())
        for kill, revive in (
            (command.kill("coder-1"), command.revive("coder-1")),
            (command.kill(None), command.revive(None)),
        ):
            await kill
            await eventually(partial(is_now, AgentState.KILLED), 1)
            await revive
            await eventually(partial(is_now, AgentState.ACTIVE), 1)
        task.cancel()

    in_registry(tmp_path, story)


def test_a_look_up_costs_the_same_for_ten_thousand_agents(tmp_path: Path) -> None:
    """No scan: the tables are dictionaries, and one change touches one entry."""

    async def story(store: Store, registry: Registry) -> None:
        token = await registry.add("coder-1")
        record = await store.get("agents", "coder-1") or ""
        many = {f"agent-{n}": record.replace(token_digest(token) or "", f"{n:064x}") for n in range(10_000)}
        await store._client.hset("{sallyport}:agents", mapping=many)
        await registry.apply_changes(None)
        assert registry.counts()["active"] == 10_001
        agent = registry.by_token(token)
        assert agent is not None
        assert agent.id == "coder-1"

    in_registry(tmp_path, story)


def test_a_token_is_told_again_from_the_master_key_alone(tmp_path: Path) -> None:
    """`agent env` needs it, and the store keeps only a digest; another key does not tell it."""

    async def run() -> None:
        async with await Store.open("embedded", tmp_path) as store:
            registry = Registry(store, MasterKey(b"k" * 32))
            token = await registry.add("coder-1")
            assert await registry.reissue("coder-1") == token
            renewed = await registry.token("coder-1")
            assert renewed != token
            assert await registry.reissue("coder-1") == renewed
            with pytest.raises(UserError, match="under another master key"):
                await Registry(store, MasterKey(b"x" * 32)).reissue("coder-1")

    asyncio.run(run())


def test_a_stop_of_this_host_kills_whatever_the_store_says(tmp_path: Path) -> None:
    """And is told at once."""

    async def story(store: Store, registry: Registry) -> None:
        told: list[frozenset[str]] = []
        token = await registry.add("coder-1")
        await registry.add("coder-2")
        await registry.apply_changes(None)
        registry.on_change = told.append
        registry.stop_here(Stops(None, {"coder-1": "here"}))
        agent = registry.by_token(token)
        assert agent is not None
        assert (agent.state, agent.kill_reason) == (AgentState.KILLED, "here")
        assert registry.living() == ["coder-2"]
        registry.stop_here(Stops("all"))
        assert registry.counts()["killed"] == 2
        registry.stop_here(Stops())
        assert registry.counts()["killed"] == 0
        assert told == [frozenset()] * 3

    in_registry(tmp_path, story)


def test_whose_token_ended_is_told(tmp_path: Path) -> None:
    async def story(store: Store, registry: Registry) -> None:
        told: list[frozenset[str]] = []
        kills: list[None] = []
        for name in ("coder-1", "coder-2", "coder-3"):
            await registry.add(name)
        await registry.apply_changes(None)
        registry.on_change, registry.on_kill = told.append, lambda: kills.append(None)
        await registry.token("coder-1")
        await registry.apply_changes({"coder-1"})
        await registry.remove("coder-2")
        await registry.apply_changes({"coder-2"})
        assert kills == []
        await registry.kill("coder-3")
        await registry.apply_changes({"coder-3"})
        assert told == [frozenset({"coder-1"}), frozenset({"coder-2"}), frozenset()]
        assert kills == [None]

    in_registry(tmp_path, story)
