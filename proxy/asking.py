"""A request and the head of its answer, on a connection that was kept or a new one. Knows neither client nor rules."""

from __future__ import annotations

from collections.abc import Callable

from mitmproxy import http

from proxy.http1 import MAX_INFORMATIONAL, MAX_RESPONSE_HEAD, BadMessage, ResponseHead, parse_response
from proxy.poller import Channel, Strand
from proxy.pool import Pool, Shelf, UpstreamConnection
from proxy.reason import Reason
from proxy.upstream import Refused

_IDEMPOTENT = frozenset({b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE"})  # RFC 9110 section 9.2.2

type Pump = Callable[[UpstreamConnection], Strand]  # begins to send a request's body

type Begun = tuple[UpstreamConnection, OSError | None]  # where a request was sent already, and what came of it


class Failed(Exception):
    """The upstream failed for this reason."""

    def __init__(self, reason: Reason) -> None:
        self.reason = reason
        super().__init__(reason)


class Asking:
    """What one client connection asks upstreams, one after the other."""

    def __init__(self, pool: Pool, client: Channel, now: Callable[[], float], idle: float, head_seconds: float) -> None:
        """`idle` and `head_seconds`: how long to wait for anything, and for all of a head that has begun."""
        self._pool = pool
        self._client = client
        self._now = now
        self._idle = idle
        self._head_seconds = head_seconds
        self.upstream: UpstreamConnection | None = None  # at work for the client
        self.waits = False  # the client for an answer: what it may still say is of no interest

    def abort(self) -> None:
        """Cut what is at work."""
        if self.upstream:
            self.upstream.channel.close()
            self.upstream = None

    async def ask(
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
                upstream = self.upstream = await self._connection(shelf, fresh=again)
            flow.server_conn = upstream.server
            try:
                if begun is None:
                    await upstream.channel.send_soon(message, self._idle)
                elif begun[1]:
                    raise begun[1]
                if pump:
                    pump(upstream).step()
                return upstream, await self._head(upstream, method)
            except TimeoutError:
                upstream.channel.close()
                raise Failed(Reason.UPSTREAM_TIMEOUT) from None
            except (OSError, BadMessage):
                upstream.channel.close()
                if self._client.closed:
                    raise ConnectionAbortedError from None
                if again or not may_retry or not upstream.used or upstream.buffer:
                    raise Failed(Reason.UPSTREAM_UNREACHABLE) from None
                again, begun = True, None  # a kept connection died before the first byte: once more, on a new one

    async def _connection(self, shelf: Shelf, *, fresh: bool) -> UpstreamConnection:
        try:
            upstream = await self._pool.take(shelf, fresh=fresh)
        except Refused as refused:
            raise Failed(refused.reason) from None
        if self._client.closed:  # cut meanwhile, perhaps because its agent was killed
            upstream.channel.close()
            raise ConnectionAbortedError
        upstream.channel.owner = self._client.owner
        return upstream

    async def _head(self, upstream: UpstreamConnection, method: bytes) -> ResponseHead:
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
            patience = self._idle
            if upstream.buffer:  # begun: a byte now and then must not keep us here
                now = self._now()
                deadline = deadline or now + self._head_seconds
                patience = deadline - now
            data = await upstream.channel.recv(patience)
            if not data:
                raise ConnectionResetError
            upstream.buffer += data
