"""Audit lines of a worker on their way to the supervisor, who writes the one file and says when they are on disk.

A frame is four bytes of length and so many bytes of lines; the answer is a frame with the error's words, none if all
went well. So a full disk stops the worker's own queue, just as if it wrote the file itself.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import threading

from proxy.audit import AuditFile

_LENGTH = struct.Struct("!I")


class AuditPipe:
    """A worker's end: a `Sink`. Blocks until the lines are on disk."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def append(self, data: bytes) -> None:
        """Raises OSError, also when the supervisor is gone."""
        _send(self._sock, data)
        words = _receive(self._sock)
        if words is None:
            raise ConnectionResetError(errno.ECONNRESET, "the supervisor is gone")
        if words:
            raise OSError(errno.EIO, words.decode())

    def close(self) -> None:
        """Nothing follows."""
        self._sock.close()


class AuditDesk:
    """The supervisor's end: a thread for each worker, which are few, and one file."""

    def __init__(self, file: AuditFile) -> None:
        self._file = file
        self._one = threading.Lock()
        self._threads: list[threading.Thread] = []

    def serve(self, sock: socket.socket) -> None:
        """Take the lines of one more worker until it hangs up."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=self._serve, args=[sock], name="audit", daemon=True)
        self._threads.append(thread)
        thread.start()

    def close(self, timeout: float = 5.0) -> None:
        """When every worker has hung up, or after `timeout` seconds for each."""
        for thread in self._threads:
            thread.join(timeout)
        with self._one:
            self._file.close()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            while (data := _receive(sock)) is not None:
                _send(sock, self._write(data))

    def _write(self, data: bytes) -> bytes:
        try:
            with self._one:
                self._file.append(data)
        except OSError as error:
            return (error.strerror or str(error)).encode()
        return b""


def _send(sock: socket.socket, data: bytes) -> None:
    sock.sendall(_LENGTH.pack(len(data)) + data)


def _receive(sock: socket.socket) -> bytes | None:
    """The next frame; None at the end, or for half a frame."""
    head = _exactly(sock, _LENGTH.size)
    return _exactly(sock, *_LENGTH.unpack(head)) if head else None


def _exactly(sock: socket.socket, size: int) -> bytes | None:
    parts = []
    while size:
        data = sock.recv(size)
        if not data:
            return None
        parts.append(data)
        size -= len(data)
    return b"".join(parts)
