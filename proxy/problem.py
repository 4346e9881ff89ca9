"""An operator's mistake: a place, what is wrong, and what to do next. Nothing here prints or exits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One mistake in a file an operator wrote; `line` and `column` count from 1, 0 means the whole file."""

    file: str
    line: int
    column: int
    message: str
    hint: str = ""
    warning: bool = False

    @property
    def place(self) -> str:
        """`file:line:column`, shortened to what is known."""
        if not self.line:
            return self.file
        return f"{self.file}:{self.line}:{self.column}"

    def __str__(self) -> str:
        kind = "warning: " if self.warning else ""
        text = f"{self.place}: {kind}{self.message}"
        return f"{text}\n    hint: {self.hint}" if self.hint else text


class Problems(Exception):
    """Raised with every mistake found at once, in the order of their places."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = sorted(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class UserError(Exception):
    """Something a user can cause and mend; its text is the whole message, on one line, with the next step."""
