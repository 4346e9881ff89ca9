"""A request is approved with every obligation met, or refused with a reason. The vault is a real one."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from proxy.agent import Agent, AgentState
from proxy.exchange import Exchange, Injected
from proxy.gateway import Approved, Gateway, NotOpen
from proxy.grant import Grant
from proxy.outbound import secrets_sent
from proxy.policy import Policy
from proxy.reason import Reason
from proxy.request import RequestView
from proxy.rulefile import load_policy
from proxy.sealing import MasterKey
from proxy.secret import Secret
from proxy.store import Store
from proxy.upstream import Refused
from proxy.url import parse_url, url_of
from proxy.vault import Lease, Vault

NOW = 1_000.0
AGENT = Agent("coder-1", state=AgentState.ACTIVE)
RULES = b"""
version: 1
rules:
  - {name: plain, match: {host: plain.test}, action: allow}
  - {name: forbidden, match: {host: plain.test, path: /admin/**}, action: block}
  - {name: bearer, match: {host: api.test}, action: allow, inject: [{credential: api, as: bearer}]}
  - {name: unscoped, match: {host: other.test}, action: allow, inject: [{credential: api, as: bearer}]}
  - {name: missing, match: {host: missing.test}, action: allow, inject: [{credential: nothing, as: bearer}]}
  - {name: mute, match: {host: mute.test}, action: allow, inject: [{credential: mute}]}
  - {name: binary, match: {host: binary.test}, action: allow, inject: [{credential: binary, as: bearer}]}
  - name: in-path
    match: {host: path.test}
    action: allow
    inject: [{credential: binary, as: {placeholder: {in: [path]}}}]
  - name: two
    match: {host: two.test}
    action: allow
    inject: [{credential: one, as: bearer}, {credential: two, as: {query: {name: key}}}]
  - name: half
    match: {host: half.test}
    action: allow
    inject: [{credential: one, as: bearer}, {credential: nothing, as: {query: {name: key}}}]
  - name: moved
    match: {host: old.test}
    action: allow
    rewrite: {url: {host: api.test}, headers: {set: {x-env: prod}}}
    response: {headers: {remove: [set-cookie]}}
  - name: moved-away
    match: {host: api-old.test}
    action: allow
    rewrite: {url: {host: other.test}}
  - name: answered
    match: {host: answer.test}
    action: allow
    respond: {status: 204}
  - {name: inside, match: {host: inside.test}, action: allow, private: true}
"""
POLICY = load_policy({"rules.yaml": RULES})[0]


def new_exchange() -> Exchange:
    return Exchange("id", NOW, "listener", "client")


async def approve(gateway: Gateway, agent: Agent, view: RequestView, exchange: Exchange) -> Approved:
    leases: dict[str, Lease] = {}
    while True:
        try:
            return gateway.approve(agent, view, exchange, leases)
        except NotOpen as missing:
            leases[missing.name] = await gateway.open(missing.name)


class World:
    """A gateway before a vault, and an exchange."""

    def __init__(self, vault: Vault, policy: Policy | None = POLICY) -> None:
        self.gateway = Gateway(lambda: policy, lambda: NOW)
        self.gateway.vault = vault
        self.exchange = new_exchange()

    async def approved(self, url: str, method: str = "GET") -> Approved:
        self.exchange = new_exchange()
        return await approve(self.gateway, AGENT, parse_url(method, url), self.exchange)

    async def refused(self, url: str, agent: Agent = AGENT, method: str = "GET") -> Refused:
        self.exchange = new_exchange()
        with pytest.raises(Refused) as refused:
            await approve(self.gateway, agent, parse_url(method, url), self.exchange)
        assert not self.exchange.allowed
        assert self.exchange.injected == ()
        return refused.value


def in_world(folder: Path, story: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        async with await Store.open("embedded", folder) as store:
            vault = Vault(store, MasterKey(os.urandom(32)), folder, clock=lambda: NOW)
            grant = Grant.parse(hosts=["api.test"], methods=["GET"], agents=["coder-*"])
            wide = Grant.parse(hosts=["**"])
            await vault.put("api", "static", {}, Secret(b"s3cret"), grant)
            await vault.put("one", "static", {}, Secret(b"first"), wide)
            await vault.put("two", "static", {}, Secret(b"second"), wide)
            await vault.put("mute", "static", {}, Secret(b"s3cret"), wide)
            await vault.put("binary", "placeholder", {}, Secret(b"\x01\n\xff"), wide)
            await story(World(vault))

    asyncio.run(main())


def test_what_a_rule_allows_goes_out_as_it_is(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        approved = await world.approved("https://plain.test/x?y")
        assert url_of(approved.outbound.view) == "https://plain.test/x?y"
        assert (approved.answer, approved.private, approved.response_edits) == (None, False, ())
        exchange = world.exchange
        assert (exchange.allowed, exchange.reason, exchange.rule) == (True, Reason.ALLOWED, "plain")
        assert exchange.rule_at == "rules.yaml:4"
        assert (exchange.policy, exchange.rewritten, exchange.injected) == (POLICY.digest, False, ())
        assert 0 < exchange.decision_duration < 1

    in_world(tmp_path, story)


def test_a_refusal_has_its_reason_and_the_rule_that_made_it(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        refused = await world.refused("https://unknown.test/")
        assert (refused.reason, refused.rule, world.exchange.rule) == (Reason.NO_RULE, None, "")
        refused = await world.refused("https://plain.test/admin/x")
        assert refused.reason is Reason.BLOCKED
        assert refused.rule
        assert refused.rule.name == world.exchange.rule == "forbidden"
        killed = Agent("coder-1", state=AgentState.KILLED)
        assert (await world.refused("https://plain.test/", killed)).reason is Reason.AGENT_KILLED
        refused = await world.refused("https://plain.test/", method="TRACE")
        assert (refused.reason, refused.detail) == (Reason.PROTOCOL_NOT_ALLOWED, "TRACE is never forwarded.")

    in_world(tmp_path, story)


def test_without_a_policy_everything_is_refused(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        assert world.gateway.vault
        empty = World(world.gateway.vault, policy=None)
        assert (await empty.refused("https://plain.test/")).reason is Reason.POLICY_UNAVAILABLE

    in_world(tmp_path, story)


def test_a_credential_is_added_and_on_record(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        approved = await world.approved("https://api.test/v1")
        assert approved.outbound.view.headers == ((b"authorization", b"Bearer s3cret"),)
        assert world.exchange.injected == (Injected("api", 1, "header:authorization"),)
        assert secrets_sent(approved.outbound) == (("api", b"s3cret"),)
        assert "s3cret" not in repr(world.exchange)

    in_world(tmp_path, story)


def test_several_credentials_are_added_in_order(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        approved = await world.approved("https://two.test/")
        assert approved.outbound.view.query == "key=second"
        assert [one.credential for one in world.exchange.injected] == ["one", "two"]

    in_world(tmp_path, story)


def test_the_grant_is_checked_although_a_rule_asks(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        assert (await world.refused("https://other.test/")).reason is Reason.CREDENTIAL_SCOPE
        assert (await world.refused("https://api.test/", method="POST")).reason is Reason.CREDENTIAL_SCOPE
        stranger = Agent("stranger", state=AgentState.ACTIVE)
        assert (await world.refused("https://api.test/", stranger)).reason is Reason.CREDENTIAL_SCOPE
        assert world.exchange.rule == "bearer"

    in_world(tmp_path, story)


def test_the_grant_is_checked_against_where_the_request_goes(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        approved = await world.approved("https://old.test/x")
        assert url_of(approved.outbound.view) == "https://api.test/x"
        assert approved.outbound.view.headers == ((b"x-env", b"prod"), (b"authorization", b"Bearer s3cret"))
        assert (world.exchange.rule, world.exchange.rewritten) == ("moved", True)
        assert [edit.remove for edit in approved.response_edits] == [("set-cookie",)]
        assert (await world.refused("https://api-old.test/")).reason is Reason.CREDENTIAL_SCOPE

    in_world(tmp_path, story)


@pytest.mark.parametrize("host", ["missing", "mute", "binary", "path", "half"])
def test_a_credential_that_cannot_be_added_is_unavailable(host: str, tmp_path: Path) -> None:
    """There is none, nothing says how, or its octets cannot stand there; half of two is not enough."""

    async def story(world: World) -> None:
        refused = await world.refused(f"https://{host}.test/slp_placeholder_binary")
        assert refused.reason is Reason.CREDENTIAL_UNAVAILABLE

    in_world(tmp_path, story)


def test_without_a_vault_only_what_needs_none_goes_on(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.gateway.vault = None
        assert (await world.refused("https://api.test/")).reason is Reason.CREDENTIAL_UNAVAILABLE
        await world.approved("https://plain.test/")

    in_world(tmp_path, story)


def test_an_answer_of_a_rule_needs_no_vault(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.gateway.vault = None
        approved = await world.approved("https://answer.test/")
        assert approved.answer
        assert approved.answer.status == 204
        assert world.exchange.injected == ()

    in_world(tmp_path, story)


def test_a_private_rule_narrows_the_upstream(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        assert (await world.approved("https://inside.test/")).private

    in_world(tmp_path, story)
