"""The decision: (Policy, Agent, RequestView) -> Decision, pure and total. No YAML, no I/O, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

import re2

from proxy.address import Host, HostPattern
from proxy.agent import Agent, AgentState
from proxy.bodymatch import Conditions
from proxy.pattern import Glob, any_glob
from proxy.reason import Reason
from proxy.request import DEFAULT_PORTS, RequestView

# TRACE would echo an injected credential (RFC 9110 section 9.3.8); TRACK is what IIS calls it (CVE-2003-1567).
NEVER_FORWARDED = frozenset({"TRACE", "TRACK", "CONNECT"})

# Resolvers over HTTPS (RFC 8484): through one, every name can be asked that rules about hosts would never let out.
_RESOLVERS = (
    "1.0.0.1 1.0.0.2 1.0.0.3 1.1.1.1 1.1.1.2 1.1.1.3 149.112.112.112 208.67.220.220 208.67.222.222 8.8.4.4 8.8.8.8 "
    "9.9.9.10 9.9.9.11 9.9.9.9 94.140.14.14 94.140.15.15 2001:4860:4860::8844 2001:4860:4860::8888 "
    "2606:4700:4700::1001 2606:4700:4700::1111 2620:fe::9 2620:fe::fe chrome.cloudflare-dns.com cloudflare-dns.com "
    "dns.adguard-dns.com dns.adguard.com dns.alidns.com dns.cloudflare.com dns.google dns.google.com dns.mullvad.net "
    "dns.nextdns.io dns.quad9.net dns.sb dns10.quad9.net dns11.quad9.net dns9.quad9.net dns64.dns.google "
    "dns64.cloudflare-dns.com doh.cleanbrowsing.org doh.dns.sb doh.familyshield.opendns.com doh.mullvad.net "
    "doh.opendns.com doh.pub doh.umbrella.com family.cloudflare-dns.com freedns.controld.com "
    "mozilla.cloudflare-dns.com odoh.cloudflare-dns.com one.one.one.one ordns.he.net p0.freedns.controld.com "
    "security.cloudflare-dns.com unfiltered.adguard-dns.com wikimedia-dns.org"
)
DNS_OVER_HTTPS = frozenset(_RESOLVERS.split())


class Verdict(StrEnum):
    """What is decided; the zero value refuses."""

    BLOCK = "block"
    ALLOW = "allow"


@dataclass(frozen=True, slots=True)
class AgentMatch:
    """Which agents a rule is for: an id that fits one of `ids`, or every label in `labels`. Neither: every agent."""

    ids: tuple[Glob, ...] = ()
    labels: tuple[tuple[str, tuple[Glob, ...]], ...] = ()

    def matches(self, agent: Agent) -> bool:
        """Whether the rule is for `agent`."""
        for key, globs in self.labels:
            if key not in agent.labels or not any_glob(globs, agent.labels[key]):
                return False
        return any_glob(self.ids, agent.id)


@dataclass(frozen=True, slots=True)
class Match:
    """The conditions of a rule; an empty one is met by anything. `own_port`: the port must be the scheme's own."""

    hosts: tuple[HostPattern, ...] = ()
    ports: frozenset[int] = frozenset()
    own_port: bool = False
    schemes: frozenset[str] = frozenset()
    methods: frozenset[str] = frozenset()
    websocket: bool = False
    paths: tuple[Glob, ...] = ()
    path_regex: re2._Regexp | None = None
    query: tuple[tuple[str, tuple[Glob, ...]], ...] = ()
    headers: tuple[tuple[str, tuple[Glob, ...]], ...] = ()
    body: Conditions = ()

    def port_matches(self, view: RequestView) -> bool:
        """Whether the port condition is met."""
        if self.own_port and view.port != DEFAULT_PORTS.get(view.scheme):
            return False
        return not self.ports or view.port in self.ports

    def path_matches(self, path: str) -> bool:
        """Whether one reading of a path meets the path conditions."""
        return any_glob(self.paths, path) and (self.path_regex is None or self.path_regex.search(path) is not None)


@dataclass(frozen=True, slots=True)
class Edit:
    """Values to set and names to remove, of headers or query parameters."""

    set: Mapping[str, str] = field(default_factory=dict)
    remove: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.set or self.remove)


@dataclass(frozen=True, slots=True)
class Rewrite:
    """What is changed before the request is sent; None leaves a part as it is."""

    host: Host | None = None
    port: int | None = None
    path_regex: re2._Regexp | None = None
    path_to: str = ""
    query: Edit = Edit()
    headers: Edit = Edit()

    @property
    def destination(self) -> bool:
        """Whether another server than the one asked for gets the request."""
        return self.host is not None or self.port is not None


@dataclass(frozen=True, slots=True)
class Injection:
    """Which credential is added and how; an empty `kind` leaves that to the credential."""

    credential: str
    kind: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    places: tuple[str, ...] = ()
    line: int = 0
    column: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a rule answers itself, without any upstream."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a rule lets through at most; 0 is no limit. `rate`: requests in so many seconds; sizes in bytes."""

    rate: tuple[int, float] | None = None
    concurrency: int = 0
    request_body: int | None = None
    max_url: int = 0
    max_labels: int = 0  # DNS labels that a wildcard stands for


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule as it was loaded; `at` is `file:line`. What it asks for beyond the verdict are its obligations."""

    name: str
    at: str
    action: Verdict = Verdict.BLOCK
    agents: tuple[AgentMatch, ...] = ()
    match: Match = Match()
    rewrite: Rewrite | None = None
    inject: tuple[Injection, ...] = ()
    response_headers: Edit = Edit()
    respond: Answer | None = None
    private: bool = False
    limits: Limits | None = None
    passthrough: bool = False  # its connections are not read: it matches no request
    scan: bool = False  # for keys of well-known forms
    per_agent: bool = False  # its connections to the upstream

    def may_allow(self, agent: Agent) -> bool:
        """Whether some request of `agent` could be allowed by this rule."""
        return self.action is Verdict.ALLOW and (not self.agents or any(match.matches(agent) for match in self.agents))

    def mismatch(self, agent: Agent, view: RequestView) -> str:
        """The first condition that is not met, or an empty text.

        Where a request has several readings or values, an allow rule must match every one and a block rule any.
        """
        hosts = self.match.hosts
        if hosts and not any(pattern.matches(view.host) for pattern in hosts):
            return "host"
        return self.unmet(agent, view)

    def unmet(self, agent: Agent, view: RequestView) -> str:
        """The same for a request whose host is one of the rule's."""
        if self.passthrough:
            return "tls"
        match = self.match
        if match.schemes and view.scheme not in match.schemes:
            return "scheme"
        if not match.port_matches(view):
            return "port"
        if self.agents and not any(agents.matches(agent) for agents in self.agents):
            return "agents"
        if match.methods and not (self._overridden(view) if view.overrides else view.method in match.methods):
            return "method"
        every = all if self.action is Verdict.ALLOW else any
        if (match.paths or match.path_regex) and not every(map(match.path_matches, view.readings)):
            return "path"
        if (match.query or match.headers) and (missing := self._values_unmet(view)):
            return missing
        if self.action is Verdict.BLOCK:
            upgrade_unmet = match.websocket and view.upgrade != "websocket"
        else:
            upgrade_unmet = bool(view.upgrade) and not (match.websocket and view.upgrade == "websocket")
        if upgrade_unmet:
            return "websocket"
        return "body" if match.body and not self._body_matches(view) else ""

    def _values_unmet(self, view: RequestView) -> str:
        for name, globs in self.match.query:
            if not self.values_match(globs, view.query_values(name)):
                return "query"
        for name, globs in self.match.headers:
            if not self.values_match(globs, view.header_values(name)):
                return "headers"
        return ""

    def _overridden(self, view: RequestView) -> bool:
        """The same for a request that may be another method to its origin: never allowed where methods are named."""
        return self.action is Verdict.BLOCK and not self.match.methods.isdisjoint({view.method, *view.overrides})

    def _body_matches(self, view: RequestView) -> bool:
        """What cannot be evaluated makes an allow rule not match and a block rule match."""
        allow = self.action is Verdict.ALLOW
        return view.body.meets(self.match.body, every=allow) if view.body else not allow

    def url_limit(self, view: RequestView) -> str:
        """Which limit a URL goes over, or an empty text: names and queries can carry data out."""
        if limits := self.limits:
            url = f"{view.scheme}://{view.authority}{view.path_and_query}" if limits.max_url else ""
            if len(url) > limits.max_url:
                return "max_url"
            if limits.max_labels and self._labels(view.host) > limits.max_labels:
                return "max_labels"
        return ""

    def _labels(self, host: Host) -> int:
        """How many labels of `host` a wildcard of this rule stands for."""
        if host.ip:
            return 0
        patterns = self.match.hosts or (HostPattern("", 2),)
        size = host.name.count(".") + 1
        return min(size - _size(pattern) for pattern in patterns if pattern.matches(host))

    def values_match(self, globs: tuple[Glob, ...], readings: Iterable[list[str]]) -> bool:
        """Whether the values of a parameter or header, in each way to read the request, fit one of `globs`."""
        every = all if self.action is Verdict.ALLOW else any
        return every(bool(values) and every(any_glob(globs, value) for value in values) for values in readings)


def _size(pattern: HostPattern) -> int:
    return pattern.name.count(".") + 1 if pattern.name else 0


class Decision(NamedTuple):
    """The verdict, why, and the rule that decided. As made, without arguments, it refuses.

    `limit` is which of the rule's limits was gone over.
    """

    verdict: Verdict = Verdict.BLOCK
    reason: Reason = Reason.INTERNAL
    rule: Rule | None = None
    detail: str = ""
    limit: str = ""

    @property
    def allowed(self) -> bool:
        """Whether the request may go out."""
        return self.verdict is Verdict.ALLOW


class Policy:
    """An immutable set of rules, indexed by host so that only rules which may name a host are asked about it."""

    __slots__ = (
        "_anywhere",
        "_below",
        "_exact",
        "_naming",
        "_under",
        "digest",
        "passthrough",
        "reads_bodies",
        "rules",
        "tls_ports",
    )

    def __init__(self, rules: Iterable[Rule], digest: str = "") -> None:
        self.rules = tuple(rules)
        self.digest = digest
        self.tls_ports = frozenset({DEFAULT_PORTS["https"]}).union(
            *(rule.match.ports for rule in self.rules if "https" in rule.match.schemes)
        )
        self.passthrough = any(rule.passthrough for rule in self.rules)
        self.reads_bodies = any(rule.match.body for rule in self.rules)
        self._exact: dict[str, list[int]] = {}
        self._under: dict[str, list[int]] = {}  # one label below
        self._below: dict[str, list[int]] = {}  # any depth below
        self._anywhere: list[int] = []
        for number, rule in enumerate(self.rules):
            for pattern in rule.match.hosts or (HostPattern("", 2),):
                if not pattern.name:
                    self._anywhere.append(number)
                else:
                    index = (self._exact, self._under, self._below)[pattern.depth]
                    index.setdefault(pattern.name, []).append(number)
        self._naming = lru_cache(maxsize=1024)(self._find)

    def candidates(self, host: Host) -> tuple[Rule, ...]:
        """The rules that name `host`, in order. What resolves names over HTTPS no wildcard allows."""
        return self._naming(host.name)

    def _find(self, name: str) -> tuple[Rule, ...]:
        numbers = set(self._anywhere)
        numbers.update(self._exact.get(name, ()))
        _, _, parent = name.partition(".")
        numbers.update(self._under.get(parent, ()))
        while parent:
            numbers.update(self._below.get(parent, ()))
            _, _, parent = parent.partition(".")
        found = tuple(self.rules[number] for number in sorted(numbers))
        if name in DNS_OVER_HTTPS:
            return tuple(rule for rule in found if rule.action is Verdict.BLOCK or _names(rule, name))
        return found


def _names(rule: Rule, name: str) -> bool:
    return any(not pattern.depth and pattern.name == name for pattern in rule.match.hosts)


def decide(policy: Policy, agent: Agent, view: RequestView) -> Decision:
    """Decide one request: a matching block rule always wins, else the first allow rule that matches, else blocked."""
    if agent.state is not AgentState.ACTIVE:
        return Decision(reason=Reason.AGENT_KILLED)
    if view.method in NEVER_FORWARDED:
        return Decision(reason=Reason.PROTOCOL_NOT_ALLOWED, detail=f"{view.method} is never forwarded.")
    allowed, upgrade_refused = None, False
    too_large = view.body is not None and view.body.too_large
    unseen = False  # what a rule had to see of the body
    for rule in policy.candidates(view.host):
        if rule.action is Verdict.ALLOW and allowed:
            continue
        missing = rule.unmet(agent, view)
        if missing:
            upgrade_refused |= missing == "websocket" and rule.action is Verdict.ALLOW
            unseen |= missing == "body" and too_large
        elif rule.action is Verdict.BLOCK:
            reason = Reason.BODY_TOO_LARGE if too_large and rule.match.body else Reason.BLOCKED
            return Decision(reason=reason, rule=rule)
        else:
            allowed = rule
    if allowed:
        return Decision(Verdict.ALLOW, Reason.ALLOWED, allowed)
    if upgrade_refused:
        return Decision(reason=Reason.PROTOCOL_NOT_ALLOWED, detail=f"No rule allows an upgrade to {view.upgrade}.")
    return Decision(reason=Reason.BODY_TOO_LARGE if unseen else Reason.NO_RULE)
