"""A small git server: smart HTTP by `git http-backend`, behind Basic credentials (RFC 3875, RFC 7617)."""

from __future__ import annotations

import os
import subprocess
from base64 import b64encode
from pathlib import Path

from tests.clients.sandbox import reflecting, tool
from tests.harness import PATIENCE, Reply, Seen

# A user's or this machine's git settings have no say.
NO_GIT_CONFIG = {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull}


class GitHost:
    """Serves the repositories below `root` to whoever has the password, and to nobody else."""

    def __init__(self, root: Path, user: str, password: str) -> None:
        self.root = root
        self._proof = f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}"

    def create(self, name: str, files: dict[str, str]) -> Path:
        """A bare repository with one commit of these files."""
        bare, work = self.root / name, self.root / f"{name}.work"
        for command in (("init", "--bare", "-b", "main", bare), ("clone", bare, work)):
            git(self.root, *command)
        for path, text in files.items():
            (work / path).write_text(text)
        git(work, "add", ".")
        git(work, *AUTHOR, "commit", "-m", "first")
        git(work, "push", "origin", "HEAD:main")
        return bare

    def __call__(self, seen: Seen) -> Reply:
        """One request by the CGI program."""
        if seen.header("authorization") != [self._proof]:
            return Reply(401, [("www-authenticate", 'Basic realm="git"')], b"credentials, please")
        path, _, query = seen.target.partition("?")
        result = subprocess.run(
            [tool("git"), "http-backend"],
            input=seen.body,
            env={
                **NO_GIT_CONFIG,
                "PATH": os.environ["PATH"],
                "GIT_PROJECT_ROOT": str(self.root),
                "GIT_HTTP_EXPORT_ALL": "1",
                "REMOTE_USER": "x-access-token",  # which allows pushes
                "REQUEST_METHOD": seen.method,
                "PATH_INFO": path,
                "QUERY_STRING": query,
                "CONTENT_TYPE": "".join(seen.header("content-type")),
                "CONTENT_LENGTH": str(len(seen.body)),
                "HTTP_CONTENT_ENCODING": "".join(seen.header("content-encoding")),
                "HTTP_GIT_PROTOCOL": "".join(seen.header("git-protocol")),
            },
            capture_output=True,
            timeout=PATIENCE,
            check=True,
        )
        head, _, body = result.stdout.partition(b"\r\n\r\n")
        fields = [line.split(": ", 1) for line in head.decode().split("\r\n")]
        status = next((int(value[:3]) for name, value in fields if name == "Status"), 200)
        return reflecting(Reply(status, [(name, value) for name, value in fields if name != "Status"], body), seen)


AUTHOR = ("-c", "user.name=Coder", "-c", "user.email=coder@example.test")


def git(folder: Path, *words: str | Path) -> str:
    """A git command on this side of the proxy."""
    command = [tool("git"), *words]
    environment = {**NO_GIT_CONFIG, "PATH": os.environ["PATH"]}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return result.stdout.strip()
