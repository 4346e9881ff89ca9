"""The addon as a plain script, `mitmweb -s proxy/addon.py`: mitmproxy drives it, for debugging only."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
from typing import Any

from mitmproxy import connection, ctx

from proxy.addon import Addon
from proxy.clitools import settings_of
from proxy.problem import Problems, UserError
from proxy.runtime import Runtime
from proxy.upstream import pin_connections

_log = logging.getLogger(__name__)


class Script:
    """What `mitmweb -s proxy/addon.py` loads, for looking at flows while debugging.

    mitmproxy's own listener, logs and flow store are then in use: flows in its window hold injected secrets, nothing is
    drained, no listener is bound to an agent, and there is no admin endpoint.
    """

    _HOOKS = frozenset(name for name, value in vars(Addon).items() if hasattr(value, "__wrapped__")) | {
        "tls_failed_server",
        "server_connect_error",
        "tcp_start",
        "udp_start",
        "dns_request",
    }

    def __init__(self) -> None:
        self._runtime: Runtime | None = None
        self._addon: Addon | None = None

    def load(self, _: object) -> None:
        """Set the options without which mitmproxy forwards what the addon never sees."""
        ctx.options.update(rawtcp=False, onboarding=False)  # type: ignore[no-untyped-call]

    async def running(self) -> None:
        """Start from the settings that `sallyport run` would use."""
        ctx.options.update(connection_strategy="lazy")  # type: ignore[no-untyped-call]
        pin_connections(asyncio.get_running_loop())
        try:
            self._runtime = await Runtime.start(settings_of(argparse.Namespace()), os.environ)
        except (UserError, Problems) as error:
            _log.error("sallyport: %s; every connection is refused", error)
            return
        self._addon = Addon(self._runtime, self._abort)

    async def done(self) -> None:
        """Give back what was started."""
        if self._runtime:
            await self._runtime.stop()

    def __getattr__(self, name: str) -> Any:
        if name not in Script._HOOKS:
            raise AttributeError(name)
        return getattr(self._addon, name) if self._addon else self._not_ready

    def _not_ready(self, data: object) -> None:
        if isinstance(data, connection.Client):
            data.error = "not ready"  # mitmproxy hangs up on it

    @staticmethod
    def _abort(client: connection.Client) -> None:
        proxyserver = ctx.master.addons.get("proxyserver")  # type: ignore[no-untyped-call]
        handler = proxyserver.connections.get(client.id)
        if handler and (transport := handler.transports.get(client)) and transport.handler:
            transport.handler.cancel("aborted")
