"""What the tests of the storage rooms share: a real store, other processes that use it, and a look at who is left."""

from __future__ import annotations

import asyncio
import fcntl
import inspect
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from proxy.embedded import server_binary

ROOT = Path(__file__).parent.parent


def wait_until(true: Callable[[], object], seconds: float = 10.0) -> None:
    """Returns once `true()` is; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


def server_lives(state: Path) -> bool:
    """Whether an embedded server, whoever started it, holds its lock in `state`."""
    lock = os.open(state / "store" / "server.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def server_pid(state: Path) -> int:
    """The process of the embedded server in `state`."""
    return int((state / "store" / "server.pid").read_text())


async def eventually(true: Callable[[], object], seconds: float = 10.0) -> float:
    """The seconds until `true()`, awaited if need be, is; fails after `seconds`."""
    start = time.monotonic()
    while True:
        result = true()
        if inspect.isawaitable(result):
            result = await result
        if result:
            return time.monotonic() - start
        assert time.monotonic() - start < seconds, "it never came true"
        await asyncio.sleep(0.005)


@contextmanager
def process(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Another Python process with `asyncio`, `sys`, `Path` and `Store` at hand; killed at the end if it still runs."""
    preamble = "import asyncio, sys\nfrom pathlib import Path\nfrom proxy.store import Store\n"
    with subprocess.Popen(
        [sys.executable, "-c", preamble + code, *map(str, arguments)],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        try:
            yield child
        finally:
            child.kill()


# Opens the store, writes one record, says so and waits.
HOLDER = """
async def main():
    store = await Store.open("embedded", Path(sys.argv[1]))
    await store.change("vault", sys.argv[2], lambda _: "written before the kill")
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await store.close()
asyncio.run(main())
"""


class RemoteStore:
    """A server on a TCP port that stays the same, as an operator would run one; its data outlives `kill`."""

    def __init__(self, directory: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns once it listens."""
        place = ("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._directory))
        durable = ("--appendonly", "yes", "--appendfsync", "always", "--save", "")
        command = [server_binary(), *place, *durable]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_until(self._listens)

    def kill(self) -> None:
        """kill -9."""
        if self._process:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
