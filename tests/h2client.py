"""A small HTTP/2 client for the wire tests: raw enough to say what a library would refuse to send."""

from __future__ import annotations

import contextlib
import socket
from collections import defaultdict
from collections.abc import Iterable, Sequence

import h2.config
import h2.connection
import h2.events

from tests.harness import Connection, Response

type Headers = Sequence[tuple[str | bytes, str | bytes]]


class Http2:
    """HTTP/2 on a TLS connection that negotiated it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        config = h2.config.H2Configuration(
            header_encoding="utf-8",
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
        )
        self.h2 = h2.connection.H2Connection(config)
        self.h2.initiate_connection()
        self.statuses: dict[int, list[tuple[str, str]]] = {}
        self.bodies: dict[int, bytearray] = defaultdict(bytearray)
        self.trailers: dict[int, list[tuple[str, str]]] = {}
        self.ended: set[int] = set()
        self.resets: dict[int, int] = {}
        self.gone = False
        self.flush()

    def flush(self) -> None:
        """Send what the state machine wants sent."""
        with contextlib.suppress(OSError):
            self.connection.send(self.h2.data_to_send())

    def request(
        self,
        path: str | bytes = "/v1/x",
        authority: str | None = "api.test",
        method: str = "GET",
        headers: Headers = (),
        body: bytes | None = None,
        end: bool = True,
    ) -> int:
        """Begin a request; its stream."""
        stream = self.h2.get_next_available_stream_id()
        pseudo = [(":method", method), (":scheme", "https"), (":path", path)]
        if authority is not None:
            pseudo.insert(2, (":authority", authority))
        self.h2.send_headers(stream, [*pseudo, *headers], end_stream=body is None and end)
        self.flush()
        if body is not None:
            self.data(stream, body, end=end)
        return stream

    def data(self, stream: int, body: bytes, *, end: bool = True) -> None:
        """Send a body as far as the windows open."""
        while body and not self.over(stream):
            size = min(self.h2.local_flow_control_window(stream), self.h2.max_outbound_frame_size, len(body))
            if not size:
                self.pump()
                continue
            self.h2.send_data(stream, body[:size])
            body = body[size:]
            self.flush()
        if end and not self.over(stream):
            self.h2.end_stream(stream)
            self.flush()

    def over(self, stream: int) -> bool:
        """Whether nothing more comes on a stream."""
        return self.gone or stream in self.ended or stream in self.resets

    def pump(self) -> None:
        """Take in what comes next."""
        data = self.connection.recv()
        if not data:
            self.gone = True
            return
        for event in self.h2.receive_data(data):
            self._take(event)
        self.flush()

    def _take(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.ResponseReceived():
                self.statuses[event.stream_id] = list(event.headers)
            case h2.events.DataReceived():
                self.bodies[event.stream_id] += event.data
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            case h2.events.TrailersReceived():
                self.trailers[event.stream_id] = list(event.headers)
            case h2.events.StreamEnded():
                self.ended.add(event.stream_id)
            case h2.events.StreamReset():
                self.resets[event.stream_id] = event.error_code
            case h2.events.ConnectionTerminated():
                self.gone = True

    def response(self, stream: int) -> Response:
        """The whole answer on a stream."""
        while not self.over(stream):
            self.pump()
        if stream not in self.ended:
            raise ConnectionError(f"stream {stream} was not answered: reset {self.resets.get(stream)}")
        headers = self.statuses[stream]
        status = int(dict(headers)[":status"])
        return Response(status, [pair for pair in headers if pair[0] != ":status"], bytes(self.bodies[stream]))

    def responses(self, streams: Iterable[int]) -> list[Response]:
        """Those of several streams."""
        return [self.response(stream) for stream in streams]
