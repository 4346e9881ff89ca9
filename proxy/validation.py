"""Pydantic models checked against a YAML tree: every error becomes a Problem at its place, in plain words."""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic_core import ErrorDetails

from proxy.problem import Problem
from proxy.yamltree import Step, Tree, kind_of, written


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A hint naming the choice nearest to `word`, or an empty string."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f'did you mean "{near[0]}"?' if near else ""


def validate[M: pydantic.BaseModel](
    model: type[M], tree: Tree, path: Sequence[Step] = ()
) -> tuple[M | None, list[Problem]]:
    """The value at `path` as a `model`, or every mistake in it.

    Types are not converted, but a list becomes a tuple, and text an Enum or a Path: pydantic's strict mode for JSON.
    A validator's ValueError("message") or ValueError("message", "hint") is shown in its own words.
    """
    data = tree.data
    for step in path:
        data = data[step]
    try:
        return model.model_validate_json(json.dumps(data), strict=True), []
    except pydantic.ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
    return None, list(_Words(tree).tell(details, model, tuple(path), 0))


# Errors that say only "this is no such value": of a union, one of these for every member is one mistake.
_MISMATCH = {"literal_error", "enum", "none_required", "is_instance_of", "model_attributes_type"}
_BOUNDS = {
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "too_short": "needs at least {min_length} of them",
    "too_long": "takes at most {max_length} of them",
    "string_too_short": "needs at least {min_length} characters",
    "string_too_long": "takes at most {max_length} characters",
    "string_pattern_mismatch": "does not have the form {pattern}",
}


@dataclass(frozen=True, slots=True)
class _Words:
    """Pydantic's errors told as Problems. `at` is how many steps of an error's `loc` lead to `path`."""

    tree: Tree

    def tell(self, errors: list[ErrorDetails], kind: Any, path: tuple[Step, ...], at: int) -> Iterable[Problem]:
        """The problems of `errors`, all of which lie at or below `path`, a value of type `kind`."""
        kind = _bare(kind)
        groups: dict[Step, list[ErrorDetails]] = {}
        for error in errors:
            if len(error["loc"]) > at:
                groups.setdefault(error["loc"][at], []).append(error)
        for error in errors:
            # Pydantic does not count items that are wrong themselves, and calls their list too short as well.
            if len(error["loc"]) == at and not (groups and error["type"] == "too_short"):
                yield self._one(error, kind, path)
        if groups and len(_members(kind)) > 1:
            yield from self._union(groups, kind, path, at)
            return
        for step, group in groups.items():
            yield from self._below(group, kind, (*path, step), at + 1)

    def _below(self, errors: list[ErrorDetails], kind: Any, path: tuple[Step, ...], at: int) -> Iterable[Problem]:
        step, rest = path[-1], []
        for error in errors:
            if error["type"] == "extra_forbidden" and len(error["loc"]) == at:
                hint = did_you_mean(str(step), _fields(kind))
                yield self.tree.problem(path, f'unknown field "{step}"', hint, key=True)
            elif error["loc"][at:] == ("[key]",):
                yield self._one(error, _child(kind, "[key]"), path, key=True)
            else:
                rest.append(error)
        yield from self.tell(rest, _child(kind, step), path, at)

    def _union(
        self, groups: dict[Step, list[ErrorDetails]], kind: Any, path: tuple[Step, ...], at: int
    ) -> Iterable[Problem]:
        fitting = {label: group for label, group in groups.items() if not _mismatch(group, at + 1)}
        if not fitting:
            yield self._mismatched(kind, path)
            return
        label = min(fitting, key=lambda name: len(fitting[name]))
        yield from self.tell(fitting[label], _member(kind, label), path, at + 1)

    def _one(self, error: ErrorDetails, kind: Any, path: tuple[Step, ...], *, key: bool = False) -> Problem:
        context = error.get("ctx", {})
        name = error["type"]
        if name == "missing":
            return self.tree.problem(path, f'missing field "{path[-1]}"')
        if name in ("value_error", "assertion_error"):
            return self.tree.problem(path, *_own_words(context["error"]), key=key)
        if context.get("min_length") == 1:
            return self.tree.problem(path, "must not be empty", key=key)
        if name in _BOUNDS:
            return self.tree.problem(path, _BOUNDS[name].format(**context), key=key)
        if name in ("union_tag_not_found", "union_tag_invalid"):
            return self._tag(name, context, kind, path)
        if _is_mismatch(name):
            return self._mismatched(kind, path)
        return self.tree.problem(path, error["msg"].removeprefix("Input ").replace("should be", "must be"), key=key)

    def _tag(self, name: str, context: dict[str, Any], kind: Any, path: tuple[Step, ...]) -> Problem:
        field = str(context["discriminator"]).strip("'").rpartition("' | '")[2]  # the name, or name and alias
        value = _value(self.tree, path)
        if field.endswith("()") or not isinstance(value, dict):
            return self._mismatched(kind, path)
        if name == "union_tag_not_found":
            return self.tree.problem(path, f'missing field "{field}"')
        tags = [tag.strip("'") for tag in str(context["expected_tags"]).split(", ")]
        return self._choice(tags, (*path, field))

    def _mismatched(self, kind: Any, path: tuple[Step, ...]) -> Problem:
        choices = _choices(kind)
        if choices:
            return self._choice(choices, path)
        expected, value = _expected(kind), _value(self.tree, path)
        hint = ""
        if "text" in expected.split(" or ") and (value is None or isinstance(value, bool | int | float)):
            hint = f'put it in quotes: "{written(value)}"'
        elif expected.startswith("a list") and " or " not in expected and isinstance(value, str):
            hint = "write it in brackets: [...]"
        return self.tree.problem(path, f"expected {expected}, got {kind_of(value)}", hint)

    def _choice(self, choices: Sequence[str], path: tuple[Step, ...]) -> Problem:
        value = _value(self.tree, path)
        got = f'"{value}"' if isinstance(value, str) and len(value) <= 40 else kind_of(value)
        hint = did_you_mean(value, choices) if isinstance(value, str) else ""
        return self.tree.problem(path, f"expected {_either(f'"{choice}"' for choice in choices)}, got {got}", hint)


def _own_words(error: Exception) -> tuple[str, str]:
    match error.args:
        case (str(message), str(hint)):
            return message, hint
    return str(error) or "not valid", ""


def _value(tree: Tree, path: Sequence[Step]) -> Any:
    value = tree.data
    for step in path:
        if type(value) not in (dict, list):
            return value  # it stands alone where the model has a list of one
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _is_mismatch(name: str) -> bool:
    return name in _MISMATCH or name.endswith(("_type", "_parsing"))


def _mismatch(group: list[ErrorDetails], at: int) -> bool:
    return all(len(error["loc"]) == at and _is_mismatch(error["type"]) for error in group)


def _bare(kind: Any) -> Any:
    """The annotation without aliases, metadata and an only `| None`, which leave no trace in an error's place."""
    while True:
        if isinstance(kind, typing.TypeAliasType):
            kind = kind.__value__
        elif typing.get_origin(kind) is Annotated:
            kind = typing.get_args(kind)[0]
        elif len(members := _members(kind)) == 1 and members[0] is not kind:
            kind = members[0]
        else:
            return kind


def _members(kind: Any) -> list[Any]:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return [member for member in typing.get_args(kind) if member is not types.NoneType]
    return [kind]


def _member(kind: Any, label: Step) -> Any:
    """The union's member that pydantic calls `label`: a class name, or the value that tells it from the others."""
    for member in _members(kind):
        bare = _bare(member)
        tags = [getattr(extra, "tag", None) for extra in getattr(member, "__metadata__", ())]
        if isinstance(bare, type) and issubclass(bare, pydantic.BaseModel):
            tags += [choice for field in bare.model_fields.values() for choice in _choices(field.annotation)]
        if label in tags or label == getattr(bare, "__name__", None) or str(label).startswith(f"{_name(bare)}["):
            return member
    return None


def _name(kind: Any) -> str:
    return getattr(typing.get_origin(kind), "__name__", "?")


def _fields(kind: Any) -> dict[str, Any]:
    if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
        return {field.alias or name: field.annotation for name, field in kind.model_fields.items()}
    return {}


def _child(kind: Any, step: Step) -> Any:
    """The type of the items (or of field `step`, or of the keys for "[key]") of a value of type `kind`."""
    kind = _bare(kind)
    arguments = typing.get_args(kind)
    if _fields(kind) or not arguments:
        return _fields(kind).get(str(step))
    if len(arguments) == 2 and arguments[1] is not Ellipsis:
        return arguments[0] if step == "[key]" else arguments[1]
    return arguments[0]


def _choices(kind: Any) -> list[str]:
    kind = _bare(kind)
    if typing.get_origin(kind) is Literal:
        return [choice for choice in typing.get_args(kind) if isinstance(choice, str)]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [str(member.value) for member in kind]
    return []


_NAMES: dict[Any, str] = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    Path: "a path",
    types.NoneType: "null",
}
_ITEMS = {"text": "text", "a whole number": "whole numbers", "a number": "numbers", "a mapping": "mappings"}


def _expected(kind: Any) -> str:
    kind = _bare(kind)
    if choices := _choices(kind):
        return _either(f'"{choice}"' for choice in choices)
    if len(_members(kind)) > 1:
        return _either(dict.fromkeys(_expected(member) for member in _members(kind)))
    origin = typing.get_origin(kind) or kind
    if not isinstance(origin, type) or origin in _NAMES:
        return _NAMES.get(origin, "another kind of value")
    if issubclass(origin, pydantic.BaseModel | Mapping):
        return "a mapping"
    if issubclass(origin, Sequence | set | frozenset) and not issubclass(origin, str):
        items = _ITEMS.get(_expected(_child(kind, 0)), "")
        return f"a list of {items}" if items else "a list"
    return "another kind of value"


def _either(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last
