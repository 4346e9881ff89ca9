"""The principal: who a request speaks for. Where agents are kept is the registry's business."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

NEVER = float("inf")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class AgentState(StrEnum):
    """Whether an agent may act at all; the first value is what an unknown record is read as."""

    KILLED = "killed"
    ACTIVE = "active"


@dataclass(frozen=True, slots=True)
class Agent:
    """One registered agent; `expires` is in Unix seconds."""

    id: str
    labels: Mapping[str, str] = field(default_factory=dict)
    on_behalf_of: str = ""
    expires: float = NEVER
    state: AgentState = AgentState.KILLED
    kill_reason: str = ""

    def expired(self, now: float) -> bool:
        """Whether `now` (Unix seconds) is at or after the expiry."""
        return now >= self.expires


def parse_agent_id(text: str) -> str:
    """`text`, if it can be an agent's id. A colon cannot: it ends the user name in Basic (RFC 7617 section 2).

    Raises ValueError with the words for the user.
    """
    if not _ID.fullmatch(text):
        raise ValueError(
            f"{text!r} cannot be an agent id: use 1 to 63 letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit"
        )
    return text


def is_agent_id(text: str) -> bool:
    """Whether `text` can be an agent's id."""
    return _ID.fullmatch(text) is not None
