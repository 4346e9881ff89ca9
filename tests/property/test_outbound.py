"""After a credential was added, nothing of the agent's can be taken for it."""

from __future__ import annotations

import re
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl

from hypothesis import given
from hypothesis import strategies as st

from proxy.address import Host
from proxy.outbound import Opened, Outbound, edit_headers, inject
from proxy.policy import Edit, Injection
from proxy.request import Field, RequestView
from proxy.secret import Secret

SECRET = b"s3cret"


def view(query: str = "", headers: tuple[Field, ...] = ()) -> RequestView:
    return RequestView.parse("GET", "https", Host("api.test"), 443, f"/?{query}", headers)


def injected(request: RequestView, kind: str, name: str = "") -> RequestView:
    opened = Opened("key", 1, kind, {"name": name} if name else {}, Secret(SECRET))
    return inject(Outbound(request), Injection("key"), opened).view


@st.composite
def spellings(draw: st.DrawFn, name: str, escape: bool = False) -> str:
    """`name`, or something near it, in any case, with `_` for `-`, or percent-encoded."""
    text = draw(st.sampled_from([name] * 3 + [name + "s", "x" + name, ""]))
    return "".join(
        draw(
            st.sampled_from(
                [char, f"%{ord(char):02x}", f"%{ord(char):02X}"]
                if escape
                else [char, char.upper(), "_" if char == "-" else char]
            )
        )
        for char in text
    )


VALUES = st.sampled_from([b"", b"own", b"a; b", b'"x', b"a=b", b"\xff"])


@given(
    st.lists(st.tuples(spellings("x-api-key").filter(bool), VALUES), max_size=5),
    st.sampled_from(["x-api-key", "X_Api-Key"]),
)
def test_no_other_spelling_of_a_header_remains(sent: list[tuple[str, bytes]], name: str) -> None:
    """As CGI, WSGI and Rack read names."""
    request = view(headers=tuple((key.encode(), value) for key, value in sent))
    for headers in (injected(request, "header", name).headers, edit_headers(request.headers, Edit({name: "s3cret"}))):
        read = [(key.decode().upper().replace("-", "_"), value) for key, value in headers]
        assert [value for key, value in read if key == "X_API_KEY"] == [SECRET]
        others = [key for key, _ in sent if key.upper().replace("-", "_") != "X_API_KEY"]
        assert [key for key, _ in headers[:-1]] == [key.encode() for key in others]


@given(st.lists(st.sampled_from([b"Authorization", b"authorization", b"AUTHORIZATION", b"other"]), max_size=4))
def test_no_other_authorization_remains(names: list[bytes]) -> None:
    headers = injected(view(headers=tuple((name, b"own") for name in names)), "bearer").headers
    assert [value for key, value in headers if key.lower() == b"authorization"] == [b"Bearer " + SECRET]
    assert [key for key, _ in headers if key == b"other"] == [name for name in names if name == b"other"]


PARTS = st.tuples(spellings("key", escape=True), st.sampled_from(["", "=", "=own", "=a+b%20c", "=%zz", "=a=b"])).map(
    "".join
)
QUERIES = st.lists(st.tuples(PARTS, st.sampled_from(["&", ";", "&&"])), max_size=5).map(
    lambda pairs: "".join(part + mark for part, mark in pairs)
)


@given(QUERIES)
def test_no_other_spelling_of_a_parameter_remains(query: str) -> None:
    """Whether an origin separates by `&`, or by `;` too."""
    changed = injected(view(query), "query", "key").query
    for read in (
        parse_qsl(changed, keep_blank_values=True),
        parse_qsl(changed.replace("&", ";"), keep_blank_values=True, separator=";"),
    ):
        assert [value for key, value in read if key == "key"] == ["s3cret"]
    untouched = [part for part in re.split("[&;]", changed) if part]
    assert [part for part in untouched[:-1] if part not in re.split("[&;]", query)] == []


@given(QUERIES.filter(lambda query: ";" not in query))
def test_the_other_parameters_stay_as_they_were(query: str) -> None:
    changed = injected(view(query), "query", "key").query
    kept = [pair for pair in query.split("&") if not pair or parse_qsl(pair, keep_blank_values=True)[0][0] != "key"]
    assert changed == "&".join([*(kept if query else []), "key=s3cret"])


COOKIES = st.tuples(
    st.sampled_from(["sid", " sid ", "s%69d", "SID", "asid", "", "$Version"]),
    st.sampled_from(["", "=", "=own", '="a; sid=own"']),
).map("".join)


@given(st.lists(st.lists(COOKIES, max_size=4).map("; ".join), max_size=3), st.sampled_from(["; ", ";", ", "]))
def test_no_other_cookie_of_the_name_remains(cookies: list[str], separator: str) -> None:
    """Read by hand, by `;` and by `,`, and by Python's own parser."""
    sent = tuple((b"cookie", cookie.replace("; ", separator).encode()) for cookie in cookies)
    headers = injected(view(headers=sent), "cookie", "sid").headers
    (value,) = [value.decode() for key, value in headers if key.lower() == b"cookie"]
    for parts in (value.split(";"), re.split("[;,]", value)):
        read = [part.partition("=") for part in parts]
        assert [text for name, _, text in read if name.strip() in ("sid", "s%69d")] == ["s3cret"]
    jar: SimpleCookie = SimpleCookie()
    try:
        jar.load(value)
    except CookieError:
        return
    assert "sid" not in jar or jar["sid"].value == "s3cret"
