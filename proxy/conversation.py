"""Requests of one client connection and their answers, one after the other, in the fast lane."""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from mitmproxy import http
from mitmproxy.connection import Client
from mitmproxy.flow import Error

from proxy import flow as flows
from proxy.asking import Asking, Begun, Failed, Pump
from proxy.fastflow import new_flow, new_request, new_response
from proxy.flow import FlowState, cleaned_lines, state_of
from proxy.framing import HEAD_END
from proxy.guard import where
from proxy.http1 import (
    CONSUMED_BODY,
    LAST_CHUNK,
    LINGER_BYTES,
    LINGER_SECONDS,
    BadMessage,
    Body,
    RequestHead,
    ResponseHead,
    chunk,
    parse_request,
    request_bytes,
    response_bytes,
)
from proxy.passing import Passing
from proxy.poller import Channel, Strand
from proxy.pool import Place, Shelf, UpstreamConnection
from proxy.reason import Reason
from proxy.settled import Replay
from proxy.upstream import Refused

if TYPE_CHECKING:
    from proxy.lane import Lane

_log = logging.getLogger("sallyport")

_ABSOLUTE = re.compile(rb"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)(.*)", re.DOTALL)
_NO_BODY = Body(0)
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Conversation:
    """One client connection's. `client` is set once it has said something that the lane understands."""

    def __init__(self, lane: Lane, channel: Channel) -> None:
        self.lane = lane
        self.addon = lane.addon
        self.idle = lane.limits.idle
        self.channel = channel
        self.asking = Asking(lane.pool, channel, lane.poller.now, self.idle, lane.head_seconds)
        self.buffer = bytearray()
        self.client: Client | None = None
        self.inside = False  # a tunnel
        self.raw = b""  # what was read of a request, where that was a head and nothing else

    def abort(self) -> None:
        """Cut the connection, and what it has upstream."""
        self.channel.close()
        self.asking.abort()

    def works_for(self, flow: http.HTTPFlow) -> None:
        """Agents take turns (see `Poller`): one with many connections does not make the others wait."""
        exchange = state_of(flow).exchange
        self.channel.owner = exchange.agent_id if exchange else ""

    # Requests

    async def next(self) -> RequestHead | Replay | None:
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
            await self.send_and_close(self.addon.refuse_head(self.client, str(error)))
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

    def flow(self, head: RequestHead, scheme: bytes, authority: bytes, path: bytes) -> http.HTTPFlow:
        """A new flow for a request, which is not decided yet."""
        now = time.time()
        state = FlowState(scheme.decode("latin-1"), authority.decode("latin-1"), block=head.block)
        request = new_request(head.version, head.method, scheme, authority, path, head.block.fields, now)
        return new_flow(self.client, request, now, state)

    async def exchange(self, head: RequestHead) -> bool:
        """One request and its answer; whether the connection may carry another."""
        absolute = _ABSOLUTE.fullmatch(head.target) if head.target[:1] != b"/" else None
        if absolute and absolute[2]:
            path = absolute[3] if absolute[3][:1] == b"/" else b"/" + absolute[3]
            flow = self.flow(head, absolute[1].lower(), absolute[2], path)
        else:
            flow = self.flow(head, b"", b"", head.target)
        waits = self.addon.requestheaders(flow)
        if waits is not None:
            await Strand.finish(waits)
        if not self.inside:
            self.works_for(flow)
        body = Body(head.length)
        if flow.response:
            return await self._refuse(flow, head, body)
        if head.expect:
            flow.request.headers.pop("expect", None)
            await self.channel.send(CONTINUE, self.idle)
        return await self._forward(flow, head, body)

    async def again(self, replay: Replay) -> bool:
        """As `exchange`, for a request that was decided before. It gets a flow where that does not go as smoothly as
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
            self.asking.upstream, self.asking.waits = upstream, True
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
                    self.asking.waits, self.asking.upstream = False, None
                    pool.release(upstream)
                    return True
                upstream.buffer += data
                begun = upstream, None if data else ConnectionResetError()
        return await self._carry(self._taken_over(replay), shelf, message, _NO_BODY, begun=begun)

    def _taken_over(self, replay: Replay) -> http.HTTPFlow:
        flow = new_flow(self.client, replay.settled.own_request(), replay.time, replay.state)
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
        return await self._carry(flow, settled.decision.shelf, settled.message + body, _NO_BODY)

    async def _pass_on(self, upstream: UpstreamConnection, rest: Passing, out: bytes) -> bytes:
        """Send `out` and what follows of an answer, but for the last of it."""
        while not rest.done:
            if out:
                await self.channel.send(out, self.idle)  # not soon: somebody waits for each event of a stream
            out = rest.feed(await upstream.channel.recv(self.idle))
        return out

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
            await self.channel.send(own_bytes(response, head.method), self.idle)
            return keep
        await self.send_and_close(own_bytes(response, head.method))
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

    async def send_and_close(self, answer: bytes) -> None:
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
        self.asking.waits = True
        if self.channel.hung_up and not pump:
            self.abort()
        try:
            upstream, answer = await self.asking.ask(flow, shelf, message, pump, begun)
        except Failed as failed:
            return await self._upstream_failed(flow, failed.reason, body)
        keep = await self._respond(flow, upstream, answer)
        self.asking.waits, self.asking.upstream = False, None
        whole = body.done and sent[0]
        if answer.keep_alive and whole:
            self.lane.pool.release(upstream)
        else:
            upstream.channel.close()
        if not whole and not self.channel.closed:
            await self.send_and_close(b"")
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

    async def _respond(self, flow: http.HTTPFlow, upstream: UpstreamConnection, head: ResponseHead) -> bool:
        """Pass the answer on; whether the client's connection may carry another request."""
        flow.response = new_response(head)
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
        self.asking.waits = False
        self.addon.dial_of(flow).failure = reason
        flow.error = Error("upstream")
        self.addon.error(flow)
        response = flow.response
        if response is None:
            return False
        if not body.done:
            response.headers["connection"] = "close"
            await self.send_and_close(own_bytes(response, flow.request.data.method))
            return False
        await self.channel.send(own_bytes(response, flow.request.data.method), self.idle)
        return not self.addon.wants_close(flow)


def own_bytes(response: http.Response, method: bytes = b"GET") -> bytes:
    """A whole answer that we made."""
    head = response_bytes(response.status_code, response.data.reason, response.headers.fields)
    return head if method == b"HEAD" else head + (response.raw_content or b"")


def _each(pieces: bytes | Iterable[bytes]) -> list[bytes]:
    if isinstance(pieces, bytes):
        return [pieces] if pieces else []
    return [piece for piece in pieces if piece]
