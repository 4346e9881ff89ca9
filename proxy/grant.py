"""What a credential may be used for: the limit it carries itself, checked again after policy matched."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from proxy.address import HostPattern
from proxy.agent import NEVER, Agent
from proxy.pattern import Glob, any_glob, path_glob, text_glob
from proxy.request import RequestView, parse_path_pattern

_METHOD = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 section 5.6.2
_AGENTS = re.compile(r"[A-Za-z0-9._*-]+")


@dataclass(frozen=True, slots=True)
class Grant:
    """Hosts (at least one, `host` or `host:port`), methods, paths, agents; empty is any. `expires`: Unix seconds."""

    hosts: tuple[str, ...]
    methods: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    agents: tuple[str, ...] = ()
    expires: float = NEVER
    _hosts: tuple[tuple[HostPattern, int], ...] = field(default=(), compare=False, repr=False)
    _paths: tuple[Glob, ...] = field(default=(), compare=False, repr=False)
    _agents: tuple[Glob, ...] = field(default=(), compare=False, repr=False)

    @staticmethod
    def parse(
        *,
        hosts: Iterable[str],
        methods: Iterable[str] = (),
        paths: Iterable[str] = (),
        agents: Iterable[str] = (),
        expires: float = NEVER,
    ) -> Grant:
        """A grant from patterns as rules write them.

        Raises ValueError with the words for the user.
        """
        host_texts = tuple(hosts)
        if not host_texts:
            raise ValueError("a credential needs at least one host it may be sent to", "give --host")
        if expires != expires:  # NaN would never come
            raise ValueError("a credential's expiry is not a time")
        method_texts = tuple(method.upper() for method in methods)
        path_texts = tuple(parse_path_pattern(path) for path in paths)
        agent_texts = tuple(agents)
        for texts, pattern, what in ((method_texts, _METHOD, "a method"), (agent_texts, _AGENTS, "an agent or glob")):
            wrong = next((text for text in texts if not pattern.fullmatch(text)), None)
            if wrong is not None:
                raise ValueError(f'"{wrong}" is not {what}')
        return Grant(
            host_texts,
            method_texts,
            path_texts,
            agent_texts,
            expires,
            tuple(_host(text) for text in host_texts),
            tuple(map(path_glob, path_texts)),
            tuple(map(text_glob, agent_texts)),
        )

    def canonical(self) -> dict[str, object]:
        """The grant as JSON data, the same for equal grants."""
        return {
            "hosts": list(self.hosts),
            "methods": list(self.methods),
            "paths": list(self.paths),
            "agents": list(self.agents),
            "expires": None if self.expires == NEVER else self.expires,
        }

    @staticmethod
    def from_canonical(data: Mapping[str, object]) -> Grant:
        """The grant that `canonical` described.

        Raises ValueError where `data` is not of that form.
        """
        lists: dict[str, list[str]] = {}
        for key in ("hosts", "methods", "paths", "agents"):
            value = data.get(key)
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise ValueError(f"a grant's {key} are not a list of text")
            lists[key] = value
        expires = data.get("expires")
        if expires is not None and not isinstance(expires, int | float):
            raise ValueError("a grant's expires is not a time")
        return Grant.parse(**lists, expires=NEVER if expires is None else float(expires))

    def covers_host(self, view: RequestView) -> bool:
        """Whether the credential may be known to the host `view` goes to."""
        for pattern, port in self._hosts:  # noqa: SIM110  # `any` takes three times as long
            if port in (0, view.port) and pattern.matches(view.host):
                return True
        return False

    def covers_agent(self, agent_id: str) -> bool:
        """Whether an agent may use the credential somewhere."""
        return any_glob(self._agents, agent_id)

    def _names(self, method: str) -> bool:
        return method in self.methods or (method == "HEAD" and "GET" in self.methods)

    def refusal(self, agent: Agent, view: RequestView, now: float) -> str | None:
        """Why the credential may not be used by `agent` for `view` at `now` (Unix seconds); None: it may."""
        if now >= self.expires:
            return "expired"
        if not self.covers_host(view):
            return "host"
        if self.methods and (view.overrides or not self._names(view.method)):
            return "method"
        for reading in view.readings:
            if not any_glob(self._paths, reading):
                return "path"
        return None if self.covers_agent(agent.id) else "agent"


def _host(text: str) -> tuple[HostPattern, int]:
    name, colon, port = text.rpartition(":")
    if colon and port.isascii() and port.isdigit() and (":" not in name or name.endswith("]")):
        if not 0 < int(port) < 65536:
            raise ValueError(f'"{text}": {port} is not a port')
        return HostPattern.parse(name), int(port)
    return HostPattern.parse(text), 0
