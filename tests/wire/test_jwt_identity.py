"""Tokens of an identity provider, whose keys are in a file or at a URL, and change."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
import trustme
from cryptography.hazmat.primitives.asymmetric import ec

from tests.harness import Connection, Proxy, Reply, Response, Upstream, refused, server_context, wait_for
from tests.unit.test_jwtidentity import AUDIENCE, ISSUER, jwks

RULES = """
version: 1
rules:
  - {name: tls, match: {host: api.test}, action: allow}
  - {name: web, agents: {labels: {team: web}}, match: {host: api.test, scheme: http, path: /web}, action: allow}
  - {name: plain, match: {host: api.test, scheme: http, path: "/x/**"}, action: allow}
"""
OLD, NEW = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))

type Make = Callable[..., Proxy]


def token(key: Any = OLD, kid: str = "old", **claims: Any) -> str:
    body = {"iss": ISSUER, "aud": AUDIENCE, "sub": "coder-1", "exp": int(time.time()) + 300, **claims}
    return jwt.encode(body, key, "ES256", headers={"kid": kid})


def ask(connection: Connection, proof: str, path: str = "/x/1", scheme: str = "Bearer") -> Response:
    line = f"Proxy-Authorization: {scheme} {proof}"
    connection.send(f"GET http://api.test{path} HTTP/1.1\r\nHost: api.test\r\n{line}\r\n\r\n".encode())
    return connection.response()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory, lane: str) -> Path:
    return tmp_path_factory.mktemp("keys") / "jwks.json"


@pytest.fixture(scope="module")
def proxy(lane: str, make_proxy: Make, keys: Path) -> Proxy:
    keys.write_text(jwks(old=OLD))
    settings = {"jwks": str(keys), "issuer": ISSUER, "audience": AUDIENCE, "labels": {"team": "team"}}
    proxy = make_proxy(RULES, lane=lane, identity={"jwt": settings})
    for name in ("coder-1", "coder-2"):
        proxy.agent(name)
    return proxy


def test_a_token_names_its_agent_its_labels_and_its_user(
    proxy: Proxy, upstream: Upstream, plain_upstream: Upstream
) -> None:
    """In rules and in the audit log; in a tunnel too."""
    mine = token(sub="ada", act={"sub": "coder-1"}, team="web")
    assert ask(proxy.connect(), mine, "/web").status == 200
    refused(ask(proxy.connect(), token(), "/web"), "no_rule")
    (line,) = [line for line in proxy.audit(2, path="/web") if line["verdict"] == "allow"]
    assert (line["agent"], line["identity"], line["on_behalf_of"]) == ("coder-1", ["jwt"], "ada")
    assert line["labels"] == {"team": "web"}
    connection = proxy.connect()
    pair = base64.b64encode(f"coder-1:{mine}".encode()).decode()
    connection.send(f"CONNECT api.test:443 HTTP/1.1\r\nProxy-Authorization: Basic {pair}\r\n\r\n".encode())
    assert connection.response("CONNECT").status == 200
    connection.start_tls(proxy.trust, "api.test")
    connection.send(b"GET /in-tunnel HTTP/1.1\r\nHost: api.test\r\n\r\n")
    assert connection.response().status == 200
    assert proxy.audit(path="/in-tunnel")[0]["labels"] == {"team": "web"}
    assert 'sallyport_identity_proofs_total{proof="jwt"}' in proxy.fetch_admin("/metrics")[1]


@pytest.mark.parametrize(
    "proof",
    [
        pytest.param(token(NEW), id="another key"),
        pytest.param(token(sub="nobody"), id="not registered"),
        pytest.param(token(aud="other"), id="for another"),
        pytest.param(token(exp=int(time.time()) - 60), id="over"),
    ],
)
def test_a_token_that_proves_nothing_is_refused(proxy: Proxy, plain_upstream: Upstream, proof: str) -> None:
    refused(ask(proxy.connect(), proof), "bad_identity")
    assert plain_upstream.seen == []


def test_a_token_and_another_proof_must_agree(proxy: Proxy, plain_upstream: Upstream) -> None:
    pair = base64.b64encode(f"coder-2:{token()}".encode()).decode()
    refused(ask(proxy.connect(), pair, scheme="Basic"), "identity_conflict")
    assert plain_upstream.seen == []


def test_keys_in_a_file_may_change(proxy: Proxy, plain_upstream: Upstream, keys: Path) -> None:
    """Without a restart; what the old key signed is worth nothing then."""
    keys.write_text(jwks(old=OLD, new=NEW))
    wait_for(lambda: ask(proxy.connect(), token(NEW, "new")).status == 200)
    assert ask(proxy.connect(), token()).status == 200
    keys.write_text(jwks(new=NEW))
    wait_for(lambda: ask(proxy.connect(), token()).status == 407)
    keys.write_text(jwks(old=OLD))
    wait_for(lambda: ask(proxy.connect(), token()).status == 200)


def test_keys_at_a_url_are_fetched_and_renewed(
    make_proxy: Make, lane: str, upstream_ca: trustme.CA, plain_upstream: Upstream, tmp_path: Path
) -> None:
    """With our own token, over TLS that is verified; and while the provider is down those before are used."""
    upstream_ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    (tmp_path / "token").write_text("of-the-proxy\n")
    with Upstream(server_context(upstream_ca, "127.0.0.1")) as provider:
        provider.handler = lambda _: Reply(body=jwks(old=OLD).encode())
        settings = {
            "jwks": f"https://127.0.0.1:{provider.port}/keys",
            "issuer": ISSUER,
            "audience": AUDIENCE,
            "refresh": "200ms",
            "ca": str(tmp_path / "ca.pem"),
            "token_file": str(tmp_path / "token"),
        }
        proxy = make_proxy(RULES, lane=lane, identity={"jwt": settings})
        proxy.agent("coder-1")
        assert ask(proxy.connect(), token()).status == 200
        assert provider.seen[0].header("authorization") == ["Bearer of-the-proxy"]
        provider.handler = lambda _: Reply(status=302, headers=[("location", "https://evil.test/")])
        wait_for(lambda: "cannot be read" in proxy.stderr_text())
        assert ask(proxy.connect(), token()).status == 200
        provider.handler = lambda _: Reply(body=jwks(new=NEW).encode())
        wait_for(lambda: ask(proxy.connect(), token(NEW, "new")).status == 200)
        refused(ask(proxy.connect(), token()), "bad_identity")
    proxy.stop()
