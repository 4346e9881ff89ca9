"""What Prometheus scrapes: every number of one proxy, counted here and nowhere else.

Belongs to the event loop's thread; only `audit_dropped` may be called from another one. Label values are names an
operator wrote or words of ours, never a host or path that a sandbox chose. Nothing here serves HTTP.

The per-agent and per-rule families are plain dictionaries written out as text: 500 agents with 3,500 series cost a
scrape 5 ms of the event loop so, and 60 ms as prometheus_client children.
"""

from __future__ import annotations

import platform
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from importlib import metadata

from prometheus_client import (
    CONTENT_TYPE_PLAIN_0_0_4,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from proxy import __version__
from proxy.agent import AgentState
from proxy.exchange import Exchange

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
AGENTS = 500
IDLE = 600.0  # seconds after which an agent's series are given up
RULE_SERIES = 20_000  # 10,000 rules with both verdicts; reloads with ever new names stop growing here
OTHER = "_other"  # neither can be an agent's id, which begins with a letter or digit
NONE = "_none"

_DECISION = (5e-6, 10e-6, 20e-6, 50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 50e-3)
_REQUEST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_UPSTREAM = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

_AGENT_FAMILIES = (  # attribute of _Series, metric, labels after `agent`, help
    ("requests", "requests_total", ("verdict", "reason"), "Requests by agent, verdict and reason."),
    ("bytes", "bytes_total", ("direction",), "Body bytes by agent, in requests and in responses."),
    ("injected", "credentials_injected_total", ("credential",), "Credentials added to requests."),
    ("redacted", "secrets_redacted_total", ("credential", "where"), "Secrets taken out of responses."),
    ("limits", "limits_exceeded_total", ("rule", "limit"), "Requests refused by a limit of a rule."),
)
_REQUEST_BYTES, _RESPONSE_BYTES = ("request",), ("response",)

type _Counts = defaultdict[tuple[str, ...], int]


class _Series:
    """One agent's counters by label values; dropping the object drops all of them."""

    __slots__ = ("bytes", "injected", "limits", "redacted", "requests", "used")

    def __init__(self) -> None:
        self.used = 0.0
        self.requests: _Counts = defaultdict(int)
        self.bytes: _Counts = defaultdict(int)
        self.injected: _Counts = defaultdict(int)
        self.redacted: _Counts = defaultdict(int)
        self.limits: _Counts = defaultdict(int)


class Metrics:
    """The metrics of one proxy on a registry of its own; `clock` gives monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._agents: OrderedDict[str, _Series] = OrderedDict()  # longest idle first
        self._rest = {OTHER: _Series(), NONE: _Series()}
        self._rules: _Counts = defaultdict(int)
        self._agent_states: Callable[[], Mapping[str, int]] = dict
        self._store_up: Callable[[], bool] = bool
        self._registry = CollectorRegistry()
        # Process-wide: without it every counter has a second series, *_created, which Prometheus does not use.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        ProcessCollector(registry=self._registry)
        self._build_histograms()
        self._build_counters()
        self._build_gauges()

    def _build_histograms(self) -> None:
        request = Histogram(
            "sallyport_request_duration_seconds",
            "The whole exchange, by verdict.",
            ["verdict"],
            buckets=_REQUEST,
            registry=self._registry,
        )
        self._request_seconds = {verdict: request.labels(verdict) for verdict in ("allow", "block")}
        self._decision_seconds = Histogram(
            "sallyport_decision_duration_seconds", "Deciding.", buckets=_DECISION, registry=self._registry
        )
        self._upstream_seconds = Histogram(
            "sallyport_upstream_duration_seconds",
            "From asking the upstream to its first byte.",
            buckets=_UPSTREAM,
            registry=self._registry,
        )

    def _build_counters(self) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"sallyport_{name}", text, labels, registry=self._registry)

        self._series_dropped = counter(
            "agent_series_dropped_total", f"Idle agents given up, and records counted under {OTHER}."
        )
        reloads = counter("rules_reloads_total", "Loads of the rules, by result.", "result")
        self._reloads = {ok: reloads.labels("success" if ok else "failure") for ok in (True, False)}
        self._vault = counter("vault_operations_total", "Operations of the vault.", "operation", "result")
        self._audit_dropped = counter("audit_dropped_total", "Exchanges missing in the audit log.")
        self._minted = counter("certificates_minted_total", "Leaf certificates made.")

    def _build_gauges(self) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"sallyport_{name}", text, labels, registry=self._registry)

        self._connections = gauge("connections", "Open client connections.", "listener")
        agents = gauge("agents", "Registered agents.", "state")
        self._agent_gauges = {state: agents.labels(state) for state in (*AgentState, "expired")}
        self._rule_count = gauge("rules", "Rules in force.")
        self._last_reload = gauge("rules_last_reload_success_timestamp_seconds", "When rules last loaded, Unix time.")
        self._store_gauge = gauge("store_up", "1 while the store answers.")
        versions = __version__, metadata.version("mitmproxy"), platform.python_version()
        gauge("build_info", "Always 1.", "version", "mitmproxy", "python").labels(*versions).set(1)

    def watch(self, agents: Callable[[], Mapping[str, int]], store_up: Callable[[], bool]) -> None:
        """Read these at each scrape: agents by state, and whether the store answers. Neither may block or raise."""
        self._agent_states, self._store_up = agents, store_up

    def record(self, exchange: Exchange) -> None:
        """Count one exchange, after it ended."""
        verdict = exchange.verdict
        series = self._series(exchange.agent_id or NONE)
        series.requests[verdict, exchange.reason] += 1
        series.bytes[_REQUEST_BYTES] += exchange.request_bytes
        series.bytes[_RESPONSE_BYTES] += exchange.response_bytes
        for injected in exchange.injected:
            series.injected[injected.credential,] += 1
        for labels, times in exchange.redacted.items():
            series.redacted[labels] += times
        rule = exchange.rule or NONE, verdict
        self._rules[rule if rule in self._rules or len(self._rules) < RULE_SERIES else (OTHER, verdict)] += 1
        self._request_seconds[verdict].observe(exchange.duration)
        self._decision_seconds.observe(exchange.decision_duration)
        if exchange.upstream_duration is not None:
            self._upstream_seconds.observe(exchange.upstream_duration)

    def limit_exceeded(self, agent: str, rule: str, limit: str) -> None:
        """A limit (`rate`, `concurrency`, ...) of `rule` refused `agent`."""
        self._series(agent or NONE).limits[rule or NONE, limit] += 1

    def certificate_minted(self) -> None:
        """A leaf certificate was made."""
        self._minted.inc()

    def vault_operation(self, operation: str, result: str) -> None:
        """The vault did `operation` (put, open, ...) with `result` (ok, missing, ...): fixed words both."""
        self._vault.labels(operation, result).inc()

    def reloaded(self, ok: bool, rules: int, when: float) -> None:
        """Rules were loaded at `when` (Unix seconds); if not `ok`, the `rules` before stay in force and are not set."""
        self._reloads[ok].inc()
        if ok:
            self._rule_count.set(rules)
            self._last_reload.set(when)

    def connection(self, listener: str, change: int) -> None:
        """A client connection opened (+1) or closed (-1) on `listener`, spelt as in the settings."""
        self._connections.labels(listener).inc(change)

    def audit_dropped(self, lines: int) -> None:
        """So many exchanges are not in the audit log. May be called from any thread."""
        self._audit_dropped.inc(lines)

    def exposition(self) -> bytes:
        """Everything in the Prometheus text format (version 0.0.4), to be sent as `CONTENT_TYPE`."""
        self._give_up_idle()
        states = self._agent_states()
        for state, child in self._agent_gauges.items():
            child.set(states.get(state, 0))
        self._store_gauge.set(self._store_up())
        return generate_latest(self._registry) + "".join(self._text()).encode()

    def _series(self, agent: str) -> _Series:
        """The counters for `agent`: its own, or `_other` where `AGENTS` busier ones have theirs.

        An agent that was given up begins at zero when it returns, which Prometheus takes as a counter reset. What it
        had counted is not added to `_other`: it was scraped already, and rate() would see it twice.
        """
        series = self._agents.get(agent)
        if series is None:
            if agent in self._rest:
                return self._rest[agent]
            if len(self._agents) >= AGENTS:
                self._give_up_idle()
            if len(self._agents) >= AGENTS:
                self._series_dropped.inc()
                return self._rest[OTHER]
            series = self._agents[agent] = _Series()
        self._agents.move_to_end(agent)
        series.used = self._clock()
        return series

    def _give_up_idle(self) -> None:
        horizon = self._clock() - IDLE
        while self._agents and next(iter(self._agents.values())).used <= horizon:
            self._agents.popitem(last=False)
            self._series_dropped.inc()

    def _text(self) -> Iterator[str]:
        owners = {**self._rest, **self._agents}
        for attribute, name, labels, text in _AGENT_FAMILIES:
            yield _head(name, text)
            for agent, series in owners.items():
                prefix = f'sallyport_{name}{{agent="{_escaped(agent)}",'
                yield from _lines(prefix, labels, getattr(series, attribute))
        yield _head("rule_requests_total", "Requests by the rule that decided, and its verdict.")
        yield from _lines("sallyport_rule_requests_total{", ("rule", "verdict"), self._rules)


def _head(name: str, text: str) -> str:
    return f"# HELP sallyport_{name} {text}\n# TYPE sallyport_{name} counter\n"


def _lines(prefix: str, names: tuple[str, ...], counts: _Counts) -> list[str]:
    return [f"{prefix}{_labels(names, values)}}} {count}\n" for values, count in counts.items()]


@lru_cache(maxsize=4096)  # hundreds of agents share a few sets of labels
def _labels(names: tuple[str, ...], values: tuple[str, ...]) -> str:
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True))


def _escaped(value: str) -> str:
    """A label value as the text format wants it; a lone surrogate, which UTF-8 cannot carry, becomes `?`."""
    value = value.encode("utf-8", "replace").decode()
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
