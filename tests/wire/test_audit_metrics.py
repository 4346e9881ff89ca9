"""What is counted and recorded of real traffic, and who can see it."""

from __future__ import annotations

import json
import re
import socket
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.harness import Proxy, Reply, Upstream, wait_for
from tests.wire.test_lifecycle import Stream, streaming

type Make = Callable[..., Proxy]

SECRET = "real-key-4f1e9b7c2d"
RULES = """
version: 1
rules:
  - name: api
    match: {host: api.test, path: [/v1/**, /stream]}
    action: allow
    rewrite: {headers: {set: {x-env: prod}}}
    inject: [{credential: api, as: bearer}]
  - name: no-secrets
    match: {path: /v1/secrets/**}
    action: block
  - name: closed
    match: {host: b.api.test, port: 8443}
    action: allow
"""
FAMILIES = re.findall(
    r"\S+",
    """
sallyport_requests_total sallyport_rule_requests_total sallyport_request_duration_seconds
sallyport_decision_duration_seconds sallyport_upstream_duration_seconds sallyport_bytes_total
sallyport_credentials_injected_total sallyport_secrets_redacted_total sallyport_limits_exceeded_total
sallyport_connections sallyport_agents sallyport_agent_series_dropped_total sallyport_rules
sallyport_rules_reloads_total sallyport_rules_last_reload_success_timestamp_seconds sallyport_store_up
sallyport_vault_operations_total sallyport_audit_dropped_total sallyport_certificates_minted_total
sallyport_build_info process_resident_memory_bytes process_cpu_seconds_total process_open_fds
""",
)
FIELDS = re.findall(
    r"\S+",
    """
time id agent labels on_behalf_of listener identity client method scheme host port path verdict reason rule rule_at
policy rewritten injected redacted status request_bytes response_bytes duration_ms decision_us upstream_ip trace_id
""",
)


@pytest.fixture(scope="module")
def proxy(make_proxy: Make, lane: str) -> Proxy:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = probe.getsockname()[1]
    proxy = make_proxy(RULES, {"b.api.test:8443": f"127.0.0.1:{closed}"}, lane=lane)
    proxy.agent("coder-1", "--label", "team=payments", "--on-behalf-of", "alice")
    proxy.credential("api", SECRET, "--host", "api.test")
    return proxy


def test_every_metric_of_the_contract_is_there(proxy: Proxy) -> None:
    """From the start, with its help."""
    _, text = proxy.fetch_admin("/metrics")
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    assert [name for name in FAMILIES if name not in kinds] == []
    assert all(kind == "counter" for name, kind in kinds.items() if name.endswith("_total"))
    assert {name for name in kinds if not name.startswith(("sallyport_", "process_"))} == set()
    assert [name for name in kinds if f"# HELP {name} " not in text] == []
    assert proxy.metric("sallyport_store_up") == 1
    assert proxy.metric("sallyport_rules") == 3
    assert proxy.metric("sallyport_agents", state="active") == 1


def test_an_exchange_is_counted_in_every_family_it_belongs_to(proxy: Proxy, upstream: Upstream) -> None:
    before = proxy.metrics()
    upstream.handler = lambda _: Reply(body=b"0123456789")
    assert proxy.get("https://api.test/v1/x", method="POST", body=b"hello").status == 200
    assert proxy.get("https://api.test/v1/secrets/x").code == "blocked"
    assert proxy.get("https://api.test/v2").code == "no_rule"
    after = wait_for(lambda: settled(proxy, before, 3))
    grown = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    agent = 'agent="coder-1"'
    expected = {
        f'sallyport_requests_total{{{agent},verdict="allow",reason="allowed"}}': 1,
        f'sallyport_requests_total{{{agent},verdict="block",reason="blocked"}}': 1,
        f'sallyport_requests_total{{{agent},verdict="block",reason="no_rule"}}': 1,
        'sallyport_rule_requests_total{rule="api",verdict="allow"}': 1,
        'sallyport_rule_requests_total{rule="no-secrets",verdict="block"}': 1,
        'sallyport_rule_requests_total{rule="_none",verdict="block"}': 1,
        'sallyport_request_duration_seconds_count{verdict="allow"}': 1,
        'sallyport_request_duration_seconds_count{verdict="block"}': 2,
        "sallyport_decision_duration_seconds_count": 3,
        "sallyport_upstream_duration_seconds_count": 1,
        f'sallyport_bytes_total{{{agent},direction="request"}}': 5,
        f'sallyport_credentials_injected_total{{{agent},credential="api"}}': 1,
    }
    assert {name: grown.get(name) for name in expected} == expected
    assert grown[f'sallyport_bytes_total{{{agent},direction="response"}}'] > 10


def settled(proxy: Proxy, before: dict[str, float], requests: int) -> dict[str, float]:
    """The metrics when so many more requests are on record."""

    def total(samples: dict[str, float]) -> float:
        return sum(value for name, value in samples.items() if name.startswith("sallyport_requests_total"))

    after = proxy.metrics()
    return after if total(after) == total(before) + requests else {}


def test_labels_are_bounded(proxy: Proxy, upstream: Upstream) -> None:
    """Nothing that a sandbox chose, not even in refusals."""
    nobody = {"agent": "_none", "verdict": "block", "reason": "bad_identity"}
    before = proxy.metric("sallyport_requests_total", **nobody)
    for number in range(5):
        name = f"chosen-{number}.example"
        proxy.get(f"https://{name}/chosen-path-{number}?chosen={number}", headers={"x-chosen": "chosen"})
        proxy.get(f"http://{name}/chosen-path-{number}", method="CHOSEN")
    client = proxy.connect()
    client.send(b"CONNECT chosen.example:443 HTTP/1.1\r\nhost: chosen.example:443\r\n")
    client.send(b"proxy-authorization: Basic Y2hvc2VuOmNob3Nlbg==\r\n\r\n")
    assert client.response().status == 407
    wait_for(lambda: proxy.audit(10, reason="no_rule"))
    assert "chosen" not in proxy.fetch_admin("/metrics")[1].lower()
    assert proxy.metric("sallyport_requests_total", **nobody) == before + 1


def test_connections_are_counted_while_they_are_open(proxy: Proxy) -> None:
    listener = f"127.0.0.1:{proxy.address[1]}"

    def connections() -> float:
        return proxy.metric("sallyport_connections", listener=listener)

    wait_for(lambda: connections() == 0, "the end of earlier connections")
    clients = [proxy.connect() for _ in range(3)]
    wait_for(lambda: connections() == 3)
    for client in clients:
        client.close()
    wait_for(lambda: connections() == 0)


# The audit log


def test_a_line_holds_every_field_of_the_contract(proxy: Proxy, upstream: Upstream) -> None:
    upstream.handler = lambda _: Reply(201, body=SECRET.encode())
    before = datetime.now(UTC)
    proxy.get("https://api.test/v1/fields?token=in-the-query", method="POST", body=b"hello")
    line = proxy.audit(path="/v1/fields")[0]
    assert list(line)[: len(FIELDS)] == FIELDS
    assert timedelta(0) <= datetime.fromisoformat(line["time"]) - before < timedelta(seconds=5)
    assert re.fullmatch(r"[0-9A-HJKMNP-TV-Z]{26}", line["id"])
    assert 0 < line["duration_ms"] < 5000
    assert 0 < line["decision_us"] < 50_000
    assert re.fullmatch(r"[0-9a-f:]+", line["policy"].removeprefix("sha256"))
    expected = {
        "agent": "coder-1",
        "labels": {"team": "payments"},
        "on_behalf_of": "alice",
        "listener": f"127.0.0.1:{proxy.address[1]}",
        "identity": ["token"],
        "method": "POST",
        "scheme": "https",
        "host": "api.test",
        "port": 443,
        "verdict": "allow",
        "reason": "allowed",
        "rule": "api",
        "rule_at": "rules/rules.yaml:4",
        "rewritten": True,
        "injected": [{"credential": "api", "version": 1, "location": "header:authorization"}],
        "redacted": [{"credential": "api", "where": "body", "count": 1}],
        "status": 201,
        "request_bytes": 5,
        "response_bytes": len(SECRET),
        "upstream_ip": "127.0.0.1",
    }
    assert {name: line[name] for name in expected} == expected
    host, _, port = line["client"].rpartition(":")
    assert (host, port.isdigit()) == ("127.0.0.1", True)
    text = (proxy.folder / ".sallyport" / "audit.jsonl").read_text()
    assert "in-the-query" not in text
    assert SECRET not in text


def test_the_log_is_for_its_owner_only(proxy: Proxy) -> None:
    proxy.get("https://api.test/v2")
    path = Path(proxy.folder / ".sallyport" / "audit.jsonl")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for private in ("master.key", "running.json", "vault-versions.json"):
        assert stat.S_IMODE((path.parent / private).stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_each_exchange_is_recorded_once(proxy: Proxy, upstream: Upstream) -> None:
    """Also where several share a tunnel, and where nothing was sent on; an accepted CONNECT is none."""
    path = proxy.folder / ".sallyport" / "audit.jsonl"
    proxy.get("https://api.test/v1/first")
    proxy.audit(path="/v1/first")
    before = len(path.read_text().splitlines())
    client = proxy.tunnel("api.test")
    for number in range(3):
        client.send(f"GET /v1/once/{number} HTTP/1.1\r\nhost: api.test\r\n\r\n".encode())
        assert client.response().status == 200
    client.send(b"GET /nowhere HTTP/1.1\r\nhost: api.test\r\n\r\n")
    assert client.response().code == "no_rule"
    client.send(b"GET /v1/x HTTP/1.1\r\nhost: other.test\r\n\r\n")
    assert client.response().code == "authority_mismatch"
    client.close()
    malformed = proxy.connect()
    malformed.send(b"GET  /once HTTP/1.1\r\n\r\n")
    assert malformed.response().code == "ambiguous_request"
    assert proxy.get("https://b.api.test/once").code == "no_rule"
    anonymous = proxy.connect()
    anonymous.send(b"GET http://api.test/once HTTP/1.1\r\nhost: api.test\r\n\r\n")
    assert anonymous.response().code == "no_identity"
    wait_for(lambda: len(path.read_text().splitlines()) >= before + 8)
    proxy.get("https://api.test/v1/last")
    proxy.audit(path="/v1/last")
    lines = [json.loads(line) for line in path.read_text().splitlines()[before:]]
    told = [(line["method"], line["host"], line["path"], line["reason"], line["status"]) for line in lines]
    assert sorted(told[:-1]) == sorted(
        [
            *(("GET", "api.test", f"/v1/once/{number}", "allowed", 200) for number in range(3)),
            ("GET", "api.test", "/nowhere", "no_rule", 403),
            ("GET", "api.test", "", "authority_mismatch", 421),
            ("", "", "", "ambiguous_request", 400),
            ("GET", "b.api.test", "/once", "no_rule", 403),
            ("GET", "api.test", "", "no_identity", 407),
        ]
    )
    assert len({line["id"] for line in lines}) == len(lines)


def test_an_upstream_that_cannot_be_reached_is_recorded_once(proxy: Proxy) -> None:
    refused = proxy.get("https://b.api.test:8443/down")
    assert (refused.status, refused.code) == (502, "upstream_unreachable")
    lines = proxy.audit(path="/down", reason="upstream_unreachable")
    assert [(line["verdict"], line["status"], line["upstream_ip"]) for line in lines] == [("allow", 502, None)]


def test_a_client_that_hangs_up_mid_stream_is_recorded_once(proxy: Proxy, upstream: Upstream) -> None:
    """With what it had got by then; the upstream is let go."""
    with Stream(upstream) as stream:
        client = streaming(proxy)
        client.close()
        line = proxy.audit(path="/stream")[0]
        assert (line["status"], line["response_bytes"], line["verdict"]) == (200, 5, "allow")
        stream.end()
    proxy.get("https://api.test/v1/after")
    proxy.audit(path="/v1/after")
    assert len(proxy.audit(path="/stream")) == 1


def test_an_upstream_that_breaks_off_mid_stream_is_recorded_once(proxy: Proxy, upstream: Upstream) -> None:
    """And the client is not told that the body was whole."""
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n"
    upstream.handler = lambda _: Reply(raw=head)
    client = proxy.tunnel("api.test")
    client.send(b"GET /v1/broken HTTP/1.1\r\nhost: api.test\r\n\r\n")
    received = client.read_until(b"first") + client.rest()
    assert b"0\r\n\r\n" not in received
    lines = proxy.audit(path="/v1/broken")
    assert [(line["status"], line["response_bytes"]) for line in lines] == [(200, 5)]


# The admin endpoint


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_no_way_leads_through_the_proxy_to_itself(make_proxy: Make) -> None:
    """By address, by a name that leads there, by the operator's own connect_to; the listener no more than admin."""
    admin, listener = free_port(), free_port()
    rules = "version: 1\nrules:\n  - name: all\n    match: {scheme: [http, https], port: [%d, %d, 80, 443]}\n"
    proxy = make_proxy(
        rules % (admin, listener) + "    action: allow\n",
        {"admin.example:80": f"127.0.0.1:{admin}", "listener.example:80": f"localhost:{listener}"},
        admin=f"127.0.0.1:{admin}",
        listen=[f"127.0.0.1:{listener}"],
        upstream={"allow_addresses": ["127.0.0.0/8", "::1/128"]},
    )
    proxy.agent()
    places = [f"127.0.0.1:{admin}", f"localhost:{admin}", f"127.0.0.2:{admin}", f"[::ffff:127.0.0.1]:{admin}"]
    for place in (*places, "admin.example", "listener.example", f"127.0.0.1:{listener}"):
        connection = proxy.connect()
        connection.send(f"GET http://{place}/metrics HTTP/1.1\r\nhost: {place}\r\n{proxy.auth('coder-1')}\r\n".encode())
        response = connection.response()
        assert (place, response.status, response.code) == (place, 403, "private_address")


def test_the_admin_endpoint_only_tells(proxy: Proxy) -> None:
    """Nothing can be changed there, and it says what it has."""
    assert proxy.fetch_admin("/healthz") == (200, "ok\n")
    assert proxy.fetch_admin("/readyz")[0] == 200
    status = json.loads(proxy.fetch_admin("/api/status")[1])
    assert (status["rules"], status["store_up"], status["agents"]["active"]) == (3, True, 1)
    assert status["reload_problems"] == []
    assert proxy.fetch_admin("/")[0] == 404
    texts = [proxy.fetch_admin(path)[1] for path in ("/metrics", "/readyz", "/api/status")]
    assert [text for text in texts if SECRET in text or proxy.tokens["coder-1"] in text] == []
