"""An agent is nobody until a record says otherwise."""

from __future__ import annotations

import pytest

from proxy.agent import NEVER, Agent, AgentState, parse_agent_id


def test_an_agent_without_a_known_state_is_killed() -> None:
    assert Agent("coder-1").state is AgentState.KILLED
    assert next(iter(AgentState)) is AgentState.KILLED


def test_an_agent_expires_at_its_expiry() -> None:
    agent = Agent("coder-1", expires=100.0)
    assert not agent.expired(99.9)
    assert agent.expired(100.0)
    assert not Agent("coder-1", expires=NEVER).expired(1e300)


@pytest.mark.parametrize("text", ["a", "coder-1", "A.b_c-D", "0", "x" * 63])
def test_an_id_is_letters_digits_and_a_few_marks(text: str) -> None:
    assert parse_agent_id(text) == text


@pytest.mark.parametrize("text", ["", "a:b", ".a", "-a", "_other", "a b", "a\n", "ä", "a*", "a/b", "x" * 64, "a\0"])
def test_other_text_is_no_id(text: str) -> None:
    """A colon would end the user name in Basic, a star is a wildcard, `_other` is a metric's own."""
    with pytest.raises(ValueError, match="cannot be an agent id"):
        parse_agent_id(text)
