"""The listening sockets, made before anything that serves them: workers share them. Accepts nothing itself."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence

from proxy.problem import UserError
from proxy.settingvalue import Listener, ListenerScheme
from proxy.unixsocket import bind_unix, remove

QUEUE = 1024  # connections that may wait to be accepted


def bind(listener: Listener) -> list[socket.socket]:
    """Listening sockets for every address of the listener's host, or at its path; none for one that has a socket for
    each agent, which `doors` makes.

    Raises UserError for an address that cannot be had.
    """
    if listener.scheme == "unix":
        return [] if listener.per_agent else [bind_unix(listener.path, listener.mode, listener.group, QUEUE)]
    try:
        found = socket.getaddrinfo(listener.host, listener.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        sockets = [socket.create_server(info[4][:2], family=info[0], backlog=QUEUE) for info in found]
    except OSError as error:
        raise UserError(_words(listener, error)) from None
    for sock in sockets:  # what it accepts inherits this; asyncio sets it only on sockets whose protocol is not 0
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sockets


def address_of(sock: socket.socket, scheme: ListenerScheme = "regular") -> str:
    """Where it is bound, as an operator writes it in `listen`."""
    if scheme == "unix":
        return f"unix:{sock.getsockname()}"
    host, port = sock.getsockname()[:2]
    mark = {"transparent": "transparent@", "tls": "tls://"}.get(scheme, "")
    return f"{mark}[{host}]:{port}" if ":" in host else f"{mark}{host}:{port}"


def addresses(listeners: Sequence[Listener], listening: Sequence[Sequence[socket.socket]]) -> tuple[str, ...]:
    """Where the sockets of each listener are bound; last those that have one for each agent, as they are written."""
    pairs = zip(listeners, listening, strict=True)
    bound = [address_of(sock, listener.scheme) for listener, sockets in pairs for sock in sockets]
    return *bound, *(listener.address for listener in listeners if listener.per_agent)


def close(listener: Listener, sockets: Sequence[socket.socket]) -> None:
    """Listen no more, and take the name of a unix socket away."""
    for sock in sockets:
        sock.close()
        if listener.scheme == "unix":
            remove(listener.path)


def _words(listener: Listener, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"listen {listener.address}: the port is in use; stop what uses it, or set listen: to another"
    words = (error.strerror or "cannot be bound").lower()  # asyncio's own text lists tuples
    return f"listen {listener.address}: {words}; set listen: to an address of this host"
