"""The rules in force: read from a folder, read again when it changes, the last good ones kept when they are broken."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from proxy.policy import Policy
from proxy.problem import Problem, Problems
from proxy.rulefile import load_policy

INTERVAL = 0.3  # seconds between two looks; a change is in force within one second
TESTS = ".test.yaml"
_UNREADABLE = "let the user of the proxy read it"

_log = logging.getLogger(__name__)

type Signature = tuple[tuple[str, int, int, int], ...]

_MISSING: Signature = (("", 0, 0, 0),)  # unlike that of an empty folder


def rule_files(folder: Path) -> list[Path]:
    """The rule files below `folder` (or itself, if it is one), in path order.

    Raises Problems if it cannot be read.
    """
    if folder.is_file():
        return [folder]
    return [path for path in yaml_files(folder) if path.suffix == ".yaml" and not path.name.endswith(TESTS)]


def yaml_files(folder: Path) -> list[Path]:
    """Every *.yaml and *.yml below `folder`, in path order. Hidden ones are left out: editors keep their drafts there,
    and Kubernetes the versions of a mounted ConfigMap.

    Raises Problems if it cannot be read.
    """
    if not folder.is_dir():
        hint = f"make it with a rule file in it, or point rules: elsewhere (mkdir {folder})"
        raise Problems([Problem(str(folder), 0, 0, "no such folder of rules", hint)])
    found: list[Path] = []
    try:
        for parent, folders, files in folder.walk(on_error=_raise):  # else it would pass over a folder, and its blocks
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [parent / name for name in files if not name.startswith(".") and name.endswith((".yaml", ".yml"))]
    except OSError as error:
        place = shown(Path(error.filename)) if error.filename else str(folder)
        raise Problems([Problem(place, 0, 0, f"cannot be read: {error.strerror}", _UNREADABLE)]) from None
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def read_policy(folder: Path) -> tuple[Policy, list[Problem]]:
    """The policy in `folder`, and warnings about it.

    Raises Problems with everything that is wrong with it.
    """
    policy, warnings = load_policy(read_files(rule_files(folder)))
    return policy, [*warnings, *_overlooked(folder, policy)]


def read_files(paths: Iterable[Path]) -> dict[str, bytes]:
    """The contents by the path as it is shown.

    Raises Problems with all that cannot be read.
    """
    contents, unreadable = {}, []
    for path in paths:
        try:
            contents[shown(path)] = path.read_bytes()
        except OSError as error:
            unreadable.append(Problem(shown(path), 0, 0, f"cannot be read: {error.strerror}", _UNREADABLE))
    if unreadable:
        raise Problems(unreadable)
    return contents


def _overlooked(folder: Path, policy: Policy) -> Iterator[Problem]:
    if not policy.rules:
        hint = "write a rule file, or point rules: at the folder that has them"
        yield Problem(shown(folder), 0, 0, "there are no rules in it: everything is refused", hint, warning=True)
    for path in yaml_files(folder) if folder.is_dir() else ():
        if path.suffix == ".yml":
            yield Problem(shown(path), 0, 0, "is not read", f"call it {path.stem}.yaml", warning=True)


def shown(path: Path) -> str:
    """A path as messages show it: relative where it lies below the current folder."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _signature(folder: Path) -> Signature:
    try:
        return tuple(map(_look, rule_files(folder)))
    except Problems:
        return _MISSING


def _look(path: Path) -> tuple[str, int, int, int]:
    try:
        status = path.stat()
    except OSError:
        return (str(path), 0, 0, 0)
    return (str(path), status.st_mtime_ns, status.st_size, status.st_ino)


class Rules:
    """The policy of a folder. `policy` is None until one was loaded; `problems` are those of the last attempt."""

    def __init__(self, folder: Path, on_reload: Callable[[bool, int, float], None]) -> None:
        self.folder = folder
        self.policy: Policy | None = None
        self.problems: tuple[Problem, ...] = ()
        self.warnings: tuple[Problem, ...] = ()
        self._on_reload = on_reload
        self._seen: Signature | None = None
        self._one = asyncio.Lock()  # a slow load must not put older rules in the place of newer ones

    async def load(self) -> bool:
        """Read the folder now; whether it was sound."""
        async with self._one:
            return await self._load()

    async def _load(self) -> bool:
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
            lines = "".join(f"\n{warning}" for warning in self.warnings)
            _log.info("rules reloaded: %d rules, policy %s%s", len(self.policy.rules), self.policy.digest, lines)
        else:
            kept = "the last good ones stay in force" if self.policy else "everything is refused"
            lines = "\n".join(str(problem) for problem in self.problems)
            _log.error("the rules are broken, %s:\n%s", kept, lines)
