"""The hooks of connections: accepted, tunnelled, with TLS begun, passed through unread, dialled."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from mitmproxy import connection, http
from mitmproxy.net import tls as net_tls
from mitmproxy.proxy import layer, server_hooks
from mitmproxy.proxy.layers import http as http_layers
from mitmproxy.proxy.layers.modes import HttpProxy
from mitmproxy.proxy.layers.tls import ClientTLSLayer
from mitmproxy.tls import ClientHelloData, TlsData

from proxy.address import Host, parse_authority
from proxy.agent import AgentState
from proxy.ca import Leaf
from proxy.clienthello import ClientHello, parse_client_hello
from proxy.exchange import Exchange
from proxy.flow import Tunnel, state_of
from proxy.guard import guarded
from proxy.hooks import Hooks, address_of, cut_client, cut_layer, cut_server, cut_tls, refuse_flow
from proxy.identity import Identified
from proxy.layers import ClientTls, HttpLayer, Refuse
from proxy.passthrough import objection, passes
from proxy.peer import Dial, Peer
from proxy.policy import Policy
from proxy.reason import Reason
from proxy.relay import RelayLayer
from proxy.settingvalue import Listener
from proxy.strict1 import StrictServer
from proxy.strict2 import StrictServer2
from proxy.transparent import connect_flow, tunnel_to
from proxy.upstream import PINNED, Refused


class TunnelHooks(Hooks):
    """From a client's first byte to a request in it."""

    @guarded(cut_client)
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

    @guarded(cut_client)
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
        self.replays.end_of(peer)
        for flow in list(peer.open.values()):
            self._record(flow)

    @guarded(cut_layer)
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

    @guarded(cut_tls)
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

    @guarded(cut_tls)
    def tls_start_client(self, data: TlsData) -> None:
        """Show our certificate."""
        client = data.context.client
        data.ssl_conn = self.runtime.client_tls.connection(self.leaf(client, client.sni))

    @guarded(cut_tls)
    def tls_start_server(self, data: TlsData) -> None:
        """The upstream must prove the name that was decided."""
        server = data.conn
        assert isinstance(server, connection.Server)
        dial = self.peers[data.context.client.id].dials[address_of(server)]
        server.sni = dial.host.name
        http2 = data.context.client.alpn == b"h2"
        server.alpn_offers = [b"h2", b"http/1.1"] if http2 else [b"http/1.1"]
        data.ssl_conn = self.runtime.upstream_tls.connection(dial.host, http2=http2)

    @guarded(cut_tls)
    def tls_failed_client(self, data: TlsData) -> None:
        """Put on record that a client did not take our certificate, or spoke no TLS that we do."""
        self.refuse_tunnel(data.context.client, Reason.CLIENT_TLS)

    @guarded(cut_tls)
    def tls_failed_server(self, data: TlsData) -> None:
        """Remember why: the flow's answer says so."""
        peer = self.peers.get(data.context.client.id)
        dial = peer.dials.get(address_of(data.conn)) if peer and isinstance(data.conn, connection.Server) else None
        if dial and dial.failure is None:
            dial.failure = Reason.UPSTREAM_TLS

    @guarded(cut_server)
    async def server_connect(self, data: server_hooks.ServerConnectionHookData) -> None:
        """Only a decided upstream is dialled, at addresses that were checked."""
        data.server.error = "refused"  # until all of this has passed
        dial = self.peers[data.client.id].dials[address_of(data.server)]
        dial.failure = None
        try:
            route = await self.upstream.route(dial.host, address_of(data.server)[1], private=dial.private)
        except Refused as refused:
            dial.failure = refused.reason
            return
        PINNED.set(route)
        data.server.error = None

    @guarded(cut_server)
    def server_connect_error(self, data: server_hooks.ServerConnectionHookData) -> None:
        """A dial that failed after its addresses were found."""
        peer = self.peers.get(data.client.id)
        dial = peer.dials.get(address_of(data.server)) if peer else None
        if dial and dial.failure is None:
            dial.failure = Reason.UPSTREAM_UNREACHABLE

    def tcp_start(self, flow: Any) -> None:
        """Nothing leaves as raw TCP or UDP."""
        flow.kill()

    udp_start = dns_request = tcp_start

    @guarded(refuse_flow)
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


def _vouch(policy: Policy | None, identified: Identified, host: Host) -> None:
    """A CA of an agent's own is gone with the agent, and limited to the hosts its rules name: what it does not vouch
    for cannot be answered inside the tunnel."""
    agent = identified.agent
    if agent is None or agent.state is not AgentState.ACTIVE:
        raise Refused(Reason.AGENT_KILLED)
    if policy is None or not any(rule.may_allow(agent) for rule in policy.candidates(host)):
        raise Refused(Reason.NO_RULE)


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
