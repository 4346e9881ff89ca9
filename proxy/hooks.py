"""What all hooks of the addon share: who is connected, who is asking, refusing, and putting on record."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from mitmproxy import connection, http
from mitmproxy.proxy import layer, server_hooks
from mitmproxy.tls import ClientHelloData, TlsData

from proxy import flow as flows
from proxy.arrival import Arrival
from proxy.exchange import Exchange
from proxy.flow import Tunnel, state_of
from proxy.frames import FrameBudget
from proxy.gateway import Gateway
from proxy.guesses import Guesses
from proxy.identity import Identified, Identity
from proxy.layers import Refuse
from proxy.leakguard import HIDDEN, Leaked
from proxy.peer import Dial, Peer, ulid
from proxy.reason import Reason
from proxy.replay import Replays
from proxy.settingvalue import Listener
from proxy.strangers import Strangers
from proxy.upstream import Refused, Upstream

if TYPE_CHECKING:
    from proxy.runtime import Runtime


def refuse_flow(addon: Hooks, flow: http.HTTPFlow) -> None:
    """Refuse a request, or cut it where that is too late."""
    if state_of(flow).streamed:
        cut_flow(addon, flow)
    else:
        addon.refuse(flow, Refused(Reason.INTERNAL))


def cut_flow(addon: Hooks, flow: http.HTTPFlow) -> None:
    """Cut a request's connection, and let nothing of it through."""
    exchange = state_of(flow).exchange
    if exchange:
        exchange.allowed, exchange.reason = False, Reason.INTERNAL
    for message in flow.websocket.messages if flow.websocket else ():
        message.drop()  # type: ignore[no-untyped-call]
    addon.abort(flow.client_conn)


def cut_client(addon: Hooks, client: connection.Client) -> None:
    """Cut a client."""
    client.error = "refused"
    addon.abort(client)


def cut_layer(addon: Hooks, data: layer.NextLayer) -> None:
    """Let no layer of mitmproxy's follow."""
    data.layer = Refuse(data.context)


def cut_tls(addon: Hooks, data: TlsData | ClientHelloData) -> None:
    """Cut a client whose TLS was about to begin."""
    addon.abort(data.context.client)


def cut_server(addon: Hooks, data: server_hooks.ServerConnectionHookData) -> None:
    """Dial no upstream."""
    data.server.error = "refused"
    peer = addon.peers.get(data.client.id)
    dial = peer.dials.get(address_of(data.server)) if peer else None
    if dial:
        dial.failure = Reason.INTERNAL


def address_of(server: connection.Server) -> tuple[str, int]:
    """Where an upstream is to be dialled."""
    assert server.address
    return server.address[0], server.address[1]


class Hooks:
    """`abort` cuts a client connection; the driver sets it."""

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
        self.replays = Replays(self)
        runtime.on_leases = self.replays.forget
        self._frame_budget = functools.lru_cache(maxsize=4096)(lambda _agent: FrameBudget())

    def enter_tunnel(self, client: connection.Client, tunnel: Tunnel) -> None:
        """A connection that was handed over is in a tunnel already, and counts as its agent's."""
        peer = self.peers[client.id]
        peer.tunnel = tunnel
        self._belongs(peer, tunnel.agent_id)

    def _belongs(self, peer: Peer, agent_id: str) -> None:
        self.by_agent[agent_id].add(peer.client.id)
        peer.agents.add(agent_id)
        self.strangers.remove(peer.client.peername[0] if peer.client.peername else "", peer.client.id)

    def tunnel_of(self, client: connection.Client | None) -> Tunnel | None:
        """What the CONNECT of a connection fixed."""
        peer = self.peers.get(client.id) if client else None
        return peer.tunnel if peer else None

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

    def stop_body(self, flow: http.HTTPFlow, refused: Refused) -> Refused:
        """Note why the body that is on its way upstream is stopped there; where no answer has begun, that is told."""
        state, exchange = state_of(flow), state_of(flow).exchange
        assert exchange
        state.stopped = refused
        if isinstance(refused, Leaked):
            exchange.leak = refused.what
        exchange.allowed, exchange.reason = False, refused.reason
        return refused

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
