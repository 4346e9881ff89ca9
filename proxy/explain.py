"""Why a request is decided as it is, rule by rule, as text and as JSON. Opens nothing and decides nothing itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from proxy.agent import Agent
from proxy.outbound import placeholder_of
from proxy.pattern import any_glob
from proxy.plan import Plan, plan_of_client
from proxy.policy import Injection, Policy, Rule, Verdict, decide
from proxy.request import DEFAULT_PORTS, RequestView
from proxy.url import parse_url, url_of


@dataclass(frozen=True, slots=True)
class Row:
    """A rule, the first condition that is not met (empty: it matches) with the words for it, and whether it decides."""

    rule: Rule
    missing: str
    why: str
    decides: bool


@dataclass(frozen=True, slots=True)
class Explanation:
    """A plan and, for each time the request was decided, the rules that may name its host. `others`: rules left out."""

    agent: Agent
    plan: Plan
    steps: tuple[tuple[Row, ...], ...]
    others: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        """The same as data."""
        plan, first = self.plan, self.plan.views[0]
        sent = plan.decision.allowed and not plan.answer
        return {
            "agent": self.agent.id,
            "labels": dict(self.agent.labels),
            "method": first.method,
            "url": url_of(first),
            "verdict": plan.decision.verdict.value,
            "reason": plan.decision.reason.value,
            "rule": plan.rule.name if plan.rule else None,
            "rule_at": plan.rule.at if plan.rule else None,
            "message": reason_in_words(plan, self.agent),
            "steps": [
                {"url": url_of(view), "other_rules": others, "rules": [_row_json(row) for row in rows]}
                for view, rows, others in zip(plan.views, self.steps, self.others, strict=True)
            ],
            "sends": {"url": url_of(plan.view), "headers": header_edits(plan)} if sent else None,
            "inject": [
                {"credential": injection.credential, "location": location(injection)}
                for injection in (injections(plan) if sent else ())
            ],
            "respond": plan.answer.status if plan.decision.allowed and plan.answer else None,
        }

    def as_text(self) -> str:
        """The same for people."""
        return "\n".join(_text(self)) + "\n"


def explain(policy: Policy, agent: Agent, view: RequestView) -> Explanation:
    """What would be done with `view` for `agent`, and why."""
    plan = plan_of_client(policy, agent, view)
    steps, others = [], []
    for number, asked in enumerate(plan.views):
        decides = plan.rule if plan.passthrough else decide(policy, agent, asked).rule
        rules = list(policy.candidates(asked.host))
        others.append(len(policy.rules) - len(rules))
        if number and not _moved(plan.rules[number - 1]):
            rules = [rule for rule in rules if rule.action is Verdict.BLOCK]  # the only ones that are asked again
        steps.append(tuple(_row(rule, agent, asked, rule is decides) for rule in rules))
    return Explanation(agent, plan, tuple(steps), tuple(others))


def _moved(rule: Rule) -> bool:
    return rule.rewrite is not None and rule.rewrite.destination


def _row(rule: Rule, agent: Agent, view: RequestView, decides: bool) -> Row:
    missing = "" if rule.passthrough and decides else rule.mismatch(agent, view)
    return Row(rule, missing, _why(missing, rule, agent, view) if missing else "", decides)


def _why(missing: str, rule: Rule, agent: Agent, view: RequestView) -> str:
    match = rule.match
    match missing:
        case "tls":
            return "it is for connections that are passed through"
        case "host":
            return f"host {view.host} is not {_either(match.hosts)}"
        case "scheme":
            return f"scheme {view.scheme} is not {_either(sorted(match.schemes))}"
        case "port":
            ports = sorted(match.ports) or [DEFAULT_PORTS[view.scheme]]
            return f"port {view.port} is not {_either(ports)}"
        case "agents":
            return f"{agent.id} is not one of its agents"
        case "method" if view.overrides and view.method in match.methods:
            return f"it names methods, and the request may be another than {view.method} to its origin"
        case "method":
            return f"method {view.method} is not {_either(sorted(match.methods))}"
        case "path":
            return _path_why(rule, view)
        case "query" | "headers":
            return _values_why(missing, rule, view)
        case "body":
            return "its body does not fit" if view.body and not view.body.too_large else "its body cannot be seen"
    if rule.action is Verdict.BLOCK:
        return "it is no WebSocket"
    return f"it does not allow an upgrade to {view.upgrade}"


def _path_why(rule: Rule, view: RequestView) -> str:
    match = rule.match
    reading = next((path for path in view.readings if not match.path_matches(path)), view.path)
    shown = f"path {view.path}" if reading == view.path else f"path {view.path}, which can be read as {reading},"
    if not any_glob(match.paths, reading):
        return f"{shown} is not {_either(match.paths)}"
    return f"{shown} does not fit the regex {match.path_regex.pattern if match.path_regex else ''}"


def _values_why(missing: str, rule: Rule, view: RequestView) -> str:
    what, conditions, values_of = (
        ("header", rule.match.headers, view.header_values)
        if missing == "headers"
        else ("query parameter", rule.match.query, view.query_values)
    )
    for name, globs in conditions:
        readings = values_of(name)
        if not any(readings):
            return f"{what} {name} is missing"
        if not rule.values_match(globs, readings):
            return f"{what} {name} is not {_either(globs)}"
    return what


def _either(items: Iterable[object]) -> str:
    texts = [str(item) for item in items]
    shown = texts if len(texts) <= 4 else [*texts[:3], f"{len(texts) - 3} more"]
    return " or ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))


def injections(plan: Plan) -> list[Injection]:
    """The credentials that would be added, in order."""
    return [injection for rule in plan.rules for injection in rule.inject] if plan.decision.allowed else []


def location(injection: Injection) -> str:
    """Where a credential is added, in words."""
    name = injection.options.get("name", "")
    match injection.kind:
        case "bearer" | "basic":
            return f"header authorization ({injection.kind})"
        case "sigv4":
            scope = "/".join(filter(None, map(injection.options.get, ("region", "service"))))
            return f"header authorization (sigv4{f' for {scope}' if scope else ''})"
        case "header":
            return f"header {name.lower()}"
        case "query":
            return f"query parameter {name}"
        case "cookie":
            return f"cookie {name}"
        case "placeholder":
            text = placeholder_of(injection.credential, injection.options)
            return f"for {text} in {_either(injection.places or ('header',))}"
    return "as its kind says"


def header_edits(plan: Plan) -> dict[str, list[str]]:
    """The names of the headers that rewrites set and remove; values are left out, they may be private."""
    edits = [rule.rewrite.headers for rule in plan.rules if rule.rewrite]
    return {
        "set": [name for edit in edits for name in edit.set],
        "remove": [name for edit in edits for name in edit.remove],
    }


def reason_in_words(plan: Plan, agent: Agent) -> str:
    """The sentence the agent would read."""
    decision, view = plan.decision, plan.view
    return decision.reason.message.format(
        agent=agent.id, method=view.method, target=view.target, detail=decision.detail
    )


def _row_json(row: Row) -> dict[str, Any]:
    rule = row.rule
    return {
        "rule": rule.name,
        "at": rule.at,
        "action": rule.action.value,
        "decides": row.decides,
        "missing": row.missing or None,
        "why": row.why or None,
    }


def _text(explanation: Explanation) -> Iterator[str]:
    agent, plan = explanation.agent, explanation.plan
    labels = ", ".join(f"{key}={value}" for key, value in agent.labels.items())
    yield f"{plan.view.method} {url_of(plan.views[0])}"
    yield f"as {agent.id}{f' ({labels})' if labels else ''}"
    for number, (view, rows, others) in enumerate(zip(plan.views, explanation.steps, explanation.others, strict=True)):
        moved = number == 0 or _moved(plan.rules[number - 1])
        if number:
            yield ""
            yield f"rewritten to {url_of(view)}" + (", which is decided again" if moved else "")
        if rows or moved:
            yield ""
        yield from _table(rows)
        if moved:
            yield f"  {_count(others, 'rule', 'rules')} for other hosts" if rows else f"  no rule names {view.host}"
    yield ""
    yield from _outcome(explanation)


def _table(rows: Sequence[Row]) -> Iterator[str]:
    name_width = max((len(row.rule.name) for row in rows), default=0)
    at_width = max((len(row.rule.at) for row in rows), default=0)
    for row in rows:
        rule = row.rule
        words = row.why or ("matches" if row.decides else "matches too, but does not decide")
        mark = ">" if row.decides else " "
        yield f"{mark} {rule.action.value:<5}  {rule.name:<{name_width}}  {rule.at:<{at_width}}  {words}"


def _outcome(explanation: Explanation) -> Iterator[str]:
    plan, agent = explanation.plan, explanation.agent
    decision = plan.decision
    by = f" {'by' if decision.rule else 'after'} {plan.rule.name} ({plan.rule.at})" if plan.rule else ""
    if not decision.allowed:
        yield f"BLOCK {decision.reason}{by}"
        yield f"  {reason_in_words(plan, agent)}"
        return
    yield f"ALLOW{by}"
    if plan.answer:
        yield f"  answered here with status {plan.answer.status}; nothing is sent"
        return
    if plan.passthrough:
        yield "  passes the connection through: requests are not read, nothing is injected"
        return
    before, after = url_of(plan.views[0]), url_of(plan.view)
    yield f"  sends    {after}" if before == after else f"  sends    {after}  (instead of {before})"
    for verb, names in header_edits(plan).items():
        if names:
            yield f"  {verb + 's':<7}  {_count(len(names), 'header', 'headers')}: {', '.join(names)}"
    for injection in injections(plan):
        yield f"  injects  {injection.credential}, {location(injection)}"
    if any(rule.private for rule in plan.rules):
        yield "  reaches  private addresses only"


def _count(number: int, one: str, many: str) -> str:
    return f"{number or 'no'} {one if number == 1 else many}"


__all__ = ["Explanation", "Row", "explain", "header_edits", "injections", "location", "parse_url", "url_of"]
