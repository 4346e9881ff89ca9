"""Who is asking: every proof a request shows must name the same registered agent, or it is refused."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Protocol

from proxy.address import ip_literal
from proxy.agent import Agent
from proxy.reason import Reason

type Network = IPv4Network | IPv6Network


class Agents(Protocol):
    """What identifying needs of the registry."""

    def by_token(self, token: str) -> Agent | None:
        """Whose token this is."""

    def by_id(self, agent_id: str) -> Agent | None:
        """The agent of that id."""


@dataclass(frozen=True, slots=True)
class Identified:
    """An agent and the proofs that named it, or why there is none."""

    agent: Agent | None = None
    proofs: tuple[str, ...] = ()
    reason: Reason = Reason.NO_IDENTITY


class Identity:
    """The accepted proofs. `networks` maps source networks to agents; the most specific one counts."""

    def __init__(self, agents: Agents, *, token: bool, networks: Mapping[Network, str]) -> None:
        self.agents = agents
        self.token = token
        self.networks: Sequence[tuple[Network, str]] = sorted(networks.items(), key=lambda item: -item[0].prefixlen)

    def identify(self, authorization: Iterable[str], source: str, listener_agent: str | None, now: float) -> Identified:
        """The agent of a request with these Proxy-Authorization values, from this address, at `now` (Unix seconds)."""
        found: list[tuple[str, Agent | None]] = []
        if self.token:
            for value in authorization:
                name, token = _credentials(value)
                agent = self.agents.by_token(token)
                found.append(("token", agent))
                if agent and name and name != agent.id:
                    return Identified(reason=Reason.IDENTITY_CONFLICT)
        if by_network := self._network(source):
            found.append(("network", self.agents.by_id(by_network)))
        if listener_agent:
            found.append(("listener", self.agents.by_id(listener_agent)))
        return self._agreed(found, now)

    def _network(self, source: str) -> str | None:
        address = ip_literal(source.partition("%")[0]) if self.networks else None
        if address is None:
            return None
        address = getattr(address, "ipv4_mapped", None) or address
        return next((agent for network, agent in self.networks if address in network), None)

    @staticmethod
    def _agreed(found: Sequence[tuple[str, Agent | None]], now: float) -> Identified:
        if not found:
            return Identified()
        agents = [agent for _, agent in found if agent and not agent.expired(now)]
        if len(agents) < len(found):
            return Identified(reason=Reason.BAD_IDENTITY)
        if len({agent.id for agent in agents}) > 1:
            return Identified(reason=Reason.IDENTITY_CONFLICT)
        return Identified(agents[0], tuple(dict.fromkeys(proof for proof, _ in found)), Reason.ALLOWED)


def _credentials(value: str) -> tuple[str, str]:
    """The user name (empty for Bearer, RFC 6750) and the token; both empty where the header is neither."""
    scheme, _, rest = value.strip().partition(" ")
    if scheme.lower() == "bearer":
        return "", rest.strip()
    if scheme.lower() != "basic":
        return "", ""
    try:
        name, _, token = base64.b64decode(rest.strip(), validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        return "", ""
    return name, token
