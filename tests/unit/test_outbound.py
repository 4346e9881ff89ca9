"""What is sent is what was decided, and a credential stands in it once. That nothing else does: tests/property."""

from __future__ import annotations

import base64
from collections.abc import Mapping

import pytest

from proxy.address import Host
from proxy.outbound import (
    InjectionError,
    Opened,
    Outbound,
    body_placeholders,
    edit_headers,
    inject,
    placeholder_of,
    rewrite,
    secrets_known,
    secrets_sent,
    sign,
)
from proxy.pattern import compile_regex
from proxy.policy import Edit, Injection, Rewrite
from proxy.request import Ambiguous, Field, RequestView
from proxy.secret import Secret

SECRET = b"s3cret+/="
MARK = "slp_placeholder_key"


def view(target: str = "/", *headers: Field) -> RequestView:
    return RequestView.parse("POST", "https", Host("api.test"), 443, target, headers)


def sent(
    request: RequestView,
    kind: str,
    options: Mapping[str, str] | None = None,
    *places: str,
    secret: bytes = SECRET,
    fields: Mapping[str, str] | None = None,
) -> Outbound:
    opened = Opened("key", 3, "static", fields or {}, Secret(secret))
    return inject(Outbound(request), Injection("key", kind, options or {}, places), opened)


def where(outbound: Outbound) -> list[str]:
    assert all((one.credential, one.version) == ("key", 3) for one in outbound.injected)
    return [one.location for one in outbound.injected]


# Rewriting


def test_a_rewrite_changes_what_it_names() -> None:
    change = Rewrite(
        Host("new.test"),
        8443,
        compile_regex("^/v1/([^/]*)"),
        r"/v2/\1",
        Edit({"a": "1"}, ("b",)),
        Edit({"x-env": "prod"}, ("x-debug",)),
    )
    request = view("/v1/x?b=2&c=3", (b"X-Env", b"dev"), (b"x_debug", b"1"), (b"Accept", b"*/*"))
    moved = rewrite(request, change)
    assert (moved.host.name, moved.port, moved.path, moved.query) == ("new.test", 8443, "/v2/x", "c=3&a=1")
    assert moved.headers == ((b"Accept", b"*/*"), (b"x-env", b"prod"))
    assert moved.method == "POST"


def test_a_new_host_gets_the_schemes_own_port() -> None:
    request = RequestView.parse("GET", "https", Host("a.test"), 9443, "/")
    assert rewrite(request, Rewrite(host=Host("b.test"))).port == 443
    assert rewrite(request, Rewrite(port=8443)).port == 8443
    assert rewrite(request, Rewrite()).port == 9443


def test_an_upgrade_outlives_a_rewrite() -> None:
    request = view("/", (b"Connection", b"upgrade"), (b"Upgrade", b"h2c"))
    assert rewrite(request, Rewrite(host=Host("b.test"))).upgrade == "h2c"


@pytest.mark.parametrize(
    ("regex", "to", "path", "readings"),
    [
        ("^/api(.*)", r"/v2/\1", "/v2//x", ("/v2//x", "/v2/x")),
        ("^/api(.*)", r"\1", "/x", ("/x",)),
        ("^/api(.*)", r"/../..\1", "/x", ("/x",)),
        ("^/api", "/%2e%2e/%61", "/a/x", ("/a/x",)),
    ],
)
def test_a_rewritten_path_is_normalised_and_read_anew(
    regex: str, to: str, path: str, readings: tuple[str, ...]
) -> None:
    moved = rewrite(view("/api/x"), Rewrite(path_regex=compile_regex(regex), path_to=to))
    assert (moved.path, moved.readings) == (path, readings)


@pytest.mark.parametrize("to", ["x", "/%zz", "/%00", "/#"])
def test_a_rewrite_to_what_is_no_path_is_refused(to: str) -> None:
    with pytest.raises(Ambiguous):
        rewrite(view("/api"), Rewrite(path_regex=compile_regex("^/api$"), path_to=to))


@pytest.mark.parametrize(
    ("query", "edited"),
    [
        ("", "key=a%20b"),
        ("key=1", "key=a%20b"),
        ("k%65y=1&b=2&%6B%65%79", "b=2&key=a%20b"),
        ("b=%7e&&c=x+y%20z&d&=e&", "b=%7e&&c=x+y%20z&d&=e&&key=a%20b"),
        ("b=%zz&c=%ff;d", "b=%zz&c=%ff;d&key=a%20b"),
        ("b=1;key=2;c=3", "b=1;c=3&key=a%20b"),
        ("key=1;b=2", "key=a%20b"),
        ("b;k%65y;c", "b;c&key=a%20b"),
        ("keys=1&Key=2&a.key=3&gone=4", "keys=1&Key=2&a.key=3&key=a%20b"),
    ],
)
def test_an_edited_query_keeps_everything_else_byte_for_byte(query: str, edited: str) -> None:
    change = Rewrite(query=Edit({"key": "a b"}, ("gone",)))
    assert rewrite(view(f"/?{query}" if query else "/"), change).query == edited


def test_headers_are_set_once_whatever_their_spelling() -> None:
    headers = [(b"X-Env", b"1"), (b"x_env", b"2"), (b"other", b"3"), (b"X-ENV", b"4")]
    assert edit_headers(headers, Edit({"x-env": "ä"}, ())) == [(b"other", b"3"), (b"x-env", b"\xe4")]
    assert edit_headers(headers, Edit({}, ("x-env", "other"))) == []


# Injecting


def test_a_bearer_replaces_what_the_agent_sent() -> None:
    request = view("/", (b"AUTHORIZATION", b"Bearer own"), (b"authorization", b"Basic own"), (b"a", b"b"))
    outbound = sent(request, "bearer")
    assert outbound.view.headers == ((b"a", b"b"), (b"authorization", b"Bearer " + SECRET))
    assert where(outbound) == ["header:authorization"]
    assert outbound.sent == (("key", SECRET),)


@pytest.mark.parametrize(
    ("options", "secret", "pair"),
    [
        ({"username": "x"}, b"pw", b"x:pw"),
        ({"username": "x"}, b"p:w", b"x:p:w"),
        ({"username": "ü"}, b"\xff", b"\xc3\xbc:\xff"),
        ({}, b"user:pw", b"user:pw"),
        ({}, b"pw", b":pw"),
    ],
)
def test_basic_is_a_name_and_a_password(options: dict[str, str], secret: bytes, pair: bytes) -> None:
    outbound = sent(view(), "basic", options, secret=secret)
    encoded = base64.b64encode(pair)
    assert outbound.view.headers == ((b"authorization", b"Basic " + encoded),)
    assert outbound.sent == (("key", secret), ("key", encoded))


def test_a_header_takes_its_place_in_a_template() -> None:
    request = view("/", (b"X_API_key", b"own"))
    outbound = sent(request, "header", {"name": "X-Api-Key", "value": "Token {secret}!"})
    assert outbound.view.headers == ((b"X-Api-Key", b"Token " + SECRET + b"!"),)
    assert where(outbound) == ["header:x-api-key"]
    assert sent(request, "header", {"name": "a"}).view.headers[-1] == (b"a", SECRET)


@pytest.mark.parametrize(
    "name", ["Host", "Content-Length", "transfer_encoding", "Connection", "Proxy-X", "X-Forwarded-For"]
)
def test_a_header_of_the_proxys_own_takes_no_secret(name: str) -> None:
    with pytest.raises(InjectionError):
        sent(view(), "header", {"name": name})


def test_a_query_parameter_is_escaped() -> None:
    outbound = sent(view("/?b=%7e&k%65y=own"), "query", {"name": "key"}, secret=b"a b&c=\xff")
    assert outbound.view.query == "b=%7e&key=a%20b%26c%3D%FF"
    assert where(outbound) == ["query:key"]
    assert outbound.sent == (("key", b"a b&c=\xff"),)


@pytest.mark.parametrize(
    ("cookies", "sent_on"),
    [
        ([], b"sid="),
        ([b"a=1; sid=own; b=2"], b"a=1; b=2; sid="),
        ([b"sid=own", b"a=1"], b"a=1; sid="),
        ([b"sid"], b"sid="),
        ([b" sid =own;a=\xff"], b"a=\xff; sid="),
        ([b"s%69d=own; a=1"], b"a=1; sid="),
        ([b'a="x; sid=own"'], b'a="x; sid='),
        ([b"a=1, sid=own; b=2,3"], b"b=2,3; sid="),
        ([b"asid=1; SID=2; sid2=3"], b"asid=1; SID=2; sid2=3; sid="),
    ],
)
def test_a_cookie_replaces_what_the_agent_sent(cookies: list[bytes], sent_on: bytes) -> None:
    request = view("/", *((b"Cookie", cookie) for cookie in cookies))
    outbound = sent(request, "cookie", {"name": "sid"})
    assert outbound.view.headers == ((b"Cookie", sent_on + SECRET),)
    assert where(outbound) == ["cookie:sid"]


@pytest.mark.parametrize("kind", ["bearer", "basic", "header", "cookie"])
@pytest.mark.parametrize("secret", [b"a\nb", b"a\r\nx: y", b"a\0", b"\x7f", b"\x1b"])
def test_what_would_end_a_header_is_not_put_into_one(kind: str, secret: bytes) -> None:
    with pytest.raises(InjectionError) as refused:
        sent(view(), kind, {"name": "x", "username": "u"}, secret=secret)
    assert repr(secret)[2:-1] not in str(refused.value)


def test_what_would_end_a_cookie_is_not_put_into_one() -> None:
    with pytest.raises(InjectionError):
        sent(view(), "cookie", {"name": "sid"}, secret=b"a; admin=1")


def test_octets_above_ascii_may_stand_in_a_header() -> None:
    assert sent(view(), "bearer", secret=b"\xff\t").view.headers[0][1] == b"Bearer \xff\t"


def test_how_to_add_it_may_come_from_the_credential() -> None:
    opened = Opened("key", 1, "header", {"name": "x-key"}, Secret(b"s"))
    assert inject(Outbound(view()), Injection("key"), opened).view.headers == ((b"x-key", b"s"),)
    opened = Opened("key", 1, "header", {"name": "x-key"}, Secret(b"s"))
    assert inject(Outbound(view()), Injection("key", "bearer"), opened).view.headers == (
        (b"authorization", b"Bearer s"),
    )


def test_a_credential_that_does_not_say_how_is_not_added() -> None:
    with pytest.raises(InjectionError):
        sent(view(), "")
    with pytest.raises(KeyError):
        sent(view(), "header")


def test_two_credentials_are_both_added() -> None:
    opened = Opened("key", 3, "static", {}, Secret(b"one"))
    outbound = inject(Outbound(view()), Injection("key", "bearer"), opened)
    outbound = inject(outbound, Injection("key", "query", {"name": "k"}), opened)
    assert where(outbound) == ["header:authorization", "query:k"]
    assert (outbound.view.query, len(outbound.view.headers)) == ("k=one", 1)


# Placeholders


def test_a_placeholder_in_a_header_becomes_the_secret() -> None:
    request = view("/", (b"x-key", f"Token {MARK}!".encode()), (b"a", b"b"))
    outbound = sent(request, "placeholder")
    assert outbound.view.headers == ((b"x-key", b"Token " + SECRET + b"!"), (b"a", b"b"))
    assert where(outbound) == ["placeholder:header"]


def test_a_placeholder_in_basic_becomes_the_secret() -> None:
    """The client encoded it before we saw it."""
    encoded = base64.b64encode(b"user:" + MARK.encode())
    outbound = sent(view("/", (b"Authorization", b"basic " + encoded)), "placeholder")
    assert outbound.view.headers == ((b"Authorization", b"basic " + base64.b64encode(b"user:" + SECRET)),)


@pytest.mark.parametrize("value", [b"Basic %%%", b"Basic", b"Basic dXNlcjpwdw==", b"Bearer x"])
def test_a_header_without_a_placeholder_stays(value: bytes) -> None:
    outbound = sent(view("/", (b"Authorization", value)), "placeholder")
    assert outbound == Outbound(outbound.view)
    assert outbound.view.headers == ((b"Authorization", value),)


def test_a_placeholder_in_the_query_becomes_the_secret_and_the_rest_stays_byte_for_byte() -> None:
    request = view(f"/?a=%7e+b&k={MARK}&{MARK}=x%2f&c&&d=%ff;e=slp%5Fplaceholder_key")
    outbound = sent(request, "placeholder", {}, "query")
    assert outbound.view.query == "a=%7e+b&k=s3cret%2B%2F%3D&s3cret%2B%2F%3D=x%2f&c&&d=%ff;e=s3cret%2B%2F%3D"
    assert where(outbound) == ["placeholder:query"]
    assert outbound.sent == (("key", SECRET), ("key", b"s3cret%2B%2F%3D"))


def test_a_placeholder_in_the_path_becomes_the_secret() -> None:
    outbound = sent(view(f"/a%20b;c+d/bot{MARK}:x?q"), "placeholder", {}, "path")
    assert outbound.view.path_and_query == "/a%20b;c+d/bots3cret%2B%2F=:x?q"
    assert where(outbound) == ["placeholder:path"]


@pytest.mark.parametrize(
    ("path", "secret"),
    [(f"/a/{MARK}/b", b".."), (f"/a/.{MARK}/b", b"."), (f"/a/{MARK}", b"."), (f"/{MARK}/..{MARK}", b"")],
)
def test_a_secret_that_would_move_the_path_is_not_put_into_it(path: str, secret: bytes) -> None:
    """Another path than the one decided."""
    with pytest.raises(InjectionError):
        sent(view(path), "placeholder", {}, "path", secret=secret)


@pytest.mark.parametrize("secret", [b"\0", b"\n", b"\xff"])
def test_a_secret_that_no_path_can_hold_is_not_put_into_it(secret: bytes) -> None:
    with pytest.raises(InjectionError):
        sent(view(f"/{MARK}"), "placeholder", {}, "path", secret=secret)


def test_a_placeholder_is_replaced_only_where_the_rule_says() -> None:
    request = view(f"/{MARK}?{MARK}", (b"a", MARK.encode()))
    assert sent(request, "placeholder", {}, "query").view.path == f"/{MARK}"
    assert sent(request, "placeholder", {}, "query").view.headers == request.headers
    assert where(sent(request, "placeholder", {}, "path", "query", "header")) == [
        "placeholder:header",
        "placeholder:query",
        "placeholder:path",
    ]


def test_a_line_break_matters_only_where_it_would_stand_in_a_header() -> None:
    request = view("/", (b"a", MARK.encode()))
    with pytest.raises(InjectionError):
        sent(request, "placeholder", secret=b"a\nb")
    assert where(sent(view(), "placeholder", {}, "header", "body", secret=b"a\nb")) == []


def test_a_placeholder_of_its_own_text_is_looked_for() -> None:
    assert placeholder_of("key", {}) == MARK
    outbound = sent(view("/%7BKEY%7D?k=%7BKEY}"), "placeholder", {"placeholder": "{KEY}"}, "path", "query", secret=b"s")
    assert outbound.view.path_and_query == "/s?k=s"


def test_a_body_is_replaced_while_it_streams_by() -> None:
    outbound = sent(view(), "placeholder", {}, "body")
    assert outbound.injected == ()
    assert body_placeholders(outbound) == {MARK.encode(): (SECRET, "key")}
    assert secrets_sent(outbound) == (("key", SECRET),)


def test_nothing_shows_a_secret_but_what_is_asked_for_it() -> None:
    opened = Opened("key", 1, "bearer", {}, Secret(SECRET))
    assert "s3cret" not in repr(opened)
    assert secrets_known([("key", Secret(SECRET))]) == (("key", SECRET),)


# AWS


AWS = {"service": "dynamodb", "region": "us-east-1"}


def test_an_aws_signature_is_left_to_be_made_and_the_agents_own_is_gone() -> None:
    """With the spelling of path and query that is signed; the key is not in what is sent."""
    request = view("/a$b?q=a+b&X-Amz-Signature=0", (b"Authorization", b"x"), (b"x-amz-content-sha256", b"y"))
    outbound = sent(request, "sigv4", AWS, secret=b"AKID:secret-key:token")
    assert where(outbound) == ["sigv4"]
    assert (outbound.view.path, outbound.view.query, outbound.view.headers) == ("/a%24b", "q=a%20b", ())
    assert outbound.sent == (("key", b"secret-key"), ("key", b"token"))
    assert outbound.signing
    assert outbound.signing.declared == "y"
    fields = dict(sign(outbound.view, outbound.signing, "0" * 64, "20150830T123600Z"))
    assert fields[b"X-Amz-Security-Token"] == b"token"
    assert fields[b"Authorization"].startswith(b"AWS4-HMAC-SHA256 Credential=AKID/20150830/us-east-1/dynamodb/aws4_req")
    assert b"host;x-amz-content-sha256;x-amz-date;x-amz-security-token" in fields[b"Authorization"]
    assert b"secret-key" not in b"".join(fields.values())


@pytest.mark.parametrize(
    "secret", [b"no-colon-in-this", b":secret-key", b"AKID:", b"AKID:secret key", b"AKID:secret-key:"]
)
def test_what_is_no_aws_key_signs_nothing(secret: bytes) -> None:
    with pytest.raises(InjectionError, match="ACCESS_KEY_ID:SECRET_ACCESS_KEY"):
        sent(view(), "sigv4", AWS, secret=secret)


def test_what_goes_out_does_not_show_a_secret() -> None:
    outbound = sent(view(), "bearer")
    assert outbound.sent
    assert "s3cret" not in repr(outbound)
