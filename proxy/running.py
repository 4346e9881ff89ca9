"""Where the running proxy listens, written by it for the commands beside it: a port may be the kernel's choice."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from proxy.files import write_private
from proxy.settings import Settings

_WILDCARDS = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104  # replaced, not bound


@dataclass(frozen=True, slots=True)
class Running:
    """The bound addresses, `host:port` each."""

    listen: tuple[str, ...]
    admin: str

    def write(self, state: Path) -> None:
        """Leave it in the state directory."""
        write_private(_file(state), json.dumps(asdict(self)).encode())

    @staticmethod
    def read(settings: Settings) -> Running:
        """What the proxy of these settings wrote, else what the settings say."""
        try:
            data = json.loads(_file(settings.state).read_bytes())
            return Running(tuple(data["listen"]), data["admin"])
        except (OSError, ValueError, KeyError, TypeError):
            return Running(tuple(listener.address for listener in settings.listen), str(settings.admin))

    @staticmethod
    def forget(state: Path) -> None:
        """The proxy ends."""
        _file(state).unlink(missing_ok=True)

    @property
    def reachable(self) -> str:
        """The first listener as a client on this host reaches it."""
        host, _, port = self.listen[0].rpartition(":")
        return f"{_WILDCARDS.get(host, host)}:{port}"


def _file(state: Path) -> Path:
    return state / "running.json"
