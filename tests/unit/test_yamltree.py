"""YAML to data with places: what is refused, where, and in which words."""

from __future__ import annotations

import pytest

from proxy.problem import Problem, Problems
from proxy.yamltree import load


def _problems(text: str | bytes) -> list[str]:
    with pytest.raises(Problems) as caught:
        load(text, "f.yaml")
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        ("", None),
        ("~", None),
        ("null", None),
        ("Null", None),
        ("true", True),
        ("FALSE", False),
        ("0", 0),
        ("-12", -12),
        ("+7", 7),
        ("1.5", 1.5),
        (".5", 0.5),
        ("1e3", 1000.0),
        ("1" * 101, "1" * 101),
        ("1e999", "1e999"),
        (".inf", ".inf"),
        (".nan", ".nan"),
        ("NO", "NO"),
        ("on", "on"),
        ("yes", "yes"),
        ("y", "y"),
        ("0x1f", "0x1f"),
        ("0o17", "0o17"),
        ("1:20", "1:20"),
        ("1_000", "1_000"),
        ("2024-01-02", "2024-01-02"),
        ("'1'", "1"),
        ('"null"', "null"),
        ("!!str 5", "5"),
        ("! 5", "5"),
        ("!!int '5'", 5),
        ("!!float 5", 5),
        ("127.0.0.1:8080", "127.0.0.1:8080"),
    ],
)
def test_plain_scalars_follow_the_core_schema(scalar: str, value: object) -> None:
    """Only null, true, false and decimal numbers are not text; quotes always make text."""
    loaded = load(f"a: {scalar}\n", "f.yaml").data["a"]
    assert (loaded, type(loaded)) == (value, type(value))


@pytest.mark.parametrize("text", ["", "\n", "# only a comment\n", "---\n...\n", "\ufeff"])
def test_an_empty_document_is_none(text: str) -> None:
    """Nothing but comments is no value, and has the place of the beginning."""
    tree = load(text, "f.yaml")
    assert tree.data is None
    assert tree.place(("rules", 0))[0] >= 1


def test_bytes_and_text_load_alike() -> None:
    """A byte order mark and CRLF line ends make no difference."""
    text = "é: [1, {b: ü}]\nc: |\n  two\n  lines\n"
    expected = {"é": [1, {"b": "ü"}], "c": "two\nlines\n"}
    for spelling in (text, text.encode(), b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()):
        assert load(spelling, "f.yaml").data == expected


def test_an_alias_repeats_its_value() -> None:
    """An anchor may be used again, and named again."""
    assert load("a: &x [1]\nb: *x\nc: &x 2\nd: *x\n", "f.yaml").data == {"a": [1], "b": [1], "c": 2, "d": 2}


_BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
_CHAIN = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 60))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a:\n\tb: 1\n", ["f.yaml:2:1: a tab cannot indent\n    hint: indent with spaces"]),
        ("a:\n  b: 1\n\tc: 2\n", ["f.yaml:3:1: a tab cannot indent\n    hint: indent with spaces"]),
        ("- a\n\t- b\n", ["f.yaml:2:1: a tab cannot indent\n    hint: indent with spaces"]),
        ("a: 1\nb: 2\na: 3\n", ['f.yaml:3:1: duplicate key "a"\n    hint: it is on line 1 already']),
        ("{a: 1, 'a': 2}", ['f.yaml:1:8: duplicate key "a"\n    hint: it is on line 1 already']),
        ("80: x", ['f.yaml:1:1: a key must be text, not a number\n    hint: put it in quotes: "80"']),
        ("true: x", ['f.yaml:1:1: a key must be text, not true\n    hint: put it in quotes: "true"']),
        ("? ~\n: x", ['f.yaml:1:3: a key must be text, not nothing\n    hint: put it in quotes: "null"']),
        ("[a]: x", ["f.yaml:1:1: a key must be text, not a list"]),
        ("? {a: b}\n: x\n", ["f.yaml:1:3: a key must be text, not a mapping"]),
        (
            "a: &a {b: 1}\nc:\n  <<: *a\n",
            ["f.yaml:3:3: merge keys (<<) are not supported\n    hint: write the fields out"],
        ),
        ("a\n---\nb", ["f.yaml:2:1: a second document begins here\n    hint: put one document into a file"]),
        ("a: !foo x", ["f.yaml:1:4: the tag !foo is not supported\n    hint: remove the tag"]),
        (
            "a: !!python/name:os.system x",
            ["f.yaml:1:4: the tag !!python/name:os.system is not supported\n    hint: remove the tag"],
        ),
        ("a: !!set {b}", ["f.yaml:1:4: the tag !!set is not supported\n    hint: remove the tag"]),
        ("a: !!seq {b: c}", ["f.yaml:1:4: the tag !!seq is not supported\n    hint: remove the tag"]),
        ("a: !!int x", ["f.yaml:1:4: this value does not fit its tag !!int\n    hint: remove the tag"]),
        ("a: !!int true", ["f.yaml:1:4: this value does not fit its tag !!int\n    hint: remove the tag"]),
        ("a: *b", ['f.yaml:1:4: unknown alias "*b"\n    hint: write "&b" before the value it stands for']),
        ("a: &a [*a]", ['f.yaml:1:8: the alias "*a" stands inside its own value']),
        (
            _BOMB,
            [
                "f.yaml:6:36: more than 1,000,000 values, aliases written out"
                "\n    hint: split the file, use fewer aliases"
            ],
        ),
        ("[" * 100_000, ["f.yaml:1:51: nested more than 50 levels deep"]),
        ("{a: " * 100_000, ["f.yaml:1:201: nested more than 50 levels deep"]),
        ("- " * 100_000, ["f.yaml:1:101: nested more than 50 levels deep"]),
        (_CHAIN, ["f.yaml:50:12: nested more than 50 levels deep"]),
        (b"a: b\nc: \xff\n", ["f.yaml:2:4: not UTF-8 text\n    hint: save the file as UTF-8"]),
        ("a: \ud800", ["f.yaml:1:4: not UTF-8 text\n    hint: save the file as UTF-8"]),
        (b"a: b\0", ["f.yaml:1:5: the invisible character U+0000 is not allowed\n    hint: remove it"]),
        ('a: "\\0"', ["f.yaml:1:4: the invisible character U+0000 is not allowed\n    hint: remove it"]),
        ("# a\u2028b: 1", ["f.yaml:1:4: the invisible character U+2028 is not allowed\n    hint: remove it"]),
        ("a: x\u202ey", ["f.yaml:1:5: the invisible character U+202E is not allowed\n    hint: remove it"]),
        ("x" * (10 * 1024 * 1024 + 1), ["f.yaml: larger than 10 MiB\n    hint: split it into several files"]),
        (
            "a: b: c",
            ['f.yaml:1:5: mapping values are not allowed in this context\n    hint: quote text that contains ": "'],
        ),
        (
            "a: @b",
            [
                "f.yaml:1:4: found character that cannot start any token"
                "\n    hint: quote text that begins with @, ` or %"
            ],
        ),
        ("a: 'b", ["f.yaml:1:6: found unexpected end of stream\n    hint: close the quotes"]),
        (
            "a:\n  - [b",
            ["f.yaml:3:1: did not find expected ',' or ']'\n    hint: close the list with ]; see also line 2"],
        ),
    ],
)
def test_bad_yaml_has_a_place_and_words(text: str | bytes, expected: list[str]) -> None:
    """Each mistake is told once, where it is, with what to do."""
    assert _problems(text) == expected


def test_all_problems_are_told_at_once() -> None:
    """A mistake does not hide the next one, not even a syntax error behind it."""
    assert [line.split("\n")[0] for line in _problems("a: 1\na: 2\n3: x\nb: !x y\nc: @\n")] == [
        'f.yaml:2:1: duplicate key "a"',
        "f.yaml:3:1: a key must be text, not a number",
        "f.yaml:4:4: the tag !x is not supported",
        "f.yaml:5:4: found character that cannot start any token",
    ]


def test_hopeless_files_stop_after_a_hundred_problems() -> None:
    """A file of nothing but mistakes does not fill the screen, or the memory."""
    assert len(_problems("a: 1\n" * 1000)) == 100


_PLACES = """\
version: 1
rules:
  - name: one
    agents: ["a", b]
  - &two
    name: two
again: *two
"""


@pytest.mark.parametrize(
    ("path", "key", "place"),
    [
        ((), False, (1, 1)),
        (("version",), False, (1, 10)),
        (("version",), True, (1, 1)),
        (("rules",), False, (3, 3)),
        (("rules",), True, (2, 1)),
        (("rules", 0), False, (3, 5)),
        (("rules", 0, "name"), False, (3, 11)),
        (("rules", 0, "agents", 1), False, (4, 19)),
        (("rules", 0, "agents", 1), True, (4, 19)),
        (("rules", 0, "missing"), False, (3, 5)),
        (("rules", 0, "missing", "deeper"), True, (3, 5)),
        (("rules", 7), False, (3, 3)),
        (("rules", "x"), False, (3, 3)),
        (("rules", 1, "name"), True, (6, 5)),
        (("again",), False, (7, 8)),
        (("again", "name"), False, (6, 11)),
    ],
)
def test_every_value_has_a_place(path: tuple[str | int, ...], key: bool, place: tuple[int, int]) -> None:
    """Values and keys are found by path; what is not there has the place of what is."""
    assert load(_PLACES, "f.yaml").place(path, key=key) == place


def test_a_problem_is_placed_by_path() -> None:
    """The tree knows its file."""
    problem = load("a: {b: 1}", "f.yaml").problem(("a", "b"), "wrong", "mend it", key=True)
    assert problem == Problem("f.yaml", 1, 5, "wrong", "mend it")
