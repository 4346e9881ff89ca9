"""Real workerd with the example that ships, and what a sandbox in it is made to do."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness import PATIENCE, ROOT, Connection, Proxy, Response

EXAMPLE = ROOT / "examples/workerd"
PACKAGES = ROOT / ".node-dev/node_modules"


def package(pattern: str) -> Path:
    """Where something of the locked Node packages is; a missing one fails the test."""
    found = next(PACKAGES.glob(pattern), None)
    if found is None:
        pytest.fail(f"{pattern} is missing in {PACKAGES}: run scripts/test, which installs it")
    return found


class Workerd:
    """The example as it ships, before a proxy; `changes` replace text in its files, `extra` files are put beside."""

    def __init__(
        self,
        proxy: Proxy,
        key: str,
        folder: Path,
        changes: dict[str, tuple[str, str]] | None = None,
        extra: dict[str, Path] | None = None,
    ) -> None:
        self.folder = folder / "workerd"
        shutil.copytree(EXAMPLE, self.folder)
        for name, (old, new) in (changes or {}).items():
            text = (self.folder / name).read_text()
            assert old in text
            (self.folder / name).write_text(text.replace(old, new))
        for name, path in (extra or {}).items():
            shutil.copy(path, self.folder / name)
        self.ports: dict[str, int] = {}
        self._proxy = proxy
        self._key = key

    def __enter__(self) -> Workerd:
        told, tell = os.pipe()
        address = f"{self._proxy.address[0]}:{self._proxy.address[1]}"
        self._stderr = (self.folder / "stderr.txt").open("w")
        self._process = subprocess.Popen(
            [
                package("@cloudflare/workerd-*/bin/workerd"),
                *("serve", "--experimental", "config.capnp", f"--control-fd={tell}"),
                *(f"--external-addr={name}={address}" for name in ("sallyport", "sallyport-tcp", "nobody")),
                *("--socket-addr=host=127.0.0.1:0", "--socket-addr=static=127.0.0.1:0"),
            ],
            cwd=self.folder,
            pass_fds=[tell],
            env={"GATEWAY_KEY": self._key},
            stderr=self._stderr,
        )
        os.close(tell)
        with os.fdopen(told) as events:
            while len(self.ports) < 2 and (line := events.readline()):
                event = json.loads(line)
                if event["event"] == "listen":
                    self.ports[event["socket"]] = event["port"]
        if len(self.ports) < 2:
            self.__exit__()
            pytest.fail(self.said())
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE)
        self._stderr.close()

    def said(self) -> str:
        """What workerd wrote to standard error."""
        return (self.folder / "stderr.txt").read_text()

    def run(self, code: str, agent: str = "coder-1") -> Response:
        """What a Dynamic Worker of this code answers, loaded as the agent's."""
        return self._post("host", f"/{agent}", code.encode())

    def static(self) -> Response:
        """What the static worker answers."""
        return self._post("static", "/", b"")

    def _post(self, name: str, path: str, body: bytes) -> Response:
        url = f"http://127.0.0.1:{self.ports[name]}{path}"
        try:
            with urllib.request.urlopen(url, body, PATIENCE) as answer:
                return Response(answer.status, answer.getheaders(), answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return Response(error.code, error.headers.items(), error.read())

    def relay(self) -> Relay:
        """A connection to the static worker, which is made to pass bytes on both ways."""
        return Relay(self.ports["static"])


class Relay:
    """TLS made here, carried by a worker's request and response bodies: workerd has no TLS client of its own for a
    tunnel through another Worker."""

    def __init__(self, port: int) -> None:
        self._wire = Connection(socket.create_connection(("127.0.0.1", port), PATIENCE))
        self._wire.send(b"POST / HTTP/1.1\r\nhost: static\r\ntransfer-encoding: chunked\r\n\r\n")
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._began = False

    def exchange(self, context: ssl.SSLContext, name: str, request: bytes) -> bytes:
        """All that comes back after a request within TLS to `name`."""
        with contextlib.closing(self._wire):
            tls = context.wrap_bio(self._in, self._out, server_hostname=name)
            while self._again(tls.do_handshake):
                pass
            tls.write(request)
            answer: list[bytes] = []
            while self._again(lambda: answer.append(tls.read())) or answer[-1]:
                pass
            return b"".join(answer)

    def _again(self, step: Callable[[], object]) -> bool:
        """Whether a step needs to be taken again because it wanted bytes, which are there now."""
        try:
            step()
        except ssl.SSLWantReadError:
            self._flush()
            self._read()
            return True
        self._flush()
        return False

    def _flush(self) -> None:
        if data := self._out.read():
            self._wire.send(b"%x\r\n%s\r\n" % (len(data), data))

    def _read(self) -> None:
        if not self._began:
            assert b" 200 " in self._wire.read_until(b"\r\n\r\n")
            self._began = True
        size = int(self._wire.read_until(b"\r\n"), 16)
        self._in.write(self._wire.read_exactly(size + 2)[:-2])
        if not size:
            self._in.write_eof()
