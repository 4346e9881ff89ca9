"""The fast lane: what agents mostly send, HTTP/1.1 in CONNECT and TLS or in absolute form, driven without mitmproxy's
connection stack. The same addon decides on the same `HTTPFlow`s; whatever is not fully understood is handed over
before a byte of it is consumed."""

from __future__ import annotations

import asyncio
import socket
from typing import Protocol

from mitmproxy.connection import Client

from proxy.addon import Addon
from proxy.arrival import Arrival, Door
from proxy.contexts import Contexts
from proxy.flow import Tunnel
from proxy.http1 import HEAD_SECONDS
from proxy.laneclient import Connection
from proxy.poller import Poller
from proxy.pool import CONNECT_TIMEOUT, Pool
from proxy.runtime import Runtime

ACCEPT_PAUSE = 0.1  # seconds without accepting when descriptors ran out
ACCEPT_TURN = 0.0003  # seconds after each connection that leave the next one to other workers: else one takes them all
DRAIN_STEP = 0.02  # seconds between two looks at what is left


class Stack(Protocol):
    """mitmproxy's own connection stack, which takes what the lane leaves."""

    def adopt(
        self,
        sock: socket.socket,
        client: Client | None,
        tunnel: Tunnel | None,
        arrival: Arrival | None,
        *,
        decrypted: bool,
    ) -> None:
        """Drive a connection from here on; `client` and `arrival` say whose it is where the socket does not tell."""


class Lane:
    """Accepts on listening sockets and serves what it takes."""

    def __init__(self, runtime: Runtime, addon: Addon, stack: Stack) -> None:
        self.runtime = runtime
        self.addon = addon
        self.stack = stack
        self.limits = runtime.settings.limits
        self.poller = Poller()
        self.head_seconds = min(HEAD_SECONDS, self.limits.idle)
        patience = min(CONNECT_TIMEOUT, self.limits.idle)
        self.pool = Pool(self.poller, runtime.upstream.route, runtime.settings.upstream.trust, patience)
        self.contexts = Contexts()
        self.connections: dict[str, Connection] = {}
        self.strangers: set[Connection] = set()  # who has not said yet what it wants
        self._listening: list[socket.socket] = []
        self._shared = runtime.settings.workers > 1
        self._doors: dict[int, Door] = {}  # by descriptor

    def listen(self, sock: socket.socket, door: Door | None = None) -> None:
        """Accept from a listening socket; `door` says who came in."""
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what is accepted inherits it
        self._listening.append(sock)
        if door:
            self._doors[sock.fileno()] = door
        asyncio.get_running_loop().add_reader(sock.fileno(), self._accept, sock)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(1 if self._shared else 64):
            try:
                sock, peer = listening.accept()
            except BlockingIOError:
                return
            except OSError:  # out of descriptors: the backlog waits until some are free
                self._pause(listening, ACCEPT_PAUSE)
                return
            if self._doors and (door := self._doors.get(listening.fileno())):
                self._accept_by(door, sock)
                continue
            Connection(self, sock, peer).start()

        if self._shared:
            self._pause(listening, ACCEPT_TURN)

    def _pause(self, listening: socket.socket, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(listening.fileno())
        loop.call_later(seconds, self._resume, listening)

    def _accept_by(self, door: Door, sock: socket.socket) -> None:
        try:
            arrival = door(sock)
        except OSError:  # gone already
            arrival = None
        if arrival is None:
            sock.close()
        else:
            self.enter(sock, arrival)

    def enter(self, sock: socket.socket, arrival: Arrival) -> None:
        """Serve a connection that came in by another way than a listening socket of the lane's."""
        Connection(self, sock, None, arrival).start()

    def forget(self, sock: socket.socket) -> None:
        """Accept on a listening socket no more, and close it."""
        if sock in self._listening:
            self._listening.remove(sock)
            self._doors.pop(sock.fileno(), None)
            asyncio.get_running_loop().remove_reader(sock.fileno())
        sock.close()

    def _resume(self, listening: socket.socket) -> None:
        if listening.fileno() >= 0:
            asyncio.get_running_loop().add_reader(listening.fileno(), self._accept, listening)

    def stop_listening(self) -> None:
        """Accept nothing more."""
        for sock in self._listening:
            asyncio.get_running_loop().remove_reader(sock.fileno())
            sock.close()
        self._listening.clear()
        self._doors.clear()

    @property
    def alive(self) -> bool:
        """Whether a connection is left, which may still go to the stack."""
        return bool(self.connections or self.strangers)

    async def drain(self, hurry: asyncio.Event, patience: float, grace: float = 0.0) -> None:
        """Accept nothing more; let exchanges finish until `hurry`, at most `patience` seconds; cut the rest. Who has
        none is cut after `grace` seconds without one."""
        self.stop_listening()
        deadline, idle = self.poller.now() + patience, dict[Connection, float]()
        while self.alive and not hurry.is_set() and self.poller.now() < deadline:
            now = self.poller.now()
            there = [*self.connections.values(), *self.strangers]
            idle = {connection: idle.get(connection, now) for connection in there if not connection.busy}
            for connection, since in idle.items():
                if since <= now - grace:
                    connection.abort()
            await asyncio.sleep(DRAIN_STEP)
        for connection in [*self.connections.values(), *self.strangers]:
            connection.abort()

    def close(self) -> None:
        """Give up what is left: nothing of the lane goes on after this."""
        self.pool.close()
        self.poller.close()
