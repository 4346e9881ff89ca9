"""Connections to upstreams, kept for the next request to the same place. What may be dialled was decided before."""

from __future__ import annotations

import errno
import select
import socket
import ssl
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from random import getrandbits
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

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
MAX_IDLE_EACH = 128  # for one place
IDLE = 60.0  # seconds one is kept
LOOK = 1.0  # seconds between two looks for older ones
_RDHUP = getattr(select, "POLLRDHUP", 0)
_SERVER = vars(Server(address=None, state=ConnectionState.OPEN))

type Resolve = Callable[..., Coroutine[Any, Any, Route]]


class Place(NamedTuple):
    """What two requests must share to share a connection."""

    host: Host
    port: int
    tls: bool
    private: bool
    owner: str = ""  # an agent's id where a rule forbids sharing


class Shelf:
    """The idle connections to one place, the one used last at the end. Who asks often for it keeps it: to look a place
    up costs more than to take a connection."""

    __slots__ = ("__weakref__", "idle", "place")

    def __init__(self, place: Place) -> None:
        self.place = place
        self.idle: list[UpstreamConnection] = []


class UpstreamConnection:
    """One connection, and mitmproxy's word for it."""

    __slots__ = ("_kernel", "buffer", "channel", "on_event", "server", "shelf", "since", "used")

    def __init__(
        self, channel: Channel, shelf: Shelf, peer: SocketAddress, stirred: Callable[[UpstreamConnection], None]
    ) -> None:
        """`stirred` is told when something happens while it is idle."""
        self.channel = channel
        self.on_event = lambda _: stirred(self)
        self._kernel = select.poll()
        self._kernel.register(channel.fd, select.POLLIN | _RDHUP)
        self.shelf = shelf
        self.buffer = bytearray()
        self.used = False  # by an earlier request: it may be closing as we write
        self.since = 0.0
        self.server = object.__new__(Server)  # without its 20 checked fields
        self.server.__dict__ = {
            **_SERVER,
            "id": f"{getrandbits(128):032x}",
            "address": (shelf.place.host.name, shelf.place.port),
            "peername": peer,
        }

    def is_quiet(self) -> bool:
        """Whether an idle upstream is there and has sent nothing, other than a TLS session ticket: what it says
        unasked would be taken for the answer to the next request."""
        channel = self.channel
        if channel.is_still:
            return True
        if not self._kernel.poll(0):  # costs a tenth of a read that fails
            return not channel.deciphered()
        try:
            return channel.absorbs() and not self._kernel.poll(0)
        except OSError:
            return False


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
        self._due = 0.0  # when to look for those that are too old
        self._shelves: WeakValueDictionary[Place, Shelf] = WeakValueDictionary()

    def shelf(self, place: Place) -> Shelf:
        """Where idle connections to a place are; it is there while somebody holds it, or a connection lies on it."""
        shelf = self._shelves.get(place)
        if shelf is None:
            shelf = self._shelves[place] = Shelf(place)
        return shelf

    async def acquire(self, place: Place, *, fresh: bool = False) -> UpstreamConnection:
        """A kept connection, or a new one (always, where `fresh`).

        Raises Refused.
        """
        return await self.take(self.shelf(place), fresh=fresh)

    async def take(self, shelf: Shelf, *, fresh: bool = False) -> UpstreamConnection:
        """The same, where the shelf is known. Raises Refused."""
        return (None if fresh else self.kept(shelf)) or await self._dial(shelf)

    def kept(self, shelf: Shelf) -> UpstreamConnection | None:
        """A kept connection that is still there, if any."""
        while shelf.idle:
            connection = shelf.idle.pop()
            del self._idle[connection]
            connection.channel.on_event = None
            if self._poller.now() - connection.since < IDLE and connection.is_quiet():
                return connection
            connection.channel.close()
        return None

    def release(self, connection: UpstreamConnection) -> None:
        """Keep a connection whose last response was read to its end."""
        channel, kept = connection.channel, connection.shelf.idle
        if connection.buffer or channel.closed or channel.hung_up or len(kept) >= MAX_IDLE_EACH:
            channel.close()
            return
        if not connection.used and channel.tls:
            place = connection.shelf.place
            self._spoken[place] = channel.tls
            self._spoken.move_to_end(place)
            if len(self._spoken) > MAX_IDLE:
                self._spoken.popitem(last=False)
        connection.used = True
        connection.since = self._poller.now()
        kept.append(connection)
        self._idle[connection] = None
        channel.on_event = connection.on_event
        if connection.since >= self._due or len(self._idle) > MAX_IDLE:
            self._expire(connection.since)

    def _expire(self, now: float) -> None:
        """Close the oldest while they are too old, or too many."""
        self._due = now + LOOK
        while self._idle:
            oldest = next(iter(self._idle))
            if len(self._idle) <= MAX_IDLE and now - oldest.since < IDLE:
                return
            self._forget(oldest)
            oldest.channel.close()

    def _stirred(self, connection: UpstreamConnection) -> None:
        if not connection.is_quiet():
            self._forget(connection)
            connection.channel.close()

    def _forget(self, connection: UpstreamConnection) -> None:
        if connection in self._idle:
            del self._idle[connection]
            connection.shelf.idle.remove(connection)

    async def _dial(self, shelf: Shelf) -> UpstreamConnection:
        place = shelf.place
        route = await Strand.finish(self._resolve(place.host, place.port, private=place.private))
        reason = Reason.UPSTREAM_UNREACHABLE
        for address in route.addresses:
            try:
                channel = await self._connect(place, address, route.parent)
            except ssl.SSLError:
                reason = Reason.UPSTREAM_TLS
            except TimeoutError:
                reason = Reason.UPSTREAM_TIMEOUT
            except OSError:
                reason = Reason.UPSTREAM_UNREACHABLE
            else:
                return UpstreamConnection(channel, shelf, address, self._stirred)
        raise Refused(reason)

    async def _connect(self, place: Place, address: SocketAddress, parent: Parent | None) -> Channel:
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
        return channel

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


def _context(trust: Sequence[Path]) -> ssl.SSLContext:
    """As `tls.UpstreamTls`: the public roots and the operator's, TLS 1.2 at least, the name checked (RFC 9525)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # writing would have to wait for reading
    context.hostname_checks_common_name = False
    context.set_ciphers(CIPHERS)
    context.set_alpn_protocols(["http/1.1"])
    for path in (Path(certifi.where()), *trust):
        context.load_verify_locations(path)
    return context
