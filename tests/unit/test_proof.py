"""What proofs say, and which agent a text of a known form names."""

from __future__ import annotations

import pytest

from proxy.proof import MAX_LABEL, AgentPattern, plain


def test_a_pattern_names_the_agent_in_its_hole() -> None:
    pattern = AgentPattern.parse("spiffe://example.org/agent/{agent}/x")
    assert pattern.agent("spiffe://example.org/agent/coder-1/x") == "coder-1"
    assert pattern.fill("coder-1") == "spiffe://example.org/agent/coder-1/x"


@pytest.mark.parametrize(
    "text",
    [
        "spiffe://example.org/agent/coder-1",
        "spiffe://evil.org/agent/coder-1/x",
        "spiffe://example.org/agent/a/b/x",
        "spiffe://example.org/agent//x",
        "spiffe://example.org/agent/x",
        "spiffe://example.org/agent/coder-1\n/x",
        "",
    ],
)
def test_another_form_names_nobody(text: str) -> None:
    assert AgentPattern.parse("spiffe://example.org/agent/{agent}/x").agent(text) is None


@pytest.mark.parametrize("text", ["", "coder", "{agent}{agent}", "{Agent}"])
def test_a_pattern_has_one_hole(text: str) -> None:
    with pytest.raises(ValueError, match=r"needs \{agent\} once"):
        AgentPattern.parse(text)


@pytest.mark.parametrize(
    ("claim", "label"),
    [("web", "web"), (7, "7"), (True, "true"), (None, ""), (["web"], ""), ("a\nb", ""), ("x" * (MAX_LABEL + 1), "")],
)
def test_a_claim_becomes_a_label_only_if_it_is_plain(claim: object, label: str) -> None:
    assert plain(claim) == label
