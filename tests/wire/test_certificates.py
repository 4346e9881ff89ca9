"""The CA over the wire: strict clients accept what they are shown, through a rotation and with a CA for each agent."""

from __future__ import annotations

import json
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proxy.contexts import MAX_CONTEXTS
from tests.harness import PATIENCE, Connection, Proxy, Upstream, refused, wait_for

pytestmark = pytest.mark.slow
Make = Callable[..., Proxy]
RULES = """version: 1
rules:
  - {name: api, action: allow, match: {host: api.test}}
"""


@pytest.fixture
def proxy(make_proxy: Make, lane: str) -> Iterator[Proxy]:
    """One of its own: its CA changes."""
    proxy = make_proxy(RULES, lane=lane)
    proxy.agent()
    yield proxy
    proxy.stop()


def shown(proxy: Proxy, roots: Path, host: str = "api.test", agent: str = "coder-1") -> Connection:
    """A tunnel with TLS as strict as Python's can be; raises ssl.SSLError."""
    connection = proxy.connect()
    connection.send(f"CONNECT {host}:443 HTTP/1.1\r\nhost: {host}:443\r\n{proxy.auth(agent)}\r\n".encode())
    assert connection.response("CONNECT").status == 200
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.verify_flags &= ~ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(roots)
    connection.start_tls(context, host)
    return connection


def accepted(proxy: Proxy, roots: Path) -> bool:
    """Whether a sandbox that trusts `roots` alone gets an answer."""
    try:
        connection = shown(proxy, roots)
    except ssl.SSLError:
        return False
    connection.send(b"GET / HTTP/1.1\r\nhost: api.test\r\n\r\n")
    return connection.response().status == 200


def test_each_of_many_hosts_is_shown_its_own_certificate(proxy: Proxy) -> None:
    """More than are kept ready; the client checks the name."""
    for number in [*range(MAX_CONTEXTS + 20), 0, 1]:
        shown(proxy, proxy.folder / "certs" / "ca.pem", f"h{number}.test").close()


def curl(proxy: Proxy, roots: Path, host: str = "api.test") -> int:
    """The status of one request by curl, which trusts `roots` alone; 0 where TLS failed."""
    host_port = f"{proxy.address[0]}:{proxy.address[1]}"
    command = ["curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "--cacert", str(roots)]
    command += ["-x", f"http://coder-1:{proxy.tokens['coder-1']}@{host_port}", f"https://{host}/"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    return int(result.stdout)


def openssl(proxy: Proxy, roots: Path, folder: Path) -> str:
    """What `openssl s_client` says to the chain it is shown inside the tunnel."""
    (folder / "empty").mkdir(exist_ok=True)
    command = ["openssl", "s_client", "-proxy", f"{proxy.address[0]}:{proxy.address[1]}", "-proxy_user", "coder-1"]
    command += ["-proxy_pass", f"pass:{proxy.tokens['coder-1']}", "-connect", "api.test:443", "-servername", "api.test"]
    command += ["-CAfile", str(roots), "-no-CApath", "-no-CAstore", "-x509_strict", "-verify_hostname", "api.test"]
    result = subprocess.run(command, input="", capture_output=True, text=True, timeout=PATIENCE, check=False)
    return next(line for line in result.stdout.splitlines() if "Verify return code" in line).strip()


def saved(proxy: Proxy, path: Path, *words: str) -> Path:
    """What `sallyport ca export` prints, in a file."""
    path.write_text(proxy.cli("ca", "export", *words).stdout)
    return path


def test_sandboxes_go_on_while_the_ca_is_changed(proxy: Proxy, upstream: Upstream, tmp_path: Path) -> None:
    """With the old root alone until the overlap ends, with the new bundle from its first moment; nothing restarts."""
    old = saved(proxy, tmp_path / "old.pem")
    env = json.loads(proxy.cli("agent", "env", "coder-1", "--json").stdout)
    bundle = Path(env["SSL_CERT_FILE"])
    open_before = shown(proxy, old)
    first = open_before.sock.getpeercert(True)  # type: ignore[union-attr, attr-defined]
    proxy.cli("ca", "rotate")
    wait_for(lambda: shown(proxy, old).sock.getpeercert(True) != first, "the new CA")  # type: ignore[attr-defined]
    both = saved(proxy, tmp_path / "both.pem")
    assert both.read_text().count("BEGIN CERTIFICATE") == 2
    new = tmp_path / "new.pem"
    new.write_text(both.read_text()[: both.read_text().index("-----END") + len("-----END CERTIFICATE-----\n")])
    for roots in (old, new, both, bundle):
        assert accepted(proxy, roots), roots
        assert curl(proxy, roots) == 200
        assert openssl(proxy, roots, tmp_path) == "Verify return code: 0 (ok)"
    assert both.read_text().strip() in bundle.read_text(), "the bundle that sandboxes have mounted holds both"
    open_before.send(b"GET /before HTTP/1.1\r\nhost: api.test\r\n\r\n")
    assert open_before.response().status == 200
    assert upstream.seen[-1].target == "/before"

    proxy.cli("ca", "rotate", "--finish")
    wait_for(lambda: not accepted(proxy, old), "the end of the old CA")
    for roots in (new, both, bundle):
        assert accepted(proxy, roots), roots
    assert curl(proxy, old) == 0
    assert saved(proxy, tmp_path / "after.pem").read_text() == new.read_text()


def test_a_second_rotation_waits_for_the_first(proxy: Proxy) -> None:
    proxy.cli("ca", "rotate", "--overlap", "1h")
    for words, said in (
        ((), "a rotation is under way until"),
        (("--overlap", "soon"), "--overlap 'soon'"),
    ):
        result = proxy.cli("ca", "rotate", *words, check=False)
        assert result.returncode == 1
        assert said in result.stderr
        assert "Traceback" not in result.stderr


@pytest.fixture
def per_agent(make_proxy: Make, lane: str) -> Iterator[Proxy]:
    """Each agent has a CA of its own."""
    rules = RULES + "  - {name: more, action: allow, agents: other, match: {host: other.test}}\n"
    proxy = make_proxy(rules, lane=lane, ca="per-agent")
    for name in ("coder-1", "other"):
        proxy.agent(name)
    yield proxy
    proxy.stop()


def bundle_of(proxy: Proxy, agent: str, folder: Path) -> Path:
    """The bundle an agent's sandbox has, as it is now."""
    env = json.loads(proxy.cli("agent", "env", agent, "--json").stdout)
    copy = folder / f"{agent}.pem"
    copy.write_bytes(Path(env["SSL_CERT_FILE"]).read_bytes())
    return copy


def test_each_agent_trusts_a_ca_of_its_own(per_agent: Proxy, upstream: Upstream, tmp_path: Path) -> None:
    """It does not vouch for another agent's connections, nor for hosts outside the agent's rules."""
    proxy = per_agent
    one, other = bundle_of(proxy, "coder-1", tmp_path), bundle_of(proxy, "other", tmp_path)
    assert accepted(proxy, one)
    assert curl(proxy, one) == 200
    assert openssl(proxy, one, tmp_path) == "Verify return code: 0 (ok)"
    for roots in (other, proxy.folder / "certs" / "ca.pem"):
        assert not accepted(proxy, roots)
    seen = len(upstream.seen)
    connection = proxy.connect()
    connection.send(f"CONNECT other.test:443 HTTP/1.1\r\n{proxy.auth('coder-1')}\r\n".encode())
    refused(connection.response("CONNECT"), "no_rule")
    shown(proxy, other, "other.test", "other").close()
    assert len(upstream.seen) == seen


def test_a_ca_dies_with_its_agent(per_agent: Proxy, upstream: Upstream, tmp_path: Path) -> None:
    """Killed, it is refused before TLS; revived, it has another CA."""
    proxy = per_agent
    before = bundle_of(proxy, "coder-1", tmp_path)
    assert accepted(proxy, before)
    file = proxy.folder / "certs" / "agents" / "coder-1.pem"
    assert file.exists()
    proxy.cli("agent", "kill", "coder-1")
    assert not file.exists()

    def connect() -> Connection:
        connection = proxy.connect()
        connection.send(f"CONNECT api.test:443 HTTP/1.1\r\n{proxy.auth('coder-1')}\r\n".encode())
        return connection

    upstream.reset()
    wait_for(lambda: connect().response("CONNECT").status == 403, "the kill")
    refused(connect().response("CONNECT"), "agent_killed")
    assert upstream.seen == []
    assert "is killed, and has no CA" in proxy.cli("agent", "env", "coder-1", check=False).stderr
    proxy.cli("agent", "revive", "coder-1")
    wait_for(lambda: connect().response("CONNECT").status == 200, "the revival")
    assert not accepted(proxy, before)
    assert accepted(proxy, bundle_of(proxy, "coder-1", tmp_path))
    proxy.cli("agent", "remove", "coder-1")
    assert not file.exists()
