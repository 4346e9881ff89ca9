"""What may not leave does not, in any part of a request: secrets, agents' tokens, canaries, placeholders, keys."""

from __future__ import annotations

import asyncio
import base64
import gzip
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import brotli
import pytest
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Event,
    Ping,
    Pong,
    Request,
    TextMessage,
)

from proxy.keyformats import checksum
from tests.harness import Connection, Proxy, Response, Upstream, refused, wait_for

type Make = Callable[..., Proxy]

SECRET = "real/key+4f1e9b7c2d=="
HEX = "9f8e7d6c5b4a39281706f5e4d3c2b1a0"
ELSEWHERE = "never-opened-5d1c7e9a"
TEXT = "placeheld-8c2f6a1e9b"
RULES = """
version: 1
rules:
  - name: api
    match: {host: api.test}
    action: allow
    inject: [{credential: api, as: bearer}]
  - name: other
    match: {host: other.test, websocket: true}
    action: allow
  - name: labels
    match: {host: "**.wild.test"}
    action: allow
  - name: placeholders
    match: {host: a.api.test}
    action: allow
    inject: [{credential: ph, as: placeholder, in: [header, query, path, body]}]
  - name: scanned
    match: {host: b.api.test}
    action: allow
    scan: secrets
"""
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def proxy(make_proxy: Make, lane: str) -> Proxy:
    proxy = make_proxy(RULES, lane=lane)
    proxy.agent()
    proxy.agent("coder-2")
    proxy.credential("api", SECRET, "--host", "api.test")
    proxy.credential("hex", HEX, "--host", "api.test")
    proxy.credential("elsewhere", ELSEWHERE, "--host", "nowhere.test")
    proxy.credential("ph", TEXT, "--kind", "placeholder", "--host", "a.api.test")
    wait_for(lambda: proxy.get("https://other.test/", method="POST", body=TEXT.encode()).status == 403, "the guard")
    return proxy


@pytest.fixture(autouse=True)
def fresh(proxy: Proxy, upstream: Upstream) -> Iterator[None]:
    upstream.reset()
    yield
    upstream.reset()


def leaks(proxy: Proxy, upstream: Upstream, response: Response, kind: str, name: str, where: str) -> None:
    """It was refused, is on record, and nothing was sent."""
    error = refused(response, "secret_leak")
    assert upstream.seen == []
    line = proxy.audit(id=error["request_id"])[0]
    assert line["leak"] == {"kind": kind, "name": name, "where": where}
    assert name not in error["message"] or not name
    assert line["injected"] == []


SPELLINGS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "percent-encoded": lambda s: quote(s, safe=""),
    "every octet percent-encoded": lambda s: "".join(f"%{ord(char):02x}" for char in s),
    "base64": lambda s: base64.b64encode(s.encode()).decode(),
    "base64 one on": lambda s: base64.b64encode(b"x" + s.encode()).decode(),
    "base64 two on": lambda s: base64.urlsafe_b64encode(b"xy" + s.encode() + b"z").decode(),
    "hex": lambda s: s.encode().hex(),
    "json": lambda s: json.dumps(s).replace("/", "\\/"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("where", ["url", "header", "body"])
@pytest.mark.parametrize("secret", [SECRET, ELSEWHERE])
def test_a_secret_of_the_vault_does_not_leave(
    proxy: Proxy, upstream: Upstream, spelling: str, where: str, secret: str
) -> None:
    """Whether or not a lease was ever opened for it."""
    text = SPELLINGS[spelling](secret)
    url, headers, body = "https://other.test/", {}, None
    if where == "url":
        url += f"a?b={text}" if "%" in text else f"a?b={quote(text, safe='+/=')}"
    elif where == "header":
        headers = {"x-note": text}
    else:
        body = b"before " + text.encode() + b" after"
    response = proxy.get(url, method="POST" if body else "GET", headers=headers, body=body)
    leaks(proxy, upstream, response, "credential", "api" if secret == SECRET else "elsewhere", where)


@pytest.mark.parametrize(
    "headers",
    [{"authorization": f"Bearer {SECRET}"}, {"cookie": f"a=b; c={SECRET}"}, {HEX: "1"}],
    ids=["authorization", "cookie", "a header's name"],
)
def test_it_does_not_leave_in_any_header(proxy: Proxy, upstream: Upstream, headers: dict[str, str]) -> None:
    response = proxy.get("https://other.test/", headers=headers)
    leaks(proxy, upstream, response, "credential", "hex" if HEX in headers else "api", "header")


@pytest.mark.parametrize("path", [f"/{HEX}", f"/a/%39{HEX[1:]}/b", f"/%2539{HEX[1:]}"])
def test_it_does_not_leave_in_a_path_however_that_is_read(proxy: Proxy, upstream: Upstream, path: str) -> None:
    leaks(proxy, upstream, proxy.get(f"https://other.test{path}"), "credential", "hex", "url")


@pytest.mark.parametrize("host", [f"{HEX}.wild.test", f"{HEX[:9]}.{HEX[9:20]}.{HEX[20:]}.wild.test"])
def test_it_does_not_leave_in_a_host_name(proxy: Proxy, upstream: Upstream, host: str) -> None:
    """Which would tell it to a DNS server of the attacker's."""
    leaks(proxy, upstream, proxy.get(f"https://{host}/"), "credential", "hex", "url")


def test_a_secret_does_not_even_go_where_it_is_meant_for(proxy: Proxy, upstream: Upstream) -> None:
    """An agent that has it has read what it should not have; what the proxy adds itself passes."""
    assert proxy.get("https://api.test/").status == 200
    assert upstream.seen[0].header("authorization") == [f"Bearer {SECRET}"]
    upstream.reset()
    response = proxy.get("https://api.test/", headers={"authorization": f"Bearer {SECRET}"})
    leaks(proxy, upstream, response, "credential", "api", "header")


@pytest.mark.parametrize("agent", ["coder-1", "coder-2"])
@pytest.mark.parametrize("spelling", ["plain", "base64", "base64 one on", "base64 two on"])
def test_no_agents_token_leaves(proxy: Proxy, upstream: Upstream, agent: str, spelling: str) -> None:
    """Its own, or one it came by."""
    text = SPELLINGS[spelling](proxy.tokens[agent])
    response = proxy.get("https://other.test/", headers={"authorization": f"Basic {text}"})
    leaks(proxy, upstream, response, "token", "", "header")
    response = proxy.get("https://other.test/", method="POST", body=f'{{"t": "{text}"}}'.encode())
    leaks(proxy, upstream, response, "token", "", "body")


def test_a_token_that_proves_who_asks_is_no_leak(proxy: Proxy, upstream: Upstream) -> None:
    """Some clients repeat it inside the tunnel; it is taken out."""
    headers = {"proxy-authorization": f"Bearer {proxy.tokens['coder-1']}"}
    assert proxy.get("https://other.test/", headers=headers).status == 200
    assert upstream.seen[0].header("proxy-authorization") == []


def test_a_canary_is_guarded_within_a_second_until_it_is_removed(proxy: Proxy, upstream: Upstream) -> None:
    name = f"trap-{next(NUMBERS)}"
    token = json.loads(proxy.cli("canary", "add", name, "--json").stdout)["token"]
    assert [entry["token"] for entry in json.loads(proxy.cli("canary", "list", "--json").stdout)] == [token]

    def status() -> int:
        return proxy.get("https://other.test/", headers={"x-found": token}).status

    wait_for(lambda: status() == 403, "the canary")
    upstream.reset()
    response = proxy.get("https://other.test/", headers={"x-found": base64.b64encode(token.encode()).decode()})
    leaks(proxy, upstream, response, "canary", name, "header")
    proxy.cli("canary", "remove", name)
    wait_for(lambda: status() == 200, "its removal")


def test_a_rotated_credential_is_guarded_within_a_second(proxy: Proxy, upstream: Upstream) -> None:
    name, secret = f"late-{next(NUMBERS)}", os.urandom(12).hex()
    proxy.credential(name, secret, "--host", "nowhere.test")
    wait_for(lambda: proxy.get(f"https://other.test/{secret}").status == 403, "the new secret")
    newer = os.urandom(12).hex()
    proxy.cli("vault", "rotate", name, stdin=newer)
    wait_for(lambda: proxy.get(f"https://other.test/{newer}").status == 403, "the newer secret")
    assert proxy.get(f"https://other.test/{secret}").status == 200
    proxy.cli("vault", "remove", name)
    wait_for(lambda: proxy.get(f"https://other.test/{newer}").status == 200, "its removal")


# Placeholders


def test_a_placeholder_goes_only_where_its_credential_may(proxy: Proxy, upstream: Upstream) -> None:
    mark = "slp_placeholder_ph"
    response = proxy.get("https://a.api.test/", method="POST", headers={"x-key": mark}, body=f"k={mark}".encode())
    assert response.status == 200
    assert (upstream.seen[0].header("x-key"), upstream.seen[0].body) == ([TEXT], f"k={TEXT}".encode())
    upstream.reset()
    response = proxy.get("https://other.test/", headers={"x-key": mark})
    leaks(proxy, upstream, response, "placeholder", "ph", "header")
    leaks(proxy, upstream, proxy.get(f"https://other.test/?k={mark}"), "placeholder", "ph", "url")
    response = proxy.get("https://other.test/", method="POST", body=f"k={mark}".encode())
    leaks(proxy, upstream, response, "placeholder", "ph", "body")


# Bodies


def post(proxy: Proxy, headers: str = "", path: str = "/") -> Connection:
    client = proxy.tunnel("other.test")
    client.send(f"POST {path} HTTP/1.1\r\nhost: other.test\r\n{headers}\r\n".encode())
    return client


CODINGS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": brotli.compress,
    "gzip, br": lambda data: brotli.compress(gzip.compress(data)),
}


@pytest.mark.parametrize("coding", CODINGS)
def test_compression_hides_nothing(proxy: Proxy, upstream: Upstream, coding: str) -> None:
    body = CODINGS[coding](b"lorem ipsum " * 50 + SECRET.encode() + b" dolor" * 50)
    response = proxy.get("https://other.test/", method="POST", headers={"content-encoding": coding}, body=body)
    leaks(proxy, upstream, response, "credential", "api", "body")


@pytest.mark.parametrize("coding", ["gzip", "dcb"])
def test_a_coding_that_the_body_does_not_have_hides_nothing(proxy: Proxy, upstream: Upstream, coding: str) -> None:
    headers = {"content-encoding": coding}
    response = proxy.get("https://other.test/", method="POST", headers=headers, body=SECRET.encode())
    leaks(proxy, upstream, response, "credential", "api", "body")


def test_a_bomb_is_not_looked_through_for_ever(proxy: Proxy, upstream: Upstream) -> None:
    body = brotli.compress(bytes(1 << 26), quality=4)
    response = proxy.get("https://other.test/", method="POST", headers={"content-encoding": "br"}, body=body)
    leaks(proxy, upstream, response, "unreadable", "", "body")


@pytest.mark.parametrize("size", [1, 5, 13])
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_body_that_is_streaming_is_cut(proxy: Proxy, upstream: Upstream, size: int, framing: str) -> None:
    """However small the pieces are, the upstream gets no more of it than a few bytes."""
    body = b"x" * 200_000 + SECRET.encode() + b"y" * 200_000
    got = bytearray()

    async def read(reader: object, writer: object) -> None:
        while data := await reader.read(65536):  # type: ignore[attr-defined]
            got.extend(data)

    upstream.raw = read
    chunked, path = framing == "chunked", f"/cut/{next(NUMBERS)}"
    client = post(proxy, "transfer-encoding: chunked\r\n" if chunked else f"content-length: {len(body)}\r\n", path)

    def send(data: bytes) -> None:
        client.send(b"%x\r\n%s\r\n" % (len(data), data) if chunked else data)

    send(body[:199_990])
    wait_for(lambda: len(got) > 190_000, "the beginning")
    try:
        for at in range(199_990, 200_040, size):
            send(body[at : at + size])
    except OSError:
        pass
    refused(client.response(), "secret_leak")
    assert client.closed()
    line = proxy.audit(path=path)[0]
    assert (line["verdict"], line["reason"]) == ("block", "secret_leak")
    assert line["leak"] == {"kind": "credential", "name": "api", "where": "body"}
    assert SECRET.encode() not in got
    assert SECRET[:12].encode() not in got
    assert not got.endswith(b"0\r\n\r\n")


def test_a_small_chunked_body_is_not_sent(proxy: Proxy, upstream: Upstream) -> None:
    client = post(proxy, "transfer-encoding: chunked\r\n", "/small")
    client.send(b"%x\r\n%s\r\n0\r\n\r\n" % (len(SECRET), SECRET.encode()))
    refused(client.response(), "secret_leak")
    assert proxy.audit(path="/small")[0]["reason"] == "secret_leak"
    assert upstream.seen == []


def test_a_body_that_only_begins_like_a_secret_arrives_whole(proxy: Proxy, upstream: Upstream) -> None:
    body = SECRET[:15].encode() + b"-" + ELSEWHERE[:-1].encode()
    assert proxy.get("https://other.test/", method="POST", body=body).status == 200
    assert upstream.seen[0].body == body
    client = post(proxy, "transfer-encoding: chunked\r\n")
    for byte in body:
        client.send(b"1\r\n%c\r\n" % byte)
    client.send(b"0\r\n\r\n")
    assert client.response().status == 200
    assert upstream.seen[1].body == body


def test_nothing_is_held_up_by_looking(proxy: Proxy, upstream: Upstream) -> None:
    """Each piece of a stream reaches the upstream before the next is sent, whatever it ends with."""
    got = bytearray()

    async def read(reader: object, writer: object) -> None:
        while data := await reader.read(65536):  # type: ignore[attr-defined]
            got.extend(data)

    upstream.raw = read
    client = post(proxy, "transfer-encoding: chunked\r\n")
    for piece in (b"first r", b"then re", b"and s", b"sk-", b"last slp"):
        client.send(b"%x\r\n%s\r\n" % (len(piece), piece))
        wait_for(lambda piece=piece: piece in got, repr(piece))


# Keys by their form


def keys() -> dict[str, str]:
    random = "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5"
    check = checksum(random.encode()).decode()
    return {
        "github": f"ghp_{random}{check}",
        "npm": f"npm_{random}{check}",
        "aws": "AKIA" + "Q3EGTZ5LMNOPRSXY",
        "google": "AIza" + "Sy" + "D4-" * 11,
        "anthropic": "sk-ant-api03-" + "aB3_" * 23 + "xAA",
        "private-key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    }


@pytest.mark.parametrize("name", keys())
@pytest.mark.parametrize("where", ["url", "header", "body"])
def test_keys_are_known_by_their_form_where_a_rule_says_so(
    proxy: Proxy, upstream: Upstream, name: str, where: str
) -> None:
    key = keys()[name]

    def ask(host: str) -> Response:
        if where == "url":
            return proxy.get(f"https://{host}/?k={quote(key)}")
        if where == "header":
            return proxy.get(f"https://{host}/", headers={"x-key": key})
        return proxy.get(f"https://{host}/", method="POST", body=f"key={key}\n".encode())

    leaks(proxy, upstream, ask("b.api.test"), "key", name, where)
    assert ask("other.test").status == 200


@pytest.mark.parametrize("name", ["github", "npm"])
def test_a_checksum_that_does_not_fit_is_no_key(proxy: Proxy, upstream: Upstream, name: str) -> None:
    key = keys()[name]
    wrong = key[:-1] + ("0" if key[-1] != "0" else "1")
    assert proxy.get("https://b.api.test/", headers={"x-key": wrong}).status == 200


# On record


def test_leaks_are_counted(proxy: Proxy) -> None:
    def count() -> float:
        return proxy.metric("sallyport_leaks_refused_total", agent="coder-1", kind="credential", where="header")

    before = count()
    proxy.get("https://other.test/", headers={"x-a": SECRET})
    assert count() == before + 1


@pytest.mark.parametrize(
    "url", [f"https://nobody.test/{HEX}", f"https://{HEX}.nobody.test/", f"https://other.test/{HEX}"]
)
def test_what_was_tried_is_not_written_down_with_the_secret(proxy: Proxy, upstream: Upstream, url: str) -> None:
    """Refused for whatever reason: neither log, audit, metrics nor answer repeats it."""
    response = proxy.get(url)
    assert response.status == 403
    assert HEX.encode() not in response.body
    line = proxy.audit(id=response.json()["error"]["request_id"])[0]
    assert (line["host"], line["path"]) == ("[redacted]", "/[redacted]")
    assert upstream.seen == []


def test_nothing_the_proxy_keeps_tells_a_secret(proxy: Proxy) -> None:
    """After all of the above."""
    state = proxy.folder / ".sallyport"
    texts = [path.read_bytes() for path in state.rglob("*") if path.is_file() and "key" not in path.name]
    texts += [proxy.stderr_text().encode(), proxy.fetch_admin("/metrics")[1].encode()]
    texts += [proxy.fetch_admin("/api/status")[1].encode()]
    assert len(texts) > 5
    for secret in (SECRET, HEX, ELSEWHERE, TEXT, *proxy.tokens.values()):
        for spell in SPELLINGS.values():
            assert not any(spell(secret).encode() in text for text in texts)


def test_no_process_shows_a_secret_and_none_dumps_its_memory(proxy: Proxy) -> None:
    assert proxy.process
    folder = Path(f"/proc/{proxy.process.pid}")
    children = (folder / "task" / folder.name / "children").read_text().split()
    shown = b"".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in (folder.name, *children))
    assert b"proxy" in shown
    assert not any(secret.encode() in shown for secret in (SECRET, HEX, ELSEWHERE, TEXT, *proxy.tokens.values()))
    [core] = [line for line in (folder / "limits").read_text().splitlines() if line.startswith("Max core file size")]
    assert core.split()[4:6] == ["0", "0"]


# WebSockets


@pytest.mark.parametrize(
    "event",
    [
        TextMessage(data=f"it is {SECRET}"),
        BytesMessage(data=b"it is " + base64.b64encode(SECRET.encode())),
        Ping(payload=SECRET.encode()),
        Pong(payload=SECRET.encode()),
        CloseConnection(code=1000, reason=SECRET),
    ],
    ids=["text", "bytes", "ping", "pong", "close"],
)
def test_a_websocket_says_no_secret(proxy: Proxy, upstream: Upstream, event: Event) -> None:
    """Its connection is cut."""
    got = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server = WSConnection(ConnectionType.SERVER)
        server.receive_data(await reader.readuntil(b"\r\n\r\n"))
        writer.write(server.send(AcceptConnection()))
        while data := await reader.read(65536):
            server.receive_data(data)
            got.extend(repr(list(server.events())).encode())

    upstream.raw = serve
    client, path = proxy.tunnel("other.test"), f"/live/{next(NUMBERS)}"
    socket = WSConnection(ConnectionType.CLIENT)
    client.send(socket.send(Request(host="other.test", target=path)))
    socket.receive_data(client.read_until(b"\r\n\r\n"))
    list(socket.events())
    client.send(socket.send(TextMessage(data="hello")))
    wait_for(lambda: b"hello" in got, "the first message")
    client.send(socket.send(event))
    while client.recv():
        pass
    line = proxy.audit(path=path)[0]
    assert (line["verdict"], line["reason"]) == ("block", "secret_leak")
    assert line["leak"] == {"kind": "credential", "name": "api", "where": "websocket"}
    assert SECRET.encode() not in got
    assert base64.b64encode(SECRET.encode()) not in got
