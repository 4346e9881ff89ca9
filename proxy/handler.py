"""One client connection in mitmproxy's own stack, with the addon's hooks called directly; the options of that stack."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mitmproxy import options
from mitmproxy.connection import Client, Connection, ConnectionState
from mitmproxy.connection import Server as UpstreamServer
from mitmproxy.proxy import commands, events, mode_specs
from mitmproxy.proxy import server as mitm_server
from mitmproxy.proxy.layer import NextLayer
from mitmproxy.proxy.layers.http import HTTPMode
from mitmproxy.proxy.layers.modes import HttpProxy

from proxy.arrival import Arrival
from proxy.flow import Tunnel, state_of
from proxy.guard import where
from proxy.layers import ClientTls
from proxy.reason import Reason
from proxy.settings import Settings

if TYPE_CHECKING:
    from proxy.server import Server

CONNECT_TIMEOUT = 10.0  # seconds
MAX_UPSTREAM = 100  # connections to one place: as many as streams, or one that waits for its turn would time out
UNREAD = 64 * 1024  # bytes of HTTP/2 that may wait for their turn before we read less
UNDIALLED = 256 * 1024  # bytes of bodies that may wait for their upstream to be connected before we read less
BACKLOG = 4 * 1024 * 1024  # bytes of HTTP/2 bodies that may wait for a slow peer before we read less

_log = logging.getLogger("sallyport")


def stack_options(settings: Settings) -> options.Options:
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


def _current_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task
    return task
