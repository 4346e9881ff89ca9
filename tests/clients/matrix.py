"""The clients that are tested, and the table of them in docs/clients.md.

`python -m tests.clients.matrix` writes the table anew. test_matrix.py measures that each row is true.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.clients.sandbox import NODE, NODE_MODULES, tool
from tests.harness import ROOT

PAGE = ROOT / "docs" / "clients.md"
URL = "https://api.test/page"
AT_ONCE, CHALLENGED, NEVER = "at once", "after a 407", "**never**"
TRANSPARENT = "a [transparent listener](identity.md#transparent-listeners)"
BOUND = "a [listener](identity.md#listeners-with-an-agent) or [network](identity.md#source-networks) that names it"

type Command = Callable[[Path], list[str | Path]]


@dataclass(frozen=True, slots=True)
class Client:
    """A row: what the client does with what `agent env` exports, and how it is run (given the compiled programs)."""

    name: str
    command: Command
    login: str = AT_ONCE  # how it proves its agent to the proxy; "": it does not use the proxy at all
    ca: tuple[str, ...] = ("SSL_CERT_FILE",)  # each is enough
    trust: str = ""  # commands that make it trust ca.pem where no variable does

    @property
    def row(self) -> str:
        """Its line in the table."""
        needs = {"": TRANSPARENT, NEVER: BOUND}.get(self.login, "")
        ca = ", ".join(f"`{name}`" for name in self.ca) or "its own store, see below"
        cells = [self.name, "yes" if self.login else "**no**", self.login, ca, needs]
        return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def python(code: str) -> Command:
    """A program for the Python of this environment."""
    return lambda _: [sys.executable, "-I", "-c", code]


def script(node: Callable[[], str | Path]) -> Command:
    """Both clients of a Node.js."""
    code = f"""
        import https from "node:https";
        const answer = await fetch("{URL}");
        if (!answer.ok) throw answer;
        https.get("{URL}", (other) => other.pipe(process.stdout));
    """
    return lambda _: [node(), "--input-type=module", "--eval", code]


AIOHTTP = f"""
import aiohttp, asyncio
async def main():
    async with aiohttp.ClientSession(raise_for_status=True%s) as session, session.get("{URL}") as answer:
        print(await answer.text())
asyncio.run(main())
"""
GRPC = """
import grpc, queue
with grpc.secure_channel("grpc.test:443", grpc.ssl_channel_credentials()) as channel:
    assert channel.unary_unary("/test.Echo/One")(b"one", timeout=20) == b"one"
    sent = queue.Queue()
    answers = channel.stream_stream("/test.Echo/Many")(iter(sent.get, None), timeout=20)
    for number in range(5):  # each goes out only when the answer to the one before is here
        sent.put(b"%d" % number)
        assert next(answers) == b"%d" % number
    sent.put(None)
    assert list(answers) == []
"""
WEBSOCKETS = """
from websockets.sync.client import connect
with connect("wss://ws.test/chat") as socket:
    for number in range(5):
        socket.send(str(number))
        assert socket.recv(timeout=20) == str(number)
"""
CARGO = """
mkdir src && touch src/lib.rs
printf '[package]\\nname = "x"\\nversion = "0.1.0"\\n[dependencies]\\ntiny = { version = "1", registry = "test" }\\n' \
    > Cargo.toml
export CARGO_REGISTRIES_TEST_INDEX=sparse+https://crates.test/
# Before 1.68 sparse registries were an unstable feature; after it the flag does nothing.
RUSTC_BOOTSTRAP=1 exec cargo -Z sparse-registry fetch
"""
APT = """
mkdir -p lists/partial cache/archives/partial
echo 'deb [trusted=yes] https://debian.test/debian ./' > sources.list
exec apt-get update -o Dir::Etc::SourceList="$PWD/sources.list" -o Dir::Etc::SourceParts=/dev/null \
    -o Dir::State::Lists="$PWD/lists" -o Dir::Cache="$PWD/cache" -o APT::Sandbox::User=root \
    -o APT::Update::Error-Mode=any -o Acquire::Languages=none -o Acquire::Retries=0
"""
NSS = """
mkdir -p "$HOME/.pki/nssdb"
certutil -N -d "sql:$HOME/.pki/nssdb" --empty-password
certutil -A -d "sql:$HOME/.pki/nssdb" -n sallyport -t C,, -i ca.pem
"""


def shell(text: str, needs: str) -> Command:
    """A client that wants files first."""
    return lambda _: ["/bin/sh", "-euc", text, tool(needs)]


CLIENTS = (
    Client("curl", lambda _: [tool("curl"), "-sSf", URL], ca=("CURL_CA_BUNDLE", "SSL_CERT_FILE")),
    Client("wget", lambda _: [tool("wget"), "-nv", "--tries=1", "-O-", URL], ca=("WGETRC",)),
    Client("git", lambda _: [tool("git"), "ls-remote", "https://git.test/x.git"], CHALLENGED, ("GIT_SSL_CAINFO",)),
    Client(
        "pip",
        lambda _: [
            *(sys.executable, "-I", "-m", "pip", "--retries=0", "install", "--target=site", "tiny"),
            "--index-url=https://pypi.test/simple/",
        ],
        ca=("PIP_CERT",),
    ),
    Client(
        "uv",
        lambda _: [
            *(Path(sys.executable).parent / "uv", "pip", "install", "--target=site", "--python", sys.executable),
            *("--index-url=https://pypi.test/simple/", "--no-config", "tiny"),
        ],
    ),
    Client(
        "npm",
        lambda _: [
            *(NODE, NODE_MODULES / "npm" / "bin" / "npm-cli.js", "--globalconfig", os.devnull, "--no-audit"),
            *("--no-update-notifier", "--fetch-retries=0", "install", "--registry=https://registry.test/", "tiny"),
        ],
        ca=("npm_config_cafile",),
    ),
    Client("cargo", shell(CARGO, "cargo"), ca=("CARGO_HTTP_CAINFO",)),
    Client("apt", shell(APT, "apt-get"), ca=("APT_CONFIG",)),
    Client("Node.js 18, 20: `fetch`, `https`", script(lambda: tool("node")), "", ("NODE_EXTRA_CA_CERTS",)),
    Client("Node.js 24: `fetch`, `https`", script(lambda: NODE), ca=("NODE_EXTRA_CA_CERTS",)),
    Client("Python urllib", python(f"import urllib.request as u; print(u.urlopen('{URL}').read())")),
    Client("Python httpx", python(f"import httpx; print(httpx.get('{URL}').raise_for_status().text)")),
    Client(
        "Python requests",
        python(f"import requests; r = requests.get('{URL}'); r.raise_for_status(); print(r.text)"),
        ca=("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    ),
    Client("Python aiohttp", python(AIOHTTP % ""), ""),
    Client("Python aiohttp, `trust_env=True`", python(AIOHTTP % ", trust_env=True")),
    Client(
        "Python urllib3",
        python(f"import urllib3; r = urllib3.request('GET', '{URL}', retries=False); assert r.status == 200"),
        "",
    ),
    Client("Python websockets (WebSocket)", python(WEBSOCKETS)),
    Client("gRPC (grpcio: unary, streaming)", python(GRPC), ca=("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",)),
    Client("Go `net/http`", lambda built: [built / "fetch", URL]),
    Client(
        "Java `HttpClient`, `URLConnection`",
        lambda built: [tool("java"), "-cp", built, "Fetch", URL],
        NEVER,
        ("JAVA_TOOL_OPTIONS",),
    ),
    Client(
        "Chromium, headless",
        lambda _: [
            *(tool("chromium"), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--user-data-dir=profile", "--dump-dom", URL),
        ],
        NEVER,
        (),
        NSS,
    ),
)


def table() -> str:
    """What docs/clients.md has between its marks."""
    head = "| client | heeds the variables | proves its agent | trusts the CA by | needs besides |\n"
    return head + "|---|---|---|---|---|\n" + "".join(f"{client.row}\n" for client in CLIENTS)


def page(text: str) -> str:
    """The page with what is written by this module as it should be."""
    for name, content in (("clients", table()), ("nss", f"```sh\n{NSS.strip()}\n```\n")):
        begin, end = (
            f"<!-- {name}: {which}" for which in ("begin, written by tests/clients/matrix.py -->\n", "end -->")
        )
        before, _, rest = text.partition(begin)
        text = before + begin + content + end + rest.partition(end)[2]
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
