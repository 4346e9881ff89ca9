"""A client connection in the fast lane: what is taken of it, what is handed over, and how a tunnel begins."""

from __future__ import annotations

import logging
import re
import socket
import time
from random import getrandbits
from typing import TYPE_CHECKING

from mitmproxy.connection import Client, ConnectionState
from mitmproxy.proxy import mode_specs

from proxy.arrival import Arrival
from proxy.clienthello import MAX_HELLO, ClientHello, is_tls, parse_client_hello
from proxy.conversation import Conversation, own_bytes
from proxy.guard import where
from proxy.http1 import BadMessage, RequestHead
from proxy.poller import Channel, Strand
from proxy.pool import Place
from proxy.reason import Reason
from proxy.relay import Relay
from proxy.settled import Replay
from proxy.upstream import Refused

if TYPE_CHECKING:
    from proxy.lane import Lane

_log = logging.getLogger("sallyport")

TLS_TIMEOUT = 10.0  # seconds for a handshake
_TAKEN = re.compile(rb"(?:CONNECT [^ \r\n]+|[A-Z]+ https?://[^ \r\n]+) HTTP/1\.1\r\n")
_ORIGIN = re.compile(rb"[A-Z]+ /[^ \r\n]* HTTP/1\.1\r\n")  # to a transparent listener
_UPGRADE = re.compile(rb"\r\nupgrade[ \t]*:", re.IGNORECASE)
_REGULAR = mode_specs.ProxyMode.parse("regular")
_CLIENT = vars(Client(peername=("", 0), sockname=("", 0), state=ConnectionState.OPEN, proxy_mode=_REGULAR))
ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"


class Connection:
    """One client connection in the lane."""

    def __init__(
        self, lane: Lane, sock: socket.socket, peer: tuple[str, int] | None, arrival: Arrival | None = None
    ) -> None:
        self.lane = lane
        self.arrival = arrival
        self.peer = arrival.peername if arrival else peer
        self.own = arrival.sockname if arrival else sock.getsockname()
        self.addon = lane.addon
        self.idle = lane.limits.idle
        self.channel = Channel(lane.poller, sock)
        self.channel.on_event = self._stirred
        self.talk = Conversation(lane, self.channel)
        self.redirected_tls = False  # TLS without a CONNECT before it
        self.busy = False  # with an exchange

    def start(self) -> None:
        """Serve it on a strand of its own."""
        Strand(self._serve(), self._ended).step()

    def _ended(self, error: BaseException | None) -> None:
        if error is None and not self.channel.hung_up:  # else nobody is there to hear it
            self.channel.say_goodbye()
        self.abort()
        if self.talk.client:
            self.lane.connections.pop(self.talk.client.id, None)
            self.addon.client_disconnected(self.talk.client)
        if error and not isinstance(error, OSError | TimeoutError | BadMessage):
            _log.error("a connection failed and was cut: %s", where(error))

    def abort(self) -> None:
        """Cut it, and what it has upstream."""
        self.talk.abort()

    def _stirred(self, hung_up: bool) -> None:
        """A client that hangs up while it is not listened to wants no answer any more."""
        if hung_up and self.talk.asking.waits:
            self.abort()

    # What is taken, and what is handed over

    async def _serve(self) -> None:
        arrival = self.arrival
        listener = (arrival.listener if arrival else self.addon.listeners[self.own[1]]).address
        self.lane.strangers.add(self)
        source = _source(self.channel) if arrival or not self.peer else self.peer[0]
        self.addon.strangers.add(source, self, self.abort)
        self.lane.runtime.metrics.connection(listener, 1)  # who says nothing is counted too
        try:
            taken = await self._takes()
        finally:
            self.lane.strangers.discard(self)
            self.addon.strangers.remove(source, self)
            self.lane.runtime.metrics.connection(listener, -1)
        if not taken:
            if not self.channel.closed:
                self.lane.stack.adopt(self.channel.detach(), None, None, arrival, decrypted=False)
            return
        self._register()
        if self.redirected_tls and not await self._begin():
            return
        while True:
            head = await self.talk.next()
            if head is None:
                await self.channel.send(b"", self.idle)
                return
            if isinstance(head, Replay):
                self.busy = True
                if not await self.talk.again(head):
                    return
                self.busy = False
                continue
            if (head.upgrade or head.version != b"HTTP/1.1") and not self.addon.is_mismatched(self.talk.client):
                await self._hand_over_decrypted(head)
                return
            if head.method == b"CONNECT" and not self.talk.inside:
                if self.talk.buffer or not await self._connect(head):
                    return
                continue
            self.busy = True
            if not await self.talk.exchange(head):
                return
            self.busy = False

    async def _takes(self) -> bool:
        """Whether the connection begins with a request the lane understands: then its head is taken, else nothing."""
        data, deadline = b"", 0.0
        while True:
            patience = deadline - self.lane.poller.now() if data else self.idle
            data = await self.channel.peek(self.lane.limits.headers, patience, len(data))
            deadline = deadline or self.lane.poller.now() + self.lane.head_seconds
            if not data:
                self.channel.close()
                return False
            end = data.find(b"\r\n\r\n")
            if self.arrival and self.arrival.redirected and is_tls(data):
                self.redirected_tls = True
                return True
            if end >= 0:
                taken = _ORIGIN if self.arrival and self.arrival.redirected else _TAKEN
                if not taken.match(data) or _UPGRADE.search(data, 0, end):
                    return False
                self.talk.buffer += self.channel.sock.recv(end + 4)
                return True
            if not data[:1].isupper() or len(data) >= self.lane.limits.headers:
                return False

    def _register(self) -> None:
        assert self.peer
        self.talk.client = client = object.__new__(Client)  # without its 20 checked fields, as in `fastflow`
        client.__dict__ = {
            **_CLIENT,
            "id": f"{getrandbits(128):032x}",
            "peername": self.peer[:2],
            "sockname": self.own[:2],
            "timestamp_start": time.time(),
        }
        self.lane.connections[client.id] = self
        if self.arrival:
            self.addon.arriving[client.id] = self.arrival
        self.addon.client_connected(client)
        if client.error:
            raise ConnectionAbortedError

    async def _hand_over_decrypted(self, head: RequestHead) -> None:
        """Let mitmproxy's stack have the rest, as plain bytes: a WebSocket, or an old HTTP."""
        ours, theirs = socket.socketpair()
        client, tunnel = self.talk.client, self.addon.tunnel_of(self.talk.client)
        assert client
        self.lane.connections.pop(client.id, None)
        self.addon.client_disconnected(client)
        self.talk.client = None
        other = Channel(self.lane.poller, ours)
        self.lane.stack.adopt(theirs, client, tunnel, self.arrival, decrypted=True)
        back = Strand(_pump(other, self.channel, self.idle), lambda _: _close(other, self.channel))
        try:
            await other.send(head.raw + bytes(self.talk.buffer), self.idle)
            back.step()
            await _pump(self.channel, other, self.idle)
        finally:
            _close(other, self.channel)

    async def _connect(self, head: RequestHead) -> bool:
        """Accept a tunnel and begin TLS in it; whether it goes on here."""
        assert self.talk.client
        flow = self.talk.flow(head, b"", head.target, b"")
        self.addon.http_connect(flow)
        if flow.response:
            await self.talk.send_and_close(own_bytes(flow.response))
            return False
        self.talk.works_for(flow)
        await self.channel.send(ESTABLISHED, self.idle)
        data = await self.channel.peek(MAX_HELLO, self.idle)
        if not data:
            return False
        return await self._begin(data)

    async def _begin(self, data: bytes = b"") -> bool:
        """TLS where a tunnel or a transparent client begins it; whether it goes on here."""
        assert self.talk.client
        deadline = self.lane.poller.now() + min(TLS_TIMEOUT, self.idle)
        try:
            data, hello = await self._client_hello(data, deadline)
        except OSError:
            self.addon.refuse_tunnel(self.talk.client, Reason.CLIENT_TLS)
            raise
        if not is_tls(data):
            self.addon.refuse_tunnel(self.talk.client)
            return False
        if hello is None:
            return await self._pass(None) and self._hand_over_tunnel()
        if self.redirected_tls and not self.addon.open_redirected(self.talk.client, hello.server_name):
            return False
        if self.addon.may_pass(self.talk.client) and not await self._pass(hello):
            return False
        if hello.protocols and b"http/1.1" not in hello.protocols:
            return self._hand_over_tunnel()
        context = self.lane.contexts.get(self.addon.leaf(self.talk.client, hello.server_name))
        try:
            await self.channel.start_tls(context, deadline - self.lane.poller.now(), server_side=True)
        except OSError:
            self.addon.refuse_tunnel(self.talk.client, Reason.CLIENT_TLS)
            raise
        self.talk.inside = True
        return True

    async def _client_hello(self, data: bytes, deadline: float) -> tuple[bytes, ClientHello | None]:
        """The whole ClientHello that a connection begins with, looking only, and what it says; None where it is none.
        Raises OSError."""
        while True:
            if data[:1] in (b"\r", b"\n"):  # some clients end the head of CONNECT with more empty lines
                self.channel.sock.recv(len(data) - len(data.lstrip(b"\r\n")))
                seen = 0
            else:
                try:
                    if hello := parse_client_hello(data):
                        return data, hello
                except ValueError:
                    return data, None
                seen = len(data)
            data = await self.channel.peek(MAX_HELLO, deadline - self.lane.poller.now(), seen)
            if not data:
                raise ConnectionResetError

    async def _pass(self, hello: ClientHello | None) -> bool:
        """Pass a tunnel through that a rule says shall be; whether it is to be intercepted instead."""
        assert self.talk.client
        if not self.addon.may_pass(self.talk.client):
            return True
        try:
            passage = self.addon.pass_through(self.talk.client, hello)
        except Refused:
            return False
        if passage is None:
            return True
        exchange, dial = passage
        place = Place(dial.host, exchange.port, tls=False, private=dial.private)
        try:
            self.talk.asking.upstream = upstream = await self.lane.pool.acquire(place, fresh=True)
        except Refused as refused:
            self.addon.passage_failed(self.talk.client, refused.reason)
            return False
        self.busy = True
        exchange.upstream_ip = upstream.server.peername[0] if upstream.server.peername else ""
        await Relay(self.channel, upstream.channel, exchange, self.idle, self.lane.poller.now).run()
        return False

    def _hand_over_tunnel(self) -> bool:
        client, tunnel = self.talk.client, self.addon.tunnel_of(self.talk.client)
        assert client
        self.lane.connections.pop(client.id, None)
        self.addon.client_disconnected(client)
        self.talk.client = None
        self.lane.stack.adopt(self.channel.detach(), None, tunnel, self.arrival, decrypted=False)
        return False


def _source(channel: Channel) -> str:
    try:
        return str(channel.sock.getpeername()[0])
    except (OSError, IndexError):  # gone already, or a unix socket's client
        return ""


async def _pump(source: Channel, target: Channel, idle: float) -> None:
    """Everything from one to the other until either ends."""
    while data := await source.recv(idle):
        await target.send(data, idle)


def _close(*channels: Channel) -> None:
    for channel in channels:
        channel.close()
