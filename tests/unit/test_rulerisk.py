"""The warnings themselves are in tests/golden/warnings*.txt."""

from __future__ import annotations

import pytest

from proxy.rulefile import load_policy
from proxy.rulerisk import _anchored, unknown_credentials

RULES = b"""
version: 1
rules:
  - name: a
    match: {host: api.github.com}
    action: allow
    inject:
      - {credential: githb, as: bearer}
  - name: b
    match: {host: "*.example.com"}
    action: allow
    inject: [{credential: vendor, as: bearer}]  # sallyport: allow wildcard-credential
"""


def test_a_credential_that_is_close_to_one_there_is_a_mistake() -> None:
    policy, _ = load_policy({"rules/a.yaml": RULES})
    problem, _ = unknown_credentials(policy, ["github", "openai"])
    assert str(problem) == 'rules/a.yaml:8:9: unknown credential "githb"\n    hint: did you mean "github"?'


def test_a_credential_that_is_not_there_yet_is_a_warning_with_the_next_command() -> None:
    policy, _ = load_policy({"rules/a.yaml": RULES})
    problem = unknown_credentials(policy, ["github"])[1]
    assert str(problem) == (
        'rules/a.yaml:12:14: warning: unknown credential "vendor"\n'
        "    hint: sallyport vault put vendor --host '*.example.com'"
    )


def test_credentials_that_are_there_are_no_problem() -> None:
    policy, _ = load_policy({"rules/a.yaml": RULES})
    assert unknown_credentials(policy, {"githb", "vendor"}) == []


@pytest.mark.parametrize(
    ("regex", "anchored"),
    [
        ("^/a$", True),
        (r"\A/a\z", True),
        ("(?i)^/a$", True),
        ("^/(a|b)$", True),
        ("^/(a|(b|c))$", True),
        ("^/a$|^/b$", True),
        ("^/[|(]$", True),
        (r"^/\($", True),
        ("/a", False),
        ("^/a", False),
        ("/a$", False),
        (r"^/a\$", False),
        ("^/a|/b$", False),
        ("^/a$|/b", False),
    ],
)
def test_a_regex_is_held_at_both_ends_in_every_alternative(regex: str, anchored: bool) -> None:
    assert _anchored(regex) is anchored
