"""Whether a text is there: never said to be absent where it is."""

from __future__ import annotations

import pytest

from proxy.literals import _BATCH, _NEVER, WORTH, Literals

TEXTS = [b"text-%04d" % number for number in range(_NEVER)]


@pytest.mark.parametrize("count", [1, 6, _BATCH, _BATCH + 1, _NEVER])
def test_each_of_many_texts_is_found_wherever_it_is(count: int) -> None:
    """At the beginning, at the end and between; also where the search goes by batches."""
    literals = Literals(TEXTS[:count])
    clean = bytes(range(256)) * (WORTH // 256)
    assert literals.absent(clean)
    for text in TEXTS[:count]:
        for at in (0, 77, len(clean)):
            assert not literals.absent(clean[:at] + text + clean[at:])


def test_a_text_that_begins_inside_another_is_found() -> None:
    """And one that is the beginning of another."""
    literals = Literals([b"abcd", b"bcX", b"ab"])
    for text in (b"abcd", b"abcX", b"ab"):
        assert not literals.absent(bytes(WORTH) + text)
        assert not literals.absent(text)


def test_what_is_too_much_work_is_not_said_to_be_clean() -> None:
    """Somebody else has to look."""
    assert not Literals(TEXTS[: _BATCH + 1]).absent(bytes(WORTH - 1))
    assert not Literals([*TEXTS, b"one more"]).absent(bytes(WORTH))


def test_nothing_is_always_absent() -> None:
    assert Literals([]).absent(bytes(WORTH))
