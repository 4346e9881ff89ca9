"""A secret that would change the request it is added to: nothing is sent with it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.harness import Proxy, Upstream, refused, wait_for

KINDS = {
    "bearer": "bearer",
    "basic": "{basic: {username: me}}",
    "header": '{header: {name: x-api-key, value: "Token {secret}"}}',
    "cookie": "{cookie: {name: session}}",
    "query": "{query: {name: key}}",
    "placeholder": "{placeholder: {in: [header, query, path]}}",
}
RULES = "version: 1\nrules:\n" + "".join(
    f"  - name: {kind}\n    match: {{host: api.test, path: /{kind}/**}}\n    action: allow\n"
    f"    inject: [{{credential: turned, as: {how}}}]\n"
    for kind, how in KINDS.items()
)
MARK = "slp_placeholder_turned"
SECRETS = {
    "a line break": "abc\r\nx-evil: 1",
    "a request": "abc\r\n\r\nGET /evil HTTP/1.1\r\nhost: api.test\r\nx-evil: 1\r\n\r\n",
    "a line feed": "abc\nx-evil: 1",
    "a carriage return": "abc\rx-evil: 1",
    "a NUL": "abc\0x-evil: 1",
}


@pytest.fixture(scope="module")
def proxy(lane: str, make_proxy: Callable[..., Proxy]) -> Proxy:
    proxy = make_proxy(RULES, lane=lane)
    proxy.agent()
    proxy.credential("turned", "sound-secret", "--host", "api.test", "--kind", "placeholder")  # which may hold lines
    proxy.credential("static", "sound-secret", "--host", "api.test")
    return proxy


@pytest.mark.parametrize("case", SECRETS)
def test_a_rotated_secret_cannot_add_a_header_or_a_request(proxy: Proxy, upstream: Upstream, case: str) -> None:
    """It was sound when the rule was written; what it is now is refused where it could end a line, or escaped."""
    assert "line break" in proxy.cli("vault", "rotate", "static", stdin=SECRETS[case], check=False).stderr
    proxy.cli("vault", "rotate", "turned", stdin="sound-again")
    wait_for(lambda: proxy.get("https://api.test/bearer/x").status == 200)
    proxy.cli("vault", "rotate", "turned", stdin=SECRETS[case])
    wait_for(lambda: proxy.get("https://api.test/bearer/x").status == 503, "the rotation")
    upstream.reset()
    statuses = {}
    for kind in KINDS:
        place = {"placeholder": f"/placeholder/{MARK}?key={MARK}"}.get(kind, f"/{kind}/x?a=b")
        headers = {"x-mine": MARK} if kind == "placeholder" else {}
        response = proxy.get(f"https://api.test{place}", headers=headers)
        statuses[kind] = response.status
        if response.status != 200:
            refused(response, "credential_unavailable")
    assert {kind for kind, status in statuses.items() if status == 200} <= {"query"}  # where it is escaped
    for seen in upstream.seen:
        assert "evil" not in str([name for name, _ in seen.headers])
        assert seen.target.startswith("/query/x?a=b&key=abc%")
