"""The globs of rules and grants, compiled to RE2 so that no request can make one slow. Hosts have their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import re2

_OPTIONS = re2.Options()
_OPTIONS.log_errors = False
_OPTIONS.dot_nl = True
_OPTIONS.one_line = True


def compile_regex(text: str) -> re2._Regexp:
    """An RE2 regular expression in which `.` is any character and `^`, `$` are the ends of the text.

    Raises ValueError(message, hint).
    """
    try:
        return re2.compile(text, _OPTIONS)
    except re2.error as error:
        reason = error.args[0]
        words = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
        raise ValueError(f"not a regular expression: {words}", "the syntax is RE2's: no look-around or \\1") from None


@dataclass(frozen=True, slots=True)
class Glob:
    """One compiled glob; equal to another of the same text and kind."""

    text: str
    matches: Callable[[str], bool] = field(compare=False, repr=False)

    def __str__(self) -> str:
        return self.text


@lru_cache(maxsize=8192)
def text_glob(text: str) -> Glob:
    """A glob over a plain value (an agent's id, a header, a query value): `*` is any run of characters."""
    return _glob(text, {"**": ".*", "*": ".*"})


@lru_cache(maxsize=8192)
def path_glob(text: str) -> Glob:
    """A glob over a path: `*` stays inside a segment, `**` crosses them, `/**/` also stands for one `/`."""
    return _glob(text, {"/**/": "/(?:.*/)?", "**": ".*", "*": "[^/]*"})


def _glob(text: str, wildcards: dict[str, str]) -> Glob:
    if "*" not in text:
        return Glob(text, text.__eq__)
    prefix = text.rstrip("*")
    if "*" not in prefix and (text.endswith("**") or wildcards["*"] == ".*"):
        return Glob(text, lambda value: value.startswith(prefix))
    suffix = text.removeprefix("/**")
    if "*" not in suffix and suffix.startswith("/") and "/**/" in wildcards:
        return Glob(text, lambda value: value.endswith(suffix) and value.startswith("/"))
    regex, at = [], 0
    while at < len(text):
        wildcard = next((key for key in wildcards if text.startswith(key, at)), None)
        regex.append(wildcards[wildcard] if wildcard else re2.escape(text[at]))
        at += len(wildcard) if wildcard else 1
    compiled = compile_regex("".join(regex))
    return Glob(text, lambda value: compiled.fullmatch(value) is not None)


def any_glob(globs: tuple[Glob, ...], value: str) -> bool:
    """Whether one of `globs` matches `value`; no globs match everything."""
    for glob in globs:  # `any` takes three times as long
        if glob.matches(value):
            return True
    return not globs
