"""Files of the state directory are ours alone, whole, and locked."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from proxy import files
from proxy.files import locked, own_dir, read_private, write_private
from proxy.problem import UserError


def test_a_missing_directory_is_made_for_us_alone(tmp_path: Path) -> None:
    made = own_dir(tmp_path / "a" / "state")
    assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_a_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(UserError, match="belongs to user"):
        own_dir(tmp_path)


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so the system's answer is replaced."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="cannot write to"):
        own_dir(tmp_path)


def test_a_directory_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="set `state`"):
        own_dir(tmp_path / "file" / "state")


def test_a_private_file_is_readable_by_us_alone_and_leaves_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "master.key"
    write_private(path, b"one")
    write_private(path, b"two")
    assert read_private(path) == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["master.key"]


def test_a_file_that_must_be_new_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "master.key"
    write_private(path, b"first", replace=False)
    with pytest.raises(FileExistsError):
        write_private(path, b"second", replace=False)
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["master.key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_private_file_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "master.key"
    write_private(path, b"x")
    path.chmod(mode)
    with pytest.raises(UserError, match="chmod 600"):
        read_private(path)


def test_a_private_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_private(tmp_path / "master.key", b"x")
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(UserError, match="belongs to user"):
        read_private(tmp_path / "master.key")


def test_a_missing_private_file_is_told_from_a_bad_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_private(tmp_path / "none")
    (tmp_path / "dir").mkdir()
    with pytest.raises(UserError, match="cannot read"):
        read_private(tmp_path / "dir")


def test_a_lock_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PATIENCE", 0.05)
    with (
        locked(tmp_path / "lock", "busy"),
        pytest.raises(UserError, match="busy: waited"),
        locked(tmp_path / "lock", "busy"),
    ):
        pass
    with locked(tmp_path / "lock", "free again"):
        pass
