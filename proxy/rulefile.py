"""Rule files to a Policy, or every mistake in all of them at once, and the warnings about it.

How a rule is written is known to `rulemodel`, what is risky to `rulerisk`; files are opened elsewhere.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from proxy.credential import KINDS, no_aws_word
from proxy.policy import AgentMatch, Answer, Edit, Injection, Limits, Match, Policy, Rewrite, Rule, Verdict
from proxy.problem import Problem, Problems
from proxy.rulefield import parse_header_name, parse_header_value, parse_token
from proxy.rulemodel import (
    AgentLabels,
    FileHead,
    HeaderEdit,
    InjectFields,
    InjectOptions,
    MatchFields,
    QueryEdit,
    RewriteFields,
    RuleFields,
    rules_schema,
)
from proxy.rulerisk import unknown_credentials, warnings
from proxy.validation import validate
from proxy.yamltree import Step, Tree, load

_FREE_TEXT = frozenset({"labels", "query", "headers", "json"})  # whose values are text even where YAML sees a number
_PLAIN = re.compile(r"[^\s,\]}*&!'\"][^\s,\]}]*")
_BODILESS = frozenset({204, 205, 304})  # RFC 9110 sections 15.3.5, 15.3.6 and 15.4.5


def load_policy(files: Mapping[str, bytes]) -> tuple[Policy, list[Problem]]:
    """The policy of rule files, given by name in path order, and the warnings about it.

    Raises Problems with every mistake and warning of every file.
    """
    rules: list[Rule] = []
    problems: list[Problem] = []
    taken: dict[str, str] = {}
    digest = hashlib.sha256()
    for file, content in files.items():
        digest.update(b"%d:%d:%b%b" % (len(file.encode()), len(content), file.encode(), content))
        found, wrong = parse_rules(content, file, taken)
        rules += found
        problems += wrong
    if any(not problem.warning for problem in problems):
        raise Problems(problems)
    return Policy(rules, digest.hexdigest()[:16]), sorted(problems)


def parse_rules(
    content: str | bytes, file: str, taken: dict[str, str] | None = None
) -> tuple[list[Rule], list[Problem]]:
    """The rules of one file that are right, and everything to be said about it, warnings included.

    `taken` has the names of the rules before it with their places, and is given those of this file.
    """
    try:
        tree = load(content, file)
    except Problems as error:
        return [], error.problems
    _, problems = validate(FileHead, tree)
    entries = tree.data.get("rules") if isinstance(tree.data, dict) else None
    if not isinstance(entries, list):
        return [], problems
    text = content if isinstance(content, str) else content.decode()
    reader = _Reader(tree, text.removeprefix("\ufeff").splitlines(), {} if taken is None else taken)
    rules = [rule for index in range(len(entries)) if (rule := reader.rule(index))]
    starts = [tree.place(("rules", index)) for index in range(len(entries))]
    return rules, problems + reader.problems + warnings(rules, reader.lines, starts, file)


class _Reader:
    """One file while its rules are read. `taken`: name -> place of the rule that has it."""

    def __init__(self, tree: Tree, lines: Sequence[str], taken: dict[str, str]) -> None:
        self.tree = tree
        self.lines = lines
        self.taken = taken
        self.problems: list[Problem] = []

    def report(self, path: Sequence[Step], message: str, hint: str = "", *, key: bool = False) -> None:
        self.problems.append(self.tree.problem(path, message, hint, key=key))

    def rule(self, index: int) -> Rule | None:
        """The rule at `index`, or None where it is not right, which is reported."""
        path = ("rules", index)
        self._keep_spelling(self.tree.data["rules"][index], path, free=False)
        fields, problems = validate(RuleFields, self.tree, path)
        self.problems += problems
        if fields is None:
            return None
        before = len(self.problems)
        at = f"{self.tree.file}:{self.tree.place(path)[0]}"
        first = self.taken.setdefault(fields.name, at)
        if first is not at:
            self.report((*path, "name"), f'the name "{fields.name}" is taken', f"the first is at {first}")
        self._check_combination(fields, path)
        rule = Rule(
            fields.name,
            at,
            Verdict(fields.action),
            _agents(fields),
            _match(fields.match, allow=fields.action == "allow"),
            self._rewrite(fields.rewrite, (*path, "rewrite")) if fields.rewrite.model_fields_set else None,
            self._inject(fields.inject, (*path, "inject")),
            _edit(fields.response.headers),
            Answer(**fields.respond.model_dump()) if "respond" in fields.model_fields_set else None,
            fields.private,
            Limits(**fields.limits.model_dump()) if fields.limits.model_fields_set else None,
            fields.tls == "passthrough",
            bool(fields.scan),
            fields.connections == "per-agent",
        )
        return rule if len(self.problems) == before else None

    def _keep_spelling(self, node: Any, path: tuple[Step, ...], *, free: bool) -> None:
        """Make text of scalars that are meant as text, as they are written: 007 and 1.10 must not become 7 and 1.1."""
        for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            if isinstance(value, dict | list):
                self._keep_spelling(value, (*path, key), free=free or key in _FREE_TEXT)
            elif free and isinstance(value, int | float):
                line, column = self.tree.place((*path, key))
                if written := _PLAIN.match(self.lines[line - 1], column - 1):  # else an alias, anchor or tag: refused
                    node[key] = written[0]

    def _check_combination(self, fields: RuleFields, path: tuple[Step, ...]) -> None:
        written = fields.model_fields_set
        if fields.action == "block":
            for name in ("rewrite", "inject", "response", "respond", "private", "connections", "limits", "scan", "tls"):
                if name in written:
                    self.report((*path, name), f'a block rule has no "{name}"', "remove it", key=True)
        elif fields.tls == "passthrough":
            self._check_passthrough(fields, path)
        elif "respond" in written:
            for name in ("rewrite", "inject"):
                if name in written:
                    message = f'"{name}" and "respond" exclude each other: nothing is sent'
                    self.report((*path, name), message, "remove one of them", key=True)
        if fields.respond.body and fields.respond.status in _BODILESS:
            self.report((*path, "respond", "body"), f"a {fields.respond.status} answer has no body", key=True)

    def _check_passthrough(self, fields: RuleFields, path: tuple[Step, ...]) -> None:
        """Of such a connection only agent, host and port are known, and nothing in it can be changed."""
        hint = 'remove it, or else "tls: passthrough"'
        for name in ("rewrite", "inject", "response", "respond", "limits", "scan"):
            if name in fields.model_fields_set:
                self.report((*path, name), f'a passthrough rule has no "{name}": nothing is read', hint, key=True)
        for name in sorted(fields.match.model_fields_set - {"host", "port", "scheme"}):
            message = f'a passthrough rule has no "match.{name}": nothing is read'
            self.report((*path, "match", name), message, hint, key=True)
        if "http" in fields.match.scheme:
            self.report((*path, "match", "scheme"), "http has no TLS to pass through", 'leave "http" out')
        if not fields.match.host or any(not pattern.name for pattern in fields.match.host):
            message = "a passthrough rule names its hosts: what is not read could go anywhere"
            self.report((*path, "tls"), message, 'write "match.host"')

    def _rewrite(self, fields: RewriteFields, path: tuple[Step, ...]) -> Rewrite:
        url = fields.url
        regex, to = (url.path.regex, url.path.to) if url.path else (None, "")
        groups = regex.groups if regex is not None else 0
        for group in re.findall(r"\\(\d\d?)", to):
            if int(group) > groups:
                have = "the regex has no groups" if not groups else f"the last group of the regex is \\{groups}"
                self.report((*path, "url", "path", "to"), f"there is no group {group}", have)
        return Rewrite(url.host, url.port or None, regex, to, _edit(url.query), _edit(fields.headers))

    def _inject(self, entries: Sequence[InjectFields], path: tuple[Step, ...]) -> tuple[Injection, ...]:
        injections = []
        places: dict[str, int] = {}
        for index, entry in enumerate(entries):
            injection = self._injection(entry, (*path, index))
            injections.append(injection)
            if index and injections[index - 1].kind == "sigv4":
                message = "it would change what the signature before it is of"
                self.report((*path, index), message, "put the sigv4 credential last")
            for place in _places(injection):
                if place in places:
                    message = f"two credentials for one place, {place}: only the last would be sent"
                    self.report((*path, index), message, f"the first is on line {places[place]}")
                places.setdefault(place, injection.line)
        return tuple(injections)

    def _injection(self, entry: InjectFields, path: tuple[Step, ...]) -> Injection:
        line, column = self.tree.place(path)
        kind, options, at = entry.as_, InjectOptions(), path
        if isinstance(kind, dict):
            [(kind, options)] = kind.items()
            at = (*path, "as", kind)
        given = dict.fromkeys(options.model_fields_set, (options, at))
        for name in entry.model_fields_set & InjectOptions.model_fields.keys():
            if name in given:
                self.report((*path, _written(name)), f'"{_written(name)}" is given twice', key=True)
            given[name] = (entry, path)
        values = {name: getattr(model, name) for name, (model, _) in given.items()}
        for name, (_, place) in given.items():
            self._check_option(kind, name, values[name], (*place, _written(name)))
        if "name" in KINDS.get(kind, ()) and "name" not in values:
            self.report(
                at, f'{kind} needs a "name"', f"write {{credential: {entry.credential}, as: {kind}, name: ...}}"
            )
        places = values.pop("in_", ())
        return Injection(entry.credential, kind, values, places, line, column)

    def _check_option(self, kind: str, name: str, value: Any, path: tuple[Step, ...]) -> None:
        known = (*KINDS.get(kind, ()), *(("in_",) if kind == "placeholder" else ()))
        if not kind:
            self.report(path, f'"{path[-1]}" needs "as"', "say how the credential is added", key=True)
        elif name not in known:
            takes = ", ".join(f'"{_written(option)}"' for option in known)
            message = f'{kind} has no option "{path[-1]}"'
            self.report(path, message, f"it takes {takes}" if takes else "it takes none", key=True)
        elif mistake := _wrong(kind, name, value):
            self.report(path, *mistake)


def _agents(fields: RuleFields) -> tuple[AgentMatch, ...]:
    ids = tuple(item for item in fields.agents if not isinstance(item, AgentLabels))
    labels = (AgentMatch(labels=tuple(i.labels.items())) for i in fields.agents if isinstance(i, AgentLabels))
    return (*((AgentMatch(ids),) if ids else ()), *labels)


def _match(fields: MatchFields, *, allow: bool) -> Match:
    """What is not written matches everything in a block rule; an allow rule is for https on its own port then."""
    return Match(
        fields.host,
        frozenset(fields.port),
        allow and not fields.port,
        frozenset(fields.scheme or (["https"] if allow else [])),
        frozenset(fields.method) | ({"HEAD"} if "GET" in fields.method else set()),
        fields.websocket,
        fields.path,
        fields.path_regex,
        tuple(fields.query.items()),
        tuple(fields.headers.items()),
        tuple(fields.body.json_.items()) if fields.body else (),
    )


def _edit(fields: HeaderEdit | QueryEdit) -> Edit:
    return Edit(fields.set, fields.remove)


def _written(name: str) -> str:
    return name.rstrip("_")


def _wrong(kind: str, name: str, value: Any) -> tuple[str, str] | None:
    """What is wrong with an option's value, and a hint."""
    if name == "in_":
        return None
    try:
        if (kind, name) == ("header", "name"):
            parse_header_name(value)
        if kind == "cookie":
            parse_token(value, "the name of a cookie")  # RFC 6265 section 4.1.1
        parse_header_value(value)
    except ValueError as error:
        return error.args[0], error.args[1]
    if name == "value" and "{secret}" not in value:
        return "the value holds no {secret}", 'write "{secret}" where the secret shall stand'
    if kind == "sigv4" and (mistake := no_aws_word(value)):
        return f"the {name} {mistake}", ""
    if name == "username" and ":" in value:
        return "a user name holds no colon", ""  # RFC 7617 section 2
    return None


def _places(injection: Injection) -> tuple[str, ...]:
    """What an injection fills; what only the credential's kind knows is left out."""
    match injection.kind:
        case "bearer" | "basic" | "sigv4":
            return ("header authorization",)
        case "header":
            return (f"header {injection.options.get('name', '').lower()}",)
        case "query" | "cookie":
            return (f"{injection.kind} {injection.options.get('name', '')}",)
        case "placeholder":
            text = injection.options.get("placeholder", injection.credential)
            return tuple(f"placeholder {text} in {place}" for place in injection.places or ("header",))
    return ()


__all__ = ["load_policy", "parse_rules", "rules_schema", "unknown_credentials"]
