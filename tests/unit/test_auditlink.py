"""Audit lines from several workers into one file."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.audit import Audit, AuditFile
from proxy.auditlink import AuditDesk, AuditPipe
from proxy.exchange import Exchange


def exchange(name: str) -> Exchange:
    return Exchange(id=name, time=1700000000.25, listener="127.0.0.1:8080", client="127.0.0.1:5000")


class Full(AuditFile):
    """A disk that is full while `full` is set."""

    full = False

    def append(self, data: bytes) -> None:
        """Write, if there is room."""
        if self.full:
            raise OSError(28, os.strerror(28))
        super().append(data)


@pytest.fixture
def file(tmp_path: Path) -> Full:
    return Full(tmp_path / "audit.jsonl")


@pytest.fixture
def desk(file: Full) -> Iterator[AuditDesk]:
    desk = AuditDesk(file)
    yield desk
    desk.close()


def pipe(desk: AuditDesk) -> AuditPipe:
    ours, theirs = socket.socketpair()
    desk.serve(ours)
    return AuditPipe(theirs)


def test_every_line_of_every_worker_is_there_once_and_whole(tmp_path: Path, file: Full) -> None:
    desk, drops = AuditDesk(file), list[int]()
    logs = [Audit(tmp_path / "audit.jsonl", False, drops.append, pipe(desk)) for _ in range(3)]
    wanted = {f"{number}-{one}" for number in range(3) for one in range(500)}

    def write(number: int) -> None:
        for one in range(500):
            logs[number].record(exchange(f"{number}-{one}"))

    threads = [threading.Thread(target=write, args=[number]) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for log in logs:
        log.close()
    desk.close()
    found = [json.loads(line)["id"] for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert (sorted(found), drops) == (sorted(wanted), [])


def test_a_full_disk_is_a_workers_own_trouble_and_ends_with_it(tmp_path: Path, desk: AuditDesk, file: Full) -> None:
    """It tries again with the same lines, as if the file were its own."""
    worker = pipe(desk)
    file.full = True
    with pytest.raises(OSError, match="No space left on device"):
        worker.append(b"{}\n")
    file.full = False
    worker.append(b"{}\n")
    worker.close()
    assert list(json.loads((tmp_path / "audit.jsonl").read_bytes())) == ["prev", "hash"]


def test_without_a_supervisor_nothing_counts_as_written(file: Full) -> None:
    ours, theirs = socket.socketpair()
    worker = AuditPipe(theirs)
    ours.close()
    with pytest.raises(OSError, match=r"supervisor is gone|Broken pipe"):
        worker.append(b"{}\n")
    worker.close()
    file.close()


def test_half_a_frame_of_a_worker_that_died_is_not_written(tmp_path: Path, file: Full) -> None:
    desk = AuditDesk(file)
    ours, theirs = socket.socketpair()
    desk.serve(ours)
    theirs.sendall(b"\0\0\0\x10{}")
    theirs.close()
    desk.close()
    assert (tmp_path / "audit.jsonl").read_bytes() == b""
