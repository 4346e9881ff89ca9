"""Conditions on a body: one way to read it, or none."""

from __future__ import annotations

import gzip

import pytest

from proxy.bodymatch import Body, Unseen, parse_pointer
from proxy.pattern import text_glob


def meets(raw: bytes | None, pointer: str, *globs: str, every: bool = True, coding: str = "") -> bool:
    return Body(raw, coding, 1000).meets(((parse_pointer(pointer), tuple(map(text_glob, globs))),), every=every)


@pytest.mark.parametrize(
    ("raw", "pointer", "glob"),
    [
        (b'{"a": {"b": ["x", "yes"]}}', "/a/b/1", "y*"),
        (b'{"a/b": {"~": "yes"}}', "/a~1b/~0", "yes"),
        (b'{"": "yes"}', "/", "yes"),
        (b'{"a": true, "b": null}', "/a", "true"),
        (b'{"b": null}', "/b", "null"),
        (b'{"n": 12}', "/n", "12"),
        ('{"a": "\u00fc"}'.encode(), "/a", "\u00fc"),
    ],
)
def test_what_stands_at_a_pointer_is_matched_as_text(raw: bytes, pointer: str, glob: str) -> None:
    assert meets(raw, pointer, glob)
    assert meets(raw, pointer, "no", glob, every=False)
    assert not meets(raw, pointer, "no", every=False)


@pytest.mark.parametrize("raw", [b"{", b"\xff", b'{"a": 1, "a": 1}', b'{"a": Infinity}', b"[" * 9000, b"{} {}"])
def test_what_cannot_be_read_in_one_way_is_not_evaluated(raw: bytes) -> None:
    assert not meets(raw, "/a", "*")
    assert meets(raw, "/a", "nothing", every=False)


def test_a_number_is_all_its_spellings() -> None:
    for spelling in (b"1", b"1.0", b"1e0", b"10e-1"):
        assert meets(b'{"n": %s}' % spelling, "/n", "1", every=False)
    assert not meets(b'{"n": 1.0}', "/n", "1")
    assert meets(b'{"n": 1.0}', "/n", "1", "1.0")


def test_a_name_in_another_case_is_the_same_to_some_readers() -> None:
    assert meets(b'{"Owner": "evil"}', "/owner", "evil", every=False)
    assert not meets(b'{"owner": "acme", "OWNER": "evil"}', "/owner", "acme")


def test_no_body_has_no_value_and_one_too_large_is_unknown() -> None:
    assert not meets(b"", "/a", "*", every=False)
    assert not meets(b"", "/a", "*")
    assert meets(None, "/a", "x", every=False)
    assert not meets(None, "/a", "*")
    assert Body(None).too_large


def test_a_coded_body_is_decoded_up_to_a_limit() -> None:
    assert meets(gzip.compress(b'{"a": "x"}'), "/a", "x", coding="gzip")
    assert not meets(b'{"a": "x"}', "/a", "x", coding="gzip")
    assert not meets(b'{"a": "x"}', "/a", "x", coding="unknown")
    assert Body(gzip.compress(b'"%s"' % (b"x" * 2000)), "gzip", 1000).too_large


def test_several_conditions_must_all_be_met() -> None:
    conditions = (
        (parse_pointer("/a"), (text_glob("1"),)),
        (parse_pointer("/b"), (text_glob("2"),)),
    )
    assert Body(b'{"a": 1, "b": 2}').meets(conditions, every=True)
    for every in (True, False):
        assert not Body(b'{"a": 1, "b": 3}').meets(conditions, every=every)


def test_who_asks_for_an_unseen_body_is_remembered() -> None:
    body = Unseen()
    assert not body.asked
    assert not body.meets((), every=False)
    assert body.asked


@pytest.mark.parametrize("text", ["a", "a/b", "/a~", "/a~2"])
def test_a_pointer_is_one_of_rfc_6901(text: str) -> None:
    with pytest.raises(ValueError, match="is not a JSON pointer"):
        parse_pointer(text)
