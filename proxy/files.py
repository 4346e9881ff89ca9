"""Private files of the state directory: owned by us, replaced whole, locked between processes. Blocking."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from proxy.problem import UserError

PATIENCE = 10.0  # seconds another process is waited for
_STEP = 0.01  # seconds between two looks


def own_dir(path: Path) -> Path:
    """`path`, absolute, made for us alone if it is missing, ours and writable. Raises UserError."""
    path = path.absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = path.stat().st_uid
    except OSError as error:
        raise UserError(f"cannot use {path}: {error.strerror}; set `state` to a directory you can write") from None
    if owner != os.geteuid():
        raise UserError(
            f"{path} belongs to user {owner}, and this is user {os.geteuid()}: "
            "run as its owner, or set `state` to a directory of your own"
        )
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {path}: make it writable, or set `state` to a directory you can write")
    return path


def read_private(path: Path) -> bytes:
    """The content of a file that nobody else may read. Raises FileNotFoundError, or UserError for other failures."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_uid != os.geteuid():
                raise UserError(f"{path} belongs to user {status.st_uid}: `chown {os.geteuid()} {path}` if it is yours")
            if status.st_mode & 0o077:
                raise UserError(f"{path} is open to other users: `chmod 600 {path}`, and change it if they read it")
            return file.read()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def write_private(path: Path, data: bytes, *, replace: bool = True) -> None:
    """Makes `path` hold `data` (mode 0600) whole or not at all, on disk when this returns.

    Raises OSError; FileExistsError if the file is there and `replace` is false.
    """
    draft = path.with_name(f".{path.name}.{os.urandom(6).hex()}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            draft.rename(path)
        else:
            path.hardlink_to(draft)
    finally:
        draft.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the name, too
    finally:
        os.close(directory)


def open_lock(path: Path) -> int:
    """A descriptor for flock, which children do not inherit (PEP 446). Raises UserError."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise UserError(f"cannot open {path}: {error.strerror}; mend its permissions") from None


@contextlib.contextmanager
def locked(path: Path, otherwise: str) -> Iterator[None]:
    """Holds `path` exclusively among processes. Raises UserError, beginning with `otherwise`, after ten seconds."""
    descriptor = open_lock(path)
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f"{otherwise}: waited {PATIENCE:.0f} s; try again") from None
            time.sleep(_STEP)
        yield
    finally:
        os.close(descriptor)
