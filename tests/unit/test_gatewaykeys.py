"""A gateway's token proves what its key may prove, for as long as it may, and nothing in the store widens that."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from proxy.gatewaykeys import LIFE, SKEW, VERIFIED, GatewayKeys
from proxy.problem import UserError
from proxy.records import TABLE
from proxy.sealing import MasterKey
from proxy.store import Store
from proxy.vault import Vault

MASTER = MasterKey(b"\x07" * 32)

NOW = 1_000_000.0

type Story = Callable[[Store, GatewayKeys], Awaitable[None]]


def mint(key: str, claims: dict[str, Any] | None = None, alg: str = "HS256", **header: Any) -> str:
    """A token as docs/identity.md says that a gateway makes it."""

    def encoded(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    head = {"alg": alg, "kid": "one", **header}
    body = {"sub": "coder-1", "exp": NOW + 60, **(claims or {})}
    signed = f"{encoded(json.dumps(head).encode())}.{encoded(json.dumps(body).encode())}"
    return f"{signed}.{encoded(hmac.digest(key.encode(), signed.encode(), hashlib.sha256))}"


def with_gateways(state: Path, story: Story) -> None:
    async def main() -> None:
        async with await Store.open("embedded", state) as store:
            await story(store, GatewayKeys(store, MASTER, state, clock=lambda: NOW))

    asyncio.run(main())


def test_a_token_of_a_gateway_proves_its_agent(tmp_path: Path) -> None:
    async def story(store: Store, gateways: GatewayKeys) -> None:
        assert not gateways
        key = await gateways.add("one", ["coder-*", "x"])
        assert gateways.verify(mint(key), NOW) is None
        await gateways.apply_changes(None)
        assert gateways
        for _ in range(2):  # the second time from memory
            proof = gateways.verify(mint(key), NOW)
            assert proof
            assert (proof.name, proof.agent, proof.expires, proof.told) == ("gateway:one", "coder-1", NOW + 65, None)
        delegated = gateways.verify(mint(key, {"sub": "ada", "act": {"sub": "x"}}), NOW)
        assert delegated
        assert delegated.told
        assert (delegated.agent, delegated.told.on_behalf_of) == ("x", "ada")

    with_gateways(tmp_path, story)


@pytest.mark.parametrize(
    ("claims", "header"),
    [
        ({"sub": "root"}, {}),
        ({"sub": "xcoder-1"}, {}),
        ({"sub": "coder-1\n"}, {}),
        ({"sub": "coder-1:x"}, {}),
        ({"sub": ["coder-1"]}, {}),
        ({"sub": "coder-1", "act": {"sub": "root"}}, {}),
        ({"exp": NOW - SKEW}, {}),
        ({"exp": NOW + LIFE + SKEW + 1}, {}),
        ({"exp": None}, {}),
        ({"exp": str(NOW + 60)}, {}),
        ({"exp": True}, {}),
        ({"nbf": NOW + SKEW + 1}, {}),
        ({"nbf": "soon"}, {}),
        ({}, {"alg": "none"}),
        ({}, {"alg": "HS512"}),
        ({}, {"alg": "hs256"}),
        ({}, {"kid": "two"}),
        ({}, {"kid": None}),
        ({}, {"kid": ["one"]}),
        ({}, {"crit": ["kid"]}),
    ],
)
def test_a_token_of_another_form_proves_nothing(tmp_path: Path, claims: dict[str, Any], header: dict[str, Any]) -> None:
    """Although its signature is right."""

    async def story(store: Store, gateways: GatewayKeys) -> None:
        key = await gateways.add("one", ["coder-*"])
        await gateways.apply_changes(None)
        assert gateways.verify(mint(key), NOW)
        assert gateways.verify(mint(key, claims, **{"alg": "HS256", **header}), NOW) is None

    with_gateways(tmp_path, story)


def test_a_wrong_signature_proves_nothing(tmp_path: Path) -> None:
    async def story(store: Store, gateways: GatewayKeys) -> None:
        key, other = await gateways.add("one", ["coder-1"]), await gateways.add("two", ["coder-2"])
        await gateways.apply_changes(None)
        good = mint(key)
        head, body, mac = good.split(".")
        for token in (mint(other), mint(""), f"{head}.{body}.", f"{head}.{body}.{mac[:-2]}", f"{head}.{body}.{mac}A"):
            assert gateways.verify(token, NOW) is None
        assert gateways.verify(mint(other, {"sub": "coder-2"}, kid="one"), NOW) is None
        assert gateways.verify(mint(other, {"sub": "coder-2"}, kid="two"), NOW)

    with_gateways(tmp_path, story)


def test_a_remembered_token_still_ends(tmp_path: Path) -> None:
    async def story(store: Store, gateways: GatewayKeys) -> None:
        token = mint(await gateways.add("one", ["coder-*"]))
        await gateways.apply_changes(None)
        assert gateways.verify(token, NOW)
        assert gateways.verify(token, NOW + 60 + SKEW) is None

    with_gateways(tmp_path, story)


def test_memory_of_tokens_is_bounded(tmp_path: Path) -> None:
    async def story(store: Store, gateways: GatewayKeys) -> None:
        key = await gateways.add("one", ["coder-*"])
        await gateways.apply_changes(None)
        for number in range(VERIFIED + 10):
            assert gateways.verify(mint(key, {"jti": number}), NOW)
        assert len(gateways._verified) <= VERIFIED

    with_gateways(tmp_path, story)


def test_a_removed_gateway_ends_and_cannot_be_put_back(tmp_path: Path) -> None:
    async def story(store: Store, gateways: GatewayKeys) -> None:
        token = mint(await gateways.add("one", ["coder-*"]))
        old = await store.get(TABLE, "gateway:one")
        await gateways.apply_changes(None)
        await gateways.remove("one")
        await gateways.apply_changes({"gateway:one"})
        assert not gateways
        await store.change(TABLE, "gateway:one", lambda _: old)
        await gateways.apply_changes({"gateway:one"})
        assert gateways.verify(token, NOW) is None
        with pytest.raises(UserError, match="there is no gateway two"):
            await gateways.remove("two")

    with_gateways(tmp_path, story)


def test_whoever_writes_to_the_store_cannot_widen_a_gateway(tmp_path: Path) -> None:
    async def story(store: Store, gateways: GatewayKeys) -> None:
        token = mint(await gateways.add("one", ["coder-*"]), {"sub": "root"})
        text = await store.get(TABLE, "gateway:one")
        assert text
        assert "slg_" not in text
        await store.change(TABLE, "gateway:one", lambda _: text.replace("coder-*", "*"))
        await gateways.apply_changes(None)
        assert gateways.verify(token, NOW) is None
        assert [(gateway.name, gateway.problem != "") for gateway in await gateways.list()] == [("one", True)]

    with_gateways(tmp_path, story)


def test_another_master_key_opens_no_gateway(tmp_path: Path) -> None:
    async def story(store: Store, gateways: GatewayKeys) -> None:
        await gateways.add("one", ["coder-*"])
        stranger = GatewayKeys(store, MasterKey(b"\x01" * 32), tmp_path)
        await stranger.apply_changes(None)
        assert not stranger

    with_gateways(tmp_path, story)


def test_gateways_are_no_credentials(tmp_path: Path) -> None:
    """They lie among them, but no rule can inject one and `vault list` does not show them."""

    async def story(store: Store, gateways: GatewayKeys) -> None:
        await gateways.add("one", ["coder-*"])
        assert await Vault(store, MASTER, tmp_path).list() == []
        (gateway,) = await gateways.list()
        assert (gateway.name, gateway.agents, gateway.life, gateway.created) == ("one", ("coder-*",), LIFE, NOW)

    with_gateways(tmp_path, story)


@pytest.mark.parametrize(
    ("name", "agents", "life", "words"),
    [
        ("a b", ["x"], 60.0, "cannot be a gateway's name"),
        ("one", [], 60.0, "give --agents"),
        ("one", ["a b"], 60.0, "write an agent's id"),
        ("one", ["x"], 0.0, "--ttl"),
        ("one", ["x"], 3601.0, "--ttl"),
        ("there", ["x"], 60.0, "exists already"),
    ],
)
def test_a_mistake_is_told(tmp_path: Path, name: str, agents: list[str], life: float, words: str) -> None:
    async def story(store: Store, gateways: GatewayKeys) -> None:
        await gateways.add("there", ["x"])
        with pytest.raises(UserError, match=words):
            await gateways.add(name, agents, life)

    with_gateways(tmp_path, story)
