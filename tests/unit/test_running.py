"""The commands beside a running proxy find it, and a second one is kept out of its state."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from proxy.problem import UserError
from proxy.running import Running, claimed
from proxy.settings import Settings, load_settings
from tests.storage import ROOT

RUNNING = Running(("0.0.0.0:41234", "127.0.0.1:5"), "127.0.0.1:49090")


def settings(folder: Path) -> Settings:
    return load_settings(None, {}, {}, folder)


def test_what_a_proxy_wrote_is_read_while_it_runs(tmp_path: Path) -> None:
    """One that was killed left its file behind, and the port may be another program's by now."""
    of_folder = settings(tmp_path)
    of_folder.state.mkdir()
    assert Running.read(of_folder) is None
    with claimed(of_folder.state):
        RUNNING.write(of_folder.state)
        assert Running.read(of_folder) == RUNNING
        assert [path.stat().st_mode & 0o777 for path in of_folder.state.iterdir()] == [0o600, 0o600]
    assert Running.read(of_folder) is None
    Running.forget(of_folder.state)
    Running.forget(of_folder.state)
    assert Running.expected(of_folder) == Running(("127.0.0.1:8080",), "127.0.0.1:9090")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"listen": 1, "admin": ""}', '"x"', "null", "\udc80"])
def test_a_damaged_file_is_as_good_as_none(content: str, tmp_path: Path) -> None:
    of_folder = settings(tmp_path)
    with claimed(of_folder.state):
        (of_folder.state / "running.json").write_bytes(content.encode(errors="surrogateescape"))
        assert Running.read(of_folder) is None


@pytest.mark.parametrize(
    ("listen", "reachable"),
    [
        ("127.0.0.1:8080", "127.0.0.1:8080"),
        ("0.0.0.0:8080", "127.0.0.1:8080"),
        ("[::]:8080", "[::1]:8080"),
        ("10.0.0.1:8080", "10.0.0.1:8080"),
    ],
)
def test_a_listener_everywhere_is_reached_over_loopback(listen: str, reachable: str) -> None:
    assert Running((listen,), "").reachable == reachable


def test_one_proxy_at_a_time_uses_a_state_directory(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from proxy.running import claimed\n"
    code += "with claimed(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout
        assert other.stdout.readline() == "in\n"
        with pytest.raises(UserError, match=rf"a proxy \(process {other.pid}\) is using"), claimed(tmp_path):
            pass
        other.kill()
        other.wait()
        with claimed(tmp_path):
            assert (tmp_path / "proxy.lock").read_text() == f"{os.getpid()}\n"
