"""What a jail sees of the file system, as arguments for bubblewrap: the system read-only, a folder to work in, and
nothing of the proxy's."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from proxy.jaildns import GATEWAY
from proxy.problem import UserError

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc", "/opt", "/nix", "/snap")
# What root may read of them, and a jail of root's must not.
_PRIVATE = (
    "/etc/shadow",
    "/etc/shadow-",
    "/etc/gshadow",
    "/etc/gshadow-",
    "/etc/ssh",
    "/etc/ssl/private",
    "/etc/sudoers.d",
)
# Of /proc: root may write there without any capability, to the kernel of all (core_pattern, sysrq), and read these.
_KERNEL = ("sys", "sysrq-trigger", "irq", "bus", "fs", "acpi", "scsi")
_TELLING = ("kcore", "keys", "key-users", "kallsyms", "timer_list", "sched_debug", "latency_stats", "config.gz")
_PACKAGE = Path(__file__).resolve().parent
BIN = "/run/sallyport/bin"


@dataclass(frozen=True, slots=True)
class Mount:
    """A file or folder of the host, and where it is in the jail."""

    source: Path
    target: Path
    writable: bool = True

    @staticmethod
    def parse(text: str, cwd: Path) -> Mount:
        """`SRC`, `SRC:DST`, and either with `:ro` behind it; relative paths are to `cwd`. Raises UserError."""
        parts = text.split(":")
        writable = parts[-1] != "ro" or len(parts) == 1
        parts = parts if writable else parts[:-1]
        if len(parts) > 2 or not all(parts):
            raise UserError(f"--mount {text!r}: write SRC, SRC:DST or SRC:DST:ro")
        source = (cwd / parts[0]).resolve()
        if not source.exists():
            raise UserError(f"--mount {text!r}: {source} is not there")
        return Mount(source, Path(os.path.normpath(cwd / parts[-1])), writable)


@dataclass(frozen=True, slots=True)
class Sight:
    """What one jail sees. `hidden` are the proxy's own files, `shown` those of them that its clients need."""

    cwd: Path
    home: Path
    mounts: Sequence[Mount]
    hidden: Sequence[Path]
    shown: Sequence[Path]

    @property
    def workable(self) -> bool:
        """Whether the jail may write where it was started: not where the proxy's files are, nor the whole home."""
        return not any(_overlap(self.cwd, path) for path in (*self.hidden, _PACKAGE)) and not (
            self.home.is_relative_to(self.cwd) or any(Path(name).is_relative_to(self.cwd) for name in _SYSTEM)
        )

    @property
    def start(self) -> Path:
        """The folder that the command begins in."""
        return self.cwd if self.workable or _visible(self.cwd) else self.home

    def check(self) -> None:
        """Raises UserError for a mount that would show what is hidden."""
        for mount in self.mounts:
            for path in self.hidden:
                if _overlap(mount.source, path) or _overlap(mount.target, path):
                    raise UserError(f"--mount {mount.source}: the proxy's own {path} would be in the jail; move one")


def bwrap_arguments(sight: Sight) -> list[str]:
    """Everything before the command. Descriptors in it are made here, to be inherited by bubblewrap.

    Raises UserError.
    """
    sight.check()
    words = ["--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    words += ["--cap-drop", "ALL", "--die-with-parent", "--new-session"]
    words += [
        word for step in (*_kernel(), *_system(sight), *_own(sight), *_masks(sight), *_files(sight)) for word in step
    ]
    return [*words, "--chdir", str(sight.start)]


type _Steps = Iterator[Sequence[str]]


def _kernel() -> _Steps:
    yield "--dev", "/dev"
    yield "--proc", "/proc"
    for name in _KERNEL:
        if Path("/proc", name).exists():
            yield "--ro-bind", f"/proc/{name}", f"/proc/{name}"
    for name in _TELLING:
        yield from _mask(Path("/proc", name))


def _system(sight: Sight) -> _Steps:
    yield "--tmpfs", "/tmp"  # noqa: S108  # a fresh one
    yield "--tmpfs", "/run"
    yield "--dir", "/var/tmp"  # noqa: S108
    yield "--symlink", "/run", "/var/run"
    for name in _SYSTEM:
        path = Path(name)
        if path.is_symlink():
            yield "--symlink", str(path.readlink()), name
        elif path.exists():
            yield "--ro-bind", name, name
    for name in _PRIVATE:
        yield from _mask(Path("/etc", name))
    yield "--tmpfs", str(sight.home)
    for path in dict.fromkeys((Path(sys.base_prefix), Path(sys.prefix), _PACKAGE)):
        if not path.is_relative_to("/usr"):
            yield "--ro-bind", str(path), str(path)


def _own(sight: Sight) -> _Steps:
    if sight.workable:
        yield "--bind", str(sight.cwd), str(sight.cwd)
    for mount in sight.mounts:
        yield "--bind" if mount.writable else "--ro-bind", str(mount.source), str(mount.target)


def _masks(sight: Sight) -> _Steps:
    for path in sight.hidden:
        if _visible(path):
            yield from _mask(path)


def _mask(path: Path) -> _Steps:
    if path.is_dir():
        yield "--perms", "0755", "--tmpfs", str(path)
    elif path.exists():
        yield "--ro-bind", os.devnull, str(path)


def _files(sight: Sight) -> _Steps:
    for path in sight.shown:
        yield "--ro-bind", str(path), str(path)
    launcher = (
        f"#!/bin/sh\nexec '{sys.executable}' -I -c 'import sys; sys.path.insert(0, \"{_PACKAGE.parent}\"); "
        'from proxy.__main__ import main; sys.exit(main())\' "$@"\n'
    )
    yield _file(f"{BIN}/sallyport", launcher, "0755")
    yield _file(os.path.realpath("/etc/resolv.conf"), f"nameserver {GATEWAY}\noptions timeout:2 attempts:1\n")
    yield _file("/etc/hosts", "127.0.0.1 localhost\n::1 localhost ip6-localhost\n")


def _file(target: str, text: str, mode: str = "0644") -> Sequence[str]:
    descriptor = os.memfd_create("jail", 0)
    os.write(descriptor, text.encode())
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.set_inheritable(descriptor, True)
    return "--perms", mode, "--ro-bind-data", str(descriptor), target


def _visible(path: Path) -> bool:
    """Whether the jail would see what lies there."""
    seen = [Path(name) for name in (*_SYSTEM, sys.prefix, sys.base_prefix)]
    return any(path.is_relative_to(place) for place in (*seen, _PACKAGE))


def _overlap(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)
