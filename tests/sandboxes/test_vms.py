"""docs/sandboxes/vms.md, with network namespaces for the VMs and veth pairs for their taps."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dns.message
import pytest
import trustme
import yaml

from tests.harness import PATIENCE, Proxy, Upstream, server_context, wait_for
from tests.namespaces import InsideUpstream, Namespace
from tests.sandboxes.recipe import RULES, Dnsmasq, blocks, curl, replaced

ONCE, EACH, CERTIFICATES, CURL = blocks("vms.md", "sh")
TRANSPARENT, TLS = (yaml.safe_load(text) for text in blocks("vms.md", "yaml"))
TAP = '    ip tuntap add dev "$1" mode tap\n'


def listens(settings: dict[str, Any], port: str) -> list[Any]:
    """The listeners of the page on a port of the kernel's choice."""
    return list(yaml.safe_load(replaced(yaml.safe_dump(settings["listen"]), f":{port}", ":0")))


def datagrams(address: tuple[str, int]) -> socket.socket:
    """A UDP socket there."""
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.settimeout(PATIENCE)
    made.bind(address)
    return made


class Host:
    """A host with two VMs, set up as the page says but for the taps, for which veth pairs stand."""

    def __init__(self) -> None:
        self.namespace = Namespace()
        self.vms: dict[str, Namespace] = {}
        self._dnsmasq: Dnsmasq | None = None

    def add_vms(self) -> None:
        """The block for each VM."""
        for name in ("vm-1", "vm-2"):
            vm = self.vms[name] = Namespace()
            pair = ("type", "veth", "peer", "name", "eth0", "netns", str(vm.pid))
            self.namespace.run("ip", "link", "add", name, *pair)
        self.namespace.run("sh", "-eu", stdin=replaced(EACH, TAP, ""))
        for number, vm in enumerate(self.vms.values(), 1):
            vm.run("ip", "address", "add", f"10.78.{number}.2/30", "dev", "eth0")
            vm.run("ip", "link", "set", "eth0", "up")
            vm.run("ip", "route", "add", "default", "via", f"10.78.{number}.1")

    def protect(self, port: int) -> None:
        """The block for once."""
        firewall, mark, names = replaced(ONCE, "8081", str(port)).partition("# Every name")
        assert mark
        self.namespace.run("sh", "-eu", stdin=firewall)
        self._dnsmasq = Dnsmasq(self.namespace, names.splitlines()[1])

    def close(self) -> None:
        """End all of it."""
        if self._dnsmasq:
            self._dnsmasq.close()
        for namespace in (*self.vms.values(), self.namespace):
            namespace.close()


@pytest.fixture(scope="module")
def host(lane: str) -> Iterator[Host]:
    host = Host()
    try:
        host.add_vms()
        yield host
    finally:
        host.close()


@pytest.fixture(scope="module")
def upstreams(host: Host, upstream_ca: trustme.CA) -> Iterator[tuple[Upstream, Upstream]]:
    tls = server_context(upstream_ca, "api.test")
    with InsideUpstream(host.namespace, tls) as upstream, InsideUpstream(host.namespace, None) as plain:
        yield upstream, plain


@pytest.fixture(autouse=True)
def _reset(upstreams: tuple[Upstream, Upstream]) -> None:
    for each in upstreams:
        each.reset()


@pytest.fixture(scope="module")
def proxy(
    host: Host, upstreams: tuple[Upstream, Upstream], make_proxy: Callable[..., Proxy], lane: str
) -> Iterator[Proxy]:
    led = {"api.test:443": f"127.0.0.1:{upstreams[0].port}", "api.test:80": f"127.0.0.1:{upstreams[1].port}"}
    listen = listens(TRANSPARENT, "8081")
    proxy = make_proxy(RULES, led, lane=lane, listen=listen, identity=TRANSPARENT["identity"], start=False)
    proxy.enter = host.namespace.enter
    for name in host.vms:
        proxy.cli("agent", "add", name)
    proxy.start()
    host.protect(proxy.listeners[0][1])
    yield proxy
    proxy.stop()


@pytest.fixture
def ask(host: Host, proxy: Proxy, tmp_path: Path) -> Callable[..., str]:
    """A curl in a VM, with the page's name server."""
    shutil.copy(proxy.folder / "certs/ca.pem", tmp_path)

    def ask(name: str, *words: str) -> str:
        return curl(host.vms[name], tmp_path, f"10.78.{name[-1]}.1", *words)

    return ask


type Ask = Callable[..., str]


def test_each_vm_is_an_agent_without_knowing_of_a_proxy(
    ask: Ask, proxy: Proxy, upstreams: tuple[Upstream, Upstream]
) -> None:
    for name in ("vm-1", "vm-2"):
        assert ask(name, f"https://api.test/{name}").endswith(" 200")
        line = proxy.audit(path=f"/{name}")[-1]
        assert (line["agent"], line["identity"]) == (name, ["network"])
    assert ask("vm-1", "http://api.test/plain").endswith(" 200")
    assert [seen.target for each in upstreams for seen in each.seen] == ["/vm-1", "/vm-2", "/plain"]


def test_what_no_rule_allows_is_refused_to_be_read(ask: Ask, upstreams: tuple[Upstream, Upstream]) -> None:
    assert '"no_rule"' in ask("vm-1", "https://api.test/x", "-X", "DELETE")
    assert '"no_rule"' in ask("vm-1", "https://elsewhere.test/")
    assert upstreams[0].seen == []


def test_a_killed_vm_is_refused_and_its_neighbour_is_not(ask: Ask, proxy: Proxy) -> None:
    proxy.cli("agent", "kill", "vm-1")
    try:
        wait_for(lambda: '"agent_killed"' in ask("vm-1", "https://api.test/x"), "the kill")
        assert ask("vm-2", "https://api.test/x").endswith(" 200")
    finally:
        proxy.cli("agent", "revive", "vm-1")
    wait_for(lambda: ask("vm-1", "https://api.test/x").endswith(" 200"), "the revival")


def test_a_vm_with_its_neighbours_address_is_not_heard(
    ask: Ask, host: Host, upstreams: tuple[Upstream, Upstream]
) -> None:
    """Not even a single packet, whose answer the neighbour would get; that has its own, and no other."""
    thief, owner = host.vms["vm-2"], host.vms["vm-1"]
    mine = owner.inside(lambda: datagrams(("10.78.1.2", 0)))
    thief.run("ip", "address", "add", "10.78.1.2/32", "dev", "lo")
    try:
        resolved = ("--resolve", "api.test:443:203.0.113.1", "--connect-timeout", "0.5")
        assert ask("vm-2", "https://api.test/stolen", "--interface", "10.78.1.2", *resolved) == "000"
        with mine, thief.inside(lambda: datagrams(mine.getsockname())) as his:
            his.sendto(dns.message.make_query("his.test", "A", id=1).to_wire(), ("198.51.100.53", 53))
            mine.sendto(dns.message.make_query("mine.test", "A", id=2).to_wire(), ("198.51.100.53", 53))
            assert dns.message.from_wire(mine.recv(4096)).id == 2
    finally:
        thief.run("ip", "address", "del", "10.78.1.2/32", "dev", "lo")
    assert upstreams[0].seen == []


def test_nothing_else_of_the_host_or_of_other_vms_is_reached(
    ask: Ask, host: Host, proxy: Proxy, upstreams: tuple[Upstream, Upstream]
) -> None:
    """Its admin endpoint, a service, the listener by its own port, the neighbour; even where the host forwards."""
    host.namespace.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    neighbour = host.vms["vm-1"].inside(lambda: socket.create_server(("10.78.1.2", 0)))
    ports = [int(proxy.admin.rpartition(":")[2]), upstreams[1].port, proxy.listeners[0][1], neighbour.getsockname()[1]]
    with neighbour:
        for port in ports:
            for address in ("10.78.2.1", "10.78.1.1", "10.78.1.2"):
                assert ask("vm-2", f"http://{address}:{port}/", "--connect-timeout", "0.2") == "000"
    assert upstreams[1].connections == 0


def test_names_work_and_are_asked_of_nobody(host: Host, proxy: Proxy) -> None:
    """Whichever name server a VM asks, the page's answers, which asks no other."""
    code = """
import dns.message, dns.query, sys
query = dns.message.make_query("secret.attacker.test", "A")
print([each.to_text() for each in dns.query.udp(query, sys.argv[1], timeout=10).answer])
"""
    for server in ("10.78.1.1", "198.51.100.53"):
        assert "203.0.113.1" in host.vms["vm-1"].run(sys.executable, "-c", code, server).stdout


def test_ipv6_leads_nowhere(ask: Ask, host: Host) -> None:
    """The tap has none, whatever the VM gives itself."""
    vm = host.vms["vm-1"]
    vm.run("ip", "address", "add", "fd78::2/64", "dev", "eth0", "nodad")
    vm.run("ip", "-6", "route", "add", "default", "via", "fd78::1")
    try:
        assert ask("vm-1", "https://[2001:db8::9]/", "--connect-timeout", "0.3") == "000"
        assert "inet6" not in host.namespace.run("ip", "address", "show", "dev", "vm-1").stdout
    finally:
        vm.run("ip", "address", "del", "fd78::2/64", "dev", "eth0")


# On another host


def test_a_remote_sandbox_is_known_by_its_certificate(
    make_proxy: Callable[..., Proxy], upstream: Upstream, tmp_path: Path, lane: str
) -> None:
    """With the page's openssl and curl."""
    authority, mark, certificate = CERTIFICATES.partition("openssl req -newkey")
    for script in (authority, mark + certificate, (mark + certificate).replace("vm-3", "vm-4")):
        make = ["sh", "-eu", "-c", script]
        subprocess.run(make, cwd=tmp_path, capture_output=True, check=True, timeout=PATIENCE)
    mtls = {**TLS["identity"]["mtls"], "ca": str(tmp_path / TLS["identity"]["mtls"]["ca"])}
    proxy = make_proxy(RULES, lane=lane, listen=listens(TLS, "8443"), identity={"mtls": mtls})
    proxy.cli("agent", "add", "vm-3")
    shutil.copy(proxy.folder / "certs/ca.pem", tmp_path)
    words = replaced(CURL, "proxy.example.com:8443", f"127.0.0.1:{proxy.listeners[0][1]}")
    words = replaced(words, "https://api.example.com/", "https://api.test/remote").strip()
    words += " -sS -o /dev/null -w '%{http_code} %{http_connect}'"

    def run(script: str) -> str:
        command = ["sh", "-c", script]
        done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, check=False, timeout=PATIENCE)
        return done.stdout

    wait_for(lambda: run(words) == "200 200", "the agent")
    line = proxy.audit(path="/remote")[-1]
    assert (line["agent"], line["identity"]) == ("vm-3", ["mtls"])
    assert run(words.replace("vm-3", "vm-4")) == "000 407"  # nobody registered it
    assert run(replaced(words, "--proxy-cert vm-3.pem --proxy-key vm-3.key", "")) == "000 000"
    assert [seen.target for seen in upstream.seen] == ["/remote"]
