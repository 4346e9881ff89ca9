"""The rules in force: read from a folder, read again when it changes, the last good ones kept when they are broken."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from proxy.policy import Policy
from proxy.problem import Problem, Problems
from proxy.rulefile import load_policy

INTERVAL = 0.3  # seconds between two looks; a change is in force within one second
TESTS = ".test.yaml"

_log = logging.getLogger(__name__)

type Signature = tuple[tuple[str, int, int, int], ...]


def rule_files(folder: Path) -> list[Path]:
    """The rule files below `folder` (or itself, if it is one), in path order.

    Raises Problems if it cannot be read.
    """
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        hint = f"make it with a rule file in it, or point rules: elsewhere (mkdir {folder})"
        raise Problems([Problem(str(folder), 0, 0, "no such folder of rules", hint)])
    try:
        return sorted(path for path in folder.rglob("*.yaml") if not path.name.endswith(TESTS))
    except OSError as error:
        raise Problems([Problem(str(folder), 0, 0, f"cannot be read: {error.strerror}")]) from None


def read_policy(folder: Path) -> tuple[Policy, list[Problem]]:
    """The policy in `folder`, and warnings about it.

    Raises Problems with everything that is wrong with it.
    """
    contents, unreadable = {}, []
    for path in rule_files(folder):
        try:
            contents[shown(path)] = path.read_bytes()
        except OSError as error:
            hint = "let the user of the proxy read it"
            unreadable.append(Problem(shown(path), 0, 0, f"cannot be read: {error.strerror}", hint))
    if unreadable:
        raise Problems(unreadable)
    return load_policy(contents)


def shown(path: Path) -> str:
    """A path as messages show it: relative where it lies below the current folder."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _signature(folder: Path) -> Signature:
    try:
        paths = rule_files(folder)
        statuses = [(path, path.stat()) for path in paths]
    except (Problems, OSError):
        return (("missing", 0, 0, 0),)
    return tuple((str(path), status.st_mtime_ns, status.st_size, status.st_ino) for path, status in statuses)


class Rules:
    """The policy of a folder. `policy` is None until one was loaded; `problems` are those of the last attempt."""

    def __init__(self, folder: Path, on_reload: Callable[[bool, int, float], None]) -> None:
        self.folder = folder
        self.policy: Policy | None = None
        self.problems: tuple[Problem, ...] = ()
        self.warnings: tuple[Problem, ...] = ()
        self._on_reload = on_reload
        self._seen: Signature | None = None

    async def load(self) -> bool:
        """Read the folder now; whether it was sound."""
        self._seen = await asyncio.to_thread(_signature, self.folder)
        try:
            policy, warnings = await asyncio.to_thread(read_policy, self.folder)
        except Problems as error:
            self.problems = tuple(error.problems)
        except Exception as error:  # a bug of ours must not end reloading, nor replace sound rules
            self.problems = (Problem(str(self.folder), 0, 0, f"cannot be loaded: {type(error).__name__}"),)
        else:
            self.policy, self.problems, self.warnings = policy, (), tuple(warnings)
        self._on_reload(not self.problems, len(self.policy.rules) if self.policy else 0, time.time())
        return not self.problems

    async def follow(self) -> None:
        """Reload whenever a file changed, until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL)
            if await asyncio.to_thread(_signature, self.folder) != self._seen:
                await self.reload()

    async def reload(self) -> None:
        """Load again and say what came of it."""
        if await self.load():
            assert self.policy
            _log.info("rules reloaded: %d rules, policy %s", len(self.policy.rules), self.policy.digest)
        else:
            kept = "the last good ones stay in force" if self.policy else "everything is refused"
            lines = "\n".join(str(problem) for problem in self.problems)
            _log.error("the rules are broken, %s:\n%s", kept, lines)
