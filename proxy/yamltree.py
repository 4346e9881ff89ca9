"""YAML text to plain data that remembers its places, and pydantic models checked against it in plain words.

What a setting or a rule means does not live here, nor does anything that opens a file.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import pydantic
import yaml
from pydantic_core import ErrorDetails

from proxy.problem import Problem, Problems

type Step = str | int

_MOST_BYTES = 10 * 1024 * 1024
_MOST_DEPTH = 50
_MOST_NODES = 1_000_000  # counted with every alias written out: the "billion laughs" bomb
_MOST_PROBLEMS = 100  # of one file's syntax; what follows is noise
_COLUMN_BITS = 24  # a mark is line << 24 | column, both from 0; 10 MiB have fewer columns than 2**24

# Controls, YAML 1.1's extra line breaks (a comment that an editor shows would end there), and the bidirectional
# overrides that make text read otherwise than it is parsed (CVE-2021-42574).
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff]")
_CONSTANTS = {"": None, "~": None} | {
    spelling: value
    for word, value in (("null", None), ("true", True), ("false", False))
    for spelling in (word, word.capitalize(), word.upper())
}
_INT = re.compile(r"[-+]?[0-9]{1,100}")  # int() of unbounded text is quadratic
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?")
_CORE = "tag:yaml.org,2002:"
_TAGS: dict[str, type | tuple[type, ...]] = {
    "null": types.NoneType,
    "bool": bool,
    "int": int,
    "float": (int, float),
}
_ADVICE = {
    "mapping values are not allowed in this context": 'quote text that contains ": "',
    "found character that cannot start any token": "quote text that begins with @, ` or %",
    "did not find expected ',' or ']'": "close the list with ]",
    "did not find expected ',' or '}'": "close the mapping with }",
    "did not find expected key": "compare the indentation with the lines above",
    "did not find expected '-' indicator": "compare the indentation with the lines above",
    "could not find expected ':'": 'a key is followed by ": "',
    "found unexpected end of stream": "close the quotes",
}


class Tree:
    """One YAML document: `data` (dict, list and scalars; not to be changed) and where each value of it stands."""

    __slots__ = ("_marks", "_root", "data", "file")

    def __init__(self, file: str, data: Any, marks: Mapping[int, Sequence[int]], root: int) -> None:
        self.file = file
        self.data = data
        self._marks = marks  # id of a container -> its items' marks; of a mapping: key, value, key, value...
        self._root = root

    def place(self, path: Sequence[Step], *, key: bool = False) -> tuple[int, int]:
        """Line and column, from 1, of the value at `path` (or of its key), or else of its nearest ancestor there is."""
        node, mark, key_mark = self.data, self._root, self._root
        for step in path:
            marks = self._marks.get(id(node), ())
            if isinstance(node, dict) and step in node:
                index = list(node).index(step)
                key_mark, mark = marks[2 * index : 2 * index + 2]
            elif isinstance(node, list) and isinstance(step, int) and 0 <= step < len(node):
                key_mark = mark = marks[step]
            else:
                key = False
                break
            node = node[step]
        return _position(key_mark if key else mark)

    def problem(self, path: Sequence[Step], message: str, hint: str = "", *, key: bool = False) -> Problem:
        """A Problem at the place of `path`."""
        return Problem(self.file, *self.place(path, key=key), message, hint)


def load(text: str | bytes, file: str) -> Tree:
    """The one document in `text`, scalars read by the YAML 1.2 core schema (`NO`, `0x1f` and dates are text).

    Raises Problems, whatever the bytes.
    """
    source = _readable(text, file)
    builder = _Builder(file)
    try:
        for event in yaml.parse(source, Loader=yaml.CSafeLoader):
            builder.take(event)
    except yaml.MarkedYAMLError as error:
        builder.report(*_syntax(error, source))
    except yaml.YAMLError:
        builder.report(0, "not readable as YAML")
    if builder.problems:
        raise Problems(builder.problems)
    return Tree(file, builder.data, builder.marks, builder.root)


def _readable(text: str | bytes, file: str) -> str:
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(raw) > _MOST_BYTES:
        raise Problems([Problem(file, 0, 0, "larger than 10 MiB", "split it into several files")])
    try:
        source = raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8")
        raise Problems([Problem(file, *_end_of(before), "not UTF-8 text", "save the file as UTF-8")]) from None
    if found := _FORBIDDEN.search(source):
        message = f"the invisible character U+{ord(found[0]):04X} is not allowed"
        raise Problems([Problem(file, *_end_of(source[: found.start()]), message, "remove it")])
    return source


def _end_of(text: str) -> tuple[int, int]:
    return text.count("\n") + 1, len(text) - text.rfind("\n")


def _position(mark: int) -> tuple[int, int]:
    return (mark >> _COLUMN_BITS) + 1, (mark & (1 << _COLUMN_BITS) - 1) + 1


def _mark(mark: Any) -> int:
    return int(mark.line << _COLUMN_BITS | mark.column)


def _syntax(error: yaml.MarkedYAMLError, source: str) -> tuple[int, str, str]:
    mark = error.problem_mark or error.context_mark
    words = error.problem or "no valid YAML"
    if mark is None:
        return 0, words, ""
    line = source[source.rfind("\n", 0, mark.index) + 1 : mark.index + 1]
    if "\t" in line[: len(line) - len(line.lstrip())] or line.endswith("\t"):
        return _mark(mark), "a tab cannot indent", "indent with spaces"
    hint = _ADVICE.get(words, "")
    if error.context_mark and error.context_mark.line != mark.line:
        began = f"see also line {error.context_mark.line + 1}"
        hint = f"{hint}; {began}" if hint else began
    return _mark(mark), words, hint


@dataclass(slots=True)
class _Frame:
    """One open mapping or list. `height` counts the levels inside it, `before` the nodes when it began."""

    value: Any
    marks: list[int]
    anchor: str | None
    before: int
    height: int = 0
    key: str | None = None
    key_mark: int = 0


class _Builder:
    """Builds the data from parser events, without recursion: nesting is the attacker's."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self.data: Any = None
        self.root = 0
        self.marks: dict[int, list[int]] = {}
        self._stack: list[_Frame] = []
        self._anchors: dict[str, tuple[Any, int, int] | None] = {}  # value, nodes, height; None while it is open
        self._nodes = 0
        self._documents = 0
        self._takers = {
            yaml.ScalarEvent: self._scalar,
            yaml.MappingStartEvent: self._open,
            yaml.SequenceStartEvent: self._open,
            yaml.MappingEndEvent: self._close,
            yaml.SequenceEndEvent: self._close,
            yaml.AliasEvent: self._alias,
            yaml.DocumentStartEvent: self._document,
        }

    def take(self, event: Any) -> None:
        taker = self._takers.get(type(event))
        if taker:
            taker(event)

    def report(self, mark: int, message: str, hint: str = "") -> None:
        self.problems.append(Problem(self.file, *_position(mark), message, hint))
        if len(self.problems) >= _MOST_PROBLEMS:
            raise Problems(self.problems)

    def _stop(self, mark: int, message: str, hint: str = "") -> NoReturn:
        self.report(mark, message, hint)
        raise Problems(self.problems)

    def _document(self, event: Any) -> None:
        self._documents += 1
        if self._documents > 1:
            self._stop(_mark(event.start_mark), "a second document begins here", "put one document into a file")

    def _scalar(self, event: Any) -> None:
        mark, text = _mark(event.start_mark), event.value
        value: Any = text
        if event.implicit[0] and event.tag is None:
            value = _resolve(text)
            if text == "<<" and self._at_key():
                self.report(mark, "merge keys (<<) are not supported", "write the fields out")
        elif event.tag not in (None, "!", _CORE + "str"):
            value = self._tagged(event.tag, text, mark)
        if "\0" in text:
            self.report(mark, "the invisible character U+0000 is not allowed", "remove it")
        if event.anchor is not None:
            self._anchors[event.anchor] = (value, 1, 0)
        self._count(1, mark)
        self._put(value, mark)

    def _tagged(self, tag: str, text: str, mark: int) -> Any:
        kind, value = _TAGS.get(tag.removeprefix(_CORE)), _resolve(text)
        if kind is None:
            self.report(mark, f"the tag {_shown(tag)} is not supported", "remove the tag")
        elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.report(mark, f"this value does not fit its tag {_shown(tag)}", "remove the tag")
        return value

    def _open(self, event: Any) -> None:
        mark = _mark(event.start_mark)
        if len(self._stack) >= _MOST_DEPTH:
            self._stop(mark, f"nested more than {_MOST_DEPTH} levels deep")
        mapping = type(event) is yaml.MappingStartEvent
        if event.tag not in (None, "!", _CORE + ("map" if mapping else "seq")):
            self.report(mark, f"the tag {_shown(event.tag)} is not supported", "remove the tag")
        frame = _Frame({} if mapping else [], [], event.anchor, self._nodes)
        self._count(1, mark)
        self._put(frame.value, mark)
        self.marks[id(frame.value)] = frame.marks
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        self._stack.append(frame)

    def _close(self, _event: Any) -> None:
        frame = self._stack.pop()
        height = frame.height + 1
        if self._stack:
            self._stack[-1].height = max(self._stack[-1].height, height)
        if frame.anchor is not None:
            self._anchors[frame.anchor] = (frame.value, self._nodes - frame.before, height)

    def _alias(self, event: Any) -> None:
        mark, name = _mark(event.start_mark), event.anchor
        value, nodes, height = self._anchors.get(name, (None, 1, 0)) or (None, 1, 0)
        if name not in self._anchors:
            self.report(mark, f'unknown alias "*{name}"', f'write "&{name}" before the value it stands for')
        elif self._anchors[name] is None:
            self.report(mark, f'the alias "*{name}" stands inside its own value')
        if len(self._stack) + height > _MOST_DEPTH:
            self._stop(mark, f"nested more than {_MOST_DEPTH} levels deep")
        if self._stack:
            self._stack[-1].height = max(self._stack[-1].height, height)
        self._count(nodes, mark)
        self._put(value, mark)

    def _count(self, nodes: int, mark: int) -> None:
        self._nodes += nodes
        if self._nodes > _MOST_NODES:
            self._stop(mark, "more than 1,000,000 values, aliases written out", "split the file, use fewer aliases")

    def _at_key(self) -> bool:
        return bool(self._stack) and isinstance(self._stack[-1].value, dict) and self._stack[-1].key is None

    def _put(self, value: Any, mark: int) -> None:
        if not self._stack:
            self.data, self.root = value, mark
            return
        frame = self._stack[-1]
        if isinstance(frame.value, list):
            frame.value.append(value)
            frame.marks.append(mark)
        elif frame.key is None:
            frame.key, frame.key_mark = self._key(frame, value, mark), mark
        else:
            if frame.key not in frame.value:
                frame.value[frame.key] = value
                frame.marks += (frame.key_mark, mark)
            frame.key = None

    def _key(self, frame: _Frame, value: Any, mark: int) -> str:
        if not isinstance(value, str):
            hint = "" if isinstance(value, dict | list) else f'put it in quotes: "{_written(value)}"'
            self.report(mark, f"a key must be text, not {kind_of(value)}", hint)
            return ""
        if value in frame.value:
            line, _ = _position(frame.marks[2 * list(frame.value).index(value)])
            self.report(mark, f'duplicate key "{value}"', f"it is on line {line} already")
        return value


def _resolve(text: str) -> Any:
    """A plain scalar's value (YAML 1.2 section 10.3.2, without octal, hexadecimal, infinity and not-a-number)."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if text[0] in "+-.0123456789":
        if _INT.fullmatch(text):
            return int(text)
        if _FLOAT.fullmatch(text) and math.isfinite(number := float(text)):
            return number
    return text


def _shown(tag: str) -> str:
    return "!!" + tag.removeprefix(_CORE) if tag.startswith(_CORE) else tag


def _written(value: Any) -> str:
    return str(value) if isinstance(value, str) else json.dumps(value)


def kind_of(value: object) -> str:
    """What a loaded value is, for a message; never the value itself, which may be a secret."""
    match value:
        case None:
            return "nothing"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case dict():
            return "a mapping"
    return "a list"


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
            hint = f'put it in quotes: "{_written(value)}"'
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
