"""Where the running proxy listens, written by it for the commands beside it: a port may be the kernel's choice."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from proxy.files import open_lock, own_dir, write_private
from proxy.problem import UserError
from proxy.settings import Settings

PATIENCE = 10.0  # seconds for an answer of the endpoint
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # HTTP_PROXY may be this proxy
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104  # replaced, not bound


@dataclass(frozen=True, slots=True)
class Running:
    """The bound addresses, `host:port` each, and the process that commands may signal."""

    listen: tuple[str, ...]
    admin: str
    process: int = 0

    def write(self, state: Path) -> None:
        """Leave it in the state directory."""
        write_private(_file(state), json.dumps(asdict(self)).encode())

    @staticmethod
    def read(settings: Settings) -> Running | None:
        """What the proxy of these settings wrote; None where none runs on this host."""
        try:
            data = json.loads(_file(settings.state).read_bytes())
            running = Running(tuple(data["listen"]), data["admin"], data["process"])
            return running if _is_claimed(settings.state) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @staticmethod
    def expected(settings: Settings) -> Running:
        """What the settings say."""
        return Running(tuple(listener.address for listener in settings.listen), str(settings.admin))

    @staticmethod
    def forget(state: Path) -> None:
        """The proxy ends."""
        _file(state).unlink(missing_ok=True)

    @property
    def reachable(self) -> str:
        """The first listener that takes plain connections, else the first, as a client on this host reaches it."""
        plain = [address for address in self.listen if not address.startswith(("unix:", "tls://", "transparent@"))]
        return _reachable((plain or self.listen)[0].removeprefix("tls://"))

    @property
    def reachable_admin(self) -> str:
        """The admin endpoint as a command on this host reaches it."""
        return _reachable(self.admin)


def fetch_status(admin: str) -> dict[str, Any]:
    """What the proxy with this endpoint says of itself.

    Raises UserError.
    """
    try:
        with _direct.open(f"http://{admin}/api/status", timeout=PATIENCE) as answer:
            status: dict[str, Any] = json.load(answer)
            return status
    except (OSError, ValueError):
        raise UserError(f"the proxy's endpoint {admin} does not answer: look at what it logs") from None


def _reachable(address: str) -> str:
    host, _, port = address.rpartition(":")
    return f"{_WILDCARDS.get(host, host)}:{port}"


@contextlib.contextmanager
def claimed(state: Path) -> Iterator[None]:
    """Keeps other proxies out of `state`: one process writes one audit log.

    Raises UserError if one is in there.
    """
    lock = open_lock(own_dir(state) / "proxy.lock")
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            process = os.read(lock, 20).decode("ascii", "replace").strip()
            raise UserError(
                f"a proxy (process {process}) is using {state}: stop it, or set `state` to another directory"
            ) from None
        os.ftruncate(lock, 0)
        os.write(lock, b"%d\n" % os.getpid())
        yield
    finally:
        os.close(lock)


def _is_claimed(state: Path) -> bool:
    """Whether a proxy holds the lock; one that was killed does not."""
    with (state / "proxy.lock").open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _file(state: Path) -> Path:
    return state / "running.json"
