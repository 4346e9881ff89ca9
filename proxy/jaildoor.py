"""The proxy's side of `sallyport exec`: takes the listening sockets of a jail and serves them as its agent's."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxy import handover
from proxy.arrival import Arrival, Door
from proxy.doors import Server
from proxy.jaildns import GATEWAY
from proxy.jailnet import PROXY_PORT
from proxy.problem import Problems, UserError
from proxy.quantity import parse_duration
from proxy.runtime import Runtime
from proxy.sandboxca import bundle_for
from proxy.sandboxenv import variables
from proxy.settingvalue import Listener
from proxy.store import StoreUnavailable
from proxy.unixsocket import peer_of

_NAME = "exec"  # as listeners are named in metrics and audit
_log = logging.getLogger("sallyport")


@dataclass(slots=True)
class _Jail:
    """One `sallyport exec` that is connected."""

    control: socket.socket
    pid: int
    agent: str = ""
    temporary: bool = False
    listening: list[socket.socket] = field(default_factory=list)


class JailDoors:
    """Answers every `sallyport exec` of this host that belongs to our user."""

    def __init__(self, server: Server, runtime: Runtime, environment: Mapping[str, str]) -> None:
        self._server = server
        self._runtime = runtime
        self._environment = environment
        self._listening: tuple[socket.socket, Path] | None = None
        self._jails: dict[int, _Jail] = {}
        self._tasks: set[asyncio.Future[None]] = set()

    def open(self) -> None:
        """Begin. Raises UserError."""
        sock, path = handover.listen(self._runtime.settings.state)
        self._listening = sock, path
        asyncio.get_running_loop().add_reader(sock, self._accept, sock)

    def close(self) -> None:
        """Take in no other jail, and accept from none. Those that are there look for our successor."""
        if self._listening:
            sock, path = self._listening
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()
            path.unlink(missing_ok=True)
            self._listening = None
        for jail in list(self._jails.values()):
            self._end(jail)

    def _accept(self, listening: socket.socket) -> None:
        try:
            control, _ = listening.accept()
        except OSError:
            return
        pid, uid = peer_of(control)
        if uid not in (0, os.geteuid()):
            control.close()
            return
        control.setblocking(False)
        self._jails[control.fileno()] = jail = _Jail(control, pid)
        asyncio.get_running_loop().add_reader(control, self._readable, jail)

    def _readable(self, jail: _Jail) -> None:
        try:
            message = handover.receive(jail.control)
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, ValueError):
            message = None
        if message is None:
            self._spawn(self._leave(jail))
        else:
            self._spawn(self._answer(jail, message))

    def _spawn(self, work: Any) -> None:
        self._tasks.add(task := asyncio.ensure_future(work))
        task.add_done_callback(self._tasks.discard)

    def _end(self, jail: _Jail) -> None:
        if self._jails.pop(jail.control.fileno(), None):
            asyncio.get_running_loop().remove_reader(jail.control)
        for sock in jail.listening:
            self._server.forget(sock)
        jail.listening.clear()
        jail.control.close()

    async def _answer(self, jail: _Jail, message: handover.Message) -> None:
        try:
            if message.descriptors:
                reply = await self._listen(jail, [socket.socket(fileno=number) for number in message.descriptors])
            elif "leave" in message.data:
                await self._leave(jail, stay=True)
                reply = {}
            else:
                reply = await self._enter(jail, message.data)
        except (UserError, Problems, StoreUnavailable) as error:
            reply = {"error": str(error)}
        except Exception:
            _log.exception("a jail was refused")
            reply = {"error": "the proxy failed at this: look at what it logs"}
        with contextlib.suppress(OSError):
            handover.send(jail.control, reply)

    async def _enter(self, jail: _Jail, asked: Mapping[str, Any]) -> dict[str, Any]:
        agent_id, ttl = str(asked.get("agent", "")), asked.get("ttl")
        registry = self._runtime.registry
        if registry.by_id(agent_id) is None:
            await registry.apply_changes({agent_id})
        if made := registry.by_id(agent_id) is None:
            await self._add(agent_id, ttl)
        agent = registry.by_id(agent_id)
        if agent is None:
            raise UserError(f"agent {agent_id} was removed: sallyport agent add {agent_id}")
        jail.temporary = made or bool(asked.get("temporary")) or self._is_temporary(agent_id)
        jail.agent = agent_id
        settings = self._runtime.settings
        bundle, notes = await asyncio.to_thread(bundle_for, settings, agent)
        return {
            "environment": variables(agent_id, "", f"{GATEWAY}:{PROXY_PORT}", bundle),
            "files": [path for path in (bundle.pem, bundle.wgetrc, bundle.apt, bundle.java) if path],
            "hidden": self._hidden(),
            "temporary": jail.temporary,
            "notes": notes if jail.temporary or not ttl else [*notes, f"{agent_id} is registered; --ttl is not used"],
        }

    async def _add(self, agent_id: str, ttl: object) -> None:
        if not isinstance(ttl, str):
            raise UserError(
                f"agent {agent_id} is not registered: sallyport agent add {agent_id}, "
                "or give --ttl 1h for one that ends with the command"
            )
        try:
            seconds = parse_duration(ttl)
        except ValueError as error:
            raise UserError(f"--ttl {ttl!r}: {error.args[-1]}") from None
        await self._runtime.registry.add(agent_id, ttl=seconds)  # its token is nobody's: the jail needs none
        await self._runtime.registry.apply_changes({agent_id})

    async def _leave(self, jail: _Jail, *, stay: bool = False) -> None:
        """A jail is gone, and with the last one of a temporary agent that is. `stay`: its connection is not closed."""
        temporary, jail.temporary = jail.temporary, False
        if not stay:
            self._end(jail)
        if temporary and not self._is_temporary(jail.agent):
            with contextlib.suppress(UserError, StoreUnavailable):  # another worker may have removed it
                await self._runtime.registry.remove(jail.agent)
                await self._runtime.registry.apply_changes({jail.agent})

    def _is_temporary(self, agent_id: str) -> bool:
        return any(jail.temporary and jail.agent == agent_id for jail in self._jails.values())

    def _hidden(self) -> list[str]:
        settings = self._runtime.settings
        key = self._environment.get("SALLYPORT_MASTER_KEY_FILE")
        files = [settings.audit.file, Path(key) if key else None]
        return [str(path.resolve()) for path in (settings.state, settings.certs, settings.rules, *files) if path]

    async def _listen(self, jail: _Jail, taken: list[socket.socket]) -> dict[str, Any]:
        if not jail.agent or jail.listening:
            for sock in taken:
                sock.close()
            raise UserError("this jail is not expected")
        jail.listening = taken
        listener = Listener(_NAME, "", 0, jail.agent)
        for sock in taken:
            await self._server.accept(sock, _door(listener, jail.pid, sock.getsockname()[1]))
        return {}


def _door(listener: Listener, pid: int, port: int) -> Door:
    """Whoever comes in is the listener's agent. The address in the jail is of its own choice, so it counts for
    nothing; the process that runs the jail is named instead."""

    def plain(sock: socket.socket) -> Arrival:
        return Arrival(listener, (_NAME, pid), (_NAME, port))

    def redirected(sock: socket.socket) -> Arrival | None:
        if not sock.getsockname()[0].startswith(("198.18.", "198.19.")):  # the jail's own localhost
            return None
        return Arrival(listener, (_NAME, pid), (_NAME, port), redirected=port)

    return plain if port == PROXY_PORT else redirected
