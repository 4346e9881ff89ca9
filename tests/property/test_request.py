"""Whatever an origin makes of the path it is sent, it was matched."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import quote_from_bytes, unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.address import Host
from proxy.request import Ambiguous, RequestView, parse_path


def decode(path: str) -> str:
    return unquote_to_bytes(path.encode("latin-1")).decode("latin-1")


def resolve_dots(path: str) -> str:
    """RFC 3986 section 5.2.4, letter by letter."""
    output = ""
    while path:
        if path.startswith("/../") or path == "/..":
            path, output = "/" + path[4:], output.rpartition("/")[0]
        elif path.startswith("/./") or path == "/.":
            path = "/" + path[3:]
        else:
            at = path.find("/", 1)
            segment, path = (path, "") if at < 0 else (path[:at], path[at:])
            output += segment
    return output or "/"


ORIGIN_STEPS: list[Callable[[str], str]] = [
    decode,
    lambda path: path.replace("\\", "/"),
    lambda path: re.sub("/{2,}", "/", path),
    lambda path: re.sub(";[^/]*", "", path),
    lambda path: re.sub("^//+[^/]*", "", path) or "/",
    resolve_dots,
]
SEGMENTS = st.sampled_from(
    ["a", "..", ".", "", "%2f", "%2F..%2f", "%2e%2e", "..;x", "%5c", "\\..", "%252e", "%255c", "%25252f", ";", "%3b"]
)
PATHS = st.lists(SEGMENTS, min_size=1, max_size=5).map(lambda segments: "/" + "/".join(segments)) | st.text(
    "/.;%2e5cCfF\\ab", max_size=14
).map(lambda text: "/" + text)


STEPS = st.lists(st.sampled_from(ORIGIN_STEPS), max_size=8)


def assert_read(raw: str, steps: list[Callable[[str], str]]) -> None:
    """What `steps` make of the forwarded path is one of its readings, spelt without loss."""
    try:
        path, readings = parse_path(raw)
    except Ambiguous:
        return
    for step in steps:
        path = step(path)
    spelling = quote_from_bytes(path.encode("latin-1"), safe="/~!$&'()*,=:@+;") if decode in steps else path
    assert spelling.replace("\\", "%5C") in readings


@given(PATHS, STEPS)
def test_every_way_an_origin_reads_a_path_is_among_its_readings(raw: str, steps: list[Callable[[str], str]]) -> None:
    assert_read(raw, steps)


@pytest.mark.parametrize("raw", ["/a/..%5c..%2f", "/%2e%2e%5c", "/a%2F%2F..%2Fb", "/a%2f%252e%252e%2fb", "//x/admin"])
@given(steps=STEPS)
def test_so_is_every_way_to_read_a_known_attack(raw: str, steps: list[Callable[[str], str]]) -> None:
    assert_read(raw, steps)


@given(st.text("abc019-._~!$&'()*,=:@+;/?%[]{}|^", max_size=40))
def test_a_query_is_forwarded_byte_for_byte(raw: str) -> None:
    """A signature over it still holds."""
    assert RequestView.parse("GET", "https", Host("a.test"), 443, f"/?{raw}").query == raw


NAMES = st.sampled_from([b"Host", b"connection", b"x_a", b"X-HTTP-Method-Override", b"upgrade", b"authorization", b" "])
HEADERS = st.lists(st.tuples(NAMES | st.binary(max_size=4), st.binary(max_size=8)), max_size=4)
TARGETS = st.text(max_size=20) | st.text("/%?&;=+.#\\{|25eEfF\x00\x7f\xe9ab", max_size=30).map(lambda text: "/" + text)


@given(st.sampled_from(["GET", "get", "P T", "", "\u0130"]) | st.text(max_size=3), TARGETS, HEADERS)
def test_any_request_is_a_view_or_ambiguous(method: str, target: str, headers: list[tuple[bytes, bytes]]) -> None:
    """Nothing else is raised, and what was made normal stays as it is."""
    try:
        view = RequestView.parse(method, "https", Host("a.test"), 443, target, headers)
    except Ambiguous:
        return
    again = RequestView.parse(view.method, "https", view.host, 443, view.path_and_query, view.headers)
    assert again._replace(upgrade=view.upgrade) == view  # that header is not forwarded
    assert view.path_and_query.isascii()


@given(st.text(max_size=30) | st.text(".:[]%0123456789abcdefx-@", max_size=30))
def test_any_host_is_one_or_none(text: str) -> None:
    """A host is its own normal form."""
    try:
        host = Host.parse(text)
    except ValueError:
        return
    assert Host.parse(str(host)) == host
