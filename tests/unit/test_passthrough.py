"""A tunnel is passed through only where nothing a rule might say about its requests is lost."""

from __future__ import annotations

import pytest

from proxy.address import Host
from proxy.agent import Agent, AgentState
from proxy.clienthello import ClientHello
from proxy.passthrough import objection, passes
from proxy.plan import make_plan, plan_of_client
from proxy.reason import Reason
from proxy.rulefile import load_policy
from proxy.url import parse_url

PASS = "{name: pass, action: allow, tls: passthrough, match: {host: a.test}}"
AGENT = Agent("coder-1", state=AgentState.ACTIVE)


def decided(*rules: str, agent: Agent = AGENT, host: str = "a.test", port: int = 443) -> str:
    """The name of the rule that passes a tunnel through, or an empty text."""
    text = "version: 1\nrules:\n" + "".join(f"  - {rule}\n" for rule in rules)
    rule = passes(load_policy({"r.yaml": text.encode()})[0], agent, Host.parse(host), port)
    return rule.name if rule else ""


@pytest.mark.parametrize(
    ("rules", "passed"),
    [
        ((PASS,), True),
        (("{name: r, action: allow, match: {host: a.test, path: /x}}", PASS), False),
        ((PASS, "{name: r, action: allow, match: {host: a.test}}"), True),
        (("{name: r, action: allow, agents: other, match: {host: a.test}}", PASS), True),
        (("{name: r, action: allow, match: {host: a.test, port: 8443}}", PASS), True),
        (("{name: r, action: allow, match: {host: a.test, scheme: http}}", PASS), True),
        ((PASS, "{name: b, action: block, match: {host: '**', method: DELETE}}"), False),
        ((PASS, "{name: b, action: block, agents: other, match: {host: a.test}}"), True),
        ((PASS, "{name: b, action: block, match: {host: a.test, scheme: http}}"), True),
    ],
)
def test_the_first_rule_decides_and_a_block_rule_wins(rules: tuple[str, ...], passed: bool) -> None:
    """A block rule that no one can evaluate there counts as met."""
    assert decided(*rules) == ("pass" if passed else "")


@pytest.mark.parametrize(
    ("agent", "host", "port"),
    [
        (Agent("coder-1"), "a.test", 443),
        (AGENT, "b.test", 443),
        (AGENT, "x.a.test", 443),
        (AGENT, "a.test", 8443),
    ],
    ids=["a killed agent", "another host", "below it", "another port"],
)
def test_anything_else_is_intercepted(agent: Agent, host: str, port: int) -> None:
    assert decided(PASS, agent=agent, host=host, port=port) == ""


def test_a_passthrough_rule_allows_no_request() -> None:
    """One in absolute form, or in a tunnel that was intercepted all the same."""
    policy, _ = load_policy({"r.yaml": f"version: 1\nrules:\n  - {PASS}\n".encode()})
    view = parse_url("GET", "https://a.test/x", [])
    assert make_plan(policy, AGENT, view).decision.reason is Reason.NO_RULE
    assert plan_of_client(policy, AGENT, view).passthrough
    assert not plan_of_client(policy, AGENT, parse_url("GET", "http://a.test/x", [])).decision.allowed


@pytest.mark.parametrize(
    ("hello", "host", "reason"),
    [
        (ClientHello("a.test"), "a.test", None),
        (ClientHello("A.TEST"), "a.test", None),
        (ClientHello("b.test"), "a.test", Reason.AUTHORITY_MISMATCH),
        (ClientHello(""), "a.test", Reason.AUTHORITY_MISMATCH),
        (ClientHello("a b"), "a.test", Reason.AUTHORITY_MISMATCH),
        (ClientHello(), "a.test", Reason.AUTHORITY_MISMATCH),
        (ClientHello(), "192.0.2.1", None),
        (ClientHello("a.test"), "192.0.2.1", Reason.AUTHORITY_MISMATCH),
        (ClientHello("a.test", encrypted=True), "a.test", Reason.PROTOCOL_NOT_ALLOWED),
        (None, "a.test", Reason.AMBIGUOUS_REQUEST),
    ],
)
def test_the_server_name_must_be_there_and_be_the_target(
    hello: ClientHello | None, host: str, reason: Reason | None
) -> None:
    assert objection(hello, Host.parse(host)) is reason
