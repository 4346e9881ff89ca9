"""Everybody who takes part: how each is configured for the same work, and started.

The work: take a CONNECT, terminate its TLS with an ECDSA P-256 certificate, add one header, connect to the upstream by
TLS, verify it. Each entry of CONTESTANTS gets a Site, writes what it needs into its folder and returns a Launch.
"""

from __future__ import annotations

import getpass
import json
import os
import shutil
import string
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench import rules
from bench.machine import free_port

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PYTHON = os.environ.get("BENCH_PYTHON") or sys.executable  # runs Sallyport and mitmdump
PEERS = ROOT / ".venv-peers" / "bin"
RULES = 1000


@dataclass(frozen=True, slots=True)
class Site:
    """What a contestant is told. `hosts`: how many names h0.bench.test, h1.bench.test ... will be asked for."""

    folder: Path
    keys: Path
    build: Path
    upstream: int
    credential: str
    hosts: int = 0
    agents: int = 1
    workers: int = 1
    streaming: bool = False
    http2: bool = False


@dataclass(slots=True)
class Launch:
    """How to start it and how to reach it. `after` runs when it listens and returns a proof of identity per agent."""

    command: list[str]
    port: int
    ca: Path
    reverse: bool = False  # it cannot CONNECT: clients speak TLS to it as if it were the upstream
    env: dict[str, str] = field(default_factory=dict)
    listening: Callable[[], int] | None = None  # where it says so itself
    after: Callable[[], list[str]] | None = None


def _sallyport(site: Site, lane: str) -> Launch:
    config = site.folder / "sallyport.yaml"
    hosts = ["api.bench.test", *(f"h{number}.bench.test" for number in range(site.hosts))]
    settings = {
        "listen": ["127.0.0.1:0"],
        "admin": "127.0.0.1:0",
        "lane": lane,
        "workers": site.workers,
        "upstream": {
            "trust": [str(site.keys / "upstream-ca.pem")],
            "connect_to": {f"{host}:{site.upstream}": f"127.0.0.1:{site.upstream}" for host in hosts},
        },
        "limits": {
            "connections_per_agent": 20_000,
            "unidentified_per_source": 20_000,
            "new_hosts_per_agent": "1000000/s",
        },
    }
    config.write_text(json.dumps(settings))  # JSON is YAML
    (site.folder / "rules").mkdir()
    (site.folder / "rules" / "bench.yaml").write_bytes(
        rules.rules(RULES - 1)
        + f"""
  - name: bench  # sallyport: allow wildcard-credential
    match: {{host: "*.bench.test", port: {site.upstream}, method: [GET, POST], path: /**}}
    action: allow
    inject: [{{credential: bench, as: bearer}}]
""".encode()
    )
    command = [PYTHON, "-P", "-m", "proxy"]
    env = {"PYTHONPATH": str(ROOT)}

    def cli(*words: str, stdin: str = "") -> str:
        done = subprocess.run(
            [*command, *words, "--config", str(config)], input=stdin, capture_output=True, text=True, check=False,
            env={**os.environ, **env}, cwd=site.folder,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"sallyport {words[0]} {words[1]}: {done.stderr.strip()}")
        return done.stdout

    def listening() -> int:
        running = json.loads((site.folder / ".sallyport" / "running.json").read_text())
        return int(running["listen"][0].rpartition(":")[2])

    def register() -> list[str]:
        cli("vault", "put", "bench", "--host", "*.bench.test", stdin=site.credential)
        if site.agents == 1:
            return ["Bearer " + json.loads(cli("agent", "add", "bench-1", "--json"))["token"]]
        seed = subprocess.run(
            [PYTHON, "-P", str(HERE / "seed.py"), str(config), str(site.agents)],
            capture_output=True, text=True, check=False, env={**os.environ, **env},
        )  # fmt: skip
        if seed.returncode:
            raise RuntimeError(f"agents: {seed.stderr.strip()}")
        return [f"Bearer {token}" for token in seed.stdout.split()]

    return Launch(
        [*command, "run", "--config", str(config)],
        port=0,
        ca=site.folder / "certs" / "ca.pem",
        env=env,
        listening=listening,
        after=register,
    )


def _mitmdump(site: Site) -> Launch:
    shutil.copy(site.keys / "proxy-ca.both", site.folder / "mitmproxy-ca.pem")
    port = free_port()
    options = {
        "confdir": site.folder,
        "listen_host": "127.0.0.1",
        "listen_port": port,
        "ssl_verify_upstream_trusted_ca": site.keys / "upstream-ca.pem",
    }
    if site.streaming:
        options["stream_large_bodies"] = "64k"
    if site.http2:  # else it offers its clients only what the upstream speaks
        options |= {"connection_strategy": "lazy", "upstream_cert": "false"}
    command = [str(Path(PYTHON).parent / "mitmdump"), "--quiet", "-s", str(HERE / "peers" / "mitmdump_addon.py")]
    for name, value in options.items():
        command += ["--set", f"{name}={value}"]
    return Launch(command, port, site.keys / "proxy-ca.pem", env={"CREDENTIAL": f"Bearer {site.credential}"})


def _go(site: Site) -> Launch:
    binary = site.build / "gomitm"
    if not binary.exists():
        build_go(binary)
    port, keys = free_port(), site.keys
    files = [keys / "proxy-ca.pem", keys / "proxy-ca.key", keys / "upstream-ca.pem"]
    command = [str(binary), str(port), *map(str, files), str(site.upstream), f"Bearer {site.credential}"]
    return Launch(command, port, keys / "proxy-ca.pem")


def _configured(site: Site, file: str, **more: object) -> tuple[Path, int]:
    """A configuration from `bench/peers`, filled in, and its port."""
    port = free_port()
    values = {"port": port, "folder": site.folder, "keys": site.keys, "upstream": site.upstream}
    text = _Template((HERE / "peers" / file).read_text()).substitute(values, credential=site.credential, **more)
    path = site.folder / file
    path.write_text(text)
    return path, port


class _Template(string.Template):
    delimiter = "@"  # nginx has dollars of its own


def _program(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin:/usr/local/sbin")
    if not found:
        raise RuntimeError(f"{name} is not installed")
    return found


def _squid(site: Site) -> Launch:
    squid = _program("squid")
    helper = "/usr/lib/squid/security_file_certgen"
    user = "proxy" if os.geteuid() == 0 else getpass.getuser()  # it does not run as root
    names = ["api", *(f"h{number}" for number in range(site.hosts))]
    (site.folder / "hosts").write_text("".join(f"127.0.0.1 {name}.bench.test\n" for name in names))
    config, port = _configured(site, "squid.conf", helper=helper, user=user)
    subprocess.run([helper, "-c", "-s", site.folder / "ssl_db", "-M", "64MB"], check=True, capture_output=True)
    for path in (site.folder, *site.folder.rglob("*"), site.keys / "proxy-ca.key"):
        shutil.chown(path, user)
    return Launch([squid, "-N", "-f", str(config)], port, site.keys / "proxy-ca.pem")


def _envoy(site: Site) -> Launch:
    config, port = _configured(site, "envoy.yaml")
    binary = next(PEERS.parent.glob("lib/python*/site-packages/envoy/_bin/envoy"))
    options = ["--concurrency", str(site.workers), "--disable-hot-restart", "--log-level", "error"]
    return Launch([str(binary), "-c", str(config), *options], port, site.keys / "proxy-ca.pem")


def _nginx(site: Site) -> Launch:
    nginx = _program("nginx")
    config, port = _configured(site, "nginx.conf")
    return Launch([nginx, "-e", "stderr", "-c", str(config)], port, site.keys / "proxy-ca.pem", reverse=True)


def _haproxy(site: Site) -> Launch:
    haproxy = _program("haproxy")
    config, port = _configured(site, "haproxy.cfg")
    return Launch([haproxy, "-db", "-f", str(config)], port, site.keys / "proxy-ca.pem", reverse=True)


def _proxypy(site: Site) -> Launch:
    port, keys = free_port(), site.keys
    options = {
        "hostname": "127.0.0.1",
        "port": port,
        "num-workers": 1,
        "num-acceptors": 1,
        "ca-key-file": keys / "proxy-ca.key",
        "ca-cert-file": keys / "proxy-ca.pem",
        "ca-signing-key-file": keys / "proxy.key",
        "ca-cert-dir": site.folder,
        "ca-file": keys / "upstream-ca.pem",
        "plugins": "proxypy_plugin.Inject",
        "log-level": "ERROR",
        "data-dir": site.folder,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    env = {"PYTHONPATH": str(HERE / "peers"), "CREDENTIAL": f"Bearer {site.credential}"}
    return Launch([str(PEERS / "python"), "-P", "-m", "proxy", *words], port, keys / "proxy-ca.pem", env=env)


def build_go(binary: Path) -> None:
    """Compile the Go peer.

    Raises RuntimeError with what the compiler says.
    """
    env = {**os.environ, "GOCACHE": str(binary.parent / "go-cache"), "CGO_ENABLED": "0", "GOFLAGS": "-trimpath"}
    done = subprocess.run(
        [PEERS / "go", "build", "-o", binary, "."], cwd=HERE / "peers" / "gomitm", env=env, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"go build: {done.stderr.strip()}")


CONTESTANTS: dict[str, Callable[[Site], Launch]] = {
    "sallyport-fast": lambda site: _sallyport(site, "fast"),
    "sallyport-fast-2": lambda site: _sallyport(replace(site, workers=2), "fast"),
    "sallyport-mitmproxy": lambda site: _sallyport(site, "mitmproxy"),
    "sallyport-mitmproxy-2": lambda site: _sallyport(replace(site, workers=2), "mitmproxy"),
    "mitmdump": _mitmdump,
    "go": _go,
    "envoy": _envoy,
    "squid": _squid,
    "haproxy": _haproxy,
    "nginx": _nginx,
    "proxy.py": _proxypy,
}
TWO_WORKERS = {"sallyport-fast-2": "sallyport-fast", "sallyport-mitmproxy-2": "sallyport-mitmproxy"}  # and with one
