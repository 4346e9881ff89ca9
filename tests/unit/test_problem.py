"""A mistake is told with its place and the next step, all of them at once."""

from __future__ import annotations

import pytest

from proxy.problem import Problem, Problems


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (Problem("a.yaml", 12, 7, "unknown field"), "a.yaml:12:7: unknown field"),
        (Problem("a.yaml", 0, 0, "cannot be read"), "a.yaml: cannot be read"),
        (Problem("a.yaml", 1, 2, "wrong", "write it right"), "a.yaml:1:2: wrong\n    hint: write it right"),
        (Problem("a.yaml", 1, 2, "risky", "name it", True), "a.yaml:1:2: warning: risky\n    hint: name it"),
    ],
)
def test_a_problem_reads_as_an_editor_expects(problem: Problem, text: str) -> None:
    assert str(problem) == text


def test_problems_come_in_the_order_of_their_places() -> None:
    problems = [
        Problem("b.yaml", 1, 1, "d"),
        Problem("a.yaml", 10, 1, "c"),
        Problem("a.yaml", 2, 9, "b"),
        Problem("a.yaml", 2, 1, "a"),
    ]
    error = Problems(iter(problems))
    assert [problem.message for problem in error.problems] == ["a", "b", "c", "d"]
    assert str(error) == "a.yaml:2:1: a\na.yaml:2:9: b\na.yaml:10:1: c\nb.yaml:1:1: d"
