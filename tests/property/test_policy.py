"""What must hold of every policy and every request."""

from __future__ import annotations

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from proxy.address import Host, HostPattern
from proxy.agent import Agent, AgentState
from proxy.pattern import path_glob, text_glob
from proxy.plan import make_plan
from proxy.policy import AgentMatch, Match, Policy, Rewrite, Rule, Verdict, decide
from proxy.reason import Reason
from proxy.request import Ambiguous, RequestView, parse_path

LABELS = st.sampled_from(["a", "b", "api", "xn--bcher-kva"])
NAMES = st.lists(LABELS, min_size=1, max_size=3).map(lambda labels: ".".join([*labels, "test"]))
PATTERNS = st.builds(HostPattern, NAMES, st.integers(0, 2))
SEGMENTS = st.sampled_from(["a", "b", "..", ".", "", "%2f", "%2e%2e", "..;x", "%5c", "\\", "%252e", "*", "a%2Fb", ";"])
PATHS = st.lists(SEGMENTS, min_size=1, max_size=5).map(lambda segments: "/" + "/".join(segments))
GLOBS = st.sampled_from(["/**", "/a/**", "/*", "/a", "/**/b", "/a/*/b"]).map(path_glob)
VALUES = st.lists(st.sampled_from(["1", "2", "*"]).map(text_glob), min_size=1, max_size=2).map(tuple)
CONDITIONS = st.lists(st.tuples(st.sampled_from(["q", "x"]), VALUES), max_size=1).map(tuple)


@st.composite
def rules(draw: st.DrawFn, action: Verdict | None = None) -> Rule:
    """Any rule, of every condition there is."""
    allow = (action or draw(st.sampled_from(Verdict))) is Verdict.ALLOW
    return Rule(
        draw(st.text("rstu", min_size=1, max_size=4)),
        "a:1",
        Verdict.ALLOW if allow else Verdict.BLOCK,
        draw(st.sampled_from([(), (AgentMatch((text_glob("coder-*"),)),), (AgentMatch((text_glob("bob"),)),)])),
        Match(
            tuple(draw(st.lists(PATTERNS, max_size=2))),
            draw(st.sampled_from([frozenset(), frozenset({443}), frozenset({80, 8443})])),
            draw(st.booleans()),
            draw(st.sampled_from([frozenset(), frozenset({"https"}), frozenset({"http"})])),
            draw(st.sampled_from([frozenset(), frozenset({"GET", "HEAD"})])),
            draw(st.booleans()),
            tuple(draw(st.lists(GLOBS, max_size=2))),
            None,
            draw(CONDITIONS),
            draw(CONDITIONS),
        ),
        draw(st.sampled_from([None, Rewrite(), Rewrite(host=Host("a.test")), Rewrite(port=443)])) if allow else None,
    )


@st.composite
def views(draw: st.DrawFn) -> RequestView:
    """Any request the proxy would look at."""
    headers = draw(st.sampled_from([[], [(b"x", b"1")], [(b"x", b"1"), (b"X", b"3")], [(b"upgrade", b"websocket")]]))
    target = draw(PATHS) + draw(st.sampled_from(["", "?q=1", "?q=1&q=3", "?q=1;q=3"]))
    method, scheme = draw(st.sampled_from(["GET", "HEAD", "POST"])), draw(st.sampled_from(["https", "http"]))
    try:
        return RequestView.parse(
            method, scheme, Host.parse(draw(NAMES)), draw(st.sampled_from([443, 80, 8443])), target, headers
        )
    except Ambiguous:
        return RequestView(method, scheme, Host("a.test"), 443)


AGENTS = st.sampled_from(["coder-1", "bob"]).map(lambda name: Agent(name, state=AgentState.ACTIVE))
POLICIES = st.lists(rules(), max_size=6).map(Policy)


@given(POLICIES, AGENTS, views())
def test_unmatched_is_blocked_whatever_the_policy(policy: Policy, agent: Agent, view: RequestView) -> None:
    decision = decide(policy, agent, view)
    matching = [rule for rule in policy.rules if not rule.mismatch(agent, view)]
    blocks = [rule for rule in matching if rule.action is Verdict.BLOCK]
    assert decision.allowed is (bool(matching) and not blocks)
    if blocks:
        assert (decision.reason, decision.rule) == (Reason.BLOCKED, blocks[0])
    elif matching:
        assert decision.rule is matching[0]


HOSTS = (NAMES | st.sampled_from(["10.0.0.1", "::1", "test", "a.10.0.0.1.test"])).map(Host.parse)


@given(POLICIES, HOSTS)
def test_the_index_finds_the_rules_that_name_a_host_and_no_others(policy: Policy, host: Host) -> None:
    """`decide` does not look at their hosts again."""
    naming = [
        rule for rule in policy.rules if not rule.match.hosts or any(one.matches(host) for one in rule.match.hosts)
    ]
    assert list(policy.candidates(host)) == naming


@given(POLICIES, AGENTS, views(), rules(Verdict.BLOCK), st.integers(0, 6))
def test_adding_a_block_rule_never_allows(
    policy: Policy, agent: Agent, view: RequestView, block: Rule, position: int
) -> None:
    more = Policy([*policy.rules[:position], block, *policy.rules[position:]])
    if make_plan(more, agent, view).decision.allowed:
        assert make_plan(policy, agent, view).decision.allowed


@given(POLICIES, AGENTS, views())
def test_no_plan_ends_where_a_block_rule_matches(policy: Policy, agent: Agent, view: RequestView) -> None:
    plan = make_plan(policy, agent, view)
    if plan.decision.allowed:
        assert decide(policy, agent, plan.view).reason is not Reason.BLOCKED


@given(POLICIES, views())
def test_nothing_is_allowed_to_an_agent_that_is_not_active(policy: Policy, view: RequestView) -> None:
    assert not make_plan(policy, Agent("coder-1"), view).decision.allowed


@st.composite
def spellings(draw: st.DrawFn) -> tuple[str, str]:
    """A host name and another spelling of it."""
    name = draw(NAMES)
    spelling = "".join(char.upper() if draw(st.booleans()) else char for char in name)
    spelling = spelling.replace(".", draw(st.sampled_from([".", "\u3002", "\uff0e", "\uff61"])))
    if name.startswith("xn--bcher-kva.") and draw(st.booleans()):
        spelling = draw(st.sampled_from(["bücher", "BÜCHER", "bu\u0308cher"])) + spelling[len("xn--bcher-kva") :]
    return name, spelling + draw(st.sampled_from(["", "."]))


@given(spellings())
def test_spellings_of_one_host_are_one_host(pair: tuple[str, str]) -> None:
    name, spelling = pair
    assert Host.parse(spelling) == Host.parse(name)


@given(st.text() | st.text("0123456789abcdefx.:[]%*-"))
def test_a_host_is_in_normal_form_or_none(text: str) -> None:
    try:
        host = Host.parse(text)
    except ValueError:
        return
    assert Host.parse(str(host)) == host
    assert Host.parse(host.name) == host


@given(st.text(), st.text(), st.text(), st.lists(st.tuples(st.binary(), st.binary())))
def test_no_text_raises_anything_but_ambiguous(
    method: str, scheme: str, target: str, headers: list[tuple[bytes, bytes]]
) -> None:
    with contextlib.suppress(Ambiguous):
        RequestView.parse(method, scheme, Host("a.test"), 443, target, headers)


@given(st.binary())
def test_no_target_of_any_bytes_raises_anything_but_ambiguous(target: bytes) -> None:
    try:
        view = RequestView.parse("GET", "https", Host("a.test"), 443, "/" + target.decode("latin-1"))
    except Ambiguous:
        return
    assert view.path_and_query.isascii()
    assert not any(char in view.path_and_query for char in " \t\r\n\0#")


ANY_PATH = PATHS | st.text(st.characters(max_codepoint=255)).map(lambda text: "/" + text)
HOSTILE = st.text("/.;%2e5cfF\\a", max_size=16).map(lambda text: "/" + text)


@given(ANY_PATH | HOSTILE)
def test_normalising_twice_is_normalising_once(raw: str) -> None:
    try:
        normal, readings = parse_path(raw)
    except Ambiguous:
        return
    again, readings_again = parse_path(normal)
    assert again == normal
    assert set(readings_again) == set(readings)


@given(ANY_PATH | HOSTILE)
def test_a_reading_has_no_reading_that_was_not_seen(raw: str) -> None:
    """Whatever chain of decoders stands behind the origin, each of its steps was matched."""
    try:
        _, readings = parse_path(raw)
    except Ambiguous:
        return
    for reading in readings:
        try:
            normal, more = parse_path(reading)
        except Ambiguous:
            continue  # such as a control character behind two escapes: no origin is sent it in that form
        assert normal in readings
        assert set(more) <= set(readings)


@given(views())
def test_what_is_forwarded_is_read_as_it_was_matched(view: RequestView) -> None:
    again = RequestView.parse(view.method, view.scheme, view.host, view.port, view.path_and_query, view.headers)
    assert again == view or set(again.readings) == set(view.readings)
    assert (again.path, again.query) == (view.path, view.query)
