"""Unix sockets: one for all users of a host, told apart by the kernel, and one for each agent."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import Connection, Proxy, Response, Upstream, connect_to, refused, wait_for

RULES = """
version: 1
rules:
  - {name: tls, match: {host: api.test, websocket: true}, action: allow}
  - {name: plain, match: {host: api.test, scheme: http}, action: allow}
"""
NOBODY_HERE = 54321  # a user's number that nobody has

type Make = Callable[..., Proxy]


@pytest.fixture(scope="module")
def sockets(lane: str) -> Iterator[Path]:
    """Short: a socket's path has 107 bytes."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def proxy(lane: str, make_proxy: Make, sockets: Path) -> Proxy:
    """One TCP listener, one socket for all, one for each agent. This user is coder-1."""
    proxy = make_proxy(
        RULES,
        lane=lane,
        listen=[
            "127.0.0.1:0",
            {"address": f"unix:{sockets}/all.sock", "mode": "0666"},
            f"unix:{sockets}/of/{{agent}}.sock",
        ],
        identity={"uids": {str(os.getuid()): "coder-1"}},
        start=False,
    )
    (sockets / "of").mkdir()
    proxy.start()
    for name in ("coder-1", "coder-2"):
        proxy.agent(name)
    return proxy


def ask(connection: Connection, path: str, headers: str = "") -> Response:
    connection.send(f"GET http://api.test{path} HTTP/1.1\r\nHost: api.test\r\n{headers}\r\n".encode())
    return connection.response()


def to(proxy: Proxy, path: Path) -> Connection:
    """A connection to a socket that is not among the proxy's first listeners."""
    proxy.clients.append(connection := Connection(connect_to(str(path), 0)))
    return connection


def tunnel(proxy: Proxy, connection: Connection, headers: str = "") -> Connection:
    connection.send(f"CONNECT api.test:443 HTTP/1.1\r\nHost: api.test:443\r\n{headers}\r\n".encode())
    assert connection.response("CONNECT").status == 200
    connection.start_tls(proxy.trust, "api.test")
    return connection


def test_a_user_of_the_host_is_an_agent(proxy: Proxy, plain_upstream: Upstream, sockets: Path) -> None:
    """The kernel says who connected; the audit line says so too."""
    assert ask(proxy.connect(1), "/by-uid").status == 200
    (line,) = proxy.audit(path="/by-uid")
    assert (line["agent"], line["identity"]) == ("coder-1", ["unix"])
    assert line["client"] == f"uid={os.getuid()}:{os.getpid()}"
    assert line["listener"] == f"unix:{sockets}/all.sock"
    assert 'sallyport_identity_proofs_total{proof="unix"}' in proxy.fetch_admin("/metrics")[1]


def test_tunnels_and_their_requests_belong_to_it(proxy: Proxy, upstream: Upstream) -> None:
    connection = tunnel(proxy, proxy.connect(1))
    for number in range(3):
        connection.send(f"GET /tunnel/{number} HTTP/1.1\r\nHost: api.test\r\n\r\n".encode())
        assert connection.response().status == 200
    assert [proxy.audit(path=f"/tunnel/{number}")[0]["agent"] for number in range(3)] == ["coder-1"] * 3
    assert len(upstream.seen) == 3


def test_a_token_of_another_agent_conflicts(proxy: Proxy, plain_upstream: Upstream) -> None:
    refused(ask(proxy.connect(1), "/x", proxy.auth("coder-2")), "identity_conflict")
    assert ask(proxy.connect(1), "/both", proxy.auth("coder-1")).status == 200
    assert proxy.audit(path="/both")[0]["identity"] == ["token", "unix"]
    assert len(plain_upstream.seen) == 1


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_another_user_is_nobody(proxy: Proxy, sockets: Path, plain_upstream: Upstream) -> None:
    """Whatever it says; it may use a token of its own."""
    sockets.chmod(0o755)
    token = proxy.tokens["coder-2"]
    code = f"""
import os, socket, sys
os.setuid({NOBODY_HERE})
for proof in ("", "Proxy-Authorization: Bearer {token}\\r\\n"):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect({str(sockets / "all.sock")!r})
    head = f"GET http://api.test/u HTTP/1.1\\r\\nHost: api.test\\r\\n{{proof}}Connection: close\\r\\n\\r\\n"
    sock.sendall(head.encode())
    print(sock.makefile().readline().split()[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.split() == ["407", "200"]
    assert len(plain_upstream.seen) == 1


def test_each_agent_has_a_socket_of_its_own(proxy: Proxy, sockets: Path, plain_upstream: Upstream) -> None:
    """From the moment it is registered until it is removed; for this proxy's user alone."""
    proxy.cli("agent", "add", "coder-9")
    path = sockets / "of" / "coder-9.sock"
    wait_for(path.exists)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ask(to(proxy, sockets / "of" / "coder-1.sock"), "/own").status == 200
    assert proxy.audit(path="/own")[0]["identity"] == ["unix", "listener"]
    refused(ask(to(proxy, path), "/x"), "identity_conflict")  # of this user, who is coder-1
    proxy.cli("agent", "remove", "coder-9")
    wait_for(lambda: not path.exists())
    assert len(plain_upstream.seen) == 1


def test_a_websocket_goes_through_a_unix_socket(proxy: Proxy, upstream: Upstream) -> None:
    """Which the fast lane hands over."""
    connection = tunnel(proxy, proxy.connect(1))
    upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAA"
    connection.send(f"GET /ws HTTP/1.1\r\nHost: api.test\r\n{upgrade}\r\n\r\n".encode())
    assert connection.response().status == 200  # the echo upstream does not upgrade
    assert proxy.audit(path="/ws")[0]["agent"] == "coder-1"


def test_what_the_fast_lane_does_not_take_is_told_who_it_is(proxy: Proxy, plain_upstream: Upstream) -> None:
    connection = proxy.connect(1)
    connection.send(b"GET http://api.test/old HTTP/1.0\r\nHost: api.test\r\n\r\n")
    assert connection.response().status == 200
    assert proxy.audit(path="/old")[0]["identity"] == ["unix"]


def test_a_stale_socket_is_replaced_and_a_served_one_is_not(make_proxy: Make, lane: str, sockets: Path) -> None:
    """And at the end the name is gone."""
    path = sockets / "again.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    one = make_proxy(RULES, lane=lane, listen=["127.0.0.1:0", f"unix:{path}"])
    two = make_proxy(RULES, lane=lane, listen=["127.0.0.1:0", f"unix:{path}"], start=False)
    two.start(wait=False)
    assert two.process
    assert two.process.wait(15) == 1
    assert "another process serves it" in two.stderr_text()
    two._forget()
    one.stop()
    assert not path.exists()


def test_no_file_is_removed_for_a_socket(make_proxy: Make, lane: str, sockets: Path) -> None:
    path = sockets / "notes.txt"
    path.write_text("mine")
    proxy = make_proxy(RULES, lane=lane, listen=[f"unix:{path}"], start=False)
    proxy.start(wait=False)
    assert proxy.process
    assert proxy.process.wait(15) == 1
    assert "it is no socket" in proxy.stderr_text()
    proxy._forget()
    assert path.read_text() == "mine"


def test_several_workers_share_them(make_proxy: Make, lane: str, sockets: Path, plain_upstream: Upstream) -> None:
    """And when workers are replaced, each agent's socket goes to the new ones without a gap."""
    (sockets / "w").mkdir()
    proxy = make_proxy(
        RULES,
        lane=lane,
        workers=2,
        listen=["127.0.0.1:0", f"unix:{sockets}/w/all.sock", f"unix:{sockets}/w/{{agent}}.sock"],
    )
    proxy.agent("coder-1")
    own = sockets / "w" / "coder-1.sock"
    wait_for(own.exists)
    before = own.stat().st_ino
    assert ask(to(proxy, own), "/w").status == 200
    wait_for(lambda: ask(proxy.connect(1), "/w", proxy.auth("coder-1")).status == 200)  # the other worker follows too
    proxy.cli("reload")
    wait_for(lambda: own.exists() and own.stat().st_ino != before)
    for _ in range(4):
        assert ask(to(proxy, own), "/w").status == 200
        assert ask(proxy.connect(1), "/w", proxy.auth("coder-1")).status == 200
    proxy.stop()
    assert list((sockets / "w").iterdir()) == []
