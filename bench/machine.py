"""What the kernel says: which cores there are, and what a process and all its children have used."""

from __future__ import annotations

import os
import platform
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

TICK = 1 / os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")


def cores() -> tuple[set[int], set[int]]:
    """The cores for a proxy of one worker, and those for the generator and the upstream."""
    first, *others = sorted(os.sched_getaffinity(0))
    return {first}, set(others[:2]) or {first}


def two_cores() -> tuple[set[int], set[int]]:
    """The cores for a proxy of two workers, and those for the rest: shared where there are fewer than four."""
    ours = sorted(os.sched_getaffinity(0))
    return set(ours[:2]), set(ours[2:4]) if len(ours) >= 4 else set(ours)


def _fields(pid: str) -> list[str]:
    return (_PROC / pid / "stat").read_text().rpartition(") ")[2].split()


def tree(root: int) -> list[int]:
    """A process and everything it started that still runs."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir(_PROC):
        if entry.isdigit():
            try:
                parents.setdefault(int(_fields(entry)[1]), []).append(int(entry))
            except (OSError, IndexError):  # it ended meanwhile
                continue
    found = [root]
    for pid in found:
        found += parents.get(pid, [])
    return found


def tree_runs(root: int) -> bool:
    """Whether its head has not ended."""
    return _fields(str(root))[0] != "Z"


def cpu_seconds(root: int) -> float:
    """What the tree of a process has used: user, system, and that of children that have ended."""
    total = 0.0
    for pid in tree(root):
        try:
            total += sum(map(int, _fields(str(pid))[11:15])) * TICK
        except OSError:
            continue
    return total


def cpu_by_thread(root: int) -> dict[str, float]:
    """The seconds of each living thread of the tree, by a name."""
    found = {}
    for pid in tree(root):
        for task in (_PROC / str(pid) / "task").iterdir():
            used = sum(map(int, _fields(f"{pid}/task/{task.name}")[11:13])) * TICK
            which = "main thread" if task.name == str(pid) else task.name
            found[f"{(task / 'comm').read_text().strip()} {which}"] = used
    return found


def _kib(root: int, name: str) -> int:
    total = 0
    for pid in tree(root):
        try:
            found = re.search(rf"^{name}:\s+(\d+)", (_PROC / str(pid) / "status").read_text(), re.MULTILINE)
        except OSError:
            continue
        total += int(found[1]) if found else 0
    return total


def rss(root: int) -> int:
    """Resident bytes of the tree."""
    return _kib(root, "VmRSS") * 1024


def forget_peak(root: int) -> None:
    """Let `peak` start from here."""
    for pid in tree(root):
        (_PROC / str(pid) / "clear_refs").write_text("5")


def peak(root: int) -> int:
    """The most resident bytes since `forget_peak`, the processes' peaks added."""
    return _kib(root, "VmHWM") * 1024


@contextmanager
def awake() -> Iterator[bool]:
    """Idle cores do not halt meanwhile, as under cyclictest: waking one takes a virtual machine as long as a request
    takes a proxy. Whether the kernel lets us (pm_qos_interface.rst)."""
    try:
        latency = os.open("/dev/cpu_dma_latency", os.O_WRONLY)
    except OSError:
        yield False
        return
    try:
        os.write(latency, struct.pack("i", 0))
        yield True
    finally:
        os.close(latency)


def free_port() -> int:
    """A port for a program that cannot be told 0."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def start(command: Sequence[object], on: set[int], **options: object) -> subprocess.Popen[str]:
    """Start a process on these cores, as the head of a process group."""
    return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
        [str(word) for word in command],
        preexec_fn=lambda: os.sched_setaffinity(0, on),
        start_new_session=True,
        text=True,
        **options,
    )


def stop(process: subprocess.Popen[str]) -> None:
    """End it and its group, gently at first."""
    members = tree(process.pid)
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid in members[1:]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_for_port(port: int, process: subprocess.Popen[str], patience: float = 20.0) -> None:
    """Until something listens.

    Raises RuntimeError when the process ends before, or does not in time.
    """
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None:
            raise RuntimeError(f"it ended with status {process.returncode}")
        time.sleep(0.05)
    raise RuntimeError("it does not listen")


_WORK = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
texts, done = {number: str(number) for number in range(20_000)}, 0
end = time.monotonic() + 1
while time.monotonic() < end:
    for number in range(1_000):
        texts[number * 7 % 20_000].encode().find(b"9")
    done += 1
print(done)
"""


def second_core() -> float:
    """How many times as much two cores do as one, in Python: less than twice where they share what is below them."""

    def work(cores: list[int]) -> float:
        started = [
            subprocess.Popen([sys.executable, "-c", _WORK, str(core)], stdout=subprocess.PIPE, text=True)
            for core in cores
        ]
        return sum(int(process.communicate()[0]) for process in started)

    one, *others = sorted(os.sched_getaffinity(0))
    rounds = [work([one, *others[:1]]) / work([one]) for _ in range(3)]
    return statistics.median(rounds)


def description() -> str:
    """The machine in a line, without its name."""
    text = (_PROC / "cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{model[1] if model else platform.machine()}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, "
        f"Linux {platform.release().split('-')[0]}"
    )
