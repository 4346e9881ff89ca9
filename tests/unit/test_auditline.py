"""One exchange as a line of JSON."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from proxy.agent import Agent
from proxy.auditline import line
from proxy.exchange import Injected
from proxy.reason import Reason
from tests.unit.test_audit import exchange


def test_a_line_has_the_fields_of_the_contract_in_its_order() -> None:
    """Everything section 8 names but the chain."""
    made = exchange(
        agent=Agent("coder-1", {"team": "payments"}, on_behalf_of="ada"),
        identity=("token",),
        method="GET",
        scheme="https",
        host="api.github.com",
        port=443,
        path="/repos/acme/x?token=s3cret&a=?",
        allowed=True,
        reason=Reason.ALLOWED,
        rule="github-read",
        rule_at="rules/github.yaml:3",
        policy="sha256:ab",
        rewritten=True,
        injected=[Injected("github", 2, "header:authorization")],
        redacted=Counter({("github", "body"): 3}),
        status=200,
        request_bytes=1,
        response_bytes=2,
        duration=0.0123456,
        decision_duration=0.0000213,
        upstream_ip="192.0.2.1",
        trace_id="4bf9",
    )
    read = json.loads(line(made))
    assert list(read.items()) == [
        ("time", "2023-11-14T22:13:20.250000Z"),
        ("id", "id-0"),
        ("agent", "coder-1"),
        ("labels", {"team": "payments"}),
        ("on_behalf_of", "ada"),
        ("listener", "127.0.0.1:8080"),
        ("identity", ["token"]),
        ("client", "127.0.0.1:5000"),
        ("method", "GET"),
        ("scheme", "https"),
        ("host", "api.github.com"),
        ("port", 443),
        ("path", "/repos/acme/x"),
        ("verdict", "allow"),
        ("reason", "allowed"),
        ("rule", "github-read"),
        ("rule_at", "rules/github.yaml:3"),
        ("policy", "sha256:ab"),
        ("rewritten", True),
        ("injected", [{"credential": "github", "version": 2, "location": "header:authorization"}]),
        ("redacted", [{"credential": "github", "where": "body", "count": 3}]),
        ("status", 200),
        ("request_bytes", 1),
        ("response_bytes", 2),
        ("duration_ms", 12.346),
        ("decision_us", 21.3),
        ("upstream_ip", "192.0.2.1"),
        ("trace_id", "4bf9"),
    ]


def test_an_exchange_of_nobody_is_a_block_with_nulls() -> None:
    """An exchange that was never filled in reads as refused."""
    read = json.loads(line(exchange()))
    assert (read["verdict"], read["reason"], read["agent"], read["labels"]) == ("block", "internal", None, {})
    assert read["rule"] is read["upstream_ip"] is read["status"] is None


def test_whole_seconds_still_have_microseconds() -> None:
    """One width for every time, so that lines sort as text."""
    read = json.loads(line(exchange(time=1700000000.0)))
    assert read["time"] == "2023-11-14T22:13:20.000000Z"


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("/line\r\nbreak\x00\x1b[2J\x9b", "/line\r\nbreak\x00\x1b[2J\x9b"),
        ("/lone\udc80surrogate\ud800", "/lone\ufffdsurrogate\ufffd"),
        ("/pair😀 and \\udc80 spelt out", "/pair😀 and \\udc80 spelt out"),
        ("/both 😀 \udcff \\udc80", "/both 😀 \ufffd \\udc80"),
        ("/sep\u2028\u2029", "/sep\u2028\u2029"),
    ],
)
def test_odd_strings_do_not_break_a_line(text: str, read: str) -> None:
    """One line of printable ASCII, whatever the sandbox sent."""
    raw = line(exchange(path=text))
    assert json.loads(raw)["path"] == read
    assert raw.count(b"\n") == 1
    assert raw[:-1].decode("ascii").isprintable()
    read.encode()


def test_a_leak_is_told_where_there_was_one() -> None:
    made = exchange(leak=("canary", 'a "trap"', "body"))
    assert json.loads(line(made))["leak"] == {"kind": "canary", "name": 'a "trap"', "where": "body"}
