"""The kill switch of one host, for when the store does not answer: a file named KILL in the state directory.

Empty, it stops everybody. Else it names agents, one a line, with a reason behind the name if one was given. What cannot
be read, or names no agent, stops everybody. The switch in the store is the registry's.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from proxy.agent import parse_agent_id
from proxy.files import own_dir, write_private
from proxy.guard import where
from proxy.problem import UserError

FILE = "KILL"
INTERVAL = 0.2  # seconds between two looks; a kill must be felt within one
EVERYBODY = "*"
_MOST = 1024 * 1024  # bytes
_log = logging.getLogger("sallyport")


@dataclass(frozen=True, slots=True)
class Stops:
    """Who is stopped, and why; made without arguments nobody is."""

    everybody: str | None = None  # None: not everybody
    agents: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.everybody is not None or bool(self.agents)

    def reason(self, agent_id: str) -> str | None:
        """Why an agent is stopped; None where it is not."""
        return self.agents.get(agent_id, self.everybody)


def read_stops(state: Path) -> Stops:
    """What the file says."""
    try:
        with (state / FILE).open("rb") as file:
            content = file.read(_MOST + 1)
    except FileNotFoundError:
        return Stops()
    except OSError as error:
        return Stops(f"{FILE} cannot be read: {error.strerror}")
    if len(content) > _MOST:
        return Stops(f"{FILE} is too large")
    lines = [line.split(maxsplit=1) for line in content.decode("utf-8", "replace").splitlines() if line.strip()]
    named = {words[0]: words[1].strip() if len(words) > 1 else "" for words in lines}
    everybody = named.pop(EVERYBODY, None if named else "")
    try:
        for agent_id in named:
            parse_agent_id(agent_id)
    except ValueError:
        return Stops(f"{FILE} names what is no agent")
    return Stops(everybody, named)


def stop(state: Path, agent_id: str | None, reason: str = "") -> None:
    """Stops an agent, or (None) everybody, on this host. Raises OSError, UserError."""
    before = read_stops(own_dir(state))
    why = " ".join(reason.split())  # on one line, whatever Unicode takes for an end of it
    if agent_id is not None:
        try:
            parse_agent_id(agent_id)
        except ValueError as error:
            raise UserError(str(error)) from None
        _write(state, Stops(before.everybody, {**before.agents, agent_id: why}))
        return
    try:
        _write(state, Stops(why, before.agents))
    except OSError:
        os.close(os.open(state / FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))  # a full disk has room for a name


def resume(state: Path, agent_id: str | None) -> bool:
    """Ends `stop` of the same; whether there was one. Raises OSError."""
    before = read_stops(state)
    if agent_id is None:
        found, after = before.everybody is not None, Stops(None, before.agents)
    else:
        found = agent_id in before.agents
        after = Stops(before.everybody, {name: why for name, why in before.agents.items() if name != agent_id})
    if found:
        _write(state, after)
    return found


def _write(state: Path, stops: Stops) -> None:
    if not stops:
        (state / FILE).unlink(missing_ok=True)
        return
    named = [*([(EVERYBODY, stops.everybody)] if stops.everybody is not None else []), *stops.agents.items()]
    write_private(state / FILE, "".join(f"{name} {why}".rstrip() + "\n" for name, why in named).encode())


class KillSwitch:
    """Looks at the file for one process. `on_change` is told of every change."""

    def __init__(self, state: Path, on_change: Callable[[Stops], None]) -> None:
        self.stops = Stops()
        self._state = state
        self._on_change = on_change
        self.pulled = False  # by a signal, and the file could not be written

    def look(self) -> None:
        """Act on what the file says now."""
        stops = read_stops(self._state)
        if self.pulled:
            stops = Stops(stops.everybody or "", stops.agents)
        if stops != self.stops:
            _log.warning("the kill switch of this host stops %s", _who(stops))
            self._on_change(stops)
            self.stops = stops

    def pull(self) -> None:
        """Stop everybody now; it stays so until `sallyport agent revive --all`."""
        try:
            stop(self._state, None, "by signal")
        except Exception as error:
            self.pulled = True
            _log.error("%s cannot be written (%s): everybody is stopped until a restart", FILE, type(error).__name__)
        self.look()

    async def run(self) -> None:
        """Looks until cancelled, whatever happens."""
        while True:
            await asyncio.sleep(INTERVAL)
            try:
                self.look()
            except Exception as error:
                _log.error("the kill switch failed and is tried again: %s", where(error))


def _who(stops: Stops) -> str:
    if stops.everybody is not None:
        return "every agent"
    return ", ".join(stops.agents) or "nobody any more"
