"""What happened to one request, gathered while it happens and recorded once, last. No behaviour beyond reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from proxy.agent import Agent
from proxy.reason import Reason

_NONE: Mapping[tuple[str, str], int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Injected:
    """One credential that was added; `location` is such as `header:authorization` or `query:key`."""

    credential: str
    version: int
    location: str


@dataclass(frozen=True, slots=True)
class Held:
    """A place of a limit that is taken until the exchange ends."""

    key: str
    place: str


@dataclass(init=False)
class Exchange:
    """One request and its answer. Times are Unix seconds, durations seconds, sizes bytes. What was never set is read
    from the class: one is made for each request."""

    id: str
    time: float
    listener: str
    client: str
    agent: Agent | None = None
    identity: tuple[str, ...] = ()
    method: str = ""
    scheme: str = ""
    host: str = ""
    port: int = 0
    path: str = ""
    allowed: bool = False
    reason: Reason = Reason.INTERNAL
    rule: str = ""
    rule_at: str = ""
    policy: str = ""
    rewritten: bool = False
    injected: Sequence[Injected] = ()
    redacted: Mapping[tuple[str, str], int] = _NONE  # (credential, header|body|...) -> times
    leak: tuple[str, str, str] | None = None  # what may not leave and was sent all the same: kind, name, where
    status: int = 0
    request_bytes: int = 0
    response_bytes: int = 0
    duration: float = 0.0
    decision_duration: float = 0.0
    upstream_duration: float | None = None  # to the first byte; None: no upstream was asked
    upstream_ip: str = ""
    trace_id: str = ""
    counted: tuple[str, ...] = ()  # rules whose limits it was counted by
    held: tuple[Held, ...] = ()
    ended: bool = False  # and on record

    def __init__(
        self,
        id: str,  # noqa: A002
        time: float,
        listener: str,
        client: str,
        agent: Agent | None = None,
        **known: Any,
    ) -> None:
        self.id, self.time, self.listener, self.client, self.agent = id, time, listener, client, agent
        if known:
            self.__dict__.update(known)

    @property
    def verdict(self) -> str:
        """`allow` or `block`, as metrics, audit and refusals spell it."""
        return "allow" if self.allowed else "block"

    def count_redacted(self, found: Mapping[str, int], where: str) -> None:
        """Secrets of these credentials were taken out so many times."""
        if found:
            counts = dict(self.redacted)
            for credential, times in found.items():
                counts[credential, where] = counts.get((credential, where), 0) + times
            self.redacted = counts

    @property
    def agent_id(self) -> str:
        """The agent's id, or an empty string where nobody was identified."""
        return self.agent.id if self.agent else ""
