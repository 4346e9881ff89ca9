"""Whatever is in a rule file: a Policy, or Problems with places; never another exception."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from proxy.policy import Policy
from proxy.problem import Problem, Problems
from proxy.rulefile import load_policy

ROOT = Path(__file__).parent.parent.parent
SHIPPED = [path.read_text() for path in sorted((ROOT / "rules").glob("*.yaml")) if not path.name.endswith(".test.yaml")]
FULL = """version: 1
rules:
  - name: all-fields
    agents: ["coder-*", {labels: {team: payments}}]
    match:
      host: ["api.test", "*.api.test"]
      port: 443
      method: [GET]
      path: [/a/**, "/b/*"]
      query: {state: [open, closed]}
      headers: {accept: "application/json*"}
      body: {json: {/owner: acme}}
    action: allow
    rewrite: {url: {host: b.test, path: {regex: "^/a/(.*)$", to: "/c/\\\\1"}}, headers: {set: {x-env: prod}}}
    inject: [{credential: github, as: bearer}, {credential: k, as: query, name: key}]
    response: {headers: {remove: [set-cookie]}}
    limits: {rate: 60/m, concurrency: 4, request_body: 1MiB, max_url: 100, max_labels: 1}
    scan: secrets
  - {name: stop, match: {host: "**", path_regex: "^/x$"}, action: block}
  - {name: here, match: {host: c.test}, action: allow, respond: {status: 200, headers: {}, body: hi}}
"""
WORDS = st.sampled_from(
    [
        *(
            "null",
            "-1",
            "1e99",
            "0",
            "443",
            "70000",
            "true",
            "[]",
            "{}",
            "''",
            "~",
            "*",
            "**",
            "a.test",
            "A.test.",
            "é",
        ),
        *("/**", "/..", "%2e", "(?P<", "(((a*)*)*)$", "[", "60/m", "1/0", "1GiB", "bearer", "sigv4", "passthrough"),
        *("name", "match", "host", "action", "allow", "inject", "rules", "version", "\x00", "\ud800", "&a", "*a", "<<"),
    ]
)
FILES = st.sampled_from([FULL, *SHIPPED])


@st.composite
def edited(draw: st.DrawFn) -> bytes:
    """A sound file with a few of its words replaced, removed or repeated."""
    text = draw(FILES)
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 12)))
        text = text[:start] + draw(WORDS | st.just(text[start:end] * 2) | st.text(max_size=4)) + text[end:]
    return text.encode("utf-8", "surrogatepass")


def read(content: bytes) -> tuple[Policy | None, list[Problem]]:
    try:
        return load_policy({"rules/a.yaml": content})
    except Problems as error:
        return None, error.problems


def survives(content: bytes) -> None:
    policy, problems = read(content)
    lines = content.count(b"\n") + content.count(b"\r") + 2
    assert all(problem.message and 0 <= problem.line <= lines and str(problem) for problem in problems)
    assert (policy is None) == any(not problem.warning for problem in problems)


def test_the_files_are_sound() -> None:
    """Edits of them begin from rules that load."""
    for text in (FULL, *SHIPPED):
        load_policy({"rules/a.yaml": text.encode()})


@given(edited())
def test_no_edit_of_a_rule_file_raises_anything_but_problems(content: bytes) -> None:
    survives(content)


@given(st.binary(max_size=100))
def test_nor_do_any_bytes(content: bytes) -> None:
    survives(b"version: 1\nrules:\n" + content)
