"""The audit log: one JSON object a line for each exchange, written by a thread of its own. Decides nothing.

A group of lines is on disk wholly or not at all, unless the process is killed in the middle of a write: then at most
the exchanges that were not synced yet are lost, and the torn line is ended when the log is opened again. One process
writes one file; workers hand theirs to it (see `auditlink`).
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
from collections.abc import Callable
from itertools import batched
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Protocol

from proxy.auditchain import BEGIN, last_hash, link
from proxy.auditline import line
from proxy.exchange import Exchange
from proxy.problem import UserError

QUEUE = 10_000  # exchanges waiting; more are dropped and counted
GROUP = 1_000  # lines in one commit
LINGER = 0.04  # seconds a group waits for company, unless that many lines wait already
SLICE = 32  # lines, after which the interpreter is for those who serve: they would wait for all of a group
PAUSE = 0.0005  # seconds it is theirs then, unless a group is full and more lines wait
RETRY = 1.0  # seconds between tries while the disk is full or the file cannot be opened
TAIL = 1024 * 1024  # bytes in which the last whole line is looked for
_STDOUT = 1
_sync = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


class Sink(Protocol):
    """Where whole lines go."""

    def append(self, data: bytes) -> None:
        """Keep all of them or none. May block. Raises OSError; the same lines may be tried again then."""

    def close(self) -> None:
        """Nothing follows."""


class AuditFile:
    """The log on disk, whole lines only, each chained to the one before; a copy on standard output if `stdout`."""

    def __init__(self, path: Path, stdout: bool = False, pause: float = 0.0) -> None:
        """`pause`: seconds between two slices, where the process has better things to do. Raises UserError when the
        file cannot be opened."""
        self._path = path
        self._stdout = stdout
        self._pause = pause
        self._fd = -1
        self._regular = False
        self._torn = False  # the file ends in the middle of a line
        self._last = BEGIN  # the hash of the line before the next
        try:
            self._open()
            if self._regular:
                self._last = last_hash(self._tail())
        except OSError as error:
            words = (error.strerror or "cannot be opened").lower()
            raise UserError(f"audit {path}: {words}; make its folder writable or set audit.file:") from None

    def append(self, data: bytes) -> None:
        """Write and sync whole lines, all or none of them.

        Raises OSError; the same lines may be tried again then.
        """
        self._follow_rotation()
        data, last = self._linked(data)
        before, written = os.fstat(self._fd).st_size, 0
        view = memoryview(b"\n" + data if self._torn else data)
        try:
            while written < len(view):
                written += os.write(self._fd, view[written:])
            if self._regular:
                _sync(self._fd)
        except OSError:
            self._torn = self._torn or (written > 0 and not self._cut_back(before))
            raise
        self._torn, self._last = False, last
        if self._stdout:
            with contextlib.suppress(OSError):  # a copy; the file is the record
                while data:
                    data = data[os.write(_STDOUT, data) :]

    def _linked(self, data: bytes) -> tuple[bytes, str]:
        parts, last, lines = [], self._last, data.splitlines(keepends=True)
        pause = self._pause if len(lines) < GROUP else 0
        for some in batched(lines, SLICE):
            part, last = link(b"".join(some), last)
            parts.append(part)
            time.sleep(pause)
        return b"".join(parts), last

    def close(self) -> None:
        """Nothing follows."""
        os.close(self._fd)

    def _open(self) -> None:
        # Reading is for the last byte alone.
        fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY, 0o600)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd
        status = os.fstat(fd)
        self._regular = stat.S_ISREG(status.st_mode)
        self._torn = self._regular and status.st_size > 0 and os.pread(fd, 1, status.st_size - 1) != b"\n"

    def _tail(self) -> bytes:
        size = os.fstat(self._fd).st_size
        return os.pread(self._fd, TAIL, max(0, size - TAIL))

    def _follow_rotation(self) -> None:
        try:
            same = os.path.samestat(os.stat(self._path), os.fstat(self._fd))
        except FileNotFoundError:
            same = False
        if not same:
            self._open()

    def _cut_back(self, size: int) -> bool:
        """Whether what was written of a group is gone again. Never lengthens a file that was truncated meanwhile."""
        try:
            if self._regular and os.fstat(self._fd).st_size > size:
                os.ftruncate(self._fd, size)
            return self._regular
        except OSError:
            return False


class Audit:
    """Records exchanges to `path` (made with mode 0600), and to standard output as well if `stdout`; to `sink` instead
    where there is one.

    `on_drop(n)` is told of exchanges that will not be in the log; it is called on any thread. Raises UserError when
    the file cannot be opened.
    With `refuse` a full disk refuses requests; otherwise they go on and are dropped when `QUEUE` wait.
    """

    def __init__(
        self,
        path: Path,
        stdout: bool,
        on_drop: Callable[[int], None],
        sink: Sink | None = None,
        *,
        refuse: bool = True,
    ) -> None:
        self._file = sink or AuditFile(path, stdout, PAUSE)
        self._path = path
        self._on_drop = on_drop
        self._queue: SimpleQueue[Exchange | bytes | None] = SimpleQueue()
        self._closing = threading.Event()
        self._refuse = refuse
        self._problem = ""
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    @property
    def problem(self) -> str:
        """Why exchanges are not reaching the file now; empty while they do."""
        return self._problem or ("" if self._thread.is_alive() else "the audit log is closed")

    @property
    def refuses(self) -> bool:
        """Whether nothing may go out now, because it could not be recorded."""
        return self._refuse and bool(self._problem)

    @property
    def healthy(self) -> bool:
        """Whether the last group was written and nothing was dropped since."""
        return not self.problem

    def record(self, exchange: Exchange | bytes) -> None:
        """Queue one ended exchange, which must not change any more, or its line. Never blocks."""
        if self._closing.is_set() or self._queue.qsize() >= QUEUE:
            self._problem = self._problem or f"{self._path}: more than {QUEUE} exchanges wait to be written"
            self._on_drop(1)
        else:
            self._queue.put(exchange)

    def close(self, timeout: float = 5.0) -> None:
        """Write what waits, at most `timeout` seconds long; what is left then is dropped and counted."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._queue.put(None)
        self._thread.join(timeout)
        if self._thread.is_alive() and (left := self._queue.qsize() - 1) > 0:
            self._on_drop(left)

    def _run(self) -> None:
        try:
            more = True
            while more:
                group, more = self._next_group()
                lines: list[bytes] = []
                for some in batched(group, SLICE):
                    lines += filter(None, map(self._line, some))
                    time.sleep(0)
                if lines:
                    self._commit(b"".join(lines), len(lines))
        finally:
            self._problem = self._problem or "the audit log is closed"
            self._file.close()

    def _next_group(self) -> tuple[list[Exchange | bytes], bool]:
        """The next exchanges to write together, and whether any can follow."""
        group: list[Exchange | bytes] = []
        exchange = self._queue.get()
        if exchange is not None and self._queue.qsize() < GROUP:
            self._closing.wait(LINGER)
        with contextlib.suppress(Empty):
            while exchange is not None:
                group.append(exchange)
                if len(group) == GROUP:
                    return group, True
                exchange = self._queue.get_nowait()
            return group, False
        return group, True

    def _line(self, exchange: Exchange | bytes) -> bytes:
        try:
            return exchange if isinstance(exchange, bytes) else line(exchange)
        except Exception:  # one odd record must not end the thread that writes all the others
            self._on_drop(1)
            return b""

    def _commit(self, data: bytes, lines: int) -> None:
        while True:
            last = self._closing.is_set()
            try:
                self._file.append(data)
                self._problem = ""
                break
            except OSError as error:
                self._problem = f"{self._path}: {(error.strerror or str(error)).lower()}"
            if last:
                self._on_drop(lines)
                break
            self._closing.wait(RETRY)
