"""Ends what an agent still has open when it may act no more: tunnels, streams and WebSockets, on both lanes."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from proxy.addon import Addon
from proxy.agent import AgentState
from proxy.flow import FlowState, state_of
from proxy.guard import where
from proxy.peer import Peer
from proxy.reason import Reason

_log = logging.getLogger("sallyport")


def cut_ended(addon: Addon, revoked: frozenset[str]) -> None:
    """Cut every connection that is at work for an agent which was killed, removed, or `revoked` its token."""
    ended = _Ended(addon, revoked)
    why: Reason | bool | None
    for peer in list(addon.peers.values()):
        if peer.tunnel:
            why = ended.why(peer.tunnel.agent_id, peer.tunnel.proofs)
            working = [(state, why) for state in _states(peer)] if why else []
        else:
            working = list(_working(peer, ended))
            idle = bool(peer.agents) and not peer.open
            why = working[0][1] if working else idle and all(ended.why(name, ()) for name in peer.agents)
        try:
            for state, reason in working:
                _record(addon, state, reason)
        except Exception as error:  # what cannot be put on record is cut all the same, and so are the others
            _log.error("a cut exchange could not be recorded: %s", where(error))
        if why:
            addon.abort(peer.client)


class _Ended:
    """Tells whose right to act has ended, and why."""

    def __init__(self, addon: Addon, revoked: frozenset[str]) -> None:
        self._by_id = addon.runtime.registry.by_id
        self._revoked = revoked

    def why(self, agent_id: str, proofs: tuple[str, ...]) -> Reason | None:
        """The reason, or None."""
        agent = self._by_id(agent_id)
        if agent and agent.state is not AgentState.ACTIVE:
            return Reason.AGENT_KILLED
        return Reason.BAD_IDENTITY if agent is None or ("token" in proofs and agent_id in self._revoked) else None


def _states(peer: Peer) -> list[FlowState]:
    """What a connection is at work with."""
    return [*map(state_of, peer.open.values()), *([peer.replay.state] if peer.replay else [])]


def _working(peer: Peer, ended: _Ended) -> Iterator[tuple[FlowState, Reason]]:
    """The exchanges of a connection that many agents may share, as far as their agent's right has ended."""
    for state in _states(peer):
        exchange = state.exchange
        if exchange and exchange.agent and (why := ended.why(exchange.agent.id, tuple(exchange.identity))):
            yield state, why


def _record(addon: Addon, state: FlowState, reason: Reason) -> None:
    """Put a cut exchange on record as it is now: its own object may still change while it ends."""
    exchange = state.exchange
    if exchange is None or state.recorded:
        return
    state.recorded = state.client_gone = exchange.ended = True
    if state.response_body:
        exchange.count_redacted(state.response_body.found, "body")
    addon.runtime.record(
        replace(
            exchange,
            allowed=False,
            reason=reason,
            injected=list(exchange.injected),
            redacted=Counter(exchange.redacted),
            duration=max(0.0, addon.runtime.clock() - exchange.time),
        )
    )
