"""The policy enforcement point: a request from identity to what is sent or refused. Knows no wire and no mitmproxy."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from proxy.agent import Agent
from proxy.exchange import Exchange
from proxy.outbound import InjectionError, Opened, Outbound, inject
from proxy.plan import Plan, make_plan
from proxy.policy import Answer, Edit, Policy, Rule
from proxy.reason import Reason
from proxy.request import RequestView
from proxy.upstream import Refused
from proxy.vault import CredentialScope, CredentialUnavailable, Vault


@dataclass(frozen=True, slots=True)
class Approved:
    """What may happen: `answer` is given here, or `outbound` is sent. `rules` are those whose obligations hold."""

    outbound: Outbound
    rules: tuple[Rule, ...]
    answer: Answer | None = None

    @property
    def private(self) -> bool:
        """Whether a rule narrows the upstream to private addresses."""
        return any(rule.private for rule in self.rules)

    @property
    def response_edits(self) -> tuple[Edit, ...]:
        """Changes to the response's headers."""
        return tuple(rule.response_headers for rule in self.rules if rule.response_headers)


class Gateway:
    """Decides and meets obligations; every way out but `Approved` raises Refused."""

    def __init__(self, policy: Callable[[], Policy | None], clock: Callable[[], float]) -> None:
        self.policy = policy
        self.vault: Vault | None = None
        self.clock = clock

    async def approve(self, agent: Agent, view: RequestView, exchange: Exchange) -> Approved:
        """What is done with `view` for `agent`; fills in the exchange.

        Raises Refused.
        """
        started = time.perf_counter()
        try:
            policy = self.policy()
            if policy is None:
                raise Refused(Reason.POLICY_UNAVAILABLE)
            exchange.policy = policy.digest
            plan = self._plan(policy, agent, view, exchange)
        finally:
            exchange.decision_duration = time.perf_counter() - started
        outbound = Outbound(plan.view) if plan.answer else await self._inject(agent, Outbound(plan.view), plan.rules)
        exchange.rewritten = plan.view is not view
        exchange.injected = list(outbound.injected)
        exchange.allowed, exchange.reason = True, Reason.ALLOWED
        return Approved(outbound, plan.rules, plan.answer)

    @staticmethod
    def _plan(policy: Policy, agent: Agent, view: RequestView, exchange: Exchange) -> Plan:
        plan = make_plan(policy, agent, view)
        if plan.rule:
            exchange.rule, exchange.rule_at = plan.rule.name, plan.rule.at
        if not plan.decision.allowed:
            raise Refused(plan.decision.reason, plan.decision.detail, plan.decision)
        return plan

    async def _inject(self, agent: Agent, outbound: Outbound, rules: tuple[Rule, ...]) -> Outbound:
        for rule in rules:
            for injection in rule.inject:
                if self.vault is None:
                    raise Refused(Reason.CREDENTIAL_UNAVAILABLE)
                try:
                    lease = await self.vault.lease(injection.credential, agent, outbound.view, self.clock())
                    opened = Opened(lease.name, lease.version, lease.kind, lease.fields, lease.secret)
                    outbound = inject(outbound, injection, opened)
                except CredentialScope:
                    raise Refused(Reason.CREDENTIAL_SCOPE) from None
                except (CredentialUnavailable, InjectionError, KeyError):
                    raise Refused(Reason.CREDENTIAL_UNAVAILABLE) from None
        return outbound
