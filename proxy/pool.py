"""Connections to upstreams, kept for the next request to the same place. What may be dialled was decided before."""

from __future__ import annotations

import errno
import socket
import ssl
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from random import getrandbits
from typing import Any, NamedTuple

import certifi
from mitmproxy.connection import ConnectionState, Server

from proxy.address import Host
from proxy.parent import Declined, Parent
from proxy.poller import WRITE, Channel, Poller, Strand
from proxy.reason import Reason
from proxy.tls import CIPHERS
from proxy.upstream import Refused, Route, SocketAddress

CONNECT_TIMEOUT = 10.0  # seconds for TCP and TLS together, each address
MAX_IDLE = 256  # connections kept in all
MAX_IDLE_EACH = 32  # for one place
IDLE = 60.0  # seconds one is kept
_SERVER = vars(Server(address=None, state=ConnectionState.OPEN))

type Resolve = Callable[..., Coroutine[Any, Any, Route]]


class Place(NamedTuple):
    """What two requests must share to share a connection."""

    host: Host
    port: int
    tls: bool
    private: bool
    owner: str = ""  # an agent's id where a rule forbids sharing


class UpstreamConnection:
    """One connection, and mitmproxy's word for it."""

    __slots__ = ("buffer", "channel", "place", "server", "since", "used")

    def __init__(self, channel: Channel, place: Place, peer: SocketAddress) -> None:
        self.channel = channel
        self.place = place
        self.buffer = bytearray()
        self.used = False  # by an earlier request: it may be closing as we write
        self.since = 0.0
        self.server = object.__new__(Server)  # without its 20 checked fields
        self.server.__dict__ = {
            **_SERVER,
            "id": f"{getrandbits(128):032x}",
            "address": (place.host.name, place.port),
            "peername": peer,
        }


class Pool:
    """Dials, keeps and hands out connections."""

    def __init__(
        self, poller: Poller, resolve: Resolve, trust: Sequence[Path], connect_timeout: float = CONNECT_TIMEOUT
    ) -> None:
        self._poller = poller
        self._patience = connect_timeout
        self._resolve = resolve
        self._context = _context(trust)
        # What last spoke TLS to a place. A copy of its session costs a third of a handshake: taken where it is used.
        self._spoken: OrderedDict[Place, Any] = OrderedDict()
        self._idle: OrderedDict[UpstreamConnection, None] = OrderedDict()
        self._places: dict[Place, list[UpstreamConnection]] = {}

    async def acquire(self, place: Place, *, fresh: bool = False) -> UpstreamConnection:
        """A kept connection, or a new one (always, where `fresh`).

        Raises Refused.
        """
        kept = self._places.get(place)
        while kept and not fresh:
            connection = kept[-1]
            self._forget(connection)
            connection.channel.on_event = None
            if self._poller.now() - connection.since < IDLE and _is_quiet(connection.channel):
                return connection
            connection.channel.close()
        return await self._dial(place)

    def release(self, connection: UpstreamConnection) -> None:
        """Keep a connection whose last response was read to its end."""
        place, channel = connection.place, connection.channel
        kept = self._places.setdefault(place, [])
        if connection.buffer or channel.closed or channel.hung_up or len(kept) >= MAX_IDLE_EACH:
            if not kept:
                del self._places[place]
            channel.close()
            return
        if not connection.used and isinstance(channel.sock, ssl.SSLSocket):
            self._spoken[place] = channel.sock._sslobj  # type: ignore[attr-defined]
            self._spoken.move_to_end(place)
            if len(self._spoken) > MAX_IDLE:
                self._spoken.popitem(last=False)
        connection.used = True
        connection.since = self._poller.now()
        kept.append(connection)
        self._idle[connection] = None
        channel.on_event = lambda _: self._stirred(connection)
        self._expire()

    def _expire(self) -> None:
        """Close the oldest while they are too old, or too many."""
        now = self._poller.now()
        while self._idle:
            oldest = next(iter(self._idle))
            if len(self._idle) <= MAX_IDLE and now - oldest.since < IDLE:
                return
            self._forget(oldest)
            oldest.channel.close()

    def _stirred(self, connection: UpstreamConnection) -> None:
        if not _is_quiet(connection.channel):
            self._forget(connection)
            connection.channel.close()

    def _forget(self, connection: UpstreamConnection) -> None:
        self._idle.pop(connection, None)
        kept = self._places.get(connection.place, [])
        if connection in kept:
            kept.remove(connection)
            if not kept:
                del self._places[connection.place]

    async def _dial(self, place: Place) -> UpstreamConnection:
        route = await Strand.finish(self._resolve(place.host, place.port, private=place.private))
        reason = Reason.UPSTREAM_UNREACHABLE
        for address in route.addresses:
            try:
                return await self._connect(place, address, route.parent)
            except ssl.SSLError:
                reason = Reason.UPSTREAM_TLS
            except TimeoutError:
                reason = Reason.UPSTREAM_TIMEOUT
            except OSError:
                reason = Reason.UPSTREAM_UNREACHABLE
        raise Refused(reason)

    async def _connect(self, place: Place, address: SocketAddress, parent: Parent | None) -> UpstreamConnection:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        deadline = self._poller.now() + self._patience
        failed = sock.connect_ex(address)
        channel = Channel(self._poller, sock)
        try:
            if failed == errno.EINPROGRESS:
                await channel.wait(WRITE, self._patience)
                failed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if failed:
                raise OSError(failed, "connect")
            if parent:
                await self._through(parent, channel, place, deadline)
            if place.tls:
                spoken = self._spoken.get(place)
                await channel.start_tls(
                    self._context,
                    deadline - self._poller.now(),
                    server_hostname=place.host.name,
                    session=spoken.session if spoken else None,
                )
        except BaseException:
            channel.close()
            raise
        return UpstreamConnection(channel, place, address)

    async def _through(self, parent: Parent, channel: Channel, place: Place, deadline: float) -> None:
        """Let the parent proxy connect us. Raises OSError, TimeoutError."""
        await channel.send(parent.connect(place.host, place.port), deadline - self._poller.now())
        answer = b""
        while not parent.accepted(answer):
            data = await channel.recv(deadline - self._poller.now())
            if not data:
                raise Declined("the parent proxy hung up")
            answer += data

    def close(self) -> None:
        """Give up what is idle."""
        for connection in list(self._idle):
            self._forget(connection)
            connection.channel.close()


def _is_quiet(channel: Channel) -> bool:
    """Whether an idle upstream is there and has sent nothing, other than a TLS session ticket: what it says unasked
    would be taken for the answer to the next request."""
    try:
        socket.socket.recv(channel.sock, 1, socket.MSG_PEEK)  # below TLS, whose own recv costs twice as much again
        if isinstance(channel.sock, ssl.SSLSocket):
            channel.sock.recv(1)
    except BlockingIOError:
        return not channel.unread()
    except ssl.SSLWantReadError:
        return True
    except OSError:
        pass
    return False


def _context(trust: Sequence[Path]) -> ssl.SSLContext:
    """As `tls.UpstreamTls`: the public roots and the operator's, TLS 1.2 at least, the name checked (RFC 9525)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.hostname_checks_common_name = False
    context.set_ciphers(CIPHERS)
    context.set_alpn_protocols(["http/1.1"])
    for path in (Path(certifi.where()), *trust):
        context.load_verify_locations(path)
    return context
