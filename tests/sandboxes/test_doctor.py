"""`sallyport doctor`: green in a jail, red where something is wrong, and it says what."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness import PATIENCE, ROOT, Proxy, Upstream

pytestmark = pytest.mark.slow

NOTHING = "version: 1\nrules: []\n"
# A network with everything that must not be there, on a loopback device: nobody outside is asked.
LEAKY = """
import socket, subprocess, sys, threading

def run(*words):
    subprocess.run(words, check=True)

run("ip", "link", "set", "lo", "up")
for address in ("1.1.1.1/32", "8.8.8.8/32", "169.254.169.254/32", "162.159.200.1/32"):
    run("ip", "address", "add", address, "dev", "lo")
run("ip", "-6", "address", "add", "2606:4700:4700::1111/128", "dev", "lo", "nodad")
held = [socket.create_server(("169.254.169.254", 80)), socket.create_server(("1.1.1.1", 22))]
held.append(socket.create_server(("2606:4700:4700::1111", 443), family=socket.AF_INET6))

def answer(address, data):
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(address)
    def serve():
        while True:
            sock.sendto(data, sock.recvfrom(2048)[1])
    threading.Thread(target=serve, daemon=True).start()

answer(("8.8.8.8", 53), bytes(12) + bytes([93, 184, 215, 14]))
answer(("162.159.200.1", 123), bytes(48))

def close(sock):
    while True:
        sock.accept()[0].close()

for sock in held:
    threading.Thread(target=close, args=(sock,), daemon=True).start()
sys.exit(subprocess.run([sys.executable, "-P", "-m", "proxy", "doctor", "--json"]).returncode)
"""

type Doctor = Callable[..., tuple[int, dict[str, dict[str, Any]]]]


@pytest.fixture(scope="module")
def proxy(lane: str, make_proxy: Callable[..., Proxy]) -> Proxy:
    proxy = make_proxy(NOTHING, lane=lane)
    proxy.agent("coder-1")
    return proxy


def findings(text: str) -> dict[str, dict[str, Any]]:
    """The checks by name."""
    return {check["name"]: check for check in json.loads(text)["checks"]}


@pytest.fixture
def doctor(proxy: Proxy, tmp_path: Path) -> Doctor:
    """Runs it in a jail; status and findings. `before` stands in front of it."""

    def run(*before: str, flags: tuple[str, ...] = ()) -> tuple[int, dict[str, dict[str, Any]]]:
        words = ["exec", "--config", str(proxy.config), "--agent", "coder-1", "--", *before]
        result = subprocess.run(
            [sys.executable, "-P", "-m", "proxy", *words, "sallyport", "doctor", "--json", *flags],
            cwd=tmp_path,
            env=proxy.environment,
            capture_output=True,
            text=True,
            timeout=6 * PATIENCE,
            check=False,
        )
        return result.returncode, findings(result.stdout)

    return run


def test_a_jail_is_green_with_every_client(doctor: Doctor, upstream: Upstream) -> None:
    """Those that ignore the variables too; no rule allows anything, and nothing leaves."""
    status, found = doctor(flags=("--agent", "coder-1"))
    assert [check for check in found.values() if check["ok"] is False] == []
    assert status == 0
    assert found["identity"]["detail"] == "speaks as coder-1"
    assert {"curl", "git", "python", "pip", "node", "npm", "java", "go", "apt", "wget"} <= found.keys()
    assert {"direct TCP", "direct IPv6", "UDP", "direct DNS", "DNS", "metadata", "control sockets"} <= found.keys()
    assert upstream.seen == []


def test_a_bundle_without_the_ca_is_found(doctor: Doctor) -> None:
    roots = "/etc/ssl/certs/ca-certificates.crt"
    status, found = doctor("env", f"SSL_CERT_FILE={roots}", f"CURL_CA_BUNDLE={roots}", f"GIT_SSL_CAINFO={roots}")
    assert status == 1
    assert not found["CA"]["ok"]
    assert (found["curl"]["detail"], found["git"]["detail"]) == ("does not trust the CA",) * 2
    assert "CURL_CA_BUNDLE" in found["curl"]["fix"]
    assert found["node"]["ok"]


def test_a_wrong_token_is_found(doctor: Doctor) -> None:
    by = "http://coder-1:slp_wrong@198.18.0.1:8080"
    status, found = doctor("env", f"HTTPS_PROXY={by}", f"https_proxy={by}")
    assert status == 1
    assert not found["identity"]["ok"]
    assert "407" in found["curl"]["detail"]


def test_another_agent_than_expected_is_found(doctor: Doctor) -> None:
    status, found = doctor(flags=("--agent", "coder-2"))
    assert (status, found["identity"]["detail"]) == (1, "speaks as coder-1")


def test_without_the_variables_clients_go_by_the_transparent_listener(doctor: Doctor) -> None:
    gone = [word for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY") for form in (name, name.lower())
            for word in ("-u", form)]  # fmt: skip
    status, found = doctor("env", *gone)
    assert (status, found["proxy"]["detail"]) == (0, "transparent")


def test_every_way_round_is_found(tmp_path: Path) -> None:
    """In a network of its own, which has them all; and every client is told what to set."""
    script = tmp_path / "leaky.py"
    script.write_text(textwrap.dedent(LEAKY))
    result = subprocess.run(
        ["unshare", "--map-root-user", "--net", sys.executable, "-P", str(script)],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=6 * PATIENCE,
        check=False,
    )
    assert result.returncode == 1, result.stderr
    found = findings(result.stdout)
    for name in ("direct TCP", "direct IPv6", "UDP", "direct DNS", "metadata"):
        assert not found[name]["ok"], found[name]
        assert "take the route away" in found[name]["fix"]
    assert found["metadata"]["detail"] == "169.254.169.254 port 80 is connected"
    assert not found["proxy"]["ok"]
    assert found["curl"]["fix"].startswith("HTTPS_PROXY")


def test_it_needs_python_and_the_package_only(proxy: Proxy, tmp_path: Path) -> None:
    """No library is loaded: a sandbox's Python has none of ours."""
    code = "import sys; from proxy import doctor; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    result = subprocess.run(
        [sys.executable, "-S", "-P", "-c", code],
        env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert set(result.stdout.split()) - {"proxy", "__main__"} <= set(sys.stdlib_module_names)


def test_the_table_is_for_people(proxy: Proxy, tmp_path: Path) -> None:
    words = ["exec", "--config", str(proxy.config), "--agent", "coder-1", "--", "sallyport", "doctor"]
    result = subprocess.run(
        [sys.executable, "-P", "-m", "proxy", *words],
        cwd=tmp_path, env=proxy.environment, capture_output=True, text=True, timeout=6 * PATIENCE, check=False,
    )  # fmt: skip
    assert "  ok    direct TCP       no way out\n" in result.stdout
    assert "  ok    curl             proxy, CA and token\n" in result.stdout
