"""docs/sandboxes/containers.md: proxy and sandbox in one network namespace, told apart by their users."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import dns.message
import pytest
import trustme
import yaml

from tests.harness import PATIENCE, ROOT, Proxy, Upstream, server_context
from tests.namespaces import InsideUpstream, Namespace
from tests.sandboxes.recipe import RULES, Dnsmasq, blocks, curl, replaced

(FIREWALL,) = blocks("containers.md", "nft")
(COMPOSE,) = blocks("containers.md", "yaml")
SANDBOX = "1000"  # its user
WORLD = "198.51.100.1"
LISTENER = '{address: "transparent@127.0.0.1:8081", agent: coder-1}'

type Ask = Callable[..., str]


@pytest.fixture(scope="module")
def world(lane: str) -> Iterator[Namespace]:
    with contextlib.closing(Namespace()) as namespace:
        yield namespace


@pytest.fixture(scope="module")
def shared(world: Namespace) -> Iterator[Namespace]:
    """The namespace of both; like a container's, it has a way to the world."""
    with contextlib.closing(Namespace()) as namespace:
        pair = ("type", "veth", "peer", "name", "in", "netns", str(world.pid))
        namespace.run("ip", "link", "add", "out", *pair)
        for each, device, number in ((namespace, "out", 2), (world, "in", 1)):
            each.run("ip", "address", "add", f"198.51.100.{number}/24", "dev", device)
            each.run("ip", "address", "add", f"fd98::{number}/64", "dev", device, "nodad")
            each.run("ip", "link", "set", device, "up")
        namespace.run("ip", "route", "add", "default", "via", WORLD)
        yield namespace


@pytest.fixture(scope="module")
def upstreams(shared: Namespace, upstream_ca: trustme.CA) -> Iterator[tuple[Upstream, Upstream]]:
    tls = server_context(upstream_ca, "api.test")
    with InsideUpstream(shared, tls) as upstream, InsideUpstream(shared, None) as plain:
        yield upstream, plain


@pytest.fixture(autouse=True)
def _reset(upstreams: tuple[Upstream, Upstream]) -> None:
    for each in upstreams:
        each.reset()


@pytest.fixture(scope="module")
def proxy(
    shared: Namespace, upstreams: tuple[Upstream, Upstream], make_proxy: Callable[..., Proxy], lane: str
) -> Iterator[Proxy]:
    """Here its user is root, for the image's 65532."""
    led = {"api.test:443": f"127.0.0.1:{upstreams[0].port}", "api.test:80": f"127.0.0.1:{upstreams[1].port}"}
    assert LISTENER in (ROOT / "docs/sandboxes/containers.md").read_text()
    listener = yaml.safe_load(replaced(LISTENER, "8081", "0"))
    proxy = make_proxy(RULES, led, lane=lane, listen=[listener], start=False)
    proxy.enter = shared.enter
    proxy.cli("agent", "add", "coder-1")
    proxy.start()
    assert shutil.which("nft"), "nft is missing: run scripts/test as root, which installs it"
    firewall = replaced(replaced(FIREWALL, "8081", str(proxy.listeners[0][1])), "65532", str(os.getuid()))
    shared.run("nft", "-f", "-", stdin=firewall)
    line = next(line for line in COMPOSE.splitlines() if "exec dnsmasq" in line)
    names = Dnsmasq(shared, line.strip().removeprefix("exec "))
    yield proxy
    names.close()
    proxy.stop()


@pytest.fixture
def ask(shared: Namespace, proxy: Proxy) -> Iterator[Ask]:
    """A curl of the sandbox's user, with a name server somewhere in the world."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copy(proxy.folder / "certs/ca.pem", folder)
        (folder / "ca.pem").chmod(0o644)
        yield lambda *words: curl(shared, folder, "198.51.100.53", *words, user=SANDBOX)


def test_a_client_that_ignores_the_variables_is_caught(
    ask: Ask, proxy: Proxy, upstreams: tuple[Upstream, Upstream]
) -> None:
    assert ask("https://api.test/tls").endswith(" 200")
    assert ask("http://api.test/plain").endswith(" 200")
    assert [seen.target for each in upstreams for seen in each.seen] == ["/tls", "/plain"]
    line = proxy.audit(path="/tls")[-1]
    assert (line["agent"], line["identity"]) == ("coder-1", ["listener"])


def test_what_no_rule_allows_is_refused_to_be_read(ask: Ask, upstreams: tuple[Upstream, Upstream]) -> None:
    assert '"no_rule"' in ask("https://elsewhere.test/")
    assert '"no_rule"' in ask("https://api.test/", "-X", "DELETE")
    assert upstreams[0].seen == []


def test_nothing_of_the_shared_loopback_is_reached(
    ask: Ask, proxy: Proxy, upstreams: tuple[Upstream, Upstream]
) -> None:
    """The admin endpoint, a service of the sidecar, the listener by its own port; by any address of the namespace."""
    ports = [proxy.admin.rpartition(":")[2], upstreams[1].port, proxy.listeners[0][1], 5354]
    for port in ports:
        for address in ("127.0.0.1", "127.9.9.9", "198.51.100.2", "[::1]", "203.0.113.1"):
            assert ask(f"http://{address}:{port}/", "--connect-timeout", "1") == "000"
    assert upstreams[1].connections == 0


SEND = """
import os, socket, sys
user, host, port, text = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), bytes.fromhex(sys.argv[4])
os.setgid(user)
os.setuid(user)
made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
made.settimeout(10)
try:
    made.sendto(text, (host, port))
    print(made.recv(512).hex() if len(sys.argv) > 5 else "sent")
except OSError as error:
    print(type(error).__name__)
"""


def send(namespace: Namespace, user: str, host: str, port: int, text: bytes, *answer: str) -> str:
    """What comes of a datagram that a user sends."""
    return namespace.run(sys.executable, "-I", "-c", SEND, user, host, str(port), text.hex(), *answer).stdout.strip()


def listening(world: Namespace, host: str, port: int) -> socket.socket:
    """Somebody in the world who hears datagrams."""

    def make() -> socket.socket:
        made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        made.settimeout(PATIENCE)
        made.bind((host, port))
        return made

    return world.inside(make)


@pytest.mark.parametrize("host", [WORLD, "fd98::1"])
@pytest.mark.parametrize("port", [123, 443])
def test_no_datagram_leaves(shared: Namespace, world: Namespace, proxy: Proxy, host: str, port: int) -> None:
    """What the world hears first is what the proxy's user sent after the sandbox."""
    with listening(world, host, port) as heard:
        assert send(shared, SANDBOX, host, port, b"sandbox") == "PermissionError"
        assert send(shared, str(os.getuid()), host, port, b"proxy") == "sent"
        assert heard.recv(100) == b"proxy"


def test_names_are_asked_of_nobody(shared: Namespace, world: Namespace, proxy: Proxy) -> None:
    """Whichever name server the sandbox asks, the recipe's answers, which asks no other."""
    query = dns.message.make_query("secret.attacker.test", "A")
    with listening(world, WORLD, 53) as heard:
        answer = dns.message.from_wire(bytes.fromhex(send(shared, SANDBOX, WORLD, 53, query.to_wire(), "answer")))
        assert [each.to_text() for each in answer.answer[0]] == ["203.0.113.1"]
        assert send(shared, str(os.getuid()), WORLD, 53, b"proxy") == "sent"
        assert heard.recv(100) == b"proxy"


def test_the_compose_file_of_the_page_keeps_the_sandbox_from_becoming_the_proxy(tmp_path: Path) -> None:
    services = yaml.safe_load(COMPOSE)["services"]
    assert services["agent"]["network_mode"] == services["proxy"]["network_mode"] == "service:network"
    assert services["agent"]["user"] not in ("0:0", "65532:65532")
    assert services["agent"]["cap_drop"] == ["ALL"]
    assert services["agent"]["security_opt"] == ["no-new-privileges:true"]
    assert "USER 65532:65532" in (ROOT / "Dockerfile").read_text()
    assert services["agent"]["depends_on"]["proxy"] == {"condition": "service_healthy"}
    assert services["proxy"]["depends_on"]["network"] == {"condition": "service_healthy"}
    path = tmp_path / "compose.yaml"
    path.write_text(COMPOSE)
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
