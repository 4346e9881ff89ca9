"""What Prometheus scrapes: every number of one proxy, counted here and nowhere else.

Belongs to the event loop's thread; only `audit_dropped` may be called from another one. Label values are names an
operator wrote or words of ours, never a host or path that a sandbox chose. Nothing here serves HTTP.

All of it is plain numbers written out as text: 500 agents with 3,500 series cost a scrape 5 ms of the event loop so,
and 60 ms as children of prometheus_client; and what one worker counted can be taken and added to the supervisor's.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from importlib import metadata
from typing import Any

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, ProcessCollector

from proxy import __version__, series
from proxy.agent import AgentState
from proxy.exchange import Exchange
from proxy.series import Counts, Histogram

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
AGENTS = 500
IDLE = 600.0  # seconds after which an agent's series are given up
RULE_SERIES = 20_000  # 10,000 rules with both verdicts; reloads with ever new names stop growing here
OTHER = "_other"  # neither can be an agent's id, which begins with a letter or digit
NONE = "_none"

_DECISION = (5e-6, 10e-6, 20e-6, 50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 50e-3)
_REQUEST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_UPSTREAM = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

_FAMILIES = {  # attribute of _Series: metric, labels after `agent`, help
    "requests": ("requests_total", ("verdict", "reason"), "Requests by agent, verdict and reason."),
    "bytes": ("bytes_total", ("direction",), "Body bytes by agent, in requests and in responses."),
    "injected": ("credentials_injected_total", ("credential",), "Credentials added to requests."),
    "redacted": ("secrets_redacted_total", ("credential", "where"), "Secrets taken out of responses."),
    "leaks": ("leaks_refused_total", ("kind", "where"), "Requests that held what may not leave."),
    "limits": ("limits_exceeded_total", ("rule", "limit"), "Requests refused by a limit of a rule."),
}
_RULES, _DROPPED, _SERIES_DROPPED = "rule_requests_total", "audit_dropped_total", "agent_series_dropped_total"
_PROOFS = "identity_proofs_total"
_REPLAYED = "requests_replayed_total"
_RESTARTS = "worker_restarts_total"
_RELOADED = "rules_last_reload_success_timestamp_seconds"
type _Families = dict[str, tuple[tuple[str, ...], str]]  # metric: labels, help
_COUNTERS: _Families = {
    _RULES: (("rule", "verdict"), "Requests by the rule that decided, and its verdict."),
    _SERIES_DROPPED: ((), f"Idle agents given up, and records counted under {OTHER}."),
    "rules_reloads_total": (("result",), "Loads of the rules, by result."),
    "vault_operations_total": (("operation", "result"), "Operations of the vault."),
    _DROPPED: ((), "Exchanges missing in the audit log."),
    _PROOFS: (("proof",), "Identified exchanges by the kind of proof."),
    _REPLAYED: ((), "Requests decided as the same bytes were before, because nothing had changed."),
    "certificates_minted_total": ((), "Leaf certificates made."),
    _RESTARTS: (("worker",), "Workers that ended by themselves and were replaced."),
}
_GAUGES: _Families = {
    "connections": (("listener",), "Open client connections."),
    "agents": (("state",), "Registered agents."),
    "rules": ((), "Rules in force."),
    _RELOADED: ((), "When rules last loaded, Unix time."),
    "store_up": ((), "1 while the store answers."),
    "build_info": (("version", "mitmproxy", "python"), "Always 1."),
}
_SHOWN = ("connections", "rules", _RELOADED)  # of other processes
_REQUEST_BYTES, _RESPONSE_BYTES = ("request",), ("response",)

_PENDING = 256  # tallies that wait for a scrape

type Taken = dict[str, Any]  # plain data: see `Metrics.take`


class _Series:
    """One agent's counters by label values; dropping the object drops all of them."""

    __slots__ = ("bytes", "injected", "leaks", "limits", "redacted", "requests", "used")

    def __init__(self) -> None:
        self.used = 0.0
        self.requests: Counts = defaultdict(int)
        self.bytes: Counts = defaultdict(int)
        self.injected: Counts = defaultdict(int)
        self.redacted: Counts = defaultdict(int)
        self.leaks: Counts = defaultdict(int)
        self.limits: Counts = defaultdict(int)


@lru_cache(maxsize=1024)
def _kind(proof: str) -> tuple[str]:
    """The label of a proof: `gateway` of `gateway:NAME`."""
    return (proof.partition(":")[0],)


class Tally:
    """What exchanges count under that differ in sizes and durations alone, and how many there were since the last
    scrape: to find their series each time costs more than all else that is counted."""

    __slots__ = ("agent", "injected", "leases", "proofs", "received", "request", "rule", "sent", "times")

    def __init__(self, exchange: Exchange, leases: int = 0) -> None:
        """`leases`: those that each of the exchanges uses without asking the vault."""
        verdict = exchange.verdict
        self.agent = exchange.agent_id or NONE
        self.request = verdict, exchange.reason
        self.injected = [(injected.credential,) for injected in exchange.injected]
        self.rule = exchange.rule or NONE, verdict
        self.proofs = [_kind(proof) for proof in exchange.identity]
        self.leases = leases
        self.times = self.sent = self.received = 0


def _counts(labels: tuple[str, ...]) -> Counts:
    """Without labels there is one series from the start."""
    return defaultdict(int) if labels else defaultdict(int, {(): 0})


class Metrics:
    """The metrics of one proxy; `clock` gives monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._agents: OrderedDict[str, _Series] = OrderedDict()  # longest idle first
        self._rest = {OTHER: _Series(), NONE: _Series()}
        self._agent_states: Callable[[], Mapping[str, int]] = dict
        self._store_up: Callable[[], bool] = bool
        self._processes: Callable[[], Mapping[str, int]] = lambda: {"": os.getpid()}
        self._request_seconds = {verdict: Histogram(_REQUEST) for verdict in ("allow", "block")}
        self._decision_seconds = Histogram(_DECISION)
        self._upstream_seconds = Histogram(_UPSTREAM)
        self._counters = {name: _counts(labels) for name, (labels, _) in _COUNTERS.items()}
        self._gauges = {name: _counts(labels) for name, (labels, _) in _GAUGES.items()}
        self._rules = self._counters[_RULES]
        self._proofs = self._counters[_PROOFS]
        self._pending: list[Tally] = []
        self._dropped_lock = threading.Lock()
        for result in ("success", "failure"):
            self._counters["rules_reloads_total"][result,] = 0
        versions = __version__, metadata.version("mitmproxy"), platform.python_version()
        self._gauges["build_info"][versions] = 1

    def watch(self, agents: Callable[[], Mapping[str, int]], store_up: Callable[[], bool]) -> None:
        """Read these at each scrape: agents by state, and whether the store answers. Neither may block or raise."""
        self._agent_states, self._store_up = agents, store_up

    def watch_processes(self, processes: Callable[[], Mapping[str, int]]) -> None:
        """Tell of these processes, by the value of their label `worker`, instead of this one."""
        self._processes = processes

    def record(self, exchange: Exchange) -> None:
        """Count one exchange, after it ended."""
        tally = Tally(exchange)
        tally.times, tally.sent, tally.received = 1, exchange.request_bytes, exchange.response_bytes
        its = self._count(tally)
        for labels, times in exchange.redacted.items():
            its.redacted[labels] += times
        if exchange.leak:
            kind, _, where = exchange.leak
            its.leaks[kind, where] += 1
        self._observe(exchange.verdict, exchange.duration, exchange.decision_duration, exchange.upstream_duration)

    def repeat(
        self, tally: Tally, sent: int, received: int, duration: float, decision: float, upstream: float | None
    ) -> None:
        """Count one more exchange that was decided before, after it ended: body bytes, and seconds."""
        if not tally.times:
            if len(self._pending) >= _PENDING:
                self._count_pending()
            self._pending.append(tally)
        tally.times += 1
        tally.sent += sent
        tally.received += received
        self._observe(tally.rule[1], duration, decision, upstream)

    def _observe(self, verdict: str, duration: float, decision: float, upstream: float | None) -> None:
        self._request_seconds[verdict].observe(duration)
        self._decision_seconds.observe(decision)
        if upstream is not None:
            self._upstream_seconds.observe(upstream)

    def _count_pending(self) -> None:
        for tally in self._pending:
            self._count(tally)
            self.replayed(tally.leases, tally.times)
            tally.times = tally.sent = tally.received = 0
        self._pending.clear()

    def _count(self, tally: Tally) -> _Series:
        """Add a tally to the series of its agent, and of all."""
        times, its = tally.times, self._series(tally.agent, tally.times)
        its.requests[tally.request] += times
        its.bytes[_REQUEST_BYTES] += tally.sent
        its.bytes[_RESPONSE_BYTES] += tally.received
        for credential in tally.injected:
            its.injected[credential] += times
        self._rules[self._rule_labels(*tally.rule)] += times
        for proof in tally.proofs:
            self._proofs[proof] += times
        return its

    def limit_exceeded(self, agent: str, rule: str, limit: str) -> None:
        """A limit (`rate`, `concurrency`, ...) of `rule` refused `agent`."""
        self._series(agent or NONE).limits[rule or NONE, limit] += 1

    def certificate_minted(self) -> None:
        """A leaf certificate was made."""
        self._counters["certificates_minted_total"][()] += 1

    def replayed(self, leases: int, times: int = 1) -> None:
        """So many requests were not decided anew; each uses so many leases."""
        self._counters[_REPLAYED][()] += times
        if leases:
            self._counters["vault_operations_total"]["lease", "ok"] += leases * times

    def vault_operation(self, operation: str, result: str) -> None:
        """The vault did `operation` (put, open, ...) with `result` (ok, missing, ...): fixed words both."""
        self._counters["vault_operations_total"][operation, result] += 1

    def expect_workers(self, numbers: Iterable[int]) -> None:
        """These workers are there, and have not been replaced yet: increase() must see the first time."""
        self._counters[_RESTARTS].update({(str(number),): 0 for number in numbers})

    def worker_restarted(self, number: int) -> None:
        """A worker ended although nobody told it to."""
        self._counters[_RESTARTS][str(number),] += 1

    def reloaded(self, ok: bool, rules: int, when: float) -> None:
        """Rules were loaded at `when` (Unix seconds); if not `ok`, the `rules` before stay in force and are not set."""
        self._counters["rules_reloads_total"]["success" if ok else "failure",] += 1
        if ok:
            self._gauges["rules"][()] = rules
            self._gauges[_RELOADED][()] = when

    def connection(self, listener: str, change: int) -> None:
        """A client connection opened (+1) or closed (-1) on `listener`, spelt as in the settings."""
        self._gauges["connections"][listener,] += change

    def audit_dropped(self, lines: int) -> None:
        """So many exchanges are not in the audit log. May be called from any thread."""
        with self._dropped_lock:
            self._counters[_DROPPED][()] += lines

    def exposition(self) -> bytes:
        """Everything in the Prometheus text format (version 0.0.4), to be sent as `CONTENT_TYPE`."""
        self._count_pending()
        self._give_up_idle()
        states = self._agent_states()
        for state in (*AgentState, "expired"):
            self._gauges["agents"][state,] = states.get(state, 0)
        self._gauges["store_up"][()] = int(self._store_up())
        return "".join(self._text()).encode()

    def take(self) -> Taken:
        """What was counted since the last time, and the gauges as they are: for `add` and `show` of another process,
        as JSON can carry it."""
        self._count_pending()
        owners = {**self._rest, **self._agents}
        agents = {agent: {name: series.take(getattr(its, name)) for name in _FAMILIES} for agent, its in owners.items()}
        with self._dropped_lock:
            counters = {name: series.take(counts) for name, counts in self._counters.items()}
        return {
            "agents": {agent: families for agent, families in agents.items() if any(families.values())},
            "counters": counters,
            "histograms": [histogram.take() for histogram in self._histograms()],
            "gauges": {
                name: [(list(labels), value) for labels, value in self._gauges[name].items()] for name in _SHOWN
            },
        }

    def add(self, taken: Taken) -> None:
        """Count what another process took."""
        for agent, families in taken["agents"].items():
            its = self._series(agent)
            for name, counts in families.items():
                series.add(getattr(its, name), counts)
        with self._dropped_lock:
            for name, counts in taken["counters"].items():
                if name == _RULES:
                    counts = [(self._rule_labels(*labels), count) for labels, count in counts]
                series.add(self._counters[name], counts)
        for histogram, observed in zip(self._histograms(), taken["histograms"], strict=True):
            histogram.add(observed)

    def show(self, taken: Sequence[Taken]) -> None:
        """Show the gauges of other processes: connections in sum, the rest of the first, since all follow the same."""
        for name in _SHOWN:
            shown = taken if name == "connections" else taken[:1]
            self._gauges[name].clear()
            for gauges in shown:
                series.add(self._gauges[name], gauges["gauges"][name])

    def _histograms(self) -> tuple[Histogram, ...]:
        return *self._request_seconds.values(), self._decision_seconds, self._upstream_seconds

    def _rule_labels(self, rule: str, verdict: str) -> tuple[str, str]:
        labels = rule, verdict
        return labels if labels in self._rules or len(self._rules) < RULE_SERIES else (OTHER, verdict)

    def _series(self, agent: str, records: int = 1) -> _Series:
        """The counters for `agent`, for so many records: its own, or `_other` where `AGENTS` busier ones have theirs.

        An agent that was given up begins at zero when it returns, which Prometheus takes as a counter reset. What it
        had counted is not added to `_other`: it was scraped already, and rate() would see it twice.
        """
        its = self._agents.get(agent)
        if its is None:
            if agent in self._rest:
                return self._rest[agent]
            if len(self._agents) >= AGENTS:
                self._give_up_idle()
            if len(self._agents) >= AGENTS:
                self._counters[_SERIES_DROPPED][()] += records
                return self._rest[OTHER]
            its = self._agents[agent] = _Series()
        self._agents.move_to_end(agent)
        its.used = self._clock()
        return its

    def _give_up_idle(self) -> None:
        horizon = self._clock() - IDLE
        while self._agents and next(iter(self._agents.values())).used <= horizon:
            self._agents.popitem(last=False)
            self._counters[_SERIES_DROPPED][()] += 1

    def _text(self) -> Iterator[str]:
        owners = {**self._rest, **self._agents}
        for attribute, (name, labels, text) in _FAMILIES.items():
            yield series.head(f"sallyport_{name}", "counter", text)
            for agent, its in owners.items():
                before = f'agent="{series.escaped(agent)}",'
                yield from series.lines(f"sallyport_{name}", labels, getattr(its, attribute), before)
        for kind, families, counted in (("counter", _COUNTERS, self._counters), ("gauge", _GAUGES, self._gauges)):
            for name, (labels, text) in families.items():
                yield series.head(f"sallyport_{name}", kind, text)
                yield from series.lines(f"sallyport_{name}", labels, counted[name])
        yield from self._histogram_text()
        yield from _process_text(self._processes())

    def _histogram_text(self) -> Iterator[str]:
        name = "sallyport_request_duration_seconds"
        yield series.head(name, "histogram", "The whole exchange, by verdict.")
        for verdict, histogram in self._request_seconds.items():
            yield from histogram.text(name, f'verdict="{verdict}"')
        name = "sallyport_decision_duration_seconds"
        yield series.head(name, "histogram", "Deciding.")
        yield from self._decision_seconds.text(name)
        name = "sallyport_upstream_duration_seconds"
        yield series.head(name, "histogram", "From asking the upstream to its first byte.")
        yield from self._upstream_seconds.text(name)


def _process_text(processes: Mapping[str, int]) -> Iterator[str]:
    """Memory, CPU and descriptors of each process, with its label `worker` where it has one."""
    families: dict[tuple[str, str, str], list[str]] = {}
    for worker, process in processes.items():
        labels = f'{{worker="{series.escaped(worker)}"}}' if worker else ""
        for metric in ProcessCollector(pid=partial(int, process), registry=None).collect():
            of_all = families.setdefault((metric.name, metric.type, metric.documentation), [])
            of_all += [f"{sample.name}{labels} {sample.value}\n" for sample in metric.samples]
    for (name, kind, text), found in families.items():
        yield series.head(f"{name}_total" if kind == "counter" else name, kind, text)
        yield from found
