"""Chains of rewrites are in tests/golden/rewrite.txt."""

from __future__ import annotations

from proxy.agent import Agent, AgentState
from proxy.plan import make_plan
from proxy.policy import Policy
from proxy.reason import Reason
from proxy.rulefile import load_policy
from proxy.url import parse_url, url_of

AGENT = Agent("coder-1", state=AgentState.ACTIVE)


def policy(rules: str) -> Policy:
    return load_policy({"a.yaml": f"version: 1\nrules:\n{rules}".encode()})[0]


CHAIN = policy("""
  - {name: old, match: {host: old.test}, action: allow, rewrite: {url: {host: new.test}}, inject: [{credential: one}]}
  - {name: new, match: {host: new.test, path: /ok}, action: allow, inject: [{credential: two}]}
  - {name: wall, match: {host: new.test, path: /wall}, action: block}
  - {name: answer, match: {host: answer.test}, action: allow, respond: {body: hi}}
  - {name: broken, match: {host: broken.test}, action: allow, rewrite: {url: {path: {regex: "^/", to: x}}}}
""")


def test_both_rules_of_a_chain_hold_and_the_first_is_recorded() -> None:
    plan = make_plan(CHAIN, AGENT, parse_url("GET", "https://old.test/ok"))
    assert plan.decision.allowed
    assert [rule.name for rule in plan.rules] == ["old", "new"]
    assert plan.rule
    assert plan.rule.name == "old"
    assert [url_of(view) for view in plan.views] == ["https://old.test/ok", "https://new.test/ok"]


def test_a_block_rule_at_the_new_destination_is_the_one_recorded() -> None:
    plan = make_plan(CHAIN, AGENT, parse_url("GET", "https://old.test/wall"))
    assert (plan.decision.allowed, plan.decision.reason) == (False, Reason.BLOCKED)
    assert plan.rule
    assert plan.rule.name == "wall"


def test_a_rewrite_to_where_nothing_is_allowed_is_refused() -> None:
    plan = make_plan(CHAIN, AGENT, parse_url("GET", "https://old.test/else"))
    assert (plan.decision.allowed, plan.decision.reason) == (False, Reason.NO_RULE)
    assert plan.rule
    assert plan.rule.name == "old"


def test_a_rewrite_that_makes_no_path_is_refused() -> None:
    plan = make_plan(CHAIN, AGENT, parse_url("GET", "https://broken.test/"))
    assert (plan.decision.allowed, plan.decision.reason) == (False, Reason.AMBIGUOUS_REQUEST)


def test_an_answer_needs_no_upstream() -> None:
    plan = make_plan(CHAIN, AGENT, parse_url("GET", "https://answer.test/"))
    assert plan.answer
    assert plan.answer.body == "hi"


def test_a_request_that_is_not_rewritten_stays_the_same_object() -> None:
    view = parse_url("GET", "https://new.test/ok")
    assert make_plan(CHAIN, AGENT, view).view is view


def test_a_killed_agent_gets_nowhere() -> None:
    plan = make_plan(CHAIN, Agent("coder-1"), parse_url("GET", "https://new.test/ok"))
    assert plan.decision.reason is Reason.AGENT_KILLED
