"""Two hosts on one cable: network namespaces joined by a veth pair. Needs root, iproute2 and nftables."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from typing import Any, Self

from tests.harness import PATIENCE, Upstream, wait_for

ROUTER4, ROUTER6 = "10.77.0.1", "fd77::1"
SANDBOX4, SANDBOX6 = "10.77.0.2", "fd77::2"
STRANGER4 = "10.77.0.3"  # the sandbox has this address too, and nobody is known by it


class Namespace:
    """One network namespace, alive as long as its first process."""

    def __init__(self) -> None:
        for tool, package in (("unshare", "util-linux"), ("nsenter", "util-linux"), ("ip", "iproute2")):
            assert shutil.which(tool), f"{tool} is needed: apt-get install {package}"
        assert os.getuid() == 0, "network namespaces are made by root here: run the tests as root"
        self._holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        self.path = f"/proc/{self._holder.pid}/ns/net"
        wait_for(lambda: os.stat(self.path).st_ino != os.stat("/proc/self/ns/net").st_ino, "the namespace")
        self.run("ip", "link", "set", "lo", "up")

    @property
    def pid(self) -> int:
        """Of the process that holds it."""
        return self._holder.pid

    @property
    def enter(self) -> tuple[str, ...]:
        """What stands before a command that runs inside."""
        return "nsenter", f"--net={self.path}"

    def run(self, *command: str, stdin: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command inside."""
        done = subprocess.run(
            [*self.enter, *command], input=stdin, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done

    def inside[T](self, work: Callable[[], T]) -> T:
        """`work` on a thread that is inside; a socket made there stays so."""
        found: list[T] = []
        failed: list[BaseException] = []

        def main() -> None:
            try:
                enter(self)
                found.append(work())
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=main)
        thread.start()
        thread.join(PATIENCE)
        if failed:
            raise failed[0]
        return found[0]

    def connect(self, host: str, port: int, source: str | None = None) -> socket.socket:
        """A TCP connection from inside."""
        own = (source, 0) if source else None
        return self.inside(lambda: socket.create_connection((host, port), PATIENCE, own))

    def close(self) -> None:
        """End it and all in it."""
        self._holder.kill()
        self._holder.wait()


def enter(namespace: Namespace) -> None:
    """Move this thread into a namespace."""
    descriptor = os.open(namespace.path, os.O_RDONLY)
    try:
        os.setns(descriptor, os.CLONE_NEWNET)
    finally:
        os.close(descriptor)


class Pair:
    """A sandbox whose default route is a router, where the proxy runs."""

    def __init__(self) -> None:
        self.router, self.sandbox = Namespace(), Namespace()

    def __enter__(self) -> Self:
        router, sandbox = self.router, self.sandbox
        router.run("ip", "link", "add", "p0", "type", "veth", "peer", "name", "s0", "netns", str(sandbox.pid))
        for namespace, device, addresses in (
            (router, "p0", (f"{ROUTER4}/24", f"{ROUTER6}/64")),
            (sandbox, "s0", (f"{SANDBOX4}/24", f"{STRANGER4}/24", f"{SANDBOX6}/64")),
        ):
            for address in addresses:
                extra = ("nodad",) if ":" in address else ()
                namespace.run("ip", "addr", "add", address, "dev", device, *extra)
            namespace.run("ip", "link", "set", device, "up")
        sandbox.run("ip", "route", "add", "default", "via", ROUTER4)
        sandbox.run("ip", "-6", "route", "add", "default", "via", ROUTER6)
        return self

    def __exit__(self, *_: object) -> None:
        self.sandbox.close()
        self.router.close()

    def redirect(self, port4: int, port6: int) -> None:
        """The rules of docs/identity.md: what the sandbox sends to a web port goes to the proxy, the rest nowhere."""
        assert shutil.which("nft"), "nft is needed: apt-get install nftables"
        rules = f"""
        table inet sallyport {{
          chain web {{
            type nat hook prerouting priority dstnat;
            iifname "p0" ip daddr != {ROUTER4} tcp dport {{ 80, 443, 8443 }} redirect to :{port4}
            iifname "p0" ip6 daddr != {ROUTER6} tcp dport {{ 80, 443, 8443 }} redirect to :{port6}
          }}
          chain others {{ type filter hook forward priority filter; policy drop; }}
        }}
        """
        self.router.run("nft", "-f", "-", stdin=rules)


class InsideUpstream(Upstream):
    """An upstream within a namespace."""

    def __init__(self, namespace: Namespace, context: Any) -> None:
        super().__init__(context)
        self._namespace = namespace

    def _run(self) -> None:
        enter(self._namespace)
        super()._run()
