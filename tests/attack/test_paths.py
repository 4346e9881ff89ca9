"""Paths and methods that mean one thing to a rule and another to an origin: they reach nobody."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest

from tests.h2client import Http2
from tests.harness import Connection, Proxy, Response, Upstream, refused

RULES = """
version: 1
rules:
  - {name: api, match: {host: api.test, path: /v1/**}, action: allow}
  - {name: no-admin, match: {host: api.test, path: /v1/admin/**}, action: block}
  - {name: read, match: {host: other.test, method: [GET, POST]}, action: allow}
  - {name: any, match: {host: a.api.test}, action: allow}
  - {name: keep, match: {host: a.api.test, method: DELETE}, action: block}
"""


@pytest.fixture(scope="module")
def proxy(lane: str, make_proxy: Callable[..., Proxy]) -> Proxy:
    proxy = make_proxy(RULES, lane=lane, limits={"connections_per_agent": 4096})
    proxy.agent()
    return proxy


def in_tunnel(proxy: Proxy, host: str, method: str, target: str, *lines: str) -> Response:
    """A request in a tunnel; its path as it is written, octet for octet."""
    tunnel = proxy.tunnel(host)
    send(tunnel, method, target, f"host: {host}", *lines)
    return tunnel.response()


def absolute(proxy: Proxy, host: str, method: str, target: str, *lines: str) -> Response:
    """The same on the plain connection, as a whole URL."""
    connection = proxy.connect()
    send(connection, method, f"https://{host}{target}", proxy.auth("coder-1").strip(), *lines)
    return connection.response()


def in_http2(proxy: Proxy, host: str, method: str, target: str, *lines: str) -> Response:
    """The same in HTTP/2; what h2 itself refuses ends the connection, which is as good."""
    client = Http2(proxy.tunnel(host, alpn="h2"))
    pairs = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    try:
        return client.response(client.request(target.encode("latin-1"), host, method, pairs))
    except ConnectionError:
        return Response(0, [], b"")


def send(connection: Connection, method: str, target: str, *lines: str) -> None:
    head = "\r\n".join((f"{method} {target} HTTP/1.1", *lines, "content-length: 0", "", ""))
    connection.send(head.encode("latin-1"))


FORMS = [in_tunnel, absolute, in_http2]
form = pytest.mark.parametrize("ask", FORMS, ids=lambda ask: ask.__name__)

OUT = {  # of /v1/**, which is all that is allowed
    "dot segments": "/v1/../admin",
    "dot segments behind a single dot": "/v1/./../admin",
    "more of them than there are segments": "/v1/../../../admin",
    "an escaped dot": "/v1/.%2e/admin",
    "escaped dots": "/v1/%2e%2E/admin",
    "an escaped slash": "/v1/..%2fadmin",
    "an escaped slash before the dots": "/v1%2f..%2fadmin",
    "all of it escaped": "/v1/%2e%2e%2fadmin",
    "escaped twice": "/v1/%252e%252e/admin",
    "a slash escaped twice": "/v1/..%252fadmin",
    "a slash escaped three times": "/v1/..%25252fadmin",
    "a backslash": "/v1/..\\admin",
    "only backslashes": "/v1\\..\\admin",
    "an escaped backslash": "/v1/..%5cadmin",
    "a backslash escaped twice": "/v1/..%255cadmin",
    "a parameter behind the dots": "/v1/..;/admin",
    "a parameter with a value": "/v1/..;x=y/admin",
    "an escaped semicolon": "/v1/..%3b/admin",
    "a parameter before the dots": "/v1/x;y/../../admin",
    "an empty segment that dots remove": "/v1//../../admin",
    "two slashes first": "//v1/../admin",
    "a host that is none": "//v1/admin",
    "overlong dots, two bytes": "/v1/%c0%ae%c0%ae/admin",
    "overlong dots, three bytes": "/v1/%e0%80%ae%e0%80%ae/admin",
    "an overlong slash": "/v1/..%c0%afadmin",
    "an overlong backslash": "/v1/..%c1%9cadmin",
    "overlong octets that are not escaped": "/v1/..\xc0\xafadmin",
    "half a character": "/v1/%e2%82",
    "NUL": "/v1/%00/x",
    "NUL escaped twice": "/v1/../admin%2500",
    "NUL before a suffix": "/admin%00/v1/x",
    "a line break": "/v1/x%0d%0aGET%20/admin",
    "a bare line feed": "/v1/x%0a",
    "a tab": "/v1/%09x",
    "DEL": "/v1/%7fx",
    "IIS's own escapes": "/v1/..%u002fadmin",
    "a broken escape": "/v1/..%2/admin",
    "a percent sign": "/v1/%",
    "a fragment": "/v1/x#/../admin",
    "an escaped fragment": "/admin%23/v1/x",
    "a query first": "/admin?/v1/x",
    "an escaped question mark": "/admin%3f/v1/x",
    "a parameter first": "/admin;/v1/x",
    "another case": "/V1/x",
    "the prefix and more": "/v1x/y",
    "the prefix alone": "/v1",
    "nothing": "/",
    "more than 8 KiB": "/v1/" + "a" * 9000,
    "more readings than can be tried": "/v1/" + "%252f..;%255c" * 40,
}


@form
@pytest.mark.parametrize("case", OUT)
def test_no_spelling_leads_out_of_what_is_allowed(
    proxy: Proxy, upstream: Upstream, ask: Callable[..., Response], case: str
) -> None:
    """Whatever some origin would make of it."""
    response = ask(proxy, "api.test", "GET", OUT[case])
    assert not response.status or response.code in {"no_rule", "blocked", "ambiguous_request"}
    assert upstream.seen == []


INTO = {  # /v1/admin/**, which is blocked
    "as it is": "/v1/admin/x",
    "an escaped letter": "/v1/%61dmin/x",
    "a letter escaped twice": "/v1/%2561dmin/x",
    "dot segments": "/v1/x/../admin/x",
    "escaped dot segments": "/v1/x/%2e%2e/admin/x",
    "a dot": "/v1/./admin/x",
    "an empty segment": "/v1//admin/x",
    "many empty segments": "/v1////admin//x",
    "an escaped slash": "/v1/admin%2fx",
    "another escaped slash": "/v1%2fadmin/x",
    "a slash escaped twice": "/v1/admin%252fx",
    "a backslash": "/v1/admin\\x",
    "another backslash": "/v1\\admin/x",
    "an escaped backslash": "/v1%5cadmin%5cx",
    "a parameter": "/v1/admin;a=b/x",
    "a parameter before": "/v1;a/admin/x",
    "an escaped parameter": "/v1/admin%3ba/x",
    "out and in again": "/v1/admin/../admin/x",
    "a parameter that holds it": "/v1/x;/../admin/x",
    "dots with a parameter": "/v1/x/..;y/admin/x",
    "a query behind it": "/v1/admin/x?/v1/ok",
}


@form
@pytest.mark.parametrize("case", INTO)
def test_no_spelling_leads_into_what_is_blocked(
    proxy: Proxy, upstream: Upstream, ask: Callable[..., Response], case: str
) -> None:
    """Although the path as it stands is allowed."""
    refused(ask(proxy, "api.test", "GET", INTO[case]), "blocked")
    assert upstream.seen == []


@form
def test_what_is_forwarded_is_the_path_that_was_matched(
    proxy: Proxy, upstream: Upstream, ask: Callable[..., Response]
) -> None:
    """Not the one that was sent."""
    assert ask(proxy, "api.test", "GET", "/v0/.././v1/%7Ex/./y%c3%a9?a=%2e%2e").status == 200
    assert [seen.target for seen in upstream.seen] == ["/v1/~x/y%C3%A9?a=%2e%2e"]


OVERRIDES = [
    "X-HTTP-Method-Override: DELETE",
    "x-http-method-override: delete",
    "X_HTTP_Method_Override: DELETE",
    "X-HTTP-Method: DELETE",
    "X-Method-Override: DELETE",
    "X-Method-Override: GET, DELETE",
    "X-Method-Override:  DELETE ",
]


@form
@pytest.mark.parametrize("line", OVERRIDES)
def test_a_method_cannot_be_overridden_where_a_rule_names_methods(
    proxy: Proxy, upstream: Upstream, ask: Callable[..., Response], line: str
) -> None:
    """An allow rule that names methods matches none of it; a block rule matches what the origin would do."""
    for method in ("POST", "GET"):
        refused(ask(proxy, "other.test", method, "/x", line), "no_rule")
        refused(ask(proxy, "a.api.test", method, "/x", line), "blocked")
    assert upstream.seen == []


@form
@pytest.mark.parametrize("query", ["_method=DELETE", "a=b&_method=delete", "%5fmethod=DELETE", ".method=DELETE"])
def test_a_method_cannot_be_overridden_in_the_query(
    proxy: Proxy, upstream: Upstream, ask: Callable[..., Response], query: str
) -> None:
    """Of a POST, where frameworks look for it; in a GET it is a parameter."""
    refused(ask(proxy, "other.test", "POST", f"/x?{query}"), "no_rule")
    refused(ask(proxy, "a.api.test", "POST", f"/x?{query}"), "blocked")
    assert upstream.seen == []
    assert ask(proxy, "other.test", "GET", f"/x?{query}").status == 200


@form
def test_a_url_cannot_be_overridden_by_a_header(proxy: Proxy, upstream: Upstream, ask: Callable[..., Response]) -> None:
    """CVE-2018-14773 and its kin: such headers do not arrive."""
    names = [
        "X-Original-URL",
        "X-Rewrite-URL",
        "x_original_url",
        "X-Original-Host",
        "X-Forwarded-Host",
        "X-Forwarded-Uri",
    ]
    response = ask(proxy, "api.test", "GET", "/v1/x", *(f"{name}: /v1/admin/x" for name in names))
    assert response.status == 200
    assert "admin" not in str(upstream.seen)


@form
@pytest.mark.parametrize("method", ["TRACE", "trace", "TRACK", "CONNECT", "connect"])
def test_some_methods_go_nowhere(proxy: Proxy, upstream: Upstream, ask: Callable[..., Response], method: str) -> None:
    """TRACE and TRACK would echo a credential, CONNECT in a tunnel would be a way around the proxy."""
    response = ask(proxy, "a.api.test", method, "/x")
    assert not response.status or response.code in {"protocol_not_allowed", "ambiguous_request"}
    assert upstream.connections == 0


@form
def test_a_method_in_another_case_is_that_method(
    proxy: Proxy, upstream: Upstream, ask: Callable[..., Response]
) -> None:
    """To a rule, and then to the origin too."""
    refused(ask(proxy, "a.api.test", "dELETE", "/x"), "blocked")
    assert ask(proxy, "other.test", "get", "/x").status == 200
    assert [seen.method for seen in upstream.seen] == ["GET"]


@pytest.mark.parametrize("target", ["a.api.test:443", "http://a.api.test/x", "https://other.test/x", "*", "a.api.test"])
def test_a_connect_in_a_tunnel_goes_nowhere(proxy: Proxy, upstream: Upstream, target: str) -> None:
    """In whichever form, and what follows it is not taken for its data."""
    tunnel = proxy.tunnel("a.api.test")
    tunnel.send(f"CONNECT {target} HTTP/1.1\r\nhost: {target}\r\n\r\n".encode())
    tunnel.send(b"GET /x HTTP/1.1\r\nhost: a.api.test\r\n\r\n")
    assert tunnel.response().status in (400, 403, 421)
    with contextlib.suppress(ConnectionError):
        assert tunnel.response().status == 200  # the connection can be kept for what it is for
    assert [seen.target for seen in upstream.seen] in ([], ["/x"])


@pytest.mark.parametrize("target", ["http://other.test/x", "https://other.test/x", "https://a.api.test:444/x"])
def test_an_absolute_target_in_a_tunnel_names_the_tunnels_own_host(
    proxy: Proxy, upstream: Upstream, plain_upstream: Upstream, target: str
) -> None:
    """Or it is refused, whatever Host says."""
    for host in ("a.api.test", "other.test"):
        tunnel = proxy.tunnel("a.api.test")
        send(tunnel, "GET", target, f"host: {host}")
        refused(tunnel.response(), "authority_mismatch")
    assert upstream.seen == plain_upstream.seen == []
