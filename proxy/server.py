"""The driver: listeners, one handler of mitmproxy's per connection with the addon's hooks called directly, signals."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import select
import signal
import socket
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mitmproxy import options
from mitmproxy.connection import Client, Connection, ConnectionState
from mitmproxy.connection import Server as UpstreamServer
from mitmproxy.proxy import commands, events, mode_specs
from mitmproxy.proxy import server as mitm_server
from mitmproxy.proxy.layer import NextLayer
from mitmproxy.proxy.layers.http import HTTPMode
from mitmproxy.proxy.layers.modes import HttpProxy

from proxy.addon import Addon
from proxy.admin import Status
from proxy.arrival import Arrival, Door
from proxy.cut import cut_ended
from proxy.doors import Doors, relay
from proxy.flow import Tunnel, state_of
from proxy.guard import where
from proxy.jaildoor import JailDoors
from proxy.lane import Lane
from proxy.layers import ClientTls
from proxy.listening import QUEUE, address_of, bind
from proxy.mtls import ClientCertificates
from proxy.reason import Reason
from proxy.registry import TABLE as AGENTS
from proxy.running import Running
from proxy.runtime import Runtime
from proxy.settings import Settings
from proxy.settingvalue import Listener
from proxy.tlsdoor import TlsDoor
from proxy.upstream import pin_connections

CONNECT_TIMEOUT = 10.0  # seconds
MAX_UPSTREAM = 100  # connections to one place: as many as streams, or one that waits for its turn would time out
DRAIN = 10.0  # seconds streams may take to finish after SIGTERM
UNREAD = 64 * 1024  # bytes of HTTP/2 that may wait for their turn before we read less
UNDIALLED = 256 * 1024  # bytes of bodies that may wait for their upstream to be connected before we read less
BACKLOG = 4 * 1024 * 1024  # bytes of HTTP/2 bodies that may wait for a slow peer before we read less
STEP = 0.02  # seconds between two looks at what is left

_log = logging.getLogger("sallyport")


def _options(settings: Settings) -> options.Options:
    """mitmproxy's options as this proxy needs them; those its own addons would define are added here."""
    opts = options.Options()
    for name, value in {
        "store_streamed_bodies": False,
        "keep_host_header": False,
        "proxy_debug": False,
        "normalize_outbound_headers": True,
        "validate_inbound_headers": True,
    }.items():
        opts.add_option(name, bool, value, "")
    opts.add_option("connection_strategy", str, "lazy", "")
    opts.add_option("stream_large_bodies", str | None, None, "")
    opts.add_option("body_size_limit", str | None, None, "")
    opts.update(  # type: ignore[no-untyped-call]
        rawtcp=False, tcp_timeout=max(1, int(settings.limits.idle))
    )
    return opts


@dataclass(frozen=True, slots=True)
class Start:
    """Where a connection stands when mitmproxy's stack gets it: as accepted, or as the fast lane left it."""

    client: Client | None = None
    tunnel: Tunnel | None = None
    decrypted: bool = False
    arrival: Arrival | None = None


class Handler(mitm_server.LiveConnectionHandler):
    """One client connection in mitmproxy's stack."""

    def __init__(
        self,
        server: Server,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        start: Start,
    ) -> None:
        super().__init__(reader, writer, server.options, mode_specs.ProxyMode.parse("regular"))
        self.addon = server.addon
        self.task = _current_task()
        self.max_conns = defaultdict(lambda: asyncio.Semaphore(MAX_UPSTREAM))
        self._moved = asyncio.Event()
        self._client_waits = False
        self._watch: asyncio.Future[None] | None = None
        self.tunnel = start.tunnel
        context = self.layer.context
        if start.client:
            self.client.peername, self.client.sockname = start.client.peername, start.client.sockname
        if start.arrival:
            self.client.peername, self.client.sockname = start.arrival.peername, start.arrival.sockname
            self.addon.arriving[self.client.id] = start.arrival
        if start.tunnel:
            context.server.address = (start.tunnel.host.name, start.tunnel.port)
            context.server.tls, context.server.sni = True, start.tunnel.host.name
        if start.tunnel and not start.decrypted:
            HttpProxy(context)  # a layer of TLS looks at its parent
            self.layer = ClientTls(context)
        elif start.arrival and start.arrival.redirected and not start.decrypted:
            HttpProxy(context)
            self.layer = NextLayer(context)
        else:
            mode = HTTPMode.transparent if start.tunnel else HTTPMode.regular
            self.layer = self.addon.http_layer(context, mode)

    async def handle_client(self) -> None:
        """The whole life of the connection."""
        try:
            await super().handle_client()
        finally:
            if self._watch:
                self._watch.cancel()

    async def handle_hook(self, hook: commands.StartHook) -> None:
        """Call the addon, which has a guard of its own on every hook; what fails behind it cuts the connection."""
        method: Callable[..., Any] | None = getattr(self.addon, hook.name, None)
        if method is None:
            return
        try:
            with self.timeout_watchdog.disarm():
                (data,) = hook.args()
                result = method(data)
                if result is not None:
                    await result
                if self.tunnel and hook.name == "client_connected":
                    self.addon.enter_tunnel(self.client, self.tunnel)
        except Exception as error:
            _log.error("%s failed behind its guard and cut its connection: %s", hook.name, where(error))
            self.client.error = "refused"
            self.addon.abort(self.client)
            if hook.name not in ("client_connected", "client_disconnected"):  # these end with the connection
                raise asyncio.CancelledError from None  # whoever waits for this hook must not go on

    async def open_connection(self, command: commands.OpenConnection) -> None:
        """Dial, but not for ever."""
        task = _current_task()
        seconds = min(CONNECT_TIMEOUT, self.addon.runtime.settings.limits.idle)
        timer = asyncio.get_running_loop().call_later(seconds, self._give_up, command, task)
        try:
            await super().open_connection(command)
        finally:
            timer.cancel()

    def _give_up(self, command: commands.OpenConnection, task: asyncio.Task[None]) -> None:
        server = command.connection
        if server.state is ConnectionState.CLOSED or (server.tls and not server.tls_established):
            self._failed_late(server.address)
            task.cancel()

    def _failed_late(self, address: Any) -> None:
        peer = self.addon.peers.get(self.client.id)
        if peer and address in peer.dials:
            peer.dials[address].failure = Reason.UPSTREAM_TIMEOUT

    async def handle_connection(self, connection: Connection) -> None:
        """Read a connection to its end; it is closed then, also when that was cancelled where mitmproxy forgets to."""
        try:
            await super().handle_connection(connection)
        finally:
            if transport := self.transports.pop(connection, None):
                connection.state = ConnectionState.CLOSED
                if isinstance(transport.writer, asyncio.StreamWriter):
                    transport.writer.close()
                await asyncio.shield(asyncio.ensure_future(self.server_event(events.ConnectionClosed(connection))))
            self._pulse()

    async def drain_writers(self) -> None:
        """Called between two reads: waits while a slow peer has not taken what came before.

        TCP's own buffers hold HTTP/1 back. HTTP/2 peers have windows, and mitmproxy keeps without bound what does not
        fit in them. An upstream is read all the same while the client waits for one: else both could wait for ever.
        """
        await super().drain_writers()  # type: ignore[no-untyped-call]
        self._pulse()
        http = peer.http if (peer := self.addon.peers.get(self.client.id)) else None
        client = self.transports.get(self.client)
        if http is None or client is None:
            return
        while http.unread() > UNREAD:
            await self._moved.wait()
        while _current_task() is client.handler and http.waiting() > UNDIALLED:
            await self._moved.wait()
        if self.client.alpn != b"h2":
            return
        if _current_task() is not client.handler:
            while http.backlog(self.client) > BACKLOG and not self._client_waits:
                await self._moved.wait()
            return
        while any(http.backlog(other) > BACKLOG for other in self.transports if other is not self.client):
            self._client_waits = True
            self._pulse()
            await self._moved.wait()
        self._client_waits = False

    async def server_event(self, event: events.Event) -> None:
        """Something happened, to a connection or to what waits for one."""
        await super().server_event(event)
        self._pulse()

    def _pulse(self) -> None:
        self._moved.set()
        self._moved.clear()

    async def on_timeout(self) -> None:
        """Nothing moved for `limits.idle`: what still waits for an upstream is answered, else the client is cut."""
        peer = self.addon.peers.get(self.client.id)
        flows = [flow for flow in (peer.open.values() if peer else ()) if state_of(flow).decided and not flow.response]
        places = {(flow.request.host, flow.request.port) for flow in flows}
        dialled = [server for server in self.transports if isinstance(server, UpstreamServer)]
        waiting = [server for server in dialled if server.address in places]
        if not waiting:
            await super().on_timeout()
            return
        for server in waiting:
            self._failed_late(server.address)
            if handler := self.transports[server].handler:
                handler.cancel("timeout")
        watchdog: Any = self.timeout_watchdog
        watchdog.register_activity()
        self._watch = asyncio.ensure_future(watchdog.watch())  # the first one ended with its first bark

    def log(self, message: str, level: int = logging.INFO, exc_info: Any = None) -> None:
        """mitmproxy's messages quote what peers sent; only that it failed, and where, is ours to tell."""
        if level >= logging.ERROR:
            error = exc_info[1] if isinstance(exc_info, tuple) else sys.exception()
            _log.error("a connection failed and was cut%s", f": {where(error)}" if error else "")
            self.addon.abort(self.client)


class Server:
    """All listeners of a runtime."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.options = _options(runtime.settings)
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


def _current_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task
    return task


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
