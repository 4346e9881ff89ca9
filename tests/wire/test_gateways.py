"""A trusted gateway speaks for many agents on one connection, and for nobody else."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gatewaytoken import mint
from tests.harness import Connection, Proxy, Response, Upstream, refused, wait_for

RULES = """
version: 1
rules:
  - {name: tls, match: {host: api.test}, action: allow}
  - {name: plain, match: {host: api.test, scheme: http}, action: allow}
"""

type Make = Callable[..., Proxy]


@pytest.fixture(scope="module")
def proxy(lane: str, make_proxy: Make) -> Proxy:
    proxy = make_proxy(RULES, lane=lane)
    for name in ("coder-1", "coder-2", "root"):
        proxy.agent(name)
    return proxy


@pytest.fixture(scope="module")
def key(proxy: Proxy, _shared_plain_upstream: Upstream) -> str:
    """Of the gateway `one`, which speaks for coders."""
    _shared_plain_upstream.reset()  # of what the module before this one left
    return added(proxy, "one")


def added(proxy: Proxy, name: str) -> str:
    key = proxy.cli("gateway", "add", name, "--agents", "coder-*", "--ttl", "2m").stdout.strip()
    wait_for(lambda: ask(proxy.connect(), mint(key, "coder-1", name)).status == 200)
    return key


def ask(connection: Connection, token: str, path: str = "/x") -> Response:
    """One plain request in absolute form."""
    proof = f"Proxy-Authorization: Bearer {token}"
    connection.send(f"GET http://api.test{path} HTTP/1.1\r\nHost: api.test\r\n{proof}\r\n\r\n".encode())
    return connection.response()


def test_two_agents_share_a_connection_and_stay_apart(proxy: Proxy, key: str, plain_upstream: Upstream) -> None:
    connection = proxy.connect()
    for number in range(4):
        assert ask(connection, mint(key, f"coder-{number % 2 + 1}"), f"/apart/{number}").status == 200
    lines = [proxy.audit(path=f"/apart/{number}")[0] for number in range(4)]
    assert [line["agent"] for line in lines] == ["coder-1", "coder-2"] * 2
    assert {str(line["identity"]) for line in lines} == {"['gateway:one']"}
    assert [seen.header("proxy-authorization") for seen in plain_upstream.seen] == [[]] * 4
    assert 'sallyport_identity_proofs_total{proof="gateway"}' in proxy.fetch_admin("/metrics")[1]


def test_a_tunnel_is_opened_with_a_gateways_token(proxy: Proxy, key: str, upstream: Upstream) -> None:
    """As Basic too, which is what a proxy URL makes; on whose behalf is in the audit log."""
    token = mint(key, "ada@example.com", act={"sub": "coder-1"})
    pair = base64.b64encode(f"coder-1:{token}".encode()).decode()
    connection = proxy.connect()
    connection.send(f"CONNECT api.test:443 HTTP/1.1\r\nProxy-Authorization: Basic {pair}\r\n\r\n".encode())
    assert connection.response("CONNECT").status == 200
    connection.start_tls(proxy.trust, "api.test")
    connection.send(b"GET /delegated HTTP/1.1\r\nHost: api.test\r\n\r\n")
    assert connection.response().status == 200
    (line,) = proxy.audit(path="/delegated")
    assert (line["agent"], line["identity"], line["on_behalf_of"]) == ("coder-1", ["gateway:one"], "ada@example.com")


@pytest.mark.parametrize(
    ("agent", "life", "gateway"),
    [
        ("root", 60, "one"),
        ("coder-9", 60, "one"),
        ("coder-1", 3600, "one"),
        ("coder-1", -60, "one"),
        ("coder-1", 60, "no"),
    ],
    ids=["outside its scope", "not registered", "too long", "over", "unknown gateway"],
)
def test_a_token_beyond_its_bounds_is_refused(
    proxy: Proxy, key: str, plain_upstream: Upstream, agent: str, life: int, gateway: str
) -> None:
    refused(ask(proxy.connect(), mint(key, agent, gateway, life)), "bad_identity")
    assert plain_upstream.seen == []


def test_a_gateways_key_is_no_token_and_a_token_no_key(proxy: Proxy, key: str, plain_upstream: Upstream) -> None:
    """An agent that holds its own token, or a token of the gateway, mints nothing."""
    refused(ask(proxy.connect(), key), "bad_identity")
    refused(ask(proxy.connect(), mint(proxy.tokens["coder-1"], "coder-2")), "bad_identity")
    refused(ask(proxy.connect(), mint(mint(key, "coder-1"), "coder-2")), "bad_identity")
    assert plain_upstream.seen == []


def test_two_tokens_for_two_agents_conflict(proxy: Proxy, key: str, plain_upstream: Upstream) -> None:
    connection = proxy.connect()
    proofs = "".join(f"Proxy-Authorization: Bearer {mint(key, f'coder-{number}')}\r\n" for number in (1, 2))
    connection.send(f"GET http://api.test/ HTTP/1.1\r\nHost: api.test\r\n{proofs}\r\n".encode())
    refused(connection.response(), "identity_conflict")
    assert plain_upstream.seen == []


def test_a_killed_agent_is_refused_whoever_speaks_for_it(proxy: Proxy, key: str, plain_upstream: Upstream) -> None:
    proxy.cli("agent", "kill", "coder-2")

    def refusal() -> Response | None:
        try:
            answer = ask(proxy.connect(), mint(key, "coder-2"))
        except ConnectionError:  # the kill met it under way, and cut it
            return None
        return answer if answer.status != 200 else None

    killed = wait_for(refusal)
    refused(killed, "agent_killed")
    proxy.cli("agent", "revive", "coder-2")
    wait_for(lambda: ask(proxy.connect(), mint(key, "coder-2")).status == 200)


def test_a_removed_gateway_ends_within_a_second(proxy: Proxy, plain_upstream: Upstream) -> None:
    """Tokens whose signature was checked before too; its key was nowhere on disk in plain."""
    key = added(proxy, "two")
    token = mint(key, "coder-1", "two")
    assert ask(proxy.connect(), token).status == 200
    listed = json.loads(proxy.cli("gateway", "list", "--json").stdout)
    assert {"two"} <= {gateway["gateway"] for gateway in listed}
    proxy.cli("gateway", "remove", "two")
    wait_for(lambda: ask(proxy.connect(), token).status == 407)
    files = [path for path in proxy.folder.rglob("*") if path.is_file()]
    assert not [path for path in files if key.encode() in path.read_bytes()]


def test_the_worker_in_the_docs_mints_what_is_accepted(proxy: Proxy, key: str, tmp_path: Path) -> None:
    """The lines of docs/identity.md, run by a JavaScript engine with WebCrypto."""
    node = shutil.which("node")
    assert node, "node is needed: apt-get install nodejs"
    page = (Path(__file__).parents[2] / "docs" / "identity.md").read_text()
    code = page.partition("```js\n")[2].partition("```")[0]
    script = tmp_path / "mint.mjs"
    script.write_text(f"{code}\nprocess.stdout.write(await mint({key!r}, 'one', 'coder-1'));\n")
    token = subprocess.run([node, str(script)], capture_output=True, text=True, check=True, timeout=30).stdout
    assert ask(proxy.connect(), token, "/from-the-docs").status == 200
    assert proxy.audit(path="/from-the-docs")[0]["agent"] == "coder-1"
