"""The running proxy as `sallyport exec` sees it: one process, or several workers, and their successors."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxy import handover
from proxy.problem import UserError

_NONE = "no proxy runs here with these settings: start one with `sallyport run`"


@dataclass(slots=True)
class Proxies:
    """The processes that serve one jail."""

    state: Path
    agent: dict[str, Any]
    listening: Sequence[socket.socket] = ()
    connected: dict[Path, socket.socket] = field(default_factory=dict)

    def first(self) -> dict[str, Any]:
        """What one of them says about the agent. Raises UserError."""
        for path in handover.sockets(self.state):
            with contextlib.suppress(OSError):
                control = handover.connect(path)
                given = handover.ask(control, self.agent)
                self.agent = {**self.agent, "temporary": given["temporary"]}
                self.connected[path] = control
                return given
        raise UserError(_NONE)

    def hand_over(self, listening: Sequence[socket.socket]) -> None:
        """Have all of them serve these sockets. Raises UserError where none does."""
        self.listening = listening
        for path, control in list(self.connected.items()):
            self._give(path, control)
        self.look()
        if not self.connected:
            raise UserError(_NONE)

    def look(self) -> None:
        """Hand over to those that began since, and forget those that ended."""
        for path, control in list(self.connected.items()):
            if _ended(control):
                control.close()
                del self.connected[path]
        for path in handover.sockets(self.state):
            if path not in self.connected:
                with contextlib.suppress(OSError, UserError):
                    self.connected[path] = control = handover.connect(path)
                    handover.ask(control, self.agent)
                    self._give(path, control)

    def leave(self) -> None:
        """The command has ended; a temporary agent is gone when this returns."""
        for control in self.connected.values() if self.agent.get("temporary") else ():
            with contextlib.suppress(OSError, UserError):
                handover.ask(control, {"leave": True})

    def _give(self, path: Path, control: socket.socket) -> None:
        try:
            handover.ask(control, {}, [sock.fileno() for sock in self.listening])
        except OSError:
            control.close()
            self.connected.pop(path, None)


def _ended(control: socket.socket) -> bool:
    """Nothing is ever said unasked: what can be read is the end."""
    poll = select.poll()
    poll.register(control, select.POLLIN)
    return bool(poll.poll(0))
