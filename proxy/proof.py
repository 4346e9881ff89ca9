"""What a proof of identity says: which agent, and what else. How it was proved is known elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from proxy.agent import NEVER, Agent, is_agent_id

KINDS = ("token", "gateway", "jwt", "mtls", "unix", "network", "listener")
_HOLE = "{agent}"
_UNSAFE = re.compile(r"[\x00-\x1f\x7f]")
MAX_LABEL = 256  # characters of a label or a user that a proof may bring


@dataclass(frozen=True, slots=True)
class Told:
    """What a proof tells of its agent beyond the id. What the operator registered wins; this fills what that left."""

    labels: Mapping[str, str] = field(default_factory=dict)
    on_behalf_of: str = ""

    def about(self, agent: Agent) -> Agent:
        """The agent with what it did not have."""
        labels = {**self.labels, **agent.labels}
        return replace(agent, labels=labels, on_behalf_of=agent.on_behalf_of or self.on_behalf_of)


@dataclass(frozen=True, slots=True)
class Proof:
    """An agent's id that was proved until `expires` (Unix seconds); `name` is how the audit log spells the proof."""

    name: str
    agent: str
    expires: float = NEVER
    told: Told | None = None


@dataclass(frozen=True, slots=True)
class AgentPattern:
    """A text with `{agent}` in it once, such as a SPIFFE ID or a path, and which agent a text of that form names."""

    before: str
    after: str

    @staticmethod
    def parse(text: str) -> AgentPattern:
        """Raises ValueError(message, hint)."""
        before, hole, after = text.partition(_HOLE)
        if not hole or _HOLE in after:
            raise ValueError(f'"{text}" needs {_HOLE} once', f"{_HOLE} stands where the agent's id is")
        return AgentPattern(before, after)

    def agent(self, text: str) -> str | None:
        """The agent that `text` names; None where it has another form, or no agent's id in it."""
        if len(text) < len(self.before) + len(self.after):
            return None
        if not (text.startswith(self.before) and text.endswith(self.after)):
            return None
        agent = text[len(self.before) : len(text) - len(self.after)]
        return agent if is_agent_id(agent) else None

    def fill(self, agent: str) -> str:
        """The text for an agent."""
        return f"{self.before}{agent}{self.after}"


def plain(text: object) -> str:
    """A claim as a label or a user: text without control characters, else empty."""
    if isinstance(text, bool):
        return str(text).lower()
    words = str(text) if isinstance(text, str | int) else ""
    return "" if len(words) > MAX_LABEL or _UNSAFE.search(words) else words
