"""Starting, stopping, dying and starting again, with what is under way at that moment."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness import Connection, Proxy, Reply, Upstream, wait_for
from tests.storage import server_lives, server_pid

RULES = """
version: 1
rules:
  - name: api
    match: {host: api.test}
    action: allow
"""
type Make = Callable[..., Proxy]


class Stream:
    """An upstream's answer that goes on until it is told to end; `abandoned` is set when its peer hangs up."""

    def __init__(self, upstream: Upstream) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self.go_on = asyncio.Event()
        self.asked = 0
        upstream.raw = self.serve

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.loop = asyncio.get_running_loop()
        await reader.readuntil(b"\r\n\r\n")
        self.asked += 1
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n")
        await writer.drain()
        await self.go_on.wait()
        writer.write(b"4\r\nlast\r\n0\r\n\r\n")
        await writer.drain()

    def end(self) -> None:
        """Send the last chunk."""
        assert self.loop
        self.loop.call_soon_threadsafe(self.go_on.set)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        if self.loop:
            self.end()


def streaming(proxy: Proxy) -> Connection:
    """A client that has read the first chunk of its answer."""
    client = proxy.tunnel("api.test")
    client.send(b"GET /stream HTTP/1.1\r\nhost: api.test\r\n\r\n")
    client.read_until(b"first\r\n")
    return client


def refused(proxy: Proxy) -> bool:
    """Whether nobody listens any more."""
    try:
        proxy.connect().close()
    except ConnectionRefusedError:
        return True
    return False


def dead(pid: int) -> bool:
    """Whether a process is gone, or a zombie that its new parent has not reaped."""
    with contextlib.suppress(FileNotFoundError):
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    return True


def test_it_is_ready_soon_and_says_what_to_type_next(make_proxy: Make) -> None:
    """Under 2 s on an idle machine."""
    proxy = make_proxy(RULES, start=False)
    before = time.monotonic()
    proxy.start()
    assert time.monotonic() - before < 5
    assert proxy.fetch_admin("/readyz")[0] == 200
    proxy.stop()
    host, port = proxy.address
    parts = (f"http://{host}:{port}", f"http://{proxy.admin}/metrics", "certs/ca.pem", "1 from", "agent add coder-1")
    assert [part for part in parts if part not in "".join(proxy.said)] == []


def test_sigterm_lets_a_stream_finish_and_leaves_nothing_behind(
    make_proxy: Make, upstream: Upstream, lane: str
) -> None:
    """No new connection is accepted meanwhile; the store's server ends last."""
    proxy = make_proxy(RULES, lane=lane)
    state = proxy.folder / ".sallyport"
    with Stream(upstream) as stream:
        client, idle = streaming(proxy), proxy.connect()
        store = server_pid(state)
        assert proxy.process
        proxy.process.terminate()
        wait_for(lambda: refused(proxy), "the closed listener")
        assert idle.closed()
        assert proxy.process.poll() is None
        stream.end()
        assert client.read_until(b"0\r\n\r\n") == b"4\r\nlast\r\n0\r\n\r\n"
        assert client.closed()
    proxy.ended()
    assert not server_lives(state)
    assert dead(store)
    line = proxy.audit(path="/stream")[0]
    assert (line["status"], line["response_bytes"]) == (200, 9)
    assert not (state / "running.json").exists()


def test_a_slow_reader_gets_all_of_an_answer_that_has_ended(make_proxy: Make, upstream: Upstream, lane: str) -> None:
    """The exchange is over for the upstream, but its last bytes still wait in the proxy."""
    proxy = make_proxy(RULES, lane=lane)
    size, step = 8 << 20, 32 << 10
    upstream.handler = lambda _: Reply(body=b"x" * size)
    client = proxy.tunnel("api.test")
    client.send(b"GET /large HTTP/1.1\r\nhost: api.test\r\n\r\n")
    assert b" 200 " in client.read_until(b"\r\n\r\n")
    assert proxy.process
    proxy.process.terminate()
    for _ in range(size // step):
        client.read_exactly(step)
        threading.Event().wait(0.003)
    proxy.ended()


@pytest.mark.slow
def test_what_does_not_end_is_cut_after_ten_seconds(make_proxy: Make, upstream: Upstream, lane: str) -> None:
    """And goes on record."""
    proxy = make_proxy(RULES, lane=lane)
    with Stream(upstream):
        client = streaming(proxy)
        assert proxy.process
        before = time.monotonic()
        proxy.process.terminate()
        assert client.closed()
        assert 9 < time.monotonic() - before < 12
        proxy.ended()
    assert proxy.audit(path="/stream")[0]["response_bytes"] == 5


def test_a_second_signal_ends_it_at_once(make_proxy: Make, upstream: Upstream, lane: str) -> None:
    """In order all the same: recorded, and no child left."""
    number = signal.SIGTERM if lane == "fast" else signal.SIGINT
    proxy = make_proxy(RULES, lane=lane)
    with Stream(upstream):
        client = streaming(proxy)
        assert proxy.process
        proxy.process.send_signal(number)
        wait_for(lambda: refused(proxy), "the closed listener")
        before = time.monotonic()
        proxy.process.send_signal(number)
        assert client.closed()
        proxy.ended()
        assert time.monotonic() - before < 4
    assert not server_lives(proxy.folder / ".sallyport")
    assert proxy.audit(path="/stream")[0]["status"] == 200


def test_after_kill_9_the_next_start_takes_over_the_store(make_proxy: Make, upstream: Upstream) -> None:
    """Agents, their tokens, credentials and the audit log are all there; the CA is the same."""
    rules = RULES.replace("allow", "allow\n    inject: [{credential: api, as: bearer}]")
    proxy = make_proxy(rules)
    proxy.agent()
    proxy.credential("api", "real-key-1234567", "--host", "api.test")
    assert proxy.get("https://api.test/one").status == 200
    proxy.audit(path="/one")
    authority = (proxy.folder / "certs" / "ca.pem").read_bytes()
    store = server_pid(proxy.folder / ".sallyport")
    proxy.kill()
    assert not dead(store)
    proxy.start()
    assert server_pid(proxy.folder / ".sallyport") == store
    assert proxy.get("https://api.test/two").status == 200
    assert upstream.seen[-1].header("authorization") == ["Bearer real-key-1234567"]
    assert [line["path"] for line in proxy.audit(2, verdict="allow")] == ["/one", "/two"]
    assert (proxy.folder / "certs" / "ca.pem").read_bytes() == authority
    proxy.stop()
    assert dead(store)


def test_after_both_were_killed_nothing_is_lost(make_proxy: Make) -> None:
    """The store's file was synced before each answer."""
    proxy = make_proxy(RULES)
    proxy.agent()
    store = server_pid(proxy.folder / ".sallyport")
    proxy.kill()
    os.kill(store, signal.SIGKILL)
    proxy.start()
    assert proxy.get("http://api.test/").status == 403
    assert [agent["agent"] for agent in json.loads(proxy.cli("agent", "list", "--json").stdout)] == ["coder-1"]


def test_an_interrupted_start_leaves_nothing_behind(make_proxy: Make) -> None:
    """The store's server runs already when SIGTERM comes."""
    proxy = make_proxy(RULES, start=False)
    state = proxy.folder / ".sallyport"
    proxy.start(wait=False)
    wait_for(lambda: (state / "store" / "server.pid").exists() and server_lives(state), "the store's server")
    proxy.stop()
    assert not server_lives(state)


@pytest.mark.parametrize("setting", ["listen", "admin"])
def test_a_port_in_use_is_one_line(make_proxy: Make, setting: str) -> None:
    """With what to do; the store that was started for it ends too."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        proxy = make_proxy(RULES, start=False, **{setting: [address] if setting == "listen" else address})
        result = proxy.cli("run", check=False)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert f"{setting} {address}" in result.stderr
    assert "in use" in result.stderr
    assert not server_lives(proxy.folder / ".sallyport")


def test_two_proxies_do_not_share_a_state_directory(make_proxy: Make) -> None:
    """One process writes one audit log; the first goes on untouched."""
    first = make_proxy(RULES)
    second = make_proxy(RULES, start=False, state=str(first.folder / ".sallyport"))
    result = second.cli("run", check=False)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "set `state` to" in result.stderr
    assert str(first.process and first.process.pid) in result.stderr
    assert first.fetch_admin("/readyz")[0] == 200
    assert (first.folder / ".sallyport" / "running.json").exists()


def test_commands_work_while_it_runs_and_while_it_does_not(make_proxy: Make) -> None:
    """A command that finds no server starts one and stops it again."""
    proxy = make_proxy(RULES, start=False)
    state = proxy.folder / ".sallyport"
    token = json.loads(proxy.cli("agent", "add", "coder-1", "--json").stdout)["token"]
    proxy.cli("vault", "put", "api", "--host", "api.test", stdin="one")
    assert not server_lives(state)
    proxy.start()
    store = server_pid(state)
    proxy.tokens["coder-1"] = token
    assert proxy.get("http://api.test/").code == "no_rule"
    proxy.cli("agent", "add", "coder-2")
    assert server_pid(state) == store
    assert not dead(store)
    proxy.stop()
    agents = json.loads(proxy.cli("agent", "list", "--json").stdout)
    assert [agent["agent"] for agent in agents] == ["coder-1", "coder-2"]
    assert json.loads(proxy.cli("vault", "show", "api", "--json").stdout)["version"] == 1
    assert not server_lives(state)
