"""A parent proxy for the tests: CONNECT and nothing else, to places it is told of."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Self

from tests.harness import PATIENCE


class ParentProxy:
    """`places` says which local port `host:port` is; `heads` are the requests it got; `answer` is said to every one."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}
        self.heads: list[str] = []
        self.answer: bytes | None = None
        self.silent = False
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)

    def reset(self) -> None:
        """As new."""
        self.heads.clear()
        self.answer, self.silent = None, False

    @property
    def asked(self) -> list[str]:
        """The request lines it got."""
        return [head.partition("\r\n")[0] for head in self.heads]

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.set_exception_handler(lambda *_: None)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        for task in (tasks := asyncio.all_tasks(self._loop)):
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            self.heads.append(head)
            if self.silent:
                await reader.read()
            elif self.answer is not None:
                writer.write(self.answer)
                await writer.drain()
                await reader.read()
            else:
                await self._connect(head.split(" ")[1], reader, writer)

    async def _connect(self, target: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if target not in self.places:
            writer.write(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n")
            return
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.places[target])
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        with contextlib.closing(far_writer):
            await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
