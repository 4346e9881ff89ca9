"""The kill switch: whatever an agent has open ends within a second, and nothing begins, with or without the store."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.h2client import Http2
from tests.harness import Connection, Proxy, Upstream, refused, wait_for
from tests.storage import RemoteStore
from tests.wire.test_websocket import HANDSHAKE

type Make = Callable[..., Proxy]
type Open = Callable[[Proxy, str], Connection]

SECOND = 1.0
RULES = """
version: 1
rules:
  - {name: all, match: {host: api.test, websocket: true}, action: allow}
  - {name: plain, match: {host: api.test, scheme: http}, action: allow}
  - name: keyed
    match: {host: other.test}
    action: allow
    inject: [{credential: api, as: bearer}]
"""
SECRET = "real-key-4f1e9b7c2d"
_names = (f"victim-{number}" for number in itertools.count())


class Endless:
    """An upstream that does what the path says for ever; `open` counts who is still there."""

    def __init__(self, *upstreams: Upstream) -> None:
        self.open = 0
        for upstream in upstreams:
            upstream.raw = self.serve

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            self.open += 1
            try:
                if not await self._act(head.split(b" ", 2)[1].rpartition(b"/")[2], reader, writer):
                    return
            finally:
                self.open -= 1

    async def _act(self, what: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if what == b"short":
            writer.write(b"HTTP/1.1 200 X\r\ncontent-length: 0\r\n\r\n")
            await writer.drain()
            return True
        if what == b"websocket":
            writer.write(b"HTTP/1.1 101 X\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n")
        elif what in (b"events", b"download"):
            writer.write(b"HTTP/1.1 200 X\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        piece = b"x" * 60_000 if what == b"download" else b"data: more\n\n"
        gone = asyncio.ensure_future(reader.read() if what != b"upload" else self._drain(reader))
        try:
            while what in (b"events", b"download") and not gone.done():
                writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                await asyncio.wait_for(writer.drain(), 5)
                await asyncio.sleep(0.01)
            await gone
        finally:
            gone.cancel()
        return False

    async def _drain(self, reader: asyncio.StreamReader) -> None:
        while await reader.read(65536):
            pass


def ask(connection: Connection, what: str, more: str = "", method: str = "GET") -> Connection:
    connection.send(f"{method} /{what} HTTP/1.1\r\nhost: api.test\r\n{more}\r\n".encode())
    return connection


def tunnel(proxy: Proxy, agent: str) -> Connection:
    connection = ask(proxy.tunnel("api.test", agent=agent), "short")
    assert connection.response().status == 200
    return connection


def silent(proxy: Proxy, agent: str) -> Connection:
    return ask(proxy.tunnel("api.test", agent=agent), "silent")


def events(proxy: Proxy, agent: str) -> Connection:
    connection = ask(proxy.tunnel("api.test", agent=agent), "events")
    connection.read_until(b"data: more")
    return connection


def download(proxy: Proxy, agent: str) -> Connection:
    connection = ask(proxy.tunnel("api.test", agent=agent), "download")
    connection.read_until(b"xxxx")
    return connection


def slowly_read(proxy: Proxy, agent: str) -> Connection:
    """Nobody reads: every buffer on the way is full."""
    return ask(proxy.tunnel("api.test", agent=agent), "download")


def upload(proxy: Proxy, agent: str) -> Connection:
    connection = ask(proxy.tunnel("api.test", agent=agent), "upload", "content-length: 100000000\r\n", "POST")
    connection.send(b"x" * 200_000)
    return connection


def websocket(proxy: Proxy, agent: str) -> Connection:
    connection = proxy.tunnel("api.test", agent=agent)
    connection.send(HANDSHAKE.format("/websocket").encode())
    assert connection.response().status == 101
    return connection


def plain(proxy: Proxy, agent: str) -> Connection:
    proxy.agent(agent)
    connection = proxy.connect()
    connection.send(f"GET http://api.test/events HTTP/1.1\r\nhost: api.test\r\n{proxy.auth(agent)}\r\n".encode())
    connection.read_until(b"data: more")
    return connection


def http2(proxy: Proxy, agent: str) -> Connection:
    connection = proxy.tunnel("api.test", agent=agent, alpn="h2")
    client = Http2(connection)
    stream = client.request("/events")
    while not client.bodies[stream]:
        client.pump()
    return connection


OPENERS: tuple[Open, ...] = (tunnel, silent, events, download, slowly_read, upload, websocket, plain, http2)
WORKING = len(OPENERS) - 1  # an idle tunnel has nothing upstream


class Watch:
    """Reads a connection to its end on a thread, and knows when that was."""

    def __init__(self, connection: Connection) -> None:
        self.ended = 0.0
        self._connection = connection
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while self._connection.recv():
                pass
        self.ended = time.monotonic()


def ended(watched: list[Watch], since: float) -> float:
    """Seconds until the last of them ended."""
    wait_for(lambda: all(watch.ended for watch in watched), "the end of every connection")
    return max(watch.ended for watch in watched) - since


def status(proxy: Proxy, agent: str = "coder-1") -> int:
    """Of a new request; 0 where it was cut."""
    try:
        return proxy.get("https://api.test/short", agent=agent).status
    except OSError:
        return 0


def refused_within(proxy: Proxy, agent: str, since: float) -> float:
    """Seconds until a new request is refused as that of a killed agent."""
    wait_for(lambda: status(proxy, agent) == 403, "a refusal")
    seconds = time.monotonic() - since
    refused(proxy.get("https://api.test/short", agent=agent), "agent_killed")
    return seconds


@pytest.fixture(scope="module")
def proxy(make_proxy: Make, lane: str) -> Proxy:
    return make_proxy(RULES, lane=lane)


@pytest.fixture
def endless(upstream: Upstream, plain_upstream: Upstream) -> Endless:
    return Endless(upstream, plain_upstream)


@pytest.fixture
def victim(proxy: Proxy) -> str:
    proxy.agent(name := next(_names))
    return name


@pytest.fixture
def stopped(proxy: Proxy, victim: str) -> Iterator[Callable[[str], float]]:
    """Stops the victim by a line in the file KILL; the time of it."""
    file = proxy.folder / ".sallyport" / "KILL"

    def stop(content: str) -> float:
        draft = file.with_name("draft")
        draft.write_text(content)
        draft.rename(file)
        return time.monotonic()

    yield stop
    file.unlink(missing_ok=True)
    wait_for(lambda: status(proxy, victim) not in (0, 403))


@pytest.mark.parametrize("opener", OPENERS, ids=lambda opener: opener.__name__)
def test_a_kill_cuts_what_is_open(
    proxy: Proxy, endless: Endless, victim: str, stopped: Callable[[str], float], opener: Open
) -> None:
    """Within a second, at the upstream too, and on record as what it was; a bystander does not notice."""
    bystander = events(proxy, "bystander")
    connection = opener(proxy, victim)
    wait_for(lambda: endless.open == 1 + (opener is not tunnel))
    since = stopped(f"{victim} runs wild\n")
    watched = [] if opener is slowly_read else [Watch(connection)]
    if watched:
        assert ended(watched, since) < SECOND
    wait_for(lambda: endless.open == 1)
    assert time.monotonic() - since < SECOND
    bystander.read_until(b"data: more")
    if opener is not tunnel:
        (line,) = proxy.audit(agent=victim, reason="agent_killed")
        assert line["verdict"] == "block"
        assert line["path"].endswith(opener.__name__) or opener in (slowly_read, plain, http2)
    bystander.close()


def test_the_command_stops_everything_of_one_agent(proxy: Proxy, endless: Endless, victim: str) -> None:
    """`agent kill` returns, and within a second nothing of the agent is left; `revive` lets it begin anew."""
    bystander = events(proxy, "bystander")
    watched = [Watch(opener(proxy, victim)) for opener in OPENERS if opener is not slowly_read]
    wait_for(lambda: endless.open == WORKING)
    proxy.cli("agent", "kill", victim, "--reason", "runs wild")
    since = time.monotonic()
    assert ended(watched, since) < SECOND
    wait_for(lambda: endless.open == 1)
    assert time.monotonic() - since < SECOND
    bystander.read_until(b"data: more")
    assert len(proxy.audit(WORKING - 1, agent=victim, reason="agent_killed")) == WORKING - 1
    refused(proxy.get("https://api.test/short", agent=victim), "agent_killed")
    said = proxy.cli("agent", "revive", victim).stderr
    assert "connections that were cut stay so" in said
    wait_for(lambda: status(proxy, victim) == 200)
    bystander.close()


def test_nothing_of_a_killed_agent_reaches_an_upstream(
    proxy: Proxy, upstream: Upstream, victim: str, stopped: Callable[[str], float]
) -> None:
    stopped(victim)
    wait_for(lambda: status(proxy, victim) == 403)
    seen = upstream.connections
    upstream.seen.clear()
    refused(proxy.get("https://api.test/x", agent=victim), "agent_killed")
    refused(proxy.get("http://api.test/x", agent=victim), "agent_killed")
    refused(proxy.get("https://api.test/x", agent=victim, method="POST", body=b"x" * 100_000), "agent_killed")
    assert (upstream.seen, upstream.connections) == ([], seen)


def test_one_agents_kill_leaves_others_on_a_shared_connection(
    proxy: Proxy, endless: Endless, victim: str, stopped: Callable[[str], float]
) -> None:
    """A runtime sends many agents' requests by one connection (workerd)."""
    proxy.agent("bystander")
    shared = proxy.connect()
    for agent in (victim, "bystander"):
        shared.send(f"GET http://api.test/short HTTP/1.1\r\nhost: api.test\r\n{proxy.auth(agent)}\r\n".encode())
        assert shared.response().status == 200
    shared.send(f"GET http://api.test/events HTTP/1.1\r\nhost: api.test\r\n{proxy.auth('bystander')}\r\n".encode())
    shared.read_until(b"data: more")
    since = stopped(victim)
    refused_within(proxy, victim, since)
    shared.read_until(b"data: more")
    shared.close()


@pytest.mark.parametrize("content", ["", "\n", "*\n", "* by hand\n", "not/an agent\n", "\x00\xff"])
def test_the_file_stops_the_world(
    proxy: Proxy, endless: Endless, victim: str, stopped: Callable[[str], float], content: str
) -> None:
    """Empty, or with a star; and what it holds besides that names no agent stops everybody too."""
    watched = [Watch(opener(proxy, victim)) for opener in (tunnel, events, websocket)]
    since = stopped(content)
    assert ended(watched, since) < SECOND
    assert refused_within(proxy, victim, since) < SECOND


def test_a_file_that_cannot_be_read_stops_the_world(proxy: Proxy, endless: Endless, victim: str) -> None:
    folder = proxy.folder / ".sallyport" / "KILL"
    folder.mkdir()
    assert refused_within(proxy, victim, time.monotonic()) < SECOND
    folder.rmdir()
    wait_for(lambda: status(proxy, victim) == 200)


def test_a_signal_stops_the_world_and_revive_undoes_it(proxy: Proxy, endless: Endless, victim: str) -> None:
    """SIGUSR1, which needs no store, no disk and no name."""
    watched = [Watch(opener(proxy, victim)) for opener in (tunnel, events, websocket)]
    assert proxy.process
    since = time.monotonic()
    proxy.process.send_signal(signal.SIGUSR1)
    assert ended(watched, since) < SECOND
    assert refused_within(proxy, victim, since) < SECOND
    proxy.cli("agent", "revive", "--all")
    wait_for(lambda: status(proxy, victim) == 200)


@pytest.mark.parametrize("by", ["command", "signal"])
def test_a_stop_of_the_world_survives_a_restart(make_proxy: Make, upstream: Upstream, lane: str, by: str) -> None:
    """Also one by kill -9; who was killed alone stays so when the world is revived."""
    proxy = make_proxy(RULES, lane=lane)
    proxy.agent("alone")
    proxy.agent()
    proxy.cli("agent", "kill", "alone")
    if by == "command":
        proxy.cli("agent", "kill", "--all")
    else:
        assert proxy.process
        proxy.process.send_signal(signal.SIGUSR1)
    refused_within(proxy, "coder-1", time.monotonic())
    upstream.seen.clear()
    proxy.kill()
    proxy.start()
    refused(proxy.get("https://api.test/x"), "agent_killed")
    assert upstream.seen == []
    assert "every agent is stopped still" in proxy.cli("agent", "revive", "coder-1").stderr
    proxy.cli("agent", "revive", "--all")
    wait_for(lambda: status(proxy) == 200)
    refused(proxy.get("https://api.test/x", agent="alone"), "agent_killed")


def test_a_kill_works_with_the_store_unreachable(make_proxy: Make, endless: Endless, lane: str, tmp_path: Path) -> None:
    """By command, which then writes the file and says that other hosts were not told; and it holds when the store is
    back, where a revived agent may act again."""
    with RemoteStore(tmp_path) as store:
        proxy = make_proxy(RULES, start=False, store=store.url, lane=lane)
        store.start()
        proxy.start()
        proxy.agent("bystander")
        proxy.agent("victim")
        watched = [Watch(opener(proxy, "victim")) for opener in (tunnel, events, websocket)]
        bystander = events(proxy, "bystander")
        store.kill()
        result = proxy.cli("agent", "kill", "victim", check=False)
        since = time.monotonic()
        assert result.returncode == 1
        assert "other hosts were not told" in result.stderr
        assert ended(watched, since) < SECOND
        bystander.read_until(b"data: more")
        refused_within(proxy, "victim", since)
        store.start()
        wait_for(lambda: proxy.metric("sallyport_store_up") == 1)
        refused(proxy.get("https://api.test/short", agent="victim"), "agent_killed")
        proxy.cli("agent", "revive", "victim")
        wait_for(lambda: status(proxy, "victim") == 200)


def test_a_removed_agent_and_one_with_a_new_token_are_cut_too(proxy: Proxy, endless: Endless, victim: str) -> None:
    """A tunnel that a lost token opened must not outlive it."""
    watched = [Watch(opener(proxy, victim)) for opener in (tunnel, events)]
    proxy.tokens[victim] = proxy.cli("agent", "token", victim).stdout.split()[-1]
    assert ended(watched, time.monotonic()) < SECOND
    watched = [Watch(opener(proxy, victim)) for opener in (tunnel, events, websocket)]
    proxy.cli("agent", "remove", victim)
    assert ended(watched, time.monotonic()) < SECOND
    assert {line["path"] for line in proxy.audit(3, agent=victim, reason="bad_identity")} == {"/events", "/websocket"}


def test_a_kill_drops_leases(make_proxy: Make, upstream: Upstream, lane: str, tmp_path: Path) -> None:
    """What only a killed agent might use is not kept open, so after a revival it has to be asked for again."""
    with RemoteStore(tmp_path) as store:
        proxy = make_proxy(RULES, start=False, store=store.url, lane=lane)
        store.start()
        proxy.start()
        proxy.agent()
        proxy.credential("api", SECRET, "--host", "other.test", "--agent", "coder-1")
        known = lambda: proxy.get(f"https://api.test/{SECRET}").status == 403  # noqa: E731
        wait_for(known, "the news of it, which would end the lease")
        assert proxy.get("https://other.test/x").status == 200
        store.kill()
        assert proxy.get("https://other.test/x").status == 200  # by its lease
        file = proxy.folder / ".sallyport" / "KILL"
        file.write_text("coder-1")
        refused_within(proxy, "coder-1", time.monotonic())
        file.unlink()
        wait_for(lambda: status(proxy) == 200)
        refused(proxy.get("https://other.test/x"), "credential_unavailable")
