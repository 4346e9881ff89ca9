"""The code blocks of a page of docs/sandboxes, so that what is tested is what is read; and clients in a namespace."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from tests.harness import PATIENCE, ROOT, wait_for
from tests.namespaces import Namespace

RULES = """
version: 1
rules:
  - {name: read, match: {host: api.test, method: GET}, action: allow}
  - {name: plain, match: {host: api.test, scheme: http, method: GET}, action: allow}
"""


def blocks(page: str, language: str) -> list[str]:
    """Every block of a language on a page, in order."""
    text = (ROOT / "docs/sandboxes" / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def replaced(text: str, old: str, new: str) -> str:
    """A text with something replaced, which must be there."""
    assert old in text, old
    return text.replace(old, new)


class Dnsmasq:
    """The name server of a recipe, within a namespace and in the foreground."""

    def __init__(self, namespace: Namespace, command: str) -> None:
        assert shutil.which("dnsmasq"), "dnsmasq is missing: run scripts/test as root, which installs it"
        words = [word for word in command.split() if not word.startswith(("--user", "--keep"))]
        self._process = subprocess.Popen([*namespace.enter, *words, "--keep-in-foreground", "--user=nobody"])
        wait_for(lambda: "5354" in namespace.run("ss", "-ulnH").stdout, "dnsmasq")

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(PATIENCE)


def curl(namespace: Namespace, folder: Path, server: str, *words: str, user: str = "0") -> str:
    """What a curl without any setting but the CA (`ca.pem` in `folder`) says, and its status; `server` resolves names
    for it."""
    names = folder / "resolv.conf"
    names.write_text(f"nameserver {server}\noptions timeout:2 attempts:2\n")
    names.chmod(0o644)
    resolver = ("unshare", "--mount", "sh", "-euc", 'mount --bind "$0" /etc/resolv.conf; exec "$@"', str(names))
    person = (
        "setpriv",
        f"--reuid={user}",
        f"--regid={user}",
        "--clear-groups",
        "--bounding-set=-all",
        "--no-new-privs",
    )
    ca = ("--cacert", str(folder / "ca.pem"), "--max-time", "10")
    command = ("env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "curl", "-sS", "-w", " %{http_code}", *ca, *words)
    return namespace.run(*resolver, *person, *command, check=False).stdout.strip()
