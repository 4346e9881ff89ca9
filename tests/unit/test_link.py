"""Messages between a supervisor and a worker."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from proxy.link import Link


async def pair() -> tuple[Link, Link]:
    one, other = socket.socketpair()
    return await Link.over(one), await Link.over(other)


def test_messages_arrive_in_order_until_the_other_side_is_gone() -> None:
    async def story() -> list[tuple[str, Any]]:
        here, there = await pair()
        here.send("ready", ["a\nb", "\udc80"])
        here.send("report", {"counted": [[["x"], 1]]})
        await here.close()
        heard = [message async for message in there.messages()]
        await there.close()
        return heard

    assert asyncio.run(story()) == [("ready", ["a\nb", "\udc80"]), ("report", {"counted": [[["x"], 1]]})]


def test_half_a_message_is_none() -> None:
    """A worker that was killed in the middle of one."""

    async def story() -> list[tuple[str, Any]]:
        one, other = socket.socketpair()
        there = await Link.over(other)
        one.sendall(b'["ready", null]\n["rep')
        one.close()
        heard = [message async for message in there.messages()]
        await there.close()
        return heard

    assert asyncio.run(story()) == [("ready", None)]


def test_whoever_does_not_read_is_noticed() -> None:
    """So that reports are held back instead of piling up."""

    async def story() -> tuple[bool, bool]:
        here, there = await pair()
        before = here.stalled
        here.send("report", "x" * 4_000_000)
        after = here.stalled
        async for _ in there.messages():
            break
        await here.close()
        await there.close()
        return before, after

    assert asyncio.run(story()) == (False, True)


def test_sending_to_nobody_is_no_error() -> None:
    async def story() -> None:
        here, there = await pair()
        await there.close()
        here.send("drain", 10)
        await here.close()

    asyncio.run(story())
