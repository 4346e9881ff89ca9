"""What rules may ask of a request's body: values in JSON, by JSON pointer (RFC 6901). Pure; nothing is read here.

A body that two readers could read differently is not evaluated: names given twice, other than JSON in UTF-8.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from proxy.coding import Undecodable, decoder
from proxy.pattern import Glob, any_glob

type Conditions = Sequence[tuple[tuple[str, ...], tuple[Glob, ...]]]  # pointer, taken apart -> globs

_BAD_ESCAPE = re.compile("~(?![01])")
_INDEX = re.compile("0|[1-9][0-9]{0,9}")


def parse_pointer(text: str) -> tuple[str, ...]:
    """The names a JSON pointer leads along.

    Raises ValueError(message, hint).
    """
    if not text.startswith("/"):
        raise ValueError(f'"{text}" is not a JSON pointer', f'write "/{text}"; RFC 6901')
    if _BAD_ESCAPE.search(text):
        raise ValueError(f'"{text}" is not a JSON pointer', 'write "~0" for "~" and "~1" for "/" in a name')
    return tuple(part.replace("~1", "/").replace("~0", "~") for part in text[1:].split("/"))


class Body:
    """A request's whole body. None: it is too large to be seen."""

    __slots__ = ("_document", "_known", "too_large")

    def __init__(self, raw: bytes | None, content_encoding: str = "", limit: int = 1 << 20) -> None:
        """`limit`: bytes that a coded body may have when it was decoded."""
        self.too_large = raw is None
        self._known = raw is not None
        self._document: Any = None
        if raw:
            try:
                self._document = _parse(_decoded(raw, content_encoding, limit))
            except _TooLarge:
                self._known, self.too_large = False, True
            except (ValueError, RecursionError, Undecodable):
                self._known = False

    def meets(self, conditions: Conditions, *, every: bool) -> bool:
        """Whether the values at every pointer fit: all readings of them (`every`) or any. What cannot be evaluated
        does not fit in the first case, and fits in the other."""
        for pointer, globs in conditions:
            if not self._known:
                return not every
            values = list(_values(self._document, pointer))
            if None in values:
                if every:
                    return False
                continue
            found = (any_glob(globs, value) for value in values if value is not None)
            if not values or not (all(found) if every else any(found)):
                return False
        return True


class Unseen(Body):
    """A body that is not here yet; `asked` is whether a condition wanted to know it."""

    __slots__ = ("asked",)

    def __init__(self) -> None:
        super().__init__(None)
        self.asked = self.too_large = False

    def meets(self, conditions: Conditions, *, every: bool) -> bool:
        """No; but that somebody asked is remembered."""
        self.asked = True
        return False


class _TooLarge(Exception):
    pass


def _decoded(raw: bytes, content_encoding: str, limit: int) -> bytes:
    coded = decoder(content_encoding)
    if coded is None:
        return raw
    parts, size = [], 0
    for part in coded.decode(raw):
        parts.append(part)
        size += len(part)
        if size > limit:
            raise _TooLarge
    coded.finish()
    return b"".join(parts)


def _parse(raw: bytes) -> Any:
    return json.loads(
        raw.decode("utf-8"), object_pairs_hook=_object, parse_int=_Number, parse_float=_Number, parse_constant=_refuse
    )


class _Number(str):
    """A number as it was written."""

    __slots__ = ()


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice")
    return found


def _values(document: Any, pointer: Sequence[str]) -> Iterator[str | None]:
    """What stands at a pointer, in each way to read the document: some readers take names in any case, and a number
    has many spellings. None: something that is no single value."""
    if not pointer:
        yield from _texts(document)
    elif isinstance(document, dict):
        for name, value in document.items():
            if name.casefold() == pointer[0].casefold():
                yield from _values(value, pointer[1:])
    elif isinstance(document, list) and _INDEX.fullmatch(pointer[0]) and int(pointer[0]) < len(document):
        yield from _values(document[int(pointer[0])], pointer[1:])


def _texts(value: Any) -> Iterator[str | None]:
    if isinstance(value, _Number):
        yield str(value)
        number = float(value)
        yield str(int(number)) if number.is_integer() and abs(number) < 1 << 53 else repr(number)
    elif isinstance(value, str):
        yield value if value.isascii() or not any("\ud800" <= char <= "\udfff" for char in value) else None
    elif value is None or isinstance(value, bool):
        yield json.dumps(value)
    else:
        yield None
