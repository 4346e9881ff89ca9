"""Whatever is in a file: a tree, or Problems with places; never another exception."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from proxy.problem import Problem, Problems
from proxy.settings import Settings
from proxy.validation import validate
from proxy.yamltree import Tree, load

_TOKENS = st.sampled_from(
    [
        *"[]{},:?-&*!|>'\"%@`#~\n\t \r",
        *("\n  ", ": ", "- ", "&a ", "*a", "<<: ", "!!str ", "---\n", "...\n", "a", "1", "\\x"),
        *("listen", "identity", "networks", "store", "limits", "null", "60s", "10.0.0.0/8"),
        *("\ufeff", "\x85", "\u2028", "é"),
    ]
)
_YAMLISH = st.lists(_TOKENS, max_size=60).map("".join)
_DATA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="ascii", exclude_categories=["Cc"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc123~<", max_size=3), inner, max_size=4),
    max_leaves=20,
)


def _loaded(text: str | bytes) -> Tree | list[Problem]:
    try:
        return load(text, "f.yaml")
    except Problems as error:
        return error.problems


def _survives(text: str | bytes) -> None:
    result = _loaded(text)
    if isinstance(result, Tree):
        json.dumps(result.data)
        model, problems = validate(Settings, result)
        assert (model is None) == bool(problems)
    else:
        lines = len(text.splitlines()) + 1
        assert result
        assert all(problem.message and 0 <= problem.line <= lines for problem in result)


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_problems(raw: bytes) -> None:
    """Any bytes are data or mistakes."""
    _survives(raw)


@given(_YAMLISH)
def test_nothing_that_looks_like_yaml_raises_anything_but_problems(text: str) -> None:
    """Any soup of YAML's own signs is data or mistakes."""
    _survives(text)


@given(_DATA)
def test_json_loads_as_itself(data: object) -> None:
    """JSON is YAML: what json writes is read back equal, and each value has a place."""
    tree = load(json.dumps(data, indent=1), "f.yaml")
    assert tree.data == data
    assert tree.place(()) >= (1, 1)
