"""`sallyport exec`: real clients in a real jail, whose only way out is the proxy."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import PATIENCE, Proxy, Upstream, wait_for

pytestmark = pytest.mark.slow

RULES = """
version: 1
rules:
  - name: coder
    agents: [coder-1]
    match: {host: api.test}
    action: allow
    inject: [{credential: key, as: bearer}]
  - {name: plain, match: {host: api.test, scheme: http}, action: allow}
  - {name: passing, agents: ["passing-*"], match: {host: other.test}, action: allow}
"""
SECRET = "sk-0123456789abcdefghij"
GO = """
package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
)

func main() {
	client := &http.Client{Transport: &http.Transport{}} // no Proxy: it ignores the variables
	answer, err := client.Get(os.Args[1])
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	body, _ := io.ReadAll(answer.Body)
	fmt.Println(answer.StatusCode, string(body))
}
"""
JAVA = """
import java.net.URI;
import java.net.http.*;

class Fetch {
    public static void main(String[] words) throws Exception {
        var request = HttpRequest.newBuilder(URI.create(words[0])).build();
        var answer = HttpClient.newHttpClient().send(request, HttpResponse.BodyHandlers.ofString());
        System.out.println(answer.statusCode());
    }
}
"""

type Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def proxy(lane: str, make_proxy: Callable[..., Proxy]) -> Proxy:
    proxy = make_proxy(RULES, lane=lane)
    proxy.agent("coder-1")
    proxy.credential("key", SECRET, "--host", "api.test")
    return proxy


@pytest.fixture
def start(proxy: Proxy, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Begins a command in a jail, from an empty folder."""
    begun: list[subprocess.Popen[str]] = []

    def start(*words: str, flags: tuple[str, ...] = ("--agent", "coder-1")) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "proxy", "exec", "--config", str(proxy.config), *flags, "--", *words],
            cwd=tmp_path,
            env={**proxy.environment, "SECRET_OF_THE_SHELL": SECRET},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        begun.append(process)
        return process

    yield start
    for process in begun:
        process.kill()
        process.communicate()


@pytest.fixture
def jailed(start: Callable[..., subprocess.Popen[str]], proxy: Proxy) -> Run:
    """Runs a command in a jail to its end."""

    def run(*words: str, expect: int = 0, **options: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        process = start(*words, **options)
        out, err = process.communicate(timeout=4 * PATIENCE)
        assert process.returncode == expect, f"{words}\n{out}\n{err}\n{proxy.stderr_text()}"
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    return run


@pytest.fixture
def python(jailed: Run) -> Callable[[str], str]:
    """Runs Python in a jail; what it printed."""
    return lambda code: jailed(sys.executable, "-I", "-c", textwrap.dedent(code)).stdout


@pytest.fixture(scope="session")
def go_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A static binary that knows of no proxy."""
    folder = tmp_path_factory.mktemp("go")
    (folder / "fetch.go").write_text(GO)
    environment = {**os.environ, "CGO_ENABLED": "0", "GO111MODULE": "off", "GOFLAGS": ""}
    subprocess.run(["go", "build", "-o", "fetch", "fetch.go"], cwd=folder, env=environment, check=True)
    return folder / "fetch"


def authorized(upstream: Upstream) -> bool:
    """Whether exactly one request arrived, with the credential that the jail never saw."""
    return [seen.header("authorization") for seen in upstream.seen] == [[f"Bearer {SECRET}"]]


# Clients


def test_curl_goes_by_the_variables(jailed: Run, upstream: Upstream) -> None:
    assert jailed("curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "https://api.test/v1").stdout == "200"
    assert authorized(upstream)


def test_a_refusal_is_read_in_the_jail(jailed: Run, upstream: Upstream) -> None:
    error = json.loads(jailed("curl", "-sS", "https://other.test/").stdout)["error"]
    assert (error["code"], error["agent"]) == ("no_rule", "coder-1")
    assert upstream.seen == []


def test_node_20_ignores_the_variables_and_goes_by_the_proxy(jailed: Run, upstream: Upstream) -> None:
    node = shutil.which("node", path="/usr/bin:/usr/local/bin")
    assert node, "apt-get install nodejs"
    code = "fetch('https://api.test/v1').then(answer => console.log(answer.status))"
    assert jailed("env", "-u", "NODE_USE_ENV_PROXY", node, "-e", code).stdout == "200\n"
    assert authorized(upstream)


def test_a_static_binary_goes_by_the_proxy(jailed: Run, go_client: Path, upstream: Upstream) -> None:
    flags = ("--agent", "coder-1", "--mount", f"{go_client}:/run/fetch:ro")
    assert jailed("/run/fetch", "https://api.test/v1", flags=flags).stdout.startswith("200 ")
    assert authorized(upstream)


def test_plain_http_goes_by_the_proxy(jailed: Run, go_client: Path, plain_upstream: Upstream) -> None:
    flags = ("--agent", "coder-1", "--mount", f"{go_client}:/run/fetch:ro")
    assert jailed("/run/fetch", "http://api.test/plain", flags=flags).stdout.startswith("200 ")
    assert [seen.target for seen in plain_upstream.seen] == ["/plain"]


def test_java_goes_by_the_proxy_and_needs_no_credentials_for_it(
    jailed: Run, upstream: Upstream, tmp_path: Path
) -> None:
    (tmp_path / "Fetch.java").write_text(JAVA)
    assert jailed("java", "Fetch.java", "https://api.test/v1").stdout == "200\n"
    assert authorized(upstream)


def test_git_is_answered(jailed: Run, upstream: Upstream) -> None:
    result = jailed("git", "ls-remote", "https://other.test/repo", expect=128)
    assert "403" in result.stderr
    assert upstream.seen == []


def test_it_is_on_record_as_the_agent_of_the_jail(jailed: Run, proxy: Proxy, upstream: Upstream) -> None:
    jailed("curl", "-sS", "https://api.test/on-record")
    line = proxy.audit(path="/on-record")[0]
    assert (line["agent"], line["identity"], line["listener"]) == ("coder-1", ["listener"], "exec")


def test_a_token_of_another_agent_is_a_conflict(jailed: Run, proxy: Proxy, upstream: Upstream) -> None:
    token = proxy.agent("coder-2")
    by = f"http://coder-2:{token}@198.18.0.1:8080"
    code = jailed("curl", "-sS", "-x", by, "-w", "%{http_connect}", "https://api.test/", expect=56).stdout
    assert code == "407"
    assert upstream.seen == []


# No way round

ANYWHERE = [("1.1.1.1", 443), ("10.0.0.1", 80), ("169.254.169.254", 80), ("127.0.0.1", 9), ("198.18.0.1", 22)]


def test_raw_sockets_of_the_jail_reach_nothing(python: Callable[[str], str]) -> None:
    """TCP, UDP, IPv6 and the host's own ports; nor may it send raw packets or change its network."""
    assert (
        python(f"""
        import socket

        for host, port in {ANYWHERE!r}:
            try:
                socket.create_connection((host, port), 3)
                print("connected to", host)
            except OSError:
                pass
        for family, kind, host in ((10, 1, "2606:4700::1111"), (10, 2, "2606:4700::1111"), (2, 2, "8.8.8.8")):
            with socket.socket(family, kind) as sock:
                try:
                    sock.connect((host, 53))
                    sock.send(b"anybody?")
                    print("sent to", host)
                except OSError:
                    pass
        for family, kind, number in ((2, 3, 1), (17, 3, 0x300), (16, 3, 15)):
            try:
                sock = socket.socket(family, kind, number)
                sock.bind((0, 0)) if family == 16 else None
                print("raw socket", family) if family != 16 else None
            except OSError:
                pass
        """)
        == ""
    )


def test_the_ports_of_the_host_are_not_those_of_the_jail(python: Callable[[str], str], proxy: Proxy) -> None:
    admin, port = proxy.admin.rpartition(":")[2], proxy.address[1]
    assert (
        python(f"""
        import socket

        for port in ({admin}, {port}):
            try:
                socket.create_connection(("127.0.0.1", port), 3)
                print("connected to", port)
            except OSError:
                pass
        """)
        == ""
    )


def test_every_name_resolves_and_carries_nothing_out(python: Callable[[str], str]) -> None:
    """The address is the same each time, and of the range that leads to the proxy."""
    names = python("""
        import socket

        for name in ("a-secret.attacker.test", "a-secret.attacker.test", "other.example"):
            print(socket.gethostbyname(name))
        """).split()
    assert names[0] == names[1] != names[2]
    assert all(name.startswith(("198.18.", "198.19.")) for name in names)


def test_what_is_no_tls_and_no_http_ends(python: Callable[[str], str], upstream: Upstream) -> None:
    """On the ports where clients come that know of no proxy."""
    said = python("""
        import socket

        for port in (80, 443):
            with socket.create_connection(("api.test", port), 5) as sock:
                sock.sendall(b"SSH-2.0-x\\r\\n\\r\\n")
                print(sock.recv(12))
        """)
    assert set(said.split("\n")) <= {"b'HTTP/1.1 400'", "b''", ""}
    assert upstream.seen == []


# Files


def test_nothing_of_the_proxy_is_in_the_jail(jailed: Run, proxy: Proxy) -> None:
    """Not its state, key, rules and settings; only what its clients must trust."""
    found = jailed("find", str(proxy.folder), "-type", "f").stdout.split()
    assert {Path(name).name for name in found} == {"ca-bundle.pem", "ca-bundle.p12", "wgetrc", "apt.conf"}


def test_started_among_the_proxys_files_it_sees_none_and_writes_nowhere(proxy: Proxy) -> None:
    code = "ls -A . certs; touch x 2>&1; cat sallyport.yaml certs/ca.key rules/*; env"
    result = proxy.cli("exec", "--agent", "coder-1", "--", "sh", "-c", code)
    assert "is not writable in the jail" in result.stderr
    assert not (proxy.folder / "x").exists()
    for word in ("PRIVATE KEY", "version: 1", "admin:", "valkey", "ca.key\n"):
        assert word not in result.stdout


def test_the_folder_it_was_started_in_is_its_own(jailed: Run, tmp_path: Path) -> None:
    name = f"x-{uuid.uuid4()}"
    jailed("sh", "-c", f"echo hello > made; echo there > $HOME/{name}; echo there > /tmp/{name}")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert not Path(f"/tmp/{name}").exists()


def test_the_system_is_read_only(jailed: Run) -> None:
    jailed("sh", "-c", "touch /etc/x || touch /usr/x || touch /usr/bin/x", expect=1)
    jailed("sh", "-c", "echo core > /proc/sys/kernel/core_pattern", expect=2)
    jailed("sh", "-c", "echo h > /proc/sysrq-trigger", expect=2)
    jailed("sh", "-c", "umount /proc || mount -t tmpfs x /mnt", expect=32)


def test_mounts_are_there_to_write_or_to_read(
    jailed: Run, tmp_path_factory: pytest.TempPathFactory, proxy: Proxy
) -> None:
    folder = tmp_path_factory.mktemp("data")
    (folder / "in").write_text("hello")
    flags = ("--agent", "coder-1", "--mount", f"{folder}:/data", "--mount", f"{folder}:/fixed:ro")
    assert jailed("sh", "-c", "cat /fixed/in; echo there > /data/out; touch /fixed/no", expect=1, flags=flags).stdout
    assert (folder / "out").read_text() == "there\n"
    assert not (folder / "no").exists()
    result = jailed("true", expect=1, flags=("--agent", "coder-1", "--mount", str(proxy.folder)))
    assert "the proxy's own" in result.stderr


def test_only_variables_that_were_asked_for_are_passed_on(jailed: Run) -> None:
    assert SECRET not in jailed("env").stdout
    assert f"SECRET_OF_THE_SHELL={SECRET}" in jailed(
        "env", flags=("--agent", "coder-1", "--env", "SECRET_OF_THE_SHELL")
    ).stdout.split("\n")


def test_what_the_shell_has_open_stays_outside(proxy: Proxy, tmp_path: Path) -> None:
    """By the descriptor of a folder a command would leave its jail."""
    folder = os.open(proxy.folder, os.O_RDONLY)
    words = ["exec", "--config", str(proxy.config), "--agent", "coder-1", "--", "sh", "-c"]
    try:
        result = subprocess.run(
            [sys.executable, "-P", "-m", "proxy", *words, "for fd in /proc/$$/fd/*; do readlink $fd || :; done"],
            cwd=tmp_path, env=proxy.environment, pass_fds=[folder], stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=PATIENCE, check=True,
        )  # fmt: skip
    finally:
        os.close(folder)
    kinds = {line.partition(":")[0] for line in result.stdout.split()}
    assert kinds == {"/dev/null", "pipe"}


def test_a_jail_needs_no_token(jailed: Run) -> None:
    assert "slp_" not in jailed("env").stdout


# Its life


def test_the_exit_status_and_what_was_said_pass_through(jailed: Run) -> None:
    result = jailed("sh", "-c", "echo out; echo err >&2; exit 7", expect=7)
    assert (result.stdout, result.stderr) == ("out\n", "err\n")
    jailed("sh", "-c", "kill -KILL $$", expect=128 + signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_pass_through(start: Callable[..., subprocess.Popen[str]], number: signal.Signals) -> None:
    name = number.name.removeprefix("SIG")
    process = start("sh", "-c", f"trap 'echo {name}; exit 5' {name}; echo ready; while :; do sleep 0.05; done")
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=PATIENCE)[0] == f"{name}\n"
    assert process.returncode == 5


def test_the_jail_dies_with_its_parent(start: Callable[..., subprocess.Popen[str]]) -> None:
    """kill -9 of `exec`: bubblewrap and the command go too."""
    process = start("sh", "-c", "echo ready; sleep 1000")
    assert process.stdout
    process.stdout.readline()
    bwrap = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
    inside = [int(word) for word in Path(f"/proc/{bwrap}/task/{bwrap}/children").read_text().split()]
    process.kill()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in (bwrap, *inside)), "the end of the jail")


def test_an_agent_with_a_ttl_is_there_while_the_command_runs(jailed: Run, proxy: Proxy, upstream: Upstream) -> None:
    flags = ("--agent", "passing-1", "--ttl", "1h")
    assert jailed("curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "https://other.test/", flags=flags).stdout
    assert len(upstream.seen) == 1
    wait_for(lambda: "passing-1" not in proxy.cli("agent", "list").stdout, "the end of the agent")


def test_a_temporary_agent_can_be_had_again_at_once(jailed: Run) -> None:
    """It is gone when `exec` ends, so the next one is not taken for registered, nor ended with the first."""
    for _ in range(5):
        assert jailed("true", flags=("--agent", "passing-2", "--ttl", "1h")).stderr == ""


def test_a_temporary_agent_lives_as_long_as_its_last_command(
    jailed: Run, start: Callable[..., subprocess.Popen[str]], tmp_path: Path, upstream: Upstream
) -> None:
    flags = ("--agent", "passing-3", "--ttl", "1h")
    code = "echo ready; while [ ! -e go ]; do sleep 0.05; done; curl -sS https://other.test/ -o /dev/null"
    process = start("sh", "-c", code + " -w '%{http_code}'", flags=flags)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    jailed("true", flags=flags)
    (tmp_path / "go").touch()
    assert process.communicate(timeout=PATIENCE)[0] == "200"


def test_a_temporary_agent_ends_with_a_jail_that_is_killed(
    start: Callable[..., subprocess.Popen[str]], proxy: Proxy
) -> None:
    process = start("sh", "-c", "echo ready; sleep 1000", flags=("--agent", "passing-4", "--ttl", "1h"))
    assert process.stdout
    process.stdout.readline()
    process.kill()
    wait_for(lambda: "passing-4" not in proxy.cli("agent", "list").stdout, "the end of the agent")


def test_an_agent_that_is_not_registered_is_told_how(jailed: Run) -> None:
    result = jailed("true", expect=1, flags=("--agent", "nobody-1"))
    assert "sallyport agent add nobody-1, or give --ttl" in result.stderr


def test_a_killed_agent_is_cut_and_refused(jailed: Run, proxy: Proxy, upstream: Upstream) -> None:
    proxy.agent("coder-3")
    proxy.cli("agent", "kill", "coder-3")
    flags = ("--agent", "coder-3")
    wait_for(lambda: "agent_killed" in jailed("curl", "-sS", "https://api.test/", flags=flags).stdout, "the kill")
    assert upstream.seen == []


def test_a_jail_outlives_the_proxy_and_is_served_by_the_next(
    proxy: Proxy, start: Callable[..., subprocess.Popen[str]], tmp_path: Path, upstream: Upstream
) -> None:
    code = (
        "echo ready; while [ ! -e go ]; do sleep 0.05; done; curl -sS https://api.test/ -o /dev/null -w '%{http_code}'"
    )
    process = start("sh", "-c", code)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    proxy.stop()
    proxy.start()
    (tmp_path / "go").touch()
    assert process.communicate(timeout=PATIENCE)[0] == "200"
    assert authorized(upstream)


def test_without_a_proxy_the_next_step_is_told(make_proxy: Callable[..., Proxy]) -> None:
    idle = make_proxy(RULES, start=False)
    result = idle.cli("exec", "--agent", "coder-1", "--", "true", check=False)
    assert (result.returncode, "start one with `sallyport run`" in result.stderr) == (1, True)


def test_every_worker_serves_a_jail_and_so_do_their_successors(
    make_proxy: Callable[..., Proxy], upstream: Upstream, tmp_path: Path
) -> None:
    workers = make_proxy(RULES, lane="fast", workers=2)
    workers.cli("agent", "add", "coder-1")
    workers.credential("key", SECRET, "--host", "api.test")
    six = "for _ in 1 2 3 4 5 6; do curl -sS https://api.test/ -o /dev/null -w '%{http_code} '; done; echo;"
    words = ["exec", "--config", str(workers.config), "--agent", "coder-1", "--", "sh", "-c"]
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "proxy", *words, f"{six} while [ ! -e go ]; do sleep 0.05; done; {six}"],
        cwd=tmp_path, env=workers.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout
        assert process.stdout.readline() == "200 " * 6 + "\n"
        before = set((workers.folder / ".sallyport" / "exec").iterdir())
        workers.cli("reload")
        wait_for(lambda: before.isdisjoint((workers.folder / ".sallyport" / "exec").iterdir()), "the new workers")
        (tmp_path / "go").touch()
        assert process.communicate(timeout=PATIENCE)[0] == "200 " * 6 + "\n"
    assert len(upstream.seen) == 12
