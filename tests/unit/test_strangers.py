"""Connections that say nothing take nothing from others."""

from __future__ import annotations

from proxy.strangers import Strangers


def test_the_one_that_waited_longest_goes() -> None:
    """Of the same source; others are left alone."""
    cut: list[str] = []
    counted: list[None] = []
    strangers = Strangers(2, lambda: counted.append(None))
    for source, key in (("a", "1"), ("b", "2"), ("a", "3"), ("a", "4"), ("a", "5")):
        strangers.add(source, key, lambda key=key: cut.append(key))  # type: ignore[misc]
    assert cut == ["1", "3"]
    assert len(counted) == 2


def test_who_has_said_who_it_is_is_no_stranger() -> None:
    cut: list[str] = []
    strangers = Strangers(1, lambda: None)
    strangers.add("a", "1", lambda: cut.append("1"))
    strangers.remove("a", "1")
    strangers.remove("a", "1")
    strangers.remove("b", "1")
    strangers.add("a", "2", lambda: cut.append("2"))
    assert cut == []
    strangers.remove("a", "2")
    assert not strangers._sources
