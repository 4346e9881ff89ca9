"""The hooks of requests: decided, met with obligations, and looked through on their way out."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from mitmproxy import http

from proxy import flow as flows
from proxy.bodymatch import Body
from proxy.exchange import Exchange
from proxy.flow import FlowState, state_of
from proxy.gateway import BodyWanted, Unready
from proxy.guard import guarded
from proxy.hooks import Hooks, refuse_flow
from proxy.http1 import CONSUMED_BODY
from proxy.leak import LeakStream
from proxy.leakguard import Leaked, look_through
from proxy.outbound import body_placeholders, secrets_known, secrets_sent
from proxy.peer import Dial, Peer
from proxy.policy import Decision, Rule
from proxy.reason import Reason
from proxy.redact import Replacer, secret_replacer
from proxy.request import Ambiguous, RequestView
from proxy.signing import sign_request
from proxy.transparent import name_target
from proxy.upstream import Refused
from proxy.vault import Lease

if TYPE_CHECKING:
    from mitmproxy import connection

    from proxy.runtime import Runtime


class RequestHooks(Hooks):
    """From a request's head to its last byte."""

    def __init__(self, runtime: Runtime, abort: Callable[[connection.Client], None]) -> None:
        super().__init__(runtime, abort)
        # By where to and what is sent there; good for as long as no other credential is opened or closed.
        self._replacers: dict[
            tuple[str, int, tuple[tuple[str, bytes], ...]], tuple[Mapping[str, Lease] | None, Replacer | None]
        ] = {}
        self._replacer = functools.lru_cache(maxsize=64)(_replacer)

    @guarded(refuse_flow)
    def requestheaders(self, flow: http.HTTPFlow) -> Coroutine[Any, Any, None] | None:
        """View, decide, meet the obligations: all that follows only carries it out. What is returned has to be awaited
        first: the store must be asked for a credential, or to count a limit."""
        peer = self.peers[flow.client_conn.id]
        self._begin(flow, peer)
        try:
            self._decide(flow, peer, {})
        except Unready as missing:
            return self._prepare_and_decide(flow, peer, missing)
        except BodyWanted:
            return self._hold_body(flow, peer)
        except Refused as refused:
            self.refuse(flow, refused)
        return None

    def _hold_body(self, flow: http.HTTPFlow, peer: Peer) -> Coroutine[Any, Any, None] | None:
        """A rule must see the body: wait for it, or decide without where there is none or too much of it."""
        state, headers, most = state_of(flow), flow.request.headers, self.runtime.settings.limits.buffer
        length = headers.get("content-length")
        if length is None and (flow.request.is_http2 or "transfer-encoding" in headers):
            waits = True
        else:
            waits = 0 < int(length or 0) <= most
            state.body = None if waits else Body(None if length and int(length) else b"")
        if not waits:
            return self._prepare_and_decide(flow, peer, None)
        state.held = most, lambda: self.refuse(flow, Refused(Reason.BODY_TOO_LARGE))
        flow.request.stream = False
        return None

    async def _decide_held(self, flow: http.HTTPFlow) -> None:
        """The body that was waited for is here."""
        state, peer = state_of(flow), self.peers[flow.client_conn.id]
        assert state.held
        raw, headers = flow.request.raw_content or b"", flow.request.headers
        coding = ",".join(headers.get_all("content-encoding"))
        state.body, state.held = Body(raw, coding, self.runtime.settings.limits.buffer), None
        if headers.pop("transfer-encoding", None) or raw:
            headers["content-length"], state.block = str(len(raw)), None
        await self._prepare_and_decide(flow, peer, None)
        if not flow.response:
            flow.request.stream, flow.request.trailers = False, None
            self._send_held(flow)

    async def _prepare_and_decide(self, flow: http.HTTPFlow, peer: Peer, missing: Unready | None) -> None:
        leases: dict[str, Lease] = {}
        exchange = state_of(flow).exchange
        assert exchange
        try:
            while True:
                if missing:
                    await self.gateway.prepare(missing, exchange, leases)
                try:
                    return self._decide(flow, peer, leases)
                except Unready as still:
                    missing = still
        except BodyWanted:  # the rules changed meanwhile
            if (rest := self._hold_body(flow, peer)) is not None:
                await rest
        except Refused as refused:
            self.refuse(flow, refused)

    def _decide(self, flow: http.HTTPFlow, peer: Peer, leases: Mapping[str, Lease]) -> None:
        state = state_of(flow)
        exchange = state.exchange
        assert exchange
        identified = self._identify(flow, peer)
        exchange.agent, exchange.identity = identified.agent, identified.proofs
        self._describe(flow, peer, exchange)
        self._admit(peer, identified)
        if peer.sni_mismatch:
            raise Refused(Reason.AUTHORITY_MISMATCH)
        state.view = view = self._view(flow, peer)
        if flow.error:  # mitmproxy's own checks, before the hook
            raise Refused(Reason.AMBIGUOUS_REQUEST, "its headers are malformed")
        _fill(exchange, view)
        assert identified.agent
        approved = self.gateway.approve(identified.agent, view, exchange, leases)
        if approved.body_limit:
            state.body_limit = _body_limit(flow, *approved.body_limit)
        if approved.answer:
            state.answered = True
            flow.response = flows.answer(approved.answer)
            return
        outbound = approved.outbound
        target = outbound.view
        clean = self.runtime.leaks.check(view, target, formats=approved.scan)
        state.guarded = target, approved.scan
        if view.upgrade:
            state.may_send = functools.partial(self.may_send, flow)
        state.redactor = self._redactor(target, secrets_sent(outbound))
        state.response_edits, state.rules = approved.response_edits, approved.rules
        # One for all requests under way to a place: its failure is told to each of them.
        place = target.host.name, target.port
        dial = peer.dials.get(place)
        if dial is None:
            dial = peer.dials[place] = Dial(target.host, approved.private)
        dial.private, dial.owner = approved.private, approved.owner
        flows.write_request(flow, target, scanned=state.redactor is not None)
        if approved.owner and state.block is None and not flow.request.is_http2:
            state.close = True  # mitmproxy's stack has one for all that the client's connection carries
        if outbound.body:
            state.body_credentials = tuple(opened for _, opened in outbound.body)
            state.placeholders = Replacer(body_placeholders(outbound))
        if outbound.signing:
            now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self.runtime.clock()))
            state.sign = sign_request(flow, target, outbound.signing, self.runtime.settings.limits.buffer, now)
        if state.sign is None:
            self._stream_request(flow, state)
        if state.body_limit and flow.request.stream:
            flow.request.stream = self._bounded(flow, *state.body_limit)
        state.rests_on = self.replays.ground(known=clean and not leases)
        state.sent_at = time.perf_counter()
        state.decided = True

    def _stream_request(self, flow: http.HTTPFlow, state: FlowState) -> None:
        request, exchange = flow.request, state.exchange
        assert exchange
        if state.block and not state.placeholders and not state.block.lengths and not state.block.codings:
            return  # there is no body
        length = request.headers.get("content-length")
        leaks = self._leak_stream(flow, state, length)
        most = self.runtime.settings.limits.buffer if state.placeholders else CONSUMED_BODY if leaks else -1
        if length and int(length) <= most:
            return  # held: the upstream is told its new length, and a leak can still be answered
        if state.placeholders:
            state.request_stream = state.placeholders.stream()
            request.headers.pop("content-length", None)
            if not request.is_http2 and (length or "transfer-encoding" in request.headers):
                request.headers["transfer-encoding"] = "chunked"
        replacing = state.request_stream

        def pass_on(chunk: bytes) -> Iterable[bytes]:
            state.streamed, last = True, not chunk
            exchange.request_bytes += len(chunk)
            if leaks:
                chunk = self._look_through(flow, leaks, chunk)
            if replacing:
                chunk = replacing.feed(chunk)
                if last:
                    chunk += replacing.finish()
                    flows.note_body_injections(state, replacing.found)
            return [chunk] if chunk else []

        request.stream = pass_on

    def _bounded(self, flow: http.HTTPFlow, most: int, rule: Rule) -> Callable[[bytes], Iterable[bytes]]:
        """The stream of a request's body, which raises Refused where it gets longer than `most` bytes."""
        pass_on: Any = flow.request.stream
        left = most

        def bounded(chunk: bytes) -> Iterable[bytes]:
            nonlocal left
            left -= len(chunk)
            if left < 0:
                raise self.stop_body(flow, _too_large(rule))
            return list(pass_on(chunk))

        return bounded

    def _leak_stream(self, flow: http.HTTPFlow, state: FlowState, length: str | None) -> LeakStream | None:
        """What looks through the body of a request, where it has one."""
        headers = flow.request.headers
        if not (length or flow.request.is_http2 or "transfer-encoding" in headers):
            return None
        assert state.guarded
        target, formats = state.guarded
        return self.runtime.leaks.stream(target, ",".join(headers.get_all("content-encoding")), formats=formats)

    def _look_through(self, flow: http.HTTPFlow, leaks: LeakStream, chunk: bytes) -> bytes:
        """What of a streaming body may pass. Raises Leaked, which stops it."""
        guarded = state_of(flow).guarded
        assert guarded
        try:
            return look_through(leaks, chunk, guarded[0])
        except Leaked as leaked:
            raise self.stop_body(flow, leaked) from None

    def may_send(self, flow: http.HTTPFlow, data: bytes) -> bool:
        """Whether what a client says on a WebSocket may be passed on; if not, the connection is cut."""
        guarded = state_of(flow).guarded
        assert guarded
        try:
            self.runtime.leaks.check_message(data, guarded[0], formats=guarded[1])
        except Leaked as leaked:
            self.stop_body(flow, leaked)
            self.abort(flow.client_conn)
            return False
        return True

    @guarded(refuse_flow)
    def request(self, flow: http.HTTPFlow) -> Coroutine[Any, Any, None] | None:
        """No request passes that was not decided. What is returned has to be awaited first: it is decided now."""
        state = state_of(flow)
        if flow.response:
            return None
        if state.held:
            return self._decide_held(flow)
        if not state.decided:
            raise RuntimeError("an undecided request")
        flow.request.trailers = None  # they were not decided, and HTTP/1 upstreams are sent none either
        if not flow.request.stream:
            self._send_held(flow)
        return None

    def _send_held(self, flow: http.HTTPFlow) -> None:
        """A body that was held is looked through, and gets its placeholders replaced."""
        state, exchange = state_of(flow), state_of(flow).exchange
        assert exchange
        body = flow.request.raw_content or b""
        exchange.request_bytes += len(body)
        if body and (leaks := self._leak_stream(flow, state, "held")):
            try:
                self._look_through(flow, leaks, body)
            except Leaked as leaked:
                self.refuse(flow, leaked)
                return
        if state.placeholders:
            body, found = state.placeholders.replace(body)
            flow.request.raw_content = body
            flow.request.headers["content-length"] = str(len(body))
            flows.note_body_injections(state, found)
        if state.sign:
            state.sign(body)

    @staticmethod
    def _view(flow: http.HTTPFlow, peer: Peer) -> RequestView:
        try:
            if peer.redirected and not peer.tunnel:
                name_target(flow, peer.redirected)
            view = flows.view_of(flow, peer.tunnel)
        except Ambiguous as error:
            raise Refused(Reason.AMBIGUOUS_REQUEST, str(error)) from None
        body = state_of(flow).body
        return view._replace(body=body) if body else view

    def _redactor(self, view: RequestView, sent: tuple[tuple[str, bytes], ...]) -> Replacer | None:
        """What must not come back: what was sent now, and whatever else is open that this host may know."""
        leased = self.runtime.leased()
        key = view.host.name, view.port, sent
        known, replacer = self._replacers.get(key, (None, None))
        if known is leased:
            return replacer
        secrets: dict[str, set[bytes]] = {}
        open_ones = ((lease.name, lease.secret) for lease in leased.values() if lease.grant.covers_host(view))
        for name, value in (*sent, *secrets_known(open_ones)):
            secrets.setdefault(name, set()).add(value)
        if len(self._replacers) >= 256:
            self._replacers.clear()
        replacer = self._replacer(tuple((name, frozenset(values)) for name, values in secrets.items()))
        self._replacers[key] = leased, replacer
        return replacer


def _replacer(secrets: tuple[tuple[str, frozenset[bytes]], ...]) -> Replacer | None:
    """One for all places that the same secrets go to."""
    return secret_replacer(dict(secrets)) if secrets else None


def _body_limit(flow: http.HTTPFlow, most: int, rule: Rule) -> tuple[int, Rule] | None:
    """What is to be watched while the body comes; nothing where its length was told, which framing holds it to.

    Raises Refused.
    """
    length = flow.request.headers.get("content-length")
    if length is not None and int(length) > most:
        raise _too_large(rule)
    return (most, rule) if length is None else None


def _too_large(rule: Rule) -> Refused:
    decision = Decision(reason=Reason.BODY_TOO_LARGE, rule=rule, limit="request_body")
    return Refused(Reason.BODY_TOO_LARGE, decision=decision)


def _fill(exchange: Exchange, view: RequestView) -> None:
    exchange.method, exchange.scheme = view.method, view.scheme
    exchange.host, exchange.port, exchange.path = view.host.name, view.port, view.path
