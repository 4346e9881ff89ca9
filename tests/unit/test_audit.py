"""The audit log: whole, parseable lines on a real disk, through rotation, full disks and crashes."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from proxy import audit
from proxy.audit import Audit
from proxy.exchange import Exchange
from proxy.problem import UserError

ROOT = Path(__file__).parents[2]


class Drops:
    """What `on_drop` was told, on whatever thread."""

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()

    def __call__(self, lines: int) -> None:
        """Count, as `on_drop`."""
        with self._lock:
            self.count += lines


@pytest.fixture
def drops() -> Drops:
    return Drops()


def exchange(number: int = 0, **changes: object) -> Exchange:
    made = Exchange(id=f"id-{number}", time=1700000000.25, listener="127.0.0.1:8080", client="127.0.0.1:5000")
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def written(path: Path) -> list[dict[str, object]]:
    """Every line, each of which must be JSON and ended."""
    data = path.read_bytes()
    assert data == b"" or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)


def one_line(path: Path, drops: Drops, made: Exchange) -> dict[str, object]:
    log = Audit(path, False, drops)
    log.record(made)
    log.close()
    (line,) = written(path)
    return line


def test_a_record_that_json_cannot_say_costs_only_itself(tmp_path: Path, drops: Drops) -> None:
    """The writer goes on and the gap is counted."""
    path = tmp_path / "audit.jsonl"
    log = Audit(path, False, drops)
    log.record(exchange(1, duration=float("nan")))
    log.record(exchange(2, time=float("inf")))
    log.record(exchange(3))
    log.close()
    assert [line["id"] for line in written(path)] == ["id-3"]
    assert drops.count == 2


def test_the_file_is_for_its_owner_alone(tmp_path: Path, drops: Drops) -> None:
    """Mode 0600 whatever the umask."""
    path = tmp_path / "audit.jsonl"
    before = os.umask(0)
    try:
        Audit(path, False, drops).close()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_every_exchange_is_written_in_order_by_close(tmp_path: Path, drops: Drops) -> None:
    """More than several groups, none lost."""
    path = tmp_path / "audit.jsonl"
    log = Audit(path, False, drops)
    for number in range(5000):
        log.record(exchange(number))
    log.close()
    assert [line["id"] for line in written(path)] == [f"id-{number}" for number in range(5000)]
    assert drops.count == 0


def test_a_line_appears_without_close(tmp_path: Path, drops: Drops) -> None:
    """A single exchange does not wait for a full group."""
    path = tmp_path / "audit.jsonl"
    log = Audit(path, False, drops)
    log.record(exchange())
    wait_for(lambda: path.stat().st_size)
    assert log.healthy
    log.close()


def test_a_second_start_appends(tmp_path: Path, drops: Drops) -> None:
    """A restart loses no history."""
    path = tmp_path / "audit.jsonl"
    for number in range(2):
        log = Audit(path, False, drops)
        log.record(exchange(number))
        log.close()
    assert len(written(path)) == 2


def test_a_log_that_was_rotated_away_is_opened_again(tmp_path: Path, drops: Drops) -> None:
    """Logrotate renames the file and sends no signal."""
    path, old = tmp_path / "audit.jsonl", tmp_path / "audit.jsonl.1"
    log = Audit(path, False, drops)
    log.record(exchange(1))
    wait_for(lambda: path.stat().st_size)
    path.rename(old)
    log.record(exchange(2))
    wait_for(lambda: path.exists() and path.stat().st_size)
    log.close()
    assert [line["id"] for line in written(old)] == ["id-1"]
    assert [line["id"] for line in written(path)] == ["id-2"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_log_that_was_truncated_in_place_has_no_hole(tmp_path: Path, drops: Drops) -> None:
    """Logrotate's copytruncate: an append goes to the new end."""
    path = tmp_path / "audit.jsonl"
    log = Audit(path, False, drops)
    log.record(exchange(1))
    wait_for(lambda: path.stat().st_size)
    os.truncate(path, 0)
    log.record(exchange(2))
    log.close()
    assert [line["id"] for line in written(path)] == ["id-2"]


def test_cutting_a_failed_group_off_never_lengthens_the_file(tmp_path: Path) -> None:
    """The log was truncated in place between the write and its failure: no hole of NUL bytes."""
    path = tmp_path / "audit.jsonl"
    file = audit.AuditFile(path)
    file.append(b"{}\n")
    os.truncate(path, 0)
    assert file._cut_back(3)
    file.close()
    assert path.read_bytes() == b""


def test_a_torn_last_line_is_ended_when_the_log_is_opened(tmp_path: Path, drops: Drops) -> None:
    """A crash in the middle of a write costs that line and no later one."""
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b'{"id":"whole"}\n{"id":"to')
    log = Audit(path, False, drops)
    log.record(exchange(1))
    log.close()
    whole, torn, after = path.read_bytes().splitlines()
    assert (whole, torn) == (b'{"id":"whole"}', b'{"id":"to')
    assert json.loads(after)["id"] == "id-1"


def test_kill_9_keeps_what_was_written_parseable(tmp_path: Path, drops: Drops) -> None:
    """The process dies while it records; nothing that was in the file before is harmed."""
    path = tmp_path / "audit.jsonl"
    script = """
import sys
from pathlib import Path
from proxy.audit import Audit
from proxy.exchange import Exchange
log = Audit(Path(sys.argv[1]), False, lambda n: None)
number = 0
while True:
    log.record(Exchange(id=f"id-{number}", time=0.0, listener="l", client="c"))
    number += 1
"""
    with subprocess.Popen([sys.executable, "-c", script, str(path)], cwd=ROOT) as child:
        wait_for(lambda: path.exists() and path.stat().st_size > 100_000)
        before = path.read_bytes()
        child.send_signal(signal.SIGKILL)
    assert path.read_bytes().startswith(before)
    Audit(path, False, drops).close()
    lines = path.read_bytes().split(b"\n")
    ids = [json.loads(line)["id"] for line in lines[:-1]]
    assert ids == sorted(ids, key=lambda text: int(text[3:]))


def test_a_full_device_is_reported_and_counted(drops: Drops) -> None:
    """/dev/full answers ENOSPC to every write."""
    log = Audit(Path("/dev/full"), False, drops)
    for number in range(3):
        log.record(exchange(number))
    wait_for(lambda: not log.healthy)
    assert log.problem == "/dev/full: no space left on device"
    assert drops.count == 0  # still to be tried again
    log.close()
    assert drops.count == 3


def test_a_full_disk_leaves_whole_lines_and_the_rest_follows_when_there_is_room(tmp_path: Path) -> None:
    """A file size limit cuts a write in the middle of a line, as a full disk does."""
    path = tmp_path / "audit.jsonl"
    script = """
import json, resource, sys, time
from pathlib import Path
from proxy import audit
from proxy.exchange import Exchange

def wait(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)

audit.RETRY = 0.05
path, dropped = Path(sys.argv[1]), []
log = audit.Audit(path, False, dropped.append)
log.record(Exchange(id="first", time=0.0, listener="l", client="c"))
wait(lambda: path.stat().st_size)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 700, hard))
for number in range(20):
    log.record(Exchange(id=f"id-{number}", time=0.0, listener="l", client="c"))
wait(lambda: not log.healthy)
assert log.problem == f"{path}: file too large", log.problem
wait(lambda: path.read_bytes().endswith(b"}\\n") and [json.loads(x) for x in path.read_bytes().splitlines()])
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
wait(lambda: log.healthy)
log.close()
assert dropped == []
"""
    done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT, timeout=60, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert [line["id"] for line in written(path)] == ["first"] + [f"id-{number}" for number in range(20)]


def test_a_queue_that_is_full_drops_and_counts(monkeypatch: pytest.MonkeyPatch, drops: Drops) -> None:
    """Memory is bounded while the disk is not there, and the event loop never waits."""
    monkeypatch.setattr(audit, "QUEUE", 10)
    log = Audit(Path("/dev/full"), False, drops)
    for number in range(50):
        log.record(exchange(number))
    assert drops.count > 0
    assert not log.healthy
    log.close()
    assert drops.count == 50


class Slow:
    """A sink that keeps what it is given, once it is let go."""

    def __init__(self) -> None:
        self.groups: list[int] = []
        self.asked, self.may_go = threading.Event(), threading.Event()

    def append(self, data: bytes) -> None:
        self.asked.set()
        assert self.may_go.wait(60)
        self.groups.append(data.count(b"\n"))

    def close(self) -> None:
        pass


def test_where_a_group_waits_already_nobody_waits_for_company(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, drops: Drops
) -> None:
    """However fast exchanges come, they do not pile up until some are dropped."""
    monkeypatch.setattr(audit, "GROUP", 5)
    monkeypatch.setattr(audit, "LINGER", 0)
    sink = Slow()
    log = Audit(tmp_path / "unused", False, drops, sink)
    log.record(exchange())
    assert sink.asked.wait(60)
    monkeypatch.setattr(audit, "LINGER", 3600)
    for number in range(13):
        log.record(exchange(number))
    sink.may_go.set()
    wait_for(lambda: len(sink.groups) >= 3)
    log.close()
    assert (sink.groups[:3], sum(sink.groups)) == ([1, 5, 5], 14)


def test_a_folder_that_vanished_is_reported_until_it_is_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, drops: Drops
) -> None:
    """An unmounted volume: the lines wait for it."""
    monkeypatch.setattr(audit, "RETRY", 0.02)
    folder = tmp_path / "log"
    folder.mkdir()
    path = folder / "audit.jsonl"
    log = Audit(path, False, drops)
    path.unlink()
    folder.rmdir()
    log.record(exchange(1))
    wait_for(lambda: not log.healthy)
    folder.mkdir()
    wait_for(lambda: log.healthy)
    log.close()
    assert [line["id"] for line in written(path)] == ["id-1"]
    assert drops.count == 0


def test_what_is_recorded_after_close_is_counted_as_dropped(tmp_path: Path, drops: Drops) -> None:
    """Nothing disappears silently."""
    log = Audit(tmp_path / "audit.jsonl", False, drops)
    log.close()
    log.close()
    log.record(exchange())
    assert drops.count == 1
    assert not log.healthy


def test_standard_output_gets_a_copy(tmp_path: Path, drops: Drops, capfd: pytest.CaptureFixture[str]) -> None:
    """The same bytes as in the file."""
    path = tmp_path / "audit.jsonl"
    log = Audit(path, True, drops)
    log.record(exchange())
    log.close()
    assert capfd.readouterr().out == path.read_text()


@pytest.mark.parametrize("place", ["missing/audit.jsonl", "file/audit.jsonl", "folder", "/sys/audit.jsonl"])
def test_a_log_that_cannot_be_opened_is_the_users_error(tmp_path: Path, drops: Drops, place: str) -> None:
    """At start, on one line, with the next step; /sys refuses root too."""
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"^audit .+: .+; make its folder writable or set audit\.file:$"):
        Audit(tmp_path / place, False, drops)
