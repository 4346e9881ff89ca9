"""What `sallyport explain` prints."""

from __future__ import annotations

import json

import pytest

from proxy.agent import Agent, AgentState
from proxy.explain import explain
from proxy.policy import Policy
from proxy.rulefile import load_policy
from proxy.url import parse_url

AGENT = Agent("coder-1", {"team": "payments"}, state=AgentState.ACTIVE)
RULES = b"""version: 1
rules:
  - name: read
    agents: ["coder-*"]
    match: {host: api.test, method: GET, path: [/repos/acme/**, /user]}
    action: allow
    inject: [{credential: github, as: bearer}]
  - name: write
    match: {host: "*.test", method: [POST, PUT], query: {dry: "true"}}
    action: allow
  - name: secrets
    match: {host: "**.test", path: "/**/secrets/**"}
    action: block
  - name: old
    match: {host: old.example}
    action: allow
    rewrite:
      url: {host: api.test, path: {regex: "^/v1/", to: /repos/acme/}}
      headers: {set: {x-env: classified}, remove: [x-debug, x-trace]}
  - name: mock
    match: {host: mock.example}
    action: allow
    respond: {status: 418}
  - name: tidy
    match: {host: tidy.example}
    action: allow
    rewrite: {url: {query: {remove: debug}}}
    private: true
"""


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy({"rules/a.yaml": RULES})[0]


def text(policy: Policy, method: str, url: str, *headers: tuple[str, str], agent: Agent = AGENT) -> str:
    return explain(policy, agent, parse_url(method, url, headers)).as_text()


def test_an_allowed_request(policy: Policy) -> None:
    assert text(policy, "GET", "https://api.test/repos/acme/x?y=1") == (
        "GET https://api.test/repos/acme/x?y=1\n"
        "as coder-1 (team=payments)\n"
        "\n"
        "> allow  read     rules/a.yaml:3   matches\n"
        "  allow  write    rules/a.yaml:8   method GET is not POST or PUT\n"
        "  block  secrets  rules/a.yaml:11  path /repos/acme/x is not /**/secrets/**\n"
        "  3 rules for other hosts\n"
        "\n"
        "ALLOW by read (rules/a.yaml:3)\n"
        "  sends    https://api.test/repos/acme/x?y=1\n"
        "  injects  github, header authorization (bearer)\n"
    )


def test_a_blocked_request(policy: Policy) -> None:
    assert text(
        policy, "GET", "https://api.test/repos/acme/secrets/x", agent=Agent("coder-1", state=AgentState.ACTIVE)
    ) == (
        "GET https://api.test/repos/acme/secrets/x\n"
        "as coder-1\n"
        "\n"
        "  allow  read     rules/a.yaml:3   matches too, but does not decide\n"
        "  allow  write    rules/a.yaml:8   method GET is not POST or PUT\n"
        "> block  secrets  rules/a.yaml:11  matches\n"
        "  3 rules for other hosts\n"
        "\n"
        "BLOCK blocked by secrets (rules/a.yaml:11)\n"
        "  A rule forbids coder-1 to GET api.test/repos/acme/secrets/x.\n"
    )


def test_a_rewritten_request_is_shown_before_and_after(policy: Policy) -> None:
    """Header values are left out: an operator may have written something private there."""
    told = text(policy, "GET", "https://old.example/v1/x")
    assert "rewritten to https://api.test/repos/acme/x, which is decided again\n\n> allow  read " in told
    assert told.endswith(
        "ALLOW by old (rules/a.yaml:14)\n"
        "  sends    https://api.test/repos/acme/x  (instead of https://old.example/v1/x)\n"
        "  sets     1 header: x-env\n"
        "  removes  2 headers: x-debug, x-trace\n"
        "  injects  github, header authorization (bearer)\n"
    )
    assert "classified" not in told


def test_a_rewrite_to_where_nothing_is_allowed(policy: Policy) -> None:
    told = text(policy, "GET", "https://old.example/v2/x")
    assert told.endswith("BLOCK no_rule after old (rules/a.yaml:14)\n  No rule allows coder-1 to GET api.test/v2/x.\n")


def test_a_rewrite_in_place(policy: Policy) -> None:
    told = text(policy, "GET", "https://tidy.example/?debug=1")
    assert "\nrewritten to https://tidy.example/\n\nALLOW by tidy" in told
    assert told.endswith("  reaches  private addresses only\n")


def test_an_answer_of_the_rule_itself(policy: Policy) -> None:
    assert text(policy, "GET", "https://mock.example/").endswith("  answered here with status 418; nothing is sent\n")


def test_a_host_that_no_rule_names(policy: Policy) -> None:
    assert text(policy, "GET", "https://unknown.example/").endswith(
        "\n  no rule names unknown.example\n\nBLOCK no_rule\n  No rule allows coder-1 to GET unknown.example/.\n"
    )


CONDITIONS = """version: 1
rules:
  - name: r
    agents: ops-*
    match:
      host: x.test
      scheme: https
      port: [8443, 9443]
      method: GET
      path: [/a/**, /b, /c, /d, /e]
      path_regex: "^/[ab]/[a-z]*$"
      query: {q: "1"}
      headers: {accept: [a, b]}
    action: allow
"""


@pytest.mark.parametrize(
    ("request_line", "headers", "why"),
    [
        ("ops-1 GET http://x.test:8443/a/x?q=1", ["accept: a"], "scheme http is not https"),
        ("ops-1 GET https://x.test/a/x?q=1", ["accept: a"], "port 443 is not 8443 or 9443"),
        ("dev-1 GET https://x.test:8443/a/x?q=1", ["accept: a"], "dev-1 is not one of its agents"),
        ("ops-1 PUT https://x.test:8443/a/x?q=1", ["accept: a"], "method PUT is not GET or HEAD"),
        ("ops-1 GET https://x.test:8443/z?q=1", ["accept: a"], "path /z is not /a/**, /b, /c or 2 more"),
        (
            "ops-1 GET https://x.test:8443/a/..%2fz?q=1",
            ["accept: a"],
            "path /a/..%2Fz does not fit the regex ^/[ab]/[a-z]*$",
        ),
        (
            "ops-1 GET https://x.test:8443/a/x;y?q=1",
            ["accept: a"],
            "path /a/x;y does not fit the regex ^/[ab]/[a-z]*$",
        ),
        ("ops-1 GET https://x.test:8443/a/X?q=1", ["accept: a"], "path /a/X does not fit the regex ^/[ab]/[a-z]*$"),
        ("ops-1 GET https://x.test:8443/a/x", ["accept: a"], "query parameter q is missing"),
        ("ops-1 GET https://x.test:8443/a/x?q=2", ["accept: a"], "query parameter q is not 1"),
        ("ops-1 GET https://x.test:8443/a/x?q=1", [], "header accept is missing"),
        ("ops-1 GET https://x.test:8443/a/x?q=1", ["accept: c"], "header accept is not a or b"),
        (
            "ops-1 GET https://x.test:8443/a/x?q=1",
            ["accept: a", "upgrade: websocket"],
            "it does not allow an upgrade to websocket",
        ),
    ],
)
def test_the_first_condition_that_is_not_met_is_told(request_line: str, headers: list[str], why: str) -> None:
    policy, _ = load_policy({"a.yaml": CONDITIONS.encode()})
    agent, method, url = request_line.split()
    fields = [(name, value) for name, value in (header.split(": ") for header in headers)]
    told = explain(policy, Agent(agent, state=AgentState.ACTIVE), parse_url(method, url, fields))
    [[row]] = told.steps
    assert (row.why, row.decides) == (why, False)


def test_a_path_that_can_be_read_otherwise_is_told_in_that_reading() -> None:
    policy, _ = load_policy(
        {"a.yaml": b"version: 1\nrules: [{name: r, match: {host: x.test, path: /a/**}, action: allow}]"}
    )
    told = explain(policy, AGENT, parse_url("GET", "https://x.test/a/..%2fb"))
    assert told.steps[0][0].why == "path /a/..%2Fb, which can be read as /b, is not /a/**"


def test_trace_is_decided_by_no_rule(policy: Policy) -> None:
    told = text(policy, "TRACE", "https://mock.example/")
    assert "> " not in told
    assert told.endswith("BLOCK protocol_not_allowed\n  TRACE is never forwarded.\n")


def test_the_same_as_json(policy: Policy) -> None:
    told = json.loads(json.dumps(explain(policy, AGENT, parse_url("GET", "https://old.example/v1/x")).as_json()))
    steps = told.pop("steps")
    assert told == {
        "agent": "coder-1",
        "labels": {"team": "payments"},
        "method": "GET",
        "url": "https://old.example/v1/x",
        "verdict": "allow",
        "reason": "allowed",
        "rule": "old",
        "rule_at": "rules/a.yaml:14",
        "message": "Allowed.",
        "sends": {
            "url": "https://api.test/repos/acme/x",
            "headers": {"set": ["x-env"], "remove": ["x-debug", "x-trace"]},
        },
        "inject": [{"credential": "github", "location": "header authorization (bearer)"}],
        "respond": None,
    }
    assert [(step["url"], step["other_rules"], len(step["rules"])) for step in steps] == [
        ("https://old.example/v1/x", 5, 1),
        ("https://api.test/repos/acme/x", 3, 3),
    ]
    assert steps[1]["rules"][1] == {
        "rule": "write",
        "at": "rules/a.yaml:8",
        "action": "allow",
        "decides": False,
        "missing": "method",
        "why": "method GET is not POST or PUT",
    }


@pytest.mark.parametrize(
    ("inject", "location"),
    [
        ("as: basic, username: u", "header authorization (basic)"),
        ("as: header, name: X-Api-Key", "header x-api-key"),
        ("as: query, name: key", "query parameter key"),
        ("as: cookie, name: sid", "cookie sid"),
        ("as: placeholder, in: [header, body]", "for slp_placeholder_k in header or body"),
        ("as: placeholder, placeholder: SLOT", "for SLOT in header"),
    ],
)
def test_where_a_credential_goes_is_told(inject: str, location: str) -> None:
    rule = f"{{name: r, match: {{host: x.test}}, action: allow, inject: [{{credential: k, {inject}}}]}}"
    rules = f"version: 1\nrules: [{rule}]"
    policy, _ = load_policy({"a.yaml": rules.encode()})
    assert text(policy, "GET", "https://x.test/").endswith(f"  injects  k, {location}\n")


def test_a_credential_whose_kind_says_how(policy: Policy) -> None:
    rules = b"version: 1\nrules: [{name: r, match: {host: x.test}, action: allow, inject: [{credential: k}]}]"
    assert text(load_policy({"a.yaml": rules})[0], "GET", "https://x.test/").endswith(
        "  injects  k, as its kind says\n"
    )
