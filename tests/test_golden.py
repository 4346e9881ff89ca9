"""Every file in `golden/`: rules, a line of ten dashes, then a decision table or the exact text of the problems.

A row of a table is a request and what becomes of it:

    agent METHOD URL -> allow RULE
    agent METHOD URL -> block REASON [RULE]

An agent's labels stand behind it, `coder-1{team=payments}`; headers behind the URL, ` | Name: value`; the URL that is
sent where it is another than asked for, ` => URL`; and the credentials that are added, ` + NAME`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from proxy.agent import Agent, AgentState
from proxy.explain import injections
from proxy.plan import make_plan
from proxy.policy import Policy
from proxy.problem import Problems
from proxy.request import Ambiguous
from proxy.rulefile import load_policy
from proxy.url import parse_url, url_of

FILES = sorted((Path(__file__).parent / "golden").glob("*.txt"))
AGENT = re.compile(r"([^{]+)(?:\{(.*)\})?")


def decide(policy: Policy, request: str) -> str:
    """What becomes of the request of one row, in the words of the table."""
    first, *headers = request.split(" | ")
    who, method, url = first.split(maxsplit=2)
    match = AGENT.fullmatch(who)
    assert match, who
    labels = dict(label.split("=") for label in match[2].split(",")) if match[2] else {}
    agent = Agent(match[1], labels, state=AgentState.ACTIVE)
    try:
        view = parse_url(method, url, [(name, value) for name, value in (header.split(": ") for header in headers)])
    except Ambiguous:
        return "block ambiguous_request"
    plan = make_plan(policy, agent, view)
    if not plan.decision.allowed:
        rule = plan.decision.rule
        return f"block {plan.decision.reason}{f' {rule.name}' if rule else ''}"
    assert plan.rule
    sent = f" => {url_of(plan.view)}" if plan.view is not view else ""
    added = "".join(f" + {injection.credential}" for injection in injections(plan))
    return f"allow {plan.rule.name}{sent}{added}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    rules, _, expected = path.read_text().partition("----------\n")
    if "->" not in expected:
        try:
            _, problems = load_policy({"rules.yaml": rules.encode()})
        except Problems as error:
            problems = error.problems
        assert "".join(f"{problem}\n" for problem in problems) == expected
        return
    policy, _ = load_policy({"rules.yaml": rules.encode()})
    rows = [line.split(" -> ") for line in expected.splitlines() if line and not line.startswith("#")]
    assert [(row[0], decide(policy, row[0].rstrip())) for row in rows] == [(row[0], row[1]) for row in rows]


def test_the_golden_files_are_found() -> None:
    assert len(FILES) >= 15
