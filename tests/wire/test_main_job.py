"""The main job over the wire: decided by rules, with a credential the agent never saw."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.harness import Proxy, Upstream

SECRET = "real-key-4f1e9b7c2d"
RULES = """
version: 1
rules:
  - name: api-read
    match: {host: api.test, method: GET, path: /v1/**}
    action: allow
    inject: [{credential: api, as: bearer}]
  - name: api-write
    match: {host: api.test, method: [POST, PUT], path: /v1/**}
    action: allow
  - name: no-secrets
    match: {host: api.test, path: /v1/secrets/**}
    action: block
  - name: unscoped
    match: {host: other.test}
    action: allow
    inject: [{credential: api, as: bearer}]
"""


@pytest.fixture(scope="module")
def proxy(make_proxy: Callable[..., Proxy]) -> Proxy:
    proxy = make_proxy(RULES)
    proxy.agent()
    proxy.credential("api", SECRET, "--host", "api.test")
    return proxy


def test_an_allowed_request_carries_the_credential(proxy: Proxy, upstream: Upstream) -> None:
    """The upstream gets it, the agent does not see it come back."""
    response = proxy.get("https://api.test/v1/models?limit=2")
    assert response.status == 200
    assert [seen.target for seen in upstream.seen] == ["/v1/models?limit=2"]
    assert upstream.seen[0].header("authorization") == [f"Bearer {SECRET}"]
    assert SECRET.encode() not in response.body
    assert b"[redacted:api]" in response.body


def test_what_no_rule_allows_never_reaches_the_upstream(proxy: Proxy, upstream: Upstream) -> None:
    """Refused inside the tunnel, in words."""
    response = proxy.get("https://api.test/v2/models")
    assert (response.status, response.code) == (403, "no_rule")
    assert response.json()["error"]["agent"] == "coder-1"
    assert (response.header("sallyport-decision") or "").startswith("block; reason=no_rule; id=")
    assert upstream.seen == []
    assert upstream.connections == 0


def test_a_block_rule_wins_and_is_named(proxy: Proxy, upstream: Upstream) -> None:
    """Although an allow rule matches too."""
    response = proxy.get("https://api.test/v1/secrets/all")
    assert (response.status, response.code) == (403, "blocked")
    assert response.json()["error"]["rule"] == "no-secrets"
    assert upstream.seen == []


def test_the_grant_limits_the_credential_itself(proxy: Proxy, upstream: Upstream) -> None:
    """A rule asks for it at a host the vault does not grant."""
    response = proxy.get("https://other.test/")
    assert (response.status, response.code) == (403, "credential_scope")
    assert upstream.seen == []


def test_a_body_is_passed_on_and_recorded(proxy: Proxy, upstream: Upstream) -> None:
    """And the audit line tells of it, without the query."""
    response = proxy.get("https://api.test/v1/things?secret=1", method="POST", body=b"x" * 100_000)
    assert response.status == 200
    assert upstream.seen[0].body == b"x" * 100_000
    line = proxy.audit(path="/v1/things")[0]
    assert (line["verdict"], line["rule"]) == ("allow", "api-write")
    assert (line["status"], line["request_bytes"]) == (200, 100_000)
    assert "secret" not in str(line)
