"""The master key is changed under a running proxy: not one request is refused, and killing the change loses nothing."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.gatewaytoken import mint
from tests.harness import Proxy, Upstream, wait_for
from tests.storage import ROOT

pytestmark = pytest.mark.slow

type Make = Callable[..., Proxy]

SECRET, NEW = "real-key-4f1e9b7c2d", "ab" * 32
RULES = """\
version: 1
rules:
  - name: injected
    match: {host: api.test, path: /k/**}
    action: allow
    inject: [{credential: api, as: bearer}]
"""

# `vault rekey` that is killed after three changes of the store.
KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from proxy.rekey import rekey
from proxy.store import Store
left, change = 3, Store.change
async def mortal(*arguments):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    await change(*arguments)
Store.change = mortal
async def main():
    async with await Store.open("embedded", Path(sys.argv[1])) as store:
        await rekey(Path(sys.argv[1]), {}, store, None)
asyncio.run(main())
"""


def proxy_of(make_proxy: Make, lane: str, workers: int = 1) -> Proxy:
    """A proxy with an agent and enough records for a change to be half done; credentials are opened anew always."""
    proxy = make_proxy(RULES, lane=lane, workers=workers, vault={"lease": "1s"})
    proxy.agent()
    proxy.credential("api", SECRET, "--host", "api.test")
    for name in ("b", "c", "d"):
        proxy.credential(name, f"secret of {name}", "--host", "api.test")
    wait_for(lambda: proxy.get("https://api.test/k/first").status == 200)
    return proxy


@contextmanager
def requests(proxy: Proxy) -> Iterator[list[int]]:
    """The statuses of requests made one after the other, on new connections, until the end of the block and a second
    more."""
    statuses: list[int] = []
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            statuses.append(proxy.get("https://api.test/k/x").status)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield statuses
        until = time.monotonic() + 2  # every lease has ended meanwhile
        wait_for(lambda: time.monotonic() > until)
    finally:
        over.set()
        for thread in threads:
            thread.join()


def key_of(proxy: Proxy) -> str:
    return (proxy.folder / ".sallyport" / "master.key").read_text()


@pytest.mark.parametrize("workers", [1, 2])
def test_requests_go_on_with_their_credential(make_proxy: Make, lane: str, workers: int, upstream: Upstream) -> None:
    proxy = proxy_of(make_proxy, lane, workers)
    upstream.reset()
    before = key_of(proxy)
    with requests(proxy) as statuses:
        assert "everything is sealed under" in proxy.cli("vault", "rekey").stderr
        assert key_of(proxy) != before
    assert set(statuses) == {200}
    assert {tuple(seen.header("authorization")) for seen in upstream.seen} == {(f"Bearer {SECRET}",)}
    exported = proxy.cli("agent", "env", "coder-1").stdout
    assert proxy.tokens["coder-1"] in exported, "an issued token is told again"
    proxy.stop()
    proxy.start()
    assert proxy.get("https://api.test/k/x").status == 200, "with the new key alone"


def test_a_change_that_was_killed_refuses_nothing_and_is_ended_by_the_next(
    make_proxy: Make, lane: str, upstream: Upstream
) -> None:
    proxy = proxy_of(make_proxy, lane)
    upstream.reset()
    state = proxy.folder / ".sallyport"
    with requests(proxy) as statuses:
        killed = subprocess.run(
            [sys.executable, "-P", "-c", KILLED, state], env=proxy.environment, cwd=ROOT, check=False
        )
        assert killed.returncode == -9
    assert (state / "master.key.next").exists()
    proxy.stop()
    proxy.start()
    with requests(proxy) as more:
        proxy.cli("vault", "rekey")
    assert set(statuses + more) == {200}
    assert not (state / "master.key.next").exists()
    assert {tuple(seen.header("authorization")) for seen in upstream.seen} == {(f"Bearer {SECRET}",)}


def test_gateways_and_canaries_outlive_the_key(make_proxy: Make, lane: str, upstream: Upstream) -> None:
    proxy = proxy_of(make_proxy, lane)
    gateway = proxy.cli("gateway", "add", "one", "--agents", "coder-*").stdout.strip()
    canary = proxy.cli("canary", "add", "bait").stdout.strip()
    proxy.cli("vault", "rekey")
    proxy.tokens["coder-1"] = mint(gateway, "coder-1")
    wait_for(lambda: proxy.get("https://api.test/k/x").status == 200)
    later = proxy.cli("canary", "add", "later").stdout.strip()
    upstream.reset()
    for token in (canary, later):
        wait_for(lambda token=token: proxy.get(f"https://api.test/k/x?q={token}").status == 403)  # type: ignore[misc]
    assert not any(canary in str(seen) for seen in upstream.seen)


def test_a_key_of_the_environment_is_followed_and_the_next_step_told(
    make_proxy: Make, lane: str, upstream: Upstream, tmp_path: Path
) -> None:
    proxy = make_proxy(RULES, start=False, lane=lane)
    proxy.environment["SALLYPORT_MASTER_KEY"] = "cd" * 32
    proxy.start()
    proxy.agent()
    proxy.credential("api", SECRET, "--host", "api.test")
    wait_for(lambda: proxy.get("https://api.test/k/first").status == 200)
    assert "--new-key-file" in proxy.cli("vault", "rekey", check=False).stderr
    (tmp_path / "new").write_text(NEW)
    with requests(proxy) as statuses:
        told = proxy.cli("vault", "rekey", "--new-key-file", str(tmp_path / "new"))
    assert set(statuses) == {200}
    assert "now put the new key into SALLYPORT_MASTER_KEY" in told.stderr
    assert NEW not in told.stdout + told.stderr
    proxy.stop()
    proxy.environment["SALLYPORT_MASTER_KEY"] = NEW
    proxy.start()
    assert "(0 records now)" in proxy.cli("vault", "rekey").stderr
    assert not (proxy.folder / ".sallyport" / "master.key.next").exists()
    assert proxy.get("https://api.test/k/x").status == 200
    assert NEW not in proxy.stderr_text()
