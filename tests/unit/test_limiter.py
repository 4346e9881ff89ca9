"""Limits are counted in the store, with as few questions as exactness allows."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from proxy import limiter as module
from proxy.agent import Agent
from proxy.exchange import Exchange
from proxy.limiter import Limiter
from proxy.policy import Limits, Rule
from proxy.reason import Reason
from proxy.store import Store
from proxy.upstream import Refused
from tests.storage import eventually

ALICE, BOB = Agent("alice"), Agent("bob")


class Counted(Store):
    """A store that counts what it is asked."""

    asked = 0

    async def run(self, script: str, key: str, *arguments: str | float) -> object:
        self.asked += 1
        return await super().run(script, key, *arguments)


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


type Story = Callable[[Counted, Clock, Callable[[], Limiter]], Awaitable[None]]


def with_store(state: Path, story: Story) -> None:
    async def main() -> None:
        async with await Counted.open("embedded", state) as store:
            clock = Clock()
            await story(store, clock, lambda: Limiter(store, lambda: True, clock))

    asyncio.run(main())


def exchange() -> Exchange:
    return Exchange("1", 0.0, "", "")


def rated(most: int, period: float = 3600.0) -> Rule:
    return Rule("r", "r.yaml:1", limits=Limits(rate=(most, period)))


def at_a_time(most: int) -> Rule:
    return Rule("r", "r.yaml:1", limits=Limits(concurrency=most))


async def allowed(limiter: Limiter, rule: Rule, agent: Agent = ALICE, times: int = 1) -> int:
    """How many of so many requests may pass."""
    count, reasons = 0, set()
    for _ in range(times):
        try:
            await limiter.admit(agent, rule, exchange())
            count += 1
        except Refused as refused:
            reasons.add((refused.reason, refused.limit))
    assert reasons <= {(Reason.LIMIT_EXCEEDED, "rate")}
    return count


def test_a_rate_is_each_agents_own(tmp_path: Path) -> None:
    async def story(store: Counted, clock: Clock, limiter: Callable[[], Limiter]) -> None:
        one = limiter()
        assert await allowed(one, rated(3), ALICE, 9) == 3
        assert await allowed(one, rated(3), BOB, 9) == 3

    with_store(tmp_path, story)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_flood_gets_the_rate_and_asks_seldom(tmp_path: Path, workers: int) -> None:
    """Over all workers together; an empty bucket is not asked again until there is something in it."""

    async def story(store: Counted, clock: Clock, limiter: Callable[[], Limiter]) -> None:
        limiters = [limiter() for _ in range(workers)]
        total = 0
        for _ in range(2000 // workers):
            for each in limiters:
                total += await allowed(each, rated(1000))
        assert total == 1000
        assert store.asked < 60

    with_store(tmp_path, story)


def test_what_is_handed_out_is_never_more_than_the_rate(tmp_path: Path) -> None:
    """One busy worker may hold a tenth that another one would want."""

    async def story(store: Counted, clock: Clock, limiter: Callable[[], Limiter]) -> None:
        hoarder, other = limiter(), limiter()
        first = await allowed(hoarder, rated(100), times=40)
        assert first == 40
        second = await allowed(other, rated(100), times=200)
        assert 50 <= second <= 60
        assert await allowed(hoarder, rated(100), times=200) == 60 - second

    with_store(tmp_path, story)


def test_a_slow_worker_takes_one_at_a_time(tmp_path: Path) -> None:
    """So nothing is wasted."""

    async def story(store: Counted, clock: Clock, limiter: Callable[[], Limiter]) -> None:
        limiters = [limiter(), limiter()]
        total = 0
        for number in range(40):
            clock.now += 10
            total += await allowed(limiters[number % 2], rated(30))
        assert total == 30

    with_store(tmp_path, story)


def test_a_refusal_says_when_the_next_may_come(tmp_path: Path) -> None:
    async def story(store: Counted, clock: Clock, limiter: Callable[[], Limiter]) -> None:
        one = limiter()
        await allowed(one, rated(2, 3600), times=2)
        with pytest.raises(Refused) as refused:
            await one.admit(ALICE, rated(2, 3600), exchange())
        assert 1795 <= refused.value.retry_after <= 1800

    with_store(tmp_path, story)


def test_places_are_given_back_in_order(tmp_path: Path) -> None:
    """Who ends and begins again at once finds its place free."""

    async def story(store: Counted, clock: Clock, limiter: Callable[[], Limiter]) -> None:
        one = limiter()
        for _ in range(50):
            held = exchange()
            await one.admit(ALICE, at_a_time(1), held)
            one.release(held)
        assert not held.held
        await eventually(lambda: not one._places)

    with_store(tmp_path, story)


def test_places_are_shared_and_a_dead_workers_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that lives renews what it holds."""
    monkeypatch.setattr(module, "TTL", 0.6)

    async def story(store: Counted, clock: Clock, limiter: Callable[[], Limiter]) -> None:
        dead, living, other = limiter(), limiter(), limiter()
        renewing = asyncio.ensure_future(living.run())
        await living.admit(ALICE, at_a_time(2), exchange())
        await dead.admit(ALICE, at_a_time(2), exchange())
        assert not await taken(other)
        await eventually(lambda: taken(other))
        assert not await taken(living)
        renewing.cancel()

    async def taken(limiter: Limiter) -> bool:
        try:
            await limiter.admit(ALICE, at_a_time(2), exchange())
        except Refused:
            return False
        return True

    with_store(tmp_path, story)


def test_what_ended_while_it_waited_holds_nothing(tmp_path: Path) -> None:
    """Its agent was killed, or its client has gone."""

    async def story(store: Counted, clock: Clock, limiter: Callable[[], Limiter]) -> None:
        one, gone = limiter(), exchange()
        gone.ended = True
        await one.admit(ALICE, at_a_time(1), gone)
        await one.admit(ALICE, at_a_time(1), exchange())

    with_store(tmp_path, story)


def test_what_cannot_be_counted_is_refused(tmp_path: Path) -> None:
    async def story(store: Counted, clock: Clock, limiter: Callable[[], Limiter]) -> None:
        blind = Limiter(store, lambda: False, clock)
        for rule in (rated(1), at_a_time(1)):
            with pytest.raises(Refused) as refused:
                await blind.admit(ALICE, rule, exchange())
            assert refused.value.reason is Reason.STORE_UNAVAILABLE
        assert store.asked == 0

    with_store(tmp_path, story)
