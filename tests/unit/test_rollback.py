"""Marks only rise, in every process and over restarts, and a file that cannot be trusted is not."""

from __future__ import annotations

import json
import stat
import threading
from pathlib import Path

import pytest

from proxy.problem import UserError
from proxy.rollback import HighWater


def test_a_name_never_seen_has_no_mark(tmp_path: Path) -> None:
    assert HighWater(tmp_path).marks() == {}
    assert not (tmp_path / "vault-versions.json").exists()


def test_a_mark_rises_and_never_falls(tmp_path: Path) -> None:
    water = HighWater(tmp_path)
    water.rise({"a": 5, "b": 1})
    water.rise({"a": 3})
    assert water.marks() == {"a": 5, "b": 1}
    assert water.known("a") == 5
    assert water.known("c") == 0


def test_a_mark_outlives_the_process(tmp_path: Path) -> None:
    HighWater(tmp_path).rise({"a": 5})
    assert HighWater(tmp_path).marks() == {"a": 5}
    assert stat.S_IMODE((tmp_path / "vault-versions.json").stat().st_mode) == 0o600


def test_another_process_is_seen(tmp_path: Path) -> None:
    proxy, command = HighWater(tmp_path), HighWater(tmp_path)
    command.rise({"a": 5})
    assert proxy.marks() == {"a": 5}
    proxy.rise({"b": 2})
    assert command.marks() == {"a": 5, "b": 2}


def test_what_was_handed_out_stays_as_of_then(tmp_path: Path) -> None:
    """A record read before a change is measured by the marks of that moment."""
    water = HighWater(tmp_path)
    water.rise({"a": 5})
    before = water.marks()
    water.rise({"a": 6})
    assert before == {"a": 5}


def test_many_at_once_lose_no_mark(tmp_path: Path) -> None:
    waters = [HighWater(tmp_path) for _ in range(4)]

    def raise_all(index: int) -> None:
        for version in range(1, 6):
            waters[index].rise({"shared": version * 10 + index, f"own-{index}": version})

    threads = [threading.Thread(target=raise_all, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert HighWater(tmp_path).marks() == {"shared": 53, **{f"own-{index}": 5 for index in range(4)}}


def test_a_deleted_file_is_not_forgotten_by_a_running_process(tmp_path: Path) -> None:
    water = HighWater(tmp_path)
    water.rise({"a": 5})
    water.path.unlink()
    assert water.marks() == {"a": 5}
    water.rise({"b": 1})
    assert json.loads(water.path.read_text()) == {"a": 5, "b": 1}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": "5"}', '{"a": true}', '{"a": 1.5}', "[" * 100_000])
def test_a_damaged_file_is_an_error_with_the_way_out(tmp_path: Path, text: str) -> None:
    path = tmp_path / "vault-versions.json"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(UserError, match=r"vault-versions\.json is damaged.*delete it if you trust the store"):
        HighWater(tmp_path)


def test_a_file_others_can_write_is_refused(tmp_path: Path) -> None:
    HighWater(tmp_path).rise({"a": 5})
    (tmp_path / "vault-versions.json").chmod(0o666)
    with pytest.raises(UserError, match="chmod 600"):
        HighWater(tmp_path)


def test_a_mark_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    water = HighWater(tmp_path)
    monkeypatch.setattr("proxy.rollback.write_private", full)
    with pytest.raises(UserError, match="No space left on device; the vault needs it"):
        water.rise({"a": 5})
