"""What is done with a request before a credential is added: decided, rewritten, decided again. Pure, and shared by the
proxy, `sallyport test` and `sallyport explain`, so that they cannot differ."""

from __future__ import annotations

from typing import NamedTuple

from proxy.agent import Agent
from proxy.outbound import rewrite
from proxy.passthrough import passes
from proxy.policy import Answer, Decision, Policy, Rule, Verdict, decide
from proxy.reason import Reason
from proxy.request import Ambiguous, RequestView

MAX_REWRITES = 4
_LIMITS = {"max_url": ": the URL is too long", "max_labels": ": its host name has too many labels"}


class Plan(NamedTuple):
    """The outcome. `views` are the request as it was decided each time, the last one as it would be sent; `rules` are
    those whose obligations hold, in the order they applied."""

    decision: Decision
    views: tuple[RequestView, ...]
    rules: tuple[Rule, ...] = ()

    @property
    def view(self) -> RequestView:
        """The request as it would be sent."""
        return self.views[-1]

    @property
    def rule(self) -> Rule | None:
        """The rule to record: the one that decided, else the first that was met on the way."""
        return self.decision.rule or (self.rules[0] if self.rules else None)

    @property
    def passthrough(self) -> bool:
        """Whether the connection is passed through, and no request in it seen."""
        return self.decision.rule is not None and self.decision.rule.passthrough

    @property
    def answer(self) -> Answer | None:
        """What is answered without any upstream."""
        for rule in self.rules:
            if rule.respond:
                return rule.respond
        return None


def plan_of_client(policy: Policy, agent: Agent, view: RequestView) -> Plan:
    """The plan for a client that opens a tunnel for https: it may be passed through, and the request never seen."""
    rule = passes(policy, agent, view.host, view.port) if view.scheme == "https" else None
    if rule:
        return Plan(Decision(Verdict.ALLOW, Reason.ALLOWED, rule), (view,), (rule,))
    return make_plan(policy, agent, view)


def make_plan(policy: Policy, agent: Agent, view: RequestView) -> Plan:
    """Decide `view` and follow the rewrites of the rules that allow it.

    A new destination is decided as a new request. A changed path, query or header is still the rule's own, unless a
    block rule forbids it.
    """
    views, rules = [view], list[Rule]()
    first: Decision | None = None
    while True:
        decision = decide(policy, agent, view)
        rule = decision.rule
        if not decision.allowed or rule is None:
            return Plan(decision, tuple(views), tuple(rules))
        first = first or decision
        if limit := rule.url_limit(view):
            decision = Decision(reason=Reason.LIMIT_EXCEEDED, rule=rule, detail=_LIMITS[limit], limit=limit)
            return Plan(decision, tuple(views), tuple(rules))
        if rules and any(rule is met for met in rules):
            return Plan(first, tuple(views), tuple(rules))
        rules.append(rule)
        if rule.rewrite is None or rule.respond:
            return Plan(first, tuple(views), tuple(rules))
        if len(rules) > MAX_REWRITES:
            return Plan(Decision(reason=Reason.NO_RULE), tuple(views), tuple(rules))
        try:
            view = rewrite(view, rule.rewrite)
        except Ambiguous as error:
            return Plan(Decision(reason=Reason.AMBIGUOUS_REQUEST, detail=str(error)), tuple(views), tuple(rules))
        views.append(view)
        if not rule.rewrite.destination:
            again = decide(policy, agent, view)
            blocked = again.rule is not None and again.rule.action is Verdict.BLOCK
            return Plan(again if blocked else first, tuple(views), tuple(rules))
