"""Durations, sizes and rates as operators write them."""

from __future__ import annotations

import pytest

from proxy.quantity import parse_duration, parse_rate, parse_size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("60s", 60.0), ("5m", 300.0), ("8h", 28_800.0), ("2d", 172_800.0), ("0.1s", 0.1), ("1 h", 3600.0)],
)
def test_a_duration_is_seconds(text: str, seconds: float) -> None:
    """A number and a unit, and nothing lost by rounding."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "60", "s", "-1s", "1S", "1e3s", "1s ", "\u0661s", "1w", "1h30m", 60, True, None])
def test_what_is_no_duration_is_refused(text: object) -> None:
    """A number without a unit could be anything."""
    with pytest.raises(ValueError, match="expected a duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [(0, 0), ("7", 7), ("7B", 7), ("64KiB", 65_536), ("1MiB", 1_048_576), ("10MB", 10_000_000), ("2 GiB", 2 * 1024**3)],
)
def test_a_size_is_bytes(text: object, size: int) -> None:
    """Binary and decimal units are told apart."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1", "1.5MiB", "1K", "1kb", "MiB", "1MiB ", -1, 1.5, True, None])
def test_what_is_no_size_is_refused(text: object) -> None:
    """A unit that could mean either is not guessed."""
    with pytest.raises(ValueError, match="expected a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "rate"), [("60/m", (60, 60.0)), ("1/s", (1, 1.0)), ("5 / h", (5, 3600.0)), ("9/d", (9, 86_400.0))]
)
def test_a_rate_is_so_many_in_so_many_seconds(text: str, rate: tuple[int, float]) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "60", "0/m", "-1/s", "1.5/s", "60/min", "60/ms", "/m", 60, True, None])
def test_what_is_no_rate_is_refused(text: object) -> None:
    """None at all would be a block rule."""
    with pytest.raises(ValueError, match="expected a rate"):
        parse_rate(text)
