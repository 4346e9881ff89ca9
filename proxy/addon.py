"""The mitmproxy addon: each hook hands a flow to the rooms that decide, and refuses when anything raises.

Glue only. It sees mitmproxy's flows whichever driver they come from.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from mitmproxy import connection, http
from mitmproxy.net import tls as net_tls
from mitmproxy.proxy import layer, server_hooks
from mitmproxy.proxy.layers import http as http_layers
from mitmproxy.proxy.layers.modes import HttpProxy
from mitmproxy.proxy.layers.tls import ClientTLSLayer
from mitmproxy.tls import ClientHelloData, TlsData

from proxy import flow as flows
from proxy.address import Host, parse_authority
from proxy.agent import AgentState
from proxy.arrival import Arrival
from proxy.bodymatch import Body
from proxy.ca import Leaf
from proxy.clienthello import ClientHello, parse_client_hello
from proxy.coding import Undecodable
from proxy.exchange import Exchange
from proxy.flow import FlowState, Tunnel, state_of
from proxy.frames import FrameBudget
from proxy.gateway import BodyWanted, Gateway, Unready
from proxy.guard import guarded, where
from proxy.guesses import Guesses
from proxy.http1 import CONSUMED_BODY
from proxy.identity import Identified, Identity
from proxy.layers import ClientTls, HttpLayer, Refuse
from proxy.leak import LeakStream
from proxy.leakguard import HIDDEN, Leaked, look_through
from proxy.outbound import body_placeholders, secrets_known, secrets_sent
from proxy.passthrough import objection, passes
from proxy.peer import Dial, Peer, ulid
from proxy.policy import Decision, Policy, Rule
from proxy.reason import Reason
from proxy.redact import Replacer, secret_replacer
from proxy.relay import RelayLayer
from proxy.replay import Replays
from proxy.request import Ambiguous, RequestView
from proxy.settingvalue import Listener
from proxy.signing import sign_request
from proxy.strangers import Strangers
from proxy.strict1 import LATE_HEAD, StrictServer
from proxy.strict2 import StrictServer2
from proxy.transparent import connect_flow, name_target, tunnel_to
from proxy.upstream import PINNED, Refused, Upstream
from proxy.vault import Lease

if TYPE_CHECKING:
    from proxy.runtime import Runtime

_log = logging.getLogger("sallyport")


def _refuse_flow(addon: Addon, flow: http.HTTPFlow) -> None:
    if state_of(flow).streamed:
        _cut_flow(addon, flow)
    else:
        addon.refuse(flow, Refused(Reason.INTERNAL))


def _cut_flow(addon: Addon, flow: http.HTTPFlow) -> None:
    exchange = state_of(flow).exchange
    if exchange:
        exchange.allowed, exchange.reason = False, Reason.INTERNAL
    for message in flow.websocket.messages if flow.websocket else ():
        message.drop()  # type: ignore[no-untyped-call]
    addon.abort(flow.client_conn)


def _cut_client(addon: Addon, client: connection.Client) -> None:
    client.error = "refused"
    addon.abort(client)


def _cut_layer(addon: Addon, data: layer.NextLayer) -> None:
    data.layer = Refuse(data.context)


def _cut_tls(addon: Addon, data: TlsData | ClientHelloData) -> None:
    addon.abort(data.context.client)


def _cut_server(addon: Addon, data: server_hooks.ServerConnectionHookData) -> None:
    data.server.error = "refused"
    peer = addon.peers.get(data.client.id)
    dial = peer.dials.get(_address(data.server)) if peer else None
    if dial:
        dial.failure = Reason.INTERNAL


class Addon:
    """The proxy's hooks. `abort` cuts a client connection; the driver sets it."""

    def __init__(self, runtime: Runtime, abort: Callable[[connection.Client], None]) -> None:
        self.runtime = runtime
        self.abort = abort
        self.identity: Identity = runtime.identity
        self.gateway: Gateway = runtime.gateway
        self.upstream: Upstream = runtime.upstream
        self.peers: dict[str, Peer] = {}
        self.listeners: dict[int, Listener] = {}
        self.arriving: dict[str, Arrival] = {}  # by client, until it is connected
        self.by_agent: dict[str, set[str]] = defaultdict(set)
        self.elsewhere: Mapping[str, int] = {}  # how many connections an agent has in other workers
        self.draining = False  # connections end with the answer that comes next
        self._guesses = Guesses()
        mints, seconds = runtime.settings.limits.new_hosts_per_agent
        self._mints = Guesses(mints, seconds / mints)
        self.strangers = Strangers(
            runtime.settings.limits.unidentified_per_source,
            lambda: runtime.metrics.limit_exceeded("", "", "unidentified"),
        )
        # By where to and what is sent there; good for as long as no other credential is opened or closed.
        self._replacers: dict[
            tuple[str, int, tuple[tuple[str, bytes], ...]], tuple[Mapping[str, Lease] | None, Replacer | None]
        ] = {}
        self._replacer = functools.lru_cache(maxsize=64)(_replacer)
        self.replays = Replays(self)
        runtime.on_leases = self.replays.forget
        self._frame_budget = functools.lru_cache(maxsize=4096)(lambda _agent: FrameBudget())

    # Connections

    @guarded(_cut_client)
    def client_connected(self, client: connection.Client) -> None:
        """Remember the connection and which listener it came by."""
        port = client.sockname[1]
        arrival = self.arriving.pop(client.id, None)
        listener = arrival.listener if arrival else self.listeners.get(port) or Listener(f"port {port}", "", port)
        source = client.peername[0] if client.peername else ""
        shown = self.identity.of_connection(source, listener.agent)
        self.peers[client.id] = peer = Peer(client, listener, shown)
        if arrival:
            peer.shown, peer.redirected = (*arrival.shown, *shown), arrival.redirected
        self.runtime.metrics.connection(listener.address, 1)
        self.strangers.add(source, client.id, lambda: self.abort(client))

    def enter_tunnel(self, client: connection.Client, tunnel: Tunnel) -> None:
        """A connection that was handed over is in a tunnel already, and counts as its agent's."""
        peer = self.peers[client.id]
        peer.tunnel = tunnel
        self._belongs(peer, tunnel.agent_id)

    def _belongs(self, peer: Peer, agent_id: str) -> None:
        self.by_agent[agent_id].add(peer.client.id)
        peer.agents.add(agent_id)
        self.strangers.remove(peer.client.peername[0] if peer.client.peername else "", peer.client.id)

    @guarded(_cut_client)
    def client_disconnected(self, client: connection.Client) -> None:
        """Record what was still open, and forget the connection."""
        peer = self.peers.pop(client.id, None)
        if peer is None:
            return
        self.strangers.remove(client.peername[0] if client.peername else "", client.id)
        for agent in peer.agents:
            self.by_agent[agent].discard(client.id)
            if not self.by_agent[agent]:
                del self.by_agent[agent]
        self.runtime.metrics.connection(peer.listener.address, -1)
        if peer.replay:
            self.runtime.finish(peer.replay.state)
        for flow in list(peer.open.values()):
            self._record(flow)

    @guarded(_cut_layer)
    def next_layer(self, data: layer.NextLayer) -> None:
        """HTTP on the listener, TLS and nothing else after CONNECT, HTTP inside the TLS."""
        context = data.context
        above = context.layers[-1] if context.layers else None
        redirected = isinstance(above, HttpProxy)  # it may begin with either
        start: bytes = data.data_client()  # type: ignore[no-untyped-call]
        tunnel = isinstance(above, http_layers.HttpStream)
        if (tunnel or redirected) and net_tls.starts_like_tls_record(start):
            passing = redirected or self.may_pass(context.client)
            data.layer = self._passage(context, start) if passing else ClientTls(context)
        elif (tunnel or redirected) and len(start) < 3 and b"\x16\x03".startswith(start[:2]):
            data.layer = None  # more must come before it can be told
        elif tunnel:
            self.refuse_tunnel(context.client)
            data.layer = Refuse(context)
        else:
            inside = isinstance(above, ClientTLSLayer)
            mode = http_layers.HTTPMode.transparent if inside else http_layers.HTTPMode.regular
            data.layer = self.peers[context.client.id].http = self.http_layer(context, mode)

    def _passage(self, context: Any, start: bytes) -> layer.Layer | None:
        """What follows a ClientHello in a tunnel that may be passed through; None until all of it is there."""
        try:
            hello = parse_client_hello(start)
            if hello is None:
                return None
        except ValueError:
            hello = None
        if hello and not self.tunnel_of(context.client) and not self.open_redirected(context.client, hello.server_name):
            return Refuse(context)
        if not self.may_pass(context.client):
            return ClientTls(context)
        try:
            passage = self.pass_through(context.client, hello)
        except Refused:
            return Refuse(context)
        if passage is None:
            return ClientTls(context)
        context.server.address = passage[0].host, passage[0].port  # no CONNECT has said so to a redirected one's layers
        return RelayLayer(context, passage[0], lambda: self.passage_failed(context.client))

    def http_layer(self, context: Any, mode: http_layers.HTTPMode) -> HttpLayer:
        """The HTTP layer of a connection or tunnel."""
        limit = self.runtime.settings.limits.headers
        if context.client.alpn == b"h2":
            tunnel = self.tunnel_of(context.client)
            assert tunnel
            budget = self._frame_budget(tunnel.agent_id)
            return HttpLayer(context, mode, lambda inner: StrictServer2(inner, limit, budget, self.refuse_flood))
        return HttpLayer(context, mode, lambda inner: StrictServer(inner, limit, self.refuse_head))

    @guarded(_cut_tls)
    def tls_clienthello(self, data: ClientHelloData) -> None:
        """Whatever the server name, the CONNECT target is what is dialled; where none was sent, it is the target."""
        client = data.context.client
        if not self.tunnel_of(client) and not self.open_redirected(client, data.client_hello.sni):
            self.abort(client)
            return
        tunnel = self.tunnel_of(client)
        assert tunnel
        data.context.server.address = tunnel.host.name, tunnel.port
        data.context.server.tls = True
        data.context.server.sni = tunnel.host.name

    @guarded(_cut_tls)
    def tls_start_client(self, data: TlsData) -> None:
        """Show our certificate."""
        client = data.context.client
        data.ssl_conn = self.runtime.client_tls.connection(self.leaf(client, client.sni))

    @guarded(_cut_tls)
    def tls_start_server(self, data: TlsData) -> None:
        """The upstream must prove the name that was decided."""
        server = data.conn
        assert isinstance(server, connection.Server)
        dial = self.peers[data.context.client.id].dials[_address(server)]
        server.sni = dial.host.name
        http2 = data.context.client.alpn == b"h2"
        server.alpn_offers = [b"h2", b"http/1.1"] if http2 else [b"http/1.1"]
        data.ssl_conn = self.runtime.upstream_tls.connection(dial.host, http2=http2)

    @guarded(_cut_tls)
    def tls_failed_client(self, data: TlsData) -> None:
        """Put on record that a client did not take our certificate, or spoke no TLS that we do."""
        self.refuse_tunnel(data.context.client, Reason.CLIENT_TLS)

    @guarded(_cut_tls)
    def tls_failed_server(self, data: TlsData) -> None:
        """Remember why: the flow's answer says so."""
        peer = self.peers.get(data.context.client.id)
        dial = peer.dials.get(_address(data.conn)) if peer and isinstance(data.conn, connection.Server) else None
        if dial and dial.failure is None:
            dial.failure = Reason.UPSTREAM_TLS

    @guarded(_cut_server)
    async def server_connect(self, data: server_hooks.ServerConnectionHookData) -> None:
        """Only a decided upstream is dialled, at addresses that were checked."""
        data.server.error = "refused"  # until all of this has passed
        dial = self.peers[data.client.id].dials[_address(data.server)]
        dial.failure = None
        try:
            route = await self.upstream.route(dial.host, _address(data.server)[1], private=dial.private)
        except Refused as refused:
            dial.failure = refused.reason
            return
        PINNED.set(route)
        data.server.error = None

    @guarded(_cut_server)
    def server_connect_error(self, data: server_hooks.ServerConnectionHookData) -> None:
        """A dial that failed after its addresses were found."""
        peer = self.peers.get(data.client.id)
        dial = peer.dials.get(_address(data.server)) if peer else None
        if dial and dial.failure is None:
            dial.failure = Reason.UPSTREAM_UNREACHABLE

    def tcp_start(self, flow: Any) -> None:
        """Nothing leaves as raw TCP or UDP."""
        flow.kill()

    udp_start = dns_request = tcp_start

    # Requests

    @guarded(_refuse_flow)
    def http_connect(self, flow: http.HTTPFlow) -> None:
        """Identify; refuse here what cannot be answered inside, before any upstream byte (contract section 6)."""
        peer = self.peers[flow.client_conn.id]
        exchange = self._begin(flow, peer)
        exchange.method = "CONNECT"
        try:
            if peer.redirected:
                raise Refused(Reason.PROTOCOL_NOT_ALLOWED, "This listener takes redirected connections only.")
            target = flow.request.data.authority.decode("latin-1") or f"{flow.request.host}:{flow.request.port}"
            host, port = _connect_target(state_of(flow).authority or target, flow)
            exchange.scheme, exchange.host, exchange.port = "https", host.name, port
            identified = self._identify(flow, peer)
            exchange.agent, exchange.identity = identified.agent, identified.proofs
            self._admit(peer, identified)
            policy = self.gateway.policy()
            if port not in (policy.tls_ports if policy else {443}):
                raise Refused(Reason.NO_RULE)
            if self.runtime.agent_authorities:
                _vouch(policy, identified, host)
            assert identified.agent
            if self._mints_too_many(identified.agent.id, host):
                self.runtime.metrics.limit_exceeded(identified.agent.id, "", "certificates")
                raise Refused(Reason.LIMIT_EXCEEDED, ": it asked for too many new hosts")
        except Refused as refused:
            self.refuse(flow, refused)
            self._record(flow)
            return
        assert identified.agent
        peer.tunnel = Tunnel(host, port, identified.agent.id, identified.proofs, identified.told)
        flow.request.data.host, flow.request.data.port = host.name, port
        state_of(flow).recorded = True  # its requests are
        peer.open.pop(id(flow), None)
        if policy and policy.passthrough:
            peer.connect = flow

    @guarded(_refuse_flow)
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

    def stop_body(self, flow: http.HTTPFlow, refused: Refused) -> Refused:
        """Note why the body that is on its way upstream is stopped there; where no answer has begun, that is told."""
        state, exchange = state_of(flow), state_of(flow).exchange
        assert exchange
        state.stopped = refused
        if isinstance(refused, Leaked):
            exchange.leak = refused.what
        exchange.allowed, exchange.reason = False, refused.reason
        return refused

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

    @guarded(_refuse_flow)
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

    # Responses

    @guarded(_cut_flow)
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

    @guarded(_cut_flow)
    def response(self, flow: http.HTTPFlow) -> None:
        """The exchange is over, unless a WebSocket begins."""
        flows.clean_response_trailers(flow, state_of(flow).redactor)
        if not flow.websocket:
            self._record(flow)

    @guarded(_cut_flow)
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

    @guarded(_cut_flow)
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

    @guarded(_cut_flow)
    def websocket_end(self, flow: http.HTTPFlow) -> None:
        """The exchange of a WebSocket is over."""
        self._record(flow)

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

    # For drivers

    def tunnel_of(self, client: connection.Client | None) -> Tunnel | None:
        """What the CONNECT of a connection fixed."""
        peer = self.peers.get(client.id) if client else None
        return peer.tunnel if peer else None

    def leaf(self, client: connection.Client, server_name: str | None) -> Leaf:
        """The certificate to show in a tunnel."""
        host, tunnel = self.certificate_host(client, server_name), self.tunnel_of(client)
        assert tunnel
        if host != tunnel.host and self._mints_too_many(tunnel.agent_id, host):
            host = tunnel.host  # a wrong name either way: only then the client cannot read the refusal
        return self.runtime.leaf(tunnel.agent_id, host)

    def _mints_too_many(self, agent_id: str, host: Host) -> bool:
        """Whether a certificate for `host` would be one too many for an agent: making one costs as much as some
        requests, and pushes another out of the cache."""
        return not self.runtime.has_leaf(agent_id, host) and self._mints.too_many(agent_id, time.monotonic())

    def certificate_host(self, client: connection.Client, server_name: str | None) -> Host:
        """Whose certificate to show. The server name must be the CONNECT target; with another one the client gets that
        one's certificate and nothing but refusals, which it can then read."""
        peer = self.peers[client.id]
        assert peer.tunnel
        host = peer.tunnel.host
        peer.sni_mismatch = not _names(server_name, host)
        if peer.sni_mismatch:
            with contextlib.suppress(ValueError):
                host = Host.parse(server_name or "")
        return host

    def may_pass(self, client: connection.Client | None) -> bool:
        """Whether some rule passes tunnels through, so that `pass_through` must be asked about this one."""
        peer = self.peers.get(client.id) if client else None
        return peer is not None and peer.connect is not None

    def pass_through(self, client: connection.Client, hello: ClientHello | None) -> tuple[Exchange, Dial] | None:
        """The exchange that a tunnel is when it is passed through unread, and where to; None: it is intercepted.

        Raises Refused, which is on record, for a tunnel that is to be passed through and does not show where it leads.
        """
        peer, policy = self.peers[client.id], self.gateway.policy()
        tunnel, flow = peer.tunnel, peer.connect
        agent = self.runtime.registry.by_id(tunnel.agent_id) if tunnel else None
        if not (policy and tunnel and flow and agent) or agent.expired(self.runtime.clock()):
            return None
        rule = passes(policy, agent, tunnel.host, tunnel.port)
        if rule is None:
            return None
        state = state_of(flow)
        exchange = state.exchange
        assert exchange
        state.recorded, peer.open[id(flow)] = False, flow
        exchange.rule, exchange.rule_at, exchange.policy = rule.name, rule.at, policy.digest
        if reason := objection(hello, tunnel.host):
            exchange.reason, exchange.status = reason, reason.status
            self._record(flow)
            raise Refused(reason)
        exchange.allowed, exchange.reason, exchange.status = True, Reason.ALLOWED, 200
        dial = peer.dials[tunnel.host.name, tunnel.port] = Dial(tunnel.host, rule.private)
        return exchange, dial

    def passage_failed(self, client: connection.Client, reason: Reason | None = None) -> None:
        """No upstream for a tunnel that is passed through: there is no way to tell the client but to hang up."""
        peer = self.peers.get(client.id)
        exchange = state_of(peer.connect).exchange if peer and peer.connect else None
        if peer and peer.tunnel and exchange:
            dial = peer.dials.get((peer.tunnel.host.name, peer.tunnel.port))
            exchange.reason = reason or (dial.failure if dial else None) or Reason.UPSTREAM_UNREACHABLE
            exchange.allowed = exchange.reason not in (Reason.PRIVATE_ADDRESS, Reason.INTERNAL)
            exchange.status = exchange.reason.status

    def is_mismatched(self, client: connection.Client | None) -> bool:
        """Whether the TLS of a connection named another host than its CONNECT."""
        peer = self.peers.get(client.id) if client else None
        return peer is not None and peer.sni_mismatch

    def dial_of(self, flow: http.HTTPFlow) -> Dial:
        """Where a decided flow goes."""
        return self.peers[flow.client_conn.id].dials[flow.request.data.host, flow.request.data.port]

    @staticmethod
    def wants_close(flow: http.HTTPFlow) -> bool:
        """Whether the client asked for the connection to be closed."""
        return state_of(flow).close

    # Shared steps

    def refuse(self, flow: http.HTTPFlow, refused: Refused) -> None:
        """Answer `flow` with a refusal."""
        state = state_of(flow)
        exchange = state.exchange
        if exchange is None:
            peer = self.peers.get(flow.client_conn.id) or Peer(flow.client_conn, Listener("", "", 0))
            exchange = self._begin(flow, peer)
        exchange.allowed, exchange.reason = False, refused.reason
        view = state.view
        if isinstance(refused, Leaked):
            exchange.leak = refused.what
        if view and self.runtime.leaks.hides(view, refused):
            exchange.host, exchange.path, view = HIDDEN, f"/{HIDDEN}", None
        if refused.limit and refused.rule:
            self.runtime.metrics.limit_exceeded(exchange.agent_id, refused.rule.name, refused.limit)
        exchange.status = refused.reason.status
        exchange.injected, state.decided, state.answered = (), False, True
        state.close = state.close or (self.draining and not flow.request.is_http2)
        flow.request.stream = False
        flow.response = flows.refusal(refused, exchange, view)
        if flow.request.method == "CONNECT":
            flow.response.headers["connection"] = "close"  # or tunnel data would be read as a new request

    def refuse_head(self, client: connection.Client, problem: str) -> bytes:
        """The whole answer to bytes that are no request; recorded like one."""
        peer = self.peers[client.id]
        exchange = self._exchange(peer)
        refused = Refused(Reason.AMBIGUOUS_REQUEST, problem)
        exchange.reason, exchange.status = refused.reason, refused.reason.status
        if peer.tunnel:
            exchange.agent = self.runtime.registry.by_id(peer.tunnel.agent_id)
            exchange.host, exchange.port, exchange.scheme = peer.tunnel.host.name, peer.tunnel.port, "https"
        response = flows.refusal(refused, exchange, None)
        response.headers["connection"] = "close"
        self.runtime.record(exchange)
        head = b"".join(b"%s: %s\r\n" % pair for pair in response.headers.fields)
        return b"HTTP/1.1 400 Bad Request\r\n" + head + b"\r\n" + (response.raw_content or b"")

    def refuse_tunnel(self, client: connection.Client, reason: Reason = Reason.PROTOCOL_NOT_ALLOWED) -> None:
        """Record that no TLS followed a CONNECT, or none that came about."""
        self._cut_short(client, "CONNECT", reason)

    def refuse_flood(self, client: connection.Client) -> None:
        """Record that a client was cut off for flooding its HTTP/2 connection."""
        agent = self._cut_short(client, "", Reason.LIMIT_EXCEEDED)
        self.runtime.metrics.limit_exceeded(agent, "", "http2")

    def _cut_short(self, client: connection.Client, method: str, reason: Reason) -> str:
        peer = self.peers[client.id]
        exchange = self._exchange(peer)
        exchange.method, exchange.reason, exchange.status = method, reason, reason.status
        if peer.tunnel:
            exchange.agent, exchange.identity = self.runtime.registry.by_id(peer.tunnel.agent_id), peer.tunnel.proofs
            exchange.host, exchange.port, exchange.scheme = peer.tunnel.host.name, peer.tunnel.port, "https"
        self.runtime.record(exchange)
        return exchange.agent_id

    def open_redirected(self, client: connection.Client, server_name: str | None) -> bool:
        """Take the server name of a transparent client for a CONNECT; where there is none it is refused."""
        peer = self.peers[client.id]
        if not peer.redirected:
            raise RuntimeError("TLS without a CONNECT")
        registry = self.runtime.registry
        found = self.identity.identify((), peer.shown, self.runtime.clock()) if registry.loaded else Identified()
        exchange = self._exchange(peer)
        exchange.agent, exchange.identity, exchange.method = found.agent, found.proofs, "CONNECT"
        exchange.scheme, exchange.port = "https", peer.redirected
        try:
            peer.tunnel = tunnel_to(peer, server_name, found)
            exchange.host, policy = peer.tunnel.host.name, self.gateway.policy()
            if self.runtime.agent_authorities and found.agent:
                _vouch(policy, found, peer.tunnel.host)
            if policy and policy.passthrough and found.agent:
                self._admit(peer, found)
                peer.connect = connect_flow(client, exchange)
        except Refused as refused:
            exchange.reason, exchange.status = refused.reason, refused.reason.status
            self.runtime.record(exchange)
            return False
        return True

    def _exchange(self, peer: Peer) -> Exchange:
        now = self.runtime.clock()
        return Exchange(ulid(now), now, peer.listener.address, peer.address)

    def _begin(self, flow: http.HTTPFlow, peer: Peer) -> Exchange:
        state = state_of(flow)
        state.exchange = self._exchange(peer)
        state.sent_at = time.perf_counter()
        peer.open[id(flow)] = flow
        return state.exchange

    def _describe(self, flow: http.HTTPFlow, peer: Peer, exchange: Exchange) -> None:
        """What is known before the request is parsed, for refusals that come earlier."""
        exchange.method = flow.request.method[:32]
        if peer.tunnel:
            exchange.scheme, exchange.host, exchange.port = "https", peer.tunnel.host.name, peer.tunnel.port
        else:
            exchange.scheme, exchange.host, exchange.port = flow.request.scheme, flow.request.host, flow.request.port

    def _identify(self, flow: http.HTTPFlow, peer: Peer) -> Identified:
        """The tunnel's agent, or the one this request proves."""
        registry, now = self.runtime.registry, self.runtime.clock()
        if not registry.loaded:
            raise Refused(Reason.STORE_UNAVAILABLE)
        if peer.tunnel and peer.tunnel.agent_id:
            agent = registry.by_id(peer.tunnel.agent_id)
            if agent is None or agent.expired(now):
                return Identified(reason=Reason.BAD_IDENTITY)
            told = peer.tunnel.told
            return Identified(told.about(agent) if told else agent, peer.tunnel.proofs, Reason.ALLOWED)
        proofs = flows.proxy_authorization(flow)
        identified = self.identity.identify([] if peer.tunnel else proofs, peer.shown, now)  # in a tunnel not for us
        source = peer.client.peername[0] if peer.client.peername else ""
        if identified.agent is None and proofs and self._guesses.too_many(source, time.monotonic()):
            self.runtime.metrics.limit_exceeded("", "", "identity")
            raise Refused(Reason.LIMIT_EXCEEDED)
        return identified

    def _admit(self, peer: Peer, identified: Identified) -> None:
        agent = identified.agent
        if agent is None:
            raise Refused(identified.reason)
        connections = self.by_agent[agent.id]
        if peer.client.id not in connections:
            there = len(connections) + self.elsewhere.get(agent.id, 0)
            if there >= self.runtime.settings.limits.connections_per_agent:
                self.runtime.metrics.limit_exceeded(agent.id, "", "connections")
                raise Refused(Reason.LIMIT_EXCEEDED, ": it has too many connections")
            self._belongs(peer, agent.id)

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

    def _record(self, flow: http.HTTPFlow) -> None:
        """Exactly once, last."""
        state = state_of(flow)
        peer = self.peers.get(flow.client_conn.id)
        if peer:
            peer.open.pop(id(flow), None)
        if state.exchange and flow.response:
            if not state.exchange.status:
                state.exchange.status = flow.response.status_code
            if state.answered:
                state.exchange.response_bytes = len(flow.response.raw_content or b"")
        self.runtime.finish(state)


def _replacer(secrets: tuple[tuple[str, frozenset[bytes]], ...]) -> Replacer | None:
    """One for all places that the same secrets go to."""
    return secret_replacer(dict(secrets)) if secrets else None


def _vouch(policy: Policy | None, identified: Identified, host: Host) -> None:
    """A CA of an agent's own is gone with the agent, and limited to the hosts its rules name: what it does not vouch
    for cannot be answered inside the tunnel."""
    agent = identified.agent
    if agent is None or agent.state is not AgentState.ACTIVE:
        raise Refused(Reason.AGENT_KILLED)
    if policy is None or not any(rule.may_allow(agent) for rule in policy.candidates(host)):
        raise Refused(Reason.NO_RULE)


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


def _address(server: connection.Server) -> tuple[str, int]:
    assert server.address
    return server.address[0], server.address[1]


def _names(sni: str | None, host: Host) -> bool:
    if not sni:
        return True
    try:
        return Host.parse(sni) == host
    except ValueError:
        return False


def _connect_target(authority: str, flow: http.HTTPFlow) -> tuple[Host, int]:
    try:
        host, port = parse_authority(authority)
        for value in flow.request.headers.get_all("host"):
            if value.strip() and not _agrees(value.strip(), host, port):
                raise Refused(Reason.AUTHORITY_MISMATCH)
    except ValueError:
        raise Refused(Reason.AMBIGUOUS_REQUEST, "its target is not a host and port") from None
    return host, port


def _agrees(text: str, host: Host, port: int) -> bool:
    if text.rpartition(":")[2].isdigit() and not text.endswith("]"):
        return parse_authority(text) == (host, port)
    return Host.parse(text) == host


@functools.cache
def _script() -> list[object]:
    from proxy.script import Script

    return [Script()]


def __getattr__(name: str) -> object:
    """`addons`, which mitmproxy asks this file for when it is loaded as a script."""
    if name == "addons":
        return _script()
    raise AttributeError(name)
