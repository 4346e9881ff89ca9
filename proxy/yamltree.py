"""YAML text to plain data that remembers its places, all mistakes at once. Opens no file, knows no setting or rule."""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

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
            hint = "" if isinstance(value, dict | list) else f'put it in quotes: "{written(value)}"'
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


def written(value: Any) -> str:
    """A scalar as it may be written between quotes."""
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
