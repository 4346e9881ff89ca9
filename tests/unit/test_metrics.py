"""Metrics: the contract's names and labels, bounded series, and text that Prometheus reads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections import Counter

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proxy import __version__, metrics
from proxy.agent import Agent
from proxy.exchange import Exchange, Injected
from proxy.metrics import Metrics, Taken
from proxy.reason import Reason

CONTRACT = {  # sample name -> its labels
    "sallyport_requests_total": {"agent", "verdict", "reason"},
    "sallyport_rule_requests_total": {"rule", "verdict"},
    "sallyport_request_duration_seconds_count": {"verdict"},
    "sallyport_decision_duration_seconds_count": set(),
    "sallyport_upstream_duration_seconds_count": set(),
    "sallyport_bytes_total": {"agent", "direction"},
    "sallyport_credentials_injected_total": {"agent", "credential"},
    "sallyport_secrets_redacted_total": {"agent", "credential", "where"},
    "sallyport_limits_exceeded_total": {"agent", "rule", "limit"},
    "sallyport_connections": {"listener"},
    "sallyport_agents": {"state"},
    "sallyport_agent_series_dropped_total": set(),
    "sallyport_rules": set(),
    "sallyport_rules_reloads_total": {"result"},
    "sallyport_rules_last_reload_success_timestamp_seconds": set(),
    "sallyport_store_up": set(),
    "sallyport_vault_operations_total": {"operation", "result"},
    "sallyport_audit_dropped_total": set(),
    "sallyport_identity_proofs_total": {"proof"},
    "sallyport_requests_replayed_total": set(),
    "sallyport_certificates_minted_total": set(),
    "sallyport_worker_restarts_total": {"worker"},
    "sallyport_build_info": {"version", "mitmproxy", "python"},
    "process_resident_memory_bytes": set(),
}


class Clock:
    """Monotonic seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """The time now."""
        return self.now


def exchange(agent: str = "coder-1", **changes: object) -> Exchange:
    made = Exchange(
        id="01J",
        time=1.7e9,
        listener="127.0.0.1:8080",
        client="127.0.0.1:5000",
        agent=Agent(agent) if agent else None,
        method="GET",
        scheme="https",
        host="host-the-sandbox-chose.test",
        port=443,
        identity=("gateway:one", "network"),
        path="/path-the-sandbox-chose",
        allowed=True,
        reason=Reason.ALLOWED,
        rule="github-read",
        injected=[Injected("github", 1, "header:authorization")],
        redacted=Counter({("github", "body"): 2}),
        status=200,
        request_bytes=10,
        response_bytes=200,
        duration=0.02,
        decision_duration=15e-6,
        upstream_duration=0.01,
    )
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def samples(of: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """What a scrape says; fails where a series or a family is there twice."""
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    families: set[str] = set()
    for family in text_string_to_metric_families(of.exposition().decode()):
        assert family.name not in families
        families.add(family.name)
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found
            found[key] = sample.value
    return found


def value(of: Metrics, name: str, **labels: str) -> float | None:
    return samples(of).get((f"sallyport_{name}", frozenset(labels.items())))


def everything() -> Metrics:
    """Metrics in which every family has a series."""
    made = Metrics()
    made.record(exchange())
    made.limit_exceeded("coder-1", "github-read", "rate")
    made.connection("127.0.0.1:8080", +1)
    made.vault_operation("open", "ok")
    made.worker_restarted(1)
    return made


def test_every_metric_of_the_contract_is_there_with_its_labels() -> None:
    """Names and label names are what dashboards rely on."""
    found = {name: {label for label, _ in labels} for name, labels in samples(everything())}
    assert {name: found.get(name) for name in CONTRACT} == CONTRACT


def test_nothing_beyond_the_contract_is_exported() -> None:
    """A series nobody asked for is a name that cannot be changed later."""
    names = {name for name, _ in samples(everything()) if name.startswith("sallyport_")}
    histograms = {name.removesuffix("_count") + end for name in CONTRACT for end in ("_sum", "_bucket")}
    assert names <= CONTRACT.keys() | histograms


def test_promtool_finds_nothing_to_complain_about() -> None:
    """Where promtool is installed it lints the names; the parser of prometheus_client reads them everywhere."""
    text = everything().exposition()
    assert text.endswith(b"\n")
    if promtool := shutil.which("promtool"):
        done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, timeout=30)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_an_exchange_is_counted_once_in_each_family() -> None:
    """One exchange, one request, its bytes, its credential and its redactions."""
    made = Metrics()
    made.record(exchange())
    assert value(made, "requests_total", agent="coder-1", verdict="allow", reason="allowed") == 1
    assert value(made, "rule_requests_total", rule="github-read", verdict="allow") == 1
    assert value(made, "bytes_total", agent="coder-1", direction="request") == 10
    assert value(made, "bytes_total", agent="coder-1", direction="response") == 200
    assert value(made, "credentials_injected_total", agent="coder-1", credential="github") == 1
    assert value(made, "secrets_redacted_total", agent="coder-1", credential="github", where="body") == 2
    assert value(made, "request_duration_seconds_count", verdict="allow") == 1
    assert value(made, "decision_duration_seconds_bucket", le="1e-05") == 0
    assert value(made, "decision_duration_seconds_bucket", le="2e-05") == 1
    assert value(made, "upstream_duration_seconds_sum") == 0.01


def test_a_refusal_that_asked_no_upstream_has_no_upstream_duration() -> None:
    """None is not zero seconds."""
    made = Metrics()
    made.record(exchange(allowed=False, reason=Reason.NO_RULE, rule="", upstream_duration=None))
    assert value(made, "upstream_duration_seconds_count") == 0
    assert value(made, "requests_total", agent="coder-1", verdict="block", reason="no_rule") == 1
    assert value(made, "rule_requests_total", rule="_none", verdict="block") == 1


def test_a_requester_without_identity_is_counted_as_none() -> None:
    """`_none` cannot be an agent's id and takes no place in the LRU."""
    made = Metrics()
    made.record(exchange(agent="", allowed=False, reason=Reason.NO_IDENTITY))
    assert value(made, "requests_total", agent="_none", verdict="block", reason="no_identity") == 1
    assert value(made, "agent_series_dropped_total") == 0


def test_no_label_holds_a_host_or_path() -> None:
    """What a sandbox chose would make the series unbounded."""
    assert b"the-sandbox-chose" not in everything().exposition()


def test_the_agent_beyond_the_limit_is_counted_as_other() -> None:
    """Busy agents keep their series; a crowd of newcomers cannot throw them out."""
    made = Metrics(Clock())
    for number in range(metrics.AGENTS + 2):
        made.record(exchange(f"agent-{number}"))
    made.record(exchange("agent-0"))
    assert value(made, "requests_total", agent="agent-0", verdict="allow", reason="allowed") == 2
    assert value(made, "requests_total", agent="_other", verdict="allow", reason="allowed") == 2
    assert value(made, "credentials_injected_total", agent="_other", credential="github") == 2
    assert value(made, "agent_series_dropped_total") == 2


def test_a_newcomer_takes_the_place_of_an_idle_agent() -> None:
    """Ten minutes of silence free a place, though no scrape came in between."""
    clock = Clock()
    made = Metrics(clock)
    for number in range(metrics.AGENTS):
        made.record(exchange(f"agent-{number}"))
    clock.now += metrics.IDLE - 1
    made.record(exchange("agent-0"))
    clock.now += 1
    made.record(exchange("newcomer"))
    agents = {dict(labels).get("agent") for _, labels in samples(made)}
    assert agents - {None} == {"agent-0", "newcomer"}


def test_an_idle_agent_leaves_every_family_and_is_added_to_none() -> None:
    """Its counts were scraped before; added to `_other`, rate() would see them again."""
    clock = Clock()
    made = Metrics(clock)
    made.record(exchange())
    made.limit_exceeded("coder-1", "github-read", "rate")
    clock.now += metrics.IDLE
    text = made.exposition()
    assert b'"coder-1"' not in text
    assert b'"_other"' not in text
    assert value(made, "agent_series_dropped_total") == 1
    assert value(made, "rule_requests_total", rule="github-read", verdict="allow") == 1


def test_an_agent_that_returns_counts_from_zero() -> None:
    """Prometheus takes it as a counter reset."""
    clock = Clock()
    made = Metrics(clock)
    made.record(exchange())
    made.record(exchange())
    clock.now += metrics.IDLE
    made.exposition()
    made.record(exchange())
    assert value(made, "requests_total", agent="coder-1", verdict="allow", reason="allowed") == 1


def test_thousands_of_agents_leave_a_bounded_number_of_series() -> None:
    """Agents that come and go, one by one or all at once."""
    clock = Clock()
    made = Metrics(clock)
    for number in range(5 * metrics.AGENTS):
        made.record(exchange(f"agent-{number}"))
        clock.now += 0.7
    owners = {dict(labels)["agent"] for _, labels in samples(made) if "agent" in dict(labels)}
    assert len(owners) <= metrics.AGENTS + 1


def test_rules_of_ever_new_names_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator that renames its rules at each reload does not fill the memory."""
    monkeypatch.setattr(metrics, "RULE_SERIES", 3)
    made = Metrics()
    for name in ("a", "b", "c", "d", "e", "a"):
        made.record(exchange(rule=name))
    assert value(made, "rule_requests_total", rule="a", verdict="allow") == 2
    assert value(made, "rule_requests_total", rule="_other", verdict="allow") == 2
    assert value(made, "rule_requests_total", rule="e", verdict="allow") is None


@pytest.mark.parametrize("name", ['say "hi"', "back\\slash", "two\nlines", "dé}{=,", ""])
def test_odd_names_survive_the_text_format(name: str) -> None:
    """A rule's name is free text."""
    made = Metrics()
    made.record(exchange(rule=name))
    assert value(made, "rule_requests_total", rule=name or "_none", verdict="allow") == 1


def test_a_lone_surrogate_does_not_break_the_scrape() -> None:
    """UTF-8 cannot carry it."""
    made = Metrics()
    made.record(exchange(rule="a\udc80"))
    assert value(made, "rule_requests_total", rule="a?", verdict="allow") == 1


def test_a_failed_reload_keeps_the_number_of_rules_in_force() -> None:
    """The last good policy still decides."""
    made = Metrics()
    made.reloaded(True, 7, 1.7e9)
    made.reloaded(False, 0, 1.8e9)
    assert value(made, "rules") == 7
    assert value(made, "rules_last_reload_success_timestamp_seconds") == 1.7e9
    assert value(made, "rules_reloads_total", result="success") == 1
    assert value(made, "rules_reloads_total", result="failure") == 1


def test_the_store_is_down_until_something_says_it_is_up() -> None:
    """The zero value alarms."""
    assert value(Metrics(), "store_up") == 0


def test_gauges_are_read_when_scraped() -> None:
    """A state that nobody is in any more goes back to zero."""
    made = Metrics()
    agents = {"active": 3, "killed": 1}
    made.watch(agents=lambda: agents, store_up=lambda: True)
    assert value(made, "agents", state="killed") == 1
    agents = {"active": 4}
    assert value(made, "agents", state="active") == 4
    assert value(made, "agents", state="killed") == 0
    assert value(made, "store_up") == 1


def test_connections_go_up_and_down() -> None:
    """A gauge, by listener."""
    made = Metrics()
    for change in (+1, +1, -1):
        made.connection("127.0.0.1:8080", change)
    assert value(made, "connections", listener="127.0.0.1:8080") == 1


def test_dropped_audit_lines_are_counted_from_other_threads() -> None:
    """The audit log's writer is a thread of its own."""
    made = Metrics()
    threads = [threading.Thread(target=lambda: [made.audit_dropped(1) for _ in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value(made, "audit_dropped_total") == 2000


def test_two_proxies_in_one_process_share_nothing() -> None:
    """No global registry."""
    one, two = Metrics(), Metrics()
    one.certificate_minted()
    assert value(one, "certificates_minted_total") == 1
    assert value(two, "certificates_minted_total") == 0


def test_build_info_names_the_versions() -> None:
    """Of the proxy, mitmproxy and Python."""
    (labels,) = [dict(labels) for name, labels in samples(Metrics()) if name == "sallyport_build_info"]
    assert labels["version"] == __version__
    assert labels["mitmproxy"].startswith("12.")
    assert labels["python"].startswith("3.")


def carried(taken: object) -> Taken:
    """As it arrives in another process."""
    back: Taken = json.loads(json.dumps(taken))
    return back


def test_what_workers_counted_adds_up_to_what_one_would_have_counted() -> None:
    """Every series of every counter and histogram, each exchange once, however often it is taken."""
    one, workers, whole = everything(), [everything(), everything()], Metrics()
    one.record(exchange("coder-2", allowed=False, reason=Reason.NO_RULE, rule=""))
    for worker in workers:
        worker.reloaded(False, 0, 0.0)
        worker.audit_dropped(3)
        whole.add(carried(worker.take()))
    whole.add(carried(one.take()))
    one_alone, summed = samples(everything()), samples(whole)
    three = {"sallyport_requests_total", "sallyport_credentials_injected_total", "sallyport_vault_operations_total"}
    for key, number in one_alone.items():
        if key[0] in three and number:
            assert summed[key] == 3 * number
    assert value(whole, "requests_total", agent="coder-2", verdict="block", reason="no_rule") == 1
    assert value(whole, "audit_dropped_total") == 6
    assert value(whole, "rules_reloads_total", result="failure") == 2
    assert value(whole, "request_duration_seconds_count", verdict="allow") == 3
    assert value(whole, "request_duration_seconds_count", verdict="block") == 1
    before = whole.exposition()
    whole.add(carried(workers[0].take()))
    assert [line for line in before.splitlines() if line.startswith(b"sallyport_")] == [
        line for line in whole.exposition().splitlines() if line.startswith(b"sallyport_")
    ]


def test_counting_goes_on_after_it_was_taken() -> None:
    """An agent's series are kept by who counts; nothing of theirs may be forgotten then."""
    worker, whole = Metrics(), Metrics()
    for _ in range(3):
        worker.record(exchange())
        whole.add(carried(worker.take()))
    assert value(whole, "requests_total", agent="coder-1", verdict="allow", reason="allowed") == 3
    assert value(whole, "request_duration_seconds_count", verdict="allow") == 3
    assert value(whole, "rule_requests_total", rule="github-read", verdict="allow") == 3


def test_the_agents_of_all_workers_are_bounded_together() -> None:
    """Five hundred, not five hundred for each."""
    whole = Metrics(Clock())
    for worker in range(3):
        made = Metrics(Clock())
        for number in range(metrics.AGENTS):
            made.record(exchange(f"agent-{worker}-{number}"))
        whole.add(carried(made.take()))
    owners = {dict(labels)["agent"] for _, labels in samples(whole) if "agent" in dict(labels)}
    assert len(owners) == metrics.AGENTS + 1
    assert value(whole, "requests_total", agent="_other", verdict="allow", reason="allowed") == 2 * metrics.AGENTS


def test_gauges_of_workers_are_shown_as_they_are_now() -> None:
    """Connections in sum; the rules in force are the same for all."""
    workers, whole = [Metrics(), Metrics()], Metrics()
    for worker in workers:
        worker.connection("127.0.0.1:8080", 2)
        worker.reloaded(True, 7, 1.7e9)
    whole.show([carried(worker.take()) for worker in workers])
    assert value(whole, "connections", listener="127.0.0.1:8080") == 4
    assert value(whole, "rules") == 7
    whole.show([carried(workers[0].take())])
    assert value(whole, "connections", listener="127.0.0.1:8080") == 2
    assert value(whole, "rules_last_reload_success_timestamp_seconds") == 1.7e9


def test_processes_are_told_apart_by_worker() -> None:
    """One process has no label; each of several has its own, in one family."""
    made = Metrics()
    assert ("process_resident_memory_bytes", frozenset()) in samples(made)
    made.watch_processes(lambda: {"1": os.getpid(), "2": os.getppid()})
    found = {labels for name, labels in samples(made) if name == "process_resident_memory_bytes"}
    assert found == {frozenset({("worker", "1")}), frozenset({("worker", "2")})}


def test_proofs_are_counted_by_kind() -> None:
    """A gateway's name is no label."""
    counted = Metrics()
    for number in range(3):
        counted.record(exchange(identity=(f"gateway:{number}", "network")))
    counted.record(exchange(agent="", identity=()))
    assert value(counted, "identity_proofs_total", proof="gateway") == 3
    assert value(counted, "identity_proofs_total", proof="network") == 3
