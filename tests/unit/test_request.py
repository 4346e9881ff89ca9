"""A request has one normal form, and every other way to read it is known. Decisions about them: tests/golden."""

from __future__ import annotations

import pytest

from proxy.address import Host
from proxy.request import (
    MAX_PARAMETERS,
    Ambiguous,
    Field,
    RequestView,
    fold,
    is_own_header,
    parse_path,
    parse_path_pattern,
    strip_headers,
)

HOST = Host.parse("api.test")


def view(
    target: str = "/", *headers: Field, method: str = "GET", scheme: str = "https", port: int = 443
) -> RequestView:
    return RequestView.parse(method, scheme, HOST, port, target, headers)


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("", "/"),
        ("/", "/"),
        ("/a/b.c", "/a/b.c"),
        ("/a/./b/../c", "/a/c"),
        ("/a/b/..", "/a/"),
        ("/a/.", "/a/"),
        ("/../..", "/"),
        ("/...", "/..."),
        ("/.well-known/x", "/.well-known/x"),
        ("/%2e%2E/a", "/a"),
        ("/%61%2D%7e", "/a-~"),
        ("/a%2fb%5c", "/a%2Fb%5C"),
        ("/a\\b", "/a%5Cb"),
        ('/a b"<>`{}|^[]', "/a%20b%22%3C%3E%60%7B%7D%7C%5E%5B%5D"),
        ("/\xc3\xbc", "/%C3%BC"),
        ("/%c3%bc", "/%C3%BC"),
        ("/a;b=c+d", "/a;b=c+d"),
        ("/a%3Bb%2B", "/a%3Bb%2B"),
        ("/!$&'()*,=:@", "/!$&'()*,=:@"),
        ("/%21%24%26%27%28%29%2A%2C%3D%3A%40", "/!$&'()*,=:@"),
        ("//a//b", "//a//b"),
        ("/a//../b", "/a/b"),
        ("/%2561", "/%2561"),
    ],
)
def test_a_path_has_one_normal_form(raw: str, normal: str) -> None:
    assert view(raw).path == normal


@pytest.mark.parametrize(
    ("raw", "readings"),
    [
        ("/a/b", {"/a/b"}),
        ("/a%20b", {"/a%20b"}),
        ("/a%2Fb", {"/a%2Fb", "/a/b"}),
        ("/a%5Cb", {"/a%5Cb", "/a/b"}),
        ("/a/..%2fb", {"/a/..%2Fb", "/a/../b", "/b"}),
        ("/a/..;x/b", {"/a/..;x/b", "/a/../b", "/b"}),
        ("/a;/b", {"/a;/b", "/a/b"}),
        ("/a%3Bx/b", {"/a%3Bx/b", "/a;x/b", "/a/b"}),
        ("/a//b", {"/a//b", "/a/b"}),
        ("//evil.test/admin", {"//evil.test/admin", "/evil.test/admin", "/admin"}),
        ("//evil.test", {"//evil.test", "/evil.test", "/"}),
        ("/%5Cevil.test/admin", {"/%5Cevil.test/admin", "//evil.test/admin", "/evil.test/admin", "/admin"}),
        ("/%2561", {"/%2561", "/a"}),
        ("/100%25", {"/100%25"}),
    ],
)
def test_every_other_way_to_read_a_path_is_known(raw: str, readings: set[str]) -> None:
    """%2f by what decodes before it splits, a backslash by IIS, `;` by servlets, `//` by nginx and by URL parsers."""
    assert set(parse_path(raw)[1]) == readings
    assert parse_path(raw)[1][0] == parse_path(raw)[0]


def test_slashes_merged_before_dots_are_resolved_are_another_reading() -> None:
    readings = parse_path("/a%2F%2F..%2Fb")[1]
    assert {"/a/b", "/b", "/a//../b"} <= set(readings)


def test_an_origin_that_decodes_once_sees_escapes_as_letters() -> None:
    """Its router finds /admin/:id with the id `%2e%2e`."""
    assert "/admin/%252e%252e" in parse_path("/admin%2F%252e%252e")[1]
    assert "/" in parse_path("/admin%2F%252e%252e")[1]


def test_an_origin_that_resolves_no_dots_is_another_reader() -> None:
    assert {"/a/../b", "/b"} <= set(parse_path("/a%2F..%2Fb")[1])


@pytest.mark.parametrize(
    "raw",
    [
        "a",
        "*",
        "/a#b",
        "/a\0",
        "/a\r\n",
        "/a\x7f",
        "/%00",
        "/%0a",
        "/%",
        "/%4",
        "/%zz",
        "/%u002f",
        "/%ff",
        "/\xff",
        "/%c0%af",
        "/%ed%a0%80",
        "/\u2215",
        "/" + "a" * 8192,
        "/%" + "25" * 40 + "2f",
        "/" + "%5c;" * 1000,
    ],
)
def test_a_path_no_origin_should_be_sent_is_refused(raw: str) -> None:
    with pytest.raises(Ambiguous):
        parse_path(raw)


def test_a_path_may_be_long() -> None:
    """RFC 9110 section 4.1 asks for 8000 octets."""
    assert parse_path("/" + "a" * 8000)[0] == "/" + "a" * 8000


@pytest.mark.parametrize(
    ("raw", "query"),
    [
        ("a=1&b=2", "a=1&b=2"),
        ("&&a&=b&", "&&a&=b&"),
        ("a=%7e+%zz%", "a=%7e+%zz%"),
        ("a=[b]|c^{d}?/", "a=[b]|c^{d}?/"),
        ('a="b c"', "a=%22b%20c%22"),
        ("a=\xc3\xbc", "a=%C3%BC"),
        ("a?b", "a?b"),
    ],
)
def test_a_query_is_forwarded_as_it_was_spelt(raw: str, query: str) -> None:
    assert view(f"/?{raw}").query == query
    assert view(f"/?{raw}").path_and_query == f"/?{query}"


@pytest.mark.parametrize("raw", ["a#b", "a\nb", "a\0", "a\x7f", "\u0100", "a&" * MAX_PARAMETERS, "a;" * MAX_PARAMETERS])
def test_a_query_that_none_may_be_is_refused(raw: str) -> None:
    with pytest.raises(Ambiguous):
        view(f"/?{raw}")


def test_a_query_has_the_values_of_each_way_to_read_it() -> None:
    assert view("/?a=1&b=2&a=3").query_values("a") == (["1", "3"],)
    assert view("/?%61=x+y%20z").query_values("a") == (["x y z"],)
    assert view("/?a").query_values("a") == ([""],)
    assert view("/?a=1;a=2&b").query_values("a") == (["1;a=2"], ["1", "2"])
    assert view("/?b=1;a=2").query_values("a") == ([], ["2"])
    assert view("/").query_values("a") == ([],)


def test_a_header_has_the_values_of_each_way_to_read_its_name() -> None:
    """CGI and WSGI make HTTP_X_ENV of both."""
    request = view("/", (b"X-Env", b"prod"), (b"x_env", b"test"), (b"x-env", b"\xe4"))
    assert request.header_values("x-env") == (["prod", "ä"], ["prod", "test", "ä"])
    assert request.header_values("X_Env") == (["test"], ["prod", "test", "ä"])
    assert request.header_values("other") == ([], [])


@pytest.mark.parametrize(
    "name",
    [
        b"Connection",
        b"Keep-Alive",
        b"Proxy-Authorization",
        b"proxy_authorization",
        b"Proxy-Connection",
        b"TE",
        b"Trailer",
        b"HTTP2-Settings",
        b"Host",
        b"X-Forwarded-For",
        b"X_Forwarded_For",
        b"X-Forwarded-Proto",
        b"Forwarded",
        b"X-Real-IP",
        b"X-Envoy-Peer",
        b"Sallyport-Decision",
    ],
)
def test_what_is_of_one_hop_or_says_who_asks_is_not_in_the_view(name: bytes) -> None:
    assert view("/", (name, b"x"), (b"accept", b"*/*")).headers == ((b"accept", b"*/*"),)
    assert is_own_header(name)


def test_what_connection_lists_is_gone_before_anything_is_matched_or_added() -> None:
    """Else an agent could strip a header that a rule relied on, or the credential that is added later."""
    request = view(
        "/", (b"Connection", b"close, X-Tenant,cookie"), (b"x-tenant", b"1"), (b"x_tenant", b"1"), (b"a", b"b")
    )
    assert request.headers == ((b"a", b"b"),)


def test_connection_does_not_strip_the_framing() -> None:
    request = view("/", (b"Connection", b"content-length, transfer-encoding"), (b"Content-Length", b"5"))
    assert request.headers == ((b"Content-Length", b"5"),)


@pytest.mark.parametrize("name", [b"content_length", b"Transfer_Encoding"])
def test_framing_with_an_underscore_is_refused(name: bytes) -> None:
    """What reads it as the real one behind the origin's front would lose track of the body."""
    with pytest.raises(Ambiguous):
        view("/", (name, b"5"))


@pytest.mark.parametrize("name", [b"", b"a b", b"a:", b"a\n", b"\xe4", b"a\0", b"a" * 257])
def test_a_name_that_is_no_token_is_refused(name: bytes) -> None:
    with pytest.raises(Ambiguous):
        view("/", (name, b""))


@pytest.mark.parametrize("value", [b"a\nb", b"a\rb", b"\0", b"\x01", b"\x7f", b"\x0b"])
def test_a_control_character_in_a_value_is_refused(value: bytes) -> None:
    """CR LF in an HTTP/2 value would split an HTTP/1 request."""
    with pytest.raises(Ambiguous):
        view("/", (b"a", b"b"), (b"c", value))


def test_a_tab_and_octets_above_ascii_may_stand_in_a_value() -> None:
    assert view("/", (b"a", b"b\tc\xff")).headers == ((b"a", b"b\tc\xff"),)


@pytest.mark.parametrize("method", ["", "GET ", "GE T", "G\nET", "ü", "\u0100"])
def test_a_method_that_is_no_token_is_refused(method: str) -> None:
    with pytest.raises(Ambiguous):
        view(method=method)


def test_a_method_is_in_upper_case() -> None:
    assert view(method="get").method == "GET"


@pytest.mark.parametrize(
    ("headers", "upgrade"),
    [
        ((), ""),
        (((b"Upgrade", b"WebSocket"),), "websocket"),
        (((b"upgrade", b"h2c"), (b"Upgrade", b"websocket")), "h2c,websocket"),
    ],
)
def test_every_upgrade_that_is_asked_for_is_seen(headers: tuple[Field, ...], upgrade: str) -> None:
    assert view("/", *headers).upgrade == upgrade


@pytest.mark.parametrize(
    ("scheme", "port", "authority"),
    [
        ("https", 443, "api.test"),
        ("http", 80, "api.test"),
        ("https", 80, "api.test:80"),
        ("https", 8443, "api.test:8443"),
    ],
)
def test_the_authority_names_a_port_that_is_not_the_schemes_own(scheme: str, port: int, authority: str) -> None:
    assert view(scheme=scheme, port=port).authority == authority


def test_a_target_for_a_message_leaves_out_the_query() -> None:
    assert view("/a?token=1").target == "api.test/a"


def test_a_retargeted_request_is_read_anew() -> None:
    request = view("/a?b", (b"c", b"d"), (b"upgrade", b"h2c"), method="POST")
    moved = request.retargeted(Host("new.test"), 8443, "/x%2Fy?z")
    assert (moved.host.name, moved.port, moved.path, moved.query) == ("new.test", 8443, "/x%2Fy", "z")
    assert moved.readings == ("/x%2Fy", "/x/y")
    assert (moved.method, moved.headers, moved.upgrade) == ("POST", request.headers, "h2c")


def test_every_spelling_of_a_header_is_stripped() -> None:
    headers = [(b"X-Api-Key", b"1"), (b"x_api_key", b"2"), (b"X_API-KEY", b"3"), (b"x-api", b"4")]
    assert strip_headers(headers, [b"x-api-key"]) == [(b"x-api", b"4")]
    assert strip_headers(headers, [b"X_Api_Key"]) == [(b"x-api", b"4")]
    assert fold(b"X_API-key") == b"x-api-key"


@pytest.mark.parametrize("text", ["/a/**", "**/x", "/", "/%C3%BC", "/a%2Fb", "/*.git"])
def test_a_path_pattern_in_normal_form_is_taken(text: str) -> None:
    assert parse_path_pattern(text) == text


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("a", 'write "/a"'),
        ("/a/../b", 'write "/b"'),
        ("/ü", 'write "/%C3%BC"'),
        ("/%61", 'write "/a"'),
        ("/a b", 'write "/a%20b"'),
        ("**/a/./b", 'write "**/a/b"'),
        ("/%zz", ""),
        ("/a\n", ""),
    ],
)
def test_a_path_pattern_in_another_form_is_refused_with_the_right_spelling(text: str, hint: str) -> None:
    with pytest.raises(ValueError, match=r"normal form|never match|begin") as refused:
        parse_path_pattern(text)
    assert refused.value.args[1] == hint


@pytest.mark.parametrize("value", [b"Negotiate YII=", b"NTLM", b" ntlm x", b"\tnegotiate"])
def test_a_proof_of_who_a_connection_is_of_is_refused(value: bytes) -> None:
    """The next agent's request goes over the same connection (RFC 4559 section 6)."""
    with pytest.raises(Ambiguous):
        RequestView.parse("GET", "https", Host.parse("a.test"), 443, "/", [(b"aUthorization", value)])
    RequestView.parse("GET", "https", Host.parse("a.test"), 443, "/", [(b"authorization", b"Bearer " + value)])


def test_a_websocket_is_asked_for_by_get() -> None:
    """RFC 6455 section 4.1."""
    assert view("/a", (b"upgrade", b"websocket")).upgrade == "websocket"
    with pytest.raises(Ambiguous):
        view("/a", (b"upgrade", b"WebSocket"), method="POST")


@pytest.mark.parametrize(
    ("query", "overrides"),
    [("_method=put", {"PUT"}), ("+.method=a%2CB", {"A,B", "A", "B"}), ("_method[]=", {""}), ("x_method=put", set())],
)
def test_a_post_can_be_another_method_to_its_origin(query: str, overrides: set[str]) -> None:
    """As frameworks read its query; a value that names none is one all the same."""
    assert view(f"/a?{query}", method="POST").overrides == overrides
    assert view(f"/a?{query}", method="GET").overrides == set()


def test_other_headers_of_a_view_leave_its_overrides() -> None:
    """A header that a rule removes has been decided on before."""
    request = view("/a", (b"x-method-override", b"put"))
    assert request.with_headers(()).overrides == {"PUT"}
