"""Counts what rules limit, per agent and rule, in the store that all workers and replicas share.

Rates are token buckets: so many at once, and then as many in each period. A bucket hands out a few tokens at a time to
a worker that is busy (a tenth of the rate at most), so a flood does not ask the store for each request, and an empty
one is not asked again before there is a token. Places of a concurrency limit are held for `TTL` seconds and renewed,
so what a killed worker held comes back. What cannot be counted is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from proxy.agent import Agent
from proxy.exchange import Exchange, Held
from proxy.policy import Decision, Rule
from proxy.reason import Reason
from proxy.store import Store, StoreUnavailable
from proxy.upstream import Refused

TTL = 15.0  # seconds
MOST = 10_000  # buckets remembered; forgetting one costs a question
BUSY = 0.1  # seconds between two questions that make a worker a busy one
BACKOFF = 0.5  # seconds without asking a store that did not answer

_log = logging.getLogger("sallyport")

# The store's own clock counts, so that proxies need not agree on the time; where it goes back nothing is earned.
_TAKE = """
local t = redis.call('TIME')
local now, most, period, want = t[1] + t[2] / 1e6, tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local kept = redis.call('HMGET', KEYS[1], 'tokens', 'at')
local earned = math.max(0, now - (tonumber(kept[2]) or now)) * most / period
local tokens = math.min(most, (tonumber(kept[1]) or most) + earned)
local given = math.min(want, math.floor(tokens + 1e-6))
redis.call('HSET', KEYS[1], 'tokens', string.format('%.6f', tokens - given), 'at', string.format('%.6f', now))
redis.call('PEXPIRE', KEYS[1], math.ceil(period * 1000) + 1000)
return {given, math.ceil((1 - (tokens - given)) * period / most * 1000)}
"""
_HOLD = """
local t = redis.call('TIME')
local now = t[1] + t[2] / 1e6
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[1]) then return 0 end
redis.call('ZADD', KEYS[1], string.format('%.6f', now + ARGV[2]), ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[2] * 1000)
return 1
"""
_RENEW = """
local t = redis.call('TIME')
for place = 2, #ARGV do redis.call('ZADD', KEYS[1], string.format('%.6f', t[1] + t[2] / 1e6 + ARGV[1]), ARGV[place]) end
redis.call('PEXPIRE', KEYS[1], ARGV[1] * 1000)
return 1
"""
_RELEASE = "return redis.call('ZREM', KEYS[1], ARGV[1])"


@dataclass(slots=True)
class _Bucket:
    """What this worker has of one rate. Times are of the loop's clock."""

    tokens: int = 0
    until: float = 0.0  # when what is left of `tokens` is worth nothing any more
    empty_until: float = 0.0
    want: int = 1
    asked: float = -math.inf
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(slots=True)
class _Places:
    """What this worker holds of one concurrency limit."""

    held: set[str] = field(default_factory=set)
    waiting: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # in order: who gives back comes before who takes next


class Limiter:
    """The limits of one process. `up` is whether the store is thought to answer, `now` gives monotonic seconds."""

    def __init__(self, store: Store, up: Callable[[], bool], now: Callable[[], float]) -> None:
        self._store = store
        self._up = up
        self._now = now
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()
        self._places: dict[str, _Places] = {}
        self._down_until = 0.0
        self._giving_back: set[asyncio.Task[None]] = set()

    def admits_at_once(self, agent: Agent, rule: Rule) -> bool:
        """Whether a request passes without a question to the store; then it is counted."""
        limits = rule.limits
        if limits is None or (limits.rate is None and not limits.concurrency):
            return True
        bucket = self._buckets.get(_rate_key(agent, rule))
        if limits.concurrency or bucket is None or not bucket.tokens or self._now() > bucket.until:
            return False
        bucket.tokens -= 1
        return True

    async def admit(self, agent: Agent, rule: Rule, exchange: Exchange) -> None:
        """Count a request; what it holds until it ends is put into the exchange.

        Raises Refused.
        """
        limits = rule.limits
        assert limits
        if limits.rate:
            await self._take(_rate_key(agent, rule), rule, *limits.rate)
        if limits.concurrency:
            await self._hold(f"limit/concurrency/{agent.id}/{rule.name}", rule, limits.concurrency, exchange)

    async def _take(self, key: str, rule: Rule, most: int, period: float) -> None:
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = _Bucket()
            if len(self._buckets) > MOST:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(key)
        if not bucket.tokens or self._now() > bucket.until:
            async with bucket.lock:  # one question, however many requests wait for its answer
                await self._refill(bucket, key, rule, most, period)
        bucket.tokens -= 1

    async def _refill(self, bucket: _Bucket, key: str, rule: Rule, most: int, period: float) -> None:
        now = self._now()
        if bucket.tokens and now <= bucket.until:
            return  # another one has asked meanwhile
        if now < bucket.empty_until:
            raise _exceeded(rule, "rate", bucket.empty_until - now)
        busy = now - bucket.asked < BUSY
        bucket.want = min(bucket.want * 2, max(1, most // 10)) if busy else 1
        given, wait = await self._ask(_TAKE, key, most, period, bucket.want)
        bucket.asked = now
        if not given:
            bucket.empty_until = self._now() + wait / 1000
            raise _exceeded(rule, "rate", wait / 1000)
        bucket.tokens, bucket.until = given, now + max(period / 10, BUSY)

    async def _hold(self, key: str, rule: Rule, most: int, exchange: Exchange) -> None:
        places = self._places.setdefault(key, _Places())
        places.waiting += 1
        try:
            async with places.lock:
                place = os.urandom(9).hex()
                if len(places.held) >= most or not await self._ask(_HOLD, key, most, TTL, place):
                    raise _exceeded(rule, "concurrency", 1.0)
                places.held.add(place)
        finally:
            places.waiting -= 1
            self._forget(key, places)
        exchange.held += (Held(key, place),)
        if exchange.ended:  # while this waited: nobody else would give it back
            self.release(exchange)

    def release(self, exchange: Exchange) -> None:
        """Give back what an ended exchange held. Never blocks."""
        for held in exchange.held:
            task = asyncio.eager_task_factory(asyncio.get_running_loop(), self._give_back(held))
            self._giving_back.add(task)
            task.add_done_callback(self._giving_back.discard)
        exchange.held = ()

    async def _give_back(self, held: Held) -> None:
        places = self._places.get(held.key)
        if places is None or held.place not in places.held:
            return
        async with places.lock:
            places.held.discard(held.place)
            with contextlib.suppress(StoreUnavailable):  # then it ends by itself
                await self._store.run(_RELEASE, held.key, held.place)
        self._forget(held.key, places)

    def _forget(self, key: str, places: _Places) -> None:
        if not places.held and not places.waiting and not places.lock.locked():
            self._places.pop(key, None)

    async def _ask(self, script: str, key: str, *arguments: str | float) -> tuple[int, ...]:
        if not self._up() or self._now() < self._down_until:
            raise Refused(Reason.STORE_UNAVAILABLE)
        try:
            answer = await self._store.run(script, key, *arguments)
        except StoreUnavailable:
            self._down_until = self._now() + BACKOFF
            raise Refused(Reason.STORE_UNAVAILABLE) from None
        return tuple(answer) if isinstance(answer, list) else (answer,) if answer else ()

    async def run(self) -> None:
        """Renews what is held, until cancelled."""
        while True:
            await asyncio.sleep(TTL / 3)
            for key, places in list(self._places.items()):
                try:
                    if places.held:
                        await self._store.run(_RENEW, key, TTL, *places.held)
                except StoreUnavailable:
                    break
                except Exception as error:
                    _log.error("places of a limit could not be renewed: %s", type(error).__name__)


def _rate_key(agent: Agent, rule: Rule) -> str:
    return f"limit/rate/{agent.id}/{rule.name}"


def _exceeded(rule: Rule, limit: str, seconds: float) -> Refused:
    detail = {"rate": ": too many requests", "concurrency": ": too many requests at a time"}[limit]
    decision = Decision(reason=Reason.LIMIT_EXCEEDED, rule=rule, limit=limit)
    return Refused(Reason.LIMIT_EXCEEDED, detail, decision, retry_after=max(1, math.ceil(seconds)))
