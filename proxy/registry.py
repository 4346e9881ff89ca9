"""The registered agents: who they are, whether they may act, and their tokens, of which only digests are kept.

On the hot path everything is a look-up in memory; the store is asked only when something changed there. What a request
may do is policy's decision.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from proxy.agent import NEVER, Agent, AgentState, parse_agent_id
from proxy.agenttoken import make_token, token_digest
from proxy.killswitch import Stops
from proxy.problem import UserError
from proxy.sealing import MasterKey
from proxy.store import Store

TABLE = "agents"
EVERYBODY = _ALL = "*"  # no agent's id: the record of the switch that stops everybody
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)  # what reading a damaged record raises
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One agent's record; `agent.state` is its own, before the switch for all."""

    agent: Agent
    digest: str
    nonce: str = ""  # what the token follows from, together with the master key

    @staticmethod
    def parse(agent_id: str, text: str) -> _Entry:
        """Raises ValueError, KeyError or TypeError for a damaged record."""
        data: dict[str, Any] = json.loads(text)
        expires = data["expires"]
        agent = Agent(
            parse_agent_id(agent_id),
            {str(key): str(value) for key, value in data["labels"].items()},
            str(data["on_behalf_of"]),
            NEVER if expires is None else float(expires),
            AgentState(data["state"]),
            str(data["kill_reason"]),
        )
        return _Entry(agent, str(data["digest"]), str(data.get("nonce", "")))

    def text(self) -> str:
        """The record as `parse` reads it."""
        data = {
            "labels": dict(self.agent.labels),
            "on_behalf_of": self.agent.on_behalf_of,
            "expires": None if self.agent.expires == NEVER else self.agent.expires,
            "state": self.agent.state,
            "kill_reason": self.agent.kill_reason,
            "digest": self.digest,
            "nonce": self.nonce,
        }
        return json.dumps(data, sort_keys=True)


@dataclass(slots=True)
class _Table:
    """Agents in memory, found by id and by digest."""

    entries: dict[str, _Entry] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)  # digest -> id
    stopped: str | None = None  # why everybody is killed; None: nobody is

    def put(self, agent_id: str, text: str | None) -> None:
        """Takes in a record, or its absence. One that is damaged is as good as absent; a damaged switch is on."""
        if agent_id == _ALL:
            self.stopped = _stopped(text)
            return
        old = self.entries.pop(agent_id, None)
        if old and self.ids.get(old.digest) == agent_id:
            del self.ids[old.digest]
        if text is None:
            return
        try:
            entry = _Entry.parse(agent_id, text)
        except _DAMAGED:
            _log.warning("the record of agent %s is damaged; it is refused", ascii(agent_id))
            return
        self.entries[agent_id] = entry
        self.ids[entry.digest] = agent_id

    def agent(self, agent_id: str) -> Agent | None:
        """The agent as it may act now, all switches counted."""
        entry = self.entries.get(agent_id)
        if entry is None or self.stopped is None or entry.agent.state is AgentState.KILLED:
            return entry.agent if entry else None
        return replace(entry.agent, state=AgentState.KILLED, kill_reason=self.stopped)


class Registry:
    """The agents of one store. Changes go to the store; `by_token` and `by_id` see them when the feed told."""

    def __init__(
        self,
        store: Store,
        master: MasterKey | None = None,
        *,
        clock: Callable[[], float] = time.time,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """`master` is needed to issue tokens that `reissue` can tell again."""
        self.loaded = False
        self.epoch = object()  # another one when any agent may have changed
        self._master = master
        self._store = store
        self._clock = clock
        self._random = random
        self._table = _Table()
        self._stops = Stops()
        self.on_change: Callable[[frozenset[str]], None] = lambda revoked: None
        self.on_kill: Callable[[], None] = lambda: None

    # For the proxy

    def by_token(self, token: str) -> Agent | None:
        """Whose token this is. The caller looks at state and expiry."""
        digest = token_digest(token)
        agent_id = self._table.ids.get(digest) if digest else None
        return self.by_id(agent_id) if agent_id else None

    def by_id(self, agent_id: str) -> Agent | None:
        """The agent of that id, whatever its state."""
        agent = self._table.agent(agent_id)
        if agent is None or not self._stops or agent.state is AgentState.KILLED:
            return agent
        why = self._stops.reason(agent_id)
        return agent if why is None else replace(agent, state=AgentState.KILLED, kill_reason=why)

    def ids(self) -> list[str]:
        """Every agent there is."""
        return list(self._table.entries)

    def living(self) -> list[str]:
        """Every agent that is not killed."""
        return [name for name in self._table.entries if (a := self.by_id(name)) and a.state is AgentState.ACTIVE]

    def stop_here(self, stops: Stops) -> None:
        """Stops agents of this process, whatever the store says of them."""
        self._stops, self.epoch = stops, object()
        self.on_kill()
        self.on_change(frozenset())

    def counts(self) -> dict[str, int]:
        """How many agents are active, killed and expired; a killed one counts once."""
        now = self._clock()
        agents = [agent for agent_id in self._table.entries if (agent := self.by_id(agent_id))]
        found = Counter(
            "expired" if agent.state == "active" and agent.expired(now) else agent.state for agent in agents
        )
        return {state: found[state] for state in ("active", "killed", "expired")}

    async def apply_changes(self, names: set[str] | None) -> None:
        """Loads the agents of `names` again, or all, and tells `on_kill` and `on_change`, with those whose token ended.

        Raises StoreUnavailable; what is known stays then.
        """
        records = await self._store.get_all(TABLE, names)
        before, self.epoch = dict(self._table.ids), object()
        if names is None:
            self._table = _table(records)
        for name in names or ():
            self._table.put(name, records.get(name))
        self.loaded = self.loaded or names is None
        touched = self._table.entries if names is None or _ALL in names else names
        if any((agent := self.by_id(name)) and agent.state is AgentState.KILLED for name in touched):
            self.on_kill()
        self.on_change(frozenset(name for digest, name in before.items() if digest not in self._table.ids))

    # For the operator

    async def add(
        self, agent_id: str, labels: Mapping[str, str] | None = None, ttl: float | None = None, on_behalf_of: str = ""
    ) -> str:
        """Registers an agent for `ttl` seconds (None: for ever); its token, kept nowhere. Raises UserError."""
        try:
            parse_agent_id(agent_id)
        except ValueError as error:
            raise UserError(str(error)) from None
        if any(_CONTROL.search(text) for pair in (labels or {}).items() for text in pair) or _CONTROL.search(
            on_behalf_of
        ):
            raise UserError("labels and --on-behalf-of must be text without control characters")
        if ttl is not None and not 0 < ttl < NEVER:
            raise UserError("--ttl must be a time ahead, such as 8h; leave it out for an agent that does not expire")
        expires = NEVER if ttl is None else self._clock() + ttl
        token, nonce = self._issue(agent_id)

        def change(old: str | None) -> str:
            if old is not None:
                raise UserError(
                    f"agent {agent_id} exists already: `sallyport agent token {agent_id}` gives it a new token, "
                    f"`sallyport agent remove {agent_id}` ends it"
                )
            agent = Agent(agent_id, dict(labels or {}), on_behalf_of, expires, AgentState.ACTIVE)
            return _Entry(agent, token_digest(token) or "", nonce).text()

        await self._store.change(TABLE, agent_id, change)
        return token

    async def token(self, agent_id: str) -> str:
        """A new token for an agent, which ends the old one. Raises UserError."""
        token, nonce = self._issue(agent_id)
        await self._edit(agent_id, lambda entry: replace(entry, digest=token_digest(token) or "", nonce=nonce))
        return token

    async def reissue(self, agent_id: str) -> str:
        """The token an agent has, told again: it follows from the master key. Raises UserError."""
        entry = _table(await self._store.get_all(TABLE, [agent_id])).entries.get(agent_id)
        if entry is None:
            raise _missing(agent_id)
        for key in self._master.token_keys() if self._master else ():
            token = make_token(key.source(agent_id, entry.nonce))
            if hmac.compare_digest(token_digest(token) or "", entry.digest):
                return token
        raise UserError(
            f"the token of {agent_id} was issued under another master key: "
            f"`sallyport agent token {agent_id}` issues a new one"
        )

    def _issue(self, agent_id: str) -> tuple[str, str]:
        nonce = self._random(16).hex()
        return make_token(self._master.tokens.source(agent_id, nonce) if self._master else self._random), nonce

    async def remove(self, agent_id: str) -> None:
        """Forgets an agent. Raises UserError if there is none."""

        def change(old: str | None) -> None:
            if old is None or agent_id == _ALL:
                raise _missing(agent_id)

        await self._store.change(TABLE, agent_id, change)

    async def list(self) -> list[Agent]:
        """Every agent, by id, from the store. Raises StoreUnavailable."""
        table = _table(await self._store.get_all(TABLE))
        return [agent for agent_id in sorted(table.entries) if (agent := table.agent(agent_id))]

    async def show(self, agent_id: str) -> Agent:
        """One agent from the store. Raises UserError if there is none."""
        agent = _table(await self._store.get_all(TABLE, [agent_id, _ALL])).agent(agent_id)
        if agent is None:
            raise _missing(agent_id)
        return agent

    async def kill(self, agent_id: str | None, reason: str = "") -> None:
        """Stops an agent, or (None) all there are and will be, until revived. Raises UserError."""
        if _CONTROL.search(reason):
            raise UserError("--reason must be text without control characters")
        if agent_id is None:
            await self._store.change(TABLE, _ALL, lambda _: json.dumps({"reason": reason}))
        else:
            await self._edit(agent_id, lambda entry: _with(entry, AgentState.KILLED, reason))

    async def revive(self, agent_id: str | None) -> None:
        """Ends `kill` of the same agent; None ends the stop of all, and who was killed alone stays so."""
        if agent_id is None:
            await self._store.change(TABLE, _ALL, lambda _: None)
        else:
            await self._edit(agent_id, lambda entry: _with(entry, AgentState.ACTIVE, ""))

    async def _edit(self, agent_id: str, edit: Callable[[_Entry], _Entry]) -> None:
        def change(old: str | None) -> str:
            if old is None or agent_id == _ALL:
                raise _missing(agent_id)
            try:
                return edit(_Entry.parse(agent_id, old)).text()
            except _DAMAGED:
                raise UserError(f"the record of {agent_id} is damaged: remove it and add it again") from None

        await self._store.change(TABLE, agent_id, change)


def _table(records: Mapping[str, str]) -> _Table:
    table = _Table()
    for agent_id, text in records.items():
        table.put(agent_id, text)
    return table


def _stopped(text: str | None) -> str | None:
    if text is None:
        return None
    try:
        return str(json.loads(text)["reason"])
    except _DAMAGED:
        return ""


def _with(entry: _Entry, state: AgentState, reason: str) -> _Entry:
    return replace(entry, agent=replace(entry.agent, state=state, kill_reason=reason))


def _missing(agent_id: str) -> UserError:
    return UserError(f"there is no agent {ascii(agent_id)[1:-1]}: `sallyport agent list` shows those there are")
