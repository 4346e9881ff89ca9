"""What passes through is never held: memory stays where it was, whatever the size, the number or the pace."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from tests.harness import Connection, Proxy, server_context, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

type Make = Callable[..., Proxy]

MIB = 1 << 20
GIB = 1 << 30
ROOM = 40 * MIB
BLOCK = bytes(range(256)) * 4096  # 1 MiB
RULES = """
version: 1
rules:
  - name: injected
    match: {host: fast.test, path: /injected/**}
    action: allow
    inject: [{credential: api, as: bearer}]
  - name: plain
    match: {host: [fast.test, mute.test]}
    action: allow
"""


class Blaster:
    """A TLS upstream on threads that takes and sends as fast as it can: GET /.../SIZE is answered with so many bytes.

    `pause` holds every connection back while it is cleared, `received` counts the bytes of request bodies.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        self.context = context
        self.go_on = threading.Event()
        self.go_on.set()
        self.received = 0
        self.sent = 0
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError, ConnectionError), self.context.wrap_socket(plain, server_side=True) as sock:
            while True:
                self._exchange(Connection(sock))

    def _exchange(self, client: Connection) -> None:
        head = client.read_until(b"\r\n\r\n")
        if length := re.search(rb"content-length: (\d+)", head.lower()):
            left = int(length[1]) - len(client.buffer)
            self.received += len(client.buffer)
            client.buffer = b""
            view = memoryview(bytearray(MIB))
            while left:
                self.go_on.wait()
                size = client.sock.recv_into(view[: min(left, MIB)])
                if not size:
                    raise ConnectionError
                left -= size
                self.received += size
        size = int(head.split(b" ")[1].rpartition(b"/")[2] or b"0")
        client.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        while size:
            self.go_on.wait()
            block = BLOCK[: min(size, MIB)]
            client.send(block)
            size -= len(block)
            self.sent += len(block)


@pytest.fixture(scope="module")
def blaster(upstream_ca: trustme.CA) -> Iterator[Blaster]:
    blaster = Blaster(server_context(upstream_ca, "fast.test"))
    yield blaster
    blaster.listener.close()


@pytest.fixture(scope="module")
def mute() -> Iterator[int]:
    """The port of an upstream that connects and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture(scope="module")
def proxy(make_proxy: Make, blaster: Blaster, mute: int, lane: str) -> Proxy:
    places = {"fast.test:443": f"127.0.0.1:{blaster.port}", "mute.test:443": f"127.0.0.1:{mute}"}
    proxy = make_proxy(RULES, places, lane=lane)
    proxy.agent()
    proxy.credential("api", "real-key-4f1e9b7c2d", "--host", "fast.test")
    return proxy


@pytest.fixture(scope="module")
def idle(proxy: Proxy) -> int:
    """Bytes it has before the first request."""
    return memory(proxy)


def memory(proxy: Proxy, what: str = "VmRSS") -> int:
    """Bytes of the proxy's own process, without the store's."""
    assert proxy.process
    text = Path(f"/proc/{proxy.process.pid}/status").read_text()
    found = re.search(rf"^{what}:\s+(\d+) kB$", text, re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def ask(proxy: Proxy, target: str, method: str = "GET", length: int = 0, host: str = "fast.test") -> Connection:
    client = proxy.tunnel(host)
    extra = f"content-length: {length}\r\n" if length else ""
    client.send(f"{method} {target} HTTP/1.1\r\nhost: {host}\r\n{extra}\r\n".encode())
    return client


def skip_body(client: Connection) -> int:
    """Reads an answer's body to its end, as fast as it comes, without keeping it; its size."""
    head = client.read_until(b"\r\n\r\n").lower()
    assert b" 200 " in head
    view = memoryview(bytearray(MIB))
    if length := re.search(rb"content-length: (\d+)", head):
        size, left = int(length[1]), int(length[1]) - len(client.buffer)
        while left:
            left -= client.sock.recv_into(view[: min(left, MIB)])
        return size
    tail, size = client.buffer[-5:], len(client.buffer)
    while not tail.endswith(b"0\r\n\r\n"):
        got = client.sock.recv_into(view)
        assert got
        tail = (tail + bytes(view[:got][-5:]))[-5:]
        size += got
    return size


def check(proxy: Proxy, idle: int) -> None:
    """Neither now nor ever since it started did it hold much more than when it was idle."""
    assert memory(proxy) - idle < ROOM
    assert memory(proxy, "VmHWM") - idle < ROOM


@pytest.mark.parametrize("target", [f"/{GIB}", f"/injected/{GIB}"], ids=["plain", "redacted"])
def test_a_download_of_a_gigabyte_leaves_memory_as_it_was(proxy: Proxy, idle: int, target: str) -> None:
    with contextlib.closing(ask(proxy, target)) as client:
        assert skip_body(client) >= GIB
    check(proxy, idle)


def test_an_upload_of_a_gigabyte_leaves_memory_as_it_was(proxy: Proxy, idle: int, blaster: Blaster) -> None:
    before = blaster.received
    with contextlib.closing(ask(proxy, "/0", "POST", GIB)) as client:
        for _ in range(GIB // MIB):
            client.send(BLOCK)
        assert client.response().status == 200
    assert blaster.received - before == GIB
    check(proxy, idle)


@pytest.mark.parametrize("target", [f"/{GIB}", f"/injected/{GIB}"], ids=["plain", "redacted"])
def test_a_slow_reader_slows_a_fast_upstream_down(proxy: Proxy, idle: int, blaster: Blaster, target: str) -> None:
    """What the client does not take stays with the upstream."""
    before = blaster.sent
    with contextlib.closing(ask(proxy, target)) as client:
        assert b" 200 " in client.read_until(b"\r\n\r\n")
        assert standstill(lambda: blaster.sent) - before < ROOM
        check(proxy, idle)


def standstill(count: Callable[[], int]) -> int:
    """The count, when it has not changed for half a second."""
    last, since = count(), time.monotonic()

    def still() -> bool:
        nonlocal last, since
        if (now := count()) != last:
            last, since = now, time.monotonic()
        return time.monotonic() - since > 0.5

    wait_for(still)
    return last


@pytest.mark.parametrize("host", ["fast.test", "mute.test"])
def test_a_slow_upstream_slows_a_fast_uploader_down(proxy: Proxy, idle: int, blaster: Blaster, host: str) -> None:
    """Also one whose TLS handshake hangs, so that nothing can be passed on at all."""
    blaster.go_on.clear()
    try:
        with contextlib.closing(ask(proxy, "/0", "POST", GIB, host)) as client:
            client.sock.settimeout(1.0)
            sent = 0

            def upload() -> None:
                nonlocal sent
                while sent < GIB:
                    sent += client.sock.send(BLOCK)

            with pytest.raises(TimeoutError):
                upload()
            assert sent < ROOM
            check(proxy, idle)
    finally:
        blaster.go_on.set()


def test_ten_thousand_requests_leave_no_growth(proxy: Proxy) -> None:
    """Injected and scanned, refused, and over new connections too; measured after two thousand of them."""

    def requests(count: int) -> None:
        for _ in range(count // 100):
            client = proxy.tunnel("fast.test")
            for number in range(99):
                target = (b"/injected/1000", b"/1000", b"/none/0")[number % 3]
                client.send(b"GET %s HTTP/1.1\r\nhost: fast.test\r\n\r\n" % target)
                assert client.response().status == 200
            client.send(b"GET / HTTP/1.1\r\nhost: other.test\r\n\r\n")
            assert client.response().status == 421
            client.close()

    requests(2000)
    before = memory(proxy)
    requests(8000)
    assert memory(proxy) - before < 8 * MIB, "a leak of a KiB each would show"
