"""Several workers as one proxy: one endpoint, one audit file, one CA, and a worker that can be lost or replaced."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.harness import PATIENCE, Connection, Proxy, Upstream, wait_for
from tests.storage import server_lives
from tests.wire.test_lifecycle import RULES, Stream, dead, refused, streaming

INJECTING = RULES.replace("allow", "allow\n    inject: [{credential: api, as: bearer}]")
type Make = Callable[..., Proxy]


@pytest.fixture
def pair(make_proxy: Make, upstream: Upstream, lane: str) -> Proxy:
    """A proxy of two workers with an agent."""
    proxy = make_proxy(RULES, lane=lane, workers=2)
    join(proxy)
    return proxy


def join(proxy: Proxy) -> None:
    """Register an agent, and wait until every worker knows it."""
    proxy.agent()
    wait_for(lambda: all(worker["agents"].get("active") == 1 for worker in workers(proxy).values()))


def workers(proxy: Proxy) -> dict[int, dict[str, Any]]:
    """Those that stay, by number, as /api/status has them."""
    there = json.loads(proxy.fetch_admin("/api/status")[1])["workers"]
    return {worker["worker"]: worker for worker in there if not worker["leaving"]}


def processes(proxy: Proxy) -> dict[int, int]:
    return {number: worker["process"] for number, worker in workers(proxy).items()}


def asks(client: Connection, path: str) -> int:
    """One request on a tunnel; the answer's status."""
    client.send(f"GET {path} HTTP/1.1\r\nhost: api.test\r\n\r\n".encode())
    return client.response().status


def on_every_worker(proxy: Proxy) -> list[Connection]:
    """Open tunnels until each worker has some."""
    tunnels = []

    def spread() -> bool:
        tunnels.append(proxy.tunnel("api.test"))
        return all(worker["connections"] >= 2 for worker in workers(proxy).values())

    wait_for(spread, "a connection on every worker")
    return tunnels


def seconds_until(condition: Callable[[], bool]) -> float:
    began = time.monotonic()
    wait_for(condition)
    return time.monotonic() - began


def test_one_endpoint_sums_what_all_workers_did(pair: Proxy) -> None:
    """And tells their processes apart."""
    tunnels = on_every_worker(pair)
    for number, client in enumerate(tunnels):
        assert asks(client, f"/{number}") == 200
    count = len(tunnels)

    def requests() -> float:
        return pair.metric("sallyport_requests_total", agent="coder-1", verdict="allow", reason="allowed")

    wait_for(lambda: requests() == count, "the sum")
    assert pair.metric("sallyport_request_duration_seconds_count", verdict="allow") == count
    assert pair.metric("sallyport_connections", listener="{}:{}".format(*pair.address)) == count
    for name in ("1", "2", "supervisor"):
        assert pair.metric("process_resident_memory_bytes", worker=name) > 0
    assert pair.fetch_admin("/readyz")[0] == 200
    assert {worker["connections"] > 0 for worker in workers(pair).values()} == {True}


def test_the_audit_log_has_each_line_once_whichever_worker_it_was(pair: Proxy) -> None:
    """Whole lines in one file, though several write at a time."""
    tunnels = on_every_worker(pair)
    rounds = 20

    def work(number: int) -> None:
        for one in range(rounds):
            assert asks(tunnels[number], f"/{number}/{one}") == 200

    threads = [threading.Thread(target=work, args=[number]) for number in range(len(tunnels))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = Counter(f"/{number}/{one}" for number in range(len(tunnels)) for one in range(rounds))
    lines = pair.audit(len(wanted), verdict="allow")
    assert Counter(line["path"] for line in lines) == wanted
    assert len({line["id"] for line in lines}) == len(lines)


def test_connections_that_come_at_once_are_spread(make_proxy: Make) -> None:
    """Who wakes first does not take them all."""
    proxy = make_proxy(RULES, lane="fast", workers=2)
    for _ in range(64):
        proxy.connect()
    wait_for(lambda: sum(worker["connections"] for worker in workers(proxy).values()) == 64)
    assert min(worker["connections"] for worker in workers(proxy).values()) >= 8


def test_the_limit_of_connections_is_for_all_workers_together(make_proxy: Make, lane: str) -> None:
    """Six on two workers: neither takes a seventh, once it has heard of the others."""
    proxy = make_proxy(RULES, lane=lane, workers=2, limits={"connections_per_agent": 6})
    join(proxy)

    def connects() -> tuple[Connection, int]:
        client = proxy.connect()
        client.send(f"CONNECT api.test:443 HTTP/1.1\r\nhost: api.test\r\n{proxy.auth('coder-1')}\r\n".encode())
        return client, client.response("CONNECT").status

    def takes_one_more() -> bool:
        client, status = connects()
        client.close()
        return status == 200

    held = []
    while len(held) < 6:
        client, status = connects()
        if status == 200:  # those of the harness may still be ending
            held.append(client)
    wait_for(lambda: all(not takes_one_more() for _ in range(8)), "a refusal by every worker")
    held.pop().close()
    wait_for(takes_one_more, "a place")


def test_all_workers_show_certificates_of_one_ca(pair: Proxy) -> None:
    """Which clients verify, on whatever worker they land."""
    assert [asks(client, "/") for client in on_every_worker(pair)]
    assert len(list((pair.folder / "certs").glob("*.key"))) == 1


def test_a_worker_that_dies_is_replaced_and_says_so(pair: Proxy) -> None:
    """The other one serves meanwhile."""
    before = processes(pair)
    tunnels = on_every_worker(pair)
    os.kill(before[1], signal.SIGKILL)
    assert pair.get("https://api.test/meanwhile").status == 200
    wait_for(lambda: processes(pair).get(1, before[1]) != before[1], "another worker")
    assert processes(pair)[2] == before[2]
    assert pair.metric("sallyport_worker_restarts_total", worker="1") == 1
    assert f"worker 1 (process {before[1]}) was ended by SIGKILL; starting another" in pair.stderr_text()
    alive = [client for client in tunnels if not is_cut(client)]
    assert 0 < len(alive) < len(tunnels)
    assert {asks(client, "/alive") for client in [*alive, *on_every_worker(pair)]} == {200}


def is_cut(client: Connection) -> bool:
    """Whether the other side has hung up by now."""
    client.sock.settimeout(0.01)
    try:
        return not client.recv()
    except TimeoutError:
        return False
    finally:
        client.sock.settimeout(PATIENCE)


def test_a_successor_that_cannot_start_is_tried_again(pair: Proxy) -> None:
    """Meanwhile the other worker serves, and the log says why."""
    before, key = processes(pair), pair.folder / "certs" / "ca.key"
    hidden = key.rename(key.with_suffix(".hidden"))
    os.kill(before[2], signal.SIGKILL)
    wait_for(lambda: "worker 2 does not start" in pair.stderr_text(), "the reason")
    assert "ca.key is missing" in pair.stderr_text()
    assert pair.get("https://api.test/").status == 200
    assert pair.fetch_admin("/readyz")[0] == 200
    hidden.rename(key)
    wait_for(lambda: len(processes(pair)) == 2, "the successor")
    assert "Traceback" not in pair.stderr_text()


def test_the_signal_that_stops_everybody_reaches_every_worker(pair: Proxy, upstream: Upstream) -> None:
    tunnels = on_every_worker(pair)
    assert pair.process
    pair.process.send_signal(signal.SIGUSR1)
    assert seconds_until(lambda: all(map(is_cut, tunnels))) < 1.0
    assert upstream.seen == []


def test_a_worker_that_starts_after_the_signal_stops_everybody_too(pair: Proxy, upstream: Upstream) -> None:
    """Where no file can tell it so: the supervisor remembers."""
    switch = pair.folder / ".sallyport" / "KILL"
    switch.mkdir()  # no file can take its name, and what cannot be read stops everybody
    assert pair.process
    pair.process.send_signal(signal.SIGUSR1)
    wait_for(lambda: pair.stderr_text().count("until a restart") == 3, "the supervisor and its workers")
    switch.rmdir()
    for number, process in processes(pair).items():
        os.kill(process, signal.SIGKILL)
        wait_for(lambda n=number, old=process: processes(pair).get(n, old) != old, "its successor")
    for _ in range(8):
        with contextlib.closing(pair.tunnel("api.test")) as client:
            assert asks(client, "/") == 403
    assert upstream.seen == []


def test_a_kill_reaches_every_worker_within_a_second(pair: Proxy, upstream: Upstream) -> None:
    """New connections are refused, and those that are open on any of them are cut."""
    tunnels = on_every_worker(pair)
    pair.cli("agent", "kill", "coder-1")
    assert seconds_until(lambda: all(map(is_cut, tunnels))) < 1.0
    for _ in range(8):
        with contextlib.closing(pair.tunnel("api.test")) as client:
            assert asks(client, "/") == 403
    assert upstream.seen == []


def test_a_rotation_reaches_every_worker_within_a_second(make_proxy: Make, upstream: Upstream, lane: str) -> None:
    proxy = make_proxy(INJECTING, lane=lane, workers=2)
    join(proxy)
    proxy.credential("api", "first-key-1234567", "--host", "api.test")
    tunnels = on_every_worker(proxy)
    wait_for(lambda: all(asks(client, "/") == 200 for client in tunnels), "the first key everywhere")
    proxy.cli("vault", "rotate", "api", stdin="second-key-1234567")

    def everywhere() -> bool:
        upstream.seen.clear()
        assert {asks(client, "/") for client in tunnels} == {200}
        return {seen.header("authorization")[0] for seen in upstream.seen} == {"Bearer second-key-1234567"}

    assert seconds_until(everywhere) < 1.0


def test_rules_reach_every_worker_within_a_second(pair: Proxy) -> None:
    tunnels = on_every_worker(pair)
    pair.write_rules(RULES.replace("allow", "block"))
    assert seconds_until(lambda: {asks(client, "/") for client in tunnels} == {403}) < 1.5  # with our own polling


def test_reload_replaces_every_worker_and_drops_nothing(pair: Proxy, upstream: Upstream) -> None:
    """A stream that began before goes on to its end, on the old worker; a busy client meets no closed door."""
    before, statuses, over = processes(pair), list[int](), threading.Event()

    def busy() -> None:
        while not over.is_set():
            statuses.append(keep_asking(pair))

    with Stream(upstream) as stream:
        client = streaming(pair)
        upstream.raw = None
        threads = [threading.Thread(target=busy) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert "2 workers are new" in pair.cli("reload").stderr
        over.set()
        for thread in threads:
            thread.join()
        assert set(processes(pair).values()).isdisjoint(before.values())
        wait_for(lambda: sum(map(dead, before.values())) == 1, "the end of the worker without the stream")
        stream.end()
        assert client.read_until(b"0\r\n\r\n") == b"4\r\nlast\r\n0\r\n\r\n"
    wait_for(lambda: all(map(dead, before.values())), "the end of the old workers")
    assert len(statuses) > 2
    assert set(statuses) == {200}
    assert pair.metric("sallyport_worker_restarts_total", worker="1") == 0
    assert pair.audit(path="/stream")[0]["status"] == 200


def keep_asking(proxy: Proxy) -> int:
    """Requests on one connection until the proxy ends it with an answer; the last status."""
    with contextlib.closing(proxy.tunnel("api.test")) as client:
        for _ in range(50):
            client.send(b"GET /busy HTTP/1.1\r\nhost: api.test\r\n\r\n")
            response = client.response()
            if response.status != 200 or response.header("connection") == "close":
                break
        return response.status


def test_reload_takes_new_settings_and_says_which_wait(pair: Proxy) -> None:
    """Listeners and the like belong to the supervisor."""
    text = pair.config.read_text()
    pair.config.write_text(text.replace("workers: 2", "workers: 3\nlimits: {headers: 1KiB}"))
    assert "note: workers: waits for a restart of the proxy" in pair.cli("reload").stderr
    assert len(processes(pair)) == 2
    client = pair.tunnel("api.test")
    client.send(b"GET / HTTP/1.1\r\nhost: api.test\r\nx: " + b"y" * 2000 + b"\r\n\r\n")
    assert client.response().status == 400


def test_a_reload_with_broken_settings_changes_nothing(pair: Proxy) -> None:
    before, text = processes(pair), pair.config.read_text()
    pair.config.write_text(text + "\nlimts: {}\n")
    result = pair.cli("reload", check=False)
    assert (result.returncode, 'did you mean "limits"?' in result.stderr) == (1, True)
    assert pair.process
    pair.process.send_signal(signal.SIGUSR2)  # as somebody might, past the command
    wait_for(lambda: json.loads(pair.fetch_admin("/api/status")[1])["reload_problem"], "the problem")
    assert processes(pair) == before
    assert pair.get("https://api.test/").status == 200


def test_one_process_has_nobody_to_replace_it(make_proxy: Make) -> None:
    """And is not harmed by the question."""
    proxy = make_proxy(RULES)
    result = proxy.cli("reload", check=False)
    assert (result.returncode, "set workers: 2 and restart it" in result.stderr) == (1, True)
    proxy.stop()
    result = proxy.cli("reload", check=False)
    assert (result.returncode, "no proxy runs here" in result.stderr) == (1, True)


def test_sigterm_drains_every_worker_and_leaves_nothing_behind(pair: Proxy, upstream: Upstream) -> None:
    before = processes(pair)
    with Stream(upstream) as stream:
        clients = [streaming(pair) for _ in range(3)]
        assert pair.process
        pair.process.terminate()
        wait_for(lambda: refused(pair), "the closed listener")
        stream.end()
        for client in clients:
            assert client.read_until(b"0\r\n\r\n") == b"4\r\nlast\r\n0\r\n\r\n"
    pair.ended()
    assert all(map(dead, before.values()))
    assert not server_lives(pair.folder / ".sallyport")
    assert [line["status"] for line in pair.audit(3, path="/stream")] == [200, 200, 200]


def test_a_second_signal_hurries_all(pair: Proxy, upstream: Upstream) -> None:
    """Recorded all the same."""
    with Stream(upstream):
        clients = [streaming(pair) for _ in range(2)]
        assert pair.process
        pair.process.send_signal(signal.SIGINT)
        wait_for(lambda: refused(pair), "the closed listener")
        before = time.monotonic()
        pair.process.send_signal(signal.SIGINT)
        assert all(client.closed() for client in clients)
        pair.ended()
        assert time.monotonic() - before < 4
    assert len(pair.audit(2, path="/stream")) == 2


def test_workers_end_with_a_supervisor_that_was_killed(pair: Proxy, upstream: Upstream) -> None:
    """Nothing they did could be put on record any more. The next start is as after any kill -9."""
    before = processes(pair)
    with Stream(upstream):
        client = streaming(pair)
        assert pair.process
        pair.process.kill()
        assert client.closed()
        wait_for(lambda: all(map(dead, before.values())), "the end of the workers")
    pair.kill()
    upstream.raw = None
    pair.start()
    assert pair.get("https://api.test/again").status == 200


def test_what_keeps_a_worker_from_starting_is_told_like_any_mistake(make_proxy: Make) -> None:
    """One line, no traceback, nothing left."""
    proxy = make_proxy(RULES, start=False, workers=2)
    proxy.environment["SALLYPORT_MASTER_KEY"] = "nonsense"
    proxy.start(wait=False)
    assert proxy.process
    assert proxy.process.wait(30) == 1
    proxy._forget()
    said = proxy.stderr_text()
    assert "Traceback" not in said
    assert said.startswith("sallyport: SALLYPORT_MASTER_KEY holds no master key")
    assert not server_lives(proxy.folder / ".sallyport")
