"""Which connections are passed through unread, for clients that accept no CA but their own. Pure."""

from __future__ import annotations

from proxy.address import Host
from proxy.agent import Agent, AgentState
from proxy.clienthello import ClientHello
from proxy.policy import Policy, Rule, Verdict
from proxy.reason import Reason


def passes(policy: Policy, agent: Agent, host: Host, port: int) -> Rule | None:
    """The rule that passes a tunnel of `agent` through, or None: then it is intercepted and each request decided.

    Only what is known of a tunnel counts. A block rule that some request in it could match wins; otherwise the first
    allow rule, and where that one has to read the requests, they are read.
    """
    if agent.state is not AgentState.ACTIVE:
        return None
    first: Rule | None = None
    for rule in policy.candidates(host):
        if _meets(rule, agent, port):
            if rule.action is Verdict.BLOCK:
                return None
            first = first or rule
    return first if first and first.passthrough else None


def _meets(rule: Rule, agent: Agent, port: int) -> bool:
    match = rule.match
    return (
        (not match.schemes or "https" in match.schemes)
        and not (match.own_port and port != 443)
        and (not match.ports or port in match.ports)
        and (not rule.agents or any(agents.matches(agent) for agents in rule.agents))
    )


def objection(hello: ClientHello | None, host: Host) -> Reason | None:
    """Why a tunnel to `host` that begins with `hello` is not passed through (None: it could not be read).

    An encrypted ClientHello hides the name that counts; one that only pretends to (GREASE) looks the same.
    """
    if hello is None:
        return Reason.AMBIGUOUS_REQUEST
    if hello.encrypted:
        return Reason.PROTOCOL_NOT_ALLOWED
    if hello.server_name is None:
        return None if host.ip else Reason.AUTHORITY_MISMATCH  # RFC 6066 section 3: no address stands there
    try:
        named = Host.parse(hello.server_name)
    except ValueError:
        return Reason.AUTHORITY_MISMATCH
    return None if named == host else Reason.AUTHORITY_MISMATCH
