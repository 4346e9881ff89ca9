"""mitmproxy's HTTP layers made strict: what a hostile peer may send is refused or cut before mitmproxy acts on it.

No policy lives here; each class mends one thing that is written beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from h11 import EndOfMessage
from h11._readers import ChunkedReader
from mitmproxy import http
from mitmproxy.connection import ConnectionState
from mitmproxy.net.http import http1
from mitmproxy.proxy import commands, events, layer
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layers import http as http_layers
from mitmproxy.proxy.layers.http import _http1
from mitmproxy.proxy.layers.http._base import HttpEvent, ReceiveHttp
from mitmproxy.proxy.layers.http._events import (
    ErrorCode,
    RequestHeaders,
    RequestProtocolError,
    ResponseData,
    ResponseEndOfMessage,
    ResponseHeaders,
    ResponseProtocolError,
)
from mitmproxy.proxy.layers.http._hooks import (
    HttpConnectHook,
    HttpErrorHook,
    HttpRequestHeadersHook,
    HttpRequestHook,
    HttpResponseHeadersHook,
)

from proxy.flow import STATE, FlowState
from proxy.framing import HEAD_END, head_problem

type Generator = layer.CommandGenerator[None]

MAX_INFORMATIONAL = 16
MAX_RESPONSE_HEAD = 256 * 1024
LINGER_BYTES = 4 * 1024 * 1024
LINGER_SECONDS = 2.0
CONSUMED_BODY = 64 * 1024  # a refused body up to this is read, so that the connection can be kept


class Refuse(layer.Layer):
    """Closes the client connection; what follows a CONNECT and is no TLS ends here (raw TCP, plain HTTP)."""

    def _handle_event(self, event: events.Event) -> Generator:
        if isinstance(event, events.Start):
            yield commands.CloseConnection(self.context.client)


class StrictServer(_http1.Http1Server):
    """Reads requests: heads are bounded and checked; after an early answer the rest of a body is not waited for."""

    def __init__(self, context: Context, head_limit: int, refuse_head: Callable[[Any, str], bytes]) -> None:
        super().__init__(context)
        self.head_limit = head_limit
        self.refuse_head = refuse_head
        self.lingered = 0

    def read_headers(self, event: events.ConnectionEvent) -> Generator:
        """The next request head (RFC 9112 section 2.2: empty lines before it are skipped)."""
        if isinstance(event, events.DataReceived):
            while bytes(self.buf._data[:2]) == b"\r\n":
                self.buf.maybe_extract_at_most(2)
            if not self.buf:
                return
            end = self.buf._data.find(HEAD_END, 0, self.head_limit)
            if end < 0 and len(self.buf) < self.head_limit and b"\n\n" not in self.buf._data:
                return
            if end < 0:
                problem: str | None = f"its head is malformed or larger than {self.head_limit} bytes"
            else:
                problem = head_problem(bytes(self.buf._data[:end]))
            if problem:
                yield from self._close_with(self.refuse_head(self.context.client, problem))
                return
        elif isinstance(event, events.ConnectionClosed):
            yield commands.CloseConnection(self.conn)  # mitmproxy would log what the client sent
            return
        yield from super().read_headers(event)

    def send(self, event: HttpEvent) -> Generator:
        """Answers; one that comes before the request's body was read ends the connection."""
        if isinstance(event, ResponseProtocolError):  # mitmproxy's page would quote what a peer sent
            if event.code is ErrorCode.PASSTHROUGH_CLOSE:
                yield from self._close_with(b"")
            elif self.conn.state & ConnectionState.CAN_WRITE:
                yield commands.CloseConnection(self.conn)
            return
        early = isinstance(event, ResponseEndOfMessage) and not self.request_done
        yield from super().send(event)
        if early and self.response and self.response.status_code != 101 and self.conn.state:
            yield from self._close_with(b"")

    def _close_with(self, answer: bytes) -> Generator:
        if answer:
            yield commands.SendData(self.conn, answer)
        # A close with unread input would be a reset, and the client would lose the answer (RFC 9112 section 9.6).
        yield commands.CloseTcpConnection(self.conn, half_close=True)
        yield commands.RequestWakeup(LINGER_SECONDS)
        self.buf.maybe_extract_at_most(len(self.buf))
        self.state = self.linger

    def linger(self, event: events.Event) -> Generator:
        """Discards what the client still sends, up to a bound."""
        if isinstance(event, events.DataReceived):
            self.buf.maybe_extract_at_most(len(self.buf))
            self.lingered += len(event.data)
            if self.lingered < LINGER_BYTES:
                return
        yield commands.CloseConnection(self.conn)
        self.state = self.done


class StrictClient(_http1.Http1Client):
    """Reads responses: heads are bounded, 1xx ones are skipped (RFC 9110 section 15.2), 101 only if asked for."""

    skipped = 0

    def read_headers(self, event: events.ConnectionEvent) -> Generator:
        """The next final response head."""
        if isinstance(event, events.DataReceived) and self.request:
            while (end := self.buf._data.find(HEAD_END)) >= 0 and self._informational():
                self.buf.maybe_extract_at_most(end + len(HEAD_END))
                self.skipped += 1
            unasked = self.buf._data[9:12] == b"101" and "upgrade" not in self.request.headers
            if unasked or self.skipped > MAX_INFORMATIONAL or (end < 0 and len(self.buf) > MAX_RESPONSE_HEAD):
                yield from self._give_up("the upstream does not answer in HTTP")
                return
            if not self.buf:
                return
        elif isinstance(event, events.ConnectionClosed) and self.buf:
            self.buf.maybe_extract_at_most(len(self.buf))  # mitmproxy would quote it
        self.skipped = 0 if b"\r\n\r\n" in self.buf._data else self.skipped
        yield from super().read_headers(event)

    def _informational(self) -> bool:
        status = bytes(self.buf._data[:12])
        return status[:7] == b"HTTP/1." and status[9:10] == b"1" and status[9:12] != b"101"

    def _give_up(self, why: str) -> Generator:
        assert self.stream_id is not None
        self.buf.maybe_extract_at_most(len(self.buf))
        yield commands.CloseConnection(self.conn)
        yield ReceiveHttp(ResponseProtocolError(self.stream_id, why, ErrorCode.GENERIC_SERVER_ERROR))


class _NoTrailers:
    """h11's chunked reader without trailers, which crash mitmproxy's layer (RFC 9110 section 6.5.1 allows it)."""

    def __init__(self) -> None:
        self.reader = ChunkedReader()

    def __call__(self, buf: Any) -> Any:
        event = self.reader(buf)
        return EndOfMessage() if isinstance(event, EndOfMessage) else event

    def read_eof(self) -> Any:
        return self.reader.read_eof()


def _body_reader(size: int | None, make: Callable[[int | None], Any] = _http1.make_body_reader) -> Any:
    return _NoTrailers() if size is None else make(size)


# mitmproxy offers no other way to choose these two.
_http1.make_body_reader = _body_reader  # type: ignore[assignment]  # a duck of the same three readers
http_layers.Http1Client = StrictClient  # type: ignore[attr-defined]


class Stream(http_layers.HttpStream):
    """One request: a refusal is answered at once, and a failed upstream is answered by us, not by mitmproxy."""

    def state_wait_for_request_headers(self, event: RequestHeaders) -> Generator:
        """Runs the hook; where that refused, the body is not waited for and no 100 Continue is sent."""
        line = FlowState(event.request.data.scheme.decode("latin-1"), event.request.data.authority.decode("latin-1"))
        steps = super().state_wait_for_request_headers(event)
        reply: Any = None
        while True:
            try:
                command = steps.send(reply)
            except StopIteration:
                return
            if isinstance(command, (HttpRequestHeadersHook, HttpConnectHook)):
                self.flow.metadata[STATE] = line
            reply = yield command
            hooked = isinstance(command, HttpRequestHeadersHook)
            if hooked and self.flow.response and not event.end_stream and not self._small_body():
                steps.close()
                yield from self._answer_now()
                return

    def _small_body(self) -> bool:
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

    def handle_protocol_error(self, event: RequestProtocolError | ResponseProtocolError) -> Generator:
        """An upstream that failed before its answer began: the error hook has written ours."""
        waiting = self.server_state in (self.state_wait_for_response_headers, self.state_consume_response_body)
        steps = super().handle_protocol_error(event)
        reply: Any = None
        while True:
            try:
                command = steps.send(reply)
            except StopIteration:
                return
            reply = yield command
            failed = isinstance(command, HttpErrorHook)
            if failed and waiting and isinstance(event, ResponseProtocolError) and self.flow.response:
                steps.close()
                yield from self._answer_failure()
                return

    def _answer_failure(self) -> Generator:
        response = self.flow.response
        assert isinstance(response, http.Response)
        unread = self.client_state != self.state_done
        if unread and not self.flow.request.is_http2:
            response.headers["connection"] = "close"
        self.client_state = self.server_state = self.state_done
        content = response.raw_content or b""
        yield http_layers.SendHttp(ResponseHeaders(self.stream_id, response), self.context.client)
        yield http_layers.SendHttp(ResponseData(self.stream_id, content), self.context.client)
        self.flow.live = False
        yield http_layers.DropStream(self.stream_id)
        yield http_layers.SendHttp(ResponseEndOfMessage(self.stream_id), self.context.client)


class HttpLayer(http_layers.HttpLayer):
    """mitmproxy's HTTP layer with the stricter parts above."""

    def __init__(
        self,
        context: Context,
        mode: http_layers.HTTPMode,
        head_limit: int,
        refuse_head: Callable[[Any, str], bytes],
    ) -> None:
        super().__init__(context, mode)
        if context.client.alpn != b"h2":
            self.connections[context.client] = StrictServer(context.fork(), head_limit, refuse_head)

    def make_stream(self, stream_id: int) -> Generator:
        """A stream of ours."""
        self.streams[stream_id] = Stream(self.context.fork(), stream_id)
        yield from self.event_to_child(self.streams[stream_id], events.Start())
