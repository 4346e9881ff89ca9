"""The fast lane: what agents mostly send, HTTP/1.1 in CONNECT and TLS or in absolute form, driven without mitmproxy's
connection stack. The same addon decides on the same `HTTPFlow`s; whatever is not fully understood is handed over
before a byte of it is consumed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from random import getrandbits
from typing import Any, Protocol

from mitmproxy import http
from mitmproxy.connection import Client, ConnectionState, Server
from mitmproxy.flow import Error
from mitmproxy.proxy import mode_specs

from proxy import flow as flows
from proxy.addon import Addon
from proxy.arrival import Arrival, Door
from proxy.clienthello import MAX_HELLO, ClientHello, is_tls, parse_client_hello
from proxy.contexts import Contexts
from proxy.flow import STATE, FlowState, Tunnel, cleaned_lines, fast_headers, state_of
from proxy.framing import HEAD_END
from proxy.guard import where
from proxy.http1 import (
    CONSUMED_BODY,
    HEAD_SECONDS,
    LAST_CHUNK,
    LINGER_BYTES,
    LINGER_SECONDS,
    MAX_INFORMATIONAL,
    MAX_RESPONSE_HEAD,
    BadMessage,
    Body,
    RequestHead,
    ResponseHead,
    chunk,
    parse_request,
    parse_response,
    request_bytes,
    response_bytes,
)
from proxy.passing import Passing
from proxy.poller import Channel, Poller, Strand
from proxy.pool import CONNECT_TIMEOUT, Place, Pool, Shelf, UpstreamConnection
from proxy.reason import Reason
from proxy.relay import Relay
from proxy.runtime import Runtime
from proxy.settled import Replay
from proxy.upstream import Refused

_log = logging.getLogger("sallyport")

TLS_TIMEOUT = 10.0  # seconds for a handshake
ACCEPT_PAUSE = 0.1  # seconds without accepting when descriptors ran out
ACCEPT_TURN = 0.0003  # seconds after each connection that leave the next one to other workers: else one takes them all
DRAIN_STEP = 0.02  # seconds between two looks at what is left
_IDEMPOTENT = frozenset({b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE"})  # RFC 9110 section 9.2.2
_TAKEN = re.compile(rb"(?:CONNECT [^ \r\n]+|[A-Z]+ https?://[^ \r\n]+) HTTP/1\.1\r\n")
_ORIGIN = re.compile(rb"[A-Z]+ /[^ \r\n]* HTTP/1\.1\r\n")  # to a transparent listener
_UPGRADE = re.compile(rb"\r\nupgrade[ \t]*:", re.IGNORECASE)
_ABSOLUTE = re.compile(rb"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)(.*)", re.DOTALL)
_REGULAR = mode_specs.ProxyMode.parse("regular")
_CLIENT = vars(Client(peername=("", 0), sockname=("", 0), state=ConnectionState.OPEN, proxy_mode=_REGULAR))
_NOWHERE = Server(address=None)
_NO_BODY = Body(0)
ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Stack(Protocol):
    """mitmproxy's own connection stack, which takes what the lane leaves."""

    def adopt(
        self,
        sock: socket.socket,
        client: Client | None,
        tunnel: Tunnel | None,
        arrival: Arrival | None,
        *,
        decrypted: bool,
    ) -> None:
        """Drive a connection from here on; `client` and `arrival` say whose it is where the socket does not tell."""


type Pump = Callable[[UpstreamConnection], Strand]  # begins to send a request's body

type Begun = tuple[UpstreamConnection, OSError | None]  # where a request was sent already, and what came of it


class Failed(Exception):
    """The upstream failed for this reason."""

    def __init__(self, reason: Reason) -> None:
        self.reason = reason
        super().__init__(reason)


class Lane:
    """Accepts on listening sockets and serves what it takes."""

    def __init__(self, runtime: Runtime, addon: Addon, stack: Stack) -> None:
        self.runtime = runtime
        self.addon = addon
        self.stack = stack
        self.limits = runtime.settings.limits
        self.poller = Poller()
        self.head_seconds = min(HEAD_SECONDS, self.limits.idle)
        patience = min(CONNECT_TIMEOUT, self.limits.idle)
        self.pool = Pool(self.poller, runtime.upstream.route, runtime.settings.upstream.trust, patience)
        self.contexts = Contexts()
        self.connections: dict[str, Connection] = {}
        self.strangers: set[Connection] = set()  # who has not said yet what it wants
        self._listening: list[socket.socket] = []
        self._shared = runtime.settings.workers > 1
        self._doors: dict[int, Door] = {}  # by descriptor

    def listen(self, sock: socket.socket, door: Door | None = None) -> None:
        """Accept from a listening socket; `door` says who came in."""
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what is accepted inherits it
        self._listening.append(sock)
        if door:
            self._doors[sock.fileno()] = door
        asyncio.get_running_loop().add_reader(sock.fileno(), self._accept, sock)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(1 if self._shared else 64):
            try:
                sock, peer = listening.accept()
            except BlockingIOError:
                return
            except OSError:  # out of descriptors: the backlog waits until some are free
                self._pause(listening, ACCEPT_PAUSE)
                return
            if self._doors and (door := self._doors.get(listening.fileno())):
                self._accept_by(door, sock)
                continue
            Connection(self, sock, peer).start()

        if self._shared:
            self._pause(listening, ACCEPT_TURN)

    def _pause(self, listening: socket.socket, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(listening.fileno())
        loop.call_later(seconds, self._resume, listening)

    def _accept_by(self, door: Door, sock: socket.socket) -> None:
        try:
            arrival = door(sock)
        except OSError:  # gone already
            arrival = None
        if arrival is None:
            sock.close()
        else:
            self.enter(sock, arrival)

    def enter(self, sock: socket.socket, arrival: Arrival) -> None:
        """Serve a connection that came in by another way than a listening socket of the lane's."""
        Connection(self, sock, None, arrival).start()

    def forget(self, sock: socket.socket) -> None:
        """Accept on a listening socket no more, and close it."""
        if sock in self._listening:
            self._listening.remove(sock)
            self._doors.pop(sock.fileno(), None)
            asyncio.get_running_loop().remove_reader(sock.fileno())
        sock.close()

    def _resume(self, listening: socket.socket) -> None:
        if listening.fileno() >= 0:
            asyncio.get_running_loop().add_reader(listening.fileno(), self._accept, listening)

    def stop_listening(self) -> None:
        """Accept nothing more."""
        for sock in self._listening:
            asyncio.get_running_loop().remove_reader(sock.fileno())
            sock.close()
        self._listening.clear()
        self._doors.clear()

    @property
    def alive(self) -> bool:
        """Whether a connection is left, which may still go to the stack."""
        return bool(self.connections or self.strangers)

    async def drain(self, hurry: asyncio.Event, patience: float, grace: float = 0.0) -> None:
        """Accept nothing more; let exchanges finish until `hurry`, at most `patience` seconds; cut the rest. Who has
        none is cut after `grace` seconds without one."""
        self.stop_listening()
        deadline, idle = self.poller.now() + patience, dict[Connection, float]()
        while self.alive and not hurry.is_set() and self.poller.now() < deadline:
            now = self.poller.now()
            there = [*self.connections.values(), *self.strangers]
            idle = {connection: idle.get(connection, now) for connection in there if not connection.busy}
            for connection, since in idle.items():
                if since <= now - grace:
                    connection.abort()
            await asyncio.sleep(DRAIN_STEP)
        for connection in [*self.connections.values(), *self.strangers]:
            connection.abort()

    def close(self) -> None:
        """Give up what is left: nothing of the lane goes on after this."""
        self.pool.close()
        self.poller.close()


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
        self.buffer = bytearray()
        self.client: Client | None = None
        self.inside = False  # a tunnel
        self.redirected_tls = False  # TLS without a CONNECT before it
        self.busy = False  # with an exchange
        self.asking = False  # an upstream: what the client may still say is of no interest
        self.raw = b""  # what was read of a request, where that was a head and nothing else
        self.upstream: UpstreamConnection | None = None

    def start(self) -> None:
        """Serve it on a strand of its own."""
        Strand(self._serve(), self._ended).step()

    def _ended(self, error: BaseException | None) -> None:
        if error is None and not self.channel.hung_up:  # else nobody is there to hear it
            self.channel.say_goodbye()
        self.abort()
        if self.client:
            self.lane.connections.pop(self.client.id, None)
            self.addon.client_disconnected(self.client)
        if error and not isinstance(error, OSError | TimeoutError | BadMessage):
            _log.error("a connection failed and was cut: %s", where(error))

    def abort(self) -> None:
        """Cut it, and what it has upstream."""
        self.channel.close()
        if self.upstream:
            self.upstream.channel.close()
            self.upstream = None

    def _stirred(self, hung_up: bool) -> None:
        """A client that hangs up while it is not listened to wants no answer any more."""
        if hung_up and self.asking:
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
            head = await self._head()
            if head is None:
                await self.channel.send(b"", self.idle)
                return
            if isinstance(head, Replay):
                self.busy = True
                if not await self._again(head):
                    return
                self.busy = False
                continue
            if (head.upgrade or head.version != b"HTTP/1.1") and not self.addon.is_mismatched(self.client):
                await self._hand_over_decrypted(head)
                return
            if head.method == b"CONNECT" and not self.inside:
                if self.buffer or not await self._connect(head):
                    return
                continue
            self.busy = True
            if not await self._exchange(head):
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
                self.buffer += self.channel.sock.recv(end + 4)
                return True
            if not data[:1].isupper() or len(data) >= self.lane.limits.headers:
                return False

    def _register(self) -> None:
        assert self.peer
        self.client = client = object.__new__(Client)  # without its 20 checked fields, as in `_flow`
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
        client, tunnel = self.client, self.addon.tunnel_of(self.client)
        assert client
        self.lane.connections.pop(client.id, None)
        self.addon.client_disconnected(client)
        self.client = None
        other = Channel(self.lane.poller, ours)
        self.lane.stack.adopt(theirs, client, tunnel, self.arrival, decrypted=True)
        back = Strand(_pump(other, self.channel, self.idle), lambda _: _close(other, self.channel))
        try:
            await other.send(head.raw + bytes(self.buffer), self.idle)
            back.step()
            await _pump(self.channel, other, self.idle)
        finally:
            _close(other, self.channel)

    async def _connect(self, head: RequestHead) -> bool:
        """Accept a tunnel and begin TLS in it; whether it goes on here."""
        assert self.client
        flow = self._flow(head, b"", head.target, b"")
        self.addon.http_connect(flow)
        if flow.response:
            await self._send_and_close(_own_bytes(flow.response))
            return False
        self._works_for(flow)
        await self.channel.send(ESTABLISHED, self.idle)
        data = await self.channel.peek(MAX_HELLO, self.idle)
        if not data:
            return False
        return await self._begin(data)

    def _works_for(self, flow: http.HTTPFlow) -> None:
        """Agents take turns (see `Poller`): one with many connections does not make the others wait."""
        exchange = state_of(flow).exchange
        self.channel.owner = exchange.agent_id if exchange else ""

    async def _begin(self, data: bytes = b"") -> bool:
        """TLS where a tunnel or a transparent client begins it; whether it goes on here."""
        assert self.client
        deadline = self.lane.poller.now() + min(TLS_TIMEOUT, self.idle)
        try:
            data, hello = await self._client_hello(data, deadline)
        except OSError:
            self.addon.refuse_tunnel(self.client, Reason.CLIENT_TLS)
            raise
        if not is_tls(data):
            self.addon.refuse_tunnel(self.client)
            return False
        if hello is None:
            return await self._pass(None) and self._hand_over_tunnel()
        if self.redirected_tls and not self.addon.open_redirected(self.client, hello.server_name):
            return False
        if self.addon.may_pass(self.client) and not await self._pass(hello):
            return False
        if hello.protocols and b"http/1.1" not in hello.protocols:
            return self._hand_over_tunnel()
        context = self.lane.contexts.get(self.addon.leaf(self.client, hello.server_name))
        try:
            await self.channel.start_tls(context, deadline - self.lane.poller.now(), server_side=True)
        except OSError:
            self.addon.refuse_tunnel(self.client, Reason.CLIENT_TLS)
            raise
        self.inside = True
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
        assert self.client
        if not self.addon.may_pass(self.client):
            return True
        try:
            passage = self.addon.pass_through(self.client, hello)
        except Refused:
            return False
        if passage is None:
            return True
        exchange, dial = passage
        place = Place(dial.host, exchange.port, tls=False, private=dial.private)
        try:
            self.upstream = upstream = await self.lane.pool.acquire(place, fresh=True)
        except Refused as refused:
            self.addon.passage_failed(self.client, refused.reason)
            return False
        self.busy = True
        exchange.upstream_ip = upstream.server.peername[0] if upstream.server.peername else ""
        await Relay(self.channel, upstream.channel, exchange, self.idle, self.lane.poller.now).run()
        return False

    def _hand_over_tunnel(self) -> bool:
        client, tunnel = self.client, self.addon.tunnel_of(self.client)
        assert client
        self.lane.connections.pop(client.id, None)
        self.addon.client_disconnected(client)
        self.client = None
        self.lane.stack.adopt(self.channel.detach(), None, tunnel, self.arrival, decrypted=False)
        return False

    # Requests

    async def _head(self) -> RequestHead | Replay | None:
        """The next request, as a head or as one that was decided before; None when the client is gone or told off."""
        limit, started = self.lane.limits.headers, 0.0
        self.raw = b""
        try:
            while True:
                if self.buffer and (head := parse_request(self.buffer, limit)):
                    return head
                now = self.lane.poller.now()
                started = started or (now if self.buffer else 0.0)
                patience = max(0.0, started + self.lane.head_seconds - now) if started else self.idle
                data = await (self._exactly_a_head(patience) if not self.inside else self.channel.recv(patience))
                if not data:
                    return None
                if not self.buffer and self.inside and (end := data.find(HEAD_END) + 4) > 4:
                    assert self.client
                    self.raw, rest = data[:end], data[end:]
                    if replay := self.addon.replays.recall(self.client, self.raw):
                        self.buffer += rest
                        return replay
                self.buffer += data
        except BadMessage as error:
            assert self.client
            await self._send_and_close(self.addon.refuse_head(self.client, str(error)))
            return None

    async def _exactly_a_head(self, patience: float) -> bytes:
        """From a plain socket no byte is taken beyond a head: after CONNECT they belong to TLS."""
        limit, seen, deadline = self.lane.limits.headers, 0, 0.0
        while True:
            data = await self.channel.peek(limit, patience, seen)
            deadline = deadline or self.lane.poller.now() + self.lane.head_seconds
            end = data.find(b"\r\n\r\n")
            if end >= 0 or not data or len(data) >= limit or b"\n\n" in data:
                return self.channel.sock.recv(end + 4 if end >= 0 else limit)
            seen, patience = len(data), deadline - self.lane.poller.now()

    def _flow(self, head: RequestHead, scheme: bytes, authority: bytes, path: bytes) -> http.HTTPFlow:
        """mitmproxy's objects, made without their type checks, which cost more than the rest of a request."""
        now = time.time()
        data = object.__new__(http.RequestData)
        host = authority.decode("latin-1")
        data.__dict__ = {
            "http_version": head.version,
            "headers": fast_headers(head.block.fields),
            "content": None,
            "trailers": None,
            "timestamp_start": now,
            "timestamp_end": None,
            "host": host,
            "port": 0,
            "method": head.method,
            "scheme": scheme,
            "authority": authority,
            "path": path,
        }
        request = object.__new__(http.Request)
        request.__dict__ = {"data": data, "stream": False}
        return self._flow_of(request, now, FlowState(scheme.decode("latin-1"), host, block=head.block))

    def _flow_of(self, request: http.Request, now: float, state: FlowState) -> http.HTTPFlow:
        flow = object.__new__(http.HTTPFlow)
        flow.__dict__ = {
            "id": "",
            "client_conn": self.client,
            "server_conn": _NOWHERE,
            "live": True,
            "timestamp_created": now,
            "intercepted": False,
            "_resume_event": None,
            "_backup": None,
            "marked": "",
            "is_replay": None,
            "metadata": {STATE: state},
            "comment": "",
            "request": request,
        }
        return flow

    async def _exchange(self, head: RequestHead) -> bool:
        """One request and its answer; whether the connection may carry another."""
        absolute = _ABSOLUTE.fullmatch(head.target) if head.target[:1] != b"/" else None
        if absolute and absolute[2]:
            path = absolute[3] if absolute[3][:1] == b"/" else b"/" + absolute[3]
            flow = self._flow(head, absolute[1].lower(), absolute[2], path)
        else:
            flow = self._flow(head, b"", b"", head.target)
        waits = self.addon.requestheaders(flow)
        if waits is not None:
            await Strand.finish(waits)
        if not self.inside:
            self._works_for(flow)
        body = Body(head.length)
        if flow.response:
            return await self._refuse(flow, head, body)
        if head.expect:
            flow.request.headers.pop("expect", None)
            await self.channel.send(CONTINUE, self.idle)
        try:
            return await self._forward(flow, head, body)
        except Failed as failed:
            return await self._upstream_failed(flow, failed.reason, body)

    async def _again(self, replay: Replay) -> bool:
        """As `_exchange`, for a request that was decided before. It gets a flow where that does not go as smoothly as
        before."""
        assert self.client
        replays, pool, settled = self.addon.replays, self.lane.pool, replay.settled
        begun: Begun | None = None
        message, shelf = settled.message, settled.decision.shelf
        if settled.length:
            sent = await self._read_all(Body(settled.length))
            message += sent
            if not replays.may_leave(replay, sent):
                return await self._again_held(replay, sent)
        upstream = None if self.channel.hung_up else pool.kept(shelf)
        if upstream:
            self.upstream, self.asking = upstream, True
            upstream.channel.owner = self.channel.owner
            try:
                await upstream.channel.send_soon(message, self.idle)
                data = await upstream.channel.recv(self.idle)
            except OSError as error:  # TimeoutError is one
                begun = upstream, error
            else:
                if answer := replays.answer(replay, upstream, data):
                    out, rest = answer
                    try:
                        if rest:
                            out = await self._pass_on(upstream, rest, out)
                        await self.channel.send_soon(out, self.idle)
                    finally:
                        replays.end(self.client)  # on record whether or not somebody took it
                    self.asking, self.upstream = False, None
                    pool.release(upstream)
                    return True
                upstream.buffer += data
                begun = upstream, None if data else ConnectionResetError()
        return await self._finish(self._taken_over(replay), shelf, message, begun)

    def _taken_over(self, replay: Replay) -> http.HTTPFlow:
        flow = self._flow_of(replay.settled.own_request(), replay.time, replay.state)
        self.addon.replays.take_over(flow, replay)
        return flow

    async def _again_held(self, replay: Replay, body: bytes) -> bool:
        """Something in the body must be looked at by the hooks."""
        settled, flow = replay.settled, self._taken_over(replay)
        flow.request.raw_content = body
        self.addon.request(flow)
        if flow.response:
            method = flow.request.data.method
            return await self._refuse(flow, RequestHead(method, b"", b"HTTP/1.1", settled.decision.block), _NO_BODY)
        return await self._finish(flow, settled.decision.shelf, settled.message + body, None)

    async def _pass_on(self, upstream: UpstreamConnection, rest: Passing, out: bytes) -> bytes:
        """Send `out` and what follows of an answer, but for the last of it."""
        while not rest.done:
            if out:
                await self.channel.send(out, self.idle)  # not soon: somebody waits for each event of a stream
            out = rest.feed(await upstream.channel.recv(self.idle))
        return out

    async def _finish(self, flow: http.HTTPFlow, shelf: Shelf, message: bytes, begun: Begun | None) -> bool:
        try:
            return await self._carry(flow, shelf, message, _NO_BODY, begun=begun)
        except Failed as failed:
            return await self._upstream_failed(flow, failed.reason, _NO_BODY)

    async def _refuse(self, flow: http.HTTPFlow, head: RequestHead, body: Body) -> bool:
        """Send our own answer; a large body is not waited for."""
        response = flow.response
        assert response
        small = head.length is not None and head.length <= CONSUMED_BODY and not head.expect
        if small:
            await self._read_all(body)
        keep = small and not self.addon.wants_close(flow) and response.status_code != 400
        if not keep:
            response.headers["connection"] = "close"
        self.addon.response(flow)
        if keep or small:
            await self.channel.send(_own_bytes(response, head.method), self.idle)
            return keep
        await self._send_and_close(_own_bytes(response, head.method))
        return False

    async def _read_all(self, body: Body, most: int | None = None) -> Any:
        """The whole body of a request; None if it has more than `most` bytes."""
        parts, size = [], 0
        while not body.done:
            parts.append(body.take(self.buffer))
            size += len(parts[-1])
            if most is not None and size > most:
                return None
            if not body.done:
                data = await self.channel.recv(self.idle)
                if not data:
                    raise ConnectionAbortedError
                self.buffer += data
        return b"".join(parts)

    async def _send_and_close(self, answer: bytes) -> None:
        """A close with unread input would be a reset, and the answer lost (RFC 9112 section 9.6)."""
        await self.channel.send(answer, self.idle)
        self.channel.say_goodbye()
        with contextlib.suppress(OSError, TimeoutError):
            self.channel.sock.shutdown(socket.SHUT_WR)
            left = LINGER_BYTES
            while left > 0 and (data := await self.channel.recv(LINGER_SECONDS)):
                left -= len(data)

    # Upstream

    async def _forward(self, flow: http.HTTPFlow, head: RequestHead, body: Body) -> bool:
        request = flow.request.data
        first = b""
        pump: Pump | None = None
        sent = [True]
        chunked = head.length != 0 and "transfer-encoding" in flow.request.headers
        if head.length == 0:
            self.addon.request(flow)
            if flow.response:
                return await self._refuse(flow, head, body)
        elif not flow.request.stream:
            await self._hold(flow, body)
            if flow.response:
                return await self._refuse(flow, head, body)
            first = flow.request.raw_content or b""
        elif body.done or (head.length is not None and head.length <= CONSUMED_BODY):
            try:
                first = self._framed(flow, await self._read_all(body) if not body.done else b"", chunked, last=True)
            except Refused as refused:
                self.addon.refuse(flow, refused)
                return await self._refuse(flow, head, body)
            state_of(flow).streamed = False  # nothing has left yet
            self.addon.request(flow)
            if flow.response:
                return await self._refuse(flow, head, body)
        else:
            sent[0] = False
            pump = lambda upstream: Strand(self._pump_body(flow, body, chunked, upstream, sent), self._pumped)  # noqa: E731
        message = request_bytes(request.method, request.path, request.headers.fields)
        dial = self.addon.dial_of(flow)
        place = Place(dial.host, request.port, request.scheme == b"https", dial.private, dial.owner)
        shelf = self.lane.pool.shelf(place)
        if self.raw and head.block.plain and len(first) == head.length:
            self.addon.replays.settle(flow, self.raw, head.block, message, shelf)
        return await self._carry(flow, shelf, message + first, body, pump, sent)

    async def _carry(
        self,
        flow: http.HTTPFlow,
        shelf: Shelf,
        message: bytes,
        body: Body,
        pump: Pump | None = None,
        sent: Sequence[bool] = (True,),
        begun: Begun | None = None,
    ) -> bool:
        """Ask the upstream, and pass on what it answers; whether the client's connection may carry another request."""
        self.asking = True
        if self.channel.hung_up and not pump:
            self.abort()
        upstream, answer = await self._ask(flow, shelf, message, pump, begun)
        keep = await self._respond(flow, upstream, answer)
        self.asking, self.upstream = False, None
        whole = body.done and sent[0]
        if answer.keep_alive and whole:
            self.lane.pool.release(upstream)
        else:
            upstream.channel.close()
        if not whole and not self.channel.closed:
            await self._send_and_close(b"")
        return keep and whole

    async def _hold(self, flow: http.HTTPFlow, body: Body) -> None:
        """Wait for the whole body, which the addon wants to see."""
        held = state_of(flow).held
        flow.request.raw_content = await self._read_all(body, held[0] if held else None)
        if held and flow.request.raw_content is None:
            held[1]()
        waits = self.addon.request(flow)
        if waits is not None:
            await Strand.finish(waits)

    def _framed(self, flow: http.HTTPFlow, data: bytes, chunked: bool, *, last: bool) -> bytes:
        """A part of the request's body as it goes out, after the addon's stream function saw it."""
        stream = flow.request.stream
        pieces: list[bytes] = []
        if callable(stream):
            pieces += _each(stream(data)) if data else []
            pieces += _each(stream(b"")) if last else []
        if not chunked:
            return b"".join(pieces)
        return b"".join(map(chunk, pieces)) + (LAST_CHUNK if last else b"")

    def _pumped(self, error: BaseException | None) -> None:
        if error:
            _log.error("a request's body could not be sent and was cut: %s", where(error))
            self.abort()

    async def _pump_body(
        self, flow: http.HTTPFlow, body: Body, chunked: bool, upstream: UpstreamConnection, sent: list[bool]
    ) -> None:
        """Stream a large body upstream while the answer is awaited."""
        data = b""
        while True:
            try:
                payload = None if self.buffer else body.payload(data)
                if payload is None:
                    self.buffer += data
                    payload = body.take(self.buffer)
            except BadMessage:
                self.abort()
                return
            if self.channel.closed:
                self.abort()
                return
            try:
                await upstream.channel.send(self._framed(flow, payload, chunked, last=body.done), self.idle)
            except Refused:  # in the middle: who waits for the answer tells the client
                upstream.channel.close()
                return
            except (OSError, TimeoutError):
                return  # an upstream may answer and close before it has read everything
            if body.done:
                break
            try:
                data = await self.channel.recv(self.idle)
            except (OSError, TimeoutError):
                data = b""
            if not data:
                self.abort()
                return
        self.addon.request(flow)
        sent[0] = True

    async def _ask(
        self,
        flow: http.HTTPFlow,
        shelf: Shelf,
        message: bytes,
        pump: Pump | None,
        begun: Begun | None,
    ) -> tuple[UpstreamConnection, ResponseHead]:
        """Send the request and read the head of its answer. Raises Failed."""
        method = flow.request.data.method
        may_retry, again = method in _IDEMPOTENT and pump is None, False
        while True:
            if begun:
                upstream = begun[0]
            else:
                upstream = self.upstream = await self._upstream(shelf, fresh=again)
            flow.server_conn = upstream.server
            try:
                if begun is None:
                    await upstream.channel.send_soon(message, self.idle)
                elif begun[1]:
                    raise begun[1]
                if pump:
                    pump(upstream).step()
                return upstream, await self._answer_head(upstream, method)
            except TimeoutError:
                upstream.channel.close()
                raise Failed(Reason.UPSTREAM_TIMEOUT) from None
            except (OSError, BadMessage):
                upstream.channel.close()
                if self.channel.closed:
                    raise ConnectionAbortedError from None
                if again or not may_retry or not upstream.used or upstream.buffer:
                    raise Failed(Reason.UPSTREAM_UNREACHABLE) from None
                again, begun = True, None  # a kept connection died before the first byte: once more, on a new one

    async def _upstream(self, shelf: Shelf, *, fresh: bool) -> UpstreamConnection:
        try:
            upstream = await self.lane.pool.take(shelf, fresh=fresh)
        except Refused as refused:
            raise Failed(refused.reason) from None
        if self.channel.closed:  # cut meanwhile, perhaps because its agent was killed
            upstream.channel.close()
            raise ConnectionAbortedError
        upstream.channel.owner = self.channel.owner
        return upstream

    async def _answer_head(self, upstream: UpstreamConnection, method: bytes) -> ResponseHead:
        skipped, deadline = 0, 0.0
        while True:
            if upstream.buffer and (head := parse_response(upstream.buffer, method, MAX_RESPONSE_HEAD)):
                if head.status >= 200:
                    return head
                skipped += 1
                if head.status == 101 or skipped > MAX_INFORMATIONAL:
                    raise BadMessage("the upstream does not answer")
                deadline = 0.0
                continue
            patience = self.idle
            if upstream.buffer:  # begun: a byte now and then must not keep us here
                now = self.lane.poller.now()
                deadline = deadline or now + self.lane.head_seconds
                patience = deadline - now
            data = await upstream.channel.recv(patience)
            if not data:
                raise ConnectionResetError
            upstream.buffer += data

    async def _respond(self, flow: http.HTTPFlow, upstream: UpstreamConnection, head: ResponseHead) -> bool:
        """Pass the answer on; whether the client's connection may carry another request."""
        flow.response = _response(head)
        state, body = state_of(flow), Body(head.length)
        state.answer = head
        data = body.take(upstream.buffer) if not body.done else b""
        if body.done and head.length is not None:
            state.whole = data
        self.addon.responseheaders(flow)
        if state.whole is None:
            await self._stream_response(flow, upstream, head, body, data)
        else:
            send = self.channel.send if state.close or state.http10 else self.channel.send_soon
            try:
                await send(cleaned_lines(flow) + state.whole, self.idle)
            finally:
                self.addon.response(flow)  # on record whether or not somebody took it
        return not (state.close or state.http10)

    async def _stream_response(
        self, flow: http.HTTPFlow, upstream: UpstreamConnection, head: ResponseHead, body: Body, data: bytes
    ) -> None:
        response = flow.response
        assert response
        stream: Any = response.stream
        headers = response.headers
        if head.length == -1 and "transfer-encoding" not in headers:  # the client's connection need not close
            headers["transfer-encoding"] = "chunked"
        bodiless = flow.request.data.method == b"HEAD" or head.status in (204, 304)
        chunked = "transfer-encoding" in headers and not bodiless
        lines = response_bytes(head.status, response.data.reason, headers.fields)
        flows.remember_streamed(flow, lines)
        scan = (lambda piece: _each(stream(piece))) if callable(stream) else lambda _: []
        rest = Passing(body, upstream.buffer, scan, chunked=chunked)
        out = await self._pass_on(upstream, rest, lines + rest.pass_on(data))
        try:
            await self.channel.send(out, self.idle)
        finally:
            self.addon.response(flow)

    async def _upstream_failed(self, flow: http.HTTPFlow, reason: Reason, body: Body) -> bool:
        self.asking = False
        self.addon.dial_of(flow).failure = reason
        flow.error = Error("upstream")
        self.addon.error(flow)
        response = flow.response
        if response is None:
            return False
        if not body.done:
            response.headers["connection"] = "close"
            await self._send_and_close(_own_bytes(response, flow.request.data.method))
            return False
        await self.channel.send(_own_bytes(response, flow.request.data.method), self.idle)
        return not self.addon.wants_close(flow)


def _response(head: ResponseHead) -> http.Response:
    """mitmproxy's response."""
    data = object.__new__(http.ResponseData)
    data.__dict__ = {
        "http_version": b"HTTP/1.1",
        "headers": fast_headers(head.headers),
        "content": None,
        "trailers": None,
        "timestamp_start": 0.0,
        "timestamp_end": None,
        "status_code": head.status,
        "reason": head.phrase,
    }
    response = object.__new__(http.Response)
    response.__dict__ = {"data": data, "stream": False}
    return response


def _own_bytes(response: http.Response, method: bytes = b"GET") -> bytes:
    """A whole answer that we made."""
    head = response_bytes(response.status_code, response.data.reason, response.headers.fields)
    return head if method == b"HEAD" else head + (response.raw_content or b"")


def _each(pieces: bytes | Iterable[bytes]) -> list[bytes]:
    if isinstance(pieces, bytes):
        return [pieces] if pieces else []
    return [piece for piece in pieces if piece]


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
