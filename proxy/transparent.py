"""Connections that a firewall redirected to us: the name in them says where they go, and only the port is believed of
where they were going. What is decided about their requests is decided where it always is."""

from __future__ import annotations

from mitmproxy import connection, http

from proxy.address import Host, parse_authority
from proxy.exchange import Exchange
from proxy.flow import Tunnel, state_of
from proxy.identity import Identified
from proxy.peer import Peer
from proxy.reason import Reason
from proxy.request import Ambiguous
from proxy.upstream import Refused


def tunnel_to(peer: Peer, server_name: str | None, found: Identified) -> Tunnel:
    """As if the client had sent a CONNECT to what its ClientHello names. Whoever is not identified gets a tunnel of no
    agent, to be told so inside it.

    Raises Refused where nothing is named.
    """
    agent_id = found.agent.id if found.agent else ""
    try:
        return Tunnel(Host.parse(server_name or ""), peer.redirected, agent_id, found.proofs, found.told)
    except ValueError:
        raise Refused(Reason.AUTHORITY_MISMATCH) from None


def connect_flow(client: connection.Client, exchange: Exchange) -> http.HTTPFlow:
    """The CONNECT that was never sent, for a tunnel that is an exchange itself."""
    flow = http.HTTPFlow(client, connection.Server(address=None))
    flow.request = http.Request.make("CONNECT", f"https://{exchange.host}:{exchange.port}/")
    state = state_of(flow)
    state.exchange, state.recorded = exchange, True
    return flow


def name_target(flow: http.HTTPFlow, port: int) -> None:
    """Give a plain request the authority that its Host says; the port is the one that was dialled.

    Raises Ambiguous and Refused.
    """
    state = state_of(flow)
    if state.authority:  # it takes us for its proxy
        raise Refused(Reason.PROTOCOL_NOT_ALLOWED, "Here requests have no scheme and host in their first line.")
    hosts = [value for name, value in flow.request.data.headers.fields if name.lower() == b"host"]
    if not hosts:
        raise Ambiguous("it has no Host header")
    text = hosts[0].decode("latin-1").strip()
    if text.endswith("]") or not text.rpartition(":")[2].isdigit():
        text = f"{text.removesuffix(':')}:{port}"
    try:
        named = parse_authority(text)
    except ValueError:
        raise Ambiguous("its Host is not a host and port") from None
    if named[1] != port:
        raise Refused(Reason.AUTHORITY_MISMATCH)
    state.scheme, state.authority = "http", text
