"""Rules changed by hand while requests go through."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable

import pytest

from tests.harness import Proxy, Upstream, wait_for
from tests.wire.test_lifecycle import Stream, streaming

type Make = Callable[..., Proxy]

ONE = """version: 1
rules:
  - name: one
    match: {host: api.test, path: /one}
    action: allow
"""
TWO = ONE.replace("one", "two")
BOMB = "version: 1\na0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))
BROKEN = [
    ("a misspelt field", ONE.replace("match:", "mtach:"), ":4:5: ", 'did you mean "match"?'),
    ("a tab", ONE.replace("    match", "\tmatch"), ":4:1: ", "indent with spaces"),
    ("a key twice", ONE + "    action: block\n", ":6:5: ", "on line 5 already"),
    ("a bomb", BOMB, ":", "fewer aliases"),
    ("a name twice", ONE + ONE.partition("rules:\n")[2], ":6:11: ", "the first is at"),
    ("no host like it", ONE.replace("api.test", "API.test"), ":4:19: ", 'write "api.test"'),
]


@pytest.fixture(scope="module")
def proxy(make_proxy: Make) -> Proxy:
    proxy = make_proxy(ONE)
    proxy.agent()
    return proxy


@pytest.fixture(autouse=True)
def sound(proxy: Proxy) -> None:
    """Each test begins with rule one in force and nothing wrong."""
    proxy.write_rules(ONE)
    wait_for(lambda: not problems(proxy) and allows(proxy, "/one"))


def allows(proxy: Proxy, path: str) -> bool:
    return proxy.get(f"https://api.test{path}").status == 200


def problems(proxy: Proxy) -> list[str]:
    """What /api/status says of the last reload."""
    return list(json.loads(proxy.fetch_admin("/api/status")[1])["reload_problems"])


def reloads(proxy: Proxy, result: str) -> float:
    return proxy.metric("sallyport_rules_reloads_total", result=result)


def soon(condition: Callable[[], object]) -> None:
    """Within a second, and what one look at it takes."""
    before = time.monotonic()
    wait_for(condition)
    assert time.monotonic() - before < 2


def test_a_change_is_in_force_within_a_second(proxy: Proxy, upstream: Upstream) -> None:
    before = time.time()
    proxy.write_rules(TWO)
    soon(lambda: allows(proxy, "/two"))
    assert proxy.get("https://api.test/one").code == "no_rule"
    assert proxy.metric("sallyport_rules_last_reload_success_timestamp_seconds") >= before
    assert proxy.metric("sallyport_rules") == 1


def test_a_new_file_and_a_removed_one_count(proxy: Proxy, upstream: Upstream) -> None:
    """Also in a folder of the folder; hidden files and tests do not."""
    (proxy.folder / "rules" / "team").mkdir()
    more = proxy.folder / "rules" / "team" / "more.yaml"
    more.write_text(TWO)
    soon(lambda: allows(proxy, "/two"))
    assert allows(proxy, "/one")
    for ignored in (".hidden.yaml", "x.test.yaml", "x.yaml~"):
        (proxy.folder / "rules" / ignored).write_text(BOMB)
    (proxy.folder / "rules" / ".#rules.yaml").symlink_to("someone@nowhere:1")  # an editor's lock
    more.unlink()
    soon(lambda: not allows(proxy, "/two"))
    assert problems(proxy) == []


def test_what_kubernetes_mounts_is_read_once(proxy: Proxy, upstream: Upstream) -> None:
    """A ConfigMap's files are links through ..data, which is swapped at an update."""
    rules = proxy.folder / "rules"
    for version, text in (("..1", TWO), ("..2", TWO.replace("/two", "/three"))):
        (rules / version).mkdir()
        (rules / version / "two.yaml").write_text(text)
    (rules / "..data").symlink_to("..1")
    (rules / "two.yaml").symlink_to("..data/two.yaml")
    soon(lambda: allows(proxy, "/two"))
    (rules / "..swap").symlink_to("..2")
    (rules / "..swap").rename(rules / "..data")
    soon(lambda: allows(proxy, "/three"))
    assert not allows(proxy, "/two")
    for path in rules.glob("..*"):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (rules / "two.yaml").unlink()


@pytest.mark.parametrize(("what", "text", "place", "hint"), BROKEN, ids=[what for what, *_ in BROKEN])
def test_a_broken_file_keeps_the_last_good_rules(
    proxy: Proxy, upstream: Upstream, what: str, text: str, place: str, hint: str
) -> None:
    """It is told on standard error with its place, in /metrics and in /api/status, until it is mended."""
    failures, successes = reloads(proxy, "failure"), reloads(proxy, "success")
    stamp = proxy.metric("sallyport_rules_last_reload_success_timestamp_seconds")
    told = len(proxy.stderr_text())
    proxy.write_rules(text)
    soon(lambda: problems(proxy))
    assert f"rules/rules.yaml{place}" in problems(proxy)[0]
    assert reloads(proxy, "failure") == failures + 1
    assert reloads(proxy, "success") == successes
    assert proxy.metric("sallyport_rules_last_reload_success_timestamp_seconds") == stamp
    said = proxy.stderr_text()[told:]
    assert "the last good ones stay in force" in said
    assert f"rules/rules.yaml{place}" in said
    assert "hint: " in said
    assert hint in said
    assert "Traceback" not in said
    assert allows(proxy, "/one")
    status, ready = proxy.fetch_admin("/readyz")
    assert status == 200, "the rules in force are good ones"
    assert json.loads(ready)["reload_problems"] == problems(proxy)
    proxy.write_rules(TWO)
    soon(lambda: allows(proxy, "/two"))
    assert problems(proxy) == []
    assert reloads(proxy, "success") == successes + 1


def test_sighup_loads_again_at_once(proxy: Proxy) -> None:
    """Although no file changed."""
    before = reloads(proxy, "success")
    assert proxy.process
    proxy.process.send_signal(signal.SIGHUP)
    soon(lambda: reloads(proxy, "success") == before + 1)
    assert "rules reloaded: 1 rules" in proxy.stderr_text()


def test_a_deleted_folder_keeps_the_last_good_rules(proxy: Proxy, upstream: Upstream) -> None:
    """An unmounted volume must not stop every agent, nor open anything."""
    moved = proxy.folder / "moved"
    (proxy.folder / "rules").rename(moved)
    soon(lambda: problems(proxy))
    assert "no such folder of rules" in problems(proxy)[0]
    assert allows(proxy, "/one")
    moved.rename(proxy.folder / "rules")
    soon(lambda: not problems(proxy))


def test_a_request_under_way_keeps_the_rules_it_began_with(proxy: Proxy, upstream: Upstream) -> None:
    """Its record names them, although others are in force when it ends."""
    old = json.loads(proxy.fetch_admin("/api/status")[1])["policy"]
    proxy.write_rules(ONE.replace("/one", "/stream"))
    wait_for(lambda: json.loads(proxy.fetch_admin("/api/status")[1])["policy"] != old)
    policy = json.loads(proxy.fetch_admin("/api/status")[1])["policy"]
    with Stream(upstream) as stream:
        client = streaming(proxy)
        proxy.write_rules(TWO)
        wait_for(lambda: json.loads(proxy.fetch_admin("/api/status")[1])["policy"] != policy)
        stream.end()
        assert client.read_until(b"0\r\n\r\n").endswith(b"last\r\n0\r\n\r\n")
    line = proxy.audit(path="/stream")[0]
    assert (line["verdict"], line["policy"]) == ("allow", policy)
    assert line["rule_at"].endswith("rules/rules.yaml:3")
    client.send(b"GET /stream HTTP/1.1\r\nhost: api.test\r\n\r\n")
    assert client.response().code == "no_rule"


@pytest.mark.parametrize("state", ["missing", "unreadable", "broken"])
def test_without_rules_at_the_start_it_runs_and_refuses(make_proxy: Make, upstream: Upstream, state: str) -> None:
    """Not ready, but alive, so that mending the rules is all there is to do."""
    proxy = make_proxy(ONE, start=False)
    rules = proxy.folder / "rules"
    if state == "missing":
        shutil.rmtree(rules)
    elif state == "unreadable":
        (rules / "rules.yaml").unlink()
        (rules / "rules.yaml").symlink_to("rules.yaml")  # not even root can read it
    else:
        proxy.write_rules(BROKEN[0][1])
    proxy.start()
    wait_for(lambda: "rules" in proxy.stderr_text())
    assert "Traceback" not in proxy.stderr_text()
    assert proxy.fetch_admin("/healthz")[0] == 200
    status, ready = proxy.fetch_admin("/readyz")
    assert status == 503
    assert json.loads(ready)["not_ready"] == {"policy": "no rules were ever loaded"}
    response = proxy.get("https://api.test/one")
    assert (response.status, response.code) == (503, "policy_unavailable")
    assert response.header("retry-after") == "5"
    assert str(proxy.folder) not in response.body.decode()
    assert upstream.seen == []
    rules.mkdir(exist_ok=True)
    proxy.write_rules(ONE)
    soon(lambda: allows(proxy, "/one"))
    assert proxy.fetch_admin("/readyz")[0] == 200


def test_an_empty_folder_refuses_everything_and_warns(make_proxy: Make, upstream: Upstream) -> None:
    """It is a policy like any other: nothing is allowed."""
    proxy = make_proxy(ONE, start=False)
    (proxy.folder / "rules" / "rules.yaml").rename(proxy.folder / "rules" / "rules.yml")
    proxy.start()
    wait_for(lambda: "everything is refused" in proxy.stderr_text())
    assert "rules.yml: warning: is not read" in proxy.stderr_text()
    assert proxy.fetch_admin("/readyz")[0] == 200
    assert proxy.get("https://api.test/one").code == "no_rule"
    assert upstream.seen == []
