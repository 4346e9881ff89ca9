"""mitmproxy's HTTP/1 connections made strict: what a hostile peer sends is refused before mitmproxy acts on it.

No policy lives here; each class mends what is written beside it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

from h11 import Data, EndOfMessage, RemoteProtocolError
from mitmproxy.connection import ConnectionState
from mitmproxy.http import Headers, Request, Response, ResponseData
from mitmproxy.proxy import commands, events, layer
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layers import http as http_layers
from mitmproxy.proxy.layers.http import _http1
from mitmproxy.proxy.layers.http._base import HttpEvent, ReceiveHttp
from mitmproxy.proxy.layers.http._events import (
    ErrorCode,
    RequestHeaders,
    ResponseEndOfMessage,
    ResponseHeaders,
    ResponseProtocolError,
)

from proxy.framing import HEAD_END, head_problem
from proxy.http1 import (
    HEAD_SECONDS,
    LINGER_BYTES,
    LINGER_SECONDS,
    MAX_INFORMATIONAL,
    MAX_RESPONSE_HEAD,
    BadMessage,
    Body,
)

type Generator = layer.CommandGenerator[None]

LATE_HEAD = "the upstream's head takes too long"
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # line breaks become spaces (RFC 9112 section 5.2)


class StrictServer(_http1.Http1Server):
    """Reads requests: heads are bounded and checked; after an early answer the rest of a body is not waited for."""

    def __init__(self, context: Context, head_limit: int, refuse_head: Callable[[Any, str], bytes]) -> None:
        super().__init__(context)
        self.head_limit = head_limit
        self.refuse_head = refuse_head
        self.lingered = 0
        self.head_since = 0.0  # when the first byte of the head that is being read came

    def read_headers(self, event: events.ConnectionEvent) -> Generator:
        """The next request head (RFC 9112 section 2.2: empty lines before it are skipped)."""
        if isinstance(event, events.DataReceived):
            while bytes(self.buf._data[:2]) == b"\r\n":
                self.buf.maybe_extract_at_most(2)
            if not self.buf:
                return
            end = self.buf._data.find(HEAD_END, 0, self.head_limit)
            if end < 0 and len(self.buf) < self.head_limit and not self._bare_line_feed():
                self.head_since = self.head_since or time.monotonic()
                if time.monotonic() - self.head_since >= min(HEAD_SECONDS, self.context.options.tcp_timeout):
                    yield commands.CloseConnection(self.conn)
                return
            self.head_since = 0.0
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
        steps = super().read_headers(event)
        first = next(steps, None)
        if isinstance(first, commands.SendData):  # mitmproxy's own page, which would quote the request line
            yield from self._close_with(self.refuse_head(self.context.client, "its target is malformed"))
        elif first:
            yield first
            yield from steps

    def _bare_line_feed(self) -> bool:
        return self.buf._data.count(b"\n") > self.buf._data.count(b"\r\n")

    def send(self, event: HttpEvent) -> Generator:
        """Answers; one that comes before the request's body or a tunnel's first bytes were read ends the connection."""
        if isinstance(event, ResponseProtocolError):  # mitmproxy's page would quote what a peer sent
            if event.code is ErrorCode.PASSTHROUGH_CLOSE:
                yield from self._close_with(b"")
            elif self.conn.state & ConnectionState.CAN_WRITE:
                yield commands.CloseConnection(self.conn)
            return
        early = isinstance(event, ResponseEndOfMessage) and self._unread()
        for command in super().send(event):
            if not (early and isinstance(command, commands.CloseConnection)):
                yield command
        if early and self.conn.state:
            yield from self._close_with(b"")

    def _unread(self) -> bool:
        assert self.request
        assert self.response
        if self.response.status_code == 101:
            return False
        return not self.request_done or (self.request.method == "CONNECT" and self.response.status_code >= 300)

    def wait(self, event: events.Event) -> Generator:
        """While a request is answered, only so much of the next ones is taken in; a CONNECT is answered at once."""
        assert self.request
        much = len(self.buf) > self.head_limit and self.request.method != "CONNECT"
        if much and isinstance(event, events.DataReceived):
            event = events.ConnectionClosed(self.conn)
        yield from super().wait(event)

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
    """Frames requests that came by HTTP/2; reads responses: heads are bounded, 1xx ones are skipped (RFC 9110 section
    15.2), 101 only if asked for."""

    skipped = 0
    head_since = 0.0  # when the first byte of the head that is being read came

    @property
    def idle(self) -> bool:
        """Whether it may carry another request."""
        return self.stream_id is None and self.state == self.read_headers

    def send(self, event: HttpEvent) -> Generator:
        """What came by HTTP/2 goes on as HTTP/1.1; as such it does not cost the connection, which mitmproxy would close
        behind it."""
        if isinstance(event, RequestHeaders) and event.request.is_http2:
            event.request = _as_http1(event.request, body=not event.end_stream)
        yield from super().send(event)

    def read_headers(self, event: events.ConnectionEvent) -> Generator:
        """The next final response head."""
        if isinstance(event, events.ConnectionClosed):
            self.buf.maybe_extract_at_most(len(self.buf))  # mitmproxy would quote it
        elif self.request and bytes(self.buf._data[:1]) in (b"\r", b"\n"):  # h11 waits for more, for ever
            yield from self._give_up("empty lines before the upstream's head")
            return
        elif self.request and len(self.buf) > MAX_RESPONSE_HEAD and HEAD_END not in self.buf._data:
            yield from self._give_up("the upstream's head is too large")
            return
        while True:
            steps = super().read_headers(event)
            first = next(steps, None)
            if first is None:
                yield from self._bound_head()
                return
            self.head_since = 0.0
            if not isinstance(first, ReceiveHttp) or not isinstance(first.event, ResponseHeaders):
                break
            assert self.request
            status = first.event.response.status_code
            if first.event.response.headers.get("transfer-encoding", "chunked").lower() != "chunked":
                yield from self._give_up("a body in a transfer coding cannot be scanned")
                return
            if _CONTROL.search(b"".join(value for _, value in first.event.response.headers.fields)):
                yield from self._give_up("a header of the upstream holds a control character")
                return
            if status >= 200 or (status == 101 and "upgrade" in self.request.headers):
                self.skipped = 0
                self.response = _as_it_came(first.event.response)
                break
            self.response = None
            self.skipped += 1
            if status < 100 or status == 101 or self.skipped > MAX_INFORMATIONAL:
                yield from self._give_up("the upstream does not answer in HTTP")
                return
        yield first
        yield from steps

    def _bound_head(self) -> Generator:
        """Each byte counts as a sign of life, so that one now and then would keep a client waiting for ever."""
        if self.request and self.buf:
            self.head_since = self.head_since or time.monotonic()
            if time.monotonic() - self.head_since >= min(HEAD_SECONDS, self.context.options.tcp_timeout):
                yield from self._give_up(LATE_HEAD)

    def _give_up(self, why: str) -> Generator:
        assert self.stream_id is not None
        self.buf.maybe_extract_at_most(len(self.buf))
        yield commands.CloseConnection(self.conn)
        yield ReceiveHttp(ResponseProtocolError(self.stream_id, why, ErrorCode.GENERIC_SERVER_ERROR))
        self.state = self.done


def _as_http1(request: Request, *, body: bool) -> Request:
    """A body of unknown length is chunked (RFC 9113 section 8.2.2): bare, it would be read as further requests."""
    request = request.copy()
    request.http_version = "HTTP/1.1"
    headers = request.headers
    if body and "content-length" not in headers:
        headers["transfer-encoding"] = "chunked"
    if "host" not in headers:
        headers.insert(0, "Host", request.authority)
    request.authority = ""
    if len(cookies := headers.get_all("cookie")) > 1:
        headers["cookie"] = "; ".join(cookies)  # RFC 9113 section 8.2.3
    return request


def _as_it_came(response: Response) -> Response:
    """For how the connection goes on: what is passed on may say another length, or none."""
    data = object.__new__(ResponseData)
    data.__dict__ = {**response.data.__dict__, "headers": Headers(response.headers.fields)}
    kept = object.__new__(Response)
    kept.__dict__ = {**response.__dict__, "data": data}
    return kept


class _Chunked:
    """The fast lane's reader in the place of h11's, which is milder, and whose trailers crash mitmproxy's layer (RFC
    9110 section 6.5.1 allows to drop them)."""

    def __init__(self) -> None:
        self.body = Body(None)

    def __call__(self, buf: Any) -> Data | EndOfMessage | None:
        rest = bytearray(buf.maybe_extract_at_most(len(buf)) or b"")
        try:
            payload = b"" if self.body.done else self.body.take(rest)
        except BadMessage as error:
            raise RemoteProtocolError(str(error)) from None
        buf += rest
        if payload:
            return Data(data=payload)
        return EndOfMessage() if self.body.done else None

    def read_eof(self) -> EndOfMessage:
        raise RemoteProtocolError("the message was cut short")


def _body_reader(size: int | None, make: Callable[[int | None], Any] = _http1.make_body_reader) -> Any:
    return _Chunked() if size is None else make(size)


# mitmproxy offers no other way to choose these two.
_http1.make_body_reader = _body_reader  # type: ignore[assignment]  # a duck of the same three readers
http_layers.Http1Client = StrictClient  # type: ignore[attr-defined]
