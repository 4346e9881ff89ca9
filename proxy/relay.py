"""A tunnel that is passed through: bytes both ways, counted and not read. One for each lane."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass

from mitmproxy.connection import ConnectionState
from mitmproxy.proxy import commands, events, layer
from mitmproxy.proxy.context import Context

from proxy.exchange import Exchange
from proxy.poller import Channel, Strand


@dataclass(slots=True)
class Relay:
    """Two channels of the fast lane. What one side ended, the other may still answer; `idle`: seconds of silence."""

    client: Channel
    upstream: Channel
    exchange: Exchange
    idle: float
    now: Callable[[], float]
    moved: float = 0.0

    async def run(self) -> None:
        """Until both sides have ended, one has failed, or nothing moved for too long."""
        self.moved = self.now()
        over = asyncio.Event()
        Strand(self._back(), lambda _: over.set()).step()
        await self._pump(self.client, self.upstream, self._sent)
        await Strand.finish(over.wait())

    async def _back(self) -> None:
        await self._pump(self.upstream, self.client, self._received)

    def _sent(self, size: int) -> None:
        self.exchange.request_bytes += size

    def _received(self, size: int) -> None:
        self.exchange.response_bytes += size

    async def _pump(self, source: Channel, target: Channel, count: Callable[[int], None]) -> None:
        try:
            while data := await self._next(source):
                count(len(data))
                await target.send(data, self.idle)
                self.moved = self.now()
            target.sock.shutdown(socket.SHUT_WR)
        except (OSError, TimeoutError):
            source.close()
            target.close()

    async def _next(self, source: Channel) -> bytes:
        while True:
            try:
                data = await source.recv(max(0.0, self.moved + self.idle - self.now()))
            except TimeoutError:
                if self.now() - self.moved >= self.idle:
                    raise
                continue  # the other way something moved
            self.moved = self.now()
            return data


class RelayLayer(layer.Layer):
    """The same in mitmproxy's stack, whose watchdog ends what is silent, and which closes whole what is half closed."""

    def __init__(self, context: Context, exchange: Exchange, failed: Callable[[], None]) -> None:
        super().__init__(context)
        self._exchange = exchange
        self._failed = failed

    def _handle_event(self, event: events.Event) -> layer.CommandGenerator[None]:
        client, server = self.context.client, self.context.server
        if isinstance(event, events.Start):
            if (yield commands.OpenConnection(server)):
                self._failed()
                yield commands.CloseConnection(client)
            elif server.peername:
                self._exchange.upstream_ip = server.peername[0]
        elif isinstance(event, events.DataReceived):
            if event.connection is client:
                self._exchange.request_bytes += len(event.data)
                yield commands.SendData(server, event.data)
            else:
                self._exchange.response_bytes += len(event.data)
                yield commands.SendData(client, event.data)
        elif isinstance(event, events.ConnectionClosed):
            yield from self._ended(event.connection is client)

    def _ended(self, by_client: bool) -> layer.CommandGenerator[None]:
        client, server = self.context.client, self.context.server
        if (client.state | server.state) & ConnectionState.CAN_READ:
            yield commands.CloseTcpConnection(server if by_client else client, half_close=True)
            return
        for connection in (client, server):
            if connection.state is not ConnectionState.CLOSED:
                yield commands.CloseConnection(connection)
