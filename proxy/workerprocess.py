"""One worker as its supervisor sees it: a process, a link to it, and what it reported last."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from proxy.admin import Status
from proxy.link import Link
from proxy.problem import UserError
from proxy.settings import Settings


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker is asked for. Sockets are told as inherited descriptors; `own` are addresses of ours that must
    never be an upstream; `stopped`: it begins with every agent stopped."""

    number: int
    settings: Settings
    listening: tuple[tuple[int, ...], ...]  # by listener of the settings
    own: tuple[tuple[str, int], ...]
    link: int
    audit: int
    stopped: bool = False


class WorkerProcess:
    """Made by `start`. `number` is its place, which its successor takes; `leaving` once it was told to go."""

    def __init__(self, number: int, process: asyncio.subprocess.Process, link: Link) -> None:
        self.number = number
        self.process = process
        self.since = time.monotonic()
        self.leaving = False
        self.counted: dict[str, Any] | None = None
        self.status = Status()
        self.connections: dict[str, int] = {}  # by agent
        self.ready: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        self._link = link
        self._failure = ""

    @classmethod
    async def start(
        cls,
        number: int,
        settings: Settings,
        listening: Sequence[Sequence[socket.socket]],
        own: Sequence[tuple[str, int]],
        take_audit: Callable[[socket.socket], None],
        *,
        stopped: bool = False,
    ) -> Self:
        """Spawn one. Its audit lines come by the socket that `take_audit` gets."""
        pairs = [socket.socketpair(), socket.socketpair()]
        (link, their_link), (audit, their_audit) = pairs
        try:
            numbers = tuple(tuple(sock.fileno() for sock in sockets) for sockets in listening)
            task = Task(number, settings, numbers, tuple(own), their_link.fileno(), their_audit.fileno(), stopped)
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "proxy.worker"),
                stdin=asyncio.subprocess.PIPE,
                pass_fds=[*(fd for fds in numbers for fd in fds), task.link, task.audit],
                start_new_session=True,  # Ctrl-C is for the supervisor, which tells its workers in order
            )
        except BaseException:
            link.close()
            audit.close()
            raise
        finally:
            their_link.close()
            their_audit.close()
        take_audit(audit)
        assert process.stdin
        with contextlib.suppress(OSError):
            process.stdin.write(pickle.dumps(task))
            process.stdin.close()
        return cls(number, process, await Link.over(link))

    async def follow(self, on_report: Callable[[WorkerProcess], None], on_connections: Callable[[], None]) -> int:
        """Hear its reports until it is gone; how it ended, as `Popen.returncode`."""
        async for kind, data in self._link.messages():
            match kind:
                case "ready":
                    self.ready.set_result(data)
                case "failed":
                    self._failure = data
                case "connections":
                    self.connections = data
                    on_connections()
                case "report":
                    self.counted, self.status = data["counted"], Status(**data["status"])
                    on_report(self)
        status = await self.process.wait()
        await self._link.close()
        if not self.ready.done():
            self.ready.set_exception(UserError(self._failure or f"worker {self.number} {ended(status)}"))
            self.ready.exception()  # nobody may be waiting for it
        return status

    def tell(self, kind: str, data: Any = None) -> None:
        """Send an order."""
        self._link.send(kind, data)

    def leave(self, patience: float | None) -> None:
        """Accept nothing more, and end with the last exchange; None for as long as that takes."""
        self.leaving = True
        self.tell("drain", patience)

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    def as_json(self) -> dict[str, object]:
        """What `/api/status` says of it."""
        gauges = self.counted["gauges"]["connections"] if self.counted else []
        return {
            "worker": self.number,
            "process": self.process.pid,
            "uptime": time.monotonic() - self.since,
            "policy": self.status.policy,
            "agents": dict(self.status.agents),
            "connections": sum(int(count) for _, count in gauges),
            "leaving": self.leaving,
        }


def ended(status: int) -> str:
    """How a process ended, in words."""
    if status >= 0:
        return f"ended with status {status}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-status).name}"
    return f"was ended by signal {-status}"
