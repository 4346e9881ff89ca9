"""The hooks of answers: cleaned, redacted, put on record; and of WebSockets."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from mitmproxy import http

from proxy import flow as flows
from proxy.coding import Undecodable
from proxy.exchange import Exchange
from proxy.flow import FlowState, state_of
from proxy.guard import guarded, where
from proxy.hooks import Hooks, cut_flow
from proxy.reason import Reason
from proxy.strict1 import LATE_HEAD
from proxy.upstream import Refused

_log = logging.getLogger("sallyport")


class ResponseHooks(Hooks):
    """From an answer's head to its last byte."""

    @guarded(cut_flow)
    def responseheaders(self, flow: http.HTTPFlow) -> None:
        """Strip, edit and redact the head; stream the body through the redactor."""
        state, exchange, response = state_of(flow), state_of(flow).exchange, flow.response
        assert response
        if state.answered:
            return
        if exchange is None or not state.decided:
            raise RuntimeError("an undecided response")
        exchange.status = response.status_code
        exchange.upstream_duration = time.perf_counter() - state.sent_at
        peername = flow.server_conn.peername
        exchange.upstream_ip = peername[0] if peername else ""
        state.close = state.close or (self.draining and not flow.request.is_http2)
        flows.clean_response_headers(flow, state.response_edits, state.redactor)
        if state.whole is not None:
            size = len(state.whole)
            if state.redactor is None or flows.redact_whole(flow, state.redactor):
                exchange.response_bytes = size
                return
            state.whole = None
        try:
            body = state.response_body = flows.body_redactor(flow, state.redactor) if state.redactor else None
        except Undecodable as error:
            self._cut_unscanned(flow, exchange, error)
            response.stream = lambda _: []
            return

        def pass_on(chunk: bytes) -> Iterable[bytes]:
            exchange.response_bytes += len(chunk)
            if body is None:
                return [chunk] if chunk else []
            try:
                return flows.scan(body, chunk)
            except Exception as error:
                self._cut_unscanned(flow, exchange, error)
                return []

        response.stream = pass_on

    def _cut_unscanned(self, flow: http.HTTPFlow, exchange: Exchange, error: Exception) -> None:
        """What cannot be read could hide a secret."""
        _log.error("a response could not be scanned and was cut: %s", where(error))
        exchange.allowed, exchange.reason = False, Reason.SECRET_LEAK
        self.abort(flow.client_conn)

    @guarded(cut_flow)
    def response(self, flow: http.HTTPFlow) -> None:
        """The exchange is over, unless a WebSocket begins."""
        flows.clean_response_trailers(flow, state_of(flow).redactor)
        if not flow.websocket:
            self._record(flow)

    @guarded(cut_flow)
    def error(self, flow: http.HTTPFlow) -> None:
        """The exchange failed; where nothing was answered yet, say so in our words."""
        state = state_of(flow)
        if state.decided and state.exchange and not state.exchange.status and not state.client_gone:
            self._upstream_failed(flow, state, state.exchange)
        self._record(flow)

    def _upstream_failed(self, flow: http.HTTPFlow, state: FlowState, exchange: Exchange) -> None:
        if state.stopped:
            self.refuse(flow, state.stopped)
            return
        peer = self.peers.get(flow.client_conn.id)
        dial = peer.dials.get((flow.request.host, flow.request.port)) if peer else None
        late = flow.error is not None and flow.error.msg == LATE_HEAD
        reason = Reason.UPSTREAM_TIMEOUT if late else (dial.failure if dial else None) or Reason.UPSTREAM_UNREACHABLE
        exchange.reason = reason
        exchange.allowed = reason not in (Reason.PRIVATE_ADDRESS, Reason.INTERNAL)
        exchange.status = reason.status
        state.answered = True
        flow.response = flows.refusal(Refused(reason), exchange, state.view)

    @guarded(cut_flow)
    def websocket_message(self, flow: http.HTTPFlow) -> None:
        """Redact what the upstream says; keep no history (mitmproxy would, for ever)."""
        assert flow.websocket
        message, state = flow.websocket.messages[-1], state_of(flow)
        exchange = state.exchange
        assert exchange
        if message.from_client:
            exchange.request_bytes += len(message.content)
            if not state.may_send(message.content):
                message.drop()  # type: ignore[no-untyped-call]
        else:
            exchange.response_bytes += len(message.content)
            if state.redactor:
                message.content, found = state.redactor.replace(message.content)
                exchange.count_redacted(found, "websocket")
        flow.websocket.messages[:] = [message]

    @guarded(cut_flow)
    def websocket_end(self, flow: http.HTTPFlow) -> None:
        """The exchange of a WebSocket is over."""
        self._record(flow)
