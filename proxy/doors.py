"""The ways in that a plain TCP socket does not tell enough about: unix sockets, transparent ones, TLS to the proxy."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Protocol

from proxy.arrival import Arrival, Door
from proxy.listening import QUEUE
from proxy.problem import UserError
from proxy.proof import Proof
from proxy.redirect import original_port
from proxy.settingvalue import Listener
from proxy.tlsdoor import TlsDoor
from proxy.unixsocket import bind_unix, peer_of, remove, take_unix

_log = logging.getLogger("sallyport")


class Server(Protocol):
    """What drives connections."""

    async def accept(self, sock: socket.socket, door: Door) -> None:
        """Serve what comes in on a listening socket."""

    def forget(self, sock: socket.socket) -> None:
        """Accept on it no more, and close it."""

    async def enter(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, arrival: Arrival) -> None:
        """Serve one connection to its end."""


class Doors:
    """Opens every listener that is not regular. `uids` says which user of this host is which agent."""

    def __init__(self, server: Server, uids: Mapping[int, str], tls: TlsDoor) -> None:
        self._server = server
        self._uids = uids
        self._tls = tls
        self._paths: list[str] = []
        self._of_agents: dict[str, tuple[socket.socket, str, int]] = {}  # by path: with its pattern and inode
        self._tls_servers: list[asyncio.Server] = []

    async def open(self, listener: Listener, sock: socket.socket, *, mine: bool) -> None:
        """Serve a bound socket of `listener`, whose address is as it is shown; `mine`: its name goes when we close."""
        match listener.scheme:
            case "unix":
                if mine:
                    self._paths.append(listener.path)
                await self._server.accept(sock, self._unix(listener))
            case "transparent":
                await self._server.accept(sock, _transparent(listener))
            case "tls":
                await self._open_tls(listener, sock)
            case "regular":
                raise AssertionError("a regular listener has no door")

    def _unix(self, listener: Listener) -> Door:
        def door(sock: socket.socket) -> Arrival:
            pid, uid = peer_of(sock)
            agent = self._uids.get(uid)
            shown = (Proof("unix", agent),) if agent else ()
            return Arrival(listener, (f"uid={uid}", pid), (listener.path, 0), shown)

        return door

    # One socket for each agent

    async def follow(self, listener: Listener, agents: Iterable[str], *, take: bool) -> None:
        """Have a socket for each of `agents`, and none for another; who is connected stays so. `take`: also where
        another process serves it, which is a worker on its way out."""
        pattern = listener.per_agent
        assert pattern
        wanted = {pattern.fill(agent): agent for agent in agents}
        mine = [path for path, (_, of, _) in self._of_agents.items() if of == listener.path]
        for path in mine:
            if path not in wanted:
                self._end(path)
        for path, agent in wanted.items():
            if path in self._of_agents:
                continue
            try:
                bind = take_unix if take else bind_unix
                sock = bind(path, listener.mode, listener.group, QUEUE)
            except UserError as error:  # of one agent; the others get theirs
                _log.error("%s", error)
                continue
            self._of_agents[path] = sock, listener.path, os.stat(path).st_ino
            await self._server.accept(sock, self._unix(replace(listener, agent=agent)))

    def _end(self, path: str) -> None:
        sock, _, inode = self._of_agents.pop(path)
        self._server.forget(sock)
        with contextlib.suppress(OSError):
            if os.stat(path).st_ino == inode:  # else another worker has it now
                remove(path)

    # TLS to the proxy itself

    async def _open_tls(self, listener: Listener, sock: socket.socket) -> None:
        async def arrived(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                shown = await self._tls.begin(listener, writer)
            except (OSError, TimeoutError, ssl.SSLError) as error:
                self._tls.failed(listener, error)
                writer.transport.abort()
                return
            peer, own = writer.get_extra_info("peername"), writer.get_extra_info("sockname")
            await self._server.enter(reader, writer, Arrival(listener, peer[:2], own[:2], shown))

        self._tls_servers.append(await asyncio.start_server(arrived, sock=sock, backlog=QUEUE))

    def close(self) -> None:
        """Accept nothing more, and take the names of unix sockets away."""
        for server in self._tls_servers:
            server.close()
        for path in list(self._of_agents):
            self._end(path)
        for path in self._paths:
            remove(path)
        self._paths.clear()


def _transparent(listener: Listener) -> Door:
    def door(sock: socket.socket) -> Arrival | None:
        port = original_port(sock)
        if not port:  # nobody redirected it: there is no telling where it wants to go
            return None
        return Arrival(listener, sock.getpeername()[:2], sock.getsockname()[:2], (), port)

    return door


async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, inner: socket.socket, idle: float) -> None:
    """Everything between a client and a socket of ours, until either ends or nothing moves for `idle` seconds."""
    inner_reader, inner_writer = await asyncio.open_connection(sock=inner)

    async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            target.write(data)
            async with asyncio.timeout(idle):
                await target.drain()
        if target.can_write_eof():
            target.write_eof()

    up = asyncio.ensure_future(copy(reader, inner_writer))
    try:
        await copy(inner_reader, writer)  # our side ends it: it knows when all is said
    except (OSError, TimeoutError):
        pass
    finally:
        up.cancel()
        await asyncio.gather(up, return_exceptions=True)
        inner_writer.close()
        writer.close()
        with contextlib.suppress(OSError, TimeoutError, ssl.SSLError):
            async with asyncio.timeout(1.0):
                await writer.wait_closed()
