"""Tests of rules, as `sallyport test` runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.policy import Policy
from proxy.problem import Problems
from proxy.rulefile import load_policy
from proxy.ruletest import load_tests, run_tests

STARTER = Path(__file__).parents[2] / "rules"
RULES = b"""version: 1
rules:
  - {name: read, agents: [coder-*, labels: {team: pay}], match: {host: x.test}, action: allow, inject: [credential: k]}
  - {name: wall, match: {host: x.test, path: /wall}, action: block}
  - {name: socket, match: {host: ws.test, websocket: true}, action: allow}
  - {name: old, match: {host: old.test}, action: allow, rewrite: {url: {host: x.test}}}
  - {name: mock, match: {host: mock.test}, action: allow, respond: {status: 418}}
  - {name: model, match: {host: ai.test, body: {json: {/model: [s, 007]}}}, action: allow}
"""


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy({"rules/a.yaml": RULES})[0]


def run(policy: Policy, request: str, expect: str) -> str:
    text = f"version: 1\ntests:\n  - {{name: t, request: {{{request}}}, expect: {{{expect}}}}}"
    [result] = run_tests(policy, load_tests({"rules/a.test.yaml": text.encode()}))
    return str(result)


@pytest.mark.parametrize(
    ("request_", "expect"),
    [
        ('agent: coder-1, url: "https://x.test/"', "verdict: allow, rule: read, reason: allowed, inject: [k]"),
        ('agent: coder-1, url: "https://x.test/"', "verdict: allow, inject: k"),
        ('agent: a, url: "https://ai.test/", body: {model: s}', "verdict: allow, rule: model"),
        ('agent: a, url: "https://ai.test/", body: \'{"model": "007"}\'', "verdict: allow, rule: model"),
        ('agent: a, url: "https://ai.test/", body: {model: b}', "verdict: block, reason: no_rule"),
        ('agent: a, url: "https://ai.test/", body: [s]', "verdict: block, reason: no_rule"),
        ('agent: a, url: "https://ai.test/"', "verdict: block, reason: no_rule"),
        ('agent: bob, labels: {team: pay}, method: HEAD, url: "https://x.test/"', "verdict: allow"),
        ('agent: bob, url: "https://x.test/"', "verdict: block, reason: no_rule, rule: null, inject: [], status: 403"),
        ('agent: coder-1, url: "https://x.test/wall"', "verdict: block, reason: blocked, rule: wall"),
        ('agent: coder-1, url: "https://ws.test/", websocket: true', "verdict: allow, rule: socket"),
        ('agent: coder-1, url: "https://x.test/", websocket: true', "verdict: block, reason: protocol_not_allowed"),
        ('agent: coder-1, url: "https://ws.test/", headers: {Upgrade: h2c}', "verdict: block"),
        (
            'agent: coder-1, url: "https://old.test/a/../b"',
            'verdict: allow, rule: old, url: "https://X.test/b", inject: [k]',
        ),
        ('agent: coder-1, url: "https://old.test/wall"', "verdict: block, rule: wall"),
        ('agent: coder-1, url: "https://mock.test/"', "verdict: allow, status: 418, inject: []"),
        ('agent: coder-1, url: "https://x.test/%00"', "verdict: block, reason: ambiguous_request, status: 400"),
        ('agent: coder-1, url: "https://u@x.test/"', "verdict: block, reason: ambiguous_request"),
    ],
)
def test_what_is_as_expected_passes(policy: Policy, request_: str, expect: str) -> None:
    assert run(policy, request_, expect) == "rules/a.test.yaml:3:5: passed: t"


@pytest.mark.parametrize(
    ("request_", "expect", "expected", "happened"),
    [
        (
            'agent: coder-1, url: "https://x.test/"',
            "verdict: block, reason: no_rule",
            "block, reason no_rule",
            "allow by read (rules/a.yaml:3), sent to https://x.test/ with k",
        ),
        (
            'agent: coder-1, url: "https://x.test/wall"',
            "verdict: allow",
            "allow",
            "block, reason blocked by wall (rules/a.yaml:4)",
        ),
        (
            'agent: bob, url: "https://x.test/"',
            "verdict: block, reason: blocked",
            "reason blocked",
            "block, reason no_rule",
        ),
        (
            'agent: coder-1, url: "https://x.test/"',
            "verdict: allow, inject: []",
            "nothing injected",
            "allow by read (rules/a.yaml:3), sent to https://x.test/ with k",
        ),
        (
            'agent: coder-1, url: "https://ws.test/"',
            "verdict: allow, rule: sockets, inject: [k, l]",
            'rule sockets, which there is not (did you mean "socket"?), k, l injected',
            "allow by socket (rules/a.yaml:5), sent to https://ws.test/",
        ),
        (
            'agent: coder-1, url: "https://ws.test/"',
            'verdict: allow, rule: null, url: "https://x.test/"',
            "no rule, sent to https://x.test/",
            "allow by socket (rules/a.yaml:5), sent to https://ws.test/",
        ),
        (
            'agent: coder-1, url: "https://mock.test/"',
            'verdict: allow, status: 200, url: "https://mock.test/"',
            "sent to https://mock.test/, status 200",
            "allow by mock (rules/a.yaml:7), answered with status 418",
        ),
        (
            'agent: coder-1, url: "https://x.test/%00"',
            "verdict: allow",
            "allow",
            "block, reason ambiguous_request",
        ),
    ],
)
def test_what_is_not_fails_in_plain_words(
    policy: Policy, request_: str, expect: str, expected: str, happened: str
) -> None:
    assert run(policy, request_, expect) == (
        f"rules/a.test.yaml:3:5: failed: t\n    expected: {expected}\n    happened: {happened}"
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("tests: []", 'a:1:1: missing field "version"'),
        ("version: 1", 'a:1:1: missing field "tests"'),
        ("version: 1\ntests: {}", "a:2:8: expected a list, got a mapping"),
        ("version: 1\ntests: [{request: {}, expect: {}}]", 'a:2:9: missing field "name"'),
        ("version: 1\ntest: []\ntests: []", 'a:2:1: unknown field "test"\n    hint: did you mean "tests"?'),
    ],
)
def test_a_mistake_in_a_test_file_has_a_place(text: str, problem: str) -> None:
    with pytest.raises(Problems) as caught:
        load_tests({"a": text.encode()})
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("request_", "expect", "problem"),
    [
        ('url: "https://x.test/"', "verdict: allow", 'missing field "agent"'),
        ('agent: "a:b", url: "https://x.test/"', "verdict: allow", "cannot be an agent id"),
        ("agent: a, url: x.test", "verdict: allow", "is not a URL"),
        ('agent: a, url: "https://x.test/", methd: GET', "verdict: allow", 'unknown field "methd"'),
        ('agent: a, method: "A B", url: "https://x.test/"', "verdict: allow", '"A B" is not a method'),
        ('agent: a, url: "https://x.test/"', "rule: x", 'missing field "verdict"'),
        ('agent: a, url: "https://x.test/"', "verdict: deny", 'expected "allow" or "block", got "deny"'),
        (
            'agent: a, url: "https://x.test/"',
            "verdict: block, reason: norule",
            '"norule" is not a reason\n    hint: did you mean "no_rule"?',
        ),
    ],
)
def test_a_mistake_in_a_test_has_a_place(request_: str, expect: str, problem: str) -> None:
    text = f"version: 1\ntests:\n  - {{name: t, request: {{{request_}}}, expect: {{{expect}}}}}"
    with pytest.raises(Problems) as caught:
        load_tests({"a": text.encode()})
    assert problem in str(caught.value)
    assert "a:3:" in str(caught.value)


def test_mistakes_of_every_file_are_told_at_once() -> None:
    with pytest.raises(Problems) as caught:
        load_tests({"a": b"version: 2\ntests: [5]", "b": b"\t", "c": b"version: 1\ntests:\n"})
    assert [problem.place for problem in caught.value.problems] == ["a:1:10", "a:2:9", "b:1:1"]


def test_the_starter_set_passes_its_own_tests() -> None:
    files = {path.name: path.read_bytes() for path in sorted(STARTER.glob("*.yaml"))}
    policy, _ = load_policy({name: text for name, text in files.items() if not name.endswith(".test.yaml")})
    results = run_tests(policy, load_tests({name: text for name, text in files.items() if name.endswith(".test.yaml")}))
    assert len(results) >= 30
    assert [str(result) for result in results if not result.passed] == []
