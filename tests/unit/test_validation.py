"""Models checked against a tree: each mistake is one problem, in plain words, at its place."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Literal

import pydantic
import pytest

from proxy.validation import did_you_mean, validate
from proxy.yamltree import load


def test_did_you_mean_names_the_nearest() -> None:
    """Only a near word is offered."""
    assert did_you_mean("mtach", ["match", "name"]) == 'did you mean "match"?'
    assert did_you_mean("zzz", ["match", "name"]) == ""


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")


class _Inner(_Strict):
    host: str
    port: int = pydantic.Field(default=443, ge=1, le=65535)


class _Bearer(_Strict):
    as_: Literal["bearer"] = pydantic.Field(alias="as")


class _Query(_Strict):
    as_: Literal["query"] = pydantic.Field(alias="as")
    name: str


class _Colour(Enum):
    RED = "red"
    BLUE = "blue"


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError(f"{value} is even", "take an odd number")
    return value


def _ascii(value: str) -> str:
    value.encode("ascii")
    return value


class _Model(_Strict):
    name: str = pydantic.Field(min_length=1)
    match: _Inner | None = None
    hosts: str | list[str] = "x"
    either: Literal["auto"] | int | None = None
    maybe: str | _Inner | None = None
    inject: list[Annotated[_Bearer | _Query, pydantic.Field(discriminator="as_")]] = []
    loose: list[_Inner | _Query] = []
    table: dict[Annotated[str, pydantic.AfterValidator(_ascii)], tuple[int, ...]] = {}
    action: Literal["allow", "block"] = "allow"
    colour: _Colour = _Colour.RED
    flag: bool = False
    ratio: float = 1.0
    odd: Annotated[int, pydantic.AfterValidator(_odd)] = 1
    few: tuple[str, ...] = pydantic.Field(default=(), max_length=2)


def _wrong(text: str) -> list[str]:
    model, problems = validate(_Model, load(text, "f"))
    assert model is None
    return [str(problem) for problem in sorted(problems)]


def test_a_valid_tree_becomes_the_model() -> None:
    """A list becomes a tuple and text an Enum, an integer may stand for a float; nothing else is converted."""
    text = "{name: a, hosts: [x], inject: [{as: query, name: k}], table: {k: [1]}, colour: blue, ratio: 2, few: [x]}"
    model, problems = validate(_Model, load(text, "f"))
    assert problems == []
    assert model is not None
    assert (model.hosts, model.table, model.colour, model.few) == (["x"], {"k": (1,)}, _Colour.BLUE, ("x",))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", 'f:1:1: missing field "name"'),
        ("[]", "f:1:1: expected a mapping, got a list"),
        ("", "f:1:1: expected a mapping, got nothing"),
        ("{name: a, mtach: {}}", 'f:1:11: unknown field "mtach"\n    hint: did you mean "match"?'),
        ("{name: a, zzzz: 1}", 'f:1:11: unknown field "zzzz"'),
        ("{name: a, match: {host: h, prot: 1}}", 'f:1:28: unknown field "prot"\n    hint: did you mean "port"?'),
        ("{name: a, match: {}}", 'f:1:18: missing field "host"'),
        ("{name: a, match: 5}", "f:1:18: expected a mapping, got a number"),
        ("{name: 5}", 'f:1:8: expected text, got a number\n    hint: put it in quotes: "5"'),
        ("{name: true}", 'f:1:8: expected text, got true\n    hint: put it in quotes: "true"'),
        ("{name: ''}", "f:1:8: must not be empty"),
        ("{name: a, match: {host: h, port: '1'}}", "f:1:34: expected a whole number, got text"),
        ("{name: a, match: {host: h, port: 0}}", "f:1:34: must be at least 1"),
        ("{name: a, match: {host: h, port: 70000}}", "f:1:34: must be at most 65535"),
        ("{name: a, hosts: {a: b}}", "f:1:18: expected text or a list of text, got a mapping"),
        ("{name: a, hosts: [a, 5]}", 'f:1:22: expected text, got a number\n    hint: put it in quotes: "5"'),
        (
            "{name: a, hosts: 5}",
            'f:1:18: expected text or a list of text, got a number\n    hint: put it in quotes: "5"',
        ),
        ("{name: a, either: x}", 'f:1:19: expected "auto" or a whole number, got text'),
        ("{name: a, maybe: [x]}", "f:1:18: expected text or a mapping, got a list"),
        ("{name: a, maybe: {hots: h, host: h}}", 'f:1:19: unknown field "hots"\n    hint: did you mean "host"?'),
        (
            "{name: a, inject: [{as: baerer}]}",
            'f:1:25: expected "bearer" or "query", got "baerer"\n    hint: did you mean "bearer"?',
        ),
        ("{name: a, inject: [{}]}", 'f:1:20: missing field "as"'),
        ("{name: a, inject: [x]}", "f:1:20: expected a mapping, got text"),
        (
            "{name: a, inject: [{as: query, nmae: x, name: x}]}",
            'f:1:32: unknown field "nmae"\n    hint: did you mean "name"?',
        ),
        ("{name: a, inject: {as: query}}", "f:1:19: expected a list of mappings, got a mapping"),
        ("{name: a, loose: [{as: query}]}", 'f:1:19: missing field "name"'),
        ("{name: a, loose: x}", "f:1:18: expected a list of mappings, got text\n    hint: write it in brackets: [...]"),
        ("{name: a, table: {x: [1, y]}}", "f:1:26: expected a whole number, got text"),
        ("{name: a, table: {x: 1}}", "f:1:22: expected a list of whole numbers, got a number"),
        (
            "{name: a, table: {é: [1]}}",
            "f:1:19: 'ascii' codec can't encode character '\\xe9' in position 0: ordinal not in range(128)",
        ),
        ("{name: a, action: alow}", 'f:1:19: expected "allow" or "block", got "alow"\n    hint: did you mean "allow"?'),
        ("{name: a, action: [x]}", 'f:1:19: expected "allow" or "block", got a list'),
        ("{name: a, colour: green}", 'f:1:19: expected "red" or "blue", got "green"'),
        ("{name: a, flag: yes}", "f:1:17: expected true or false, got text"),
        ("{name: a, ratio: x}", "f:1:18: expected a number, got text"),
        ("{name: a, odd: 2}", "f:1:16: 2 is even\n    hint: take an odd number"),
        ("{name: a, few: [a, b, c]}", "f:1:16: takes at most 2 of them"),
    ],
)
def test_each_mistake_is_one_problem_in_plain_words(text: str, expected: str) -> None:
    """No line for every member of a union, no jargon, no address of a manual."""
    assert _wrong(text) == [expected]


def test_a_models_mistakes_are_told_at_once() -> None:
    """Every field is judged whatever is wrong with the others."""
    wrong = _wrong("match: {host: 1}\nflag: x\nextra: 1\n")
    assert [line.split(": ")[0] for line in wrong] == ["f:1:1", "f:1:15", "f:2:7", "f:3:1"]


def test_a_part_of_a_tree_can_be_validated() -> None:
    """With a path, problems still have their places in the file."""
    tree = load("rules:\n  - {host: h}\n  - {hots: h}\n", "f")
    assert validate(_Inner, tree, ("rules", 0)) == (_Inner(host="h"), [])
    assert [problem.place for problem in validate(_Inner, tree, ("rules", 1))[1]] == ["f:3:5", "f:3:6"]
