"""The driver: listeners, one handler of mitmproxy's per connection with the addon's hooks called directly, signals."""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mitmproxy import options
from mitmproxy.connection import Client, ConnectionState
from mitmproxy.proxy import commands, mode_specs
from mitmproxy.proxy import server as mitm_server
from mitmproxy.proxy.layers.http import HTTPMode

from proxy.addon import Addon
from proxy.flow import state_of
from proxy.guard import where
from proxy.problem import UserError
from proxy.reason import Reason
from proxy.running import Running
from proxy.runtime import Runtime
from proxy.settings import Settings
from proxy.settingvalue import Listener
from proxy.upstream import pin_getaddrinfo

CONNECT_TIMEOUT = 10.0  # seconds
DRAIN = 10.0  # seconds streams may take to finish after SIGTERM

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


class Handler(mitm_server.LiveConnectionHandler):
    """One client connection in mitmproxy's stack."""

    def __init__(self, server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        super().__init__(reader, writer, server.options, mode_specs.ProxyMode.parse("regular"))
        self.addon = server.addon
        self.layer = self.addon.http_layer(self.layer.context, HTTPMode.regular)

    async def handle_hook(self, hook: commands.StartHook) -> None:
        """Call the addon, which has a guard of its own on every hook."""
        method: Callable[..., Any] | None = getattr(self.addon, hook.name, None)
        if method is None:
            return
        with self.timeout_watchdog.disarm():
            (data,) = hook.args()
            result = method(data)
            if result is not None:
                await result

    async def open_connection(self, command: commands.OpenConnection) -> None:
        """Dial, but not for ever."""
        task = asyncio.current_task()
        assert task
        timer = asyncio.get_running_loop().call_later(CONNECT_TIMEOUT, self._give_up, command, task)
        try:
            await super().open_connection(command)
        finally:
            timer.cancel()

    def _give_up(self, command: commands.OpenConnection, task: asyncio.Task[None]) -> None:
        server = command.connection
        if server.state is ConnectionState.CLOSED:
            self._failed_late(server.address)
            task.cancel()

    def _failed_late(self, address: Any) -> None:
        peer = self.addon.peers.get(self.client.id)
        if peer and address in peer.dials:
            peer.dials[address].failure = Reason.UPSTREAM_TIMEOUT

    async def on_timeout(self) -> None:
        """Nothing moved for `limits.idle`: what still waits for an upstream is answered, else the client is cut."""
        peer = self.addon.peers.get(self.client.id)
        waiting = [
            flow
            for flow in (peer.open.values() if peer else ())
            if flow.server_conn in self.transports and state_of(flow).decided and not flow.response
        ]
        for flow in waiting:
            self._failed_late(flow.server_conn.address)
            handler = self.transports[flow.server_conn].handler
            if handler:
                handler.cancel("timeout")
        if not waiting:
            await super().on_timeout()

    def log(self, message: str, level: int = logging.INFO, exc_info: Any = None) -> None:
        """mitmproxy's messages quote what peers sent; only that it failed, and where, is ours to tell."""
        if level >= logging.ERROR:
            error = exc_info[1] if isinstance(exc_info, tuple) else None
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

    async def start(self) -> None:
        """Bind every listener.

        Raises UserError for an address that cannot be had.
        """
        pin_getaddrinfo(asyncio.get_running_loop())
        for listener in self.runtime.settings.listen:
            try:
                server = await asyncio.start_server(self._serve, listener.host, listener.port, backlog=1024)
            except OSError as error:
                raise UserError(_bind_words(listener, error)) from None
            self._servers.append(server)
            for sock in server.sockets:
                host, port = sock.getsockname()[:2]
                address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
                self.addon.listeners[port] = replace(listener, address=address)
                self.runtime.own.add((host, port))
                self.addresses.append(address)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handler = Handler(self, reader, writer)
        self._handlers[handler.client.id] = handler
        try:
            await handler.handle_client()
        finally:
            del self._handlers[handler.client.id]

    def abort(self, client: Client) -> None:
        """Cut a client connection and all it has upstream."""
        handler = self._handlers.get(client.id)
        transport = handler.transports.get(client) if handler else None
        if transport is None:
            return
        if transport.handler:
            transport.handler.cancel("aborted")
        if transport.writer and isinstance(transport.writer, asyncio.StreamWriter):
            transport.writer.transport.abort()

    async def drain(self, patience: float = DRAIN) -> None:
        """Accept nothing more; let what is under way finish for at most `patience` seconds, then cut it."""
        for server in self._servers:
            server.close()
        deadline = asyncio.get_running_loop().time() + patience
        while self._handlers:
            late = asyncio.get_running_loop().time() >= deadline
            for client_id, handler in list(self._handlers.items()):
                peer = self.addon.peers.get(client_id)
                if late or peer is None or not peer.open:
                    self.abort(handler.client)
            await asyncio.sleep(0.02)
            if late:
                break


def _bind_words(listener: Listener, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"listen {listener.address}: the port is in use; stop what uses it, or set listen: to another"
    words = (error.strerror or str(error)).lower()
    return f"listen {listener.address}: {words}; set listen: to an address of this host"


async def serve(settings: Settings, environment: Mapping[str, str], ready: Callable[[Runtime, Running], None]) -> None:
    """Run a proxy until SIGTERM or SIGINT; `ready` is told when it takes requests, and where.

    Raises UserError.
    """
    loop = asyncio.get_running_loop()
    loop.set_task_factory(asyncio.eager_task_factory)
    _harden()
    runtime = await Runtime.start(settings, environment)
    try:
        admin = await runtime.admin()
        server = Server(runtime)
        await server.start()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, lambda: asyncio.ensure_future(runtime.rules.reload()))
        running = Running(tuple(server.addresses), f"{settings.admin.host}:{admin.port}")
        running.write(settings.state)
        ready(runtime, running)
        await stop.wait()
        stop.clear()
        draining = asyncio.ensure_future(server.drain())
        again = asyncio.ensure_future(stop.wait())  # a second signal does not wait
        await asyncio.wait([draining, again], return_when=asyncio.FIRST_COMPLETED)
        for task in (draining, again):
            task.cancel()
        await admin.stop()
    finally:
        Running.forget(settings.state)
        await runtime.stop()


def _harden() -> None:
    """No core dumps, which would hold secrets; as many descriptors as we may have."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    for name in ("mitmproxy", "hpack", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
