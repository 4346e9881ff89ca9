"""The store keeps its word on a real server, alone, in a cluster, behind a sentinel, and when it dies."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis import Redis

from proxy import store as store_module
from proxy.embedded import server_binary
from proxy.problem import UserError
from proxy.store import Revision, Store, StoreUnavailable
from tests.storage import HOLDER, process, server_lives, server_pid, wait_until


def in_store(state: Path, story: Callable[[Store], Awaitable[None]], url: str = "embedded") -> None:
    """Runs `story` with a store that is closed again."""

    async def main() -> None:
        async with await Store.open(url, state) as store:
            await story(store)

    asyncio.run(main())


def always(text: str | None) -> Callable[[str | None], str | None]:
    return lambda _: text


def test_a_record_is_kept_found_and_removed(tmp_path: Path) -> None:
    async def story(store: Store) -> None:
        assert await store.get("vault", "a") is None
        await store.change("vault", "a", always("one"))
        await store.change("vault", "b", always("two"))
        assert await store.get("vault", "a") == "one"
        assert await store.get_all("vault") == {"a": "one", "b": "two"}
        assert await store.get_all("vault", ["b", "c"]) == {"b": "two"}
        assert await store.get_all("vault", []) == {}
        assert await store.get_all("agents") == {}
        await store.change("vault", "a", always(None))
        assert await store.get("vault", "a") is None

    in_store(tmp_path, story)


def test_a_change_sees_what_is_there_and_its_refusal_changes_nothing(tmp_path: Path) -> None:
    async def story(store: Store) -> None:
        def refuse(old: str | None) -> str:
            raise UserError(f"there is {old}")

        await store.change("vault", "a", always("one"))
        before, _ = await store.changes_since(Revision())
        with pytest.raises(UserError, match="there is one"):
            await store.change("vault", "a", refuse)
        assert await store.changes_since(before) == (before, set())

    in_store(tmp_path, story)


def test_changes_at_the_same_time_are_not_lost(tmp_path: Path) -> None:
    async def story(store: Store) -> None:
        def count(old: str | None) -> str:
            return str(int(old or "0") + 1)

        await asyncio.gather(*(store.change("vault", "n", count) for _ in range(8)))
        assert await store.get("vault", "n") == "8"

    in_store(tmp_path, story)


def test_a_change_that_others_always_overtake_gives_up(tmp_path: Path) -> None:
    async def story(store: Store) -> None:
        other = Redis(unix_socket_path=str(tmp_path / "store" / "valkey.sock"))

        def overtaken(old: str | None) -> str:
            other.hset("{sallyport}:vault", "a", f"{old}x")
            return "mine"

        with pytest.raises(UserError, match="at the same time: try again"):
            await store.change("vault", "a", overtaken)
        other.close()

    in_store(tmp_path, story)


def test_a_record_that_is_not_text_can_be_read_and_replaced(tmp_path: Path) -> None:
    async def story(store: Store) -> None:
        with Redis(unix_socket_path=str(tmp_path / "store" / "valkey.sock")) as other:
            other.hset("{sallyport}:vault", "a", b"\xff\xfe")
        assert set(await store.get_all("vault")) == {"a"}
        await store.change("vault", "a", always("mended"))
        assert await store.get("vault", "a") == "mended"

    in_store(tmp_path, story)


def test_a_key_is_set_once(tmp_path: Path) -> None:
    async def story(store: Store) -> None:
        assert await store.get_key("vault:key") is None
        assert await store.set_once("vault:key", "one") == "one"
        assert await store.set_once("vault:key", "two") == "one"
        assert await store.get_key("vault:key") == "one"

    in_store(tmp_path, story)


def test_every_key_has_the_hash_tag(tmp_path: Path) -> None:
    async def story(store: Store) -> None:
        await store.change("vault", "a", always("one"))
        await store.set_once("vault:key", "x")
        with Redis(unix_socket_path=str(tmp_path / "store" / "valkey.sock")) as other:
            assert all(key.startswith(b"{sallyport}:") for key in other.keys("*"))

    in_store(tmp_path, story)


def test_the_feed_tells_what_changed_and_nothing_twice(tmp_path: Path) -> None:
    async def story(store: Store) -> None:
        start, names = await store.changes_since(Revision())
        assert names is None
        await store.change("vault", "github", always("one"))
        await store.change("agents", "coder-1", always("two"))
        await store.change("vault", "github", always(None))
        then, names = await store.changes_since(start)
        assert names == {"vault/github", "agents/coder-1"}
        assert await store.changes_since(then) == (then, set())

    in_store(tmp_path, story)


def test_a_feed_that_went_back_means_everything_may_have_changed(tmp_path: Path) -> None:
    async def story(store: Store) -> None:
        await store.change("vault", "a", always("one"))
        before, _ = await store.changes_since(Revision())
        with Redis(unix_socket_path=str(tmp_path / "store" / "valkey.sock")) as other:
            other.flushall()
        after, names = await store.changes_since(before)
        assert names is None
        assert after.number == 0

    in_store(tmp_path, story)


def test_after_a_restart_everything_may_have_changed(tmp_path: Path) -> None:
    """The same number from another run of the server, or from another server, is another state."""
    seen: list[Revision] = []

    async def look(store: Store) -> None:
        await store.change("vault", "a", always("one"))
        seen.append((await store.changes_since(Revision()))[0])

    async def again(store: Store) -> None:
        revision, names = await store.changes_since(seen[0])
        assert revision.number == seen[0].number
        assert names is None

    in_store(tmp_path, look)
    in_store(tmp_path, again)


def test_the_feed_is_bounded_and_who_is_behind_loads_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "FEED", 3)

    async def story(store: Store) -> None:
        start, _ = await store.changes_since(Revision())
        for name in "abc":
            await store.change("vault", name, always("x"))
        then, names = await store.changes_since(start)
        assert names == {"vault/a", "vault/b", "vault/c"}
        for name in "defg":
            await store.change("vault", name, always("x"))
        assert (await store.changes_since(then))[1] is None
        with Redis(unix_socket_path=str(tmp_path / "store" / "valkey.sock")) as other:
            assert other.zcard("{sallyport}:changes") == 3

    in_store(tmp_path, story)


def test_a_command_without_a_proxy_starts_the_store_and_stops_it_again(tmp_path: Path) -> None:
    in_store(tmp_path, lambda store: store.change("vault", "a", always("one")))
    assert not server_lives(tmp_path)

    async def still_there(store: Store) -> None:
        assert await store.get("vault", "a") == "one"

    in_store(tmp_path, still_there)
    assert not server_lives(tmp_path)


def test_a_killed_process_loses_nothing_and_its_store_is_taken_over(tmp_path: Path) -> None:
    with process(HOLDER, tmp_path, "github") as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        orphan = server_pid(tmp_path)
        holder.kill()
        holder.wait()
    assert server_lives(tmp_path)

    async def taken_over(store: Store) -> None:
        assert server_pid(tmp_path) == orphan
        assert await store.get("vault", "github") == "written before the kill"

    in_store(tmp_path, taken_over)
    assert not server_lives(tmp_path)


def test_process_and_server_killed_together_lose_nothing(tmp_path: Path) -> None:
    with process(HOLDER, tmp_path, "github") as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        holder.kill()
        os.kill(server_pid(tmp_path), signal.SIGKILL)
    wait_until(lambda: not server_lives(tmp_path))

    async def nothing_lost(store: Store) -> None:
        assert await store.get("vault", "github") == "written before the kill"

    in_store(tmp_path, nothing_lost)


def test_a_command_shares_the_store_of_a_running_proxy(tmp_path: Path) -> None:
    with process(HOLDER, tmp_path, "github") as proxy:
        assert proxy.stdout is not None
        assert proxy.stdin is not None
        assert proxy.stdout.readline() == "ready\n"
        in_store(tmp_path, lambda store: store.change("vault", "from-the-command", always("x")))
        assert server_lives(tmp_path)
        proxy.stdin.close()
        assert proxy.wait() == 0
    assert not server_lives(tmp_path)


@pytest.mark.slow
def test_many_commands_at_once_lose_no_change_and_leave_no_server(tmp_path: Path) -> None:
    code = """
async def main():
    for _ in range(8):
        async with await Store.open("embedded", Path(sys.argv[1])) as store:
            await store.change("vault", "n", lambda old: str(int(old or "0") + 1))
asyncio.run(main())
"""
    with process(code, tmp_path) as one, process(code, tmp_path) as two, process(code, tmp_path) as three:
        assert [one.wait(), two.wait(), three.wait()] == [0, 0, 0]
    assert not server_lives(tmp_path)

    async def all_counted(store: Store) -> None:
        assert await store.get("vault", "n") == "24"

    in_store(tmp_path, all_counted)


def test_a_server_that_dies_is_told_and_comes_back_with_ensure(tmp_path: Path) -> None:
    async def story(store: Store) -> None:
        await store.change("vault", "a", always("one"))
        os.kill(server_pid(tmp_path), signal.SIGKILL)
        with pytest.raises(StoreUnavailable, match="the embedded store cannot be used"):
            await store.get("vault", "a")
        await store.ensure()
        assert await store.get("vault", "a") == "one"

    in_store(tmp_path, story)


@pytest.mark.slow
def test_a_server_that_hangs_costs_a_second_not_more(tmp_path: Path) -> None:
    async def story(store: Store) -> None:
        pid = server_pid(tmp_path)
        os.kill(pid, signal.SIGSTOP)
        try:
            async with asyncio.timeout(2):
                with pytest.raises(StoreUnavailable, match="did not answer in time"):
                    await store.get("vault", "a")
        finally:
            os.kill(pid, signal.SIGCONT)

    in_store(tmp_path, story)


def test_a_store_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(UserError, match="belongs to user"):
        asyncio.run(Store.open("embedded", tmp_path))


@pytest.mark.parametrize(
    "url",
    ["", "postgres://host", "redis:", "redis://", "redis://u:p/w@host", "redis://a@b@c", "redis://h:x", "unix://x"],
)
def test_an_address_of_another_form_is_refused_without_quoting_it(tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError, match="store") as caught:
        asyncio.run(Store.open(url, tmp_path))
    assert "p/w" not in str(caught.value)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def remote(directory: Path, *arguments: str) -> Iterator[int]:
    """A server on a TCP port, as an operator would run one."""
    port = free_port()
    directory.mkdir()
    command = [server_binary(), *arguments, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory)]
    with subprocess.Popen([*command, "--save", ""], stdout=subprocess.DEVNULL) as server:
        try:
            wait_until(lambda: listens(port))
            yield port
        finally:
            server.kill()


async def works(store: Store) -> None:
    start, _ = await store.changes_since(Revision())
    await store.change("vault", "a", always("one"))
    assert await store.get_all("vault") == {"a": "one"}
    assert await store.get_all("vault", ["a", "b"]) == {"a": "one"}
    assert await store.set_once("vault:key", "x") == "x"
    assert (await store.changes_since(start))[1] == {"vault/a"}
    await store.ensure()


def test_a_remote_store_is_the_same_code(tmp_path: Path) -> None:
    with remote(tmp_path / "server", "--requirepass", "s3cret/@") as port:
        in_store(tmp_path, works, f"redis://:s3cret%2F%40@127.0.0.1:{port}/0")


def test_a_refused_login_is_told_without_the_password(tmp_path: Path) -> None:
    with (
        remote(tmp_path / "server", "--requirepass", "right") as port,
        pytest.raises(StoreUnavailable, match=f"redis://127.0.0.1:{port}/0 refused the login") as caught,
    ):
        asyncio.run(Store.open(f"redis://default:hunter2@127.0.0.1:{port}/0", tmp_path))
    assert "hunter2" not in str(caught.value)


def test_a_store_that_is_not_there_is_told_without_the_password(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match=r"redis://127\.0\.0\.1:1/0 cannot be used") as caught:
        asyncio.run(Store.open("redis://u:hunter2@127.0.0.1:1/0", tmp_path))
    assert "hunter2" not in str(caught.value)


def test_something_that_is_no_store_is_told(tmp_path: Path) -> None:
    async def main() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1)
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            await Store.open(f"redis://127.0.0.1:{port}", tmp_path)

    with pytest.raises(StoreUnavailable, match="cannot be used"):
        asyncio.run(main())


@pytest.mark.slow
def test_a_cluster_is_the_same_code(tmp_path: Path) -> None:
    arguments = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    with remote(tmp_path / "server", *arguments) as port:
        with Redis(port=port) as admin:
            admin.execute_command("CLUSTER ADDSLOTSRANGE 0 16383")
            wait_until(lambda: admin.execute_command("CLUSTER INFO")["cluster_state"] == "ok")
        in_store(tmp_path, works, f"redis+cluster://127.0.0.1:1,127.0.0.1:{port}")
        in_store(tmp_path, met_at("127.0.0.1", port), f"redis+cluster://localhost:{port}")


def test_a_store_behind_sentinels_is_the_same_code(tmp_path: Path) -> None:
    config = tmp_path / "sentinel.conf"
    with remote(tmp_path / "server") as port:
        config.write_text(f"sentinel monitor main 127.0.0.1 {port} 1\n")
        with remote(tmp_path / "sentinel", str(config), "--sentinel") as sentinel:
            in_store(tmp_path, works, f"redis+sentinel://127.0.0.1:1,127.0.0.1:{sentinel}/main/0")
            in_store(tmp_path, met_at("127.0.0.1", port), f"redis+sentinel://127.0.0.1:{sentinel}/main/0")


def met_at(host: str, port: int) -> Callable[[Store], Awaitable[None]]:
    """That a store tells this server among its own, once it was asked something."""

    async def met(store: Store) -> None:
        await store.ping()
        assert (host, port) in store.servers()

    return met


@pytest.mark.parametrize(
    ("url", "servers"),
    [
        ("embedded", set()),
        ("redis://user:p%40ss@10.0.0.5:7000/2", {("10.0.0.5", 7000)}),
        ("rediss://store.internal", {("store.internal", 6379)}),
        ("redis://[fd00::5]", {("fd00::5", 6379)}),
        ("redis+sentinel://a.test,b.test:7/main", {("a.test", 26379), ("b.test", 7)}),
        ("redis+cluster://a.test,[fd00::5]:7", {("a.test", 6379), ("fd00::5", 7)}),
    ],
)
def test_a_store_tells_where_it_is(tmp_path: Path, url: str, servers: set[tuple[str, int]]) -> None:
    """Before it was ever reached, too."""

    async def told() -> set[tuple[str, int]]:
        async with await Store.open(url, tmp_path, wait=False) as store:
            return store.servers()

    assert asyncio.run(told()) == servers
