"""The kill switch of one host is a file, and whatever is wrong with the file stops everybody."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.killswitch import FILE, KillSwitch, Stops, read_stops, resume, stop
from proxy.problem import UserError


@pytest.mark.parametrize(
    ("content", "stopped"),
    [
        ("", {"a", "b"}),
        ("  \n\n", {"a", "b"}),
        ("*", {"a", "b"}),
        ("a\n", {"a"}),
        ("a runs wild\n\nb\n", {"a", "b"}),
        ("* all\na one\n", {"a", "b"}),
        ("a\nno/agent\n", {"a", "b"}),
        ("a" * 2_000_000, {"a", "b"}),
    ],
)
def test_what_a_file_stops(tmp_path: Path, content: str, stopped: set[str]) -> None:
    (tmp_path / FILE).write_text(content)
    stops = read_stops(tmp_path)
    assert {name for name in ("a", "b") if stops.reason(name) is not None} == stopped


def test_without_a_file_nobody_is_stopped(tmp_path: Path) -> None:
    assert not read_stops(tmp_path)
    assert not read_stops(tmp_path / "missing")


def test_what_is_no_file_stops_everybody(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    assert read_stops(tmp_path).everybody


def test_stops_add_up_and_are_resumed_one_by_one(tmp_path: Path) -> None:
    """A stop of everybody and one of an agent are apart."""
    stop(tmp_path, "a", "runs\u2028wild")
    stop(tmp_path, None, "fire")
    stop(tmp_path, "b")
    assert read_stops(tmp_path) == Stops("fire", {"a": "runs wild", "b": ""})
    assert resume(tmp_path, None)
    assert not resume(tmp_path, None)
    assert read_stops(tmp_path) == Stops(None, {"a": "runs wild", "b": ""})
    assert resume(tmp_path, "a")
    assert resume(tmp_path, "b")
    assert not (tmp_path / FILE).exists()


def test_a_name_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        stop(tmp_path, "no agent")
    assert not (tmp_path / FILE).exists()


def test_a_switch_tells_of_changes_only(tmp_path: Path) -> None:
    told: list[Stops] = []
    switch = KillSwitch(tmp_path, told.append)
    switch.look()
    stop(tmp_path, "a")
    switch.look()
    switch.look()
    resume(tmp_path, "a")
    switch.look()
    assert told == [Stops(None, {"a": ""}), Stops()]


def test_a_change_that_could_not_be_told_is_told_again(tmp_path: Path) -> None:
    told: list[Stops] = []

    def once(stops: Stops) -> None:
        told.append(stops)
        if len(told) == 1:
            raise RuntimeError

    switch = KillSwitch(tmp_path, once)
    stop(tmp_path, None)
    with pytest.raises(RuntimeError):
        switch.look()
    switch.look()
    assert told == [Stops(""), Stops("")]


def test_a_signal_works_where_nothing_can_be_written(tmp_path: Path) -> None:
    """Until a restart."""
    told: list[Stops] = []
    switch = KillSwitch(tmp_path / "file" / "below", told.append)
    (tmp_path / "file").write_text("")
    switch.pull()
    switch.look()
    assert [stops.everybody is not None for stops in told] == [True]
