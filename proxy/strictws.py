"""mitmproxy's WebSockets made strict: it holds each message whole, so that messages must have a largest size.

No policy lives here. RFC 6455 section 10.4 asks for such a limit; 1009 is how it is told (section 7.4.1).
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import wsproto.extensions
from mitmproxy.proxy.layers import websocket
from wsproto.events import CloseConnection, Event, Message
from wsproto.extensions import PerMessageDeflate
from wsproto.frame_protocol import CloseReason

MAX_MESSAGE = 16 * 1024 * 1024  # bytes of a message, decoded
_FRAME_COST = 64  # bytes that a frame takes even if it is empty
_STEP = 1024  # bytes of a compressed frame, which can be a thousand times as many, that are decoded at once


class _Connection(websocket.WebsocketConnection):
    """One side of a WebSocket; a message that is too large ends both."""

    _held = 0

    def events(self) -> Generator[Event, None, None]:
        """What the peer said."""
        for event in super().events():
            if isinstance(event, Message):
                self._held += len(event.data) + _FRAME_COST
                if self._held > MAX_MESSAGE:
                    yield CloseConnection(code=CloseReason.MESSAGE_TOO_BIG, reason="message too big")
                    return
                if event.message_finished:
                    self._held = 0
            yield event


class _Deflate(PerMessageDeflate):
    """Compression (RFC 7692) that stops decoding a bomb."""

    def frame_inbound_payload_data(self, proto: Any, data: bytes) -> bytes | CloseReason:
        """The decoded data, or why there is none."""
        decoded = bytearray()
        for at in range(0, len(data), _STEP):
            piece = super().frame_inbound_payload_data(proto, data[at : at + _STEP])
            if isinstance(piece, CloseReason):
                return piece
            decoded += piece
            if len(decoded) > MAX_MESSAGE:
                return CloseReason.MESSAGE_TOO_BIG
        return bytes(decoded)


# mitmproxy offers no other way to choose these two.
websocket.WebsocketConnection = _Connection  # type: ignore[misc]
wsproto.extensions.PerMessageDeflate = _Deflate  # type: ignore[misc]
