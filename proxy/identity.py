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
from proxy.proof import Proof, Told
from proxy.reason import Reason

type Network = IPv4Network | IPv6Network


class Agents(Protocol):
    """What identifying needs of the registry."""

    def by_token(self, token: str) -> Agent | None:
        """Whose token this is."""

    def by_id(self, agent_id: str) -> Agent | None:
        """The agent of that id."""


class Issuer(Protocol):
    """Somebody whose signed tokens are accepted; false while it has no key."""

    def __bool__(self) -> bool:
        """Whether any token could be accepted."""

    def verify(self, token: str, now: float) -> Proof | None:
        """What a token proves at `now` (Unix seconds); None: nothing."""


@dataclass(frozen=True, slots=True)
class Identified:
    """An agent and the proofs that named it, or why there is none. `told` is what a proof added to the agent."""

    agent: Agent | None = None
    proofs: tuple[str, ...] = ()
    reason: Reason = Reason.NO_IDENTITY
    told: Told | None = None


class Identity:
    """The accepted proofs. `networks` maps source networks to agents; the most specific one counts."""

    def __init__(
        self, agents: Agents, *, token: bool, networks: Mapping[Network, str], issuers: Sequence[Issuer] = ()
    ) -> None:
        self.agents = agents
        self.token = token
        self.issuers = issuers
        self.networks: Sequence[tuple[Network, str]] = sorted(networks.items(), key=lambda item: -item[0].prefixlen)

    def of_connection(self, source: str, listener_agent: str | None) -> tuple[Proof, ...]:
        """What a connection from this address to this listener proves for all its requests."""
        found = []
        if by_network := self._network(source):
            found.append(Proof("network", by_network))
        if listener_agent:
            found.append(Proof("listener", listener_agent))
        return tuple(found)

    def identify(self, authorization: Iterable[str], shown: Sequence[Proof], now: float) -> Identified:
        """The agent of a request with these Proxy-Authorization values, on a connection that has `shown` these proofs,
        at `now` (Unix seconds)."""
        names: list[str] = []
        agents: list[Agent | None] = []
        told: Told | None = None
        for value in authorization:
            name, token = _credentials(value)
            agent = None
            if self.token and (agent := self.agents.by_token(token)):
                names.append("token")
            elif proof := next((proof for issuer in self.issuers if (proof := issuer.verify(token, now))), None):
                agent, told = self._agent(proof, now), told or proof.told
                names.append(proof.name)
            elif not self.token and not any(self.issuers):
                continue  # no proof that is accepted stands in this header
            agents.append(agent)
            if agent and name and name != agent.id:
                return Identified(reason=Reason.IDENTITY_CONFLICT)
        for proof in shown:
            agents.append(self._agent(proof, now))
            names.append(proof.name)
            told = told or proof.told
        return self._agreed(agents, names, told, now)

    def _agent(self, proof: Proof, now: float) -> Agent | None:
        return self.agents.by_id(proof.agent) if now < proof.expires else None

    def _network(self, source: str) -> str | None:
        address = ip_literal(source.partition("%")[0]) if self.networks else None
        if address is None:
            return None
        address = getattr(address, "ipv4_mapped", None) or address
        return next((agent for network, agent in self.networks if address in network), None)

    @staticmethod
    def _agreed(found: Sequence[Agent | None], names: Sequence[str], told: Told | None, now: float) -> Identified:
        if not found:
            return Identified()
        agents = [agent for agent in found if agent and not agent.expired(now)]
        if len(agents) < len(found):
            return Identified(reason=Reason.BAD_IDENTITY)
        if len({agent.id for agent in agents}) > 1:
            return Identified(reason=Reason.IDENTITY_CONFLICT)
        agent = told.about(agents[0]) if told else agents[0]
        return Identified(agent, tuple(dict.fromkeys(names)), Reason.ALLOWED, told)


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
