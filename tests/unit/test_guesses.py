"""How many wrong tokens an address may show, in how much memory."""

from __future__ import annotations

import pytest

from proxy.guesses import BURST, EVERY, SOURCES, Guesses


def spent(guesses: Guesses, source: str, now: float = 0.0) -> int:
    """How many wrong proofs are answered as such before one is too many."""
    return next(count for count in range(BURST + 2) if guesses.too_many(source, now))


def test_a_few_mistakes_are_nothing() -> None:
    """Then there is one more every few seconds, and never more than the first few."""
    guesses = Guesses()
    assert spent(guesses, "192.0.2.1") == BURST
    assert guesses.too_many("192.0.2.1", EVERY - 0.1)
    assert not guesses.too_many("192.0.2.1", EVERY + 0.2)
    assert guesses.too_many("192.0.2.1", EVERY + 0.3)
    assert spent(guesses, "192.0.2.1", 1e6) == BURST


def test_asking_more_does_not_make_it_longer() -> None:
    """Who is refused loses nothing of what comes back meanwhile."""
    guesses = Guesses()
    spent(guesses, "192.0.2.1")
    assert all(guesses.too_many("192.0.2.1", tick * EVERY / 50) for tick in range(49))
    assert not guesses.too_many("192.0.2.1", EVERY * 1.1)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("2001:db8::1", "2001:db8::ffff:ffff:ffff:ffff", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("", "192.0.2.1", False),
    ],
)
def test_who_counts_together(one: str, other: str, same: bool) -> None:
    """An IPv6 sandbox can choose any address of its /64."""
    guesses = Guesses()
    spent(guesses, one)
    assert guesses.too_many(other, 0.0) is same


def test_a_clock_that_jumps_back_gives_nothing_away() -> None:
    guesses = Guesses()
    spent(guesses, "192.0.2.1", 1e6)
    assert guesses.too_many("192.0.2.1", 0.0)


def test_memory_is_bounded() -> None:
    """The source that was idle longest is forgotten; who goes on guessing is not."""
    guesses = Guesses()
    spent(guesses, "192.0.2.1")
    for number in range(SOURCES * 2):
        guesses.too_many(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 0.0)
        assert guesses.too_many("192.0.2.1", 0.0)
    assert len(guesses) == SOURCES
