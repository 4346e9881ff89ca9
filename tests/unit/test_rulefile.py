"""The mistakes themselves, with their exact words and places, are in tests/golden/problems_*.txt."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from proxy.address import Host, HostPattern
from proxy.policy import Edit, Policy, Rule, Verdict
from proxy.problem import Problems
from proxy.rulefile import load_policy, parse_rules

STARTER = Path(__file__).parents[2] / "rules"

FULL = r"""
version: 1
rules:
  - name: full
    agents: ["coder-*", bob, {labels: {team: [payments, ops]}}]
    match:
      host: [api.example.com, "*.example.org"]
      port: [443, 8443]
      scheme: [https, http]
      method: [GET, POST]
      websocket: true
      path: [/a/**, /b]
      path_regex: "^/[ab]"
      query: {state: [open, closed]}
      headers: {Accept: "application/json*"}
    action: allow
    rewrite:
      url:
        host: other.example.com
        port: 9443
        path: {regex: "^/a/(.*)", to: '/c/\1'}
        query: {set: {v: 1}, remove: x}
      headers: {set: {X-Env: prod}, remove: [x-debug]}
    inject:
      - {credential: github, as: basic, username: x-access-token}
      - {credential: vendor, as: {header: {name: X-Key, value: "Token {secret}"}}}
      - {credential: old, as: placeholder, in: [header, body], placeholder: SLOT}
      - {credential: own-kind}
    response: {headers: {set: {x-served: sandbox}, remove: [set-cookie]}}
    private: true
"""


def load(text: str) -> Policy:
    policy, _ = load_policy({"rules/a.yaml": text.encode()})
    return policy


def only(text: str) -> Rule:
    [rule] = load(text).rules
    return rule


def test_every_field_arrives() -> None:
    rule = only(FULL)
    assert (rule.name, rule.at, rule.action, rule.private) == ("full", "rules/a.yaml:4", Verdict.ALLOW, True)
    assert rule.match.hosts == (HostPattern("api.example.com"), HostPattern("example.org", 1))
    assert rule.match.ports == {443, 8443}
    assert rule.match.schemes == {"https", "http"}
    assert rule.match.methods == {"GET", "HEAD", "POST"}
    assert rule.match.websocket
    assert [str(path) for path in rule.match.paths] == ["/a/**", "/b"]
    assert rule.match.path_regex.pattern == "^/[ab]"
    assert [(name, [*map(str, globs)]) for name, globs in rule.match.query] == [("state", ["open", "closed"])]
    assert [(name, [*map(str, globs)]) for name, globs in rule.match.headers] == [("accept", ["application/json*"])]
    assert [[*map(str, agents.ids)] for agents in rule.agents] == [["coder-*", "bob"], []]
    [(label, globs)] = rule.agents[1].labels
    assert (label, [*map(str, globs)]) == ("team", ["payments", "ops"])
    assert rule.rewrite
    assert (rule.rewrite.host, rule.rewrite.port) == (Host("other.example.com"), 9443)
    assert (rule.rewrite.path_regex.pattern, rule.rewrite.path_to) == ("^/a/(.*)", r"/c/\1")
    assert rule.rewrite.query == Edit({"v": "1"}, ("x",))
    assert rule.rewrite.headers == Edit({"x-env": "prod"}, ("x-debug",))
    assert rule.response_headers == Edit({"x-served": "sandbox"}, ("set-cookie",))


def test_injections_arrive_in_both_spellings() -> None:
    found = [(i.credential, i.kind, dict(i.options), i.places, i.line) for i in only(FULL).inject]
    assert found == [
        ("github", "basic", {"username": "x-access-token"}, (), 25),
        ("vendor", "header", {"name": "X-Key", "value": "Token {secret}"}, (), 26),
        ("old", "placeholder", {"placeholder": "SLOT"}, ("header", "body"), 27),
        ("own-kind", "", {}, (), 28),
    ]


def test_a_respond_rule() -> None:
    rule = only(
        "version: 1\nrules: [{name: a, action: allow, match: {host: a.test}, respond: {headers: {X-A: 1}, body: hi}}]"
    )
    assert rule.respond
    assert (rule.respond.status, rule.respond.headers, rule.respond.body) == (200, {"x-a": "1"}, "hi")


def test_an_allow_rule_is_for_https_on_its_own_port() -> None:
    rule = only("version: 1\nrules: [{name: a, action: allow, match: {host: a.test}}]")
    assert (rule.match.schemes, rule.match.own_port) == ({"https"}, True)


def test_a_block_rule_is_for_every_scheme_and_port() -> None:
    rule = only("version: 1\nrules: [{name: a, action: block, match: {host: a.test}}]")
    assert (rule.match.schemes, rule.match.ports, rule.match.own_port) == (set(), set(), False)


def test_http_on_its_own_port_is_no_tls_port() -> None:
    """A CONNECT to port 80 must not be taken for TLS because a rule allows both schemes."""
    policy = load("version: 1\nrules: [{name: a, action: allow, match: {host: a.test, scheme: [http, https]}}]")
    assert policy.tls_ports == {443}


def test_a_number_behind_an_alias_is_refused_where_text_is_meant() -> None:
    """What 007 was written as cannot be seen there, and 7 is another value."""
    _, problems = parse_rules(
        "version: 1\nrules:\n"
        "  - {name: a, action: block, match: {query: {n: &n 007}}}\n"
        "  - {name: b, action: block, match: {query: {n: *n}}}\n",
        "a.yaml",
    )
    assert [(problem.line, problem.message) for problem in problems] == [
        (3, "expected text, got a number"),
        (4, "expected text, got a number"),
    ]


def test_conditions_behind_an_alias_are_as_if_written_out() -> None:
    policy = load(
        "version: 1\nrules:\n"
        "  - {name: a, action: block, match: &m {query: {n: 007}}}\n"
        "  - {name: b, action: block, match: *m}\n"
    )
    assert [str(rule.match.query[0][1][0]) for rule in policy.rules] == ["007", "007"]


def test_every_mistake_of_every_file_is_told_at_once() -> None:
    files = {
        "a.yaml": b"version: 1\nrules: [{name: a, action: alow}, {name: b, action: block, inject: []}]",
        "b.yaml": b"version: 1\nrules:\n\t- x",
        "c.yaml": b"version: 1\nrules: [{name: ok, action: allow}]",
        "d.yaml": b"version: 1\nrules: [{name: ok, action: block}]",
        "e.yaml": b"\xff",
    }
    with pytest.raises(Problems) as caught:
        load_policy(files)
    assert [(p.file, p.message.split(",")[0], p.warning) for p in caught.value.problems] == [
        ("a.yaml", 'expected "allow" or "block"', False),
        ("a.yaml", 'a block rule has no "inject"', False),
        ("b.yaml", "a tab cannot indent", False),
        ("c.yaml", 'rule "ok" is for every host', True),
        ("d.yaml", 'the name "ok" is taken', False),
        ("e.yaml", "not UTF-8 text", False),
    ]


def test_a_name_taken_in_another_file_names_that_place() -> None:
    rule = b"version: 1\nrules:\n  - {name: a, action: block}"
    with pytest.raises(Problems, match=r'b\.yaml:3:12: the name "a" is taken\n +hint: the first is at a\.yaml:3'):
        load_policy({"a.yaml": rule, "b.yaml": rule})


def test_warnings_come_beside_the_policy() -> None:
    policy, warnings = load_policy({"a.yaml": b"version: 1\nrules: [{name: a, action: allow}]"})
    assert len(policy.rules) == 1
    assert [warning.warning for warning in warnings] == [True]


def test_rules_that_are_all_commented_out_are_no_mistake() -> None:
    assert load("version: 1\nrules:\n#  - name: a\n").rules == ()


def test_no_files_are_a_policy_that_blocks_everything() -> None:
    policy, warnings = load_policy({})
    assert (policy.rules, warnings) == ((), [])


def test_files_keep_their_order() -> None:
    names = ["b", "a", "c"]
    files = {f"{n}.yaml": f"version: 1\nrules: [{{name: {n}, action: block}}]".encode() for n in names}
    assert [rule.name for rule in load_policy(files)[0].rules] == names


def test_the_digest_tells_names_and_contents_apart() -> None:
    one, other = b"version: 1\nrules: []", b"version: 1\nrules: [] "
    digests = {
        load_policy(files)[0].digest
        for files in ({"a": one}, {"b": one}, {"a": other}, {"a": one, "b": other}, {"b": other, "a": one})
    }
    assert len(digests) == 5
    assert all(len(digest) == 16 for digest in digests)
    assert load_policy({"a": one})[0].digest == load_policy({"a": one})[0].digest


def test_a_byte_order_mark_moves_no_place() -> None:
    rules, problems = parse_rules(
        b"\xef\xbb\xbfversion: 1\nrules: [{name: a, action: block, match: {query: {a: 010}}}]", "a"
    )
    assert problems == []
    assert str(rules[0].match.query[0][1][0]) == "010"


@pytest.mark.slow
def test_ten_thousand_rules_load_in_time_and_keep_their_places() -> None:
    """The budget is 5 s of CPU; what is wrong among them is still found where it stands."""
    rule = "  - name: rule-{0}\n    match: {{host: api-{0}.example.com, path: /v1/{0}/**}}\n    action: {1}\n"
    text = "version: 1\nrules:\n" + "".join(rule.format(n, "alow" if n == 9_876 else "allow") for n in range(10_000))
    started = time.process_time()  # not of what else the machine does
    rules, problems = parse_rules(text, "a.yaml")
    assert time.process_time() - started < 5
    assert len(rules) == 9_999
    assert [problem.place for problem in problems] == [f"a.yaml:{3 + 3 * 9_876 + 2}:13"]


def starter(suffix: str) -> dict[str, bytes]:
    files = sorted(path for path in STARTER.glob("*.yaml") if path.name.endswith(".test.yaml") == (suffix == "test"))
    return {f"rules/{path.name}": path.read_bytes() for path in files}


def test_the_starter_set_is_right_and_risks_nothing() -> None:
    policy, warnings = load_policy(starter("rules"))
    assert warnings == []
    assert {i.credential for rule in policy.rules for i in rule.inject} == {"github", "openai", "anthropic"}


def test_what_the_starter_set_has_commented_out_is_right_too() -> None:
    """An operator takes the signs away and must get a rule, not a mistake."""
    for name, content in starter("rules").items():
        bare = re.sub(r"(?m)^( {2}| {4})# (?=- name:|  |agents:|path:)", r"\1", content.decode())
        before, after = (len(parse_rules(text, name)[0]) for text in (content, bare))
        assert parse_rules(bare, name)[1] == []
        assert after == before + len(re.findall(r"# - name:", content.decode()))
