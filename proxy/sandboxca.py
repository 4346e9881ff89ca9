"""Which CA a sandbox of an agent trusts, and the files that tell its clients so."""

from __future__ import annotations

from proxy.agent import Agent, AgentState
from proxy.agentca import constraints_for, hosts_of, issue
from proxy.problem import UserError
from proxy.rotation import load_authority
from proxy.sandboxenv import Bundle, write_bundle
from proxy.settings import Settings
from proxy.snapshot import read_policy


def bundle_for(settings: Settings, agent: Agent) -> tuple[Bundle, list[str]]:
    """The bundle for an agent's sandbox, written, and what there is to say about it.

    Raises UserError, and Problems where its hosts cannot be told because the rules are broken.
    """
    if settings.ca == "shared":
        return write_bundle(settings.certs, load_authority(settings.certs).pem), []
    if agent.state is not AgentState.ACTIVE:
        raise UserError(f"agent {agent.id} is killed, and has no CA: `sallyport agent revive {agent.id}` first")
    hosts = hosts_of(read_policy(settings.rules)[0], agent)
    notes = [f"no rule allows {agent.id} any host; run this again when one does"] if hosts == () else []
    constraints = None if hosts is None else constraints_for(hosts)
    issued = issue(settings.certs, agent, constraints)
    return write_bundle(settings.certs / "bundles" / agent.id, issued.pem), notes
