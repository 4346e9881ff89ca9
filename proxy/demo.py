"""`sallyport demo`: the real proxy, a local HTTPS upstream and an agent's client, told as a story. Offline."""

from __future__ import annotations

import http.server
import json
import os
import ssl
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from proxy.address import Host
from proxy.ca import Authority
from proxy.rotation import load_authority

SECRET = "sk-demo-7f3a9c51e8b24d60"  # noqa: S105  # made up, and it opens nothing
WIDTH = 46
PATIENCE = 20  # seconds any step may take

RULES = """\
version: 1
rules:
  - name: models-read
    agents: ["demo-*"]
    match: {host: api.demo.test, method: GET, path: /v1/**}
    action: allow
    inject:
      - {credential: demo-key, as: bearer}
  - name: events-cleaned
    agents: ["demo-*"]
    match: {host: events.demo.test, method: POST, path: /collect}
    action: allow
    rewrite:
      url: {path: {regex: "^/collect$", to: /v2/events}, query: {remove: [user]}}
      headers: {set: {x-env: sandbox}, remove: [x-debug]}
  - name: nobody-deletes
    match: {host: "**.demo.test", method: DELETE}
    action: block
"""

# What the agent runs: it knows the proxy, its own token and the CA, and nothing else.
CLIENT = """\
import json, sys, urllib.error, urllib.request
method, url, headers = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
request = urllib.request.Request(url, method=method, headers=headers)
try:
    answer = urllib.request.urlopen(request, timeout=10)
except urllib.error.HTTPError as error:
    answer = error
print(json.dumps({"status": answer.status, "body": answer.read().decode()}))
"""


@dataclass(slots=True)
class Seen:
    """One request as the upstream got it."""

    line: str
    headers: Mapping[str, str]


@dataclass(slots=True)
class Upstream:
    """A local HTTPS server that writes down what it sees, and echoes it."""

    port: int = 0
    seen: list[Seen] = field(default_factory=list)


@contextmanager
def _upstream(authority: Authority) -> Iterator[Upstream]:
    upstream = Upstream()

    class Echo(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            host = self.headers["host"]
            upstream.seen.append(Seen(f"{self.command} https://{host}{self.path}", dict(self.headers.items())))
            body = json.dumps({"your authorization was": self.headers.get("authorization")}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_DELETE = answer  # noqa: N815  # the names http.server looks for

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    server.socket = _tls(authority).wrap_socket(server.socket, server_side=True)
    upstream.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield upstream
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _tls(authority: Authority) -> ssl.SSLContext:
    def context_for(host: str) -> ssl.SSLContext:
        leaf = authority.leaf(Host.parse(host))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with tempfile.NamedTemporaryFile() as file:  # ssl loads a chain only from a file
            file.write(leaf.pem)
            file.flush()
            context.load_cert_chain(file.name)
        return context

    def choose(connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        connection.context = context_for(name or "demo.test")

    front = context_for("demo.test")
    front.sni_callback = choose
    return front


class Stage:
    """The demo's folder and the commands typed in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.command = [sys.executable, "-P", "-m", "proxy"]
        root = str(Path(__file__).resolve().parent.parent)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SALLYPORT_")}
        self.environment = kept | {"PYTHONPATH": root}

    def write_settings(self, upstream: Upstream) -> None:
        """Settings that lead two names to the local upstream, and the rules."""
        (self.folder / "rules").mkdir(exist_ok=True)
        (self.folder / "rules" / "demo.yaml").write_text(RULES)
        (self.folder / "sallyport.yaml").write_text(
            textwrap.dedent(f"""\
            listen: ["127.0.0.1:0"]
            admin: "127.0.0.1:0"
            upstream:
              trust: [upstream/ca.pem]
              connect_to:
                "api.demo.test:443": "127.0.0.1:{upstream.port}"
                "events.demo.test:443": "127.0.0.1:{upstream.port}"
            """)
        )

    def type(self, *words: str, stdin: str = "") -> str:
        """Run one `sallyport` command; its output."""
        result = subprocess.run(
            [*self.command, *words],
            input=stdin,
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=self.environment,
            timeout=PATIENCE,
            check=False,
        )
        if result.returncode:
            raise RuntimeError(f"sallyport {' '.join(words)}: {result.stderr.strip()}")
        return result.stdout

    @contextmanager
    def proxy(self) -> Iterator[None]:
        """A running proxy."""
        process = subprocess.Popen(
            [*self.command, "run"], cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout
        try:
            if not process.stdout.readline():
                raise RuntimeError("sallyport run did not start")
            yield
        finally:
            process.terminate()
            process.communicate(timeout=PATIENCE)

    def agent_sends(self, variables: Mapping[str, str], method: str, url: str, headers: Mapping[str, str]) -> Answer:
        """One request as the sandboxed agent makes it."""
        result = subprocess.run(
            [sys.executable, "-I", "-c", CLIENT, method, url, json.dumps(headers)],
            capture_output=True,
            text=True,
            env={"PATH": os.environ.get("PATH", ""), **variables},
            timeout=PATIENCE,
            check=False,
        )
        if result.returncode:
            raise RuntimeError(f"the agent's client failed: {result.stderr.strip().splitlines()[-1]}")
        return Answer(**json.loads(result.stdout))


@dataclass(frozen=True, slots=True)
class Answer:
    """What the agent got."""

    status: int
    body: str


@dataclass(frozen=True, slots=True)
class Scene:
    """One request of the story. `wanted` must be in what the upstream saw; without it nothing may arrive."""

    title: str
    method: str
    url: str
    headers: Mapping[str, str]
    status: int
    wanted: Sequence[str] = ()
    unwanted: Sequence[str] = ()


SCENES = (
    Scene(
        "Injected: the agent sends no key, the upstream gets one",
        "GET",
        "https://api.demo.test/v1/models",
        {},
        200,
        ("GET https://api.demo.test/v1/models", f"authorization: Bearer {SECRET}"),
    ),
    Scene(
        "Rewritten: path changed, a header set, a user's name taken out",
        "POST",
        "https://events.demo.test/collect?user=alice&n=1",
        {"X-Debug": "on"},
        200,
        ("POST https://events.demo.test/v2/events?n=1", "x-env: sandbox"),
        ("alice", "x-debug"),
    ),
    Scene("Blocked: never reaches the upstream", "DELETE", "https://api.demo.test/v1/models/7", {}, 403),
)


def _show(text: Sequence[tuple[str, str]]) -> None:
    for left, right in text:
        lefts, rights = textwrap.wrap(left, WIDTH) or [""], textwrap.wrap(right, WIDTH) or [""]
        for row in range(max(len(lefts), len(rights))):
            one = lefts[row] if row < len(lefts) else ""
            two = rights[row] if row < len(rights) else ""
            print(f"  {one:<{WIDTH}} | {two}".rstrip())


def _play(stage: Stage, upstream: Upstream, variables: Mapping[str, str], scene: Scene) -> bool:
    """Send one request, print both sides; whether all went as told."""
    before = len(upstream.seen)
    answer = stage.agent_sends(variables, scene.method, scene.url, scene.headers)
    arrived = upstream.seen[before:]
    told = ("authorization", "x-env", "x-debug")
    saw = [line for seen in arrived for line in (seen.line, *_headers(seen.headers, told))]
    sent = [f"{scene.method} {scene.url}", *_headers(scene.headers, told)]
    print(f"\n{scene.title}\n")
    _show([("THE AGENT SENT", "THE UPSTREAM SAW"), ("-" * WIDTH, "-" * WIDTH)])
    lines = max(len(sent), len(saw or ["nothing"]))
    _show([((sent + [""] * lines)[row], ((saw or ["(nothing)"]) + [""] * lines)[row]) for row in range(lines)])
    print(f"\n  the agent got {answer.status}: {_gist(answer)}")
    text = "\n".join(saw)
    good = answer.status == scene.status and bool(arrived) is bool(scene.wanted)
    good = good and all(line in saw for line in scene.wanted) and not any(word in text for word in scene.unwanted)
    return good and SECRET not in answer.body


def _gist(answer: Answer) -> str:
    body = json.loads(answer.body)
    return str(body["error"]["message"]) if "error" in body else answer.body


def _headers(headers: Mapping[str, str], told: Sequence[str]) -> list[str]:
    return [f"{name.lower()}: {value}" for name, value in headers.items() if name.lower() in told]


def run_demo(keep: Path | None) -> int:
    """Tell the story; 0 only if every part went as told. `keep`: a folder for its files, else they are removed."""
    with tempfile.TemporaryDirectory(prefix="sallyport-demo-") as temporary:
        folder = (keep or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            good = _tell(Stage(folder))
        except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
            print(f"sallyport demo: {error}", file=sys.stderr)
            return 1
    print(_NEXT if good else "\nThis did not go as told: please report it.")
    return 0 if good else 1


def _tell(stage: Stage) -> bool:
    (stage.folder / "upstream").mkdir(exist_ok=True)
    with _upstream(load_authority(stage.folder / "upstream")) as upstream:
        stage.write_settings(upstream)
        print("Starting a private store, a proxy, and an HTTPS upstream on this machine ...", flush=True)
        with stage.proxy():
            stage.type("agent", "add", "demo-1")
            stage.type("vault", "put", "demo-key", "--host", "api.demo.test", stdin=SECRET)
            variables = json.loads(stage.type("agent", "env", "demo-1", "--json"))
            print("Agent demo-1 is registered; credential demo-key is sealed for api.demo.test only.")
            good = [_play(stage, upstream, variables, scene) for scene in SCENES]
            stage.type("agent", "kill", "demo-1", "--reason", "end of the demo")
            killed = Scene("Killed: one command stops the agent", "GET", SCENES[0].url, {}, 403)
            return all([*good, _killed(stage, upstream, variables, killed)])


def _killed(stage: Stage, upstream: Upstream, variables: Mapping[str, str], scene: Scene) -> bool:
    for _ in range(20):  # a kill is in force within a second; each request takes some 100 ms
        answer = stage.agent_sends(variables, scene.method, scene.url, scene.headers)
        if answer.status == scene.status:
            return _play(stage, upstream, variables, scene)
    return False


_NEXT = """
All of it went as told. Try next:
  ./sallyport run                               start the proxy
  ./sallyport agent add coder-1                 register a sandbox (in another shell)
  eval "$(./sallyport agent env coder-1)"       point that shell's clients at the proxy
  ./sallyport explain --agent coder-1 GET https://api.github.com/zen
  ./sallyport check && ./sallyport test         the rules in rules/, and their tests"""
