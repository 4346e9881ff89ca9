"""Messages between a supervisor and a worker: JSON lines over a socket, both ways. Knows no message."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

_LONGEST = 64 * 1024 * 1024  # bytes of one message: series of 500 agents and 20,000 rules are some megabytes
_UNREAD = 1024 * 1024  # bytes the other side may leave unread


class Link:
    """One end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def over(cls, sock: socket.socket) -> Link:
        """The end that `sock` is."""
        return cls(*await asyncio.open_unix_connection(sock=sock, limit=_LONGEST))

    @property
    def stalled(self) -> bool:
        """Whether the other side is too slow for more."""
        return self._writer.transport.get_write_buffer_size() > _UNREAD

    def send(self, kind: str, data: Any = None) -> None:
        """Send a message; it gets lost if the other side is gone."""
        self._writer.write(json.dumps([kind, data]).encode() + b"\n")

    async def messages(self) -> AsyncIterator[tuple[str, Any]]:
        """What the other side sends, until it is gone."""
        with contextlib.suppress(OSError):
            while (line := await self._reader.readline()).endswith(b"\n"):
                kind, data = json.loads(line)
                yield kind, data

    async def close(self) -> None:
        """Send what is left, and hang up."""
        with contextlib.suppress(OSError):
            await self._writer.drain()
            self._writer.close()
            await self._writer.wait_closed()
