"""Strands on a poller of their own, for tests of what runs on them. Every run must give back its descriptors."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from proxy.poller import Channel, Poller, Strand, run
from tests.harness import PATIENCE

type Scene = Callable[[Poller], Coroutine[Any, Any, None]]


def descriptors() -> int:
    """How many this process has open."""
    return len(os.listdir("/proc/self/fd"))


def play(scene: Scene) -> None:
    """Run a test with a poller, which is closed after it; nothing it opened may be left open."""

    async def played() -> None:
        poller = Poller()
        try:
            async with asyncio.timeout(PATIENCE):
                await scene(poller)
        finally:
            poller.close()

    before = descriptors()
    run(played())
    assert descriptors() == before


def start(coroutine: Coroutine[None, None, None]) -> asyncio.Future[BaseException | None]:
    """Run a strand; the future holds the exception it ended with, or None."""
    ended: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
    Strand(coroutine, ended.set_result).step()
    return ended


async def result[T](coroutine: Coroutine[None, None, T]) -> T:
    """What a coroutine returns or raises that must run on a strand."""
    found: list[T] = []

    async def find() -> None:
        found.append(await coroutine)

    error = await start(find())
    if error:
        raise error
    return found[0]


async def turns(number: int = 20) -> None:
    """Let the event loop go round: enough for everything that can happen by itself on one machine's sockets."""
    for _ in range(number):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop go round until something has come about."""
    while True:
        if condition():
            return
        await asyncio.sleep(0)


async def swept(poller: Poller) -> None:
    """Let the poller look once for waits that have lasted too long."""
    timer = poller._timer
    await until(lambda: poller._timer is not timer)
    await turns()


def pair(poller: Poller) -> tuple[Channel, Channel]:
    """Two channels that are connected."""
    ours, theirs = socket.socketpair()
    return Channel(poller, ours), Channel(poller, theirs)


def half_pair(poller: Poller) -> tuple[Channel, socket.socket]:
    """A channel, and the plain non-blocking socket at its other end."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    return Channel(poller, ours), theirs
