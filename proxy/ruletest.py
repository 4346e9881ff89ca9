"""Tests of rules, `*.test.yaml`: requests with what is expected of them, run against a policy without a proxy."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

from proxy.agent import Agent, AgentState, parse_agent_id
from proxy.bodymatch import Body
from proxy.explain import injections
from proxy.plan import plan_of_client
from proxy.policy import Policy
from proxy.problem import Problem, Problems, UserError
from proxy.reason import Reason
from proxy.request import Ambiguous
from proxy.rulefield import parse_some_text, parse_text, parse_token, parse_version
from proxy.url import parse_url, url_of
from proxy.validation import did_you_mean, validate
from proxy.yamltree import Step, Tree, load

_UPGRADE = (("Connection", "Upgrade"), ("Upgrade", "websocket"))  # RFC 6455 section 4.1


def _agent_id(value: object) -> str:
    return parse_agent_id(parse_text(value))


def _url(value: object) -> str:
    url = parse_some_text(value)
    try:
        parse_url("GET", url)
    except UserError as error:
        raise ValueError(str(error), "") from None
    except Ambiguous:
        pass  # what becomes of it is the test's business
    return url


def _reason(value: object) -> Reason:
    try:
        return Reason(parse_text(value))
    except ValueError:
        raise ValueError(f'"{value}" is not a reason', did_you_mean(str(value), [*Reason])) from None


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


type _Text = Annotated[str, PlainValidator(parse_some_text, json_schema_input_type=str)]
type _Url = Annotated[str, PlainValidator(_url, json_schema_input_type=str)]
type _Value = Annotated[str, PlainValidator(parse_text, json_schema_input_type=str)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Request(_Model):
    """What an agent asks for."""

    agent: Annotated[str, PlainValidator(_agent_id, json_schema_input_type=str)]
    labels: dict[str, _Value] = {}
    method: Annotated[str, PlainValidator(lambda v: parse_token(v, "a method"), json_schema_input_type=str)] = "GET"
    url: _Url
    headers: dict[Annotated[str, PlainValidator(parse_token, json_schema_input_type=str)], _Value] = {}
    websocket: bool = False
    body: str | dict[str, Any] | list[Any] = ""
    """Text as it is sent, or anything else as JSON."""


class Expect(_Model):
    """What shall become of it; only what is written is compared. `url` is what would be sent, `inject` in any order."""

    verdict: Literal["allow", "block"]
    rule: _Text | None = None
    reason: Annotated[Reason | None, PlainValidator(_reason, json_schema_input_type=Literal[*Reason])] = None
    inject: Annotated[list[_Text], BeforeValidator(_listed, json_schema_input_type=str | list[str])] = []
    url: _Url = ""
    status: Annotated[int, Field(ge=200, le=599)] = 0


class CaseFields(_Model):
    """One test."""

    name: _Text
    request: Request
    expect: Expect


class _Head(_Model):
    version: Annotated[int, PlainValidator(parse_version, json_schema_input_type=Literal[1])]
    tests: list[Any] | None


@dataclass(frozen=True, slots=True)
class Case:
    """One test and its place, `file:line:column`."""

    name: str
    place: str
    request: Request
    expect: Expect


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a test; `expected` and `happened` tell of what differs, empty where it passed."""

    name: str
    place: str
    expected: str = ""
    happened: str = ""

    @property
    def passed(self) -> bool:
        """Whether everything was as expected."""
        return not self.expected

    def __str__(self) -> str:
        if self.passed:
            return f"{self.place}: passed: {self.name}"
        return f"{self.place}: failed: {self.name}\n    expected: {self.expected}\n    happened: {self.happened}"


def load_tests(files: Mapping[str, bytes]) -> list[Case]:
    """The tests of every file, given by name in path order.

    Raises Problems.
    """
    cases: list[Case] = []
    problems: list[Problem] = []
    for file, content in files.items():
        try:
            tree = load(content, file)
        except Problems as error:
            problems += error.problems
            continue
        _, wrong = validate(_Head, tree)
        entries = tree.data.get("tests") if isinstance(tree.data, dict) else None
        problems += wrong
        for index in range(len(entries) if isinstance(entries, list) else 0):
            path = ("tests", index)
            fields, wrong = validate(CaseFields, tree, path)
            problems += wrong
            if fields:
                cases.append(_case(tree, path, fields))
    if problems:
        raise Problems(problems)
    return cases


def _case(tree: Tree, path: Sequence[Step], fields: CaseFields) -> Case:
    line, column = tree.place(path)
    return Case(fields.name, f"{tree.file}:{line}:{column}", fields.request, fields.expect)


def run_tests(policy: Policy, cases: Iterable[Case]) -> list[Result]:
    """Every test's result, in order."""
    return [_run(policy, case) for case in cases]


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What happened, under the names of `Expect`."""

    verdict: str = "block"
    reason: Reason = Reason.AMBIGUOUS_REQUEST
    rule: str | None = None
    inject: tuple[str, ...] = ()
    url: str = ""
    status: int = Reason.AMBIGUOUS_REQUEST.status
    at: str = ""

    def __str__(self) -> str:
        by = f" by {self.rule} ({self.at})" if self.rule else ""
        if self.verdict == "block":
            return f"block, reason {self.reason}{by}"
        if not self.url:
            return f"allow{by}, answered with status {self.status}"
        credentials = f" with {', '.join(self.inject)}" if self.inject else ""
        return f"allow{by}, sent to {self.url}{credentials}"


def _run(policy: Policy, case: Case) -> Result:
    outcome = _ask(policy, case.request)
    expected = []
    for name in Expect.model_fields:
        wanted = getattr(case.expect, name)
        if name in case.expect.model_fields_set and not _same(name, wanted, getattr(outcome, name)):
            expected.append(_words(name, wanted, policy))
    return Result(case.name, case.place, ", ".join(expected), str(outcome) if expected else "")


def _ask(policy: Policy, request: Request) -> _Outcome:
    agent = Agent(request.agent, request.labels, state=AgentState.ACTIVE)
    try:
        view = parse_url(request.method, request.url, (*request.headers.items(), *(_UPGRADE * request.websocket)))
    except Ambiguous:
        return _Outcome()
    body = request.body if isinstance(request.body, str) else json.dumps(request.body)
    plan = plan_of_client(policy, agent, view._replace(body=Body(body.encode())))
    decision = plan.decision
    name, at = (plan.rule.name, plan.rule.at) if plan.rule else (None, "")
    if not decision.allowed:
        return _Outcome(decision.verdict, decision.reason, name, status=decision.reason.status, at=at)
    if plan.answer:
        return _Outcome(decision.verdict, decision.reason, name, status=plan.answer.status, at=at)
    credentials = tuple(injection.credential for injection in injections(plan))
    return _Outcome(decision.verdict, decision.reason, name, credentials, url_of(plan.view), 0, at)


def _same(name: str, wanted: Any, got: Any) -> bool:
    if name == "inject":
        return sorted(wanted) == sorted(got)
    if name == "url":
        try:
            return bool(url_of(parse_url("GET", wanted)) == got)
        except Ambiguous:
            return False
    return bool(wanted == got)


def _words(name: str, wanted: Any, policy: Policy) -> str:
    match name:
        case "verdict":
            return str(wanted)
        case "rule" if wanted is None:
            return "no rule"
        case "rule":
            names = {rule.name for rule in policy.rules}
            return f"rule {wanted}" if wanted in names else f"rule {wanted}, which there is not{_meant(wanted, names)}"
        case "inject":
            return f"{', '.join(wanted) or 'nothing'} injected"
        case "url":
            return f"sent to {wanted}"
    return f"{name} {wanted}"


def _meant(word: str, names: Iterable[str]) -> str:
    hint = did_you_mean(word, names)
    return f" ({hint})" if hint else ""
