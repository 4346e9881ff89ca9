"""Globs match what they say and nothing else, in linear time."""

from __future__ import annotations

import time

import pytest

from proxy.pattern import any_glob, compile_regex, path_glob, text_glob


@pytest.mark.parametrize(
    ("glob", "fits", "others"),
    [
        ("/a", ["/a"], ["/a/", "/ab", "/A", "a", "/a\n"]),
        ("/a/*", ["/a/", "/a/b", "/a/b.c"], ["/a", "/a/b/c"]),
        ("/a/*/c", ["/a/b/c", "/a//c"], ["/a/c", "/a/b/b/c"]),
        ("/a/**", ["/a/", "/a/b", "/a/b/c"], ["/a", "/ab", "/b/a/"]),
        ("/a/**/c", ["/a/c", "/a/b/c", "/a/b/b/c"], ["/ac", "/a/bc", "/a/c/"]),
        ("/**/c", ["/c", "/a/c", "/a/b/c"], ["/ac", "/c/"]),
        ("**/c", ["/c", "/a/c"], ["/c/"]),
        ("/a*", ["/a", "/abc"], ["/a/b"]),
        ("/a**", ["/a", "/abc", "/a/b"], ["/b"]),
        ("/a.b+(c)", ["/a.b+(c)"], ["/axb+(c)", "/a.bb(c)"]),
        ("/**", ["/", "/a", "/a\nb"], [""]),
        ("/*/*", ["//", "/a/b"], ["/a", "/a/b/c"]),
        ("/a/***", ["/a/", "/a/b/c"], ["/a"]),
        ("/a/****/c", ["/a/x/y/c"], ["/a/c/d"]),
    ],
)
def test_a_path_glob_stays_inside_a_segment_unless_doubled(glob: str, fits: list[str], others: list[str]) -> None:
    assert [path for path in fits if not path_glob(glob).matches(path)] == []
    assert [path for path in others if path_glob(glob).matches(path)] == []


@pytest.mark.parametrize(
    ("glob", "fits", "others"),
    [
        ("coder-*", ["coder-", "coder-1", "coder-a/b"], ["xcoder-1", "coder"]),
        ("*", ["", "anything\n"], []),
        ("a*c", ["ac", "abc", "a\nc"], ["abcd", "xac"]),
        ("a**c", ["ac", "abc"], ["ab"]),
        ("[a]?", ["[a]?"], ["a", "ax"]),
        ("", [""], ["a"]),
    ],
)
def test_a_text_glob_knows_one_wildcard(glob: str, fits: list[str], others: list[str]) -> None:
    assert [text for text in fits if not text_glob(glob).matches(text)] == []
    assert [text for text in others if text_glob(glob).matches(text)] == []


def test_no_globs_match_everything() -> None:
    assert any_glob((), "x")
    assert any_glob((text_glob("y"), text_glob("x")), "x")
    assert not any_glob((text_glob("y"),), "x")


def test_globs_of_one_text_are_equal_and_show_it() -> None:
    assert path_glob("/a/**") == path_glob("/a/**")
    assert str(path_glob("/a/**")) == "/a/**"
    assert "lambda" not in repr(path_glob("/a/**"))


def test_no_path_makes_a_glob_slow() -> None:
    """A backtracking engine takes years for this."""
    glob = path_glob("/" + "a*" * 20 + "b")
    started = time.perf_counter()
    assert not glob.matches("/" + "a" * 5000)
    assert time.perf_counter() - started < 1


def test_a_regex_takes_its_ends_as_those_of_the_text() -> None:
    assert compile_regex("^a$").search("a")
    assert not compile_regex("^a$").search("b\na\nc")
    assert compile_regex("a.b").search("a\nb")


@pytest.mark.parametrize("text", ["(", "a(?=b)", r"(a)\1", "a{1001}", "["])
def test_what_is_no_re2_is_refused_with_a_reason(text: str) -> None:
    with pytest.raises(ValueError, match="not a regular expression: ") as refused:
        compile_regex(text)
    assert "RE2" in refused.value.args[1]
