"""The policy enforcement point: a request from identity to what is sent or refused. Knows no wire and no mitmproxy."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from proxy.agent import Agent
from proxy.audit import Audit
from proxy.bodymatch import Unseen
from proxy.exchange import Exchange
from proxy.limiter import Limiter
from proxy.outbound import InjectionError, Outbound, inject
from proxy.plan import Plan, make_plan
from proxy.policy import Answer, Edit, Policy, Rule, Verdict
from proxy.reason import Reason
from proxy.request import RequestView
from proxy.upstream import Refused
from proxy.vault import CredentialScope, CredentialUnavailable, Lease, Vault


@dataclass(frozen=True, slots=True)
class Approved:
    """What may happen: `answer` is given here, or `outbound` is sent. `rules` are those whose obligations hold;
    `private`: one of them narrows the upstream to private addresses; `scan`: one looks for keys by their form.
    `owner`: whose connection to the upstream it must be; nobody's is shared."""

    outbound: Outbound
    rules: tuple[Rule, ...]
    answer: Answer | None = None
    private: bool = False
    response_edits: tuple[Edit, ...] = ()
    body_limit: tuple[int, Rule] | None = None  # bytes of the request's body at most, and who says so
    scan: bool = False
    owner: str = ""


class Unready(Exception):
    """Something must be asked of the store first; after `Gateway.prepare` it can be decided again."""


class BodyWanted(Exception):
    """A rule must see the request's body: decide again with one in the view."""


class NotOpen(Unready):
    """A credential must be opened."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(name)


class NotCounted(Unready):
    """A limit must be counted."""

    def __init__(self, agent: Agent, rule: Rule) -> None:
        self.agent, self.rule = agent, rule
        super().__init__(rule.name)


class Gateway:
    """Decides and meets obligations; every way out but `Approved` raises Refused."""

    def __init__(self, policy: Callable[[], Policy | None], clock: Callable[[], float]) -> None:
        self.policy = policy
        self.vault: Vault | None = None
        self.limiter: Limiter | None = None
        self.audit: Audit | None = None
        self.clock = clock

    def approve(
        self, agent: Agent, view: RequestView, exchange: Exchange, leases: Mapping[str, Lease] | None = None
    ) -> Approved:
        """What is done with `view` for `agent`; fills in the exchange. `leases`: credentials opened for it.

        Raises Refused; Unready: call again after `prepare`, with the leases it gave; BodyWanted.
        """
        started = time.perf_counter()
        try:
            policy = self.policy()
            if policy is None:
                raise Refused(Reason.POLICY_UNAVAILABLE)
            if self.audit is not None and self.audit.refuses:
                raise Refused(Reason.AUDIT_UNAVAILABLE)
            exchange.policy = policy.digest
            plan = self._plan(policy, agent, view, exchange)
        finally:
            exchange.decision_duration = time.perf_counter() - started
        sent, answer, private, scan = plan.view, plan.answer, False, False
        outbound, edits, body_limit, owner = Outbound(sent), list[Edit](), None, ""
        for rule in plan.rules:
            if rule.limits is not None:
                self._count(agent, rule, exchange)
                body_limit = _narrower(body_limit, rule)
            if rule.inject and not answer:
                outbound = self._inject(agent, outbound, rule, leases or {})
            if rule.response_headers:
                edits.append(rule.response_headers)
            private, scan = private or rule.private, scan or rule.scan
            if rule.per_agent:
                owner = agent.id
        exchange.rewritten = sent is not view
        exchange.injected = outbound.injected
        exchange.allowed, exchange.reason = True, Reason.ALLOWED
        return Approved(outbound, plan.rules, answer, private, tuple(edits), body_limit, scan, owner)

    async def prepare(self, missing: Unready, exchange: Exchange, leases: dict[str, Lease]) -> None:
        """Ask the store for what was missing; an opened credential is put into `leases`.

        Raises Refused.
        """
        if isinstance(missing, NotOpen):
            leases[missing.name] = await self.open(missing.name)
        elif isinstance(missing, NotCounted) and self.limiter:
            await self.limiter.admit(missing.agent, missing.rule, exchange)
            exchange.counted += (missing.rule.name,)
        else:
            raise Refused(Reason.STORE_UNAVAILABLE)

    def _count(self, agent: Agent, rule: Rule, exchange: Exchange) -> None:
        """Each rule once, however often the request is decided again."""
        if rule.name in exchange.counted:
            return
        if self.limiter is None or not self.limiter.admits_at_once(agent, rule):
            raise NotCounted(agent, rule)
        exchange.counted += (rule.name,)

    async def open(self, name: str) -> Lease:
        """A credential that is not open yet.

        Raises Refused.
        """
        if self.vault is None:
            raise Refused(Reason.CREDENTIAL_UNAVAILABLE)
        try:
            return await self.vault.open(name)
        except CredentialUnavailable:
            raise Refused(Reason.CREDENTIAL_UNAVAILABLE) from None

    @staticmethod
    def _plan(policy: Policy, agent: Agent, view: RequestView, exchange: Exchange) -> Plan:
        if policy.reads_bodies and view.body is None:
            unseen = Unseen()
            make_plan(policy, agent, view._replace(body=unseen))
            if unseen.asked:
                raise BodyWanted
        plan = make_plan(policy, agent, view)
        if rule := plan.rule:
            exchange.rule, exchange.rule_at = rule.name, rule.at
        decision = plan.decision
        if decision.verdict is not Verdict.ALLOW:
            raise Refused(decision.reason, decision.detail, decision)
        return plan

    def _inject(self, agent: Agent, outbound: Outbound, rule: Rule, leases: Mapping[str, Lease]) -> Outbound:
        if self.vault is None:
            raise Refused(Reason.CREDENTIAL_UNAVAILABLE)
        for injection in rule.inject:
            lease = leases.get(injection.credential) or self.vault.cached(injection.credential)
            if lease is None:
                raise NotOpen(injection.credential)
            try:
                self.vault.check(lease, agent, outbound.view, self.clock())
                outbound = inject(outbound, injection, lease)
            except CredentialScope:
                raise Refused(Reason.CREDENTIAL_SCOPE) from None
            except (InjectionError, KeyError):
                raise Refused(Reason.CREDENTIAL_UNAVAILABLE) from None
        return outbound


def _narrower(before: tuple[int, Rule] | None, rule: Rule) -> tuple[int, Rule] | None:
    size = rule.limits.request_body if rule.limits else None
    return before if size is None or (before and before[0] <= size) else (size, rule)
