"""The highest version ever authenticated of each credential, kept outside the store: what is older was put back.

An attacker who can write to the store cannot make a new version, but could restore an old one; this file is where
that shows. It is shared by every process of one state directory. Blocking.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path

from proxy.files import locked, own_dir, read_private, write_private
from proxy.problem import UserError


class HighWater:
    """Marks that only rise, for any thread. What this process has seen counts even if the file is deleted."""

    def __init__(self, state_dir: Path) -> None:
        """Raises UserError if the file is there and cannot be trusted."""
        self.path = own_dir(state_dir) / "vault-versions.json"
        self._lock = self.path.with_suffix(".lock")
        self._mutex = threading.Lock()
        self._marks: Mapping[str, int] = {}
        self._stamp = (0, 0, 0)
        self._read()

    def marks(self) -> Mapping[str, int]:
        """The highest version seen of each name, by any process, as of now. Raises UserError."""
        self._read()
        return self._marks

    def known(self, name: str) -> int:
        """The highest version this process knows of, without a look at the file."""
        return self._marks.get(name, 0)

    def rise(self, versions: Mapping[str, int]) -> None:
        """Takes note of authenticated versions, on disk when this returns. Raises UserError."""
        if all(version <= self.known(name) for name, version in versions.items()):
            return
        with locked(self._lock, f"another sallyport is still writing {self.path}"):
            self._read()
            text = json.dumps(dict(self._merge(versions)), indent=1, sort_keys=True)
            try:
                write_private(self.path, text.encode("ascii"))
            except OSError as error:
                raise UserError(f"cannot write {self.path}: {error.strerror}; the vault needs it") from None
            self._stamp = self._look()

    def _read(self) -> None:
        stamp = self._look()
        if stamp == self._stamp:
            return
        try:
            marks = json.loads(read_private(self.path))
        except FileNotFoundError:
            return
        except (ValueError, RecursionError):
            marks = None
        if not isinstance(marks, dict) or not all(type(version) is int for version in marks.values()):
            raise UserError(
                f"{self.path} is damaged, and without it old credentials could be put back unseen: restore it, "
                "or delete it if you trust the store as it is now"
            )
        self._merge(marks)
        self._stamp = stamp

    def _merge(self, versions: Mapping[str, int]) -> Mapping[str, int]:
        with self._mutex:  # a new dict each time: whoever was given the old one keeps the marks of that moment
            higher = {name: version for name, version in versions.items() if version > self.known(name)}
            self._marks = {**self._marks, **higher}
            return self._marks

    def _look(self) -> tuple[int, int, int]:
        try:
            status = self.path.stat()
        except OSError:
            return (0, 0, 0)
        return (status.st_ino, status.st_mtime_ns, status.st_size)
