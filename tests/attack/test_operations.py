"""When something fails around the proxy it refuses, says so, and comes back by itself."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from redis import Redis

from tests.harness import Connection, Proxy, Upstream, refused, wait_for
from tests.storage import RemoteStore

type Make = Callable[..., Proxy]

RULES = """
version: 1
rules:
  - {name: all, match: {host: api.test}, action: allow}
  - {name: plain, match: {host: api.test, scheme: http}, action: allow}
"""


def fill(proxy: Proxy) -> None:
    """No file of the proxy's can grow any more, as on a full disk."""
    assert proxy.process
    log = proxy.folder / ".sallyport" / "audit.jsonl"
    resource.prlimit(proxy.process.pid, resource.RLIMIT_FSIZE, (log.stat().st_size, resource.RLIM_INFINITY))


def empty(proxy: Proxy) -> None:
    assert proxy.process
    resource.prlimit(proxy.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def ready(proxy: Proxy) -> bool:
    return proxy.fetch_admin("/readyz")[0] == 200


# The audit log


def test_what_cannot_be_recorded_does_not_go_out(make_proxy: Make, upstream: Upstream, lane: str) -> None:
    """On a full disk; when there is room again everything that happened is on record, refusals too."""
    proxy = make_proxy(RULES, lane=lane)
    first = json.loads(proxy.get("https://api.test/1").body)
    assert first["target"] == "/1"
    proxy.audit(path="/1")
    fill(proxy)
    proxy.get("https://api.test/2")
    wait_for(lambda: not ready(proxy))
    upstream.seen.clear()
    for url in ("https://api.test/3", "http://api.test/4"):
        refused(proxy.get(url), "audit_unavailable")
    assert upstream.seen == []
    assert "audit" in json.loads(proxy.fetch_admin("/readyz")[1])["not_ready"]
    empty(proxy)
    wait_for(lambda: ready(proxy))
    assert proxy.get("https://api.test/5").status == 200
    assert [line["path"] for line in proxy.audit(5, method="GET")] == ["/1", "/2", "/3", "/4", "/5"]
    assert proxy.metric("sallyport_audit_dropped_total") == 0
    assert "none changed" in proxy.cli("audit", "verify").stdout


def test_who_prefers_service_to_record_says_so(make_proxy: Make, upstream: Upstream, lane: str) -> None:
    proxy = make_proxy(RULES, lane=lane, audit={"on_full": "drop"})
    assert proxy.get("https://api.test/1").status == 200
    proxy.audit(path="/1")
    fill(proxy)
    proxy.get("https://api.test/2")
    wait_for(lambda: not ready(proxy))
    assert proxy.get("https://api.test/3").status == 200
    empty(proxy)
    wait_for(lambda: ready(proxy))


def test_a_changed_log_is_told(make_proxy: Make, upstream: Upstream) -> None:
    """Lines that were changed or taken out, over a restart and a rotation."""
    proxy = make_proxy(RULES)
    log = proxy.folder / ".sallyport" / "audit.jsonl"
    for number in range(3):
        proxy.get(f"https://api.test/{number}")
    proxy.audit(path="/2")
    proxy.stop()
    proxy.start()
    proxy.get("https://api.test/3")
    proxy.audit(path="/3")
    old = log.rename(log.with_name("audit.1.jsonl"))
    proxy.get("https://api.test/4")
    wait_for(log.exists)
    proxy.audit(path="/4")
    assert "none changed" in proxy.cli("audit", "verify", str(old), str(log)).stdout
    kept = json.loads(proxy.cli("audit", "verify", str(old), str(log), "--json").stdout)
    assert (kept["ok"], kept["wrong"]) == (True, [])
    whole = old.read_bytes()
    old.write_bytes(whole.replace(b'"path":"/1"', b'"path":"/9"'))
    result = proxy.cli("audit", "verify", str(old), str(log), check=False)
    assert result.returncode == 1
    assert "was changed" in result.stderr
    lines = whole.splitlines(keepends=True)
    old.write_bytes(b"".join(lines[:2] + lines[3:]))
    assert "does not follow" in proxy.cli("audit", "verify", str(old), check=False).stderr
    old.write_bytes(b"".join(lines[:-1]))
    assert "does not follow" in proxy.cli("audit", "verify", str(old), str(log), check=False).stderr
    assert proxy.cli("audit", "verify", str(log), "--expect", kept["last"]).returncode == 0
    log.write_bytes(b"")
    assert "cut off" in proxy.cli("audit", "verify", str(log), "--expect", kept["last"], check=False).stderr


def test_tail_shows_decisions_as_they_are_made(make_proxy: Make, upstream: Upstream) -> None:
    """Of one agent, or what was refused, over a rotation; what a sandbox wrote cannot command a terminal."""
    proxy = make_proxy(RULES)
    proxy.agent("coder-2")
    proxy.get("https://api.test/before")
    command = [sys.executable, "-P", "-m", "proxy", "tail", "--config", str(proxy.config)]
    tails = [
        subprocess.Popen([*command, *more], stdout=subprocess.PIPE, env=proxy.environment, cwd=proxy.folder, text=True)
        for more in ([], ["--json", "--blocked"], ["--agent", "coder-2"])
    ]
    said: list[list[str]] = [[], [], []]
    readers = [
        threading.Thread(target=lambda t=tail, to=lines: to.extend(iter(t.stdout.readline, "")), daemon=True)
        for tail, lines in zip(tails, said, strict=True)
    ]
    for reader in readers:
        reader.start()
    try:
        wait_for(lambda: all(_asked(proxy, lines, agent) for lines, agent in zip(said, (1, 1, 2), strict=True)))
        log = proxy.folder / ".sallyport" / "audit.jsonl"
        log.rename(log.with_name("old"))
        proxy.get("https://api.test/after")
        proxy.get("https://other.test/refused", agent="coder-2")
        wait_for(lambda: any("after" in line for line in said[0]))
        wait_for(lambda: all(any("refused" in line for line in lines) for lines in said))
        assert not any("/before" in line for lines in said for line in lines)
        assert all(json.loads(line)["verdict"] == "block" for line in said[1])
        assert all("coder-2" in line for line in said[2])
        assert all(line[:-1].isprintable() for line in said[0])
    finally:
        for tail, reader in zip(tails, readers, strict=True):
            tail.kill()
            reader.join()
            tail.communicate()


def _asked(proxy: Proxy, lines: list[str], agent: int) -> bool:
    proxy.get("https://other.test/first", agent=f"coder-{agent}")
    return bool(lines)


# Rules


@pytest.mark.parametrize("how", ["broken", "unreadable yaml", "deleted", "folder deleted"])
def test_rules_that_break_leave_the_last_good_ones(make_proxy: Make, upstream: Upstream, lane: str, how: str) -> None:
    """Deleted files are a change that was made: nothing is allowed then, and nothing is allowed by a broken one."""
    proxy = make_proxy(RULES, lane=lane)
    assert proxy.get("https://api.test/").status == 200
    file = proxy.folder / "rules" / "rules.yaml"
    loads = proxy.metric("sallyport_rules_reloads_total", result="failure")
    if how == "deleted":
        file.unlink()
        wait_for(lambda: proxy.get("https://api.test/").status == 403)
        upstream.seen.clear()
        refused(proxy.get("https://api.test/"), "no_rule")
        assert upstream.seen == []
    else:
        if how == "folder deleted":
            file.unlink()
            (proxy.folder / "rules").rmdir()
        else:
            proxy.write_rules("version: 1\nrules: [{name: a, action: alow}]" if how == "broken" else "\x00: [}")
        wait_for(lambda: proxy.metric("sallyport_rules_reloads_total", result="failure") > loads)
        statuses = {proxy.get("https://api.test/").status, proxy.get("https://other.test/").status}
        assert statuses <= {200, 403}
        refused(proxy.get("https://other.test/"), "no_rule")
        (proxy.folder / "rules").mkdir(exist_ok=True)
    proxy.write_rules(RULES.replace("api.test", "other.test"))
    wait_for(lambda: proxy.get("https://other.test/").status == 200)
    refused(proxy.get("https://api.test/"), "no_rule")


@pytest.mark.parametrize(
    "bomb",
    [
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        "[" * 100_000,
        "version: 1\nrules: [{name: a, action: allow, match: {path_regex: '(a{1,1000}){1,1000}'}}]",
        "version: 1\nrules: [{name: a, action: allow, match: {host: '" + "**." * 10_000 + "test'}}]",
        "version: 1\nrules:\n" + "- " * 50_000,
    ],
    ids=["aliases", "depth", "regex", "host", "nesting"],
)
def test_a_bomb_among_the_rules_is_a_broken_file(make_proxy: Make, upstream: Upstream, bomb: str) -> None:
    """Told soon, and in little memory; the rules before it stay."""
    proxy = make_proxy(RULES)
    loads = proxy.metric("sallyport_rules_reloads_total", result="failure")
    before = proxy.metric("process_resident_memory_bytes")
    proxy.write_rules(bomb, "bomb.yaml")
    wait_for(lambda: proxy.metric("sallyport_rules_reloads_total", result="failure") > loads)
    assert proxy.get("https://api.test/").status == 200
    assert proxy.metric("process_resident_memory_bytes") < before + 100_000_000


def test_a_reload_does_not_touch_what_streams(make_proxy: Make, upstream: Upstream, lane: str) -> None:
    """An answer that has begun goes on under the rules it began under; the next request has the new ones."""
    go = threading.Event()

    def chunks() -> list[bytes]:
        return [b"first", b"second"]

    proxy = make_proxy(RULES, lane=lane)

    async def serve(reader, writer) -> None:  # type: ignore[no-untyped-def]
        import asyncio

        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 X\r\ncontent-length: 11\r\n\r\n" + chunks()[0])
        await asyncio.to_thread(go.wait, 15)
        writer.write(chunks()[1])
        await writer.drain()

    upstream.raw = serve
    tunnel = proxy.tunnel("api.test")
    tunnel.send(b"GET /x HTTP/1.1\r\nhost: api.test\r\n\r\n")
    tunnel.read_until(b"first")
    loads = proxy.metric("sallyport_rules_reloads_total", result="success")
    proxy.write_rules(RULES.replace("api.test", "other.test"))
    wait_for(lambda: proxy.metric("sallyport_rules_reloads_total", result="success") > loads)
    refused(proxy.get("https://api.test/"), "no_rule")
    go.set()
    assert tunnel.read_exactly(6) == b"second"
    with contextlib.suppress(ConnectionError):  # the upstream has closed, and so may we
        tunnel.send(b"GET /x HTTP/1.1\r\nhost: api.test\r\n\r\n")
        refused(tunnel.response(), "no_rule")


# The store


def test_a_store_that_comes_and_goes(make_proxy: Make, upstream: Upstream, lane: str, tmp_path: Path) -> None:
    """Down at the start: everything is refused. Down while it runs: who is known goes on. Emptied: nobody is known."""
    with RemoteStore(tmp_path) as store:
        store.start()
        proxy = make_proxy(RULES, start=False, store=store.url, lane=lane)
        token = json.loads(proxy.cli("agent", "add", "coder-1", "--json").stdout)["token"]
        proxy.tokens["coder-1"] = token
        store.kill()
        proxy.start()
        refused(proxy.get("http://api.test/"), "store_unavailable")
        assert upstream.seen == []
        store.start()
        wait_for(lambda: proxy.get("http://api.test/").status == 200)
        store.kill()
        wait_for(lambda: proxy.metric("sallyport_store_up") == 0)
        assert proxy.get("https://api.test/").status == 200
        store.start()
        with Redis(port=store.port) as client:
            client.flushall()
        wait_for(lambda: proxy.get("http://api.test/").status == 407)


# Descriptors


def test_out_of_descriptors_nobody_is_let_by_and_service_returns(
    make_proxy: Make, upstream: Upstream, lane: str
) -> None:
    """New connections wait; what was refused stays refused."""
    proxy = make_proxy(RULES, lane=lane)
    assert proxy.get("https://api.test/").status == 200
    assert proxy.process
    _, most = resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE)
    used = len(list(Path(f"/proc/{proxy.process.pid}/fd").iterdir()))
    resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE, (used + 12, most))
    crowd: list[Connection] = [proxy.connect() for _ in range(40)]
    for client in crowd:
        client.send(b"G")
    wait_for(lambda: len(list(Path(f"/proc/{proxy.process.pid}/fd").iterdir())) >= used + 10)  # type: ignore[union-attr]
    for client in crowd:
        client.close()
    wait_for(lambda: _status(proxy, "https://api.test/") == 200)
    refused(proxy.get("https://other.test/"), "no_rule")
    resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE, (most, most))
    proxy.process.send_signal(signal.SIGHUP)
    assert proxy.get("https://api.test/").status == 200


def _status(proxy: Proxy, url: str) -> int:
    try:
        return proxy.get(url).status
    except OSError:
        return 0
