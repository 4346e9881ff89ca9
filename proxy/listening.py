"""The listening sockets, made before anything that serves them: workers share them. Accepts nothing itself."""

from __future__ import annotations

import errno
import socket

from proxy.problem import UserError
from proxy.settingvalue import Listener

QUEUE = 1024  # connections that may wait to be accepted


def bind(listener: Listener) -> list[socket.socket]:
    """Listening sockets for every address of the listener's host.

    Raises UserError for an address that cannot be had.
    """
    try:
        found = socket.getaddrinfo(listener.host, listener.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        sockets = [socket.create_server(info[4][:2], family=info[0], backlog=QUEUE) for info in found]
    except OSError as error:
        raise UserError(_words(listener, error)) from None
    for sock in sockets:  # what it accepts inherits this; asyncio sets it only on sockets whose protocol is not 0
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sockets


def address_of(sock: socket.socket) -> str:
    """Where it is bound, as `host:port`."""
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _words(listener: Listener, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"listen {listener.address}: the port is in use; stop what uses it, or set listen: to another"
    words = (error.strerror or "cannot be bound").lower()  # asyncio's own text lists tuples
    return f"listen {listener.address}: {words}; set listen: to an address of this host"
