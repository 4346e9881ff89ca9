"""A real proxy process, real TLS upstreams and raw sockets for the tests that go over the wire."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import trustme
import yaml

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 60.0  # seconds; only what fails takes as long, or a machine that is busy with other things


def wait_for[T](condition: Callable[[], T], what: str = "the condition") -> T:
    """Polls until `condition` returns something true."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if value := condition():
            return value
        threading.Event().wait(0.02)
    raise AssertionError(f"{what} did not come about")


@dataclass(slots=True)
class Seen:
    """One request as an upstream got it."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> list[str]:
        """Every value of a header."""
        return [value for key, value in self.headers if key.lower() == name.lower()]


@dataclass(slots=True)
class Reply:
    """What an upstream answers; `chunks` are sent one by one as chunked encoding."""

    status: int = 200
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    chunks: list[bytes] | None = None
    raw: bytes | None = None  # instead of everything else; the connection closes after it


type Handler = Callable[[Seen], Reply]
type RawHandler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def echo(seen: Seen) -> Reply:
    """Tells the client what arrived."""
    body = json.dumps({"method": seen.method, "target": seen.target, "headers": seen.headers}).encode()
    return Reply(headers=[("content-type", "application/json")], body=body)


class Upstream:
    """An HTTP/1.1 server on its own thread that keeps what it saw in `seen`; `handler` or `raw` decide the answer."""

    def __init__(self, context: ssl.SSLContext | None) -> None:
        self.seen: list[Seen] = []
        self.connections = 0
        self.handler: Handler = echo
        self.raw: RawHandler | None = None
        self.port = 0
        self._context = context
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)

    def reset(self) -> None:
        """As new; connections that a proxy kept are closed."""
        self.seen.clear()
        self.handler, self.raw = echo, None
        asyncio.run_coroutine_threadsafe(self._hang_up(), self._loop).result(PATIENCE)
        self.connections = 0

    async def _hang_up(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()
        for _ in range(3):  # turns of the loop until TLS, and what is below it, are closed
            await asyncio.sleep(0)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.set_exception_handler(lambda *_: None)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        if hasattr(server, "abort_clients"):  # Python 3.13: those in the middle of a handshake too
            server.abort_clients()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(self._hang_up())
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ssl.SSLError):
            if self.raw:
                await self.raw(reader, writer)
            else:
                while await self.exchange(reader, writer):
                    pass
        self._writers.discard(writer)
        with contextlib.suppress(OSError, ssl.SSLError):
            writer.close()

    async def exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and the handler's answer; whether the connection can take another."""
        seen = await read_request(reader)
        self.seen.append(seen)
        reply = self.handler(seen)
        if reply.raw is not None:
            writer.write(reply.raw)
            await writer.drain()
            return False
        names = {name.lower() for name, _ in reply.headers}
        headers = list(reply.headers)
        if reply.chunks is not None:
            headers.append(("transfer-encoding", "chunked"))
        elif "content-length" not in names:
            headers.append(("content-length", str(len(reply.body))))
        head = f"HTTP/1.1 {reply.status} X\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers)
        writer.write(head.encode("latin-1") + b"\r\n" + (b"" if seen.method == "HEAD" else reply.body))
        for chunk in reply.chunks or ():
            writer.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            await writer.drain()
        if reply.chunks is not None:
            writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True


async def read_request(reader: asyncio.StreamReader) -> Seen:
    """One request with its whole body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    line, *fields = head.rstrip("\r\n").split("\r\n")
    method, target, _ = line.split(" ", 2)
    headers = [(name, value.strip()) for name, _, value in (text.partition(":") for text in fields)]
    lower = {name.lower(): value for name, value in headers}
    body = b""
    if "chunked" in lower.get("transfer-encoding", ""):
        while size := int((await reader.readline()).split(b";")[0], 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
    elif "content-length" in lower:
        body = await reader.readexactly(int(lower["content-length"]))
    return Seen(method, target, headers, body)


def server_context(ca: trustme.CA, *names: str) -> ssl.SSLContext:
    """TLS for an upstream of these names."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(*names).configure_cert(context)
    return context


@dataclass(slots=True)
class Response:
    """An answer read from a socket."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        """The first value of a header."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The error code of a refusal."""
        return str(self.json()["error"]["code"])


class Connection:
    """A client connection: raw bytes out, whole responses in."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(PATIENCE)
        self.sock = sock
        self.buffer = b""

    def send(self, data: bytes) -> None:
        """Send raw bytes."""
        self.sock.sendall(data)

    def recv(self) -> bytes:
        """What comes next; empty at the end."""
        with contextlib.suppress(ConnectionResetError, ssl.SSLError, BrokenPipeError):
            return self.sock.recv(65536)
        return b""

    def read_until(self, mark: bytes) -> bytes:
        """Everything up to and with `mark`."""
        while mark not in self.buffer:
            data = self.recv()
            if not data:
                raise ConnectionError(f"closed after {self.buffer!r}")
            self.buffer += data
        head, _, self.buffer = self.buffer.partition(mark)
        return head + mark

    def read_exactly(self, size: int) -> bytes:
        """So many bytes."""
        while len(self.buffer) < size:
            data = self.recv()
            if not data:
                raise ConnectionError("closed within a body")
            self.buffer += data
        body, self.buffer = self.buffer[:size], self.buffer[size:]
        return body

    def response(self, method: str = "GET") -> Response:
        """The next response, whole."""
        head = self.read_until(b"\r\n\r\n").decode("latin-1")
        line, *fields = head.rstrip("\r\n").split("\r\n")
        status = int(line.split(" ")[1])
        headers = [(name, value.strip()) for name, _, value in (text.partition(":") for text in fields)]
        lower = {name.lower(): value for name, value in headers}
        bodiless = status in (101, 204, 304) or 100 <= status < 200
        if bodiless or (method in ("HEAD", "CONNECT") and status < 300):
            body = b""
        elif "chunked" in lower.get("transfer-encoding", ""):
            body = b""
            while size := int(self.read_until(b"\r\n").split(b";")[0], 16):
                body += self.read_exactly(size)
                self.read_exactly(2)
            self.read_until(b"\r\n")
        elif "content-length" in lower:
            body = self.read_exactly(int(lower["content-length"]))
        else:
            body = self.rest()
        return Response(status, headers, body)

    def rest(self) -> bytes:
        """Everything until the end."""
        rest, self.buffer = self.buffer, b""
        while data := self.recv():
            rest += data
        return rest

    def closed(self) -> bool:
        """Whether the peer closes without another byte."""
        return not self.buffer and not self.recv()

    def start_tls(self, context: ssl.SSLContext, name: str | None) -> None:
        """TLS over what is connected."""
        self.sock = context.wrap_socket(self.sock, server_hostname=name)

    def close(self) -> None:
        """Hang up."""
        self.sock.close()


STATUSES = {  # contract section 6
    **dict.fromkeys(("no_rule", "blocked", "agent_killed", "private_address"), 403),
    **dict.fromkeys(("protocol_not_allowed", "credential_scope", "secret_leak"), 403),
    **dict.fromkeys(("no_identity", "bad_identity", "identity_conflict"), 407),
    **dict.fromkeys(("credential_unavailable", "policy_unavailable", "store_unavailable", "audit_unavailable"), 503),
    **dict.fromkeys(("upstream_unreachable", "upstream_tls"), 502),
    "authority_mismatch": 421,
    "ambiguous_request": 400,
    "limit_exceeded": 429,
    "body_too_large": 413,
    "upstream_timeout": 504,
    "internal": 500,
}


def refused(response: Response, code: str) -> dict[str, Any]:
    """The error of a refusal, once everything that every refusal promises was seen."""
    assert (response.status, response.code) == (STATUSES[code], code), response
    assert response.header("content-type") == "application/json"
    error: dict[str, Any] = response.json()["error"]
    assert set(response.json()) == {"error"}
    assert list(error) == ["code", "message", "agent", "rule", "request_id", "hint"]
    verdict = "allow" if code.startswith("upstream_") else "block"
    assert response.header("sallyport-decision") == f"{verdict}; reason={code}; id={error['request_id']}"
    assert error["message"]
    assert error["hint"]
    for word in (str(ROOT), sys.prefix, "/tmp", "site-packages", "Traceback", "mitm"):
        assert word not in response.body.decode()
        assert word not in str(response.headers)
    challenge = 'Basic realm="sallyport"' if response.status == 407 else None
    assert response.header("proxy-authenticate") == challenge
    assert (response.header("retry-after") is not None) == (response.status in (429, 503))
    return error


def connect_to(host: str, port: int) -> socket.socket:
    """A connection by TCP, or to the unix socket at the path `host`."""
    if not host.startswith("/"):
        return socket.create_connection((host, port), PATIENCE)
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(host)
    return sock


def bound(entry: str) -> tuple[str, int]:
    """Where a listener of any kind can be connected to; the path of a unix socket has no port."""
    if entry.startswith("unix:"):
        return entry.removeprefix("unix:"), 0
    host, _, port = entry.removeprefix("tls://").removeprefix("transparent@").rpartition(":")
    return host.strip("[]"), int(port)


class Proxy:
    """A proxy process with a folder of its own."""

    module = "proxy"
    enter: tuple[str, ...] = ()  # what stands before the command, such as a namespace to run in

    def __init__(self, folder: Path, settings: Mapping[str, Any], rules: str) -> None:
        self.folder = folder
        self.config = folder / "sallyport.yaml"
        defaults = {"listen": ["127.0.0.1:0"], "admin": "127.0.0.1:0", "lane": os.environ.get("TEST_LANE", "mitmproxy")}
        (folder / "rules").mkdir(parents=True, exist_ok=True)
        self.config.write_text(yaml.safe_dump({**defaults, **settings}))
        self.write_rules(rules)
        self.process: subprocess.Popen[str] | None = None
        self.tokens: dict[str, str] = {}
        self.clients: list[Connection] = []
        self.said: list[str] = []  # lines on standard output; an empty one at the end
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SALLYPORT_")},
            "PYTHONPATH": str(ROOT),
        }

    def write_rules(self, text: str, name: str = "rules.yaml") -> None:
        """Put a rule file in place at once, as an editor would."""
        draft = self.folder / "rules" / f".{name}.draft"
        draft.write_text(text)
        draft.replace(self.folder / "rules" / name)

    def start(self, wait: bool = True) -> Self:
        """Start it and wait until it says that it is ready."""
        self.stderr = (self.folder / "stderr.txt").open("a")
        self.process = subprocess.Popen(
            [*self.enter, sys.executable, "-P", "-m", self.module, "run", "--config", str(self.config)],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
        )
        said, stdout = self.said, self.process.stdout
        assert stdout
        said.clear()
        self._reader = threading.Thread(target=lambda: [*map(said.append, stdout), said.append("")], daemon=True)
        self._reader.start()
        if not wait:
            return self
        first = wait_for(lambda: said, "the first line")[0]
        if not first:
            raise AssertionError(f"the proxy did not start: {(self.folder / 'stderr.txt').read_text()}")
        running = json.loads((self.folder / ".sallyport" / "running.json").read_text())
        self.listeners = [bound(entry) for entry in running["listen"]]
        self.address = self.listeners[0]
        self.admin = running["admin"]
        return self

    def stop(self) -> None:
        """SIGTERM and wait."""
        if self.process:
            self.process.terminate()
            self.ended()

    def ended(self) -> None:
        """Wait until it has ended, in order."""
        assert self.process
        status = self.process.wait(PATIENCE)
        self._forget()
        assert status == 0, f"{status}: {self.stderr_text()}"

    def kill(self) -> None:
        """kill -9."""
        assert self.process
        self.process.kill()
        self.process.wait()
        self._forget()

    def _forget(self) -> None:
        assert self.process
        assert self.process.stdout
        for client in self.clients:
            client.close()
        self.clients.clear()
        self._reader.join(PATIENCE)
        self.process.stdout.close()
        self.stderr.close()
        self.process = None

    def cli(self, *words: str, stdin: str | bytes = "", check: bool = True) -> subprocess.CompletedProcess[str]:
        """A `sallyport` command with this proxy's settings."""
        text = stdin.decode("latin-1") if isinstance(stdin, bytes) else stdin
        result = subprocess.run(
            [sys.executable, "-P", "-m", "proxy", *words, "--config", str(self.config)],
            input=text,
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=self.environment,
            timeout=PATIENCE,
            check=False,
        )
        if check and result.returncode:
            raise AssertionError(f"{words}: {result.stderr}")
        return result

    def agent(self, name: str = "coder-1", *words: str) -> str:
        """The token of an agent, registered now if it was not, and known to the proxy."""
        if name not in self.tokens:
            self.tokens[name] = str(json.loads(self.cli("agent", "add", name, "--json", *words).stdout)["token"])
            wait_for(lambda: self.knows(name), f"agent {name}")
        return self.tokens[name]

    def knows(self, name: str) -> bool:
        """Whether requests of the agent are identified."""
        with contextlib.closing(self.connect()) as connection:
            connection.send(f"CONNECT probe.test:1 HTTP/1.1\r\nhost: probe.test:1\r\n{self.auth(name)}\r\n".encode())
            return connection.response("CONNECT").status not in (407, 429)  # 429: too many were not known

    def credential(self, name: str, secret: str, *words: str) -> None:
        """Seal a credential and wait until the proxy follows."""
        self.cli("vault", "put", name, *words, stdin=secret)

    def auth(self, name: str) -> str:
        """The header line that proves an agent."""
        return f"proxy-authorization: Bearer {self.tokens[name]}\r\n"

    def connect(self, listener: int = 0) -> Connection:
        """A TCP connection to a listener."""
        client = Connection(connect_to(*self.listeners[listener]))
        self.clients.append(client)
        return client

    @property
    def trust(self) -> ssl.SSLContext:
        """TLS that trusts the proxy's CA."""
        return ssl.create_default_context(cafile=self.folder / "certs" / "ca.pem")

    def tunnel(
        self, host: str, port: int = 443, agent: str = "coder-1", sni: str | None = "", alpn: str = ""
    ) -> Connection:
        """CONNECT and TLS, ready for a request. `sni` empty: the host; None: no name is sent."""
        connection = self.connect()
        self.agent(agent)
        connection.send(f"CONNECT {host}:{port} HTTP/1.1\r\nhost: {host}:{port}\r\n{self.auth(agent)}\r\n".encode())
        response = connection.response("CONNECT")
        assert response.status == 200, response
        context = self.trust
        context.check_hostname = sni is not None
        if alpn:
            context.set_alpn_protocols([alpn])
        connection.start_tls(context, host if sni == "" else sni)
        return connection

    def get(
        self,
        url: str,
        agent: str = "coder-1",
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> Response:
        """One request by a fresh tunnel, or by the absolute form where the URL says http."""
        scheme, _, rest = url.partition("://")
        authority, slash, path = rest.partition("/")
        host, _, port = authority.partition(":")
        lines = [f"{name}: {value}" for name, value in (headers or {}).items()]
        if body is not None:
            lines.append(f"content-length: {len(body)}")
        if scheme == "https":
            connection = self.tunnel(host, int(port or 443), agent)
            target, lines = slash + path or "/", [f"host: {authority}", *lines]
        else:
            self.agent(agent)
            connection = self.connect()
            target, lines = url, [f"host: {authority}", self.auth(agent).strip(), *lines]
        with contextlib.closing(connection):
            head = "\r\n".join([f"{method} {target} HTTP/1.1", *lines])
            connection.send(head.encode("latin-1") + b"\r\n\r\n" + (body or b""))
            return connection.response(method)

    def fetch_admin(self, path: str) -> tuple[int, str]:
        """An answer of the admin endpoint."""
        try:
            with urllib.request.urlopen(f"http://{self.admin}{path}", timeout=PATIENCE) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics by its name and labels as written."""
        status, text = self.fetch_admin("/metrics")
        assert status == 200
        lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in lines}

    def metric(self, name: str, **labels: str) -> float:
        """One sample, 0 where there is none yet."""
        text = ",".join(f'{label}="{value}"' for label, value in labels.items())
        return self.metrics().get(f"{name}{{{text}}}" if text else name, 0.0)

    def stderr_text(self) -> str:
        """What it wrote to standard error so far."""
        return (self.folder / "stderr.txt").read_text()

    def audit(self, count: int = 1, **wanted: object) -> list[dict[str, Any]]:
        """The audit lines with these values, when there are at least `count`."""
        path = self.folder / ".sallyport" / "audit.jsonl"

        def lines() -> list[dict[str, Any]]:
            text = path.read_text() if path.exists() else ""
            found = [json.loads(line) for line in text.split("\n")[:-1] if line]
            chosen = [line for line in found if all(line[key] == value for key, value in wanted.items())]
            return chosen if len(chosen) >= count else []

        return wait_for(lines, f"audit lines with {wanted}")
