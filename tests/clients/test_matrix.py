"""Every row of the table in docs/clients.md, by the real client.

As docs/identity.md sets it up: the sandbox is a network namespace whose only way out is the proxy, and what goes to a
web port is redirected to a transparent listener. So a client that uses no proxy arrives there, and is told apart.
"""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from websockets.sync.server import ServerConnection, serve

from proxy.sandboxenv import CA_VARIABLES
from tests.clients import registries
from tests.clients.matrix import CHALLENGED, CLIENTS, NEVER, Client
from tests.clients.sandbox import AGENT, exported, tool
from tests.harness import Handler, Proxy, Reply, Seen, Upstream, server_context
from tests.namespaces import ROUTER4, InsideUpstream, Namespace, Pair

HOSTS: dict[str, Handler] = {
    "api.test": lambda _: Reply(headers=[("content-type", "text/html")], body=b"<p>It came through</p>"),
    "pypi.test": registries.pypi,
    "registry.test": registries.npm,
    "crates.test": registries.crates,
    "debian.test": registries.debian,
    "git.test": registries.git,
}
NAMES = (*HOSTS, "grpc.test", "ws.test")
RULES = """
version: 1
rules:
  - {name: chat, match: {host: ws.test, websocket: true}, action: allow}
  - {name: grpc, match: {host: grpc.test, method: POST, path: /test.Echo/*}, action: allow}
  - name: web
    match: {host: [api.test, pypi.test, registry.test, crates.test, debian.test, git.test], method: GET}
    action: allow
"""
ANYWHERE = "203.0.113.9"  # an address for documentation, which nobody has (RFC 5737)
IN_THE_SANDBOX = 'mount --bind "$1" /etc/hosts; shift; exec "$@"'
BY_NAME = [pytest.param(client, id=client.name) for client in CLIENTS]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs that are compiled."""
    folder, sources = tmp_path_factory.mktemp("built"), Path(__file__).parent
    for command in (
        (tool("go"), "build", "-o", folder / "fetch", sources / "fetch.go"),
        (tool("javac"), "-d", folder, sources / "Fetch.java"),
    ):
        environment = {**os.environ, "CGO_ENABLED": "0", "GO111MODULE": "off"}
        subprocess.run(command, env=environment, check=True)
    return folder


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


@pytest.fixture(scope="module")
def web(pair: Pair, upstream_ca: trustme.CA) -> Iterator[Upstream]:
    """Registries, a page and a repository."""
    with InsideUpstream(pair.router, server_context(upstream_ca, *HOSTS)) as upstream:
        yield upstream


def listening(namespace: Namespace) -> socket.socket:
    return namespace.inside(lambda: socket.create_server(("127.0.0.1", 0)))


@pytest.fixture(scope="module")
def websocket_port(pair: Pair, web: Upstream, upstream_ca: trustme.CA) -> Iterator[int]:
    """An echo over WebSocket that counts as seen by the web."""

    def echo(connection: ServerConnection) -> None:
        web.seen.append(Seen("GET", "/chat", [], b""))
        for message in connection:
            connection.send(message)

    sock = listening(pair.router)
    with serve(echo, sock=sock, ssl=server_context(upstream_ca, "ws.test")) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.socket.getsockname()[1]
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def grpc_port(pair: Pair, web: Upstream, upstream_ca: trustme.CA) -> Iterator[int]:
    """A gRPC service that says what it is told, once or in a stream."""

    def one(request: bytes, _: Any) -> bytes:
        web.seen.append(Seen("POST", "/test.Echo/One", [], request))
        return request

    def many(requests: Iterator[bytes], _: Any) -> Iterator[bytes]:
        yield from requests

    methods = {"One": grpc.unary_unary_rpc_method_handler(one), "Many": grpc.stream_stream_rpc_method_handler(many)}
    server = grpc.server(ThreadPoolExecutor(4), [grpc.method_handlers_generic_handler("test.Echo", methods)])
    leaf = upstream_ca.issue_cert("grpc.test")
    chain = b"".join(each.bytes() for each in leaf.cert_chain_pems)
    credentials = grpc.ssl_server_credentials([(leaf.private_key_pem.bytes(), chain)])
    port = pair.router.inside(lambda: server.add_secure_port("127.0.0.1:0", credentials))
    server.start()
    yield port
    server.stop(None).wait()


@dataclass
class Bench:
    """The sandbox, and what the proxy knows of who came out of it."""

    pair: Pair
    proxy: Proxy
    web: Upstream
    built: Path
    hosts: Path
    tokens: dict[str, str]  # what `agent env` exports for the listener where tokens count
    bound: dict[str, str]  # and for the one that is the agent's
    heard: int = 0  # so many audit lines were looked at
    output: str = field(default="", repr=False)

    def run(self, client: Client, home: Path, variables: dict[str, str], trusting: bool = True) -> bool:
        """Whether the client got what it wanted."""
        home.mkdir()
        self.web.seen.clear()
        if client.trust and trusting:
            tool("certutil")
            (home / "ca.pem").write_text((self.proxy.folder / "certs" / "ca.pem").read_text())
            self.shell(home, variables, "/bin/sh", "-euc", client.trust, check=True)
        done = self.shell(home, variables, *client.command(self.built))
        self.output = f"{done.stdout}\n{done.stderr}\n{self.proxy.stderr_text()}"
        return done.returncode == 0 and bool(self.web.seen)

    def shell(
        self, home: Path, variables: dict[str, str], *command: str | Path, check: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """A command in the sandbox, where every name leads to an address that nobody has."""
        own = {"PATH": os.environ["PATH"], "HOME": str(home)}
        own["RUSTUP_HOME"] = os.environ.get("RUSTUP_HOME", str(Path.home() / ".rustup"))  # where cargo is a shim
        return subprocess.run(
            [*self.pair.sandbox.enter, "unshare", "--mount", "sh", "-euc", IN_THE_SANDBOX, "sh", self.hosts, *command],
            cwd=home,
            env={**variables, **own},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=200,
            check=check,
            start_new_session=True,
        )

    def since(self, home: Path) -> list[dict[str, Any]]:
        """The audit lines about our hosts since the last call; lines are written in their order."""
        mark = f"/mark-{self.heard}"
        self.shell(home, self.tokens, tool("curl"), "-sSf", f"https://api.test{mark}", check=True)
        self.proxy.audit(path=mark)
        lines = self.proxy.audit()
        new, self.heard = lines[self.heard :], len(lines)
        return [line for line in new if line["host"] in NAMES and line["path"] != mark]


@pytest.fixture(scope="module")
def bench(
    lane: str,
    make_proxy: Callable[..., Proxy],
    pair: Pair,
    web: Upstream,
    websocket_port: int,
    grpc_port: int,
    built: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Bench]:
    upstreams = {**dict.fromkeys(HOSTS, web.port), "ws.test": websocket_port, "grpc.test": grpc_port}
    listen = [f"{ROUTER4}:0", *({"address": f"{kind}{ROUTER4}:0", "agent": AGENT} for kind in ("", "transparent@"))]
    led = {f"{name}:443": f"127.0.0.1:{port}" for name, port in upstreams.items()}
    proxy = make_proxy(RULES, led, start=False, lane=lane, listen=listen)
    proxy.enter = pair.router.enter
    proxy.cli("agent", "add", AGENT)
    proxy.start()
    pair.redirect(proxy.listeners[2][1], proxy.listeners[2][1])
    hosts = tmp_path_factory.mktemp("etc") / "hosts"
    hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{ANYWHERE} {name}\n" for name in NAMES))
    web.handler = lambda seen: HOSTS[seen.header("host")[0]](seen)
    exports = [
        exported(proxy, tmp_path_factory.mktemp("bin"), "--proxy", f"{ROUTER4}:{port}")
        for _, port in proxy.listeners[:2]
    ]
    yield Bench(pair, proxy, web, built, hosts, *exports)
    proxy.stop()
    pair.router.run("nft", "delete", "table", "inet", "sallyport")


@pytest.mark.parametrize("client", BY_NAME)
def test_a_client_does_as_the_table_says(bench: Bench, tmp_path: Path, client: Client) -> None:
    """Whether it comes by the proxy, and whether it shows who it is unasked, when asked, or never."""
    assert bench.run(client, tmp_path / "home", bench.tokens) == (client.login != NEVER), bench.output
    lines = bench.since(tmp_path)
    assert lines, bench.output
    ways = {line["listener"] for line in lines}
    assert ("transparent" in str(ways)) == (not client.login), lines
    asked = any(line["reason"] == "no_identity" for line in lines)
    assert asked == (client.login in (CHALLENGED, NEVER)), lines
    if client.login == NEVER:
        assert bench.run(client, tmp_path / "home-of-listener", bench.bound), bench.output


@pytest.mark.parametrize("lane", ["fast"], indirect=True)  # the certificates are the same in both
@pytest.mark.parametrize("client", BY_NAME)
def test_a_client_trusts_the_ca_by_that_alone(bench: Bench, tmp_path: Path, client: Client) -> None:
    """Each variable of the table is enough, and without all of them there is no trust, nor a request."""
    variables = bench.bound if client.login == NEVER else bench.tokens
    bare = {name: value for name, value in variables.items() if name not in {*CA_VARIABLES, "WGETRC", "APT_CONFIG"}}
    words = bare["JAVA_TOOL_OPTIONS"].split(" ")
    bare["JAVA_TOOL_OPTIONS"] = " ".join(word for word in words if "trustStore" not in word)
    assert not bench.run(client, tmp_path / "none", bare, trusting=False), bench.output
    assert bench.web.seen == []
    for name in client.ca or [""]:
        only = {**bare, name: variables[name]} if name else bare
        assert bench.run(client, tmp_path / f"home{name}", only), f"{name}: {bench.output}"


def test_the_node_that_heeds_no_variable_is_an_old_one() -> None:
    """The row of the table is about these."""
    version = subprocess.run([tool("node"), "--version"], capture_output=True, text=True, check=True).stdout
    assert version.startswith(("v18.", "v20.")), "the table wants Node.js 18 or 20 on PATH: apt-get install nodejs"
