"""mitmproxy's layers made strict: what may follow a CONNECT, one request, and the connections that carry requests.

No policy lives here; each class mends what is written beside it. The wire is read in `strict1` and
`strict2`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mitmproxy import http
from mitmproxy.connection import Connection, ConnectionState, Server
from mitmproxy.net.http import http1
from mitmproxy.proxy import commands, events, layer
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layers import http as http_layers
from mitmproxy.proxy.layers import websocket
from mitmproxy.proxy.layers.http._base import HttpConnection
from mitmproxy.proxy.layers.http._events import (
    ErrorCode,
    RequestData,
    RequestHeaders,
    RequestProtocolError,
    ResponseData,
    ResponseEndOfMessage,
    ResponseHeaders,
    ResponseProtocolError,
)
from mitmproxy.proxy.layers.http._hooks import (
    HttpErrorHook,
    HttpRequestHeadersHook,
    HttpRequestHook,
    HttpResponseHeadersHook,
)
from mitmproxy.proxy.layers.tls import ClientTLSLayer
from wsproto.events import CloseConnection, Event, Ping, Pong

from proxy.flow import STATE, FlowState, clean_control_frame, state_of
from proxy.http1 import CONSUMED_BODY
from proxy.strict1 import StrictClient
from proxy.strict2 import StrictClient2, StrictServer2
from proxy.strictws import MAX_MESSAGE as MAX_MESSAGE
from proxy.tls import say_goodbye
from proxy.upstream import Refused

type Generator = layer.CommandGenerator[None]

TLS_SECONDS = 10.0  # a handshake may take; each byte of it is a sign of life
MAX_CLIENT_HELLO = 64 * 1024  # bytes; mitmproxy parses all of it again with every packet
NOWHERE = "unknown.invalid"  # RFC 6761 section 6.4


class Refuse(layer.Layer):
    """Closes the client connection; what follows a CONNECT and is no TLS ends here (raw TCP, plain HTTP)."""

    def _handle_event(self, event: events.Event) -> Generator:
        if isinstance(event, events.Start):
            yield commands.CloseConnection(self.context.client)


class ClientTls(ClientTLSLayer):
    """TLS with a client: its handshake is bounded, and it is told when we close (RFC 8446 section 6.1)."""

    begun = 0.0

    def receive_handshake_data(self, data: bytes) -> layer.CommandGenerator[tuple[bool, str | None]]:
        """The next bytes of the handshake; 1 is the type of a ClientHello (RFC 8446 section 4)."""
        self.begun = self.begun or time.monotonic()
        if time.monotonic() - self.begun >= min(TLS_SECONDS, self.context.options.tcp_timeout):
            return False, "the handshake takes too long"
        hello = b"" if self.client_hello_parsed else bytes(self.recv_buffer) + data
        if len(hello) > MAX_CLIENT_HELLO or hello[5:6] not in (b"", b"\1"):
            return False, "no ClientHello"
        return (yield from super().receive_handshake_data(data))

    def receive_data(self, data: bytes) -> Generator:
        """Bytes of the tunnel; behind a handshake that failed there is none."""
        if self.tls:
            yield from super().receive_data(data)

    def send_close(self, command: commands.CloseConnection) -> Generator:
        """Without close_notify a client must take the last response for cut off."""
        if self.tls and self.conn.state & ConnectionState.CAN_WRITE:
            say_goodbye(self.tls)
            yield from self.tls_interact()
        yield from super().send_close(command)


class Stream(http_layers.HttpStream):
    """One request: a refusal is answered at once, and a failed upstream is answered by us, not by mitmproxy."""

    line: FlowState

    def state_wait_for_request_headers(self, event: RequestHeaders) -> Generator:
        """Runs the hook; where that refused, the body is not waited for and no 100 Continue is sent."""
        data = event.request.data
        self.line = FlowState(data.scheme.decode("latin-1"), data.authority.decode("latin-1"))
        if not data.host:
            data.host = NOWHERE  # or mitmproxy takes it from Host, and hangs up where there is none
        steps = super().state_wait_for_request_headers(event)

        def refused(command: commands.Command) -> bool:
            answered = isinstance(command, HttpRequestHeadersHook) and bool(self.flow.response)
            return answered and not event.end_stream and not self._small_body()

        if (yield from _until(steps, refused))[0]:
            yield from self._answer_now()

    def _small_body(self) -> bool:
        if self.flow.request.is_http2 and "content-length" not in self.flow.request.headers:
            return False
        try:
            size = http1.expected_http_body_size(self.flow.request)
        except ValueError:
            return False
        return size is not None and 0 <= size <= CONSUMED_BODY and "expect" not in self.flow.request.headers

    def _answer_now(self) -> Generator:
        assert self.flow.response
        if not self.flow.request.is_http2:
            self.flow.response.headers["connection"] = "close"
        yield HttpRequestHook(self.flow)
        yield HttpResponseHeadersHook(self.flow)
        self.client_state = self.server_state = self.state_done
        yield from self.send_response()
        self.client_state = self.server_state = self.state_errored  # which takes no offence at what still comes

    def check_invalid(self, request: bool) -> layer.CommandGenerator[bool]:
        """A head that mitmproxy finds malformed is answered by us."""
        if request:
            self.flow.metadata[STATE] = self.line
        stopped, invalid = yield from _until(super().check_invalid(request), self._answered_error)
        if stopped:
            yield from self._answer_failure()
        return stopped or bool(invalid)

    def handle_protocol_error(self, event: RequestProtocolError | ResponseProtocolError) -> Generator:
        """An upstream that failed before its answer began: the error hook has written ours."""
        if isinstance(event, RequestProtocolError):
            state_of(self.flow).client_gone = True
        if (yield from _until(super().handle_protocol_error(event), self._answered_error))[0]:
            yield from self._answer_failure()

    def state_consume_request_body(self, event: Any) -> Generator:
        """A body that is held, up to a bound."""
        held = state_of(self.flow).held
        if held and isinstance(event, RequestData) and len(self.request_body_buf) + len(event.data) > held[0]:
            held[1]()
            yield from self._answer_now()
        else:
            yield from super().state_consume_request_body(event)

    def state_stream_request_body(self, event: Any) -> Generator:
        """A body that is refused in the middle ends for its upstream, and is answered where no answer has begun."""
        try:
            yield from super().state_stream_request_body(event)
        except Refused:
            gone = RequestProtocolError(self.stream_id, "refused", ErrorCode.CANCEL)
            yield http_layers.SendHttp(gone, self.context.server)
            if self.flow.response is None:
                yield HttpErrorHook(self.flow)
                yield from self._answer_failure()
            else:
                yield from self._cut_answer()

    def _cut_answer(self) -> Generator:
        self.client_state = self.server_state = self.state_errored
        cut = ResponseProtocolError(self.stream_id, "refused", ErrorCode.KILL)
        yield http_layers.SendHttp(cut, self.context.client)
        yield HttpErrorHook(self.flow)
        self.flow.live = False
        yield http_layers.DropStream(self.stream_id)

    def _answered_error(self, command: commands.Command) -> bool:
        state = state_of(self.flow)
        return isinstance(command, HttpErrorHook) and state.answered and not state.client_gone

    def send_response(self, already_streamed: bool = False) -> Generator:
        """The response; where it is over before the request is, nobody waits for the rest of that."""
        yield from super().send_response(already_streamed)
        if self.server_state == self.state_done and self.client_state == self.state_stream_request_body:
            self.client_state = self.server_state = self.state_errored
            self.flow.live = False
            gone = RequestProtocolError(self.stream_id, "answered early", ErrorCode.CANCEL)
            yield http_layers.SendHttp(gone, self.context.server)
            yield http_layers.DropStream(self.stream_id)
            yield http_layers.SendHttp(ResponseEndOfMessage(self.stream_id), self.context.client)

    def flow_done(self) -> Generator:
        """The end of the exchange, or the beginning of a WebSocket."""
        yield from super().flow_done()
        if isinstance(self.child_layer, websocket.WebsocketLayer):
            to_client: Any = self.child_layer.client_ws
            send = to_client.send2
            to_client.send2 = lambda event: send(clean_control_frame(self.flow, event))
            to_server: Any = self.child_layer.server_ws
            pass_on = to_server.send2
            to_server.send2 = lambda event: pass_on(self._guarded(event))

    def _guarded(self, event: Event) -> Event:
        """A control frame on its way to the upstream, emptied where it may not say what it does."""
        may_send = state_of(self.flow).may_send
        if isinstance(event, CloseConnection):
            told = (
                self.flow.websocket.closed_by_client if self.flow.websocket else True
            )  # else it is the upstream's own
            return (
                event if not (told and event.reason) or may_send(event.reason.encode()) else replace(event, reason="")
            )
        if isinstance(event, Ping | Pong) and event.payload and not may_send(bytes(event.payload)):
            return replace(event, payload=b"")
        return event

    def _answer_failure(self) -> Generator:
        response = self.flow.response
        assert isinstance(response, http.Response)
        unread = self.client_state != self.state_done
        if (unread or state_of(self.flow).close) and not self.flow.request.is_http2:
            response.headers["connection"] = "close"
        self.client_state = self.server_state = self.state_errored
        content = response.raw_content or b""
        yield http_layers.SendHttp(ResponseHeaders(self.stream_id, response), self.context.client)
        yield http_layers.SendHttp(ResponseData(self.stream_id, content), self.context.client)
        self.flow.live = False
        yield http_layers.DropStream(self.stream_id)
        yield http_layers.SendHttp(ResponseEndOfMessage(self.stream_id), self.context.client)


def _until(
    steps: layer.CommandGenerator[Any], over: Callable[[commands.Command], bool]
) -> layer.CommandGenerator[tuple[bool, Any]]:
    """Passes on commands until one, when it was carried out, is `over`; whether one was, and else what `steps` says."""
    reply: Any = None
    while True:
        try:
            command = steps.send(reply)
        except StopIteration as end:
            return False, end.value
        reply = yield command
        if over(command):
            steps.close()
            return True, None


class HttpLayer(http_layers.HttpLayer):
    """mitmproxy's HTTP layer with the stricter parts above. An upstream connection that is over is forgotten."""

    def __init__(
        self,
        context: Context,
        mode: http_layers.HTTPMode,
        reader: Callable[[Context], HttpConnection],
    ) -> None:
        super().__init__(context, mode)
        self.connections[context.client] = reader(context.fork())

    def _handle_event(self, event: events.Event) -> Generator:
        if isinstance(event, events.ConnectionEvent) and event.connection not in self.connections:
            return
        yield from super()._handle_event(event)
        if isinstance(event, events.ConnectionClosed) and event.connection.state is ConnectionState.CLOSED:
            self._forget(event.connection)

    def register_connection(self, command: http_layers.RegisterHttpConnection) -> Generator:
        """A failed dial is not remembered: mitmproxy would fail every later request to the same place with it."""
        if command.err:
            self._forget(command.connection)
        yield from super().register_connection(command)

    def _forget(self, connection: Connection) -> None:
        if isinstance(connection, Server):
            self.connections.pop(connection, None)

    def get_connection(self, event: http_layers.GetHttpConnection, *, reuse: bool = True) -> Generator:
        """An HTTP/1 upstream's connection that is idle serves an HTTP/2 client's next stream too: mitmproxy would make
        one for each."""
        idle = self._idle(event) if reuse and self.context.client.alpn == b"h2" else None
        if idle is None:
            yield from super().get_connection(event, reuse=reuse)
        else:
            done = http_layers.GetHttpConnectionCompleted(event, (idle, None))
            yield from self.event_to_child(self.command_sources.pop(event), done)

    def _idle(self, event: http_layers.GetHttpConnection) -> Connection | None:
        for connection in self.connections:
            if isinstance(connection, Server) and connection.connected and event.connection_spec_matches(connection):
                part = self._part(connection, StrictClient)
                if part is not None and part.idle:
                    return connection
        return None

    def make_stream(self, stream_id: int) -> Generator:
        """A stream of ours."""
        self.streams[stream_id] = Stream(self.context.fork(), stream_id)
        yield from self.event_to_child(self.streams[stream_id], events.Start())

    def waiting(self) -> int:
        """Bytes of request bodies that wait for a hook, or for an upstream to be connected; mitmproxy has no bound."""
        events_ = (event for stream in self.streams.values() for event in stream._paused_event_queue)
        return sum(len(event.data) for event in events_ if isinstance(event, RequestData))

    def unread(self) -> int:
        """Bytes of HTTP/2 that were received and wait for their turn."""
        return sum(part.unread() for connection in self.connections if (part := self._http2(connection)))

    def backlog(self, connection: Connection) -> int:
        """Bytes of HTTP/2 bodies that wait for the windows of this peer."""
        part = self._http2(connection)
        if part is None:
            return 0
        return sum(len(piece.data) for waiting in part.h2_conn.stream_buffers.values() for piece in waiting)

    def _http2(self, connection: Connection) -> StrictServer2 | StrictClient2 | None:
        part: StrictServer2 | StrictClient2 | None = self._part(connection, StrictServer2, StrictClient2)
        return part

    def _part(self, connection: Connection, *kinds: type[Any]) -> Any:
        part: Any = self.connections.get(connection)
        while part is not None and not isinstance(part, kinds):
            part = getattr(part, "child_layer", None)
        return part
