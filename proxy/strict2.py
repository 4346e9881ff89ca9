"""mitmproxy's HTTP/2 connections made strict: floods end the connection, and a burst of work is done piece by piece.

No policy lives here; each class mends what is written beside it.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from h2.errors import ErrorCodes
from h2.events import Event, InformationalResponseReceived, RemoteSettingsChanged, ResponseReceived, StreamReset
from mitmproxy.proxy import commands, events, layer
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layers import http as http_layers
from mitmproxy.proxy.layers.http import _http2
from mitmproxy.proxy.layers.http._events import ErrorCode, ResponseEndOfMessage, ResponseProtocolError

from proxy.frames import PREFACE, Flood, FrameBudget, FrameReader
from proxy.http1 import MAX_INFORMATIONAL, MAX_RESPONSE_HEAD

if TYPE_CHECKING:
    _Base = _http2.Http2Connection
else:
    _Base = object

type Generator = layer.CommandGenerator[None]

MAX_TABLE = 4096  # bytes of our own header table, whatever a peer offers (RFC 7541 section 4.2)


class _Bounded(_Base):
    """What a peer sends is bounded before it is acted on, and then acted on in pieces."""

    frames: FrameReader

    def bound(self, frames: FrameReader) -> None:
        """Read the peer's bytes through `frames`."""
        self.frames = frames
        self._turns: deque[events.ConnectionEvent] = deque()
        self._pause: commands.RequestWakeup | None = None

    def unread(self) -> int:
        """Bytes that wait for their turn."""
        return sum(len(turn.data) for turn in self._turns if isinstance(turn, events.DataReceived))

    def on_flood(self) -> None:
        """The peer is about to be cut off."""

    def _handle_event(self, event: events.Event) -> Generator:
        if isinstance(event, events.DataReceived):
            try:
                pieces = self.frames.pieces(event.data, time.monotonic())
            except Flood as flood:
                yield from self._refuse(flood)
                return
            self._turns += [events.DataReceived(event.connection, piece) for piece in pieces]
            if not self._pause:
                yield from self._next_turn()
        elif isinstance(event, events.ConnectionClosed) and self._turns:
            self._turns.append(event)
        elif isinstance(event, events.Wakeup) and event.command is self._pause:
            self._pause = None
            yield from self._next_turn()
        else:
            yield from super()._handle_event(event)

    def _next_turn(self) -> Generator:
        """Other connections have theirs before what comes after it."""
        if self._turns:
            yield from super()._handle_event(self._turns.popleft())
        if self._turns:
            self._pause = commands.RequestWakeup(0)
            yield self._pause

    def handle_h2_event(self, event: Event) -> layer.CommandGenerator[bool]:
        """One event of h2. Streams that we must reset count too (CVE-2025-8671)."""
        if isinstance(event, RemoteSettingsChanged):
            encoder = self.h2_conn.encoder
            encoder.header_table_size = min(encoder.header_table_size, MAX_TABLE)
        elif isinstance(event, StreamReset) and not event.remote_reset:
            try:
                self.frames.budget.spend(time.monotonic(), resets=1)
            except Flood as flood:
                yield from self._refuse(flood)
                return True
        return bool((yield from super().handle_h2_event(event)))

    def _refuse(self, flood: Flood) -> Generator:
        self._turns.clear()
        self.on_flood()
        yield from self.protocol_error(str(flood), ErrorCodes.ENHANCE_YOUR_CALM)


class StrictServer2(_Bounded, _http2.Http2Server):
    """HTTP/2 with a client; a stream that fails is reset without mitmproxy's page, which would quote a peer."""

    def __init__(self, context: Context, head_limit: int, budget: FrameBudget, flooded: Callable[[Any], None]) -> None:
        super().__init__(context)
        self.h2_conn.decoder.max_header_list_size = head_limit
        self.bound(FrameReader(head_limit, budget, PREFACE))
        self.flooded = flooded

    def on_flood(self) -> None:
        """Put it on record."""
        self.flooded(self.context.client)

    def _handle_event(self, event: events.Event) -> Generator:
        if isinstance(event, events.ConnectionClosed):
            self._turns.clear()  # nobody is left to be answered
        if isinstance(event, ResponseProtocolError) and event.code.http_status_code():
            event.code = ErrorCode.KILL
        yield from super()._handle_event(event)
        if isinstance(event, ResponseEndOfMessage) and self.is_closed(event.stream_id):
            self.streams.pop(event.stream_id, None)  # mitmproxy keeps it as long as the connection lasts


class StrictClient2(_Bounded, _http2.Http2Client):
    """HTTP/2 with an upstream."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.bound(FrameReader(MAX_RESPONSE_HEAD))
        self._skipped = Counter[int]()

    def handle_h2_event(self, event: Event) -> layer.CommandGenerator[bool]:
        """One event of h2; of 1xx answers only so many are skipped, as in HTTP/1."""
        if isinstance(event, InformationalResponseReceived):
            self._skipped[event.stream_id] += 1
            if self._skipped[event.stream_id] > MAX_INFORMATIONAL:
                yield from self._refuse(Flood("an answer that never comes"))
                return True
        elif isinstance(event, ResponseReceived):
            self._skipped.pop(event.stream_id, None)
        return (yield from super().handle_h2_event(event))


http_layers.Http2Client = StrictClient2  # type: ignore[attr-defined]  # mitmproxy offers no other way to choose it
