"""Canaries look like keys, open nothing, and the store does not tell them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from proxy.canary import TABLE, Canaries
from proxy.problem import UserError
from proxy.sealing import MasterKey
from proxy.store import Store

type Story = Callable[[Store, Canaries], Awaitable[None]]


def with_canaries(state: Path, story: Story) -> None:
    async def main() -> None:
        async with await Store.open("embedded", state) as store:
            await story(store, Canaries(store, MasterKey(bytes(range(32)))))

    asyncio.run(main())


def test_a_canary_is_told_again_and_is_like_no_other(tmp_path: Path) -> None:
    async def story(store: Store, canaries: Canaries) -> None:
        first, second = await canaries.add("first", 1.0), await canaries.add("second", 2.0, "ghp_")
        assert first.startswith("sk-live-")
        assert second.startswith("ghp_")
        assert first[-40:] != second[-40:]
        found = await canaries.list()
        assert [(c.name, c.token, c.created) for c in found] == [("first", first, 1.0), ("second", second, 2.0)]
        assert await canaries.tokens(["first", "none"]) == {"first": first.encode()}

    with_canaries(tmp_path, story)


def test_the_store_does_not_tell_which_texts_to_avoid(tmp_path: Path) -> None:
    async def story(store: Store, canaries: Canaries) -> None:
        token = await canaries.add("first", 1.0)
        assert token[-40:] not in str(await store.get_all(TABLE))

    with_canaries(tmp_path, story)


def test_a_name_is_taken_until_it_is_removed(tmp_path: Path) -> None:
    async def story(store: Store, canaries: Canaries) -> None:
        token = await canaries.add("first", 1.0)
        with pytest.raises(UserError, match="there is a canary first already"):
            await canaries.add("first", 2.0)
        await canaries.remove("first")
        with pytest.raises(UserError, match="there is no canary first"):
            await canaries.remove("first")
        assert await canaries.add("first", 3.0) != token

    with_canaries(tmp_path, story)


@pytest.mark.parametrize("prefix", ["two words", "line\n", "\u00fc", "x" * 65])
def test_a_prefix_is_text_that_a_key_can_begin_with(tmp_path: Path, prefix: str) -> None:
    async def story(store: Store, canaries: Canaries) -> None:
        with pytest.raises(UserError, match="--prefix"):
            await canaries.add("first", 1.0, prefix)

    with_canaries(tmp_path, story)


def test_a_record_of_another_master_key_or_a_damaged_one_is_shown_without_a_token(tmp_path: Path) -> None:
    async def story(store: Store, canaries: Canaries) -> None:
        await Canaries(store, MasterKey(os.urandom(32))).add("other", 1.0)
        await store.change(TABLE, "broken", lambda _: "{")
        assert [(c.name, c.token) for c in await canaries.list()] == [("broken", ""), ("other", "")]
        assert await canaries.tokens() == {}

    with_canaries(tmp_path, story)
