"""The driver: listeners, connections on both lanes, signals."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import select
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial

from mitmproxy.connection import Client

from proxy.addon import Addon
from proxy.admin import Status
from proxy.arrival import Arrival, Door
from proxy.cut import cut_ended
from proxy.doors import Doors, relay
from proxy.flow import Tunnel
from proxy.handler import Handler, Start, stack_options
from proxy.jaildoor import JailDoors
from proxy.lane import Lane
from proxy.listening import QUEUE, address_of, bind
from proxy.mtls import ClientCertificates
from proxy.registry import TABLE as AGENTS
from proxy.running import Running
from proxy.runtime import Runtime
from proxy.settings import Settings
from proxy.settingvalue import Listener
from proxy.tlsdoor import TlsDoor
from proxy.upstream import pin_connections

DRAIN = 10.0  # seconds streams may take to finish after SIGTERM
STEP = 0.02  # seconds between two looks at what is left

_log = logging.getLogger("sallyport")


class Server:
    """All listeners of a runtime."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.options = stack_options(runtime.settings)
        self.addon = Addon(runtime, self.abort)
        self.addresses: list[str] = []
        self._handlers: dict[str, Handler] = {}
        self._servers: list[asyncio.Server] = []
        self._adopted: set[asyncio.Future[None]] = set()
        fast = runtime.settings.lane == "fast" and hasattr(select, "epoll")  # Linux; elsewhere mitmproxy's stack serves
        self.lane = Lane(runtime, self.addon, self) if fast else None
        mtls = runtime.settings.identity.mtls
        proof = ClientCertificates(mtls).proof if mtls else None
        tls = TlsDoor(runtime.authority, mtls.ca if mtls else None, proof)
        self.doors = Doors(self, runtime.settings.identity.uids, tls)
        self.jails = JailDoors(self, runtime, os.environ)
        runtime.registry.on_change = lambda revoked: cut_ended(self.addon, revoked)

    async def start(self, listening: Sequence[Sequence[socket.socket]] = (), *, follow_agents: bool = True) -> None:
        """Accept on every listener of the settings, bound here unless `listening` has the sockets of each. Of several
        workers one has `follow_agents`: it makes the sockets that each agent has of its own.

        Raises UserError for an address that cannot be had.
        """
        pin_connections(asyncio.get_running_loop())
        listeners = self.runtime.settings.listen
        for listener, sockets in zip(listeners, listening or map(bind, listeners), strict=True):
            if listener.per_agent and follow_agents:
                await self._follow_agents(listener, take=bool(listening))
            for sock in sockets:
                await self._open(listener, sock, mine=not listening)
        self.addresses += [listener.address for listener in listeners if listener.per_agent]
        self.jails.open()

    async def _open(self, listener: Listener, sock: socket.socket, *, mine: bool) -> None:
        address = address_of(sock, listener.scheme)
        self.addresses.append(address)
        bound = replace(listener, address=address)
        if listener.scheme != "unix":
            host, port = sock.getsockname()[:2]
            self.runtime.own.add((host, port))
            self.addon.listeners[port] = bound
        if listener.scheme == "regular":
            await self.accept(sock)
        else:
            await self.doors.open(bound, sock, mine=mine)

    async def _follow_agents(self, listener: Listener, *, take: bool) -> None:
        async def follow(_: object = None) -> None:
            await self.doors.follow(listener, self.runtime.registry.ids(), take=take)

        await follow()
        self.runtime.follower.subscribe(AGENTS, follow)

    async def accept(self, sock: socket.socket, door: Door | None = None) -> None:
        """Serve what comes in on a listening socket; `door` says who it is."""
        if self.lane:
            self.lane.listen(sock, door)
        else:
            serve = partial(self._knock, door) if door else self._serve
            turns = 1 if self.runtime.settings.workers > 1 else QUEUE  # else one worker takes them all
            self._servers.append(await asyncio.start_server(serve, sock=sock, backlog=turns))
            sock.listen(QUEUE)  # which asyncio has set to what it may accept in a turn

    async def _knock(self, door: Door, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            arrival = door(writer.get_extra_info("socket"))
        except OSError:  # gone already
            arrival = None
        if arrival is None:
            writer.transport.abort()
        else:
            await self._serve(reader, writer, Start(arrival=arrival))

    def forget(self, sock: socket.socket) -> None:
        """Accept on a listening socket no more, and close it."""
        if self.lane:
            self.lane.forget(sock)
            return
        for server in [server for server in self._servers if sock.fileno() in (one.fileno() for one in server.sockets)]:
            self._servers.remove(server)
            server.close()

    async def enter(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, arrival: Arrival) -> None:
        """Serve a connection that a door has begun."""
        if self.lane:
            ours, theirs = socket.socketpair()
            self.lane.enter(theirs, arrival)
            await relay(reader, writer, ours, self.runtime.settings.limits.idle)
        else:
            await self._serve(reader, writer, Start(arrival=arrival))

    def adopt(
        self,
        sock: socket.socket,
        client: Client | None,
        tunnel: Tunnel | None,
        arrival: Arrival | None,
        *,
        decrypted: bool,
    ) -> None:
        """Drive a connection that the fast lane hands over."""
        self._adopted.add(task := asyncio.ensure_future(self._adopt(sock, Start(client, tunnel, decrypted, arrival))))
        task.add_done_callback(self._adopted.discard)

    async def _adopt(self, sock: socket.socket, start: Start) -> None:
        reader, writer = await asyncio.open_connection(sock=sock)
        await self._serve(reader, writer, start)

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, start: Start | None = None
    ) -> None:
        handler = Handler(self, reader, writer, start or Start())
        self._handlers[handler.client.id] = handler
        try:
            await handler.handle_client()
        finally:
            del self._handlers[handler.client.id]

    def abort(self, client: Client) -> None:
        """Cut a client connection and all it has upstream."""
        if self.lane and (connection := self.lane.connections.get(client.id)):
            connection.abort()
        handler = self._handlers.get(client.id)
        transport = handler.transports.get(client) if handler else None
        if handler is None or transport is None:
            return
        if transport.handler:
            transport.handler.cancel("aborted")
        for other in list(handler.transports.values()):  # an upstream must not take what it got for all there is
            if isinstance(other.writer, asyncio.StreamWriter):
                other.writer.transport.abort()

    async def drain(self, hurry: asyncio.Event, patience: float = DRAIN, grace: float = 0.0) -> None:
        """Accept nothing more; let what is under way finish until `hurry`, for at most `patience` seconds; cut it.

        A connection without an exchange is cut when it had none for `grace` seconds: its client may be sending now.
        """
        self.addon.draining = True
        self.doors.close()
        self.jails.close()
        for server in self._servers:
            server.close()
        lane = [self.lane.drain(hurry, patience, grace)] if self.lane else []
        await asyncio.gather(*lane, self._drain_stack(hurry, patience, grace))

    def close(self) -> None:
        """Stop listening, and cut what the lane still has."""
        self.doors.close()
        self.jails.close()
        for server in self._servers:
            server.close()
        if self.lane:
            self.lane.stop_listening()
            self.lane.close()

    async def _drain_stack(self, hurry: asyncio.Event, patience: float, grace: float) -> None:
        now = asyncio.get_running_loop().time
        deadline, idle = now() + patience, dict[Handler, float]()
        while (self._handlers or (self.lane and self.lane.alive)) and not hurry.is_set() and now() < deadline:
            idle = {one: idle.get(one, now()) for one in self._handlers.values() if self._is_idle(one)}
            for handler, since in idle.items():  # twice, because an exchange is over just before its last byte is sent
                if since < now() - grace - STEP / 2:
                    self.abort(handler.client)
            await asyncio.sleep(STEP)
        left = list(self._handlers.values())
        for handler in left:
            self.abort(handler.client)
        if left:
            await asyncio.wait([handler.task for handler in left], timeout=1.0)  # their hooks put them on record

    def _is_idle(self, handler: Handler) -> bool:
        peer = self.addon.peers.get(handler.client.id)
        transport = handler.transports.get(handler.client)
        writer = transport.writer if transport else None
        unsent = isinstance(writer, asyncio.StreamWriter) and writer.transport.get_write_buffer_size()
        return not unsent and not (peer and peer.open)


async def serve(
    settings: Settings, environment: Mapping[str, str], ready: Callable[[Status, Sequence[str], Running], None]
) -> None:
    """Run a proxy until SIGTERM or SIGINT; `ready` is told when it takes requests, and where.

    Raises UserError.
    """
    loop = asyncio.get_running_loop()
    loop.set_task_factory(asyncio.eager_task_factory)
    harden()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)  # first: the store's server must not outlive an interrupted start
    async with AsyncExitStack() as ending:
        runtime = await Runtime.start(settings, environment)
        ending.push_async_callback(runtime.stop)
        ending.callback(Running.forget, settings.state)
        admin = await runtime.admin()
        ending.push_async_callback(admin.stop)
        server = Server(runtime)
        ending.callback(server.close)
        await server.start()
        loop.add_signal_handler(signal.SIGUSR1, runtime.kill_switch.pull)
        loop.add_signal_handler(signal.SIGHUP, lambda: asyncio.ensure_future(runtime.rules.reload()))
        running = Running(tuple(server.addresses), f"{settings.admin.host}:{admin.port}", os.getpid())
        running.write(settings.state)
        problems = [str(problem) for problem in (*runtime.rules.problems, *runtime.rules.warnings)]
        ready(runtime.status(), problems, running)
        await stop.wait()
        stop.clear()
        await server.drain(hurry=stop)  # a second signal does not wait


def harden() -> None:
    """No core dumps, which would hold secrets; as many descriptors as we may have."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    for name in ("mitmproxy", "hpack", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
