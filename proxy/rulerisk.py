"""Rules that are valid but let more through than they need to, and credentials that the vault does not hold.

Warnings only: nothing here decides, and a comment `# sallyport: allow NAME` at the rule accepts one.
"""

from __future__ import annotations

import re
import shlex
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence

from proxy.policy import Policy, Rule, Verdict
from proxy.problem import Problem
from proxy.validation import did_you_mean

_ACCEPTED = re.compile(r"#\s*sallyport:\s*allow\s+([a-z][a-z, -]*)")

_WRITE = frozenset({"DELETE", "PATCH", "POST", "PUT"})

type _Place = tuple[int, int]  # line and column, from 1
type _Risk = tuple[str, _Place | None, str, str]  # name, place if not the rule's own, message, hint


def warnings(rules: Sequence[Rule], lines: Sequence[str], starts: Sequence[_Place], file: str) -> list[Problem]:
    """What is risky in `rules`, less what is accepted. `lines` are the file's, `starts` where each rule begins."""
    accepted = _accepted(lines, [line for line, _ in starts])
    columns = dict(starts)
    found = []
    for rule in rules:
        line = int(rule.at.rpartition(":")[2])
        for name, place, message, hint in _risks(rule):
            if name not in accepted.get(line, ()):
                hint = f"{hint}, or accept it with a comment: # sallyport: allow {name}"
                found.append(Problem(file, *(place or (line, columns.get(line, 1))), message, hint, warning=True))
    return found


def _accepted(lines: Sequence[str], starts: Sequence[int]) -> dict[int, set[str]]:
    """Line of a rule -> the warnings accepted by comments in it or right above it."""
    accepted: dict[int, set[str]] = {}
    for number, text in enumerate(lines, 1):
        if "sallyport" in text and (comment := _ACCEPTED.search(text)):
            while number < len(lines) and lines[number - 1].lstrip().startswith("#"):
                number += 1
            line = starts[max(bisect_right(starts, number) - 1, 0)] if starts else 0
            accepted.setdefault(line, set()).update(re.split(r"[\s,]+", comment[1]))
    return accepted


def _risks(rule: Rule) -> Iterator[_Risk]:
    match, quoted = rule.match, f'rule "{rule.name}"'
    if rule.action is Verdict.BLOCK:
        return
    if not match.hosts:
        yield "any-host", None, f"{quoted} is for every host", 'write "host"'
    elsewhere = rule.rewrite is not None and rule.rewrite.host is not None
    named = elsewhere or (match.hosts and not any(pattern.depth for pattern in match.hosts))
    yield from _wide(rule, quoted, elsewhere)
    for injection in rule.inject:
        place, what = (injection.line, injection.column), f'credential "{injection.credential}"'
        if not named:
            yield "wildcard-credential", place, f"{quoted} sends {what} to hosts it does not name", "name each host"
        if "http" in match.schemes:
            yield "http-credential", place, f"{quoted} may send {what} unencrypted", 'leave "http" out'
    if match.path_regex is not None and not _anchored(match.path_regex.pattern):
        message = f"{quoted} has a path_regex that is found anywhere in a path"
        yield "unanchored-regex", None, message, "begin it with ^ and end it with $"


def _wide(rule: Rule, quoted: str, elsewhere: bool) -> Iterator[_Risk]:
    """What carries data out by itself: a name below a wildcard, and whatever may be written anywhere."""
    match = rule.match
    if rule.respond or not match.hosts:
        return
    wide = next((pattern for pattern in match.hosts if pattern.depth), None)
    if wide and not elsewhere and not (rule.limits and rule.limits.max_labels):
        message = f"{quoted} is for whatever stands below {wide}: a host name can carry data out"
        yield "wildcard-host", None, message, 'name each host, or write "limits: {max_labels: 1}"'
    if not match.paths and match.path_regex is None and (not match.methods or match.methods & _WRITE):
        what = ", ".join(sorted(match.methods & _WRITE)) or "any method"
        yield "write-anywhere", None, f"{quoted} allows {what} on every path", 'write "method" or "path"'


def _anchored(regex: str) -> bool:
    """Whether every alternative of `regex` is held at both ends."""
    flat = re.sub(r"\\.", "_", regex.replace(r"\A", "^").replace(r"\z", "$"))
    flat = re.sub(r"\[\^?\]?[^\]]*\]", "_", re.sub(r"^\(\?[a-z]+\)", "", flat))
    while (outer := re.sub(r"\([^()]*\)", "_", flat)) != flat:
        flat = outer
    return all(part.startswith("^") and part.endswith("$") for part in flat.split("|"))


def unknown_credentials(policy: Policy, names: Collection[str]) -> list[Problem]:
    """Injections of credentials that are not among `names`: a mistake where one of them is close, else a warning."""
    problems = []
    for rule in policy.rules:
        host = str(rule.match.hosts[0]) if rule.match.hosts else "HOST"
        if rule.rewrite and rule.rewrite.host:
            host = str(rule.rewrite.host)
        for injection in rule.inject:
            if (name := injection.credential) not in names:
                close = did_you_mean(name, names)
                hint = close or f"sallyport vault put {name} --host {shlex.quote(host)}"
                place = (rule.at.rpartition(":")[0], injection.line, injection.column)
                problems.append(Problem(*place, f'unknown credential "{name}"', hint, warning=not close))
    return problems
