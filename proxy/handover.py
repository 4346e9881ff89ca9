"""Messages with descriptors between `sallyport exec` and the running proxy, over a socket in the state directory.

Every process that serves has a socket there of its own. Whoever can open one may act as the operator: it lies in a
folder that is the proxy's user's alone, and the kernel says who is at the other end.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxy.files import own_dir
from proxy.problem import UserError

FOLDER = "exec"
_LONGEST = 1024 * 1024  # bytes of a message
_MOST = 8  # descriptors in one
PATIENCE = 10.0  # seconds for an answer


@dataclass(frozen=True, slots=True)
class Message:
    """What came, and the descriptors that are now ours to close."""

    data: dict[str, Any]
    descriptors: tuple[int, ...] = ()


def send(sock: socket.socket, data: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
    """One message, whole. Raises OSError."""
    socket.send_fds(sock, [json.dumps(data).encode()], descriptors)


def receive(sock: socket.socket) -> Message | None:
    """The next message; None at the end of the connection.

    Raises OSError, and ValueError for what is no message.
    """
    data, descriptors, _, _ = socket.recv_fds(sock, _LONGEST, _MOST)  # which passes on no MSG_CMSG_CLOEXEC
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    try:
        return Message(dict(json.loads(data)), tuple(descriptors)) if data else None
    except (ValueError, TypeError):
        for descriptor in descriptors:
            os.close(descriptor)
        raise ValueError("not a message of ours") from None


def ask(sock: socket.socket, data: dict[str, Any], descriptors: Sequence[int] = ()) -> dict[str, Any]:
    """A message, and the answer to it.

    Raises UserError where that is a refusal, ConnectionError where there is none.
    """
    send(sock, data, descriptors)
    try:
        message = receive(sock)
    except ValueError:
        message = None
    if message is None:
        raise ConnectionError("the proxy ended")
    if "error" in message.data:
        raise UserError(message.data["error"])
    return message.data


def connect(path: Path) -> socket.socket:
    """A connection to a process that serves. Raises OSError where none does any more."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with _short(path) as name:
            sock.connect(name)
        sock.settimeout(PATIENCE)
    except OSError:
        sock.close()
        raise
    return sock


def sockets(state: Path) -> list[Path]:
    """Where processes serve, or have served. Raises UserError where the folder is not ours to read."""
    try:
        return sorted(path for path in (state / FOLDER).iterdir() if path.suffix == ".sock")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{state}: {error.strerror}; run as the user that the proxy runs as") from None


def listen(state: Path) -> tuple[socket.socket, Path]:
    """The socket of this process; those of killed ones are taken away.

    Raises UserError.
    """
    folder = own_dir(state / FOLDER)
    for path in sockets(state):
        try:
            connect(path).close()
        except OSError:
            path.unlink(missing_ok=True)
    path = folder / f"{os.getpid()}.sock"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.setblocking(False)
    try:
        with _short(path) as name:
            sock.bind(name)
        sock.listen()
    except OSError as error:
        sock.close()
        raise UserError(f"cannot listen at {path}: {error.strerror}; remove it") from None
    return sock, path


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name of the socket that fits into the 107 bytes of an address, however deep it lies (unix(7))."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
